"""Softpick and linear softpick over one dimension of a tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softpick.ops import numbers, switch
from softpick.ops.arguments import FLOATS
from softpick.ops.backends import TRITON_FLOATS
from softpick.ops.calling import HAS_TRITON
from softpick.ops.operators_rows import rows_forward
from softpick.ops.reference import normalize, widen
from softpick.ops.transforms import has_tangent


def over_dim(name: str, x: Tensor, dim: int, eps: float, where: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """The function ``name`` over a dimension of ``x``; see :func:`softpick.functional.softpick`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if dtype is not None:
        x = x.to(dtype)
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected a floating-point tensor (fp64, fp32, bf16, fp16), got {x.dtype}")
    eps = numbers.number("eps", eps, "a number >= 0", 0.0)
    if not -max(x.dim(), 1) <= numbers.integer("dim", dim) < max(x.dim(), 1):
        raise IndexError(f"dim: expected a dimension of a {x.dim()}-dimensional tensor, got {dim}")
    if name == "softpick" and where is None and takes_rows_kernel(x, dim):
        rows = x.transpose(dim, -1)
        y, _ = rows_forward(rows.reshape(-1, rows.shape[-1]), eps, str(switch.active()._replace(backend="auto")))
        return y.view(rows.shape).transpose(dim, -1)
    keep = x != -math.inf
    if where is not None:
        if not isinstance(where, Tensor) or where.dtype != torch.bool:
            raise TypeError(f"where: expected a boolean tensor, got {getattr(where, 'dtype', type(where).__name__)}")
        try:
            keep = keep & where.expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"where: expected a shape that broadcasts to {tuple(x.shape)}, got {tuple(where.shape)}"
            ) from None
    work = widen(x, torch.promote_types(x.dtype, torch.float32))
    if x.dim() == 0:
        return _weights(name, work[None], keep[None], eps)[0].to(x.dtype)
    last = x.dim() - 1
    out = _weights(name, work.transpose(dim, last), keep.transpose(dim, last), eps)
    return out.transpose(dim, last).to(x.dtype)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def takes_rows_kernel(x: Tensor, dim: int) -> bool:
    """Whether the kernel over rows can take ``x``: on a GPU, unit stride in ``dim``, and no transform of torch.func."""
    return (
        _on_gpu(x)
        and HAS_TRITON
        and switch.active().triton
        and x.dtype in TRITON_FLOATS
        and x.dim() > 0
        and x.numel() > 0
        and x.stride(dim) == 1
        and not (torch._C._are_functorch_transforms_active() or has_tangent(x))
    )


def _weights(name: str, scores: Tensor, keep: Tensor, eps: float) -> Tensor:
    if name != "linear_softpick" or scores.shape[-1] == 0:
        return normalize(scores, name, keep=keep, eps=eps)[0]
    # x / (1 + sum|x|) is unchanged when all is divided by the largest magnitude, and then nothing overflows
    scores = torch.where(keep, scores, 0.0)
    unit = scores.detach().abs().amax(-1, keepdim=True).clamp(min=1.0)
    scaled = scores / unit
    return scaled / (1.0 / unit + scaled.abs().sum(-1, keepdim=True))
