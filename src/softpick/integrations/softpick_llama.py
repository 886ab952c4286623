"""Llama with what a normalizer may need parameters for: learned sinks, an output gate, a log-length score scale.

Import :mod:`softpick.integrations.transformers`, which registers these classes, instead of this module. Without the three
extras the model is transformers' Llama with ``attn_implementation=config.normalizer``: same parameters, same results.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaAttention

from softpick.nn.attention import initial_score_scale
from softpick.normalizers import NORMALIZERS, Normalizer, get_normalizer, is_normalizer

__all__ = [
    "SoftpickLlamaConfig",
    "SoftpickLlamaForCausalLM",
    "SoftpickLlamaForSequenceClassification",
    "SoftpickLlamaModel",
    "SoftpickLlamaPreTrainedModel",
]


@strict
class SoftpickLlamaConfig(LlamaConfig):
    """Configuration of a Llama with a chosen normalizer; all fields of ``LlamaConfig``, and:

    Attributes:
        normalizer: a name of ``softpick.NORMALIZERS``, or a record, whose ``text`` is kept. ``learned_sink`` adds one
            logit a head, which starts at 0 (then it equals softmax plus one).
        output_gate: multiply each head's output by ``sigmoid(x W_g)`` before the output projection (Qiu et al. 2025).
            ``W_g`` starts like every projection, so gates start near 1/2.
        score_scale: multiply scores by ``s_h log n``, ``n`` the keys a query may see (scalable softpick, paper eq. 8-9).
            ``s_h`` starts so that the factor is 1 on average over the rows of a sequence of ``max_position_embeddings``
            tokens.

    Raises:
        ValueError: for an unknown normalizer.
        TypeError: for a switch that is neither True nor False.
    """

    model_type = "softpick_llama"

    normalizer: str | Normalizer = "softpick"
    output_gate: bool = False
    score_scale: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("attn_implementation", "softpick_normalizer"):
            if kwargs.get(name) == self.model_type:
                del kwargs[name]
        norm = get_normalizer(self.normalizer)
        self.normalizer = norm.text
        for name in ("output_gate", "score_scale"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        super().__post_init__(**kwargs)
        # one entry a head: each rank of tensor parallelism has those of its heads
        attention = "layers.*.self_attn"
        plan = dict(LlamaConfig.base_model_tp_plan)
        if self.output_gate:
            plan[f"{attention}.output_gate"] = "colwise"
        vectors = {"sinks": norm.needs_sink, "score_scale": self.score_scale}
        plan |= {f"{attention}.{name}": "colwise" for name, given in vectors.items() if given}
        if any(vectors.values()):
            plan[attention] = "local_params"
        self.base_model_tp_plan = plan

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary. ``normalizer`` says what ``attn_implementation`` would.

        The latter names the model type instead, which no class but ours takes: a ``LlamaForCausalLM`` that is given the folder
        of such a model refuses it.
        """
        return super().to_dict() | dict.fromkeys(("attn_implementation", "softpick_normalizer"), self.model_type)


class _SoftpickAttention(LlamaAttention):
    """Llama's attention, which hands the extra parameters to our attention function."""

    def __init__(self, config: SoftpickLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads = config.num_attention_heads
        self.sinks = nn.Parameter(torch.zeros(heads)) if get_normalizer(config.normalizer).needs_sink else None
        self.score_scale = nn.Parameter(torch.ones(heads)) if config.score_scale else None
        self.output_gate = (
            nn.Linear(config.hidden_size, heads * self.head_dim, bias=False) if config.output_gate else None
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.sinks is not None:
            kwargs["s_aux"] = self.sinks
        if self.score_scale is not None:
            kwargs["score_scale"] = self.score_scale
        if self.output_gate is not None:
            kwargs["output_gate"] = self.output_gate(hidden_states).unflatten(-1, (-1, self.head_dim))
        return super().forward(hidden_states, *args, **kwargs)


class SoftpickLlamaPreTrainedModel(LlamaPreTrainedModel):
    """Base class: initialization, and the normalizer as the only attention implementation."""

    config_class = SoftpickLlamaConfig
    config: SoftpickLlamaConfig

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The configured normalizer; a requested one replaces it in the configuration.

        Raises:
            ValueError: for an implementation that is no normalizer: it would ignore gate, scale and sinks.
        """
        if requested_attention is None:
            return get_normalizer(self.config.normalizer).text
        if not is_normalizer(requested_attention):
            raise ValueError(
                f"attn_implementation: expected a normalizer for {type(self).__name__}, a record or one of "
                f"{', '.join(NORMALIZERS)}; got {requested_attention!r}"
            )
        self.config.normalizer = requested_attention
        return requested_attention

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _SoftpickAttention):
            if module.sinks is not None:
                init.zeros_(module.sinks)
            if module.score_scale is not None:
                init.constant_(module.score_scale, initial_score_scale(self.config.max_position_embeddings))


class SoftpickLlamaModel(SoftpickLlamaPreTrainedModel, LlamaModel):
    """The bare model."""

    def __init__(self, config: SoftpickLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = _SoftpickAttention(config, index)
        self.post_init()


class SoftpickLlamaForCausalLM(SoftpickLlamaPreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: SoftpickLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # not LlamaForCausalLM's own, which would build a LlamaModel
        self.model = SoftpickLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class SoftpickLlamaForSequenceClassification(GenericForSequenceClassification, SoftpickLlamaPreTrainedModel):
    """The sequence classifier."""
