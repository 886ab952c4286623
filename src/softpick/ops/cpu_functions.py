"""The normalizers' functions over a tile of scores, and their derivatives, in plain torch operations: for the CPU backend.

Tiles are ``(heads, rows, keys)``; work is in place where a name says so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softpick.normalizers import Normalizer

__all__ = [
    "CANCELLATION_SAFE",
    "LN2",
    "Shift",
    "derivative",
    "keep",
    "nothing_kept",
    "score_gradient",
    "weights",
]

LN2 = math.log(2.0)

# Base-2 scores up to here are exponentiated without subtracting a maximum: 2^64 times the longest row stays in fp32.
UNSHIFTED = 64.0
# Rows whose largest base-2 score (forward) or log2 of the denominator (backward) is at least this have a sum of at
# least one, against which the rounding of e^s - 1 is an error in the last place.
CANCELLATION_SAFE = 1.0


class Shift:
    """The row constant ``m`` that exponents are taken relative to (base 2), and whether it is still zero everywhere."""

    def __init__(self, norm: Normalizer, like: Tensor, sink: Tensor | None) -> None:
        # max(anchor, largest score so far): the m of the mathematics. Among plain exponentials a sink stands for its anchor of
        # 0; elsewhere f holds 2^-m by itself or a row may keep nothing, so m is no less than 0
        low = -math.inf if sink is not None and norm.base == "exp" and norm.rectify == "none" else norm.anchor
        self.high = torch.full_like(like, low) if sink is None else sink.clamp(min=low)
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

    def base(self, norm: Normalizer, s: Tensor) -> Tensor:
        """The base function of a tile relative to ``2^m``, in place; accurate relative to the row sum."""
        if norm.base == "exp":
            return (s if self.zero else s.sub_(self.value)).exp2_()
        if norm.base != "expm1":
            return plain_base(norm, s)
        if self.zero and float(self.high.min()) >= CANCELLATION_SAFE:
            return s.exp2_().sub_(1.0)
        return expm1(s, None if self.zero else self.value)


def expm1(s: Tensor, m: Tensor | None) -> Tensor:
    """``2^(s - m) - 2^-m`` in place without cancellation or overflow; ``m`` is 0 if None."""
    if m is None:
        return s.mul_(LN2).expm1_()
    small = torch.expm1(s.abs().mul_(-LN2)).neg_().copysign_(s)
    return s.clamp_(min=0).sub_(m).exp2_().mul_(small)


def plain_base(norm: Normalizer, s: Tensor) -> Tensor:
    """A base function without an exponential that could overflow, in place."""
    if norm.base == "square":
        return s.mul_(s)
    if norm.base == "sigmoid":
        return s.sigmoid_()
    if norm.base != "linear":
        raise NotImplementedError(f"base {norm.base!r} has no formula in plain_base")
    return s


def nothing_kept(norm: Normalizer, scores: Tensor) -> bool:
    """Whether the rectification leaves none of these scores (or row maxima of scores) in the numerator."""
    if norm.rectify == "none":
        return False
    largest = float(scores.amax())
    return largest <= 0.0 if norm.rectify == "positive" else largest < 0.0


def keep_nonnegative(x: Tensor, s: Tensor) -> Tensor:
    """``x`` where ``s >= 0``, else 0, in place. threshold_backward is a select that costs as much as a product."""
    below_zero = -torch.finfo(s.dtype).smallest_normal
    return torch.ops.aten.threshold_backward.grad_input(x, s, below_zero, grad_input=x)


def keep_positive(x: Tensor, s: Tensor) -> Tensor:
    """``x`` where ``s > 0``, else 0, in place."""
    return torch.ops.aten.threshold_backward.grad_input(x, s, 0, grad_input=x)


def keep(norm: Normalizer, x: Tensor, s: Tensor) -> Tensor:
    """``x`` where the numerator keeps the score ``s``, else 0, in place."""
    if norm.rectify == "none":
        return x
    return keep_positive(x, s) if norm.rectify == "positive" else keep_nonnegative(x, s)


def derivative(norm: Normalizer, s: Tensor, e: Tensor, level: Tensor, inverse: Tensor, zero: bool) -> None:
    """The derivative of the base function over ``l`` of a tile into ``e``."""
    if norm.exponential:
        (torch.exp2(s, out=e) if zero else torch.sub(s, level, out=e).exp2_()).mul_(inverse)
    elif norm.base == "square":
        torch.mul(s, 2.0 * inverse, out=e)
    elif norm.base == "sigmoid":
        torch.sigmoid(s, out=e)
        torch.addcmul(e, e, e, value=-1.0, out=e).mul_(inverse)
    else:
        e.copy_(inverse.expand_as(e))


def weights(
    norm: Normalizer, s: Tensor, e: Tensor, p: Tensor, level: Tensor, inverse: Tensor, zero: bool, exact: bool
) -> None:
    """``f(s) / l`` of a tile into ``p``."""
    if norm.base == "exp":
        keep(norm, p.copy_(e), s)
    elif norm.base != "expm1":
        keep(norm, plain_base(norm, p.copy_(s)).mul_(inverse), s)
    elif norm.rectify == "none":
        expm1(p.copy_(s), None if zero else level).mul_(inverse)
    elif exact:
        # e^{s - lse} (1 - e^{-s}) for s > 0: no cancellation, and no overflow where e^s - 1 would
        torch.mul(s, -LN2, out=p).expm1_().neg_().mul_(e).clamp_(min=0)
        keep_positive(p, s)
    else:
        torch.sub(e, inverse if zero else inverse * torch.exp2(-level), out=p).clamp_(min=0)


def score_gradient(norm: Normalizer, s: Tensor, e: Tensor, dp: Tensor, delta: Tensor) -> Tensor:
    """``ds`` of a tile from ``dp`` (overwritten). ``step(0) = 0`` and ``sign(0) = +1``, as in paper eq. (7)."""
    if not norm.normalized:
        return keep(norm, dp, s).mul_(e)
    if not norm.absolute_denominator:
        return keep(norm, dp.sub_(delta), s).mul_(e)
    if not norm.negative_gradient:
        return keep_positive(dp.sub_(delta), s).mul_(e)
    keep(norm, dp, s).mul_(e)
    # adding 0 gives -0 the sign of 0
    return dp.addcmul_(e.copysign_(s.add_(0.0)) if norm.signed else e, delta, value=-1.0)
