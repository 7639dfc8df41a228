"""nf4_linear and its gradient on GPUs: which kernel serves which size, and the slab path.

Other ops multiply with a weight in NF4 through `multiply`, `multiply_transposed` and `slabs`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from feinwerk.ops.nf4_dequantize.triton import dequantize_tile
from feinwerk.ops.nf4_linear.triton_decode import RUN, decode
from feinwerk.ops.nf4_linear.triton_tile import fits, multiply_tile, multiply_transposed_tile
from feinwerk.ops.nf4_linear.triton_vector import multiply_vectors, suits
from feinwerk.triton_lib import Gpu, gpu_of
from feinwerk.triton_tuning import LinearTuning, SlabChoice, TileChoice, linear_tuning

# packed, absmax, nested_absmax, nested_codebook, nested_offset: the ops' order.
Tables = tuple[torch.Tensor | None, ...]

# Slabs begin at multiples of this many rows or columns: whole tiles of a dense product.
_STEP = 256


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
    compute: str = "exact",
) -> torch.Tensor:
    """Multiply with W~ by the kernel that serves this many rows; "int8" is the reference's."""
    if compute != "exact":
        return NotImplemented
    tables = (packed, absmax, nested_absmax, nested_codebook, nested_offset)
    y = multiply(x.reshape(-1, K), tables, bias, N=N, K=K, blocksize=blocksize)
    return y.view(*x.shape[:-1], N)


def nf4_linear_backward(
    grad_y: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None = None,
    nested_codebook: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int = 64,
) -> torch.Tensor:
    """Multiply with the same W~ from the other side."""
    tables = (packed, absmax, nested_absmax, nested_codebook, nested_offset)
    grad_x = multiply_transposed(grad_y.reshape(-1, N), tables, N=N, K=K, blocksize=blocksize)
    return grad_x.view(*grad_y.shape[:-1], K)


def multiply(
    x2d: torch.Tensor,
    tables: Tables,
    bias: torch.Tensor | None = None,
    *,
    N: int,
    K: int,
    blocksize: int,
    out: torch.Tensor | None = None,
    tuning: LinearTuning | None = None,
) -> torch.Tensor:
    """Return x W~^T + bias [M, N] for x [M, K]; `out`, if given, is [M, N] with unit column stride.

    Outside of autograd: x is detached. A strided x is copied, so that it has the same bits.
    """
    x2d = x2d.detach().contiguous()
    y = torch.empty((x2d.shape[0], N), dtype=x2d.dtype, device=x2d.device) if out is None else out
    if x2d.shape[0] == 0:
        return y
    tuning, packed = tuning or tuning_of(x2d), tables[0]
    assert packed is not None
    rows, wide = x2d.shape[0], x2d.dtype is torch.float32
    few = rows <= tuning.decode_rows and not wide
    if few and suits(x2d, packed, N, blocksize, tuning.vector):
        multiply_vectors(x2d, tables, bias, y, blocksize=blocksize, choice=tuning.vector)
        return y
    in_runs = K % RUN == 0 and blocksize % RUN == 0
    if few and in_runs and tuning.decode_outputs <= N:
        choice = tuning.decode if rows <= 8 else tuning.decode_many
        decode(x2d, tables, bias, y, blocksize=blocksize, choice=choice)
        return y
    if rows <= tuning.rows_without_slabs(fp32=wide):
        choice = _choice(tuning.tile_fp32 if wide else tuning.tile, tuning, K, blocksize)
        multiply_tile(x2d, tables, bias, y, blocksize=blocksize, choice=choice)
        return y
    # addmm adds its first argument in fp32 and rounds once; it wants it in y's dtype.
    bias = None if bias is None else bias.detach().to(x2d.dtype)
    steps = slabs(tables, N, K, blocksize, x2d.dtype, "rows", rows=rows, tuning=tuning)
    for begin, end, slab in steps:
        if bias is None:
            torch.mm(x2d, slab.t(), out=y[:, begin:end])
        else:
            torch.addmm(bias[begin:end], x2d, slab.t(), out=y[:, begin:end])
    return y


def multiply_transposed(
    grad2d: torch.Tensor,
    tables: Tables,
    *,
    N: int,
    K: int,
    blocksize: int,
    tuning: LinearTuning | None = None,
) -> torch.Tensor:
    """Return grad W~ [M, K] for grad [M, N].

    Slabs are columns of W, so that no sum crosses from one slab to the next and is rounded there.
    """
    grad2d = grad2d.detach().contiguous()
    grad_x = torch.empty((grad2d.shape[0], K), dtype=grad2d.dtype, device=grad2d.device)
    if grad2d.shape[0] == 0:
        return grad_x
    tuning = tuning or tuning_of(grad2d)
    rows, wide = grad2d.shape[0], grad2d.dtype is torch.float32
    if rows <= tuning.rows_without_slabs(fp32=wide, transposed=True):
        choice = tuning.tile_fp32 if wide else tuning.transposed
        choice = _choice(choice, tuning, K, blocksize)
        multiply_transposed_tile(grad2d, tables, grad_x, blocksize=blocksize, choice=choice)
        return grad_x
    steps = slabs(tables, N, K, blocksize, grad2d.dtype, "columns", rows=rows, tuning=tuning)
    for begin, end, slab in steps:
        torch.mm(grad2d, slab, out=grad_x[:, begin:end])
    return grad_x


def slabs(
    tables: Tables,
    N: int,
    K: int,
    blocksize: int,
    dtype: torch.dtype,
    by: str = "rows",
    *,
    rows: int | None = None,
    tuning: LinearTuning | None = None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (begin, end, slab of W~): [end - begin, K] by "rows", [N, end - begin] by "columns".

    Slabs take turns in two buffers: use a slab before taking the next. `rows` of x, if known, set
    their size. A slab after the first is decoded beside the product with the one before it.
    """
    packed, absmax, nested_absmax, nested_codebook, nested_offset = tables
    tuning = tuning or tuning_of(packed)
    count, other = (N, K) if by == "rows" else (K, N)
    choice = tuning.slab(rows)
    step = slab_step(count, other * dtype.itemsize, rows, choice, gpu_of(packed.device))
    beside = _Beside(packed.device) if choice.beside and step < count and packed.is_cuda else None
    shape = (1 if beside is None else 2, step * other)
    buffers = torch.empty(shape, dtype=dtype, device=packed.device)
    for i, begin in enumerate(range(0, count, step)):
        end = min(begin + step, count)
        shape = (end - begin, K) if by == "rows" else (N, end - begin)
        row, column = (begin, 0) if by == "rows" else (0, begin)
        slab = buffers[i % len(buffers)][: shape[0] * shape[1]].view(shape)
        with contextlib.nullcontext() if beside is None else beside.turn(i):
            dequantize_tile(
                slab, packed, absmax, nested_absmax, nested_codebook, nested_offset,
                K=K, row=row, column=column, blocksize=blocksize, keep=choice.keep,
            )  # fmt: skip
        yield begin, end, slab


class _Beside:
    """Turns of work on a stream of its own, between uses of what it fills on the caller's stream.

    The first turn is on the caller's stream. A later one waits for what the caller had queued when
    the turn before began, and the caller waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.main = torch.cuda.current_stream(device)
        self.side = _side_stream(device)
        self.free: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def turn(self, i: int) -> Iterator[None]:
        """Queue work on the side; turns are numbered from 0."""
        used = torch.cuda.Event()
        used.record(self.main)
        if i == 0:
            yield
        else:
            assert self.free is not None
            self.side.wait_event(self.free)
            with torch.cuda.stream(self.side):
                yield
            done = torch.cuda.Event()
            done.record(self.side)
            self.main.wait_event(done)
        self.free = used


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.lru_cache(maxsize=1024)
def slab_step(count: int, size: int, rows: int | None, choice: SlabChoice, gpu: Gpu) -> int:
    """Return how many of count rows or columns, of `size` bytes, a slab has: whole tiles.

    So that the products with `rows` rows of x take few waves of tiles of 128 by 256, the last of
    which is as full as may be, and there are few of them.
    """
    if count * size <= choice.whole or count <= _STEP:
        return count
    most = choice.bytes // size
    down = -(-(rows or 1) // 128)

    def cost(step: int) -> tuple[float, int]:
        parts, rest = divmod(count, step)
        waves = parts * -(-down * (step // _STEP) // gpu.multiprocessors)
        if rest:
            waves += -(-down * -(-rest // _STEP) // gpu.multiprocessors)
        return waves + 0.1 * -(-count // step), step

    return min(range(_STEP, max(most, _STEP) + 1, _STEP), key=cost)


def _choice(choice: TileChoice, tuning: LinearTuning, K: int, blocksize: int) -> TileChoice:
    """The choice, with steps no longer than a block, or the general one where it does not fit."""
    choice = replace(choice, block_k=min(choice.block_k, blocksize))
    return choice if fits(K, blocksize, choice) else tuning.general


def tuning_of(tensor: torch.Tensor) -> LinearTuning:
    """Return the numbers for the GPU that a tensor lives on."""
    gpu = gpu_of(tensor.device)
    return linear_tuning(gpu.backend, gpu.arch)
