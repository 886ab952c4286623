"""Plots of what ``softpick evaluate`` found, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softpick.experiment.figures import COLORS, as_label, new_figure, save_figures

__all__ = ["write_plots"]

_MARKERS = "osD^vPX"
_LINES = ("-", "--", "-.", ":")  # so that models with equal figures can both be seen


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
        "markerfacecolor": COLORS[index % len(COLORS)] if index == 0 else "none",
    }


def write_plots(folder: str | Path, report: dict[str, Any]) -> list[Path]:
    """Write ``passkey.png``, ``heads.png`` and ``perplexity.png``, those for which there are figures.

    Args:
        folder: is there.
        report: of ``softpick.evaluation.evaluate.evaluate``.

    Returns:
        The files that were written.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    figures = {name: draw(report["runs"]) for name, draw in _PLOTS.items()}
    return save_figures(folder, figures)


def _trained(ax: Any, runs: list[dict[str, Any]], low: float, high: float) -> None:
    """A line where the sequences of training ended, if it is in sight."""
    lengths = {run["trained_length"] for run in runs if run["trained_length"]}
    for length in sorted(x for x in lengths if low < x < high):
        ax.axvline(length, color="0.45", linestyle="--", linewidth=1)
        ax.annotate(
            f"trained length {length}",
            (length, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -3),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=8,
            color="0.35",
            zorder=1,  # behind the data
        )


def _passkey(runs: list[dict[str, Any]]) -> Any:
    shown = [(i, run) for i, run in enumerate(runs) if run.get("passkey")]
    if not shown:
        return None
    figure, (ax,) = new_figure()
    for i, run in shown:
        x = [found["length"] for found in run["passkey"]]
        y = [found["accuracy"] for found in run["passkey"]]
        errors = [found["accuracy_stderr"] for found in run["passkey"]]
        ax.errorbar(
            x,
            y,
            yerr=errors,
            label=as_label(run["title"]),
            capsize=2,
            linewidth=1.5,
            **_style(i),
        )
    _lengths(ax, [run for _, run in shown])
    ax.set(xlabel="tokens of the prompt", ylabel="correct answers (%)", ylim=(-3, 103), title="Passkey retrieval")
    ax.legend(frameon=False)
    return figure


def _lengths(ax: Any, runs: list[dict[str, Any]]) -> None:
    lengths = sorted({found["length"] for run in runs for found in run["passkey"]})
    ax.set_xticks(lengths, [f"{length}" for length in lengths])
    if len(lengths) > 4:
        ax.tick_params(axis="x", labelrotation=60)
    _trained(ax, runs, lengths[0], lengths[-1])


def _heads(runs: list[dict[str, Any]]) -> Any:
    shown = [(i, run) for i, run in enumerate(runs) if run.get("retrieving")]
    if not shown:
        return None
    figure, axes = new_figure(3, 11.0)
    words = {
        "key_weight": "weight on the key's tokens",
        "mass": "row mass",
        "largest": "largest weight of the row",
    }
    for ax, (name, title) in zip(axes, words.items(), strict=True):
        for i, run in shown:
            heads = run["retrieving"]["heads"]
            for rank, head in enumerate(heads):
                ax.plot(
                    [row["length"] for row in head["by_length"]],
                    [row[name] for row in head["by_length"]],
                    **_style(i),
                    markersize=4,
                    linewidth=1.6 if rank == 0 else 0.8,
                    alpha=1.0 if rank == 0 else 0.45,
                    label=as_label(f"{run['title']} (L{head['layer']}H{head['head']})") if rank == 0 else None,
                )
        ax.set(title=title, xlabel="tokens of the prompt")
        ax.set_ylim(bottom=0)
        _lengths(ax, [run for _, run in shown])
    axes[0].legend(frameon=False, fontsize=8)
    most = max(len(run["retrieving"]["heads"]) for _, run in shown)
    figure.suptitle(f"The {most} heads with the most weight on the key, at the queries that predict it", fontsize=11)
    return figure


def _perplexity(runs: list[dict[str, Any]]) -> Any:
    shown = [(i, run) for i, run in enumerate(runs) if run.get("perplexity")]
    if not shown:
        return None
    figure, (ax,) = new_figure()
    for i, run in shown:
        ranges = [found for found in run["perplexity"]["ranges"] if found["perplexity"] is not None]
        x = [(found["from"] + found["to"]) / 2 for found in ranges]
        y = [found["perplexity"] for found in ranges]
        ax.plot(x, y, label=as_label(run["title"]), markersize=5, linewidth=1.5, **_style(i))
    ax.set_yscale("log")
    _trained(ax, [run for _, run in shown], 1, max(run["perplexity"]["length"] for _, run in shown))
    _plain_ticks(ax)
    ax.set(xlabel="position of the predicted token", ylabel="perplexity (log scale)", title="Perplexity by position")
    ax.legend(frameon=False)
    return figure


def _plain_ticks(ax: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high / low < 1000 else (1,)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


_PLOTS = {"passkey": _passkey, "heads": _heads, "perplexity": _perplexity}
