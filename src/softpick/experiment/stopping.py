"""Ctrl-C during long work: the first asks it to stop where it can go on from, the second interrupts. Needs no torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["Interrupted", "StopRequest"]


class Interrupted(Exception):  # noqa: N818 - not an error: the run can be continued
    """Training stopped on request at a checkpoint."""


@dataclass
class StopRequest:
    """Ctrl-C as a wish: the first asks training to stop at a checkpoint, the second interrupts at once."""

    requested: bool = False

    @contextmanager
    def on_signals(self) -> Iterator[StopRequest]:
        """Listen to SIGINT and SIGTERM (in the main thread; elsewhere this does nothing)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            os.write(2, b"\nstopping at the next checkpoint; once more stops at once\n")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
