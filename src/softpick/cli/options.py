"""Options made from a settings class, and the reading of what was typed. The help text stands in the class only."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

import typer

from softpick.experiment.failures import fail
from softpick.experiment.settings import Setting, kinds_of, setting_of

__all__ = ["OUTPUT", "integers", "require", "split", "with_settings"]

OUTPUT = "DIR"
"""What stands for an output folder in a help text."""


def with_settings(
    cls: type[Any],
    *,
    skip: Collection[str] = (),
    before: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command gets one option (or argument) for each field of a settings class.

    Args:
        cls: a dataclass whose fields are made by :func:`softpick.experiment.settings.setting`.
        skip: fields without an option.
        before: places of the command's own parameters in the help text: name of the parameter, name of the field that it
            stands in front of. Else they follow the fields.
        words: what stands for ``{name}`` in the docstring.

    Returns:
        The decorator of a function whose first parameter takes a dict with the value of each of these fields.
    """
    hints = typing.get_type_hints(cls)
    chosen = {
        field.name: field
        for field in dataclasses.fields(cls)
        if setting_of(field).option is not None and field.name not in skip
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters: list[inspect.Parameter] = []
        for name, field in chosen.items():
            parameters += [parameter for parameter in own if (before or {}).get(parameter.name) == name]
            parameters.append(_parameter(field, hints[name]))
        parameters += [parameter for parameter in own if parameter not in parameters]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            values = {name: _value(field, hints[name], given.pop(name)) for name, field in chosen.items()}
            command(values, **given)

        wrapper.__doc__ = (command.__doc__ or "").format(**(words or {}))
        del wrapper.__wrapped__  # typer would look at its parameters
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """The parameter from which typer makes the option of a field."""
    said = setting_of(field)
    kinds, many = kinds_of(hint)
    name = said.option or field.name.replace("_", "-")
    text = f"{said.help}  [default: {said.shown}]".strip() if said.shown else said.help
    kind: Any = str if many else next(kind for kind in kinds if kind is not type(None))
    default = None if field.default is dataclasses.MISSING or said.shown else field.default
    declared = f"--{name}"
    if said.repeated:
        kind, default = list[str] | None, None
    elif many and not said.shown:
        default = _typed(said, default)
    elif kind is bool and default:
        declared = f"--{name}/--no-{name}"
    made = (
        typer.Argument(..., help=text)
        if said.positional
        else typer.Option(default, declared, help=text, metavar=said.metavar)
    )
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=made, annotation=kind)


def _typed(said: Setting, value: Any) -> str:
    """What one would type for a default."""
    word = next((word for word, meant in said.words.items() if meant == value), None)
    return ",".join(map(str, value)) if word is None else word


def _value(field: dataclasses.Field[Any], hint: Any, given: Any) -> Any:
    """The value of a field from what was typed; nothing typed is the field's default, or None."""
    said = setting_of(field)
    kinds, many = kinds_of(hint)
    if not many or given is None:
        return given if given is not None or field.default is dataclasses.MISSING else field.default
    if said.repeated:
        return tuple(given) or field.default
    if given.strip() in said.words:
        return said.words[given.strip()]
    if kinds <= {int, type(None)}:
        return integers(said.option or field.name.replace("_", "-"), given)
    return tuple(int(part) if int in kinds and part.isdecimal() else part for part in split(given))


def split(text: str) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(name: str, text: str) -> tuple[int, ...]:
    """The integers between commas; ends with an error that names the option."""
    try:
        return tuple(int(part) for part in split(text))
    except ValueError:
        fail(f"{name}: expected integers separated by commas, got {text!r}")


def require(*names: str, extra: str = "compare") -> None:
    """End with an error that names the extra where one of these packages is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"this command needs {', '.join(missing)}: pip install 'softpick[{extra}]'")
