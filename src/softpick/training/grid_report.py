"""The report of ``softpick grid``: a table of variants, one of single runs, and figures over training."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softpick.analysis.report import DASH, METRICS
from softpick.experiment.figures import COLORS, as_label, new_figure, save_figures
from softpick.experiment.progress import Reporter

__all__ = ["COLUMNS", "value", "variants_table", "write_grid_report"]

_PROBED = (
    "sink_first_0.3",
    "sink_first_normalized_0.3",
    "sink_strongest_0.3",
    "sink_strongest_normalized_0.3",
    "strongest_is_first",
    "kurtosis",
    "hidden_min",
    "hidden_max",
    "massive",
    "zero",
    "tile_64x64",
    "row_mass",
    "zero_rows",
    "dead_heads",
    "dormant_heads",
)
_BY_KEY = {metric.key: metric for metric in METRICS}

COLUMNS: Mapping[str, tuple[str, str]] = {
    "validation_loss": ("validation loss", ".4f"),
    **{
        key: (f"{_BY_KEY[key].label}{', %' * (_BY_KEY[key].unit == '%')}", _BY_KEY[key].style)
        for key in _PROBED
        if key in _BY_KEY
    },
    "grad_norm_early": ("largest gradient norm, first tenth of the steps", ".2f"),
    "grad_norm_late": ("largest gradient norm, after that", ".2f"),
    "tokens_per_second": ("tokens/s", "d"),
    "seconds": ("seconds of training", "d"),
}
"""What the table shows: a key, its title and the style of its numbers."""

_PANELS = (
    ("curve", "loss", "training loss"),
    ("curve", "grad_norm_max", "largest gradient norm"),
    ("probe", "sink_first_0.3", "sink rate > 0.3, first token, %"),
    ("probe", "sink_first_normalized_0.3", "the same, share of row mass, %"),
    ("probe", "kurtosis", "kurtosis of hidden states"),
    ("probe", "dead_heads", "dead heads, %"),
    ("probe", "row_mass", "row mass"),
    ("probe", "zero", "weights that are exactly 0, %"),
)
_LOGARITHMIC = {"loss", "grad_norm_max", "kurtosis"}


def value(row: Mapping[str, Any], key: str) -> float | None:
    """A figure of a run, those of probes after the last step; None where it is missing or not finite."""
    if key.startswith("grad_norm_"):
        found = row.get("grad_norm_peaks", {}).get(key.removeprefix("grad_norm_"))
    elif key in _BY_KEY and key in _PROBED:
        probes = row.get("probes") or [{}]
        found = probes[-1].get(key)
    else:
        found = row.get(key)
    return found if isinstance(found, int | float) and math.isfinite(found) else None


def write_grid_report(folder: str | Path, rows: Sequence[Mapping[str, Any]], expected: int, reporter: Reporter) -> Path:
    """Write ``report.md``, and ``training.png`` where matplotlib is installed.

    Args:
        folder: of the grid.
        rows: at least one, as ``softpick.training.grid.read_rows`` gives them.
        expected: runs of the whole grid.
        reporter: gets a message where matplotlib is missing.

    Returns:
        The report.
    """
    folder = Path(folder)
    trained = [row for row in rows if "failed" not in row]
    recipe = rows[0]["recipe"]
    tokens = recipe["steps"] * recipe["batch_size"] * recipe["sequence_length"]
    lines = [
        f"# {recipe['name']}: {len(rows)} of {expected} runs",
        "",
        f"{tokens:,} tokens a run. Mean over seeds, and in brackets the smallest and the largest where there are several.",
        "",
        *variants_table(trained, [(title, style, partial(value, key=key)) for key, (title, style) in COLUMNS.items()]),
        "",
        *(f"- {row['variant']}, seed {row['seed']}: failed: {row['failed']}" for row in rows if "failed" in row),
        "",
        *_provenance(trained),
    ]
    if trained and importlib.util.find_spec("matplotlib") is None:
        reporter.say("figures: none, matplotlib is not installed: pip install 'softpick[evaluate]'")
    elif trained:
        save_figures(folder, {"training": _training(trained)})
        lines += ["", "![Over training](training.png)"]
    from softpick.experiment.files import write_text

    write_text(folder / "report.md", "\n".join(lines) + "\n")
    return folder / "report.md"


def variants_table(
    rows: Sequence[Mapping[str, Any]], columns: Iterable[tuple[str, str, Callable[[Mapping[str, Any]], float | None]]]
) -> list[str]:
    """A table in Markdown with a column for each variant: means over its seeds, and in brackets the smallest and largest.

    Args:
        rows: one a run, with ``variant`` and ``seed``.
        columns: title, style of the numbers, and the figure of a run (None where it has none); those without any are left
            out.
    """
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = ["| | " + " | ".join(variants) + " |", "|---" * (len(variants) + 1) + "|"]
    groups = [[row for row in rows if row["variant"] == variant] for variant in variants]
    lines.append("| seeds | " + " | ".join(", ".join(str(row["seed"]) for row in group) for group in groups) + " |")
    for title, style, get in columns:
        cells = [[found for row in group if (found := get(row)) is not None] for group in groups]
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(_cell(cell, style) for cell in cells) + " |")
    return lines


def _cell(values: Sequence[float], style: str) -> str:
    if not values:
        return DASH
    text = _number(statistics.fmean(values), style)
    if len(values) == 1:
        return text
    return f"{text} ({_number(min(values), style)} to {_number(max(values), style)})"


def _number(number: float, style: str) -> str:
    if style == "d":
        return f"{number:,.0f}"
    if style == "g":
        return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
    return format(number, style)


def _provenance(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each different hardware, versions, data and command, once."""
    lines = []
    for key in ("data", "hardware", "versions", "command"):
        found = list(dict.fromkeys(str(row[key]) for row in rows))
        lines += [f"- {key}: {text}" for text in found]
    dates = sorted(row["created"] for row in rows)
    return [*lines, f"- created: {dates[0]} to {dates[-1]}"] if dates else lines


def _training(rows: Sequence[Mapping[str, Any]]) -> Any:
    figure, axes = new_figure(columns=4, width=20.0, rows=2)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for ax, (kind, key, title) in zip(axes, _PANELS, strict=True):
        for row in rows:
            steps, values = _series(row, kind, key)
            index = variants.index(row["variant"])
            first = row is next(other for other in rows if other["variant"] == row["variant"])
            line = ("-", "--", ":", "-.")[index // len(COLORS) % 4]
            label = as_label(row["variant"]) if first else None
            ax.plot(steps, values, color=COLORS[index % len(COLORS)], linestyle=line, linewidth=1.2, label=label)
        if key in _LOGARITHMIC:
            ax.set_yscale("log")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
    axes[0].legend(fontsize=8)
    return figure


def _series(row: Mapping[str, Any], kind: str, key: str) -> tuple[list[float], list[float]]:
    if kind == "curve":
        curve = row["curve"]
        return (curve["step"], curve[key]) if key in curve else ([], [])
    points = [(probe["step"], probe[key]) for probe in row["probes"] if key in probe]
    return [step for step, _ in points], [number for _, number in points]
