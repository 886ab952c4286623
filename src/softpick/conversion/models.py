"""The teacher, the student that shares its tensors, and the checkpoint that comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from softpick.conversion.recipes import ConvertError, ConvertSettings
from softpick.experiment.failures import first_line
from softpick.experiment.models import DTYPES, Subject, load_config, load_subject
from softpick.experiment.progress import Reporter
from softpick.integrations.transformers import intercept_attention, normalizer_of
from softpick.normalizers import get_normalizer
from softpick.training.sharding import is_sharded, whole

__all__ = [
    "attention_layers",
    "embeddings",
    "few_tokens",
    "load_teacher",
    "make_student",
    "own_weights",
    "save_student",
    "saved_dtype",
    "saved_state",
]


def load_teacher(settings: ConvertSettings, reporter: Reporter, device: str) -> Subject:
    """The model as it was saved, with fp32 weights, in evaluation mode and without gradients.

    Args:
        settings: its name.
        reporter: gets progress and messages.
        device: where it is loaded to.

    Raises:
        ModelError: no such model, or no causal language model.
        ConvertError: it has the wanted normalizer already.
    """
    subject = load_subject(
        settings.model,
        reporter=reporter,
        device=device,
        dtype="float32",
        decoder=True,
        trust_remote_code=settings.trust_remote_code,
    )
    if subject.normalizer == settings.normalizer:
        raise ConvertError(f"normalizer: {settings.model} has {settings.normalizer} already; expected another one")
    _forget_quantization(subject.model)
    subject.model.requires_grad_(False)
    return subject


def _forget_quantization(model: Any) -> None:
    """Remove a GGUF file's quantization from the configuration: its weights are plain once loaded, but would not be saved."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    with suppress(AttributeError):
        del model.config.quantization_config


def saved_dtype(settings: ConvertSettings) -> torch.dtype:
    """The dtype of the converted model's weights."""
    if settings.export_dtype != "auto":
        return DTYPES[settings.export_dtype]  # type: ignore[return-value]
    config = load_config(settings.model, trust_remote_code=settings.trust_remote_code)[0]
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


@torch.no_grad()
def attention_layers(model: Any) -> list[str]:
    """Names of the modules that compute attention, in the order in which a forward pass calls them.

    They are those that ask transformers' AttentionInterface for a function, found by one forward pass over four tokens.

    Args:
        model: of transformers.

    Raises:
        ConvertError: there are none.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, None] = {}

    def around(implementation: str, function: Callable[..., Any], default: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found[names[id(module)]] = None
            return function(module, *args, **kwargs)

        return attention

    with intercept_attention(model, around):
        model(input_ids=few_tokens(model), use_cache=False)
    if not found:
        raise ConvertError(
            f"model: no layer of {type(model).__name__} computes attention through transformers' AttentionInterface"
        )
    return list(found)


def few_tokens(model: Any) -> torch.Tensor:
    """``(1, 4)`` token ids on the model's device."""
    return torch.arange(4, device=next(model.parameters()).device)[None]


@torch.no_grad()
def make_student(teacher: Any, layers: list[str], normalizer: str) -> Any:
    """A model with another normalizer whose attention layers have weights of their own; all other tensors are the teacher's.

    Args:
        teacher: of transformers; is not changed.
        layers: from :func:`attention_layers`.
        normalizer: a name of ``softpick.NORMALIZERS``.

    Raises:
        ConvertError: the model lacks what the normalizer needs (sinks), has sinks that it would ignore, or computes softmax
            by itself.
    """
    kind = type(teacher).__name__
    if get_normalizer(normalizer).needs_sink and normalizer_of(teacher) != normalizer:
        raise ConvertError(
            f"normalizer: {normalizer} needs one sink logit a head, which {kind} does not have; expected a normalizer without"
        )
    own = {id(p) for name in layers for p in teacher.get_submodule(name).parameters()}
    shared = [t for t in (*teacher.parameters(), *teacher.buffers()) if id(t) not in own]
    student = copy.deepcopy(teacher, {id(tensor): tensor for tensor in shared})
    try:
        student.set_attn_implementation(normalizer)
        student(input_ids=few_tokens(student), use_cache=False)
    except (ValueError, NotImplementedError) as error:
        raise ConvertError(f"normalizer: {normalizer} cannot be given to {kind}: {first_line(error)}") from error
    return student.eval()


def embeddings(model: Any) -> list[nn.Module]:
    """The input embedding and the head, as far as the model has them."""
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in found if module is not None]


@torch.no_grad()
def own_weights(teacher: Any, student: Any, settings: ConvertSettings, shrink: bool = True) -> None:
    """Give a student weights of its own for stages 2 and 3.

    Frozen embeddings stay the teacher's tensors. Trained ones are untied: RADLADS found that training tied ones fails.

    A teacher that shares nothing any more gets bf16 weights where bf16 is computed with: half of its memory.

    Args:
        teacher: of the student.
        student: from :func:`make_student`; changed in place.
        settings: what is frozen.
        shrink: the teacher may get bf16 weights.
    """
    frozen = {id(p) for module in embeddings(student) for p in module.parameters()}
    train_all = settings.embeddings == "trained"
    copies: dict[int, nn.Parameter] = {}
    for module in student.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or (id(parameter) in frozen and not train_all):
                continue
            untied = train_all and id(parameter) in frozen
            made = None if untied else copies.get(id(parameter))
            made = nn.Parameter(parameter.detach().clone()) if made is None else made
            copies[id(parameter)] = made
            module._parameters[name] = made
    if not train_all:
        return
    for config in _configs(student.config):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    if settings.dtype == "bfloat16" and shrink:
        for parameter in teacher.parameters():
            parameter.data = parameter.data.bfloat16()


def _configs(config: Any) -> Iterator[Any]:
    yield config
    text = config.get_text_config(decoder=True)
    if text is not config:
        yield text


@torch.no_grad()
def saved_state(student: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, without second names of tied tensors, which casting would tear apart.

    Args:
        student: that was trained; where ranks share it, each has to ask, and the first gets the tensors.
        dtype: of floating-point tensors.
    """
    keep = not is_sharded(student) or torch.distributed.get_rank() == 0
    seen: set[int] = set()
    found = {}
    for name, tensor in student.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            made = whole(tensor)
            if keep:
                made = made.cpu() if isinstance(tensor, DTensor) else made
                found[name] = made.to(dtype) if made.is_floating_point() else made
        seen.add(id(tensor))
    return found


@torch.no_grad()
def save_student(
    student: Any, state: dict[str, torch.Tensor], subject: Subject, folder: Path, dtype: torch.dtype
) -> None:
    """Write a checkpoint: weights, configuration with marked names, tokenizer, generation settings.

    Args:
        student: that was trained.
        state: from :func:`saved_state`.
        subject: the teacher; its tokenizer goes along.
        folder: does not exist yet.
        dtype: of the weights.
    """
    config_dtype = student.config.dtype
    student.config.dtype = dtype
    try:
        student.save_pretrained(folder, state_dict=state)
    finally:
        student.config.dtype = config_dtype
    subject.tokenizer.save_pretrained(folder)
