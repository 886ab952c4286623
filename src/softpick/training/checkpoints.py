"""Checkpoints of a run: written aside, published complete, chosen by step, removed by what is known of their files.

A checkpoint ``checkpoint-STEP`` holds ``complete.json``, which is written last and names every other file with its digest.
Version 0.1 named no files there; of its checkpoints the files that the Trainer writes are expected.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softpick.experiment.files import digest, write_json

__all__ = ["MARKER", "WRITING", "choose", "clear", "flaw", "last_checkpoint", "publish", "remove_all", "rotate"]

MARKER = "complete.json"
WRITING = ".softpick-writing"
"""Folder in which a checkpoint is written, until it is complete."""

_STEP = re.compile(r"checkpoint-(\d+)")
_EXPECTED = ("config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# what the Trainer, a tokenizer and version 0.1 write into a checkpoint
_TRAINERS = re.compile(
    r"(model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json|(optimizer|scheduler|scaler)"
    r"\.pt|rng_state(_\d+)?\.pth|trainer_state\.json|training_args\.bin|(tokenizer|tokenizer_config|special_tokens_map|vocab|"
    r"added_tokens)\.json|merges\.txt|chat_template\.jinja)"
)


def _all(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of checkpoints, the newest first, complete or not."""
    found = [
        (int(match[1]), p) for p in folder.glob("checkpoint-*") if (match := _STEP.fullmatch(p.name)) and p.is_dir()
    ]
    return sorted(found, reverse=True)


def _marker(path: Path) -> dict[str, Any]:
    found = json.loads((path / MARKER).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("expected an object")
    return found


def flaw(path: Path, run: str = "", marked_only: bool = False) -> str | None:
    """Why a checkpoint cannot be resumed from, or None.

    Args:
        path: its folder.
        run: what identifies the run; a checkpoint of another one is refused.
        marked_only: of checkpoints of version 0.1 the marker is enough.
    """
    try:
        marker = _marker(path)
    except FileNotFoundError:
        return f"{path} was not written to its end"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path / MARKER} cannot be read ({str(error).splitlines()[0]})"
    if marker.get("step", step := int(path.name.rpartition("-")[2])) != step:
        return f"{path} holds step {marker['step']}"
    if run and marker.get("run", run) != run:
        return f"{path} is of another run"
    try:
        return _flaw_of_files(path, marker.get("files"), marked_only)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        return f"{path} cannot be read ({str(error).splitlines()[0]})"


def _flaw_of_files(path: Path, files: dict[str, str] | None, marked_only: bool) -> str | None:
    if files is not None:
        for name, known in files.items():
            if not (path / name).is_file():
                return f"{path / name} is missing"
            if digest(path / name) != known:
                return f"{path / name} is not as it was written"
        return None
    if marked_only:
        return None
    rng = [p.name for p in path.glob("rng_state*.pth")] or ["rng_state.pth"]
    weights = [name for name in _WEIGHTS if (path / name).exists()] or [_WEIGHTS[0]]
    for name in (*_EXPECTED, *weights, *rng):
        if not (path / name).is_file() or not (path / name).stat().st_size:
            return f"{path / name} is missing or empty"
    json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    return None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below a folder, by its step; one that a crash cut short does not count."""
    return next((path for _, path in _all(folder) if flaw(path, marked_only=True) is None), None)


def choose(folder: Path, run: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the newest, by its step, of which nothing is missing; None begins anew.

    Args:
        folder: of the checkpoints.
        run: what identifies the run.
        say: called with a sentence about newer ones that cannot be used.
    """
    flaws = []
    chosen = None
    for _, path in _all(folder):
        why = flaw(path, run)
        if why is None:
            chosen = path
            break
        flaws.append(why)
    then = "training begins anew" if chosen is None else f"training goes on from {chosen.name}"
    for why in flaws:
        say(f"{why}: {then}")
    return chosen


def clear(folder: Path) -> None:
    """Remove what a crash left of a checkpoint that was being written."""
    shutil.rmtree(folder / WRITING, ignore_errors=True)


def publish(folder: Path, step: int, marker: dict[str, Any]) -> Path:
    """Make the checkpoint of a step, which lies complete in :data:`WRITING`, one to resume from.

    Args:
        folder: of the checkpoints.
        step: of the checkpoint.
        marker: what ``complete.json`` contains about it besides its files.
    """
    written = folder / WRITING / f"checkpoint-{step}"
    files = sorted(p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file())
    write_json(written / MARKER, {"step": step} | marker | {"files": {name: digest(written / name) for name in files}})
    target = folder / written.name
    if target.exists():
        _discard(target)
    if target.exists():  # something in it is not known to be ours
        os.rename(target, folder / f"{target.name}.old-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    os.rename(written, target)
    _drop_empty(folder / WRITING)
    return target


def rotate(folder: Path, keep: int) -> None:
    """Remove complete checkpoints but the ``keep`` newest, by their steps."""
    complete = [path for _, path in _all(folder) if flaw(path, marked_only=True) is None]
    for path in complete[max(1, keep) :]:
        _discard(path)


def _drop_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def remove_all(folder: Path) -> None:
    """Remove all checkpoints and their folder, except files that the run did not write."""
    for _, path in _all(folder):
        _discard(path)
    clear(folder)
    _drop_empty(folder)


def _discard(path: Path) -> None:
    """Remove those files of a checkpoint that are known to be its own, and its folder if nothing else is in it."""
    try:
        files = _marker(path).get("files")
    except (OSError, ValueError, RecursionError):
        return  # not known to be ours
    there = [p for p in path.rglob("*") if not p.is_dir()]
    if files is None:
        own = [p for p in there if p.parent == path and _TRAINERS.fullmatch(p.name)]
    else:
        own = [p for p in there if files.get(p.relative_to(path).as_posix()) == digest(p)]
    if len(own) + 1 == len(there):  # at once, so that a crash leaves no half of it
        aside = path.parent / WRITING / f"removed-{secrets.token_hex(8)}"
        aside.parent.mkdir(exist_ok=True)
        os.rename(path, aside)
        shutil.rmtree(aside)
        _drop_empty(aside.parent)
        return
    for file in own:
        file.unlink()
    (path / MARKER).unlink()
