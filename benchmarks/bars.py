"""The bars: how much faster than its peers, or how close to the limit, Feinwerk has to be.

Each is one ratio within one run with 2 threads and cold weights, on the 4096 x 4096 weight unless
it names another. Bars on bytes are in byte_bars.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.plan import ADAPTED_ROWS, MAIN_SHAPE, NORM_SHAPE, PROJECTIONS

ISA_ORDER = ("reference", "scalar", "neon", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
MEMORY = "memory"
PEAK = "peak"  # the fastest unit that the kernels' ISA may use


@dataclass(frozen=True)
class Bar:
    """One requirement.

    Args:
        group: the heading it stands under.
        what: op's operation, as in plan.Case.
        M: rows.
        dtype: of the activations.
        required: the ratio or share to reach.
        against: peers of which the fastest counts, or MEMORY or PEAK for a share of the limit.
        op: the op.
        isa: of the kernels, empty for the best.
        onednn: what oneDNN was held to, empty for nothing.
        shape: (N, K) of the weight.
        at_most: `required` is how many times the peer's time ours may take, at most.
    """

    group: str
    what: str
    M: int
    dtype: str
    required: float
    against: tuple[str, ...]
    op: str = "nf4_linear"
    isa: str = ""
    onednn: str = ""
    shape: tuple[int, int] = MAIN_SHAPE
    at_most: bool = False

    @property
    def is_share(self) -> bool:
        """A share of the machine's limit instead of a ratio to a peer."""
        return self.against[0] in (MEMORY, PEAK)

    def label(self) -> str:
        """What is measured, in words."""
        size = "" if self.shape == MAIN_SHAPE else f"{self.shape[0]}x{self.shape[1]} "
        rows = f"M={self.M} " if self.M else ""
        return f"{size}{rows}{self.dtype} {self.what}"


def _bars() -> Iterator[Bar]:
    one = "M=1"
    for dtype in ("fp32", "bf16"):
        yield Bar(one, "forward", 1, dtype, 40, ("bitsandbytes",))
    yield Bar(one, "forward", 1, "bf16", 1, ("bitsandbytes eval",))
    yield Bar(one, "forward", 1, "bf16", 2.5, ("dense",))
    yield Bar(one, "forward", 1, "fp32", 3, ("dense",))
    yield Bar(one, "forward", 1, "bf16", 1, ("ort int4 level 0", "ort int4 level 0 fp16"))
    levels = ("ort int4 level 4", "ort int4 level 4 block 32")
    yield Bar(one, "int8 forward", 1, "fp32", 1, levels)
    for what, faster in (("forward", 3), ("dX", 2)):
        yield Bar("M=64", what, 64, "bf16", faster, ("bitsandbytes",))
        yield Bar("M=64", what, 64, "bf16", 1, ("dense",))
    for what, faster in (("forward", 1.5), ("dX", 1.4)):
        yield Bar("M=512", what, 512, "bf16", faster, ("bitsandbytes",))
        yield Bar("M=512", what, 512, "bf16", 1.1, ("dense",))
    for what in ("forward", "dX"):
        for M in (16, 64, 256, 512):
            yield Bar("fp32, M >= 16", what, M, "fp32", 1.4, ("dense",))
    for dtype in ("fp32", "bf16"):
        for what in ("forward", "dX"):
            yield Bar("Share of the arithmetic peak", what, 512, dtype, 0.6, (PEAK,))
    second = "Quantize and dequantize"
    yield Bar(second, "dequantize nested", 0, "bf16", 8, ("bitsandbytes",), "nf4_dequantize")
    yield Bar(second, "quantize nested", 0, "fp32", 50, ("bitsandbytes",), "nf4_quantize")
    share = "Share of the memory bandwidth"
    yield Bar(share, "quantize nested", 0, "fp32", 0.6, (MEMORY,), "nf4_quantize")
    yield Bar(share, "dequantize nested", 0, "bf16", 0.6, (MEMORY,), "nf4_dequantize")
    for what, dtype in (("forward", "fp32"), ("forward", "bf16"), ("int8 forward", "fp32")):
        yield Bar(share, what, 1, dtype, 0.6, (MEMORY,))
    avx2 = "AVX2 forced"
    yield Bar(avx2, "forward", 1, "fp32", 10, ("bitsandbytes",), isa="avx2")
    for M in (64, 256, 512):
        yield Bar(avx2, "forward", M, "fp32", 0.9, ("dense",), isa="avx2")
    held = {"isa": "avx512_bf16", "onednn": "AVX512_CORE_BF16"}
    group = "Without AMX on either side"
    for M, what, bnb, dense in ((64, "forward", 3, 1), (64, "dX", 2, 1),
                                (512, "forward", 1.5, 1.1), (512, "dX", 1.4, 1.1)):  # fmt: skip
        yield Bar(group, what, M, "bf16", bnb, ("bitsandbytes",), **held)
        yield Bar(group, what, M, "bf16", dense, ("dense",), **held)
    for what in ("forward", "dX"):
        yield Bar(group, what, 512, "bf16", 0.6, (PEAK,), **held)


# As PEFT makes them: adapters in fp32. Its bf16 adapters are measured beside it and held to no bar.
PEFT = ("PEFT + bitsandbytes",)


def _adapter_bars() -> Iterator[Bar]:
    lora, dora = "LoRA forward+backward", "DoRA forward+backward"
    op = "lora_linear"
    for shape in PROJECTIONS:
        at = {"op": op, "shape": shape}
        for dtype in ("fp32", "bf16"):
            yield Bar("LoRA over NF4", lora, 512, dtype, 1.5, PEFT, **at)
            yield Bar("LoRA over NF4", lora, 512, dtype, 1.12, ("NF4 alone",), **at, at_most=True)
            yield Bar("DoRA over NF4", dora, 512, dtype, 4, PEFT, **at)
            yield Bar("DoRA over NF4", dora, 64, dtype, 8, PEFT, **at)
            yield Bar(
                "DoRA over NF4", dora, 512, dtype, 1.1, ("feinwerk LoRA",), **at, at_most=True
            )
            yield Bar(
                "Decoding", "LoRA forward", 1, dtype, 1.15, ("NF4 alone",), **at, at_most=True
            )
    for what in ("norm over NF4", "norm over fp32"):
        yield Bar("Norm", what, 0, "fp32", 12, PEFT, "weight_norm", shape=NORM_SHAPE)
    group = "32 adapters, each of 16 rows"
    for dtype in ("fp32", "bf16"):
        at = {"op": "grouped_lora_linear"}
        yield Bar(group, "forward", ADAPTED_ROWS, dtype, 3, ("PEFT + bitsandbytes eval",), **at)
        yield Bar(
            group, "forward+backward", ADAPTED_ROWS, dtype, 4,
            ("PEFT + bitsandbytes, one by one",), **at,
        )  # fmt: skip


BARS: tuple[Bar, ...] = (*_bars(), *_adapter_bars())


def find(
    data: dict[str, Any],
    what: str,
    M: int,
    dtype: str,
    *,
    op: str = "nf4_linear",
    shape: Sequence[int] = MAIN_SHAPE,
    threads: int = 2,
    isa: str = "",
    onednn: str = "",
    cold: bool = True,
) -> dict[str, Any] | None:
    """The record of a case; with no ISA named, of the best one that was measured."""
    wanted = {
        "op": op, "what": what, "M": M, "dtype": dtype, "N": shape[0], "K": shape[1],
        "threads": threads, "onednn": onednn, "cold": cold,
    }  # fmt: skip
    found = [
        record
        for record in data["cases"].values()
        if all(record.get(k) == v for k, v in wanted.items())
        and record["isa"] == (isa or record["isa"])
    ]
    return max(found, key=lambda record: ISA_ORDER.index(record["isa"]), default=None)


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured for it; `name` is the peer or unit that counted."""

    bar: Bar
    name: str = ""
    ratio: dict[str, float] | None = None
    ours: float = 0.0
    theirs: float = 0.0

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the bar, or stays below it; None when it was not measured."""
        if self.ratio is None:
            return None
        median = self.ratio["median"]
        return median <= self.bar.required if self.bar.at_most else median >= self.bar.required

    @property
    def open(self) -> bool:
        """The 95 % interval holds the bar itself: a run more could say otherwise."""
        if self.ratio is None:
            return False
        return self.ratio["low"] < self.bar.required <= self.ratio["high"]


def judge(data: dict[str, Any], bar: Bar) -> Verdict:
    """What the results say about one bar."""
    record = find(
        data, bar.what, bar.M, bar.dtype, op=bar.op, shape=bar.shape, isa=bar.isa, onednn=bar.onednn
    )  # fmt: skip
    if record is None:
        return Verdict(bar)
    if bar.is_share:
        memory = bar.against[0] == MEMORY
        names = [name for name in record["limits"] if (name == MEMORY) == memory]
        pool = {name: (record["limits"][name], record["limits"][name]["share"]) for name in names}
    else:
        pool = {
            name: (record["peers"][name], record["peers"][name]["ratio"])
            for name in bar.against
            if name in record["peers"]
        }
    if not pool:
        return Verdict(bar)
    name = min(pool, key=lambda key: pool[key][1]["median"])
    times, ratio = pool[name]
    if bar.at_most:
        ratio = inverse(ratio)
    return Verdict(bar, name, ratio, record["ours"]["median"], times["median"])


def inverse(ratio: dict[str, float]) -> dict[str, float]:
    """How many times the peer's time ours takes, from how many times faster ours is."""
    swapped = {"median": "median", "p10": "p90", "p90": "p10", "low": "high", "high": "low"}
    return {name: 1 / ratio[other] for name, other in swapped.items()}


def verdicts(data: dict[str, Any]) -> list[Verdict]:
    """Every bar, judged."""
    return [judge(data, bar) for bar in BARS]
