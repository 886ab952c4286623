"""What the kernels for Hopper GPUs share: tiles for the tensor memory accelerator, and writing one back."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from softpick.ops.triton.device import narrow_gradient

__all__ = ["row_tiles", "store", "tiles"]


def tiles(x: Tensor, block: list[int]) -> TensorDescriptor:
    """``x`` for the tensor memory accelerator, which fetches blocks of it (16 bits; strides in multiples of 8)."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _shared(tuple(block)))


def row_tiles(statistics: Tensor, rows: int) -> TensorDescriptor:
    """Statistics of rows, ``(B, H, 4, T)`` in fp32, as blocks of ``rows``; each of the four is read by itself: no swizzling."""
    return TensorDescriptor(
        statistics, list(statistics.shape), list(statistics.stride()), [1, 1, 4, rows], gl.NVMMASharedLayout(0, 32, 4)
    )


@functools.cache
def _shared(block: tuple[int, ...]) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)  # as of any 16 bits


@gluon.jit
def store(
    base,
    x,
    first,
    length,
    width,
    stride_t,
    stride_d,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Rows ``first ...`` of a gradient of one head, as far as there are rows and columns."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (COLUMNS // 8), COLUMNS // 8], [num_warps, 1], [1, 0])
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    at = base + (first + n).to(gl.int64)[:, None] * stride_t + d[None, :] * stride_d
    inside = (first + n < length)[:, None] & (d < width)[None, :]
    gl.store(at, gl.convert_layout(narrow_gradient(x, base.dtype.element_ty, True), layout), mask=inside)
