"""Files that appear complete or not at all, digests of what was written, and one sentence for what a disk does wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "SCRATCH",
    "DamagedFileError",
    "OutputError",
    "digest",
    "json_text",
    "parse_json",
    "read_json",
    "text_digest",
    "write_json",
    "write_text",
    "writing",
]

SCRATCH = ".softpick"
"""Name of the folder of unfinished work in an output folder."""

_WHOLE = 1 << 24  # bytes up to which a digest covers a file in whole
_END = 1 << 16  # bytes at both ends of a longer one
# how libraries without an OSError of their own (safetensors, tokenizers, torch.save) say that a disk refused
_REFUSED = re.compile(r"os error \d+|I/O error|PytorchStreamWriter|inline_container")


class OutputError(OSError):
    """A file or folder of the output cannot be written, read, or used; the message names it."""


class DamagedFileError(OutputError, ValueError):
    """A file that a command wrote is not as it was written; the message says file and line."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what a disk does wrong while ``path`` is written into an :class:`OutputError` that names the file.

    Args:
        path: what is written inside, a file or a folder.

    Raises:
        OutputError: for an ``OSError``, and for the errors by which safetensors, tokenizers and ``torch.save`` report one.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"output: cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        if not _REFUSED.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise OutputError(f"output: cannot write {path}: {reason}") from error


def json_text(value: Any) -> str:
    """The text that :func:`write_json` writes."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears complete or not at all.

    Raises:
        OutputError: the disk refused.
    """
    write_text(path, json_text(value))


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all.

    Until it is complete it lies in ``.softpick/`` where a command has that folder, so that nothing else need ever be tidied.

    Raises:
        OutputError: the disk refused.
    """
    owned = path.parent / SCRATCH
    temporary = (owned if owned.is_dir() else path.parent) / f".softpick-{secrets.token_hex(8)}.tmp"
    with writing(path):
        try:
            with temporary.open(
                "x", encoding="utf-8", errors="backslashreplace"
            ) as file:  # names of files may be no Unicode
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # some disks say only now that they are full
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_json(path: str | Path, error: type[Exception] = DamagedFileError) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        error: is raised.

    Raises:
        error: the file cannot be read, or holds no JSON; the message names it.
    """
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(), path)
    except (OSError, ValueError) as reason:
        said = str(reason).removeprefix(f"{path}, ")
        raise error(
            f"output: {path} cannot be read as JSON ({said}); put the file back as it was written, or choose another --output"
        ) from reason


def parse_json(text: str | bytes, path: str | os.PathLike[str], line: int = 1) -> Any:
    """What a piece of a file holds.

    Args:
        text: JSON.
        path: of the file, for the message.
        line: where in it the text begins.

    Raises:
        DamagedFileError: it is no JSON; the message says file and line.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DamagedFileError(f"{path}, line {line + error.lineno - 1}: is damaged: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}, line {line}: is damaged: not JSON ({str(error).splitlines()[0]})") from None


def text_digest(text: str) -> str:
    """The :func:`digest` of a file with this text."""
    return _digest(text.encode())


def digest(path: Path) -> str:
    """A digest of a file, or of a folder with everything in it.

    Files of up to 16 MiB by all of their bytes, longer ones by their length and 64 KiB at each end.

    Raises:
        OSError: something in it cannot be read.
    """
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir())
        return _digest("\n".join(f"{digest(path / name)} {name}" for name in names).encode())
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return _digest(file.read())
        head = file.read(_END)
        file.seek(size - _END)
        return _digest(b"%d " % size + head + file.read(_END))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
