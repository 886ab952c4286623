"""Passkey retrieval: a number in the middle of filler text, asked for at the end; and what the heads that fetch it do.

The prompt is that of Mohtashami and Jaggi 2023 (*Landmark Attention*) and LongHeads (Lu et al. 2024), which the softpick
paper uses (section 7.1, table 5). A model's answers come from greedy decoding with a cache, a batch at a time, padded on
the left. The rows of attention from which the answer is predicted are looked at as they are computed; full maps, which for
5000 tokens would take gigabytes, never exist.
"""

from __future__ import annotations

import inspect
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softpick.evaluation.tasks import EvaluationError, starts_with_bos
from softpick.experiment.corpus import token_ids
from softpick.experiment.positions import first_position

__all__ = ["LENGTHS", "PasskeyPrompt", "make_prompts", "passkey", "prompt_text", "retrieving_heads", "shortest_prompt"]

LENGTHS: tuple[int, ...] = (890, 1983, 3075, 4167, 4986)
"""Tokens of the paper's prompts (table 5)."""

_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about "
    "the important information there."
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_LARGEST_KEY = 49_999
_DEPTHS = 5  # parts of the text for which accuracy is also given


@dataclass(frozen=True)
class PasskeyPrompt:
    """One question.

    Attributes:
        text: all of it.
        key: the number, as text.
        depth: share of the filler that stands before it.
        ids: tokens, BOS included where there is one.
        key_tokens: positions among ``ids`` of the tokens with digits of the key, both times that it is named.
    """

    text: str
    key: str
    depth: float
    ids: tuple[int, ...]
    key_tokens: tuple[int, ...]


def make_prompts(
    tokenizer: Any, length: int, count: int, *, seed: int = 0, bos: int | None = None
) -> list[PasskeyPrompt]:
    """Prompts of one length. Keys and depths depend on ``seed``, ``length`` and ``count`` only, not on the tokenizer.

    Args:
        tokenizer: of transformers, a fast one (it says where in the text a token stands).
        length: tokens; a prompt has as many, or up to a word of filler fewer.
        count: how many.
        seed: of keys (1 to 49999) and depths (uniform).
        bos: put in front of each, and counted in ``length``.

    Raises:
        EvaluationError: a length below that of a prompt without filler; a slow tokenizer; a key that is hidden.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise EvaluationError(
            f"tokenizer: the passkey needs a fast tokenizer (with the offsets of tokens), got {type(tokenizer).__name__}"
        )
    rng = random.Random(f"{seed}/{length}")
    opening = 0 if bos is None else 1
    characters = None
    prompts = []
    for _ in range(count):
        key, depth = str(rng.randint(1, _LARGEST_KEY)), rng.random()

        def tokens(filler: int, key: str = key, depth: float = depth) -> int:
            text = prompt_text(key, depth, filler)[0]
            return opening + len(token_ids(tokenizer, [text])[0])

        if characters is None:
            characters = _longest(tokens, length)
        filler = characters
        while filler > 0 and tokens(filler) > length:
            filler -= 4
        filler = max(0, filler)
        if tokens(filler) > length:
            raise EvaluationError(f"lengths: expected at least {tokens(0)} tokens for this prompt, got {length}")
        prompts.append(_prompt(tokenizer, key, depth, filler, bos))
    return prompts


def shortest_prompt(tokenizer: Any, bos: int | None = None) -> int:
    """Tokens of a prompt without filler, for the largest key.

    Args:
        tokenizer: of transformers.
        bos: counted where there is one.
    """
    text = prompt_text(str(_LARGEST_KEY), 0.5, 0)[0]
    return len(token_ids(tokenizer, [text])[0]) + (bos is not None)


def passkey(
    model: Any,
    tokenizer: Any,
    length: int,
    *,
    count: int = 50,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Accuracy for prompts of one length, and what the heads do at the queries that predict the answer.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its own, a fast one.
        length: tokens of a prompt, BOS included where :func:`softpick.evaluation.tasks.starts_with_bos` puts one in front.
        count: prompts.
        seed: of keys and depths.
        batch_size: prompts that are answered together.
        progress: called with the number of answered prompts.

    Returns:
        ``length``, ``prompts``, ``tokens`` (the longest prompt), ``correct``, ``accuracy`` and ``accuracy_stderr`` (percent),
        ``by_depth`` (``{from, to, prompts, correct}``), ``answers`` (``{key, depth, answer, correct}``) and ``heads``: for
        ``first`` (the query that predicts the first token of the answer) and ``answer`` (those of all its tokens), means
        over the prompts, ``[L][H]``, of ``mass`` (row sum), ``largest`` (weight), ``key_weight`` (sum of the weights on the
        key's tokens) and ``key_share`` (the same as a share of row mass; rows without mass count as 0).

    Raises:
        EvaluationError: as :func:`make_prompts`; a model whose attention shows no weights.
    """
    from softpick.analysis.capture import watch_last_query

    if count < 1 or batch_size < 1:
        name, value = ("count", count) if count < 1 else ("batch_size", batch_size)
        raise EvaluationError(f"{name}: expected at least 1, got {value}")
    bos = starts_with_bos(model, tokenizer)
    prompts = make_prompts(tokenizer, length, count, seed=seed, bos=bos)
    sizes = [_answer_tokens(tokenizer, prompt.key) for prompt in prompts]
    sums = _Sums()
    texts: list[str] = []
    for start in range(0, count, batch_size):
        batch = prompts[start : start + batch_size]
        ids, mask, keys = _padded(batch)
        rows = _Rows(keys, sizes[start : start + batch_size], sums)
        try:
            with watch_last_query(model, rows):
                # one token more than the longest answer, so that a key that goes on is seen to be another one
                found = _generate(model, ids, mask, max(sizes) + 1)
        except ValueError as error:
            raise EvaluationError(f"model: {error}") from error
        texts += [_words(tokenizer, row) for row in found.tolist()]
        if progress is not None:
            progress(len(texts))
    right = [_is_key(text, prompt.key) for text, prompt in zip(texts, prompts, strict=True)]
    share = sum(right) / count
    return {
        "length": length,
        "prompts": count,
        "tokens": max(len(prompt.ids) for prompt in prompts),
        "correct": sum(right),
        "accuracy": 100.0 * share,
        "accuracy_stderr": 100.0 * math.sqrt(share * (1 - share) / count),
        "by_depth": _by_depth(prompts, right),
        "answers": [
            {"key": p.key, "depth": round(p.depth, 4), "answer": text, "correct": ok}
            for p, text, ok in zip(prompts, texts, right, strict=True)
        ],
        "heads": sums.means(),
    }


def retrieving_heads(found: dict[str, Any], count: int = 5) -> list[dict[str, Any]]:
    """The heads with the most weight on the key's tokens, at the queries of the whole answer.

    Args:
        found: what :func:`passkey` returned.
        count: how many.

    Returns:
        ``{layer, head, key_weight, key_share, mass, largest}``, most weight first.
    """
    heads = found["heads"]["answer"]
    ranked = sorted(
        ((layer, head) for layer, row in enumerate(heads["key_weight"]) for head in range(len(row))),
        key=lambda at: -heads["key_weight"][at[0]][at[1]],
    )
    return [
        {"layer": layer, "head": head} | {name: heads[name][layer][head] for name in _FIGURES}
        for layer, head in ranked[:count]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The prompt


def prompt_text(key: str, depth: float, filler: int) -> tuple[str, list[tuple[int, int]]]:
    """The prompt, and where in it the key stands.

    Args:
        key: the number, as text.
        depth: share of the filler that stands before it.
        filler: characters of filler, cut anywhere, as in the reference.

    Returns:
        The text, and first character and end of each place that names the key.
    """
    endless = _FILLER * (filler // len(_FILLER) + 1)
    before = int(depth * filler)
    line = f"The pass key is {key}. Remember it. {key} is the pass key."
    start = "\n".join([_INTRODUCTION, endless[:before], ""])
    spans = [len(start) + m.start() for m in re.finditer(key, line)]
    text = "\n".join([start + line, endless[: filler - before], "What is the pass key? The pass key is"])
    return text, [(begin, begin + len(key)) for begin in spans]


def _longest(tokens: Callable[[int], int], length: int) -> int:
    """The most characters of filler with which a prompt has at most ``length`` tokens; 0 where none fit."""
    low, high = 0, 64
    while tokens(high) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= length else (low, middle)
    return low


def _prompt(tokenizer: Any, key: str, depth: float, filler: int, bos: int | None) -> PasskeyPrompt:
    text, spans = prompt_text(key, depth, filler)
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    shift = 0 if bos is None else 1
    at = tuple(
        index + shift
        for index, (start, end) in enumerate(encoded["offset_mapping"])
        if any(start < stop and begin < end for begin, stop in spans)
    )
    if not at:
        raise EvaluationError(f"tokenizer: no token of the prompt holds a digit of the key {key}")
    return PasskeyPrompt(text, key, depth, (*([] if bos is None else [bos]), *encoded["input_ids"]), at)


def _answer_tokens(tokenizer: Any, key: str) -> int:
    """Tokens of the key where the prompt ends: what the sentence has more with it than without."""
    question = "The pass key is"
    lengths = [len(ids) for ids in token_ids(tokenizer, [question, f"{question} {key}"])]
    return max(1, lengths[1] - lengths[0])


def _is_key(text: str, key: str) -> bool:
    """Whether an answer begins with the key, and the number ends where the key does."""
    return re.match(rf"\s*{key}(?!\d)", text) is not None


def _words(tokenizer: Any, ids: list[int]) -> str:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids)


def _by_depth(prompts: Sequence[PasskeyPrompt], right: Sequence[bool]) -> list[dict[str, Any]]:
    parts = [min(_DEPTHS - 1, int(prompt.depth * _DEPTHS)) for prompt in prompts]
    return [
        {
            "from": part / _DEPTHS,
            "to": (part + 1) / _DEPTHS,
            "prompts": parts.count(part),
            "correct": sum(ok for at, ok in zip(parts, right, strict=True) if at == part),
        }
        for part in range(_DEPTHS)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The model


def _padded(batch: Sequence[PasskeyPrompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids ``(B, T)``, padded on the left; their mask ``(B, T)``; where the key stands ``(B, T)``, boolean."""
    longest = max(len(prompt.ids) for prompt in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    keys = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(batch):
        pad = longest - len(prompt.ids)
        ids[row, pad:] = torch.tensor(prompt.ids)
        mask[row, pad:] = 1
        keys[row, [pad + at for at in prompt.key_tokens]] = True
    return ids, mask, keys


@torch.no_grad()
def _generate(model: Any, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """The ``(B, steps)`` most likely next tokens, one after the other, with a cache."""
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    known = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    positions = (mask.cumsum(1) - 1).clamp(min=0) + first_position(model)
    cache, found = None, []
    for step in range(steps):
        if "position_ids" in known:  # models without them (ALiBi) count by the mask
            more["position_ids"] = positions
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(2)
        if cache is None and step + 1 < steps:
            raise ValueError(f"{type(model).__name__} gave no cache")
        found.append(ids)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(found, 1).cpu()


_FIGURES = ("key_weight", "key_share", "mass", "largest")


class _Sums:
    """Sums of the figures over rows: for each layer ``(H, 4)``, of the first query and of all queries of the answers."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, Tensor]] = {"first": {}, "answer": {}}
        self.rows = {"first": 0, "answer": 0}

    def add(self, name: str, layer: int, total: Tensor, rows: int) -> None:
        sums = self.sums[name]
        sums[layer] = sums[layer] + total if layer in sums else total
        if layer == 0:
            self.rows[name] += rows

    def means(self) -> dict[str, Any]:
        found = {}
        for name, sums in self.sums.items():
            stacked = torch.stack([sums[layer] for layer in sorted(sums)]) / self.rows[name]
            found[name] = {figure: stacked[..., i].tolist() for i, figure in enumerate(_FIGURES)}
        return found


class _Rows:
    """Receives the attention weights of the last query, layer after layer and step after step, for one batch."""

    def __init__(self, keys: Tensor, sizes: Sequence[int], sums: _Sums) -> None:
        self.keys, self.sizes, self.sums = keys, torch.tensor(sizes), sums

    def __call__(self, layer: int, weights: Tensor) -> None:
        step = weights.shape[2] - self.keys.shape[1]
        counted = step < self.sizes  # answers that have a token more
        rows = int(counted.sum())
        if rows == 0:
            return
        keys = self.keys.to(weights.device)[:, None]
        weights = weights.double()
        on_key = torch.where(keys, weights[..., : keys.shape[2]], 0.0)
        mass = weights.abs().sum(2)
        share = torch.where(mass > 0, on_key.abs().sum(2) / mass.where(mass > 0, torch.ones_like(mass)), 0.0)
        figures = torch.stack([on_key.sum(2), share, weights.sum(2), weights.amax(2)], dim=2).cpu()
        total = figures[counted].sum(0)
        self.sums.add("answer", layer, total, rows)
        if step == 0:
            self.sums.add("first", layer, total, rows)
