"""LoRAConv and DoRAConv: a frozen convolution with a trained low-rank addition, as PEFT has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from feinwerk import _checks
from feinwerk.nn.adapter import Adapter
from feinwerk.nn.dora import DoRA
from feinwerk.ops import row_norms, weight_norm

_CONV: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class LoRAConv(Adapter):
    """y = conv(x, W) + b + scaling conv1x1(conv(dropout(x), A), B) (+ scaling lora_bias).

    `lora_A` [r, C, *kernel] is a convolution with the base's kernel, stride, padding and dilation,
    `lora_B` [N, r / groups, 1, ...] a pointwise one with its groups. Torch's convolutions, dropout
    (`torch.nn.functional.dropout`) and autograd: no op of Feinwerk's applies. With groups the
    addition is not a grouped convolution any more, so that it cannot be merged.

    Args:
        base_layer: a torch.nn.Conv1d, Conv2d or Conv3d with padding_mode "zeros"; taken over.
        r: rank, a multiple of the base's groups.
        lora_alpha: scaling is lora_alpha / r.
        use_rslora: scaling is lora_alpha / sqrt(r) instead.
        dropout: probability of dropping an element of x on the adapter's path.
        lora_bias: whether the adapter has a bias of its own.
        init: "default" (A kaiming-uniform, B zero) or "gaussian".
        dtype: of the adapter's parameters.

    Raises:
        TypeError: if base_layer is of another kind, or a dtype is not fp32, bf16 or fp16.
        ValueError: if an option breaks its rule; nothing has been changed then.

    Source:
        LoRA (arXiv 2106.09685), section 4.1; the convolution form: PEFT.

    Example:
        >>> layer = LoRAConv(nn.Conv2d(3, 8, 3, padding=1), 4, lora_alpha=8)
        >>> layer(torch.randn(1, 3, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    unused = ("iterations",)

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        *,
        lora_alpha: float,
        use_rslora: bool = False,
        dropout: float = 0.0,
        lora_bias: bool = False,
        init: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap the convolution; see the class."""
        super().__init__(
            base_layer, r, lora_alpha=lora_alpha, use_rslora=use_rslora, dropout=dropout,
            lora_bias=lora_bias, init=init, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def check(cls, base_layer: nn.Module, r: int, **options: Any) -> None:
        """See `Adapter.check`."""
        super().check(base_layer, r, **options)
        groups: Any = base_layer.groups
        if r % groups:
            rule = f"be a multiple of the convolution's groups = {groups}"
            _checks.reject(ValueError, cls.__name__, "r", rule, r)

    @classmethod
    def _check_base(cls, base_layer: nn.Module) -> None:
        op = cls.__name__
        if type(base_layer) not in _CONV:
            rule = "be a torch.nn.Conv1d, Conv2d or Conv3d"
            _checks.reject(TypeError, op, "base_layer", rule, type(base_layer).__name__)
        if base_layer.padding_mode != "zeros":
            mode = repr(base_layer.padding_mode)
            _checks.reject(ValueError, op, "padding_mode", "be 'zeros'", mode)

    @property
    def _conv(self) -> nn.Conv2d:
        """The base, typed; Conv1d and Conv3d have the same attributes."""
        base: Any = self.base_layer
        conv: nn.Conv2d = base
        return conv

    @classmethod
    def shapes(cls, base_layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes that lora_A and lora_B have over a layer."""
        conv: Any = base_layer
        ones = (1,) * len(conv.kernel_size)
        return (
            (r, conv.in_channels, *conv.kernel_size),
            (conv.out_channels, r // conv.groups, *ones),
        )

    def merged_weight(self) -> torch.Tensor:
        """See `Adapter.merged_weight`."""
        self._check_one_group("merge")
        return super().merged_weight()

    def get_delta_weight(self) -> torch.Tensor:
        """See `Adapter.get_delta_weight`."""
        self._check_one_group("get_delta_weight")
        return super().get_delta_weight()

    def _check_one_group(self, action: str) -> None:
        groups = self._conv.groups
        if groups > 1:
            rule = f"be 1 for {action}: every group would need the other groups' channels"
            _checks.reject(NotImplementedError, type(self).__name__, "groups", rule, groups)

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
        conv = self._conv
        y: torch.Tensor = _CONV[type(conv)](
            x, weight, None, conv.stride, conv.padding, conv.dilation, groups
        )
        return y

    def _addition(self, dropped: torch.Tensor) -> torch.Tensor:
        """The sum scaling conv1x1(conv(dropped, A), B) in the adapter's dtype."""
        conv, x = self._conv, dropped.to(self.lora_A.dtype)
        S = self._convolve(x, self.lora_A, 1)
        y: torch.Tensor = _CONV[type(conv)](S, self.lora_B, self.lora_bias, groups=conv.groups)
        return y * self.scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [batch, N, ...] in the base's result dtype for x [batch, C, ...]."""
        y: torch.Tensor = self.base_layer(x)
        if self._bare:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        return (y + self._addition(dropped)).to(y.dtype)


class DoRAConv(DoRA, LoRAConv):
    """DoRA over a convolution: a magnitude for every output channel, as PEFT defines it.

        g = magnitude / ||W + scaling B A||                over channels and kernel, a constant
        y = g (conv(x, W) + addition(x)) + b                                    without dropout
        y = conv(x, W) + (g - 1) conv(x~, W) + g addition(x~) + b    with it, x~ = dropout(x)

    The norm is the factored one of `feinwerk.weight_norm` over W as [N, C * kernel]: B A is never
    formed. `magnitude` is [N]. Groups must be 1.

    Args:
        base_layer: as for `LoRAConv`.
        r: as for `LoRAConv`.
        options: as for `LoRAConv`, without lora_bias.

    Raises:
        TypeError: as for `LoRAConv`.
        ValueError: as for `LoRAConv`.

    Source:
        DoRA (arXiv 2402.09353), equation 5; the convolution form: PEFT.

    Example:
        >>> base = nn.Conv2d(3, 8, 3, padding=1)
        >>> x = torch.randn(1, 3, 5, 5)
        >>> torch.equal(DoRAConv(base, 4, lora_alpha=8)(x), base(x))
        True
    """

    @classmethod
    def _check_base(cls, base_layer: nn.Module) -> None:
        super()._check_base(base_layer)
        if base_layer.groups != 1:
            rule = "be 1: with more, W + scaling B A is no grouped convolution"
            _checks.reject(ValueError, cls.__name__, "groups", rule, base_layer.groups)

    def _row_norms(self) -> torch.Tensor:
        return row_norms(self.weight.flatten(1))

    def _factored_norm(self, base_norm: torch.Tensor) -> torch.Tensor:
        return weight_norm(
            self.weight.flatten(1), self.lora_A.flatten(1), self.lora_B.flatten(1),
            scaling=self.scaling, base_norm=base_norm,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [batch, N, ...] in the base's result dtype for x [batch, C, ...]."""
        y: torch.Tensor = self.base_layer(x)
        if self._bare:
            return y
        norm = self._cached_norm()
        gain = self._gain_of(self.weight_norm() if norm is None else norm)
        gain = gain.view(-1, *(1,) * len(self._conv.kernel_size))
        if self.training and self.dropout > 0:
            dropped = F.dropout(x, self.dropout)
            product = self._convolve(dropped, self.weight, 1)
        else:
            dropped, product, bias = x, y, self.bias
            if bias is not None:
                product = y - bias.view(gain.shape)
        return (y + (gain - 1) * product + gain * self._addition(dropped)).to(y.dtype)
