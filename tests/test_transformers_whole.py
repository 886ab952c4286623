"""Whole models of transformers with every normalizer, against their eager path and a computation written out here."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_transformers import (  # noqa: E402
    DECODERS,
    ENCODER,
    PADDING,
    PLAIN,
    _one_thread,  # noqa: F401
    _oracles,  # noqa: F401
    close,
    decoder,
    ids,  # noqa: F401
    padding,
    randomize,
    real,
)
from transformers import (  # noqa: E402
    AutoModel,
    StaticCache,
)

import softpick.integrations.transformers as st  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Whole models


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("name", PLAIN)
def test_llama_forward_backward(name, kind, ids):
    mask = padding(kind)
    results = []
    for implementation in (name, f"oracle|{name}"):
        model = decoder("llama", implementation)
        out = model(ids, attention_mask=mask, output_attentions=True)
        fast = model(ids, attention_mask=mask)
        assert fast.attentions is None
        real(fast.logits, mask).square().mean().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((real(fast.logits, mask), out.attentions, real(out.logits, mask), grads))
    (logits, weights, slow, grads), (expected, expected_weights, _, expected_grads) = results
    close(logits, expected)
    close(slow, expected)
    assert len(weights) == 2
    rows = torch.ones(2, 7).bool() if mask is None else mask.bool()
    for a, b in zip(weights, expected_weights, strict=True):
        assert a.shape == (2, 4, 7, 7)
        close(a.transpose(1, 2)[rows], b.transpose(1, 2)[rows])
    if name != "softpick_stop_gradient":  # whose gradient is not that of its formula
        close(grads, expected_grads, 2e-4)


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("family", DECODERS)
def test_families(family, kind, ids):
    mask = padding(kind)
    model = decoder(family)
    logits = model(ids, attention_mask=mask).logits
    attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("oracle|softpick")
    expected = model(ids, attention_mask=mask, output_attentions=True)
    close(real(logits, mask), real(expected.logits, mask))
    assert len(attentions) == len(expected.attentions) == 2
    rows = torch.ones(2, 7).bool() if mask is None else mask.bool()
    for a, b in zip(attentions, expected.attentions, strict=True):
        close(a.transpose(1, 2)[rows], b.transpose(1, 2)[rows])
    model.set_attn_implementation("eager")
    eager = model(ids, attention_mask=mask).logits
    assert (real(logits, mask) - real(eager, mask)).abs().max() > 0.1  # softmax is something else
    model.set_attn_implementation("softmax")
    close(real(model(ids, attention_mask=mask).logits, mask), real(eager, mask))


def test_weights_are_not_computed_unasked(ids, monkeypatch):
    asked = []
    true = st.scaled_dot_product_attention
    monkeypatch.setattr(
        st, "scaled_dot_product_attention", lambda *a, **k: asked.append(k["return_weights"]) or true(*a, **k)
    )
    for family in ("llama", "gpt2"):
        model = decoder(family)
        model(ids)
        model(ids, output_attentions=True)
        assert asked == [False, False, True, True], family
        asked.clear()


def test_gpt_oss_learned_sink_equals_its_own_eager(ids):
    model = decoder("gpt_oss", "eager")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_()
    for kind in PADDING:
        mask = padding(kind)
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=mask).logits
        assert st.normalizer_of(model) == "learned_sink"
        model.set_attn_implementation("learned_sink")
        close(real(model(ids, attention_mask=mask).logits, mask), real(expected, mask))
    model.set_attn_implementation("softpick")
    with pytest.raises(ValueError, match="s_aux: GptOssAttention keeps learned sinks"):
        model(ids)


@pytest.mark.parametrize("name", ["softpick", "linear_softpick", "softmax"])
def test_bert_and_vit_are_bidirectional(name, ids):
    bert = randomize(
        AutoModel.from_config(
            transformers.BertConfig(vocab_size=60, max_position_embeddings=64, **ENCODER), attn_implementation=name
        )
    )
    vit = randomize(
        AutoModel.from_config(transformers.ViTConfig(image_size=16, patch_size=4, **ENCODER), attn_implementation=name)
    )
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for kind in PADDING:
        for model, inputs in (
            (bert, {"input_ids": ids, "attention_mask": padding(kind)}),
            (vit, {"pixel_values": images}),
        ):
            model.set_attn_implementation(name)
            fast, out = model(**inputs), model(**inputs, output_attentions=True)
            model.set_attn_implementation("eager" if name == "softmax" else f"oracle|{name}")
            expected = model(**inputs, output_attentions=True)
            close(fast.last_hidden_state, expected.last_hidden_state)
            assert len(out.attentions) == 2
            for a, b in zip(out.attentions, expected.attentions, strict=True):
                close(a, b)
    assert out.attentions[0].triu(1).abs().sum() > 0


def test_encoder_decoder_cross_attention(ids):
    config = transformers.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = randomize(AutoModel.from_config(config, attn_implementation="softpick"))
    inputs = {"input_ids": ids, "attention_mask": padding("right"), "decoder_input_ids": ids[:, :4]}
    out = model(**inputs, output_attentions=True)
    model.set_attn_implementation("oracle|softpick")
    expected = model(**inputs, output_attentions=True)
    close(out.last_hidden_state, expected.last_hidden_state)
    close(out.cross_attentions[0], expected.cross_attentions[0])
    assert out.cross_attentions[0].shape == (2, 4, 4, 7)


def test_is_causal_argument_makes_a_decoder_bidirectional(ids):
    model = decoder("llama")
    forward, both = model(ids).logits, model(ids, is_causal=False).logits
    changed = ids.clone()
    changed[:, -1] = 5 + (ids[:, -1] == 5)
    close(model(changed).logits[:, :-1], forward[:, :-1], 1e-6)
    assert (model(changed, is_causal=False).logits - both)[:, 0].abs().max() > 1e-3


@pytest.mark.parametrize("name", PLAIN)
def test_padding_equals_no_padding_and_masks_bite(name, ids):
    model = decoder("llama", name)
    for kind in ("left", "right"):
        mask = padding(kind)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(2):
            alone = model(ids[row][mask[row].bool()][None]).logits[0]
            close(logits[row][mask[row].bool()], alone)
        other = torch.where(mask.bool(), ids, (ids + 11) % 60)
        assert not torch.equal(other, ids)
        close(model(other, attention_mask=mask, position_ids=positions).logits[mask.bool()], logits[mask.bool()], 0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "softpick_llama"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_positions_equal_separate_sequences(family, use_cache, ids):
    model = decoder(family)
    lengths = [3, 4, 7]
    flat = ids.flatten()[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for name in ("softmax", "linear_softpick", "softpick"):
        model.set_attn_implementation(name)
        packed = model(flat, position_ids=positions, use_cache=use_cache).logits[0]
        for part, tokens in zip(packed.split(lengths), flat[0].split(lengths), strict=True):
            close(part, model(tokens[None]).logits[0])
    # and the sequences would otherwise see one another
    assert (model(flat).logits[0] - packed)[3:].abs().max() > 1e-2


@pytest.mark.parametrize("family", [*DECODERS, "softpick_llama"])
def test_generate_with_and_without_caches(family, ids):
    model = decoder(family)
    mask = padding("left")
    run = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    results = [
        model.generate(ids, attention_mask=mask, return_dict_in_generate=True, disable_compile=True, **run, **how)
        for how in ({"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"})
    ]
    assert results[0].sequences.shape == (2, 13)
    for other in results[1:]:
        assert torch.equal(other.sequences, results[0].sequences)
        for a, b in zip(other.logits, results[0].logits, strict=True):
            close(a, b)
    # each row alone, unpadded, gives the same continuation
    alone = model.generate(ids[:1, 3:], **run)
    assert torch.equal(alone[0, 4:], results[0].sequences[0, 7:])


@pytest.mark.parametrize("name", PLAIN)
def test_caches_by_hand(name, ids):
    model = decoder("llama", name)
    full = model(ids).logits
    for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
        steps, state = [], cache
        for piece in ids.split([4, 2, 1], dim=1):  # empty cache, several queries on a filled one, one query
            out = model(piece, past_key_values=state, use_cache=True)
            state = out.past_key_values
            steps.append(out.logits)
        close(torch.cat(steps, dim=1), full)


def test_generate_returns_attentions(ids):
    out = decoder("llama").generate(
        ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    assert [step[0].shape for step in out.attentions] == [(2, 4, 7, 7), (2, 4, 1, 8), (2, 4, 1, 9)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "softpick_llama"])
def test_gradient_checkpointing_gives_the_same_gradients(family, ids):
    grads = []
    for checkpointing in (False, True):
        model = decoder(family)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(ids, attention_mask=padding("left"), labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert grads[0].abs().max() > 0
    close(grads[1], grads[0], 1e-6)


@pytest.mark.parametrize(("family", "kind"), [("llama", "none"), ("softpick_llama", "left")])
def test_compile_equals_eager(family, kind, ids):
    model, mask = decoder(family, num_hidden_layers=1), padding(kind)
    inputs = {"attention_mask": mask, "use_cache": False, "labels": ids}
    torch._dynamo.reset()
    results = []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        out = run(ids, **inputs)
        out.loss.backward()
        results.append((real(out.logits, mask), torch.cat([p.grad.flatten() for p in model.parameters()])))
        model.zero_grad()
    close(results[0], results[1])


def test_bf16_and_autocast(ids):
    model = decoder("llama")
    full = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        close(model(ids).logits.float(), full, 0.15)
    low = model.to(torch.bfloat16)(ids, output_attentions=True)
    assert low.attentions[0].dtype == torch.bfloat16
    close(low.logits.float(), full, 0.15)
