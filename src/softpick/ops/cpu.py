"""Online attention in tiles of plain torch operations: the CPU path. Memory O(T), forward and backward.

One algorithm for the whole table of normalizers (``f``, ``g``, ``c`` of ``normalizers.py``). For a block of query rows it
walks over blocks of keys and carries, relative to a row constant ``m``, the numerator ``O = sum f(s_j) v_j`` and the
denominator ``l = sum g(s_j)``. The result is ``O / (l + c + eps)``, with ``c`` and ``eps`` added once at the end.

What makes it fast on a CPU, in the order of its weight:

* **Base 2.** ``exp2`` costs a quarter of ``exp`` in ATen, so scores are multiplied by log2(e) on the way in (for free:
  the factor is folded into the query).
* **Tiles that stay in the second-level cache**, with preallocated buffers and in-place passes.
* **No rescaling in practice.** Scores below 2^64 need no running maximum: ``m`` stays 0 until one exceeds it, because fp32
  holds the sums. ``eps`` is defined relative to the largest score and is scaled accordingly at the end.
* **Arithmetic instead of masks.** ``where`` and ``masked_fill`` are ten times slower than a multiplication. Where
  ``f(0) = g(0) = 0`` a masked key gets the score 0 by a product with the mask; otherwise minus infinity by a sum.
* **Exact skipping.** A tile without a positive score adds nothing to a rectified numerator: no product with V forward, no
  dV and dP backward.

``e^s - 1`` cancels for small scores; where a row's sum is not dominated by large ones the tile uses ``expm1``.

Rows that see few keys get their due: there the gradient is a difference that nearly cancels, divided by a small ``l``. Their
weights are divided by their sum and multiplied with V in full precision, so that one key alone gives its value to the bit,
and ``D`` is summed from the same products as the rest of the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softpick.normalizers import Normalizer
from softpick.ops import cpu_functions
from softpick.ops.cpu_functions import CANCELLATION_SAFE, LN2
from softpick.ops.reference import reciprocal
from softpick.ops.spec import LOG2E, AttentionSpec

__all__ = ["backward", "forward", "narrow"]


# Rows and keys of a tile, and how many scores the tiles of all heads treated together may hold. Measured on 2 cores
# with 1 MiB of second-level cache each: benchmarks/attention_cpu.py, docs/performance.md.
BLOCK_Q = 256
BLOCK_K = 512
TILE_SCORES = 2 * BLOCK_Q * BLOCK_K

# Rows that see so few keys, or fewer, are computed with care.
FEW_KEYS = 128


@dataclass
class _Buffers:
    """Work tiles that are allocated once for a call."""

    dtype: torch.dtype
    device: torch.device
    store: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, *shape: int) -> Tensor:
        n = math.prod(shape)
        if name not in self.store or self.store[name].numel() < n:
            self.store[name] = torch.empty(n, dtype=self.dtype, device=self.device)
        return self.store[name][:n].view(shape)


@dataclass
class _Pattern:
    """Which keys the window leaves to a query, and the masks of the tiles that it cuts."""

    spec: AttentionSpec
    tq: int
    tk: int
    dtype: torch.dtype
    device: torch.device
    cache: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.offset = self.tk - self.tq if self.spec.bottom_right else 0

    def keys(self, i0: int, i1: int) -> tuple[int, int]:
        """Half-open range of the keys that some query of [i0, i1) sees."""
        low = 0 if self.spec.left < 0 else max(0, i0 + self.offset - self.spec.left)
        high = self.tk if self.spec.right < 0 else min(self.tk, i1 + self.offset + self.spec.right)
        return low, max(low, high)

    def few(self, i0: int, i1: int) -> bool:
        """Whether some query of [i0, i1) sees ``FEW_KEYS`` or fewer: numbers rise, stay, fall, so the outer two decide."""
        counts = [high - low for low, high in (self.keys(i, i + 1) for i in (i0, i1 - 1))]
        return min(counts) <= FEW_KEYS

    def keep(self, i0: int, i1: int, j0: int, j1: int) -> Tensor | None:
        """Float 0/1 mask of a tile; None if every query of it sees every key."""
        left, right = self.spec.left, self.spec.right
        cut_right = right >= 0 and j1 - 1 > i0 + self.offset + right
        cut_left = left >= 0 and j0 < i1 - 1 + self.offset - left
        if not (cut_left or cut_right):
            return None
        where = (i0 + self.offset - j0, i1 - i0, j1 - j0)
        if where not in self.cache:
            delta = where[0] + torch.arange(where[1], device=self.device)[:, None]
            delta = delta - torch.arange(where[2], device=self.device)  # query position minus key position
            seen = torch.ones_like(delta, dtype=torch.bool)
            if right >= 0:
                seen &= delta >= -right
            if left >= 0:
                seen &= delta <= left
            self.cache[where] = seen.to(self.dtype)
        return self.cache[where]


@dataclass
class _Chunk:
    """The heads treated together: ``batch`` and ``heads`` (key heads) slices; ``n`` of them, ``groups`` queries a head."""

    batch: slice
    heads: slice
    n: int
    groups: int

    def keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``(B, Hkv, T, D)`` to ``(n, T, D)``; no copy where layout and dtype allow."""
        part = x[self.batch, self.heads]
        return part.to(dtype).reshape(self.n, *part.shape[2:])

    def accumulator(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros ``(n, T, D)`` to sum the gradient ``x`` ``(B, Hkv, T, D)`` in: a view of ``x`` where possible."""
        part = x[self.batch, self.heads]
        if x.dtype == dtype and part.is_contiguous():
            return part.zero_().view(self.n, *part.shape[2:])
        return torch.zeros(self.n, *part.shape[2:], dtype=dtype, device=x.device)

    def store(self, x: Tensor, total: Tensor) -> None:
        """Write what an :meth:`accumulator` of ``x`` holds back to it."""
        part = x[self.batch, self.heads]
        if part.data_ptr() != total.data_ptr():
            narrow(total.view(part.shape), part)

    def rows(self, x: Tensor, i0: int, i1: int) -> Tensor:
        """Rows of ``(B, H, T, ...)`` as ``(b, h, groups, rows, ...)``: a view."""
        first, last = self.heads.start * self.groups, self.heads.stop * self.groups
        part = x[self.batch, first:last, i0:i1]
        return part.unflatten(1, (-1, self.groups))

    def mask(self, x: Tensor, i0: int, i1: int, j0: int, j1: int) -> Tensor:
        """Tile of ``(B or 1, H or 1, Tq or 1, Tk or 1)`` as ``(b, h, groups, rows, keys)``, dims of 1 kept."""
        b = self.batch if x.shape[0] > 1 else slice(0, 1)
        i = slice(i0, i1) if x.shape[2] > 1 else slice(0, 1)
        j = slice(j0, j1) if x.shape[3] > 1 else slice(0, 1)
        if x.shape[1] == 1:
            return x[b, :, i, j].unsqueeze(2)
        heads = slice(self.heads.start * self.groups, self.heads.stop * self.groups)
        return x[b, heads, i, j].unflatten(1, (-1, self.groups))


def _blocks(query: Tensor, key: Tensor) -> tuple[int, int, Iterator[_Chunk]]:
    """Tile sizes and the chunks of heads for these shapes."""
    (b, h, tq, _), (_, hkv, tk, _) = query.shape, key.shape
    groups = h // hkv if hkv else 1
    # of short sequences a causal mask leaves out more if the tiles are smaller
    bq = max(1, min((BLOCK_Q if tq > 2 * BLOCK_Q else BLOCK_Q // 2) // groups, tq))
    rows = bq * groups
    bk = max(1, min(tk, max(BLOCK_K, TILE_SCORES // (rows * max(1, min(b * hkv, 2))))))
    together = max(1, TILE_SCORES // (rows * bk))

    def chunks() -> Iterator[_Chunk]:
        if together >= hkv:
            step = max(1, together // max(1, hkv))
            for b0 in range(0, b, step):
                b1 = min(b, b0 + step)
                if hkv:
                    yield _Chunk(slice(b0, b1), slice(0, hkv), (b1 - b0) * hkv, groups)
            return
        for b0 in range(b):
            for h0 in range(0, hkv, together):
                h1 = min(hkv, h0 + together)
                yield _Chunk(slice(b0, b0 + 1), slice(h0, h1), h1 - h0, groups)

    return bq, bk, chunks()


def _scores(
    spec: AttentionSpec,
    chunk: _Chunk,
    s: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    pattern: _Pattern,
    span: tuple[int, int, int, int],
    slope: Tensor | None = None,
) -> Tensor | None:
    """Write the scores of a tile to ``s``, masked keys at the neutral score; returns the 0/1 mask where there is one.

    Exponential normalizers get base-2 scores. ``slope`` receives the derivative of the softcap.
    """
    i0, i1, j0, j1 = span
    torch.bmm(q, k.transpose(1, 2), out=s)
    if spec.softcap:
        s.mul_(1.0 / spec.softcap).tanh_()
        if slope is not None:
            torch.mul(s, s, out=slope).neg_().add_(1.0)
        s.mul_(spec.softcap * (LOG2E if spec.exponential else 1.0))
    tile = s.view(_width(chunk), -1, chunk.groups, i1 - i0, j1 - j0)
    keep = pattern.keep(i0, i1, j0, j1)
    if mask is not None:
        part = chunk.mask(mask, i0, i1, j0, j1)
        if part.dtype == torch.bool:
            seen = part.to(s.dtype)
        else:
            bias = part.to(s.dtype)
            seen = (bias != -math.inf).to(s.dtype)
            tile.add_(
                bias.nan_to_num(nan=math.nan, neginf=0.0, posinf=math.inf), alpha=LOG2E if spec.exponential else 1.0
            )
        keep = seen if keep is None else seen * keep
    if keep is not None:
        if spec.norm.neutral == 0.0:
            tile.mul_(keep)
        else:
            tile.add_(torch.log2(keep))  # 0 or minus infinity
    return keep


def narrow(x: Tensor, into: Tensor) -> None:
    """Write ``x`` (overwritten) to a tensor of another dtype; what is beyond the range of fp16 becomes its largest number.

    Gradients get there: near zero the gradient of softpick reaches 1/eps.
    """
    if into.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        x = x.clamp_(-limit, limit)
    into.copy_(x)


def _few_seen(keep: Tensor | None) -> bool:
    """Whether a tile's 0/1 mask leaves between 1 and ``FEW_KEYS`` keys to some query."""
    if keep is None:
        return False
    counts = keep.sum(-1)
    return bool(((counts > 0) & (counts <= FEW_KEYS)).any())


def _width(chunk: _Chunk) -> int:
    return chunk.batch.stop - chunk.batch.start


def _dropout(spec: AttentionSpec, tile: Tensor, chunk: _Chunk, span: tuple[int, int, int, int]) -> Tensor:
    """The factors 0 or 1/(1-p) of a tile; the same ones in forward and backward, from the seed and the tile's position."""
    position = (chunk.batch.start, chunk.heads.start, span[0], span[2])
    generator = torch.Generator(device=tile.device)
    generator.manual_seed((spec.seed + hash(position)) % (2**63 - 1))
    keep = torch.empty_like(tile).bernoulli_(1.0 - spec.dropout_p, generator=generator)
    return keep.mul_(1.0 / (1.0 - spec.dropout_p) if spec.dropout_p < 1.0 else 0.0)


def _sink_rows(chunk: _Chunk, sink: Tensor, rows: int, unit: float = LOG2E) -> Tensor:
    """Sink logits ``(H,)``, in base 2, as a column ``(n, groups * rows, 1)``."""
    limit = torch.finfo(sink.dtype).max  # a logit that has no base-2 form is as good as the largest that has one
    part = (sink * unit).clamp(max=limit)[chunk.heads.start * chunk.groups : chunk.heads.stop * chunk.groups]
    part = part.view(1, -1, chunk.groups, 1, 1).expand(_width(chunk), -1, -1, rows, 1)
    return part.reshape(chunk.n, chunk.groups * rows, 1)


def _add_product(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """``acc += a @ b``; if ``b`` is bf16 the product is taken in bf16 (:func:`_product_dtype`) and summed in ``acc``'s dtype.

    Only for products whose left factor is a tile of weights or score gradients: rounding those to bf16 is what every
    bf16 attention does. Scores and ``dp`` stay in fp32.
    """
    if b.dtype == acc.dtype:
        acc.baddbmm_(a, b)
    else:
        acc.add_(torch.bmm(a.to(b.dtype), b))


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether torch multiplies bf16 matrices by instructions of this CPU: twice the speed of fp32, else a 25th of it."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product_dtype(query: Tensor, work: torch.dtype) -> torch.dtype:
    """The dtype of the factors in :func:`_add_product`: bf16 where it is the query's and the CPU is fast with it."""
    return query.dtype if query.dtype == torch.bfloat16 and _multiplies_bf16() else work


def _ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, step):
        yield low, min(stop, low + step)


def _largest(s: Tensor, keep: Tensor | None, chunk: _Chunk, rows: int, norm: Normalizer) -> Tensor:
    """Largest unmasked score of each row of a tile, minus infinity where there is none."""
    if keep is not None and norm.neutral == 0.0:
        s = torch.where(keep.bool(), s.view(_width(chunk), -1, chunk.groups, rows, s.shape[-1]), -math.inf).view_as(s)
    return s.amax(-1, keepdim=True)


def forward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mass: Tensor | None = None,
    largest: Tensor | None = None,
    saved: tuple[Tensor, ...] | None = None,
) -> None:
    """Attention into preallocated outputs (which may be views of larger tensors).

    Args:
        spec: scale, mask pattern, normalizer.
        query: ``(B, H, Tq, D)``.
        key: ``(B, Hkv, Tk, D)``.
        value: ``(B, Hkv, Tk, Dv)``.
        mask: boolean (False: excluded) or additive (minus infinity: excluded), each dim 1 or full.
        sink: ``(H,)`` logits.
        out: ``(B, H, Tq, Dv)``, written.
        lse: ``(B, H, Tq)``, written: log of the denominator, with constant and eps.
        mass: ``(B, H, Tq)``, written if given: sum of the weights.
        largest: ``(B, H, Tq)``, written if given: largest score that is not masked.
        saved: two of ``(B, H, Tq)``, written if given: for :func:`backward`, the row constant that exponents are relative to
            (base 2), and 1 over the denominator relative to it. ``lse`` says the same with fewer bits where scores are large.
    """
    norm, dtype = spec.norm, lse.dtype
    tq, tk = query.shape[2], key.shape[2]
    bq, bk, chunks = _blocks(query, key)
    buffers = _Buffers(dtype, query.device)
    pattern = _Pattern(spec, tq, tk, dtype, query.device)
    unit = LN2 if spec.exponential else 1.0  # from the tile's scores to natural ones
    low = _product_dtype(query, dtype)
    for chunk in chunks:
        k, v = chunk.keys(key, dtype), chunk.keys(value, low)
        for i0, i1 in _ranges(0, tq, bq):
            rows = chunk.groups * (i1 - i0)
            q = (chunk.rows(query, i0, i1).to(dtype) * spec.score_scale).reshape(chunk.n, rows, -1)
            total = q.new_zeros(chunk.n, rows, 1)
            kept_total = torch.zeros_like(total)
            numerator = q.new_zeros(chunk.n, rows, v.shape[-1])
            top = torch.full_like(total, -math.inf) if largest is not None else None
            sink_rows = None if sink is None else _sink_rows(chunk, sink.to(dtype), i1 - i0)
            shift = cpu_functions.Shift(norm, total, sink_rows)
            if sink_rows is not None:  # of a row that sees no key the sink is all there is: it must not underflow
                shift.update(torch.full_like(total, -math.inf))
            spans = list(_ranges(*pattern.keys(i0, i1), bk))
            few, held = pattern.few(i0, i1), None
            for j0, j1 in spans:
                span = (i0, i1, j0, j1)
                s = buffers.get("s", chunk.n, rows, j1 - j0)
                keep = _scores(spec, chunk, s, q, k[:, j0:j1], mask, pattern, span)
                if top is not None:
                    top = torch.maximum(top, _largest(s, keep, chunk, i1 - i0, norm))
                if spec.exponential or norm.sparse:
                    rowmax = s.amax(-1, keepdim=True)
                    factor = shift.update(rowmax) if spec.exponential else None
                    if factor is not None:
                        for carried in (total, kept_total, numerator):
                            carried.mul_(factor)
                    if cpu_functions.nothing_kept(norm, rowmax):
                        # Exact skip: no entry reaches the numerator, so V is not read.
                        if norm.absolute_denominator:
                            sums = shift.base(norm, s).sum(-1, keepdim=True)
                            total += -sums if norm.signed else sums
                        continue
                s, kept, denominator = _numerators(norm, shift, s, buffers)
                kept_total += kept
                if norm.normalized:
                    total += denominator
                if spec.dropout_p:
                    s.mul_(_dropout(spec, s, chunk, span))
                careful = few or (mask is not None and _few_seen(keep))
                if careful and len(spans) == 1:
                    held = s, v[:, j0:j1].to(dtype)
                else:
                    values = v[:, j0:j1]
                    _add_product(numerator, s, values.to(dtype) if careful else values)
            if norm.constant == 1:
                total += torch.exp2(-shift.value) if spec.exponential else 1.0
            elif sink_rows is not None:
                total += torch.exp2(sink_rows - shift.value)
            if spec.eps:  # relative to the final m of the mathematics, not to the one in use
                total += spec.eps * (torch.exp2(shift.final - shift.value) if spec.exponential else 1.0)
            divisor, inverse = torch.where(total == 0, 1.0, total), reciprocal(total)
            if held is None:
                numerator.div_(divisor)
            else:  # x / x is 1, so one key alone has exactly its value
                numerator = torch.bmm(held[0].div_(divisor), held[1])
            shape = (
                _width(chunk),
                chunk.heads.stop - chunk.heads.start,
                chunk.groups,
                i1 - i0,
            )  # -1 of no values is unclear
            chunk.rows(out, i0, i1).copy_(numerator.view(*shape, v.shape[-1]))
            logarithm = shift.value * unit + torch.log(total.abs() if norm.signed_denominator else total)
            if sink is not None:  # which may have no base-2 form
                logarithm = torch.maximum(logarithm, _sink_rows(chunk, sink.to(dtype), i1 - i0, 1.0))
            chunk.rows(lse, i0, i1).copy_(logarithm.view(shape))
            if saved is not None:
                for what, where in zip((shift.value, inverse), saved, strict=True):
                    chunk.rows(where, i0, i1).copy_(what.view(shape))
            if mass is not None:
                chunk.rows(mass, i0, i1).copy_((kept_total * inverse).view(shape))
            if largest is not None and top is not None:
                chunk.rows(largest, i0, i1).copy_((top * unit).view(shape))
        del k, v  # before the next chunk makes its own


def _numerators(
    norm: Normalizer, shift: cpu_functions.Shift, s: Tensor, buffers: _Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    """``f`` of a tile (may overwrite ``s``), its row sum, and the row sum of ``g``."""
    if norm.rectify == "none":
        p = shift.base(norm, s)
        kept = p.sum(-1, keepdim=True)
        absolute = norm.signed and norm.absolute_denominator
        return p, kept, torch.linalg.vector_norm(p, 1, -1, keepdim=True) if absolute else kept
    # where the sign of the base function does not tell what is kept, the scores do
    p = shift.base(norm, s if norm.signed else buffers.get("p", *s.shape).copy_(s))
    everything = p.sum(-1, keepdim=True) if norm.absolute_denominator else None
    p = p.clamp_(min=0) if norm.signed else cpu_functions.keep(norm, p, s)
    kept = p.sum(-1, keepdim=True)
    if everything is None:
        return p, kept, kept
    return p, kept, 2.0 * kept - everything if norm.signed else everything


def backward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dmask: Tensor | None = None,
    dsink: Tensor | None = None,
    saved: tuple[Tensor, ...] | None = None,
) -> None:
    """Gradients into preallocated tensors: ``dquery``, ``dkey``, ``dvalue`` written; ``dmask``, ``dsink`` added to.

    Recomputes the scores; with ``E_j`` the derivative of the base function over ``l`` (``e^{s - lse}``) and ``D = do . o``

        dv_j += f_j / l do        ds_j = E_j ([kept] dp_j - sign(s_j) D)        dsink = -D e^{sink - lse}

    Shapes as in :func:`forward`; ``grad_out`` as ``out``; ``dmask`` as ``mask`` (additive) in the dtype of ``lse``. Without
    ``saved`` its place is taken by ``lse`` (:func:`from_lse`).
    """
    norm, dtype = spec.norm, lse.dtype
    tq, tk = query.shape[2], key.shape[2]
    bq, bk, chunks = _blocks(query, key)
    buffers = _Buffers(dtype, query.device)
    pattern = _Pattern(spec, tq, tk, dtype, query.device)
    low = _product_dtype(query, dtype)
    for chunk in chunks:
        k, v, k_low = chunk.keys(key, dtype), chunk.keys(value, dtype), chunk.keys(key, low)
        dk, dv = chunk.accumulator(dkey, dtype), chunk.accumulator(dvalue, dtype)
        for i0, i1 in _ranges(0, tq, bq):
            rows = chunk.groups * (i1 - i0)
            q = (chunk.rows(query, i0, i1).to(dtype) * spec.score_scale).reshape(chunk.n, rows, -1)
            q_low = chunk.rows(query, i0, i1).reshape(chunk.n, rows, -1).to(low)
            do_low = chunk.rows(grad_out, i0, i1).reshape(chunk.n, rows, -1).to(low)
            do = chunk.rows(grad_out, i0, i1).to(dtype)
            delta = (do * chunk.rows(out, i0, i1).to(dtype)).sum(-1).reshape(chunk.n, rows, 1)
            do = do.reshape(chunk.n, rows, -1)
            level, inverse = _row_level(spec, chunk, lse, saved, i0, i1, rows)
            zero = not spec.exponential or not bool(level.any())
            # log2 of the denominator; of an empty row, where all is 0, it does not matter
            exact = norm.base == "expm1" and float((level - torch.log2(inverse.abs())).min()) < CANCELLATION_SAFE
            dq = torch.zeros_like(q)
            spans = list(_ranges(*pattern.keys(i0, i1), bk))
            few = pattern.few(i0, i1)
            for j0, j1 in spans:
                span = (i0, i1, j0, j1)
                shape = (chunk.n, rows, j1 - j0)
                s, e = buffers.get("s", *shape), buffers.get("e", *shape)
                slope = buffers.get("slope", *shape) if spec.softcap else None
                keep = _scores(spec, chunk, s, q, k[:, j0:j1], mask, pattern, span, slope)
                careful = len(spans) == 1 and not spec.part and (few or (mask is not None and _few_seen(keep)))
                if keep is not None:
                    keep = keep.expand(_width(chunk), chunk.n // _width(chunk), chunk.groups, i1 - i0, j1 - j0)
                skip = cpu_functions.nothing_kept(norm, s)
                if skip and not (norm.absolute_denominator and norm.negative_gradient):
                    continue  # neither V nor dS: all five products are zero
                drop = _dropout(spec, s, chunk, span) if spec.dropout_p else None
                cpu_functions.derivative(norm, s, e, level, inverse, zero)
                if keep is not None and norm.neutral == 0.0:
                    e.view(keep.shape).mul_(keep)
                if skip:
                    ds = (e.copysign_(s.add_(0.0)) if norm.signed else e).mul_(delta).neg_()
                else:
                    p = buffers.get("p", *shape)
                    cpu_functions.weights(norm, s, e, p, level, inverse, zero, exact)
                    if drop is not None:
                        p.mul_(drop)
                    _add_product(dv[:, j0:j1], p.transpose(1, 2), do_low)
                    dp = torch.bmm(do, v[:, j0:j1].transpose(1, 2), out=buffers.get("dp", *shape) if careful else p)
                    if careful:  # all the row is here: D of the very numbers that it is subtracted from
                        delta = p.mul_(dp).sum(-1, keepdim=True)
                    if drop is not None:
                        dp.mul_(drop)
                    ds = cpu_functions.score_gradient(norm, s, e, dp, delta)
                if dmask is not None:
                    part = chunk.mask(dmask, i0, i1, j0, j1)
                    part += ds.view(_width(chunk), -1, chunk.groups, i1 - i0, j1 - j0).sum_to_size(part.shape)
                if slope is not None:
                    ds.mul_(slope)
                ds = ds.to(low)
                _add_product(dq, ds, k_low[:, j0:j1])
                _add_product(dk[:, j0:j1], ds.transpose(1, 2), q_low)
            if dsink is not None and sink is not None:
                grad = -delta * torch.exp2(_sink_rows(chunk, sink.to(dtype), i1 - i0) - level) * inverse
                heads = slice(chunk.heads.start * chunk.groups, chunk.heads.stop * chunk.groups)
                dsink[heads] += grad.view(_width(chunk), -1, chunk.groups, i1 - i0).sum((0, 3)).flatten()
            rows_of_dq = chunk.rows(dquery, i0, i1)
            narrow(dq.mul_(spec.scale).view(rows_of_dq.shape), rows_of_dq)
        chunk.store(dkey, dk.mul_(spec.scale))
        chunk.store(dvalue, dv)
        del k, v, k_low, dk, dv  # before the next chunk makes its own


def _row_level(
    spec: AttentionSpec, chunk: _Chunk, lse: Tensor, saved: tuple[Tensor, ...] | None, i0: int, i1: int, rows: int
) -> tuple[Tensor, Tensor]:
    """The row constant that exponents are relative to (base 2) and ``1 / l`` relative to it, as columns."""
    if saved is not None:
        level, inverse = (chunk.rows(x, i0, i1).reshape(chunk.n, rows, 1) for x in saved)
        return level, inverse
    level, inverse = from_lse(spec, chunk.rows(lse, i0, i1).reshape(chunk.n, rows, 1).double())
    return level.to(lse.dtype), inverse.to(lse.dtype)


def from_lse(spec: AttentionSpec, lse: Tensor) -> tuple[Tensor, Tensor]:
    """``saved`` of :func:`forward`, of which the first is exact in fp32, from an ``lse`` in fp64."""
    empty = lse == -math.inf
    lse = torch.where(empty, 0.0, lse * LOG2E)
    level = lse.float().to(lse.dtype) if spec.exponential else torch.zeros_like(lse)
    return level, torch.where(empty, 0.0, torch.exp2(level - lse)).clamp(max=torch.finfo(torch.float32).max)


def to_lse(saved: tuple[Tensor, ...], lse: Tensor, sink: Tensor | None) -> Tensor:
    """``lse`` of :func:`forward` in fp64, from ``saved``: its own dtype has few bits behind the point of a large number."""
    level, inverse = (x.double() for x in saved)
    exact = torch.where(inverse == 0, -math.inf, (level - torch.log2(inverse)) / LOG2E)
    if sink is not None:  # which may have no base-2 form
        exact = torch.where(exact.isfinite(), exact, lse.double())
    return exact
