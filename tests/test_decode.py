"""decode_attention on the CPU: every option against the fp64 oracle over the filled positions, and what it refuses."""

import math

import pytest
import torch
from oracle import attention as oracle

from softpick import NORMALIZERS, decode_attention
from softpick.ops.calls import check_cache_call

NAMES = list(NORMALIZERS)
PAGE = 4


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def pages(k, v, lengths, garbage):
    """Both caches in pages in no order, NaN where nothing is filled, and the table, garbage where no page is used."""
    used = [-(-n // PAGE) for n in lengths]
    free = torch.randperm(max(1, sum(used))).tolist()
    table = torch.full((len(lengths), -(-k.shape[2] // PAGE)), garbage, dtype=torch.int32)
    pools = [torch.full((max(1, sum(used)), PAGE, x.shape[1], x.shape[3]), math.nan, dtype=x.dtype) for x in (k, v)]
    for b, length in enumerate(lengths):
        for j in range(length):
            if j % PAGE == 0:
                table[b, j // PAGE] = free.pop()
            for pool, x in zip(pools, (k, v), strict=True):
                pool[table[b, j // PAGE], j % PAGE] = x[b, :, j]
    return *pools, table


def wanted(q, k, v, lengths, name, *, window=(-1, -1), is_causal=True, **options):
    """Each sequence by itself, over its filled positions; its last query stands at the last of them."""
    outs, weights = [], []
    for b, length in enumerate(lengths):
        behind = torch.arange(q.shape[2])[:, None] + length - q.shape[2] - torch.arange(length)
        seen = torch.ones_like(behind, dtype=torch.bool)
        left, right = (window - 1, window - 1) if isinstance(window, int) else window
        seen &= behind >= 0 if is_causal else seen
        seen &= behind <= left if left >= 0 else seen
        seen &= behind >= -right if right >= 0 else seen
        out, w = oracle(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], name, mask=seen, **options)
        outs.append(out)
        weights.append(w)
    return torch.cat(outs), weights


def logits_of(name):
    return draw(4) if NORMALIZERS[name].needs_sink else None


OPTIONS = {
    "plain": {},
    "window": {"window": 3},
    "one-sided window": {"window": (2, 0)},
    "ahead": {"window": (1, 1), "is_causal": False},
    "unbounded to the left": {"window": (-1, 1), "is_causal": False},
    "not causal": {"is_causal": False},
    "softcap and scale": {"softcap": 1.5, "scale": 0.7},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_caches_and_pages(name, queries, options):
    """Contiguous and in pages, lengths of which some end exactly with a page; entries that are not used may be anything."""
    lengths = [2, 3, 4, 5, 7, 8, 9, 12]
    q, k, v = draw(8, 4, queries, 8), draw(8, 2, 12, 8), draw(8, 2, 12, 6)
    sink = logits_of(name)
    want, _ = wanted(q, k, v, lengths, name, sink=sink, **options)
    seqlens = torch.tensor(lengths)
    empty = (torch.arange(12) >= seqlens[:, None])[:, None, :, None]
    common = {"cache_seqlens": seqlens, "normalizer": name, "sink": sink, **options}
    # not filled: NaN
    got = decode_attention(q, k.masked_fill(empty, math.nan), v.masked_fill(empty, math.nan), **common)
    torch.testing.assert_close(got, want)
    for garbage in (-1, 7, 2**31 - 1):
        pool_k, pool_v, table = pages(k, v, lengths, garbage)
        got = decode_attention(q, pool_k, pool_v, block_table=table, **common)
        torch.testing.assert_close(got, want)
    # all filled, nothing said about lengths
    want, _ = wanted(q, k, v, [12] * 8, name, sink=sink, **options)
    torch.testing.assert_close(decode_attention(q, k, v, normalizer=name, sink=sink, **options), want)


@pytest.mark.parametrize("name", ["softmax", "softpick", "learned_sink", "linear_softpick"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_lse(name, dtype):
    q, k, v = draw(3, 4, 1, 8, dtype=dtype), draw(3, 2, 5, 8, dtype=dtype), draw(3, 2, 5, 6, dtype=dtype)
    sink = None if not NORMALIZERS[name].needs_sink else draw(4, dtype=dtype)
    lengths = torch.tensor([0, 3, 5], dtype=torch.int32)
    out, lse = decode_attention(q, k, v, cache_seqlens=lengths, normalizer=name, sink=sink, return_lse=True)
    want, weights = wanted(q, k, v, lengths.tolist(), name, sink=sink)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=4 * eps, atol=max(4 * eps, 1e-6))
    assert (out[0] == 0).all()  # an empty sequence
    scores = [
        q[b].double() @ k[b, :, :n].double().repeat_interleave(2, 0).mT / math.sqrt(8) for b, n in enumerate(lengths)
    ]
    for b in (1, 2):
        s = scores[b]
        total = {
            "softmax": s.exp().sum(-1),
            "softpick": torch.expm1(s).abs().sum(-1) + 1e-6 * s.amax(-1).clamp(min=0).exp(),
            "linear_softpick": 1 + s.abs().sum(-1),
            "learned_sink": s.exp().sum(-1) + (sink.double()[:, None].exp() if sink is not None else 0.0),
        }[name]
        torch.testing.assert_close(lse[b].double(), total.log(), rtol=1e-4, atol=1e-4)
    assert weights[1].shape[-1] == 3


def test_eps_reaches_the_denominator():
    q, k, v = draw(1, 2, 1, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 4)
    s = (q @ k.mT) / 2
    m = s.amax(-1, keepdim=True).clamp(min=0)
    f = torch.exp(s - m) - torch.exp(-m)
    want = (f.clamp(min=0) / (f.abs().sum(-1, keepdim=True) + 0.25)) @ v
    torch.testing.assert_close(decode_attention(q, k, v, eps=0.25), want)


def test_strides_do_not_matter():
    q, k, v = draw(2, 4, 1, 8), draw(2, 2, 6, 8), draw(2, 2, 6, 8)
    want, _ = wanted(q, k, v, [6, 6], "softpick")
    scattered = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    wide = [torch.stack([x, x + 1], -1)[..., 0] for x in (q, k, v)]
    for tensors in (scattered, wide):
        torch.testing.assert_close(decode_attention(*tensors), want)


Q, K, V = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 5)
K3, V3 = (x.repeat(1, 2, 1, 1)[:, :3] for x in (K, V))
POOL_K, POOL_V = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2, 5)
TABLE = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)


def paged(key_cache=POOL_K, value_cache=POOL_V, block_table=TABLE, **more):
    return {"key_cache": key_cache, "value_cache": value_cache, "block_table": block_table, **more}


def refusal(error, says, **change):
    return pytest.param(change, error, says, id=f"{says}: {', '.join(change)}")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        refusal(TypeError, "query: expected a tensor", query=[1.0]),
        refusal(TypeError, "key_cache: expected a tensor", key_cache=[1.0]),
        refusal(TypeError, "value_cache: expected a floating-point", value_cache=V.int()),
        refusal(TypeError, "key_cache: expected the query's dtype", key_cache=K.double()),
        refusal(TypeError, "value_cache: expected the query's dtype", value_cache=V.double()),
        refusal(ValueError, r"query: expected \(B, H, Tq, D\)", query=Q[0]),
        refusal(ValueError, r"key_cache: expected \(B, Hkv, S, D\)", key_cache=K[0]),
        refusal(ValueError, "key_cache: expected .*pages", key_cache=POOL_K[0], value_cache=POOL_V, block_table=TABLE),
        refusal(ValueError, "key_cache: expected the query's device", key_cache=K.to("meta")),
        refusal(ValueError, "value_cache: expected the query's device", value_cache=V.to("meta")),
        refusal(ValueError, "key_cache: expected the query's head dimension 8", key_cache=K[..., :7]),
        refusal(ValueError, "value_cache: expected the shape of key_cache", value_cache=V[:, :, :5]),
        refusal(ValueError, "value_cache: expected the shape of key_cache", value_cache=V[:1]),
        refusal(ValueError, "value_cache: expected the shape of key_cache", value_cache=V[:, :1]),
        refusal(ValueError, "key_cache: expected a divisor of the query's 4 heads", key_cache=K3, value_cache=V3),
        refusal(ValueError, "key_cache: expected a divisor of the query's 4 heads", key_cache=K[:, :0], value_cache=V[:, :0]),
        refusal(ValueError, "key_cache: expected the query's batch 2", key_cache=K[:1], value_cache=V[:1]),
        refusal(TypeError, "block_table: expected an int32", **paged(block_table=TABLE.long())),
        refusal(TypeError, "block_table: expected an int32", **paged(block_table=[[0, 1], [2, 0]])),
        refusal(ValueError, "block_table: expected shape", **paged(block_table=TABLE[:1])),
        refusal(ValueError, "block_table: expected shape", **paged(block_table=TABLE[0])),
        refusal(ValueError, "block_table: expected the query's device", **paged(block_table=TABLE.to("meta"))),
        refusal(ValueError, "key_cache: expected at least one page", **paged(POOL_K[:0], POOL_V[:0])),
        refusal(ValueError, "key_cache: expected at least one page", **paged(POOL_K[:, :0], POOL_V[:, :0])),
        refusal(TypeError, "cache_seqlens: expected an int32 or int64", cache_seqlens=torch.tensor([1.0, 2.0])),
        refusal(TypeError, "cache_seqlens: expected an int32 or int64", cache_seqlens=[1, 2]),
        refusal(ValueError, "cache_seqlens: expected shape", cache_seqlens=torch.tensor([1])),
        refusal(ValueError, "cache_seqlens: expected shape", cache_seqlens=torch.tensor([[1, 2]])),
        refusal(ValueError, "cache_seqlens: expected the query's device", cache_seqlens=torch.tensor([1, 2]).to("meta")),
        refusal(ValueError, "cache_seqlens: expected lengths from 0 to the cache's 6", cache_seqlens=torch.tensor([1, 7])),
        refusal(ValueError, "cache_seqlens: expected lengths from 0 to the cache's 6", cache_seqlens=torch.tensor([-1, 6])),
        refusal(ValueError, "cache_seqlens: expected lengths from 0 to .* 8", **paged(cache_seqlens=torch.tensor([1, 9]))),
        refusal(ValueError, "backend: expected one of", backend="tiled"),
        refusal(ValueError, "normalizer: expected one of", normalizer="soft"),
        refusal(ValueError, "sink: .*has none", sink=torch.zeros(4)),
        refusal(ValueError, "sink: .*needs one", normalizer="learned_sink"),
        refusal(ValueError, "query: requires a gradient", query=Q.clone().requires_grad_()),
        refusal(ValueError, "key_cache: requires a gradient", key_cache=K.clone().requires_grad_()),
        refusal(ValueError, "value_cache: requires a gradient", value_cache=V.clone().requires_grad_()),
        refusal(ValueError, "sink: requires a gradient", normalizer="learned_sink", sink=torch.zeros(4).requires_grad_()),
        refusal(ValueError, "window: expected", window=0),
        refusal(ValueError, "softcap: expected", softcap=0.0),
        refusal(ValueError, "eps: expected", eps=-1.0),
    ],
)  # fmt: skip
def test_refusals(change, error, says):
    given = {"query": Q, "key_cache": K, "value_cache": V} | change
    with pytest.raises(error, match=says):
        decode_attention(given.pop("query"), given.pop("key_cache"), given.pop("value_cache"), **given)


def test_what_is_not_refused():
    """The ends of what is allowed: lengths of 0 and of the whole room, no gradient recorded, one page of one position."""
    assert decode_attention(Q, K, V, cache_seqlens=torch.tensor([0, 6])).shape == (2, 4, 1, 5)
    full = decode_attention(Q, POOL_K, POOL_V, cache_seqlens=torch.tensor([0, 8], dtype=torch.int32), block_table=TABLE)
    assert full.shape == (2, 4, 1, 5)
    with torch.no_grad():
        decode_attention(Q.clone().requires_grad_(), K, V)
    one = decode_attention(
        Q, POOL_K[:1, :1], POOL_V[:1, :1], block_table=torch.zeros(2, 1, dtype=torch.int32), normalizer="softmax"
    )
    torch.testing.assert_close(one[0, :, 0], POOL_V[0, 0].repeat_interleave(2, 0))


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_of_fewer_heads_needs_grouped_queries(paged):
    """No other size of the cache is taken for its heads."""
    query, cache = torch.randn(2, 3, 1, 5), torch.randn(2, 3, 4, 5)

    def call(cache, **options):
        if paged:  # a page a sequence
            pages = cache.transpose(1, 2).contiguous()
            table = torch.arange(2, dtype=torch.int32)[:, None]
            return decode_attention(query, pages, pages, block_table=table, is_causal=True, **options)
        return decode_attention(query, cache, cache, is_causal=True, **options)

    torch.testing.assert_close(call(cache, enable_gqa=False), call(cache), rtol=0, atol=0)
    with pytest.raises(ValueError, match="key_cache: expected the query's 3 heads, got 1"):
        call(cache[:, :1], enable_gqa=False)
    call(cache[:, :1])


@pytest.mark.parametrize(("heads", "key_heads", "queries", "rows"), [(8, 2, 3, 12), (4, 4, 5, 5), (3, 1, 1, 3)])
@pytest.mark.parametrize("paged", [False, True])
def test_rows_that_a_key_head_shares(heads, key_heads, queries, rows, paged):
    """What the kernels' limit of 128 counts."""
    query = torch.randn(2, heads, queries, 4)
    cache = torch.randn(2, 16, key_heads, 4) if paged else torch.randn(2, key_heads, 16, 4)
    table = torch.arange(2, dtype=torch.int32)[:, None] if paged else None
    call = check_cache_call(
        query, cache, cache, cache_seqlens=None, block_table=table, is_causal=True, scale=None, enable_gqa=True,
        normalizer="softpick", backend="auto", window=None, softcap=None, sink=None, eps=None,
    )  # fmt: skip
    assert call.rows == rows
    assert call.key.shape == (2, key_heads, 16, 4)
