"""``benchmarks/decode_trained.py``: what it counts, against loops."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

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
