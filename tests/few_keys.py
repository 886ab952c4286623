"""Errors of rows that see one to three keys, for the Triton tests and benchmarks/few_keys_gpu.py.

The scores of such a row have a given size. With softpick ``1 / l`` is then as large as 1 / size, and so is the gradient,
unless the row has one key only. What a kernel may be off by is twice what torch's softmax kernel of the same dtype is off by
in that row, in units of the mean row, and beyond that the rounding of the gradient itself, of which there are two: of the
scores' gradient before a product, and of the result (in fp16 numbers below 6e-5 are multiples of 6e-8). In fp32 the scores
themselves are rounded: what the true gradient changes by, when every entry of the query is moved by 2^-22 of itself, is
allowed as well. (With eps = 1e-6 and one key of score 1e-4 the gradient is proportional to 1 / score^2, and a score may be a
small difference of large products.)
"""

import torch
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import softpick
from softpick import NORMALIZERS

ROWS = 3
SIZES = (1e-6, 1e-4, 1e-2, 0.3, 10.0)
PATTERNS = ("causal", "left padding", "mask", "packed", "1 key", "2 keys", "3 keys")
_ROUNDING = {
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
    torch.float32: 2**-19,
}  # fp32: of a logarithm of 20 in base 2
_LEAST = 5e-6  # of the mean row: what products in fp32 are off by
_SUBNORMAL = {torch.bfloat16: 0.0, torch.float16: 2.0**-24, torch.float32: 0.0}  # spacing of numbers near 0


def _inputs(pattern, size, dtype, device, heads, length, width):
    generator = torch.Generator().manual_seed(1)
    keys = int(pattern[0]) if pattern[0].isdigit() else length
    q, do = (torch.randn(2, heads, length, width, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, heads, keys, width, generator=generator, dtype=torch.float64) for _ in range(2))
    first = length // 3 if pattern in ("left padding", "mask") else 0
    rows = [(row, slice(first, row + 1)) for row in range(first, first + ROWS)]
    if keys < length:
        rows = [(row, slice(0, keys)) for row in range(length)]
    for row, seen in rows:
        s = q[:, :, row : row + 1] @ k[:, :, seen].transpose(-1, -2) * width**-0.5
        q[:, :, row] *= size / s.abs().amax(-1) * s[..., 0].sign()  # the first key has a positive score
    if dtype == torch.float16 and size < 1e-3:
        do *= 2e-3  # so that the gradients have a place in fp16
    tensors = [x.to(dtype).to(device) for x in (q, k, v, do)]
    mask = None
    if first:
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
        mask[..., :first] = False
        if pattern == "mask":
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return tensors, mask, (slice(first, first + ROWS) if keys == length else slice(0, keys))


def _softpick(name, pattern, mask, backend, q, k, v):
    sink = torch.zeros(q.shape[1], dtype=q.dtype, device=q.device) if NORMALIZERS[name].needs_sink else None
    options = {"normalizer": name, "backend": backend, "sink": sink}
    if pattern == "packed":
        ends = torch.arange(0, 2 * q.shape[2] + 1, q.shape[2], dtype=torch.int32, device=q.device)
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        out = softpick.varlen_attention(*flat, ends, ends, q.shape[2], q.shape[2], is_causal=True, **options)
        return out.unflatten(0, (2, -1)).transpose(1, 2)
    causal = pattern in ("causal", "left padding")
    return softpick.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, **options)


def _run(attention, tensors, dtype):
    q, k, v, do = (x.detach().to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def _errors(got, want, do):
    """Error and size of the rows of a gradient, and of the mean row; with one key everywhere that is 0, but not its parts."""
    size = want.norm(dim=-1)
    mean = torch.maximum(size.mean(), do.double().norm(dim=-1).mean() * do.shape[-1] ** -0.5)
    return (got.double() - want).norm(dim=-1), size, mean


def excess(name, pattern, size, dtype, device="cpu", heads=2, length=40, width=64, backend="triton"):
    """(error of dQ, of dK, in rows with few keys over what is allowed; whether a row with one key is its value)."""
    tensors, mask, few = _inputs(pattern, size, dtype, device, heads, length, width)
    causal = mask is None and tensors[1].shape[2] == length
    full = mask
    if pattern == "left padding":
        full = mask & torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def softmax(q, k, v):
        return torch_attention(q, k, v, full, is_causal=causal)

    soft = [_run(softmax, tensors, d) for d in (dtype, torch.float64)]
    mine = [
        _run(lambda *x, b=b: _softpick(name, pattern, mask, b, *x), tensors, d)
        for b, d in ((backend, dtype), ("reference", torch.float64))
    ]
    moved = mine[1]
    if dtype == torch.float32:
        signs = torch.randint(0, 2, tensors[0].shape, generator=torch.Generator().manual_seed(2)).to(device) * 2 - 1
        query = tensors[0].double() * (1 + signs * 2.0**-22)
        moved = _run(lambda *x: _softpick(name, pattern, mask, "reference", *x), [query, *tensors[1:]], torch.float64)
    worst = []
    for which in (1, 2):
        error, _, mean = _errors(soft[0][which], soft[1][which], tensors[3])
        relative = torch.nan_to_num(error / mean)  # rows without a key
        got, own, mean = _errors(mine[0][which], mine[1][which], tensors[3])
        allowed = 2 * (relative + _LEAST) * mean + _ROUNDING[dtype] * own + (moved[which] - mine[1][which]).norm(dim=-1)
        allowed = allowed + _SUBNORMAL[dtype] / 2 * width**0.5
        if which == 2 and tensors[1].shape[2] < length:  # all queries see all keys, not half of them a few
            allowed = allowed * (length / tensors[1].shape[2]) ** 0.5
        rows = few if which == 2 or few.start else slice(0, ROWS)
        worst.append(float((got / allowed)[:, :, rows].max()))
    first = (slice(None), slice(None), few.start)
    value = tensors[2][first]
    one = torch.equal(mine[0][0][first], value) or not torch.equal(mine[1][0][first].to(dtype), value)  # eps may show
    return worst[0], worst[1], one
