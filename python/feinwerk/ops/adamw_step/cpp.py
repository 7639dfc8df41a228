"""adamw_step through the native extension."""

from __future__ import annotations

from typing import Any

from feinwerk._native import adamw


def adamw_step(*args: Any, **kwargs: Any) -> None:
    """Forward to the native kernel."""
    adamw.adamw_step(*args, **kwargs)
