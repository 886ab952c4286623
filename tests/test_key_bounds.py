"""Bounds of the keys of a cache: true, equal after an update to those made anew, and what is refused."""

import math

import pytest
import torch
from bounded_caches import KINDS, cache, pages

import softpick
from softpick import KeyBounds, decode_attention, key_bounds, update_key_bounds
from softpick.ops.key_bounds import BLOCK_SIZES


def keys(kind="aligned", positions=100, dtype=torch.float64, seed=0, d=8):
    torch.manual_seed(seed)
    query = torch.randn(2, 2, 1, d, dtype=torch.float64) * 3
    return cache(kind, query, 2, positions, seed).to(dtype)


def equal(a, b, where=None):
    """To the bit; ``where``: boolean like ``filled``."""
    assert a.block_size == b.block_size
    for name, x, y in zip(a._fields[:-1], a[:-1], b[:-1], strict=True):
        if where is not None:
            x, y = (z[where] if name == "filled" else z.transpose(1, 2)[where] for z in (x, y))
        assert torch.equal(x, y), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bounds_are_true_and_tight(kind, dtype):
    """In fp64, block by block; and not a tenth larger than they must be."""
    key, lengths = keys(kind, dtype=dtype), [100, 37]
    for size in BLOCK_SIZES:
        bounds = key_bounds(key, block_size=size, cache_seqlens=torch.tensor(lengths))
        assert bounds.mean.dtype == dtype
        assert bounds.radius.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for b, length in enumerate(lengths):
            for block in range(-(-100 // size)):
                filled = max(0, min(size, length - block * size))
                assert bounds.filled[b, block] == filled
                for h in range(2):
                    x = key[b, h, block * size : block * size + filled].double()
                    mean, radius, offset, spread, norm = (y[b, h, block].double() for y in bounds[:5])
                    if not filled:
                        assert radius < 1e-15
                        continue
                    away = x - mean
                    for bound, least in (
                        (radius, away.norm(dim=-1).max()),
                        (offset, (x.mean(0) - mean).norm()),
                        (norm, x.norm(dim=-1).max()),
                        (spread, torch.linalg.matrix_norm(away, 2) / math.sqrt(filled)),
                    ):
                        assert bound >= least
                    assert norm <= 1.0001 * x.norm(dim=-1).max() + 1e-15
                    assert radius <= 1.0001 * away.norm(dim=-1).max() + 1e-15
                    assert spread <= radius
                    assert spread <= 1.7 * torch.linalg.matrix_norm(away, 2) / math.sqrt(filled) + 1e-15
                    rounding = torch.finfo(dtype).eps * norm + (
                        1e-7 if dtype == torch.float16 else 0
                    )  # below its range
                    assert offset <= rounding + 2e-5 * radius + 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 3, 16, 40])
@pytest.mark.parametrize("page", [0, 16, 64])
def test_an_update_equals_bounds_made_anew(dtype, new, page):
    """Sequences of different lengths, one of them empty for a while, one full at the end."""
    key, size = keys(positions=128, dtype=dtype), 16
    key = torch.cat([key, key[:1]])
    lengths = torch.tensor([90, 1, 0])
    whole, table = pages((key,), [128, 128, 128], page) if page else (key, None)
    unwritten = torch.full_like(whole, math.nan)
    options = {} if table is None else {"block_table": table}
    bounds = key_bounds(unwritten, block_size=size, cache_seqlens=0 * lengths, **options)
    assert (bounds.filled == 0).all()
    first = key_bounds(whole, block_size=size, cache_seqlens=lengths, **options)
    for step in range(4):
        if step:
            lengths = torch.minimum(
                lengths + torch.tensor([new, min(new, 2 * step), new if step > 1 else 0]), torch.tensor(128)
            )
            update_key_bounds(first, whole, lengths, new=new, **options)
        anew = key_bounds(whole, block_size=size, cache_seqlens=lengths, **options)
        equal(first, anew, anew.filled > 0)
        assert torch.equal(first.filled, anew.filled)
    assert lengths[0] == min(128, 90 + 3 * new)


def test_an_update_of_nothing_changes_nothing():
    """All sequences are empty, or there is none; also where a table has no page of them."""
    key = keys(positions=32)
    bounds = key_bounds(key, block_size=16)
    before = KeyBounds(*(x.clone() for x in bounds[:-1]), 16)
    update_key_bounds(bounds, -key, torch.tensor([0, 0]))
    equal(bounds, before)
    (pool, table) = pages((key,), [32, 32], 16)
    bounds = key_bounds(pool, block_size=16, block_table=table)
    before = KeyBounds(*(x.clone() for x in bounds[:-1]), 16)
    update_key_bounds(bounds, -pool, torch.tensor([0, 0]), block_table=torch.full_like(table, -1))
    equal(bounds, before)
    update_key_bounds(bounds, -pool, torch.tensor([], dtype=torch.long), block_table=table[:0])
    equal(bounds, before)
    # one of two: its own page, not that of the other
    update_key_bounds(bounds, pool * 2, torch.tensor([0, 32]), block_table=table)
    changed = (bounds.norm != before.norm).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [int(table[1, 1])]


def test_pages_are_shared():
    """A page belongs to whoever has it; the one that has filled more of it says what the bounds are of."""
    key = keys(positions=64)
    pool, table = pages((key,), [64, 64], 32)
    shared = table.clone()
    shared[1, 0] = table[0, 0]
    bounds = key_bounds(pool, block_size=16, block_table=shared, cache_seqlens=torch.tensor([64, 10]))
    assert bounds.filled[table[0, 0].item()].tolist() == [16, 16]
    assert bounds.filled[table[1, 0].item()].tolist() == [0, 0]
    alone = key_bounds(key, block_size=16)
    for b, j in ((0, 0), (0, 1)):
        at = table[b, j].item()
        torch.testing.assert_close(bounds.mean[at], alone.mean[b, :, 2 * j : 2 * j + 2])


def test_an_update_of_a_shared_page():
    """Each writes the bounds of the longest, so that no mixture of two stays."""
    key = keys(positions=32)
    pool, table = pages((key[:1],), [32], 32)
    table = table.repeat(3, 1)
    bounds = key_bounds(pool, block_size=16, block_table=table, cache_seqlens=torch.tensor([0, 0, 0]))
    for lengths in ([3, 30, 17], [30, 2, 0]):
        update_key_bounds(bounds, pool, torch.tensor(lengths), block_table=table, new=30)
        equal(bounds, key_bounds(pool, block_size=16, block_table=table, cache_seqlens=torch.tensor(lengths)))


def test_a_sequence_that_is_taken_back():
    """Written over, position by position: what decoding sees is right after every update."""
    key = keys(positions=64)
    bounds = key_bounds(key, block_size=16)
    key = -key
    for length in range(20, 40):
        key[:, :, length - 1] *= -2
        update_key_bounds(bounds, key, torch.tensor([length, 64]))
        anew = key_bounds(key, block_size=16, cache_seqlens=torch.tensor([length, 64]))
        now = (length - 1) // 16
        for x, y in zip(bounds[:5], anew[:5], strict=True):
            assert torch.equal(x[0, :, now], y[0, :, now])
        assert bounds.filled[0, now] == anew.filled[0, now]


def test_numbers_beyond_the_range_bound_nothing():
    """Overflow makes the bounds infinite or NaN, with which every block is read."""
    key = keys(dtype=torch.float32)
    key[0, 0, 3] = 1e30
    bounds = key_bounds(key, block_size=16)
    assert not bounds.radius[0, 0, 0].isfinite()
    assert bounds.radius[0, 0, 1:].isfinite().all()
    tiny = key_bounds(keys(dtype=torch.float32) * 1e-30, block_size=16)
    away = (keys(dtype=torch.float32).double() * 1e-30)[:, :, :16]
    assert (tiny.radius[:, :, 0] >= (away - away.mean(2, keepdim=True)).norm(dim=-1).amax(-1)).all()


KEY, QUERY = torch.randn(2, 2, 40, 8), torch.randn(2, 4, 1, 8)
BOUNDS = key_bounds(KEY, block_size=16)
POOL, TABLE = torch.randn(3, 32, 2, 8), torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"key_cache": [1.0]}, TypeError, "key_cache: expected a tensor, got list"),
        ({"key_cache": KEY.int()}, TypeError, "key_cache: expected a floating-point"),
        ({"key_cache": KEY[0]}, ValueError, r"key_cache: expected \(B, Hkv, S, D\), got 3 dimensions"),
        ({"key_cache": POOL[0], "block_table": TABLE}, ValueError, "key_cache: expected pages"),
        ({"block_size": 24}, ValueError, "block_size: expected one of 16, 32, 64, 128; got 24"),
        ({"block_size": 16.0}, TypeError, "block_size: expected an integer"),
        (
            {"key_cache": POOL, "block_table": TABLE, "block_size": 64},
            ValueError,
            "a divisor of the page size 32, got 64",
        ),
        ({"key_cache": POOL, "block_table": TABLE.long()}, TypeError, "block_table: expected an int32"),
        ({"key_cache": POOL, "block_table": TABLE[0]}, ValueError, r"block_table: expected shape \(B, max_blocks\)"),
        ({"key_cache": POOL, "block_table": TABLE.to("meta")}, ValueError, "block_table: expected the cache's device"),
        ({"key_cache": POOL, "block_table": TABLE + 1}, ValueError, "block_table: expected pages from 0 to 2"),
        ({"cache_seqlens": [1, 2]}, TypeError, "cache_seqlens: expected an int32 or int64 tensor, got list"),
        ({"cache_seqlens": torch.tensor([1])}, ValueError, r"cache_seqlens: expected shape \(2,\)"),
        ({"cache_seqlens": torch.tensor([1, 2]).to("meta")}, ValueError, "cache_seqlens: expected the cache's device"),
        (
            {"cache_seqlens": torch.tensor([1, 41])},
            ValueError,
            "cache_seqlens: expected lengths from 0 to the cache's 40",
        ),
    ],
)
def test_refusals_of_key_bounds(change, error, says):
    given = {"key_cache": KEY, "block_size": 32} | change
    with pytest.raises(error, match=says):
        key_bounds(given.pop("key_cache"), **given)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"bounds": tuple(BOUNDS)}, TypeError, "key_bounds: expected what softpick.key_bounds returns, got tuple"),
        ({"new": 0}, ValueError, "new: expected an integer >= 1, got 0"),
        ({"cache_seqlens": torch.tensor([1, 41])}, ValueError, "cache_seqlens: expected lengths"),
        ({"key_cache": KEY[:, :, :30]}, ValueError, "key_bounds: expected the bounds of this cache, mean of shape"),
    ],
)
def test_refusals_of_update(change, error, says):
    given = {"bounds": BOUNDS, "key_cache": KEY, "cache_seqlens": torch.tensor([3, 4])} | change
    with pytest.raises(error, match=says):
        update_key_bounds(given.pop("bounds"), given.pop("key_cache"), given.pop("cache_seqlens"), **given)


@pytest.mark.parametrize("name", ["softmax", "softmax_plus_one", "learned_sink", "linear_softpick"])
def test_normalizers_without_zeros_are_refused_by_name(name):
    sink = torch.zeros(4) if name == "learned_sink" else None
    says = f"key_bounds: expected a normalizer with a rectified numerator .*'relu_softpick', 'rectified'.*got '{name}'"
    with pytest.raises(ValueError, match=says):
        decode_attention(QUERY, KEY, KEY, key_bounds=BOUNDS, normalizer=name, sink=sink)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"max_error": -0.1}, ValueError, "max_error: expected a number from 0 to below 1, got -0.1"),
        ({"max_error": 1.0}, ValueError, "max_error: expected a number from 0 to below 1, got 1.0"),
        ({"max_error": "little"}, TypeError, "max_error: expected a number from 0 to below 1"),
        ({"max_error": 0.1, "key_bounds": None}, ValueError, "max_error: expected key_bounds beside it"),
        ({"return_error": True, "key_bounds": None}, ValueError, "return_error: expected key_bounds beside it"),
        ({"return_error": 1}, TypeError, "return_error: expected True or False"),
        ({"key_bounds": tuple(BOUNDS)}, TypeError, "key_bounds: expected what softpick.key_bounds returns"),
        (
            {"key_bounds": key_bounds(KEY[:1])},
            ValueError,
            "key_bounds: expected the bounds of this cache, mean of shape",
        ),
        ({"key_bounds": BOUNDS._replace(norm=BOUNDS.norm[:1])}, ValueError, "norm of shape"),
        ({"key_bounds": BOUNDS._replace(filled=BOUNDS.filled[:1])}, ValueError, "filled of shape"),
        ({"key_bounds": BOUNDS._replace(block_size=17)}, ValueError, "block_size: expected one of"),
        ({"key_bounds": BOUNDS._replace(norm=BOUNDS.norm.to("meta"))}, ValueError, "got norm on meta"),
        ({"key_bounds": key_bounds(KEY.double(), block_size=16)}, TypeError, "bounds of keys in torch.float32, got"),
    ],
)
def test_refusals_of_decoding(change, error, says):
    given = {"key_bounds": BOUNDS} | change
    with pytest.raises(error, match=says):
        decode_attention(QUERY, KEY, KEY, **given)


def test_keys_that_autocast_rounds_are_refused():
    """Their bounds are those of other numbers."""
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"bounds of keys in torch.bfloat16"):
        decode_attention(QUERY, KEY, KEY, key_bounds=BOUNDS)


def test_records_of_your_own():
    """Rectified ones are taken, and keys of those whose denominator has no bound are read."""
    names = {
        "relu_sum": {"base": "linear", "rectify": "positive", "eps": 1e-6},
        "squared": {"base": "square", "rectify": "positive", "absolute_denominator": True, "eps": 1e-6},
        "sink": {"base": "expm1", "rectify": "positive", "absolute_denominator": True, "constant": "sink"},
        "one": {"base": "expm1", "rectify": "positive", "absolute_denominator": True, "constant": 1},
    }
    torch.manual_seed(0)
    query = torch.randn(2, 2, 1, 8, dtype=torch.float64) * 3
    key = cache("aligned", query, 2, 100)
    bounds = key_bounds(key, block_size=16)
    for name, switches in names.items():
        norm = softpick.Normalizer(name, **switches)
        options = {
            "normalizer": norm,
            "scale": 1.0,
            "sink": torch.tensor([-3.0, 2.0]).double() if norm.needs_sink else None,
        }
        want = decode_attention(query, key, key, **options)
        got = decode_attention(query, key, key, **options, key_bounds=bounds, max_error=0.01, return_error=True)
        assert ((got.output - want).abs() <= got.error[..., None] * want.abs() + 1e-13).all()
        left_out = bool((got.blocks[..., 1] < got.blocks[..., 0]).all())
        assert left_out == (name != "squared")
        assert (got.blocks[..., 2] < got.blocks[..., 0]).all()
