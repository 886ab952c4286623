"""Decoding that leaves blocks of keys unread: the error never exceeds the bound that is returned, and nothing else is read."""

import math

import pytest
import torch
from bounded_caches import KINDS, attention, cache, pages, scores, seen
from hypothesis import given, settings
from hypothesis import strategies as st

import softpick
from softpick import NORMALIZERS, decode_attention, key_bounds, update_key_bounds
from softpick.ops import skipping
from softpick.ops.calls import check_cache_call

SPARSE = [name for name, norm in NORMALIZERS.items() if norm.sparse]
WINDOWS = {"none": (-1, 0), "window": (40, 0), "not causal": (-1, -1), "ahead": (30, 2)}


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def make(kind, *, batch=2, heads=4, kv_heads=2, queries=1, positions=100, d=8, seed=0, spread=0.1):
    """Queries of a group that nearly agree, keys against them, values."""
    torch.manual_seed(seed)
    query = draw(batch, kv_heads, 1, d).repeat_interleave(heads // kv_heads, 1) * 3
    query = query + spread * draw(batch, heads, queries, d)
    return query, cache(kind, query, kv_heads, positions, seed, spread), draw(batch, kv_heads, positions, 5)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(SPARSE),
    heads=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    queries=st.sampled_from([1, 2, 17]),
    positions=st.integers(1, 140),
    shorter=st.integers(0, 140),
    window=st.sampled_from(list(WINDOWS)),
    block_size=st.sampled_from([16, 32]),
    page=st.sampled_from([0, 32, 64]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    scale=st.sampled_from([0.25, 1.0, 4.0, -1.0]),
    spread=st.sampled_from([0.01, 0.1, 0.5]),
    max_error=st.sampled_from([0.0, 1e-4, 1e-3, 1e-2, 0.3]),
    stats=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_the_error_is_never_above_the_bound(
    kind,
    name,
    heads,
    queries,
    positions,
    shorter,
    window,
    block_size,
    page,
    softcap,
    scale,
    spread,
    max_error,
    stats,
    seed,
):
    q, k, v = make(
        kind, heads=heads[0], kv_heads=heads[1], queries=queries, positions=positions, seed=seed, spread=spread
    )
    k = k * (1 if scale > 0 else -1)
    lengths = [positions, max(0, positions - shorter)]
    left, right = WINDOWS[window]
    keep = seen(lengths, positions, queries, left, right)
    want, want_lse = attention(q, k, v, name, keep, scale, softcap)
    options = {"cache_seqlens": torch.tensor(lengths)}
    if page:
        k, v, options["block_table"] = pages((k, v), lengths, page)
    else:
        empty = (torch.arange(positions) >= options["cache_seqlens"][:, None])[:, None, :, None]
        k, v = k.masked_fill(empty, math.nan), v.masked_fill(empty, math.nan)
    bounds = key_bounds(k, block_size=block_size, **options)
    got = decode_attention(
        q, k, v, **options, normalizer=name, scale=scale, softcap=softcap, window=(left, right), is_causal=right == 0,
        key_bounds=bounds, max_error=max_error, return_error=True, return_stats=stats,
    )  # fmt: skip
    assert (got.error <= max_error).all()
    error = (got.output - want).abs()
    assert (error <= got.error[..., None] * want.abs() + 1e-11 * v.nan_to_num(0.0).abs().max()).all()
    if stats:
        there = want_lse > -math.inf
        ratio = torch.expm1((want_lse - got.lse)[there]).abs()
        assert (ratio <= got.error[there] + 1e-11).all()
    visible, keys, values = got.blocks.unbind(-1)
    assert (values <= keys).all()
    assert (keys <= visible).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_enclosures_are_true(kind, dtype, softcap):
    """In fp64: no score of a block whose values are left out is above 0, and the denominator's rest is as close as it says."""
    for seed, (block_size, lengths) in enumerate([(16, [100, 100]), (32, [100, 61]), (16, [16, 1]), (64, [99, 64])]):
        q, k, v = make(kind, seed=seed, spread=0.05, queries=2)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        at = torch.tensor(lengths)
        call = check_cache_call(
            q, k, v, cache_seqlens=at, block_table=None, is_causal=True, scale=0.7, enable_gqa=True, normalizer="softpick",
            backend="auto", window=None, softcap=softcap, sink=None, eps=None, max_error=0.5,
            key_bounds=key_bounds(k, block_size=block_size, cache_seqlens=at),
        )  # fmt: skip
        plan = call.plan(at, None, True)
        s = scores(q, k, 0.7, softcap)
        keep = seen(lengths, 100, 2, -1, 0).expand(s.shape)
        of_block = torch.arange(100) // block_size
        per_head = plan.keys.repeat_interleave(2, 1)[:, :, None, of_block]
        dead = ~plan.values.repeat_interleave(2, 1)[:, :, None, of_block] & keep
        assert (s[dead] <= 0).all()
        total = torch.where(keep & ~per_head, -torch.expm1(s), 0.0).sum(-1)
        assert ((total - plan.rest).abs() <= plan.doubt).all()


@pytest.mark.parametrize("softcap", [None, 0.3, 2.0])
@pytest.mark.parametrize("kind", [*KINDS, "spread", "changing"])
def test_denominators_are_enclosed_block_by_block(kind, softcap, monkeypatch):
    """Of dead blocks from both sides, of all others from below: what the choice of blocks rests on."""
    found = {}
    monkeypatch.setattr(skipping, "_choose", lambda *args: found.update(args=args))
    for seed, (lengths, covered, left) in enumerate(
        [([96, 70], [96, 70], -1), ([96, 70], [90, 40], -1), ([96, 70], [90, 64], 9), ([60, 33], [96, 96], 40)]
    ):
        q, k, v = make(kind if kind in KINDS else "rank one", positions=96, seed=seed, queries=2)
        if kind == "spread":  # scores of both sides of a softcap's bend, in one direction
            k = k * torch.linspace(-0.4, 1, 96)[:, None]
        if kind == "changing":  # as many keys as the bounds are of, but others
            k = -k * torch.where(torch.arange(96) < 90, 1, 1e-3)[:, None]
        call = check_cache_call(
            q, k, v, cache_seqlens=torch.tensor(lengths), block_table=None, is_causal=True, scale=0.1, enable_gqa=True,
            normalizer="softpick", backend="auto", window=(left, 0), softcap=softcap, sink=None, eps=None, max_error=0.1,
            key_bounds=key_bounds(k, block_size=16, cache_seqlens=torch.tensor(covered)),
        )  # fmt: skip
        call.plan(torch.tensor(lengths), None, True)
        doubt, middle, least, dead = found["args"][:4]
        s = scores(q, k, 0.1, softcap)
        g = torch.where(seen(lengths, 96, 2, left, 0), torch.expm1(s).abs(), 0.0)
        g = g.unflatten(-1, (6, 16)).sum(-1).view(least.shape)
        largest = (
            s.masked_fill(~seen(lengths, 96, 2, left, 0), -math.inf).unflatten(-1, (6, 16)).amax(-1).view(least.shape)
        )
        assert (largest[dead] <= 0).all()
        assert (least <= g + 1e-12).all()
        assert ((g - middle).abs() <= doubt + 1e-12)[dead].all()


def test_the_examples_leave_something_out():
    """The tests above would pass if everything were read."""
    left = {}
    for kind in KINDS:
        q, k, v = make(kind, positions=200, spread=0.02)
        counts = [
            decode_attention(
                q,
                k,
                v,
                key_bounds=key_bounds(k, block_size=16),
                max_error=e,
                scale=1.0,
                return_error=True,
                return_stats=True,
            ).blocks.sum((0, 1))
            for e in (0.0, 1e-3, 1e-2)
        ]
        visible, keys = counts[0][0], [int(count[1]) for count in counts]
        assert keys[0] == visible
        assert keys[0] >= keys[1] >= keys[2]
        left[kind] = [int(visible) - n for n in keys] + [int(visible - counts[0][2])]
    assert all(left[kind][2] > 20 for kind in ("aligned", "negative", "huge", "equal"))
    assert all(left[kind][1] > 10 for kind in ("aligned", "huge", "equal"))
    assert left["random"] == [0, 0, 0, 0]
    # of the 13 blocks of each of the 4 pairs, 7 have no outlier
    assert left["outlier"][3] == 4 * 7


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("window", [None, 50])
def test_exact_without_an_allowed_error(name, window):
    """Values alone are left out; keys only where they count nowhere."""
    q, k, v = make("aligned", positions=150, queries=2)
    lengths = torch.tensor([150, 90])
    options = {"cache_seqlens": lengths, "normalizer": name, "is_causal": True, "window": window}
    want = decode_attention(q, k, v, **options, return_stats=True)
    got = decode_attention(
        q, k, v, **options, key_bounds=key_bounds(k, block_size=16, cache_seqlens=lengths), return_error=True,
        return_stats=True,
    )  # fmt: skip
    torch.testing.assert_close(got.output, want.output, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.row_mass, want.row_mass, rtol=1e-13, atol=1e-13)
    assert got.max_score is None
    assert (got.error == 0).all()
    visible, keys, values = got.blocks.unbind(-1)
    assert (values < visible).all()
    assert ((keys < visible) if name in ("relu_softpick", "rectified") else (keys == visible)).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["softpick", "relu_softpick"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("max_error", [0.0, 1e-2])
def test_what_is_left_out_is_not_read(backend, name, paged, max_error):
    """Keys and values that are left out are NaN, and nothing of the result is."""
    if backend == "triton":
        on_interpreter()
    q, k, v = (x.float() for x in make("aligned", positions=160, spread=0.03))
    lengths = torch.tensor([160, 130])
    options = {"cache_seqlens": lengths, "normalizer": name, "scale": 1.0}
    bounds = key_bounds(k, block_size=16, cache_seqlens=lengths)
    call = check_cache_call(
        q, k, v, cache_seqlens=lengths, block_table=None, is_causal=True, scale=1.0, enable_gqa=True, normalizer=name,
        backend="auto", window=None, softcap=None, sink=None, eps=None, key_bounds=bounds, max_error=max_error,
    )  # fmt: skip
    plan = call.plan(lengths, None, False)
    want = decode_attention(q, k, v, **options)
    read, needed = (x.repeat_interleave(16, -1)[..., :160, None] for x in (plan.keys, plan.values))
    assert 0 < needed.sum() < needed.numel() / 2
    left_out = max_error > 0 or name != "softpick"
    assert (read.sum() == needed.sum()) if left_out else (read.sum() > 0.8 * read.numel())
    if paged:
        *pools, options["block_table"] = pages((k, v), lengths.tolist(), 32)
        bounds = key_bounds(pools[0], block_size=16, **{x: options[x] for x in ("cache_seqlens", "block_table")})
        torch.manual_seed(0)
        k, v = k.masked_fill(~read, math.nan), v.masked_fill(~needed, math.nan)
        for pool, x in zip(pools, (k, v), strict=True):
            for b, length in enumerate(lengths.tolist()):
                for j in range(length):
                    pool[options["block_table"][b, j // 32], j % 32] = x[b, :, j]
        k, v = pools
    else:
        k, v = k.masked_fill(~read, math.nan), v.masked_fill(~needed, math.nan)
    got = decode_attention(
        q, k, v, **options, backend=backend, key_bounds=bounds, max_error=max_error, return_error=True
    )
    assert ((got.output - want).abs() <= got.error[..., None] * want.abs() + 1e-5).all()
    assert (got.error.max() > 0) == (name == "softpick" and max_error > 0)
    counts = torch.stack([x.sum(-1) for x in (plan.keys, plan.values)], -1)
    torch.testing.assert_close(got.blocks[..., 1:], counts.int())


def test_a_head_that_gives_nothing_reads_nothing():
    """Unless its denominator is asked for."""
    q, k, v = make("equal", positions=100, spread=0.02)
    k *= torch.linspace(1, 2, 100)[:, None]
    options = {"scale": 1.0, "key_bounds": key_bounds(k, block_size=16), "return_error": True}
    got = decode_attention(q, k, v, **options)
    assert (got.output == 0).all()
    assert (got.error == 0).all()
    assert got.blocks.sum((0, 1)).tolist() == [28, 0, 0]
    full = decode_attention(q, k, v, **options, return_stats=True)
    torch.testing.assert_close(full.lse, decode_attention(q, k, v, scale=1.0, return_stats=True).lse)
    assert (full.error == 0).all()
    assert full.blocks.sum((0, 1)).tolist() == [28, 28, 0]


def test_keys_that_came_later_are_read():
    """Bounds that do not cover a block say nothing about it, whatever a window leaves of it."""
    q, k, v = make("negative", positions=64, spread=0.02)
    lengths = torch.tensor([40, 40])
    bounds = key_bounds(k, block_size=16, cache_seqlens=lengths)
    k[:, :, 40:] *= -1  # written since
    for window in (None, 16, 28):
        call = {"window": window, "scale": 1.0}
        got = decode_attention(q, k, v, **call, key_bounds=bounds, max_error=0.1, return_error=True)
        want = decode_attention(q, k, v, **call)
        assert (want > 0).any()
        assert ((got.output - want).abs() <= got.error[..., None] * want.abs() + 1e-12).all()
    assert got.blocks[..., 1].min() >= 2


@pytest.mark.parametrize("where", ["key", "query", "other block"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_read(where, number):
    q, k, v = make("aligned", positions=64, spread=0.02)
    if where == "query":
        q[:, :, :, 0] = number
    else:
        k[:, :, 2 if where == "key" else 50, 0] = number
    options = {"scale": 1.0, "return_stats": True}
    want = decode_attention(q, k, v, **options)
    got = decode_attention(
        q, k, v, **options, key_bounds=key_bounds(k, block_size=16), max_error=0.1, return_error=True
    )
    finite = want.output.isfinite()
    assert (got.output.isfinite() == finite).all()
    assert (
        (got.output - want.output).abs()[finite].max() <= 0.1 * want.output[finite].abs().max()
        if finite.any()
        else True
    )


def test_every_row_of_a_tile_counts():
    """One head of a group for which a block is positive has it read for all, and no head's error is above the bound."""
    q, k, v = make("negative", heads=4, kv_heads=1, batch=1, positions=96, spread=0.02)
    q[:, 3] *= -1
    got = decode_attention(q, k, v, key_bounds=key_bounds(k, block_size=16), max_error=0.1, return_error=True)
    assert got.blocks.tolist() == [[[6, 6, 6]]]


def test_the_cheapest_blocks_are_left_out_first():
    """Doubts of one row: as many blocks as the budget has room for, the smallest first."""
    doubt = torch.tensor([0.4, 0.1, 0.3, 0.2, 0.05]).view(1, 1, 1, 5)
    ones, dead = torch.ones(1, 1, 1, 5), torch.ones(1, 1, 1, 5, dtype=torch.bool)
    dead[..., 0] = False
    plan = skipping._choose(doubt, ones, ones, dead, ones.int(), torch.Size((1, 1, 1, 8)), 0.1, True, 16)
    assert plan.keys.flatten().tolist() == [True, False, True, False, False]
    assert plan.values.flatten().tolist() == [True, False, False, False, False]
    torch.testing.assert_close(plan.doubt, torch.tensor(0.35).view(1, 1, 1))
    torch.testing.assert_close(plan.rest, torch.tensor(3.0).view(1, 1, 1))


def test_products_that_torch_may_round_widen_the_bounds():
    q, k, _ = (x.float() for x in make("edge"))
    bounds, high = key_bounds(k, block_size=16), {}
    usual = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            high[precision] = skipping._enclosure(q.reshape(2, 2, 2, 8), bounds, 1.0, None).high
    finally:
        torch.set_float32_matmul_precision(usual)
    assert (high["high"] > high["highest"]).all()
    assert (high["medium"] > high["high"]).all()


def on_interpreter():
    pytest.importorskip("triton")
    from softpick.ops.calling import interpreted

    if not interpreted():
        pytest.skip("the kernels run on the GPU here")


@pytest.mark.thinned
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"window": 50}, {"softcap": 2.0}, {"is_causal": False, "window": (60, 3)}], ids=str
)
def test_the_kernel_reads_the_same_blocks(name, dtype, options, monkeypatch):
    """Against the reference, with several programs a head; lengths that end within blocks; in pages, too."""
    on_interpreter()
    from softpick.ops.triton import launch_decode

    monkeypatch.setattr(launch_decode, "_splits", lambda resident, fewest, pairs, tk, block_n: (3, 64))
    q, k, v = (x.to(dtype) for x in make("aligned", positions=160, queries=2, spread=0.05))
    # the last sequences see so few keys that 16-bit weights are computed with more care
    for block_size, page, last in ((16, 0, 77), (32, 0, 9), (16, 32, 77), (16, 16, 7), (64, 64, 77)):
        lengths = torch.tensor([160, last])
        where, call = (k, v), {"cache_seqlens": lengths, "normalizer": name, "is_causal": True} | options
        if page:
            *where, call["block_table"] = pages((k, v), lengths.tolist(), page)
        at = {x: call[x] for x in ("cache_seqlens", "block_table") if x in call}
        call |= {"key_bounds": key_bounds(where[0], block_size=block_size, **at), "max_error": 0.02}
        call |= {"return_error": True, "return_stats": True}
        want = decode_attention(q, *where, **call, backend="reference")
        got = decode_attention(q, *where, **call, backend="triton")
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
        torch.testing.assert_close(got.output, want.output, **tolerance)
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.error, want.error, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(got.blocks, want.blocks)
        assert block_size == 64 or (got.blocks[..., 1] < got.blocks[..., 0]).any()


def test_a_broken_kernel_leaves_the_reference(monkeypatch):
    """With the same blocks, and a warning; a named backend raises."""
    on_interpreter()
    from softpick.ops import kernel_errors
    from softpick.ops.triton import launch_decode

    monkeypatch.setattr(kernel_errors, "_told", set(), raising=False)

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("decode")

    q, k, v = (x.float() for x in make("aligned", positions=80, spread=0.03))
    call = {"key_bounds": key_bounds(k, block_size=16), "max_error": 0.01, "return_error": True, "scale": 1.0}
    want = decode_attention(q, k, v, **call)
    monkeypatch.setattr(launch_decode, "decode_split", Broken())
    with softpick.use_backend("triton"), pytest.raises(Exception, match="decode"):
        decode_attention(q, k, v, **call, backend="triton")
    torch.testing.assert_close(decode_attention(q, k, v, **call).output, want.output)


def test_the_kernel_is_named():
    pytest.importorskip("triton")
    from softpick.ops.spec import AttentionSpec
    from softpick.ops.triton import dispatch

    q, k, v = (x.bfloat16() for x in make("aligned"))
    spec = AttentionSpec(NORMALIZERS["softpick"], 1.0, 1e-6)
    choice = dispatch.decode_kernel(spec, q, k, v, None, 0, 2**20, True)
    assert choice.kernel == "decode.py"
    assert choice.reason.startswith("key_bounds")
    explained = softpick.explain_backend(q, k, v, key_bounds=key_bounds(k), max_error=1e-3)
    assert (explained.function, explained.backend) == ("decode_attention", "reference")
    with pytest.raises(ValueError, match="max_error: only decode_attention"):
        softpick.explain_backend(q, k, v, max_error=1e-3, enable_gqa=True)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.long)])
def test_one_graph(dynamic):
    """Compiled, with any sizes, as outside; and shapes without values."""
    torch._dynamo.reset()
    k, v = torch.linspace(-1, 0.5, 2 * 2 * 40 * 8).view(2, 2, 40, 8), draw(2, 2, 40, 8).float()
    bounds, lengths = key_bounds(k, block_size=16), torch.tensor([40, 23])

    def call(q):
        update_key_bounds(bounds, k, lengths)
        found = decode_attention(
            q, k, v, cache_seqlens=lengths, key_bounds=bounds, max_error=0.05, is_causal=True, return_error=True
        )
        return found.output, found.error, found.blocks

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (1, 3) if dynamic else (3,):
        q = torch.rand(2, 4, length, 8)
        torch.testing.assert_close(compiled(q), call(q), rtol=1e-5, atol=1e-6)
    meta = softpick.KeyBounds(*(x.to("meta") for x in bounds[:-1]), 16)
    q, k, v = (x.to("meta") for x in (q[:, :, :1], k, v))
    assert decode_attention(q, k, v, key_bounds=meta, backend="reference").shape == (2, 4, 1, 8)
