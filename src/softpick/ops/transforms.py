"""The attention operators under ``torch.func``, and what asks for forward-mode derivatives.

``torch.func.grad``, ``vjp``, ``jacrev``, ``vmap``, any nesting of them, and ``is_grads_batched`` run the tiles and the kernels:
samples are folded into the batch where one call can serve them all, and are called one by one where it cannot. Forward-mode
derivatives and derivatives of derivatives are the reference's alone: :func:`wants_reference` says when ``backend="auto"``
takes it; the other backends raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from softpick.ops import operators, switch

__all__ = ["Backward", "Forward", "has_tangent", "wants_reference"]

_FORWARD = operators.ForwardInputs._fields.index("seed") + 1  # tensors among the arguments: they come first
_BACKWARD = operators.BackwardInputs._fields.index("kept") + 1


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors carries a tangent; in transforms and compiled code, any may where there are tangents."""
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def wants_reference(*tensors: Tensor | None) -> bool:
    """Whether a derivative is taken that only the reference has: a forward-mode one, or that of a derivative."""
    if not torch._C._are_functorch_transforms_active():
        return has_tangent(*tensors)
    if torch.compiler.is_compiling():
        return True  # which transforms they are cannot be asked there
    levels = torch._C._functorch.get_interpreter_stack() or ()
    gradients = sum(level.key() == torch._C._functorch.TransformType.Grad for level in levels)
    return gradients > 1 or has_tangent(*tensors)


class Forward(torch.autograd.Function):
    """The operator ``attention_forward`` for ``torch.func``: the same inputs and outputs."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """The operator."""
        return operators.attention_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """As the operator's."""
        operators.save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As the operator's, by :class:`Backward`."""
        return operators.gradients(ctx, grads[0], Backward.apply)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refused."""
        raise _no_forward_mode(ctx.options["backend"])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Samples in the batch; one by one where they differ in more than query, key, value and mask."""
        n, tensors, dims = info.batch_size, inputs[:_FORWARD], in_dims[:_FORWARD]
        options = inputs[_FORWARD:]
        call, samples = operators.ForwardInputs(*inputs), operators.ForwardInputs(*in_dims)
        if call.seed is not None or call.cu_seqlens_q is not None or samples.sink is not None:
            return _one_by_one(Forward, n, dims, tensors, options)
        batch = _batch(call.query, samples.query)
        folded = {
            name: _fold(getattr(call, name), getattr(samples, name), n, batch, name != "mask")
            for name in ("query", "key", "value", "mask")
        }
        outputs = Forward.apply(*call._replace(**folded))
        return _unfold(outputs, n)


class Backward(torch.autograd.Function):
    """The operator ``attention_backward`` for ``torch.func``: the same inputs and outputs."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """The operator."""
        return operators.attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to save."""
        ctx.backend = operators.BackwardInputs(*inputs).backend

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Refused."""
        operators.no_double_backward(ctx)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refused."""
        raise _no_forward_mode(ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Samples in the batch; one by one where a gradient is a sum over the batch or where they differ in more."""
        n, call = info.batch_size, operators.BackwardInputs(*inputs)
        tensors, dims, options = inputs[:_BACKWARD], in_dims[:_BACKWARD], inputs[_BACKWARD:]
        summed = call.sink is not None or (call.mask_grad and call.mask is not None)
        if summed or call.cu_seqlens_q is not None or call.seed is not None:
            return _one_by_one(Backward, n, dims, tensors, options)
        batch = _batch(call.query, operators.BackwardInputs(*in_dims).query)
        folded = [_fold(x, dim, n, batch, x is not call.mask) for x, dim in zip(tensors, dims, strict=True)]
        return _unfold(Backward.apply(*folded, *options), n)


def _no_forward_mode(backend: str) -> NotImplementedError:
    return NotImplementedError(
        f"the {switch.parse(backend).backend} backend has no forward-mode derivatives; use backend='reference', or 'auto', "
        "which takes it for them"
    )


def _one_by_one(
    function: type[torch.autograd.Function],
    n: int,
    dims: tuple[int | None, ...],
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Call the operator once per sample, and stack the samples at dimension 0 of every output."""
    each = [[x] * n if x is None or dim is None else x.unbind(dim) for x, dim in zip(tensors, dims, strict=True)]
    outputs = [function.apply(*sample, *options) for sample in zip(*each, strict=True)]
    stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def _batch(query: Tensor, dim: int | None) -> int:
    """The batch size of one sample."""
    return query.shape[1 if dim == 0 else 0]


def _fold(x: Tensor | None, dim: int | None, n: int, batch: int, whole: bool) -> Tensor | None:
    """``(B or 1, ...)`` and samples at ``dim`` to ``(n * B, ...)``; without samples 1 stays 1 unless ``whole``."""
    if x is None or (dim is None and x.shape[0] == 1 and not whole):
        return x
    if x.dim() == (1 if dim is None else 2):  # what was not asked for: empty, also of every sample
        return x if dim is None else x.select(dim, 0)
    x = x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(n, batch, *x.shape[2:]).flatten(0, 1)


def _unfold(outputs: tuple[Tensor, ...], n: int) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """``(n * B, ...)`` to ``(n, B, ...)``, and where the samples are; outputs that were not asked for have one dimension."""
    there = [x.dim() > 1 for x in outputs]
    parts = tuple(x.unflatten(0, (n, -1)) if t else x for x, t in zip(outputs, there, strict=True))
    return parts, tuple(0 if t else None for t in there)
