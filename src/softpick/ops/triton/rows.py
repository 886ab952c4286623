"""Softpick over the last dimension of a matrix.

A program holds whole rows in registers. It reads longer ones twice (``_long``); on Hopper GPUs programs share those and read
them once (``hopper/rows.py``), unless lengths or addresses are odd. Scores are natural, entries of minus infinity are excluded.
The backward pass needs only the input and the lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softpick.ops.triton.base_functions import INF, LN2, LOG2E

__all__ = [
    "rows_backward",
    "rows_backward_long",
    "rows_forward",
    "rows_forward_long",
]


@triton.jit
def _difference(x, e, c, EXACT: tl.constexpr):
    """``c (e^x - 1)`` with ``e = c e^x`` given: the difference, and a series where it would cancel."""
    if EXACT:
        near = c * (x * (1.0 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))))
        return tl.where(tl.abs(x) < 0.25, near, e - c)
    else:  # for 16-bit outputs: to 6e-5 where a row has scores around 20, to 3e-6 where all are small
        near = c * (x * (1.0 + x * (0.5 + x * (1 / 6))))
        return tl.where(tl.abs(x) < 0.03125, near, e - c)


@triton.jit
def _signed(x, m, EXACT: tl.constexpr):
    """``(e^x - 1) e^-m`` without cancellation, 0 for minus infinity."""
    f = _difference(x, tl.exp2((x - m) * LOG2E), tl.exp2(-m * LOG2E), EXACT)
    return tl.where(x == -INF, 0.0, f)


@triton.jit
def _weight(x, e, c, EXACT: tl.constexpr):
    """``relu(e^x - 1) / l``."""
    return tl.where(x > 0, _difference(x, e, c, EXACT), 0.0)


@triton.jit
def _gradient(x, e, dy, inner):
    return e * (tl.where(x > 0, dy, 0.0) + tl.where(x < 0, inner, -inner))  # e is 0 for minus infinity


@triton.jit
def _level(lse, at, inside):
    level = tl.load(lse + at, mask=inside, other=INF)
    return tl.where(level == -INF, INF, level)


@triton.jit(do_not_specialize=["rows"])
def rows_forward(x, y, lse, rows, n, x_r, eps, ROWS: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr):
    """ROWS whole rows a program; ``y`` is contiguous."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.arange(0, N)
    inside = (r[:, None] < rows) & (c[None, :] < n)
    s = tl.load(x + r[:, None] * x_r + c[None, :], mask=inside, other=-INF).to(tl.float32)
    m = tl.maximum(tl.max(s, 1), 0.0)
    f = _signed(s, m[:, None], EXACT)
    total = tl.sum(tl.abs(f), 1) + eps
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    tl.store(
        y + r[:, None] * n + c[None, :], (tl.maximum(f, 0.0) * inverse[:, None]).to(y.dtype.element_ty), mask=inside
    )
    tl.store(lse + r, m + tl.log2(total) * LN2, mask=r < rows)


@triton.jit
def rows_forward_long(x, y, lse, n, x_r, eps, N: tl.constexpr, EXACT: tl.constexpr):
    """One row a program, read twice."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, N)
    x += r * x_r
    y += r * n
    m = tl.full([N], 0.0, tl.float32)
    total = tl.full([N], 0.0, tl.float32)
    for start in tl.range(0, n, N):
        s = tl.load(x + start + c, mask=start + c < n, other=-INF, eviction_policy="evict_last").to(tl.float32)
        high = tl.maximum(m, s)
        total = total * tl.exp2((m - high) * LOG2E) + tl.abs(_signed(s, high, EXACT))
        m = high
    top = tl.max(m, 0)
    one = tl.sum(total * tl.exp2((m - top) * LOG2E), 0) + eps
    inverse = tl.where(one == 0, 0.0, 1.0 / one)
    for start in tl.range(0, n, N):
        s = tl.load(x + start + c, mask=start + c < n, other=-INF, eviction_policy="evict_first").to(tl.float32)
        f = tl.maximum(_signed(s, top, EXACT), 0.0) * inverse
        tl.store(y + start + c, f.to(y.dtype.element_ty), mask=start + c < n)
    tl.store(lse + r, top + tl.log2(one) * LN2)


@triton.jit(do_not_specialize=["rows"])
def rows_backward(x, lse, dy, dx, rows, n, x_r, g_r, ROWS: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr):
    """ROWS whole rows a program; ``dx`` is contiguous."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.arange(0, N)
    inside = (r[:, None] < rows) & (c[None, :] < n)
    s = tl.load(x + r[:, None] * x_r + c[None, :], mask=inside, other=-INF).to(tl.float32)
    g = tl.load(dy + r[:, None] * g_r + c[None, :], mask=inside, other=0.0).to(tl.float32)
    level = _level(lse, r, r < rows)[:, None]
    e = tl.exp2((s - level) * LOG2E)
    inner = tl.sum(_weight(s, e, tl.exp2(-level * LOG2E), EXACT) * g, 1)
    tl.store(dx + r[:, None] * n + c[None, :], _gradient(s, e, g, inner[:, None]).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def rows_backward_long(x, lse, dy, dx, n, x_r, g_r, N: tl.constexpr, EXACT: tl.constexpr):
    """One row a program, read twice."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, N)
    x += r * x_r
    dy += r * g_r
    dx += r * n
    level = tl.load(lse + r)
    level = tl.where(level == -INF, INF, level)
    partial = tl.full([N], 0.0, tl.float32)
    for start in tl.range(0, n, N):
        s = tl.load(x + start + c, mask=start + c < n, other=-INF, eviction_policy="evict_last").to(tl.float32)
        g = tl.load(dy + start + c, mask=start + c < n, other=0.0, eviction_policy="evict_last").to(tl.float32)
        partial += _weight(s, tl.exp2((s - level) * LOG2E), tl.exp2(-level * LOG2E), EXACT) * g
    inner = tl.sum(partial, 0)
    for start in tl.range(0, n, N):
        s = tl.load(x + start + c, mask=start + c < n, other=-INF, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(dy + start + c, mask=start + c < n, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(
            dx + start + c,
            _gradient(s, tl.exp2((s - level) * LOG2E), g, inner).to(dx.dtype.element_ty),
            mask=start + c < n,
        )
