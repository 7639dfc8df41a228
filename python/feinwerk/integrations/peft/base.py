"""Reading a base layer: the weight as the ops take it, or why it is left to PEFT."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from feinwerk.codebook import NESTED_BLOCKSIZE
from feinwerk.nn import NF4Linear, nf4_rows

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Base(NamedTuple):
    """A frozen linear layer: the tensors of its weight, its bias, and how they are meant.

    `dtype` is what the weight stands for (what PEFT takes norms of); an NF4 weight has absmax.
    `owner` is the parameter, the same object from call to call. `restores_dtype` says that the
    layer returns its input's dtype under autocast as well.
    """

    weight: torch.Tensor
    owner: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    bias: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_codebook: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    blocksize: int = 64
    compute: str = "exact"
    restores_dtype: bool = False

    @property
    def tables(self) -> dict[str, Any]:
        """What beside packed codes an NF4 weight consists of, by the ops' argument names."""
        return {
            "absmax": self.absmax, "nested_absmax": self.nested_absmax,
            "nested_codebook": self.nested_codebook, "nested_offset": self.nested_offset,
        }  # fmt: skip


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling the module is nothing but its class's forward: no hook, no replacement."""
    own = vars(module)
    return type(module) in kinds and not (
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def is_tensor(tensor: torch.Tensor, sharded: bool = False) -> bool:
    """Whether a fused op takes it: no subclass; with `sharded` one that fully_shard gathers."""
    return type(tensor) in (nn.Parameter, torch.Tensor) or (sharded and nf4_rows.is_sharded(tensor))


def read(layer: nn.Module, sharded: bool = False) -> Base | str:
    """Return the base weight of a layer, or the reason why the fused ops do not take it.

    With `sharded`, weights that fully_shard will have gathered in a forward count as they are.
    """
    kind = type(layer)
    if kind is nn.Linear:
        base = _dense(layer)
    elif isinstance(layer, NF4Linear) and kind is NF4Linear:
        base = read_nf4(layer)
    elif is_bitsandbytes(layer):
        base = _bitsandbytes(layer)
    else:
        return f"the base layer is a {kind.__name__}"
    if isinstance(base, str):
        return base
    if not is_tensor(base.weight, sharded):
        return f"the base weight is a {type(base.weight).__name__}"
    if not is_plain(layer, kind):
        return "the base layer has hooks or a replaced forward"
    if base.weight.is_meta:
        return "the base weight is on the meta device"
    return base


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Whether it is one of bitsandbytes' own 4-bit layers; never imports bitsandbytes."""
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and type(layer) in (bnb.nn.Linear4bit, bnb.nn.LinearNF4)


def _dense(layer: Any) -> Base | str:
    weight = layer.weight
    if weight.dtype not in FLOAT_DTYPES:
        return f"the base weight is {weight.dtype}"
    if weight.requires_grad:
        return "the base weight is trained"
    return Base(weight, weight, (weight.shape[0], weight.shape[1]), weight.dtype, layer.bias)


def read_nf4(layer: NF4Linear) -> Base:
    """The base weight of an NF4Linear."""
    packed = layer.weight
    # A shard is not for any op; `read` refuses it by its type.
    absmax = None if nf4_rows.is_sharded(packed) else layer.absmax
    return Base(
        packed, packed, layer.weight_shape, layer.dtype, layer.bias, absmax,
        layer.nested_absmax, layer.nested_codebook, layer.nested_offset, layer.blocksize,
        layer.compute,
    )  # fmt: skip


def _bitsandbytes(layer: Any) -> Base | str:
    packed, state = layer.weight, getattr(layer.weight, "quant_state", None)
    if state is None:
        return "bitsandbytes has not quantized the base weight yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the base weight for its own CPU kernel"
    if state.quant_type != "nf4":
        return f"the base weight is {state.quant_type}, not nf4"
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        return f"the base weight was quantized as {tuple(state.shape)}, not [out, in]"
    codes = packed.data
    if codes.dtype is not torch.uint8:
        codes = codes.view(torch.uint8)
    base = Base(
        codes, packed, (layer.out_features, layer.in_features), state.dtype, layer.bias,
        state.absmax, blocksize=state.blocksize, restores_dtype=True,
    )  # fmt: skip
    if not state.nested:
        return base
    if state.state2.blocksize != NESTED_BLOCKSIZE:
        return f"absmax is quantized in blocks of {state.state2.blocksize}"
    return base._replace(
        nested_absmax=state.state2.absmax, nested_codebook=state.state2.code,
        nested_offset=state.offset,
    )  # fmt: skip
