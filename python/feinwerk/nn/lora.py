"""LoRALinear and DoRALinear: a frozen linear layer, dense or NF4, with a trained addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn.adapter import Adapter
from feinwerk.nn.dora import DoRA
from feinwerk.nn.nf4_linear import NF4Linear
from feinwerk.ops import dora_linear, lora_linear, row_norms, weight_norm
from feinwerk.weight import NF4Weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer that holds its weight as [K, N]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _save_contiguous(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Hand Conv1D's weight out in the order it came in, as safetensors demands."""
    key = f"{prefix}base_layer.weight"
    weight = state_dict.get(key)
    if isinstance(weight, torch.Tensor) and not isinstance(weight, nn.Parameter):
        state_dict[key] = weight.contiguous()


class LoRALinear(Adapter):
    """y = x W^T + b + scaling (dropout(x) A^T) B^T (+ scaling lora_bias), in one fused op.

    W is the base's, frozen; its bias stays as it is. Parameters: `lora_A` [r, K], `lora_B` [N, r]
    and, if asked for, `lora_bias` [N]. Dropout acts in training only; its mask is drawn again from
    a seed, never stored. Under autocast and with bf16 or fp16 activations the products accumulate
    in fp32 whatever the adapter's dtype.

    Args:
        base_layer: a torch.nn.Linear, an NF4Linear or transformers' Conv1D; it is taken over, not
            copied.
        r: rank, 1 to any.
        lora_alpha: scaling is lora_alpha / r.
        use_rslora: scaling is lora_alpha / sqrt(r) instead.
        dropout: probability of dropping an element of x on the adapter's path.
        lora_bias: whether the adapter has a bias of its own.
        init: "default" (A kaiming-uniform, B zero), "gaussian", "orthogonal" (r even); or "pissa"
            ("pissa_niter_4"), "olora" and "loftq", which take A and B out of W and leave the rest
            in the base: "pissa" and "olora" re-quantize an NF4 base, "loftq" turns a dense one
            into an NF4Linear. The module keeps the first A and B for `feinwerk.nn.save_adapter`.
        iterations: of "loftq".
        dtype: of the adapter's parameters.

    Raises:
        TypeError: if base_layer is of another kind, or a dtype is not fp32, bf16 or fp16.
        ValueError: if an option breaks its rule; nothing has been changed then.

    Source:
        LoRA (arXiv 2106.09685), equation 3; rsLoRA (arXiv 2312.03732), theorem 3.2.

    Example:
        >>> layer = LoRALinear(nn.Linear(64, 8), 4, lora_alpha=8)
        >>> layer(torch.randn(3, 64)).shape
        torch.Size([3, 8])
    """

    inits = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq")

    def __init__(self, base_layer: nn.Module, r: int, **options: Any) -> None:
        """Wrap the layer; see the class."""
        super().__init__(base_layer, r, **options)
        self.out_features, self.in_features = self.lora_B.shape[0], self.lora_A.shape[1]
        if self.transposed:
            # [K, N] as before, but with the memory order of [N, K], which the op would otherwise
            # copy in every call.
            self.weight.data = self.weight.data.t().contiguous().t()
            self.register_state_dict_post_hook(_save_contiguous)  # type: ignore[no-untyped-call]

    @classmethod
    def _check_base(cls, base_layer: nn.Module) -> None:
        if type(base_layer) not in (nn.Linear, NF4Linear) and not is_conv1d(base_layer):
            rule = "be a torch.nn.Linear, NF4Linear or Conv1D"
            _checks.reject(TypeError, cls.__name__, "base_layer", rule, type(base_layer).__name__)

    @classmethod
    def shapes(cls, base_layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes that lora_A and lora_B have over a layer."""
        if is_conv1d(base_layer):
            weight = base_layer._parameters["weight"]
            assert weight is not None
            K, N = weight.shape
            return (r, K), (N, r)
        assert isinstance(base_layer, nn.Linear)
        return (r, base_layer.in_features), (base_layer.out_features, r)

    @property
    def transposed(self) -> bool:
        """Whether the base holds its weight as [K, N]."""
        return is_conv1d(self.base_layer)

    def _quantized_base(self, weight: NF4Weight) -> nn.Module:
        return NF4Linear.from_weight(weight, self.bias).train(self.base_layer.training)

    def _tables(self) -> tuple[tuple[torch.Tensor | None, ...], int]:
        """The weight as the ops take it, [N, K] or codes with their tables, and the blocksize."""
        base = self.base_layer
        if isinstance(base, NF4Linear):
            nested = (base.nested_absmax, base.nested_codebook, base.nested_offset)
            return (base.weight, base.absmax, *nested), base.blocksize
        weight = self.weight
        return (weight.t() if self.transposed else weight, None, None, None, None), 64

    def _options(self) -> dict[str, Any]:
        base = self.base_layer
        return {
            "scaling": self.scaling,
            "dropout_p": self.dropout if self.training else 0.0,
            "compute": base.compute if isinstance(base, NF4Linear) else "exact",
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [..., N] in x's dtype for x [..., K]; see `feinwerk.lora_linear`."""
        if self._bare:
            y: torch.Tensor = self.base_layer(x)
            return y
        (weight, *tables), blocksize = self._tables()
        assert weight is not None
        return lora_linear(
            x, weight, self.lora_A, self.lora_B, self.bias, self.lora_bias, *tables,
            blocksize=blocksize, **self._options(),
        )  # fmt: skip


class DoRALinear(DoRA, LoRALinear):
    """y = (magnitude / ||W + scaling B A||) (x W^T + scaling x A^T B^T) + b, in one fused op.

    The norms of the rows are constants for gradients, and dropout follows PEFT's rule: see
    `feinwerk.dora_linear`. Neither B A nor a dense W is formed. Exactly the base layer at
    initialisation, for every init with B A = 0.

    The norm is computed in every forward with gradients; in eval mode without them it is kept.
    Call `invalidate()` after writing into parameters raw in eval mode (`p.data.copy_(...)`), or
    after changing the base's weight.

    Args:
        base_layer: as for `LoRALinear`.
        r: as for `LoRALinear`.
        options: as for `LoRALinear`, without lora_bias.

    Raises:
        TypeError: as for `LoRALinear`.
        ValueError: as for `LoRALinear`.

    Source:
        DoRA (arXiv 2402.09353), equation 5 and section 4.3.

    Example:
        >>> base = nn.Linear(64, 8)
        >>> x = torch.randn(3, 64)
        >>> torch.equal(DoRALinear(base, 4, lora_alpha=8)(x), base(x))
        True
    """

    def _row_norms(self) -> torch.Tensor:
        tables, blocksize = self._tables()
        shape = (self.lora_B.shape[0], self.lora_A.shape[1])
        return row_norms(*tables, shape=shape, blocksize=blocksize)  # type: ignore[arg-type]

    def _factored_norm(self, base_norm: torch.Tensor) -> torch.Tensor:
        (weight, *tables), blocksize = self._tables()
        assert weight is not None
        return weight_norm(
            weight, self.lora_A, self.lora_B, *tables, scaling=self.scaling, base_norm=base_norm,
            blocksize=blocksize,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [..., N] in x's dtype for x [..., K]; see `feinwerk.dora_linear`."""
        if self._bare:
            y: torch.Tensor = self.base_layer(x)
            return y
        (weight, *tables), blocksize = self._tables()
        assert weight is not None
        return dora_linear(
            x, weight, self.lora_A, self.lora_B, self.magnitude, self.bias, *tables,
            base_norm=self._known_base_norm(), weight_norm=self._cached_norm(),
            blocksize=blocksize, **self._options(),
        )  # fmt: skip
