"""Records of one's own: every one that can be built computes what its switches say, on every backend, or is refused by name."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from formula import attention as formula
from fuzz_attention import RECORDS, fuzz

import softpick
from softpick import NORMALIZERS, Normalizer, get_normalizer, normalizers, scaled_dot_product_attention
from softpick.distributed import ring_attention
from softpick.ops import backends
from softpick.ops.calling import interpreted

TEXTS = {record.text: record for record in RECORDS}
OWN = replace(NORMALIZERS["softpick"], rectify="none", constant=1)


def inputs(dtype=torch.float64, t=9, d=8):
    q, k, v = (
        torch.randn(2, 4, t, d, dtype=dtype),
        torch.randn(2, 2, t, d, dtype=dtype),
        torch.randn(2, 2, t, 5, dtype=dtype),
    )
    return [x.requires_grad_() for x in (q, k, v)]


def sink_of(record, dtype=torch.float64):
    return torch.randn(4, dtype=dtype).requires_grad_() if record.needs_sink else None


def check(record, out, leaves, sink, grad, *, tolerance):
    """Output and gradients of a causal call with scale 1 against the formula."""
    wanted = dict(zip(("dq", "dk", "dv", "dsink"), (*leaves, sink), strict=True))
    wanted = {name: leaf for name, leaf in wanted.items() if leaf is not None}
    got = {"out": out, **dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))}
    t = leaves[0].shape[2]
    keep = torch.ones(t, t, dtype=torch.bool).tril()
    truth = formula(*leaves, grad, record, keep=keep, scale=1.0, sink=sink, unit=tolerance)
    for name, x in got.items():
        want = getattr(truth, name)
        off = (x.detach().double() - want.value).abs()
        allowed = 12 * (tolerance * want.bound + want.rough) + 1e-30
        assert (off <= allowed).all(), (name, float((off / allowed).max()))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("text", TEXTS)
def test_every_record_computes_what_it_says(text, backend):
    record = TEXTS[text]
    leaves, sink = inputs(), sink_of(record)
    options = {"is_causal": True, "scale": 1.0, "enable_gqa": True, "sink": sink}
    out = scaled_dot_product_attention(*leaves, normalizer=record, backend=backend, **options)
    check(record, out, leaves, sink, torch.randn_like(out), tolerance=2.0**-53)


@pytest.mark.thinned(every=5)
@pytest.mark.parametrize(("level", "sink"), [(-95.0, -200.0), (-200.0, -95.0)])
@pytest.mark.parametrize("text", [text for text, record in TEXTS.items() if record.exponential])
def test_rows_whose_exponentials_underflow(text, level, sink):
    """In fp32 ``e^s`` has no reciprocal from s = -88.7 on, and is 0 from -104 on."""
    record = TEXTS[text]
    leaves = inputs(torch.float32, d=16)
    with torch.no_grad():
        leaves[0][..., 0], leaves[1][..., 0] = level, 1.0
        leaves[0][..., 1:] *= 0.1
    logits = torch.full((4,), sink, requires_grad=True) if record.needs_sink else None
    options = {"is_causal": True, "scale": 1.0, "enable_gqa": True, "sink": logits, "normalizer": record, "eps": 0.0}
    for backend in (
        "reference",
        "tiled",
        *(["triton"] if interpreted() and record.has_kernels and record.needs_sink else []),
    ):
        out = scaled_dot_product_attention(*leaves, **options, backend=backend)
        check(record, out, leaves, logits, torch.randn_like(out), tolerance=2.0**-20)


@pytest.mark.thinned(every=11)
@pytest.mark.skipif(not interpreted(), reason="runs the GPU kernels in Triton's interpreter")
@pytest.mark.parametrize("text", TEXTS)
def test_every_record_in_the_kernels(text):
    record = TEXTS[text]
    leaves, sink = inputs(torch.float32, d=16), sink_of(record, torch.float32)
    options = {"is_causal": True, "scale": 1.0, "enable_gqa": True, "sink": sink, "backend": "triton"}
    if not record.has_kernels:
        with pytest.raises(ValueError, match="normalizer: the 'triton' backend has no kernels for own"):
            scaled_dot_product_attention(*leaves, normalizer=record, **options)
        return
    out = scaled_dot_product_attention(*leaves, normalizer=record, **options)
    check(record, out, leaves, sink, torch.randn_like(out), tolerance=2.0**-20)
    with torch.no_grad():  # few queries go to the decode kernel
        few = scaled_dot_product_attention(*leaves, normalizer=record, **options)
    torch.testing.assert_close(few, out, rtol=1e-4, atol=1e-4)


def test_auto_on_a_gpu_warns_where_there_is_no_kernel(monkeypatch):
    from torch._subclasses import FakeTensorMode

    monkeypatch.setattr(backends, "warned", set())
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    with FakeTensorMode():
        x = torch.empty(1, 1, 2, 64, device="cuda", dtype=torch.bfloat16)
        with pytest.warns(UserWarning, match="no kernels for softpick"):
            assert backends.choose_backend("auto", x, x, OWN, "tiled") == "tiled"


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_is_the_record(text, monkeypatch):
    assert get_normalizer(text) == TEXTS[text]
    monkeypatch.setattr(normalizers, "_RECORDS", dict(NORMALIZERS))  # another process
    assert get_normalizer(text).switches == TEXTS[text].switches
    assert get_normalizer(text).text == text


def test_a_record_of_the_table_stays_one():
    assert replace(NORMALIZERS["softpick"], note="mine").text == "softpick"
    assert replace(NORMALIZERS["softpick"], eps=1e-5).text != "softpick"


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"base": "cube"}, "base: expected one of 'exp', 'expm1', 'linear', 'square', 'sigmoid'; got 'cube'"),
        ({"rectify": "negative"}, "rectify: expected one of"),
        ({"absolute_denominator": 1}, "absolute_denominator: expected one of False, True; got 1"),
        ({"constant": 2}, "constant: expected one of 0, 1, 'sink'; got 2"),
        ({"constant": True}, "constant: expected one of"),
        ({"eps": -1.0}, "eps: expected a finite number >= 0, got -1.0"),
        ({"eps": math.nan}, "eps: expected a finite number"),
        ({"base": "linear", "constant": "sink"}, "constant: expected 0 or 1 for base 'linear'"),
        ({"base": "expm1", "rectify": "nonnegative"}, "rectify: expected 'none' or 'positive' for base 'expm1'"),
        ({"negative_gradient": False}, "negative_gradient: expected True unless"),
        ({"normalized": False}, "normalized: expected True unless"),
        ({"name": "a b"}, "name: expected letters"),
        ({"name": "a(base=exp)"}, "name: expected letters"),
    ],
)
def test_contradictions_are_refused(switches, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        Normalizer(**{"name": "own", **switches})


def test_every_combination_is_built_or_refused_by_a_switch():
    built, refused = 0, []
    for base, rectify, absolute, constant, negative in itertools.product(
        ("exp", "expm1", "linear"), ("none", "positive", "nonnegative"), (False, True), (0, 1, "sink"), (True, False)
    ):
        switches = {"rectify": rectify, "absolute_denominator": absolute, "constant": constant}
        try:
            record = Normalizer("own", base=base, negative_gradient=negative, **switches)
            assert record.text in TEXTS or replace(record, eps=1e-6).text in TEXTS
            built += 1
        except ValueError as error:
            refused.append(str(error).split(":")[0])
    assert built + len(refused) == 108
    assert built > 40
    assert set(refused) == {"rectify", "constant", "negative_gradient"}


def test_relu_sigmoid_and_squared_relu_attention():
    q, k, v = inputs()
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).tril()
    values, causal = v.repeat_interleave(2, 1), torch.ones(9, 9).tril()
    relu = scores.relu()
    plain = {"constant": 1, "normalized": False}
    cases = {
        Normalizer("relu", base="linear", rectify="positive", **plain): relu @ values,
        Normalizer("relu", base="linear", rectify="positive", eps=1e-6): relu
        / (relu.sum(-1, keepdim=True) + 1e-6)
        @ values,
        Normalizer("sigmoid", base="sigmoid", **plain): (torch.sigmoid(scores) * causal) @ values,
        Normalizer("squared", base="square", rectify="positive", **plain): relu**2 @ values,
    }
    for record, want in cases.items():
        for backend in ("reference", "tiled", "auto"):
            options = {"is_causal": True, "scale": 1.0, "enable_gqa": True, "backend": backend}
            torch.testing.assert_close(scaled_dot_product_attention(q, k, v, normalizer=record, **options), want)


def test_modules_and_adapters_compute_the_record():
    layer = softpick.nn.Attention(16, 4, normalizer=OWN, is_causal=True).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = (proj(x).unflatten(-1, (4, 4)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, normalizer=OWN, backend="reference")
    torch.testing.assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)))
    pytest.importorskip("transformers")
    from softpick.integrations.transformers import make_attention_function

    got, _ = make_attention_function(OWN)(torch.nn.Module(), q, k, v, None)
    torch.testing.assert_close(got.transpose(1, 2), out)
    table = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not torch.allclose(out, table)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_rings_compute_the_record(alone):
    for record in RECORDS:
        q, k, v = inputs(t=8)
        sink = sink_of(record)
        options = {"is_causal": True, "enable_gqa": True, "normalizer": record, "sink": sink, "scale": 1.0}
        if record.signed_denominator:
            with pytest.raises(ValueError, match="normalizer: expected a denominator that is never negative"):
                ring_attention(q, k, v, **options)
            continue
        out = ring_attention(q, k, v, **options)
        check(record, out, (q, k, v), sink, torch.randn_like(out), tolerance=2.0**-48)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_records_compile_to_one_graph(backend):
    q, k, v = inputs(torch.float32)

    def f(q, k, v):
        return scaled_dot_product_attention(q * 1.0, k, v, enable_gqa=True, backend=backend, normalizer=OWN)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), f(q, k, v))


def test_opcheck_of_a_record():
    q, k, v = inputs(torch.float32)
    tail = ("tiled", 0, 0)
    args = (q, k, v, None, None, None, None, None, OWN.text, 0.3, 1e-6, -1, 0, False, 0.0, 0.0, True, *tail)
    torch.library.opcheck(torch.ops.softpick.attention_forward.default, args)


def test_random_calls():
    """A short form of ``python tests/fuzz_attention.py``."""
    assert not fuzz(400, 7_000_000, interpreted(), seconds=20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [1e-3, 1e-1, 1.0])
def test_rings_are_exact_where_rows_see_few_keys(alone, dtype, level):
    """The rounding of the output to 16 bits does not reach the gradient, where a small denominator would magnify it."""
    q, k, v = (torch.randn(2, 4, 64, 32) * factor for factor in (level**0.5, level**0.5, 1.0))
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    grad = torch.randn(2, 4, 64, 32).to(dtype)
    (got,) = torch.autograd.grad(ring_attention(*leaves, is_causal=True), leaves[0], grad)
    truth = scaled_dot_product_attention(*exact, is_causal=True, backend="reference")
    (want,) = torch.autograd.grad(truth, exact[0], grad.double())
    off = (got.double() - want)[:, :, :3].norm(dim=-1).mean() / want.norm(dim=-1).mean()
    assert off < torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_base_without_a_formula_computes_nothing(backend, monkeypatch):
    """A name that was added to the choices alone: an error, not the formula of another base."""
    monkeypatch.setitem(normalizers._CHOICES, "base", (*normalizers._CHOICES["base"], "cosh"))
    record = Normalizer("cosh", base="cosh")
    q = torch.randn(1, 1, 5, 4)
    with pytest.raises(NotImplementedError, match="'cosh' has no formula"):
        scaled_dot_product_attention(q, q, q, normalizer=record, backend=backend)
