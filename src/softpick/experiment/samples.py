"""What a model of any kind is measured on: sequences of a text, images, sound; as arguments of the model."""

from __future__ import annotations

import math
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softpick.experiment.corpus import get_corpus
from softpick.experiment.failures import first_line
from softpick.experiment.models import ModelError, Subject
from softpick.experiment.reading import Corpus, DataError
from softpick.experiment.result_cache import stamps

__all__ = ["SYNTHETIC", "Samples", "Source", "joined", "size_of", "synthetic_image", "synthetic_sound"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SOUNDS = (".wav",)
SYNTHETIC = 8
"""Images or sounds that are made where none are given."""
_SIDE = 224  # pixels
_CHARACTERS = 2_000_000  # of a corpus that is tokenized for measuring: far more than the samples need


@dataclass(frozen=True)
class Samples:
    """What a model is given.

    Attributes:
        batches: arguments of the model, tensors whose first dimension is samples.
        description: what they are, in a sentence.
        tokens: ``(N, T)`` ids of a causal model, else None.
    """

    batches: list[dict[str, Tensor]]
    description: str
    tokens: Tensor | None = None


def size_of(batch: Mapping[str, Tensor]) -> int:
    """Samples of a batch."""
    return len(next(iter(batch.values())))


def joined(batches: Sequence[Mapping[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    """The same samples in batches of another size."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return [{name: x[i : i + size] for name, x in whole.items()} for i in range(0, size_of(whole), size)]


class Source:
    """Where samples come from: ``data`` of a command, read once whatever the models are.

    Args:
        data: a file or folder, or None: the standard library's sources, synthetic images, synthetic sound.
        text_field: of JSON and tables.
    """

    def __init__(self, data: str | None, text_field: str) -> None:
        self.data, self.text_field = data, text_field

    def files(self, suffixes: Sequence[str]) -> list[Path]:
        """The files of ``data`` that end so, in the order of their names."""
        if self.data is None:
            return []
        path = Path(self.data)
        found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
        return [file for file in found if file.is_file() and file.suffix.lower() in suffixes]

    @cached_property
    def corpus(self) -> Corpus:
        """The text; where ``data`` has sound in it, the standard library's sources."""
        return get_corpus(None if self.files(SOUNDS) else self.data, self.text_field, _CHARACTERS)

    def identity(self, reads: str) -> list[Any]:
        """What the samples depend on, for a key."""
        if reads == "text":
            return list(self.corpus.documents)
        text = [] if reads == "images" else list(self.corpus.documents)
        return [*stamps(self.files(IMAGES if reads == "images" else SOUNDS)), *text]

    def samples(self, subject: Subject, count: int, length: int, batch_size: int) -> Samples:
        """Samples for a model.

        Args:
            subject: the model.
            count: at most so many; of synthetic images and sounds no more than :data:`SYNTHETIC`.
            length: tokens of a text, special ones included; of a decoder that writes what it hears no more than it has room
                for.
            batch_size: samples of a batch.

        Raises:
            DataError: no such data, or data that the model does not read.
            ModelError: no room for so many positions.
        """
        tokens = None
        if subject.reads == "images":
            whole, description = self._images(subject, count)
        elif subject.reads == "sound":
            whole, description = self._sounds(subject, count)
            heard = len(whole["input_features"])
            if subject.decodes:
                rows = subject.shifted(subject.sequences(self.corpus, heard, min(length, subject.room)))
                heard = len(rows)
                whole = {name: x[:heard] for name, x in whole.items()} | {"decoder_input_ids": rows}
                description += f"; the decoder reads {self.corpus.description}"
        else:
            rows = subject.sequences(self.corpus, count, length)
            whole, description = {"input_ids": rows}, self.corpus.description
            if subject.decodes:
                whole["decoder_input_ids"] = subject.shifted(rows)
                description += "; the decoder reads what the encoder reads"
            tokens = rows if subject.causal else None
        return Samples(joined([whole], batch_size), description, tokens)

    def _images(self, subject: Subject, count: int) -> tuple[dict[str, Tensor], str]:
        try:
            from PIL import Image
        except ImportError as error:
            raise ModelError(f"model: {subject.name} reads images, which needs Pillow: pip install pillow") from error
        pictures: list[Any] = []
        if self.data is None:
            pictures = [Image.fromarray(synthetic_image(i).numpy()) for i in range(min(count, SYNTHETIC))]
            description = f"{len(pictures)} synthetic images"
        else:
            files = self.files(IMAGES)
            if not files:
                raise DataError(f"data: {self.data} has no images ({', '.join(IMAGES)}), which {subject.name} reads")
            for file in files[:count]:
                try:
                    pictures.append(Image.open(file).convert("RGB"))
                except (OSError, ValueError, Image.DecompressionBombError) as error:
                    raise DataError(f"data: {file} is no image that Pillow reads ({first_line(error)})") from error
            description = f"{len(pictures)} of {len(files)} images of {self.data}"
        pixels = subject.processor(pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(next(subject.model.parameters()).dtype)}, description

    def _sounds(self, subject: Subject, count: int) -> tuple[dict[str, Tensor], str]:
        rate = subject.processor.sampling_rate
        files = self.files(SOUNDS)
        if files:
            sounds = [_read_wave(file, rate) for file in files[:count]]
            description = f"{len(sounds)} of {len(files)} sounds of {self.data}"
        else:
            sounds = [synthetic_sound(i, rate) for i in range(min(count, SYNTHETIC))]
            description = f"{len(sounds)} synthetic sounds"
        found = subject.processor([x.numpy() for x in sounds], sampling_rate=rate, return_tensors="pt")
        return {"input_features": found["input_features"].to(next(subject.model.parameters()).dtype)}, description


def synthetic_image(number: int) -> Tensor:
    """``(224, 224, 3)`` uint8: a gradient with a disc, a grid or stripes on it, another one for each number."""
    generator = torch.Generator().manual_seed(number)
    y, x = torch.meshgrid(torch.linspace(-1, 1, _SIDE), torch.linspace(-1, 1, _SIDE), indexing="ij")
    turn, size, back, front = *torch.rand(2, generator=generator), *torch.rand(2, 3, generator=generator)
    along = x * torch.cos(turn * 6.3) + y * torch.sin(turn * 6.3)
    shape = (
        ((x - turn + 0.5).square() + (y + turn - 0.5).square() < 0.1 + 0.4 * size),
        ((x * 4).floor() + (y * 4).floor()) % 2 == 0,
        torch.sin(along * (8 + 30 * size)) > 0,
        (along.abs() < 0.1 + 0.3 * size) | ((x * x + y * y) < 0.05),
    )[number % 4]
    image = torch.where(shape[..., None], front, back * (0.5 + 0.5 * along[..., None].clamp(-1, 1)))
    image = image + 0.03 * torch.randn(_SIDE, _SIDE, 3, generator=generator)
    return (255 * image.clamp(0, 1)).byte()


def synthetic_sound(number: int, rate: int) -> Tensor:
    """``(5 * rate,)`` fp32 in [-1, 1]: five seconds of a tone that glides, with its harmonics, in bursts, and noise."""
    generator = torch.Generator().manual_seed(number)
    t = torch.arange(5 * rate) / rate
    low, glide, pace = torch.rand(3, generator=generator).tolist()
    phase = 2 * math.pi * ((90 + 200 * low) * t + 20 * (glide - 0.5) * t.square())
    tone = sum(torch.sin(k * phase) / k for k in (1, 2, 3, 5))
    bursts = torch.sin(2 * math.pi * (1 + 3 * pace) * t).clamp(min=0)
    return (0.4 * tone * bursts + 0.01 * torch.randn(len(t), generator=generator)).clamp(-1, 1)


def _read_wave(file: Path, rate: int) -> Tensor:
    """Samples of a WAV file, channels averaged."""
    try:
        with wave.open(str(file)) as sound:
            found, width, channels = sound.getframerate(), sound.getsampwidth(), sound.getnchannels()
            raw = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(f"data: {file} is no WAV file of integers ({first_line(error)})") from error
    if found != rate or width != 2 or not raw:
        raise DataError(
            f"data: {file} has {found} samples of {8 * width} bits a second ({len(raw)} bytes); expected {rate} of 16 bits"
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.int16).view(-1, channels).float().mean(1) / 32768
