"""Caches in fp8 on the CPU: rounding to e4m3, decoding against the formula in fp64, and what is refused."""

import math

import pytest
import torch
from fp8_caches import E4M3, LAYOUTS, draw, stored
from oracle import attention as oracle

from softpick import NORMALIZERS, decode_attention, explain_backend, key_bounds, quantize_fp8

EVERY = torch.arange(256, dtype=torch.uint8).view(E4M3)


# ------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("paged", [False, True])
def test_every_number_of_e4m3_comes_back(dtype, paged):
    """Times a power of two nothing is rounded, in either layout, down to the smallest."""
    finite = EVERY.float()[EVERY.float().isfinite()]
    x = torch.stack([finite * 2.0**i for i in (-4, 0, 3)])  # three sequences (pages)
    x = x.view(3, 1, 127, 2) if not paged else x.view(3, 127, 1, 2)
    got, scale = quantize_fp8(x.to(dtype), paged=paged)
    assert (got.dtype, scale.dtype, scale.tolist()) == (E4M3, torch.float32, [[2.0**-4], [1.0], [8.0]])
    assert torch.equal(got.float() * scale[:, :, None, None], x)


@pytest.mark.parametrize("top", [1e-30, 0.003, 1.0, 447.9, 448.0, 448.1, 3e38])
def test_the_scale_is_the_smallest_power_of_two_that_holds_all(top):
    x = torch.tensor([0.1, -1.0, 0.7, 0.0]).mul(top).view(1, 2, 2, 1)
    got, scale = quantize_fp8(x)
    for head in range(2):
        s, largest = float(scale[0, head]), float(x[0, head].abs().max())
        assert math.frexp(s)[0] == 0.5
        assert 448 * s >= largest > 448 * s / 2 or s == 2.0**-126
    error = (got.double() * scale[..., None, None].double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() * 2**-4, scale[..., None, None].double() / 1024)).all()


def test_what_does_not_fit_saturates():
    x = torch.tensor([math.inf, -math.inf, 1e6, -1e6, 449.0, 464.1, math.nan, 2.0]).view(1, 1, 8, 1)
    want = torch.tensor([448, -448, 448, -448, 448, 448, math.nan, 2.0]).view(1, 1, 8, 1)
    torch.testing.assert_close(quantize_fp8(x, torch.ones(()))[0].float(), want, equal_nan=True)
    got, scale = quantize_fp8(x)  # infinity and NaN say nothing about the scale
    assert float(scale) == 4096
    assert got.float().flatten()[:2].tolist() == [448, -448]
    assert got.isnan().flatten().tolist() == [False] * 6 + [True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "scale", [2.0**-149, 1e-40, 2.0**-126, 1e-20, 0.7, 3.0, 200.0, 6e4, 2.0**20, 1e8, 1e30, 2.0**127, 3e38]
)
def test_ranges(dtype, scale):
    """The nearest number of e4m3 that times the scale is in the range of the dtype; of infinity at least in that of fp32."""
    scale, most = torch.tensor(scale), torch.finfo(dtype).max
    x = torch.cat(
        [torch.randn(400).double() * 2.0 ** torch.randint(-12, 12, (400,)) * scale, most * torch.rand(200).double()]
    )
    ends = torch.tensor([math.inf, most, most * 0.999, 3.4e38, float(scale) * 448, float(scale) * 500, 0.0]).double()
    x = torch.cat([x, ends, -ends]).to(dtype)
    got = quantize_fp8(x.view(1, 1, -1, 1), scale)[0].double().flatten() * scale.double()
    every = EVERY.double()[EVERY.double().isfinite()] * scale.double()
    wide, largest = x.double(), max(most, torch.finfo(torch.float32).max)
    limit = torch.tensor([most, largest], dtype=torch.float64)[x.isinf().int()]
    there = every.abs() <= limit[:, None]
    distance = torch.where(there, (every - wide.clamp(-1e300, 1e300)[:, None]).abs(), math.inf)
    best = torch.where(x.isinf(), every.amax() if every.amax() <= largest else every[every <= largest].amax(), 0)
    error = (got - wide.clamp(-1e300, 1e300)).abs()
    assert (got.abs() <= limit).all()
    assert (error <= distance.amin(1) * (1 + 1e-6)).all()
    assert (got.abs()[x.isinf()] == best[x.isinf()]).all()
    assert got.to(dtype)[x.isfinite()].isfinite().all()
    assert dtype == torch.float64 or got.float().isfinite().all()


def test_scales_beyond_fp32_are_refused_as_they_came():
    x = torch.ones(1, 1, 2, 2)
    for scale in (1e-50, 1e300):
        with pytest.raises(
            ValueError, match=rf"scale: expected finite numbers > 0 in fp32, got {scale}".replace("+", r"\+")
        ):
            quantize_fp8(x, torch.tensor(scale, dtype=torch.float64))


def test_scales_that_are_given_and_empty_ones():
    x = torch.randn(3, 2, 5, 4)
    for scale in (torch.tensor(0.1), torch.tensor([0.1, 3.0]), torch.rand(3, 2) + 0.1):
        got, back = quantize_fp8(x, scale)
        assert torch.equal(back, scale)
        each = scale.expand(3, 2)[..., None, None]
        assert torch.equal(got.view(torch.uint8), (x / each).clamp(-448, 448).to(E4M3).view(torch.uint8))
    assert [tuple(t.shape) for t in quantize_fp8(x[:, :, :0])] == [(3, 2, 0, 4), (3, 2)]
    assert quantize_fp8(torch.zeros(1, 1, 2, 2))[1].tolist() == [[1.0]]


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", list(NORMALIZERS))
@pytest.mark.parametrize(("shape", "page"), LAYOUTS)
def test_decoding_is_that_of_stored_numbers_times_scales(name, shape, page):
    (k, v), scales, table, exact = draw(3, 2, 32, 8, 6, shape, page)
    q, lengths = torch.randn(3, 4, 2, 8, dtype=torch.float64), torch.tensor([32, 17, 2])
    sink = torch.randn(4, dtype=torch.float64) if NORMALIZERS[name].needs_sink else None
    options = {"cache_seqlens": lengths, "block_table": table, "normalizer": name, "sink": sink, "is_causal": True}
    for more in ({}, {"window": 5}, {"softcap": 2.0, "scale": 0.3}):
        got = decode_attention(q, k, v, **scales, **options, **more)
        for b, n in enumerate(lengths.tolist()):
            behind = torch.arange(2)[:, None] + n - 2 - torch.arange(n)
            seen = (behind >= 0) & (behind < more.get("window", 99))
            others = {key: value for key, value in more.items() if key != "window"}
            want, _ = oracle(
                *(q[b : b + 1], *(x[b : b + 1, :, :n] for x in exact)), name, mask=seen, sink=sink, **others
            )
            torch.testing.assert_close(got[b : b + 1], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_the_result_is_in_the_dtype_of_the_query(dtype):
    """Neither keys nor values times their scales are rounded to it."""
    (k, v), scales, table, exact = draw(2, 2, 16, 8, 8, "pages", 4)
    q = torch.randn(2, 4, 1, 8).to(dtype)
    got = decode_attention(q, k, v, **scales, block_table=table)
    want = decode_attention(q.double(), *exact)
    torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_scales_of_pages_that_are_not_filled_may_be_anything_positive():
    (k, v), scales, table, exact = draw(2, 2, 16, 8, 8, "pages", 4)
    q, lengths = torch.randn(2, 4, 1, 8, dtype=torch.float64), torch.tensor([4, 9])
    want = decode_attention(q, *exact, cache_seqlens=lengths)
    for b, n in enumerate(lengths.tolist()):
        for i in range(-(-n // 4), 4):
            scales["key_scale"][table[b, i]] = scales["value_scale"][table[b, i]] = 3e38
            k.view(torch.uint8)[table[b, i]] = v.view(torch.uint8)[table[b, i]] = 0x7F  # NaN
            table[b, i] = -1 if b else table[b, i]
    got = decode_attention(q, k, v, **scales, cache_seqlens=lengths, block_table=table)
    torch.testing.assert_close(got, want)


def test_autocast_leaves_the_cache_alone():
    (k, v), scales, _, exact = draw(1, 2, 8, 8, 8, "heads")
    q = torch.randn(1, 4, 1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = decode_attention(q, k, v, **scales)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, decode_attention(q.bfloat16().double(), *exact).bfloat16())


def test_compiled_and_explained():
    (k, v), scales, _, _ = draw(1, 2, 8, 8, 8, "heads")
    q = torch.randn(1, 4, 1, 8)
    step = torch.compile(lambda q, k, v: decode_attention(q, k, v, **scales), backend="eager", fullgraph=True)
    torch.testing.assert_close(step(q, k, v), decode_attention(q, k, v, **scales))
    assert explain_backend(q, k, v, **scales).function == "decode_attention"


# -------------------------------------------------------------------------------------------------------------- refusals


def call(**changes):
    cache = stored(2, 2, 8, 4)
    given = {"query": torch.randn(2, 4, 1, 4), "key_cache": cache, "value_cache": cache}
    given |= {"key_scale": torch.ones(2), "value_scale": torch.ones(2)} | changes
    return decode_attention(**given)


WIDE = torch.randn(2, 2, 8, 4)
REFUSED = {
    "no scale of keys": ({"key_scale": None}, ValueError, "key_scale: expected the scale of key_cache"),
    "no scale of values": ({"value_scale": None}, ValueError, "value_scale: expected the scale of value_cache"),
    "a number": ({"key_scale": 1.0}, TypeError, "key_scale: expected a tensor, got float"),
    "integers": ({"key_scale": torch.ones(2, dtype=torch.int32)}, TypeError, "key_scale: .*got torch.int32"),
    "shape": ({"value_scale": torch.ones(3)}, ValueError, r"value_scale: .*\(\), \(2,\) or \(2, 2\), one a sequence"),
    "device": ({"key_scale": torch.ones(2, device="meta")}, ValueError, "key_scale: expected the cache's device cpu"),
    "negative": ({"key_scale": torch.tensor([1.0, -2.0])}, ValueError, "key_scale: .*>= 0, got -2.0"),
    "NaN": ({"value_scale": torch.tensor(math.nan)}, ValueError, "value_scale: .*got nan"),
    "infinite": ({"value_scale": torch.tensor([math.inf, 1.0])}, ValueError, "value_scale: .*got inf"),
    "one in fp8": ({"value_cache": WIDE}, TypeError, "value_cache: expected key and value cache both in fp8"),
    "e5m2": ({"key_cache": WIDE.to(torch.float8_e5m2)}, TypeError, "key_cache: .*float8_e4m3fn.*got torch.float8_e5m2"),
    "another e4m3": ({"value_cache": WIDE.to(torch.float8_e4m3fnuz)}, TypeError, "got torch.float8_e4m3fnuz"),
    "query in fp8": ({"query": torch.ones(2, 4, 1, 4).to(E4M3)}, TypeError, "query: .*read once.*multiply them"),
    "not in fp8": ({"key_cache": WIDE, "value_cache": WIDE}, ValueError, "key_scale: only a cache in .*float8_e4m3fn"),
    "bounds": ({"key_bounds": key_bounds(WIDE)}, ValueError, "key_bounds: a cache in torch.float8_e4m3fn has none"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(changes, error, words):
    with pytest.raises(error, match=words):
        call(**changes)


def test_pages_have_scales_of_pages():
    (k, v), scales, table, _ = draw(2, 3, 8, 4, 4, "pages", 4)
    q = torch.randn(2, 3, 1, 4)
    with pytest.raises(
        ValueError, match=r"key_scale: expected shape \(\), \(3,\) or \(4, 3\), one a page and head; got \(2, 3\)"
    ):
        decode_attention(q, k, v, **scales | {"key_scale": torch.ones(2, 3)}, block_table=table)


def test_bounds_of_keys_in_fp8_are_refused():
    with pytest.raises(TypeError, match=r"key_cache: expected a floating-point tensor .*float8"):
        key_bounds(stored(1, 1, 16, 4))


ROUNDING = {
    "no tensor": (([1.0],), TypeError, "x: expected a tensor, got list"),
    "integers": ((torch.ones(1, 1, 1, 1, dtype=torch.int32),), TypeError, "x: .*got torch.int32"),
    "in fp8": ((stored(1, 1, 1, 1),), TypeError, "x: .*got torch.float8_e4m3fn"),
    "dimensions": ((torch.ones(1, 1, 1),), ValueError, r"x: expected \(B, Hkv, T, D\), got 3 dimensions"),
    "scale 0": ((WIDE, torch.tensor([1.0, 0.0])), ValueError, "scale: expected finite numbers > 0, got 0.0"),
    "shape of scale": ((WIDE, torch.ones(8)), ValueError, r"scale: expected shape \(\), \(2,\) or \(2, 2\)"),
}


@pytest.mark.parametrize(("given", "error", "words"), ROUNDING.values(), ids=ROUNDING)
def test_rounding_refuses(given, error, words):
    with pytest.raises(error, match=words):
        quantize_fp8(*given)


def test_old_gpus_are_refused(monkeypatch):
    """A fake tensor of a GPU stands in for one: the sentence names what the GPU is."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from softpick.ops import backends

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    with FakeTensorMode():
        q, v = torch.empty(1, 2, 1, 16, device="cuda"), torch.empty(1, 2, 8, 16, device="cuda", dtype=E4M3)
        for capability, refused in (((8, 6), True), ((8, 9), False), ((9, 0), False)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
            why = backends.triton_refuses(q, v, NORMALIZERS["softpick"], 2)
            assert (why is not None) == refused
            assert why is None or ("capability 8.9 (Ada) or newer" in why and "got 8.6" in why)


def test_all_numbers_are_drawn():
    drawn = stored(100_000).float()
    assert drawn.isfinite().all()
    assert len(drawn.unique()) > 150


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [None, 0.7, 250.0])
def test_what_is_stored_stays_within_the_range_of_its_dtype(dtype, scale):
    top = torch.finfo(dtype).max
    x = torch.tensor([top, -top, top * (1 - 2**-6), 1.0], dtype=dtype).view(1, 1, 1, 4)
    if scale is not None:
        scale = torch.tensor(scale * top / 65504 if dtype != torch.float64 else 1e35)
    stored, scale = quantize_fp8(x, scale)
    back = (stored.to(torch.float64) * scale.double()).to(dtype)
    assert back.isfinite().all()
    fits = (x.double() / scale.double()).abs() <= 448
    assert ((back.double() - x.double()).abs() <= x.double().abs() / 16 + scale.double() / 1024)[fits].all()


def test_numbers_beyond_fp32_have_the_scale_that_holds_them():
    stored, scale = quantize_fp8(torch.full((1, 1, 2, 4), 1e39, dtype=torch.float64))
    torch.testing.assert_close(
        stored.double() * scale.double(), torch.full((1, 1, 2, 4), 1e39, dtype=torch.float64), rtol=1 / 16, atol=0
    )


@pytest.mark.parametrize("scale", [1e-50, 1e300])
def test_scales_are_checked_as_fp32(scale):
    scale = torch.tensor(scale, dtype=torch.float64)
    with pytest.raises(ValueError, match="scale: expected finite numbers > 0"):
        quantize_fp8(torch.zeros(1, 1, 2, 4), scale)
    cache = torch.zeros(1, 1, 4, 16, dtype=torch.float8_e4m3fn)
    if scale > 1:
        with pytest.raises(ValueError, match="value_scale: expected finite numbers"):
            decode_attention(torch.zeros(1, 1, 1, 16), cache, cache, key_scale=torch.ones(()), value_scale=scale)


def test_scales_have_no_gradient():
    cache, scale = torch.zeros(1, 1, 4, 16, dtype=torch.float8_e4m3fn), torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="key_scale: expected a scale that requires no gradient"):
        decode_attention(torch.zeros(1, 1, 1, 16), cache, cache, key_scale=scale, value_scale=torch.ones(()))


def test_flags_are_flags():
    with pytest.raises(TypeError, match="paged: expected True or False, got 'no'"):
        quantize_fp8(torch.zeros(1, 1, 2, 4), paged="no")
