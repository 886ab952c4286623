"""Softpick over long and short rows by the Triton kernels on a GPU, against fp64."""

import math

import pytest
import torch
from triton_gpu_cases import BF16, DEVICE, FP16, FP32, exact, relative

import softpick
from softpick.ops import operators_rows, vector

pytestmark = pytest.mark.gpu


# ----------------------------------------------------------------------------------------------- softpick over a vector


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("rows", "n"), [(5, 1), (5, 7), (5, 1000), (5, 4096), (5, 20000), (100, 70000), (5, 131072), (3, 3_000_000)]
)
def test_rows(rows, n, dtype, poisoned, monkeypatch):
    calls = []
    original = vector.rows_forward
    monkeypatch.setattr(vector, "rows_forward", lambda *args: calls.append(args) or original(*args))
    x = (torch.randn(rows, n, device=DEVICE) * 3).to(dtype)
    x[0] = -x[0].abs()
    if n > 1:
        x[:, 1] = -math.inf
    x.requires_grad_()
    y = softpick.softpick(x)
    assert len(calls) == 1
    (true,) = exact(x)
    want = softpick.softpick(true)
    grad = torch.randn_like(y)
    (got_grad,), (want_grad,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(want, true, grad.double())
    limits = {BF16: 5e-3, FP16: 1e-3, FP32: 1e-5}
    assert relative(y, want) < limits[dtype]
    # the two terms of the gradient cancel in a row of one element: what counts is the error beside the terms
    terms = grad.double() * true.exp() / (torch.expm1(true).abs().sum(-1, keepdim=True) + 1e-6)
    assert (got_grad.double() - want_grad).norm() < limits[dtype] * max(want_grad.norm(), terms.norm())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("n", [16384, 16385, 16392, 20000, 131072])
@pytest.mark.parametrize("eps", [1e-6, 0.0, 1e-2])
def test_long_rows(n, eps, dtype, poisoned):
    """More rows than programs take at a time, each against fp64, with a stride, twice the same. On Hopper GPUs programs share
    those longer than 16384 that begin at multiples of 16 bytes, and take 16-bit ones together once more where sums relative to
    0 are not sound: tiny or large scores, nearly all minus infinity, NaN, a large eps.
    """
    from softpick.ops.triton import dispatch

    rows = 150 if n > 100_000 else 300
    x, grad = (torch.empty(rows, n + 64, device=DEVICE, dtype=dtype)[:, :n] for _ in range(2))
    x.copy_(torch.randn(rows, n, device=DEVICE) * 3)
    grad.copy_(torch.randn(rows, n, device=DEVICE))
    x[::3, 5] = -math.inf
    x[-1] += 80
    x[1] += 80
    x[2, n // 3 :] = -math.inf
    x[3] = -x[3].abs()
    x[4], x[5] = -math.inf, 0
    x[6], x[6, 7] = -(10.0**4), 0.5
    x[1, 5] = -math.inf
    x[7] *= 3e-3  # just large enough
    x[8] *= 1e-3
    x[9] = 43
    x[10], x[10, 9] = -math.inf, 1
    shared = torch.cuda.get_device_capability()[0] == 9 and n > 16384 and n % 8 == 0
    if n > 16384:
        assert dispatch.rows_kernel("forward", x, (), frozenset()).hopper == shared
        assert dispatch.rows_kernel("backward", x, (grad,), frozenset()).hopper == shared
    y, lse = operators_rows._rows_forward(x, eps, "auto")
    dx = operators_rows._rows_backward(grad, x, lse, eps, "auto")
    again, again_lse = operators_rows._rows_forward(x, eps, "auto")
    assert torch.equal(y, again)
    assert torch.equal(lse, again_lse)
    assert torch.equal(dx, operators_rows._rows_backward(grad, x, lse, eps, "auto"))

    (true,) = exact(x.detach().requires_grad_())
    want = softpick.softpick(true, eps=eps)
    (want_dx,) = torch.autograd.grad(want, true, grad.double())
    true, want = true.detach(), want.detach()
    m = true.amax(-1, keepdim=True).clamp(min=0)
    total = (torch.where(true == -math.inf, 0.0, torch.expm1(true)).abs() * torch.exp(-m)).sum(-1, keepdim=True)
    want_lse = (m + (total + eps).log())[:, 0]
    limit = {BF16: 5e-3, FP16: 1e-3, FP32: 1e-5}[dtype]
    step = 2.0**-24 if dtype == FP16 else 0.0  # between its numbers near 0
    difference = (y.double() - want).norm(dim=-1)
    assert (difference <= limit * want.norm(dim=-1) + step * n**0.5).all()
    assert torch.equal(lse.isfinite(), want_lse.isfinite())
    finite = want_lse.isfinite()
    assert (lse - want_lse)[finite].abs().max() < 3e-5
    assert not y[~finite].any()
    assert not dx[~finite].any()  # the gradient of a row of zeros is not defined with eps 0
    # where terms of the gradient cancel, what counts is the error beside them
    terms = (grad.double() * torch.exp(true - want_lse[:, None]))[finite].norm(dim=-1)
    difference = (dx.double() - want_dx)[finite].norm(dim=-1)
    assert (difference <= limit * torch.maximum(want_dx[finite].norm(dim=-1), terms) + step * n**0.5).all()

    x[7, 9] = math.nan
    broken, broken_lse = operators_rows._rows_forward(x, eps, "auto")
    others = torch.arange(rows, device=DEVICE) != 7
    assert broken[7].isnan().all()
    assert broken_lse[7].isnan()
    assert torch.equal(broken[others], y[others])
    assert torch.equal(broken_lse[others], lse[others])


def test_kernels_are_launched_again_for_arguments_that_mean_the_same():
    """Aligned or not, another stride, another length: the right variant each time, also where all were launched before."""
    from softpick.ops.triton.kernel_cache import _known

    store = torch.randn(64 * 1024, device=DEVICE).bfloat16()
    views = [
        lambda: store[: 32 * 1000].view(32, 1000),
        lambda: store[1 : 32 * 1000 + 1].view(32, 1000),
        lambda: store[: 32 * 1024].view(32, 1024)[:, :1000],
        lambda: store[: 31 * 1001].view(31, 1001),
        lambda: store[: 32 * 1000].view(32, 1000).float(),
    ]
    for _ in range(2):
        for view in views:
            close = {"rtol": 0, "atol": 1e-2} if view().dtype == BF16 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(softpick.softpick(view()).double(), softpick.softpick(view().double()), **close)
    before = len(_known)
    for view in views:
        softpick.softpick(view())
    assert len(_known) == before


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_that_programs_share_in_a_graph(dtype):
    """Replayed, programs must wait again for what the others have to tell."""
    x, grad = torch.randn(2, 300, 40000, device=DEVICE, dtype=dtype)

    def both():
        y, lse = operators_rows._rows_forward(x, 1e-6, "auto")
        return y, operators_rows._rows_backward(grad, x, lse, 1e-6, "auto")

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = both()
    for _ in range(3):
        x.normal_()
        graph.replay()
        true = x.double().requires_grad_()
        want = softpick.softpick(true)
        assert relative(y, want) < 5e-3
        assert relative(dx, torch.autograd.grad(want, true, grad.double())[0]) < 5e-3
        assert all(map(torch.equal, both(), (y, dx)))
    first = y.clone(), dx.clone()
    graph.replay()
    assert all(map(torch.equal, first, (y, dx)))
