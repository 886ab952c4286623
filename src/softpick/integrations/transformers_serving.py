"""Continuous batching of transformers (``model.generate_batch``, ``ContinuousBatchingManager``) with every normalizer.

transformers runs many requests as one row of tokens: prompts, pieces of long prompts and single new tokens side by side,
with keys and values in pages that requests share. The attention function gets the new tokens of all requests, and either
reads the keys of each request through the cache or, where every request has one new token, is given the pages themselves.

transformers 5.17 to 5.24 has no hook for an attention function of somebody else here: whatever is not called ``sdpa`` or
``eager``, and has no ``flash`` in its name, is refused or runs as ``paged|sdpa``, and a model may be switched to
FlashAttention's softmax. :func:`install` replaces those decisions, for our implementations only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.generation.continuous_batching import cache as cb_cache
from transformers.generation.continuous_batching import initialization

from softpick.functional import decode_attention, varlen_attention
from softpick.integrations.patches import original, replace
from softpick.nn.attention import scaled_by_length
from softpick.normalizers import Normalizer

__all__ = ["attend_paged", "install", "is_paged", "without_paged"]

_ONLY_HERE = frozenset(
    {
        "block_table",
        "cache",
        "k_cache",
        "logits_indices",
        "logits_processor_args",
        "max_length_k",
        "max_seqlen_k",
        "max_seqlen_q",
        "read_index",
        "v_cache",
        "write_index",
    }
)
"""What continuous batching gives to every layer."""

_CACHE_CHOOSES = "kwargs" in inspect.signature(cb_cache.PagedAttentionCache.update).parameters
"""From transformers 5.19: the cache chooses the offsets and pages of a layer. Before, no pages are handed to a function."""


def is_paged(given: dict[str, Any]) -> bool:
    """Whether arguments of a model or of an attention function are those of continuous batching."""
    return "read_index" in given


def without_paged(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an attention function that have nothing to do with continuous batching."""
    return {name: value for name, value in given.items() if name not in _ONLY_HERE}


@torch.compiler.disable  # pages are written in place; transformers' own functions are not compiled either
def attend_paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: dict[str, Any],
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | dict[str, Tensor],
    max_length_q: int | None,
    scaling: float | None,
    normalizer: Normalizer,
    softcap: float | None,
    sink: Tensor | None,
    sliding_window: int | None,
    score_scale: Tensor | None,
    output_gate: Tensor | None,
) -> Tensor:
    """Attention of the new tokens of many requests, each to all the keys of its own request.

    Args:
        module: the attention layer; its ``layer_idx`` finds its part of the cache.
        query: ``(1, H, Tq, D)``, the new tokens of all requests in one row. The last query of a request stands at the last
            of its keys.
        key: ``(1, Hkv, T, D)``: those of the new tokens (up to transformers 5.23, and with pages), or of all tokens.
        value: as ``key``, with ``Dv`` for ``D``.
        given: what continuous batching passes: ``read_index``, ``write_index``, ``block_table``, and ``cache`` where the
            layer has not called it (up to transformers 5.23), else what the cache answered (``k_cache``, ``v_cache``).
        cu_seq_lens_q: ``(N + 1,)`` starts and end of the requests among the queries. Queries behind the last are padding.
        cu_seq_lens_k: the same among the keys; by type of layer where the layer has not called the cache.
        max_length_q: the most new tokens of a request; up to transformers 5.18 ``given["max_seqlen_q"]``.
        scaling: factor on the scores; ``1 / sqrt(D)`` if None.
        normalizer: the record.
        softcap: as in :func:`softpick.scaled_dot_product_attention`.
        sink: ``(H,)`` logits, or None.
        sliding_window: tokens that a query sees, its own included, or None.
        score_scale: ``(H,)``: scores are multiplied by it and the logarithm of the number of visible keys, or None.
        output_gate: ``(1, Tq, H, Dv)``: the output is multiplied by its sigmoid, or None.

    Returns:
        ``(1, Tq, H, Dv)``.
    """
    given = {**given, "cu_seq_lens_k": cu_seq_lens_k}
    cache = given.pop("cache", None)
    if not _CACHE_CHOOSES:
        key, value = _gathered(module, cache, key, value, given, sliding_window)
        max_length_q = given["max_seqlen_q"]
    elif cache is not None:
        layer: Any = module.layer_idx
        # also fills in the offsets of this layer and, with a block table, its pages
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=given)
    offsets_k, longest_k = given["cu_seq_lens_k"], given["max_length_k"]
    window = (sliding_window - 1, 0) if sliding_window else None
    if score_scale is not None:
        query = _scaled(query, score_scale, cu_seq_lens_q, offsets_k, sliding_window)
    options: dict[str, Any] = {"normalizer": normalizer, "window": window, "softcap": softcap, "sink": sink}
    if given.get("block_table") is not None:
        filled = offsets_k.diff()
        _write_pages(given, key, value, filled)
        table = given["block_table"]
        if not table.is_cuda:
            table = table[
                :, : -(-int(filled.max()) // given["k_cache"].shape[1])
            ]  # what is behind is copied for nothing
        out = decode_attention(
            query[0].transpose(0, 1)[:, :, None],
            given["k_cache"],
            given["v_cache"],
            cache_seqlens=filled,
            block_table=table,
            scale=scaling,
            **options,
        )
        assert isinstance(out, Tensor)
        out = out[:, :, 0]
    else:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        varlen = varlen_attention(
            q, k, v, cu_seq_lens_q, offsets_k, max_length_q, longest_k, scale=scaling, is_causal=True, **options
        )
        assert isinstance(varlen, Tensor)
        out = varlen
    out = out[None]
    return out if output_gate is None else out * torch.sigmoid(output_gate)


def _gathered(
    module: nn.Module, cache: Any, key: Tensor, value: Tensor, given: dict[str, Any], sliding_window: int | None
) -> tuple[Tensor, Tensor]:
    """Up to transformers 5.18: keys and values of all tokens, from the cache; the offsets of this layer go into ``given``."""
    layer: Any = module.layer_idx
    where = {name: given[name] for name in ("read_index", "write_index")}
    tokens = cache.update(key_states=key, value_states=value, layer_idx=layer, **where)
    kind = "sliding_attention" if sliding_window else "full_attention"
    for name, old in (("cu_seq_lens_k", "cu_seq_lens_k"), ("max_length_k", "max_seqlen_k")):
        given[name] = given[old][kind] if isinstance(given[old], dict) else given[old]
    key, value = (x.transpose(0, 1)[None] for x in tokens)
    return key, value


def _write_pages(given: dict[str, Any], key: Tensor, value: Tensor, filled: Tensor) -> None:
    """Write one new token of each request to its place in the pages; requests without a key are padding.

    Padding writes what the first request writes, to the same place, so that nothing is read from the device to leave it out
    and no two writes to a place differ.
    """
    table = given["block_table"]
    size = given["k_cache"].shape[1]
    last = (filled.long() - 1).clamp(min=0)
    page = table.gather(1, (last // size)[:, None]).squeeze(1).long().clamp(min=0)
    row = page * size + last % size
    there = filled > 0
    row = torch.where(there, row, row[:1])
    for pages, new in ((given["k_cache"], key), (given["v_cache"], value)):
        flat = pages.view(-1, *pages.shape[2:])
        tokens = new[0].transpose(0, 1).to(flat.dtype)
        instead = torch.where(there[0], tokens[:1], flat[row[:1]])  # what is there already, if all are padding
        flat[row] = torch.where(there[:, None, None], tokens, instead)


def _scaled(query: Tensor, score_scale: Tensor, offsets_q: Tensor, offsets_k: Tensor, window: int | None) -> Tensor:
    """Queries times ``score_scale log n``, ``n`` the keys that each may see."""
    token = torch.arange(query.shape[2], device=query.device)
    request = torch.searchsorted(offsets_q, token.to(offsets_q.dtype), right=True) - 1
    request = request.clamp(0, offsets_q.shape[0] - 2)
    seen = token - offsets_q[request + 1] + offsets_k.diff()[request] + 1
    if window:
        seen = seen.clamp(max=window)
    return scaled_by_length(query, score_scale, seen)


# ---------------------------------------------------------------------------------------------------------------------
# What transformers decides by names


def install(ours: Callable[[Any], bool]) -> None:
    """Let continuous batching take our implementations as they are. Repeatable.

    Written for transformers 5.17 to 5.24. Four decisions are replaced, all for our implementations alone: the manager keeps
    the model's implementation instead of switching it to FlashAttention or refusing it; memory is not planned for masks, and
    graphs are used, as for a function that needs no mask; the block table is used wherever the cache has one on a GPU, and
    elsewhere if ``max_blocks_per_request`` is given.

    Args:
        ours: whether a configuration has one of our implementations.
    """
    for target, wrap in (
        (
            "transformers.generation.continuous_batching.continuous_api:ContinuousBatchingManager.switch_to_cb_friendly_attn",
            _kept,
        ),
        (
            "transformers.generation.continuous_batching.initialization:ensure_decode_fast_path_is_available",
            _with_pages,
        ),
        ("transformers.generation.continuous_batching.initialization:is_flash_attention_requested", _needs_no_mask),
        ("transformers.generation.continuous_batching.cache:is_flash_attention_requested", _needs_no_mask),
    ):
        replace(target, wrap(original(target), ours))


def _kept(switch: Callable[..., None], ours: Callable[[Any], bool]) -> Callable[..., None]:
    """``ContinuousBatchingManager.switch_to_cb_friendly_attn`` that leaves a model of ours as it is."""

    @functools.wraps(switch)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if not ours(model.config):
            switch(self, model, *args, **kwargs)

    return switch_to_cb_friendly_attn


def _with_pages(ensure: Callable[..., None], ours: Callable[[Any], bool]) -> Callable[..., None]:
    """``ensure_decode_fast_path_is_available`` that allows ours a block table: on GPUs, or where one is asked for."""

    @functools.wraps(ensure)
    def ensure_decode_fast_path_is_available(config: Any, cb_config: Any, user_requested: bool) -> None:
        if not ours(config):
            ensure(config, cb_config, user_requested)
            return
        pages = _CACHE_CHOOSES
        if pages:
            types = initialization.group_layers_by_attn_type(config)
            pages = all(initialization.ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table for kind in types)
        if not pages and cb_config.max_blocks_per_request and user_requested:
            raise ValueError(
                f"max_blocks_per_request: expected 0 or None: transformers {transformers.__version__} has no block table "
                f"for the layers of a {config.model_type} model; got {cb_config.max_blocks_per_request}"
            )
        # without a GPU's kernel, pages are copied with the room of the longest request for each: gathering is 3 times as fast
        if not pages or not (user_requested or torch.cuda.is_available()):
            cb_config.max_blocks_per_request = 0

    return ensure_decode_fast_path_is_available


def _needs_no_mask(asked: Callable[..., bool], ours: Callable[[Any], bool]) -> Callable[..., bool]:
    """``is_flash_attention_requested``, which is asked whether a function needs a mask, that says no for ours."""

    @functools.wraps(asked)
    def is_flash_attention_requested(config: Any = None, *args: Any, **kwargs: Any) -> bool:
        return (config is not None and ours(config)) or asked(config, *args, **kwargs)

    return is_flash_attention_requested
