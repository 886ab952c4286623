"""The public functions: check the arguments, choose a backend, call it.

The three attention functions are one family: ``scale``, ``enable_gqa``, ``normalizer``, ``backend``, ``window``, ``softcap``,
``sink``, ``eps`` and ``return_stats`` mean the same in each, and ``return_stats`` gives an :class:`AttentionOutput`.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from softpick.normalizers import Normalizer, get_normalizer
from softpick.ops import numbers
from softpick.ops.arguments import (
    canonical_mask,
    canonical_shapes,
    check_alignment,
    check_cache,
    check_heads,
    check_lengths,
    check_offsets,
    check_pages,
    check_qkv,
    check_sink,
    check_softcap,
    checkable,
    default_eps,
    default_scale,
    keep_and_bias,
    no_autocast,
    restore_shape,
    to_autocast_dtype,
    used_blocks,
    window_bounds,
)
from softpick.ops.backends import (
    check_backend,
    choose_backend,
    few_queries,
    operator_name,
    plain_softmax,
    takes_sdpa,
)
from softpick.ops.kernel_errors import KernelError, fall_back
from softpick.ops.operators import attention
from softpick.ops.operators_decode import decode
from softpick.ops.reference import attention_reference
from softpick.ops.reference_layouts import cache_reference, packed_reference
from softpick.ops.transforms import wants_reference
from softpick.vector import linear_softpick, softpick

__all__ = [
    "AttentionOutput",
    "decode_attention",
    "linear_softpick",
    "scaled_dot_product_attention",
    "softpick",
    "varlen_attention",
]


class AttentionOutput(NamedTuple):
    """What attention returns when more than the output is asked for. Fields that were not asked for are None.

    The statistics are fp32 (fp64 for fp64 inputs) and carry no gradient.
    """

    output: Tensor
    """``(..., H, Tq, Dv)`` (packed: ``(total_q, H, Dv)``)."""
    lse: Tensor | None = None
    """``(..., H, Tq)`` (packed: ``(H, total_q)``): log of the denominator, its constant and eps included."""
    row_mass: Tensor | None = None
    """As ``lse``: sum of the weights of a row (1 for softmax, at most 1 for softpick); not by the kernels for caches."""
    max_score: Tensor | None = None
    """As ``row_mass``: largest score of a row that is not masked, minus infinity where there is none."""
    weights: Tensor | None = None
    """``(..., H, Tq, Tk)``, before dropout (reference backend only)."""


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
    check_backend(backend)
    query, key, value = to_autocast_dtype(check_qkv(query, key, value))
    options: Any
    dropout_p = numbers.probability("dropout_p", dropout_p)
    numbers.flags(is_causal=is_causal, enable_gqa=enable_gqa, return_stats=return_stats, return_weights=return_weights)
    check_alignment(causal_alignment)
    q, k, v, lead = canonical_shapes(query, key, value, enable_gqa)
    dims = max(query.dim(), key.dim(), value.dim())
    mask = canonical_mask(attn_mask, lead, q, k)
    left, right = window_bounds(window, is_causal)
    check_sink(sink, norm, q.shape[1], q)
    scale = default_scale(scale, q.shape[-1])
    softcap = check_softcap(softcap)
    eps = default_eps(eps, norm)

    bottom_right = causal_alignment == "bottom_right"
    asked = return_stats or return_weights
    plain = not asked and plain_softmax(norm, eps, softcap, left, right, is_causal, attn_mask, bottom_right, q, k)
    if backend == "sdpa" and not plain:
        raise ValueError(
            "backend: 'sdpa' is torch's softmax kernel; it has no other normalizer, no eps, softcap, window, mask beside "
            "is_causal, bottom-right alignment of different lengths, statistics or weights. Choose 'triton', 'tiled' or "
            "'reference'"
        )
    if plain and (backend == "sdpa" or (backend == "auto" and takes_sdpa(q, k, v, mask))):
        options = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        if mask is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, **options)
        return restore_shape(F.scaled_dot_product_attention(q, k, v, mask, **options), lead, dims)
    if return_weights and backend in ("tiled", "triton"):
        raise ValueError(
            f"return_weights: the {backend!r} backend never forms the weights; choose 'reference' or 'auto'"
        )
    named = backend
    wanted = wants_reference(q, k, v, mask, sink)
    backend = "reference" if return_weights else choose_backend(backend, q, v, norm, "tiled", wanted=wanted)
    options = {"backend": operator_name(named, backend), "normalizer": norm.text, "scale": scale, "eps": eps}
    options |= {"mask": mask, "sink": sink, "left": left, "right": right, "bottom_right": bottom_right}
    options |= {"softcap": softcap, "dropout_p": dropout_p, "stats": return_stats}

    if backend == "reference":
        keep, bias = keep_and_bias(mask, q, k, left, right, bottom_right)
        with no_autocast(q):
            options = {"normalizer": norm, "scale": scale, "eps": eps, "keep": keep, "bias": bias, "sink": sink}
            out, lse, mass, largest, weights = attention_reference(
                q, k, v, softcap=softcap, dropout_p=dropout_p, **options
            )
    elif backend == "triton" and dropout_p == 0.0 and not return_stats and few_queries(q, k, v, mask, sink):
        cap = softcap or 0.0
        try:
            out, _ = decode(
                q, k, v, mask, sink, None, None, norm.text, scale, eps, left, right, bottom_right, cap, options["backend"]
            )  # fmt: skip
        except KernelError as failure:
            fall_back(failure, "the kernels for long queries compute it instead")
            out, *_ = attention(q, k, v, **options)
        return restore_shape(out, lead, dims)
    else:
        weights = None
        out, lse, mass, largest = attention(q, k, v, **options)
    if not (return_stats or return_weights):
        return restore_shape(out, lead, dims)
    stats = (lse, mass, largest) if return_stats else (None, None, None)
    return _restored(out, stats, weights if return_weights else None, lead, dims)


def _restored(out: Tensor, stats: Any, weights: Tensor | None, lead: tuple[int, ...], dims: int) -> AttentionOutput:
    """Output, statistics and weights with the leading dimensions of the inputs."""
    lse, mass, largest = (None if x is None else restore_shape(x[..., None], lead, dims)[..., 0] for x in stats)
    full = None if weights is None else restore_shape(weights, lead, dims)
    return AttentionOutput(restore_shape(out, lead, dims), lse, mass, largest, full)


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    is_causal: bool = ...,
    *,
    enable_gqa: bool = ...,
    normalizer: str | Normalizer = ...,
    backend: str = ...,
    causal_alignment: Literal["top_left", "bottom_right"] = ...,
    window: int | tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sink: Tensor | None = ...,
    eps: float | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    is_causal: bool = ...,
    *,
    enable_gqa: bool = ...,
    normalizer: str | Normalizer = ...,
    backend: str = ...,
    causal_alignment: Literal["top_left", "bottom_right"] = ...,
    window: int | tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sink: Tensor | None = ...,
    eps: float | None = ...,
    return_stats: bool = ...,
) -> Tensor | AttentionOutput: ...


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
    enable_gqa: bool = True,
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

    Args:
        query: ``(total_q, H, D)``.
        key: ``(total_k, Hkv, D)``.
        value: ``(total_k, Hkv, Dv)``.
        cu_seqlens_q: ``(N + 1,)`` int32 or int64: starts of the sequences and their end, from 0.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: longest query sequence. If None it is taken from ``cu_seqlens_q``; inside ``torch.compile`` and CUDA
            graphs, where that cannot be read, ``total_q``: right, but give it there for speed. If given it is checked on
            the CPU, and so are the offsets; on a GPU, where looking would wait for it, both are if the environment variable
            ``SOFTPICK_DEBUG`` is ``1``.
        max_seqlen_k: longest key sequence; likewise.
        dropout_p: probability with which a weight is dropped.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        is_causal: causal within each sequence.
        enable_gqa: allow fewer key than query heads (grouped-query attention).
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
    check_backend(backend)
    if backend == "sdpa":
        raise ValueError("backend: 'sdpa' has no packed sequences; choose 'triton', 'tiled' or 'reference'")
    query, key, value = to_autocast_dtype(check_qkv(query, key, value, packed=True))
    dropout_p = numbers.probability("dropout_p", dropout_p)
    numbers.flags(is_causal=is_causal, enable_gqa=enable_gqa, return_stats=return_stats)
    check_alignment(causal_alignment)
    longest_q = check_offsets("cu_seqlens_q", cu_seqlens_q, query, max_seqlen_q, "max_seqlen_q")
    longest_k = check_offsets("cu_seqlens_k", cu_seqlens_k, key, max_seqlen_k, "max_seqlen_k")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected as many sequences as cu_seqlens_q ({cu_seqlens_q.numel() - 1}), "
            f"got {cu_seqlens_k.numel() - 1}"
        )
    q, k, v, _ = canonical_shapes(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), enable_gqa)
    left, right = window_bounds(window, is_causal)
    check_sink(sink, norm, q.shape[1], q)
    bottom_right = causal_alignment == "bottom_right"
    scale, softcap, eps = default_scale(scale, q.shape[-1]), check_softcap(softcap), default_eps(eps, norm)
    named = backend
    backend = choose_backend(backend, q, v, norm, "tiled", wanted=wants_reference(q, k, v, sink))
    if backend == "reference":
        options: Any = {"normalizer": norm, "scale": scale, "eps": eps, "softcap": softcap, "sink": sink}
        out, lse, mass, largest = packed_reference(
            q, k, v, cu_seqlens_q, cu_seqlens_k, left, right, bottom_right, dropout_p=dropout_p, **options
        )
    else:
        out, lse, mass, largest = attention(
            q,
            k,
            v,
            backend=operator_name(named, backend),
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
    return AttentionOutput(out, lse[0], mass[0], largest[0]) if return_stats else out


@overload
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = ...,
    block_table: Tensor | None = ...,
    is_causal: bool | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    normalizer: str | Normalizer = ...,
    backend: str = ...,
    window: int | tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sink: Tensor | None = ...,
    eps: float | None = ...,
    return_stats: Literal[False] = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = ...,
    block_table: Tensor | None = ...,
    is_causal: bool | None = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    normalizer: str | Normalizer = ...,
    backend: str = ...,
    window: int | tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sink: Tensor | None = ...,
    eps: float | None = ...,
    return_stats: bool = ...,
    return_lse: bool = ...,
) -> Tensor | AttentionOutput | tuple[Tensor, Tensor]: ...


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
    enable_gqa: bool = True,
    normalizer: str | Normalizer = "softpick",
    backend: str = "auto",
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    eps: float | None = None,
    return_stats: bool = False,
    return_lse: bool = False,
) -> Tensor | AttentionOutput | tuple[Tensor, Tensor]:
    """Attention of few queries against a cache of keys and values that is partly filled, contiguous or in pages.

    The last query stands at the last filled position (it is that position's own query). For generation: there is
    no gradient.

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
            it, if the environment variable ``SOFTPICK_DEBUG`` is ``1`` (then ``cache_seqlens`` as well). Where nobody looks,
            nothing is read of a page that does not exist, and its keys count as masked.
        is_causal: each query sees keys up to its own position; False lets every query see all filled positions. Give it
            where there is more than one query: None is True, with a DeprecationWarning, and will be False as in the other
            functions.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        enable_gqa: allow fewer key than query heads (grouped-query attention).
        normalizer: a name of ``softpick.NORMALIZERS`` or a record of it.
        backend: ``"auto"``, or exactly this one or an error: ``"triton"`` (CUDA tensors in fp32, bf16 or fp16, head
            dimensions up to 256, ``H / Hkv * Tq`` up to 128), ``"reference"`` (copies the cache; any device). Auto takes
            Triton on a GPU (the reference, with a warning, for what it cannot take) and the reference on the CPU.
        window: as in :func:`scaled_dot_product_attention`, around each query's position.
        softcap: as in :func:`scaled_dot_product_attention`.
        sink: as in :func:`scaled_dot_product_attention`.
        eps: as in :func:`scaled_dot_product_attention`.
        return_stats: also return statistics: lse by every backend, row mass and largest score by the reference alone.
        return_lse: deprecated, for ``return_stats``: a pair of the output and lse.

    Returns:
        ``(B, H, Tq, Dv)`` in the query's dtype, or an :class:`AttentionOutput` if statistics are asked for, each ``(B, H, Tq)``
        in fp32 (fp64 for fp64). A query that sees no key is 0.

    Raises:
        TypeError: for wrong types and dtypes.
        ValueError: for wrong shapes, devices, lengths, unknown names, inputs that require a gradient while gradients are
            recorded, or an input that the named backend does not take.
    """
    norm = get_normalizer(normalizer)
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend: expected one of auto, triton, reference for decoding; got {backend!r}")
    is_causal = _causal_in_cache(is_causal, query)
    numbers.flags(is_causal=is_causal, enable_gqa=enable_gqa, return_stats=return_stats, return_lse=return_lse)
    if return_lse:
        _deprecated("return_lse: give return_stats=True, which returns an AttentionOutput with lse")
    room = check_cache(query, key_cache, value_cache, block_table)
    check_heads(query, key_cache.shape[1 if block_table is None else 2], enable_gqa)
    query, key_cache, value_cache = to_autocast_dtype((query, key_cache, value_cache))
    if cache_seqlens is not None:
        check_lengths(cache_seqlens, query, room)
    left, right = window_bounds(window, is_causal)
    heads = query.shape[1]
    check_sink(sink, norm, heads, query)
    for name, x in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache), ("sink", sink)):
        if torch.is_grad_enabled() and x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, which decode_attention does not have; call it under torch.no_grad(), or call "
                "scaled_dot_product_attention"
            )
    scale, softcap, eps = default_scale(scale, query.shape[-1]), check_softcap(softcap), default_eps(eps, norm)
    # views (B or num_blocks, Hkv, S or page, D)
    key, value = (x if block_table is None else x.transpose(1, 2) for x in (key_cache, value_cache))
    groups = heads // key.shape[1] if key.shape[1] else 1
    wanted = wants_reference(query, key, value, sink)
    named, backend = (
        backend,
        choose_backend(backend, query, value, norm, "reference", groups * query.shape[2], wanted=wanted),
    )
    used = None
    if block_table is not None and (backend == "reference" or checkable(block_table)):
        used = used_blocks(cache_seqlens, block_table, key.shape[2], query.shape[2], left)
        check_pages(block_table, used, key.shape[0])
    if backend == "triton":
        cap = softcap or 0.0
        try:
            name = operator_name(named, backend)
            out, lse = decode(
                query, key, value, None, sink, cache_seqlens, block_table, norm.text, scale, eps, left, right, True, cap, name
            )  # fmt: skip
            return (out, lse) if return_lse else AttentionOutput(out, lse) if return_stats else out
        except KernelError as failure:
            if named == "triton":
                raise
            fall_back(failure, "the reference computes it instead, slowly (backend='auto')")
            if block_table is not None:
                used = used_blocks(cache_seqlens, block_table, key.shape[2], query.shape[2], left)
    options: Any = {"normalizer": norm, "scale": scale, "eps": eps, "softcap": softcap, "sink": sink}
    found = cache_reference(query, key, value, cache_seqlens, block_table, used, room, left, right, **options)
    if return_lse:
        return found[:2]
    return AttentionOutput(*found) if return_stats else found[0]


def _causal_in_cache(is_causal: bool | None, query: Tensor) -> bool:
    """The default of ``is_causal`` in decoding, with a warning where it matters and will be another."""
    if is_causal is None and isinstance(query, Tensor) and query.dim() == 4 and query.shape[2] > 1:
        _deprecated("is_causal: give is_causal=True for several queries; the default will be False, as in attention")
    return True if is_causal is None else is_causal


def _deprecated(message: str) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(f"decode_attention: {message}", DeprecationWarning, stacklevel=3)
