"""The output folder of a command: one process owns it, and nothing in it is replaced that softpick did not write.

While a command works, ``.softpick/`` in its output folder holds the lock and everything that is not finished. Outputs are
written there, their digests are recorded, and then they are moved into the folder, the one that marks the end last.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from softpick.experiment.files import SCRATCH, OutputError, digest, read_json, write_json, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LAST", "SCRATCH", "Ledger", "Workspace", "scratch"]

LAST = "results.json"
"""The output that marks the end of a command: it is put in place after all others."""

_LOCK, _LEDGER, _DATA = "lock", "files.json", "data"
_OWNERS = re.compile(rb"(\d+ on \S*\n\S*\n?)?")  # a lock's text; killed while it is written, an older one's end follows
_PROBE = 1 << 16  # bytes that must fit on the disk before work begins
_held: dict[tuple[str, int], Workspace] = {}


def scratch(output: str | Path) -> Path:
    """Where unfinished work of an output folder lies."""
    return Path(output) / SCRATCH


class Ledger:
    """Which files softpick wrote in a folder, by their digests: the entry ``files`` of a JSON file.

    Args:
        path: of the JSON file; need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, list[str]]:
        """Digests by name; empty where nothing was recorded."""
        if not self.path.exists():
            return {}
        found = read_json(self.path)
        files = found.get("files", {}) if isinstance(found, dict) else {}
        return files if isinstance(files, dict) else {}

    def add(self, digests: dict[str, str]) -> None:
        """Record digests beside those that are known, before the files are moved to their final paths."""
        whole = read_json(self.path) if self.path.exists() else {}
        files = dict(whole.get("files", {}))
        for name, value in digests.items():
            files[name] = list(dict.fromkeys([*files.get(name, []), value]))
        write_json(self.path, whole | {"files": files})

    def knows(self, name: str, path: Path) -> bool:
        """True if softpick wrote the file at ``path`` under this name and it is unchanged since."""
        known = self.read().get(name, [])
        return bool(known) and digest(path) in known


class Workspace:
    """An output folder, from the first check to the last file. A context manager; inside another one of the same folder (and
    thread) it is that one.

    Entering makes the folder if need be, proves that it can be written to, takes its lock, and removes what a killed process
    left unfinished. Leaving removes what is unfinished, the lock, and a folder that was made and stayed empty. The lock is
    released by the kernel when its process dies.

    Args:
        output: the folder.
        error: is raised for a folder that cannot be used.
        outputs: names of files that the command will write, in the order in which an error names them.
        forget: removes the parts of a command that is finished; is given the folder.
        ledger: name of the file in ``output`` that records what was written; None keeps the record until the end only.

    Raises:
        error: the folder is a file, cannot be written to, is used by another process, or holds one of ``outputs`` that an
            interrupted command did not write.
    """

    def __init__(
        self,
        output: str | Path,
        *,
        error: type[Exception] = OutputError,
        outputs: Sequence[str] = (),
        forget: Callable[[Path], None] | None = None,
        ledger: str | None = None,
    ) -> None:
        self.folder, self.error, self.outputs, self.forget = Path(output), error, tuple(outputs), forget
        if not os.fspath(output):
            self._fail("expected a path, got ''")
        self._ledger = ledger
        self._made: list[Path] = []
        self._handle: int | None = None

    @property
    def scratch(self) -> Path:
        """For unfinished work; removed with all that is in it."""
        return scratch(self.folder)

    @property
    def ledger(self) -> Ledger:
        """What was written."""
        return Ledger(self.scratch / _LEDGER if self._ledger is None else self.folder / self._ledger)

    def __enter__(self) -> Workspace:
        self._key = (os.path.abspath(self.folder), threading.get_ident())
        self._entered = _held.get(self._key, self)
        if self._entered is not self:
            return self._entered
        try:
            self._open()
            _held[self._key] = self
            self._clear()  # what a killed process left; the folder is locked, so nobody is writing it
            self._refuse_others()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered is self:
            self._close()

    def entries(self) -> set[str]:
        """Names in the folder, without those of unfinished work."""
        return {p.name for p in self.folder.iterdir() if p.name != SCRATCH}

    def finish(self, names: Iterable[str], say: Callable[[str], None] | None = None) -> None:
        """Move finished outputs from :attr:`scratch` to their final paths, in this order.

        Args:
            names: of files or folders in :attr:`scratch`.
            say: called with a sentence where an output stays as it is, because it was changed since softpick wrote it; None
                makes that an error.

        Raises:
            OutputError: something that softpick did not write lies at one of the paths, or the disk refused.
        """
        names = list(names)
        with writing(self.ledger.path):
            self.ledger.add({name: digest(self.scratch / name) for name in names})
        for name in names:
            target = self.folder / name
            with writing(target):
                if os.path.lexists(target) and not self.ledger.knows(name, target):
                    what = f"{target} was changed, or not written by this run"
                    if say is None:
                        raise OutputError(f"output: {what}; move it away, and run the same command again")
                    say(f"{what}: it stays as it is; move it away, and run the same command again to have it written")
                    continue
                if target.is_dir() and not target.is_symlink():
                    os.replace(target, self.scratch / f"{name}.before")
                os.replace(self.scratch / name, target)

    def end(self) -> None:
        """Remove what was kept for continuing; called after the last output."""
        if self.forget is not None:
            self.forget(self.folder)
        if self._ledger is None:
            self.ledger.path.unlink(missing_ok=True)

    # -----------------------------------------------------------------------------------------------------------------

    def _fail(self, message: str) -> None:
        raise self.error(f"output: {message}")

    def _open(self) -> None:
        folder = self.folder
        try:
            if os.path.lexists(folder) and not folder.is_dir():
                self._fail(f"{folder} is a file; choose another --output")
            missing = [p for p in (folder, *folder.parents) if not p.exists()]
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                self._made.append(path)
            self._lock()
            probe = self.scratch / "probe"
            with probe.open("wb") as file:
                file.write(bytes(_PROBE))
                file.flush()
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as reason:
            if isinstance(reason, self.error):
                raise
            self._fail(f"cannot write to {folder} ({reason.strerror or reason}); choose another --output")

    def _lock(self) -> None:
        path = self.scratch / _LOCK
        while self._handle is None:
            self.scratch.mkdir(exist_ok=True)
            if self.scratch.is_symlink() or (any(self.scratch.iterdir()) and not path.is_file()):
                self._fail(self._others())
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # another process finished and removed the folder just now
                continue
            try:
                _take(handle)
                current = os.stat(path).st_ino == os.fstat(handle).st_ino
            except FileNotFoundError:
                current = False
            except BlockingIOError:
                owner = os.read(handle, 200).decode(errors="replace").strip()
                os.close(handle)
                self._fail(
                    f"another softpick (process {owner or 'unknown'}) works in {self.folder}; wait for its end, or choose "
                    "another --output"
                )
            except BaseException:
                os.close(handle)
                raise
            if not current:  # the lock of a file that its owner has removed
                os.close(handle)
                continue
            before = os.read(handle, 1000)
            if not _OWNERS.fullmatch(before) or (not before and len(os.listdir(self.scratch)) > 1):
                os.close(handle)
                self._fail(self._others())
            self._handle = handle
            text = f"{os.getpid()} on {socket.gethostname()}\n".encode()
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, text)  # over what was there: a lock that is empty has nothing beside it
            os.ftruncate(handle, len(text))

    def _others(self) -> str:
        return f"{self.scratch} is not softpick's; move it away, or choose another --output"

    def _clear(self) -> None:
        for path in self.scratch.iterdir():
            if path.name in (_LOCK, _LEDGER, _DATA):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _refuse_others(self) -> None:
        """Raise where an output is there that no interrupted command wrote."""
        ledger = self.ledger
        last = self.folder / LAST
        if LAST in self.outputs and last.exists() and ledger.knows(LAST, last):
            self.end()  # killed after its last output: it was finished
        for name in self.outputs:
            path = self.folder / name
            if os.path.lexists(path) and not ledger.knows(name, path):
                self._fail(f"{path} is there already; choose another --output")

    def _close(self) -> None:
        lock = self.scratch / _LOCK
        if self._handle is not None:
            self._clear()
            if set(os.listdir(self.scratch)) == {
                _LOCK
            }:  # else a record for going on is left, and the lock marks it as ours
                lock.unlink()
            os.close(self._handle)
            self._handle = None
            _held.pop(self._key, None)
        for path in (self.scratch, *reversed(self._made)):
            with suppress(OSError):  # something is in it
                path.rmdir()
        self._made = []


def _take(handle: int) -> None:
    """Lock a file, or raise :class:`BlockingIOError`."""
    if fcntl is None:
        warnings.warn("this system has no file locks: nothing keeps two commands out of one folder", stacklevel=4)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        said = error.strerror or error
        warnings.warn(f"the folder cannot be locked ({said}): nothing keeps two commands out of it", stacklevel=4)
