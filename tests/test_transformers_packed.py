"""Packed sequences never reach one another, in any model: each gives what it gives alone."""

from __future__ import annotations

import contextlib
import inspect
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

from sweep_models import build, shrink  # noqa: E402
from transformers import AutoModelForCausalLM, masking_utils  # noqa: E402

import softpick.integrations.transformers as st  # noqa: E402
from softpick.integrations import transformers_packing  # noqa: E402

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
LENGTHS = [3, 9, 2]
CHUNKS_FROM_THE_ROW = not hasattr(masking_utils, "remap_positions_for_packed_sequence")  # before transformers 5.23


def config(family):
    if family == "llama4":
        return transformers.Llama4TextConfig(
            **SIZES, layer_types=["chunked_attention", "full_attention"], attention_chunk_size=4, intermediate_size_mlp=48,
            num_local_experts=2, num_experts_per_tok=1, moe_layers=[], no_rope_layers=[1, 0],
        )  # fmt: skip
    if family == "gpt2":
        return transformers.GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    kinds = {
        "llama": (transformers.LlamaConfig, {}),
        "mistral": (transformers.MistralConfig, {}),
        "gemma2": (transformers.Gemma2Config, {"layer_types": LAYERS, "query_pre_attn_scalar": 8}),
        "gemma3": (transformers.Gemma3TextConfig, {"layer_types": LAYERS, "query_pre_attn_scalar": 8}),
        "cohere2": (transformers.Cohere2Config, {"layer_types": LAYERS}),
        "olmo3": (transformers.Olmo3Config, {"layer_types": LAYERS}),
        "exaone4": (transformers.Exaone4Config, {"layer_types": LAYERS}),
        "softpick_llama": (st.SoftpickLlamaConfig, {"score_scale": True, "output_gate": True}),
    }
    kind, more = kinds[family]
    return kind(
        **{name: value for name, value in SIZES.items() if name != "sliding_window" or "window" in str(vars(kind))},
        **more,
    )


FAMILIES = ["llama", "mistral", "gemma2", "gemma3", "cohere2", "olmo3", "exaone4", "llama4", "gpt2", "softpick_llama"]
_built = {}


def model_of(family, name="softpick"):
    if (family, name) not in _built:
        model = AutoModelForCausalLM.from_config(config(family), attn_implementation=name).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0.0, 0.15, generator=generator)
        _built[family, name] = model
    return _built[family, name]


@pytest.fixture
def ids():
    return torch.randint(3, 60, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def alone(model, ids):
    with torch.no_grad():
        return torch.cat([model(part, use_cache=False).logits[0] for part in ids.split(LENGTHS, dim=1)])


def offsets():
    return torch.tensor([0, 3, 12, 14], dtype=torch.int32)


POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
OFFSETS = {"cu_seq_lens_q": offsets(), "cu_seq_lens_k": offsets(), "max_length_q": 9, "max_length_k": 9}


def close(a, b, tol=5e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


@pytest.mark.parametrize("how", ["no cache", "cache", "all-ones mask", "mask and cache", "padding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_restarting_positions(family, how, ids):
    model = model_of(family)
    mask = torch.ones_like(ids) if "mask" in how else None
    if how == "padding":  # two tokens more at the end
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :2])], 1)
        given, positions = torch.cat([ids, ids[:, :2]], 1), torch.cat([POSITIONS, torch.tensor([[2, 3]])], 1)
    else:
        given, positions = ids, POSITIONS
    refused = contextlib.nullcontext()
    if family == "llama4" and CHUNKS_FROM_THE_ROW:
        refused = pytest.raises(ValueError, match=r"position_ids: .* need transformers 5\.23 or newer")
    with torch.no_grad(), refused:
        logits = model(
            given, position_ids=positions, attention_mask=mask, use_cache="cache" in how and how != "no cache"
        ).logits
    if family == "llama4" and CHUNKS_FROM_THE_ROW:
        return
    expected = alone(model, ids)
    close(logits[0, : len(expected)], expected)
    with torch.no_grad():
        assert (model(ids, use_cache=False).logits[0] - expected)[3:].abs().max() > 1e-2  # they would see one another


@pytest.mark.parametrize("how", ["no cache", "cache", "all-ones mask", "weights"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gpt2",)])
def test_offsets(family, how, ids):
    model = model_of(family)
    with torch.no_grad():
        logits = model(
            ids,
            position_ids=POSITIONS,
            attention_mask=torch.ones_like(ids) if how == "all-ones mask" else None,
            use_cache=how == "cache",
            output_attentions=how == "weights",
            **OFFSETS,
        ).logits
    close(logits[0], alone(model, ids))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "olmo3", "softpick_llama"])
def test_offsets_need_no_mask_and_leave_nothing_of_it(family, ids, monkeypatch):
    """The fast way: no layer computes with a mask, whatever the window."""

    calls = []
    true = transformers_packing.varlen_attention
    monkeypatch.setattr(transformers_packing, "varlen_attention", lambda *a, **k: calls.append(1) or true(*a, **k))
    monkeypatch.setattr(st, "scaled_dot_product_attention", None)
    with torch.no_grad():
        model_of(family)(ids, use_cache=False, **OFFSETS)
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "llama4", "gpt2"])
def test_a_static_cache_refuses_them_but_not_left_padding(family, ids):
    model = model_of(family)
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        if family == "mistral":  # its cache is filled with the window's tokens only, attention sees no unwritten key
            close(model(ids, position_ids=POSITIONS, past_key_values=cache).logits[0], alone(model, ids))
        else:
            with pytest.raises(ValueError, match="position_ids: packed sequences need as many keys as queries"):
                model(ids, position_ids=POSITIONS, past_key_values=cache)
    takes = inspect.signature(masking_utils.create_chunked_causal_mask).parameters
    if family == "llama4" and "block_sequence_ids" not in takes:
        return  # transformers before 5.20 generates nothing there (a TypeError), whatever the implementation
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    run = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", **run)
    dynamic = model.generate(ids, attention_mask=mask, **run)
    assert torch.equal(static, dynamic)
    if family != "llama4":  # which scales by positions that count padding
        assert torch.equal(model.generate(ids[:, 3:], **run)[0, -3:], dynamic[0, -3:])


def test_offsets_that_a_model_keeps_from_its_layers_are_an_error(ids):
    """StableLM takes any argument and hands none on."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("head_dim", "sliding_window")}
    model = AutoModelForCausalLM.from_config(transformers.StableLmConfig(**sizes), attn_implementation="softpick")
    with pytest.raises(ValueError, match="cu_seq_lens_q: the model does not hand it on to StableLmAttention"):
        model(ids, use_cache=False, **OFFSETS)
    assert model(ids).logits.isfinite().all()  # and nothing of it stays


class Layer(torch.nn.Module):
    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("weights", [False, True])
def test_function(is_causal, scale, window, weights):
    """Each sequence as alone, with the mask written out: also of encoders, which look ahead within their sequence."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 8, generator=generator) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 2, 7, 11, 14], dtype=torch.int32)  # no sequence crosses a row of 7
    extra = {"score_scale": torch.tensor([0.5, 1.0, 1.5, 2.0])} if scale else {}
    out, _ = st.attention_forward(
        Layer(is_causal), q, k, v, None, sliding_window=window, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
        output_attentions=weights, **extra,
    )  # fmt: skip
    for row, start, end in ((0, 0, 2), (0, 2, 7), (1, 0, 4), (1, 4, 7)):
        part = [x[row : row + 1, :, start:end] for x in (q, k, v)]
        i, j = torch.arange(end - start)[:, None], torch.arange(end - start)
        keep = (j <= i) if is_causal else torch.ones(end - start, end - start, dtype=torch.bool)
        if window is not None:
            keep = keep & ((i - j).abs() < window)
        expected, _ = st.attention_forward(Layer(is_causal), *part, keep[None, None], **extra)
        close(out[row, start:end], expected[0])


@pytest.mark.parametrize("padded", [False, True])
def test_compiled(padded, ids):
    """While compiling positions cannot be read: packed sequences are kept apart where there is a mask, else an error."""
    model = model_of("mistral")
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = torch.ones_like(ids) if padded else None
    with torch.no_grad():
        if padded:
            close(run(ids, position_ids=POSITIONS, attention_mask=mask, use_cache=True).logits[0], alone(model, ids))
            return
        plain = torch.arange(ids.shape[1])[None]
        close(run(ids, position_ids=plain, use_cache=True).logits, model(ids, use_cache=True).logits)
        with pytest.raises(RuntimeError, match="position_ids: packed sequences in a compiled model"):
            run(ids, position_ids=POSITIONS, use_cache=True)


PADDED = ["llama", "mistral", "gemma2", "gemma3", "llama4", "gpt2", "olmo3"]


@pytest.mark.thinned(every=3)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", PADDED)
def test_left_padding_with_positions(family, compiled, ids):
    """Positions as ``generate`` passes them, 0 on and behind the padding, are no packed sequences."""
    model = model_of(family)
    padded = torch.cat([ids, ids.flip(1)])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0  # no whole number of chunks
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch.no_grad():
        for use_cache in (False, True):
            logits = run(padded, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
            close(logits[0, 5:], model(padded[:1, 5:]).logits[0])
            close(logits[1], model(padded[1:]).logits[0])


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", PADDED)
def test_left_padding_in_generate(family, use_cache, ids):
    """The tokens of transformers' own attention, padded, and of the row alone."""
    padded = torch.cat([ids, ids.flip(1)])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    run = {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    logits = {}
    for name in ("eager", "softmax", "softpick"):
        model = model_of(family, name)
        result = model.generate(padded, attention_mask=mask, **run)
        logits[name] = torch.stack(result.logits)
        alone = model.generate(padded[:1, 5:], **run)
        assert torch.equal(result.sequences[0, -5:], alone.sequences[0, -5:])
        close(logits[name][:, :1], torch.stack(alone.logits))
    close(logits["softmax"], logits["eager"])


@pytest.mark.parametrize("family", PADDED)
def test_packed_sequences_behind_left_padding(family, ids):
    """As alone, or refused where transformers would count chunks from the wrong token."""
    model = model_of(family)
    padded, positions = torch.cat([ids[:, :3], ids], 1), torch.cat([torch.zeros(1, 3, dtype=torch.long), POSITIONS], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    with torch.no_grad():
        if family == "llama4":
            with pytest.raises(ValueError, match="position_ids: packed sequences of a llama4_text model"):
                model(padded, attention_mask=mask, position_ids=positions, use_cache=False)
        else:
            logits = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
            close(logits[0, 3:], alone(model, ids))


def test_chunks_that_older_transformers_cut_in_wrong_places_are_refused(ids, monkeypatch):
    """Packed sequences by positions in a model with chunks, and nothing else."""
    monkeypatch.setattr(transformers_packing, "_CHUNKS_FROM_THE_ROW", True)
    plain = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        with pytest.raises(
            ValueError, match=r"position_ids: packed sequences of a llama4_text .* need transformers 5\.23"
        ):
            model_of("llama4")(ids, position_ids=POSITIONS, use_cache=False)
        assert model_of("llama4")(ids, position_ids=plain, use_cache=False).logits.isfinite().all()
        close(
            model_of("mistral")(ids, position_ids=POSITIONS, use_cache=False).logits[0], alone(model_of("mistral"), ids)
        )


@pytest.mark.skipif("deepseek_v4" not in transformers.CONFIG_MAPPING, reason="transformers has no DeepSeek-V4 yet")
def test_keys_compressed_from_neighbouring_tokens_are_refused():
    """DeepSeek-V4: a compressor takes tokens of two sequences together."""
    shrunk = shrink(transformers.CONFIG_MAPPING["deepseek_v4"]())
    model = build(transformers.DeepseekV4ForCausalLM, shrunk, "learned_sink")
    ids = torch.randint(3, 60, (1, sum(LENGTHS)))
    with torch.no_grad():
        assert model(ids, use_cache=False).logits.isfinite().all()
        for given in ({"position_ids": POSITIONS}, OFFSETS):
            with pytest.raises(
                ValueError, match=r"packed sequences need a model of attention layers only; .*Compressor"
            ):
                model(ids, use_cache=False, **given)


ENCODERS = {
    "BertModel": transformers.BertConfig,
    "RobertaModel": transformers.RobertaConfig,
    "ElectraModel": transformers.ElectraConfig,
    "EsmModel": transformers.EsmConfig,
    "LayoutLMModel": transformers.LayoutLMConfig,  # says that it is causal, and has a mask of one row
    "ModernBertModel": transformers.ModernBertConfig,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_positions_alone_do_not_pack_in_an_encoder(name, ids):
    """Its sequences would see one another: refused, unless offsets or a mask tell them apart."""
    settings = SIZES | {"intermediate_size": 48, "initializer_range": 0.3, "cls_token_id": 1, "sep_token_id": 2}
    model = getattr(transformers, name)._from_config(ENCODERS[name](**settings), attn_implementation="softpick").eval()
    other = ids.clone()
    other[0, 1] = 5 + (ids[0, 1] + 7) % 50
    plain = torch.arange(ids.shape[1])[None]
    padding = torch.ones_like(ids)
    padding[:, -2:] = 0
    same = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).bool()[None, None]
    with torch.no_grad():
        for given in ({}, {"attention_mask": torch.ones_like(ids)}, {"attention_mask": padding}):
            with pytest.raises(ValueError, match=r"position_ids: start again at 0, .*Attention looks both ways"):
                model(ids, position_ids=POSITIONS, **given)
            assert model(ids, position_ids=plain, **given).last_hidden_state.isfinite().all()
        ways = (
            [OFFSETS]
            if name in ("LayoutLMModel", "ModernBertModel", "EsmModel")
            else [OFFSETS, {"attention_mask": same}]
        )
        for way in ways:
            of_both = [model(x, position_ids=POSITIONS, **way).last_hidden_state[0, LENGTHS[0] :] for x in (ids, other)]
            close(*of_both)


def test_layers_that_look_both_ways_need_no_offsets_where_another_model_has_them(monkeypatch):
    """A vision tower beside a text that is packed by offsets is not refused, a causal layer is."""
    layer = torch.nn.Linear(1, 1)
    monkeypatch.setattr(transformers_packing._running, "given", True, raising=False)
    transformers_packing.check_offsets(layer, False, None)
    transformers_packing.check_offsets(layer, False, torch.ones(1, 1, 4, 4).bool())
    for causal, mask in ((True, None), (False, torch.ones(1, 1, 4, 4).bool().tril())):
        with pytest.raises(ValueError, match="cu_seq_lens_q: the model does not hand it on to Linear"):
            transformers_packing.check_offsets(layer, causal, mask)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("family", ["llama", "gemma2", "softpick_llama"])
def test_an_interrupted_forward_pass_leaves_nothing(family, error, ids):
    model = model_of(family)

    def interrupt(*_):
        raise error

    hook = model.model.layers[0].mlp.register_forward_hook(interrupt)
    try:
        with pytest.raises(error):
            model(ids, use_cache=False, **OFFSETS)
    finally:
        hook.remove()
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "mistral", "softpick_llama"])
def test_threads_do_not_see_the_offsets_of_one_another(family, ids):
    """One thread waits within a forward pass with offsets while another runs the same model without."""
    model = model_of(family)
    inside, done, logits = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is packed:
            inside.set()
            done.wait(60)

    def run():
        with torch.no_grad():
            logits.append(model(ids, position_ids=POSITIONS, use_cache=False, **OFFSETS).logits[0])

    packed = threading.Thread(target=run)
    hook = model.model.layers[0].mlp.register_forward_hook(wait)
    try:
        packed.start()
        assert inside.wait(60)
        assert model(ids, use_cache=False).logits.isfinite().all()
    finally:
        done.set()
        packed.join()
        hook.remove()
    close(logits[0], alone(model, ids))


@pytest.mark.parametrize("how", ["positions", "offsets"])
@pytest.mark.parametrize("kind", ["BigBirdPegasus", "Doge"])
def test_layers_that_do_not_say_that_they_are_causal(kind, how, ids):
    """The first sequence never reaches the second, whatever ``is_causal`` of the layers is."""
    of_bigbird = {
        "vocab_size": 60, "d_model": 32, "decoder_layers": 2, "encoder_layers": 1, "decoder_attention_heads": 2,
        "encoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_ffn_dim": 32, "init_std": 0.3,
        "max_position_embeddings": 64,
    }  # fmt: skip
    sizes = {name: value for name, value in SIZES.items() if name != "sliding_window"}
    config = getattr(transformers, f"{kind}Config")(**(of_bigbird if kind == "BigBirdPegasus" else sizes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="softpick").eval()
    other = ids.clone()
    other[0, :3] = 50
    given = {"position_ids": POSITIONS} if how == "positions" else OFFSETS
    with torch.no_grad():
        for more in ({}, {"attention_mask": torch.ones_like(ids)}):
            first, second = (model(x, use_cache=False, **given, **more).logits[0, 3:] for x in (ids, other))
            close(first, second)
        assert (model(ids, use_cache=False).logits - model(other, use_cache=False).logits)[0, 3:].abs().max() > 1e-3


MIXED = {
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "MiniMax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
}


@pytest.mark.parametrize("family", list(MIXED))
def test_layers_that_carry_one_sequence_into_the_next(family, ids):
    """Packed sequences are refused by models with convolutions, state spaces or linear attention; padding is not."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("sliding_window",)}
    config = getattr(transformers, f"{family}Config")(**sizes, **MIXED[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="softpick").eval()
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        for given in (
            {"position_ids": POSITIONS},
            {"position_ids": POSITIONS, "attention_mask": torch.ones_like(ids)},
            OFFSETS,
        ):
            with pytest.raises(ValueError, match=r"packed sequences need a model of attention layers only; .*layers\."):
                model(ids, use_cache=False, **given)
        model.set_attn_implementation("eager")
        model(ids, position_ids=POSITIONS, use_cache=False)  # transformers' own attention is not ours to refuse
