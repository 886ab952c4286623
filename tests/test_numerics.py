"""Where floating point bites: additive masks, rows of few keys, huge and tiny scores, signs of zero, ranges of 16 bits."""

import math

import pytest
import torch
from oracle import attention as oracle
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from softpick import NORMALIZERS, scaled_dot_product_attention
from softpick.analysis import calls
from softpick.nn.attention import visible_keys
from softpick.normalizers import EXCLUDED_BIAS, visible
from softpick.ops import cpu_functions

NAMES = list(NORMALIZERS)
BACKENDS = ["auto", "reference", "tiled"]
LOWS = [-1e4, -65504.0, -1e9, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min, -math.inf]
HALF = [torch.bfloat16, torch.float16]


def sink_of(name, heads=2, dtype=torch.float32):
    return torch.zeros(heads, dtype=dtype) if NORMALIZERS[name].needs_sink else None


def qkv(t=5, d=8, dtype=torch.float32, h=2, level=1.0):
    q, k, v = (torch.randn(1, h, t, d) for _ in range(3))
    return [x.to(dtype).requires_grad_() for x in (q * level**0.5, k * level**0.5, v)]


# --------------------------------------------------------------------------------------------------- masks that are added


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_write_masked_excludes(name, backend, low):
    """Also after a cast to the query's dtype, where -1e4 becomes -9984; and a row of nothing else is 0."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = qkv(dtype=dtype)
        seen = torch.rand(5, 5) > 0.5
        seen[1] = False
        options = {"normalizer": name, "backend": backend, "sink": sink_of(name, dtype=dtype)}
        want = scaled_dot_product_attention(q, k, v, seen, **{**options, "backend": "reference"})
        bias = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~seen, low).to(dtype)
        bias.requires_grad_()
        got = scaled_dot_product_attention(q, k, v, bias, **options)
        assert (got[:, :, 1] == 0).all()
        torch.testing.assert_close(
            got, want, rtol=2e-2 if dtype in HALF else 1e-5, atol=2e-2 if dtype in HALF else 1e-5
        )
        grads = torch.autograd.grad(got.float().sum(), (q, k, v, bias))
        assert all(g.isfinite().all() for g in grads)
        assert (grads[3][~seen] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_biases_above_the_bound_are_scores(name, backend):
    """ALiBi at slope 1 over 9000 positions."""
    q, k, v = (x.double() for x in qkv())
    bias = -torch.tensor([0.0, 1.0, 50.0, 9000.0, 9983.0], dtype=torch.float64).expand(5, 5)
    sink = sink_of(name, dtype=torch.float64)
    want, _ = oracle(q, k, v, name, mask=bias, sink=sink)
    got = scaled_dot_product_attention(q, k, v, bias, normalizer=name, backend=backend, sink=sink)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("low", LOWS)
def test_the_bound_is_one_for_all_who_count_keys(low):
    mask = torch.tensor([[0.0, low, -5.0, EXCLUDED_BIAS + 1]])
    assert visible(mask).tolist() == [[True, False, True, True]]
    assert visible(mask.bfloat16().half() if low > -1e5 else mask).sum() == 3 - (
        low > -1e5
    )  # the last one rounds to the bound
    assert visible_keys(1, 4, attn_mask=mask[None, None]).item() == 3
    assert calls.visible is visible


# --------------------------------------------------------------------------------------------------- rows of few keys


@pytest.mark.parametrize("level", [1e-6, 1e-3, 1e-1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["causal", "window", "mask"])
def test_rows_that_see_few_keys(name, dtype, level, how):
    """Errors of rows 0 to 2 of a causal map over the mean row: twice those of torch's softmax, and one roundoff.

    The roundoff is that of a result: where the weight of the only key is not 1, as torch's is, there is something to round.
    """
    leaves = qkv(64, 64, dtype, 4, level)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    grad = torch.randn(1, 4, 64, 64).to(dtype)
    options = {"is_causal": True} if how == "causal" else {"window": (2, 0)}
    if how == "mask":
        options = {"attn_mask": torch.ones(64, 64, dtype=torch.bool).tril()}
    mask = torch.ones(64, 64, dtype=torch.bool).tril().triu(-2 if how == "window" else -64)

    def errors(f, reference):
        out, want = f(*leaves), reference(*exact)
        pairs = [(out, want)]
        pairs += zip(
            torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, exact, grad.double()), strict=True
        )
        found = []
        for x, y in pairs[:3]:  # of keys, all rows that see them count
            mean = y.detach().norm(dim=-1).mean()
            denormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * 8
            error = (x.detach().double() - y.detach())[:, :, :3].norm(dim=-1).mean() - denormal
            found.append(float(error.clamp(min=0) / mean))
        return out, found

    sink = sink_of(name, 4, dtype)
    ours = {**options, "normalizer": name}
    out, got = errors(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, **ours, sink=sink, backend="tiled"),
        lambda q, k, v: scaled_dot_product_attention(
            q, k, v, **ours, sink=None if sink is None else sink.double(), backend="reference"
        ),
    )
    _, budget = errors(lambda q, k, v: torch_attention(q, k, v, mask), lambda q, k, v: torch_attention(q, k, v, mask))
    floor = torch.finfo(dtype).eps * (2 if dtype != torch.float32 else 32)
    assert all(g <= 2 * b + floor for g, b in zip(got, budget, strict=True)), (got, budget)
    if name == "softmax":
        assert torch.equal(out[:, :, 0], leaves[2][:, :, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["softmax", "softpick", "relu_softpick", "rectified"])
def test_one_key_is_its_value(name, dtype):
    """By causality, window, mask, packing or length, to the bit; eps is left out, for it is part of the weight."""
    for level in (1e-2, 1.0, 10.0):
        q, k, v = (x.detach() for x in qkv(70, 16, dtype, 2, level))
        q, k = q.abs(), k.abs()  # positive scores
        eye = torch.eye(70, dtype=torch.bool)
        options = {"normalizer": name, "backend": "tiled", "eps": 0.0}
        assert torch.equal(scaled_dot_product_attention(q, k, v, eye, **options), v)
        assert torch.equal(scaled_dot_product_attention(q, k, v, is_causal=True, window=1, **options), v)
        first = scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        assert torch.equal(first[:, :, 0], v[:, :, 0])
        one = scaled_dot_product_attention(q, k[:, :, :1], v[:, :, :1], **options)
        assert torch.equal(one, v[:, :, :1].expand_as(one))


@pytest.mark.parametrize("dtype", HALF)
def test_one_key_in_a_long_row(dtype):
    """A mask leaves one key of 1500, in whichever tile it lies."""
    q, k, v = (x.detach() for x in qkv(1500, 16, dtype, 1, 0.1))
    at = torch.randint(0, 1500, (1500,))
    mask = torch.zeros(1500, 1500, dtype=torch.bool).scatter(1, at[:, None], True)
    out = scaled_dot_product_attention(q.abs(), k.abs(), v, mask, eps=0.0, backend="tiled")
    assert torch.equal(out, v[:, :, at])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["softmax", "softpick"])
def test_bf16_is_as_good_as_torchs(name, causal):
    leaves = qkv(300, 64, torch.bfloat16, 4)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    grad = torch.randn(1, 4, 300, 64).bfloat16()

    def errors(f, truth):
        out, want = f(*leaves), truth(*exact)
        pairs = [(out, want)]
        pairs += zip(
            torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, exact, grad.double()), strict=True
        )
        return [float((x.detach().double() - y.detach()).norm() / y.detach().norm()) for x, y in pairs]

    options = {"is_causal": causal, "normalizer": name}
    got = errors(
        lambda *x: scaled_dot_product_attention(*x, **options, backend="tiled"),
        lambda *x: scaled_dot_product_attention(*x, **options, backend="reference"),
    )
    budget = errors(lambda *x: torch_attention(*x, is_causal=causal), lambda *x: torch_attention(*x, is_causal=causal))
    factor = 1.15 if causal else 1.4  # products of tiles are rounded to bf16: torch has no bf16 product summed in fp32
    assert got[0] <= factor * budget[0]
    assert all(g <= 1.15 * b for g, b in zip(got[1:], budget[1:], strict=True))


# --------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("size", [1e4, 1e6, 1e12])
@pytest.mark.parametrize("name", [n for n in NAMES if NORMALIZERS[n].exponential])
def test_gradients_of_values_at_large_scores(name, size):
    """The largest score has the weight 1, to the last bit or two, however large it is."""
    q = torch.full((1, 2, 40, 1), 1.7)
    k = torch.rand(1, 2, 40, 1) * 0.1
    k[:, :, 7] = 1.0
    v = torch.randn(1, 2, 40, 4).requires_grad_()
    out = scaled_dot_product_attention(q, k, v, scale=size, normalizer=name, backend="tiled", sink=sink_of(name))
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv[:, :, 7], torch.full_like(dv[:, :, 7], 40.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["softpick", "linear_softpick"])
def test_zeros_of_both_signs_are_one_score(name):
    """33 keys: what a product of rows gives for 0 has either sign, by length."""
    for sign in (1.0, -1.0):
        q = torch.randn(1, 1, 33, 1).abs().requires_grad_()
        k = torch.randn(1, 1, 33, 1)
        k[:, :, ::2] = 0.0 * sign
        k.requires_grad_()
        v, grad = torch.randn(1, 1, 33, 4), torch.randn(1, 1, 33, 4)
        results = []
        for backend in ("reference", "tiled"):
            out = scaled_dot_product_attention(q, k, v, normalizer=name, backend=backend)
            results.append(torch.autograd.grad(out, (q, k), grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_tiles_take_negative_zero_for_zero():
    norm = NORMALIZERS["softpick"]
    s = torch.tensor([[[-0.0, 0.0]]])
    ds = cpu_functions.score_gradient(norm, s, torch.ones_like(s), torch.zeros_like(s), torch.ones(1, 1, 1))
    assert ds.tolist() == [[[-1.0, -1.0]]]


@pytest.mark.parametrize("sink", [2.6e38, 3.4e38, -3.4e38])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_sinks_of_any_size(sink, backend):
    q, k, v = qkv()
    logit = torch.full((2,), sink, requires_grad=True)
    got = scaled_dot_product_attention(
        q, k, v, normalizer="learned_sink", sink=logit, backend=backend, return_stats=True
    )
    want = torch.zeros_like(q) if sink > 0 else torch_attention(q, k, v)
    torch.testing.assert_close(got.output, want)
    if sink > 0:
        torch.testing.assert_close(got.lse, torch.full_like(got.lse, sink))
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.output.sum(), (q, k, v, logit)))


@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
@pytest.mark.parametrize("name", ["softpick", "softpick_stop_gradient", "relu_softpick"])
def test_fp16_gradients_saturate(name, backend):
    """Near zero the gradient of softpick is in the order of 1/l."""
    q, k, v = qkv(4, 8, torch.float16, level=1e-6)
    bias = torch.zeros(4, 4, dtype=torch.float16, requires_grad=True)
    out = scaled_dot_product_attention(q, k, v, bias, normalizer=name, eps=0.0, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v, bias), torch.full_like(out, 100.0))
    assert all(g.isfinite().all() for g in grads)
    assert max(float(g.abs().max()) for g in grads) == torch.finfo(torch.float16).max


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("level", [-60.0, -87.5, -95.0, -103.0, -120.0, -1000.0])
def test_the_sink_of_rows_that_see_no_key(level, backend):
    """More queries than keys, from the bottom right: the first rows have nothing but the sink in their denominator."""
    inputs = [torch.randn(1, 2, t, 4, requires_grad=True) for t in (40, 6, 6)]
    sink = torch.tensor([level, 0.5 * level], requires_grad=True)
    out = scaled_dot_product_attention(
        *inputs, normalizer="learned_sink", sink=sink, window=2, causal_alignment="bottom_right", backend=backend
    )
    assert (out[:, :, :30] == 0).all()
    exact = [x.detach().double().requires_grad_() for x in (*inputs, sink)]
    truth = scaled_dot_product_attention(
        *exact[:3],
        normalizer="learned_sink",
        sink=exact[3],
        window=2,
        causal_alignment="bottom_right",
        backend="reference",
    )
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(out.sum(), (*inputs, sink))
    for one, other in zip(got, torch.autograd.grad(truth.sum(), exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
