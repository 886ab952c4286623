"""Modules: the function, attention with its variants, and a small sequence encoder."""

from softpick.nn.attention import Attention, LinearSoftpick, Softpick
from softpick.nn.encoder import SequenceEncoder

__all__ = ["Attention", "LinearSoftpick", "SequenceEncoder", "Softpick"]
