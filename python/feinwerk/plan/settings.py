"""Settings: everything a plan depends on beside the model, and the checks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from feinwerk import _checks
from feinwerk.codebook import BLOCKSIZES
from feinwerk.plan.architecture import OP, Architecture

METHODS = {
    "full": "all parameters", "lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA",
    "qlora": "QLoRA", "qdora": "QDoRA",
}  # fmt: skip
DTYPES = {"bfloat16": 2, "float32": 4}
ATTENTIONS = ("sdpa", "eager")
BACKENDS = ("cpu", "cuda")
ALL_LINEAR = "all-linear"
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Settings:
    """One way to fine-tune a model; `feinwerk.plan` documents every field."""

    method: str = "qlora"
    r: int = 16
    targets: str | tuple[str, ...] = ALL_LINEAR
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    batch: int = 1
    seq: int = 2048
    world_size: int = 1
    stage: int = 0
    rank: int = 0
    state_bits: int = 8
    blocksize: int = 256
    min_quantized_numel: int = 4096
    bf16_params: str = "remainder"
    nf4_blocksize: int = 64
    double_quant: bool = True
    attention: str = "sdpa"
    checkpointing: bool = False
    accumulate: bool = False
    dropout: float = 0.0
    bucket_mb: float = 25.0
    device: str = "cpu"

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, and not the model's own parameters."""
        return self.method != "full"

    @property
    def quantized(self) -> bool:
        """Whether the layers' weights are in NF4."""
        return self.method.startswith("q")

    @property
    def dora(self) -> bool:
        """Whether adapters have a magnitude."""
        return self.method.endswith("dora")

    @property
    def tokens(self) -> int:
        """Rows of every activation."""
        return self.batch * self.seq

    @property
    def size(self) -> int:
        """Bytes an element of dense weights and activations."""
        return DTYPES[self.dtype]

    @property
    def group(self) -> dict[str, Any]:
        """The options of the optimizer that decide the tensors of a state."""
        return {
            "state_bits": self.state_bits, "blocksize": self.blocksize, "layout": "rows",
            "min_quantized_numel": self.min_quantized_numel, "bf16_params": self.bf16_params,
        }  # fmt: skip

    def targeted(self, model: Architecture) -> frozenset[str]:
        """The names of the Linears of a layer that have an adapter."""
        if not self.adapted:
            return frozenset()
        if isinstance(self.targets, str):
            return frozenset(linear.name for linear in model.linears)
        return frozenset(self.targets)


def check(settings: Settings, model: Architecture) -> None:
    """Reject settings that break their rule, one by one.

    Raises:
        TypeError: if a number is none.
        ValueError: if a value is not allowed.
    """
    for name, least in (
        ("r", 1), ("batch", 1), ("seq", 1), ("world_size", 1), ("rank", 0), ("blocksize", 1),
        ("min_quantized_numel", 1),
    ):  # fmt: skip
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int):
            _checks.reject(TypeError, OP, name, "be a whole number", repr(value))
        if value < least:
            _checks.reject(ValueError, OP, name, f"be at least {least}", value)
    for name, choices in (
        ("method", tuple(METHODS)), ("dtype", tuple(DTYPES)), ("adapter_dtype", tuple(DTYPES)),
        ("stage", STAGES), ("state_bits", (8, 16, 32)),
        ("bf16_params", ("remainder", "stochastic")),
        ("attention", ATTENTIONS), ("device", BACKENDS), ("nf4_blocksize", BLOCKSIZES),
    ):  # fmt: skip
        value = getattr(settings, name)
        if value not in choices:
            rule = f"be one of {', '.join(map(str, choices))}"
            _checks.reject(ValueError, OP, name, rule, repr(value))
    rules: list[tuple[str, str, Callable[[Any], bool]]] = [
        ("dropout", "be at least 0 and below 1", lambda p: 0 <= p < 1),
        ("bucket_mb", "be above 0", lambda mb: mb > 0),
        ("stage", "be 0 for one rank", lambda n: n == 0 or settings.world_size > 1),
        ("rank", f"be below world_size = {settings.world_size}", lambda n: n < settings.world_size),
    ]
    for name, rule, holds in rules:
        if not holds(getattr(settings, name)):
            _checks.reject(ValueError, OP, name, rule, getattr(settings, name))
    names = [linear.name for linear in model.linears]
    if isinstance(settings.targets, str):
        wrong = [settings.targets] if settings.targets != ALL_LINEAR else []
    else:
        wrong = [name for name in settings.targets if name not in names]
    if wrong or not settings.targets:
        rule = f"be {ALL_LINEAR} or some of {', '.join(names)}"
        _checks.reject(ValueError, OP, "targets", rule, ", ".join(wrong) or "none")
