"""Files of small classes, written and imported for tests of what the adapter reads in source code."""

import importlib
import importlib.util
import sys

import pytest

HEAD = """import functools
import torch
from torch import nn
import torch.nn.functional as F
from softmax_elsewhere import weigh_elsewhere
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
"""


GET = "ALL_ATTENTION_FUNCTIONS.get_interface(self.name, None)"


def load(folder, monkeypatch, name, text):
    (folder / f"{name}.py").write_text(text)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def write(folder, monkeypatch, *parts):
    """A module of these parts."""
    load(folder, monkeypatch, "softmax_elsewhere", "def weigh_elsewhere(s):\n    return s.softmax(-1)\n")
    return load(folder, monkeypatch, "modeling_small", "\n".join((HEAD, *parts)) + "\n")


def layer(*methods, name="Layer", base="nn.Module"):
    return "\n    ".join((f"class {name}({base}):", *methods))


def real(file, name):
    try:
        return getattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {name}")


PARTS = """
class SmallConfig(PreTrainedConfig):
    model_type = "softpick_small"

class OtherConfig(PreTrainedConfig):
    model_type = "softpick_other"

class Small(PreTrainedModel):
    config_class = SmallConfig
    _supports_attention_backend = _supports_sdpa = _supports_flash_attn = True
    def __init__(self, config, *parts, **named):
        super().__init__(config)
        self.body = nn.ModuleList(parts)
        for name, part in named.items():
            self.add_module(name, part)
    def forward(self, x):
        return x

class Other(Small):
    config_class = OtherConfig

class Projects(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(1, 1) for _ in range(3))

class Takes(Projects):
    def forward(self, q, k): return (q @ k.mT).softmax(-1)

class Linear(Projects):
    def forward(self, q, k): return q @ k.mT

class Pools(nn.Module):
    def forward(self, q, k): return (q @ k.mT).softmax(-1)

class Asks(Projects):
    def forward(self, q, **kwargs):
        f = ALL_ATTENTION_FUNCTIONS.get_interface(self.name, None)
        return f(self, q, **kwargs)

class Either(Takes):
    def attend(self, q): return ALL_ATTENTION_FUNCTIONS.get_interface(self.name, None)(self, q)

class Windowed(Projects):
    def forward(self, q, **kwargs):
        f = ALL_ATTENTION_FUNCTIONS.get_interface(self.name, None)
        return f(self, q, sliding_window=4, **kwargs)

class Heads(nn.MultiheadAttention):
    pass
"""
