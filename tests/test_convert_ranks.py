"""`softpick convert` on several ranks: the same figures and weights as one process, whatever the number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file
from test_convert_extraction import TEXT, llama
from transformers import AutoModelForCausalLM, Trainer

from softpick.conversion import ranks
from softpick.conversion.convert import convert
from softpick.conversion.recipes import ConvertError, ConvertSettings
from softpick.training import engine
from softpick.training.data import train_tokenizer

HERE = Path(__file__).parent
GIVEN = {
    "align_steps": 4, "distil_steps": 4, "align_sequence_length": 24, "distil_sequence_length": 24, "align_batch_size": 8,
    "distil_batch_size": 8, "micro_batch_size": 2, "align_learning_rate": 1e-3, "distil_learning_rate": 1e-4, "warmup_steps": 0,
    "save_every": 1, "validation_sequences": 8, "samples": 0, "prompts": 2,
    "extraction": 2, "device": "cpu",
}  # fmt: skip

needs_trainer = pytest.mark.skipif(
    not hasattr(Trainer, "_sync_replicated_trainable_parameters"), reason="parallel: fsdp needs transformers 5.23"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("ranks")
    train_tokenizer(TEXT, 290).save_pretrained(home / "tied")
    train_tokenizer(TEXT, 290).save_pretrained(home / "untied")
    for name in ("tied", "untied"):
        llama(tied=name == "tied").save_pretrained(home / name)
    for name, texts in (("text", TEXT[:6]), ("held", TEXT)):
        (home / name).mkdir()
        for i, text in enumerate(texts):
            (home / name / f"{i}.txt").write_text(text)
    return home


def given(home, **more):
    return GIVEN | {"data": str(home / "text"), "validation_data": str(home / "held")} | more


def torchrun(home, output, count=2, model="tied", variables=(), **more):
    """``tests/cpu_ranks.py`` as the command, on ranks."""
    options = []
    for name, value in given(home, parallel="fsdp", **more).items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
        str(HERE / "convert_ranks.py"), "convert", str(home / model), *options, "--output", str(output),
    ]  # fmt: skip
    extra = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **dict(variables)}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | extra, timeout=300)


def results(output):
    return json.loads((output / "results.json").read_text())


def close(found, expected, error=1e-5):
    """Figures and weights of two runs."""
    one, other = (results(output) for output in (expected, found))
    for stage, record in one["stages"].items():
        mine = other["stages"][stage]
        assert mine["curves"]["step"] == record["curves"]["step"]
        assert mine["curves"]["loss"] == pytest.approx(record["curves"]["loss"], abs=error)
        assert mine["validation_loss"] == pytest.approx(record["validation_loss"], abs=error)
        assert mine["trained"] == record["trained"]
    assert other["losses"] == pytest.approx(one["losses"], abs=error)
    whole, gathered = (load_file(output / "model/model.safetensors") for output in (expected, found))
    assert whole.keys() == gathered.keys()
    for name in whole:
        torch.testing.assert_close(gathered[name], whole[name], atol=2 * error, rtol=10 * error)
    assert sorted(p.name for p in found.iterdir()) == ["config.json", "model", "report.html", "results.json"]


@needs_trainer
def test_two_ranks_are_one(home, tmp_path):
    """The shortest of these: both stages of two steps, nothing but losses and weights."""
    few = {
        "align_steps": 2,
        "distil_steps": 2,
        "save_every": 2,
        "prompts": 0,
        "extraction": 0,
        "validation_sequences": 4,
    }
    convert(ConvertSettings.of_recipe(str(home / "tied"), **given(home, **few)), tmp_path / "one")
    done = torchrun(home, tmp_path / "two", variables={"SHARES": str(tmp_path / "shares")}, **few)
    assert done.returncode == 0, done.stderr
    close(tmp_path / "two", tmp_path / "one")
    assert results(tmp_path / "two")["ranks"] == 2
    shares = json.loads((tmp_path / "shares").read_text())
    for who in ("teacher", "student"):
        assert shares[who]["plain"] == ["model.embed_tokens.weight"]
        assert shares[who]["here"] * 2 == shares[who]["all"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two/model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@needs_trainer
@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "more"),
    [
        (
            "tied",
            {"lengthen_steps": 2, "lengthen_batch_size": 4, "sink_mass": 0.1, "sink_value": 0.1, "activation": 0.01},
        ),
        ("untied", {}),
        (
            "tied",
            {"recipe": "radlads_8b", "dtype": "float32", "optimizer": "adamw_torch", "distil_learning_rate": 1e-5},
        ),
    ],
    ids=["penalties", "untied", "trained embeddings, recomputed layers"],
)
def test_all_figures_of_two_ranks(home, tmp_path, model, more):
    more = {"lengthen_steps": 0, "lengthen_sequence_length": 48} | more
    convert(ConvertSettings.of_recipe(str(home / model), **given(home, **more)), tmp_path / "one")
    done = torchrun(home, tmp_path / "two", model=model, variables={"SHARES": str(tmp_path / "shares")}, **more)
    assert done.returncode == 0, done.stderr
    close(tmp_path / "two", tmp_path / "one")
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    mine, theirs = (found["generation"]["teacher"] for found in (two, one))
    assert mine["examples"] == theirs["examples"]
    assert mine["teacher_log_probability"] == pytest.approx(theirs["teacher_log_probability"], abs=1e-5)
    for mine, theirs in zip(two["extraction"]["examples"], one["extraction"]["examples"], strict=True):
        assert mine["teacher"] == theirs["teacher"]
    shares = json.loads((tmp_path / "shares").read_text())
    trained = "recipe" in more
    assert ("model.embed_tokens.weight" in shares["student"]["plain"]) is not trained
    assert "model.embed_tokens.weight" in shares["teacher"]["plain"]


@needs_trainer
@pytest.mark.long
def test_stopped_and_killed_with_other_numbers_of_ranks(home, tmp_path):
    """Ctrl-C that one of two ranks has seen; one rank goes on and is killed in stage 2; two ranks go on to the end."""
    steps = {"align_steps": 4, "distil_steps": 6}
    convert(ConvertSettings.of_recipe(str(home / "tied"), **given(home, **steps)), tmp_path / "one")
    output = tmp_path / "ranks"
    stopped = torchrun(home, output, variables={"STOP_AT": "1"}, **steps)
    assert "stopped after step 2 of 4" in stopped.stdout, stopped.stderr
    assert engine.last_checkpoint(output / "checkpoints/align").name == "checkpoint-2"
    saved = load_file(output / "checkpoints/align/checkpoint-2/model.safetensors")
    assert saved["layers.0.q_proj.weight"].shape == (32, 32)
    killed = torchrun(home, output, count=1, variables={"KILL_AT": "5"}, **steps)
    assert killed.returncode != 0
    assert engine.last_checkpoint(output / "checkpoints/distil").name == "checkpoint-4", killed.stderr
    done = torchrun(home, output, **steps)
    assert done.returncode == 0, done.stderr
    assert "stage 1, outputs of attention: already trained" in done.stdout
    close(output, tmp_path / "one")
    again = torchrun(home, output, **steps)
    assert "already converted" in again.stdout
    other = torchrun(home, output, **(steps | {"distil_steps": 5}))
    assert other.returncode != 0
    assert "other settings (distil_steps: 6 there, 5 now)" in other.stderr + other.stdout


@needs_trainer
@pytest.mark.long
def test_bf16_and_a_folder_of_somebody_else(home, tmp_path):
    """Weights and sums over ranks are fp32; what one rank finds wrong ends both."""
    few = {"dtype": "bfloat16", "prompts": 0, "extraction": 0}
    convert(ConvertSettings.of_recipe(str(home / "tied"), **given(home, **few)), tmp_path / "one")
    done = torchrun(home, tmp_path / "two", **few)
    assert done.returncode == 0, done.stderr
    close(tmp_path / "two", tmp_path / "one", error=1e-3)
    (tmp_path / "letter").mkdir()
    (tmp_path / "letter/letter.txt").write_text("mine")
    refused = torchrun(home, tmp_path / "letter", **few)
    assert refused.returncode != 0
    assert refused.stderr.count("is not empty and holds no run of softpick convert") == 2
    assert [p.name for p in (tmp_path / "letter").iterdir()] == ["letter.txt"]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("more", "count", "message"),
    [
        ({}, "2", "parallel: expected fsdp for 2 ranks, got none"),
        ({"parallel": "ddp"}, "2", "parallel: expected one of none, fsdp; got 'ddp'"),
        ({"parallel": "fsdp"}, None, "parallel: fsdp needs torchrun"),
        ({"parallel": "fsdp", "optimizer": "adamw_bnb_8bit"}, "2", "optimizer: expected one of adamw_torch"),
        ({"parallel": "fsdp"}, "8", "align_batch_size: expected a multiple of micro_batch_size x ranks = 2 x 8, got 8"),
        (
            {"parallel": "fsdp", "validation_sequences": 6},
            "2",
            "validation_sequences: expected a multiple of .* 2 x 2, got 6",
        ),
    ],
)
def test_what_cannot_be_served(home, monkeypatch, more, count, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if count is not None:
        monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(ConvertError, match=message):
        ranks.start(ConvertSettings.of_recipe(str(home / "tied"), **given(home, **more)))


def test_a_weight_that_stays_whole_is_an_error():
    with pytest.raises(ConvertError, match="all weights of the student among ranks, but bias stayed whole"):
        ranks.check_shared("student", [("bias", torch.nn.Parameter(torch.zeros(2)))])
