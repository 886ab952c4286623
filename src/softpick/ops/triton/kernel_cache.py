"""Cache compiled kernels by their launch arguments; raise one kind of error for kernels that cannot be built.

Before each launch Triton works out anew what every argument means for the compiled kernel: which integers are 1 or multiples of
16, which pointers are aligned. That takes Python as long as small kernels take the GPU. Arguments that are equal to earlier
ones mean the same, so their kernel is kept (:func:`run`). Where a caller knows that nothing but the addresses of tensors
changes, it keeps a :class:`Launch`, which puts in the addresses and asks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from softpick.ops.kernel_errors import KernelError

try:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
except ImportError:  # another version, of which nothing is remembered
    TMA_DTYPE_DEVICE_TO_HOST = {}

__all__ = ["Launch", "described", "remembered", "run"]

T = TypeVar("T")

# remembered kernels are called as their own runner calls them, which has been tried with this version
_REMEMBERS = triton.__version__.startswith("3.6.") and torch.version.hip is None
_MOST = 4096  # lengths that differ from call to call should not fill the memory
_known: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
_plans: dict[Hashable, Any] = {}

_failed: dict[tuple[Any, ...], str] = {}


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
    """``kernel[grid](*args, **constants)`` on the current device.

    Returns:
        The compiled kernel, if it may be launched again without its runner, and the values of its constants.

    Raises:
        KernelError: where this variant of the kernel could not be built or launched, now or before: another Triton, a
            device with too little shared memory. Memory that has run out is not of that kind.
    """
    if _failed:
        cause = _failed.get(_variant(kernel, args, constants))
        if cause is not None:
            raise KernelError(_name(kernel), cause)
    if not _usual(kernel):
        _first(kernel, grid, args, constants)
        return None
    key = (kernel, driver.active.get_current_device(), *map(_meaning, args), *constants.values())
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST:
            _known.clear()
        compiled = _first(kernel, grid, args, constants)
        if compiled is not None:  # a hook may have taken it
            found = _known[key] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]
        return found
    compiled, rest = found
    compiled[(*grid, 1, 1)[:3]](*args, *rest)
    return found


def _usual(kernel: Any) -> bool:
    """Whether a kernel runs on a GPU in the usual way: not interpreted, replaced for a test, or compiled without a GPU."""
    usual = isinstance(kernel, JITFunction) and type(kernel).run.__module__ == "triton.runtime.jit"
    return _REMEMBERS and usual and not kernel.pre_run_hooks


def remembered(kernel: Any, key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` has made for this key before; anew where ``kernel`` is not launched in the usual way."""
    found: T | None = _plans.get(key)
    if found is None or not _usual(kernel):
        found = make()
        if _usual(kernel):
            if len(_plans) >= _MOST:
                _plans.clear()
            _plans[key] = found
    return found


def described(x: Tensor | None) -> Hashable:
    """What of a tensor decides how kernels are launched: all but its address."""
    return None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() & 15)


class Launch:
    """A kernel with its grid and all arguments but tensors, for tensors that agree in what :func:`described` says.

    The second launch and later ones put addresses into the arguments of the first, and describe tensors to the tensor memory
    accelerator by what was found out for the first.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], rest: tuple[Any, ...], constants: dict[str, Any],
        tiles: tuple[Callable[[Tensor], Any], ...] = (),
    ) -> None:  # fmt: skip
        """``rest``: the arguments after the tensors; ``tiles``: for the first tensors, what describes them."""
        self._call = kernel, grid, rest, constants, tiles
        self._again: tuple[Any, ...] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current device; errors as :func:`run`."""
        before, after = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
        if self._again is None or getattr(before, "calls", before) or getattr(after, "calls", after):
            self._first(tensors)
            return
        start, grid, head, template, places, describe = self._again
        args = template.copy()
        for x, (place, how) in zip(tensors, places, strict=True):
            if how is not None:
                args[place] = describe(x.data_ptr(), *how)  # type: ignore[union-attr]
            elif x is not None:
                args[place] = x.data_ptr()
        active = driver.active
        start(*grid, active.get_current_stream(active.get_current_device()), *head, *args)

    def _first(self, tensors: tuple[Tensor | None, ...]) -> None:
        kernel, grid, rest, constants, tiles = self._call
        descriptions = [make(x) for make, x in zip(tiles, tensors, strict=False)]  # type: ignore[arg-type]
        found = run(kernel, grid, *descriptions, *tensors[len(tiles) :], *rest, **constants)
        if found is not None:
            self._again = _prepared(found, (*grid, 1, 1)[:3], descriptions, tensors, rest)


def _prepared(
    found: tuple[Any, list[Any]], grid: tuple[int, ...], descriptions: list[Any], tensors: tuple[Any, ...], rest: Any
) -> tuple[Any, ...] | None:
    """What :class:`Launch` needs to launch again (Triton 3.6); None for kernels that need memory of their own."""
    compiled, constants = found
    runner = compiled.run
    if runner.global_scratch_size or runner.profile_scratch_size:
        return None
    start, describe, metadata = runner.launch, None, list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    if descriptions:
        if len(metadata) != len(descriptions) or None in metadata:
            return None
        # the function in C behind the one in Python that describes tensors
        start = dict(zip(start.__code__.co_freevars, start.__closure__, strict=True))["launcher"].cell_contents
        describe = driver.active.utils.fill_tma_descriptor
    template: list[Any] = []
    places: list[tuple[int, tuple[Any, ...] | None]] = []
    for x, meta in zip(descriptions, metadata, strict=True):
        kinds = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        how = meta["swizzle"], meta["elem_size"], kinds, meta["block_size"], x.shape, x.strides, 0
        places.append((len(template), how))
        template += [None, *x.shape, *x.strides]
    for _ in tensors[len(descriptions) :]:
        places.append((len(template), None))
        template.append(None)
    template += [*rest, *constants]
    head = (
        compiled.function, runner.launch_cooperative_grid, runner.launch_pdl, None, None, compiled.packed_metadata, None, None,
        None,
    )  # fmt: skip
    return start, grid, head, template, places, describe


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
