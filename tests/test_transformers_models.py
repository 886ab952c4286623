"""Which models are taken, which masks they compute with, and what else they do with sdpa: against their eager attention."""

from __future__ import annotations

import ast
import math
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from sweep_models import examine  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM  # noqa: E402
from transformers.generation.configuration_utils import CompileConfig  # noqa: E402

import softpick.integrations.transformers as st  # noqa: E402
from softpick.integrations.transformers_layers import _keeps_causality, source_of  # noqa: E402
from softpick.normalizers import NORMALIZERS  # noqa: E402

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
PEGASUS = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def close(a, b, tol=5e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.15, generator=generator)
    return model.eval()


def llama(implementation="softpick", **fields):
    config = transformers.LlamaConfig(**LLAMA, **fields)
    return randomize(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))


@pytest.fixture
def ids():
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------------------
# Layers that compute softmax by themselves

PARTLY = {
    "PegasusXGlobalLocalAttention": (
        "PegasusXForConditionalGeneration",
        lambda: transformers.PegasusXConfig(**PEGASUS),
    ),
    "BigBirdPegasusBlockSparseAttention": (
        "BigBirdPegasusForConditionalGeneration",
        lambda: transformers.BigBirdPegasusConfig(**PEGASUS, attention_type="block_sparse"),
    ),
    "BigBirdPegasusSelfAttention": (
        "BigBirdPegasusForConditionalGeneration",
        lambda: transformers.BigBirdPegasusConfig(**PEGASUS, attention_type="original_full"),
    ),
    "InformerProbSparseAttention": (
        "InformerModel",
        lambda: transformers.InformerConfig(prediction_length=4, d_model=16, encoder_layers=1, decoder_layers=1),
    ),
    "LongT5LocalAttention": (
        "LongT5ForConditionalGeneration",
        lambda: transformers.LongT5Config(**T5, encoder_attention_type="local"),
    ),
    "SiglipMultiheadAttentionPoolingHead|MultiheadAttention": (
        "SiglipVisionModel",
        lambda: transformers.SiglipVisionConfig(**ENCODER, image_size=16, patch_size=4),
    ),
    "ClapAudioSelfAttention": (
        "ClapAudioModel",
        lambda: transformers.ClapAudioConfig(patch_embeds_hidden_size=16, depths=[1]),
    ),
    "Gemma3nAudioAttention": (
        "Gemma3nAudioEncoder",
        lambda: transformers.Gemma3nAudioConfig(
            hidden_size=32, conf_num_attention_heads=4, conf_num_hidden_layers=1, vocab_size=8
        ),
    ),
}


class ByMethod(torch.nn.Module):
    def forward(self, q, k):
        scores = q @ k.mT
        return self.weigh(scores)

    def weigh(self, scores):
        return scores.softmax(-1)


class ByMethodOfABase(ByMethod):
    def forward(self, q, k):
        return self.weigh(torch.matmul(q, k.mT) / 8)


class ByModule(torch.nn.Module):
    def forward(self, hidden):
        query, key = self.project(hidden)
        logits = self.compare(query, key)
        return torch.nn.functional.softmax(logits, dim=-1)


class Router(torch.nn.Module):
    def forward(self, hidden):
        return self.choose(self.gate(hidden))

    def choose(self, logits):
        return logits.softmax(-1)


class Pooling(torch.nn.Module):
    def forward(self, query, key, value):
        query, key = self.rotate(query, key)
        out = self.attend(query, key, value)
        return self.gate(value).softmax(-1) * out.mean()


@pytest.mark.parametrize(
    ("kind", "softmax"),
    [(ByMethod, True), (ByMethodOfABase, True), (ByModule, True), (Router, False), (Pooling, False)],
)
def test_softmax_of_scores_wherever_a_layer_takes_it(kind, softmax):
    assert source_of(kind).softmax is softmax


@pytest.mark.parametrize(
    ("source", "keeps"),
    [
        ("def __init__(self, is_causal=False): pass", True),
        ("def __init__(self, is_causal=True): pass", False),
        ("def __init__(self, is_causal): pass", False),
        ("def __init__(self, bias=False): pass", False),
        ("def other(self, is_causal=False): pass", False),
        ("def __init__(self, is_causal=False): Layer(is_causal=True)", False),
    ],
)
def test_files_whose_layers_are_never_told_that_they_are_causal(source, keeps):
    assert _keeps_causality(ast.parse(source)) is keeps


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("layer", PARTLY)
def test_models_of_which_a_part_computes_softmax_are_refused_by_layer(layer):
    name, config = PARTLY[layer]
    with pytest.raises(ValueError, match=rf"^attn_implementation: \S+ \(({layer})\) of {name[:4]}\w+ does not use"):
        getattr(transformers, name)._from_config(config(), attn_implementation="softpick")
    model = getattr(transformers, name)._from_config(config(), attn_implementation="eager")
    with pytest.raises(ValueError, match=rf"\(({layer})\)"):
        model.set_attn_implementation("relu_softpick")


def implementations(model):
    parts = [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]
    return {part.config._attn_implementation for part in parts}


def test_every_part_gets_another_implementation_or_none_does():
    """Encoder and decoder of T5 have copies of the model's configuration."""
    model = transformers.T5ForConditionalGeneration._from_config(
        transformers.T5Config(**T5), attn_implementation="eager"
    )
    for name in ("softpick", "relu_softpick", "eager"):
        model.set_attn_implementation(name)
        assert implementations(model) == {name}
    name, config = PARTLY["LongT5LocalAttention"]
    model = getattr(transformers, name)._from_config(config(), attn_implementation="eager")
    with pytest.raises(ValueError, match="LongT5LocalAttention"):
        model.set_attn_implementation("softpick")
    assert implementations(model) == {"eager"}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GitForCausalLM", lambda: transformers.GitConfig(num_hidden_layers=1, vision_config={"num_hidden_layers": 1})),
        (
            "SamVisionModel",
            lambda: transformers.SamVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
        ),
        ("Data2VecVisionModel", lambda: transformers.Data2VecVisionConfig(**ENCODER)),
    ],
)
def test_models_with_a_table_of_classes_say_so(name, config):
    with pytest.raises(ValueError, match=r"^attn_implementation: .*'softpick'"):
        getattr(transformers, name)._from_config(config(), attn_implementation="softpick")


def test_pooling_and_routing_are_no_attention():
    """Softmax over gates, experts or sampling points: DeepSeek-V4's compressors, routers of a mixture of experts."""
    for name in ("deepseek_v4", "mixtral", "gpt_oss"):
        assert examine(name, "softpick")[0] in ("right", "refused")
        assert "computes softmax" not in examine(name, "softpick")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Masks and causality, by family: some compute with the mask, some never say that they are causal


@pytest.mark.thinned(every=3)
@pytest.mark.parametrize(
    "model_type",
    [
        "nllb-moe", "pegasus_x", "bigbird_pegasus", "markuplm", "splinter", "t5gemma", "gemma2", "vaultgemma",
        "deepseek_v4", "gpt_oss", "t5", "mt5", "umt5", "longt5", "switch_transformers", "modernbert", "modernbert-decoder",
        "mistral", "cohere2", "llama4_text", "bart", "bert", "opt", "gpt2", "siglip_vision_model", "vit",
    ],
)  # fmt: skip
def test_softmax_is_eager_and_the_future_unseen(model_type):
    """The kinds of tests/sweep_models.py, which runs all types of models."""
    verdict, why = examine(model_type)
    assert verdict == "right", why


@pytest.mark.parametrize("model_type", ["nllb-moe", "t5", "t5gemma", "switch_transformers", "bart", "gemma2"])
def test_softpick_leaves_the_future_unseen(model_type):
    verdict, why = examine(model_type, "softpick")
    assert verdict == "right", why


@pytest.mark.parametrize("name", ["TimeSeriesTransformerModel", "InformerModel"])
def test_forecasting_decoders_are_causal(name):
    kind = getattr(transformers, name)
    more = {"attention_type": "full"} if name == "InformerModel" else {}
    config = kind.config_class(
        prediction_length=6, context_length=8, lags_sequence=[1, 2], d_model=16, encoder_layers=1, decoder_layers=1,
        num_time_features=1, init_std=0.3, **more,
    )  # fmt: skip
    model = randomize(kind._from_config(config, attn_implementation="softpick"))
    generator = torch.Generator().manual_seed(0)
    past, future = torch.randn(1, 10, generator=generator), torch.randn(1, 6, generator=generator)
    inputs = {
        "past_values": past,
        "past_time_features": torch.zeros(1, 10, 1),
        "future_time_features": torch.zeros(1, 6, 1),
    }
    inputs["past_observed_mask"] = torch.ones(1, 10)
    later = future.clone()
    later[:, 4:] += 3.0
    with torch.no_grad():
        a, b = (model(**inputs, future_values=x).last_hidden_state for x in (future, later))
    close(a[:, :5], b[:, :5], 1e-6)  # a token sees the value before it
    assert (a - b).abs().max() > 1e-3


def test_gemma_4_slices_of_queries_keep_their_past():
    """A model that drops queries where it knows the implementation's name to allow it."""
    fields = {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
    config = transformers.Gemma4TextConfig(
        **fields, vocab_size_per_layer_input=64, sliding_window=4, num_kv_shared_layers=0
    )
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    model = randomize(transformers.Gemma4ForCausalLM._from_config(config, attn_implementation="softpick"))
    with torch.no_grad():
        close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


# ---------------------------------------------------------------------------------------------------------------------
# An additive bias


def oracle(module, query, key, value, attention_mask, scaling=None, position_bias=None, **_):
    s = (query.double() @ key.double().mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    s = s if position_bias is None else s + position_bias.double()
    keep = torch.ones_like(s, dtype=torch.bool) if attention_mask is None else (attention_mask > -1e30).expand_as(s)
    rest = torch.expm1(s) * keep
    eps = 1e-6 * s.masked_fill(~keep, -math.inf).amax(-1, keepdim=True).clamp(min=0).exp()
    weights = rest.clamp(min=0) / (rest.abs().sum(-1, keepdim=True) + eps)
    return (weights @ value.double()).transpose(1, 2).to(query.dtype).contiguous(), weights.to(query.dtype)


@pytest.fixture
def _oracle():
    AttentionInterface.register("oracle", oracle)
    AttentionMaskInterface.register("oracle", transformers.masking_utils.eager_mask)
    yield
    del AttentionInterface._global_mapping["oracle"]
    del AttentionMaskInterface._global_mapping["oracle"]


@pytest.mark.usefixtures("_oracle")
@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5", "SwitchTransformers"])
@pytest.mark.parametrize("padded", [False, True])
def test_t5_and_its_relatives(family, padded, ids):
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    model = randomize(kind._from_config(getattr(transformers, f"{family}Config")(**T5), attn_implementation="softpick"))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 5:] = 0
    results = []
    for name in ("softpick", "oracle"):
        model.set_attn_implementation(name)
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids, labels=ids)
        out.loss.backward()
        biases = [p.grad for n, p in model.named_parameters() if "relative_attention_bias" in n]
        assert all(grad.abs().max() > 0 for grad in biases)
        results.append((out.logits, *biases))
    for a, b in zip(*results, strict=True):
        close(a, b, 2e-4)


def test_t5_generates_alike_with_and_without_caches(ids):
    model = randomize(
        transformers.T5ForConditionalGeneration._from_config(
            transformers.T5Config(**T5), attn_implementation="softpick"
        )
    )
    run = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "disable_compile": True}
    results = [
        model.generate(ids, **run, **how) for how in ({"use_cache": False}, {}, {"cache_implementation": "static"})
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---------------------------------------------------------------------------------------------------------------------
# What models pass on to everybody


def _my_loss(logits, labels, vocab_size, temperature=1.0, **kwargs):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1) / temperature, labels.flatten())


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5", "mixtral"])
def test_arguments_of_losses_and_outputs_are_none_of_attentions_business(family, ids):
    small = {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}
    model = {
        "llama": lambda: llama(),
        "gemma2": lambda: AutoModelForCausalLM.from_config(
            transformers.Gemma2Config(**small), attn_implementation="softpick"
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration._from_config(
            transformers.T5Config(**T5), attn_implementation="softpick"
        ),
        "mixtral": lambda: AutoModelForCausalLM.from_config(
            transformers.MixtralConfig(**small, num_local_experts=2), attn_implementation="softpick"
        ),
    }[family]()
    if family == "t5":
        assert model(input_ids=ids, labels=ids, output_hidden_states=True).loss.isfinite()
        return
    plain = model(ids, labels=ids).loss
    for more in ({"ignore_index": 5}, {"shift_labels": ids.roll(-1, 1)}, {"num_items_in_batch": torch.tensor(12)}):
        assert model(ids, labels=ids, **more).loss.isfinite()
    model.loss_function = _my_loss
    cold, warm = (model(ids, labels=ids, temperature=t).loss for t in (1.0, 2.0))
    assert cold != warm
    assert plain.isfinite()


def test_what_a_layer_itself_passes_is_refused():
    """By the layer's own call: DeepSeek-V3.2's chosen keys, not an argument that came from outside."""
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

    from softpick.integrations.transformers_layers import passed_to_everybody

    assert not passed_to_everybody(DeepseekV32Attention, "indices")
    assert passed_to_everybody(DeepseekV32Attention, "temperature")
    assert not passed_to_everybody(torch.nn.Linear, "temperature")  # who knows


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_configuration_may_ask_for_attentions(family, ids, tmp_path):
    kind, fields = (
        (transformers.LlamaConfig, LLAMA)
        if family == "llama"
        else (transformers.BertConfig, {**ENCODER, "vocab_size": 64})
    )
    auto = AutoModelForCausalLM if family == "llama" else transformers.AutoModel
    for config in (kind(**fields), kind(**fields, output_attentions=True)):
        model = auto.from_config(config, attn_implementation="softpick").eval()
        model.config.output_attentions = True
        weights = model(ids).attentions
        assert len(weights) == fields["num_hidden_layers"]
        assert torch.equal(weights[0], model(ids, output_attentions=True).attentions[0])
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "softpick"
    close(loaded(ids).attentions[0], weights[0])
    other = kind(**fields, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="output_attentions"):
        other.output_attentions = True


# ---------------------------------------------------------------------------------------------------------------------
# Compilation, models without memory, records of one's own


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "t5"])
def test_static_caches_compile_as_one_graph(family, ids):
    small = {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    torch.manual_seed(0)
    if family == "t5":
        model = transformers.T5ForConditionalGeneration._from_config(
            transformers.T5Config(**T5), attn_implementation="softpick"
        )
    else:
        kind = {"llama": "LlamaConfig", "mistral": "MistralConfig", "gemma2": "Gemma2Config"}[family]
        fields = small if family != "llama" else {k: v for k, v in small.items() if k != "sliding_window"}
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields), attn_implementation="softpick")
    model = randomize(model)
    run = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, use_cache=False, **run)
    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, backend="aot_eager")
    config._compile_all_devices = True
    assert torch.equal(plain, model.generate(ids, cache_implementation="static", compile_config=config, **run))


def test_no_graph_breaks_with_arguments_of_losses(ids):
    model = llama(num_key_value_heads=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = {"labels": ids, "use_cache": False, "num_items_in_batch": torch.tensor(12)}
    close(compiled(ids, **inputs).loss, model(ids, **inputs).loss)
    model.loss_function = _my_loss
    inputs = {"labels": ids, "use_cache": False, "temperature": 2.0}
    close(compiled(ids, **inputs).loss, model(ids, **inputs).loss)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_models_without_memory(family, padded):
    """As ``accelerate.init_empty_weights`` makes them."""
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    more = {"attention_mask": torch.ones(2, 7, dtype=torch.long, device="meta")} if padded else {}
    with torch.device("meta"):
        if family == "llama":
            model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA), attn_implementation="softpick")
        elif family == "bert":
            config = transformers.BertConfig(**ENCODER, vocab_size=64)
            model = transformers.AutoModel.from_config(config, attn_implementation="softpick")
        else:
            config = transformers.T5Config(**T5)
            model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="softpick")
            more["decoder_input_ids"] = ids
    out = model(ids, **more)
    assert out[0].is_meta
    assert out[0].shape[:2] == (2, 7)


def test_a_record_of_ones_own_is_what_runs(monkeypatch):
    """Not the table's formula of the same name."""
    record = replace(NORMALIZERS["softpick"], eps=0.5)
    given = []
    monkeypatch.setattr(st, "scaled_dot_product_attention", lambda *a, **k: given.append(k["normalizer"]) or a[0])
    x = torch.randn(1, 2, 3, 8)
    st.make_attention_function(record)(torch.nn.Linear(1, 1), x, x, x, None)
    assert given == [record]
