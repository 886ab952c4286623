"""``benchmarks/decode_trained.py``: what it counts, against loops."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import softpick

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "decode_trained.py"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("decode_trained", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("heads", "key_heads", "length", "steps"), [(2, 1, 40, 3), (4, 2, 64, 1), (1, 1, 17, 16)])
def test_blocks_that_are_read(script, heads, key_heads, length, steps):
    query = torch.randn(2, heads, steps, 4)
    key = torch.randn(2, key_heads, length, 4) - 0.6  # most scores of a head with positive queries are below zero
    cache = script.Cache(query.abs(), key, torch.randn(2, key_heads, length, 5), 0.5, "softpick")
    found = script.shares(cache)
    used, read = [], {size: [] for size in script.BLOCKS}
    for sample in range(2):
        for head in range(key_heads):
            for step in range(steps):
                seen = length - steps + step + 1
                keys = set()
                for member in range(head * heads // key_heads, (head + 1) * heads // key_heads):
                    scores = [
                        float(cache.query[sample, member, step].double() @ key[sample, head, i].double())
                        for i in range(seen)
                    ]
                    mine = {i for i, score in enumerate(scores) if score > 0}
                    used.append(len(mine) / seen)
                    keys |= mine
                for size in script.BLOCKS:
                    read[size].append(len({i // size for i in keys}) / math.ceil(seen / size))
    assert found["weights"] == pytest.approx(100 * sum(used) / len(used), rel=1e-5)
    for size, values in read.items():
        assert found[f"blocks of {size}"] == pytest.approx(100 * sum(values) / len(values), rel=1e-5)
    assert found["weights"] < 60


def test_blocks_that_bounds_leave_unread(script, monkeypatch):
    """Step by step, what ``blocks`` of the output says; no step sees keys behind its own."""
    query = torch.randn(1, 1, 1, 4).abs().repeat(2, 4, 3, 1) + 0.05 * torch.randn(2, 4, 3, 4)
    key = 0.05 * torch.randn(2, 2, 70, 4) - query[:, ::2, :1] / 2
    key[:, :, 20:30] *= -1
    cache = script.Cache(query, key, torch.randn(2, 2, 70, 5), 1.0, "softpick")
    found = script.bounded(cache)
    for size in script.BLOCKS:
        for error in script.ERRORS:
            visible = read = values = 0
            for step in range(3):
                seen = 68 + step
                out = softpick.decode_attention(
                    query[:, :, step : step + 1], key[:, :, :seen], cache.value[:, :, :seen], is_causal=True, scale=1.0,
                    key_bounds=softpick.key_bounds(key[:, :, :seen], block_size=size), max_error=error, return_error=True,
                )  # fmt: skip
                visible, read, values = (
                    n + int(x) for n, x in zip((visible, read, values), out.blocks.sum((0, 1)), strict=True)
                )
            assert found[f"keys of {size} skipped at {error:g}"] == pytest.approx(100 * (1 - read / visible))
            if not error:
                assert found[f"values of {size} skipped"] == pytest.approx(100 * (1 - values / visible))
    assert found["keys of 16 skipped at 0"] == 0
    assert found["keys of 16 skipped at 0.01"] > 20

    def wrong(*args, **more):
        result = usual(*args, **more)
        return result if isinstance(result, torch.Tensor) else result._replace(output=result.output * 1.1)

    usual = script.decode
    monkeypatch.setattr(script, "decode", wrong)
    with pytest.raises(SystemExit, match="above the returned one"):
        script.bounded(cache)


def test_how_tight_bounds_are(script):
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 37, 4) - 0.5
    found = script.tightness(script.Cache(query, key, key, 0.5, "softpick"), 16)
    zero, over = {"score": 0, "radius": 0, "box": 0}, {"radius": 0.0, "box": 0.0}
    scores = query @ key[:, :, :32].mT * 0.5
    for head in range(2):
        for block in range(2):
            x, q = key[0, 0, 16 * block : 16 * block + 16], query[0, head, 0] * 0.5
            largest = max(float(q @ row) for row in x)
            radius = float(q @ x.mean(0) + q.norm() * max(float((row - x.mean(0)).norm()) for row in x))
            box = sum(max(float(q[i] * x[:, i].min()), float(q[i] * x[:, i].max())) for i in range(4))
            for name, bound in (("score", largest), ("radius", radius), ("box", box)):
                zero[name] += bound <= 0
                if name in over:
                    over[name] += (bound - largest) / float(scores.std()) / 4
    for name, count in zero.items():
        assert found[f"at most 0 by {name}"] == pytest.approx(25 * count)
    for name, x in over.items():
        assert found[f"{name} over score"] == pytest.approx(x, rel=1e-4)


@pytest.mark.parametrize(("token", "expected"), [(0.01, 2 / 0.01), (0.0, None)], ids=["measurable", "noise"])
def test_what_warms_up_is_not_in_the_rate(script, monkeypatch, token, expected):
    clock, calls = [0.0], []

    class Model:
        def generate(self, tokens, max_new_tokens, **_):
            clock[0] += 30.0 * (len(calls) < 2) + 1.0 + token * max_new_tokens
            calls.append(max_new_tokens)

    monkeypatch.setattr(script.time, "perf_counter", lambda: clock[0])
    subject = SimpleNamespace(model=Model())
    rate = script.generated(subject, torch.zeros(2, 5, dtype=torch.int64))
    assert rate == pytest.approx(expected) if expected else math.isnan(rate)
