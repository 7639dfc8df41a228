"""What is timed, and the bars: a list that the report judges and the parts walk through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

COPY = "copy bandwidth"  # a share of the measured copy bandwidth
WORKSPACE = "workspace MB"  # what a call holds beside inputs and outputs, at most

DENSE = "dense bf16 F.linear"
UNFUSED = "dequantize, F.linear"
BNB = "bitsandbytes"
PEFT, PEFT_HALF = "PEFT", "PEFT, bf16 adapters"
BASE, LORA = "frozen base", "our LoRA"
FUSED = "torch fused fp32"


@dataclass(frozen=True)
class Bar:
    """One requirement of a case.

    Args:
        against: a peer, COPY or WORKSPACE.
        required: how many times faster than the peer at least, the share at least, or megabytes.
        at_most: `required` is how many times the peer's time ours may take.
    """

    against: str
    required: float
    at_most: bool = False

    @property
    def words(self) -> str:
        """The requirement as text."""
        if self.against == COPY:
            return f">= {100 * self.required:g} %"
        if self.against == WORKSPACE:
            return f"<= {self.required:g} MB"
        return f"{'<=' if self.at_most else '>='} {self.required:g}x"


@dataclass(frozen=True)
class Case:
    """One thing that is timed.

    Args:
        part: the process that times it.
        op: the op; its speed is not claimed where its correctness failed.
        what: of the op, in words.
        N: rows of the weight; elements where there is no weight.
        K: columns of the weight.
        M: rows of x.
        bars: what it has to reach.
        peers: what it is compared with for information, beside those of the bars.
    """

    part: str
    op: str
    what: str
    N: int = 0
    K: int = 0
    M: int = 0
    bars: tuple[Bar, ...] = field(default=())
    peers: tuple[str, ...] = field(default=())

    @property
    def key(self) -> str:
        """The case's name in the results file."""
        size = f" {self.N}x{self.K}" if self.K else f" {self.N}" if self.N else ""
        return f"{self.op} {self.what}{size}" + (f" M={self.M}" if self.M else "")

    def wants(self, peer: str) -> bool:
        """Whether a peer is to be timed beside it."""
        return peer in self.peers or any(bar.against == peer for bar in self.bars)

    def sizes(self, dry: bool) -> tuple[int, int, int]:
        """(N, K, M), tiny for a dry run."""
        if not dry:
            return self.N, self.K, self.M
        square = self.N == self.K
        return min(self.N, 64 if square else 96), min(self.K, 64), min(self.M, 20)


def _linear() -> Iterator[Case]:
    op = "nf4_linear"
    for N, K in ((14336, 4096), (8192, 8192)):
        for M, faster in ((1, 2.8), (4, 2.2), (16, 1.5)):
            bars = [Bar(DENSE, faster)]
            bars += [Bar(COPY, 0.7)] if M == 1 else []
            bars += [Bar(BNB, 1.0)] if M != 4 else []
            yield Case("decode", op, "forward", N, K, M, tuple(bars), (BNB,))
    for N, K in ((4096, 4096), (14336, 4096)):
        for M in (64, 128, 256):
            bars = [Bar(UNFUSED, 1.0), Bar(BNB, 1.0)]
            yield Case("middle", op, "forward", N, K, M, tuple(bars), (DENSE,))
    for N, K in ((4096, 4096), (14336, 4096)):
        for M, share in ((2048, 0.9), (8192, 0.95)):
            bars = [Bar(DENSE, share), Bar(WORKSPACE, 64)]
            yield Case("large", op, "forward", N, K, M, tuple(bars), (UNFUSED,))
            yield Case("large", "nf4_linear_backward", "dX", N, K, M, tuple(bars))
        yield Case("large", op, "forward", N, K, 4096, (Bar(BNB, 1.0),), (DENSE,))


def _memory() -> Iterator[Case]:
    for N, K in ((14336, 4096), (8192, 8192)):
        yield Case("memory", "nf4_dequantize", "to bf16", N, K, 0, (Bar(COPY, 0.8),), (BNB,))
    yield Case("memory", "nf4_quantize", "from bf16", 14336, 4096, peers=(BNB,))
    yield Case("memory", "nf4_embedding", "to bf16", 32768, 4096, 8192)
    yield Case("memory", "blockwise_quantize", "rule cuda", 64 << 20)
    yield Case("memory", "blockwise_dequantize", "to fp32", 64 << 20)


def _adapters() -> Iterator[Case]:
    size = (4096, 4096, 4096)
    op = "lora_linear"
    faster = (Bar(PEFT, 1.25), Bar(BASE, 1.08, at_most=True))
    yield Case("lora", op, "LoRA step over NF4", *size, faster, (PEFT_HALF,))
    yield Case("lora", op, "LoRA step over dense bf16", *size, faster, (PEFT_HALF,))
    yield Case("lora", op, "LoRA step over NF4, dropout 0.1", *size, peers=(LORA,))
    dora = (Bar(PEFT, 3.0), Bar(LORA, 1.1, at_most=True))
    yield Case("dora", op, "DoRA step over NF4", *size, dora, (PEFT_HALF,))
    yield Case("dora", op, "DoRA step over dense bf16", *size, dora, (PEFT_HALF,))
    yield Case("dora", op, "8 grouped LoRA, step over NF4", *size, peers=(LORA,))
    yield Case("dora", "weight_norm", "r=16 over NF4", 4096, 4096, peers=())


def _optimizer() -> Iterator[Case]:
    count = 100 << 20
    fast = (Bar(FUSED, 1.3), Bar(COPY, 0.8))
    yield Case("optimizer", "adamw_step", "8-bit states", count, bars=fast)
    yield Case("optimizer", "adamw_step", "32-bit states", count, peers=(FUSED,))
    yield Case("optimizer", "adamw_step", "8-bit states, bf16 at random", count, peers=(FUSED,))
    yield Case("optimizer", "square_sum", "fp32", count)


CASES: tuple[Case, ...] = (*_linear(), *_memory(), *_adapters(), *_optimizer())
# Part: the module whose function of that name measures one case.
PARTS = {
    "decode": "benchmarks.gpu.speed_linear",
    "memory": "benchmarks.gpu.speed_memory",
    "large": "benchmarks.gpu.speed_linear",
    "middle": "benchmarks.gpu.speed_linear",
    "lora": "benchmarks.gpu.speed_adapters",
    "optimizer": "benchmarks.gpu.speed_optimizer",
    "dora": "benchmarks.gpu.speed_adapters",
}
