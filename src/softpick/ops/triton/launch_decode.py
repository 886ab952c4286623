"""Launches of the kernels for few queries: how many programs share the keys of a sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softpick.ops.fp8 import Scales
from softpick.ops.spec import AttentionSpec
from softpick.ops.triton import dispatch, tuning
from softpick.ops.triton.base_functions import switches
from softpick.ops.triton.decode import decode_merge, decode_split
from softpick.ops.triton.kernel_cache import run
from softpick.ops.triton.launching import (
    common_switches,
    dependent_launch,
    mask_arguments,
    relu_asm,
    score_unit,
    tried,
)
from softpick.ops.triton.shapes import cdiv, padded, power_of_2

__all__ = ["decode"]


def decode(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    lengths: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    listed: Listed | None = None,
    scales: Scales | None = None,
) -> None:
    """Few queries against a cache: ``(B, Hkv, Tk, D)``, or with ``table`` pages ``(blocks, Hkv, page, D)``.

    ``listed``: the blocks that are read; all if None. ``scales``: of a cache in fp8.
    """
    if not query.numel():
        return
    page = 0 if table is None else key.shape[2]
    tk = key.shape[2] if table is None else table.shape[1] * page
    keys = query.shape[0] * key.shape[1] * tk
    tensors = query, key, value, mask, sink, lengths, table, out, lse
    for_hopper = dispatch.decode_kernel(spec, query, key, value, mask, page, keys, listed is not None).hopper
    if not (for_hopper and tried(_decode, True, spec, page, tk, None, scales, *tensors)):
        _decode(False, spec, page, tk, listed, scales, *tensors)


class Listed(NamedTuple):
    """Blocks of keys that are read, of all."""

    blocks: Tensor
    """``(B, Hkv, blocks)`` int32, contiguous: the blocks of a sequence and key head that are read, then others."""
    counts: Tensor
    """``(B, Hkv)`` int32, contiguous: how many."""
    rest: Tensor
    """``(B, H, Tq)`` fp32, contiguous: what the others add to the denominator."""
    size: int
    """Keys of a block."""


class _Plan(NamedTuple):
    """How programs divide the keys of a call."""

    rows: int
    """Of a tile of queries."""
    block_n: int
    """Keys of a tile."""
    splits: int
    """Programs of a sequence and key head; of all where they share."""
    chunk: int = 0
    """Keys of a program of ``decode.py``."""
    fewest: int = 1
    """Key tiles of a program that shares, at least."""
    shared: bool = False
    """Whether all programs share the keys of all sequences and heads."""
    whole: bool = False
    """Whether no sequence and head is divided, so that there is nothing to merge."""


def _plan(kind: str, tile: tuning.Blocks, query: Tensor, kv_heads: int, tk: int) -> _Plan:
    """The plan for ``decode.py``."""
    b, heads, tq, _ = query.shape
    resident = _resident(tuning.PROGRAMS[kind], query.device)
    splits, chunk = _splits(resident, tuning.FEWEST_KEYS[kind], b * kv_heads, tk, tile.n)
    return _Plan(padded(heads // kv_heads * tq), tile.n, splits, chunk)


def _plan_for_hopper(schedule: tuning.Rings, query: Tensor, kv_heads: int, tk: int, lengths: Tensor | None) -> _Plan:
    """The plan for ``hopper/decode.py``."""
    b, heads, tq, _ = query.shape
    pairs, rows = b * kv_heads, max(8, power_of_2(heads // kv_heads * tq))
    resident = _resident(schedule.programs, query.device)
    uneven = lengths is not None and b > 1
    if pairs <= resident and not (uneven and pairs * tk >= tuning.FEWEST_SHARED):
        splits, _ = _splits(resident, tuning.FEWEST_TILES * schedule.n, pairs, tk, schedule.n)
        return _Plan(rows, schedule.n, splits, whole=splits == 1)
    splits = pairs // cdiv(pairs, resident)
    if lengths is None and pairs % splits == 0 and splits >= tuning.EVEN_SHARE * resident:
        return _Plan(rows, schedule.n, splits, shared=True, whole=True)
    return _Plan(rows, schedule.n, resident, fewest=tuning.FEWEST_TILES, shared=True)


def _tile(kind: str, widest: int, query: Tensor, size: int, fp8: bool) -> tuning.Blocks:
    """The tile of ``decode.py``; ``size``: keys of a block of a list, or 0."""
    tile = tuning.blocks(kind.replace("decode", "decode_fp8") if fp8 else kind, widest, query.dtype, query.device)
    return tile._replace(n=min(tile.n, size)) if size else tile


def skips_values(spec: AttentionSpec, for_hopper: bool, cached: int) -> bool:
    """Whether values of key tiles without a kept score stay unread: where that pays with ``cached`` keys of all heads."""
    return spec.norm.sparse and (for_hopper or cached >= tuning.SKIP_FROM)


def _decode(
    for_hopper: bool,
    spec: AttentionSpec,
    page: int,
    tk: int,
    listed: Listed | None,
    scales: Scales | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    lengths: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> bool:
    """:func:`decode` by ``hopper/decode.py`` or by ``decode.py``; true when the kernels are launched."""
    b, heads, tq, _ = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    common = common_switches(spec, query, value, mask)
    widest = max(common["BLOCK_D"], common["BLOCK_DV"])
    blocks, counts, rest, size = listed or (None, None, None, 0)
    skip = skips_values(spec, for_hopper, b * kv_heads * tk) or size > 0
    early = dependent_launch(query)
    cache = _cache(scales, query, key, value)
    if for_hopper:
        schedule = tuning.HOPPER_DECODE[widest] if scales is None else tuning.HOPPER_DECODE_FP8
        plan = _plan_for_hopper(schedule, query, kv_heads, tk, lengths)
    else:
        kind = "decode_skip" if skip else "decode"
        tile = _tile(kind, widest, query, size, scales is not None)
        plan = _plan(kind, tile, query, kv_heads, tk)
    pairs, splits = b * kv_heads, plan.splits
    count = 0 if plan.whole else pairs + splits if plan.shared else pairs * splits
    partials = _partials(count, plan.rows, common["BLOCK_DV"], query.device)
    if for_hopper:
        run(
            dispatch.hopper.decode_keys, (splits,) if plan.shared else (splits, kv_heads, b),
            query, dispatch.hopper.tiles(cache.key, [1, 1, schedule.n, common["BLOCK_D"] // (1 + cache.pairs)]),
            dispatch.hopper.tiles(cache.value, [1, 1, schedule.n, common["BLOCK_DV"] // (1 + cache.pairs)]),
            *partials, out, lse, sink, lengths, table, *cache.scales,
            *query.stride(), *out.stride(), *lse.stride(), 0 if table is None else table.stride(0), *cache.strides,
            b, kv_heads, groups, tq, tk, query.shape[-1], value.shape[-1],
            spec.left, spec.right, score_unit(spec), spec.softcap, spec.eps, plan.fewest, key.shape[0],
            **switches(spec.norm),
            **{name: common[name] for name in ("BLOCK_D", "BLOCK_DV", "LEFT", "RIGHT", "BOTTOM_RIGHT", "SOFTCAP")},
            BLOCK_M=plan.rows, BLOCK_N=plan.block_n, STAGES=schedule.stages, VALUES=schedule.values, PAGE=page,
            LENGTHS=lengths is not None, SKIP=skip, SCALED=cache.scaled, SHARED=plan.shared,
            WHOLE=plan.whole, num_warps=schedule.warps,
        )  # fmt: skip
        if plan.whole:
            return True
    else:
        pointer, mask_strides = mask_arguments(mask)
        run(
            decode_split, (splits, kv_heads, b),
            query, cache.key, cache.value, *partials, pointer, lengths, table, blocks, counts,
            *cache.scales, *query.stride(), *cache.key.stride(), *cache.value.stride(), *mask_strides,
            0 if table is None else table.stride(0), *cache.strides, kv_heads, groups, tq, tk, query.shape[-1],
            cache.value.shape[-1], spec.left, spec.right, score_unit(spec), spec.softcap,
            plan.chunk if blocks is None else blocks.shape[-1], key.shape[0],
            **common,
            BLOCK_M=plan.rows, BLOCK_N=plan.block_n, PAGE=page, LENGTHS=lengths is not None, SKIP=skip, LISTED=size,
            SCALED=cache.scaled, PAIRS=cache.pairs, RELU_ASM=relu_asm(query), EARLY=early,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    # several programs a row where it has many partial results; where it has one or two, programs would only start late
    columns = min(128 if plan.shared else 32, common["BLOCK_DV"])
    run(
        decode_merge, (tq * cdiv(value.shape[-1], columns), heads, b),
        *partials, sink, lengths, rest, out, lse, *out.stride(), *lse.stride(),
        b, kv_heads, groups, tq, tk, value.shape[-1], spec.left, spec.right, splits, plan.fewest, spec.eps,
        **{name: common[name] for name in ("BASE", "CONSTANT", "BLOCK_DV", "LEFT", "RIGHT", "BOTTOM_RIGHT")},
        BLOCK_M=plan.rows, BLOCK_N=plan.block_n, COLUMNS=columns,
        PARTIALS=tuning.FEW_PARTIALS if plan.shared else power_of_2(splits),
        LENGTHS=lengths is not None, LISTED=size, SHARED=plan.shared, EARLY=early, num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return True


def _partials(count: int, rows: int, width: int, device: torch.device) -> list[Tensor]:
    """Room for numerators, denominators and ``m`` of so many partial results."""
    shapes = (count, rows, width), (count, rows), (count, rows)
    return [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]


class _Cache(NamedTuple):
    """Keys and values as ``decode.py`` takes them."""

    key: Tensor
    value: Tensor
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    strides: tuple[int, ...] = (0, 0, 0, 0)
    """Of the scales."""
    scaled: int = 0
    """2: each page has its own scale; 1: it has not; 0: not in fp8."""
    pairs: bool = False
    """Whether two numbers in fp8 are one of 16 bits."""


def _cache(scales: Scales | None, query: Tensor, key: Tensor, value: Tensor) -> _Cache:
    if scales is None:
        return _Cache(key, value)
    pairs = dispatch.in_pairs(query, key, value)
    if pairs:
        key, value = key.view(torch.int16), value.view(torch.int16)
    strides = *scales.key.stride(), *scales.value.stride()
    return _Cache(key, value, (scales.key, scales.value), strides, 1 + scales.of_pages, pairs)


def _resident(programs: int, device: torch.device) -> int:
    """How many programs run at a time if each multiprocessor runs so many."""
    return programs * (tuning.multiprocessors(device.index or 0) if device.type == "cuda" else 2)


def _splits(resident: int, fewest: int, pairs: int, tk: int, block_n: int) -> tuple[int, int]:
    """How many programs share a sequence and key head, and the keys of each: no more than run at a time, none too small."""
    tiles = max(1, cdiv(tk, block_n))
    wanted = max(1, min(tuning.MOST_PARTIALS, resident // pairs, cdiv(tk, fewest)))
    chunk = cdiv(tiles, wanted) * block_n
    return max(1, cdiv(tk, chunk)), chunk
