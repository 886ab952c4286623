"""``softpick quantize``: what quantization costs, softmax and softpick side by side.

:func:`quantize` evaluates each model as it is, then once for every way of rounding it: weights by the quantizers of
:data:`softpick.quantization.methods.METHODS`, activations and the key-value cache simulated. Every quantized model is checked
before it is evaluated: that its weights changed, by how much, and that they have no more levels than their bits allow.
Definitions: docs/metrics.md; how to run it: docs/quantization.md.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softpick.evaluation.tasks import HEADLINES, EvaluationError, expected_files, run_tasks
from softpick.experiment.corpus import get_corpus, split_documents
from softpick.experiment.environment import chosen_device, command_line, device_line, hardware, versions
from softpick.experiment.figures import as_cell
from softpick.experiment.files import writing
from softpick.experiment.models import Subject, check_models, identity, is_gguf, load_subject, saved_positions
from softpick.experiment.perplexity import perplexity
from softpick.experiment.progress import Reporter, Silent, Titled
from softpick.experiment.reading import Corpus
from softpick.experiment.result_cache import ResultCache, stamps, titles
from softpick.experiment.resume import Ledger, Workspace, scratch
from softpick.experiment.rounding import quantized_activations, quantized_cache
from softpick.quantization.apply import Job
from softpick.quantization.apply import check as check_weights
from softpick.quantization.apply import quantize as quantize_weights
from softpick.quantization.methods import METHODS, distributions, fitting_group, grouping
from softpick.quantization.plots import figure_of
from softpick.quantization.settings import QuantizeSettings
from softpick.quantization.verify import QuantizationError, linear_layers, quiet_libraries

__all__ = ["QuantizeSettings", "cells", "columns", "forget", "markdown", "quantize", "summary_rows", "weight_rows"]

_CORPUS_CHARACTERS = 4_000_000
_PREFIX = "quantize"


@dataclass(frozen=True)
class Cell:
    """One way of rounding a model."""

    kind: str  # weights, activations, kv_cache; none is the model as it is
    method: str
    bits: int

    @property
    def title(self) -> str:
        """For people."""
        if self.kind == "weights":
            return f"{METHODS[self.method].title} {self.bits} bits"
        if self.kind == "activations":
            name, _, granularity = self.method.partition("-")
            return f"W+A {name}, one scale per {granularity}"
        if self.kind == "kv_cache":
            return f"KV cache {'fp' if self.method == 'e4m3' else 'int'}{self.bits}"
        return "unquantized"


def cells(settings: QuantizeSettings) -> list[Cell]:
    """The grid: the model as it is, then every way of rounding it, in the order of the table."""
    found = [Cell("none", "none", 0)]
    for name in settings.methods:
        found += [Cell("weights", name, bits) for bits in settings.bits_of(name)]
    found += [Cell("activations", name, int("".join(filter(str.isdigit, name)))) for name in settings.activations]
    integers = sorted(bits for bits in settings.kv_cache if isinstance(bits, int))
    found += [Cell("kv_cache", "minmax", bits) for bits in integers]
    return found + [Cell("kv_cache", "e4m3", 8)] * ("fp8" in settings.kv_cache)


def quantize(
    settings: QuantizeSettings,
    output: str | Path,
    *,
    reporter: Reporter | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Evaluate models as they are and quantized.

    Args:
        settings: what, how and on what.
        output: folder in which finished cells are left (files that begin with ``quantize-``), from which the same call goes
            on, and which :func:`forget` cleans; also what the quantizers print (``*.log``) and, if kept, their models.
        reporter: gets progress and messages.
        command: as typed, for the report.

    Returns:
        ``title``, ``meta``, ``settings``, ``notes`` and ``runs``, one a model, each with its ``cells``; as
        docs/quantization.md lays it out.

    Raises:
        EvaluationError: impossible settings, missing files of a task, a kept model that is there already.
        QuantizationError: a library cannot take this model, or nothing was quantized.
        ModelError: an encoder, a model that cannot be loaded, or has no room for so many positions.
        DataError: the data cannot be used, or are shorter than a sequence.
        OutputError: ``output`` cannot be written, is used by another process, or holds a result that was changed.
        ImportError: a package is missing; the message names the extra.
    """
    settings.check()
    settings = replace(settings, device=chosen_device(settings.device))
    reporter = reporter if reporter is not None else Silent()
    reporter.say(device_line(settings.device))
    with Workspace(output):
        return _quantize(settings, Path(output), reporter, command)


def _quantize(settings: QuantizeSettings, output: Path, reporter: Reporter, command: str) -> dict[str, Any]:
    trust = settings.trust_remote_code
    check_models(settings.models, settings.device, trust_remote_code=trust, decoder=True)
    corpus = get_corpus(settings.data, settings.text_field, _CORPUS_CHARACTERS)
    reporter.say(f"data: {corpus.description}")
    calibration, held, split = split_documents(corpus.documents)
    texts = tuple(Corpus(tuple(documents), corpus.description) for documents in (calibration, held))
    length = settings.sequence_length or min(
        2048, *(saved_positions(name, trust_remote_code=settings.trust_remote_code) or 2048 for name in settings.models)
    )
    result_cache = ResultCache(output, _PREFIX)
    with quiet_libraries():
        runs = [
            _Run(name, title, settings, texts, length, output, result_cache, reporter).run()
            for name, title in zip(settings.models, titles(settings.models), strict=True)
        ]
    return {
        "title": f"softpick quantize: {' against '.join(run['title'] for run in runs)}",
        "meta": {
            "models": ", ".join(settings.models),
            "tasks_from": "none" if not settings.tasks else settings.data_dir or "the Hugging Face hub",
            "data": f"{corpus.description}; {split}",
            "created": time.strftime("%Y-%m-%d %H:%M"),
            "quantizers": ", ".join(f"{METHODS[m].title} ({METHODS[m].citation})" for m in settings.methods) or "none",
            "versions": versions(*distributions(), "lm_eval"),
            "seed": settings.seed,
            "device": settings.device,
            "hardware": hardware(settings.device),
            "threads": torch.get_num_threads(),
            "command": command or command_line(),
        },
        "settings": asdict(settings),
        "notes": [*_common_notes(runs), *(note for run in runs for note in run["notes"])],
        "runs": runs,
    }


def _common_notes(runs: list[dict[str, Any]]) -> list[str]:
    first = runs[0]
    notes = [
        f"Perplexity of {first['sequences']} sequences of {first['sequence_length']} tokens; calibration on "
        f"{first['calibration_sequences']}."
    ]
    if len({run["vocabulary"] for run in runs}) > 1:
        notes.append("The models have different vocabularies: their perplexities cannot be compared with each other.")
    return notes


def _vocabulary(model: Any) -> list[Any]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in ends if module is not None]


def forget(output: str | Path) -> None:
    """Remove what :func:`quantize` has left for going on; nothing else."""
    with Workspace(output) as work:
        ResultCache(output, _PREFIX).forget()
        work.ledger.path.unlink(missing_ok=True)


class _Run:
    """One model, through all cells. The model is loaded when a cell that is not kept yet needs it."""

    def __init__(
        self,
        name: str,
        title: str,
        settings: QuantizeSettings,
        texts: tuple[Corpus, ...],
        length: int,
        output: Path,
        result_cache: ResultCache,
        reporter: Reporter,
    ) -> None:
        self.name, self.title, self.settings, self.texts, self.length = name, title, settings, texts, length
        self.output, self.result_cache, self.reporter = output, result_cache, reporter
        self._loaded: Subject | None = None
        self._sequences: tuple[Tensor, Tensor] | None = None
        self._key = [
            identity(name, trust_remote_code=settings.trust_remote_code),
            length,
            [hashlib.sha256("\0".join(text.documents).encode()).hexdigest() for text in texts],
            stamps(self._files()),
            {k: v for k, v in asdict(settings).items() if k not in (*_NOT_OF_A_CELL, "trust_remote_code")},
            versions(*distributions(), "lm_eval"),
        ]

    def _files(self) -> list[Path]:
        settings = self.settings
        return (
            list(expected_files(settings.tasks, settings.data_dir, None))
            if settings.tasks and settings.data_dir
            else []
        )

    def run(self) -> dict[str, Any]:
        start = time.perf_counter()
        about = self.result_cache.get([self._key, "about"], self._about)
        before = self.result_cache.again
        plan = cells(self.settings)
        self._check_methods([cell for cell in plan if not self.result_cache.has(self._cell_key(cell))])
        found: list[dict[str, Any]] = []
        with self.reporter.progress(f"{self.title}: ways of rounding", len(plan)) as bar:
            for cell in plan:
                value = self.result_cache.get(self._cell_key(cell), functools.partial(self._cell, cell))
                found.append(asdict(cell) | {"title": cell.title} | value)
                bar.update(len(found), None, f"{cell.title}: perplexity {_short(value['perplexity'])}")
        if self.result_cache.again > before:
            self.reporter.say(f"{self.title}: {self.result_cache.again - before} cells were there from before")
        self._loaded = None  # before the next one is loaded
        return about | {
            "title": self.title,
            "cells": found,
            "notes": _notes(self.title, about, found),
            "seconds": time.perf_counter() - start,
        }

    def _cell_key(self, cell: Cell) -> list[Any]:
        return [self._key, asdict(cell), self.settings.keep]

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
                decoder=True,
            )
            # transformers unpacks a GGUF file, and says nevertheless that it is quantized
            packed = getattr(self._loaded.model.config, "quantization_config", None) is not None
            if packed and not is_gguf(self.name):
                raise EvaluationError(f"model: {self.name} is quantized already; expected the model before that")
        return self._loaded

    def _about(self) -> dict[str, Any]:
        subject, (calibration, held) = self.subject, self.sequences
        parameters = sum(p.numel() for p in subject.model.parameters())
        # embeddings and the vocabulary's projection, once where they are tied
        ends = {id(module.weight): module.weight.numel() for module in _vocabulary(subject.model)}
        inner = sum(m.weight.numel() for m in linear_layers(subject.model).values() if id(m.weight) not in ends)
        return {
            "model": self.name,
            "normalizer": subject.normalizer,
            "parameters": parameters,
            "vocabulary": len(subject.tokenizer),
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "group_size": self.settings.group_size or fitting_group(subject.model),
            "linear_share": inner / max(1, parameters - sum(ends.values())),
            "sequence_length": self.length,
            "sequences": len(held),
            "calibration_sequences": len(calibration),
        }

    def _check_methods(self, plan: Sequence[Cell]) -> None:
        """Raise at once what a library cannot take, and not after the cells before it."""
        for cell in plan:
            if cell.kind == "weights":
                try:
                    check_weights(cell.method, self._job(cell, self._paths(cell)[1]))
                except QuantizationError as error:
                    raise QuantizationError(f"{self.title}, {cell.title}: {error}") from error

    def _job(self, cell: Cell, folder: Path) -> Job:
        group = self.settings.group_size or fitting_group(self.subject.model)
        trusted = self.settings.trust_remote_code
        return Job(self.subject, cell.bits, group, self.sequences[0], folder, self.reporter, trusted)

    def _paths(self, cell: Cell) -> tuple[Path, Path]:
        """Where a quantized model is kept, and where it is made."""
        name = f"{self.title.replace('/', '-')}-{cell.method}-{cell.bits}bit"
        kept = self.output / name
        if self.settings.keep and kept.exists() and not self._ledger.knows(name, kept):
            raise EvaluationError(f"output: {kept} is there already; choose another --output")
        return kept, scratch(self.output) / f"{name}.making"

    @property
    def _ledger(self) -> Ledger:
        with Workspace(self.output) as work:
            return work.ledger

    @property
    def sequences(self) -> tuple[Tensor, Tensor]:
        """Sequences for calibration, and sequences for the perplexity."""
        if self._sequences is None:
            settings, subject = self.settings, self.subject
            calibration, held = self.texts
            self._sequences = (
                subject.sequences(calibration, settings.calibration_samples, self.length),
                subject.sequences(held, settings.samples, self.length),
            )
        return self._sequences

    def _cell(self, cell: Cell) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            with self._rounded(cell) as (subject, extra):
                # what a task says of its texts is the same for every way of rounding
                reporter = Titled(self.reporter, f"{self.title}, {cell.title}", says=cell.kind == "none")
                result = self._evaluate(subject, reporter)
                result |= {name: value() if callable(value) else value for name, value in extra.items()}
        except QuantizationError as error:
            raise QuantizationError(f"{self.title}, {cell.title}: {error}") from error
        return result | {"seconds": time.perf_counter() - start}

    @contextmanager
    def _rounded(self, cell: Cell) -> Iterator[tuple[Subject, dict[str, Any | Callable[[], Any]]]]:
        """The model rounded in the way of a cell, and what the report adds (functions are called after the evaluation)."""
        calibration, _ = self.sequences
        subject, batches = self.subject, calibration.split(self.settings.batch_size)
        if cell.kind == "weights":
            with self._folder(cell) as folder:
                made = quantize_weights(cell.method, self._job(cell, folder))
                yield made.subject, {"weights": made.verification.to_dict()}
        elif cell.kind == "activations":
            name, _, granularity = cell.method.partition("-")
            with quantized_activations(subject.model, name, granularity, batches) as activations:
                yield subject, {"activation_errors": activations.relative}
        elif cell.kind == "kv_cache":
            with quantized_cache(subject.model, "fp8" if cell.method == "e4m3" else cell.bits) as cache:
                yield subject, {"cache_errors": lambda: [layer.relative() for layer in cache]}
        else:
            yield subject, {}

    @contextmanager
    def _folder(self, cell: Cell) -> Iterator[Path]:
        """A new folder for a quantized model, which stays if the models are kept."""
        kept, working = self._paths(cell)
        with Workspace(self.output) as work:
            try:
                yield working
                if self.settings.keep:
                    with writing(kept):
                        self.subject.tokenizer.save_pretrained(working)
                        os.replace(working, work.scratch / kept.name)
                    work.finish([kept.name])
            finally:
                log = working.with_suffix(".log")
                if log.exists():
                    self._keep_log(log, f"{kept.name}.log", work)
                shutil.rmtree(working, ignore_errors=True)

    def _keep_log(self, log: Path, name: str, work: Workspace) -> None:
        """What a quantizer printed goes to the output folder, under another name where the user has a file of this one."""
        number, stem = 1, name.removesuffix(".log")
        while os.path.lexists(self.output / name) and not work.ledger.knows(name, self.output / name):
            number += 1
            name = f"{stem}-{number}.log"
        if log.name != name:
            os.replace(log, work.scratch / name)
        work.finish([name])

    def _evaluate(self, subject: Subject, reporter: Reporter) -> dict[str, Any]:
        settings = self.settings
        _, held = self.sequences
        measured = perplexity(subject.model, held, batch_size=settings.batch_size)
        result: dict[str, Any] = {"perplexity": measured if math.isfinite(measured) else None}
        result["tasks"] = (
            run_tasks(
                subject.model,
                subject.tokenizer,
                settings.tasks,
                data_dir=settings.data_dir,
                limit=settings.limit,
                batch_size=settings.batch_size,
                seed=settings.seed,
                reporter=reporter,
            )
            if settings.tasks
            else {}
        )
        return result


# which cells there are does not change what one of them gives
_NOT_OF_A_CELL = (
    "model",
    "against",
    "methods",
    "bits",
    "activations",
    "kv_cache",
    "keep",
    "data",
    "data_dir",
    "trust_remote_code",
)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def columns(report: dict[str, Any]) -> list[str]:
    """Headings: the models, and where there are two the second minus the first."""
    found = [run["title"] for run in report["runs"]]
    return [*found, "Δ"] if len(found) == 2 else found


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """The table: task and metric, way of rounding, one text a column of :func:`columns`.

    As in the paper's tables 7 to 9; behind each figure the change from the unquantized model.
    """
    runs = report["runs"]
    rows: list[tuple[str, str, list[str]]] = []
    tasks = report["settings"]["tasks"]
    metrics: list[tuple[str, str | None, str, int]] = [("perplexity", None, "perplexity (down)", 1)]
    for task in tasks:
        for metric in HEADLINES[task]:
            percent = metric.startswith("acc")
            label = f"{task} {metric} {'(%, up)' if percent else '(down)'}"
            metrics.append((task, metric, label, 100 if percent else 1))
    for task, name, label, factor in metrics:
        for index, cell in enumerate(runs[0]["cells"]):
            values = [figure_of(run["cells"][index], task, name) for run in runs]
            bases = [figure_of(run["cells"][0], task, name) for run in runs]
            texts = [_with_change(v, b, factor, index > 0) for v, b in zip(values, bases, strict=True)]
            if len(runs) == 2:
                first, second = values
                texts.append("–" if first is None or second is None else f"{second - first:+.{_digits(factor)}g}")
            rows.append((label, cell["title"], texts))
    return rows


def _short(value: float | None) -> str:
    return "beyond numbers" if value is None else f"{value:.4g}"


def _digits(factor: int) -> int:
    return 3 if factor == 1 else 4


def _with_change(value: float | None, base: float | None, factor: int, quantized: bool) -> str:
    if value is None:
        return "–"
    text = f"{value:.2f}" if factor == 100 else f"{value:.4g}"
    if not quantized or not base:
        return text
    # points of an accuracy, percent of a perplexity
    return f"{text} ({value - base:+.2f})" if factor == 100 else f"{text} ({100 * (value / base - 1):+.2f} %)"


def weight_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows for every way of quantizing weights: share of the parameters, weight error, bits on disk, by model."""
    rows = []
    for index, cell in enumerate(report["runs"][0]["cells"]):
        if cell["kind"] == "weights":
            texts = []
            for run in report["runs"]:
                w = run["cells"][index]["weights"]
                texts.append(
                    f"{100 * w['share']:.1f} % of parameters, error {w['error']:.4f}, {w['bits_per_weight']:.2f} bits"
                )
            rows.append((cell["title"], texts))
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The tables as Markdown."""
    titles = [as_cell(title) for title in columns(report)]
    lines = [f"# {as_cell(report['title'])}", "", "| | |" + "".join(f" {title} |" for title in titles)]
    lines.append("|---|---|" + "---|" * len(titles))
    lines += [f"| {metric} | {how} | {' | '.join(values)} |" for metric, how, values in summary_rows(report)]
    weights = weight_rows(report)
    if weights:
        names = [as_cell(run["title"]) for run in report["runs"]]
        lines += ["", "| weights |" + "".join(f" {name} |" for name in names), "|---|" + "---|" * len(names)]
        lines += [f"| {how} | {' | '.join(texts)} |" for how, texts in weights]
    lines += ["", *(f"- {as_cell(note)}" for note in report["notes"]), ""]
    lines += [f"- {key.replace('_', ' ')}: {as_cell(str(value))}" for key, value in report["meta"].items()]
    return "\n".join(lines) + "\n"


def _notes(title: str, about: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    notes = []
    if about["linear_share"] < 0.9:
        notes.append(
            f"{title}: only {100 * about['linear_share']:.1f} % of the parameters besides the vocabulary's are in linear "
            "layers; the others (experts that are one tensor, say) are in no way rounded."
        )
    if about["group_size"] < 64 and any(cell["kind"] == "weights" and cell["method"] in grouping() for cell in found):
        notes.append(
            f"{title}: groups of {about['group_size']} weights share a scale. Without --group-size it is 64, or the largest "
            "power of two that divides the inputs of every layer; smaller groups have more scales to store."
        )
    for cell in found:
        if cell["kind"] == "kv_cache":
            layers = cell["cache_errors"]
            worst = max(range(len(layers)), key=lambda i: layers[i]["output"])
            mean = {name: sum(layer[name] for layer in layers) / len(layers) for name in ("key", "value", "output")}
            notes.append(
                f"{title}, {cell['title']}: relative error of keys {mean['key']:.4f}, values {mean['value']:.4f}, attention "
                f"outputs {mean['output']:.4f} (mean of layers; largest {layers[worst]['output']:.4f} in layer {worst})."
            )
        if cell["kind"] == "activations":
            errors = cell["activation_errors"]
            worst = max(errors, key=lambda name: errors[name])
            mean_error = sum(errors.values()) / len(errors)
            notes.append(
                f"{title}, {cell['title']}: relative error of inputs {mean_error:.4f} (mean of matrices), largest "
                f"{errors[worst]:.4f} in {worst}."
            )
    return notes
