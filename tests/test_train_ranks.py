"""`softpick train` on several ranks: the same losses, and what a rank may not do."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from test_train import HERE, corpus, entries, losses, recipe  # noqa: F401

from softpick.training import engine
from softpick.training.pretrain import train

# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def torchrun(recipe, output, *, as_gpus, **variables):
    """``tests/cpu_ranks.py`` on two ranks, with ``variables`` of the environment."""
    fields = [f"{key}={value}" for key, value in recipe.to_json().items() if key != "name" and value is not None]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "cpu_ranks.py"),
        "train", "tiny_cpu", *fields, "--output", str(output), "--device", "cpu",
    ]  # fmt: skip
    extra = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "AS_GPUS": str(int(as_gpus))}
    extra |= {name: str(value) for name, value in variables.items()}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | extra, timeout=300)


@pytest.fixture(scope="module")
def one_rank(corpus, tmp_path_factory):
    """What one rank gives."""
    made = {}

    def run(recipe):
        recipe = replace(recipe, parallel="none", tensor_parallel=1, micro_batch_size=recipe.batch_size)
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("one")
            train(recipe, made[recipe], device="cpu")
        return made[recipe]

    return run


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "as_gpus"),
    [
        ({"parallel": "ddp", "micro_batch_size": 2, "document_mask": True}, False),
        ({"parallel": "fsdp", "micro_batch_size": 2}, True),
        ({"tensor_parallel": 2}, True),
    ],
    ids=["ddp", "fsdp", "tensor_parallel"],
)
def test_two_ranks_are_one(tmp_path, recipe, one_rank, change, as_gpus):
    """Two ranks give the losses and the model of one; also after a kill in the middle."""
    # what a head has for itself is shared among ranks as well; softpick's gradient jumps at scores of 0, rounding decides
    recipe = replace(recipe, normalizer="learned_sink", output_gate=True, score_scale="document_mask" not in change)
    parallel = replace(recipe, **change)
    one = one_rank(parallel)
    first = torchrun(parallel, tmp_path, as_gpus=as_gpus, KILL_AT=6)
    assert first.returncode != 0
    assert engine.last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4", first.stderr
    saved = {p.name for p in (tmp_path / "checkpoints/checkpoint-4").iterdir()}
    assert {"model.safetensors", "optimizer.pt"} <= saved  # weights lie there once, as transformers reads them
    assert not any("fsdp" in name for name in saved)
    done = torchrun(parallel, tmp_path, as_gpus=as_gpus)
    assert done.returncode == 0, done.stderr
    expected, found = losses(one), losses(tmp_path)
    assert found.keys() == expected.keys()
    assert all(abs(found[step] - expected[step]) < 2e-5 for step in expected), (expected, found)
    for step, probe in enumerate(entries(one, "probe")):
        other = entries(tmp_path, "probe")[step]
        assert other["kurtosis"] == pytest.approx(probe["kurtosis"], rel=1e-3)
        assert other["entropy"] == pytest.approx(probe["entropy"], rel=1e-3)

    from safetensors.torch import load_file

    whole, gathered = load_file(one / "model/model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    assert whole.keys() == gathered.keys()
    for name in whole:
        torch.testing.assert_close(gathered[name], whole[name], atol=2e-5, rtol=1e-4)
    assert json.loads((tmp_path / "results.json").read_text())["ranks"] == 2


@pytest.mark.long
def test_ranks_end_when_no_gradient_is_finite(tmp_path, recipe):
    """With tensor parallelism the Trainer has a gradient norm of its own, not accelerate's."""
    recipe = replace(recipe, learning_rate=1e6, warmup_steps=0, max_skipped=3, tensor_parallel=2)
    done = torchrun(recipe, tmp_path, as_gpus=True)
    assert done.returncode != 0
    assert "3 steps in a row had no finite gradient, up to step 5" in done.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.long
def test_ranks_stop_together(tmp_path, recipe):
    """Ctrl-C that only one rank has seen: all stop at the next log line, at a complete checkpoint."""
    done = torchrun(replace(recipe, parallel="ddp", micro_batch_size=4), tmp_path, as_gpus=False, STOP_AT=4)
    assert "stopped after step 6 of 12" in done.stdout
    assert engine.last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-6"


@pytest.mark.long
def test_fsdp_in_bf16_keeps_sums_in_fp32(tmp_path, recipe, one_rank):
    """Weights are bf16 in a forward pass; gradients are summed over ranks in fp32, and the loss is not rounded to bf16."""
    recipe = replace(recipe, normalizer="learned_sink", dtype="bfloat16", parallel="fsdp", micro_batch_size=2)
    done = torchrun(recipe, tmp_path / "run", as_gpus=True, POLICIES=tmp_path / "policies")
    assert done.returncode == 0, done.stderr
    policies = (tmp_path / "policies").read_text().splitlines()
    assert len(policies) == recipe.layers + 3  # embedding, norm with head, what is left
    assert set(policies) == {"torch.bfloat16 torch.float32 None"}
    found, expected = losses(tmp_path / "run"), losses(one_rank(recipe))
    # between 4 and 8 a bf16 is a multiple of 1/32, and what is logged a mean of eight: 2 steps, 2 ranks, 2 accumulated
    assert all(4 < loss < 8 for loss in found.values())
    assert any(loss * 256 % 1 for loss in found.values())
    assert all(abs(found[step] - expected[step]) < 2e-3 for step in expected), (expected, found)
    evaluated = [entry["eval_loss"] for entry in entries(tmp_path / "run", "evaluation")]
    assert any(loss * 256 % 1 for loss in evaluated)


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"parallel": "fsdp", "micro_batch_size": 4},  # accelerate would take DistributedDataParallel, silently
            "parallel: fsdp was asked for, but accelerate did not shard the model",
        ),
        ({"tensor_parallel": 2}, "tensor_parallel: accelerate has it for GPUs only"),
    ],
)
def test_what_was_asked_for_or_an_error(tmp_path, recipe, change, message):
    done = torchrun(replace(recipe, **change), tmp_path, as_gpus=False)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "model").exists()
