"""Block sizes as data. Nothing is searched for at run time: a first call compiles one variant.

A row holds for a kind of kernel and the larger of the two (padded) head dims; ``docs/kernels.md`` has the times that
chose it. GPUs without rows of their own take the portable ones, which fit into 96 KiB of shared memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

__all__ = ["OVERRIDE", "Blocks", "blocks", "multiprocessors"]


class Blocks(NamedTuple):
    """A launch: rows of queries and keys in a tile, warps, depth of the software pipeline."""

    m: int
    n: int
    warps: int
    stages: int


# 16-bit inputs: (kernel, head dim up to) -> blocks
_HOPPER = {
    ("forward", 64): Blocks(128, 128, 8, 3),
    ("forward", 128): Blocks(128, 64, 8, 3),
    ("forward", 256): Blocks(64, 64, 8, 2),
    ("queries", 64): Blocks(128, 64, 8, 3),
    ("queries", 128): Blocks(128, 64, 8, 2),
    ("queries", 256): Blocks(64, 32, 8, 2),
    ("keys", 64): Blocks(64, 128, 8, 3),
    ("keys", 128): Blocks(64, 128, 8, 2),
    ("keys", 256): Blocks(32, 64, 8, 2),
    ("decode", 64): Blocks(16, 128, 4, 3),
    ("decode", 128): Blocks(16, 64, 4, 3),
    ("decode", 256): Blocks(16, 32, 4, 2),
}
_PORTABLE = {
    ("forward", 64): Blocks(128, 64, 4, 2),
    ("forward", 128): Blocks(64, 64, 4, 2),
    ("forward", 256): Blocks(64, 32, 8, 1),
    ("queries", 64): Blocks(64, 64, 4, 2),
    ("queries", 128): Blocks(64, 32, 4, 2),
    ("queries", 256): Blocks(32, 32, 8, 1),
    ("keys", 64): Blocks(64, 64, 4, 2),
    ("keys", 128): Blocks(32, 64, 4, 2),
    ("keys", 256): Blocks(32, 32, 8, 1),
    ("decode", 64): Blocks(16, 64, 4, 2),
    ("decode", 128): Blocks(16, 64, 4, 2),
    ("decode", 256): Blocks(16, 32, 4, 1),
}
# fp32 products take no tensor cores unless tf32 is allowed, and twice the room
_SINGLE = {
    ("forward", 64): Blocks(64, 32, 4, 2),
    ("forward", 128): Blocks(32, 32, 4, 1),
    ("forward", 256): Blocks(16, 32, 4, 1),
    ("queries", 64): Blocks(32, 32, 4, 1),
    ("queries", 128): Blocks(32, 16, 4, 1),
    ("queries", 256): Blocks(16, 16, 4, 1),
    ("keys", 64): Blocks(32, 32, 4, 1),
    ("keys", 128): Blocks(16, 32, 4, 1),
    ("keys", 256): Blocks(16, 16, 4, 1),
    ("decode", 64): Blocks(16, 64, 4, 2),
    ("decode", 128): Blocks(16, 32, 4, 1),
    ("decode", 256): Blocks(16, 16, 4, 1),
}

OVERRIDE: dict[str, Blocks] = {}
"""Kernel kind to blocks, before every table: for tests and for tuning."""


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9


@functools.cache
def multiprocessors(index: int) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def blocks(kind: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The blocks of a kernel kind (``forward``, ``queries``, ``keys``, ``decode``) for the larger padded head dim."""
    if kind in OVERRIDE:
        return OVERRIDE[kind]
    if dtype == torch.float32:
        table = _SINGLE
    else:
        hopper = device.type == "cuda" and _is_hopper(torch.cuda.current_device() if device.index is None else device.index)
        table = _HOPPER if hopper else _PORTABLE
    return table[kind, 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256]
