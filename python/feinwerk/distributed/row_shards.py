"""What a rank can do with its rows of a sharded NF4 weight, and how a whole weight comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from feinwerk import _checks
from feinwerk.distributed.replicas import reshard
from feinwerk.nn import NF4Embedding, NF4Linear, nf4_rows
from feinwerk.nn.nf4_module import NF4Module
from feinwerk.ops import row_norms
from feinwerk.weight import NF4Weight


def local_nf4_weight(layer: NF4Linear | NF4Embedding) -> NF4Weight | None:
    """Return the rows that this rank holds of a layer's weight, as an NF4Weight of their own.

    For work on shards: dequantize them, multiply with them, take their norms. The codes are the
    layer's memory. A double-quantized absmax is expanded to fp32, because the rows may begin inside
    one of its blocks: 4 bytes a block of weights, an eighth of the codes at blocksize 64.

    Args:
        layer: an NF4 layer after `shard_nf4`, under fully_shard or not yet (then all rows).

    Returns:
        The rows, or None for a rank that has none: torch.chunk gives the last ranks nothing where
        there are few.

    Raises:
        TypeError: if it is no NF4 layer.
        ValueError: if its rows have not been viewed for sharding (`shard_nf4` says why).

    Source:
        docs/guides/fsdp2.md.

    Example:
        See docs/guides/fsdp2.md: it takes two processes.
    """
    return nf4_rows.local_weight(_by_rows("local_nf4_weight", layer))


def sharded_row_norms(
    layer: NF4Linear | NF4Embedding, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return the norms of all rows of a layer's weight, each computed where its row is; collective.

    DoRA's base norms for a weight that no rank holds as a whole: N floats are sent, no code and
    no dense weight. The bits are those of `feinwerk.row_norms` on the whole weight.

    Args:
        layer: an NF4 layer after `shard_nf4`; all ranks of its mesh call this together.
        dtype: what W is rounded to; default fp32.

    Returns:
        fp32 [N] on every rank, a plain tensor.

    Raises:
        TypeError: if it is no NF4 layer.
        ValueError: if its rows have not been viewed for sharding.

    Source:
        DoRA (arXiv 2402.09353), equation 5.

    Example:
        See docs/guides/fsdp2.md: it takes two processes.
    """
    module = _by_rows("sharded_row_norms", layer)
    mine, packed = nf4_rows.local_weight(module), module.weight
    if mine is None:
        norms = torch.zeros(0, device=packed.device)
    else:
        norms = row_norms(
            mine.packed, mine.absmax, shape=(mine.shape[0], mine.shape[1]),
            blocksize=mine.blocksize, dtype=dtype,
        )  # fmt: skip
    if not isinstance(packed, DTensor):
        return norms
    whole = DTensor.from_local(
        norms, packed.device_mesh, packed.placements, run_check=False,
        shape=torch.Size([packed.shape[0]]), stride=(1,),
    )  # fmt: skip
    gathered: torch.Tensor = whole.full_tensor()
    return gathered


def unshard_nf4(model: nn.Module) -> Iterator[tuple[str, NF4Weight]]:
    """Give back the NF4 weights of a sharded model as whole ones, one at a time; collective.

    For export: `weight.to_bitsandbytes(f"{name}.")` has the keys and bytes that the model's state
    dict had before it was sharded. Every rank must run the loop to its end; a rank that does not
    save drops what it gets, and never holds more than one weight.

    Args:
        model: after `shard_nf4`, under fully_shard or not.

    Yields:
        (name, weight) of every NF4 layer, in the model's order, those that stay replicated too;
        the model is left as it is.

    Raises:
        TypeError: if model is no module.

    Source:
        docs/guides/fsdp2.md.

    Example:
        See docs/guides/fsdp2.md: it takes two processes.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        _checks.reject(TypeError, "unshard_nf4", "model", "be a torch.nn.Module", kind)
    for name, module in model.named_modules():
        if isinstance(module, NF4Module):
            yield name, _whole(module)


def load_full_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True
) -> Any:
    """Load a whole state dict into a model under fully_shard: every rank takes its rows out of it.

    torch's own `load_state_dict` takes shards alone there. Nothing is sent. With a state dict that
    is mapped from its file (safetensors, `torch.load(mmap=True)`), a rank reads its rows, and of
    NF4 weights, in bitsandbytes' keys, their small nested tables.

    Args:
        model: after fully_shard; from the meta device after `to_empty`.
        state_dict: as of the model before it was sharded; the same on every rank.
        strict: whether keys must be the model's.

    Returns:
        What `load_state_dict` returns: the missing and the unexpected keys.

    Raises:
        RuntimeError: as `load_state_dict`.

    Source:
        docs/guides/fsdp2.md.

    Example:
        See docs/guides/fsdp2.md: it takes two processes.
    """
    reshard(model)
    # Tied weights have several keys each. NF4 modules look after their own keys.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NF4Module):
            for part in nf4_rows.names(module):
                parameters.pop(f"{name}.{part}", None)
    own = dict(state_dict)
    for key, target in parameters.items():
        value = own.get(key)
        if isinstance(target, DTensor) and isinstance(value, torch.Tensor):
            if isinstance(value, DTensor) or value.shape != target.shape:
                continue  # for load_state_dict to take or to refuse
            first, count = nf4_rows.own_rows(target)
            own[key] = DTensor.from_local(
                value[first : first + count].to(target.device), target.device_mesh,
                target.placements, run_check=False, shape=target.shape, stride=target.stride(),
            )  # fmt: skip
    return model.load_state_dict(own, strict=strict)


def _whole(module: NF4Module) -> NF4Weight:
    nested = [getattr(module, name) for name in nf4_rows.NESTED]
    packed = nf4_rows.whole(module.weight).reshape(-1, 1)
    if module.by_rows:
        rows = module._parameters["absmax_rows"]
        assert rows is not None
        absmax = nf4_rows.whole(rows).reshape(-1)
        if not module.double_quant:
            absmax = absmax.view(torch.float32)
    else:
        absmax = module.absmax
    return NF4Weight(packed, absmax, module.weight_shape, module.blocksize, module.dtype, *nested)


def _by_rows(op: str, layer: Any) -> NF4Module:
    if not isinstance(layer, NF4Module):
        rule = "be an NF4Linear or NF4Embedding"
        _checks.reject(TypeError, op, "layer", rule, type(layer).__name__)
    if not layer.by_rows:
        rule = "have its rows viewed by shard_nf4"
        _checks.reject(ValueError, op, "layer", rule, layer.replicated_because or "a flat weight")
    return layer
