"""Quantize a model by a record of :data:`softpick.quantization.methods.METHODS`, and check that it happened."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softpick.experiment.failures import first_line
from softpick.experiment.models import DTYPES, ModelError, Subject, is_gguf, load_subject
from softpick.experiment.progress import Reporter
from softpick.quantization.methods import METHODS
from softpick.quantization.verify import QuantizationError, Verification, untouched, verify

__all__ = ["Job", "Quantized", "check", "quantize"]


@dataclass(frozen=True)
class Job:
    """What a method is asked to do.

    Attributes:
        subject: the model as it is; it stays so.
        bits: of a weight.
        group: neighbouring inputs of an output that share a scale.
        calibration: ``(N, T)`` token ids, for methods that look at activations.
        folder: a new folder in which the quantized model is saved.
        reporter: gets progress and messages.
        trust_remote_code: Python code that comes with the model may run.
    """

    subject: Subject
    bits: int
    group: int
    calibration: Tensor
    folder: Path
    reporter: Reporter
    trust_remote_code: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return self.subject.model.dtype

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.subject.model.device)

    def load(self, **options: Any) -> Subject:
        """The model, loaded again in the same way."""
        names = {value: name for name, value in DTYPES.items()}
        return load_subject(
            self.subject.name,
            reporter=self.reporter,
            device=self.device,
            dtype=names[self.dtype],
            attn_implementation=str(self.subject.model.config._attn_implementation),
            trust_remote_code=self.trust_remote_code,
            **options,
        )


@dataclass(frozen=True)
class Quantized:
    """A quantized model that was checked."""

    subject: Subject
    verification: Verification


def check(name: str, job: Job) -> None:
    """Raise what :func:`quantize` would raise before it does anything."""
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {name!r}")
    method = METHODS[name]
    if job.bits not in method.bits:
        raise ValueError(f"bits: {name} has {', '.join(map(str, method.bits))}; got {job.bits}")
    missing = [package for package in method.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"method {name} needs {', '.join(missing)}: {method.install}")
    if is_gguf(job.subject.name) and not method.gguf:
        raise QuantizationError("a GGUF file is quantized already; expected a directory or a hub name")
    method.check(job)


def quantize(name: str, job: Job) -> Quantized:
    """Quantize a model by one method of :data:`METHODS`, save it in the job's folder, and check that it happened.

    Args:
        name: a key of :data:`METHODS`.
        job: what to do.

    Raises:
        ValueError: an unknown method, or bits that it does not have.
        ImportError: its package is missing.
        ModelError: the model cannot be loaded in the way that the method needs.
        QuantizationError: the library cannot take this model, or what it made is not what was asked for.
    """
    check(name, job)
    method = METHODS[name]
    job.folder.mkdir(parents=True)
    log = job.folder.with_suffix(".log")
    with _apart(log):
        try:
            model = method.apply(job)
        except (ModelError, QuantizationError):
            raise
        except Exception as error:  # whatever a library says; all that it printed is in the log
            raise QuantizationError(f"{name} failed: {type(error).__name__}: {first_line(error)}") from error
        model.eval()
        subject = replace(job.subject, model=model)
        if subject.normalizer != job.subject.normalizer:
            raise QuantizationError(
                f"{name} changed the attention from {job.subject.normalizer} to {subject.normalizer}"
            )
        found = verify(job.subject.model, model, job.bits, method.block(job), job.dtype)
        untouched(job.subject.model, model, [layer.name for layer in found.layers])
        _runs(name, job, model)
    return Quantized(subject, replace(found, bits_per_weight=_bits_per_weight(job, model, found)))


def _runs(name: str, job: Job, model: Any) -> None:
    """Raise where a model asks a layer for what a quantized one does not have (routers that look at their weight's dtype)."""
    try:
        with torch.no_grad():
            model(input_ids=job.calibration[:1, :8].to(job.device), use_cache=False)
    except Exception as error:  # of any library's layers in any model
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise QuantizationError(f"{name}: the quantized model does not run ({reason})") from error


def _bits_per_weight(job: Job, model: Any, found: Verification) -> float:
    """Bits on disk that a quantized weight takes: what the files hold besides the tensors that were left as they are."""
    size = sum(file.stat().st_size for file in job.folder.rglob("*") if file.suffix in (".safetensors", ".pt", ".bin"))
    inside = tuple(f"{layer.name}." for layer in found.layers)
    rest = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for name, tensor in model.named_parameters()
        if not name.startswith(inside)
    }
    bits = 8 * (size - sum(rest.values())) / sum(layer.weights for layer in found.layers)
    if bits < job.bits:
        raise QuantizationError(
            f"the saved files hold {bits:.2f} bits a quantized weight, expected at least {job.bits}: the library did not save "
            "all of the model"
        )
    return bits


@contextmanager
def _apart(log: Path) -> Iterator[None]:
    """Send what libraries print to a file.

    Also what their compilers and loggers write: those know the file descriptors only.
    """
    with log.open("w", encoding="utf-8") as stream:
        saved = [os.dup(1), os.dup(2)]
        try:
            for descriptor in (1, 2):
                os.dup2(stream.fileno(), descriptor)
            with redirect_stdout(stream), redirect_stderr(stream):
                yield
        finally:
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
