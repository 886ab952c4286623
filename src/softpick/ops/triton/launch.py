"""Launches of the attention kernels: tensors to strides, the call to compile-time switches, block sizes from the table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softpick.ops.spec import AttentionSpec
from softpick.ops.triton import dispatch, tuning
from softpick.ops.triton.backward import attention_backward_keys, attention_backward_queries
from softpick.ops.triton.base_functions import LOG2E, switches
from softpick.ops.triton.device import FEW, SHRINK_ROWS
from softpick.ops.triton.forward import attention_forward
from softpick.ops.triton.kernel_cache import run
from softpick.ops.triton.launching import (
    capped_unit,
    common_switches,
    dependent_launch,
    drop_probability,
    few_programs,
    mask_arguments,
    pairs_together,
    relu_asm,
    row_bytes,
    score_unit,
    sequence_sizes,
    tried,
)
from softpick.ops.triton.shapes import cdiv
from softpick.ops.triton.statistics import row_statistics

__all__ = ["backward", "forward"]


def forward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    longest_q: int,
    out: Tensor,
    lse: Tensor,
    mass: Tensor | None,
    largest: Tensor | None,
) -> None:
    """Attention into ``out`` and the row statistics. ``(B, H, T, D)``, any strides; packed: ``B = 1`` and ``cu``."""
    b, longest = sequence_sizes(query, cu_q, longest_q)
    heads = query.shape[1]
    if not (b and heads and longest):
        return
    common = common_switches(spec, query, value, mask)
    groups = heads // key.shape[1]
    keys = key.shape[2] if cu_k is None else longest
    optimistic = dispatch.optimistic(query.dtype, spec)
    tile = tuning.blocks("forward", max(common["BLOCK_D"], common["BLOCK_DV"]), query.dtype, query.device)
    choice = dispatch.forward_kernel(
        spec, query, key, value, mask, cu_q is not None, mass is not None, out, (longest, keys)
    )
    redo = None
    if choice.hopper:
        redo = tried(_forward_for_hopper, spec, common, query, key, value, sink, out, lse)
    if redo is not None:
        tile, optimistic = tile._replace(m=tuning.HOPPER_QUERIES), False
    pointer, mask_strides = mask_arguments(mask)
    tiles = cdiv(longest, tile.m)
    together = pairs_together(heads * b, groups, row_bytes(key, value) * keys, tiles)
    few = 0
    if query.dtype != torch.float32:  # products in fp32 round no weights
        few = few_programs(spec, query, longest, key.shape[2] if cu_k is None else longest, mask, cu_q is not None)
    early = redo is not None and dependent_launch(query)

    def launch(few: int, programs: int) -> None:
        run(
            attention_forward, (programs,),
            query, key, value, out, lse, mass, largest, pointer, sink, cu_q, cu_k, seed, redo,
            *query.stride(), *key.stride(), *value.stride(), *out.stride(), *lse.stride(), *mask_strides,
            tiles, heads, heads * b, together, few, groups, query.shape[2], key.shape[2], query.shape[-1], value.shape[-1],
            spec.left, spec.right, score_unit(spec), spec.eps, spec.softcap, drop_probability(spec),
            **common,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            DROPOUT=spec.dropout_p > 0,
            STATS=mass is not None,
            VARLEN=cu_q is not None,
            OPTIMISTIC=optimistic,
            RELU_ASM=relu_asm(query),
            EARLY=early,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip

    if mask is None:
        launch(few, (few + tiles) * heads * b)
    else:  # which rows see few keys is not known before the launch: they are written a second time
        launch(0, tiles * heads * b)
        if few:
            launch(few, few * heads * b)


def _forward_for_hopper(
    spec: AttentionSpec,
    common: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """Launch a forward kernel of ``hopper/``; returns which tiles have to be computed again, an int32 each."""
    (b, heads, tq, _), groups, tk = query.shape, query.shape[1] // key.shape[1], key.shape[2]
    tiles = cdiv(tq, tuning.HOPPER_QUERIES)
    together = pairs_together(heads * b, groups, row_bytes(key, value) * tk, tiles)
    padded, total = common["BLOCK_D"], tiles * heads * b
    ring = tuning.HOPPER_FORWARD[padded]
    turn = torch.zeros(1 + total, dtype=torch.int32, device=query.device)
    kernel, programs, registers = dispatch.hopper.forward_narrow, total, None
    if padded > 64:
        # programs that stay, and registers of three warpgroups' worth of threads, which the kernel gives out anew
        kernel, registers = dispatch.hopper.forward_queries, 168
        programs = min(total, tuning.multiprocessors(query.device.index or 0))
    run(
        kernel, (programs,),
        dispatch.hopper.tiles(query, [1, 1, tuning.HOPPER_QUERIES // 2, padded]),
        *(dispatch.hopper.tiles(x, [1, 1, ring.n, padded]) for x in (key, value)),
        dispatch.hopper.tiles(out, [1, 1, tuning.HOPPER_QUERIES // 2, padded]), lse, sink, turn, *lse.stride(),
        tiles, heads, heads * b, together, groups, tq, tk, spec.right, *capped_unit(spec), spec.eps,
        **switches(spec.norm), **{name: common[name] for name in ("BLOCK_D", "RIGHT", "BOTTOM_RIGHT", "SOFTCAP")},
        BLOCK_N=ring.n, STAGES=ring.stages, VALUES=ring.values, num_warps=ring.warps, maxnreg=registers,
    )  # fmt: skip
    return turn[1:]


def backward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    longest_q: int,
    longest_k: int,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dmask: Tensor | None,
) -> Tensor | None:
    """Gradients into ``dquery``, ``dkey``, ``dvalue`` and ``dmask`` (contiguous ``(B, H, Tq, Tk)``, zeroed); returns dsink."""
    rows, heads, total_q = query.shape[0], query.shape[1], query.shape[2]
    longest = sequence_sizes(query, cu_q, longest_q)[1]
    if key.shape[2] == 0 or total_q == 0 or not rows * heads:
        for grad in (dquery, dkey, dvalue):
            grad.zero_()
        return None if sink is None else torch.zeros_like(sink)
    common = common_switches(spec, query, value, mask)
    for_hopper = dispatch.backward_kernel(
        spec, query, key, value, mask, cu_q is not None, dmask is not None, grad_out
    ).hopper
    padded = cdiv(total_q, tuning.LONGEST_TILE) * tuning.LONGEST_TILE if for_hopper else total_q
    shape = (rows, heads, 4, padded) if for_hopper else (rows, heads, padded, 4)
    statistics = torch.empty(shape, dtype=torch.float32, device=query.device)
    least = None
    if for_hopper:
        statistics = statistics.transpose(2, 3)
        if query.dtype == torch.float16:
            least = statistics.new_empty((rows, heads, cdiv(total_q, SHRINK_ROWS.value)))
    _row_statistics(
        spec, common, query, key, value, mask, sink, cu_q, cu_k, seed, longest, longest_k, out, lse, grad_out, statistics,
        least,
    )  # fmt: skip
    if for_hopper:
        for_hopper = tried(
            _backward_for_hopper, spec, common, query, key, value, grad_out, statistics, least, dquery, dkey,
            dvalue,
        )  # fmt: skip
        if not for_hopper:
            statistics = statistics[:, :, :total_q].contiguous()
    if not for_hopper:
        _backward_kernels(
            spec, common, query, key, value, mask, cu_q, cu_k, seed, longest, longest_k, grad_out, statistics, dquery, dkey,
            dvalue, dmask,
        )  # fmt: skip
    if sink is None:
        return None
    level, delta = statistics[:, :, :total_q, 0], statistics[:, :, :total_q, 2]
    return -(delta * torch.exp2(sink.float().view(1, -1, 1) * LOG2E.value - level)).sum((0, 2))


def _row_statistics(
    spec: AttentionSpec,
    common: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    longest: int,
    longest_k: int,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    statistics: Tensor,
    least: Tensor | None,
) -> None:
    """Launch ``row_statistics``: ``statistics`` ``(B, H, Tq or more, 4)``, and ``least`` of SHRINK_ROWS rows each."""
    (rows, heads, total_q, _), padded = query.shape, statistics.shape[2]
    few = 0
    if not spec.part:
        few = few_programs(spec, query, longest, key.shape[2] if cu_k is None else longest_k, mask, cu_q is not None)
    lines = SHRINK_ROWS.value if max(common["BLOCK_D"], common["BLOCK_DV"]) <= 128 else 32
    pointer, mask_strides = mask_arguments(mask)
    apart = mask is not None or cu_q is not None
    first = 0 if apart else few
    logits = lse if spec.part and sink is None else sink  # not read: only rows that see few keys need it

    def launch(tiles: int, programs: int, sequences: int) -> None:
        run(
            row_statistics, (programs, heads, sequences),
            query, key, value, out, grad_out, lse, statistics, least, pointer, logits, cu_q, cu_k, seed,
            *query.stride(), *key.stride(), *value.stride(), *out.stride(), *grad_out.stride(), *lse.stride(), *mask_strides,
            *statistics.stride()[1:],
            tiles, heads, heads // key.shape[1], total_q, key.shape[2], padded, query.shape[-1], value.shape[-1],
            spec.left, spec.right, score_unit(spec), spec.eps, spec.softcap, drop_probability(spec),
            **common, BLOCK_M=lines, DROPOUT=spec.dropout_p > 0, VARLEN=cu_q is not None, PART=spec.part,
            num_warps=4,
        )  # fmt: skip

    launch(first, first + cdiv(padded, lines), rows)
    if apart and few:
        launch(few, few, sequence_sizes(query, cu_q, longest)[0])


def _backward_kernels(
    spec: AttentionSpec,
    common: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    longest: int,
    longest_k: int,
    grad_out: Tensor,
    statistics: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dmask: Tensor | None,
) -> None:
    """Launch the kernels of ``backward.py``."""
    heads, total_q, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    b = sequence_sizes(query, cu_q, longest)[0]
    widest = max(common["BLOCK_D"], common["BLOCK_DV"])
    pointer, mask_strides = mask_arguments(mask)
    shared = {**common, "DROPOUT": spec.dropout_p > 0, "VARLEN": cu_q is not None}
    groups = heads // kv_heads
    numbers = (
        groups, total_q, key.shape[2], query.shape[-1], value.shape[-1],
        spec.left, spec.right, score_unit(spec), spec.scale, spec.softcap, drop_probability(spec),
    )  # fmt: skip
    strides = (*query.stride(), *key.stride(), *value.stride(), *grad_out.stride())
    longest_k = key.shape[2] if cu_k is None else longest_k
    shared["EXACT"] = shared["EXACT"] or longest_k <= FEW.value  # every row sees few keys
    tile = tuning.blocks("keys", widest, query.dtype, query.device)
    tiles = cdiv(longest_k, tile.n)
    together = pairs_together(kv_heads * b, 1, groups * longest * row_bytes(query, grad_out), tiles)
    run(
        attention_backward_keys, (tiles * kv_heads * b,),
        query, key, value, grad_out, statistics, dkey, dvalue, pointer, cu_q, cu_k, seed,
        *strides, *dkey.stride(), *dvalue.stride(), *mask_strides,
        tiles, heads, kv_heads * b, together, *numbers,
        **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, RELU_ASM=relu_asm(query),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = tuning.blocks("queries", widest, query.dtype, query.device)
    tiles = cdiv(longest, tile.m)
    together = pairs_together(heads * b, groups, longest_k * row_bytes(key, value), tiles)
    run(
        attention_backward_queries, (tiles * heads * b,),
        query, key, value, grad_out, statistics, dquery, dmask, pointer, cu_q, cu_k, seed,
        *strides, *dquery.stride(), *mask_strides, tiles, heads, heads * b, together, *numbers,
        **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, BIAS_GRADIENT=dmask is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _backward_for_hopper(
    spec: AttentionSpec,
    common: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    statistics: Tensor,
    least: Tensor | None,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> bool:
    """Launch the kernels of ``hopper/backward.py``; true when they are launched."""
    (b, heads, tq, width), kv_heads, tk = query.shape, key.shape[1], key.shape[2]
    groups, padded = heads // kv_heads, common["BLOCK_D"]
    shared = {**switches(spec.norm), **{name: common[name] for name in ("BLOCK_D", "RIGHT", "BOTTOM_RIGHT", "SOFTCAP")}}
    plane = statistics.shape[2]

    def described(m: int, n: int) -> tuple[Any, ...]:
        """The inputs for the tensor memory accelerator, which fetches ``m`` queries or ``n`` keys of a head at a time."""
        rows = (query, m), (key, n), (value, n), (grad_out, m)
        return tuple(dispatch.hopper.tiles(x, [1, 1, positions, padded]) for x, positions in rows)

    tile = tuning.HOPPER["keys", padded]
    tensors = described(tile.m, tile.n)
    tiles = cdiv(tk, tile.n)
    together = pairs_together(kv_heads * b, 1, groups * tq * row_bytes(query, grad_out), tiles)
    run(
        dispatch.hopper.backward_keys, (tiles * kv_heads * b,),
        *tensors, dispatch.hopper.row_tiles(statistics.transpose(2, 3), tile.m), least, dkey, dvalue,
        *dkey.stride(), *dvalue.stride(),
        tiles, heads, kv_heads * b, together, groups, tq, tk, width, value.shape[-1], spec.right, *capped_unit(spec),
        spec.scale, **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, STAGES=tile.stages, IN_REGISTERS=tile.in_registers,
        num_warps=tile.warps,
    )  # fmt: skip
    before, tile = tile, tuning.HOPPER["queries", padded]
    if tile[:2] != before[:2]:  # else the descriptions serve again: making them takes as long as a launch
        tensors = described(tile.m, tile.n)
    tiles = cdiv(tq, tile.m)
    together = pairs_together(heads * b, groups, tk * row_bytes(key, value), tiles)
    run(
        dispatch.hopper.backward_queries, (tiles * heads * b,),
        *tensors, statistics, dquery,
        *dquery.stride(), plane,
        tiles, heads, heads * b, together, groups, tq, tk, width, spec.right, *capped_unit(spec), spec.scale,
        **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, STAGES=tile.stages, IN_REGISTERS=tile.in_registers,
        num_warps=tile.warps,
    )  # fmt: skip
    return True
