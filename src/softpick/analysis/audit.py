"""``softpick analyze``: sinks, outliers, sparsity and dead heads of any transformers model, softmax or not.

:func:`audit` loads a model (and a second one to put beside it), runs text through it once, and returns the report that
``softpick.analysis.write_report`` turns into a page. The metrics are those of docs/metrics.md.
"""

from __future__ import annotations

import hashlib
import inspect
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

from softpick.analysis.settings import KNOCKOUTS, SAMPLE_TEXTS, AuditError, AuditSettings
from softpick.experiment.corpus import get_corpus
from softpick.experiment.environment import chosen_device, command_line, device_line, versions
from softpick.experiment.files import OutputError, writing
from softpick.experiment.models import (
    Subject,
    first_line,
    first_position,
    identity,
    load_subject,
)
from softpick.experiment.parts import Parts
from softpick.experiment.progress import Reporter, Silent
from softpick.experiment.reading import Corpus
from softpick.experiment.resume import Workspace, scratch

if TYPE_CHECKING:
    from softpick.analysis import Measurements

__all__ = ["KNOCKOUTS", "SAMPLE_TEXTS", "AuditError", "AuditSettings", "audit", "forget"]

_PREFIX = "audit"
_SAVE_SECONDS = 30.0  # between two saved states of a long measurement
_LOGIT_ENTRIES = 1 << 27  # vocabulary logits, or eager attention weights, of a forward pass: half a gigabyte in fp32
_CORPUS_CHARACTERS = 2_000_000  # of a corpus that is tokenized for measuring: far more than the samples need


def audit(
    settings: AuditSettings, *, reporter: Reporter | None = None, command: str = "", state: str | Path | None = None
) -> dict[str, Any]:
    """Measure one model or two.

    Args:
        settings: what and on what.
        reporter: told what happens.
        command: as typed, for the report.
        state: folder in which an interrupted audit leaves what it has measured, and from which the same audit goes on: a
            finished model is not measured again, a long measurement continues at most half a minute back. Only files that
            begin with ``audit-`` are written, and :func:`forget` removes them.

    Returns:
        The report, as for ``softpick.analysis.write_report``; a run a model, with ``perplexity`` and ``knockout`` where
        it is causal.

    Raises:
        ModelError: a model that cannot be loaded.
        AuditError: one without visible attention, or impossible settings.
        DataError: the data cannot be used, or are too short.
        OutputError: ``state`` cannot be written, is used by another process, or holds a part that was changed.
        ImportError: transformers is missing.
    """
    settings.check()
    settings = replace(settings, device=chosen_device(settings.device))
    reporter = reporter if reporter is not None else Silent()
    reporter.say(device_line(settings.device))
    with nullcontext() if state is None else Workspace(state):
        return _audit(settings, reporter, command, None if state is None else Path(state))


def _audit(settings: AuditSettings, reporter: Reporter, command: str, state: Path | None) -> dict[str, Any]:
    corpus = get_corpus(settings.data, settings.text_field, _CORPUS_CHARACTERS)
    reporter.say(f"data: {corpus.description}")
    runs: list[dict[str, Any]] = []
    for name in (settings.model, *([settings.against] if settings.against else [])):
        run = _run(name, settings, corpus, reporter, state)
        if any(run["normalizer"] == other["normalizer"] for other in runs):
            run["normalizer"] += " (2)"  # the report would take two models of one normalizer for seeds of one model
        runs.append(run)
    return {
        "title": f"softpick analyze: {' against '.join(run['title'] for run in runs)}",
        "meta": _meta(settings, corpus, command),
        "settings": asdict(settings),
        "notes": [note for run in runs for note in run["notes"]],
        "runs": runs,
    }


def _run(name: str, settings: AuditSettings, corpus: Corpus, reporter: Reporter, state: Path | None) -> dict[str, Any]:
    """One model's part of the report, from ``state`` where it is there."""
    parts = Parts(state, _PREFIX)
    key = _key(name, settings, corpus)
    if parts.has(key):
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
        return _measure(subject, settings, corpus, reporter, parts.file(key, ".pt"))

    return parts.get(key, make)


def forget(state: str | Path) -> None:
    """Remove what audits have left in a folder for going on; nothing else in it."""
    from softpick.analysis.metrics import load_meter

    Parts(state, _PREFIX).forget()
    for file in Path(state).glob(f"{_PREFIX}-{'[0-9a-f]' * 16}.pt"):
        try:
            load_meter(file)
        except Exception:  # whatever a file can hold that is not a meter
            continue
        file.unlink()


def _key(name: str, settings: AuditSettings, corpus: Corpus) -> dict[str, Any]:
    """Of all that the measurements of one model depend on."""
    return {
        "model": identity(name, trust_remote_code=settings.trust_remote_code),
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("model", "against")},
        "documents": hashlib.sha256("\0".join(corpus.documents).encode()).hexdigest(),
        "versions": versions(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def _measure(
    subject: Subject, settings: AuditSettings, corpus: Corpus, reporter: Reporter, file: Path | None
) -> dict[str, Any]:
    from softpick.analysis import attention_maps, encode_maps

    start = time.perf_counter()
    tokens = subject.sequences(corpus, settings.samples, settings.sequence_length)
    batches = tokens.split(settings.batch_size)
    reporter.say(f"{subject.name}: {len(tokens)} sequences of {tokens.shape[1]} tokens")
    measurements = _stream(subject, batches, reporter, file)
    title = subject.title
    samples = []
    with reporter.progress(f"attention maps of {title}", len(settings.texts)) as progress:
        for text in settings.texts:
            room = min(settings.map_tokens, subject.room) - len(subject.wrapped([]))
            row = subject.wrapped(subject.ids(text)[:room])
            maps = attention_maps(subject.model, torch.tensor(row))
            words = [subject.tokenizer.decode([token]) for token in row]
            samples.append({"text_tokens": words, "maps": encode_maps(maps)})
            progress.update(len(samples), None)
    measured = measurements.to_dict()
    run = {
        "normalizer": subject.normalizer,
        "title": title,
        "seed": 0,
        "model": subject.name,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch."),
        "attn_implementation": str(subject.model.config._attn_implementation),
        "measurements": measured,
        "token_text": {str(i): subject.tokenizer.decode([i]) for i in sorted(_named_tokens(measured))},
        "samples": samples,
        "notes": [],
    }
    if subject.causal and not subject.bidirectional:
        perplexity = _perplexity(
            subject, batches, torch.zeros(len(tokens), dtype=torch.long), reporter, f"{title}: perplexity"
        )
        run["perplexity"] = perplexity["all keys"]
        run["validation_loss"] = math.log(perplexity["all keys"]) if perplexity["all keys"] else None
        run["knockout"] = []
        for key in settings.knockout:
            strongest = torch.tensor(measurements.sink["strongest"]["positions"])
            at = strongest if key == "strongest" else torch.full((len(tokens),), 0 if key == "first" else int(key))
            entry = {"key": key} | _perplexity(subject, batches, at, reporter, f"{title} without key: {key}", hide=True)
            run["knockout"].append(entry | {"masked": _most_masked(subject, tokens, at)})
            run["notes"].append(_knockout_note(run["title"], run["knockout"][-1]))
    elif settings.knockout:
        what = "a model that sees the tokens after the next one" if subject.causal else "an encoder"
        run["notes"].append(f"{title}: no knockout, because {what} has no perplexity of a next token.")
    run["seconds"] = time.perf_counter() - start
    return run


def _stream(subject: Subject, batches: Sequence[Tensor], reporter: Reporter, file: Path | None) -> Measurements:
    """All batches through the model, from where ``file`` says that an interrupted measurement stopped."""
    from softpick.analysis import Meter, measure
    from softpick.analysis.metrics import load_meter, save_meter

    bos = subject.model.config.bos_token_id
    opens = subject.causal and bos is not None and all(bool((batch[:, 0] == bos).all()) for batch in batches)
    policy = "bos" if opens else "auto"
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


def _named_tokens(measured: dict[str, Any]) -> set[int]:
    """Every token id that the measurements speak of."""
    hidden = measured["hidden"]
    rows = [
        *measured["sink"]["by_token"],
        *hidden["massive"]["list"],
        *(r for x in hidden["per_layer"] for r in x["top"]),
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


@torch.no_grad()
def _perplexity(
    subject: Subject, batches: Sequence[Tensor], at: Tensor, reporter: Reporter, label: str, hide: bool = False
) -> dict[str, Any]:
    """Perplexity of what comes two tokens or more after position ``at (N,)`` of each sample, with and without its key.

    Masked is the key of that token for every query, positions unchanged. The query of the masked token itself is left out
    of both figures, and so is all before it: there the key was not seen.
    """
    model = subject.model
    device, t = next(model.parameters()).device, batches[0].shape[1]
    # whether positions can be given, so that a masked key shifts none; models without them (ALiBi) do not count keys
    numbered = "position_ids" in inspect.signature(model.forward).parameters
    at_positions = torch.arange(t, device=device) + first_position(model)
    heads = getattr(model.config, "num_attention_heads", 1)
    rows = max(1, _LOGIT_ENTRIES // (t * max(model.config.vocab_size, heads * t)))
    sums = dict.fromkeys(("all keys", "without") if hide else ("all keys",), 0.0)
    tokens = 0
    with reporter.progress(label, len(batches)) as progress:
        for done, (batch, first) in enumerate(zip(batches, at.split([len(b) for b in batches]), strict=True), 1):
            for ids, positions in zip(batch.to(device).split(rows), first.to(device).split(rows), strict=True):
                given = {"position_ids": at_positions.expand_as(ids)} if numbered else {}
                counted = torch.arange(t - 1, device=device) > positions[:, None]  # queries after the masked token
                tokens += int(counted.sum())
                for name in sums:
                    mask = torch.ones_like(ids)
                    if name == "without":
                        mask.scatter_(1, positions[:, None], 0)
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
                    for row, targets, of in zip(logits[:, :-1], ids[:, 1:], counted, strict=True):
                        loss = torch.nn.functional.cross_entropy(row[of].float(), targets[of], reduction="sum")
                        sums[name] += float(loss)
            progress.update(done, None)
    if tokens == 0:
        return dict.fromkeys(sums) | {"change_percent": None, "tokens": 0}
    means = {name: total / tokens for name, total in sums.items()}
    result: dict[str, Any] = {name: math.exp(mean) if mean < 700 else None for name, mean in means.items()}
    if hide:
        change = means["without"] - means["all keys"]
        result["change_percent"] = 100.0 * math.expm1(change) if change < 700 else None
    return result | {"tokens": tokens}


def _knockout_note(title: str, found: dict[str, Any]) -> str:
    masked, key = found["masked"], found["key"]
    which = {"first": "the first token's key", "strongest": "the strongest token's key"}.get(
        key, f"the key at position {key}"
    )
    what = f"{masked['token']!r} in {masked['token_id_share']:.0f} % of the samples"
    if key == "strongest":
        what += f", position {masked['position']} in {masked['position_share']:.0f} %"
    figures = ["beyond fp64" if found[name] is None else f"{found[name]:.4g}" for name in ("all keys", "without")]
    change = "" if found["change_percent"] is None else f" ({found['change_percent']:+.1f} %)"
    return (
        f"{title}: perplexity {figures[0]}, without {which} ({what}) {figures[1]}{change}, of {found['tokens']:,} tokens from "
        "the second after it on."
    )


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
