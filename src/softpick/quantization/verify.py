"""Was a model quantized, how much of it, and how far are its weights from what they were?

The weight that a layer multiplies by is read off the layer itself: its output for the identity matrix. So what is checked is
what runs, whatever format a library keeps weights in.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softpick.experiment.failures import QuantizationError
from softpick.experiment.rounding import inner_layers, linear_layers
from softpick.quantization.methods import loggers

__all__ = [
    "LayerCheck",
    "QuantizationError",
    "Verification",
    "inner_layers",
    "linear_layers",
    "quiet_libraries",
    "tensors",
    "untouched",
    "verify",
    "weight_of",
]

_ROWS = 1 << 24  # entries of the identity that go through a layer at once


@dataclass(frozen=True)
class LayerCheck:
    """One quantized matrix.

    Attributes:
        name: of its module.
        weights: number of its entries.
        error: ``|W' - W| / |W|`` (Frobenius), ``W'`` the weight that the quantized layer multiplies by.
        levels: largest number of different values in a group of ``W'``; at most ``2^bits``.
    """

    name: str
    weights: int
    error: float
    levels: int


@dataclass(frozen=True)
class Verification:
    """What of a model was quantized.

    Attributes:
        layers: every quantized matrix.
        parameters: of the whole model, before.
        share: of the parameters that are quantized.
        error: ``|W' - W| / |W|`` over all quantized matrices together.
        bits_per_weight: on disk, of the quantized matrices, with their scales and offsets; None if it was not saved.
    """

    layers: tuple[LayerCheck, ...]
    parameters: int
    share: float
    error: float
    bits_per_weight: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by name; also the buffers that no file holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def weight_of(module: Any, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(out, in)`` fp32: what a layer multiplies by, from what it makes of the identity.

    Args:
        module: a linear layer, quantized or not.
        features: of its input.
        dtype: of its input.
        device: where it is.
    """
    columns = []
    bias = None if type(module).__name__ == "Conv1D" else getattr(module, "bias", None)
    if bias is not None:
        module.bias = None  # added and subtracted in half precision it would take digits of the weight with it
    try:
        with torch.no_grad():
            nothing = module(torch.zeros(1, features, dtype=dtype, device=device)).float()
            step = max(1, _ROWS // features)
            for first in range(0, features, step):
                rows = torch.zeros(min(step, features - first), features, dtype=dtype, device=device)
                rows.diagonal(first).fill_(1)
                columns.append((module(rows).float() - nothing).T)
    finally:
        if bias is not None:
            module.bias = bias
    return torch.cat(columns, 1)


def untouched(original: nn.Module, quantized: nn.Module, layers: Sequence[str]) -> None:
    """Raise :class:`QuantizationError` unless everything outside some layers is what it was, to the bit and the dtype.

    Norms, embeddings, the vocabulary's projection, and buffers that no file holds (the frequencies of rotary embeddings).
    """
    inside = tuple(f"{name}." for name in layers)
    now = tensors(quantized)
    for name, tensor in tensors(original).items():
        if name.startswith(inside):
            continue
        other = now.get(name)
        if other is None or other.dtype != tensor.dtype or not torch.equal(other, tensor.to(other.device)):
            what = "is gone" if other is None else f"changed ({tensor.dtype} before, {other.dtype} now)"
            raise QuantizationError(f"{name}, which is no matrix of a layer, {what}")


def verify(
    original: nn.Module, quantized: nn.Module, bits: int, group: int | None = None, dtype: torch.dtype = torch.float32
) -> Verification:
    """Compare a quantized model with what it was.

    Args:
        original: before.
        quantized: after; the same names of modules. It runs, which some libraries' saving does not survive: save first.
        bits: that were asked for.
        group: neighbouring inputs of an output that share a scale; None is all inputs of an output.
        dtype: in which the model computes.

    Raises:
        QuantizationError: nothing was quantized, a weight is not finite or has nothing to do with what it was, or a group
            has more levels than ``2^bits``.
    """
    after = dict(quantized.named_modules())
    device = next(quantized.parameters()).device
    layers, squares, norms = [], 0.0, 0.0
    for name, module in linear_layers(original).items():
        if name not in after or type(after[name]) is type(module):
            continue
        weight = module.weight.detach().float().to(device)
        weight = weight.T if type(module).__name__ == "Conv1D" else weight
        now = weight_of(after[name], weight.shape[1], dtype, device)
        if now.shape != weight.shape or not bool(now.isfinite().all()):
            raise QuantizationError(f"{name}: after quantization its weight is {tuple(now.shape)} or not finite")
        square, norm = float((now - weight).square().sum()), float(weight.square().sum())
        squares, norms = squares + square, norms + norm
        error = (square / norm) ** 0.5 if norm else float(square > 0)
        levels = _levels(now, group)
        if square and levels > 1 << bits:
            raise QuantizationError(
                f"{name}: a group of its weights has {levels} different values, more than {bits} bits can tell apart"
            )
        layers.append(LayerCheck(name, weight.numel(), error, levels))
    parameters = sum(p.numel() for p in original.parameters())
    weights = sum(layer.weights for layer in layers)
    error = (squares / norms) ** 0.5 if norms else 0.0
    if not layers or error == 0:
        raise QuantizationError(
            "nothing was quantized: "
            + ("no linear layer was replaced" if not layers else "every weight is what it was, to the bit")
        )
    if error >= 1:
        raise QuantizationError(
            f"the quantized weights have nothing to do with the weights: relative error {error:.3g}"
        )
    return Verification(tuple(layers), parameters, weights / parameters, error)


def _levels(weight: Tensor, group: int | None) -> int:
    """Largest number of different values in a group of neighbours in memory (a last group that is not full is left out)."""
    rows = weight
    if group is not None and weight.numel() >= group:
        rows = weight.flatten()[: weight.numel() // group * group].view(-1, group)
    ordered = rows.sort(1).values
    return int((ordered[:, 1:] != ordered[:, :-1]).sum(1).max()) + 1 if rows.shape[1] > 1 else 1


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let the libraries log errors only: some warn at every product of every forward pass."""
    names = [*loggers(), "torchao", "torch.utils._pytree"]
    found = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in found]
    modules = "|".join(map(re.escape, [*loggers(), "torch", "torchao", "transformers"]))
    try:
        for logger in found:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=rf"({modules})\b")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)
