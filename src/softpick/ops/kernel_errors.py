"""What happens where a kernel cannot be built: the next slower way of computing the same is used, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["KernelError", "fall_back", "importing_kernels"]


class KernelError(RuntimeError):
    """A kernel that the compiler did not build or the device did not load."""

    def __init__(self, kernel: str, cause: str) -> None:
        super().__init__(f"{kernel} could not be built or launched here ({cause})")


@contextmanager
def importing_kernels() -> Iterator[None]:
    """What goes wrong inside, where modules of kernels are imported, is a :class:`KernelError`: another Triton lacks a name."""
    try:
        yield
    except Exception as error:
        raise KernelError("a module of kernels", f"{type(error).__name__}: {error}") from error


_warned: set[str] = set()


def fall_back(failure: KernelError, instead: str) -> None:
    """Warn, once for every failure, that ``instead`` computes what the kernel does not."""
    message = f"{failure}; {instead}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)
