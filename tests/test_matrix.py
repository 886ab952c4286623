"""``make matrix``: that its cases take every way through the kernels, and what is kept of its cells."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton")
import matrix

from softpick import NORMALIZERS
from softpick.ops.backends import DECODE_ROWS, WIDE_DECODE_ROWS
from softpick.ops.key_bounds import BLOCK_SIZES
from softpick.ops.triton.base_functions import switches

# switches that a GPU has on or off, whatever is called: dependent launches (Hopper and later), conversion with relu (NVIDIA),
# programs that share (hopper/decode.py), caches in fp8 (Ada and later)
FP8 = {"PAIRS"}
OF_THE_GPU = {"90": {"EARLY"}, "86": {"EARLY", "SHARED"} | FP8, "gfx942": {"EARLY", "SHARED", "RELU_ASM"} | FP8}


@pytest.fixture(scope="module", params=OF_THE_GPU)
def launches(request):
    """The compile-time constants of all launches on a GPU: ``(kernel, name)`` to values."""
    script = Path(matrix.__file__).with_name("compile_kernels.py")
    cases = matrix.cases_for(request.param)
    done = subprocess.run(
        [sys.executable, script, request.param, "--launches", *cases],
        capture_output=True, text=True, check=True, env=matrix.os.environ | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["case"] for line in lines] == cases
    assert not any("error" in line for line in lines), lines
    found = defaultdict(set)
    for line in lines:
        for kernel, constants in line["launches"]:
            for name, value in constants.items():
                found[kernel, name].add(value)
    return request.param, dict(found)


def test_every_switch_is_on_and_off(launches):
    target, found = launches
    for (kernel, name), values in found.items():
        if all(type(value) is bool for value in values) and name not in OF_THE_GPU[target]:
            assert values == {True, False}, (kernel, name)


def test_every_normalizer_mask_page_list_and_number_of_rows_is_compiled(launches):
    target, found = launches
    codes = {kind: {switches(norm)[kind] for norm in NORMALIZERS.values()} for kind in ("BASE", "RECTIFY", "CONSTANT")}
    exponential = {switches(norm)["BASE"] for norm in NORMALIZERS.values() if norm.exponential}
    for kernel in {kernel for kernel, _ in found}:
        for kind in codes:
            if (kernel, kind) in found:
                tiles = kernel.startswith(("forward_", "backward_"))  # of hopper/, which have exponentials alone
                assert found[kernel, kind] == (exponential if tiles and kind == "BASE" else codes[kind]), (kernel, kind)
        if (kernel, "MASK") in found:
            assert found[kernel, "MASK"] == {0, 1, 2}, kernel
    assert found["decode_split", "LISTED"] == found["decode_merge", "LISTED"] == {0, *BLOCK_SIZES}
    assert found["decode_split", "PAGE"] == {0, 64}
    assert {16, WIDE_DECODE_ROWS, DECODE_ROWS} <= found["decode_split", "BLOCK_M"]
    if target == "90":
        assert found["decode_keys", "PAGE"] == {0, 64}
        assert {8, 32} <= found["decode_keys", "BLOCK_M"]


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """``fill`` for one Triton, with a file of its own; nothing is compiled: the answers are those that are put into a list."""
    answers, asked, results = [], [], tmp_path / "results.jsonl"

    def run(command, **_):
        target, case = command[2:]
        asked.append((target, case))
        kernel = {"shared": 1024, "registers": 100, "spilled": 4, "warps": 1, "cubin": 1}
        line = {"case": case, "kernels": {"kernel": kernel}} | (answers.pop(0) if answers else {})
        return subprocess.CompletedProcess(command, 0, "" if "nothing" in line else json.dumps(line), "Killed")

    def again(*targets):
        """What is asked for, and the rows that a later call finds."""
        asked.clear()
        rows = matrix.read(results)
        matrix.fill(rows, [("3.6.0", t, c) for t in targets for c in matrix.cases_for(t)], results, 1)
        assert matrix.read(results) == rows
        return list(asked), rows

    monkeypatch.setattr(matrix, "install", lambda version: tmp_path)
    monkeypatch.setattr(matrix.subprocess, "run", run)
    again.answers, again.results = answers, results
    return again


def cases(*targets):
    return [(target, case) for target in targets for case in matrix.cases_for(target)]


def test_a_finished_case_is_kept(compiled):
    asked, rows = compiled("86")
    assert asked == cases("86")
    found = list(rows.values())
    assert matrix.cell(found, matrix.CASES) == f"{len(matrix.CASES)} kernels, 1 KiB, 4 B"
    assert matrix.cell(found[:3], matrix.CASES) == f"3 kernels, 1 KiB, 4 B (3 of {len(matrix.CASES)} cases)"
    assert matrix.cell([], matrix.CASES) == "not run"
    assert compiled("86") == ([], rows)
    assert compiled("86", "90")[0] == cases("90")


@pytest.mark.parametrize(
    "answer",
    [
        {"error": "ValueError: no"},
        {"kernels": {"kernel": {"shared": 200 * 1024, "registers": 100, "spilled": 0}}},
        {"kernels": {"kernel": {"shared": 0, "registers": 65537, "spilled": 0}}},
        {"nothing": "a process that died"},
    ],
    ids=["error", "shared memory", "registers", "killed"],
)
def test_a_case_that_failed_runs_again(compiled, answer):
    compiled.answers.append(answer)
    _, rows = compiled("86")
    (failed,) = [row for row in rows.values() if row["failed"]]
    assert len(failed["failed"]) == 1
    assert matrix.cell(list(rows.values()), matrix.CASES) == "**fails**"
    asked, rows = compiled("86")
    assert asked == [("86", failed["case"])]
    assert not any(row["failed"] for row in rows.values())
    assert compiled("86")[0] == []


def test_a_run_that_was_stopped_keeps_what_it_had(compiled, monkeypatch):
    count, run = iter(range(9)), matrix.subprocess.run

    def stopped(*args, **kwargs):
        if next(count) == 3:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(matrix.subprocess, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            compiled("86")
    done = [(target, case) for _, target, case in matrix.read(compiled.results)]
    assert len(done) >= 3
    cut = done.pop()
    whole = compiled.results.read_text()
    compiled.results.write_text(whole[:-9])  # a crash in the middle of a line
    assert [(target, case) for _, target, case in matrix.read(compiled.results)] == done
    assert cut not in done
    assert compiled("86")[0] == [one for one in cases("86") if one not in done]


@pytest.mark.parametrize("changed", ["forward.py", "hopper/decode.py", "a case", "the limit"])
def test_what_is_compiled_has_changed(compiled, changed, monkeypatch):
    compiled("86", "90")
    if changed == "a case":
        monkeypatch.setattr(matrix, "CASES", [*matrix.CASES, "softmax,80,bfloat16,none"])
        expected = [(target, "softmax,80,bfloat16,none") for target in ("86", "90")]
    elif changed == "the limit":
        monkeypatch.setitem(matrix.TARGETS, "86", 98)
        expected = cases("86")
    else:
        read = Path.read_bytes
        monkeypatch.setattr(
            Path, "read_bytes", lambda path: read(path) + b"#" * str(path).endswith(f"/triton/{changed}")
        )
        expected = cases("86", "90") if changed == "forward.py" else cases("90")
    assert compiled("86", "90")[0] == expected
