"""The Triton kernels on a GPU, through the public functions, against the reference in fp64 (itself tested on the CPU).

Needs torch, Triton, pytest and, for generation, transformers, nothing else.
"""

import functools
import math
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_attention
from triton_gpu_cases import (
    BF16,
    CASES,
    DEVICE,
    FP16,
    FP32,
    NAMES,
    TOLERANCE,
    _compiled,  # noqa: F401 - a fixture
    attend,
    errors,
    exact,
    inputs,
    relative,
    sink_for,
)

import softpick
from softpick import NORMALIZERS, decode_attention, functional, scaled_dot_product_attention, varlen_attention
from softpick.ops import backends

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("setting", CASES.values(), ids=CASES)
def test_matches_the_reference(setting, poisoned, monkeypatch):
    chosen = []
    original = functional.attention
    monkeypatch.setattr(functional, "attention", lambda *a, **k: chosen.append(k["backend"]) or original(*a, **k))
    forward, backward = errors(setting)
    assert chosen == ["auto"]  # by Triton, or by tiles where that cannot be built
    limits = TOLERANCE[setting["dtype"]]
    assert max(forward) < limits[0], forward
    assert max(backward) < limits[1], backward


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_error_against_fp64_is_that_of_flash_attention(name, scale, dtype):
    """Budget: 1.5 times the relative Frobenius error of torch's flash attention (softmax) with the same inputs."""
    shape = (2, 4, 4, 512, 512, 64, 64)
    grad = torch.ones(64, device=DEVICE, dtype=torch.float64) + torch.arange(64, device=DEVICE)

    def error(f):
        leaves = inputs(shape, dtype, scale)
        true = exact(*leaves)
        out, want = f(*leaves), f(*true)
        weight = grad.expand_as(want)
        grads = torch.autograd.grad(out, leaves, weight.to(dtype))
        want_grads = torch.autograd.grad(want, true, weight)
        pairs = [(out, want), *zip(grads, want_grads, strict=True)]
        return [float((a.double() - b).norm() / b.norm()) for a, b in ((a.detach(), b.detach()) for a, b in pairs)]

    def flash(q, k, v):
        with sdpa_kernel(SDPBackend.MATH if q.dtype == torch.float64 else SDPBackend.FLASH_ATTENTION):
            return torch_attention(q, k, v, is_causal=True)

    sink = sink_for(name, 4)

    def ours(q, k, v):
        exactly = q.dtype == torch.float64
        out = attend(
            q,
            k,
            v,
            sink=sink if sink is None or not exactly else sink.double(),
            is_causal=True,
            normalizer=name,
            backend="reference" if exactly else "triton",
            return_stats=True,
        )
        return out.output

    budget, got = error(flash), error(ours)
    # the floor: see the test of the same name in test_attention.py
    floor = 2 * torch.finfo(dtype).eps
    limits = [1.5 * max(budget[0], floor)] + [1.5 * max(b, 4 * floor * (1 + scale)) for b in budget[1:]]
    assert all(g <= limit for g, limit in zip(got, limits, strict=True)), (got, limits)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_are_equal_bit_for_bit(name):
    sink = sink_for(name, 4)
    results = []
    for _ in range(3):
        q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), BF16)
        out = attend(q, k, v, sink=sink, normalizer=name, is_causal=True, return_stats=True).output
        leaves = [q, k, v] + ([] if sink is None else [sink])
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_hurt(name, poisoned):
    """All negative, zero, huge, one key, all masked: as the reference says, and finite."""
    q = torch.tensor([-30.0, 0.0, 1e3, -1e3, 1e-3, 2.0, 3.0], device=DEVICE)[:, None].repeat(1, 1, 1, 64)
    k = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0, 3.0], device=DEVICE)[:, None].repeat(1, 1, 1, 64)
    v = torch.randn(1, 1, 6, 64, device=DEVICE)
    mask = torch.ones(7, 6, dtype=torch.bool, device=DEVICE)
    mask[5] = False
    mask[6, 1:] = False
    q, k, v = (t.to(BF16).requires_grad_() for t in (q, k, v))
    sink = sink_for(name, 1)
    got = attend(q, k, v, mask, sink, normalizer=name, return_stats=True)
    true = exact(q, k, v, sink)
    want = attend(*true[:3], mask, true[3], normalizer=name, backend="reference", return_stats=True)
    for one, other in zip(got.output[0, 0], want.output[0, 0], strict=True):
        assert relative(one, other) < 2e-2
    assert (got.output[0, 0, 5] == 0).all()
    assert got.max_score[0, 0, 5] == -math.inf
    if NORMALIZERS[name].sparse:
        assert (got.output[0, 0, [0, 3]] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.output.sum(), (q, k, v)))


@pytest.mark.parametrize(("tq", "tk"), [(5, 0), (0, 5)])
def test_no_keys_or_no_queries(tq, tk, poisoned):
    q, k, v = inputs((1, 2, 2, tq, tk, 64, 64), BF16)
    out = attend(q, k, v)
    assert out.shape == (1, 2, tq, 64)
    assert (out == 0).all()
    for leaf, g in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(g, torch.zeros_like(leaf))


@pytest.mark.parametrize("name", ["softpick", "learned_sink", "linear_softpick"])
def test_packed_sequences(name, poisoned):
    lengths_q, lengths_k = [300, 1, 0, 77], [130, 1, 64, 200]
    q, k, v = (torch.randn(n, h, 64, device=DEVICE, dtype=BF16) for n, h in ((378, 4), (395, 2), (395, 2)))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    cu_q, cu_k = (torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in (lengths_q, lengths_k))
    sink = sink_for(name, 4)
    common = {"is_causal": True, "normalizer": name, "return_stats": True}
    got = varlen_attention(q, k, v, cu_q, cu_k, sink=sink, **common)
    true = exact(q, k, v, sink)
    want = varlen_attention(*true[:3], cu_q, cu_k, sink=true[3], backend="reference", **common)
    assert max(relative(a, b) for a, b in zip(got[:4], want[:4], strict=True)) < 1e-2
    leaves, true_leaves = ([x for x in xs if x is not None] for xs in ((q, k, v, sink), true))
    grad = torch.randn_like(got.output)
    grads = torch.autograd.grad(got.output, leaves, grad)
    want_grads = torch.autograd.grad(want.output, true_leaves, grad.double())
    assert max(relative(a, b) for a, b in zip(grads, want_grads, strict=True)) < 2e-2
    given = varlen_attention(q, k, v, cu_q, cu_k, 300, 200, sink=sink, **common)
    assert torch.equal(given.output, got.output)


def test_dropout():
    q, k, _ = (t.detach() for t in inputs((1, 2, 2, 128, 256, 64, 64), FP16))
    v = torch.eye(256, device=DEVICE, dtype=FP16).expand(1, 2, 256, 256)  # the output is the weights
    plain, dropped, none = (attend(q, k, v, dropout_p=p) for p in (0.0, 0.25, 1.0))
    seen = plain > 1e-3
    zero = (dropped == 0) & seen
    assert abs(zero.sum() / seen.sum() - 0.25) < 0.01
    torch.testing.assert_close(dropped[seen & ~zero], plain[seen & ~zero] / 0.75, rtol=5e-3, atol=1e-5)
    assert (none == 0).all()


# ------------------------------------------------------------------------------------------------------ torch machinery


def test_cuda_graph_of_forward_and_backward():
    q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), BF16)

    def step():
        out = attend(q, k, v, is_causal=True, return_stats=True).output
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for leaf, fresh in zip((q, k, v), inputs((2, 4, 2, 200, 257, 64, 64), BF16, seed=1), strict=True):
            leaf.copy_(fresh)
    graph.replay()
    for one, other in zip(results, step(), strict=True):
        assert torch.equal(one, other)


def test_cuda_graph_of_decoding():
    q, k, v = (t.detach() for t in inputs((2, 8, 2, 1, 960, 128, 128), BF16))
    lengths = torch.tensor([10, 20], device=DEVICE, dtype=torch.int32)

    def step():
        return decode_attention(q, k, v, cache_seqlens=lengths)

    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for new in ([11, 21], [960, 1]):
            lengths.copy_(torch.tensor(new))
            graph.replay()
            assert torch.equal(out, step())


def test_compiles_to_one_graph():
    q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), BF16)

    def f(q, k, v):
        return attend(q * 2, k, v, is_causal=True) * 0.5

    compiled = torch.compile(f, fullgraph=True)
    assert relative(compiled(q, k, v), f(q, k, v)) < 1e-2
    grads = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    want = torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
    assert max(relative(a, b) for a, b in zip(grads, want, strict=True)) < 1e-2


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), BF16)

    def f(q, k, v):
        return attend(q * 2, k, v, is_causal=True, dropout_p=0.1)

    results = []
    for g in (f, functools.partial(checkpoint, f, use_reentrant=False)):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(g(q, k, v).sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast():
    q, k, v = inputs((2, 4, 2, 200, 257, 64, 64), FP32)
    with torch.autocast("cuda", BF16):
        out = attend(q, k, v, is_causal=True)
    assert out.dtype == BF16
    assert torch.equal(out, attend(*(t.to(BF16) for t in (q, k, v)), is_causal=True))
    assert all(g.dtype == FP32 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_opcheck():
    q, k, v = inputs((1, 2, 1, 40, 60, 64, 64), BF16)
    tail = (0.3, 1e-6, -1, 0, False, 0.0, 0.0)
    op = torch.ops.softpick.attention_forward.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (q, k, v, *(None,) * 5, "softpick", *tail, True, "triton", 0, 0), test_utils=tests)
    torch.library.opcheck(op, (q, k, v, *(None,) * 5, "softmax", *tail, False, "triton", 0, 0), test_utils=tests)
    args = (q.detach()[:, :, :1], k.detach(), v.detach(), *(None,) * 4, "softpick", 0.3, 1e-6, -1, 0, True, 0.0, "auto")
    torch.library.opcheck(torch.ops.softpick.decode.default, args)
    x = torch.randn(3, 70, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.softpick.rows_forward.default, (x, 1e-6, "auto"))


def test_what_triton_cannot_take_is_said_once(monkeypatch):
    monkeypatch.setattr(backends, "warned", set())
    q, k, v = (t.detach() for t in inputs((1, 2, 2, 20, 20, 320, 320), BF16))
    with pytest.warns(UserWarning, match=r"head dimension from 1 to 256 .* got 320"):
        out = attend(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(q, k, v)
    assert relative(out, attend(*exact(q, k, v))) < 1e-2
    with pytest.raises(ValueError, match="head dimension from 1 to 256"):
        attend(q, k, v, backend="triton")


# --------------------------------------------------------------------------------------------------------------- models


class Tiny(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 64)
        self.layers = torch.nn.ModuleList(
            softpick.nn.Attention(64, 4, 2, is_causal=True, backend=backend) for _ in range(2)
        )
        self.head = torch.nn.Linear(64, 50)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(torch.nn.functional.layer_norm(x, (64,)))
        return self.head(x)


def test_a_tiny_model_trains_alike_with_triton_and_the_reference():
    """For 25 steps: after that a model in fp64, or one whose weights differ by 1e-7, is 2e-3 away as well (CPU, reference)."""
    losses = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = Tiny(backend).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(50, (8, 65), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        run = []
        for _ in range(25):
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(float(loss.detach()))
        losses.append(run)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_tokens_of_the_reference(cache, monkeypatch):
    transformers = pytest.importorskip("transformers")
    import softpick.integrations.transformers as adapter

    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="softpick")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.15, generator=generator)
    model = model.to(DEVICE).eval()
    ids = torch.randint(3, 60, (2, 11), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    decoded = []
    original = functional.decode
    monkeypatch.setattr(functional, "decode", lambda *args: decoded.append(1) or original(*args))

    def generate():
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
        )

    got = generate()
    assert len(decoded) >= 2 * 15  # two layers, every token after the first
    reference = functools.partial(scaled_dot_product_attention, backend="reference")
    monkeypatch.setattr(adapter, "scaled_dot_product_attention", reference)
    count = len(decoded)
    assert torch.equal(got, generate())
    assert len(decoded) == count
