"""What the backward pass needs of the rows that see few keys, computed with care.

With one visible key the weight is 1 and the gradient of the score 0, with few it is still a difference of nearly equal
numbers, ``dp - D``, times ``1 / l``, which is large where scores are small. ``D = do . out`` is off by the rounding of ``out``
and of the weights in it, 2^-9 of ``dp`` in bf16. Here ``D`` is the sum of weights times the same products ``dp``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softpick.ops.triton.tile import (
    EXP,
    FEW,
    INF,
    LINEAR,
    LOG2E,
    ONE,
    SINK,
    count_seen,
    dropout_factor,
    expm1_exp2,
    finish_scores,
    kept_scores,
    keys_of_queries,
    keys_seen,
    load_rows,
    signed,
)

__all__ = ["few_statistics", "rows_with_few"]


@triton.jit
def rows_with_few(tq, tk, offset, left, right, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """First and end of the queries to look at for those that see few keys."""
    first, last = 0, tq
    if RIGHT:
        first = tl.minimum(tl.maximum(0, -(offset + right)), tq)
    if MASK == 0:  # noqa: SIM102 (one is known when compiling)
        # along the queries the number of keys rises and falls once: if the last one sees many, the first ones may see few
        if keys_seen(tq - 1, tk, offset, left, right, LEFT, RIGHT) > FEW:
            last = tl.minimum(tq, tl.maximum(first, FEW - offset - right)) if RIGHT else first
    return first, last


@triton.jit
def _products(
    q, do, level, inverse, key, value, mask, i2, lo, hi, tq, tk, width, v_width, offset, left, right, unit, softcap, dropout_p,
    seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of rows of queries: the sum of weights times ``dp``, the share of the keys in the denominator, the largest score or 0."""
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    delta, share, top = tl.zeros_like(level), tl.zeros_like(level), tl.zeros_like(level)
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
        top = tl.maximum(top, tl.max(tl.where(keep, s, 0.0), 1))
        if BASE == LINEAR:
            p = s * inverse[:, None]
        elif BASE == EXP:
            p = tl.exp2(s - level[:, None])
        else:
            p = signed(tl.exp2(tl.maximum(s, 0.0) - level[:, None]) * -expm1_exp2(-tl.abs(s)), s)
        p = tl.where(keep, p, 0.0)
        kept = p if BASE == LINEAR else kept_scores(p, s, RECTIFY)
        share += tl.sum(tl.abs(p) if ABSOLUTE else kept, 1)
        if DROPOUT:
            dp *= dropout_factor(seed, start, i2, j2, tk, dropout_p)
        delta += tl.sum(kept * tl.where(keep, dp, 0.0), 1)
    return delta, share, top


@triton.jit(do_not_specialize=["heads", "tq", "tk", "left", "right"])
def few_statistics(
    query, key, value, grad_out, statistics, mask, sink, cu_q, cu_k, seed_at,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, g_b, g_h, g_t, g_d, m_b, m_h, m_q, m_k, s_h, s_t, s_c,
    heads, groups, tq, tk, width, v_width, left, right, unit, eps, softcap, dropout_p,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr,
    NEGATIVE_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Replaces ``delta`` of the rows that see few keys in ``statistics`` (``row_statistics``).

    Grid: (programs that share the query tiles of a head, heads, batch).
    """
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = (b * heads + h) * 1_000_003
    q0 = tl.cast(0, tl.int64)
    if VARLEN:
        q0, k0 = tl.load(cu_q + b).to(tl.int64), tl.load(cu_k + b).to(tl.int64)
        tq, tk = (tl.load(cu_q + b + 1) - q0).to(tl.int32), (tl.load(cu_k + b + 1) - k0).to(tl.int32)
        query += q0 * q_t
        key += k0 * k_t
        value += k0 * v_t
        grad_out += q0 * g_t
        b *= 0
    offset = 0
    if BOTTOM_RIGHT:
        offset = tk - tq
    query += b * q_b + h * q_h
    grad_out += b * g_b + h * g_h
    key += b * k_b + h // groups * k_h
    value += b * v_b + h // groups * v_h
    statistics += (b * heads + h) * s_h
    if MASK != 0:
        mask += b * m_b + h * m_h
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_at)
    i, d, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    first, last = rows_with_few(tq, tk, offset, left, right, MASK, LEFT, RIGHT)
    for i0 in range(first + tl.program_id(0) * BLOCK_M, last, tl.num_programs(0) * BLOCK_M):
        i2 = (i0 + i)[:, None]
        i64 = tl.cast(i0, tl.int64)
        lo, _, _, hi = keys_of_queries(i0, tl.minimum(i0 + BLOCK_M, tq), tk, offset, left, right, BLOCK_N, LEFT, RIGHT)
        if MASK != 0:
            seen = count_seen(
                mask, m_q, m_k, i2, lo, hi, tq, tk, offset, left, right, MASK, MASK_ROWS, LEFT, RIGHT, STEP
            )
        else:
            seen = keys_seen(i0 + i, tk, offset, left, right, LEFT, RIGHT)
        few = (seen > 0) & (seen <= FEW) & (i0 + i < tq)
        if tl.max(few.to(tl.int32), 0) > 0:
            q = load_rows(query + i64 * q_t, i, d, q_t, q_d, tq - i0, width, True, PAD_D)
            do = load_rows(grad_out + i64 * g_t, i, dv, g_t, g_d, tq - i0, v_width, True, PAD_DV)
            at = statistics + (q0 + i0 + i) * s_t
            level = tl.load(at, mask=few, other=INF)
            inverse = tl.load(at + s_c, mask=few, other=0.0)
            delta, share, top = _products(
                q, do, level, inverse, key, value, mask, i2, lo, hi, tq, tk, width, v_width, offset, left, right, unit, softcap,
                dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
                BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
                DROPOUT, PRECISION,
            )  # fmt: skip
            # with what the constant and eps have of the denominator the shares add up to 1, but for the rounding of the level
            if BASE == LINEAR:
                share += (eps + (1.0 if CONSTANT == ONE else 0.0)) * inverse
            else:
                share += eps * tl.exp2(top - level)
                if CONSTANT == ONE:
                    share += tl.exp2(-level)
                elif CONSTANT == SINK:
                    share += tl.exp2(tl.load(sink + h).to(tl.float32) * LOG2E - level)
            tl.store(at + 2 * s_c, delta / share, mask=few & (share > 0))
