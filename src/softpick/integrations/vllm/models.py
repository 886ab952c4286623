"""vLLM's model classes with our attention, by the architectures that :mod:`softpick.integrations.checkpoints` writes.

``LlamaForCausalLM_with_softpick`` is vLLM's ``LlamaForCausalLM`` whose attention layers are built with our backend. Weights,
tensor parallelism and quantization stay vLLM's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from softpick.integrations.checkpoints import MARK
from softpick.integrations.vllm.attention import Impl, normalizer_of
from softpick.normalizers import get_normalizer

__all__ = ["SoftpickLlamaForCausalLM", "check_settings", "our_backend"]


def __getattr__(name: str) -> Any:
    if not name.endswith(MARK):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _with_our_attention(name)


@functools.cache
def _with_our_attention(name: str) -> type[nn.Module]:
    """The class of an architecture whose attention layers are ours."""
    base: Any = ModelRegistry.models[name.removesuffix(MARK)].load_model_cls()

    class WithOurAttention(base):
        def __init__(self, *, vllm_config: Any, prefix: str = "", **more: Any) -> None:
            with our_backend(vllm_config):
                super().__init__(vllm_config=vllm_config, prefix=prefix, **more)

    WithOurAttention.__name__ = WithOurAttention.__qualname__ = name
    WithOurAttention.__doc__ = base.__doc__
    return WithOurAttention


@contextmanager
def our_backend(vllm_config: Any) -> Iterator[None]:
    """While open, attention layers that are built are ours; afterwards all of the model are looked at.

    On a CPU, vLLM takes its own backend whatever is chosen: it is replaced, and put back.

    Raises:
        ValueError: settings that our attention does not have, or a layer that is not ours.
    """
    check_settings(vllm_config)
    cpu = current_platform.is_cpu()
    if cpu:
        register_backend(AttentionBackendEnum.CPU_ATTN, "softpick.integrations.vllm.attention.CPUBackend")
    else:
        vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    selector._cached_get_attn_backend.cache_clear()  # it remembers by shapes, not by model
    try:
        yield
    finally:
        if cpu:
            AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if impl is not None and not isinstance(impl, Impl):
            raise ValueError(
                f"model: {name} ({type(layer).__name__}) computes its own attention in vLLM, not "
                f"{normalizer_of(vllm_config.model_config)}"
            )


def check_settings(vllm_config: Any) -> None:
    """Refuse settings of vLLM that our attention does not have.

    Raises:
        ValueError: naming the setting.
    """
    name = vllm_config.model_config.model
    norm = normalizer_of(vllm_config.model_config)
    if norm is None:
        raise ValueError(f"model: {name} is marked as a model of softpick, but its configuration names no normalizer")
    dtype = vllm_config.cache_config.cache_dtype
    chosen = vllm_config.attention_config.backend
    parallel = vllm_config.parallel_config
    ours = (None, AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN)
    refused = {
        "speculative_config: speculative decoding": vllm_config.speculative_config is not None,
        f"kv_cache_dtype: a cache of {dtype}": dtype not in ("auto", "float16", "bfloat16"),
        "model: multi-head latent attention (MLA)": vllm_config.model_config.use_mla,
        f"attention_backend: {getattr(chosen, 'name', chosen)}": chosen not in ours,
        "attention_config: a backend for each kind of layer": bool(vllm_config.attention_config.backend_per_kind),
        "decode_context_parallel_size": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
    }
    wrong = [what for what, given in refused.items() if given]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}: not built for {norm.name} in vLLM, which would compute softmax for {name}; leave it out"
        )


class _SoftpickAttention(LlamaAttention):
    """vLLM's Llama attention with what ``softpick_llama`` adds: sinks, a score scale, an output gate."""

    def __init__(self, config: Any, **given: Any) -> None:
        super().__init__(config=config, **given)
        norm = get_normalizer(config.normalizer)
        impl: Any = self.attn.impl
        if norm.needs_sink:
            self.sinks = _of_heads(self.num_heads)
            impl.sinks = self.sinks
        if config.score_scale:
            self.score_scale = _of_heads(self.num_heads)
            impl.score_scale = self.score_scale
        self.output_gate = (
            ColumnParallelLinear(
                self.hidden_size,
                self.total_num_heads * self.head_dim,
                bias=False,
                quant_config=given.get("quant_config"),
                prefix=f"{given['prefix']}.output_gate",
            )
            if config.output_gate
            else None
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        attended = self.attn(q, k, v)
        if self.output_gate is not None:
            attended = attended * torch.sigmoid(self.output_gate(hidden_states)[0])
        return self.o_proj(attended)[0]


def _of_heads(heads: int) -> nn.Parameter:
    """A parameter with one entry a head, of which each rank of tensor parallelism loads its own."""
    parameter = nn.Parameter(torch.zeros(heads), requires_grad=False)

    def load(parameter: nn.Parameter, loaded: Tensor) -> None:
        assert loaded.shape[0] == heads * get_tensor_model_parallel_world_size()
        parameter.data.copy_(loaded.narrow(0, get_tensor_model_parallel_rank() * heads, heads))

    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


class _SoftpickLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=_SoftpickAttention)


class SoftpickLlamaForCausalLM(LlamaForCausalLM):
    """``softpick_llama`` in vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with our_backend(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_SoftpickLayer)
