"""Launches of softpick over the rows of a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softpick.ops.triton import dispatch, tuning
from softpick.ops.triton.dispatch import capability
from softpick.ops.triton.kernel_cache import run
from softpick.ops.triton.launching import tried
from softpick.ops.triton.rows import (
    rows_backward,
    rows_backward_long,
    rows_forward,
    rows_forward_long,
)
from softpick.ops.triton.shapes import cdiv, power_of_2

__all__ = ["softpick_backward", "softpick_forward"]


def _registers(warps: int) -> int:
    """How many registers a thread may have if so many warps are to run on a multiprocessor."""
    return min(255, 65536 // (32 * warps) // 8 * 8)


def _row_options(x: Tensor, launch: tuning.Rows) -> dict[str, Any]:
    # 1024 threads are the most a program may have; AMD's warps have 64
    spec = {
        "EXACT": x.dtype == torch.float32,
        "num_warps": min(launch.warps, 32 if torch.version.hip is None else 16),
    }
    if launch.programs and capability(x):
        spec["maxnreg"] = _registers(launch.warps * launch.programs)
    return spec


def _short(launch: tuning.Rows, x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and compile-time arguments where a program holds whole rows of ``(rows, n)``."""
    rows, n = x.shape
    block = power_of_2(n)
    together = max(1, launch.elements // block)
    return (cdiv(rows, together),), {"ROWS": together, "N": block, **_row_options(x, launch)}


_LONG = {"N": 4096, "num_warps": 16}


def _ring(kind: str, x: Tensor) -> tuple[int, int, Tensor, dict[str, Any]]:
    """(programs in all, programs a row, zeros for their words, compile-time arguments) of ``hopper/rows.py`` for ``(rows, n)``.

    Programs wait for each other: the registers of one are limited to its share, and the launch is cooperative, which fails if
    they do not fit.
    """
    launch = tuning.HOPPER_ROWS[kind, x.element_size()]
    rows, n = x.shape
    segments = cdiv(n, launch.entries)
    together = min(rows, launch.programs * tuning.multiprocessors(x.device.index or 0) // segments)
    words = launch.warps if segments * launch.warps <= tuning.MOST_WORDS else 1
    shape = {
        "WIDTH": launch.chunk // launch.warps,
        "CHUNKS": launch.entries // launch.chunk,
        "STAGES": launch.stages,
        "WORDS": words,
        "COUNT": power_of_2(segments * words),
        "num_warps": launch.warps,
        "maxnreg": _registers(launch.warps * launch.programs),
        "launch_cooperative_grid": True,
    }
    sums = 2 if kind == "forward" and x.element_size() == 2 else 1  # quick ones, and others where those are not sound
    zeros = torch.zeros(sums, rows, segments * words, dtype=torch.int64, device=x.device)
    return together * segments, segments, zeros, shape


def _forward_ring(x: Tensor, eps: float, y: Tensor, lse: Tensor) -> bool:
    """:func:`softpick_forward` by ``hopper/rows.py``; true when it is launched."""
    programs, segments, words, shape = _ring("forward", x)
    (rows, n), entries = x.shape, 16 // x.element_size()
    run(
        dispatch.hopper.rows_forward_ring, (programs,),
        x, y, lse, words, rows, n // entries, x.stride(0) // entries, eps, segments, **shape
    )  # fmt: skip
    return True


def _backward_ring(x: Tensor, lse: Tensor, grad: Tensor, dx: Tensor) -> bool:
    """:func:`softpick_backward` by ``hopper/rows.py``; true when it is launched."""
    programs, segments, words, shape = _ring("backward", x)
    (rows, n), entries = x.shape, 16 // x.element_size()
    run(
        dispatch.hopper.rows_backward_ring, (programs,),
        x, lse, grad, dx, words, rows, n // entries, x.stride(0) // entries, grad.stride(0) // entries, segments, **shape
    )  # fmt: skip
    return True


def softpick_forward(x: Tensor, eps: float, y: Tensor, lse: Tensor, without: frozenset[str] = frozenset()) -> None:
    """Softpick over the rows of a matrix ``(rows, n)`` with unit stride in a row, into contiguous ``y`` and ``lse``."""
    rows, n = x.shape
    if rows == 0 or n == 0:
        return
    short = tuning.rows("forward", n, x.element_size())
    if short is not None:
        grid, shape = _short(short, x)
        run(rows_forward, grid, x, y, lse, rows, n, x.stride(0), eps, **shape)
        return
    if dispatch.rows_kernel("forward", x, (), without).hopper and tried(_forward_ring, x, eps, y, lse):
        return
    run(rows_forward_long, (rows,), x, y, lse, n, x.stride(0), eps, EXACT=x.dtype == torch.float32, **_LONG)


def softpick_backward(x: Tensor, lse: Tensor, grad: Tensor, dx: Tensor, without: frozenset[str] = frozenset()) -> None:
    """Gradient of :func:`softpick_forward` into contiguous ``dx``; ``grad`` with unit stride in a row."""
    rows, n = x.shape
    if rows == 0 or n == 0:
        return
    short = tuning.rows("backward", n, x.element_size())
    if short is not None:
        grid, shape = _short(short, x)
        run(rows_backward, grid, x, lse, grad, dx, rows, n, x.stride(0), grad.stride(0), **shape)
        return
    if dispatch.rows_kernel("backward", x, (grad,), without).hopper and tried(_backward_ring, x, lse, grad, dx):
        return
    run(
        rows_backward_long, (rows,),
        x, lse, grad, dx, n, x.stride(0), grad.stride(0), EXACT=x.dtype == torch.float32, **_LONG
    )  # fmt: skip
