"""vLLM's attention backend with any normalizer: pages read in place for decoding, gathered for prompts.

The cache of a layer is ``(blocks, Hkv, page size, 2 D)``, keys beside values. The batch has requests with one new token
first: :func:`softpick.decode_attention` reads their pages through the block table. Prompts, and pieces of prompts, go through
:func:`softpick.varlen_attention` with their keys gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import KVCacheLayout

from softpick.functional import decode_attention, varlen_attention
from softpick.normalizers import Normalizer, get_normalizer, is_normalizer

__all__ = ["CPUBackend", "CUDABackend", "Impl", "Metadata", "MetadataBuilder", "normalizer_of"]


def normalizer_of(config: Any) -> Normalizer | None:
    """The normalizer that a configuration of transformers says, or None for softmax by somebody else.

    Args:
        config: vLLM's ``ModelConfig``.
    """
    text = config.hf_text_config
    names = (getattr(text, name, None) for name in ("softpick_normalizer", "_attn_implementation", "normalizer"))
    return next((get_normalizer(name) for name in names if is_normalizer(name)), None)


@dataclass
class Metadata(AttentionMetadata):
    """One batch, for all layers. The first ``decodes`` requests have one new token each.

    Attributes:
        tokens: new tokens of all requests.
        decodes: requests with one new token.
        query_start_loc: ``(N + 1,)`` starts of the requests among the tokens, and their end.
        seq_lens: ``(N,)`` keys of each request, the new ones included.
        block_table: ``(N, blocks)``.
        cu_seqlens_q: of the other requests alone, from 0.
        cu_seqlens_k: the same of their keys.
        max_query_len: the most new tokens.
        max_seq_len: the most keys.
        pages: ``(keys,)`` which page each key of the other requests is in.
        rows: ``(keys,)`` and which row of it.
    """

    tokens: int
    decodes: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_query_len: int = 1
    max_seq_len: int = 1
    pages: Tensor | None = None
    rows: Tensor | None = None


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Makes :class:`Metadata` once a step."""

    reorder_batch_threshold: int | None = 1  # requests with one new token come first

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """What the layers need of a batch. Reads nothing from the device."""
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("softpick: attention that is not causal is not built for vLLM")
        decodes, prefills, tokens_of_decodes, _ = split_decodes_and_prefills(common, decode_threshold=1)
        lens = common.seq_lens
        made = Metadata(common.num_actual_tokens, decodes, common.query_start_loc, lens, common.block_table_tensor)
        if not prefills:
            return made
        lens = lens[decodes : decodes + prefills]
        upper = common.seq_lens_cpu_upper_bound
        total = prefills * common.max_seq_len if upper is None else int(upper[decodes : decodes + prefills].sum())
        made.cu_seqlens_q = common.query_start_loc[decodes : decodes + prefills + 1] - tokens_of_decodes
        made.cu_seqlens_k = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
        made.max_query_len, made.max_seq_len = common.max_query_len, common.max_seq_len
        key = torch.arange(total, device=lens.device)
        request = (torch.searchsorted(made.cu_seqlens_k, key.int(), right=True) - 1).clamp(max=prefills - 1)
        position = key - made.cu_seqlens_k[request]
        table = common.block_table_tensor[decodes : decodes + prefills]
        block = (position // self.block_size).clamp(max=table.shape[1] - 1)
        made.pages, made.rows = table[request, block].long().clamp(min=0), position % self.block_size
        return made


class Impl(AttentionImpl[Metadata]):
    """The attention of one layer.

    Attributes:
        score_scale: ``(H,)`` or None: scores are multiplied by it and the logarithm of the number of visible keys.
        sinks: ``(H,)`` or None.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **unknown: Any,
    ) -> None:
        missing = {
            "alibi_slopes": alibi_slopes is not None,
            "kv_cache_dtype": kv_cache_dtype not in ("auto", "float16", "bfloat16"),
            "attn_type": attn_type != AttentionType.DECODER,
            **{name: value not in (None, False, -1) for name, value in unknown.items()},
        }
        wrong = [name for name, given in missing.items() if given]
        if wrong:
            raise NotImplementedError(f"{', '.join(wrong)}: softpick's attention for vLLM does not have it")
        norm = normalizer_of(get_current_vllm_config().model_config)
        assert norm is not None, "only models of ours are given this backend"
        self.normalizer = norm
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.window = None if sliding_window is None else (sliding_window - 1, 0)
        self.softcap = logits_soft_cap or None
        self.sinks = sinks
        self.score_scale: Tensor | None = None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values into their pages.

        Args:
            layer: of vLLM.
            key: ``(tokens, Hkv, D)``; what lies behind the slots is padding.
            value: the same.
            kv_cache: ``(blocks, Hkv, page size, 2 D)``.
            slot_mapping: ``(tokens,)`` page times page size plus row; negative ones are padding.
        """
        tokens, size = slot_mapping.shape[0], kv_cache.shape[2]
        slot = slot_mapping.clamp(min=0)
        page, row, there = slot // size, slot % size, (slot_mapping >= 0)[:, None, None]
        for pages, new in zip(self._pages(kv_cache), (key, value), strict=True):
            # padding writes what is there, so that nothing is read from the device
            pages[page, row] = torch.where(there, new[:tokens].to(pages.dtype), pages[page, row])

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views ``(blocks, page size, Hkv, D)`` of keys and values."""
        both = kv_cache.transpose(1, 2)
        return both[..., : self.head_size], both[..., self.head_size :]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new tokens to all keys of their requests, which are in the cache.

        Args:
            layer: of vLLM.
            query: ``(tokens, H, D)``.
            key: not read.
            value: not read.
            kv_cache: ``(blocks, Hkv, page size, 2 D)``.
            attn_metadata: of the batch; None while vLLM measures memory.
            output: ``(tokens, H, D)``, written in place.
            output_scale: not supported.
            output_block_scale: not supported.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("softpick: quantized outputs of attention are not built for vLLM")
        if attn_metadata is None:
            return output.zero_()
        meta = attn_metadata
        keys, values = self._pages(kv_cache)
        if self.score_scale is not None:
            query = self._scaled(query, meta)
        options: dict[str, Any] = {
            "scale": self.scale,
            "normalizer": self.normalizer,
            "window": self.window,
            "softcap": self.softcap,
            "sink": self.sinks,
        }
        decodes = meta.decodes
        if decodes:
            out: Any = decode_attention(
                query[:decodes, :, None],
                keys,
                values,
                cache_seqlens=meta.seq_lens[:decodes],
                block_table=meta.block_table[:decodes],
                **options,
            )
            output[:decodes] = out[:, :, 0]
        if meta.pages is not None:
            assert meta.rows is not None
            assert meta.cu_seqlens_q is not None
            assert meta.cu_seqlens_k is not None
            out = varlen_attention(
                query[decodes : meta.tokens],
                keys[meta.pages, meta.rows],
                values[meta.pages, meta.rows],
                meta.cu_seqlens_q,
                meta.cu_seqlens_k,
                meta.max_query_len,
                meta.max_seq_len,
                is_causal=True,
                **options,
            )
            output[decodes : meta.tokens] = out
        return output

    def _scaled(self, query: Tensor, meta: Metadata) -> Tensor:
        assert self.score_scale is not None
        starts = meta.query_start_loc
        token = torch.arange(query.shape[0], device=query.device)
        request = torch.searchsorted(starts, token.to(starts.dtype), right=True) - 1
        request = request.clamp(0, meta.seq_lens.shape[0] - 1)
        seen = meta.seq_lens[request] - starts[request + 1] + token + 1
        if self.window is not None:
            seen = seen.clamp(max=self.window[0] + 1)
        logs = seen.clamp(min=1).float().log()
        return (query * (self.score_scale[:, None] * logs[:, None, None])).to(query.dtype)


class _Backend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """The attention of a layer."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        """What makes :class:`Metadata`."""
        return MetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Pages in which each head is contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Yes."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Yes."""
        return True


class CPUBackend(_Backend):
    """Takes the place of vLLM's CPU backend, which vLLM's CPU platform asks for whatever was chosen."""

    @staticmethod
    def get_name() -> str:
        """The name of what it replaces."""
        return "CPU_ATTN"


class CUDABackend(_Backend):
    """vLLM's backend ``CUSTOM``."""

    @staticmethod
    def get_name() -> str:
        """The name that it is registered under."""
        return "CUSTOM"

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """What the Triton kernels take."""
        return head_size <= 256
