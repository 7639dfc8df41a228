"""Every tuned number of the Triton kernels: which kernel serves which size, and in which tiles.

Plain numbers by (backend, arch), with a default; the kernels themselves know none. A number is here
because a sweep (benchmarks/gpu_sweep.py) or an argument in docs/ops/<op>.md chose it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearTuning:
    """How nf4_linear and its gradient are served, by the number of rows M of x.

    M <= decode_rows takes the decode kernel, M <= tile_rows the fused tile kernel, and the others
    dequantize a slab of the weight at a time and multiply with it.
    """

    slab_bytes: int = 16 << 20  # a dense slab and what it is multiplied with stay in L2


_LINEAR: dict[tuple[str, str], LinearTuning] = {
    ("interpreter", "none"): LinearTuning(slab_bytes=1 << 14),
}


def linear_tuning(backend: str, arch: str) -> LinearTuning:
    """Return nf4_linear's numbers for a GPU, `Gpu.backend` and `Gpu.arch`."""
    return _LINEAR.get((backend, arch), LinearTuning())
