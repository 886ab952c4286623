"""Times of the GPU kernels with the Triton that is imported, beside torch's cuDNN softmax kernel, which no Triton changes.

    python benchmarks/triton_versions.py >> times.jsonl                        # once with each Triton:
    PYTHONPATH=FOLDER-WITH-ANOTHER-TRITON python benchmarks/triton_versions.py >> times.jsonl

Each call passes the gate of ``attention_gpu.py`` (error against fp64) before it is timed. Medians of CUDA graph replays, in
milliseconds; decoding and rows as ``attention_gpu.py`` times them.
"""

from __future__ import annotations

import json

import torch
import triton
from attention_gpu import gate, ours
from peers_gpu import cudnn, replay_times

import softpick

SHAPES = {"4,4096,16,64": (4, 4096, 16, 16, 64), "4,4096,16,128": (4, 4096, 16, 16, 128)}


def say(what: str, **times: float) -> None:
    rounded = {name: round(value, 4) for name, value in times.items()}
    print(json.dumps({"triton": triton.__version__, "what": what, **rounded}), flush=True)


def main() -> None:
    torch.manual_seed(0)
    for shape, (b, t, heads, kv_heads, d) in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float16):
            q, grad = (torch.randn(b, heads, t, d, device="cuda", dtype=dtype) for _ in range(2))
            k, v = (torch.randn(b, kv_heads, t, d, device="cuda", dtype=dtype) for _ in range(2))
            name = f"{shape}, {str(dtype).removeprefix('torch.')}"
            gate("prefill", name, "softpick", q, k, v, grad)
            for who, call in {"softpick": ours(), "cudnn softmax": cudnn}.items():
                forward, backward = replay_times(call, (q, k, v), grad)
                say(f"{who}, {name}", forward=forward, backward=backward)
    q, k, v = (
        torch.randn(16, 8 if i else 32, 32768 if i else 1, 128, device="cuda", dtype=torch.bfloat16) for i in range(3)
    )
    lengths = torch.full((16,), 32768, device="cuda", dtype=torch.int32)
    gate("decode", "16 x 32768", "softpick", q, k, v)
    decoded = triton.testing.do_bench_cudagraph(lambda: softpick.decode_attention(q, k, v, cache_seqlens=lengths))
    say("softpick, decode, 16 x 32768, 32/8 heads of 128, bfloat16", forward=decoded)
    for n in (1024, 131072):
        x = torch.randn(2**28 // n // 2, n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with torch.no_grad():
            forward = triton.testing.do_bench(lambda x=x: softpick.softpick(x), return_mode="median")
        y = softpick.softpick(x)
        error = float((y[:8].double() - softpick.softpick(x[:8].detach().double())).norm() / y[:8].double().norm())
        if not error <= 4e-3:
            raise SystemExit(f"gate failed for rows of {n}: {error}")
        grad = torch.randn_like(y)
        backward = triton.testing.do_bench(
            lambda y=y, x=x, g=grad: torch.autograd.grad(y, x, g, retain_graph=True), return_mode="median"
        )
        say(f"softpick over rows of {n}, bfloat16, {2**27} numbers", forward=forward, backward=backward)


if __name__ == "__main__":
    main()
