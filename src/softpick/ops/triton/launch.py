"""Launches of the attention kernels: tensors to strides, the call to compile-time switches, block sizes from the table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softpick.ops.spec import AttentionSpec
from softpick.ops.triton import dispatch, tuning
from softpick.ops.triton.backward import attention_backward_keys, attention_backward_queries
from softpick.ops.triton.base_functions import LOG2E, switches
from softpick.ops.triton.device import FEW, SHRINK_ROWS
from softpick.ops.triton.forward import attention_forward
from softpick.ops.triton.kernel_cache import Launch, described, remembered
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
    inputs = query, key, value, mask, sink, cu_q, cu_k, seed
    plan = remembered(
        attention_forward,
        ("forward", longest_q, *_call_key(spec, query), *map(described, (*inputs, out, lse, mass, largest))),
        lambda: _ForwardPlan(spec, query, key, value, mask, cu_q, cu_k, longest_q, out, mass),
    )
    if plan.empty:
        return
    turn = None
    if plan.for_hopper:
        turn = tried(_forward_for_hopper, plan, spec, query, key, value, sink, out, lse)
    again = turn is not None
    launches = plan.portable.get(again)
    if launches is None:
        launches = plan.portable[again] = plan.launches(spec, query, key, value, mask, out, lse, mass, again)
    pointer = mask_arguments(mask)[0]
    for launch in launches:
        launch(query, key, value, out, lse, mass, largest, pointer, sink, cu_q, cu_k, seed, turn)


def _call_key(spec: AttentionSpec, query: Tensor) -> tuple[Any, ...]:
    """What besides the tensors decides how a call is launched; tests and benchmarks change the thresholds."""
    precision = torch.get_float32_matmul_precision() if query.dtype == torch.float32 else None
    thresholds = tuning.FEWEST_SCORES, tuning.FEWEST_FORWARD, dispatch.hopper_refuses
    return spec, query.get_device(), precision, *thresholds


class _ForwardPlan:
    """What forward passes of the same shapes and options have in common. Holds no tensors."""

    def __init__(
        self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cu_q: Tensor | None,
        cu_k: Tensor | None, longest_q: int, out: Tensor, mass: Tensor | None,
    ) -> None:  # fmt: skip
        self.sequences, self.longest = sequence_sizes(query, cu_q, longest_q)
        self.empty = not (self.sequences and query.shape[1] and self.longest)
        if self.empty:
            return
        self.packed = cu_q is not None
        self.keys = key.shape[2] if cu_k is None else self.longest
        self.common = common_switches(spec, query, value, mask)
        self.for_hopper = dispatch.forward_kernel(
            spec, query, key, value, mask, self.packed, mass is not None, out, (self.longest, self.keys)
        ).hopper
        self.hopper: tuple[Launch, int] | None = None
        """The kernel of ``hopper/``, and how many numbers it leaves."""
        self.portable: dict[bool, list[Launch]] = {}
        """The launches of ``forward.py``, after that kernel and alone."""

    def launches(
        self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
        mass: Tensor | None, again: bool,
    ) -> list[Launch]:  # fmt: skip
        """Those of ``forward.py``; ``again``: for the tiles that the kernel of ``hopper/`` has noted."""
        common, heads, b = self.common, query.shape[1], self.sequences
        groups = heads // key.shape[1]
        tile = tuning.blocks("forward", max(common["BLOCK_D"], common["BLOCK_DV"]), query.dtype, query.device)
        if again:
            tile = tile._replace(m=tuning.HOPPER_QUERIES)
        tiles = cdiv(self.longest, tile.m)
        together = pairs_together(heads * b, groups, row_bytes(key, value) * self.keys, tiles)
        few = 0
        if query.dtype != torch.float32:  # products in fp32 round no weights
            few = few_programs(spec, query, self.longest, self.keys, mask, self.packed)
        early = again and dependent_launch(query)
        constants = {
            **common,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "DROPOUT": spec.dropout_p > 0,
            "STATS": mass is not None,
            "VARLEN": self.packed,
            "OPTIMISTIC": not again and dispatch.optimistic(query.dtype, spec),
            "RELU_ASM": relu_asm(query),
            "EARLY": early,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            **({"launch_pdl": True} if early else {}),
        }

        def launch(few: int, programs: int) -> Launch:
            rest = (
                *query.stride(), *key.stride(), *value.stride(), *out.stride(), *lse.stride(), *mask_arguments(mask)[1],
                tiles, heads, heads * b, together, few, groups, query.shape[2], key.shape[2], query.shape[-1],
                value.shape[-1], spec.left, spec.right, score_unit(spec), spec.eps, spec.softcap, drop_probability(spec),
            )  # fmt: skip
            return Launch(attention_forward, (programs,), rest, constants)

        if mask is None:
            return [launch(few, (few + tiles) * heads * b)]
        # which rows see few keys is not known before the launch: they are written a second time
        return [launch(0, tiles * heads * b)] + ([launch(few, few * heads * b)] if few else [])


def _forward_for_hopper(
    plan: _ForwardPlan,
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """Launch a forward kernel of ``hopper/``; returns a counter and which tiles have to be computed again, an int32 each."""
    if plan.hopper is None:
        plan.hopper = _hopper_forward(plan.common, spec, query, key, value, lse)
    launch, numbers = plan.hopper
    turn = query.new_zeros(numbers, dtype=torch.int32)
    launch(query, key, value, out, lse, sink, turn)
    return turn


def _hopper_forward(
    common: dict[str, Any], spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, lse: Tensor
) -> tuple[Launch, int]:
    (b, heads, tq, _), groups, tk = query.shape, query.shape[1] // key.shape[1], key.shape[2]
    tiles = cdiv(tq, tuning.HOPPER_QUERIES)
    together = pairs_together(heads * b, groups, row_bytes(key, value) * tk, tiles)
    padded, total = common["BLOCK_D"], tiles * heads * b
    ring = tuning.HOPPER_FORWARD[padded]
    kernel, programs, registers = dispatch.hopper.forward_narrow, total, None
    if padded > 64:
        # programs that stay, and registers of three warpgroups' worth of threads, which the kernel gives out anew
        kernel, registers = dispatch.hopper.forward_queries, 168
        programs = min(total, tuning.multiprocessors(query.device.index or 0))
    rest = (
        *lse.stride(), tiles, heads, heads * b, together, groups, tq, tk, spec.right, *capped_unit(spec), spec.eps,
    )  # fmt: skip
    constants = {
        **_for_hopper(spec, common),
        "BLOCK_N": ring.n,
        "STAGES": ring.stages,
        "VALUES": ring.values,
        "num_warps": ring.warps,
        "maxnreg": registers,
    }
    rows = tuning.HOPPER_QUERIES // 2
    described = tuple(_tiles(positions, padded) for positions in (rows, ring.n, ring.n, rows))
    return Launch(kernel, (programs,), rest, constants, described), 1 + total


def _for_hopper(spec: AttentionSpec, common: dict[str, Any]) -> dict[str, Any]:
    """The compile-time switches that the kernels of ``hopper/`` have."""
    return {**switches(spec.norm), **{name: common[name] for name in ("BLOCK_D", "RIGHT", "BOTTOM_RIGHT", "SOFTCAP")}}


def _tiles(positions: int, width: int) -> Callable[[Tensor], Any]:
    """What describes a tensor to the tensor memory accelerator, which fetches so many positions of a head at a time."""
    return functools.partial(dispatch.hopper.tiles, block=[1, 1, positions, width])


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
    hopper: bool = True,
) -> Tensor | None:
    """Gradients into ``dquery``, ``dkey``, ``dvalue`` and ``dmask`` (contiguous ``(B, H, Tq, Tk)``, zeroed); returns dsink.

    ``hopper``: whether the kernels for Hopper GPUs may be tried.
    """
    rows, heads, total_q = query.shape[0], query.shape[1], query.shape[2]
    longest = sequence_sizes(query, cu_q, longest_q)[1]
    if key.shape[2] == 0 or total_q == 0 or not rows * heads:
        for grad in (dquery, dkey, dvalue):
            grad.zero_()
        return None if sink is None else torch.zeros_like(sink)
    inputs = query, key, value, mask, sink, cu_q, cu_k, seed
    written = dquery, dkey, dvalue, dmask
    plan = remembered(
        attention_backward_keys,
        (
            "backward",
            hopper,
            longest_q,
            longest_k,
            *_call_key(spec, query),
            *map(described, (*inputs, out, lse, grad_out, *written)),
        ),
        lambda: _BackwardPlan(spec, query, key, value, mask, cu_q, cu_k, longest, longest_k, grad_out, dmask, hopper),
    )
    statistics = query.new_empty(plan.statistics, dtype=torch.float32)
    least = None if plan.least is None else query.new_empty(plan.least, dtype=torch.float32)
    if plan.rows is None:
        plan.rows = plan.row_statistics(spec, query, key, value, mask, sink, cu_q, out, lse, grad_out)
    pointer = mask_arguments(mask)[0]
    logits = lse if spec.part and sink is None else sink  # not read: only rows that see few keys need it
    for launch in plan.rows:
        launch(query, key, value, out, grad_out, lse, statistics, least, pointer, logits, cu_q, cu_k, seed)
    if not plan.for_hopper:
        if plan.kernels is None:
            plan.kernels = plan.portable(spec, query, key, value, mask, grad_out, dquery, dkey, dvalue, dmask)
        tensors = query, key, value, grad_out, statistics
        plan.kernels[0](*tensors, dkey, dvalue, pointer, cu_q, cu_k, seed)
        plan.kernels[1](*tensors, dquery, dmask, pointer, cu_q, cu_k, seed)
    elif not tried(
        _backward_for_hopper, plan, spec, query, key, value, grad_out, statistics, least, dquery, dkey, dvalue
    ):
        return backward(
            spec, query, key, value, mask, sink, cu_q, cu_k, seed, longest_q, longest_k, out, lse, grad_out, dquery, dkey,
            dvalue, dmask, hopper=False,
        )  # fmt: skip
    if sink is None:
        return None
    if plan.for_hopper:
        statistics = statistics.transpose(2, 3)
    level, delta = statistics[:, :, :total_q, 0], statistics[:, :, :total_q, 2]
    return -(delta * torch.exp2(sink.float().view(1, -1, 1) * LOG2E.value - level)).sum((0, 2))


class _BackwardPlan:
    """What backward passes of the same shapes and options have in common. Holds no tensors."""

    def __init__(
        self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cu_q: Tensor | None,
        cu_k: Tensor | None, longest: int, longest_k: int, grad_out: Tensor, dmask: Tensor | None, hopper: bool,
    ) -> None:  # fmt: skip
        (b, heads, total_q, _), self.packed = query.shape, cu_q is not None
        self.longest, self.longest_k = longest, key.shape[2] if cu_k is None else longest_k
        self.sequences = sequence_sizes(query, cu_q, longest)[0]
        self.common = common_switches(spec, query, value, mask)
        chosen = dispatch.backward_kernel(spec, query, key, value, mask, self.packed, dmask is not None, grad_out)
        self.for_hopper = hopper and chosen.hopper
        self.padded = cdiv(total_q, tuning.LONGEST_TILE) * tuning.LONGEST_TILE if self.for_hopper else total_q
        self.statistics = (b, heads, 4, self.padded) if self.for_hopper else (b, heads, self.padded, 4)
        """Shape; and of ``least``, which the kernels for Hopper GPUs need in fp16."""
        self.least = None
        if self.for_hopper and query.dtype == torch.float16:
            self.least = b, heads, cdiv(total_q, SHRINK_ROWS.value)
        self.rows: list[Launch] | None = None
        self.kernels: tuple[Launch, Launch] | None = None
        """Of the keys, of the queries."""

    def row_statistics(
        self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sink: Tensor | None,
        cu_q: Tensor | None, out: Tensor, lse: Tensor, grad_out: Tensor,
    ) -> list[Launch]:  # fmt: skip
        """The launches that write ``statistics`` and ``least``."""
        (b, heads, total_q, _), common, padded = query.shape, self.common, self.padded
        few = 0 if spec.part else few_programs(spec, query, self.longest, self.longest_k, mask, self.packed)
        lines = SHRINK_ROWS.value if max(common["BLOCK_D"], common["BLOCK_DV"]) <= 128 else 32
        apart = mask is not None or self.packed
        first = 0 if apart else few
        constants = {
            **common, "BLOCK_M": lines, "DROPOUT": spec.dropout_p > 0, "VARLEN": self.packed, "PART": spec.part, "num_warps": 4,
        }  # fmt: skip
        strides = (4 * padded, 1, padded) if self.for_hopper else (4 * padded, 4, 1)  # of a head, a row, a number

        def launch(tiles: int, programs: int, sequences: int) -> Launch:
            rest = (
                *query.stride(), *key.stride(), *value.stride(), *out.stride(), *grad_out.stride(), *lse.stride(),
                *mask_arguments(mask)[1], *strides,
                tiles, heads, heads // key.shape[1], total_q, key.shape[2], padded, query.shape[-1], value.shape[-1],
                spec.left, spec.right, score_unit(spec), spec.eps, spec.softcap, drop_probability(spec),
            )  # fmt: skip
            return Launch(row_statistics, (programs, heads, sequences), rest, constants)

        launches = [launch(first, first + cdiv(padded, lines), b)]
        return launches + ([launch(few, few, self.sequences)] if apart and few else [])

    def portable(
        self, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grad_out: Tensor,
        dquery: Tensor, dkey: Tensor, dvalue: Tensor, dmask: Tensor | None,
    ) -> tuple[Launch, Launch]:  # fmt: skip
        """The launches of ``backward.py``."""
        heads, total_q, kv_heads, b, common = query.shape[1], query.shape[2], key.shape[1], self.sequences, self.common
        widest, longest, longest_k = max(common["BLOCK_D"], common["BLOCK_DV"]), self.longest, self.longest_k
        shared = {**common, "DROPOUT": spec.dropout_p > 0, "VARLEN": self.packed}
        shared["EXACT"] = shared["EXACT"] or longest_k <= FEW.value  # every row sees few keys
        groups, mask_strides = heads // kv_heads, mask_arguments(mask)[1]
        numbers = (
            groups, total_q, key.shape[2], query.shape[-1], value.shape[-1],
            spec.left, spec.right, score_unit(spec), spec.scale, spec.softcap, drop_probability(spec),
        )  # fmt: skip
        strides = (*query.stride(), *key.stride(), *value.stride(), *grad_out.stride())
        tile = tuning.blocks("keys", widest, query.dtype, query.device)
        tiles = cdiv(longest_k, tile.n)
        together = pairs_together(kv_heads * b, 1, groups * longest * row_bytes(query, grad_out), tiles)
        rest = *strides, *dkey.stride(), *dvalue.stride(), *mask_strides, tiles, heads, kv_heads * b, together, *numbers
        constants = {
            **shared, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "RELU_ASM": relu_asm(query), "num_warps": tile.warps,
            "num_stages": tile.stages,
        }  # fmt: skip
        keys = Launch(attention_backward_keys, (tiles * kv_heads * b,), rest, constants)
        tile = tuning.blocks("queries", widest, query.dtype, query.device)
        tiles = cdiv(longest, tile.m)
        together = pairs_together(heads * b, groups, longest_k * row_bytes(key, value), tiles)
        rest = *strides, *dquery.stride(), *mask_strides, tiles, heads, heads * b, together, *numbers
        constants = {
            **shared, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BIAS_GRADIENT": dmask is not None, "num_warps": tile.warps,
            "num_stages": tile.stages,
        }  # fmt: skip
        return keys, Launch(attention_backward_queries, (tiles * heads * b,), rest, constants)


def _backward_for_hopper(
    plan: _BackwardPlan,
    spec: AttentionSpec,
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
    if plan.kernels is None:
        plan.kernels = _hopper_backward(plan, spec, query, key, value, grad_out, dquery, dkey, dvalue)
    plan.kernels[0](query, key, value, grad_out, statistics, least, dkey, dvalue)
    plan.kernels[1](query, key, value, grad_out, statistics, dquery)
    return True


def _hopper_backward(
    plan: _BackwardPlan,
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> tuple[Launch, Launch]:
    (b, heads, tq, width), kv_heads, tk = query.shape, key.shape[1], key.shape[2]
    groups, padded = heads // kv_heads, plan.common["BLOCK_D"]
    shared = _for_hopper(spec, plan.common)

    def launch(kernel: Any, programs: int, tile: Any, rest: tuple[Any, ...], *more: Callable[[Tensor], Any]) -> Launch:
        described = tuple(_tiles(positions, padded) for positions in (tile.m, tile.n, tile.n, tile.m))
        constants = {
            **shared, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "STAGES": tile.stages, "IN_REGISTERS": tile.in_registers,
            "num_warps": tile.warps,
        }  # fmt: skip
        return Launch(kernel, (programs,), rest, constants, described + more)

    tile = tuning.HOPPER["keys", padded]
    tiles = cdiv(tk, tile.n)
    together = pairs_together(kv_heads * b, 1, groups * tq * row_bytes(query, grad_out), tiles)
    keys = launch(
        dispatch.hopper.backward_keys, tiles * kv_heads * b, tile,
        (
            *dkey.stride(), *dvalue.stride(), tiles, heads, kv_heads * b, together, groups, tq, tk, width, value.shape[-1],
            spec.right, *capped_unit(spec), spec.scale,
        ),
        functools.partial(dispatch.hopper.row_tiles, rows=tile.m),
    )  # fmt: skip
    tile = tuning.HOPPER["queries", padded]
    tiles = cdiv(tq, tile.m)
    together = pairs_together(heads * b, groups, tk * row_bytes(key, value), tiles)
    queries = launch(
        dispatch.hopper.backward_queries, tiles * heads * b, tile,
        (
            *dquery.stride(), plan.padded, tiles, heads, heads * b, together, groups, tq, tk, width, spec.right,
            *capped_unit(spec), spec.scale,
        ),
    )  # fmt: skip
    return keys, queries
