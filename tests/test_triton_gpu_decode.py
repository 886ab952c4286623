"""Decoding by the Triton kernels on a GPU, contiguous and from pages, against the reference in fp64."""

import math

import pytest
import torch
from fp8_caches import E4M3, LAYOUTS, draw
from triton_gpu_cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    NAMES,
    TOLERANCE,
    attend,
    exact,
    for_hopper,
    inputs,
    paged,
    relative,
    sink_for,
)

from softpick import (
    NORMALIZERS,
    decode_attention,
    explain_backend,
    key_bounds,
    quantize_fp8,
    update_key_bounds,
    use_backend,
)

pytestmark = pytest.mark.gpu


# ------------------------------------------------------------------------------------------------------------- decoding


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
    from softpick.ops.triton import tuning

    monkeypatch.setattr(tuning, "FEWEST_CACHED", 0)
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
    from softpick.ops.triton import tuning

    monkeypatch.setattr(tuning, "FEWEST_CACHED", 0)
    monkeypatch.setattr(tuning, "FEWEST_FORWARD", 0)
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
    original = dispatch.hopper_refuses_decode
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
            if skip is not None:
                monkeypatch.setattr(launch_decode, "skips_values", lambda *_, s=skip: s)
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


@pytest.mark.parametrize("name", [name for name in NAMES if NORMALIZERS[name].sparse])
@pytest.mark.parametrize(("dtype", "d"), [(BF16, 64), (BF16, 128), (FP16, 128), (FP32, 64)])
@pytest.mark.parametrize("page", [0, 64])
def test_blocks_that_bounds_leave_unread(name, dtype, d, page, poisoned):
    """Against the formula in fp64: within the error that is returned, and rounding. Half of the blocks are far below 0."""
    q, k, v = (t.detach().to(dtype) for t in inputs((3, 8, 2, 1, 960, d, d), FP32))
    q = q[:, ::4].repeat_interleave(4, 1) + 0.02 * q
    against = (torch.arange(960, device=DEVICE) // 64 % 2 == 0)[:, None]
    k = torch.where(against, 0.02 * k - 3 * q[:, ::4] / q[:, ::4].norm(dim=-1, keepdim=True), k)
    lengths = torch.tensor([960, 517, 3], device=DEVICE, dtype=torch.int32)
    true = exact(q, k, v)
    want = decode_attention(*true, cache_seqlens=lengths, normalizer=name, scale=1.0, backend="reference")
    options = {"cache_seqlens": lengths}
    if page:
        (k, options["block_table"]), (v, _) = paged(k, page), paged(v, page)
    for block_size in (16, 32, 64):
        bounds = key_bounds(k, block_size=block_size, **options)
        update_key_bounds(bounds, k, lengths, block_table=options.get("block_table"))
        got = decode_attention(
            q, k, v, **options, normalizer=name, scale=1.0, key_bounds=bounds, max_error=1e-2, return_error=True,
            backend="triton",
        )  # fmt: skip
        assert float(got.error.max()) <= 1e-2
        assert int(got.blocks[0, :, 1].max()) < int(got.blocks[0, :, 0].min())
        off = (got.output.double() - want).abs() - got.error[..., None] * want.abs()
        assert float(off.max()) <= 2 * TOLERANCE[dtype][0] * float(want.abs().max())


def test_bounds_in_a_graph():
    """A capture that follows the cache and decodes: nothing waits for the GPU, and replays see new keys and lengths."""
    q, k, v = (t.detach() for t in inputs((2, 8, 2, 1, 512, 64, 64), BF16))
    lengths = torch.tensor([300, 100], device=DEVICE)
    bounds = key_bounds(k, block_size=64, cache_seqlens=lengths)

    def step():
        update_key_bounds(bounds, k, lengths)
        return decode_attention(q, k, v, cache_seqlens=lengths, key_bounds=bounds, max_error=0.05, return_error=True)

    step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        k[0, :, int(lengths[0])] *= -1
        lengths += 1
        graph.replay()
        want = decode_attention(*exact(q, k, v), cache_seqlens=lengths, backend="reference")
        off = (found.output.double() - want).abs() - found.error[..., None] * want.abs()
        assert float(off.max()) <= 2e-2 * float(want.abs().max())


# --------------------------------------------------------------------------------------------------------- caches in fp8

needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="GPUs with e4m3"
)


@needs_fp8
@pytest.mark.parametrize(("shape", "page"), LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_decoding_from_fp8(name, shape, page, monkeypatch, poisoned):
    """Every dtype of queries and way to give scales, with and without values that are not read."""
    from softpick.ops.triton import launch_decode

    caches, scales, table, exact = draw(3, 2, 960, 128, 64, shape, page)
    caches, wide = [x.to(DEVICE) for x in caches], [x.to(DEVICE) for x in exact]
    scales = {key: x.to(DEVICE) for key, x in scales.items()}
    table = None if table is None else table.to(DEVICE)
    lengths = torch.tensor([960, 517, 3], device=DEVICE)
    for dtype in (BF16, FP16, FP32):
        q, sink = (0.3 * torch.randn(3, 8, 2, 128, device=DEVICE)).to(dtype), sink_for(name, 8)
        common = {"cache_seqlens": lengths, "normalizer": name, "return_stats": True, "is_causal": True}
        true = None if sink is None else sink.double()
        want = decode_attention(q.double(), *wide, sink=true, backend="reference", **common)
        for skip in (False, True):
            monkeypatch.setattr(launch_decode, "skips_values", lambda spec, *_, s=skip: s and spec.norm.sparse)
            got = decode_attention(q, *caches, **scales, block_table=table, sink=sink, backend="triton", **common)
            assert relative(got.output, want.output) < TOLERANCE[dtype][0]
            assert relative(got.lse, want.lse) < 1e-3


@needs_fp8
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_every_number_of_fp8_is_read_exactly(dtype):
    """One key: the output is its value, times the scale. Whether numbers are read in pairs or not (a width that is odd)."""
    bits = torch.tensor([x for x in range(256) if x & 0x7F != 0x7F], device=DEVICE, dtype=torch.uint8)
    for width in (128, 127):
        value = bits[torch.arange(2 * width, device=DEVICE) % 254].view(E4M3).view(2, 1, 1, width)
        q, key = torch.ones(2, 1, 1, 64, device=DEVICE, dtype=dtype), torch.ones(2, 1, 1, 64, device=DEVICE).to(E4M3)
        for scale in (1.0, 0.25, 3.0):
            got = decode_attention(
                q, key, value, key_scale=torch.ones((), device=DEVICE), value_scale=torch.tensor(scale, device=DEVICE),
                normalizer="softmax", backend="triton",
            )  # fmt: skip
            assert torch.equal(got, (value.float() * scale).to(dtype))


FP8 = {
    "contiguous": {},
    "lengths": {"lengths": (960, 0, 333)},
    "pages of 64": {"page": 64, "lengths": (961, 65, 1)},
    "pages of 128 with one scale": {"page": 128, "shape": "heads"},
    "keys alone have scales of pages": {"page": 64, "shape": "keys by page"},
    "window and softcap": {"window": (70, 0), "softcap": 3.0},
    "huge": {"scale": 30.0},
    "narrow": {"widths": (112, 80)},
    "many sequences": {"batch": 40, "lengths": tuple(37 * i % 193 * (i % 3 > 0) for i in range(40))},
}


@for_hopper
@pytest.mark.parametrize("multiprocessors", [None, 2])
@pytest.mark.parametrize("how", FP8)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_decoding_from_fp8_for_hopper(name, how, multiprocessors, monkeypatch, poisoned):
    """The kernel in Gluon, as the portable one; skipping changes no bit; what lies beyond the lengths may be anything."""
    from softpick.ops.triton import launch_decode, tuning

    monkeypatch.setattr(tuning, "FEWEST_CACHED", 0)
    if multiprocessors:
        monkeypatch.setattr(tuning, "multiprocessors", lambda _: multiprocessors)
    setting = {"page": 0, "lengths": None, "batch": 3, "widths": (128, 128), "scale": 1.0} | FP8[how]
    page, batch = setting["page"], setting["batch"]
    shape = setting.get("shape", "pages" if page else "sequences")
    caches, scales, table, exact = draw(batch, 2, 1024, *setting["widths"], shape, page)
    if setting["lengths"] and not page:
        for x in caches:
            for b, n in enumerate(setting["lengths"]):
                x.view(torch.uint8)[b, :, n:] = 0x7F  # NaN
    caches, wide = [x.to(DEVICE) for x in caches], [x.to(DEVICE) for x in exact]
    scales = {key: x.to(DEVICE) for key, x in scales.items()}
    table = None if table is None else table.to(DEVICE)
    lengths = setting["lengths"] and torch.tensor(setting["lengths"], device=DEVICE)
    q, sink = (
        (0.3 * setting["scale"] * torch.randn(batch, 8, 2, setting["widths"][0], device=DEVICE)).to(BF16),
        sink_for(name, 8),
    )
    common = {"cache_seqlens": lengths, "normalizer": name, "return_stats": True, "is_causal": True}
    common |= {key: setting[key] for key in ("window", "softcap") if key in setting}
    (kernel,) = explain_backend(
        q, *caches, **scales, block_table=table, normalizer=name, sink=sink, decode=True
    ).kernels
    assert kernel.file == "hopper/decode.py"
    true = None if sink is None else sink.double()
    want = decode_attention(q.double(), *wide, sink=true, backend="reference", **common)
    results = []
    for skip in (False, True):
        monkeypatch.setattr(launch_decode, "skips_values", lambda spec, *_, s=skip: s and spec.norm.sparse)
        results.append(decode_attention(q, *caches, **scales, block_table=table, sink=sink, backend="triton", **common))
    for got in results:
        assert torch.equal(got.output, results[0].output)
        assert relative(got.output, want.output) < 1e-2
        assert relative(got.lse, want.lse) < 1e-3


@needs_fp8
@pytest.mark.parametrize("name", ["softpick", "softmax"])
def test_a_long_cache_in_fp8_by_the_kernel_that_is_named(name):
    """Sizes at which bf16 takes the kernel for Hopper GPUs; a cache rounded as the library rounds it."""
    q, k, v = (t.detach() for t in inputs((2, 32, 8, 1, 16384, 128, 128), BF16))
    (k8, ks), (v8, vs) = quantize_fp8(k), quantize_fp8(v)
    options = {"key_scale": ks, "value_scale": vs, "normalizer": name}
    (kernel,) = explain_backend(q, k8, v8, **options).kernels
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert kernel.file == ("hopper/decode.py" if hopper else "decode.py")
    if hopper:
        (other,) = explain_backend(q[..., :64], k8[..., :64], v8[..., :64], **options).kernels
        assert (other.file, "fp8" in other.refused) == ("decode.py", True)
    wide = [x.double() * s.double()[..., None, None] for x, s in ((k8, ks), (v8, vs))]
    want = decode_attention(q.double(), *wide, normalizer=name, backend="reference")
    for without in ((), "hopper"):
        with use_backend(without=without):
            assert relative(decode_attention(q, k8, v8, **options), want) < 1e-2


@needs_fp8
def test_scales_are_looked_at_where_asked(monkeypatch):
    """With SOFTPICK_DEBUG=1 only: it waits for the GPU. A capture looks at nothing, and replays see new scales."""
    q, k, v = (t.detach() for t in inputs((1, 8, 2, 1, 512, 128, 128), BF16))
    (k8, ks), (v8, vs) = quantize_fp8(k), quantize_fp8(v)
    options = {"key_scale": ks, "value_scale": vs}
    decode_attention(q, k8, v8, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(q, k8, v8, **options)
    vs *= 2
    graph.replay()
    assert torch.equal(found, decode_attention(q, k8, v8, **options))
    ks[0, 1] = -1.0
    monkeypatch.setenv("SOFTPICK_DEBUG", "1")
    with pytest.raises(ValueError, match=r"key_scale: expected finite numbers >= 0, got -1\.0"):
        decode_attention(q, k8, v8, **options)
