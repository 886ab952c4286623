"""Caches on which bounds of keys are put to the test, and the formula in fp64 for what decoding leaves out."""

import math

import formula
import torch

from softpick import NORMALIZERS

KINDS = (
    "random", "aligned", "outlier", "negative", "edge", "equal", "zeros", "huge", "tiny", "shifted", "channel", "rank one",
)  # fmt: skip
"""``aligned``: most blocks far below 0, some above; ``edge``: largest scores just around 0; ``channel``: one large channel."""


def cache(kind, query, kv_heads, positions, seed=0, spread=0.1):
    """Keys ``(B, kv_heads, positions, D)`` in fp64 for the queries ``(B, H, Tq, D)``, which they are meant to go against."""
    g = torch.Generator().manual_seed(seed)
    b, heads, _, d = query.shape
    against = query[:, :: heads // kv_heads, :1] / query[:, :: heads // kv_heads, :1].norm(dim=-1, keepdim=True)
    noise = torch.randn(b, kv_heads, positions, d, generator=g, dtype=torch.float64) * spread
    depth = 3 * torch.rand(b, kv_heads, positions, 1, generator=g, dtype=torch.float64) + 0.5
    block = torch.arange(positions) // 16
    keys = noise - depth * against
    if kind == "random":
        return noise / spread
    if kind == "aligned":
        return torch.where((block % 3 == 1)[:, None], -keys, noise - 3 * against)
    if kind == "outlier":  # the last key of every other block
        return torch.where(((torch.arange(positions) % 32) == 15)[:, None], 2 * against, noise - 2 * against)
    if kind == "edge":
        away = noise - (noise * against).sum(-1, keepdim=True) * against
        return away - torch.rand(noise[..., :1].shape, generator=g, dtype=torch.float64) * 1e-3 * against
    if kind == "equal":
        return (noise[:, :, :1] - against).expand(-1, -1, positions, -1).clone()
    if kind == "zeros":
        return torch.where((block == 1)[:, None], -noise, 0 * noise)
    if kind == "shifted":  # far from the origin, where the mean is rounded most
        side = torch.randn(d, generator=g, dtype=torch.float64)
        return keys + 50 * (side - (side * against).sum(-1, keepdim=True) * against)
    if kind == "channel":
        keys[..., 0] *= 20
        return keys
    if kind == "rank one":
        return -against * (depth + noise[..., :1])
    scale = {"huge": 100.0, "tiny": 1e-5, "negative": 1.0}[kind]
    keys = torch.where((block == 2)[:, None], -keys, keys) if kind != "negative" else keys
    return keys * scale


def scores(query, key, scale, softcap):
    """``(B, H, Tq, positions)`` in fp64."""
    groups = query.shape[1] // key.shape[1]
    s = query.double() @ key.double().repeat_interleave(groups, 1).mT * scale
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def seen(lengths, positions, tq, left, right):
    """``(B, 1, Tq, positions)``: which keys a query sees; the last query stands at the last filled position."""
    filled = torch.as_tensor(lengths)[:, None, None]
    behind = torch.arange(tq)[:, None] + filled - tq - torch.arange(positions)
    keep = (torch.arange(positions) < filled).expand(behind.shape)
    keep = keep & (behind >= -right) if right >= 0 else keep
    return (keep & (behind <= left) if left >= 0 else keep)[:, None]


def attention(query, key, value, name, keep, scale, softcap=None, sink=None):
    """The exact output, and the logarithm of the denominator, in fp64."""
    s = scores(query, key, scale, softcap)
    logit = None if sink is None else sink.double().view(1, -1, 1, 1)
    row = formula.weights(NORMALIZERS[name], s, keep.expand(s.shape), logit)
    groups = query.shape[1] // key.shape[1]
    a = row.a if hasattr(row, "a") else row
    return a @ value.double().repeat_interleave(groups, 1), (row.total.log() + row.m).squeeze(-1)


def pages(tensors, lengths, page, garbage=-1):
    """Tensors ``(B, heads, positions, D)`` in pages of any order, NaN where nothing is filled; and the table."""
    used = [-(-n // page) for n in lengths]
    free = torch.randperm(sum(used) + 1).tolist()
    table = torch.full((len(lengths), -(-tensors[0].shape[2] // page)), garbage, dtype=torch.int32)
    pools = [torch.full((len(free), page, x.shape[1], x.shape[3]), math.nan, dtype=x.dtype) for x in tensors]
    for b, length in enumerate(lengths):
        for j in range(0, length, page):
            table[b, j // page] = free.pop()
            for pool, x in zip(pools, tensors, strict=True):
                part = x[b, :, j : min(j + page, length)].transpose(0, 1)
                pool[table[b, j // page], : part.shape[0]] = part
    return *pools, table
