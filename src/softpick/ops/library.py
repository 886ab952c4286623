"""Operators of the tiled backend in ``torch.library``: schemas, shapes for tracing, and autograd.

``torch.ops.softpick.tiled_forward`` and ``tiled_backward`` are opaque to ``torch.compile``: a compiled graph calls them
as one node. Packed sequences go through the same operators with ``cu_seqlens``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softpick.normalizers import get_normalizer
from softpick.ops import tiled

__all__ = ["tiled_attention"]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sequences(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[tuple[slice, slice]]:
    """Slices of the packed time dimensions, one pair a sequence."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return [(slice(0, query.shape[2]), slice(0, key.shape[2]))]
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [
        (slice(q0, q1), slice(k0, k1))
        for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    ]


@torch.library.custom_op("softpick::tiled_forward", mutates_args=())
def tiled_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    normalizer: str,
    scale: float,
    eps: float,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, lse, row mass and largest score (the last two empty unless ``stats``). Shapes as in ``tiled.forward``."""
    out, lse, mass, largest = _empty_outputs(query, value, stats)
    for index, (rows, keys) in enumerate(_sequences(query, key, cu_seqlens_q, cu_seqlens_k)):
        spec = _spec(normalizer, scale, eps, left, right, bottom_right, softcap, dropout_p, seed, index)
        tiled.forward(
            spec,
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            mask,
            sink,
            out[:, :, rows],
            lse[:, :, rows],
            mass[:, :, rows] if stats else None,
            largest[:, :, rows] if stats else None,
        )
    return out, lse, mass, largest


def _empty_outputs(query: Tensor, value: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, t, _ = query.shape
    # (B, T, H, D) in memory: what models reshape the output to, and contiguous for packed sequences
    out = query.new_empty(b, t, h, value.shape[-1]).transpose(1, 2)
    dtype = _accumulation_dtype(query.dtype)
    lse = query.new_empty(b, h, t, dtype=dtype)
    shape = (b, h, t) if stats else (0,)
    return out, lse, query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=dtype)


def _spec(
    normalizer: str,
    scale: float,
    eps: float,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    index: int,
) -> tiled.TileSpec:
    start = 0 if seed is None else int(seed.item()) + 1_000_003 * index
    return tiled.TileSpec(get_normalizer(normalizer), scale, eps, left, right, bottom_right, softcap, dropout_p, start)


@tiled_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(query, value, bool(args[-1]))


@torch.library.custom_op("softpick::tiled_backward", mutates_args=())
def tiled_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    normalizer: str,
    scale: float,
    eps: float,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, mask (empty unless ``mask_grad``) and sink (empty without one)."""
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
    dmask = torch.zeros_like(mask, dtype=lse.dtype) if mask_grad and mask is not None else None
    dsink = torch.zeros_like(sink, dtype=lse.dtype) if sink is not None else None
    if cu_seqlens_q is not None:
        for grad in (dquery, dkey, dvalue):  # rows beyond the last sequence belong to none
            grad.zero_()
    for index, (rows, keys) in enumerate(_sequences(query, key, cu_seqlens_q, cu_seqlens_k)):
        spec = _spec(normalizer, scale, eps, left, right, bottom_right, softcap, dropout_p, seed, index)
        tiled.backward(
            spec,
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            mask,
            sink,
            out[:, :, rows],
            lse[:, :, rows],
            grad_out[:, :, rows],
            dquery[:, :, rows],
            dkey[:, :, keys],
            dvalue[:, :, keys],
            dmask,
            dsink,
        )
    nothing = query.new_empty(0)
    return (
        dquery,
        dkey,
        dvalue,
        nothing if dmask is None or mask is None else dmask.to(mask.dtype),
        nothing.clone() if dsink is None or sink is None else dsink.to(sink.dtype),
    )


@tiled_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sink: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    grads = [torch.empty_like(x) for x in (query, key, value)]
    dmask = torch.empty_like(mask) if mask is not None and args[-1] else query.new_empty(0)
    dsink = torch.empty_like(sink) if sink is not None else query.new_empty(0)
    return (*grads, dmask, dsink)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, mask, sink, cu_seqlens_q, cu_seqlens_k, seed, *options, _stats = inputs
    out, lse, mass, largest = output
    ctx.save_for_backward(query, key, value, mask, sink, cu_seqlens_q, cu_seqlens_k, seed, out, lse)
    ctx.mark_non_differentiable(lse, mass, largest)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nones = (None,) * 17
    if grad_out is None:
        return nones
    query, key, value, mask, sink, cu_seqlens_q, cu_seqlens_k, seed, out, lse = ctx.saved_tensors
    mask_grad = bool(ctx.needs_input_grad[3])
    dquery, dkey, dvalue, dmask, dsink = tiled_backward(
        grad_out, query, key, value, mask, sink, cu_seqlens_q, cu_seqlens_k, seed, out, lse, *ctx.options, mask_grad
    )
    return (
        dquery,
        dkey,
        dvalue,
        dmask if mask_grad else None,
        dsink if sink is not None else None,
        *nones[5:],
    )


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "the tiled backend has no gradient of gradients; use backend='reference', whose backward pass is differentiable"
    )


tiled_forward.register_autograd(_backward, setup_context=_setup_context)
tiled_backward.register_autograd(_no_double_backward)


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    normalizer: str,
    scale: float,
    eps: float,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    left: int = -1,
    right: int = -1,
    bottom_right: bool = False,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the operator; see :func:`softpick.ops.tiled.forward` for shapes. Draws the dropout seed from torch's generator."""
    seed = torch.randint(2**62, (), device=query.device) if dropout_p else None
    return tiled_forward(
        query,
        key,
        value,
        mask,
        sink,
        cu_seqlens_q,
        cu_seqlens_k,
        seed,
        normalizer,
        scale,
        eps,
        left,
        right,
        bottom_right,
        softcap or 0.0,
        dropout_p,
        stats,
    )
