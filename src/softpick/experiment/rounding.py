"""Rounding of activations, keys and values, simulated: numbers are rounded to a format and computed with in the model's own.

Weights alone hide what outliers do: a matrix has none. The inputs of the matrices do, and a scale that has room for one
outlier has few steps left for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softpick.experiment.failures import QuantizationError

__all__ = [
    "FORMATS",
    "GRANULARITIES",
    "Errors",
    "inner_layers",
    "linear_layers",
    "quantized_activations",
    "quantized_cache",
    "round_to",
]


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """The matrices of a model: ``nn.Linear`` and GPT-2's ``Conv1D``, by the names of their modules."""
    return {name: module for name, module in model.named_modules() if _is_linear(module)}


def inner_layers(model: Any) -> dict[str, Any]:
    """The linear layers without the vocabulary's projection: what quantizers quantize."""
    head = model.get_output_embeddings()
    return {name: module for name, module in linear_layers(model).items() if module is not head}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


GRANULARITIES = ("tensor", "token")
"""``tensor``: one scale per activation, set beforehand on calibration text. ``token``: one scale per token, from the token."""


@dataclass(frozen=True)
class Format:
    """Numbers that are symmetric around zero.

    Attributes:
        largest: the largest one, to which a scale stretches the largest entry.
        cast: rounds to the nearest one.
    """

    largest: float
    cast: Callable[[Tensor], Tensor]


def _integer(bits: int) -> Format:
    largest = (1 << (bits - 1)) - 1
    return Format(float(largest), lambda x: x.round().clamp_(-largest, largest))


def _float8(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(x.dtype)  # conversion alone would overflow to NaN


FORMATS: Mapping[str, Format] = {
    "int8": _integer(8),
    "int6": _integer(6),
    "int4": _integer(4),
    "fp8": Format(448.0, _float8),
}
"""``fp8`` is e4m3, OCP's 8-bit float for inference (largest 448)."""


def round_to(x: Tensor, fmt: Format, largest: Tensor) -> Tensor:
    """``x`` rounded to a format whose largest number stands for ``largest``; entries beyond it are clipped.

    Args:
        x: any shape and dtype.
        fmt: of :data:`FORMATS`.
        largest: broadcastable to ``x``; at 0 the result is 0.

    Returns:
        The shape and dtype of ``x``.
    """
    scale = largest.float().clamp(min=torch.finfo(torch.float32).tiny * fmt.largest) / fmt.largest
    return (fmt.cast(x.float() / scale) * scale).to(x.dtype)


class Errors:
    """How far rounded tensors are from what they were: ``|x' - x| / |x|`` over all that was added under a name."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = {}

    def add(self, name: str, x: Tensor, rounded: Tensor) -> None:
        """One tensor."""
        entry = self._squares.setdefault(name, [0.0, 0.0])
        entry[0] += float((rounded.float() - x.float()).square().sum())
        entry[1] += float(x.float().square().sum())

    def relative(self) -> dict[str, float]:
        """Relative errors by name, in the order in which the names were added."""
        return {name: (e / n) ** 0.5 if n else 0.0 for name, (e, n) in self._squares.items()}


@contextmanager
def quantized_activations(
    model: Any, format_name: str, granularity: str, calibration: Sequence[Tensor]
) -> Iterator[Errors]:
    """Within the block every matrix of the layers has rounded weights (one scale per output) and rounded inputs.

    The vocabulary's matrices stay as they are. Afterwards the model is what it was.

    Args:
        model: of transformers.
        format_name: a key of :data:`FORMATS`.
        granularity: of :data:`GRANULARITIES`.
        calibration: batches ``(B, T)`` of token ids, for the scales of ``tensor``: the largest absolute input of each layer.

    Yields:
        The errors of the inputs that have been seen so far.

    Raises:
        ValueError: an unknown format or granularity.
        QuantizationError: a model without linear layers.
    """
    if format_name not in FORMATS:
        raise ValueError(f"activations: expected a format of {', '.join(FORMATS)}; got {format_name!r}")
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"activations: expected one of {', '.join(GRANULARITIES)} behind the format; got {granularity!r}"
        )
    fmt = FORMATS[format_name]
    layers = inner_layers(model)
    if not layers:
        raise QuantizationError("activations: the model has no linear layers besides the vocabulary's")
    largest = _largest_inputs(model, layers, calibration) if granularity == "tensor" else {}
    errors = Errors()

    def rounding(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = inputs[0]
            scale = largest[name] if granularity == "tensor" else x.abs().amax(-1, keepdim=True)
            rounded = round_to(x, fmt, scale)
            errors.add(name, x, rounded)
            return (rounded, *inputs[1:])

        return hook

    kept = {name: module.weight.data for name, module in layers.items()}
    handles = [module.register_forward_pre_hook(rounding(name)) for name, module in layers.items()]
    try:
        for module in layers.values():
            inputs = 0 if type(module).__name__ == "Conv1D" else 1
            weight = module.weight.data
            module.weight.data = round_to(weight, fmt, weight.abs().amax(inputs, keepdim=True))
        yield errors
    finally:
        for handle in handles:
            handle.remove()
        for name, module in layers.items():
            module.weight.data = kept[name]


@torch.no_grad()
def _largest_inputs(model: nn.Module, layers: Mapping[str, Any], calibration: Sequence[Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def watching(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            value = inputs[0].abs().max()
            found[name] = torch.maximum(found[name], value) if name in found else value

        return hook

    handles = [module.register_forward_pre_hook(watching(name)) for name, module in layers.items()]
    try:
        device = next(model.parameters()).device
        body = getattr(model, "base_model", model)  # no vocabulary logits needed
        for batch in calibration:
            body(input_ids=batch.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    unseen = sorted(set(layers) - set(found))
    if unseen:
        raise QuantizationError(f"activations: {unseen[0]} got no input on the calibration text, so it has no scale")
    return found


@contextmanager
def quantized_cache(model: nn.Module, bits: int | str) -> Iterator[list[Errors]]:
    """Within the block attention sees keys and values as rounded by a cache of few bits.

    Each head of each token has a scale and an offset of its own (asymmetric, from its smallest to its largest entry), keys
    after rotary embedding, as transformers' quantized caches keep them; no recent tokens are spared. ``"fp8"``: as
    ``Fp8Cache`` rounds them, pages of 64 tokens with a scale for each head.

    Args:
        model: of transformers, whose attention goes through ``AttentionInterface``.
        bits: of an entry, 2 to 8, or ``"fp8"``.

    Yields:
        The errors seen so far, a layer, under ``key``, ``value`` and ``output``. That of an attention output is of the layer
        alone: queries, and the keys and values before rounding, are the same for both.

    Raises:
        ValueError: other bits.
    """
    from softpick.integrations.transformers import intercept_attention
    from softpick.integrations.transformers_fp8 import through_fp8

    if bits != "fp8" and (isinstance(bits, str) or not 2 <= bits <= 8):
        raise ValueError(f"kv_cache: expected 2 to 8 bits or fp8, got {bits}")
    errors: list[Errors] = []
    of_layer: dict[int, Errors] = {}

    def rounded(x: Tensor) -> Tensor:
        if isinstance(bits, str):
            return through_fp8(x)
        steps = (1 << bits) - 1
        low, high = x.float().aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / steps).clamp(min=torch.finfo(torch.float32).tiny)
        return (((x.float() - low) / scale).round() * scale + low).to(x.dtype)

    def around(name: str, function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if id(module) not in of_layer:
                of_layer[id(module)] = Errors()
                errors.append(of_layer[id(module)])
            near_key, near_value = rounded(key), rounded(value)
            exact = function(module, query, key, value, *args, **kwargs)[0]
            result = function(module, query, near_key, near_value, *args, **kwargs)
            for what, x, y in (("key", key, near_key), ("value", value, near_value), ("output", exact, result[0])):
                of_layer[id(module)].add(what, x, y)
            return result

        return attention

    with intercept_attention(model, around):
        yield errors
    if not errors:
        raise QuantizationError(
            f"kv_cache: no attention was seen in {type(model).__name__}: expected a transformers model whose attention goes "
            "through AttentionInterface"
        )
