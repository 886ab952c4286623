"""Decoding: what :func:`softpick.ops.triton.decode.decode_split` computes, explicitly scheduled.

The tensor memory accelerator keeps several key tiles on their way. Values are asked for when the scores of their tile are
known, and only if one of them is kept (SKIP); their product is taken when VALUES tiles wait, so that no warp waits for memory
twice. Tiles are transposed, keys by queries and head dim by queries: the few queries are then the short side of a product of
64 x 8, and a thread has four scores.

Two numbers of a cache in fp8 (SCALED) are one of 16 bits for the copies and in shared memory. They become bf16 on the way to
registers: first and second numbers of the head dim are two products each, of half the size.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from softpick.ops.triton.base_functions import (
    EXP,
    INF,
    LN2,
    LOG2E,
    NONE,
    ONE,
    POSITIVE,
    SINK,
    Constant,
    exponential,
    kept_scores,
    numerators,
    zero_at_zero,
)
from softpick.ops.triton.decode import anchored, bf16_of_pairs, count_tiles, keys_of_sequence, sequence_at, share_of
from softpick.ops.triton.device import few_seen, finish_scores
from softpick.ops.triton.hopper.versions import barrier, load_tile

__all__ = ["decode_keys"]

_LARGEST, _SMALLEST = Constant(2.0**64), Constant(2.0**-64)


@gluon.jit
def _fetch(tiles, it, wanted, first, row, kv, table, bar, target, BLOCK_N: gl.constexpr, PAGE: gl.constexpr):
    """Start copying tile ``it`` of the keys ``first ...``: zeros where there is no such page, of which nothing is read."""
    at = first + it * BLOCK_N
    if PAGE != 0:
        row = gl.load(table + at // PAGE, mask=wanted, other=0).to(gl.int32)
        at = at % PAGE
    mbarrier.expect(bar, tiles.block_type.nbytes, pred=wanted)
    load_tile(tiles, [row, kv, at, 0], bar, target, pred=wanted)


@gluon.jit
def _start(
    tiles, before, count, first, row, kv, table, bars, targets, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, AHEAD: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Start copying the first AHEAD tiles; ``before`` came through the stages already."""
    for it in gl.static_range(AHEAD):
        stage = (before + it) % STAGES
        _fetch(tiles, it, it < count, first, row, kv, table, bars.index(stage), targets.index(stage), BLOCK_N, PAGE)


@gluon.jit
def _scale_of(scale, stride, position, table, pages, PAGE: gl.constexpr):
    """That of the page of a tile; 0 where the cache has no such page."""
    page = gl.load(table + position // PAGE)
    there = page.to(gl.uint32, bitcast=True) < pages.to(gl.uint32)
    return gl.load(scale + page.to(gl.int64) * stride, mask=there, other=0.0)


@gluon.jit
def _scores(
    it, seen, first, q, keys, ready, table, pages, scales, i2, tq, tk, offset, left, right, unit, softcap,
    BASE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr, SCALED: gl.constexpr,
    s_layout: gl.constexpr,
):  # fmt: skip
    """Scores of tile ``it``, the ``seen + it``-th that comes through the stages; what a query does not see adds nothing."""
    if PAGE != 0 and not zero_at_zero(
        BASE
    ):  # no key of a page that does not exist; elsewhere its score of 0 adds nothing
        page = gl.load(table + (first + it * BLOCK_N) // PAGE)
        tk = gl.where(page.to(gl.uint32, bitcast=True) < pages.to(gl.uint32), tk, 0)
    if SCALED == 2:
        unit *= _scale_of(scales[0], scales[2], first + it * BLOCK_N, table, pages, PAGE)
    stage = (seen + it) % STAGES
    mbarrier.wait(ready.index(stage), ((seen + it) // STAGES) & 1)
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=s_layout)
    if SCALED != 0:
        k = keys.index(stage).reshape([BLOCK_N, BLOCK_D // 2]).load(gl.DotOperandLayout(0, s_layout, 2))
        k, odd_k = bf16_of_pairs(k)
        s = warpgroup_mma(k, q.index(0).permute([1, 0]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma(odd_k, q.index(1).permute([1, 0]), s, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
    else:
        k = keys.index(stage).reshape([BLOCK_N, BLOCK_D])
        s = warpgroup_mma(k, q.index(0).permute([1, 0]), zero, use_acc=False)
    j = first + it * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout))
    s, keep, _ = finish_scores(
        s, i2, j[:, None], None, 0, 0, tq, tk, offset, left, right, unit, softcap,
        BASE, 0, False, LEFT, RIGHT, SOFTCAP, True,
    )  # fmt: skip
    return s, keep


@gluon.jit
def _sweep(
    m, seen, taken, count, first, row, kv, q, key_tiles, value_tiles, keys, values, weights, ready, arrived, table, pages,
    scales, i2, rows, tq, tk, offset, left, right, unit, softcap,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    STAGES: gl.constexpr, VALUES: gl.constexpr, PAGE: gl.constexpr, LENGTHS: gl.constexpr, SKIP: gl.constexpr,
    SCALED: gl.constexpr, SHIFT: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """All keys with weights relative to ``m``; their first tiles are on the way (:func:`_start`). SHIFT takes more care.

    ``seen`` key tiles and ``taken`` value tiles came through the stages before.
    """
    taken = gl.to_tensor(taken)
    acc = gl.zeros([BLOCK_DV // 2 if SCALED != 0 else BLOCK_DV, BLOCK_M], gl.float32, layout=o_layout)
    odd = acc
    total = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=s_layout)
    lost = total
    used = taken
    live = gl.to_tensor(False)
    valid = tk - first - (count - 1) * BLOCK_N  # keys of the last tile
    for it in range(count):
        s, keep = _scores(
            it, seen, first, q, keys, ready, table, pages, scales, i2, tq, tk, offset, left, right, unit, softcap,
            BASE, LEFT, RIGHT, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, PAGE, SCALED, s_layout,
        )  # fmt: skip
        s = gl.where(keep, s, 0.0 if zero_at_zero(BASE) else -INF)
        p = numerators(s, m, BASE, SHIFT, SHIFT)
        kept = kept_scores(p, s, RECTIFY)
        total += gl.abs(p) if ABSOLUTE else kept
        if SCALED == 2:  # total is of the weights, and what is stored of the weights times the scale of their values
            of_values = _scale_of(scales[1], scales[3], first + it * BLOCK_N, table, pages, PAGE)
            rounded = (kept * of_values).to(gl.bfloat16)
            if SHIFT:
                lost += gl.where(of_values > 0, gl.abs(kept) - gl.abs(rounded.to(gl.float32)) / of_values, 0.0)
        else:
            rounded = kept.to(gl.bfloat16)
            if SHIFT:
                lost += gl.abs(kept) - gl.abs(rounded.to(gl.float32))
        # one buffer more than value tiles: no warp still reads the one that is written here, since all have met in between
        weights.index(taken % (VALUES + 1)).store(gl.permute(rounded, (1, 0)))
        fence_async_shared()
        if SKIP:
            top = gl.max(gl.max(gl.where(keep & rows, s, -INF), 1), 0)
            live = top > 0 if RECTIFY == POSITIVE else top >= 0
        barrier()  # scores are not read any more, and all warps see the weights
        stage = (seen + it) % STAGES
        following = it + STAGES
        _fetch(
            key_tiles, following, following < count, first, row, kv, table, ready.index(stage), keys.index(stage), BLOCK_N, PAGE
        )  # fmt: skip
        if SKIP:
            slot = taken % VALUES
            _fetch(value_tiles, it, live, first, row, kv, table, arrived.index(slot), values.index(slot), BLOCK_N, PAGE)
            taken += live.to(gl.int32)
            if taken - used == VALUES:
                acc, odd = _product(
                    acc,
                    odd,
                    used,
                    BLOCK_N,
                    values,
                    weights,
                    arrived,
                    BLOCK_N,
                    BLOCK_DV,
                    VALUES,
                    SCALED,
                    o_layout,
                    num_warps,
                )
                used += 1
        else:
            following = it + VALUES - 1
            slot = (taken + VALUES - 1) % VALUES
            _fetch(
                value_tiles, following, following < count, first, row, kv, table, arrived.index(slot), values.index(slot),
                BLOCK_N, PAGE,
            )  # fmt: skip
            last = BLOCK_N
            if LENGTHS:
                last = gl.where(it == count - 1, valid, BLOCK_N)
            acc, odd = _product(
                acc, odd, taken, last, values, weights, arrived, BLOCK_N, BLOCK_DV, VALUES, SCALED, o_layout, num_warps
            )
            taken += 1
    if SKIP:
        for at in range(used, taken):
            last = BLOCK_N
            if LENGTHS:
                last = gl.where(live & (at == taken - 1), valid, BLOCK_N)
            acc, odd = _product(
                acc, odd, at, last, values, weights, arrived, BLOCK_N, BLOCK_DV, VALUES, SCALED, o_layout, num_warps
            )
    barrier()
    total = gl.sum(total, 0)
    if SHIFT:  # the numerator as if its weights had not been rounded: with one key it is that key's value
        rest = total - gl.sum(lost, 0)
        factor = gl.convert_layout(gl.where(rest > 0, total / rest, 1.0), gl.SliceLayout(0, o_layout))[None, :]
        acc *= factor
        odd *= factor
    return acc, odd, total, taken


@gluon.jit
def _product(
    acc, odd, at, valid, values, weights, arrived, BLOCK_N: gl.constexpr, BLOCK_DV: gl.constexpr, VALUES: gl.constexpr,
    SCALED: gl.constexpr, o_layout: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The ``at``-th value tile into ``acc`` (in fp8: and ``odd``); its rows from ``valid`` on may hold anything."""
    mbarrier.wait(arrived.index(at % VALUES), (at // VALUES) & 1)
    w = weights.index(at % (VALUES + 1)).permute([1, 0])
    if SCALED != 0:  # whatever its bits are, a number is finite
        v = values.index(at % VALUES).reshape([BLOCK_N, BLOCK_DV // 2])
        v, odd_v = bf16_of_pairs(v.permute([1, 0]).load(gl.DotOperandLayout(0, o_layout, 2)))
        acc = warpgroup_mma(v, w, acc, is_async=True)
        odd = warpgroup_mma(odd_v, w, odd, is_async=True)
        acc, odd = warpgroup_mma_wait(num_outstanding=0, deps=[acc, odd])
        return acc, odd
    else:
        v = values.index(at % VALUES).reshape([BLOCK_N, BLOCK_DV])
        if valid < BLOCK_N:
            layout: gl.constexpr = gl.BlockedLayout(
                [1, 8], [32 // (BLOCK_DV // 8), BLOCK_DV // 8], [num_warps, 1], [1, 0]
            )
            n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
            v.store(gl.where((n < valid)[:, None], v.load(layout), 0.0))
            fence_async_shared()
            barrier()
        return warpgroup_mma(v.permute([1, 0]), w, acc), odd


@gluon.jit
def _largest(
    seen, count, first, row, kv, q, key_tiles, keys, ready, table, pages, scales, i2, tq, tk, offset, left, right, unit,
    softcap, BASE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr, SCALED: gl.constexpr,
    s_layout: gl.constexpr,
):  # fmt: skip
    """The largest score of every query; the first tiles are on the way."""
    top = gl.full([BLOCK_N, BLOCK_M], -INF, gl.float32, layout=s_layout)
    for it in range(count):
        s, keep = _scores(
            it, seen, first, q, keys, ready, table, pages, scales, i2, tq, tk, offset, left, right, unit, softcap,
            BASE, LEFT, RIGHT, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, PAGE, SCALED, s_layout,
        )  # fmt: skip
        top = gl.maximum(top, gl.where(keep, s, -INF))
        barrier()
        stage = (seen + it) % STAGES
        following = it + STAGES
        _fetch(
            key_tiles, following, following < count, first, row, kv, table, ready.index(stage), keys.index(stage), BLOCK_N, PAGE
        )  # fmt: skip
    return gl.max(top, 0)


@gluon.jit
def _take(
    b, kv, lo, hi, count, filled, offset, slot, seen, taken, room, tensors, strides, numbers, scaled,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, CONSTANT: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr, VALUES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, PAGE: gl.constexpr, LENGTHS: gl.constexpr,
    SKIP: gl.constexpr, SCALED: gl.constexpr, WHOLE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Keys ``lo`` to ``hi`` of a sequence and key head, in ``count`` tiles: a partial result, or (WHOLE) the output.

    ``seen`` key tiles and ``taken`` value tiles came through the rings before; returns how many have now.
    """
    q, keys, values, weights, ready, arrived = room
    query, key_tiles, value_tiles, partial_out, partial_total, partial_m, out, lse, sink, table = tensors
    q_b, q_h, q_t, q_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t, t_b = strides
    groups, tq, width, v_width, left, right, unit, softcap, eps, pages = numbers
    key_scale, value_scale, ks_b, ks_h, vs_b, vs_h = scaled
    if SCALED != 0:
        key_scale += kv.to(gl.int64) * ks_h
        value_scale += kv.to(gl.int64) * vs_h
    if SCALED == 1:
        unit *= gl.load(key_scale + b.to(gl.int64) * ks_b)
    scales = (key_scale, value_scale, ks_b, vs_b)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    PARTS: gl.constexpr = 2 if SCALED != 0 else 1
    D: gl.constexpr = BLOCK_D // PARTS
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [num_warps, 1], [1, 0])
    ANCHORED: gl.constexpr = BASE != EXP or RECTIFY != NONE or CONSTANT == ONE
    table_of = table
    if PAGE != 0:
        table_of = table + b * t_b
    _start(key_tiles, seen, count, lo, b, kv, table_of, ready, keys, BLOCK_N, PAGE, STAGES, STAGES)
    if not SKIP:
        _start(value_tiles, taken, count, lo, b, kv, table_of, arrived, values, BLOCK_N, PAGE, VALUES - 1, VALUES)
    r = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, q_layout))
    d = PARTS * gl.arange(0, D, layout=gl.SliceLayout(0, q_layout))
    at = b.to(gl.int64) * q_b + (kv * groups + r // tq).to(gl.int64) * q_h + r % tq * q_t
    inside = (r < groups * tq)[:, None] & (d < width)[None, :]
    for part in gl.static_range(PARTS):
        q.index(part).store(gl.load(query + at[:, None] + (d + part)[None, :] * q_d, mask=inside, other=0.0))
    fence_async_shared()
    barrier()
    r = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))
    rows = r < groups * tq
    i = r % tq
    zero = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(0, s_layout))
    acc, odd, total, taken = _sweep(
        zero[None, :], seen, taken, count, lo, b, kv, q, key_tiles, value_tiles, keys, values, weights, ready, arrived,
        table_of, pages, scales, i[None, :], rows[None, :], tq, filled, offset, left, right, unit, softcap,
        BASE, RECTIFY, ABSOLUTE, LEFT, RIGHT, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, VALUES, PAGE, LENGTHS,
        SKIP, SCALED, False, s_layout, o_layout, num_warps,
    )  # fmt: skip
    seen += count
    m = zero
    few = few_seen(0, tq, filled, offset, left, right, LEFT, RIGHT) & (count > 0)
    if not exponential(BASE):
        wrong = gl.to_tensor(0)
        sees = rows
    else:
        sees = rows & (hi > lo)
        if RIGHT:
            sees = sees & (gl.minimum(hi, i + offset + right + 1) > lo)
        if LEFT:
            sees = sees & (gl.maximum(lo, i + offset - left) < hi)
        sound = total < _LARGEST
        if not ANCHORED:
            sound = sound & ((total > _SMALLEST) | ~sees)
        wrong = gl.max(gl.where(sound | ~rows, 0, 1), 0) + gl.max(gl.max(gl.where(gl.abs(acc) < 3.0e38, 0, 1), 0), 0)
        if SCALED != 0:
            wrong += gl.max(gl.max(gl.where(gl.abs(odd) < 3.0e38, 0, 1), 0), 0)
    if (wrong > 0) | few:
        _start(key_tiles, seen, count, lo, b, kv, table_of, ready, keys, BLOCK_N, PAGE, STAGES, STAGES)
        m = _largest(
            seen, count, lo, b, kv, q, key_tiles, keys, ready, table_of, pages, scales, i[None, :],
            tq, filled, offset, left, right, unit, softcap,
            BASE, LEFT, RIGHT, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, PAGE, SCALED, s_layout,
        )  # fmt: skip
        seen += count
        if ANCHORED:
            m = gl.maximum(m, 0.0)
        if not exponential(BASE):
            m = zero
        _start(key_tiles, seen, count, lo, b, kv, table_of, ready, keys, BLOCK_N, PAGE, STAGES, STAGES)
        if not SKIP:
            _start(
                value_tiles, taken, count, lo, b, kv, table_of, arrived, values, BLOCK_N, PAGE, VALUES - 1, VALUES
            )  # fmt: skip
        acc, odd, total, taken = _sweep(
            gl.where(m == -INF, 0.0, m)[None, :], seen, taken, count, lo, b, kv, q, key_tiles, value_tiles, keys,
            values, weights, ready, arrived, table_of, pages, scales, i[None, :], rows[None, :], tq, filled, offset, left,
            right, unit, softcap, BASE, RECTIFY, ABSOLUTE, LEFT, RIGHT, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES,
            VALUES, PAGE, LENGTHS, SKIP, SCALED, True, s_layout, o_layout, num_warps,
        )  # fmt: skip
        seen += count
    elif not ANCHORED:  # a split without keys says nothing about the largest score
        m = gl.where(sees, 0.0, -INF)
    if SCALED == 1:
        of_values = gl.load(value_scale + b.to(gl.int64) * vs_b)
        acc *= of_values
        odd *= of_values
    d = PARTS * gl.arange(0, BLOCK_DV // PARTS, layout=gl.SliceLayout(1, o_layout))
    if WHOLE:  # as the merge
        if CONSTANT == SINK:
            logit = gl.load(sink + kv * groups + gl.minimum(r // tq, groups - 1)).to(gl.float32) * LOG2E
            m, total, factor = anchored(gl.where(total == 0, -INF, m), total, logit, eps)
            factor = gl.convert_layout(factor, gl.SliceLayout(0, o_layout))[None, :]
            acc *= factor
            odd *= factor
        m = gl.where(m == -INF, 0.0, m)
        if CONSTANT == ONE:
            total += gl.exp2(-m) if exponential(BASE) else 1.0
        elif CONSTANT == SINK:
            total += gl.exp2(logit - m)
        total += eps
        inverse = gl.where(total == 0, 0.0, 1.0 / total)
        to = b.to(gl.int64) * l_b + (kv * groups + r // tq).to(gl.int64) * l_h + i * l_t
        gl.store(lse + to, (m + gl.log2(total)) * LN2, mask=rows)
        inverse = gl.convert_layout(inverse, gl.SliceLayout(0, o_layout))[None, :]
        r = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, o_layout))
        at = b.to(gl.int64) * o_b + (kv * groups + r // tq).to(gl.int64) * o_h + r % tq * o_t
        inside = (r < groups * tq)[None, :] & (d < v_width)[:, None]
        gl.store(out + at[None, :] + d[:, None] * o_d, (acc * inverse).to(out.dtype.element_ty), mask=inside)
        if SCALED != 0:
            gl.store(out + at[None, :] + (d + 1)[:, None] * o_d, (odd * inverse).to(out.dtype.element_ty), mask=inside)
    else:
        slot *= BLOCK_M
        gl.store(partial_total + slot + r, total, mask=rows)
        gl.store(partial_m + slot + r, m, mask=rows)
        r = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, o_layout))
        at = partial_out + slot * BLOCK_DV + r[None, :] * BLOCK_DV + d[:, None]
        inside = (r < groups * tq)[None, :] & (d < BLOCK_DV)[:, None]
        gl.store(at, acc, mask=inside)
        if SCALED != 0:
            gl.store(at + 1, odd, mask=inside)
    return seen, taken


@gluon.jit(
    do_not_specialize=["sequences", "kv_heads", "tq", "tk", "left", "right", "fewest", "t_b", "ks_b", "vs_b", "pages"]
)
def decode_keys(
    query, key_tiles, value_tiles, partial_out, partial_total, partial_m, out, lse, sink, lengths, table,
    key_scale, value_scale, q_b, q_h, q_t, q_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t, t_b, ks_b, ks_h, vs_b, vs_h,
    sequences, kv_heads, groups, tq, tk, width, v_width, left, right, unit, softcap, eps, fewest, pages,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, CONSTANT: gl.constexpr,
    NEGATIVE_GRADIENT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, STAGES: gl.constexpr, VALUES: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, PAGE: gl.constexpr, LENGTHS: gl.constexpr, SKIP: gl.constexpr,
    SCALED: gl.constexpr, SHARED: gl.constexpr, WHOLE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As ``decode.py``, with the same grid and partial results, but only visible keys are split.

    SHARED: the grid is as many programs as run at a time, fewer than there are sequences and key heads. They share all key
    tiles evenly (``fewest`` at least), one pair of sequence and head after the other. The index of a partial result is
    the number of the pair plus that of the program, which no other result has.

    WHOLE: no pair is divided; programs write ``out`` and ``lse``, and there is nothing to merge.

    Pages have a multiple of BLOCK_N keys; of one that the cache does not have nothing is read (:func:`_fetch`). Weights are
    taken relative to 0; only where a sum left the range, or where a query sees few keys, once more relative to the largest
    score.
    """
    gdc_launch_dependents()  # the merge waits by itself
    PARTS: gl.constexpr = 2 if SCALED != 0 else 1
    of_cache: gl.constexpr = gl.int16 if SCALED != 0 else gl.bfloat16
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D // PARTS], gl.bfloat16)
    weights_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_N], gl.bfloat16)
    keys = gl.allocate_shared_memory(of_cache, [STAGES] + key_tiles.block_type.shape, key_tiles.layout)  # noqa: RUF005 (no stars in Triton)
    values = gl.allocate_shared_memory(of_cache, [VALUES] + value_tiles.block_type.shape, value_tiles.layout)  # noqa: RUF005
    weights = gl.allocate_shared_memory(gl.bfloat16, [VALUES + 1, BLOCK_M, BLOCK_N], weights_shared)
    q = gl.allocate_shared_memory(gl.bfloat16, [PARTS, BLOCK_M, BLOCK_D // PARTS], shared)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [VALUES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    for stage in gl.static_range(VALUES):
        mbarrier.init(arrived.index(stage), count=1)
    room = (q, keys, values, weights, ready, arrived)
    tensors = (query, key_tiles, value_tiles, partial_out, partial_total, partial_m, out, lse, sink, table)
    strides = (q_b, q_h, q_t, q_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t, t_b)
    numbers = (groups, tq, width, v_width, left, right, unit, softcap, eps, pages)
    scaled = (key_scale, value_scale, ks_b, ks_h, vs_b, vs_h)
    if SHARED:
        program = gl.program_id(0)
        some = gl.arange(0, 32 * num_warps, layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
        tiles, _ = count_tiles(
            some, 0, sequences, lengths, tq, tk, left, right, BLOCK_N, LEFT, RIGHT, BOTTOM_RIGHT, LENGTHS
        )
        share = share_of(tiles * kv_heads, gl.num_programs(0), fewest)
        position = program * share
        end = gl.minimum(position + share, tiles * kv_heads)
        seen, taken = gl.to_tensor(0), gl.to_tensor(0)
        # tiles of the next pair are not asked for before this one ends: programs come there at different times, others read on
        while position < end:
            b, before = sequence_at(
                some,
                position,
                sequences,
                kv_heads,
                lengths,
                tq,
                tk,
                left,
                right,
                BLOCK_N,
                LEFT,
                RIGHT,
                BOTTOM_RIGHT,
                LENGTHS,
            )
            filled, offset, lo, hi, tiles = keys_of_sequence(
                b, sequences, lengths, tq, tk, left, right, BLOCK_N, LEFT, RIGHT, BOTTOM_RIGHT, LENGTHS
            )
            rest = position - before * kv_heads
            kv, first = rest // tiles, rest % tiles
            count = gl.minimum(tiles - first, end - position)
            lo += first * BLOCK_N
            slot = b.to(gl.int64) * kv_heads + kv + program
            seen, taken = _take(
                b, kv, lo, gl.minimum(hi, lo + count * BLOCK_N), count, filled, offset, slot,
                seen, taken, room, tensors, strides, numbers, scaled,
                BASE, RECTIFY, ABSOLUTE, CONSTANT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, VALUES, LEFT, RIGHT, SOFTCAP,
                PAGE, LENGTHS, SKIP, SCALED, WHOLE, num_warps,
            )  # fmt: skip
            position += count
    else:
        split, kv, b = gl.program_id(0), gl.program_id(1), gl.program_id(2)
        filled, offset, lo, hi, tiles = keys_of_sequence(
            b, sequences, lengths, tq, tk, left, right, BLOCK_N, LEFT, RIGHT, BOTTOM_RIGHT, LENGTHS
        )
        share = gl.cdiv(tiles, gl.num_programs(0))
        count = gl.maximum(0, gl.minimum(tiles - split * share, share))
        lo += split * share * BLOCK_N
        slot = (b.to(gl.int64) * kv_heads + kv) * gl.num_programs(0) + split
        _take(
            b, kv, lo, gl.minimum(hi, lo + count * BLOCK_N), count, filled, offset, slot,
            0, 0, room, tensors, strides, numbers, scaled,
            BASE, RECTIFY, ABSOLUTE, CONSTANT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, VALUES, LEFT, RIGHT, SOFTCAP,
            PAGE, LENGTHS, SKIP, SCALED, WHOLE, num_warps,
        )  # fmt: skip
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    for stage in gl.static_range(VALUES):
        mbarrier.invalidate(arrived.index(stage))
