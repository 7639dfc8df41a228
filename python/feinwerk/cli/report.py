"""Writes the quickstart's report: report.md for people, report.json for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from feinwerk.cli.compare import Comparison
from feinwerk.cli.data import Dataset, Encoded
from feinwerk.cli.deployment import Deployment
from feinwerk.cli.evaluation import HeldOut, Interval, choose_for_generation, token_f1
from feinwerk.cli.model import Source
from feinwerk.cli.settings import Settings

REQUIRED_FALL = 0.15


@dataclass(frozen=True)
class Outcome:
    """Everything that the report says, measured or chosen in one run."""

    settings: Settings
    source: Source
    dataset: Dataset
    train_examples: int
    held_out: Sequence[Encoded]
    truncated: int
    steps: int
    trainable: int
    losses: Sequence[float]
    tokens_per_second: float
    before: HeldOut
    after: HeldOut
    generated: Sequence[int]  # indices into held_out of the generated answers
    fall: Interval
    f1_gain: Interval | None
    sizes: Mapping[str, int]
    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    is_full_run: bool
    deployment: Deployment | None = None
    comparison: Comparison | None = None

    @property
    def verdict(self) -> tuple[bool, str]:
        """Whether the run shows what it must, and one sentence that says so."""
        fall, low, high = (100 * v for v in (self.fall.value, self.fall.low, self.fall.high))
        measured = f"held-out loss fell by {fall:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"
        if self.deployment is not None and not self.deployment.matches:
            return False, f"{self.deployment.sentences()[0]}; {measured}"
        if not self.is_full_run:
            return True, f"{measured}; with fewer steps than the default no fall is required"
        if self.fall.low <= 0.0 <= self.fall.high:
            return False, f"the adapter did not learn: {measured}, an interval that includes 0"
        if self.fall.value < REQUIRED_FALL:
            return False, f"the adapter did not learn enough: {measured}, at least 15 % is required"
        return True, f"the adapter learned: {measured}"

    def f1(self, part: HeldOut) -> list[float]:
        """Token F1 of the generated answers."""
        pairs = zip(part.answers, self.generated, strict=True)
        return [token_f1(text, self.held_out[i].example.answer) for text, i in pairs]

    def by_language(self) -> dict[str, tuple[float, float, int]]:
        """Loss before and after, and the number of examples, by language."""
        rows: dict[str, tuple[float, float, int]] = {}
        for language in sorted({e.example.language for e in self.held_out}):
            at = [i for i, e in enumerate(self.held_out) if e.example.language == language]
            tokens = sum(self.before.tokens[i] for i in at)
            losses = [sum(part.nll[i] for i in at) / tokens for part in (self.before, self.after)]
            rows[language] = (losses[0], losses[1], len(at))
        return rows


def write_report(folder: Path, outcome: Outcome) -> Path:
    """Write report.md and report.json into `folder`, each atomically.

    Returns:
        The path of report.md.
    """
    _write(folder / "report.json", json.dumps(_numbers(outcome), indent=2, ensure_ascii=False))
    return _write(folder / "report.md", "\n".join(_lines(outcome)) + "\n")


def _write(path: Path, text: str) -> Path:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _numbers(outcome: Outcome) -> dict[str, Any]:
    passed, sentence = outcome.verdict
    return {
        "passed": passed,
        "verdict": sentence,
        "settings": outcome.settings.to_dict(),
        "steps": outcome.steps,
        "trainable_parameters": outcome.trainable,
        "held_out_loss": {"before": outcome.before.loss, "after": outcome.after.loss},
        "fall": asdict(outcome.fall),
        "token_f1_gain": asdict(outcome.f1_gain) if outcome.f1_gain else None,
        "by_language": outcome.by_language(),
        "training_loss": list(outcome.losses),
        "tokens_per_second": outcome.tokens_per_second,
        "bytes": dict(outcome.sizes),
        "peak_memory_bytes": dict(outcome.memory),
        "seconds": dict(outcome.seconds),
        "machine": dict(outcome.machine),
        "versions": dict(outcome.versions),
        "deployment": outcome.deployment.to_dict() if outcome.deployment else None,
        "comparison": outcome.comparison.to_dict() if outcome.comparison else None,
    }


def _lines(outcome: Outcome) -> list[str]:
    passed, sentence = outcome.verdict
    settings, before, after = outcome.settings, outcome.before, outcome.after
    lines = [
        "# Feinwerk quickstart",
        "",
        f"**{'Passed' if passed else 'Failed'}:** {sentence}.",
        "",
        f"{outcome.source.name} with {outcome.sizes['linears']} Linear layers {_form(settings)}, "
        f"fine-tuned with {settings.method_name} (r = {settings.rank}, {outcome.trainable:,} "
        f"trained values) on {outcome.dataset.name}.",
        "",
        f"| held-out questions | {settings.base_name} | with adapter | change |",
        "|---|---|---|---|",
        f"| loss, nats per answer token | {before.loss:.4f} | {after.loss:.4f} "
        f"| -{100 * outcome.fall.value:.1f} % ({100 * outcome.fall.low:.1f} to "
        f"{100 * outcome.fall.high:.1f} %) |",
        f"| perplexity | {before.perplexity:.2f} | {after.perplexity:.2f} "
        f"| x {after.perplexity / before.perplexity:.3f} |",
    ]
    rows = outcome.by_language()
    if len(rows) > 1:
        for language, (old, new, count) in rows.items():
            fall = 100 * (1 - new / old)
            lines.append(
                f"| loss, {language} ({count} questions) | {old:.4f} | {new:.4f} | -{fall:.1f} % |"
            )
    if outcome.f1_gain is not None:
        old, new = (sum(f) / len(f) for f in (outcome.f1(before), outcome.f1(after)))
        gain = outcome.f1_gain
        lines.append(
            f"| token F1 of {len(outcome.generated)} generated answers | {old:.3f} | {new:.3f} "
            f"| {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) |"
        )
    lines += ["", "![loss curve](loss.png)", ""]
    lines += _samples(outcome)
    lines += _resources(outcome)
    lines += _deployed(outcome.deployment)
    lines += _beside(outcome.comparison)
    lines += _how(outcome)
    return lines


def _form(settings: Settings) -> str:
    if not settings.quantized:
        return "left dense"
    nested = "on" if settings.double_quant else "off"
    return f"held in NF4 (blocksize {settings.blocksize}, double quantization {nested})"


def _samples(outcome: Outcome) -> list[str]:
    if not outcome.generated:
        return []
    lines = ["## Two generated answers", ""]
    lines += ["Greedy decoding; the questions were chosen by position, before any answer.", ""]
    lines += ["| | |", "|---|---|"]
    for number, at in enumerate(sample_positions(len(outcome.generated))):
        example = outcome.held_out[outcome.generated[at]].example
        lines += [
            f"| **question** | **{_cell(example.question)}** |",
            f"| {outcome.settings.base_name} | {_cell(outcome.before.answers[at])} |",
            f"| with adapter | {_cell(outcome.after.answers[at])} |",
            *_from_onnx(outcome, number),
            f"| answer in the data | {_cell(example.answer)} |",
        ]
    return [*lines, ""]


def _from_onnx(outcome: Outcome, number: int) -> list[str]:
    if outcome.deployment is None:
        return []
    return [f"| with adapter, from ONNX Runtime | {_cell(outcome.deployment.answers[number])} |"]


def shown_questions(held_out: Sequence[Encoded], count: int) -> list[int]:
    """Return the indices of the examples whose answers are shown, of `count` generated ones."""
    chosen = choose_for_generation(held_out, count)
    return [chosen[at] for at in sample_positions(len(chosen))]


def sample_positions(count: int) -> list[int]:
    """Return which two of `count` generated answers are shown."""
    return sorted({0, count // 4}) if count else []


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "(empty)"


def _resources(outcome: Outcome) -> list[str]:
    sizes = outcome.sizes
    mib = {name: value / 2**20 for name, value in sizes.items()}
    lines = [
        "## Size, memory, time",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| the {sizes['linears']} Linear weights | {mib['linears_before']:.1f} MiB "
        f"| {mib['linears_after']:.1f} MiB |",
        f"| the whole model | {mib['model_before']:.1f} MiB | {mib['model_after']:.1f} MiB |",
        "",
        "Before: fp32. After: the Linears in NF4, the rest in the dtype of the activations."
        if outcome.settings.quantized
        else "Before: fp32. After: the dtype of the activations.",
        "",
        "| phase | seconds | peak resident memory |",
        "|---|---|---|",
    ]
    for title, seconds in outcome.seconds.items():
        peak = outcome.memory.get(title)
        shown = f"{peak / 2**20:,.0f} MiB" if peak else ""
        lines.append(f"| {title} | {seconds:.1f} | {shown} |")
    lines.append(f"| **total** | **{sum(outcome.seconds.values()):.1f}** | |")
    lines += ["", f"Training: {outcome.tokens_per_second:,.0f} tokens/s (padding not counted).", ""]
    return lines


def _deployed(deployment: Deployment | None) -> list[str]:
    if deployment is None:
        return []
    slowest = min(side.tokens_per_second for side in deployment.sides)
    lines = [
        "## In ONNX Runtime",
        "",
        "| one text, token by token | MiB | tokens/s | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {side.name} | {side.bytes / 2**20:,.1f} | {side.tokens_per_second:.1f} "
        f"| x {side.tokens_per_second / slowest:.1f} |"
        for side in deployment.sides
    ]
    return [
        *lines,
        "",
        f"{deployment.sentences()[0]}.",
        "",
        "fp32 activations. MiB: the .onnx file with its data, or the tensors of the torch model. "
        "Dense: the adapter is merged into dequantized weights; MatMulBnb4: ONNX Runtime's own NF4 "
        "operator, the adapter in MatMuls; Feinwerk: `onnx/model.onnx`, whose adapter can be "
        f"exchanged. In turn, a few tokens each; the median of {len(deployment.sides[0].seconds)} "
        "tokens. Logits: of a prompt's last and its answer's first positions, against fp64.",
        "",
    ]


def _beside(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return []
    ours, theirs, ratio = comparison.ours, comparison.theirs, comparison.ratio
    memory = [side.peak / 2**20 for side in (ours, theirs)]
    grown = [(side.peak - side.resident) / 2**20 for side in (ours, theirs)]
    return [
        f"## Beside {comparison.peer}",
        "",
        f"| training | feinwerk | {comparison.peer} | |",
        "|---|---|---|---|",
        f"| seconds per step, median of {len(ours.seconds)} | {ours.step:.3g} | {theirs.step:.3g} "
        f"| {ratio.median:.2f}x as fast (95 % interval {ratio.low:.2f} to {ratio.high:.2f}; 10 to "
        f"90 % of the steps: {ratio.p10:.2f} to {ratio.p90:.2f}) |",
        f"| peak resident memory | {memory[0]:,.0f} MiB | {memory[1]:,.0f} MiB "
        f"| {memory[0] - memory[1]:+,.0f} MiB |",
        f"| of it, grown in training steps | {grown[0]:,.0f} MiB | {grown[1]:,.0f} MiB "
        f"| x {grown[0] / max(grown[1], 1e-9):.2f} |",
        "",
        "![time and memory](comparison.png)",
        "",
        "Both sides began with the same weights and adapters (fp32, PEFT's default) and trained "
        "the same batches in turn, the first of each pair changing; a ratio is of one step. Their "
        f"losses of the same step differ by at most {100 * comparison.loss_difference:.2g} %. "
        "Memory: each side alone in a fresh process, on the widest of these batches.",
        "",
    ]


def _how(outcome: Outcome) -> list[str]:
    settings, dataset = outcome.settings, outcome.dataset
    groups = len({e.example.group for e in outcome.held_out})
    lines = ["## How it was measured", ""]
    lines += [
        f"- Baseline: the {settings.base_name} without adapter. {outcome.train_examples} training "
        f"examples; {len(outcome.held_out)} held-out ones of {groups} questions. A question, its "
        "translation and its repetitions are always on the same side of the split, which is the "
        "same for every seed.",
        "- Loss: over the tokens of the answers only; the questions are not learned.",
        "- Interval: 10,000 paired bootstrap resamples of whole questions.",
        "- Token F1: shared words of generated and true answer, as in SQuAD. It rewards the right "
        "words and the right length alike, so part of a gain is style.",
    ]
    if outcome.truncated:
        lines.append(f"- {outcome.truncated} answers were cut to --max-length.")
    lines += ["", "## Settings", "", "| option | value |", "|---|---|"]
    for name, value in {**settings.to_dict(), "steps": outcome.steps}.items():
        lines.append(f"| {name} | {value} |")
    lines += ["", "## Machine and versions", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in outcome.machine.items()]
    lines += [f"| {name} | {value} |" for name, value in outcome.versions.items()]
    lines += [
        "",
        "## Model and data",
        "",
        f"- Model: {outcome.source.name}, {outcome.source.licence}.",
        f"- Data: {dataset.source}. Licence: {dataset.licence}. {dataset.attribution}".rstrip(),
        "",
        "## The adapter",
        "",
        "`adapter/` is in PEFT's own format and loads with stock PEFT:",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "adapter")',
        "```",
        "",
        "`base_model` is the model above"
        + (
            "; `feinwerk.quantize_model(base_model)` before this line gives the model that was "
            "trained, and `feinwerk.integrations.peft.fuse(model)` after it the fused ops."
            if settings.quantized
            else "; `feinwerk.integrations.peft.fuse(model)` after this line gives the fused ops."
        ),
    ]
    return lines
