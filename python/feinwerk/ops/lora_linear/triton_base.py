"""The frozen product that adapters are added to, NF4 or dense, in slabs of W that stay in L2.

After a slab's product the caller has its part of y, and the slab itself, in L2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from feinwerk.ops.nf4_linear.triton import (
    multiply,
    multiply_transposed,
    slab_step,
    slabs,
    tuning_of,
)
from feinwerk.triton_lib import gpu_of
from feinwerk.triton_tuning import ANY_ROWS, LinearTuning, SlabChoice

# Fills a part of a result that a product is then added to: part, its first column, the slab.
Prepare = Callable[[torch.Tensor, int, torch.Tensor], None]


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen weight W~ [N, K], rounded to `dtype`: NF4's tables, or a dense weight and Nones."""

    tables: tuple[torch.Tensor | None, ...]
    N: int
    K: int
    blocksize: int
    dtype: torch.dtype

    @property
    def dense(self) -> bool:
        """Whether the weight is stored as numbers."""
        return self.tables[1] is None

    @property
    def tuning(self) -> LinearTuning:
        """nf4_linear's numbers for this GPU."""
        weight = self.tables[0]
        assert weight is not None
        tuning = tuning_of(weight)
        if gpu_of(weight.device).backend != "interpreter":
            return tuning
        # A few slabs of any weight: there it is their number that takes time.
        few = max(tuning.slab(None).bytes, self.N * self.K * self.dtype.itemsize // 4)
        return dataclasses.replace(tuning, slabs=(SlabChoice(ANY_ROWS, few, few),))

    def _without_slabs(self, rows: int, *, transposed: bool = False) -> bool:
        fp32 = self.dtype is torch.float32
        most = self.tuning.rows_without_slabs(fp32=fp32, transposed=transposed)
        return not self.dense and rows <= most

    def slabs(
        self, by: str = "rows", rows: int | None = None
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (begin, end, slab of W~), [end - begin, K] by "rows", else [N, end - begin].

        `rows` of x that a slab is multiplied with, if it is, set their size.
        """
        if not self.dense:
            yield from slabs(
                self.tables, self.N, self.K, self.blocksize, self.dtype, by, rows=rows,
                tuning=self.tuning,
            )  # fmt: skip
            return
        weight = self.tables[0]
        assert weight is not None
        count, other = (self.N, self.K) if by == "rows" else (self.K, self.N)
        step = slab_step(
            count, other * self.dtype.itemsize, rows, self.tuning.slab(rows), gpu_of(weight.device)
        )
        for begin in range(0, count, step):
            end = min(begin + step, count)
            slab = weight[begin:end] if by == "rows" else weight[:, begin:end]
            slab = slab.detach().to(self.dtype)
            yield begin, end, slab if slab.stride(1) == 1 else slab.contiguous()

    def products(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        whole: bool = False,
        prepare: Prepare | None = None,
    ) -> Iterator[tuple[int, int, torch.Tensor | None, bool]]:
        """Fill y with x W~^T + bias; yield (begin, end, slab, prepared) after each part of it.

        With few rows a kernel that decodes W itself fills all of y, and there is no slab (None),
        unless `whole` asks for slabs afterwards. Otherwise `prepare(y[:, begin:end], begin, slab)`,
        if given, has filled its part beforehand with what is to be added instead of the bias.
        """
        rows = len(x)
        if self._without_slabs(rows):
            multiply(
                x, self.tables, bias, N=self.N, K=self.K, blocksize=self.blocksize, out=y
            )  # fmt: skip
            if whole:
                for begin, end, slab in self.slabs():
                    yield begin, end, slab, False
            else:
                yield 0, self.N, None, False
            return
        bias = None if bias is None else bias.detach().to(self.dtype)
        for begin, end, slab in self.slabs(rows=rows):
            part = y[:, begin:end]
            if rows and prepare is not None:
                prepare(part, begin, slab)
                part.addmm_(x, slab.t())
            elif rows and bias is not None:
                torch.addmm(bias[begin:end], x, slab.t(), out=part)
            elif rows:
                torch.mm(x, slab.t(), out=part)
            yield begin, end, slab, prepare is not None

    def transposed(self, grad: torch.Tensor, prepare: Prepare) -> torch.Tensor | None:
        """Return grad W~ [M, K] added to what `prepare(out[:, begin:end], begin, slab)` has filled.

        None where W would not be taken slab by slab; no sum crosses from one slab to the next.
        """
        rows = len(grad)
        if self._without_slabs(rows, transposed=True):
            return None
        out = torch.empty((rows, self.K), dtype=self.dtype, device=grad.device)
        for begin, end, slab in self.slabs("columns", rows):
            if rows:
                prepare(out[:, begin:end], begin, slab)
                out[:, begin:end].addmm_(grad, slab)
        return out

    def transposed_whole(self, grad: torch.Tensor) -> torch.Tensor:
        """Return grad W~ [M, K] of few rows, for a weight in NF4."""
        return multiply_transposed(grad, self.tables, N=self.N, K=self.K, blocksize=self.blocksize)
