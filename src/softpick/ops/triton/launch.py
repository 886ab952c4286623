"""Calls of the kernels: tensors to strides, options to compile-time switches, blocks from the table."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from softpick.normalizers import Normalizer
from softpick.ops.triton.backward import (
    attention_backward_keys,
    attention_backward_queries,
    live_segments,
    row_statistics,
)
from softpick.ops.triton.decode import decode_merge, decode_split
from softpick.ops.triton.forward import attention_forward
from softpick.ops.triton.rows import rows_backward, rows_backward_long, rows_forward, rows_forward_long
from softpick.ops.triton.tile import LOG2E, switches
from softpick.ops.triton.tuning import (
    FEWEST_KEYS,
    HOPPER,
    LONGEST_TILE,
    PROGRAMS,
    SHORTEST_SKIP,
    blocks,
    multiprocessors,
)

hopper: Any = None
if not triton.knobs.runtime.interpret:  # Gluon has no interpreter
    with contextlib.suppress(ImportError):  # an experimental part of Triton, which other versions may not have
        from softpick.ops.triton import hopper

__all__ = [
    "Options",
    "backward",
    "decode",
    "forward",
    "live_shape",
    "skippable",
    "softpick_backward",
    "softpick_forward",
]

_LONGEST_ROW = 16384  # elements of a row that one program holds in registers
_LONGEST_MAP = 65536  # keys; beyond, the runs of the map would take more memory than they are worth
_L2_SHARE = 2**24  # bytes of keys and values (or queries and gradients) in use at a time
_FEWEST_TOGETHER = 256  # tiles: with fewer the longest ones of some pair are left for the end
_FEWEST_SCORES = 2**22  # fewer take hardly longer on the GPU than it takes to describe the tensors to it
_LARGEST_OPTIMISTIC_EPS = 1e-5  # eps is relative to e^m; without m it is off by a factor of at most 1 + eps


class Options(NamedTuple):
    """What a call computes, as :class:`softpick.ops.tiled.TileSpec`; ``softcap`` 0 is none."""

    norm: Normalizer
    scale: float
    eps: float
    left: int
    right: int
    bottom_right: bool
    softcap: float
    dropout_p: float
    skip: bool | None = None
    """Decoding: whether values of key tiles without a kept score are left unread; None: where it pays (``tuning.py``)."""


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _optimistic(dtype: torch.dtype, options: Options) -> bool:
    """Whether to try without a running maximum: not in fp16, whose range is small, nor in fp32, which is for precision."""
    return dtype == torch.bfloat16 and options.norm.base != "linear" and options.eps <= _LARGEST_OPTIMISTIC_EPS


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _precision(dtype: torch.dtype) -> str:
    """fp32 products as torch's own: exact unless ``torch.set_float32_matmul_precision`` allows tf32."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def _unit(options: Options) -> float:
    """Factor on the product ``q k``: to the tile's units, or to natural ones where the softcap is applied first."""
    return options.scale if options.softcap or options.norm.base == "linear" else options.scale * LOG2E.value


def _dropped(options: Options) -> float:
    """The probability of dropping, short of 1: the kernels divide by what is left."""
    return min(options.dropout_p, 1.0 - 1e-9)


def _common(options: Options, query: Tensor, value: Tensor, mask: Tensor | None) -> dict[str, Any]:
    width, v_width = query.shape[-1], value.shape[-1]
    return {
        **switches(options.norm),
        "BLOCK_D": _padded(width),
        "BLOCK_DV": _padded(v_width),
        "PAD_D": _padded(width) != width,
        "PAD_DV": _padded(v_width) != v_width,
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        "MASK_ROWS": mask is not None and mask.shape[2] != 1,
        "LEFT": options.left >= 0,
        "RIGHT": options.right >= 0,
        "BOTTOM_RIGHT": options.bottom_right,
        "SOFTCAP": options.softcap > 0,
        "EXACT": query.dtype == torch.float32,
        "PRECISION": _precision(query.dtype),
    }


def _capability(x: Tensor) -> int:
    """Major compute capability of the NVIDIA GPU that runs the kernels; 0 if none does."""
    if _interpreted() or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(x.device)[0]


def _relu_asm(query: Tensor) -> bool:
    """Whether relu and the conversion to 16 bits are one instruction."""
    return query.dtype in (torch.bfloat16, torch.float16) and _capability(query) >= 8


def _dependent_launch(query: Tensor) -> bool:
    """Whether a kernel can be launched before the one it depends on has ended."""
    return _capability(query) >= 9


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    if mask is None:
        return None, (0, 0, 0, 0)
    strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), tuple(strides)  # type: ignore[return-value]


def _line_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of sequence, head and line of a map of live tiles or of its runs."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def _sequences(query: Tensor, cu_q: Tensor | None, longest: int) -> tuple[int, int]:
    """(sequences in the batch, queries of the longest)."""
    return (query.shape[0], query.shape[2]) if cu_q is None else (cu_q.numel() - 1, longest)


def _row_bytes(*tensors: Tensor) -> int:
    """Bytes of a position of one head."""
    return sum(x.shape[-1] * x.element_size() for x in tensors)


def _together(pairs: int, sharing: int, read: int, tiles: int) -> int:
    """How many pairs of head and sequence run at a time (:func:`softpick.ops.triton.tile.assignment`).

    ``sharing`` of them read the same ``read`` bytes over and over, which should come from the L2 cache; each has ``tiles``.
    """
    return max(1, min(pairs, max(_FEWEST_TOGETHER // max(1, tiles), _L2_SHARE // max(1, read) * sharing)))


def skippable(norm: Normalizer) -> bool:
    """Whether the backward pass has nothing to do for a tile in which the numerator keeps no score."""
    return norm.sparse and not (norm.absolute_denominator and norm.negative_gradient)


def _grain(query: Tensor, value: Tensor) -> int:
    """Positions a side of a tile in the map of live tiles: the key tile of the forward kernel; 0 if its tiles have no map."""
    widest = max(_padded(query.shape[-1]), _padded(value.shape[-1]))
    tile = blocks("forward", widest, query.dtype, query.device)
    return 0 if tile.m % tile.n else tile.n


def live_shape(query: Tensor, value: Tensor, sequences: int, longest_q: int, longest_k: int) -> tuple[int, ...]:
    """Shape of the int32 map of live tiles that :func:`forward` writes: a bit for each pair of tiles; ``(0,)``: no map."""
    grain = _grain(query, value)
    if longest_k > _LONGEST_MAP or grain == 0:
        return (0,)
    return sequences, query.shape[1], triton.cdiv(longest_q, grain), triton.cdiv(triton.cdiv(longest_k, grain), 32)


def forward(
    options: Options,
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
    live: Tensor | None = None,
) -> None:
    """Attention into ``out`` and the row statistics. ``(B, H, T, D)``, any strides; packed: ``B = 1`` and ``cu``.

    ``live`` (:func:`live_shape`, contiguous) receives the map of live tiles, for :func:`backward`.
    """
    b, longest = _sequences(query, cu_q, longest_q)
    heads = query.shape[1]
    if not (b and heads and longest):
        return
    common = _common(options, query, value, mask)
    tile = blocks("forward", max(common["BLOCK_D"], common["BLOCK_DV"]), query.dtype, query.device)
    pointer, mask_strides = _mask_arguments(mask)
    tiles = triton.cdiv(longest, tile.m)
    groups = heads // key.shape[1]
    together = _together(heads * b, groups, _row_bytes(key, value) * (key.shape[2] if cu_k is None else longest), tiles)
    attention_forward[(tiles * heads * b,)](
        query, key, value, out, lse, mass, largest, live, pointer, sink, cu_q, cu_k, seed,
        *query.stride(), *key.stride(), *value.stride(), *out.stride(), *lse.stride(), *mask_strides,
        *_line_strides(live),
        tiles, heads, heads * b, together, groups, query.shape[2], key.shape[2], query.shape[-1], value.shape[-1],
        options.left, options.right, _unit(options), options.eps, options.softcap, _dropped(options),
        **common,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        DROPOUT=options.dropout_p > 0,
        STATS=mass is not None,
        VARLEN=cu_q is not None,
        OPTIMISTIC=_optimistic(query.dtype, options),
        TRACK=live is not None,
        SIGNED=options.scale <= 0 or (mask is not None and mask.dtype != torch.bool),
        RELU_ASM=_relu_asm(query),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def _segments(
    live: Tensor, keys: bool, block: int, grain: int, cu_q: Tensor | None, cu_k: Tensor | None, tq: int, tk: int
) -> Tensor:
    """Runs of live and dead tiles, for each key tile (``keys``) or query tile of ``block`` positions."""
    sequences, heads = live.shape[:2]
    across, along = (tk, tq) if keys else (tq, tk)
    lines, length = triton.cdiv(across, block), triton.cdiv(along, grain)
    out = torch.empty(sequences, heads, lines, length + 4, dtype=torch.int16, device=live.device)
    live_segments[lines, heads, sequences](
        live, out, cu_q, cu_k, *live.stride()[:3], *out.stride()[:3], tq, tk,
        KEYS=keys, GRAIN=grain, TOGETHER=max(1, block // grain), N=max(32, triton.next_power_of_2(length)),
        VARLEN=cu_q is not None, num_warps=1,
    )  # fmt: skip
    return out


def backward(
    options: Options,
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
    live: Tensor | None = None,
) -> Tensor | None:
    """Gradients into ``dquery``, ``dkey``, ``dvalue`` and ``dmask`` (contiguous ``(B, H, Tq, Tk)``, zeroed); returns dsink."""
    rows, heads, total_q = query.shape[0], query.shape[1], query.shape[2]
    longest = _sequences(query, cu_q, longest_q)[1]
    if key.shape[2] == 0 or total_q == 0 or not rows * heads:
        for grad in (dquery, dkey, dvalue):
            grad.zero_()
        return None if sink is None else torch.zeros_like(sink)
    if not skippable(options.norm) or dmask is not None:
        live = None  # the bias gradient of a tile that is left out would not be written
    common = _common(options, query, value, mask)
    by_hand = live is None and dmask is None and cu_q is None and hopper_can(options, query, key, value, mask, grad_out)
    padded = triton.cdiv(total_q, LONGEST_TILE) * LONGEST_TILE if by_hand else total_q
    shape = (rows, heads, 4, padded) if by_hand else (rows, heads, padded, 4)
    statistics = torch.empty(shape, dtype=torch.float32, device=query.device)
    if by_hand:
        statistics = statistics.transpose(2, 3)
    widest = max(common["BLOCK_D"], common["BLOCK_DV"])
    lines = 64 if widest <= 128 else 32
    row_statistics[triton.cdiv(padded, lines), heads, rows](
        out, grad_out, lse, statistics,
        *out.stride(), *grad_out.stride(), *lse.stride(), *statistics.stride()[1:], heads, total_q, padded, value.shape[-1],
        BASE=common["BASE"], BLOCK_M=lines, BLOCK_DV=common["BLOCK_DV"], num_warps=4,
    )  # fmt: skip
    if by_hand:
        _backward_by_hand(options, common, query, key, value, grad_out, statistics, dquery, dkey, dvalue)
    else:
        _backward_kernels(
            options, common, query, key, value, mask, cu_q, cu_k, seed, longest, longest_k, grad_out, statistics, dquery, dkey,
            dvalue, dmask, live,
        )  # fmt: skip
    if sink is None:
        return None
    level, delta = statistics[:, :, :total_q, 0], statistics[:, :, :total_q, 2]
    return -(delta * torch.exp2(sink.float().view(1, -1, 1) * LOG2E.value - level)).sum((0, 2))


def _backward_kernels(
    options: Options,
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
    live: Tensor | None,
) -> None:
    """The kernels of ``backward.py``."""
    heads, total_q, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    b = _sequences(query, cu_q, longest)[0]
    widest = max(common["BLOCK_D"], common["BLOCK_DV"])
    pointer, mask_strides = _mask_arguments(mask)
    shared = {**common, "DROPOUT": options.dropout_p > 0, "VARLEN": cu_q is not None}
    groups = heads // kv_heads
    numbers = (
        groups, total_q, key.shape[2], query.shape[-1], value.shape[-1],
        options.left, options.right, _unit(options), options.scale, options.softcap, _dropped(options),
    )  # fmt: skip
    strides = (*query.stride(), *key.stride(), *value.stride(), *grad_out.stride())
    grain = 0 if live is None else _grain(query, value)
    span = (cu_q, cu_k, longest, key.shape[2] if cu_k is None else longest_k)
    tile = blocks("keys", widest, query.dtype, query.device)
    runs = None if live is None else _segments(live, True, tile.n, grain, *span)
    tiles = triton.cdiv(span[3], tile.n)
    together = _together(kv_heads * b, 1, groups * longest * _row_bytes(query, grad_out), tiles)
    attention_backward_keys[(tiles * kv_heads * b,)](
        query, key, value, grad_out, statistics, dkey, dvalue, runs, pointer, cu_q, cu_k, seed,
        *strides, *dkey.stride(), *dvalue.stride(), *mask_strides, *_line_strides(runs),
        tiles, heads, kv_heads * b, together, *numbers,
        **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, SKIP=runs is not None, GRAIN=grain, RELU_ASM=_relu_asm(query),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = blocks("queries", widest, query.dtype, query.device)
    runs = None if live is None else _segments(live, False, tile.m, grain, *span)
    tiles = triton.cdiv(longest, tile.m)
    together = _together(heads * b, groups, span[3] * _row_bytes(key, value), tiles)
    attention_backward_queries[(tiles * heads * b,)](
        query, key, value, grad_out, statistics, dquery, dmask, runs, pointer, cu_q, cu_k, seed,
        *strides, *dquery.stride(), *mask_strides, *_line_strides(runs), tiles, heads, heads * b, together, *numbers,
        **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, SKIP=runs is not None, GRAIN=grain, BIAS_GRADIENT=dmask is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def hopper_can(
    options: Options, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grad_out: Tensor
) -> bool:
    """Whether the kernels of ``hopper.py`` compute this gradient, and it is long enough for them to be faster."""
    tensors = query, key, value, grad_out
    return (
        hopper is not None
        and _capability(query) == 9
        and query.dtype == torch.bfloat16
        and options.norm.base != "linear"
        and query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] >= _FEWEST_SCORES
        and mask is None
        and options.left < 0
        and not options.softcap
        and not options.dropout_p
        and _padded(query.shape[-1]) == _padded(value.shape[-1])
        and _padded(query.shape[-1]) in (64, 128)
        and all(
            x.data_ptr() % 16 == 0
            and x.stride(-1) == 1
            and all(n and s and s % 8 == 0 for n, s in zip(x.shape, x.stride()[:-1], strict=False))
            for x in tensors
        )
    )


def _tiles(x: Tensor, rows: int) -> Any:
    """``x`` for the tensor memory accelerator, which fetches ``rows`` positions of a head at a time."""
    return hopper.tiles(x, [1, 1, rows, _padded(x.shape[-1])])


def _backward_by_hand(
    options: Options,
    common: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    statistics: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """The kernels of ``hopper.py``."""
    (b, heads, tq, width), kv_heads, tk = query.shape, key.shape[1], key.shape[2]
    groups, padded = heads // kv_heads, common["BLOCK_D"]
    shared = {**switches(options.norm), **{name: common[name] for name in ("BLOCK_D", "RIGHT", "BOTTOM_RIGHT")}}
    plane = statistics.shape[2]
    tile = HOPPER["keys", padded]
    tiles = triton.cdiv(tk, tile.n)
    together = _together(kv_heads * b, 1, groups * tq * _row_bytes(query, grad_out), tiles)
    hopper.backward_keys[(tiles * kv_heads * b,)](
        _tiles(query, tile.m), _tiles(key, tile.n), _tiles(value, tile.n), _tiles(grad_out, tile.m), statistics, dkey, dvalue,
        *dkey.stride(), *dvalue.stride(), plane,
        tiles, heads, kv_heads * b, together, groups, tq, tk, width, value.shape[-1], options.right, _unit(options),
        options.scale, **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, STAGES=tile.stages, LATE=tile.late, num_warps=tile.warps,
    )  # fmt: skip
    tile = HOPPER["queries", padded]
    tiles = triton.cdiv(tq, tile.m)
    together = _together(heads * b, groups, tk * _row_bytes(key, value), tiles)
    hopper.backward_queries[(tiles * heads * b,)](
        _tiles(query, tile.m), _tiles(key, tile.n), _tiles(value, tile.n), _tiles(grad_out, tile.m), statistics, dquery,
        *dquery.stride(), plane,
        tiles, heads, heads * b, together, groups, tq, tk, width, options.right, _unit(options), options.scale,
        **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, STAGES=tile.stages, LATE=tile.late, num_warps=tile.warps,
    )  # fmt: skip


def decode(
    options: Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    lengths: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Few queries against a cache: ``(B, Hkv, Tk, D)``, or with ``table`` pages ``(blocks, Hkv, page, D)``."""
    b, heads, tq, _ = query.shape
    kv_heads = key.shape[1]
    if not (b and heads and tq):
        return
    groups = heads // kv_heads
    page = 0 if table is None else key.shape[2]
    tk = key.shape[2] if table is None else table.shape[1] * page
    common = _common(options, query, value, mask)
    widest = max(common["BLOCK_D"], common["BLOCK_DV"])
    skip = options.norm.sparse and (tk >= SHORTEST_SKIP if options.skip is None else options.skip)
    kind = "decode_skip" if skip else "decode"
    tile = blocks(kind, widest, query.dtype, query.device)
    rows = _padded(groups * tq)
    splits, chunk = _splits(kind, b * kv_heads, tk, tile.n, query.device)
    early = _dependent_launch(query)
    shape = (b, kv_heads, splits, rows)
    part_out = torch.empty(*shape, common["BLOCK_DV"], dtype=torch.float32, device=query.device)
    part_total, part_m = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    pointer, mask_strides = _mask_arguments(mask)
    decode_split[splits, kv_heads, b](
        query, key, value, part_out, part_total, part_m, pointer, sink, lengths, table,
        *query.stride(), *key.stride(), *value.stride(), *mask_strides, 0 if table is None else table.stride(0),
        kv_heads, groups, tq, tk, query.shape[-1], value.shape[-1],
        options.left, options.right, _unit(options), options.softcap, chunk,
        **common,
        BLOCK_M=rows,
        BLOCK_N=tile.n,
        PAGE=page,
        LENGTHS=lengths is not None,
        SKIP=skip,
        RELU_ASM=_relu_asm(query),
        EARLY=early,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    decode_merge[tq, heads, b](
        part_out, part_total, part_m, sink, out, lse, *out.stride(), *lse.stride(),
        kv_heads, groups, tq, value.shape[-1], splits, options.eps,
        BASE=common["BASE"], CONSTANT=common["CONSTANT"], BLOCK_M=rows, BLOCK_DV=common["BLOCK_DV"],
        SPLITS=triton.next_power_of_2(splits), EARLY=early, num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def _splits(kind: str, pairs: int, tk: int, block_n: int, device: torch.device) -> tuple[int, int]:
    """(programs a sequence and key head, keys of each): enough programs to fill the device, none with too few keys."""
    programs = PROGRAMS[kind] * (multiprocessors(device.index or 0) if device.type == "cuda" else 2)
    tiles = max(1, triton.cdiv(tk, block_n))
    wanted = max(1, min(128, programs // pairs, triton.cdiv(tk, FEWEST_KEYS[kind])))
    chunk = triton.cdiv(tiles, wanted) * block_n
    return max(1, triton.cdiv(tk, chunk)), chunk


def _row_launch(x: Tensor) -> tuple[bool, tuple[int], dict[str, Any]]:
    """For ``(rows, n)``: whether a row is too long for one program's registers, the grid, and the compile-time arguments."""
    rows, n = x.shape
    exact = x.dtype == torch.float32
    if n > _LONGEST_ROW:
        return True, (rows,), {"N": _LONG_BLOCK, "EXACT": exact, "num_warps": _LONG_WARPS}
    block = triton.next_power_of_2(n)
    together = max(1, _ROW_ELEMENTS // block)
    shape = {"ROWS": together, "N": block, "EXACT": exact, "num_warps": _row_warps(block)}
    return False, (triton.cdiv(rows, together),), shape


def softpick_forward(x: Tensor, eps: float, y: Tensor, lse: Tensor) -> None:
    """Softpick over the rows of a matrix ``(rows, n)`` with unit stride in a row, into contiguous ``y`` and ``lse``."""
    rows, n = x.shape
    if rows == 0 or n == 0:
        return
    long, grid, shape = _row_launch(x)
    if long:
        rows_forward_long[grid](x, y, lse, n, x.stride(0), eps, **shape)
    else:
        rows_forward[grid](x, y, lse, rows, n, x.stride(0), eps, **shape)


def softpick_backward(x: Tensor, lse: Tensor, grad: Tensor, dx: Tensor) -> None:
    """Gradient of :func:`softpick_forward` into contiguous ``dx``; ``grad`` with unit stride in a row."""
    rows, n = x.shape
    if rows == 0 or n == 0:
        return
    long, grid, shape = _row_launch(x)
    if long:
        rows_backward_long[grid](x, lse, grad, dx, n, x.stride(0), grad.stride(0), **shape)
    else:
        rows_backward[grid](x, lse, grad, dx, rows, n, x.stride(0), grad.stride(0), **shape)


_ROW_ELEMENTS = 4096  # of short rows that one program takes together
_LONG_BLOCK, _LONG_WARPS = 4096, 16


def _row_warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16
