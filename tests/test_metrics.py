"""Every metric against plain loops over full maps and hidden states, and against hand-made cases."""

import json
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from softpick.analysis.metrics import Meter

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


class Between(NamedTuple):
    low: float
    high: float


TILES = ((1, 16), (1, 64), (16, 64), (64, 64), (128, 128))
RATES = [(norm, e) for norm in ("", "_normalized") for e in (0.2, 0.3)]


def brute(samples, causal=True):
    """The definitions of docs/metrics.md, written with loops over numpy arrays; independent of the library."""
    out = {}
    layers, heads = len(samples[0]["a"]), len(samples[0]["a"][0])

    def per_head():
        return [[[] for _ in range(heads)] for _ in range(layers)]

    alpha = {(who, norm): per_head() for who in ("first", "strongest", "last") for norm in ("", "_normalized")}
    longest = max(s["ids"].numel() for s in samples)
    positions = [{"": [], "_normalized": [], "strongest": 0} for _ in range(longest)]
    tokens = {}
    lists = {
        name: per_head() for name in ("mass", "zero", "largest_weight", "entropy", "zeros", "tiny", "dead", "dormant")
    }
    tiles = [{t: [0, 0] for t in TILES} for _ in range(layers)]
    contexts = {}
    is_first, strongest_positions = [], []
    for s in samples:
        t = s["ids"].numel()
        together = np.full(t, -np.inf)
        for layer in range(layers):
            for head in range(heads):
                a = s["a"][layer][head].double().numpy()
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
                best = max((plain[k], -k) for k in range(t) if enough[k])
                best_n = max(share[k] for k in range(t) if enough[k] and live_count[k] >= min(16, max(live_count)))
                is_first.append(best[1] == 0 and best[0] > 0)
                alpha["first", ""][layer][head].append(plain[0])
                alpha["first", "_normalized"][layer][head].append(share[0])
                alpha["strongest", ""][layer][head].append(best[0])
                alpha["strongest", "_normalized"][layer][head].append(best_n)
                if enough[t - 1]:
                    alpha["last", ""][layer][head].append(plain[t - 1])
                    alpha["last", "_normalized"][layer][head].append(share[t - 1])
                for k in range(t):
                    if not enough[k]:
                        continue
                    together[k] = max(together[k], 0) + plain[k]
                    word = tokens.setdefault(int(s["ids"][k]), {"": [], "_normalized": [], "strongest": 0})
                    for place in (positions[k], word):
                        place[""].append(plain[k])
                        place["_normalized"].append(share[k])
                        place["strongest"] += best == (plain[k], -k) and best[0] > 0
                for i in range(t):
                    row = [a[i, j] for j in range(t) if see[i][j]]
                    values = {"mass": sum(row), "largest_weight": max(row), "zero": all(w == 0 for w in row)}
                    for name, value in values.items():
                        lists[name][layer][head].append(value)
                    lists["zeros"][layer][head] += [w == 0 for w in row]
                    lists["tiny"][layer][head] += [abs(w) <= np.float32(1e-5) for w in row]
                    if total[i] > 0:
                        p = [abs(w) / total[i] for w in row if w != 0]
                        lists["entropy"][layer][head].append(-sum(w * math.log(w) for w in p))
                    if see[i][0]:
                        lists["dormant"][layer][head].append(total[i] > 0 and abs(a[i, 0]) / total[i] > 0.9)
                    context = contexts.setdefault(int(math.log2(len(row))), {"mass": [], "largest_weight": []})
                    for name in context:
                        context[name].append(values[name])
                for (m, n), count in tiles[layer].items():
                    for r in range(0, t - m + 1, m):
                        for c in range(0, t - n + 1, n):
                            cells = [a[i, j] for i in range(r, r + m) for j in range(c, c + n) if see[i][j]]
                            if cells:
                                count[0] += 1
                                count[1] += all(w == 0 for w in cells)
                o = s["o"][layer][:, head].numpy()
                lists["dead"][layer][head] += list(np.abs(o).max(1) <= 1e-6)
        strongest_positions.append(int(np.argmax(together)))

    def table(name, factor=1.0):
        return [[factor * np.mean(v) if v else None for v in row] for row in lists[name]]

    def pooled(name, factor=1.0):
        return factor * np.mean([v for row in lists[name] for values in row for v in values])

    def rate(values, e):
        return 100 * np.mean([v > e for v in values]) if values else None

    def places(kept):
        found = {"strongest": [100 * p["strongest"] / (len(samples) * layers * heads) for p in kept]}
        for norm in ("", "_normalized"):
            found[f"alpha{norm}"] = [np.mean(p[norm]) if p[norm] else None for p in kept]
            found[f"rate{norm}"] = {str(e): [rate(p[norm], e) for p in kept] for e in (0.2, 0.3)}
        return found

    out["sink"] = {"thresholds": [0.2, 0.3], "by_position": places(positions)}
    for who in ("first", "strongest", "last"):
        if not alpha[who, ""][0][0]:
            out["sink"][who] = None
            continue
        part = out["sink"][who] = {}
        for norm in ("", "_normalized"):
            values = alpha[who, norm]
            part[f"alpha{norm}"] = [[np.mean(v) for v in row] for row in values]
            part[f"rate{norm}_per_head"] = {str(e): [[rate(v, e) for v in row] for row in values] for e in (0.2, 0.3)}
            every = [v for row in values for h in row for v in h]
            part[f"rate{norm}"] = {str(e): rate(every, e) for e in (0.2, 0.3)}
    out["sink"]["strongest"] |= {"is_first": 100 * np.mean(is_first), "positions": strongest_positions}
    named = sorted(tokens, key=lambda i: -tokens[i]["strongest"])
    out["tokens"] = {i: places([tokens[i]]) for i in named}

    out["rows"] = {
        "mass": pooled("mass"),
        "mass_per_head": table("mass"),
        "zero": pooled("zero", 100),
        "zero_per_head": table("zero", 100),
        "largest_weight": pooled("largest_weight"),
        "largest_weight_per_head": table("largest_weight"),
        "max_weight": max(np.abs(x.numpy()).max() for s in samples for x in s["a"]),
        "entropy": pooled("entropy"),
        "entropy_per_head": table("entropy"),
        "by_context": [
            {"from": 2**b, "to": 2 ** (b + 1) - 1, "rows": len(c["mass"])}
            | {k: np.mean(v) for k, v in c.items()}
            | {
                f"{k}_histogram": np.bincount(np.clip((np.array(v) * 20).astype(int), 0, 19), minlength=20).tolist()
                for k, v in c.items()
            }
            for b, c in sorted(contexts.items())
        ],
    }
    out["sparsity"] = {
        "zero": pooled("zeros", 100),
        "zero_per_head": table("zeros", 100),
        "tiny": pooled("tiny", 100),
        "tiny_per_head": table("tiny", 100),
        "tiles": {},
        "tiles_per_layer": {},
    }
    for m, n in TILES:
        counts = [layer[m, n] for layer in tiles]
        there, empty = (sum(c[k] for c in counts) for k in (0, 1))
        out["sparsity"]["tiles"][f"{m}x{n}"] = 100 * empty / there if there else None
        out["sparsity"]["tiles_per_layer"][f"{m}x{n}"] = [100 * e / n if n else None for n, e in counts]
    out["heads"] = {"total": layers * heads}
    for name in ("dead", "dormant"):
        found = table(name, 100)
        out["heads"][name] = sum(v >= 95 for row in found for v in row)
        out["heads"][f"{name}_percent"] = 100 * out["heads"][name] / (layers * heads)
        out["heads"][f"{name}_tokens_per_head"] = found

    x = [np.concatenate([s["x"][layer].double().numpy() for s in samples]) for layer in range(layers)]

    def kurtosis(v):
        v = v.ravel() - v.mean()
        return (v**4).mean() / (v**2).mean() ** 2

    def moments(v):
        return {"kurtosis": kurtosis(v), "mean": v.mean(), "std": v.std(), "min": v.min(), "max": v.max()}

    def located(n, layer, i, c):
        place = {
            "layer": layer,
            "sample": n,
            "position": int(i),
            "token_id": int(samples[n]["ids"][i]),
            "channel": int(c),
        }
        return {"value": samples[n]["x"][layer][i, c].item(), **place}

    def box(v):
        q1, median, q3 = np.percentile(v, [25, 50, 75])
        # quartiles are known to 0.1 %: a whisker may end at any value next to the true fence
        reach = 1.5 * (q3 - q1)
        insides = [v[(v >= q1 - reach * f) & (v <= q3 + reach * f)] for f in (0.996, 1.004)]
        lows, highs = ([f(inside) for inside in insides] for f in (np.min, np.max))
        ends = {"whisker_low": Between(*sorted(lows)), "whisker_high": Between(*sorted(highs))}
        return {"min": v.min(), "q1": q1, "median": median, "q3": q3, "max": v.max()} | ends

    massive = []
    for n, s in enumerate(samples):
        for layer in range(layers):
            v = s["x"][layer].double().numpy()
            median = np.median(np.abs(v))
            for i, c in np.argwhere((np.abs(v) > 100) & (np.abs(v) >= 1000 * median)):
                massive.append(located(n, layer, i, c) | {"times_median": abs(v[i, c]) / median})
    massive.sort(key=lambda r: -abs(r["value"]))
    per_layer = []
    for layer in range(layers):
        every = [located(n, layer, i, c) for n, s in enumerate(samples) for i, c in np.ndindex(*s["x"][layer].shape)]
        every.sort(key=lambda r: -abs(r["value"]))
        found = {"layer": layer, "top": every[:3], "box": box(x[layer]), "median_abs": np.median(np.abs(x[layer]))}
        per_layer.append(found | moments(x[layer]) | {"massive": sum(m["layer"] == layer for m in massive)})
    hit = np.stack([np.abs(v) >= 6 for v in x])  # (L, N, C)
    features = [
        {"channel": c, "layers": 100 * hit[:, :, c].any(1).mean(), "positions": 100 * hit[:, :, c].mean()}
        for c in range(hit.shape[2])
        if hit[:, :, c].any(1).mean() >= 0.25 and hit[:, :, c].mean() >= 0.06
    ]
    every = np.stack(x)
    out["hidden"] = moments(every) | {
        "max_abs": np.abs(every).max(),
        "per_layer": per_layer,
        "massive": {"count": len(massive), "list": massive[:20]},
        "outlier_features": {"count": len(features), "list": features},
    }
    return out


# read off a histogram whose buckets are 0.1 % wide, so not exact; next to zero they are to a few thousandths of the rest
FROM_HISTOGRAM = ("q1", "median", "q3", "median_abs", "times_median")


def same(got, want, path=""):
    """Everything is there and equal: names, counts and places exactly, numbers to fp32's precision."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), path
        for key in want:
            same(got[key], want[key], f"{path}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), path
        for i, (x, y) in enumerate(zip(got, want, strict=True)):
            same(x, y, f"{path}[{i}]")
    elif isinstance(want, Between):
        margin = 2e-3 * max(abs(want.low), abs(want.high))
        assert want.low - margin <= got <= want.high + margin, path
    elif want is None or isinstance(want, int | np.integer):
        assert got == want, path
    else:
        near = path.rsplit(".", 1)[-1] in FROM_HISTOGRAM
        assert got == pytest.approx(float(want), rel=2e-3 if near else 1e-5, abs=2e-3 if near else 1e-8), path


def compare(d, want):
    """All of ``to_dict()`` but ``data`` and the largest score, which needs queries and keys."""
    rows = {k: v for k, v in d["rows"].items() if not k.startswith("max_score")}
    sink = {k: v for k, v in d["sink"].items() if k != "by_token"}
    same(sink, want["sink"], "sink")
    same(rows, want["rows"], "rows")
    for part in ("sparsity", "heads", "hidden"):
        same(d[part], want[part], part)
    listed = d["sink"]["by_token"]
    assert len(listed) == min(20, sum(v["strongest"][0] > 0 for v in want["tokens"].values()))
    shares = [row["strongest"] for row in listed]
    assert shares == sorted(shares, reverse=True)
    assert min(shares) >= max(
        (v["strongest"][0] for i, v in want["tokens"].items() if all(i != r["token_id"] for r in listed)), default=0
    )
    for row in listed:
        flat = {
            k: {e: [x] for e, x in v.items()} if isinstance(v, dict) else [v] for k, v in row.items() if k != "token_id"
        }
        same(flat, want["tokens"][row["token_id"]], f"token {row['token_id']}")


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


@pytest.mark.parametrize("normalizer", ["softmax", "softpick"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_model_by_brute_force(kind, normalizer):
    """From transformers' own full maps, hidden states and head outputs of a tiny decoder and a tiny encoder."""
    transformers = pytest.importorskip("transformers")
    from softpick.analysis import measure
    from softpick.integrations.transformers import register

    register()
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    shape |= {"max_position_embeddings": 32, "initializer_range": 0.8}
    implementation = "eager" if normalizer == "softmax" else normalizer
    if kind == "llama":
        config = transformers.LlamaConfig(**shape, num_key_value_heads=1, bos_token_id=1, pad_token_id=0)
        model = transformers.LlamaModel._from_config(config, attn_implementation=implementation).eval()
        layers, project = model.layers, lambda layer: layer.self_attn.o_proj
    else:
        model = transformers.BertModel._from_config(
            transformers.BertConfig(**shape), attn_implementation=implementation
        ).eval()
        layers, project = model.encoder.layer, lambda layer: layer.attention.output.dense
    with torch.no_grad():  # a channel that is large everywhere, and one that is massive
        norm = layers[1].post_attention_layernorm if kind == "llama" else layers[1].output.LayerNorm
        norm.weight[3] *= 30
        (model.embed_tokens if kind == "llama" else model.embeddings.word_embeddings).weight[7, 5] = 3e5
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[1, 17:], mask[2, :4] = 0, 0
    ids = torch.randint(2, 40, (3, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 9] = 7
    hidden, outputs = [], []
    for layer in layers:
        layer.register_forward_hook(lambda m, i, o: hidden.append(o if torch.is_tensor(o) else o[0]))
        project(layer).register_forward_pre_hook(lambda m, i: outputs.append(i[0].view(-1, 24, 2, 4)))
    with torch.no_grad():
        maps = model(ids, attention_mask=mask, output_attentions=True).attentions
    samples = []
    for n in range(3):
        at = mask[n].nonzero().flatten()
        samples.append(
            {
                "ids": ids[n, at],
                "a": torch.stack([a[n][:, at][:, :, at] for a in maps]),
                "o": torch.stack([o[n, at] for o in outputs]),
                "x": torch.stack([x[n, at] for x in hidden]),
            }
        )
    d = measure(
        model, [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]
    ).to_dict()
    compare(d, brute(samples, causal=kind == "llama"))
    assert d["data"]["sequence_length"] == {"min": 17, "mean": pytest.approx(61 / 3), "max": 24}
    assert kind == "bert" or d["hidden"]["massive"]["count"] > 0
    assert d["hidden"]["outlier_features"]["count"] > 0


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
