"""Ring attention alone, forward and backward, under torchrun: ``scale_out_ring.py DEVICE OUTPUT LENGTH [LENGTH ...]``.

Rank 0 writes OUTPUT.json: for each length the milliseconds of the slowest rank, that rank's time over the mean, the rate of
floating-point operations over that of one GPU's kernel on a sequence as long as a rank's share, and (on GPUs) the part of the
time of communication during which the rank also computed. A ring that does not give what one rank gives is not timed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import softpick as sp
from softpick.distributed import ring_attention, shard_sequence, unshard_sequence


def inputs(length: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output of this rank: 16 heads of 128, on the CPU 2 of 32."""
    heads, width = (16, 128) if device.type == "cuda" else (2, 32)
    numbers = torch.Generator(device).manual_seed(dist.get_rank())
    return [torch.randn(1, heads, length, width, generator=numbers, device=device, dtype=dtype) for _ in range(4)]


def gate(device: torch.device) -> None:
    """The whole sequence by one rank is the oracle, in fp64 by the full matrix."""
    length = 128 * dist.get_world_size()
    q, k, v, grad = (x.float() for x in inputs(128, device, torch.float32))
    for x in (q, k, v):
        x.requires_grad_()
    out = ring_attention(q, k, v, is_causal=True)
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
    whole = [unshard_sequence(x.detach(), dim=-2).double().requires_grad_() for x in (q, k, v)]
    full = sp.scaled_dot_product_attention(*whole, is_causal=True, backend="reference")
    wanted = [full.detach(), *torch.autograd.grad(full, whole, unshard_sequence(grad, dim=-2).double())]
    for name, have, want in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        share = shard_sequence(want, dim=-2)
        error = float((have.double() - share).norm() / share.norm())
        if not error < 1e-2:
            raise SystemExit(f"rank {dist.get_rank()}: {name} of the ring is off by {error:.1e} at {length} positions")


def milliseconds(call, device: torch.device, repetitions: int) -> float:
    """Median of a call on this rank; all ranks begin together."""
    found = []
    for i in range(repetitions + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i:
            found.append((time.perf_counter() - start) * 1e3)
    return sorted(found)[len(found) // 2]


def overlap(call) -> float:
    """Part of the time of NCCL's kernels during which another kernel ran on this GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    sending, computing = [], []
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            (sending if "nccl" in event.name.lower() else computing).append(span)
    total = sum(end - start for start, end in sending)
    covered = 0.0
    for start, end in sending:
        at = start
        for a, b in sorted(computing):
            if b > at and a < end:
                covered += min(b, end) - max(a, at)
                at = min(b, end)
    return covered / total if total else float("nan")


def measure(length: int, device: torch.device) -> dict[str, object]:
    size = dist.get_world_size()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, grad = inputs(length // size, device, dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def ring_forward():
        with torch.no_grad():
            return ring_attention(q, k, v, is_causal=True)

    def kernel_forward():
        with torch.no_grad():
            return sp.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both(forward):
        return lambda: torch.autograd.grad(forward(q, k, v, is_causal=True), leaves, grad)

    repetitions = 3 if length >= 2**18 else 5
    found: dict[str, object] = {"positions": length, "ranks": size}
    calls = {
        "forward": (ring_forward, kernel_forward),
        "forward_and_backward": (both(ring_attention), both(sp.scaled_dot_product_attention)),
    }
    for name, (ring, kernel) in calls.items():
        mine = torch.tensor(
            [milliseconds(ring, device, repetitions), milliseconds(kernel, device, repetitions)], device=device
        )
        every = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(every, mine)
        times = torch.stack(every)
        slowest = float(times[:, 0].max())
        # the ring computes size^2 times the scores of the kernel's sequence, on size ranks
        rate = size * float(times[:, 1].mean()) / slowest
        found |= {
            f"{name}_ms": round(slowest, 3),
            f"{name}_slowest_over_mean": round(slowest / float(times[:, 0].mean()), 3),
            f"{name}_rate_of_kernel": round(rate, 3),
        }
    if device.type == "cuda":
        found["communication_overlapped"] = round(overlap(calls["forward_and_backward"][0]), 3)
    return found


def main() -> None:
    kind, output, *lengths = sys.argv[1:]
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", **({"device_id": device} if kind == "cuda" else {}))
    gate(device)
    found = [measure(int(length), device) for length in lengths]
    if dist.get_rank() == 0:
        path = Path(f"{output}.json")
        path.with_suffix(".tmp").write_text(json.dumps(found, indent=1))
        path.with_suffix(".tmp").rename(path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
