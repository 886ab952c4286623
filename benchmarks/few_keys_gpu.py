"""Rows that see few keys on this GPU: errors against fp64, and what the care that is taken with them costs dense inputs.

    python benchmarks/few_keys_gpu.py                                   errors of every normalizer
    python benchmarks/few_keys_gpu.py --against ../before/src           times of the two checkouts, in turns

An error is relative to what tests/few_keys.py allows: 1 is twice the error of torch's softmax kernel in the same row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

PARTS = ("prefill", "other", "decode")


def errors() -> None:
    import few_keys

    from softpick import NORMALIZERS

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name in NORMALIZERS:
            cells = []
            for pattern in few_keys.PATTERNS:
                found = [few_keys.excess(name, pattern, s, dtype, "cuda", 4, 200) for s in few_keys.SIZES]
                one = "" if all(f[2] for f in found) else " not its value"
                cells.append(f"{pattern} {max(f[0] for f in found):.2f} {max(f[1] for f in found):.2f}{one}")
            print(f"{str(dtype)[6:]} {name}: dQ, dK: " + "; ".join(cells), flush=True)


def times(part: str) -> dict[str, float]:
    """Milliseconds by name, from replays of a CUDA graph."""
    from peers_gpu import SHAPES, _replay, replay_times

    from softpick import decode_attention, scaled_dot_product_attention, varlen_attention

    def tensors(b, t, h, kv, d, dtype=torch.bfloat16, queries=0):
        q = torch.randn(b, h, queries or t, d, device="cuda", dtype=dtype)
        return q, *(torch.randn(b, kv, t, d, device="cuda", dtype=dtype) for _ in range(2))

    def causal(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found = {}

    def note(name, call, q, k, v):
        both = replay_times(call, [q, k, v], torch.randn_like(call(q, k, v)))
        found[f"{name} forward"], found[f"{name} backward"] = both

    if part == "prefill":
        for name, shape in SHAPES.items():
            note(name, causal, *tensors(*shape))
    elif part == "other":
        note("8,2048,16,128", causal, *tensors(8, 2048, 16, 16, 128))
        note("4,2048,16,256", causal, *tensors(4, 2048, 16, 16, 256))
        for d in (64, 128):
            note(f"fp16 4,4096,16,{d}", causal, *tensors(4, 4096, 16, 16, d, torch.float16))
        ends = torch.arange(0, 8 * 2048 + 1, 2048, dtype=torch.int32, device="cuda")
        packed = [x.transpose(1, 2).reshape(8 * 2048, 16, 128) for x in tensors(8, 2048, 16, 16, 128)]
        note(
            "packed 8,2048,16,128",
            lambda q, k, v: varlen_attention(q, k, v, ends, ends, 2048, 2048, is_causal=True),
            *packed,
        )
        mask = torch.ones(8, 1, 1, 2048, dtype=torch.bool, device="cuda")
        mask[..., :256] = False
        padded = lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, is_causal=True)  # noqa: E731
        note("padded 8,2048,16,128", padded, *tensors(8, 2048, 16, 16, 128))
    else:
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for b, t in ((1, 2048), (1, 8192), (16, 2048), (8, 32768)):
                for d in (64, 128):
                    q, k, v = tensors(b, t, 32, 8, d, queries=1)
                    found[f"decode {b},{t},32/8,{d}"] = _replay(lambda: decode_attention(q, k, v), stream)
                    keep = torch.ones(b, 1, 1, t, dtype=torch.bool, device="cuda")
                    masked = lambda: scaled_dot_product_attention(q, k, v, keep, enable_gqa=True)  # noqa: E731
                    found[f"decode with a mask {b},{t},32/8,{d}"] = _replay(masked, stream)
    return found


def _of(source: str, part: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(
        [sys.executable, __file__, "--part", part], env=environment, check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(against: str, parts: list[str], rounds: int) -> None:
    sources = {"before": against, "now": str(Path(__file__).parents[1] / "src")}
    for part in parts:
        rows: dict[str, dict[str, list[float]]] = {}
        for _ in range(rounds):
            for which, source in sources.items():
                for name, ms in _of(source, part).items():
                    rows.setdefault(name, {}).setdefault(which, []).append(ms)
        for name, cell in rows.items():
            before, now = (min(cell[which]) for which in sources)
            print(f"{name}, before {before:.4f}, now {now:.4f}, ratio {now / before:.3f}, all {cell}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="src folder of another checkout")
    parser.add_argument(
        "--rounds", type=int, default=3, help="processes of each checkout, in turns; the least time counts"
    )
    parser.add_argument("--part", choices=PARTS, help="only this part of the times")
    arguments = parser.parse_args()
    if arguments.against:
        compare(arguments.against, [arguments.part] if arguments.part else list(PARTS), arguments.rounds)
    elif arguments.part:
        print(json.dumps(times(arguments.part)))
    else:
        errors()
