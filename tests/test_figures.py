"""Names of models and variants stand in the legends of every command's figures as they were given."""

import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from softpick.evaluation import plots as evaluation
from softpick.experiment.figures import save_figures
from softpick.quantization import plots as quantization
from softpick.quantization.quantize import markdown
from softpick.training.grid_report import _training
from softpick.training.pretrain import _card

NAMES = [r"$\frac$", "_best", "$a_1$ and $b$", r"a\$b", "$HOME", "two\nlines", "ä_☃ {0} %s", "plain", "__", "$"]


def runs(names):
    """What the figures read of runs with these names."""
    heads = [{"layer": 1, "head": 2, "by_length": [{"length": 8, "key_weight": 0.5, "mass": 1.0, "largest": 0.5}]}]
    kinds = (("base", None), ("weights", 4), *[("activations", None)] * 9)
    return [
        {
            "title": name,
            "variant": name,
            "trained_length": 8,
            "passkey": [{"length": 8, "accuracy": 50.0, "accuracy_stderr": 5.0}],
            "retrieving": {"heads": heads},
            "perplexity": {"length": 16, "ranges": [{"from": 1, "to": 8, "perplexity": 9.0}]},
            "cells": [
                {"kind": kind, "method": "hqq", "bits": bits, "perplexity": 9.0, "tasks": {}, "title": kind}
                for kind, bits in kinds
            ],
            "curve": {"step": [1], "loss": [2.0], "grad_norm_max": [1.0]},
            "probes": [],
        }
        for name in names
    ]


FIGURES = {
    "passkey": lambda found: evaluation._passkey(found),
    "heads": lambda found: evaluation._heads(found),
    "perplexity": lambda found: evaluation._perplexity(found),
    "weights": lambda found: quantization._weights({"runs": found, "settings": {"tasks": []}}),
    "activations": lambda found: quantization._activations({"runs": found}),
    "training": lambda found: _training(found),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_every_name_is_in_the_legend_as_it_stands(figure, tmp_path):
    drawn = FIGURES[figure](runs(NAMES))
    legends = [*drawn.legends, *(ax.get_legend() for ax in drawn.axes)]
    texts = [text for legend in legends if legend is not None for text in legend.get_texts()]
    shown = []
    for text in texts:
        words, formula = text._preprocess_math(text.get_text())
        assert not formula
        shown.append(words.strip())
    for name in NAMES:
        assert any(words.startswith(name) for words in shown), (name, shown)
    assert save_figures(tmp_path, {figure: drawn})[0].stat().st_size > 1000


def test_no_name_breaks_a_table():
    names = [*NAMES, "a|b", "|", "c\r\nd"]
    found = runs(names)
    for run in found:
        run["cells"][1]["weights"] = {"share": 0.5, "error": 0.1, "bits_per_weight": 4.5}
    report = {
        "runs": found,
        "settings": {"tasks": []},
        "title": "two\nlines",
        "notes": ["n|\n1"],
        "meta": {"data": "x\ny"},
    }
    recipe = {"name": "r", "normalizer": "softpick", "steps": 1, "batch_size": 1, "sequence_length": 8}
    result = {
        "recipe": recipe,
        "parameters": 1,
        "data": "a|b\nc.txt",
        "validation_loss": 1.0,
        "probes": [],
        "hardware": "h",
    }
    result |= {"ranks": 1, "seconds": 1.0, "versions": "v", "created": "c", "command": "train 'a|b\nc.txt'"}
    for text in (markdown(report), _card(result)):
        tables = [[]]
        for line in text.split("\n"):
            bars = len(re.findall(r"(?<!\\)\|", line))
            if bars:
                assert line.startswith("| ") or line.startswith("|---")
                assert line.endswith("|")
                tables[-1].append(bars)
            else:
                tables.append([])
        assert all(len(set(table)) <= 1 for table in tables)
    assert "a\\|b c.txt" in text
