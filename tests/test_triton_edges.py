"""Few queries on the GPU's kernels, in Triton's interpreter: no option is lost on the way to the decoding kernel."""

import math

import pytest
import torch

from softpick import NORMALIZERS, decode_attention, functional, scaled_dot_product_attention, varlen_attention
from softpick.ops.calling import interpreted
from softpick.ops.triton import dispatch, launch_decode

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs the GPU kernels in Triton's interpreter")

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (2, 1), "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 0.5},
    "scale": {"scale": 2.0},
    "eps": {"eps": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options):
    q, k, v = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    want = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=True, backend="reference", return_stats=True, **options
    )
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="triton", **options)
    torch.testing.assert_close(out.double(), want.output, rtol=1e-4, atol=1e-5)
    full = scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="triton", return_stats=True, **options)
    for one, other in zip(full[:4], want[:4], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_dropout():
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    assert (scaled_dot_product_attention(q, k, v, dropout_p=1.0, backend="triton") == 0).all()
    plain = scaled_dot_product_attention(q, k, v, backend="triton")
    assert not torch.allclose(scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend="triton"), plain)


@pytest.mark.parametrize("name", ["softpick", "relu_softpick", "linear_softpick", "rectified"])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_a_softcap_keeps_the_digits_of_small_scores(name, softcap):
    """A score is small or large, of either sign, and alone in its row: its weight shows every digit that the cap lost."""
    size = torch.logspace(-9, 1, 11)
    k, q, v = torch.zeros(22, 4), torch.zeros(22, 4), torch.ones(22, 4)
    k[:, 0], q[:, 0] = torch.cat([-size, size]), 1.0
    mask, options = torch.eye(22, dtype=torch.bool), {"softcap": softcap, "scale": 1.0, "normalizer": name}
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x[None, None].to(dtype).requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*leaves, mask, backend=backend, **options)
        # the query of a decoding step, which has a kernel of its own
        steps = [x.detach()[0, 0, ::7, None, None] for x in leaves]
        step = scaled_dot_product_attention(*steps, backend=backend, **options)
        results.append((out, step, *torch.autograd.grad(out.sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-30)


LEVELS = [
    (name, level, eps)
    for name in ("softmax", "softmax_plus_one", "learned_sink", "rectified", "softpick", "relu_softpick")
    for level in (-300.0, -100.0, 0.0, 100.0)
    for eps in (None, 1e-3)
]


@pytest.mark.thinned(every=3)
@pytest.mark.parametrize(("name", "level", "eps"), LEVELS)
def test_rows_of_few_keys_at_any_level(name, level, eps):
    """Where all scores and a sink lie far below 0, what is relative to 0 overflows: gradients of the first causal rows."""
    q = torch.ones(1, 2, 6, 16)
    k = level / 16 + 0.05 * torch.randn(1, 2, 6, 16)
    v, grad = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
    sink = torch.full((2,), level) if NORMALIZERS[name].needs_sink else None
    options = {"is_causal": True, "scale": 1.0, "normalizer": name, "eps": eps}
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*leaves, backend=backend, sink=sink, **options)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() <= 2e-3 * (other.norm() + 0.1)


SUNK = {
    "without a maximum": ("learned_sink", None, torch.float32),
    "without a maximum, with eps": ("learned_sink", 1e-6, torch.float32),
    "softmax with eps": ("softmax", 0.25, torch.float16),
    "half": ("learned_sink", None, torch.float16),
    "packed": ("learned_sink", None, torch.float16),
    "decoding": ("learned_sink", None, torch.float16),
    "decoding with eps": ("learned_sink", 0.25, torch.float32),
    "decoding by softmax with eps": ("softmax", 0.25, torch.float32),
}


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("how", SUNK)
def test_scores_and_sink_far_below_zero(how, monkeypatch):
    """More keys than a tile has, and sinks above, among and below the scores: nothing underflows. One head is ordinary."""
    name, eps, dtype = SUNK[how]
    decoded = how.startswith("decoding")
    monkeypatch.setattr(
        launch_decode, "_splits", lambda resident, fewest, pairs, tk, block_n: (-(-tk // block_n), block_n)
    )
    if how.startswith("without"):  # as in bf16, which the interpreter cannot multiply
        monkeypatch.setattr(dispatch, "optimistic", lambda *_: True)
    level = torch.tensor([-300.0, -200.0, -150.0, 0.0])
    tq, tk = (2, 150) if decoded else (40, 40)
    q, v = torch.ones(1, 4, tq, 16), torch.randn(1, 4, tk, 16)
    k = level[:, None, None] / 16 + torch.randn(1, 4, tk, 16)
    sink = level + torch.tensor([9.0, 0.0, -70.0, 1.0]) if NORMALIZERS[name].needs_sink else None
    options = {"normalizer": name, "eps": eps, "scale": 1.0}
    results = []
    for backend, of in (("triton", dtype), ("reference", torch.float64)):
        leaves = [x.to(dtype).to(of).requires_grad_(not decoded) for x in (q, k, v)]
        logits = None if sink is None else sink.to(of).requires_grad_(not decoded)
        more = {"sink": logits, "backend": backend, **options}
        if decoded:
            results.append(decode_attention(*leaves, return_lse=True, **more))
            continue
        if how == "packed":
            cu = torch.tensor([0, 21, 40])
            rows = varlen_attention(
                *(x[0].transpose(0, 1) for x in leaves), cu, cu, is_causal=True, return_stats=True, **more
            )
        else:
            rows = scaled_dot_product_attention(*leaves, is_causal=True, return_stats=True, **more)
        inputs = [x for x in (*leaves, logits) if x is not None]
        results.append([*rows[:4], *torch.autograd.grad(rows.output.square().sum(), inputs)])
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results[0][1].double(), results[1][1], rtol=1e-6, atol=1e-3)  # lse
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() <= tolerance * (other.norm() + 0.1)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_pages_that_do_not_exist_are_masked(name, monkeypatch):
    """On a GPU nobody looks at page numbers beforehand: the kernel reads nothing for a wrong one, whatever lies there."""
    page = 16 if name in ("softmax", "softpick") else 5
    around = torch.full((5, page, 1, 16), math.nan)  # other people's memory before and behind the cache's three pages
    pool_k, pool_v = around.clone()[1:4], around.clone()[1:4]
    for pool in (pool_k, pool_v):
        pool.copy_(torch.randn(3, page, 1, 16))
    table = torch.tensor([[0, -1, 2], [2**31 - 1, 1, -(2**31)], [-1, 3, -1]], dtype=torch.int32)
    lengths = torch.tensor([3 * page, 2 * page + 1, page + 1])
    query = torch.randn(3, 2, 2, 16)
    sink = torch.randn(2) if NORMALIZERS[name].needs_sink else None
    window = 2 * page if name in ("softmax", "softpick_abs") else None
    monkeypatch.setattr(functional, "check_pages", lambda *_: None)
    got = decode_attention(
        query, pool_k, pool_v, cache_seqlens=lengths, block_table=table, normalizer=name, sink=sink, window=window,
        backend="triton", return_lse=True,
    )  # fmt: skip
    for b, n in enumerate(lengths.tolist()):
        j, i = torch.arange(n), torch.arange(n - 2, n)[:, None]
        there = ((table[b] >= 0) & (table[b] < 3)).repeat_interleave(page)[:n]
        seen = there & (j <= i) & (j > i - (window or n))
        k, v = (pool[table[b].clamp(0, 2).long()].flatten(0, 1)[:n].transpose(0, 1) for pool in (pool_k, pool_v))
        true = [x[None].double() for x in (query[b], k, v)]
        want = scaled_dot_product_attention(
            *true, seen, enable_gqa=True, normalizer=name, sink=None if sink is None else sink.double(),
            backend="reference", return_stats=True,
        )  # fmt: skip
        torch.testing.assert_close(got[0][b].double(), want.output[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1][b].double(), want.lse[0], rtol=1e-4, atol=1e-4)
