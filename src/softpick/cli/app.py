"""THE table of commands, and the typer application made from it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import typer

from softpick.cli import checkpoints, converting, examining, lists, measuring, serving, training
from softpick.experiment.failures import fail, in_one_sentence

__all__ = ["COMMANDS", "make_app"]

COMMANDS: tuple[Callable[..., None], ...] = (
    lists.normalizers,
    training.compare,
    measuring.analyze,
    measuring.evaluate,
    measuring.quantize,
    training.train,
    training.grid,
    converting.convert,
    serving.serve,
    lists.recipes,
    checkpoints.import_,
    examining.doctor,
)
"""In the order of ``softpick --help``. A function's name is the command's (without the underscore behind a word of Python's),
its docstring the help text, and each of its parameters an argument or an option."""

_PATHS = ("data", "data_dir", "validation_data", "source", "output")


def make_app() -> typer.Typer:
    """The typer application: every command of :data:`COMMANDS`, whose errors are one sentence."""
    app = typer.Typer(
        name="softpick",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(
        help="Attention without softmax: compare normalizers; train, analyze, evaluate, quantize and serve models."
    )(_root)
    for command in COMMANDS:
        text = " ".join((command.__doc__ or "").split())
        app.command(command.__name__.strip("_"), help=text)(in_one_sentence(_with_paths(command)))
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from softpick import __version__

        typer.echo(f"softpick {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    # torchao, which transformers imports where it is installed, warns of itself
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _with_paths(command: Any) -> Any:
    """The same command, which refuses an empty path: it would mean the current folder, or nothing."""

    @functools.wraps(command)
    def wrapper(*args: Any, **given: Any) -> Any:
        for name in _PATHS:
            if given.get(name) == "":
                fail(f"{name}: expected a path, got ''")
        return command(*args, **given)

    return wrapper
