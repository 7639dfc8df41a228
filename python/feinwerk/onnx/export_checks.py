"""What `export` asks of the environment and of a model before it starts."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from feinwerk import _checks

OP = "export"


def need_exporter() -> None:
    """Raise ImportError unless the packages that write ONNX files are there."""
    missing = [n for n in ("onnx", "onnxscript", "onnx_ir") if importlib.util.find_spec(n) is None]
    if missing:
        raise ImportError(
            f"{OP}: needs {', '.join(missing)}, which pip install 'feinwerk[onnx]' installs"
        )


def unwrapped(model: Any) -> nn.Module:
    """Return the module below PEFT's wrapper, or the module itself."""
    if not isinstance(model, nn.Module):
        _checks.reject(TypeError, OP, "model", "be a torch.nn.Module", type(model).__name__)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        inner: Any = model
        base: nn.Module = inner.get_base_model()
        return base
    return model


def check_model(model: nn.Module) -> None:
    """Reject training mode, and tensors that are not here: on the meta device, or shards."""
    for name, module in model.named_modules():
        if module.training:
            where = f"{name or 'the model'} in training mode; call model.eval()"
            _checks.reject(ValueError, OP, "model", "be in eval mode", where)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if hasattr(tensor, "placements"):
            rule = "be a whole tensor (gather the shards first)"
            _checks.reject(ValueError, OP, name, rule, f"a shard, {type(tensor).__name__}")
        if tensor.is_meta:
            _checks.reject(ValueError, OP, name, "hold values", "a tensor on the meta device")
        if type(tensor) not in (torch.Tensor, nn.Parameter) and not _is_buffer(tensor):
            rule = "be a plain tensor"
            _checks.reject(NotImplementedError, OP, name, rule, type(tensor).__name__)


def _is_buffer(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ in ("Buffer", "UninitializedBuffer")
