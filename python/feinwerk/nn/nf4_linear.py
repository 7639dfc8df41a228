"""NF4Linear: torch.nn.Linear with its weight held in NF4."""

from __future__ import annotations

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn.nf4_module import NF4Module, empty_weight
from feinwerk.ops.nf4_linear import nf4_linear
from feinwerk.weight import NF4Weight


class NF4Linear(NF4Module, nn.Linear):
    """y = x @ W~^T + bias, W~ the NF4 weight rounded once to x's dtype; the weight is frozen.

    The weight takes about 4.13 bits an element and is never expanded. A subclass of
    `torch.nn.Linear`, so adapters wrap it like any Linear; its state dict has bitsandbytes' keys.
    `half()`, `bfloat16()`, `float()` and `to(dtype)` change `dtype` (and the bias), never the
    codes. y has the dtype of x. Stock PEFT cannot merge an adapter into the codes (call
    `feinwerk.nn.dequantize_model` first); Feinwerk's adapters can.

    The constructor makes a zero weight to load a checkpoint into; `from_linear` quantizes one.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias.
        device: where to put it; "meta" works.
        dtype: of `dequantize()` and the bias; default torch's default dtype.
        blocksize: elements per absmax.
        double_quant: whether absmax is quantized as well. Loading a checkpoint overrides it,
            blocksize and dtype with what the checkpoint holds.
        compute: "exact", or "int8" for activations rounded to 8 bits in the forward pass.

    Raises:
        TypeError: if dtype is not torch.float32, torch.bfloat16 or torch.float16.
        ValueError: if a size, blocksize or compute breaks its rule.

    Source:
        QLoRA (arXiv 2305.14314), section 3.

    Example:
        >>> layer = NF4Linear.from_linear(nn.Linear(64, 8))
        >>> layer(torch.randn(3, 64)).shape
        torch.Size([3, 8])
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        compute: str = "exact",
    ) -> None:
        """Make the zero weight; see the class."""
        weight = empty_weight(
            "NF4Linear", out_features, in_features, blocksize, double_quant, dtype, device
        )
        bias_value = None
        if bias:
            zeros = torch.zeros(out_features, dtype=weight.dtype, device=device)
            bias_value = nn.Parameter(zeros)
        self._build(weight, bias_value, compute)

    def _build(self, weight: NF4Weight, bias: nn.Parameter | None, compute: str) -> None:
        # nn.Linear's own constructor would allocate the dense weight.
        nn.Module.__init__(self)
        if compute not in ("exact", "int8"):
            _checks.reject(ValueError, "NF4Linear", "compute", 'be "exact" or "int8"', compute)
        self.out_features, self.in_features = weight.shape
        self.compute = compute
        self._hold(weight)
        self.register_parameter("bias", bias)

    @classmethod
    def from_weight(
        cls, weight: NF4Weight, bias: torch.Tensor | None = None, *, compute: str = "exact"
    ) -> NF4Linear:
        """Return a layer around an existing weight; its tensors are shared, not copied.

        Args:
            weight: of shape (N, K).
            bias: [N], taken over as it is when it is a Parameter.
            compute: "exact" or "int8".

        Returns:
            The layer.

        Raises:
            ValueError: if the weight is not 2-D or the bias has another size.

        Source:
            docs/format.md.

        Example:
            >>> NF4Linear.from_weight(NF4Weight.from_dense(torch.ones(8, 64))).in_features
            64
        """
        op = "NF4Linear.from_weight"
        if len(weight.shape) != 2:
            _checks.reject(ValueError, op, "weight", "have shape (N, K)", weight.shape)
        if bias is not None and tuple(bias.shape) != weight.shape[:1]:
            rule = f"have shape ({weight.shape[0]},)"
            _checks.reject(ValueError, op, "bias", rule, tuple(bias.shape))
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        layer = cls.__new__(cls)
        layer._build(weight, bias, compute)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        rule: str = "cpu",
        allow_non_finite: bool = False,
        compute: str = "exact",
    ) -> NF4Linear:
        """Quantize a dense Linear; the bias is taken over, the source is left as it is.

        Args:
            linear: a torch.nn.Linear with an fp32, bf16 or fp16 weight.
            blocksize: elements per absmax, 32 to 4096.
            double_quant: also quantize absmax.
            rule: "cpu" or "cuda", whose rounding decisions are followed.
            allow_non_finite: pass NaN and infinity on as bitsandbytes does.
            compute: "exact" or "int8".

        Returns:
            The quantized layer, in the training mode of the source.

        Raises:
            TypeError: if it is not a Linear with a weight of those dtypes.
            ValueError: if the weight is not finite or blocksize or rule is unknown.

        Source:
            QLoRA (arXiv 2305.14314), section 3.

        Example:
            >>> NF4Linear.from_linear(nn.Linear(64, 8)).weight.shape
            torch.Size([256, 1])
        """
        op = "NF4Linear.from_linear"
        if not isinstance(linear, nn.Linear) or isinstance(linear, NF4Module):
            rule_text = "be a dense torch.nn.Linear"
            _checks.reject(TypeError, op, "linear", rule_text, type(linear).__name__)
        weight = NF4Weight.from_dense(
            linear.weight, blocksize=blocksize, double_quant=double_quant, rule=rule,
            allow_non_finite=allow_non_finite,
        )  # fmt: skip
        return cls.from_weight(weight, linear.bias, compute=compute).train(linear.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a dense torch.nn.Linear with the dequantized weight, e.g. to merge an adapter.

        Args:
            dtype: of its weight; default `self.dtype`.

        Returns:
            A new Linear; the bias is shared.

        Raises:
            TypeError: if dtype is not torch.float32, torch.bfloat16 or torch.float16.

        Source:
            docs/ops/nf4_dequantize.md.

        Example:
            >>> NF4Linear(64, 8).to_linear().weight.shape
            torch.Size([8, 64])
        """
        return self.with_dense_weight(nn.Parameter(self.dequantize(dtype), requires_grad=False))

    def with_dense_weight(self, weight: nn.Parameter) -> nn.Linear:
        """Return a torch.nn.Linear like this one, but with the given dense weight [N, K]."""
        # nn.Linear's constructor would draw random numbers that nobody needs.
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight = weight
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return y [..., N] in x's dtype for x [..., K]; see `feinwerk.nf4_linear`."""
        return nf4_linear(
            input, self.weight, self.absmax, self.bias, self.nested_absmax,
            self.nested_codebook, self.nested_offset, N=self.out_features, K=self.in_features,
            blocksize=self.blocksize, compute=self.compute,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Sizes and format."""
        compute = "" if self.compute == "exact" else f", compute={self.compute}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, dtype={self.dtype}{compute}"
        )
