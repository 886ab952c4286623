"""What the backward pass needs of a row; of rows that see few keys computed with care.

With one visible key the weight is 1 and the gradient of the score 0, with few it is still a difference of nearly equal
numbers, ``dp - D``, times ``1 / l``, which is large where scores are small. ``D = do . out`` is off by the rounding of ``out``
and of the weights in it, 2^-9 of ``dp`` in bf16. Here ``D`` is the sum of weights times the same products ``dp``. In fp32 the
rounding of ``D`` itself would be the largest error that is left, so there ``D`` is the sum of two numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softpick.ops.triton.base_functions import (
    EXP,
    INF,
    LOG2E,
    NONE,
    ONE,
    SINK,
    careful_numerators,
    exponential,
    kept_scores,
)
from softpick.ops.triton.device import (
    FEW,
    FEW_KEYS,
    FEW_ROWS,
    count_seen,
    dropout_factor,
    finish_scores,
    keys_of_queries,
    keys_seen,
    load_rows,
    rows_with_few,
)

__all__ = ["row_statistics"]


@triton.jit
def _products(
    q, do, level, inverse, minus, key, value, mask, i2, lo, hi, tq, tk, width, v_width, offset, left, right, unit, softcap,
    dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of rows of queries: the sum of weights times ``dp``, less ``minus`` times the share of the keys in the denominator; that
    share; the largest score (of anchored normalizers at least 0).
    """
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    LOWEST: tl.constexpr = -INF if BASE == EXP and RECTIFY == NONE and CONSTANT == 0 else 0.0
    delta, share, top = tl.zeros_like(level), tl.zeros_like(level), tl.zeros_like(level) + LOWEST
    for j in tl.range(lo, hi, BLOCK_N):
        at = tl.cast(j, tl.int64)
        k = load_rows(key + at * k_t, n, d, k_t, k_d, tk - j, width, True, PAD_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        v = load_rows(value + at * v_t, n, dv, v_t, v_d, tk - j, v_width, True, PAD_DV)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        j2 = (j + n)[None, :]
        s, keep, _ = finish_scores(
            s, i2, j2, mask, m_q, m_k, tq, tk, offset, left, right, unit, softcap,
            BASE, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP, True,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(tl.where(keep, s, LOWEST), 1))
        p = tl.where(keep, careful_numerators(s, level[:, None], inverse[:, None], BASE), 0.0)
        kept = kept_scores(p, s, RECTIFY)
        size = tl.abs(p) if ABSOLUTE else kept
        share += tl.sum(size, 1)
        if DROPOUT:
            dp *= dropout_factor(seed, start, i2, j2, tk, dropout_p)
        dp = tl.where(keep & (kept != 0), tl.where(kept < 0, -dp, dp), 0.0)
        delta += tl.sum(size * (dp - minus[:, None]), 1)
    return delta, share, top


@triton.jit
def _level(lse, rows):
    """The lse in the tiles' units; plus infinity for an empty row, which zeroes its exponentials."""
    level = tl.load(lse, mask=rows, other=-INF)
    return tl.where(level == -INF, INF, level * LOG2E)


@triton.jit
def _few_tile(
    query, key, value, grad_out, lse, statistics, mask, sink, i0, tq, tk, width, v_width, offset, left, right, unit, eps,
    softcap, dropout_p, seed, start, q_t, q_d, k_t, k_d, v_t, v_d, g_t, g_d, l_t, m_q, m_k, s_t, s_c,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write ``delta`` of those of FEW_ROWS rows from ``i0`` on that see 1 to FEW keys; pointers are to the head."""
    i = tl.arange(0, FEW_ROWS)
    i2 = (i0 + i)[:, None]
    lo, _, _, hi = keys_of_queries(
        i0, tl.minimum(i0 + FEW_ROWS, tq), tk, offset, left, right, FEW_KEYS, LEFT, RIGHT
    )  # fmt: skip
    seen = count_seen(mask, m_q, m_k, i2, lo, hi, tq, tk, offset, left, right, MASK, MASK_ROWS, LEFT, RIGHT, 128)
    few = (seen > 0) & (seen <= FEW)
    if tl.max(few.to(tl.int32), 0) > 0:
        i64 = tl.cast(i0, tl.int64)
        q = load_rows(query + i64 * q_t, i, tl.arange(0, BLOCK_D), q_t, q_d, tq - i0, width, True, PAD_D)
        do = load_rows(grad_out + i64 * g_t, i, tl.arange(0, BLOCK_DV), g_t, g_d, tq - i0, v_width, True, PAD_DV)
        level = _level(lse + (i64 + i) * l_t, few)
        inverse = tl.exp2(-level)
        zero = tl.zeros_like(level)
        delta, share, top = _products(
            q, do, level, inverse, zero, key, value, mask, i2, lo, hi, tq, tk, width, v_width, offset, left, right, unit,
            softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, CONSTANT, FEW_KEYS, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT,
            SOFTCAP, DROPOUT, PRECISION,
        )  # fmt: skip
        rest = zero  # what the constant and eps have of the denominator
        if not exponential(BASE):
            rest += (eps + (1.0 if CONSTANT == ONE else 0.0)) * inverse
        else:
            if CONSTANT == ONE:
                rest += inverse
            elif CONSTANT == SINK:
                logit = tl.load(sink).to(tl.float32) * LOG2E
                rest += tl.exp2(logit - level)
                top = tl.maximum(top, logit)
            # without eps the level may be so far below 0 that the power overflows, and 0 times infinity is NaN
            rest += tl.where(eps > 0.0, eps * tl.exp2(top - level), 0.0)
        share += rest  # 1, but for the rounding of the level
        delta = tl.where(share > 0, tl.div_rn(delta, share), 0.0)
        at = statistics + (i64 + i) * s_t + 2 * s_c
        tl.store(at, delta, mask=few)
        if q.dtype == tl.float32:
            low, _share, _top = _products(
                q, do, level, inverse, delta, key, value, mask, i2, lo, hi, tq, tk, width, v_width, offset, left, right, unit,
                softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
                BASE, RECTIFY, ABSOLUTE, CONSTANT, FEW_KEYS, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT,
                SOFTCAP, DROPOUT, PRECISION,
            )  # fmt: skip
            low -= rest * delta
            tl.store(at + s_c, tl.where(share > 0, tl.div_rn(low, share), 0.0), mask=few)


@triton.jit(do_not_specialize=["heads", "tq", "tk", "left", "right", "padded", "few_tiles"])
def row_statistics(
    query, key, value, out, grad_out, lse, statistics, least, mask, sink, cu_q, cu_k, seed_at,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d, g_b, g_h, g_t, g_d, l_b, l_h, l_t,
    m_b, m_h, m_q, m_k, s_h, s_t, s_c,
    few_tiles, heads, groups, tq, tk, padded, width, v_width, left, right, unit, eps, softcap, dropout_p,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr,
    NEGATIVE_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """What the backward kernels need of a row: ``statistics`` is ``(B, H, Tq, 4)`` in memory (they are loaded together), or
    ``(B, H, 4, padded)`` for :mod:`softpick.ops.triton.hopper`, where rows of no query come after the last one.

    The lse in the tiles' units (plus infinity for an empty row), ``1 / l``, ``delta = do . out``, and for inputs in 16 bits a
    power of two that keeps ``ds`` of the row, which may reach ``dp / l``, in the range of fp16 (``least``: the least of every
    BLOCK_M rows), for those in fp32 what is to be added to ``delta``. Grid: (programs, heads, batch). The first ``few_tiles``
    programs write ``delta`` of the rows that see few keys, the others take BLOCK_M rows each. With a mask and with packed
    sequences, where those do not know which rows the first write, the first come in a launch of their own. With ``PART`` the
    keys are some of those that ``out`` is of, so ``delta`` is ``do . out`` for every row, and there are no first programs.
    """
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0) - few_tiles
    if tile >= 0:
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        dv = tl.arange(0, BLOCK_DV)
        inside = (rows[:, None] < tq) & (dv[None, :] < v_width)
        o = tl.load(out + b * o_b + h * o_h + rows[:, None] * o_t + dv[None, :] * o_d, mask=inside, other=0.0)
        g = tl.load(grad_out + b * g_b + h * g_h + rows[:, None] * g_t + dv[None, :] * g_d, mask=inside, other=0.0)
        at = statistics + (b * heads + h) * s_h + rows * s_t
        level = _level(lse + b * l_b + h * l_h + rows * l_t, rows < tq)
        wanted = rows < padded
        tl.store(at, level, mask=wanted)
        tl.store(at + s_c, tl.exp2(-level) * (1.0 + 1.1920929e-07), mask=wanted)  # an ulp more: see slopes
        if query.dtype.element_ty != tl.float32:
            # at most 2^10: query times its inverse should fit as well; e of the plain exponential is at most 1
            excess = tl.zeros_like(level) if BASE == EXP else tl.minimum(tl.maximum(tl.ceil(-level), 0.0), 10.0)
            shrink = tl.exp2(-excess)
            tl.store(at + 3 * s_c, shrink, mask=wanted)
            if least is not None and tile * BLOCK_M < tq:
                tl.store(least + (b * heads + h) * tl.cdiv(tq, BLOCK_M) + tile, tl.min(shrink, 0))
        if MASK == 0 and not VARLEN and not PART:
            offset = 0
            if BOTTOM_RIGHT:
                offset = tk - tq
            seen = keys_seen(tile * BLOCK_M + tl.arange(0, BLOCK_M), tk, offset, left, right, LEFT, RIGHT)
            wanted = wanted & ((seen == 0) | (seen > FEW) | (rows >= tq))
        tl.store(at + 2 * s_c, tl.sum(o.to(tl.float32) * g.to(tl.float32), 1), mask=wanted)
        if query.dtype.element_ty == tl.float32:
            tl.store(at + 3 * s_c, tl.zeros_like(level), mask=wanted)
    else:
        start = (b * heads + h) * 1_000_003
        statistics += (b * heads + h) * s_h
        if VARLEN:
            statistics += (h - (b * heads + h)) * s_h  # one sequence in memory
            q0, k0 = tl.load(cu_q + b).to(tl.int64), tl.load(cu_k + b).to(tl.int64)
            tq, tk = (tl.load(cu_q + b + 1) - q0).to(tl.int32), (tl.load(cu_k + b + 1) - k0).to(tl.int32)
            query += q0 * q_t
            key += k0 * k_t
            value += k0 * v_t
            grad_out += q0 * g_t
            lse += q0 * l_t
            statistics += q0 * s_t
            b *= 0
        offset = 0
        if BOTTOM_RIGHT:
            offset = tk - tq
        query += b * q_b + h * q_h
        grad_out += b * g_b + h * g_h
        lse += b * l_b + h * l_h
        key += b * k_b + h // groups * k_h
        value += b * v_b + h // groups * v_h
        if MASK != 0:
            mask += b * m_b + h * m_h
        if CONSTANT == SINK:
            sink += h
        seed = 0
        if DROPOUT:
            seed = tl.load(seed_at)
        first, last = rows_with_few(mask, m_k, tq, tk, offset, left, right, MASK, MASK_ROWS, LEFT, RIGHT, 128)
        for i0 in range(first + tl.program_id(0) * FEW_ROWS, last, few_tiles * FEW_ROWS):
            _few_tile(
                query, key, value, grad_out, lse, statistics, mask, sink, i0, tq, tk, width, v_width, offset, left, right, unit,
                eps, softcap, dropout_p, seed, start, q_t, q_d, k_t, k_d, v_t, v_d, g_t, g_d, l_t, m_q, m_k, s_t, s_c,
                BASE, RECTIFY, ABSOLUTE, CONSTANT, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
                DROPOUT, PRECISION,
            )  # fmt: skip
