"""``softpick analyze``: sinks, outliers, sparsity and dead heads of any transformers model, softmax or not.

:func:`audit` loads a model (and a second one to put beside it), runs text through it once, and returns the report that
``softpick.analysis.write_report`` turns into a page. The metrics are those of docs/metrics.md.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softpick.analysis.capture import Positions, part_positions
from softpick.analysis.kinds import look_closer
from softpick.analysis.knockout import LOGIT_ENTRIES, knockout, knockout_note, perplexity_of
from softpick.analysis.settings import KNOCKOUTS, LONGEST, SAMPLE_TEXTS, AuditError, AuditSettings
from softpick.analysis.trackers import check_trackers
from softpick.analysis.verdict import failed, parse_condition, reference_rows, verdict
from softpick.analysis.watching import parts_of
from softpick.experiment.environment import chosen_device, command_line, device_line, versions
from softpick.experiment.failures import first_line
from softpick.experiment.files import OutputError, writing
from softpick.experiment.models import Subject, check_models, identity, is_gguf, load_config, load_subject
from softpick.experiment.positions import KINDS_OF_TOKENS, stated_positions, what_it_reads
from softpick.experiment.progress import Reporter, Silent
from softpick.experiment.result_cache import ResultCache, titles
from softpick.experiment.resume import Workspace, scratch
from softpick.experiment.samples import Source, joined, size_of

if TYPE_CHECKING:
    from softpick.analysis import Measurements

__all__ = ["KNOCKOUTS", "SAMPLE_TEXTS", "AuditError", "AuditSettings", "audit", "forget"]

_PREFIX = "audit"
_CLOSER = 4  # sequences whose sinks and outliers are looked at more closely
_SAVE_SECONDS = 30.0  # between two saved states of a long measurement
_MAP_ENTRIES = 8_000_000  # weights of the attention maps of one text or image that a report holds


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
    source = Source(settings.data, settings.text_field)
    runs: list[dict[str, Any]] = []
    names = (settings.model, *([settings.against] if settings.against else []))
    check_models(names, settings.device, trust_remote_code=settings.trust_remote_code)
    settings = replace(settings, sequence_length=_length(names, settings))
    settings.check()
    for name, title in zip(names, given or titles(names), strict=True):
        for run in _runs(name, title, settings, source, reporter, state):
            if any(run["normalizer"] == other["normalizer"] for other in runs):
                run["normalizer"] += " (2)"  # the report would take two models of one normalizer for seeds of one model
            if any(run["title"] == other["title"] for other in runs):
                run["title"] += " (2)"
            runs.append(run | {"verdict": verdict(run)})
    report = {
        "title": f"softpick analyze: {' against '.join(dict.fromkeys(run['of'] for run in runs))}",
        "meta": _meta(settings, "; ".join(dict.fromkeys(run["data"] for run in runs)), command),
        "settings": asdict(settings),
        "notes": list(dict.fromkeys(note for run in runs for note in run["notes"])),
        "runs": runs,
    }
    return report | {
        "references": reference_rows(report),
        "failed": failed([parse_condition(text) for text in settings.fail_if], report),
    }


def _length(names: Sequence[str], settings: AuditSettings) -> int:
    """Tokens of a sequence: as asked for, else so many as all models have positions, and no more than the default."""
    if settings.sequence_length is not None:
        return settings.sequence_length
    lengths = [LONGEST]
    for name in names:
        if not is_gguf(name):  # its description takes long to read
            config = load_config(name, trust_remote_code=settings.trust_remote_code, any_kind=True)[0]
            lengths.append(stated_positions(config) or LONGEST)
    return min(lengths)


def _runs(
    name: str, title: str, settings: AuditSettings, source: Source, reporter: Reporter, state: Path | None
) -> list[dict[str, Any]]:
    """One model's part of the report, from ``state`` where it is there: a run, or one for each part of an encoder-decoder."""
    result_cache = ResultCache(state, _PREFIX)
    reads = "text"  # as do all that transformers loads from GGUF, whose description takes long to read
    if not is_gguf(name):
        reads = what_it_reads(load_config(name, trust_remote_code=settings.trust_remote_code, any_kind=True)[0])
    key = _key(name, title, settings, source.identity(reads))
    if result_cache.has(key):
        reporter.say(f"{name}: measured before")

    def make() -> list[dict[str, Any]]:
        subject = load_subject(
            name,
            reporter=reporter,
            device=settings.device,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            visible=True,
            any_kind=True,
        )
        subject = replace(subject, label=title, bos=settings.bos)
        return _measure(subject, settings, source, reporter, result_cache.file(key, ".pt"))

    return result_cache.get(key, make)


def forget(state: str | Path) -> None:
    """Remove what audits have left in a folder for going on; nothing else in it."""
    from softpick.analysis.metrics import load_meters

    ResultCache(state, _PREFIX).forget()
    for file in Path(state).glob(f"{_PREFIX}-{'[0-9a-f]' * 16}.pt"):
        try:
            load_meters(file)
        except Exception:  # whatever a file can hold that is no meters
            continue
        file.unlink()


def _key(name: str, title: str, settings: AuditSettings, data: list[Any]) -> dict[str, Any]:
    """A key made of everything that the measurements of one model depend on."""
    return {
        "model": identity(name, trust_remote_code=settings.trust_remote_code),
        "title": title,  # the notes have it
        "settings": {
            k: v for k, v in asdict(settings).items() if k not in ("model", "against", "fail_if", "report_to", "step")
        },
        "data": hashlib.sha256("\0".join(map(str, data)).encode()).hexdigest(),
        "versions": versions(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def _measure(
    subject: Subject, settings: AuditSettings, source: Source, reporter: Reporter, file: Path | None
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    _check_cost(subject, settings)
    samples = source.samples(subject, settings.samples, settings.length, settings.batch_size)
    reporter.say(f"data: {samples.description}")
    count = sum(map(size_of, samples.batches))
    long = {name: x.shape[1] for name, x in samples.batches[0].items() if name.endswith("input_ids")}
    each = f" of {max(long.values())} tokens" if long else ""
    reporter.say(f"{subject.name}: {count} {'sequences' if subject.reads == 'text' else subject.reads}{each}")
    measurements, rest, loss = _stream(subject, samples.batches, settings, reporter, file)
    few = [
        {name: x[i : i + 1] for name, x in batch.items()} for batch in samples.batches for i in range(size_of(batch))
    ]
    closer = look_closer(subject, few[:_CLOSER])
    notes = [f"{subject.title}: {sentence}." for sentence in rest]
    maps = _maps(subject, settings, few[0], reporter, notes)
    more = _knocked(subject, settings, samples.tokens, measurements, notes, reporter)
    if loss is not None:
        more |= {"validation_loss": loss, "perplexity": perplexity_of(loss)}
    if settings.cost:
        from softpick.analysis.sensitivity import cost

        more["cost"] = cost(subject, joined(few[: settings.cost_samples], settings.batch_size), reporter)
    runs = []
    for part, found in measurements.items():
        measured = found.to_dict()
        runs.append(
            {
                "normalizer": f"{subject.normalizer} ({part})" if part else subject.normalizer,
                "title": f"{subject.title} {part}".rstrip(),
                "of": subject.title,
                "part": part,
                "reads": subject.reads,
                "seed": 0,
                "model": subject.name,
                "data": samples.description,
                "parameters": subject.model.num_parameters(),
                "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch."),
                "quantization": subject.quantization,
                "attn_implementation": str(subject.model.config._attn_implementation),
                "measurements": measured,
                **closer[part],
                "token_text": {
                    str(i): subject.decode([i], part) for i in sorted(_named_tokens(measured, closer[part]))
                },
                "samples": maps[part],
                "notes": notes,
            }
        )
    runs[0] |= more  # of the whole model
    return [run | {"seconds": time.perf_counter() - start} for run in runs]


def _check_cost(subject: Subject, settings: AuditSettings) -> None:
    if settings.cost and subject.quantization:
        raise AuditError(
            f"cost: the weights of {subject.name} are rounded already ({subject.quantization}); what rounding costs is "
            "measured on a model in 16 or 32 bits"
        )


def _maps(
    subject: Subject, settings: AuditSettings, first: dict[str, Tensor], reporter: Reporter, notes: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """The attention maps of the texts, or of the first image, by part of the model."""
    from softpick.analysis import attention_maps, encode_maps

    found: dict[str, list[dict[str, Any]]] = {part: [] for part in parts_of(subject.model)}
    if subject.reads == "sound":
        notes.append(
            f"{subject.title}: no attention maps of sound: they have {subject.model.config.max_source_positions} keys."
        )
        return found
    batches = [first] if subject.reads == "images" else [_text(subject, settings, text) for text in settings.texts]
    with reporter.progress(f"attention maps of {subject.title}", len(batches)) as progress:
        for done, batch in enumerate(batches, 1):
            for part in found:
                maps = attention_maps(subject.model, batch, part=part)
                if maps.numel() > _MAP_ENTRIES:
                    notes.append(f"{subject.title}: no attention maps: they have {maps.numel():,} weights.")
                    break
                queries, keys = part_positions(subject.model, batch, part, *maps.shape[2:])
                sample = {"text_tokens": _words(subject, queries, part), "maps": encode_maps(maps)}
                if part == "cross-attention":
                    sample["key_tokens"] = _words(subject, keys, part)
                found[part].append(sample)
            progress.update(done, None)
    return found


def _text(subject: Subject, settings: AuditSettings, text: str) -> dict[str, Tensor]:
    room = min(settings.map_tokens, subject.room) - len(subject.wrapped([]))
    row = torch.tensor([subject.wrapped(subject.ids(text)[:room])])
    return {"input_ids": row} | ({"decoder_input_ids": subject.shifted(row)} if subject.decodes else {})


def _words(subject: Subject, positions: Positions, part: str) -> list[str]:
    return positions.names or [subject.decode([int(token)], part) for token in positions.ids[0]]


def _knocked(
    subject: Subject,
    settings: AuditSettings,
    tokens: Tensor | None,
    measurements: dict[str, Measurements],
    notes: list[str],
    reporter: Reporter,
) -> dict[str, Any]:
    """Knockouts, where there is a perplexity; ``notes`` gets sentences."""
    title = subject.title
    if tokens is None or subject.bidirectional:
        if settings.knockout:
            what = (
                "a model that sees the tokens after the next one"
                if subject.causal
                else "an encoder-decoder, of which the decoder is given its text,"
                if subject.decodes
                else "a model of images"
                if subject.reads == "images"
                else "an encoder"
            )
            notes.append(f"{title}: no knockout, because {what} has no perplexity of a next token.")
        return {}
    entries = []
    few = tokens[: settings.knockout_samples]
    for key in settings.knockout:
        strongest = torch.tensor(measurements[""].sink["strongest"]["positions"])[: len(few)]
        at = strongest if key == "strongest" else torch.full((len(few),), 0 if key == "first" else int(key))
        label = f"{title} without key: {key}"
        entry = {"key": key} | knockout(subject, few.split(settings.batch_size), at, settings.eviction, reporter, label)
        entries.append(entry | {"samples": len(few), "masked": _most_masked(subject, few, at)})
        notes.append(knockout_note(title, entries[-1]))
    return {"knockout": entries}


def _stream(
    subject: Subject,
    batches: Sequence[dict[str, Tensor]],
    settings: AuditSettings,
    reporter: Reporter,
    file: Path | None,
) -> tuple[dict[str, Measurements], list[str], float | None]:
    """All batches through the model, from where ``file`` says that an interrupted measurement stopped.

    Returns:
        Measurements by part, sentences about layers that were not measured, and the mean loss where there is one.
    """
    from softpick.analysis import Meter, measure_parts
    from softpick.analysis.metrics import load_meters, save_meters

    bos = subject.model.config.get_text_config().bos_token_id if subject.causal else None
    opens = bos is not None and all(bool((batch["input_ids"][:, 0] == bos).all()) for batch in batches)
    predicts = subject.causal and not subject.bidirectional
    if predicts:  # logits of the vocabulary are many
        text = subject.model.config.get_text_config()
        room = LOGIT_ENTRIES // (batches[0]["input_ids"].shape[1] * text.vocab_size)
        batches = joined(batches, max(1, min(settings.batch_size, room)))
    policy = "none" if subject.causal and not settings.bos else "bos" if opens else "auto"
    meters = {part: Meter(policy, _special(subject, part)) for part in parts_of(subject.model)}
    before, rest = 0, list[str]()
    if file is not None and file.is_file():
        try:
            meters, before = load_meters(file)
        except Exception as error:  # whatever a file can hold that is no meters
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
                    save_meters(meters, before + batch, unfinished)
                    os.replace(unfinished, file)
                saved = time.monotonic()

        def without(sentences: list[str]) -> None:
            rest[:] = sentences

        try:
            found = measure_parts(
                subject.model,
                batches[before:],
                bos_policy=policy,
                largest_score=True,
                meters=meters,
                progress=after,
                rest=without,
                losses=predicts,
            )
        except ValueError as error:
            raise AuditError(f"model: {subject.name}: {error}") from error
    return found, rest, meters[""].mean_loss if predicts else None


def _special(subject: Subject, part: str) -> list[int]:
    """Ids of tokens whose figures are listed in any case."""
    if subject.reads != "text" and part != "decoder":
        return list(range(len(KINDS_OF_TOKENS)))
    tokenizer = subject.tokenizer
    special = [tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id]
    return [token for token in special if token is not None]


def _named_tokens(measured: dict[str, Any], closer: dict[str, Any]) -> set[int]:
    """Every token id that the measurements speak of."""
    hidden = measured["hidden"]  # empty of cross-attention
    rows = [
        *measured["sink"]["by_token"],
        *(hidden["massive"]["list"] if hidden else []),
        *(r for x in hidden.get("per_layer", []) for r in x["top"]),
        *closer["sinks"]["heads"],
        *closer["outliers"]["massive"],
    ]
    first = measured["data"]["bos"]["first_token_id"]
    return {row["token_id"] for row in rows} | (set() if first is None else {first})


def _most_masked(subject: Subject, tokens: Tensor, at: Tensor) -> dict[str, Any]:
    """Which token and which position the masked keys are most often, and in what share of the samples (percent)."""
    found = {"token_id": tokens.gather(1, at[:, None])[:, 0], "position": at}
    result: dict[str, Any] = {}
    for name, values in found.items():
        value, count = values.unique(return_counts=True)
        result |= {name: int(value[count.argmax()]), f"{name}_share": 100.0 * int(count.max()) / len(values)}
    return result | {"token": subject.tokenizer.decode([result["token_id"]])}


def _meta(settings: AuditSettings, data: str, command: str) -> dict[str, Any]:
    return {
        "models": ", ".join(filter(None, (settings.model, settings.against))),
        "data": data,
        "sequence_length": settings.sequence_length,
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "versions": versions(),
        "seed": "none: nothing is drawn",
        "device": settings.device,
        "command": command or command_line(),
    }
