"""Random calls of the adapter ops that know their truth and their budget; shared by tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from feinwerk import _library, _native, philox
from feinwerk.ops import dora_linear, grouped_lora_linear, lora_linear, row_norms
from feinwerk.testing import WeightCase, assert_within, make_weight, make_x
from feinwerk.testing.adapter_budget import adapter_budget

# Instruction sets whose products of bf16 activations take bf16 operands.
BF16_ISAS = ("avx512_bf16", "amx")

BASES = ("fp32", "bf16", "fp16", "nf4", "nested")
_DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter: A [r, K], B [N, r], scaling, and DoRA's magnitude [N] or None for LoRA."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float | torch.Tensor
    magnitude: torch.Tensor | None = None

    @property
    def s(self) -> float:
        """The scaling as the ops take it, rounded to fp32."""
        return float(torch.as_tensor(self.scaling, dtype=torch.float32))


@dataclass(frozen=True, eq=False)
class AdapterCase:
    """A call of lora_linear, dora_linear or grouped_lora_linear, its truth and its budget.

    `index` makes it a grouped call; without it there is one adapter, and DoRA if that has a
    magnitude. Outputs and gradients have names: y, x, bias, lora_bias, A0, B0, magnitude0, A1, ...
    """

    x: torch.Tensor
    base: WeightCase | torch.Tensor
    adapters: tuple[Adapter, ...]
    grad_y: torch.Tensor
    bias: torch.Tensor | None = None
    lora_bias: torch.Tensor | None = None
    index: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None
    compute: str = "exact"
    _bounds: dict[tuple[bool, bool], dict[str, tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=dict, init=False
    )

    @property
    def N(self) -> int:
        """out_features."""
        return self.adapters[0].B.shape[0]

    @property
    def K(self) -> int:
        """in_features."""
        return self.adapters[0].A.shape[1]

    @property
    def tables(self) -> tuple[torch.Tensor | None, ...]:
        """The weight and absmax and the nested tensors, None for a dense weight."""
        if isinstance(self.base, WeightCase):
            return self.base.tables
        return (self.base, None, None, None, None)

    @property
    def blocksize(self) -> int:
        """Elements per absmax."""
        return self.base.blocksize if isinstance(self.base, WeightCase) else 64

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W~, rounded once to dtype; without one, W as it is (fp32 for NF4)."""
        if isinstance(self.base, WeightCase):
            return self.base.dense(torch.float32 if dtype is None else dtype)
        return self.base if dtype is None else self.base.to(dtype)

    def base_norm(self) -> torch.Tensor:
        """What row_norms returns for the weight."""
        weight, *tables = self.tables
        assert weight is not None
        return row_norms(weight, *tables, shape=(self.N, self.K), blocksize=self.blocksize)

    def leaves(self) -> dict[str, torch.Tensor]:
        """Every tensor that can have a gradient, by name; new tensors over the same memory."""
        found: dict[str, torch.Tensor | None] = {
            "x": self.x,
            "bias": self.bias,
            "lora_bias": self.lora_bias,
        }
        for i, adapter in enumerate(self.adapters):
            found[f"A{i}"], found[f"B{i}"] = adapter.A, adapter.B
            found[f"magnitude{i}"] = adapter.magnitude
        return {name: value.detach() for name, value in found.items() if value is not None}

    def call(self, leaves: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """Call the public function on these tensors."""
        weight, *tables = self.tables
        given: dict[str, Any] = dict(
            zip(
                ("absmax", "nested_absmax", "nested_codebook", "nested_offset"), tables, strict=True
            )
        )
        given |= {"bias": leaves.get("bias"), "blocksize": self.blocksize, "compute": self.compute}
        given |= {"dropout_p": self.dropout_p, "seed": self.seed, **options}
        x, scaling = leaves["x"], [adapter.scaling for adapter in self.adapters]
        count = range(len(self.adapters))
        A, B = [leaves[f"A{i}"] for i in count], [leaves[f"B{i}"] for i in count]
        m = [leaves.get(f"magnitude{i}") for i in count]
        assert weight is not None
        if self.index is not None:
            given["magnitude"] = m
            return grouped_lora_linear(x, weight, A, B, self.index, scaling=scaling, **given)
        if m[0] is not None:
            return dora_linear(x, weight, A[0], B[0], m[0], scaling=scaling[0], **given)
        given["lora_bias"] = leaves.get("lora_bias")
        return lora_linear(x, weight, A[0], B[0], scaling=scaling[0], **given)

    def run(self, wants: Collection[str] | None = None, **options: Any) -> dict[str, torch.Tensor]:
        """Call the public function, backward with grad_y; y and the gradients by name."""
        leaves = self.leaves()
        for name, leaf in leaves.items():
            leaf.requires_grad_(wants is None or name in wants)
        y = self.call(leaves, **options)
        if y.requires_grad:
            torch.autograd.backward(y, self.grad_y)
        got = {"y": y.detach()}
        return got | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def rows_of(self) -> torch.Tensor:
        """The adapter of every row."""
        leading = self.x.shape[:-1]
        if self.index is None:
            return torch.zeros(leading.numel(), dtype=torch.int64)
        missing = len(leading) - self.index.dim()
        return self.index.reshape([*self.index.shape, *[1] * missing]).expand(leading).reshape(-1)

    def dropout_factor(self) -> torch.Tensor:
        """What dropout multiplies x with, fp64 [M, K]: 0 or 1 / (1 - p)."""
        rows = self.rows_of()
        if self.dropout_p == 0:
            return torch.ones(len(rows), self.K, dtype=torch.float64)
        assert self.seed is not None
        drawn = philox.keep_mask(self.seed, len(rows), self.K, self.dropout_p)
        factor = torch.zeros(drawn.shape, dtype=torch.float64)
        # The rows are numbered once sorted by adapter.
        factor[torch.argsort(rows, stable=True)] = drawn.double() / (1 - self.dropout_p)
        return factor

    def bounds(
        self, bf16_engine: bool = False, triton: bool = False
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(truth, budget) of y and of every gradient, by name; computed once."""
        kind = (bf16_engine, triton)
        if kind not in self._bounds:
            self._bounds[kind] = adapter_budget(self, bf16_engine, triton)
        return self._bounds[kind]

    def check(self, got: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Raise AssertionError unless everything in got (default: run()) is within the budget."""
        if got is None:
            got = self.run()
            assert got.keys() == {"y", *self.leaves()}
        triton = _library.forced_backend() == "triton" or (
            self.x.is_cuda and _library.forced_backend() is None
        )
        engine = (
            self.x.dtype is torch.bfloat16
            and not triton
            and _library.forced_backend() != "reference"
            and _native.available()
            and _native.isa() in BF16_ISAS
        )
        leaves, bounds = self.leaves(), self.bounds(engine, triton)
        for name, value in got.items():
            truth, budget = bounds[name]
            dtype = self.x.dtype if name == "y" else leaves[name].dtype
            assert_within(value, truth, budget, dtype, name)
        return got


@functools.lru_cache(maxsize=1024)
def make_adapters(
    N: int,
    K: int,
    rows: int,
    ranks: tuple[int, ...] = (4,),
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    base: str = "nf4",
    blocksize: int = 64,
    dora: tuple[bool, ...] = (False,),
    bias: torch.dtype | None = None,
    lora_bias: torch.dtype | None = None,
    index: tuple[int, ...] | None = None,
    dropout_p: float = 0.0,
    compute: str = "exact",
    seed: int = 0,
) -> AdapterCase:
    """Return a random case, the same on every backend; shared, not to be changed.

    Args:
        N: out_features.
        K: in_features.
        rows: of x.
        ranks: of each adapter.
        dtype: of x and grad_y.
        adapter_dtype: of A, B and magnitude.
        base: one of `BASES`.
        blocksize: of an NF4 base.
        dora: which adapters have a magnitude.
        bias: its dtype, or None.
        lora_bias: its dtype, or None.
        index: the adapter of each row: a grouped call.
        dropout_p: probability of dropping an element.
        compute: "exact" or "int8".
        seed: of everything random.

    Returns:
        The case.

    Example:
        >>> got = make_adapters(3, 64, 2).check()
        >>> sorted(got)
        ['A0', 'B0', 'x', 'y']
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight: WeightCase | torch.Tensor
    if base in _DENSE:
        weight = (normal(N, K) * (torch.rand(N, 1, generator=generator) + 0.25)).to(_DENSE[base])
    else:
        weight = make_weight(N, K, blocksize=blocksize, double_quant=base == "nested", seed=seed)
    dense = weight.dense() if isinstance(weight, WeightCase) else weight.float()
    adapters = []
    for i, (r, has_magnitude) in enumerate(zip(ranks, dora, strict=True)):
        A, B = normal(r, K).to(adapter_dtype), (normal(N, r) / math.sqrt(r)).to(adapter_dtype)
        magnitude = None
        if has_magnitude:
            away = torch.rand(N, generator=generator) + 0.5
            magnitude = (dense.norm(dim=1) * away).to(adapter_dtype)
        adapters.append(Adapter(A, B, 0.3 + 0.5 * i, magnitude))
    return AdapterCase(
        make_x((rows, K), dtype, seed=seed + 1),
        weight,
        tuple(adapters),
        make_x((rows, N), dtype, seed=seed + 2),
        None if bias is None else normal(N).to(bias),
        None if lora_bias is None else normal(N).to(lora_bias),
        None if index is None else torch.tensor(index, dtype=torch.int64),
        dropout_p,
        torch.tensor(123456789 + seed) if dropout_p > 0 else None,
        compute,
    )
