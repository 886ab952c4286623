"""benchmarks/grid_after.py: box plots of the trained models' hidden states."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import numpy
from grid_after import draw_boxes
from matplotlib.axes import Axes
from matplotlib.cbook import boxplot_stats

BOX = {"median": "med", "q1": "q1", "q3": "q3", "whisker_low": "whislo", "whisker_high": "whishi"}


def line(variant, seed, layers=3):
    data = numpy.random.default_rng(seed).standard_t(2, (layers, 500))
    stats = boxplot_stats(data.T)
    boxes = [{ours: float(found[theirs]) for ours, theirs in BOX.items()} for found in stats]
    for box, values in zip(boxes, data, strict=True):
        box |= {"min": float(values.min()), "max": float(values.max())}
    return {
        "variant": variant,
        "seed": seed,
        "hidden": [{"layer": i, "kurtosis": 1.0, "box": b} for i, b in enumerate(boxes)],
    }


def test_boxes_are_those_of_the_first_seed(tmp_path, monkeypatch):
    drawn = []
    real = Axes.bxp
    monkeypatch.setattr(
        Axes, "bxp", lambda self, stats, **options: (drawn.append(stats), real(self, stats, **options))[1]
    )
    lines = [line("softpick", 1), line("softpick", 0), line("softmax", 2), {"variant": "rectified", "seed": 0}]
    draw_boxes(lines, tmp_path / "boxes.png")
    assert (tmp_path / "boxes.png").stat().st_size > 1000
    assert len(drawn) == 2
    for stats, expected in zip(drawn, (line("softpick", 0), line("softmax", 2)), strict=True):
        for found, layer in zip(stats, expected["hidden"], strict=True):
            assert all(found[theirs] == layer["box"][ours] for ours, theirs in BOX.items())
            assert found["fliers"] == [layer["box"]["min"], layer["box"]["max"]]


def test_lines_without_hidden_states_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no line has hidden states"):
        draw_boxes([{"variant": "softmax", "seed": 0}], tmp_path / "boxes.png")
