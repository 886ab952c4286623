"""THE table of weight quantizers. Each is another library's; here is only how to call it so that the result can be trusted."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softpick.experiment.models import DTYPES, ModelError, Subject, first_line, load_subject
from softpick.experiment.progress import Reporter
from softpick.quantization.verify import QuantizationError, Verification, inner_layers, tensors, untouched, verify

__all__ = ["METHODS", "Job", "Method", "Quantized", "check", "load_hqq", "quantize"]


@dataclass(frozen=True)
class Job:
    """What a method is asked to do.

    Attributes:
        subject: the model as it is; it stays so.
        bits: of a weight.
        group: neighbouring inputs of an output that share a scale.
        calibration: ``(N, T)`` token ids, for methods that look at activations.
        folder: a new folder in which the quantized model is saved.
        reporter: told what happens.
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
        """In which the model computes."""
        return self.subject.model.dtype

    @property
    def device(self) -> str:
        """Where it runs."""
        return str(self.subject.model.device)

    def load(self, **options: Any) -> Subject:
        """The model once more, the way it was loaded."""
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


@dataclass(frozen=True)
class Method:
    """How weights are quantized.

    Attributes:
        name: on the command line.
        title: for people.
        bits: what it can do.
        packages: that it needs, by the names they are imported by.
        block: of a job, how many neighbouring weights share a scale; None is a whole row.
        check: raises :class:`QuantizationError` for shapes or devices that the library cannot take.
        apply: quantizes, saves in the job's folder, and returns the model.
        citation: of the method.
    """

    name: str
    title: str
    bits: tuple[int, ...]
    packages: tuple[str, ...]
    citation: str
    apply: Callable[[Job], Any]
    check: Callable[[Job], None]
    block: Callable[[Job], int | None]


def check(name: str, job: Job) -> None:
    """Raise what :func:`quantize` would raise before it does anything."""
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {name!r}")
    method = METHODS[name]
    if job.bits not in method.bits:
        raise ValueError(f"bits: {name} has {', '.join(map(str, method.bits))}; got {job.bits}")
    missing = [package for package in method.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"method {name} needs {', '.join(missing)}: pip install 'softpick[quantize]'")
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
    return Quantized(subject, replace(found, bits_per_weight=_bits_per_weight(job, model, found)))


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
    """What libraries print goes to a file, so that it stands in nobody's way and can still be read.

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


def _inner(job: Job) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of the matrices of the layers."""
    found = {}
    for name, module in inner_layers(job.subject.model).items():
        rows, columns = module.weight.shape
        found[name] = (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)
    return found


def fitting_group(model: Any) -> int:
    """The group size that is used where none is given: 64, or the largest power of two below that divides all inputs."""
    widths = (
        module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1] for module in inner_layers(model).values()
    )
    common = math.gcd(*widths)
    return min(64, common & -common) or 64


def _group_divides(job: Job) -> None:
    for name, (_, features) in _inner(job).items():
        if features % job.group:
            raise QuantizationError(
                f"group_size: expected a divisor of the inputs of every layer; {name} has {features}, got {job.group}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# HQQ


def _hqq_check(job: Job) -> None:
    _group_divides(job)
    if any(type(module).__name__ == "Conv1D" for module in inner_layers(job.subject.model).values()):
        raise QuantizationError("hqq: quantizes nn.Linear only, and this model has Conv1D layers (GPT-2)")


def _hqq(job: Job) -> Any:
    # transformers' own HqqConfig is not implemented in transformers 5; the library's interface is
    from hqq.core.quantize import BaseQuantizeConfig

    library = _hqq_library()
    model = job.load().model
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group, axis=1)
    # a device by name would have to be given a place for each layer, which the library knows for some models only
    library.quantize_model(model, quant_config=config, compute_dtype=job.dtype, device={"": job.device})
    _put_back(job.subject.model, model)
    library.save_quantized(model, str(job.folder))
    return model


def load_hqq(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A model that ``softpick quantize --method hqq --keep`` left.

    hqq's own ``AutoHQQHFModel.from_quantized`` leaves out parameters of modules that hold others: experts that are one
    tensor, learned sinks, score scales.

    Args:
        folder: of the model.
        dtype: in which it computes.
        device: where it runs.

    Returns:
        The model, in evaluation mode, with its own attention.

    Raises:
        ImportError: hqq is missing.
    """
    from transformers import AutoConfig

    from softpick.integrations.transformers import register

    register()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = _hqq_library().from_quantized(str(folder), compute_dtype=dtype, device=device)
    own = getattr(config, "_attn_implementation_internal", None)
    if isinstance(own, str):
        model.set_attn_implementation(own)
    return model.eval()


def _hqq_library() -> Any:
    """The interface of hqq, which saves leaves of the tree of modules, made to save parameters of the other modules as well."""
    from hqq.models.hf.base import AutoHQQHFModel

    def others(model: Any) -> Iterator[tuple[str, Any]]:
        for name, module in model.named_modules():
            if module._modules and (module._parameters or module._buffers):
                yield name, module

    class Library(AutoHQQHFModel):
        @classmethod
        def serialize_weights(cls, model: Any, verbose: bool = False) -> dict[str, Any]:
            weights = super().serialize_weights(model, verbose)
            for name, module in others(model):
                own = {**module._parameters, **module._buffers}
                left = {key: value for key, value in own.items() if value is not None}
                weights[name] = {k: v for k, v in left.items() if k not in module._non_persistent_buffers_set}
            return weights

        @classmethod
        def post_module_load(cls, model: Any, weights: dict[str, Any]) -> None:
            for name, module in others(model):
                for key, value in weights.get(name, {}).items():
                    if key in module._parameters:
                        module._parameters[key] = nn.Parameter(value, requires_grad=False)
                    else:
                        module._buffers[key] = value

    return Library


def _put_back(original: Any, model: Any) -> None:
    """Undo what hqq does besides quantizing: it casts all else to the dtype of the products, rotary frequencies too."""
    before = tensors(original)
    for name, tensor in tensors(model).items():
        if name in before and tensor.dtype != before[name].dtype and tensor.shape == before[name].shape:
            tensor.data = before[name].detach().clone()


# ---------------------------------------------------------------------------------------------------------------------
# bitsandbytes

_NF4_BLOCK = 64  # weights that share a scale, in the order of memory


def _bnb_check(job: Job) -> None:
    _from_folder(job)
    if job.bits == 4 and job.device == "cpu":
        for name, (outputs, features) in _inner(job).items():
            if outputs % 32 or features % _NF4_BLOCK:
                raise QuantizationError(
                    f"bnb: 4 bits on the CPU expect outputs in multiples of 32 and inputs of {_NF4_BLOCK}; {name} has "
                    f"{outputs} and {features}"
                )


def _bnb(job: Job) -> Any:
    from transformers import BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if job.bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=job.dtype)
    )
    model = job.load(quantization_config=config).model
    model.save_pretrained(job.folder)  # before it runs: saved afterwards, 4-bit weights on the CPU are wrong
    return model


def _from_folder(job: Job) -> None:
    if Path(job.subject.name).suffix == ".gguf":
        raise QuantizationError("a GGUF file is quantized already; expected a directory or a hub name")


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ


def _gptq_check(job: Job) -> None:
    _from_folder(job)
    _group_divides(job)
    for name, (outputs, features) in _inner(job).items():
        if outputs % 32 or features % 32:
            raise QuantizationError(
                f"gptq: expects inputs and outputs in multiples of 32; {name} has {features} and {outputs}"
            )


def _gptq(job: Job) -> Any:
    from transformers import GPTQConfig

    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in job.calibration]
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(torch.get_num_threads()))  # it would take one a core
    config = GPTQConfig(
        bits=job.bits,
        dataset=samples,
        tokenizer=job.subject.tokenizer,
        group_size=job.group,
        model_seqlen=job.calibration.shape[1],
    )
    model = job.load(quantization_config=config).model
    model.config.quantization_config.dataset = None  # the samples are no part of a configuration
    model.save_pretrained(job.folder)
    return model


METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method("hqq", "HQQ", (1, 2, 3, 4, 8), ("hqq",), "Badri and Shaji 2023", _hqq, _hqq_check, lambda j: j.group),
        Method(
            "bnb",
            "bitsandbytes",
            (4, 8),
            ("bitsandbytes",),
            "Dettmers et al. 2022 (LLM.int8), 2023 (NF4)",
            _bnb,
            _bnb_check,
            lambda j: _NF4_BLOCK if j.bits == 4 else None,
        ),
        Method(
            "gptq",
            "GPTQ",
            (2, 3, 4, 8),
            ("gptqmodel", "optimum"),
            "Frantar et al. 2022",
            _gptq,
            _gptq_check,
            lambda j: j.group,
        ),
    )
}
"""By name."""
