"""Cases, inputs and errors for test_triton_gpu*.py.

Triton compiles a variant in seconds on one core and keeps it on disk, so :func:`_compiled` lets a few processes compile side by
side first, each of which runs this file.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from softpick import NORMALIZERS, scaled_dot_product_attention

NAMES = list(NORMALIZERS)
DEVICE = "cuda"
for_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="kernels for Hopper GPUs"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# relative error of the output and of gradients
TOLERANCE = {BF16: (1e-2, 2e-2), FP16: (2e-3, 4e-3), FP32: (1e-5, 1e-4)}

PATTERNS = {
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"is_causal": True, "window": 50},
    "two-sided window": {"window": (60, 20)},
    "softcap": {"softcap": 1.5},
    "boolean mask": {"mask": "bool"},
    "padding": {"mask": "padding", "is_causal": True},
    "additive, causal, softcap": {"mask": "float", "is_causal": True, "softcap": 2.0},
}


def case(name, b=2, h=4, hkv=2, tq=200, tk=257, d=64, dv=64, dtype=BF16, **options):
    return {"name": name, "shape": (b, h, hkv, tq, tk, d, dv), "dtype": dtype, "options": options}


CASES = {f"{name}-{pattern}": case(name, **options) for pattern, options in PATTERNS.items() for name in NAMES}
CASES |= {
    f"{name}-length {t}": case(name, 1, 2, 1, t, t, is_causal=True)
    for t in (1, 127, 1000, 2049)
    for name in ("softpick", "softmax", "linear_softpick")
}
CASES |= {
    f"softpick-{str(dtype)[6:]}-{d}-{dv}": case("softpick", d=d, dv=dv, dtype=dtype, is_causal=True)
    for d, dv in ((16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    for dtype in (BF16, FP16, FP32)
    if (d, dtype) != (64, BF16)
}


def inputs(shape, dtype, scale=1.0, seed=0):
    b, h, hkv, tq, tk, d, dv = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, h, tq, d), (b, hkv, tk, d), (b, hkv, tk, dv))
    q, k, v = (torch.randn(size, generator=generator).to(DEVICE) for size in sizes)
    return [t.to(dtype).requires_grad_() for t in (q * scale, k, v)]


def exact(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def sink_for(name, heads):
    return torch.randn(heads, device=DEVICE).requires_grad_() if NORMALIZERS[name].needs_sink else None


def mask_for(kind, shape, dtype):
    b, h, _, tq, tk, _, _ = shape
    generator = torch.Generator().manual_seed(3)
    if kind == "bool":
        return (torch.rand(b, 1, tq, tk, generator=generator) > 0.4).to(DEVICE)
    if kind == "padding":
        return (torch.arange(tk) >= torch.arange(b)[:, None] * 40)[:, None, None].to(DEVICE)
    mask = torch.randn(1, h, tq, tk, generator=generator)
    hidden = torch.rand(tq, tk, generator=generator) > 0.6
    return mask.to(dtype).masked_fill(hidden, -math.inf).to(DEVICE).requires_grad_()


def relative(got, want):
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    difference = torch.where(got == want, 0.0, got - want)  # equal infinities
    return float(difference.norm() / (torch.where(want.isfinite(), want, 0.0).norm() + 1e-2))


def attend(q, k, v, mask=None, sink=None, **options):
    return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, sink=sink, **options)


def errors(setting):
    """Relative errors of output, lse, row mass and largest score, and of the gradients."""
    options = dict(setting["options"])
    kind = options.pop("mask", None)
    shape, dtype, name = setting["shape"], setting["dtype"], setting["name"]
    q, k, v = inputs(shape, dtype)
    mask, sink = None if kind is None else mask_for(kind, shape, dtype), sink_for(name, shape[1])
    common = {"normalizer": name, "return_stats": True, **options}
    got = attend(q, k, v, mask, sink, **common)  # backend="auto"
    true = exact(q, k, v, sink)
    true_mask = mask if mask is None or mask.dtype == torch.bool else exact(mask)[0]
    want = attend(*true[:3], true_mask, true[3], backend="reference", **common)
    leaves = [x for x in (q, k, v, sink, mask) if x is not None and x.requires_grad]
    true_leaves = [x for x in (*true, true_mask) if x is not None and x.requires_grad]
    grad = torch.randn_like(got.output)
    grads = torch.autograd.grad(got.output, leaves, grad)
    want_grads = torch.autograd.grad(want.output, true_leaves, grad.double())
    return (
        [relative(a, b) for a, b in zip(got[:4], want[:4], strict=True)],
        [relative(a, b) for a, b in zip(grads, want_grads, strict=True)],
    )


def _compile(part, parts):
    """What one of the processes does: every variant of its share of the cases, into Triton's cache."""
    for index, setting in enumerate(CASES.values()):
        if index % parts == part:
            errors(setting)


@pytest.fixture(scope="session", autouse=True)
def _compiled(request):
    wanted = any("test_matches_the_reference" in item.name for item in request.session.items)
    workers = "PYTEST_XDIST_WORKER" in os.environ  # they compile side by side by themselves
    if not wanted or workers or not torch.cuda.is_available():
        return
    parts = min(12, os.cpu_count() or 1)
    runs = [subprocess.Popen([sys.executable, __file__, str(part), str(parts)]) for part in range(parts)]
    for run in runs:
        run.wait()  # a failure shows again in the test of that case


def paged(x, page):
    """``(B, Hkv, S, D)`` as shuffled pages ``(num_blocks, page, Hkv, D)`` and the table."""
    b, hkv, s, d = x.shape
    count = s // page
    blocks = x.view(b, hkv, count, page, d).permute(0, 2, 3, 1, 4).reshape(b * count, page, hkv, d)
    order = torch.randperm(b * count, generator=torch.Generator().manual_seed(5)).to(x.device)
    pages = torch.empty_like(blocks)
    pages[order] = blocks
    return pages, order.view(b, count).int()


if __name__ == "__main__":
    _compile(int(sys.argv[1]), int(sys.argv[2]))
