"""Errors of commands (files, disks, signals, mistakes) as one sentence each. Needs no torch.

:func:`in_one_sentence` is put around every command, :func:`process` around the whole program. ``SOFTPICK_TRACEBACK=1`` in the
environment shows where an error came from as well.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

__all__ = ["ModelError", "QuantizationError", "fail", "first_line", "in_one_sentence", "process", "sentence"]

_DAMAGED = {
    "BadZipFile", "EOFError", "JSONDecodeError", "SafetensorError", "UnicodeDecodeError", "UnpicklingError", "PanicException",
    "error", "BadGzipFile", "ArrowInvalid",
}  # fmt: skip
"""Names of the errors of damaged files, whichever library raises them."""

_DISK = re.compile(r"No space left|PytorchStreamWriter|PytorchStreamReader|I/O error|os error \d+|Disk quota")
_MEMORY = re.compile(r"allocate memory|not enough memory|out of memory|Unable to allocate|bad_alloc", re.IGNORECASE)

_HOME = os.path.dirname(os.path.dirname(__file__)) + os.sep
"""The folder of the package."""

_interrupted = False


class ModelError(ValueError):
    """A model that cannot be loaded, or not be used so; the message says why."""


class QuantizationError(RuntimeError):
    """A model that should have been quantized and was not, or not as asked for."""


def first_line(error: BaseException) -> str:
    """Of an error's words, or its kind; with the next line where the first one only announces it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])


def fail(message: str, code: int = 2) -> NoReturn:
    """Say what is wrong on stderr, and end."""
    with suppress(OSError, ValueError):  # stderr may be closed or full as well
        sys.stderr.write(f"softpick: error: {message}\n")
        sys.stderr.flush()
    raise SystemExit(code)


def in_one_sentence(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same command, whose errors become one sentence and exit code 2 (130 after Ctrl-C, 1 for a mistake of softpick)."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            if type(error).__module__.partition(".")[0] in ("typer", "click"):
                raise
            end(error)

    return wrapper


def end(error: BaseException) -> NoReturn:
    """Say what went wrong, and end."""
    if os.environ.get("SOFTPICK_TRACEBACK"):
        traceback.print_exception(error)
    if _interrupted or isinstance(error, KeyboardInterrupt):
        with suppress(OSError, ValueError):
            sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    message, code = sentence(error)
    fail(message, code)


def sentence(error: BaseException) -> tuple[str, int]:
    """What went wrong in one line, and the exit code: 2 where a user can do something about it, else 1."""
    words, kind = first_line(error), type(error).__name__
    if type(error).__module__.startswith("softpick."):
        return words, 2
    if isinstance(error, BrokenPipeError):
        return "whoever read the output has closed it", 1
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or _MEMORY.search(str(error)):
        return f"memory: there is not enough for this ({words}); a smaller batch or a shorter sequence needs less", 2
    if isinstance(error, OSError) and error.errno is not None:
        where = error.filename2 or error.filename
        reason = os.strerror(error.errno)
        if where is None:
            where = _file_of(error) or "the output"
        return f"{os.fsdecode(where) if isinstance(where, bytes) else where}: {reason}", 2
    file = _file_of(error)
    if _DISK.search(str(error)):
        return f"{file or 'a file'}: cannot be written or read ({words})", 2
    if kind in _DAMAGED and file is not None:
        line = f", line {error.lineno}" if kind == "JSONDecodeError" and hasattr(error, "lineno") else ""
        return f"{file}{line}: is damaged ({kind}: {words})", 2
    if isinstance(error, ImportError):
        return words, 2
    frames = traceback.extract_tb(error.__traceback__)
    if kind == "ValueError" and frames and frames[-1].filename.startswith(_HOME):  # a sentence of our own
        return words, 2
    ours = [f for f in frames if f.filename.startswith(_HOME) and f.filename != __file__] or list(frames)
    at = f" at {os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else ""
    about = f" (it was reading {file})" if file is not None else ""
    return f"unexpected {kind}{at}: {words}{about}; SOFTPICK_TRACEBACK=1 shows where it came from", 1


def _file_of(error: BaseException) -> str | None:
    """The file that the function which raised, or one that called it, was given: libraries seldom name it."""
    frames = []
    step = error.__traceback__
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    for frame in reversed(frames):
        for value in list(frame.f_locals.values()):
            if isinstance(value, str | os.PathLike):
                with suppress(OSError, ValueError):
                    name = os.fspath(value)
                    plausible = isinstance(name, str) and len(name) < 4096 and not name.endswith((".py", ".so"))
                    if plausible and os.path.isfile(name):
                        return name
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The process


@contextmanager
def process() -> Iterator[None]:
    """Around the program: text that the terminal's encoding lacks is escaped, Ctrl-C ends with 130, a full disk is said."""
    _replace_closed_streams()
    _escape()
    with _signals(), _plain_warnings():
        try:
            try:
                yield
            finally:
                sys.stdout.flush()
        except (SystemExit, GeneratorExit):
            _flush()
            raise
        except BaseException as error:
            _flush()
            if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EIO):
                fail(f"the output cannot be written: {os.strerror(error.errno)}")
            end(error)


def _replace_closed_streams() -> None:
    """Open the null device for a stream that was closed before the start, so that no file gets its descriptor."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if handle == number:
                os.set_inheritable(handle, True)  # as a stream's is
            stream = os.fdopen(handle, "r" if number == 0 else "w", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


def _escape() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Softpick's own warnings in one line, without the place in its code."""
    import warnings

    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *args: Any, **kwargs: Any) -> None:
        if filename.startswith(_HOME):
            sys.stderr.write(f"softpick: warning: {message}\n")
        else:
            before(message, category, filename, *args, **kwargs)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _flush() -> None:
    """Flush what can be flushed, and drop the rest: the interpreter would try again at its end, with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _signals() -> Iterator[None]:
    global _interrupted
    _interrupted = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. Libraries turn an interrupt in the middle of their import into other errors, so there it ends the process."""
    global _interrupted
    _interrupted = True
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\ninterrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt
