"""Decoding from caches in fp8 beside bf16 on this GPU: softpick's kernels, and torch's softmax from the cache in bf16.

    python benchmarks/decode_fp8_gpu.py [--shapes 1x131072,8x32768,64x8192] [--portable] [--output rows.jsonl]
    python benchmarks/decode_fp8_gpu.py --tiles      # other block sizes: seconds to compile each

32 query heads, 8 key heads, head dimension 128, bf16 queries. Scales are one a head, or one a head of a page of 64. The gate
before anything is timed: the output of the first sequence and key head against the formula in fp64 over the cache as it is
stored, at most 1.5 times the error of the bf16 kernel over the bf16 cache. Times are medians of CUDA graph replays.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import softpick
from softpick.ops.fp8 import Scales
from softpick.ops.spec import AttentionSpec
from softpick.ops.triton import launch_decode, tuning

RINGS = [
    tuning.Rings(n, stages, values, programs=programs)
    for n, stages, values, programs in (
        (64, 5, 5, 2), (64, 4, 4, 2), (64, 6, 6, 2), (64, 3, 3, 3), (64, 4, 4, 3), (64, 3, 3, 4), (64, 10, 10, 1),
        (128, 3, 3, 2),
    )
]  # fmt: skip
HEADS, KV_HEADS, WIDTH, PAGE = 32, 8, 128, 64
TILES = [
    (tuning.Blocks(16, n, warps, stages), programs)
    for n, warps, stages in ((64, 4, 3), (64, 4, 4), (64, 2, 3), (128, 4, 3), (128, 4, 2), (128, 8, 3), (32, 2, 4))
    for programs in (2, 4)
]


class Cache(NamedTuple):
    """Keys and values as the kernel takes them: ``(B, Hkv, T, D)``, or pages ``(num_blocks, Hkv, page, D)`` with a table."""

    key: Tensor
    value: Tensor
    table: Tensor | None = None
    scales: Scales | None = None

    def first(self) -> list[Tensor]:
        """Keys and values of the first sequence and key head in fp64, times their scales; pages lie in its order."""
        count = 1 if self.table is None else self.table.shape[1]
        found = []
        for i, x in enumerate((self.key, self.value)):
            wide = x[:count, :1].double()
            if self.scales is not None:
                wide = wide * self.scales[i][:count, :1, None, None].double()
            found.append(wide.transpose(0, 1).flatten(1, 2)[None])
        return found


def caches(k: Tensor, v: Tensor) -> dict[str, Cache]:
    """The same keys and values in bf16, and in fp8 with scales of heads and of pages."""
    b, _, t, _ = k.shape
    (k8, ks), (v8, vs) = softpick.quantize_fp8(k), softpick.quantize_fp8(v)
    paged = [x.unflatten(2, (-1, PAGE)).permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (k, v)]
    (pk, pks), (pv, pvs) = (softpick.quantize_fp8(x, paged=True) for x in paged)
    table = torch.arange(b * t // PAGE, device=k.device, dtype=torch.int32).view(b, -1)
    return {
        "bf16": Cache(k, v),
        "fp8, scales of heads": Cache(k8, v8, None, Scales(ks, vs, False)),
        "fp8, scales of pages": Cache(pk.transpose(1, 2), pv.transpose(1, 2), table, Scales(pks, pvs, True)),
    }


def launched(normalizer: str, q: Tensor, cache: Cache, portable: bool = False) -> tuple[Callable[[], Any], float]:
    """A call of the kernel, and its error against fp64. ``portable``: without the kernels for Hopper GPUs."""
    norm = softpick.NORMALIZERS[normalizer]
    without = frozenset({"hopper"} if portable else ())
    spec = AttentionSpec(norm, WIDTH**-0.5, norm.eps, right=0, bottom_right=True, backend="triton", without=without)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
    call = functools.partial(
        launch_decode.decode, spec, q, cache.key, cache.value, None, None, None, cache.table, out, lse, None, cache.scales
    )  # fmt: skip
    call()
    group = HEADS // KV_HEADS
    want = softpick.decode_attention(q[:1, :group].double(), *cache.first(), normalizer=norm, backend="reference")
    return call, float((out[:1, :group].double() - want).norm() / want.norm())


def graph_time(call: Callable[[], Any]) -> float:
    """Median microseconds of a call."""
    import triton

    with torch.no_grad():
        return 1e3 * triton.testing.do_bench_cudagraph(call, rep=40, return_mode="median")


def contest(batch: int, positions: int, portable: bool) -> dict[str, float]:
    """Microseconds by contestant; ``portable``: on a Hopper GPU by ``decode.py``, too."""
    from peers_gpu import PEERS

    q = torch.randn(batch, HEADS, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, KV_HEADS, positions, WIDTH, device="cuda", dtype=torch.bfloat16)
    found = {f"{name}, softmax, bf16": graph_time(lambda name=name: PEERS[name](q, k, v)) for name in ("cudnn", "fa2")}
    for normalizer in ("softpick", "softmax"):
        budget = None
        for name, cache in caches(k, v).items():
            for kernel in ("", ", decode.py")[: 1 + portable]:
                call, error = launched(normalizer, q, cache, portable=bool(kernel))
                budget = max(1.5 * error, 2.0**-9) if budget is None else budget
                if not error <= budget:
                    raise SystemExit(
                        f"gate failed for {normalizer}, {name}{kernel}, {batch}x{positions}: {error} against {budget}"
                    )
                found[f"{normalizer}, {name}{kernel}"] = graph_time(call)
    return found


@contextlib.contextmanager
def tried(choice: tuning.Rings | tuple[tuning.Blocks, int]) -> Iterator[None]:
    """Another launch of ``hopper/decode.py``, or blocks and programs a multiprocessor of ``decode.py``."""
    usual = tuning.HOPPER_DECODE_FP8, tuning.blocks, dict(tuning.PROGRAMS)
    if isinstance(choice, tuning.Rings):
        tuning.HOPPER_DECODE_FP8 = choice
    else:
        tuning.blocks = lambda *_: choice[0]
        tuning.PROGRAMS.update(dict.fromkeys(tuning.PROGRAMS, choice[1]))
    try:
        yield
    finally:
        tuning.HOPPER_DECODE_FP8, tuning.blocks = usual[:2]
        tuning.PROGRAMS.update(usual[2])


def tiles(shapes: list[tuple[int, int]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Microseconds of softpick from fp8 with scales of heads, by shape, of each of ``RINGS`` and ``TILES``."""
    data = []
    for batch, positions in shapes:
        q = torch.randn(batch, HEADS, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, batch, KV_HEADS, positions, WIDTH, device="cuda", dtype=torch.bfloat16)
        data.append((f"{batch}x{positions}", q, caches(k, v)["fp8, scales of heads"]))
    usual = launch_decode.skips_values
    for choice, skip in itertools.product([*RINGS, *TILES], (False, True)):
        launch_decode.skips_values = lambda *_, skip=skip: skip
        found = {}
        with tried(choice):
            for shape, q, cache in data:
                call, error = launched("softpick", q, cache, portable=not isinstance(choice, tuning.Rings))
                found[shape] = graph_time(call) if error < 2.0**-6 else float("nan")
        yield f"{choice}, {'some' if skip else 'all'} values", found
    launch_decode.skips_values = usual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1x131072,8x32768,64x8192", help="sequences x positions, comma-separated")
    parser.add_argument("--tiles", action="store_true", help="try other block sizes instead")
    parser.add_argument("--portable", action="store_true", help="on a Hopper GPU time decode.py, too")
    parser.add_argument("--output", type=Path, help="rows as JSON lines are added here")
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    if options.tiles:
        for name, found in tiles(shapes):
            print(f"{name}: " + ", ".join(f"{shape} {time:.1f}" for shape, time in found.items()), flush=True)
        return
    import triton

    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    where["date"] = datetime.date.today().isoformat()
    for batch, positions in shapes:
        found = contest(batch, positions, options.portable)
        print(f"| {batch} x {positions} | us | of bf16 |\n|---|---|---|")
        for name, time in found.items():
            base = found.get(name.split(",")[0] + ", bf16", time)
            print(f"| {name} | {time:.1f} | {time / base:.2f} |")
        print(flush=True)
        if options.output:
            with options.output.open("a") as file:
                for name, time in found.items():
                    row = {"shape": f"{batch}x{positions}", "contestant": name, "us": round(time, 2), **where}
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
