"""Full-matrix attention in plain torch operations: the oracle, and the only backend that can return weights.

Works in fp64 for fp64 inputs and in fp32 otherwise. Autograd differentiates it as written, except for the weights
themselves, whose gradient is the closed form of ``normalizers.py`` (so that the stop-gradient variant and the
conventions at score 0 are the stated ones). Memory is O(Tq x Tk) a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softpick.normalizers import Normalizer, get_normalizer

__all__ = ["attention_reference", "forward_mode", "normalize", "widen"]


class _Widen(torch.autograd.Function):
    """fp16 to fp32 with a gradient that saturates: near zero the gradient of softpick reaches 1/eps, beyond fp16's range."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.to(torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        limit = torch.finfo(torch.float16).max
        return grad.clamp(-limit, limit).to(torch.float16)


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in the dtype of the computation; gradients that come back saturate in fp16."""
    saturating = x.dtype == torch.float16 and dtype == torch.float32 and not forward_mode()
    return _Widen.apply(x) if saturating else x.to(dtype)


class _Normalize(torch.autograd.Function):
    """``(scores, keep, sink) -> weights, lse, row mass, largest score`` over the last dimension, any normalizer.

    The backward pass is made of differentiable operations, so gradients of gradients are right too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        scores: Tensor, keep: Tensor | None, sink: Tensor | None, name: str, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norm = get_normalizer(name)
        s, rowmax = _masked(scores, keep, norm)
        m = norm.exponent_shift(rowmax, sink)
        f = _excluded(norm.f(s, m), keep)
        g = _excluded(norm.g(s, m), keep)
        total = g.sum(-1, keepdim=True) + norm.c(m, sink) + _eps(eps, norm, m, rowmax, sink)
        weights = f * reciprocal(total)
        lse = (m + torch.log(total.abs() if norm.signed_denominator else total)).squeeze(-1)
        return weights, lse, weights.sum(-1), rowmax.squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scores, keep, sink, name, eps = inputs
        _, lse, mass, rowmax = output
        ctx.save_for_backward(scores, keep, sink)
        ctx.mark_non_differentiable(lse, mass, rowmax)
        ctx.name, ctx.eps = name, eps

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        scores, keep, sink = ctx.saved_tensors
        norm = get_normalizer(ctx.name)
        s, rowmax = _masked(scores, keep, norm)
        m = norm.exponent_shift(rowmax, sink).detach()
        f = _excluded(norm.f(s, m), keep)
        g = _excluded(norm.g(s, m), keep)
        inverse = reciprocal(g.sum(-1, keepdim=True) + norm.c(m, sink) + _eps(ctx.eps, norm, m, rowmax, sink))
        inner = (grad * f).sum(-1, keepdim=True) * inverse  # D of the design notes: sum_i grad_i a_i
        ds = _excluded((norm.df(s, m) * grad - norm.dg(s, m) * inner) * inverse, keep)
        dsink = None
        if sink is not None:
            dsink = (-inner * inverse * norm.c(m, sink)).sum_to_size(sink.shape)
        return ds, None, dsink, None, None


def forward_mode() -> bool:
    """Whether forward-mode derivatives may be taken, in transforms of ``torch.func`` or by dual numbers."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _normalize_in_operations(
    scores: Tensor, keep: Tensor | None, sink: Tensor | None, name: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :class:`_Normalize`, with derivatives of any order and mode.

    A function of one's own has no forward-mode derivative of its forward-mode derivative, without an error. Here values come
    from ``f`` and ``g``; derivatives from a term that is zero, ``+-(base - base.detach())``, with the signs of ``f'``, ``g'``.
    """
    norm = get_normalizer(name)
    s, rowmax = _masked(scores, keep, norm)
    m = norm.exponent_shift(rowmax, sink).detach()
    base = torch.exp(s - m) if norm.base in ("exp", "expm1") else norm._base(s, m)
    moved, slope = base - base.detach(), norm._dbase(s, m).detach()

    def part(value: Tensor, derivative: Tensor) -> Tensor:
        sign = torch.where(slope == 0, 0.0, derivative.detach() / torch.where(slope == 0, 1.0, slope))
        return _excluded(value.detach() + sign * moved, keep)

    f, g = part(norm.f(s, m), norm.df(s, m)), part(norm.g(s, m), norm.dg(s, m))
    total = g.sum(-1, keepdim=True) + norm.c(m, sink) + _eps(eps, norm, m, rowmax, sink)
    weights = f * reciprocal(total)
    lse = (m + torch.log(total.abs() if norm.signed_denominator else total)).squeeze(-1)
    return weights, lse.detach(), weights.sum(-1).detach(), rowmax.squeeze(-1)


def _masked(scores: Tensor, keep: Tensor | None, norm: Normalizer) -> tuple[Tensor, Tensor]:
    """Scores with masked entries at 0 (finite, so no NaN can pass a where), and the largest kept score of each row."""
    visible = scores if keep is None else torch.where(keep, scores, -math.inf)
    if scores.shape[-1] == 0:
        rowmax = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    else:
        rowmax = visible.detach().amax(-1, keepdim=True)
    return (scores if keep is None else torch.where(keep, scores, 0.0)), rowmax


def _eps(eps: float, norm: Normalizer, m: Tensor, rowmax: Tensor, sink: Tensor | None) -> Tensor | float:
    """``eps``, which is relative to the row constant of the mathematics, relative to the ``m`` in use."""
    return eps * torch.exp(norm.row_constant(rowmax, sink).detach() - m) if eps and norm.exponential else eps


def _excluded(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, 0.0)


def reciprocal(total: Tensor) -> Tensor:
    """``1 / total``, 0 where the total is 0 (an empty row has output 0), and finite where it is nearly 0.

    Infinity would turn the zeros of a row whose exponentials all but underflow into NaN.
    """
    empty, limit = total == 0, torch.finfo(total.dtype).max
    return torch.where(empty, 0.0, (1.0 / torch.where(empty, 1.0, total)).clamp(-limit, limit))


def normalize(
    scores: Tensor,
    normalizer: str | Normalizer = "softpick",
    *,
    keep: Tensor | None = None,
    sink: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of a normalizer over the last dimension of ``scores``.

    Args:
        scores: ``(..., n)``, fp32 or fp64.
        normalizer: name or record.
        keep: boolean, broadcastable to ``scores``; False excludes an entry from both sums.
        sink: logits of the learned sink, broadcastable to ``scores`` with last dimension 1.
        eps: added to the anchored denominator; the table's value if None.

    Returns:
        weights ``(..., n)``, and the row statistics lse (log of the denominator with its constant and eps), row mass
        (sum of the weights) and largest kept score, each ``(...)``. The statistics carry no gradient.
    """
    norm = get_normalizer(normalizer)
    if keep is not None:
        keep = keep.expand(scores.shape) if keep.shape != scores.shape else keep
    function: Any = _normalize_in_operations if forward_mode() else _Normalize.apply
    return function(scores, keep, sink, norm.text, norm.eps if eps is None else eps)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    normalizer: str | Normalizer,
    scale: float,
    eps: float,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention by the full score matrix.

    Args:
        query: ``(B, H, Tq, D)``.
        key: ``(B, Hkv, Tk, D)`` with ``H`` a multiple of ``Hkv``.
        value: ``(B, Hkv, Tk, Dv)``.
        normalizer: name or record.
        scale: multiplies ``query @ key^T``.
        eps: added to the anchored denominator.
        keep: boolean, broadcastable to ``(B, H, Tq, Tk)``.
        bias: added to the scaled scores, broadcastable to ``(B, H, Tq, Tk)``.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the bias.
        sink: ``(H,)`` logits for the learned sink.
        dropout_p: probability with which a weight is dropped (the kept ones are scaled up).

    Returns:
        output ``(B, H, Tq, Dv)`` in the query's dtype, lse, row mass and largest score ``(B, H, Tq)`` and the weights
        ``(B, H, Tq, Tk)`` before dropout, in fp32 (fp64 for fp64 inputs).
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    q, k, v = widen(query, work), widen(key, work), widen(value, work)
    if groups != 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q * scale) @ k.transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + widen(bias, work)
    sink_bh11 = None if sink is None else widen(sink, work).view(1, -1, 1, 1)
    weights, lse, mass, largest = normalize(scores, normalizer, keep=keep, sink=sink_bh11, eps=eps)
    dropped = torch.nn.functional.dropout(weights, dropout_p) if dropout_p > 0 else weights
    return (dropped @ v).to(query.dtype), lse, mass, largest, weights
