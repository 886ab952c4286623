"""The metrics exactly at their thresholds, over samples without a real position, and what a meter refuses."""

import pytest
import torch
from test_metrics_known import one_sample

from softpick.analysis.metrics import Meter, load_meters, save_meters


def fed(valid, ids=None, heads=1, layers=1, channels=3, seed=0):
    """A meter over random maps; positions that are not real hold large numbers."""
    g = torch.Generator().manual_seed(seed)
    b, t = valid.shape
    meter = Meter()
    meter.begin_batch(valid, ids)
    for layer in range(layers):
        a = torch.rand(b, heads, t, t, generator=g)
        o, x = torch.rand(b, t, heads, 2, generator=g), torch.randn(b, t, channels, generator=g)
        x[~valid] = 1e6
        meter.attention(layer, a, o)
        meter.hidden(layer, x)
    return meter


def rounded(x):
    """Numbers to ten digits: the order of a sum may differ."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.10g}") if isinstance(x, float) else x


@pytest.mark.parametrize("where", [0, 1, 2])
def test_samples_that_are_all_padding_count_nowhere(where):
    """Before, between and after real samples; what a row of the list says about its sample counts real ones."""
    t = 20
    valid = torch.ones(3, t, dtype=torch.bool)
    valid[where] = False
    ids = torch.arange(3 * t).view(3, t)
    g = torch.Generator().manual_seed(1)
    a, o, x = (
        torch.rand(3, 2, t, t, generator=g),
        torch.rand(3, t, 2, 4, generator=g),
        torch.randn(3, t, 5, generator=g),
    )
    x[[b for b in range(3) if b != where][1], 7, 2] = 5e5  # massive, in the second real sample

    def measure(rows, pieces=False):
        meter = Meter()
        meter.begin_batch(valid[rows], ids[rows])
        if pieces:  # a sample and a head at a time
            for i in range(len(rows)):
                for h in range(2):
                    one = a[rows][i : i + 1, h : h + 1], o[rows][i : i + 1, :, h : h + 1]
                    meter.attention(0, *one, first_sample=i, first_head=h, heads=2)
        else:
            meter.attention(0, a[rows], o[rows])
        meter.hidden(0, x[rows])
        return rounded(meter.result().to_dict())

    real = measure([b for b in range(3) if b != where])
    assert measure([0, 1, 2]) == real
    assert measure([0, 1, 2], pieces=True) == real
    assert real["data"]["samples"] == 2
    assert real["data"]["tokens"] == 2 * t
    assert real["hidden"]["massive"]["list"][0]["sample"] == 1


@pytest.mark.parametrize(
    ("value", "median", "count"),
    [(1000.0, 1.0, 1), (999.0, 1.0, 0), (500.0, 0.5, 1), (100.0, 0.01, 0), (101.0, 0.0, 1)],
)
def test_massive_is_at_least_1000_times_the_median_and_above_100(value, median, count):
    x = torch.full((1, 10, 4), median)
    x[0, 3, 2] = value
    massive = one_sample(torch.eye(10)[None], x=x).hidden["massive"]
    assert massive["count"] == count
    if count:
        assert massive["list"][0]["value"] == value
        assert massive["list"][0].get("times_median") == (value / median if median else None)


def test_the_list_of_massive_activations_has_the_20_largest():
    x = torch.full((1, 10, 4), 1e-3)
    x[0].view(-1)[:16] = -torch.arange(200.0, 216.0)
    meter = Meter()
    meter.begin_batch(torch.ones(1, 10, dtype=torch.bool))
    meter.attention(0, torch.eye(10)[None, None], torch.ones(1, 10, 1, 2))
    meter.hidden(0, x)
    meter.hidden(1, 2 * x)
    massive = meter.result().hidden["massive"]
    assert massive["count"] == 32
    assert [row["value"] for row in massive["list"]] == sorted(
        [*(-2 * v for v in range(200, 216)), *(-v for v in range(212, 216))]
    )
    assert [row["layer"] for row in massive["list"]] == [1] * 16 + [0] * 4


@pytest.mark.parametrize(
    ("value", "rates"),
    [(0.25, {"0.2": 100.0, "0.3": 0.0}), (0.125, {"0.2": 0.0, "0.3": 0.0}), (0.5, {"0.2": 100.0, "0.3": 100.0})],
)
def test_sink_rates(value, rates):
    a = torch.zeros(1, 32, 32)
    a[0, :, 0] = value
    assert one_sample(a).sink["first"]["rate"] == rates


@pytest.mark.parametrize(("positions", "layers", "hit"), [(1, 1, True), (1, 0, False), (2, 1, True)])
def test_outlier_features_at_6(positions, layers, hit):
    """6.0 and more at 6 % of positions and in 25 % of layers: 4 layers of 4 positions, 16 places, 1 is 6.25 %."""
    meter = Meter()
    meter.begin_batch(torch.ones(1, 4, dtype=torch.bool))
    for layer in range(4):
        x = torch.zeros(1, 4, 3)
        x[0, :positions, 1] = 6.0 if layer < layers else 5.999
        meter.attention(layer, torch.eye(4)[None, None], torch.ones(1, 4, 1, 2))
        meter.hidden(layer, x)
    found = meter.result().hidden["outlier_features"]
    assert found["count"] == int(hit)
    if hit:
        assert found["list"] == [{"channel": 1, "layers": 25.0, "positions": 100.0 * positions / 16}]


@pytest.mark.parametrize("weight", [0.0, 1e-5, 2e-5])
def test_zero_and_tiny_weights(weight):
    """Shares of visible weights that are exactly 0, and at most 1e-5."""
    a = torch.full((1, 16, 16), 0.5).tril()
    a[0, 8:, 0] = weight
    sparsity = one_sample(a).sparsity
    visible = 16 * 17 / 2
    assert sparsity["zero"] == pytest.approx(100 * 8 / visible if weight == 0 else 0.0)
    tiny = next(v for k, v in sparsity.items() if k not in ("zero", "tiles") and isinstance(v, float))
    assert tiny == pytest.approx(100 * 8 / visible if weight <= 1e-5 else 0.0)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_single_weight(weight):
    """One head of one layer that sees one key."""
    sparsity = one_sample(torch.full((1, 1, 1), weight)).sparsity
    assert sparsity["zero"] == (100.0 if weight == 0 else 0.0)


def test_first_tokens_are_counted():
    valid = torch.ones(5, 4, dtype=torch.bool)
    valid[4, :2] = False
    ids = torch.tensor([[7, 1, 1, 1], [5, 7, 7, 7], [7, 2, 2, 2], [5, 5, 5, 5], [9, 9, 7, 9]])
    meter = fed(valid[:2], ids[:2])
    meter.begin_batch(valid[2:], ids[2:])
    meter.attention(0, torch.rand(3, 1, 4, 4), torch.rand(3, 4, 1, 2))
    bos = meter.result().data["bos"]
    assert (bos["first_token_id"], bos["first_token_share"]) == (7, pytest.approx(60.0))


def test_a_saved_meter_goes_on(tmp_path):
    valid = torch.ones(2, 5, dtype=torch.bool)
    meter = fed(valid, torch.ones(2, 5, dtype=torch.long), layers=2)
    save_meters({"": meter}, 3, tmp_path / "meter.pt")
    found, batches = load_meters(tmp_path / "meter.pt")
    assert batches == 3
    assert found[""].result().to_dict() == meter.result().to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["meter.pt"]


WEIGHTS, OUTPUTS = torch.rand(2, 3, 4, 4), torch.rand(2, 4, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: m.begin_batch(torch.ones(4, dtype=torch.bool)), TypeError, "valid: expected a boolean"),
        (lambda m: m.begin_batch(torch.ones(2, 4)), TypeError, "valid: expected a boolean"),
        (lambda m: m.begin_batch(torch.ones(2, 4).bool(), torch.ones(2, 3)), ValueError, "input_ids: expected the shape"),
        (lambda m: m.attention(0, WEIGHTS[0], OUTPUTS), ValueError, "weights: expected"),
        (lambda m: m.attention(0, WEIGHTS[:, :, :3], OUTPUTS), ValueError, "weights: expected"),
        (lambda m: m.attention(0, WEIGHTS[:1], OUTPUTS[:1]), ValueError, "weights: expected"),
        (lambda m: m.attention(0, WEIGHTS, OUTPUTS, first_sample=1), ValueError, "weights: expected"),
        (lambda m: m.attention(0, WEIGHTS, OUTPUTS[0]), ValueError, "outputs: expected"),
        (lambda m: m.attention(0, WEIGHTS, OUTPUTS[:, :, :2]), ValueError, "outputs: expected"),
        (lambda m: m.attention(0, WEIGHTS, OUTPUTS, torch.ones(1, 1, 4, 4)), TypeError, "visible: expected a boolean"),
        (lambda m: m.attention(0, WEIGHTS, OUTPUTS, torch.ones(4, 4).bool()), TypeError, "visible: expected a boolean"),
        (lambda m: m.attention(0, WEIGHTS, OUTPUTS, torch.ones(1, 1, 4).bool()), TypeError, "visible: expected a boolean"),
        (lambda m: m.attention(0, WEIGHTS, OUTPUTS, torch.ones(2, 3, 4, 4).bool()), TypeError, "visible: expected a boolean"),
        (lambda m: m.attention(0, WEIGHTS / 0.0, OUTPUTS), ValueError, "layer 0: attention weights or outputs"),
        (lambda m: m.attention(1, WEIGHTS, OUTPUTS / 0.0), ValueError, "layer 1: attention weights or outputs"),
        (lambda m: m.hidden(0, torch.zeros(2, 4)), ValueError, "hidden: expected"),
        (lambda m: m.hidden(0, torch.zeros(1, 4, 3)), ValueError, "hidden: expected"),
        (lambda m: m.hidden(0, torch.zeros(2, 3, 3)), ValueError, "hidden: expected"),
        (lambda m: m.hidden(3, torch.full((2, 4, 3), torch.inf)), ValueError, "layer 3: the hidden states contain NaN"),
        (lambda m: m.result(), ValueError, "no data"),
    ],
)  # fmt: skip
def test_refusals(call, error, says):
    meter = Meter()
    meter.begin_batch(torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(error, match=says):
        call(meter)


def test_refusals_of_a_meter_in_another_state():
    with pytest.raises(RuntimeError, match="attention: call begin_batch first"):
        Meter().attention(0, WEIGHTS, OUTPUTS)
    meter = fed(torch.ones(2, 4, dtype=torch.bool), heads=3)
    with pytest.raises(ValueError, match="layer 0 had 3 heads before, now 2"):
        meter.attention(0, WEIGHTS[:, :2], OUTPUTS[:, :, :2])
    meter.begin_batch(torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected 4 samples in every layer, got \[2\]"):
        meter.result()
