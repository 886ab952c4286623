"""What is known of the models that run, and which of them are refused packed sequences."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")

from transformers import BertConfig, BertModel

import softpick.integrations.transformers as st  # noqa: F401  (registers the implementations)
from softpick.integrations import transformers_packing as packing


def test_arguments_that_pack(monkeypatch):
    """Offsets, or positions that start again behind a token that is no padding."""
    restarting, plain = torch.tensor([[0, 1, 0, 1]]), torch.arange(4)[None]
    left = torch.tensor([[0, 0, 0, 1, 2]])
    padding = torch.tensor([[0, 0, 1, 1, 1]])
    for given, packs, alone in (
        ({}, False, None),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, True, False),
        ({"cu_seq_lens_q": torch.tensor([0, 4]), "position_ids": restarting}, True, False),
        ({"position_ids": plain}, False, None),
        ({"position_ids": restarting}, True, True),
        ({"position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]])}, True, True),
        ({"position_ids": restarting, "attention_mask": torch.ones(1, 4)}, True, True),
        ({"position_ids": restarting, "attention_mask": {"full_attention": None}}, True, True),
        ({"position_ids": restarting, "attention_mask": torch.zeros(1, 2)}, True, True),  # of other tokens
        ({"position_ids": restarting, "attention_mask": torch.ones(1, 1, 4, 4)}, True, False),
        ({"position_ids": left, "attention_mask": padding}, False, None),
        ({"position_ids": left[:, 1:], "attention_mask": padding}, False, None),  # one token is cached
        ({"position_ids": torch.tensor([[0, 1, 2]]), "attention_mask": padding}, False, None),
        ({"position_ids": torch.tensor([[0, 0, 1]]), "attention_mask": padding}, True, True),
        ({"position_ids": restarting[0]}, False, None),
        ({"position_ids": restarting[None]}, False, None),
        ({"position_ids": restarting.tolist()}, False, None),
        ({"position_ids": torch.zeros(1, 4, dtype=torch.long, device="meta")}, False, None),
    ):
        assert packing._gives_packed(given) is packs
        if alone is not None:
            assert packing._by_positions(given) is alone
    monkeypatch.setattr(packing, "is_tracing", lambda tensor=None: True)
    assert packing._gives_packed({"position_ids": restarting}) is False


def state():
    running = packing._running
    return running.given, running.paged, None if running.starts is None else running.starts.tolist()


class Part(torch.nn.Module):
    """Writes down what is known while it runs, and calls the next one without arguments."""

    def __init__(self, implementation="softpick", inner=None, layer=None):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=implementation)
        self.inner, self.layer, self.states = inner, layer, []

    def forward(self, x, **given):
        self.states.append(state())
        if self.inner is not None:
            self.inner(x)
        self.states.append(state())
        return x + 1


class Heir(Part):
    pass


@pytest.fixture
def watched():
    original = Part.forward
    packing.watch_offsets(Part)
    yield
    Part.forward = original


@pytest.mark.usefixtures("watched")
def test_models_that_run_are_watched():
    """Offsets and continuous batching hold for the models inside, positions for the innermost; nothing stays."""
    positions = torch.tensor([[0, 1, 0]])
    starts = [[True, False, True]]
    for given, outer, within in (
        ({}, (False, False, None), (False, False, None)),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, (True, False, None), (True, False, None)),
        ({"read_index": []}, (False, True, None), (False, True, None)),
        ({"read_index": [], "cu_seq_lens_q": torch.tensor([0, 3])}, (True, True, None), (True, True, None)),
        ({"position_ids": positions}, (False, False, starts), (False, False, None)),
        ({"position_ids": positions, "cu_seq_lens_q": torch.tensor([0, 3])}, (True, False, None), (True, False, None)),
        ({"position_ids": positions, "attention_mask": torch.ones(1, 1, 3, 3)}, (False,) * 2 + (None,), (False,) * 2 + (None,)),
        ({"position_ids": torch.arange(3)[None]}, (False, False, None), (False, False, None)),
    ):  # fmt: skip
        inner = Part()
        model = Part(inner=inner)
        assert model(1, **given) == 2
        assert model.states == [outer, outer]
        assert inner.states == [within, within]
        assert state() == (False, False, None)
    model = Part(implementation="sdpa")
    model(1, position_ids=positions)
    assert model.states[0] == (False, False, None)


@pytest.mark.usefixtures("watched")
def test_nothing_is_watched_while_compiling(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = Part()
    assert model(1, cu_seq_lens_q=torch.tensor([0, 3])) == 2
    assert model.states[0] == (False, False, None)


@pytest.mark.usefixtures("watched")
def test_a_class_is_watched_once():
    once = Part.forward
    packing.watch_offsets(Part)
    packing.watch_offsets(Heir)
    assert Part.forward is Heir.forward is once


class TinySSM(torch.nn.Linear):
    pass


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    ("layer", "refused"),
    [
        (lambda: torch.nn.Linear(2, 2), False),
        (lambda: torch.nn.Conv1d(2, 2, 1), False),
        (lambda: torch.nn.Conv1d(2, 2, 2), True),
        (lambda: torch.nn.Conv1d(2, 2, 5), True),
        (lambda: torch.nn.Conv2d(2, 2, 3), False),  # of patches
        (lambda: torch.nn.GRU(2, 2), True),
        (lambda: torch.nn.LSTM(2, 2), True),
        (lambda: TinySSM(2, 2), True),
    ],
)
def test_layers_that_carry_something_on_are_refused_by_name(layer, refused):
    model = Part(layer=torch.nn.ModuleDict({"mixer": layer()}))
    said = (
        rf"packed sequences need a model of attention layers only; layer\.mixer \({type(layer()).__name__}\) of Part "
    )
    for given in ({"cu_seq_lens_q": torch.tensor([0, 3])}, {"position_ids": torch.tensor([[0, 1, 0]])}):
        if refused:
            with pytest.raises(ValueError, match=said):
                model(1, **given)
        else:
            model(1, **given)
        assert state() == (False, False, None)
    assert model(1) == 2
    model.config._attn_implementation = "sdpa"
    assert model(1, **given) == 2


def test_models_inside_look_at_their_own_layers():
    model = BertModel(BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4))
    model.encoder.mixer = torch.nn.GRU(2, 2)
    assert "encoder.mixer" in dict(packing._own_modules(model))
    whole = torch.nn.Module()
    whole.inner, whole.outer = model, torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert [name for name, _ in packing._own_modules(whole)] == ["outer", "outer.0"]
    packing._check_mixing(whole)
    with pytest.raises(ValueError, match=r"encoder\.mixer \(GRU\) of BertModel"):
        packing._check_mixing(model)
