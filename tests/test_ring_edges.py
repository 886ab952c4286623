"""Ring attention at the edges of its documentation, on a ring of one and on parts that are merged without ranks."""

import pytest
import torch
import torch.distributed as dist
from oracle import attention as oracle

from softpick import NORMALIZERS, get_normalizer
from softpick.distributed import _Carry, ring_attention
from softpick.ops.blocks import block_backward, block_forward

NAMES = list(NORMALIZERS)


@pytest.fixture(autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 30.0])
def test_gradients_are_finite_and_saturate(name, dtype, size):
    """Near zero a gradient of softpick reaches 1 / eps, beyond fp16's range: the largest number there, never infinite."""
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    grad = 10 * torch.randn(1, 2, 6, 4, dtype=torch.float64)
    sink = torch.randn(2, dtype=dtype) if NORMALIZERS[name].needs_sink else None
    leaves = [x.to(dtype).requires_grad_() for x in (q * size, k, v)]
    truth = [x.detach().double().requires_grad_() for x in leaves]
    out = ring_attention(*leaves, normalizer=name, sink=sink)
    want, _ = oracle(*truth, name, sink=sink)
    grads = torch.autograd.grad(out, leaves, grad.to(dtype))
    wanted = torch.autograd.grad(want, truth, grad.to(dtype).double())
    limit = torch.finfo(dtype).max
    for one, other in zip(grads, wanted, strict=True):
        assert one.dtype == dtype
        assert one.isfinite().all()
        other = other.clamp(-limit, limit)
        # the output that the gradient is computed with is rounded: an error relative to grad * output
        eps = torch.finfo(dtype).eps
        assert (one.double() - other).norm() <= max(0.02, 20 * eps) * other.norm() + 4 * eps * max(1.0, size)
    if name == "softpick" and dtype == torch.float16 and size == 1e-6:
        assert max(float(x.abs().max()) for x in grads) == limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_large_scores_of_parts_that_are_merged(name, size):
    """A natural lse in fp32 has no digits behind the point there: every weight of a row would be off by 4e-4 to 4e-2."""
    q, k, v, grad = torch.ones(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    sink = torch.tensor([0.5, size]) if NORMALIZERS[name].needs_sink else None
    k = k * size  # one key takes nearly all
    norm = get_normalizer(name)
    carry = _Carry(norm, q, v, sink, norm.eps)
    options = {"backend": "tiled", "normalizer": name, "scale": 1.0, "is_causal": False, "softcap": 0.0}
    parts = [(k[:, :, keys], v[:, :, keys]) for keys in (slice(0, 5), slice(5, 9))]
    for part in parts:
        carry.add(slice(0, 9), *block_forward(q, *part, sink, eps=carry.part_eps, **options))
    out, lse = carry.finish()
    dq, dk, dv = zip(*(block_backward(grad, q, *part, out, lse, **options) for part in parts), strict=True)
    truth = [x.double().requires_grad_() for x in (q, k, v)]
    want, _ = oracle(*truth, name, scale=1.0, sink=sink)
    wanted = torch.autograd.grad(want, truth, grad.double())
    rounding = (0, 2e-6 * size, 2e-6, 0)  # of D in fp32, times the keys and times the queries
    found = (out, sum(dq), torch.cat(dk, 2), torch.cat(dv, 2))
    for one, other, more in zip(found, (want, *wanted), rounding, strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm() + more


@pytest.mark.parametrize("sizes", [(0, 4, 4, 4), (6, 0, 4, 4), (6, 6, 4, 0), (6, 6, 0, 4)], ids=str)
def test_a_size_of_zero(sizes):
    tq, tk, d, dv = sizes
    leaves = [torch.randn(1, 2, *size, requires_grad=True) for size in ((tq, d), (tk, d), (tk, dv))]
    out = ring_attention(*leaves, scale=1.0)
    assert out.shape == (1, 2, tq, dv)
    assert (out == 0).all()
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()
