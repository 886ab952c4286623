"""Attention from the formulas of the paper and of the table's citations, in fp64, sharing no code with the package.

Written one query row at a time, with masked keys really absent, so that nothing here can have a broadcasting bug.
"""

import math

import torch


def weights_of_row(s, name, sink=None, eps=1e-6):
    """Weights of one row of scores (1-d, fp64, masked keys already removed)."""
    if s.numel() == 0:
        return s
    if name == "softmax":
        return torch.softmax(s, -1)
    if name == "softmax_plus_one":
        return torch.softmax(torch.cat([s, s.new_zeros(1)]), -1)[:-1]
    if name == "learned_sink":
        return torch.softmax(torch.cat([s, sink.reshape(1)]), -1)[:-1]
    if name == "rectified":
        kept = s >= 0
        return torch.zeros_like(s).masked_scatter(kept, torch.softmax(s[kept], -1))
    if name == "linear_softpick":
        return s / (1 + s.abs().sum())
    m = s.detach().max().clamp(min=0)
    # mpmath-like care is not needed: fp64 and e^-m only where it cannot overflow
    shifted = torch.exp(s - m) - torch.exp(-m)
    numerator = torch.relu(shifted)
    if name == "relu_softpick":
        return numerator / (numerator.sum() + eps)
    if name == "softpick":
        return numerator / (shifted.abs().sum() + eps)
    if name == "softpick_stop_gradient":
        held = torch.where(s > 0, shifted, shifted.detach())
        return numerator / (held.abs().sum() + eps)
    raise KeyError(name)


def attention(q, k, v, name, *, mask=None, causal=None, left=-1, right=-1, scale=None, softcap=None, sink=None):
    """``(B, H, Tq, D)``, ``(B, Hkv, Tk, D)``; causal is None, "top_left" or "bottom_right" (also places the window)."""
    q, k, v = q.double(), k.double(), v.double()
    (b, h, tq, d), (_, hkv, tk, _) = q.shape, k.shape
    scale = 1 / math.sqrt(d) if scale is None else scale
    offset = tk - tq if causal == "bottom_right" else 0
    outs, weights = [], []
    for bi in range(b):
        for hi in range(h):
            ki, vi = k[bi, hi * hkv // h], v[bi, hi * hkv // h]
            for i in range(tq):
                s = ki @ q[bi, hi, i] * scale
                if softcap:
                    s = softcap * torch.tanh(s / softcap)
                seen = torch.ones(tk, dtype=torch.bool)
                if mask is not None:
                    row = mask.expand(b, h, tq, tk)[bi, hi, i]
                    if row.dtype == torch.bool:
                        seen = seen & row
                    else:
                        unmasked = row.detach() > -1e37
                        seen = seen & unmasked
                        s = s + torch.where(unmasked, row.double(), 0.0)
                for j in range(tk):
                    behind = i + offset - j
                    if (causal and behind < 0) or 0 <= left < behind or (right >= 0 and -behind > right):
                        seen[j] = False
                index = seen.nonzero()[:, 0]
                a = weights_of_row(s[index], name, None if sink is None else sink.double()[hi])
                weights.append(torch.zeros(tk, dtype=torch.float64).index_put((index,), a))
                outs.append(a @ vi[index])
    return torch.stack(outs).view(b, h, tq, -1), torch.stack(weights).view(b, h, tq, tk)
