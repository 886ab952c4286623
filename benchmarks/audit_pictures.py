"""The pictures of docs/audit.md, from the results of an audit: where sinks are, where the outlier rises, what rounding costs.

python benchmarks/audit_pictures.py RESULTS.json FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from softpick.experiment.figures import COLORS, new_figure, save_figures

SHOWN = ("int8-tensor", "int8-token", "int8-group", "fp8-tensor", "fp8-token", "int4-weights")


def sinks(run: dict[str, Any]) -> Any:
    """Mean weight on the first token, a cell a head."""
    alpha = run["measurements"]["sink"]["first"]["alpha"]
    figure, (ax,) = new_figure(width=4.6)
    image = ax.imshow(alpha, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    ax.grid(visible=False)
    ax.set(xlabel="head", ylabel="layer", title="mean weight on the first token")
    figure.colorbar(image, ax=ax, shrink=0.8)
    return figure


def outliers(run: dict[str, Any]) -> Any:
    """Largest and median |x| of the residual stream after each layer."""
    layers = run["measurements"]["hidden"]["per_layer"]
    figure, (ax,) = new_figure(width=5.6)
    at = [layer["layer"] for layer in layers]
    ax.plot(at, [abs(layer["top"][0]["value"]) for layer in layers], "o-", color=COLORS[1], label="largest")
    ax.plot(at, [layer["median_abs"] for layer in layers], "s-", color=COLORS[0], label="median", markersize=3.5)
    top = max(layers, key=lambda layer: abs(layer["top"][0]["value"]))
    place = top["layer"], abs(top["top"][0]["value"])
    ax.annotate(
        f"channel {top['top'][0]['channel']}, position {top['top'][0]['position']}",
        place,
        (0.55, 0.8),
        fontsize=8,
        textcoords="axes fraction",
    )
    ax.set(yscale="log", xlabel="layer", ylabel="|x|", title="residual stream")
    ax.legend(frameon=False)
    return figure


def cost(run: dict[str, Any]) -> Any:
    """Change of perplexity by scheme: as it is, with a few layers in 16 bits, with the best remedy."""
    found = run["cost"]
    whole = {entry["name"]: entry["change_percent"] for entry in found["schemes"]}
    kept = {entry["scheme"]: entry.get("change_percent") for entry in found["keep"]}
    best: dict[str, float] = {}
    for entry in found["remedies"]:
        if entry["change_percent"] is not None:
            best[entry["scheme"]] = min(best.get(entry["scheme"], float("inf")), entry["change_percent"])
    figure, (ax,) = new_figure(width=6.4)
    for index, (label, values) in enumerate(
        (("all layers", whole), ("a few layers in 16 bits", kept), ("best remedy", best))
    ):
        points = [
            (i + 0.27 * (index - 1), values[name]) for i, name in enumerate(SHOWN) if values.get(name) is not None
        ]
        bars = ax.bar([x for x, _ in points], [y for _, y in points], 0.25, color=COLORS[index], label=label)
        ax.bar_label(bars, [f"{y:+.1f}" for _, y in points], fontsize=7)
    ax.set_xticks(range(len(SHOWN)), SHOWN, fontsize=8)
    ax.set_yscale("symlog", linthresh=10)
    ax.set(ylabel="change of perplexity, %", title="cost of rounding")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.legend(frameon=False)
    return figure


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    run = json.loads(given.results.read_text(encoding="utf-8"))["runs"][0]
    made = {
        "audit-sinks": sinks(run),
        "audit-outliers": outliers(run),
        "audit-cost": cost(run) if run.get("cost") else None,
    }
    for path in save_figures(given.folder, made):
        print(path)


if __name__ == "__main__":
    main()
