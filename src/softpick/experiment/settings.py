"""Settings of the commands: how a field is described once, and what every number may be. Needs no torch.

A command's settings are a dataclass. :func:`setting` gives a field its default and its help text; the command line makes an
option of it (:mod:`softpick.cli.options`), and :func:`documented` a line of the class's documentation.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = [
    "ATTENTION",
    "DEVICES",
    "DTYPE",
    "FILES",
    "OWN_TEXT",
    "RANGES",
    "TEXT_FIELD",
    "TRUST",
    "Range",
    "Setting",
    "check_memory",
    "check_settings",
    "documented",
    "kinds_of",
    "setting",
    "setting_of",
]

_T = TypeVar("_T")
_COUNT = 2**31 - 1  # what libraries keep in 32 bits
_SEED = 2**32 - 1  # numpy's largest

# Help texts of settings that several commands have.
ATTENTION = "eager, sdpa or a normalizer."
DEVICES = "cpu, cuda, mps, or auto: cuda where there is such a GPU, else mps, else cpu."
DTYPE = "auto (as saved), float32, bfloat16 or float16."
FILES = "Text, JSONL, JSON, CSV, TSV or parquet file, also compressed, or a directory of them."
OWN_TEXT = "sources of the Python standard library"
TEXT_FIELD = "Field or column with the text; a text file has none."
TRUST = "Run Python code that comes with a model or a tokenizer; without this option such code is refused."


@dataclass(frozen=True)
class Setting:
    """What a field of a settings class says about itself besides its type and its default.

    Attributes:
        help: one or two sentences; the command line's help text, and the field's documentation.
        note: what only the documentation of the class adds.
        option: name of the option where it is not the field's; None makes no option.
        metavar: what stands for the value in the help text.
        shown: the default in words, where the default itself (None) says nothing.
        words: values that have a name, for example ``none`` for an empty tuple.
        positional: an argument without a name.
        repeated: the option may be given again, once for each element of a tuple; else a tuple's elements are separated by
            commas.
    """

    help: str = ""
    note: str = ""
    option: str | None = ""
    metavar: str | None = None
    shown: str | None = None
    words: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    positional: bool = False
    repeated: bool = False


def setting(default: Any = dataclasses.MISSING, help: str = "", **more: Any) -> Any:
    """A field of a settings class: its default (left out where there is none), its help text, and more of :class:`Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **more)})


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """What :func:`setting` was given."""
    return field.metadata.get("setting", Setting(option=None))


def documented(cls: type[_T]) -> type[_T]:
    """The class, with the texts of its fields in its documentation. A decorator above ``@dataclass``."""
    lines = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        said = setting_of(field)
        default = f"None: {said.shown}." if said.shown and field.default is None else ""
        lines.append(f"    {field.name}: {' '.join(filter(None, (said.help, said.note, default)))}")
    cls.__doc__ = inspect.cleandoc(cls.__doc__ or "") + "\n\nAttributes:\n" + "\n".join(lines)
    return cls


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
    "step": Range(0),
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
    "evict_after": Range(1),
    "cost_samples": Range(1),
    "knockout_samples": Range(1),
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
        kinds, many = kinds_of(hints[name])
        values = value if many and isinstance(value, tuple | list) else (value,)
        for one in values:
            expected = _wrong(one, kinds, ranges.get(name), many and value is not None)
            if expected is not None:
                raise error_class(f"{spelled(name)}: {expected}, got {reprlib.repr(one)}")


def kinds_of(hint: Any) -> tuple[set[type], bool]:
    """The types of a value, and whether the field is a tuple of such."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [kinds_of(option) for option in typing.get_args(hint)]
        return set().union(*(kinds for kinds, _ in parts)), any(many for _, many in parts)
    if typing.get_origin(hint) is tuple:
        return kinds_of(typing.get_args(hint)[0])[0], True
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
