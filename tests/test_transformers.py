"""The transformers adapter against attention written out here (fp64, additive masks) and transformers' own eager path."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from formula import weights  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.masking_utils import eager_mask  # noqa: E402

import softpick.integrations.transformers as st  # noqa: E402
from softpick.normalizers import NORMALIZERS  # noqa: E402

PLAIN = [name for name, norm in NORMALIZERS.items() if not norm.needs_sink]


# ---------------------------------------------------------------------------------------------------------------------
# The independent computation


def formula(name, s, keep, sink=None):
    """Weights by the textbook formulas. ``s`` fp64 of moderate size, ``keep`` boolean."""
    return weights(NORMALIZERS[name], s, keep, None if sink is None else sink.double().view(1, -1, 1, 1)).a


def oracle_for(name):
    def oracle(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **_):
        q, k, v = query.double(), key.double(), value.double()
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        keep = torch.ones_like(s, dtype=torch.bool)
        if attention_mask is not None:  # additive
            keep = (attention_mask > -1e30).expand_as(s)
        weights = formula(name, s, keep, s_aux)
        return torch.einsum("bhqk,bhkd->bqhd", weights, v).to(query.dtype), weights.to(query.dtype)

    return oracle


@pytest.fixture(autouse=True, scope="module")
def _oracles():
    """``oracle|NAME`` implementations, which always get a materialized additive mask."""
    for name in NORMALIZERS:
        AttentionInterface.register(f"oracle|{name}", oracle_for(name))
        AttentionMaskInterface.register(f"oracle|{name}", eager_mask)
    yield
    for name in NORMALIZERS:
        del AttentionInterface._global_mapping[f"oracle|{name}"]
        del AttentionMaskInterface._global_mapping[f"oracle|{name}"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These matrices are so small that a second thread only waits: 8 ms instead of 10 us a linear layer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Tiny models: 4 heads, 2 key heads, 7 tokens, so that no two dimensions can be confused

LLAMA_LIKE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def decoder_config(family):
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=60,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    if family == "gpt_oss":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        return transformers.GptOssConfig(
            **LLAMA_LIKE, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, rope_parameters=rope
        )
    if family == "softpick_llama":
        return st.SoftpickLlamaConfig(**LLAMA_LIKE, output_gate=True, score_scale=True)
    return {
        "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE),
        "qwen3": lambda: transformers.Qwen3Config(**LLAMA_LIKE),
        "mistral": lambda: transformers.MistralConfig(**LLAMA_LIKE, sliding_window=4),
        "gemma2": lambda: transformers.Gemma2Config(**LLAMA_LIKE, **WINDOW, attn_logit_softcapping=2.0),
        "gemma3": lambda: transformers.Gemma3TextConfig(**LLAMA_LIKE, **WINDOW),
    }[family]()


DECODERS = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]


def randomize(model, seed=0):
    """Weights large enough for scores of both signs and outputs that differ."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.15, generator=generator)
    return model.eval()


def decoder(family, implementation="softpick", **changes):
    config = decoder_config(family)
    for key, value in changes.items():
        setattr(config, key, value)
    return randomize(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))


@pytest.fixture
def ids():
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


PADDING = {
    "none": None,
    "left": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]],
}


def padding(kind):
    return None if PADDING[kind] is None else torch.tensor(PADDING[kind])


def real(tensor, mask):
    return tensor if mask is None else tensor[mask.bool()]


def close(a, b, tol=5e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


# ---------------------------------------------------------------------------------------------------------------------
# Import and registration


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_transformers_is_imported_only_when_asked_for_and_missed_clearly():
    run = python(
        "import sys, softpick; assert 'transformers' not in sys.modules; sys.modules['transformers'] = None\n"
        "import softpick.integrations.transformers"
    )
    assert run.returncode == 1
    assert "AssertionError" not in run.stderr
    assert "ImportError" in run.stderr
    assert "pip install 'softpick[transformers]'" in run.stderr


def test_every_normalizer_is_registered_and_register_is_repeatable():
    to_dict = transformers.PreTrainedConfig.to_dict
    st.register()
    assert transformers.PreTrainedConfig.to_dict is to_dict
    assert tuple(NORMALIZERS) == st.IMPLEMENTATIONS
    for name in NORMALIZERS:
        assert name in AttentionInterface().valid_keys()
        assert name in AttentionMaskInterface().valid_keys()


# ---------------------------------------------------------------------------------------------------------------------
# The attention function


class Layer(torch.nn.Module):
    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def qkv(tq=5, tk=5, heads=4, kv_heads=2, dim=8, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, h, t, dim, generator=generator) for h, t in ((heads, tq), (kv_heads, tk), (kv_heads, tk))
    )


def additive(keep):
    return torch.where(keep, 0.0, torch.finfo(torch.float32).min)


def causal(tq, tk):
    return torch.ones(tq, tk).tril().bool()


@pytest.mark.parametrize("name", NORMALIZERS)
def test_function_is_heads_by_positions(name):
    q, k, v = qkv()
    sinks = torch.randn(4) if NORMALIZERS[name].needs_sink else None
    out, weights = st.make_attention_function(name)(Layer(), q, k, v, None, s_aux=sinks)
    expected, _ = oracle_for(name)(Layer(), q, k, v, additive(causal(5, 5)), s_aux=sinks)
    assert out.shape == (2, 5, 4, 8)  # (batch, positions, heads, dim)
    assert out.is_contiguous()
    assert weights is None
    close(out, expected)


def test_swapped_heads_and_positions_would_be_seen():
    q, k, v = qkv(kv_heads=4)
    out, _ = st.attention_forward(Layer(), q, k, v, None)
    right, _ = oracle_for("softpick")(Layer(), q, k, v, additive(causal(5, 5)))
    swapped = [x.transpose(1, 2) for x in (q, k, v)]  # positions attend over heads
    wrong = oracle_for("softpick")(Layer(), *swapped, additive(causal(4, 4)))[0].transpose(1, 2)
    assert wrong.shape == right.shape == out.shape
    close(out, right)
    assert (out - wrong).abs().max() > 0.1


def test_a_value_reaches_its_own_heads_and_later_positions_only():
    q, k, v = qkv()
    out, _ = st.attention_forward(Layer(), q, k, v, None, normalizer="softmax")
    v2 = v.clone()
    v2[:, 1, 3] += 1.0  # key head 1 serves heads 2 and 3; position 3 is seen from 3 and 4
    changed = (st.attention_forward(Layer(), q, k, v2, None, normalizer="softmax")[0] != out).any(-1)
    expected = torch.zeros(2, 5, 4, dtype=torch.bool)
    expected[:, 3:, 2:] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("tq", "tk", "is_causal", "keep"),
    [
        (5, 9, True, causal(5, 9)),  # prefill of an empty static cache: the first 5 keys, from the top left
        (1, 9, True, torch.ones(1, 9).bool()),  # decoding
        (5, 9, False, torch.ones(5, 9).bool()),  # cross-attention
    ],
)
def test_no_mask(name, tq, tk, is_causal, keep):
    q, k, v = qkv(tq, tk)
    for how in ({"is_causal": is_causal}, {}):
        layer = Layer(is_causal if not how else not is_causal)  # the argument wins over the layer
        expected, expected_weights = oracle_for(name)(layer, q, k, v, additive(keep))
        close(st.attention_forward(layer, q, k, v, None, normalizer=name, **how)[0], expected)
        out, weights = st.attention_forward(layer, q, k, v, None, normalizer=name, output_attentions=True, **how)
        close(out, expected)
        close(weights, expected_weights)


def test_scaling_softcap_and_float_mask():
    q, k, v = qkv()
    keep = causal(5, 5)
    mask = additive(keep)[None, None]
    for given in (mask, keep[None, None]):
        out, _ = st.attention_forward(Layer(), q, k, v, given, scaling=0.7, softcap=1.5)
        close(out, oracle_for("softpick")(Layer(), q, k, v, mask, scaling=0.7, softcap=1.5)[0])


def test_dropout_is_passed_through():
    q, k, v = qkv()
    for name in ("softmax", "softpick"):
        assert torch.count_nonzero(st.attention_forward(Layer(), q, k, v, None, dropout=1.0, normalizer=name)[0]) == 0
    out, weights = st.attention_forward(Layer(), q, k, v, None, dropout=1.0, output_attentions=True)
    assert torch.count_nonzero(out) == 0
    assert torch.count_nonzero(weights) > 0  # the weights are those before dropout


def test_score_scale_counts_visible_keys_and_gate_multiplies():
    q, k, v = qkv()
    scale, gate = torch.tensor([0.5, 1.0, -0.3, 2.0]), torch.randn(2, 5, 4, 8)
    keep = causal(5, 5).expand(2, 1, 5, 5).clone()
    keep[0, :, :, :2] = False  # left padding: queries 0 and 1 of the first row see nothing
    for mask, visible in ((keep, keep), (additive(keep), keep), (None, causal(5, 5).expand(2, 1, 5, 5))):
        n = visible.sum(-1).clamp(min=1).double()
        scaled = q.double() * (scale.double().view(1, 4, 1) * n.log())[..., None]
        expected, _ = oracle_for("softpick")(Layer(), scaled, k, v, additive(visible))
        out, _ = st.attention_forward(Layer(), q, k, v, mask, score_scale=scale, output_gate=gate)
        close(out, (expected * torch.sigmoid(gate)).float())
    decode, _ = st.attention_forward(Layer(), q[:, :, -1:], k, v, None, score_scale=scale)
    close(decode, st.attention_forward(Layer(), q, k, v, None, score_scale=scale)[0][:, -1:])


def test_cu_seq_lens_separate_sequences():
    q, k, v = qkv(7, 7, batch=1)
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    out, _ = st.attention_forward(
        Layer(), q, k, v, None, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=4, max_length_k=4
    )
    parts = [st.attention_forward(Layer(), *(x[:, :, a:b] for x in (q, k, v)), None)[0] for a, b in ((0, 3), (3, 7))]
    close(out, torch.cat(parts, dim=1))
    with pytest.raises(ValueError, match="cu_seq_lens_q, cu_seq_lens_k: expected both"):
        st.attention_forward(Layer(), q, k, v, None, cu_seq_lens_q=offsets)


def test_restart_memo_sees_changes_in_place():
    q, k, v = qkv(4, 4, batch=1)
    positions = torch.arange(4)[None]
    plain, _ = st.attention_forward(Layer(), q, k, v, None, position_ids=positions)
    positions[0, 2:] -= 2
    packed, _ = st.attention_forward(Layer(), q, k, v, None, position_ids=positions)
    close(plain, st.attention_forward(Layer(), q, k, v, None)[0])
    close(packed[:, 2:], st.attention_forward(Layer(), *(x[:, :, 2:] for x in (q, k, v)), None)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_arguments_that_change_the_result_are_refused_by_name():
    q, k, v = qkv()
    call = st.make_attention_function("softpick")
    bias = torch.zeros(1, 4, 5, 5)
    with pytest.raises(ValueError, match=r"^block_indices, sofcap: not supported"):
        call(Layer(), q, k, v, None, block_indices=bias, sofcap=30.0)
    # what was not given, and what cannot matter, passes
    harmless = {"use_cache": True, "cache_position": torch.arange(5), "sliding_window": 3, "num_items_in_batch": 4}
    close(call(Layer(), q, k, v, None, block_indices=None, **harmless)[0], call(Layer(), q, k, v, None)[0], 0)


def test_sinks_need_learned_sink_and_the_reverse(ids):
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"^s_aux: Layer keeps learned sinks, which attn_implementation='softpick'"):
        st.attention_forward(Layer(), q, k, v, None, s_aux=torch.zeros(4))
    model = AutoModelForCausalLM.from_config(decoder_config("llama"), attn_implementation="learned_sink")
    with pytest.raises(
        ValueError, match=r"needs one sink logit a head, but LlamaAttention has none; .*SoftpickLlamaConfig"
    ):
        model(ids)
    with pytest.raises(ValueError, match="normalizer: expected one of softmax, softpick"):
        st.make_attention_function("sofpick")


def test_models_that_would_run_softmax_anyway_are_refused():
    small = {"vocab_size": 60, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    with pytest.raises(ValueError, match=r"BloomForCausalLM does not use .* softmax instead of 'softpick'"):
        AutoModelForCausalLM.from_config(transformers.BloomConfig(**small), attn_implementation="softpick")
    AutoModelForCausalLM.from_config(transformers.BloomConfig(**small))  # and nothing else is refused


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.mark.parametrize("name", PLAIN)
def test_saved_models_remember_the_normalizer(name, ids, tmp_path):
    model = decoder("llama", "sdpa")
    model.set_attn_implementation(name)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == st.normalizer_of(loaded) == name
    close(loaded.eval()(ids).logits, expected, 0)
    unchosen = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=None)  # as TRL passes it
    assert unchosen.config._attn_implementation == name
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == name
    # an argument wins, and saving again forgets
    softmax = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert softmax.config._attn_implementation == "sdpa"
    assert st.normalizer_of(softmax) == "softmax"
    softmax.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"attn_implementation", "softpick_normalizer"} & set(saved)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_softpick_checkpoint_does_not_load_without_softpick(tmp_path):
    decoder("llama").save_pretrained(tmp_path)
    run = python(
        "from transformers import LlamaForCausalLM as M\n"
        f"try: M.from_pretrained({str(tmp_path)!r}); print('loaded')\n"
        "except ValueError as error: print(error)\n"
        "import softpick.integrations.transformers\n"
        f"print(M.from_pretrained({str(tmp_path)!r}).config._attn_implementation)"
    )
    assert 'attn_implementation="softpick"` is not supported' in run.stdout
    assert "loaded" not in run.stdout
    assert run.stdout.splitlines()[-1] == "softpick", run.stderr


def test_parts_of_composite_models_remember_theirs():
    config = transformers.Gemma3Config(
        text_config={**LLAMA_LIKE, **WINDOW}, vision_config={**ENCODER, "image_size": 16, "patch_size": 4}
    )
    for choice, text in (
        ({"": "sdpa", "text_config": "softpick", "vision_config": "sdpa"}, "softpick"),
        ({"": "softpick", "text_config": "relu_softpick"}, "relu_softpick"),
        ("softpick", "softpick"),
    ):
        config._attn_implementation = None
        config._attn_implementation = choice
        loaded = transformers.Gemma3Config.from_dict(json.loads(config.to_json_string()))
        assert loaded.text_config._attn_implementation == text
        assert st.normalizer_of(loaded) == text
        vision = loaded.vision_config._attn_implementation
        assert vision == ("softpick" if choice == "softpick" else None)


def test_normalizer_of():
    config = decoder_config("llama")
    assert st.normalizer_of(config) == "softmax"
    for name in ("eager", "sdpa", "flash_attention_2", "flex_attention", "paged|sdpa", "kernels-community/flash-attn3"):
        config._attn_implementation = name
        assert st.normalizer_of(config) == "softmax"
    assert st.normalizer_of(st.SoftpickLlamaConfig(**LLAMA_LIKE, normalizer="relu_softpick")) == "relu_softpick"
    assert st.normalizer_of(decoder("softpick_llama")) == "softpick"
    config._attn_implementation = "oracle|softpick"
    with pytest.raises(ValueError, match=r"cannot tell the normalizer of attn_implementation='oracle\|softpick'"):
        st.normalizer_of(config)
    with pytest.raises(TypeError, match="config_or_model: expected a transformers model or configuration, got Linear"):
        st.normalizer_of(torch.nn.Linear(1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# softpick_llama


def softpick_llama(**fields):
    return randomize(AutoModelForCausalLM.from_config(st.SoftpickLlamaConfig(**LLAMA_LIKE, **fields)))


@pytest.mark.parametrize("name", PLAIN)
def test_without_extras_it_is_llama(name, ids):
    ours, llama = softpick_llama(normalizer=name), decoder("llama", name)
    assert type(ours) is st.SoftpickLlamaForCausalLM
    assert ours.config._attn_implementation == name
    llama.load_state_dict(ours.state_dict())  # the same parameters under the same names
    for kind in PADDING:
        mask = padding(kind)
        close(ours(ids, attention_mask=mask).logits, llama(ids, attention_mask=mask).logits, 0)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_extras_train_save_and_load(name, ids, tmp_path):
    model = softpick_llama(normalizer=name, output_gate=True, score_scale=True)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.rand_like(parameter))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["output_gate"], saved["score_scale"]) == ("softpick_llama", True, True)
    assert saved.get("normalizer", "softpick") == name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is st.SoftpickLlamaForCausalLM
    assert st.normalizer_of(loaded) == name
    close(loaded.eval()(ids).logits, model(ids).logits, 0)


def test_extras_match_explicit_computation(ids):
    model = softpick_llama(normalizer="learned_sink", output_gate=True, score_scale=True)
    attention = model.model.layers[0].self_attn
    attention.sinks.data.normal_()
    attention.score_scale.data.uniform_(0.5, 1.5)
    x = torch.randn(2, 7, 32)
    rotation = model.model.rotary_emb(x, torch.arange(7)[None])
    out, weights = attention(x, position_embeddings=rotation, attention_mask=None, output_attentions=True)

    q, k, v = (
        proj(x).double().view(2, 7, -1, 8).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, *(r.double() for r in rotation))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    n = torch.arange(1, 8).double()
    s = q @ k.mT / math.sqrt(8) * attention.score_scale.double().view(1, 4, 1, 1) * n.log().view(1, 1, 7, 1)
    expected_weights = formula("learned_sink", s, causal(7, 7).expand_as(s), attention.sinks)
    heads = (expected_weights @ v).transpose(1, 2)
    gated = heads * torch.sigmoid(attention.output_gate(x).double()).view(2, 7, 4, 8)
    expected = gated.reshape(2, 7, 32) @ attention.o_proj.weight.double().T
    close(weights.double(), expected_weights)
    close(out.double(), expected)


def test_extras_under_padding(ids):
    model = softpick_llama(output_gate=True, score_scale=True)
    for kind in ("left", "right"):
        mask = padding(kind)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(2):
            close(logits[row][mask[row].bool()], model(ids[row][mask[row].bool()][None]).logits[0])


def test_extras_start_sane():
    model = AutoModelForCausalLM.from_config(
        st.SoftpickLlamaConfig(**LLAMA_LIKE, normalizer="learned_sink", output_gate=True, score_scale=True)
    )
    for layer in model.model.layers:
        attention = layer.self_attn
        assert torch.count_nonzero(attention.sinks) == 0
        mean_log = torch.arange(1, 65).log().mean()  # max_position_embeddings = 64
        close(attention.score_scale.data * mean_log, torch.ones(4), 1e-5)
        assert 0.01 < attention.output_gate.weight.std() < 0.03


def test_softpick_llama_refuses_foreign_implementations(tmp_path, ids):
    model = softpick_llama(output_gate=True)
    with pytest.raises(ValueError, match="attn_implementation: expected a normalizer for SoftpickLlamaForCausalLM"):
        model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"one of softmax, softpick.*; got 'eager'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for how in ({"attn_implementation": "relu_softpick"}, {"normalizer": "relu_softpick"}):
        other = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
        assert other.config.normalizer == other.config._attn_implementation == "relu_softpick"
    model.set_attn_implementation("linear_softpick")
    assert model.config.normalizer == "linear_softpick"
    with pytest.raises(ValueError, match="normalizer: expected one of"):
        st.SoftpickLlamaConfig(normalizer="sofpick")
    for switch in ("output_gate", "score_scale"):
        for value in ("no", 2, None):
            with pytest.raises(TypeError, match=f"{switch}: expected True or False, got "):
                st.SoftpickLlamaConfig(**{switch: value})


def test_softpick_llama_classifier(ids):
    config = st.SoftpickLlamaConfig(**LLAMA_LIKE, output_gate=True, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    assert type(model.model) is st.SoftpickLlamaModel
    assert model(ids, attention_mask=padding("right")).logits.shape == (2, 3)
