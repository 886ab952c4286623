"""Perplexity of token sequences, as one number and by position, also beyond the length that a model was trained for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softpick.experiment.positions import learned_positions

__all__ = [
    "change_percent",
    "learned_positions",
    "perplexity",
    "perplexity_by_position",
    "position_edges",
    "standard_error",
    "token_losses",
]

_LOGIT_ENTRIES = 1 << 27  # vocabulary logits of a forward pass: half a gigabyte in fp32
_OVERFLOW = 700.0  # nats: exp() of more is beyond fp64


def perplexity(
    model: Any, sequences: Tensor, *, batch_size: int = 8, progress: Callable[[int], None] | None = None
) -> float:
    """``exp`` of the mean next-token loss over all tokens that have one before them.

    Args:
        model: a causal language model of transformers; used as it is (call ``eval()`` first).
        sequences: ``(N, T)`` token ids without padding, ``T`` at least 2. They are moved to the model's device.
        batch_size: sequences a forward pass; fewer where their logits would take more than half a gigabyte.
        progress: called with the number of finished sequences.

    Returns:
        Perplexity (nats inside the exponential); infinite where a float cannot hold it.

    Raises:
        ValueError: not two dimensions, no sequence, or fewer than two tokens.
    """
    total, tokens = 0.0, 0
    for _, losses in _losses(model, sequences, batch_size, progress):
        total += float(losses.sum())
        tokens += losses.numel()
    return _exp(total / tokens)


def perplexity_by_position(
    model: Any,
    sequences: Tensor,
    edges: Sequence[int],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """The perplexity of the tokens of each range of positions.

    Args:
        model: as for :func:`perplexity`.
        sequences: ``(N, T)``.
        edges: ascending; range ``b`` has the tokens at positions ``edges[b] <= p < edges[b + 1]``, where position 0 (BOS)
            is never predicted. :func:`position_edges` makes some.
        batch_size: as for :func:`perplexity`.
        progress: as for :func:`perplexity`.

    Returns:
        For each range ``from`` and ``to`` (both included), ``tokens``, ``loss`` (mean, nats), ``loss_stderr`` (standard
        error over sequences, of each sequence's mean in the range; None for one sequence) and ``perplexity`` (None where
        a float cannot hold it).

    Raises:
        ValueError: as :func:`perplexity`; edges that do not ascend or lie outside ``1..T``.
    """
    length = sequences.shape[-1]
    edges = list(edges)
    if len(edges) < 2 or edges[0] < 1 or edges[-1] > length or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"edges: expected two or more ascending positions from 1 to {length}, got {edges}")
    rows = torch.empty(len(sequences), len(edges) - 1, dtype=torch.float64)
    for first, losses in _losses(model, sequences, batch_size, progress):
        for index, (low, high) in enumerate(itertools.pairwise(edges)):
            rows[first : first + len(losses), index] = losses[:, low - 1 : high - 1].mean(1)
    found = []
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        values = rows[:, index]
        loss = float(values.mean())
        value = _exp(loss)
        found.append(
            {
                "from": low,
                "to": high - 1,
                "tokens": len(values) * (high - low),
                "loss": loss,
                "loss_stderr": standard_error(values),
                "perplexity": value if math.isfinite(value) else None,
            }
        )
    return found


def standard_error(values: Tensor) -> float | None:
    """Of the mean of ``values (N,)``; None for fewer than two, which have none."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """``(N,)`` fp64 on the CPU: the loss of each token in nats, from ``logits (N, V)`` and ``targets (N,)``.

    Computed in fp32 for some tokens at a time: a copy of 32,768 tokens' logits for 128,256 words would be 17 GB.
    """
    step = max(1, _LOGIT_ENTRIES // logits.shape[1])
    pieces = zip(logits.split(step), targets.split(step), strict=True)
    losses = [nn.functional.cross_entropy(x.float(), y, reduction="none").cpu().double() for x, y in pieces]
    return torch.cat(losses)


def change_percent(loss: float, base: float) -> float | None:
    """By how many percent the perplexity of one mean loss (nats) is above that of another; None where it is beyond fp64."""
    return 100.0 * math.expm1(loss - base) if loss - base < _OVERFLOW else None


def position_edges(length: int, bins: int, trained: int | None = None) -> list[int]:
    """Edges of ``bins`` ranges of about equal width (fewer where there are fewer positions) over ``1..length - 1``.

    Args:
        length: tokens of a sequence.
        bins: how many ranges; at least 1, and 2 where ``trained`` is an edge.
        trained: tokens of a sequence that the model was trained with: becomes an edge if it lies inside, so that no range
            mixes what it has seen with what it has not.
    """

    def divide(first: int, end: int, parts: int) -> list[int]:
        return sorted({first + (end - first) * i // parts for i in range(parts)})

    if trained is None or not 1 < trained < length:
        return [*divide(1, length, bins), length]
    inside = max(1, min(round(bins * (trained - 1) / (length - 1)), bins - 1))
    return [*divide(1, trained, inside), *divide(trained, length, max(1, bins - inside)), length]


# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _losses(
    model: Any, sequences: Tensor, batch_size: int, progress: Callable[[int], None] | None
) -> Iterator[tuple[int, Tensor]]:
    """Index of the first sequence of a batch, and its losses ``(b, T - 1)`` fp64 on the CPU."""
    if sequences.dim() != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise ValueError(f"sequences: expected (N, T) with T at least 2, got {tuple(sequences.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    device = next(model.parameters()).device
    entries = sequences.shape[1] * int(model.config.get_text_config(decoder=True).vocab_size)
    done = 0
    for batch in sequences.split(max(1, min(batch_size, _LOGIT_ENTRIES // entries))):
        ids = batch.to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        losses = [token_losses(row[:-1], targets[1:]) for row, targets in zip(logits, ids, strict=True)]
        del logits
        yield done, torch.stack(losses)
        done += len(batch)
        if progress is not None:
            progress(done)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < _OVERFLOW else math.inf if loss == loss else math.nan
