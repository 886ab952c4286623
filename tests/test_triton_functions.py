"""Softpick over rows, torch.compile, opcheck and the choice of a backend with the Triton kernels, in Triton's interpreter."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from test_attention import arguments

import softpick
from softpick import NORMALIZERS, decode_attention, functional, scaled_dot_product_attention, varlen_attention
from softpick.ops import backends, vector
from softpick.ops.calling import interpreted

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("the kernels run on the GPU here", allow_module_level=True)

from test_triton import (
    _small_tiles,  # noqa: F401 - a fixture
    close,
    exact,
    make,
)

from softpick.ops.triton import kernel_cache

# ----------------------------------------------------------------------------------------------- softpick over a vector


@pytest.fixture
def rows(monkeypatch):
    """Send ``softpick`` on the CPU through the kernel over rows, and count the calls."""
    calls = []
    original = vector.rows_forward
    monkeypatch.setattr(vector, "_on_gpu", lambda x: True)
    monkeypatch.setattr(vector, "rows_forward", lambda *args: calls.append(args) or original(*args))
    return calls


@pytest.mark.parametrize("n", [1, 7, 300, 20000])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_rows(n, eps, rows, poisoned):
    x = torch.randn(4, n) * 3
    x[0] = -x[0].abs()
    x[1] = 0.0
    x[2, n // 2] = 1e4
    if n > 1:
        x[:, n - 1] = -math.inf
    x.requires_grad_()
    y = softpick.softpick(x, eps=eps)
    assert len(rows) == 1
    truth = x.detach().double().requires_grad_()
    want = softpick.softpick(truth, eps=eps)
    assert len(rows) == 1
    close(y, want)
    if n > 1:
        assert (y[:, n - 1] == 0).all()
    grad = torch.randn(4, n)
    keep = torch.tensor([True, eps > 0, True, True])  # with eps 0 the gradient of a row of zeros is not defined
    got, other = torch.autograd.grad(y, x, grad)[0][keep], torch.autograd.grad(want, truth, grad.double())[0][keep]
    for one, two in zip(got, other, strict=True):
        close(one, two, 5e-5)  # a row each: the gradients of the huge one are tiny


def test_rows_layouts(rows):
    x = torch.randn(2, 3, 7)
    for view, dim in ((x, -1), (x.transpose(0, 2), 0), (x.transpose(1, 2), 1), (x[:, :, 2:], 2), (x[0, 0], 0)):
        torch.testing.assert_close(softpick.softpick(view, dim), softpick.softpick(view.double(), dim).float())
    assert len(rows) == 5
    torch.testing.assert_close(softpick.softpick(x, 1), softpick.softpick(x.double(), 1).float())
    softpick.softpick(x, where=x > 0)
    softpick.softpick(torch.tensor(1.0))
    softpick.softpick(x[:, :, :0])
    assert len(rows) == 5  # not contiguous in dim, where, scalars and empty rows take torch operations


def test_rows_half_precision(rows):
    x = (torch.randn(3, 40) * 1e-4).half().requires_grad_()
    y = softpick.softpick(x)
    assert y.dtype == torch.float16
    (grad,) = torch.autograd.grad(y[:, 0].sum() * 100, x)
    truth = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(softpick.softpick(truth)[:, 0].sum() * 100, truth)
    limit = torch.finfo(torch.float16).max
    close(grad, want.clamp(-limit, limit), 1e-2)
    close(y, softpick.softpick(x.double()), 1e-3)


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("shape", [(3, 7), (3, 1), (3, 0), (0, 7), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("step", [1, 2, 0])
def test_rows_operators(shape, step, eps):
    """Called by name, they take rows of any stride, and vmap, which the public function does not send there."""
    operators = torch.ops.softpick
    wide = torch.randn(*shape[:-1], max(1, shape[-1] * step)) + 0.1
    x = wide[..., ::step] if step else wide.expand(shape)
    grad = torch.randn(*shape[:-1], max(1, shape[-1] * step))
    grad = grad[..., ::step] if step else grad.expand(shape)
    x, grad = x[..., : shape[-1]], grad[..., : shape[-1]]

    def both(x, grad):
        y, lse = operators.rows_forward(x, eps, "auto")
        dx = operators.rows_backward(grad, x, lse, eps, "auto") if x.dim() == 2 and x.numel() else torch.zeros_like(x)
        return y, lse, dx

    y, lse, dx = both(x, grad) if x.dim() == 2 else (*torch.vmap(lambda x: both(x, x)[:2])(x), None)
    truth = x.double().requires_grad_()
    top = truth.detach().clamp(min=0).amax(-1, keepdim=True) if shape[-1] else truth.new_zeros(*shape[:-1], 1)
    part = torch.exp(truth - top) - torch.exp(-top)
    total = part.abs().sum(-1, keepdim=True) + eps
    want = part.clamp(min=0) / total
    close(y, want)
    close(lse, (top + torch.log(total))[..., 0])
    if dx is not None and x.numel() and shape[-1] > 1:
        close(dx, torch.autograd.grad(softpick.softpick(truth, eps=eps), truth, grad.double())[0], 5e-5)


def test_rows_under_transforms(rows):
    x = torch.randn(5, 7)
    want = softpick.softpick(x)
    assert len(rows) == 1
    torch.testing.assert_close(torch.vmap(softpick.softpick)(x), want)
    jacobian = torch.func.jacrev(softpick.softpick)(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(softpick.softpick, x[0].double()).float())
    compiled = torch.compile(torch.vmap(softpick.softpick), backend="eager")
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(compiled(x.expand(2, 5, 7)), want.expand(2, 5, 7))


def test_rows_second_gradient(rows):
    x = (torch.randn(3, 9) * 2).requires_grad_()
    x.data[0, 3] = -math.inf
    seen = torch.isfinite(x.detach())
    weight, direction = torch.randn(3, 9).requires_grad_(), torch.where(seen, torch.randn(3, 9), 0.0)

    def second(x, weight):
        (dx,) = torch.autograd.grad((softpick.softpick(x) * weight).sum(), x, create_graph=True)
        return torch.autograd.grad((torch.where(seen, dx, 0.0) * direction).sum(), (x, weight))

    got = second(x, weight)
    assert len(rows) == 1
    for one, other in zip(got, second(*exact(x, weight)), strict=True):
        close(one, other)


# ------------------------------------------------------------------------------------------------------ torch machinery


@pytest.mark.thinned(every=2)
@pytest.mark.parametrize("pattern", ["causal", "additive"])
def test_opcheck(pattern):
    q, k, v = make(tq=9, tk=13)
    mask, _ = arguments(pattern, 2, 2, 9, 13)
    mask = mask.detach().float() if mask is not None and mask.dtype != torch.bool else mask
    tail = ("triton", 0, 0)
    op = torch.ops.softpick.attention_forward.default
    args = (q, k, v, mask, None, None, None, None, "softpick", 0.3, 1e-6, -1, 0, False, 0.0, 0.0, True, *tail)
    torch.library.opcheck(op, args)
    sink = torch.randn(2, requires_grad=True)
    args = (
        q,
        k,
        v,
        mask,
        sink,
        None,
        None,
        None,
        "learned_sink",
        0.3,
        0.0,
        -1,
        0,
        False,
        0.0,
        0.0,
        False,
        *tail,
    )
    torch.library.opcheck(op, args)


def test_opcheck_of_the_other_operators():
    q, k, v = (t.detach() for t in make(tq=2, tk=13))
    lengths = torch.tensor([13, 5], dtype=torch.int32)
    args = (q, k, v, None, None, lengths, None, "softpick", 0.3, 1e-6, -1, 0, True, 0.0, "auto")
    torch.library.opcheck(torch.ops.softpick.decode.default, args)
    cu = torch.tensor([0, 5, 9], dtype=torch.int32)
    q, k, v = make(b=1, tq=9, tk=9)
    tail = (0.3, 1e-6, -1, 0, True, 0.0, 0.0, False, "triton", 5, 5)
    op = torch.ops.softpick.attention_forward.default
    torch.library.opcheck(op, (q, k, v, None, None, cu, cu, None, "softpick", *tail))
    x = torch.randn(3, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.softpick.rows_forward.default, (x, 1e-6, "auto"))
    torch.library.opcheck(
        torch.ops.softpick.rows_backward.default, (x.detach(), x.detach(), torch.zeros(3), 1e-6, "auto")
    )


@pytest.mark.long
def test_compiles_to_one_graph():
    q, k, v = make(tq=17)
    cu = torch.tensor([0, 9, 17], dtype=torch.int32)

    def whole(q, k, v):
        return scaled_dot_product_attention(q * 1.0, k, v, is_causal=True, enable_gqa=True, backend="triton")

    def packed(q, k, v):
        q, k, v = (x[0, :, :17].transpose(0, 1) for x in (q, k, v))
        return varlen_attention(q, k, v, cu, cu, is_causal=True, backend="triton")

    for f in (whole, packed):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(compiled(q, k, v), f(q, k, v))
        for one, other in zip(
            torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)),
            torch.autograd.grad(f(q, k, v).sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_decoding_compiles_to_one_graph(rows):
    q, k, v = (t.detach() for t in make(tq=1))
    lengths = torch.tensor([37, 5], dtype=torch.int32)

    def f(q, k, v, lengths):
        return softpick.softpick(decode_attention(q, k, v, cache_seqlens=lengths, backend="triton").contiguous())

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, lengths), f(q, k, v, lengths))


def test_double_backward_is_refused():
    q, k, v = make()
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="triton")
    (g,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="the triton backend has no gradient of gradients"):
        g.sum().backward()
    args = (None, None, None, None, "softpick", 0.3, 1e-6, -1, 0, True, 0.0, "auto")
    with pytest.raises(NotImplementedError, match="softpick::decode has no gradient"):
        torch.ops.softpick.decode(q[:, :, :1], k, v, *args)[0].sum().backward()


# -------------------------------------------------------------------------------------------------- choice of a backend


def test_auto_stays_with_the_tiles_on_the_cpu(monkeypatch):
    chosen = []
    original = functional.attention
    monkeypatch.setattr(functional, "attention", lambda *a, **k: chosen.append(k["backend"]) or original(*a, **k))
    q, k, v = make()
    scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert chosen == ["tiled"]


def test_auto_on_a_gpu(monkeypatch):
    from torch._subclasses import FakeTensorMode

    monkeypatch.setattr(backends, "warned", set())
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("error")

        def choose(dtype=torch.bfloat16, d=64, backend="auto", rows=0):
            x = torch.empty(1, 1, 2, d, device="cuda", dtype=dtype)
            return backends.choose_backend(backend, x, x, NORMALIZERS["softpick"], "tiled", rows)

        assert choose() == "triton"
        assert choose(d=256) == "triton"
        assert choose(torch.float64) == "tiled"
        assert choose(backend="reference") == "reference"
        with pytest.raises(
            UserWarning, match=r"head dimension from 1 to 256 for the 'triton' backend, got 257.*'tiled'"
        ):
            choose(d=257)
        assert choose(d=257) == "tiled"  # said once
        with pytest.raises(UserWarning, match=r"at most 128 rows .* got 129"):
            choose(rows=129)
        monkeypatch.setattr(backends, "HAS_TRITON", False)
        with pytest.raises(UserWarning, match="needs the package triton, which is not installed"):
            choose()
        assert choose() == "tiled"
        with pytest.raises(ValueError, match=r"pip install 'triton>=3\.6'"):
            choose(backend="triton")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": torch.float64}, "query: expected fp32, bf16 or fp16 for the 'triton' backend, got torch.float64"),
        ({"d": 257}, "query: expected a head dimension from 1 to 256 for the 'triton' backend, got 257"),
        ({"dv": 300}, "value: expected a head dimension from 1 to 256 for the 'triton' backend, got 300"),
    ],
)
def test_what_triton_cannot_take(changes, says):
    q, k, v = (t.detach() for t in make(**changes))
    with pytest.raises(ValueError, match=says):
        scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="triton")
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    with pytest.raises(ValueError, match=says):
        varlen_attention(q, k[:21], v[:21], *(torch.tensor([0, 21]),) * 2, backend="triton")
    with pytest.raises(ValueError, match=says):
        decode_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), backend="triton")


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    q, k, v = make()
    with pytest.raises(ValueError, match="query: expected a CUDA tensor for the 'triton' backend, got one on cpu"):
        scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="triton")
    compiled = torch.compile(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="triton"), backend="aot_eager"
    )
    with pytest.raises(ValueError, match="expected CUDA tensors for the 'triton' backend, got one on cpu"):
        compiled(q, k, v)


def _compiled(started, described):
    """As much of a compiled kernel, and of its runner in Python around one in C, as a launch that is kept looks at."""

    def wrapped(launcher):
        return lambda *args: launcher(*args)

    def start(*args):
        started.append(args)

    runner = SimpleNamespace(
        global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=True,
        launch=wrapped(start) if described else start,
    )  # fmt: skip
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [64, 64], "fp4_padded": False}
    metadata = SimpleNamespace(tensordesc_meta=[meta] if described else None)
    return SimpleNamespace(run=runner, metadata=metadata, function=7, packed_metadata="packed")


@pytest.mark.parametrize("described", [False, True])
def test_a_later_launch_differs_in_addresses_only(described, monkeypatch):
    started, first, hooks = [], [], []
    compiled = _compiled(started, described)
    monkeypatch.setattr(kernel_cache, "run", lambda *args, **constants: first.append(args) or (compiled, [16, True]))
    utils = SimpleNamespace(fill_tma_descriptor=lambda address, *how: ("map", address, how))
    active = SimpleNamespace(utils=utils, get_current_device=lambda: 0, get_current_stream=lambda device: 99)
    monkeypatch.setattr(kernel_cache, "driver", SimpleNamespace(active=active))
    hooked = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=hooks), launch_exit_hook=None)
    monkeypatch.setattr(kernel_cache.triton, "knobs", SimpleNamespace(runtime=hooked))
    tiles = (lambda x: SimpleNamespace(shape=list(x.shape), strides=list(x.stride())),) if described else ()
    launch = kernel_cache.Launch("kernel", (3, 4), (5, 0.5), {"BLOCK": 16, "FLAG": True}, tiles)
    launch(torch.zeros(8, 64), None, torch.zeros(2))
    assert (len(first), len(started)) == (1, 0)
    for _ in range(2):
        x, y = torch.zeros(8, 64), torch.zeros(2)
        launch(x, None, y)
        one = [x.data_ptr()]
        if described:
            one = [("map", x.data_ptr(), (3, 2, 8, [64, 64], [8, 64], [64, 1], 0)), 8, 64, 64, 1]
        head = (3, 4, 1, 99, 7, False, True, None, None, "packed", None, None, None)
        assert started.pop() == (*head, *one, None, y.data_ptr(), 5, 0.5, 16, True)
    assert len(first) == 1
    hooks.append(print)  # a profiler is told of every launch by Triton's own runner
    launch(x, None, y)
    assert (len(first), len(started)) == (2, 0)
