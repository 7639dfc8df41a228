"""lora_linear and its gradient through the native extension."""

from __future__ import annotations

from typing import Any

from feinwerk._native import adapters


def lora_linear(*args: Any, **kwargs: Any) -> Any:
    """Forward to the native kernel."""
    return adapters.lora_linear(*args, **kwargs)


def lora_linear_backward(*args: Any, **kwargs: Any) -> Any:
    """Forward to the native kernel."""
    return adapters.lora_linear_backward(*args, **kwargs)
