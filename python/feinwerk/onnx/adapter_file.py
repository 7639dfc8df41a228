"""save_adapter: a LoRA or DoRA adapter as ONNX Runtime's own `.onnx_adapter`, a list of tensors.

```
   adapter in torch              .onnx_adapter, every tensor fp32     graph input with a default
   lora_A                        <path>.lora_A  [r, K]                [r, K], r symbolic
   lora_B                        <path>.lora_B  [N, r]                [N, r]
   lora_alpha, use_rslora        <path>.scaling [1]                   [1]
   magnitude / weight_norm       <path>.gain    [N], or [0]: none     only in a graph exported with
                                                                      room for DoRA
```
<path> is the layer's name in `model.named_modules()` of the base model. Scaling is [1] because the
file format has no 0-dim tensors. A layer that the adapter leaves alone gets rank 0, so that the
graph's default, which may be another adapter's, never shows through.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feinwerk import _checks
from feinwerk.nn import LoRAEmbedding, LoRALinear, adapters_of
from feinwerk.nn.adapter_file import read_files
from feinwerk.nn.dora import DoRA
from feinwerk.onnx.adapter_base import (
    Base,
    base_of_graph,
    base_of_module,
    gain_of,
    layer_of_module,
    sizes_of_module,
)
from feinwerk.onnx.adapter_inputs import GAIN, PARTS, AdapterInputs, adapter_runtime, read_inputs

_OP = "save_adapter"


@dataclass(frozen=True)
class _Layer:
    """One layer of an adapter: fp32 A [r, K] and B [N, r], scaling, and DoRA's part if any."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    gain: torch.Tensor | None = None


def save_adapter(
    adapter: str | Path | nn.Module,
    path: str | Path,
    *,
    model: str | Path | nn.Module | None = None,
) -> list[str]:
    """Write an adapter as the `.onnx_adapter` file that ONNX Runtime switches to in one run.

        y = gain * (x W^T + scaling * (x A^T) B^T) + bias,   gain = magnitude / ||W + scaling B A||

    Names and shapes are those of the graph that `feinwerk.onnx.export` writes. With `model` as an
    exported file they are checked against that graph, layers that the adapter leaves alone are
    written with rank 0, and DoRA's norms are taken from the weights in the file.

    Args:
        adapter: a folder that PEFT or `feinwerk.nn.save_adapter` wrote (LoRA, rsLoRA, DoRA, with
            rank_pattern and alpha_pattern), or a model that has Feinwerk's adapters.
        path: the file to write; its folder must exist.
        model: the exported .onnx file, or the torch model the adapter was trained over. DoRA out of
            a folder needs one of them for the row norms of W + scaling B A.

    Returns:
        The names of the adapted layers.

    Raises:
        ImportError: if onnxruntime 1.20 or newer, safetensors or (for a file as `model`) onnx is
            not installed.
        ValueError: if the adapter has a part that has no place in the file (lora_bias, a
            convolution, an init that has changed the base), DoRA has no `model`, or a name or shape
            does not fit `model`; the message names the first. Nothing is written then.
        TypeError: if `model` is a torch model and a layer is neither linear nor an embedding.

    Source:
        ONNX Runtime 1.32, onnxruntime.AdapterFormat; DoRA (arXiv 2402.09353), equation 5.

    Example:
        >>> from feinwerk.nn import add_adapters
        >>> net = nn.Sequential(nn.Linear(64, 8))
        >>> add_adapters(net, 4, lora_alpha=8)
        ['0']
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(net, Path(folder) / "first.onnx_adapter")
        ['0']
    """
    onnxruntime = adapter_runtime(_OP)
    layers = _of_model(adapter) if isinstance(adapter, nn.Module) else _of_folder(Path(adapter))
    graph = None if model is None or isinstance(model, nn.Module) else read_inputs(_OP, model)
    if graph is not None:
        _check_names(layers, graph)
    for name, layer in layers.items():
        if graph is not None:
            _check_shapes(name, layer, graph)
        if isinstance(model, nn.Module):
            _check_sizes(name, layer, sizes_of_module(layer_of_module(_OP, model, name)))
    for name, layer in layers.items():
        if layer.magnitude is not None and layer.gain is None:
            base = _base(name, layer, model, graph)
            gain = base.gain(layer.magnitude, layer.A, layer.B, layer.scaling)
            layers[name] = _Layer(layer.A, layer.B, layer.scaling, layer.magnitude, gain)
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
        for name, tensor in _tensors(layers, graph).items()
    }
    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(1)
    content.set_parameters(values)
    _replace(Path(path), content)
    return list(layers)


def _of_model(model: nn.Module) -> dict[str, _Layer]:
    layers = {}
    for name, adapter in adapters_of(model).items():
        if not name or not isinstance(adapter, LoRALinear | LoRAEmbedding):
            rule = "be an adapter of a linear layer or an embedding inside a model"
            _checks.reject(ValueError, _OP, repr(name), rule, type(adapter).__name__)
        if adapter.merged:
            _checks.reject(ValueError, _OP, name, "be unmerged", "merged")
        if adapter.lora_bias is not None:
            _checks.reject(ValueError, _OP, name, "have no lora_bias", "lora_bias=True")
        layers[name] = _Layer(
            _fp32(adapter.lora_A), _fp32(adapter.lora_B), float(adapter.scaling),
            _fp32(adapter.magnitude) if isinstance(adapter, DoRA) else None,
            _fp32(gain_of(adapter.magnitude, adapter.weight_norm()))
            if isinstance(adapter, DoRA) else None,
        )  # fmt: skip
    if not layers:
        rule = "contain Feinwerk's adapters (save PEFT's by save_pretrained and name the folder)"
        _checks.reject(ValueError, _OP, "adapter", rule, type(model).__name__)
    return layers


def _of_folder(folder: Path) -> dict[str, _Layer]:
    _, init, found, options = read_files(_OP, folder)
    if init != "default":
        rule = "leave the base as it is: save the adapter relative to the original base first"
        _checks.reject(ValueError, _OP, "init_lora_weights", rule, repr(init))
    layers = {}
    for name, parts in found.items():
        A, B, r = parts["lora_A"], parts["lora_B"], options[name]["r"]
        for part in ("lora_bias", "weight"):
            if part in parts:
                rule = "be absent: no input of the graph takes it"
                got = f"shape {tuple(parts[part].shape)}"
                _checks.reject(ValueError, _OP, f"{name}.{part}", rule, got)
        if A.dim() != 2 or B.dim() != 2 or len(A) != r or B.shape[1] != r:
            rule = f"be [{r}, K] and [N, {r}], of a linear layer or an embedding"
            got = f"{tuple(A.shape)} and {tuple(B.shape)}"
            _checks.reject(ValueError, _OP, f"{name}.lora_A and lora_B", rule, got)
        magnitude = parts.get("magnitude")
        if magnitude is not None and magnitude.shape != (len(B),):
            got = f"shape {tuple(magnitude.shape)}"
            _checks.reject(ValueError, _OP, f"{name}.magnitude", f"have shape ({len(B)},)", got)
        root: float = r**0.5 if options[name]["use_rslora"] else r
        scaling = options[name]["lora_alpha"] / root
        magnitude = None if magnitude is None else _fp32(magnitude)
        layers[name] = _Layer(_fp32(A), _fp32(B), scaling, magnitude)
    if not layers:
        _checks.reject(ValueError, _OP, "adapter", "contain adapted layers", repr(str(folder)))
    return layers


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _base(
    name: str, layer: _Layer, model: str | Path | nn.Module | None, graph: AdapterInputs | None
) -> Base:
    """The weight below a layer of a folder's DoRA."""
    if isinstance(model, nn.Module):
        module = layer_of_module(_OP, model, name)
        if not isinstance(module, nn.Embedding):
            return base_of_module(module)
        rule = "be no embedding's: load the folder by feinwerk.nn.load_adapter, save the model"
        _checks.reject(ValueError, _OP, f"{name}.magnitude", rule, type(module).__name__)
    if graph is None:
        rule = "be given for DoRA: the gain is magnitude / ||W + scaling B A||"
        _checks.reject(ValueError, _OP, "model", rule, f"None, and {name} has a magnitude")
    base = base_of_graph(_OP, graph, name)
    _check_sizes(name, layer, base.shape)
    return base


def _check_sizes(name: str, layer: _Layer, sizes: tuple[int, int]) -> None:
    got = (len(layer.B), layer.A.shape[1])
    if got != sizes:
        rule = f"have N = {sizes[0]} and K = {sizes[1]} as in the model"
        _checks.reject(ValueError, _OP, name, rule, f"N = {got[0]} and K = {got[1]}")


def _check_names(layers: dict[str, _Layer], graph: AdapterInputs) -> None:
    for name, layer in layers.items():
        parts = [*PARTS, GAIN] if layer.magnitude is not None else PARTS
        for part in parts:
            if f"{name}.{part}" not in graph.shapes:
                rule = f"be an input of {graph.path.name}"
                if part == GAIN and name in graph.layers:
                    rule += ", which was exported without room for DoRA"
                got = f"adapter inputs for {len(graph.layers)} layers"
                if graph.layers:
                    got += f", the first {graph.layers[0]}"
                _checks.reject(ValueError, _OP, f"{name}.{part}", rule, got)


def _check_shapes(name: str, layer: _Layer, graph: AdapterInputs) -> None:
    shapes = {
        "lora_A": tuple(layer.A.shape),
        "lora_B": tuple(layer.B.shape),
        "scaling": (1,),
    }
    if layer.magnitude is not None:
        shapes[GAIN] = (len(layer.B),)
    for part, shape in shapes.items():
        graph.check_shape(_OP, f"{name}.{part}", shape)


def _tensors(layers: dict[str, _Layer], graph: AdapterInputs | None) -> dict[str, torch.Tensor]:
    """Everything the file holds, by the names of the graph's inputs."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = layer.A, layer.B
        tensors[f"{name}.scaling"] = torch.tensor([layer.scaling], dtype=torch.float32)
        if layer.gain is not None:
            tensors[f"{name}.{GAIN}"] = layer.gain
    for name in graph.layers if graph is not None else ():
        assert graph is not None
        if name not in layers:
            N, K = graph.sizes(_OP, name)
            tensors[f"{name}.lora_A"] = torch.zeros(0, K)
            tensors[f"{name}.lora_B"] = torch.zeros(N, 0)
            tensors[f"{name}.scaling"] = torch.ones(1)
        if f"{name}.{GAIN}" in graph.shapes:
            tensors.setdefault(f"{name}.{GAIN}", torch.zeros(0))
    return tensors


def _replace(path: Path, content: Any) -> None:
    """Write beside the file and put it in place: a session that maps the old one keeps it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        content.export_adapter(str(part))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
