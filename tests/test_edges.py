"""Attention at the edges of what its documentation says, against fp64 formulas: what a slightly wrong line would change."""

import functools
import itertools
import math

import formula
import pytest
import torch
from oracle import attention as oracle

from softpick import NORMALIZERS, scaled_dot_product_attention, softpick, varlen_attention
from softpick.ops import cpu

NAMES = list(NORMALIZERS)
BACKENDS = ["reference", "tiled"]


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def sink_of(name, heads, dtype=torch.float64):
    return draw(heads, dtype=dtype) if NORMALIZERS[name].needs_sink else None


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    "missing", ["batch", "heads", "queries", "keys", "width", "values", "keys values", "width values"]
)
def test_a_size_of_zero(backend, missing):
    """Shapes of nothing: outputs, statistics and gradients have theirs, and are 0 where there is no key."""
    sizes = {"batch": 2, "heads": 3, "queries": 5, "keys": 4, "width": 6, "values": 7} | dict.fromkeys(
        missing.split(), 0
    )
    b, h, tq, tk, d, dv = sizes.values()
    leaves = [draw(*shape).requires_grad_() for shape in ((b, h, tq, d), (b, h, tk, d), (b, h, tk, dv))]
    for options in ({}, {"is_causal": True}):
        found = scaled_dot_product_attention(*leaves, backend=backend, scale=1.0, return_stats=True, **options)
        assert found.output.shape == (b, h, tq, dv)
        assert found.lse.shape == (b, h, tq)
        torch.testing.assert_close(found.output, torch.zeros(b, h, tq, dv, dtype=torch.float64))
        grads = torch.autograd.grad(found.output.sum(), leaves)
        assert all(grad.shape == x.shape and (grad == 0).all() for grad, x in zip(grads, leaves, strict=True))
    if not b:
        return
    cu_q, cu_k = torch.tensor([0, 0, tq]), torch.tensor([0, 0, tk])
    packed = [x[0].transpose(0, 1) for x in leaves]
    assert (varlen_attention(*packed, cu_q, cu_k, backend=backend, scale=1.0) == torch.zeros(tq, h, dv)).all()


# --------------------------------------------------------------------------------------- who sees whom, at any lengths


WINDOWS = (None, 1, 2, (0, 1), (2, 0), (-1, 1), (1, -1))


@pytest.mark.parametrize("name", ["softmax", "softpick"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", *BACKENDS])
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (1, 3), (3, 1), (2, 5), (5, 2), (4, 4)])
def test_every_pattern_at_every_length(name, backend, tq, tk):
    q, k, v = draw(1, 2, tq, 4), draw(1, 2, tk, 4), draw(1, 2, tk, 3)
    for causal, alignment, window in itertools.product((False, True), ("top_left", "bottom_right"), WINDOWS):
        options = {"is_causal": causal, "causal_alignment": alignment, "window": window}
        call = functools.partial(scaled_dot_product_attention, q, k, v, backend=backend, normalizer=name, **options)
        plain = name == "softmax" and (
            window is None or (causal and window == (-1, 1))
        )  # which causality makes (-1, 0)
        if backend == "sdpa" and not (plain and (not causal or alignment == "top_left" or tq == tk)):
            with pytest.raises(ValueError, match="backend: 'sdpa'"):
                call()
            continue
        left, right = (window - 1, window - 1) if isinstance(window, int) else window or (-1, -1)
        behind = torch.arange(tq)[:, None] + (tk - tq if alignment == "bottom_right" else 0) - torch.arange(tk)
        seen = torch.ones(tq, tk, dtype=torch.bool)
        seen &= behind >= 0 if causal else seen
        seen &= behind <= left if left >= 0 else seen
        seen &= behind >= -right if right >= 0 else seen
        want, _ = oracle(q, k, v, name, mask=seen)
        torch.testing.assert_close(call(), want, msg=lambda text, options=options: f"{options}: {text}")


@pytest.mark.parametrize("heads", [(6, 2, 3), (6, 3, 2), (6, 1, 3), (6, 6, 2), (12, 4, 6), (4, 1, 4), (3, 3, 3)])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["softmax", "softpick"])
@pytest.mark.parametrize("packed", [False, True])
def test_keys_and_values_with_numbers_of_heads_of_their_own(heads, backend, name, packed):
    """Query head ``h`` of ``H`` has key head ``h Hk / H`` and value head ``h Hv / H``."""
    h, hk, hv = heads
    q, k, v = draw(1, h, 5, 4), draw(1, hk, 5, 4), draw(1, hv, 5, 3)
    head = torch.arange(h)
    want, _ = oracle(q, k[:, head * hk // h], v[:, head * hv // h], name)
    if packed:
        flat = [x[0].transpose(0, 1) for x in (q, k, v)]
        cu = torch.tensor([0, 5], dtype=torch.int32)
        got = varlen_attention(*flat, cu, cu, normalizer=name, backend=backend).transpose(0, 1)[None]
    else:
        got = scaled_dot_product_attention(q, k, v, enable_gqa=True, normalizer=name, backend=backend)
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------------ additive masks

LOWEST = {str(t).removeprefix("torch."): torch.finfo(t).min for t in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "mask_dtype", "low"),
    [
        *((torch.float32, torch.float32, low) for low in (*LOWEST.values(), -math.inf)),
        *((torch.bfloat16, torch.float32, low) for low in LOWEST.values()),
        (torch.bfloat16, torch.bfloat16, LOWEST["bfloat16"]),
        (torch.float16, torch.float16, torch.finfo(torch.float16).min),
        (torch.float64, torch.float32, LOWEST["bfloat16"]),
    ],
    ids=str,
)
def test_the_lowest_number_of_a_dtype_excludes(name, backend, dtype, mask_dtype, low):
    """Also where a mask of a narrow dtype was cast to a wide one on its way; a finite bias beside it is added."""
    q, k, v = (draw(1, 2, 4, 8, dtype=dtype) for _ in range(3))
    sink = sink_of(name, 2, dtype)
    keep = torch.tensor([True, False, True, False])
    bias = torch.tensor([0.0, 0.0, -3.0, 0.0])
    mask = torch.where(keep, bias, low).to(mask_dtype).expand(4, 4)
    want, _ = oracle(q[:, :, :], k[:, :, keep], v[:, :, keep], name, mask=bias[keep].double().expand(4, 2), sink=sink)
    got = scaled_dot_product_attention(q, k, v, mask, normalizer=name, backend=backend, sink=sink)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=max(tolerance, 2e-6))


# ---------------------------------------------------------------------------------------------- gradients at zero scores

# f' and g' at a score of 0: softpick's step(0) = 0 and sign(0) = +1, paper eq. (7); rectified keeps s >= 0
AT_ZERO = {
    "softpick": (0.0, 1.0),
    "softpick_stop_gradient": (0.0, 0.0),
    "relu_softpick": (0.0, 0.0),
}


def row_gradient(s, dp, name, sink):
    """Gradient of one row's scores, written out: ds = (f' dp - g' D) / l, D = sum f dp / l."""
    row = formula.weights(NORMALIZERS[name], s, torch.ones_like(s, dtype=torch.bool), sink)
    f, _, df, dg = row.functions
    zero, decay = s == 0, torch.exp(-row.m)
    assert torch.equal(df[zero], (AT_ZERO.get(name, (1.0, 1.0))[0] * decay).expand_as(df[zero]))
    assert torch.equal(dg[zero], (AT_ZERO.get(name, (1.0, 1.0))[1] * decay).expand_as(dg[zero]))
    return (df * dp - dg * (f * dp).sum() / row.total) / row.total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "scores", [[0.0, 1.0, -1.0], [0.0, 0.0, 2.0, 0.5], [1.0, 0.0], [0.0, 30.0, -30.0], [0.0, 0.001, -0.001]], ids=str
)
def test_gradient_where_a_score_is_exactly_zero(name, backend, scores):
    s, dp = torch.tensor(scores, dtype=torch.float64), draw(len(scores))
    sink = sink_of(name, 1)
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k, v = s.view(1, 1, -1, 1).clone().requires_grad_(), dp.view(1, 1, -1, 1)
    out = scaled_dot_product_attention(q, k, v, scale=1.0, normalizer=name, backend=backend, sink=sink)
    (got,) = torch.autograd.grad(out.sum(), k)
    want = row_gradient(s, dp, name, None if sink is None else sink[0])
    torch.testing.assert_close(got.flatten(), want)
    if name == "softpick":
        x = s.clone().requires_grad_()
        (got,) = torch.autograd.grad((softpick(x) * dp).sum(), x)
        torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------------- extreme scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("sink", [math.inf, -math.inf])
def test_an_infinite_sink_takes_all_or_nothing(sink, backend, dtype):
    q, k, v = (draw(1, 2, n, 4) for n in (5, 7, 7))
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, torch.tensor([sink, 0.5]))]
    out = scaled_dot_product_attention(*leaves[:3], normalizer="learned_sink", sink=leaves[3], backend=backend)
    plain = scaled_dot_product_attention(*(x.detach() for x in leaves[:3]), normalizer="softmax", backend="reference")
    want = torch.zeros_like(plain) if sink > 0 else plain
    torch.testing.assert_close(out[:, 0], want[:, 0], rtol=1e-4, atol=1e-5)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("sink", [-1000.0, -100.0, 0.0, 60.0, 100.0, 1000.0])
@pytest.mark.parametrize("scores", [0.0, -200.0, 90.0])
def test_a_sink_of_any_size(backend, dtype, sink, scores):
    """Output, lse and all gradients are those of softmax over one more score; a row without keys has the sink alone."""
    q, k, v = draw(1, 2, 5, 4), draw(1, 2, 7, 4), draw(1, 2, 7, 3)
    q[..., 0], k[..., 0] = scores, 1.0
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[4] = False
    logits = torch.tensor([sink, 0.5])
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, logits)]
    truth = [x.detach().double().requires_grad_() for x in leaves]
    got = scaled_dot_product_attention(
        *leaves[:3], mask, scale=1.0, normalizer="learned_sink", sink=leaves[3], backend=backend, return_stats=True
    )
    row = (truth[0] @ truth[1].transpose(2, 3)).masked_fill(~mask, -math.inf)
    row = torch.cat([row, truth[3].view(1, 2, 1, 1).expand(1, 2, 5, 1)], -1)
    want = torch.softmax(row, -1)[..., :-1] @ truth[2]
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(got.output.double(), want, **tolerance)
    torch.testing.assert_close(got.lse.double(), torch.logsumexp(row, -1), rtol=1e-6, atol=tolerance["atol"])
    grad = draw(*want.shape)
    for one, other in zip(
        torch.autograd.grad(got.output, leaves, grad.to(dtype)), torch.autograd.grad(want, truth, grad), strict=True
    ):
        torch.testing.assert_close(one.double(), other, **tolerance)


def log_denominator(s, name, sink=None):
    """Log of the denominator of each row of scores, its constant and eps included."""
    logit = None if sink is None else sink.double().view(1, -1, 1, 1)
    row = formula.weights(NORMALIZERS[name], s, torch.ones_like(s, dtype=torch.bool), logit)
    return (row.m + torch.log(row.total))[..., 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [-1000.0, -200.0, -88.0, -64.0, -40.0, 40.0, 64.0, 88.0, 200.0, 1000.0])
@pytest.mark.parametrize("lone", [False, True])
def test_all_scores_near_one_level_in_fp32(name, backend, level, lone):
    """Every score of a row is the level and a little: all rows alike, or one such row among common ones."""
    if not NORMALIZERS[name].exponential and lone:
        pytest.skip("nothing in it depends on a level")
    q, k, v = draw(1, 1, 6, 4).mul(8).round().div(8), draw(1, 1, 40, 4).mul(8).round().div(8), draw(1, 1, 40, 3)
    k[..., 0] = 1.0  # all numbers are multiples of 1/64: scores are exact in fp32
    q[..., 0] = level
    if lone:
        q[:, :, 1:, 0] = 0.5 + 1 / 128  # no score is 0, where the oracle has another gradient
    sink = sink_of(name, 1, torch.float32)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    truth = [x.detach().double().requires_grad_() for x in leaves]
    got = scaled_dot_product_attention(
        *leaves, scale=1.0, normalizer=name, sink=sink, backend=backend, return_stats=True
    )
    want, weights = oracle(*truth, name, scale=1.0, sink=sink)
    torch.testing.assert_close(got.output.double(), want, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got.row_mass.double(), weights.sum(-1), rtol=1e-3, atol=1e-6)
    scores = truth[0] @ truth[1].transpose(2, 3)
    torch.testing.assert_close(got.max_score.double(), scores.amax(-1), rtol=1e-5, atol=1e-5)
    denominator = log_denominator(scores, name, sink)
    torch.testing.assert_close(got.lse.double(), denominator, rtol=1e-5, atol=1e-5)
    grad = draw(*want.shape)
    grads = torch.autograd.grad(got.output, leaves, grad.float())
    for one, other in zip(grads, torch.autograd.grad(want, truth, grad), strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() <= 2e-3 * other.norm() + 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("levels", [*itertools.permutations((-300.0, 0.0, 300.0)), (-300.0, -40.0, -10.0)], ids=str)
def test_tiles_of_different_levels(name, levels, monkeypatch):
    """What was accumulated at one level meets scores of another, in fp32: each tile of keys has its own."""
    for constant, size in (("BLOCK_Q", 4), ("BLOCK_K", 6), ("TILE_SCORES", 1)):
        monkeypatch.setattr(cpu, constant, size)
    q, k, v = draw(1, 1, 6, 4).mul(8).round().div(8), draw(1, 1, 18, 4).mul(8).round().div(8), draw(1, 1, 18, 3)
    q[..., 0], k[..., 0] = 1.0, torch.tensor(levels).repeat_interleave(6)
    sink = sink_of(name, 1, torch.float32)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    truth = [x.detach().double().requires_grad_() for x in leaves]
    got = scaled_dot_product_attention(*leaves, scale=1.0, normalizer=name, sink=sink, backend="tiled")
    want, _ = oracle(*truth, name, scale=1.0, sink=sink)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6)
    grad = draw(*want.shape)
    grads = torch.autograd.grad(got, leaves, grad.float())
    for one, other in zip(grads, torch.autograd.grad(want, truth, grad), strict=True):
        assert (one.double() - other).norm() <= 2e-3 * other.norm() + 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["tiny first", "large first"])
@pytest.mark.parametrize(("level", "large"), [(1e-4, 3.0), (1e-4, 20.0), (1e-2, 20.0)])
def test_tiny_and_large_rows_side_by_side(name, backend, order, level, large):
    """Rows of scores far below 1 stay accurate next to rows of large scores: each row's output, and dv of the tiny ones."""
    q, k, v = draw(1, 1, 8, 16), draw(1, 1, 50, 16), draw(1, 1, 50, 5)
    tiny = torch.arange(8) < 4 if order == "tiny first" else torch.arange(8) >= 4
    q[:, :, tiny] *= level
    q[:, :, ~tiny] *= large
    sink = sink_of(name, 1, torch.float32)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    truth = [x.detach().double().requires_grad_() for x in leaves]
    got = scaled_dot_product_attention(*leaves, normalizer=name, sink=sink, backend=backend)
    want, _ = oracle(*truth, name, sink=sink)
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() < 1e-4, error
    grad = draw(*want.shape)
    grad[:, :, ~tiny] = 0.0
    grads = torch.autograd.grad(got, leaves, grad.float())
    for one, other in zip(grads, torch.autograd.grad(want, truth, grad), strict=True):
        assert (one.double() - other).norm() <= 1e-3 * other.norm()


# ------------------------------------------------------------------------------------------------------------- dropout


def kept(weights):
    """Rows of +1 (kept) and -1 (dropped); no weight of softmax is zero by itself."""
    return torch.where(weights > 0, 1.0, -1.0).flatten(0, -2)


def assert_independent(rows):
    """No two rows, and no two parts of rows, were dropped by one pattern (six standard deviations)."""
    for width in (rows.shape[1], rows.shape[1] // 2):
        parts = rows.unflatten(1, (-1, width)).flatten(0, 1)
        alike = (parts @ parts.T / width).fill_diagonal_(0.0)
        assert float(alike.abs().max()) < 6.5 / math.sqrt(width)
    assert abs(float(rows.mean())) < 6.5 / math.sqrt(rows.numel())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "tq"), [(5, 1, 1, 128), (2, 3, 3, 128), (1, 4, 2, 128), (2, 1, 1, 600)], ids=str
)
def test_dropout_is_independent_everywhere(backend, batch, heads, key_heads, tq):
    """Samples, heads, queries and keys, over shapes that cross the tiles in each of these directions."""
    tk = 1024
    q, k = torch.zeros(batch, heads, tq, 2), torch.zeros(batch, key_heads, tk, 2)
    v = torch.eye(tk).expand(batch, key_heads, tk, tk)
    out = scaled_dot_product_attention(
        q, k, v, dropout_p=0.5, normalizer="softmax", backend=backend, enable_gqa=True, return_stats=True
    )
    assert_independent(kept(out.output))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_independent_in_packed_sequences(backend):
    lengths = [256, 256, 256, 256]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k = torch.zeros(1024, 2, 2), torch.zeros(1024, 2, 2)
    v = torch.eye(256).repeat(4, 1)[:, None].expand(1024, 2, 256)
    out = varlen_attention(q, k, v, cu, cu, dropout_p=0.5, normalizer="softmax", backend=backend)
    assert_independent(kept(out.transpose(0, 1)))
