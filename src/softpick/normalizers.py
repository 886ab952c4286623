"""The table of attention normalizers: one record each, and nothing about kernels.

Every normalizer here maps the scaled scores ``s_j`` of one query row (masked keys are absent) to weights

    a_j = f(s_j) / l        l = sum_j g(s_j) + c        o = sum_j a_j v_j

so that, with ``do`` the gradient of ``o``, ``dp_j = do . v_j`` and ``D = do . o``,

    dv_j = a_j do           ds_j = (f'(s_j) dp_j - g'(s_j) D) / l        dc = -D / l

A record names ``f`` and ``g`` by a few switches instead of by free-form functions. The reference evaluates them through
:meth:`Normalizer.f` and its siblings; the tiled and GPU kernels read the same switches as compile-time choices. Whatever
lists normalizers (command line, documentation, tests, the transformers adapter) iterates over :data:`NORMALIZERS`.

A record of your own is passed in the place of a name and computes what its switches say; switches that contradict each
other are refused when the record is made. Plain ReLU attention, for example, is ``Normalizer("relu", base="linear",
rectify="positive", eps=1e-6)``, its unnormalized form ``Normalizer("relu", base="linear", rectify="positive", constant=1,
normalized=False)``, sigmoid attention ``Normalizer("sigmoid", base="sigmoid", constant=1, normalized=False)``.

**Anchoring.** Exponentials are evaluated relative to a row constant ``m`` (``f(s) e^-m`` and so on), which cancels in
``f / l``. For every normalizer but softmax ``m = max(0, max_j s_j)``: no exponential exceeds 1, rows in which all
scores are negative or masked need no special case, and nothing overflows. The published form of softpick takes
``m = max_j s_j``, whose ``e^-m`` overflows for rows of large negative scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

__all__ = ["EXCLUDED_BIAS", "NORMALIZERS", "Normalizer", "get_normalizer", "is_normalizer", "visible"]

EXCLUDED_BIAS = -9984.0
"""An entry of an additive mask at or below this excludes its key from both sums, for every normalizer and entry point.

It is -1e4 rounded to bf16, so that the usual ways to write "masked" are all covered, after casts too: -1e4, -65504, -1e9,
the lowest number of any dtype, minus infinity. A key with such a bias has the weight 0 in softmax anyway; left in, it would
add ``|e^s - 1| = 1`` to softpick's denominator. A query whose keys are all excluded has output 0. Biases above it are added
to the scores, so slopes of ALiBi reach 9984 positions at slope 1, and more at the smaller ones that it uses."""


def visible(mask: Tensor) -> Tensor:
    """Which keys an attention mask leaves: a boolean mask itself, and where an additive one is above :data:`EXCLUDED_BIAS`.

    Args:
        mask: any shape, boolean (True takes part) or floating point (added to the scores).

    Returns:
        Boolean, of the shape of ``mask``. An entry that is NaN counts as visible.
    """
    return mask if mask.dtype == torch.bool else ~(mask <= EXCLUDED_BIAS)


_PAPER = "Zuhri, Fuadi, Aji 2025, Softpick: No Attention Sink, No Massive Activations with Rectified Softmax"


_SWITCHES = ("base", "rectify", "absolute_denominator", "constant", "negative_gradient", "normalized", "eps")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "base": ("exp", "expm1", "linear", "square", "sigmoid"),
    "rectify": ("none", "positive", "nonnegative"),
    "absolute_denominator": (False, True),
    "constant": (0, 1, "sink"),
    "negative_gradient": (False, True),
    "normalized": (False, True),
}
_LISTED: dict[str, tuple[Any, ...]] = {}  # switches of the table's records by name
_RECORDS: dict[str, Normalizer] = {}  # what get_normalizer finds: every record that was made, by its text


@dataclass(frozen=True)
class Normalizer:
    """A normalizer: a row of the table, or a record of your own.

    Attributes:
        name: the name used everywhere (``normalizer=``, ``attn_implementation=``, command line): letters, digits, ``_.-``.
        title: a name for people.
        formula: the weight ``a_i`` of key ``i`` as text.
        citation: where it comes from.
        note: what to know before using it.
        base: the elementwise function under ``f`` and ``g``: ``"exp"`` is ``e^s``, ``"expm1"`` is ``e^s - 1``,
            ``"linear"`` is ``s``, ``"square"`` is ``s^2``, ``"sigmoid"`` is ``1 / (1 + e^-s)``.
        rectify: which entries the numerator keeps: ``"none"`` keeps all, ``"positive"`` those with ``s > 0``,
            ``"nonnegative"`` those with ``s >= 0`` (for the bases that are not 0 at 0).
        absolute_denominator: ``g = |base|`` of all entries if true, else ``g = f``.
        constant: ``c`` of the denominator: 0, 1, or ``"sink"`` for ``e^b`` with one learned logit ``b`` per head (for the bases
            with an exponential, ``"exp"`` and ``"expm1"``).
        negative_gradient: false stops the gradient of the entries with ``s <= 0`` (they still count forward).
        normalized: false leaves the sum out of the denominator (``g = 0``), which is then ``constant``.
        eps: added once to ``l / e^m``; paper eq. (2).
        text: the record in one string, by which operators, modules and configurations know it: the name for a record of the
            table, else name and switches, from which :func:`get_normalizer` makes the record again.

    Raises:
        ValueError: for a value that a switch does not have, or switches that contradict each other.
    """

    name: str
    title: str = ""
    formula: str = ""
    citation: str = ""
    note: str = ""
    base: Literal["exp", "expm1", "linear", "square", "sigmoid"] = "exp"
    rectify: Literal["none", "positive", "nonnegative"] = "none"
    absolute_denominator: bool = False
    constant: Literal[0, 1, "sink"] = 0
    negative_gradient: bool = True
    normalized: bool = True
    eps: float = 0.0
    text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name: expected letters, digits, '_', '.' and '-', got {self.name!r}")
        for switch, choices in _CHOICES.items():
            value = getattr(self, switch)
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                raise ValueError(f"{switch}: expected one of {', '.join(map(repr, choices))}; got {value!r}")
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not 0 <= self.eps < math.inf:
            raise ValueError(f"eps: expected a finite number >= 0, got {self.eps!r}")
        reason = self._contradiction()
        if reason is not None:
            raise ValueError(reason)
        switches = ",".join(f"{switch}={getattr(self, switch)}" for switch in _SWITCHES)
        listed = _LISTED.get(self.name) == self.switches
        object.__setattr__(self, "text", self.name if listed else f"{self.name}({switches})")
        _RECORDS.setdefault(self.text, self)

    def _contradiction(self) -> str | None:
        """What is wrong with the combination of switches; None if nothing is."""
        if self.constant == "sink" and not self.exponential:
            return (
                f"constant: expected 0 or 1 for base {self.base!r} ('sink' is the logit of an exponential), got 'sink'"
            )
        if self.rectify == "nonnegative" and self.base not in ("exp", "sigmoid"):
            return f"rectify: expected 'none' or 'positive' for base {self.base!r}, which is 0 at 0; got 'nonnegative'"
        if not self.negative_gradient and not (self.absolute_denominator and self.rectify == "positive"):
            return (
                "negative_gradient: expected True unless absolute_denominator is True and rectify is 'positive': elsewhere "
                f"scores <= 0 count in both sums or in none; got False with {self.absolute_denominator} and {self.rectify!r}"
            )
        if not self.normalized and (self.exponential or self.absolute_denominator or self.constant != 1):
            return (
                "normalized: expected True unless base is 'linear', 'square' or 'sigmoid', constant is 1 and "
                f"absolute_denominator is False; got False with {self.base!r}, {self.constant!r}, {self.absolute_denominator}"
            )
        return None

    @property
    def switches(self) -> tuple[Any, ...]:
        """All that decides what is computed."""
        return tuple(getattr(self, switch) for switch in _SWITCHES)

    @property
    def exponential(self) -> bool:
        """Whether ``f`` and ``g`` are exponentials, which are taken relative to a row constant."""
        return self.base in ("exp", "expm1")

    @property
    def signed(self) -> bool:
        """Whether the base function has the sign of the score."""
        return self.base in ("expm1", "linear")

    @property
    def signed_denominator(self) -> bool:
        """Whether the denominator may be negative, so that it has no logarithm."""
        return self.signed and self.rectify == "none" and not self.absolute_denominator and self.normalized

    @property
    def has_kernels(self) -> bool:
        """Whether the Triton kernels, which read the switches as compile-time constants, compute this combination."""
        if self.base == "exp":
            return self.rectify == "none" or not self.absolute_denominator
        if self.base == "expm1":
            return self.rectify == "positive"
        return self.base == "linear" and self.rectify == "none" and self.absolute_denominator

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
        """A score with ``f = g = 0``, which a masked key may be given: 0, or minus infinity where ``f(0)`` is not 0."""
        return -math.inf if self.base in ("exp", "sigmoid") else 0.0

    def row_constant(self, rowmax: Tensor, sink: Tensor | None = None) -> Tensor:
        """The anchor ``m`` of a row from its largest score (minus infinity for an empty row). Same shape as ``rowmax``.

        ``m`` is finite. For bases without an exponential it is 0.
        """
        if not self.exponential:
            return torch.zeros_like(rowmax)
        m = rowmax.clamp(min=self.anchor)
        if sink is not None:
            m = torch.maximum(m, sink)
        return torch.where(m == -math.inf, 0.0, m)

    def exponent_shift(self, rowmax: Tensor, sink: Tensor | None = None) -> Tensor:
        """What exponents of a row are taken relative to: ``m``; for a row of small scores and a small sink the larger of these.

        The function is the same with any constant. Relative to 0 all exponentials of such a row would underflow.
        """
        if sink is None or self.base != "exp" or self.rectify != "none":
            return self.row_constant(rowmax, sink)
        m = torch.maximum(rowmax, sink)
        return torch.where(m == -math.inf, 0.0, m)

    # f, g and their derivatives, all multiplied by e^-m (m = 0 without an exponential); those of exponentials are finite
    # for every finite s.

    def _base(self, s: Tensor, m: Tensor) -> Tensor:
        if self.base == "linear":
            return s
        if self.base == "square":
            return s * s
        if self.base == "sigmoid":
            return torch.sigmoid(s)
        if self.base == "exp":
            return torch.exp(s - m)
        if self.base != "expm1":
            raise NotImplementedError(f"base {self.base!r} has no formula in Normalizer._base")
        # e^{s-m} - e^{-m} without cancellation or overflow: sign(s) e^{max(s,0)-m} (1 - e^{-|s|})
        return torch.exp(s.clamp(min=0) - m) * -torch.expm1(-s.abs()) * torch.sign(s)

    def _dbase(self, s: Tensor, m: Tensor) -> Tensor:
        if self.base == "linear":
            return torch.ones_like(s)
        if self.base == "square":
            return 2.0 * s
        if self.base == "sigmoid":
            return torch.sigmoid(s) * torch.sigmoid(-s)
        if not self.exponential:
            raise NotImplementedError(f"base {self.base!r} has no derivative in Normalizer._dbase")
        return torch.exp(s - m)

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
        if not self.normalized:
            return torch.zeros_like(s)
        return self._base(s, m).abs() if self.absolute_denominator else self.f(s, m)

    def df(self, s: Tensor, m: Tensor) -> Tensor:
        """Derivative ``f'(s) e^-m``, elementwise; ``step(0) = 0`` as in paper eq. (7)."""
        dbase, kept = self._dbase(s, m), self._kept(s)
        return dbase if kept is None else torch.where(kept, dbase, 0.0)

    def dg(self, s: Tensor, m: Tensor) -> Tensor:
        """Derivative ``g'(s) e^-m`` that the backward pass uses; ``sign(0) = +1`` as in paper eq. (7)."""
        if not self.normalized:
            return torch.zeros_like(s)
        if not self.absolute_denominator:
            return self.df(s, m)
        dbase = self._dbase(s, m)
        if not self.negative_gradient:
            return torch.where(s > 0, dbase, 0.0)
        return torch.where(s >= 0, dbase, -dbase) if self.signed else dbase

    def c(self, m: Tensor, sink: Tensor | None = None) -> Tensor | float:
        """Denominator constant ``c e^-m``; ``sink`` broadcasts against ``m``."""
        if self.constant == 0:
            return 0.0
        if not self.exponential:
            return 1.0
        if self.constant == 1:
            return torch.exp(-m)
        assert sink is not None
        return torch.exp(torch.where(m == math.inf, 0.0, sink - m))  # a sink of plus infinity takes all


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

for _norm in _TABLE:
    object.__setattr__(_norm, "text", _norm.name)
_RECORDS.clear()
_RECORDS.update((n.name, n) for n in _TABLE)
_LISTED.update((n.name, n.switches) for n in _TABLE)

NORMALIZERS: Mapping[str, Normalizer] = MappingProxyType({n.name: n for n in _TABLE})
"""All normalizers by name, in the order in which they are listed to people."""


def get_normalizer(normalizer: str | Normalizer) -> Normalizer:
    """Look a normalizer up by name or by the ``text`` of a record (records pass through).

    Raises:
        ValueError: for an unknown name, listing the known ones.
        TypeError: for anything that is neither a name nor a record.
    """
    if isinstance(normalizer, Normalizer):
        return normalizer
    if not isinstance(normalizer, str):
        raise TypeError(f"normalizer: expected a name or a Normalizer, got {type(normalizer).__name__}")
    found = _RECORDS.get(normalizer)
    if found is None:
        found = _from_text(normalizer)
    if found is None:
        raise ValueError(f"normalizer: expected one of {', '.join(_LISTED)}; got {normalizer!r}")
    return found


def is_normalizer(name: Any) -> TypeGuard[str]:
    """Whether this is a name of the table, or the ``text`` of a record.

    Raises:
        ValueError: for a text whose switches contradict each other.
    """
    return isinstance(name, str) and (name in _RECORDS or ("(" in name and _from_text(name) is not None))


def _from_text(text: str) -> Normalizer | None:
    """The record of a text that another process wrote; None if it is no such text."""
    form = ",".join(f"{switch}=([^,]*)" for switch in _SWITCHES)
    found = re.fullmatch(rf"([\w.-]+)\({form}\)", text)
    if found is None:
        return None
    name, *words = found.groups()
    values: dict[str, Any] = {}
    for switch, word in zip(_SWITCHES, words, strict=True):
        known = {str(choice): choice for choice in _CHOICES.get(switch, ())}
        try:
            values[switch] = known.get(word, word) if known else float(word)
        except ValueError:
            return None
    return Normalizer(name, **values)
