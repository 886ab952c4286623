"""Packed tokens: text tokenised on one machine and brought to another, compressed, in parts.

A packed folder holds::

    packed.json             what the text is; for each token file its size, its hash and its parts
    tokenizer/
    train.tokens.00.xz ...  the token files of a run (softpick.training.token_files), cut and compressed
    validation.tokens.00.xz ...

:func:`unpack` makes of it what ``softpick train`` writes into the folder of a run when it tokenises text itself.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from softpick.experiment.reading import DataError

__all__ = ["TOKEN_FILES", "copy_folder", "describe", "pack", "unpack"]

TOKEN_FILES = ("train.tokens", "validation.tokens")
_FORMAT = "softpick packed 1"
_PART = 2**24  # bytes of tokens in a part: what one core unpacks in a second or two


def pack(source: str | Path, folder: str | Path, description: str) -> int:
    """Compress a run's tokenizer and token files.

    Args:
        source: folder with ``tokenizer/``, ``train.tokens`` and ``validation.tokens``; ids of 16 bits.
        folder: does not exist yet.
        description: what the text is.

    Returns:
        Bytes of the packed folder.

    Raises:
        FileExistsError: there is such a folder.
    """
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True)
    files = {name: _compress(source / name, folder) for name in TOKEN_FILES}
    shutil.copytree(source / "tokenizer", folder / "tokenizer")
    about = {"format": _FORMAT, "description": description, "files": files}
    (folder / "packed.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _compress(path: Path, folder: Path) -> dict[str, Any]:
    data = path.read_bytes()
    # ids of two bytes: the position within an id is told apart
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": _PART, "lp": 1, "pb": 1}]
    starts = range(0, len(data), _PART)
    with ThreadPoolExecutor() as threads:
        parts = threads.map(lambda start: lzma.compress(data[start : start + _PART], filters=filters), starts)
        for part, packed in zip(_parts(path.name, len(starts)), parts, strict=True):
            (folder / part).write_bytes(packed)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "parts": len(starts)}


def _parts(name: str, count: int) -> list[str]:
    return [f"{name}.{number:02d}.xz" for number in range(count)]


def describe(path: str | Path | None) -> str | None:
    """What a packed folder says its text is; None for anything else."""
    about = None if path is None else _about(Path(path))
    return None if about is None else about["description"]


def _about(folder: Path) -> dict[str, Any] | None:
    file = folder / "packed.json"
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"data: {file} is not JSON ({error})") from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise DataError(f"data: {file}: expected the format {_FORMAT!r}")
    return about


def unpack(folder: str | Path, target: str | Path) -> None:
    """Write ``tokenizer/`` and the token files of a packed folder; what is in ``target`` already stays.

    Args:
        folder: as :func:`pack` made it.
        target: a folder; each file in it appears complete or not at all.

    Raises:
        DataError: ``folder`` is no packed folder, or a part of it is missing or damaged.
    """
    folder, target = Path(folder), Path(target)
    about = _about(folder)
    if about is None:
        raise DataError(f"data: {folder} has no packed.json")
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKEN_FILES:
        if not (target / name).exists():
            _write(target / name, _decompress(folder, name, about["files"][name]))
    copy_folder(folder / "tokenizer", target / "tokenizer")


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder that appears complete or not at all; one that is there already stays."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of this number that was killed
    if target.exists():
        return
    shutil.copytree(source, temporary)
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(temporary)  # another process was first


def _decompress(folder: Path, name: str, file: dict[str, Any]) -> bytes:
    try:
        with ThreadPoolExecutor() as threads:
            parts = threads.map(lambda part: lzma.decompress((folder / part).read_bytes()), _parts(name, file["parts"]))
            data = b"".join(parts)
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"data: a part of {name} in {folder} is missing or damaged ({error})") from None
    if len(data) != file["bytes"] or hashlib.sha256(data).hexdigest() != file["sha256"]:
        raise DataError(f"data: {name} in {folder} is not what packed.json says; copy the folder again")
    return data


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
