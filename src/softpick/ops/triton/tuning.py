"""Block sizes as data. Nothing is searched for at run time: a first call compiles one variant.

A row holds for a kind of kernel and the larger of the two (padded) head dims; ``docs/kernels.md`` has the times that
chose it. GPUs without rows of their own take the portable ones, which fit into 96 KiB of shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

__all__ = [
    "FEWEST_KEYS",
    "HOPPER",
    "LONGEST_TILE",
    "OVERRIDE",
    "PROGRAMS",
    "SHORTEST_SKIP",
    "TRACKED",
    "Blocks",
    "Schedule",
    "blocks",
    "multiprocessors",
    "row",
]


class Blocks(NamedTuple):
    """A launch: rows of queries and keys in a tile, warps, depth of the software pipeline."""

    m: int
    n: int
    warps: int
    stages: int


class Schedule(NamedTuple):
    """A launch of a kernel of ``hopper.py``: as :class:`Blocks`, and whether ``dP`` starts only after the exponentials."""

    m: int
    n: int
    warps: int
    stages: int
    late: bool


# H200, 4,4096,16,D, milliseconds: keys 0.69 and 1.23 (8 warps at D 64: 0.83 to 0.89; 64 query rows at D 128: 1.49 to 1.89),
# queries 0.39 and 0.66 (8 warps: 0.41 to 0.46 and 0.73 to 0.79): several small programs a multiprocessor overlap best
HOPPER = {
    ("keys", 64): Schedule(64, 64, 4, 3, False),
    ("keys", 128): Schedule(32, 128, 8, 3, False),
    ("queries", 64): Schedule(64, 64, 4, 3, False),
    ("queries", 128): Schedule(64, 64, 4, 2, False),
}
LONGEST_TILE = 128
"""Row statistics for ``hopper.py`` are padded to a multiple of its query tiles."""

# 16-bit inputs: (kernel, head dim up to) -> blocks
_HOPPER = {
    ("forward", 64): Blocks(128, 64, 4, 3),
    ("forward", 128): Blocks(128, 64, 8, 3),
    ("forward", 256): Blocks(64, 64, 8, 2),
    ("queries", 64): Blocks(64, 32, 4, 3),
    ("queries", 128): Blocks(128, 64, 8, 3),
    ("queries", 256): Blocks(64, 32, 8, 2),
    ("keys", 64): Blocks(64, 64, 4, 3),
    ("keys", 128): Blocks(32, 128, 8, 3),
    ("keys", 256): Blocks(32, 64, 8, 2),
    ("decode", 64): Blocks(16, 64, 2, 3),
    ("decode", 128): Blocks(16, 32, 2, 3),
    ("decode_skip", 128): Blocks(16, 64, 2, 3),
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

# Skipping costs where nothing is empty. On an H200 (docs/kernels.md has the figures):
#   decode: 2 to 10 % on dense caches, a third less time with 75 % empty 64-key blocks; at 8k keys launches dominate and
#   nothing is won. A trained model has 40 % of these blocks empty, so it pays on long caches.
SHORTEST_SKIP = 16384
#   backward: about 10 % on dense inputs. Where negative scores have no gradient (softpick_stop_gradient, relu_softpick,
#   rectified) an empty tile is no work at all, but a trained model had 11 % of its 64x64 tiles empty, which does not pay:
#   add the name of the normalizer here if yours has more. For softpick itself, whose empty tiles still cost two products
#   of five, skipping won 3 to 15 % at 90 % empty tiles and was removed; its name has no effect here.
TRACKED: set[str] = set()

# Decoding programs a multiprocessor: as many as run at a time, so that none is left for a second round.
PROGRAMS = {"decode": 2, "decode_skip": 4}

# and the fewest keys of one, whatever the device has room for: each leaves a part for the merge
FEWEST_KEYS = {"decode": 128, "decode_skip": 256}

OVERRIDE: dict[str, Blocks] = {}
"""Kernel kind to blocks, before every table: for tests and for tuning."""


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9


@functools.cache
def multiprocessors(index: int) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def row(table: Mapping[tuple[str, int], Blocks], kind: str, head_dim: int) -> Blocks:
    """A table's blocks; decoding that skips has rows of its own only where others are faster."""
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    return table.get((kind, width)) or table[kind.removesuffix("_skip"), width]


def blocks(kind: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The blocks of a kernel kind (``forward``, ``queries``, ``keys``, ``decode``, ``decode_skip``).

    ``head_dim`` is the larger of the two padded ones.
    """
    if kind in OVERRIDE:
        return OVERRIDE[kind]
    if dtype == torch.float32:
        table = _SINGLE
    else:
        hopper = device.type == "cuda" and _is_hopper(
            torch.cuda.current_device() if device.index is None else device.index
        )
        table = _HOPPER if hopper else _PORTABLE
    return row(table, kind, head_dim)
