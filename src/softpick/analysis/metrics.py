"""The metrics of ``docs/metrics.md`` as streaming accumulators: torch only, one layer of one batch at a time.

A :class:`Meter` is fed a batch in this order, and never keeps a map or a hidden state:

    meter = Meter()
    meter.begin_batch(valid, input_ids)                     # which positions are real
    meter.attention(layer, weights, outputs, visible)       # for every layer
    meter.hidden(layer, hidden)                             # for every layer
    measurements = meter.result()

Rows are worked on in blocks of about ``BLOCK_ENTRIES`` weights, so that temporaries are small, whatever ``T``.

Samples are cut to their real positions before anything is computed, so padding (left, right or in between) enters no
metric. Sums are fp64; moments of different batches are combined exactly, so the result does not depend on how the data
was divided into batches (other than by rounding).

Shapes: ``B`` samples, ``T`` positions, ``H`` heads, ``L`` layers, ``C`` channels, ``Dv`` head dimension of the values.
All shares are percent; weights (``alpha``, ``row_mass``) are plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_ENTRIES", "SINK_THRESHOLDS", "TILES", "FloatHistogram", "Measurements", "Meter", "Moments"]

SINK_THRESHOLDS = (0.2, 0.3)
"""A head is a sink in a sample when its alpha exceeds this (Gu et al. 2024 use 0.3, the softpick paper 0.3 and 0.2)."""

TILES = ((1, 16), (1, 64), (16, 64), (64, 64), (128, 128))
"""Tile shapes (queries, keys) of tile sparsity; each is a multiple of the one before."""

MIN_SINK_QUERIES = 16
"""The strongest token is sought among keys that this many queries (or the most there are) see: the last key of a causal
map is seen by one query only, whose own weight says nothing about a sink."""

TINY_WEIGHT = 1e-5
DEAD_OUTPUT = 1e-6
DEAD_TOKENS = 95.0
DORMANT_MASS = 0.9
MASSIVE_VALUE = 100.0
MASSIVE_RATIO = 1000.0
OUTLIER_VALUE = 6.0
OUTLIER_LAYERS = 25.0
OUTLIER_POSITIONS = 6.0
MAX_LISTED = 20
MAX_ENTRIES = 1 << 25
"""Weights that are in memory at once: 128 MB in fp32, two heads at ``T = 4096``; a few such temporaries make them."""

BLOCK_ENTRIES = 1 << 20  # weights that are worked on at once

_KEY_SUMS = (
    "count",
    "alpha",
    "alpha_normalized",
    *(f"rate_{e}" for e in SINK_THRESHOLDS),
    *(f"rate_normalized_{e}" for e in SINK_THRESHOLDS),
    "strongest",
)
"""What is summed for every key position and token, over samples, layers and heads; a row of a tensor each."""
HISTOGRAM_BINS = 20


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks


def _float64(x: Tensor) -> Tensor:
    """In fp64, on the CPU where the device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _sum(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum in fp64, on the CPU."""
    if x.device.type == "mps":
        x = x.cpu()
    return x.sum(dim=dim, dtype=torch.float64).cpu()


class Moments:
    """Count, mean, second to fourth central moment, minimum and maximum of a stream of numbers, in fp64.

    Batches are combined by the pairwise formulas of Pébay (2008), which do not cancel as raw power sums do.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.m2 = self.m3 = self.m4 = 0.0
        self.min, self.max = math.inf, -math.inf

    def update(self, x: Tensor) -> None:
        """Add all entries of ``x`` (any shape)."""
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x)
        x = _float64(x)
        other = Moments()
        other.n = x.numel()
        other.mean = x.mean().item()
        x = x - other.mean
        square = x * x
        other.m2, other.m3, other.m4 = square.sum().item(), (square * x).sum().item(), (square * square).sum().item()
        other.min, other.max = low.item(), high.item()
        self.merge(other)

    def merge(self, other: Moments) -> None:
        """Add what another accumulator has seen."""
        if other.n == 0:
            return
        na, nb = float(self.n), float(other.n)
        n, d = na + nb, other.mean - self.mean
        m4 = d**4 * na * nb * (na * na - na * nb + nb * nb) / n**3
        m4 += 6 * d * d * (na * na * other.m2 + nb * nb * self.m2) / n**2 + 4 * d * (na * other.m3 - nb * self.m3) / n
        m3 = d**3 * na * nb * (na - nb) / n**2 + 3 * d * (na * other.m2 - nb * self.m2) / n
        self.m4 += other.m4 + m4
        self.m3 += other.m3 + m3
        self.m2 += other.m2 + d * d * na * nb / n
        self.mean += d * nb / n
        self.n += other.n
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)

    @property
    def variance(self) -> float | None:
        """Population variance ``mu2``, or None without data."""
        return self.m2 / self.n if self.n else None

    @property
    def kurtosis(self) -> float | None:
        """``mu4 / sigma^4`` (a Gaussian has 3), or None where the variance is zero."""
        return self.n * self.m4 / (self.m2 * self.m2) if self.m2 > 0 else None


class FloatHistogram:
    """A histogram over all fp32 numbers in 2^18 buckets, from which quantiles of a stream are read.

    A bucket is the leading 18 bits of the number (sign, exponent, 9 bits of mantissa), so its middle is within 0.1 % of
    every number in it, at any magnitude, without knowing the range in advance. Counts are exact and order-independent.
    """

    SHIFT = 14  # of 32 bits
    HALF = 1 << 17

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * self.HALF, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Add all entries of ``x`` (any shape)."""
        bits = x.detach().float().contiguous().view(torch.int32).flatten()
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, in the order of the numbers
        self.counts += torch.bincount((ordered >> self.SHIFT) + self.HALF, minlength=2 * self.HALF).cpu()

    def magnitudes(self) -> FloatHistogram:
        """The histogram of the absolute values."""
        result = FloatHistogram()
        result.counts[self.HALF :] = self.counts[self.HALF :] + self.counts[: self.HALF].flip(0)
        return result

    def values(self, buckets: Tensor) -> Tensor:
        """The middle of each bucket, fp64."""
        ordered = ((buckets - self.HALF) << self.SHIFT) + (1 << (self.SHIFT - 1))
        ordered = ordered.to(torch.int32)
        bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        return bits.view(torch.float32).double()

    def quantiles(self, probabilities: list[float]) -> list[float]:
        """Quantiles, linear between order statistics (numpy's default)."""
        total = self.counts.cumsum(0)
        n = int(total[-1])
        if n == 0:
            raise ValueError("quantiles: no data")
        ranks = torch.tensor(probabilities, dtype=torch.float64) * (n - 1)
        low, high = (
            self.values(torch.searchsorted(total, r.long(), right=True)) for r in (ranks.floor(), ranks.ceil())
        )
        return (low + (high - low) * (ranks - ranks.floor())).tolist()

    def box(self, low: float, high: float) -> dict[str, float]:
        """Box-plot numbers of data whose exact extremes are ``low`` and ``high``; whiskers end at the last datum within
        1.5 interquartile ranges of the box (Tukey).
        """
        q1, median, q3 = (min(max(q, low), high) for q in self.quantiles([0.25, 0.5, 0.75]))
        filled = self.values(self.counts.nonzero().flatten())
        reach = 1.5 * (q3 - q1)
        inside = filled[(filled >= q1 - reach) & (filled <= q3 + reach)]
        whiskers = (float(inside.min()), float(inside.max())) if inside.numel() else (q1, q3)
        lower, upper = min(max(whiskers[0], low), q1), max(min(whiskers[1], high), q3)
        return {
            "min": low,
            "whisker_low": lower,
            "q1": q1,
            "median": median,
            "q3": q3,
            "whisker_high": upper,
            "max": high,
        }


def _coarsen(x: Tensor, rows: int, columns: int) -> Tensor:
    """Whether a block of ``rows x columns`` of a boolean ``(H, M, N)`` holds a True; incomplete blocks are left out."""
    h, m, n = x.shape[0], x.shape[1] // rows, x.shape[2] // columns
    blocks = x[:, : m * rows, : n * columns].reshape(h, m, rows, n, columns)
    return blocks.any(4).any(2)


# ---------------------------------------------------------------------------------------------------------------------
# One layer


class _NotFiniteError(ValueError):
    """NaN or infinity among the weights."""


class _AttentionLayer:
    """Sums over samples for one layer; tensors are ``(H,)``, fp64, on the CPU. Heads may come in several pieces."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.samples = 0
        self.rows = 0  # queries that see a key
        self.tokens = 0
        self.visible = 0  # visible entries of one head
        self.last_samples = 0  # samples whose last token enough queries see
        self.sums: dict[str, Tensor] = {}
        self.tiles = {tile: 0 for tile in TILES}
        self.max_weight = torch.zeros(heads, dtype=torch.float64)
        self.max_score: float | None = None
        self.contexts: dict[int, dict[str, Any]] = {}

    def add(self, name: str, value: Tensor, heads: slice) -> None:
        into = self.sums.setdefault(name, torch.zeros(self.heads, dtype=torch.float64))
        into[heads] += value.double().cpu()

    def update(self, a: Tensor, o: Tensor, visible: Tensor, first_head: int) -> Tensor:
        """Some heads of one sample: ``a (h, T, T)`` and ``o (h, T, Dv)`` fp32, ``visible (T, T)`` boolean.

        Worked on in blocks of rows that stay in the processor's cache: large temporaries would take most of the time.

        Returns:
            ``(len(_KEY_SUMS), T)`` fp64: what these heads add to the sums of every key.
        """
        h, t, _ = a.shape
        at = slice(first_head, first_head + h)
        if first_head == 0:  # what the heads of a sample share
            self.samples += 1
            self.rows += int(visible.any(1).sum())
            self.visible += int(visible.count_nonzero())
            self.tokens += o.shape[1]
        # by key: sum of weights, sum of shares of row mass, rows with mass that see it
        columns = torch.zeros(3, h, t, dtype=torch.float64)
        tallest = TILES[-1][0]
        step = max(1, BLOCK_ENTRIES // (h * t * tallest)) * tallest
        for start in range(0, t, step):
            columns += self._rows(a[:, start : start + step], visible[start : start + step], at)
        self.add("dead_tokens", _sum(o.abs().amax(2) <= DEAD_OUTPUT, 1), at)
        return self._sinks(columns, visible.count_nonzero(0).cpu(), at)

    def _rows(self, a: Tensor, visible: Tensor, at: slice) -> Tensor:
        """Some rows of some heads: ``a (h, M, T)``, ``visible (M, T)``; returns their part of the sums by key."""
        a = torch.where(visible, a, 0.0)
        seen = visible.any(1)
        magnitude = a.abs()  # signed weights (linear softpick) share their mass by magnitude; for all others this is a
        total = magnitude.sum(2, keepdim=True)
        if not bool(torch.isfinite(total).all()):
            raise _NotFiniteError
        live = total > 0
        share = torch.where(live, magnitude / torch.where(live, total, 1.0), 0.0)
        live = live[..., 0]
        mass = _sum(a, 2)
        largest = torch.where(seen, a.masked_fill(~visible, -math.inf).amax(2), 0.0)
        self.add("mass", _sum(mass * seen.cpu(), 1), at)
        self.add("zero_rows", _sum(~live & seen, 1), at)
        self.add("largest", _sum(largest * seen, 1), at)
        self.max_weight[at] = torch.maximum(self.max_weight[at], magnitude.amax((1, 2)).double().cpu())
        self.add("zeros", ((a == 0) & visible).count_nonzero((1, 2)), at)
        self.add("tiny", ((magnitude <= TINY_WEIGHT) & visible).count_nonzero((1, 2)), at)
        self.add("entropy", _sum(-torch.xlogy(share, share).sum(2), 1), at)
        self.add("live_rows", _sum(live & seen, 1), at)
        # dormant: nearly all of the mass of a row lies on the first token, among the queries that see it
        self.add("dormant_rows", _sum((share[:, :, 0] > DORMANT_MASS) & visible[:, 0], 1), at)
        self.add("dormant_seen", visible[:, 0].sum().double().expand(a.shape[0]), at)
        self._tiles(a != 0, visible[None], at)
        self._contexts(mass, largest, visible.sum(1))
        return torch.stack([_sum(a, 1), _sum(share, 1), (live.float() @ visible.float()).double().cpu()])

    def _sinks(self, columns: Tensor, queries: Tensor, at: slice) -> Tensor:
        """Sinks from the sums by key ``(3, h, T)``, and ``queries (T,)`` that see each key."""
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
            self.add(f"tile_{tile[0]}x{tile[1]}", _sum(visible & ~nonzero, (1, 2)), at)

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


class _HiddenLayer:
    """Statistics of the residual stream after one layer."""

    def __init__(self, channels: int) -> None:
        self.moments = Moments()
        self.histogram = FloatHistogram()
        self.outliers = torch.zeros(channels, dtype=torch.int64)
        self.top: list[dict[str, Any]] = []
        self.massive: list[dict[str, Any]] = []
        self.massive_count = 0


# ---------------------------------------------------------------------------------------------------------------------
# Everything


@dataclass(frozen=True)
class Measurements:
    """What was measured, as plain numbers, lists and dicts (``docs/metrics.md`` has the layout and every definition).

    Attributes:
        data: samples, tokens, layers, heads, sequence length, causality and how the samples start.
        sink: rates and alpha for the first, the last and the strongest token, for every position, and for the tokens that
            are strongest most often; plain and mass-normalised.
        rows: row mass, all-zero rows, entropy, largest weight; per context length.
        sparsity: exact zeros, tiny weights, empty tiles.
        heads: dead and dormant heads.
        hidden: residual-stream statistics, massive activations, outlier features.
    """

    data: dict[str, Any]
    sink: dict[str, Any]
    rows: dict[str, Any]
    sparsity: dict[str, Any]
    heads: dict[str, Any]
    hidden: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps(..., allow_nan=False)`` accepts."""
        return asdict(self)


class Meter:
    """Accumulates all metrics over batches; see the module's docstring for the order of calls.

    Args:
        bos_policy: how the samples start, in words, stated beside every sink figure.
        tokens: ids whose sink rates are listed in any case ([CLS], [SEP], BOS).
    """

    def __init__(self, bos_policy: str = "auto", tokens: Iterable[int] = ()) -> None:
        self.bos_policy = bos_policy
        self.tokens = list(dict.fromkeys(tokens))
        self._attention: dict[int, _AttentionLayer] = {}
        self._hidden: dict[int, _HiddenLayer] = {}
        self._lengths: list[int] = []
        self._first_tokens: dict[int, int] = {}
        self._causal: bool | None = None
        self._valid: list[Tensor] = []
        self._shape: tuple[int, int] | None = None
        self._tokens: Tensor | None = None
        self._before = 0  # samples of earlier batches
        self._by_position = torch.zeros(len(_KEY_SUMS), 0, dtype=torch.float64)
        self._by_token = torch.zeros(len(_KEY_SUMS), 0, dtype=torch.float64)
        self._strongest: list[int] = []  # of the samples of earlier batches
        self._alpha: list[Tensor] = []  # of this batch's samples, by position, summed over layers and heads

    def begin_batch(self, valid: Tensor, input_ids: Tensor | None = None) -> None:
        """Start a batch.

        Args:
            valid: ``(B, T)`` boolean, True at real positions. Samples without any are left out.
            input_ids: ``(B, T)`` integers, to name the tokens of large activations and the first token.
        """
        if valid.dim() != 2 or valid.dtype != torch.bool:
            raise TypeError(f"valid: expected a boolean (B, T), got {valid.dtype} {tuple(valid.shape)}")
        if input_ids is not None and input_ids.shape != valid.shape:
            raise ValueError(
                f"input_ids: expected the shape of valid {tuple(valid.shape)}, got {tuple(input_ids.shape)}"
            )
        self._strongest += [int(alpha.argmax()) for alpha in self._alpha]
        self._before = len(self._lengths)
        valid = valid.cpu()
        self._shape = (valid.shape[0], valid.shape[1])
        self._tokens = None if input_ids is None else input_ids.cpu()
        self._valid = [row.nonzero().flatten() for row in valid]
        for b, positions in enumerate(self._valid):
            if positions.numel():
                self._lengths.append(positions.numel())
                if self._tokens is not None:
                    token = int(self._tokens[b, positions[0]])
                    self._first_tokens[token] = self._first_tokens.get(token, 0) + 1
        self._alpha = [torch.zeros(p.numel(), dtype=torch.float64) for p in self._valid if p.numel()]

    def attention(
        self,
        layer: int,
        weights: Tensor,
        outputs: Tensor,
        visible: Tensor | None = None,
        *,
        causal: bool = True,
        max_score: float | None = None,
        first_sample: int = 0,
        first_head: int = 0,
        heads: int | None = None,
    ) -> None:
        """Add one layer's attention for the current batch, whole or, to save memory, some samples and heads at a time.

        Args:
            layer: from 0.
            weights: ``(b, h, T, T)``, after normalization, before dropout.
            outputs: ``(b, T, h, Dv)``, before the output projection.
            visible: ``(b or 1, 1, T, T)`` boolean, which keys a query may see besides the padding (which is known from
                ``begin_batch``); the default is the lower triangle, or everything where ``causal`` is False.
            causal: see ``visible``; also reported.
            max_score: the largest score of this layer, if it is known.
            first_sample: the sample of the batch that ``weights`` begins with.
            first_head: the head that it begins with. The heads of a sample come in order.
            heads: how many the layer has; by default as many as ``weights``.
        """
        if self._shape is None:
            raise RuntimeError("attention: call begin_batch first")
        batch, t = self._shape
        if weights.dim() != 4 or tuple(weights.shape[2:]) != (t, t) or first_sample + weights.shape[0] > batch:
            raise ValueError(f"weights: expected (B, H, T, T) with B={batch}, T={t}, got {tuple(weights.shape)}")
        b, h = weights.shape[:2]
        if heads is None and first_sample == 0 and b != batch:
            raise ValueError(f"weights: expected (B, H, T, T) with B={batch}, T={t}, got {tuple(weights.shape)}")
        heads = first_head + h if heads is None else heads
        if outputs.dim() != 4 or tuple(outputs.shape[:3]) != (b, t, h):
            raise ValueError(f"outputs: expected (B, T, H, Dv) with B={b}, T={t}, H={h}, got {tuple(outputs.shape)}")
        if visible is None:
            visible = torch.ones(t, t, dtype=torch.bool, device=weights.device)
            visible = (visible.tril() if causal else visible)[None, None]
        elif visible.dtype != torch.bool or visible.dim() != 4 or visible.shape[1] != 1:
            raise TypeError(
                f"visible: expected a boolean (B or 1, 1, T, T), got {visible.dtype} {tuple(visible.shape)}"
            )
        visible = visible.expand(b, 1, t, t)
        state = self._attention.setdefault(layer, _AttentionLayer(heads))
        if state.heads != heads:
            raise ValueError(f"weights: layer {layer} had {state.heads} heads before, now {heads}")
        self._causal = causal if self._causal is None else self._causal and causal
        piece = max(1, MAX_ENTRIES // (t * t))
        sample = sum(p.numel() > 0 for p in self._valid[:first_sample])  # among those with a real position
        for i in range(b):
            positions = self._valid[first_sample + i]
            if positions.numel() == 0:
                continue
            tokens = None if self._tokens is None else self._tokens[first_sample + i, positions]
            for head in range(0, h, piece):
                a = weights[i, head : head + piece].detach().float()
                o = outputs[i, :, head : head + piece].detach().float().transpose(0, 1)
                see = visible[i, 0]
                if positions.numel() < t:
                    at = positions.to(weights.device)
                    a, o, see = a[:, at][:, :, at], o[:, at], see[at][:, at]
                try:
                    if not bool(torch.isfinite(o.sum())):
                        raise _NotFiniteError
                    keys = state.update(a, o, see, first_head + head)
                except _NotFiniteError:
                    message = f"layer {layer}: attention weights or outputs contain NaN or infinity"
                    raise ValueError(message) from None
                self._add_keys(keys, sample, tokens)
            sample += 1
        if max_score is not None:
            state.max_score = max_score if state.max_score is None else max(state.max_score, max_score)

    def _add_keys(self, keys: Tensor, sample: int, tokens: Tensor | None) -> None:
        """``keys (len(_KEY_SUMS), T)`` of some heads of the batch's real sample number ``sample``."""

        def grown(sums: Tensor, size: int) -> Tensor:
            return torch.nn.functional.pad(sums, (0, max(0, size - sums.shape[1])))

        self._by_position = grown(self._by_position, keys.shape[1])
        self._by_position[:, : keys.shape[1]] += keys
        self._alpha[sample] += keys[_KEY_SUMS.index("alpha")]
        if tokens is not None:
            self._by_token = grown(self._by_token, int(tokens.max()) + 1)
            self._by_token.index_add_(1, tokens, keys)

    def hidden(self, layer: int, hidden: Tensor) -> None:
        """Add the residual stream ``(B, T, C)`` after one layer, for the current batch."""
        if self._shape is None:
            raise RuntimeError("hidden: call begin_batch first")
        if hidden.dim() != 3 or tuple(hidden.shape[:2]) != self._shape:
            raise ValueError(
                f"hidden: expected (B, T, C) with B={self._shape[0]}, T={self._shape[1]}, got {tuple(hidden.shape)}"
            )
        state = self._hidden.setdefault(layer, _HiddenLayer(hidden.shape[2]))
        sample = self._before
        for b, positions in enumerate(self._valid):
            if positions.numel() == 0:
                continue
            x = hidden[b].detach().float()
            if positions.numel() < x.shape[0]:
                x = x[positions.to(x.device)]
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"layer {layer}: the hidden states contain NaN or infinity")
            tokens = None if self._tokens is None else self._tokens[b, positions]
            self._hidden_sample(state, layer, sample, x, tokens)
            sample += 1

    @staticmethod
    def _hidden_sample(state: _HiddenLayer, layer: int, sample: int, x: Tensor, tokens: Tensor | None) -> None:
        state.moments.update(x)
        state.histogram.update(x)
        magnitude = x.abs()
        state.outliers += (magnitude >= OUTLIER_VALUE).sum(0).cpu()
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
        state.top = sorted(state.top + located(top.values, top.indices), key=lambda r: -abs(r["value"]))[:3]
        if top.values[0] > MASSIVE_VALUE:
            ordered = flat.sort().values
            median = (ordered[(flat.numel() - 1) // 2].item() + ordered[flat.numel() // 2].item()) / 2
            massive = (flat > MASSIVE_VALUE) & (flat >= MASSIVE_RATIO * median)
            count = int(massive.sum())
            state.massive_count += count
            if count:
                largest = torch.where(massive, flat, 0.0).topk(min(count, MAX_LISTED))
                ratio = {"times_median": median} if median > 0 else {}
                found = located(largest.values, largest.indices, **ratio)
                state.massive = sorted(state.massive + found, key=lambda r: -abs(r["value"]))[:MAX_LISTED]

    # -----------------------------------------------------------------------------------------------------------------

    def result(self) -> Measurements:
        """Everything measured so far.

        Raises:
            ValueError: when nothing was fed, or layers saw different numbers of samples.
        """
        n = len(self._lengths)
        if n == 0 or not self._attention:
            raise ValueError("no data: feed at least one batch with a real position")
        layers = [self._attention[i] for i in sorted(self._attention)]
        if any(layer.samples != n for layer in layers):
            raise ValueError(f"expected {n} samples in every layer, got {[layer.samples for layer in layers]}")
        return Measurements(
            data=self._data_result(layers),
            sink=self._sink_result(layers),
            rows=self._rows_result(layers),
            sparsity=self._sparsity_result(layers),
            heads=self._heads_result(layers),
            hidden=self._hidden_result() if self._hidden else {},
        )

    def _data_result(self, layers: list[_AttentionLayer]) -> dict[str, Any]:
        first: dict[str, Any] = {"policy": self.bos_policy, "first_token_id": None, "first_token_share": None}
        if self._first_tokens:
            token = max(self._first_tokens, key=lambda t: self._first_tokens[t])
            share = 100.0 * self._first_tokens[token] / sum(self._first_tokens.values())
            first.update(first_token_id=token, first_token_share=share)
        lengths = self._lengths
        return {
            "samples": len(lengths),
            "tokens": sum(lengths),
            "layers": len(layers),
            "heads": layers[0].heads,
            "sequence_length": {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
            "causal": self._causal,
            "bos": first,
        }

    def _sink_result(self, layers: list[_AttentionLayer]) -> dict[str, Any]:
        result: dict[str, Any] = {"thresholds": list(SINK_THRESHOLDS)}
        for token in ("first", "strongest", "last"):
            samples = [x.last_samples if token == "last" else x.samples for x in layers]
            if not any(samples):
                result[token] = None
                continue

            def tables(name: str, samples: list[int] = samples) -> list[Tensor]:
                zeros = [torch.zeros(x.heads, dtype=torch.float64) for x in layers]
                return [x.sums.get(name, z) / max(n, 1) for x, z, n in zip(layers, zeros, samples, strict=True)]

            part: dict[str, Any] = {}
            for suffix in ("", "_normalized"):
                rates = {str(e): tables(f"sink_{token}{suffix}_{e}") for e in SINK_THRESHOLDS}
                part[f"rate{suffix}"] = {e: _mean(rate, 100.0) for e, rate in rates.items()}
                part[f"rate{suffix}_per_head"] = {e: _table([100.0 * x for x in rate]) for e, rate in rates.items()}
                part[f"alpha{suffix}"] = _table(tables(f"alpha_{token}{suffix}"))
            result[token] = part
        result["strongest"]["is_first"] = _mean([x.sums["strongest_is_first"] / x.samples for x in layers], 100.0)
        result["strongest"]["positions"] = self._strongest + [int(alpha.argmax()) for alpha in self._alpha]
        pairs = sum(x.samples * x.heads for x in layers)
        result["by_position"] = _key_table(self._by_position, pairs)
        result["by_token"] = self._token_result(pairs)
        return result

    def _token_result(self, pairs: int) -> list[dict[str, Any]]:
        """The named tokens that occur, then those that are strongest most often."""
        sums = self._by_token
        strongest = sums[_KEY_SUMS.index("strongest")]
        ranked = strongest.argsort(descending=True, stable=True)[:MAX_LISTED].tolist()
        seen = [t for t in self.tokens if t < sums.shape[1] and sums[0, t] > 0]
        chosen = list(dict.fromkeys([*seen, *(t for t in ranked if strongest[t] > 0)]))[:MAX_LISTED]
        table = _key_table(sums[:, chosen], pairs)
        return [
            {
                "token_id": token,
                **{k: {e: r[i] for e, r in v.items()} if isinstance(v, dict) else v[i] for k, v in table.items()},
            }
            for i, token in enumerate(chosen)
        ]

    @staticmethod
    def _rows_result(layers: list[_AttentionLayer]) -> dict[str, Any]:
        mass = [x.sums["mass"] / max(x.rows, 1) for x in layers]
        zero = [100.0 * x.sums["zero_rows"] / max(x.rows, 1) for x in layers]
        largest = [x.sums["largest"] / max(x.rows, 1) for x in layers]
        live = sum(x.sums["live_rows"].sum().item() for x in layers)
        scores = [x.max_score for x in layers]
        contexts: dict[int, dict[str, Any]] = {}
        for x in layers:
            for b, bucket in x.contexts.items():
                into = contexts.setdefault(b, dict.fromkeys(bucket, 0))
                for name, value in bucket.items():
                    into[name] = into[name] + value
        return {
            "mass": _mean(mass),
            "mass_per_head": _table(mass),
            "zero": _mean(zero),
            "zero_per_head": _table(zero),
            "largest_weight": _mean(largest),
            "largest_weight_per_head": _table(largest),
            "max_weight": max(x.max_weight.max().item() for x in layers),
            "entropy": sum(x.sums["entropy"].sum().item() for x in layers) / live if live else None,
            "entropy_per_head": [
                [
                    e / n if n else None
                    for e, n in zip(x.sums["entropy"].tolist(), x.sums["live_rows"].tolist(), strict=True)
                ]
                for x in layers
            ],
            "max_score": max((s for s in scores if s is not None), default=None),
            "max_score_per_layer": scores,
            "by_context": [
                {
                    "from": 2**b,
                    "to": 2 ** (b + 1) - 1,
                    "rows": v["rows"],
                    "mass": v["mass"] / v["rows"],
                    "largest_weight": v["largest"] / v["rows"],
                    "mass_histogram": v["mass_h"].tolist(),
                    "largest_weight_histogram": v["largest_h"].tolist(),
                }
                for b, v in sorted(contexts.items())
            ],
        }

    @staticmethod
    def _sparsity_result(layers: list[_AttentionLayer]) -> dict[str, Any]:
        visible = sum(x.visible * x.heads for x in layers)
        zeros = [100.0 * x.sums["zeros"] / max(x.visible, 1) for x in layers]
        tiles, tiles_per_layer = {}, {}
        for tile in TILES:
            name = f"{tile[0]}x{tile[1]}"
            empty = [x.sums[f"tile_{name}"].sum().item() for x in layers]
            there = [x.tiles[tile] * x.heads for x in layers]
            tiles[name] = 100.0 * sum(empty) / sum(there) if sum(there) else None
            tiles_per_layer[name] = [100.0 * e / n if n else None for e, n in zip(empty, there, strict=True)]
        return {
            "zero": 100.0 * sum(x.sums["zeros"].sum().item() for x in layers) / max(visible, 1),
            "zero_per_head": _table(zeros),
            "tiny": 100.0 * sum(x.sums["tiny"].sum().item() for x in layers) / max(visible, 1),
            "tiles": tiles,
            "tiles_per_layer": tiles_per_layer,
        }

    @staticmethod
    def _heads_result(layers: list[_AttentionLayer]) -> dict[str, Any]:
        result: dict[str, Any] = {"total": sum(x.heads for x in layers)}
        shares = {
            "dead": [100.0 * x.sums["dead_tokens"] / max(x.tokens, 1) for x in layers],
            "dormant": [100.0 * x.sums["dormant_rows"] / x.sums["dormant_seen"].clamp(min=1) for x in layers],
        }
        for name, share in shares.items():
            # 95 % as a share of two counts may miss the bound by one rounding
            flags = [s >= DEAD_TOKENS - 1e-9 for s in share]
            result[name] = sum(int(f.sum()) for f in flags)
            result[f"{name}_percent"] = 100.0 * result[name] / result["total"]
            result[f"{name}_tokens_per_head"] = _table(share)
        return result

    def _hidden_result(self) -> dict[str, Any]:
        pooled = Moments()
        per_layer, massive = [], []
        massive_count = 0
        indices = sorted(self._hidden)
        for i in indices:
            state = self._hidden[i]
            pooled.merge(state.moments)
            massive += state.massive
            massive_count += state.massive_count
            m = state.moments
            per_layer.append(
                {
                    "layer": i,
                    "kurtosis": m.kurtosis,
                    "mean": m.mean,
                    "std": math.sqrt(m.m2 / m.n),
                    "min": m.min,
                    "max": m.max,
                    "median_abs": state.histogram.magnitudes().quantiles([0.5])[0],
                    "top": state.top,
                    "box": state.histogram.box(m.min, m.max),
                    "massive": state.massive_count,
                }
            )
        return {
            "kurtosis": pooled.kurtosis,
            "mean": pooled.mean,
            "std": math.sqrt(pooled.m2 / pooled.n),
            "min": pooled.min,
            "max": pooled.max,
            "max_abs": max(abs(pooled.min), abs(pooled.max)),
            "per_layer": per_layer,
            "massive": {
                "count": massive_count,
                "list": sorted(massive, key=lambda r: -abs(r["value"]))[:MAX_LISTED],
            },
            "outlier_features": self._outlier_features([self._hidden[i] for i in indices]),
        }

    def _outlier_features(self, layers: list[_HiddenLayer]) -> dict[str, Any]:
        counts = torch.stack([x.outliers for x in layers])  # (L, C)
        in_layers = 100.0 * (counts > 0).double().mean(0)
        in_positions = 100.0 * counts.sum(0).double() / (len(layers) * sum(self._lengths))
        hits = (in_layers >= OUTLIER_LAYERS - 1e-9) & (in_positions >= OUTLIER_POSITIONS - 1e-9)
        return {
            "count": int(hits.sum()),
            "list": [
                {"channel": c, "layers": in_layers[c].item(), "positions": in_positions[c].item()}
                for c in hits.nonzero().flatten().tolist()
            ],
        }


def _mean(rows: list[Tensor], factor: float = 1.0) -> float:
    """Mean over layers and heads."""
    return factor * torch.cat(rows).mean().item()


def _table(rows: list[Tensor]) -> list[list[float]]:
    return [row.tolist() for row in rows]


def _key_table(sums: Tensor, pairs: int) -> dict[str, Any]:
    """Columns of ``sums (len(_KEY_SUMS), N)`` as lists; null where no key had enough queries.

    ``pairs`` is how many (sample, layer, head) there are: what ``strongest`` is a share of.
    """
    row = {name: sums[i] for i, name in enumerate(_KEY_SUMS)}

    def mean(name: str, factor: float = 1.0) -> list[float | None]:
        rows = zip(row[name].tolist(), row["count"].tolist(), strict=True)
        return [factor * value / n if n else None for value, n in rows]

    table: dict[str, Any] = {"strongest": [100.0 * v / pairs for v in row["strongest"].tolist()]}
    for suffix in ("", "_normalized"):
        table[f"alpha{suffix}"] = mean(f"alpha{suffix}")
        table[f"rate{suffix}"] = {str(e): mean(f"rate{suffix}_{e}", 100.0) for e in SINK_THRESHOLDS}
    return table


def save_meter(meter: Meter, batches: int, path: Path) -> None:
    """Write what a meter has seen in so many batches; the file appears complete or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    torch.save({"meter": meter, "batches": batches}, temporary)
    temporary.replace(path)


def load_meter(path: Path) -> tuple[Meter, int]:
    """What :func:`save_meter` wrote: the meter and its batches. Only these classes are made, whatever the file holds."""
    with torch.serialization.safe_globals([Meter, Moments, FloatHistogram, _AttentionLayer, _HiddenLayer]):
        found = torch.load(path, weights_only=True)
    return found["meter"], found["batches"]
