"""Figures of an audit for an experiment tracker: TensorBoard, trackio or Weights & Biases, by accelerate's trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softpick.analysis.settings import AuditError
from softpick.analysis.verdict import figures
from softpick.experiment.failures import first_line

__all__ = ["check_trackers", "log_figures"]


def check_trackers(names: Sequence[str]) -> None:
    """Raise :class:`AuditError` where a tracker is not installed; before anything is measured."""
    if not names:
        return
    try:
        from accelerate.tracking import get_available_trackers
    except ImportError as error:
        raise AuditError("report_to: needs accelerate: pip install accelerate") from error
    there = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in there:
            raise AuditError(f"report_to: {name} is not installed: pip install {name}")


def log_figures(report: Mapping[str, Any], names: Sequence[str], folder: str | Path, step: int) -> None:
    """Log every figure of every model of a report.

    Args:
        report: of :func:`softpick.analysis.audit.audit`.
        names: trackers. TensorBoard writes into ``folder/tensorboard/MODEL``; the others ask their own settings where to.
        folder: of the audit's output.
        step: the training step that the figures belong to.

    Raises:
        AuditError: a tracker is missing, or does not take the figures.
    """
    check_trackers(names)
    if not names:
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers ask it which process may log
    for name in names:
        for run in report["runs"]:
            where = {"logging_dir": Path(folder) / "tensorboard"} if name == "tensorboard" else {}
            title = run["title"].replace("/", "-") if where else run["title"]
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](title, **where)
                tracker.start()
                tracker.log({f"softpick/{key}": float(value) for key, value in figures(run).items()}, step=step)
                tracker.finish()
            except Exception as error:  # whatever a tracker raises: a network, a key, a disk
                raise AuditError(f"report_to: {name} did not take the figures: {first_line(error)}") from error
