"""Options made from a settings class: each setting once, with its help text; and a command added in one place."""

import dataclasses
import inspect
from dataclasses import dataclass

import pytest

pytest.importorskip("typer")

import typer
from typer.testing import CliRunner

from softpick.analysis.settings import AuditSettings
from softpick.cli import app
from softpick.cli.options import with_settings
from softpick.evaluation.settings import EvaluateSettings
from softpick.experiment.settings import documented, setting, setting_of
from softpick.quantization.settings import QuantizeSettings
from softpick.training.settings import Settings

SETTINGS = [AuditSettings, EvaluateSettings, QuantizeSettings, Settings]


@documented
@dataclass(frozen=True)
class Toy:
    """Settings of a command that is added."""

    model: str = setting(help="What is served.", positional=True)
    port: int = setting(8000, "Where it listens.")
    rate: float | None = setting(None, "Requests a second.", shown="all")
    names: tuple[str, ...] = setting(("a", "b"), "Names.", words={"none": ()})
    counts: tuple[int, ...] | None = setting(None, "Counts.", words={"paper": None, "none": ()}, option="how-many")
    keys: tuple[str | int, ...] = setting(("first",), "Keys.", words={"none": ()})
    texts: tuple[str, ...] = setting(("x",), "Texts.", option="text", repeated=True, shown="an x")
    check: bool = setting(True, "Check it.")
    force: bool = setting(False, "Do it.", note="Not for the faint-hearted.")
    hidden: int = setting(3, "Only in Python.", option=None)


@pytest.fixture
def run(monkeypatch):
    seen = []

    @with_settings(Toy, before={"late": "port"})
    def serve(
        given, late: int = typer.Option(1, help="Own one."), output: str = typer.Option("o", help="Folder.")
    ) -> None:
        """Serve a
        model.
        """
        seen.append((Toy(**given), late, output))

    monkeypatch.setattr(app, "COMMANDS", (*app.COMMANDS, serve))

    def invoke(*arguments):
        result = CliRunner().invoke(app.make_app(), ["serve", *arguments])
        return result, seen.pop() if seen else None

    return invoke


def test_a_command_is_one_function_and_one_line(run):
    assert run("m")[1] == (Toy(model="m"), 1, "o")
    text = " ".join(run("--help")[0].output.split())
    assert "Serve a model." in text
    for part in ("--how-many", "What is served. [required]", "Where it listens. [default: 8000]", "[default: all]",
                 "Names. [default: a,b]", "Counts. [default: paper]", "[default: an x]",
                 "--check / --no-check", "--force Do it."):  # fmt: skip
        assert part in text, text
    assert "hidden" not in text
    assert text.index("--late") < text.index("--port") < text.index("--force") < text.index("--output")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--port", "1"], {"port": 1}),
        (["--rate", "0.5"], {"rate": 0.5}),
        (["--names", " c , d,"], {"names": ("c", "d")}),
        (["--names", "none"], {"names": ()}),
        (["--names", ""], {"names": ()}),
        (["--how-many", "3,4"], {"counts": (3, 4)}),
        (["--how-many", " none "], {"counts": ()}),
        (["--how-many", "paper"], {"counts": None}),
        (["--keys", "first,12,-1"], {"keys": ("first", 12, "-1")}),
        (["--text", "a,b", "--text", "c"], {"texts": ("a,b", "c")}),
        (["--no-check", "--force"], {"check": False, "force": True}),
    ],
)
def test_what_is_typed_becomes_a_value(run, typed, expected):
    assert run("m", *typed)[1][0] == dataclasses.replace(Toy(model="m"), **expected)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--how-many", "3,x"], "softpick: error: how-many: expected integers separated by commas, got '3,x'"),
        (["--port", "x"], "Invalid value for '--port'"),
        (["--output", ""], "softpick: error: output: expected a path, got ''"),
        (["--nothing"], "No such option: --nothing"),
    ],
)
def test_what_cannot_be_read_is_said(run, typed, message):
    result, seen = run("m", *typed)
    assert (result.exit_code, seen) == (2, None)
    assert message in result.output


@pytest.mark.parametrize("cls", SETTINGS)
def test_every_setting_has_its_text_once(cls):
    for field in dataclasses.fields(cls):
        said = setting_of(field)
        assert said.help or said.note or said.shown, f"{cls.__name__}.{field.name}"
        assert f"\n    {field.name}: " in inspect.getdoc(cls)


def test_the_class_says_what_its_fields_are():
    assert "    force: Do it. Not for the faint-hearted.\n" in inspect.getdoc(Toy)
    assert "    rate: Requests a second. None: all.\n" in inspect.getdoc(Toy)
