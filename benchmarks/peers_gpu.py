"""Softmax attention of others on this GPU, forward and backward: torch's FlexAttention, FA2 and cuDNN, and FlashAttention-4.

FlashAttention-4 is there if the package ``flash-attn-4`` is; all times are then also of its deterministic backward pass.
Imported by the other benchmarks.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = {  # batch, positions, query heads, key heads, head dim
    "4,4096,16,64": (4, 4096, 16, 16, 64),
    "4,4096,16,128": (4, 4096, 16, 16, 128),
    "1,16384,16,128": (1, 16384, 16, 16, 128),
    "8,2048,16,64": (8, 2048, 16, 16, 64),
    "4,4096,32/8,128": (4, 4096, 32, 8, 128),
}


@functools.cache
def _flex(t: int):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.cache_size_limit = 64
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, t, t, device="cuda")
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def flex(q, k, v):
    return _flex(q.shape[2])(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa(backend):
    def call(q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
            )

    return call


def fa4(q, k, v, deterministic=False):
    """FlashAttention-4, whose tensors are ``(B, T, H, D)``."""
    from flash_attn.cute import flash_attn_func

    found = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=q.shape[2] > 1, deterministic=deterministic)
    out = found[0] if isinstance(found, tuple) else found  # some versions also return the logarithms of the sums
    return out.transpose(1, 2)


fa2, cudnn = _sdpa(SDPBackend.FLASH_ATTENTION), _sdpa(SDPBackend.CUDNN_ATTENTION)
PEERS = {"flex": flex, "fa2": fa2, "cudnn": cudnn}
if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
    PEERS |= {"fa4": fa4, "fa4, deterministic": functools.partial(fa4, deterministic=True)}
else:
    print("flash-attn-4 is not installed: no times of FlashAttention-4", file=sys.stderr)


def times(call, q, k, v, grad) -> tuple[float, float]:
    """Median milliseconds of forward and of backward, called from Python one after the other."""
    import triton

    forward = triton.testing.do_bench(lambda: call(q, k, v), warmup=20, rep=100, return_mode="median")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = call(*leaves)
    backward = triton.testing.do_bench(
        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), warmup=20, rep=100, return_mode="median"
    )
    return forward, backward


def replay_times(call, inputs, grad) -> tuple[float, float]:
    """The same from replays of a CUDA graph: what the GPU takes, whatever else the processor does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.cuda.stream(stream):  # autograd goes back on the stream of the forward pass
        out = call(*leaves)
        forward = _replay(lambda: call(*leaves), stream)
        backward = _replay(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), stream)
    torch.cuda.current_stream().wait_stream(stream)
    return forward, backward


def _replay(call, stream, calls: int = 10, repetitions: int = 12) -> float:
    """Median milliseconds of a call, of which there are a few in the graph."""
    for _ in range(2):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    graph.replay()
    for event in events[:-1]:
        event.record(stream)
        graph.replay()
    events[-1].record(stream)
    stream.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return spans[len(spans) // 2] / calls


if __name__ == "__main__":
    for name, (b, t, h, hkv, d) in SHAPES.items():
        q, grad = (torch.randn(b, h, t, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.randn(b, hkv, t, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        print(
            name,
            {peer: tuple(round(x, 3) for x in times(call, q, k, v, grad)) for peer, call in PEERS.items()},
            flush=True,
        )
