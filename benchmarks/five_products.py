"""Kernels of ``five_products_gpu.py``: a backward pass that adds up ``dQ`` in fp32 while it makes ``dK`` and ``dV``.

The product for ``dQ`` of a tile starts with the products of the next tile, since its gradients of the scores have to go
through shared memory. ``dQ`` is transposed, so that its rows are those of the key tile in shared memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from softpick.ops.triton import dispatch
from softpick.ops.triton.base_functions import EXPM1, kept_scores, score_gradient
from softpick.ops.triton.base_functions import slopes as slopes_of
from softpick.ops.triton.device import assignment, narrow
from softpick.ops.triton.hopper.backward import _fetch_queries, _room
from softpick.ops.triton.hopper.descriptors import store
from softpick.ops.triton.hopper.versions import barrier
from softpick.ops.triton.launch import cdiv, pairs_together, switches
from softpick.ops.triton.launching import row_bytes, score_unit

NO_ADDITIONS, BY_THREADS, BY_THREADS_LATE, BY_TMA = (gl.constexpr(number) for number in range(4))
"""How a tile of ``dQ`` is added: not at all (the bound), 16 bytes a thread at a time, before or after the
product for ``dK`` starts, or by the tensor memory accelerator from shared memory."""


@gl._core.builtin
def add_tile(description, place, source, _semantic=None):
    """Add a tile in shared memory to one in global memory; Triton 3.9 has it as ``tma.async_atomic_add``."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    kind = gl._core.ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, description.handle, place, source.handle)


@triton.jit
def place_of(d, m, M: tl.constexpr, TMA: tl.constexpr):
    """Where an entry of a tile of ``dQ`` stands. Added by threads, the four that a thread has in a row are neighbours."""
    if TMA:
        return d * M + m
    return ((d // 16 * (M // 8) + m // 8) * 32 + d % 8 * 4 + m % 8 // 2) * 4 + d % 16 // 8 * 2 + m % 2


@gluon.jit
def _add(total, place, dq, D: gl.constexpr, M: gl.constexpr, layout: gl.constexpr):
    """Add ``dq`` to tile ``place`` of ``total``, each thread 16 bytes at a time."""
    d = gl.arange(0, D, layout=gl.SliceLayout(1, layout))[:, None]
    m = gl.arange(0, M, layout=gl.SliceLayout(0, layout))[None, :]
    first_of_four = ((d // 16 * (M // 8) + m // 8) * 32 + d % 8 * 4 + m % 8 // 2) * 4
    at = (total + place.to(gl.int64) * (D * M) + first_of_four).to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8}; mov.b32 $0, 0;", "=r,l,l,l,l,f,f,f,f", [at, dq],
        dtype=gl.int8, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _tile(
    it, at, place, before, earlier, next_n, next_h, count, per_head, lo, row, dk, dv, total, total_tiles, k_shared, keys,
    values, query_tiles, grad_tiles, row_tiles, queries, grads, rows, ready, slopes, sums, j2, reach, unit,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, NEGATIVE_GRADIENT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    EDGE: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr, q_layout: gl.constexpr, ADD: gl.constexpr,
    SUMS: gl.constexpr,
):  # fmt: skip
    """Add one query tile to ``dk`` and ``dv``, and to ``total`` what the tile before it has of ``dQ``."""
    stage = it % STAGES
    mbarrier.wait(ready.index(stage), (it // STAGES) & 1)
    statistics = rows.index(stage).reshape([4, BLOCK_M])
    q, do = queries.index(stage).reshape([BLOCK_M, BLOCK_D]), grads.index(stage).reshape([BLOCK_M, BLOCK_D])
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=s_layout)
    if ADD == BY_TMA and SUMS == 2:
        tma.store_wait(0)
    fence_async_shared()
    barrier()
    if ADD == BY_TMA:
        add_tile(total_tiles, [earlier * BLOCK_D, 0], sums.index((it + 1) % SUMS))
    next_n, next_h = _fetch_queries(
        it + STAGES - 2, next_n, next_h, count, per_head, lo, row, query_tiles, grad_tiles, row_tiles, queries, grads, rows,
        ready, BLOCK_M, STAGES,
    )  # fmt: skip
    dq_zero = gl.zeros([BLOCK_D, BLOCK_M], gl.float32, layout=q_layout)
    s = warpgroup_mma(keys, q.permute([1, 0]), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(values, do.permute([1, 0]), zero, use_acc=False, is_async=True)
    dq = warpgroup_mma(k_shared.permute([1, 0]), slopes.index((it + 1) % 2), dq_zero, use_acc=False, is_async=True)
    s, dk, dv = warpgroup_mma_wait(num_outstanding=2, deps=[s, dk, dv])
    e = gl.exp2(s * unit - statistics.slice(0, 1).load(s_layout))
    if EDGE:
        i = at + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))
        e = gl.where(j2 <= i[None, :] + reach, e, 0.0)
    p, e = slopes_of(s * unit if EDGE else s, e, statistics.slice(1, 1).load(s_layout), BASE, False, EDGE)
    p = narrow(p, do, True, True) if BASE == EXPM1 else kept_scores(e, s, RECTIFY).to(gl.bfloat16)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, o_layout, 2))
    dv = warpgroup_mma(p, do, dv, is_async=True)
    delta = statistics.slice(2, 1).load(s_layout)
    dp, dq = warpgroup_mma_wait(num_outstanding=1, deps=[dp, dq])
    if ADD == BY_THREADS:
        _add(total, before, dq, BLOCK_D, BLOCK_M, q_layout)
    if ADD == BY_TMA:
        if SUMS == 1:
            tma.store_wait(0)
            barrier()
        sums.index(it % SUMS).store(dq)
    ds = score_gradient(s, e, dp, delta, 0.0, BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, False).to(gl.bfloat16)
    slopes.index(it % 2).store(ds)
    ds = gl.convert_layout(ds, gl.DotOperandLayout(0, o_layout, 2))
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    if ADD == BY_THREADS_LATE:
        _add(total, before, dq, BLOCK_D, BLOCK_M, q_layout)
    return dk, dv, place, before, next_n, next_h


@gluon.jit(do_not_specialize=["heads", "tiles", "pairs", "together", "tq", "tk", "right", "tiles_m"])
def five_products(
    query_tiles, key_tiles, value_tiles, grad_tiles, row_tiles, total_tiles, dkey, dvalue, total,
    dk_b, dk_h, dk_t, dk_d, dv_b, dv_h, dv_t, dv_d, tiles_m,
    tiles, heads, pairs, together, groups, tq, tk, width, v_width, right, unit, scale,
    BASE: gl.constexpr, RECTIFY: gl.constexpr, ABSOLUTE: gl.constexpr, CONSTANT: gl.constexpr,
    NEGATIVE_GRADIENT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, RIGHT: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, ADD: gl.constexpr, SPLIT: gl.constexpr,
    SUMS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``dK`` and ``dV`` of one key tile, and its part of ``dQ``. Grid as in ``backward.py``."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_D, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps // SPLIT, SPLIT], [16, BLOCK_M // SPLIT, 16])
    tile, kv, b = assignment(tiles, heads // groups, pairs, together)
    j0 = tile * BLOCK_N
    reach = right
    if BOTTOM_RIGHT:
        reach += tk - tq
    row, head = b.to(gl.int32), (kv * groups).to(gl.int32)
    keys, values, queries, grads, ready = _room(
        key_tiles, value_tiles, query_tiles, grad_tiles, [row, kv.to(gl.int32), j0, 0], STAGES
    )
    rows = gl.allocate_shared_memory(gl.float32, [STAGES] + row_tiles.block_type.shape, row_tiles.layout)  # noqa: RUF005
    slope_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], gl.bfloat16)
    slopes = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_N, BLOCK_M], slope_layout)
    sums = slopes
    if ADD == BY_TMA:
        sums = gl.allocate_shared_memory(gl.float32, [SUMS, BLOCK_D, BLOCK_M], total_tiles.layout)
    lo, full = 0, 0
    if RIGHT:
        lo = gl.minimum(gl.maximum(0, j0 - reach), tq) // BLOCK_M * BLOCK_M
        full = gl.maximum(lo, gl.cdiv(gl.maximum(0, j0 + BLOCK_N - 1 - reach), BLOCK_M) * BLOCK_M)
    per_head = gl.cdiv(tq - lo, BLOCK_M)
    edges = gl.minimum((full - lo) // BLOCK_M, per_head)
    count = per_head * groups
    next_n, next_h = gl.to_tensor(0), head
    for it in gl.static_range(STAGES - 2):
        next_n, next_h = _fetch_queries(
            it, next_n, next_h, count, per_head, lo, row, query_tiles, grad_tiles, row_tiles, queries, grads, rows, ready,
            BLOCK_M, STAGES,
        )  # fmt: skip
    zero = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, layout=o_layout)
    dk, dv = warpgroup_mma_init(zero), warpgroup_mma_init(zero)
    before = pairs * groups * tiles_m  # the tile after the last is nobody's: what is added first was never computed
    earlier = before
    j2 = (j0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout)))[:, None]
    mbarrier.wait(ready.index(STAGES), 0)
    k, v = keys.reshape([BLOCK_N, BLOCK_D]), values.reshape([BLOCK_N, BLOCK_D])
    for group in range(groups):
        place = ((b * heads + kv * groups + group) * tiles_m).to(gl.int32) + lo // BLOCK_M
        for n in range(0, edges):
            dk, dv, before, earlier, next_n, next_h = _tile(
                group * per_head + n, lo + n * BLOCK_M, place + n, before, earlier, next_n, next_h, count, per_head, lo, row,
                dk, dv, total, total_tiles, k, k, v, query_tiles, grad_tiles, row_tiles, queries, grads, rows, ready, slopes,
                sums, j2, reach, unit, BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, True,
                s_layout, o_layout, q_layout, ADD, SUMS,
            )  # fmt: skip
        for n in range(edges, per_head):
            dk, dv, before, earlier, next_n, next_h = _tile(
                group * per_head + n, lo + n * BLOCK_M, place + n, before, earlier, next_n, next_h, count, per_head, lo, row,
                dk, dv, total, total_tiles, k, k, v, query_tiles, grad_tiles, row_tiles, queries, grads, rows, ready, slopes,
                sums, j2, reach, unit, BASE, RECTIFY, ABSOLUTE, NEGATIVE_GRADIENT, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, False,
                s_layout, o_layout, q_layout, ADD, SUMS,
            )  # fmt: skip
        dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=[dk, dv])
        dk, dv = warpgroup_mma_init(dk), warpgroup_mma_init(dv)
    dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=[dk, dv])
    for stage in gl.static_range(STAGES + 1):
        mbarrier.invalidate(ready.index(stage))
    store(dkey + b * dk_b + kv * dk_h, dk * scale, j0, tk, width, dk_t, dk_d, BLOCK_N, BLOCK_D, num_warps)
    store(dvalue + b * dv_b + kv * dv_h, dv, j0, tk, v_width, dv_t, dv_d, BLOCK_N, BLOCK_D, num_warps)
    if ADD == BY_TMA:
        tma.store_wait(0)
    fence_async_shared()
    barrier()
    if ADD == BY_TMA:
        add_tile(total_tiles, [earlier * BLOCK_D, 0], sums.index((count + 1) % SUMS))
        if SUMS == 1:
            tma.store_wait(0)
            barrier()
    # the last product stands after everything else: before the stores ptxas has every product of the kernel wait (C7515)
    dq_zero = gl.zeros([BLOCK_D, BLOCK_M], gl.float32, layout=q_layout)
    dq = warpgroup_mma(k.permute([1, 0]), slopes.index((count + 1) % 2), dq_zero, use_acc=False)
    if ADD == BY_TMA:
        sums.index(count % SUMS).store(dq)
        fence_async_shared()
        barrier()
        add_tile(total_tiles, [before * BLOCK_D, 0], sums.index(count % SUMS))
        tma.store_wait(0)
    else:
        _add(total, before, dq, BLOCK_D, BLOCK_M, q_layout)


@triton.jit
def finish(
    total,
    dquery,
    dq_b,
    dq_h,
    dq_t,
    dq_d,
    heads,
    tiles_m,
    tq,
    width,
    scale,
    M: tl.constexpr,
    D: tl.constexpr,
    TMA: tl.constexpr,
):
    """``dQ`` in its own dtype from the sums of a tile."""
    tile, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    total += ((b * heads + h) * tiles_m + tile) * (M * D)
    m, d = tl.arange(0, M)[:, None], tl.arange(0, D)[None, :]
    x = tl.load(total + place_of(d, m, M, TMA)) * scale
    i = tile * M + m
    at = dquery + b * dq_b + h * dq_h + i * dq_t + d * dq_d
    tl.store(at, x.to(dquery.dtype.element_ty), mask=(i < tq) & (d < width))


def backward(m: int, n: int, warps: int, stages: int, split: int, add: int, sums: int = 2) -> Callable[..., bool]:
    """What ``launch._backward_for_hopper`` is replaced by.

    Args:
        m: queries of a tile.
        n: keys of a tile.
        warps: of a program.
        stages: tiles under way, at least 3.
        split: warps side by side in the product for ``dQ``.
        add: see :data:`BY_TMA`.
        sums: tiles of ``dQ`` in shared memory that the accelerator reads from, 1 or 2.
    """

    def launch(plan: Any, spec: Any, query, key, value, grad_out, statistics, _least, dquery, dkey, dvalue) -> bool:
        common = plan.common
        (b, heads, tq, width), kv_heads, tk = query.shape, key.shape[1], key.shape[2]
        groups, padded, tiles_m, tiles = heads // kv_heads, common["BLOCK_D"], cdiv(tq, m), cdiv(tk, n)
        shared = {**switches(spec.norm), **{name: common[name] for name in ("BLOCK_D", "RIGHT", "BOTTOM_RIGHT")}}
        total = torch.zeros((b * heads * tiles_m + 1) * padded, m, dtype=torch.float32, device=query.device)
        layout = gl.NVMMASharedLayout.get_default_for([padded, m], gl.float32)
        together = pairs_together(kv_heads * b, 1, groups * tq * (row_bytes(query, grad_out) + 4 * padded), tiles)
        five_products[(tiles * kv_heads * b,)](
            *(dispatch.hopper.tiles(x, [1, 1, rows, padded]) for x, rows in ((query, m), (key, n), (value, n), (grad_out, m))),
            dispatch.hopper.row_tiles(statistics, m),
            TensorDescriptor(total, list(total.shape), list(total.stride()), [padded, m], layout),
            dkey, dvalue, total, *dkey.stride(), *dvalue.stride(), tiles_m,
            tiles, heads, kv_heads * b, together, groups, tq, tk, width, value.shape[-1], spec.right, score_unit(spec),
            spec.scale, **shared, BLOCK_M=m, BLOCK_N=n, STAGES=stages, ADD=add, SPLIT=split, SUMS=sums, num_warps=warps,
        )  # fmt: skip
        finish[(tiles_m, heads, b)](
            total, dquery, *dquery.stride(), heads, tiles_m, tq, width, spec.scale, M=m, D=padded, TMA=add == BY_TMA.value,
            num_warps=4,
        )  # fmt: skip
        return True

    warnings.filterwarnings("error", ".*could not be built")  # or the kernels for every GPU would be timed
    return launch
