"""Registers the ops with PyTorch's dispatcher: the only caller of torch.library.

```
   op.py  check, schema ── register_op ──> torch.ops.feinwerk.<op>
                                              │ CPU         cpp, else reference
                                              │ CUDA        triton, else reference
                                              │ the others  reference
                                              └ fake        shapes and dtypes only
```
Every one of these entries runs the op's check first. An op's `triton.py` is imported when the first
CUDA tensor arrives, so that `import feinwerk` needs no Triton.

Our own functions do not go through the dispatcher where nobody could tell (`_unseen`): it takes 25
to 50 us a call on a GPU's host, as long as all the rest of a small forward.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from feinwerk import _native

Implementation = Callable[..., Any]

_LIBRARY: Any = torch.library.Library("feinwerk", "DEF")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class RegisteredOp:
    """One op as registered: its name, schema and implementations by backend name."""

    name: str
    schema: str
    implementations: dict[str, Implementation]
    triton: str


OPS: dict[str, RegisteredOp] = {}

_forced_backend: str | None = None
_warned = False


def register_op(
    name: str,
    signature: str,
    *,
    check: Implementation,
    reference: Implementation,
    cpp: Implementation,
    fake: Implementation,
    triton: str,
) -> Any:
    """Define `feinwerk::<name><signature>` and register all its entries.

    Args:
        name: the op's stem.
        signature: the schema after the name, `(Tensor x, ...) -> Tensor`.
        check: called with the op's arguments in front of every entry; raises or returns None.
        reference: plain torch, any device.
        cpp: the native implementation, CPU only.
        fake: allocates the outputs and does nothing else.
        triton: the module that holds the Triton implementation, under the op's name. It may return
            NotImplemented for what it does not serve; the reference then runs.

    Returns:
        The function to call: the OpOverload, or for CUDA tensors its implementation.
    """
    schema = name + signature
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    pure = "!" not in signature
    on_gpu = _lazy(triton, name, reference, pure)
    OPS[name] = RegisteredOp(
        name, schema, {"reference": reference, "cpp": cpp, "triton": on_gpu}, triton
    )
    native = cpp if _native.available() else _warning_once(reference)

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        if _forced_backend == "reference":
            return reference(*args, **kwargs)
        if _forced_backend == "triton":
            return on_gpu(*args, **kwargs)
        return native(*args, **kwargs)

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        if _forced_backend == "reference" or why_no_triton() is not None:
            return reference(*args, **kwargs)
        return on_gpu(*args, **kwargs)

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return reference(*args, **kwargs)

    def shapes(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, on_cuda, "CUDA")
    _LIBRARY.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"feinwerk::{name}", shapes, lib=_LIBRARY)
    overload = getattr(torch.ops.feinwerk, name).default
    if not pure:
        return overload

    def call(*args: Any, **kwargs: Any) -> Any:
        return on_cuda(*args, **kwargs) if _unseen(args) else overload(*args, **kwargs)

    return call


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_OTHERS = frozenset({type(None), int, float, bool, str})


def _unseen(args: Sequence[Any]) -> bool:
    """Whether the dispatcher would do nothing but call the CUDA entry.

    That is: plain CUDA tensors, no gradient to record, and nobody who watches or transforms calls:
    no compiler, tracer, mode, transform of torch.func, or profiler.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    first = args[0][0] if type(args[0]) is list and args[0] else args[0]
    return (
        isinstance(first, torch.Tensor)
        and first.is_cuda
        and _plain(args)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
    )


def _plain(args: Sequence[Any]) -> bool:
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            if arg.is_neg():  # the dispatcher would negate it
                return False
        elif kind is list:
            if not _plain(arg):
                return False
        elif kind not in _OTHERS:
            return False
    return True


@functools.cache
def why_no_triton() -> str | None:
    """Return why no Triton kernel can run on a GPU here, or None where they can."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels of this process, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1" and why_no_triton() is None


def force_backend(name: str | None) -> None:
    """Make the CPU entries take one backend, for the whole process; None returns to the choice.

    "reference" holds for CUDA tensors as well; "triton" on CPU needs Triton's interpreter.
    """
    global _forced_backend
    if name not in (None, "reference", "cpp", "triton"):
        raise ValueError(
            f'force_backend: name must be "reference", "cpp", "triton" or None, got {name!r}'
        )
    if name == "cpp" and not _native.available():
        raise NotImplementedError(
            f"force_backend: name must be an available backend, got 'cpp': "
            f"{_native.why_unavailable()}"
        )
    if name == "triton" and not interpreting():
        raise NotImplementedError(
            "force_backend: name must be an available backend, got 'triton': on CPU it needs "
            f"TRITON_INTERPRET=1 in the environment; {why_no_triton() or 'it is not set'}"
        )
    _forced_backend = name


def forced_backend() -> str | None:
    """Return the backend that `force_backend` chose, or None."""
    return _forced_backend


def _lazy(module: str, name: str, reference: Implementation, pure: bool) -> Implementation:
    """The Triton implementation, imported at its first call.

    What a pure op does inside is hidden from autograd: a view that it returns is then no view to
    be changed in place, and every torch op in it takes less time.
    """
    below = torch._C._AutoDispatchBelowADInplaceOrView if pure else contextlib.nullcontext

    @functools.cache
    def kernel() -> Implementation:
        found: Implementation = getattr(importlib.import_module(module), name)
        return found

    def run(*args: Any, **kwargs: Any) -> Any:
        with below():
            result = kernel()(*args, **kwargs)
        return reference(*args, **kwargs) if result is NotImplemented else result

    return run


def _warning_once(reference: Implementation) -> Implementation:
    def fallback(*args: Any, **kwargs: Any) -> Any:
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(
                "feinwerk: the native extension is not available "
                f"({_native.why_unavailable()}); CPU ops run the slow reference backend. "
                "feinwerk.backends.describe() shows what serves each op.",
                RuntimeWarning,
                stacklevel=2,
            )
        return reference(*args, **kwargs)

    return fallback
