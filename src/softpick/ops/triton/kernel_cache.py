"""Cache compiled kernels by their launch arguments; raise one kind of error for kernels that cannot be built.

Before each launch Triton works out anew what every argument means for the compiled kernel: which integers are 1 or multiples of
16, which pointers are aligned. That takes Python as long as small kernels take the GPU. Arguments that are equal to earlier
ones mean the same, so their kernel is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from softpick.ops.kernel_errors import KernelError

__all__ = ["run"]

# remembered kernels are called as their own runner calls them, which has been tried with this version
_REMEMBERS = triton.__version__.startswith("3.6.") and torch.version.hip is None
_MOST = 4096  # lengths that differ from call to call should not fill the memory
_known: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


_failed: dict[tuple[Any, ...], str] = {}


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the current device.

    Raises:
        KernelError: where this variant of the kernel could not be built or launched, now or before: another Triton, a
            device with too little shared memory. Memory that has run out is not of that kind.
    """
    if _failed:
        cause = _failed.get(_variant(kernel, args, constants))
        if cause is not None:
            raise KernelError(_name(kernel), cause)
    usual = isinstance(kernel, JITFunction) and type(kernel).run.__module__ == "triton.runtime.jit"
    if not (_REMEMBERS and usual) or kernel.pre_run_hooks:
        _first(kernel, grid, args, constants)  # interpreted, replaced for a test, or compiled without a GPU
        return
    key = (kernel, driver.active.get_current_device(), *map(_meaning, args), *constants.values())
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST:
            _known.clear()
        compiled = _first(kernel, grid, args, constants)
        if compiled is not None:  # a hook may have taken it
            _known[key] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]
        return
    compiled, rest = found
    compiled[(*grid, 1, 1)[:3]](*args, *rest)


def _first(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """Launch a kernel that may have to be compiled first, and remember it."""
    try:
        return kernel[grid](*args, **constants)
    except (KernelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a compiler raises: each version of Triton has its own
        root: BaseException = error
        while root.__cause__ is not None:  # Triton wraps an error once for every call in a kernel
            root = root.__cause__
        # the text of a CompilationError begins with a place in a kernel's source and ends with the reason
        said = str(getattr(root, "error_message", None) or root).strip() or "no message"
        cause = f"{type(root).__name__}: {said.splitlines()[0]}; Triton {triton.__version__}"
        _failed[_variant(kernel, args, constants)] = cause
        raise KernelError(_name(kernel), cause) from error


def _name(kernel: Any) -> str:
    return str(getattr(getattr(kernel, "fn", kernel), "__name__", kernel))


def _variant(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """A key of the kernel variant: builds that agree in it fail or succeed alike."""
    dtypes = tuple(x.dtype for x in args if isinstance(x, Tensor))
    return _name(kernel), dtypes, *((name, str(value)) for name, value in constants.items())


def _meaning(x: Any) -> Any:
    """What of an argument decides which compiled kernel takes it (or more than that)."""
    kind = type(x)
    if kind is int:
        return x
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if x is None:
        return None
    if isinstance(x, int):  # a bool is another type
        return kind, x
    if isinstance(x, float):
        return float
    return tuple(x.block_shape), x.layout, x.base.dtype  # for the tensor memory accelerator
