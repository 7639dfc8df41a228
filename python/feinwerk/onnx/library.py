"""The custom-op library for ONNX Runtime: where it lies, and how a session gets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feinwerk import _checks

_NAME = "libfeinwerk_onnx.so"
_OLDEST = (1, 17)


def library_path() -> str:
    """Return the path of the custom-op library, for `SessionOptions.register_custom_ops_library`.

    The library is a plain shared object: C and C++ programs load it by this path, too. It needs
    neither Python nor torch, runs on the session's own threads and serves ONNX Runtime 1.17 and
    every later version.

    Returns:
        The absolute path.

    Raises:
        RuntimeError: if this installation has no native part (FEINWERK_NO_NATIVE=1).

    Source:
        docs/onnx_ops.md.

    Example:
        >>> library_path().endswith("libfeinwerk_onnx.so")
        True
    """
    path = Path(__file__).with_name(_NAME)
    if not path.is_file():
        raise RuntimeError(
            f"library_path: {_NAME} must be built, got none in {path.parent}; reinstall feinwerk "
            "without FEINWERK_NO_NATIVE, on a machine with a C++ compiler"
        )
    return str(path)


def register(session_options: Any) -> None:
    """Make the operators of domain `feinwerk` known to sessions created with these options.

    Calling it again with the same options changes nothing.

    Args:
        session_options: an `onnxruntime.SessionOptions`.

    Raises:
        RuntimeError: if the native part is not built, or onnxruntime is older than 1.17.
        TypeError: if it is no SessionOptions.

    Source:
        docs/onnx_ops.md.

    Example:
        >>> import onnxruntime
        >>> options = onnxruntime.SessionOptions()
        >>> register(options)
    """
    import onnxruntime

    if not isinstance(session_options, onnxruntime.SessionOptions):
        got = type(session_options).__name__
        _checks.reject(
            TypeError, "register", "session_options", "be an onnxruntime.SessionOptions", got
        )
    version = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        _checks.reject(RuntimeError, "register", "onnxruntime", "be 1.17 or newer", version)
    session_options.register_custom_ops_library(library_path())
