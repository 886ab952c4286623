"""The normalizers in the kernels: base functions, their derivatives, and the rectification.

A new base function is a code in ``CODES``, a branch in each function of this file that has one for ``LINEAR``, and its value
at 0 in :func:`zero_at_zero`. Scores of exponentials are in base 2 (``s log2 e``), those of other base functions natural.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softpick.normalizers import Normalizer

__all__ = ["CODES", "LOG2E", "Constant", "switches"]


class Constant(tl.constexpr):
    """A global constant of the kernels. Before each launch Triton asks every one whether it still has the value of the first;
    its own comparison makes two objects, which was a tenth of the time that Python takes for the forward pass.
    """

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return bool(self.value != getattr(other, "value", other))


LN2, LOG2E = Constant(0.6931471805599453), Constant(1.4426950408889634)
INF = Constant(float("inf"))

EXP, EXPM1, LINEAR = Constant(0), Constant(1), Constant(2)
NONE, POSITIVE, NONNEGATIVE = Constant(0), Constant(1), Constant(2)
ONE, SINK = Constant(1), Constant(2)  # constants of the denominator; 0 is none

CODES = {"exp": EXP.value, "expm1": EXPM1.value, "linear": LINEAR.value}
"""The base functions that the kernels have, by their name in the table (``Normalizer.base``)."""


def switches(norm: Normalizer) -> dict[str, int | bool]:
    """A record of the table as compile-time arguments."""
    return {
        "BASE": CODES[norm.base],
        "RECTIFY": {"none": 0, "positive": 1, "nonnegative": 2}[norm.rectify],
        "ABSOLUTE": norm.absolute_denominator,
        "CONSTANT": {0: 0, 1: 1, "sink": 2}[norm.constant],
        "NEGATIVE_GRADIENT": norm.negative_gradient,
    }


@triton.constexpr_function
def exponential(base):
    """Whether sums are relative to a running maximum of the scores, and scores in base 2."""
    return base in (0, 1)


@triton.constexpr_function
def zero_at_zero(base):
    """Whether the base function of 0 is 0: a score of 0 is given to a key that a query does not see; else minus infinity."""
    if base == 0:
        return False
    if base in (1, 2):
        return True
    raise NotImplementedError("zero_at_zero: a new base function has to be listed here")


@triton.constexpr_function
def anchored(base, rectify, constant):
    """Whether exponents are relative to at least 0 (softmax alone has no such anchor)."""
    return base != 0 or rectify != 0 or constant != 0


@triton.constexpr_function
def needs_relu(base):
    """Whether :func:`weights` leaves the rectification to the conversion to another dtype (``narrow`` of device.py)."""
    return base == 1


@triton.jit
def expm1_exp2(x):
    """``2^x - 1`` for ``x <= 0`` without cancellation."""
    y = x * LN2
    series = y * (1.0 + y * (0.5 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720))))))
    return tl.where(y > -0.25, series, tl.exp2(x) - 1.0)


@triton.jit
def signed(e, by):
    """``e >= 0`` with the sign of ``by``."""
    bits = e.to(tl.int32, bitcast=True) | (by.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def numerators(s, m, BASE: tl.constexpr, SHIFT: tl.constexpr, EXACT: tl.constexpr):
    """The base function of the scores relative to ``m`` (0 unless SHIFT), before the rectification."""
    if BASE == LINEAR:
        return s
    elif BASE == EXP:
        if SHIFT:
            return tl.exp2(s - m)
        else:
            return tl.exp2(s)
    elif EXACT:
        # sign(s) 2^(max(s, 0) - m) (1 - 2^-|s|): neither cancellation nor overflow
        magnitude = tl.exp2(tl.maximum(s, 0.0) - m) * -expm1_exp2(-tl.abs(s))
        return tl.where(s < 0, -magnitude, magnitude)
    elif SHIFT:
        return tl.exp2(s - m) - tl.exp2(-m)
    else:
        return tl.exp2(s) - 1.0


@triton.jit
def kept_scores(x, s, RECTIFY: tl.constexpr):
    """``x`` where the numerator keeps the score, else 0."""
    if RECTIFY == POSITIVE:
        return tl.where(s > 0, x, 0.0)
    elif RECTIFY == NONNEGATIVE:
        return tl.where(s >= 0, x, 0.0)
    else:
        return x


@triton.jit
def any_kept(s, RECTIFY: tl.constexpr):
    """For each key, whether the numerator keeps a score of any of the queries."""
    if RECTIFY == POSITIVE:
        return tl.max(s, 0) > 0
    else:
        return tl.max(s, 0) >= 0


@triton.jit
def derivative(s, level, inverse, BASE: tl.constexpr):
    """``e``: the derivative of the base function, divided by the denominator ``2^level``, which is ``1 / inverse``."""
    if BASE == LINEAR:
        return tl.zeros_like(s) + inverse  # that inverse is an ulp too large is of no account here
    else:
        return tl.exp2(s - level)


@triton.jit
def slopes(s, e, inverse, BASE: tl.constexpr, EXACT: tl.constexpr, EDGE: tl.constexpr):
    """For EXPM1: ``f / l`` up to a relu, and ``e`` with a minus where the score is not positive.

    ``e - inverse = (e^s - 1) / l`` has the sign of the score: ``inverse`` is an ulp above ``1 / l``, so that a score of 0
    counts as negative. EDGE: small scores by a series, since the difference may have lost them where ``l`` is small, too,
    which takes a row with few keys.
    """
    if BASE != EXPM1:
        return e, e
    elif EXACT:
        p = tl.where(s > 0, e * -expm1_exp2(-tl.maximum(s, 0.0)), 0.0)
        return p, tl.where(s > 0, e, -e)
    else:
        p = e - inverse
        if EDGE:
            near = s * (LN2 - (0.5 * LN2 * LN2) * s)  # of 1 - 2^-s, to 8e-5; below 0 for a score of 0
            p = tl.where(tl.abs(s) < 0.03125, e * near - 1e-37, p)
        return p, signed(e, p)


@triton.jit
def weights(p, e, s, BASE: tl.constexpr, RECTIFY: tl.constexpr):
    """The weights (for EXPM1 up to a relu), with ``p`` and ``e`` of :func:`slopes`."""
    if BASE == LINEAR:
        return s * e
    elif BASE == EXP:
        return kept_scores(e, s, RECTIFY)
    else:
        return p


@triton.jit
def careful_numerators(s, level, inverse, BASE: tl.constexpr):
    """The base function divided by the denominator, without cancellation, before the rectification."""
    if BASE == LINEAR:
        return s * inverse
    elif BASE == EXP:
        return tl.exp2(s - level)
    else:
        return signed(tl.exp2(tl.maximum(s, 0.0) - level) * -expm1_exp2(-tl.abs(s)), s)


@triton.jit
def score_gradient(
    s, e, dp, delta, low,
    BASE: tl.constexpr, RECTIFY: tl.constexpr, ABSOLUTE: tl.constexpr, NEGATIVE_GRADIENT: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """``ds`` of a tile, with ``e`` of :func:`slopes`. With TWO, ``D`` is the sum of ``delta`` and ``low``."""
    above = dp - delta
    if TWO:
        above -= low
    if BASE == EXPM1 and ABSOLUTE and NEGATIVE_GRADIENT:
        if TWO:
            return e * tl.where(e > 0, above, -delta - low)
        else:
            return tl.maximum(e, 0.0) * dp - e * delta
    elif BASE == EXPM1:
        return tl.maximum(e, 0.0) * above
    elif BASE == LINEAR:
        return e * tl.where(s > 0, above, dp + (delta + low) if TWO else dp + delta)
    else:
        # the product first: below a sink that is all there is, e of what is not kept may be infinite
        return kept_scores(e * above, s, RECTIFY)
