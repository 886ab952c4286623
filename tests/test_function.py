"""softpick.softpick and softpick.linear_softpick against the formulas, exact arithmetic, and torch's own checks."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import softpick

FUNCTIONS = {"softpick": softpick.softpick, "linear_softpick": softpick.linear_softpick}


def exact(x, eps=1e-6):
    """Paper eq. (2) with m = max(0, max x) in 60 digits."""
    mpmath.mp.dps = 60
    x = [mpmath.mpf(float(value)) for value in x]
    m = max([mpmath.mpf(0), *x])
    terms = [mpmath.exp(value - m) - mpmath.exp(-m) for value in x]
    total = sum(abs(t) for t in terms) + mpmath.mpf(eps)
    return [float(max(t, 0) / total) for t in terms]


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e-2, 1.0, 10.0, 80.0, 1000.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_matches_exact_arithmetic(scale, dtype, tolerance):
    x = (torch.randn(40) * scale).to(dtype)
    got = softpick.softpick(x).double()
    want = torch.tensor(exact(x), dtype=torch.float64)
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    # also the small entries, entry by entry: no cancellation
    kept = want > 1e-30
    assert ((got - want).abs()[kept] <= 50 * tolerance * want[kept]).all()


def test_small_scores_next_to_a_large_one_do_not_cancel():
    x = torch.tensor([1e-5, 10.0])
    assert softpick.softpick(x)[0].item() == pytest.approx(exact(x)[0], rel=1e-6)


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False), min_size=0, max_size=20),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(list(FUNCTIONS)),
)
@settings(max_examples=200, deadline=None)
def test_every_finite_input_has_finite_values_and_gradients(values, dtype, name):
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    y = FUNCTIONS[name](x)
    y.backward(torch.randn_like(y))
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert y.abs().sum() <= 1 + 1e-5
    if name == "softpick":
        assert (y >= 0).all()
        assert (y[x <= 0] == 0).all()  # exact zeros
    assert torch.equal(y.sign().nan_to_num() * (x != 0), y.sign())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [-1e4, 1e4, 0.0, -0.0, 1e-7])
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (2, 0), (0, 3), (2, 3, 4, 5)])
def test_constant_inputs(name, dtype, fill, shape):
    x = torch.full(shape, fill, dtype=dtype, requires_grad=True)
    y = FUNCTIONS[name](x)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    if fill <= 0 and name == "softpick":
        assert (y == 0).all()
    if fill == 1e4 and name == "softpick" and x.numel():
        assert y.float().sum(-1).sub(1).abs().max() < 0.02


def test_mixed_extremes():
    x = torch.tensor([1e30, -1e30, 0.0, 1.0], requires_grad=True)
    y = softpick.softpick(x)
    y.backward(torch.ones_like(y))
    assert y.tolist() == [pytest.approx(1.0), 0.0, 0.0, 0.0]
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_dim_and_where(dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    where = torch.rand(3, 4, 5) > 0.3
    y = softpick.softpick(x, dim=dim, where=where)
    assert (y[~where] == 0).all()
    # removing the entries gives the same as excluding them
    moved, kept, got = (t.movedim(dim, -1).reshape(-1, x.shape[dim]) for t in (x, where, y))
    for row, keep, out in zip(moved, kept, got, strict=True):
        torch.testing.assert_close(out[keep], softpick.softpick(row[keep]))
    # and what stands there does not matter, not even NaN
    torch.testing.assert_close(softpick.softpick(torch.where(where, x, math.nan), dim=dim, where=where), y)


def test_where_broadcasts_and_minus_infinity_is_excluded():
    x = torch.randn(3, 5)
    keep = torch.tensor([True, False, True, True, False])
    y = softpick.softpick(x, where=keep)
    torch.testing.assert_close(y, softpick.softpick(x.masked_fill(~keep, -math.inf)))
    torch.testing.assert_close(
        softpick.linear_softpick(x, where=keep), softpick.linear_softpick(x.masked_fill(~keep, 0.0))
    )


def _away_from_zero(*shape):
    x = torch.randn(*shape, dtype=torch.float64)
    return (x.sign() * (x.abs() + 0.1)).requires_grad_()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dim", [0, -1])
def test_gradcheck_and_gradgradcheck(name, dim):
    x = _away_from_zero(4, 5)
    f = lambda t: FUNCTIONS[name](t, dim)  # noqa: E731
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_jacobian_is_equation_7():
    x = torch.tensor([1.5, -0.5, 0.0, 0.3, -2.0], dtype=torch.float64)
    s = softpick.softpick(x)
    m = x.max()
    total = (torch.exp(x - m) - torch.exp(-m)).abs().sum() + 1e-6
    step, sign = (x > 0).double(), torch.where(x < 0, -1.0, 1.0).double()
    want = torch.exp(x - m) / total * (torch.diag(step) - s[:, None] * sign)
    got = torch.autograd.functional.jacobian(softpick.softpick, x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_and_functional_gradients(name):
    f = FUNCTIONS[name]
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(f)(x), f(x))
    torch.testing.assert_close(torch.func.vmap(lambda t: f(t, 0), in_dims=1)(x), f(x, 0).transpose(0, 1))
    loss = lambda t: (f(t) ** 2).sum()  # noqa: E731
    per_row = torch.func.vmap(torch.func.grad(loss))(x)
    t = x.clone().requires_grad_()
    loss(t).backward()
    torch.testing.assert_close(per_row, t.grad)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_to_one_graph(name):
    f = FUNCTIONS[name]
    compiled = torch.compile(lambda t: f(t * 2.0, -1), fullgraph=True)
    x = torch.randn(6, 9, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, f(x * 2.0, -1))
    (g,) = torch.autograd.grad(y.square().sum(), x)
    (want,) = torch.autograd.grad(f(x * 2.0, -1).square().sum(), x)
    torch.testing.assert_close(g, want)


def test_half_precision_is_computed_in_fp32():
    x = torch.randn(64, 300) * 3
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        torch.testing.assert_close(softpick.softpick(low), softpick.softpick(low.float()).to(dtype), rtol=0, atol=0)
    assert softpick.softpick(low, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: softpick.softpick(torch.ones(3, dtype=torch.int64)), TypeError, "x: expected a floating-point tensor"),
        (lambda: softpick.softpick([1.0]), TypeError, "x: expected a tensor, got list"),
        (lambda: softpick.softpick(torch.ones(3), 1), IndexError, "dim: expected a dimension of a 1-dim"),
        (lambda: softpick.softpick(torch.ones(3), eps=-1.0), ValueError, "eps: expected a number >= 0, got -1.0"),
        (lambda: softpick.softpick(torch.ones(3), where=torch.ones(3)), TypeError, "where: expected a boolean tensor"),
        (
            lambda: softpick.softpick(torch.ones(3), where=torch.ones(4, dtype=torch.bool)),
            ValueError,
            r"where: expected a shape that broadcasts to \(3,\), got \(4,\)",
        ),
        (lambda: softpick.linear_softpick(torch.ones(3, dtype=torch.complex64)), TypeError, "x: expected a floating"),
    ],
)
def test_errors(call, error, says):
    with pytest.raises(error, match=says):
        call()
