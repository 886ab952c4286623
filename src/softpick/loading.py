"""A transformers model from a hub, a directory or a GGUF file, with its tokenizer, and text cut to its measure.

What `softpick analyze`, `evaluate` and `quantize` begin with.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softpick.parts import stamps
from softpick.progress import Reporter
from softpick.training.data import Corpus, DataError

__all__ = ["DTYPES", "FUSED", "ModelError", "Subject", "first_line", "identity", "load_config", "load_subject"]

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What ``dtype`` may be: ``auto`` is the one that was saved."""

FUSED = ("flash", "flex", "paged", "kernels")
"""How attention functions that show no weights begin."""


class ModelError(ValueError):
    """A model that cannot be loaded, or not be used so; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: as the user gave it.
        model: in evaluation mode, on its device.
        tokenizer: its own.
        causal: it predicts the next token; else it is an encoder.
    """

    name: str
    model: Any
    tokenizer: Any
    causal: bool

    @property
    def title(self) -> str:
        """The last part of the name."""
        return Path(self.name).name or self.name

    @property
    def opening(self) -> int | None:
        """The token that every sample starts with, if there is one."""
        bos = self.tokenizer.bos_token_id
        return self.model.config.bos_token_id if bos is None and self.causal else bos

    @property
    def room(self) -> int:
        """Positions that the model has, or very many where it does not say."""
        longest = getattr(self.model.config, "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else sys.maxsize

    @property
    def normalizer(self) -> str:
        """Its name, or that of an attention function that somebody else registered."""
        from softpick.integrations.transformers import normalizer_of

        try:
            return normalizer_of(self.model)
        except (TypeError, ValueError):
            return str(self.model.config._attn_implementation)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without special ones."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def wrapped(self, ids: Sequence[int]) -> list[int]:
        """With BOS before it, or an encoder's special tokens around it."""
        if not self.causal:
            cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
            return [*([] if cls is None else [cls]), *ids, *([] if sep is None else [sep])]
        return list(ids) if self.opening is None else [self.opening, *ids]

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
        return torch.tensor([self.wrapped(stream[i * piece : (i + 1) * piece]) for i in range(count)])


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
) -> Subject:
    """Load a model and its tokenizer.

    Args:
        name: a hub name, a directory that transformers saved, or a GGUF file.
        reporter: told when another attention function stands in.
        device: where the model runs.
        dtype: one of :data:`DTYPES`.
        attn_implementation: of transformers or softpick; None is the model's own.
        visible: its attention weights must be visible; a fused function of softmax gives way to ``sdpa``.
        decoder: only a causal language model will do.
        quantization_config: of transformers: the weights are quantized while they are loaded.

    Raises:
        ModelError: no such model, no tokenizer, missing weights, an encoder-decoder, a device that is not there.
        ImportError: transformers is missing.
    """
    from softpick.integrations.transformers import register  # says so where transformers is missing

    register()  # softpick's models and attention functions
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    config, source, where = load_config(name)
    kind = type(config)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING and (
        kind not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    )
    if decoder and not causal:
        raise ModelError(f"model: {name} is an encoder ({config.model_type}); expected a causal language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except Exception as error:
        raise ModelError(f"model: {name} has no tokenizer that transformers can load: {first_line(error)}") from error
    loader = AutoModelForCausalLM if causal else AutoModel
    wanted = attn_implementation
    own = getattr(config, "_attn_implementation_internal", None)
    if visible and wanted is None and isinstance(own, str) and own.startswith(FUSED):
        reporter.say(f"{name}: {own} shows no weights, so sdpa computes the same attention")
        wanted = "sdpa"
    try:
        model, info = loader.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            output_loading_info=True,
            **where,
            **({} if wanted is None else {"attn_implementation": wanted}),
            **(
                {}
                if quantization_config is None
                else {"quantization_config": quantization_config, "device_map": device}
            ),
        )
    except Exception as error:
        raise ModelError(f"model: cannot load {name}: {first_line(error)}") from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # of encoders, and not measured
    if missing:
        raise ModelError(
            f"model: {name} lacks {len(missing)} weights of {type(model).__name__} (such as {missing[0]}): they would be random"
        )
    chosen = str(model.config._attn_implementation)
    if visible and chosen.startswith(FUSED):
        reporter.say(f"{name}: {chosen} shows no weights, so sdpa computes the same attention")
        model.set_attn_implementation("sdpa")
    try:
        # quantized weights are where they were loaded to, and some may not be moved
        model = model.eval() if quantization_config is not None else model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device: cannot move {name} to {device!r}: {first_line(error)}") from error
    return Subject(name, model, tokenizer, causal)


def load_config(name: str) -> tuple[Any, str, dict[str, Any]]:
    """The configuration of a model, and from where and with which further arguments transformers loads the rest.

    Raises:
        ModelError: there is none, or it is an encoder-decoder.
    """
    from transformers import AutoConfig

    path = Path(name)
    where: dict[str, Any] = {}
    source = name
    if path.suffix == ".gguf":
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
    try:
        config = AutoConfig.from_pretrained(source, **where)
    except Exception as error:  # whatever a hub or a file can do wrong; transformers' own words say it best
        raise ModelError(f"model: cannot load {name}: {first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model: {name} is an encoder-decoder ({config.model_type}); expected a decoder or an encoder")
    return config, source, where


def first_line(error: Exception) -> str:
    """Of an error's words, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def identity(name: str) -> list[Any]:
    """What a model is, for the key of a part: place, size and time of its files, or a hub model's revision.

    Raises:
        ModelError: there is no such model.
    """
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    if not files:
        return [name, getattr(load_config(name)[0], "_commit_hash", None)]
    # parts and reports that were put beside a model do not make it another one
    kept = [f for f in files if f.is_file() and (f.suffix in _OF_A_MODEL or f.name in _CONFIGURATIONS)]
    return [str(path.resolve()), stamps(kept)]


_OF_A_MODEL = (".safetensors", ".bin", ".gguf", ".model", ".txt", ".py")
_CONFIGURATIONS = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
