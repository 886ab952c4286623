"""THE table of weight quantizers: one record each. Needs no torch until one of them runs.

Each quantizer is another library's; here is how to call it so that the result can be trusted, and everything that other parts
of softpick must know about it. :mod:`softpick.quantization.apply` quantizes by such a record and checks the result.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpick.experiment.failures import QuantizationError

if TYPE_CHECKING:
    import torch

    from softpick.quantization.apply import Job

__all__ = ["METHODS", "Method", "distributions", "fitting_group", "grouping", "load_hqq", "loggers"]


@dataclass(frozen=True)
class Method:
    """How weights are quantized.

    Attributes:
        name: on the command line.
        title: for people.
        bits: what it can do.
        packages: that it needs, by the names they are imported by; loggers and warnings of these names are silenced.
        citation: of the method.
        apply: quantizes, saves in the job's folder, and returns the model.
        check: raises :class:`QuantizationError` for shapes or devices that the library cannot take.
        block: of a job, how many neighbouring weights share a scale; None is a whole row.
        grouped: ``--group-size`` sets how many weights share a scale.
        calibrated: it looks at what layers get for calibration sequences.
        gguf: it takes a model from a GGUF file.
        distributions: of the packages, whose versions stand in the report; empty where they have the packages' names.
        install: how to get the packages.
        marker: of its points in a plot, as matplotlib has it.
        line: between them.
    """

    name: str
    title: str
    bits: tuple[int, ...]
    packages: tuple[str, ...]
    citation: str
    apply: Callable[[Job], Any]
    check: Callable[[Job], None]
    block: Callable[[Job], int | None]
    grouped: bool = False
    calibrated: bool = False
    gguf: bool = False
    distributions: tuple[str, ...] = ()
    install: str = "pip install 'softpick[quantize]'"
    marker: str = "D"
    line: str = "-."


def distributions() -> list[str]:
    """Distributions of all methods, for the versions in a report."""
    return [name for method in METHODS.values() for name in method.distributions or method.packages]


def loggers() -> list[str]:
    """Packages of all methods, which log and warn under these names."""
    return [name for method in METHODS.values() for name in method.packages]


def grouping() -> list[str]:
    """Names of the methods that take a group size."""
    return [method.name for method in METHODS.values() if method.grouped]


def _inner(model: Any) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of the matrices of the layers."""
    from softpick.quantization.verify import inner_layers

    found = {}
    for name, module in inner_layers(model).items():
        rows, columns = module.weight.shape
        found[name] = (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)
    return found


def fitting_group(model: Any) -> int:
    """The group size that is used where none is given: 64, or the largest power of two below that divides all inputs."""
    common = math.gcd(*(features for _, features in _inner(model).values()))
    return min(64, common & -common) or 64


def _group_divides(job: Job) -> None:
    for name, (_, features) in _inner(job.subject.model).items():
        if features % job.group:
            raise QuantizationError(
                f"group_size: expected a divisor of the inputs of every layer; {name} has {features}, got {job.group}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# HQQ


def _hqq_check(job: Job) -> None:
    from softpick.quantization.verify import inner_layers

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


def load_hqq(folder: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """A model that ``softpick quantize --method hqq --keep`` left.

    hqq's own ``AutoHQQHFModel.from_quantized`` leaves out parameters of modules that hold others: experts that are one
    tensor, learned sinks, score scales.

    Args:
        folder: of the model.
        dtype: in which it computes; None is fp32.
        device: where it runs.

    Returns:
        The model, in evaluation mode, with its own attention.

    Raises:
        ImportError: hqq is missing.
    """
    import torch
    from transformers import AutoConfig

    from softpick.integrations.transformers import register

    register()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = _hqq_library().from_quantized(str(folder), compute_dtype=dtype or torch.float32, device=device)
    own = getattr(config, "_attn_implementation_internal", None)
    if isinstance(own, str):
        model.set_attn_implementation(own)
    return model.eval()


def _hqq_library() -> Any:
    """The interface of hqq, which saves leaves of the tree of modules, made to save parameters of the other modules as well."""
    from hqq.models.hf.base import AutoHQQHFModel
    from torch import nn

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
    from softpick.quantization.verify import tensors

    before = tensors(original)
    for name, tensor in tensors(model).items():
        if name in before and tensor.dtype != before[name].dtype and tensor.shape == before[name].shape:
            tensor.data = before[name].detach().clone()


# ---------------------------------------------------------------------------------------------------------------------
# bitsandbytes

_NF4_BLOCK = 64  # weights that share a scale, in the order of memory


def _bnb_check(job: Job) -> None:
    if job.bits == 4 and job.device == "cpu":
        for name, (outputs, features) in _inner(job.subject.model).items():
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


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ


def _gptq_check(job: Job) -> None:
    _group_divides(job)
    for name, (outputs, features) in _inner(job.subject.model).items():
        if outputs % 32 or features % 32:
            raise QuantizationError(
                f"gptq: expects inputs and outputs in multiples of 32; {name} has {features} and {outputs}"
            )


def _gptq(job: Job) -> Any:
    import torch
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


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="hqq",
            title="HQQ",
            bits=(1, 2, 3, 4, 8),
            packages=("hqq",),
            citation="Badri and Shaji 2023",
            apply=_hqq,
            check=_hqq_check,
            block=lambda job: job.group,
            grouped=True,
            gguf=True,
            marker="o",
            line="-",
        ),
        Method(
            name="bnb",
            title="bitsandbytes",
            bits=(4, 8),
            packages=("bitsandbytes",),
            citation="Dettmers et al. 2022 (LLM.int8), 2023 (NF4)",
            apply=_bnb,
            check=_bnb_check,
            block=lambda job: _NF4_BLOCK if job.bits == 4 else None,
            marker="s",
            line="--",
        ),
        Method(
            name="gptq",
            title="GPTQ",
            bits=(2, 3, 4, 8),
            packages=("gptqmodel", "optimum"),
            citation="Frantar et al. 2022",
            apply=_gptq,
            check=_gptq_check,
            block=lambda job: job.group,
            grouped=True,
            calibrated=True,
            marker="^",
            line=":",
        ),
    )
}
"""By name."""


def __getattr__(name: str) -> object:
    """What was here in version 0.1, for one release."""
    if name not in ("Job", "Quantized", "check", "quantize"):
        raise AttributeError(f"module 'softpick.quantization.methods' has no attribute {name!r}")
    from softpick.quantization import apply

    warnings.warn(
        f"softpick.quantization.methods.{name} has moved to softpick.quantization.apply", DeprecationWarning, 2
    )
    return getattr(apply, name)
