"""Operators for softpick over the rows of a matrix: ``softpick::rows_forward`` and ``softpick::rows_backward``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softpick.ops import switch
from softpick.ops.calling import on_device_of, plain
from softpick.ops.kernel_errors import KernelError, fall_back, importing_kernels
from softpick.ops.reference import normalize

__all__ = ["rows_forward"]


def _rows_forward(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """Softpick over the last dimension of ``(rows, n)``, and the lse of each row (fp32), by Triton."""
    y, lse = _empty_rows(x)
    if x.shape[1] == 0:
        return y, lse.fill_(math.log(eps) if eps else -math.inf)
    try:
        with importing_kernels():
            from softpick.ops.triton import launch_rows
        with on_device_of(x):
            launch_rows.softpick_forward(_unit_stride(x), eps, y, lse, switch.parse(backend).without)
    except KernelError as failure:
        fall_back(failure, "torch computes softpick over rows instead")
        return _rows_by_torch(x, eps)
    return y, lse


def _rows_by_torch(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, lse, *_ = normalize(x.float(), "softpick", keep=x != -math.inf, eps=eps)
    return y.to(x.dtype), lse


_rows_operator = torch.library.custom_op("softpick::rows_forward", _rows_forward, mutates_args=())


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@_rows_operator.register_fake
def _(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_rows(x)


def _rows_backward(grad: Tensor, x: Tensor, lse: Tensor, eps: float, backend: str) -> Tensor:
    """Gradient of :func:`_rows_forward`. (``eps`` is in ``lse``; the gradient of this gradient wants it.)"""
    # near zero the gradient reaches 1 / eps, beyond fp16's range: saturate, as the CPU path does
    half = x.dtype == torch.float16
    dx = x.new_empty(x.shape, dtype=torch.float32 if half else x.dtype)
    try:
        with importing_kernels():
            from softpick.ops.triton import launch_rows
        with on_device_of(x):
            launch_rows.softpick_backward(_unit_stride(x), lse, _unit_stride(grad), dx, switch.parse(backend).without)
    except KernelError as failure:
        fall_back(failure, "torch computes the gradient of softpick over rows instead")
        with torch.enable_grad():
            leaf = x.detach().float().requires_grad_()
            (dx,) = torch.autograd.grad(_rows_by_torch(leaf, eps)[0], leaf, grad.float())
        dx = dx if half else dx.to(x.dtype)
    limit = torch.finfo(torch.float16).max
    return dx.clamp_(-limit, limit).to(x.dtype) if half else dx


_rows_backward_operator = torch.library.custom_op("softpick::rows_backward", _rows_backward, mutates_args=())


@_rows_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, lse: Tensor, eps: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_rows(ctx: Any, inputs: tuple[Tensor, float, str], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rows_gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    saved = ctx.saved_tensors
    watched = torch.is_grad_enabled() or not plain(grad, *saved)
    backward: Any = _rows_backward_operator if watched else _rows_backward
    return backward(grad, *saved, ctx.eps, ctx.backend), None, None


def _setup_rows_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, str], output: Tensor) -> None:
    grad, x, _, eps, _ = inputs
    ctx.save_for_backward(grad, x)
    ctx.eps = eps


def _rows_second_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    """The gradient of the gradient, in torch operations: too few programs need it for a kernel."""
    with torch.enable_grad():
        first, x = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        y, _ = _rows_by_torch(x, ctx.eps)
        (dx,) = torch.autograd.grad(y, x, first, create_graph=True)
        of_first, of_x = torch.autograd.grad(dx, (first, x), grad)
    return of_first, of_x, None, None, None


_rows_operator.register_autograd(_rows_gradient, setup_context=_setup_rows)
_rows_backward_operator.register_autograd(_rows_second_gradient, setup_context=_setup_rows_backward)


class _Rows(torch.autograd.Function):
    """The operator as an autograd function without torch's dispatcher, which takes longer than a small call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
        output = _rows_forward(x, eps, backend)
        _setup_rows(ctx, (x, eps, backend), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        return _rows_gradient(ctx, *grads)


def rows_forward(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """:func:`_rows_forward` with its gradient, by the operator where :func:`plain` is false."""
    call: Any = _Rows.apply if plain(x) else _rows_operator
    return call(x, eps, backend)


@_rows_operator.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, None, None], x: Tensor, eps: float, backend: str
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    # transforms traced by torch.compile come here; others take the torch operations
    batched = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x[None]
    y, lse = _rows_operator(batched.reshape(-1, batched.shape[-1]), eps, backend)
    return (y.view(batched.shape), lse.view(batched.shape[:-1])), (0, 0)
