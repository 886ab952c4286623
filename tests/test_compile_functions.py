"""Every public function compiles to one graph, with any sizes, and gives what it gives outside."""

import pytest
import torch

import softpick
from softpick import NORMALIZERS, decode_attention, scaled_dot_product_attention, varlen_attention

OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)
LENGTHS, TABLE = torch.tensor([5, 9]), torch.tensor([[0, 3, 1], [2, 4, 6]], dtype=torch.int32)
MASK = torch.tensor([True, True, False, True, True])[None, None, None]


def attention(q, backend="auto", **options):
    k = torch.linspace(-1, 1, 2 * 2 * 5 * 8).view(2, 2, 5, 8)
    return scaled_dot_product_attention(q, k, k.flip(-2), backend=backend, **options)


def packed(q, backend):
    p = q[0].transpose(0, 1)[:5]
    return varlen_attention(p, p, p, OFFSETS, OFFSETS, is_causal=True, window=2, backend=backend)


def each_of_the_table(q):
    return sum(
        attention(q, normalizer=name, sink=torch.zeros(2) if softpick.get_normalizer(name).needs_sink else None)
        for name in NORMALIZERS
    )


CALLS = {
    **{f"mask, {b}": lambda q, b=b: attention(q, b, attn_mask=MASK) for b in ("auto", "tiled", "reference")},
    **{f"packed, {b}": lambda q, b=b: packed(q, b) for b in ("auto", "tiled", "reference")},
    "mask, softmax": lambda q: attention(q, attn_mask=MASK, normalizer="softmax"),
    "options": lambda q: attention(q, is_causal=True, window=3, softcap=2.0, scale=0.3, eps=1e-3),
    "statistics": lambda q: attention(q, return_stats=True).lse,
    "weights": lambda q: attention(q, return_weights=True).weights,
    "every normalizer": each_of_the_table,
    "decode": lambda q: decode_attention(q, q.new_ones(2, 2, 16, 8), q.new_ones(2, 2, 16, 8), cache_seqlens=LENGTHS),
    "pages": lambda q: decode_attention(
        q, q.new_ones(7, 4, 2, 8), q.new_ones(7, 4, 2, 8), cache_seqlens=LENGTHS, block_table=TABLE
    ),
    "softpick": lambda q: softpick.softpick(q, 1, where=q > -1),
    "softpick, fp16": lambda q: softpick.softpick(q.half()),
    "linear_softpick": lambda q: softpick.linear_softpick(q, 2),
    "jvp": lambda q: torch.func.jvp(attention, (q,), (q + 1,))[1],
    "vmap(grad)": lambda q: torch.vmap(torch.func.grad(lambda a: attention(a).square().sum()))(
        q[:, None].expand(-1, 2, -1, -1, -1)
    ),
}


@pytest.mark.thinned
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("call", CALLS)
def test_one_graph(call, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[call], backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (5, 7):
        q = torch.randn(2, 2, length, 8)
        # compiled transforms take the reference where eager ones take the tiles: two orders of fp32 sums
        torch.testing.assert_close(compiled(q), CALLS[call](q), rtol=1e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_compiled_tiles_refuse_transforms(transform):
    """An error, never zeros."""
    f = lambda q: attention(q, "tiled")  # noqa: E731
    calls = {
        "jvp": lambda q: torch.func.jvp(f, (q,), (q,))[1],
        "grad": lambda q: torch.func.grad(lambda a: f(a).sum())(q),
        "vmap": lambda q: torch.vmap(f)(q[None]),
    }
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"Observed exception|no transforms of torch.func"):
        torch.compile(calls[transform], backend="aot_eager", fullgraph=True)(torch.randn(2, 2, 5, 8))
