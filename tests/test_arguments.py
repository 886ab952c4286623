"""What scaled_dot_product_attention and softpick take at the ends of what is allowed, and each refusal's siblings."""

import itertools
import math

import pytest
import torch
from oracle import attention as oracle
from oracle import weights_of_row

import softpick
from softpick import NORMALIZERS, scaled_dot_product_attention

BACKENDS = ["reference", "tiled"]


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------ shapes that broadcast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 300), (1, 9))), ids=str)
def test_a_mask_of_any_shape_that_broadcasts(backend, kind, shape):
    """Each dimension 1 or full, more rows than a tile has; the gradient of an additive mask is summed over what it covers."""
    q, k, v = draw(2, 4, 300, 4), draw(2, 2, 9, 4), draw(2, 2, 9, 3)
    mask = torch.rand(shape) > 0.3 if kind == "bool" else draw(*shape).requires_grad_()
    full = mask.expand(2, 4, 300, 9)
    s = (q @ k.repeat_interleave(2, 1).mT) / 2
    s = s.masked_fill(~full, -math.inf) if kind == "bool" else s + full
    m = s.amax(-1, keepdim=True).clamp(min=0).detach()
    f = torch.exp(s - m) - torch.exp(-m)
    f = torch.where(s == -math.inf, 0.0, f)
    want = f.clamp(min=0) / (f.abs().sum(-1, keepdim=True) + 1e-6) @ v.repeat_interleave(2, 1)
    got = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, backend=backend)
    torch.testing.assert_close(got, want)
    if kind == "float":
        grad = draw(*want.shape)
        (one,), (other,) = torch.autograd.grad(got, mask, grad), torch.autograd.grad(want, mask, grad)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dims", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("mask_dims", [0, 2, 3, 4, 5, 6])
def test_leading_dimensions_of_tensors_masks_and_statistics(backend, dims, mask_dims):
    if mask_dims > dims and not (dims == 2 and mask_dims == 3):
        pytest.skip("no mask of so many dimensions")
    lead = (2, 1, 3, 2)[4 - (dims - 2) :] if dims > 2 else ()
    q, k, v = draw(*lead, 5, 4), draw(*lead, 6, 4), draw(*lead, 6, 3)
    mask = None
    if mask_dims:
        full = (*lead, 5, 6)
        mask = torch.rand((1, *full)[-mask_dims:] if mask_dims > dims else full[-mask_dims:]) > 0.4
        mask[..., 0] = True
    flat = [x.reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v)]
    each = None if mask is None else mask.expand(*lead, 5, 6).reshape(-1, 1, 5, 6) if lead else mask.reshape(1, 1, 5, 6)
    want, weights = oracle(*flat, "softpick", mask=each)
    got = scaled_dot_product_attention(q, k, v, mask, backend=backend, return_stats=True)
    torch.testing.assert_close(got.output, want.reshape(*lead, 5, 3))
    torch.testing.assert_close(got.row_mass, weights.sum(-1).reshape(*lead, 5))
    assert got.lse.shape == got.max_score.shape == (*lead, 5)
    assert got.weights is None
    if backend != "tiled":
        full = scaled_dot_product_attention(q, k, v, mask, backend=backend, return_weights=True)
        torch.testing.assert_close(full.weights, weights.reshape(*lead, 5, 6))
        assert full.lse is full.row_mass is full.max_score is None


# ------------------------------------------------------------------------------------------------------------ refusals

Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 3)


def refusal(error, says, **change):
    return pytest.param(change, error, says, id=f"{says}: {', '.join(change)}")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        *(refusal(TypeError, f"{name}: expected a tensor", **{name: [[1.0]]}) for name in ("query", "key", "value")),
        refusal(TypeError, "key: expected a floating-point", key=K.int()),
        refusal(TypeError, "value: expected a floating-point", value=V.bool()),
        refusal(TypeError, "query: expected a floating-point", query=Q.to(torch.complex64)),
        refusal(TypeError, "value: expected the query's dtype", value=V.double()),
        refusal(ValueError, "key: expected the query's device", key=K.to("meta")),
        refusal(ValueError, "value: expected as many positions", value=V[:, :, :1]),
        refusal(ValueError, "value: expected", value=V[:, :3]),
        refusal(ValueError, "query, key, value: expected leading dimensions", key=K.repeat(2, 1, 1, 1)[:3]),
        refusal(ValueError, "value: expected a divisor of the query's 4 heads", value=V[:, :3], enable_gqa=True),
        refusal(ValueError, "value: expected a divisor of the query's 4 heads", value=V[:, :0], enable_gqa=True),
        refusal(ValueError, "expected a divisor of the query's 4 heads", key=K.repeat(1, 2, 1, 1), enable_gqa=True),
        refusal(ValueError, r"dropout_p: expected a probability in \[0, 1\]", dropout_p=-0.01),
        refusal(ValueError, "window: expected", window=-1),
        refusal(TypeError, "window: expected", window=True),
        refusal(ValueError, "window: expected", window=(1,)),
        refusal(ValueError, "window: expected", window=(-2, 1)),
        refusal(TypeError, "window: expected", window=(1.0, 1)),
        refusal(TypeError, "window: expected", window="all"),
        refusal(ValueError, "softcap: expected", softcap=-2.0),
        refusal(ValueError, "eps: expected", eps=-1e-9),
        refusal(ValueError, "sink: .*needs one logit a head", normalizer="learned_sink"),
        refusal(TypeError, "sink: expected a floating-point", normalizer="learned_sink", sink=torch.zeros(4).int()),
        refusal(ValueError, "sink: expected shape", normalizer="learned_sink", sink=torch.zeros(1, 4)),
        refusal(ValueError, "sink: expected the query's device", normalizer="learned_sink", sink=torch.zeros(4).to("meta")),
        *(refusal(ValueError, "sink: .*has none", normalizer=n, sink=torch.zeros(4)) for n in ("softmax", "softmax_plus_one")),
        *(refusal(ValueError, "attn_mask: expected a shape", attn_mask=torch.ones(shape).bool())
          for shape in ((1,), (4, 6), (5, 4), (3, 5, 6), (3, 1, 5, 6), (2, 3, 5, 6), (1, 2, 4, 5, 6), (1, 1, 1, 5, 6))),
        refusal(TypeError, "attn_mask: expected bool, float32 or", attn_mask=torch.zeros(5, 6, dtype=torch.float16)),
        *(refusal(ValueError, "backend: 'sdpa'", backend="sdpa", normalizer="softmax", **more)
          for more in ({"eps": 1.0}, {"softcap": 1.0}, {"return_stats": True}, {"return_weights": True}, {"window": 2},
                       {"is_causal": True, "attn_mask": torch.ones(5, 6).bool()},
                       {"is_causal": True, "causal_alignment": "bottom_right"})),
        *(refusal(ValueError, "return_weights: the", backend=b, return_weights=True) for b in ("tiled", "triton")),
    ],
)  # fmt: skip
def test_refusals(change, error, says):
    given = {"query": Q, "key": K, "value": V}
    with pytest.raises(error, match=says):
        scaled_dot_product_attention(**(given | change))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("Are heads and positions swapped", {"attn_mask": torch.ones(2, 1, 4, 4).bool()}),
        ("needs a head dimension", {"attn_mask": torch.ones(2, 5, 6).bool()}),
        ("needs head and query dimensions", {"attn_mask": torch.ones(2, 6).bool()}),
        ("For grouped-query attention pass enable_gqa=True", {"key": K[:, :2], "value": V[:, :2]}),
    ],
)
def test_hints(message, change):
    given = {"query": Q, "key": K, "value": V}
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(**(given | change))


def test_hints_are_given_only_where_they_fit():
    for change, wrong in (
        ({"key": K[:, :3], "value": V[:, :3]}, "enable_gqa=True"),
        ({"attn_mask": torch.ones(1, 5, 3).bool()}, "needs a head dimension"),
        ({"attn_mask": torch.ones(4, 5, 3).bool()}, "needs a head dimension"),
        ({"attn_mask": torch.ones(2, 3).bool()}, "needs head and query"),
        ({"attn_mask": torch.ones(3, 6).bool()}, "needs head and query"),
    ):
        with pytest.raises(ValueError, match="expected") as caught:
            scaled_dot_product_attention(**({"query": Q, "key": K, "value": V} | change))
        assert wrong not in str(caught.value)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_ends_of_what_is_allowed(backend):
    """0 and 1 as probabilities, a window of one key, eps 0, the smallest scale, one head for all."""
    call = {"backend": backend}
    base = scaled_dot_product_attention(Q, K, V, **call)
    torch.testing.assert_close(scaled_dot_product_attention(Q, K, V, dropout_p=0.0, window=(-1, -1), **call), base)
    assert (scaled_dot_product_attention(Q, K, V, dropout_p=1.0, **call) == 0).all()
    own = scaled_dot_product_attention(Q, K, V, window=1, normalizer="softmax", **call)
    torch.testing.assert_close(own, V[:, :, :5])
    assert (scaled_dot_product_attention(Q, K, V, scale=0.0, **call) == 0).all()
    torch.testing.assert_close(
        scaled_dot_product_attention(Q, K, V, scale=0.0, normalizer="softmax", **call),
        V.mean(2, keepdim=True).expand(2, 4, 5, 3),
    )
    zero = scaled_dot_product_attention(Q, K, V, eps=0.0, **call).double()
    s = (Q.double() @ K.double().mT) / math.sqrt(8)
    want = torch.expm1(s).clamp(min=0) / torch.expm1(s).abs().sum(-1, keepdim=True) @ V.double()
    torch.testing.assert_close(zero, want, rtol=1e-5, atol=1e-6)
    one = scaled_dot_product_attention(Q, K[:, :1], V[:, :1], **call)
    torch.testing.assert_close(
        one, scaled_dot_product_attention(Q, K[:, :1].expand(-1, 4, -1, -1), V[:, :1].expand(-1, 4, -1, -1))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMALIZERS)
def test_no_head_dimension(backend, name):
    """Scores of no dimensions are 0: softmax averages, softpick is 0."""
    q, k, v = draw(1, 2, 3, 0), draw(1, 2, 5, 0), draw(1, 2, 5, 3)
    sink = torch.zeros(2, dtype=torch.float64) if NORMALIZERS[name].needs_sink else None
    got = scaled_dot_product_attention(q, k, v, normalizer=name, sink=sink, backend=backend)
    share = weights_of_row(torch.zeros(5, dtype=torch.float64), name, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(got, (share @ v)[:, :, None].expand(1, 2, 3, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (6, 3), (0, 0)])
@pytest.mark.parametrize(("tq", "tk"), [(3, 0), (0, 3), (0, 0), (3, 5)])
def test_nothing_to_attend_to(backend, name, heads, key_heads, tq, tk):
    """No keys, no queries, no heads, with grouped heads: zeros of the right shape, and gradients of the right shape."""
    leaves = [draw(2, n, t, 4).requires_grad_() for n, t in ((heads, tq), (key_heads, tk), (key_heads, tk))]
    sink = draw(heads) if NORMALIZERS[name].needs_sink else None
    out = scaled_dot_product_attention(*leaves, enable_gqa=True, normalizer=name, sink=sink, backend=backend)
    assert out.shape == (2, heads, tq, 4)
    assert tk or (out == 0).all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.shape == x.shape and g.isfinite().all() for g, x in zip(grads, leaves, strict=True))


# --------------------------------------------------------------------------------------------------- over one dimension


@pytest.mark.parametrize("function", [softpick.softpick, softpick.linear_softpick])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 3, 4)], ids=str)
def test_any_dimension_of_any_shape(function, shape):
    x = draw(*shape)
    for dim in range(-max(1, len(shape)), max(1, len(shape))):
        row = x.movedim(dim, -1) if shape else x[None]
        if function is softpick.softpick:
            f = torch.expm1(row)
            want = f.clamp(min=0) / (
                f.abs().sum(-1, keepdim=True) + 1e-6 * row.amax(-1, keepdim=True).clamp(min=0).exp()
            )
        else:
            want = row / (1 + row.abs().sum(-1, keepdim=True))
        torch.testing.assert_close(function(x, dim), want.movedim(-1, dim) if shape else want[0])
    for dim in (-max(1, len(shape)) - 1, max(1, len(shape))):
        with pytest.raises(IndexError, match="dim: expected"):
            function(x, dim)


@pytest.mark.parametrize("function", [softpick.softpick, softpick.linear_softpick])
def test_refusals_over_one_dimension(function):
    x = torch.randn(3, 4)
    for bad in (x.int(), x.bool(), x.to(torch.complex64)):
        with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
            function(bad)
    for bad in (x, [True], x.int()):
        with pytest.raises(TypeError, match="where: expected a boolean tensor"):
            function(x, where=bad)
    for shape in ((3,), (4, 3), (2, 3, 4)):
        with pytest.raises(ValueError, match="where: expected a shape that broadcasts"):
            function(x, where=torch.ones(shape).bool())
    with pytest.raises(ValueError, match="eps: expected"):
        softpick.softpick(x, eps=-1e-9)
    assert softpick.softpick(x, eps=0.0).isfinite().all()


def test_gradients_in_fp16_saturate():
    """Near zero the gradient of softpick reaches 1 / eps, beyond fp16's range: the largest number there, either sign."""
    x = torch.tensor([6e-8, 0.0, -6e-8], dtype=torch.float16, requires_grad=True)
    for sign in (1, -1):
        (grad,) = torch.autograd.grad(softpick.softpick(x), x, torch.tensor([sign, 0, 0], dtype=torch.float16))
        assert grad[0] == sign * torch.finfo(torch.float16).max
        assert grad.isfinite().all()


def test_dtype_casts_before_anything_else():
    x = torch.randn(50, dtype=torch.float64)
    assert torch.equal(softpick.softpick(x, dtype=torch.bfloat16), softpick.softpick(x.bfloat16()))
    assert torch.equal(softpick.softpick(x.float(), dtype=torch.float64), softpick.softpick(x.float().double()))
    assert softpick.softpick(torch.tensor([1, 2, 3]), dtype=torch.float32).dtype == torch.float32
