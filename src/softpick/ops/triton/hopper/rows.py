"""Softpick over rows too long for one program: each program of a row has a segment of it, and a ring of segments
in shared memory.

All programs run at the same time (a cooperative launch) and take rows in turn. While later segments are fetched, a program
sums up its segment of one row and finishes that of the row before, both from shared memory: by then the sums of the other
programs have arrived, so no program waits. Nothing stays in registers from one row to the next; exponentials are taken twice,
which costs less. A program publishes the sum of its segment in words of global memory: the value in the upper half, in the
lower half the anchor that the value is relative to, whose sign bit says that the word has been written. A word is all that
other programs wait for: no counter and no fence. Sums are added in the same order every time.

In bf16 the forward pass has no bytes to hide instructions behind. 16-bit inputs are therefore summed up relative to 0 and
without a series where ``e^x - 1`` cancels. The published words show all programs of a row whether that was sound; where it was
not, they sum up a second time.

A segment is CHUNKS chunks ``(num_warps, WIDTH)``, a line of a chunk a warp. Beyond the end of a row a chunk has zeros, which
count nowhere. Rows begin at multiples of 16 bytes; ``n`` and strides count in those (VEC entries), so that Triton knows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from softpick.ops.triton.base_functions import INF, LN2, LOG2E, Constant
from softpick.ops.triton.hopper.versions import load_entries, reinterpret
from softpick.ops.triton.rows import _difference as _exact_difference
from softpick.ops.triton.rows import _gradient, _level

__all__ = ["rows_backward_ring", "rows_forward_ring"]

_PLAIN = Constant(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_WRITTEN = Constant(-(2**31))
# sums relative to 0 are sound below, and from so much an entry on: e^x - 1 is off by 2^-22, of a sum 6e-5 at the very worst
_LARGEST, _LEAST = Constant(2.0**64), Constant(2.0**-8)
_LARGEST_EPS = Constant(1e-5)  # eps is relative to e^m; without m it is off by a factor of at most 1 + eps
_SMALLEST = Constant(2.0**-126)  # of the normal numbers


@gluon.constexpr_function
def _layout(VEC, num_warps):
    return gl.BlockedLayout([1, VEC], [1, 32], [num_warps, 1], [1, 0])


@gluon.jit
def _columns(LINES: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Where the entries of these lines are."""
    line = gl.arange(0, LINES, layout=gl.SliceLayout(1, layout))
    return line[:, None] * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _share(segments, WIDTH: gl.constexpr, CHUNKS: gl.constexpr, layout: gl.constexpr, num_warps: gl.constexpr):
    """A program's first row, its segment's number, the step from row to row, columns of the segment and of its first chunk."""
    first, segment, step = gl.program_id(0) // segments, gl.program_id(0) % segments, gl.num_programs(0) // segments
    start = segment * (CHUNKS * num_warps * WIDTH)
    c = start + _columns(CHUNKS * num_warps, WIDTH, layout)
    columns = start + _columns(num_warps, WIDTH, layout)
    return first, segment, step, c, columns


@gluon.jit
def _fetch(ring, it, x, r, rows, stride, c, n):
    """Start copying entries ``c`` of row ``r``, the ``it``-th of this program; zeros where there are none."""
    VEC: gl.constexpr = 128 // ring.dtype.primitive_bitwidth
    at = x + gl.cast(r, gl.int64) * stride * VEC + c
    # one copy a segment: with one a chunk Triton puts a barrier before each
    load_entries(ring.index(it % ring.shape[0]), at, mask=(c < n * VEC) & (r < rows))


@gluon.jit
def _chunk(ring, stage, chunk, layout: gl.constexpr, num_warps: gl.constexpr):
    """A chunk of a segment, ``(num_warps, WIDTH)``."""
    CHUNKS: gl.constexpr = ring.shape[1] // num_warps
    chunks = reinterpret(ring, ring.dtype, [ring.shape[0] * CHUNKS, num_warps, ring.shape[2]], _PLAIN)
    return chunks.index(stage * CHUNKS + chunk).load(layout)


@gluon.jit
def _wide(s):
    """In fp32."""
    if s.dtype == gl.bfloat16:  # the compiler takes three instructions for two
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [s], dtype=gl.float32, is_pure=True, pack=2
        )
    else:
        return s.to(gl.float32)


@gluon.jit
def _high(ring, stage, num_warps: gl.constexpr):
    """The highest positive entry of a segment, or 0, for each warp: as integers such entries have the same order, and others
    are below 0.
    """
    CHUNKS: gl.constexpr = ring.shape[1] // num_warps
    HALF: gl.constexpr = ring.dtype.primitive_bitwidth == 16
    WIDTH: gl.constexpr = ring.shape[2] * ring.dtype.primitive_bitwidth // 32
    layout: gl.constexpr = _layout(4, num_warps)
    words = reinterpret(ring, gl.int32, [ring.shape[0] * CHUNKS, num_warps, WIDTH], _PLAIN)
    high = gl.zeros([num_warps, WIDTH], gl.int32, layout)
    for chunk in range(CHUNKS):
        word = words.index(stage * CHUNKS + chunk).load(layout)
        if HALF:  # two entries
            high = gl.inline_asm_elementwise(
                "max.s16x2 $0, $1, $2;", "=r,r,r", [high, word], dtype=gl.int32, is_pure=True, pack=1
            )
        else:
            high = gl.maximum(high, word)
    if HALF:
        top = gl.max(gl.maximum(high >> 16, high & 0xFFFF), 1)
        return top.to(gl.int16).to(ring.dtype, bitcast=True).to(gl.float32)
    else:
        return gl.max(high, 1).to(gl.float32, bitcast=True)


@gluon.jit
def _difference(x, e, c, EXACT: gl.constexpr):
    """``c (e^x - 1)`` with ``e = c e^x`` given: the difference, and a series where it would cancel."""
    if EXACT:
        return _exact_difference(x, e, c, True)
    else:  # for 16-bit outputs: to 4e-5 where a row has scores around 20 or all are small
        return gl.where(gl.abs(x) < 0.015625, x * (c + x * (0.5 * c)), e - c)


@gluon.jit
def _exponential(s, level, EXACT: gl.constexpr):
    """``e^(s - level)``. One instruction less if the product with ``level`` is rounded, to 6e-6 at levels around 100."""
    if EXACT:
        return gl.exp2((s - level) * LOG2E)
    else:
        return gl.exp2(s * LOG2E - level * LOG2E)


@gluon.constexpr_function
def _pair(dtype):
    return "bf16x2" if dtype == gl.bfloat16 else "f16x2"


@gluon.constexpr_function
def _adding(dtype):
    """PTX for two entries of 16 bits, $2, and in fp32, $3 and $4: adds ``|e^x - 1|`` to $5 and $6, nothing for minus infinity.
    One comparison does for both.
    """
    infinity = "0xff80ff80" if dtype == gl.bfloat16 else "0xfc00fc00"
    return f"""{{
        .reg .f32 a, b; .reg .b32 i; .reg .pred p, q;
        mov.b32 i, {infinity};
        setp.neu.{_pair(dtype)} p|q, $2, i;
        mul.f32 a, $3, 0f3FB8AA3B;
        mul.f32 b, $4, 0f3FB8AA3B;
        ex2.approx.ftz.f32 a, a;
        ex2.approx.ftz.f32 b, b;
        add.f32 a, a, 0fBF800000;
        add.f32 b, b, 0fBF800000;
        abs.f32 a, a;
        abs.f32 b, b;
        mov.f32 $0, $5;
        mov.f32 $1, $6;
        @p add.f32 $0, $0, a;
        @q add.f32 $1, $1, b;
    }}"""


@gluon.constexpr_function
def _finishing(dtype):
    """PTX for two entries of 16 bits, $1, and in fp32, $2 and $3: ``relu(c (e^x - 1))`` with ``c`` $6 and $7, its logarithm in
    base 2 $4 and $5. One comparison does for both; NaN stays.

    bf16: below 2^-10 ``c x``, off by 2^-11; for all negative ``x``, too, which relu makes 0. fp16 needs the second term, below
    2^-6.
    """
    series = "mov.f32 c, $6; mov.f32 d, $7;"
    near, bound = "mov.b32", "0x3a803a80"
    if dtype == gl.float16:
        series = "mul.f32 h, $6, 0f3F000000; fma.rn.f32 c, $2, h, $6; fma.rn.f32 d, $3, h, $7;"
        near, bound = "abs.f16x2", "0x24002400"
    return f"""{{
        .reg .f32 a, b, c, d, h; .reg .b32 i, s; .reg .pred p, q;
        mov.b32 i, {bound};
        {near} s, $1;
        setp.lt.{_pair(dtype)} p|q, s, i;
        fma.rn.f32 a, $2, 0f3FB8AA3B, $4;
        fma.rn.f32 b, $3, 0f3FB8AA3B, $5;
        ex2.approx.ftz.f32 a, a;
        ex2.approx.ftz.f32 b, b;
        sub.f32 a, a, $6;
        sub.f32 b, b, $7;
        {series}
        @p mul.f32 a, $2, c;
        @q mul.f32 b, $3, d;
        cvt.rn.relu.{_pair(dtype)}.f32 $0, b, a;
    }}"""


@gluon.jit
def _sums(ring, stage, layout: gl.constexpr, num_warps: gl.constexpr):
    """Sums ``(num_warps,)`` of ``|e^x - 1|`` over a segment, and the anchors they are relative to: in base 2, so that
    exponentials take one fma.
    """
    CHUNKS: gl.constexpr = ring.shape[1] // num_warps
    WIDTH: gl.constexpr = ring.shape[2]
    EXACT: gl.constexpr = ring.dtype == gl.float32
    m = gl.convert_layout(_high(ring, stage, num_warps) * LOG2E, gl.SliceLayout(1, layout))
    e0 = gl.exp2(-m)[:, None]
    total = gl.zeros([num_warps, WIDTH], gl.float32, layout)
    for chunk in range(CHUNKS):
        s = _wide(_chunk(ring, stage, chunk, layout, num_warps))
        f = _difference(s, gl.exp2(s * LOG2E - m[:, None]), e0, EXACT)
        total += gl.where(s == -INF, 0.0, gl.abs(f))
    return gl.sum(total, 1), m


@gluon.jit
def _quick_sums(ring, stage, layout: gl.constexpr, num_warps: gl.constexpr):
    """As :func:`_sums` of 16-bit inputs, relative to 0 and without a series."""
    CHUNKS: gl.constexpr = ring.shape[1] // num_warps
    WIDTH: gl.constexpr = ring.shape[2]
    total = gl.zeros([num_warps, WIDTH], gl.float32, layout)
    for chunk in range(CHUNKS):
        s = _chunk(ring, stage, chunk, layout, num_warps)
        total = gl.inline_asm_elementwise(
            _adding(ring.dtype), "=&r,=&r,r,r,r,r,r", [s, _wide(s), total], dtype=gl.float32, is_pure=True, pack=2
        )
    total = gl.sum(total, 1)
    return total, gl.zeros_like(total)


@gluon.jit
def _word(value, anchor):
    low = anchor.to(gl.int32, bitcast=True) | _WRITTEN
    return (value.to(gl.int32, bitcast=True).to(gl.int64) << 32) | low.to(gl.uint32, bitcast=True).to(gl.int64)


@gluon.jit
def _value(word):
    return (word >> 32).to(gl.int32).to(gl.float32, bitcast=True)


@gluon.jit
def _anchor(word):
    return (word.to(gl.int32) & ~_WRITTEN).to(gl.float32, bitcast=True)


@gluon.jit
def _publish(words, segment, value, anchor, WORDS: gl.constexpr):
    """Publish the sums of the warps ``(num_warps,)``: a word each, or one for all of them (WORDS 1)."""
    if WORDS == 1:
        top = gl.max(anchor, 0)
        one = _word(gl.sum(value * gl.exp2(anchor - top), 0), top)
        gl.atomic_xchg(words + segment, one, sem="relaxed")
    else:
        line = gl.arange(0, WORDS, layout=value.type.layout)
        gl.atomic_xchg(words + segment * WORDS + line, _word(value, anchor), sem="relaxed")


@gluon.jit
def _words(words, count, COUNT: gl.constexpr, num_warps: gl.constexpr):
    """Read what is there of the words of a row; every warp has them all and needs no other to wait."""
    layout: gl.constexpr = gl.BlockedLayout([max(1, COUNT // 32)], [32], [num_warps], [0])
    i = gl.arange(0, COUNT, layout=layout)
    return gl.load(words + i, mask=i < count, other=2**31, volatile=True)


@gluon.jit
def _all_words(found, words, count, COUNT: gl.constexpr, num_warps: gl.constexpr):
    """Wait for all words of a row; ``found`` is what was there before."""
    while gl.min((found >> 31).to(gl.int32) & 1, 0) == 0:
        found = _words(words, count, COUNT, num_warps)
    return found


@gluon.jit
def _total(words, eps):
    """The anchor of a row and its sum relative to that."""
    m = _anchor(words)
    top = gl.max(m, 0)
    return top, gl.sum(_value(words) * gl.exp2(m - top), 0) + eps


@gluon.jit(do_not_specialize=["rows", "n", "stride", "segments"])
def rows_forward_ring(
    x, y, lse, words, rows, n, stride, eps, segments,
    WIDTH: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, WORDS: gl.constexpr, COUNT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """``segments`` programs a row of ``x`` ``(rows, n)``, whose rows are ``stride`` apart; ``y`` is contiguous.

    ``words``: ``(2, rows, segments * WORDS)`` zeros, WORDS ``num_warps`` or 1; the second half is for rows that are summed up a
    second time. COUNT: a power of two, at least ``segments * WORDS``.
    """
    VEC: gl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    EXACT: gl.constexpr = VEC == 4
    layout: gl.constexpr = _layout(VEC, num_warps)
    first, segment, step, c, columns = _share(segments, WIDTH, CHUNKS, layout, num_warps)
    count = segments * WORDS
    ring = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, CHUNKS * num_warps, WIDTH], _PLAIN)
    for it in gl.static_range(STAGES - 1):
        _fetch(ring, it, x, first + it * step, rows, stride, c, n)
        async_copy.commit_group()
    rounds = (rows - first + step - 1) // step
    least = gl.where(eps > _LARGEST_EPS, INF, n * (VEC * _LEAST))
    for it in range(rounds + 1):
        r = first + it * step
        done = gl.maximum(r - step, first)
        found = _words(words + done * count, count, COUNT, num_warps)  # on their way during the sums
        async_copy.wait_group(STAGES - 2)
        if it < rounds:
            if EXACT:
                value, anchor = _sums(ring, it % STAGES, layout, num_warps)
            else:
                value, anchor = _quick_sums(ring, it % STAGES, layout, num_warps)
            _publish(words + r * count, segment, value, anchor, WORDS)
        if (
            it > 0
        ):  # the sums of row r are published before the wait for those of the row before: no program blocks another
            stage = (it + STAGES - 1) % STAGES
            found = _all_words(found, words + done * count, count, COUNT, num_warps)
            if EXACT:
                top, total = _total(found, eps)
                factor = gl.where(total == 0, 0.0, 1.0 / total)
                e0 = gl.exp2(-top) * factor
            else:
                top, total = gl.to_tensor(0.0), gl.sum(_value(found), 0) + eps
                if not ((total >= least) & (total < _LARGEST)):  # all programs of the row see it
                    value, anchor = _sums(ring, stage, layout, num_warps)
                    again = words + (rows + done) * count
                    _publish(again, segment, value, anchor, WORDS)
                    found = _words(again, count, COUNT, num_warps)
                    top, total = _total(_all_words(found, again, count, COUNT, num_warps), eps)
                # where the total is 0, entries are 0 or minus infinity, of which any factor but 0 makes 0
                lower = gl.where(total == 0, 0.0, -top - gl.log2(total))
                e0 = gl.exp2(lower)
                e0 = gl.where(e0 < _SMALLEST, _SMALLEST, e0)  # 0, for scores above 87, would make NaN of minus infinity
            to = y + gl.cast(done, gl.int64) * n * VEC
            for chunk in range(CHUNKS):
                s = _chunk(ring, stage, chunk, layout, num_warps)
                if EXACT:
                    f = _difference(s, gl.exp2(s * LOG2E - top) * factor, e0, EXACT)
                    out = gl.where(f < 0, 0.0, f)  # NaN stays
                else:
                    out = gl.inline_asm_elementwise(
                        _finishing(ring.dtype), "=r,r,r,r,r,r,r,r", [s, _wide(s), lower, e0],
                        dtype=ring.dtype, is_pure=True, pack=2,
                    )  # fmt: skip
                at = chunk * (num_warps * WIDTH) + columns
                gl.store(to + at, out, mask=at < n * VEC)
            if segment == 0:
                gl.store(lse + done, (top + gl.log2(total)) * LN2)
        ahead = it + STAGES - 1
        _fetch(ring, ahead, x, first + ahead * step, rows, stride, c, n)
        async_copy.commit_group()


@gluon.jit(do_not_specialize=["rows", "n", "stride", "grad_stride", "segments"])
def rows_backward_ring(
    x, lse, dy, dx, words, rows, n, stride, grad_stride, segments,
    WIDTH: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, WORDS: gl.constexpr, COUNT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """As :func:`rows_forward_ring`, for ``dx``; the sums are those of ``y dy``, with anchors 0, and ``words``
    ``(rows, segments * WORDS)``.
    """
    VEC: gl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    EXACT: gl.constexpr = VEC == 4
    layout: gl.constexpr = _layout(VEC, num_warps)
    first, segment, step, c, columns = _share(segments, WIDTH, CHUNKS, layout, num_warps)
    count = segments * WORDS
    ring = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, CHUNKS * num_warps, WIDTH], _PLAIN)
    grads = gl.allocate_shared_memory(dy.dtype.element_ty, [STAGES, CHUNKS * num_warps, WIDTH], _PLAIN)
    for it in gl.static_range(STAGES - 1):
        _fetch(ring, it, x, first + it * step, rows, stride, c, n)
        _fetch(grads, it, dy, first + it * step, rows, grad_stride, c, n)
        async_copy.commit_group()
    rounds = (rows - first + step - 1) // step
    held = 0.0
    level = _level(lse, first, first < rows)
    for it in range(rounds + 1):
        r = first + it * step
        done = gl.maximum(r - step, first)
        found = _words(words + done * count, count, COUNT, num_warps)
        after = _level(lse, r + step, r + step < rows)
        async_copy.wait_group(STAGES - 2)
        if it < rounds:
            stage = it % STAGES
            e0 = gl.exp2(-level * LOG2E)
            inner = gl.zeros([num_warps, WIDTH], gl.float32, layout)
            for chunk in range(CHUNKS):
                s = _wide(_chunk(ring, stage, chunk, layout, num_warps))
                g = _wide(_chunk(grads, stage, chunk, layout, num_warps))
                inner += gl.maximum(_difference(s, _exponential(s, level, EXACT), e0, EXACT), 0.0) * g
            one = gl.sum(inner, 1)
            _publish(words + r * count, segment, one, gl.zeros_like(one), WORDS)
        if it > 0:
            stage = (it + STAGES - 1) % STAGES
            found = _all_words(found, words + done * count, count, COUNT, num_warps)
            total = gl.sum(_value(found), 0)
            to = dx + gl.cast(done, gl.int64) * n * VEC
            for chunk in range(CHUNKS):
                s = _wide(_chunk(ring, stage, chunk, layout, num_warps))
                g = _wide(_chunk(grads, stage, chunk, layout, num_warps))
                out = _gradient(s, _exponential(s, held, EXACT), g, total)
                at = chunk * (num_warps * WIDTH) + columns
                gl.store(to + at, out.to(dx.dtype.element_ty), mask=at < n * VEC)
        held, level = level, after
        ahead = it + STAGES - 1
        _fetch(ring, ahead, x, first + ahead * step, rows, stride, c, n)
        _fetch(grads, ahead, dy, first + ahead * step, rows, grad_stride, c, n)
        async_copy.commit_group()
