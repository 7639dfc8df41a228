"""LoRAEmbedding and DoRAEmbedding: a frozen table, dense or NF4, with a trained addition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from feinwerk import _checks
from feinwerk.nn.adapter import Adapter
from feinwerk.nn.dora import DoRA
from feinwerk.nn.nf4_embedding import NF4Embedding
from feinwerk.nn.nf4_module import NF4Module

_SLAB = 1 << 20  # elements of the table in fp32 at a time


class LoRAEmbedding(Adapter):
    """The rows W[indices] + scaling (A^T)[indices] B^T.

    W [V, D] is the base's, frozen. Parameters: `lora_A` [r, V], zero at first, and `lora_B` [D, r],
    normal: PEFT's lora_embedding_A and lora_embedding_B. Torch operations over the rows that are
    asked for; nothing of the table's size is made but the gradient of A. As in PEFT there is no
    dropout on indices, and a padding_idx masks the gradient of its column of A.

    Args:
        base_layer: a torch.nn.Embedding (without max_norm, not sparse) or an NF4Embedding; taken
            over.
        r: rank.
        lora_alpha: scaling is lora_alpha / r.
        use_rslora: scaling is lora_alpha / sqrt(r) instead.
        lora_bias: must be False; PEFT has none here either.
        init: "default" or "gaussian", which are the same here.
        dtype: of the adapter's parameters.

    Raises:
        TypeError: if base_layer is of another kind, or a dtype is not fp32, bf16 or fp16.
        ValueError: if an option breaks its rule; nothing has been changed then.

    Source:
        LoRA (arXiv 2106.09685), section 4.1; the embedding form: PEFT.

    Example:
        >>> table = LoRAEmbedding(nn.Embedding(10, 64), 4, lora_alpha=8)
        >>> table(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 64])
    """

    unused = ("dropout", "iterations")

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        *,
        lora_alpha: float,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap the table; see the class."""
        super().__init__(
            base_layer, r, lora_alpha=lora_alpha, use_rslora=use_rslora, lora_bias=lora_bias,
            init=init, dtype=dtype,
        )  # fmt: skip
        self.embedding_dim, self.num_embeddings = self.lora_B.shape[0], self.lora_A.shape[1]
        self.padding_idx: int | None = self._table.padding_idx

    @property
    def _table(self) -> nn.Embedding:
        assert isinstance(self.base_layer, nn.Embedding)
        return self.base_layer

    @classmethod
    def check(cls, base_layer: nn.Module, r: int, **options: Any) -> None:
        """See `Adapter.check`."""
        super().check(base_layer, r, **options)
        if options.get("lora_bias"):
            _checks.reject(ValueError, cls.__name__, "lora_bias", "be False", True)

    @classmethod
    def _check_base(cls, base_layer: nn.Module) -> None:
        op = cls.__name__
        if type(base_layer) not in (nn.Embedding, NF4Embedding):
            rule = "be a torch.nn.Embedding or NF4Embedding"
            _checks.reject(TypeError, op, "base_layer", rule, type(base_layer).__name__)
        assert isinstance(base_layer, nn.Embedding)
        if base_layer.max_norm is not None:
            rule = "be None: it rewrites rows of the table, which is frozen"
            _checks.reject(ValueError, op, "max_norm", rule, base_layer.max_norm)
        if base_layer.sparse:
            rule = "be False: the gradient of lora_A is not sparse"
            _checks.reject(ValueError, op, "sparse", rule, True)

    @classmethod
    def shapes(cls, base_layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes that lora_A and lora_B have over a layer."""
        assert isinstance(base_layer, nn.Embedding)
        return (r, base_layer.num_embeddings), (base_layer.embedding_dim, r)

    @property
    def transposed(self) -> bool:
        """True: the table is [V, D], B A [D, V]."""
        return True

    def _initialise(self, init: str, iterations: int) -> None:
        nn.init.zeros_(self.lora_A)
        with torch.no_grad():
            self.lora_B.copy_(torch.randn(self.lora_B.shape, device=self.lora_B.device))

    def _addition(self, indices: torch.Tensor) -> torch.Tensor:
        """The rows scaling (A^T)[indices] B^T in the adapter's or the autocast dtype."""
        rows = F.embedding(
            indices, self.lora_A.t(), self.padding_idx,
            scale_grad_by_freq=self._table.scale_grad_by_freq,
        )  # fmt: skip
        return F.linear(rows, self.lora_B) * self.scaling

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the rows [..., D] in the base's dtype for int64 or int32 indices of any shape."""
        rows: torch.Tensor = self.base_layer(indices)
        if self._bare:
            return rows
        return (rows + self._addition(indices)).to(rows.dtype)


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """The rows of (magnitude / ||W^T + scaling B A||) (W + scaling A^T B^T), as PEFT defines it.

    A magnitude for every column of the table: `magnitude` [D]. The norms run over the whole
    vocabulary and are constants for gradients. With gradients they are computed in every forward,
    one pass over the table in slabs; the factored form keeps D x r numbers and forms neither B A
    nor a dense table. In eval mode without gradients they are kept.

    Args:
        base_layer: as for `LoRAEmbedding`.
        r: as for `LoRAEmbedding`.
        options: as for `LoRAEmbedding`.

    Raises:
        TypeError: as for `LoRAEmbedding`.
        ValueError: as for `LoRAEmbedding`.

    Source:
        DoRA (arXiv 2402.09353), equation 5; the embedding form: PEFT.

    Example:
        >>> base = nn.Embedding(10, 64)
        >>> ids = torch.tensor([[1, 2]])
        >>> torch.equal(DoRAEmbedding(base, 4, lora_alpha=8)(ids), base(ids))
        True
    """

    def _slabs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row and the fp32 values of every slab of the table."""
        V, D = self.num_embeddings, self.embedding_dim
        step = max(1, _SLAB // D)
        base = self.base_layer
        for v in range(0, V, step):
            if isinstance(base, NF4Module):
                rows = torch.arange(v, min(v + step, V), device=base.weight.device)
                yield v, base.nf4_weight.to(dtype=torch.float32).embedding(rows)
            else:
                yield v, self.weight[v : v + step].detach().float()

    def _row_norms(self) -> torch.Tensor:
        parts = [torch.linalg.vector_norm(slab, dim=0) for _, slab in self._slabs()]
        norms: torch.Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return norms

    def _factored_norm(self, base_norm: torch.Tensor) -> torch.Tensor:
        A, B, s = self.lora_A.float(), self.lora_B.float(), self.scaling
        with torch.autocast(A.device.type, enabled=False):
            cross = torch.zeros_like(B)  # W^T A^T [D, r]
            for v, slab in self._slabs():
                cross.addmm_(slab.t(), A[:, v : v + len(slab)].t())
            change = 2 * s * (cross * B).sum(dim=1) + s * s * ((B @ (A @ A.t())) * B).sum(dim=1)
        # The relative form is exactly base_norm where B A is zero.
        relative = base_norm * (1 + change / (base_norm * base_norm)).clamp(min=0).sqrt()
        return torch.where(base_norm > 0, relative, change.clamp(min=0).sqrt())

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the rows [..., D] in the base's dtype for int64 or int32 indices of any shape."""
        rows: torch.Tensor = self.base_layer(indices)
        if self._bare:
            return rows
        norm = self._cached_norm()
        gain = self._gain_of(self.weight_norm() if norm is None else norm)
        return (gain * (rows + self._addition(indices))).to(rows.dtype)
