"""Metrics as records: what is summed, over what it is divided, what it means, and its row in tables and reports.

:data:`METRICS` is the one list of what a summary shows. A metric that is a mean over rows of attention weights (a number a
head) or over entries of hidden states (a number a layer) stands here whole: its record has its accumulation, the meter
applies it, the result appears under ``path``, and the terminal table, the report and its definitions show it. Metrics that
share an accumulation (sink rates, tiles, moments and extremes of hidden states) name the place of their result only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softpick.analysis.streams import sum64

__all__ = ["DASH", "METRICS", "SINK_THRESHOLDS", "TILES", "HeadSum", "HiddenSum", "Metric", "Rows"]

DASH = "–"

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


@dataclass(frozen=True)
class Rows:
    """What the accumulation of a metric sees: some rows of some heads of one sample, padding cut away.

    Attributes:
        weights: ``(h, M, T)`` fp32, 0 where masked.
        magnitude: ``|weights|``, which differs for signed weights only (linear softpick).
        share: ``(h, M, T)``, magnitude over its row's sum; 0 in rows without mass.
        outputs: ``(h, M, Dv)`` fp32, before the output projection.
        visible: ``(M, T)`` boolean, which keys a query may see.
        seen: ``(M,)`` boolean, the query may see a key.
        live: ``(h, M)`` boolean, the row has mass.
        mass: ``(h, M)`` fp64 on the CPU, sum of the weights of a row.
        largest: ``(h, M)``, largest visible weight of a row; 0 where the query sees no key.
    """

    weights: Tensor
    magnitude: Tensor
    share: Tensor
    outputs: Tensor
    visible: Tensor
    seen: Tensor
    live: Tensor
    mass: Tensor
    largest: Tensor


@dataclass(frozen=True)
class HeadSum:
    """A metric that is a sum over rows, a number a head, divided by a count.

    With ``path`` ``(..., part, name)`` the measurements get ``part[name]`` (all heads together: sums over counts) and
    ``part[name + "_per_head"]`` ``(L, H)``, null where a head's count is 0.

    With ``at_least``, a head *has* the property where its share reaches so many percent, and the metric is the share of such
    heads: of ``name_percent`` the measurements get ``part[name]`` (how many), ``part[name_percent]`` and
    ``part[name_tokens_per_head]``.

    Attributes:
        sum: from :class:`Rows` to ``(h,)``.
        per: the count: ``rows`` (queries that see a key), ``live_rows`` (those with mass), ``first_seen`` (those that see
            the first token), ``visible`` (entries) or ``tokens``.
        factor: 100 for percent.
        at_least: percent.
    """

    sum: Callable[[Rows], Tensor]
    per: str
    factor: float = 1.0
    at_least: float | None = None


@dataclass(frozen=True)
class HiddenSum:
    """A metric that is a sum over the residual stream after a layer, divided by the number of its entries or tokens.

    With ``path`` ``(..., "hidden", name)`` the measurements get ``hidden[name]`` (all layers together) and
    ``hidden[name + "_per_layer"]``.

    Attributes:
        sum: from one sample's ``(T, C)`` fp32 to a number.
        per: ``entries`` or ``tokens``.
        factor: 100 for percent.
    """

    sum: Callable[[Tensor], Tensor]
    per: str = "entries"
    factor: float = 1.0


@dataclass(frozen=True)
class Metric:
    """One row of the summary.

    Attributes:
        key: a stable name.
        label: for people, with the unit's sign left out.
        unit: ``"%"``, ``"nats"``, ... or empty.
        group: the heading it stands under.
        path: where the value is in a run.
        style: a format specification; ``"d"`` for counts.
        definition: what it is, in a sentence or two.
        reading: how to read it (what low or high means).
        sink: a sink figure, beside which T and the BOS policy are stated.
        accumulate: how the meter finds it: a sum over rows of attention or over hidden states, from which the result is
            made under ``path``; None where the figure comes from a run, or from what several metrics share (sinks, tiles,
            moments of the hidden states).
    """

    key: str
    label: str
    unit: str
    group: str
    path: tuple[str, ...]
    style: str
    definition: str
    reading: str = ""
    sink: bool = False
    accumulate: HeadSum | HiddenSum | None = None

    def value(self, run: Mapping[str, Any]) -> float | None:
        """The number in a run, or None where it is missing or not finite."""
        at: Any = run
        for part in self.path:
            at = at.get(part) if isinstance(at, Mapping) else None
        if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
            return None
        return at

    def text(self, value: float | None) -> str:
        """A value as text, with its unit."""
        if value is None:
            return DASH
        if self.style == "d":
            number = f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
        elif self.style == "g":
            number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        else:
            number = format(value, self.style)
        return f"{number} {self.unit}".rstrip() if self.unit else number


def _sink(token: str, normalized: bool, threshold: str) -> Metric:
    words, which = {
        "first": ("first token", "k is the first token of the sample"),
        "strongest": (
            "strongest token",
            "k is, for each sample and head, the key with the largest alpha among those that at least 16 queries see",
        ),
        "last": (
            "last token",
            "k is the last token of the sample ([SEP] of an encoder); only where attention is not causal: else few see it",
        ),
    }[token]
    key = "rate_normalized" if normalized else "rate"
    weight = (
        "A[i,k] / Σ_j |A[i,j]| over rows with mass" if normalized else "A[i,k] over the queries i that may see key k"
    )
    return Metric(
        key=f"sink_{token}{'_normalized' if normalized else ''}_{threshold}",
        label=f"Sink rate > {threshold}, {words}" + (", share of row mass" if normalized else ""),
        unit="%",
        group="Attention sinks",
        path=("measurements", "sink", token, key, threshold),
        style=".1f",
        definition=f"Share of (sample, layer, head) with alpha > {threshold}; alpha is the mean of {weight}; {which}.",
        reading=(
            "Lower: fewer heads park their attention on one token. Comparable across normalizers."
            if normalized
            else "Lower: fewer sinks. Softpick's rows sum to at most 1, which lowers it too: see the share of row mass."
        ),
        sink=True,
    )


def _tile(name: str) -> Metric:
    rows, columns = name.split("x")
    what = f"row blocks of {columns} keys" if rows == "1" else f"tiles of {rows} queries by {columns} keys"
    return Metric(
        f"tile_{name}",
        f"Empty tiles {rows}×{columns}",
        "%",
        "Sparsity",
        ("measurements", "sparsity", "tiles", name),
        ".1f",
        f"Share of {what} with a visible entry in which every weight is exactly 0. Complete tiles only; "
        "a dash means that the samples are shorter than the tile.",
        "Higher: more work that a kernel can skip without any loss.",
    )


_HIDDEN, _ROWS, _SPARSITY, _HEADS = (("measurements", name) for name in ("hidden", "rows", "sparsity", "heads"))

METRICS: tuple[Metric, ...] = (
    Metric(
        "validation_loss",
        "Validation loss",
        "",
        "Quality",
        ("validation_loss",),
        ".4f",
        "Mean cross-entropy in nats per token (softpick compare: on the validation data, after training).",
        "Lower is better.",
    ),
    Metric(
        "perplexity",
        "Perplexity",
        "",
        "Quality",
        ("perplexity",),
        ".2f",
        "Exponential of the mean cross-entropy of the tokens from the third on. Only for models with the same tokenizer can "
        "it be compared.",
        "Lower is better.",
    ),
    *(
        _sink(token, normalized, threshold)
        for token in ("first", "strongest", "last")
        for normalized in (False, True)
        for threshold in ("0.3", "0.2")
    ),
    Metric(
        "strongest_is_first",
        "Strongest token is the first",
        "%",
        "Attention sinks",
        ("measurements", "sink", "strongest", "is_first"),
        ".1f",
        "Share of (sample, layer, head) whose key with the largest alpha is the first token of the sample.",
    ),
    Metric(
        "row_mass",
        "Row mass",
        "",
        "Attention sinks",
        (*_ROWS, "mass"),
        ".3f",
        "Mean over queries, heads and layers of Σ_j A[i,j].",
        "Softmax always has 1. Below 1, a head may attend to little or nothing.",
        accumulate=HeadSum(lambda r: (r.mass * r.seen.cpu()).sum(1), per="rows"),
    ),
    Metric(
        "largest_weight",
        "Largest weight of a row",
        "",
        "Attention sinks",
        (*_ROWS, "largest_weight"),
        ".3f",
        "Mean over queries, heads and layers of max_j A[i,j].",
        "Low: attention is spread, or (softpick) nearly switched off.",
        accumulate=HeadSum(lambda r: sum64(r.largest * r.seen, 1), per="rows"),
    ),
    Metric(
        "zero_rows",
        "All-zero rows",
        "%",
        "Attention sinks",
        (*_ROWS, "zero"),
        ".2f",
        "Share of queries (per head) whose weights are all exactly 0.",
        "A head that is off for this token.",
        accumulate=HeadSum(lambda r: sum64(~r.live & r.seen, 1), per="rows", factor=100.0),
    ),
    Metric(
        "entropy",
        "Attention entropy",
        "nats",
        "Attention sinks",
        (*_ROWS, "entropy"),
        ".2f",
        "Mean over rows with mass of −Σ_j p_j ln p_j with p = A / Σ|A|.",
        "Low: attention on few keys.",
        accumulate=HeadSum(lambda r: sum64(-torch.xlogy(r.share, r.share).sum(2), 1), per="live_rows"),
    ),
    Metric(
        "max_score",
        "Largest score",
        "",
        "Attention sinks",
        (*_ROWS, "max_score"),
        ".1f",
        "Largest q · k × scaling of a visible pair, before soft-capping and biases.",
        "exp() of what is above 88 overflows fp32, above 11 fp16, where a normalizer is not anchored.",
    ),
    Metric(
        "kurtosis",
        "Kurtosis",
        "",
        "Hidden states",
        (*_HIDDEN, "kurtosis"),
        "g",
        "μ₄/σ⁴ of all entries of the residual stream after every layer, samples and layers pooled (a Gaussian has 3).",
        "Lower: fewer outliers, easier to quantize.",
    ),
    Metric(
        "hidden_min",
        "Smallest activation",
        "",
        "Hidden states",
        (*_HIDDEN, "min"),
        "g",
        "Minimum of the residual stream after every layer.",
    ),
    Metric(
        "hidden_max",
        "Largest activation",
        "",
        "Hidden states",
        (*_HIDDEN, "max"),
        "g",
        "Maximum of the residual stream after every layer.",
    ),
    Metric(
        "massive",
        "Massive activations",
        "",
        "Hidden states",
        (*_HIDDEN, "massive", "count"),
        "d",
        "Entries with |x| > 100 and |x| ≥ 1000 × the median |x| of that hidden state (one sample, one layer).",
        "Lower: fewer.",
    ),
    Metric(
        "outlier_features",
        "Outlier features",
        "",
        "Hidden states",
        (*_HIDDEN, "outlier_features", "count"),
        "d",
        "Channels with |x| ≥ 6 in at least 25 % of the layers and at least 6 % of all positions (LLM.int8).",
        "Lower: easier to quantize.",
    ),
    Metric(
        "zero",
        "Weights exactly 0",
        "%",
        "Sparsity",
        (*_SPARSITY, "zero"),
        ".1f",
        "Share of visible weights (causal: lower triangle with diagonal) that are exactly 0.",
        "Higher: sparser.",
        accumulate=HeadSum(lambda r: ((r.weights == 0) & r.visible).count_nonzero((1, 2)), per="visible", factor=100.0),
    ),
    Metric(
        "tiny",
        "Weights ≤ 1e-5",
        "%",
        "Sparsity",
        (*_SPARSITY, "tiny"),
        ".1f",
        "Share of visible weights with |a| ≤ 0.00001.",
        "Softmax has near-zeros, but no zeros.",
        accumulate=HeadSum(
            lambda r: ((r.magnitude <= TINY_WEIGHT) & r.visible).count_nonzero((1, 2)), per="visible", factor=100.0
        ),
    ),
    *(_tile(name) for name in ("1x16", "1x64", "16x64", "64x64", "128x128")),
    Metric(
        "dead_heads",
        "Dead heads",
        "%",
        "Heads",
        (*_HEADS, "dead_percent"),
        ".1f",
        "Heads whose output (before the output projection) has max|o| ≤ 1e-6 on at least 95 % of tokens.",
        "Lower: less capacity is lost.",
        accumulate=HeadSum(
            lambda r: sum64(r.outputs.abs().amax(2) <= DEAD_OUTPUT, 1), per="tokens", at_least=DEAD_TOKENS
        ),
    ),
    Metric(
        "dormant_heads",
        "Dormant heads",
        "%",
        "Heads",
        (*_HEADS, "dormant_percent"),
        ".1f",
        "Heads with more than 0.9 of a row's mass on the first token for at least 95 % of queries.",
        "Lower: softmax's way of switching a head off.",
        accumulate=HeadSum(
            lambda r: sum64((r.share[:, :, 0] > DORMANT_MASS) & r.visible[:, 0], 1),
            per="first_seen",
            at_least=DEAD_TOKENS,
        ),
    ),
    Metric("parameters", "Parameters", "", "Run", ("parameters",), "d", "Trainable parameters of the model."),
    Metric(
        "seconds",
        "Time",
        "s",
        "Run",
        ("seconds",),
        "d",
        "Seconds of training (softpick compare) or of measuring (softpick analyze).",
    ),
)
"""Every row of the summary, in order."""
