"""The switch over backends and kernel families: ``SOFTPICK_BACKEND`` and :func:`use_backend`, for bisecting a wrong result."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

__all__ = ["FAMILIES", "Switch", "active", "use_backend"]

VARIABLE = "SOFTPICK_BACKEND"
SWITCHED = ("auto", "triton", "tiled", "reference")
"""What ``backend="auto"`` may stand for."""
FAMILIES = {
    "hopper": "the Gluon kernels for Hopper GPUs; the Triton kernels for every GPU take over",
    "decode": "the kernel for few queries; the kernels for long queries take over, in decode_attention the reference",
    "triton": "all GPU kernels; the backend for every device takes over (`tiled`, in decode_attention the reference)",
}
"""What can be left out, and what takes over."""


class Switch(NamedTuple):
    """What ``backend="auto"`` stands for, and which kernel families are left out, also of a named backend."""

    backend: str = "auto"
    without: frozenset[str] = frozenset()
    source: str = ""
    """Where it comes from, for messages."""

    @property
    def triton(self) -> bool:
        """Whether ``backend="auto"`` may take GPU kernels."""
        return self.backend in ("auto", "triton") and "triton" not in self.without

    def __str__(self) -> str:
        return ",".join([self.backend, *(f"-{name}" for name in sorted(self.without))])


def _parse(text: str, source: str = "backend") -> Switch:
    """``"tiled"``, ``"-hopper"``, ``"auto,-hopper,-decode"``: at most one backend, families to leave out with a minus.

    Raises:
        ValueError: for another name, with the list.
    """
    backends, without = [], set()
    for word in text.replace(",", " ").split():
        family = word.removeprefix("-")
        if word in SWITCHED:
            backends.append(word)
        elif word != family and family in FAMILIES:
            without.add(family)
        else:
            raise ValueError(
                f"{source}: expected one of {', '.join(SWITCHED)}, and of {', '.join('-' + name for name in FAMILIES)} to "
                f"leave kernels out, separated by commas; got {word!r} in {text!r}"
            )
    if len(backends) > 1:
        raise ValueError(f"{source}: expected at most one backend, got {', '.join(backends)} in {text!r}")
    return Switch((*backends, "auto")[0], frozenset(without), source)


parse = functools.lru_cache(_parse)  # compiled code takes the function itself: it cannot trace a cache


_current: ContextVar[Switch | None] = ContextVar("softpick_backend", default=None)
_lock = threading.Lock()
_open: list[tuple[int, Switch]] = []  # thread and switch of every block that is running
# For compiled code, which cannot read a context variable: torch.compile compares this global before each call, and compiles
# again where it has changed. "conflict" while threads want different things.
TRACED: str = ""


def active() -> Switch:
    """The switch in force here: that of :func:`use_backend`, else that of the environment.

    Raises:
        ValueError: for a wrong name in the environment variable.
        RuntimeError: in compiled code while threads use different switches.
    """
    if torch.compiler.is_compiling():
        if TRACED == "conflict":
            raise RuntimeError(
                "softpick.use_backend: threads use different switches at a time, which compiled code cannot tell apart; use "
                f"one, or the environment variable {VARIABLE}"
            )
        return _parse(TRACED, "softpick.use_backend") if TRACED else _parse(_ENVIRONMENT, VARIABLE)
    found = _current.get()
    return from_environment() if found is None else found


_ENVIRONMENT = os.environ.get(VARIABLE, "")


def from_environment() -> Switch:
    """The switch of the environment variable, as it was when softpick was imported."""
    return parse(_ENVIRONMENT, VARIABLE)


@contextlib.contextmanager
def use_backend(backend: str = "auto", *, without: str | tuple[str, ...] | list[str] = ()) -> Iterator[None]:
    """Within the block ``backend="auto"`` stands for this backend, and some kernels are left out: for bisecting a wrong result.

    Holds for the calls of this thread (or asyncio task) in the block, and for their backward passes, whenever those run. Blocks
    nest: the inner backend counts unless it is ``"auto"``, and what is left out adds up. Code compiled by ``torch.compile``
    sees the block as well, is compiled again where it differs from the last call's, and sees blocks of other threads, too.

    Args:
        backend: ``"auto"``, ``"triton"``, ``"tiled"`` or ``"reference"``. Calls that name a backend keep theirs. A function
            that has no such backend takes what it has without kernels (decoding has no ``"tiled"``).
        without: names of kernel families: ``"hopper"``, ``"decode"``, ``"triton"``; one, or several. ``"hopper"`` and
            ``"decode"`` are left out where ``"triton"`` is named in the call, too.

    Raises:
        TypeError: for a value that is not a name.
        ValueError: for unknown names, with the list.
    """
    families = (without,) if isinstance(without, str) else tuple(without)
    for name, value in (("backend", backend), *(("without", family) for family in families)):
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected a name, got {type(value).__name__}")
    if backend not in SWITCHED:
        raise ValueError(f"backend: expected one of {', '.join(SWITCHED)}; got {backend!r}")
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"without: expected names of {', '.join(FAMILIES)}; got {family!r}")
    outer = _current.get() or from_environment()
    chosen = outer.backend if backend == "auto" else backend
    mine = Switch(chosen, outer.without | set(families), "softpick.use_backend")
    entry = (threading.get_ident(), mine)
    token = _current.set(mine)
    _note(entry, True)
    try:
        yield
    finally:
        _note(entry, False)
        _current.reset(token)


def _note(entry: tuple[int, Switch], begins: bool) -> None:
    """Keep what compiled code sees: the innermost block of the one thread that has any."""
    global TRACED
    with _lock:
        if begins:
            _open.append(entry)
        else:
            del _open[len(_open) - 1 - _open[::-1].index(entry)]
        innermost = dict(_open)  # the last of each thread
        wanted = {str(switch) for switch in innermost.values()}
        TRACED = "conflict" if len(wanted) > 1 else wanted.pop() if wanted else ""
