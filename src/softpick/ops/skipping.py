"""Which blocks of a cache decoding leaves unread, decided by the bounds of their keys alone (``key_bounds.py``).

A block all of whose scores are at most 0 adds nothing to a rectified numerator, and to the denominator a sum that its bounds
enclose. Where the enclosures of all such blocks together are narrow enough, the middle of each stands for its sum. The proof
is in docs/mathematics.md; everything here is torch operations without a wait for the device, for every backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softpick.normalizers import NORMALIZERS, Normalizer
from softpick.ops.arguments import no_autocast
from softpick.ops.key_bounds import KeyBounds, product_error, rounding

__all__ = ["Plan", "check_rectified", "plan_blocks"]

BUDGET = 1 - 2.0**-10
"""Of the allowed error, what is spent: the rest is for rounding in the sums that spend it."""


class Plan(NamedTuple):
    """What of a cache a call reads."""

    keys: Tensor
    """``(B, Hkv, blocks)`` boolean: blocks whose keys are read."""
    values: Tensor
    """Likewise: blocks of these some of whose weights may not be 0."""
    visible: Tensor
    """``(B, 1, blocks)`` boolean: blocks with a key that some query sees."""
    rest: Tensor
    """``(B, H, Tq)`` in fp32 (fp64 for fp64): what stands for the blocks that are not read in the denominator."""
    doubt: Tensor
    """As ``rest``: what their sum may differ from it by, at most; 0 for a row whose output is 0 whatever it is."""
    block_size: int
    """Keys of a block."""

    def error(self, lse: Tensor) -> Tensor:
        """``(B, H, Tq)``: the bound of the relative error, from ``lse`` with ``rest`` in it."""
        tiny = torch.finfo(self.doubt.dtype).tiny
        return torch.where(self.doubt > 0, (self.doubt * torch.exp(-lse) * (1 + 2.0**-14)).clamp(min=tiny), 0.0)

    @property
    def listed(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """What the operator for decoding takes: the blocks that are read before others, how many, ``rest``, keys of a block."""
        order = self.keys.int().argsort(dim=-1, descending=True, stable=True).int()
        return order, self.keys.sum(-1, dtype=torch.int32), self.rest, self.block_size

    def counts(self) -> Tensor:
        """``(B, Hkv, 3)`` int32: visible blocks, those whose keys are read, and those whose values are."""
        visible = self.visible.expand(self.keys.shape)
        return torch.stack([x.sum(-1, dtype=torch.int32) for x in (visible, self.keys, self.values)], -1)


def check_rectified(norm: Normalizer) -> None:
    """Raise for a normalizer without exact zeros, for which no bound of the scores saves a value."""
    if not norm.sparse:
        names = ", ".join(repr(name) for name, record in NORMALIZERS.items() if record.sparse)
        raise ValueError(
            f"key_bounds: expected a normalizer with a rectified numerator ({names}), whose weights are 0 where scores are "
            f"below 0; got {norm.name!r}"
        )


class _Enclosure(NamedTuple):
    """Of the scores of a block's keys, for each row of queries ``(B, Hkv, rows, blocks)``: natural units, after the softcap."""

    low: Tensor
    high: Tensor
    """No score is outside, as computed by any backend."""
    mean_low: Tensor
    mean_high: Tensor
    """Nor their mean (before the softcap, which these have, too)."""
    variance: Tensor
    """At most that (before the softcap)."""
    weight: Tensor
    """``(B, Hkv, 1, blocks)``: of ``high`` in the distribution between ``low`` and ``high`` with their mean, at most."""


def plan_blocks(
    norm: Normalizer,
    query: Tensor,
    bounds: KeyBounds,
    lengths: Tensor | None,
    table: Tensor | None,
    room: int,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    max_error: float,
    lse_wanted: bool,
) -> Plan:
    """Choose the blocks that are read.

    Args:
        norm: with a rectified numerator.
        query: ``(B, H, Tq, D)``.
        bounds: of the cache's keys.
        lengths: ``(B,)``: how many positions are filled; None for all.
        table: ``(B, max_blocks)``: the pages of each sequence; None for a cache that is no pages.
        room: positions of a sequence.
        left: keys before a query's own position, -1 for all.
        right: keys after it, -1 for all.
        scale: factor on the scores.
        softcap: None or the cap.
        max_error: of the denominator, relative.
        lse_wanted: whether the denominator of a row whose output is 0 counts.
    """
    with no_autocast(query):
        (b, heads, tq, width), kv_heads = query.shape, bounds.mean.shape[1]
        q = query.reshape(b, kv_heads, heads // max(1, kv_heads) * tq, width)
        seen, covered, whole, bounds = _visible(bounds, lengths, table, room, tq, left, right)
        groups = heads // max(1, kv_heads)
        seen, whole = (x.repeat(1, groups, 1)[:, None] for x in (seen, whole))  # (B, 1, rows, blocks)
        around = _enclosure(q, bounds, scale, softcap)
        dead = around.high <= 0 if norm.rectify == "positive" else around.high < 0
        covered = covered[:, None, None]
        dead = dead & covered
        least, most = _denominators(norm, around, dead, whole, seen * covered, softcap)
        doubt, middle = (most - least) / 2, (most + least) / 2
        unit, _ = rounding(middle.dtype)
        doubt = torch.where(middle > 0, doubt + 4 * unit * middle, doubt)  # of expm1
        return _choose(doubt, middle, least, dead, seen, query.shape, max_error, lse_wanted, bounds.block_size)


def _choose(
    doubt: Tensor,
    middle: Tensor,
    least: Tensor,
    dead: Tensor,
    seen: Tensor,
    shape: torch.Size,
    max_error: float,
    lse_wanted: bool,
    block_size: int,
) -> Plan:
    """The blocks with the smallest doubts that together leave the error of no row above ``max_error``."""
    unseen = seen == 0
    idle = dead | unseen  # (B, Hkv, rows, blocks): nothing for the numerator of the row
    budget = max_error * BUDGET * torch.where(unseen, 0.0, least).sum(-1, keepdim=True)
    if not lse_wanted:
        budget = torch.where(idle.all(-1, keepdim=True), torch.inf, budget)
    doubt, middle = (torch.where(unseen, 0.0, x) for x in (doubt, middle))
    cost = torch.where(doubt == 0, 0.0, doubt / budget).amax(2)  # (B, Hkv, blocks), of the row that minds most
    skippable = idle.all(2) & (cost <= 1)  # not where it is NaN
    cost, order = torch.where(skippable, cost, torch.inf).sort(-1)
    skipped = torch.zeros_like(skippable).scatter(-1, order, cost.cumsum(-1) <= 1)
    visible = (~unseen).any(2)
    left_out = (skipped & visible)[:, :, None]
    rest, loss = (torch.where(left_out, x, 0.0).sum(-1).reshape(shape[:-1]) for x in (middle, doubt))
    if not lse_wanted:
        loss = torch.where(idle.all(-1).reshape(shape[:-1]), 0.0, loss)
    keys = visible & ~skipped
    return Plan(keys, keys & ~idle.all(2), visible, rest, loss, block_size)


def _visible(
    bounds: KeyBounds, lengths: Tensor | None, table: Tensor | None, room: int, tq: int, left: int, right: int
) -> tuple[Tensor, Tensor, Tensor, KeyBounds]:
    """How many keys of a block each query sees ``(B, Tq, blocks)``; whether the bounds are of all of these ``(B, blocks)``;
    whether they are of these alone ``(B, Tq, blocks)``; and the bounds in the order of the sequences.
    """
    size, device = bounds.block_size, bounds.mean.device
    blocks, there = -(-room // size), None
    if table is not None:
        there = (table >= 0) & (table < bounds.mean.shape[0])
        pages, each = torch.where(there, table, 0).long(), bounds.filled.shape[1]
        there = there.repeat_interleave(each, 1)
        count = bounds.filled[pages].flatten(1)
        mean, radius, offset, spread, norm = (x[pages].transpose(1, 2).flatten(2, 3) for x in bounds[:5])
        bounds = KeyBounds(mean, radius, offset, spread, norm, count, size)
    start = torch.arange(blocks, device=device) * size
    filled = torch.full((1,), room, device=device) if lengths is None else lengths.clamp(max=room)
    filled = filled[:, None, None]  # (B or 1, 1, 1)
    own = filled - tq + torch.arange(tq, device=device)[:, None]  # position of a query
    high = (own + right + 1).clamp(max=filled) if right >= 0 else filled.expand_as(own)
    low = (own - left).clamp(min=0) if left >= 0 else torch.zeros_like(own)
    seen = (torch.minimum(high, start + size) - torch.maximum(low, start)).clamp(min=0)
    if there is not None:
        seen = seen * there[:, None]
    covered = bounds.filled >= (filled[..., 0] - start).clamp(0, size)
    whole = (seen == bounds.filled[:, None]) & covered[:, None]
    return seen.expand(whole.shape), covered, whole, bounds


def _enclosure(q: Tensor, bounds: KeyBounds, scale: float, softcap: float | None) -> _Enclosure:
    """Between which numbers the scores of ``(B, Hkv, rows, D)`` queries are; NaN or infinite where the bounds do not say."""
    dtype = bounds.radius.dtype
    unit, lost = rounding(dtype)
    width = q.shape[-1]
    q = q.to(dtype)
    longest = torch.linalg.vector_norm(q, dim=-1, keepdim=True) * (1 + (width + 16) * unit) + width**0.5 * lost
    longest = longest * abs(scale)
    at = (q @ bounds.mean.to(dtype).transpose(-2, -1)) * scale
    spread, offset = longest * bounds.radius[:, :, None], longest * bounds.offset[:, :, None]
    # of the products here and of those that compute scores: relative to the lengths of their factors, and by underflow
    loose = 2 * (width + 16) * unit + product_error(dtype)
    slack = loose * longest * (bounds.norm + bounds.offset)[:, :, None] + 2 * width * lost**2 * (1 + abs(scale))
    slack = slack + 4 * unit * (at.abs() + spread + offset)
    weight = torch.where(bounds.radius > bounds.offset, (1 + bounds.offset / bounds.radius) / 2, 1.0)[:, :, None]
    variance = (longest * bounds.spread[:, :, None] * (1 + 4 * unit)) ** 2 * (1 + 4 * unit) + width * lost**2
    ends = at - spread - slack, at + spread + slack, at - offset - slack, at + offset + slack
    if softcap is not None:
        bent = [softcap * torch.tanh(x / softcap) for x in ends]
        low, high, mean_low, mean_high = (
            x + sign * 8 * unit * x.abs() for x, sign in zip(bent, (-1, 1, -1, 1), strict=True)
        )
    else:
        low, high, mean_low, mean_high = ends
    return _Enclosure(low, high, mean_low, mean_high, variance, weight)


def _denominators(
    norm: Normalizer,
    around: _Enclosure,
    dead: Tensor,
    whole: Tensor,
    seen: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """At least and at most the sum of ``g`` over the keys of a block that a row sees; at most only of ``dead`` blocks.

    ``seen``: how many keys these are, of which there are bounds; ``whole``: whether they are all of which there are bounds.
    """
    zero = torch.zeros_like(around.high)
    if not norm.absolute_denominator or not norm.normalized:
        return zero, zero  # more could be said of other blocks, but there is no doubt to compare it with
    if norm.base != "expm1":
        return zero, zero + torch.inf
    low, high, mean = (torch.expm1(x) for x in (around.low, around.high, around.mean_low))
    # e^s - 1 is convex: its mean is at least that of the mean, and at most the chord's there
    chord = around.weight * high + (1 - around.weight) * low
    if softcap is None:  # or what the second derivative allows, where the variance is small
        excess = _excess(around.mean_high, around.high - around.mean_low)
        chord = torch.fmin(chord, torch.expm1(around.mean_high) + around.variance * excess)
    least = -torch.where(whole, chord, high)
    most = -torch.where(whole, mean, low)
    positive = low if softcap is not None else torch.where(whole, torch.maximum(low, mean), low)
    least = torch.where(dead, least, positive).nan_to_num(0.0).clamp(min=0.0)
    return seen * least, seen * torch.where(dead, most, 0.0)


def _excess(mean: Tensor, x: Tensor) -> Tensor:
    """At least ``e^mean (e^x - 1 - x) / x^2``, for ``x >= 0``."""
    unit, _ = rounding(x.dtype)
    of_mean = torch.exp(mean)
    series = of_mean * (0.5 + x / 6 + x * x / (24 - 4.8 * x.clamp(max=1.0)))
    return torch.where(x < 1, series, (torch.exp(mean + x) - of_mean * (1 + x)) / (x * x)) * (1 + 32 * unit)
