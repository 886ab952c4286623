"""The attention function that transformers calls, at the edges of its documentation."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from oracle import attention as oracle

st = pytest.importorskip("softpick.integrations.transformers")

from softpick.integrations import transformers_packing  # noqa: E402


class Layer(torch.nn.Module):
    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def qkv(t=7, batch=1):
    return torch.randn(batch, 4, t, 8), torch.randn(batch, 2, t, 8), torch.randn(batch, 2, t, 8)


@pytest.mark.parametrize("name", ["softmax", "softpick"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "extra", [{}, {"output_attentions": True}, {"softcap": 1.5, "scaling": 0.7}, {"max_length_q": 4}]
)
def test_packed_sequences_see_themselves_only(name, causal, batch, extra):
    """Of decoders and of encoders, whose sequences are seen whole."""
    q, k, v = qkv(batch=batch)
    offsets = torch.tensor([0, 3, 7, 11, 14][: 1 + 2 * batch], dtype=torch.int32)
    sequence = torch.bucketize(torch.arange(7 * batch), offsets, right=True).view(batch, 1, 7)
    seen = sequence[..., :, None] == sequence[..., None, :]
    seen = seen.tril() if causal else seen
    options = {"softcap": extra.get("softcap"), "scale": extra.get("scaling")}
    want, weights = oracle(q, k, v, name, mask=seen, **options)
    for layer, how in ((Layer(causal), {}), (Layer(not causal), {"is_causal": causal})):
        out, got = st.attention_forward(
            layer, q, k, v, None, normalizer=name, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, **how, **extra
        )
        torch.testing.assert_close(out, want.transpose(1, 2).float(), rtol=1e-4, atol=1e-5)
        assert (got is None) == ("output_attentions" not in extra)
        if got is not None:
            torch.testing.assert_close(got, weights.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [("q",), ("k",)])
def test_offsets_come_in_pairs(given):
    q, k, v = qkv()
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    for causal in (True, False):
        with pytest.raises(ValueError, match="cu_seq_lens_q, cu_seq_lens_k: expected both"):
            st.attention_forward(Layer(causal), q, k, v, None, **{f"cu_seq_lens_{x}": offsets for x in given})


@pytest.mark.parametrize("bounds", [[0, 3, 5], [1, 7], [0, 7, 3], [0, 9]])
@pytest.mark.parametrize("scaled", [False, True])
def test_offsets_that_are_none_of_these_tokens(scaled, bounds):
    q, k, v = qkv()
    cu = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected offsets that rise from 0 to the total of 7 positions, got"):
        st.attention_forward(
            Layer(), q, k, v, None, cu_seq_lens_q=cu, cu_seq_lens_k=cu, score_scale=torch.ones(4) if scaled else None
        )


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gate_multiplies(gate, packed):
    q, k, v = qkv()
    offsets = torch.tensor([0, 7], dtype=torch.int32)
    more = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets} if packed else {}
    factor = torch.randn(1, 7, 4, 8)
    want, _ = oracle(q, k, v, "softpick", causal="top_left")
    want = want.transpose(1, 2).float() * (torch.sigmoid(factor) if gate else 1.0)
    out, _ = st.attention_forward(Layer(), q, k, v, None, output_gate=factor if gate else None, **more)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


LOW = torch.finfo(torch.float32).min


def close(got, want):
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def sizes(tq, tk):
    q, _, _ = qkv(tq, batch=2)
    _, k, v = qkv(tk, batch=2)
    return q, k, v


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("tk", [2, 3, 9, 12])
@pytest.mark.parametrize("tq", [1, 2, 9])
@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask(causal, tq, tk, weights):
    """One query sees every key, more of them keys up to their own, also the first two: of numbers around that of features."""
    q, k, v = sizes(tq, tk)
    want, a = oracle(q, k, v, "softpick", causal="top_left" if causal and tq > 1 else None)
    out, got = st.attention_forward(Layer(causal), q, k, v, None, output_attentions=weights)
    close(out, want.transpose(1, 2))
    if weights:
        close(got, a)


@pytest.mark.parametrize("tq", [2, 9])
@pytest.mark.parametrize("tk", [9, 12])
@pytest.mark.parametrize("biased", [False, True])
def test_what_a_static_cache_has_not_written_is_not_read(biased, tk, tq):
    q, k, v = sizes(tq, tk)
    want, _ = oracle(q, k, v, "softpick", causal="top_left")
    k[:, :, tq:], v[:, :, tq:] = float("nan"), float("nan")
    bias = torch.zeros(1, 4, tq, tk) if biased else None
    out, _ = st.attention_forward(Layer(), q, k, v, None, position_bias=bias)
    close(out, want.transpose(1, 2))


class Config:
    pass


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_count_only_without_a_mask(causal, masked, leaves, monkeypatch):
    """And where a model leaves them to its layers; a mask has them in it. A single query sees the whole cache."""
    if leaves:
        monkeypatch.setitem(st.WITH_WINDOWS, Config, True)
    layer = Layer(causal)
    layer.config = Config()
    for tq, tk, tokens in ((1, 5, 2), (2, 2, 1), (5, 5, 1), (5, 5, 2), (5, 5, 3), (5, 5, None)):
        q, k, v = sizes(tq, tk)
        window = {"left": -1}
        if leaves and not masked and tq > 1 and tokens:
            window = {"left": tokens - 1, "right": 0 if causal else tokens - 1}
        given = torch.ones(1, 1, tq, tk).bool() if masked else None
        want, _ = oracle(q, k, v, "softmax", causal="top_left" if causal and tq > 1 and not masked else None, **window)
        for weights in (False, True):
            options = {"normalizer": "softmax", "output_attentions": weights}
            out, _ = st.attention_forward(layer, q, k, v, given, sliding_window=tokens, **options)
            close(out, want.transpose(1, 2))


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("weights", [False, True])
def test_windows_of_packed_sequences(causal, weights, tokens):
    """Also of two tokens in all, and of one token each."""
    for t, bounds in ((2, [0, 2]), (2, [0, 1, 2]), (7, [0, 4, 7])):
        q, k, v = qkv(t)
        cu = torch.tensor(bounds, dtype=torch.int32)
        given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "sliding_window": tokens, "output_attentions": weights}
        out, _ = st.attention_forward(Layer(causal), q, k, v, None, **given)
        for a, b in pairwise(bounds):
            part = (x[:, :, a:b] for x in (q, k, v))
            how = {"causal": "top_left" if causal else None, "left": tokens - 1, "right": tokens - 1}
            close(out[:, a:b], oracle(*part, "softpick", **how)[0].transpose(1, 2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_is_added_to_the_scores(causal, kind, packed):
    """Beside any mask and to packed sequences, from another dtype, and it gets a gradient."""
    q, k, v = qkv(batch=2)
    bias = torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    keep, added = torch.rand(2, 1, 7, 7) < 0.7, torch.randn(2, 1, 7, 7)
    mask = {"none": None, "boolean": keep, "additive": torch.where(keep, added, LOW)}[kind]
    seen = torch.ones(2, 1, 7, 7).bool() if kind != "none" or not causal else torch.ones(2, 1, 7, 7).bool().tril()
    seen = seen if kind == "none" else keep
    more = {}
    if packed:
        cu = torch.tensor([0, 3, 7, 9, 14], dtype=torch.int32)
        sequence = torch.bucketize(torch.arange(14), cu, right=True).view(2, 1, 7)
        seen = seen & (sequence[..., :, None] == sequence[..., None, :])
        more = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    scores = bias.detach().float() + (added if kind == "additive" else 0)
    want, a = oracle(q, k, v, "softpick", mask=torch.where(seen, scores, LOW))
    for weights in (False, True):
        out, got = st.attention_forward(
            Layer(causal), q, k, v, mask, position_bias=bias, output_attentions=weights, **more
        )
        close(out, want.transpose(1, 2))
        if weights:
            close(got, a)
    out.sum().backward()
    assert bias.grad.abs().sum() > 0


@pytest.mark.parametrize("given", ["offsets", "positions"])
@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_packed_sequences(additive, given):
    """A mask stands, less what is of another sequence."""
    q, k, v = qkv()
    keep = torch.rand(1, 1, 7, 7) < 0.7
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    more = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    if given == "positions":
        more = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    same = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()
    want, _ = oracle(q, k, v, "softpick", mask=keep & same)
    out, _ = st.attention_forward(Layer(), q, k, v, torch.where(keep, 0.0, LOW) if additive else keep, **more)
    close(out, want.transpose(1, 2))


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_fewer_dimensions(causal, dims):
    q, k, v = qkv(batch=2)
    keep = (torch.rand(2, 4, 7, 7) < 0.7)[(0,) * (4 - dims)]
    for given in (keep, torch.where(keep, 0.0, LOW)):
        want, _ = oracle(q, k, v, "softpick", mask=keep.expand(2, 4, 7, 7))
        close(st.attention_forward(Layer(causal), q, k, v, given)[0], want.transpose(1, 2))
    with pytest.raises(ValueError, match=r"^attn_mask: expected a shape that broadcasts"):
        st.attention_forward(Layer(causal), q, k, v, keep[(0,) * (dims - 1)])


@pytest.mark.parametrize("tokens", [None, 1, 3])
@pytest.mark.parametrize("how", ["whole", "packed", "packed with weights"])
@pytest.mark.parametrize("causal", [True, False])
def test_scores_scaled_by_the_number_of_keys(causal, how, tokens, monkeypatch):
    """Counted one by one: of cross-attention, of a window, of packed sequences."""
    monkeypatch.setitem(st.WITH_WINDOWS, Config, True)
    layer, scale = Layer(causal), torch.tensor([0.5, 1.0, -0.3, 2.0])
    layer.config = Config()
    bounds = [0, 5, 6, 12]
    cu = torch.tensor(bounds, dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "output_attentions": "weights" in how}
    for tq, tk in ((12, 12),) if how != "whole" or tokens else ((12, 12), (3, 9), (9, 3)):
        q, k, v = qkv(tq)
        _, k, v = qkv(tk)
        row = [sum(b <= i for b in bounds) for i in range(12)]
        seen = torch.zeros(tq, tk).bool()
        for i in range(tq):
            for j in range(tk):
                near = tokens is None or (i - tokens < j < i + tokens)
                seen[i, j] = near and (not causal or j <= i) and (how == "whole" or row[i] == row[j])
        n = seen.sum(-1).clamp(min=1).log()
        want, _ = oracle(q * scale.view(4, 1, 1) * n[:, None], k, v, "softpick", mask=seen)
        more = {} if how == "whole" else packed
        out, _ = st.attention_forward(layer, q, k, v, None, score_scale=scale, sliding_window=tokens, **more)
        close(out, want.transpose(1, 2))


def test_weights_have_the_dtype_of_the_queries():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.to(dtype) for x in qkv())
        out, weights = st.attention_forward(Layer(), q, k, v, None, output_attentions=True)
        assert out.dtype == weights.dtype == dtype


def test_a_layer_that_gets_no_offsets_of_its_model(monkeypatch):
    """Two queries could be two sequences, one query could not."""
    monkeypatch.setattr(transformers_packing._running, "given", True, raising=False)
    for t in (2, 3):
        with pytest.raises(ValueError, match="cu_seq_lens_q: the model does not hand it on to Layer"):
            st.attention_forward(Layer(), *qkv(t), None)
    q, k, v = sizes(1, 5)
    for keys in (1, 5):
        assert st.attention_forward(Layer(), q, k[:, :, :keys], v[:, :, :keys], None)[0].isfinite().all()
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert st.attention_forward(Layer(), *qkv(), None, cu_seq_lens_q=cu, cu_seq_lens_k=cu)[0].isfinite().all()
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        with pytest.raises(ValueError, match=r"^cu_seq_lens_q, cu_seq_lens_k: expected both"):
            st.attention_forward(Layer(), *qkv(), None, **{name: cu})


def test_a_layer_that_looks_both_ways_where_positions_pack(monkeypatch):
    """Of as many queries as keys, and as there are positions."""
    starts = torch.tensor([[True, False, False, True, False, False, False]])
    monkeypatch.setattr(transformers_packing._running, "starts", starts, raising=False)
    with pytest.raises(ValueError, match="position_ids: start again at 0, which packs sequences, and Layer looks both"):
        st.attention_forward(Layer(False), *qkv(), None)
    for q, k, v in (sizes(7, 8), sizes(8, 7), sizes(8, 8)):
        assert st.attention_forward(Layer(False), q, k, v, None)[0].isfinite().all()
    assert st.attention_forward(Layer(), *qkv(), None)[0].isfinite().all()
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert st.attention_forward(Layer(False), *qkv(), None, cu_seq_lens_q=cu, cu_seq_lens_k=cu)[0].isfinite().all()
    monkeypatch.setattr(transformers_packing._running, "starts", torch.ones(1, 1).bool(), raising=False)
    assert st.attention_forward(Layer(False), *qkv(1), None)[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Continuous batching


class Cache:
    """Hands back the keys and values that it is given, as if it had held all but the last of them."""

    def update(self, key_states, value_states, layer_idx, kwargs=None, **where):
        assert layer_idx == 3
        if kwargs is not None:
            return key_states, value_states
        assert set(where) == {"read_index", "write_index"}  # up to transformers 5.18
        return key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)


def paged(**more):
    names = ("max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k")
    given = {"read_index": [], "write_index": [], "cache": Cache(), "block_table": None, **dict.fromkeys(names, 5)}
    given |= {"cu_seq_lens_q": torch.tensor([0, 1, 6], dtype=torch.int32)}
    return given | {"cu_seq_lens_k": torch.tensor([0, 4, 9], dtype=torch.int32)} | more


@pytest.mark.parametrize("name", ["softpick", "learned_sink"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"sliding_window": 2},
        {"scaling": 0.7, "softcap": 1.5},
        {"score_scale": torch.tensor([0.5, 1.0, -0.3, 2.0])},
        {"output_gate": torch.linspace(-2, 2, 6 * 4 * 8).view(1, 6, 4, 8)},
    ],
)
def test_requests_of_continuous_batching(name, extra):
    """One new token behind three, and a prompt of five: each sees the keys of its own request up to its own."""
    (q, _, _), (_, k, v) = qkv(6), qkv(9)
    sink = torch.randn(4) if name == "learned_sink" else None
    layer = Layer()
    layer.layer_idx = 3
    out, weights = st.attention_forward(layer, q, k, v, None, normalizer=name, s_aux=sink, **paged(), **extra)
    assert weights is None
    window = extra.get("sliding_window", 9)
    for queries, keys in ((slice(0, 1), slice(0, 4)), (slice(1, 6), slice(4, 9))):
        part = q[:, :, queries].double()
        tq, tk = part.shape[2], keys.stop - keys.start
        if "score_scale" in extra:
            n = torch.arange(tk - tq + 1, tk + 1).double()
            part = part * extra["score_scale"].double().view(4, 1, 1) * n.log()[:, None]
        how = {"scale": extra.get("scaling"), "softcap": extra.get("softcap"), "left": window - 1, "sink": sink}
        want, _ = oracle(part, k[:, :, keys], v[:, :, keys], name, causal="bottom_right", **how)
        want = want.transpose(1, 2)
        if "output_gate" in extra:
            want = want * torch.sigmoid(extra["output_gate"][:, queries])
        close(out[:, queries], want)


def test_what_continuous_batching_does_not_take_is_named():
    (q, _, _), (_, k, v) = qkv(6), qkv(9)
    layer = Layer()
    layer.layer_idx = 3
    mask, bias = torch.ones(1, 1, 6, 9).bool(), torch.zeros(1, 4, 6, 9)
    for more, said in (
        ({"position_bias": bias}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": mask}, "attention_mask"),
        ({"attention_mask": mask, "position_bias": bias}, "position_bias, attention_mask"),
    ):
        more = {"attention_mask": None, **more}
        with pytest.raises(
            ValueError, match=rf"^{said}: continuous batching .* but Layer passes it; call model.generate"
        ):
            st.attention_forward(layer, q, k, v, **more, **paged())
    with pytest.raises(
        ValueError, match=r"^sofcap: not supported by attn_implementation='softpick', but Layer passes it"
    ):
        st.attention_forward(layer, q, k, v, None, sofcap=1.0, **paged())
    with pytest.raises(ValueError, match=r"^block_table, k_cache: not supported"):  # nor does anything else take pages
        st.attention_forward(layer, *qkv(), None, block_table=mask, k_cache=k)


# ---------------------------------------------------------------------------------------------------------------------
# Models that record what their layers return


@pytest.mark.parametrize(
    ("recorded", "weights"),
    [
        (None, False),
        ({}, False),
        ({"hidden_states": ()}, False),
        ({"attentions": ()}, True),
        ({"hidden_states": (), "cross_attentions": ()}, True),
    ],
)
def test_weights_are_returned_where_they_are_recorded(recorded, weights, monkeypatch):
    recorder = SimpleNamespace(get=lambda: recorded, global_var={"attentions": ()} if not weights else {})
    monkeypatch.setattr(st.output_capturing, "_active_collector", recorder)
    assert (st.attention_forward(Layer(), *qkv(), None)[1] is not None) == weights
    assert st.attention_forward(Layer(), *qkv(), None, output_attentions=True)[1] is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # where the other one counts
    assert st._attentions_recorded() != weights


def test_a_transformers_without_a_recorder(monkeypatch):
    monkeypatch.delattr(st.output_capturing, "_active_collector")
    assert st.attention_forward(Layer(), *qkv(), None)[1] is None
    assert st.attention_forward(Layer(), *qkv(), None, output_attentions=True)[1] is not None
