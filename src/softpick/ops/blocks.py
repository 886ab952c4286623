"""Attention over some of the keys, for :mod:`softpick.distributed`: the same kernels, nothing recorded for autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from softpick.ops import cpu
from softpick.ops.calling import TILES, TRITON, accumulation_dtype, dense, on_device_of
from softpick.ops.kernel_errors import KernelError, fall_back, importing_kernels
from softpick.ops.operators import call_spec

__all__ = ["block_backward", "block_forward"]


def block_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    *,
    backend: str,
    normalizer: str,
    scale: float,
    eps: float,
    is_causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and largest score over these keys alone in the accumulation dtype (not rounded before the merge), lse in fp64."""
    b, h, t, _ = query.shape
    dtype = accumulation_dtype(query.dtype)
    out = query.new_empty(b, h, t, value.shape[-1], dtype=dtype)
    lse, mass, largest = (query.new_empty(b, h, t, dtype=dtype) for _ in range(3))
    right = 0 if is_causal else -1
    spec = call_spec(normalizer, scale, eps, -1, right, False, softcap, 0.0, backend)
    if spec.backend in TRITON:
        try:
            with importing_kernels():
                from softpick.ops.triton import launch
            with on_device_of(query):
                launch.forward(
                    spec, query, key, value, None, dense(sink), None, None, None, 0, out, lse, mass, largest
                )  # fmt: skip
            return out, lse.double(), largest
        except KernelError as failure:
            if spec.backend == "triton":
                raise
            fall_back(failure, TILES)
    saved = torch.empty_like(lse), torch.empty_like(lse)
    cpu.forward(spec, query, key, value, None, sink, out, lse, mass, largest, saved)
    return out, cpu.to_lse(saved, lse, sink), largest


def block_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    backend: str,
    normalizer: str,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from these keys, given ``out`` and ``lse`` (fp64) over all keys.

    Nothing else of the other keys enters: with the denominator in ``lse`` and ``D = do . out`` the gradient is a sum over
    keys. In the accumulation dtype (``backward.py`` rounds each block to the inputs' dtype first).
    """
    dtype = accumulation_dtype(query.dtype)
    dquery, dkey, dvalue = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    right = 0 if is_causal else -1
    spec = call_spec(normalizer, scale, 0.0, -1, right, False, softcap, 0.0, backend)._replace(part=True)
    if spec.backend in TRITON:
        try:
            with importing_kernels():
                from softpick.ops.triton import launch
            with on_device_of(query):
                launch.backward(
                    spec, query, key, value, None, None, None, None, None, 0, 0, out, lse.to(dtype), grad_out, dquery, dkey,
                    dvalue, None,
                )  # fmt: skip
            return dquery, dkey, dvalue
        except KernelError as failure:
            if spec.backend == "triton":
                raise
            fall_back(failure, TILES)
    level, inverse = (x.to(dtype) for x in cpu.from_lse(spec, lse))
    cpu.backward(
        spec, query, key, value, None, None, out, lse.to(dtype), grad_out, dquery, dkey, dvalue, saved=(level, inverse)
    )  # fmt: skip
    return dquery, dkey, dvalue
