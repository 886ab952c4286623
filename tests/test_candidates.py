"""benchmarks/candidates.py: what a changed layer computes, against its formula, and that a grid trains and measures it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "candidates.py"


@pytest.fixture(scope="module")
def candidates():
    spec = importlib.util.spec_from_file_location("candidates", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["candidates"] = module  # transformers' configurations look for the module of their class
    spec.loader.exec_module(module)
    return module


def formula(scores, weight=1.0):
    """``(H, T, T)`` causal weights in fp64, with a weight for what is below 0."""
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    above, below = scores.expm1().clamp(min=0) * seen, (-scores.expm1()).clamp(min=0) * seen
    return above / (above.sum(-1, keepdim=True) + weight * below.sum(-1, keepdim=True) + 1e-6)


def tensors(heads, length, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, length, width, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("which", ["score_bias", "negative_weight", "negative_weight and gate"])
def test_changed_scores_and_denominators(candidates, which, length):
    from transformers import AttentionInterface

    heads, width = 2, 8
    query, key, value = tensors(heads, length, width, 0)
    number = torch.tensor([0.7, -1.3], dtype=torch.float64)
    layer = torch.nn.Module()
    layer.is_causal = True
    scores = query[0] @ key[0].mT * 0.3
    gate = torch.randn(1, length, heads, width, dtype=torch.float64) if which.endswith("gate") else None
    if which == "score_bias":
        layer.score_bias = number
        expected = formula(scores + number[:, None, None]) @ value[0]
    else:
        layer.negative_bias = number
        expected = formula(scores, number.exp()[:, None, None]) @ value[0]
    attend = candidates.with_candidates(AttentionInterface()["softpick"])
    out, _ = attend(layer, query, key, value, None, scaling=0.3, output_gate=gate)
    expected = expected.transpose(0, 1)[None]
    expected = expected if gate is None else expected * gate.sigmoid()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_heads_are_normalized(candidates):
    norm, hidden = candidates.HeadNorm(2, 8).double(), torch.randn(3, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(2, 8))
    heads = hidden.unflatten(-1, (2, 8))
    expected = heads / (heads.square().mean(-1, keepdim=True) + candidates.HEAD_NORM_EPS).sqrt() * norm.weight
    torch.testing.assert_close(norm(hidden), expected.flatten(-2))
    assert norm(torch.zeros(1, 1, 16, dtype=torch.float64)).abs().max() == 0  # a dead head stays one


@pytest.mark.long
def test_a_grid_of_candidates(tmp_path):
    """Each runs, its row says what it is, and the script loads what it saved while transformers alone does not."""
    (tmp_path / "text.txt").write_text("A line of text, and another one.\n" * 400)
    variants = "softpick,softpick+anneal,softpick+gate+qk_norm"
    options = "layers=1 heads=2 width=16 vocab_size=300 sequence_length=16 steps=20 warmup_steps=1 batch_size=4"
    words = (
        f"grid tiny_cpu data=text.txt {options} micro_batch_size=4 probe_every=0 --normalizers {variants} --output grid"
    )
    command = [sys.executable, str(SCRIPT), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "grid/results.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == variants.split(",")
    assert len({row["validation_loss"] for row in rows}) == 3
    model = tmp_path / "grid/runs/softpick+anneal-s0/model"
    config = json.loads((model / "config.json").read_text())
    assert (config["model_type"], config["candidates"], config["anneal_steps"]) == ("softpick_candidate", ["anneal"], 2)
    from safetensors.torch import load_file

    saved = load_file(model / "model.safetensors")
    assert saved["model.layers.0.self_attn.score_bias"].tolist() == [
        0,
        0,
    ]  # the last tenths of the steps are softpick's
    assert saved["steps_done"] == 20
    words = "evaluate grid/runs/softpick+anneal-s0/model --data text.txt --tasks none --passkey none --samples 2"
    measure = [*words.split(), "--sequence-length", "16", "--output"]
    for program, code in ([str(SCRIPT)], 0), (["-m", "softpick"], 2):
        command = [sys.executable, *program, *measure, f"out{code}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-3000:]
    assert "softpick_candidate" in done.stderr
