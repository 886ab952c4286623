"""Figures of all commands: colors, sizes, files; names in figures and in Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["COLORS", "as_cell", "as_label", "new_figure", "save_figures"]


# Okabe and Ito's colours, which colour-blind people tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def as_cell(text: str) -> str:
    """A name for a cell or a heading of Markdown: on one line, without the bar that ends a cell."""
    return " ".join(text.splitlines()).replace("|", r"\|")


def as_label(name: str) -> str:
    """A name for a legend as it stands: matplotlib takes what is between dollars for a formula, and hides names with ``_``."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def save_figures(folder: str | Path, figures: Mapping[str, Any]) -> list[Path]:
    """Write ``NAME.png`` for each figure that is not None; each appears complete or not at all."""
    made = []
    for name, figure in figures.items():
        if figure is not None:
            path = Path(folder) / f"{name}.png"
            temporary = path.with_name(f".{path.name}.tmp")
            figure.savefig(temporary, format="png", dpi=150)
            temporary.replace(path)
            made.append(path)
    return made


def new_figure(columns: int = 1, width: float = 6.4, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its axes, row after row, in the look of all plots.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'softpick[evaluate]'") from error
    figure = Figure(figsize=(width, 4.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes
