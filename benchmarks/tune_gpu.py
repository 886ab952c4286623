"""Times block sizes of the GPU kernels, dense and with empty tiles: what src/softpick/ops/triton/tuning.py is chosen from.

    python benchmarks/tune_gpu.py [--output tune.csv] [--kinds forward,keys,queries,decode] [--dims 64,128] [--budget 400]

Every variant is compiled in parallel first, then checked against fp64 on a small awkward shape, then timed (median).
Rows go to a CSV with the GPU and the versions. A variant that fails the check is reported and not timed. More kinds:
hopper_keys, hopper_queries (kernels in Gluon); printed only: rows (softpick over rows), hopper_forward, splits (programs of
decode, and how many tiles are under way in hopper/decode.py).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import itertools
import math
import multiprocessing
import os
import time

import torch
from without_gpu import compile_only

NORMALIZER = "softpick"
HEADS = ((16, 16), (32, 8))  # query and key heads, of decode the second: the check must not compile another variant


# (query rows, key rows, warps, stages), of hopper/ also how many held tiles are in registers. The first round (docs/log.md)
# tried all combinations, these were in front
CANDIDATES = {
    ("forward", 64): [(128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("forward", 128): [(128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3)],
    ("queries", 64): [
        (64, 32, 4, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (128, 32, 8, 3),
        (128, 64, 8, 3),
        (128, 64, 4, 3),
    ],
    ("queries", 128): [(128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3)],
    ("keys", 64): [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 3), (64, 128, 8, 2), (128, 128, 8, 2), (32, 64, 4, 3)],
    ("keys", 128): [(64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 3)],
    ("hopper_keys", 64): [
        (64, 64, 4, 3, 0),
        (64, 64, 4, 3, 1),
        (64, 64, 4, 3, 2),
        (64, 64, 4, 2, 2),
        (64, 128, 8, 3, 2),
    ],
    ("hopper_keys", 128): [
        (32, 128, 8, 3, 0),
        (32, 128, 8, 3, 1),
        (32, 64, 4, 2, 1),
        (32, 64, 4, 3, 0),
        (32, 64, 4, 3, 1),
        (32, 64, 4, 4, 1),
    ],
    ("hopper_queries", 64): [
        (64, 64, 4, 3, 0),
        (64, 64, 4, 3, 1),
        (64, 64, 4, 3, 2),
        (64, 64, 4, 2, 2),
        (64, 128, 4, 2, 1),
    ],
    ("hopper_queries", 128): [
        (64, 64, 4, 2, 0),
        (64, 64, 4, 2, 1),
        (64, 64, 4, 2, 2),
        (128, 64, 8, 2, 2),
        (128, 64, 8, 3, 2),
    ],
    ("decode", 128): [(16, 32, 2, 3), (16, 32, 2, 4), (16, 64, 2, 3), (16, 64, 2, 4), (16, 64, 4, 3), (16, 32, 1, 3)],
}


def candidates(kind: str, dim: int) -> list[tuple[int, ...]]:
    return CANDIDATES.get((kind, dim), [])


def run(kind: str, dim: int, skip: bool, blocks, tensors) -> None:
    from softpick.normalizers import NORMALIZERS
    from softpick.ops.spec import AttentionSpec
    from softpick.ops.triton import dispatch, launch, launch_decode, tuning

    norm = NORMALIZERS[NORMALIZER]
    q, k, v, out, lse, grad, dq, dk, dv = tensors
    spec = AttentionSpec(norm, dim**-0.5, norm.eps, right=0)
    launch_decode.skips_values = lambda *_: skip
    dispatch.hopper_refuses = lambda *_: None if kind.startswith("hopper") else "not asked for"
    dispatch.hopper_refuses_decode = lambda *_: "not asked for"
    if kind.startswith("hopper"):
        tuning.HOPPER[kind.removeprefix("hopper_"), dim] = tuning.Schedule(*blocks)
    else:
        use_blocks(kind, blocks)
    if kind == "forward":
        launch.forward(spec, q, k, v, None, None, None, None, None, 0, out, lse, None, None)
    elif kind == "decode":
        one = spec._replace(bottom_right=True)
        launch_decode.decode(one, q[:, :, -1:], k, v, None, None, None, None, out[:, :, -1:], lse[:, :, -1:])
    else:
        kernels = [(launch, "attention_backward_"), (dispatch.hopper, "backward_")]
        other = "queries" if kind.endswith("keys") else "keys"
        saved = [(where, name + other, getattr(where, name + other)) for where, name in kernels]
        for where, name, _ in saved:
            setattr(where, name, Nothing())
        try:
            launch.backward(spec, q, k, v, None, None, None, None, None, 0, 0, out, lse, grad, dq, dk, dv, None)
        finally:
            for where, name, kernel in saved:
                setattr(where, name, kernel)


def use_blocks(kind: str, blocks) -> None:
    """These block sizes for a kind of kernel, the table's for the others."""
    from softpick.ops.triton import tuning

    usual = USUAL.setdefault("blocks", tuning.blocks)
    tuning.blocks = lambda name, *rest: tuning.Blocks(*blocks) if name == kind else usual(name, *rest)


USUAL: dict = {}


class Nothing:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@functools.cache
def without_gpu() -> None:
    """Let this process compile for the GPU and launch nothing."""
    from softpick.ops.triton import tuning

    compile_only(90)
    tuning.multiprocessors = lambda index: 132


def compile_one(job) -> str | None:
    """In a process without the GPU: fill the compile cache."""
    kind, dim, skip, blocks = job
    without_gpu()
    heads, kv_heads = HEADS[kind == "decode"]
    q, out = (torch.empty(1, heads, 4096, dim, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.empty(1, kv_heads, 4096, dim, dtype=torch.bfloat16) for _ in range(2))
    try:
        run(kind, dim, skip, blocks, (q, k, v, out, torch.empty(out.shape[:3]), out, q, k, v))
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def structured(b: int, h: int, t: int, d: int, empty: float, seed: int = 0) -> list[torch.Tensor]:
    """Queries, keys and values for which a share of the 64x64 score tiles has no positive score, at random places."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    noise = [torch.randn(b, h, t, d, device="cuda", generator=g) for _ in range(3)]
    if empty == 0:
        return [x.bfloat16() for x in noise]
    code = torch.zeros(t // 64, d, device="cuda")
    code[torch.arange(t // 64), torch.arange(t // 64) % d] = 4.0
    live = torch.rand(b, h, t // 64, d, device="cuda", generator=g) >= empty
    q = code.repeat_interleave(64, 0) + 0.02 * noise[0]
    k = (torch.where(live, 4.0, -4.0)).repeat_interleave(64, 2) + 0.3 * noise[1]
    return [q.bfloat16(), k.bfloat16(), noise[2].bfloat16()]


def check(kind: str, dim: int, skip: bool, blocks) -> float:
    """Relative error against fp64 on a length that is no multiple of a tile, poisoned outputs."""
    from softpick.ops.reference import attention_reference

    torch.manual_seed(1)
    t = 784
    heads, kv_heads = HEADS[kind == "decode"]
    q, grad = (torch.randn(1, heads, t, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, kv_heads, t, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    keep = torch.ones(t, t, dtype=torch.bool, device="cuda").tril()
    want, want_lse, *_ = attention_reference(*leaves, normalizer=NORMALIZER, scale=dim**-0.5, eps=1e-6, keep=keep)
    grads = torch.autograd.grad(want, leaves, grad.double())
    want = want.detach()
    nan = [torch.full_like(x, math.nan) for x in (q, k, v)]
    if kind in ("forward", "decode"):
        out, lse = torch.full_like(q, math.nan), torch.full((1, heads, t), math.nan, device="cuda")
        run(kind, dim, skip, blocks, (q, k, v, out, lse, grad, *nan))
        if kind == "decode":
            out, want = out[:, :, -1:], want[:, :, -1:]
        pairs = [(out, want)]
    else:
        out, lse = want.bfloat16(), want_lse.float()
        run(kind, dim, skip, blocks, (q, k, v, out, lse, grad, *nan))
        pairs = [(nan[0], grads[0])] if kind.endswith("queries") else [(nan[1], grads[1]), (nan[2], grads[2])]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


ROWS = (128, 1024, 8192, 131072)


def row_jobs() -> list[tuple]:
    """(kind, dtype, length, launch) of softpick over rows; of long ones as ``tuning.HOPPER_ROWS``, or None: read twice."""
    short = [*itertools.product((1024, 2048, 4096, 8192), (1, 2, 4, 8, 16)), (8192, 32), (8192, 16, 2), (8192, 32, 1)]
    long = [  # KiB of a program's share of a row, entries of a chunk, warps, stages, programs a multiprocessor
        (32, 4096, 8, 3, 2), (32, 2048, 8, 3, 2), (16, 2048, 4, 3, 4), (16, 1024, 4, 3, 4), (16, 4096, 4, 3, 4),
        (32, 2048, 4, 3, 2), (16, 2048, 8, 4, 3),
        (64, 4096, 16, 3, 1),
    ]  # fmt: skip

    def ring_launches(kind, dtype):
        """A share is of one input, or of both."""
        entry = dtype.itemsize * (1 if kind == "forward" else 2)
        return [(share * 1024 // entry, *shape) for share, *shape in long]

    return [
        (kind, dtype, n, launch)
        for kind in ("forward", "backward")
        for dtype in (torch.bfloat16, torch.float32)
        for n in ROWS
        for launch in ([*ring_launches(kind, dtype), None] if n > 16384 else short)
        if n > 16384 or max(n, launch[0]) // (32 * launch[1]) in (8, 16, 32, 64)
    ]


def run_rows(job, x, lse, g, y) -> None:
    from softpick.ops.triton import launch_rows, tuning

    kind, dtype, n, chosen = job
    tuning.rows = lambda *_: tuning.Rows(*chosen) if n <= 16384 else None
    if n > 16384 and chosen:
        tuning.HOPPER_ROWS[kind, dtype.itemsize] = tuning.RingLaunch(*chosen)
    elif n > 16384:
        tuning.HOPPER_ROWS.pop((kind, dtype.itemsize), None)
    if kind == "forward":
        launch_rows.softpick_forward(x, 1e-6, y, lse)
    else:
        launch_rows.softpick_backward(x, lse, g, y)


def compile_rows(job) -> str | None:
    without_gpu()
    x = torch.empty(2, job[2], dtype=job[1])
    try:
        run_rows(job, x, torch.empty(2), x, x)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def tune_rows(pool) -> None:
    """Bandwidth of softpick over rows, by shape of the launch, each checked first."""
    import triton

    import softpick

    jobs = row_jobs()
    failures = dict(zip(jobs, pool.map(compile_rows, jobs, chunksize=4), strict=True))
    source, target = torch.empty(2, 2**29, dtype=torch.bfloat16, device="cuda").normal_()
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    print(f"copy {4 * 2**29 / ms / 1e9:.2f} TB/s", flush=True)
    for (kind, dtype, n), group in itertools.groupby(jobs, key=lambda job: job[:3]):
        x, g = (torch.randn(2**28 // n, n, device="cuda", dtype=dtype) for _ in range(2))
        y, lse = torch.empty_like(x), torch.empty(x.shape[0], device="cuda")
        some = [0, 1, x.shape[0] // 2, x.shape[0] - 1]
        truth = x[some].double().requires_grad_()
        want = softpick.softpick(truth)
        if kind == "backward":
            run_rows(("forward", dtype, n, (4096, 8) if n <= 16384 else None), x, lse, g, y)
            (want,) = torch.autograd.grad(want, truth, g[some].double())
        found = {}
        for job in group:
            if failures[job]:
                print("FAILED", job, failures[job], flush=True)
                continue
            try:
                y.fill_(math.nan)
                run_rows(job, x, lse, g, y)
                error = float((y[some].double() - want).norm() / want.norm())
                if not error < (1e-2 if dtype == torch.bfloat16 else 1e-5):
                    print("WRONG", job, error, flush=True)
                    continue
                ms = triton.testing.do_bench(lambda job=job: run_rows(job, x, lse, g, y), 5, 20, return_mode="median")
            except Exception as failure:
                print("FAILED", job, type(failure).__name__, str(failure)[:100], flush=True)
                continue
            found[job[3]] = (2 if kind == "forward" else 3) * x.numel() * x.element_size() / ms / 1e9
        top = sorted(found.items(), key=lambda item: -item[1])
        shown = " ".join(f"{shape} {speed:.2f}" for shape, speed in (top[:5] if n <= 16384 else top))
        print(dtype, n, kind, shown, "TB/s", flush=True)


# (keys of a tile, key tiles and value tiles under way, warps, programs a multiprocessor)
FORWARD = {64: [(64, 4, 4), (64, 3, 3), (64, 5, 5)], 128: [(128, 2, 3), (128, 2, 2), (64, 4, 4)]}
DECODED = [(64, 3, 3, 4, 2), (64, 3, 3, 4, 4), (64, 3, 3, 4, 8), (64, 4, 2, 4, 2), (64, 2, 2, 4, 3), (64, 2, 2, 4, 9)]


def compile_rings(job) -> str | None:
    without_gpu()
    dim, _, (heads, kv_heads), _ = job
    q, out = (torch.empty(4, heads, 4096, dim, dtype=torch.bfloat16) for _ in range(2))
    k = torch.empty(4, kv_heads, 4096, dim, dtype=torch.bfloat16)
    try:
        run_rings(job, q, k, k, out, torch.empty(out.shape[:3]))
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def run_rings(job, q, k, v, out, lse) -> None:
    from softpick.normalizers import NORMALIZERS
    from softpick.ops.spec import AttentionSpec
    from softpick.ops.triton import dispatch, launch, tuning

    dim, ring, _, normalizer = job
    dispatch.hopper_refuses, tuning.FEWEST_FORWARD = lambda *_: None, 0
    tuning.HOPPER_FORWARD[dim] = tuning.Rings(*ring)
    norm = NORMALIZERS[normalizer]
    spec = AttentionSpec(norm, dim**-0.5, norm.eps, right=0)
    launch.forward(spec, q, k, v, None, None, None, None, None, 0, out, lse, None, None)


def tune_rings(pool) -> None:
    """The forward kernel in Gluon against cuDNN, causal, by how many tiles are under way, each checked first."""
    import triton

    from softpick.ops.reference import attention_reference

    jobs = list(
        itertools.chain(*(itertools.product((d,), r, HEADS, ("softpick", "softmax")) for d, r in FORWARD.items()))
    )
    failures = dict(zip(jobs, pool.map(compile_rings, jobs), strict=True))
    bench = functools.partial(triton.testing.do_bench, warmup=10, rep=40, return_mode="median")
    keep = torch.ones(1000, 1000, dtype=torch.bool, device="cuda").tril()
    for dim, (heads, kv_heads) in itertools.product(FORWARD, HEADS):
        q, k, v = (
            torch.randn(4, h, 4096, dim, device="cuda", dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)
        )
        out, lse = torch.empty_like(q), torch.empty(4, heads, 4096, device="cuda")
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            peer = bench(
                lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
        print(f"D{dim} {heads}/{kv_heads} cudnn softmax {peer:.4f}", flush=True)
        for job in [job for job in jobs if job[0] == dim and job[2] == (heads, kv_heads)]:
            if failures[job]:
                print("FAILED", job, failures[job], flush=True)
                continue
            short = [x[:1, :, :1000].contiguous() for x in (q, k, v)]
            short[0][:, 1, 500:510] *= 40  # these are taken twice
            got, level = torch.full_like(short[0], math.nan), torch.full((1, heads, 1000), math.nan, device="cuda")
            run_rings(job, *short, got, level)
            exact = [x.double() for x in short]
            want = attention_reference(*exact, normalizer=job[3], scale=dim**-0.5, eps=1e-6, keep=keep)[0]
            error = float((got.double() - want).norm() / want.norm())
            if not error < 1e-2:
                print("WRONG", job, error, flush=True)
                continue
            ms = bench(lambda job=job: run_rings(job, q, k, v, out, lse))
            print(f"    {job[1]!s:12s} {job[3]:9s} {ms:.4f} error {error:.1e}", flush=True)


def tune_splits() -> None:
    """Decode against cuDNN, graph replays, by programs a multiprocessor."""
    import triton

    from softpick.normalizers import NORMALIZERS
    from softpick.ops.spec import AttentionSpec
    from softpick.ops.triton import dispatch, launch_decode, tuning

    for b, t in ((1, 8192), (1, 32768), (1, 131072), (8, 32768), (64, 8192)):
        q = torch.randn(b, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(b, 8, t, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        keep = torch.rand(b, 8, t // 64, device="cuda") >= 0.75
        sparse_q = torch.ones_like(q)
        sparse_k = torch.where(keep, 0.5, -0.5).repeat_interleave(64, 2)[..., None].bfloat16() + 0.1 * k
        out, lse = torch.empty_like(q), torch.empty(b, 32, 1, device="cuda")
        norm = NORMALIZERS[NORMALIZER]
        spec = AttentionSpec(norm, 128**-0.5, norm.eps, right=0, bottom_right=True)

        def peer(q=q, k=k, v=v):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        bench = triton.testing.do_bench_cudagraph

        def ours(skip, pairs=((q, k), (sparse_q, sparse_k)), v=v, out=out, lse=lse, spec=spec):
            rest = v, None, None, None, None, out, lse
            launch_decode.skips_values = lambda *_: skip
            calls = [functools.partial(launch_decode.decode, spec, q, k, *rest) for q, k in pairs]
            return [round(1e3 * bench(call, rep=10, return_mode="median"), 1) for call in calls]

        line = [f"{b}x{t} cudnn {1e3 * bench(peer, rep=20, return_mode='median'):.0f}"]
        dispatch.hopper_refuses_decode = lambda *_: None
        for schedule, skip in itertools.product(DECODED, (False, True)):
            tuning.HOPPER_DECODE[128] = tuning.Rings(*schedule)
            line.append(("hopper", schedule, skip, ours(skip)))
        dispatch.hopper_refuses_decode = lambda *_: "not asked for"
        variants = itertools.product((2, 4, 8, 12), (64, 128, 256), CANDIDATES["decode", 128][:5], (False, True))
        for programs, fewest, blocks, skip in variants:
            if fewest > 64 and t > 8192:
                continue
            kind = "decode_skip" if skip else "decode"
            use_blocks(kind, blocks)
            tuning.PROGRAMS[kind], tuning.FEWEST_KEYS[kind] = programs, fewest
            line.append(((programs, fewest), blocks, skip, ours(skip)))
        print(line[0])
        for skip in (False, True):
            for i in (0, 1):
                top = sorted((x for x in line[1:] if x[2] == skip), key=lambda x, i=i: x[3][i])[:5]
                print("   ", "skip" if skip else "all ", ("dense", "75 % empty")[i], *top, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="tune.csv")
    parser.add_argument("--kinds", default="forward,keys,queries,decode")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument(
        "--skip", choices=("both", "no"), default="both", help="whether to time decoding that skips values as well"
    )
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which nothing new is timed")
    options = parser.parse_args()
    began = time.time()
    dims = [int(d) for d in options.dims.split(",")]
    jobs = [
        (kind, dim, skip, blocks)
        for kind in options.kinds.split(",")
        for dim in dims
        for blocks in candidates(kind, dim)
        for skip in ((False, True) if options.skip == "both" and kind == "decode" else (False,))
        if kind != "decode" or dim == 128
    ]
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        if "rows" in options.kinds:
            tune_rows(pool)
            print(f"rows: {time.time() - began:.0f} s", flush=True)
        if "hopper_forward" in options.kinds:
            tune_rings(pool)
        failures = dict(zip(jobs, pool.map(compile_one, jobs, chunksize=2), strict=True))
    print(f"{len(jobs)} variants compiled in {time.time() - began:.0f} s", flush=True)

    import triton

    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    where["date"] = datetime.date.today().isoformat()
    data = {}
    for dim in dims:
        for empty in (0.0, 0.9):
            q, k, v = structured(4, 16, 4096, dim, empty)
            out, grad, lse = torch.empty_like(q), torch.randn_like(q), torch.empty(4, 16, 4096, device="cuda")
            grads = [torch.empty_like(q) for _ in range(3)]
            run("forward", dim, True, (128, 64, 8, 3), (q, k, v, out, lse, grad, *grads))
            data[dim, empty] = (q, k, v, out, lse, grad, *grads)
    for empty in (0.0, 0.75):
        q, k, v = structured(8, 8, 32768, 128, 0.0)
        if empty:  # the last query sees positive scores in a quarter of the 64-key blocks
            keep = torch.rand(8, 8, 512, device="cuda") >= empty
            q = torch.ones_like(q)
            k = torch.where(keep, 0.5, -0.5).repeat_interleave(64, 2)[..., None].bfloat16() + 0.1 * k
        data["decode", empty] = (q[:, :, -1:].repeat(1, 4, 1, 1), k, v)
    rows: list[dict] = []
    for job in jobs:
        kind, dim, skip, blocks = job
        if time.time() - began > options.budget:
            print("budget spent", flush=True)
            break
        if failures[job]:
            continue
        try:
            error = check(kind, dim, skip, blocks)
            if not error < 1e-2:
                print("WRONG", job, error, flush=True)
                continue
            times = []
            for empty in (0.0, 0.9 if kind != "decode" else 0.75):
                if kind == "decode":
                    q, k, v = data["decode", empty]
                    out = torch.empty_like(q)
                    tensors = (q, k, v, out, torch.empty(8, 32, 1, device="cuda"), None, None, None, None)
                else:
                    tensors = data[dim, empty]
                times.append(
                    triton.testing.do_bench(
                        lambda tensors=tensors: run(kind, dim, skip, blocks, tensors),
                        warmup=10,
                        rep=40,
                        return_mode="median",
                    )
                )
        except Exception as failure:
            print("FAILED", job, type(failure).__name__, str(failure)[:100], flush=True)
            torch.cuda.synchronize()
            continue
        rows.append(
            {
                "kind": kind,
                "dim": dim,
                "skip": skip,
                **dict(zip(("m", "n", "warps", "stages", "in_registers"), (*blocks, 0), strict=False)),
            }
        )
        rows[-1] |= {"dense_ms": round(times[0], 4), "sparse_ms": round(times[1], 4), "error": f"{error:.2e}", **where}
    if rows:
        with open(options.output, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    if "splits" in options.kinds:
        tune_splits()
    for kind, dim, skip in sorted({(r["kind"], r["dim"], r["skip"]) for r in rows}):
        group = [r for r in rows if (r["kind"], r["dim"], r["skip"]) == (kind, dim, skip)]
        print(f"{kind} D{dim} skip={skip}")
        for by in ("dense_ms", "sparse_ms"):
            for r in sorted(group, key=lambda r: r[by])[:4]:
                shape = tuple(r[x] for x in ("m", "n", "warps", "stages", "in_registers"))
                print(
                    f"   by {by:9s} {shape!s:20s} dense {r['dense_ms']:7.4f} sparse {r['sparse_ms']:7.4f} error {r['error']}"
                )


if __name__ == "__main__":
    main()
