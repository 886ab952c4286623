"""``softpick doctor``: a sound installation is fine, a broken kernel is found and ends with exit code 1."""

import json

import pytest
import torch
from typer.testing import CliRunner

from softpick import doctor
from softpick.cli.app import make_app
from softpick.ops import cpu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """One call of each kind, short; each against the same limits."""
    every = doctor._calls("cpu")
    short = list({(call.kind, call.normalizer, call.window, call.causal): call for call in every}.values())
    for call in short:
        call.shape = (2, 4, 2, 1, 512, 16) if call.kind in ("decode", "paged") else (2, 4, 4, 70, 70, 16)
    monkeypatch.setattr(doctor, "_calls", lambda device: short)


def run(*arguments):
    return CliRunner().invoke(make_app(), ["doctor", "--device", "cpu", *arguments])


def test_a_sound_installation_is_fine():
    done = run()
    assert done.exit_code == 0, done.output
    assert "calls, all right" in done.output
    assert next(line for line in done.output.splitlines() if not line.startswith("running")).startswith("device: cpu (")
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
    from oracle import attention as oracle

    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    call = doctor._Call("", (1, 2, 2, 5, 5, 4), torch.float32, normalizer=name, window=3)
    want, _ = oracle(q, k, v, name, causal="bottom_right", left=2, right=0)
    torch.testing.assert_close(doctor._formula(call, q, k, v), want)


def test_scores_of_the_calls_are_exact_and_not_0():
    """Gradients jump where a score changes its sign: on a GPU one of 10 million scores did, and a sound kernel was "wrong"."""
    for call in doctor._calls("cpu"):
        query, key, *_ = doctor._arguments(call, "cpu")
        if call.kind == "paged":
            continue  # as another kind, in pages
        if call.kind == "packed":
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        groups = query.shape[-3] // key.shape[-3]
        scores = query.double() @ key.double().repeat_interleave(groups, -3).transpose(-1, -2)
        assert scores.abs().min() >= 1 / 256, call
        odd = scores * 256
        assert odd.abs().max() < 2**24, call
        assert bool((odd % 2 == 1).all()), call
