"""Long work in parts: what is finished is kept in a folder, so that the same command goes on after the last one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from softpick.failures import read_json

__all__ = ["Parts", "stamps", "titles"]


class Parts:
    """The finished parts of one piece of work.

    Args:
        folder: where they are kept; None keeps nothing.
        prefix: with which their files begin; no other file is touched.
    """

    def __init__(self, folder: str | Path | None, prefix: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.prefix = prefix
        self.again = 0  # parts that were there

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns (something for JSON), or what it returned the last time for the same key.

        Args:
            key: all that the part depends on, for JSON.
            make: does the work.
        """
        file = self._file(key)
        if file is None:
            return make()
        from softpick.training.engine import write_json

        if file.is_file():
            self.again += 1
            return read_json(file)
        value = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, value)
        return value

    def has(self, key: Any) -> bool:
        """Whether a part is there."""
        file = self._file(key)
        return file is not None and file.is_file()

    def _file(self, key: Any) -> Path | None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return None if self.folder is None else self.folder / f"{self.prefix}-{digest}.json"

    def forget(self) -> None:
        """Remove them."""
        if self.folder is not None:
            digest = "[0-9a-f]" * 16  # a user's own file may begin like ours
            for pattern in (f"{self.prefix}-{digest}.json", f".{self.prefix}-{digest}.json.tmp"):
                for file in self.folder.glob(pattern):
                    file.unlink()


def stamps(files: Iterable[Path]) -> list[Any]:
    """Names, sizes and times of files, for the key of a part that depends on what is in them."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def titles(names: Sequence[str]) -> list[str]:
    """As much of the end of each name as tells them apart."""
    parts = [Path(name).parts or (name,) for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-count:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return list(names)
