"""Softpick over the last dimension of a matrix.

A program holds whole rows in registers. Longer rows are shared by programs that run at the same time and add up their parts
(``_shared``), so that a row is still read once; where that is no faster (``tuning.SHARED_ROWS``) or cannot be, one program
reads the row twice (``_long``). Scores are natural, entries of minus infinity are excluded. The backward pass needs only the
input and the lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softpick.ops.triton.tile import INF, LN2, LOG2E

__all__ = [
    "rows_backward",
    "rows_backward_long",
    "rows_backward_shared",
    "rows_forward",
    "rows_forward_long",
    "rows_forward_shared",
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
def _wait(count, parts):
    """Go on when ``parts`` programs have counted; what each wrote before is visible then."""
    while tl.atomic_add(count, 0, sem="acquire") < parts:
        pass


@triton.jit(do_not_specialize=["rows", "parts"])
def rows_forward_shared(
    x, y, lse, part_m, part_total, count, rows, n, x_r, eps, parts,
    N: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """N entries of a row a program, ``parts`` programs a row; all programs run at the same time and take rows in turn.

    ``part_m``, ``part_total``: ``(rows, parts)``; ``count``: ``(rows,)`` zeros. PARTS: a power of two, at least ``parts``.
    """
    first, part, step = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.num_programs(0) // parts
    c, i = part * N + tl.arange(0, N), tl.arange(0, PARTS)
    ahead = tl.load(x + first.to(tl.int64) * x_r + c, mask=c < n, other=-INF)
    for r in tl.range(first, rows, step):
        s = ahead.to(tl.float32)
        m = tl.maximum(tl.max(s, 0), 0.0)
        f = _signed(s, m, EXACT)
        tl.store(part_m + r * parts + part, m)
        tl.store(part_total + r * parts + part, tl.sum(tl.abs(f), 0))
        tl.atomic_add(count + r, 1, sem="release")
        # the next row is on its way while this program waits
        ahead = tl.load(x + tl.cast(r + step, tl.int64) * x_r + c, mask=(c < n) & (r + step < rows), other=-INF)
        _wait(count + r, parts)
        m_i = tl.load(part_m + r * parts + i, mask=i < parts, other=0.0, cache_modifier=".cg")
        total_i = tl.load(part_total + r * parts + i, mask=i < parts, other=0.0, cache_modifier=".cg")
        top = tl.max(m_i, 0)
        total = tl.sum(total_i * tl.exp2((m_i - top) * LOG2E), 0) + eps
        factor = tl.where(total == 0, 0.0, tl.exp2((m - top) * LOG2E) / total)
        out = (tl.maximum(f, 0.0) * factor).to(y.dtype.element_ty)
        tl.store(y + tl.cast(r, tl.int64) * n + c, out, mask=c < n)
        tl.store(lse + r, top + tl.log2(total) * LN2, mask=part == 0)


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


@triton.jit(do_not_specialize=["rows", "parts"])
def rows_backward_shared(
    x, lse, dy, dx, part_inner, count, rows, n, x_r, g_r, parts,
    N: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """As :func:`rows_forward_shared`, but a row is finished one round after its parts were summed up: then the others have
    counted, and nobody waits. (In the forward pass that was slower.)
    """
    first, part, step = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.num_programs(0) // parts
    c, i = part * N + tl.arange(0, N), tl.arange(0, PARTS)
    ahead = tl.load(x + first.to(tl.int64) * x_r + c, mask=c < n, other=-INF)
    ahead_g = tl.load(dy + first.to(tl.int64) * g_r + c, mask=c < n, other=0.0)
    held, slope = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for r in tl.range(first, rows + step, step):
        s, g = ahead.to(tl.float32), ahead_g.to(tl.float32)
        level = _level(lse, r, r < rows)
        e = tl.exp2((s - level) * LOG2E)
        inner = tl.sum(_weight(s, e, tl.exp2(-level * LOG2E), EXACT) * g, 0)
        ahead = tl.load(x + tl.cast(r + step, tl.int64) * x_r + c, mask=(c < n) & (r + step < rows), other=-INF)
        ahead_g = tl.load(dy + tl.cast(r + step, tl.int64) * g_r + c, mask=(c < n) & (r + step < rows), other=0.0)
        tl.store(part_inner + r * parts + part, inner, mask=r < rows)
        tl.atomic_add(count + r, 1, mask=r < rows, sem="release")
        done = r - step
        if done >= 0:
            _wait(count + done, parts)
            inner_i = tl.load(part_inner + done * parts + i, mask=i < parts, other=0.0, cache_modifier=".cg")
            out = (held + slope * tl.sum(inner_i, 0)).to(dx.dtype.element_ty)
            tl.store(dx + tl.cast(done, tl.int64) * n + c, out, mask=c < n)
        held, slope = _gradient(s, e, g, 0.0), _gradient(s, e, 0.0, 1.0)


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
