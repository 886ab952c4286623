"""Who is told how far long work is. ``rich.progress`` and a plain log both fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["ProgressBar", "Reporter", "Silent"]


class ProgressBar(Protocol):
    """One piece of work."""

    def update(self, step: int, loss: float | None, note: str = "") -> None:
        """``step`` steps are done; ``loss`` is the latest training loss, None where there is none; ``note`` goes behind it."""


class Reporter(Protocol):
    """Whom long work tells what it does."""

    def say(self, text: str) -> None:
        """One line for people."""

    def progress(self, label: str, total: int) -> AbstractContextManager[ProgressBar]:
        """A bar over ``total`` steps."""


class Silent:
    """A reporter that says nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Silent]:
        """Itself."""
        yield self

    def update(self, step: int, loss: float | None, note: str = "") -> None:
        """Nothing."""
