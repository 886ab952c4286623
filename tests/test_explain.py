"""Which kernel takes a call: what is explained is what runs, the switch, and the choice on GPUs that are not there."""

import contextlib
import inspect
import itertools
import re
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import softpick
from softpick import NORMALIZERS, functional
from softpick.ops import switch, vector
from softpick.ops.backends import BACKENDS
from softpick.ops.calling import HAS_TRITON
from softpick.ops.spec import AttentionSpec


def qkv(b=1, h=4, hkv=2, tq=5, tk=5, d=8, dtype=torch.float32, **more):
    return torch.randn(b, h, tq, d, dtype=dtype, **more), *(torch.randn(b, hkv, tk, d, dtype=dtype) for _ in range(2))


@pytest.fixture
def taken(monkeypatch):
    """Backends that calls took, in order."""
    found = []

    def watch(module, name, label):
        run = getattr(module, name)

        def watched(*args, **options):
            found.append(label(options))
            return run(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(functional, "attention", lambda options: options["backend"])
    for name in ("attention_reference", "packed_reference", "cache_reference"):
        watch(functional, name, lambda options: "reference")
    watch(torch.nn.functional, "scaled_dot_product_attention", lambda options: "sdpa")
    return found


PLAIN = {"enable_gqa": True}
CALLS = {
    "plain": PLAIN,
    "causal": {**PLAIN, "is_causal": True},
    "softmax": {**PLAIN, "normalizer": "softmax"},
    "softmax with a window": {**PLAIN, "normalizer": "softmax", "window": 2},
    "named": {**PLAIN, "backend": "reference"},
    "weights": {**PLAIN, "return_weights": True},
    "statistics": {**PLAIN, "return_stats": True, "dropout_p": 0.5},
}


@pytest.mark.parametrize(
    "rule", [{}, {"backend": "tiled"}, {"backend": "reference"}, {"without": ("triton", "decode")}], ids=str
)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_explained_is_what_runs(call, rule, taken):
    tensors, options = qkv(), CALLS[call]
    with softpick.use_backend(**rule):
        softpick.scaled_dot_product_attention(*tensors, **options)
        explained = softpick.explain_backend(*tensors, **options)
    assert taken == [explained.backend]
    named = {"named": "reference", "weights": "reference"}.get(call)
    assert explained.backend == (named or rule.get("backend") or ("sdpa" if call == "softmax" else "tiled"))
    assert f"backend {explained.backend!r}" in str(explained)


@pytest.mark.parametrize("rule", [{}, {"backend": "tiled"}, {"backend": "reference"}], ids=str)
def test_packed_and_decoding_are_explained(rule, taken):
    q, k, v = (x[0].transpose(0, 1) for x in qkv(tq=7, tk=7))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    with softpick.use_backend(**rule):
        softpick.varlen_attention(q, k, v, cu, cu)
        explained = softpick.explain_backend(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
        assert explained.function == "varlen_attention"
        assert set(taken) == {explained.backend}
        taken.clear()
        one, keys, values = qkv(tq=1, tk=9)
        softpick.decode_attention(one, keys, values, cache_seqlens=torch.tensor([4]))
        explained = softpick.explain_backend(one, keys, values, cache_seqlens=torch.tensor([4]))
    assert explained.function == "decode_attention"
    assert taken == [explained.backend] == ["reference"]


def test_explaining_checks_as_the_call_does():
    q, k, v = qkv()
    cu = torch.tensor([0, 5])
    for options, message in (
        ({}, "pass enable_gqa=True"),
        ({"enable_gqa": True, "backend": "tilde"}, "backend: expected one of"),
        ({"cu_seqlens_q": cu}, "cu_seqlens_k: expected the starts"),
        ({"cu_seqlens_q": cu, "cu_seqlens_k": cu, "decode": True}, "have no cache"),
        ({"decode": True, "enable_gqa": False}, "heads"),
        ({"decode": True, "attn_mask": q}, "attn_mask: packed sequences and decoding"),
        ({"decode": True, "backend": "tiled"}, "for decoding"),
        ({"decode": True, "dropout_p": 0.1}, "dropout_p: decode_attention has no such argument"),
        ({"decode": True, "causal_alignment": "top_left"}, "causal_alignment: decode_attention"),
        ({"decode": True, "max_seqlen_q": 3}, "max_seqlen_q: decode_attention"),
        ({"enable_gqa": True, "max_seqlen_k": 3}, "max_seqlen_k: only packed sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            softpick.explain_backend(q, k, v, **options)
    for options, error in (
        ({"enable_gqa": True, "is_causal": "no"}, TypeError),
        ({"enable_gqa": True, "return_stats": 1}, TypeError),
        ({"enable_gqa": True, "backend": "sdpa"}, ValueError),
        ({"enable_gqa": True, "backend": "tiled", "return_weights": True}, ValueError),
        ({"cu_seqlens_q": cu, "cu_seqlens_k": torch.tensor([0, 2, 5])}, ValueError),
        ({"cu_seqlens_q": cu, "cu_seqlens_k": cu, "backend": "sdpa"}, ValueError),
        ({"cache_seqlens": torch.tensor([3]), "is_causal": "no"}, TypeError),
    ):
        packed = "cu_seqlens_q" in options
        tensors = [x[0].transpose(0, 1) for x in (q, k, v)] if packed else (q, k, v)
        run = softpick.varlen_attention if packed else softpick.scaled_dot_product_attention
        run = softpick.decode_attention if "cache_seqlens" in options else run
        with pytest.raises(error) as expected:
            run(*tensors, **options)
        with pytest.raises(error) as found:
            softpick.explain_backend(*tensors, **options)
        assert str(found.value) == str(expected.value)


def test_wrong_names_give_the_list(monkeypatch):
    for arguments, message in (
        ({"backend": "hopper"}, "backend: expected one of auto, triton, tiled, reference; got 'hopper'"),
        ({"without": "tiled"}, "without: expected names of hopper, decode, triton; got 'tiled'"),
    ):
        with pytest.raises(ValueError, match=message), softpick.use_backend(**arguments):
            pass
    with pytest.raises(TypeError, match="without: expected a name, got int"), softpick.use_backend(without=(3,)):
        pass
    for text in ("hoper", "auto,+hopper", "tiled,reference", "-tiled"):
        monkeypatch.setattr(switch, "_ENVIRONMENT", text)
        with pytest.raises(ValueError, match="SOFTPICK_BACKEND: expected"):
            softpick.scaled_dot_product_attention(*qkv(hkv=4))


def test_the_environment_is_the_outermost_block(monkeypatch, taken):
    monkeypatch.setattr(switch, "_ENVIRONMENT", "reference,-hopper")
    softpick.scaled_dot_product_attention(*qkv(hkv=4))
    with softpick.use_backend(without="decode"):
        assert str(switch.active()) == "reference,-decode,-hopper"
        with softpick.use_backend("tiled"):
            softpick.scaled_dot_product_attention(*qkv(hkv=4))
            assert str(switch.active()) == "tiled,-decode,-hopper"
    assert taken == ["reference", "tiled"]
    assert not switch.TRACED


def test_threads_have_switches_of_their_own():
    seen, inside, done = [], threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        seen.append(str(switch.active()))
        with softpick.use_backend("tiled"):
            seen.append((str(switch.active()), switch.TRACED))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with softpick.use_backend("reference"):
        inside.set()
        assert done.wait(10)
        assert switch.TRACED == "reference"
    thread.join()
    assert seen == ["auto", ("tiled", "conflict")]


@pytest.mark.parametrize("first", ["outer", "inner"])
def test_blocks_of_threads_may_close_in_any_order(first):
    """Compiled code sees the block that is left, also where two threads have equal ones."""
    opened, ends = {}, {name: threading.Event() for name in ("outer", "inner")}

    def block(name):
        with softpick.use_backend("reference"), softpick.use_backend("tiled"):
            opened[name].set()
            ends[name].wait(10)

    threads = {}
    for name in ends:
        opened[name] = threading.Event()
        threads[name] = threading.Thread(target=block, args=(name,))
        threads[name].start()
        assert opened[name].wait(10)
    for name in (first, *(set(ends) - {first})):
        assert switch.TRACED == "tiled"
        ends[name].set()
        threads[name].join()
    assert not switch.TRACED
    assert not switch._open


@pytest.mark.parametrize(
    ("rule", "kernel"),
    [
        ({}, True),
        ({"backend": "triton"}, True),
        ({"without": ("hopper", "decode")}, True),
        ({"without": "triton"}, False),
        ({"backend": "triton", "without": "triton"}, False),
        ({"backend": "tiled"}, False),
        ({"backend": "reference"}, False),
    ],
    ids=str,
)
def test_the_switch_holds_for_softpick_over_rows(rule, kernel, monkeypatch):
    monkeypatch.setattr(vector, "_on_gpu", lambda x: True)
    monkeypatch.setattr(vector, "HAS_TRITON", True)
    monkeypatch.setattr(vector, "rows_forward", lambda x, eps, backend: (torch.zeros_like(x), None))
    with softpick.use_backend(**rule):
        assert bool((softpick.softpick(torch.ones(2, 3)) == 0).all()) == kernel


def test_compiled_code_sees_the_switch():
    """A graph with the operator for the tiles, another without for the reference; neither is taken for the other."""
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(softpick.scaled_dot_product_attention, fullgraph=True, backend=keep)
    tensors = qkv(hkv=4)
    want = compiled(*tensors)
    with softpick.use_backend("reference"):
        torch.testing.assert_close(compiled(*tensors), want)
    compiled(*tensors)
    assert ["softpick.attention_forward" in graph for graph in graphs] == [True, False]


# Every answer is a sentence

_NAMES = {*inspect.signature(softpick.explain_backend).parameters, "x"}
WALKED = {
    **CALLS,
    "mask": {**PLAIN, "attn_mask": (1, 1, 5, 5)},
    "softmax with a softcap": {**PLAIN, "normalizer": "softmax", "softcap": 30.0},
    "softmax with eps": {**PLAIN, "normalizer": "softmax", "eps": 0.1},
    "softmax with a mask": {**PLAIN, "normalizer": "softmax", "attn_mask": (1, 1, 5, 5), "is_causal": True},
    "softmax with statistics": {**PLAIN, "normalizer": "softmax", "return_stats": True},
    "a base of one's own": {**PLAIN, "normalizer": softpick.Normalizer("relu", base="linear", rectify="positive")},
    "packed": {"cu_seqlens_q": (0, 2, 5), "cu_seqlens_k": (0, 2, 5)},
    "cache": {"cache_seqlens": (4,)},
    "cache in pages": {"block_table": (1, 0), "cache_seqlens": (9,)},
    "cache with bounds": {"key_bounds": True},
    "cache without lengths": {"decode": True},
    "learned sink": {**PLAIN, "normalizer": "learned_sink", "sink": (4,)},
}


def walked(call, device, d, dtype, trained):
    """Tensors and options of a call on a device, which has no numbers where it is not the CPU."""
    options = dict(WALKED[call])
    for name in ("attn_mask", "sink"):
        if name in options:
            options[name] = torch.zeros(
                options[name], device=device, dtype=torch.bool if name == "attn_mask" else dtype
            )
    for name in ("cu_seqlens_q", "cu_seqlens_k", "cache_seqlens"):
        if name in options:
            options[name] = torch.tensor(options[name], dtype=torch.int32, device=device)
    shapes = [(1, 4, 5, d), (1, 2, 5, d), (1, 2, 5, d)]
    if "cu_seqlens_q" in options:
        shapes = [(5, 4, d), (5, 2, d), (5, 2, d)]
    elif "block_table" in options:
        options["block_table"] = torch.tensor([options["block_table"]], dtype=torch.int32, device=device)
        shapes = [(1, 4, 1, d), (2, 16, 2, d), (2, 16, 2, d)]
    elif "cache_seqlens" in options or "key_bounds" in options or "decode" in options:
        shapes[0] = (1, 4, 1, d)
    tensors = [torch.zeros(shape, device=device, dtype=dtype, requires_grad=trained) for shape in shapes]
    if "key_bounds" in options:
        options["key_bounds"] = softpick.key_bounds(tensors[1].detach())
    return tensors, options


@pytest.mark.parametrize(
    ("d", "dtype"), [(64, torch.bfloat16), (8, torch.float32), (300, torch.float16), (16, torch.float64)]
)
@pytest.mark.parametrize(
    ("device", "trained"),  # views of fake CUDA tensors that need a gradient abort a torch that was built for CPUs
    [("cpu", False), ("cpu", True), ("meta", False), ("meta", True), ("cuda", False)],
)
@pytest.mark.parametrize("call", WALKED)
def test_every_answer_is_a_sentence(call, device, d, dtype, trained, monkeypatch):
    """Backends, devices (a fake GPU too), dtypes, gradients, GPUs of every kind: reasons with an argument and what it is."""
    if (call, device) == ("cache with bounds", "cuda") and not torch.cuda.is_available():
        pytest.skip("a torch that was built for CPUs cannot index fake CUDA tensors, and bounds are computed by that")
    answers = 0
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        tensors, options = walked(call, device, d, dtype, trained)
        for backend, capability in itertools.product(BACKENDS, [None, 8, 9]):
            with monkeypatch.context() as patch:
                if HAS_TRITON:
                    _as_on(patch, capability)
                try:
                    found = softpick.explain_backend(*tensors, **(options | {"backend": backend}))
                except ValueError as refusal:
                    found, refused = None, str(refusal)
            if found is None:
                assert _sentence(refused), refused
                continue
            answers += 1
            assert found.backend in BACKENDS[1:]
            assert bool(found.kernels) == (found.backend == "triton")
            reasons = [reason for _, reason in found.refused] + [
                k.refused for k in found.kernels if k.refused is not None
            ]
            assert all(map(_sentence, reasons)), reasons
    assert answers or (trained and "cache" in call) or d > 256


def _as_on(patch, capability):
    """A GPU of a compute capability; None: as it is here, where Triton does not interpret kernels."""
    from softpick.ops.triton import dispatch, tuning

    if capability is None:
        patch.setattr(triton_knobs().runtime, "interpret", False)
        return
    patch.setattr(dispatch, "capability", lambda x: capability)
    patch.setattr(dispatch, "hopper", object())
    patch.setattr(dispatch, "_no_hopper", None)
    for name in ("FEWEST_SCORES", "FEWEST_FORWARD", "FEWEST_CACHED"):
        patch.setattr(tuning, name, 20)


def triton_knobs():
    import triton

    return triton.knobs


def _sentence(text):
    """Whether a reason names an argument (or the switch, or what is installed) and says more than that, without braces."""
    head = re.match(r"[a-z_, ]+?(?=:| is )", text)
    named = {name for name in re.findall(r"[a-z_]+", head[0]) if name in _NAMES} if head else set()
    known = named or re.search(r"softpick\.use_backend|SOFTPICK_BACKEND|Triton|derivative", text)
    return bool(known) and len(text.split()) > 3 and not set("{}") & set(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"softcap": 30.0}, "softcap: torch's kernels have none, got 30"),
        ({"eps": 0.25}, "eps: torch's kernels add none to the denominator, got 0.25"),
        ({"window": 2}, "window: torch's kernels have none, got 1 keys before and 1 after"),
        ({"is_causal": True, "attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "attn_mask: torch documents"),
        ({"is_causal": True, "causal_alignment": "bottom_right"}, "got 'bottom_right' with 5 queries and 7 keys"),
        ({"return_weights": True}, "return_weights: torch's kernels have no such argument"),
        ({"return_stats": True}, "return_stats: torch's kernels have no such argument"),
        ({"backend": "reference"}, "backend: the call names 'reference'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_torchs_kernels_lack_is_named(options, said):
    q, k, v = qkv(hkv=4, tk=5 if "attn_mask" in options else 7)
    found = softpick.explain_backend(q, k, v, normalizer="softmax", **options)
    assert said in dict(found.refused)["sdpa"]
    with softpick.use_backend("tiled"):
        found = softpick.explain_backend(q, q, q, normalizer="softmax")
    assert dict(found.refused)["sdpa"] == "softpick.use_backend names 'tiled'"


# On GPUs that are not there

triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture
def hopper(monkeypatch):
    """Hopper kernels as they would be chosen, for tensors on the CPU; sizes count from 1."""
    from softpick.ops.triton import dispatch, tuning

    monkeypatch.setattr(dispatch, "capability", lambda x: 9)
    monkeypatch.setattr(dispatch, "hopper", object())
    monkeypatch.setattr(dispatch, "_no_hopper", None)
    monkeypatch.setattr(tuning, "multiprocessors", lambda index: 132)
    for name in ("FEWEST_SCORES", "FEWEST_FORWARD", "FEWEST_CACHED"):
        monkeypatch.setattr(tuning, name, 1)
    return dispatch


def spec(name="softpick", **more):
    norm = NORMALIZERS[name]
    return AttentionSpec(norm, 0.125, norm.eps)._replace(**more)


def forward(dispatch, d=64, made=None, packed=False, stats=False, mask=None, **more):
    q, k, v = made or qkv(d=d, tq=16, tk=16, dtype=torch.bfloat16)
    longest = q.shape[2], k.shape[2]
    found = dispatch.forward_kernel(spec(**more), q, k, v, mask, packed, stats, None, longest)
    return found._replace(reason=dispatch.sentence(found, spec(**more), q, k, v, mask, longest))


@triton
def test_kernels_for_hopper_are_chosen(hopper):
    assert forward(hopper) == ("hopper/forward_narrow.py", None)
    assert forward(hopper, d=96) == ("hopper/forward.py", None)
    assert forward(hopper, softcap=30.0) == ("hopper/forward_narrow.py", None)
    q, k, v = qkv(d=64, tq=16, tk=16, dtype=torch.bfloat16)
    assert hopper.backward_kernel(spec(), q, k, v, None, False, False, None) == ("hopper/backward.py", None)
    assert hopper.decode_kernel(spec(), q[:, :, :1], k, v, None, 0, 32) == ("hopper/decode.py", None)
    assert hopper.decode_kernel(spec("linear_softpick"), q[:, :, :1], k, v, None, 64, 32).hopper
    x = torch.zeros(2, 20000, dtype=torch.bfloat16)
    assert hopper.rows_kernel("forward", x, (), frozenset()) == ("hopper/rows.py", None)


@triton
def test_fp16_has_the_kernels_for_hopper(hopper):
    half = qkv(d=64, tq=16, tk=16, dtype=torch.float16)
    assert forward(hopper, made=half) == ("hopper/forward_narrow.py", None)
    assert hopper.backward_kernel(spec(), *half, None, False, False, None) == ("hopper/backward.py", None)
    mixed = half[0], half[1], half[2].bfloat16()
    assert "tensor memory accelerator" in forward(hopper, made=mixed).reason
    assert "running maximum" in forward(hopper, made=half, eps=1.0).reason
    assert "dtype" in hopper.decode_kernel(spec(), half[0][:, :, :1], *half[1:], None, 0, 32).reason


@triton
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"packed": True}, "cu_seqlens_q: these kernels take no packed"),
        ({"stats": True}, "return_stats: these kernels return none, got True"),
        ({"eps": 0.5}, "torch.bfloat16, softpick and 0.5 need a running maximum"),
        ({"name": "linear_softpick"}, "linear_softpick and 0 need a running maximum"),
        ({"made": qkv(tq=16, tk=16, d=64)}, "torch.float32, softpick and 1e-06 need a running maximum"),
        ({"scale": -1.5}, "scale: expected a number above 0, got -1.5"),
        ({"mask": torch.ones(1, 1, 16, 16)}, "attn_mask: these kernels take none, got (1, 1, 16, 16)"),
        ({"left": 4}, "window: these kernels have none, got 4 keys before"),
        (
            {"softcap": 30.0, "made": qkv(tq=16, tk=16, d=64, dtype=torch.float16)},
            "softcap: the fast tanh is not precise enough for torch.float16, got 30",
        ),
        ({"dropout_p": 0.1}, "dropout_p: these kernels have no dropout, got 0.1"),
        ({"d": 32}, "head dimensions from 33 to 64, or from 65 to 128, got 32 and 32"),
        ({"d": 256}, "got 256 and 256"),
        ({"without": frozenset({"hopper"})}, "'hopper' is left out"),
        (
            {"made": [x[..., 1:] for x in qkv(tq=16, tk=16, d=65, dtype=torch.bfloat16)]},
            "key (2080, 1040, 65, 1), value (2080, 1040, 65, 1)",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_reason_for_every_refusal(hopper, arguments, reason):
    found = forward(hopper, **arguments)
    assert found.kernel == "forward.py"
    assert reason in found.reason


@triton
def test_other_gpus_versions_and_sizes_are_reasons(hopper, monkeypatch):
    from softpick.ops.triton import tuning

    monkeypatch.setattr(tuning, "FEWEST_SCORES", 2**40)
    assert "query, key: 1024 scores; describing tensors to the GPU pays from 1099511627776 on" in forward(hopper).reason
    monkeypatch.setattr(tuning, "FEWEST_FORWARD", 2**40)
    assert "query, key: 1024 scores; a second launch pays from 1099511627776 on" in forward(hopper).reason
    monkeypatch.undo()
    if not hopper.interpreted():
        return
    assert "Hopper" in forward(hopper).reason or "second launch" in forward(hopper).reason
    monkeypatch.setattr(hopper, "capability", lambda x: 9)
    monkeypatch.setattr(hopper, "hopper", None)
    x = torch.zeros(2, 20000, dtype=torch.bfloat16)
    assert "cannot load" in hopper.rows_kernel("forward", x, (), frozenset()).reason
    assert "16 bytes" in _rows(hopper, monkeypatch, torch.zeros(2, 20001, dtype=torch.bfloat16))
    assert "same time" in _rows(hopper, monkeypatch, torch.zeros(1, 2**24, dtype=torch.bfloat16))
    assert "short enough" in _rows(hopper, monkeypatch, torch.zeros(2, 64))
    assert "left out" in hopper.rows_kernel("forward", x, (), frozenset({"hopper"})).reason


@triton
@pytest.mark.parametrize("wider", ["neither", "query", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_so_many_rows_as_fit_into_shared_memory_are_decoded(hopper, dtype, wider):
    """128 rows of 256 numbers in fp32 take 152 KiB of shared memory, and most GPUs have 99."""
    width = {"query": 129 if wider == "query" else 128, "value": 129 if wider == "value" else 128}
    most = 64 if dtype == torch.float32 and wider != "neither" else 128
    for rows in (most, most + 8):
        q, k = (torch.zeros(1, heads, 8, width["query"], dtype=dtype) for heads in (rows // 8, 1))
        v = torch.zeros(1, 1, 8, width["value"], dtype=dtype)
        found = softpick.explain_backend(q, k, v, enable_gqa=True, backend="triton")
        assert ("decode.py" in found.kernels[0].file) == (rows <= most)
        if rows > most:
            with pytest.raises(ValueError, match=f"query: expected at most {most} rows .* got {rows}"):
                softpick.explain_backend(q, k, v, decode=True, backend="triton")
        else:
            assert "decode.py" in softpick.explain_backend(q, k, v, decode=True, backend="triton").kernels[0].file


@triton
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"made": qkv(d=64, tk=16)}, "query: expected torch.bfloat16, got torch.float32"),
        ({"keys": 0}, "key: 0 keys of all heads; describing the cache to the GPU pays from 1 on"),
        ({"made": qkv(h=4, hkv=1, tq=9, d=64, dtype=torch.bfloat16)}, "query: expected at most 32 rows (queries"),
        ({"made": qkv(h=4, hkv=1, tq=9, d=64, dtype=torch.bfloat16)}, "got 36"),
        ({"mask": torch.ones(1, 1, 1, 16)}, "attn_mask: these kernels take none, got (1, 1, 1, 16)"),
        ({"eps": 0.5}, "eps: expected at most 1e-05, got 0.5"),
        (
            {"made": qkv(d=200, dtype=torch.bfloat16)},
            "key, value: expected head dimensions from 33 to 128, got 200 and 200",
        ),
        ({"page": 48}, "block_table: expected pages of a multiple of 64 positions, got 48"),
        ({"listed": True}, "key_bounds: only decode.py"),
        ({"without": frozenset({"hopper"})}, "'hopper' is left out"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_reason_for_every_refusal_in_decoding(hopper, arguments, reason):
    more = {"made": qkv(tq=1, tk=16, d=64, dtype=torch.bfloat16), "mask": None, "page": 0, "keys": 64, "listed": False}
    more |= arguments
    made, mask, page, keys, listed = (more.pop(name) for name in ("made", "mask", "page", "keys", "listed"))
    found = hopper.decode_kernel(spec(**more), *made, mask, page, keys, listed)
    assert found.kernel == "decode.py"
    assert reason in hopper.sentence(found, spec(**more), *made, mask, page=page, keys=keys)


def _rows(dispatch, monkeypatch, x):
    from softpick.ops.triton import tuning

    monkeypatch.setattr(dispatch, "hopper", object())
    monkeypatch.setattr(tuning, "multiprocessors", lambda index: 132)
    return dispatch.rows_kernel("forward", x, (), frozenset()).reason


@triton
@pytest.mark.parametrize("without", [frozenset(), frozenset({"hopper"})], ids=["all", "-hopper"])
def test_launches_follow_the_choice(hopper, without, monkeypatch):
    from softpick.ops.triton import kernel_cache, launch

    ran = []
    monkeypatch.setattr(launch, "_forward_for_hopper", lambda *_: ran.append("forward") or True)
    monkeypatch.setattr(launch, "_backward_for_hopper", lambda *_: ran.append("backward") or True)
    monkeypatch.setattr(kernel_cache, "run", lambda kernel, *_, **__: None)
    q, k, v = qkv(d=64, tq=16, tk=16, hkv=4, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    call = spec(without=without)
    launch.forward(call, q, k, v, None, None, None, None, None, 0, out, lse, None, None)
    launch.backward(call, q, k, v, None, None, None, None, None, 0, 0, out, lse, out, q, k, v, None)
    assert ran == ([] if without else ["forward", "backward"])


@triton
def test_kernels_of_a_call_are_explained(hopper):
    """``backend="triton"`` is taken for tensors on the CPU where Triton's interpreter runs."""
    q, k, v = (x.requires_grad_() for x in qkv(d=64, tq=32, tk=32, dtype=torch.bfloat16))
    explained = softpick.explain_backend(q, k, v, enable_gqa=True, backend="triton")
    assert [tuple(kernel) for kernel in explained.kernels] == [
        ("forward", "hopper/forward_narrow.py", None),
        ("backward", "hopper/backward.py", None),
    ]
    with torch.no_grad():
        few = softpick.explain_backend(q[:, :, :2], k, v, enable_gqa=True, backend="triton")
        assert [kernel.file for kernel in few.kernels] == ["hopper/decode.py"]
        with softpick.use_backend(without=("hopper", "decode")):
            few = softpick.explain_backend(q[:, :, :2], k, v, enable_gqa=True, backend="triton")
        assert [kernel.file for kernel in few.kernels] == ["forward.py"]
        assert "left out by softpick.use_backend" in str(few)
        assert "switch: auto,-decode,-hopper" in str(few)
        cache = softpick.explain_backend(q[:, :, :2], k, v, decode=True, backend="triton")
        assert [kernel.file for kernel in cache.kernels] == ["hopper/decode.py"]
    cu = torch.tensor([0, 7, 32])
    packed = (x[0].transpose(0, 1) for x in (q, k, v))
    explained = softpick.explain_backend(
        *packed, cu_seqlens_q=cu, cu_seqlens_k=cu, backend="triton", normalizer="softmax"
    )
    assert [(kernel.file, kernel.refused) for kernel in explained.kernels] == [
        ("forward.py", "cu_seqlens_q: these kernels take no packed sequences"),
        ("backward.py", "cu_seqlens_q: these kernels take no packed sequences"),
    ]
