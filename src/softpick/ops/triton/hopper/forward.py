"""The forward pass: the same formulas as :mod:`softpick.ops.triton.forward`, with specialised warps.

A program takes tiles of 128 queries, one after the other. One warp fetches and runs ahead, into the next tile of queries
too, so that one ends while the next begins. Two warpgroups of 64 queries each take the keys, from the last ones, which need
a mask, to the first: while a warpgroup takes exponentials of its scores, the tensor cores multiply the weights before with
their values, or work for the other warpgroup, since the two take turns to start products. Rings of key and of value tiles
have barriers for "full" (the bytes have come) and "empty" (both warpgroups are done).

The rows of a tile leave through shared memory, so that a warpgroup is soon at the next one: with stores of its own a fifth of
its time went there (docs/kernels.md). There is no running maximum: bf16 has none at all, and in fp16, whose range is small,
weights are relative to the largest score of a row's first key tile. A tile in which a sum left its range is noted, and
``forward.py`` computes it again.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from softpick.ops.triton.base_functions import (
    EXP,
    EXPM1,
    INF,
    LN2,
    LOG2E,
    NONE,
    ONE,
    POSITIVE,
    SINK,
    Constant,
    anchored,
    kept_scores,
    numerators,
    zero_at_zero,
)
from softpick.ops.triton.device import fast_tanh, narrow, opaque, tile_at
from softpick.ops.triton.hopper.versions import barrier, load_tile, store_tile

__all__ = ["forward_queries"]

ROWS = Constant(64)  # queries of a warpgroup
_LARGEST = Constant(2.0**64)  # as in forward.py
_SMALLEST = Constant(2.0**-64)
_FINITE = Constant(3.0e38)
_FP16_SMALLEST = Constant(1.0)  # a sum of weights that have all their bits in fp16
_FP16_LARGEST_FIRST = Constant(2.0)
"""log2 of the largest weight of a row's first key tile in fp16: weights 2^-16 to 2^14 times as large have all their bits."""


@gluon.jit
def _queries_of_tile(at, shape):
    """(first query, head, sequence) of the ``at``-th tile, in the order of :func:`softpick.ops.triton.device.assignment`."""
    tile, head, row = tile_at(at, shape[0], shape[1], shape[2], shape[3])
    return (shape[0] - 1 - tile) * (2 * ROWS), head, row


@gluon.jit
def _key_tiles(i0, shape, BLOCK_N: gl.constexpr, RIGHT: gl.constexpr):
    """Tiles of keys that the queries from ``i0`` on see; at least one, so that there is an output."""
    hi = shape[6]
    if RIGHT:
        hi = gl.minimum(hi, i0 + 2 * ROWS + shape[7])
    return gl.maximum(1, gl.cdiv(gl.maximum(0, hi), BLOCK_N))


# ------------------------------------------------------------------------------------------------- the warp that fetches


@gluon.jit
def _fill(n, tiles, at, head, row, full, empty, room, STAGES: gl.constexpr):
    """Fetch a tile as the ``n``-th of its ring."""
    stage = n % STAGES
    mbarrier.wait(empty.index(stage), (n // STAGES) & 1 ^ 1)
    mbarrier.expect(full.index(stage), tiles.block_type.nbytes)
    load_tile(tiles, [row, head, at, 0], full.index(stage), room.index(stage))


@gluon.jit
def _announce_tile(at, loaded, next_tile, empty):
    """Announce the next tile to the warpgroups, once both have let go of the queries before."""
    mbarrier.wait(empty, loaded & 1 ^ 1)
    next_tile.store(gl.full([32], at, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    barrier()


@gluon.jit
def _fetch(
    descriptors, room, bars, shape, turn,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VALUES: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Fetch tiles as long as there are any; ``turn`` counts those that are fetched."""
    query_tiles, key_tiles, value_tiles = descriptors
    queries, keys, values, next_tile, _ = room
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    end = shape[0] * shape[2]
    at, n, loaded = gl.program_id(0), 0, 0
    while at < end:
        following = gl.atomic_add(turn, 1) + gl.num_programs(0)
        i0, head, row = _queries_of_tile(at, shape)
        count, kv = _key_tiles(i0, shape, BLOCK_N, RIGHT), head // shape[4]
        _announce_tile(at, loaded, next_tile, q_empty)
        mbarrier.expect(q_full, 2 * query_tiles.block_type.nbytes)
        for half in gl.static_range(2):
            load_tile(query_tiles, [row, head, i0 + half * ROWS, 0], q_full, queries.index(half))
        j = (count - 1) * BLOCK_N
        _fill(n, key_tiles, j, kv, row, k_full, k_empty, keys, STAGES)
        for it in range(1, count):
            j -= BLOCK_N
            _fill(n + it, key_tiles, j, kv, row, k_full, k_empty, keys, STAGES)
            _fill(n + it - 1, value_tiles, j + BLOCK_N, kv, row, v_full, v_empty, values, VALUES)
        n += count
        _fill(n - 1, value_tiles, 0, kv, row, v_full, v_empty, values, VALUES)
        loaded += 1
        at = following
    _announce_tile(end, loaded, next_tile, q_empty)
    mbarrier.arrive(q_full)


# ------------------------------------------------------------------------------------------------------- the warpgroups


@gluon.jit
def _wait_for_tile(loaded, next_tile, full):
    """Wait for the next tile and its queries; returns the tile."""
    mbarrier.wait(full, loaded & 1)
    return gl.max(next_tile.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _wait_turn(w: gl.constexpr):
    """Wait until the other warpgroup has started its products. (Triton uses named barriers from below.)"""
    if w == 0:
        gl.inline_asm_elementwise("bar.sync 14, 256; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.sync 15, 256; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _pass_turn(w: gl.constexpr):
    """Let the other warpgroup start."""
    if w == 0:
        gl.inline_asm_elementwise("bar.arrive 15, 256; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.arrive 14, 256; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def start_scores(n, q, keys, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):
    k = keys.index(n % STAGES).reshape([BLOCK_N, BLOCK_D])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=layout)
    return warpgroup_mma(q, k.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def row_parts(x):
    """Sums over what a thread holds of a row; the four threads of a row meet at the end only."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return gl.sum(gl.sum(gl.reshape(x, [M, N // 8, 4, 2]), 3), 1)


@gluon.jit
def _seen(at, i, tk, reach, KEYS: gl.constexpr, RIGHT: gl.constexpr, layout: gl.constexpr):
    """Which keys from ``at`` on the queries see."""
    j = at + gl.arange(0, KEYS, layout=gl.SliceLayout(0, layout))
    seen = (j < tk)[None, :]
    if RIGHT:
        seen = seen & (j[None, :] <= i[:, None] + reach)
    return seen


@gluon.jit
def anchors(
    s, at, i, tk, reach, unit, HALF: gl.constexpr, ANCHORED: gl.constexpr, RIGHT: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """What the exponents of a row are relative to, from the products ``s`` of its first key tile, and what 1 is then; bf16: 0
    and 1.
    """
    top = gl.zeros([s.shape[0]], gl.float32, layout=gl.SliceLayout(1, layout))
    if HALF:
        seen = _seen(at, i, tk, reach, s.shape[1], RIGHT, layout)
        top = gl.max(gl.where(seen, s, -INF), 1) * unit
        if ANCHORED:
            top = gl.maximum(top, 0.0)
        else:
            top = gl.where(top == -INF, 0.0, top)
        top -= _FP16_LARGEST_FIRST
        return top, opaque(
            gl.exp2(-top)
        )  # else it is computed on every way into a loop, and products wait (ptxas C7515)
    else:
        return top, top + 1.0


@gluon.jit
def weights_of(
    s, total, at, i, anchor, one, tk, reach, unit, cap, like,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
    EDGE: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Products with the keys from ``at`` on as weights in 16 bits, and what they add to the denominator."""
    s *= unit
    if SOFTCAP:
        s = cap * fast_tanh(s)
    if EDGE:
        seen = _seen(at, i, tk, reach, s.shape[1], RIGHT, s_layout)
        s = gl.where(seen, s, 0.0 if zero_at_zero(BASE) else -INF)
    if like.dtype == gl.float16:
        p = gl.exp2(s - anchor[:, None])
        if BASE == EXPM1:
            p -= one[:, None]
    else:
        p = numerators(s, 0.0, BASE, False, False)
    if ABSOLUTE:
        total += row_parts(gl.abs(p))
    else:
        p = kept_scores(p, s, RECTIFY)
        total += row_parts(p)
    p = narrow(p, like, RECTIFY == POSITIVE, RECTIFY == POSITIVE)
    return gl.convert_layout(p, gl.DotOperandLayout(0, o_layout, 2)), total


@gluon.jit
def _step(
    n, at, p, acc, total, q, room, bars, i, anchor, one, tk, reach, unit, cap, more,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
    EDGE: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, VALUES: gl.constexpr,
    w: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Start the scores of key tile ``n``, which is there, and the product of the weights before; exponentials beside it."""
    _, keys, values, _, _ = room
    _, _, k_full, k_empty, v_full, v_empty = bars
    before = (n - 1) % VALUES
    v = values.index(before).reshape([BLOCK_N, BLOCK_D])
    _wait_turn(w)
    s = start_scores(n, q, keys, BLOCK_N, BLOCK_D, STAGES, s_layout)
    mbarrier.wait(v_full.index(before), ((n - 1) // VALUES) & 1)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    _pass_turn(w)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    mbarrier.arrive(k_empty.index(n % STAGES))
    p, total = weights_of(
        s,
        total,
        at,
        i,
        anchor,
        one,
        tk,
        reach,
        unit,
        cap,
        v,
        BASE,
        RECTIFY,
        ABSOLUTE,
        RIGHT,
        SOFTCAP,
        EDGE,
        s_layout,
        o_layout,
    )
    # here, because ptxas moves no exponentials behind it, as it does behind the wait for the product
    mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=more)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.arrive(v_empty.index(before))
    return p, acc, total


@gluon.jit
def _take(
    w: gl.constexpr, room, bars, shape, outputs, turn, unit, cap, eps,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, CONSTANT: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, VALUES: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``w``: its 64 queries of one tile after the other."""
    queries, keys, values, next_tile, rows = room
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    tk, reach = shape[6], shape[7]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    q = queries.index(w).reshape([ROWS, BLOCK_D])
    HALF: gl.constexpr = q.dtype == gl.float16
    if w == 1:
        _pass_turn(1)
    n, loaded, end = 0, 0, shape[0] * shape[2]
    tile = _wait_for_tile(loaded, next_tile, q_full)
    while tile < end:
        i0, head, row = _queries_of_tile(tile, shape)
        count = _key_tiles(i0, shape, BLOCK_N, RIGHT)
        i0 += w * ROWS
        full = tk
        if RIGHT:
            full = gl.maximum(0, gl.minimum(tk, i0 + reach + 1))
        edges = gl.maximum(1, count - full // BLOCK_N)  # tiles that need a mask; the first is taken as one
        i = i0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
        at = (count - 1) * BLOCK_N
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=o_layout)
        total = row_parts(gl.zeros([ROWS, BLOCK_N], gl.float32, layout=s_layout))
        mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1)
        _wait_turn(w)
        s = start_scores(n, q, keys, BLOCK_N, BLOCK_D, STAGES, s_layout)
        _pass_turn(w)
        s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
        mbarrier.arrive(k_empty.index(n % STAGES))
        anchor, one = anchors(s, at, i, tk, reach, unit, HALF, anchored(BASE, RECTIFY, CONSTANT), RIGHT, s_layout)
        p, total = weights_of(
            s,
            total,
            at,
            i,
            anchor,
            one,
            tk,
            reach,
            unit,
            cap,
            q,
            BASE,
            RECTIFY,
            ABSOLUTE,
            RIGHT,
            SOFTCAP,
            True,
            s_layout,
            o_layout,
        )
        mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=count > 1)
        for it in range(1, edges):
            p, acc, total = _step(
                n + it, at - it * BLOCK_N, p, acc, total, q, room, bars, i, anchor, one, tk, reach, unit, cap, it + 1 < count,
                BASE, RECTIFY, ABSOLUTE, RIGHT, SOFTCAP, True, BLOCK_N, BLOCK_D, STAGES, VALUES, w, s_layout, o_layout,
            )  # fmt: skip
        for it in range(edges, count):
            p, acc, total = _step(
                n + it, at - it * BLOCK_N, p, acc, total, q, room, bars, i, anchor, one, tk, reach, unit, cap, it + 1 < count,
                BASE, RECTIFY, ABSOLUTE, RIGHT, SOFTCAP, False, BLOCK_N, BLOCK_D, STAGES, VALUES, w, s_layout, o_layout,
            )  # fmt: skip
        n += count
        mbarrier.arrive(q_empty)
        loaded += 1
        last = (n - 1) % VALUES
        mbarrier.wait(v_full.index(last), ((n - 1) // VALUES) & 1)
        acc = warpgroup_mma(p, values.index(last).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        mbarrier.arrive(v_empty.index(last))
        tma.store_wait(0)  # the rows before have left their room; for every warp once they have met
        barrier()
        finish(
            acc, total, anchor, one, i0, head, row, tile, turn, eps, shape, outputs, rows.index(w), BASE, RECTIFY, CONSTANT,
            o_layout,
        )  # fmt: skip
        tile = _wait_for_tile(loaded, next_tile, q_full)
    tma.store_wait(0)
    if w == 0:
        _wait_turn(0)  # what the other one has passed on last


@gluon.jit
def finish(
    acc, total, anchor, one, i0, head, row, tile, turn, eps, shape, outputs, room,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, CONSTANT: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Normalize and write the rows of a warpgroup, or note that the tile has to be taken again.

    ``room``: shared memory for the rows, free for the whole warpgroup; the accelerator reads it until ``tma.store_wait``.
    """
    out_tiles, lse, sink, l_b, l_h, l_t = outputs
    parts = row_parts(gl.abs(acc))  # each thread reduces what it holds: no exchange between threads
    total = gl.sum(total, 1)
    HALF: gl.constexpr = room.dtype == gl.float16
    smallest: gl.constexpr = _FP16_SMALLEST if HALF else _SMALLEST
    anchor = gl.convert_layout(anchor, total.type.layout)
    one = gl.convert_layout(one, total.type.layout)
    sound = total < _LARGEST
    if BASE == EXP and RECTIFY == NONE and CONSTANT == 0:
        sound = sound & (total > smallest)  # rows without a key: the other kernel knows
    if CONSTANT == ONE:
        total += one
    elif CONSTANT == SINK:
        logit = gl.load(sink + head).to(gl.float32) * LOG2E
        total += gl.exp2(logit - anchor)
        sound = sound & (logit - anchor < 64.0)
        if BASE == EXP and RECTIFY == NONE:  # scores and sink may lie far below 0 together
            sound = sound & ((total > smallest) | (eps > 0))
    note = turn + 1 + tile
    gl.store(note + gl.zeros_like(total).to(gl.int32), 1, mask=~sound)
    gl.store(note + gl.zeros_like(parts).to(gl.int32), 1, mask=~(parts < _FINITE))
    total += eps * one
    i = i0 + gl.arange(0, ROWS, layout=total.type.layout)
    to = lse + row.to(gl.int64) * l_b + head.to(gl.int64) * l_h + i * l_t
    gl.store(to, (anchor + gl.log2(total)) * LN2, mask=i < shape[5])
    inverse = gl.convert_layout(gl.where(total == 0, 0.0, 1.0 / total), gl.SliceLayout(1, layout))
    room.store((acc * inverse[:, None]).to(room.dtype).reshape([1, 1, ROWS, acc.shape[1]]))
    fence_async_shared()
    barrier()
    store_tile(out_tiles, [row, head, i0, 0], room)


@gluon.jit
def _barriers(COUNT: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(COUNT):
        mbarrier.init(bars.index(at), count=arrivals)
    return bars


@gluon.jit(do_not_specialize=["heads", "tiles", "pairs", "together", "groups", "tq", "tk", "right", "l_b", "l_h"])
def forward_queries(
    query_tiles, key_tiles, value_tiles, out_tiles, lse, sink, turn, l_b, l_h, l_t,
    tiles, heads, pairs, together, groups, tq, tk, right, unit, cap, eps,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, CONSTANT: gl.constexpr,
    NEGATIVE_GRADIENT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, VALUES: gl.constexpr, RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """``out`` and ``lse`` of all queries. Grid: as many programs as run at a time, or fewer.

    ``turn``: zeros; the first counts tiles of 128 queries in the order of ``forward.py``, the others note which of them have
    to be taken again, with a running maximum.
    """
    gdc_launch_dependents()  # forward.py waits by itself
    reach = right
    if BOTTOM_RIGHT:
        reach += tk - tq
    dtype: gl.constexpr = query_tiles.block_type.element_ty
    queries = gl.allocate_shared_memory(dtype, [2] + query_tiles.block_type.shape, query_tiles.layout)  # noqa: RUF005 (no stars in Triton)
    keys = gl.allocate_shared_memory(dtype, [STAGES] + key_tiles.block_type.shape, key_tiles.layout)  # noqa: RUF005
    values = gl.allocate_shared_memory(dtype, [VALUES] + value_tiles.block_type.shape, value_tiles.layout)  # noqa: RUF005
    rows = gl.allocate_shared_memory(dtype, [2] + out_tiles.block_type.shape, out_tiles.layout)  # noqa: RUF005
    next_tile = gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    descriptors = (query_tiles, key_tiles, value_tiles)
    room = (queries, keys, values, next_tile, rows)
    bars = (
        _barriers(1, 1).index(0), _barriers(1, 2).index(0), _barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(VALUES, 1),
        _barriers(VALUES, 2),
    )  # fmt: skip
    shape = (tiles, heads, pairs, together, groups, tq, tk, reach)
    outputs = (out_tiles, lse, sink, l_b, l_h, l_t)
    gl.warp_specialize(
        [
            (_take, (
                0, room, bars, shape, outputs, turn, unit, cap, eps, BASE, RECTIFY, ABSOLUTE, CONSTANT, BLOCK_N, BLOCK_D,
                STAGES, VALUES, RIGHT, SOFTCAP,
            )),
            (_take, (
                1, room, bars, shape, outputs, turn, unit, cap, eps, BASE, RECTIFY, ABSOLUTE, CONSTANT, BLOCK_N, BLOCK_D,
                STAGES, VALUES, RIGHT, SOFTCAP,
            )),
            (_fetch, (descriptors, room, bars, shape, turn, BLOCK_N, STAGES, VALUES, RIGHT)),
        ],
        [4, 1],
        [240, 24],  # registers a thread of the second and the third; the first gets what is left
    )  # fmt: skip
