"""The command that changes a model: convert."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from typer import Option

from softpick.cli.console import ConsoleReporter, going_on, make_console, print_report
from softpick.cli.options import OUTPUT, require, with_settings
from softpick.conversion.recipes import ConvertSettings
from softpick.experiment.failures import fail

__all__ = ["convert"]


@with_settings(ConvertSettings)
def convert(
    given: dict[str, Any],
    output: str = Option(None, metavar=OUTPUT, help="Folder of the run.  [default: softpick-convert-NORMALIZER]"),
) -> None:
    """Give a pretrained model another normalizer: align its attention layers with the model itself, then distil its logits.
    Running the same command again continues an interrupted run.
    """
    require("transformers", "accelerate", "tokenizers", "numpy")
    if Path(given["model"]).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from softpick.conversion.convert import convert as run
    from softpick.experiment.stopping import StopRequest

    console = make_console()
    folder = output or f"softpick-convert-{given['normalizer']}"
    with going_on(console, folder):
        report = run(ConvertSettings.of_recipe(**given), folder, reporter=ConsoleReporter(console), stop=StopRequest())
    if os.environ.get("RANK", "0") != "0":
        return
    print_report(report, folder, console)
    for line in report["cost"]:
        console.print(f"- {line}", markup=False, highlight=False)
    console.print(f"model:   {Path(folder) / 'model'}", markup=False, soft_wrap=True)
    bad = [name for name, loss in report["losses"].items() if not math.isfinite(loss)]
    if bad:
        fail(f"the held-out loss is not finite ({', '.join(bad)}): the conversion failed", 1)
