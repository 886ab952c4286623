"""softpick: attention without softmax. No attention sinks, no massive activations, exact zeros.

``softpick.scaled_dot_product_attention`` replaces torch's function of the same name; ``softpick.softpick`` replaces
``torch.softmax``. ``softpick.NORMALIZERS`` is the table of everything that can be chosen.
"""

from softpick import nn
from softpick.functional import (
    BACKENDS,
    AttentionOutput,
    decode_attention,
    linear_softpick,
    scaled_dot_product_attention,
    softpick,
    varlen_attention,
)
from softpick.normalizers import NORMALIZERS, Normalizer, get_normalizer

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "NORMALIZERS",
    "AttentionOutput",
    "Normalizer",
    "decode_attention",
    "get_normalizer",
    "linear_softpick",
    "nn",
    "scaled_dot_product_attention",
    "softpick",
    "varlen_attention",
]
