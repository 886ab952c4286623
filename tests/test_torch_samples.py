"""PyTorch's own sample inputs of scaled_dot_product_attention and softmax through every backend that the CPU has.

They ship with torch (``torch.testing._internal.common_methods_invocations``). Softmax is compared with torch, softpick with
the oracle.
"""

import math
import sys
import types
import unittest

import pytest
import torch
from oracle import attention as oracle
from oracle import weights_of_row
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import softpick
from softpick import scaled_dot_product_attention
from softpick.ops.calling import HAS_TRITON

if "expecttest" not in sys.modules:
    # torch's helpers import it for a base class of test cases, of which nothing is used here
    try:
        import expecttest  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in

from torch.testing._internal.common_methods_invocations import op_db

BACKENDS = ["auto", "tiled", "reference", *(["triton"] if HAS_TRITON else [])]
DTYPES = {"triton": torch.float32}


def samples(name, dtype=torch.float64, variant=""):
    (op,) = [op for op in op_db if op.name == name and op.variant_test_name == variant]
    return list(op.sample_inputs("cpu", dtype, requires_grad=True))


def attention_samples():
    """All that differ in more than their numbers."""
    found = samples("nn.functional.scaled_dot_product_attention")
    return list(
        {str([s.input.shape, [x.shape for x in s.args], sorted(s.kwargs)]) + options(s): s for s in found}.values()
    )


def options(sample):
    return str([sample.kwargs["is_causal"], sample.kwargs["dropout_p"]])


def call_of(sample, dtype):
    """Query, key, value and mask as leaves of a dtype, and what else was given."""
    options = dict(sample.kwargs)
    mask = options.pop("attn_mask", None)
    tensors = [sample.input, *sample.args, mask]
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    return leaves, options


def compared(got, want, got_leaves, want_leaves, dtype):
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-6}
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), **tolerance)
    weight = torch.randn_like(want)
    pairs = [(a, b) for a, b in zip(got_leaves, want_leaves, strict=True) if a is not None]
    got_grads = torch.autograd.grad(got, [a for a, _ in pairs], weight.to(got.dtype))
    want_grads = torch.autograd.grad(want, [b for _, b in pairs], weight)
    for one, other in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **tolerance)


def test_there_are_samples():
    ranks = {tuple(x.dim() for x in (s.input, *s.args)) for s in attention_samples()}
    assert {(3, 3, 3), (4, 4, 4), (3, 4, 4)} <= ranks  # also a query of fewer dimensions than the key


@pytest.mark.thinned
@pytest.mark.parametrize("index", range(len(attention_samples())))
@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_attention_is_torchs(backend, index):
    dtype = DTYPES.get(backend, torch.float64)
    leaves, options = call_of(attention_samples()[index], dtype)
    if options["dropout_p"]:
        dropped = scaled_dot_product_attention(*leaves, normalizer="softmax", backend=backend, **options)
        assert dropped.shape == torch_attention(*leaves, **options).shape  # the numbers are random
        return
    others = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    got = scaled_dot_product_attention(*leaves, normalizer="softmax", backend=backend, **options)
    compared(got, torch_attention(*others, **options), leaves, others, dtype)


@pytest.mark.thinned
@pytest.mark.parametrize("index", range(len(attention_samples())))
@pytest.mark.parametrize("backend", BACKENDS)
def test_softpick_attention_is_the_oracles(backend, index):
    dtype = DTYPES.get(backend, torch.float64)
    leaves, options = call_of(attention_samples()[index], dtype)
    options["dropout_p"] = 0.0
    got = scaled_dot_product_attention(*leaves, backend=backend, **options)
    others = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    q, k, v, mask = others
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
    full = [x.expand(*lead, *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v)]
    want, _ = oracle(*full, "softpick", mask=mask, causal="top_left" if options["is_causal"] else None)
    compared(got, want.view(*lead, *want.shape[-2:]), leaves, others, dtype)


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize(
    "shapes", [((4, 3), (2, 5, 4, 3), (4, 3)), ((5, 4, 3), (4, 3), (2, 5, 4, 3)), ((2, 1, 4, 3), (5, 4, 3), (4, 3))]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_tensors_of_any_rank_broadcast(masked, backend, shapes):
    dtype = DTYPES.get(backend, torch.float64)
    leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    others = [x.detach().double().requires_grad_() for x in leaves]
    mask = torch.rand(2, 1, 4, 4) > 0.3 if masked else None
    got = scaled_dot_product_attention(*leaves, mask, normalizer="softmax", backend=backend)
    # torch takes no mask that has more leading dimensions than the query
    lead = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
    compared(got, torch_attention(*(x.expand(*lead, *x.shape[-2:]) for x in others), mask), leaves, others, dtype)
    both = scaled_dot_product_attention(*leaves, mask, normalizer="softmax", backend=backend, return_stats=True)
    assert both.lse.shape == got.shape[:-1]


@pytest.mark.parametrize("kind", ["boolean", "minus infinity"])
@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"])
def test_a_row_that_sees_nothing_is_zero_with_softmax(backend, kind):
    dtype = DTYPES.get(backend, torch.float64)
    q, k, v = (torch.randn(2, 2, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    if kind == "minus infinity":
        mask = torch.zeros(5, 5, dtype=dtype).masked_fill(~mask, -math.inf)
    out = scaled_dot_product_attention(q, k, v, mask, normalizer="softmax", backend=backend)
    assert (out[:, :, 2] == 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, 2] == 0).all()


@pytest.mark.parametrize("variant", ["", "with_dtype"])
def test_softpick_takes_the_samples_of_softmax(variant):
    for sample in samples("softmax", torch.float32, variant):
        x, dim, dtype = sample.input, sample.args[0], sample.kwargs.get("dtype")
        got = softpick.softpick(x, dim, dtype=dtype)
        assert (got.shape, got.dtype) == (x.shape, torch.softmax(x, dim, dtype=dtype).dtype)
        if x.numel() == 0:
            continue  # its shape is all there is
        rows = x.detach().double().reshape(1, 1) if x.dim() == 0 else x.detach().double().movedim(dim, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        want = torch.stack([weights_of_row(row, "softpick") for row in flat])
        moved = want.view(rows.shape)
        want = moved.reshape(()) if x.dim() == 0 else moved.movedim(-1, dim)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
