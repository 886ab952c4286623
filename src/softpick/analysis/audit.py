"""``softpick analyze``: sinks, outliers, sparsity and dead heads of any transformers model, softmax or not.

:func:`audit` loads a model (and a second one to put beside it), runs text through it once, and returns the report that
``softpick.analysis.write_report`` turns into a page. The metrics are those of docs/metrics.md.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softpick.analysis.knockout import knockout, knockout_note, perplexity
from softpick.analysis.settings import KNOCKOUTS, SAMPLE_TEXTS, AuditError, AuditSettings
from softpick.analysis.trackers import check_trackers
from softpick.analysis.verdict import failed, parse_condition, reference_rows, verdict
from softpick.experiment.corpus import get_corpus
from softpick.experiment.environment import chosen_device, command_line, device_line, versions
from softpick.experiment.failures import first_line
from softpick.experiment.files import OutputError, writing
from softpick.experiment.models import (
    Subject,
    identity,
    load_subject,
)
from softpick.experiment.progress import Reporter, Silent
from softpick.experiment.reading import Corpus
from softpick.experiment.result_cache import ResultCache, titles
from softpick.experiment.resume import Workspace, scratch

if TYPE_CHECKING:
    from softpick.analysis import Measurements

__all__ = ["KNOCKOUTS", "SAMPLE_TEXTS", "AuditError", "AuditSettings", "audit", "forget"]

_PREFIX = "audit"
_CLOSER = 4  # sequences whose sinks and outliers are looked at more closely
_SAVE_SECONDS = 30.0  # between two saved states of a long measurement
_CORPUS_CHARACTERS = 2_000_000  # of a corpus that is tokenized for measuring: far more than the samples need


def audit(
    settings: AuditSettings,
    *,
    reporter: Reporter | None = None,
    command: str = "",
    state: str | Path | None = None,
    titles: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure one model or two.

    Args:
        settings: what and on what.
        reporter: shows what happens.
        command: as typed, for the report.
        state: folder in which an interrupted audit leaves what it has measured, and from which the same audit goes on: a
            finished model is not measured again, a long measurement continues at most half a minute back. Only files that
            begin with ``audit-`` are written, and :func:`forget` removes them.
        titles: of the models; by default as much of the end of each name as tells them apart.

    Returns:
        The report, as for ``softpick.analysis.write_report``; a run a model, with ``perplexity`` and ``knockout`` where
        it is causal.

    Raises:
        ModelError: a model that cannot be loaded.
        AuditError: one without visible attention, or impossible settings.
        DataError: the data cannot be used, or are too short.
        OutputError: ``state`` cannot be written, is used by another process, or holds a result that was changed.
        ImportError: transformers is missing.
    """
    settings.check()
    check_trackers(settings.report_to)
    settings = replace(settings, device=chosen_device(settings.device))
    reporter = reporter if reporter is not None else Silent()
    reporter.say(device_line(settings.device))
    with nullcontext() if state is None else Workspace(state):
        return _audit(settings, reporter, command, None if state is None else Path(state), titles)


def _audit(
    settings: AuditSettings, reporter: Reporter, command: str, state: Path | None, given: Sequence[str] | None
) -> dict[str, Any]:
    corpus = get_corpus(settings.data, settings.text_field, _CORPUS_CHARACTERS)
    reporter.say(f"data: {corpus.description}")
    runs: list[dict[str, Any]] = []
    names = (settings.model, *([settings.against] if settings.against else []))
    for name, title in zip(names, given or titles(names), strict=True):
        run = _run(name, title, settings, corpus, reporter, state)
        if any(run["normalizer"] == other["normalizer"] for other in runs):
            run["normalizer"] += " (2)"  # the report would take two models of one normalizer for seeds of one model
        if any(run["title"] == other["title"] for other in runs):
            run["title"] += " (2)"
        runs.append(run | {"verdict": verdict(run)})
    report = {
        "title": f"softpick analyze: {' against '.join(run['title'] for run in runs)}",
        "meta": _meta(settings, corpus, command),
        "settings": asdict(settings),
        "notes": [note for run in runs for note in run["notes"]],
        "runs": runs,
    }
    return report | {
        "references": reference_rows(report),
        "failed": failed([parse_condition(text) for text in settings.fail_if], report),
    }


def _run(
    name: str, title: str, settings: AuditSettings, corpus: Corpus, reporter: Reporter, state: Path | None
) -> dict[str, Any]:
    """One model's part of the report, from ``state`` where it is there."""
    result_cache = ResultCache(state, _PREFIX)
    key = _key(name, title, settings, corpus)
    if result_cache.has(key):
        reporter.say(f"{name}: measured before")

    def make() -> dict[str, Any]:
        subject = load_subject(
            name,
            reporter=reporter,
            device=settings.device,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            visible=True,
        )
        subject = replace(subject, label=title, bos=settings.bos)
        return _measure(subject, settings, corpus, reporter, result_cache.file(key, ".pt"))

    return result_cache.get(key, make)


def forget(state: str | Path) -> None:
    """Remove what audits have left in a folder for going on; nothing else in it."""
    from softpick.analysis.metrics import load_meter

    ResultCache(state, _PREFIX).forget()
    for file in Path(state).glob(f"{_PREFIX}-{'[0-9a-f]' * 16}.pt"):
        try:
            load_meter(file)
        except Exception:  # whatever a file can hold that is not a meter
            continue
        file.unlink()


def _key(name: str, title: str, settings: AuditSettings, corpus: Corpus) -> dict[str, Any]:
    """A key made of everything that the measurements of one model depend on."""
    return {
        "model": identity(name, trust_remote_code=settings.trust_remote_code),
        "title": title,  # the notes have it
        "settings": {
            k: v for k, v in asdict(settings).items() if k not in ("model", "against", "fail_if", "report_to", "step")
        },
        "documents": hashlib.sha256("\0".join(corpus.documents).encode()).hexdigest(),
        "versions": versions(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def _measure(
    subject: Subject, settings: AuditSettings, corpus: Corpus, reporter: Reporter, file: Path | None
) -> dict[str, Any]:
    from softpick.analysis.kinds import look_closer

    start = time.perf_counter()
    tokens = subject.sequences(corpus, settings.samples, settings.sequence_length)
    batches = tokens.split(settings.batch_size)
    reporter.say(f"{subject.name}: {len(tokens)} sequences of {tokens.shape[1]} tokens")
    measurements = _stream(subject, batches, settings, reporter, file)
    measured = measurements.to_dict()
    closer = look_closer(subject, tokens[:_CLOSER].split(1))
    run = {
        "normalizer": subject.normalizer,
        "title": subject.title,
        "seed": 0,
        "model": subject.name,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch."),
        "attn_implementation": str(subject.model.config._attn_implementation),
        "measurements": measured,
        **closer,
        "token_text": {str(i): subject.tokenizer.decode([i]) for i in sorted(_named_tokens(measured, closer))},
        "samples": _maps(subject, settings, reporter),
        "notes": [],
    }
    run |= _knocked(subject, settings, tokens, measured, run["notes"], reporter)
    if settings.cost:
        from softpick.analysis.sensitivity import cost

        run["cost"] = cost(subject, tokens[: settings.cost_samples].split(settings.batch_size), reporter)
    return run | {"seconds": time.perf_counter() - start}


def _maps(subject: Subject, settings: AuditSettings, reporter: Reporter) -> list[dict[str, Any]]:
    """The attention maps of the texts."""
    from softpick.analysis import attention_maps, encode_maps

    samples = []
    with reporter.progress(f"attention maps of {subject.title}", len(settings.texts)) as progress:
        for text in settings.texts:
            room = min(settings.map_tokens, subject.room) - len(subject.wrapped([]))
            row = subject.wrapped(subject.ids(text)[:room])
            maps = attention_maps(subject.model, torch.tensor(row))
            words = [subject.tokenizer.decode([token]) for token in row]
            samples.append({"text_tokens": words, "maps": encode_maps(maps)})
            progress.update(len(samples), None)
    return samples


def _knocked(
    subject: Subject,
    settings: AuditSettings,
    tokens: Tensor,
    measured: dict[str, Any],
    notes: list[str],
    reporter: Reporter,
) -> dict[str, Any]:
    """Perplexity and knockouts, where there is a perplexity; ``notes`` gets sentences."""
    title = subject.title
    if not subject.causal or subject.bidirectional:
        if settings.knockout:
            what = "a model that sees the tokens after the next one" if subject.causal else "an encoder"
            notes.append(f"{title}: no knockout, because {what} has no perplexity of a next token.")
        return {}
    found = perplexity(subject, tokens.split(settings.batch_size), reporter, f"{title}: perplexity")
    entries = []
    few = tokens[: settings.knockout_samples]
    for key in settings.knockout:
        strongest = torch.tensor(measured["sink"]["strongest"]["positions"])[: len(few)]
        at = strongest if key == "strongest" else torch.full((len(few),), 0 if key == "first" else int(key))
        label = f"{title} without key: {key}"
        entry = {"key": key} | knockout(subject, few.split(settings.batch_size), at, settings.eviction, reporter, label)
        entries.append(entry | {"samples": len(few), "masked": _most_masked(subject, few, at)})
        notes.append(knockout_note(title, entries[-1]))
    return {"perplexity": found, "validation_loss": math.log(found) if found else None, "knockout": entries}


def _stream(
    subject: Subject, batches: Sequence[Tensor], settings: AuditSettings, reporter: Reporter, file: Path | None
) -> Measurements:
    """All batches through the model, from where ``file`` says that an interrupted measurement stopped."""
    from softpick.analysis import Meter, measure
    from softpick.analysis.metrics import load_meter, save_meter

    bos = subject.model.config.bos_token_id
    opens = subject.causal and bos is not None and all(bool((batch[:, 0] == bos).all()) for batch in batches)
    policy = "none" if subject.causal and not settings.bos else "bos" if opens else "auto"
    tokenizer = subject.tokenizer
    special = [tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id]
    meter, before = Meter(policy, [t for t in special if t is not None]), 0
    if file is not None and file.is_file():
        try:
            meter, before = load_meter(file)
        except Exception as error:  # whatever a file can hold that is not a meter
            raise OutputError(
                f"output: {file} is not what softpick wrote ({first_line(error)}); remove it, or choose another --output"
            ) from error
        reporter.say(f"{subject.name}: going on after batch {before} of {len(batches)}")
    saved = time.monotonic()
    with reporter.progress(f"measuring {subject.title}", len(batches)) as progress:

        def after(batch: int) -> None:
            nonlocal saved
            progress.update(before + batch, None)
            if file is not None and time.monotonic() - saved > _SAVE_SECONDS:
                unfinished = scratch(file.parent) / file.name
                with writing(file):
                    save_meter(meter, before + batch, unfinished)
                    os.replace(unfinished, file)
                saved = time.monotonic()

        try:
            return measure(
                subject.model,
                ({"input_ids": batch} for batch in batches[before:]),
                bos_policy=policy,
                largest_score=True,
                meter=meter,
                progress=after,
            )
        except ValueError as error:
            raise AuditError(f"model: {subject.name}: {error}") from error


def _named_tokens(measured: dict[str, Any], closer: dict[str, Any]) -> set[int]:
    """Every token id that the measurements speak of."""
    hidden = measured["hidden"]
    rows = [
        *measured["sink"]["by_token"],
        *hidden["massive"]["list"],
        *(r for x in hidden["per_layer"] for r in x["top"]),
        *closer["sinks"]["heads"],
        *closer["outliers"]["massive"],
    ]
    return {row["token_id"] for row in rows}


def _most_masked(subject: Subject, tokens: Tensor, at: Tensor) -> dict[str, Any]:
    """Which token and which position the masked keys are most often, and in what share of the samples (percent)."""
    found = {"token_id": tokens.gather(1, at[:, None])[:, 0], "position": at}
    result: dict[str, Any] = {}
    for name, values in found.items():
        value, count = values.unique(return_counts=True)
        result |= {name: int(value[count.argmax()]), f"{name}_share": 100.0 * int(count.max()) / len(values)}
    return result | {"token": subject.tokenizer.decode([result["token_id"]])}


def _meta(settings: AuditSettings, corpus: Corpus, command: str) -> dict[str, Any]:
    return {
        "models": ", ".join(filter(None, (settings.model, settings.against))),
        "data": corpus.description,
        "sequence_length": settings.sequence_length,
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "versions": versions(),
        "seed": "none: nothing is drawn",
        "device": settings.device,
        "command": command or command_line(),
    }
