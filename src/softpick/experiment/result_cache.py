"""Results of long work, kept in a folder by what they depend on: the same command goes on after the last finished one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from softpick.experiment.files import OutputError, read_json, text_digest, write_json, writing

__all__ = ["ResultCache", "stamps", "titles"]


class ResultCache:
    """The finished results of one command, each by its key.

    A result is a file ``PREFIX-DIGEST.json`` that says that it is one, and of which key. Version 0.1 wrote the bare value.

    Args:
        folder: where they are kept; None keeps nothing.
        prefix: with which their files begin; no other file is touched.
    """

    def __init__(self, folder: str | Path | None, prefix: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.prefix = prefix
        self.again = 0  # results that were there
        self._bare: list[Path] = []  # results of version 0.1 that were used: their names are hashes of our keys

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns (something for JSON), or what it returned the last time for the same key.

        Args:
            key: all that the result depends on, for JSON.
            make: does the work.

        Raises:
            OutputError: the result's file holds something else, or cannot be written.
        """
        file = self.file(key)
        if file is None:
            return make()
        if file.is_file():
            value = self._read(file)
            self.again += 1
            return value
        value = make()
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"format": _FORMAT, "name": file.stem, "digest": _digest(value), "value": value})
        return value

    def has(self, key: Any) -> bool:
        """Whether the result of a key is there."""
        file = self.file(key)
        return file is not None and file.is_file()

    def file(self, key: Any, suffix: str = ".json") -> Path | None:
        """Where the result of a key is kept."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return None if self.folder is None else self.folder / f"{self.prefix}-{digest}{suffix}"

    def _read(self, file: Path) -> Any:
        found = read_json(file)
        if not isinstance(found, dict) or "format" not in found:
            self._bare.append(file)
            return found
        if (
            found["format"] != _FORMAT
            or found.get("name") != file.stem
            or found.get("digest") != _digest(found.get("value"))
        ):
            raise OutputError(
                f"output: {file} was changed since softpick wrote it; remove it, or choose another --output"
            )
        return found["value"]

    def forget(self) -> None:
        """Remove the results, those of other keys as well; nothing that does not say that it is one."""
        if self.folder is None:
            return
        for file in self.folder.glob(f"{self.prefix}-{'[0-9a-f]' * 16}.json"):
            if file in self._bare or _is_result(file):
                file.unlink()


_FORMAT = "softpick part 1"


def _digest(value: Any) -> str:
    return text_digest(json.dumps(value, sort_keys=True))


def _is_result(file: Path) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == _FORMAT and found.get("name") == file.stem


def stamps(files: Iterable[Path]) -> list[Any]:
    """Names, sizes and times of files, for the key of a result that depends on what is in them."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def titles(names: Sequence[str]) -> list[str]:
    """The shortest ends of the names that differ from each other."""
    paths = [Path(name).parts or (name,) for name in names]
    for count in range(1, max(map(len, paths)) + 1):
        found = ["/".join(path[-count:]) for path in paths]
        if len(set(found)) == len(found):
            return found
    return list(names)


Parts = ResultCache  # the name in version 0.1
