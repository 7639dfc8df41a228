"""Deployment with ONNX Runtime: the custom-op library, export, generation and adapters.

Not imported by `import feinwerk`. Every name is looked up when it is first used, so that
registering the library needs neither onnx nor a tracing exporter.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module of this package that defines it. No module is named as a function:
# importing it would put the module in the function's place.
_HOMES = {
    "AdapterRoom": "export_layers",
    "ExportReport": "export_report",
    "export": "export_model",
    "export_causal_lm": "causal_lm",
    "generate": "generation",
    "load_adapter": "adapter_session",
    "library_path": "library",
    "register": "library",
    "save_adapter": "adapter_file",
    "write_genai_config": "genai",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` and return it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, looked up or not."""
    return sorted({*globals(), *_HOMES})
