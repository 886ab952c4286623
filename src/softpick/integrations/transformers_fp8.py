"""A cache of keys and values in fp8 (e4m3) for transformers' ``generate``, with softpick's normalizers and with softmax.

Positions are kept in pages, each with a scale a head: a power of two that grows when a later token needs it, and what was
stored is then moved to the new scale, which is exact but for numbers below its smallest. So no token saturates. Where
attention is one of ours, a step of generation reads the pages as they are; elsewhere keys and values are dequantized for each
call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from softpick.functional import decode_attention
from softpick.nn.attention import scaled_by_length
from softpick.normalizers import is_normalizer
from softpick.ops.fp8 import FP8, power_of_2, quantize_fp8

__all__ = ["Fp8Cache", "Fp8Layer", "attend_fp8", "dequantized", "in_fp8", "through_fp8"]


class _Pages:
    """Keys or values of a layer: ``(B, room, Hkv, D)`` in e4m3, and ``(B, pages, Hkv)`` scales, 0 for pages without numbers."""

    def __init__(self, like: Tensor, page_size: int) -> None:
        batch, heads, _, width = like.shape
        self.page_size = page_size
        self.stored = torch.zeros(
            batch, 0, heads, width, dtype=torch.uint8, device=like.device
        )  # bits: all indexing has them
        self.scale = torch.zeros(batch, 0, heads, device=like.device)

    def grow(self, positions: int) -> None:
        """Room for so many positions, at least."""
        missing = -(-(positions - self.stored.shape[1]) // self.page_size)
        if missing > 0:
            pages = max(missing, self.scale.shape[1] // 4)  # a quarter more at a time: copied few times in all
            self.stored = torch.nn.functional.pad(self.stored, (0, 0, 0, 0, 0, pages * self.page_size))
            self.scale = torch.nn.functional.pad(self.scale, (0, 0, 0, pages))

    def write(self, x: Tensor, length: int) -> None:
        """Keep ``x (B, Hkv, T, D)`` behind the first ``length`` positions."""
        self.grow(length + x.shape[2])
        first, last = length // self.page_size, -(-(length + x.shape[2]) // self.page_size)
        begin, end = first * self.page_size, last * self.page_size
        new = x.new_zeros(x.shape[0], end - begin, x.shape[1], x.shape[3])
        new[:, length - begin : length - begin + x.shape[2]] = x.transpose(1, 2)
        new, before = new.unflatten(1, (-1, self.page_size)), self.scale[:, first:last].clone()
        before[:, 1 if length > begin else 0 :] = 0  # of positions that were cropped
        largest = torch.where(new.isfinite(), new, 0.0).abs().amax((2, 4))
        endless = (new != 0).any(4).any(2) & (largest == 0) & (before == 0)  # nothing but infinity and NaN
        scale = torch.where(largest > 0, torch.maximum(before, power_of_2(largest)), torch.where(endless, 1.0, before))
        divisor = torch.where(scale > 0, scale, 1.0)
        bits = quantize_fp8(new.flatten(0, 1), divisor.flatten(0, 1), paged=True)[0].view(torch.uint8).view(new.shape)
        bits = bits.flatten(1, 2)
        kept = length - begin
        if kept:  # of the first page, in the new scale
            factor = (before[:, 0] / divisor[:, 0])[:, None, :, None]
            old = self.stored[:, begin:length].view(FP8).float() * factor
            bits[:, :kept] = old.to(FP8).view(torch.uint8)
        self.stored[:, begin:end] = bits
        self.scale[:, first:last] = scale

    def pages(self) -> tuple[Tensor, Tensor]:
        """``(B * pages, page_size, Hkv, D)`` and ``(B * pages, Hkv)``, for ``decode_attention``."""
        return self.stored.view(FP8).unflatten(1, (-1, self.page_size)).flatten(0, 1), self.scale.flatten(0, 1)

    def dequantized(self, length: int, dtype: torch.dtype) -> Tensor:
        """``(B, Hkv, length, D)``."""
        scale = self.scale.repeat_interleave(self.page_size, 1)[:, :length]
        return (self.stored[:, :length].view(FP8).float() * scale[..., None]).to(dtype).transpose(1, 2)

    def pick(self, sequences: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        sequences = sequences.to(self.stored.device)
        self.stored, self.scale = self.stored[sequences], self.scale[sequences]


def through_fp8(x: Tensor, page_size: int = 64) -> Tensor:
    """Keys or values ``(B, Hkv, T, D)`` as they come back from :class:`Fp8Cache`."""
    pages = _Pages(x, page_size)
    pages.write(x, 0)
    return pages.dequantized(x.shape[2], x.dtype)


class _Stored(Tensor):
    """Keys or values in fp8 on their way to :func:`attend_fp8`, without which they are numbers without scales."""

    layer: Fp8Layer

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "dim", "size", "__repr__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ValueError(
            "config: expected model.config itself, from which Fp8Cache reads whose attention the model has, and "
            f"layers that compute with keys before the cache; got {getattr(func, '__name__', func)} of keys or values in fp8. "
            "Else use transformers' DynamicCache"
        )


class Fp8Layer(CacheLayerMixin):
    """One layer of :class:`Fp8Cache`."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, config: PreTrainedConfig, page_size: int = 64) -> None:
        super().__init__()
        self.config, self.page_size, self.length = config, page_size, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = (_Pages(x, self.page_size) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new keys and values ``(B, Hkv, T, D)``; what attention computes with, all positions.

        Of a prompt these are the ones that were given; of a step with one of our normalizers the cache in fp8
        (:func:`in_fp8`); else dequantized ones.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.length
        self._check(key_states, value_states)
        if before and torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "past_key_values: an Fp8Cache that holds positions has no gradient; call the model under torch.no_grad(), "
                "or use transformers' DynamicCache"
            )
        self._keys.write(key_states, before)
        self._values.write(value_states, before)
        self.length += key_states.shape[2]
        if not before:
            return key_states, value_states
        if key_states.shape[2] == 1 and is_normalizer(self.config._attn_implementation):
            key, value = (
                x.stored.view(FP8)[:, : self.length].transpose(1, 2).as_subclass(_Stored)
                for x in (self._keys, self._values)
            )
            key.layer = value.layer = self
            return key, value
        return self.dequantized(key_states.dtype)

    def _check(self, key: Tensor, value: Tensor) -> None:
        """Raise unless new keys and values continue what is stored."""
        if key.shape[:3] != value.shape[:3]:
            raise ValueError(
                "value_states: expected the sequences, heads and positions of key_states "
                f"{tuple(key.shape[:3])}, got {tuple(value.shape[:3])}"
            )
        for name, x, pages in (("key_states", key, self._keys), ("value_states", value, self._values)):
            batch, _, heads, width = pages.stored.shape
            if (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, width) or x.device != pages.stored.device:
                raise ValueError(
                    f"past_key_values: expected {name} as this Fp8Cache holds them, {batch} sequences of {heads} heads of "
                    f"{width} on {pages.stored.device}, got {x.shape[0]} of {x.shape[1]} heads of {x.shape[3]} on {x.device}; "
                    "make a new cache for another batch or model"
                )

    def dequantized(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All keys and values, ``(B, Hkv, length, D)``."""
        return self._keys.dequantized(self.length, dtype), self._values.dequantized(self.length, dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask has for so many new queries, and where they begin."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions that are filled."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.length = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions, as assisted generation does."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a number of at most 0, got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these sequences of the batch, in this order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        if self.is_initialized:
            self._keys.pick(indices)
            self._values.pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sequence of the batch ``repeats`` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self._keys.stored.shape[0]).repeat_interleave(repeats))

    def offload(self) -> None:
        """Refused: pages are read where they are."""
        raise ValueError("offloading: expected none, Fp8Cache keeps its pages on the device of the layer")

    prefetch = offload


class Fp8Cache(Cache):
    """Keys and values in e4m3 with a scale for each head of a page, for ``model.generate(..., past_key_values=Fp8Cache(...))``.

    Half the memory of bf16, and with one of softpick's normalizers half the bytes a step reads: there the pages go to
    :func:`softpick.decode_attention` as they are. Other implementations, batches with padding, chunks of a prompt and
    recorded attentions compute with a dequantized copy of a layer at a time. The first call (the prompt) computes with the
    keys and values that are stored only afterwards.

    Args:
        config: the model's.
        page_size: positions that share a scale.

    Raises:
        TypeError: ``config`` is not a transformers configuration.
        ValueError: a layer keeps something else than all its keys and values (sliding windows, chunks, linear attention, layers
            that share a cache, cross-attention), or the model is or has an encoder, or has a cache of its own.
    """

    def __init__(self, config: PreTrainedConfig, page_size: int = 64) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config: expected the configuration of a model, got {type(config).__name__}")
        if not isinstance(page_size, int) or page_size < 16:
            raise ValueError(f"page_size: expected an integer of at least 16, got {page_size!r}")
        config = _checked_decoder(config)
        super().__init__(layers=[Fp8Layer(config, page_size) for _ in range(config.num_hidden_layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """:meth:`Fp8Layer.update` of a layer."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"config: expected as many layers as the model has, got {len(self.layers)}, and the model has layer {layer_idx}"
            )
        if layer_idx == 0:
            lengths = [layer.get_seq_length() for layer in self.layers]
            if min(lengths) != max(lengths):
                raise ValueError(
                    f"past_key_values: expected as many positions in each of the {len(lengths)} layers, got {min(lengths)} to "
                    f"{max(lengths)}: the model has fewer layers than the config of this Fp8Cache, or an earlier call ended "
                    "within the model; make a new cache"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _checked_decoder(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the decoder whose layers keep all their keys and values.

    Raises:
        ValueError: there is none.
    """
    name = type(config).__name__
    if config.is_encoder_decoder:
        raise ValueError(f"config: expected a decoder alone, got {name} with an encoder")
    config = config.get_text_config(decoder=True)
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True)
    lacking = [x for x in ("use_cache", "num_hidden_layers") if not hasattr(config, x)] + ["is_decoder"] * encoder
    if lacking:
        raise ValueError(
            f"config: expected that of a decoder whose layers keep keys and values ({', '.join(lacking)}), got {name}"
        )
    for attribute in ("add_cross_attention", "cross_attention_layers"):
        if getattr(config, attribute, None):
            raise ValueError(
                f"config: expected layers that attend to their own sequence, got {name} with cross-attention ({attribute})"
            )
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        one = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        kinds = ["sliding_attention" if one else "full_attention"]
    other = sorted({*kinds} - {"full_attention"})
    if other:
        raise ValueError(
            f"config: expected layers that keep all keys and values (full_attention), got {', '.join(other)} in "
            f"{name}; use transformers' DynamicCache"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"config: expected a cache of its own for each layer, got shared ones in {name}")
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is not None and not (model._supports_default_dynamic_cache() and not model._is_stateful):
        raise ValueError(
            f"config: expected a model that takes transformers' DynamicCache, got {name}, which has a cache of its own"
        )
    return config


def in_fp8(key: Tensor) -> bool:
    """Whether these keys are a cache in fp8, which only :func:`attend_fp8` and :func:`dequantized` can read."""
    return key.dtype == FP8


def _layer_of(key: Tensor) -> Fp8Layer:
    if not isinstance(key, _Stored):
        raise ValueError(
            "key: a cache in fp8 came without its scales: expected what Fp8Cache returned. A layer that computes with its keys "
            "after the cache needs transformers' DynamicCache"
        )
    return key.layer


def dequantized(key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The keys and values of a cache in fp8, ``(B, Hkv, T, D)``."""
    return _layer_of(key).dequantized(dtype)


def attend_fp8(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None,
    score_scale: Tensor | None,
    **options: Any,
) -> Tensor:
    """Attention of one query a sequence to all keys of a cache in fp8.

    Args:
        query: ``(B, H, 1, D)``.
        key: of :class:`Fp8Layer`.
        scaling: factor on the scores; ``1 / sqrt(D)`` if None.
        score_scale: ``(H,)``: scores are multiplied by it and the logarithm of the number of keys, or None.
        options: normalizer, softcap and sink of :func:`softpick.decode_attention`.

    Returns:
        ``(B, 1, H, Dv)``.
    """
    layer = _layer_of(key)
    (keys, key_scale), (values, value_scale) = layer._keys.pages(), layer._values.pages()
    batch, length = query.shape[0], layer.length
    if score_scale is not None:
        query = scaled_by_length(query, score_scale, torch.full((1, 1, 1), length, device=query.device))
    table = torch.arange(len(keys), dtype=torch.int32, device=query.device).view(batch, -1)
    filled = torch.full((batch,), length, dtype=torch.int32, device=query.device)
    out = decode_attention(
        query, keys, values, key_scale=key_scale, value_scale=value_scale, cache_seqlens=filled, block_table=table,
        scale=scaling, is_causal=True, **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous()
