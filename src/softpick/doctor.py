"""What is installed, which kernels typical calls take, and whether each is right: ``softpick doctor``.

Results are compared with formulas in fp64 that stand here and share no code with the backends.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softpick.experiment.environment import device_line, hardware, versions
from softpick.explain import Explanation, explain_backend, explain_rows
from softpick.functional import decode_attention, scaled_dot_product_attention, softpick, varlen_attention
from softpick.ops import switch
from softpick.ops.calling import HAS_TRITON
from softpick.ops.key_bounds import key_bounds

__all__ = ["Check", "Report", "examine", "run_share"]

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative error ``|x - truth| / |truth|`` of outputs and gradients; several times what rounding gives."""


def finite(value: Any) -> Any:
    """A value as JSON has it, where NaN and infinity are no numbers: their names."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Check:
    """A typical call: what it takes and how far it is from the truth."""

    name: str
    dtype: str
    shape: str
    backend: str = ""
    kernels: list[str] = field(default_factory=list)
    """Files of the kernels; empty where torch computes."""
    reasons: list[str] = field(default_factory=list)
    """Why faster ones are not taken."""
    forward_error: float | None = None
    backward_error: float | None = None
    limit: float = 0.0
    milliseconds: float | None = None
    """Of forward and backward pass together, the second time."""
    problem: str | None = None
    """What is wrong; None if nothing is."""


@dataclass
class Report:
    """What :func:`examine` found."""

    versions: str
    hardware: str
    device: str
    support: list[str]
    checks: list[Check]

    @property
    def fine(self) -> bool:
        """Whether every check passed."""
        return all(check.problem is None for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {"fine": self.fine, **finite(asdict(self))}

    def __str__(self) -> str:
        return f"{device_line(self.device)}\n{self.findings()}"

    def findings(self) -> str:
        """What is behind the line with the device."""
        lines = [self.versions, *self.support, ""]
        for check in self.checks:
            lines.append(f"{'ok   ' if check.problem is None else 'WRONG'} {check.name}, {check.dtype}, {check.shape}")
            lines.append(f"      {check.backend}{': ' if check.kernels else ''}{', '.join(check.kernels)}")
            lines += [f"      {reason}" for reason in check.reasons]
            errors = [("forward", check.forward_error), ("backward", check.backward_error)]
            said = ", ".join(f"{name} {error:.1e}" for name, error in errors if error is not None)
            if said and check.milliseconds is not None:
                lines.append(f"      error {said} (limit {check.limit:.0e}), {check.milliseconds:.1f} ms")
            if check.problem is not None:
                lines.append(f"      {check.problem}")
        wrong = sum(check.problem is not None for check in self.checks)
        lines += [
            "",
            f"{len(self.checks)} calls, all right" if not wrong else f"{wrong} of {len(self.checks)} calls are wrong",
        ]
        return "\n".join(lines)


@dataclass
class _Call:
    """Arguments of a typical call."""

    name: str
    shape: tuple[int, ...]
    """Batch, heads, key heads, queries, keys, head dimension; of ``rows``: rows and their length."""
    dtype: torch.dtype
    kind: str = "attention"
    normalizer: str = "softpick"
    window: int | None = None
    causal: bool = True
    reserve: bool = False
    """Whether the call runs only on a device where it takes a kernel that no call before it takes."""

    @property
    def size(self) -> str:
        """The shape for people."""
        if self.kind == "rows":
            return "{} rows of {}".format(*self.shape)
        return "{} x {}/{} heads x {}/{} x {}".format(*self.shape)


def _calls(device: str) -> list[_Call]:
    """Typical calls in the dtypes that this device computes in, and reserves for kernels that these do not take."""
    low = torch.bfloat16
    long = 2048 if device.startswith("cuda") else 192
    cache = 8192 if device.startswith("cuda") else 1024
    rows = 256 if device.startswith("cuda") else 16
    calls = [
        _Call("training", (2, 8, 8, long, long, 64), low),
        _Call("training", (2, 8, 8, long, long, 64), torch.float32),
        _Call("training, grouped heads", (1, 8, 2, long, long, 128), low),
        _Call("training, softmax", (2, 8, 8, long, long, 64), low, normalizer="softmax"),
        _Call("training, sliding window", (1, 8, 8, long, long, 64), low, window=48),
        _Call("encoder", (2, 8, 8, long, long, 64), low, causal=False),
        _Call("packed sequences", (1, 8, 8, long, long, 64), low, "packed"),
        _Call("packed sequences", (1, 8, 8, long, long, 64), torch.float32, "packed"),
        _Call("prompt against a cache", (1, 8, 2, long // 2, long, 128), low),
        _Call("decoding", (4, 8, 2, 1, cache, 128), low, "decode"),
        _Call("decoding", (4, 8, 2, 1, cache, 64), torch.float32, "decode"),
        _Call("decoding, pages", (4, 8, 2, 1, cache, 128), low, "paged"),
        _Call("decoding, bounds of keys", (4, 8, 2, 1, cache, 128), low, "listed"),
        _Call("softpick over rows", (rows, 1024), low, "rows"),
    ]
    if device.startswith("cuda"):
        calls += [
            _Call("training", (2, 8, 8, long, long, 64), torch.float16),
            _Call("softpick over rows", (rows, 131072), low, "rows"),
            _Call("training, long sequences", (1, 2, 2, 16384, 16384, 64), low, reserve=True),
            _Call("training, long sequences", (1, 2, 2, 16384, 16384, 128), low, reserve=True),
        ]
    return calls


class _Ready(NamedTuple):
    """A call that will run: its tensors, the public function and its options, and what is known before it runs."""

    call: _Call
    leaves: list[Tensor]
    function: Callable[..., Any]
    options: dict[str, Any]
    explained: Explanation

    @property
    def trained(self) -> bool:
        """Whether there are gradients to compare."""
        return self.call.kind in ("attention", "packed", "rows")


def _prepare(call: _Call, device: str) -> _Ready:
    """Draw the tensors of a call, and ask which kernels take it."""
    tensors, function, options = _arguments(call, device)
    trained = call.kind in ("attention", "packed", "rows")
    leaves = [x.detach().requires_grad_(trained) for x in tensors]
    explain: Any = explain_rows if call.kind == "rows" else explain_backend
    given = options if trained else {**options, "decode": True}
    return _Ready(call, leaves, function, options, explain(*leaves, **given))


def _chosen(device: str) -> Iterator[tuple[_Call, _Ready | Exception]]:
    """The calls that run on a device, each with its tensors: a reserve only where the dispatcher has a new kernel for it."""
    met: set[str] = set()
    for call in _calls(device):
        try:
            ready = _prepare(call, device)
        except Exception as error:  # whatever comes is what the report is for
            yield call, error
            continue
        files = {kernel.file for kernel in ready.explained.kernels}
        if call.reserve and files <= met:
            continue
        met |= files
        yield call, ready


def examine(device: str = "cpu", progress: Callable[[str], None] = lambda name: None) -> Report:
    """Look at the installation and run typical calls on a device, each compared with fp64.

    Args:
        device: ``cpu``, or a GPU.
        progress: called with the name of each call before it runs.
    """
    report = Report(versions("triton"), hardware(device), device, _support(device), [])
    if device.startswith("cuda") and HAS_TRITON:
        _compile_ahead(device, progress)
    for call, ready in _chosen(device):
        progress(call.name)
        report.checks.append(_check(call, ready, device))
    return report


def _compile_ahead(device: str, progress: Callable[[str], None]) -> None:
    """Run the calls in processes side by side, which leave compiled kernels on disk: one after the other it takes minutes."""
    processes = min(8, (os.cpu_count() or 1) // 2)
    if processes < 2:
        return
    progress(f"all calls in {processes} processes, to compile their kernels")
    code = (
        "import sys; from softpick.doctor import run_share; run_share(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, device, str(share), str(processes)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for share in range(processes)
    ]  # fmt: skip
    try:
        end = time.monotonic() + 120
        for run in runs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(max(0.0, end - time.monotonic()))
    finally:
        for run in runs:  # one that hangs, and all after Ctrl-C
            run.kill()


def run_share(device: str, share: int, of: int) -> None:
    """Run every ``of``-th call of a device, from number ``share`` on, and forget what comes: :func:`examine` runs all again."""
    for number, (_, ready) in enumerate(_chosen(device)):
        if number % of == share and isinstance(ready, _Ready):
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out: Any = ready.function(*ready.leaves, **ready.options)
                if ready.trained:
                    torch.autograd.grad(out, ready.leaves, torch.ones_like(out))


def _support(device: str) -> list[str]:
    """What is there, in sentences."""
    rule = str(switch.active())
    lines = [f"{switch.VARIABLE}: {rule}"]
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        lines.append(f"compute capability: {major}.{minor}")
    if not HAS_TRITON:
        lines.append("Triton: not installed, so there are no GPU kernels")
        return lines
    if not device.startswith("cuda"):
        why = f"and this is {device}" if torch.cuda.is_available() else "and torch finds none"
        lines.append(f"Triton: installed; its kernels need a GPU of CUDA or ROCm, {why}")
        return lines
    from softpick.ops.triton import dispatch

    loaded = dispatch.hopper is not None
    lines.append(f"kernels for Hopper GPUs: {'loaded' if loaded else dispatch.why_no_hopper()}")
    return lines


def _check(call: _Call, ready: _Ready | Exception, device: str) -> Check:
    """Run a call, and put what comes, errors and warnings of kernels too, into a record."""
    check = Check(call.name, str(call.dtype).removeprefix("torch."), call.size, limit=LIMITS[call.dtype])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if isinstance(ready, Exception):
                raise ready
            _run(ready, device, check)
        except Exception as error:  # whatever comes is what the report is for
            check.problem = f"{type(error).__name__}: {error}"
    for warning in said:
        if "could not be built" in str(warning.message) and check.problem is None:
            check.problem = str(warning.message)
    return check


def _run(ready: _Ready, device: str, check: Check) -> None:
    """Run a call, and compare it with the truth."""
    explained, leaves = ready.explained, ready.leaves
    check.backend = explained.backend
    check.kernels = [kernel.file for kernel in explained.kernels]
    check.reasons = [f"not {name!r}: {reason}" for name, reason in explained.refused]
    check.reasons += [f"{k.step}, not for Hopper GPUs: {k.refused}" for k in explained.kernels if k.refused is not None]
    # of the output's shape, which is the first tensor's: value is as wide as query
    grad = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(leaves[0])
    for _ in range(2):
        _wait(device)
        began = time.perf_counter()
        out: Any = ready.function(*leaves, **ready.options)
        grads = torch.autograd.grad(out, leaves, grad) if ready.trained else ()
        _wait(device)
        check.milliseconds = 1000 * (time.perf_counter() - began)
    # Apple's GPUs have no fp64
    exact = [x.detach().to("cpu" if device == "mps" else device).double() for x in (*leaves, grad)]
    want, of = _truth(ready, exact[:-1], exact[-1])
    check.forward_error = _error([out], [want])
    if ready.trained:
        check.backward_error = _error(list(grads), of)
    worst = max(check.forward_error, check.backward_error or 0.0)
    if not worst <= check.limit:  # NaN is not
        check.problem = f"the relative error {worst:.1e} is above {check.limit:.0e}"


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error."""

    def relative(x: Tensor, truth: Tensor) -> float:
        return float((x.detach().to(truth.device).double() - truth).norm() / truth.norm())

    return max(relative(x, y) for x, y in zip(got, want, strict=True))


def _arguments(call: _Call, device: str) -> tuple[list[Tensor], Callable[..., Any], dict[str, Any]]:
    """Tensors, the public function and its options."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, call.dtype)

    def draw_pair(queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Query and key whose scores every dtype computes exactly, and none of which is 0.

        A gradient jumps where a score changes its sign, and among millions of random scores rounding would move one across
        0. Here all numbers are odd multiples of 1/16, but even ones in a column of the key: each score is an odd multiple.
        """
        query, key = ((2 * torch.randn(x, generator=generator).mul(8).floor() + 1) / 16 for x in (queries, keys))
        key[..., -1] -= 1 / 16
        return query.to(device, call.dtype), key.to(device, call.dtype)

    if call.kind == "rows":
        return [draw(*call.shape)], softpick, {}
    b, heads, kv_heads, tq, tk, d = call.shape
    options: dict[str, Any] = {"normalizer": call.normalizer}
    if call.kind == "packed":
        starts = torch.tensor([0, tq // 4, tq // 4 + 5, tq], dtype=torch.int32, device=device)
        options |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "is_causal": call.causal}
        query, key = draw_pair((tq, heads, d), (tk, kv_heads, d))
        return [query, key, draw(tk, kv_heads, d)], varlen_attention, options
    query, key = draw_pair((b, heads, tq, d), (b, kv_heads, tk, d))
    value = draw(b, kv_heads, tk, d)
    if call.kind == "attention":
        options |= {"is_causal": call.causal, "enable_gqa": True, "window": call.window}
        options["causal_alignment"] = "bottom_right"
        return [query, key, value], scaled_dot_product_attention, options
    options["cache_seqlens"] = torch.tensor([tk - 100 * i for i in range(b)], dtype=torch.int32, device=device)
    if call.kind == "paged":
        page = 64
        options["block_table"] = torch.randperm(b * tk // page, generator=generator).view(b, -1).int().to(device)
        key, value = (_paged(x, page, options["block_table"]) for x in (key, value))
    if call.kind == "listed":
        options["key_bounds"] = key_bounds(key, cache_seqlens=options["cache_seqlens"])
    return [query, key, value], decode_attention, options


def _paged(x: Tensor, page: int, table: Tensor) -> Tensor:
    """``(B, H, T, D)`` as pages ``(blocks, page, H, D)``, where ``table`` says."""
    b, h, t, d = x.shape
    pages = x.new_empty(b * t // page, page, h, d)
    pages[table.flatten().long()] = x.transpose(1, 2).reshape(-1, page, h, d)
    return pages


SCORES = 2**24
"""Scores that the formula holds at a time, in fp64: an eighth of a GiB, and as much for each of its steps."""


def _truth(ready: _Ready, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of a call by its formula, in fp64: of some key heads or rows of one after the others."""
    call, out, grads = ready.call, torch.zeros_like(grad), [torch.zeros_like(x) for x in tensors]
    if call.kind == "rows":
        x = tensors[0].requires_grad_()
        y = _weights(x)
        return y.detach(), list(torch.autograd.grad(y, [x], grad))
    if "block_table" in ready.options:
        table = ready.options["block_table"].long().to(out.device)
        tensors[1:] = (x[table].flatten(1, 2).transpose(1, 2) for x in tensors[1:])
        grads[1:] = (torch.zeros_like(x) for x in tensors[1:])
    of_queries, of_keys = [tensors[0], out, grad, grads[0]], [*tensors[1:], *grads[1:]]
    for (query, y, dy, dquery), (key, value, dkey, dvalue) in _sequences(ready, of_queries, of_keys):
        (kv_heads, _, tq, _), tk = query.shape, key.shape[2]
        step = max(1, SCORES // (query.shape[1] * tk))  # rows of a key head
        together = max(1, step // tq)  # key heads
        for head, first in itertools.product(range(0, kv_heads, together), range(0, tq, step)):
            heads = slice(head, head + together)
            rows = heads, slice(None), slice(first, first + step)
            leaves = [x.detach().requires_grad_(ready.trained) for x in (query[rows], key[heads], value[heads])]
            part = _formula(call, leaves[0], leaves[1], leaves[2], tk - tq + first)
            y[rows] = part.detach()
            if ready.trained:
                totals = dquery[rows], dkey[heads], dvalue[heads]
                for total, x in zip(totals, torch.autograd.grad(part, leaves, dy[rows]), strict=True):
                    total += x
    return out, grads


def _sequences(
    ready: _Ready, of_queries: list[Tensor], of_keys: list[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Views ``(Hkv, groups, Tq, D)`` and ``(Hkv, 1, Tk, D)`` of one sequence after the other."""
    if ready.call.kind == "packed":
        starts = ready.options["cu_seqlens_q"].tolist()
        spans = itertools.starmap(slice, itertools.pairwise(starts))
        parts = (tuple([x[span].transpose(0, 1) for x in each] for each in (of_queries, of_keys)) for span in spans)
    else:
        lengths = ready.options.get("cache_seqlens")
        filled = [None] * len(of_keys[0]) if lengths is None else lengths.tolist()
        parts = (([x[i] for x in of_queries], [x[i, :, :n] for x in of_keys]) for i, n in enumerate(filled))
    for queries, keys in parts:
        yield [x.unflatten(0, (len(keys[0]), -1)) for x in queries], [x[:, None] for x in keys]


def _formula(call: _Call, query: Tensor, key: Tensor, value: Tensor, position: int) -> Tensor:
    """``(..., Tq, D)``; the first query stands at ``position`` of the keys."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    tq, tk = scores.shape[-2:]
    behind = torch.arange(tq, device=scores.device)[:, None] + position - torch.arange(tk, device=scores.device)
    seen = torch.ones_like(behind, dtype=torch.bool)
    if call.causal:
        seen &= behind >= 0
    if call.window is not None:
        seen &= behind.abs() < call.window
    if call.normalizer == "softmax":
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value
    return _weights(scores.masked_fill(~seen, 0.0)) @ value  # e^0 - 1 adds nothing


def _weights(scores: Tensor) -> Tensor:
    """Softpick of the last dimension."""
    top = scores.amax(-1, keepdim=True).clamp(min=0.0).detach()
    numerators = scores.exp() - 1.0
    return numerators.clamp(min=0.0) / (numerators.abs().sum(-1, keepdim=True) + 1e-6 * top.exp())
