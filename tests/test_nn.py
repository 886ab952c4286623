"""Modules: the right formula around the functional, shapes, and that they learn."""

import math

import formula
import pytest
import torch

import softpick
from softpick import NORMALIZERS
from softpick.nn import Attention, LinearSoftpick, SequenceEncoder, Softpick
from softpick.nn.attention import visible_keys


def test_softpick_modules():
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(Softpick(1)(x), softpick.softpick(x, 1))
    torch.testing.assert_close(LinearSoftpick(0)(x), softpick.linear_softpick(x, 0))
    keep = torch.rand(2, 3, 4) > 0.5
    torch.testing.assert_close(Softpick(-1)(x, keep), softpick.softpick(x, where=keep))
    assert repr(Softpick(2)) == "Softpick(dim=2, eps=1e-06)"


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("options", [{}, {"output_gate": True}, {"score_scale": True}, {"window": 3}])
def test_attention_is_its_formula(name, options):
    """Against a plain computation with explicit heads, projections and the function over rows."""
    layer = Attention(12, 4, 2, normalizer=name, is_causal=True, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    got = layer(x)
    outs = []
    for h in range(4):
        q = x @ layer.q_proj.weight[3 * h : 3 * h + 3].T
        k = x @ layer.k_proj.weight[3 * (h // 2) : 3 * (h // 2) + 3].T
        v = x @ layer.v_proj.weight[3 * (h // 2) : 3 * (h // 2) + 3].T
        s = q @ k.transpose(1, 2) / math.sqrt(3)
        i = torch.arange(7)
        if "score_scale" in options:
            s = s * layer.score_scale[h] * torch.log(i[:, None] + 1.0)
        keep = i[:, None] >= i
        if "window" in options:
            keep = keep & (i[:, None] - i < 3)
        sink = layer.sink[h] if NORMALIZERS[name].needs_sink else None
        outs.append(formula.weights(NORMALIZERS[name], s, keep.expand_as(s), sink).a @ v)
    out = torch.cat(outs, -1)
    if "output_gate" in options:
        out = out * torch.sigmoid(x @ layer.gate_proj.weight.T)
    torch.testing.assert_close(got, out @ layer.o_proj.weight.T)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_cross_attention_and_padding():
    layer = Attention(16, 4, score_scale=True)
    x, context = torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    keep = torch.arange(9) < 5
    got = layer(x, context, keep[None, None, None].expand(2, 1, 1, 9))
    torch.testing.assert_close(got, layer(x, context[:, :5]))


def test_visible_keys():
    assert visible_keys(3, 5).tolist() == [5, 5, 5]
    assert visible_keys(3, 5, is_causal=True).tolist() == [1, 2, 3]
    assert visible_keys(3, 5, is_causal=True, bottom_right=True).tolist() == [3, 4, 5]
    mask = torch.tensor([[True, False, True, True, False]]).expand(1, 1, 1, 5)
    assert visible_keys(3, 5, attn_mask=mask, is_causal=True, bottom_right=True).tolist() == [[[2, 3, 3]]]


@pytest.mark.parametrize("name", NORMALIZERS)
def test_sequence_encoder(name):
    model = SequenceEncoder(7, hidden_size=32, num_heads=4, num_layers=2, normalizer=name).eval()
    assert model.output_size == 32
    x = torch.randn(3, 61, 7)  # longer than the window it was prepared for
    y = model(x)
    assert y.shape == (3, 32)
    assert not torch.allclose(model(x[:, 1:]), y)
    assert not torch.allclose(model(x.flip(1)), y)  # positions matter


def test_sequence_encoder_defaults_and_learning():
    """The defaults of the document; and a small one learns a rule that needs attention (recall the first step)."""
    model = SequenceEncoder(5)
    assert (model.output_size, len(model.blocks), model.blocks[0].attention.num_heads) == (256, 6, 4)
    assert model.positions.shape == (60, 256)
    for name in ("softpick", "linear_softpick"):
        torch.manual_seed(0)
        model = SequenceEncoder(4, 32, 4, 2, dropout=0.0, window_size=8, normalizer=name)
        head = torch.nn.Linear(32, 4)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
        for _ in range(150):
            tokens = torch.randint(4, (64, 8))
            loss = torch.nn.functional.cross_entropy(
                head(model(torch.nn.functional.one_hot(tokens, 4).float())), tokens[:, 0]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.2, name
