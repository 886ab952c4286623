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
def cells(tmp_path, monkeypatch):
    """Cells in a folder of their own, whose kernels are not compiled: the answers are those that are put into a list."""
    answers, asked = [], []

    def run(command, **_):
        cases = command[3:]
        asked.append(cases)
        kernel = {"shared": 1024, "registers": 100, "spilled": 4, "warps": 1, "cubin": 1}
        lines = [{"case": case, "kernels": {"kernel": kernel}} for case in cases]
        lines[0] |= answers.pop(0) if answers else {}
        return subprocess.CompletedProcess(command, 0, "\n".join(map(json.dumps, lines)), "")

    monkeypatch.setattr(matrix, "CACHE", tmp_path)
    monkeypatch.setattr(matrix, "install", lambda version: tmp_path)
    monkeypatch.setattr(matrix.subprocess, "run", run)
    return answers, asked


def test_a_finished_cell_is_kept(cells):
    _, asked = cells
    first = matrix.cell("3.6.0", "86")
    assert first["failed"] == []
    assert matrix.cell("3.6.0", "86") == first
    assert asked == [matrix.CASES]
    matrix.cell("3.6.0", "90")
    assert asked[1:] == [matrix.cases_for("90")]


@pytest.mark.parametrize(
    "answer",
    [
        {"error": "ValueError: no"},
        {"kernels": {"kernel": {"shared": 200 * 1024, "registers": 100, "spilled": 0}}},
        {"kernels": {"kernel": {"shared": 0, "registers": 65537, "spilled": 0}}},
    ],
    ids=["error", "shared memory", "registers"],
)
def test_a_cell_that_failed_runs_again(cells, answer):
    answers, asked = cells
    answers.append(answer)
    assert len(matrix.cell("3.6.0", "86")["failed"]) == 1
    assert matrix.cell("3.6.0", "86")["failed"] == []
    assert len(asked) == 2
    matrix.cell("3.6.0", "86")
    assert len(asked) == 2


@pytest.mark.parametrize("changed", ["forward.py", "hopper/decode.py", "the cases", "the limit"])
def test_a_cell_runs_again_where_what_is_compiled_has_changed(cells, changed, monkeypatch):
    _, asked = cells
    matrix.cell("3.6.0", "86")
    matrix.cell("3.6.0", "90")
    if changed == "the cases":
        monkeypatch.setattr(matrix, "CASES", matrix.CASES[:3])
    elif changed == "the limit":
        monkeypatch.setitem(matrix.TARGETS, "86", 98)
    else:
        read = Path.read_bytes
        monkeypatch.setattr(
            Path, "read_bytes", lambda path: read(path) + b"#" * str(path).endswith(f"/triton/{changed}")
        )
    again = {"forward.py": ["86", "90"], "hopper/decode.py": ["90"], "the cases": ["86", "90"], "the limit": ["86"]}[
        changed
    ]
    for target in ("86", "90"):
        before = len(asked)
        matrix.cell("3.6.0", target)
        assert (len(asked) > before) == (target in again), target
