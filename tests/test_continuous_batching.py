"""Continuous batching of transformers: every request gets the tokens that ``generate`` gives to it alone."""

from __future__ import annotations

import gc

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig  # noqa: E402
from transformers.generation.continuous_batching import continuous_api  # noqa: E402

import softpick  # noqa: E402
import softpick.integrations.transformers as st  # noqa: E402
from softpick.integrations import transformers_layers, transformers_serving  # noqa: E402

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**WINDOW, "query_pre_attn_scalar": 8}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **GEMMA),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES,
        **WINDOW,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "softpick_llama": lambda: st.SoftpickLlamaConfig(**SIZES, score_scale=True, output_gate=True),
}
# several lengths; 30 tokens are prefilled in two pieces (a batch has 16), and two prompts share 20 tokens
LENGTHS = (5, 1, 30, 9)
PAGE = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
# from transformers 5.19 a function may be handed a block table
needs_pages = pytest.mark.skipif(not transformers_serving._CACHE_CHOOSES, reason="transformers 5.19 or newer")
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 2}


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Managers collect garbage when they stop, which takes seconds beside all that pytest has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def model_of(family, name):
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=name).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 or parameter.numel() == 4:  # also sinks and score scales, one a head
            parameter.data.normal_(0.0, 0.5, generator=generator)
    return model


def prompts():
    generator = torch.Generator().manual_seed(1)
    found = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in LENGTHS]
    return [*found, [*found[2][:20], 4, 5]]


def check(model, tokens=7, **options):
    config = GenerationConfig(max_new_tokens=tokens, **GREEDY)
    options = {"num_blocks": 40, "max_batch_tokens": 16, PAGE: 4, **options}
    alone = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts()]
    results = model.generate_batch(
        prompts(), generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**options)
    )
    assert [result.error for result in results.values()] == [None] * len(alone)
    assert [result.generated_tokens for result in results.values()] == alone


@pytest.fixture
def calls(monkeypatch):
    """Names of the attention functions that were called, and whether with pages."""
    found = set()
    for name in ("decode_attention", "varlen_attention"):
        original = getattr(transformers_serving, name)

        def counted(*args, _original=original, _name=name, **kwargs):
            found.add((_name, kwargs.get("block_table") is not None))
            return _original(*args, **kwargs)

        monkeypatch.setattr(transformers_serving, name, counted)
    return found


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize(
    ("family", "name", "pages"),
    [
        ("llama", "softpick", True),
        ("llama", "relu_softpick", True),
        ("mistral", "softpick", False),
        ("gemma2", "softpick", False),
        ("gemma3", "rectified", False),
        ("gpt_oss", "learned_sink", False),
        ("softpick_llama", "softpick", True),
        ("softpick_llama", "learned_sink", True),
    ],
)
def test_equals_generate(family, name, pages, calls):
    pages = pages and transformers_serving._CACHE_CHOOSES
    model = model_of(family, name)
    check(model, max_blocks_per_request=16 if pages else None)
    assert calls == {("varlen_attention", False)} | ({("decode_attention", True)} if pages else set())
    assert model.config._attn_implementation == name


def test_without_pages(calls):
    """The default without a GPU."""
    check(model_of("softpick_llama", "softpick"))
    assert calls == {("varlen_attention", False)}


def test_every_normalizer():
    for name in st.IMPLEMENTATIONS:
        check(model_of("softpick_llama", name), tokens=2)


def test_no_masks_are_made(monkeypatch):
    """A mask of all tokens of a batch against each other would be made in vain, in every step."""
    model, config = model_of("gemma2", "softpick"), GenerationConfig(max_new_tokens=2, **GREEDY)
    monkeypatch.setattr(transformers_layers, "sdpa_mask", None)
    options = ContinuousBatchingConfig(num_blocks=40, max_batch_tokens=16, **{PAGE: 4})
    results = model.generate_batch(prompts(), generation_config=config, continuous_batching_config=options)
    assert [result.error for result in results.values()] == [None] * len(prompts())


def test_never_switched_to_flash(monkeypatch):
    """Where FlashAttention is there, the manager switches models to it."""
    switched = []
    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: True)
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "set_attn_implementation", lambda self, name: switched.append(name)
    )
    for name in ("sdpa", "softpick"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation=name)
        options = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=4)
        options.auto_switch_to_flash = True  # up to transformers 5.18 it always does
        manager = model.init_continuous_batching(
            GenerationConfig(max_new_tokens=2, **GREEDY), continuous_batching_config=options
        )
        assert manager.model is model
    assert switched in (["flash_attention_3"], ["paged|flash_attention_3"])  # sdpa alone


def test_what_cannot_be_served_is_named():
    config = GenerationConfig(max_new_tokens=2, **GREEDY)
    options = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=4, max_blocks_per_request=4)
    with pytest.raises(ValueError, match="max_blocks_per_request: expected 0 or None"):
        model_of("mistral", "softpick").init_continuous_batching(config, continuous_batching_config=options)
    options.max_blocks_per_request = None
    model = model_of("llama", "learned_sink")
    results = model.generate_batch([[3]], generation_config=config, continuous_batching_config=options)
    assert "s_aux: attn_implementation='learned_sink' needs one sink logit a head" in next(iter(results.values())).error
    model = model_of("llama", "softpick")
    model.config.output_attentions = True
    results = model.generate_batch([[3]], generation_config=config, continuous_batching_config=options)
    assert "output_attentions: continuous batching" in next(iter(results.values())).error


@needs_pages
@pytest.mark.parametrize("pages", [True, False])
def test_padding_of_graphs(pages):
    """With CUDA graphs there are requests without tokens and, unless there are pages, queries of no request."""
    torch.manual_seed(0)
    lengths, size, heads = [3, 9, 1], 4, 2
    key_pages, value_pages = torch.randn(7, size, heads, 8), torch.randn(7, size, heads, 8)
    before = key_pages.clone(), value_pages.clone()
    # the request of one token writes where a padding's page -1 would land: at the start of page 0
    table = torch.tensor([[1, -1, -1], [2, 5, 3], [0, -1, -1], [-1, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    queries = torch.randn(1, 4, 5, 8)
    new = torch.randn(2, 1, heads, 5, 8)
    keys, values = [], []
    for i, length in enumerate(lengths):
        for found, cache, x in zip((keys, values), before, new, strict=True):
            past = cache[table[i].clamp(min=0).long()].flatten(0, 1)[: length - 1]
            found.append(torch.cat([past, x[0, :, i][None]]))
    offsets_k = torch.tensor([0, 3, 12, 13, 13, 13], dtype=torch.int32)
    given = {"read_index": [], "write_index": [], "block_table": None, "max_length_k": 9}
    if pages:
        given |= {"block_table": table, "k_cache": key_pages, "v_cache": value_pages}
        q, k, v = queries, *new
    else:
        q, k, v = queries[:, :, :3], *(torch.cat(x).transpose(0, 1)[None] for x in (keys, values))
    out = transformers_serving.attend_paged(
        torch.nn.Module(), q, k, v, given, cu_seq_lens_q=torch.tensor([0, 1, 2, 3, 3, 3], dtype=torch.int32),
        cu_seq_lens_k=offsets_k, max_length_q=5, scaling=None, normalizer=softpick.get_normalizer("softpick"),
        softcap=None, sink=None, sliding_window=4, score_scale=torch.tensor([1.0, 2.0, 0.5, 1.0]), output_gate=None,
    )  # fmt: skip
    for i, length in enumerate(lengths):
        scale = torch.tensor([1.0, 2.0, 0.5, 1.0]).view(-1, 1, 1) * torch.tensor(float(min(length, 4))).log()
        expected = softpick.scaled_dot_product_attention(
            queries[0, :, i : i + 1] * scale, keys[i].transpose(0, 1)[:, -4:], values[i].transpose(0, 1)[:, -4:],
            enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(out[0, i], expected[:, 0])
    if pages:
        changed = (key_pages != before[0]).any(-1).any(-1).nonzero().tolist()
        assert sorted(changed) == [[0, 0], [1, 2], [3, 0]]  # the new tokens, and nothing for padding
