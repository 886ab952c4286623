"""What a call of attention is besides its tensors: one record for the CPU backend and for the kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

from softpick.normalizers import Normalizer

__all__ = ["LOG2E", "AttentionSpec"]

LOG2E = math.log2(math.e)


class AttentionSpec(NamedTuple):
    """What a call computes, besides its tensors."""

    norm: Normalizer
    scale: float
    """Factor on the scores."""
    eps: float
    """Added to the denominator, relative to the largest score."""
    left: int = -1
    """How many keys before its diagonal a query sees; -1: all."""
    right: int = -1
    """How many keys behind its diagonal a query sees; -1: all."""
    bottom_right: bool = False
    """Whether the diagonal ends in the last query and key, and not begins in the first ones."""
    softcap: float = 0.0
    """Scores are ``softcap * tanh(score / softcap)``; 0: none."""
    dropout_p: float = 0.0
    part: bool = False
    """Backward: the keys are some of those that the output and lse are of (ring attention), so ``D`` of a row is not a sum over
    these keys."""
    seed: int = 0
    """Of dropout, on the CPU; kernels read theirs from a tensor."""
    backend: str = ""
    """``"tiled"``, ``"triton"``, or ``"auto"``: Triton, and the tiles where a kernel cannot be built."""
    without: frozenset[str] = frozenset()
    """Kernel families that are left out (``switch.py``)."""

    @property
    def exponential(self) -> bool:
        """Whether scores are taken to base 2."""
        return self.norm.exponential

    @property
    def score_scale(self) -> float:
        """Factor on the query: the scale, and log2(e) unless a softcap comes in between."""
        return self.scale * (LOG2E if self.exponential and not self.softcap else 1.0)
