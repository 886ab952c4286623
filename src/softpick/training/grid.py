"""``softpick grid``: many runs of one recipe from one command, for variants of its attention and several seeds.

The folder of a grid::

    results.jsonl           one line a finished run: figures, probes and curves; all that a report needs
    report.md, *.png        tables and figures of results.jsonl
    tokens/                 tokenizer and token files, shared by the runs
    runs/VARIANT-sSEED/     the folder of each run (softpick.training.pretrain): its model, or its last checkpoint

A run that has its line in ``results.jsonl`` is never repeated, even where its folder is gone: that file is all that has to
be brought from one machine to the next. A run without a line goes on from its checkpoint, if ``runs`` still has one.
"""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from softpick.experiment.environment import chosen_device, device_line
from softpick.experiment.progress import Reporter, Silent, Titled
from softpick.normalizers import get_normalizer
from softpick.training.packed import describe
from softpick.training.prepare import data_digest, share_tokens
from softpick.training.recipes import Recipe, RecipeError

if TYPE_CHECKING:
    from softpick.experiment.stopping import StopRequest

__all__ = ["SWITCHES", "Run", "grid", "make_runs", "read_rows"]

SWITCHES = {"gate": "output_gate", "scale": "score_scale"}
"""What may follow a normalizer in the name of a variant, and the field of the recipe that it switches on."""

_WATCHING = {"log_every", "save_every", "evaluate_every", "probe_every"}  # when a run is looked at, not what it becomes
_EARLY = 0.1  # of the steps: gradient norms peak there, if anywhere


@dataclass(frozen=True)
class Run:
    """One run of a grid: the name of its variant, and the recipe with its seed."""

    variant: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """The run's name: of its folder, and in messages."""
        return f"{self.variant}-s{self.recipe.seed}"


def make_runs(recipe: Recipe, variants: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs of a grid, all variants of the first seed first.

    Args:
        recipe: what the runs have in common.
        variants: ``NORMALIZER``, followed by any of ``+gate``, ``+scale`` and ``+FIELD=VALUE`` of the recipe, for example
            ``softpick+scale+gate`` or ``softmax+learning_rate=1e-3``.
        seeds: of initial weights and data order.

    Raises:
        RecipeError: for a variant that cannot be, or one that is there twice.
    """
    named = [_variant(text, recipe) for text in variants]
    runs = [Run(name, replace(changed, seed=seed)) for seed in seeds for name, changed in named]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"normalizers, seeds: expected each run once, got {', '.join(twice)} more than once")
    if not runs:
        raise RecipeError("normalizers, seeds: expected at least one of each, got none")
    for run in runs:
        run.recipe.check()
    return runs


def _variant(text: str, recipe: Recipe) -> tuple[str, Recipe]:
    normalizer, *options = text.split("+")
    try:
        get_normalizer(normalizer)
    except ValueError as error:
        raise RecipeError(f"normalizers: {error}") from None
    changes = [f"normalizer={normalizer}"]
    for option in options:
        if option in SWITCHES:
            changes.append(f"{SWITCHES[option]}=yes")
        elif "=" in option and not option.startswith(("seed=", "normalizer=")) and not set("/\\") & set(option):
            changes.append(option)
        else:
            known = ", ".join(f"+{name}" for name in SWITCHES)
            raise RecipeError(f"normalizers: expected NORMALIZER with {known} or +FIELD=VALUE, got {text!r}")
    return "+".join([normalizer, *sorted(options)]), recipe.override(changes)


def grid(
    recipe: Recipe,
    variants: Sequence[str],
    seeds: Sequence[int],
    output: str | Path,
    *,
    device: str = "auto",
    share: tuple[int, int] = (1, 1),
    minutes: float | None = None,
    command: str = "",
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> list[dict[str, Any]]:
    """Train what a grid still lacks, and write its report.

    Args:
        recipe: what the runs have in common.
        variants: as for :func:`make_runs`.
        seeds: as for :func:`make_runs`.
        output: folder of the grid.
        device: as for :func:`softpick.training.pretrain.train`.
        share: ``(i, n)`` trains only runs ``i``, ``i + n``, ... (from 1), for ``n`` processes with a GPU each.
        minutes: after them the run in progress stops at a checkpoint.
        command: as typed, for the rows.
        reporter: gets progress and messages.
        stop: asked during training whether to stop at a checkpoint.

    Returns:
        The rows of the finished runs among those asked for, in their order.

    Raises:
        RecipeError: a variant, the share or the folder does not fit, or torchrun started several ranks.
        softpick.training.data.DataError: the data cannot be used.
        softpick.experiment.stopping.Interrupted: stopped at a checkpoint, by ``stop`` or after ``minutes``.
    """
    from softpick.experiment.stopping import Interrupted, StopRequest
    from softpick.training.grid_report import write_grid_report

    runs = make_runs(recipe, variants, seeds)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("grid: expected one process a run, got several ranks; --share deals runs out to processes")
    number, shares = share
    if not 1 <= number <= shares:
        raise RecipeError(f"share: expected I/N with I from 1 to N, got {number}/{shares}")
    if minutes is not None and not minutes > 0:
        raise RecipeError(f"minutes: expected a number > 0, got {minutes}")
    output, reporter, stop = Path(output), reporter or Silent(), stop or StopRequest()
    output.mkdir(parents=True, exist_ok=True)
    reporter.say(device_line(chosen_device(device)))
    _check_rows(recipe, read_rows(output, reporter))
    try:
        with _deadline(stop, minutes):
            for index, run in enumerate(runs[number - 1 :: shares], 1):
                if _row_of(run, read_rows(output)) is None:
                    if stop.requested:
                        raise Interrupted(f"stopped before {run.name}")
                    said = Titled(reporter, f"{index}/{len(runs[number - 1 :: shares])} {run.name}")
                    _append(output / "results.jsonl", _train(run, output, device, command, said, stop))
    finally:
        rows = read_rows(output)
        wanted = [row for row in (_row_of(run, rows) for run in runs) if row is not None]
        others = [row for row in rows if row not in wanted]  # of earlier commands; the report is of the folder
        if rows:
            write_grid_report(output, wanted + others, len(runs) + len(others), reporter)
    return wanted


def _train(run: Run, output: Path, device: str, command: str, reporter: Reporter, stop: StopRequest) -> dict[str, Any]:
    """Train one run, or go on with it; its row. Training that diverged is a result too."""
    from softpick.training.engine import NonFinite
    from softpick.training.pretrain import train

    folder = output / "runs" / run.name
    shared = output / "tokens" / data_digest(run.recipe, output)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        result = train(run.recipe, folder, device=device, command=command, reporter=reporter, stop=stop, tokens=shared)
    except NonFinite as error:
        reporter.say(f"failed: {error}")
        failed = {"variant": run.variant, "seed": run.recipe.seed, "recipe": run.recipe.to_json()}
        return failed | {"failed": str(error)}
    finally:
        # layers of another variant would be a further version of the same code, of which torch.compile takes only eight
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    share_tokens(folder, shared)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # train describes text in full only where it tokenised that text itself, in the first run
    text = describe(run.recipe.data) or run.recipe.data or "the Python standard library"
    return _row(run, result | {"data": text}, log)


def _row(run: Run, result: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [entry for entry in log if entry["kind"] == "train"]
    keys = [key for key in ("step", "loss", "grad_norm_max") if steps and key in steps[0]]
    early = run.recipe.steps * _EARLY
    peaks = {
        name: max((entry["grad_norm_max"] for entry in steps if (entry["step"] <= early) == first), default=None)
        for name, first in (("early", True), ("late", False))
    }
    taken = ("parameters", "data", "validation_loss", "seconds", "hardware", "versions", "created", "command")
    return {
        "variant": run.variant,
        "seed": run.recipe.seed,
        "recipe": run.recipe.to_json(),
        **{key: result[key] for key in taken},
        **result["speed"],
        "grad_norm_peaks": peaks,
        "skipped_steps": steps[-1]["skipped_steps"] if steps else 0,
        "probes": result["probes"],
        "evaluations": {key: result["curves"][f"eval_{key}"] for key in ("step", "loss")},
        "curve": {key: [entry[key] for entry in steps] for key in keys},
    }


@contextmanager
def _deadline(stop: StopRequest, minutes: float | None) -> Iterator[None]:
    """Ask for a stop after some minutes."""

    def ask() -> None:
        stop.requested = True

    timer = None if minutes is None else threading.Timer(minutes * 60, ask)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def read_rows(output: str | Path, reporter: Reporter | None = None) -> list[dict[str, Any]]:
    """The rows of a grid's ``results.jsonl``, one a run. Lines that are cut short do not count; ``reporter`` is warned."""
    path = Path(output) / "results.jsonl"
    if not path.exists():
        return []
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            if line.strip() and reporter is not None:
                reporter.say(f"{path}, line {number}: was cut short and does not count")
            continue
        rows.setdefault((row["variant"], row["seed"]), row)
    return list(rows.values())


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line in one write: processes with a share each write to the same file."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        cut = size > 0 and file.read(1) != b"\n"
        file.write((b"\n" if cut else b"") + json.dumps(row, ensure_ascii=False).encode() + b"\n")
        os.fsync(descriptor)


def _row_of(run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((row for row in rows if (row["variant"], row["seed"]) == (run.variant, run.recipe.seed)), None)


def _check_rows(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> None:
    """A folder is of one recipe."""
    for row in rows:
        (run,) = make_runs(recipe, [row["variant"]], [row["seed"]])
        now, then = run.recipe.to_json(), row["recipe"]
        keys = [key for key in now if key not in _WATCHING and now[key] != then.get(key)]
        if keys:
            differences = "; ".join(f"{key}: {then.get(key)!r} there, {now[key]!r} now" for key in keys)
            raise RecipeError(
                f"output: results.jsonl holds {run.name} of another recipe ({differences}); choose another --output"
            )
