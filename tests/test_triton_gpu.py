"""The Triton kernels on a GPU, through the public functions, against the reference in fp64 (itself tested on the CPU).

Needs torch, Triton, pytest and, for generation, transformers, nothing else. Triton compiles a variant in seconds on one
core and keeps it on disk, so the first test lets a few processes compile side by side (:func:`_compiled`).
"""

import functools
import math
import os
import subprocess
import sys
import warnings

import few_keys
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import softpick
from softpick import NORMALIZERS, decode_attention, functional, scaled_dot_product_attention, varlen_attention
from softpick.ops import backends, operators_rows, vector

pytestmark = pytest.mark.gpu

NAMES = list(NORMALIZERS)
DEVICE = "cuda"
for_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="kernels for Hopper GPUs"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# relative error of the output and of gradients
TOLERANCE = {BF16: (1e-2, 2e-2), FP16: (2e-3, 4e-3), FP32: (1e-5, 1e-4)}

PATTERNS = {
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"is_causal": True, "window": 50},
    "two-sided window": {"window": (60, 20)},
    "softcap": {"softcap": 1.5},
    "boolean mask": {"mask": "bool"},
    "padding": {"mask": "padding", "is_causal": True},
    "additive, causal, softcap": {"mask": "float", "is_causal": True, "softcap": 2.0},
}


def case(name, b=2, h=4, hkv=2, tq=200, tk=257, d=64, dv=64, dtype=BF16, **options):
    return {"name": name, "shape": (b, h, hkv, tq, tk, d, dv), "dtype": dtype, "options": options}


CASES = {f"{name}-{pattern}": case(name, **options) for pattern, options in PATTERNS.items() for name in NAMES}
CASES |= {
    f"{name}-length {t}": case(name, 1, 2, 1, t, t, is_causal=True)
    for t in (1, 127, 1000, 2049)
    for name in ("softpick", "softmax", "linear_softpick")
}
CASES |= {
    f"softpick-{str(dtype)[6:]}-{d}-{dv}": case("softpick", d=d, dv=dv, dtype=dtype, is_causal=True)
    for d, dv in ((16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    for dtype in (BF16, FP16, FP32)
    if (d, dtype) != (64, BF16)
}


def inputs(shape, dtype, scale=1.0, seed=0):
    b, h, hkv, tq, tk, d, dv = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, h, tq, d), (b, hkv, tk, d), (b, hkv, tk, dv))
    q, k, v = (torch.randn(size, generator=generator).to(DEVICE) for size in sizes)
    return [t.to(dtype).requires_grad_() for t in (q * scale, k, v)]


def exact(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def sink_for(name, heads):
    return torch.randn(heads, device=DEVICE).requires_grad_() if name == "learned_sink" else None


def mask_for(kind, shape, dtype):
    b, h, _, tq, tk, _, _ = shape
    generator = torch.Generator().manual_seed(3)
    if kind == "bool":
        return (torch.rand(b, 1, tq, tk, generator=generator) > 0.4).to(DEVICE)
    if kind == "padding":
        return (torch.arange(tk) >= torch.arange(b)[:, None] * 40)[:, None, None].to(DEVICE)
    mask = torch.randn(1, h, tq, tk, generator=generator)
    hidden = torch.rand(tq, tk, generator=generator) > 0.6
    return mask.to(dtype).masked_fill(hidden, -math.inf).to(DEVICE).requires_grad_()


def relative(got, want):
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    difference = torch.where(got == want, 0.0, got - want)  # equal infinities
    return float(difference.norm() / (torch.where(want.isfinite(), want, 0.0).norm() + 1e-2))


def attend(q, k, v, mask=None, sink=None, **options):
    return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, sink=sink, **options)


def errors(setting):
    """Relative errors of output, lse, row mass and largest score, and of the gradients."""
    options = dict(setting["options"])
    kind = options.pop("mask", None)
    shape, dtype, name = setting["shape"], setting["dtype"], setting["name"]
    q, k, v = inputs(shape, dtype)
    mask, sink = None if kind is None else mask_for(kind, shape, dtype), sink_for(name, shape[1])
    common = {"normalizer": name, "return_stats": True, **options}
    got = attend(q, k, v, mask, sink, **common)  # backend="auto"
    true = exact(q, k, v, sink)
    true_mask = mask if mask is None or mask.dtype == torch.bool else exact(mask)[0]
    want = attend(*true[:3], true_mask, true[3], backend="reference", **common)
    leaves = [x for x in (q, k, v, sink, mask) if x is not None and x.requires_grad]
    true_leaves = [x for x in (*true, true_mask) if x is not None and x.requires_grad]
    grad = torch.randn_like(got.output)
    grads = torch.autograd.grad(got.output, leaves, grad)
    want_grads = torch.autograd.grad(want.output, true_leaves, grad.double())
    return (
        [relative(a, b) for a, b in zip(got[:4], want[:4], strict=True)],
        [relative(a, b) for a, b in zip(grads, want_grads, strict=True)],
    )


def _compile(part, parts):
    """What one of the processes does: every variant of its share of the cases, into Triton's cache."""
    for index, setting in enumerate(CASES.values()):
        if index % parts == part:
            errors(setting)


@pytest.fixture(scope="session", autouse=True)
def _compiled(request):
    wanted = any("test_matches_the_reference" in item.name for item in request.session.items)
    workers = "PYTEST_XDIST_WORKER" in os.environ  # they compile side by side by themselves
    if not wanted or workers or not torch.cuda.is_available():
        return
    parts = min(12, os.cpu_count() or 1)
    runs = [subprocess.Popen([sys.executable, __file__, str(part), str(parts)]) for part in range(parts)]
    for run in runs:
        run.wait()  # a failure shows again in the test of that case


@pytest.mark.parametrize("setting", CASES.values(), ids=CASES)
def test_matches_the_reference(setting, poisoned, monkeypatch):
    chosen = []
    original = functional.attention
    monkeypatch.setattr(functional, "attention", lambda *a, **k: chosen.append(k["backend"]) or original(*a, **k))
    forward, backward = errors(setting)
    assert chosen == ["auto"]  # by Triton, or by tiles where that cannot be built
    limits = TOLERANCE[setting["dtype"]]
    assert max(forward) < limits[0], forward
    assert max(backward) < limits[1], backward


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_error_against_fp64_is_that_of_flash_attention(name, scale, dtype):
    """Budget: 1.5 times the relative Frobenius error of torch's flash attention (softmax) with the same inputs."""
    shape = (2, 4, 4, 512, 512, 64, 64)
    grad = torch.ones(64, device=DEVICE, dtype=torch.float64) + torch.arange(64, device=DEVICE)

    def error(f):
        leaves = inputs(shape, dtype, scale)
        true = exact(*leaves)
        out, want = f(*leaves), f(*true)
        weight = grad.expand_as(want)
        grads = torch.autograd.grad(out, leaves, weight.to(dtype))
        want_grads = torch.autograd.grad(want, true, weight)
        pairs = [(out, want), *zip(grads, want_grads, strict=True)]
        return [float((a.double() - b).norm() / b.norm()) for a, b in ((a.detach(), b.detach()) for a, b in pairs)]

    def flash(q, k, v):
        with sdpa_kernel(SDPBackend.MATH if q.dtype == torch.float64 else SDPBackend.FLASH_ATTENTION):
            return torch_attention(q, k, v, is_causal=True)

    sink = sink_for(name, 4)

    def ours(q, k, v):
        exactly = q.dtype == torch.float64
        out = attend(
            q,
            k,
            v,
            sink=sink if sink is None or not exactly else sink.double(),
            is_causal=True,
            normalizer=name,
            backend="reference" if exactly else "triton",
            return_stats=True,
        )
        return out.output

    budget, got = error(flash), error(ours)
    # the floor: see the test of the same name in test_attention.py
    floor = 2 * torch.finfo(dtype).eps
    limits = [1.5 * max(budget[0], floor)] + [1.5 * max(b, 4 * floor * (1 + scale)) for b in budget[1:]]
    assert all(g <= limit for g, limit in zip(got, limits, strict=True)), (got, limits)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_are_equal_bit_for_bit(name):
    sink = sink_for(name, 4)
    results = []
    for _ in range(3):
        q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), BF16)
        out = attend(q, k, v, sink=sink, normalizer=name, is_causal=True, return_stats=True).output
        leaves = [q, k, v] + ([] if sink is None else [sink])
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_hurt(name, poisoned):
    """All negative, zero, huge, one key, all masked: as the reference says, and finite."""
    q = torch.tensor([-30.0, 0.0, 1e3, -1e3, 1e-3, 2.0, 3.0], device=DEVICE)[:, None].repeat(1, 1, 1, 64)
    k = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0, 3.0], device=DEVICE)[:, None].repeat(1, 1, 1, 64)
    v = torch.randn(1, 1, 6, 64, device=DEVICE)
    mask = torch.ones(7, 6, dtype=torch.bool, device=DEVICE)
    mask[5] = False
    mask[6, 1:] = False
    q, k, v = (t.to(BF16).requires_grad_() for t in (q, k, v))
    sink = sink_for(name, 1)
    got = attend(q, k, v, mask, sink, normalizer=name, return_stats=True)
    true = exact(q, k, v, sink)
    want = attend(*true[:3], mask, true[3], normalizer=name, backend="reference", return_stats=True)
    for one, other in zip(got.output[0, 0], want.output[0, 0], strict=True):
        assert relative(one, other) < 2e-2
    assert (got.output[0, 0, 5] == 0).all()
    assert got.max_score[0, 0, 5] == -math.inf
    if NORMALIZERS[name].sparse:
        assert (got.output[0, 0, [0, 3]] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.output.sum(), (q, k, v)))


@pytest.mark.parametrize(("tq", "tk"), [(5, 0), (0, 5)])
def test_no_keys_or_no_queries(tq, tk, poisoned):
    q, k, v = inputs((1, 2, 2, tq, tk, 64, 64), BF16)
    out = attend(q, k, v)
    assert out.shape == (1, 2, tq, 64)
    assert (out == 0).all()
    for leaf, g in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(g, torch.zeros_like(leaf))


@pytest.mark.parametrize("name", ["softpick", "learned_sink", "linear_softpick"])
def test_packed_sequences(name, poisoned):
    lengths_q, lengths_k = [300, 1, 0, 77], [130, 1, 64, 200]
    q, k, v = (torch.randn(n, h, 64, device=DEVICE, dtype=BF16) for n, h in ((378, 4), (395, 2), (395, 2)))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    cu_q, cu_k = (torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in (lengths_q, lengths_k))
    sink = sink_for(name, 4)
    common = {"is_causal": True, "normalizer": name, "return_stats": True}
    got = varlen_attention(q, k, v, cu_q, cu_k, sink=sink, **common)
    true = exact(q, k, v, sink)
    want = varlen_attention(*true[:3], cu_q, cu_k, sink=true[3], backend="reference", **common)
    assert max(relative(a, b) for a, b in zip(got[:4], want[:4], strict=True)) < 1e-2
    leaves, true_leaves = ([x for x in xs if x is not None] for xs in ((q, k, v, sink), true))
    grad = torch.randn_like(got.output)
    grads = torch.autograd.grad(got.output, leaves, grad)
    want_grads = torch.autograd.grad(want.output, true_leaves, grad.double())
    assert max(relative(a, b) for a, b in zip(grads, want_grads, strict=True)) < 2e-2
    given = varlen_attention(q, k, v, cu_q, cu_k, 300, 200, sink=sink, **common)
    assert torch.equal(given.output, got.output)


def test_dropout():
    q, k, _ = (t.detach() for t in inputs((1, 2, 2, 128, 256, 64, 64), FP16))
    v = torch.eye(256, device=DEVICE, dtype=FP16).expand(1, 2, 256, 256)  # the output is the weights
    plain, dropped, none = (attend(q, k, v, dropout_p=p) for p in (0.0, 0.25, 1.0))
    seen = plain > 1e-3
    zero = (dropped == 0) & seen
    assert abs(zero.sum() / seen.sum() - 0.25) < 0.01
    torch.testing.assert_close(dropped[seen & ~zero], plain[seen & ~zero] / 0.75, rtol=5e-3, atol=1e-5)
    assert (none == 0).all()


# ------------------------------------------------------------------------------------------------------------- decoding


def paged(x, page):
    """``(B, Hkv, S, D)`` as shuffled pages ``(num_blocks, page, Hkv, D)`` and the table."""
    b, hkv, s, d = x.shape
    count = s // page
    blocks = x.view(b, hkv, count, page, d).permute(0, 2, 3, 1, 4).reshape(b * count, page, hkv, d)
    order = torch.randperm(b * count, generator=torch.Generator().manual_seed(5)).to(x.device)
    pages = torch.empty_like(blocks)
    pages[order] = blocks
    return pages, order.view(b, count).int()


@pytest.mark.parametrize("how", ["contiguous", "lengths", "static mask", "pages of 16", "pages of 64"])
@pytest.mark.parametrize("name", NAMES)
def test_decoding(name, how, poisoned):
    tq = 1 + NAMES.index(name) % 3
    q, k, v = (t.detach() for t in inputs((3, 8, 2, tq, 960, 128, 128), BF16))
    lengths = torch.tensor([960, 517, 3], device=DEVICE, dtype=torch.int32)
    sink = sink_for(name, 8)
    common = {"normalizer": name, "return_lse": True}
    with torch.no_grad():
        true = exact(q, k, v, sink)
        seqlens = None if how == "contiguous" else lengths
        want, want_lse = decode_attention(*true[:3], cache_seqlens=seqlens, sink=true[3], backend="reference", **common)
        if how == "static mask":
            j, i = torch.arange(960, device=DEVICE), torch.arange(tq, device=DEVICE)[:, None]
            mask = j <= lengths[:, None, None, None] - tq + i
            got = attend(q, k, v, mask, sink, normalizer=name)
            assert relative(got, want) < 1e-2
            return
        table = None
        if how.startswith("pages"):
            page = int(how.split()[-1])
            (k, table), (v, _) = paged(k, page), paged(v, page)
        got, lse = decode_attention(q, k, v, cache_seqlens=seqlens, block_table=table, sink=sink, **common)
    assert relative(got, want) < 1e-2
    assert relative(lse, want_lse) < 1e-3


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("name", NAMES)
def test_pages_that_do_not_exist_are_masked(name, page, monkeypatch, poisoned):
    """By the portable kernel and (pages of 64) the one for Hopper GPUs; looked at beforehand with SOFTPICK_DEBUG=1 only."""
    from softpick.ops.triton import launch

    monkeypatch.setattr(launch, "_FEWEST_CACHED", 0)
    q, k, v = (t.detach() for t in inputs((3, 8, 2, 2, 960, 128, 128), BF16))
    (k, table), (v, _) = paged(k, page), paged(v, page)
    table[0, 1], table[1, 0], table[1, 2], table[1, -1] = -1, k.shape[0], 2**31 - 1, -(2**31)
    table[2] = -1
    sink = sink_for(name, 8)
    common = {"normalizer": name, "return_lse": True, "block_table": table}
    with torch.no_grad():
        true = exact(q, k, v, sink)
        want, want_lse = decode_attention(*true[:3], sink=true[3], backend="reference", **common)
        got, lse = decode_attention(q, k, v, sink=sink, backend="triton", **common)
        assert relative(got, want) < 1e-2
        assert relative(lse, want_lse) < 1e-3
        monkeypatch.setenv("SOFTPICK_DEBUG", "1")
        with pytest.raises(ValueError, match="got -1 for block 1 of sequence 0"):
            decode_attention(q, k, v, sink=sink, backend="triton", **common)


@pytest.mark.parametrize("width", [64, 128])
def test_scores_and_sink_far_below_zero(width, monkeypatch, poisoned):
    """Nothing underflows, by whichever kernels: forward, backward and decoding."""
    from softpick.ops.triton import launch

    monkeypatch.setattr(launch, "_FEWEST_CACHED", 0)
    monkeypatch.setattr(launch, "_FEWEST_FORWARD", 0)
    q, k, v = inputs((1, 4, 4, 300, 1024, width, width), BF16)
    level = torch.tensor([-300.0, -200.0, -150.0, 0.0], device=DEVICE)
    with torch.no_grad():
        q.fill_(1.0)
        k += level[:, None, None] / width
    sink = (level + torch.tensor([9.0, 0.0, -70.0, 1.0], device=DEVICE)).requires_grad_()
    options = {"normalizer": "learned_sink", "scale": 1.0, "is_causal": True, "causal_alignment": "bottom_right"}
    grad, results = torch.randn(1, 4, 300, width, device=DEVICE), []
    for leaves, backend in (((q, k, v, sink), "triton"), (exact(q, k, v, sink), "reference")):
        out = attend(*leaves[:3], None, leaves[3], backend=backend, **options)
        gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        with torch.no_grad():
            few = decode_attention(
                leaves[0][:, :, :2], *leaves[1:3], sink=leaves[3], backend=backend, normalizer="learned_sink", scale=1.0,
                return_lse=True,
            )  # fmt: skip
        results.append([out, *gradients, *few])
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 2e-2


DECODED = {
    "contiguous": {},
    "one query": {"shape": (1, 4, 4, 1, 1, 128, 128)},
    "group of 8": {"shape": (2, 16, 2, 3, 1000, 128, 128)},
    "small heads": {"shape": (2, 8, 2, 2, 777, 80, 64)},
    "window": {"window": 100},
    "two-sided window and softcap": {"window": (70, 0), "softcap": 3.0},
    "huge": {"scale": 100.0},
    "all negative": {"scale": 3.0, "shift": -2.0},
    "far below zero": {"scale": 30.0, "shift": -4.0},
    "lengths": {"lengths": (960, 0, 333)},
    "pages": {"lengths": (961, 65, 1), "page": 64},
    "one a program": {"shape": (2, 8, 2, 2, 1024, 128, 128)},
    "one a program, lengths": {"shape": (2, 8, 2, 2, 1024, 128, 128), "lengths": (960, 0)},
    "two a program": {"shape": (4, 8, 2, 2, 1000, 128, 128)},
    "many sequences": {
        "shape": (150, 4, 2, 1, 192, 64, 64),
        "lengths": tuple(37 * i % 193 * (i % 3 > 0) for i in range(150)),
    },
}


@for_hopper
@pytest.mark.parametrize("multiprocessors", [None, 2])
@pytest.mark.parametrize("how", DECODED)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_for_hopper(name, how, multiprocessors, monkeypatch, poisoned):
    """The kernel in Gluon against fp64; skipping changes no bit; what lies beyond the lengths may be anything; few programs
    take many sequences and heads.
    """
    from softpick.ops.triton import dispatch, launch_decode, tuning

    taken = []
    original, decode = dispatch.hopper_refuses_decode, launch_decode.decode
    monkeypatch.setattr(tuning, "FEWEST_CACHED", 0)
    if multiprocessors:
        monkeypatch.setattr(tuning, "multiprocessors", lambda _: multiprocessors)
    monkeypatch.setattr(
        dispatch, "hopper_refuses_decode", lambda *args: (taken.append(original(*args) is None), original(*args))[1]
    )
    setting = {"shape": (3, 8, 2, 2, 1024, 128, 128), "scale": 1.0, "shift": 0.0, "lengths": None, "page": 0} | DECODED[
        how
    ]
    q, k, v = (t.detach() for t in inputs(setting["shape"], BF16, setting["scale"]))
    if setting["shift"]:
        q, k = q.abs(), k + setting["shift"]
    sink = sink_for(name, q.shape[1])
    lengths = setting["lengths"] and torch.tensor(setting["lengths"], device=DEVICE, dtype=torch.int32)
    common = {key: setting[key] for key in ("window", "softcap") if key in setting}
    with torch.no_grad():
        true = exact(q, k, v, sink)
        want, want_lse = decode_attention(
            *true[:3],
            cache_seqlens=lengths,
            sink=true[3],
            normalizer=name,
            backend="reference",
            return_lse=True,
            **common,
        )
        for i, length in enumerate(setting["lengths"] or ()):
            k[i, :, length:] = v[i, :, length:] = math.nan
        table = None
        if setting["page"]:
            (k, table), (v, _) = paged(k, setting["page"]), paged(v, setting["page"])
        results = []
        for skip in (None, False):
            monkeypatch.setattr(
                launch_decode, "decode", lambda spec, *rest, s=skip: decode(spec._replace(skip=s), *rest)
            )
            results.append(
                decode_attention(
                    q,
                    k,
                    v,
                    cache_seqlens=lengths,
                    block_table=table,
                    sink=sink,
                    normalizer=name,
                    return_lse=True,
                    **common,
                )
            )
    assert taken == [True, True]
    for (out, lse), again in zip(results, reversed(results), strict=True):
        assert torch.equal(out, again[0])
        assert relative(out, want) < 1e-2
        assert relative(lse, want_lse) < 1e-3


@for_hopper
@pytest.mark.parametrize("multiprocessors", [2, 3, 100])
def test_sums_out_of_range_are_decoded_again_for_hopper(multiprocessors, monkeypatch, poisoned):
    """Of a sequence and head in the middle of what a program takes; the others keep their bits, as on every run."""
    from softpick.ops.triton import tuning

    monkeypatch.setattr(tuning, "FEWEST_CACHED", 0)
    monkeypatch.setattr(tuning, "multiprocessors", lambda _: multiprocessors)
    q, k, v = (t.detach() for t in inputs((5, 8, 2, 1, 1024, 128, 128), BF16))
    lengths = torch.tensor([1024, 300, 0, 777, 65], device=DEVICE, dtype=torch.int32)
    huge = q.clone()
    huge[1, 4:] *= 100.0
    with torch.no_grad():
        usual = decode_attention(q, k, v, cache_seqlens=lengths)
        runs = [decode_attention(huge, k, v, cache_seqlens=lengths) for _ in range(3)]
        want = decode_attention(*exact(huge, k, v), cache_seqlens=lengths, backend="reference")
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert relative(runs[0], want) < 1e-2
    assert relative(runs[0][1, 4:], want[1, 4:]) < 1e-2
    runs[0][1, 4:] = usual[1, 4:]
    assert torch.equal(runs[0], usual)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("d", [80, 256])
def test_decoding_with_as_many_rows_as_there_may_be(d, dtype):
    q, k, v = (t.detach() for t in inputs((1, 32, 1, 4, 300, d, d), dtype))
    with torch.no_grad():
        got = decode_attention(q, k, v)
        want = decode_attention(*exact(q, k, v), backend="reference")
    assert relative(got, want) < TOLERANCE[dtype][0]


# ------------------------------------------------------------------------------------------------------ torch machinery


def test_cuda_graph_of_forward_and_backward():
    q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), BF16)

    def step():
        out = attend(q, k, v, is_causal=True, return_stats=True).output
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for leaf, fresh in zip((q, k, v), inputs((2, 4, 2, 200, 257, 64, 64), BF16, seed=1), strict=True):
            leaf.copy_(fresh)
    graph.replay()
    for one, other in zip(results, step(), strict=True):
        assert torch.equal(one, other)


def test_cuda_graph_of_decoding():
    q, k, v = (t.detach() for t in inputs((2, 8, 2, 1, 960, 128, 128), BF16))
    lengths = torch.tensor([10, 20], device=DEVICE, dtype=torch.int32)

    def step():
        return decode_attention(q, k, v, cache_seqlens=lengths)

    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for new in ([11, 21], [960, 1]):
            lengths.copy_(torch.tensor(new))
            graph.replay()
            assert torch.equal(out, step())


def test_compiles_to_one_graph():
    q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), BF16)

    def f(q, k, v):
        return attend(q * 2, k, v, is_causal=True) * 0.5

    compiled = torch.compile(f, fullgraph=True)
    assert relative(compiled(q, k, v), f(q, k, v)) < 1e-2
    grads = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    want = torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
    assert max(relative(a, b) for a, b in zip(grads, want, strict=True)) < 1e-2


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), BF16)

    def f(q, k, v):
        return attend(q * 2, k, v, is_causal=True, dropout_p=0.1)

    results = []
    for g in (f, functools.partial(checkpoint, f, use_reentrant=False)):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(g(q, k, v).sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast():
    q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), FP32)
    with torch.autocast("cuda", BF16):
        out = attend(q, k, v, is_causal=True)
    assert out.dtype == BF16
    assert torch.equal(out, attend(*(t.to(BF16) for t in (q, k, v)), is_causal=True))
    assert all(g.dtype == FP32 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_opcheck():
    q, k, v = inputs((1, 2, 1, 40, 60, 64, 64), BF16)
    tail = (0.3, 1e-6, -1, 0, False, 0.0, 0.0, True, "triton", 0, 0)
    op = torch.ops.softpick.attention_forward.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (q, k, v, *(None,) * 5, "softpick", *tail, True), test_utils=tests)
    torch.library.opcheck(op, (q, k, v, *(None,) * 5, "softmax", *tail, False), test_utils=tests)
    args = (q.detach()[:, :, :1], k.detach(), v.detach(), *(None,) * 4, "softpick", 0.3, 1e-6, -1, 0, True, 0.0)
    torch.library.opcheck(torch.ops.softpick.decode.default, args)
    x = torch.randn(3, 70, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.softpick.rows_forward.default, (x, 1e-6))


def test_what_triton_cannot_take_is_said_once(monkeypatch):
    monkeypatch.setattr(backends, "warned", set())
    q, k, v = (t.detach() for t in inputs((1, 2, 2, 20, 20, 320, 320), BF16))
    with pytest.warns(UserWarning, match=r"head dimension from 1 to 256 .* got 320"):
        out = attend(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(q, k, v)
    assert relative(out, attend(*exact(q, k, v))) < 1e-2
    with pytest.raises(ValueError, match="head dimension from 1 to 256"):
        attend(q, k, v, backend="triton")


# --------------------------------------------------------------------------------------------------------------- models


class Tiny(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 64)
        self.layers = torch.nn.ModuleList(
            softpick.nn.Attention(64, 4, 2, is_causal=True, backend=backend) for _ in range(2)
        )
        self.head = torch.nn.Linear(64, 50)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(torch.nn.functional.layer_norm(x, (64,)))
        return self.head(x)


def test_a_tiny_model_trains_alike_with_triton_and_the_reference():
    """For 25 steps: after that a model in fp64, or one whose weights differ by 1e-7, is 2e-3 away as well (CPU, reference)."""
    losses = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = Tiny(backend).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(50, (8, 65), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        run = []
        for _ in range(25):
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(float(loss.detach()))
        losses.append(run)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_tokens_of_the_reference(cache, monkeypatch):
    transformers = pytest.importorskip("transformers")
    import softpick.integrations.transformers as adapter

    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="softpick")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.15, generator=generator)
    model = model.to(DEVICE).eval()
    ids = torch.randint(3, 60, (2, 11), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    decoded = []
    original = functional.decode
    monkeypatch.setattr(functional, "decode", lambda *args: decoded.append(1) or original(*args))

    def generate():
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
        )

    got = generate()
    assert len(decoded) >= 2 * 15  # two layers, every token after the first
    reference = functools.partial(scaled_dot_product_attention, backend="reference")
    monkeypatch.setattr(adapter, "scaled_dot_product_attention", reference)
    count = len(decoded)
    assert torch.equal(got, generate())
    assert len(decoded) == count


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


BY_HAND = {
    f"{name}-{alignment}-{tq}x{tk}-{d}": case(
        name,
        b,
        h,
        hkv,
        tq,
        tk,
        d,
        d,
        **({} if alignment == "none" else {"is_causal": True, "causal_alignment": alignment}),
    )
    for name, b, h, hkv, tq, tk, d in (
        ("softpick", 1, 2, 2, 1, 1, 64),
        ("softpick", 2, 4, 1, 200, 257, 64),
        ("softpick", 1, 4, 2, 257, 200, 128),
        ("softpick", 1, 2, 1, 1000, 1000, 128),
        ("softpick", 1, 4, 4, 300, 300, 96),
        ("softmax", 1, 2, 1, 300, 300, 128),
        ("softmax_plus_one", 1, 2, 2, 300, 300, 64),
        ("learned_sink", 1, 2, 2, 300, 300, 64),
        ("rectified", 1, 2, 2, 300, 300, 64),
        ("relu_softpick", 1, 2, 2, 300, 300, 128),
        ("softpick_stop_gradient", 1, 2, 2, 300, 300, 128),
    )
    for alignment in ("none", "top_left", "bottom_right")
}


@for_hopper
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("key", BY_HAND)
def test_forward_for_hopper(key, scale, monkeypatch, poisoned):
    """hopper/forward.py on sizes for which it would not be chosen: error at most 1.5 times that of the other kernel."""
    from softpick.ops.triton import launch, tuning

    calls, run = [], launch._forward_for_hopper
    monkeypatch.setattr(launch, "_forward_for_hopper", lambda *a: calls.append(1) or run(*a))
    setting = BY_HAND[key]
    q, k, v = (t.detach() for t in inputs(setting["shape"], BF16, scale))
    sink = sink_for(setting["name"], q.shape[1])
    options, softmax_scale = setting["options"], q.shape[-1] ** -0.5

    def kernel():
        return functional.attention(
            q, k, v, backend="triton", normalizer=setting["name"], scale=softmax_scale, eps=NORMALIZERS[setting["name"]].eps,
            sink=sink, max_seqlen_q=q.shape[2], max_seqlen_k=k.shape[2], right=0 if options else -1,
            bottom_right=options.get("causal_alignment") == "bottom_right",
        )[:2]  # fmt: skip

    with torch.no_grad():
        want = attend(
            *exact(q, k, v), None, exact(sink)[0], normalizer=setting["name"], scale=softmax_scale, backend="reference",
            return_stats=True, **options,
        )[:2]  # fmt: skip
        plain = kernel()
        assert not calls
        monkeypatch.setattr(tuning, "FEWEST_SCORES", 0)
        monkeypatch.setattr(tuning, "FEWEST_FORWARD", 0)
        got, again = kernel(), kernel()
    assert calls == [1, 1], "this kernel was not used"
    for one, other, true, least in zip(got, plain, want, (1e-3, 1e-5), strict=True):
        assert relative(one, true) <= max(1.5 * relative(other, true), least)
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1], again[1])


@for_hopper
@pytest.mark.parametrize("key", BY_HAND)
def test_backward_for_hopper(key, monkeypatch):
    """hopper/backward.py, whose kernels no interpreter runs, on sizes for which they would not be chosen."""
    from softpick.ops.triton import dispatch, launch, tuning

    calls, run = [], launch._backward_for_hopper
    monkeypatch.setattr(tuning, "FEWEST_SCORES", 0)
    monkeypatch.setattr(launch, "_backward_for_hopper", lambda *a: calls.append(1) or run(*a))
    setting = BY_HAND[key]
    b, h, _, tq, _, d, _ = setting["shape"]
    forward, backward = errors(setting)
    assert calls, "these kernels were not used"
    assert max(forward) < TOLERANCE[BF16][0], forward
    # with one key the gradient of its score is 0: what is left is the rounding of the output, magnified by 1 / sum |s|
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "hopper_refuses", lambda *a: "not asked for")
        plain = errors(setting)[1]
    assert all(a < max(TOLERANCE[BF16][1], 1.3 * b) for a, b in zip(backward, plain, strict=True)), (backward, plain)
    q, k, v = inputs(setting["shape"], BF16)
    sink, grad = sink_for(setting["name"], h), torch.randn(b, h, tq, d, device=DEVICE, dtype=BF16)
    # by name: auto takes torch's kernels for plain softmax, whose gradients differ from run to run
    out = attend(q, k, v, None, sink, normalizer=setting["name"], backend="triton", **setting["options"])
    first, second = (torch.autograd.grad(out, (q, k, v), grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True)), "not the same on repeat"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("pattern", few_keys.PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_see_few_keys(name, pattern, dtype):
    """Gradients of rows with 1, 2, 3 keys are no worse than those of torch's softmax; with one key the row is its value."""
    for size in few_keys.SIZES:
        dq, dk, one = few_keys.excess(name, pattern, size, dtype, DEVICE, length=200)
        assert max(dq, dk) <= 1, (size, dq, dk)
        assert one or dtype == FP32, size  # in fp32 the weight is off by an ulp


@for_hopper
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "linear_softpick"])
def test_rows_that_see_few_keys_for_hopper(name, d, monkeypatch):
    from softpick.ops.triton import launch, tuning

    calls, forward, backward = [], launch._forward_for_hopper, launch._backward_for_hopper
    monkeypatch.setattr(tuning, "FEWEST_FORWARD", 0)
    monkeypatch.setattr(launch, "_forward_for_hopper", lambda *a: calls.append(1) or forward(*a))
    monkeypatch.setattr(launch, "_backward_for_hopper", lambda *a: calls.append(2) or backward(*a))
    for size in few_keys.SIZES:
        dq, dk, one = few_keys.excess(name, "causal", size, BF16, DEVICE, heads=4, length=1024, width=d)
        assert max(dq, dk) <= 1, (size, dq, dk)
        assert one, size
    assert calls == [1, 2] * len(few_keys.SIZES)


@pytest.mark.parametrize("by_hand", [False, pytest.param(True, marks=for_hopper)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_key_is_decoded_to_its_value(name, dtype, by_hand, monkeypatch):
    from softpick.ops.triton import tuning

    monkeypatch.setattr(tuning, "FEWEST_CACHED", 0 if by_hand else 2**60)
    q, k, v = (t.detach() for t in inputs((3, 8, 2, 1, 1024, 64, 64), dtype))
    q = q.abs()
    k[:, :, 0] = k[:, :, 0].abs()  # positive scores
    sink = torch.full((8,), -60.0, device=DEVICE) if name == "learned_sink" else None
    ones = torch.ones(3, dtype=torch.int32, device=DEVICE)
    if NORMALIZERS[name].constant == 1:
        q = q * 40  # so that the constant is nothing against the score
    eps = 1e-6 if name == "linear_softpick" else None
    out = decode_attention(q, k, v, cache_seqlens=ones, normalizer=name, sink=sink, eps=eps)
    assert torch.equal(out, v[:, :, :1].repeat_interleave(4, 1))


@for_hopper
@pytest.mark.parametrize("d", [64, 128])
def test_gradients_where_scores_are_far_below_zero_for_hopper(d, monkeypatch):
    """Beyond the last key come zeros, whose exponential relative to such a row is infinite."""
    from softpick.ops.triton import tuning

    shape = (1, 2, 1, 200, 300, d, d)
    q, k, v = inputs(shape, BF16, 0.1)
    q, k = (x.detach().add(by).requires_grad_() for x, by in ((q, 4.0), (k * 0.1, -4.0)))
    leaves, grad = (q, k, v), torch.randn(1, 2, 200, d, device=DEVICE, dtype=BF16)
    for options in ({}, {"is_causal": True, "causal_alignment": "bottom_right"}):
        true = exact(*leaves)
        want = torch.autograd.grad(
            attend(*true, normalizer="softmax", backend="reference", **options), true, grad.double()
        )
        found = []
        for fewest in (0, 2**62):  # these kernels, and the others: the keys are nearly alike, so both lose digits
            monkeypatch.setattr(tuning, "FEWEST_SCORES", fewest)
            out = attend(*leaves, normalizer="softmax", backend="triton", **options)
            found.append([relative(x, y) for x, y in zip(torch.autograd.grad(out, leaves, grad), want, strict=True)])
        assert all(a <= max(1.5 * b, 2e-2) for a, b in zip(*found, strict=True)), found


if __name__ == "__main__":
    _compile(int(sys.argv[1]), int(sys.argv[2]))
