"""Which cases run: the matrix of ops, shapes, rows, dtypes, threads and instruction sets.

Three levels: `quick` measures what the bars of docs/benchmarks.md need, `default` adds the matrix
that the tables show, `full` is the whole product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

LEVELS = ("quick", "default", "full")
MAIN_SHAPE = (4096, 4096)
SHAPES = (MAIN_SHAPE, (14336, 4096), (4096, 14336), (576, 1536))
ROWS = (1, 4, 16, 64, 256, 512)
EMBEDDINGS = ((49152, 576), MAIN_SHAPE)
PROJECTIONS = (MAIN_SHAPE, (2048, 2048), (8192, 2048), (2048, 8192))  # and of a 1 B model
NORM_SHAPE = (3072, 8192)
ADAPTERS, ADAPTED_ROWS = 32, 512  # of a batch with many adapters
OPS = (
    "nf4_linear", "nf4_quantize", "nf4_dequantize", "nf4_embedding", "blockwise",
    "lora_linear", "grouped_lora_linear", "weight_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """How one process is set up; each gets its own, as none of it can change at run time.

    Args:
        threads: for torch, OpenMP and ONNX Runtime alike.
        isa: of Feinwerk's kernels, empty for the best one.
        onednn: the most that oneDNN (dense bf16) may use, empty for all.
    """

    threads: int = 2
    isa: str = ""
    onednn: str = ""

    def environment(self) -> dict[str, str]:
        """Environment variables that make it so."""
        values = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        if self.isa:
            values["FEINWERK_ISA"] = self.isa
        if self.onednn:
            values["ONEDNN_MAX_CPU_ISA"] = self.onednn
        return values

    def __str__(self) -> str:
        words = [f"{self.threads} thread{'s' if self.threads > 1 else ''}", self.isa or "best"]
        return ", ".join([*words, f"oneDNN up to {self.onednn}"] if self.onednn else words)


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    Args:
        op: the benchmark file's op.
        what: which of its operations: forward, dX, int8 forward, LoRA forward+backward ...
        N: rows of the weight (elements for block-wise ops).
        K: columns of the weight, 1 for block-wise ops.
        M: rows of x or number of indices, 0 where there are none.
        dtype: fp32, bf16 or fp16.
        cold: weights rotate through copies beyond the cache.
        bar: belongs to the quick level.
        peers: all of them, or only dense and bitsandbytes.
    """

    op: str
    what: str
    N: int
    K: int
    M: int
    dtype: str
    cold: bool = True
    bar: bool = False
    peers: str = "all"

    def key(self, configuration: Configuration, isa: str) -> str:
        """The name of its record; the same case measured again replaces it."""
        return "/".join(
            (
                self.op, self.what, f"{self.N}x{self.K}", f"M{self.M}", self.dtype,
                "cold" if self.cold else "warm", f"{configuration.threads}T", isa or "reference",
                *((f"onednn-{configuration.onednn.lower()}",) if configuration.onednn else ()),
            )
        )  # fmt: skip

    def as_dict(self) -> dict[str, object]:
        """What it says about itself in its record."""
        hidden = ("bar", "peers")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}

    def __str__(self) -> str:
        rows = f" M={self.M}" if self.M else ""
        warm = "" if self.cold else " warm"
        return f"{self.op} {self.what} {self.N}x{self.K}{rows} {self.dtype}{warm}"


def configurations(
    level: str, isa: str, threads: str, cpu_features: list[str]
) -> list[Configuration]:
    """The processes of a run; `isa` and `threads` as the user gave them, empty for the usual."""
    counts = [int(threads)] if threads else ([2] if level == "quick" else [2, 1])
    if isa:
        return [Configuration(count, isa) for count in counts]
    result = [Configuration(count) for count in counts]
    if "amx_bf16" in cpu_features:
        result.append(Configuration(counts[0], "avx512_bf16", "AVX512_CORE_BF16"))
    if "avx512f" in cpu_features:
        result.append(Configuration(counts[0], "avx2"))
    return result


def _linear(level: str, configuration: Configuration, forced: bool) -> Iterator[Case]:
    op, best = "nf4_linear", not configuration.isa or forced
    if configuration.onednn and not forced:  # the comparison without AMX
        for what in ("forward", "dX"):
            for M in (1, 16, 64, 512) if what == "forward" else (64, 512):
                yield Case(op, what, *MAIN_SHAPE, M, "bf16", bar=M >= 64, peers="few")
        return
    if not best:  # AVX2 beside dense fp32
        for M in (1, 64, 256, 512):
            yield Case(op, "forward", *MAIN_SHAPE, M, "fp32", bar=True, peers="few")
        for M in (64, 512):
            yield Case(op, "dX", *MAIN_SHAPE, M, "fp32", peers="few")
        return
    main, everything = configuration.threads > 1 or forced, level == "full"
    for dtype in ("bf16", "fp32"):
        for M in ROWS:
            bar = M == 1 or (M >= 16 if dtype == "fp32" else M in (64, 512))
            if main or everything or M != 256:
                yield Case(op, "forward", *MAIN_SHAPE, M, dtype, bar=bar and main)
                if M >= 16 or everything:
                    yield Case(op, "dX", *MAIN_SHAPE, M, dtype, bar=bar and main)
        yield Case(op, "forward", *MAIN_SHAPE, 1, dtype, cold=False, bar=main)
    for M in (1, 4):
        yield Case(op, "int8 forward", *MAIN_SHAPE, M, "fp32", bar=main and M == 1)
    yield Case(op, "int8 forward", *MAIN_SHAPE, 1, "bf16")
    yield Case(op, "int8 forward", *MAIN_SHAPE, 1, "fp32", cold=False, bar=main)
    for M in (1, 64):
        yield Case(op, "forward", *MAIN_SHAPE, M, "fp16")
    for shape in SHAPES[1:]:
        for dtype in ("bf16", "fp32"):
            for M in ROWS if main or everything else (1, 64):
                peers = "all" if everything or M == 1 or shape == SHAPES[-1] else "few"
                yield Case(op, "forward", *shape, M, dtype, peers=peers)
            for M in ROWS if everything else ((64, 512) if main else (64,)):
                yield Case(op, "dX", *shape, M, dtype, peers="few")


def _others(op: str, configuration: Configuration) -> Iterator[Case]:
    main = configuration.threads > 1
    if op == "nf4_quantize":
        for shape in SHAPES if main else (MAIN_SHAPE,):
            for dtype in ("fp32", "bf16"):
                bar = main and shape == MAIN_SHAPE and dtype == "fp32"
                yield Case(op, "quantize nested", *shape, 0, dtype, bar=bar)
    elif op == "nf4_dequantize":
        for shape in SHAPES if main else (MAIN_SHAPE,):
            for dtype in ("bf16", "fp32"):
                bar = main and shape == MAIN_SHAPE and dtype == "bf16"
                yield Case(op, "dequantize nested", *shape, 0, dtype, bar=bar)
    elif op == "nf4_embedding":
        for shape in EMBEDDINGS:
            for M in (1, 512):
                yield Case(op, "lookup", *shape, M, "bf16")
    else:
        for what in ("quantize centered", "dequantize"):
            yield Case(op, what, 262144, 1, 0, "fp32")


def _adapted(op: str, level: str, configuration: Configuration) -> Iterator[Case]:
    if configuration.threads == 1 and level != "full":
        return
    if op == "weight_norm":
        for what in ("norm over NF4", "norm over fp32"):
            yield Case(op, what, *NORM_SHAPE, 0, "fp32", bar=True)
        return
    for dtype in ("fp32", "bf16"):
        if op == "grouped_lora_linear":
            for what in ("forward", "forward+backward"):
                yield Case(op, what, *MAIN_SHAPE, ADAPTED_ROWS, dtype, bar=True)
            continue
        for shape in PROJECTIONS:
            yield Case(op, "LoRA forward+backward", *shape, 512, dtype, bar=True)
            for M in (64, 512):
                yield Case(op, "DoRA forward+backward", *shape, M, dtype, bar=True)
            yield Case(op, "LoRA forward", *shape, 1, dtype, bar=True)
        yield Case(op, "LoRA forward+backward", *MAIN_SHAPE, 64, dtype)
        yield Case(op, "DoRA forward", *MAIN_SHAPE, 1, dtype)


def cases(
    op: str,
    level: str,
    configuration: Configuration,
    shape: tuple[int, int] | None = None,
    forced: bool = False,
) -> list[Case]:
    """The cases of one op in one process.

    Args:
        op: one of OPS.
        level: one of LEVELS.
        configuration: of the process.
        shape: only this (N, K).
        forced: the user named the ISA, so it runs everything and not only its bars.
    """
    if op not in OPS:
        raise ValueError(f"cases: op must be one of {', '.join(OPS)}, got {op!r}")
    if op == "nf4_linear":
        found = list(_linear(level, configuration, forced))
    elif (configuration.isa or configuration.onednn) and not forced:
        found = []
    elif op in ("lora_linear", "grouped_lora_linear", "weight_norm"):
        found = list(_adapted(op, level, configuration))
    else:
        found = list(_others(op, configuration))
    if shape is not None:
        known = [case for case in found if shape == (case.N, case.K)]
        if not known and op != "blockwise":  # a shape of the user's own: what the first one has
            first = found[:1] and (found[0].N, found[0].K)
            known = [
                replace(case, N=shape[0], K=shape[1], bar=False)
                for case in found
                if first == (case.N, case.K)
            ]
        found = known
    return [case for case in found if case.bar] if level == "quick" else found
