"""Figures of published models, and the thresholds of the verdict: data, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["REFERENCES", "THRESHOLDS", "Reference", "Threshold"]

_PAPER = "Zuhri et al. 2025 (softpick), table 2"
_PAPER_HOW = "sink rate: 1000 samples of SlimPajama; the rest: 10 texts; kurtosis pooled over all layers"
_GU = "Gu et al. 2024, When Attention Sink Emerges in Language Models, table 1"
_GU_HOW = "first token, threshold 0.3, natural text of T = 64: longer samples have a lower rate"


@dataclass(frozen=True)
class Reference:
    """A figure of a published model.

    Attributes:
        metric: key of a record in ``records.METRICS``.
        model: whose figure it is.
        low: the figure, or the lower end of a range.
        high: the upper end; the same for one figure.
        source: where it was published.
        conventions: how it was measured, where that differs from ``docs/metrics.md`` or matters.
    """

    metric: str
    model: str
    low: float
    high: float
    source: str
    conventions: str


def _one(metric: str, model: str, value: float, source: str, conventions: str) -> Reference:
    return Reference(metric, model, value, value, source, conventions)


REFERENCES: tuple[Reference, ...] = (
    Reference("sink_first_0.3", "Mistral-7B, Llama-2-7B and 13B, Llama-3-8B (base and chat)", 88, 99, _GU, _GU_HOW),
    _one("sink_first_0.3", "softmax, 340M", 63.41, _PAPER, _PAPER_HOW),
    _one("sink_first_0.3", "softmax, 1.8B", 14.96, _PAPER, _PAPER_HOW),
    _one("sink_first_0.3", "softpick, 340M and 1.8B", 0.0, _PAPER, _PAPER_HOW),
    _one("sink_first_0.2", "softmax, 340M", 68.28, _PAPER, _PAPER_HOW),
    _one("sink_first_0.2", "softmax, 1.8B", 41.73, _PAPER, _PAPER_HOW),
    _one("sink_first_0.2", "softpick, 340M and 1.8B", 0.0, _PAPER, _PAPER_HOW),
    _one("kurtosis", "softmax, 340M", 33510.81, _PAPER, _PAPER_HOW),
    _one("kurtosis", "softpick, 340M", 340.96, _PAPER, _PAPER_HOW),
    _one("kurtosis", "softmax, 1.8B", 74456.81, _PAPER, _PAPER_HOW),
    _one("kurtosis", "softpick, 1.8B", 2193.27, _PAPER, _PAPER_HOW),
    _one("hidden_max", "softmax, 340M", 240.27, _PAPER, _PAPER_HOW),
    _one("hidden_max", "softpick, 340M", 36.21, _PAPER, _PAPER_HOW),
    _one("hidden_max", "softmax, 1.8B", 371.43, _PAPER, _PAPER_HOW),
    _one("hidden_max", "softpick, 1.8B", 101.51, _PAPER, _PAPER_HOW),
    _one(
        "zero",
        "softpick, 340M",
        99.34,
        _PAPER,
        "the authors' script counts |a| <= 1e-5, which is our row of tiny weights",
    ),
    _one(
        "zero",
        "softpick, 1.8B",
        95.63,
        _PAPER,
        "the authors' script counts |a| <= 1e-5, which is our row of tiny weights",
    ),
)
"""Beside the figures of a user's model, where there is a record of the same metric."""


@dataclass(frozen=True)
class Threshold:
    """A limit beyond which the verdict names a figure as a finding.

    Attributes:
        value: in the unit of the figure.
        meaning: what it separates.
        source: where it comes from; "ours" where nobody published one.
    """

    value: float
    meaning: str
    source: str


THRESHOLDS: Mapping[str, Threshold] = {
    "sinks": Threshold(5.0, "percent of heads (rate at 0.3): below, a model has hardly any sinks", "ours"),
    "no-op": Threshold(
        0.2,
        "norm of a sink's value over the mean norm of values: below, attending to it adds next to nothing",
        "ours; Guo et al. 2024 (Active-Dormant Attention Heads) find value states of sinks drained",
    ),
    "broadcast": Threshold(
        0.9, "share of the energy of what a sink adds that lies in one direction: above, it is the same vector", "ours"
    ),
    "massive": Threshold(1000.0, "times the median |x| of a layer, and |x| > 100", "Sun et al. 2024, section 2"),
    "dead heads": Threshold(1.0, "percent of heads", "ours"),
    "eviction": Threshold(5.0, "percent of perplexity that an evicted key costs: above, keep it in the cache", "ours"),
    "cost": Threshold(1.0, "percent of perplexity: below, rounding is free for most purposes", "ours"),
}
