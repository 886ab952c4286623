"""``softpick analyze``: sinks, outliers, sparsity and dead heads of any transformers model, softmax or not.

:func:`audit` loads a model (and a second one to put beside it), runs text through it once, and returns the report that
``softpick.analysis.write_report`` turns into a page. The metrics are those of docs/metrics.md.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softpick.progress import Reporter, Silent
from softpick.training.data import Corpus, DataError, read_corpus, standard_library

__all__ = ["SAMPLE_TEXTS", "AuditError", "AuditSettings", "audit"]

SAMPLE_TEXTS = (
    "The lighthouse keeper wrote one line in his book every night. On the last night of the year he wrote two, and in the "
    "morning nobody could say which of them had been meant for the sea.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n\n"
    "print(mean([1.0, 2.0, 4.0]))\n",
    "Question: A train leaves at 9:40 and arrives at 11:05. How long does the journey take?\nAnswer: One hour and "
    "twenty-five minutes.\nQuestion: And if it is ten minutes late?\nAnswer:",
)
"""What the attention maps of the report show unless other texts are given: prose, code, a dialogue."""

_CORPUS_CHARACTERS = 2_000_000  # of a corpus that is tokenized for measuring: far more than the samples need
_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AuditError(ValueError):
    """The model or the settings cannot be audited; the message says why."""


@dataclass(frozen=True)
class AuditSettings:
    """What is audited, and on what.

    Attributes:
        model: a hub name, a local directory, or a GGUF file.
        against: a second one, put beside it.
        data: text, JSONL or parquet file or a directory of them; None is the Python standard library of this machine.
        text_field: of JSONL and parquet files.
        texts: what the attention maps show.
        samples: sequences that are measured.
        sequence_length: tokens a sequence, BOS (or [CLS] and [SEP]) included.
        batch_size: sequences a forward pass.
        map_tokens: at most this many tokens of a text, special ones included, in an attention map.
        knockout: also measure the perplexity without the first token's key (causal models).
        device: where the model runs.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
    """

    model: str
    against: str | None = None
    data: str | None = None
    text_field: str = "text"
    texts: tuple[str, ...] = SAMPLE_TEXTS
    samples: int = 64
    sequence_length: int = 256
    batch_size: int = 8
    map_tokens: int = 64
    knockout: bool = True
    device: str = "cpu"
    dtype: str = "auto"

    def check(self) -> None:
        """Raise :class:`AuditError` for values that cannot work."""
        for name, least in (("samples", 1), ("sequence_length", 4), ("batch_size", 1), ("map_tokens", 4)):
            value = getattr(self, name)
            if value < least:
                raise AuditError(f"{name}: expected at least {least}, got {value}")
        if self.dtype not in _DTYPES:
            raise AuditError(f"dtype: expected one of {', '.join(_DTYPES)}; got {self.dtype!r}")
        if not self.texts or not all(text.strip() for text in self.texts):
            raise AuditError("texts: expected at least one text, none of them empty")


@dataclass(frozen=True)
class _Subject:
    name: str
    model: Any
    tokenizer: Any
    causal: bool


def audit(settings: AuditSettings, *, reporter: Reporter | None = None, command: str = "") -> dict[str, Any]:
    """Measure one model or two.

    Args:
        settings: what and on what.
        reporter: told what happens.
        command: as typed, for the report.

    Returns:
        The report, as for ``softpick.analysis.write_report``; a run a model, with ``perplexity`` where it is causal.

    Raises:
        AuditError: a model that cannot be loaded or has no visible attention, or impossible settings.
        DataError: the data cannot be used, or are too short.
    """
    settings.check()
    reporter = reporter if reporter is not None else Silent()
    corpus = (
        standard_library(_CORPUS_CHARACTERS)
        if settings.data is None
        else read_corpus(settings.data, settings.text_field, _CORPUS_CHARACTERS)
    )
    runs: list[dict[str, Any]] = []
    for name in (settings.model, *([settings.against] if settings.against else [])):
        subject = _load(name, settings)
        run = _measure(subject, settings, corpus, reporter)
        if any(run["normalizer"] == other["normalizer"] for other in runs):
            run["normalizer"] += " (2)"  # the report would take two models of one normalizer for seeds of one model
        runs.append(run)
        del subject
    return {
        "title": f"softpick analyze: {' against '.join(run['title'] for run in runs)}",
        "meta": _meta(settings, corpus, command),
        "notes": [note for run in runs for note in _knockout_notes(run)],
        "runs": runs,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The model


def _load(name: str, settings: AuditSettings) -> _Subject:
    from softpick.integrations.transformers import register

    register()  # softpick's models and attention functions
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    path = Path(name)
    where: dict[str, Any] = {}
    source = name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AuditError(f"model: there is no file {name}")
        source, where = str(path.parent), {"gguf_file": path.name}
    elif not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise AuditError(f"model: there is no directory or file {name}")
    elif path.exists() and not (path / "config.json").is_file():
        raise AuditError(
            f"model: {name} has no config.json; expected a directory that transformers saved, or a GGUF file"
        )
    try:
        config = AutoConfig.from_pretrained(source, **where)
    except Exception as error:  # whatever a hub or a file can do wrong; transformers' own words say it best
        raise AuditError(f"model: cannot load {name}: {_first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise AuditError(f"model: {name} is an encoder-decoder ({config.model_type}); expected a decoder or an encoder")
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and (
        kind not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except Exception as error:
        raise AuditError(f"model: {name} has no tokenizer that transformers can load: {_first_line(error)}") from error
    loader = AutoModelForCausalLM if causal else AutoModel
    try:
        model = loader.from_pretrained(source, dtype=_DTYPES[settings.dtype], **where)
        if str(model.config._attn_implementation).startswith(("flash", "flex", "paged", "kernels")):
            model.set_attn_implementation("sdpa")  # those show no weights
    except Exception as error:
        raise AuditError(f"model: cannot load {name}: {_first_line(error)}") from error
    return _Subject(name, model.to(settings.device).eval(), tokenizer, causal)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# The data


def _ids(subject: _Subject, text: str) -> list[int]:
    return subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _opening(subject: _Subject) -> int | None:
    """The token that every sample of a causal model starts with, if it has one."""
    bos = subject.tokenizer.bos_token_id
    return subject.model.config.bos_token_id if bos is None and subject.causal else bos


def _wrapped(subject: _Subject, ids: Sequence[int]) -> list[int]:
    """With BOS before it, or an encoder's special tokens around it."""
    if not subject.causal:
        cls, sep = subject.tokenizer.cls_token_id, subject.tokenizer.sep_token_id
        return [*([] if cls is None else [cls]), *ids, *([] if sep is None else [sep])]
    bos = _opening(subject)
    return list(ids) if bos is None else [bos, *ids]


def _sequences(subject: _Subject, settings: AuditSettings, corpus: Corpus) -> Tensor:
    """``(samples, T)``: documents joined by EOS (causal) and cut into pieces, each with its special tokens."""
    length = settings.sequence_length
    longest = getattr(subject.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < length:
        raise AuditError(f"sequence_length: {subject.name} has room for {longest} positions, got {length}")
    piece = length - len(_wrapped(subject, []))
    eos = subject.tokenizer.eos_token_id if subject.causal else None
    stream: list[int] = []
    for document in corpus.documents:
        stream += _ids(subject, document)
        if eos is not None:
            stream.append(eos)
        if len(stream) >= piece * settings.samples:
            break
    count = min(settings.samples, len(stream) // piece)
    if count == 0:
        raise DataError(
            f"data: {len(stream)} tokens are too few for one sequence of {length}; give more text or a smaller "
            "--sequence-length"
        )
    return torch.tensor([_wrapped(subject, stream[i * piece : (i + 1) * piece]) for i in range(count)])


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def _measure(subject: _Subject, settings: AuditSettings, corpus: Corpus, reporter: Reporter) -> dict[str, Any]:
    from softpick.analysis import attention_maps, encode_maps, measure
    from softpick.integrations.transformers import normalizer_of

    start = time.perf_counter()
    tokens = _sequences(subject, settings, corpus)
    batches = tokens.split(settings.batch_size)
    bos = subject.model.config.bos_token_id
    opens = subject.causal and bos is not None and bool((tokens[:, 0] == bos).all())
    label = f"measuring {Path(subject.name).name}"
    reporter.say(f"{subject.name}: {len(tokens)} sequences of {tokens.shape[1]} tokens")
    with reporter.progress(label, len(batches)) as progress:
        try:
            measurements = measure(
                subject.model,
                ({"input_ids": batch} for batch in batches),
                bos_policy="bos" if opens else "auto",
                largest_score=True,
                progress=lambda done: progress.update(done, None),
            )
        except ValueError as error:
            raise AuditError(f"model: {subject.name}: {error}") from error
    samples = []
    for text in settings.texts:
        row = _wrapped(subject, _ids(subject, text)[: settings.map_tokens - len(_wrapped(subject, []))])
        maps = attention_maps(subject.model, torch.tensor(row))
        samples.append({"text_tokens": [subject.tokenizer.decode([token]) for token in row], "maps": encode_maps(maps)})
    try:
        normalizer = normalizer_of(subject.model)
    except (TypeError, ValueError):
        normalizer = str(subject.model.config._attn_implementation)
    run = {
        "normalizer": normalizer,
        "title": Path(subject.name).name or subject.name,
        "seed": 0,
        "model": subject.name,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "dtype": str(next(subject.model.parameters()).dtype).removeprefix("torch."),
        "attn_implementation": str(subject.model.config._attn_implementation),
        "measurements": measurements.to_dict(),
        "samples": samples,
    }
    if subject.causal:
        run["perplexity"] = {"all keys": _perplexity(subject, batches, hide_first=False)}
        run["validation_loss"] = math.log(run["perplexity"]["all keys"])
        if settings.knockout:
            run["perplexity"]["without the first key"] = _perplexity(subject, batches, hide_first=True)
    run["seconds"] = time.perf_counter() - start
    return run


@torch.no_grad()
def _perplexity(subject: _Subject, batches: Sequence[Tensor], hide_first: bool) -> float:
    """Perplexity of the tokens from the third on, in both cases the same ones.

    ``hide_first`` masks the key of the first token for every query, positions unchanged: what a sink is for shows in what
    the model loses without it.
    """
    total, count = 0.0, 0
    for batch in batches:
        ids = batch.to(next(subject.model.parameters()).device)
        mask = torch.ones_like(ids)
        if hide_first:
            mask[:, 0] = 0
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        logits = subject.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1).float(), ids[:, 2:].flatten())
        total += float(loss) * ids[:, 2:].numel()
        count += ids[:, 2:].numel()
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


def _knockout_notes(run: dict[str, Any]) -> Iterator[str]:
    perplexity = run.get("perplexity", {})
    hidden = perplexity.get("without the first key")
    if hidden is not None:
        before = perplexity["all keys"]
        yield (
            f"{run['title']}: perplexity {before:.4g}, without the first token's key {hidden:.4g} "
            f"({hidden / before - 1:+.1%}), of the tokens from the third on."
        )


def _meta(settings: AuditSettings, corpus: Corpus, command: str) -> dict[str, Any]:
    import transformers

    from softpick import __version__

    return {
        "models": ", ".join(filter(None, (settings.model, settings.against))),
        "data": corpus.description,
        "sequence_length": settings.sequence_length,
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "versions": f"softpick {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        "device": settings.device,
        "command": command or " ".join(["softpick", *sys.argv[1:]]),
    }
