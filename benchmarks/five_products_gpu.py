"""A backward pass with five products (``five_products.py``) on this GPU, beside ours and cuDNN's: errors, then milliseconds.

    python benchmarks/five_products_gpu.py [64|128]

An experiment (docs/log.md): nothing of it is in the package yet. Each form is compared with fp64 in three calls before it is
timed (medians of CUDA graph replays).
"""

from __future__ import annotations

import sys

import five_products
import torch
from peers_gpu import cudnn, replay_times

import softpick
from softpick.ops.triton import launch, tuning

NO_ADDITIONS, BY_THREADS, BY_THREADS_LATE, BY_TMA = range(4)
"""How ``dQ`` is added (five_products.py)."""
# query heads, key heads, queries, keys, causal
CHECKED = ((1, 4, 2, 1000, 1000, True), (2, 2, 2, 512, 448, False), (1, 2, 1, 300, 300, True))
TIMED = {64: ((4, 16, 4096, 64), (8, 16, 2048, 64)), 128: ((4, 16, 4096, 128), (1, 16, 16384, 128))}
# queries and keys of a tile, warps, stages, warps side by side, how dQ is added, tiles that the accelerator reads from
FORMS = {
    64: (
        (64, 64, 4, 3, 1, BY_THREADS),
        (64, 64, 4, 3, 1, BY_TMA, 1),
        (64, 64, 4, 3, 1, BY_TMA, 2),
        (64, 128, 8, 3, 2, BY_TMA, 2),
        (128, 64, 4, 3, 1, BY_TMA, 1),
        (64, 64, 4, 3, 1, NO_ADDITIONS),
    ),
    128: (
        (32, 128, 8, 3, 1, BY_TMA, 2),
        (32, 128, 8, 3, 1, BY_TMA, 1),
        (32, 128, 8, 4, 1, BY_THREADS_LATE),
        (32, 64, 4, 3, 1, BY_TMA, 1),
        (64, 128, 8, 3, 1, BY_TMA, 1),
        (32, 128, 8, 4, 1, NO_ADDITIONS),
    ),
}
LIMIT = 4e-3  # relative error of a bf16 gradient


def attention(query, key, value, is_causal=True, backend="auto"):
    return softpick.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, enable_gqa=True, backend=backend
    )


def error(d: int) -> float:
    """The largest relative error of a gradient in CHECKED."""
    worst = 0.0
    for b, heads, kv_heads, tq, tk, causal in CHECKED:
        torch.manual_seed(0)
        query, grad = (torch.randn(b, heads, tq, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        key, value = (torch.randn(b, kv_heads, tk, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        leaves = [x.requires_grad_() for x in (query, key, value)]
        exact = [x.detach().double().requires_grad_() for x in leaves]
        found = torch.autograd.grad(attention(*leaves, is_causal=causal), leaves, grad)
        wanted = torch.autograd.grad(attention(*exact, is_causal=causal, backend="reference"), exact, grad.double())
        worst = max(worst, *(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True)))
    return worst


def main() -> None:
    usual, tuning.FEWEST_SCORES = launch._backward_for_hopper, 0
    for d in map(int, sys.argv[1:] or FORMS):
        inputs = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)] for shape in TIMED[d]]
        print(f"cuDNN, {TIMED[d]}:", [round(replay_times(cudnn, x[:3], x[3])[1], 3) for x in inputs], flush=True)
        for form in (None, *FORMS[d]):
            launch._backward_for_hopper = usual if form is None else five_products.backward(*form)
            wrong = form is not None and form[5] == NO_ADDITIONS
            try:
                found = 0.0 if wrong else error(d)
            except Exception as error_of_form:  # of shared memory or the compiler: the next form
                print(f"{form}: {type(error_of_form).__name__}: {str(error_of_form)[:200]}", flush=True)
                continue
            if not found <= LIMIT:
                print(f"{form}: gate failed, error {found:.1e}", flush=True)
                continue
            times = [round(replay_times(attention, x[:3], x[3])[1], 3) for x in inputs]
            name = "seven products" if form is None else f"five products {form}"
            print(f"{name}: {times} ms, error {found:.1e}" + ", not added: the bound" * wrong, flush=True)


if __name__ == "__main__":
    main()
