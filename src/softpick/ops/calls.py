"""A call of attention with its arguments checked, and its backend; for the public functions and ``explain_backend``."""

from __future__ import annotations

from typing import NamedTuple

import torch
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
    check_qkv,
    check_sink,
    check_softcap,
    default_eps,
    default_scale,
    to_autocast_dtype,
    window_bounds,
)
from softpick.ops.backends import Backend, check_backend, few_queries, find_backend, sdpa_lacks, takes_sdpa
from softpick.ops.fp8 import Scales, check_scales
from softpick.ops.key_bounds import KeyBounds, check_bounds
from softpick.ops.skipping import Plan, check_rectified, plan_blocks
from softpick.ops.transforms import wants_reference

__all__ = ["CacheCall", "Call", "attention_backend", "check_cache_call", "check_call", "is_decoding"]


class Call(NamedTuple):
    """A call of ``scaled_dot_product_attention`` or ``varlen_attention``."""

    norm: Normalizer
    query: Tensor
    """As given, in autocast's dtype; ``key`` and ``value`` likewise."""
    key: Tensor
    value: Tensor
    q: Tensor
    """``(B, H, T, D)``, packed sequences with ``B`` 1; ``k`` and ``v`` likewise."""
    k: Tensor
    v: Tensor
    lead: tuple[int, ...]
    """Leading dimensions of the output."""
    mask: Tensor | None
    sink: Tensor | None
    left: int
    right: int
    bottom_right: bool
    scale: float
    softcap: float | None
    eps: float
    dropout_p: float
    stats: bool
    weights: bool
    longest: tuple[int, int] | None
    """Queries and keys of the longest packed sequence; None: not packed."""
    lacking: str | None
    """What torch's ``scaled_dot_product_attention`` lacks (:func:`sdpa_lacks`); None if it computes the same."""


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    normalizer: str | Normalizer,
    backend: str,
    causal_alignment: str,
    window: int | tuple[int, int] | None,
    softcap: float | None,
    sink: Tensor | None,
    eps: float | None,
    return_stats: bool,
    return_weights: bool = False,
    attn_mask: Tensor | None = None,
    packed: tuple[Tensor, Tensor, int | None, int | None] | None = None,
) -> Call:
    """The record of a call; ``packed``: the offsets and longest lengths of ``varlen_attention``.

    Raises:
        TypeError: as the public functions.
        ValueError: likewise.
    """
    norm = get_normalizer(normalizer)
    check_backend(backend)
    if packed is not None and backend == "sdpa":
        raise ValueError("backend: 'sdpa' has no packed sequences; choose 'triton', 'tiled' or 'reference'")
    query, key, value = to_autocast_dtype(check_qkv(query, key, value, packed is not None))
    dropout_p = numbers.probability("dropout_p", dropout_p)
    numbers.flags(is_causal=is_causal, enable_gqa=enable_gqa, return_stats=return_stats, return_weights=return_weights)
    check_alignment(causal_alignment)
    longest = None
    tensors = query, key, value
    if packed is not None:
        longest = _longest(query, key, *packed)
        tensors = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    q, k, v, lead = canonical_shapes(*tensors, enable_gqa)
    mask = canonical_mask(attn_mask, lead, q, k)
    left, right = window_bounds(window, is_causal)
    check_sink(sink, norm, q.shape[1], q)
    scale, softcap, eps = default_scale(scale, q.shape[-1]), check_softcap(softcap), default_eps(eps, norm)
    bottom_right = causal_alignment == "bottom_right"
    more = {"cu_seqlens_q": packed is not None, "return_stats": return_stats, "return_weights": return_weights}
    lacking = next((f"{name}: torch's kernels have no such argument" for name, given in more.items() if given), None)
    lacking = lacking or sdpa_lacks(norm, eps, softcap, left, right, is_causal, attn_mask, bottom_right, q, k)
    return Call(
        norm, query, key, value, q, k, v, lead, mask, sink, left, right, bottom_right, scale, softcap, eps, dropout_p,
        return_stats, return_weights, longest, lacking,
    )  # fmt: skip


def _longest(
    query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int | None, max_k: int | None
) -> tuple[int, int]:
    found = (
        check_offsets("cu_seqlens_q", cu_q, query, max_q, "max_seqlen_q"),
        check_offsets("cu_seqlens_k", cu_k, key, max_k, "max_seqlen_k"),
    )
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected as many sequences as cu_seqlens_q ({cu_q.numel() - 1}), got {cu_k.numel() - 1}"
        )
    return found


def attention_backend(call: Call, backend: str) -> Backend:
    """The backend that takes a call.

    Raises:
        ValueError: the named backend does not take it.
    """
    if backend == "sdpa" and call.lacking is not None:
        raise ValueError(
            "backend: 'sdpa' is torch's softmax kernel; it has no other normalizer, no eps, softcap, window, mask beside "
            "is_causal, bottom-right alignment of different lengths, statistics or weights. Choose 'triton', 'tiled' or "
            "'reference'"
        )
    tensors = call.q, call.k, call.v, call.mask
    if call.lacking is None and backend == "auto" and takes_sdpa(*tensors):
        return Backend("sdpa")
    if call.weights:
        if backend in ("tiled", "triton"):
            raise ValueError(
                f"return_weights: the {backend!r} backend never forms the weights; choose 'reference' or 'auto'"
            )
        return Backend("reference", "return_weights: kernels never form the weights")
    return find_backend(backend, call.q, call.v, call.norm, "tiled", wanted=wants_reference(*tensors, call.sink))


def is_decoding(call: Call) -> bool:
    """Whether the Triton backend takes its kernel for few queries."""
    if call.longest is not None or call.dropout_p or call.stats:
        return False
    return few_queries(call.q, call.k, call.v, call.mask, call.sink)


class CacheCall(NamedTuple):
    """A call of ``decode_attention``."""

    norm: Normalizer
    query: Tensor
    key: Tensor
    """A view ``(B, Hkv, S, D)``, or of pages ``(num_blocks, Hkv, page_size, D)``; ``value`` likewise."""
    value: Tensor
    sink: Tensor | None
    room: int
    """Positions that a sequence has in the cache."""
    left: int
    right: int
    scale: float
    softcap: float | None
    eps: float
    bounds: KeyBounds | None
    max_error: float
    scales: Scales | None
    """Of a cache in fp8."""

    def plan(self, lengths: Tensor | None, table: Tensor | None, lse_wanted: bool) -> Plan:
        """Which blocks of keys are read, by their bounds."""
        assert self.bounds is not None
        return plan_blocks(
            self.norm, self.query, self.bounds, lengths, table, self.room, self.left, self.right, self.scale, self.softcap,
            self.max_error, lse_wanted,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """How many rows of queries share a key head."""
        heads = self.key.shape[1]
        return self.query.shape[1] // max(1, heads) * self.query.shape[2]


def check_cache_call(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    normalizer: str | Normalizer,
    backend: str,
    window: int | tuple[int, int] | None,
    softcap: float | None,
    sink: Tensor | None,
    eps: float | None,
    key_bounds: KeyBounds | None = None,
    max_error: float = 0.0,
    return_error: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> CacheCall:
    """The record of a call of ``decode_attention``; pages are not looked at.

    Raises:
        TypeError: as the public function.
        ValueError: likewise.
    """
    norm = get_normalizer(normalizer)
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend: expected one of auto, triton, reference for decoding; got {backend!r}")
    numbers.flags(is_causal=is_causal, enable_gqa=enable_gqa)
    room = check_cache(query, key_cache, value_cache, block_table)
    check_heads(query, key_cache.shape[1 if block_table is None else 2], enable_gqa)
    scales = check_scales(key_cache, value_cache, key_scale, value_scale, query.shape[0], block_table is not None)
    if scales is None:
        query, key_cache, value_cache = to_autocast_dtype((query, key_cache, value_cache))
    else:
        query, _, _ = to_autocast_dtype((query, query, query))
    if cache_seqlens is not None:
        check_lengths(cache_seqlens, query, room)
    left, right = window_bounds(window, is_causal)
    check_sink(sink, norm, query.shape[1], query)
    for name, x in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache), ("sink", sink)):
        if torch.is_grad_enabled() and x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, which decode_attention does not have; call it under torch.no_grad(), or call "
                "scaled_dot_product_attention"
            )
    scale, softcap, eps = default_scale(scale, query.shape[-1]), check_softcap(softcap), default_eps(eps, norm)
    key, value = (x if block_table is None else x.transpose(1, 2) for x in (key_cache, value_cache))
    max_error = float(numbers.number("max_error", max_error, "a number from 0 to below 1", 0.0))
    if max_error >= 1:
        raise ValueError(f"max_error: expected a number from 0 to below 1, got {max_error}")
    if key_bounds is None:
        for name, given in (("max_error", max_error > 0), ("return_error", return_error)):
            if given:
                raise ValueError(
                    f"{name}: expected key_bounds beside it, without which every key is read; got None (softpick.key_bounds "
                    "makes them)"
                )
    else:
        if scales is not None:
            raise ValueError(
                "key_bounds: a cache in torch.float8_e4m3fn has none; expected None, or a cache in bf16 or fp16"
            )
        check_rectified(norm)
        check_bounds(key_bounds, key, block_table)
    return CacheCall(
        norm, query, key, value, sink, room, left, right, scale, softcap, eps, key_bounds, max_error, scales
    )
