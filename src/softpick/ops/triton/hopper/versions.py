"""What Gluon calls differently in the versions of Triton from 3.6 to 3.9. Kernels in this folder take these names from here."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["barrier", "load_entries", "load_tile", "reinterpret", "store_tile"]


def _first(holder: Any, *names: str) -> Any:
    """The function that ``holder`` has under one of these names, the newest first."""
    for name in names:
        if hasattr(holder, name):
            return getattr(holder, name)
    raise ImportError(f"Triton's {holder.__name__} should have one of {', '.join(names)}")


barrier = _first(gl, "barrier", "thread_barrier")  # renamed in 3.7
load_tile = _first(tma, "async_load", "async_copy_global_to_shared")  # this and the two below: renamed in 3.8
store_tile = _first(tma, "async_store", "async_copy_shared_to_global")
load_entries = _first(async_copy, "async_load", "async_copy_global_to_shared")
reinterpret = _first(gl.shared_memory_descriptor, "reinterpret", "_reinterpret")  # renamed in 3.9
