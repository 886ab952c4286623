"""The forward pass: the same formulas as :mod:`softpick.ops.triton.forward`, scheduled by hand.

A warpgroup has two tiles of scores: while it takes exponentials of one, the tensor cores make the other and the product of
the weights before with their values. They belong to two query tiles and the same keys (HALVES 2), or to the same queries and
one key tile after the other (HALVES 1).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from softpick.ops.triton.hopper.tiles import store
from softpick.ops.triton.tile import (
    EXP,
    INF,
    LN2,
    LOG2E,
    NONE,
    ONE,
    POSITIVE,
    SINK,
    assignment,
    kept_scores,
    narrow,
    numerators,
)

__all__ = ["forward_queries"]

_LARGEST = gl.constexpr(2.0**64)  # as in forward.py
_SMALLEST = gl.constexpr(2.0**-64)
PART = gl.constexpr(64)  # keys of a tile of scores


@gluon.jit
def _fetch(
    it, at, end, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """Start copying keys ``at ...`` and their values as tile ``it``, if that is below ``end``."""
    stage = it % STAGES
    wanted = it < end
    bar = ready.index(stage)
    mbarrier.expect(bar, key_tiles.block_type.nbytes + value_tiles.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(key_tiles, [row, head, at, 0], bar, keys.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(value_tiles, [row, head, at, 0], bar, values.index(stage), pred=wanted)


@gluon.jit
def _await(it, end, ready, STAGES: gl.constexpr):
    """Wait for key tile ``it``, if there is one."""
    mbarrier.wait(ready.index(it % STAGES), (it // STAGES) & 1, pred=it < end)


@gluon.jit
def _part(it, part, tiles, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """64 of the keys (or values) of tile ``it``: scores of more take too many registers."""
    return tiles.index(it % STAGES).reshape([BLOCK_N, BLOCK_D]).slice(part * PART, PART)


@gluon.jit
def _scores(q, k, ROWS: gl.constexpr, layout: gl.constexpr):
    """Start the products with 64 keys. Beyond the last tile they are of something else, and nobody looks."""
    zero = gl.zeros([ROWS, PART], gl.float32, layout=layout)
    return warpgroup_mma(q, k.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _row_parts(x):
    """Sums over what a thread holds of a row; the four threads of a row meet at the end only."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return gl.sum(gl.sum(gl.reshape(x, [M, N // 8, 4, 2]), 3), 1)


@gluon.jit
def _seen(s, i, j, reach, tk, BASE: gl.constexpr, RIGHT: gl.constexpr):
    """Scores of the keys that a query does not see: such that they add nothing."""
    seen = (j < tk)[None, :]
    if RIGHT:
        seen = seen & (j[None, :] <= i[:, None] + reach)
    return gl.where(seen, s, -INF if BASE == EXP else 0.0)


@gluon.jit
def _weights(s, m, SHIFT: gl.constexpr, BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr):
    """(numerators before relu, what they add to the denominator)."""
    p = numerators(s, m, BASE, SHIFT, False)
    if not ABSOLUTE:
        p = kept_scores(p, s, RECTIFY)
        return p, p
    return p, gl.abs(p)


@gluon.jit
def _take(
    s, acc, total, at, v, i, reach, tk, unit,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, RIGHT: gl.constexpr, EDGE: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Products with keys ``at ...`` to weights, and start their product with the values."""
    s = s * unit
    if EDGE:
        s = _seen(s, i, at + gl.arange(0, PART, layout=gl.SliceLayout(0, s_layout)), reach, tk, BASE, RIGHT)
    p, g = _weights(s, 0.0, False, BASE, RECTIFY, ABSOLUTE)
    total += _row_parts(g)
    p = narrow(p, v, RECTIFY == POSITIVE, RECTIFY == POSITIVE)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, o_layout, 2))
    return warpgroup_mma(p, v, acc, is_async=True), total


@gluon.jit
def _key_tile(
    it, count, s, acc_a, acc_b, total_a, total_b, qa, qb, head, row, key_tiles, value_tiles, keys, values, ready, ia, ib,
    reach, tk, unit,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, RIGHT: gl.constexpr, HALVES: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, EDGE: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """A key tile into the query tiles. The first scores ``s`` are there; on return those of the next key tile are.

    While weights are taken, the product of the weights before with their values and the next scores are under way. ptxas
    keeps products asynchronous only if no scores are on their way around a loop: hence the wait at the end, which has
    nothing to wait for but scores that were started before the weights.
    """
    for part in gl.static_range(BLOCK_N // PART):
        at = it * BLOCK_N + part * PART
        v = _part(it, part, values, BLOCK_N, BLOCK_D, STAGES)
        if HALVES == 2:
            following = _scores(qb, _part(it, part, keys, BLOCK_N, BLOCK_D, STAGES), ROWS, s_layout)
            acc_a, total_a = _take(
                s, acc_a, total_a, at, v, ia, reach, tk, unit,
                BASE, RECTIFY, ABSOLUTE, RIGHT, EDGE, s_layout, o_layout,
            )  # fmt: skip
            s = warpgroup_mma_wait(num_outstanding=1, deps=[following])
            if part == 0:
                _refill(it, count, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N, STAGES)
        if part + 1 < BLOCK_N // PART:
            k = _part(it, part + 1, keys, BLOCK_N, BLOCK_D, STAGES)
        else:
            _await(it + 1, count, ready, STAGES)
            k = _part(it + 1, 0, keys, BLOCK_N, BLOCK_D, STAGES)
        following = _scores(qa, k, ROWS, s_layout)
        if HALVES == 2:
            acc_b, total_b = _take(
                s, acc_b, total_b, at, v, ib, reach, tk, unit,
                BASE, RECTIFY, ABSOLUTE, RIGHT, EDGE, s_layout, o_layout,
            )  # fmt: skip
        else:
            acc_a, total_a = _take(
                s, acc_a, total_a, at, v, ia, reach, tk, unit,
                BASE, RECTIFY, ABSOLUTE, RIGHT, EDGE, s_layout, o_layout,
            )  # fmt: skip
        s = warpgroup_mma_wait(num_outstanding=1, deps=[following])
        if HALVES == 1 and part == 0:
            _refill(it, count, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N, STAGES)
    return s, acc_a, acc_b, total_a, total_b


@gluon.jit
def _refill(
    it, count, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """Every product of the tile before has ended, for every warp once they have met: its place can be filled again."""
    gl.thread_barrier()
    ahead = it + STAGES - 1
    _fetch(ahead, ahead * BLOCK_N, count, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N, STAGES)


@gluon.jit
def _again(
    it, at, acc, total, m, q, keys, values, i, reach, tk, unit,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, RIGHT: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """A key tile into a query tile with a running maximum ``m``, one step after the other."""
    for part in gl.static_range(BLOCK_N // PART):
        s = _scores(q, _part(it, part, keys, BLOCK_N, BLOCK_D, STAGES), ROWS, s_layout)
        s = warpgroup_mma_wait(0, deps=[s]) * unit
        j = at + part * PART + gl.arange(0, PART, layout=gl.SliceLayout(0, s_layout))
        s = _seen(s, i, j, reach, tk, BASE, RIGHT)
        high = gl.maximum(m, gl.max(s, 1))
        fresh = gl.where(high == -INF, 0.0, high)  # as in forward.py
        factor = gl.exp2(m - fresh)
        p, g = _weights(s, fresh[:, None], True, BASE, RECTIFY, ABSOLUTE)
        total = total * factor + gl.sum(g, 1)
        m = high
        v = _part(it, part, values, BLOCK_N, BLOCK_D, STAGES)
        p = narrow(p, v, RECTIFY == POSITIVE, RECTIFY == POSITIVE)
        p = gl.convert_layout(p, gl.DotOperandLayout(0, o_layout, 2))
        acc *= gl.convert_layout(factor, gl.SliceLayout(1, o_layout))[:, None]
        acc = warpgroup_mma(p, v, acc)
    return acc, total, m


@gluon.jit
def _unsound(acc, total, logit, count, ANCHORED: gl.constexpr, CONSTANT: gl.constexpr):
    """Whether a sum left the safe range, so that the keys are taken again with a running maximum."""
    sound = total < _LARGEST
    if not ANCHORED:
        sound = sound & ((total > _SMALLEST) | (count == 0))
    if CONSTANT == SINK:
        sound = sound & (logit < 64.0)
    return gl.max(gl.where(sound, 0, 1), 0) + gl.max(gl.max(gl.where(gl.abs(acc) < 3.0e38, 0, 1), 1), 0)


@gluon.jit
def _finish(
    acc, total, m, logit, eps, i0, tq, v_width, out, lse, o_t, o_d, l_t,
    BASE: gl.constexpr, CONSTANT: gl.constexpr, ROWS: gl.constexpr, BLOCK_D: gl.constexpr, num_warps: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Normalize and write rows ``i0 ...`` of one head."""
    m = gl.where(m == -INF, 0.0, m)
    if CONSTANT == ONE:
        total += gl.exp2(-m)
    elif CONSTANT == SINK:
        total += gl.exp2(logit - m)
    total += eps  # relative to m
    inverse = gl.convert_layout(gl.where(total == 0, 0.0, 1.0 / total), gl.SliceLayout(1, layout))
    store(out, acc * inverse[:, None], i0, tq, v_width, o_t, o_d, ROWS, BLOCK_D, num_warps)
    i = i0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32, 1], [num_warps, 1], [1, 0])))
    level = gl.convert_layout((m + gl.log2(total)) * LN2, i.type.layout)
    gl.store(lse + i * l_t, level, mask=i < tq)


@gluon.jit(
    do_not_specialize=["heads", "tiles", "pairs", "together", "groups", "tq", "tk", "v_width", "right", "l_b", "l_h"]
)
def forward_queries(
    query_tiles, key_tiles, value_tiles, out, lse, sink, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    tiles, heads, pairs, together, groups, tq, tk, v_width, right, unit, eps,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, CONSTANT: gl.constexpr,
    NEGATIVE_GRADIENT: gl.constexpr, HALVES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr, RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``out`` and ``lse`` of HALVES times 16 num_warps queries. Grid as in ``forward.py``."""
    ROWS: gl.constexpr = 16 * num_warps
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, PART, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_D, 16])
    ANCHORED: gl.constexpr = BASE != EXP or RECTIFY != NONE or CONSTANT != 0
    tile, h, b = assignment(tiles, heads, pairs, together)
    i0 = (tiles - 1 - tile) * (HALVES * ROWS)  # under a causal mask the last queries see the most keys
    reach = right
    if BOTTOM_RIGHT:
        reach += tk - tq
    hi, full = tk, tk  # keys that a query of the program sees, and those that every one sees
    if RIGHT:
        hi = gl.maximum(0, gl.minimum(tk, i0 + HALVES * ROWS + reach))
        full = gl.maximum(0, gl.minimum(tk, i0 + reach + 1))
    count, whole = gl.cdiv(hi, BLOCK_N), full // BLOCK_N
    row, head = b.to(gl.int32), (h // groups).to(gl.int32)
    queries = gl.allocate_shared_memory(gl.bfloat16, [HALVES] + query_tiles.block_type.shape, query_tiles.layout)  # noqa: RUF005
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + key_tiles.block_type.shape, key_tiles.layout)  # noqa: RUF005
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + value_tiles.block_type.shape, value_tiles.layout)  # noqa: RUF005
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES + 1):
        mbarrier.init(ready.index(stage), count=1)
    bar = ready.index(STAGES)
    mbarrier.expect(bar, HALVES * query_tiles.block_type.nbytes)
    for half in gl.static_range(HALVES):
        tma.async_copy_global_to_shared(
            query_tiles, [row, h.to(gl.int32), i0 + half * ROWS, 0], bar, queries.index(half)
        )
    for it in gl.static_range(STAGES - 1):
        _fetch(it, it * BLOCK_N, count, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N, STAGES)
    ia = i0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    ib = ia + ROWS
    zero = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=o_layout)
    acc_a, acc_b = warpgroup_mma_init(zero), warpgroup_mma_init(zero)
    total_a = _row_parts(gl.zeros([ROWS, PART], gl.float32, layout=s_layout))
    total_b = total_a
    mbarrier.wait(bar, 0)
    qa, qb = queries.index(0).reshape([ROWS, BLOCK_D]), queries.index(HALVES - 1).reshape([ROWS, BLOCK_D])
    if IN_REGISTERS > 0:
        qa = qa.load(gl.DotOperandLayout(0, s_layout, 2))
    if IN_REGISTERS > 1 or HALVES == 1:
        qb = qa if HALVES == 1 else qb.load(gl.DotOperandLayout(0, s_layout, 2))
    _await(0, count, ready, STAGES)
    s = _scores(qa, _part(0, 0, keys, BLOCK_N, BLOCK_D, STAGES), ROWS, s_layout)
    s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
    for it in range(0, whole):
        s, acc_a, acc_b, total_a, total_b = _key_tile(
            it, count, s, acc_a, acc_b, total_a, total_b, qa, qb, head, row, key_tiles, value_tiles, keys, values, ready,
            ia, ib, reach, tk, unit,
            BASE, RECTIFY, ABSOLUTE, RIGHT, HALVES, ROWS, BLOCK_N, BLOCK_D, STAGES, False, s_layout, o_layout,
        )  # fmt: skip
    for it in range(whole, count):
        s, acc_a, acc_b, total_a, total_b = _key_tile(
            it, count, s, acc_a, acc_b, total_a, total_b, qa, qb, head, row, key_tiles, value_tiles, keys, values, ready,
            ia, ib, reach, tk, unit,
            BASE, RECTIFY, ABSOLUTE, RIGHT, HALVES, ROWS, BLOCK_N, BLOCK_D, STAGES, True, s_layout, o_layout,
        )  # fmt: skip
    acc_a, acc_b = warpgroup_mma_wait(num_outstanding=0, deps=[acc_a, acc_b])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    total_a, total_b = gl.convert_layout(gl.sum(total_a, 1), rows), gl.convert_layout(gl.sum(total_b, 1), rows)
    m_a = gl.zeros([ROWS], gl.float32, layout=rows)
    m_b = m_a
    logit = 0.0
    if CONSTANT == SINK:
        logit = gl.load(sink + h).to(gl.float32) * LOG2E
    trouble = _unsound(acc_a, total_a, logit, count, ANCHORED, CONSTANT)
    if HALVES == 2:
        trouble += _unsound(acc_b, total_b, logit, count, ANCHORED, CONSTANT)
    if trouble > 0:
        anchor = 0.0 if ANCHORED else -INF
        if CONSTANT == SINK:
            anchor = gl.maximum(anchor, logit)
        acc_a, acc_b, total_a, total_b = zero, zero, m_a, m_a
        m_a += anchor
        m_b = m_a
        end = 2 * count  # tiles are counted on, for the barriers
        gl.thread_barrier()
        for it in gl.static_range(STAGES - 1):
            _fetch(
                count + it, it * BLOCK_N, end, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N, STAGES
            )
        for it in range(count, end):
            at = (it - count) * BLOCK_N
            _await(it, end, ready, STAGES)
            acc_a, total_a, m_a = _again(
                it, at, acc_a, total_a, m_a, qa, keys, values, ia, reach, tk, unit,
                BASE, RECTIFY, ABSOLUTE, RIGHT, ROWS, BLOCK_N, BLOCK_D, STAGES, s_layout, o_layout,
            )  # fmt: skip
            if HALVES == 2:
                acc_b, total_b, m_b = _again(
                    it, at, acc_b, total_b, m_b, qb, keys, values, ib, reach, tk, unit,
                    BASE, RECTIFY, ABSOLUTE, RIGHT, ROWS, BLOCK_N, BLOCK_D, STAGES, s_layout, o_layout,
                )  # fmt: skip
            gl.thread_barrier()
            ahead = STAGES - 1
            _fetch(
                it + ahead,
                at + ahead * BLOCK_N,
                end,
                head,
                row,
                key_tiles,
                value_tiles,
                keys,
                values,
                ready,
                BLOCK_N,
                STAGES,
            )
    for stage in gl.static_range(STAGES + 1):
        mbarrier.invalidate(ready.index(stage))
    out += b * o_b + h * o_h
    lse += b * l_b + h * l_h
    _finish(
        acc_a, total_a, m_a, logit, eps, i0, tq, v_width, out, lse, o_t, o_d, l_t,
        BASE, CONSTANT, ROWS, BLOCK_D, num_warps, o_layout,
    )  # fmt: skip
    if HALVES == 2:
        _finish(
            acc_b, total_b, m_b, logit, eps, i0 + ROWS, tq, v_width, out, lse, o_t, o_d, l_t,
            BASE, CONSTANT, ROWS, BLOCK_D, num_warps, o_layout,
        )  # fmt: skip
