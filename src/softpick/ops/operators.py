"""Attention operators in ``torch.library``: schemas, shapes for tracing, autograd, for the tiled and the Triton backend.

``torch.ops.softpick.attention_forward`` and ``attention_backward`` are opaque to ``torch.compile``: a compiled graph calls them
as one node. Packed sequences go through the same operators with ``cu_seqlens``. Triton is imported where a kernel is called
and nowhere else, because torch for the CPU comes without it. ``backend`` says with a minus which kernels are left out, as in
``"triton,-hopper"`` (``switch.py``): a compiled graph and a backward pass keep what held when they were made.

A fake kernel whose layouts change needs another schema: compiled graphs on disk are found again by schemas
(``tests/test_operator_layouts.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softpick.normalizers import get_normalizer
from softpick.ops import cpu, switch
from softpick.ops.calling import (
    TILES,
    TRITON,
    accumulation_dtype,
    dense,
    empty_heads_last,
    on_device_of,
    plain,
    record_of,
    transformed,
)
from softpick.ops.kernel_errors import KernelError, fall_back, importing_kernels
from softpick.ops.spec import AttentionSpec

__all__ = ["BackwardInputs", "ForwardInputs", "attention", "call_spec"]


def call_spec(
    normalizer: str,
    scale: float,
    eps: float,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    backend: str,
) -> AttentionSpec:
    """The record of a call from the operators' arguments."""
    left, right = min(left, 2**30), min(right, 2**30)  # the kernels add positions to them in 32 bits
    rule = switch.parse(backend)
    return AttentionSpec(
        get_normalizer(normalizer), scale, eps, left, right, bottom_right, softcap, dropout_p,
        backend=rule.backend, without=rule.without,
    )  # fmt: skip


def _seeded(spec: AttentionSpec, seed: Tensor | None, index: int) -> AttentionSpec:
    """The record for one packed sequence, whose dropout has a seed of its own."""
    return spec if seed is None else spec._replace(seed=int(seed.item()) + 1_000_003 * index)


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


def _attention_forward(
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
    backend: str,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute output, lse, row mass, largest score (these two empty unless ``stats``), and what else the backward pass needs.

    Shapes as in ``cpu.forward``. ``backend`` is ``"tiled"`` or ``"triton"``; the longest sequences count for packed
    ones only. The last one is ``saved`` of ``cpu.forward``, ``(B, 2, H, Tq)``; empty for Triton.
    """
    out, lse, mass, largest, kept = _empty_outputs(query, value, stats, backend)
    spec = call_spec(normalizer, scale, eps, left, right, bottom_right, softcap, dropout_p, backend)
    if spec.backend in TRITON:
        try:
            with importing_kernels():
                from softpick.ops.triton import launch
            with on_device_of(query):
                launch.forward(
                    spec,
                    query,
                    key,
                    value,
                    mask,
                    dense(sink),
                    dense(cu_seqlens_q),
                    dense(cu_seqlens_k),
                    seed,
                    max_seqlen_q,
                    out,
                    lse,
                    mass if stats else None,
                    largest if stats else None,
                )
            return out, lse, mass, largest, kept
        except KernelError as failure:
            if spec.backend == "triton":
                raise
            fall_back(failure, TILES)
    for index, (rows, keys) in enumerate(_sequences(query, key, cu_seqlens_q, cu_seqlens_k)):
        cpu.forward(
            _seeded(spec, seed, index),
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            mask,
            sink,
            out[:, :, rows],
            lse[:, :, rows],
            mass[:, :, rows] if stats else None,
            largest[:, :, rows] if stats else None,
            _saved(kept, rows),
        )
    return out, lse, mass, largest, kept


attention_forward = torch.library.custom_op("softpick::attention_forward", _attention_forward, mutates_args=())


def _empty_outputs(
    query: Tensor, value: Tensor, stats: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, t, _ = query.shape
    out = empty_heads_last(query, value)
    dtype = accumulation_dtype(query.dtype)
    lse = query.new_empty(b, h, t, dtype=dtype)
    shape = (b, h, t) if stats else (0,)
    kept = (b, 2, h, t) if backend == "tiled" else (0,)
    mass, largest, saved = (query.new_empty(size, dtype=dtype) for size in (shape, shape, kept))
    return out, lse, mass, largest, saved


def _saved(kept: Tensor, rows: slice) -> tuple[Tensor, ...] | None:
    """The two row statistics of ``cpu.forward``, in what the operator keeps for the backward pass; None where it keeps none."""
    return kept[:, :, :, rows].unbind(1) if kept.dim() == 4 else None


ForwardInputs = record_of(_attention_forward)


@attention_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    call = ForwardInputs(*inputs)
    return _empty_outputs(call.query, call.value, call.stats, call.backend)


def _backward_by_triton(
    spec: AttentionSpec, call: Any, grads: list[Tensor]
) -> tuple[Tensor | None, Tensor | None] | None:
    """Write ``grads`` of query, key and value by the kernels; returns dmask and dsink, or None where no kernel can be built."""
    dquery, dkey, dvalue = grads
    dmask: Tensor | None = None
    if call.mask_grad and call.mask is not None:
        full = (*call.query.shape[:3], call.key.shape[2])
        dmask = torch.zeros(full, dtype=torch.float32, device=call.query.device)
    try:
        with importing_kernels():
            from softpick.ops.triton import launch
        with on_device_of(call.query):
            dsink = launch.backward(
                spec, call.query, call.key, call.value, call.mask, dense(call.sink), dense(call.cu_seqlens_q),
                dense(call.cu_seqlens_k), call.seed, call.max_seqlen_q, call.max_seqlen_k, call.out, call.lse, call.grad_out,
                dquery, dkey, dvalue, dmask,
            )  # fmt: skip
    except KernelError as failure:
        if spec.backend == "triton":
            raise
        fall_back(failure, TILES)
        return None
    return None if dmask is None else dmask.sum_to_size(call.mask.shape), dsink


def _backward_by_tiles(spec: AttentionSpec, call: Any, grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Write ``grads`` of query, key and value by the CPU backend, sequence by sequence; returns dmask and dsink."""
    dquery, dkey, dvalue = grads
    wanted = call.mask_grad and call.mask is not None
    dmask = torch.zeros_like(call.mask, dtype=call.lse.dtype) if wanted else None
    dsink = torch.zeros_like(call.sink, dtype=call.lse.dtype) if call.sink is not None else None
    for index, (rows, keys) in enumerate(_sequences(call.query, call.key, call.cu_seqlens_q, call.cu_seqlens_k)):
        cpu.backward(
            _seeded(spec, call.seed, index), call.query[:, :, rows], call.key[:, :, keys], call.value[:, :, keys],
            call.mask, call.sink, call.out[:, :, rows], call.lse[:, :, rows], call.grad_out[:, :, rows],
            dquery[:, :, rows], dkey[:, :, keys], dvalue[:, :, keys], dmask, dsink, _saved(call.kept, rows),
        )  # fmt: skip
    return dmask, dsink


def _attention_backward(
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
    kept: Tensor,
    normalizer: str,
    scale: float,
    eps: float,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    backend: str,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, mask (empty unless ``mask_grad``) and sink (empty without one)."""
    call = BackwardInputs(
        grad_out, query, key, value, mask, sink, cu_seqlens_q, cu_seqlens_k, seed, out, lse, kept, normalizer, scale, eps, left,
        right, bottom_right, softcap, dropout_p, backend, max_seqlen_q, max_seqlen_k, mask_grad,
    )  # fmt: skip
    spec = call_spec(normalizer, scale, eps, left, right, bottom_right, softcap, dropout_p, backend)
    grads = [torch.empty_like(x) for x in (query, key, value)]

    def clear() -> None:
        for grad in grads if cu_seqlens_q is not None else ():  # rows beyond the last sequence belong to none
            grad.zero_()

    found = None
    if spec.backend in TRITON:
        clear()
        found = _backward_by_triton(spec, call, grads)
    if found is None:
        clear()  # also of whatever a kernel left
        found = _backward_by_tiles(spec, call, grads)
    dmask, dsink = found
    # the gradients get the layout of their inputs, as the fake kernel says
    mask_out = torch.empty_like(mask) if dmask is not None and mask is not None else query.new_empty(0)
    sink_out = torch.empty_like(sink) if sink is not None else query.new_empty(0)
    if dmask is not None:
        cpu.narrow(dmask, mask_out)
    if dsink is not None:
        cpu.narrow(dsink, sink_out)
    return grads[0], grads[1], grads[2], mask_out, sink_out


attention_backward = torch.library.custom_op("softpick::attention_backward", _attention_backward, mutates_args=())


BackwardInputs = record_of(_attention_backward)


@attention_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    call = BackwardInputs(*inputs)
    grads = [torch.empty_like(x) for x in (call.query, call.key, call.value)]
    dmask = torch.empty_like(call.mask) if call.mask is not None and call.mask_grad else call.query.new_empty(0)
    dsink = torch.empty_like(call.sink) if call.sink is not None else call.query.new_empty(0)
    return (*grads, dmask, dsink)


_SAVED = ("query", "key", "value", "mask", "sink", "cu_seqlens_q", "cu_seqlens_k", "seed")  # tensors among the inputs
assert ForwardInputs._fields[:5] == _SAVED[:5] == ("query", "key", "value", "mask", "sink")
_NO_GRADIENT = (None,) * (len(ForwardInputs._fields) - 5)
_KEPT = tuple(name for name in BackwardInputs._fields if name in ForwardInputs._fields and name not in _SAVED)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What :func:`gradients` needs of a call of ``attention_forward``."""
    call = ForwardInputs(*inputs)
    out, lse, mass, largest, kept = output
    ctx.save_for_backward(*(getattr(call, name) for name in _SAVED), out, lse, kept)
    ctx.mark_non_differentiable(lse, mass, largest, kept)
    ctx.options = {name: getattr(call, name) for name in _KEPT}
    ctx.set_materialize_grads(False)


def _grads_batched() -> bool:
    """Whether ``torch.autograd.grad(is_grads_batched=True)`` calls, which takes an operator's samples one by one."""
    level = torch._C._vmapmode_increment_nesting()  # nothing says it without a change
    torch._C._vmapmode_decrement_nesting()
    return level > 1


def gradients(ctx: Any, grad_out: Tensor | None, backward: Any) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs of ``attention_forward``; ``backward`` is a form of ``attention_backward``."""
    if grad_out is None:
        return (None,) * len(ForwardInputs._fields)
    saved = dict(
        zip((*_SAVED, "out", "lse", "kept"), ctx.saved_tensors, strict=True)
    )  # once: checkpointing refuses a second look
    mask_grad = bool(ctx.needs_input_grad[ForwardInputs._fields.index("mask")])
    inputs = BackwardInputs(grad_out=grad_out, **saved, **ctx.options, mask_grad=mask_grad)
    if backward is None:
        # the operator raises the right error where a gradient of the gradient is asked for
        watched = torch.is_grad_enabled() or not plain(grad_out, *saved.values()) or _grads_batched()
        backward = attention_backward if watched else _attention_backward
    dquery, dkey, dvalue, dmask, dsink = backward(*inputs)
    return (dquery, dkey, dvalue, dmask if mask_grad else None, None if inputs.sink is None else dsink, *_NO_GRADIENT)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.compiler.is_compiling() or not transformed():
        return gradients(ctx, grad_out, None)
    from softpick.ops.transforms import Backward  # a transform of the backward pass of a plain call

    return gradients(ctx, grad_out, Backward.apply)


def _setup_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = BackwardInputs(*inputs).backend


def no_double_backward(ctx: Any, *grads: Any) -> Any:
    """The error for the gradient of a gradient."""
    raise NotImplementedError(
        f"the {switch.parse(ctx.backend).backend} backend has no gradient of gradients; use backend='reference', whose "
        "backward pass is differentiable"
    )


attention_forward.register_autograd(_backward, setup_context=save_for_backward)
attention_backward.register_autograd(no_double_backward, setup_context=_setup_backend)


class _Attention(torch.autograd.Function):
    """The operator as an autograd function without torch's dispatcher, which takes longer than a small call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _attention_forward(*inputs)
        save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: str,
    normalizer: str,
    scale: float,
    eps: float,
    left: int,
    right: int,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    bottom_right: bool = False,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the operator; see :func:`softpick.ops.cpu.forward` for shapes. Draws the dropout seed from torch's generator."""
    seed = torch.randint(2**62, (), device=query.device) if dropout_p else None
    trained = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, mask, sink)
    )
    call: Any = attention_forward
    if plain(query, key, value, mask, sink, cu_seqlens_q, cu_seqlens_k):
        call = _Attention.apply if trained else _attention_forward
    elif torch.compiler.is_compiling():
        if transformed():
            raise NotImplementedError(
                f"the {switch.parse(backend).backend} backend has no transforms of torch.func and no forward-mode derivatives "
                "inside torch.compile; use backend='reference'"
            )
    elif transformed():
        from softpick.ops.transforms import Forward

        call = Forward.apply
    return call(
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
        backend,
        max_seqlen_q,
        max_seqlen_k,
    )[:4]
