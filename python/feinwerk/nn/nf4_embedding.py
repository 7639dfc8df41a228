"""NF4Embedding: torch.nn.Embedding with its table held in NF4."""

from __future__ import annotations

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn.nf4_module import NF4Module, empty_weight
from feinwerk.ops.nf4_embedding import nf4_embedding
from feinwerk.weight import NF4Weight


class NF4Embedding(NF4Module, nn.Embedding):
    """W[indices], rows dequantized and rounded once to `dtype`; the table is frozen.

    The constructor makes a zero table to load a checkpoint into; `from_embedding` quantizes one.

    Args:
        num_embeddings: N.
        embedding_dim: K.
        padding_idx: kept as information, negative counts from the end; a frozen table has no
            gradient to mask.
        device: where to put it; "meta" works.
        dtype: output dtype; default torch's default dtype.
        blocksize: elements per absmax.
        double_quant: whether absmax is quantized as well.

    Raises:
        TypeError: if dtype is not torch.float32, torch.bfloat16 or torch.float16.
        ValueError: if a size or blocksize breaks its rule or padding_idx is out of range.

    Source:
        QLoRA (arXiv 2305.14314), section 3.

    Example:
        >>> table = NF4Embedding.from_embedding(nn.Embedding(10, 64))
        >>> table(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> None:
        """Make the zero weight; see the class."""
        weight = empty_weight(
            "NF4Embedding", num_embeddings, embedding_dim, blocksize, double_quant, dtype, device
        )
        self._build(weight, padding_idx)

    def _build(self, weight: NF4Weight, padding_idx: int | None) -> None:
        # nn.Embedding's own constructor would allocate the dense table.
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        if padding_idx is not None:
            if not -self.num_embeddings <= padding_idx < self.num_embeddings:
                rule = f"be within the {self.num_embeddings} rows"
                _checks.reject(ValueError, "NF4Embedding", "padding_idx", rule, padding_idx)
            padding_idx %= self.num_embeddings
        self.padding_idx = padding_idx
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self._hold(weight)

    @classmethod
    def from_weight(cls, weight: NF4Weight, padding_idx: int | None = None) -> NF4Embedding:
        """Return a table around an existing weight; its tensors are shared, not copied.

        Args:
            weight: of shape (N, K).
            padding_idx: kept as information.

        Returns:
            The table.

        Raises:
            ValueError: if the weight is not 2-D or padding_idx is out of range.

        Source:
            docs/format.md.

        Example:
            >>> NF4Embedding.from_weight(NF4Weight.from_dense(torch.ones(8, 64))).num_embeddings
            8
        """
        if len(weight.shape) != 2:
            op = "NF4Embedding.from_weight"
            _checks.reject(ValueError, op, "weight", "have shape (N, K)", weight.shape)
        layer = cls.__new__(cls)
        layer._build(weight, padding_idx)
        return layer

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        rule: str = "cpu",
        allow_non_finite: bool = False,
    ) -> NF4Embedding:
        """Quantize a dense embedding; the source is left as it is.

        Args:
            embedding: a torch.nn.Embedding without max_norm.
            blocksize: elements per absmax, 32 to 4096.
            double_quant: also quantize absmax.
            rule: "cpu" or "cuda", whose rounding decisions are followed.
            allow_non_finite: pass NaN and infinity on as bitsandbytes does.

        Returns:
            The quantized table; its output dtype is the source's.

        Raises:
            TypeError: if it is not a dense Embedding of fp32, bf16 or fp16.
            ValueError: if max_norm is set (it rewrites rows of the table), or the table is not
                finite, or blocksize or rule is unknown.

        Source:
            QLoRA (arXiv 2305.14314), section 3.

        Example:
            >>> NF4Embedding.from_embedding(nn.Embedding(10, 64, padding_idx=-1)).padding_idx
            9
        """
        op = "NF4Embedding.from_embedding"
        if not isinstance(embedding, nn.Embedding) or isinstance(embedding, NF4Module):
            rule_text = "be a dense torch.nn.Embedding"
            _checks.reject(TypeError, op, "embedding", rule_text, type(embedding).__name__)
        if embedding.max_norm is not None:
            rule_text = "be None: it rewrites rows of the table, and an NF4 table is frozen"
            _checks.reject(ValueError, op, "max_norm", rule_text, embedding.max_norm)
        weight = NF4Weight.from_dense(
            embedding.weight, blocksize=blocksize, double_quant=double_quant, rule=rule,
            allow_non_finite=allow_non_finite,
        )  # fmt: skip
        return cls.from_weight(weight, embedding.padding_idx).train(embedding.training)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Return a dense torch.nn.Embedding with the dequantized table.

        Args:
            dtype: of its table; default `self.dtype`.

        Returns:
            A new Embedding, frozen.

        Raises:
            TypeError: if dtype is not torch.float32, torch.bfloat16 or torch.float16.

        Source:
            docs/ops/nf4_dequantize.md.

        Example:
            >>> NF4Embedding(10, 64).to_embedding().weight.shape
            torch.Size([10, 64])
        """
        return self.with_dense_weight(nn.Parameter(self.dequantize(dtype), requires_grad=False))

    def with_dense_weight(self, weight: nn.Parameter) -> nn.Embedding:
        """Return a torch.nn.Embedding like this one, but with the given dense table [N, K]."""
        # `_weight` keeps the constructor from drawing random numbers that nobody needs.
        dense = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=weight
        )
        dense.weight = weight
        return dense.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows [..., K] in `self.dtype` for int64 or int32 indices of any shape."""
        packed = self.weight  # first: it may set self.dtype
        return nf4_embedding(
            input, packed, self.absmax, self.nested_absmax, self.nested_codebook,
            self.nested_offset, N=self.num_embeddings, K=self.embedding_dim,
            blocksize=self.blocksize, dtype=self.dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Sizes and format."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, dtype={self.dtype}"
        )
