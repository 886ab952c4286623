"""Capture: what reaches the metrics is what the model computed, and the model is left as it was."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from softpick.analysis.capture import attention_maps, measure  # noqa: E402
from softpick.analysis.metrics import Meter  # noqa: E402
from softpick.integrations.transformers import register  # noqa: E402

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


def test_largest_score():
    model = llama("eager")
    got = measure(model, batches(False), largest_score=True)
    assert got.rows["max_score"] == max(got.rows["max_score_per_layer"])
    assert measure(model, batches(False)).rows["max_score"] is None


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
