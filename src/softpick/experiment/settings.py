"""What every number of every command's settings may be, in one table, and the check of it. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RANGES", "TASKS", "Range", "check_memory", "check_settings"]

_COUNT = 2**31 - 1  # what libraries keep in 32 bits
_SEED = 2**32 - 1  # numpy's largest


@dataclass(frozen=True)
class Range:
    """What a number may be.

    Attributes:
        low: the smallest.
        high: the largest.
        above: ``low`` itself is too small.
        infinite: infinity is a value.
        note: why, for the message.
    """

    low: float
    high: float = _COUNT
    above: bool = False
    infinite: bool = False
    note: str = ""

    def wrong(self, value: float, whole: bool, many: bool = False) -> str | None:
        """What was expected, where ``value`` is outside."""
        fine = self.low < value if self.above else self.low <= value
        if fine and value <= (math.inf if self.infinite else self.high) and (self.infinite or math.isfinite(value)):
            return None
        if not whole:
            end = "" if self.infinite else f" and <= {self.high:g}"
            return f"expected a number {'>' if self.above else '>='} {self.low:g}{end}"
        if many:
            return f"expected integers >= {self.low:g} and <= {self.high:,}"
        return f"expected at least {self.low:g}{self.note}" if value < self.low else f"expected at most {self.high:,}"


RANGES: Mapping[str, Range] = {
    # the model
    "layers": Range(1, 10_000),
    "heads": Range(1, 2**16),
    "kv_heads": Range(1, 2**16),
    "width": Range(1, 2**20),
    "intermediate": Range(1, 2**22),
    "vocab_size": Range(258, 2**20, note=" (256 bytes, BOS, EOS, and what was learned)"),
    "sequence_length": Range(2),
    "rope_theta": Range(0.0, 1e18, above=True),
    # training
    "steps": Range(1),
    "warmup_steps": Range(0),
    "batch_size": Range(1),
    "micro_batch_size": Range(1),
    "learning_rate": Range(0.0, 1e6, above=True),
    "weight_decay": Range(0.0, 1e6),
    "max_grad_norm": Range(0.0, above=True, infinite=True),
    "max_skipped": Range(1),
    "log_every": Range(1),
    "save_every": Range(1),
    "evaluate_every": Range(0),
    "probe_every": Range(0),
    "probe_sequences": Range(1),
    "validation_sequences": Range(1),
    "tensor_parallel": Range(1),
    "seed": Range(0, _SEED),
    "seeds": Range(0, _SEED),
    # measuring
    "samples": Range(1),
    "map_tokens": Range(4),
    "bins": Range(1, 100_000),
    "limit": Range(1),
    "num_fewshot": Range(0),
    "passkey": Range(-_COUNT),  # its check has more to say
    "passkey_prompts": Range(1),
    "knockout": Range(-_COUNT),  # the same
    "calibration_samples": Range(1),
    "group_size": Range(1),
    "bits": Range(1, 32),
    "kv_cache": Range(-_COUNT),
}
"""By the name of the field, whichever command has it."""


def check_settings(
    settings: Any,
    error_class: type[ValueError],
    more: Mapping[str, Range] | None = None,
    spelled: Callable[[str], str] = str,
) -> None:
    """Raise unless every field of a dataclass has the type that it says, and every number lies in its range.

    Args:
        settings: a dataclass.
        error_class: what is raised.
        more: ranges that differ from :data:`RANGES`.
        spelled: how a field's name stands in the message.

    Raises:
        ValueError: of ``error_class``: the field, what was expected, what came.
    """
    ranges = {**RANGES, **(more or {})}
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), field.name
        kinds, many = _kinds(hints[name])
        values = value if many and isinstance(value, tuple | list) else (value,)
        for one in values:
            expected = _wrong(one, kinds, ranges.get(name), many and value is not None)
            if expected is not None:
                raise error_class(f"{spelled(name)}: {expected}, got {reprlib.repr(one)}")


def _kinds(hint: Any) -> tuple[set[type], bool]:
    """The types of a value, and whether the field is a tuple of such."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [_kinds(option) for option in typing.get_args(hint)]
        return set().union(*(kinds for kinds, _ in parts)), any(many for _, many in parts)
    if typing.get_origin(hint) is tuple:
        return _kinds(typing.get_args(hint)[0])[0], True
    return {hint}, False


def _wrong(value: Any, kinds: set[type], allowed: Range | None, many: bool) -> str | None:
    numbers = kinds & {int, float}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and numbers and (float in kinds or isinstance(value, int)):
        return None if allowed is None else allowed.wrong(value, float not in kinds, many)
    if type(value) in kinds or (str in kinds and isinstance(value, str)):
        return None
    names = {int: "an integer", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
    wanted = [
        names.get(kind, getattr(kind, "__name__", str(kind))) for kind in (int, float, str, bool) if kind in kinds
    ]
    return f"expected {' or '.join(wanted + (['None'] if type(None) in kinds else []))}"


def check_memory(parameters: int, device: str, error_class: type[ValueError]) -> None:
    """Raise where the memory of this machine cannot hold a model that is to be trained, before the system ends the process.

    Args:
        parameters: of the model.
        device: on the CPU weights, gradients and AdamW's two moments are there (16 bytes a parameter); for another device
            the weights alone, which are drawn on the CPU (4 bytes).
        error_class: what is raised.
    """
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return  # a system that does not say
    needed = parameters * (16 if device == "cpu" else 4)
    if needed > there:
        raise error_class(
            f"width, layers, vocab_size: {parameters:,} parameters need {needed / 2**30:,.0f} GiB of memory to train, and "
            f"this machine has {there / 2**30:,.0f}; expected fewer"
        )


TASKS: Mapping[str, Mapping[str, Any]] = {
    # Sinks need weight decay, a large learning rate, short sequences and enough steps; softpick needs the warm-up to reach
    # softmax's loss. docs/log.md has what was tried.
    "text": {
        "steps": 3000,
        "layers": 3,
        "heads": 8,
        "width": 64,
        "sequence_length": 64,
        "batch_size": 16,
        "learning_rate": 5e-3,
        "warmup_steps": 100,
        "weight_decay": 1.0,
        "vocab_size": 512,
    },
    # one layer and one head, as in Guo et al. 2024
    "backcopy": {
        "steps": 1500,
        "layers": 1,
        "heads": 1,
        "width": 64,
        "sequence_length": 64,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "vocab_size": 512,
    },
}
"""The tasks of `softpick compare` and the defaults that show the phenomenon."""
