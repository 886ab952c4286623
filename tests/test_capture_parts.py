"""Encoder-decoders, vision transformers, hybrid models, MLA: what is measured is what transformers' own full maps show."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from small_models import DIMS as TWO_LAYERS  # noqa: E402
from small_models import VISION  # noqa: E402

from softpick.analysis import calls, metrics  # noqa: E402
from softpick.analysis.capture import attention_maps, measure, measure_parts, part_positions  # noqa: E402
from softpick.analysis.metrics import Meter  # noqa: E402
from softpick.analysis.watching import watch  # noqa: E402
from softpick.experiment.positions import KINDS_OF_TOKENS  # noqa: E402
from softpick.integrations.transformers import register  # noqa: E402

register()
T, TD = 24, 20
SMALL = {"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
DIMS = TWO_LAYERS | {"decoder_layers": 3}


def made(kind, config, implementation="eager"):
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation=implementation).eval()


def t5(implementation="eager"):
    config = transformers.T5Config(
        **SMALL, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4, initializer_factor=1.0
    )
    return made(transformers.T5ForConditionalGeneration, config, implementation)


def bart(implementation="eager"):
    config = transformers.BartConfig(**SMALL, **DIMS, bos_token_id=1, max_position_embeddings=64)
    return made(transformers.BartModel, config, implementation)


def bert2bert(implementation="eager"):
    """Two encoders' classes, the second as a decoder: their cross-attention has other names, and its own module."""
    parts = [
        transformers.BertConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48,
            initializer_range=0.3, is_decoder=layers == 3, add_cross_attention=layers == 3,
        )
        for layers in (2, 3)
    ]  # fmt: skip
    return made(
        transformers.EncoderDecoderModel,
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts),
        implementation,
    )


def whisper(implementation="eager"):
    config = transformers.WhisperConfig(
        **SMALL, **DIMS, bos_token_id=1, num_mel_bins=8, max_source_positions=30, max_target_positions=32
    )
    return made(transformers.WhisperModel, config, implementation)


WRITERS = {"t5": t5, "bart": bart, "bert2bert": bert2bert, "whisper": whisper}


def text_batches(model, pad=True):
    g = torch.Generator().manual_seed(1)
    result = []
    for _ in range(2):
        ids, written = torch.randint(3, 60, (3, T), generator=g), torch.randint(3, 60, (3, TD), generator=g)
        written[:, 0] = 1
        mask, of_decoder = torch.ones_like(ids), torch.ones_like(written)
        if pad:
            mask[0, 15:] = 0
            of_decoder[1, 14:] = 0
        batch = {"decoder_input_ids": written, "decoder_attention_mask": of_decoder}
        if model.main_input_name == "input_features":
            result.append(batch | {"input_features": torch.randn(3, 8, 60, generator=g)})
        else:
            result.append(batch | {"input_ids": ids, "attention_mask": mask})
    return result


def maps_of(model, batch, part):
    name = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross-attention": "cross_attentions"}[
        part
    ]
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return getattr(model(**batch, output_attentions=True), name)


@pytest.mark.thinned
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "softpick"])
@pytest.mark.parametrize("part", ["encoder", "decoder", "cross-attention"])
@pytest.mark.parametrize("name", WRITERS)
def test_maps_of_a_part_are_transformers_own(name, part, implementation):
    model = WRITERS[name](implementation)
    batch = {key: x[:1] for key, x in text_batches(model, pad=False)[0].items()}
    got = attention_maps(model, batch, part=part)
    if implementation == "softpick":
        with torch.no_grad():
            found = copy.deepcopy(model)(**batch, output_attentions=True)
        want = getattr(found, f"{part.removesuffix('-attention')}_attentions")
        assert (got.sum(-1) < 0.999).any()
    else:
        want = maps_of(model, batch, part)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)
    shape = {"encoder": (2, 4), "decoder": (3, 4), "cross-attention": (3, 4)}[part]
    assert got.shape[:2] == shape
    if part == "cross-attention":
        assert got.shape[2] != got.shape[3]


def by_loops(maps, batches, decoder=False):
    """Figures of cross-attention in plain loops; ``maps`` is a list over batches of a list over layers of ``(B, H, T, Tk)``."""
    alphas, entropies, masses, largest, first = [], [], [], [], []
    for layers, batch in zip(maps, batches, strict=True):
        for b in range(3):
            queries = [i for i in range(TD) if batch["decoder_attention_mask"][b, i]]
            seen = batch.get("attention_mask")
            keys = [k for k in range(layers[0].shape[3]) if seen is None or seen[b, k]]
            for layer in layers:
                for head in layer[b].double():
                    rows = [[float(head[q, k]) for k in keys] for q in queries]
                    alpha = [sum(row[k] for row in rows) / len(rows) for k in range(len(keys))]
                    alphas.append(alpha)
                    first.append(alpha.index(max(alpha)) == 0)
                    masses += [sum(row) for row in rows]
                    largest += [max(row) for row in rows]
                    entropies += [-sum(p * torch.tensor(p).log().item() for p in row if p > 0) for row in rows]

    def mean(x):
        return sum(x) / len(x)

    return {
        "first": 100 * mean([alpha[0] > 0.2 for alpha in alphas]),
        "last": 100 * mean([alpha[-1] > 0.2 for alpha in alphas]),
        "strongest": 100 * mean([max(alpha) > 0.2 for alpha in alphas]),
        "is_first": 100 * mean(first),
        "mass": mean(masses),
        "entropy": mean(entropies),
        "largest": mean(largest),
    }


@pytest.mark.thinned
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_cross_attention_by_loops(name, pad, monkeypatch):
    """Also with a head or two at a time: keys are as many as the encoder has positions, queries as many as the decoder."""
    model = WRITERS[name]("sdpa")
    batches = text_batches(model, pad)
    # the queries that are padding are cut away, so that 16 queries see every key only where there is no padding
    want = by_loops([maps_of(model, batch, "cross-attention") for batch in batches], batches)
    for entries in (None, 2 * T * TD):
        if entries:
            monkeypatch.setattr(calls, "MAX_ENTRIES", entries)
            monkeypatch.setattr(metrics, "MAX_ENTRIES", entries)
        got = measure_parts(model, batches, largest_score=True)["cross-attention"]
        assert got.hidden == {}
        assert got.data["causal"] is False
        assert got.data["sequence_length"]["max"] == TD
        assert got.data["keys"]["max"] == (30 if name == "whisper" else T)
        assert got.sink["first"]["rate"]["0.2"] == pytest.approx(want["first"])
        assert got.sink["strongest"]["rate"]["0.2"] == pytest.approx(want["strongest"])
        assert got.sink["strongest"]["is_first"] == pytest.approx(want["is_first"])
        assert got.sink["last"]["rate"]["0.2"] == pytest.approx(want["last"])
        assert got.rows["mass"] == pytest.approx(want["mass"], abs=1e-5)
        assert got.rows["entropy"] == pytest.approx(want["entropy"], rel=1e-4)
        assert got.rows["largest_weight"] == pytest.approx(want["largest"], rel=1e-4)


@pytest.mark.parametrize("name", WRITERS)
def test_encoder_and_decoder_by_themselves(name):
    """A meter that is fed transformers' own maps, and hidden states that hooks of the test see, says the same."""
    model = WRITERS[name]("sdpa")
    batches = text_batches(model)
    got = measure_parts(model, batches)
    assert [part.data["layers"] for part in got.values()] == [2, 3, 3]
    assert [part.data["causal"] for part in got.values()] == [False, True, False]
    for part in ("encoder", "decoder"):
        meter, hidden = Meter(), []
        own = model.get_encoder() if part == "encoder" else model.get_decoder()
        stack = next(m for m in own.modules() if isinstance(m, torch.nn.ModuleList))
        hooks = [
            m.register_forward_hook(lambda m, i, o, h=hidden: h.append(o if torch.is_tensor(o) else o[0]))
            for m in stack
        ]
        for batch in batches:
            hidden.clear()
            with torch.no_grad():
                model(**batch)
            seen = list(hidden)
            maps = maps_of(model, batch, part)
            side = part_positions(model, batch, part, maps[0].shape[2], maps[0].shape[3])[0]
            meter.begin_batch(side.valid, side.ids)
            for layer, a in enumerate(maps):
                meter.attention(layer, a, torch.ones(3, a.shape[2], 4, 1), causal=part == "decoder")
                meter.hidden(layer, seen[layer])
        for hook in hooks:
            hook.remove()
        want, found = meter.result().to_dict(), got[part].to_dict()
        for path in (
            ("sink", "first", "rate", "0.2"), ("sink", "strongest", "rate", "0.3"), ("rows", "entropy"), ("rows", "mass"),
            ("rows", "largest_weight"), ("sparsity", "tiny"), ("hidden", "kurtosis"), ("hidden", "max"), ("hidden", "min"),
            ("data", "tokens"), ("heads", "dormant"),
        ):  # fmt: skip
            a, b = want, found
            for key in path:
                a, b = a[key], b[key]
            assert b == pytest.approx(a, rel=2e-4, abs=1e-5), (part, path)


def test_an_encoder_decoder_is_measured_in_parts():
    model = bart()
    batches = text_batches(model)
    with pytest.raises(ValueError, match="BartModel is an encoder-decoder, whose encoder, decoder, cross-attention"):
        measure(model, batches)
    with pytest.raises(ValueError, match="part: expected one of 'encoder', 'decoder', 'cross-attention', got ''"):
        attention_maps(model, {k: x[:1] for k, x in batches[0].items()})
    with pytest.raises(ValueError, match="needs decoder_input_ids, got the keys"):
        measure_parts(model, [{"input_ids": batches[0]["input_ids"]}])


# Vision transformers


def images(n=2, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


VITS = {
    "vit": (lambda: transformers.ViTConfig(**VISION), "ViTModel", ["[CLS]"]),
    "deit": (lambda: transformers.DeiTConfig(**VISION), "DeiTModel", ["[CLS]", "[DIST]"]),
    "dinov2": (lambda: transformers.Dinov2Config(**VISION), "Dinov2Model", ["[CLS]"]),
    "dinov2-registers": (
        lambda: transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=4),
        "Dinov2WithRegistersModel",
        ["[CLS]", "register 1", "register 2", "register 3", "register 4"],
    ),
    "dinov3": (
        lambda: transformers.DINOv3ViTConfig(**VISION, num_register_tokens=2),
        "DINOv3ViTModel",
        ["[CLS]", "register 1", "register 2"],
    ),
    "clip": (lambda: transformers.CLIPVisionConfig(**VISION), "CLIPVisionModel", ["[CLS]"]),
    "siglip": (lambda: transformers.SiglipVisionConfig(**VISION), "SiglipVisionModel", []),
    "beit": (lambda: transformers.BeitConfig(**VISION), "BeitModel", ["[CLS]"]),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", VITS)
def test_vision_transformers(name, implementation):
    config, kind, before = VITS[name]
    model = made(getattr(transformers, kind), config(), implementation)
    pixels = {"pixel_values": images()}
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    with torch.no_grad():
        want = own(**pixels, output_attentions=True).attentions
    total = len(before) + 16
    for i in range(2):
        got = attention_maps(model, {"pixel_values": pixels["pixel_values"][i : i + 1]})
        torch.testing.assert_close(got, torch.stack([a[i] for a in want]), rtol=1e-4, atol=1e-5)
        assert got.shape == (2, 4, total, total)
    found = measure(model, [pixels]).to_dict()
    assert found["data"]["causal"] is False
    alpha = torch.stack(want).double().mean(3)  # (L, B, H, T): over queries, which all see every key
    assert found["sink"]["first"]["rate"]["0.2"] == pytest.approx(100 * float((alpha[..., 0] > 0.2).double().mean()))
    kinds = [n.split()[0] if n.startswith("register") else n for n in before] + ["patch"] * 16
    strongest = alpha.argmax(-1).flatten().tolist()
    by_kind = {
        row["token_id"]: row for row in measure(model, [pixels], tokens=range(len(KINDS_OF_TOKENS))).sink["by_token"]
    }
    assert {KINDS_OF_TOKENS[i] for i in by_kind} == set(kinds)
    for i, row in by_kind.items():
        mine = [k for k, kind in enumerate(kinds) if kind == KINDS_OF_TOKENS[i]]
        share = 100 * sum(k in mine for k in strongest) / len(strongest)
        assert row["strongest"] == pytest.approx(share)
        assert row["alpha"] == pytest.approx(float(alpha[..., mine].mean()), rel=1e-4)
    assert part_positions(model, pixels, "", total, total)[0].names[: len(before) + 1] == [*before, "patch 1,1"]


def test_pyramids_and_masked_images_are_refused_by_name():
    masked = made(transformers.ViTMAEModel, transformers.ViTMAEConfig(**VISION))
    with pytest.raises(ValueError, match=r"ViTMAEModel attends with 5 positions; expected 1 .* and 4 x 4 patches"):
        measure(masked, [{"pixel_values": images()}])


# Hybrid models, MLA, decoders that look both ways


def hybrid(kind, config):
    return made(kind, config)


HYBRIDS = {
    "jamba": lambda: (
        "JambaForCausalLM",
        transformers.JambaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4,
            use_mamba_kernels=False, initializer_range=0.3, pad_token_id=0,
        ),
        2,
        r"2 of 4 layers have no attention and are not measured \(JambaMambaMixer.*\): 0, 2",
    ),
    "qwen3-next": lambda: (
        "Qwen3NextForCausalLM",
        transformers.Qwen3NextConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, initializer_range=0.3, pad_token_id=0,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        ),
        1,
        r"3 of 4 layers have no attention and are not measured \(Qwen3NextGatedDeltaNet\): 0 to 2",
    ),
    "lfm2": lambda: (
        "Lfm2ForCausalLM",
        transformers.Lfm2Config(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], initializer_range=0.3, pad_token_id=0,
        ),
        1,
        r"2 of 3 layers have no attention and are not measured \(Lfm2ShortConv\): 0, 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_models(name):
    kind, config, layers, sentence = HYBRIDS[name]()
    model = made(getattr(transformers, kind), config)
    ids = torch.randint(3, 60, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = [
            a for a in copy.deepcopy(model)(ids, output_attentions=True, use_cache=False).attentions if a is not None
        ]
    said = []
    with watch(model, lambda seen: None, on_rest=said.extend) as run:
        run({"input_ids": ids})
    assert len(said) == 1
    assert __import__("re").fullmatch(sentence, said[0]), said
    assert len(want) == layers
    torch.testing.assert_close(attention_maps(model, ids[0]), torch.stack([a[0] for a in want]), rtol=1e-4, atol=1e-5)
    assert measure(model, ids).data["layers"] == layers


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["DeepseekV2", "DeepseekV3", "MiniCPM3"])
def test_queries_wider_than_values(kind, implementation):
    """MLA: queries and keys have 8 + 4 entries, values 6."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=6, initializer_range=0.3, max_position_embeddings=64, first_k_dense_replace=2,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = made(getattr(transformers, f"{kind}ForCausalLM"), config, implementation)
    ids = torch.randint(3, 60, (2, T), generator=torch.Generator().manual_seed(0))
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    with torch.no_grad():
        want = own(ids, output_attentions=True, use_cache=False).attentions
    torch.testing.assert_close(attention_maps(model, ids[1]), torch.stack([a[1] for a in want]), rtol=1e-4, atol=1e-5)
    widths = set()
    with watch(
        model, lambda seen: widths.add((seen.query.shape[-1], seen.value.shape[-1], seen.outputs.shape[-1]))
    ) as run:
        run({"input_ids": ids})
    assert widths == {(12, 6, 6)}
    assert measure(model, ids, largest_score=True).rows["mass"] == pytest.approx(1, abs=1e-5)


def test_a_decoder_that_looks_both_ways():
    config = transformers.Gemma3TextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, use_bidirectional_attention=True, sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    model = made(transformers.Gemma3ForCausalLM, config)
    ids = torch.randint(3, 60, (1, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = copy.deepcopy(model)(ids, output_attentions=True, use_cache=False).attentions
    got = attention_maps(model, ids)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)
    assert got.triu(1).any()
    assert measure(model, ids).data["causal"] is False
