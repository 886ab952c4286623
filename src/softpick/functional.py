"""The public functions: check the arguments, choose a backend, call it."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from softpick import checks
from softpick.normalizers import NORMALIZERS, Normalizer, get_normalizer, visible
from softpick.ops.failures import KernelError, fall_back
from softpick.ops.library import HAS_TRITON, attention, decode, interpreted, rows_forward
from softpick.ops.reference import attention_reference, normalize, widen
from softpick.ops.transforms import has_tangent, wants_reference

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

_SOFTMAX = NORMALIZERS["softmax"]
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
    eps = checks.number("eps", eps, "a number >= 0", 0.0)
    if not -max(x.dim(), 1) <= checks.integer("dim", dim) < max(x.dim(), 1):
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
    work = widen(x, torch.promote_types(x.dtype, torch.float32))
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
        key: ``(..., Hkv, Tk, D)``. Leading dimensions broadcast, also where the three have different numbers of them.
        value: ``(..., Hkv, Tk, Dv)``.
        attn_mask: broadcastable to ``(..., H, Tq, Tk)``. Boolean: True takes part. Floating point (query's dtype or fp32):
            added to the scores; an entry at or below ``softpick.normalizers.EXCLUDED_BIAS`` (-9984: so -1e4, -1e9, the lowest
            number of any dtype and minus infinity) excludes a key.
        dropout_p: probability with which a weight is dropped. Applied whenever it is not 0.
        is_causal: query ``i`` sees keys up to ``i`` (see ``causal_alignment``). May be combined with ``attn_mask``.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        enable_gqa: allow fewer key than query heads (grouped-query attention); nothing is repeated in memory.
        normalizer: a name of ``softpick.NORMALIZERS`` or a record of it.
        backend: ``"auto"``, or exactly this one or an error: ``"reference"`` (full matrix, differentiable twice),
            ``"tiled"`` (O(T) memory, for the CPU), ``"triton"`` (GPU kernels: CUDA tensors in fp32, bf16 or fp16, head
            dimensions up to 256), ``"sdpa"`` (torch's own kernels; softmax only). Auto takes the reference where
            weights are asked for, and forward-mode derivatives or derivatives of derivatives in ``torch.func``, which no
            other backend has; torch's kernels for plain softmax, Triton on a GPU (the tiles, with a warning, for what it
            cannot take) and the tiles on the CPU.
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
        TypeError: for wrong types and dtypes (integers, mixed dtypes, masks that are neither boolean nor float, strings for
            numbers).
        ValueError: for wrong shapes, devices, unknown names, numbers out of range (NaN and infinity among them), or an option
            that the named backend does not have.
        NotImplementedError: for a derivative that the named backend does not have.
    """
    norm = get_normalizer(normalizer)
    _check_backend(backend)
    query, key, value = _autocast(_check_qkv(query, key, value))
    dropout_p = checks.probability("dropout_p", dropout_p)
    checks.flags(is_causal=is_causal, enable_gqa=enable_gqa, return_stats=return_stats, return_weights=return_weights)
    _check_alignment(causal_alignment)
    q, k, v, lead = _canonical(query, key, value, enable_gqa)
    dims = max(query.dim(), key.dim(), value.dim())
    mask = _canonical_mask(attn_mask, lead, q, k)
    left, right = _window(window, is_causal)
    _check_sink(sink, norm, q.shape[1], q)
    scale = _scale(scale, q.shape[-1])
    softcap = _softcap(softcap)
    eps = _eps(eps, norm)

    plain = (
        norm.switches[:-1] == _SOFTMAX.switches[:-1]  # all but eps
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
    if plain and (backend == "sdpa" or (backend == "auto" and not wants_reference(q, k, v, mask))):
        if mask is None:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, scale=scale, enable_gqa=enable_gqa
        )
        return _restore(out, lead, dims)
    if return_weights and backend in ("tiled", "triton"):
        raise ValueError(
            f"return_weights: the {backend!r} backend never forms the weights; choose 'reference' or 'auto'"
        )
    named = backend
    wanted = wants_reference(q, k, v, mask, sink)
    backend = "reference" if return_weights else _choose(backend, q, v, norm, "tiled", wanted=wanted)

    if backend == "reference":
        keep, bias = _keep_and_bias(mask, q, k, left, right, causal_alignment == "bottom_right")
        with _no_autocast(q):
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
            out, _ = decode(q, k, v, mask, sink, None, None, norm.text, scale, eps, left, right, bottom_right, cap)
        except KernelError as failure:
            fall_back(failure, "the kernels for long queries compute it instead")
            out, *_ = attention(
                q,
                k,
                v,
                backend=_operator(named, backend),
                normalizer=norm.text,
                scale=scale,
                eps=eps,
                mask=mask,
                sink=sink,
                left=left,
                right=right,
                bottom_right=bottom_right,
                softcap=softcap,
            )
        return _restore(out, lead, dims)
    else:
        weights = None
        out, lse, mass, largest = attention(
            q,
            k,
            v,
            backend=_operator(named, backend),
            normalizer=norm.text,
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
    out = _restore(out, lead, dims)
    if not (return_stats or return_weights):
        return out
    stats = [_restore(x[..., None], lead, dims)[..., 0] if return_stats else None for x in (lse, mass, largest)]
    full = _restore(weights, lead, dims) if return_weights and weights is not None else None
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
    dropout_p = checks.probability("dropout_p", dropout_p)
    checks.flags(is_causal=is_causal, return_stats=return_stats)
    _check_alignment(causal_alignment)
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
    backend = _choose(backend, q, v, norm, "tiled", wanted=wants_reference(q, k, v, sink))
    if backend == "reference":
        options: Any = {"normalizer": norm, "scale": scale, "eps": eps, "softcap": softcap, "sink": sink}
        options["dropout_p"] = dropout_p
        parts = []
        with _no_autocast(q):
            if _readable(cu_seqlens_q) and _readable(cu_seqlens_k):
                for q0, q1, k0, k1 in _spans(cu_seqlens_q, cu_seqlens_k):
                    qs, ks, vs = q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1]
                    keep, _ = _keep_and_bias(None, qs, ks, left, right, bottom_right)
                    parts.append(attention_reference(qs, ks, vs, keep=keep, **options))
            else:
                keep = _packed_keep(cu_seqlens_q, cu_seqlens_k, q, k, left, right, bottom_right)
                parts.append(attention_reference(q, k, v, keep=keep, **options))
        out, lse, mass, largest = (torch.cat([part[i] for part in parts], dim=2) for i in range(4))
    else:
        out, lse, mass, largest = attention(
            q,
            k,
            v,
            backend=_operator(named, backend),
            normalizer=norm.text,
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
        block_table: ``(B, max_blocks)`` int32: the pages of each sequence in order. Entries without a filled position within
            reach of a query may be anything. The others are checked on the CPU, and on a GPU, where looking would wait for
            it, if the environment variable ``SOFTPICK_DEBUG`` is ``1`` (then ``cache_seqlens`` as well).
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
    checks.flags(is_causal=is_causal, return_lse=return_lse)
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
    wanted = wants_reference(query, key, value, sink)
    named, backend = backend, _choose(backend, query, value, norm, "reference", groups * query.shape[2], wanted=wanted)
    if block_table is not None and (backend == "reference" or _checkable(block_table)):
        used = _used_blocks(cache_seqlens, block_table, key.shape[2], query.shape[2], left)
        _check_pages(block_table, used, key.shape[0])
    if backend == "triton":
        cap = softcap or 0.0
        try:
            out, lse = decode(
                query, key, value, None, sink, cache_seqlens, block_table, norm.text, scale, eps, left, right, True, cap
            )
            return (out, lse) if return_lse else out
        except KernelError as failure:
            if named == "triton":
                raise
            fall_back(failure, "the reference computes it instead, slowly (backend='auto')")
            if block_table is not None:
                used = _used_blocks(cache_seqlens, block_table, key.shape[2], query.shape[2], left)
    j = torch.arange(room, device=query.device)
    filled = torch.full((1, 1, 1, 1), room, device=query.device)
    if cache_seqlens is not None:
        filled = cache_seqlens.clamp(max=room)[:, None, None, None]
    there = j < filled  # (B or 1, 1, 1, room)
    if block_table is not None:
        valid = used & (block_table >= 0) & (block_table < key.shape[0])
        pages = block_table.masked_fill(~valid, 0).long()
        there = there & valid.repeat_interleave(key.shape[2], 1)[:, None, None]
        key, value = (x[pages].transpose(1, 2).flatten(2, 3) for x in (key, value))
    if cache_seqlens is not None or block_table is not None:
        # what was never written may be NaN, and 0 * NaN is NaN
        key, value = (x.masked_fill(~there.transpose(2, 3), 0.0) for x in (key, value))
    behind = torch.arange(query.shape[2], device=query.device)[:, None] + (filled - query.shape[2]) - j
    keep = there.expand(-1, -1, query.shape[2], -1)
    if right >= 0:
        keep = keep & (behind >= -right)
    if left >= 0:
        keep = keep & (behind <= left)
    with _no_autocast(query):
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


def _triton_refuses(q: Tensor, v: Tensor, norm: Normalizer, rows: int = 0) -> str | None:
    """Why the Triton backend cannot take ``(B, H, T, D)`` queries and values; None if it can. ``rows`` counts in decoding."""
    if not HAS_TRITON:
        return (
            "backend: 'triton' needs the package triton, which is not installed; torch for CUDA on Linux brings it, else: "
            "pip install 'triton>=3.6'"
        )
    # while compiling the environment cannot be read; there the operator refuses when it runs
    if not q.is_cuda and not q.is_meta and not torch.compiler.is_compiling() and not interpreted():
        return f"query: expected a CUDA tensor for the 'triton' backend, got one on {q.device}; choose 'auto'"
    if q.dtype not in _TRITON_FLOATS:
        return f"query: expected fp32, bf16 or fp16 for the 'triton' backend, got {q.dtype}"
    if not norm.has_kernels:
        return (
            f"normalizer: the 'triton' backend has no kernels for {norm.text}; choose 'tiled' or 'reference', which compute "
            "every record"
        )
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


def _choose(
    backend: str, q: Tensor, v: Tensor, norm: Normalizer, otherwise: str, rows: int = 0, *, wanted: bool = False
) -> str:
    """The backend that runs: what was named or an error; for ``"auto"`` Triton on a GPU, else ``otherwise``.

    ``wanted``: a derivative is taken that only the reference has.
    """
    if wanted and backend == "auto":
        return "reference"
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        reason = _triton_refuses(q, v, norm, rows)
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
    """Whether this is decoding: few rows a key head, and no derivative or transform, which the decode kernel does not have."""
    if torch._C._are_functorch_transforms_active() or has_tangent(q, k, v, mask, sink):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mask, sink)):
        return False
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    return q.shape[2] <= _DECODE_QUERIES and groups * q.shape[2] <= _DECODE_ROWS


def _check_alignment(causal_alignment: str) -> None:
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment: expected 'top_left' or 'bottom_right', got {causal_alignment!r}")


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
        if x.dtype != query.dtype and not _autocasts(query):
            raise TypeError(f"{name}: expected the query's dtype {query.dtype}, got {x.dtype}")
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


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; the meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _autocast(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, what torch's function does: fp32 inputs go to the autocast dtype."""
    if not _autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
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


def _canonical_mask(mask: Tensor | None, lead: tuple[int, ...], q: Tensor, k: Tensor) -> Tensor | None:
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
    # one by one: `in` does not compare what stands for a size while a graph with any sizes is traced
    if not fits or any(m != 1 and m != n for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
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
    return mask if mask.dtype == torch.bool else mask.masked_fill(~visible(mask), -math.inf)


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


def _spans(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[int, int, int, int]]:
    """First and last query and key of each packed sequence."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return list(zip(q, q[1:], k, k[1:], strict=False))


def _packed_keep(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor, k: Tensor, left: int, right: int, bottom_right: bool
) -> Tensor:
    """Which key each query of packed sequences sees, ``(1, H, Tq, Tk)``, without reading where the sequences end."""
    starts = [cu.long() for cu in (cu_seqlens_q, cu_seqlens_k)]
    places = [torch.arange(x.shape[2], device=q.device) for x in (q, k)]
    # the sequence of a position: how many end at or before it
    sequences = [(cu[1:, None] <= at).sum(0) for cu, at in zip(starts, places, strict=True)]
    last = cu_seqlens_q.shape[0] - 2
    at = [p - cu[n.clamp(max=last)] for cu, p, n in zip(starts, places, sequences, strict=True)]
    lengths = [cu.diff()[sequences[0].clamp(max=last)] for cu in starts]
    offset = lengths[1] - lengths[0] if bottom_right else torch.zeros_like(lengths[0])
    delta = (at[0] + offset)[:, None] - at[1]
    keep = (sequences[0][:, None] == sequences[1]) & (sequences[0] <= last)[:, None]
    if right >= 0:
        keep = keep & (delta >= -right)
    if left >= 0:
        keep = keep & (delta <= left)
    return keep.expand(1, q.shape[1], *keep.shape)


def _window(window: int | tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    """``(left, right)`` bounds with causality folded in; -1 is unbounded."""
    if window is None:
        left, right = -1, -1
    elif isinstance(window, tuple | list):
        if len(window) != 2:
            raise ValueError(f"window: expected an integer or (left, right) with -1 for unbounded, got {window!r}")
        left, right = (checks.integer("window", w, -1) for w in window)
    elif checks.integer("window", window) < 1:
        raise ValueError(f"window: expected at least 1 key, got {window}")
    else:
        left = right = window - 1
    return left, (0 if is_causal else right)


def _check_sink(sink: Tensor | None, norm: Normalizer, heads: int, query: Tensor) -> None:
    if not norm.needs_sink:
        if sink is not None:
            raise ValueError(f"sink: the normalizer {norm.name!r} has none; 'learned_sink' takes it")
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
        if x.dtype != query.dtype and not _autocasts(query):
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
    if _checkable(lengths) and not all(0 <= n <= room for n in lengths.tolist()):
        raise ValueError(f"cache_seqlens: expected lengths from 0 to the cache's {room}, got {lengths.tolist()}")


def _used_blocks(lengths: Tensor | None, table: Tensor, page: int, tq: int, left: int) -> Tensor:
    """``(B or 1, max_blocks)``: the entries of a block table that have a filled position within reach of a query."""
    starts = torch.arange(table.shape[1], device=table.device) * page
    filled = starts.new_full((1, 1), table.shape[1] * page) if lengths is None else lengths[:, None]
    used = starts < filled
    if left >= 0:
        used = used & (starts + page > filled - tq - left)
    return used.expand(table.shape)


def _check_pages(table: Tensor, used: Tensor, pages: int) -> None:
    """``used``: which entries are those of positions that a query may see."""
    if not _checkable(table):
        return
    wrong = used & ((table < 0) | (table >= pages))
    if wrong.any():
        sequence, block = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"block_table: expected pages from 0 to {pages - 1} for all filled positions, got "
            f"{int(table[sequence, block])} for block {block} of sequence {sequence}"
        )


def _checkable(x: Tensor) -> bool:
    """Whether to look at lengths and pages: reading them from a GPU would wait for it in every step of a generation."""
    return (not x.is_cuda or os.environ.get("SOFTPICK_DEBUG", "0") not in ("", "0")) and _readable(x)


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at: there are any, they are not traced, vmapped, nor part of a CUDA graph's capture."""
    if torch.compiler.is_compiling() or x.is_meta or is_fake(x):
        return False
    if torch._C._are_functorch_transforms_active() and _batched(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _batched(x: Tensor) -> bool:
    """Whether ``torch.vmap`` stands samples of a dimension in for the tensor's values."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


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
    if longest is not None:
        longest = checks.integer(longest_name, longest, 0)
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
    if scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    return float(checks.number("scale", scale))


def _softcap(softcap: float | None) -> float | None:
    return None if softcap is None else float(checks.number("softcap", softcap, "a number > 0", 0.0, exclusive=True))


def _eps(eps: float | None, norm: Normalizer) -> float:
    return norm.eps if eps is None else float(checks.number("eps", eps, "a number >= 0", 0.0))


def _restore(x: Tensor, lead: tuple[int, ...], dims: int) -> Tensor:
    """``(B, H, ...)`` back to the caller's leading dimensions."""
    if dims == 2:
        return x[0, 0]
    return x if len(lead) == 1 else x.reshape(*lead, *x.shape[1:])
