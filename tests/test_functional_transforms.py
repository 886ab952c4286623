"""torch.func, forward-mode derivatives, batched gradients, and tensors without values, on every backend that the CPU has.

Truth is the fp64 oracle, which shares no code with the package and is made of torch operations that have every derivative,
or a loop over the samples.
"""

import functools
import itertools

import pytest
import torch
from oracle import attention as oracle
from oracle import weights_of_row
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import softpick
from softpick import NORMALIZERS, decode_attention, scaled_dot_product_attention, varlen_attention
from softpick.ops import calling
from softpick.ops.calling import plain

NAMES = list(NORMALIZERS)
SMOOTH = [name for name in NAMES if name != "softpick_stop_gradient"]  # whose gradient is by design not the derivative
BACKENDS = ["auto", "tiled", "reference"]
OFFSETS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)


def make(*lead, tq=4, tk=5, heads=2, kv_heads=1, d=3, dv=2):
    q = torch.randn(*lead, heads, tq, d, dtype=torch.float64)
    k, v = (torch.randn(*lead, kv_heads, tk, n, dtype=torch.float64) for n in (d, dv))
    return q, k, v


def sink_for(name):
    return torch.randn(2, dtype=torch.float64) if NORMALIZERS[name].needs_sink else None


def dense(name, backend, sink=None, **options):
    return functools.partial(
        scaled_dot_product_attention, normalizer=name, backend=backend, enable_gqa=True, sink=sink, **options
    )


def packed(backend, name="softpick", sink=None):
    def f(q, k, v):
        return varlen_attention(q, k, v, OFFSETS, OFFSETS, is_causal=True, normalizer=name, backend=backend, sink=sink)

    return f


def truth(name, sink=None, causal="top_left"):
    return lambda q, k, v: oracle(q, k, v, name, causal=causal, sink=sink)[0]


def close(one, other, name="softpick"):
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5 if NORMALIZERS[name].eps else 1e-8)


def numeric(f, inputs, tangents, step=1e-6):
    """Directional derivative by central differences."""
    ahead, behind = (f(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


def tangents_of(inputs):
    return tuple(torch.randn_like(x) for x in inputs)


# -------------------------------------------------------------------------------------------------- forward mode


@pytest.mark.thinned
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("how", ["jvp", "linearize", "dual numbers", "dual number of one input"])
def test_forward_mode(how, backend, name):
    inputs, sink = make(2), sink_for(name)
    f, want = dense(name, backend, sink, is_causal=True), truth(name, sink)
    tangents = tangents_of(inputs)
    if how == "dual number of one input":
        tangents = (tangents[0], *(torch.zeros_like(x) for x in inputs[1:]))
    if how == "jvp":
        out, got = torch.func.jvp(f, inputs, tangents)
        close(out, want(*inputs), name)
    elif how == "linearize":
        got = torch.func.linearize(f, *inputs)[1](*tangents)
    else:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(inputs[0], tangents[0]), *inputs[1:]]
            if how == "dual numbers":
                duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
            got = forward_ad.unpack_dual(f(*duals)).tangent
    close(got, torch.func.jvp(want, inputs, tangents)[1], name)
    torch.testing.assert_close(got, numeric(want, inputs, tangents), rtol=1e-3, atol=1e-3)


def test_forward_mode_of_mask_and_sink():
    q, k, v = make(2)
    mask, sink = torch.randn(1, 2, 4, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def f(mask, sink):
        return dense("learned_sink", "auto", sink, softcap=1.5)(q, k, v, mask)

    def want(mask, sink):
        return oracle(q, k, v, "learned_sink", mask=mask, sink=sink, softcap=1.5)[0]

    primals, tangents = (mask, sink), tangents_of((mask, sink))
    close(torch.func.jvp(f, primals, tangents)[1], torch.func.jvp(want, primals, tangents)[1], "learned_sink")


@pytest.mark.parametrize("name", ["softpick", "softmax", "learned_sink"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_mode_of_packed_sequences(backend, name):
    q, k, v = (torch.randn(5, h, 3, dtype=torch.float64) for h in (2, 1, 1))
    sink = sink_for(name)

    def want(q, k, v):
        parts = [
            truth(name, sink, "bottom_right")(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)))
            for a, b in itertools.pairwise(OFFSETS.tolist())
            if b > a
        ]
        return torch.cat([out[0].transpose(0, 1) for out in parts])

    tangents = tangents_of((q, k, v))
    got = torch.func.jvp(packed(backend, name, sink), (q, k, v), tangents)[1]
    close(got, torch.func.jvp(want, (q, k, v), tangents)[1], name)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda q, k, v: dense("softpick", "tiled")(q, k, v), id="attention"),
        pytest.param(lambda q, k, v: dense("softmax", "tiled")(q, k, v), id="softmax"),
        pytest.param(lambda q, k, v: packed("tiled")(*(x[0].transpose(0, 1) for x in (q, k, v))), id="packed"),
    ],
)
def test_tiles_refuse_forward_mode(call):
    """Never zeros: whoever names the tiles gets an error that says what to do."""
    inputs = make(1, tq=5)
    tangents = tangents_of(inputs)
    says = "the tiled backend has no forward-mode derivatives; use backend='reference'"
    with pytest.raises(NotImplementedError, match=says):
        torch.func.jvp(call, inputs, tangents)
    with pytest.raises(NotImplementedError, match=says):
        torch.func.jacfwd(call)(*inputs)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=says):
        call(forward_ad.make_dual(inputs[0], tangents[0]), *inputs[1:])
    # constants beside what is differentiated have no tangent, and nothing is refused
    torch.testing.assert_close(
        torch.func.jvp(lambda a: a * call(*inputs).sum(), (inputs[0],), (tangents[0],))[1],
        tangents[0] * call(*inputs).sum(),
    )
    with pytest.raises(NotImplementedError, match="no gradient of gradients"):
        torch.func.grad(lambda q: torch.func.grad(lambda a: call(a, *inputs[1:]).square().sum())(q).sum())(inputs[0])


# -------------------------------------------------------------------------------------------------- reverse mode, vmap


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_mode_and_per_sample_gradients(backend, name):
    inputs, sink = make(3, 2), sink_for(name)
    f = dense(name, backend, sink, is_causal=True)
    want = truth(name, sink)
    loss = lambda *x: f(*x).square().sum()  # noqa: E731
    each = [
        torch.autograd.functional.jacobian(lambda *x: want(*x).square().sum(), tuple(x[n] for x in inputs))
        for n in range(3)
    ]
    per_sample = [torch.stack(parts) for parts in zip(*each, strict=True)]
    close(torch.func.grad(loss, argnums=(0, 1, 2))(*(x[0] for x in inputs))[1], per_sample[1][0], name)
    for one, other in zip(torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*inputs), per_sample, strict=True):
        close(one, other, name)
    out, pull = torch.func.vjp(f, *(x[1] for x in inputs))
    for one, other in zip(pull(2 * out), (x[1] for x in per_sample), strict=True):
        close(one, other, name)
    total = torch.func.grad(lambda k: torch.vmap(loss, in_dims=(0, None, 0))(inputs[0], k, inputs[2]).sum())
    shared = sum(
        torch.autograd.functional.jacobian(
            lambda k, n=n: want(inputs[0][n], k, inputs[2][n]).square().sum(), inputs[1][0]
        )
        for n in range(3)
    )
    close(total(inputs[1][0]), shared, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacobians_agree(backend):
    q, k, v = make(1)
    f = dense("softpick", backend, is_causal=True)
    want = torch.autograd.functional.jacobian(lambda a: truth("softpick")(a, k, v), q)
    close(torch.func.jacrev(lambda a: f(a, k, v))(q), want)
    if backend != "tiled":
        close(torch.func.jacfwd(lambda a: f(a, k, v))(q), want)


@pytest.mark.parametrize("dims", [(0, None, None), (1, 0, None), (None, 2, 0), (0, 1, -1)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [None, "shared", "of the batch", "of each"])
def test_vmap_over_any_dimension(mask, backend, dims):
    n, inputs = 3, make(2)
    samples = [
        [x + 0.1 * i for i in range(n)] if dim is not None else [x] * n for x, dim in zip(inputs, dims, strict=True)
    ]
    stacked = [x if dim is None else torch.stack(each, dim) for x, dim, each in zip(inputs, dims, samples, strict=True)]
    masks, mask_dim = [None] * n, None
    if mask is not None:
        masks = [torch.randn(2 if mask == "of the batch" else 1, 1, 4, 5, dtype=torch.float64)] * n
        if mask == "of each":
            masks, mask_dim = [m + i for i, m in enumerate(masks)], 0
    given = torch.stack(masks) if mask_dim == 0 else masks[0]
    f = dense("softpick", backend)
    got = torch.vmap(lambda q, k, v, m: f(q, k, v, m, return_stats=True)[:2], in_dims=(*dims, mask_dim))(
        *stacked, given
    )
    want = [oracle(*each[:3], "softpick", mask=each[3])[0] for each in zip(*samples, masks, strict=True)]
    close(got[0], torch.stack(want))
    close(got[1][2], f(*(each[2] for each in samples), masks[2], return_stats=True).lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_sample_gradients_of_mask_and_sink(backend):
    """Gradients that are sums over the batch are those of each sample, shared by the samples or not."""
    q, k, v = make(3, 2)
    mask, sink = torch.randn(1, 1, 4, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def loss(mask, sink, q, k, v):
        return dense("learned_sink", backend, sink)(q, k, v, mask).square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0, 0))(mask, sink, q, k, v)
    sinks = torch.stack([sink, sink + 1, sink - 1])
    moved = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0, 0, 0, 0))(mask, sinks, q, k, v)

    def want(mask, sink, n):
        return oracle(q[n], k[n], v[n], "learned_sink", mask=mask, sink=sink)[0].square().sum()

    for n in range(3):
        of_mask, of_sink = torch.autograd.functional.jacobian(lambda m, s, n=n: want(m, s, n), (mask, sink))
        close(got[0][n], of_mask)
        close(got[1][n], of_sink)
        close(moved[n], torch.autograd.functional.jacobian(lambda s, n=n: want(mask, s, n), sinks[n]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_of_packed_sequences(backend):
    q, k, v = (torch.randn(3, 5, h, 3, dtype=torch.float64) for h in (2, 1, 1))
    f = packed(backend)
    torch.testing.assert_close(torch.vmap(f)(q, k, v), torch.stack([f(*each) for each in zip(q, k, v, strict=True)]))
    loss = lambda *x: f(*x).square().sum()  # noqa: E731
    want = [torch.autograd.functional.jacobian(loss, each)[1] for each in zip(q, k, v, strict=True)]
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss, argnums=1))(q, k, v), torch.stack(want))
    offsets = torch.tensor([[0, 2, 5], [0, 1, 5], [0, 5, 5]])

    def each_its_own(q, k, v, cu):
        return varlen_attention(q, k, v, cu, cu, is_causal=True, window=2, backend=backend)

    want = [each_its_own(*each) for each in zip(q, k, v, offsets, strict=True)]
    torch.testing.assert_close(torch.vmap(each_its_own)(q, k, v, offsets), torch.stack(want))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["softpick", "learned_sink", "softmax"])
def test_batched_gradients(backend, name):
    inputs, sink = make(2), sink_for(name)
    mask = torch.randn(4, 5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*inputs, mask, sink) if x is not None]
    out = dense(name, backend, sink)(*inputs, mask)
    grads = torch.randn(3, *out.shape, dtype=torch.float64)
    got = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in grads]
    for one, others in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(others))
    want = torch.autograd.functional.jacobian(lambda a: dense(name, backend, sink)(a, *inputs[1:], mask), inputs[0])
    fast = torch.autograd.functional.jacobian(
        lambda a: dense(name, backend, sink)(a, *inputs[1:], mask), inputs[0], vectorize=True
    )
    torch.testing.assert_close(fast, want)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_randomness_of_dropout_under_vmap(backend):
    q, k = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 64, 4)
    v = torch.eye(64)[None, None]
    f = dense("softmax_plus_one", backend, dropout_p=0.5)
    stacked = q.expand(3, *q.shape)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda a: f(a, k, v))(stacked)
    kept = {how: torch.vmap(lambda a: f(a, k, v), randomness=how)(stacked) != 0 for how in ("same", "different")}
    assert torch.equal(kept["same"][0], kept["same"][1])
    assert not torch.equal(kept["different"][0], kept["different"][1])
    assert all(abs(x.double().mean() - 0.5) < 0.05 for x in kept.values())

    def leaf_gradient(a):
        return torch.func.grad(lambda v: (f(a, k, v) * torch.arange(1.0, 9.0)[:, None]).sum())(v)

    grads = torch.vmap(leaf_gradient, randomness="different")(stacked)
    assert not torch.equal(grads[0], grads[1])


# -------------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hessian_of_attention(backend, name):
    (q, k, v), sink = make(1, tq=3, tk=3), sink_for(name)
    f = lambda q: dense(name, backend, sink, is_causal=True)(q, k, v).square().sum()  # noqa: E731
    want = torch.autograd.functional.hessian(lambda q: truth(name, sink)(q, k, v).square().sum(), q)
    for second in (
        torch.func.hessian(f),
        torch.func.jacfwd(torch.func.jacrev(f)),
        torch.func.jacrev(torch.func.jacrev(f)),
        torch.func.jacrev(torch.func.jacfwd(f)),
    ):
        torch.testing.assert_close(second(q), want, rtol=1e-5, atol=1e-4)


FUNCTIONS = {
    "softpick": (softpick.softpick, lambda row: weights_of_row(row, "softpick")),
    "linear_softpick": (softpick.linear_softpick, lambda row: weights_of_row(row, "linear_softpick")),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_has_every_derivative(name):
    f, row = FUNCTIONS[name]
    want = lambda x: torch.stack([row(r) for r in x])  # noqa: E731
    x = torch.randn(3, 4, dtype=torch.float64)
    t = torch.randn_like(x)
    torch.testing.assert_close(
        torch.func.jvp(f, (x,), (t,))[1], torch.func.jvp(want, (x,), (t,))[1], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(torch.func.linearize(f, x)[1](t), torch.func.jvp(f, (x,), (t,))[1])
    of = lambda g: lambda x: (g(x) ** 3).sum()  # noqa: E731
    second = torch.autograd.functional.hessian(of(want), x)
    for got in (
        torch.func.hessian(of(f)),
        torch.func.jacfwd(torch.func.jacfwd(of(f))),
        torch.func.jacrev(torch.func.jacfwd(of(f))),
    ):
        torch.testing.assert_close(got(x), second, rtol=1e-6, atol=1e-6)
    half = torch.func.jvp(f, (x.half(),), (t.half(),))[1]
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), torch.func.jvp(f, (x,), (t,))[1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_passes_gradcheck_of_every_kind(name):
    x = torch.randn(3, 4, dtype=torch.float64)
    x = (x.sign() * (x.abs() + 0.1)).requires_grad_()
    f = FUNCTIONS[name][0]
    kinds = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(f, x, **kinds)
    assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_the_transpose_of_reverse_mode(name):
    """Also for the normalizer whose gradient is by design not the derivative."""
    inputs, sink = make(2), sink_for(name)
    f = dense(name, "reference", sink)
    tangents = tangents_of(inputs)
    out, of_out = torch.func.jvp(f, inputs, tangents)
    grad = torch.randn_like(out)
    back = torch.func.vjp(f, *inputs)[1](grad)
    torch.testing.assert_close((of_out * grad).sum(), sum((a * b).sum() for a, b in zip(back, tangents, strict=True)))


# -------------------------------------------------------------------------------------------------- without values


@pytest.mark.parametrize("name", ["softpick", "softmax", "learned_sink"])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_of_tensors_without_values(kind, backend, name):
    if backend == "triton" and kind == "fake":
        pytest.importorskip("triton")
    device = "meta" if kind == "meta" else None
    with FakeTensorMode() if kind == "fake" else torch.device("cpu"):
        q = torch.empty(2, 4, 5, 8, device=device, requires_grad=True)
        k, v = (torch.empty(2, 2, 6, n, device=device) for n in (8, 3))
        sink = torch.zeros(4, device=device) if NORMALIZERS[name].needs_sink else None
        mask = torch.ones(2, 1, 5, 6, dtype=torch.bool, device=device)
        options = {"normalizer": name, "backend": backend, "sink": sink}
        out = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_stats=True, **options)
        assert out.output.shape == (2, 4, 5, 3)
        assert out.row_mass.shape == (2, 4, 5)
        out.output.sum().backward()
        assert q.grad.shape == q.shape
        cu = torch.tensor([0, 2, 5], device=device)
        got = varlen_attention(*(torch.empty(5, h, 8, device=device) for h in (4, 2, 2)), cu, cu, **options)
        assert got.shape == (5, 4, 8)
        assert got.device == q.device


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("paged", [False, True])
def test_shapes_of_decoding_without_values(kind, paged):
    device = "meta" if kind == "meta" else None
    with FakeTensorMode() if kind == "fake" else torch.device("cpu"), torch.no_grad():
        cache = torch.empty(7, 4, 2, 8, device=device) if paged else torch.empty(2, 2, 16, 8, device=device)
        table = torch.zeros(2, 4, dtype=torch.int32, device=device) if paged else None
        lengths = torch.tensor([3, 4], device=device)
        q = torch.empty(2, 4, 1, 8, device=device)
        assert decode_attention(q, cache, cache, cache_seqlens=lengths, block_table=table).shape == q.shape


def test_modules_on_the_meta_device():
    with torch.device("meta"):
        layer = softpick.nn.Attention(16, 4, 2, is_causal=True, score_scale=True, output_gate=True)
        assert layer(torch.empty(2, 7, 16)).shape == (2, 7, 16)
        assert softpick.nn.SequenceEncoder(7, 16, num_layers=1)(torch.empty(2, 5, 7)).shape == (2, 16)
        assert softpick.nn.Softpick()(torch.empty(3, 4)).device.type == "meta"


class Marked(torch.Tensor):
    """A subclass, which must see the operators."""


def _by_vmap(f):
    seen = []
    torch.vmap(lambda x: seen.append(f(x)) or x)(torch.zeros(2, 3))
    return seen[0]


def _by_dual(f):
    with forward_ad.dual_level():
        return f(torch.zeros(3))


def _by_mode(f):
    with FakeTensorMode():
        return f(torch.zeros(3))


def _by_watching(f):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Watch():
        return f(torch.zeros(3))


ROUND = {
    "tensors": (lambda f: f(torch.zeros(3)), True),
    "a parameter": (lambda f: f(torch.nn.Parameter(torch.zeros(3))), True),
    "a subclass": (lambda f: f(torch.zeros(3).as_subclass(Marked)), False),
    "the meta device": (lambda f: f(torch.zeros(3, device="meta")), False),
    "fake tensors": (_by_mode, False),
    "a dispatch mode": (_by_watching, False),
    "vmap": (_by_vmap, False),
    "dual numbers": (_by_dual, False),
}


@pytest.mark.parametrize("name", ROUND)
def test_what_goes_around_the_dispatcher(name):
    """Plain tensors only, whichever argument is not."""
    call, wanted = ROUND[name]
    x = torch.zeros(3)
    assert call(lambda one: plain(one)) == wanted
    assert call(lambda one: plain(one, None, x)) == wanted
    if name != "the meta device":  # of which the query tells
        assert call(lambda one: plain(x, None, one)) == wanted


def test_without_triton_nothing_is_interpreted(monkeypatch):
    monkeypatch.setattr(calling, "HAS_TRITON", False)
    assert not calling.interpreted()


def test_operators_see_what_is_not_plain():
    """Under a dispatch mode a call is one operator, forward and backward; without one there is none."""
    q, k, v = make(2)
    q.requires_grad_()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        dense("softpick", "tiled")(q, k, v).sum().backward()
    assert [name for name in seen if "softpick" in name] == [
        "softpick.attention_forward.default",
        "softpick.attention_backward.default",
    ]
