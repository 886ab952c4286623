"""Capture: what reaches the metrics is what the model computed, and the model is left as it was."""

import copy
import json
import os
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import softpick  # noqa: E402
from softpick.analysis import bertviz_arguments, calls, hook_cache, metrics  # noqa: E402
from softpick.analysis.capture import attention_maps, measure  # noqa: E402
from softpick.analysis.metrics import Meter  # noqa: E402
from softpick.integrations.transformers import (  # noqa: E402
    SoftpickLlamaConfig,
    SoftpickLlamaForCausalLM,
    register,
)

register()
T = 24


def llama(implementation="eager", **more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        attention_dropout=0.5,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation, **more)


def gpt2(implementation="eager"):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=implementation)


def bert(implementation="eager"):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return transformers.BertForMaskedLM._from_config(config, attn_implementation=implementation)


PARTS = {  # layers and output projections of each model
    "LlamaForCausalLM": (lambda m: m.model.layers, lambda layer: layer.self_attn.o_proj),
    "GPT2LMHeadModel": (lambda m: m.transformer.h, lambda layer: layer.attn.c_proj),
    "BertForMaskedLM": (lambda m: m.bert.encoder.layer, lambda layer: layer.attention.output.dense),
}


def batches(pad=True):
    g = torch.Generator().manual_seed(1)
    result = []
    for _ in range(2):
        ids = torch.randint(3, 60, (3, T), generator=g)
        mask = torch.ones_like(ids)
        if pad:
            mask[0, 15:] = 0
            mask[1, :6] = 0
        first = mask.argmax(1, keepdim=True)
        result.append({"input_ids": ids.scatter(1, first, 1), "attention_mask": mask})
    return result


def direct(model, data, causal=True):
    """The same figures from transformers' own output_attentions and hooks of the test's own."""
    layers_of, projection_of = PARTS[type(model).__name__]
    model = copy.deepcopy(model).eval()
    heads = model.config.num_attention_heads
    hidden, outputs = [], []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda m, i, o: hidden.append(o if torch.is_tensor(o) else o[0]))
        projection_of(layer).register_forward_pre_hook(lambda m, i: outputs.append(i[0]))
    meter = Meter()
    for batch in data:
        hidden.clear()
        outputs.clear()
        with torch.no_grad():
            maps = model(**batch, output_attentions=True).attentions
        meter.begin_batch(batch["attention_mask"].bool(), batch["input_ids"])
        for i, a in enumerate(maps):
            b, t, c = outputs[i].shape
            meter.attention(i, a, outputs[i].view(b, t, heads, c // heads), causal=causal)
            meter.hidden(i, hidden[i])
    return meter.result().to_dict()


def assert_close(a, b, rel=2e-4):
    """Equal in shape, names and whole numbers; close in the others."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            if k.endswith("histogram"):  # rounding may carry an entry over the edge of a bin, and no further
                assert len(a[k]) == len(b[k])
                assert sum(a[k]) == sum(b[k])
                assert max(abs(x - y) for x, y in zip(accumulate(a[k]), accumulate(b[k]), strict=True)) <= 1
            elif k in ("q1", "median", "q3", "median_abs", "times_median"):  # read off buckets: a neighbour at most
                assert a[k] == pytest.approx(b[k], rel=2.1e-3, abs=2e-5)
            else:
                assert_close(a[k], b[k], rel)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, rel)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=rel, abs=1e-5)
    else:
        assert a == b


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("implementation", ["eager", "softpick"])
def test_matches_output_attentions(make, implementation):
    model = make(implementation)
    got = measure(model, batches()).to_dict()
    assert_close(got, direct(model, batches(), causal=make is not bert))
    assert got["data"]["causal"] is (make is not bert)
    assert (got["sparsity"]["zero"] > 20) is (implementation == "softpick")
    assert (got["rows"]["mass"] == pytest.approx(1.0)) is (implementation == "eager")


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("pad", [True, False])
def test_sdpa_equals_eager(make, pad):
    eager, sdpa = make("eager"), make("sdpa")
    assert_close(measure(sdpa, batches(pad)).to_dict(), measure(eager, batches(pad)).to_dict())


@pytest.mark.parametrize("name", ["softmax_plus_one", "relu_softpick", "linear_softpick"])
def test_other_normalizers(name):
    model = llama(name)
    got = measure(model, batches()).to_dict()
    assert_close(got, direct(model, batches()))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "softpick"])
def test_half_precision_weights_are_fp32(implementation):
    """bf16 keeps 8 bits: rows of rounded weights sum to 1 only to about 1e-3."""
    model = llama(implementation, dtype=torch.bfloat16)
    maps = attention_maps(model, batches(False)[0]["input_ids"][0])
    assert maps.dtype == torch.float32
    assert not torch.equal(maps, maps.bfloat16().float())
    if implementation != "softpick":
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]), rtol=0, atol=1e-6)


def test_padding_changes_nothing():
    model = llama("softpick")
    alone = batches(False)[0]["input_ids"][:1, :15]
    padded = torch.cat([alone, torch.full((1, 9), 7)], 1)
    mask = torch.ones_like(padded)
    mask[:, 15:] = 0
    assert_close(
        measure(model, [{"input_ids": padded, "attention_mask": mask}]).to_dict(),
        measure(model, [{"input_ids": alone}]).to_dict(),
    )


def test_attention_maps():
    model = llama("softpick")
    ids = batches(False)[0]["input_ids"][0]
    maps = attention_maps(model, ids)
    assert maps.shape == (3, 4, T, T)
    assert not maps.triu(1).any()
    with torch.no_grad():
        want = torch.cat(copy.deepcopy(model).eval()(ids[None], output_attentions=True).attentions)
    torch.testing.assert_close(maps, want)
    with pytest.raises(ValueError, match="one sample"):
        attention_maps(model, torch.ones(2, 4, dtype=torch.long))


def test_largest_score_by_hand():
    """GPT-2 has no rotation: its scores are products of what ``c_attn`` gives."""
    model, data = gpt2("sdpa").eval(), batches(False)
    got = measure(model, data, largest_score=True).rows
    largest = [-float("inf")] * 2
    for layer, block in enumerate(model.transformer.h):

        def see(module, inputs, output, layer=layer):
            query, key = (x.view(3, T, 4, 8).transpose(1, 2).double() for x in output.split(32, -1)[:2])
            for q in range(T):
                for k in range(q + 1):
                    score = ((query[:, :, q] * key[:, :, k]).sum(-1) / 8**0.5).max().item()
                    largest[layer] = max(largest[layer], score)

        block.attn.c_attn.register_forward_hook(see)
    with torch.no_grad():
        for batch in data:
            model(**batch)
    assert got["max_score_per_layer"] == pytest.approx(largest, rel=1e-5)
    assert got["max_score"] == pytest.approx(max(largest), rel=1e-5)
    assert measure(model, data).rows["max_score"] is None


def learned_sink(normalizer="learned_sink", **more):
    more |= {"normalizer": normalizer, "attention_dropout": 0.0}
    fields = {k: v for k, v in llama("softpick").config.to_dict().items() if k != "attn_implementation"}
    config = SoftpickLlamaConfig(**(fields | more))
    assert config.normalizer == normalizer
    torch.manual_seed(1)
    model = SoftpickLlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith(("sinks", "score_scale")):
            torch.nn.init.normal_(p)
    return model


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=60, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_local_experts=2, num_experts_per_tok=1,
        initializer_range=0.3, bos_token_id=1, pad_token_id=0, sliding_window=8,
    )  # fmt: skip
    return transformers.GptOssForCausalLM._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize(
    "make",
    [
        llama,
        gpt2,
        bert,
        lambda: llama("sdpa"),
        lambda: bert("sdpa"),
        lambda: llama("softpick"),
        lambda: llama("eager", dtype=torch.bfloat16),
        lambda: llama("softpick", dtype=torch.bfloat16),
        learned_sink,
        lambda: learned_sink("softpick", output_gate=True, score_scale=True),
        gpt_oss,
    ],
    ids=[
        "llama",
        "gpt2",
        "bert",
        "llama-sdpa",
        "bert-sdpa",
        "softpick",
        "bf16",
        "softpick-bf16",
        "sinks",
        "gate",
        "gpt-oss",
    ],
)
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_pieces_change_nothing(make, at_once, monkeypatch):
    """A head or two at a time (also of those that share a key head) give what the whole layer gives."""
    model, data = make(), batches()
    want = measure(model, data, largest_score=True).to_dict()
    pieces = []
    monkeypatch.setattr(calls, "MAX_ENTRIES", at_once * T * T)
    monkeypatch.setattr(metrics, "MAX_ENTRIES", at_once * T * T)
    real = Meter.attention

    def counted(self, layer, weights, *args, **kwargs):
        pieces.append(tuple(weights.shape[:2]))
        return real(self, layer, weights, *args, **kwargs)

    monkeypatch.setattr(Meter, "attention", counted)
    assert_close(measure(model, data, largest_score=True).to_dict(), want)
    # gpt-oss keeps its sinks in the attention module; softpick's function is given them
    total, grouped = model.config.num_attention_heads, model.config.model_type not in ("gpt2", "bert")
    step = total if make is gpt_oss else min(at_once, 2) if grouped else at_once
    assert set(pieces) == {(1, min(step, total - head)) for head in range(0, total, step)}


def test_a_meter_goes_on():
    """Batches measured in two calls, the meter written to a file between them, equal one call."""
    model, data = llama("softpick"), batches()
    meter = Meter("auto", [1])
    measure(model, data[:1], meter=meter)
    with tempfile.TemporaryDirectory() as folder:
        metrics.save_meters({"": meter}, 1, Path(folder) / "meter.pt")
        meters, done = metrics.load_meters(Path(folder) / "meter.pt")
        assert os.listdir(folder) == ["meter.pt"]
    assert done == 1
    assert measure(model, data[1:], meter=meters[""]).to_dict() == measure(model, data, tokens=[1]).to_dict()


@pytest.mark.long
def test_memory_of_long_texts():
    """Less is held beside the weights than the fp32 weights of one layer's attention, and half of all layers'."""
    script = Path(__file__).parents[1] / "benchmarks" / "audit_memory.py"
    options = ["--layers", "2", "--heads", "32", "--length", "2048"]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["maps_gb"] > 1.0
    assert row["extra_gb"] < 0.5, row


# Viewers


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "softpick"])
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_hook_cache(make, implementation):
    """Names and layouts of TransformerLens; the pattern is the normalizer of the scores, z is pattern times values."""
    model = make(implementation).eval()
    layers_of, projection_of = PARTS[type(model).__name__]
    ids = batches(False)[0]["input_ids"][0]
    z, hidden = [], []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda m, i, o: hidden.append(o if torch.is_tensor(o) else o[0]))
        projection_of(layer).register_forward_pre_hook(lambda m, i: z.append(i[0]))
    cache = hook_cache(model, ids)
    count = len(z)
    names = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "hook_resid_post")
    assert sorted(cache) == sorted(f"blocks.{i}.{name}" for i in range(count) for name in names)
    for i in range(count):
        scores, pattern = (cache[f"blocks.{i}.attn.hook_{name}"] for name in ("attn_scores", "pattern"))
        assert scores.shape == pattern.shape == (1, 4, T, T)
        assert bool(scores.triu(1).isneginf().any()) is (make is not bert)
        if implementation == "softpick":
            see = ~scores.isneginf()
            want = softpick.softpick(scores.masked_fill(~see, 0.0), where=see)
        else:
            want = torch.softmax(scores, -1)
        torch.testing.assert_close(pattern, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(cache[f"blocks.{i}.attn.hook_z"], z[i].view(1, T, 4, 8), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache[f"blocks.{i}.hook_resid_post"], hidden[i])


def test_scores_are_what_the_normalizer_saw():
    """Soft-capped (Gemma 2) and biased scores: softmax of them is the pattern."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, attn_logit_softcapping=2.0, sliding_window=8,
        initializer_range=0.5,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    cache = hook_cache(model, batches(False)[0]["input_ids"][0])
    for i in range(2):
        scores = cache[f"blocks.{i}.attn.hook_attn_scores"]
        assert scores.max() < 2.0
        torch.testing.assert_close(cache[f"blocks.{i}.attn.hook_pattern"], torch.softmax(scores, -1))
    assert cache["blocks.0.attn.hook_pattern"][0, :, -1, : T - 8].abs().max() == 0  # beyond the window


def test_scores_with_a_learned_scale():
    cache = hook_cache(learned_sink("softmax", score_scale=True).eval(), batches(False)[0]["input_ids"][0])
    for i in range(3):
        scores = cache[f"blocks.{i}.attn.hook_attn_scores"]
        torch.testing.assert_close(cache[f"blocks.{i}.attn.hook_pattern"], torch.softmax(scores, -1))


def test_bertviz_arguments():
    model, ids = llama("softpick").eval(), batches(False)[0]["input_ids"][0]

    class Words:
        def convert_ids_to_tokens(self, ids):
            return [f"w{i}" for i in ids]

    found = bertviz_arguments(model, ids, Words())
    assert found["tokens"] == [f"w{i}" for i in ids.tolist()]
    with torch.no_grad():
        want = model(ids[None], output_attentions=True).attentions
    assert isinstance(found["attention"], list)
    assert [a.shape for a in found["attention"]] == [(1, 4, T, T)] * 3
    for a, b in zip(found["attention"], want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="expected one sample"):
        bertviz_arguments(model, torch.ones(2, 4, dtype=torch.long), Words())


def state(model):
    interface = transformers.AttentionInterface.get_interface
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return interface, hooks, [m.training for m in model.modules()], model.config.to_json_string()


@pytest.mark.parametrize("fail", [False, True])
def test_everything_is_restored(fail):
    model = llama("softpick").train()
    model.model.layers[1].eval()
    before, data = state(model), batches()
    if fail:
        data[1]["input_ids"][2, 3] = 999  # not in the vocabulary
        with pytest.raises(IndexError):
            measure(model, data)
    else:
        measure(model, data)
    assert state(model) == before


def test_runs_in_evaluation_mode_without_gradients():
    model = llama("eager").train()  # with dropout
    assert_close(measure(model, batches()).to_dict(), measure(model.eval(), batches()).to_dict())
    assert all(p.grad is None for p in model.parameters())


def test_other_models_are_not_captured():
    """A model that runs while another is measured enters nothing."""
    model, other = llama("eager"), llama("eager")
    data = batches()

    def and_other():
        for batch in data:
            other(**batch)
            yield batch

    assert_close(measure(model, and_other()).to_dict(), measure(model, data).to_dict())


def test_token_ids_without_a_dict():
    model, ids = llama(), batches(pad=False)[0]["input_ids"]
    want = measure(model, [{"input_ids": ids}]).to_dict()
    assert measure(model, ids).to_dict() == measure(model, [ids]).to_dict() == want
    with pytest.raises(ValueError, match=r"input_ids: expected \(B, T\), got \(6,\)"):
        measure(model, torch.ones(6, dtype=torch.long))


def test_progress_and_bos_policy():
    done = []
    m = measure(llama(), batches(), bos_policy="bos", progress=done.append)
    assert done == [1, 2]
    assert m.data["bos"] == {"policy": "bos", "first_token_id": 1, "first_token_share": 100.0}
    wrong = batches(False)
    wrong[0]["input_ids"][1, 0] = 5
    with pytest.raises(ValueError, match="start with token 1; one starts with 5"):
        measure(llama(), wrong, bos_policy="bos")
    with pytest.raises(ValueError, match="bos_policy: expected one of auto, bos, none"):
        measure(llama(), batches(), bos_policy="yes")


def test_errors():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(60, 4)

        def forward(self, input_ids, attention_mask=None):
            return self.embed(input_ids)

    with pytest.raises(ValueError, match="no attention layers were seen in Plain"):
        measure(Plain(), batches())
    with pytest.raises(ValueError, match="input_ids, got the keys"):
        measure(llama(), [{"ids": torch.ones(1, 2)}])
    with pytest.raises(ValueError, match="no data"):
        measure(llama(), [])

    name = "weightless_for_test"
    transformers.AttentionInterface.register(
        name, lambda module, q, k, v, mask, **kw: (torch.zeros_like(q).transpose(1, 2), None)
    )
    try:
        with pytest.raises(ValueError, match="returned no weights"):
            measure(llama(name), batches())
    finally:
        transformers.AttentionInterface._global_mapping.pop(name)
