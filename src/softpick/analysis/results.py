"""From what was accumulated to the plain numbers, lists and dicts of ``docs/metrics.md``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from softpick.analysis import records
from softpick.analysis.layers import KEY_SUMS, AttentionLayer, HiddenLayer
from softpick.analysis.records import (
    MAX_LISTED,
    OUTLIER_LAYERS,
    OUTLIER_POSITIONS,
    SINK_THRESHOLDS,
    TILES,
    HeadSum,
    HiddenSum,
)
from softpick.analysis.streams import Moments

__all__ = ["head_sums", "hidden_result", "hidden_sums", "rows_result", "sink_result", "sparsity_result"]


def head_sums(layers: list[AttentionLayer]) -> dict[str, dict[str, Any]]:
    """The results of every record whose accumulation is a :class:`HeadSum`, by part of the measurements."""
    found: dict[str, dict[str, Any]] = {}
    for metric in records.METRICS:
        how = metric.accumulate
        if not isinstance(how, HeadSum):
            continue
        part, name = metric.path[-2:]
        sums = [how.factor * x.sums[metric.key] for x in layers]
        counts = [x.sums[f"per {how.per}"] for x in layers]
        into = found.setdefault(part, {})
        if how.at_least is None:
            total = sum(float(n.sum()) for n in counts)
            into[name] = sum(float(s.sum()) for s in sums) / total if total else None
            into[f"{name}_per_head"] = [_ratios(s, n) for s, n in zip(sums, counts, strict=True)]
            continue
        name = name.removesuffix("_percent")
        shares = [100.0 * s / n.clamp(min=1) for s, n in zip(sums, counts, strict=True)]
        # a share of two counts may miss the bound by one rounding
        into[name] = sum(int((share >= how.at_least - 1e-9).sum()) for share in shares)
        into[f"{name}_percent"] = 100.0 * into[name] / sum(x.heads for x in layers)
        into[f"{name}_tokens_per_head"] = _table(shares)
    return found


def hidden_sums(layers: list[HiddenLayer]) -> dict[str, Any]:
    """The results of every record whose accumulation is a :class:`HiddenSum`."""
    found: dict[str, Any] = {}
    for metric in records.METRICS:
        how = metric.accumulate
        if isinstance(how, HiddenSum):
            name = metric.path[-1]
            counts = [x.entries if how.per == "entries" else x.tokens for x in layers]
            found[name] = how.factor * sum(x.sums[metric.key] for x in layers) / sum(counts)
            found[f"{name}_per_layer"] = [
                how.factor * x.sums[metric.key] / n for x, n in zip(layers, counts, strict=True)
            ]
    return found


def sink_result(
    layers: list[AttentionLayer], positions: list[int], by_position: Tensor, by_token: Tensor, named: Iterable[int]
) -> dict[str, Any]:
    """Sinks.

    Args:
        layers: all of them.
        positions: of each sample, the key with the largest alpha averaged over layers and heads.
        by_position: ``(len(KEY_SUMS), T)``.
        by_token: ``(len(KEY_SUMS), V)``.
        named: ids of tokens that are listed in any case.
    """
    result: dict[str, Any] = {"thresholds": list(SINK_THRESHOLDS)}
    for token in ("first", "strongest", "last"):
        samples = [x.last_samples if token == "last" else x.samples for x in layers]
        if not any(samples):
            result[token] = None
            continue

        def tables(name: str, samples: list[int] = samples) -> list[Tensor]:
            zeros = [torch.zeros(x.heads, dtype=torch.float64) for x in layers]
            return [x.sums.get(name, z) / max(n, 1) for x, z, n in zip(layers, zeros, samples, strict=True)]

        part: dict[str, Any] = {}
        for suffix in ("", "_normalized"):
            rates = {str(e): tables(f"sink_{token}{suffix}_{e}") for e in SINK_THRESHOLDS}
            part[f"rate{suffix}"] = {e: _mean(rate, 100.0) for e, rate in rates.items()}
            part[f"rate{suffix}_per_head"] = {e: _table([100.0 * x for x in rate]) for e, rate in rates.items()}
            part[f"alpha{suffix}"] = _table(tables(f"alpha_{token}{suffix}"))
        result[token] = part
    result["strongest"]["is_first"] = _mean([x.sums["strongest_is_first"] / x.samples for x in layers], 100.0)
    result["strongest"]["positions"] = positions
    pairs = sum(x.samples * x.heads for x in layers)
    result["by_position"] = _key_table(by_position, pairs)
    result["by_token"] = _token_result(by_token, named, pairs)
    return result


def _token_result(sums: Tensor, named: Iterable[int], pairs: int) -> list[dict[str, Any]]:
    """The named tokens that occur, then those that are strongest most often."""
    strongest = sums[KEY_SUMS.index("strongest")]
    ranked = strongest.argsort(descending=True, stable=True)[:MAX_LISTED].tolist()
    seen = [t for t in named if t < sums.shape[1] and sums[0, t] > 0]
    chosen = list(dict.fromkeys([*seen, *(t for t in ranked if strongest[t] > 0)]))[:MAX_LISTED]
    table = _key_table(sums[:, chosen], pairs)
    return [
        {
            "token_id": token,
            **{k: {e: r[i] for e, r in v.items()} if isinstance(v, dict) else v[i] for k, v in table.items()},
        }
        for i, token in enumerate(chosen)
    ]


def rows_result(layers: list[AttentionLayer]) -> dict[str, Any]:
    """Largest weights and scores, and rows by context length."""
    scores = [x.max_score for x in layers]
    contexts: dict[int, dict[str, Any]] = {}
    for x in layers:
        for b, bucket in x.contexts.items():
            into = contexts.setdefault(b, dict.fromkeys(bucket, 0))
            for name, value in bucket.items():
                into[name] = into[name] + value
    return {
        "max_weight": max(x.max_weight.max().item() for x in layers),
        "max_score": max((s for s in scores if s is not None), default=None),
        "max_score_per_layer": scores,
        "by_context": [
            {
                "from": 2**b,
                "to": 2 ** (b + 1) - 1,
                "rows": v["rows"],
                "mass": v["mass"] / v["rows"],
                "largest_weight": v["largest"] / v["rows"],
                "mass_histogram": v["mass_h"].tolist(),
                "largest_weight_histogram": v["largest_h"].tolist(),
            }
            for b, v in sorted(contexts.items())
        ],
    }


def sparsity_result(layers: list[AttentionLayer]) -> dict[str, Any]:
    """Empty tiles."""
    tiles, tiles_per_layer = {}, {}
    for tile in TILES:
        name = f"{tile[0]}x{tile[1]}"
        empty = [x.sums[f"tile_{name}"].sum().item() for x in layers]
        there = [x.tiles[tile] * x.heads for x in layers]
        tiles[name] = 100.0 * sum(empty) / sum(there) if sum(there) else None
        tiles_per_layer[name] = [100.0 * e / n if n else None for e, n in zip(empty, there, strict=True)]
    return {"tiles": tiles, "tiles_per_layer": tiles_per_layer}


def hidden_result(states: Mapping[int, HiddenLayer], positions: int) -> dict[str, Any]:
    """The results about the residual stream; ``positions`` is how many tokens were seen."""
    pooled = Moments()
    per_layer, massive = [], []
    massive_count = 0
    indices = sorted(states)
    for i in indices:
        state = states[i]
        pooled.merge(state.moments)
        massive += state.massive
        massive_count += state.massive_count
        m = state.moments
        per_layer.append(
            {
                "layer": i,
                "kurtosis": m.kurtosis,
                "mean": m.mean,
                "std": math.sqrt(m.m2 / m.n),
                "min": m.min,
                "max": m.max,
                "median_abs": state.histogram.magnitudes().quantiles([0.5])[0],
                "top": state.top,
                "box": state.histogram.box(m.min, m.max),
                "massive": state.massive_count,
            }
        )
    return {
        "kurtosis": pooled.kurtosis,
        "mean": pooled.mean,
        "std": math.sqrt(pooled.m2 / pooled.n),
        "min": pooled.min,
        "max": pooled.max,
        "max_abs": max(abs(pooled.min), abs(pooled.max)),
        "per_layer": per_layer,
        "massive": {
            "count": massive_count,
            "list": sorted(massive, key=lambda r: -abs(r["value"]))[:MAX_LISTED],
        },
        "outlier_features": _outlier_features([states[i] for i in indices], positions),
        **hidden_sums([states[i] for i in indices]),
    }


def _outlier_features(layers: list[HiddenLayer], positions: int) -> dict[str, Any]:
    counts = torch.stack([x.outliers for x in layers])  # (L, C)
    in_layers = 100.0 * (counts > 0).double().mean(0)
    in_positions = 100.0 * counts.sum(0).double() / (len(layers) * positions)
    hits = (in_layers >= OUTLIER_LAYERS - 1e-9) & (in_positions >= OUTLIER_POSITIONS - 1e-9)
    return {
        "count": int(hits.sum()),
        "list": [
            {"channel": c, "layers": in_layers[c].item(), "positions": in_positions[c].item()}
            for c in hits.nonzero().flatten().tolist()
        ],
    }


def _mean(rows: list[Tensor], factor: float = 1.0) -> float:
    """Mean over layers and heads."""
    return factor * torch.cat(rows).mean().item()


def _table(rows: list[Tensor]) -> list[list[float]]:
    return [row.tolist() for row in rows]


def _key_table(sums: Tensor, pairs: int) -> dict[str, Any]:
    """Columns of ``sums (len(KEY_SUMS), N)`` as lists; null where no key had enough queries.

    ``pairs`` is how many (sample, layer, head) there are: what ``strongest`` is a share of.
    """
    row = {name: sums[i] for i, name in enumerate(KEY_SUMS)}

    def mean(name: str, factor: float = 1.0) -> list[float | None]:
        rows = zip(row[name].tolist(), row["count"].tolist(), strict=True)
        return [factor * value / n if n else None for value, n in rows]

    table: dict[str, Any] = {"strongest": [100.0 * v / pairs for v in row["strongest"].tolist()]}
    for suffix in ("", "_normalized"):
        table[f"alpha{suffix}"] = mean(f"alpha{suffix}")
        table[f"rate{suffix}"] = {str(e): mean(f"rate{suffix}_{e}", 100.0) for e in SINK_THRESHOLDS}
    return table


def _ratios(sums: Tensor, counts: Tensor) -> list[float | None]:
    return [s / n if n else None for s, n in zip(sums.tolist(), counts.tolist(), strict=True)]
