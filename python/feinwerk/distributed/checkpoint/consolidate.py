"""consolidate: the shards of a checkpoint as one safetensors file, in a few MiB of memory.

A shard is a `torch.save` archive: a zip file in which the elements lie uncompressed and in order.
They are copied from there to their places in the safetensors file, run by run, so that not even one
tensor is ever held:

```
   shard [2, 4] at rows 1..2 of a tensor [3, 4]          | header | 0 0 0 0 1 1 1 1 2 2 2 2 | ...
   elements 1 1 1 1 2 2 2 2  ----------------------------------------------^ one run
   shard [3, 2] at columns 2..3 of it: three runs of two elements
```
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import secrets
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from feinwerk import _checks
from feinwerk.distributed.checkpoint import manifest
from feinwerk.distributed.checkpoint.files import CHUNK_BYTES, FilePart, sync
from feinwerk.distributed.checkpoint.manifest import Manifest, Shard, StoredTensor
from feinwerk.distributed.checkpoint.values import DTYPES
from feinwerk.distributed.checkpoint.verify import find_damage
from feinwerk.distributed.errors import CorruptShard

# The names that safetensors has for torch's dtypes.
_SAFETENSORS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip
_PARTS = {"model": "model.", "optimizer": "optimizer.", "all": ""}


def consolidate(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    part: Literal["model", "optimizer", "all"] = "model",
    verify: bool = True,
) -> Path:
    """Write the tensors of a checkpoint, whole, into one safetensors file.

    Needs no process group and a few MiB of memory, however large the tensors are. The file appears
    under its name when it is complete.

    Args:
        path: of one checkpoint, `<directory>/step-<N>`.
        out: the file to write; one that exists is replaced.
        part: "model" for the model's tensors under their own names; "optimizer" for its states as
            `<name>.<state>`; "all" for both, as `model.<name>` and `optimizer.<name>.<state>`.
        verify: compare all checksums first.

    Returns:
        The path of the file.

    Raises:
        IncompleteCheckpoint: if the directory is no complete checkpoint.
        CorruptShard: if a file is missing, short or damaged.
        ValueError: if part is none of the three, or a dtype has no name in safetensors.
        OSError: if the file cannot be written.

    Source:
        The safetensors format: 8 bytes with the length of the header, the header in JSON, the
        elements (huggingface/safetensors, README).
    """
    op = "consolidate"
    if part not in _PARTS:
        rule = 'be "model", "optimizer" or "all"'
        _checks.reject(ValueError, op, "part", rule, repr(part))
    path, out = Path(path), Path(out)
    content = Manifest.from_bytes(path / manifest.FILE_NAME, manifest.read(path))
    if verify:
        damage = find_damage(path, content, 0, 1)
        if damage:
            raise damage[0]
    prefix = _PARTS[part]
    tensors = {
        key.removeprefix(prefix): (key, tensor)
        for key, tensor in sorted(content.tensors.items())
        if key.startswith(prefix)
    }
    header, begins = _header(op, content, {name: item[1] for name, item in tensors.items()})
    temporary = out.with_name(f"{out.name}.tmp-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            for name, (key, tensor) in tensors.items():
                for shard in tensor.shards:
                    _copy(path, key, tensor, shard, file, len(header) + begins[name])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
        sync(out.absolute().parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return out


def _header(
    op: str, content: Manifest, tensors: dict[str, StoredTensor]
) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the elements, and where each tensor begins after them."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "step": str(content.step)}}
    begins, end = {}, 0
    # Largest items first keeps every tensor aligned to its dtype.
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _SAFETENSORS:
            rule = "have a dtype that safetensors has"
            _checks.reject(ValueError, op, name, rule, tensor.dtype)
        begins[name] = end
        end += math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        entries[name] = {
            "dtype": _SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins


def _copy(
    path: Path, key: str, tensor: StoredTensor, shard: Shard, file: IO[bytes], begin: int
) -> None:
    """Copy the elements of a shard to their places in a file whose tensor starts at `begin`."""
    itemsize = DTYPES[tensor.dtype].itemsize
    if math.prod(shard.shape) == 0:
        return
    with open(path / shard.file, "rb") as stored:
        try:
            with _elements(stored, shard) as source:
                for start, count in runs(tensor.shape, shard.offsets, shard.shape):
                    file.seek(begin + start * itemsize)
                    left = count * itemsize
                    while left > 0:
                        piece = source.read(min(left, CHUNK_BYTES))
                        if not piece:
                            raise EOFError("the archive has fewer elements than the tensor")
                        file.write(piece)
                        left -= len(piece)
        except (zipfile.BadZipFile, KeyError, EOFError, StopIteration) as error:
            reason = f"the archive cannot be read: {error}"
            raise CorruptShard(str(path / shard.file), key, shard.rank, reason) from error


def _elements(stored: io.BufferedReader, shard: Shard) -> IO[bytes]:
    """Open the record of a torch.save archive that has the elements, from a part of a file."""
    archive = zipfile.ZipFile(FilePart(stored, shard.start, shard.length))
    record = next(name for name in archive.namelist() if name.endswith("/data/0"))
    return archive.open(record)


def runs(
    whole: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """Yield (first element in the whole, count) of each run that a box has in row-major order.

    Example:
        >>> list(runs((3, 4), (0, 2), (3, 2)))
        [(2, 2), (6, 2), (10, 2)]
        >>> list(runs((3, 4), (1, 0), (2, 4)))
        [(4, 8)]
    """
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    # Dimensions from `inner` on are whole: they, and the one before them, are one run.
    inner = len(whole)
    while inner > 0 and shape[inner - 1] == whole[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)
    count = math.prod(shape[outer:])
    for index in itertools.product(*(range(size) for size in shape[:outer])):
        places = (*index, *(0 for _ in shape[outer:]))
        yield sum((o + i) * s for o, i, s in zip(offsets, places, strides, strict=True)), count
