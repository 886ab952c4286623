"""``softpick analyze``: saved models in, report out; decoders, encoders, two models, the knockout, and what can go wrong."""

import json
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from softpick.audit import SAMPLE_TEXTS, AuditError, AuditSettings, audit
from softpick.training import engine
from softpick.training.data import DataError, train_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "saw", "it", "run", "over", "hill", "to", "red", "barn"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, and tiny untrained models that were saved with a tokenizer."""
    root = tmp_path_factory.mktemp("audit")
    generator = torch.Generator().manual_seed(0)
    text = " ".join(WORDS[i] for i in torch.randint(len(WORDS), (4000,), generator=generator).tolist())
    (root / "corpus.txt").write_text(text)
    tokenizer = train_tokenizer([text], 300)
    for name in ("softmax", "softpick"):
        model = engine.build_model(
            name,
            vocab_size=len(tokenizer),
            layers=2,
            heads=2,
            width=16,
            sequence_length=32,
            seed=0,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
        )
        for p in model.parameters():
            p.data *= 4  # so that attention is not uniform
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    gpt2 = GPT2Config(
        vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(root / "gpt2")
    bert = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(bert).save_pretrained(root / "bert")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, cls_token=tokenizer.bos_token, sep_token=tokenizer.eos_token
    )
    wrapped.save_pretrained(root / "bert")
    return root


def settings(home, model="softmax", **given):
    defaults = {
        "data": str(home / "corpus.txt"),
        "samples": 6,
        "sequence_length": 24,
        "batch_size": 4,
        "map_tokens": 12,
    }
    return AuditSettings(model=str(home / model), **(defaults | given))


def test_two_models_side_by_side(home):
    report = audit(settings(home, against=str(home / "softpick")))
    softmax, softpick = report["runs"]
    assert (softmax["normalizer"], softpick["normalizer"]) == ("softmax", "softpick")
    for run in report["runs"]:
        data = run["measurements"]["data"]
        assert data["samples"] == 6
        assert data["sequence_length"]["max"] == 24
        assert data["bos"]["policy"] == "bos"
        assert len(run["samples"]) == len(SAMPLE_TEXTS)
        assert all(len(sample["text_tokens"]) <= 12 for sample in run["samples"])
    assert softmax["measurements"]["rows"]["mass"] == pytest.approx(1, abs=1e-5)
    assert softpick["measurements"]["rows"]["mass"] < 0.9
    assert len(report["notes"]) == 2


def test_one_normalizer_twice_stays_apart(home):
    report = audit(settings(home, against=str(home / "softmax"), knockout=False))
    assert [run["normalizer"] for run in report["runs"]] == ["softmax", "softmax (2)"]
    assert report["notes"] == []


def test_perplexity_and_knockout_by_hand(home):
    """The same from the model's logits with a four-dimensional mask: the first key is hidden from all later queries."""
    run = audit(settings(home, batch_size=6))["runs"][0]
    model = AutoModelForCausalLM.from_pretrained(home / "softmax")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "softmax")
    ids = tokenizer((home / "corpus.txt").read_text(), add_special_tokens=False)["input_ids"]
    rows = torch.tensor([[tokenizer.bos_token_id, *ids[i * 23 : i * 23 + 23]] for i in range(6)])
    for name, hidden in (("all keys", False), ("without the first key", True)):
        see = torch.ones(24, 24, dtype=torch.bool).tril()
        if hidden:
            see[1:, 0] = False
        with torch.no_grad():
            logits = model(rows, attention_mask=see.expand(6, 1, 24, 24), use_cache=False).logits
        picked = torch.log_softmax(logits[:, 1:-1], -1).gather(-1, rows[:, 2:, None])
        assert run["perplexity"][name] == pytest.approx(math.exp(-picked.mean()), rel=1e-4)
    assert run["perplexity"]["all keys"] != run["perplexity"]["without the first key"]


def test_a_decoder_without_bos(home):
    run = audit(settings(home, "gpt2"))["runs"][0]
    assert run["measurements"]["data"]["bos"]["policy"] == "auto"
    assert run["measurements"]["data"]["sequence_length"]["max"] == 24


def test_an_encoder(home):
    run = audit(settings(home, "bert"))["runs"][0]
    assert not run["measurements"]["data"]["causal"]
    assert run["measurements"]["data"]["bos"]["first_token_share"] == 100  # [CLS]
    assert run["measurements"]["data"]["sequence_length"]["max"] == 24
    assert "perplexity" not in run


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sequence_length": 64}, "sequence_length: .* has room for 32 positions, got 64"),
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"dtype": "int8"}, "dtype: expected one of auto, float32, bfloat16, float16; got 'int8'"),
        ({"texts": ("a", " ")}, "texts: expected at least one text, none of them empty"),
        ({"model": "./nowhere"}, "model: there is no directory or file ./nowhere"),
        ({"model": "nothing.gguf"}, "model: there is no file nothing.gguf"),
    ],
)
def test_errors(home, given, message):
    with pytest.raises(AuditError, match=message):
        audit(AuditSettings(**({"model": str(home / "softmax"), "data": str(home / "corpus.txt")} | given)))


def test_errors_of_models_and_data(home, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AuditError, match=r"has no config\.json"):
        audit(settings(tmp_path, "empty", data=str(home / "corpus.txt")))
    (tmp_path / "short.txt").write_text("a cat")
    with pytest.raises(DataError, match="too few for one sequence of 24"):
        audit(settings(home, data=str(tmp_path / "short.txt")))
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(home / "softmax").save_pretrained(bare)
    with pytest.raises(AuditError, match="has no tokenizer"):
        audit(settings(tmp_path, "bare", data=str(home / "corpus.txt")))


def test_the_command(home, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "softpick.cli",
        "analyze",
        str(home / "softpick"),
        "--data",
        str(home / "corpus.txt"),
    ]
    command += ["--samples", "4", "--sequence-length", "24", "--text", "the cat sat", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Sink rate > 0.3, first token" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert "samples" not in results["runs"][0]
    assert results["runs"][0]["perplexity"].keys() == {"all keys", "without the first key"}
    assert "softpick analyze: softpick" in (out / "report.html").read_text()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "report.html is there already; choose another --output" in again.stderr
