r"""Reads and writes the state-dict keys in which bitsandbytes stores an NF4 weight, bit for bit.

```
   <prefix>weight                                     uint8 [ceil(n/2), 1]   packed codes
   <prefix>weight.absmax                              fp32 [nblocks], or uint8 when double-quantized
   <prefix>weight.quant_map                           fp32 [16]              the NF4 codebook
   <prefix>weight.nested_absmax                       fp32 [ceil(nblocks/256)]  \ double
   <prefix>weight.nested_quant_map                    fp32 [256]                / quantization only
   <prefix>weight.quant_state.bitsandbytes__nf4       uint8, the bytes of one JSON object
```
Knows names, bytes and rules only; `weight.py` gives them their meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from feinwerk.codebook import BLOCKSIZES, NESTED_BLOCKSIZE, nf4_codebook

DTYPE_NAMES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_STATE = "quant_state.bitsandbytes__nf4"
_PLAIN_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
# FSDP users of bitsandbytes store the bytes as a view in a floating dtype ("quant_storage").
_STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
# A real quant_state has about 200 bytes; far more is not one, and would only feed the JSON parser.
_MAX_STATE_BYTES = 4096


@dataclass(frozen=True)
class Fields:
    """What the keys hold, in the words of NF4Weight."""

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_codebook: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None


def key_names(prefix: str, double_quant: bool) -> list[str]:
    """Return the keys of one weight in the order in which bitsandbytes writes them."""
    nested = ["nested_absmax", "nested_quant_map"] if double_quant else []
    names = ["absmax", "quant_map", *nested, _STATE]
    return [f"{prefix}weight", *(f"{prefix}weight.{name}" for name in names)]


def own_keys(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """Return the keys of `state_dict` that belong to the weight at `prefix`, known or not."""
    weight = f"{prefix}weight"
    return [key for key in state_dict if key == weight or key.startswith(f"{weight}.")]


def encode(fields: Fields, prefix: str) -> dict[str, torch.Tensor]:
    """Return the keys and tensors that bitsandbytes would write for this weight.

    Codes and absmax share memory with `fields`; the two tables are copies, as bitsandbytes'
    (safetensors refuses tensors that share memory).
    """
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": fields.blocksize,
        "dtype": str(fields.dtype).removeprefix("torch."),
        "shape": list(fields.shape),
    }
    tensors = [fields.packed.reshape(-1, 1), fields.absmax, nf4_codebook(fields.packed.device)]
    if fields.nested_absmax is not None:
        assert fields.nested_codebook is not None
        assert fields.nested_offset is not None
        state["nested_blocksize"] = NESTED_BLOCKSIZE
        state["nested_dtype"] = "float32"
        # The double of an fp32, printed by repr. A meta tensor has no value to print.
        offset = fields.nested_offset
        state["nested_offset"] = 0.0 if offset.is_meta else offset.item()
        tensors += [fields.nested_absmax, fields.nested_codebook.clone()]
    text = json.dumps(state).encode()
    tensors.append(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    names = key_names(prefix, fields.nested_absmax is not None)
    return dict(zip(names, tensors, strict=True))


def decode(state_dict: Mapping[str, Any], prefix: str) -> Fields:
    """Check every key of the weight at `prefix` against the others and return what they hold.

    Nothing is copied; tensors share memory with `state_dict`.

    Raises:
        ValueError: naming the key and the rule it breaks.
    """
    state_key = f"{prefix}weight.{_STATE}"
    if f"{prefix}weight.quant_state.bitsandbytes__fp4" in state_dict:
        key = f"{prefix}weight.quant_state.bitsandbytes__fp4"
        _reject(key, "not be present: only quant_type nf4 is read", "an fp4 weight")
    tensors = {key: _tensor(state_dict, key) for key in own_keys(state_dict, prefix)}
    double_quant = f"{prefix}weight.nested_absmax" in tensors
    expected = key_names(prefix, double_quant)
    for key in expected:
        if key not in tensors:
            _reject(key, "be present", "no such key")
    for key in tensors:
        if key not in expected:
            rule = f"be one of the {len(expected)} keys of an NF4 weight"
            _reject(key, rule, "an unknown key" if double_quant else "no nested_absmax beside it")

    state = _read_state(tensors[state_key], state_key, double_quant)
    shape, blocksize = state["shape"], state["blocksize"]
    count = math.prod(shape)
    blocks = -(-count // blocksize)
    packed_key, absmax_key = f"{prefix}weight", f"{prefix}weight.absmax"

    packed = tensors[packed_key]
    if packed.dtype not in _STORAGE_DTYPES:
        _reject(packed_key, "be torch.uint8", packed.dtype)
    size = (count + 1) // 2
    if packed.dim() != 2 or packed.shape[1] != 1 or packed.numel() * packed.itemsize != size:
        rule = f"have {size} bytes as [{size}, 1] for shape {list(shape)}"
        _reject(packed_key, rule, f"{packed.dtype} {list(packed.shape)}")
    packed = packed.contiguous().view(torch.uint8)

    device = packed.device
    for key, tensor in tensors.items():
        # The JSON bytes are read by the host and may stay there.
        if key != state_key and tensor.device != device:
            _reject(key, f"be on {device} like {packed_key}", tensor.device)
    absmax = _table(absmax_key, tensors, torch.uint8 if double_quant else torch.float32, blocks)
    quant_map_key = f"{prefix}weight.quant_map"
    quant_map = _table(quant_map_key, tensors, torch.float32, 16)
    bits = nf4_codebook(device).view(torch.int32)
    if not quant_map.is_meta and not torch.equal(quant_map.view(torch.int32), bits):
        _reject(quant_map_key, "be the NF4 codebook", quant_map.tolist())
    fields = {"shape": shape, "blocksize": blocksize, "dtype": state["dtype"]}
    if not double_quant:
        return Fields(packed, absmax, **fields)

    nested_blocks = -(-blocks // NESTED_BLOCKSIZE)
    nested_key = f"{prefix}weight.nested_absmax"
    nested_absmax = _table(nested_key, tensors, torch.float32, nested_blocks)
    map_key = f"{prefix}weight.nested_quant_map"
    nested_codebook = _table(map_key, tensors, torch.float32, 256)
    if not nested_codebook.is_meta and not bool(nested_codebook.isfinite().all()):
        _reject(map_key, "be finite", "NaN or infinity")
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
    if not bool(offset.isfinite()):
        _reject(state_key, "have a nested_offset that is finite in fp32", state["nested_offset"])
    return Fields(packed, absmax, **fields, nested_absmax=nested_absmax,
                  nested_codebook=nested_codebook, nested_offset=offset.to(device))  # fmt: skip


def _reject(key: str, rule: str, got: object) -> NoReturn:
    raise ValueError(f"from_bitsandbytes: {key} must {rule}, got {got}")


def _tensor(state_dict: Mapping[str, Any], key: str) -> torch.Tensor:
    value = state_dict[key]
    if not isinstance(value, torch.Tensor):
        _reject(key, "be a torch.Tensor", type(value).__name__)
    return value.detach()


def _table(
    key: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, count: int
) -> torch.Tensor:
    table = tensors[key]
    if table.dtype != dtype:
        _reject(key, f"be {dtype}", table.dtype)
    if table.dim() != 1 or table.numel() != count:
        _reject(key, f"have shape [{count}]", list(table.shape))
    return table.contiguous()


def _read_state(tensor: torch.Tensor, key: str, double_quant: bool) -> dict[str, Any]:
    """Parse the JSON object and check each of its fields; dtype and shape come back typed."""
    if tensor.is_meta:
        _reject(key, "hold data", "a meta tensor")
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _MAX_STATE_BYTES:
        rule = f"be torch.uint8 with 1 dimension and at most {_MAX_STATE_BYTES} bytes"
        _reject(key, rule, f"{tensor.dtype} {list(tensor.shape)}")
    try:
        state = json.loads(bytes(tensor.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"from_bitsandbytes: {key} must hold one JSON object in UTF-8, got bytes that are "
            f"not ({error})"
        ) from error
    if not isinstance(state, dict):
        _reject(key, "hold one JSON object", type(state).__name__)
    fields = _PLAIN_FIELDS + (_NESTED_FIELDS if double_quant else ())
    if set(state) != set(fields):
        _reject(key, f"have the fields {', '.join(fields)}", ", ".join(state) or "none")

    def field(name: str, valid: bool, rule: str) -> None:
        if not valid:
            _reject(f"{key}, field {name},", rule, repr(state[name]))

    field("quant_type", state["quant_type"] == "nf4", "be 'nf4'")
    sizes = ", ".join(map(str, BLOCKSIZES))
    blocksize = state["blocksize"]
    field("blocksize", _is_int(blocksize) and blocksize in BLOCKSIZES, f"be one of {sizes}")
    dtype = state["dtype"]
    valid = isinstance(dtype, str) and dtype in DTYPE_NAMES
    field("dtype", valid, f"be one of {', '.join(DTYPE_NAMES)}")
    shape = state["shape"]
    valid = isinstance(shape, list) and bool(shape) and all(_is_int(n) and n > 0 for n in shape)
    field("shape", valid, "be a list of positive integers")
    if double_quant:
        valid = _is_int(state["nested_blocksize"]) and state["nested_blocksize"] == NESTED_BLOCKSIZE
        field("nested_blocksize", valid, f"be {NESTED_BLOCKSIZE}")
        field("nested_dtype", state["nested_dtype"] == "float32", "be 'float32'")
        offset = state["nested_offset"]
        valid = _is_int(offset) or isinstance(offset, float)
        # Also keeps torch.tensor from an integer that no float can hold.
        field("nested_offset", valid and abs(offset) <= 3.5e38, "be a finite number")
    return {**state, "shape": tuple(shape), "dtype": DTYPE_NAMES[dtype]}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
