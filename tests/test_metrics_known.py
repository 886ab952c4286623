"""Metrics of maps and hidden states whose figures are known, their building blocks, and errors."""

import json

import numpy as np
import pytest
import torch

from softpick.analysis.metrics import FloatHistogram, Meter, Moments

# Hand-made cases


def one_sample(a, o=None, x=None, ids=None):
    """Meter over one layer of one sample from ``a (H, T, T)``."""
    h, t, _ = a.shape
    meter = Meter()
    meter.begin_batch(torch.ones(1, t, dtype=torch.bool), ids)
    meter.attention(0, a[None], torch.ones(1, t, h, 2) if o is None else o)
    if x is not None:
        meter.hidden(0, x)
    return meter.result()


def test_known_sink():
    t = 10
    a = torch.zeros(2, t, t)
    a[0, :, 0] = 0.25  # plain alpha 0.25; all of the mass
    a[1] = torch.eye(t) * 0.5  # alpha of the first token 0.05; of its mass 0.1
    m = one_sample(a)
    assert m.sink["first"]["alpha"] == [[pytest.approx(0.25), pytest.approx(0.05)]]
    assert m.sink["first"]["alpha_normalized"] == [[pytest.approx(1.0), pytest.approx(0.1)]]
    assert m.sink["first"]["rate"] == {"0.2": 50.0, "0.3": 0.0}
    assert m.sink["first"]["rate_normalized"] == {"0.2": 50.0, "0.3": 50.0}
    assert m.rows["mass"] == pytest.approx((0.25 + 0.5) / 2)
    assert m.heads["dormant"] == 1
    # exact zeros: a column of T and a diagonal of T survive in a triangle of T (T + 1) / 2
    assert m.sparsity["zero"] == pytest.approx(100 * (1 - t / (t * (t + 1) / 2)))


def test_rate_is_of_samples_not_of_the_mean():
    """Two samples with alpha 0.5 and 0: the rate at 0.2 is 50 %, though their mean 0.25 exceeds 0.2."""
    meter = Meter()
    a = torch.zeros(2, 1, 8, 8)
    a[0, 0, :, 0] = 0.5
    meter.begin_batch(torch.ones(2, 8, dtype=torch.bool))
    meter.attention(0, a, torch.ones(2, 8, 1, 2))
    m = meter.result()
    assert m.sink["first"]["rate"]["0.2"] == 50.0
    assert m.sink["first"]["alpha"] == [[pytest.approx(0.25)]]


def test_strongest_token():
    a = torch.zeros(1, 40, 40)
    a[0, 3:, 3] = 0.9
    a[0, 39, 39] = 1.0  # seen by one query only: no candidate
    m = one_sample(a)
    assert m.sink["strongest"]["alpha"] == [[pytest.approx(0.9)]]
    assert m.sink["strongest"]["is_first"] == 0.0
    assert m.sink["first"]["rate"]["0.2"] == 0.0


def test_all_zero():
    m = one_sample(torch.zeros(2, 20, 20), o=torch.zeros(1, 20, 2, 4))
    d = m.to_dict()
    json.dumps(d, allow_nan=False)
    assert d["rows"] | {"by_context": 0} == d["rows"] | {"mass": 0.0, "zero": 100.0, "entropy": None, "by_context": 0}
    assert d["sparsity"]["zero"] == d["sparsity"]["tiles"]["1x16"] == 100.0
    assert d["heads"]["dead_percent"] == 100.0
    assert d["heads"]["dormant"] == 0
    assert d["sink"]["first"]["rate_normalized"]["0.2"] == 0.0


@pytest.mark.parametrize(("dead_tokens", "expected"), [(18, 0), (19, 1), (20, 1)])
def test_dead_head_boundary(dead_tokens, expected):
    o = torch.ones(1, 20, 1, 4)
    o[0, :dead_tokens] = 1e-6
    assert one_sample(torch.eye(20)[None], o=o).heads["dead"] == expected


def test_massive_activation():
    x = torch.full((1, 10, 4), 0.1)
    x[0, 3, 2] = -101.0
    x[0, 5, 1] = 99.0  # not above 100
    m = one_sample(torch.eye(10)[None], x=x, ids=torch.arange(10)[None] + 50)
    massive = m.hidden["massive"]
    assert massive["count"] == 1
    assert massive["list"] == [
        {
            "value": -101.0,
            "layer": 0,
            "sample": 0,
            "position": 3,
            "token_id": 53,
            "channel": 2,
            "times_median": pytest.approx(1010),
        }
    ]
    x[x == 0.1] = 0.2  # now only 505 times the median
    assert one_sample(torch.eye(10)[None], x=x).hidden["massive"]["count"] == 0


def test_by_context():
    a = torch.ones(1, 8, 8).tril() * 0.1  # row i has mass 0.1 (i + 1)
    rows = one_sample(a).rows["by_context"]
    assert [(r["from"], r["to"], r["rows"]) for r in rows] == [(1, 1, 1), (2, 3, 2), (4, 7, 4), (8, 15, 1)]
    assert [r["mass"] for r in rows] == [pytest.approx(v) for v in (0.1, 0.25, 0.55, 0.8)]
    assert all(sum(r["mass_histogram"]) == r["rows"] == sum(r["largest_weight_histogram"]) for r in rows)


# Building blocks


def test_moments_are_exact_far_from_zero():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=g, dtype=torch.float64) ** 3 + 1e6
    m = Moments()
    for part in x.split(700):
        m.update(part)
    v = x.numpy() - x.numpy().mean()
    assert m.kurtosis == pytest.approx((v**4).mean() / (v**2).mean() ** 2, rel=1e-6)
    assert (m.n, m.min, m.max) == (5000, x.min().item(), x.max().item())


def test_moments_of_a_constant():
    m = Moments()
    m.update(torch.full((10,), 3.0))
    assert m.kurtosis is None
    assert m.variance == 0.0


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_histogram_quantiles(scale):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4000, generator=g) * scale
    h = FloatHistogram()
    for part in x.split(1000):
        h.update(part)
    p = [0.01, 0.25, 0.5, 0.75, 0.99]
    np.testing.assert_allclose(h.quantiles(p), np.quantile(x.double().numpy(), p), rtol=2e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(
        h.magnitudes().quantiles(p), np.quantile(x.abs().double().numpy(), p), rtol=2e-3, atol=1e-4 * scale
    )


def test_box_whiskers():
    x = torch.cat([torch.linspace(-1, 1, 101), torch.tensor([1.9, 9.0])])
    h = FloatHistogram()
    h.update(x)
    q1, median, q3 = np.percentile(x.numpy(), [25, 50, 75])
    inside = x[(x >= q1 - 1.5 * (q3 - q1)) & (x <= q3 + 1.5 * (q3 - q1))]
    box = h.box(x.min().item(), x.max().item())
    want = {
        "min": -1.0,
        "whisker_low": inside.min().item(),
        "q1": q1,
        "median": median,
        "q3": q3,
        "whisker_high": inside.max().item(),
        "max": 9.0,
    }
    assert box == {k: pytest.approx(v, rel=2e-3, abs=1e-6) for k, v in want.items()}


# Errors


def test_errors():
    meter = Meter()
    with pytest.raises(ValueError, match="no data"):
        meter.result()
    with pytest.raises(RuntimeError, match="begin_batch"):
        meter.hidden(0, torch.zeros(1, 2, 3))
    with pytest.raises(TypeError, match="valid: expected a boolean"):
        meter.begin_batch(torch.ones(1, 4))
    meter.begin_batch(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"weights: expected \(B, H, T, T\)"):
        meter.attention(0, torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"outputs: expected \(B, T, H, Dv\)"):
        meter.attention(0, torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 2))
    with pytest.raises(ValueError, match="layer 1: the hidden states contain NaN"):
        meter.hidden(1, torch.full((1, 4, 3), torch.nan))
    with pytest.raises(ValueError, match="layer 2: attention weights or outputs contain NaN"):
        meter.attention(2, torch.full((1, 2, 4, 4), torch.nan), torch.zeros(1, 4, 2, 2))
