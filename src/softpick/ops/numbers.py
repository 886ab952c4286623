"""Numbers among the arguments of public functions: checked here, so that every function refuses the same ones.

Errors are one sentence: which argument, what was expected, what came. ``TypeError`` for what is no number (a string, a
boolean, None), ``ValueError`` for a number out of range, NaN and infinity among them. Numbers that a compiler stands in for
(``torch.SymInt``, ``torch.SymFloat``), numpy's scalars and tensors of one element without a gradient are numbers.
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["flags", "integer", "number", "probability"]

_LARGEST = sys.float_info.max


def number(
    name: str, x: Any, expected: str = "a finite number", low: float = -math.inf, *, exclusive: bool = False
) -> float:
    """``x`` as a number if it is finite and at least ``low`` (above it if ``exclusive``), else an error.

    Args:
        name: the argument, for the message.
        x: what came.
        expected: what is expected, for the message.
        low: the smallest allowed number.
        exclusive: whether ``low`` itself is refused.
    """
    if type(x) is not float and type(x) is not int:
        x = _plain(name, x, expected)
    if not -_LARGEST <= x <= _LARGEST or x < low or (exclusive and x == low):
        raise ValueError(f"{name}: expected {expected}, got {x}")
    return x


def probability(name: str, x: Any) -> float:
    """``x`` if it is a number from 0 to 1, else an error."""
    if type(x) is not float and type(x) is not int:
        x = _plain(name, x, "a probability in [0, 1]")
    if not 0.0 <= x <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {x}")
    return x


def integer(name: str, x: Any, low: int | None = None) -> Any:
    """``x`` if it is an integer and at least ``low``, else an error."""
    expected = "an integer" if low is None else f"an integer >= {low}"
    if type(x) is not int and (isinstance(x, bool) or not isinstance(x, numbers.Integral | torch.SymInt)):
        raise TypeError(f"{name}: expected {expected}, got {_described(x)}")
    if low is not None and x < low:
        raise ValueError(f"{name}: expected {expected}, got {x}")
    return x


def flags(**arguments: Any) -> None:
    """Raise for the first argument that is no boolean."""
    for name, x in arguments.items():
        if type(x) is not bool and not isinstance(x, torch.SymBool) and type(x).__name__ not in ("bool", "bool_"):
            raise TypeError(f"{name}: expected True or False, got {_described(x)}")


def _plain(name: str, x: Any, expected: str) -> Any:
    """Whether ``x`` is a number of Python, or what a compiler puts in the place of one."""
    if (
        isinstance(x, Tensor)
        and x.numel() == 1
        and not x.requires_grad
        and x.dtype != torch.bool
        and not x.is_complex()
    ):
        return x.item()
    if isinstance(x, bool) or not isinstance(x, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name}: expected {expected}, got {_described(x)}")
    return (
        x if isinstance(x, torch.SymInt | torch.SymFloat) else int(x) if isinstance(x, numbers.Integral) else float(x)
    )


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        gradient = " that requires a gradient" if x.requires_grad else ""
        return f"a tensor of shape {tuple(x.shape)} and {x.dtype}{gradient}"
    return "None" if x is None else f"{x!r} ({type(x).__name__})"
