"""``softpick doctor``: a sound installation is fine, a broken kernel is found and ends with exit code 1."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from oracle import attention as oracle
from oracle import weights_of_row
from typer.testing import CliRunner

import softpick
from softpick import doctor
from softpick.cli.app import make_app
from softpick.ops import cpu, vector
from softpick.ops.calling import HAS_TRITON

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


every_call = doctor._calls


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """One call of each kind, short; each against the same limits."""
    every = every_call("cpu")
    short = list({(call.kind, call.normalizer, call.window, call.causal): call for call in every}.values())
    shapes = {"rows": (3, 70), **dict.fromkeys(("decode", "paged", "listed"), (2, 4, 2, 1, 512, 16))}
    for call in short:
        call.shape = shapes.get(call.kind, (2, 4, 4, 70, 70, 16))
    monkeypatch.setattr(doctor, "_calls", lambda device: short)


def run(*arguments):
    return CliRunner().invoke(make_app(), ["doctor", "--device", "cpu", *arguments])


def test_a_sound_installation_is_fine():
    done = run()
    assert done.exit_code == 0, done.output
    assert "calls, all right" in done.output
    assert done.output.splitlines()[0] == doctor.device_line("cpu")  # before anything runs, and once
    assert done.output.count("device: ") == 1
    assert str(doctor.examine("cpu")).startswith(doctor.device_line("cpu") + "\nsoftpick ")
    assert "not 'triton': query is on cpu" in done.output


@pytest.mark.parametrize(("gpu", "said"), [(True, "and this is cpu"), (False, "and torch finds none")])
def test_without_a_gpu_it_says_whether_there_is_one(gpu, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(doctor, "HAS_TRITON", True)
    assert doctor._support("cpu")[-1].endswith(said)


def broken_forward(monkeypatch):
    run = cpu.forward

    def wrong(spec, query, key, value, mask, sink, out, *rest):
        run(spec, query, key, value, mask, sink, out, *rest)
        out.mul_(1.1)

    monkeypatch.setattr(cpu, "forward", wrong)


def broken_backward(monkeypatch):
    run = cpu.backward

    def wrong(spec, *tensors):
        run(spec, *tensors)
        tensors[8].zero_()  # dquery

    monkeypatch.setattr(cpu, "backward", wrong)


def not_a_number(monkeypatch):
    monkeypatch.setattr(cpu, "forward", lambda spec, *tensors: [x.fill_(float("nan")) for x in tensors[5:7]])


def failing(monkeypatch):
    def wrong(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(cpu, "forward", wrong)


@pytest.mark.parametrize("breaks", [broken_forward, broken_backward, not_a_number, failing], ids=lambda f: f.__name__)
def test_a_broken_kernel_is_found(breaks, monkeypatch):
    breaks(monkeypatch)
    done = run("--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert done.stderr.splitlines()[0] == doctor.device_line("cpu")
    assert not report["fine"]
    wrong = [check for check in report["checks"] if check["problem"] is not None]
    assert {check["backend"] for check in report["checks"]} == {"tiled", "sdpa", "reference"}
    assert len(wrong) == sum(check["backend"] == "tiled" for check in report["checks"])
    assert all(check["backend"] == "tiled" for check in wrong)


def test_a_device_that_is_not_there_is_one_sentence():
    done = CliRunner().invoke(make_app(), ["doctor", "--device", "cuda:99"])
    assert done.exit_code != 0
    assert "cuda:99" in done.output


@pytest.mark.parametrize("name", ["softpick", "softmax"])
def test_the_formula_is_that_of_the_oracle(name):
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    call = doctor._Call("", (1, 2, 2, 5, 5, 4), torch.float32, normalizer=name, window=3)
    want, _ = oracle(q, k, v, name, causal="bottom_right", left=2, right=0)
    torch.testing.assert_close(doctor._formula(call, q, k, v, 0), want)


@pytest.mark.parametrize("scores", [1, 7 * 70 * 2, 2 * 70 * 70, 2**24])
@pytest.mark.parametrize("kind", ["attention", "packed", "decode", "paged", "rows"])
def test_the_truth_is_that_of_the_oracle_in_blocks_of_every_size(kind, scores, monkeypatch):
    monkeypatch.setattr(doctor, "SCORES", scores)
    shape = {"rows": (3, 9), "decode": (2, 4, 2, 2, 192, 16), "paged": (2, 4, 2, 2, 192, 16)}.get(
        kind, (2, 4, 2, 69, 70, 16)
    )
    shape = (1, 4, 2, 70, 70, 16) if kind == "packed" else shape
    ready = doctor._prepare(doctor._Call("", shape, torch.float32, kind), "cpu")
    exact = [x.detach().double() for x in ready.leaves]
    grad = torch.randn_like(exact[0])
    out, grads = doctor._truth(ready, list(exact), grad)
    leaves = [x.clone().requires_grad_() for x in exact]
    want = _by_the_oracle(ready, *leaves)
    torch.testing.assert_close(out, want.detach())
    if ready.trained:
        torch.testing.assert_close(grads, list(torch.autograd.grad(want, leaves, grad)))


def _by_the_oracle(ready, query, key=None, value=None):
    if ready.call.kind == "rows":
        return torch.stack([weights_of_row(row, "softpick") for row in query])
    if ready.call.kind == "packed":
        parts, starts = [], ready.options["cu_seqlens_q"].tolist()
        for a, b in itertools.pairwise(starts):
            part, _ = oracle(
                *(x[a:b].transpose(0, 1)[None] for x in (query, key, value)), "softpick", causal="bottom_right"
            )
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts)
    if ready.call.kind == "paged":
        table = ready.options["block_table"].long()
        key, value = (x[table].flatten(1, 2).transpose(1, 2) for x in (key, value))
    lengths = ready.options.get("cache_seqlens", torch.full(query.shape[:1], key.shape[2])).tolist()
    rows = [
        oracle(query[i : i + 1], key[i : i + 1, :, :n], value[i : i + 1, :, :n], "softpick", causal="bottom_right")[0]
        for i, n in enumerate(lengths)
    ]
    return torch.cat(rows)


def test_scores_of_the_calls_are_exact_and_not_0():
    """Gradients jump where a score changes its sign: on a GPU one of 10 million scores did, and a sound kernel was "wrong"."""
    for call in every_call("cpu"):
        if call.kind in ("paged", "rows"):
            continue  # as another kind, in pages; no products
        query, key = doctor._arguments(call, "cpu")[0][:2]
        if call.kind == "packed":
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        groups = query.shape[-3] // key.shape[-3]
        scores = query.double() @ key.double().repeat_interleave(groups, -3).transpose(-1, -2)
        assert scores.abs().min() >= 1 / 256, call
        odd = scores * 256
        assert odd.abs().max() < 2**24, call
        assert bool((odd % 2 == 1).all()), call


# On GPUs that are not there

triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture
def gpu(monkeypatch):
    """What is explained of the calls that run on a GPU of a compute capability, chosen by the dispatcher for it."""
    from softpick.ops.triton import dispatch, tuning

    monkeypatch.setattr(doctor, "_calls", lambda device: every_call("cuda"))
    monkeypatch.setattr(dispatch, "hopper", object())
    monkeypatch.setattr(dispatch, "_no_hopper", None)
    monkeypatch.setattr(tuning, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(vector, "_on_gpu", lambda x: True)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's interpreter takes tensors

    def explain(capability):
        monkeypatch.setattr(dispatch, "capability", lambda x: capability)
        with softpick.use_backend("triton"):
            found = list(doctor._chosen(device))
        for call, ready in found:
            assert not isinstance(ready, Exception), call
        return {call.name + call.size: ready.explained for call, ready in found}

    return explain


def dispatched():
    """Every file of kernels that the dispatcher names."""
    from softpick.ops.triton import dispatch

    tree = ast.parse(Path(dispatch.__file__).read_text())
    constants = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return {text for text in constants if re.fullmatch(r"[a-z_/]+\.py", text)}


@triton
def test_every_family_of_kernels_runs_on_hopper(gpu):
    """Of its largest call the forward kernels for Hopper had too few scores, and no call met them."""
    explained = gpu(9).values()
    taken = {(kernel.step, kernel.file) for found in explained for kernel in found.kernels}
    assert {file for _, file in taken} == dispatched()
    assert {("forward", "hopper/rows.py"), ("backward", "hopper/rows.py")} < taken
    assert {found.backend for found in explained} == {"triton"}


@triton
@pytest.mark.parametrize("capability", [0, 8, 10])
def test_reserves_run_only_for_kernels_that_no_other_call_takes(gpu, capability):
    explained = gpu(capability)
    assert not any("16384" in name for name in explained)
    files = {kernel.file for found in explained.values() for kernel in found.kernels}
    assert files == {file for file in dispatched() if not file.startswith("hopper/")}


@triton
def test_without_the_kernels_for_hopper_reserves_do_not_run(gpu):
    with softpick.use_backend(without="hopper"):
        assert not any("16384" in name for name in gpu(9))


def test_a_call_that_cannot_be_prepared_is_in_the_report(monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor, "explain_rows", wrong)
    done = run()
    assert done.exit_code == 1
    assert "RuntimeError: no such kernel" in done.output


# Compiling ahead


def test_shares_are_every_call_once(monkeypatch):
    ran, real = [], doctor._prepare

    def prepare(call, device):
        ready = real(call, device)
        return ready._replace(function=lambda *a, **k: (ran.append(id(call)), ready.function(*a, **k))[1])

    monkeypatch.setattr(doctor, "_prepare", prepare)
    for share in range(3):
        doctor.run_share("cpu", share, 3)
    assert sorted(ran) == sorted(map(id, doctor._calls("cpu")))


def test_a_share_that_fails_says_nothing(monkeypatch, capsys):
    failing(monkeypatch)
    doctor.run_share("cpu", 0, 1)
    assert capsys.readouterr() == ("", "")


def test_processes_compile_ahead(monkeypatch):
    """The command of the processes, which run on the CPU here; a slow one is waited for."""
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    real, started, said = doctor.subprocess.Popen, [], []

    def popen(command, **options):
        command = [*command[:3], "cpu", *command[4:]]
        started.append(real(command, **options))
        return started[-1]

    monkeypatch.setattr(doctor.subprocess, "Popen", popen)
    doctor._compile_ahead("cuda", said.append)
    assert [run.returncode for run in started] == [0, 0]
    assert said == ["all calls in 2 processes, to compile their kernels"]
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 1)
    doctor._compile_ahead("cuda", said.append)
    assert len(started) == 2
