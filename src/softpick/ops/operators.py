"""Operators in ``torch.library``: schemas, shapes for tracing, and autograd, for the tiled and the Triton backend.

``torch.ops.softpick.attention_forward`` and its siblings are opaque to ``torch.compile``: a compiled graph calls them as
one node. Packed sequences go through the same operators with ``cu_seqlens``. Triton is imported where a kernel is called
and nowhere else, because torch for the CPU comes without it.

Nothing but a compiler, a mode or a transform can tell an operator from the function below it, and the dispatcher takes
longer over twenty arguments than a GPU over a short sequence: plain tensors go to the function directly (:func:`_plain`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softpick.normalizers import get_normalizer
from softpick.ops import cpu
from softpick.ops.kernel_errors import KernelError, fall_back
from softpick.ops.reference import normalize

if TYPE_CHECKING:
    from softpick.ops.triton.launch import Options

__all__ = [
    "HAS_TRITON",
    "accumulation_dtype",
    "attention",
    "block_backward",
    "block_forward",
    "decode",
    "interpreted",
    "rows_forward",
]

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; finding it does not import it."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``), which takes tensors on the CPU."""
    if not HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


TRITON = ("triton", "auto")
"""Backends whose kernels are Triton's; with ``"auto"`` tiles of torch take the place of one that cannot be built."""
_TILES = "tiles of torch compute it instead, slowly (backend='auto')"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums over inputs of a dtype are kept, and lse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    if x.is_cuda:
        return torch.cuda.device(x.get_device())
    if not interpreted():  # the public functions say so earlier, except in compiled code
        raise ValueError(f"expected CUDA tensors for the 'triton' backend, got one on {x.device}")
    return contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Attention


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
    """Output, lse, row mass, largest score (these two empty unless ``stats``), and what else the backward pass wants.

    Shapes as in ``tiled.forward``. ``backend`` is ``"tiled"`` or ``"triton"``; the longest sequences count for packed
    ones only. The last one is ``saved`` of ``tiled.forward``, ``(B, 2, H, Tq)``; empty for Triton.
    """
    out, lse, mass, largest, kept = _empty_outputs(query, value, stats, backend)
    if backend in TRITON:
        from softpick.ops.triton import launch

        try:
            with _on(query):
                launch.forward(
                    _options(normalizer, scale, eps, left, right, bottom_right, softcap, dropout_p),
                    query,
                    key,
                    value,
                    mask,
                    _dense(sink),
                    _dense(cu_seqlens_q),
                    _dense(cu_seqlens_k),
                    seed,
                    max_seqlen_q,
                    out,
                    lse,
                    mass if stats else None,
                    largest if stats else None,
                )
            return out, lse, mass, largest, kept
        except KernelError as failure:
            if backend == "triton":
                raise
            fall_back(failure, _TILES)
    for index, (rows, keys) in enumerate(_sequences(query, key, cu_seqlens_q, cu_seqlens_k)):
        spec = _spec(normalizer, scale, eps, left, right, bottom_right, softcap, dropout_p, seed, index)
        cpu.forward(
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
            _saved(kept, rows),
        )
    return out, lse, mass, largest, kept


attention_forward = torch.library.custom_op("softpick::attention_forward", _attention_forward, mutates_args=())


def _empty_outputs(
    query: Tensor, value: Tensor, stats: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, t, _ = query.shape
    out = _empty_heads_last(query, value)
    dtype = accumulation_dtype(query.dtype)
    lse = query.new_empty(b, h, t, dtype=dtype)
    shape = (b, h, t) if stats else (0,)
    kept = (b, 2, h, t) if backend == "tiled" else (0,)
    mass, largest, saved = (query.new_empty(size, dtype=dtype) for size in (shape, shape, kept))
    return out, lse, mass, largest, saved


def _saved(kept: Tensor, rows: slice) -> tuple[Tensor, ...] | None:
    """The two row statistics of ``tiled.forward`` in what the operator keeps; None where it keeps none."""
    return kept[:, :, :, rows].unbind(1) if kept.dim() == 4 else None


def _empty_heads_last(query: Tensor, value: Tensor) -> Tensor:
    """``(B, H, T, Dv)``, but (B, T, H, Dv) in memory: what models reshape to, and contiguous for packed sequences."""
    b, h, t, _ = query.shape
    return query.new_empty(b, t, h, value.shape[-1]).transpose(1, 2)


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
) -> cpu.TileSpec:
    start = 0 if seed is None else int(seed.item()) + 1_000_003 * index
    return cpu.TileSpec(get_normalizer(normalizer), scale, eps, left, right, bottom_right, softcap, dropout_p, start)


def _options(
    normalizer: str,
    scale: float,
    eps: float,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    part: bool = False,
) -> Options:
    from softpick.ops.triton.launch import Options

    left, right = min(left, 2**30), min(right, 2**30)  # the kernels add positions to them in 32 bits
    return Options(get_normalizer(normalizer), scale, eps, left, right, bottom_right, softcap, dropout_p, part)


def _dense(x: Tensor | None) -> Tensor | None:
    """The kernels step through vectors by one."""
    return None if x is None else x.contiguous()


@attention_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, ...]:
    stats, backend = args[-4:-2]
    return _empty_outputs(query, value, stats, backend)


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
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
    if cu_seqlens_q is not None:
        for grad in (dquery, dkey, dvalue):  # rows beyond the last sequence belong to none
            grad.zero_()
    dmask: Tensor | None = None
    dsink: Tensor | None = None
    done = False
    if backend in TRITON:
        from softpick.ops.triton import launch

        if mask_grad and mask is not None:
            full = (*query.shape[:3], key.shape[2])
            dmask = torch.zeros(full, dtype=torch.float32, device=query.device)
        try:
            with _on(query):
                dsink = launch.backward(
                    _options(normalizer, scale, eps, left, right, bottom_right, softcap, dropout_p),
                    query,
                    key,
                    value,
                    mask,
                    _dense(sink),
                    _dense(cu_seqlens_q),
                    _dense(cu_seqlens_k),
                    seed,
                    max_seqlen_q,
                    max_seqlen_k,
                    out,
                    lse,
                    grad_out,
                    dquery,
                    dkey,
                    dvalue,
                    dmask,
                )
            done = True
        except KernelError as failure:
            if backend == "triton":
                raise
            fall_back(failure, _TILES)
        if done and dmask is not None and mask is not None:
            dmask = dmask.sum_to_size(mask.shape)
    if not done:
        for grad in (dquery, dkey, dvalue) if cu_seqlens_q is not None else ():
            grad.zero_()  # whatever a kernel left
        dmask = torch.zeros_like(mask, dtype=lse.dtype) if mask_grad and mask is not None else None
        dsink = torch.zeros_like(sink, dtype=lse.dtype) if sink is not None else None
        for index, (rows, keys) in enumerate(_sequences(query, key, cu_seqlens_q, cu_seqlens_k)):
            spec = _spec(normalizer, scale, eps, left, right, bottom_right, softcap, dropout_p, seed, index)
            cpu.backward(
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
                _saved(kept, rows),
            )
    # the gradients get the layout of their inputs, as the fake kernel says
    mask_out = torch.empty_like(mask) if dmask is not None and mask is not None else query.new_empty(0)
    sink_out = torch.empty_like(sink) if sink is not None else query.new_empty(0)
    if dmask is not None:
        cpu.narrow(dmask, mask_out)
    if dsink is not None:
        cpu.narrow(dsink, sink_out)
    return dquery, dkey, dvalue, mask_out, sink_out


attention_backward = torch.library.custom_op("softpick::attention_backward", _attention_backward, mutates_args=())


@attention_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sink: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    grads = [torch.empty_like(x) for x in (query, key, value)]
    dmask = torch.empty_like(mask) if mask is not None and args[-1] else query.new_empty(0)
    dsink = torch.empty_like(sink) if sink is not None else query.new_empty(0)
    return (*grads, dmask, dsink)


_TENSORS = 8  # arguments of attention_forward up to and including seed


def _plain(query: Tensor, *tensors: Tensor | None) -> bool:
    """Whether nobody watches: no compiler, dispatch mode (fake tensors, selective checkpointing), transform or subclass.

    Tensors without values (the meta device) go through the operator as well, which knows the shapes.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not _transformed()
        and not query.is_meta
        and type(query) in _ORDINARY
        and all(type(x) in _ORDINARY for x in tensors)
    )


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is active, or forward-mode derivatives are taken by dual numbers."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


_ORDINARY = (Tensor, torch.nn.Parameter, type(None))


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What :func:`gradients` needs of a call of ``attention_forward``."""
    tensors, options = inputs[:_TENSORS], inputs[_TENSORS:]
    *numbers, _stats, backend, max_seqlen_q, max_seqlen_k = options
    out, lse, mass, largest, kept = output
    ctx.save_for_backward(*tensors, out, lse, kept)
    ctx.mark_non_differentiable(lse, mass, largest, kept)
    ctx.options = (*numbers, backend, max_seqlen_q, max_seqlen_k)
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _grads_batched() -> bool:
    """Whether ``torch.autograd.grad(is_grads_batched=True)`` calls, which takes an operator's samples one by one."""
    level = torch._C._vmapmode_increment_nesting()  # nothing says it without a change
    torch._C._vmapmode_decrement_nesting()
    return level > 1


def gradients(ctx: Any, grad_out: Tensor | None, backward: Any) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs of ``attention_forward``; ``backward`` is a form of ``attention_backward``."""
    if grad_out is None:
        return (None,) * ctx.inputs
    mask_grad = bool(ctx.needs_input_grad[3])
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    if backward is None:
        # the operator knows what to say to somebody who wants the gradient of the gradient
        watched = torch.is_grad_enabled() or not _plain(grad_out, *saved) or _grads_batched()
        backward = attention_backward if watched else _attention_backward
    dquery, dkey, dvalue, dmask, dsink = backward(grad_out, *saved, *ctx.options, mask_grad)
    grads = (dquery, dkey, dvalue, dmask if mask_grad else None, dsink if saved[4] is not None else None)
    return (*grads, *(None,) * (ctx.inputs - len(grads)))


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.compiler.is_compiling() or not _transformed():
        return gradients(ctx, grad_out, None)
    from softpick.ops.transforms import Backward  # a transform of the backward pass of a plain call

    return gradients(ctx, grad_out, Backward.apply)


def _setup_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[-4]


def no_double_backward(ctx: Any, *grads: Any) -> Any:
    """The error for the gradient of a gradient."""
    raise NotImplementedError(
        f"the {ctx.backend} backend has no gradient of gradients; use backend='reference', whose backward pass is "
        "differentiable"
    )


attention_forward.register_autograd(_backward, setup_context=save_for_backward)
attention_backward.register_autograd(no_double_backward, setup_context=_setup_backend)


class _Attention(torch.autograd.Function):
    """The operator without the dispatcher."""

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
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    left: int = -1,
    right: int = -1,
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
    if _plain(query, key, value, mask, sink, cu_seqlens_q, cu_seqlens_k):
        call = _Attention.apply if trained else _attention_forward
    elif torch.compiler.is_compiling():
        if _transformed():
            raise NotImplementedError(
                f"the {backend} backend has no transforms of torch.func and no forward-mode derivatives inside torch.compile; "
                "use backend='reference'"
            )
    elif _transformed():
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


# ---------------------------------------------------------------------------------------------------------------------
# Attention over some of the keys, for softpick.distributed: the same kernels, nothing recorded for autograd


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
    """Output, lse and largest score over these keys alone, all in the accumulation dtype: parts are not rounded twice."""
    b, h, t, _ = query.shape
    dtype = accumulation_dtype(query.dtype)
    out = query.new_empty(b, h, t, value.shape[-1], dtype=dtype)
    lse, mass, largest = (query.new_empty(b, h, t, dtype=dtype) for _ in range(3))
    right = 0 if is_causal else -1
    if backend in TRITON:
        from softpick.ops.triton import launch

        options = _options(normalizer, scale, eps, -1, right, False, softcap, 0.0)
        try:
            with _on(query):
                launch.forward(
                    options, query, key, value, None, _dense(sink), None, None, None, 0, out, lse, mass, largest
                )  # fmt: skip
            return out, lse, largest
        except KernelError as failure:
            if backend == "triton":
                raise
            fall_back(failure, _TILES)
    spec = _spec(normalizer, scale, eps, -1, right, False, softcap, 0.0, None, 0)
    cpu.forward(spec, query, key, value, None, sink, out, lse, mass, largest)
    return out, lse, largest


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
    """Gradients of query, key and value from these keys, given ``out`` and ``lse`` over all keys.

    Nothing else of the other keys enters: with the denominator in ``lse`` and ``D = do . out`` the gradient is a sum over
    keys. In the accumulation dtype (``backward.py`` rounds each block to the inputs' dtype first).
    """
    dtype = accumulation_dtype(query.dtype)
    dquery, dkey, dvalue = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    right = 0 if is_causal else -1
    if backend in TRITON:
        from softpick.ops.triton import launch

        options = _options(normalizer, scale, 0.0, -1, right, False, softcap, 0.0, part=True)
        try:
            with _on(query):
                launch.backward(
                    options, query, key, value, None, None, None, None, None, 0, 0, out, lse, grad_out, dquery, dkey, dvalue,
                    None,
                )  # fmt: skip
            return dquery, dkey, dvalue
        except KernelError as failure:
            if backend == "triton":
                raise
            fall_back(failure, _TILES)
    spec = replace(_spec(normalizer, scale, 0.0, -1, right, False, softcap, 0.0, None, 0), part=True)
    cpu.backward(spec, query, key, value, None, None, out, lse, grad_out, dquery, dkey, dvalue)
    return dquery, dkey, dvalue


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    lengths: Tensor | None,
    block_table: Tensor | None,
    normalizer: str,
    scale: float,
    eps: float,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, Tq, Dv)`` and lse ``(B, H, Tq)`` of few queries, by Triton.

    ``key`` is ``(B, Hkv, S, D)``, or with ``block_table`` ``(B, max_blocks)`` a view ``(num_blocks, Hkv, page, D)`` of
    pages. ``lengths`` ``(B,)`` says how many positions are filled.
    """
    from softpick.ops.triton import launch

    out, lse = _empty_decoded(query, value)
    if block_table is not None and block_table.stride(-1) != 1:
        block_table = block_table.contiguous()
    with _on(query):
        launch.decode(
            _options(normalizer, scale, eps, left, right, bottom_right, softcap, 0.0),
            query,
            key,
            value,
            mask,
            _dense(sink),
            _dense(lengths),
            block_table,
            out,
            lse,
        )
    return out, lse


_decode_operator = torch.library.custom_op("softpick::decode", _decode, mutates_args=())


def decode(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """:func:`_decode`, by the operator where somebody watches or a gradient would be asked for."""
    tensors = [query, key, value, *rest[:4]]
    if _transformed():
        raise NotImplementedError(
            "decoding by the 'triton' backend has no transforms of torch.func and no forward-mode derivatives; use "
            "backend='reference'"
        )
    watched = not _plain(*tensors) or (
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    )
    call: Any = _decode_operator if watched else _decode
    return call(query, key, value, *rest)


def _empty_decoded(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_heads_last(query, value), query.new_empty(query.shape[:3], dtype=torch.float32)


@_decode_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_decoded(query, value)


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "softpick::decode has no gradient; call softpick.scaled_dot_product_attention, which has one"
    )


_decode_operator.register_autograd(_no_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Softpick over the rows of a matrix


def _rows_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Softpick over the last dimension of ``(rows, n)``, and the lse of each row (fp32), by Triton."""
    from softpick.ops.triton import launch

    y, lse = _empty_rows(x)
    if x.shape[1] == 0:
        return y, lse.fill_(math.log(eps) if eps else -math.inf)
    try:
        with _on(x):
            launch.softpick_forward(_unit_stride(x), eps, y, lse)
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
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_rows(x)


def _rows_backward(grad: Tensor, x: Tensor, lse: Tensor, eps: float) -> Tensor:
    """Gradient of :func:`_rows_forward`. (``eps`` is in ``lse``; the gradient of this gradient wants it.)"""
    from softpick.ops.triton import launch

    # near zero the gradient reaches 1 / eps, beyond fp16's range: saturate, as the CPU path does
    half = x.dtype == torch.float16
    dx = x.new_empty(x.shape, dtype=torch.float32 if half else x.dtype)
    try:
        with _on(x):
            launch.softpick_backward(_unit_stride(x), lse, _unit_stride(grad), dx)
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
def _(grad: Tensor, x: Tensor, lse: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_rows(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.eps = inputs[1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rows_gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    saved = ctx.saved_tensors
    watched = torch.is_grad_enabled() or not _plain(grad, *saved)
    backward: Any = _rows_backward_operator if watched else _rows_backward
    return backward(grad, *saved, ctx.eps), None


def _setup_rows_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    grad, x, _, eps = inputs
    ctx.save_for_backward(grad, x)
    ctx.eps = eps


def _rows_second_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    """The gradient of the gradient, in torch operations: it is asked for too rarely to be worth a kernel."""
    with torch.enable_grad():
        first, x = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        y, _ = _rows_by_torch(x, ctx.eps)
        (dx,) = torch.autograd.grad(y, x, first, create_graph=True)
        of_first, of_x = torch.autograd.grad(dx, (first, x), grad)
    return of_first, of_x, None, None


_rows_operator.register_autograd(_rows_gradient, setup_context=_setup_rows)
_rows_backward_operator.register_autograd(_rows_second_gradient, setup_context=_setup_rows_backward)


class _Rows(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        output = _rows_forward(x, eps)
        _setup_rows(ctx, (x, eps), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        return _rows_gradient(ctx, *grads)


def rows_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`_rows_forward` with its gradient, by the operator where somebody watches."""
    call: Any = _Rows.apply if _plain(x) else _rows_operator
    return call(x, eps)


@_rows_operator.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, None], x: Tensor, eps: float
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    # transforms traced by torch.compile come here; others take the torch operations
    batched = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x[None]
    y, lse = _rows_operator(batched.reshape(-1, batched.shape[-1]), eps)
    return (y.view(batched.shape), lse.view(batched.shape[:-1])), (0, 0)
