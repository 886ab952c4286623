"""A ``Normalizer`` of one's own as ``attn_implementation`` of transformers: what it computes, and how it is saved."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from softpick import NORMALIZERS, Normalizer, get_normalizer
from softpick.normalizers import is_normalizer

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from softpick.integrations.checkpoints import MARK
from softpick.integrations.transformers import IMPLEMENTATIONS, SoftpickLlamaConfig, normalizer_of

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = torch.arange(11)[None] * 5 % 64


def _expm1(x, seen):
    return torch.expm1(x) * seen


RECORDS = {
    "relu": (
        Normalizer("relu", base="linear", rectify="positive", eps=1e-6),
        lambda x, seen: (x.relu() * seen) / ((x.relu() * seen).sum(-1, keepdim=True) + 1e-6),
    ),
    "sigmoid": (
        Normalizer("sigmoid", base="sigmoid", constant=1, normalized=False),
        lambda x, seen: torch.sigmoid(x) * seen,
    ),
    "softpick of another kind": (
        replace(NORMALIZERS["softpick"], absolute_denominator=False, constant=1, eps=0.0),
        lambda x, seen: _expm1(x, seen).relu() / (_expm1(x, seen).relu().sum(-1, keepdim=True) + 1),
    ),
}


@pytest.fixture(params=RECORDS)
def record(request):
    return RECORDS[request.param][0]


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def by_formula(record, weights, monkeypatch):
    """Logits of transformers' eager attention, whose softmax is the formula of the record."""
    formula = next(formula for other, formula in RECORDS.values() if other is record)

    def softmax(x, dim=-1, dtype=None):
        seen = x > -1e30
        return formula(torch.where(seen, x, 0.0), seen)

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="eager")
    model.load_state_dict(weights)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        return logits(model)


@pytest.mark.parametrize("given", ["record", "text", "by part", "set", "class"])
def test_a_record_computes_its_formula(record, given, monkeypatch):
    config = LlamaConfig(**SMALL)
    if given == "set":
        model = AutoModelForCausalLM.from_config(config)
        model.set_attn_implementation(record)
    elif given == "class":
        model = LlamaForCausalLM(LlamaConfig(attn_implementation=record, **SMALL))
    else:
        name = {"record": record, "text": record.text, "by part": {"": record}}[given]
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    assert normalizer_of(model) == record.text
    assert get_normalizer(normalizer_of(model)).switches == record.switches
    torch.testing.assert_close(logits(model), by_formula(record, model.state_dict(), monkeypatch))


LOAD = """
import sys, torch
if sys.argv[2] == "ours":
    import softpick.integrations.transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
kind = AutoModelForCausalLM if sys.argv[3] == "auto" else LlamaForCausalLM
model = kind.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model.eval()(torch.arange(11)[None] * 5 % 64).logits, sys.argv[1] + "/logits.pt")
print(model.config._attn_implementation)
"""


def load(folder, program, kind):
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), program, kind], capture_output=True, text=True, check=False
    )


def test_a_saved_model_never_runs_softmax(record, tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation=record)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "llama" + MARK
    assert saved["architectures"] == ["LlamaForCausalLM" + MARK]
    assert saved["attn_implementation"] == saved["softpick_normalizer"] == record.text
    done = load(tmp_path, "ours", "auto")  # another process, which never made the record
    assert done.stdout.strip() == record.text, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))
    (tmp_path / "logits.pt").unlink()
    for kind in ("auto", "named"):
        refused = load(tmp_path, "theirs", kind)
        assert refused.returncode != 0
        assert "ValueError" in refused.stderr
        assert not (tmp_path / "logits.pt").exists()


def test_what_is_given_at_load_wins(record, tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="softmax").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=record)
    assert normalizer_of(model) == record.text
    model.save_pretrained(tmp_path / "again")
    assert (
        normalizer_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation=None)) == record.text
    )
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "llama"


def test_softpick_llama_takes_a_record(record, tmp_path):
    model = AutoModelForCausalLM.from_config(SoftpickLlamaConfig(normalizer=record, output_gate=True, **SMALL))
    assert normalizer_of(model) == record.text
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).normalizer == record.text
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), want)
    model.set_attn_implementation("softpick")
    assert not torch.equal(logits(model), want)
    model.set_attn_implementation(record)
    torch.testing.assert_close(logits(model), want)


def test_models_that_compute_softmax_by_themselves_refuse_records(record):
    from transformers import BloomConfig

    with pytest.raises(ValueError, match="Bloom"):
        AutoModelForCausalLM.from_config(BloomConfig(hidden_size=16, n_layer=1, n_head=2), attn_implementation=record)


def test_names_are_told_from_texts():
    assert all(map(is_normalizer, IMPLEMENTATIONS))
    for name in ("eager", "sdpa", "flash_attention_2", "paged|eager", None, {}, 3, "relu()", "relu(base=linear)"):
        assert not is_normalizer(name)
    switches = "absolute_denominator=False,constant=0,negative_gradient=True,normalized=True,eps=0.0"
    assert is_normalizer(f"somebody(base=exp,rectify=none,{switches})")
    with pytest.raises(ValueError, match="rectify: expected 'none' or 'positive' for base 'linear'"):
        is_normalizer(f"somebody(base=linear,rectify=nonnegative,{switches})")


def test_names_that_transformers_takes_for_kernels_are_refused():
    with pytest.raises(ValueError, match="expected another name for the record, got 'my_flash'"):
        AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            ),
            attn_implementation=Normalizer("my_flash", base="linear", rectify="positive", eps=1e-6),
        )
