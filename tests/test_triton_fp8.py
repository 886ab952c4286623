"""Decoding from caches in fp8 by the portable kernel, in Triton's interpreter, against the formula over stored numbers times
scales in fp64. test_triton_gpu_decode.py has the same on GPUs, with what moves bits by instructions.
"""

import pytest
import torch
from fp8_caches import LAYOUTS, draw

from softpick import NORMALIZERS, decode_attention
from softpick.ops.calling import interpreted
from softpick.ops.triton import launch_decode

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs the GPU kernels in Triton's interpreter")

NAMES = list(NORMALIZERS)
OPTIONS = {
    "plain": {},
    "window": {"window": 9},
    "window and softcap": {"window": (20, 0), "softcap": 2.0},
    "not causal": {"is_causal": False, "scale": 0.4},
}


def check(q, caches, scales, exact, table, name, **options):
    sink = torch.randn(q.shape[1], dtype=torch.float64) if NORMALIZERS[name].needs_sink else None
    common = {"normalizer": name, "return_stats": True, "is_causal": True} | options
    want = decode_attention(q.double(), *exact, sink=sink, backend="reference", **common)
    got = decode_attention(
        q, *caches, **scales, block_table=table, sink=None if sink is None else sink.to(q.dtype), backend="triton", **common
    )  # fmt: skip
    rtol = 2e-3 if q.dtype == torch.float16 else 1e-5
    atol = rtol * float(want.output.abs().max()) + (2.0**-24 if q.dtype == torch.float16 else 0.0)
    torch.testing.assert_close(got.output.double(), want.output, rtol=rtol, atol=atol)
    torch.testing.assert_close(got.lse.double(), want.lse, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("shape", "page"), LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_scale(name, shape, page, skip, monkeypatch, poisoned):
    """Several splits, lengths that end inside a page, and with SKIP values that are not read."""
    monkeypatch.setattr(launch_decode, "skips_values", lambda spec, *_: skip and spec.norm.sparse)
    monkeypatch.setattr(launch_decode, "_splits", lambda resident, fewest, pairs, tk, block_n: (-(-tk // 128), 128))
    caches, scales, table, exact = draw(3, 2, 160, 20, 16, shape, page)
    options = OPTIONS[list(OPTIONS)[(NAMES.index(name) + len(shape)) % len(OPTIONS)]]
    lengths = torch.tensor([160, 131, 2])
    dtype = torch.float16 if (NAMES.index(name) + page) % 3 == 0 else torch.float32
    check(torch.randn(3, 4, 2, 20).to(dtype), caches, scales, exact, table, name, cache_seqlens=lengths, **options)


@pytest.mark.parametrize("name", ["softpick", "softmax", "linear_softpick"])
def test_scales_of_pages_in_fp16_leave_its_range(name, poisoned):
    """Of values whose scale is tiny beside another page's, nothing is lost; weights times a large one do not overflow."""
    caches, scales, table, _ = draw(1, 2, 64, 16, 16, "pages", 16)
    scales["value_scale"] = torch.tensor([2.0**-12, 2.0**-8, 2.0, 64.0])[table[0].argsort()][:, None].expand(4, 2)
    for first, length in ((0, 16), (0, 32), (0, 64)):
        kept = torch.tensor([length - first])
        wide = [
            (x.double() * scales[key].double()[:, None, :, None])[table.long()].flatten(1, 2).transpose(1, 2)
            for x, key in zip(caches, ("key_scale", "value_scale"), strict=True)
        ]
        q = 0.05 * torch.randn(1, 4, 1, 16)
        check(q.half(), caches, scales, wide, table, name, cache_seqlens=kept)


@pytest.mark.parametrize("name", NAMES)
def test_pages_that_do_not_exist_are_masked(name, poisoned):
    caches, scales, table, _ = draw(2, 2, 64, 16, 16, "pages", 16)
    table[0, 1], table[1, 2] = -1, 2**31 - 1
    q = torch.randn(2, 4, 1, 16)
    sink = torch.randn(4) if NORMALIZERS[name].needs_sink else None
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softpick.functional.checkable", lambda _: False)
        patch.setattr("softpick.ops.arguments.checkable", lambda _: False)
        for backend in ("triton", "reference"):
            found = decode_attention(
                q, *caches, **scales, block_table=table, normalizer=name, sink=sink, backend=backend
            )
            results.append(found)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_views_of_caches_and_scales_are_not_copied(poisoned):
    """Any strides: every second head of a cache with more, a scale of a column."""
    (k, v), scales, _, exact = draw(2, 4, 40, 16, 16, "sequences")
    wide = {key: torch.stack([x, 0 * x], -1)[..., 0][:, ::2] for key, x in scales.items()}
    q = torch.randn(2, 4, 1, 16)
    check(q, [k[:, ::2], v[:, ::2]], wide, [x[:, ::2] for x in exact], None, "softpick")


def test_bits_of_pairs():
    """What the inline assembly of decode.py does, in integers: exact for every finite number of e4m3 in either half."""
    low, high = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    word, keep = low | high << 8, (low & 0x7F != 0x7F) & (high & 0x7F != 0x7F)
    low, high = (x.to(torch.uint8).view(torch.float8_e4m3fn).double()[keep] for x in (low, high))
    for dtype, sign, shift, mask, factor in (
        (torch.bfloat16, 8, 4, 0x07F0, 2.0**120),
        (torch.float16, 8, 7, 0x3F80, 2.0**8),
    ):
        first = ((word << sign) & 0x8000) | ((word << shift) & mask)
        second = (word & 0x8000) | ((word >> (8 - shift)) & mask)
        for bits, want in ((first, low), (second, high)):
            got = bits.to(torch.int32).to(torch.uint16).view(dtype).double()[keep] * factor
            assert torch.equal(got, want)
