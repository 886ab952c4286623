"""Attention backward: ``dQ`` a query tile and ``dK``, ``dV`` a key tile, each written by one program, without atomics.

With ``E = e^{s - lse}`` (the derivative of ``e^s / l``) and ``D = do . o``

    dv_j += f_j / l do        ds_j = E_j ([kept] dp_j - sign(s_j) D)        dq += ds_j k_j        dk_j += ds_j q

(paper eq. 7, but a score of exactly 0 counts as a negative one).

Scores are computed again from the row's ``lse``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softpick.ops.triton.base_functions import INF, derivative, needs_relu, score_gradient, slopes, weights
from softpick.ops.triton.device import (
    assignment,
    dropout_factor,
    finish_scores,
    growth,
    keys_of_queries,
    load_rows,
    narrow,
    narrow_gradient,
    queries_of_keys,
    zeros,
)

__all__ = ["attention_backward_keys", "attention_backward_queries"]


@triton.jit
def _sweep_keys(
    dq, q, do, level, inverse, delta, shrink, key, value, mask, dbias, i2, lo, hi, tq, tk, width, v_width, offset, left, right,
    unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, NEGATIVE_GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, BIAS_GRADIENT: tl.constexpr, EDGE: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    key += tl.cast(lo, tl.int64) * k_t
    value += tl.cast(lo, tl.int64) * v_t
    for j in tl.range(lo, hi, BLOCK_N):
        k = load_rows(key, n, d, k_t, k_d, tk - j, width, EDGE, PAD_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        v = load_rows(value, n, dv, v_t, v_d, tk - j, v_width, EDGE, PAD_DV)
        j2 = (j + n)[None, :]
        s, keep, slope = finish_scores(
            s, i2, j2, mask, m_q, m_k, tq, tk, offset, left, right, unit, softcap,
            BASE, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP, EDGE,
        )  # fmt: skip
        e = derivative(s, level[:, None], inverse[:, None], BASE)
        if EDGE or MASK != 0:
            e = tl.where(keep, e, 0.0)
        _, e = slopes(s, e, inverse[:, None], BASE, EXACT, EDGE or MASK_ROWS)
        drop = 1.0
        if DROPOUT:
            drop = dropout_factor(seed, start, i2, j2, tk, dropout_p)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp *= drop
        ds = score_gradient(
            s, e, dp, delta[:, None], shrink[:, None],
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, k.dtype == tl.float32,
        )  # fmt: skip
        if BIAS_GRADIENT:
            at = dbias + i2.to(tl.int64) * tk + j2
            tl.store(at, ds.to(dbias.dtype.element_ty), mask=(i2 < tq) & (j2 < tk))
        if SOFTCAP:
            ds *= slope
        if k.dtype == tl.float16:
            ds *= shrink[:, None]
        dq = tl.dot(narrow_gradient(ds, k.dtype), k, dq, input_precision=PRECISION)
        key += BLOCK_N * k_t
        value += BLOCK_N * v_t
    return dq


@triton.jit(do_not_specialize=["heads", "tiles", "pairs", "together", "tq", "tk", "left", "right"])
def attention_backward_queries(
    query, key, value, grad_out, statistics, dquery, dbias, mask, cu_q, cu_k, seed_at,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, g_b, g_h, g_t, g_d, dq_b, dq_h, dq_t, dq_d,
    m_b, m_h, m_q, m_k,
    tiles, heads, pairs, together, groups, tq, tk, width, v_width, left, right, unit, scale, softcap, dropout_p,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr,
    NEGATIVE_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dQ`` of one query tile. Grid: query tiles of all ``pairs`` of head and sequence (:func:`assignment`)."""
    tile, h, b = assignment(tiles, heads, pairs, together)
    start = (b * heads + h) * 1_000_003
    total_q = tq
    q0 = tl.cast(0, tl.int64)
    if VARLEN:
        q0, k0 = tl.load(cu_q + b).to(tl.int64), tl.load(cu_k + b).to(tl.int64)
        tq, tk = (tl.load(cu_q + b + 1) - q0).to(tl.int32), (tl.load(cu_k + b + 1) - k0).to(tl.int32)
        query += q0 * q_t
        key += k0 * k_t
        value += k0 * v_t
        grad_out += q0 * g_t
        dquery += q0 * dq_t
        b *= 0
    i0 = (tiles - 1 - tile) * BLOCK_M
    if i0 >= tq:
        return
    offset = 0
    if BOTTOM_RIGHT:
        offset = tk - tq
    kv = h // groups
    i, d, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    i64 = i0.to(tl.int64)
    query += b * q_b + h * q_h + i64 * q_t
    grad_out += b * g_b + h * g_h + i64 * g_t
    dquery += b * dq_b + h * dq_h + i64 * dq_t
    key += b * k_b + kv * k_h
    value += b * v_b + kv * v_h
    if MASK != 0:
        mask += b * m_b + h * m_h
    if BIAS_GRADIENT:
        dbias += (b * heads + h) * tq * tk
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_at)
    q = load_rows(query, i, d, q_t, q_d, tq - i0, width, True, PAD_D)
    do = load_rows(grad_out, i, dv, g_t, g_d, tq - i0, v_width, True, PAD_DV)
    at = statistics + ((b * heads + h) * total_q + q0 + i0 + i) * 4
    level = tl.load(at, mask=i0 + i < tq, other=INF)
    inverse = tl.load(at + 1, mask=i0 + i < tq, other=0.0)
    delta = tl.load(at + 2, mask=i0 + i < tq, other=0.0)
    shrink = tl.load(at + 3, mask=i0 + i < tq, other=1.0)
    i2 = (i0 + i)[:, None]
    lo, full_lo, full_hi, hi = keys_of_queries(
        i0, tl.minimum(i0 + BLOCK_M, tq), tk, offset, left, right, BLOCK_N, LEFT, RIGHT
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LEFT:
        dq = _sweep_keys(
            dq, q, do, level, inverse, delta, shrink, key, value, mask, dbias, i2, lo, full_lo, tq, tk, width, v_width,
            offset, left, right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT,
            RIGHT, SOFTCAP, DROPOUT, BIAS_GRADIENT, True, EXACT, PRECISION,
        )  # fmt: skip
    dq = _sweep_keys(
        dq, q, do, level, inverse, delta, shrink, key, value, mask, dbias, i2, full_lo, full_hi, tq, tk, width, v_width,
        offset, left, right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
        BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT,
        RIGHT, SOFTCAP, DROPOUT, BIAS_GRADIENT, False, EXACT, PRECISION,
    )  # fmt: skip
    dq = _sweep_keys(
        dq, q, do, level, inverse, delta, shrink, key, value, mask, dbias, i2, full_hi, hi, tq, tk, width, v_width,
        offset, left, right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
        BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT,
        RIGHT, SOFTCAP, DROPOUT, BIAS_GRADIENT, True, EXACT, PRECISION,
    )  # fmt: skip
    if q.dtype == tl.float16:
        dq /= shrink[:, None]
    tl.store(
        dquery + i[:, None] * dq_t + d[None, :] * dq_d,
        narrow_gradient(dq * scale, q.dtype),
        mask=(i0 + i[:, None] < tq) & (d[None, :] < width),
    )


@triton.jit
def _sweep_queries(
    dk, dv_acc, k, v, query, grad_out, statistics, mask, j2, lo, hi, tq, tk, width, v_width, offset, left, right,
    unit, softcap, dropout_p, seed, start, q_t, q_d, g_t, g_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, NEGATIVE_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, EDGE: tl.constexpr, EXACT: tl.constexpr, RELU_ASM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the query tiles from ``lo`` to ``hi``; tiles are transposed, keys by queries."""
    d, dv, m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_M)
    query += tl.cast(lo, tl.int64) * q_t
    grad_out += tl.cast(lo, tl.int64) * g_t
    for i in tl.range(lo, hi, BLOCK_M):
        q = load_rows(query, m, d, q_t, q_d, tq - i, width, EDGE, PAD_D)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        do = load_rows(grad_out, m, dv, g_t, g_d, tq - i, v_width, EDGE, PAD_DV)
        four = statistics + (i + m)[:, None] * 4 + tl.arange(0, 4)[None, :]
        if EDGE:
            four = tl.load(four, mask=(i + m)[:, None] < tq, other=0.0)
        else:
            four = tl.load(four)
        one, other = tl.split(tl.reshape(four, [BLOCK_M, 2, 2]))
        level, delta = tl.split(one)
        inverse, shrink = tl.split(other)
        i2 = (i + m)[None, :]
        s, keep, slope = finish_scores(
            s, i2, j2, mask, m_q, m_k, tq, tk, offset, left, right, unit, softcap,
            BASE, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP, EDGE,
        )  # fmt: skip
        e = derivative(s, level[None, :], inverse[None, :], BASE)
        if EDGE:
            keep = keep & (i2 < tq)
        if EDGE or MASK != 0:
            e = tl.where(keep, e, 0.0)
        drop = 1.0
        if DROPOUT:
            drop = dropout_factor(seed, start, i2, j2, tk, dropout_p)
        p, e = slopes(s, e, inverse[None, :], BASE, EXACT, EDGE or MASK_ROWS)
        p = weights(p, e, s, BASE, RECTIFY)
        if DROPOUT:
            p *= drop
        RELU: tl.constexpr = needs_relu(BASE)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if DROPOUT:
            dp *= drop
        ds = score_gradient(
            s, e, dp, delta[None, :], shrink[None, :],
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, q.dtype == tl.float32,
        )  # fmt: skip
        dv_acc = tl.dot(narrow(p, do, RELU, RELU_ASM and RELU), do, dv_acc, input_precision=PRECISION)
        if SOFTCAP:
            ds *= slope
        if q.dtype == tl.float16:
            wide = q.to(tl.float32)
            grow = growth(shrink, tl.max(tl.abs(wide), 1))
            ds *= (1.0 / grow)[None, :]
            q = (wide * grow[:, None]).to(tl.float16)
        dk = tl.dot(narrow_gradient(ds, q.dtype), q, dk, input_precision=PRECISION)
        query += BLOCK_M * q_t
        grad_out += BLOCK_M * g_t
    return dk, dv_acc


@triton.jit(do_not_specialize=["heads", "tiles", "pairs", "together", "tq", "tk", "left", "right"])
def attention_backward_keys(
    query, key, value, grad_out, statistics, dkey, dvalue, mask, cu_q, cu_k, seed_at,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, g_b, g_h, g_t, g_d,
    dk_b, dk_h, dk_t, dk_d, dv_b, dv_h, dv_t, dv_d, m_b, m_h, m_q, m_k,
    tiles, heads, pairs, together, groups, tq, tk, width, v_width, left, right, unit, scale, softcap, dropout_p,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr,
    NEGATIVE_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, EXACT: tl.constexpr, RELU_ASM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dK`` and ``dV`` of one key tile, summed over the query heads of its group.

    Grid: key tiles of all ``pairs`` of key head and sequence (:func:`assignment`).
    """
    tile, kv, b = assignment(tiles, heads // groups, pairs, together)
    sequence = b
    total_q = tq
    q0 = tl.cast(0, tl.int64)
    if VARLEN:
        q0, k0 = tl.load(cu_q + b).to(tl.int64), tl.load(cu_k + b).to(tl.int64)
        tq, tk = (tl.load(cu_q + b + 1) - q0).to(tl.int32), (tl.load(cu_k + b + 1) - k0).to(tl.int32)
        query += q0 * q_t
        key += k0 * k_t
        value += k0 * v_t
        grad_out += q0 * g_t
        dkey += k0 * dk_t
        dvalue += k0 * dv_t
        b *= 0
    j0 = tile * BLOCK_N
    if j0 >= tk:
        return
    offset = 0
    if BOTTOM_RIGHT:
        offset = tk - tq
    n, d, dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    j64 = j0.to(tl.int64)
    key += b * k_b + kv * k_h + j64 * k_t
    value += b * v_b + kv * v_h + j64 * v_t
    dkey += b * dk_b + kv * dk_h + j64 * dk_t
    dvalue += b * dv_b + kv * dv_h + j64 * dv_t
    k = load_rows(key, n, d, k_t, k_d, tk - j0, width, True, PAD_D)
    v = load_rows(value, n, dv, v_t, v_d, tk - j0, v_width, True, PAD_DV)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_at)
    j2 = (j0 + n)[:, None]
    lo, full_lo, full_hi, hi = queries_of_keys(
        j0, tl.minimum(j0 + BLOCK_N, tk), tq, offset, left, right, BLOCK_M, LEFT, RIGHT
    )
    dk = zeros(BLOCK_N, BLOCK_D, RELU_ASM)
    dv_acc = zeros(BLOCK_N, BLOCK_DV, RELU_ASM)
    for group in range(groups):
        h = kv * groups + group
        start = (sequence * heads + h) * 1_000_003
        q_of_head = query + b * q_b + h * q_h
        g_of_head = grad_out + b * g_b + h * g_h
        at = ((b * heads + h) * total_q + q0) * 4
        mask_of_head = mask
        if MASK != 0:
            mask_of_head = mask + b * m_b + h * m_h
        if RIGHT:
            dk, dv_acc = _sweep_queries(
                dk, dv_acc, k, v, q_of_head, g_of_head, statistics + at, mask_of_head, j2, lo, full_lo,
                tq, tk, width, v_width, offset, left, right, unit, softcap, dropout_p, seed, start,
                q_t, q_d, g_t, g_d, m_q, m_k,
                BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS,
                LEFT, RIGHT, SOFTCAP, DROPOUT, True, EXACT, RELU_ASM, PRECISION,
            )  # fmt: skip
        dk, dv_acc = _sweep_queries(
            dk, dv_acc, k, v, q_of_head, g_of_head, statistics + at, mask_of_head, j2, full_lo, full_hi,
            tq, tk, width, v_width, offset, left, right, unit, softcap, dropout_p, seed, start,
            q_t, q_d, g_t, g_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS,
            LEFT, RIGHT, SOFTCAP, DROPOUT, False, EXACT, RELU_ASM, PRECISION,
        )  # fmt: skip
        dk, dv_acc = _sweep_queries(
            dk, dv_acc, k, v, q_of_head, g_of_head, statistics + at, mask_of_head, j2, full_hi, hi,
            tq, tk, width, v_width, offset, left, right, unit, softcap, dropout_p, seed, start,
            q_t, q_d, g_t, g_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS,
            LEFT, RIGHT, SOFTCAP, DROPOUT, True, EXACT, RELU_ASM, PRECISION,
        )  # fmt: skip
    inside = j0 + n[:, None] < tk
    tl.store(
        dkey + n[:, None] * dk_t + d[None, :] * dk_d,
        narrow_gradient(dk * scale, k.dtype),
        mask=inside & (d[None, :] < width),
    )
    tl.store(
        dvalue + n[:, None] * dv_t + dv[None, :] * dv_d,
        narrow_gradient(dv_acc, v.dtype),
        mask=inside & (dv[None, :] < v_width),
    )
