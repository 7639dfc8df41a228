"""Runs kernels in Triton's interpreter on tensors without memory and checks every address.

META tensors of any size get addresses of their own, far apart. Of every launch the programs at the
corners of the grid run; a load or store outside its tensor is an error, loads return zeros (or what
`Memory.fill` says), and the interpreter itself refuses an int32 that overflows. So a kernel shows
within seconds what it does beyond 2^31 elements.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter


@dataclass
class Block:
    """A storage's addresses [begin, end), and the part of them that was touched."""

    storage: torch.UntypedStorage
    begin: int
    end: int
    name: str
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
            begin = (len(self.blocks) + 1) << 44
            name = f"{tensor.dtype} {tuple(tensor.shape)}"
            found = Block(storage, begin, begin + storage.nbytes(), name)
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

    def pointer(self, argument: Any) -> Any:
        """A tensor as a pointer, anything else as it is."""
        if isinstance(argument, torch.Tensor):
            offset = argument.storage_offset() * argument.element_size()
            return Pointer(argument.dtype, self.block(argument).begin + offset)
        return argument

    def touch(self, pointers: Any, mask: Any, what: str) -> int:
        """Check the addresses of one load or store; return the value it finds."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, np.shape(mask.data))[mask.data]
        if addresses.size == 0:
            return 0
        low, high = int(addresses.min()), int(addresses.max()) + size - 1
        index = (low >> 44) - 1
        block = list(self.blocks.values())[index] if 0 <= index < len(self.blocks) else None
        if block is None or high >= block.end:
            name = "all tensors" if block is None else block.name
            begin = 0 if block is None else block.begin
            raise AssertionError(
                f"{self.now} {what}s outside of {name}: bytes {low - begin} to {high - begin}"
            )
        block.first, block.last = min(block.first, low), max(block.last, high)
        return block.value


@contextmanager
def fake_memory() -> Iterator[Memory]:
    """Run kernels on META tensors inside the block, corners of the grid only."""
    memory = Memory()
    builder: Any = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    call = interpreter.GridExecutor.__call__

    def masked_load(
        self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **more: Any
    ) -> Any:
        value = memory.touch(pointers, mask, "load")
        kind = pointers.get_element_ty()
        data = np.full(pointers.data.shape, value, dtype=interpreter._get_np_dtype(kind))
        if other is not None:
            data = np.where(mask.data, data, other.data)
        return interpreter.TensorHandle(data, kind)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        memory.touch(pointers, mask, "store")

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
    interpreter.GridExecutor.__call__ = corners
    try:
        yield memory
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = call
