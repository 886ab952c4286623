"""Attention backward: ``dQ`` a query tile and ``dK``, ``dV`` a key tile, each written by one program, without atomics.

With ``E = e^{s - lse}`` (the derivative of ``e^s / l``) and ``D = do . o``

    dv_j += f_j / l do        ds_j = E_j ([kept] dp_j - sign(s_j) D)        dq += ds_j k_j        dk_j += ds_j q

Scores are computed again from the row's ``lse``. SKIP leaves out ``dP`` and ``dV`` of a tile in which the numerator keeps
nothing, and all of the tile where such scores have no gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softpick.ops.triton.tile import (
    EXP,
    EXPM1,
    LINEAR,
    any_kept,
    dropout_factor,
    expm1_exp2,
    finish_scores,
    kept_scores,
    keys_of_queries,
    load_rows,
    narrow,
    queries_of_keys,
)

_LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))

__all__ = ["attention_backward_keys", "attention_backward_queries", "row_statistics"]


@triton.jit
def row_statistics(
    out, grad_out, lse, delta, row_lse,
    o_b, o_h, o_t, o_d, g_b, g_h, g_t, g_d, l_b, l_h, l_t,
    heads, tq, v_width,
    BASE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """``delta = do . out`` and the lse in the tiles' units (plus infinity for an empty row, which zeroes its exponentials).

    Grid: (row tiles, heads, batch). The two outputs are contiguous ``(B, H, Tq)``.
    """
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    inside = (rows[:, None] < tq) & (dv[None, :] < v_width)
    o = tl.load(out + b * o_b + h * o_h + rows[:, None] * o_t + dv[None, :] * o_d, mask=inside, other=0.0)
    g = tl.load(grad_out + b * g_b + h * g_h + rows[:, None] * g_t + dv[None, :] * g_d, mask=inside, other=0.0)
    at = (b * heads + h) * tq + rows
    tl.store(delta + at, tl.sum(o.to(tl.float32) * g.to(tl.float32), 1), mask=rows < tq)
    level = tl.load(lse + b * l_b + h * l_h + rows * l_t, mask=rows < tq, other=0.0)
    level = tl.where(level == -_INF, _INF, level * _LOG2E)
    tl.store(row_lse + at, level, mask=rows < tq)


@triton.jit
def _weights(s, e, inverse, BASE: tl.constexpr, RECTIFY: tl.constexpr, EXACT: tl.constexpr):
    """``f(s) / l`` of a tile, up to a relu if the numerator keeps positive scores."""
    if BASE == LINEAR:
        return s * e
    elif BASE == EXP:
        return kept_scores(e, s, RECTIFY)
    elif EXACT:
        return tl.where(s > 0, e * -expm1_exp2(-tl.maximum(s, 0.0)), 0.0)
    else:
        return e - inverse


@triton.jit
def _gradient_tile(
    s, e, delta, left_of_dp, right_of_dp, drop,
    RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, NEGATIVE_GRADIENT: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``ds`` of a tile; ``step(0) = 0`` and ``sign(0) = +1``, as in paper eq. (7)."""
    dp = tl.dot(left_of_dp, right_of_dp, input_precision=PRECISION)
    if DROPOUT:
        dp *= drop
    if not ABSOLUTE:
        return e * kept_scores(dp - delta, s, RECTIFY)
    elif not NEGATIVE_GRADIENT:
        return e * tl.where(s > 0, dp - delta, 0.0)
    else:
        return e * (kept_scores(dp, s, RECTIFY) + tl.where(s < 0, delta, -delta))


@triton.jit
def _dead_gradient(s, e, delta, ABSOLUTE: tl.constexpr, NEGATIVE_GRADIENT: tl.constexpr):
    """``ds`` of a tile in which the numerator keeps nothing: what :func:`_gradient_tile` gives there, without ``dp``."""
    if ABSOLUTE and NEGATIVE_GRADIENT:
        return e * tl.where(s < 0, delta, -delta)
    else:
        return tl.zeros_like(s)


@triton.jit
def _sweep_keys(
    dq, q, do, level, inverse, delta, key, value, mask, dbias, i2, lo, hi, tq, tk, width, v_width, offset, left, right,
    unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, NEGATIVE_GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, BIAS_GRADIENT: tl.constexpr, EDGE: tl.constexpr, EXACT: tl.constexpr, SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    key += tl.cast(lo, tl.int64) * k_t
    value += tl.cast(lo, tl.int64) * v_t
    for j in tl.range(lo, hi, BLOCK_N):
        k = load_rows(key, n, d, k_t, k_d, tk - j, width, EDGE, PAD_D)
        v = load_rows(value, n, dv, v_t, v_d, tk - j, v_width, EDGE, PAD_DV)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        j2 = (j + n)[None, :]
        s, keep, slope = finish_scores(
            s, i2, j2, mask, m_q, m_k, tq, tk, offset, left, right, unit, softcap,
            BASE, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP, EDGE,
        )  # fmt: skip
        if BASE == LINEAR:
            e = tl.zeros_like(s) + inverse[:, None]
        else:
            e = tl.exp2(s - level[:, None])
        if EDGE or MASK != 0:
            e = tl.where(keep, e, 0.0)
        drop = 1.0
        if DROPOUT:
            drop = dropout_factor(seed, start, i2, j2, tk, dropout_p)
        live = True
        if SKIP:
            live = any_kept(s if not (EDGE or MASK != 0) else tl.where(keep, s, -_INF), RECTIFY)
            if live:
                ds = _gradient_tile(
                    s, e, delta[:, None], do, tl.trans(v), drop,
                    RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, DROPOUT, PRECISION,
                )  # fmt: skip
            else:
                ds = _dead_gradient(s, e, delta[:, None], ABSOLUTE, NEGATIVE_GRADIENT)
        else:
            ds = _gradient_tile(
                s, e, delta[:, None], do, tl.trans(v), drop, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, DROPOUT, PRECISION
            )
        if BIAS_GRADIENT:
            at = dbias + i2.to(tl.int64) * tk + j2
            tl.store(at, ds.to(dbias.dtype.element_ty), mask=(i2 < tq) & (j2 < tk))
        if SOFTCAP:
            ds *= slope
        if SKIP and not (ABSOLUTE and NEGATIVE_GRADIENT):
            if live:
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        else:
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        key += BLOCK_N * k_t
        value += BLOCK_N * v_t
    return dq


@triton.jit
def attention_backward_queries(
    query, key, value, grad_out, row_lse, row_delta, dquery, dbias, mask, cu_q, cu_k, seed_at,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, g_b, g_h, g_t, g_d, dq_b, dq_h, dq_t, dq_d,
    m_b, m_h, m_q, m_k,
    heads, groups, tq, tk, width, v_width, left, right, unit, scale, softcap, dropout_p,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr,
    NEGATIVE_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr, VARLEN: tl.constexpr, EXACT: tl.constexpr, SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dQ`` of one query tile. Grid: (query tiles, heads, batch or sequences)."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
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
    i0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
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
    at = (b * heads + h) * total_q + q0 + i0 + i
    level = tl.load(row_lse + at, mask=i0 + i < tq, other=_INF)
    delta = tl.load(row_delta + at, mask=i0 + i < tq, other=0.0)
    inverse = tl.exp2(-level)
    i2 = (i0 + i)[:, None]
    lo, full_lo, full_hi, hi = keys_of_queries(
        i0, tl.minimum(i0 + BLOCK_M, tq), tk, offset, left, right, BLOCK_N, LEFT, RIGHT
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LEFT:
        dq = _sweep_keys(
            dq, q, do, level, inverse, delta, key, value, mask, dbias, i2, lo, full_lo, tq, tk, width, v_width, offset,
            left, right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT,
            RIGHT, SOFTCAP, DROPOUT, BIAS_GRADIENT, True, EXACT, SKIP, PRECISION,
        )  # fmt: skip
    dq = _sweep_keys(
        dq, q, do, level, inverse, delta, key, value, mask, dbias, i2, full_lo, full_hi, tq, tk, width, v_width, offset,
        left, right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
        BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT,
        RIGHT, SOFTCAP, DROPOUT, BIAS_GRADIENT, False, EXACT, SKIP, PRECISION,
    )  # fmt: skip
    dq = _sweep_keys(
        dq, q, do, level, inverse, delta, key, value, mask, dbias, i2, full_hi, hi, tq, tk, width, v_width, offset,
        left, right, unit, softcap, dropout_p, seed, start, k_t, k_d, v_t, v_d, m_q, m_k,
        BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT,
        RIGHT, SOFTCAP, DROPOUT, BIAS_GRADIENT, True, EXACT, SKIP, PRECISION,
    )  # fmt: skip
    tl.store(
        dquery + i[:, None] * dq_t + d[None, :] * dq_d,
        (dq * scale).to(dquery.dtype.element_ty),
        mask=(i0 + i[:, None] < tq) & (d[None, :] < width),
    )


@triton.jit
def _sweep_queries(
    dk, dv_acc, k, v, query, grad_out, row_lse, row_delta, mask, j2, lo, hi, tq, tk, width, v_width, offset, left, right,
    unit, softcap, dropout_p, seed, start, q_t, q_d, g_t, g_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, NEGATIVE_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, EDGE: tl.constexpr, EXACT: tl.constexpr, SKIP: tl.constexpr, RELU_ASM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Query tiles from ``lo`` to ``hi``; tiles are transposed, keys by queries."""
    RELU: tl.constexpr = BASE == EXPM1
    d, dv, m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_M)
    query += tl.cast(lo, tl.int64) * q_t
    grad_out += tl.cast(lo, tl.int64) * g_t
    for i in tl.range(lo, hi, BLOCK_M):
        q = load_rows(query, m, d, q_t, q_d, tq - i, width, EDGE, PAD_D)
        do = load_rows(grad_out, m, dv, g_t, g_d, tq - i, v_width, EDGE, PAD_DV)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if EDGE:
            level = tl.load(row_lse + i + m, mask=i + m < tq, other=_INF)
            delta = tl.load(row_delta + i + m, mask=i + m < tq, other=0.0)
        else:
            level = tl.load(row_lse + i + m)
            delta = tl.load(row_delta + i + m)
        inverse = tl.exp2(-level)
        i2 = (i + m)[None, :]
        s, keep, slope = finish_scores(
            s, i2, j2, mask, m_q, m_k, tq, tk, offset, left, right, unit, softcap,
            BASE, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP, EDGE,
        )  # fmt: skip
        if BASE == LINEAR:
            e = tl.zeros_like(s) + inverse[None, :]
        else:
            e = tl.exp2(s - level[None, :])
        if EDGE or MASK != 0:
            e = tl.where(keep, e, 0.0)
        drop = 1.0
        if DROPOUT:
            drop = dropout_factor(seed, start, i2, j2, tk, dropout_p)
        p = _weights(s, e, inverse[None, :], BASE, RECTIFY, EXACT)
        if DROPOUT:
            p *= drop
        live = True
        if SKIP:
            live = any_kept(s if not (EDGE or MASK != 0) else tl.where(keep, s, -_INF), RECTIFY)
            if live:
                dv_acc = tl.dot(narrow(p, do, RELU, RELU_ASM and RELU), do, dv_acc, input_precision=PRECISION)
                ds = _gradient_tile(
                    s, e, delta[None, :], v, tl.trans(do), drop,
                    RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, DROPOUT, PRECISION,
                )  # fmt: skip
            else:
                ds = _dead_gradient(s, e, delta[None, :], ABSOLUTE, NEGATIVE_GRADIENT)
        else:
            dv_acc = tl.dot(narrow(p, do, RELU, RELU_ASM and RELU), do, dv_acc, input_precision=PRECISION)
            ds = _gradient_tile(
                s, e, delta[None, :], v, tl.trans(do), drop, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, DROPOUT, PRECISION
            )
        if SOFTCAP:
            ds *= slope
        if SKIP and not (ABSOLUTE and NEGATIVE_GRADIENT):
            if live:
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        else:
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        query += BLOCK_M * q_t
        grad_out += BLOCK_M * g_t
    return dk, dv_acc


@triton.jit
def attention_backward_keys(
    query, key, value, grad_out, row_lse, row_delta, dkey, dvalue, mask, cu_q, cu_k, seed_at,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, g_b, g_h, g_t, g_d,
    dk_b, dk_h, dk_t, dk_d, dv_b, dv_h, dv_t, dv_d, m_b, m_h, m_q, m_k,
    heads, groups, tq, tk, width, v_width, left, right, unit, scale, softcap, dropout_p,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr,
    NEGATIVE_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, EXACT: tl.constexpr, SKIP: tl.constexpr, RELU_ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dK`` and ``dV`` of one key tile, summed over the query heads of its group. Grid: (key tiles, Hkv, batch)."""
    kv, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
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
    j0 = tl.program_id(0) * BLOCK_N
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
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for group in range(groups):
        h = kv * groups + group
        start = (sequence * heads + h) * 1_000_003
        q_of_head = query + b * q_b + h * q_h
        g_of_head = grad_out + b * g_b + h * g_h
        at = (b * heads + h) * total_q + q0
        mask_of_head = mask
        if MASK != 0:
            mask_of_head = mask + b * m_b + h * m_h
        if RIGHT:
            dk, dv_acc = _sweep_queries(
                dk, dv_acc, k, v, q_of_head, g_of_head, row_lse + at, row_delta + at, mask_of_head, j2, lo, full_lo,
                tq, tk, width, v_width, offset, left, right, unit, softcap, dropout_p, seed, start,
                q_t, q_d, g_t, g_d, m_q, m_k,
                BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS,
                LEFT, RIGHT, SOFTCAP, DROPOUT, True, EXACT, SKIP, RELU_ASM, PRECISION,
            )  # fmt: skip
        dk, dv_acc = _sweep_queries(
            dk, dv_acc, k, v, q_of_head, g_of_head, row_lse + at, row_delta + at, mask_of_head, j2, full_lo, full_hi,
            tq, tk, width, v_width, offset, left, right, unit, softcap, dropout_p, seed, start,
            q_t, q_d, g_t, g_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS,
            LEFT, RIGHT, SOFTCAP, DROPOUT, False, EXACT, SKIP, RELU_ASM, PRECISION,
        )  # fmt: skip
        dk, dv_acc = _sweep_queries(
            dk, dv_acc, k, v, q_of_head, g_of_head, row_lse + at, row_delta + at, mask_of_head, j2, full_hi, hi,
            tq, tk, width, v_width, offset, left, right, unit, softcap, dropout_p, seed, start,
            q_t, q_d, g_t, g_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS,
            LEFT, RIGHT, SOFTCAP, DROPOUT, True, EXACT, SKIP, RELU_ASM, PRECISION,
        )  # fmt: skip
    inside = j0 + n[:, None] < tk
    tl.store(
        dkey + n[:, None] * dk_t + d[None, :] * dk_d,
        (dk * scale).to(dkey.dtype.element_ty),
        mask=inside & (d[None, :] < width),
    )
    tl.store(
        dvalue + n[:, None] * dv_t + dv[None, :] * dv_d,
        dv_acc.to(dvalue.dtype.element_ty),
        mask=inside & (dv[None, :] < v_width),
    )
