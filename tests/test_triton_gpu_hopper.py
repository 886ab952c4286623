"""The kernels for Hopper GPUs, and rows that see few keys, against the reference in fp64."""

import few_keys
import pytest
import torch
from triton_gpu_cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    NAMES,
    TOLERANCE,
    attend,
    case,
    errors,
    exact,
    for_hopper,
    inputs,
    relative,
    sink_for,
)

from softpick import NORMALIZERS, decode_attention, functional, scaled_dot_product_attention

pytestmark = pytest.mark.gpu


SIZES = {
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
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0, 30.0])
@pytest.mark.parametrize("key", SIZES)
def test_forward_for_hopper(key, scale, dtype, monkeypatch, poisoned):
    """hopper/forward.py on sizes for which it would not be chosen: error at most 1.5 times that of the other kernel."""
    from softpick.ops.triton import launch, tuning

    calls, run = [], launch._forward_for_hopper
    monkeypatch.setattr(launch, "_forward_for_hopper", lambda *a: calls.append(1) or run(*a))
    setting = SIZES[key]
    q, k, v = (t.detach() for t in inputs(setting["shape"], dtype, scale))
    sink = sink_for(setting["name"], q.shape[1])
    options, softmax_scale = setting["options"], q.shape[-1] ** -0.5

    def kernel():
        return functional.attention(
            q, k, v, backend="triton", normalizer=setting["name"], scale=softmax_scale, eps=NORMALIZERS[setting["name"]].eps,
            sink=sink, max_seqlen_q=q.shape[2], max_seqlen_k=k.shape[2], left=-1, right=0 if options else -1,
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
    floor = 1e-3 if dtype == BF16 else 2e-4
    for one, other, true, least in zip(got, plain, want, (floor, 1e-5), strict=True):
        assert relative(one, true) <= max(1.5 * relative(other, true), least)
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1], again[1])


@for_hopper
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("key", SIZES)
def test_backward_for_hopper(key, dtype, monkeypatch):
    """hopper/backward.py, whose kernels no interpreter runs, on sizes for which they would not be chosen."""
    from softpick.ops.triton import dispatch, launch, tuning

    calls, run = [], launch._backward_for_hopper
    monkeypatch.setattr(tuning, "FEWEST_SCORES", 0)
    monkeypatch.setattr(launch, "_backward_for_hopper", lambda *a: calls.append(1) or run(*a))
    setting = {**SIZES[key], "dtype": dtype}
    b, h, _, tq, _, d, _ = setting["shape"]
    forward, backward = errors(setting)
    assert calls, "these kernels were not used"
    assert max(forward) < TOLERANCE[dtype][0], forward
    # with one key the gradient of its score is 0: what is left is the rounding of the output, magnified by 1 / sum |s|
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "hopper_refuses", lambda *a: "not asked for")
        plain = errors(setting)[1]
    assert all(a < max(TOLERANCE[dtype][1], 1.3 * b) for a, b in zip(backward, plain, strict=True)), (backward, plain)
    q, k, v = inputs(setting["shape"], dtype)
    sink, grad = sink_for(setting["name"], h), torch.randn(b, h, tq, d, device=DEVICE, dtype=dtype)
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
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", [n for n in NAMES if NORMALIZERS[n].exponential])
def test_rows_that_see_few_keys_for_hopper(name, dtype, d, monkeypatch):
    from softpick.ops.triton import launch, tuning

    calls, forward, backward = [], launch._forward_for_hopper, launch._backward_for_hopper
    monkeypatch.setattr(tuning, "FEWEST_FORWARD", 0)
    monkeypatch.setattr(launch, "_forward_for_hopper", lambda *a: calls.append(1) or forward(*a))
    monkeypatch.setattr(launch, "_backward_for_hopper", lambda *a: calls.append(2) or backward(*a))
    for size in few_keys.SIZES:
        dq, dk, one = few_keys.excess(name, "causal", size, dtype, DEVICE, heads=4, length=1024, width=d)
        assert max(dq, dk) <= 1, (size, dq, dk)
        assert one, size
    assert calls == [1, 2] * len(few_keys.SIZES)


@pytest.mark.parametrize("hopper", [False, pytest.param(True, marks=for_hopper)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_key_is_decoded_to_its_value(name, dtype, hopper, monkeypatch):
    from softpick.ops.triton import tuning

    monkeypatch.setattr(tuning, "FEWEST_CACHED", 0 if hopper else 2**60)
    q, k, v = (t.detach() for t in inputs((3, 8, 2, 1, 1024, 64, 64), dtype))
    q = q.abs()
    k[:, :, 0] = k[:, :, 0].abs()  # positive scores
    sink = torch.full((8,), -60.0, device=DEVICE) if NORMALIZERS[name].needs_sink else None
    ones = torch.ones(3, dtype=torch.int32, device=DEVICE)
    if NORMALIZERS[name].constant == 1:
        q = q * (
            4000 if NORMALIZERS[name].base == "linear" else 40
        )  # so that the constant is nothing against the score
    out = decode_attention(q, k, v, cache_seqlens=ones, normalizer=name, sink=sink)
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


@for_hopper
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("level", [1e-6, 1e-4, 1e-2, 30.0, 3000.0])
@pytest.mark.parametrize("name", ["softpick", "softmax", "relu_softpick", "learned_sink"])
def test_range_of_fp16_for_hopper(name, level, causal, d, monkeypatch):
    """Scores of a size for which weights or gradients leave the range of fp16: no worse than the other kernels."""
    from softpick.ops.triton import tuning

    monkeypatch.setattr(tuning, "FEWEST_FORWARD", 0)
    shape = (1, 4, 2, 500, 500, d, d)
    q, k, v = inputs(shape, FP16)
    q, k = (x.detach().mul(level**0.5).requires_grad_() for x in (q, k))
    leaves, sink = (q, k, v), sink_for(name, 4)
    grad = torch.randn(1, 4, 500, d, device=DEVICE, dtype=FP16) * (2e-3 if level < 1e-3 else 1.0)
    options = {"normalizer": name, "is_causal": causal}
    exacts = exact(*leaves)
    want = attend(*exacts, None, exact(sink)[0], backend="reference", **options)
    wants = [want, *torch.autograd.grad(want, exacts, grad.double())]
    found = []
    for fewest in (0, 2**62):
        monkeypatch.setattr(tuning, "FEWEST_SCORES", fewest)
        out = attend(*leaves, None, sink, backend="triton", **options)
        got = [out, *torch.autograd.grad(out, leaves, grad)]
        assert all(x.isfinite().all() for x in got)
        limit = torch.finfo(FP16).max  # the true gradient may lie beyond it
        found.append([relative(x, y.clamp(-limit, limit)) for x, y in zip(got, wants, strict=True)])
    # exponentials of small scores are relative to 2^-2, where fp32 has fewer digits than at 1
    assert all(a <= 1.6 * b + 1e-3 for a, b in zip(*found, strict=True)), found


@for_hopper
@pytest.mark.parametrize("d", [64, 128])
def test_weights_far_above_those_of_the_first_tile_for_hopper(d, monkeypatch):
    """fp16 takes exponentials relative to a row's first tile of keys; one key of any other tile is far above."""
    from softpick.ops.triton import tuning

    monkeypatch.setattr(tuning, "FEWEST_SCORES", 0)
    monkeypatch.setattr(tuning, "FEWEST_FORWARD", 0)
    q, k, v = (x.detach() for x in inputs((1, 2, 2, 700, 700, d, d), FP16, 0.1))
    for key in range(40, 700, 131):
        high = k.clone()
        high[:, :, key] = 4 * q.mean(2) / q.mean(2).norm(dim=-1, keepdim=True)
        queries = q + 4 * q.mean(2, keepdim=True) / q.mean(2, keepdim=True).norm(dim=-1, keepdim=True)
        for causal in (True, False):
            for name in ("softpick", "softmax"):
                options = {"normalizer": name, "is_causal": causal, "scale": 1.5}
                got = attend(queries, high, v, backend="triton", **options)
                want = attend(*exact(queries, high, v), backend="reference", **options)
                assert relative(got, want) < TOLERANCE[FP16][0], (key, causal, name)


@for_hopper
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("softcap", "level"), [(1.5, 1.0), (30.0, 1.0), (30.0, 10.0), (50.0, 10.0), (30.0, 1e-3), (0.2, 30.0)]
)
@pytest.mark.parametrize("name", [n for n in NAMES if NORMALIZERS[n].exponential])
def test_softcap_for_hopper(name, softcap, level, causal, d, monkeypatch):
    from softpick.ops.triton import launch, tuning

    calls, forward, backward = [], launch._forward_for_hopper, launch._backward_for_hopper
    monkeypatch.setattr(tuning, "FEWEST_SCORES", 0)
    monkeypatch.setattr(tuning, "FEWEST_FORWARD", 0)
    monkeypatch.setattr(launch, "_forward_for_hopper", lambda *a: calls.append(1) or forward(*a))
    monkeypatch.setattr(launch, "_backward_for_hopper", lambda *a: calls.append(2) or backward(*a))
    q, k, v = inputs((1, 4, 2, 300, 300, d, d), BF16)
    leaves, sink = (q.detach().mul(level).requires_grad_(), k, v), sink_for(name, 4)
    grad = torch.randn(1, 4, 300, d, device=DEVICE, dtype=BF16)
    options = {"normalizer": name, "is_causal": causal, "softcap": softcap}
    exacts = exact(*leaves)
    want = attend(*exacts, None, exact(sink)[0], backend="reference", **options)
    wants = torch.autograd.grad(want, exacts, grad.double())
    out = attend(*leaves, None, sink, backend="triton", **options)
    grads = torch.autograd.grad(out, leaves, grad)
    assert calls == [1, 2]
    assert relative(out, want) < TOLERANCE[BF16][0]
    found = [relative(x, y) for x, y in zip(grads, wants, strict=True)]
    assert max(found) < TOLERANCE[BF16][1], found


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_later_launches_take_the_tensors_of_their_call(d, dtype, monkeypatch):
    """A launch is kept with all but the addresses: other tensors, other strides, an address that is not aligned."""
    from softpick.ops.triton import tuning

    monkeypatch.setattr(tuning, "FEWEST_SCORES", 0)
    monkeypatch.setattr(tuning, "FEWEST_FORWARD", 0)
    b, h, t = 2, 3, 200

    def contiguous():
        return torch.randn(b, h, t, d, device=DEVICE).to(dtype)

    def heads_last():
        return torch.randn(b, t, h, d, device=DEVICE).to(dtype).transpose(1, 2)

    def shifted():
        return torch.randn(b * h * t * d + 1, device=DEVICE).to(dtype)[1:].view(b, h, t, d)

    mask = torch.rand(b, 1, t, t, device=DEVICE) > 0.3
    for _ in range(3):
        for make in (contiguous, heads_last, shifted):
            for more in ({"is_causal": True}, {}, {"attn_mask": mask}):
                leaves = [make().requires_grad_() for _ in range(3)]
                grad = make()
                out = scaled_dot_product_attention(*leaves, **more)
                exacts = exact(*leaves)
                want = scaled_dot_product_attention(*exacts, **more, backend="reference")
                assert relative(out, want) < TOLERANCE[dtype][0]
                pairs = zip(
                    torch.autograd.grad(out, leaves, grad),
                    torch.autograd.grad(want, exacts, grad.double()),
                    strict=True,
                )
                assert max(relative(x, y) for x, y in pairs) < TOLERANCE[dtype][1]
