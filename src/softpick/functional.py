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

from softpick.normalizers import Normalizer
from softpick.ops import numbers
from softpick.ops.arguments import (
    check_pages,
    checkable,
    keep_and_bias,
    no_autocast,
    restore_shape,
    used_blocks,
)
from softpick.ops.backends import announce, choose_backend, operator_name
from softpick.ops.calls import Call, attention_backend, check_cache_call, check_call, is_decoding
from softpick.ops.key_bounds import KeyBounds
from softpick.ops.operators import attention
from softpick.ops.operators_decode import decode
from softpick.ops.reference import attention_reference
from softpick.ops.reference_layouts import cache_reference, packed_reference, skipping_reference
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
    """As ``lse``: sum of the weights of a row (1 for softmax, at most 1 for softpick). The kernels for caches leave it None."""
    max_score: Tensor | None = None
    """As ``row_mass``: largest score of a row that is not masked, minus infinity where there is none."""
    weights: Tensor | None = None
    """``(..., H, Tq, Tk)``, before dropout (reference backend only)."""
    error: Tensor | None = None
    """``(B, H, Tq)``, of ``decode_attention`` with ``key_bounds``: ``|output - exact| <= error * |exact|``, rounding aside; the
    denominator, whose logarithm lse is, differs by no larger factor."""
    blocks: Tensor | None = None
    """``(B, Hkv, 3)`` int32, likewise: blocks with visible keys, blocks whose keys were read, and whose values were."""


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
        normalizer: a name of ``softpick.NORMALIZERS``, or a :class:`softpick.Normalizer`.
        backend: ``"reference"`` (full matrix, differentiable twice), ``"tiled"`` (O(T) memory, for the CPU), ``"triton"`` (GPU
            kernels: CUDA tensors in fp32, bf16 or fp16, head dimensions up to 256), ``"sdpa"`` (torch's own kernels; softmax
            only), or ``"auto"``. A named backend runs or raises. ``"auto"`` takes the reference where weights, forward-mode
            derivatives or (in ``torch.func``) derivatives of derivatives are asked for, since no other backend has them;
            torch's kernels for plain softmax; else Triton on a GPU and ``"tiled"`` on the CPU. For a call that Triton cannot
            take, ``"auto"`` warns and takes ``"tiled"``.
        causal_alignment: for ``Tq != Tk``: ``"top_left"`` as torch has it, or ``"bottom_right"``: the last query sees the
            last key, as decoding with a cache needs it. Also places ``window``.
        window: sliding window: ``(left, right)`` keys around the query's own position (-1: unbounded), or an integer ``w``
            for ``|i - j| < w``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma).
        sink: ``(H,)`` logits; required by ``learned_sink`` and by no other. Receives a gradient.
        eps: added to the denominator once that was divided by ``e^m``; the table's value if None. ``m`` is the row's largest
            score, and at least 0 except with plain exponentials and no constant, as in softmax.
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
    call = check_call(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa, normalizer=normalizer, backend=backend, causal_alignment=causal_alignment, window=window,
        softcap=softcap, sink=sink, eps=eps, return_stats=return_stats, return_weights=return_weights,
    )  # fmt: skip
    dims = max(call.query.dim(), call.key.dim(), call.value.dim())
    found = attention_backend(call, backend)
    announce(found)
    if found.name == "sdpa":
        options: Any = {"dropout_p": call.dropout_p, "scale": call.scale, "enable_gqa": enable_gqa}
        if call.mask is None:
            return F.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=is_causal, **options)
        out = F.scaled_dot_product_attention(call.q, call.k, call.v, call.mask, **options)
        return restore_shape(out, call.lead, dims)
    weights = None
    if found.name == "reference":
        out, lse, mass, largest, weights = _by_reference(call)
    elif found.name == "triton" and is_decoding(call):
        return restore_shape(_by_decoding(call, operator_name(backend, found.name)), call.lead, dims)
    else:
        out, lse, mass, largest = _by_operator(call, operator_name(backend, found.name))
    if not (return_stats or return_weights):
        return restore_shape(out, call.lead, dims)
    stats = (lse, mass, largest) if return_stats else (None, None, None)
    return _restored(out, stats, weights if return_weights else None, call.lead, dims)


def _by_reference(call: Call) -> tuple[Tensor, ...]:
    """Output, lse, row mass, largest score and weights by the full matrix."""
    keep, bias = keep_and_bias(call.mask, call.q, call.k, call.left, call.right, call.bottom_right)
    with no_autocast(call.q):
        return attention_reference(
            call.q, call.k, call.v, normalizer=call.norm, scale=call.scale, eps=call.eps, keep=keep, bias=bias,
            sink=call.sink, softcap=call.softcap, dropout_p=call.dropout_p,
        )  # fmt: skip


def _by_decoding(call: Call, backend: str) -> Tensor:
    """Output by the kernel for few queries."""
    return decode(
        call.q, call.k, call.v, call.mask, call.sink, None, None, call.norm.text, call.scale, call.eps, call.left,
        call.right, call.bottom_right, call.softcap or 0.0, backend,
    )[0]  # fmt: skip


def _by_operator(call: Call, backend: str, **packed: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, lse, row mass and largest score by the tiled or the Triton backend; ``packed``: offsets and longest lengths."""
    return attention(
        call.q, call.k, call.v, backend=backend, normalizer=call.norm.text, scale=call.scale, eps=call.eps, mask=call.mask,
        sink=call.sink, left=call.left, right=call.right, bottom_right=call.bottom_right, softcap=call.softcap,
        dropout_p=call.dropout_p, stats=call.stats, **packed,
    )  # fmt: skip


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
        max_seqlen_q: longest query sequence. If None it is read from ``cu_seqlens_q``; inside ``torch.compile`` and CUDA
            graphs, where it cannot be read, ``total_q`` stands in: right, but slower. The number and the offsets are checked
            on the CPU. On a GPU a check would wait for the GPU, so both are checked only if the environment variable
            ``SOFTPICK_DEBUG`` is ``1``.
        max_seqlen_k: longest key sequence; likewise.
        dropout_p: probability with which a weight is dropped.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        is_causal: causal within each sequence.
        enable_gqa: allow fewer key than query heads (grouped-query attention).
        normalizer: a name of ``softpick.NORMALIZERS``, or a :class:`softpick.Normalizer`.
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
    call = check_call(
        query, key, value, packed=(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), dropout_p=dropout_p,
        is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, normalizer=normalizer, backend=backend,
        causal_alignment=causal_alignment, window=window, softcap=softcap, sink=sink, eps=eps, return_stats=return_stats,
    )  # fmt: skip
    assert call.longest is not None
    found = attention_backend(call, backend)
    announce(found)
    if found.name == "reference":
        options: Any = {"normalizer": call.norm, "scale": call.scale, "eps": call.eps, "softcap": call.softcap}
        out, lse, mass, largest = packed_reference(
            call.q, call.k, call.v, cu_seqlens_q, cu_seqlens_k, call.left, call.right, call.bottom_right, sink=call.sink,
            dropout_p=call.dropout_p, **options,
        )  # fmt: skip
    else:
        offsets: Any = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        offsets |= {"max_seqlen_q": call.longest[0], "max_seqlen_k": call.longest[1]}
        out, lse, mass, largest = _by_operator(call, operator_name(backend, found.name), **offsets)
    out = out[0].transpose(0, 1)
    return AttentionOutput(out, lse[0], mass[0], largest[0]) if return_stats else out


@overload
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    key_scale: Tensor | None = ...,
    value_scale: Tensor | None = ...,
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
    key_bounds: KeyBounds | None = ...,
    max_error: float = ...,
    return_stats: Literal[False] = ...,
    return_error: Literal[False] = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    key_scale: Tensor | None = ...,
    value_scale: Tensor | None = ...,
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
    key_bounds: KeyBounds | None = ...,
    max_error: float = ...,
    return_stats: bool = ...,
    return_error: bool = ...,
    return_lse: bool = ...,
) -> Tensor | AttentionOutput | tuple[Tensor, Tensor]: ...


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
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
    key_bounds: KeyBounds | None = None,
    max_error: float = 0.0,
    return_stats: bool = False,
    return_error: bool = False,
    return_lse: bool = False,
) -> Tensor | AttentionOutput | tuple[Tensor, Tensor]:
    """Attention of few queries against a cache of keys and values that is partly filled, contiguous or in pages.

    The last query stands at the last filled position (it is that position's own query). For generation: there is
    no gradient.

    Args:
        query: ``(B, H, Tq, D)``, fp64, fp32, bf16 or fp16.
        key_cache: ``(B, Hkv, S, D)``; with ``block_table`` pages ``(num_blocks, page_size, Hkv, D)``, FlashAttention's
            layout. Any strides: slices and transposed views are not copied. The query's dtype, or ``torch.float8_e4m3fn``
            (:func:`softpick.quantize_fp8`).
        value_cache: as ``key_cache``, with ``Dv`` for ``D``.
        key_scale: only for a cache in fp8, and required there: what a stored key is multiplied with. Shape ``()``, ``(Hkv,)``,
            ``(B, Hkv)``, or with ``block_table`` ``(num_blocks, Hkv)`` instead, one a page and head. Negative or infinite
            scales are an error on the CPU, on a GPU if ``SOFTPICK_DEBUG`` is ``1``.
        value_scale: likewise, of stored values.
        cache_seqlens: ``(B,)`` int32 or int64: how many positions are filled, the new ones included; all if None. Positions
            beyond are never read. On the CPU a length beyond the room in the cache is an error. On a GPU, where a check
            would wait for the GPU, and inside ``torch.compile`` such a length counts as the room.
        block_table: ``(B, max_blocks)`` int32: the pages of each sequence in order. Entries without a filled position within
            reach of a query may be anything. The others are checked on the CPU, and on a GPU if the environment variable
            ``SOFTPICK_DEBUG`` is ``1`` (then ``cache_seqlens`` as well). Without a check, nothing is read of a page that does
            not exist, and its keys count as masked.
        is_causal: each query sees keys up to its own position; False lets every query see all filled positions. Give it
            where there is more than one query: None is True, with a DeprecationWarning, and will be False as in the other
            functions.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        enable_gqa: allow fewer key than query heads (grouped-query attention).
        normalizer: a name of ``softpick.NORMALIZERS``, or a :class:`softpick.Normalizer`.
        backend: ``"triton"`` (CUDA tensors in fp32, bf16 or fp16, head dimensions up to 256, ``H / Hkv * Tq`` up to 128),
            ``"reference"`` (copies the cache; any device), or ``"auto"``. A named backend runs or raises. ``"auto"`` takes
            Triton on a GPU and the reference on the CPU. For a call that Triton cannot take, ``"auto"`` warns and takes the
            reference.
        window: as in :func:`scaled_dot_product_attention`, around each query's position.
        softcap: as in :func:`scaled_dot_product_attention`.
        sink: as in :func:`scaled_dot_product_attention`.
        eps: as in :func:`scaled_dot_product_attention`.
        key_bounds: bounds of the keys by block, of :func:`softpick.key_bounds`; only for normalizers with a rectified
            numerator. Values of blocks whose scores they show to be at most 0 are not needed, and keys as ``max_error`` says.
            Blocks that were filled since the bounds were made are read. Keys that were overwritten since, without
            :func:`softpick.update_key_bounds`, make results wrong that nobody notices.
        max_error: from 0 to below 1. Keys are left unread, too, as long as ``|output - exact| <= max_error * |exact|`` is
            certain for every number of the output, rounding aside. With 0 (exact) these are keys that count nowhere: for
            ``relu_softpick`` and ``rectified`` keys with scores below 0, for every normalizer those of heads whose output
            is 0.
        return_stats: also return statistics: lse by every backend, row mass and largest score by the reference alone; with
            ``key_bounds`` no largest score.
        return_error: also return the bound that was kept, ``error``, and how many ``blocks`` were read; needs
            ``key_bounds``.
        return_lse: deprecated, for ``return_stats``: a pair of the output and lse.

    Returns:
        ``(B, H, Tq, Dv)`` in the query's dtype, or an :class:`AttentionOutput` if statistics or the error are asked for, each
        ``(B, H, Tq)`` in fp32 (fp64 for fp64). A query that sees no key is 0.

    Raises:
        TypeError: for wrong types and dtypes.
        ValueError: for wrong shapes, devices, lengths, unknown names, inputs that require a gradient while gradients are
            recorded, or an input that the named backend does not take.
    """
    numbers.flags(return_stats=return_stats, return_error=return_error, return_lse=return_lse)
    if return_lse:
        _deprecated("return_lse: give return_stats=True, which returns an AttentionOutput with lse")
    call = check_cache_call(
        query, key_cache, value_cache, cache_seqlens=cache_seqlens, block_table=block_table,
        is_causal=_causal_in_cache(is_causal, query), scale=scale, enable_gqa=enable_gqa, normalizer=normalizer,
        backend=backend, window=window, softcap=softcap, sink=sink, eps=eps, key_bounds=key_bounds, max_error=max_error,
        return_error=return_error, key_scale=key_scale, value_scale=value_scale,
    )  # fmt: skip
    norm, query, key, value = call[:4]
    wanted = wants_reference(query, key, value, call.sink)
    chosen = choose_backend(backend, query, value, norm, "reference", call.rows, wanted=wanted)
    if block_table is not None and checkable(block_table):
        check_pages(
            block_table, used_blocks(cache_seqlens, block_table, key.shape[2], query.shape[2], call.left), key.shape[0]
        )
    plan = None if call.bounds is None else call.plan(cache_seqlens, block_table, return_stats or return_lse)
    found: tuple[Tensor, ...]
    if chosen == "triton":
        listed: Any = (None, None, None, 0) if plan is None else plan.listed
        scales: Any = call.scales or ()
        found = decode(
            query, key, value, None, call.sink, cache_seqlens, block_table, norm.text, call.scale, call.eps, call.left,
            call.right, True, call.softcap or 0.0, operator_name(backend, chosen), *listed, *scales,
        )  # fmt: skip
    else:
        options: Any = {
            "normalizer": norm,
            "scale": call.scale,
            "eps": call.eps,
            "softcap": call.softcap,
            "sink": call.sink,
        }
        where: Any = (query, key, value, cache_seqlens, block_table, call.room, call.left, call.right)
        if plan is None:
            found = cache_reference(*where, **options | {"scales": call.scales})
        else:
            found = skipping_reference(plan, *where, **options)
    if return_lse:
        return found[0], found[1]
    if not (return_stats or return_error):
        return found[0]
    result = AttentionOutput(*found) if return_stats else AttentionOutput(found[0])
    if plan is not None and return_error:
        result = result._replace(error=plan.error(found[1]), blocks=plan.counts())
    return result


def _causal_in_cache(is_causal: bool | None, query: Tensor) -> bool:
    """``is_causal`` of a decoding call; warns where the default matters, because it will change."""
    if is_causal is None and isinstance(query, Tensor) and query.dim() == 4 and query.shape[2] > 1:
        _deprecated("is_causal: give is_causal=True for several queries; the default will be False, as in attention")
    return True if is_causal is None else is_causal


def _deprecated(message: str) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(f"decode_attention: {message}", DeprecationWarning, stacklevel=3)
