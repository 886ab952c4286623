"""Reporters: what shows the progress and the messages of long work, on a terminal or in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["ProgressBar", "Reporter", "Silent", "Titled"]


class ProgressBar(Protocol):
    """One piece of work."""

    def update(self, step: int, loss: float | None, note: str = "") -> None:
        """``step`` steps are done; ``loss`` is the latest training loss, None where there is none; ``note`` goes behind it."""


class Reporter(Protocol):
    """What long-running work reports its progress to."""

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


class Titled:
    """A reporter whose lines and bars begin with what they are about.

    Args:
        reporter: gets them.
        title: comes first.
        says: whether it also passes on lines, and not bars alone.
    """

    def __init__(self, reporter: Reporter, title: str, says: bool = True) -> None:
        self._reporter, self._title, self._says = reporter, title, says

    def say(self, text: str) -> None:
        """The line, behind the title."""
        if self._says:
            self._reporter.say(f"{self._title}: {text}")

    def progress(self, label: str, total: int) -> AbstractContextManager[ProgressBar]:
        """The bar, behind the title."""
        return self._reporter.progress(f"{self._title}: {label}", total)
