"""softpick: attention without softmax. No attention sinks, no massive activations, exact zeros.

``softpick.scaled_dot_product_attention`` replaces torch's function of the same name; ``softpick.softpick`` replaces
``torch.softmax``. ``softpick.NORMALIZERS`` is the table of everything that can be chosen.

Importing this package takes no time: torch is imported with the first of the names below. Its operators are registered by
``import softpick.functional``.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from softpick import _moved

if TYPE_CHECKING:
    from softpick import nn
    from softpick.explain import Explanation, explain_backend
    from softpick.functional import (
        AttentionOutput,
        decode_attention,
        linear_softpick,
        scaled_dot_product_attention,
        softpick,
        varlen_attention,
    )
    from softpick.normalizers import NORMALIZERS, Normalizer, get_normalizer
    from softpick.ops.backends import BACKENDS
    from softpick.ops.fp8 import quantize_fp8
    from softpick.ops.key_bounds import KeyBounds, key_bounds, update_key_bounds
    from softpick.ops.switch import use_backend

__version__ = "0.1.0"

if _moved.Finder not in sys.meta_path:
    sys.meta_path.append(_moved.Finder)

__all__ = [
    "BACKENDS",
    "NORMALIZERS",
    "AttentionOutput",
    "Explanation",
    "KeyBounds",
    "Normalizer",
    "decode_attention",
    "explain_backend",
    "get_normalizer",
    "key_bounds",
    "linear_softpick",
    "nn",
    "quantize_fp8",
    "scaled_dot_product_attention",
    "softpick",
    "update_key_bounds",
    "use_backend",
    "varlen_attention",
]

_HOME = {
    "BACKENDS": "ops.backends",
    "Explanation": "explain",
    "explain_backend": "explain",
    "use_backend": "ops.switch",
    "quantize_fp8": "ops.fp8",
    "KeyBounds": "ops.key_bounds",
    "key_bounds": "ops.key_bounds",
    "update_key_bounds": "ops.key_bounds",
    "NORMALIZERS": "normalizers",
    "Normalizer": "normalizers",
    "get_normalizer": "normalizers",
}
_MODULES = ("functional", "nn", "normalizers", "ops")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"softpick.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'softpick' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"softpick.{_HOME.get(name, 'functional')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
