"""varlen_attention with every option against the fp64 oracle of each sequence, and what it refuses."""

import math

import pytest
import torch
from oracle import attention as oracle

from softpick import NORMALIZERS, varlen_attention
from softpick.ops.arguments import packed_keep

NAMES = list(NORMALIZERS)
BACKENDS = ["reference", "tiled"]
LENGTHS_Q, LENGTHS_K = [3, 1, 0, 7], [5, 1, 4, 6]


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


OPTIONS = {
    "causal": {"is_causal": True},
    "causal, top left": {"is_causal": True, "causal_alignment": "top_left"},
    "window": {"window": 2},
    "one-sided window, top left": {"window": (2, 0), "causal_alignment": "top_left"},
    "ahead": {"window": (1, 1), "causal_alignment": "bottom_right"},
    "softcap and scale": {"softcap": 1.5, "scale": 0.7},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(name, backend, options):
    q, k, v = draw(11, 4, 8), draw(16, 2, 8), draw(16, 2, 6)
    sink = draw(4) if NORMALIZERS[name].needs_sink else None
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    leaves = [x.requires_grad_() for x in (q, k, v, sink) if x is not None]
    got = varlen_attention(
        q, k, v, cu_q, cu_k, normalizer=name, sink=sink, backend=backend, return_stats=True, **options
    )
    outs, masses, largest = [], [], []
    window = options.get("window", (-1, -1))
    left, right = (window - 1, window - 1) if isinstance(window, int) else window
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        tq, tk = int(b - a), int(d - c)
        if not tq:
            continue
        offset = 0 if options.get("causal_alignment") == "top_left" else tk - tq
        behind = torch.arange(tq)[:, None] + offset - torch.arange(tk)
        seen = torch.ones_like(behind, dtype=torch.bool)
        seen &= behind >= 0 if options.get("is_causal") else seen
        seen &= behind <= left if left >= 0 else seen
        seen &= behind >= -right if right >= 0 else seen
        one = [x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])]
        more = {key: options[key] for key in ("softcap", "scale") if key in options}
        out, weights = oracle(*one, name, mask=seen, sink=sink, **more)
        outs.append(out[0].transpose(0, 1))
        masses.append(weights[0].sum(-1))
        s = (one[0] @ one[1].repeat_interleave(2, 1).mT)[0] * options.get("scale", 1 / math.sqrt(8))
        s = 1.5 * torch.tanh(s / 1.5) if "softcap" in options else s
        largest.append(s.masked_fill(~seen, -math.inf).amax(-1))
    want = torch.cat(outs)
    torch.testing.assert_close(got.output, want)
    torch.testing.assert_close(got.row_mass, torch.cat(masses, 1))
    torch.testing.assert_close(got.max_score, torch.cat(largest, 1))
    assert got.lse.shape == (4, 11)
    grad = draw(*want.shape)
    grads = torch.autograd.grad(got.output, leaves, grad), torch.autograd.grad(want, leaves, grad)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_and_statistics_of_each_sequence(backend):
    """eps is relative to each row; the lse of a packed row is that of the row alone."""
    q, k, v = draw(6, 2, 4), draw(7, 2, 4), draw(7, 2, 4)
    cu_q, cu_k = offsets([2, 4]), offsets([3, 4])
    got = varlen_attention(q, k, v, cu_q, cu_k, eps=0.25, backend=backend, return_stats=True)
    for rows, keys in ((slice(0, 2), slice(0, 3)), (slice(2, 6), slice(3, 7))):
        s = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) / 2
        m = s.amax(-1, keepdim=True).clamp(min=0)
        f = torch.exp(s - m) - torch.exp(-m)
        total = f.abs().sum(-1, keepdim=True) + 0.25
        weights = f.clamp(min=0) / total
        torch.testing.assert_close(got.output[rows], torch.einsum("hqk,khd->qhd", weights, v[keys]))
        torch.testing.assert_close(got.lse[:, rows], (m + total.log())[..., 0])
        torch.testing.assert_close(got.row_mass[:, rows], weights.sum(-1))
        torch.testing.assert_close(got.max_score[:, rows], s.amax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_expectation_and_stays_within_a_sequence(backend):
    cu = offsets([200, 200])
    q, k = torch.zeros(400, 2, 2), torch.zeros(400, 2, 2)
    v = torch.eye(200).repeat(2, 1)[:, None].expand(400, 2, 200)
    out = varlen_attention(q, k, v, cu, cu, 200, 200, 0.25, normalizer="softmax", backend=backend)
    kept = out > 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 200 / 0.75))
    assert (varlen_attention(q, k, v, cu, cu, 200, 200, 1.0, backend=backend) == 0).all()


Q, K, V = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 5)
CU = torch.tensor([0, 4, 9], dtype=torch.int32)


def refusal(error, says, **change):
    return pytest.param(change, error, says, id=f"{says}: {', '.join(change)}")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        refusal(ValueError, "cu_seqlens_q: expected offsets", cu_seqlens_q=torch.tensor([0, 4, 8])),
        refusal(ValueError, "cu_seqlens_q: expected offsets", cu_seqlens_q=torch.tensor([0, 4, 10])),
        refusal(ValueError, "cu_seqlens_q: expected offsets", cu_seqlens_q=torch.tensor([0, 10, 9])),
        refusal(ValueError, "cu_seqlens_k: expected offsets", cu_seqlens_k=torch.tensor([1, 4, 9])),
        refusal(ValueError, "cu_seqlens_k: expected offsets", cu_seqlens_k=torch.tensor([0, -1, 9])),
        refusal(ValueError, r"cu_seqlens_q: expected shape \(sequences", cu_seqlens_q=torch.tensor([0])),
        refusal(ValueError, r"cu_seqlens_q: expected shape \(sequences", cu_seqlens_q=torch.tensor(9)),
        refusal(TypeError, "cu_seqlens_q: expected an int32", cu_seqlens_q=[0, 4, 9]),
        refusal(TypeError, "cu_seqlens_k: expected an int32", cu_seqlens_k=CU.short()),
        refusal(ValueError, "cu_seqlens_k: expected the query's device", cu_seqlens_k=CU.to("meta")),
        refusal(ValueError, "max_seqlen_k: expected at least the longest sequence 5", max_seqlen_k=4),
        refusal(ValueError, "max_seqlen_q: expected at least the longest sequence 5", max_seqlen_q=4),
        refusal(ValueError, r"dropout_p: expected a probability", dropout_p=-0.1),
        refusal(ValueError, "causal_alignment: expected", causal_alignment="bottom"),
        refusal(ValueError, "key: expected", key=K[:, [0, 1, 0]], value=V[:, [0, 1, 0]]),
        refusal(ValueError, "value: expected as many positions", value=V[:8]),
        refusal(ValueError, "sink: .*has none", sink=torch.zeros(4)),
        refusal(ValueError, r"sink: expected shape \(4,\)", normalizer="learned_sink", sink=torch.zeros(2)),
        refusal(TypeError, "sink: expected a floating-point", normalizer="learned_sink", sink=torch.zeros(4).int()),
        refusal(ValueError, "sink: expected the query's device", normalizer="learned_sink", sink=torch.zeros(4).to("meta")),
        refusal(ValueError, "softcap: expected", softcap=-1.0),
        refusal(ValueError, "eps: expected", eps=-1e-9),
        refusal(ValueError, "window: expected", window=(-2, 0)),
        refusal(ValueError, "window: expected", window=(0,)),
        refusal(TypeError, "window: expected", window=True),
        refusal(TypeError, "window: expected", window=1.5),
        refusal(ValueError, "normalizer: expected one of", normalizer="soft"),
        refusal(ValueError, "backend: expected one of", backend="fast"),
    ],
)  # fmt: skip
def test_refusals(change, error, says):
    given = {"query": Q, "key": K, "value": V, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    with pytest.raises(error, match=says):
        varlen_attention(**(given | change))


def test_what_is_not_refused():
    """The ends of what is allowed: exact longest sequences and longer ones, int64, one sequence, an empty one, eps 0."""
    want = varlen_attention(Q, K, V, CU, CU)
    for more in ((5, 5), (9, 100), (5, None)):
        torch.testing.assert_close(varlen_attention(Q, K, V, CU.long(), CU, *more), want)
    one = torch.tensor([0, 9])
    assert varlen_attention(Q, K, V, one, one, dropout_p=0.0, eps=0.0, window=1).shape == (9, 4, 5)
    empty = torch.tensor([0, 4, 4, 9])
    torch.testing.assert_close(varlen_attention(Q, K, V, empty, empty), want)


@pytest.mark.parametrize("left", [-1, 0, 1, 2])
@pytest.mark.parametrize("right", [-1, 0, 1])
@pytest.mark.parametrize("bottom_right", [False, True])
def test_who_sees_whom_where_offsets_cannot_be_read(left, right, bottom_right):
    """The mask of compiled and transformed calls, entry by entry, with rows behind the last sequence."""
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    want = torch.zeros(1, 2, 13, 18, dtype=torch.bool)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        for i in range(a, b):
            for j in range(c, d):
                behind = int((i - a) - (j - c) + ((d - c) - (b - a) if bottom_right else 0))
                want[:, :, i, j] = (left < 0 or behind <= left) and (right < 0 or behind >= -right)
    found = packed_keep(cu_q, cu_k, torch.zeros(1, 2, 13, 4), torch.zeros(1, 2, 18, 4), left, right, bottom_right)
    assert torch.equal(found, want)
