"""Runs of the commands that go on: from damaged checkpoints, after a full disk, beside a user's files, with other data."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("typer")

from softpick.analysis import audit as audit_module
from softpick.experiment import files
from softpick.experiment.files import OutputError
from softpick.experiment.progress import Silent
from softpick.training import engine, prepare
from softpick.training.compare import Settings, SettingsError, compare
from softpick.training.pretrain import train
from softpick.training.recipes import RecipeError, get_recipe

WORDS = ["attention", "head", "key", "query", "value", "sum", "row", "weight", "token", "zero", "mass", "is"]


class Says(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def has(self, *words):
        return any(all(word in line for word in words) for line in self.lines)


def text(seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (120,), generator=generator).tolist())


def write_corpus(folder, first):
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(text(first + i))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "one", 0)
    write_corpus(home / "two", 1000)
    return home


@pytest.fixture(scope="module")
def recipe(home):
    return replace(
        get_recipe("tiny_cpu"), data=str(home / "one"), layers=1, heads=2, width=16, intermediate=32, vocab_size=280,
        sequence_length=16, steps=6, warmup_steps=2, batch_size=4, micro_batch_size=4, log_every=2, save_every=2,
        evaluate_every=0, probe_every=0, validation_sequences=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(home, recipe):
    """A run that nobody disturbed."""
    train(recipe, home / "whole", device="cpu")
    return home / "whole"


@pytest.fixture(scope="module")
def half(home, recipe):
    """A run that was stopped before its end, with checkpoints of steps 2 and 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Trainer, "save_model", interrupted_at_step(6))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, home / "half", device="cpu")
    assert sorted(p.name for p in (home / "half/checkpoints").iterdir() if p.name[0] != ".") == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    return home / "half"


def interrupted_at_step(step):
    real = engine._Trainer.save_model

    def save_model(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    return save_model


@pytest.fixture
def run(half, tmp_path):
    """A copy of the stopped run: all times are other ones."""
    return Path(shutil.copytree(half, tmp_path / "run", copy_function=shutil.copy))


def weights(folder):
    return (folder / "model/model.safetensors").read_bytes()


def curves(folder):
    return json.loads((folder / "results.json").read_text())["curves"]


def as_version_01(run):
    """Without what version 0.1 did not write."""
    config = json.loads((run / "config.json").read_text())
    files.write_json(run / "config.json", {key: config[key] for key in ("format", "recipe", "data")})
    for marker in run.glob("checkpoints/*/complete.json"):
        found = json.loads(marker.read_text())
        files.write_json(marker, {key: found[key] for key in ("step", "seconds", "skipped_steps")})


# ---------------------------------------------------------------------------------------------------------------------
# train: checkpoints


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", "gone"),
        ("scheduler.pt", "gone"),
        ("rng_state.pth", "gone"),
        ("trainer_state.json", "cut"),
        ("model.safetensors", "cut"),
    ],
)
@pytest.mark.parametrize("version", ["0.1", "now"])
def test_a_damaged_checkpoint_is_left_for_the_one_before(run, whole, recipe, name, damage, version):
    if version == "0.1":
        if name == "model.safetensors":
            pytest.skip("version 0.1 knew no digests")
        as_version_01(run)
    path = run / "checkpoints/checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-20]) if damage == "cut" else path.unlink()
    says = Says()
    train(recipe, run, device="cpu", reporter=says)
    assert says.has("checkpoint-4", "training goes on from checkpoint-2")
    assert weights(run) == weights(whole)
    assert curves(run) == curves(whole)


@pytest.mark.parametrize("version", ["0.1", "now"])
def test_the_clock_does_not_choose(run, whole, recipe, version):
    """The newest checkpoint is the one of the largest step, and it is not removed for being old."""
    if version == "0.1":
        as_version_01(run)
    os.utime(run / "checkpoints/checkpoint-4", (1e9, 1e9))
    os.utime(run / "checkpoints/checkpoint-2", (4e9, 4e9))
    says = Says()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Trainer, "evaluate", interrupt)  # after the last checkpoint
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run, device="cpu", reporter=says)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    train(recipe, run, device="cpu", reporter=says)  # from the last step: no step more
    assert not says.has("training goes on")
    assert weights(run) == weights(whole)
    assert curves(run) == curves(whole)


def interrupt(*_, **__):
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------------
# train: the folder


def test_a_users_files_stay(run, whole, recipe):
    mine = ["notes.txt", "checkpoints/notes.txt", "checkpoints/checkpoint-2/mine.txt", "checkpoints/checkpoint-99/mine.txt",
            ".model.tmp/mine.txt", ".tokenizer.tmp/mine.txt"]  # fmt: skip
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    train(recipe, run, device="cpu")
    assert all((run / name).read_text() == "mine" for name in mine)
    assert weights(run) == weights(whole)
    assert {p.relative_to(run).as_posix() for p in run.rglob("*") if "checkpoint-" in str(p) and p.is_file()} == set(
        mine[2:4]
    )


def test_a_model_of_the_user_is_named_before_training(run, recipe, monkeypatch):
    (run / "model").mkdir()
    (run / "model/thesis.txt").write_text("mine")
    monkeypatch.setattr(engine, "train", pytest.fail)
    with pytest.raises(RecipeError, match=r"model is there, and this run did not write it; move it away"):
        train(recipe, run, device="cpu")
    assert (run / "model/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "results.json", "metrics.jsonl"])
def test_a_corrupt_file_is_named(run, recipe, name):
    with (run / name).open("a") as file:
        file.write("{not json\n")
    with pytest.raises((RecipeError, OutputError), match=name.replace(".", r"\.")):
        train(recipe, run, device="cpu")


@pytest.mark.parametrize("name", ["results.json", "tokenizer/tokenizer_config.json"])
def test_what_this_run_did_not_write_is_not_used(run, recipe, name):
    (run / name).write_text('{"validation_loss": 0.0}')
    with pytest.raises(RecipeError, match=r"was changed"):
        train(recipe, run, device="cpu")


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("moment", ["config.json", "train.tokens", "old tokens"])
@pytest.mark.parametrize("data", ["other folder", "other text", "same"])
def test_killed_before_it_had_its_data_then_other_data(home, tmp_path, recipe, whole, monkeypatch, moment, data):
    """What was left is used for the same data only: else the run is a new one, or refused."""
    shutil.copytree(home / "one", tmp_path / "text")
    recipe, out = replace(recipe, data=str(tmp_path / "text")), tmp_path / "out"
    if moment == "old tokens":  # version 0.1 left this
        out.mkdir()
        shutil.copytree(whole / "tokenizer", out / "tokenizer")
        shutil.copy(whole / "train.tokens", out)
    else:
        real = os.replace

        def replaced(source, target):
            if Path(target).name == moment:
                raise KeyboardInterrupt
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replaced)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, out, device="cpu")
    if data == "other folder":
        recipe = replace(recipe, data=str(home / "two"))
    if data == "other text":
        shutil.rmtree(tmp_path / "text")
        shutil.copytree(home / "two", tmp_path / "text")
    try:
        train(recipe, out, device="cpu")
    except RecipeError:
        assert data != "same"
        assert not (out / "model").exists()
        return
    if data != "same":
        train(replace(recipe, data=str(home / "two")), tmp_path / "fresh", device="cpu")
    expected = whole if data == "same" else tmp_path / "fresh"
    assert not (out / ".softpick").exists()
    assert (out / "train.tokens").read_bytes() == (expected / "train.tokens").read_bytes()
    assert weights(out) == weights(expected)


def test_data_that_changed_under_a_run_are_refused_and_lost_ones_are_not_needed(home, run, recipe, whole):
    (home / "one").rename(home / "away")
    try:
        shutil.copytree(home / "two", home / "one")
        with pytest.raises(RecipeError, match="the data changed since the run"):
            train(recipe, run, device="cpu")
        shutil.rmtree(home / "one")
        says = Says()
        train(recipe, run, device="cpu", reporter=says)
    finally:
        (home / "away").rename(home / "one")
    assert says.has("is not there; the run goes on with the tokens that it has")
    assert weights(run) == weights(whole)


def test_what_lies_beside_the_texts_is_no_source(tmp_path):
    """Checkpoints of other runs in the folder of the data, and what a command is about to write there."""
    names = ("one.txt", "other/checkpoints/optimizer.pt", "other/run.png", "busy/.softpick/lock", "busy/metrics.jsonl")
    for name in (*names, "own/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    of = SimpleNamespace(data=str(tmp_path))
    assert [name for name, *_ in prepare._sources(of, tmp_path / "own")] == [str(tmp_path / "one.txt")]
    (tmp_path / "own/notes.txt").unlink()
    (tmp_path / "one.txt").rename(tmp_path / "train.tokens")  # no text: whatever is there
    assert len(prepare._sources(of, tmp_path / "other")) == 3
    assert prepare._sources(SimpleNamespace(data=str(tmp_path / "none")), tmp_path) is None


def test_a_full_disk_is_a_sentence_and_the_run_goes_on(run, whole, recipe, monkeypatch):
    from softpick.cli import main

    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match=r"output: cannot write .*checkpoints: PytorchStreamWriter failed"):
            train(recipe, run, device="cpu")
        fields = [f"{key}={value}" for key, value in recipe.to_json().items() if key != "name" and value is not None]
        with pytest.raises(SystemExit, match="2"):
            main(["train", "tiny_cpu", *fields, "--output", str(run), "--device", "cpu"])
    train(recipe, run, device="cpu")
    assert weights(run) == weights(whole)


def test_two_processes_in_one_folder(run, recipe):
    from softpick.experiment.resume import Workspace

    code = (
        "import sys; from softpick.experiment.resume import Workspace; "
        "work = Workspace(sys.argv[1]).__enter__(); print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline()
    try:
        with pytest.raises(RecipeError, match=rf"another softpick \(process {other.pid}"):
            train(recipe, run, device="cpu")
        with pytest.raises(OutputError, match="another softpick"):
            audit_module.audit(audit_module.AuditSettings("x"), state=run)
    finally:
        other.kill()
        other.wait()
    with Workspace(run):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# compare


@pytest.fixture(scope="module")
def settings(home):
    sizes = {"steps": 4, "layers": 1, "heads": 2, "width": 8, "sequence_length": 16, "batch_size": 4, "vocab_size": 270}
    return Settings.for_task("text", data=str(home / "one"), normalizers=("softpick",), **sizes)


@pytest.fixture(scope="module")
def compared(home, settings):
    compare(settings, home / "compared")
    return home / "compared"


@pytest.fixture
def again(compared, tmp_path):
    return Path(shutil.copytree(compared, tmp_path / "compared"))


def test_an_edited_report_stays_and_the_others_are_renewed(again, settings):
    before = (again / "results.json").read_bytes()
    (again / "report.html").write_text("my notes on it")
    says = Says()
    compare(settings, again, reporter=says, command="another")
    assert (again / "report.html").read_text() == "my notes on it"
    assert says.has("report.html was changed", "it stays as it is")
    assert (again / "results.json").read_bytes() != before
    (again / "report.html").unlink()
    compare(settings, again, reporter=says)
    assert "softpick compare" in (again / "report.html").read_text()


def test_a_compared_model_is_proven_to_be_the_runs(again, settings):
    record = again / "softpick-seed0/run.json"
    record.write_text(record.read_text().replace('"validation_loss": ', '"validation_loss": 1'))
    with pytest.raises(SettingsError, match=r"run\.json was changed, or not written by this run"):
        compare(settings, again)
    record.write_text("{")
    with pytest.raises(SettingsError, match=r"run\.json cannot be read as JSON"):
        compare(settings, again)
    record.unlink()
    with pytest.raises(SettingsError, match=r"softpick-seed0 is there, without run\.json"):
        compare(settings, again)


def test_a_comparison_of_version_01_goes_on(again, settings):
    config = json.loads((again / "config.json").read_text())
    files.write_json(again / "config.json", {key: config[key] for key in ("format", "settings", "data")})
    (again / "results.json").unlink()
    (again / "report.html").unlink()
    says = Says()
    compare(settings, again, reporter=says)
    assert says.has("already trained")
    assert (again / "results.json").exists()


def test_a_comparison_killed_at_its_first_file(tmp_path, settings, compared):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".config.json.tmp").write_text("{")
    mine = out / ".training/softpick-seed0.tmp/mine.txt"
    compare(settings, out)
    assert (out / "softpick-seed0/model.safetensors").read_bytes() == (
        compared / "softpick-seed0/model.safetensors"
    ).read_bytes()
    assert not mine.exists()
    assert (out / ".config.json.tmp").read_text() == "{"


# ---------------------------------------------------------------------------------------------------------------------
# All five


def test_audits_forget_their_own_files_only(compared, tmp_path):
    settings = audit_module.AuditSettings(
        str(compared / "softpick-seed0"), samples=2, sequence_length=16, data=json.loads(
            (compared / "config.json").read_text())["settings"]["data"], knockout=(),
    )  # fmt: skip
    mine = [
        "audit-notes.json",
        "audit-2026.pt",
        "audit-x.tmp",
        "audit-report.html",
        f"audit-{'0' * 16}.pt",
        f"audit-{'0' * 16}.json",
    ]
    for name in mine:
        (tmp_path / name).write_text("mine")
    audit_module.audit(settings, state=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(mine) + 1
    audit_module.forget(tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(mine, "mine")


@pytest.mark.slow
@pytest.mark.parametrize("kills", ["4", pytest.param("10", marks=pytest.mark.long)])
def test_killed_commands_lose_nothing(kills):
    """The short form of ``python tests/kill_commands.py --kills 200``."""
    script = Path(__file__).parent / "kill_commands.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", kills, "--seed", "5"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 with a loss" in done.stdout
