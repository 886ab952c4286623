"""Figures of an audit in an experiment tracker, read back by TensorBoard's own reader."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_verdict import made

from softpick.analysis import trackers
from softpick.analysis.audit import audit
from softpick.analysis.settings import AuditError, AuditSettings
from softpick.analysis.verdict import figures


def test_tensorboard_has_every_figure_of_every_model(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    runs = [made(), made(rate=1.5, title="A/smol")]
    trackers.log_figures({"runs": runs}, ["tensorboard"], tmp_path, 5000)
    for run, name in zip(runs, ["smol", "A-smol"], strict=True):
        events = reading.EventAccumulator(str(tmp_path / "tensorboard" / name))
        events.Reload()
        found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        want = figures(run)
        assert len(want) > 5
        assert found == {f"softpick/{key}": [(5000, pytest.approx(value, rel=1e-6))] for key, value in want.items()}


def test_what_is_missing_is_said_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(AuditError, match="report_to: wandb is not installed: pip install wandb"):
        audit(AuditSettings("no such model", report_to=("wandb",)))


@pytest.mark.parametrize("given", [{"report_to": ("mlflow",)}, {"step": -1}])
def test_bad_settings(given):
    with pytest.raises(AuditError, match=next(iter(given))):
        AuditSettings("x", **given).check()


def test_a_tracker_that_fails_is_named(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file in the way")
    with pytest.raises(AuditError, match="report_to: tensorboard did not take the figures"):
        trackers.log_figures({"runs": [made()]}, ["tensorboard"], tmp_path, 0)
