"""Runs kernels in Triton's interpreter on tensors without memory and checks every address.

META tensors of any size get addresses of their own, far apart. Of every launch the programs at the
corners of the grid run; a load or store outside its tensor is an error, loads return zeros (or what
`Memory.fill` says), and the interpreter itself refuses an int32 that overflows. So a kernel shows
within seconds what it does beyond 2^31 elements. Tables that a launcher uploads are real.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from feinwerk import triton_lib

_FAKE = 1 << 56  # above every real address


@dataclass
class Block:
    """A storage's addresses [begin, end), and the part of them that was touched."""

    storage: torch.UntypedStorage
    begin: int
    end: int
    name: str
    real: bool
    value: int = 0
    first: int = 2**63
    last: int = -1


@dataclass(frozen=True)
class Pointer:
    """What the interpreter takes for a tensor."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass
class Memory:
    """The blocks of all tensors that kernels have met."""

    blocks: dict[int, Block] = field(default_factory=dict)
    launches: int = 0
    now: str = ""

    def block(self, tensor: torch.Tensor) -> Block:
        """The addresses of a tensor's storage, made at first sight."""
        storage = tensor.untyped_storage()
        found = self.blocks.get(storage._cdata)
        if found is None:
            real = tensor.device.type != "meta"
            begin = storage.data_ptr() if real else _FAKE + (len(self.blocks) << 44)
            name = f"{tensor.dtype} {tuple(tensor.shape)}"
            found = Block(storage, begin, begin + storage.nbytes(), name, real)
            self.blocks[storage._cdata] = found
        return found

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        """Let loads from a tensor of integers return a value."""
        self.block(tensor).value = value

    def has_met(self, tensor: torch.Tensor) -> bool:
        """Whether a kernel has touched a tensor."""
        return self.block(tensor).last >= 0

    def reaches_the_end(self, tensor: torch.Tensor) -> bool:
        """Whether the last byte of a tensor's storage was touched."""
        block = self.block(tensor)
        return block.last == block.end - 1

    def address(self, tensor: torch.Tensor) -> int:
        """Where a tensor begins."""
        return self.block(tensor).begin + tensor.storage_offset() * tensor.element_size()

    def pointer(self, argument: Any) -> Any:
        """A tensor as a pointer, anything else as it is."""
        if isinstance(argument, torch.Tensor):
            return Pointer(argument.dtype, self.address(argument))
        return argument

    def touch(self, pointers: Any, mask: Any, what: str) -> Block | None:
        """Check the addresses of one load or store; return what they are in, if any."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, np.shape(mask.data))[mask.data]
        if addresses.size == 0:
            return None
        low, high = int(addresses.min()), int(addresses.max()) + size - 1
        nearest = max(self.blocks.values(), key=lambda block: (block.begin <= low, block.begin))
        if not nearest.begin <= low <= high < nearest.end:
            raise AssertionError(
                f"{self.now} {what}s outside of {nearest.name}: "
                f"bytes {low - nearest.begin} to {high - nearest.begin}"
            )
        nearest.first, nearest.last = min(nearest.first, low), max(nearest.last, high)
        return nearest


@contextmanager
def fake_memory() -> Iterator[Memory]:
    """Run kernels on META tensors inside the block, corners of the grid only."""
    memory = Memory()
    builder: Any = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw
    call = interpreter.GridExecutor.__call__

    def masked_load(
        self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **more: Any
    ) -> Any:
        block = memory.touch(pointers, mask, "load")
        if block is not None and block.real:
            return load(self, pointers, mask, other, *rest, **more)
        kind, value = pointers.get_element_ty(), 0 if block is None else block.value
        data = np.full(pointers.data.shape, value, dtype=interpreter._get_np_dtype(kind))
        if other is not None:
            data = np.where(mask.data, data, other.data)
        return interpreter.TensorHandle(data, kind)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        memory.touch(pointers, mask, "store")

    def atomic_rmw(
        self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any
    ) -> Any:
        block = memory.touch(pointers, mask, "add")
        if block is not None and block.real:
            return atomic(self, op, pointers, value, mask, *rest, **more)
        return interpreter.TensorHandle(np.zeros_like(value.data), value.dtype.scalar)

    def corners(self: Any, *args: Any, **options: Any) -> None:
        memory.launches += 1
        memory.now = self.fn.__name__
        named = {k: v for k, v in options.items() if k in inspect.signature(self.fn).parameters}
        bound = inspect.getcallargs(self.fn, *args, **named)
        scope = interpreter._patch_lang(self.fn)
        try:
            values = {
                name: value
                if name in self.constexprs
                else interpreter._implicit_cvt(memory.pointer(value))
                for name, value in bound.items()
            }
            grid = (*self.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for place in itertools.product(*(sorted({0, size - 1}) for size in grid)):
                interpreter.interpreter_builder.set_grid_idx(*place)
                self.fn(**values)
        finally:
            scope.restore()

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw = atomic_rmw
    interpreter.GridExecutor.__call__ = corners
    replaced = _replace_tables(memory)
    try:
        yield memory
    finally:
        triton_lib.pretend(None)
        for module, name, function in replaced:
            setattr(module, name, function)
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw = atomic
        interpreter.GridExecutor.__call__ = call


def _replace_tables(memory: Memory) -> list[tuple[Any, str, Any]]:
    """Let launchers write these addresses into their tables, and keep the tables on the CPU."""
    cpu = torch.device("cpu")
    instead = {
        "addresses": lambda tensors: [memory.address(tensor) for tensor in tensors],
        "upload": lambda values, device: triton_lib.upload(values, cpu),
        "tiles_on": lambda counts, device: triton_lib.tiles_on(counts, cpu),
    }
    replaced = []
    for module in [each for name, each in sys.modules.items() if name.startswith("feinwerk.ops.")]:
        for name, function in instead.items():
            if getattr(module, name, None) is getattr(triton_lib, name):
                replaced.append((module, name, getattr(module, name)))
                setattr(module, name, function)
    return replaced
