"""``softpick evaluate``: benchmark tasks, passkey retrieval and perplexity by position, several models side by side.

:func:`evaluate` returns a report; each finished result (a model's task, one passkey length, the perplexities) is kept on the
way, so that an interrupted evaluation goes on where it was. Definitions: docs/metrics.md; how to run it: docs/evaluation.md.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from softpick.evaluation.passkey import LENGTHS, passkey, retrieving_heads, shortest_prompt
from softpick.evaluation.settings import EvaluateSettings
from softpick.evaluation.tasks import (
    HEADLINES,
    EvaluationError,
    check_hub,
    expected_files,
    run_tasks,
    starts_with_bos,
)
from softpick.experiment.corpus import get_corpus
from softpick.experiment.environment import chosen_device, command_line, device_line, hardware, versions
from softpick.experiment.models import ModelError, Subject, check_models, identity, load_subject
from softpick.experiment.perplexity import learned_positions, perplexity_by_position, position_edges
from softpick.experiment.progress import Reporter, Silent, Titled
from softpick.experiment.reading import Corpus
from softpick.experiment.result_cache import ResultCache, stamps, titles
from softpick.experiment.resume import Workspace

__all__ = ["EvaluateSettings", "evaluate", "forget", "summary_rows"]

_CORPUS_CHARACTERS = 4_000_000  # of a corpus that is tokenized
_LONGEST = 8192  # tokens of a sequence for the perplexities, unless the user says otherwise
_PREFIX = "evaluate"
_HEADS = 5  # retrieving heads that are listed


def evaluate(
    settings: EvaluateSettings,
    *,
    reporter: Reporter | None = None,
    command: str = "",
    state: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate models, one after the other.

    Args:
        settings: what and on what.
        reporter: gets progress and messages.
        command: as typed, for the report.
        state: folder in which finished results are left, and from which the same evaluation takes them. Only files that begin
            with ``evaluate-`` are written, and :func:`forget` removes them.

    Returns:
        ``title``, ``meta`` (versions, seed, command, hardware), ``settings``, ``notes`` and ``runs``, one a model, as
        docs/evaluation.md lays them out.

    Raises:
        EvaluationError: impossible settings, missing files, a model without attention that can be seen.
        ModelError: an encoder, a model that cannot be loaded, has no tokenizer or no room for so many positions.
        DataError: the data cannot be used, or are shorter than a sequence.
        OutputError: ``state`` cannot be written, is used by another process, or holds a result that was changed.
        ImportError: a package is missing; the message names the extra.
    """
    settings.check()
    settings = replace(settings, device=chosen_device(settings.device))
    reporter = reporter if reporter is not None else Silent()
    reporter.say(device_line(settings.device))
    with nullcontext() if state is None else Workspace(state):
        return _evaluate(settings, reporter, command, state)


def _evaluate(settings: EvaluateSettings, reporter: Reporter, command: str, state: str | Path | None) -> dict[str, Any]:
    trust = settings.trust_remote_code
    check_models(settings.models, settings.device, trust_remote_code=trust, decoder=True)
    corpus = None
    if settings.perplexity:
        corpus = get_corpus(settings.data, settings.text_field, _CORPUS_CHARACTERS)
        reporter.say(f"data: {corpus.description}")
    result_cache = ResultCache(state, _PREFIX)
    runs: list[dict[str, Any]] = []
    for name, title in zip(settings.models, titles(settings.models), strict=True):
        length = runs[0]["perplexity"]["length"] if runs and settings.perplexity else settings.sequence_length
        runs.append(_Run(name, title, settings, corpus, length, reporter, result_cache).run())
    return {
        "title": f"softpick evaluate: {' against '.join(run['title'] for run in runs)}",
        "meta": {
            "models": ", ".join(settings.models),
            "tasks_from": "none" if not settings.tasks else settings.data_dir or "the Hugging Face hub",
            "data": "none" if corpus is None else corpus.description,
            "created": time.strftime("%Y-%m-%d %H:%M"),
            "versions": versions("lm_eval", "datasets", "tokenizers", "accelerate"),
            "seed": settings.seed,
            "device": settings.device,
            "hardware": hardware(settings.device),
            "threads": torch.get_num_threads(),
            "command": command or command_line(),
        },
        "settings": asdict(settings),
        "notes": [note for run in runs for note in run["notes"]],
        "runs": runs,
    }


def forget(state: str | Path) -> None:
    """Remove what evaluations have left in a folder for going on; nothing else in it."""
    ResultCache(state, _PREFIX).forget()


def summary_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The table: for each figure a label and one text a model; a dash where there is none."""
    runs = report["runs"]
    rows: list[tuple[str, list[str]]] = []

    def add(label: str, values: Sequence[str | None]) -> None:
        rows.append((label, [value if value is not None else "–" for value in values]))

    for task in dict.fromkeys(task for run in runs for task in run["tasks"]):
        for metric in HEADLINES[task]:
            percent = metric.startswith("acc")
            label = f"{task} {metric} {'(%, up)' if percent else '(down)'}"
            add(label, [_with_error(run["tasks"].get(task, {}), metric, 100 if percent else 1) for run in runs])
    for length in sorted({found["length"] for run in runs for found in run["passkey"]}):
        cells = [next((f for f in run["passkey"] if f["length"] == length), None) for run in runs]
        add(
            f"passkey, {length} tokens (%, up)",
            [None if f is None else f"{f['accuracy']:.1f} ± {f['accuracy_stderr']:.1f}" for f in cells],
        )
    for label, name in (("weight on the key", "key_weight"), ("row mass", "mass"), ("largest weight", "largest")):
        if any(run["retrieving"] for run in runs):
            add(f"the key's strongest head: {label}", [_over_lengths(run["retrieving"], name) for run in runs])
    for label, name in (("within", "within"), ("beyond", "beyond")):
        if any(run["perplexity"] and run["perplexity"][name] for run in runs):
            add(
                f"perplexity {label} the trained length (down)",
                [
                    None
                    if not run["perplexity"] or run["perplexity"][name] is None
                    else f"{run['perplexity'][name]:.4g}"
                    for run in runs
                ],
            )
    return rows


# ---------------------------------------------------------------------------------------------------------------------


class _Run:
    """One model's part of the report. The model is loaded when a result that is not kept yet needs it."""

    def __init__(
        self,
        name: str,
        title: str,
        settings: EvaluateSettings,
        corpus: Corpus | None,
        length: int | None,
        reporter: Reporter,
        result_cache: ResultCache,
    ) -> None:
        self.name, self.title, self.settings, self.corpus, self.result_cache = (
            name,
            title,
            settings,
            corpus,
            result_cache,
        )
        self.length = length
        self.reporter = Titled(reporter, title)
        self._loaded: Subject | None = None
        chosen = [settings.device, settings.dtype, settings.attn_implementation]
        self._identity = [identity(name, trust_remote_code=settings.trust_remote_code), chosen, versions("lm_eval")]

    def run(self) -> dict[str, Any]:
        settings = self.settings
        start = time.perf_counter()
        about = self._part("about", {"visible": settings.passkey != ()}, self._about)
        before = self.result_cache.again
        notes: list[str] = []
        lengths = self._passkey_lengths(about, notes)
        length = self._sequence_length(about) if settings.perplexity else None
        wanted: dict[str, dict[str, Any]] = {
            task: {
                "files": _files(settings, task),
                "given": [settings.data_dir, settings.limit, settings.num_fewshot, settings.seed, settings.batch_size],
            }
            for task in settings.tasks
        }
        todo = [
            task
            for task, depends in wanted.items()
            if not self.result_cache.has([self._identity, f"task {task}", depends])
        ]
        if todo and settings.data_dir is None:
            check_hub(todo, settings.num_fewshot)
        perplexity = None  # first, so that too short a text is an error at once
        if length is not None:
            assert self.corpus is not None
            depends = {
                "documents": hashlib.sha256("\0".join(self.corpus.documents).encode()).hexdigest(),
                "given": [length, settings.samples, settings.bins],
            }
            perplexity = self._part("perplexity", depends, functools.partial(self._perplexity, length))
        tasks = {
            task: self._part(f"task {task}", depends, functools.partial(self._task, task))
            for task, depends in wanted.items()
        }
        found = []
        for tokens in lengths:
            depends = {"given": [tokens, settings.passkey_prompts, settings.seed]}
            found.append(self._part(f"passkey {tokens}", depends, functools.partial(self._passkey, tokens)))
        if self.result_cache.again > before:
            self.reporter.say(f"{self.result_cache.again - before} parts were there from before")
        retrieving = _retrieving(found)
        notes += _notes(self.title, about, tasks, found, perplexity)
        self._loaded = None  # before the next one is loaded
        return about | {
            "title": self.title,
            "tasks": tasks,
            "passkey": found,
            "retrieving": retrieving,
            "perplexity": perplexity,
            "notes": notes,
            "seconds": time.perf_counter() - start,
        }

    def _part(self, what: str, depends: dict[str, Any], make: Callable[[], Any]) -> Any:
        """``make()``, or what it gave the last time for the same model, settings and versions."""
        return self.result_cache.get([self._identity, what, depends], make)

    @property
    def subject(self) -> Subject:
        if self._loaded is None:
            settings = self.settings
            self._loaded = load_subject(
                self.name,
                reporter=self.reporter,
                device=settings.device,
                dtype=settings.dtype,
                attn_implementation=settings.attn_implementation,
                trust_remote_code=settings.trust_remote_code,
                visible=settings.passkey != (),
                decoder=True,
            )
        return self._loaded

    def _about(self) -> dict[str, Any]:
        subject = self.subject
        model = subject.model
        if self.settings.passkey != ():
            self._see_attention()
        bos = starts_with_bos(model, subject.tokenizer)
        return {
            "model": self.name,
            "normalizer": subject.normalizer,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "attn_implementation": str(model.config._attn_implementation),
            "trained_length": None if subject.room == sys.maxsize else subject.room,
            "learned_positions": learned_positions(model),
            "bos": None if bos is None else subject.tokenizer.decode([bos]),
            "shortest_passkey": shortest_prompt(subject.tokenizer, bos),
        }

    def _see_attention(self) -> None:
        """Raise where the passkey could not say what the heads do, before anything is computed."""
        from softpick.analysis.capture import watch_last_query

        model = self.subject.model
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
        try:
            with torch.no_grad(), watch_last_query(model, lambda layer, weights: None):
                model(input_ids=ids, use_cache=False)
        except ValueError as error:
            raise EvaluationError(
                f"model: {self.name}: {error}; without passkeys (--passkey none) it can be run"
            ) from error

    def _passkey_lengths(self, about: dict[str, Any], notes: list[str]) -> tuple[int, ...]:
        lengths, learned = self.settings.passkey, about["learned_positions"]
        chosen = tuple(sorted(LENGTHS if lengths is None else lengths))
        if chosen and chosen[0] < about["shortest_passkey"]:
            if lengths is not None:
                raise EvaluationError(
                    f"passkey: expected at least {about['shortest_passkey']} tokens for {self.name} (the prompt without "
                    f"filler), got {chosen[0]}"
                )
            chosen = tuple(length for length in chosen if length >= about["shortest_passkey"])
        if learned is not None:
            answer = 12  # tokens of an answer, at most
            fits = tuple(length for length in chosen if length + answer <= learned)
            if fits != chosen and lengths is not None:
                raise ModelError(
                    f"passkey: {self.name} has learned embeddings for {learned} positions; expected lengths of at most "
                    f"{learned - answer}, got {chosen[-1]}"
                )
            if fits != chosen:
                notes.append(f"{self.title}: no passkeys beyond its {learned} positions, whose embeddings are learned.")
            chosen = fits
        return chosen

    def _sequence_length(self, about: dict[str, Any]) -> int:
        learned, trained = about["learned_positions"], about["trained_length"]
        if self.length is None:
            return learned if learned is not None else min(_LONGEST, 2 * trained) if trained else _LONGEST
        if learned is not None and self.length > learned:
            raise ModelError(
                f"sequence_length: {self.name} has learned embeddings for {learned} positions; expected at most so many, "
                f"got {self.length}"
            )
        return self.length

    def _task(self, task: str) -> dict[str, float]:
        settings = self.settings
        return run_tasks(
            self.subject.model,
            self.subject.tokenizer,
            [task],
            data_dir=settings.data_dir,
            limit=settings.limit,
            batch_size=settings.batch_size,
            num_fewshot=settings.num_fewshot,
            seed=settings.seed,
            reporter=self.reporter,
        )[task]

    def _passkey(self, length: int) -> dict[str, Any]:
        settings = self.settings
        with self.reporter.progress(f"passkey, {length} tokens", settings.passkey_prompts) as bar:
            return passkey(
                self.subject.model,
                self.subject.tokenizer,
                length,
                count=settings.passkey_prompts,
                seed=settings.seed,
                batch_size=settings.batch_size,
                progress=lambda done: bar.update(done, None),
            )

    def _perplexity(self, length: int) -> dict[str, Any]:
        settings, subject = self.settings, self.subject
        assert self.corpus is not None
        sequences = subject.sequences(self.corpus, settings.samples, length, beyond=True)
        trained = None if subject.room == sys.maxsize else subject.room
        if len(sequences) < settings.samples:
            self.reporter.say(f"the text is enough for {len(sequences)} sequences of {length} tokens")
        with self.reporter.progress(f"perplexity, {length} tokens", len(sequences)) as bar:
            ranges = perplexity_by_position(
                subject.model,
                sequences,
                position_edges(length, settings.bins, trained),
                batch_size=settings.batch_size,
                progress=lambda done: bar.update(done, None),
            )
        end = length if trained is None else trained
        return {
            "length": length,
            "sequences": len(sequences),
            "within": _mean([found for found in ranges if found["to"] < end]),
            "beyond": _mean([found for found in ranges if found["from"] >= end]),
            "ranges": ranges,
        }


def _files(settings: EvaluateSettings, task: str) -> list[Any]:
    if settings.data_dir is None:
        return []
    return stamps(expected_files([task], settings.data_dir, settings.num_fewshot))


def _mean(ranges: Sequence[dict[str, Any]]) -> float | None:
    """Perplexity of several ranges together."""
    tokens = sum(found["tokens"] for found in ranges)
    loss = sum(found["loss"] * found["tokens"] for found in ranges) / tokens if tokens else math.inf
    return math.exp(loss) if loss < 700 else None


def _retrieving(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The heads with the most weight on the key in the shortest prompts, and what they do in each length."""
    if not found:
        return None
    heads = []
    for chosen in retrieving_heads(found[0], _HEADS):
        layer, head = chosen["layer"], chosen["head"]
        by_length = [
            {"length": f["length"]} | {name: rows[layer][head] for name, rows in f["heads"]["answer"].items()}
            for f in found
        ]
        heads.append({"layer": layer, "head": head, "by_length": by_length})
    return {"chosen_at": found[0]["length"], "heads": heads}


def _notes(
    title: str,
    about: dict[str, Any],
    tasks: dict[str, dict[str, float]],
    found: Sequence[dict[str, Any]],
    perplexity: dict[str, Any] | None,
) -> list[str]:
    notes = []
    cut = [f"{task} ({100 * t['contexts_cut']:.1f} %)" for task, t in tasks.items() if t.get("contexts_cut")]
    if cut:
        notes.append(
            f"{title}: contexts that are longer than its {about['trained_length']} positions lost their beginnings: "
            f"{', '.join(cut)}."
        )
    if found and not any(f["correct"] for f in found):
        notes.append(f"{title}: not one passkey was found, so the heads listed as retrieving retrieve nothing.")
    trained = about["trained_length"]
    beyond = [f["length"] for f in found if trained and f["length"] > trained]
    if beyond:
        notes.append(
            f"{title}: passkey prompts of {', '.join(map(str, beyond))} tokens are longer than its {trained} positions."
        )
    if perplexity and any(r["perplexity"] is None for r in perplexity["ranges"]):
        notes.append(f"{title}: some perplexities are not finite numbers (shown as a dash).")
    return notes


def _with_error(numbers: dict[str, float], metric: str, factor: int) -> str | None:
    if metric not in numbers:
        return None
    value, error = factor * numbers[metric], numbers.get(f"{metric}_stderr")
    text = f"{value:.2f}" if factor == 100 else f"{value:.4g}"
    return text if error is None else f"{text} ± {factor * error:.2f}" if factor == 100 else f"{text} ± {error:.2g}"


def _over_lengths(retrieving: dict[str, Any] | None, name: str) -> str | None:
    if retrieving is None:
        return None
    head = retrieving["heads"][0]
    rows = head["by_length"]
    texts = [f"{row[name]:.3f}" for row in rows]
    shown = texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"
    return f"{shown} (L{head['layer']}H{head['head']})"
