"""The forward pass for heads of 64, where a warpgroup has room for two tiles of queries.

While it takes exponentials of one tile's scores, the tensor cores make the scores of the other one with the same keys and
multiply the weights before with their values. Two programs a multiprocessor fill each other's gaps: with heads that small this
is faster than the specialised warps of ``forward.py``.
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
from triton.language.extra.cuda import gdc_launch_dependents

from softpick.ops.triton.base_functions import anchored
from softpick.ops.triton.device import assignment
from softpick.ops.triton.hopper.forward import ROWS, anchors, finish, row_parts, start_scores, weights_of
from softpick.ops.triton.hopper.versions import barrier, load_tile

__all__ = ["forward_narrow"]


@gluon.jit
def _fetch(
    it, count, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """Start copying key tile ``it`` and its values, if there is one."""
    stage = it % STAGES
    wanted = it < count
    bar = ready.index(stage)
    mbarrier.expect(bar, key_tiles.block_type.nbytes + value_tiles.block_type.nbytes, pred=wanted)
    load_tile(key_tiles, [row, head, it * BLOCK_N, 0], bar, keys.index(stage), pred=wanted)
    load_tile(value_tiles, [row, head, it * BLOCK_N, 0], bar, values.index(stage), pred=wanted)


@gluon.jit
def _tile_of_keys(
    it, count, s, acc, other_acc, total, other_total, q, other_q, head, row, key_tiles, value_tiles, keys, values, ready,
    i, other_i, anchor, one, other_anchor, other_one, tk, reach, unit, cap,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, EDGE: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """A key tile into both query tiles. The scores ``s`` of the first are there; on return those of the next key tile are
    (after the last one they are of something else, and are not used).

    ptxas keeps products asynchronous only if no scores are on their way around the loop (its notes C7513, C7515): hence the
    wait at the end, which has nothing to wait for but scores that were started before the exponentials.
    """
    v = values.index(it % STAGES).reshape([BLOCK_N, BLOCK_D])
    following = start_scores(it, other_q, keys, BLOCK_N, BLOCK_D, STAGES, s_layout)
    p, total = weights_of(
        s, total, it * BLOCK_N, i, anchor, one, tk, reach, unit, cap, v, BASE, RECTIFY, ABSOLUTE, RIGHT, SOFTCAP, EDGE,
        s_layout, o_layout
    )  # fmt: skip
    acc = warpgroup_mma(p, v, acc, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[following])
    # every product of the tile before has ended, for every warp once they have met: its buffer can be filled again
    barrier()
    _fetch(it + STAGES - 1, count, head, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N, STAGES)
    mbarrier.wait(ready.index((it + 1) % STAGES), ((it + 1) // STAGES) & 1, pred=it + 1 < count)
    following = start_scores(it + 1, q, keys, BLOCK_N, BLOCK_D, STAGES, s_layout)
    p, other_total = weights_of(
        s, other_total, it * BLOCK_N, other_i, other_anchor, other_one, tk, reach, unit, cap, v,
        BASE, RECTIFY, ABSOLUTE, RIGHT, SOFTCAP, EDGE, s_layout, o_layout,
    )  # fmt: skip
    other_acc = warpgroup_mma(p, v, other_acc, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[following])
    return s, acc, other_acc, total, other_total


@gluon.jit(do_not_specialize=["heads", "tiles", "pairs", "together", "groups", "tq", "tk", "right", "l_b", "l_h"])
def forward_narrow(
    query_tiles, key_tiles, value_tiles, out_tiles, lse, sink, turn, l_b, l_h, l_t,
    tiles, heads, pairs, together, groups, tq, tk, right, unit, cap, eps,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, CONSTANT: gl.constexpr,
    NEGATIVE_GRADIENT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, VALUES: gl.constexpr, RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """As ``forward_queries``, but a program has one tile of 128 queries, and key and value tiles share STAGES. Grid as in
    ``forward.py`` of the folder above.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_D, 16])
    gdc_launch_dependents()  # forward.py waits by itself
    tile, h, b = assignment(tiles, heads, pairs, together)
    i0 = (tiles - 1 - tile) * (2 * ROWS)
    reach = right
    if BOTTOM_RIGHT:
        reach += tk - tq
    hi, full = tk, tk  # keys that a query of the program sees, and those that every one sees
    if RIGHT:
        hi = gl.maximum(0, gl.minimum(tk, i0 + 2 * ROWS + reach))
        full = gl.maximum(0, gl.minimum(tk, i0 + reach + 1))
    count = gl.cdiv(hi, BLOCK_N)
    whole = gl.minimum(full // BLOCK_N, count)
    row, head, kv = b.to(gl.int32), h.to(gl.int32), (h // groups).to(gl.int32)
    dtype: gl.constexpr = query_tiles.block_type.element_ty
    queries = gl.allocate_shared_memory(dtype, [2] + query_tiles.block_type.shape, query_tiles.layout)  # noqa: RUF005 (no stars in Triton)
    keys = gl.allocate_shared_memory(dtype, [STAGES] + key_tiles.block_type.shape, key_tiles.layout)  # noqa: RUF005
    values = gl.allocate_shared_memory(dtype, [STAGES] + value_tiles.block_type.shape, value_tiles.layout)  # noqa: RUF005
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES + 1):
        mbarrier.init(ready.index(stage), count=1)
    bar = ready.index(STAGES)
    mbarrier.expect(bar, 2 * query_tiles.block_type.nbytes)
    for half in gl.static_range(2):
        load_tile(query_tiles, [row, head, i0 + half * ROWS, 0], bar, queries.index(half))
    for it in gl.static_range(STAGES - 1):
        _fetch(it, count, kv, row, key_tiles, value_tiles, keys, values, ready, BLOCK_N, STAGES)
    i = i0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    total = row_parts(gl.zeros([ROWS, BLOCK_N], gl.float32, layout=s_layout))
    other_total = total
    mbarrier.wait(bar, 0)
    q, other_q = queries.index(0).reshape([ROWS, BLOCK_D]), queries.index(1).reshape([ROWS, BLOCK_D])
    mbarrier.wait(ready.index(0), 0, pred=count > 0)
    s = start_scores(0, q, keys, BLOCK_N, BLOCK_D, STAGES, s_layout)
    s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
    HALF: gl.constexpr = dtype == gl.float16
    ANCHORED: gl.constexpr = anchored(BASE, RECTIFY, CONSTANT)
    anchor, one = anchors(s, 0, i, tk, reach, unit, HALF, ANCHORED, RIGHT, s_layout)
    other_anchor, other_one = anchor, one
    if HALF:
        other = start_scores(0, other_q, keys, BLOCK_N, BLOCK_D, STAGES, s_layout)
        other = warpgroup_mma_wait(num_outstanding=0, deps=[other])
        other_anchor, other_one = anchors(other, 0, i + ROWS, tk, reach, unit, HALF, ANCHORED, RIGHT, s_layout)
    zero = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=o_layout)
    acc, other_acc = warpgroup_mma_init(zero), warpgroup_mma_init(zero)
    for it in range(0, whole):
        s, acc, other_acc, total, other_total = _tile_of_keys(
            it, count, s, acc, other_acc, total, other_total, q, other_q, kv, row, key_tiles, value_tiles, keys, values,
            ready, i, i + ROWS, anchor, one, other_anchor, other_one, tk, reach, unit, cap,
            BASE, RECTIFY, ABSOLUTE, RIGHT, SOFTCAP, BLOCK_N, BLOCK_D, STAGES, False, s_layout, o_layout,
        )  # fmt: skip
    for it in range(whole, count):
        s, acc, other_acc, total, other_total = _tile_of_keys(
            it, count, s, acc, other_acc, total, other_total, q, other_q, kv, row, key_tiles, value_tiles, keys, values,
            ready, i, i + ROWS, anchor, one, other_anchor, other_one, tk, reach, unit, cap,
            BASE, RECTIFY, ABSOLUTE, RIGHT, SOFTCAP, BLOCK_N, BLOCK_D, STAGES, True, s_layout, o_layout,
        )  # fmt: skip
    acc, other_acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc, other_acc])
    for stage in gl.static_range(STAGES + 1):
        mbarrier.invalidate(ready.index(stage))
    shape = (tiles, heads, pairs, together, groups, tq, tk, reach)
    outputs = (out_tiles, lse, sink, l_b, l_h, l_t)
    at = gl.program_id(0)
    barrier()  # the queries are not read any more
    finish(
        acc, total, anchor, one, i0, head, row, at, turn, eps, shape, outputs, queries.index(0), BASE, RECTIFY, CONSTANT,
        o_layout,
    )  # fmt: skip
    finish(
        other_acc, other_total, other_anchor, other_one, i0 + ROWS, head, row, at, turn, eps, shape, outputs, queries.index(1),
        BASE, RECTIFY, CONSTANT, o_layout,
    )  # fmt: skip
    tma.store_wait(0)
