"""The cache in fp8 for transformers: what it stores, what models compute with it, and what it refuses."""

import itertools
import math

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MllamaConfig,
    Qwen3NextConfig,
    ReformerConfig,
    RwkvConfig,
    T5Config,
    ViTConfig,
)

from softpick import functional
from softpick.integrations import transformers_fp8
from softpick.integrations.transformers import Fp8Cache, SoftpickLlamaConfig, SoftpickLlamaForCausalLM

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "vocab_size": 97, "max_position_embeddings": 512,
}  # fmt: skip


def llama(implementation, **changes):
    torch.manual_seed(1)
    config = LlamaConfig(**SIZES | changes)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def states(batch, heads, steps, width, dtype=torch.float32):
    """Keys that grow with time in one head and shrink in the other, with outliers."""
    x = torch.randn(batch, heads, steps, width) * torch.exp(torch.linspace(-4, 4, steps))[:, None]
    x[:, 1] = x[:, 1].flip(1)
    x[0, 0, steps // 2, 0] = 3000.0
    return x.to(dtype)


# --------------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pieces", [[1] * 200, [150] + [1] * 50, [64, 64, 72], [7, 60, 1, 1, 131], [200]])
def test_every_number_is_within_the_bound(dtype, pieces):
    """However tokens come: a page's scale grows, nothing saturates, and what was stored before is not rounded again much."""
    x = states(3, 2, 200, 8, dtype)
    layer = transformers_fp8.Fp8Layer(LlamaConfig(attn_implementation="eager"))
    for part in x.split(pieces, 2):
        layer.update(part, -part)
    keys, values = layer.dequantized(torch.float64)
    assert layer.get_seq_length() == 200
    assert torch.equal(keys, -values)
    for i in range(0, 200, 64):
        page = x[:, :, i : i + 64].double()
        scale = layer._keys.scale[:, i // 64][:, :, None, None].double()
        largest = page.abs().amax((2, 3), keepdim=True)
        assert (largest <= 448 * scale).all()
        assert (largest > 224 * scale).all()
        assert (torch.frexp(scale)[0] == 0.5).all()
        error = (keys[:, :, i : i + 64] - page).abs()
        assert (error <= torch.maximum(page.abs() * 2**-4, scale / 512)).all()


def test_pages_of_zeros_and_numbers_that_are_not_finite():
    layer = transformers_fp8.Fp8Layer(LlamaConfig(attn_implementation="eager"))
    x = torch.zeros(1, 1, 3, 2)
    x[0, 0, 1] = torch.tensor([1e-3, -2e-3])
    x[0, 0, 2] = torch.tensor([math.inf, math.nan])
    for part in x.split(1, 2):
        layer.update(part, part)
    keys, _ = layer.dequantized(torch.float32)
    assert (keys[0, 0, 0] == 0).all()
    torch.testing.assert_close(keys[0, 0, 1], x[0, 0, 1], rtol=2**-4, atol=0)
    assert keys[0, 0, 2, 0] == 448 * layer._keys.scale[0, 0, 0]
    assert keys[0, 0, 2, 1].isnan()


def test_sequences_are_picked_repeated_cropped_and_forgotten():
    x = states(3, 2, 100, 8)
    layer = transformers_fp8.Fp8Layer(LlamaConfig(attn_implementation="eager"))
    layer.update(x, x)
    before, _ = layer.dequantized(torch.float32)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.dequantized(torch.float32)[0], before[[2, 0, 0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.dequantized(torch.float32)[1], before[[2, 2, 0, 0, 0, 0]])
    layer.batch_select_indices(torch.tensor([1]))
    layer.crop(-30)
    assert torch.equal(layer.dequantized(torch.float32)[0], before[[2], :, :70])
    layer.update(x[:1, :, :5], x[:1, :, :5])
    assert layer.get_mask_sizes(3) == (78, 0)
    torch.testing.assert_close(layer.dequantized(torch.float32)[0][:, :, :70], before[[2], :, :70], rtol=0.1, atol=1.0)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.update(x, x)[0] is x


# ----------------------------------------------------------------------------------------------------- what is computed


@pytest.fixture
def calls(monkeypatch):
    """Counts steps that read the pages as they are."""
    counted, original = [], functional.decode_attention

    def decode(query, keys, *args, **kwargs):
        counted.append(keys.dtype)
        return original(query, keys, *args, **kwargs)

    monkeypatch.setattr(transformers_fp8, "decode_attention", decode)
    return counted


def logits(model, tokens, cache, prompt, mask=None):
    found = []
    with torch.no_grad():
        for at, until in itertools.pairwise([0, prompt, *range(prompt + 1, tokens.shape[1] + 1)]):
            seen = None if mask is None else mask[:, :until]
            found.append(model(tokens[:, at:until], past_key_values=cache, attention_mask=seen).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", ["softmax", "softpick", "linear_softpick", "relu_softpick"])
def test_steps_compute_with_what_is_stored(name, calls):
    """As with the same cache dequantized; close to the cache of the model's own dtype."""
    model, tokens = llama(name), torch.randint(97, (2, 90))
    got = logits(model, tokens, Fp8Cache(model.config), 60)
    assert calls == [torch.float8_e4m3fn] * 2 * 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_fp8, "is_normalizer", lambda name: False)
        wide = logits(model, tokens, Fp8Cache(model.config), 60)
    torch.testing.assert_close(got, wide, rtol=1e-4, atol=1e-4)
    exact = logits(model, tokens, None, 90)
    assert float((got - exact).norm() / exact.norm()) < 0.05
    assert not torch.equal(got, exact)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_softmax_of_transformers(name, calls):
    ours, model, tokens = llama("softmax"), llama(name), torch.randint(97, (2, 90))
    got = logits(model, tokens, Fp8Cache(model.config), 60)
    assert not calls
    torch.testing.assert_close(got, logits(ours, tokens, Fp8Cache(ours.config), 60), rtol=1e-4, atol=1e-4)


def test_sinks_scales_by_length_and_gates(calls):
    """What layers give beside queries, keys and values reaches a step in fp8."""
    for changes in ({"normalizer": "learned_sink"}, {"score_scale": True}, {"output_gate": True}):
        torch.manual_seed(1)
        model = SoftpickLlamaForCausalLM(SoftpickLlamaConfig(**SIZES | changes)).eval()
        tokens = torch.randint(97, (2, 40))
        got = logits(model, tokens, Fp8Cache(model.config), 20)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers_fp8, "is_normalizer", lambda name: False)
            wide = logits(model, tokens, Fp8Cache(model.config), 20)
        torch.testing.assert_close(got, wide, rtol=1e-4, atol=1e-4)
        assert calls
        calls.clear()


def test_padding_and_recorded_attentions_take_a_copy(calls):
    model, tokens = llama("softpick"), torch.randint(97, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    got = logits(model, tokens, Fp8Cache(model.config), 20, mask)
    assert not calls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_fp8, "is_normalizer", lambda name: False)
        wide = logits(model, tokens, Fp8Cache(model.config), 20, mask)
    torch.testing.assert_close(got, wide)
    cache = Fp8Cache(model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        found = model(tokens[:, :1], past_key_values=cache, output_attentions=True).attentions
    assert [tuple(x.shape) for x in found] == [(2, 4, 1, 41)] * 2


@pytest.mark.parametrize("name", ["softpick", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generate(name, options):
    model, tokens = llama(name), torch.randint(3, 97, (2, 30))
    cache = Fp8Cache(model.config)
    out = model.generate(tokens, max_new_tokens=70, min_new_tokens=70, past_key_values=cache, pad_token_id=0, **options)
    assert out.shape == (2 * options.get("num_return_sequences", 1), 100)
    assert cache.get_seq_length() == 99
    again = model.generate(tokens, max_new_tokens=1, past_key_values=Fp8Cache(model.config), pad_token_id=0)
    assert torch.equal(again, model.generate(tokens, max_new_tokens=1, pad_token_id=0))  # the prompt is not rounded


def test_half_the_bytes():
    model, tokens = llama("softpick", head_dim=64), torch.randint(97, (2, 128))
    cache = Fp8Cache(model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    layer = cache.layers[0]
    taken = sum(x.numel() * x.element_size() for p in (layer._keys, layer._values) for x in (p.stored, p.scale))
    assert taken / (2 * 2 * 2 * 128 * 64 * 2) < 0.501


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["softmax", "softpick", "sdpa"])
def test_steps_on_a_gpu(name, calls):
    """By the kernels, from pages whose scales grow; as from a dequantized copy of the same cache."""
    model, tokens = llama(name, head_dim=128).to("cuda", torch.bfloat16), torch.randint(97, (2, 200), device="cuda")
    got = logits(model, tokens, Fp8Cache(model.config), 130)
    assert len(calls) == (0 if name == "sdpa" else 140)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_fp8, "is_normalizer", lambda name: False)
        wide = logits(model, tokens, Fp8Cache(model.config), 130)
    assert float((got - wide).norm() / wide.norm()) < 2e-2


# ------------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "no configuration": ("llama", TypeError, "config: expected the configuration of a model, got str"),
    "nothing": (None, TypeError, "config: expected the configuration of a model, got NoneType"),
    "a model": (torch.nn.Linear(1, 1), TypeError, "config: expected the configuration of a model, got Linear"),
    "text encoder": (BertConfig(), ValueError, "config: expected that of a decoder.*is_decoder.*got BertConfig"),
    "image encoder": (ViTConfig(), ValueError, "config: expected that of a decoder.*use_cache.*got ViTConfig"),
    "cross-attention": (
        MllamaConfig(),
        ValueError,
        "config: .*MllamaConfig with cross-attention .cross_attention_layers",
    ),
    "cross-attention of a kind": (
        GPT2Config(add_cross_attention=True),
        ValueError,
        "config: .*got GPT2Config with cross-attention .add_cross_attention",
    ),
    "hybrid": (Qwen3NextConfig(), ValueError, "config: .*full_attention.*got linear_attention"),
    "states instead of keys": (RwkvConfig(), ValueError, "config: .*DynamicCache, got RwkvConfig"),
    "buckets": (ReformerConfig(is_decoder=True), ValueError, "config: .*DynamicCache, got ReformerConfig"),
    "windows": (MistralConfig(sliding_window=32), ValueError, "config: .*full_attention.*got sliding_attention"),
    "encoder": (T5Config(), ValueError, "config: expected a decoder alone, got T5Config"),
}


@pytest.mark.parametrize(("config", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(config, error, words):
    with pytest.raises(error, match=words):
        Fp8Cache(config)


def test_every_configuration_is_taken_or_refused_in_a_sentence():
    """No error of another kind, for any of the configurations that transformers has; as many layers as its own cache."""
    taken, refusals = set(), {}
    for name in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # some need parts that are not installed, or have no defaults
            continue
        try:
            cache = Fp8Cache(config)
        except ValueError as refusal:
            refusals[name] = str(refusal)
        else:
            taken.add(name)
            assert len(cache.layers) == len(DynamicCache(config=config).layers), name
    assert {words[:17] for words in refusals.values()} == {"config: expected "}
    assert {"llama", "gpt2", "gpt_neox", "qwen3", "mixtral", "llava"} <= taken
    assert not {"bert", "clip", "vit", "wav2vec2", "openai-gpt", "xlnet", "mamba", "blt"} & taken


@pytest.mark.parametrize("name", ["softpick", "sdpa"])
def test_another_batch_in_the_middle(name):
    """More sequences, fewer, and one, which torch would repeat."""
    model = llama(name)
    for prompt, then in ((2, 3), (3, 2), (3, 1), (1, 2)):
        for steps in (1, 4):
            cache = Fp8Cache(model.config)
            with torch.no_grad():
                model(torch.randint(97, (prompt, 20)), past_key_values=cache)
                words = f"past_key_values: expected key_states .* {prompt} sequences of 2 heads of 16 .* got {then} of"
                with pytest.raises(ValueError, match=words):
                    model(torch.randint(97, (then, steps)), past_key_values=cache)


@pytest.mark.parametrize("shape", [(2, 1, 3, 8), (2, 2, 3, 4), (1, 2, 3, 8)])
def test_other_heads_and_widths_in_the_middle(shape):
    x, other = torch.randn(2, 2, 5, 8), torch.randn(shape)
    for keys, values, name in ((other, other, "key_states"), (x, other, "value_states")):
        layer = transformers_fp8.Fp8Layer(LlamaConfig(attn_implementation="eager"))
        layer.update(x, x)
        with pytest.raises(ValueError, match=f"(past_key_values: expected|^){'' if keys is x else ' '}{name}"):
            layer.update(keys, values)
    with pytest.raises(ValueError, match="value_states: expected the sequences, heads and positions of key_states"):
        layer.update(x, x[:, :, :3])


def test_other_numbers_of_layers():
    model, tokens = llama("softpick"), torch.randint(97, (2, 20))
    few, many = (Fp8Cache(LlamaConfig(**SIZES | {"num_hidden_layers": n})) for n in (1, 3))
    with torch.no_grad():
        with pytest.raises(
            ValueError, match=r"config: expected as many layers as the model has, got 1, .* has layer 1"
        ):
            model(tokens, past_key_values=few)
        model(tokens, past_key_values=many)
        with pytest.raises(
            ValueError, match=r"past_key_values: .*each of the 3 layers, got 0 to 20: the model has fewer"
        ):
            model(tokens[:, :1], past_key_values=many)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_configuration_of_another_attention(name):
    """The model's attention is transformers', and the config says that it is ours: keys in fp8 would come to it."""
    model, tokens = llama(name), torch.randint(97, (2, 20))
    cache = Fp8Cache(LlamaConfig(**SIZES, attn_implementation="softpick"))
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match=r"config: expected model.config itself, .* in fp8"):
            model(tokens[:, :1], past_key_values=cache)


def test_other_refusals():
    with pytest.raises(ValueError, match="page_size: expected an integer of at least 16, got 8"):
        Fp8Cache(GPT2Config(), page_size=8)
    layer = Fp8Cache(LlamaConfig(**SIZES)).layers[0]
    with pytest.raises(ValueError, match="tokens_to_remove: expected a number of at most 0, got 3"):
        layer.crop(3)
    with pytest.raises(ValueError, match="offloading: expected none"):
        layer.offload()
    key = torch.zeros(1, 1, 1, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="key: a cache in fp8 came without its scales"):
        transformers_fp8.dequantized(key, torch.float32)


def test_largest_numbers_stay_finite_and_infinity_is_not_0():
    half = torch.tensor([65504.0, 64000.0, 60000.0, 1.0]).half().view(1, 1, 1, 4)
    assert transformers_fp8.through_fp8(half).isfinite().all()
    endless = transformers_fp8.through_fp8(torch.full((1, 1, 3, 4), torch.inf))
    assert (endless == 448).all()


@pytest.mark.parametrize("kept", [0, 3])
def test_a_page_forgets_the_scale_of_what_was_cropped(kept):
    model = llama("softpick")
    layer = Fp8Cache(model.config).layers[0]
    one = torch.ones(1, 2, 1, 16)
    large = torch.full((1, 2, 70, 16), 1e30)
    if kept:
        layer.update(torch.ones(1, 2, kept, 16), torch.ones(1, 2, kept, 16))
    layer.update(large, large)
    layer.crop(-70)
    layer.update(torch.ones(1, 2, 64, 16), torch.ones(1, 2, 64, 16))
    layer.update(one, one)
    last = layer.dequantized(torch.float32)[0][:, :, -1]
    assert (last == 1).all()


def test_gradients_are_refused():
    model, tokens = llama("softpick"), torch.randint(97, (2, 25))
    cache = Fp8Cache(model.config)
    model(tokens[:, :20], past_key_values=cache)
    with pytest.raises(ValueError, match="has no gradient"):
        model(tokens[:, 20:], past_key_values=cache)
