"""The command line. :mod:`.app` has the table of commands.

Whatever is heavy or belongs to an extra is imported inside functions, so that ``--help`` is quick and a missing extra gives
one sentence.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from softpick.experiment.failures import process

if TYPE_CHECKING:
    import typer

__all__ = ["build_app", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``softpick``."""
    with process():
        _main(sys.argv[1:] if argv is None else list(argv))


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:  # also where nothing but torch is installed
        from softpick import __version__

        print(f"softpick {__version__}")
        return
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"softpick: the command line needs {' and '.join(missing)}: pip install 'softpick[compare]'")
    build_app()(args=arguments, prog_name="softpick")


def build_app() -> typer.Typer:
    """The typer application with all commands."""
    from softpick.cli.app import make_app

    return make_app()
