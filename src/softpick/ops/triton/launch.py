"""Calls of the kernels: tensors to strides, options to compile-time switches, blocks from the table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from softpick.normalizers import Normalizer
from softpick.ops.kernel_errors import KernelError, fall_back
from softpick.ops.triton import tuning
from softpick.ops.triton.backward import (
    attention_backward_keys,
    attention_backward_queries,
)
from softpick.ops.triton.decode import decode_merge, decode_split
from softpick.ops.triton.device import FEW, FEW_ROWS, LOG2E, switches
from softpick.ops.triton.forward import attention_forward
from softpick.ops.triton.kernel_cache import run
from softpick.ops.triton.rows import (
    rows_backward,
    rows_backward_long,
    rows_forward,
    rows_forward_long,
)
from softpick.ops.triton.statistics import row_statistics
from softpick.ops.triton.tuning import (
    FEWEST_KEYS,
    HOPPER,
    HOPPER_DECODE,
    HOPPER_FORWARD,
    HOPPER_ROWS,
    LONGEST_TILE,
    MOST_WORDS,
    PROGRAMS,
    SKIP_FROM,
    blocks,
    multiprocessors,
)

hopper: Any = None
_no_hopper: KernelError | None = None
if not triton.knobs.runtime.interpret:  # Gluon has no interpreter
    try:  # an experimental part of Triton, which other versions may not have, or have under other names
        from softpick.ops.triton import hopper
    except Exception as error:
        _no_hopper = KernelError(
            "softpick.ops.triton.hopper", f"{type(error).__name__}: {error}; Triton {triton.__version__}"
        )

__all__ = [
    "Options",
    "backward",
    "decode",
    "forward",
    "softpick_backward",
    "softpick_forward",
]

_LONGEST_ROW = 16384  # elements of a row that one program holds in registers
_L2_SHARE = 2**24  # bytes of keys and values (or queries and gradients) in use at a time
_FEWEST_TOGETHER = 256  # tiles: with fewer the longest ones of some pair are left for the end
_FEWEST_SCORES = 2**22  # fewer take hardly longer on the GPU than it takes to describe the tensors to it
_FEWEST_FORWARD = 2**30  # the same for the forward pass, which is launched twice: a third of a millisecond of Python
_HOPPER_QUERIES = 128  # of a tile in hopper/forward.py and hopper/forward_narrow.py
_FEWEST_CACHED = 2**16  # keys of all sequences and heads from which decoding by hand pays, for the same reason
_FEWEST_TILES = 4  # of a program of hopper/decode.py, however many there is room for: each leaves a part for the merge
_FEWEST_SHARED = 2**20  # keys from which it pays to share those of sequences of different lengths evenly
_EVEN = 0.95  # share of the places from which programs of hopper/decode.py take whole sequences and heads: then none is merged
_MOST_PARTS = 256  # of a sequence and key head: the merge holds them at once
_FEW_PARTS = 4  # that it takes at a time where programs share all sequences and heads, and most have one or two
_PORTABLE_TAKES = "the Triton kernels for every GPU take its place: up to twice the time of those for Hopper GPUs"
_MASK_TILES = 4  # programs of a head that look for rows which see few keys because of a mask over keys
_LARGEST_OPTIMISTIC_EPS = 1e-5  # eps is relative to e^m; without m it is off by a factor of at most 1 + eps


class Options(NamedTuple):
    """What a call computes, as :class:`softpick.ops.cpu.TileSpec`; ``softcap`` 0 is none."""

    norm: Normalizer
    scale: float
    eps: float
    left: int
    right: int
    bottom_right: bool
    softcap: float
    dropout_p: float
    part: bool = False
    """Backward: the keys are some of those that the output and lse are of (ring attention)."""
    skip: bool | None = None
    """Decoding: whether values of key tiles without a kept score are left unread; None: where it pays (``tuning.py``)."""


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _optimistic(dtype: torch.dtype, options: Options) -> bool:
    """Whether to try without a running maximum: not in fp16, whose range is small, nor in fp32, which is for precision."""
    return dtype == torch.bfloat16 and options.norm.base != "linear" and options.eps <= _LARGEST_OPTIMISTIC_EPS


def _cdiv(x: int, y: int) -> int:
    """As ``triton.cdiv``, which looks for compile-time arguments first, and takes as long as allocating a tensor."""
    return (x + y - 1) // y


def _power_of_2(x: int) -> int:
    """The next one, as ``triton.next_power_of_2``, which is as slow as ``triton.cdiv``."""
    return 1 << (int(x) - 1).bit_length()


def _padded(width: int) -> int:
    return max(16, _power_of_2(width))


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
    return _major(x.get_device())


def _on_hopper(x: Tensor) -> bool:
    """Whether the kernels of ``hopper/`` are there and run on its GPU."""
    if _capability(x) != 9:
        return False
    if _no_hopper is not None:
        fall_back(_no_hopper, _PORTABLE_TAKES)
    return hopper is not None


def _tried(kernels: Callable[..., Any], *args: Any) -> Any:
    """What ``kernels`` of ``hopper/`` return for these arguments; None, with a warning, where they cannot be built."""
    try:
        return kernels(*args)
    except KernelError as failure:
        fall_back(failure, _PORTABLE_TAKES)
        return None


@functools.cache
def _major(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


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


def _sequences(query: Tensor, cu_q: Tensor | None, longest: int) -> tuple[int, int]:
    """(sequences in the batch, queries of the longest)."""
    return (query.shape[0], query.shape[2]) if cu_q is None else (cu_q.numel() - 1, longest)


def _row_bytes(*tensors: Tensor) -> int:
    """Bytes of a position of one head."""
    return sum(x.shape[-1] * x.element_size() for x in tensors)


def _together(pairs: int, sharing: int, read: int, tiles: int) -> int:
    """How many pairs of head and sequence run at a time (:func:`softpick.ops.triton.device.assignment`).

    ``sharing`` of them read the same ``read`` bytes over and over, which should come from the L2 cache; each has ``tiles``.
    """
    return max(1, min(pairs, max(_FEWEST_TOGETHER // max(1, tiles), _L2_SHARE // max(1, read) * sharing)))


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
) -> None:
    """Attention into ``out`` and the row statistics. ``(B, H, T, D)``, any strides; packed: ``B = 1`` and ``cu``."""
    b, longest = _sequences(query, cu_q, longest_q)
    heads = query.shape[1]
    if not (b and heads and longest):
        return
    common = _common(options, query, value, mask)
    groups = heads // key.shape[1]
    keys = key.shape[2] if cu_k is None else longest
    optimistic = _optimistic(query.dtype, options)
    tile = blocks("forward", max(common["BLOCK_D"], common["BLOCK_DV"]), query.dtype, query.device)
    plain = cu_q is None and mass is None
    many = b * heads * longest * keys >= _FEWEST_FORWARD
    redo = None
    if plain and optimistic and many and hopper_can(options, query, key, value, mask, out):
        redo = _tried(_forward_by_hand, options, common, query, key, value, sink, out, lse)
    if redo is not None:
        tile, optimistic = tile._replace(m=_HOPPER_QUERIES), False
    pointer, mask_strides = _mask_arguments(mask)
    tiles = _cdiv(longest, tile.m)
    together = _together(heads * b, groups, _row_bytes(key, value) * keys, tiles)
    few = 0
    if query.dtype != torch.float32:  # products in fp32 round no weights
        few = _few_tiles(options, query, longest, key.shape[2] if cu_k is None else longest, mask, cu_q is not None)
    early = redo is not None and _dependent_launch(query)

    def launch(few: int, programs: int) -> None:
        run(
            attention_forward, (programs,),
            query, key, value, out, lse, mass, largest, pointer, sink, cu_q, cu_k, seed, redo,
            *query.stride(), *key.stride(), *value.stride(), *out.stride(), *lse.stride(), *mask_strides,
            tiles, heads, heads * b, together, few, groups, query.shape[2], key.shape[2], query.shape[-1], value.shape[-1],
            options.left, options.right, _unit(options), options.eps, options.softcap, _dropped(options),
            **common,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            DROPOUT=options.dropout_p > 0,
            STATS=mass is not None,
            VARLEN=cu_q is not None,
            OPTIMISTIC=optimistic,
            RELU_ASM=_relu_asm(query),
            EARLY=early,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip

    if mask is None:
        launch(few, (few + tiles) * heads * b)
    else:  # which rows see few keys is not known beforehand: they are written again
        launch(0, tiles * heads * b)
        if few:
            launch(few, few * heads * b)


def _forward_by_hand(
    options: Options,
    common: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """A kernel of ``hopper/``; returns which tiles have to be taken again, an int32 each."""
    (b, heads, tq, _), groups, tk = query.shape, query.shape[1] // key.shape[1], key.shape[2]
    tiles = _cdiv(tq, _HOPPER_QUERIES)
    together = _together(heads * b, groups, _row_bytes(key, value) * tk, tiles)
    padded, total = common["BLOCK_D"], tiles * heads * b
    ring = HOPPER_FORWARD[padded]
    turn = torch.zeros(1 + total, dtype=torch.int32, device=query.device)
    kernel, programs, registers = hopper.forward_narrow, total, None
    if padded > 64:
        # programs that stay, and registers of three warpgroups' worth of threads, which the kernel gives out anew
        kernel, programs, registers = hopper.forward_queries, min(total, multiprocessors(query.device.index or 0)), 168
    run(
        kernel, (programs,),
        hopper.tiles(query, [1, 1, _HOPPER_QUERIES // 2, padded]),
        *(hopper.tiles(x, [1, 1, ring.n, padded]) for x in (key, value)),
        hopper.tiles(out, [1, 1, _HOPPER_QUERIES // 2, padded]), lse, sink, turn, *lse.stride(),
        tiles, heads, heads * b, together, groups, tq, tk, options.right, _unit(options), options.eps,
        **switches(options.norm), **{name: common[name] for name in ("BLOCK_D", "RIGHT", "BOTTOM_RIGHT")},
        BLOCK_N=ring.n, STAGES=ring.stages, VALUES=ring.values, num_warps=ring.warps, maxnreg=registers,
    )  # fmt: skip
    return turn[1:]


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
) -> Tensor | None:
    """Gradients into ``dquery``, ``dkey``, ``dvalue`` and ``dmask`` (contiguous ``(B, H, Tq, Tk)``, zeroed); returns dsink."""
    rows, heads, total_q = query.shape[0], query.shape[1], query.shape[2]
    longest = _sequences(query, cu_q, longest_q)[1]
    if key.shape[2] == 0 or total_q == 0 or not rows * heads:
        for grad in (dquery, dkey, dvalue):
            grad.zero_()
        return None if sink is None else torch.zeros_like(sink)
    common = _common(options, query, value, mask)
    by_hand = dmask is None and cu_q is None and hopper_can(options, query, key, value, mask, grad_out)
    padded = _cdiv(total_q, LONGEST_TILE) * LONGEST_TILE if by_hand else total_q
    shape = (rows, heads, 4, padded) if by_hand else (rows, heads, padded, 4)
    statistics = torch.empty(shape, dtype=torch.float32, device=query.device)
    if by_hand:
        statistics = statistics.transpose(2, 3)
    _row_statistics(
        options, common, query, key, value, mask, sink, cu_q, cu_k, seed, longest, longest_k, out, lse, grad_out, statistics
    )  # fmt: skip
    if by_hand:
        by_hand = _tried(
            _backward_by_hand, options, common, query, key, value, grad_out, statistics, dquery, dkey, dvalue
        )  # fmt: skip
        if not by_hand:
            statistics = statistics[:, :, :total_q].contiguous()
    if not by_hand:
        _backward_kernels(
            options, common, query, key, value, mask, cu_q, cu_k, seed, longest, longest_k, grad_out, statistics, dquery, dkey,
            dvalue, dmask,
        )  # fmt: skip
    if sink is None:
        return None
    level, delta = statistics[:, :, :total_q, 0], statistics[:, :, :total_q, 2]
    return -(delta * torch.exp2(sink.float().view(1, -1, 1) * LOG2E.value - level)).sum((0, 2))


def _few_tiles(options: Options, query: Tensor, tq: int, tk: int, mask: Tensor | None, packed: bool) -> int:
    """How many programs of a head take the rows that see few keys (``rows_with_few``); 0 if there are none or in fp32."""
    if mask is not None and mask.shape[2] == 1 and options.left < 0:
        return _MASK_TILES
    offset = tk - tq if options.bottom_right else 0
    bounded = options.right >= 0
    first, last = (max(0, -(offset + options.right)) if bounded else 0), tq
    if mask is None:
        high = min(tk, tq + offset + options.right) if bounded else tk
        low = max(0, tq - 1 + offset - options.left) if options.left >= 0 else 0
        if high - low > FEW.value:
            last = min(tq, FEW.value - offset - options.right) if bounded else first
    return max(int(packed), _cdiv(max(0, last - first), FEW_ROWS.value))  # each packed sequence may be a short one


def _row_statistics(
    options: Options,
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
) -> None:
    """Into ``statistics`` ``(B, H, Tq or more, 4)``."""
    (rows, heads, total_q, _), padded = query.shape, statistics.shape[2]
    few = 0
    if not options.part:
        few = _few_tiles(options, query, longest, key.shape[2] if cu_k is None else longest_k, mask, cu_q is not None)
    lines = 64 if max(common["BLOCK_D"], common["BLOCK_DV"]) <= 128 else 32
    pointer, mask_strides = _mask_arguments(mask)
    apart = mask is not None or cu_q is not None
    first = 0 if apart else few
    logits = lse if options.part and sink is None else sink  # not read: only rows that see few keys need it

    def launch(tiles: int, programs: int, sequences: int) -> None:
        run(
            row_statistics, (programs, heads, sequences),
            query, key, value, out, grad_out, lse, statistics, pointer, logits, cu_q, cu_k, seed,
            *query.stride(), *key.stride(), *value.stride(), *out.stride(), *grad_out.stride(), *lse.stride(), *mask_strides,
            *statistics.stride()[1:],
            tiles, heads, heads // key.shape[1], total_q, key.shape[2], padded, query.shape[-1], value.shape[-1],
            options.left, options.right, _unit(options), options.eps, options.softcap, _dropped(options),
            **common, BLOCK_M=lines, DROPOUT=options.dropout_p > 0, VARLEN=cu_q is not None, PART=options.part,
            num_warps=4,
        )  # fmt: skip

    launch(first, first + _cdiv(padded, lines), rows)
    if apart and few:
        launch(few, few, _sequences(query, cu_q, longest)[0])


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
    longest_k = key.shape[2] if cu_k is None else longest_k
    shared["EXACT"] = shared["EXACT"] or longest_k <= FEW.value  # every row sees few keys
    tile = blocks("keys", widest, query.dtype, query.device)
    tiles = _cdiv(longest_k, tile.n)
    together = _together(kv_heads * b, 1, groups * longest * _row_bytes(query, grad_out), tiles)
    run(
        attention_backward_keys, (tiles * kv_heads * b,),
        query, key, value, grad_out, statistics, dkey, dvalue, pointer, cu_q, cu_k, seed,
        *strides, *dkey.stride(), *dvalue.stride(), *mask_strides,
        tiles, heads, kv_heads * b, together, *numbers,
        **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, RELU_ASM=_relu_asm(query),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = blocks("queries", widest, query.dtype, query.device)
    tiles = _cdiv(longest, tile.m)
    together = _together(heads * b, groups, longest_k * _row_bytes(key, value), tiles)
    run(
        attention_backward_queries, (tiles * heads * b,),
        query, key, value, grad_out, statistics, dquery, dmask, pointer, cu_q, cu_k, seed,
        *strides, *dquery.stride(), *mask_strides, tiles, heads, heads * b, together, *numbers,
        **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, BIAS_GRADIENT=dmask is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def hopper_can(options: Options, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *more: Tensor) -> bool:
    """Whether the kernels of ``hopper/`` compute this, and it is long enough for them to be faster.

    ``more`` has to be fetched, too.
    """
    padded = _padded(query.shape[-1])
    return (
        _on_hopper(query)
        and query.dtype == torch.bfloat16
        and options.norm.base != "linear"
        and options.scale > 0  # signs are those of the products
        and query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] >= _FEWEST_SCORES
        and mask is None
        and options.left < 0
        and not options.softcap
        and not options.dropout_p
        and padded in (64, 128)
        and padded == _padded(value.shape[-1])
        and all(_fetchable(x) for x in (query, key, value, *more))
    )


def hopper_can_decode(
    options: Options, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, page: int, keys: int
) -> bool:
    """Whether ``hopper/decode.py`` takes it; describing the cache to the GPU pays from so many keys on."""
    return (
        _on_hopper(query)
        and query.dtype == torch.bfloat16
        and keys >= _FEWEST_CACHED
        and query.shape[1] // key.shape[1] * query.shape[2] <= 32
        and mask is None
        and (options.norm.base == "linear" or options.eps <= _LARGEST_OPTIMISTIC_EPS)
        and _padded(key.shape[-1]) in (64, 128)
        and _padded(value.shape[-1]) in (64, 128)
        and page % 64 == 0
        and _fetchable(key)
        and _fetchable(value)
    )


def _fetchable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator takes this as bf16: multiples of 16 bytes, nothing empty, nothing expanded."""
    b, h, t, d = x.stride()
    there = x.dtype == torch.bfloat16 and x.numel() > 0 and x.data_ptr() % 16 == 0
    return there and d == 1 and (b | h | t) % 8 == 0 and 0 not in (b, h, t)


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
) -> bool:
    """The kernels of ``hopper/backward.py``; true when they are launched."""
    (b, heads, tq, width), kv_heads, tk = query.shape, key.shape[1], key.shape[2]
    groups, padded = heads // kv_heads, common["BLOCK_D"]
    shared = {**switches(options.norm), **{name: common[name] for name in ("BLOCK_D", "RIGHT", "BOTTOM_RIGHT")}}
    plane = statistics.shape[2]

    def described(m: int, n: int) -> tuple[Any, ...]:
        """The inputs for the tensor memory accelerator, which fetches ``m`` queries or ``n`` keys of a head at a time."""
        rows = (query, m), (key, n), (value, n), (grad_out, m)
        return tuple(hopper.tiles(x, [1, 1, positions, padded]) for x, positions in rows)

    tile = HOPPER["keys", padded]
    tensors = described(tile.m, tile.n)
    tiles = _cdiv(tk, tile.n)
    together = _together(kv_heads * b, 1, groups * tq * _row_bytes(query, grad_out), tiles)
    run(
        hopper.backward_keys, (tiles * kv_heads * b,),
        *tensors, hopper.row_tiles(statistics.transpose(2, 3), tile.m), dkey, dvalue,
        *dkey.stride(), *dvalue.stride(),
        tiles, heads, kv_heads * b, together, groups, tq, tk, width, value.shape[-1], options.right, _unit(options),
        options.scale, **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, STAGES=tile.stages, IN_REGISTERS=tile.in_registers,
        num_warps=tile.warps,
    )  # fmt: skip
    before, tile = tile, HOPPER["queries", padded]
    if tile[:2] != before[:2]:  # else the descriptions serve again: making them takes as long as a launch
        tensors = described(tile.m, tile.n)
    tiles = _cdiv(tq, tile.m)
    together = _together(heads * b, groups, tk * _row_bytes(key, value), tiles)
    run(
        hopper.backward_queries, (tiles * heads * b,),
        *tensors, statistics, dquery,
        *dquery.stride(), plane,
        tiles, heads, heads * b, together, groups, tq, tk, width, options.right, _unit(options), options.scale,
        **shared, BLOCK_M=tile.m, BLOCK_N=tile.n, STAGES=tile.stages, IN_REGISTERS=tile.in_registers,
        num_warps=tile.warps,
    )  # fmt: skip
    return True


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
    if not query.numel():
        return
    page = 0 if table is None else key.shape[2]
    tk = key.shape[2] if table is None else table.shape[1] * page
    keys = query.shape[0] * key.shape[1] * tk
    tensors = query, key, value, mask, sink, lengths, table, out, lse
    by_hand = hopper_can_decode(options, query, key, value, mask, page, keys)
    if not (by_hand and _tried(_decode, True, options, page, tk, *tensors)):
        _decode(False, options, page, tk, *tensors)


def _decode(
    by_hand: bool,
    options: Options,
    page: int,
    tk: int,
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
    common = _common(options, query, value, mask)
    widest = max(common["BLOCK_D"], common["BLOCK_DV"])
    pays = by_hand or b * kv_heads * tk >= SKIP_FROM
    skip = options.norm.sparse and (pays if options.skip is None else options.skip)
    kind = "decode_skip" if skip else "decode"
    pairs, fewest, shared, whole = b * kv_heads, 1, False, False
    if by_hand:
        rows = max(8, _power_of_2(groups * tq))
        schedule = HOPPER_DECODE[widest]
        block_n, places = schedule.n, _places(schedule.programs, query.device)
        uneven = lengths is not None and b > 1
        shared = pairs > places or (uneven and pairs * tk >= _FEWEST_SHARED)
        if shared:
            splits = pairs // _cdiv(pairs, places)
            whole = lengths is None and pairs % splits == 0 and splits >= _EVEN * places
            if not whole:
                splits, fewest = places, _FEWEST_TILES
        else:
            splits, _ = _splits(places, _FEWEST_TILES * block_n, pairs, tk, block_n)
            whole = splits == 1
    else:
        rows = _padded(groups * tq)
        tile = blocks(kind, widest, query.dtype, query.device)
        block_n, places = tile.n, _places(PROGRAMS[kind], query.device)
        splits, chunk = _splits(places, FEWEST_KEYS[kind], pairs, tk, block_n)
    early = _dependent_launch(query)
    shape = (0 if whole else pairs + splits if shared else pairs * splits, rows)
    part_out = torch.empty(*shape, common["BLOCK_DV"], dtype=torch.float32, device=query.device)
    part_total, part_m = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    if by_hand:
        run(
            hopper.decode_keys, (splits,) if shared else (splits, kv_heads, b),
            query, hopper.tiles(key, [1, 1, schedule.n, common["BLOCK_D"]]),
            hopper.tiles(value, [1, 1, schedule.n, common["BLOCK_DV"]]), part_out, part_total, part_m, out, lse, sink,
            lengths, table, *query.stride(), *out.stride(), *lse.stride(), 0 if table is None else table.stride(0),
            b, kv_heads, groups, tq, tk, query.shape[-1], value.shape[-1],
            options.left, options.right, _unit(options), options.softcap, options.eps, fewest, key.shape[0],
            **switches(options.norm),
            **{name: common[name] for name in ("BLOCK_D", "BLOCK_DV", "LEFT", "RIGHT", "BOTTOM_RIGHT", "SOFTCAP")},
            BLOCK_M=rows,
            BLOCK_N=block_n,
            STAGES=schedule.stages,
            VALUES=schedule.values,
            PAGE=page,
            LENGTHS=lengths is not None,
            SKIP=skip,
            SHARED=shared,
            WHOLE=whole,
            num_warps=schedule.warps,
        )  # fmt: skip
        if whole:
            return True
    else:
        pointer, mask_strides = _mask_arguments(mask)
        run(
            decode_split, (splits, kv_heads, b),
            query, key, value, part_out, part_total, part_m, pointer, lengths, table,
            *query.stride(), *key.stride(), *value.stride(), *mask_strides, 0 if table is None else table.stride(0),
            kv_heads, groups, tq, tk, query.shape[-1], value.shape[-1],
            options.left, options.right, _unit(options), options.softcap, chunk, key.shape[0],
            **common,
            BLOCK_M=rows,
            BLOCK_N=block_n,
            PAGE=page,
            LENGTHS=lengths is not None,
            SKIP=skip,
            RELU_ASM=_relu_asm(query),
            EARLY=early,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    # several programs a row where it has many parts; where it has one or two, programs would only start late
    columns = min(128 if shared else 32, common["BLOCK_DV"])
    run(
        decode_merge, (tq * _cdiv(value.shape[-1], columns), heads, b),
        part_out, part_total, part_m, sink, lengths, out, lse, *out.stride(), *lse.stride(),
        b, kv_heads, groups, tq, tk, value.shape[-1], options.left, options.right, splits, fewest, options.eps,
        **{name: common[name] for name in ("BASE", "CONSTANT", "BLOCK_DV", "LEFT", "RIGHT", "BOTTOM_RIGHT")},
        BLOCK_M=rows, BLOCK_N=block_n, COLUMNS=columns, PARTS=_FEW_PARTS if shared else _power_of_2(splits),
        LENGTHS=lengths is not None, SHARED=shared, EARLY=early, num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return True


def _places(programs: int, device: torch.device) -> int:
    """How many programs run at a time if a multiprocessor has so many."""
    return programs * (multiprocessors(device.index or 0) if device.type == "cuda" else 2)


def _splits(places: int, fewest: int, pairs: int, tk: int, block_n: int) -> tuple[int, int]:
    """(programs a sequence and key head, keys of each): no more than there are places, none with too few keys."""
    tiles = max(1, _cdiv(tk, block_n))
    wanted = max(1, min(_MOST_PARTS, places // pairs, _cdiv(tk, fewest)))
    chunk = _cdiv(tiles, wanted) * block_n
    return max(1, _cdiv(tk, chunk)), chunk


def _registers(warps: int) -> int:
    """How many a thread may have if so many warps are to run on a multiprocessor."""
    return min(255, 65536 // (32 * warps) // 8 * 8)


def _row_options(x: Tensor, launch: tuning.Rows) -> dict[str, Any]:
    # 1024 threads are the most a program may have; AMD's warps have 64
    options = {
        "EXACT": x.dtype == torch.float32,
        "num_warps": min(launch.warps, 32 if torch.version.hip is None else 16),
    }
    if launch.programs and _capability(x):
        options["maxnreg"] = _registers(launch.warps * launch.programs)
    return options


def _short(kind: str, x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and compile-time arguments where a program holds whole rows of ``(rows, n)``."""
    rows, n = x.shape
    block = _power_of_2(n)
    launch = tuning.rows(kind, block, x.element_size())
    together = max(1, launch.elements // block)
    return (_cdiv(rows, together),), {"ROWS": together, "N": block, **_row_options(x, launch)}


_LONG = {"N": 4096, "num_warps": 16}


def _in_16_bytes(x: Tensor) -> bool:
    """Whether rows begin and end at multiples of 16 bytes."""
    entries = 16 // x.element_size()
    return x.shape[1] % entries == 0 and x.stride(0) % entries == 0 and x.data_ptr() % 16 == 0


def _ring(kind: str, x: Tensor, *more: Tensor) -> tuple[int, int, Tensor, dict[str, Any]] | None:
    """(programs in all, programs a row, zeros for their words, compile-time arguments) of ``hopper/rows.py`` for ``(rows, n)``;
    None where rows are read twice instead: on other GPUs, where rows do not begin at multiples of 16 bytes, and where they are
    too long for all programs of one to run at the same time.

    They wait for each other: the registers of one are limited to its share, and the launch is cooperative, which fails if they
    do not fit.
    """
    launch = HOPPER_ROWS.get((kind, x.element_size()))
    if launch is None or not _on_hopper(x) or not all(map(_in_16_bytes, (x, *more))):
        return None
    rows, n = x.shape
    parts = _cdiv(n, launch.entries)
    together = min(rows, launch.programs * multiprocessors(x.device.index or 0) // parts)
    if together == 0:
        return None
    words = launch.warps if parts * launch.warps <= MOST_WORDS else 1
    shape = {
        "WIDTH": launch.chunk // launch.warps,
        "CHUNKS": launch.entries // launch.chunk,
        "STAGES": launch.stages,
        "WORDS": words,
        "COUNT": _power_of_2(parts * words),
        "num_warps": launch.warps,
        "maxnreg": _registers(launch.warps * launch.programs),
        "launch_cooperative_grid": True,
    }
    sums = 2 if kind == "forward" and x.element_size() == 2 else 1  # quick ones, and others where those are not sound
    zeros = torch.zeros(sums, rows, parts * words, dtype=torch.int64, device=x.device)
    return together * parts, parts, zeros, shape


def _forward_ring(x: Tensor, eps: float, y: Tensor, lse: Tensor) -> bool:
    """:func:`softpick_forward` by ``hopper/rows.py``, if that can."""
    ring = _ring("forward", x)
    if ring is None:
        return False
    programs, parts, words, shape = ring
    (rows, n), entries = x.shape, 16 // x.element_size()
    run(
        hopper.rows_forward_ring, (programs,),
        x, y, lse, words, rows, n // entries, x.stride(0) // entries, eps, parts, **shape
    )  # fmt: skip
    return True


def _backward_ring(x: Tensor, lse: Tensor, grad: Tensor, dx: Tensor) -> bool:
    """:func:`softpick_backward` by ``hopper/rows.py``, if that can."""
    ring = _ring("backward", x, grad)
    if ring is None:
        return False
    programs, parts, words, shape = ring
    (rows, n), entries = x.shape, 16 // x.element_size()
    run(
        hopper.rows_backward_ring, (programs,),
        x, lse, grad, dx, words, rows, n // entries, x.stride(0) // entries, grad.stride(0) // entries, parts, **shape
    )  # fmt: skip
    return True


def softpick_forward(x: Tensor, eps: float, y: Tensor, lse: Tensor) -> None:
    """Softpick over the rows of a matrix ``(rows, n)`` with unit stride in a row, into contiguous ``y`` and ``lse``."""
    rows, n = x.shape
    if rows == 0 or n == 0:
        return
    if n <= _LONGEST_ROW:
        grid, shape = _short("forward", x)
        run(rows_forward, grid, x, y, lse, rows, n, x.stride(0), eps, **shape)
        return
    if _tried(_forward_ring, x, eps, y, lse):
        return
    run(rows_forward_long, (rows,), x, y, lse, n, x.stride(0), eps, EXACT=x.dtype == torch.float32, **_LONG)


def softpick_backward(x: Tensor, lse: Tensor, grad: Tensor, dx: Tensor) -> None:
    """Gradient of :func:`softpick_forward` into contiguous ``dx``; ``grad`` with unit stride in a row."""
    rows, n = x.shape
    if rows == 0 or n == 0:
        return
    if n <= _LONGEST_ROW:
        grid, shape = _short("backward", x)
        run(rows_backward, grid, x, lse, grad, dx, rows, n, x.stride(0), grad.stride(0), **shape)
        return
    if _tried(_backward_ring, x, lse, grad, dx):
        return
    run(
        rows_backward_long, (rows,),
        x, lse, grad, dx, n, x.stride(0), grad.stride(0), EXACT=x.dtype == torch.float32, **_LONG
    )  # fmt: skip
