"""What a token's key is for: the perplexity when a cache evicts it, and when it was never there.

Two figures, because they differ and the second misleads alone. A decoder that needs an attention sink takes the first token
that it finds: hide the first key from *all* queries, and the second token becomes the sink (*absence*). Hide it after the
model has begun to use it, as a sliding cache does, and there is no token left that became one (*eviction*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softpick.analysis.calls import seen_keys
from softpick.experiment.models import Subject
from softpick.experiment.perplexity import change_percent, token_losses
from softpick.experiment.progress import Reporter

__all__ = ["LOGIT_ENTRIES", "hidden_key", "knockout", "knockout_note", "perplexity_of"]

LOGIT_ENTRIES = 1 << 27  # vocabulary logits, or eager attention weights, of a forward pass: half a gigabyte in fp32
_OVERFLOW = 700.0  # nats: exp() of more is beyond fp64


@contextmanager
def hidden_key(model: nn.Module) -> Iterator[Callable[[Tensor | None, int], None]]:
    """A function that says which key the attention layers of a model hide; it holds until it is called again.

    The function takes ``at (B,)``, a position a sample (None: nothing is hidden), and ``after``: queries at ``at + after``
    and later do not see that key. Everything else of the mask (windows, padding, biases) stays.

    Args:
        model: of transformers, whose attention goes through ``AttentionInterface`` and shows its masks (not a fused one).
    """
    from softpick.integrations.transformers import intercept_attention

    at: Tensor | None = None
    after = 1

    def hide(where: Tensor | None, delay: int) -> None:
        nonlocal at, after
        at, after = where, delay

    def around(name: str, function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            if at is not None:
                positions = torch.arange(query.shape[2], device=query.device)
                evicted = at.to(query.device)[:, None, None]
                hidden = (positions[None, :, None] >= evicted + after) & (positions[None, None] == evicted)
                see = seen_keys(attention_mask, name, module, query, key, kwargs) & ~hidden[:, None]
                if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():  # it may hold biases
                    lowest = torch.finfo(attention_mask.dtype).min
                    attention_mask = attention_mask[..., : key.shape[2]].masked_fill(~see, lowest)
                elif name == "eager":
                    attention_mask = torch.zeros(see.shape, dtype=query.dtype, device=query.device)
                    attention_mask = attention_mask.masked_fill_(~see, torch.finfo(query.dtype).min)
                else:
                    attention_mask = see
            return function(module, query, key, value, attention_mask, **kwargs)

        return attention

    with intercept_attention(model, around):
        yield hide


@torch.no_grad()
def _losses(
    subject: Subject,
    batches: Sequence[Tensor],
    at: Tensor,
    counted_from: int,
    hiding: dict[str, int | None],
    reporter: Reporter,
    label: str,
) -> tuple[dict[str, float], int]:
    """Mean loss in nats for each way of hiding the keys ``at (N,)``, of queries ``at + counted_from`` and later."""
    model = subject.model
    device, t = next(model.parameters()).device, batches[0].shape[1]
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    rows = max(1, LOGIT_ENTRIES // (t * max(text.vocab_size, heads * t)))
    sums, tokens = dict.fromkeys(hiding, 0.0), 0
    with reporter.progress(label, len(batches)) as progress, hidden_key(model) as hide:
        for done, (batch, first) in enumerate(zip(batches, at.split([len(b) for b in batches]), strict=True), 1):
            for ids, keys in zip(batch.to(device).split(rows), first.to(device).split(rows), strict=True):
                counted = torch.arange(t - 1, device=device) >= keys[:, None] + counted_from
                tokens += int(counted.sum())
                for name, after in hiding.items():
                    hide(None if after is None else keys, after or 0)
                    logits = model(input_ids=ids, use_cache=False).logits
                    for row, targets, of in zip(logits[:, :-1], ids[:, 1:], counted, strict=True):
                        sums[name] += float(token_losses(row, targets)[of.cpu()].sum())
                    del logits  # before the next are computed
            progress.update(done, None)
    return {name: total / max(tokens, 1) for name, total in sums.items()}, tokens


def perplexity_of(mean: float) -> float | None:
    """``exp`` of a mean loss in nats, or None beyond fp64."""
    return math.exp(mean) if mean < _OVERFLOW else None


def knockout(
    subject: Subject, batches: Sequence[Tensor], at: Tensor, after: int, reporter: Reporter, label: str
) -> dict[str, Any]:
    """Perplexity with and without one key of each sample.

    All figures are of the same tokens: those that queries ``2 after`` and more positions behind the key predict, positions
    unchanged.

    Args:
        subject: a causal model.
        batches: ``(B, T)`` token ids, all of one length.
        at: ``(N,)`` position of the key in each sample.
        after: queries so many positions behind the key and later do not see it in *eviction*; in *absence*, all behind it.
        reporter: shows progress.
        label: of it.

    Returns:
        ``all keys``, ``eviction``, ``absence`` (perplexities, null beyond fp64 or without tokens), ``eviction_percent``,
        ``absence_percent`` (change), ``tokens`` (that were counted), ``after`` and ``counted_from``.
    """
    hiding = {"all keys": None, "eviction": after, "absence": 1}
    means, tokens = _losses(subject, batches, at, 2 * after, hiding, reporter, label)
    result: dict[str, Any] = {name: perplexity_of(mean) if tokens else None for name, mean in means.items()}
    for name in ("eviction", "absence"):
        result[f"{name}_percent"] = change_percent(means[name], means["all keys"]) if tokens else None
    return result | {"tokens": tokens, "after": after, "counted_from": 2 * after}


def knockout_note(title: str, found: dict[str, Any]) -> str:
    """A knockout in a sentence or two."""
    masked, key = found["masked"], found["key"]
    which = {"first": "the first token's key", "strongest": "the strongest token's key"}.get(
        key, f"the key at position {key}"
    )
    what = f"{masked['token']!r} in {masked['token_id_share']:.0f} % of the samples"
    if key == "strongest":
        what += f", position {masked['position']} in {masked['position_share']:.0f} %"
    if not found["tokens"]:
        return f"{title}: no knockout of {which}: no token stands {found['counted_from']} positions behind it."

    def figure(name: str) -> str:
        value, change = found[name], found.get(f"{name}_percent")
        text = "beyond fp64" if value is None else f"{value:.4g}"
        return text + ("" if change is None else f" ({change:+.1f} %)")

    return (
        f"{title}: perplexity {figure('all keys')}. With {which} ({what}) evicted after {found['after']} tokens: "
        f"{figure('eviction')}. If no later query ever sees it, so that another token can take its place: "
        f"{figure('absence')}. Of {found['tokens']:,} tokens, from {found['counted_from'] + 1} positions behind the key on."
    )
