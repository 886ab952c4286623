"""Every number of every command's settings: type, range and finiteness, whichever command has it."""

import dataclasses
import math
import typing

import pytest

pytest.importorskip("transformers")

from softpick.analysis.audit import AuditSettings
from softpick.evaluation.evaluate import EvaluateSettings
from softpick.experiment.environment import chosen_device, missing_device
from softpick.experiment.settings import RANGES, check_memory, kinds_of
from softpick.quantization.quantize import QuantizeSettings
from softpick.training.compare import Settings
from softpick.training.recipes import get_recipe

MADE = {
    "audit": AuditSettings(model="m"),
    "evaluate": EvaluateSettings(model="m", tasks=()),
    "quantize": QuantizeSettings(model="m"),
    "compare": Settings.for_task(),
    "recipe": get_recipe("tiny_cpu"),
}


def fields(settings):
    hints = typing.get_type_hints(type(settings))
    return {field.name: kinds_of(hints[field.name]) for field in dataclasses.fields(settings)}


NUMBERS = [
    (command, name, float in kinds, many)
    for command, settings in MADE.items()
    for name, (kinds, many) in fields(settings).items()
    if kinds & {int, float}
]


def refused(command, name, value):
    changed = dataclasses.replace(MADE[command], **{name: value})
    with pytest.raises(ValueError, match=f"{name.replace('_', '[-_]')}: expected") as raised:
        changed.check()
    assert type(raised.value).__module__.startswith("softpick.")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", MADE.values(), ids=MADE)
def test_the_defaults_are_fine(settings):
    settings.check()


@pytest.mark.parametrize(("command", "name", "real", "many"), NUMBERS, ids=lambda x: str(x))
def test_every_number_has_a_range(command, name, real, many):
    assert name in RANGES, f"{name}: give it a range in softpick/settings.py"
    wrong = [-5, "7", math.nan, True] + ([-math.inf] if real else [1.5])
    if not RANGES[name].infinite:
        wrong += [2**64, math.inf]
    for value in wrong:
        refused(command, name, (value,) if many else value)


@pytest.mark.parametrize(("command", "name"), [(c, n) for c, n, _, _ in NUMBERS if n in ("seed", "seeds")])
@pytest.mark.parametrize("seed", [2**32, 2**32 + 5, -1])
def test_seeds_that_numpy_cannot_take(command, name, seed):
    refused(command, name, (seed,) if name == "seeds" else seed)
    dataclasses.replace(MADE[command], **{name: (2**32 - 1,) if name == "seeds" else 2**32 - 1}).check()


@pytest.mark.parametrize("command", MADE)
def test_strings_and_switches(command):
    for name, (kinds, many) in fields(MADE[command]).items():
        if many or kinds & {int, float}:
            continue
        refused(command, name, 3 if str in kinds else "yes")


@pytest.mark.parametrize("assignment", ["learning_rate=inf", "learning_rate=1e999", "weight_decay=nan", "weight_decay=-5",
                                        "vocab_size=1000000000", "seed=4294967296", "rope_theta=inf", "steps=" + "9" * 5000,
                                        "max_grad_norm=nan", "width=10000000000"])  # fmt: skip
def test_recipes_that_would_train_a_model_of_nan_or_none(assignment):
    with pytest.raises(ValueError, match=f"{assignment.partition('=')[0]}: expected") as raised:
        get_recipe("tiny_cpu").override([assignment])
    assert len(str(raised.value)) < 200
    assert get_recipe("tiny_cpu").override(["max_grad_norm=inf"]).max_grad_norm == math.inf


def test_a_model_that_this_machine_cannot_hold():
    with pytest.raises(ValueError, match="1,000,000,000,000,000 parameters need"):
        check_memory(10**15, "cpu", ValueError)
    check_memory(10**6, "cpu", ValueError)
    with pytest.raises(ValueError, match="width, layers, vocab_size"):
        Settings.for_task(width=2**20, layers=1000, heads=1024)


@pytest.mark.parametrize("name", ["cuda:99", "mps", "tpu", "cuda:x", "cuda:", "", "cpu:0", "meta", "cuda:-1", "CPU"])
def test_devices_that_are_not_there(name, monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for there in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert missing_device(name)
        assert missing_device("cpu") is None
        assert (missing_device("cuda:1") is None) == there
        assert chosen_device("auto") == ("cuda" if there else "cpu")
        assert chosen_device(name) == name
