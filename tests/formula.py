"""Attention of any record in fp64, gradients included, and what rounding may do to them. Shares no code with the package.

A record is read by its switches alone. Next to every number stands a bound: the same sum over absolute values, which times
the unit roundoff is what an implementation may be off by (classical forward error analysis).
"""

import math
from types import SimpleNamespace

import torch


def _functions(record, s, m):
    """``f, g, f', g'`` relative to ``e^m``, from the definitions in the documentation of the switches."""
    decay = torch.exp(-m)
    if record.base == "exp":
        b = db = torch.exp(s - m)
    elif record.base == "expm1":
        up, down = torch.where(s > 0, s, 0.0), torch.where(s > 0, 0.0, s)
        b = torch.where(s > 0, torch.exp(s - m) * -torch.expm1(-up), decay * torch.expm1(down))
        db = torch.exp(s - m)
    elif record.base == "linear":
        b, db = s, torch.ones_like(s)
    elif record.base == "square":
        b, db = s**2, 2 * s
    else:
        b = 1 / (1 + torch.exp(-s.clamp(min=-700)))
        db = b * (1 - b)
    kept = {"none": torch.ones_like(s, dtype=torch.bool), "positive": s > 0, "nonnegative": s >= 0}[record.rectify]
    f, df = b * kept, db * kept
    if not record.normalized:
        return f, 0 * f, df, 0 * df
    if not record.absolute_denominator:
        return f, f, df, df
    sign = torch.where(s >= 0, 1.0, -1.0) if record.base in ("expm1", "linear") else 1.0
    dg = db * sign
    return f, b.abs(), df, dg if record.negative_gradient else dg * (s > 0)


def weights(record, s, keep, logit=None, eps=None):
    """Weights ``a`` of scores ``s`` (fp64, any shape, a row along the last dimension), and what they are made of.

    ``keep`` is boolean of the same shape; ``logit`` that of a learned sink, which broadcasts against a row's sum.
    """
    s = torch.where(keep, s, 0.0)
    exponential = record.base in ("exp", "expm1")
    m = torch.zeros_like(s[..., :1])
    if exponential and s.shape[-1]:
        m = torch.where(keep, s, -math.inf).amax(-1, keepdim=True)
    if exponential:
        if not (record.base == "exp" and record.constant == 0 and record.rectify == "none"):
            m = m.clamp(min=0)
        m = m if logit is None else torch.maximum(m, logit)
        m = torch.where(m == -math.inf, 0.0, m)
    f, g, df, dg = (torch.where(keep, x, 0.0) for x in _functions(record, s, m))
    constant = {0: 0 * m, 1: torch.exp(-m) if exponential else 0 * m + 1}.get(record.constant)
    if constant is None:
        constant = torch.exp(logit - m)
    rest = constant + (record.eps if eps is None else eps)
    total = g.sum(-1, keepdim=True) + rest
    inverse = torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))
    a = f * inverse
    return SimpleNamespace(
        a=a, m=m, rest=rest, constant=constant, total=total, inverse=inverse, functions=(f, g, df, dg)
    )


def attention(q, k, v, grad, record, *, keep=None, bias=None, scale, softcap=None, sink=None, eps=None, unit=0.0):
    """``(B, H, Tq, D)`` and ``(B, Hkv, Tk, D)``: output, gradients of query, key, value, bias and sink, and their bounds.

    ``unit`` is the roundoff of scores and sums. Bounds are in units of the roundoff of the inputs' dtype; ``rough`` ones come
    from the scores' error and are absolute.
    """
    q, k, v, grad = (x.detach().double() for x in (q, k, v, grad))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    raw = q @ k.transpose(-1, -2) * scale
    rough = q.abs() @ k.abs().transpose(-1, -2) * abs(scale)
    s, slope = raw, torch.ones_like(raw)
    if softcap:
        s, slope = softcap * torch.tanh(raw / softcap), 1 - torch.tanh(raw / softcap) ** 2
        rough = rough.clamp(max=4 * softcap)
    keep = torch.ones_like(s, dtype=torch.bool) if keep is None else keep.expand(s.shape)
    if bias is not None:
        offset = torch.where(keep, bias.detach().double().expand(s.shape), 0.0)
        s, rough = s + offset, rough + offset.abs()
    s = torch.where(keep, s, 0.0)
    logit = None if sink is None else sink.detach().double().view(1, -1, 1, 1)
    row = weights(record, s, keep, logit, eps)
    a, m, rest, constant, total, inverse = row.a, row.m, row.rest, row.constant, row.total, row.inverse
    f, g, df, dg = row.functions
    out = a @ v
    dp = grad @ v.transpose(-1, -2)
    inner = (a * dp).sum(-1, keepdim=True)
    ds = (df * dp - dg * inner) * inverse

    # what may be off: every factor by a roundoff, the sum by the condition of its terms
    condition = (g.abs().sum(-1, keepdim=True) + rest) * inverse.abs()
    loose = f.abs()
    if record.base == "expm1":  # the difference e^s - 1 may cancel where the sum is large
        loose = torch.where(
            (total * torch.exp(m) >= 1.5) & keep, f.abs() + unit * (torch.exp(s - m) + torch.exp(-m)), f.abs()
        )
    error = unit * (1 + rough + m.abs())  # of a score
    moved = ((df.abs() + dg.abs()) * error).sum(-1, keepdim=True) * inverse.abs()
    a_bound = loose * inverse.abs() * condition
    a_rough = (df.abs() * error * inverse.abs() + a.abs() * moved) * condition
    if record.base == "expm1":
        a_rough = a_rough + (loose - f.abs()) * inverse.abs()
    dp_bound = grad.abs() @ v.abs().transpose(-1, -2)
    inner_bound = (a_bound * dp_bound).sum(-1, keepdim=True)
    ds_bound = (df.abs() * dp_bound + dg.abs() * inner_bound) * inverse.abs() * condition
    more = error + moved * condition + unit * (1 + condition)
    spread = dg.abs() * (a_rough * dp_bound).sum(-1, keepdim=True) * inverse.abs()
    if record.base in ("square", "sigmoid"):  # whose derivative moves with the score as well
        spread = spread + error * 2 * dp_bound * inverse.abs() * keep
    ds_rough = ds_bound * more + spread
    # before the softcap; the bias is added behind it
    raw, raw_bound = ds * slope, ds_bound * slope
    raw_rough = raw_bound * more + spread
    if softcap:
        raw_rough = raw_rough + ds.abs() * error / softcap

    def fold(x):
        return x.unflatten(1, (-1, groups)).sum(2)

    parts = {
        "out": (out, a_bound @ v.abs(), a_rough @ v.abs()),
        "dq": tuple(scale * x @ y for x, y in ((raw, k), (raw_bound, k.abs()), (raw_rough, k.abs()))),
        "dk": tuple(
            scale * fold(x.transpose(-1, -2) @ y) for x, y in ((raw, q), (raw_bound, q.abs()), (raw_rough, q.abs()))
        ),
        "dv": tuple(
            fold(x.transpose(-1, -2) @ y) for x, y in ((a, grad), (a_bound, grad.abs()), (a_rough, grad.abs()))
        ),
    }
    if bias is not None:
        parts["dbias"] = tuple(x.sum_to_size(bias.shape) for x in (ds, ds_bound, ds_rough))
    if sink is not None:
        of_sink = constant * inverse
        parts["dsink"] = tuple(
            (x * of_sink).sum((0, 2, 3))
            for x in (-inner, inner_bound * condition, inner_bound * (more + unit * logit.abs()))
        )
    named = {name: SimpleNamespace(value=x, bound=y.abs(), rough=z.abs()) for name, (x, y, z) in parts.items()}
    return SimpleNamespace(**named)
