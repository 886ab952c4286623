"""A metric is one record: added to the table, it is accumulated, results, and stands in the summary and the definitions."""

import json
import re

import pytest
import torch

from softpick.analysis import records, report
from softpick.analysis.metrics import Meter, load_meters, save_meters
from softpick.analysis.records import HeadSum, HiddenSum, Metric

OVER_HALF = Metric(
    "over_half",
    "Weights above a half",
    "%",
    "Attention sinks",
    ("measurements", "rows", "over_half"),
    ".1f",
    "Share of queries that give more than half of a weight to one key.",
    accumulate=HeadSum(lambda r: (r.weights > 0.5).any(2).sum(1), per="rows", factor=100.0),
)
SIZE = Metric(
    "mean_abs",
    "Mean |x|",
    "",
    "Hidden states",
    ("measurements", "hidden", "mean_abs"),
    ".3f",
    "Mean of |x| over the residual stream.",
    accumulate=HiddenSum(lambda x: x.abs().double().sum(), per="entries"),
)
SURE = Metric(
    "sure_heads",
    "Sure heads",
    "%",
    "Heads",
    ("measurements", "heads", "sure_percent"),
    ".1f",
    "Heads that give more than half of a weight to one key at 60 % of queries.",
    accumulate=HeadSum(lambda r: (r.weights > 0.5).any(2).sum(1), per="rows", at_least=60.0),
)


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setattr(records, "METRICS", (*records.METRICS, OVER_HALF, SIZE, SURE))


def test_a_record_is_all_that_a_metric_needs(added, tmp_path):
    g = torch.Generator().manual_seed(0)
    lengths, heads = (9, 6), 3
    meter = Meter()
    seen, over = torch.zeros(2, heads), torch.zeros(2, heads)
    hidden = []
    for number, t in enumerate(lengths):
        if number:  # a meter that goes on in another process has them too
            save_meters({"": meter}, 1, tmp_path / "meter.pt")
            meter = load_meters(tmp_path / "meter.pt")[0][""]
        meter.begin_batch(torch.ones(1, t, dtype=torch.bool))
        for layer in range(2):
            scores = 1.5 * torch.randn(heads, t, t, generator=g)
            a = torch.softmax(scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf), -1)
            x = torch.randn(1, t, 4, generator=g)
            meter.attention(layer, a[None], torch.randn(1, t, heads, 2, generator=g))
            meter.hidden(layer, x)
            hidden.append((layer, x))
            for head in range(heads):
                for query in range(t):
                    seen[layer, head] += 1
                    over[layer, head] += any(a[head, query, key] > 0.5 for key in range(query + 1))
    d = meter.result().to_dict()
    assert d["rows"]["over_half"] == pytest.approx(100 * float(over.sum() / seen.sum()))
    assert torch.tensor(d["rows"]["over_half_per_head"]).allclose(100 * over / seen)
    layers = [torch.cat([x.flatten() for layer, x in hidden if layer == i]).abs().mean().item() for i in range(2)]
    assert d["hidden"]["mean_abs_per_layer"] == pytest.approx(layers, rel=1e-6)
    assert d["hidden"]["mean_abs"] == pytest.approx(sum(layers) / 2, rel=1e-6)
    assert d["heads"]["sure"] == int((over / seen >= 0.6).sum())
    assert 0 < d["heads"]["sure"] < 6
    assert d["heads"]["sure_percent"] == pytest.approx(100 * d["heads"]["sure"] / 6)

    made = {"title": "t", "runs": [{"normalizer": "softmax", "measurements": d}]}
    rows = dict(report.summary_rows(made))
    assert rows["Weights above a half"] == [f"{d['rows']['over_half']:.1f} %"]
    assert rows["Mean |x|"] == [f"{d['hidden']['mean_abs']:.3f}"]
    assert rows["Sure heads"] == [f"{d['heads']['sure_percent']:.1f} %"]
    payload = json.loads(re.search(r'id="data">(.*?)</script>', report.render(made), re.S)[1])
    assert [d["definition"] for d in payload["definitions"] if d["key"] == "over_half"] == [OVER_HALF.definition]


def test_records_that_nothing_was_added_to(tmp_path):
    """Without the three, nothing of them is in the measurements: the first test cannot pass by accident."""
    meter = Meter()
    meter.begin_batch(torch.ones(1, 4, dtype=torch.bool))
    meter.attention(0, torch.full((1, 1, 4, 4), 0.25), torch.ones(1, 4, 1, 2))
    meter.hidden(0, torch.ones(1, 4, 2))
    d = meter.result().to_dict()
    assert "over_half" not in d["rows"]
    assert "mean_abs" not in d["hidden"]
