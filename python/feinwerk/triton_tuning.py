"""Every tuned number of the Triton kernels: which kernel serves which size, and in which tiles.

Plain numbers by (backend, arch), with a default; the kernels themselves know none. A number is here
because a sweep (benchmarks/gpu/sweep_linear.py) or an argument in docs/ops/<op>.md chose it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VectorChoice:
    """The kernel of one or two rows of x: what a thread holds, words of eight elements."""

    words: int = 16  # of a tile of W; 0 leaves these rows to another kernel
    x_words: int = 8  # of x, at most
    warps: int = 4  # at least
    warps_per_multiprocessor: int = 16
    longest: int = 16384  # elements of x, which registers hold
    outputs: int = 256  # at least: docs/ops/nf4_linear.md says why


@dataclass(frozen=True)
class DecodeChoice:
    """The decode kernel's tile: so many runs of 64 elements of W at a time."""

    tile: int = 64
    runs: int = 8  # neighbours of a row, at most
    columns: int = 8  # of a product, at least: runs of all rows of x
    warps: int = 2
    stages: int = 4
    programs: int = 12  # per multiprocessor, which K is split for: what registers allow
    least_steps: int = 4  # a part of K has at least so many
    splits: int = 0  # if not 0, overrides what programs gives


@dataclass(frozen=True)
class TileChoice:
    """The tile kernels' tile: rows of x, rows of W, elements of K."""

    block_m: int = 64
    block_n: int = 128
    block_k: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2  # per multiprocessor, which the summed dimension is split for
    least_steps: int = 8  # a part of the summed dimension has at least so many
    splits: int = 0  # if not 0, overrides what programs gives
    lookup: str = "gather"  # of triton_tile: "gather" and "planes" are PTX


ANY_ROWS = 1 << 62


@dataclass(frozen=True)
class SlabChoice:
    """How dense slabs of W are made for up to `rows` rows of x, and how large they are.

    A weight of up to `whole` bytes is one slab, others have slabs of up to `bytes`. With `beside`
    there are two at a time, and the next one is decoded beside the product with one. With `keep`
    they are written with the wish to stay in L2.
    """

    rows: int
    whole: int
    bytes: int
    beside: bool = False
    keep: bool = False


@dataclass(frozen=True)
class LinearTuning:
    """How nf4_linear and its gradient are served, by the number of rows M of x.

    M <= decode_rows takes the decode kernel, M <= tile_rows (tile_rows_transposed for the gradient)
    the tile kernel, and the others dequantize a slab of the weight at a time and multiply with it.
    fp32 has limits of its own.
    """

    decode_rows: int = 16
    decode_outputs: int = 128  # fewer outputs take the tile kernel: docs/ops/nf4_linear.md says why
    # By the first sweep on an H100 slabs were faster than the tile kernels from 16 rows up, for the
    # gradient always; the tile kernels serve what is small or does not suit the decode kernel.
    tile_rows: int = 16
    tile_rows_transposed: int = 0
    tile_rows_fp32: int = 4
    slabs: tuple[SlabChoice, ...] = (
        SlabChoice(128, 32 << 20, 32 << 20, keep=True),
        # Shorter products would leave multiprocessors idle.
        SlabChoice(383, 32 << 20, 64 << 20, keep=True),
        SlabChoice(1535, 32 << 20, 32 << 20, keep=True),
        SlabChoice(ANY_ROWS, 32 << 20, 28 << 20, beside=True, keep=True),
    )
    vector: VectorChoice = field(default_factory=VectorChoice)
    decode: DecodeChoice = field(default_factory=DecodeChoice)
    decode_many: DecodeChoice = field(default_factory=lambda: DecodeChoice(programs=8))  # M > 8
    tile: TileChoice = field(default_factory=TileChoice)
    transposed: TileChoice = field(default_factory=lambda: TileChoice(block_n=64))
    tile_fp32: TileChoice = field(
        default_factory=lambda: TileChoice(block_m=16, block_n=32, programs=4)
    )
    # Rows that begin inside a byte, steps that cross rows or blocks: right for all, not fast.
    general: TileChoice = field(
        default_factory=lambda: TileChoice(block_m=32, block_n=32, stages=1)
    )

    def rows_without_slabs(self, *, fp32: bool, transposed: bool = False) -> int:
        """Up to so many rows a kernel decodes W itself; of more, W comes slab by slab."""
        if fp32:
            return self.tile_rows_fp32
        return self.tile_rows_transposed if transposed else self.tile_rows

    def slab(self, rows: int | None) -> SlabChoice:
        """How slabs are made for so many rows of x; None where nothing is multiplied with them."""
        return next(choice for choice in self.slabs if (rows or 1) <= choice.rows)


_INTERPRETED = TileChoice(block_m=128, block_n=128, block_k=128, least_steps=2, lookup="table")

_LINEAR: dict[tuple[str, str], LinearTuning] = {
    # A100: mma takes both operands from registers, so that 128 rows of W would not fit.
    ("cuda", "80"): LinearTuning(tile=TileChoice(block_n=64)),
    # Compiled only: without a spill, and not measured.
    ("cuda", "100"): LinearTuning(tile=TileChoice(block_n=64)),
    # A program costs a millisecond there, and torch's own products depend on the threads.
    ("interpreter", "none"): LinearTuning(
        tile_rows=1 << 30,
        tile_rows_transposed=1 << 30,
        tile_rows_fp32=1 << 30,
        slabs=(SlabChoice(ANY_ROWS, 1 << 14, 1 << 14),),
        vector=VectorChoice(words=256, warps_per_multiprocessor=1),
        decode=DecodeChoice(tile=128, programs=2, least_steps=1),
        decode_many=DecodeChoice(tile=128, programs=2, least_steps=1),
        tile=_INTERPRETED,
        transposed=_INTERPRETED,
        tile_fp32=_INTERPRETED,
        general=_INTERPRETED,
    ),
}
# AMD: no PTX, and 64 KiB of shared memory. Triton 3.6 cannot pipeline the decode kernel there.
_HIP_LINEAR = LinearTuning(
    vector=VectorChoice(words=0),
    decode=DecodeChoice(stages=1),
    decode_many=DecodeChoice(stages=1),
    tile=TileChoice(stages=2, lookup="table"),
    transposed=TileChoice(block_n=64, stages=2, lookup="table"),
    tile_fp32=TileChoice(block_m=16, block_n=32, stages=2, programs=4, lookup="table"),
    general=TileChoice(block_m=32, block_n=32, stages=1, lookup="table"),
)


_DEFAULT_LINEAR = LinearTuning()


def linear_tuning(backend: str, arch: str) -> LinearTuning:
    """Return nf4_linear's numbers for a GPU, `Gpu.backend` and `Gpu.arch`."""
    default = _HIP_LINEAR if backend == "hip" else _DEFAULT_LINEAR
    return _LINEAR.get((backend, arch), default)
