"""What quantization costs, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softpick.experiment.figures import COLORS, as_label, new_figure, save_figures
from softpick.quantization.methods import METHODS, Method

__all__ = ["figure_of", "write_plots"]


def write_plots(folder: str | Path, report: dict[str, Any]) -> list[Path]:
    """Write ``weights.png`` (as the paper's figure 3) and ``activations.png``, those for which there are figures.

    Args:
        folder: is there.
        report: of ``softpick.quantization.quantize.quantize``.

    Returns:
        The files that were written.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    return save_figures(folder, {"weights": _weights(report), "activations": _activations(report)})


def _metrics(report: dict[str, Any]) -> list[tuple[str, str | None]]:
    from softpick.evaluation.tasks import HEADLINES

    return [("perplexity", None), *((task, HEADLINES[task][0]) for task in report["settings"]["tasks"])]


def figure_of(cell: dict[str, Any], task: str, metric: str | None) -> float | None:
    """What a table or plot shows of a cell: its perplexity (no metric), or a task's number, accuracies in percent."""
    if metric is None:
        return cell["perplexity"]
    value = cell["tasks"].get(task, {}).get(metric)
    return None if value is None else 100 * value if metric.startswith("acc") else value


def _weights(report: dict[str, Any]) -> Any:
    runs, metrics = report["runs"], _metrics(report)
    if not any(cell["kind"] == "weights" for cell in runs[0]["cells"]):
        return None
    columns = min(len(metrics), 3)
    figure, axes = new_figure(columns, 4.6 * columns, -(-len(metrics) // columns))
    for ax in axes[len(metrics) :]:
        ax.set_visible(False)
    axes = axes[: len(metrics)]
    for ax, (task, metric) in zip(axes, metrics, strict=True):
        bits: set[int] = set()
        for index, run in enumerate(runs):
            color = COLORS[index % len(COLORS)]
            base = figure_of(run["cells"][0], task, metric)
            if base is not None:
                ax.axhline(base, color=color, linewidth=1, alpha=0.5)
                ax.plot([], [], color=color, linewidth=1, alpha=0.5, label=as_label(f"{run['title']}, unquantized"))
            for method in dict.fromkeys(c["method"] for c in run["cells"] if c["kind"] == "weights"):
                points = [
                    (c["bits"], figure_of(c, task, metric))
                    for c in run["cells"]
                    if c["kind"] == "weights" and c["method"] == method
                ]
                shown = [(x, y) for x, y in points if y is not None]
                bits |= {x for x, _ in shown}
                ax.plot(
                    [x for x, _ in shown],
                    [y for _, y in shown],
                    color=color,
                    marker=METHODS.get(method, Method).marker,
                    linestyle=METHODS.get(method, Method).line,
                    markerfacecolor=color if index == 0 else "none",
                    linewidth=1.5,
                    markersize=5,
                    label=as_label(f"{run['title']}, {method}"),
                )
        percent = metric is not None and metric.startswith("acc")
        if not percent:
            _logarithmic(ax)
        name = "perplexity" if metric is None else f"{task} {metric}"
        ax.set(title=name, xlabel="bits of a weight", ylabel="%" if percent else "perplexity (log scale)")
        ax.set_xticks(sorted(bits))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _activations(report: dict[str, Any]) -> Any:
    runs = report["runs"]
    picked = [i for i, cell in enumerate(runs[0]["cells"]) if cell["kind"] in ("activations", "kv_cache")]
    if not picked:
        return None
    figure, (ax,) = new_figure(width=7.2)
    figure.set_figheight(1.2 + 0.36 * len(picked))
    width = 0.8 / len(runs)
    changes: list[float] = [0.0]
    for index, run in enumerate(runs):
        base = run["cells"][0]["perplexity"]
        values = [run["cells"][i]["perplexity"] for i in picked]
        change = [None if v is None or base is None else 100 * (v / base - 1) for v in values]
        changes += [value for value in change if value is not None]
        places = [row + (index - (len(runs) - 1) / 2) * width for row in range(len(picked))]
        heights = [0.0 if value is None else value for value in change]
        bars = ax.barh(places, heights, width, color=COLORS[index % len(COLORS)], label=as_label(run["title"]))
        ax.bar_label(bars, ["beyond numbers" if v is None else f"{v:+.2f} %" for v in change], padding=3, fontsize=8)
    ax.set_xscale("symlog", linthresh=0.1)  # a hundredth of a percent stands beside thousands
    ax.set_xlim(min(-0.01, 6 * min(changes) - 0.05), max(1.0, 8 * max(changes)))  # room for the numbers
    ax.set_yticks(range(len(picked)), [runs[0]["cells"][i]["title"] for i in picked])
    ax.invert_yaxis()
    ax.set(xlabel="change of the perplexity, % (linear below 0.1)", title="Rounded activations, keys and values")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _logarithmic(ax: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=range(1, 10) if high / low < 10 else (1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
