"""What every launch of an attention kernel needs: compile-time switches, strides of a mask, the order of programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softpick.ops.kernel_errors import KernelError, fall_back
from softpick.ops.spec import AttentionSpec
from softpick.ops.triton import tuning
from softpick.ops.triton.base_functions import LOG2E, switches
from softpick.ops.triton.device import FEW, FEW_ROWS
from softpick.ops.triton.dispatch import PORTABLE_TAKES, capability
from softpick.ops.triton.shapes import cdiv, padded

__all__ = [
    "capped_unit",
    "common_switches",
    "dependent_launch",
    "drop_probability",
    "few_programs",
    "mask_arguments",
    "pairs_together",
    "relu_asm",
    "row_bytes",
    "score_unit",
    "sequence_sizes",
    "tried",
]


def _precision(dtype: torch.dtype) -> str:
    """fp32 products as torch's own: exact unless ``torch.set_float32_matmul_precision`` allows tf32."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def score_unit(spec: AttentionSpec) -> float:
    """Factor on the product ``q k``: to the tile's units, or to natural ones where the softcap is applied first."""
    return spec.scale if spec.softcap or not spec.norm.exponential else spec.scale * LOG2E.value


def capped_unit(spec: AttentionSpec) -> tuple[float, float]:
    """For ``hopper/``: the factor on the product ``q k``, and with a softcap the one on its tanh."""
    if not spec.softcap:
        return score_unit(spec), 0.0
    return spec.scale / spec.softcap, spec.softcap * LOG2E.value


def drop_probability(spec: AttentionSpec) -> float:
    """The probability of dropping, short of 1: the kernels divide by what is left."""
    return min(spec.dropout_p, 1.0 - 1e-9)


def common_switches(spec: AttentionSpec, query: Tensor, value: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Compile-time switches that all attention kernels have."""
    width, v_width = query.shape[-1], value.shape[-1]
    return {
        **switches(spec.norm),
        "BLOCK_D": padded(width),
        "BLOCK_DV": padded(v_width),
        "PAD_D": padded(width) != width,
        "PAD_DV": padded(v_width) != v_width,
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        "MASK_ROWS": mask is not None and mask.shape[2] != 1,
        "LEFT": spec.left >= 0,
        "RIGHT": spec.right >= 0,
        "BOTTOM_RIGHT": spec.bottom_right,
        "SOFTCAP": spec.softcap > 0,
        "EXACT": query.dtype == torch.float32,
        "PRECISION": _precision(query.dtype),
    }


def relu_asm(query: Tensor) -> bool:
    """Whether relu and the conversion to 16 bits are one instruction."""
    return query.dtype in (torch.bfloat16, torch.float16) and capability(query) >= 8


def dependent_launch(query: Tensor) -> bool:
    """Whether a kernel can be launched before the one it depends on has ended."""
    return capability(query) >= 9


def mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """The mask as a kernel reads it, and its strides: 0 where a dimension is 1."""
    if mask is None:
        return None, (0, 0, 0, 0)
    strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), tuple(strides)  # type: ignore[return-value]


def sequence_sizes(query: Tensor, cu_q: Tensor | None, longest: int) -> tuple[int, int]:
    """How many sequences the batch has, and how many queries the longest of them."""
    return (query.shape[0], query.shape[2]) if cu_q is None else (cu_q.numel() - 1, longest)


def row_bytes(*tensors: Tensor) -> int:
    """Bytes of a position of one head."""
    return sum(x.shape[-1] * x.element_size() for x in tensors)


def pairs_together(pairs: int, sharing: int, read: int, tiles: int) -> int:
    """How many pairs of head and sequence run at a time (:func:`softpick.ops.triton.device.assignment`).

    ``sharing`` of them read the same ``read`` bytes over and over, which should come from the L2 cache; each has ``tiles``.
    """
    return max(1, min(pairs, max(tuning.FEWEST_TOGETHER // max(1, tiles), tuning.L2_SHARE // max(1, read) * sharing)))


def few_programs(spec: AttentionSpec, query: Tensor, tq: int, tk: int, mask: Tensor | None, packed: bool) -> int:
    """How many programs of a head take the rows that see at most ``device.FEW`` keys; 0 if there are none."""
    if mask is not None and mask.shape[2] == 1 and spec.left < 0:
        return tuning.MASK_PROGRAMS
    offset = tk - tq if spec.bottom_right else 0
    bounded = spec.right >= 0
    first, last = (max(0, -(offset + spec.right)) if bounded else 0), tq
    if mask is None:
        high = min(tk, tq + offset + spec.right) if bounded else tk
        low = max(0, tq - 1 + offset - spec.left) if spec.left >= 0 else 0
        if high - low > FEW.value:
            last = min(tq, FEW.value - offset - spec.right) if bounded else first
    return max(int(packed), cdiv(max(0, last - first), FEW_ROWS.value))  # each packed sequence may be a short one


def tried(kernels: Callable[..., Any], *args: Any) -> Any:
    """Call ``kernels`` of ``hopper/`` with these arguments; None, with a warning, where they cannot be built."""
    try:
        return kernels(*args)
    except KernelError as failure:
        fall_back(failure, PORTABLE_TAKES)
        return None
