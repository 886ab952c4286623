"""A small extraction task made from any text: does a model still find in its context what it has just read?"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from softpick.conversion.generation import continuations
from softpick.experiment.files import text_digest
from softpick.experiment.models import Subject

__all__ = ["ANSWER_TOKENS", "Case", "answers", "make_cases", "right", "score"]

ANSWER_TOKENS = 32
"""Tokens that a model writes at most; room for them is kept behind a prompt."""
_ANCHOR = 4  # words that stand before the answer, and are repeated at the prompt's end
_ANCHOR_CHARACTERS = 80  # of an anchor; a longer one is no text
_WORD = re.compile(r"\w{4,24}(?!\w)")
_PLACES = 4  # where in the passage answers stand, in turn
_SPARE = 3  # tokens beside those of the answer: some models begin with a space, some end a word with a mark
_CHARACTERS = 2_000_000  # of text that cases are made from
_WIDE = 8  # characters of text that are tokenized for a token of the passage


@dataclass(frozen=True)
class Case:
    """A question.

    Attributes:
        prompt: token ids of the passage and, after an empty line, the words that stand before the answer in it.
        bare: the same without the passage.
        answer: the word that stands there.
    """

    prompt: tuple[int, ...]
    bare: tuple[int, ...]
    answer: str


def make_cases(subject: Subject, documents: Sequence[str], count: int, length: int) -> list[Case]:
    """Cases of a text, the same for the same text and tokenizer.

    Args:
        subject: its tokenizer and its room for positions count, not its weights.
        documents: of held-out text.
        count: at most so many; fewer where the text has fewer words that can be asked for.
        length: tokens of a prompt; fewer where the model has no room for them and :data:`ANSWER_TOKENS`.
    """
    text = "\n\n".join(documents)[:_CHARACTERS]
    found: list[Case] = []
    for start, at, answer in _facts(text):
        if len(found) == count:
            break
        case = _case(subject, text, start, at, answer, min(length, subject.room - ANSWER_TOKENS), len(found) % _PLACES)
        if case is not None:
            found.append(case)
    return found


def _facts(text: str) -> Iterator[tuple[int, int, str]]:
    """Where an anchor begins, where the word after it begins, and that word: the rarest words first, each once."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    places: dict[str, tuple[int, int]] = {}
    for index in range(_ANCHOR, len(words)):
        at, start, end = words[index][0], words[index - _ANCHOR][0], words[index - 1][1]
        match = _WORD.match(text, at)
        if match is None or not match[0].strip("_") or text[end:at] != " " or end - start > _ANCHOR_CHARACTERS:
            continue
        places.setdefault(match[0], (start, at))
    counts = Counter(re.findall(r"\w+", text))
    for word in sorted(places, key=lambda word: (counts[word], text_digest(word))):
        yield *places[word], word


def _case(subject: Subject, text: str, start: int, at: int, answer: str, length: int, place: int) -> Case | None:
    """The case of one word, or None where it cannot be asked for: the passage has to have it, and the anchor, once."""
    anchor = text[start : at - 1]
    asked = [*subject.ids("\n\n"), *subject.ids(anchor)]
    size = length - len(subject.wrapped(asked))  # of the passage
    known = len(subject.ids(f"{anchor} {answer}"))
    if size <= known or len(subject.ids(f" {answer}")) + _SPARE > ANSWER_TOKENS:
        return None
    # from the white space before the anchor on, where tokenizers begin a new token
    cut = max(0, start - 1)
    left = subject.ids(text[max(0, cut - _WIDE * length) : cut]) if cut else []
    before = min((size - known) * place // _PLACES, len(left))
    passage = [
        *left[len(left) - before :],
        *subject.ids(text[cut : cut + _WIDE * length])[: size - before],
    ]
    read, asks = (" ".join(s.split()) for s in (str(subject.tokenizer.decode(passage)), anchor))
    if len(passage) < size or read.count(asks) != 1 or f"{asks} {answer}" not in read:
        return None
    if len(re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", read)) != 1:
        return None
    return Case(tuple(subject.wrapped([*passage, *asked])), tuple(subject.wrapped(subject.ids(anchor))), answer)


def answers(subject: Subject, model: Any, cases: Sequence[Case], bare: bool = False) -> list[str]:
    """What a model writes, greedily, after each case.

    Args:
        subject: whose tokenizer the model has.
        model: a causal language model of transformers.
        cases: from :func:`make_cases`.
        bare: without the passage.
    """
    rows = [case.bare if bare else case.prompt for case in cases]
    longest = max((len(subject.ids(f" {case.answer}")) for case in cases), default=0)
    texts = [""] * len(rows)
    for size in sorted({len(row) for row in rows}):  # prompts of one length need no padding
        mine = [i for i, row in enumerate(rows) if len(row) == size]
        made = continuations(model, torch.tensor([rows[i] for i in mine]), longest + _SPARE)
        for i, ids in zip(mine, made.tolist(), strict=True):
            texts[i] = str(subject.tokenizer.decode(ids))
    return texts


def right(written: str, answer: str) -> bool:
    """Whether a text begins with a word, white space apart."""
    rest = written.lstrip()
    return rest.startswith(answer) and re.match(r"\w", rest[len(answer) :]) is None


def score(cases: Sequence[Case], texts: dict[str, list[str]]) -> dict[str, Any]:
    """Shares of right answers, with standard errors, in percent.

    Args:
        cases: that were asked; at least one.
        texts: what ``teacher`` and ``student`` wrote, and the teacher without the passage (``without_passage``).

    Returns:
        For each its ``accuracy_percent`` and ``standard_error_percent``; ``difference``: student minus teacher, with the
        standard error of differences within cases.
    """
    marks = {
        name: [float(right(text, case.answer)) for text, case in zip(written, cases, strict=True)]
        for name, written in texts.items()
    }
    found: dict[str, Any] = {"cases": len(cases), "prompt_tokens": len(cases[0].prompt)}
    for name, hits in marks.items():
        mean, error = _mean(hits)
        found[name] = {"accuracy_percent": mean, "standard_error_percent": error}
    mean, error = _mean([ours - theirs for ours, theirs in zip(marks["student"], marks["teacher"], strict=True)])
    found["difference"] = {"accuracy_percent": mean, "standard_error_percent": error}
    found["examples"] = [
        {"answer": case.answer, **{name: written[i] for name, written in texts.items()}}
        for i, case in islice(enumerate(cases), 3)
    ]
    return found


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, in percent."""
    mean = sum(values) / len(values)
    return 100.0 * mean, 100.0 * math.sqrt(sum((x - mean) ** 2 for x in values)) / len(values)
