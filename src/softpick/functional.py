"""The public functions: check the arguments, choose a backend, call it."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from softpick.normalizers import Normalizer, get_normalizer
from softpick.ops.failures import KernelError, fall_back
from softpick.ops.library import HAS_TRITON, attention, decode, interpreted, rows_forward
from softpick.ops.reference import attention_reference, normalize

__all__ = [
    "BACKENDS",
    "AttentionOutput",
    "decode_attention",
    "linear_softpick",
    "scaled_dot_product_attention",
    "softpick",
    "varlen_attention",
]

BACKENDS = ("auto", "reference", "tiled", "triton", "sdpa")
"""``auto`` chooses; ``reference``: full matrix, can return weights; ``tiled``: O(T) memory, for the CPU; ``triton``: GPU
kernels; ``sdpa``: torch's softmax."""

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TRITON_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_WIDEST = 256  # head dimension
# Up to here a group's queries are one tile that every key is read once for; with more, tiles over queries are faster.
_DECODE_ROWS, _DECODE_QUERIES = 128, 16


class AttentionOutput(NamedTuple):
    """What attention returns when more than the output is asked for. Fields that were not asked for are None.

    The statistics are fp32 (fp64 for fp64 inputs) and carry no gradient.
    """

    output: Tensor
    """``(..., H, Tq, Dv)`` (packed: ``(total_q, H, Dv)``)."""
    lse: Tensor | None = None
    """``(..., H, Tq)`` (packed: ``(H, total_q)``): log of the denominator, its constant and eps included."""
    row_mass: Tensor | None = None
    """As ``lse``: sum of the weights of a row (1 for softmax, at most 1 for softpick)."""
    max_score: Tensor | None = None
    """As ``lse``: largest score of a row that is not masked, minus infinity where there is none."""
    weights: Tensor | None = None
    """``(..., H, Tq, Tk)``, before dropout (reference backend only)."""


# ---------------------------------------------------------------------------------------------------------------------
# The function over a vector


def softpick(
    x: Tensor, dim: int = -1, eps: float = 1e-6, where: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Softpick over one dimension: ``relu(e^x_i - 1) / (sum_j |e^x_j - 1| + eps)``, numerically safe.

    Drop-in for ``torch.softmax(x, dim)``; paper eq. (1)-(2), evaluated relative to ``m = max(0, max_j x_j)`` so that every
    finite input has a finite value and gradient. Computed in fp32 (fp64 for fp64), differentiable twice.

    Args:
        x: any shape, floating point. Entries of minus infinity are excluded, as masks for softmax expect.
        dim: dimension to normalize over.
        eps: added to the denominator relative to ``m``.
        where: boolean, broadcastable to ``x``; False excludes an entry: its output is 0 and it counts nowhere.
        dtype: dtype of the result (and of the input before anything else), as in ``torch.softmax``.

    Returns:
        Tensor of the shape of ``x``, entries in [0, 1], rows summing to at most 1.

    Raises:
        TypeError: for an integer or complex ``x``, or a ``where`` that is not boolean.
        ValueError: for a ``where`` that cannot be broadcast, or a negative eps.
        IndexError: for a ``dim`` out of range.
    """
    return _over_dim("softpick", x, dim, eps, where, dtype)


def linear_softpick(x: Tensor, dim: int = -1, where: Tensor | None = None) -> Tensor:
    """``x_i / (1 + sum_j |x_j|)`` over one dimension: signed, no exponentials (Edifice.Blocks.Softpick).

    Args:
        x: any shape, floating point; computed in fp32 (fp64 for fp64). Entries of minus infinity are excluded.
        dim: dimension to normalize over.
        where: boolean, broadcastable to ``x``; False excludes an entry.

    Returns:
        Tensor of the shape and dtype of ``x`` with ``sum |y| < 1``.

    Raises:
        TypeError: for an integer or complex ``x``, or a ``where`` that is not boolean.
        ValueError: for a ``where`` that cannot be broadcast.
        IndexError: for a ``dim`` out of range.
    """
    return _over_dim("linear_softpick", x, dim, 0.0, where, None)


def _over_dim(name: str, x: Tensor, dim: int, eps: float, where: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if dtype is not None:
        x = x.to(dtype)
    if x.dtype not in _FLOATS:
        raise TypeError(f"x: expected a floating-point tensor (fp64, fp32, bf16, fp16), got {x.dtype}")
    if eps < 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    if not -max(x.dim(), 1) <= dim < max(x.dim(), 1):
        raise IndexError(f"dim: expected a dimension of a {x.dim()}-dimensional tensor, got {dim}")
    if name == "softpick" and where is None and _rows_kernel(x, dim):
        rows = x.transpose(dim, -1)
        y, _ = rows_forward(rows.reshape(-1, rows.shape[-1]), eps)
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
    work = _Widen.apply(x) if x.dtype == torch.float16 else x.to(torch.promote_types(x.dtype, torch.float32))
    if x.dim() == 0:
        return _weights(name, work[None], keep[None], eps)[0].to(x.dtype)
    last = x.dim() - 1
    out = _weights(name, work.transpose(dim, last), keep.transpose(dim, last), eps)
    return out.transpose(dim, last).to(x.dtype)


_ROWS_INTERPRETED = False  # tests set it: the rows kernel in Triton's interpreter, for tensors on the CPU


def _rows_kernel(x: Tensor, dim: int) -> bool:
    """Whether the kernel over rows can take ``x``: on a GPU, unit stride in ``dim``, and no transform of torch.func."""
    return (
        (x.is_cuda or _ROWS_INTERPRETED)
        and HAS_TRITON
        and x.dtype in _TRITON_FLOATS
        and x.dim() > 0
        and x.numel() > 0
        and x.stride(dim) == 1
        and not torch._C._are_functorch_transforms_active()
    )


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


def _weights(name: str, scores: Tensor, keep: Tensor, eps: float) -> Tensor:
    if name != "linear_softpick" or scores.shape[-1] == 0:
        return normalize(scores, name, keep=keep, eps=eps)[0]
    # x / (1 + sum|x|) is unchanged when all is divided by the largest magnitude, and then nothing overflows
    scores = torch.where(keep, scores, 0.0)
    unit = scores.detach().abs().amax(-1, keepdim=True).clamp(min=1.0)
    scaled = scores / unit
    return scaled / (1.0 / unit + scaled.abs().sum(-1, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    normalizer: str | Normalizer = ...,
    backend: str = ...,
    causal_alignment: Literal["top_left", "bottom_right"] = ...,
    window: int | tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sink: Tensor | None = ...,
    eps: float | None = ...,
    return_stats: Literal[False] = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    normalizer: str | Normalizer = ...,
    backend: str = ...,
    causal_alignment: Literal["top_left", "bottom_right"] = ...,
    window: int | tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sink: Tensor | None = ...,
    eps: float | None = ...,
    return_stats: bool = ...,
    return_weights: bool = ...,
) -> Tensor | AttentionOutput: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    normalizer: str | Normalizer = "softpick",
    backend: str = "auto",
    causal_alignment: Literal["top_left", "bottom_right"] = "top_left",
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    eps: float | None = None,
    return_stats: bool = False,
    return_weights: bool = False,
) -> Tensor | AttentionOutput:
    """Attention with any normalizer of the table; torch's function of the same name with another default.

    ``scores = scale * query @ key^T``, then softcap, then the additive mask; weights by the normalizer; output
    ``weights @ value``. Masked keys are excluded: they count in neither sum.

    Args:
        query: ``(..., H, Tq, D)``, fp64, fp32, bf16 or fp16.
        key: ``(..., Hkv, Tk, D)``. Leading dimensions broadcast.
        value: ``(..., Hkv, Tk, Dv)``.
        attn_mask: broadcastable to ``(..., H, Tq, Tk)``. Boolean: True takes part. Floating point (query's dtype or fp32):
            added to the scores; minus infinity and the dtype's lowest number (transformers' convention) exclude a key.
        dropout_p: probability with which a weight is dropped. Applied whenever it is not 0.
        is_causal: query ``i`` sees keys up to ``i`` (see ``causal_alignment``). May be combined with ``attn_mask``.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        enable_gqa: allow fewer key than query heads (grouped-query attention); nothing is repeated in memory.
        normalizer: a name of ``softpick.NORMALIZERS`` or a record of it.
        backend: ``"auto"``, or exactly this one or an error: ``"reference"`` (full matrix, differentiable twice),
            ``"tiled"`` (O(T) memory, for the CPU), ``"triton"`` (GPU kernels: CUDA tensors in fp32, bf16 or fp16, head
            dimensions up to 256), ``"sdpa"`` (torch's own kernels; softmax only). Auto takes the reference where
            weights are asked for, torch's kernels for plain softmax, Triton on a GPU (the tiles, with a warning, for
            what it cannot take) and the tiles on the CPU.
        causal_alignment: for ``Tq != Tk``: ``"top_left"`` as torch has it, or ``"bottom_right"``: the last query sees the
            last key, as decoding with a cache needs it. Also places ``window``.
        window: sliding window: ``(left, right)`` keys around the query's own position (-1: unbounded), or an integer ``w``
            for ``|i - j| < w``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma).
        sink: ``(H,)`` logits; required by ``learned_sink`` and by no other. Receives a gradient.
        eps: added to the denominator relative to ``m = max(0, max_j s_j)``; the table's value if None.
        return_stats: also return lse, row mass and largest score.
        return_weights: also return the weights (reference backend).

    Returns:
        ``(..., H, Tq, Dv)`` in the query's dtype, or an :class:`AttentionOutput` if statistics or weights are asked for.
        A row whose keys are all masked is 0.

    Raises:
        TypeError: for wrong types and dtypes (integers, mixed dtypes, masks that are neither boolean nor float).
        ValueError: for wrong shapes, devices, unknown names, or an option that the named backend does not have.
    """
    norm = get_normalizer(normalizer)
    _check_backend(backend)
    query, key, value = _autocast(_check_qkv(query, key, value))
    _check_probability(dropout_p)
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment: expected 'top_left' or 'bottom_right', got {causal_alignment!r}")
    q, k, v, lead = _canonical(query, key, value, enable_gqa)
    mask = _canonical_mask(attn_mask, lead, q, k, norm)
    left, right = _window(window, is_causal)
    _check_sink(sink, norm, q.shape[1], q)
    scale = _scale(scale, q.shape[-1])
    softcap = _softcap(softcap)
    eps = _eps(eps, norm)

    plain = (
        norm.name == "softmax"
        and eps == 0.0
        and softcap is None
        and not return_stats
        and not return_weights
        and (left, right) in ((-1, -1), (-1, 0))
        and not (is_causal and attn_mask is not None)  # torch documents the combination as an error
        and (causal_alignment == "top_left" or right < 0 or q.shape[2] == k.shape[2])
    )
    if backend == "sdpa" and not plain:
        raise ValueError(
            "backend: 'sdpa' is torch's softmax kernel; it has no other normalizer, no eps, softcap, window, mask beside "
            "is_causal, bottom-right alignment of different lengths, statistics or weights. Choose 'triton', 'tiled' or "
            "'reference'"
        )
    if backend in ("auto", "sdpa") and plain:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if return_weights and backend in ("tiled", "triton"):
        raise ValueError(
            f"return_weights: the {backend!r} backend never forms the weights; choose 'reference' or 'auto'"
        )
    named = backend
    backend = "reference" if return_weights else _choose(backend, q, v, "tiled")

    if backend == "reference":
        keep, bias = _keep_and_bias(mask, q, k, left, right, causal_alignment == "bottom_right")
        with torch.autocast(q.device.type, enabled=False):
            out, lse, mass, largest, weights = attention_reference(
                q,
                k,
                v,
                normalizer=norm,
                scale=scale,
                eps=eps,
                keep=keep,
                bias=bias,
                softcap=softcap,
                sink=sink,
                dropout_p=dropout_p,
            )
    elif backend == "triton" and dropout_p == 0.0 and not return_stats and _few_queries(q, k, v, mask, sink):
        bottom_right = causal_alignment == "bottom_right"
        cap = softcap or 0.0
        try:
            out, _ = decode(q, k, v, mask, sink, None, None, norm.name, scale, eps, left, right, bottom_right, cap)
        except KernelError as failure:
            fall_back(failure, "the kernels for long queries compute it instead")
            out, *_ = attention(
                q,
                k,
                v,
                backend=_operator(named, backend),
                normalizer=norm.name,
                scale=scale,
                eps=eps,
                mask=mask,
                sink=sink,
                left=left,
                right=right,
                bottom_right=bottom_right,
                softcap=softcap,
            )
        return _restore(out, lead, query.dim())
    else:
        weights = None
        out, lse, mass, largest = attention(
            q,
            k,
            v,
            backend=_operator(named, backend),
            normalizer=norm.name,
            scale=scale,
            eps=eps,
            mask=mask,
            sink=sink,
            left=left,
            right=right,
            bottom_right=causal_alignment == "bottom_right",
            softcap=softcap,
            dropout_p=dropout_p,
            stats=return_stats,
        )
    out = _restore(out, lead, query.dim())
    if not (return_stats or return_weights):
        return out
    stats = [_restore(x[..., None], lead, query.dim())[..., 0] if return_stats else None for x in (lse, mass, largest)]
    full = _restore(weights, lead, query.dim()) if return_weights and weights is not None else None
    return AttentionOutput(out, stats[0], stats[1], stats[2], full)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    normalizer: str | Normalizer = "softpick",
    backend: str = "auto",
    causal_alignment: Literal["top_left", "bottom_right"] = "bottom_right",
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    eps: float | None = None,
    return_stats: bool = False,
) -> Tensor | AttentionOutput:
    """Attention within packed sequences, in FlashAttention's convention (``flash_attn_varlen_func``).

    Sequence ``n`` has the queries ``cu_seqlens_q[n]:cu_seqlens_q[n + 1]`` and the keys ``cu_seqlens_k[n]:cu_seqlens_k[n + 1]``.
    Fewer key than query heads are grouped-query attention.

    Args:
        query: ``(total_q, H, D)``.
        key: ``(total_k, Hkv, D)``.
        value: ``(total_k, Hkv, Dv)``.
        cu_seqlens_q: ``(N + 1,)`` int32 or int64: starts of the sequences and their end, from 0.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: longest query sequence, checked if given. If None it is taken from ``cu_seqlens_q``; inside
            ``torch.compile`` and CUDA graphs, where that cannot be read, ``total_q``: right, but give it there for speed.
        max_seqlen_k: longest key sequence; likewise.
        dropout_p: probability with which a weight is dropped.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        is_causal: causal within each sequence.
        normalizer: a name of ``softpick.NORMALIZERS`` or a record of it.
        backend: ``"auto"``, ``"triton"``, ``"tiled"`` or ``"reference"``, as in :func:`scaled_dot_product_attention`.
        causal_alignment: ``"bottom_right"`` as FlashAttention has it, or ``"top_left"``.
        window: as in :func:`scaled_dot_product_attention`.
        softcap: as in :func:`scaled_dot_product_attention`.
        sink: as in :func:`scaled_dot_product_attention`.
        eps: as in :func:`scaled_dot_product_attention`.
        return_stats: also return lse, row mass and largest score, each ``(H, total_q)``.

    Returns:
        ``(total_q, H, Dv)``, or an :class:`AttentionOutput`.

    Raises:
        TypeError: for wrong types and dtypes.
        ValueError: for wrong shapes, offsets that do not rise from 0 to the totals, unknown names.
    """
    norm = get_normalizer(normalizer)
    _check_backend(backend)
    if backend == "sdpa":
        raise ValueError("backend: 'sdpa' has no packed sequences; choose 'triton', 'tiled' or 'reference'")
    query, key, value = _autocast(_check_qkv(query, key, value, packed=True))
    _check_probability(dropout_p)
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment: expected 'top_left' or 'bottom_right', got {causal_alignment!r}")
    longest_q = _check_offsets("cu_seqlens_q", cu_seqlens_q, query, max_seqlen_q, "max_seqlen_q")
    longest_k = _check_offsets("cu_seqlens_k", cu_seqlens_k, key, max_seqlen_k, "max_seqlen_k")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected as many sequences as cu_seqlens_q ({cu_seqlens_q.numel() - 1}), "
            f"got {cu_seqlens_k.numel() - 1}"
        )
    q, k, v, _ = _canonical(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), True)
    left, right = _window(window, is_causal)
    _check_sink(sink, norm, q.shape[1], q)
    bottom_right = causal_alignment == "bottom_right"
    scale, softcap, eps = _scale(scale, q.shape[-1]), _softcap(softcap), _eps(eps, norm)
    named = backend
    backend = _choose(backend, q, v, "tiled")
    if backend == "reference":
        parts = []
        for q0, q1, k0, k1 in zip(
            cu_seqlens_q[:-1].tolist(),
            cu_seqlens_q[1:].tolist(),
            cu_seqlens_k[:-1].tolist(),
            cu_seqlens_k[1:].tolist(),
            strict=True,
        ):
            qs, ks, vs = q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1]
            keep, _ = _keep_and_bias(None, qs, ks, left, right, bottom_right)
            with torch.autocast(q.device.type, enabled=False):
                parts.append(
                    attention_reference(
                        qs,
                        ks,
                        vs,
                        normalizer=norm,
                        scale=scale,
                        eps=eps,
                        keep=keep,
                        softcap=softcap,
                        sink=sink,
                        dropout_p=dropout_p,
                    )
                )
        out, lse, mass, largest = (torch.cat([part[i] for part in parts], dim=2) for i in range(4))
    else:
        out, lse, mass, largest = attention(
            q,
            k,
            v,
            backend=_operator(named, backend),
            normalizer=norm.name,
            scale=scale,
            eps=eps,
            sink=sink,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            left=left,
            right=right,
            bottom_right=bottom_right,
            softcap=softcap,
            dropout_p=dropout_p,
            stats=return_stats,
        )
    out = out[0].transpose(0, 1)
    if not return_stats:
        return out
    return AttentionOutput(out, lse[0], mass[0], largest[0])


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    normalizer: str | Normalizer = "softpick",
    backend: str = "auto",
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    eps: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of few queries against a cache of keys and values that is partly filled, contiguous or in pages.

    The last query stands at the last filled position (it is that position's own query). Fewer key than query heads are
    grouped-query attention. For generation: there is no gradient.

    Args:
        query: ``(B, H, Tq, D)``, fp64, fp32, bf16 or fp16.
        key_cache: ``(B, Hkv, S, D)``; with ``block_table`` pages ``(num_blocks, page_size, Hkv, D)``, FlashAttention's
            layout. Any strides: slices and transposed views are not copied.
        value_cache: as ``key_cache``, with ``Dv`` for ``D``.
        cache_seqlens: ``(B,)`` int32 or int64: how many positions are filled, the new ones included; all if None. What
            lies beyond is never read. On the CPU checked against the room in the cache; on a GPU, where looking would wait
            for it, and inside ``torch.compile`` lengths beyond the room count as the room.
        block_table: ``(B, max_blocks)`` int32: the pages of each sequence in order. Entries beyond the filled positions
            may be anything; the others are not checked.
        is_causal: each query sees keys up to its own position; False lets every query see all filled positions.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        normalizer: a name of ``softpick.NORMALIZERS`` or a record of it.
        backend: ``"auto"``, or exactly this one or an error: ``"triton"`` (CUDA tensors in fp32, bf16 or fp16, head
            dimensions up to 256, ``H / Hkv * Tq`` up to 128), ``"reference"`` (copies the cache; any device). Auto takes
            Triton on a GPU (the reference, with a warning, for what it cannot take) and the reference on the CPU.
        window: as in :func:`scaled_dot_product_attention`, around each query's position.
        softcap: as in :func:`scaled_dot_product_attention`.
        sink: as in :func:`scaled_dot_product_attention`.
        eps: as in :func:`scaled_dot_product_attention`.
        return_lse: also return the log of the denominators.

    Returns:
        ``(B, H, Tq, Dv)`` in the query's dtype; with ``return_lse`` also ``(B, H, Tq)`` in fp32 (fp64 for fp64). A query
        that sees no key is 0.

    Raises:
        TypeError: for wrong types and dtypes.
        ValueError: for wrong shapes, devices, lengths, unknown names, inputs that require a gradient while gradients are
            recorded, or an input that the named backend does not take.
    """
    norm = get_normalizer(normalizer)
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend: expected one of auto, triton, reference for decoding; got {backend!r}")
    room = _check_cache(query, key_cache, value_cache, block_table)
    query, key_cache, value_cache = _autocast((query, key_cache, value_cache))
    if cache_seqlens is not None:
        _check_lengths(cache_seqlens, query, room)
    left, right = _window(window, is_causal)
    heads = query.shape[1]
    _check_sink(sink, norm, heads, query)
    for name, x in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache), ("sink", sink)):
        if torch.is_grad_enabled() and x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, which decode_attention does not have; call it under torch.no_grad(), or call "
                "scaled_dot_product_attention"
            )
    scale, softcap, eps = _scale(scale, query.shape[-1]), _softcap(softcap), _eps(eps, norm)
    # views (B or num_blocks, Hkv, S or page, D)
    key, value = (x if block_table is None else x.transpose(1, 2) for x in (key_cache, value_cache))
    groups = heads // key.shape[1] if key.shape[1] else 1
    named, backend = backend, _choose(backend, query, value, "reference", groups * query.shape[2])
    if backend == "triton":
        cap = softcap or 0.0
        try:
            out, lse = decode(
                query, key, value, None, sink, cache_seqlens, block_table, norm.name, scale, eps, left, right, True, cap
            )
            return (out, lse) if return_lse else out
        except KernelError as failure:
            if named == "triton":
                raise
            fall_back(failure, "the reference computes it instead, slowly (backend='auto')")
    if block_table is not None:
        page = key.shape[2]
        if cache_seqlens is not None:  # entries beyond the filled pages may be anything
            starts = torch.arange(block_table.shape[1], device=query.device) * page
            block_table = block_table.masked_fill(starts >= cache_seqlens[:, None], 0)
        key, value = (x[block_table.long()].transpose(1, 2).flatten(2, 3) for x in (key, value))
    j = torch.arange(room, device=query.device)
    keep = torch.ones(1, 1, query.shape[2], room, dtype=torch.bool, device=query.device)
    filled = torch.full((1, 1, 1, 1), room, device=query.device)
    if cache_seqlens is not None:
        filled = cache_seqlens.clamp(max=room)[:, None, None, None]
        keep = keep & (j < filled)
        # what was never written may be NaN, and 0 * NaN is NaN
        key, value = (x.masked_fill((j >= filled[:, 0])[:, :, :, None], 0.0) for x in (key, value))
    behind = torch.arange(query.shape[2], device=query.device)[:, None] + (filled - query.shape[2]) - j
    if right >= 0:
        keep = keep & (behind >= -right)
    if left >= 0:
        keep = keep & (behind <= left)
    with torch.autocast(query.device.type, enabled=False):
        out, lse, *_ = attention_reference(
            query,
            key,
            value,
            normalizer=norm,
            scale=scale,
            eps=eps,
            keep=keep.expand(query.shape[0], heads, query.shape[2], room),
            softcap=softcap,
            sink=sink,
        )
    return (out, lse) if return_lse else out


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")


def _triton_refuses(q: Tensor, v: Tensor, rows: int = 0) -> str | None:
    """Why the Triton backend cannot take ``(B, H, T, D)`` queries and values; None if it can. ``rows`` counts in decoding."""
    if not HAS_TRITON:
        return (
            "backend: 'triton' needs the package triton, which is not installed; torch for CUDA on Linux brings it, else: "
            "pip install 'triton>=3.6'"
        )
    # while compiling the environment cannot be read; there the operator refuses when it runs
    if not q.is_cuda and not torch.compiler.is_compiling() and not interpreted():
        return f"query: expected a CUDA tensor for the 'triton' backend, got one on {q.device}; choose 'auto'"
    if q.dtype not in _TRITON_FLOATS:
        return f"query: expected fp32, bf16 or fp16 for the 'triton' backend, got {q.dtype}"
    for name, x in (("query", q), ("value", v)):
        if not 1 <= x.shape[-1] <= _TRITON_WIDEST:
            return f"{name}: expected a head dimension from 1 to {_TRITON_WIDEST} for the 'triton' backend, got {x.shape[-1]}"
    if rows > _DECODE_ROWS:
        return (
            f"query: expected at most {_DECODE_ROWS} rows (queries times query heads of a key head) for decoding with the "
            f"'triton' backend, got {rows}; use scaled_dot_product_attention"
        )
    return None


_warned: set[str] = set()


def _choose(backend: str, q: Tensor, v: Tensor, otherwise: str, rows: int = 0) -> str:
    """The backend that runs: what was named or an error; for ``"auto"`` Triton on a GPU, else ``otherwise``."""
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        reason = _triton_refuses(q, v, rows)
        if reason is None:
            return "triton"
        if backend == "triton":
            raise ValueError(reason)
        if q.dtype != torch.float64 and reason not in _warned:  # fp64 on a GPU is for tests
            _warned.add(reason)
            warnings.warn(
                f"{reason}. backend='auto' takes {otherwise!r} here, which is slow", UserWarning, stacklevel=3
            )
    return otherwise if backend == "auto" else backend


def _operator(named: str, chosen: str) -> str:
    """What an operator is told: with ``"auto"`` for Triton, tiles of torch take the place of a kernel that cannot be built."""
    return "auto" if (named, chosen) == ("auto", "triton") else chosen


def _few_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None) -> bool:
    """Whether this is decoding: few rows a key head, and no gradient to record, which the decode kernel does not have."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mask, sink)):
        return False
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    return q.shape[2] <= _DECODE_QUERIES and groups * q.shape[2] <= _DECODE_ROWS


def _check_probability(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")


def _check_qkv(query: Tensor, key: Tensor, value: Tensor, packed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shape = "(total, H, D)" if packed else "(..., H, T, D)"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected a floating-point tensor (fp64, fp32, bf16, fp16), got {x.dtype}")
        if (x.dim() != 3) if packed else (x.dim() < 2):
            raise ValueError(f"{name}: expected {shape}, got {x.dim()} dimensions {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {x.device}")
        if x.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"{name}: expected the query's dtype {query.dtype}, got {x.dtype}")
        if x.dim() != query.dim():
            raise ValueError(f"{name}: expected {query.dim()} dimensions like the query, got {tuple(x.shape)}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"key: expected the query's head dimension {query.shape[-1]} (last), got {key.shape[-1]}: "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}"
        )
    time = -3 if packed else -2
    if key.shape[time] != value.shape[time]:
        raise ValueError(
            f"value: expected as many positions as the key ({key.shape[time]}, dimension {time}), got {value.shape[time]}: "
            f"key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    return query, key, value


def _autocast(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, what torch's function does: fp32 inputs go to the autocast dtype."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return q, k, v


def _canonical(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """``(B, H, T, D)`` views of the three, and the leading dimensions that B stands for."""
    if query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query, key, value, query.shape[:1]  # the usual case: views of views would only take time
    q, k, v = ((x[None] if x.dim() == 2 else x) for x in (query, key, value))
    h, hk, hv = q.shape[-3], k.shape[-3], v.shape[-3]
    try:
        lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"query, key, value: expected leading dimensions that broadcast, got {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(value.shape)}"
        ) from None
    heads = max(h, hk, hv)
    for name, x in (("query", q), ("key", k), ("value", v)):
        n = x.shape[-3]
        divides = enable_gqa and name != "query" and n > 0 and h % n == 0
        fits = n == heads or divides or (n == 1 and not enable_gqa)
        if not fits:
            raise ValueError(_heads_message(name, n, h, enable_gqa, query, key))
    if h != heads:
        q = q.expand(*q.shape[:-3], heads, *q.shape[-2:])
    if hk != hv:  # give both the larger number of heads, which both divide
        both = math.lcm(hk, hv) if hk and hv else 0
        k, v = (x if x.shape[-3] == both else x.repeat_interleave(both // x.shape[-3], dim=-3) for x in (k, v))
    q, k, v = (x.expand(*lead, *x.shape[-3:]).reshape(math.prod(lead), *x.shape[-3:]) for x in (q, k, v))
    return q, k, v, tuple(lead)


def _heads_message(name: str, got: int, heads: int, enable_gqa: bool, query: Tensor, key: Tensor) -> str:
    expected = f"a divisor of the query's {heads} heads" if enable_gqa else f"the query's {heads} heads (dimension -3)"
    message = f"{name}: expected {expected}, got {got}: query {tuple(query.shape)}, key {tuple(key.shape)}."
    if query.dim() >= 4 and query.shape[-2] % max(1, key.shape[-2]) == 0 and query.shape[-3] >= query.shape[-2]:
        return message + " Are heads and positions swapped? The layout is (batch, heads, positions, head dim)."
    if not enable_gqa and got and heads % got == 0:
        return message + " For grouped-query attention pass enable_gqa=True."
    return message


def _canonical_mask(
    mask: Tensor | None, lead: tuple[int, ...], q: Tensor, k: Tensor, norm: Normalizer
) -> Tensor | None:
    """The mask as ``(B or 1, H or 1, Tq or 1, Tk or 1)``, with every exclusion of an additive one as minus infinity."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"attn_mask: expected bool, float32 or the query's dtype {q.dtype}, got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"attn_mask: expected the query's device {q.device}, got {mask.device}")
    full = (*lead, q.shape[1], q.shape[2], k.shape[2])
    fits = 2 <= mask.dim() <= len(full) or (mask.dim() == 3 and len(full) == 3)
    if not fits or any(m not in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
        hint = ""
        if mask.dim() == 3 and mask.shape[0] not in (1, q.shape[1]):
            hint = " A mask (batch, Tq, Tk) needs a head dimension: mask[:, None]."
        elif mask.dim() == 2 and tuple(mask.shape) == (q.shape[0], k.shape[2]):
            hint = " A padding mask (batch, Tk) needs head and query dimensions: mask[:, None, None]."
        elif mask.shape[-2:] == (k.shape[1], q.shape[1]) or mask.shape[-1] == q.shape[1]:
            hint = " Are heads and positions swapped? The layout is (batch, heads, positions, head dim)."
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}.{hint}")
    mask = mask.reshape((1,) * (len(full) - mask.dim()) + tuple(mask.shape))
    if len(lead) != 1:
        if any(n != 1 for n in mask.shape[: len(lead)]):
            mask = mask.expand(*lead, *mask.shape[len(lead) :])
        mask = mask.reshape(math.prod(mask.shape[: len(lead)]), *mask.shape[len(lead) :])
    if mask.dtype != torch.bool and norm.neutral == 0.0:
        # transformers writes "masked" as the lowest number of a dtype; half of it allows for a cast on the way
        lowest = torch.finfo(mask.dtype).min / 2
        mask = mask.masked_fill(mask <= lowest, -math.inf)
    return mask


def _keep_and_bias(
    mask: Tensor | None, q: Tensor, k: Tensor, left: int, right: int, bottom_right: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the window for the reference: what is kept, and what is added (finite where kept)."""
    tq, tk = q.shape[2], k.shape[2]
    keep = bias = None
    if mask is not None:
        if mask.dtype == torch.bool:
            keep = mask
        else:
            keep = mask != -math.inf
            bias = torch.where(keep, mask, 0.0)
    if left >= 0 or right >= 0:
        offset = tk - tq if bottom_right else 0
        delta = torch.arange(tq, device=q.device)[:, None] + offset - torch.arange(tk, device=q.device)
        inside = torch.ones_like(delta, dtype=torch.bool)
        if right >= 0:
            inside = inside & (delta >= -right)
        if left >= 0:
            inside = inside & (delta <= left)
        keep = inside if keep is None else keep & inside
    if keep is not None:
        keep = keep.expand(q.shape[0], q.shape[1], tq, tk)
    return keep, bias


def _window(window: int | tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    """``(left, right)`` bounds with causality folded in; -1 is unbounded."""
    if window is None:
        left, right = -1, -1
    elif isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            raise ValueError(f"window: expected at least 1 key, got {window}")
        left = right = window - 1
    elif isinstance(window, tuple | list) and len(window) == 2 and all(isinstance(w, int) and w >= -1 for w in window):
        left, right = window
    else:
        raise ValueError(f"window: expected an integer or (left, right) with -1 for unbounded, got {window!r}")
    return left, (0 if is_causal else right)


def _check_sink(sink: Tensor | None, norm: Normalizer, heads: int, query: Tensor) -> None:
    if not norm.needs_sink:
        if sink is not None:
            raise ValueError(f"sink: the normalizer {norm.name!r} has none; only 'learned_sink' takes it")
        return
    if sink is None:
        raise ValueError(f"sink: the normalizer {norm.name!r} needs one logit a head, shape ({heads},)")
    if not isinstance(sink, Tensor) or sink.dtype not in _FLOATS:
        raise TypeError(f"sink: expected a floating-point tensor, got {getattr(sink, 'dtype', type(sink).__name__)}")
    if tuple(sink.shape) != (heads,):
        raise ValueError(f"sink: expected shape ({heads},), one logit a query head; got {tuple(sink.shape)}")
    if sink.device != query.device:
        raise ValueError(f"sink: expected the query's device {query.device}, got {sink.device}")


def _check_cache(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None) -> int:
    """How many positions of a sequence the cache has room for."""
    layout = "(B, Hkv, S, D)" if table is None else "pages (num_blocks, page_size, Hkv, D)"
    for name, x in (("query", query), ("key_cache", key), ("value_cache", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected a floating-point tensor (fp64, fp32, bf16, fp16), got {x.dtype}")
        if x.dim() != 4:
            expected = "(B, H, Tq, D)" if name == "query" else layout
            raise ValueError(f"{name}: expected {expected}, got {x.dim()} dimensions {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {x.device}")
        if x.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"{name}: expected the query's dtype {query.dtype}, got {x.dtype}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key_cache: expected the query's head dimension {query.shape[-1]} (last), got {key.shape[-1]}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value_cache: expected the shape of key_cache {tuple(key.shape)} up to the last dimension, got "
            f"{tuple(value.shape)}"
        )
    batch, heads = query.shape[:2]
    kv_heads = key.shape[1 if table is None else 2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"key_cache: expected a divisor of the query's {heads} heads in {layout}, got {kv_heads} of {tuple(key.shape)}"
        )
    if table is None:
        if key.shape[0] != batch:
            raise ValueError(f"key_cache: expected the query's batch {batch} in {layout}, got {key.shape[0]}")
        return key.shape[2]
    if not isinstance(table, Tensor) or table.dtype != torch.int32:
        raise TypeError(f"block_table: expected an int32 tensor, got {getattr(table, 'dtype', type(table).__name__)}")
    if table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(f"block_table: expected shape ({batch}, max_blocks), got {tuple(table.shape)}")
    if table.device != query.device:
        raise ValueError(f"block_table: expected the query's device {query.device}, got {table.device}")
    if key.shape[0] == 0 or key.shape[1] == 0:
        raise ValueError(f"key_cache: expected at least one page of at least one position, got {tuple(key.shape)}")
    return table.shape[1] * key.shape[1]


def _check_lengths(lengths: Tensor, query: Tensor, room: int) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cache_seqlens: expected an int32 or int64 tensor, got {getattr(lengths, 'dtype', type(lengths).__name__)}"
        )
    if tuple(lengths.shape) != (query.shape[0],):
        raise ValueError(f"cache_seqlens: expected shape ({query.shape[0]},), got {tuple(lengths.shape)}")
    if lengths.device != query.device:
        raise ValueError(f"cache_seqlens: expected the query's device {query.device}, got {lengths.device}")
    # on a GPU reading them would wait in every step of a generation; the kernel never reads beyond the room
    if not lengths.is_cuda and _readable(lengths) and not all(0 <= n <= room for n in lengths.tolist()):
        raise ValueError(f"cache_seqlens: expected lengths from 0 to the cache's {room}, got {lengths.tolist()}")


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at: not while tracing, nor while a CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_offsets(name: str, offsets: Tensor, packed: Tensor, longest: int | None, longest_name: str) -> int:
    """The longest sequence, or what is said to be that; where it can be neither read nor was given, the total."""
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name}: expected an int32 or int64 tensor, got {getattr(offsets, 'dtype', type(offsets).__name__)}"
        )
    if offsets.dim() != 1 or offsets.numel() < 2:
        raise ValueError(f"{name}: expected shape (sequences + 1,), got {tuple(offsets.shape)}")
    if offsets.device != packed.device:
        raise ValueError(f"{name}: expected the query's device {packed.device}, got {offsets.device}")
    if not _readable(offsets):
        return packed.shape[0] if longest is None else longest
    starts = offsets.tolist()  # one wait for the device
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != packed.shape[0] or min(lengths) < 0:
        raise ValueError(
            f"{name}: expected offsets that rise from 0 to the total of {packed.shape[0]} positions, got {starts}"
        )
    if longest is not None and longest < max(lengths):
        raise ValueError(f"{longest_name}: expected at least the longest sequence {max(lengths)}, got {longest}")
    return max(lengths) if longest is None else longest


def _scale(scale: float | None, head_dim: int) -> float:
    return float(scale) if scale is not None else 1.0 / math.sqrt(head_dim) if head_dim else 1.0


def _softcap(softcap: float | None) -> float | None:
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a number > 0, got {softcap}")
    return softcap


def _eps(eps: float | None, norm: Normalizer) -> float:
    if eps is not None and eps < 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    return norm.eps if eps is None else float(eps)


def _restore(x: Tensor, lead: tuple[int, ...], dims: int) -> Tensor:
    """``(B, H, ...)`` back to the caller's leading dimensions."""
    if dims == 2:
        return x[0, 0]
    return x if len(lead) == 1 else x.reshape(*lead, *x.shape[1:])
