"""Numbers of a stream that is never kept: moments, and a histogram that quantiles are read from. torch only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["FloatHistogram", "Moments", "float64", "sum64"]


def float64(x: Tensor) -> Tensor:
    """In fp64, on the CPU where the device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def sum64(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
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
        x = float64(x)
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
