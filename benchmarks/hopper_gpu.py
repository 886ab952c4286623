"""fp16, softcap and the Python before a launch on a Hopper GPU: errors against fp64 first, then milliseconds.

    python benchmarks/hopper_gpu.py [--output FILE.csv]

Each kind of call is checked in a process of its own, all at a time, which also compiles what is timed afterwards: output and
gradients of the kernels for Hopper GPUs may be off by 1.6 times what the portable kernels are off by (with a softcap, whose
tanh is coarser there, by the tolerance of the tests), at scores of three sizes. Then times: by CUDA graph replays and of calls
from Python, of the kernels for Hopper GPUs and of the portable ones; and what a call spends in Python.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import subprocess
import sys
import time
import warnings

import torch
from attention_gpu import thresholds
from peers_gpu import replay_times, times

import softpick

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {  # dtype, softcap
    "bf16": ("bf16", None),
    "fp16": ("fp16", None),
    "bf16, softcap 30": ("bf16", 30.0),
}
SHAPES = ((8, 2048, 16, 128), (4, 4096, 16, 64), (4, 4096, 16, 128))
# of the forward pass in bf16, where the kernel for Hopper GPUs is to be taken from
SIZES = (
    (8, 2048, 16, 128),
    (8, 2048, 16, 64),
    (2, 2048, 16, 128),
    (4, 4096, 16, 64),
    (1, 2048, 16, 128),
    (1, 1024, 16, 64),
)
SCORES = (1e-3, 1.0, 30.0)
TOLERANCE = (1e-2, 2e-2)  # output and gradients in bf16, as in the tests
FEWEST, NEVER = 0, 2**62
ROWS: list[dict] = []


def record(part: str, shape: object, what: str, kind: str, milliseconds: float) -> None:
    ROWS.append({"part": part, "shape": str(shape), "what": what, "kind": kind, "value": round(milliseconds, 5)})


def call(softcap: float | None, q, k, v):
    return softpick.scaled_dot_product_attention(q, k, v, is_causal=True, softcap=softcap, enable_gqa=True)


def check(kind: str, d: int) -> None:
    """Raise SystemExit unless the errors are in bounds; prints the largest ratio to the portable kernels."""
    warnings.filterwarnings(
        "error", ".*could not be built"
    )  # or the portable kernels would be compared with themselves
    dtype, softcap = KINDS[kind]
    worst = 0.0
    for size in SCORES:
        torch.manual_seed(0)
        q, grad = (torch.randn(1, 4, 1008, d, device="cuda").to(DTYPES[dtype]) for _ in range(2))
        k, v = (torch.randn(1, 4, 1008, d, device="cuda").to(DTYPES[dtype]) for _ in range(2))
        leaves = [x.requires_grad_() for x in (q * size, k, v)]
        grad[:, :, :16] = 0  # rows that see few keys have a test of their own
        exact = [x.detach().double().requires_grad_() for x in leaves]
        want = softpick.scaled_dot_product_attention(
            *exact, is_causal=True, softcap=softcap, enable_gqa=True, backend="reference"
        )
        wants = [want.detach(), *torch.autograd.grad(want, exact, grad.double())]
        errors = []
        for fewest in (FEWEST, NEVER):
            with thresholds(fewest):
                if fewest == FEWEST:
                    explained = softpick.explain_backend(*leaves, is_causal=True, softcap=softcap, enable_gqa=True)
                    if not all(kernel.file.startswith("hopper/") for kernel in explained.kernels):
                        raise SystemExit(f"{kind}, D {d}: not by the kernels for Hopper GPUs: {explained.kernels}")
                out = call(softcap, *leaves)
                got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
            errors.append([float((x.double() - y).norm() / y.norm()) for x, y in zip(got, wants, strict=True)])
        for i, (ours, portable) in enumerate(zip(*errors, strict=True)):
            limit = 1.6 * portable + 1e-4
            if softcap:
                limit = max(limit, TOLERANCE[i > 0])
            worst = max(worst, ours / portable)
            if not ours <= limit:
                raise SystemExit(f"{kind}, D {d}, scores of {size}: errors {errors[0]} against {errors[1]}")
    print(f"checked {kind}, D {d}: at most {worst:.2f} times the error of the portable kernels", flush=True)


def check_all() -> set[tuple[str, int]]:
    """Run :func:`check` for every kind and head dimension, side by side; returns those that passed."""
    cases = [(kind, d) for kind in KINDS for d in (64, 128)]
    runs = [subprocess.Popen([sys.executable, __file__, "--check", kind, str(d)]) for kind, d in cases]
    passed = {case for case, run in zip(cases, runs, strict=True) if not run.wait()}
    for case in cases:
        if case not in passed:
            print(f"not timed, because its check failed: {case}", flush=True)
    return passed


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    b, t, h, d = shape
    return [torch.randn(b, h, t, d, device="cuda").to(dtype) for _ in range(4)]


def time_kinds(passed: set[tuple[str, int]]) -> None:
    """Forward and backward of every kind, beside dense bf16."""
    for shape in SHAPES:
        base: tuple[float, float] | None = None
        for kind, (dtype, softcap) in KINDS.items():
            if (kind, shape[3]) not in passed:
                continue
            tensors = inputs(shape, DTYPES[dtype])
            line = []
            for name, fewest in (("Hopper", FEWEST), ("portable", NEVER)):
                with thresholds(fewest):
                    found = replay_times(functools.partial(call, softcap), tensors[:3], tensors[3])
                base = base or found
                for what, value in zip(("forward", "backward"), found, strict=True):
                    record("kinds", shape, what, f"{kind}, {name}", value)
                line.append(
                    f"{name} {found[0]:.3f} / {found[1]:.3f} ({found[0] / base[0]:.2f} / {found[1] / base[1]:.2f})"
                )
            print(f"{shape} {kind}: " + "; ".join(line), flush=True)


def time_sizes(passed: set[tuple[str, int]]) -> None:
    """Forward and backward in bf16 of the two families, by replays and called from Python."""
    for shape in SIZES:
        if ("bf16", shape[3]) not in passed:
            continue
        tensors = inputs(shape, torch.bfloat16)
        line = []
        for name, fewest in (("Hopper", FEWEST), ("portable", NEVER)):
            with thresholds(fewest):
                one = replay_times(functools.partial(call, None), tensors[:3], tensors[3])
                other = times(functools.partial(call, None), *tensors)
            for way, found in (("replays", one), ("from Python", other)):
                for what, value in zip(("forward", "backward"), found, strict=True):
                    record("sizes", shape, f"{what}, {way}", name, value)
            line.append(f"{name} {one[0]:.3f} / {one[1]:.3f}, from Python {other[0]:.3f} / {other[1]:.3f}")
        scores = shape[0] * shape[2] * shape[1] ** 2
        print(f"{shape}, 2^{scores.bit_length() - 1} scores: " + "; ".join(line), flush=True)


def time_python(_passed: object, calls: int = 50, repetitions: int = 30) -> None:
    """Microseconds that a call spends before it returns: the least of some repetitions, in which the GPU keeps up."""
    tensors = inputs((1, 256, 4, 64), torch.bfloat16)
    for name, fewest in (("Hopper", FEWEST), ("portable", NEVER)):
        with thresholds(fewest):
            leaves = [x.requires_grad_() for x in tensors[:3]]
            out = call(None, *leaves)
            ways = {
                "forward": lambda: call(None, *tensors[:3]),
                "backward": lambda out=out, leaves=leaves: torch.autograd.grad(
                    out, leaves, tensors[3], retain_graph=True
                ),
            }
            for what, way in ways.items():
                found = []
                with torch.set_grad_enabled(what == "backward"):
                    for _ in range(repetitions):
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                        for _ in range(calls):
                            way()
                        found.append((time.perf_counter() - start) / calls)
                least, median = 1e6 * min(found), 1e6 * sorted(found)[len(found) // 2]
                record("python", (1, 256, 4, 64), f"{what}, least", name, least / 1e3)
                record("python", (1, 256, 4, 64), f"{what}, median", name, median / 1e3)
                print(f"Python, {name}, {what}: {least:.0f} us, median {median:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", default=os.path.join(os.environ["OUT"], "hopper.csv") if "OUT" in os.environ else None
    )
    parser.add_argument("--check", nargs=2, metavar=("KIND", "D"), help="only check one kind of calls")
    options = parser.parse_args()
    if options.check:
        check(options.check[0], int(options.check[1]))
        return
    passed = check_all()
    for part in (time_python, time_kinds, time_sizes):
        part(passed)
        if options.output:
            import triton

            where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
            where["date"] = datetime.date.today().isoformat()
            with open(options.output, "w", newline="") as file:
                writer = csv.DictWriter(file, [*ROWS[0], *where])
                writer.writeheader()
                writer.writerows({**row, **where} for row in ROWS)
    if len(passed) < 2 * len(KINDS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
