"""A kernel that cannot be built: another takes its place with one warning; a named backend raises if none is left."""

import sys
import warnings

import pytest
import torch
import torch.distributed as dist

import softpick
from softpick import distributed, functional
from softpick.ops import backends, calling, calls, kernel_errors, vector
from softpick.ops.kernel_errors import KernelError

pytest.importorskip("triton")
if not calling.interpreted():
    pytest.skip("the kernels run on the GPU here", allow_module_level=True)

from softpick.ops.triton import dispatch, kernel_cache, launch, launch_decode, launch_rows, tuning


class Broken:
    """A kernel whose compiler raises what no one expects."""

    __name__ = "broken"
    pre_run_hooks = ()

    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        def start(*args, **constants):
            raise self.error

        return start


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch):
    monkeypatch.setattr(kernel_errors, "_warned", set())
    monkeypatch.setattr(kernel_cache, "_failed", {})


@pytest.fixture
def tensors():
    return [torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3)]


def automatic(monkeypatch):
    """``backend="auto"`` as on a GPU."""

    def chosen(backend, *_, **__):
        return "triton" if backend == "auto" else backend

    monkeypatch.setattr(functional, "choose_backend", chosen)
    monkeypatch.setattr(calls, "find_backend", lambda *args, **options: backends.Backend(chosen(*args, **options)))


ERRORS = [
    RuntimeError("PassManager::run failed"),
    AttributeError("no thread_barrier"),
    SystemError("out of resource: shared"),
]


class CompilerError(Exception):
    """As Triton's: where in the kernel, its source, and the reason at the end."""

    error_message = "no thread_barrier"

    def __str__(self):
        return f"at 36:9:\n    source of the kernel\n    ^\n{self.error_message}"


def test_the_reason_of_a_compiler_is_said():
    with pytest.raises(KernelError, match=r"^broken could not .*\(CompilerError: no thread_barrier; Triton"):
        kernel_cache.run(Broken(CompilerError()), (1,))


@pytest.mark.thinned
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    "kernel", ["attention_forward", "row_statistics", "attention_backward_keys", "attention_backward_queries"]
)
def test_training_goes_on_with_tiles(kernel, error, tensors, monkeypatch):
    automatic(monkeypatch)
    monkeypatch.setattr(launch, kernel, Broken(error))
    want = softpick.scaled_dot_product_attention(*tensors, is_causal=True, backend="tiled")
    grad = torch.randn_like(want)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):  # the second time nothing is warned about, and the compiler is not asked
            got = softpick.scaled_dot_product_attention(*tensors, is_causal=True)
            grads = torch.autograd.grad(got, tensors, grad)
    (warning,) = [str(w.message) for w in seen if "broken could not be built" in str(w.message)]
    assert str(error) in warning
    torch.testing.assert_close(got, want)
    for one, other in zip(grads, torch.autograd.grad(want, tensors, grad), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    def named():
        out = softpick.scaled_dot_product_attention(*tensors, is_causal=True, backend="triton")
        return torch.autograd.grad(out, tensors, grad)

    with pytest.raises(KernelError, match="could not be built"):
        named()


@pytest.mark.parametrize("named", ["auto", "triton"])
def test_a_kernel_for_hopper_leaves_its_place_to_the_portable_one(named, tensors, monkeypatch):
    """Also for a backend that is named: it is Triton's kernel still."""
    automatic(monkeypatch)
    want = softpick.scaled_dot_product_attention(*tensors, is_causal=True, backend="triton")
    grad = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, tensors, grad)

    def for_hopper(*args):
        kernel_cache.run(Broken(RuntimeError("for Hopper")), (1,), *args[2:5])  # raises KernelError

    monkeypatch.setattr(tuning, "FEWEST_FORWARD", 0)
    monkeypatch.setattr(dispatch, "optimistic", lambda *_: True)
    monkeypatch.setattr(dispatch, "hopper_refuses", lambda *_: None)
    for name in ("_forward_for_hopper", "_backward_for_hopper"):
        monkeypatch.setattr(launch, name, for_hopper)

    def both():
        out = softpick.scaled_dot_product_attention(*tensors, is_causal=True, backend=named)
        return out, torch.autograd.grad(out, tensors, grad)

    with pytest.warns(UserWarning, match="the Triton kernels for every GPU take its place"):
        got, grads = both()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for one, other in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_decoding_and_rows_go_on(tensors, monkeypatch):
    automatic(monkeypatch)
    q, k, v = (x.detach() for x in tensors)
    want = softpick.decode_attention(q[:, :, :1], k, v, backend="reference")
    monkeypatch.setattr(launch_decode, "decode_split", Broken(RuntimeError("decode")))
    with pytest.warns(UserWarning, match="broken could not be built"):
        got = softpick.decode_attention(q[:, :, :1], k, v)
    torch.testing.assert_close(got, want)
    monkeypatch.setattr(vector, "_on_gpu", lambda x: True)
    x = torch.randn(3, 7, requires_grad=True)
    truth = x.detach().double().requires_grad_()
    for name in ("rows_forward", "rows_backward"):
        monkeypatch.setattr(launch_rows, name, Broken(RuntimeError(name)))
    with pytest.warns(UserWarning, match="torch computes softpick over rows instead"):
        y = softpick.softpick(x)
    with pytest.warns(UserWarning, match="torch computes the gradient of softpick over rows instead"):
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y) * torch.arange(7))
    expected = softpick.softpick(truth)
    torch.testing.assert_close(y, expected.float())
    weights = torch.ones_like(truth) * torch.arange(7)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, truth, weights)[0].float())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", ["one query", "one query, masked", "cache", "lengths", "pages", "bounds"])
def test_decoding_goes_on(way, compiled, tensors, monkeypatch):
    """Also in a graph, which is made before the kernel is."""
    automatic(monkeypatch)
    q, k, v = (x.detach() for x in tensors)
    q, lengths = q[:, :, :1], torch.tensor([7])
    mask = torch.rand(1, 1, 1, 9) < 0.7
    table = torch.tensor([[1, 0, 2]], dtype=torch.int32)
    pages = [torch.randn(3, 4, 2, 8) for _ in range(2)]
    bounds = softpick.key_bounds(k, block_size=16)

    def call(backend="auto"):
        if way.startswith("one query"):
            seen = mask if way.endswith("masked") else None
            return softpick.scaled_dot_product_attention(q, k, v, seen, backend=backend)
        if way == "pages":
            return softpick.decode_attention(q, *pages, cache_seqlens=lengths, block_table=table, backend=backend)
        given = {"cache_seqlens": lengths} if way == "lengths" else {}
        if way == "bounds":
            given = {"key_bounds": bounds, "max_error": 1e-3}
        return softpick.decode_attention(q, k, v, backend=backend, **given)

    want = call("reference")
    monkeypatch.setattr(launch_decode, "decode_split", Broken(RuntimeError("decode")))
    run = torch.compile(call, backend="aot_eager") if compiled else call
    with torch.no_grad(), pytest.warns(UserWarning, match="broken could not be built"):
        got = run()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with softpick.use_backend("triton"), pytest.raises(KernelError):
        call()


@pytest.mark.parametrize("module", ["launch", "launch_decode", "launch_rows"])
def test_kernels_that_cannot_be_imported(module, tensors, monkeypatch):
    """A Triton of another version lacks a name that a module of kernels uses."""
    q, k, v = tensors
    calls_of = {
        "launch": lambda: torch.autograd.grad(softpick.scaled_dot_product_attention(q, k, v).sum(), q)[0],
        "launch_decode": lambda: softpick.decode_attention(*(x.detach() for x in (q[:, :, :1], k, v))),
        "launch_rows": lambda: torch.autograd.grad(softpick.softpick(q).square().sum(), q)[0],
    }
    want = calls_of[module]()
    automatic(monkeypatch)
    monkeypatch.setattr(vector, "_on_gpu", lambda x: True)
    monkeypatch.delattr(softpick.ops.triton, module)
    monkeypatch.setitem(sys.modules, f"softpick.ops.triton.{module}", None)  # an ImportError
    with pytest.warns(UserWarning, match="a module of kernels could not be"):
        got = calls_of[module]()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["attention_forward", "attention_backward_keys"])
def test_a_ring_goes_on_with_tiles(kernel, tensors, monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        want = softpick.scaled_dot_product_attention(*tensors, backend="tiled")
        grad = torch.randn_like(want)
        monkeypatch.setattr(distributed, "choose_backend", lambda *_: "triton")
        monkeypatch.setattr(launch, kernel, Broken(RuntimeError("for the ring")))

        def both(backend):
            out = distributed.ring_attention(*tensors, backend=backend)
            return out, *torch.autograd.grad(out, tensors, grad)

        with pytest.warns(UserWarning, match="for the ring.*tiles of torch"):
            got = both("auto")
        for one, other in zip(got, (want, *torch.autograd.grad(want, tensors, grad)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        with pytest.raises(KernelError, match="for the ring"):
            both("triton")
    finally:
        dist.destroy_process_group()


def test_memory_that_has_run_out_is_no_failure_of_a_kernel(tensors, monkeypatch):
    automatic(monkeypatch)
    monkeypatch.setattr(launch, "attention_forward", Broken(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        softpick.scaled_dot_product_attention(*tensors)
