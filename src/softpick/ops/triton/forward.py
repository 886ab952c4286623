"""Attention forward: one program a query tile and head, key tiles in a loop, nothing of size T x T in memory.

Without SHIFT exponentials are taken relative to 0 and no row maximum is kept: for every anchored normalizer that is the
same number as long as nothing overflows. OPTIMISTIC does that, looks at the result, and goes through the keys again with
a running maximum where a sum left the safe range (any score above about 44).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

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
    anchored,
    exponential,
    kept_scores,
    numerators,
    zero_at_zero,
)
from softpick.ops.triton.device import (
    FEW,
    FEW_KEYS,
    FEW_ROWS,
    FP16_SCALE,
    TINY,
    add_product,
    count_seen,
    dropout_factor,
    finish_scores,
    keys_of_queries,
    keys_seen,
    load_rows,
    rows_with_few,
    tile_at,
)

_LARGEST = Constant(2.0**64)  # sums beyond this are computed again with a shift
_SMALLEST = Constant(2.0**-64)  # likewise below, for the normalizer without an anchor

__all__ = ["attention_forward"]


@triton.jit
def _sweep(
    acc, total, kept, m, top, q, key, value, mask, i2, lo, hi, tq, tk, width, v_width, offset, left, right,
    unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, STATS: tl.constexpr,
    EDGE: tl.constexpr, SHIFT: tl.constexpr, EXACT: tl.constexpr, RELU_ASM: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Add the key tiles from ``lo`` to ``hi`` to the accumulators."""
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    key += tl.cast(lo, tl.int64) * k_t
    value += tl.cast(lo, tl.int64) * v_t
    for j in tl.range(lo, hi, BLOCK_N):
        k = load_rows(key, n, d, k_t, k_d, tk - j, width, EDGE, PAD_D)
        v = load_rows(value, n, dv, v_t, v_d, tk - j, v_width, EDGE, PAD_DV)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, keep, _ = finish_scores(
            product, i2, (j + n)[None, :], mask, m_q, m_k, tq, tk, offset, left, right, unit, softcap,
            BASE, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP, EDGE,
        )  # fmt: skip
        if EDGE or MASK != 0:
            s = tl.where(keep, s, 0.0 if zero_at_zero(BASE) else -INF)
        if STATS:
            seen = s
            if (EDGE or MASK != 0) and zero_at_zero(BASE):
                seen = tl.where(keep, s, -INF)
            top = tl.maximum(top, tl.max(seen, 1))
        if SHIFT and exponential(BASE):
            high = tl.maximum(m, tl.max(s, 1))
            # only softmax starts at minus infinity; a row that saw nothing yet stays at a finite m
            fresh = tl.where(high == -INF, 0.0, high)
            factor = tl.exp2(m - fresh)
            total *= factor
            acc *= factor[:, None]
            if STATS:
                kept *= factor
            m = high
            p = numerators(s, fresh[:, None], BASE, True, EXACT)
        else:
            p = numerators(s, 0.0, BASE, False, EXACT)
        if ABSOLUTE:
            total += tl.sum(tl.abs(p), 1)
            if STATS:
                kept += tl.sum(kept_scores(p, s, RECTIFY), 1)
            RELU: tl.constexpr = RECTIFY == POSITIVE
        else:
            p = kept_scores(p, s, RECTIFY)
            total += tl.sum(p, 1)
            if STATS:
                kept += tl.sum(p, 1)
            RELU: tl.constexpr = False
        if DROPOUT:
            p *= dropout_factor(seed, start, i2, (j + n)[None, :], tk, dropout_p)
        if v.dtype == tl.float16:
            if not exponential(BASE):
                # weights have no bound here: the accumulator alone is kept relative to the largest so far
                high = tl.maximum(m, tl.max(tl.abs(p), 1))
                acc *= (m / high)[:, None]
                p /= high[:, None]
                m = high
            p *= FP16_SCALE
        acc = add_product(acc, p, v, RELU, RELU_ASM, SPLIT, PRECISION)
        key += BLOCK_N * k_t
        value += BLOCK_N * v_t
    return acc, total, kept, m, top


@triton.jit
def _phases(
    acc, total, kept, m, top, q, key, value, mask, i2, lo, full_lo, full_hi, hi, tq, tk, width, v_width, offset, left,
    right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, STATS: tl.constexpr,
    SHIFT: tl.constexpr, EXACT: tl.constexpr, RELU_ASM: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Add all key tiles: the edge before (window), the full tiles, the edge behind (diagonal, end)."""
    if LEFT:
        acc, total, kept, m, top = _sweep(
            acc, total, kept, m, top, q, key, value, mask, i2, lo, full_lo, tq, tk, width, v_width, offset, left, right,
            unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
            DROPOUT, STATS, True, SHIFT, EXACT, RELU_ASM, PRECISION, SPLIT,
        )  # fmt: skip
    acc, total, kept, m, top = _sweep(
        acc, total, kept, m, top, q, key, value, mask, i2, full_lo, full_hi, tq, tk, width, v_width, offset, left, right,
        unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
        BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
        DROPOUT, STATS, False, SHIFT, EXACT, RELU_ASM, PRECISION, SPLIT,
    )  # fmt: skip
    acc, total, kept, m, top = _sweep(
        acc, total, kept, m, top, q, key, value, mask, i2, full_hi, hi, tq, tk, width, v_width, offset, left, right,
        unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
        BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
        DROPOUT, STATS, True, SHIFT, EXACT, RELU_ASM, PRECISION, SPLIT,
    )  # fmt: skip
    return acc, total, kept, m, top


@triton.jit
def _all_keys(
    q, key, value, mask, i2, lo, full_lo, full_hi, hi, anchor, tq, tk, width, v_width, offset, left, right,
    unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    STATS: tl.constexpr, SHIFT: tl.constexpr, EXACT: tl.constexpr, RELU_ASM: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """All visible keys of the query tile."""
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    kept = tl.zeros([BLOCK_M], tl.float32)
    m = tl.zeros([BLOCK_M], tl.float32) + anchor
    if not exponential(BASE):
        m += TINY
    top = tl.full([BLOCK_M], -INF, tl.float32)
    acc, total, kept, m, top = _phases(
        acc, total, kept, m, top, q, key, value, mask, i2, lo, full_lo, full_hi, hi, tq, tk, width, v_width,
        offset, left, right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
        BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
        DROPOUT, STATS, SHIFT, EXACT, RELU_ASM, PRECISION, SPLIT,
    )  # fmt: skip
    return acc, total, kept, m, top


@triton.jit
def _finish(
    acc, total, kept, m, top, logit, eps, rows, out, lse, mass, largest, o_t, o_d, l_t, v_width,
    BASE: tl.constexpr, CONSTANT: tl.constexpr, STATS: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Normalize and write ``rows`` of a tile, whose first row is where the pointers point."""
    if HALF:
        if not exponential(BASE):
            acc *= m[:, None]
        acc *= 1.0 / FP16_SCALE
    if not exponential(BASE):
        m = tl.zeros([BLOCK_M], tl.float32)
        if CONSTANT == ONE:
            total += 1.0
    else:
        m = tl.where(m == -INF, 0.0, m)
        if CONSTANT == ONE:
            total += tl.exp2(-m)
        elif CONSTANT == SINK:
            lowest = tl.where((eps == 0) & (logit > -INF), logit, 0.0)
            m = tl.where(total == 0, tl.maximum(lowest, logit), m)  # the sink is all there is, however low
            total += tl.exp2(logit - m)
    total += eps  # relative to m
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    i, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    tl.store(
        out + i[:, None] * o_t + dv[None, :] * o_d,
        (acc * inverse[:, None]).to(out.dtype.element_ty),
        mask=rows[:, None] & (dv[None, :] < v_width),
    )
    tl.store(lse + i * l_t, (m + tl.log2(total)) * LN2, mask=rows)
    if STATS:
        tl.store(mass + i * l_t, kept * inverse, mask=rows)
        if exponential(BASE):
            top *= LN2
        tl.store(largest + i * l_t, top, mask=rows)


@triton.jit
def _few_tile(
    query, key, value, mask, i0, anchor, logit, eps, out, lse, mass, largest, tq, tk, width, v_width, offset, left, right,
    unit, softcap, dropout_p, seed, start, q_t, q_d, k_t, k_d, v_t, v_d, o_t, o_d, l_t, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, STATS: tl.constexpr,
    RELU_ASM: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write those of FEW_ROWS rows from ``i0`` on that see 1 to FEW keys, with care; pointers are to the head."""
    i = tl.arange(0, FEW_ROWS)
    i2 = (i0 + i)[:, None]
    lo, _, _, hi = keys_of_queries(
        i0, tl.minimum(i0 + FEW_ROWS, tq), tk, offset, left, right, FEW_KEYS, LEFT, RIGHT
    )  # fmt: skip
    seen = count_seen(mask, m_q, m_k, i2, lo, hi, tq, tk, offset, left, right, MASK, MASK_ROWS, LEFT, RIGHT, 128)
    rows = (seen > 0) & (seen <= FEW)
    if tl.max(rows.to(tl.int32), 0) > 0:
        i64 = tl.cast(i0, tl.int64)
        q = load_rows(query + i64 * q_t, i, tl.arange(0, BLOCK_D), q_t, q_d, tq - i0, width, True, PAD_D)
        zero = tl.zeros([FEW_ROWS], tl.float32)
        m = zero + anchor
        if not exponential(BASE):
            m += TINY
        acc, total, kept, m, top = _sweep(
            tl.zeros([FEW_ROWS, BLOCK_DV], tl.float32), zero, zero, m, zero - INF, q, key,
            value, mask, i2, lo, hi, tq, tk, width, v_width, offset, left, right,
            unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, FEW_KEYS, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
            DROPOUT, STATS, True, True, True, RELU_ASM, PRECISION, True,
        )  # fmt: skip
        if EARLY:
            gdc_wait()
        _finish(
            acc, total, kept, m, top, logit, eps, rows, out + i64 * o_t, lse + i64 * l_t,
            mass + i64 * l_t if STATS else mass, largest + i64 * l_t if STATS else largest, o_t, o_d, l_t, v_width,
            BASE, CONSTANT, STATS, q.dtype == tl.float16, FEW_ROWS, BLOCK_DV,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "heads",
        "tiles",
        "pairs",
        "together",
        "tq",
        "tk",
        "left",
        "right",
        "few_tiles",
    ]
)
def attention_forward(
    query, key, value, out, lse, mass, largest, mask, sink, cu_q, cu_k, seed_at, redo,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, l_b, l_h, l_t, m_b, m_h, m_q, m_k,
    tiles, heads, pairs, together, few_tiles, groups, tq, tk, width, v_width, left, right, unit, eps,
    softcap, dropout_p,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr,
    NEGATIVE_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    STATS: tl.constexpr, VARLEN: tl.constexpr, OPTIMISTIC: tl.constexpr, EXACT: tl.constexpr,
    RELU_ASM: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: ``few_tiles`` programs for each of the ``pairs`` of head and sequence, which write the rows that see few keys,
    then the query tiles of all pairs (:func:`tile_at`), which write the others.

    Writes ``out``, ``lse`` (natural), with STATS mass and largest.

    With a mask those rows are not known before the launch: they are written a second time, in a launch of their own. With
    ``redo``, a counter and an int32 a query tile, those with zero have nothing to do.

    EARLY: may be launched while the kernel that writes ``redo`` runs.
    """
    at = tl.program_id(0) - few_tiles * pairs
    if redo is not None and at >= 0:
        if EARLY:
            gdc_wait()
        if tl.load(redo + 1 + at) == 0:
            return
    tile, h, b = tile_at(tl.maximum(at, 0), tiles, heads, pairs, together)
    if at < 0:
        pair = tl.program_id(0) // few_tiles
        tile, h, b = tl.program_id(0) % few_tiles, pair % heads, pair // heads
    h, b = h.to(tl.int64), b.to(tl.int64)
    start = (b * heads + h) * 1_000_003
    if VARLEN:
        q0, k0 = tl.load(cu_q + b).to(tl.int64), tl.load(cu_k + b).to(tl.int64)
        tq, tk = (tl.load(cu_q + b + 1) - q0).to(tl.int32), (tl.load(cu_k + b + 1) - k0).to(tl.int32)
        query += q0 * q_t
        key += k0 * k_t
        value += k0 * v_t
        out += q0 * o_t
        lse += q0 * l_t
        if STATS:
            mass += q0 * l_t
            largest += q0 * l_t
        b *= 0
    offset = 0
    if BOTTOM_RIGHT:
        offset = tk - tq
    kv = h // groups
    query += b * q_b + h * q_h
    key += b * k_b + kv * k_h
    value += b * v_b + kv * v_h
    out += b * o_b + h * o_h
    rest = b * l_b + h * l_h
    lse += rest
    if STATS:
        mass += rest
        largest += rest
    if MASK != 0:
        mask += b * m_b + h * m_h
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_at)
    ANCHORED: tl.constexpr = anchored(BASE, RECTIFY, CONSTANT)
    anchor = 0.0 if ANCHORED else -INF
    logit = 0.0
    if CONSTANT == SINK:
        logit = tl.load(sink + h).to(tl.float32) * LOG2E
        anchor = tl.maximum(anchor, logit)
        if BASE == EXP and RECTIFY == NONE:  # scores and sink may lie far below 0 together
            anchor = tl.where(eps == 0, logit, anchor)
    if at < 0:
        first, last = rows_with_few(mask, m_k, tq, tk, offset, left, right, MASK, MASK_ROWS, LEFT, RIGHT, 128)
        for i0 in range(first + tile * FEW_ROWS, last, few_tiles * FEW_ROWS):
            _few_tile(
                query, key, value, mask, i0, anchor, logit, eps, out, lse, mass, largest, tq, tk, width, v_width, offset, left,
                right, unit, softcap, dropout_p, seed, start, q_t, q_d, k_t, k_d, v_t, v_d, o_t, o_d, l_t, m_q, m_k,
                BASE, RECTIFY, ABSOLUTE, CONSTANT, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
                DROPOUT, STATS, RELU_ASM, PRECISION, EARLY,
            )  # fmt: skip
        return
    i0 = (tiles - 1 - tile) * BLOCK_M  # under a causal mask the last queries see the most keys
    if i0 >= tq:
        return
    i, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    i64 = i0.to(tl.int64)
    query += i64 * q_t
    q = load_rows(query, i, d, q_t, q_d, tq - i0, width, True, PAD_D)
    i2 = (i0 + i)[:, None]
    lo, full_lo, full_hi, hi = keys_of_queries(
        i0, tl.minimum(i0 + BLOCK_M, tq), tk, offset, left, right, BLOCK_N, LEFT, RIGHT
    )
    acc, total, kept, m, top = _all_keys(
        q, key, value, mask, i2, lo, full_lo, full_hi, hi, anchor, tq, tk, width, v_width, offset, left,
        right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
        BASE, RECTIFY, ABSOLUTE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT,
        SOFTCAP, DROPOUT, STATS, not OPTIMISTIC, EXACT, RELU_ASM, PRECISION, False,
    )  # fmt: skip
    if OPTIMISTIC:
        m = tl.zeros([BLOCK_M], tl.float32)
        sound = total < _LARGEST
        if not ANCHORED:
            sound = sound & ((total > _SMALLEST) | (hi <= lo))
        if CONSTANT == SINK:
            sound = sound & (tl.zeros([BLOCK_M], tl.float32) + logit < 64.0)
            if BASE == EXP and RECTIFY == NONE:
                sound = sound & ((total + tl.exp2(logit) > _SMALLEST) | (eps > 0))
        trouble = tl.max(tl.where(sound, 0, 1)) + tl.max(tl.where(tl.abs(acc) < 3.0e38, 0, 1))
        if trouble > 0:
            acc, total, kept, m, top = _all_keys(
                q, key, value, mask, i2, lo, full_lo, full_hi, hi, anchor, tq, tk, width, v_width, offset, left,
                right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
                BASE, RECTIFY, ABSOLUTE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT,
                SOFTCAP, DROPOUT, STATS, True, EXACT, RELU_ASM, PRECISION, False,
            )  # fmt: skip
    rows = i0 + i < tq
    if MASK == 0 and q.dtype != tl.float32:
        seen = keys_seen(i0 + i, tk, offset, left, right, LEFT, RIGHT)
        rows = rows & ((seen == 0) | (seen > FEW))  # other programs write the rest
    _finish(
        acc, total, kept, m, top, logit, eps, rows, out + i64 * o_t, lse + i64 * l_t,
        mass + i64 * l_t if STATS else mass, largest + i64 * l_t if STATS else largest, o_t, o_d, l_t, v_width,
        BASE, CONSTANT, STATS, q.dtype == tl.float16, BLOCK_M, BLOCK_DV,
    )  # fmt: skip
