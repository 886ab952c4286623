"""The backward pass: the same formulas as :mod:`softpick.ops.triton.backward`, explicitly scheduled.

Triton waits for a matrix product before it goes on. Here a product runs while the results of another are worked on: of every
tile ``S`` and ``dP`` start together, exponentials are taken while ``dP`` runs, the gradient of the scores while ``dV`` runs,
and ``dK`` (or ``dQ``) runs into the next tile. The tensor memory accelerator fetches tiles and fills with zeros what lies
beyond the end: a query of zeros with a weight of zero adds nothing to ``dK`` and ``dV``.

:func:`softpick.ops.triton.dispatch.backward_kernel` has the conditions; other calls take the kernels for every GPU.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from softpick.ops.triton.base_functions import EXPM1, needs_relu, score_gradient, slopes, weights
from softpick.ops.triton.device import SHRINK_ROWS, assignment, fast_tanh, growth, narrow, narrow_gradient
from softpick.ops.triton.hopper.descriptors import store
from softpick.ops.triton.hopper.versions import barrier, load_tile

__all__ = ["backward_keys", "backward_queries"]


@gluon.jit
def _fetch(it, count, head, row, first, second, firsts, seconds, ready, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """Start copying tile ``it`` of two tensors."""
    stage = it % STAGES
    wanted = it < count
    at = it * BLOCK
    bar = ready.index(stage)
    mbarrier.expect(bar, first.block_type.nbytes + second.block_type.nbytes, pred=wanted)
    load_tile(first, [row, head, at, 0], bar, firsts.index(stage), pred=wanted)
    load_tile(second, [row, head, at, 0], bar, seconds.index(stage), pred=wanted)


@gluon.jit
def _fetch_queries(
    it, n, h, count, per_head, lo, row, query_tiles, grad_tiles, row_tiles, queries, grads, rows, ready,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start copying tile ``it``, the ``n``-th of head ``h``; returns the indices of the next one.

    With it come the statistics of its rows: every warp would wait for them if it read them by itself.
    """
    stage = it % STAGES
    wanted = it < count
    at = lo + n * BLOCK
    bar = ready.index(stage)
    nbytes: gl.constexpr = query_tiles.block_type.nbytes + grad_tiles.block_type.nbytes + row_tiles.block_type.nbytes
    mbarrier.expect(bar, nbytes, pred=wanted)
    load_tile(query_tiles, [row, h, at, 0], bar, queries.index(stage), pred=wanted)
    load_tile(grad_tiles, [row, h, at, 0], bar, grads.index(stage), pred=wanted)
    load_tile(row_tiles, [row, h, 0, at], bar, rows.index(stage), pred=wanted)
    last = n + 1 == per_head
    return gl.where(last, 0, n + 1), gl.where(last, h + 1, h)


@gluon.jit
def _room(held, held_too, passing, passing_too, coordinates, STAGES: gl.constexpr):
    """Shared memory for two tiles that are held, fetched from ``coordinates`` at once, for two that pass in STAGES, and the
    barriers: one a stage, the last for the tiles that are held.
    """
    dtype: gl.constexpr = held.block_type.element_ty
    first = gl.allocate_shared_memory(dtype, [STAGES] + passing.block_type.shape, passing.layout)  # noqa: RUF005 (no stars in Triton)
    second = gl.allocate_shared_memory(dtype, [STAGES] + passing_too.block_type.shape, passing_too.layout)  # noqa: RUF005
    one = gl.allocate_shared_memory(dtype, held.block_type.shape, held.layout)
    other = gl.allocate_shared_memory(dtype, held_too.block_type.shape, held_too.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES + 1):
        mbarrier.init(ready.index(stage), count=1)
    bar = ready.index(STAGES)
    mbarrier.expect(bar, held.block_type.nbytes + held_too.block_type.nbytes)
    load_tile(held, coordinates, bar, one)
    load_tile(held_too, coordinates, bar, other)
    return one, other, first, second, ready


@gluon.jit
def _grow(q, statistics, s_layout: gl.constexpr, num_warps: gl.constexpr):
    """Multiply the queries of a tile, where they are, by what their ``ds`` has to be divided by in fp16: backward.py's rule.

    The last of the ``statistics`` becomes the factor of ``ds``.
    """
    WIDTH: gl.constexpr = q.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [num_warps, 1], [1, 0])
    wide = q.load(layout).to(gl.float32)
    shrink = gl.max(statistics.slice(3, 1).load(s_layout), 0)
    grow = growth(gl.convert_layout(shrink, gl.SliceLayout(1, layout)), gl.max(gl.abs(wide), 1))
    q.store((wide * grow[:, None]).to(gl.float16))
    factor = gl.convert_layout(1.0 / grow, gl.SliceLayout(0, s_layout))
    barrier()  # the last statistic has been read
    statistics.slice(3, 1).store(factor[None, :])
    fence_async_shared()
    barrier()


@gluon.jit
def _last_shrunk(least, blocks, groups, num_warps: gl.constexpr):
    """End of the last block of rows in which ``ds`` of a row has to be divided, of the heads of a group."""
    end = 0
    for first in range(0, blocks, 32 * num_warps):
        at = first + gl.arange(0, 32 * num_warps, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
        for group in range(groups):
            found = gl.load(least + group * blocks + at, mask=at < blocks, other=1.0) < 1
            end = gl.maximum(end, gl.max(gl.where(found, at + 1, 0), 0))
    return end


@gluon.jit
def _tile_of_keys(
    it, at, next_n, next_h, count, per_head, lo, row, dk, dv, keys, values, query_tiles, grad_tiles, row_tiles, queries, grads,
    rows, ready, j2, reach, unit, cap,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, NEGATIVE_GRADIENT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, EDGE: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Add one query tile to ``dk`` and ``dv``; tiles are transposed, keys by queries.

    EDGE: with the mask, and with what fp16 needs where a denominator is below 1.
    """
    stage = it % STAGES
    mbarrier.wait(ready.index(stage), (it // STAGES) & 1)
    statistics = rows.index(stage).reshape([4, BLOCK_M])
    q, do = queries.index(stage).reshape([BLOCK_M, BLOCK_D]), grads.index(stage).reshape([BLOCK_M, BLOCK_D])
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=s_layout)
    s = warpgroup_mma(keys, q.permute([1, 0]), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(values, do.permute([1, 0]), zero, use_acc=False, is_async=True)
    s, dk, dv = warpgroup_mma_wait(num_outstanding=1, deps=[s, dk, dv])
    # every product of the tile before has ended, for every warp once they have met: its buffer can be filled again
    barrier()
    next_n, next_h = _fetch_queries(
        it + STAGES - 1, next_n, next_h, count, per_head, lo, row, query_tiles, grad_tiles, row_tiles, queries, grads, rows,
        ready, BLOCK_M, STAGES,
    )  # fmt: skip
    HALF: gl.constexpr = EDGE and q.dtype == gl.float16
    if HALF:  # noqa: SIM102 (only the first is known when it is compiled)
        if gl.min(gl.min(statistics.slice(3, 1).load(s_layout), 1), 0) < 1:
            _grow(q, statistics, s_layout, num_warps)
    bent = s
    if SOFTCAP:
        bent = fast_tanh(s * unit)
        s = cap * bent
        e = gl.exp2(s - statistics.slice(0, 1).load(s_layout))
    else:
        e = gl.exp2(s * unit - statistics.slice(0, 1).load(s_layout))
    if EDGE and RIGHT:
        i = at + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))
        e = gl.where(j2 <= i[None, :] + reach, e, 0.0)
    p, e = slopes(s * unit if EDGE and not SOFTCAP else s, e, statistics.slice(1, 1).load(s_layout), BASE, False, EDGE)
    p = narrow(weights(p, e, s, BASE, RECTIFY), do, needs_relu(BASE), needs_relu(BASE))
    if SOFTCAP:
        e *= 1.0 - bent * bent
    p = gl.convert_layout(p, gl.DotOperandLayout(0, o_layout, 2))
    dv = warpgroup_mma(p, do, dv, is_async=True)
    delta = statistics.slice(2, 1).load(s_layout)
    dp = warpgroup_mma_wait(num_outstanding=1, deps=[dp])
    ds = score_gradient(s, e, dp, delta, 0.0, BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, False)
    if HALF:
        ds *= statistics.slice(3, 1).load(s_layout)
    ds = gl.convert_layout(narrow_gradient(ds, q.dtype, True), gl.DotOperandLayout(0, o_layout, 2))
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    return dk, dv, next_n, next_h


@gluon.jit(do_not_specialize=["heads", "tiles", "pairs", "together", "tq", "tk", "right"])
def backward_keys(
    query_tiles, key_tiles, value_tiles, grad_tiles, row_tiles, least, dkey, dvalue,
    dk_b, dk_h, dk_t, dk_d, dv_b, dv_h, dv_t, dv_d,
    tiles, heads, pairs, together, groups, tq, tk, width, v_width, right, unit, cap, scale,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, CONSTANT: gl.constexpr,
    NEGATIVE_GRADIENT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr, RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``dK`` and ``dV`` of one key tile, summed over the query heads of its group. Grid as in ``backward.py``."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_D, 16])
    tile, kv, b = assignment(tiles, heads // groups, pairs, together)
    j0 = tile * BLOCK_N
    reach = right
    if BOTTOM_RIGHT:
        reach += tk - tq
    row, head = b.to(gl.int32), (kv * groups).to(gl.int32)
    keys, values, queries, grads, ready = _room(
        key_tiles, value_tiles, query_tiles, grad_tiles, [row, kv.to(gl.int32), j0, 0], STAGES
    )
    rows = gl.allocate_shared_memory(gl.float32, [STAGES] + row_tiles.block_type.shape, row_tiles.layout)  # noqa: RUF005
    lo, full = 0, 0  # queries that see a key of the tile, and those that see every one
    if RIGHT:
        lo = gl.minimum(gl.maximum(0, j0 - reach), tq) // BLOCK_M * BLOCK_M
        full = gl.maximum(lo, gl.cdiv(gl.maximum(0, j0 + BLOCK_N - 1 - reach), BLOCK_M) * BLOCK_M)
    if query_tiles.block_type.element_ty == gl.float16:
        blocks = gl.cdiv(tq, SHRINK_ROWS)
        full = gl.maximum(
            full, SHRINK_ROWS * _last_shrunk(least + (b * heads + head) * blocks, blocks, groups, num_warps)
        )
    per_head = gl.cdiv(tq - lo, BLOCK_M)
    edges = gl.minimum((full - lo) // BLOCK_M, per_head)
    count = per_head * groups
    next_n, next_h = gl.to_tensor(0), head
    for it in gl.static_range(STAGES - 1):
        next_n, next_h = _fetch_queries(
            it, next_n, next_h, count, per_head, lo, row, query_tiles, grad_tiles, row_tiles, queries, grads, rows, ready,
            BLOCK_M, STAGES,
        )  # fmt: skip
    zero = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, layout=o_layout)
    dk, dv = warpgroup_mma_init(zero), warpgroup_mma_init(zero)
    j2 = (j0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout)))[:, None]
    mbarrier.wait(ready.index(STAGES), 0)
    k, v = keys.reshape([BLOCK_N, BLOCK_D]), values.reshape([BLOCK_N, BLOCK_D])
    if IN_REGISTERS > 0:
        k = k.load(gl.DotOperandLayout(0, s_layout, 2))
    if IN_REGISTERS > 1:
        v = v.load(gl.DotOperandLayout(0, s_layout, 2))
    for group in range(groups):
        for n in range(0, edges):
            dk, dv, next_n, next_h = _tile_of_keys(
                group * per_head + n, lo + n * BLOCK_M, next_n, next_h, count, per_head, lo, row, dk, dv, k, v,
                query_tiles, grad_tiles, row_tiles, queries, grads, rows, ready, j2, reach, unit, cap,
                BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RIGHT, SOFTCAP, True, s_layout,
                o_layout,
                num_warps,
            )  # fmt: skip
        for n in range(edges, per_head):
            dk, dv, next_n, next_h = _tile_of_keys(
                group * per_head + n, lo + n * BLOCK_M, next_n, next_h, count, per_head, lo, row, dk, dv, k, v,
                query_tiles, grad_tiles, row_tiles, queries, grads, rows, ready, j2, reach, unit, cap,
                BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RIGHT, SOFTCAP, False,
                s_layout, o_layout,
                num_warps,
            )  # fmt: skip
        # accumulators that are under way around the outer loop, too, would make every product wait (ptxas C7515)
        dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=[dk, dv])
        dk, dv = warpgroup_mma_init(dk), warpgroup_mma_init(dv)
    dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=[dk, dv])
    for stage in gl.static_range(STAGES + 1):
        mbarrier.invalidate(ready.index(stage))
    store(dkey + b * dk_b + kv * dk_h, dk * scale, j0, tk, width, dk_t, dk_d, BLOCK_N, BLOCK_D, num_warps)
    store(dvalue + b * dv_b + kv * dv_h, dv, j0, tk, v_width, dv_t, dv_d, BLOCK_N, BLOCK_D, num_warps)


@gluon.jit
def _tile_of_queries(
    it, at, count, head, row, dq, q, do, key_tiles, value_tiles, keys, values, ready, level, delta, i2, reach, tk, unit, cap,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, NEGATIVE_GRADIENT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, EDGE: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Add one key tile to ``dq``."""
    stage = it % STAGES
    mbarrier.wait(ready.index(stage), (it // STAGES) & 1)
    k, v = keys.index(stage).reshape([BLOCK_N, BLOCK_D]), values.index(stage).reshape([BLOCK_N, BLOCK_D])
    zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=s_layout)
    s = warpgroup_mma(q, k.permute([1, 0]), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(do, v.permute([1, 0]), zero, use_acc=False, is_async=True)
    s, dq = warpgroup_mma_wait(num_outstanding=1, deps=[s, dq])
    barrier()  # as above
    _fetch(it + STAGES - 1, count, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N, STAGES)
    if SOFTCAP:
        bent = fast_tanh(s * unit)
        s = cap * bent
        e = gl.exp2(s - level) * (1.0 - bent * bent)
    else:
        e = gl.exp2(s * unit - level)
    if EDGE:
        j = at + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
        seen = (j < tk)[None, :]  # a key of zeros adds nothing only as long as its exponential is finite
        if RIGHT:
            seen = seen & (j[None, :] <= i2 + reach)
        e = gl.where(seen, e, 0.0)
    dp = warpgroup_mma_wait(num_outstanding=0, deps=[dp])
    if BASE == EXPM1:  # as score_gradient; the sign of the score itself takes one instruction less
        below = delta if ABSOLUTE and NEGATIVE_GRADIENT else 0.0
        ds = e * gl.where(s > 0, dp - delta, below)
    else:
        ds = score_gradient(s, e, dp, delta, 0.0, BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, False)
    ds = gl.convert_layout(narrow_gradient(ds, k.dtype, True), gl.DotOperandLayout(0, o_layout, 2))
    return warpgroup_mma(ds, k, dq, is_async=True)


@gluon.jit(do_not_specialize=["heads", "tiles", "pairs", "together", "tq", "tk", "right", "plane"])
def backward_queries(
    query_tiles, key_tiles, value_tiles, grad_tiles, statistics, dquery, dq_b, dq_h, dq_t, dq_d, plane,
    tiles, heads, pairs, together, groups, tq, tk, width, right, unit, cap, scale,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, CONSTANT: gl.constexpr,
    NEGATIVE_GRADIENT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr, RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``dQ`` of one query tile. Grid as in ``backward.py``."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_D, 16])
    tile, h, b = assignment(tiles, heads, pairs, together)
    i0 = (tiles - 1 - tile) * BLOCK_M
    reach = right
    if BOTTOM_RIGHT:
        reach += tk - tq
    row, head = b.to(gl.int32), (h // groups).to(gl.int32)
    queries, grads, keys, values, ready = _room(
        query_tiles, grad_tiles, key_tiles, value_tiles, [row, h.to(gl.int32), i0, 0], STAGES
    )
    hi, full = tk, tk  # keys that a query of the tile sees, and those that every one sees
    if RIGHT:
        hi = gl.maximum(0, gl.minimum(tk, i0 + BLOCK_M + reach))
        full = gl.maximum(0, gl.minimum(tk, i0 + reach + 1))
    count = gl.cdiv(hi, BLOCK_N)
    whole = gl.minimum(full // BLOCK_N, count)
    for it in gl.static_range(STAGES - 1):
        _fetch(it, count, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N, STAGES)
    i = i0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, s_layout))
    statistics += (b * heads + h) * (4 * plane)
    level = gl.load(statistics + i)[:, None]
    delta = gl.load(statistics + 2 * plane + i)[:, None]
    HALF: gl.constexpr = query_tiles.block_type.element_ty == gl.float16
    factor = scale
    if HALF:  # ds is divided by a power of two, which the level gets, and dq multiplied by it
        shrink = gl.load(statistics + 3 * plane + i)
        level -= gl.log2(shrink)[:, None]
        factor = gl.convert_layout(scale / shrink, gl.SliceLayout(1, o_layout))[:, None]
    dq = warpgroup_mma_init(gl.zeros([BLOCK_M, BLOCK_D], gl.float32, layout=o_layout))
    mbarrier.wait(ready.index(STAGES), 0)
    q, do = queries.reshape([BLOCK_M, BLOCK_D]), grads.reshape([BLOCK_M, BLOCK_D])
    if IN_REGISTERS > 0:
        q = q.load(gl.DotOperandLayout(0, s_layout, 2))
    if IN_REGISTERS > 1:
        do = do.load(gl.DotOperandLayout(0, s_layout, 2))
    for it in range(0, whole):
        dq = _tile_of_queries(
            it, it * BLOCK_N, count, head, row, dq, q, do, key_tiles, value_tiles, keys, values, ready, level, delta,
            i[:, None], reach, tk, unit, cap,
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RIGHT, SOFTCAP, False, s_layout,
            o_layout,
        )  # fmt: skip
    for it in range(whole, count):
        dq = _tile_of_queries(
            it, it * BLOCK_N, count, head, row, dq, q, do, key_tiles, value_tiles, keys, values, ready, level, delta,
            i[:, None], reach, tk, unit, cap,
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, RIGHT, SOFTCAP, True, s_layout,
            o_layout,
        )  # fmt: skip
    dq = warpgroup_mma_wait(num_outstanding=0, deps=[dq])
    for stage in gl.static_range(STAGES + 1):
        mbarrier.invalidate(ready.index(stage))
    store(dquery + b * dq_b + h * dq_h, dq * factor, i0, tq, width, dq_t, dq_d, BLOCK_M, BLOCK_D, num_warps)
