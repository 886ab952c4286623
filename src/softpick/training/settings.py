"""The settings of `softpick compare`. Needs no torch until they are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from softpick.experiment.settings import (
    DEVICES,
    FILES,
    OWN_TEXT,
    TEXT_FIELD,
    check_memory,
    check_settings,
    documented,
    setting,
)

__all__ = ["TASKS", "Settings", "SettingsError"]

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
"""The tasks and the defaults that show the phenomenon."""


class SettingsError(ValueError):
    """Settings that cannot work, or that do not fit the folder they are to run in."""


def _of_task(name: str, help: str = "", **more: Any) -> Any:
    """A setting whose default depends on the task, and whose help text says so."""
    values = {task: defaults[name] for task, defaults in TASKS.items()}
    alike = len(set(values.values())) == 1
    shown = str(values["text"]) if alike else ", ".join(f"{task} {value}" for task, value in values.items())
    return setting(help=help, shown=shown, **more)


@documented
@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that determines the result. :meth:`for_task` fills in a task's defaults."""

    normalizers: tuple[str, ...] = setting(
        ("softmax", "softpick"), "Comma-separated names; `softpick normalizers` lists them."
    )
    task: str = setting("text", "text: language modelling; backcopy: Bigram-Backcopy (Guo et al. 2024).")
    data: str | None = setting(None, FILES, metavar="PATH", shown=OWN_TEXT)
    text_field: str = setting("text", TEXT_FIELD)
    seeds: tuple[int, ...] = setting(
        (0,), "Seeds of initial weights and data order; each normalizer is trained once for each.", option=None
    )
    steps: int = _of_task("steps", "Training steps.")
    layers: int = _of_task("layers", "Decoder layers.")
    heads: int = _of_task("heads", "Attention heads per layer.")
    width: int = _of_task("width", "Width of the residual stream.")
    sequence_length: int = _of_task("sequence_length", "Tokens of a sequence, BOS included.")
    batch_size: int = _of_task("batch_size", "Sequences per step.")
    learning_rate: float = _of_task("learning_rate", "Largest learning rate; a cosine takes it to 10 %.")
    warmup_steps: int = _of_task("warmup_steps", "Steps of linear warm-up.", note="At most ``steps``.")
    weight_decay: float = _of_task("weight_decay", "Weight decay of AdamW.")
    vocab_size: int = _of_task("vocab_size", "Entries of the byte-level BPE.")
    device: str = setting("auto", DEVICES)

    @classmethod
    def for_task(cls, task: str = "text", **given: Any) -> Settings:
        """Settings of a task; what is given and not None replaces the default.

        Raises:
            SettingsError: for anything that cannot work.
        """
        if task not in TASKS:
            raise SettingsError(f"task: expected one of {', '.join(TASKS)}; got {task!r}")
        from softpick.experiment.environment import chosen_device

        chosen = {"task": task, **TASKS[task], **{name: value for name, value in given.items() if value is not None}}
        settings = cls(**chosen)
        settings = replace(settings, device=chosen_device(settings.device))
        settings.check()
        return settings

    def check(self) -> None:
        """Raise :class:`SettingsError` for settings that cannot work, before any work is done."""
        from softpick.experiment.environment import missing_device
        from softpick.normalizers import get_normalizer

        check_settings(self, SettingsError, spelled=lambda name: name.replace("_", "-"))
        for name in self.normalizers:
            try:
                get_normalizer(name)
            except ValueError as error:
                raise SettingsError(str(error)) from None
        for what, items in (("normalizers", self.normalizers), ("seeds", self.seeds)):
            if not items:
                raise SettingsError(f"{what}: expected at least one")
            if len(set(items)) < len(items):
                raise SettingsError(f"{what}: {', '.join(map(str, items))} names one twice")
        if self.width % self.heads:
            raise SettingsError(f"heads: expected a divisor of the width {self.width}, got {self.heads}")
        if self.width // self.heads % 2:
            raise SettingsError(
                f"heads: rotary positions need an even head dimension; width {self.width} / heads {self.heads} "
                f"is {self.width // self.heads}"
            )
        if self.device not in ("cpu", "cuda", "mps"):
            raise SettingsError(f"device: expected cpu, cuda, mps or auto; got {self.device!r}")
        absent = missing_device(self.device)
        if absent:
            raise SettingsError(f"device: {absent}")
        parameters = self.layers * 12 * self.width**2 + 2 * self.vocab_size * self.width
        check_memory(parameters, self.device, SettingsError)

    def to_json(self) -> dict[str, Any]:
        """As read back from JSON: tuples are lists, the path of the data absolute."""
        data = None if self.data is None else str(Path(self.data).resolve())
        return json.loads(json.dumps(asdict(replace(self, data=data))))
