"""Sentences, conditions that fail an audit, published figures; kinds of sinks and origins of outliers on made-up models."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from softpick.analysis import records
from softpick.analysis.kinds import look_closer, where_of
from softpick.analysis.references import REFERENCES, THRESHOLDS
from softpick.analysis.settings import AuditError, AuditSettings
from softpick.analysis.verdict import Condition, failed, figures, parse_condition, reference_rows, verdict
from softpick.cli.measuring import default_output
from softpick.experiment.models import Subject

SCHEMES = [("int8-tensor", 131.7), ("int8-token", 4.4), ("fp8-tensor", 0.8), ("int4-weights", 7.0)]


def made(rate=60.7, strongest=67.0, eviction=99.3, **more):
    """A run of SmolLM2's figures."""
    sink = {
        "first": {"rate": {"0.3": rate, "0.2": 70.0}, "rate_normalized": {"0.3": rate, "0.2": 70.0}},
        "strongest": {"rate": {"0.3": strongest, "0.2": 80.0}},
        "by_token": [{"token_id": 5, "strongest": 64.0}, {"token_id": 6, "strongest": 1.0}],
    }
    return {
        "normalizer": "softmax",
        "title": "smol",
        "token_text": {"1": "<bos>", "5": "\n"},
        "measurements": {
            "data": {"sequence_length": {"max": 256}},
            "sink": sink,
            "heads": {"total": 270, "dead": 0, "dead_percent": 0.0},
            "sparsity": {"zero": 0.0},
            "hidden": {"max_abs": 24926.0, "massive": {"count": 1}},
        },
        "knockout": [
            {"key": "first", "all keys": 20.93, "eviction": 41.71, "eviction_percent": eviction, "absence": 20.44,
             "absence_percent": -2.4, "after": 16, "tokens": 3568},
        ],
        "outliers": {
            "massive": [
                {"channel": 507, "value": 24926.0, "from": 11, "to": 27, "rises": 11, "module": "MLP", "cancelled": 28,
                 "position": 0, "token_id": 1, "first_token_percent": 100.0},
            ]
        },
        "cost": {
            "schemes": [{"name": n, "change_percent": c} for n, c in SCHEMES],
            "kv_cache": [{"bits": 4, "change_percent": 10.2}],
            "keep": [{"scheme": "int8-tensor", "kept": 4, "names": ["a", "b", "c", "d"], "change_percent": 3.2,
                      "weights_percent": 5.0}],
            "remedies": [{"scheme": "int8-tensor", "remedy": "smoothing", "change_percent": 40.0},
                         {"scheme": "int8-tensor", "remedy": "prefix", "change_percent": 5.1}],
        },
    } | more  # fmt: skip


def test_sentences_have_the_numbers_and_their_rows():
    said = verdict(made())
    assert 3 <= len(said) <= 8
    assert said[0].startswith("60.7 % of heads put more than 0.3 of their weight on the first token at T = 256")
    assert "88 to 99 %" in said[0]
    text = " ".join(said)
    for part in (
        "67.0 % of heads put more than 0.3 on some token", r"'\n'", "by +99.3 % (20.93 to 41.71)", "keep it",
        "Channel 507 of the residual stream is 24,926 on the first token from layer 11 to 27, written by the MLP of layer 11",
        "cancelled in layer 28", "+131.7 %", "+4.4 %", "+0.8 %", "a, b, c and 1 more in 16 bits (5.0 % of the weights)",
        "+3.2 %", "keeping the first token in 16 bits: +5.1 %",
    ):  # fmt: skip
        assert part in text, part
    names = {metric.label for metric in records.METRICS} | {
        "Knockout", "Cost of rounding", "Layers to keep in 16 bits", "Remedies", "Kinds of sinks",
    }  # fmt: skip
    for sentence in said:
        for row in sentence[sentence.rindex("[") + 1 : -1].split("; "):
            assert row in names, row


def test_sentences_of_a_model_without_sinks():
    run = made(rate=0.0, strongest=1.0, eviction=0.2, outliers={"massive": []}, cost=None)
    run["measurements"]["hidden"] = {"max_abs": 36.0, "massive": {"count": 0}}
    run["measurements"]["sparsity"]["zero"] = 84.5
    said = verdict(run)
    assert said[0].startswith("There are hardly any sinks: 0.0 % of heads")
    assert "a cache may drop the first token" in said[1]
    assert said[2].startswith("There are no massive activations; the largest |x| is 36")
    assert said[3].startswith("84.5 % of the weights are exactly 0, and 0 of 270 heads are dead")
    # a small row mass must not pass for a model without sinks
    run["measurements"]["sink"]["first"]["rate_normalized"]["0.3"] = 40.0
    assert verdict(run)[0].startswith("0.0 % of heads (40.0 % as a share of row mass)")


def test_sentences_of_figures_without_a_number():
    """A perplexity beyond fp64 has no number: it is called so, counts as the worst, and is infinite in conditions."""
    run = made(validation_loss=900.0, perplexity=None)
    worst = run["knockout"][0] | {"key": 20, "all keys": None, "eviction": None, "eviction_percent": None}
    run["knockout"].append(worst)
    (said,) = [sentence for sentence in verdict(run) if "[Knockout]" in sentence]
    assert "position 20 after 16 tokens changes perplexity beyond measure (beyond fp64 to beyond fp64)" in said
    found = figures(run)
    assert found["perplexity"] == found["eviction_20"] == math.inf
    (sentence,) = failed([Condition("perplexity", ">", 1e6)], {"runs": [run]})
    assert sentence == "smol: perplexity > 1e+06 (perplexity is inf)"


def test_the_worst_of_several_knockouts_is_told_and_few_tokens_are_said():
    run = made()
    run["knockout"].insert(0, run["knockout"][0] | {"key": 20, "eviction_percent": 1.0})
    run["knockout"].append(run["knockout"][0] | {"key": 7, "tokens": 0, "eviction_percent": None})
    run["knockout"][1] |= {"tokens": 2, "after": 1}
    (said,) = [sentence for sentence in verdict(run) if "[Knockout]" in sentence]
    assert "the first token after 1 token changes perplexity by +99.3 %" in said
    assert "of 2 tokens only" in said
    assert "eviction_7" not in figures(run)


def test_sentences_of_activations():
    run = made(outliers={"massive": []})
    run["measurements"]["hidden"] = {"max_abs": 5000.0, "massive": {"count": 2}}
    assert "2 activations are massive, none of them in the samples" in " ".join(verdict(run))
    run["measurements"]["hidden"] = {"max_abs": 0.0878, "massive": {"count": 0}}
    assert "the largest |x| is 0.0878." in " ".join(verdict(run))


def test_short_sequences_say_nothing_of_sinks():
    run = made()
    run["measurements"]["data"]["sequence_length"]["max"] = 8
    assert "at this length uniform attention has 0.34 there" in verdict(run)[0]
    run["measurements"]["data"]["sequence_length"]["max"] = 16
    assert "uniform" not in verdict(run)[0]


def test_a_remedy_that_does_harm_is_none():
    run = made()
    for remedy in run["cost"]["remedies"]:
        remedy["change_percent"] = 500.0
    assert not any("[Remedies]" in sentence for sentence in verdict(run))


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("sink_first_0.3 > 5", Condition("sink_first_0.3", ">", 5.0)),
        ("kurtosis>=1e3", Condition("kurtosis", ">=", 1000.0)),
        (" cost_int8-tensor < -0.5 ", Condition("cost_int8-tensor", "<", -0.5)),
        ("eviction_first <= 2", Condition("eviction_first", "<=", 2.0)),
    ],
)
def test_conditions(text, condition):
    assert parse_condition(text) == condition


@pytest.mark.parametrize("text", ["sink > 5", "kurtosis = 5", "kurtosis > x", "", "kurtosis", "> 5"])
def test_conditions_that_are_none(text):
    with pytest.raises(
        AuditError, match=r"fail_if: (expected NAME > NUMBER|no figure is named 'sink'; .*sink_first_0.3)"
    ):
        parse_condition(text)


def test_conditions_fail_and_do_not():
    report = {"runs": [made(), made(rate=1.0, title="other")]}
    assert figures(report["runs"][0])["cost_kv4"] == 10.2
    found = failed([parse_condition("sink_first_0.3 > 5"), parse_condition("cost_int8-token < 4")], report)
    assert found == ["smol: sink_first_0.3 > 5 (sink_first_0.3 is 60.7)"]
    assert failed([parse_condition("sink_first_0.3 > 60.7")], report) == []
    assert len(failed([parse_condition("sink_first_0.3 >= 60.7")], report)) == 1
    with pytest.raises(AuditError, match=r"no model has the figure 'cost_fp8-group'; there are .*cost_fp8-tensor"):
        failed([parse_condition("cost_fp8-group > 1")], report)


@pytest.mark.parametrize(
    ("condition", "options", "message"),
    [
        ("cost_int8-token > 1", {}, "the figure cost_int8-token needs --cost"),
        ("cost_fp4 > 1", {"cost": True}, "no figure is named 'cost_fp4'; .*cost_fp8-token.* cost_kv4"),
        ("eviction_first > 1", {"knockout": ()}, "the figure eviction_first needs --knockout first"),
        ("absence_strongest > 1", {}, "the figure absence_strongest needs --knockout strongest"),
        ("eviction_3 > 1", {"knockout": (2, "first")}, "the figure eviction_3 needs --knockout 3"),
        ("eviction > 1", {}, "no figure is named 'eviction'"),
    ],
)
def test_conditions_on_figures_that_the_options_leave_out(condition, options, message):
    """Known before anything is measured."""
    with pytest.raises(AuditError, match=f"fail_if: {message}"):
        AuditSettings("x", fail_if=(condition,), **options).check()
    AuditSettings("x", fail_if=("eviction_2 > 1", "cost_kv4 > 3"), knockout=(2,), cost=True).check()


def test_published_figures_stand_beside_the_users():
    rows = reference_rows({"runs": [made()]})
    assert {row["key"] for row in rows} >= {"sink_first_0.3", "sink_first_0.2", "zero"}
    gu = next(row for row in rows if row["source"].startswith("Gu"))
    assert (gu["text"], gu["yours"]) == ("88.0 to 99.0 %", ["60.7 %"])
    keys = {metric.key for metric in records.METRICS}
    assert all(r.metric in keys and r.source and r.conventions and r.low <= r.high for r in REFERENCES)
    assert all(t.source and t.meaning for t in THRESHOLDS.values())


def test_default_output():
    assert default_output("softpick-analyze", ["A/model", None]) == "softpick-analyze-A-model"
    assert default_output("softpick-analyze", ["x/A/model", "B/model"]) == "softpick-analyze-A-model-B-model"
    assert default_output("softpick-analyze", ["./m 1.gguf"]) == "softpick-analyze-m-1.gguf"


class Words:
    @staticmethod
    def decode(ids):
        return {1: "<bos>", 4: ",\n"}.get(ids[0], f"w{ids[0]}")


def test_where():
    assert [where_of(0, "x"), where_of(3, ",\n"), where_of(3, " "), where_of(3, "a."), where_of(2, "7")] == [
        "first", "delimiter", "delimiter", "other", "other",
    ]  # fmt: skip


def sinking(scale_of_value):
    """A model whose layer 0 always attends to BOS, whose value is so large, and whose layer 1 writes a massive channel."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, initializer_range=0.02, rope_theta=1e9,
        )
    ).eval()  # fmt: skip
    words = model.model.embed_tokens.weight.data
    words.normal_(0, 1)
    words[:, :2] = 0
    words[1] = 0
    words[1, 0] = 4.0  # only BOS is in channel 0
    words[:, 1] = 1.0  # all are in channel 1
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.data.zero_()
    attention.k_proj.weight.data.zero_()
    for head in range(2):
        attention.q_proj.weight.data[head * 8 + 3, 1] = 20.0  # a slow pair of RoPE
        attention.k_proj.weight.data[head * 8 + 3, 0] = 20.0
    attention.v_proj.weight.data.normal_(0, 0.5)
    attention.v_proj.weight.data[:, 0] *= scale_of_value
    attention.v_proj.weight.data[:, 1] = 0
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.data.zero_()
    mlp.up_proj.weight.data.zero_()
    mlp.down_proj.weight.data.zero_()
    mlp.gate_proj.weight.data[0, 0] = 10.0  # only BOS
    mlp.up_proj.weight.data[0, 0] = 10.0
    mlp.down_proj.weight.data[5, 0] = 20.0
    ids = torch.randint(3, 30, (3, 20), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 1
    return Subject("m", model, Words, causal=True), ids


@pytest.mark.parametrize(("scale", "kind"), [(0.01, "no-op"), (3.0, "broadcast")])
def test_kinds_and_origins(scale, kind):
    subject, ids = sinking(scale)
    found = look_closer(subject, [{"input_ids": batch} for batch in ids.split(2)])[""]
    json.dumps(found, allow_nan=False)
    heads = [h for h in found["sinks"]["heads"] if h["layer"] == 0]
    assert [(h["head"], h["kind"], h["where"], h["token_id"], h["samples"]) for h in heads] == [
        (i, kind, "first", 1, 3) for i in range(2)
    ]
    model = subject.model.model
    with torch.no_grad():  # value norms a second time, from the weights
        x = model.layers[0].input_layernorm(model.embed_tokens(ids))
        v = model.layers[0].self_attn.v_proj(x).view(3, 20, 2, 8).norm(dim=-1)
        ratio = (v[:, 0] / v.mean(1)).mean(0)
        hidden = []
        handles = [layer.register_forward_hook(lambda m, i, o: hidden.append(o)) for layer in model.layers]
        model(ids)
        [handle.remove() for handle in handles]
    assert [h["value_ratio"] for h in heads] == pytest.approx(ratio.tolist(), rel=1e-4)
    (channel,) = found["outliers"]["massive"]
    assert (channel["channel"], channel["rises"], channel["from"], channel["to"]) == (5, 1, 1, 2)
    assert (channel["module"], channel["cancelled"], channel["token_id"]) == ("MLP", None, 1)
    assert channel["first_token_percent"] == 100.0
    assert channel["value"] == pytest.approx(float(torch.stack(hidden)[..., 5].max()), rel=1e-4)
    assert not any(m._forward_hooks for m in subject.model.modules())
