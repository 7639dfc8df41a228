"""export: a torch module with Feinwerk's or PEFT's layers to ONNX, the NF4 bytes as they are."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import feinwerk
from feinwerk import _checks
from feinwerk.onnx.export_checks import OP, check_model, need_exporter, unwrapped
from feinwerk.onnx.export_layers import AdapterRoom, ExportLayer, layers_of, read_layer
from feinwerk.onnx.export_report import ExportReport, NodeReport
from feinwerk.onnx.graph_finish import Finished, finish
from feinwerk.onnx.stand_ins import StandIn, standing_in
from feinwerk.onnx.translate import translation_table

OPS = ("feinwerk", "contrib", "portable")
# Protobuf's limit is 2 GB a file; the graph itself needs some of it.
EXTERNAL_ABOVE = 1_500_000_000
_LOG = logging.getLogger("feinwerk")

Progress = Callable[[str], None]


def export(
    model: nn.Module,
    example_inputs: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    ops: str = "feinwerk",
    adapters: AdapterRoom | str | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    external_data: bool | None = None,
    opset_version: int = 20,
    root: nn.Module | None = None,
    metadata: Mapping[str, str] | None = None,
    functions: Callable[[int], Sequence[Any]] | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model to an ONNX file that an ordinary ONNX Runtime session runs.

    NF4Linear, NF4Embedding, Feinwerk's LoRA and DoRA layers and PEFT's LoRA layers over linear
    layers become single nodes; the rest is traced by `torch.onnx.export(dynamo=True)`. Nothing is
    quantized again: codes and absmax are the model's own bytes.

    Args:
        model: in eval mode; a model that PEFT has wrapped is unwrapped.
        example_inputs: positional inputs, tensors of any sizes.
        path: of the .onnx file; large tensors go to `<path>.data`.
        ops: "feinwerk" writes Feinwerk's operators, each with a function of standard operators
            that runs where the library is not registered; "contrib" ONNX Runtime's own MatMulBnb4
            (absmax expanded; where it does not fit, standard operators); "portable" standard
            operators only.
        adapters: None or "inputs" makes the active adapters graph inputs with defaults, named
            `<layer>.lora_A`, `.lora_B`, `.scaling` and, with DoRA, `.gain`; "constants" keeps them
            fixed in the file; an `AdapterRoom` adds inputs to layers that have no adapter.
        dynamic_shapes: as for torch.onnx.export. By default every dimension of a tensor but the
            last of a floating one is dynamic, named "batch", "sequence", ...; of tensors with four
            dimensions or more the first, and of the others what the trace leaves open.
        input_names: of the graph's inputs, without the adapters'.
        output_names: of its outputs.
        kwargs: keyword inputs.
        external_data: whether tensors go to a second file; by default above 1.5 GB.
        opset_version: of the standard operators.
        root: the module that layers' paths start from, where `model` is a wrapper around it;
            by default the model itself, below PEFT's wrapper.
        metadata: more metadata_props.
        functions: called with the version of the standard operators; returns the onnx.FunctionProto
            of nodes that `model` has put into the trace by `torch.onnx.ops.symbolic`.
        progress: called with one line before every long step.

    Returns:
        What was written, layer by layer.

    Raises:
        ImportError: if onnx or onnxscript is not installed.
        TypeError: if `model` is no module.
        ValueError: if the model is in training mode, has tensors on the meta device or shards, or
            an option is unknown.
        NotImplementedError: naming a layer that cannot be exported.

    Source:
        docs/onnx_export.md.

    Example:
        >>> layer = feinwerk.nn.NF4Linear(64, 8)  # doctest: +SKIP
        >>> export(layer.eval(), (torch.randn(2, 64),), "layer.onnx").ops  # doctest: +SKIP
        'feinwerk'
    """
    if ops not in OPS:
        _checks.reject(ValueError, OP, "ops", f"be one of {', '.join(OPS)}", repr(ops))
    if not (adapters in (None, "inputs", "constants") or isinstance(adapters, AdapterRoom)):
        rule = 'be None, "inputs", "constants" or an AdapterRoom'
        _checks.reject(ValueError, OP, "adapters", rule, repr(adapters))
    need_exporter()
    model = unwrapped(model)
    base = model if root is None else unwrapped(root)
    check_model(model)
    tell = progress or _LOG.info
    room = adapters if isinstance(adapters, AdapterRoom) else None
    as_inputs = adapters != "constants"
    tell("reading the layers")
    whole = read_layer("layer", model, room) if root is None else None
    found = [] if whole is not None else list(layers_of(base, room))
    layers = [whole] if whole is not None else [layer for _, layer in found]
    _check_layers(layers, as_inputs, room)
    with standing_in(base, found) as traced:
        traced = (
            StandIn(whole, {}) if whole is not None else (model if root is not None else traced)
        )
        tell(f"tracing the model with {len({id(layer) for layer in layers})} layers of ours")
        program = _trace(
            traced, tuple(example_inputs), dict(kwargs or {}), dynamic_shapes, input_names,
            output_names, opset_version,
        )  # fmt: skip
        tell(f"writing the graph's operators: {ops}")
        own_inputs = [value.name for value in program.model.graph.inputs]
        done = finish(program.model, ops, as_inputs)
        _describe(program.model, ops, layers, done, metadata)
        if functions is not None:
            _add_functions(program.model, functions(program.model.graph.opset_imports[""]))
        target = Path(path)
        tell(f"saving {target}")
        files = _save(program.model, target, external_data)
    graph = program.model.graph
    return ExportReport(
        str(target), ops, _with_layers(done.nodes, layers), tuple(done.adapter_inputs),
        tuple(own_inputs), tuple(value.name for value in graph.outputs), files,
        graph.opset_imports[""], program.model.ir_version, _notes(layers, done, ops),
    )  # fmt: skip


def _check_layers(layers: Sequence[ExportLayer], as_inputs: bool, room: AdapterRoom | None) -> None:
    for layer in layers:
        if as_inputs and layer.adapter is not None and layer.adapter.lora_bias is not None:
            rule = 'have no lora_bias, which no adapter file holds (or pass adapters="constants")'
            _checks.reject(NotImplementedError, OP, layer.path, rule, "lora_bias")
    if room is not None:
        for entry in room.target_modules:
            one = AdapterRoom((entry,))
            if not any(one.covers(layer.path) for layer in layers):
                rule = "name linear layers or embeddings of the model"
                _checks.reject(ValueError, OP, "target_modules", rule, repr(entry))


def _trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    opset_version: int,
) -> Any:
    def trace(shapes: Any) -> Any:
        with torch.no_grad(), _quiet(), _naming_unknown_ops():
            return torch.onnx.export(
                model, args, kwargs=kwargs or None, dynamo=True, verbose=False,
                dynamic_shapes=shapes, input_names=input_names, output_names=output_names,
                opset_version=opset_version, custom_translation_table=translation_table(),
            )  # fmt: skip

    if dynamic_shapes is not None:
        return trace(dynamic_shapes)
    try:
        return trace(default_dynamic_shapes(model, args, kwargs))
    except torch.onnx.OnnxExporterError as error:
        if "tracing inferred a static shape" not in str(error):
            raise
    # A dimension that looked like a sequence's length is fixed by the model, as channels are.
    return trace(default_dynamic_shapes(model, args, kwargs, fixed=True))


@contextmanager
def _naming_unknown_ops() -> Iterator[None]:
    """Say which of our operations in a user's own forward has no ONNX form."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if str(cause).startswith(f"{OP}: "):  # what translate.py has rejected
                raise cause from error
            cause = cause.__cause__
        known = ", ".join(str(op) for op in translation_table())
        unknown = re.search(
            r"No ONNX function found for <OpOverload\(op='(feinwerk\.\w+)'", str(error)
        )
        if unknown is None:
            raise
        rule = f"call only {known} outside of Feinwerk's layers"
        _checks.reject(NotImplementedError, OP, "model", rule, unknown[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch's exporter says of itself: of torchvision, and of its own classes."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # Two dimensions of one name, as "batch" of two inputs.
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def default_dynamic_shapes(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], fixed: bool = False
) -> Any:
    """Return dynamic_shapes in which all but the last dimension of floating tensors is dynamic.

    Dimensions at the same place with the same example size have the same name.

    Args:
        model: whose forward names the inputs.
        args: positional inputs.
        kwargs: keyword inputs.
        fixed: whether the model may fix what is not the first dimension of a floating tensor, as
            it always may with four dimensions or more.

    Returns:
        As torch.onnx.export takes them: by the names of forward's parameters.
    """
    names: dict[tuple[int, int], str] = {}

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and (fixed or value.dim() > 3) and value.dim() > 1:
                rest = {i: torch.export.Dim.AUTO for i in range(1, value.dim())}
                return {0: _dimension(names, 0, value.shape[0]), **rest}
            last = value.dim() - (1 if value.is_floating_point() else 0)
            return {i: _dimension(names, i, value.shape[i]) for i in range(last)}
        if isinstance(value, Mapping):
            return {key: of(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(of(one) for one in value)
        return None

    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return {name: of(value) for name, value in bound.arguments.items()}


def _dimension(names: dict[tuple[int, int], str], place: int, size: int) -> str:
    if (place, size) not in names:
        stem = {0: "batch", 1: "sequence"}.get(place, f"dim_{place}")
        used = sum(1 for at, _ in names if at == place)
        names[place, size] = stem if not used else f"{stem}_{used + 1}"
    return names[place, size]


def _describe(
    model: Any,
    ops: str,
    layers: Sequence[ExportLayer],
    done: Finished,
    metadata: Mapping[str, str] | None,
) -> None:
    """Write what the file is into metadata_props, and drop the exporter's traces of our paths."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    names = sorted({name for layer in layers if layer.adapter for name in layer.adapter.names})
    model.metadata_props.update(
        {
            "feinwerk.version": feinwerk.__version__,
            "feinwerk.ops": ops,
            "feinwerk.adapters": json.dumps(names),
            "feinwerk.adapter_inputs": json.dumps(done.adapter_inputs),
            **(metadata or {}),
        }
    )
    model.producer_name, model.producer_version = "feinwerk", feinwerk.__version__
    model.graph.name = "feinwerk"
    # Functions of one name need IR 10; the others load on older runtimes as well.
    model.ir_version = 10 if done.overloads else 9


def _add_functions(model: Any, functions: Sequence[Any]) -> None:
    from onnx_ir.serde import deserialize_function

    for proto in functions:
        function = deserialize_function(proto)
        model.functions[function.identifier()] = function
        model.graph.opset_imports.setdefault(function.domain, 1)


def _save(model: Any, path: Path, external: bool | None) -> dict[str, int]:
    import onnx_ir as ir

    total = sum(
        value.const_value.nbytes for value in model.graph.initializers.values()
        if value.const_value is not None
    )  # fmt: skip
    if external is None:
        external = total > EXTERNAL_ABOVE
    elif not external and total > 2_000_000_000:
        rule = "be True or None above protobuf's limit of 2 GB"
        _checks.reject(ValueError, OP, "external_data", rule, f"False for {total / 1e9:.1f} GB")
    data = f"{path.name}.data"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [data, path.name] if external else [path.name]
    # A failure, and a session that still reads an older file, leave each other alone.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        ir.save(model, Path(folder) / path.name, external_data=data if external else None)
        for name in names:
            os.replace(Path(folder) / name, path.parent / name)
    return {name: (path.parent / name).stat().st_size for name in names}


def _with_layers(
    nodes: Sequence[NodeReport], layers: Sequence[ExportLayer]
) -> tuple[NodeReport, ...]:
    """Add to each node what its layer was and which adapter it has."""
    by_path = {layer.path: layer for layer in layers}
    found = []
    for node in nodes:
        layer, adapter = by_path.get(node.path), ""
        if layer is not None and layer.adapter is not None:
            kind = "LoRA" if layer.adapter.gain is None else "DoRA"
            adapter = f"{kind} r={layer.adapter.r}" if layer.adapter.names else f"room for {kind}"
        why = "; ".join([*([node.why] if node.why else []), *(layer.notes if layer else [])])
        was = layer.was if layer is not None else "a bare call"
        found.append(NodeReport(node.path, node.operation, node.became, why, was, adapter))
    return tuple(found)


def _notes(layers: Sequence[ExportLayer], done: Finished, ops: str) -> tuple[str, ...]:
    notes = []
    if done.overloads:
        notes.append(
            "plain and double-quantized NF4 weights in one file: without the library, runtimes "
            "older than the ones in docs/onnx_export.md confuse their functions"
        )
    return tuple(notes)
