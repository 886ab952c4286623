"""The command line in this process: errors, notes, the folder of a run, missing extras."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from softpick import NORMALIZERS, __version__, cli
from softpick.cli import console
from softpick.training import engine
from softpick.training.compare import TASKS, Settings, SettingsError, _notes, _sink_notes, compare

TEXT = "".join(f"def function_{i}(a, b):\n    return a * {i} + b - {i * i}\n" for i in range(400))
TINY = {"steps": 6, "layers": 1, "heads": 2, "width": 8, "sequence_length": 16, "batch_size": 4, "vocab_size": 260}


def invoke(*arguments):
    return CliRunner().invoke(cli.build_app(), [str(a) for a in arguments])


def flags(options):
    return [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "finished"
    result = invoke("compare", "--data", corpus, "--output", output, "--seeds", "0,1", *flags(TINY))
    assert result.exit_code == 0, result.output
    return output, result.output


def settings(corpus, **more):
    return Settings.for_task("text", data=str(corpus), **(TINY | more))


def test_version_and_normalizers():
    assert invoke("--version").output.strip() == f"softpick {__version__}"
    output = invoke("normalizers").output
    assert all(name in output and norm.formula in output for name, norm in NORMALIZERS.items())


def test_help_names_the_defaults_of_the_tasks():
    words = " ".join(invoke("compare", "--help").output.split())
    assert f"[default: text {TASKS['text']['steps']}, backcopy {TASKS['backcopy']['steps']}]" in words


def test_two_seeds_print_means_and_write_every_run(finished):
    output, printed = finished
    assert "over 2 seeds" in printed
    assert " ± " in printed
    results = json.loads((output / "results.json").read_text())
    assert [(run["normalizer"], run["seed"]) for run in results["runs"]] == [
        ("softmax", 0),
        ("softpick", 0),
        ("softmax", 1),
        ("softpick", 1),
    ]
    assert results["settings"]["seeds"] == [0, 1]
    assert "samples" not in results["runs"][0]
    assert any("validation loss" in note for note in results["notes"])
    assert "hardly any attention sinks" in " ".join(results["notes"])  # six steps bring none
    assert not list((output / ".training").iterdir())


def test_a_seed_repeats_a_run_bit_for_bit(finished, corpus, tmp_path):
    compare(settings(corpus, seeds=(1,)), tmp_path / "again")
    first, again = (json.loads((p / "results.json").read_text())["runs"] for p in (finished[0], tmp_path / "again"))
    for a, b in zip(first[2:], again, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    for name in ("softmax", "softpick"):
        weights = [(p / f"{name}-seed1" / "model.safetensors").read_bytes() for p in (finished[0], tmp_path / "again")]
        assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"normalizers": ("softmax", "sofpick")}, "expected one of softmax, softpick"),
        ({"normalizers": ()}, "normalizers: expected at least one"),
        ({"normalizers": ("softmax", "softmax")}, "names one twice"),
        ({"seeds": (-1,)}, "seeds: expected integers >= 0"),
        ({"heads": 3}, "heads: expected a divisor of the width 8, got 3"),
        ({"heads": 8}, "even head dimension"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"sequence_length": 1}, "sequence-length: expected at least 2"),
        ({"vocab_size": 10}, "258"),
        ({"learning_rate": 0.0}, "learning-rate"),
        ({"weight_decay": -1.0}, "weight-decay"),
        ({"device": "tpu"}, "device: expected cpu"),
    ],
)
def test_settings_that_cannot_work(corpus, given, message):
    with pytest.raises(SettingsError, match=message):
        settings(corpus, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nothing"], "task: expected one of text, backcopy"),
        (["--seed", 1, "--seeds", "1,2"], "--seed or --seeds"),
        (["--seeds", "1,x"], "integers separated by commas"),
        (["--data", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_errors_of_the_command(tmp_path, arguments, message):
    result = invoke("compare", "--output", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_mistake_in_the_data_does_not_block_the_folder(corpus, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    result = invoke("compare", "--output", tmp_path / "run", "--data", short, *flags(TINY))
    assert result.exit_code == 2
    assert "too few for one sequence" in result.output
    result = invoke(
        "compare", "--output", tmp_path / "run", "--data", corpus, "--normalizers", "softpick", *flags(TINY)
    )
    assert result.exit_code == 0, result.output


def test_other_settings_or_data_are_refused_and_fresh_renames(finished, corpus, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    with pytest.raises(
        SettingsError, match=r"other settings \(seeds: \[0, 1\] there, \[0\] now; steps: 6 there, 7 now\)"
    ):
        compare(settings(corpus, steps=7), output)
    config = json.loads((output / "config.json").read_text())
    engine.write_json(output / "config.json", config | {"data": "other"})
    with pytest.raises(SettingsError, match="the data changed"):
        compare(settings(corpus, seeds=(0, 1)), output)
    compare(settings(corpus, steps=1, normalizers=("softpick",)), output, fresh=True)
    (old,) = tmp_path.glob("run.old-*")
    assert (old / "report.html").read_bytes() == (finished[0] / "report.html").read_bytes()
    assert (output / "softpick-seed0" / "run.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="is a file"):
        compare(settings(corpus), tmp_path / "file")


def test_interrupt_through_the_request_and_resume(finished, corpus, tmp_path):
    stop = engine.StopRequest()

    class Reporter:
        said: list = []  # noqa: RUF012

        def say(self, text):
            self.said.append(text)

        def progress(self, label, total):
            import contextlib

            class Bar:
                def update(self, step, loss, note=""):
                    stop.requested |= "softpick" in label and step == 2

            return contextlib.nullcontext(Bar())

    with pytest.raises(engine.Interrupted, match="stopped after step 3 of 6"):
        compare(settings(corpus, seeds=(0, 1)), tmp_path / "run", reporter=Reporter(), stop=stop)
    compare(settings(corpus, seeds=(0, 1)), tmp_path / "run", reporter=Reporter(), stop=engine.StopRequest())
    assert "[1/4] softmax, seed 0: already trained" in Reporter.said
    runs = [json.loads((p / "results.json").read_text())["runs"] for p in (finished[0], tmp_path / "run")]
    for a, b in zip(*runs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


@pytest.mark.long
def test_backcopy_runs(corpus, tmp_path):
    tiny = TINY | {"steps": 20}
    result = invoke("compare", "--task", "backcopy", "--data", corpus, "--output", tmp_path / "run", *flags(tiny))
    assert result.exit_code == 0, result.output
    meta = json.loads((tmp_path / "run" / "results.json").read_text())["meta"]
    assert meta["task"] == "backcopy"
    assert "Bigram-Backcopy (triggers " in meta["data"]


def test_notes_say_what_a_reader_must_know(corpus):
    class Data:
        description, split = "words", "by document"

    def run(name, loss, rate=50.0):
        return {
            "normalizer": name,
            "seed": 0,
            "validation_loss": loss,
            "measurements": {"sink": {"first": {"rate": {"0.3": rate}}}},
        }

    def notes(*runs):
        chosen = settings(corpus, normalizers=tuple(r["normalizer"] for r in runs))
        return "\n".join([*_notes(chosen, Data(), list(runs)), *_sink_notes(list(runs))])

    good = notes(run("softmax", 2.0), run("softpick", 2.04, 0.0))
    assert "softpick: validation loss +2.0% against softmax" in good
    assert "worse" not in good
    assert "hardly" not in good
    assert "more than 3% worse than softmax" in notes(run("softmax", 2.0), run("softpick", 2.08))
    assert "not finite" in notes(run("softmax", 2.0), run("softpick", math.nan))
    assert "hardly any attention sinks" in notes(run("softmax", 2.0, 1.0), run("softpick", 2.0))


def test_log_lines_tell_the_time_left(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 10.0, 20.0, 90.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    lines = console._Lines(console.make_console(), "[1/1] softpick", 100)
    for step in (10, 20, 30, 100):
        lines.update(step, 1.5)
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "[1/1] softpick: 20/100 steps, loss 1.500, 80 s left"
    assert out[-1] == "[1/1] softpick: 100/100 steps, loss 1.500"


@pytest.mark.parametrize("module", ["typer", "tokenizers"])
def test_a_missing_extra_is_named(monkeypatch, capsys, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else find(name, *a))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare"])
    message = str(stopped.value.code) + capsys.readouterr().err
    assert module in message
    assert "pip install 'softpick[compare]'" in message


def test_cli_imports_nothing_heavy():
    code = (
        "import sys; from softpick import cli, compare; cli.build_app(); "
        "heavy = {'transformers', 'tokenizers', 'pyarrow', 'accelerate'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
