"""A transformers model from a hub, a directory or a GGUF file, with its tokenizer, and text cut to its measure.

What `softpick analyze`, `evaluate` and `quantize` begin with.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from softpick.experiment.corpus import token_ids
from softpick.experiment.environment import chosen_device, missing_device
from softpick.experiment.failures import ModelError, first_line
from softpick.experiment.positions import KINDS_OF_TOKENS, positions, what_it_reads
from softpick.experiment.progress import Reporter
from softpick.experiment.reading import Corpus, DataError
from softpick.experiment.result_cache import stamps

__all__ = [
    "DTYPES",
    "FUSED",
    "ModelError",
    "Subject",
    "check_models",
    "identity",
    "is_gguf",
    "load_config",
    "load_subject",
    "load_tokenizer",
    "saved_positions",
    "sees_the_future",
]

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What ``dtype`` may be: ``auto`` is the one that was saved."""

FUSED = ("flash", "flex", "paged", "kernels")
"""How attention functions that show no weights begin."""


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: as the user gave it.
        model: in evaluation mode, on its device.
        tokenizer: its own.
        causal: it has the head of a model that predicts the next token; else it is an encoder.
        bidirectional: its predictions depend on the tokens after them (:func:`sees_the_future`), so that they are none.
        label: what it is called in tables; the last part of the name if empty.
        bos: samples of a causal model start with BOS where the tokenizer or the model has one.
        reads: ``text``, ``images`` or ``sound``.
        processor: makes the model's input of images or sound, of transformers; None for text.
    """

    name: str
    model: Any
    tokenizer: Any
    causal: bool
    bidirectional: bool = False
    label: str = ""
    bos: bool = True
    reads: str = "text"
    processor: Any = None

    @property
    def decodes(self) -> bool:
        """It has a decoder that attends to its encoder."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def quantization(self) -> str:
        """Which library's rounded weights it computes with, and of how many bits; empty where they are whole (also of GGUF)."""
        given = _rounding(self.model.config)
        if given is None:
            return ""
        bits = next((str(given[name]) for name in ("bits", "nbits") if given.get(name)), "")
        bits = bits or ("8" if given.get("load_in_8bit") else "4" if given.get("load_in_4bit") else "")
        method = given.get("quant_method", "unknown")
        return f"{getattr(method, 'value', method)}{f', {bits} bits' if bits else ''}"

    def decode(self, ids: Sequence[int], part: str = "") -> str:
        """Token ids as text; of images and sound the kinds of their positions.

        Args:
            ids: of tokens.
            part: of an encoder-decoder, where the keys are: of sound only the decoder's are text.
        """
        if self.reads == "text" or part == "decoder":
            return str(self.tokenizer.decode(list(ids)))
        return " ".join(KINDS_OF_TOKENS[i] for i in ids)

    @property
    def title(self) -> str:
        """What it is called in tables."""
        return self.label or Path(self.name).name or self.name

    @property
    def opening(self) -> int | None:
        """The token that every sample starts with, if there is one."""
        if self.causal and not self.bos:
            return None
        bos = self.tokenizer.bos_token_id
        return self.model.config.bos_token_id if bos is None and self.causal else bos

    @property
    def room(self) -> int:
        """Positions that the model has, or very many where it does not say."""
        longest = getattr(self.model.config, "max_target_positions", None) if self.decodes else None
        return min(x or sys.maxsize for x in (longest, positions(self.model)))

    @property
    def normalizer(self) -> str:
        """Name of its normalizer, or of an attention function that another package registered."""
        from softpick.integrations.transformers import normalizer_of

        try:
            return normalizer_of(self.model)
        except (TypeError, ValueError):
            return str(self.model.config._attn_implementation)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without special ones."""
        return token_ids(self.tokenizer, [text])[0]

    def wrapped(self, ids: Sequence[int]) -> list[int]:
        """Put BOS before token ids, or an encoder's special tokens around them."""
        if self.decodes:
            before, after = self._around
            return [*before, *ids, *after]
        if not self.causal:
            cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
            return [*([] if cls is None else [cls]), *ids, *([] if sep is None else [sep])]
        return list(ids) if self.opening is None else [self.opening, *ids]

    @property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and behind a text."""
        bare, whole = self.ids("a"), self.tokenizer("a")["input_ids"]
        starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        return (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts and bare else ([], [])

    def shifted(self, rows: Tensor) -> Tensor:
        """``(N, T)``: what the decoder reads while it writes ``rows (N, T)``: its first token, and all but their last.

        Raises:
            ModelError: the model does not say what its decoder starts with.
        """
        config, start = self.model.config, None
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            start = getattr(config, name, None) if start is None else start
        if start is None:
            raise ModelError(
                f"model: {self.name} does not say with which token its decoder starts (decoder_start_token_id)"
            )
        if bool((rows[:, 0] == start).all()):  # Whisper's tokenizer has put it there
            return rows
        return torch.cat([torch.full_like(rows[:, :1], start), rows[:, :-1]], 1)

    def sequences(self, corpus: Corpus, count: int, length: int, *, beyond: bool = False) -> Tensor:
        """``(N, length)``: documents joined by EOS (causal) and cut into pieces, each with its special tokens.

        Args:
            corpus: where the text comes from.
            count: at most so many.
            length: tokens of one, special ones included.
            beyond: also longer than the model has positions.

        Raises:
            ModelError: the model has no room for so many positions.
            DataError: the text is too short for one.
        """
        if self.room < length and not beyond:
            raise ModelError(f"sequence_length: {self.name} has room for {self.room} positions, got {length}")
        piece = length - len(self.wrapped([]))
        eos = self.tokenizer.eos_token_id if self.causal else None
        stream: list[int] = []
        for document in corpus.documents:
            stream += self.ids(document)
            if eos is not None:
                stream.append(eos)
            if len(stream) >= piece * count:
                break
        count = min(count, len(stream) // piece)
        if count == 0:
            raise DataError(
                f"data: {len(stream)} tokens are too few for one sequence of {length}; give more text or a smaller "
                "--sequence-length"
            )
        rows = torch.tensor([self.wrapped(stream[i * piece : (i + 1) * piece]) for i in range(count)])
        known = self.model.get_input_embeddings().num_embeddings
        if int(rows.max()) >= known:
            raise ModelError(
                f"model: the tokenizer of {self.name} gave token {int(rows.max())}, but the model has embeddings for {known}"
            )
        return rows


def load_subject(
    name: str,
    *,
    reporter: Reporter,
    device: str = "cpu",
    dtype: str = "auto",
    attn_implementation: str | None = None,
    visible: bool = False,
    decoder: bool = False,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    any_kind: bool = False,
) -> Subject:
    """Load a model and its tokenizer.

    Args:
        name: a hub name, a directory that transformers saved, or a GGUF file.
        reporter: gets a message when another attention function is used.
        device: where the model runs.
        dtype: one of :data:`DTYPES`.
        attn_implementation: of transformers or softpick; None is the model's own.
        visible: its attention weights must be visible; a fused function of softmax gives way to ``sdpa``.
        decoder: only a causal language model will do.
        quantization_config: of transformers: the weights are quantized while they are loaded.
        trust_remote_code: Python code that comes with the model may run.
        any_kind: also encoder-decoders and models of images or sound.

    Raises:
        ModelError: no such model, no tokenizer, missing weights, an encoder-decoder (but see ``any_kind``), code of its own, a
            device that is not there; with ``decoder`` also a model whose predictions depend on the tokens after them.
        ImportError: transformers is missing.
    """
    device = _usable(device, name)
    config, source, where = load_config(name, trust_remote_code=trust_remote_code, any_kind=any_kind)
    causal = _is_causal(config, trust_remote_code, name if decoder else None)
    reads = what_it_reads(config) if any_kind else "text"
    processor = None if reads == "text" else _load_processor(name, source, reads, trust_remote_code)
    has_text = reads != "images"
    tokenizer = load_tokenizer(name, source, where, trust_remote_code=trust_remote_code) if has_text else None
    wanted = attn_implementation
    own = getattr(config, "_attn_implementation_internal", None)
    if visible and wanted is None and isinstance(own, str) and own.startswith(FUSED):
        reporter.say(f"{name}: {own} shows no weights, so sdpa computes the same attention")
        wanted = "sdpa"
    if wanted is not None and "/" in wanted and not trust_remote_code:
        raise ModelError(f"attn_implementation: {wanted} is code of the hub, {_NOT_RUN}")
    options: dict[str, Any] = {"dtype": DTYPES[dtype], **where}
    options |= {} if wanted is None else {"attn_implementation": wanted}
    options |= {} if quantization_config is None else {"quantization_config": quantization_config}
    rounded = quantization_config is not None or _rounding(config) is not None
    options |= {"device_map": device} if rounded else {}
    model = _load_weights(name, source, causal, options, trust_remote_code, reporter)
    chosen = str(model.config._attn_implementation)
    if visible and chosen.startswith(FUSED):
        reporter.say(f"{name}: {chosen} shows no weights, so sdpa computes the same attention")
        model.set_attn_implementation("sdpa")
    try:
        # quantized weights are where they were loaded to, and some may not be moved
        model = model.eval() if rounded else model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device: cannot move {name} to {device!r}: {first_line(error)}") from error
    if reads == "images" and hasattr(model, "vision_model"):
        kind = type(model).__name__
        reporter.say(f"{name}: {type(model.vision_model).__name__} is measured, and nothing else of {kind}")
        model = model.vision_model
    subject = Subject(name, model, tokenizer, causal, reads=reads, processor=processor)
    if causal and quantization_config is None:  # a quantized model was looked at before
        subject = replace(subject, bidirectional=_bidirectional(subject))
    if decoder and subject.bidirectional:
        raise ModelError(
            f"model: {name} ({config.model_type}) predicts a token from the tokens after it; expected a causal language model"
        )
    return subject


def _rounding(config: Any) -> Mapping[str, Any] | None:
    """The quantization that a configuration speaks of; not GGUF's, whose weights transformers makes whole."""
    found = getattr(config, "quantization_config", None)
    given = found if found is None or isinstance(found, Mapping) else found.to_dict()
    method = None if given is None else given.get("quant_method", "unknown")
    return None if given is None or getattr(method, "value", method) == "gguf" else given


def check_models(names: Sequence[str], device: str, *, trust_remote_code: bool = False, decoder: bool = False) -> None:
    """Refuse before any model is loaded what :func:`load_subject` would refuse of one of them after the work for the others.

    Args:
        names: as for :func:`load_subject`; of a GGUF file, whose description takes long to read, only that it is there.
        device: as for :func:`load_subject`.
        trust_remote_code: the same.
        decoder: the same; otherwise any kind of model will do.

    Raises:
        ModelError: as :func:`load_subject`, for a device, a name, a configuration or an encoder.
    """
    for name in names:
        _usable(device, name)
        if not (is_gguf(name) and Path(name).is_file()):
            config = load_config(name, trust_remote_code=trust_remote_code, any_kind=not decoder)[0]
            _is_causal(config, trust_remote_code, name if decoder else None)


def _usable(device: str, name: str) -> str:
    """The device for a model."""
    device = chosen_device(device)
    absent = missing_device(device)
    if absent:
        raise ModelError(f"device: cannot move {name} to {device!r}: {absent}")
    return device


def _is_causal(config: Any, trust_remote_code: bool, expected: str | None = None) -> bool:
    """Whether a configuration is of a model that predicts the next token, and has no encoder.

    Raises:
        ModelError: it is not, and the model of the name ``expected`` must be.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and trust_remote_code
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING and (
        kind not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    )
    causal = (own or known) and not getattr(config, "is_encoder_decoder", False)
    if expected is not None and not causal:
        raise ModelError(f"model: {expected} is an encoder ({config.model_type}); expected a causal language model")
    return causal


def _load_weights(name: str, source: Any, causal: bool, options: Any, trust: bool, reporter: Reporter) -> Any:
    """The model with all its weights, where ``options`` of ``from_pretrained`` put it."""
    from transformers import AutoModel, AutoModelForCausalLM

    from softpick.experiment.quiet import loading_bars

    with _loading(f"model: cannot load {name}", name), loading_bars(reporter, Path(name).name):
        loader = AutoModelForCausalLM if causal else AutoModel
        model, info = loader.from_pretrained(source, output_loading_info=True, trust_remote_code=trust, **options)
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # of encoders, and not measured
    if missing:
        raise ModelError(
            f"model: {name} lacks {len(missing)} weights of {type(model).__name__} (such as {missing[0]}): they would be random"
        )
    return model


_PROBE = "Once there was a keeper who wrote one line in his book every night, and in the morning nobody could read it."


def _bidirectional(subject: Subject) -> bool:
    length = min(16, subject.room) // 2 * 2
    known = subject.model.get_input_embeddings().num_embeddings
    ids = [token for token in dict.fromkeys(subject.ids(_PROBE)) if token < known]
    ids += [token for token in range(known) if token not in ids][: max(0, length - len(ids))]
    with _loading(f"model: {subject.name} does not run", subject.name):
        return length >= 4 and sees_the_future(subject.model, torch.tensor(ids[:length]))


_NOT_RUN = "which does not run unless --trust-remote-code is given"


@contextmanager
def _loading(message: str, name: str, error_class: type[ValueError] = ModelError) -> Iterator[None]:
    """Whatever a hub, a file or a library does wrong, in a sentence; transformers' own words say it best."""
    from softpick.experiment.gguf import read_once

    try:
        with read_once():
            yield
    except BaseException as error:
        # a library in Rust panics in a class of its own, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            what = message.partition(":")[0]
            raise error_class(f"{what}: {name} comes with Python code of its own, {_NOT_RUN}") from error
        words = next((plain for mark, plain in _PLAINER.items() if mark in str(error)), first_line(error))
        raise error_class(f"{message}: {words}") from error


_PLAINER = {
    "ignore_mismatched_sizes": "its weights have other shapes than config.json says",
    "weights_only": "its weights are a pickle of more than tensors, which could run code; expected safetensors",
}
"""What stands in errors that speak of a report that nobody sees, or that advise what is unsafe, and what is said instead."""


def load_tokenizer(
    name: str,
    source: str,
    where: Mapping[str, Any] = MappingProxyType({}),
    *,
    trust_remote_code: bool = False,
    error_class: type[ValueError] = ModelError,
    message: str = "model: {name} has no tokenizer that transformers can load",
) -> Any:
    """A tokenizer of transformers.

    Args:
        name: as the user gave it.
        source: a hub name or a directory.
        where: further arguments of ``from_pretrained``.
        trust_remote_code: Python code that comes with it may run.
        error_class: what is raised.
        message: begins it.

    Raises:
        ModelError: there is none, it cannot be read, or it has code of its own.
    """
    from transformers import AutoTokenizer

    with _loading(message.format(name=name), name, error_class):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **where)


def _load_processor(name: str, source: str, reads: str, trust_remote_code: bool) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    loader, what = (
        (AutoImageProcessor, "image processor") if reads == "images" else (AutoFeatureExtractor, "extractor of sound")
    )
    with _loading(f"model: {name} has no {what} that transformers can load", name):
        return loader.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_config(
    name: str, *, trust_remote_code: bool = False, any_kind: bool = False
) -> tuple[Any, str, dict[str, Any]]:
    """The configuration of a model, and from where and with which further arguments transformers loads the rest.

    Args:
        name: a hub name, a directory, or a GGUF file.
        trust_remote_code: Python code that comes with it may run.
        any_kind: also an encoder-decoder.

    Raises:
        ModelError: there is none, it is an encoder-decoder (but see ``any_kind``), or it names attention that is code of the
            hub.
    """
    from softpick.integrations.transformers import register  # says so where transformers is missing

    register()  # softpick's model types and attention functions
    from transformers import AutoConfig, PretrainedConfig

    path = Path(name)
    where: dict[str, Any] = {}
    source = name
    if is_gguf(name):
        if not path.is_file():
            raise ModelError(f"model: there is no file {name}")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("model: reading a GGUF file needs gguf: pip install 'softpick[gguf]'")
        source, where = str(path.parent), {"gguf_file": path.name}
    elif not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ModelError(f"model: there is no directory or file {name}")
    elif path.exists() and not (path / "config.json").is_file():
        raise ModelError(
            f"model: {name} has no config.json; expected a directory that transformers saved, or a GGUF file"
        )
    if (path / "qmodel.pt").is_file():
        raise ModelError(
            f"model: {name} is in the format of hqq's own library (qmodel.pt), which transformers does not load; expected the "
            "model before it was quantized (softpick.quantization.methods.load_hqq loads it for softpick.analysis.measure)"
        )
    with _loading(f"model: cannot load {name}", name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
        # both: a class may drop what the file says, and a file may rename what the class has
        raw = {} if where else PretrainedConfig.get_config_dict(source)[0]
    for key, kernel in () if trust_remote_code else (*_kernels(raw), *_kernels(config)):
        raise ModelError(
            f"attn_implementation: {kernel}, which the configuration of {name} names ({key}), is code of the hub, {_NOT_RUN}"
        )
    if getattr(config, "is_encoder_decoder", False) and not any_kind:
        raise ModelError(f"model: {name} is an encoder-decoder ({config.model_type}); expected a decoder or an encoder")
    return config, source, where


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file; a folder may be called anything."""
    path = Path(name)
    return path.suffix == ".gguf" and not path.is_dir()


def _kernels(value: Any, key: str = "", inside: bool = False) -> Iterator[tuple[str, str]]:
    """Where a configuration names kernels of the hub: every ``*implementation*`` of it and of what is nested in it."""
    if isinstance(value, str):
        if inside and "/" in value:
            yield key, value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _kernels(item, key, inside)
    elif isinstance(value, Mapping) or hasattr(value, "to_dict"):
        for name, item in (value if isinstance(value, Mapping) else vars(value)).items():
            named = inside or "implementation" in str(name)
            yield from _kernels(item, f"{key}.{name}".strip("."), named)


def saved_positions(name: str, *, trust_remote_code: bool = False) -> int | None:
    """:func:`positions` of a language model that is not loaded: it is made without weights, since only the model knows.

    Args:
        name: a hub name, a directory, or a GGUF file.
        trust_remote_code: Python code that comes with it may run.

    Returns:
        None where it does not say, or cannot be made (an encoder, a damaged configuration): loading says why.

    Raises:
        ModelError: it has no configuration, or is an encoder-decoder.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name, trust_remote_code=trust_remote_code)[0]
    with torch.device("meta"):
        try:
            return positions(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        except Exception:  # whatever a configuration can do wrong
            return None


@torch.no_grad()
def sees_the_future(model: Any, ids: Tensor) -> bool:
    """Whether what a model predicts for the first half of a text depends on the second half.

    Args:
        model: of transformers, in evaluation mode, whose output has ``logits (B, T, V)``.
        ids: ``(T,)`` token ids, an even number of which not all are the same; the other text has its second half reversed
            and shifted by one.

    Returns:
        True for models with the head of a decoder and the attention of an encoder. Differences that rounding explains
        (experts that get other batches) do not count.
    """
    half = len(ids) // 2
    other = torch.cat([ids[:half], ids[half:].flip(0).roll(1)])
    device = next(model.parameters()).device
    first, second = (
        model(input_ids=row[None].to(device), use_cache=False).logits[0, :half].float() for row in (ids, other)
    )
    spread = float(first.std())
    precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return float((first - second).abs().max()) > (1e-4 if precise else 0.1) * spread


def identity(name: str, *, trust_remote_code: bool = False) -> list[Any]:
    """What a model is, for the key of a kept result: place, size and time of its files, or a hub model's revision.

    Args:
        name: a hub name, a directory, or a GGUF file.
        trust_remote_code: Python code that comes with it may run.

    Raises:
        ModelError: there is no such model.
    """
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    if not files:
        return [name, getattr(load_config(name, trust_remote_code=trust_remote_code)[0], "_commit_hash", None)]
    # results and reports that were put beside a model do not make it another one
    kept = [f for f in files if f.is_file() and (f.suffix in _OF_A_MODEL or f.name in _CONFIGURATIONS)]
    return [str(path.resolve()), stamps(kept)]


_OF_A_MODEL = (".safetensors", ".bin", ".gguf", ".model", ".txt", ".py")
_CONFIGURATIONS = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
