"""The attention of the vLLM plug-in on batches that the test makes, without vLLM: its base classes stand in as empty ones.

The real vLLM runs it in ``make vllm-test``, on the CPU. Its GPU wheel does not fit onto the GPU machine of the project: there
the class is run by this file.
"""

import sys
import types
from types import SimpleNamespace

import pytest
import torch

import softpick

transformers = pytest.importorskip("transformers")


def _split(common, decode_threshold):
    """What vLLM's ``split_decodes_and_prefills`` gives for a batch in which decodes come first."""
    lengths = common.query_start_loc.diff()
    decodes = int((lengths <= decode_threshold).long().cumprod(0).sum())
    tokens = int(lengths[:decodes].sum())
    return decodes, len(lengths) - decodes, tokens, common.num_actual_tokens - tokens


class _Builder:
    def __class_getitem__(cls, _):
        return cls

    def __init__(self, *_):
        pass


@pytest.fixture(scope="module")
def attention():
    """``softpick.integrations.vllm.attention`` with names of vLLM that hold no code."""
    kinds = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": None},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionBackend": object, "AttentionImpl": _Builder, "AttentionMetadata": object,
            "AttentionMetadataBuilder": _Builder, "AttentionType": SimpleNamespace(DECODER="decoder"),
            "CommonAttentionMetadata": object,
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.utils": {"split_decodes_and_prefills": _split},
        "vllm.v1.kv_cache_interface": {"KVCacheLayout": SimpleNamespace(LBHNC="LBHNC")},
    }  # fmt: skip
    modules = {name: types.ModuleType(name) for name in kinds}
    for name, members in kinds.items():
        vars(modules[name]).update(members)
    before = {name: sys.modules.get(name) for name in [*kinds, "softpick.integrations.vllm.attention"]}
    sys.modules.update(modules)
    sys.modules.pop("softpick.integrations.vllm.attention", None)
    from softpick.integrations.vllm import attention as module

    yield module
    for name, one in before.items():
        sys.modules.pop(name, None)
        if one is not None:
            sys.modules[name] = one


def made(attention, monkeypatch, name, **given):
    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=SimpleNamespace(softpick_normalizer=name)))
    monkeypatch.setattr(attention, "get_current_vllm_config", lambda: config)
    return attention.Impl(4, 16, 0.3, 2, **given)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZE = 8  # of a page


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("softpick", {}),
        ("softpick", {"sliding_window": 5, "logits_soft_cap": 3.0}),
        ("learned_sink", {}),
        ("relu_softpick", {"sliding_window": 9}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lengths", [[(1, 9), (1, 1), (12, 12), (5, 21)], [(1, 30), (1, 8)], [(7, 7)]])
def test_batches(attention, monkeypatch, device, name, options, lengths):
    """Requests as (new tokens, keys): decodes, a whole prompt, a piece of one; with padding behind, as graphs need it."""
    torch.manual_seed(0)
    impl = made(attention, monkeypatch, name, **options)
    sink = torch.randn(4, device=device) if softpick.NORMALIZERS[name].needs_sink else None
    impl.sinks, impl.score_scale = sink, torch.rand(4, device=device) + 0.5
    starts = torch.tensor([0, *(q for q, _ in lengths)], device=device).cumsum(0).int()
    tokens, requests = int(starts[-1]), len(lengths)
    table = torch.randperm(20, device=device)[: 4 * requests].view(requests, 4).int() + 1
    cache = torch.full((24, 2, SIZE, 32), float("nan"), device=device)
    cache[0] = 0  # where padding points
    key, value = torch.randn(2, requests, 32, 2, 16, device=device).unbind()
    query = torch.randn(tokens + 3, 4, 16, device=device)
    slots, new = [], []
    for i, (q, k) in enumerate(lengths):
        where = table[i, torch.arange(k, device=device) // SIZE].long() * SIZE + torch.arange(k, device=device) % SIZE
        flat = cache.transpose(1, 2).reshape(-1, 2, 32)
        flat[where[: k - q]] = torch.cat([key[i, : k - q], value[i, : k - q]], -1)
        cache = flat.view(24, SIZE, 2, 32).transpose(1, 2).contiguous()
        slots.append(where[k - q :])
        new.append((key[i, k - q : k], value[i, k - q : k]))
    slots = torch.cat([*slots, slots[0].new_full((3,), -1)])
    keys, values = (torch.cat([*(pair[j] for pair in new), torch.randn(3, 2, 16, device=device)]) for j in (0, 1))
    impl.do_kv_cache_update(None, keys, values, cache, slots)
    assert (cache[0] == 0).all()
    common = SimpleNamespace(
        causal=True, num_actual_tokens=tokens, num_reqs=requests, query_start_loc=starts, block_table_tensor=table,
        seq_lens=torch.tensor([k for _, k in lengths], device=device).int(), max_query_len=max(q for q, _ in lengths),
        max_seq_len=max(k for _, k in lengths), seq_lens_cpu_upper_bound=torch.tensor([k for _, k in lengths]),
    )  # fmt: skip
    builder = attention.MetadataBuilder(SimpleNamespace(block_size=SIZE), [], None, device)
    output = torch.full((tokens + 3, 4, 16), 7.0, device=device)
    # without a bound of the lengths more keys are gathered than there are; on the CPU, where the offsets are looked at, vLLM
    # gives the lengths
    for upper in [common.seq_lens_cpu_upper_bound] + [None] * (device == "cuda"):
        common.seq_lens_cpu_upper_bound = upper
        out = impl.forward(None, query, keys, values, cache, builder.build(0, common), output)
        assert out is output
        window = options.get("sliding_window")
        for i, (q, k) in enumerate(lengths):
            part = query[starts[i] : starts[i + 1]]
            seen = torch.arange(k - q + 1, k + 1, device=device).clamp(max=window or k).float()
            part = part * impl.score_scale[:, None] * seen.log()[:, None, None]
            expected = softpick.scaled_dot_product_attention(
                part.transpose(0, 1), key[i, :k].transpose(0, 1), value[i, :k].transpose(0, 1), is_causal=True,
                causal_alignment="bottom_right", scale=0.3, enable_gqa=True, normalizer=name, sink=sink,
                window=None if window is None else (window - 1, 0), softcap=options.get("logits_soft_cap"),
            )  # fmt: skip
            torch.testing.assert_close(out[starts[i] : starts[i + 1]], expected.transpose(0, 1), atol=2e-5, rtol=2e-5)
        assert (out[tokens:] == 7.0).all()


def test_what_is_not_built_is_named(attention, monkeypatch):
    with pytest.raises(NotImplementedError, match="alibi_slopes, kv_cache_dtype: softpick's attention for vLLM"):
        made(attention, monkeypatch, "softpick", alibi_slopes=[1.0], kv_cache_dtype="fp8")
    with pytest.raises(NotImplementedError, match="attn_type"):
        made(attention, monkeypatch, "softpick", attn_type="encoder_only")
    builder = attention.MetadataBuilder(SimpleNamespace(block_size=SIZE), [], None, "cpu")
    with pytest.raises(NotImplementedError, match="not causal"):
        builder.build(0, SimpleNamespace(causal=False))
    impl = made(attention, monkeypatch, "softpick")
    with pytest.raises(NotImplementedError, match="quantized outputs"):
        impl.forward(None, None, None, None, None, None, None, output_scale=torch.ones(1))
    assert (impl.forward(None, None, None, None, None, None, torch.ones(3)) == 0).all()  # while memory is measured
