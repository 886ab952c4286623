"""The public functions over one dimension of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from softpick.ops.vector import over_dim

__all__ = ["linear_softpick", "softpick"]


def softpick(
    x: Tensor, dim: int = -1, eps: float = 1e-6, where: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Softpick over one dimension: ``relu(e^x_i - 1) / (sum_j |e^x_j - 1| + eps)``, numerically safe.

    Drop-in for ``torch.softmax(x, dim)``; paper eq. (1)-(2), evaluated relative to ``m = max(0, max_j x_j)`` so that every
    finite input has a finite value and gradient. Computed in fp32 (fp64 for fp64), differentiable twice.

    Args:
        x: any shape, floating point. Entries of minus infinity are excluded, as masks for softmax expect.
        dim: dimension to normalize over.
        eps: added to the denominator once that was divided by ``e^m``.
        where: boolean, broadcastable to ``x``; False excludes an entry: its output is 0 and it counts nowhere.
        dtype: dtype of the result (and of the input before anything else), as in ``torch.softmax``.

    Returns:
        Tensor of the shape of ``x``, entries in [0, 1], rows summing to at most 1.

    Raises:
        TypeError: for an integer or complex ``x``, or a ``where`` that is not boolean.
        ValueError: for a ``where`` that cannot be broadcast, or a negative eps.
        IndexError: for a ``dim`` out of range.
    """
    return over_dim("softpick", x, dim, eps, where, dtype)


def linear_softpick(x: Tensor, dim: int = -1, where: Tensor | None = None) -> Tensor:
    """``x_i / (1 + sum_j |x_j|)`` over one dimension: signed, no exponentials (Edifice.Blocks.Softpick).

    Args:
        x: any shape, floating point; computed in fp32 (fp64 for fp64). Entries of minus infinity are excluded.
        dim: dimension to normalize over.
        where: boolean, broadcastable to ``x``; False excludes an entry.

    Returns:
        Tensor of the shape and dtype of ``x`` with ``sum |y| < 1``.

    Raises:
        TypeError: for an integer or complex ``x``, or a ``where`` that is not boolean.
        ValueError: for a ``where`` that cannot be broadcast.
        IndexError: for a ``dim`` out of range.
    """
    return over_dim("linear_softpick", x, dim, 0.0, where, None)
