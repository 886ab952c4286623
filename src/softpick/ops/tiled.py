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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softpick.normalizers import Normalizer

__all__ = ["TileSpec", "backward", "forward"]

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# Rows and keys of a tile, and how many scores the tiles of all heads treated together may hold. Measured on 2 cores
# with 1 MiB of second-level cache each: benchmarks/attention_cpu.py, docs/performance.md.
BLOCK_Q = 256
BLOCK_K = 512
TILE_SCORES = 2 * BLOCK_Q * BLOCK_K

# Base-2 scores up to here are exponentiated without subtracting a maximum: 2^64 times the longest row stays in fp32.
UNSHIFTED = 64.0
# Rows whose largest base-2 score (forward) or log2 of the denominator (backward) is at least this have a sum of at
# least one, against which the rounding of e^s - 1 is an error in the last place.
CANCELLATION_SAFE = 1.0


@dataclass(frozen=True)
class TileSpec:
    """Everything but the tensors. ``left`` and ``right`` bound the keys a query sees around its diagonal; -1: unbounded."""

    norm: Normalizer
    scale: float
    eps: float
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: int = 0

    @property
    def exponential(self) -> bool:
        """Whether scores are taken to base 2."""
        return self.norm.base != "linear"

    @property
    def score_scale(self) -> float:
        """Factor on the query: the scale, and log2(e) unless a softcap comes in between."""
        return self.scale * (LOG2E if self.exponential and not self.softcap else 1.0)


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

    spec: TileSpec
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
        """Zeros ``(n, T, D)`` to sum the gradient ``x`` ``(B, Hkv, T, D)`` in: the place itself where that is possible."""
        part = x[self.batch, self.heads]
        if x.dtype == dtype and part.is_contiguous():
            return part.zero_().view(self.n, *part.shape[2:])
        return torch.zeros(self.n, *part.shape[2:], dtype=dtype, device=x.device)

    def store(self, x: Tensor, total: Tensor) -> None:
        """Write what an :meth:`accumulator` of ``x`` holds to its place."""
        part = x[self.batch, self.heads]
        if part.data_ptr() != total.data_ptr():
            part.copy_(total.view(part.shape))

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
    spec: TileSpec,
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


def _width(chunk: _Chunk) -> int:
    return chunk.batch.stop - chunk.batch.start


def _dropout(spec: TileSpec, tile: Tensor, chunk: _Chunk, span: tuple[int, int, int, int]) -> Tensor:
    """The factors 0 or 1/(1-p) of a tile; the same ones in forward and backward, from the seed and the tile's place."""
    place = (chunk.batch.start, chunk.heads.start, span[0], span[2])
    generator = torch.Generator(device=tile.device)
    generator.manual_seed((spec.seed + hash(place)) % (2**63 - 1))
    keep = torch.empty_like(tile).bernoulli_(1.0 - spec.dropout_p, generator=generator)
    return keep.mul_(1.0 / (1.0 - spec.dropout_p) if spec.dropout_p < 1.0 else 0.0)


def _sink_rows(chunk: _Chunk, sink: Tensor, rows: int) -> Tensor:
    """Base-2 sink logits ``(H,)`` as a column ``(n, groups * rows, 1)``."""
    part = (sink * LOG2E)[chunk.heads.start * chunk.groups : chunk.heads.stop * chunk.groups]
    part = part.view(1, -1, chunk.groups, 1, 1).expand(_width(chunk), -1, -1, rows, 1)
    return part.reshape(chunk.n, chunk.groups * rows, 1)


def _add_product(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """``acc += a @ b``; if ``b`` is bf16 the product is taken in bf16 (twice the speed) and summed in ``acc``'s dtype.

    Only for products whose left factor is a tile of weights or score gradients: rounding those to bf16 is what every
    bf16 attention does. Scores and ``dp`` stay in fp32.
    """
    if b.dtype == acc.dtype:
        acc.baddbmm_(a, b)
    else:
        acc.add_(torch.bmm(a.to(b.dtype), b))


def _product_dtype(query: Tensor, work: torch.dtype) -> torch.dtype:
    """The dtype of the factors in :func:`_add_product`."""
    return query.dtype if query.dtype == torch.bfloat16 else work


def _ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, step):
        yield low, min(stop, low + step)


def _largest(s: Tensor, keep: Tensor | None, chunk: _Chunk, rows: int, norm: Normalizer) -> Tensor:
    """Largest unmasked score of each row of a tile, minus infinity where there is none."""
    if keep is not None and norm.neutral == 0.0:
        s = torch.where(keep.bool(), s.view(_width(chunk), -1, chunk.groups, rows, s.shape[-1]), -math.inf).view_as(s)
    return s.amax(-1, keepdim=True)


class _Shift:
    """The row constant ``m`` that exponents are taken relative to (base 2), and whether it is still zero everywhere."""

    def __init__(self, norm: Normalizer, like: Tensor, sink: Tensor | None) -> None:
        # max(anchor, largest score so far): the m of the mathematics, but that a sink stands for its anchor of 0
        self.high = torch.full_like(like, norm.anchor) if sink is None else sink
        self.anchor = norm.anchor
        self.value = torch.zeros_like(like)  # the m in use
        self.zero = True

    def update(self, rowmax: Tensor) -> Tensor | None:
        """Take a tile's row maxima in; returns the factor for what was accumulated before, if m had to move."""
        self.high = torch.maximum(self.high, rowmax)
        if self.zero and float(self.high.max()) <= UNSHIFTED and float(self.high.min()) >= -UNSHIFTED:
            return None
        fresh = torch.where(self.high == -math.inf, 0.0, self.high)
        # Where nothing was accumulated the old m is arbitrary: the clamp keeps 0 * factor from being 0 * inf.
        factor = torch.exp2((self.value - fresh).clamp(max=UNSHIFTED))
        self.value, self.zero = fresh, False
        return factor

    @property
    def final(self) -> Tensor:
        """The m of the mathematics, finite."""
        high = self.high.clamp(min=self.anchor)
        return torch.where(high == -math.inf, 0.0, high)

    def expm1(self, s: Tensor) -> Tensor:
        """``2^(s - m) - 2^-m`` in place, accurate relative to the row sum."""
        if not self.zero:
            small = torch.expm1(s.abs().mul_(-LN2)).neg_().copysign_(s)
            return s.clamp_(min=0).sub_(self.value).exp2_().mul_(small)
        if float(self.high.min()) >= CANCELLATION_SAFE:
            return s.exp2_().sub_(1.0)
        return s.mul_(LN2).expm1_()

    def exp(self, s: Tensor) -> Tensor:
        """``2^(s - m)`` in place."""
        return (s if self.zero else s.sub_(self.value)).exp2_()


def _nothing_kept(norm: Normalizer, scores: Tensor) -> bool:
    """Whether the rectification leaves none of these scores (or row maxima of scores) in the numerator."""
    if norm.rectify == "none":
        return False
    largest = float(scores.amax())
    return largest <= 0.0 if norm.rectify == "positive" else largest < 0.0


def _keep_nonnegative(x: Tensor, s: Tensor) -> Tensor:
    """``x`` where ``s >= 0``, else 0, in place. threshold_backward is a select that costs as much as a product."""
    below_zero = -torch.finfo(s.dtype).smallest_normal
    return torch.ops.aten.threshold_backward.grad_input(x, s, below_zero, grad_input=x)


def _keep_positive(x: Tensor, s: Tensor) -> Tensor:
    """``x`` where ``s > 0``, else 0, in place."""
    return torch.ops.aten.threshold_backward.grad_input(x, s, 0, grad_input=x)


def forward(
    spec: TileSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mass: Tensor | None = None,
    largest: Tensor | None = None,
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
            shift = _Shift(norm, total, sink_rows)
            for j0, j1 in _ranges(*pattern.keys(i0, i1), bk):
                span = (i0, i1, j0, j1)
                s = buffers.get("s", chunk.n, rows, j1 - j0)
                keep = _scores(spec, chunk, s, q, k[:, j0:j1], mask, pattern, span)
                if top is not None:
                    top = torch.maximum(top, _largest(s, keep, chunk, i1 - i0, norm))
                if spec.exponential:
                    rowmax = s.amax(-1, keepdim=True)
                    factor = shift.update(rowmax)
                    if factor is not None:
                        for carried in (total, kept_total, numerator):
                            carried.mul_(factor)
                    if _nothing_kept(norm, rowmax):
                        # Exact skip: no entry reaches the numerator, so V is not read.
                        if norm.absolute_denominator:
                            total -= shift.expm1(s).sum(-1, keepdim=True)
                        continue
                s, denominator = _numerators(norm, shift, s, buffers)
                kept = s.sum(-1, keepdim=True)
                kept_total += kept
                total += kept if denominator is None else denominator(kept)
                if spec.dropout_p:
                    s.mul_(_dropout(spec, s, chunk, span))
                _add_product(numerator, s, v[:, j0:j1])
            if norm.constant == 1:
                total += torch.exp2(-shift.value) if spec.exponential else 1.0
            elif sink_rows is not None:
                total += torch.exp2(sink_rows - shift.value)
            if spec.eps:  # relative to the final m of the mathematics, not to the one in use
                total += spec.eps * (torch.exp2(shift.final - shift.value) if spec.exponential else 1.0)
            inverse = torch.where(total == 0, 0.0, 1.0 / torch.where(total == 0, 1.0, total))
            shape = (_width(chunk), -1, chunk.groups, i1 - i0)
            chunk.rows(out, i0, i1).copy_(numerator.mul_(inverse).view(*shape, v.shape[-1]))
            chunk.rows(lse, i0, i1).copy_((shift.value * unit + torch.log(total)).view(shape))
            if mass is not None:
                chunk.rows(mass, i0, i1).copy_((kept_total * inverse).view(shape))
            if largest is not None and top is not None:
                chunk.rows(largest, i0, i1).copy_((top * unit).view(shape))
        del k, v  # before the next chunk makes its own


def _numerators(
    norm: Normalizer, shift: _Shift, s: Tensor, buffers: _Buffers
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """``f`` of a tile (may overwrite ``s``), and the row sum of ``g`` from that of ``f`` if they differ."""
    if norm.base == "linear":
        absolute = torch.linalg.vector_norm(s, 1, -1, keepdim=True)
        return s, lambda kept: absolute
    if norm.base == "expm1":
        p = shift.expm1(s)
        signed = p.sum(-1, keepdim=True)
        p.clamp_(min=0)
        return p, (lambda kept: 2.0 * kept - signed) if norm.absolute_denominator else None
    if norm.rectify == "none":
        return shift.exp(s), None
    p = buffers.get("p", *s.shape).copy_(s)
    return _keep_nonnegative(shift.exp(p), s), None


def backward(
    spec: TileSpec,
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
) -> None:
    """Gradients into preallocated tensors: ``dquery``, ``dkey``, ``dvalue`` written; ``dmask``, ``dsink`` added to.

    Recomputes the scores; ``E = e^{s - lse}`` is then the derivative of ``e^s / l`` and with ``D = do . o``

        dv_j += f_j / l do        ds_j = E_j ([kept] dp_j - sign(s_j) D)        dsink = -D e^{sink - lse}

    Shapes as in :func:`forward`; ``grad_out`` as ``out``; ``dmask`` as ``mask`` (additive) in the dtype of ``lse``.
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
            row_lse = chunk.rows(lse, i0, i1).reshape(chunk.n, rows, 1)
            # An empty row (denominator 0) has lse = -inf; with +inf all its exponentials are 0.
            row_lse = torch.where(row_lse == -math.inf, math.inf, row_lse)
            if spec.exponential:
                row_lse = row_lse * LOG2E
            if dsink is not None and sink is not None:
                grad = -delta * torch.exp2(_sink_rows(chunk, sink.to(dtype), i1 - i0) - row_lse)
                heads = slice(chunk.heads.start * chunk.groups, chunk.heads.stop * chunk.groups)
                dsink[heads] += grad.view(_width(chunk), -1, chunk.groups, i1 - i0).sum((0, 3)).flatten()
            inverse = torch.exp2(-row_lse) if spec.exponential else torch.exp(-row_lse)
            exact = norm.base == "expm1" and float(row_lse.min()) < CANCELLATION_SAFE
            dq = torch.zeros_like(q)
            for j0, j1 in _ranges(*pattern.keys(i0, i1), bk):
                span = (i0, i1, j0, j1)
                shape = (chunk.n, rows, j1 - j0)
                s, e = buffers.get("s", *shape), buffers.get("e", *shape)
                slope = buffers.get("slope", *shape) if spec.softcap else None
                keep = _scores(spec, chunk, s, q, k[:, j0:j1], mask, pattern, span, slope)
                if keep is not None:
                    keep = keep.expand(_width(chunk), chunk.n // _width(chunk), chunk.groups, i1 - i0, j1 - j0)
                skip = _nothing_kept(norm, s)
                if skip and not (norm.absolute_denominator and norm.negative_gradient):
                    continue  # neither V nor dS: all five products are zero
                drop = _dropout(spec, s, chunk, span) if spec.dropout_p else None
                if spec.exponential:
                    torch.sub(s, row_lse, out=e).exp2_()
                else:
                    e.copy_(inverse.expand_as(e))
                if keep is not None and norm.neutral == 0.0:
                    e.view(keep.shape).mul_(keep)
                if skip:
                    ds = e.mul_(delta)
                else:
                    p = buffers.get("p", *shape)
                    _weights(norm, s, e, p, inverse, row_lse, exact)
                    if drop is not None:
                        p.mul_(drop)
                    _add_product(dv[:, j0:j1], p.transpose(1, 2), do_low)
                    dp = torch.bmm(do, v[:, j0:j1].transpose(1, 2), out=p)
                    if drop is not None:
                        dp.mul_(drop)
                    ds = _score_gradient(norm, s, e, dp, delta)
                if dmask is not None:
                    part = chunk.mask(dmask, i0, i1, j0, j1)
                    part += ds.view(_width(chunk), -1, chunk.groups, i1 - i0, j1 - j0).sum_to_size(part.shape)
                if slope is not None:
                    ds.mul_(slope)
                ds = ds.to(low)
                _add_product(dq, ds, k_low[:, j0:j1])
                _add_product(dk[:, j0:j1], ds.transpose(1, 2), q_low)
            rows_of_dq = chunk.rows(dquery, i0, i1)
            rows_of_dq.copy_(dq.mul_(spec.scale).view(rows_of_dq.shape))
        chunk.store(dkey, dk.mul_(spec.scale))
        chunk.store(dvalue, dv)
        del k, v, k_low, dk, dv  # before the next chunk makes its own


def _weights(norm: Normalizer, s: Tensor, e: Tensor, p: Tensor, inverse: Tensor, row_lse: Tensor, exact: bool) -> None:
    """``f(s) / l`` of a tile into ``p``."""
    if norm.base == "linear":
        torch.mul(s, e, out=p)
    elif norm.base == "exp":
        p.copy_(e)
        if norm.rectify == "nonnegative":
            _keep_nonnegative(p, s)
    elif exact:
        # e^{s - lse} (1 - e^{-s}) for s > 0: no cancellation, and no overflow where e^s - 1 would
        torch.mul(s, -LN2, out=p).expm1_().neg_().mul_(e).clamp_(min=0)
        _keep_positive(p, s)
    else:
        torch.sub(e, inverse, out=p).clamp_(min=0)


def _score_gradient(norm: Normalizer, s: Tensor, e: Tensor, dp: Tensor, delta: Tensor) -> Tensor:
    """``ds`` of a tile from ``dp`` (overwritten). ``step(0) = 0`` and ``sign(0) = +1``, as in paper eq. (7)."""
    if not norm.absolute_denominator:
        dp.sub_(delta)
        if norm.rectify == "positive":
            _keep_positive(dp, s)
        elif norm.rectify == "nonnegative":
            _keep_nonnegative(dp, s)
        return dp.mul_(e)
    if not norm.negative_gradient:
        return _keep_positive(dp.sub_(delta), s).mul_(e)
    if norm.rectify == "positive":
        _keep_positive(dp, s)
    dp.mul_(e)
    return dp.addcmul_(e.copysign_(s), delta, value=-1.0)
