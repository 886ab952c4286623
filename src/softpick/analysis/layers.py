"""What is accumulated of one layer: of its attention for some heads of one sample after others, and of its hidden states."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softpick.analysis import records
from softpick.analysis.records import (
    MASSIVE_RATIO,
    MASSIVE_VALUE,
    MAX_LISTED,
    MIN_SINK_QUERIES,
    OUTLIER_VALUE,
    SINK_THRESHOLDS,
    TILES,
    HeadSum,
    HiddenSum,
    Rows,
)
from softpick.analysis.streams import FloatHistogram, Moments, sum64

__all__ = ["KEY_SUMS", "AttentionLayer", "HiddenLayer", "NotFiniteError"]

BLOCK_ENTRIES = 1 << 20  # weights that are worked on at once: what the caches of a processor hold
DEVICE_BLOCK_ENTRIES = 1 << 26  # on a GPU, where a block must outlast the start of some hundred kernels
HISTOGRAM_BINS = 20

KEY_SUMS = (
    "count",
    "alpha",
    "alpha_normalized",
    *(f"rate_{e}" for e in SINK_THRESHOLDS),
    *(f"rate_normalized_{e}" for e in SINK_THRESHOLDS),
    "strongest",
)
"""What is summed for every key position and token, over samples, layers and heads; a row of a tensor each."""


def _coarsen(x: Tensor, rows: int, columns: int) -> Tensor:
    """Whether a block of ``rows x columns`` of a boolean ``(H, M, N)`` holds a True; incomplete blocks are left out."""
    h, m, n = x.shape[0], x.shape[1] // rows, x.shape[2] // columns
    blocks = x[:, : m * rows, : n * columns].reshape(h, m, rows, n, columns)
    return blocks.any(4).any(2)


class NotFiniteError(ValueError):
    """NaN or infinity among the weights."""


class AttentionLayer:
    """Sums over samples for one layer; tensors are ``(H,)``, fp64, on the CPU. Heads may come in several pieces."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.samples = 0
        self.last_samples = 0  # samples whose last token enough queries see
        self.sums: dict[str, Tensor] = {}
        self.tiles = {tile: 0 for tile in TILES}
        self.max_weight = torch.zeros(heads, dtype=torch.float64)
        self.max_score: float | None = None
        self.contexts: dict[int, dict[str, Any]] = {}

    def add(self, name: str, value: Tensor, heads: slice) -> None:
        """Add ``value (h,)`` to the sum of that name of some heads."""
        into = self.sums.setdefault(name, torch.zeros(self.heads, dtype=torch.float64))
        into[heads] += value.double().cpu()

    def update(self, a: Tensor, o: Tensor, visible: Tensor, first_head: int) -> Tensor:
        """Some heads of one sample: ``a (h, T, Tk)`` and ``o (h, T, Dv)`` fp32, ``visible (T, Tk)`` boolean.

        Worked on in blocks of rows that stay in the processor's cache (large temporaries would take most of the time),
        and in larger ones on a GPU.

        Returns:
            ``(len(KEY_SUMS), Tk)`` fp64: what these heads add to the sums of every key.
        """
        h, t, tk = a.shape
        at = slice(first_head, first_head + h)
        if first_head == 0:  # what the heads of a sample share
            self.samples += 1
        # by key: sum of weights, sum of shares of row mass, rows with mass that see it
        columns = torch.zeros(3, h, tk, dtype=torch.float64)
        tallest = TILES[-1][0]
        entries = BLOCK_ENTRIES if a.device.type == "cpu" else DEVICE_BLOCK_ENTRIES
        step = max(1, entries // (h * tk * tallest)) * tallest
        for start in range(0, t, step):
            rows = slice(start, start + step)
            columns += self._rows(a[:, rows], o[:, rows], visible[rows], at)
        return self._sinks(columns, visible.count_nonzero(0).cpu(), at)

    def _rows(self, a: Tensor, o: Tensor, visible: Tensor, at: slice) -> Tensor:
        """Some rows of some heads: ``a (h, M, Tk)``, ``o (h, M, Dv)``, ``visible (M, Tk)``; their part of the sums by key."""
        a = torch.where(visible, a, 0.0)
        seen = visible.any(1)
        magnitude = a.abs()  # signed weights (linear softpick) share their mass by magnitude; for all others this is a
        total = magnitude.sum(2, keepdim=True)
        if not bool(torch.isfinite(total).all()):
            raise NotFiniteError
        live = total > 0
        share = torch.where(live, magnitude / torch.where(live, total, 1.0), 0.0)
        live = live[..., 0]
        mass = sum64(a, 2)
        largest = torch.where(seen, a.masked_fill(~visible, -math.inf).amax(2), 0.0)
        rows = Rows(a, magnitude, share, o, visible, seen, live, mass, largest)
        for metric in records.METRICS:
            if isinstance(metric.accumulate, HeadSum):
                self.add(metric.key, metric.accumulate.sum(rows), at)
        heads = a.shape[0]
        for name, count in (
            ("rows", seen.sum()),
            ("tokens", torch.tensor(o.shape[1])),
            ("visible", visible.count_nonzero()),
            ("first_seen", visible[:, 0].sum()),
        ):
            self.add(f"per {name}", count.expand(heads), at)
        self.add("per live_rows", sum64(live & seen, 1), at)
        self.max_weight[at] = torch.maximum(self.max_weight[at], magnitude.amax((1, 2)).double().cpu())
        self._tiles(a != 0, visible[None], at)
        self._contexts(mass, largest, visible.sum(1))
        return torch.stack([sum64(a, 1), sum64(share, 1), (live.float() @ visible.float()).double().cpu()])

    def _sinks(self, columns: Tensor, queries: Tensor, at: slice) -> Tensor:
        """Sinks from the sums by key ``(3, h, Tk)``, and ``queries (Tk,)`` that see each key."""
        weights, shares, live_queries = columns
        alpha = weights / queries.double().clamp(min=1)
        alpha_n = shares / live_queries.clamp(min=1)
        enough = queries >= min(MIN_SINK_QUERIES, int(queries.max()))
        enough_n = live_queries >= live_queries.amax(1, keepdim=True).clamp(max=MIN_SINK_QUERIES)
        best, where = alpha.masked_fill(~enough, -math.inf).max(1)
        best_n = alpha_n.masked_fill(~(enough_n & enough), -math.inf).amax(1).clamp(min=0)
        named = {"first": (alpha[:, 0], alpha_n[:, 0]), "strongest": (best, best_n)}
        if enough[-1]:  # not in causal maps, where few queries see the last token
            named["last"] = alpha[:, -1], alpha_n[:, -1]
            self.last_samples += at.start == 0
        for name, (plain, normalized) in named.items():
            for suffix, value in (("", plain), ("_normalized", normalized)):
                self.add(f"alpha_{name}{suffix}", value, at)
                for e in SINK_THRESHOLDS:
                    self.add(f"sink_{name}{suffix}_{e}", (value > e).double(), at)
        self.add("strongest_is_first", ((where == 0) & (best > 0)).double(), at)

        strongest = torch.bincount(where[best > 0], minlength=alpha.shape[1]).double()
        over = [(x > e).double().sum(0) for x in (alpha, alpha_n) for e in SINK_THRESHOLDS]
        count = torch.full_like(strongest, alpha.shape[0])
        return torch.stack([count, alpha.sum(0), alpha_n.sum(0), *over, strongest]) * enough

    def _tiles(self, nonzero: Tensor, visible: Tensor, at: slice) -> None:
        size = (1, 1)
        for tile in TILES:
            rows, columns = tile[0] // size[0], tile[1] // size[1]
            nonzero, visible, size = _coarsen(nonzero, rows, columns), _coarsen(visible, rows, columns), tile
            if at.start == 0:
                self.tiles[tile] += int(visible.sum())
            self.add(f"tile_{tile[0]}x{tile[1]}", sum64(visible & ~nonzero, (1, 2)), at)

    def _contexts(self, mass: Tensor, largest: Tensor, keys: Tensor) -> None:
        """Row mass and largest weight by the number of visible keys, in buckets [2^b, 2^(b+1))."""
        keys = keys.cpu()
        mass, largest = mass.double().cpu(), largest.double().cpu()
        for b in sorted({int(k).bit_length() - 1 for k in keys.unique().tolist() if k > 0}):
            rows = (keys >= 2**b) & (keys < 2 ** (b + 1))
            bucket = self.contexts.setdefault(b, {"rows": 0, "mass": 0.0, "largest": 0.0, "mass_h": 0, "largest_h": 0})
            bucket["rows"] += int(rows.sum()) * mass.shape[0]
            for name, x in (("mass", mass[:, rows]), ("largest", largest[:, rows])):
                bucket[name] += x.sum().item()
                bins = (x.flatten() * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
                bucket[f"{name}_h"] = bucket[f"{name}_h"] + torch.bincount(bins, minlength=HISTOGRAM_BINS)


class HiddenLayer:
    """Statistics of the residual stream after one layer."""

    def __init__(self, channels: int) -> None:
        self.moments = Moments()
        self.histogram = FloatHistogram()
        self.outliers = torch.zeros(channels, dtype=torch.int64)
        self.top: list[dict[str, Any]] = []
        self.massive: list[dict[str, Any]] = []
        self.massive_count = 0
        self.sums: dict[str, float] = {}  # of metrics that are sums over entries or tokens
        self.entries = 0
        self.tokens = 0

    # ---------------------------------------------------------------------------------------------------------------------
    # Everything

    def update(self, layer: int, sample: int, x: Tensor, tokens: Tensor | None) -> None:
        """One sample's ``x (T, C)`` fp32 after a layer, and its token ids ``(T,)`` if they are known."""
        for metric in records.METRICS:
            if isinstance(metric.accumulate, HiddenSum):
                self.sums[metric.key] = self.sums.get(metric.key, 0.0) + float(metric.accumulate.sum(x))
        self.entries += x.numel()
        self.tokens += x.shape[0]
        self.moments.update(x)
        self.histogram.update(x)
        magnitude = x.abs()
        self.outliers += (magnitude >= OUTLIER_VALUE).sum(0).cpu()
        flat = magnitude.flatten()

        def located(values: Tensor, indices: Tensor, **more: float) -> list[dict[str, Any]]:
            rows = []
            for size, index in zip(values.tolist(), indices.tolist(), strict=True):
                position, channel = divmod(index, x.shape[1])
                token = None if tokens is None else int(tokens[position])
                place = {"layer": layer, "sample": sample, "position": position, "token_id": token, "channel": channel}
                row = {"value": x[position, channel].item(), **place}
                rows.append(row | {name: size / v for name, v in more.items()})
            return rows

        top = flat.topk(min(3, flat.numel()))
        self.top = sorted(self.top + located(top.values, top.indices), key=lambda r: -abs(r["value"]))[:3]
        if top.values[0] > MASSIVE_VALUE:
            ordered = flat.sort().values
            median = (ordered[(flat.numel() - 1) // 2].item() + ordered[flat.numel() // 2].item()) / 2
            massive = (flat > MASSIVE_VALUE) & (flat >= MASSIVE_RATIO * median)
            count = int(massive.sum())
            self.massive_count += count
            if count:
                largest = torch.where(massive, flat, 0.0).topk(min(count, MAX_LISTED))
                ratio = {"times_median": median} if median > 0 else {}
                found = located(largest.values, largest.indices, **ratio)
                self.massive = sorted(self.massive + found, key=lambda r: -abs(r["value"]))[:MAX_LISTED]
