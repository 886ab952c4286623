"""The table of attention normalizers: one record each, and nothing about kernels.

Every normalizer here maps the scaled scores ``s_j`` of one query row (masked keys are absent) to weights

    a_j = f(s_j) / l        l = sum_j g(s_j) + c        o = sum_j a_j v_j

so that, with ``do`` the gradient of ``o``, ``dp_j = do . v_j`` and ``D = do . o``,

    dv_j = a_j do           ds_j = (f'(s_j) dp_j - g'(s_j) D) / l        dc = -D / l

A record names ``f`` and ``g`` by a few switches instead of by free-form functions. The reference evaluates them through
:meth:`Normalizer.f` and its siblings; the tiled and GPU kernels read the same switches as compile-time choices. Whatever
lists normalizers (command line, documentation, tests, the transformers adapter) iterates over :data:`NORMALIZERS`.

**Anchoring.** Exponentials are evaluated relative to a row constant ``m`` (``f(s) e^-m`` and so on), which cancels in
``f / l``. For every normalizer but softmax ``m = max(0, max_j s_j)``: no exponential exceeds 1, rows in which all
scores are negative or masked need no special case, and nothing overflows. The published form of softpick takes
``m = max_j s_j``, whose ``e^-m`` overflows for rows of large negative scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

__all__ = ["NORMALIZERS", "Normalizer", "get_normalizer"]

_PAPER = "Zuhri, Fuadi, Aji 2025, Softpick: No Attention Sink, No Massive Activations with Rectified Softmax"


@dataclass(frozen=True)
class Normalizer:
    """One row of the table.

    Attributes:
        name: the name used everywhere (``normalizer=``, ``attn_implementation=``, command line).
        title: a name for people.
        formula: the weight ``a_i`` of key ``i`` as text.
        citation: where it comes from.
        note: what to know before using it.
        base: the elementwise function under ``f`` and ``g``: ``"exp"`` is ``e^s``, ``"expm1"`` is ``e^s - 1``,
            ``"linear"`` is ``s``.
        rectify: which entries the numerator keeps: ``"none"`` keeps all, ``"positive"`` those with ``s > 0``,
            ``"nonnegative"`` those with ``s >= 0``.
        absolute_denominator: ``g = |base|`` if true, else ``g = f``.
        constant: ``c`` of the denominator: 0, 1, or ``"sink"`` for ``e^b`` with one learned logit ``b`` a head.
        negative_gradient: false stops the gradient of the entries with ``s <= 0`` (they still count forward).
        eps: added once to ``l`` relative to ``m``; paper eq. (2).
    """

    name: str
    title: str
    formula: str
    citation: str
    note: str
    base: Literal["exp", "expm1", "linear"] = "exp"
    rectify: Literal["none", "positive", "nonnegative"] = "none"
    absolute_denominator: bool = False
    constant: Literal[0, 1, "sink"] = 0
    negative_gradient: bool = True
    eps: float = 0.0

    @property
    def needs_sink(self) -> bool:
        """Whether the ``sink`` logits must be given."""
        return self.constant == "sink"

    @property
    def sparse(self) -> bool:
        """Whether weights can be exactly zero (other than by underflow)."""
        return self.rectify != "none"

    @property
    def anchor(self) -> float:
        """Where the running maximum ``m`` starts: minus infinity for softmax (``m`` is the largest score), else 0."""
        return -math.inf if self.base == "exp" and self.constant == 0 and self.rectify == "none" else 0.0

    @property
    def neutral(self) -> float:
        """A score with ``f = g = 0``, which a masked key may be given: 0, or minus infinity for the ``e^s`` family."""
        return -math.inf if self.base == "exp" else 0.0

    def row_constant(self, rowmax: Tensor, sink: Tensor | None = None) -> Tensor:
        """The anchor ``m`` of a row from its largest score (minus infinity for an empty row). Same shape as ``rowmax``.

        ``m`` is finite. For the linear normalizer, which has no exponential, it is 0.
        """
        if self.base == "linear":
            return torch.zeros_like(rowmax)
        m = rowmax.clamp(min=self.anchor)
        if sink is not None:
            m = torch.maximum(m, sink)
        return torch.where(m == -math.inf, 0.0, m)

    # f, g and their derivatives, all multiplied by e^-m (m = 0 for the linear one) and finite for every finite s.

    def _base(self, s: Tensor, m: Tensor) -> Tensor:
        if self.base == "linear":
            return s
        if self.base == "exp":
            return torch.exp(s - m)
        # e^{s-m} - e^{-m} without cancellation or overflow: sign(s) e^{max(s,0)-m} (1 - e^{-|s|})
        return torch.exp(s.clamp(min=0) - m) * -torch.expm1(-s.abs()) * torch.sign(s)

    def _dbase(self, s: Tensor, m: Tensor) -> Tensor:
        return torch.ones_like(s) if self.base == "linear" else torch.exp(s - m)

    def _kept(self, s: Tensor) -> Tensor | None:
        if self.rectify == "none":
            return None
        return s > 0 if self.rectify == "positive" else s >= 0

    def f(self, s: Tensor, m: Tensor) -> Tensor:
        """Numerator ``f(s) e^-m``, elementwise."""
        base, kept = self._base(s, m), self._kept(s)
        return base if kept is None else torch.where(kept, base, 0.0)

    def g(self, s: Tensor, m: Tensor) -> Tensor:
        """Denominator term ``g(s) e^-m``, elementwise."""
        return self._base(s, m).abs() if self.absolute_denominator else self.f(s, m)

    def df(self, s: Tensor, m: Tensor) -> Tensor:
        """Derivative ``f'(s) e^-m``, elementwise; ``step(0) = 0`` as in paper eq. (7)."""
        dbase, kept = self._dbase(s, m), self._kept(s)
        return dbase if kept is None else torch.where(kept, dbase, 0.0)

    def dg(self, s: Tensor, m: Tensor) -> Tensor:
        """Derivative ``g'(s) e^-m`` that the backward pass uses; ``sign(0) = +1`` as in paper eq. (7)."""
        if not self.absolute_denominator:
            return self.df(s, m)
        dbase = self._dbase(s, m)
        if not self.negative_gradient:
            return torch.where(s > 0, dbase, 0.0)
        return torch.where(s >= 0, dbase, -dbase)

    def c(self, m: Tensor, sink: Tensor | None = None) -> Tensor | float:
        """Denominator constant ``c e^-m``; ``sink`` broadcasts against ``m``."""
        if self.constant == 0:
            return 0.0
        if self.base == "linear":
            return 1.0
        if self.constant == 1:
            return torch.exp(-m)
        assert sink is not None
        return torch.exp(sink - m)


_TABLE = (
    Normalizer(
        name="softmax",
        title="softmax",
        formula="e^{s_i} / Σ_j e^{s_j}",
        citation="the baseline (Vaswani et al. 2017)",
        note="Rows sum to one, so a head that has nothing to say needs a sink.",
    ),
    Normalizer(
        name="softpick",
        title="softpick",
        formula="relu(e^{s_i} - 1) / (Σ_j |e^{s_j} - 1| + ε)",
        citation=f"{_PAPER}, eq. (1)-(2)",
        note="Exact zeros for s_i <= 0; rows sum to at most one; no sinks.",
        base="expm1",
        rectify="positive",
        absolute_denominator=True,
        eps=1e-6,
    ),
    Normalizer(
        name="softpick_stop_gradient",
        title="softpick, stop-gradient",
        formula="as softpick; negative scores get no gradient",
        citation="arXiv:2610.05488 (only its abstract was read)",
        note="Experimental: negatives count in the forward denominator only.",
        base="expm1",
        rectify="positive",
        absolute_denominator=True,
        negative_gradient=False,
        eps=1e-6,
    ),
    Normalizer(
        name="relu_softpick",
        title="relu-softpick (ReluSoftpick1)",
        formula="relu(e^{s_i} - 1) / (Σ_j relu(e^{s_j} - 1) + ε)",
        citation=f"{_PAPER}, eq. (5) and table 3",
        note="Denominator without the negatives: heads can die, sinks remain.",
        base="expm1",
        rectify="positive",
        eps=1e-6,
    ),
    Normalizer(
        name="rectified",
        title="rectified softmax",
        formula="e^{s_i} [s_i >= 0] / Σ_j e^{s_j} [s_j >= 0]",
        citation=f"{_PAPER}, appendix C",
        note="Scores below zero are masked out; the paper's negative result.",
        rectify="nonnegative",
    ),
    Normalizer(
        name="softmax_plus_one",
        title="softmax plus one",
        formula="e^{s_i} / (1 + Σ_j e^{s_j})",
        citation="Miller 2023, Attention Is Off By One",
        note="A fixed sink of logit zero outside the sequence.",
        constant=1,
    ),
    Normalizer(
        name="learned_sink",
        title="learned sink (GPT-OSS)",
        formula="e^{s_i} / (e^{b_h} + Σ_j e^{s_j})",
        citation="OpenAI 2025, gpt-oss model card, arXiv:2508.10925",
        note="One learned logit b_h a head (argument sink).",
        constant="sink",
    ),
    Normalizer(
        name="linear_softpick",
        title="linear softpick (Edifice)",
        formula="s_i / (1 + Σ_j |s_j|)",
        citation="Edifice.Blocks.Softpick (Elixir), documentation",
        note="Signed weights, no exponentials.",
        base="linear",
        absolute_denominator=True,
        constant=1,
    ),
)

_BY_NAME = {n.name: n for n in _TABLE}  # a plain dictionary is what torch.compile can look things up in

NORMALIZERS: Mapping[str, Normalizer] = MappingProxyType(_BY_NAME)
"""All normalizers by name, in the order in which they are listed to people."""


def get_normalizer(normalizer: str | Normalizer) -> Normalizer:
    """Look a normalizer up by name (records pass through).

    Raises:
        ValueError: for an unknown name, listing the known ones.
        TypeError: for anything that is neither a name nor a record.
    """
    if isinstance(normalizer, Normalizer):
        return normalizer
    if not isinstance(normalizer, str):
        raise TypeError(f"normalizer: expected a name or a Normalizer, got {type(normalizer).__name__}")
    if normalizer not in _BY_NAME:
        raise ValueError(f"normalizer: expected one of {', '.join(_BY_NAME)}; got {normalizer!r}")
    return _BY_NAME[normalizer]
