"""write_genai_config: lets onnxruntime-genai run an exported causal LM, custom ops included.

```
   folder/
     model.onnx (+ external data)   what export_causal_lm wrote
     genai_config.json              names of inputs and outputs, sizes, special tokens
     libfeinwerk_onnx.so            a copy: genai loads libraries of the model's folder only, and
                                    follows links before it looks
     tokenizer.json, ...            of the tokenizer's save_pretrained, where genai is to tokenize
```
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feinwerk import _checks

_OP = "write_genai_config"
_PAST = re.compile(r"past_key_values\.(\d+)\.key")
_FED = re.compile(r"input_ids|attention_mask|position_ids|past_key_values\.\d+\.(key|value)")
# ONNX Runtime's level "error": at "warning" it names every input that has a default.
_ERRORS = 3


def write_genai_config(
    model_path: str | Path,
    config: Any,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    context_length: int | None = None,
    custom_ops: bool = True,
    session_options: Mapping[str, Any] | None = None,
) -> Path:
    """Write genai_config.json beside an exported causal LM, for onnxruntime-genai.

    genai then generates with `onnxruntime_genai.Model(folder)`, and switches adapters by its own
    `Adapters` from the files of `save_adapter`.

    Args:
        model_path: the .onnx file that `export_causal_lm` wrote; its folder becomes genai's model
            folder.
        config: the transformers config of the model, or the model itself.
        eos_token_id: what ends a text; default the config's.
        context_length: the most tokens of a text; default the config's max_position_embeddings.
        custom_ops: copy Feinwerk's custom-op library beside the model and have genai load it. Only
            for a graph that has Feinwerk's ops; without it their standard-op bodies run, slower.
        session_options: further entries of genai's "session_options", e.g. intra_op_num_threads.

    Returns:
        The path of genai_config.json.

    Raises:
        ImportError: if onnx is not installed.
        FileNotFoundError: if the custom-op library is needed and has not been built.
        ValueError: if the graph has not the inputs and outputs of a causal LM, an input that genai
            does not feed, or sizes that the config contradicts; nothing is written then.

    Source:
        onnxruntime-genai 0.18, its genai_config.json.

    Example:
        See docs/guides/onnxruntime_genai.md.
    """
    import onnx

    path = Path(model_path)
    config = getattr(config, "config", config)
    model = onnx.load(path, load_external_data=False)
    layers, kv_heads, head_size = _check_graph(model.graph)
    for name, ours, theirs in (
        ("num_hidden_layers", layers, config.num_hidden_layers),
        ("num_key_value_heads", kv_heads, _kv_heads(config)),
        ("head_size", head_size, _head_size(config)),
    ):
        if ours != theirs:
            _checks.reject(ValueError, _OP, name, f"be {ours} as in {path.name}", theirs)
    options: dict[str, Any] = {"log_severity_level": _ERRORS, "provider_options": []}
    if custom_ops and any(node.domain == "feinwerk" for node in model.graph.node):
        options["custom_ops_library"] = _copy_library(path.parent)
    options |= session_options or {}
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    if eos is None:
        _checks.reject(ValueError, _OP, "eos_token_id", "be given: the config has none", None)
    first_eos = eos if isinstance(eos, int) else next(iter(eos))
    bos, pad = config.bos_token_id, config.pad_token_id
    length = config.max_position_embeddings if context_length is None else context_length
    content = {
        "model": {
            # genai's name of every decoder with these inputs and a cache in two tensors a layer
            "type": "llama",
            "bos_token_id": first_eos if bos is None else bos,
            "eos_token_id": eos if isinstance(eos, int) else list(eos),
            "pad_token_id": first_eos if pad is None else pad,
            "context_length": length,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": path.name,
                "session_options": options,
                "hidden_size": config.hidden_size,
                "head_size": head_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # The graph returns a longer cache, it does not write into the one it was given.
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }
    written = path.parent / "genai_config.json"
    written.write_text(json.dumps(content, indent=2) + "\n")
    return written


def _kv_heads(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads)


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def _check_graph(graph: Any) -> tuple[int, int, int]:
    """Return the number of layers, the key/value heads and their size, as the graph has them."""
    defaults = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in defaults}
    outputs = {value.name for value in graph.output}
    numbers = sorted(int(m[1]) for m in map(_PAST.fullmatch, inputs) if m)
    needed = ["input_ids", "attention_mask"]
    needed += [f"past_key_values.{i}.{part}" for i in numbers for part in ("key", "value")]
    given = ["logits", *(f"present.{i}.{part}" for i in numbers for part in ("key", "value"))]
    if not numbers:
        needed.append("past_key_values.0.key")
    for names, known, what in ((needed, inputs.keys(), "input"), (given, outputs, "output")):
        for name in names:
            if name not in known:
                rule = f"be an {what} of the graph, as export_causal_lm writes it"
                _checks.reject(ValueError, _OP, name, rule, ", ".join(sorted(known)[:8]))
    for name in inputs:
        if not _FED.fullmatch(name):
            rule = "have a default: onnxruntime-genai does not feed it"
            _checks.reject(ValueError, _OP, name, rule, "an input without one")
    dims = inputs["past_key_values.0.key"].type.tensor_type.shape.dim
    return len(numbers), dims[1].dim_value, dims[3].dim_value


def _copy_library(folder: Path) -> str:
    """Put the library into the model's folder; return its name there."""
    from feinwerk.onnx.library import library_path

    source = Path(library_path())
    if not source.is_file():
        raise FileNotFoundError(f"{_OP}: library_path() must be a file, got {str(source)!r}")
    # Put in place in one step: a process may be running the one that is there.
    part = folder / f".{source.name}.part"
    shutil.copy2(source, part)
    os.replace(part, folder / source.name)
    return source.name
