"""Integers that launches need, without Triton's own helpers, which take as long as allocating a tensor."""

from __future__ import annotations

__all__ = ["cdiv", "padded", "power_of_2"]


def cdiv(x: int, y: int) -> int:
    """``x / y`` rounded up (``triton.cdiv`` looks for compile-time arguments first)."""
    return (x + y - 1) // y


def power_of_2(x: int) -> int:
    """The smallest power of 2 that is at least ``x``."""
    return 1 << (int(x) - 1).bit_length()


def padded(width: int) -> int:
    """The head dimension that kernels work with: a power of 2, at least 16."""
    return max(16, power_of_2(width))
