"""Maps and scores of one text in the shapes that viewers of other projects take; none of them is needed here.

- BertViz (``head_view``, ``model_view``): :func:`bertviz_arguments`
- what reads a TransformerLens cache (also CircuitsVis, by head): :func:`hook_cache`

Both come from one forward pass and hold every map of the text: for short texts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softpick.analysis.calls import SeenAttention
from softpick.analysis.capture import attention_maps, one_sample
from softpick.analysis.watching import watch

__all__ = ["bertviz_arguments", "hook_cache"]


def bertviz_arguments(model: nn.Module, input_ids: Tensor, tokenizer: Any) -> dict[str, Any]:
    """Keyword arguments of BertViz: ``head_view(**bertviz_arguments(model, input_ids, tokenizer))``.

    Args:
        model: as for :func:`softpick.analysis.measure`.
        input_ids: ``(T,)`` or ``(1, T)``, without padding.
        tokenizer: of transformers; names the tokens.

    Returns:
        ``attention``: a list over layers of ``(1, H, T, T)`` fp32; ``tokens``: ``T`` strings.
    """
    input_ids = one_sample(input_ids)
    return {
        "attention": list(attention_maps(model, input_ids)[:, None]),
        "tokens": [str(token) for token in tokenizer.convert_ids_to_tokens(input_ids[0].tolist())],
    }


def hook_cache(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """A dict with the names and layouts of TransformerLens's activation cache, fp32 on the CPU.

    Args:
        model: as for :func:`softpick.analysis.measure`.
        input_ids: ``(T,)`` or ``(1, T)``, without padding.

    Returns:
        For every layer ``l`` (of those with attention):

        - ``blocks.{l}.attn.hook_attn_scores`` ``(1, H, T, T)``: scaled, soft-capped and biased scores, ``-inf`` where masked
        - ``blocks.{l}.attn.hook_pattern`` ``(1, H, T, T)``: the weights
        - ``blocks.{l}.attn.hook_z`` ``(1, T, H, Dv)``: the heads' outputs, before the output projection
        - ``blocks.{l}.hook_resid_post`` ``(1, T, C)``: the residual stream after the layer
    """
    input_ids = one_sample(input_ids)
    parts: dict[str, list[Tensor]] = {}
    cache: dict[str, Tensor] = {}

    def on_attention(seen: SeenAttention) -> None:
        for name, value in (
            ("attn_scores", seen.masked_scores()),
            ("pattern", torch.where(seen.visible, seen.weights, 0.0)),
            ("z", seen.outputs.transpose(1, 2)),
        ):
            parts.setdefault(f"blocks.{seen.layer}.attn.hook_{name}", []).append(value.float().cpu())

    def on_hidden(layer: int, hidden: Tensor, part: str) -> None:
        cache[f"blocks.{layer}.hook_resid_post"] = hidden.float().cpu()

    with watch(model, on_attention, on_hidden) as run:
        run({"input_ids": input_ids.to(next(model.parameters()).device)})
    joined = {name: torch.cat(heads, 1) for name, heads in parts.items()}
    return cache | {name: x.transpose(1, 2) if name.endswith("hook_z") else x for name, x in joined.items()}
