"""Curves of runs of ``softpick train``, side by side: loss, gradient norm, sinks, kurtosis, zeros.

    python benchmarks/plot_runs.py OUT.png RUN [RUN ...]

A RUN is the folder of one, or a metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PANELS = (
    ("train", "loss", "training loss"),
    ("evaluation", "eval_loss", "validation loss"),
    ("train", "grad_norm_max", "largest gradient norm"),
    ("probe", "sink_first_0.3", "sink rate > 0.3, first token, %"),
    ("probe", "sink_strongest_0.3", "sink rate > 0.3, strongest token, %"),
    ("probe", "kurtosis", "kurtosis of hidden states"),
    ("probe", "zero", "weights that are exactly 0, %"),
    ("probe", "zero_rows", "rows without a weight, %"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    for run in options.runs:
        path = run / "metrics.jsonl" if run.is_dir() else run
        name = run.name if run.is_dir() else run.stem
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for axis, (kind, key, title) in zip(axes.flat, PANELS, strict=True):
            points = [(entry["step"], entry[key]) for entry in entries if entry["kind"] == kind and key in entry]
            axis.plot(*zip(*points, strict=True), label=name, marker="o" * (len(points) < 20))
            axis.set(title=title, xlabel="step")
            if key in ("loss", "eval_loss", "grad_norm_max", "kurtosis"):
                axis.set_yscale("log")
    axes.flat[0].legend()
    figure.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()
