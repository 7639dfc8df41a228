"""The quickstart from loading to report: the order of its phases and what is said about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from feinwerk.cli import (
    checkpoint,
    compare,
    data,
    deployment,
    evaluation,
    machine,
    model,
    report,
    training,
)
from feinwerk.cli.console import Display
from feinwerk.cli.errors import CommandError, require
from feinwerk.cli.evaluation import HeldOut
from feinwerk.cli.settings import DEFAULT_STEPS, Settings

# Generated answers of both evaluations, and the most tokens of each: about as long as the data's.
GENERATED = 16
NEW_TOKENS = 80
INTERRUPTED = 130


class Quickstart:
    """One run: load, quantize, measure, train, measure, report."""

    def __init__(self, settings: Settings, display: Display) -> None:
        """Prepare a run; nothing is loaded yet."""
        self.settings = settings
        self.display = display
        self.folder = Path(settings.output)
        self.memory: dict[str, int] = {}

    def run(self, saved: dict[str, Any] | None = None) -> report.Outcome:
        """Run all phases.

        Args:
            saved: the checkpoint to go on from; None starts a new run.

        Returns:
            What the report says.

        Raises:
            CommandError: if anything stops the run; after Ctrl-C in training with status 130.
        """
        settings = self.settings
        torch.set_num_threads(settings.threads or machine.available_cores())
        source = model.find_model(settings.model)
        dataset = data.load_dataset(settings.dataset)
        self._prepare_folder(saved)
        base, tokenizer, sizes = self._load_and_quantize(source)
        train, held_out, truncated = self._encode(dataset, tokenizer)
        fingerprint = data.fingerprint(train, held_out)
        if saved is not None and saved["data"] != fingerprint:
            raise CommandError("quickstart: --resume needs the data that the run began with")

        chosen = evaluation.choose_for_generation(held_out, GENERATED) if settings.generate else []
        before = HeldOut.from_dict(saved["before"]) if saved else None
        if before is None or len(before.answers) != len(chosen):
            title = f"evaluating the {settings.base_name}"
            before = self._measure(title, base, tokenizer, held_out, chosen)
        self._say_loss("before", before)

        adapted = model.attach_adapters(base, settings, source)
        steps = self._steps(len(train))
        trainer = training.Trainer(adapted, train, settings, steps)
        if saved is not None:
            trainer.load_state_dict(saved["trainer"])
        self._train(trainer, {"data": fingerprint, "before": before.to_dict()})

        after = self._measure("evaluating with adapter", adapted, tokenizer, held_out, chosen)
        self._say_loss("after", after)
        groups = [item.example.group for item in held_out]
        outcome = report.Outcome(
            settings=settings,
            source=source,
            dataset=dataset,
            train_examples=len(train),
            held_out=held_out,
            truncated=truncated,
            steps=trainer.steps,
            trainable=trainer.trainable,
            losses=trainer.losses,
            tokens_per_second=sum(trainer.tokens) / max(trainer.seconds, 1e-9),
            before=before,
            after=after,
            generated=chosen,
            fall=evaluation.paired_fall(before, after, groups, settings.seed),
            f1_gain=self._f1_gain(before, after, held_out, chosen),
            sizes=sizes,
            memory=self.memory,
            seconds=self.display.seconds,
            machine=machine.describe_machine(),
            versions=machine.versions(),
            is_full_run=trainer.steps >= DEFAULT_STEPS,
        )
        self._write(outcome, adapted)
        if settings.onnx:
            outcome = replace(outcome, deployment=self._deploy(adapted, tokenizer, held_out))
            outcome = replace(outcome, memory=self.memory, seconds=self.display.seconds)
            report.write_report(self.folder, outcome)
        if settings.compare:
            outcome = replace(outcome, comparison=self._compare(trainer, source))
            report.write_report(self.folder, outcome)
        return outcome

    def _prepare_folder(self, saved: dict[str, Any] | None) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"quickstart: --output must be a folder: {error}") from error
        path = self.folder / checkpoint.FILE_NAME
        if saved is None and path.exists():
            self.display.line(f"starting over: {path} will be replaced (--resume would go on)")

    def _load_and_quantize(self, source: model.Source) -> tuple[Any, Any, dict[str, int]]:
        settings = self.settings
        with self.display.phase("loading libraries"):
            for package in ("transformers", "peft", "safetensors", "matplotlib"):
                require(package, command="feinwerk quickstart")
            if settings.compare and settings.quantized:
                command = f"feinwerk quickstart --method {settings.method} --compare"
                require("bitsandbytes", command=command, install="pip install bitsandbytes")
            model.quiet_libraries()
        title = "loading the model"
        if not model.is_cached(source):
            title += " (converting the GGUF file, about half a minute, once)"
        with self.display.phase(title):
            machine.reset_peak_memory()
            base, tokenizer = model.load_model(source, cache=settings.cache)
            self.memory[title] = machine.peak_memory()
        title = "quantizing to NF4" if settings.quantized else "casting the weights"
        with self.display.phase(title, total=1) as bar:
            machine.reset_peak_memory()

            def show(done: int, total: int, name: str) -> None:
                bar.total(total)
                bar.update(done, name.removeprefix("model."))

            sizes = model.hold(base, settings, show)
            self.memory[title] = machine.peak_memory()
        mib = {name: size / 2**20 for name, size in sizes.items()}
        dtype = str(model.resolve_dtype(settings.dtype)).removeprefix("torch.")
        self.display.line(
            f"{sizes['linears']} Linear layers in {'NF4' if settings.quantized else dtype}: "
            f"{mib['linears_before']:.0f} -> {mib['linears_after']:.0f} MiB; whole model "
            f"{mib['model_before']:.0f} -> {mib['model_after']:.0f} MiB; peak memory of the "
            f"process {self.memory[title] / 2**20:.0f} MiB; activations {dtype}"
        )
        return base, tokenizer, sizes

    def _encode(
        self, dataset: data.Dataset, tokenizer: Any
    ) -> tuple[list[data.Encoded], list[data.Encoded], int]:
        settings = self.settings
        train, held_out = (
            data.encode(tokenizer, part, settings.max_length)
            for part in data.split(dataset.examples, settings.held_out)
        )
        if not train or not held_out:
            raise CommandError("quickstart: --max-length must leave examples, all are too long")
        truncated = sum(item.truncated for item in (*train, *held_out))
        self.display.line(
            f"{dataset.name}: {len(train)} training and {len(held_out)} held-out examples "
            f"({truncated} cut to {settings.max_length} tokens)"
        )
        return train, held_out, truncated

    def _steps(self, examples: int) -> int:
        settings = self.settings
        if settings.steps is not None:
            return settings.steps
        if settings.epochs is not None:
            return max(1, math.ceil(settings.epochs * math.ceil(examples / settings.batch_size)))
        return DEFAULT_STEPS

    def _measure(
        self,
        title: str,
        tested: Any,
        tokenizer: Any,
        held_out: Sequence[data.Encoded],
        chosen: Sequence[int],
    ) -> HeldOut:
        with self.display.phase(title, total=len(held_out) + len(chosen)) as bar:
            machine.reset_peak_memory()
            nll, tokens = evaluation.held_out_nll(tested, held_out, bar.advance)
            answers: tuple[str, ...] = ()
            if chosen:
                answers = evaluation.generate_answers(
                    tested,
                    tokenizer,
                    [held_out[i] for i in chosen],
                    new_tokens=NEW_TOKENS,
                    on_batch=bar.advance,
                )
            self.memory[title] = machine.peak_memory()
        return HeldOut(nll, tokens, answers)

    def _train(self, trainer: training.Trainer, fixed: dict[str, Any]) -> None:
        def save() -> None:
            checkpoint.save(
                self.folder,
                {
                    "step": trainer.step,
                    "settings": self.settings.to_dict(),
                    "trainer": trainer.state_dict(),
                    **fixed,
                },
            )

        save()
        first = trainer.step
        with (
            training.StopRequest() as stop,
            self.display.phase("training", total=trainer.steps) as bar,
        ):
            machine.reset_peak_memory()
            bar.update(first)

            def show(step: training.StepReport) -> None:
                recent = trainer.losses[-10:]
                speed = sum(trainer.tokens) / trainer.seconds
                bar.update(
                    step.step, f"loss {sum(recent) / len(recent):.3f}  {speed:,.0f} tokens/s"
                )

            finished = trainer.run(on_step=show, save=save, stop=stop)
            self.memory["training"] = machine.peak_memory()
        if not finished:
            raise CommandError(
                f"stopped after step {trainer.step} of {trainer.steps}; the checkpoint is "
                f"{self.folder / checkpoint.FILE_NAME}; go on with: "
                f"feinwerk quickstart --resume --output {self.folder}",
                status=INTERRUPTED,
            )

    def _f1_gain(
        self,
        before: HeldOut,
        after: HeldOut,
        held_out: Sequence[data.Encoded],
        chosen: Sequence[int],
    ) -> evaluation.Interval | None:
        if not chosen:
            return None
        scores = [
            [
                evaluation.token_f1(text, held_out[i].example.answer)
                for text, i in zip(part.answers, chosen, strict=True)
            ]
            for part in (before, after)
        ]
        groups = [held_out[i].example.group for i in chosen]
        return evaluation.paired_gain(scores[0], scores[1], groups, self.settings.seed)

    def _write(self, outcome: report.Outcome, adapted: Any) -> None:
        from feinwerk.cli.plot import draw_loss_curve

        with self.display.phase("writing adapter and report"):
            # No look at the embeddings on the hub: LoRA leaves them as they are.
            adapted.save_pretrained(self.folder / "adapter", save_embedding_layers=False)
            draw_loss_curve(
                self.folder / "loss.png",
                outcome.losses,
                outcome.before.loss,
                outcome.after.loss,
                title=f"Held-out loss falls by {100 * outcome.fall.value:.1f} %",
                subtitle=f"{outcome.source.name.rsplit('/', 1)[-1]}, "
                f"{outcome.settings.method_name} r = {outcome.settings.rank} · "
                f"{outcome.dataset.name} · {outcome.machine['cores used']} threads, "
                f"{outcome.machine['processor']}",
            )
        report.write_report(self.folder, outcome)

    def _deploy(
        self, adapted: Any, tokenizer: Any, held_out: Sequence[data.Encoded]
    ) -> deployment.Deployment | None:
        """Let ONNX Runtime answer the questions that the report shows."""
        machine.reset_peak_memory()
        result = deployment.run(
            adapted,
            tokenizer,
            [held_out[i] for i in report.shown_questions(held_out, GENERATED)],
            self.settings,
            self.display,
            new_tokens=NEW_TOKENS,
        )
        if result is not None:
            self.memory[deployment.TITLE] = machine.peak_memory()
            for sentence in result.sentences():
                self.display.line(sentence)
        return result

    def _compare(self, trainer: training.Trainer, source: model.Source) -> compare.Comparison:
        """Train on with stock PEFT beside ours; the trained adapter is on disk already."""
        from feinwerk.cli.plot import draw_comparison

        result = compare.run(trainer, self.settings, source, self.display)
        draw_comparison(self.folder / "comparison.png", result, self.settings.method_name)
        for sentence in result.sentences():
            self.display.line(sentence)
        return result

    def _say_loss(self, when: str, part: HeldOut) -> None:
        self.display.line(
            f"held-out loss {when}: {part.loss:.4f} nats per token "
            f"(perplexity {part.perplexity:.1f})"
        )


def show_outcome(outcome: report.Outcome, folder: Path, display: Display) -> None:
    """Print the samples, the numbers and where the files are."""
    for number, at in enumerate(report.sample_positions(len(outcome.generated))):
        example = outcome.held_out[outcome.generated[at]].example
        display.line("")
        display.line(f"question      {example.question}", "bold")
        title = outcome.settings.base_name
        display.line(f"{title:<12}  {_one_line(outcome.before.answers[at])}", "dim")
        display.line(f"with adapter  {_one_line(outcome.after.answers[at])}")
        if outcome.deployment is not None:
            shown = outcome.deployment.answers[number]
            display.line(f"ONNX Runtime  {_one_line(shown)}")
    display.line("")
    if outcome.f1_gain is not None:
        display.line(
            f"token F1 of {len(outcome.generated)} generated answers: {outcome.f1_gain.value:+.3f} "
            f"(95 % interval {outcome.f1_gain.low:+.3f} to {outcome.f1_gain.high:+.3f})"
        )
    display.line(f"{sum(outcome.seconds.values()):.0f} s in all")
    files = [("adapter", "adapter"), ("report", "report.md"), ("curve", "loss.png")]
    if outcome.deployment is not None:
        files.append(("ONNX", f"{deployment.FOLDER}/{deployment.FILE}"))
    if outcome.comparison is not None:
        files.append(("beside", "comparison.png"))
    for title, name in files:
        display.result(f"{title:<8} {(folder / name).resolve()}")


def _one_line(text: str, width: int = 400) -> str:
    flat = " ".join(text.split()) or "(empty)"
    return flat if len(flat) <= width else flat[: width - 3] + "..."
