"""The Triton kernels in Triton's interpreter, on tensors of the CPU, against the fp64 oracle. test_triton_gpu.py: on a GPU."""

import math

import numpy as np
import pytest
import torch
from oracle import attention as oracle
from test_attention import PATTERNS, arguments, oracle_options, sink_for

from softpick import NORMALIZERS, decode_attention, functional, scaled_dot_product_attention, varlen_attention
from softpick.ops.calling import interpreted
from softpick.ops.operators import attention
from softpick.ops.spec import AttentionSpec

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("the kernels run on the GPU here", allow_module_level=True)

from softpick.ops.triton import dispatch, launch_decode, tuning

NAMES = list(NORMALIZERS)
# one of each base, of each treatment of negative scores, with and without a sink
KINDS = {(n.base, n.negative_gradient, n.needs_sink): n.name for n in reversed(NORMALIZERS.values())}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles so small that short sequences cross several: full ones, ones on the diagonal, ones at the end."""
    sizes(monkeypatch, dict.fromkeys(("forward", "queries", "keys", "decode", "decode_skip"), (16, 16)))


def sizes(monkeypatch, chosen):
    """Tiles of these sizes: kind of kernel to queries and keys."""
    usual = tuning.blocks

    def blocks(kind, *rest):
        return tuning.Blocks(*chosen[kind], 4, 1) if kind in chosen else usual(kind, *rest)

    monkeypatch.setattr(tuning, "blocks", blocks)


def make(b=2, h=2, hkv=1, tq=21, tk=37, d=8, dv=5, scale=1.0, dtype=torch.float32):
    q = torch.randn(b, h, tq, d) * scale
    k, v = torch.randn(b, hkv, tk, d), torch.randn(b, hkv, tk, dv)
    return [t.to(dtype).requires_grad_() for t in (q, k, v)]


def close(got, want, tolerance=1e-5):
    """Relative to the size of the whole, and nothing may be NaN."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    same = got == want  # infinities
    difference = torch.where(same, 0.0, got - want)
    size = torch.where(want.isfinite(), want, 0.0).norm()
    assert difference.norm() <= tolerance * (size + 0.1), (float(difference.norm()), float(size))


def exact(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def check(name, q, k, v, mask=None, sink=None, tolerance=1e-5, **options):
    """Output, statistics and gradients of the kernels against the reference in fp64, itself tested against the oracle."""
    truth = exact(q, k, v, sink)
    true_mask = mask if mask is None or mask.dtype == torch.bool else exact(mask)[0]
    common = {"enable_gqa": True, "normalizer": name, "return_stats": True, **options}
    want = scaled_dot_product_attention(*truth[:3], true_mask, sink=truth[3], backend="reference", **common)
    got = scaled_dot_product_attention(q, k, v, mask, sink=sink, backend="triton", **common)
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other, tolerance)
    leaves = [x for x in (q, k, v, sink, mask) if x is not None and x.requires_grad]
    true_leaves = [x for x in (*truth, true_mask) if x is not None and x.requires_grad]
    if leaves:
        grad = torch.randn_like(got.output)
        got_grads = torch.autograd.grad(got.output, leaves, grad)
        want_grads = torch.autograd.grad(want.output, true_leaves, grad.double())
        for one, other in zip(got_grads, want_grads, strict=True):
            close(one, other, 5 * tolerance)
    return got


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.thinned(2)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_oracle_forward_and_backward(name, pattern, poisoned):
    q, k, v = make()
    mask, options = arguments(pattern, 2, 2, 21, 37)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach().float().requires_grad_()
    sink = sink_for(name, 2, torch.float32)
    leaves = [x for x in (q, k, v, sink, mask) if x is not None and x.requires_grad]
    want, weights = oracle(q, k, v, name, mask=mask, sink=sink, **oracle_options(options))
    grad = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, leaves, grad)
    got = scaled_dot_product_attention(
        q, k, v, mask, enable_gqa=True, normalizer=name, sink=sink, backend="triton", return_stats=True, **options
    )
    assert got.output.dtype == torch.float32
    close(got.output, want)
    close(got.row_mass, weights.sum(-1))
    for one, other in zip(torch.autograd.grad(got.output, leaves, grad.float()), want_grads, strict=True):
        close(one, other, 5e-5)
    truth = exact(q, k, v, sink)
    stats = scaled_dot_product_attention(
        *truth[:3],
        mask if mask is None or mask.dtype == torch.bool else mask.double(),
        enable_gqa=True,
        normalizer=name,
        sink=truth[3],
        backend="reference",
        return_stats=True,
        **options,
    )
    close(got.lse, stats.lse)
    close(got.max_score, stats.max_score)


@pytest.mark.thinned
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (1, 40), (33, 1), (16, 32), (5, 0), (0, 5)], ids=lambda t: str(t))
def test_awkward_lengths(name, tq, tk, poisoned):
    q, k, v = make(b=1, tq=tq, tk=tk)
    sink = sink_for(name, 2, torch.float32)
    check(name, q, k, v, sink=sink, is_causal=True, causal_alignment="bottom_right")


@pytest.mark.thinned
@pytest.mark.parametrize("name", ["softpick", "linear_softpick"])
@pytest.mark.parametrize(("d", "dv"), [(80, 5), (5, 80), (16, 16), (1, 1)])
def test_head_dimensions_and_groups(name, d, dv, poisoned):
    q, k, v = make(b=1, h=4, hkv=2, tq=18, tk=19, d=d, dv=dv)
    check(name, q, k, v, is_causal=True)


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("layout", ["heads last", "every second", "expanded", "transposed head dim"])
def test_strides(layout, poisoned):
    def strided(x):
        if layout == "heads last":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "every second":
            x = x.repeat_interleave(2, 2)[:, :, ::2]
        elif layout == "expanded":
            x = x[:, :1, :, :1].expand(*x.shape[:1], 2, *x.shape[2:])
        else:
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        assert not x.is_contiguous()
        return x

    q, k, v = (strided(t.detach()).requires_grad_() for t in make(h=2, hkv=2))
    mask = torch.rand(2, 1, 21, 37).transpose(2, 3).contiguous().transpose(2, 3) > 0.3
    check("softpick", q, k, v, mask, is_causal=True)
    # the gradient of an expanded output: strides 0
    out = scaled_dot_product_attention(q, k, v, mask, backend="triton")
    want = scaled_dot_product_attention(*exact(q, k, v), mask, backend="reference")
    close(out, want)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    truth = exact(q, k, v)
    wanted = torch.autograd.grad(scaled_dot_product_attention(*truth, mask, backend="reference").sum(), truth)
    for one, other in zip(grads, wanted, strict=True):
        close(one, other, 5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_hurt(name, poisoned):
    """All negative, all zero, huge, one key, all masked: in one call, finite, and as the oracle says."""
    scores = torch.tensor([-30.0, 0.0, 1e4, -1e4, 1e-6, 2.0, 3.0])
    q = scores[None, None, :, None].repeat(1, 1, 1, 4)
    k = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0, 3.0])[:, None].repeat(1, 1, 1, 4).clone()
    v = torch.randn(1, 1, 6, 3)
    mask = torch.ones(7, 6, dtype=torch.bool)
    mask[5] = False
    mask[6, 1:] = False
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    sink = sink_for(name, 1, torch.float32)
    got = scaled_dot_product_attention(q, k, v, mask, normalizer=name, sink=sink, backend="triton", return_stats=True)
    want, _ = oracle(q, k, v, name, mask=mask, sink=sink)
    torch.testing.assert_close(got.output.double(), want, rtol=1e-4, atol=1e-5)
    assert (got.output[0, 0, 5] == 0).all()
    assert got.max_score[0, 0, 5] == -math.inf
    if NORMALIZERS[name].sparse:
        assert (got.output[0, 0, [0, 3]] == 0).all()
        assert (got.row_mass[0, 0, [0, 3]] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.output.sum(), (q, k, v)))


def test_a_row_without_a_positive_score_has_no_gradient():
    q, k, v = make(b=1, h=1, tq=20, tk=20)
    with torch.no_grad():
        k.copy_(k.abs())
        q.copy_(q.abs())
        q[:, :, 3:18] *= -1
    out = scaled_dot_product_attention(q, k, v, backend="triton")
    (dq,) = torch.autograd.grad(out.square().sum(), q)
    assert (out[:, :, 3:18] == 0).all()
    assert (dq[:, :, 3:18] == 0).all()
    assert (dq[:, :, :3] != 0).any()


def test_half_precision_inputs():
    q, k, v = make(dtype=torch.float16)
    got = check("softpick", q, k, v, is_causal=True, tolerance=2e-3)
    assert got.output.dtype == torch.float16
    assert got.lse.dtype == torch.float32


@pytest.mark.thinned
@pytest.mark.parametrize("name", [n for n in NAMES if NORMALIZERS[n].exponential])
@pytest.mark.parametrize("scale", [0.3, 60.0], ids=["as hoped", "overflow"])
def test_without_a_running_maximum(name, scale, monkeypatch, poisoned):
    """The optimistic path, which is for bf16 on a GPU: right where nothing overflows, and does it again where it does."""
    q, k, v = make(b=1, scale=scale)
    sink = sink_for(name, 2, torch.float32)
    honest = scaled_dot_product_attention(q, k, v, enable_gqa=True, normalizer=name, sink=sink, backend="triton")
    monkeypatch.setattr(dispatch, "optimistic", lambda dtype, spec: True)
    hoped = scaled_dot_product_attention(q, k, v, enable_gqa=True, normalizer=name, sink=sink, backend="triton")
    assert not torch.equal(honest, hoped) or scale > 1 or not NORMALIZERS[name].sparse  # the path is another one
    check(name, q, k, v, sink=sink, is_causal=True, tolerance=1e-4)


@pytest.mark.parametrize("name", ["softpick", "relu_softpick"])
@pytest.mark.parametrize(
    "shapes",
    [
        {"forward": (32, 16), "queries": (32, 16), "keys": (16, 32)},
        {"forward": (16, 32), "queries": (16, 32), "keys": (32, 16)},
    ],
    ids=["wide", "tall"],
)
def test_tiles_of_other_shapes(name, shapes, monkeypatch, poisoned):
    sizes(monkeypatch, shapes)
    check(name, *make(b=1, tq=50, tk=65), is_causal=True)
    check(name, *make(b=1, tq=1, tk=1), is_causal=True)


@pytest.mark.parametrize("name", ["softpick", "relu_softpick"])
def test_fp16_at_tiny_scores(name, poisoned):
    """Weights relative to m are near 1e-5 here, where fp16 has hardly a bit; and the gradient leaves the range of fp16."""
    q, k, v = make(b=1, scale=1e-5, dtype=torch.float16)
    truth = exact(q, k, v)
    options = {"enable_gqa": True, "normalizer": name}
    want = scaled_dot_product_attention(*truth, backend="reference", **options)
    got = scaled_dot_product_attention(q, k, v, backend="triton", **options)
    close(got, want, 2e-2)
    for g in torch.autograd.grad(got.sum(), (q, k, v)):
        assert g.isfinite().all()


@pytest.mark.thinned
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_fp16_from_small_to_large_scores(name, scale, poisoned):
    """Early rows under a causal mask have few small scores: ``ds`` is beyond fp16 where its products are not. Large queries
    leave no room for a factor that keeps it inside.
    """
    q, k, v = make(b=1, h=1, tq=64, tk=64, d=32, dv=32, scale=scale, dtype=torch.float16)
    truth = exact(q, k, v)
    sink, options = sink_for(name, 1, torch.float32), {"enable_gqa": True, "normalizer": name, "is_causal": True}
    want = scaled_dot_product_attention(*truth, sink=exact(sink)[0], backend="reference", **options)
    got = scaled_dot_product_attention(q, k, v, sink=sink, backend="triton", **options)
    close(got, want, 2e-3)
    grad = (20 * torch.randn_like(want)).half()
    got_grads = torch.autograd.grad(got, (q, k, v), grad)
    for one, other in zip(got_grads, torch.autograd.grad(want, truth, grad.double()), strict=True):
        close(one, other, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_without_a_bound_in_decoding(dtype, poisoned):
    q, k, v = (t.detach() for t in make(h=2, hkv=1, tq=1, tk=60, d=32, dv=32, scale=1e3, dtype=dtype))
    options = {"normalizer": "linear_softpick"}
    want = decode_attention(*exact(q, k, v), backend="reference", **options)
    close(decode_attention(q, k, v, backend="triton", **options), want, 2e-3 if dtype == torch.float16 else 1e-5)


def test_dropping_everything():
    q, k, v = make()
    out = scaled_dot_product_attention(q, k, v, dropout_p=1.0, enable_gqa=True, backend="triton")
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


# ----------------------------------------------------------------------------------------------------- packed sequences


@pytest.mark.thinned(every=7)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_equal_separate_ones(name, causal, poisoned):
    lengths_q, lengths_k = [18, 1, 0, 7], [5, 1, 20, 6]
    q, k, v = (torch.randn(n, h, d) for n, h, d in ((26, 4, 8), (32, 2, 8), (32, 2, 6)))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    sink = sink_for(name, 4, torch.float32)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    more = {"is_causal": causal, "normalizer": name, "return_stats": True}
    got = varlen_attention(q, k, v, cu_q, cu_k, sink=sink, backend="triton", **more)
    truth = exact(q, k, v, sink)
    want = varlen_attention(*truth[:3], cu_q, cu_k, sink=truth[3], backend="reference", **more)
    for one, other in zip(got[:4], want[:4], strict=True):
        close(one, other)
    leaves, true_leaves = ([x for x in xs if x is not None] for xs in ((q, k, v, sink), truth))
    grad = torch.randn_like(got.output)
    for one, other in zip(
        torch.autograd.grad(got.output, leaves, grad),
        torch.autograd.grad(want.output, true_leaves, grad.double()),
        strict=True,
    ):
        close(one, other, 5e-5)
    given = varlen_attention(q, k, v, cu_q.long(), cu_k.long(), 18, 20, sink=sink, backend="triton", **more)
    assert torch.equal(given.output, got.output)


def test_rows_beyond_the_last_sequence_get_no_gradient():
    q, k, v = make(b=1, tq=30, tk=30)
    cu = torch.tensor([0, 9, 20], dtype=torch.int32)
    options = {"normalizer": "softpick", "scale": 1.0, "eps": 1e-6, "left": -1, "right": -1}
    options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    out = attention(q, k, v, backend="triton", max_seqlen_q=30, max_seqlen_k=30, **options)[0]
    grads = torch.autograd.grad(out[:, :, :20].sum(), (q, k, v))
    for g in grads:
        assert (g[:, :, 20:] == 0).all()
        assert (g[:, :, :20] != 0).any()


# -------------------------------------------------------------------------------------------------------------- dropout


def test_dropout():
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 60, 8)
    v = torch.eye(60).expand(1, 2, 60, 60)  # the output is the weights
    options = {"backend": "triton"}
    plain = scaled_dot_product_attention(q, k, v, **options)
    torch.manual_seed(1)
    dropped = [scaled_dot_product_attention(q, k, v, dropout_p=0.25, **options) for _ in range(3)]
    seen = plain > 0
    for one in dropped:
        zero = (one == 0) & seen
        assert abs(zero.sum() / seen.sum() - 0.25) < 0.04
        torch.testing.assert_close(one[seen & ~zero], plain[seen & ~zero] / 0.75)
    assert not torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0][0, 0] == 0, dropped[0][0, 1] == 0)  # heads differ
    torch.manual_seed(1)
    assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.25, **options), dropped[0])


@pytest.mark.thinned(every=3)
@pytest.mark.parametrize("name", NAMES)
def test_dropout_gradient_uses_the_same_mask(name):
    q, k, _ = make(b=1, h=2, hkv=2, tq=18, tk=20)
    eye, v = torch.eye(20).expand(1, 2, 20, 20), torch.randn(1, 2, 20, 20, requires_grad=True)
    sink = sink_for(name, 2, torch.float32)

    def run(v):
        torch.manual_seed(3)
        return scaled_dot_product_attention(q, k, v, dropout_p=0.4, normalizer=name, sink=sink, backend="triton")

    truth = exact(q, k, v, sink)
    weights = scaled_dot_product_attention(*truth[:3], normalizer=name, sink=truth[3], return_weights=True).weights
    kept = (run(eye).double() / weights.detach()).nan_to_num().round(decimals=3)
    assert set(kept.unique().tolist()) <= {0.0, 1.667}
    want = (weights * (kept > 0) / 0.6) @ truth[2]
    got = run(v)
    close(got, want)
    leaves, true_leaves = ([x for x in xs if x is not None] for xs in ((q, k, v, sink), truth))
    grad = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, true_leaves, grad.double()), strict=True
    ):
        close(one, other, 5e-5)


# ------------------------------------------------------------------------------------------------------------- decoding

CACHES = {
    "full": {},
    "lengths": {"lengths": [29, 0]},
    "one length": {"lengths": [1, 45]},
    "window": {"lengths": [45, 20], "window": (7, 0)},
    "softcap": {"softcap": 1.5},
    "all keys": {"lengths": [33, 17], "is_causal": False},
    "pages of 16": {"lengths": [40, 3], "page": 16},
    "pages of 7": {"lengths": [40, 8], "page": 7},
    "full pages": {"page": 5},
}


def paged(x, page):
    """``(B, Hkv, S, D)`` as shuffled pages ``(num_blocks, page, Hkv, D)`` with some to spare, and the table."""
    b, hkv, s, d = x.shape
    count = -(-s // page)
    padded = torch.full((b, hkv, count * page, d), math.nan)
    padded[:, :, :s] = x
    blocks = padded.view(b, hkv, count, page, d).permute(0, 2, 3, 1, 4).reshape(b * count, page, hkv, d)
    order = torch.randperm(b * count + 2, generator=torch.Generator().manual_seed(5))[: b * count]
    pages = torch.full((b * count + 2, page, hkv, d), math.nan)
    pages[order] = blocks
    return pages, order.view(b, count).int()


@pytest.mark.thinned
@pytest.mark.parametrize("case", CACHES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_decoding_matches_the_oracle(backend, name, case, poisoned):
    options = dict(CACHES[case])
    lengths, page = options.pop("lengths", None), options.pop("page", None)
    tq = 1 + NAMES.index(name) % 5
    h, hkv = ((4, 2), (2, 2), (6, 1))[NAMES.index(name) % 3]
    q, k, v = (t.detach() for t in make(h=h, hkv=hkv, tq=tq, tk=45))
    sink = sink_for(name, h, torch.float32)
    window = options.get("window", (-1, -1))
    wants = [
        oracle(
            q[i : i + 1],
            k[i : i + 1, :, :n],
            v[i : i + 1, :, :n],
            name,
            causal="bottom_right" if options.get("is_causal", True) else None,
            left=window[0],
            softcap=options.get("softcap"),
            sink=sink,
        )[0]
        for i, n in enumerate(lengths or [45, 45])
    ]
    seqlens = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    if lengths is not None:  # what is not filled must not be read
        empty = (torch.arange(45) >= seqlens[:, None])[:, None, :, None]
        k, v = (x.masked_fill(empty, math.nan) for x in (k, v))
    table = None
    if page is not None:
        (k, table), (v, _) = paged(k, page), paged(v, page)
        if lengths is not None:
            table = table.masked_fill(torch.arange(table.shape[1]) * page >= seqlens[:, None], -7)
    with torch.no_grad():
        out, lse = decode_attention(
            q,
            k,
            v,
            cache_seqlens=seqlens,
            block_table=table,
            normalizer=name,
            sink=sink,
            backend=backend,
            return_lse=True,
            **options,
        )
    close(out, torch.cat(wants))
    assert lse.shape == (2, h, tq)
    assert not lse.isnan().any()


def test_a_window_of_any_size_does_not_overflow(poisoned):
    q, k, v = make(tq=21, tk=37)
    for window in ((2**31 - 1, 2**31 - 1), (2**62, 0)):
        check("softpick", q, k, v, window=window)
        with torch.no_grad():
            few = [t.detach()[:, :, :2] if t is q else t.detach() for t in (q, k, v)]
            want = decode_attention(*exact(*few), window=window, is_causal=False, backend="reference")
            close(decode_attention(*few, window=window, is_causal=False, backend="triton"), want)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_over_several_splits_of_the_keys(name, monkeypatch, poisoned):
    monkeypatch.setattr(launch_decode, "_splits", lambda resident, fewest, pairs, tk, block_n: (-(-tk // 32), 32))
    q, k, v = (t.detach() for t in make(h=4, hkv=2, tq=2, tk=150))
    sink = sink_for(name, 4, torch.float32)
    with torch.no_grad():
        lengths = torch.tensor([150, 37])
        options = {"normalizer": name, "cache_seqlens": lengths, "return_lse": True}
        got = decode_attention(q, k, v, sink=sink, backend="triton", **options)
        true = exact(q, k, v, sink)
        want = decode_attention(*true[:3], sink=true[3], backend="reference", **options)
    for one, other in zip(got, want, strict=True):
        close(one, other)


def test_tensors_for_which_a_launch_is_the_same():
    from softpick.ops.triton.kernel_cache import described

    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert described(x) == described(torch.ones_like(x)) == described(torch.nn.Parameter(x))
    flat = torch.zeros(300, dtype=torch.bfloat16)
    others = x[:3], x.T, x.half(), x.float(), flat[1:257].view(4, 64), x[:, :32], None
    assert len({described(y) for y in (x, *others)}) == 1 + len(others)


def test_arguments_that_mean_the_same_to_a_kernel():
    """What Triton takes, as it distinguishes it (its own rules are in C++)."""
    from softpick.ops.triton.kernel_cache import _meaning

    x = torch.zeros(64, dtype=torch.bfloat16)
    assert _meaning(x) == _meaning(x[8:]) == _meaning(torch.nn.Parameter(x))
    assert len({_meaning(y) for y in (x, x[1:], x.float(), x.float()[1:])}) == 4
    assert _meaning(1.5) == _meaning(np.float64(2.5)) != _meaning(1)
    assert _meaning(True) != _meaning(1) != _meaning(2)
    assert _meaning(None) is None


@pytest.mark.thinned
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", KINDS.values())
def test_few_queries_without_gradient_are_decoded(name, pattern, monkeypatch, poisoned):
    calls = []
    original = functional.decode
    monkeypatch.setattr(functional, "decode", lambda *args: calls.append(args) or original(*args))
    q, k, v = make(tq=3)
    mask, options = arguments(pattern, 2, 2, 3, 37)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach().float()
    sink = sink_for(name, 2, torch.float32)
    common = {"enable_gqa": True, "normalizer": name, "sink": sink, **options}
    with torch.no_grad():
        got = scaled_dot_product_attention(q, k, v, mask, backend="triton", **common)
    assert len(calls) == 1
    want, _ = oracle(q, k, v, name, mask=mask, sink=sink, **oracle_options(options))
    close(got, want)
    scaled_dot_product_attention(q, k, v, mask, backend="triton", **common)  # a gradient is recorded
    assert len(calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_decoding_with_skipping_changes_no_bit(name, monkeypatch):
    norm = NORMALIZERS[name]
    q, k, v = (t.detach() for t in make(tq=1, tk=100))
    k = torch.where(torch.arange(100)[:, None] < 50, -q.mean(1, keepdim=True) * k.abs(), k)
    sink = sink_for(name, 2, torch.float32)
    results = []
    for skip in (False, True):
        out, lse = torch.full((2, 2, 1, 5), math.nan), torch.full((2, 2, 1), math.nan)
        spec = AttentionSpec(norm, 0.3, norm.eps, bottom_right=True)
        monkeypatch.setattr(launch_decode, "skips_values", lambda spec, *_, s=skip: spec.norm.sparse and s)
        launch_decode.decode(spec, q, k, v, None, sink, None, None, out, lse)
        results.append((out, lse))
    assert not results[0][0].isnan().any()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
