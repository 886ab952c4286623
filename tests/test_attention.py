"""Attention against an independent fp64 oracle, torch's own softmax attention, and itself where that is a real check."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import attention as oracle
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import softpick
from softpick import NORMALIZERS, scaled_dot_product_attention, varlen_attention
from softpick.ops import cpu

NAMES = list(NORMALIZERS)
BACKENDS = ["reference", "tiled"]


@pytest.fixture(params=["whole", "small tiles"])
def tiles(request, monkeypatch):
    """Run with the real tile sizes, and with ones so small that every test crosses many tiles and chunks."""
    if request.param == "small tiles":
        monkeypatch.setattr(cpu, "BLOCK_Q", 4)
        monkeypatch.setattr(cpu, "BLOCK_K", 6)
        monkeypatch.setattr(cpu, "TILE_SCORES", 2 * 4 * 6)


def make(b=2, h=4, hkv=2, tq=9, tk=13, d=8, dv=5, dtype=torch.float64, scale=1.0):
    q = torch.randn(b, h, tq, d, dtype=dtype) * scale
    k = torch.randn(b, hkv, tk, d, dtype=dtype)
    v = torch.randn(b, hkv, tk, dv, dtype=dtype)
    return [t.requires_grad_() for t in (q, k, v)]


def sink_for(name, heads, dtype=torch.float64):
    return torch.randn(heads, dtype=dtype).requires_grad_() if NORMALIZERS[name].needs_sink else None


PATTERNS = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"is_causal": True, "window": 3},
    "two-sided window": {"window": (2, 4)},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.7},
    "boolean mask": {"mask": "bool"},
    "padding": {"mask": "padding", "is_causal": True},
    "additive": {"mask": "float"},
    "additive, causal, softcap": {"mask": "float", "is_causal": True, "softcap": 2.0},
}


def arguments(pattern, b, h, tq, tk):
    options = dict(PATTERNS[pattern])
    kind = options.pop("mask", None)
    mask = None
    if kind == "bool":
        mask = torch.rand(b, 1, tq, tk) > 0.4
    elif kind == "padding":
        mask = (torch.arange(tk) >= torch.arange(b)[:, None] * 2)[:, None, None]
    elif kind == "float":
        mask = torch.randn(1, h, tq, tk, dtype=torch.float64)
        mask = mask.masked_fill(torch.rand(tq, tk) > 0.6, -math.inf).requires_grad_()
    return mask, options


def oracle_options(options):
    window = options.get("window")
    left, right = (window - 1, window - 1) if isinstance(window, int) else window or (-1, -1)
    alignment = options.get("causal_alignment", "top_left")
    return {
        "causal": alignment if options.get("is_causal") else None,
        "left": left,
        "right": 0 if options.get("is_causal") else right,
        "scale": options.get("scale"),
        "softcap": options.get("softcap"),
    }


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_oracle_forward_and_backward(backend, name, pattern, tiles):
    q, k, v = make()
    mask, options = arguments(pattern, 2, 4, 9, 13)
    sink = sink_for(name, 4)
    leaves = [x for x in (q, k, v, sink, mask) if x is not None and x.requires_grad]
    want, want_weights = oracle(q, k, v, name, mask=mask, sink=sink, **oracle_options(options))
    grad = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, leaves, grad)
    got = scaled_dot_product_attention(
        q, k, v, mask, enable_gqa=True, normalizer=name, sink=sink, backend=backend, return_stats=True, **options
    )
    torch.testing.assert_close(got.output, want)
    torch.testing.assert_close(got.row_mass, want_weights.sum(-1), check_dtype=False)
    got_grads = torch.autograd.grad(got.output, leaves, grad)
    for one, other in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5 if NORMALIZERS[name].eps else 1e-8)
    if backend == "reference":
        full = scaled_dot_product_attention(
            q, k, v, mask, enable_gqa=True, normalizer=name, sink=sink, return_weights=True, **options
        )
        torch.testing.assert_close(full.weights, want_weights)
        torch.testing.assert_close(full.output, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (1, 600), (300, 1), (257, 513), (5, 0), (0, 5)], ids=lambda t: str(t))
@pytest.mark.parametrize("causal", [False, True])
def test_backends_agree_on_awkward_lengths(name, tq, tk, causal, poisoned):
    q, k, v = make(b=1, h=2, hkv=1, tq=tq, tk=tk)
    sink = sink_for(name, 2)
    results = []
    for backend in BACKENDS:
        out = scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True, normalizer=name, sink=sink, backend=backend, return_stats=True
        )
        loss = (out.output * torch.arange(1, 6, dtype=torch.float64)).sum()
        grads = torch.autograd.grad(loss, [q, k, v] + ([sink] if sink is not None else []))
        results.append([*out[:4], *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_hurt(name, backend, poisoned):
    """All negative, all zero, huge, one key, all masked: in one call, finite, and as the oracle says."""
    d = 4
    k = torch.ones(1, 1, 6, d, dtype=torch.float64)
    q = torch.tensor([-30.0, 0.0, 1e4, -1e4, 1e-6, 2.0, 3.0], dtype=torch.float64)[None, None, :, None].expand(
        1, 1, 7, d
    )
    k = k * torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0, 3.0], dtype=torch.float64)[:, None]
    v = torch.randn(1, 1, 6, 3, dtype=torch.float64)
    mask = torch.ones(7, 6, dtype=torch.bool)
    mask[5] = False
    mask[6, 1:] = False
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    sink = sink_for(name, 1)
    got = scaled_dot_product_attention(q, k, v, mask, normalizer=name, sink=sink, backend=backend, return_stats=True)
    want, _ = oracle(q, k, v, name, mask=mask, sink=sink)
    torch.testing.assert_close(got.output, want)
    assert (got.output[0, 0, 5] == 0).all()
    assert got.max_score[0, 0, 5] == -math.inf
    if NORMALIZERS[name].sparse:
        assert (got.output[0, 0, [0, 3]] == 0).all()
        assert (got.row_mass[0, 0, [0, 3]] == 0).all()
    grads = torch.autograd.grad(got.output.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    low = [t.detach().float().requires_grad_() for t in (q, k, v)]
    out = scaled_dot_product_attention(
        *low, mask, normalizer=name, sink=None if sink is None else sink.float(), backend=backend
    )
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), low))


@given(
    b=st.integers(1, 3),
    hkv=st.integers(1, 3),
    groups=st.integers(1, 3),
    tq=st.integers(1, 20),
    tk=st.integers(1, 20),
    d=st.integers(1, 9),
    dv=st.integers(1, 9),
    causal=st.booleans(),
    bottom_right=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 12)),
    log_scale=st.floats(-3, 3),
    name=st.sampled_from(NAMES),
    strided=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_backends_agree_on_any_shape(
    b, hkv, groups, tq, tk, d, dv, causal, bottom_right, window, log_scale, name, strided
):
    q, k, v = make(b, hkv * groups, hkv, tq, tk, d, dv, scale=10**log_scale)
    if strided:  # (B, T, H, D) in memory, as models have it
        q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v))
    sink = sink_for(name, hkv * groups)
    results = []
    for backend in BACKENDS:
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            enable_gqa=True,
            normalizer=name,
            sink=sink,
            causal_alignment="bottom_right" if bottom_right else "top_left",
            window=window,
            backend=backend,
            return_stats=True,
        )
        results.append([*out[:4], *torch.autograd.grad(out.output.sum(), (q, k, v))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------- torch's semantics

TORCH_CASES = {
    "4d": lambda r: (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 3)),
    "2d": lambda r: (r(5, 8), r(6, 8), r(6, 8)),
    "3d": lambda r: (r(2, 5, 8), r(2, 6, 8), r(2, 6, 8)),
    "5d": lambda r: (r(2, 3, 4, 5, 8), r(2, 3, 4, 6, 8), r(2, 3, 4, 6, 8)),
    "one key head": lambda r: (r(2, 4, 5, 8), r(2, 1, 6, 8), r(2, 1, 6, 8)),
    "one key batch": lambda r: (r(2, 4, 5, 8), r(1, 4, 6, 8), r(1, 4, 6, 8)),
    "one query batch": lambda r: (r(1, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8)),
    "no keys": lambda r: (r(2, 4, 5, 8), r(2, 4, 0, 8), r(2, 4, 0, 8)),
    "more queries": lambda r: (r(2, 4, 9, 8), r(2, 4, 6, 8), r(2, 4, 6, 8)),
}


@pytest.mark.parametrize("case", TORCH_CASES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_softmax_is_torchs(case, causal, backend):
    q, k, v = TORCH_CASES[case](torch.randn)
    want = torch_attention(q, k, v, is_causal=causal)
    got = scaled_dot_product_attention(q, k, v, is_causal=causal, normalizer="softmax", backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(5, 6) > 0.5,
        torch.zeros(5, 6, dtype=torch.bool),
        torch.rand(2, 1, 1, 6) > 0.5,
        torch.randn(4, 1, 6),
        torch.randn(2, 4, 5, 6).masked_fill(torch.rand(2, 4, 5, 6) > 0.5, -math.inf),
        torch.full((5, 6), -math.inf),
    ],
    ids=["bool", "all masked", "padding", "bias", "additive", "all -inf"],
)
def test_softmax_masks_are_torchs(mask, backend):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    want = torch_attention(q, k, v, attn_mask=mask)
    got = scaled_dot_product_attention(q, k, v, attn_mask=mask, normalizer="softmax", backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_gqa_and_gradients_are_torchs(backend):
    q, k, v = make(dtype=torch.float32)
    args = {"is_causal": True, "enable_gqa": True}
    grad = torch.randn(2, 4, 9, 5)
    want = torch.autograd.grad(torch_attention(q, k, v, **args), (q, k, v), grad)
    out = scaled_dot_product_attention(q, k, v, **args, normalizer="softmax", backend=backend)
    for one, other in zip(torch.autograd.grad(out, (q, k, v), grad), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_error_against_fp64_is_that_of_torch(name, dtype, scale):
    """Budget: 1.5 times the relative Frobenius error of torch's softmax attention in the same precision."""
    make_q = torch.randn(1, 4, 300, 32) * scale
    q, k, v = (t.to(dtype) for t in (make_q, torch.randn(1, 4, 300, 32), torch.randn(1, 4, 300, 32)))
    sink = torch.randn(4, dtype=dtype) if NORMALIZERS[name].needs_sink else None
    exact = [t.double() for t in (q, k, v)]

    def error(f, **more):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        truth = [t.detach().requires_grad_() for t in exact]
        out, want = f(*leaves, **more), f(*truth, **{k: getattr(v, "double", lambda v=v: v)() for k, v in more.items()})
        grad = torch.ones_like(want) + torch.arange(want.shape[-1])
        pairs = [
            (out, want),
            *zip(torch.autograd.grad(out, leaves, grad.to(dtype)), torch.autograd.grad(want, truth, grad), strict=True),
        ]
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]

    def torch_softmax(q, k, v):
        return torch_attention(q, k, v, is_causal=True)

    def ours(q, k, v, **more):
        backend = "reference" if q.dtype == torch.float64 else "tiled"
        return scaled_dot_product_attention(q, k, v, is_causal=True, normalizer=name, backend=backend, **more)

    budget = error(torch_softmax)
    got = error(ours, **({} if sink is None else {"sink": sink}))
    # The floor keeps the budget meaningful where torch's own error is below what any other function can reach:
    # e^s - 1 and s of a small score carry the relative error of the score (a sum of D rounded products), e^s does not;
    # and gradients of softmax over nearly equal scores are nearly linear.
    floor = 2 * torch.finfo(dtype).eps
    limits = [1.5 * max(budget[0], floor)] + [1.5 * max(b, 4 * floor * (1 + scale)) for b in budget[1:]]
    assert all(g <= limit for g, limit in zip(got, limits, strict=True)), (got, limits)


def test_scores_beyond_the_unshifted_range():
    """Scores above 2^64 in base 2 make the tiles move their anchor, in some rows and tiles and not in others."""
    q, k, v = make(b=1, h=2, hkv=2, tq=70, tk=1200, dtype=torch.float32)
    with torch.no_grad():
        q[:, :, ::3] *= 200
        k[:, :, 600:] *= 3
        q[:, :, 1::3] *= 1e-4
    for name in NAMES:
        sink = sink_for(name, 2, torch.float32)
        want = scaled_dot_product_attention(
            q.double(),
            k.double(),
            v.double(),
            normalizer=name,
            backend="reference",
            sink=None if sink is None else sink.double(),
        )
        got = scaled_dot_product_attention(q, k, v, normalizer=name, backend="tiled", sink=sink)
        # per row: the small rows must be as good as the large ones
        rows = (got.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)
        assert rows.max() < 2e-4, name


def test_published_form_would_overflow_here():
    """A first key block all below -88 and a later one not: NaN or a wrong row in the authors' recurrence."""
    for low in (-90.0, -120.0, -1e4):
        k = torch.full((1, 1, 600, 1), low)
        k[:, :, 560] = 5.0
        v = torch.randn(1, 1, 600, 4)
        out = scaled_dot_product_attention(torch.ones(1, 1, 2, 1), k, v, scale=1.0, backend="tiled")
        total = math.exp(5) - 1 + 599 * (1 - math.exp(low))
        torch.testing.assert_close(out[0, 0, 0], v[0, 0, 560] * (math.exp(5) - 1) / total)


# -------------------------------------------------------------------------------------------------- masks and exclusion


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "-inf", "finfo.min"])
def test_masked_keys_count_nowhere(name, backend, kind):
    q, k, v = (t.detach() for t in make(hkv=4))
    sink = sink_for(name, 4)
    kept = torch.tensor([0, 2, 3, 7, 11])
    keep = torch.zeros(13, dtype=torch.bool)
    keep[kept] = True
    mask = keep.expand(9, 13)
    if kind != "bool":
        low = -math.inf if kind == "-inf" else torch.finfo(torch.float64).min
        mask = torch.zeros(9, 13, dtype=torch.float64).masked_fill(~mask, low)
    options = {"normalizer": name, "sink": sink, "backend": backend}
    want = scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept], **options)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask, **options), want)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, ~keep] += 3.0
    other_v[:, :, ~keep] += 3.0
    torch.testing.assert_close(scaled_dot_product_attention(q, other_k, other_v, mask, **options), want)


# -------------------------------------------------------------------------------------------------- packed sequences


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_equal_separate_ones(name, backend, causal):
    lengths_q, lengths_k = [3, 1, 0, 7], [5, 1, 4, 6]
    q = torch.randn(sum(lengths_q), 4, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(sum(lengths_k), 2, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(sum(lengths_k), 2, 6, dtype=torch.float64, requires_grad=True)
    sink = sink_for(name, 4)
    cu_q = torch.tensor([0, *lengths_q]).cumsum(0).int()
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).int()
    got = varlen_attention(
        q, k, v, cu_q, cu_k, 7, 6, is_causal=causal, normalizer=name, sink=sink, backend=backend, return_stats=True
    )
    parts = [
        oracle(
            q[a:b].transpose(0, 1)[None],
            k[c:d].transpose(0, 1)[None],
            v[c:d].transpose(0, 1)[None],
            name,
            causal="bottom_right" if causal else None,
            right=0 if causal else -1,
            sink=sink,
        )
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
        if b > a
    ]
    want = torch.cat([out[0].transpose(0, 1) for out, _ in parts])
    torch.testing.assert_close(got.output, want)
    torch.testing.assert_close(got.row_mass, torch.cat([w[0].sum(-1) for _, w in parts], dim=1))
    leaves = [q, k, v] + ([sink] if sink is not None else [])
    grad = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got.output, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


# -------------------------------------------------------------------------------------------------- statistics, dropout


@pytest.mark.parametrize("name", NAMES)
def test_partial_results_merge_by_lse(name):
    """o = sum_p e^{L_p - L} o_p: what decoding over split keys relies on. eps and constants belong to one part only."""
    if NORMALIZERS[name].constant:
        pytest.skip("the denominator constant is added once")
    q, k, v = make(b=1, h=1, hkv=1)
    options = {"normalizer": name, "eps": 0.0, "return_stats": True, "backend": "tiled"}
    whole = scaled_dot_product_attention(q, k, v, **options)
    parts = [scaled_dot_product_attention(q, k[:, :, s], v[:, :, s], **options) for s in (slice(0, 4), slice(4, 13))]
    lse = torch.stack([p.lse for p in parts])
    total = torch.logsumexp(lse, 0)
    weight = torch.exp(lse - total.masked_fill(total == -math.inf, 0.0))
    torch.testing.assert_close(sum(w[..., None] * p.output for w, p in zip(weight, parts, strict=True)), whole.output)
    torch.testing.assert_close(total, whole.lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    q, k = torch.randn(1, 1, 400, 8), torch.randn(1, 1, 600, 8)
    v = torch.eye(600)[None, None]  # the output is the weights
    plain = scaled_dot_product_attention(q, k, v, backend=backend)
    torch.manual_seed(1)
    dropped = scaled_dot_product_attention(q, k, v, dropout_p=0.25, backend=backend)
    seen = plain > 0
    zero = (dropped == 0) & seen
    assert abs(zero.sum() / seen.sum() - 0.25) < 0.01
    torch.testing.assert_close(dropped[seen & ~zero], plain[seen & ~zero] / 0.75)
    torch.manual_seed(1)
    assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.25, backend=backend), dropped)
    assert not torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.25, backend=backend), dropped)
    assert (scaled_dot_product_attention(q, k, v, dropout_p=1.0, backend=backend) == 0).all()


def test_dropout_gradient_uses_the_same_mask(tiles):
    q, k, v = make(b=1, h=2, hkv=1, tq=7, tk=11)

    def f(q, k, v):
        torch.manual_seed(3)
        return scaled_dot_product_attention(q, k, v, dropout_p=0.4, enable_gqa=True, backend="tiled")

    assert torch.autograd.gradcheck(f, (q, k, v), atol=1e-4)


# -------------------------------------------------------------------------------------------------- torch machinery


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_differentiable_twice(name):
    q, k, v = make(b=1, h=1, hkv=1, tq=3, tk=3, d=2, dv=2)
    sink = sink_for(name, 1)

    def f(q, k, v, *sinks):
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, normalizer=name, backend="reference", sink=sinks[0] if sinks else None
        )

    inputs = (q, k, v) if sink is None else (q, k, v, sink)
    if not NORMALIZERS[name].negative_gradient:  # whose backward pass is by design not the derivative
        (g,) = torch.autograd.grad(f(*inputs).square().sum(), q, create_graph=True)
        assert torch.autograd.grad(g.sum(), q)[0].isfinite().all()
        return
    assert torch.autograd.gradcheck(f, inputs, atol=2e-5)
    assert torch.autograd.gradgradcheck(f, inputs, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    q, k, v = make()
    sink = sink_for("learned_sink", 4)

    def f(q, k, v):
        return scaled_dot_product_attention(
            q * 2, k, v, dropout_p=0.2, enable_gqa=True, normalizer="learned_sink", sink=sink, backend=backend
        )

    results = []
    for run in (f, lambda *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(run(q, k, v).sum(), (q, k, v, sink)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tiled_refuses_double_backward():
    q, k, v = make()
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="tiled")
    (g,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="the tiled backend has no gradient of gradients; use backend='reference'"
    ):
        g.sum().backward()


@pytest.mark.parametrize("pattern", ["causal", "boolean mask", "additive"])
def test_opcheck(pattern):
    q, k, v = make(dtype=torch.float32)
    mask, _ = arguments(pattern, 2, 4, 9, 13)
    mask = mask.detach().float() if mask is not None and mask.dtype != torch.bool else mask
    tail = ("tiled", 0, 0)
    args = (q, k, v, mask, None, None, None, None, "softpick", 0.3, 1e-6, -1, 0, False, 0.0, 0.0, True, *tail)
    torch.library.opcheck(torch.ops.softpick.attention_forward.default, args)
    sink = torch.randn(4, requires_grad=True)
    args = (q, k, v, mask, sink, None, None, None, "learned_sink", 0.3, 0.0, -1, -1, False, 0.0, 0.0, False, *tail)
    torch.library.opcheck(torch.ops.softpick.attention_forward.default, args)


@pytest.mark.thinned
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["softpick", "learned_sink"])
def test_compiles_to_one_graph(backend, name):
    q, k, v = make(dtype=torch.float32)
    sink = sink_for(name, 4, torch.float32)

    def f(q, k, v):
        return scaled_dot_product_attention(
            q * 1.0, k, v, is_causal=True, enable_gqa=True, backend=backend, normalizer=name, sink=sink
        )

    compiled = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), f(q, k, v))
    for one, other in zip(
        torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)),
        torch.autograd.grad(f(q, k, v).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_is_torchs(backend):
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, backend=backend)
    assert out.dtype == torch.bfloat16
    low = [t.bfloat16().double() for t in (q, k, v)]
    want = scaled_dot_product_attention(*low, is_causal=True, backend="reference")
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


def test_memory_is_linear_in_the_length():
    """The tiled path never holds a T x T matrix: the largest tensor it makes is far smaller, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.untyped_storage().nbytes() // 4)
            return out

    t = 4096
    q, k, v = (torch.randn(1, 1, t, 8, requires_grad=True) for _ in range(3))
    with Largest() as mode:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, backend="tiled")
        torch.autograd.grad(out.sum(), (q, k, v))
    assert mode.numel <= max(cpu.TILE_SCORES, 8 * t)


def test_a_tiny_model_trains_alike_with_both_backends():
    """Ten steps of training follow the same loss with the tiles and with the full matrix."""
    losses = []
    for backend in BACKENDS:
        torch.manual_seed(0)
        layer = softpick.nn.Attention(16, 4, 2, is_causal=True, backend=backend).double()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        x = torch.randn(4, 33, 16, dtype=torch.float64)
        run = []
        for _ in range(10):
            loss = (layer(x)[:, 1:] - x[:, :-1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(float(loss))
        losses.append(run)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
