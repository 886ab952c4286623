"""Pretrain the same model with two normalizers from a recipe, and put what happened side by side.

Run: ``python examples/pretrain_and_compare.py`` (half a minute on one core). Interrupted, the same command goes on.
Needs: ``pip install '.[train]'``. Nothing is downloaded: the text is the Python standard library's source code.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from softpick.training.pretrain import train
from softpick.training.recipes import get_recipe

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--recipe", default="tiny_cpu", help="`softpick recipes` lists the names")
arguments.add_argument("--normalizers", nargs=2, default=["softmax", "softpick"])
arguments.add_argument("--output", type=Path, default=Path("runs/example"))
arguments.add_argument(
    "overrides", nargs="*", metavar="FIELD=VALUE", help="fields of the recipe, for example steps=100"
)
options = arguments.parse_args()

results = {}
for normalizer in options.normalizers:
    recipe = replace(get_recipe(options.recipe).override(options.overrides), normalizer=normalizer)
    # an interrupted run is continued, a finished one is read
    results[normalizer] = train(recipe, options.output / normalizer)

rows = {
    "validation loss": lambda result: result["validation_loss"],
    "largest gradient norm": lambda result: max(result["curves"]["grad_norm"]),
    "kurtosis, last probe": lambda result: result["probes"][-1]["kurtosis"],
    "exact zeros, %": lambda result: result["probes"][-1]["zero"],
    "seconds": lambda result: result["seconds"],
}
print(f"\n{'':24s}" + "".join(f"{name:>16s}" for name in results))
for label, value in rows.items():
    print(f"{label:24s}" + "".join(f"{value(result):16.3f}" for result in results.values()))
