"""adamw_step in Triton: one launch for all tensors of a list that are cut alike.

```
   list of tensors ── by how they are cut ──> a table of addresses, sizes and step sizes, uploaded
                                              beside the step before; one kernel over all tiles
```
Nothing is read back: clip_coef, grad_scale and found_inf stay on the GPU. The kernels and their
tiles are in triton_kernels.py, the 8-bit codes in triton_codes.py and for NVIDIA in triton_ptx.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from feinwerk.ops.adamw_step.triton_codes import tables_on
from feinwerk.ops.adamw_step.triton_kernels import (
    COLUMNS,
    adamw_step_coded_kernel,
    adamw_step_large_kernel,
    adamw_step_plain_kernel,
)
from feinwerk.ops.adamw_step.triton_ptx import words_on
from feinwerk.triton_lib import (
    INTERPRETED,
    Gpu,
    addresses,
    all_registers,
    gpu_of,
    launch,
    tiles_on,
    upload,
)

Tensors = Sequence[torch.Tensor]
_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}
# A thread has so many consecutive elements, of every dtype: 8 bytes of codes, two 16-byte words of
# fp32; where programs walk, 4. A block of 256 is a warp's own, whose maxima need no shared memory.
_VECTORS = (8, 4)
_LARGEST = 2**31


class Choice(NamedTuple):
    """How tensors are cut: the one place that decides it."""

    plain: int  # elements of a program without codes
    coded: int  # and with codes
    largest: int  # block that a program holds; larger ones go in pieces
    warps: int
    # With PTX, programs of so many warps that fill the GPU walk over all tiles of codes, with so
    # many registers for a thread at least; 0: one program for each tile.
    walking_warps: int = 0
    registers: int = 0


class Cut(NamedTuple):
    """What tensors of one launch have in common."""

    size: int  # power of two that holds a block of codes; 0 without codes
    whole: bool  # every block has `size` elements
    vector: int
    dense: bool  # random words are drawn by the counter


class Plan(NamedTuple):
    """How one tensor is cut."""

    cut: Cut
    tiles: int
    sizes: tuple[int, int, int]  # elements or blocks, of a row, of a block


def choose(gpu: Gpu) -> Choice:
    """Return the configuration for a GPU."""
    if gpu.backend == "interpreter":
        return Choice(8192, 8192, 1024, 4)  # few programs: their number is what takes time there
    if gpu.backend == "cuda" and not INTERPRETED:
        return Choice(1024, 2048, 2048, 4, 8, 64)
    return Choice(1024, 2048, 2048, 4)


def adamw_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    remainders: Tensors,
    steps: Sequence[int],
    parameter_ids: Sequence[int],
    first_elements: Sequence[int],
    seed: torch.Tensor | None = None,
    clip_coef: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    blocksize: int = 256,
    maximize: bool = False,
) -> Any:
    """Update every parameter and its states in place, unless `found_inf` is not zero."""
    if not params:
        return None
    device = params[0].device
    if (device.type == "cpu" and not INTERPRETED) or any(p.device != device for p in params):
        return NotImplemented
    master = "remainder" if remainders else "fp32"
    if not remainders and params[0].dtype is torch.bfloat16:
        master = "stochastic"
    coded = exp_avgs[0].dtype is torch.uint8
    # Copies live until the launch; all others are contiguous.
    grads = [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]
    lists = [params, grads, exp_avgs, exp_avg_sqs, remainders or params]
    scales = [exp_avg_absmaxes, exp_avg_sq_absmaxes] if coded else [params, params]
    # Multiplied so that all of them must be multiples of the same.
    factors = [4 // tensors[0].element_size() for tensors in lists]
    gpu = gpu_of(device)
    choice = choose(gpu)
    tables: dict[Cut, tuple[list[int], list[int]]] = {}
    numbers: dict[int, tuple[int, int]] = {}
    places = [addresses(tensors) for tensors in (*lists, *scales)]
    for i, (param, *at) in enumerate(zip(params, *places, strict=True)):
        if param.numel() == 0:
            continue
        apart = 0
        for place, factor in zip(at, factors, strict=False):
            apart |= place * factor
        dense = master == "stochastic" and first_elements[i] % 64 == 0
        plan = _plan(param.shape, blocksize, coded, apart % (4 * _VECTORS[0]), dense, choice)
        if plan is None:
            return NotImplemented
        if steps[i] not in numbers:
            numbers[steps[i]] = _numbers(lr, beta1, beta2, steps[i])
        table, counts = tables.setdefault(plan.cut, ([], []))
        row = (steps[i] << 32) + parameter_ids[i]
        table += (*at, *numbers[steps[i]], *plan.sizes, first_elements[i], row, 0, 0)
        counts.append(plan.tiles)
    optional = [_there(x, device) for x in (clip_coef, grad_scale, found_inf, seed)]
    scalars = (-1.0 if maximize else 1.0, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay)
    scalars = tuple(float(x) for x in scalars)
    for cut, (table, counts) in tables.items():
        where = upload(table, device), tiles_on(tuple(counts), device)
        shared = {
            "GRAD_DTYPE": _DTYPES[grads[0].dtype],
            "MASTER": master,
            "VEC": cut.vector,
            "COLUMNS": COLUMNS,
        }
        grid = (sum(counts),)
        if not coded:
            launch(
                adamw_step_plain_kernel, grid, *where, *optional, *scalars, DENSE=cut.dense,
                STATE=_DTYPES[exp_avgs[0].dtype], ELEMENTS=choice.plain, num_warps=choice.warps,
                **shared,
            )  # fmt: skip
        elif cut.size > choice.largest:
            launch(
                adamw_step_large_kernel, grid, *where, tables_on(device), *optional, *scalars,
                PIECE=_elements(cut, choice), num_warps=choice.warps, **shared,
            )  # fmt: skip
        else:
            walking = choice.registers > 0 and cut.vector > 1
            options = {"num_warps": choice.warps, **all_registers(device)}
            if walking:
                options = _walking(cut, master, choice)
                grid = (min(*grid, _programs(gpu, **options)),)
            launch(
                adamw_step_coded_kernel, grid, *where,
                words_on(device) if walking else tables_on(device), *optional, *scalars,
                sum(counts), BLOCKS=_blocks(cut, choice), SIZE=cut.size, WHOLE=cut.whole,
                DENSE=cut.dense, PTX=walking, **options, **shared,
            )  # fmt: skip
    return None


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, blocksize: int, coded: bool, apart: int, dense: bool, choice: Choice
) -> Plan | None:
    """How a tensor is cut; None for more blocks a row than the kernel counts.

    Args:
        shape: of the parameter, not empty.
        blocksize: elements of a block of codes.
        coded: with codes.
        apart: the addresses modulo 4 * the most elements that are moved at once.
        dense: random words may be drawn by the counter.
        choice: for the GPU.
    """
    rows = shape[0] if len(shape) > 1 else 1
    elements = shape.numel()
    cols = elements // rows
    block = min(blocksize, cols)
    a_row = -(-cols // block)
    divisor = math.gcd(cols, block) if coded else elements
    vectors = _VECTORS[1:] if coded and choice.registers else _VECTORS
    fitting = (n for n in vectors if apart % (4 * n) == 0 and divisor % n == 0)
    vector = next(fitting, 1)
    if not coded:
        tiles = -(-elements // choice.plain)
        return Plan(Cut(0, False, vector, dense), tiles, (elements, cols, block))
    if 2 * a_row >= _LARGEST:
        return None
    size = triton.next_power_of_2(block)
    whole = size == block and cols % block == 0
    cut = Cut(size, whole, vector, dense and whole)
    if size > (choice.largest if vector > 1 else choice.coded // 2):
        cut = Cut(2 * choice.largest, False, vector, False)  # one launch for all sizes
    return Plan(cut, -(-rows * a_row // _blocks(cut, choice)), (rows * a_row, cols, block))


def _elements(cut: Cut, choice: Choice) -> int:
    """Elements of a program with codes; those moved one by one need an address each."""
    return choice.coded if cut.vector > 1 else choice.coded // 2


def _blocks(cut: Cut, choice: Choice) -> int:
    """Blocks of a program."""
    return 1 if cut.size > choice.largest else max(1, _elements(cut, choice) // cut.size)


def _numbers(lr: float, beta1: float, beta2: float, step: int) -> tuple[int, int]:
    """The bits of what depends on the step, computed in double and rounded once."""
    numbers = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    bits = torch.tensor(numbers, dtype=torch.float32, device="cpu").view(torch.int32).tolist()
    return bits[0], bits[1]


def _walking(cut: Cut, master: str, choice: Choice) -> dict[str, int]:
    """Options of programs that walk, with as many registers as they need without spilling."""
    needed = 64 if cut.size == 256 else 80
    if master == "stochastic" and not cut.dense:
        needed = 128
    return {"num_warps": choice.walking_warps, "maxnreg": max(needed, choice.registers)}


def _programs(gpu: Gpu, num_warps: int, maxnreg: int) -> int:
    """How many programs that walk the GPU holds at once: by registers, and tables of 30 KB."""
    a_multiprocessor = min(65536 // (32 * num_warps * maxnreg), gpu.shared_memory // 32768)
    return gpu.multiprocessors * max(1, a_multiprocessor)


def _there(value: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A number on the device of the parameters; the GPU is not waited for."""
    if value is None or value.device == device:
        return value
    return value.to(device, non_blocking=True)
