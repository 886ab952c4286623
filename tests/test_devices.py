"""The device of a command: chosen by default, said first."""

import subprocess
import sys

import pytest
import torch

from softpick.experiment.environment import chosen_device, device_line


@pytest.mark.parametrize(
    ("there", "expected"), [((), "cpu"), (("mps",), "mps"), (("cuda",), "cuda"), (("cuda", "mps"), "cuda")]
)
def test_auto_is_the_first_that_torch_can_use(there, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert chosen_device("auto") == expected
    assert chosen_device("cuda:1") == "cuda:1"


def test_the_line_names_the_device_and_the_hardware():
    assert device_line("cpu").startswith("device: cpu (")
    assert device_line("cuda:99") == "device: cuda:99"  # not there: the error that follows says so


def test_every_command_takes_auto_by_default():
    typer = pytest.importorskip("typer")
    from softpick.cli import build_app

    defaults = {
        name: parameter.default
        for name, command in typer.main.get_command(build_app()).commands.items()
        for parameter in command.params
        if parameter.name == "device"
    }
    assert {"analyze", "compare", "evaluate", "quantize", "train"} <= set(defaults)
    assert set(defaults.values()) == {"auto"}, defaults


def test_the_audit_says_it_first():
    pytest.importorskip("transformers")
    from softpick.analysis.audit import AuditSettings, audit
    from softpick.experiment.failures import ModelError

    said = []
    reporter = type("Says", (), {"say": lambda self, text: said.append(text)})()
    with pytest.raises(ModelError):
        audit(AuditSettings("/nowhere", data="/nowhere", device="cpu"), reporter=reporter)
    assert said == [device_line("cpu")]


def test_a_grid_says_it_first(tmp_path):
    """Also where another line would come first: of a folder of another recipe, or of the first run's name."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from softpick.experiment.reading import DataError
    from softpick.training.grid import grid
    from softpick.training.recipes import get_recipe

    said = []
    reporter = type("Says", (), {"say": lambda self, text: said.append(text)})()
    (tmp_path / "results.jsonl").write_text("broken\n")
    with pytest.raises(DataError):
        grid(
            get_recipe("tiny_cpu").override(["data=/nowhere"]),
            ["softmax"],
            [0],
            tmp_path,
            device="cpu",
            reporter=reporter,
        )
    assert said[0] == device_line("cpu")


def test_the_audit_does_not_need_the_trainer():
    """The extra ``analyze`` has neither accelerate nor pyarrow."""
    pytest.importorskip("transformers")
    code = (
        "import sys, softpick.analysis.audit, softpick.cli.console, softpick.experiment.stopping; "
        "heavy = {'softpick.training.engine', 'pyarrow', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
