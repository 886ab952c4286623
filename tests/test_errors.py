"""Bad input gets a clear error: which argument, what was expected, what came."""

import pytest
import torch

import softpick
from softpick import scaled_dot_product_attention as attend
from softpick import varlen_attention
from softpick.ops.arguments import checkable

Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
PACKED = (torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8))
CU = torch.tensor([0, 4, 9], dtype=torch.int32)
BOOL = torch.ones(5, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: attend(Q[0, 0, 0], K, V), ValueError, r"query: expected \(\.\.\., H, T, D\), got 1 dimensions \(8,\)"),
        (lambda: attend(Q, K[:1].expand(1, 3, 4, 6, 8), V), ValueError, "leading dimensions that broadcast"),
        (lambda: attend(Q, K[..., :7], V), ValueError, "key: expected the query's head dimension 8 .*got 7"),
        (lambda: attend(Q, K, V[:, :, :5]), ValueError, "value: expected as many positions as the key .*got 5"),
        (lambda: attend(Q, K[:, :3], V[:, :3]), ValueError, "key: expected the query's 4 heads .*got 3"),
        (lambda: attend(Q, K[:, :2], V[:, :2]), ValueError, "grouped-query attention pass enable_gqa=True"),
        (
            lambda: attend(Q, K[:, :3], V[:, :3], enable_gqa=True),
            ValueError,
            "key: expected a divisor of the query's 4",
        ),
        (
            lambda: attend(Q.transpose(1, 2), K.transpose(1, 2), V.transpose(1, 2)),
            ValueError,
            r"Are heads and positions swapped\? The layout is \(batch, heads, positions, head dim\)",
        ),
        (lambda: attend(Q[:1].expand(3, 4, 5, 8), K, V), ValueError, "leading dimensions that broadcast"),
        (lambda: attend(Q.int(), K.int(), V.int()), TypeError, "query: expected a floating-point tensor .*torch.int32"),
        (
            lambda: attend(Q, K.double(), V),
            TypeError,
            "key: expected the query's dtype torch.float32, got torch.float64",
        ),
        (lambda: attend(Q, K, V.to("meta")), ValueError, "value: expected the query's device cpu, got meta"),
        (lambda: attend(Q, K, [1.0]), TypeError, "value: expected a tensor, got list"),
        (lambda: attend(Q, K, V, BOOL.int()), TypeError, "attn_mask: expected bool, float32 or .*got torch.int32"),
        (lambda: attend(Q, K, V, BOOL.double()), TypeError, "attn_mask: expected bool, .*got torch.float64"),
        (lambda: attend(Q, K, V, BOOL.T), ValueError, r"attn_mask: expected .*\(2, 4, 5, 6\), got \(6, 5\)"),
        (lambda: attend(Q, K, V, BOOL[0]), ValueError, r"attn_mask: .*got \(6,\)"),
        (lambda: attend(Q, K, V, BOOL.expand(2, 5, 6)), ValueError, r"needs a head dimension: mask\[:, None\]"),
        (lambda: attend(Q, K, V, BOOL[:2]), ValueError, r"padding mask .* mask\[:, None, None\]"),
        (
            lambda: attend(Q, K, V, BOOL.expand(3, 1, 1, 5, 6)),
            ValueError,
            "attn_mask: expected a shape that broadcasts",
        ),
        (lambda: attend(Q, K, V, [[True]]), TypeError, "attn_mask: expected a tensor, got list"),
        (lambda: attend(Q, K, V, BOOL.to("meta")), ValueError, "attn_mask: expected the query's device"),
        (
            lambda: attend(Q, K, V, normalizer="sotfmax"),
            ValueError,
            "normalizer: expected one of softmax, softpick, .*'sotfmax'",
        ),
        (lambda: attend(Q, K, V, normalizer=3), TypeError, "normalizer: expected a name or a Normalizer, got int"),
        (
            lambda: attend(Q, K, V, backend="cuda"),
            ValueError,
            "backend: expected one of auto, reference, tiled, triton, sdpa; got 'cuda'",
        ),
        (lambda: attend(Q, K, V, backend="sdpa"), ValueError, "backend: 'sdpa' is torch's softmax kernel"),
        (
            lambda: attend(Q, K, V, backend="sdpa", normalizer="softmax", softcap=2.0),
            ValueError,
            "backend: 'sdpa' is torch's softmax kernel",
        ),
        (
            lambda: attend(Q, K, V, backend="tiled", return_weights=True),
            ValueError,
            "return_weights: the 'tiled' backend",
        ),
        (lambda: attend(Q, K, V, dropout_p=1.5), ValueError, r"dropout_p: expected a probability in \[0, 1\], got 1.5"),
        (lambda: attend(Q, K, V, causal_alignment="left"), ValueError, "causal_alignment: expected 'top_left' or"),
        (lambda: attend(Q, K, V, window=0), ValueError, "window: expected at least 1 key, got 0"),
        (lambda: attend(Q, K, V, window=(1, 2, 3)), ValueError, r"window: expected an integer or \(left, right\)"),
        (lambda: attend(Q, K, V, softcap=0.0), ValueError, "softcap: expected a number > 0, got 0.0"),
        (lambda: attend(Q, K, V, eps=-1), ValueError, "eps: expected a number >= 0, got -1"),
        (lambda: attend(Q, K, V, sink=torch.zeros(4)), ValueError, "sink: the normalizer 'softpick' has none"),
        (lambda: attend(Q, K, V, normalizer="learned_sink"), ValueError, r"needs one logit a head, shape \(4,\)"),
        (
            lambda: attend(Q, K, V, normalizer="learned_sink", sink=torch.zeros(2)),
            ValueError,
            r"sink: expected shape \(4,\), one logit a query head; got \(2,\)",
        ),
        (
            lambda: attend(Q, K, V, normalizer="learned_sink", sink=0.0),
            TypeError,
            "sink: expected a floating-point tensor",
        ),
        (lambda: attend(Q, K, V, causal=True), TypeError, "causal"),
        (
            lambda: varlen_attention(*PACKED, CU.float(), CU),
            TypeError,
            "cu_seqlens_q: expected an int32 or int64 tensor",
        ),
        (
            lambda: varlen_attention(*PACKED, CU, CU[None]),
            ValueError,
            r"cu_seqlens_k: expected shape \(sequences \+ 1,\)",
        ),
        (
            lambda: varlen_attention(*PACKED, CU + 1, CU),
            ValueError,
            "cu_seqlens_q: expected offsets that rise from 0 to",
        ),
        (
            lambda: varlen_attention(*PACKED, CU, CU[[0, 2]]),
            ValueError,
            r"as many sequences as cu_seqlens_q \(2\), got 1",
        ),
        (
            lambda: varlen_attention(*PACKED, CU, CU, 4, 5),
            ValueError,
            "max_seqlen_q: expected at least the longest sequence 5",
        ),
        (lambda: varlen_attention(*PACKED, CU, CU, backend="sdpa"), ValueError, "'sdpa' has no packed sequences"),
        (lambda: varlen_attention(Q, K, V, CU, CU), ValueError, r"query: expected \(total, H, D\), got 4 dimensions"),
        (lambda: softpick.get_normalizer("Softpick"), ValueError, "normalizer: expected one of"),
        (lambda: softpick.nn.Attention(10, 3), ValueError, "num_heads: expected a divisor of embed_dim=10, got 3"),
        (lambda: softpick.nn.Attention(12, 3, 2), ValueError, "num_kv_heads: expected a divisor of num_heads=3, got 2"),
        (
            lambda: softpick.nn.SequenceEncoder(7, 16)(torch.ones(2, 7)),
            ValueError,
            r"x: expected \(batch, time >= 1, 7\)",
        ),
    ],
)
def test_errors(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_every_option_reaches_the_computation():
    """No argument is swallowed: changing any of them changes the result."""
    base = attend(Q, K, V)
    changed = {
        "attn_mask": BOOL.tril(),
        "is_causal": True,
        "scale": 2.0,
        "window": (1, 0),
        "softcap": 0.5,
        "eps": 1.0,
        "dropout_p": 0.5,
    }
    for name, value in changed.items():
        assert not torch.allclose(attend(Q, K, V, **{name: value}), base), name
    causal = attend(Q, K, V, is_causal=True)
    assert not torch.allclose(attend(Q, K, V, is_causal=True, causal_alignment="bottom_right"), causal)


NAN, INF = float("nan"), float("inf")
X = torch.randn(3, 4)
CACHE, PAGES = torch.randn(2, 2, 8, 8), torch.randn(5, 4, 2, 8)
ATTEND = {
    "sdpa": lambda **options: attend(Q, K, V, **options),
    "varlen": lambda **options: varlen_attention(*PACKED, CU, CU, **options),
    "decode": lambda **options: softpick.decode_attention(Q[:, :, :1], CACHE, CACHE, **options),
    "softmax": lambda **options: attend(Q, K, V, normalizer="softmax", **options),
}
MODULES = {
    "attention": lambda **options: softpick.nn.Attention(**{"embed_dim": 8, "num_heads": 2} | options),
    "encoder": lambda **options: softpick.nn.SequenceEncoder(**{"embed_dim": 7, "hidden_size": 16} | options),
}
FINITE = [NAN, INF, -INF, 10**400]
NO_NUMBER = ["1", True, [1.0], None, torch.ones(2), torch.ones((), requires_grad=True), 1j]
WRONG = {  # argument: (numbers out of range, what is no number)
    "scale": (FINITE, NO_NUMBER),
    "softcap": ([*FINITE, 0, -1.0], NO_NUMBER),
    "eps": ([*FINITE, -1e-9], NO_NUMBER),
    "dropout_p": ([NAN, INF, -0.1, 1.1, 2], NO_NUMBER),
    "dropout": ([NAN, INF, -0.1, 1.1, 2.0], NO_NUMBER),
    "window": ([0, -1, (1, 2, 3), (-2, 0)], ["1", True, 1.5, NAN, (1.0, 0), (True, 0)]),
    "max_seqlen_q": ([-1], ["1", True, 5.0]),
    "dim": ([], ["0", True, 0.0, None]),
    "embed_dim": ([0, -8], ["8", True, 8.0, None]),
    "num_heads": ([0, -1], ["2", True, 2.0, NAN, None]),
    "num_kv_heads": ([0, -1], ["2", True, 1.0]),
    "head_dim": ([0, -1], ["2", True, 4.0]),
    "hidden_size": ([0, -1], ["2", True, 4.0]),
    "window_size": ([0, -1], ["2", True, 4.0]),
    "num_layers": ([-1], ["2", True, 1.0]),
    "is_causal": ([], ["no", 1, None, 0.0]),
    "enable_gqa": ([], ["no", 1]),
    "return_stats": ([], ["no", 1]),
}
NONE_IS_DEFAULT = {"scale", "softcap", "window", "max_seqlen_q", "num_kv_heads", "head_dim"}
TAKERS = {
    "scale": ["sdpa", "varlen", "decode", "softmax"],
    "softcap": ["sdpa", "varlen", "decode", "softmax"],
    "eps": ["sdpa", "varlen", "decode", "softmax", "softpick", "Softpick"],
    "dropout_p": ["sdpa", "varlen", "softmax"],
    "dropout": ["attention", "encoder"],
    "window": ["sdpa", "varlen", "decode", "attention"],
    "max_seqlen_q": ["varlen"],
    "dim": ["softpick", "linear_softpick", "Softpick", "LinearSoftpick"],
    "embed_dim": ["attention", "encoder"],
    "num_heads": ["attention", "encoder"],
    "num_kv_heads": ["attention"],
    "head_dim": ["attention"],
    "hidden_size": ["encoder"],
    "window_size": ["encoder"],
    "num_layers": ["encoder"],
    "is_causal": ["sdpa", "varlen", "decode", "softmax", "attention"],
    "enable_gqa": ["sdpa", "softmax"],
    "return_stats": ["sdpa", "varlen"],
}
CALLS = {
    **ATTEND,
    **MODULES,
    "softpick": lambda **options: softpick.softpick(X, **options),
    "linear_softpick": lambda **options: softpick.linear_softpick(X, **options),
    "Softpick": softpick.nn.Softpick,
    "LinearSoftpick": softpick.nn.LinearSoftpick,
}
CASES = [
    (taker, name, value, error)
    for name, takers in TAKERS.items()
    for taker in takers
    for values, error in zip(WRONG[name], (ValueError, TypeError), strict=True)
    for value in values
    if not (value is None and (name in NONE_IS_DEFAULT or (name == "eps" and taker in ATTEND)))
    if not (value is None and (taker, name) == ("decode", "is_causal"))  # None: said once that it will be False
]


@pytest.mark.parametrize(("taker", "name", "value", "error"), CASES)
def test_numbers_and_flags(taker, name, value, error):
    """Wherever a number is taken, what is none and what is out of range is refused, by the argument's name."""
    with pytest.raises(error, match=f"^{name}: expected "):
        CALLS[taker](**{name: value})


@pytest.mark.parametrize("one", [2, 2.0, torch.tensor(2.0), torch.tensor([2]), torch.tensor(2.0).numpy()[()]])
def test_numbers_of_every_kind_are_taken(one):
    torch.testing.assert_close(attend(Q, K, V, scale=one, softcap=one), attend(Q, K, V, scale=2.0, softcap=2.0))


@pytest.mark.parametrize(
    ("table", "lengths", "options", "wrong"),
    [
        ([[0, -1], [2, 3]], None, {}, "got -1 for block 1 of sequence 0"),
        ([[0, 1], [5, 3]], None, {}, "got 5 for block 0 of sequence 1"),
        ([[0, 1], [2, 2**31 - 1]], [4, 5], {}, "got 2147483647 for block 1 of sequence 1"),
        ([[0, -1], [2, 3]], [4, 8], {}, None),  # a page that nothing was written to yet
        ([[0, 7], [2, -9]], [4, 3], {}, None),
        ([[-1, 1], [-1, 3]], [8, 8], {"window": 2}, None),  # a page that the window has left behind
        ([[-1, 1], [-1, 3]], [8, 8], {"window": 5}, "got -1 for block 0 of sequence 0"),
    ],
)
def test_pages_that_are_used_exist(table, lengths, options, wrong):
    query, table = torch.randn(2, 4, 1, 8), torch.tensor(table, dtype=torch.int32)
    lengths = None if lengths is None else torch.tensor(lengths)

    def decode(table, **other):
        return softpick.decode_attention(
            query, PAGES, PAGES, cache_seqlens=lengths, block_table=table, normalizer="softmax", **options, **other
        )

    if wrong is None:
        torch.testing.assert_close(decode(table), decode(table.clamp(0, 4)))
        return
    with pytest.raises(ValueError, match=f"block_table: expected pages from 0 to 4 for all filled positions, {wrong}"):
        decode(table)


def test_pages_that_cannot_be_looked_at_are_masked():
    """In compiled code no value is read: a page that does not exist is left out, and nobody else's page is read for it."""
    query, table = torch.randn(2, 4, 1, 8), torch.tensor([[0, -1], [5, 3]], dtype=torch.int32)
    compiled = torch.compile(
        lambda t: softpick.decode_attention(query, PAGES, PAGES, block_table=t, normalizer="softmax"),
        backend="eager",
        fullgraph=True,
    )
    keys = [PAGES[page].transpose(0, 1)[None] for page in (0, 3)]
    want = [attend(query[n : n + 1], k, k, enable_gqa=True, normalizer="softmax") for n, k in enumerate(keys)]
    torch.testing.assert_close(compiled(table), torch.cat(want))


@pytest.mark.parametrize(("value", "looked_at"), [(None, False), ("0", False), ("", False), ("1", True)])
def test_a_gpu_is_waited_for_in_the_debug_mode_only(value, looked_at, monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # asks for a driver
    monkeypatch.delenv("SOFTPICK_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("SOFTPICK_DEBUG", value)
    assert checkable(torch.zeros(2).as_subclass(OnGPU)) is looked_at
    assert checkable(torch.zeros(2))
