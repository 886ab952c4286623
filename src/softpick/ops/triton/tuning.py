"""Block sizes as data. Nothing is searched for at run time: a first call compiles one variant.

A row of a table is for a kind of kernel and the larger of the two (padded) head dimensions; ``docs/kernels.md`` has the times
that chose it. GPUs without rows of their own take the portable ones, which fit into 96 KiB of shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

__all__ = [
    "EVEN_SHARE",
    "FEWEST_CACHED",
    "FEWEST_FORWARD",
    "FEWEST_KEYS",
    "FEWEST_SCORES",
    "FEWEST_SHARED",
    "FEWEST_TILES",
    "FEWEST_TOGETHER",
    "FEW_PARTIALS",
    "HOPPER",
    "HOPPER_DECODE",
    "HOPPER_DECODE_FP8",
    "HOPPER_FORWARD",
    "HOPPER_QUERIES",
    "HOPPER_ROWS",
    "L2_SHARE",
    "LARGEST_OPTIMISTIC_EPS",
    "LONGEST_TILE",
    "MASK_PROGRAMS",
    "MOST_PARTIALS",
    "MOST_WORDS",
    "PROGRAMS",
    "SKIP_FROM",
    "Blocks",
    "RingLaunch",
    "Rings",
    "Rows",
    "Schedule",
    "blocks",
    "multiprocessors",
    "row",
    "rows",
]


class Blocks(NamedTuple):
    """A launch: rows of queries and keys in a tile, warps, depth of the software pipeline."""

    m: int
    n: int
    warps: int
    stages: int


class Schedule(NamedTuple):
    """A launch of a kernel of ``hopper/``: as :class:`Blocks`, and how many of the two held tiles are in registers."""

    m: int
    n: int
    warps: int
    stages: int
    in_registers: int


# H200, 4,4096,16,D, milliseconds (benchmarks/results/tune_gpu.csv): keys 0.54 and 0.94 (before the statistics of rows came
# with their tile 0.70 and 1.01; D 128 with both key tiles in shared memory 1.01; 64 query rows do not fit into registers),
# queries 0.38 and 0.63: several small programs a multiprocessor overlap best
HOPPER = {
    ("keys", 64): Schedule(64, 64, 4, 2, 2),
    ("keys", 128): Schedule(32, 64, 4, 3, 1),
    ("queries", 64): Schedule(64, 64, 4, 3, 0),
    ("queries", 128): Schedule(64, 64, 4, 2, 0),
}


class Rings(NamedTuple):
    """A launch of ``hopper/forward.py`` or ``hopper/decode.py``: keys of a tile, key tiles and value tiles under way, warps
    that share a tile of queries, programs a multiprocessor.
    """

    n: int
    stages: int
    values: int
    warps: int = 4
    programs: int = 1


# forward 0.28 and 0.39 (cuDNN 0.33 and 0.50); D 64 with specialised warps 0.30, D 128 without 0.52; with two value tiles GQA
# was 5 % slower. Decode: docs/kernels.md; more programs a multiprocessor than have room at a time only cost
HOPPER_FORWARD = {64: Rings(64, 4, 4), 128: Rings(128, 2, 3)}
HOPPER_DECODE = {64: Rings(64, 3, 3, programs=4), 128: Rings(64, 3, 3, programs=2)}
# fp8, D 128: the only sizes that were tried on a GPU; the bytes under way are those of bf16
HOPPER_DECODE_FP8 = Rings(64, 5, 5, programs=2)
LONGEST_TILE = 128
"""Row statistics for ``hopper/backward.py`` are padded to a multiple of its query tiles."""


class Rows(NamedTuple):
    """A launch over rows: elements of a program, warps, and programs a multiprocessor that the registers have to do for
    (0: as it comes).
    """

    elements: int
    warps: int
    programs: int = 0


# softpick over rows: (kernel, bytes of an entry, padded length up to) -> launch (tune_gpu.py --kinds rows)
ROWS = {
    ("forward", 2, 256): Rows(2048, 2),
    ("forward", 2, 1024): Rows(1024, 1),
    ("forward", 2, 8192): Rows(4096, 4),
    ("forward", 2, 16384): Rows(4096, 16),
    ("forward", 4, 4096): Rows(1024, 4),
    ("forward", 4, 8192): Rows(4096, 8),
    ("forward", 4, 16384): Rows(4096, 16),
    ("backward", 2, 256): Rows(1024, 2),
    ("backward", 2, 4096): Rows(1024, 4),
    ("backward", 2, 16384): Rows(4096, 16),
    ("backward", 4, 256): Rows(2048, 4),
    ("backward", 4, 4096): Rows(1024, 4),
    ("backward", 4, 16384): Rows(4096, 32, 1),
}


class RingLaunch(NamedTuple):
    """A launch of ``hopper/rows.py``: entries of a program's segment of a row and of a chunk of it, warps, segments under way,
    and programs a multiprocessor, which all have to run at the same time.
    """

    entries: int
    chunk: int
    warps: int
    stages: int
    programs: int


# longer ones on Hopper: (kernel, bytes of an entry) -> launch. H200, bf16 and fp32, TB/s at (2048, 131072), (8192, 32768) and
# (2048, 128256), copy 4.25: bf16 forward 3.81, 3.78, 3.81, backward 3.92, 4.02, 3.89, fp32 forward 3.77, 3.83, 3.80, backward
# 4.20, 4.21, 4.20 (docs/log.md has the others). Small segments leave less of a row's last one empty
HOPPER_ROWS = {
    ("forward", 2): RingLaunch(8192, 1024, 4, 3, 4),
    ("backward", 2): RingLaunch(4096, 2048, 4, 3, 4),
    ("forward", 4): RingLaunch(4096, 2048, 4, 3, 4),
    ("backward", 4): RingLaunch(4096, 2048, 4, 3, 2),
}
MOST_WORDS = 128
"""Words of sums of a row in ``hopper/rows.py``, at most: every warp reads all. With 256: 1.9 TB/s, not 4.2 (fp32 backward)."""

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
    ("decode_fp8", 64): Blocks(16, 128, 4, 3),
    ("decode_fp8", 128): Blocks(16, 64, 4, 3),
    ("decode_fp8", 256): Blocks(16, 64, 4, 2),
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

# Skipping values costs where no tile of keys is empty. On an H200 (docs/kernels.md has the figures):
#   decode.py (hopper/decode.py skips at no cost): nothing on dense caches of 2^20 keys (of all sequences and key heads) and
#   more, where three quarters of empty 64-key blocks save a third of the time; 10 and 16 % at 2^18 and 2^16 keys, where they
#   save 13 % and nothing. A trained model has 40 % of these blocks empty.
SKIP_FROM = 2**19

# Decoding programs a multiprocessor: as many as run at a time, so that none is left for a second round.
PROGRAMS = {"decode": 2, "decode_skip": 4}

# and the fewest keys of one, whatever the device has room for: each leaves a partial result for the merge
FEWEST_KEYS = {"decode": 128, "decode_skip": 256}

FEWEST_SCORES = 2**22
"""Scores from which the kernels of ``hopper/`` pay: describing the tensors to the GPU takes as long as fewer scores."""
FEWEST_FORWARD = 2**29
"""Scores from which the forward pass of ``hopper/`` pays when called from Python: it is launched twice (hopper_gpu.py)."""
FEWEST_CACHED = 2**16
"""Keys of all sequences and heads from which ``hopper/decode.py`` pays, for the same reason."""
LARGEST_OPTIMISTIC_EPS = 1e-5
"""``eps`` is relative to e^m; without ``m`` it is off by a factor of at most ``1 + eps``."""
HOPPER_QUERIES = 128
"""Queries of a tile in ``hopper/forward.py`` and ``hopper/forward_narrow.py``."""
L2_SHARE = 2**24
"""Bytes of keys and values (or queries and gradients) in use at a time."""
FEWEST_TOGETHER = 256
"""Tiles that run at a time, at least: with fewer the longest ones of some pair of head and sequence come last."""
MASK_PROGRAMS = 4
"""Programs of a head that look for rows which see few keys because of a mask over keys."""

# hopper/decode.py
FEWEST_TILES = 4
"""Key tiles of a program, at least, however many programs have room: each leaves a partial result for the merge."""
FEWEST_SHARED = 2**20
"""Keys from which it pays to share those of sequences of different lengths evenly."""
EVEN_SHARE = 0.95
"""If whole pairs of sequence and key head fill at least this share of the resident programs, none is split: no merge."""
MOST_PARTIALS = 256
"""Partial results of a sequence and key head, at most: the merge holds them at once."""
FEW_PARTIALS = 4
"""Partial results that the merge reads at a time where programs share all sequences and heads: most pairs have one or two."""


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9


@functools.cache
def multiprocessors(index: int) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def row(table: Mapping[tuple[str, int], Blocks], kind: str, head_dim: int) -> Blocks:
    """A table's blocks; decoding that skips, or from fp8, has rows of its own only where others are faster."""
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    kinds = kind, kind.removesuffix("_skip"), kind.partition("_")[0]
    return next(table[each, width] for each in kinds if (each, width) in table)


def blocks(kind: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The blocks of a kernel kind (``forward``, ``queries``, ``keys``, ``decode``, ``decode_skip``, ``decode_fp8``,
    ``decode_fp8_skip``).

    ``head_dim`` is the larger of the two padded ones.
    """
    if dtype == torch.float32:
        table = _SINGLE
    else:
        hopper = device.type == "cuda" and _is_hopper(
            torch.cuda.current_device() if device.index is None else device.index
        )
        table = _HOPPER if hopper else _PORTABLE
    return row(table, kind, head_dim)


def rows(kind: str, length: int, itemsize: int) -> Rows | None:
    """The launch of a kernel over rows (``forward``, ``backward``); None for rows that are too long for one program to hold."""
    fitting = (at for (k, size, longest), at in ROWS.items() if (k, size) == (kind, itemsize) and length <= longest)
    return next(fitting, None)
