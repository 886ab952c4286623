"""``softpick analyze``: saved models in, report out; decoders, encoders, two models, the knockout, and what can go wrong."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("transformers")

from gguf_file import write_gguf
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from softpick.analysis import audit as audit_module
from softpick.analysis.audit import SAMPLE_TEXTS, AuditSettings, audit
from softpick.analysis.knockout import hidden_key
from softpick.experiment.models import ModelError, load_subject
from softpick.experiment.progress import Silent
from softpick.experiment.reading import DataError
from softpick.training import engine
from softpick.training.data import train_tokenizer

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
        "evict_after": 4,
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
    report = audit(settings(home, against=str(home / "softmax"), knockout=()))
    assert [run["normalizer"] for run in report["runs"]] == ["softmax", "softmax (2)"]
    assert report["notes"] == []


def rows_of(home, name, samples=6, length=24):
    """The sequences that are measured: BOS, then the text's tokens in their order."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / name)
    ids = tokenizer((home / "corpus.txt").read_text(), add_special_tokens=False)["input_ids"]
    n = length - 1
    return torch.tensor([[tokenizer.bos_token_id, *ids[i * n : i * n + n]] for i in range(samples)])


def strongest_by_hand(model, rows):
    """Of each sample the key with the largest mean over layers, heads and queries, among those that 16 queries see."""
    with torch.no_grad():
        maps = torch.stack(model(rows, output_attentions=True).attentions)  # (L, B, H, T, T)
    found = []
    for b in range(len(rows)):
        alpha = [maps[:, b, :, k:, k].double().mean().item() for k in range(24 - 15)]
        found.append(alpha.index(max(alpha)))
    return found


@pytest.mark.parametrize("batch_size", [6, 4])
@pytest.mark.parametrize("name", ["softmax", "softpick"])
def test_perplexity_and_knockout_by_hand(home, name, batch_size):
    """The same from the model's logits with a four-dimensional mask: the key is hidden from later queries, or all behind it."""
    run = audit(settings(home, name, batch_size=batch_size, knockout=("first", "strongest", 5)))["runs"][0]
    model = AutoModelForCausalLM.from_pretrained(home / name)
    rows = rows_of(home, name)
    strongest = strongest_by_hand(model, rows)
    assert strongest == run["measurements"]["sink"]["strongest"]["positions"]
    assert name == "softpick" or len(set(strongest)) > 1
    every = torch.ones(24, 24, dtype=torch.bool).tril().repeat(6, 1, 1, 1)

    def losses(mask):
        with torch.no_grad():
            logits = model(rows, attention_mask=mask, use_cache=False).logits
        return -torch.log_softmax(logits[:, :-1], -1).gather(-1, rows[:, 1:, None])[..., 0]

    for entry, positions in zip(run["knockout"], ([0] * 6, strongest, [5] * 6), strict=True):
        for figure, after in (("all keys", 24), ("eviction", 4), ("absence", 1)):
            see = every.clone()
            for b, p in enumerate(positions):
                see[b, 0, p + after :, p] = False
            kept = torch.cat([row[p + 8 :] for row, p in zip(losses(see), positions, strict=True)])
            assert entry[figure] == pytest.approx(math.exp(kept.mean()), rel=1e-4), (entry["key"], figure)
            assert entry["tokens"] == len(kept)
            if figure != "all keys":
                change = 100 * (entry[figure] / entry["all keys"] - 1)
                assert entry[f"{figure}_percent"] == pytest.approx(change)
        assert len({entry["all keys"], entry["eviction"], entry["absence"]}) == 3
    assert run["knockout"][0]["masked"]["token_id_share"] == 100
    assert run["perplexity"] == pytest.approx(math.exp(losses(every)[:, 1:].mean()), rel=1e-4)
    words = run["notes"][0]
    assert "evicted after 4 tokens" in words
    assert f"{run['knockout'][0]['eviction_percent']:+.1f} %" in words


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_hidden_key_leaves_windows_and_biases(implementation):
    """Sliding windows stay what they are (a mask that a user gives would replace them), and so do position biases."""
    config = MistralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=6, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM._from_config(config, attn_implementation=implementation).eval()
    ids = torch.randint(3, 60, (2, 20))
    at, after = torch.tensor([2, 4]), 3
    i, k = torch.arange(20)[:, None], torch.arange(20)[None]
    see = ((k <= i) & (k > i - 6))[None, None].repeat(2, 1, 1, 1)
    for b, p in enumerate(at.tolist()):
        see[b, 0, p + after :, p] = False
    bias = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
    with torch.no_grad(), hidden_key(model) as hide:
        plain = model(ids, use_cache=False).logits
        hide(at, after)
        found = model(ids, use_cache=False).logits
        hide(None, 0)
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain, rtol=0, atol=0)
    with torch.no_grad():
        want = model(ids, attention_mask=bias, use_cache=False).logits
    torch.testing.assert_close(found, want)
    assert float((found - plain).abs().max()) > 1e-3


def test_a_decoder_without_bos(home):
    run = audit(settings(home, "gpt2"))["runs"][0]
    assert run["measurements"]["data"]["bos"]["policy"] == "auto"
    assert run["measurements"]["data"]["sequence_length"]["max"] == 24


def test_an_encoder(home):
    run = audit(settings(home, "bert", map_tokens=64))["runs"][0]
    assert [len(sample["text_tokens"]) for sample in run["samples"]] == [32] * 3  # the model has no more positions
    assert not run["measurements"]["data"]["causal"]
    assert run["measurements"]["data"]["bos"]["first_token_share"] == 100  # [CLS]
    assert run["measurements"]["data"]["sequence_length"]["max"] == 24
    assert "perplexity" not in run
    assert run["notes"] == ["bert: no knockout, because an encoder has no perplexity of a next token."]
    sink = run["measurements"]["sink"]
    cls, sep = sink["by_token"][:2]
    assert [run["token_text"][str(t["token_id"])] for t in (cls, sep)] == ["<bos>", "<eos>"]
    assert cls["rate"] == sink["first"]["rate"]
    assert sep["rate_normalized"] == sink["last"]["rate_normalized"]
    assert len(sink["by_position"]["rate"]["0.3"]) == 24


@pytest.mark.parametrize("model", ["softmax", "gpt2", "bert"])
def test_models_with_few_positions_are_measured_by_default(home, model):
    run = audit(settings(home, model, sequence_length=None, against=str(home / "softpick")))["runs"][0]
    assert run["measurements"]["data"]["sequence_length"]["max"] == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sequence_length": 64}, "sequence_length: .* has room for 32 positions, got 64"),
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"dtype": "int8"}, "dtype: expected one of auto, float32, bfloat16, float16; got 'int8'"),
        ({"texts": ("a", " ")}, "texts: expected at least one text, none of them empty"),
        ({"knockout": ("last",)}, "knockout: expected first, strongest, or a position; got 'last'"),
        ({"knockout": (223,)}, "knockout: expected a position from 0 to 222 .*, got 223"),
        (
            {"evict_after": 12, "sequence_length": 24},
            "evict_after: 12 needs sequences of 26 tokens or more, got a sequence_length of 24",
        ),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: 'flash_attention_2' shows no weights"),
        ({"attn_implementation": "sofpick", "sequence_length": 24}, "model: cannot load .*sofpick"),
        ({"device": "cuda:99", "sequence_length": 24}, "device: cannot move .* to 'cuda:99'"),
        ({"model": "./nowhere"}, "model: there is no directory or file ./nowhere"),
        ({"model": "nothing.gguf"}, "model: there is no file nothing.gguf"),
    ],
)
def test_errors(home, given, message):
    with pytest.raises(ModelError, match=message):
        audit(AuditSettings(**({"model": str(home / "softmax"), "data": str(home / "corpus.txt")} | given)))


def test_errors_of_models_and_data(home, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        audit(settings(tmp_path, "empty", data=str(home / "corpus.txt")))
    (tmp_path / "short.txt").write_text("a cat")
    with pytest.raises(DataError, match="too few for one sequence of 24"):
        audit(settings(home, data=str(tmp_path / "short.txt")))
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(home / "softmax").save_pretrained(bare)
    with pytest.raises(ModelError, match="has no tokenizer"):
        audit(settings(tmp_path, "bare", data=str(home / "corpus.txt")))


def test_models_that_cannot_be_measured(home, tmp_path):
    data = str(home / "corpus.txt")
    mamba = MambaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4, bos_token_id=0, eos_token_id=1
    )
    MambaForCausalLM(mamba).save_pretrained(tmp_path / "mamba")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "softmax")
    tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(ModelError, match="no attention layers were seen in MambaForCausalLM"):
        audit(settings(tmp_path, "mamba", data=data))
    shutil.copytree(home / "softmax", tmp_path / "torn")
    weights = load_file(tmp_path / "torn" / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 weights .*layers\.1\.self_attn\.q_proj\.weight\): they would be random"
    ):
        audit(settings(tmp_path, "torn", data=data))


class Says(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_any_attn_implementation(home, tmp_path):
    """A model saved with flash attention is measured as it computes; another implementation can be asked for."""
    shutil.copytree(home / "gpt2", tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    config["attn_implementation"] = "flash_attention_2"
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    data, said = str(home / "corpus.txt"), Says()
    found = {
        name: audit(settings(tmp_path, "gpt2", data=data, attn_implementation=name), reporter=said)["runs"][0]
        for name in (None, "eager", "sdpa", "softpick")
    }
    assert found[None]["attn_implementation"] == "sdpa"
    assert any("flash_attention_2 shows no weights, so sdpa computes the same" in line for line in said.lines)
    for name in ("eager", "sdpa"):
        alpha = torch.tensor(found[name]["measurements"]["sink"]["first"]["alpha"])
        torch.testing.assert_close(alpha, torch.tensor(found[None]["measurements"]["sink"]["first"]["alpha"]))
        assert found[name]["normalizer"] == "softmax"
    assert found["softpick"]["normalizer"] == "softpick"
    assert found["softpick"]["measurements"]["sparsity"]["zero"] > 10


class StopsAt(Says):
    """Interrupts when it is told that a piece of work is so far."""

    def __init__(self, label, step):
        super().__init__()
        self.at = label, step

    @contextmanager
    def progress(self, label, total):
        self.label = label
        yield self

    def update(self, step, loss):
        if self.label.startswith(self.at[0]) and step == self.at[1]:
            raise KeyboardInterrupt


def without_times(report):
    for run in report["runs"]:
        del run["seconds"]
    return json.loads(json.dumps(report["runs"]))


def test_an_interrupted_audit_goes_on(home, tmp_path, monkeypatch):
    given = settings(home, against=str(home / "softpick"), batch_size=1)
    want = without_times(audit(given))
    monkeypatch.setattr(audit_module, "_SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):  # while the second model is measured
        audit(given, state=tmp_path, reporter=StopsAt("measuring softpick", 4))
    (tmp_path / "mine.txt").write_text("not an audit's")
    said = Says()
    got = audit(given, state=tmp_path, reporter=said)
    assert without_times(got) == want
    assert f"{home / 'softmax'}: measured before" in said.lines
    assert f"{home / 'softpick'}: going on after batch 3 of 6" in said.lines
    other, said = AuditSettings(**(asdict(given) | {"samples": 5})), Says()
    audit(other, state=tmp_path, reporter=said)  # other settings take nothing of it
    assert not any("before" in line or "going on" in line for line in said.lines)
    audit_module.forget(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


# GGUF


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_file(home, tmp_path, quantized):
    """A GGUF file of a Llama gives what the Llama gives: exactly if fp32, nearly if its matrices are 8 bits."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "softmax")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", tmp_path / "llama", quantized)
    data = str(home / "corpus.txt")
    report = audit(settings(tmp_path, "tiny.gguf", data=data, against=str(tmp_path / "llama")))
    got, want = report["runs"]
    tolerance = {"rtol": 0.1, "atol": 0.02} if quantized else {"rtol": 1e-4, "atol": 1e-6}
    for name in ("alpha", "alpha_normalized"):
        a, b = (torch.tensor(run["measurements"]["sink"]["first"][name]) for run in (got, want))
        assert a.shape == (2, 4)
        torch.testing.assert_close(a, b, **tolerance)
    assert got["perplexity"] == pytest.approx(want["perplexity"], rel=0.05 if quantized else 1e-4)
    assert (got["perplexity"] == pytest.approx(want["perplexity"], rel=1e-6)) is not quantized
    assert got["samples"][0]["text_tokens"] == want["samples"][0]["text_tokens"]


def test_a_gguf_file_is_described_once(home, tmp_path, monkeypatch):
    """One reading for the description, whatever asks for it, and one for the weights; a file that changed is read again."""
    gguf = pytest.importorskip("gguf")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "softmax")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tmp_path / "llama", False)
    read, reader = [], gguf.GGUFReader

    class Counting(reader):
        def __init__(self, *args, **kwargs):
            read.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    for more in (2, 1):  # the description is known the second time
        before = len(read)
        subject = load_subject(str(file), reporter=Silent())
        assert len(read) - before == more
    weight = subject.model.lm_head.weight.detach().clone()
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    write_gguf(file, tmp_path / "llama", False)
    before = len(read)
    again = load_subject(str(file), reporter=Silent())
    assert len(read) - before == 2
    assert not torch.equal(again.model.lm_head.weight, weight)


def test_gguf_missing(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    with pytest.raises(ModelError, match=r"needs gguf: pip install 'softpick\[gguf\]'"):
        audit(settings(tmp_path, "x.gguf", data=__file__))


# The command


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
    command += [
        "--samples",
        "4",
        "--sequence-length",
        "24",
        "--text",
        "the cat sat",
        "--knockout",
        "first,3",
        "--output",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Sink rate > 0.3, first token" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert "samples" not in results["runs"][0]
    assert [entry["key"] for entry in results["runs"][0]["knockout"]] == ["first", 3]
    assert results["settings"]["samples"] == 4
    assert results["meta"]["seed"] == "none: nothing is drawn"
    assert results["meta"]["command"].startswith("softpick analyze ")
    assert all(name in results["meta"]["versions"] for name in ("softpick", "torch", "transformers", "Python"))
    assert "measuring softpick: 1/1" in done.stdout
    assert sorted(f.name for f in out.iterdir()) == ["report.html", "results.json"]
    assert "softpick analyze: softpick" in (out / "report.html").read_text()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "report.html is there already; choose another --output" in again.stderr
