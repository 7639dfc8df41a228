"""Every choice of one quickstart run in one immutable object, saved with the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from feinwerk.cli.errors import CommandError

DEFAULT_MODEL = "smollm2"
DEFAULT_DATASET = "construction-faq"
DEFAULT_STEPS = 32
DEFAULT_METHOD = "qlora"
# A leading q: over NF4 weights; the others leave the weights dense.
METHODS = {
    "lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA", "qdora": "QDoRA", "rslora": "rsLoRA",
}  # fmt: skip
DTYPES = ("auto", "bfloat16", "float32")

# They change where or how a run is shown, never its numbers' definition: a resumed run may differ.
FREE_ON_RESUME = frozenset(
    {"output", "threads", "checkpoint_every", "generate", "onnx", "compare", "quiet", "cache"}
)


@dataclass(frozen=True)
class Settings:
    """The options of `feinwerk quickstart`; each is documented where the command declares it."""

    output: str = "feinwerk-quickstart"
    model: str = DEFAULT_MODEL
    dataset: str = DEFAULT_DATASET
    method: str = DEFAULT_METHOD
    steps: int | None = None
    epochs: float | None = None
    seed: int = 0
    learning_rate: float = 1e-3
    rank: int = 16
    lora_alpha: int = 32
    batch_size: int = 8
    max_length: int = 320
    held_out: int = 48
    threads: int = 0
    dtype: str = "auto"
    blocksize: int = 64
    double_quant: bool = True
    state_bits: int = 8
    checkpoint_every: int = 20
    generate: bool = True
    onnx: bool = True
    compare: bool = False
    cache: bool = True
    quiet: bool = False

    @property
    def quantized(self) -> bool:
        """Whether the method holds the decoder's weights in NF4."""
        return self.method.startswith("q")

    @property
    def base_name(self) -> str:
        """What the model without adapter is called."""
        return "NF4 model" if self.quantized else "dense model"

    @property
    def method_name(self) -> str:
        """The method as its authors write it."""
        return METHODS[self.method]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all settings, which are also the options' names."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Build settings from a checkpoint, which may hold names of another version.

        Raises:
            CommandError: if a name is unknown here or missing there.
        """
        known = set(cls.names())
        if set(values) != known:
            odd = ", ".join(sorted(set(values) ^ known))
            raise CommandError(
                f"quickstart: the checkpoint is of another version (it differs in {odd})"
            )
        return cls(**values)

    def resumed_with(self, given: dict[str, Any]) -> Settings:
        """Return these (a checkpoint's) settings with what the user gave on top.

        Args:
            given: the options that were given on the command line.

        Raises:
            CommandError: if an option that decides the numbers has another value.
        """
        merged = self.to_dict()
        for name, value in given.items():
            if name not in FREE_ON_RESUME and value != merged[name]:
                option = "--" + name.replace("_", "-")
                raise CommandError(
                    f"quickstart: {option} must be {merged[name]} as in the checkpoint when "
                    f"resuming, got {value}"
                )
            merged[name] = value
        return Settings(**merged)


def check(settings: Settings) -> None:
    """Check what the option types cannot say.

    Raises:
        CommandError: naming the option and the rule.
    """
    dense = f"--method {settings.method} has no NF4 weights"
    sizes = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    rules: list[tuple[str, str, bool]] = [
        ("method", f"be one of {', '.join(METHODS)}", settings.method in METHODS),
        ("steps", "be at least 1", settings.steps is None or settings.steps >= 1),
        ("epochs", "be above 0", settings.epochs is None or settings.epochs > 0),
        ("epochs", "be left out beside --steps", None in (settings.steps, settings.epochs)),
        ("learning_rate", "be above 0", settings.learning_rate > 0),
        ("rank", "be at least 1", settings.rank >= 1),
        ("lora_alpha", "be above 0", settings.lora_alpha > 0),
        ("batch_size", "be at least 1", settings.batch_size >= 1),
        ("max_length", "be at least 64", settings.max_length >= 64),
        ("held_out", "be at least 2", settings.held_out >= 2),
        ("threads", "be 0 (all cores) or more", settings.threads >= 0),
        ("dtype", f"be one of {', '.join(DTYPES)}", settings.dtype in DTYPES),
        ("state_bits", "be 8, 16 or 32", settings.state_bits in (8, 16, 32)),
        ("blocksize", f"be one of {', '.join(map(str, sizes))}", settings.blocksize in sizes),
        ("blocksize", f"be left out: {dense}", settings.quantized or settings.blocksize == 64),
        ("double_quant", f"be left out: {dense}", settings.quantized or settings.double_quant),
        ("checkpoint_every", "be at least 1", settings.checkpoint_every >= 1),
        ("seed", "be 0 or more", settings.seed >= 0),
    ]
    for name, rule, holds in rules:
        if not holds:
            option = "--" + name.replace("_", "-")
            raise CommandError(f"quickstart: {option} must {rule}, got {getattr(settings, name)}")
