"""Python values as JSON and back, exactly: tuples, tensors, NaN and int keys survive.

JSON has no tuple, no tensor, no NaN and only strings as keys. Such a value becomes an object with
one key that starts with `$`:

```
   (1, 2)                {"$tuple": [1, 2]}
   inf, nan              {"$float": "inf"}
   {3: "a"}, {"$x": 0}   {"$dict": [[3, "a"]]}
   Counter({3: 1})       {"$counter": [[3, 1]]}
   tensor                {"$tensor": ["float32", [2], "<base64 of the bytes>"]}
```
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from typing import Any

import torch

from feinwerk import _checks

# Every dtype that a checkpoint can hold, by torch's own name without the prefix.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def encode(op: str, name: str, value: Any) -> Any:
    """Return `value` in terms of what json writes.

    Raises:
        TypeError: naming the place of a value of another type.
    """
    # bool is an int, Counter and OrderedDict are dicts: the order of the tests matters.
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, torch.Tensor):
        return {"$tensor": _encode_tensor(op, name, value)}
    if isinstance(value, list):
        return [encode(op, f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(op, f"{name}[{i}]", item) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        pairs = [
            [encode(op, f"a key of {name}", key), encode(op, f"{name}[{key!r}]", item)]
            for key, item in value.items()
        ]
        if isinstance(value, Counter):
            return {"$counter": pairs}
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": pairs}
    rule = "be made of None, bool, int, float, str, list, tuple, dict and torch.Tensor"
    _checks.reject(TypeError, op, name, rule, type(value).__name__)


def decode(value: Any) -> Any:
    """Return what `encode` was given; tensors are on the CPU."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(item) for key, item in value.items()}
    tag, content = next(iter(value.items()))
    if tag == "$float":
        return float(content)
    if tag == "$tensor":
        return _decode_tensor(content)
    if tag == "$tuple":
        return tuple(decode(item) for item in content)
    pairs = {decode(key): decode(item) for key, item in content}
    if tag == "$counter":
        return Counter(pairs)
    if tag == "$dict":
        return pairs
    raise ValueError(f"decode: the tag must be one that encode writes, got {tag}")


def _encode_tensor(op: str, name: str, value: torch.Tensor) -> list[Any]:
    if type(value) is not torch.Tensor and type(value) is not torch.nn.Parameter:
        _checks.reject(TypeError, op, name, "be a plain torch.Tensor", type(value).__name__)
    dtype = dtype_name(value.dtype)
    if dtype not in DTYPES:
        _checks.reject(TypeError, op, name, "have a dtype of plain numbers", value.dtype)
    plain = value.detach().cpu().contiguous().reshape(-1)
    data = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return [dtype, list(value.shape), base64.b64encode(data).decode()]


def _decode_tensor(content: list[Any]) -> torch.Tensor:
    name, shape, text = content
    dtype, data = DTYPES[name], bytearray(base64.b64decode(text))
    if not data:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).clone().view(dtype).reshape(shape)
