"""Which masks a model gets, as the source code of its class and layers says; and arguments that are none of attention's."""

from __future__ import annotations

import ast
import sys
import types

import pytest
import torch

transformers = pytest.importorskip("transformers")

from layer_files import GET, PARTS, layer, real, write  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

import softpick.integrations.transformers  # noqa: E402, F401
from softpick.integrations import transformers_layers as layers  # noqa: E402
from softpick.integrations.transformers_layers import passed_to_everybody  # noqa: E402


@pytest.fixture
def written(tmp_path, monkeypatch):
    return lambda *parts: write(tmp_path, monkeypatch, *parts)


# ---------------------------------------------------------------------------------------------------------------------
# Which masks


def kind_of_masks(module, sdpa=False, flash=False, backend=False):
    traits = {"_supports_sdpa": sdpa, "_supports_flash_attn": flash, "_supports_attention_backend": backend}
    return layers._kind_of_masks(type("Small", (transformers.PreTrainedModel,), {"__module__": module, **traits}))


BY_NAME = [
    (False, "x = 1"),
    (True, "x = config._attn_implementation == 'sdpa'"),
    (True, "x = self.config._attn_implementation != 'sdpa' and y"),
    (True, "x = config._attn_implementation in ('eager', 'sdpa')"),
    (True, "x = config._attn_implementation in ['sdpa', *others]"),
    (True, "x = _attn_implementation == 'sdpa'"),
    (False, "x = config._attn_implementation == 'eager'"),
    (False, "x = config._attn_implementation in ('eager', 'flash_attention_2')"),
    (False, "x = config._attn_implementation == name"),
    (False, "config._attn_implementation = 'sdpa'"),
    (False, "x = config.implementation == 'sdpa'"),
    (False, "x = config._attn_implementation + 'sdpa'"),
    (False, "def __init__(self, is_causal=False): pass"),
    (False, "mask = create_causal_mask(x)"),
    (True, "def __init__(self, is_causal=False): mask = create_causal_mask(x)"),
    (False, "def __init__(self, is_causal=False): mask = create_causal_mask(x); Layer(is_causal=True)"),
    (
        True,
        "def __init__(self, is_causal=False): mask = create_causal_mask(x); y = config._attn_implementation == 'sdpa'",
    ),
]


@pytest.mark.parametrize(("by_name", "text"), BY_NAME, ids=str)
def test_masks_are_those_that_a_class_supports_unless_it_asks_for_names(by_name, text, tmp_path, monkeypatch):
    """Or has layers that are never told that they are causal, and a causal mask that says it."""
    module = types.ModuleType("modeling_small")
    module.__file__ = str(tmp_path / "modeling_small.py")
    (tmp_path / "modeling_small.py").write_text(f"{text}\n")
    monkeypatch.setitem(sys.modules, "modeling_small", module)
    for sdpa in (False, True):
        for flash in (False, True):
            for backend in (False, True):
                kind = "sdpa" if sdpa else "flash" if flash and backend else "eager"
                kind = "eager" if by_name else kind
                assert kind_of_masks("modeling_small", sdpa, flash, backend) == kind, (sdpa, flash, backend)


def test_masks_of_classes_without_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "typed_in", types.ModuleType("typed_in"))
    for module in ("typed_in", "nowhere"):
        assert kind_of_masks(module, sdpa=True) == "sdpa"
        assert kind_of_masks(module, flash=True, backend=True) == "flash"
        assert kind_of_masks(module) == "eager"


@pytest.mark.parametrize(
    ("file", "name", "kind"),
    [
        ("llama", "LlamaModel", "sdpa"),
        ("bert", "BertModel", "sdpa"),
        ("gpt2", "GPT2Model", "sdpa"),
        ("t5", "T5Model", "sdpa"),
        ("gpt_oss", "GptOssModel", "flash"),  # no sdpa because of its sinks; flash, and an attention backend
        ("deepseek_v4", "DeepseekV4Model", "eager"),
        ("nllb_moe", "NllbMoeModel", "eager"),
        ("pegasus_x", "PegasusXModel", "eager"),  # flash, but no attention backend
        ("falcon", "FalconModel", "eager"),  # compares names
    ],
)
def test_masks_of_models_of_transformers(file, name, kind):
    assert layers._kind_of_masks(real(file, name)) == kind


@pytest.mark.parametrize(
    ("keeps", "text"),
    [
        (True, "def __init__(self, config, is_causal=False): pass"),
        (True, "def __init__(self, config, is_causal: bool = False, bias=True): pass"),
        (True, "def __init__(self, config, bias=True, is_causal=False): pass"),
        (True, "def __init__(self, config, *, is_causal=False, bias): pass"),
        (True, "def __init__(self, config): pass\ndef __init__(self, is_causal=False): Layer(is_decoder=True)"),
        (False, "def __init__(self, config, is_causal=True): pass"),
        (False, "def __init__(self, config, is_causal=flag): pass"),
        (False, "def __init__(self, config, is_causal=None): pass"),
        (False, "def __init__(self, is_causal, bias=False): pass"),
        (False, "def __init__(self, *, is_causal): pass"),
        (False, "def __init__(self, config, bias=False): pass"),
        (False, "def forward(self, is_causal=False): pass"),
        (False, "def __init__(self, is_causal=False): Layer(bias=False, is_causal=config.is_decoder)"),
        (False, "def __init__(self, bias=True): Layer(is_causal=True)"),
        (False, "x = 1"),
    ],
    ids=str,
)
def test_layers_that_are_never_told_that_they_are_causal(keeps, text):
    assert layers._keeps_causality(ast.parse(text)) is keeps


# ---------------------------------------------------------------------------------------------------------------------
# The mask function

SEVEN = torch.ones(7, 7, dtype=torch.bool).tril()
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)


class Config:
    sliding_window: int | None = 4
    attention_chunk_size: int | None = None


def mask_of(**changes):
    sizes = {"batch_size": 2, "q_length": 7, "kv_length": 7, "q_offset": 0, "kv_offset": 0}
    return layers.attention_mask(**{**sizes, "mask_function": causal_mask_function, "config": Config(), **changes})


def added(keep, dtype):
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


@pytest.mark.parametrize("kind", [None, "sdpa", "flash", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_boolean_masks_and_added_ones(kind, dtype, monkeypatch):
    if kind:
        monkeypatch.setitem(layers.KIND_OF_MASKS, Config, kind)
    how = {} if dtype == torch.float32 else {"dtype": dtype}  # the default
    padded = SEVEN & PADDED[:, None, None]
    plain = SEVEN.expand(2, 1, 7, 7)
    wanted = padded if kind in (None, "sdpa") else added(padded, dtype)
    assert_same(mask_of(attention_mask=PADDED, **how), wanted)
    for given in (None, torch.ones_like(PADDED)):
        assert_same(mask_of(attention_mask=given, **how), added(plain, dtype) if kind == "eager" else None)
    both = {"mask_function": bidirectional_mask_function, "allow_is_causal_skip": False}
    assert mask_of(**both, allow_is_bidirectional_skip=True, **how) is None
    wanted = PADDED[:, None, None].expand(2, 1, 7, 7)
    wanted = wanted if kind in (None, "sdpa") else added(wanted, dtype)
    assert_same(mask_of(**both, attention_mask=PADDED, allow_is_bidirectional_skip=True, **how), wanted)


def assert_same(found, wanted):
    if wanted is None:
        assert found is None
    else:
        torch.testing.assert_close(found.expand_as(wanted), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sdpa", "flash", "eager"])
def test_padding_without_values_makes_no_mask_superfluous(kind, monkeypatch):
    monkeypatch.setitem(layers.KIND_OF_MASKS, Config, kind)
    monkeypatch.setitem(layers.WITH_WINDOWS, Config, True)
    given = {"attention_mask": torch.ones(2, 7, dtype=torch.bool, device="meta"), "device": "meta"}
    both = {"mask_function": bidirectional_mask_function, "allow_is_causal_skip": False}
    for how in ({}, {"local_size": 4}, {**both, "allow_is_bidirectional_skip": True}):
        mask = mask_of(**given, **how)
        assert mask.is_meta
        assert mask.shape == (2, 1, 7, 7)
        assert mask.dtype == (torch.bool if kind == "sdpa" else torch.float32)


def test_continuous_batching_needs_no_mask(monkeypatch):
    assert mask_of(attention_mask=PADDED) is not None
    monkeypatch.setattr(layers, "runs_paged", lambda: True)
    monkeypatch.setitem(layers.KIND_OF_MASKS, Config, "eager")
    assert mask_of(attention_mask=PADDED) is None


WINDOW = {"mask_function": sliding_window_causal_mask_function(4), "local_size": 4}
LONGER = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool).expand(2, 10)


@pytest.mark.parametrize(
    ("only", "changes"),
    [
        (True, {}),
        (True, {"attention_mask": torch.ones_like(PADDED)}),
        (True, {"attention_mask": LONGER, "q_offset": 3, "kv_offset": 3}),
        (True, {"q_offset": 5, "kv_offset": 5}),
        (False, {"attention_mask": PADDED}),
        (False, {"attention_mask": PADDED.flip(1)}),
        (False, {"known": False}),
        (False, {"known": None}),
        (False, {"window": 5}),
        (False, {"window": None}),
        (False, {"chunk": 4}),
        (True, {"chunk": 8}),
        (False, {"kind": "eager"}),
        (True, {"kind": "flash"}),
        (False, {"allow_is_causal_skip": False}),
        (False, {"use_vmap": True}),
        (False, {"q_length": 5, "q_offset": 2}),
        (False, {"q_length": 5}),
        (False, {"q_offset": 2}),
        (False, {"q_offset": torch.tensor(0)}),
        (True, {"q_length": 2, "kv_length": 2, "window": 1, "local_size": 1}),
    ],
    ids=str,
)
def test_no_mask_where_it_is_only_the_window_that_the_layers_know(only, changes, monkeypatch):
    traits = {name: changes.get(name, default) for name, default in (("known", True), ("window", 4), ("chunk", None))}
    how = {name: value for name, value in changes.items() if name not in ("known", "window", "chunk", "kind")}
    monkeypatch.setattr(Config, "sliding_window", traits["window"])
    monkeypatch.setattr(Config, "attention_chunk_size", traits["chunk"])
    if traits["known"] is not None:
        monkeypatch.setitem(layers.WITH_WINDOWS, Config, traits["known"])
    if "kind" in changes:
        monkeypatch.setitem(layers.KIND_OF_MASKS, Config, changes["kind"])
    assert (mask_of(**{**WINDOW, **how}) is None) is only


def test_windows_at_the_edges(monkeypatch):
    monkeypatch.setitem(layers.WITH_WINDOWS, Config, True)
    seven = {"q_length": 7, "kv_length": 7}
    assert layers._only_a_window(Config(), **seven, local_size=4)  # offsets are zero unless given
    assert not layers._only_a_window(Config(), local_size=4)
    assert not layers._only_a_window(Config(), q_length=1, kv_length=1, local_size=4)
    with FakeTensorMode():  # whose values nobody can look at
        assert not layers._only_a_window(Config(), **seven, local_size=4, attention_mask=torch.ones(2, 7))
    monkeypatch.setattr(Config, "sliding_window", None)
    monkeypatch.setattr(Config, "attention_chunk_size", 4)
    assert not layers._only_a_window(Config(), **seven)  # the layers of a model with chunks that see everything


# ---------------------------------------------------------------------------------------------------------------------
# A model is looked at


@pytest.mark.parametrize("backend", [False, True])
@pytest.mark.parametrize("settable", [False, True])
def test_models_without_the_interface_are_refused(backend, settable, written, monkeypatch):
    module = written(PARTS)
    model = module.Small(module.SmallConfig())
    monkeypatch.setattr(module.Small, "_supports_attention_backend", backend)
    monkeypatch.setattr(module.Small, "_can_set_attn_implementation", classmethod(lambda cls: settable))
    if backend or settable:
        layers.prepare(model, "softpick")
        return
    with pytest.raises(ValueError, match=r"^attn_implementation: Small does not .* softmax instead of 'softpick'$"):
        layers.prepare(model, "softpick")


def test_softmax_by_ones_own_is_refused_unless_softmax_was_asked_for(written):
    module = written(PARTS)
    model = module.Small(module.SmallConfig(), module.Takes())
    layers.prepare(model, "softmax")
    with pytest.raises(ValueError, match=r"body\.0 \(Takes\) of Small"):
        layers.prepare(model, "softpick")


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ("Sdpa", None),
        ("Flash", "flash"),
        ("Eager", "eager"),
        ("Flash Sdpa", "flash"),
        ("Sdpa Flash", "flash"),
        ("Eager Flash", "eager"),
        ("Eager Sdpa", "eager"),
        ("Flash Eager", "eager"),
        ("Flash Eager Flash", "eager"),
    ],
)
def test_the_most_careful_masks_win_among_classes_of_one_configuration(kinds, wanted, written):
    module = written(
        PARTS,
        "class Sdpa(Small): pass",
        "class Flash(Small): _supports_sdpa = False",
        "class Eager(Flash): _supports_flash_attn = False",
    )
    for kind in kinds.split():
        layers.prepare(getattr(module, kind)(module.SmallConfig()), "softpick")
    assert layers.KIND_OF_MASKS.get(module.SmallConfig) == wanted


WINDOWS = [
    (True, [("Small", ["Windowed"])]),
    (True, [("Small", ["Windowed", "Linear"])]),
    (True, [("Flash", ["Windowed"])]),
    (False, [("Small", ["Windowed", "Asks"])]),
    (False, [("Small", ["Asks"])]),
    (False, [("NoFlash", ["Windowed"])]),
    (False, [("Eager", ["Windowed"])]),
    (None, [("Small", ["Linear"])]),
    (None, [("Small", [])]),
    (True, [("Small", ["Windowed"]), ("Small", ["Windowed"])]),
    (True, [("Small", ["Windowed"]), ("Small", [])]),
    (False, [("Small", ["Windowed"]), ("Small", ["Asks"])]),
    (False, [("Small", ["Asks"]), ("Small", ["Windowed"])]),
]


@pytest.mark.parametrize(("known", "models"), WINDOWS, ids=str)
def test_windows_are_known_where_every_layer_that_asks_gives_its_own(known, models, written):
    module = written(
        PARTS,
        "class Flash(Small): _supports_sdpa = False",
        "class NoFlash(Small): _supports_flash_attn = False",
        "class Eager(Flash):",
        "    _supports_attention_backend = False",
        "    @classmethod",
        "    def _can_set_attn_implementation(cls): return True",
    )
    for kind, parts in models:
        made = [getattr(module, part)() for part in parts]
        layers.prepare(getattr(module, kind)(module.SmallConfig(), *made), "softpick")
    assert layers.WITH_WINDOWS.get(module.SmallConfig) is known
    watched = any(hasattr(getattr(module, kind).forward, "_softpick") for kind, _ in models)
    assert watched is (known is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments that are nobody's business


def test_arguments_that_have_nothing_to_do_with_attention(written):
    module = written(
        "def eager_attention_forward(module, query, special=None, *rest, **more): pass",
        "def rotate(x, base): pass",
        "eager_table = {}",
        layer(f"def forward(self, q, **kwargs): f = {GET}; return f(q, own=1, num_items_in_batch=2, **kwargs)"),
        layer(f"def forward(self, q, **kwargs): f = {GET}; return f(q, own=1)", name="Keeps"),
        layer("def forward(self, q, **kwargs): attention_interface = q; attention_interface(**kwargs)", name="Eager"),
    )
    harmless = {"base", "temperature", "rest", "more", "ignore_index"}
    business = {"own", "num_items_in_batch", "special", "query", "scaling", "softcap", "is_causal", "dropout"}
    for name in harmless | business:
        assert passed_to_everybody(module.Layer, name) is (name in harmless), name
    # of what is not handed on only arguments of losses are harmless, whoever passes them
    for kind in (module.Keeps, module.Eager, torch.nn.Linear):
        for name in harmless | business:
            assert passed_to_everybody(kind, name) is (name in ("ignore_index", "num_items_in_batch")), (kind, name)
