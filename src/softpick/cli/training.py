"""Commands that train: compare, train, grid."""

from __future__ import annotations

import functools
import math
import os
from typing import TYPE_CHECKING, Any

from typer import Argument, Option

from softpick.cli.console import ConsoleReporter, going_on, make_console, print_report
from softpick.cli.options import OUTPUT, integers, require, split, with_settings
from softpick.experiment.failures import fail
from softpick.experiment.settings import DEVICES, TRUST
from softpick.training.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["compare", "grid", "train"]


@with_settings(Settings, before={"seed": "steps", "seeds": "steps", "output": "device"})
def compare(
    given: dict[str, Any],
    seed: int = Option(None, help="Seed of initial weights and data order.  [default: 0]"),
    seeds: str = Option(None, metavar="0,1,2", help="Several seeds instead of one."),
    output: str = Option(None, metavar=OUTPUT, help="Folder of the run.  [default: softpick-compare-TASK]"),
    resume: bool = Option(
        True, "--resume/--fresh", help="Continue the run in the folder, or rename it and start anew."
    ),
) -> None:
    """Train small Llama-style models that differ only in the normalizer, measure them, write a report. Running the same
    command again continues an interrupted run.
    """
    require("transformers", "accelerate", "tokenizers", "numpy")
    if seed is not None and seeds is not None:
        fail("seeds: give --seed or --seeds, not both")
    given["seeds"] = integers("seeds", seeds) if seeds is not None else None if seed is None else (seed,)
    folder = output or f"softpick-compare-{given['task']}"
    # nothing here needs the network; this also keeps the libraries below from looking
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from softpick.experiment.stopping import StopRequest
    from softpick.training.compare import compare as run

    console = make_console()
    with going_on(console, folder):
        report = run(
            Settings.for_task(**given), folder, fresh=not resume, reporter=ConsoleReporter(console), stop=StopRequest()
        )
    print_report(report, folder, console)
    failed = [run["title"] for run in report["runs"] if not math.isfinite(run["validation_loss"])]
    if failed:
        fail(f"{', '.join(failed)}: the validation loss is not finite: training failed there", 1)


def train(
    recipe: str = Argument(..., help="A name; `softpick recipes` lists them."),
    overrides: list[str] | None = Argument(  # noqa: B008
        None, metavar="[FIELD=VALUE]...", help="Fields of the recipe, for example normalizer=softmax steps=500."
    ),
    output: str = Option(None, metavar=OUTPUT, help="Folder of the run.  [default: softpick-RECIPE-NORMALIZER]"),
    device: str = Option("auto", help=DEVICES),
    trust_remote_code: bool = Option(False, "--trust-remote-code", help=TRUST),
    tensorboard: bool = Option(False, "--tensorboard", help="Also write TensorBoard events."),
) -> None:
    """Pretrain a model from a recipe. Running the same command again continues an interrupted run. Several GPUs: torchrun -m
    softpick train ...
    """
    require("transformers", "accelerate", "tokenizers", "numpy")
    from softpick.training.recipes import get_recipe

    made = get_recipe(recipe).override(overrides or [])
    if made.tokenizer is None and not (made.data or "").startswith("hub:"):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from softpick.experiment.stopping import StopRequest
    from softpick.training.pretrain import train as run

    console = make_console()
    folder = output or f"softpick-{made.name}-{made.normalizer}"
    with going_on(console, folder):
        result = run(
            made,
            folder,
            device=device,
            tensorboard=tensorboard,
            trust_remote_code=trust_remote_code,
            reporter=ConsoleReporter(console),
            stop=StopRequest(),
        )
    if os.environ.get("RANK", "0") == "0":
        _print_training(result, folder, console)
    if not math.isfinite(result["validation_loss"]):
        fail(f"the validation loss is {result['validation_loss']}: training failed", 1)


def grid(
    recipe: str = Argument(..., help="A name; `softpick recipes` lists them."),
    overrides: list[str] | None = Argument(  # noqa: B008
        None, metavar="[FIELD=VALUE]...", help="Fields of the recipe, for all runs."
    ),
    normalizers: str = Option(
        "softmax,softpick",
        help="Comma-separated: a normalizer, followed by any of +gate, +scale and +FIELD=VALUE, for example "
        "softpick+scale+gate or softmax+learning_rate=1e-3.",
    ),
    seeds: str = Option("0", metavar="0,1,2", help="Seeds; each variant is trained with each."),
    share: str = Option("1/1", metavar="I/N", help="Train every Nth run from the Ith on: a process for each GPU."),
    minutes: float = Option(None, help="Minutes after which the run in progress stops at a checkpoint."),
    output: str = Option(None, metavar=OUTPUT, help="Folder of the grid.  [default: softpick-grid-RECIPE]"),
    device: str = Option("auto", help=DEVICES),
) -> None:
    """Train many runs of a recipe, for variants of its attention and several seeds, and put them side by side. Running the
    same command again continues; a finished run is never repeated.
    """
    require("transformers", "accelerate", "tokenizers", "numpy")
    part, _, parts = share.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        fail(f"share: expected I/N, got {share!r}")
    variants, numbers = split(normalizers), integers("seeds", seeds)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from softpick.experiment.reading import DataError
    from softpick.experiment.stopping import Interrupted, StopRequest
    from softpick.training.grid import grid as run
    from softpick.training.recipes import RecipeError, get_recipe

    console = make_console()
    folder = output or f"softpick-grid-{recipe}"
    try:
        made = get_recipe(recipe).override(overrides or [])
        run(
            made,
            variants,
            numbers,
            folder,
            share=(int(part), int(parts)),
            minutes=minutes,
            device=device,
            reporter=ConsoleReporter(console),
            stop=StopRequest(),
        )
    except (RecipeError, DataError) as error:
        fail(str(error))
    except (Interrupted, KeyboardInterrupt) as reason:
        text = f"{reason or 'interrupted'}; run the same command again to continue in {folder}"
        console.print(text, markup=False, highlight=False)
        raise SystemExit(130) from None
    console.print(f"{folder}/report.md", markup=False, highlight=False)


def _print_training(result: dict[str, Any], folder: str, console: Console) -> None:
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"\nvalidation loss {result['validation_loss']:.4f} after {result['seconds']:.0f} s of training")
    if result["speed"]:
        say(", ".join(f"{key.replace('_', ' ')} {value:,.4g}" for key, value in result["speed"].items()) + " (medians)")
    if result["probes"]:
        last = result["probes"][-1]
        figures = ", ".join(f"{key} {last[key]:.4g}" for key in last if key not in ("kind", "step"))
        say(f"probe at step {last['step']}: {figures}")
    say(f"model: {folder}/model\nmetrics: {folder}/metrics.jsonl")
