"""What commands print: tables, notes, progress, how to go on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ConsoleReporter", "going_on", "make_console", "print_report"]


def make_console(wide: bool = False, stderr: bool = False) -> Console:
    """Where a command prints."""
    from rich.console import Console

    console = Console(highlight=False, stderr=stderr)
    # a log file or a pipe has no width of its own: do not fold tables at 80 columns there
    return console if console.is_terminal else Console(highlight=False, stderr=stderr, width=160 if wide else 120)


@contextmanager
def going_on(console: Console, output: str) -> Iterator[None]:
    """Within the block Ctrl-C prints how to continue, and transformers logs errors only."""
    from softpick.experiment.quiet import quiet_transformers
    from softpick.experiment.stopping import Interrupted

    try:
        with quiet_transformers():
            yield
    except (Interrupted, KeyboardInterrupt) as reason:
        what = str(reason) or "interrupted"
        console.print(f"{what}; run the same command again to continue in {output}", markup=False, highlight=False)
        raise SystemExit(130) from None


def print_report(report: dict[str, Any], output: str, console: Console, more: Sequence[str] = ()) -> None:
    """Print the table and the notes of a report of `softpick compare` or `analyze`, and where its files are, ``more`` too."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from softpick.analysis import summary_rows

    runs = report["runs"]
    titles = list(dict.fromkeys(run["title"] for run in runs))
    seeds = len({run["seed"] for run in runs})
    table = Table(box=None, pad_edge=False, header_style="bold", title_style="bold", title_justify="left")
    table.add_column(f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "")
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    for label, values in summary_rows(report, by="normalizer"):
        table.add_row(label, *values)
    console.print()
    for run in runs:
        if run.get("verdict"):
            console.print(run["title"], style="bold", markup=False)
            for sentence in run["verdict"]:
                console.print(Padding(Text(f"- {sentence}"), (0, 0, 0, 2)))
            console.print()
    console.print(table, markup=False)
    console.print()
    for note in report["notes"]:
        console.print(f"- {note}", markup=False, highlight=False)
    folder = Path(output)
    console.print(
        f"\nreport:  {folder / 'report.html'}\nresults: {folder / 'results.json'}", markup=False, soft_wrap=True
    )
    for name in more:
        console.print(f"list:    {folder / name}", markup=False, soft_wrap=True)


class ConsoleReporter:
    """Bars on a terminal, about ten lines a model in a log."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[_Bar | _Lines]:
        """Show how far a job of ``total`` steps is."""
        if not self.console.is_terminal:
            yield _Lines(self.console, label, total)
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        narrow = self.console.width < 100
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16 if narrow else 40),
            TextColumn("{task.completed}/{task.total} {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            label = _shortened(label, self.console.width - (54 if narrow else 78))
            yield _Bar(progress, progress.add_task(label, total=total, loss=""))


def _shortened(label: str, room: int) -> str:
    """A label in so many characters: its beginning and its end, which tells models apart."""
    room = max(room, 12)
    return label if len(label) <= room else f"{label[: room // 2]}…{label[len(label) - (room - room // 2 - 1) :]}"


class _Bar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def update(self, step: int, loss: float | None, note: str = "") -> None:
        fields = {} if loss is None else {"loss": f"loss {loss:.3f} {note}".rstrip()}
        self._progress.update(self._task, completed=step, **fields)


class _Lines:
    def __init__(self, console: Console, label: str, total: int) -> None:
        self._console, self._label, self._total = console, label, total
        self._start, self._first, self._said = time.perf_counter(), 0, 0.0
        self._last = self._start

    def update(self, step: int, loss: float | None, note: str = "") -> None:
        now = time.perf_counter()
        if self._first == 0:  # a resumed run begins in the middle: its pace counts from here
            self._start, self._first = now, step
        done = step / self._total
        if done < 1:
            if loss is None and now - self._last < 5:  # short work: its end only
                return
            if done - self._said < 0.1 and (loss is None or now - self._last < 60):  # ten lines, or one a minute
                return
        self._said, self._last = done, now
        pace = (now - self._start) / (step - self._first) if step > self._first else 0.0
        what = f" steps, loss {loss:.3f}" if loss is not None else ""
        extra = f", {note}" if note else ""
        left = f", {pace * (self._total - step):.0f} s left" if pace and step < self._total else ""
        self._console.print(f"{self._label}: {step}/{self._total}{what}{extra}{left}", markup=False)
