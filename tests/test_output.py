"""The output folder of a command: one owner, files complete or not at all, nothing replaced that softpick did not write."""

import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import safetensors.torch

from softpick.experiment import files, resume
from softpick.experiment.files import OutputError, digest, writing
from softpick.experiment.result_cache import ResultCache
from softpick.experiment.resume import Workspace
from softpick.training import checkpoints, engine

KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


# ---------------------------------------------------------------------------------------------------------------------
# Files


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    files.write_json(tmp_path / "x.json", {"a": 1})
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OutputError, match=r"output: cannot write .*x\.json: No space left on device"):
                files.write_json(tmp_path / "x.json", {"a": 2})
        assert names(tmp_path) == ["x.json"]
        assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    "write",
    [
        lambda: Path("/dev/full").write_text("x" * 100_000),
        lambda: torch.save(torch.zeros(100_000), "/dev/full"),
        lambda: safetensors.torch.save_file({"x": torch.zeros(9)}, "/nowhere/x.safetensors"),
    ],
    ids=["python", "torch.save", "safetensors"],
)
def test_every_library_that_writes_is_understood(write):
    with pytest.raises(OutputError, match=r"output: cannot write (MY|/dev/full)"), writing("MY"):
        write()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes differ"), writing("MY"):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("text", ["", "{", '{"a": ', "\xff", "[" * 100_000])
def test_json_that_is_none_is_a_sentence_with_the_file(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OutputError, match=r"x\.json cannot be read as JSON"):
        files.read_json(tmp_path / "x.json")


def test_digests_tell_contents_and_names_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WHOLE", 100)
    monkeypatch.setattr(files, "_END", 10)
    contents = [b"", b"a", b"b", b"a" * 101, b"a" * 102, b"b" + b"a" * 100, b"a" * 100 + b"b"]
    found = []
    for content in contents:
        (tmp_path / "x").write_bytes(content)
        found.append(digest(tmp_path / "x"))
    for name in ("one", "two"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_text("x")
        found.append(digest(tmp_path / "folder"))
    assert len(set(found)) == len(found)
    files.write_text(tmp_path / "x", "ä\n")
    assert files.text_digest("ä\n") == digest(tmp_path / "x")


# ---------------------------------------------------------------------------------------------------------------------
# The folder

HOLD = """
import sys, time
from softpick.experiment.resume import Workspace
with Workspace(sys.argv[1]):
    print("in", flush=True)
    time.sleep(99)
"""


@pytest.fixture
def other(tmp_path):
    """Another process, that works in the folder ``out``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.wait()


def test_one_process_at_a_time_and_a_kill_releases(tmp_path, other):
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match=rf"another softpick \(process {other.pid} on .*\) works in .*out; wait"),
        Workspace(out),
    ):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with Workspace(out), Workspace(out) as inner:  # nested: the same one
        assert inner.folder == out
    assert not out.exists() or names(out) == []


def test_another_thread_is_another_owner(tmp_path):
    seen = []

    def enter():
        try:
            with Workspace(tmp_path):
                seen.append("in")
        except OutputError as error:
            seen.append(str(error))

    with Workspace(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "works in" in seen[0]


def test_a_folder_that_stays_empty_is_not_left(tmp_path):
    with pytest.raises(OutputError, match="cannot write MY"), Workspace(tmp_path / "a/b/c"), writing("MY"):
        full()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["file", "long", "full", "below a file"])
def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path, monkeypatch, kind):
    out = tmp_path / {"long": "x" * 300, "below a file": "file/out"}.get(kind, "file")
    if kind in ("file", "below a file"):
        (tmp_path / "file").write_text("mine")
    if kind == "full":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"output: .*(is a file|cannot write to).*choose another --output"):
        Workspace(out, error=ValueError).__enter__()
    monkeypatch.undo()
    assert names(tmp_path) == (["file"] if kind in ("file", "below a file") else [])


def test_a_folder_of_the_same_name_is_the_users(tmp_path):
    (tmp_path / ".softpick").mkdir()
    (tmp_path / ".softpick/mine").write_text("mine")
    with pytest.raises(OutputError, match=r"\.softpick is not softpick's"), Workspace(tmp_path):
        pass
    assert names(tmp_path) == [".softpick/mine"]


@pytest.mark.parametrize("lock", ["mine", "", "12 monkeys\n", "12 on a boat\nand more\nlines\n", None])
def test_a_folder_with_a_lock_of_the_users_is_the_users(tmp_path, lock):
    (tmp_path / ".softpick").mkdir()
    (tmp_path / ".softpick/mine").write_text("mine")
    if lock is None:
        (tmp_path / ".softpick/lock").mkdir()
    else:
        (tmp_path / ".softpick/lock").write_text(lock)
    before = names(tmp_path)
    with pytest.raises(OutputError, match=r"\.softpick is not softpick's"), Workspace(tmp_path):
        pass
    assert names(tmp_path) == before
    assert lock is None or (tmp_path / ".softpick/lock").read_text() == lock


def test_a_folder_that_is_linked_to_is_the_users(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.softpick").symlink_to(tmp_path / "mine", target_is_directory=True)
    with pytest.raises(OutputError, match=r"\.softpick is not softpick's"), Workspace(tmp_path / "out"):
        pass
    assert (tmp_path / "out/.softpick").is_symlink()


@pytest.mark.parametrize("lock", ["", "12 on host\n", f"{'9' * 30} on {'host' * 20}\n", "12 on host\n-longer\n"])
def test_a_lock_that_a_killed_process_left_is_taken(tmp_path, lock):
    (tmp_path / ".softpick").mkdir()
    (tmp_path / ".softpick/lock").write_text(lock)
    if lock:
        (tmp_path / ".softpick/unfinished").write_text("x")
    with Workspace(tmp_path) as work:
        assert (work.scratch / "lock").read_text().startswith(f"{os.getpid()} on ")
        assert (work.scratch / "lock").read_text().count("\n") == 1
    assert names(tmp_path) == []


def test_no_file_is_removed_for_its_name(tmp_path):
    mine = [".softpick-0123456789abcdef.tmp", ".softpick-mine"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    with Workspace(tmp_path) as work:
        assert work.entries() == set(mine)
    assert names(tmp_path) == mine


def test_what_a_kill_leaves_of_a_file_is_in_the_folder_of_unfinished_work(tmp_path, monkeypatch):
    """No other place need be tidied, where a user may have files of any name."""
    seen = []
    with Workspace(tmp_path):
        monkeypatch.setattr(os, "replace", lambda source, target: seen.append(Path(source)))
        files.write_json(tmp_path / "x.json", 1)
        monkeypatch.undo()
        assert seen[0].is_file()
        assert seen[0].parent == tmp_path / ".softpick"
    assert names(tmp_path) == []


def test_an_empty_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="output: expected a path, got ''"):
        Workspace("")


def outputs(work, text):
    for name in ("a.txt", "results.json"):
        (work.scratch / name).write_text(text)
    work.finish(["a.txt", "results.json"])


@pytest.mark.parametrize("at", range(8))
def test_killed_at_any_replacement_the_same_command_finishes(tmp_path, monkeypatch, at):
    """The moment is any of the renames; the user's file of an output's name is never replaced."""
    forgotten = []
    options = {"outputs": ("a.txt", "results.json"), "forget": forgotten.append}
    real, calls = os.replace, itertools.count()

    def replace(*args):
        if next(calls) == at:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch, Workspace(tmp_path, **options) as work:
        patch.setattr(os, "replace", replace)
        try:
            outputs(work, "first")
        except KeyboardInterrupt:
            patch.undo()
            work._clear = lambda: None  # a kill clears nothing
    complete = (tmp_path / "results.json").exists()
    if complete:
        with pytest.raises(OutputError, match=r"a\.txt is there already"), Workspace(tmp_path, **options):
            pass
        assert forgotten == [tmp_path]
    else:
        with Workspace(tmp_path, **options) as work:
            outputs(work, "again")
            work.end()
    assert names(tmp_path) == ["a.txt", "results.json"]
    assert (tmp_path / "a.txt").read_text() == ("first" if complete else "again")


def test_what_a_user_put_in_the_place_of_an_output_stays(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"a\.txt is there already"), Workspace(tmp_path, outputs=("a.txt",)):
        pass
    (tmp_path / "a.txt").unlink()
    with Workspace(tmp_path, outputs=("a.txt", "results.json")) as work:
        (tmp_path / "a.txt").write_text("mine")  # while the command works
        with pytest.raises(OutputError, match=r"a\.txt was changed, or not written by this run"):
            outputs(work, "ours")
    assert (tmp_path / "a.txt").read_text() == "mine"
    assert not (tmp_path / "results.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# results that are kept


@given(st.dictionaries(st.text(max_size=5), KEYS, min_size=2, max_size=5))
def test_a_key_in_another_order_has_the_same_result(key):
    result_cache = ResultCache("anywhere", "x")
    assert result_cache.file(key) == result_cache.file(dict(reversed(key.items())))
    assert result_cache.file([key]) == result_cache.file([dict(sorted(key.items(), reverse=True))])


def test_parts_are_forgotten_by_what_they_say(tmp_path):
    result_cache = ResultCache(tmp_path, "evaluate")
    assert result_cache.get({"a": 1, "b": 2}, lambda: [1, None, "ä"]) == [1, None, "ä"]
    mine = [
        "evaluate-notes.json",
        f"evaluate-{'0' * 16}.json",
        f".evaluate-{'0' * 16}.json.tmp",
        f"evaluate-{'1' * 16}.json",
    ]
    for name, text in zip(mine, ("mine", "mine", "mine", '{"format": "mine"}'), strict=True):
        (tmp_path / name).write_text(text)
    again = ResultCache(tmp_path, "evaluate")
    assert again.get({"b": 2, "a": 1}, pytest.fail) == [1, None, "ä"]
    again.forget()
    assert names(tmp_path) == sorted(mine)


def test_a_part_of_version_01_is_taken_and_forgotten(tmp_path):
    result_cache = ResultCache(tmp_path, "audit")
    result_cache.file("key").write_text('{"sinks": 3}')
    assert result_cache.get("key", pytest.fail) == {"sinks": 3}
    result_cache.forget()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "change", [lambda t: t[:-9], lambda t: t.replace("0.25", "0.75"), lambda t: t.replace("audit-", "audit_")]
)
def test_a_part_that_was_changed_is_not_used(tmp_path, change):
    result_cache = ResultCache(tmp_path, "audit")
    result_cache.get("key", lambda: 0.25)
    file = result_cache.file("key")
    file.write_text(change(file.read_text()))
    with pytest.raises(OutputError, match=rf"{file.name} (was changed|cannot be read)"):
        result_cache.get("key", pytest.fail)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

FILES = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
)


def checkpoint(folder, step, **marker):
    written = folder / checkpoints.WRITING / f"checkpoint-{step}"
    written.mkdir(parents=True)
    for name in FILES:
        (written / name).write_text(json.dumps({"name": name, "step": step}))
    return checkpoints.publish(folder, step, {"seconds": 1.0} | marker)


@pytest.mark.parametrize("name", [*FILES, "complete.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "changed"])
@pytest.mark.parametrize("version", ["0.1", "now"])
def test_the_newest_complete_checkpoint_is_chosen(tmp_path, name, damage, version):
    for step in (4, 12, 8):
        checkpoint(tmp_path, step)
    if version == "0.1":
        if damage == "changed" and name != "complete.json":
            pytest.skip("version 0.1 knew no digests")
        for step in (4, 8, 12):
            files.write_json(tmp_path / f"checkpoint-{step}/complete.json", {"step": step, "seconds": 1.0})
    for step, age in ((4, 0), (8, 99), (12, 999)):  # a clock that went back
        os.utime(tmp_path / f"checkpoint-{step}", (1e9 - age, 1e9 - age))
    said = []
    assert checkpoints.choose(tmp_path, "", said.append).name == "checkpoint-12"
    assert said == []
    path = tmp_path / "checkpoint-12" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_text("" if damage == "empty" else "[1")
    assert checkpoints.choose(tmp_path, "", said.append).name == "checkpoint-8"
    assert len(said) == 1
    assert "checkpoint-12" in said[0]
    assert "training goes on from checkpoint-8" in said[0]
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}/optimizer.pt").unlink()
    assert checkpoints.choose(tmp_path, "", said.append) is None
    assert "training begins anew" in said[-1]


def test_copies_and_other_runs_are_not_resumed_from(tmp_path):
    checkpoint(tmp_path, 4, run="mine")
    checkpoint(tmp_path, 8, run="other")
    os.rename(checkpoint(tmp_path, 6, run="mine"), tmp_path / "checkpoint-10")
    said = []
    assert checkpoints.choose(tmp_path, "mine", said.append).name == "checkpoint-4"
    assert "checkpoint-10 holds step 6" in said[0]
    assert "checkpoint-8 is of another run" in said[1]


def test_checkpoints_are_removed_by_step_and_by_content(tmp_path):
    for step in (12, 4, 8):
        os.utime(checkpoint(tmp_path, step), (1e9 - step, 1e9 - step))
    mine = ["notes.txt", "checkpoint-mine/a", "checkpoint-99/a", "checkpoint-4/a", "checkpoint-8/sub/a"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint-8/optimizer.pt").write_text("mine")
    checkpoints.rotate(tmp_path, 2)  # 8 is not complete any more: 12 and 4 are
    assert (tmp_path / "checkpoint-4/complete.json").exists()
    checkpoints.rotate(tmp_path, 1)
    assert sorted(names(tmp_path / "checkpoint-4")) == ["a"]
    again = checkpoint(tmp_path, 8)  # what is in its way is moved aside
    assert checkpoints.flaw(again) is None
    checkpoints.remove_all(tmp_path)
    left = names(tmp_path)
    aside = [name for name in left if ".old-" in name]
    assert sorted(name.partition("/")[2] for name in aside) == ["optimizer.pt", "sub/a"]
    assert sorted(set(left) - set(aside)) == sorted(set(mine) - {"checkpoint-8/sub/a"})


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", itertools.product([1.0, math.nan, math.inf], repeat=5))
def test_only_steps_in_a_row_end_training(norms):
    """A finite step begins the count anew: NaN, 1, NaN, 1, NaN goes on at a limit of 3."""
    guard, model = engine.Guard(3), torch.nn.Linear(2, 2)
    state = engine.TrainerState()
    bad = [not math.isfinite(norm) for norm in norms]
    first = next((i for i in range(3, 6) if all(bad[i - 3 : i])), None)
    for i, norm in enumerate(norms, 1):
        if i == first:
            with pytest.raises(engine.NonFinite, match="3 steps in a row"):
                guard.check(torch.tensor(norm), [], model, state)
            return
        guard.check(torch.tensor(norm), [], model, state)
    assert guard.skipped == sum(bad)


def test_no_lock_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "fcntl", None)
    with pytest.warns(UserWarning, match="no file locks"), Workspace(tmp_path):
        pass
