"""``softpick compare``: models that differ only in the normalizer, trained on the same text and measured.

:func:`compare` does the whole job; everything it needs to know is in :class:`Settings`. A run lives in one folder::

    config.json                 the settings; another run does not enter this folder
    tokenizer/
    softmax-seed0/              a finished model: a transformers checkpoint with its tokenizer, and run.json
    .training/softpick-seed0/   the Trainer's checkpoints of the model that is being trained
    results.json  report.html
    .softpick/                  while it works: the lock, and what is not finished

Finished models are not trained again and a model in training goes on from its last checkpoint, so running the same
settings again continues where it stopped. Nothing that a user had is deleted.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softpick.experiment.corpus import get_corpus, split_documents
from softpick.experiment.environment import command_line, device_line, hardware, versions
from softpick.experiment.files import digest, json_text, read_json, text_digest, write_json, writing
from softpick.experiment.progress import Reporter, Silent
from softpick.experiment.reading import DataError
from softpick.experiment.resume import Workspace
from softpick.normalizers import get_normalizer
from softpick.training.checkpoints import remove_all
from softpick.training.data import SequenceDataset, fingerprint, make_backcopy, make_sequences, train_tokenizer
from softpick.training.settings import TASKS, Settings, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from softpick.experiment.stopping import StopRequest

__all__ = ["TASKS", "Settings", "SettingsError", "compare"]

_FORMAT = "softpick compare 1"
_MEASURED = 512  # validation sequences that are measured, and evaluated during training
_VALIDATED = 2048  # validation sequences of the final loss
_MAPS = 3  # samples with attention maps in the report
_BACKCOPY_SEQUENCES = 50_000
_LARGEST_GAP = 0.03
_FEWEST_SINKS = 5.0


@dataclass(frozen=True)
class _Data:
    train: Tensor
    validation: Tensor
    tokenizer: PreTrainedTokenizerFast
    description: str
    split: str


def compare(
    settings: Settings,
    output: str | Path,
    *,
    fresh: bool = False,
    command: str = "",
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Train, measure, report: ``report.html`` and ``results.json`` in ``output``.

    Args:
        settings: what to compare.
        output: folder of the run; one that holds an unfinished run of the same settings is continued.
        fresh: start anew; a run that is there is renamed, never deleted.
        command: as typed, for the report.
        reporter: gets progress and messages.
        stop: asked during training whether to stop at a checkpoint.

    Returns:
        The report, as for ``softpick.analysis.write_report``.

    Raises:
        SettingsError: ``output`` holds something else, cannot be written, or is used by another process.
        softpick.experiment.files.OutputError: the disk refused while it worked; the run can be continued.
        DataError: the data cannot be used.
        softpick.experiment.stopping.Interrupted: after ``stop`` was requested and the checkpoint written.
        softpick.training.engine.NonFinite: a model's loss is not finite after training.
    """
    settings.check()
    reporter = reporter if reporter is not None else Silent()
    reporter.say(device_line(settings.device))
    output = Path(output)
    if fresh:
        _set_aside(output, reporter)
    with Workspace(output, error=SettingsError, ledger="config.json") as work:
        return _compare(settings, output, work, command, reporter, stop)


def _compare(
    settings: Settings, output: Path, work: Workspace, command: str, reporter: Reporter, stop: StopRequest | None
) -> dict[str, Any]:
    from softpick.analysis import write_report

    _enter(output, settings, work)
    data = _prepare(settings, output, reporter)
    _remember(output, settings, data, work)

    plan = [(seed, name) for seed in settings.seeds for name in settings.normalizers]
    runs = []
    for number, (seed, name) in enumerate(plan, 1):
        title = get_normalizer(name).title
        label = f"[{number}/{len(plan)}] {title}" + (f", seed {seed}" if len(settings.seeds) > 1 else "")
        folder = output / f"{name}-seed{seed}"
        if (folder / "run.json").exists():
            reporter.say(f"{label}: already trained")
            remove_all(output / ".training" / folder.name)
        else:
            _train_one(settings, data, name, seed, work, folder, label, reporter, stop)
        runs.append(read_json(folder / "run.json", SettingsError))

    report = {
        "title": f"softpick compare: {', '.join(get_normalizer(name).title for name in settings.normalizers)}",
        "meta": _meta(settings, data, command),
        "notes": _notes(settings, data, runs),
        "runs": runs,
    }
    with writing(output / "report.html"):
        write_report(work.scratch / "report.html", report)
    report["notes"] = [*report["notes"], *_sink_notes(runs)]  # write_report makes this remark by itself
    bare = [{key: value for key, value in run.items() if key != "samples"} for run in runs]
    write_json(work.scratch / "results.json", {**report, "settings": settings.to_json(), "runs": bare})
    work.finish(["report.html", "results.json"], reporter.say)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def _set_aside(output: Path, reporter: Reporter) -> None:
    """Rename a run that is there."""
    if not output.is_dir() or not any(output.iterdir()):
        return
    with Workspace(output, error=SettingsError, ledger="config.json") as work:
        if not work.entries():
            return
        if _read_config(output) is None:
            raise SettingsError(_NO_RUN.format(output))
        stamp = time.strftime("%Y%m%d-%H%M%S")
        old = output.with_name(f"{output.resolve().name}.old-{stamp}")
        number = 1
        while old.exists():
            number += 1
            old = output.with_name(f"{output.resolve().name}.old-{stamp}-{number}")
        with writing(old):
            output.rename(old)
        work.folder = old
        reporter.say(f"the run that was in {output} is now in {old}")


_NO_RUN = "output: {} is not empty and holds no run of softpick compare; choose another --output"


def _enter(output: Path, settings: Settings, work: Workspace) -> None:
    """Make sure that the folder is new, or holds a run of these settings."""
    config = _read_config(output)
    if config is None:
        if work.entries() <= {".config.json.tmp"}:  # at which version 0.1 was killed
            return
        raise SettingsError(_NO_RUN.format(output))
    now, then = settings.to_json(), config["settings"]
    differences = [f"{key}: {then.get(key)!r} there, {now[key]!r} now" for key in now if now[key] != then.get(key)]
    if differences:
        raise SettingsError(
            f"output: {output} holds a run with other settings ({'; '.join(differences)}); choose another --output, or "
            "--fresh to rename that run and start anew"
        )
    _check_models(output, settings, config, work)


def _check_models(output: Path, settings: Settings, config: dict[str, Any], work: Workspace) -> None:
    """Raise, before any training, where a model's folder is in the way or holds what this run did not write."""
    adopted = {}
    for seed in settings.seeds:
        for name in settings.normalizers:
            folder = output / f"{name}-seed{seed}"
            record = folder / "run.json"
            key = f"{folder.name}/run.json"
            if not os.path.lexists(folder):
                continue
            if not record.is_file():
                raise SettingsError(
                    f"output: {folder} is there, without run.json; move it away, or choose another --output"
                )
            run = read_json(record, SettingsError)
            if "files" not in config:  # version 0.1
                if not isinstance(run, dict) or (run.get("normalizer"), run.get("seed")) != (name, seed):
                    raise SettingsError(f"output: {record} is not of {name}, seed {seed}; move {folder} away")
                adopted[key] = digest(record)
            elif not work.ledger.knows(key, record):
                raise SettingsError(
                    f"output: {record} was changed, or not written by this run; put it back as it was, or move {folder} away"
                )
    if "files" not in config:
        work.ledger.add(adopted)


def _read_config(output: Path) -> dict[str, Any] | None:
    path = output / "config.json"
    if not path.exists():
        return None
    config = read_json(path, SettingsError)
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        return None
    if not isinstance(config.get("settings"), dict) or "data" not in config:
        raise SettingsError(f"output: {path} is not as softpick wrote it; choose another --output")
    return config


def _remember(output: Path, settings: Settings, data: _Data, work: Workspace) -> None:
    """Make the folder this run's, or check that the data are those of the run that is continued."""
    key = fingerprint(data.train, data.validation)
    config = _read_config(output)
    if config is None:
        config = {"format": _FORMAT, "settings": settings.to_json(), "data": key, "files": {}}
        write_json(output / "config.json", config)
    elif config["data"] != key:
        raise SettingsError(
            f"output: the data changed since the run in {output} was started; choose another --output, or --fresh to "
            "rename that run and start anew"
        )
    if not (output / "tokenizer").exists():
        with writing(output / "tokenizer"):
            data.tokenizer.save_pretrained(work.scratch / "tokenizer")
            os.replace(work.scratch / "tokenizer", output / "tokenizer")


# ---------------------------------------------------------------------------------------------------------------------
# The data


def _prepare(settings: Settings, output: Path, reporter: Reporter) -> _Data:
    from transformers import PreTrainedTokenizerFast

    corpus = get_corpus(settings.data, settings.text_field)
    train, validation, split = split_documents(corpus.documents)
    saved = output / "tokenizer"
    if saved.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    else:
        tokenizer = train_tokenizer(train, settings.vocab_size)
    length = settings.sequence_length
    training = make_sequences(tokenizer, train, length, "training data")
    held = make_sequences(tokenizer, validation, length, "validation data")[:_VALIDATED]
    description = corpus.description
    if settings.task == "backcopy":
        chain = make_backcopy(training, len(tokenizer), tokenizer.bos_token_id)
        triggers = ", ".join(repr(tokenizer.decode([token])) for token in chain.triggers)
        training = chain.sample(min(_BACKCOPY_SEQUENCES, settings.steps * settings.batch_size), length, seed=1)
        held = chain.sample(_VALIDATED, length, seed=2)
        description = f"Bigram-Backcopy (triggers {triggers}), bigrams of {corpus.description}"
        split = "training and validation sequences are drawn separately"
    reporter.say(f"data: {description}")
    reporter.say(
        f"      {len(training):,} sequences of {length} tokens, BOS first, vocabulary {len(tokenizer)}; {split}"
    )
    if len(training) < settings.batch_size:
        raise DataError(
            f"data: {len(training)} training sequences of {length} tokens are fewer than one batch of "
            f"{settings.batch_size}; give more text, or a smaller --batch-size or --sequence-length"
        )
    return _Data(training, held, tokenizer, description, split)


# ---------------------------------------------------------------------------------------------------------------------
# One model


def _train_one(
    settings: Settings,
    data: _Data,
    name: str,
    seed: int,
    work: Workspace,
    folder: Path,
    label: str,
    reporter: Reporter,
    stop: StopRequest | None,
) -> None:
    from softpick.training import engine

    model = engine.build_model(
        name,
        vocab_size=len(data.tokenizer),
        layers=settings.layers,
        heads=settings.heads,
        width=settings.width,
        sequence_length=settings.sequence_length,
        seed=seed,
        bos=data.tokenizer.bos_token_id,
        eos=data.tokenizer.eos_token_id,
    )
    working = folder.parent / ".training" / folder.name
    log_every = max(1, min(25, settings.steps // 20))
    arguments = engine.training_arguments(
        working,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=min(settings.warmup_steps, settings.steps),
        weight_decay=settings.weight_decay,
        seed=seed,
        device=settings.device,
        log_every=log_every,
        evaluate_every=max(1, settings.steps // 10),
        save_every=max(1, settings.steps // 5),
    )
    with _threads(settings), reporter.progress(label, settings.steps) as progress:
        outcome = engine.train(
            model,
            arguments,
            SequenceDataset(data.train),
            SequenceDataset(data.validation),
            tokenizer=data.tokenizer,
            evaluation_data=SequenceDataset(data.validation[:_MEASURED]),
            stop=stop,
            progress=progress,
            run=text_digest(json_text([settings.to_json(), fingerprint(data.train, data.validation), name, seed])),
            say=reporter.say,
        )
    if not math.isfinite(outcome.validation_loss):
        raise engine.NonFinite(
            f"{get_normalizer(name).title}, seed {seed}: the validation loss is {outcome.validation_loss}: training failed; a "
            "smaller learning rate or a longer warm-up may help"
        )
    run = {
        "normalizer": name,
        "title": get_normalizer(name).title,
        "seed": seed,
        "validation_loss": outcome.validation_loss,
        "parameters": engine.parameter_count(model),
        "seconds": outcome.seconds,
        "curves": outcome.curves,
        **_measure(model, data),
    }
    temporary = work.scratch / folder.name
    with writing(folder):
        with engine.quiet_transformers():
            model.save_pretrained(temporary)
        data.tokenizer.save_pretrained(temporary)
        write_json(temporary / "run.json", run)
        work.ledger.add({f"{folder.name}/run.json": digest(temporary / "run.json")})
        os.rename(temporary, folder)
    remove_all(working)  # the checkpoints of a model that is finished


@contextmanager
def _threads(settings: Settings) -> Iterator[None]:
    """Set the number of threads that pays for tensors of this size.

    At the default sizes a second thread gains a quarter on an idle machine; on a busy one its waiting at every barrier
    made training ten times slower.
    """
    before = torch.get_num_threads()
    elements = settings.batch_size * settings.sequence_length * settings.width
    torch.set_num_threads(min(before, max(1, elements >> 17)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(model: Any, data: _Data) -> dict[str, Any]:
    from softpick.analysis import attention_maps, encode_maps, measure

    held = data.validation[:_MEASURED]
    measurements = measure(model, ({"input_ids": batch} for batch in held.split(32)), bos_policy="bos")
    samples = [
        {
            "text_tokens": [data.tokenizer.decode([token]) for token in row.tolist()],
            "maps": encode_maps(attention_maps(model, row)),
        }
        for row in held[:_MAPS]
    ]
    return {"measurements": measurements.to_dict(), "samples": samples}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def _meta(settings: Settings, data: _Data, command: str) -> dict[str, Any]:
    shape = {field.name: getattr(settings, field.name) for field in fields(settings)}
    for key in ("task", "normalizers", "seeds", "data", "text_field", "device", "sequence_length"):
        shape.pop(key)
    return {
        "task": settings.task,
        "data": data.description,
        "split": data.split,
        "sequence_length": settings.sequence_length,
        "bos": "every sequence starts with BOS",
        "seeds": ", ".join(map(str, settings.seeds)),
        "settings": ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shape.items()),
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "versions": versions(),
        "hardware": hardware(settings.device),
        "command": command or command_line(),
    }


def _notes(settings: Settings, data: _Data, runs: list[dict[str, Any]]) -> list[str]:
    """What a reader must know: the data, and every loss gap to softmax."""
    notes = [f"Data: {data.description}. Split {data.split}. Every sequence starts with BOS."]
    bases = {run["seed"]: run["validation_loss"] for run in runs if run["normalizer"] == "softmax"}
    for name in settings.normalizers:
        mine = {run["seed"]: run["validation_loss"] for run in runs if run["normalizer"] == name}
        title = get_normalizer(name).title
        broken = [seed for seed, loss in mine.items() if not loss < float("inf")]
        if broken:
            notes.append(
                f"{title}: the loss is not finite at seed {', '.join(map(str, broken))}: training failed there."
            )
        gaps = {seed: loss / bases[seed] - 1 for seed, loss in mine.items() if seed in bases and seed not in broken}
        if name == "softmax" or not gaps:
            continue
        mean = sum(gaps.values()) / len(gaps)
        each = f" (seeds {', '.join(f'{seed}: {gap:+.1%}' for seed, gap in gaps.items())})" if len(gaps) > 1 else ""
        notes.append(f"{title}: validation loss {mean:+.1%} against softmax{each}.")
        worse = [seed for seed, gap in gaps.items() if gap > _LARGEST_GAP]
        if worse:
            notes.append(
                f"{title} is more than {_LARGEST_GAP:.0%} worse than softmax at seed {', '.join(map(str, worse))}: "
                "its other figures come at that price."
            )
    return notes


def _sink_notes(runs: list[dict[str, Any]]) -> list[str]:
    rates = [run["measurements"]["sink"]["first"]["rate"]["0.3"] for run in runs if run["normalizer"] == "softmax"]
    if not rates or sum(rates) / len(rates) >= _FEWEST_SINKS:
        return []
    return [
        f"Softmax itself has hardly any attention sinks here (sink rate {sum(rates) / len(rates):.1f} % at 0.3), so this "
        "comparison says nothing about removing them."
    ]
