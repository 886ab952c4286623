"""CPU attention, forward and backward, side by side with torch's softmax attention in one run.

    python benchmarks/attention_cpu.py [--normalizer softpick] [--lengths 512,...,8192] [--output benchmarks/results]

For every configuration the correctness gate runs first (output and gradients against the fp64 reference on a slice of
the heads, budget: 1.5 times torch's own error, floor a few ulp); a configuration that fails it is not timed. Contestants
alternate within each repetition, so that a busy neighbour slows both; the best of the repetitions counts. On a shared
CPU only the ratio means anything. Peak memory is that of a fresh process: resident set over what it was before the call.
Rows are appended to a CSV with the environment.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import softpick
from softpick.experiment.environment import peak_resident

HEADS, HEAD_DIM = 8, 64


def inputs(length: int, dtype: torch.dtype, heads: int = HEADS) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, length, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(3)]


def torch_softmax(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def contestant(name: str):
    sink = torch.zeros(HEADS) if softpick.NORMALIZERS[name].needs_sink else None

    def call(q, k, v, backend="tiled"):
        s = None if sink is None else sink[: q.shape[1]].to(q.dtype)
        return softpick.scaled_dot_product_attention(q, k, v, is_causal=True, normalizer=name, backend=backend, sink=s)

    return call


def step(f, tensors) -> tuple[torch.Tensor, ...]:
    out = f(*tensors)
    return (out, *torch.autograd.grad(out, tensors, torch.ones_like(out)))


def gate(name: str, length: int, dtype: torch.dtype) -> None:
    """Raise unless the error against fp64 is within the budget. At most 2048 positions: the oracle is quadratic."""
    tensors = inputs(min(length, 2048), dtype, heads=2)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    f = contestant(name)

    def errors(got, want):
        return [
            float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(got, want, strict=True)
        ]

    ours = errors(step(f, tensors), step(lambda *x: f(*x, backend="reference"), exact))
    budget = errors(step(torch_softmax, tensors), step(torch_softmax, exact))
    floor = 8 * torch.finfo(dtype).eps
    if not all(e <= 1.5 * max(b, floor) for e, b in zip(ours, budget, strict=True)):
        raise SystemExit(f"correctness gate failed for {name} {dtype} T={length}: {ours} against {budget}")


def clock(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def timings(name: str, length: int, dtype: torch.dtype, repetitions: int) -> dict[str, float]:
    tensors = inputs(length, dtype)
    plain = [t.detach() for t in tensors]
    pair = {"torch": torch_softmax, "ours": contestant(name)}
    samples: dict[str, list[float]] = {f"{who}_{what}": [] for who in pair for what in ("forward", "both")}
    for repetition in range(repetitions + 1):
        for who, f in pair.items():
            forward, both = clock(lambda f=f: f(*plain)), clock(lambda f=f: step(f, tensors))
            if repetition:
                samples[f"{who}_forward"].append(forward)
                samples[f"{who}_both"].append(both)
    return {key: min(values) for key, values in samples.items()}


def peak_memory(name: str, length: int, dtype: torch.dtype) -> float:
    """MiB that forward and backward add to the resident set of a fresh process, inputs and gradients included."""
    command = [sys.executable, __file__, "--memory-of", name, "--lengths", str(length), "--dtypes", str(dtype)[6:]]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure_own_memory(name: str, length: int, dtype: torch.dtype) -> None:
    f = torch_softmax if name == "torch" else contestant(name)
    step(f, inputs(1024, dtype))  # what is loaded once (oneDNN, MKL) is not the cost of a call
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = peak_resident()
    step(f, inputs(length, dtype))
    print((peak_resident() - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normalizer", default="softpick", choices=list(softpick.NORMALIZERS))
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "attention_cpu.csv")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    lengths = [int(x) for x in args.lengths.split(",")]
    dtypes = [getattr(torch, x) for x in args.dtypes.split(",")]
    if args.memory_of:
        measure_own_memory(args.memory_of, lengths[0], dtypes[0])
        return

    environment = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "softpick": softpick.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    }
    print(f"{args.normalizer}, causal, batch 1, {HEADS} heads, head dim {HEAD_DIM}; {environment}")
    print("dtype      T     forward ours/torch ms  ratio   fwd+bwd ours/torch ms  ratio   peak MiB ours/torch  ratio")
    rows = []
    for dtype in dtypes:
        for length in lengths:
            gate(args.normalizer, length, dtype)
            t = timings(args.normalizer, length, dtype, args.repetitions)
            ours, theirs = (peak_memory(who, length, dtype) for who in (args.normalizer, "torch"))
            row = {
                "normalizer": args.normalizer,
                "dtype": str(dtype)[6:],
                "length": length,
                **{f"{key}_ms": round(value * 1e3, 3) for key, value in t.items()},
                "forward_ratio": round(t["ours_forward"] / t["torch_forward"], 3),
                "both_ratio": round(t["ours_both"] / t["torch_both"], 3),
                "ours_peak_mib": round(ours, 1),
                "torch_peak_mib": round(theirs, 1),
                "peak_ratio": round(ours / theirs, 3) if theirs else None,
                **environment,
            }
            rows.append(row)
            print(
                f"{row['dtype']:9} {length:5}  {row['ours_forward_ms']:9.1f} /{row['torch_forward_ms']:8.1f}"
                f"  {row['forward_ratio']:6.2f}  {row['ours_both_ms']:10.1f} /{row['torch_both_ms']:8.1f}"
                f"  {row['both_ratio']:6.2f}  {ours:10.1f} /{theirs:7.1f}  {row['peak_ratio'] or float('nan'):6.2f}",
                flush=True,
            )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    new = not args.output.exists()
    with args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
