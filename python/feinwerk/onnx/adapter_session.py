"""load_adapter: an `.onnx_adapter` file checked against a session, and made active run by run.

ONNX Runtime checks names and shapes only in the run itself, takes the first of two adapters that
have a name in common, and keeps no reference to an active adapter: RunOptions whose LoraAdapter
has been collected run silently without it. What is here answers each of the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from feinwerk import _checks
from feinwerk.onnx.adapter_inputs import adapter_runtime, layers_of, part_names, shape_fits, text_of

# RunOptions -> the adapters that must live as long as they do.
_KEPT: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class OnnxAdapter:
    """An adapter that fits a session; `load_adapter` makes it.

    Args:
        path: the file.
        layers: the layers it has tensors for, rank 0 included.
        names: the graph inputs that it sets.
        lora: the onnxruntime.LoraAdapter.
    """

    path: Path
    layers: tuple[str, ...]
    names: frozenset[str]
    lora: Any

    def run_options(self, *others: OnnxAdapter) -> Any:
        """Return fresh onnxruntime.RunOptions with this adapter active.

        Pass them to `session.run`. They keep the adapter alive. `run_async` and
        `run_with_iobinding` ignore adapters, in ONNX Runtime itself.

        Args:
            others: further adapters for other layers, in the same run.

        Returns:
            onnxruntime.RunOptions.

        Raises:
            ValueError: if two adapters set the same input: ONNX Runtime takes the first and adds
                nothing up.

        Source:
            ONNX Runtime 1.32, RunOptions.add_active_adapter.

        Example:
            See docs/onnx_adapters.md.
        """
        import onnxruntime

        seen: dict[str, OnnxAdapter] = {}
        for adapter in (self, *others):
            for name in sorted(adapter.names & seen.keys()):
                rule = "be set by one adapter in a run"
                got = f"{seen[name].path.name} and {adapter.path.name}"
                _checks.reject(ValueError, "run_options", name, rule, got)
            seen |= dict.fromkeys(adapter.names, adapter)
        options = onnxruntime.RunOptions()
        for adapter in (self, *others):
            options.add_active_adapter(adapter.lora)
        _KEPT[options] = tuple(adapter.lora for adapter in (self, *others))
        return options


def load_adapter(path: str | Path, session: Any, *, partial: bool = False) -> OnnxAdapter:
    """Load an adapter for a session, and check that it fits before any run.

    The session is not changed or rebuilt: any number of adapters can be loaded, and each run
    names the one it wants.

    Args:
        path: an `.onnx_adapter` file, of `feinwerk.onnx.save_adapter` or another tool.
        session: the onnxruntime.InferenceSession that it is for.
        partial: allow the file to lack adapter inputs of the graph; those keep the graph's
            defaults, which are the exported adapter's values if it was exported with one.

    Returns:
        The adapter; `adapter.run_options()` makes it active in one run.

    Raises:
        ImportError: if onnxruntime is not installed, or older than 1.20.
        FileNotFoundError: if there is no such file.
        ValueError: if it is no adapter file, or a tensor has a name, dtype or shape that the
            session's model does not take, or one is missing; the message names the first.

    Source:
        ONNX Runtime 1.32, onnxruntime.LoraAdapter.

    Example:
        See docs/onnx_adapters.md.
    """
    op, path = "load_adapter", Path(path)
    onnxruntime = adapter_runtime(op)
    if not path.is_file():
        raise FileNotFoundError(f"{op}: path must be a file, got {str(path)!r}")
    lora = onnxruntime.LoraAdapter()
    try:
        content = onnxruntime.AdapterFormat.read_adapter(str(path))
        values = content.get_parameters()
        lora.Load(str(path))
    except RuntimeError as error:
        rule = "be an adapter file that ONNX Runtime reads"
        _checks.reject(ValueError, op, path.name, rule, str(error).strip().splitlines()[-1])
    inputs = {node.name: node for node in session.get_overridable_initializers()}
    own = part_names(layers_of(inputs), inputs)
    inputs |= {node.name: node for node in session.get_inputs()}
    ranks: dict[str, int] = {}
    for name, value in sorted(values.items()):
        shape = tuple(value.shape())
        _check_value(op, name, value.data_type(), shape, inputs)
        layer, _, part = name.rpartition(".")
        if part in ("lora_A", "lora_B") and len(shape) == 2:
            r = shape[0] if part == "lora_A" else shape[1]
            if ranks.setdefault(layer, r) != r:
                rule = f"have the rank of {layer}.lora_A, {ranks[layer]}"
                _checks.reject(ValueError, op, name, rule, text_of(shape))
    for name in () if partial else own:
        if name not in values:
            rule = "be in the file: save it with model=, the exported .onnx (or load it with "
            rule += "partial=True to keep the graph's default)"
            _checks.reject(ValueError, op, name, rule, f"{len(values)} others in {path.name}")
    return OnnxAdapter(path, layers_of(sorted(values)), frozenset(values), lora)


def _check_value(
    op: str, name: str, kind: str, shape: tuple[int, ...], inputs: dict[str, Any]
) -> None:
    """Compare one tensor of the file with the input of its name."""
    if name not in inputs:
        rule = "be an input of the session's model"
        _checks.reject(ValueError, op, name, rule, f"{len(inputs)} inputs of other names")
    node = inputs[name]
    if kind != node.type:
        _checks.reject(ValueError, op, name, f"be a {node.type}", f"a {kind}")
    if not shape_fits(shape, tuple(node.shape)):
        _checks.reject(ValueError, op, name, f"have shape {text_of(node.shape)}", text_of(shape))
