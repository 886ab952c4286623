"""softpick grid: variants, rows that are never trained again, a kill in the middle, the report; packed tokens."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import softpick.training.pretrain
from softpick.experiment.reading import DataError
from softpick.training import engine
from softpick.training.grid import Run, grid, make_runs, read_rows
from softpick.training.grid_report import COLUMNS, value
from softpick.training.packed import pack, unpack
from softpick.training.pretrain import train
from softpick.training.recipes import RecipeError, get_recipe
from softpick.training.token_files import TokenFile

VARIANTS = ("softmax", "softpick+scale+gate")
WORDS = (
    "the",
    "a",
    "of",
    "attention",
    "head",
    "key",
    "query",
    "value",
    "sum",
    "row",
    "weight",
    "token",
    "zero",
    "mass",
    "is",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    drawn = random.Random(0)
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(" ".join(drawn.choices(WORDS, k=120)))
    return replace(
        get_recipe("tiny_cpu"), data=str(folder), width=32, intermediate=64, vocab_size=300, sequence_length=32, steps=12,
        warmup_steps=3, batch_size=8, micro_batch_size=8, log_every=2, save_every=4, evaluate_every=6, probe_every=6,
        probe_sequences=2, validation_sequences=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A grid that was never stopped, and its rows."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, grid(recipe, VARIANTS, (0, 1), folder, device="cpu")


def figures(rows):
    """What must not depend on when and where a run was stopped."""
    timed = ("seconds", "created", "command", "tokens_per_second", "mfu", "peak_memory_gib")
    return {(row["variant"], row["seed"]): {k: v for k, v in row.items() if k not in timed} for row in rows}


def no_training(*_, **__):
    raise AssertionError("a finished run was trained again")


@pytest.mark.parametrize(
    ("text", "name", "fields"),
    [
        ("softmax", "softmax", {"normalizer": "softmax"}),
        ("softmax+gate", "softmax+gate", {"normalizer": "softmax", "output_gate": True}),
        ("softpick+scale+gate", "softpick+gate+scale", {"output_gate": True, "score_scale": True}),
        ("softpick+learning_rate=1e-3", "softpick+learning_rate=1e-3", {"learning_rate": 1e-3}),
    ],
)
def test_variants(recipe, text, name, fields):
    (run,) = make_runs(recipe, [text], [3])
    assert run == Run(name, replace(recipe, seed=3, **({"normalizer": "softpick"} | fields)))


@pytest.mark.parametrize(
    ("variants", "seeds", "message"),
    [
        (["softmacks"], [0], "normalizers: .*softmacks"),
        (["softmax+gates"], [0], "expected NORMALIZER with"),
        (["softmax+seed=3"], [0], "expected NORMALIZER with"),
        (["softmax+data=/a"], [0], "expected NORMALIZER with"),
        (["softmax+stepz=3"], [0], "override: expected FIELD=VALUE"),
        (["softmax+steps=0"], [0], "steps: expected at least 1"),
        (["softpick+gate+scale", "softpick+scale+gate"], [0], "each run once"),
        (["softmax"], [0, 0], "each run once"),
        (["softmax"], [], "at least one"),
        ([], [0], "at least one"),
    ],
)
def test_runs_that_cannot_be(recipe, variants, seeds, message):
    with pytest.raises(RecipeError, match=message):
        make_runs(recipe, variants, seeds)


def test_rows_are_what_train_gives(whole, recipe, tmp_path):
    folder, rows = whole
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("softmax", 0), ("softpick+gate+scale", 0), ("softmax", 1), ("softpick+gate+scale", 1)
    ]  # fmt: skip
    alone = train(replace(recipe, output_gate=True, score_scale=True, seed=1), tmp_path, device="cpu")
    row = rows[3]
    assert row["recipe"] == alone["recipe"]
    assert row["validation_loss"] == alone["validation_loss"]
    assert row["probes"] == alone["probes"]
    assert row["curve"]["loss"] == alone["curves"]["loss"]
    assert row["grad_norm_peaks"]["late"] == max(
        row["curve"]["grad_norm_max"]
    )  # one log line after a tenth of 12 steps
    assert len({json.dumps(r["probes"][-1]) for r in rows}) == 4
    assert read_rows(folder) == rows


def test_a_finished_run_is_never_repeated(whole, recipe, tmp_path, monkeypatch):
    """On another machine only results.jsonl is there."""
    folder, rows = whole
    (tmp_path / "results.jsonl").write_bytes((folder / "results.jsonl").read_bytes())
    monkeypatch.setattr(softpick.training.pretrain, "train", no_training)
    assert grid(recipe, VARIANTS, (0, 1), tmp_path, device="cpu") == rows
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()


def test_rows_of_another_recipe(whole, recipe):
    with pytest.raises(RecipeError, match=r"another recipe \(steps: 12 there, 14 now"):
        grid(replace(recipe, steps=14), VARIANTS, (0,), whole[0], device="cpu")


def test_the_report_is_of_the_folder(whole, recipe, tmp_path, monkeypatch):
    """A later command for other variants adds to the report, and is refused where its recipe is another one."""
    folder, rows = whole
    (tmp_path / "results.jsonl").write_bytes((folder / "results.jsonl").read_bytes())
    monkeypatch.setattr(softpick.training.pretrain, "train", no_training)
    assert grid(recipe, VARIANTS[1:], (0,), tmp_path, device="cpu") == rows[1:2]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# tiny_cpu: 4 of 4 runs\n")
    assert "| | softpick+gate+scale | softmax |" in text
    with pytest.raises(RecipeError, match="another recipe"):
        grid(replace(recipe, width=64), ["relu_softpick"], (0,), tmp_path, device="cpu")


def test_rows_that_were_looked_at_more_often(whole, recipe, monkeypatch):
    monkeypatch.setattr(softpick.training.pretrain, "train", no_training)
    rarely = replace(recipe, log_every=4, save_every=12, evaluate_every=0, probe_every=0)
    assert grid(rarely, VARIANTS, (0,), whole[0], device="cpu") == whole[1][:2]


def test_a_row_that_was_cut_short(whole, recipe, tmp_path):
    """A kill in the middle of a write costs that row and no other."""
    folder, rows = whole
    text = (folder / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(text[:-100])
    assert read_rows(tmp_path) == rows[:3]
    found = grid(recipe, VARIANTS, (0, 1), tmp_path, device="cpu")
    assert figures(found) == figures(rows)


def test_measured_rows_go_on(tmp_path, monkeypatch):
    """The rows of docs/results.md are of the recipe as it is: a later session only adds to them."""
    folder = Path(__file__).parent.parent / "benchmarks/results/sinks_h200"
    (tmp_path / "results.jsonl").write_bytes((folder / "results.jsonl").read_bytes())
    monkeypatch.setattr(softpick.training.pretrain, "train", no_training)
    recipe = replace(get_recipe("sinks_h200"), data="sinks_text")
    rows = read_rows(folder)
    for seed in sorted({row["seed"] for row in rows}, reverse=True):
        of_seed = [row for row in rows if row["seed"] == seed]
        assert grid(recipe, [row["variant"] for row in of_seed], [seed], tmp_path) == of_seed
    documented = (folder.parent.parent.parent / "docs/results.md").read_text(encoding="utf-8")
    table = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")]
    assert "\n".join(table) in documented


def test_a_run_counts_once(whole, tmp_path):
    folder, rows = whole
    (tmp_path / "results.jsonl").write_bytes(2 * (folder / "results.jsonl").read_bytes())
    assert read_rows(tmp_path) == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "1"], "share: expected I/N, got '1'"),
        (["--share", "0/2"], "share: expected I/N with I from 1 to N, got 0/2"),
        (["--minutes", "0"], "minutes: expected a number > 0, got 0"),
        (["--normalizers", "softmax+gates"], "got 'softmax+gates'"),
        (["--seeds", "a"], "seeds: expected integers"),
    ],
)
def test_command_line_errors(tmp_path, capsys, options, message):
    from softpick.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["grid", "tiny_cpu", "--output", str(tmp_path / "grid"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_ranks_of_torchrun(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="expected one process a run"):
        grid(recipe, VARIANTS, (0,), tmp_path, device="cpu")


def test_shares(whole, recipe, tmp_path):
    for number in (1, 2):
        grid(recipe, VARIANTS, (0,), tmp_path, device="cpu", share=(number, 2))
    assert figures(read_rows(tmp_path)) == figures(whole[1][:2])
    assert os.path.samefile(tokens_of(tmp_path) / "train.tokens", tmp_path / "runs/softmax-s0/train.tokens")
    with pytest.raises(RecipeError, match="share: expected I/N"):
        grid(recipe, VARIANTS, (0,), tmp_path, device="cpu", share=(3, 2))


@pytest.mark.long
def test_killed_in_the_middle(whole, recipe, tmp_path):
    """SIGKILL in the second run: the first is not repeated, the second goes on, and the rows are those of a whole grid."""
    recipe_fields = [f"{k}={v}" for k, v in recipe.to_json().items() if k not in ("name", "seed") and v is not None]
    command = [
        sys.executable,
        "-m",
        "softpick",
        "grid",
        "tiny_cpu",
        *recipe_fields,
        "--normalizers",
        ",".join(VARIANTS),
    ]
    command += ["--device", "cpu", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "runs/softpick+gate+scale-s0/checkpoints"
    deadline = time.monotonic() + 300
    while engine.last_checkpoint(checkpoints) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read_rows(tmp_path)) == 1, "the kill came too late"
    assert engine.last_checkpoint(checkpoints) is not None
    rows = grid(recipe, VARIANTS, (0,), tmp_path, device="cpu")
    assert figures(rows) == figures(whole[1][:2])


def test_stopped_after_some_minutes(recipe, tmp_path):
    with pytest.raises(engine.Interrupted):
        grid(replace(recipe, steps=100_000, probe_every=0, evaluate_every=0), ["softmax"], (0,), tmp_path, device="cpu",
             minutes=0.01)  # fmt: skip
    assert engine.last_checkpoint(tmp_path / "runs/softmax-s0/checkpoints") is not None
    assert not (tmp_path / "results.jsonl").exists()


def test_training_that_diverges_is_a_row(recipe, tmp_path, monkeypatch):
    def diverges(*_, **__):
        raise engine.NonFinite("3 steps in a row had no finite gradient")

    with monkeypatch.context() as patch:
        patch.setattr(softpick.training.pretrain, "train", diverges)
        (row,) = grid(recipe, ["rectified"], (0,), tmp_path, device="cpu")
    assert row["failed"] == "3 steps in a row had no finite gradient"
    rows = grid(recipe, ["rectified", "softmax"], (0,), tmp_path, device="cpu")
    assert [("failed" in row) for row in rows] == [True, False]
    assert "rectified, seed 0: failed: 3 steps in a row" in (tmp_path / "report.md").read_text()


def test_report(whole):
    folder, rows = whole
    text = (folder / "report.md").read_text()
    table = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    losses = [row["validation_loss"] for row in rows if row["variant"] == "softmax"]
    mean = sum(losses) / 2
    assert f" {mean:.4f} ({min(losses):.4f} to {max(losses):.4f}) " in table["validation loss"]
    assert "| seeds | 0, 1 | 0, 1 |" in text
    missing = {title for title, _ in COLUMNS.values()} - set(table)
    # 32 tokens are less than a tile; no log line falls into a tenth of 12 steps
    assert missing == {"Empty tiles 64×64, %", "largest gradient norm, first tenth of the steps"}
    assert (folder / "training.png").stat().st_size > 1000


def test_value_is_the_last_probe():
    row = {"probes": [{"step": 1, "kurtosis": 3.0}, {"step": 2, "kurtosis": 5.0}], "validation_loss": float("nan")}
    assert value(row, "kurtosis") == 5.0
    assert value(row, "validation_loss") is None
    assert value(row, "row_mass") is None


def tokens_of(grid):
    """The token files that the runs of a grid share: one folder for all that have the same data."""
    (folder,) = (grid / "tokens").iterdir()
    return folder


def test_packed(whole, recipe, tmp_path):
    """Packed tokens give the losses of the text they were made of."""
    folder, rows = whole
    pack(tokens_of(folder), tmp_path / "packed", "words")
    unpack(tmp_path / "packed", tmp_path / "there")
    for name in ("train.tokens", "validation.tokens"):
        assert (tmp_path / "there" / name).read_bytes() == (tokens_of(folder) / name).read_bytes()
    packed = replace(recipe, data=str(tmp_path / "packed"))
    (row,) = grid(packed, ["softmax"], (0,), tmp_path / "grid", device="cpu")
    assert row["data"] == "words"
    assert row["validation_loss"] == rows[0]["validation_loss"]
    assert row["curve"] == rows[0]["curve"]


@pytest.mark.parametrize("harm", ["missing", "cut", "exchanged", "format"])
def test_packed_and_damaged(whole, tmp_path, harm):
    packed = tmp_path / "packed"
    pack(tokens_of(whole[0]), packed, "words")
    part = packed / "train.tokens.00.xz"
    if harm == "missing":
        part.unlink()
    elif harm == "cut":
        part.write_bytes(part.read_bytes()[:-10])
    elif harm == "exchanged":
        part.write_bytes((packed / "validation.tokens.00.xz").read_bytes())
    else:
        (packed / "packed.json").write_text('{"format": "softpick packed 0"}')
    with pytest.raises(DataError, match="data: "):
        unpack(packed, tmp_path / "there")
    assert not (tmp_path / "there/train.tokens").exists()


@pytest.mark.parametrize("indices", [[0], [3, 1, 3], []])
def test_batch_of_a_token_file(whole, indices):
    file = TokenFile(tokens_of(whole[0]) / "train.tokens", 32, 300, 0)
    rows = file.__getitems__(indices)
    assert rows.shape == (len(indices), 32)
    assert all(row.equal(file[i]) for row, i in zip(rows, indices, strict=True))


@pytest.mark.parametrize("index", [-1, 10**6])
def test_batch_beyond_a_token_file(whole, index):
    with pytest.raises(IndexError):
        TokenFile(tokens_of(whole[0]) / "train.tokens", 32, 300, 0).__getitems__([0, index])
