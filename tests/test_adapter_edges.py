"""The attention function that transformers calls, at the edges of its documentation."""

import pytest
import torch
from oracle import attention as oracle

st = pytest.importorskip("softpick.integrations.transformers")


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
