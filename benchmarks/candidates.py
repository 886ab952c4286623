"""The command ``softpick`` with changes of the attention layer that are being tried, as further names of a variant.

    python benchmarks/candidates.py grid sinks_h200 data=sinks_text --normalizers softpick+head_norm,softpick+gate+qk_norm
    python benchmarks/candidates.py evaluate grid/runs/softpick+head_norm-s0/model ...

A change that helps becomes a field of ``SoftpickLlamaConfig``; the others stay here, with their figures in docs/log.md. Models
are saved with a type of their own, ``softpick_candidate``, so that nothing but this script loads them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import softpick.training.grid as grid
from softpick.cli import main
from softpick.integrations.transformers import SoftpickLlamaConfig, SoftpickLlamaForCausalLM
from softpick.normalizers import NORMALIZERS
from softpick.training import engine
from softpick.training.recipes import Recipe

CANDIDATES = {
    "qk_norm": "each query and key head divided by its root mean square, with learned weights, before the rotation",
    "head_norm": "each head's output divided by its root mean square, with learned weights",
    "score_bias": "a learned number a head is added to its scores; it starts at 0",
    "anneal": "a number is added to all scores, which falls from 8 (softmax within 0.1 %) to 0 in the first tenth of the steps",
    "negative_weight": "the scores below 0 count in the denominator with a learned weight a head, which starts at 1",
}
ANNEALED_FROM = 8.0
HEAD_NORM_EPS = 1e-5


class Settings:
    """What the run in progress is made with; the model that is being made reads it."""

    candidates: tuple[str, ...] = ()
    steps = 1


class HeadNorm(nn.Module):
    """RMSNorm over each head of a projection's output ``(B, T, H D)``."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        heads = hidden.unflatten(-1, self.weight.shape)
        return (F.rms_norm(heads, heads.shape[-1:], eps=HEAD_NORM_EPS) * self.weight).to(hidden.dtype).flatten(-2)


class CandidateConfig(SoftpickLlamaConfig):
    """``SoftpickLlamaConfig`` with the names of the candidates."""

    model_type = "softpick_candidate"

    candidates: list[str] | None = None
    anneal_steps: int = 1


class CandidateForCausalLM(SoftpickLlamaForCausalLM):
    """``SoftpickLlamaForCausalLM`` with the candidates of its configuration."""

    config_class = CandidateConfig

    def __init__(self, config: CandidateConfig) -> None:
        super().__init__(config)
        names = set(config.candidates or ())
        for layer in self.model.layers:
            attention, heads = layer.self_attn, config.num_attention_heads
            if "qk_norm" in names:
                attention.q_proj = nn.Sequential(attention.q_proj, HeadNorm(heads, attention.head_dim))
                attention.k_proj = nn.Sequential(
                    attention.k_proj, HeadNorm(config.num_key_value_heads, attention.head_dim)
                )
            if "head_norm" in names:
                attention.o_proj = nn.Sequential(HeadNorm(heads, attention.head_dim), attention.o_proj)
            if "score_bias" in names:
                attention.score_bias = nn.Parameter(torch.zeros(heads))
            if "anneal" in names:
                attention.register_buffer("score_bias", torch.full((heads,), ANNEALED_FROM))
            if "negative_weight" in names:
                attention.negative_bias = nn.Parameter(torch.zeros(heads))
        if "anneal" in names:
            self.register_buffer("steps_done", torch.zeros(()))
            # no override of forward: the Trainer reads its signature
            self.register_forward_pre_hook(type(self).anneal)

    def anneal(self, *_: Any) -> None:
        """Before a step: the number that is added to the scores in it."""
        if self.training:
            bias = (ANNEALED_FROM * (1 - self.steps_done / self.config.anneal_steps)).clamp(min=0)
            for layer in self.model.layers:
                layer.self_attn.score_bias.copy_(bias.expand_as(layer.self_attn.score_bias))
            self.steps_done += 1


def wider(tensor: Tensor, column: Tensor) -> Tensor:
    """``tensor`` with one more column, and columns of zeros up to the next size that kernels are made for."""
    width = tensor.shape[-1]
    tensor = torch.cat([tensor, column.to(tensor.dtype).expand(*tensor.shape[:-1], 1)], -1)
    return F.pad(tensor, (0, width - 1))


def with_candidates(attention: Any) -> Any:
    """An attention function that also does what the candidates of its layer ask for."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        bias, width = getattr(module, "score_bias", None), value.shape[-1]
        weight = getattr(module, "negative_bias", None)
        gate = more.pop("output_gate", None) if weight is not None else None
        if bias is not None:
            query = wider(query, bias[:, None, None] / scaling)
            key = wider(key, key.new_ones(()))
        if weight is not None:
            value = wider(value, value.new_ones(()))
        out, weights = attention(module, query, key, value, attention_mask, scaling=scaling, **more)
        if weight is not None:
            # of N / (P + M), and of the mass P / (P + M) in the added column, N / (P + w M) is made
            mass = out[..., width : width + 1].float()
            out = out[..., :width] / (mass + weight.exp()[:, None] * (1 - mass)).clamp(min=1e-6)
            out = out.to(query.dtype) if gate is None else out.to(query.dtype) * torch.sigmoid(gate)
        return out, weights

    return attend


def install() -> None:
    """Make the candidates known to grid, Trainer and the Auto classes of this process."""
    AutoConfig.register("softpick_candidate", CandidateConfig)
    AutoModelForCausalLM.register(CandidateConfig, CandidateForCausalLM)
    for name in NORMALIZERS:
        AttentionInterface.register(name, with_candidates(AttentionInterface()[name]))
    plain_variant, plain_train, plain_config = grid._variant, grid._train, engine.SoftpickLlamaConfig

    def variant(text: str, recipe: Recipe) -> tuple[str, Recipe]:
        given = sorted(set(text.split("+")) & set(CANDIDATES))
        name, changed = plain_variant("+".join(part for part in text.split("+") if part not in CANDIDATES), recipe)
        return "+".join([name, *given]), changed

    def train(run: grid.Run, *args: Any) -> dict[str, Any]:
        Settings.candidates = tuple(sorted(set(run.variant.split("+")) & set(CANDIDATES)))
        Settings.steps = run.recipe.steps
        return plain_train(run, *args)

    def config(**fields: Any) -> SoftpickLlamaConfig:
        if not Settings.candidates:
            return plain_config(**fields)
        return CandidateConfig(
            **fields, candidates=list(Settings.candidates), anneal_steps=max(1, Settings.steps // 10)
        )

    def model(config: SoftpickLlamaConfig) -> SoftpickLlamaForCausalLM:
        return (CandidateForCausalLM if isinstance(config, CandidateConfig) else SoftpickLlamaForCausalLM)(config)

    grid._variant, grid._train = variant, train
    engine.SoftpickLlamaConfig, engine.SoftpickLlamaForCausalLM = config, model  # type: ignore[misc]


if __name__ == "__main__":
    install()
    sys.argv[0] = "softpick"
    main()
