"""Judge a converted model by what it writes: likelihood hides what is lost (arXiv 2603.26556, 2608.02689)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["agreement", "continuations", "cut_prompts", "likelihood", "repetition"]

_ROWS = 16  # prompts that are continued at once


def cut_prompts(sequences: Tensor, count: int, length: int) -> Tensor:
    """Prompts of held-out text: the beginnings of all sequences, then pieces at equal distances from those.

    Args:
        sequences: ``(S, T)`` token ids.
        count: of prompts, at most.
        length: of a prompt; shorter sequences give shorter ones.

    Returns:
        ``(N, P)``, ``N <= count``, ``P = min(length, T - 1)``; no token is in two prompts. Where all sequences begin with the
        same token (BOS), so do the prompts.
    """
    rows, room = sequences.shape
    length = min(length, room - 1)
    if not rows or length < 1:
        return sequences[:0, : max(length, 0)]
    pieces = max(1, min(-(-count // rows), room // length))
    step = room // pieces
    prompts = torch.cat([sequences[:, i * step : i * step + length] for i in range(pieces)])[:count].clone()
    if bool((sequences[:, 0] == sequences[0, 0]).all()):
        prompts[:, 0] = sequences[0, 0]
    return prompts


@torch.no_grad()
def continuations(model: Any, prompts: Tensor, length: int) -> Tensor:
    """The most likely next token, again and again; an end of text is a token like any other.

    Args:
        model: a causal language model of transformers.
        prompts: ``(N, P)`` token ids.
        length: tokens to add.

    Returns:
        ``(N, length)`` token ids on the CPU.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True
    )
    device = next(model.parameters()).device
    before, model.generation_config = model.generation_config, settings  # what it was saved with would fill gaps
    try:
        found = [
            model.generate(
                rows.to(device), attention_mask=torch.ones_like(rows, device=device), generation_config=settings
            )
            for rows in prompts.split(_ROWS)
        ]
    finally:
        model.generation_config = before
    return torch.cat(found)[:, prompts.shape[1] :].cpu()


@torch.no_grad()
def likelihood(judge: Any, prompts: Tensor, texts: Tensor) -> Tensor:
    """Mean log-probability (nats) of a token of ``texts (N, G)`` after ``prompts (N, P)``, by another model: ``(N,)``."""
    device, found = next(judge.parameters()).device, []
    for before, after in zip(prompts.split(_ROWS), texts.split(_ROWS), strict=True):
        ids = torch.cat([before, after], 1).to(device)
        logits = judge(input_ids=ids, use_cache=False).logits[:, before.shape[1] - 1 : -1].float()
        chosen = logits.gather(-1, ids[:, before.shape[1] :, None])[..., 0]
        found.append((chosen - logits.logsumexp(-1)).double().mean(1).cpu())
    return torch.cat(found)


def repetition(texts: Tensor, size: int = 4) -> float:
    """Share (percent) of the ``size``-grams of each row of ``texts (N, G)`` that occurred in it before."""
    again = total = 0
    for row in texts.tolist():
        grams = [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
        again += len(grams) - len(set(grams))
        total += len(grams)
    return 100.0 * again / total if total else 0.0


def agreement(texts: Tensor, others: Tensor) -> float:
    """Share (percent) of each row that two sets of continuations ``(N, G)`` have in common from its beginning."""
    same = (texts == others).long().cumprod(1)
    return 100.0 * float(same.float().mean())
