"""weight_norm through the native extension."""

from __future__ import annotations

from typing import Any

from feinwerk._native import adapters


def weight_norm(*args: Any, **kwargs: Any) -> Any:
    """Forward to the native kernel."""
    return adapters.weight_norm(*args, **kwargs)
