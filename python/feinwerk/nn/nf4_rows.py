r"""NF4 tensors seen by rows: the same bytes as matrices that FSDP2 can cut between two rows.

```
   flat                                    by rows
   weight   uint8 [n/2, 1]                 weight       uint8 Parameter [N, K/2]
   absmax   buffer, [n/blocksize]          absmax_rows  uint8 Parameter [N, K/blocksize], or where
                                           absmax is fp32 its bytes, uint8 [N, 4 K/blocksize]
   nested_absmax, nested_codebook, nested_offset                the same buffers, on every rank
```
Bytes, because a MixedPrecisionPolicy would round an fp32 parameter on its way to the other ranks;
uint8 it leaves alone. A cut between rows is a cut between blocks when blocksize divides K.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.codebook import NESTED_BLOCKSIZE
from feinwerk.ops.blockwise_dequantize import blockwise_dequantize
from feinwerk.weight import NF4Weight

if TYPE_CHECKING:
    from feinwerk.nn.nf4_module import NF4Module

NESTED = ("nested_absmax", "nested_codebook", "nested_offset")


def refusal(shape: tuple[int, int], blocksize: int) -> str:
    """Why a weight cannot be cut between rows; empty if it can."""
    K = shape[1]
    if K % blocksize:
        return f"K = {K} is not a multiple of blocksize {blocksize}, so blocks cross rows"
    return ""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor; the module that defines them is not imported to find out."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_managed(module: nn.Module) -> bool:
    """Whether a call of fully_shard has taken in the module: its hooks swap the parameters."""
    return "_is_fsdp_managed_module" in vars(module)


def names(module: NF4Module) -> tuple[str, ...]:
    """The attributes that hold the weight, codes first: its keys in a state dict of shards."""
    absmax = "absmax_rows" if module.by_rows else "absmax"
    return ("weight", absmax, *(NESTED if module.double_quant else ()))


def persist(module: NF4Module) -> None:
    """Make torch's state-dict functions for FSDP see the tables that are buffers."""
    module._non_persistent_buffers_set.difference_update(("absmax", *NESTED))


def view(module: NF4Module) -> None:
    """Give the module its tensors by rows; the parameters are new, their memory is the same."""
    N = module.weight_shape[0]
    codes, rows = module.weight.detach().view(N, -1), module.absmax.view(N, -1).view(torch.uint8)
    del module._buffers["absmax"]
    module._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
    module._parameters["absmax_rows"] = nn.Parameter(rows, requires_grad=False)
    persist(module)


def share(module: NF4Module, first: NF4Module) -> None:
    """Tie a module to one that has its tensors by rows: the same parameters."""
    module._buffers.pop("absmax", None)
    for name in ("weight", "absmax_rows"):
        module._parameters[name] = first._parameters[name]


def absmax(module: NF4Module, rows: torch.Tensor) -> torch.Tensor:
    """The flat absmax out of `absmax_rows`: uint8 codes or fp32, on the same memory."""
    if not torch.compiler.is_compiling() and is_sharded(rows):
        rule = (
            "be gathered before it is used: call fully_shard on the block whose forward runs (not "
            "on the base layer of an adapter), or unshard() that block"
        )
        _checks.reject(RuntimeError, type(module).__name__, "weight", rule, "the rows of one rank")
    flat = rows.view(-1)
    return flat if module.double_quant else flat.view(torch.float32)


def own_rows(weight: torch.Tensor) -> tuple[int, int]:
    """(first row, number of rows) that this rank holds of a weight; all where it is not sharded."""
    N = weight.shape[0]
    if not is_sharded(weight):
        return 0, N
    sharded: Any = weight
    mesh = sharded.device_mesh
    dims = [dim for dim, placement in enumerate(sharded.placements) if not placement.is_replicate()]
    if not dims:
        return 0, N
    if len(dims) > 1 or not sharded.placements[dims[0]].is_shard(0):
        rule = "be sharded by rows over one dimension of its mesh"
        _checks.reject(NotImplementedError, "NF4", "weight", rule, sharded.placements)
    # torch.chunk's sizes: all ranks have ceil(N / size) rows until none are left.
    size = -(-N // mesh.size(dims[0]))
    first = min(mesh.get_local_rank(dims[0]) * size, N)
    return first, min(size, N - first)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of this rank as a plain tensor that shares memory."""
    sharded: Any = tensor.detach()
    rows: torch.Tensor = sharded.to_local() if is_sharded(tensor) else sharded
    return rows


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows as a plain tensor; gathered over the mesh of a sharded one, by all its ranks."""
    sharded: Any = tensor.detach()
    rows: torch.Tensor = sharded.full_tensor() if is_sharded(tensor) else sharded
    return rows


def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy the rows that this rank holds of `target` out of a whole value."""
    first, count = own_rows(target)
    local(target).copy_(value.reshape(target.shape)[first : first + count])


def local_weight(module: NF4Module) -> NF4Weight | None:
    """The rows of this rank as an NF4Weight of their own; None for a rank without any.

    Where absmax is quantized, the rows may begin inside one of its blocks; absmax is expanded to
    fp32 then, four bytes a block.
    """
    packed, rows = module._parameters["weight"], module._parameters["absmax_rows"]
    assert packed is not None
    assert rows is not None
    first, count = own_rows(packed)
    if not count:
        return None
    K = module.weight_shape[1]
    table = local(rows).reshape(-1)
    if module.double_quant:
        assert module.nested_absmax is not None
        assert module.nested_codebook is not None
        begin = first * K // module.blocksize
        head = begin % NESTED_BLOCKSIZE
        blocks = slice(begin // NESTED_BLOCKSIZE, -(-(begin + table.numel()) // NESTED_BLOCKSIZE))
        codes = torch.cat([table.new_zeros(head), table])
        table = blockwise_dequantize(
            codes, module.nested_absmax[blocks], module.nested_codebook, module.nested_offset
        )[head:]
    else:
        table = table.view(torch.float32)
    return NF4Weight(local(packed), table, (count, K), module.blocksize, module.dtype)


def fill(module: NF4Module, loaded: NF4Weight, key: str) -> None:
    """Copy a whole weight into the rows that this rank holds.

    Raises:
        ValueError: if it is quantized otherwise than the module; nothing has changed then.
    """
    op = type(module).__name__
    if (loaded.blocksize, loaded.double_quant) != (module.blocksize, module.double_quant):
        rule = f"have blocksize={module.blocksize}, double_quant={module.double_quant}: its rows "
        rule += "have been viewed for sharding"
        got = f"blocksize={loaded.blocksize}, double_quant={loaded.double_quant}"
        _checks.reject(ValueError, op, key, rule, got)
    N = module.weight_shape[0]
    packed, rows = module._parameters["weight"], module._parameters["absmax_rows"]
    assert packed is not None
    assert rows is not None
    for target, value in ((packed, loaded.packed), (rows, loaded.absmax)):
        put(target, value.view(N, -1).view(torch.uint8))


def attribute_entries(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What a state dict of shards has beside `weight`; empty for one with bitsandbytes' keys."""
    keys = [prefix + name for name in ("absmax_rows", "absmax", *NESTED)]
    return {key: state_dict[key] for key in keys if key in state_dict}


def read(module: NF4Module, own: dict[str, Any], prefix: str) -> NF4Weight:
    """A whole weight under the names of attributes: a state dict whose shards were put together."""
    op, by_rows = type(module).__name__, f"{prefix}absmax_rows" in own
    nested = NESTED if module.double_quant else ()
    for name in ("weight", "absmax_rows" if by_rows else "absmax", *nested):
        if prefix + name not in own:
            _checks.reject(ValueError, op, prefix + name, "be present", "no such key")
    table = own[prefix + ("absmax_rows" if by_rows else "absmax")].detach().reshape(-1)
    if by_rows and not module.double_quant:
        table = table.view(torch.float32)
    packed = own[f"{prefix}weight"].detach().reshape(-1, 1)
    tables = [own[prefix + name].detach() for name in nested]
    return NF4Weight(packed, table, module.weight_shape, module.blocksize, module.dtype, *tables)


def take_shards(module: NF4Module, own: dict[str, Any], prefix: str, assign: bool) -> bool:
    """Copy or assign what a state dict of shards has; False for one of whole tensors."""
    if not any(is_sharded(tensor) for tensor in own.values()):
        return False
    op, found = type(module).__name__, {}
    for name in names(module):
        target, loaded = getattr(module, name), own.get(prefix + name)
        mine, theirs = _place(target), _place(loaded)
        if loaded is None or mine != theirs:
            _checks.reject(ValueError, op, prefix + name, f"be {mine} as in the module", theirs)
        found[name] = target, loaded
    with torch.no_grad():
        for name, (target, loaded) in found.items():
            if not assign:
                local(target).copy_(local(loaded))
            elif name in module._parameters:
                module._parameters[name] = nn.Parameter(loaded.detach(), requires_grad=False)
            else:
                module._buffers[name] = loaded.detach()
    return True


def _place(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "absent"
    rows = "sharded rows" if is_sharded(tensor) else "whole"
    first, count = own_rows(tensor) if tensor.dim() else (0, 1)
    return f"{rows} {first} to {first + count} of {list(tensor.shape)}"


def note(module: NF4Module) -> str:
    """How the module stands with sharding, for `feinwerk.explain`; empty if nobody asked for it."""
    packed = module._parameters["weight"]
    assert packed is not None
    if module.replicated_because:
        where = "codes sharded by bytes" if is_sharded(packed) else "on every rank"
        return f"{where}: {module.replicated_because}"
    if not module.by_rows:
        return ""
    if is_managed(module) or is_sharded(packed):
        return f"rows sharded over {module.row_shards} ranks"
    return "rows viewed for sharding, fully_shard not called"
