"""What the kernels share besides the normalizers: the scores of a tile, and which keys a query sees.

Index tensors are two-dimensional and broadcast (``i2`` queries, ``j2`` keys), so the same functions serve a tile and its
transpose.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softpick.ops.triton.base_functions import INF, LOG2E, Constant, exponential

__all__ = ["FEW", "FEW_ROWS", "SHRINK_ROWS"]

FP16_SCALE = Constant(1024.0)
"""Factor on unnormalized weights in fp16, which has few bits below 6e-5; weights relative to ``m`` are at most 1."""
TINY = Constant(2.0**-64)
"""Where the running maximum of unbounded weights starts, because it is divided by."""

FEW, FEW_ROWS, FEW_KEYS = Constant(16), Constant(16), Constant(16)
"""Rows that see so many keys or fewer are computed with care: with few keys rounding does not average out, and the gradient is
a difference of nearly equal numbers, times ``1 / l``. Programs of their own take FEW_ROWS of them and FEW_KEYS at a time."""

SHRINK_ROWS = Constant(64)
"""Rows of a block of which ``row_statistics`` writes the least of the factors that keep ``ds`` in the range of fp16."""

BOOLEAN, ADDITIVE = Constant(1), Constant(2)  # kinds of mask; 0 is no mask


@triton.jit
def narrow(p, like, RELU: tl.constexpr, RELU_ASM: tl.constexpr):
    """To the dtype of ``like``, with relu in the same instruction where the hardware has it."""
    if RELU_ASM and like.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif RELU_ASM and like.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=tl.float16, is_pure=True, pack=2
        )
    elif RELU:
        return tl.maximum(p, 0.0).to(like.dtype)
    else:
        return p.to(like.dtype)


@triton.jit
def add_product(
    acc, p, v, RELU: tl.constexpr, RELU_ASM: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """``acc + p v``, with weights in the dtype of ``v``; SPLIT: with what their rounding left out, too."""
    if SPLIT:
        if RELU:
            p = tl.maximum(p, 0.0)
        high = p.to(v.dtype)
        acc = tl.dot(high, v, acc, input_precision=PRECISION)
        finite = tl.where(v - v == 0.0, v, 0.0)  # an infinite value is in the first product
        return tl.dot((p - high.to(tl.float32)).to(v.dtype), finite, acc, input_precision=PRECISION)
    else:
        return tl.dot(narrow(p, v, RELU, RELU_ASM and RELU), v, acc, input_precision=PRECISION)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, OPAQUE: tl.constexpr):
    """An accumulator. OPAQUE hides from the compiler that it is zero.

    Where a loop may have no rounds, LLVM otherwise writes the zeros again on the way around it, and ptxas, which finds these
    registers written by something else than a product, has every product of the kernel wait for the one before (C7515).
    """
    zero = tl.zeros([ROWS, COLUMNS], tl.float32)
    if OPAQUE:
        zero = opaque(zero)
    return zero


@triton.jit
def opaque(x):
    """``x`` in fp32, of which the compiler does not know what it is (:func:`zeros`)."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def narrow_gradient(ds, DTYPE: tl.constexpr, ASM: tl.constexpr = False):
    """``ds`` to 16 bits; near zero the gradient of softpick reaches 1/eps, beyond the range of fp16.

    ASM: in one instruction, where the hardware has it (compute capability 9.0).
    """
    HALF: tl.constexpr = DTYPE == tl.float16  # noqa: SIM300
    if HALF and ASM:
        return tl.inline_asm_elementwise(
            "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,r,r", [ds], dtype=tl.float16, is_pure=True, pack=2
        )
    elif HALF:
        return tl.minimum(tl.maximum(ds, -65504.0), 65504.0).to(tl.float16)
    else:
        return ds.to(DTYPE)


@triton.jit
def growth(shrink, largest):
    """fp16: what a query is multiplied by where its ``ds`` is divided by it, as far as that fits; ``largest`` of its entries.

    ``shrink`` may be 0 beyond the last row.
    """
    return tl.minimum(1.0 / tl.maximum(shrink, 2.0**-10), tl.exp2(tl.floor(15.0 - tl.log2(largest))))


@triton.jit
def tanh(x):
    """With all its digits near 0, where softpick has weights of the size of the scores and either sign of them counts."""
    y = x * x
    series = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, series, 2.0 / (1.0 + tl.exp2(x * (-2.0 * LOG2E))) - 1.0)


@triton.jit
def fast_tanh(x):
    """In one instruction of NVIDIA GPUs from compute capability 7.5 on: off by up to 2^-11 of itself."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def visible(i2, j2, offset, left, right, tk, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which keys of an edge tile the queries see: inside the sequence and the window."""
    keep = j2 < tk
    if RIGHT:
        keep = keep & (j2 <= i2 + (offset + right))
    if LEFT:
        keep = keep & (j2 >= i2 + (offset - left))
    return keep


@triton.jit
def load_mask(mask, m_q, m_k, i2, j2, tq, tk, MASK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """The mask of a tile: boolean (in bounds and True) or additive (minus infinity out of bounds)."""
    if MASK_ROWS:
        at = mask + i2.to(tl.int64) * m_q + j2 * m_k
        inside = (i2 < tq) & (j2 < tk)
    else:
        at = mask + j2 * m_k
        inside = j2 < tk
    if MASK == BOOLEAN:
        return tl.load(at, mask=inside, other=0) != 0
    else:
        return tl.load(at, mask=inside, other=-INF).to(tl.float32)


@triton.jit
def finish_scores(
    s, i2, j2, mask, m_q, m_k, tq, tk, offset, left, right, unit, softcap,
    BASE: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores in the tile's units from the product ``query key^T``, which of them are visible, and the softcap's slope.

    What is returned for "visible" and "slope" is meaningless unless EDGE or MASK, or SOFTCAP.
    """
    slope = s
    if SOFTCAP:
        bent = tanh(s * (unit / softcap))  # unit is the scale here: the cap is in natural units
        slope = 1.0 - bent * bent
        s = softcap * bent
        if exponential(BASE):
            s *= LOG2E
    else:
        s *= unit
    keep = s == s
    if EDGE:
        keep = visible(i2, j2, offset, left, right, tk, LEFT, RIGHT)
    if MASK != 0:
        tile = load_mask(mask, m_q, m_k, i2, j2, tq, tk, MASK, MASK_ROWS)
        if MASK == BOOLEAN:
            keep = keep & tile
        else:
            keep = keep & (tile != -INF)
            tile = tl.where(tile == -INF, 0.0, tile)
            if exponential(BASE):
                tile *= LOG2E
            s += tile
    return s, keep, slope


@triton.jit
def dropout_factor(seed, start, i2, j2, tk, dropout_p):
    """0 where a weight is dropped, else ``1 / (1 - p)``: a function of seed, head and position only."""
    kept = tl.rand(seed + start, i2 * tk + j2) >= dropout_p
    return tl.where(kept, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def load_rows(base, rows, columns, stride_t, stride_d, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of rows, zero beyond ``length`` (if ROWS) and beyond ``width`` columns (if COLUMNS)."""
    at = base + rows[:, None] * stride_t + columns[None, :] * stride_d
    if ROWS and COLUMNS:
        return tl.load(at, mask=(rows[:, None] < length) & (columns[None, :] < width), other=0.0)
    elif ROWS:
        return tl.load(at, mask=rows[:, None] < length, other=0.0)
    elif COLUMNS:
        return tl.load(at, mask=columns[None, :] < width, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def tile_at(at, tiles, heads, pairs, together):
    """(tile, head, sequence) of the ``at``-th tile in the order of :func:`assignment`."""
    first = at // (tiles * together) * together
    at -= first * tiles
    wide = tl.minimum(together, pairs - first)
    pair = first + at % wide
    return at // wide, pair % heads, pair // heads


@triton.jit
def assignment(tiles, heads, pairs, together):
    """(tile, head, sequence) of a program of a one-dimensional grid, counted so that tile 0 has the most to do.

    ``together`` of the ``pairs`` of head and sequence run at a time, all their first tiles before all their second ones:
    programs that start late are short, and what they share stays in the L2 cache (``launching.pairs_together``).
    """
    tile, head, sequence = tile_at(tl.program_id(0), tiles, heads, pairs, together)
    return tile, head.to(tl.int64), sequence.to(tl.int64)


@triton.jit
def keys_of_queries(i0, i1, tk, offset, left, right, BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """For queries ``i0 .. i1 - 1``: start of the visible keys, start and end of the fully visible tiles, end."""
    lo, hi = 0, tk
    full_lo, full_hi = 0, tk // BLOCK_N * BLOCK_N
    if RIGHT:
        hi = tl.maximum(0, tl.minimum(tk, i1 + offset + right))
        full_hi = tl.maximum(0, tl.minimum(tk, i0 + offset + right + 1)) // BLOCK_N * BLOCK_N
    if LEFT:
        lo = tl.maximum(0, i0 + offset - left) // BLOCK_N * BLOCK_N
        full_lo = tl.cdiv(tl.maximum(0, i1 - 1 + offset - left), BLOCK_N) * BLOCK_N
        full_lo = tl.maximum(lo, tl.minimum(full_lo, hi))
    full_hi = tl.maximum(full_lo, full_hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def keys_seen(i, tk, offset, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """How many keys the queries ``i`` see if no mask hides any."""
    lo, hi = 0, tk
    if RIGHT:
        hi = tl.minimum(hi, i + (offset + right + 1))
    if LEFT:
        lo = tl.maximum(lo, i + (offset - left))
    return tl.maximum(hi - lo, 0)


@triton.jit
def few_seen(i0, i1, tk, offset, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether one of the queries ``i0 .. i1 - 1`` sees FEW keys or fewer, if no mask hides any: then the first or the last."""
    first = keys_seen(i0, tk, offset, left, right, LEFT, RIGHT)
    return tl.minimum(first, keys_seen(i1 - 1, tk, offset, left, right, LEFT, RIGHT)) <= FEW


@triton.jit
def rows_with_few(
    mask, m_k, tq, tk, offset, left, right,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """First and end of the queries to look at for those that see few keys."""
    first, last = 0, tq
    if RIGHT:
        first = tl.minimum(tl.maximum(0, -(offset + right)), tq)
    if MASK == 0:
        # along the queries the number of keys rises and falls once: if the last one sees many, the first ones may see few
        if keys_seen(tq - 1, tk, offset, left, right, LEFT, RIGHT) > FEW:
            last = tl.minimum(tq, tl.maximum(first, -(offset + right) + FEW)) if RIGHT else first
    elif not MASK_ROWS and not LEFT:
        j, seen, start = 0, 0, 0
        while (j < tk) & (
            seen <= FEW
        ):  # keys in steps: from the first that has visible ones to where there are too many
            tile = load_mask(mask, 0, m_k, 0, j + tl.arange(0, STEP), tq, tk, MASK, False)
            start = tl.where(seen == 0, j, start)
            seen += tl.sum((tile if MASK == BOOLEAN else tile != -INF).to(tl.int32), 0)
            j += STEP
        if RIGHT:
            first = tl.maximum(first, tl.minimum(start - offset - right, tq))
            last = tl.where(seen > FEW, tl.minimum(tq, tl.maximum(first, j - offset - right)), tq)
        else:
            last = tl.where(seen > FEW, 0, tq)
    return first, last


@triton.jit
def count_seen(
    mask, m_q, m_k, i2, lo, hi, tq, tk, offset, left, right,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """How many of the keys ``lo .. hi - 1`` the queries see. With a mask counting ends where all see more than FEW."""
    seen = tl.sum(tl.where(i2 < tq, 0, FEW + 1), 1)
    if MASK == 0:
        seen += tl.sum(keys_seen(i2, tk, offset, left, right, LEFT, RIGHT) + i2 * 0, 1)
    else:
        n = tl.arange(0, STEP)
        j = lo
        while (j < hi) & (tl.min(seen, 0) <= FEW):
            j2 = (j + n)[None, :]
            tile = load_mask(mask, m_q, m_k, i2, j2, tq, tk, MASK, MASK_ROWS)
            keep = visible(i2, j2, offset, left, right, tk, LEFT, RIGHT) & (tile if MASK == BOOLEAN else tile != -INF)
            seen += tl.sum((keep & (i2 < tq)).to(tl.int32), 1)
            j += STEP
    return seen


@triton.jit
def queries_of_keys(j0, j1, tq, offset, left, right, BLOCK_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """For keys ``j0 .. j1 - 1``: start of the queries that see one, start and end of the full tiles, end."""
    lo, hi = 0, tq
    full_lo, full_hi = 0, tq // BLOCK_M * BLOCK_M
    if RIGHT:
        lo = tl.maximum(0, j0 - offset - right) // BLOCK_M * BLOCK_M
        full_lo = tl.cdiv(tl.maximum(0, j1 - 1 - offset - right), BLOCK_M) * BLOCK_M
    if LEFT:
        hi = tl.maximum(0, tl.minimum(tq, j1 - offset + left))
        full_hi = tl.maximum(0, tl.minimum(tq, j0 - offset + left + 1)) // BLOCK_M * BLOCK_M
    full_lo = tl.maximum(lo, tl.minimum(full_lo, hi))
    full_hi = tl.maximum(full_lo, full_hi)
    return lo, full_lo, full_hi, hi
