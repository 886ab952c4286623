"""Every metric against plain loops over full maps and hidden states, and against hand-made cases."""

import json
import math

import numpy as np
import pytest
import torch

from softpick.analysis.metrics import FloatHistogram, Meter, Moments

LAYERS, HEADS, CHANNELS, HEAD_DIM = 3, 2, 6, 4


def make_weights(t, generator, *, kind="softpick", causal=True):
    """``(L, H, T, T)`` weights with many exact zeros, some empty rows, and a sink in the last head."""
    s = torch.randn(LAYERS, HEADS, t, t, generator=generator) * 2 - 1
    s[:, -1, :, 0] += 4
    s[0, 0, t // 2 :] = -1.0  # rows without any weight
    keep = torch.ones(t, t).tril().bool() if causal else torch.ones(t, t).bool()
    if kind == "softmax":
        return torch.softmax(s.masked_fill(~keep, -math.inf), -1)
    f = torch.where(keep, torch.expm1(s), 0.0)
    a = f.clamp(min=0) / (f.abs().sum(-1, keepdim=True) + 1e-6)
    return a - 0.3 * a.roll(1, 2) * keep if kind == "signed" else a


def make_samples(lengths, seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for t in lengths:
        o = torch.randn(LAYERS, t, HEADS, HEAD_DIM, generator=g)
        o[1, : math.ceil(0.97 * t), 0] = 1e-8  # dead
        x = torch.randn(LAYERS, t, CHANNELS, generator=g) * 2 + 0.5
        x[:, :, 3] *= 4  # outlier feature
        x[1, t // 3, 2] = -5000.0  # massive
        ids = torch.randint(2, 90, (t,), generator=g)
        samples.append({"a": make_weights(t, g, **more), "o": o, "x": x, "ids": ids})
    return samples


def feed(meter, samples, pad=0, side="right", causal=True):
    """One batch, padded with garbage to the longest sample plus ``pad``."""
    longest = max(s["ids"].numel() for s in samples) + pad
    b = len(samples)
    valid = torch.zeros(b, longest, dtype=torch.bool)
    ids = torch.full((b, longest), 99)
    a = torch.full((LAYERS, b, HEADS, longest, longest), 7.0)
    o = torch.full((LAYERS, b, longest, HEADS, HEAD_DIM), 1e9)
    x = torch.full((LAYERS, b, longest, CHANNELS), -1e9)
    for i, s in enumerate(samples):
        t = s["ids"].numel()
        at = slice(0, t) if side == "right" else slice(longest - t, longest)
        valid[i, at], ids[i, at] = True, s["ids"]
        a[:, i, :, at, at], o[:, i, at], x[:, i, at] = s["a"], s["o"], s["x"]
    meter.begin_batch(valid, ids)
    for layer in range(LAYERS):
        meter.attention(layer, a[layer], o[layer], causal=causal)
        meter.hidden(layer, x[layer])


def brute(samples, causal=True):
    """The definitions of docs/metrics.md, written with loops over numpy arrays; independent of the library."""
    out = {}
    rates = {(who, norm, e): [] for who in ("first", "strongest") for norm in (0, 1) for e in (0.2, 0.3)}
    alphas = {key: np.zeros((LAYERS, HEADS)) for key in ("first", "first_n")}
    masses, zero_rows, largest, entropies = [], [], [], []
    zero = tiny = visible = 0
    tiles = {t: [0, 0] for t in ((1, 16), (1, 64), (16, 64), (64, 64), (128, 128))}
    dead = np.zeros((LAYERS, HEADS))
    dormant = np.zeros((LAYERS, HEADS))
    tokens = 0
    is_first = []
    for s in samples:
        t = s["ids"].numel()
        tokens += t
        for layer in range(LAYERS):
            for head in range(HEADS):
                a = s["a"][layer, head].double().numpy()
                see = [[(not causal) or j <= i for j in range(t)] for i in range(t)]
                total = [sum(abs(a[i, j]) for j in range(t) if see[i][j]) for i in range(t)]
                plain, share, live_count = [], [], []
                for k in range(t):
                    queries = [i for i in range(t) if see[i][k]]
                    live = [i for i in queries if total[i] > 0]
                    plain.append(sum(a[i, k] for i in queries) / len(queries))
                    share.append(sum(abs(a[i, k]) / total[i] for i in live) / len(live) if live else 0.0)
                    live_count.append(len(live))
                sees = [sum(see[i][k] for i in range(t)) for k in range(t)]
                enough = [sees[k] >= min(16, max(sees)) for k in range(t)]
                best = max((plain[k], k) for k in range(t) if enough[k])
                best_n = max(share[k] for k in range(t) if enough[k] and live_count[k] >= min(16, max(live_count)))
                is_first.append(best[1] == 0 and best[0] > 0)
                for who, norm, value in (
                    ("first", 0, plain[0]),
                    ("first", 1, share[0]),
                    ("strongest", 0, best[0]),
                    ("strongest", 1, best_n),
                ):
                    for e in (0.2, 0.3):
                        rates[who, norm, e].append(value > e)
                alphas["first"][layer, head] += plain[0] / len(samples)
                alphas["first_n"][layer, head] += share[0] / len(samples)
                for i in range(t):
                    row = [a[i, j] for j in range(t) if see[i][j]]
                    masses.append(sum(row))
                    zero_rows.append(all(w == 0 for w in row))
                    largest.append(max(row))
                    zero += sum(w == 0 for w in row)
                    tiny += sum(abs(w) <= np.float32(1e-5) for w in row)
                    visible += len(row)
                    if total[i] > 0:
                        entropies.append(-sum(abs(w) / total[i] * math.log(abs(w) / total[i]) for w in row if w != 0))
                        dormant[layer, head] += abs(a[i, 0]) / total[i] > 0.9
                for (m, n), count in tiles.items():
                    for r in range(0, t - m + 1, m):
                        for c in range(0, t - n + 1, n):
                            cells = [a[i, j] for i in range(r, r + m) for j in range(c, c + n) if see[i][j]]
                            if cells:
                                count[0] += 1
                                count[1] += all(w == 0 for w in cells)
                o = s["o"][layer, :, head].numpy()
                dead[layer, head] += (np.abs(o).max(1) <= 1e-6).sum()
    out["rates"] = {key: 100 * np.mean(v) for key, v in rates.items()}
    out["alphas"] = alphas
    out["is_first"] = 100 * np.mean(is_first)
    out["mass"], out["zero_rows"], out["largest"] = np.mean(masses), 100 * np.mean(zero_rows), np.mean(largest)
    out["entropy"] = np.mean(entropies)
    out["zero"], out["tiny"] = 100 * zero / visible, 100 * tiny / visible
    out["tiles"] = {f"{m}x{n}": 100 * v[1] / v[0] if v[0] else None for (m, n), v in tiles.items()}
    out["dead"], out["dormant"] = 100 * dead / tokens, 100 * dormant / tokens

    x = [np.concatenate([s["x"][layer].double().numpy() for s in samples]) for layer in range(LAYERS)]

    def kurtosis(v):
        v = v.ravel() - v.mean()
        return (v**4).mean() / (v**2).mean() ** 2

    out["kurtosis"] = kurtosis(np.stack(x))
    out["kurtosis_layers"] = [kurtosis(v) for v in x]
    out["min"], out["max"] = np.min(x), np.max(x)
    out["median_abs"] = [np.median(np.abs(v)) for v in x]
    out["top"] = [sorted(np.abs(v).ravel())[::-1][:3] for v in x]
    out["quartiles"] = [np.percentile(v, [25, 50, 75]) for v in x]
    massive = []
    for n, s in enumerate(samples):
        for layer in range(LAYERS):
            v = s["x"][layer].double().numpy()
            median = np.median(np.abs(v))
            for i, c in np.argwhere((np.abs(v) > 100) & (np.abs(v) >= 1000 * median)):
                massive.append((layer, n, int(i), int(s["ids"][i]), int(c), v[i, c]))
    out["massive"] = massive
    hit = np.stack([np.abs(v) >= 6 for v in x])  # (L, N, C)
    out["features"] = [c for c in range(CHANNELS) if hit[:, :, c].any(1).mean() >= 0.25 and hit[:, :, c].mean() >= 0.06]
    return out


def compare(d, want):
    def approx(v, rel=1e-5):
        return pytest.approx(v, rel=rel, abs=1e-9)

    for who in ("first", "strongest"):
        for norm, name in ((0, "rate"), (1, "rate_normalized")):
            for e in (0.2, 0.3):
                assert d["sink"][who][name][str(e)] == approx(want["rates"][who, norm, e]), (who, name, e)
    np.testing.assert_allclose(d["sink"]["first"]["alpha"], want["alphas"]["first"], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(d["sink"]["first"]["alpha_normalized"], want["alphas"]["first_n"], rtol=1e-5, atol=1e-8)
    assert d["sink"]["strongest"]["is_first"] == approx(want["is_first"])
    assert d["rows"]["mass"] == approx(want["mass"])
    assert d["rows"]["zero"] == approx(want["zero_rows"])
    assert d["rows"]["largest_weight"] == approx(want["largest"])
    assert d["rows"]["entropy"] == approx(want["entropy"])
    assert d["sparsity"]["zero"] == approx(want["zero"])
    assert d["sparsity"]["tiny"] == approx(want["tiny"])
    assert d["sparsity"]["tiles"] == {k: None if v is None else approx(v) for k, v in want["tiles"].items()}
    np.testing.assert_allclose(d["heads"]["dead_tokens_per_head"], want["dead"])
    np.testing.assert_allclose(d["heads"]["dormant_tokens_per_head"], want["dormant"])
    assert d["heads"]["dead"] == (want["dead"] >= 95).sum()
    assert d["heads"]["dormant"] == (want["dormant"] >= 95).sum()
    h = d["hidden"]
    assert h["kurtosis"] == approx(want["kurtosis"], 1e-8)
    assert (h["min"], h["max"]) == (approx(want["min"]), approx(want["max"]))
    for i, layer in enumerate(h["per_layer"]):
        assert layer["kurtosis"] == approx(want["kurtosis_layers"][i], 1e-8)
        assert layer["median_abs"] == approx(want["median_abs"][i], 2e-3)
        assert [abs(r["value"]) for r in layer["top"]] == approx(want["top"][i])
        box = layer["box"]
        assert [box[k] for k in ("q1", "median", "q3")] == pytest.approx(want["quartiles"][i], rel=2e-3, abs=2e-3)
    found = [tuple(r[k] for k in ("layer", "sample", "position", "token_id", "channel")) for r in h["massive"]["list"]]
    assert sorted(found) == sorted(m[:5] for m in want["massive"])
    assert h["massive"]["count"] == len(want["massive"])
    assert [r["channel"] for r in h["outlier_features"]["list"]] == want["features"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["softpick", "softmax", "signed"])
def test_all_metrics_uneven_lengths(kind, side):
    samples = make_samples([40, 5, 70], kind=kind)
    meter = Meter()
    feed(meter, samples, pad=3, side=side)
    d = meter.result().to_dict()
    json.dumps(d, allow_nan=False)
    compare(d, brute(samples))
    assert d["data"]["samples"] == 3
    assert d["data"]["tokens"] == 115
    assert d["data"]["sequence_length"] == {"min": 5, "mean": pytest.approx(115 / 3), "max": 70}


def test_bidirectional():
    samples = make_samples([20, 33], causal=False)
    meter = Meter()
    feed(meter, samples, causal=False)
    d = meter.result().to_dict()
    compare(d, brute(samples, causal=False))
    assert d["data"]["causal"] is False


def test_large_tiles():
    samples = make_samples([130])
    for s in samples:
        s["a"][2, 0] = 0.0  # tiles of every size are empty
    meter = Meter()
    feed(meter, samples)
    d = meter.result().to_dict()
    compare(d, brute(samples))
    assert d["sparsity"]["tiles"]["128x128"] > 0


def test_tiles_longer_than_the_samples_are_null():
    meter = Meter()
    feed(meter, make_samples([20]))
    tiles = meter.result().sparsity["tiles"]
    assert tiles["1x16"] is not None
    assert [tiles[k] for k in ("1x64", "16x64", "64x64", "128x128")] == [None] * 4


def test_several_batches_equal_one():
    samples = make_samples([30, 12, 25, 30], seed=3)
    one, many = Meter(), Meter()
    feed(one, samples)
    for s in samples:
        feed(many, [s], pad=2, side="left")
    a, b = one.result().to_dict(), many.result().to_dict()

    def same(x, y):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            for k in x:
                same(x[k], y[k])
        elif isinstance(x, list):
            assert len(x) == len(y)
            for u, v in zip(x, y, strict=True):
                same(u, v)
        elif isinstance(x, float):
            assert x == pytest.approx(y, rel=1e-9, abs=1e-12)
        else:
            assert x == y

    same(a, b)


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


def test_nan_in_padding_is_harmless():
    samples = make_samples([12])
    meter = Meter()
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1] = False
    meter.begin_batch(valid)
    nan = torch.full((1, HEADS, 12, 12), torch.nan)
    for i in range(LAYERS):
        meter.attention(
            i,
            torch.cat([samples[0]["a"][i][None], nan]),
            torch.cat([samples[0]["o"][i][None], torch.full((1, 12, HEADS, HEAD_DIM), torch.nan)]),
        )
        meter.hidden(i, torch.cat([samples[0]["x"][i][None], torch.full((1, 12, CHANNELS), torch.nan)]))
    d = meter.result().to_dict()
    json.dumps(d, allow_nan=False)
    assert d["data"]["samples"] == 1
