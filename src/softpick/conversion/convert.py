"""``softpick convert``: from a pretrained model to one with another normalizer, that can be killed and continued.

A run lives in one folder::

    config.json                  the settings, hashes of the data and of what was written; another run does not enter
    train.tokens                 the text, tokenized
    checkpoints/STAGE/           of the Trainer, while a stage is trained
    align.safetensors, ...       what a finished stage has trained, until the end
    convert-*.json, audit-*      finished measurements, until the end
    model/                       the converted model: a transformers checkpoint with its tokenizer
    report.html, results.json
    .softpick/                   while it works: the lock, and what is not finished

The same command again continues it.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from softpick.analysis import write_report
from softpick.analysis.audit import audit
from softpick.analysis.audit import forget as forget_audit
from softpick.analysis.settings import AuditSettings
from softpick.conversion import extraction, generation, models
from softpick.conversion.ranks import Ranks, check_shared, shard, start
from softpick.conversion.recipes import ConvertError, ConvertSettings
from softpick.conversion.stages import Aligner, Distiller, Penalties, parameter_groups
from softpick.experiment.corpus import get_corpus, split_documents
from softpick.experiment.environment import command_line, device_line, hardware, peak_resident, versions
from softpick.experiment.files import digest, json_text, read_json, text_digest, write_json, write_text, writing
from softpick.experiment.models import Subject, identity
from softpick.experiment.perplexity import perplexity, standard_error
from softpick.experiment.progress import Reporter, Silent
from softpick.experiment.reading import Corpus, read_corpus
from softpick.experiment.result_cache import ResultCache
from softpick.experiment.resume import LAST, Workspace
from softpick.training import checkpoints
from softpick.training.data import SequenceDataset, fingerprint
from softpick.training.sharding import deal, whole_state
from softpick.training.token_files import TokenFile, write_tokens

if TYPE_CHECKING:
    from softpick.experiment.stopping import StopRequest

__all__ = ["convert"]

_FORMAT = "softpick convert 1"
_PREFIX = "convert"
_TOKENS = "train.tokens"
_CHARACTERS = 8  # of text that are tokenized for a token that is trained on
_TITLES = {
    "align": "stage 1, outputs of attention",
    "distil": "stage 2, logits",
    "lengthen": "stage 3, longer sequences",
}


def convert(
    settings: ConvertSettings,
    output: str | Path,
    *,
    command: str = "",
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Convert a model, or continue the conversion of these settings that is in ``output``.

    Args:
        settings: what is converted, and how.
        output: folder of the run.
        command: as typed, for the report.
        reporter: gets progress and messages.
        stop: asked during training whether to stop at a checkpoint.

    Returns:
        What ``results.json`` holds: losses before, between and after the stages, sinks and outliers of both models,
        generation, cost.

    Raises:
        ConvertError: the settings do not fit the model, the folder or the machine.
        ModelError: the model cannot be loaded.
        DataError: the data cannot be used.
        softpick.experiment.stopping.Interrupted: after ``stop`` was requested and the checkpoint written.
        softpick.training.engine.NonFinite: too many steps in a row without a finite gradient.
        softpick.experiment.files.OutputError: the disk refused, or a file of the run was changed.
    """
    settings.check()
    ranks = start(settings)
    reporter = reporter if reporter is not None and ranks.first else Silent()
    reporter.say(device_line(settings.device))
    with ranks.workspace(output) as work:
        return _Run(settings, Path(output), work, ranks, reporter, stop, command or command_line()).result()


@dataclass
class _Text:
    """Text of a run: the file of training tokens, held-out documents and sequences."""

    held: Corpus
    validation: Tensor
    description: str
    key: str


class _Run:
    def __init__(
        self,
        settings: ConvertSettings,
        folder: Path,
        work: Workspace | None,
        ranks: Ranks,
        reporter: Reporter,
        stop: StopRequest | None,
        command: str,
    ) -> None:
        self.settings, self.ranks, self.reporter, self.stop, self.command = settings, ranks, reporter, stop, command
        self.folder, self._owned = folder, work
        self.result_cache = ResultCache(self.folder, _PREFIX)
        self.config = ranks.share(self._read_config)

    @property
    def work(self) -> Workspace:
        """The folder; the first rank's alone."""
        assert self._owned is not None, "only the first rank writes"
        return self._owned

    def _known(self, name: str) -> bool:
        """Whether this run wrote a file that is there, unchanged."""
        path = self.folder / name
        return self.ranks.share(lambda: path.exists() and self.work.ledger.knows(name, path))

    # ------------------------------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """Everything, from what is there on."""
        if self._known(LAST):
            self.reporter.say(f"{self.folder}: already converted")
            self.ranks.share(self._tidy)
            return read_json(self.folder / LAST, ConvertError)
        settings = self.settings
        subject = models.load_teacher(settings, self.reporter, "cpu" if self.ranks.sharded else settings.device)
        text = self._text(subject)
        layers = models.attention_layers(subject.model)
        student = models.make_student(subject.model, layers, settings.normalizer)
        self.reporter.say(f"{subject.name}: {len(layers)} attention layers get {settings.normalizer}")
        if self.ranks.sharded:
            models.own_weights(subject.model, student, settings, shrink=False)
            shard(subject.model, student, layers, settings.device)
        losses = {
            "teacher": self._loss("teacher", subject.model, text),
            "swapped": self._loss("swapped", student, text),
        }
        stages: dict[str, Any] = {}
        owned = self.ranks.sharded
        for number, stage in enumerate(settings.stages):
            if stage != "align" and not owned:
                models.own_weights(subject.model, student, settings)
                owned = True
            stages[stage] = self._stage(number, stage, subject, student, layers, text)
            losses[stage] = self._loss(stage, student, text)
            self.reporter.say(f"held-out loss: {', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}")
        self._save(student, subject)
        written = self._generation(subject, student, text) if settings.prompts else None
        extracted = self._extraction(subject, student, text) if settings.extraction else None
        del student, subject
        judged = {"generation": written, "extraction": extracted}
        return self.ranks.share(lambda: self._report(text, losses, stages, judged))

    def _save(self, student: Any, subject: Subject) -> None:
        """Put the converted model into the folder."""
        if self._known("model"):
            return
        dtype = models.saved_dtype(self.settings)
        state = models.saved_state(student, dtype)

        def save() -> None:
            with writing(self.folder / "model"):
                models.save_student(student, state, subject, self.work.scratch / "model", dtype)
            self.work.finish(["model"])

        self.ranks.share(save)

    # ------------------------------------------------------------------------------------------------------------------
    # The folder and the text

    def _read_config(self) -> dict[str, Any] | None:
        path = self.folder / "config.json"
        if not path.exists():
            if self.work.entries():
                raise ConvertError(
                    f"output: {self.folder} is not empty and holds no run of softpick convert; choose another --output"
                )
            return None
        config = read_json(path, ConvertError)
        if not isinstance(config, dict) or config.get("format") != _FORMAT or "settings" not in config:
            raise ConvertError(f"output: {path} is not of softpick convert; choose another --output")
        now, then = self.settings.to_json(), config["settings"]
        differences = [f"{key}: {then.get(key)!r} there, {now[key]!r} now" for key in now if now[key] != then.get(key)]
        if differences:
            raise ConvertError(
                f"output: {self.folder} holds a run with other settings ({'; '.join(differences)}); choose another --output"
            )
        return config

    def _text(self, subject: Subject) -> _Text:
        settings = self.settings
        if subject.tokenizer.eos_token_id is None:
            raise ConvertError(f"model: the tokenizer of {subject.name} has no EOS token, which ends a document")
        corpus = get_corpus(settings.data, settings.text_field)
        if settings.validation_data is None:
            train, held, split = split_documents(corpus.documents)
            other = Corpus(tuple(held), f"held out of it, {split}")
        else:
            train, other = list(corpus.documents), read_corpus(settings.validation_data, settings.text_field)
        description = f"{corpus.description}; validation: {other.description}"
        self.reporter.say(f"data: {description}")
        length = settings.distil_sequence_length if settings.distil_steps else settings.align_sequence_length
        validation = subject.sequences(other, settings.validation_sequences, length)
        if len(validation) % (settings.micro_batch_size * self.ranks.count) and self.ranks.count > 1:
            raise ConvertError(
                f"validation_sequences: the held-out text has {len(validation)}; expected a multiple of micro_batch_size x "
                f"ranks = {settings.micro_batch_size} x {self.ranks.count}"
            )
        key = self.ranks.share(lambda: self._tokenized(subject, train, validation))
        return _Text(other, validation, description, key)

    def _tokenized(self, subject: Subject, train: list[str], validation: Tensor) -> str:
        """Write the training tokens; the key of all data, which must be that of the folder."""
        settings = self.settings
        tokens, staged = self.folder / _TOKENS, self.work.scratch / _TOKENS
        if not tokens.exists() or not self.work.ledger.knows(_TOKENS, tokens):
            documents = self._shuffled(train)
            write_tokens(staged, subject.tokenizer, documents, self.reporter, "tokenizing", len(documents))
        made = digest(staged if staged.exists() else tokens)
        key = text_digest(
            json.dumps(
                [made, fingerprint(validation), identity(settings.model, trust_remote_code=settings.trust_remote_code)]
            )
        )
        if self.config is None:
            config = {"format": _FORMAT, "settings": settings.to_json(), "data": key, "files": {}}
            write_json(self.folder / "config.json", config)
        elif self.config["data"] != key:
            raise ConvertError(
                f"output: the model or the data changed since the run in {self.folder} was started; choose another --output"
            )
        if staged.exists():
            self.work.finish([_TOKENS])  # refuses where the file in its place was changed
        return key

    def _shuffled(self, documents: list[str]) -> list[str]:
        """Documents in a random order, as many as the longest stage needs."""
        settings = self.settings
        needed = _CHARACTERS * max(
            math.prod(getattr(settings, f"{stage}_{what}") for what in ("steps", "batch_size", "sequence_length"))
            for stage in settings.stages
        )
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        chosen: list[str] = []
        total = 0
        for index in order:
            if total >= needed:
                break
            chosen.append(documents[index])
            total += len(documents[index])
        return chosen

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def _stage(
        self, number: int, stage: str, subject: Subject, student: Any, layers: list[str], text: _Text
    ) -> dict[str, Any]:
        """Train one stage, or load what it has trained before; returns its record."""
        name = f"{stage}.safetensors"
        penalties = Penalties(self.settings, student, layers, activations=stage != "align")
        module: Any
        if stage == "align":
            module = Aligner(subject.model, student, layers, penalties)
        else:
            judge = None if stage == "lengthen" else subject.model
            module = Distiller(judge, student, penalties, self.settings.gradient_checkpointing)
        file = self.folder / name
        key = [text.key, "stage", stage]
        folder = self.folder / "checkpoints" / stage
        if self._known(name) and self.ranks.share(lambda: self.result_cache.has(key)):
            self.reporter.say(f"{_TITLES[stage]}: already trained")
            deal(module, safetensors.torch.load_file(file))
            record = self.ranks.share(lambda: self.result_cache.get(key, dict))
        else:
            made = self._train(number, stage, module, folder, subject, layers, text)
            weights = whole_state(module)

            def keep() -> dict[str, Any]:
                with writing(file):
                    safetensors.torch.save_file(weights, self.work.scratch / name)
                self.work.finish([name])
                return self.result_cache.get(key, lambda: made)

            record = self.ranks.share(keep)
        self.ranks.share(lambda: checkpoints.remove_all(folder))
        student.eval()
        return record

    def _train(
        self, number: int, stage: str, module: Any, folder: Path, subject: Subject, layers: list[str], text: _Text
    ) -> dict[str, Any]:
        from softpick.training import engine

        settings = self.settings
        steps, batch, length, rate = (
            getattr(settings, f"{stage}_{what}") for what in ("steps", "batch_size", "sequence_length", "learning_rate")
        )
        log_every = max(1, min(10, settings.save_every, steps))
        arguments = engine.training_arguments(
            folder,
            steps=steps,
            batch_size=settings.micro_batch_size,
            per_device_eval_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=batch // settings.micro_batch_size // self.ranks.count,
            learning_rate=rate,
            lr_scheduler_kwargs={"min_lr_rate": settings.final_rate},
            warmup_steps=min(settings.warmup_steps, steps),
            weight_decay=0.0,
            seed=settings.seed + number,
            device=settings.device.partition(":")[0],
            log_every=log_every,
            save_every=settings.save_every,
            bf16=settings.dtype == "bfloat16",
            optim=settings.optimizer,
            ddp_backend="gloo" if self.ranks.count > 1 and settings.device == "cpu" else None,
        )
        if self.ranks.sharded:
            check_shared("student", ((n, p) for n, p in module.named_parameters() if p.requires_grad))
        before = time.process_time()
        with self.reporter.progress(_TITLES[stage], steps) as progress:
            outcome = engine.train(
                module,
                arguments,
                _Rows(self.folder / _TOKENS, length, subject),
                SequenceDataset(text.validation[:, : length if stage != "lengthen" else None]),
                stop=self.stop,
                progress=progress,
                guard=engine.Guard(10),
                groups=parameter_groups(settings, stage, layers),
                run=text_digest(json_text([settings.to_json(), text.key, stage])),
                say=self.reporter.say,
            )
        record = {
            "title": _TITLES[stage],
            "tokens": steps * batch * length,
            "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "validation_loss": outcome.validation_loss,
            "curves": outcome.curves,
            "seconds": outcome.seconds,
            # of this session alone: a run that was killed took more
            "processor_seconds": time.process_time() - before,
            "threads": torch.get_num_threads(),
            "peak_memory_gib": peak_memory(settings.device),
        }
        if stage == "align":
            record["layers"] = _layer_errors(module, text.validation[:4], layers)
        return record

    # ------------------------------------------------------------------------------------------------------------------
    # Measuring

    def _loss(self, name: str, model: Any, text: _Text) -> float:
        """Next-token loss (nats) of the held-out sequences."""

        def make() -> float:
            with self.reporter.progress(f"held-out loss, {name}", len(text.validation)) as progress:
                found = perplexity(model, text.validation, batch_size=4, progress=lambda n: progress.update(n, None))
            return math.log(found)

        return self.ranks.cached(self.result_cache, [text.key, "loss", name], make)

    def _generation(self, subject: Subject, student: Any, text: _Text) -> dict[str, Any]:
        settings = self.settings
        prompts = generation.cut_prompts(text.validation, settings.prompts, settings.prompt_tokens)
        texts: dict[str, Tensor] = {}
        for name, model in (("teacher", subject.model), ("student", student)):

            def make(name: str = name, model: Any = model) -> list[list[int]]:
                self.reporter.say(f"{name}: continues {len(prompts)} prompts by {settings.continuation_tokens} tokens")
                return generation.continuations(model, prompts, settings.continuation_tokens).tolist()

            rows = self.ranks.cached(self.result_cache, [text.key, "continuations", name, len(prompts)], make)
            texts[name] = torch.tensor(rows)
        found: dict[str, Any] = {
            "prompts": len(prompts),
            "prompt_tokens": prompts.shape[1],
            "continuation_tokens": settings.continuation_tokens,
            "agreement_percent": generation.agreement(texts["student"], texts["teacher"]),
        }
        likely = {name: generation.likelihood(subject.model, prompts, ids) for name, ids in texts.items()}
        change = likely["student"] - likely["teacher"]
        found["difference"] = {
            "teacher_log_probability": float(change.mean()),
            "standard_error": standard_error(change),
        }
        for name, ids in texts.items():
            found[name] = {
                "teacher_log_probability": float(likely[name].mean()),
                "standard_error": standard_error(likely[name]),
                "repeated_4grams_percent": generation.repetition(ids),
                "examples": subject.tokenizer.batch_decode(ids[:3]),
            }
        return found

    def _extraction(self, subject: Subject, student: Any, text: _Text) -> dict[str, Any]:
        settings = self.settings
        documents = text.held.documents
        cases = extraction.make_cases(subject, documents, settings.extraction, settings.extraction_tokens)
        if not cases:
            return {"cases": 0}
        key = text_digest(json_text([[case.prompt, case.bare, case.answer] for case in cases]))
        texts: dict[str, list[str]] = {}
        for name, model in (("teacher", subject.model), ("student", student), ("without_passage", subject.model)):

            def make(name: str = name, model: Any = model) -> list[str]:
                self.reporter.say(f"extraction, {name}: {len(cases)} cases")
                return extraction.answers(subject, model, cases, bare=name == "without_passage")

            texts[name] = self.ranks.cached(self.result_cache, [text.key, "extraction", name, key], make)
        return extraction.score(cases, texts)

    def _analysis(self, text: _Text, titles: tuple[str, str]) -> dict[str, Any]:
        """What `softpick analyze` says of both models, side by side."""
        settings, file = self.settings, self.work.scratch / "held-out.jsonl"
        write_text(file, "".join(json.dumps({"text": document}) + "\n" for document in text.held.documents))
        asked = AuditSettings(
            model=settings.model,
            against=str(self.folder / "model"),
            data=str(file),
            samples=settings.samples,
            sequence_length=max(4, text.validation.shape[1]),
            batch_size=4,
            device=settings.device,
            dtype="float32",
            trust_remote_code=settings.trust_remote_code,
        )
        return audit(asked, reporter=self.reporter, command=self.command, state=self.folder, titles=titles)

    # ------------------------------------------------------------------------------------------------------------------

    def _report(
        self, text: _Text, losses: dict[str, float], stages: dict[str, Any], judged: dict[str, Any]
    ) -> dict[str, Any]:
        settings = self.settings
        name = Path(settings.model).name
        titles = (name, f"{name}, {settings.normalizer}")
        if settings.samples:
            report = self._analysis(text, titles)
        else:
            report = {
                "runs": [{"normalizer": t, "title": t, "seed": settings.seed} for t in titles],
                "notes": [],
                "meta": {},
            }
        for run, loss in zip(report["runs"], (losses["teacher"], losses[settings.stages[-1]]), strict=True):
            run["validation_loss"] = loss
        report["runs"][1] |= {
            "model": "model",
            "curves": stages[settings.stages[-1]]["curves"],
        }
        report["title"] = f"softpick convert: {name} to {settings.normalizer}"
        report["meta"] |= {
            "models": f"{settings.model}, and what it became",
            "data": text.description,
            "created": time.strftime("%Y-%m-%d %H:%M"),
            "versions": versions("accelerate"),
            "hardware": hardware(settings.device) + (f", {self.ranks.count} ranks" if self.ranks.sharded else ""),
            "seed": settings.seed,
            "command": self.command,
        }
        report["notes"] = [*_notes(losses, judged), *report["notes"]]
        cost = _cost(stages)
        results = report | {
            "cost": cost,
            "settings": settings.to_json(),
            "losses": losses,
            "stages": stages,
            **judged,
            "ranks": self.ranks.count,
            "peak_memory_gib": peak_memory(settings.device),
        }
        with writing(self.folder / "report.html"):
            write_report(self.work.scratch / "report.html", report | {"notes": [*report["notes"], *cost]})
        bare = [{key: value for key, value in run.items() if key != "samples"} for run in report["runs"]]
        results["runs"] = bare
        write_json(self.work.scratch / LAST, results)
        self.work.finish(["report.html", LAST])
        self._tidy()
        return results

    def _tidy(self) -> None:
        """Remove what was kept for going on."""
        self.result_cache.forget()
        forget_audit(self.folder)
        for name in (*(f"{stage}.safetensors" for stage in _TITLES), _TOKENS):
            file = self.folder / name
            if file.exists() and self.work.ledger.knows(name, file):
                file.unlink()
        for stage in _TITLES:
            checkpoints.remove_all(self.folder / "checkpoints" / stage)
        with suppress(OSError):
            (self.folder / "checkpoints").rmdir()


class _Rows(torch.utils.data.Dataset[Tensor]):
    """Training sequences: the token that opens each of the model's texts, if there is one, and tokens of the file."""

    def __init__(self, path: Path, length: int, subject: Subject) -> None:
        self.bare = subject.opening is None
        opening = 0 if subject.opening is None else subject.opening
        self.file = TokenFile(path, length + self.bare, len(subject.tokenizer), opening)

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.file.__getitems__(indices)[:, int(self.bare) :]


def peak_memory(device: str) -> float:
    """GiB: of the GPU's memory what was allocated at most, else of the process what was resident at most."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(peak_resident() / 2**30, 2)


@torch.no_grad()
def _layer_errors(module: Aligner, rows: Tensor, layers: list[str]) -> dict[str, float]:
    """Each layer's term of stage 1 on held-out sequences."""
    module(rows.to(next(module.parameters()).device))
    return {name: float(error) for name, error in zip(layers, module.errors, strict=True)}


def _cost(stages: dict[str, Any]) -> list[str]:
    """What each stage took, in sentences."""
    return [
        f"{stage['title']}: {stage['tokens']:,} tokens, {stage['trained'] / 1e6:.1f} million parameters trained, "
        f"{stage['seconds']:.0f} s ({stage['processor_seconds']:.0f} processor seconds of the last session, "
        f"{stage['threads']} threads), at most {stage['peak_memory_gib']:.1f} GiB."
        for stage in stages.values()
    ]


def _notes(losses: dict[str, float], judged: dict[str, Any]) -> list[str]:
    """Figures of a conversion in sentences."""
    written, extracted = judged["generation"], judged["extraction"]
    words = {"align": "after stage 1", "distil": "after stage 2", "lengthen": "after stage 3"}
    parts = ", ".join(f"{words.get(name, name)} {loss:.4f}" for name, loss in losses.items())
    notes = [f"Held-out loss (nats a token): {parts}."]
    if written is not None:
        ours, theirs, change = written["student"], written["teacher"], written["difference"]
        error = "unknown" if change["standard_error"] is None else f"{change['standard_error']:.4f}"
        notes += [
            f"Greedy continuations of {written['prompts']} prompts: the teacher gives a token of the student's "
            f"{ours['teacher_log_probability']:.4f} nats, of its own {theirs['teacher_log_probability']:.4f} (difference "
            f"{change['teacher_log_probability']:.4f}, standard error {error}); repeated 4-grams "
            f"{ours['repeated_4grams_percent']:.1f} % ({theirs['repeated_4grams_percent']:.1f} %).",
            f"{written['agreement_percent']:.0f} % of the teacher's text stands before the first difference.",
        ]
    if extracted is not None:
        notes.append(_extraction_note(extracted))
    return notes


def _extraction_note(found: dict[str, Any]) -> str:
    if not found["cases"]:
        return "Extraction: no case could be made from the held-out text."

    def share(name: str) -> str:
        return f"{found[name]['accuracy_percent']:.1f} % (standard error {found[name]['standard_error_percent']:.1f})"

    return (
        f"Extraction, {found['cases']} cases: the student writes the word that it has read in {share('student')}, the "
        f"teacher in {share('teacher')}; without the passage the teacher writes it in {share('without_passage')}. "
        f"Student minus teacher: {found['difference']['accuracy_percent']:+.1f} % (standard error "
        f"{found['difference']['standard_error_percent']:.1f})."
    )
