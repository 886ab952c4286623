"""Attention of few queries against a long cache: the keys are split over programs, the partial results merged.

The queries of a group of heads that share a key head are rows of one tile, so each key is read once. The cache is
contiguous or paged (``block_table``). A page that the cache does not have is not read, and its keys count as masked. With
SKIP the values of a key for which no query of the tile keeps its score are not read. With LISTED, which is the size of the
blocks, programs take blocks of keys from a list and read no others (``ops/skipping.py``).

A cache in fp8 (SCALED) is converted to the query's dtype in registers. The scale of keys multiplies the scores; that of values
the weights of a page, or the result where all pages have the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from softpick.ops.triton.base_functions import (
    EXP,
    INF,
    LN2,
    LOG2E,
    NONE,
    ONE,
    POSITIVE,
    SINK,
    any_kept,
    exponential,
    kept_scores,
    numerators,
    zero_at_zero,
)
from softpick.ops.triton.device import (
    FP16_SCALE,
    TINY,
    add_product,
    few_seen,
    finish_scores,
    keys_of_queries,
    load_rows,
    narrow,
)

__all__ = [
    "bf16_of_pairs",
    "count_tiles",
    "decode_merge",
    "decode_split",
    "keys_of_sequence",
    "sequence_at",
    "share_of",
]


@triton.jit
def _load_keys(
    base, j, n, d, tk, stride_block, stride_t, stride_d, table, pages, PAGE: tl.constexpr, width,
    EDGE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    if PAGE == 0:
        return load_rows(base + tl.cast(j, tl.int64) * stride_t, n, d, stride_t, stride_d, tk - j, width, EDGE, PAD)
    else:
        return _load_wanted(base, j, n, d, j + n < tk, stride_block, stride_t, stride_d, table, pages, PAGE, width)


@triton.jit
def _pages_of(positions, wanted, table, pages, PAGE: tl.constexpr):
    """The page of each position, and whether the position is ``wanted`` and its page exists (0 to ``pages - 1``)."""
    page = tl.load(table + positions // PAGE, mask=wanted, other=-1)
    return page.to(tl.int64), page.to(tl.uint32, bitcast=True) < pages.to(tl.uint32)


@triton.jit
def _load_wanted(base, j, n, d, wanted, stride_block, stride_t, stride_d, table, pages, PAGE: tl.constexpr, width):
    """The ``wanted`` rows of a key tile, zero instead of the others."""
    if PAGE == 0:
        at = base + (tl.cast(j, tl.int64) * stride_t + n * stride_t)[:, None] + d[None, :] * stride_d
    else:
        page, wanted = _pages_of(j + n, wanted, table, pages, PAGE)
        at = base + (page * stride_block + ((j + n) % PAGE) * stride_t)[:, None] + d[None, :] * stride_d
    return tl.load(at, mask=wanted[:, None] & (d[None, :] < width), other=0.0)


@triton.jit
def bf16_of_pairs(x):
    """Two numbers in e4m3, kept as one of 16 bits, in bf16: the first ones and the second ones.

    Bits are moved to where bf16 has sign, exponent and fraction; a product makes up for its larger bias. NaN becomes 480.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        shl.b32 a, $2, 8;
        shl.b32 b, $2, 4;
        shr.b32 c, $2, 4;
        and.b32 b, b, 0x07f007f0;
        and.b32 c, c, 0x07f007f0;
        lop3.b32 a, a, 0x80008000, b, 0xea;
        lop3.b32 c, $2, 0x80008000, c, 0xea;
        mov.b32 b, 0x7b807b80;
        mov.b32 d, 0x80008000;
        fma.rn.bf16x2 $0, a, b, d;
        fma.rn.bf16x2 $1, c, b, d;
        }""",
        "=r,=r,r",
        [x],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _fp16_of_pairs(x):
    """As :func:`bf16_of_pairs`."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c;
        shl.b32 a, $2, 8;
        shl.b32 b, $2, 7;
        shr.b32 c, $2, 1;
        and.b32 b, b, 0x3f803f80;
        and.b32 c, c, 0x3f803f80;
        lop3.b32 a, a, 0x80008000, b, 0xea;
        lop3.b32 c, $2, 0x80008000, c, 0xea;
        mov.b32 b, 0x5c005c00;
        mul.f16x2 $0, a, b;
        mul.f16x2 $1, c, b;
        }""",
        "=r,=r,r",
        [x],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _halves(x, like, PAIRS: tl.constexpr):
    """A tile in the dtype of ``like``: itself, twice; of PAIRS the first and the second numbers."""
    if not PAIRS:
        x = x.to(like.dtype)
        return x, x
    elif like.dtype == tl.bfloat16:
        return bf16_of_pairs(x)
    else:
        return _fp16_of_pairs(x)


@triton.jit
def _rescaled(acc, odd, factor, PAIRS: tl.constexpr):
    acc *= factor[:, None]
    if PAIRS:
        odd *= factor[:, None]
    return acc, odd


@triton.jit
def _add_values(
    acc, odd, p, v, like, RELU: tl.constexpr, RELU_ASM: tl.constexpr, SPLIT: tl.constexpr, PAIRS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``p v``, by :func:`add_product` where ``p`` is not rounded yet (fp32, ``like`` not)."""
    v, odd_v = _halves(v, like, PAIRS)
    if WIDE:
        v, odd_v = v.to(tl.float32), odd_v.to(tl.float32)
    acc = add_product(acc, p, v, RELU, RELU_ASM, SPLIT, PRECISION)
    if PAIRS:
        odd = add_product(odd, p, odd_v, RELU, RELU_ASM, SPLIT, PRECISION)
    return acc, odd


@triton.jit
def _sweep(
    acc, odd, total, m, q, odd_q, key, value, mask, table, blocks, scales,
    pages, i2, lo, hi, tq, tk, width, v_width, offset, left, right,
    unit, softcap, k_b, k_t, k_d, v_b, v_t, v_d, m_q, m_k,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, PAGE: tl.constexpr, EDGE: tl.constexpr,
    EXACT: tl.constexpr, SKIP: tl.constexpr, LISTED: tl.constexpr, SCALED: tl.constexpr, PAIRS: tl.constexpr,
    RELU_ASM: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = BLOCK_D // 2 if PAIRS else BLOCK_D
    DV: tl.constexpr = BLOCK_DV // 2 if PAIRS else BLOCK_DV
    d, dv, n = tl.arange(0, D), tl.arange(0, DV), tl.arange(0, BLOCK_N)
    WIDE: tl.constexpr = (
        SCALED == 2 and q.dtype == tl.float16
    )  # weights times the scale of a page leave the range of fp16
    OF_VALUES: tl.constexpr = "tf32" if WIDE else PRECISION
    key_scale, value_scale, ks_b, vs_b = scales
    if SKIP:  # which values are wanted is known late: their product waits until the next tile's scores are there
        waiting = tl.zeros([q.shape[0], BLOCK_N], tl.float32 if WIDE else q.dtype)
        v = tl.zeros([BLOCK_N, DV], tl.float32).to(value.dtype.element_ty)
    for at in tl.range(lo, hi, BLOCK_N):
        j = at
        if LISTED != 0:
            j = tl.load(blocks + at // LISTED) * LISTED + at % LISTED
        k = _load_keys(key, j, n, d, tk, k_b, k_t, k_d, table, pages, PAGE, width, EDGE, PAD_D)
        if not SKIP:
            v = _load_keys(value, j, n, dv, tk, v_b, v_t, v_d, table, pages, PAGE, v_width, EDGE, PAD_DV)
        k, odd_k = _halves(k, q, PAIRS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if PAIRS:
            s = tl.dot(odd_q, tl.trans(odd_k), s, input_precision=PRECISION)
        if SCALED == 2:
            page, there = _pages_of(j + n, j + n < tk, table, pages, PAGE)
            s *= tl.load(key_scale + page * ks_b, mask=there, other=0.0)[None, :]
            of_values = tl.load(value_scale + page * vs_b, mask=there, other=0.0)
        s, keep, _ = finish_scores(
            s, i2, (j + n)[None, :], mask, m_q, m_k, tq, tk, offset, left, right, unit, softcap,
            BASE, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP, EDGE,
        )  # fmt: skip
        if PAGE != 0 and (
            not zero_at_zero(BASE) or MASK != 0
        ):  # else a key of zeros has a score of 0, which adds nothing
            _, there = _pages_of(j + n, j + n < tk, table, pages, PAGE)
            keep = keep & there[None, :]
        if EDGE or MASK != 0 or (PAGE != 0 and not zero_at_zero(BASE)):
            s = tl.where(keep, s, 0.0 if zero_at_zero(BASE) else -INF)
        if SKIP:
            acc, odd = _add_values(acc, odd, waiting, v, q, False, False, False, PAIRS, WIDE, OF_VALUES)
            v = _load_wanted(value, j, n, dv, any_kept(s, RECTIFY), v_b, v_t, v_d, table, pages, PAGE, v_width)
        if exponential(BASE):
            high = tl.maximum(m, tl.max(s, 1))
            fresh = tl.where(high == -INF, 0.0, high)
            factor = tl.exp2(m - fresh)
            total *= factor
            acc, odd = _rescaled(acc, odd, factor, PAIRS)
            m = high
            p = numerators(s, fresh[:, None], BASE, True, EXACT)
        else:
            p = numerators(s, 0.0, BASE, False, EXACT)
        if ABSOLUTE:
            total += tl.sum(tl.abs(p), 1)
            RELU: tl.constexpr = RECTIFY == POSITIVE
        else:
            p = kept_scores(p, s, RECTIFY)
            total += tl.sum(p, 1)
            RELU: tl.constexpr = False
        if SCALED == 2:
            p *= of_values[None, :]
        if q.dtype == tl.float16:
            if not exponential(BASE):  # as in forward.py
                high = tl.maximum(m, tl.max(tl.abs(p), 1))
                acc, odd = _rescaled(acc, odd, m / high, PAIRS)
                p /= high[:, None]
                m = high
            p *= FP16_SCALE
        if SKIP:
            waiting = narrow(p, waiting, RELU, RELU_ASM and RELU)
        else:
            acc, odd = _add_values(acc, odd, p, v, q, RELU, RELU_ASM, SPLIT, PAIRS, WIDE, OF_VALUES)
    if SKIP:
        acc, odd = _add_values(acc, odd, waiting, v, q, False, False, False, PAIRS, WIDE, OF_VALUES)
    return acc, odd, total, m


@triton.jit(do_not_specialize=["kv_heads", "tq", "tk", "left", "right", "chunk", "t_b", "ks_b", "vs_b", "pages"])
def decode_split(
    query, key, value, partial_out, partial_total, partial_m, mask, lengths, table, blocks, counts,
    key_scale, value_scale,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, m_b, m_h, m_q, m_k, t_b, ks_b, ks_h, vs_b, vs_h,
    kv_heads, groups, tq, tk, width, v_width, left, right, unit, softcap, chunk, pages,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, CONSTANT: tl.constexpr,
    NEGATIVE_GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, PAGE: tl.constexpr,
    LENGTHS: tl.constexpr, EXACT: tl.constexpr, SKIP: tl.constexpr, LISTED: tl.constexpr, SCALED: tl.constexpr,
    PAIRS: tl.constexpr, RELU_ASM: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Keys ``[split * chunk, (split + 1) * chunk)`` of one sequence and key head. Grid: (splits, Hkv, B).

    SCALED: the cache is in fp8, with scales ``(B, Hkv)``, or (2) ``(pages, Hkv)``. PAIRS: two of its numbers come as one of 16
    bits, of which ``key``, ``value``, their strides and ``v_width`` are; there are no loads of single bytes then.

    LISTED: an even share of the ``counts (B, Hkv)`` blocks of a list ``(B, Hkv, chunk)``.

    Writes the unnormalized output, the sum of ``g`` and ``m`` of every row, contiguous ``(B, Hkv, splits, BLOCK_M, ...)``.
    EARLY: the merge may be launched while this runs; it waits by itself.
    """
    if EARLY:
        gdc_launch_dependents()
    split, kv, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    r, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    if LENGTHS:
        tk = tl.minimum(tk, tl.load(lengths + b).to(tl.int32))
    offset = 0
    if BOTTOM_RIGHT:
        offset = tk - tq
    rows = r < groups * tq
    head, i = kv * groups + tl.minimum(r // tq, groups - 1), r % tq  # rows beyond the last repeat a head
    D: tl.constexpr = BLOCK_D // 2 if PAIRS else BLOCK_D
    d = tl.arange(0, D)
    at = query + b * q_b + (head * q_h + i * q_t)[:, None]
    if PAIRS:
        inside = rows[:, None] & (2 * d[None, :] < width)
        q = tl.load(at + 2 * d[None, :] * q_d, mask=inside, other=0.0)
        odd_q = tl.load(at + (2 * d[None, :] + 1) * q_d, mask=inside, other=0.0)
        width //= 2
    else:
        q = tl.load(at + d[None, :] * q_d, mask=rows[:, None] & (d[None, :] < width), other=0.0)
        odd_q = q
    table_of = table
    if PAGE == 0:
        key += b * k_b
        value += b * v_b
    else:
        table_of = table + b * t_b
    key += kv * k_h
    value += kv * v_h
    if MASK != 0:
        mask += b * m_b + (head * m_h)[:, None]
    if SCALED != 0:
        key_scale += kv * ks_h
        value_scale += kv * vs_h
    scales = (key_scale, value_scale, ks_b, vs_b)
    if SCALED == 1:
        unit *= tl.load(key_scale + b * ks_b)
    lo, full_lo, full_hi, hi = keys_of_queries(0, tq, tk, offset, left, right, BLOCK_N, LEFT, RIGHT)
    blocks_of = blocks
    if LISTED != 0:
        pair = b * kv_heads + kv
        blocks_of = blocks + pair * chunk
        count = tl.load(counts + pair)
        share = tl.cdiv(count, tl.num_programs(0))
        lo, hi = split * share * LISTED, tl.minimum(count, (split + 1) * share) * LISTED
    else:
        lo, hi = tl.maximum(lo, split * chunk), tl.minimum(hi, (split + 1) * chunk)
    hi = tl.maximum(lo, hi)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.maximum(tl.minimum(full_hi, hi), full_lo)
    acc = tl.zeros([BLOCK_M, BLOCK_DV // 2 if PAIRS else BLOCK_DV], tl.float32)
    odd = acc
    total = tl.zeros([BLOCK_M], tl.float32)
    ANCHORED: tl.constexpr = BASE != EXP or RECTIFY != NONE or CONSTANT == ONE
    m = tl.zeros([BLOCK_M], tl.float32) + (0.0 if ANCHORED else -INF)
    if not exponential(BASE):
        m += TINY
    few = False
    if MASK == 0 and q.dtype != tl.float32:
        few = few_seen(0, tq, tk, offset, left, right, LEFT, RIGHT)
    if few:
        acc, odd, total, m = _sweep(
            acc, odd, total, m, q, odd_q, key, value, mask, table_of, blocks_of, scales,
            pages, i[:, None], lo, hi, tq, tk, width, v_width,
            offset, left, right, unit, softcap, k_b, k_t, k_d, v_b, v_t, v_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
            PAGE, True, True, False, LISTED, SCALED, PAIRS, RELU_ASM, PRECISION, True,
        )  # fmt: skip
    elif LISTED != 0:
        acc, odd, total, m = _sweep(
            acc, odd, total, m, q, odd_q, key, value, mask, table_of, blocks_of, scales,
            pages, i[:, None], lo, hi, tq, tk, width, v_width,
            offset, left, right, unit, softcap, k_b, k_t, k_d, v_b, v_t, v_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
            PAGE, True, EXACT, SKIP, LISTED, SCALED, PAIRS, RELU_ASM, PRECISION, False,
        )  # fmt: skip
    else:
        if LEFT:
            acc, odd, total, m = _sweep(
                acc, odd, total, m, q, odd_q, key, value, mask, table_of, blocks_of, scales,
            pages, i[:, None], lo, full_lo, tq, tk, width,
                v_width, offset, left, right, unit, softcap, k_b, k_t, k_d, v_b, v_t, v_d, m_q, m_k,
                BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
                PAGE, True, EXACT, SKIP, LISTED, SCALED, PAIRS, RELU_ASM, PRECISION, False,
            )  # fmt: skip
        acc, odd, total, m = _sweep(
            acc, odd, total, m, q, odd_q, key, value, mask, table_of, blocks_of, scales,
            pages, i[:, None], full_lo, full_hi, tq, tk, width,
            v_width, offset, left, right, unit, softcap, k_b, k_t, k_d, v_b, v_t, v_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
            PAGE, False, EXACT, SKIP, LISTED, SCALED, PAIRS, RELU_ASM, PRECISION, False,
        )  # fmt: skip
        acc, odd, total, m = _sweep(
            acc, odd, total, m, q, odd_q, key, value, mask, table_of, blocks_of, scales,
            pages, i[:, None], full_hi, hi, tq, tk, width,
            v_width, offset, left, right, unit, softcap, k_b, k_t, k_d, v_b, v_t, v_d, m_q, m_k,
            BASE, RECTIFY, ABSOLUTE, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, MASK, MASK_ROWS, LEFT, RIGHT, SOFTCAP,
            PAGE, True, EXACT, SKIP, LISTED, SCALED, PAIRS, RELU_ASM, PRECISION, False,
        )  # fmt: skip
    if PAIRS:
        acc = tl.interleave(acc, odd)
    if q.dtype == tl.float16:
        if not exponential(BASE):
            acc *= m[:, None]
        acc *= 1.0 / FP16_SCALE
    if SCALED == 1:
        acc *= tl.load(value_scale + b * vs_b)
    if not exponential(BASE):  # sums are not relative to anything
        m = tl.zeros([BLOCK_M], tl.float32)
    slot = ((b * kv_heads + kv) * tl.num_programs(0) + split) * BLOCK_M + r
    tl.store(partial_total + slot, total, mask=rows)
    tl.store(partial_m + slot, m, mask=rows)
    tl.store(partial_out + slot[:, None] * BLOCK_DV + dv[None, :], acc, mask=rows[:, None])


@triton.jit
def keys_of_sequence(
    s, sequences, lengths, tq, tk, left, right,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Filled length of sequences ``s``, the queries' offset, start and end of the visible keys, number of their tiles."""
    if LENGTHS:
        tk = tl.minimum(tk, tl.load(lengths + s, mask=s < sequences, other=0).to(tl.int32))
    offset = 0
    if BOTTOM_RIGHT:
        offset = tk - tq
    lo, _, _, hi = keys_of_queries(0, tq, tk, offset, left, right, BLOCK_N, LEFT, RIGHT)
    return tk, offset, lo, hi, (tl.maximum(hi - lo, 0) + BLOCK_N - 1) // BLOCK_N


@triton.jit
def count_tiles(
    some, b, sequences, lengths, tq, tk, left, right,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Key tiles of one head, of all sequences and of those before ``b``. ``some``: 0, 1, ... as many as are counted at once."""
    if LENGTHS:
        tiles, before = 0, 0
        for s in range(0, sequences, some.shape[0]):
            _, _, _, _, n = keys_of_sequence(
                s + some, sequences, lengths, tq, tk, left, right, BLOCK_N, LEFT, RIGHT, BOTTOM_RIGHT, LENGTHS
            )
            tiles += tl.sum(n, 0)
            before += tl.sum(tl.where(s + some < b, n, 0), 0)
        return tiles, before
    else:
        _, _, _, _, n = keys_of_sequence(
            0, sequences, lengths, tq, tk, left, right, BLOCK_N, LEFT, RIGHT, BOTTOM_RIGHT, LENGTHS
        )
        return n * sequences, n * b


@triton.jit
def sequence_at(
    some, position, sequences, kv_heads, lengths, tq, tk, left, right,
    BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """The sequence that has the ``position``-th tile of all sequences and heads, and the tiles of one head before it."""
    if LENGTHS:
        b, tiles, before = 0, 0, 0
        for s in range(0, sequences, some.shape[0]):
            _, _, _, _, n = keys_of_sequence(
                s + some, sequences, lengths, tq, tk, left, right, BLOCK_N, LEFT, RIGHT, BOTTOM_RIGHT, LENGTHS
            )
            passed = (tiles + tl.cumsum(n, 0)) * kv_heads <= position
            b += tl.sum(passed.to(tl.int32), 0)
            before += tl.sum(tl.where(passed, n, 0), 0)
            tiles += tl.sum(n, 0)
        return b, before
    else:
        _, _, _, _, n = keys_of_sequence(
            0, sequences, lengths, tq, tk, left, right, BLOCK_N, LEFT, RIGHT, BOTTOM_RIGHT, LENGTHS
        )
        b = position // (n * kv_heads)
        return b, n * b


@triton.jit
def share_of(tiles, programs, fewest):
    """How many of all key tiles a program takes."""
    return tl.maximum(fewest, (tiles + programs - 1) // programs)


@triton.jit
def _add_partials(
    high, one, o, p, first, partials, r, dv, partial_out, partial_total, partial_m,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add partial results ``p`` of row ``r`` to the sum ``one`` and the numerator ``o``, relative to the highest anchor."""
    slot = (first + p) * BLOCK_M + r
    m = tl.load(partial_m + slot, mask=p < partials, other=-INF)
    total = tl.load(partial_total + slot, mask=p < partials, other=0.0)
    acc = tl.load(partial_out + slot[:, None] * BLOCK_DV + dv[None, :], mask=(p < partials)[:, None], other=0.0)
    top = tl.maximum(high, tl.max(m, 0))
    fresh = tl.where(top == -INF, 0.0, top)
    factor, old = tl.exp2(m - fresh), tl.exp2(high - fresh)
    return top, one * old + tl.sum(total * factor, 0), o * old + tl.sum(acc * factor[:, None], 0)


@triton.jit
def anchored(m, total, logit, eps):
    """The anchor of rows of which a sink is known, ``total`` relative to it, and the factor that it was multiplied with.

    ``total`` was relative to ``m``, minus infinity where it is 0. The anchor is the largest of the scores and the sink,
    however low; with ``eps``, which is relative to it, at least 0.
    """
    top = tl.maximum(m, tl.where(eps == 0, logit, tl.maximum(logit, 0.0)))
    factor = tl.where(m == -INF, 0.0, tl.exp2(m - top))
    return top, total * factor, factor


@triton.jit(do_not_specialize=["sequences", "kv_heads", "tq", "tk", "left", "right", "splits", "fewest"])
def decode_merge(
    partial_out, partial_total, partial_m, sink, lengths, rest, out, lse, o_b, o_h, o_t, o_d, l_b, l_h, l_t,
    sequences, kv_heads, groups, tq, tk, v_width, left, right, splits, fewest, eps,
    BASE: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
    COLUMNS: tl.constexpr, PARTIALS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    LENGTHS: tl.constexpr, LISTED: tl.constexpr, SHARED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge partial results, each relative to its ``m``, in the order of the keys.

    Every sequence and key head has ``splits`` of them, PARTIALS or fewer; with SHARED, ``splits`` programs shared all key tiles
    (``hopper/decode.py``), and what they left is added PARTIALS at a time. With LISTED, ``rest (B, heads, tq)`` is what the
    blocks that were not read add to the denominator. Grid: (queries times blocks of COLUMNS, heads, B).
    """
    i, h, b = tl.program_id(0) % tq, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv, r = h // groups, (h % groups) * tq + i
    if SHARED:
        tiles, before = count_tiles(
            tl.arange(0, 128), b, sequences, lengths, tq, tk, left, right, BLOCK_N, LEFT, RIGHT, BOTTOM_RIGHT, LENGTHS
        )
        _, _, _, _, n = keys_of_sequence(
            b, sequences, lengths, tq, tk, left, right, BLOCK_N, LEFT, RIGHT, BOTTOM_RIGHT, LENGTHS
        )
        share = share_of(tiles * kv_heads, splits, fewest)
        position = before * kv_heads + kv * n
        first = b * kv_heads + kv + position // share
        partials = tl.where(n > 0, (position + n - 1) // share - position // share + 1, 0)
    else:
        first, partials = (b * kv_heads + kv) * splits, splits
    if EARLY:
        gdc_wait()
    dv = tl.program_id(0) // tq * COLUMNS + tl.arange(0, COLUMNS)
    high, one, o = tl.full([], -INF, tl.float32), tl.full([], 0.0, tl.float32), tl.zeros([COLUMNS], tl.float32)
    if SHARED:
        for p in range(0, partials, PARTIALS):
            high, one, o = _add_partials(
                high, one, o, p + tl.arange(0, PARTIALS), first, partials, r, dv,
                partial_out, partial_total, partial_m, BLOCK_M, BLOCK_DV,
            )  # fmt: skip
    else:
        high, one, o = _add_partials(
            high, one, o, tl.arange(0, PARTIALS), first, partials, r, dv,
            partial_out, partial_total, partial_m, BLOCK_M, BLOCK_DV,
        )  # fmt: skip
    if LISTED != 0:
        one += tl.load(rest + (b * kv_heads * groups + h) * tq + i) * tl.exp2(-high)
    if CONSTANT == SINK:
        logit = tl.load(sink + h).to(tl.float32) * LOG2E
        high, one, factor = anchored(tl.where(one == 0, -INF, high), one, logit, eps)
        o *= factor
    high = tl.where(high == -INF, 0.0, high)
    if CONSTANT == ONE:
        one += tl.exp2(-high) if exponential(BASE) else 1.0
    elif CONSTANT == SINK:
        one += tl.exp2(logit - high)
    one += eps
    inverse = tl.where(one == 0, 0.0, 1.0 / one)
    tl.store(out + b * o_b + h * o_h + i * o_t + dv * o_d, (o * inverse).to(out.dtype.element_ty), mask=dv < v_width)
    tl.store(lse + b * l_b + h * l_h + i * l_t, (high + tl.log2(one)) * LN2)
