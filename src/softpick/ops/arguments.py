"""Checks of the arguments of attention calls, and the canonical shapes that the backends take."""

from __future__ import annotations

import itertools
import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from softpick.normalizers import Normalizer, visible
from softpick.ops import numbers

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_alignment(causal_alignment: str) -> None:
    """Raise for an unknown ``causal_alignment``."""
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment: expected 'top_left' or 'bottom_right', got {causal_alignment!r}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor, packed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Raise unless the three are floating-point tensors of one device and dtype whose shapes fit together."""
    shape = "(total, H, D)" if packed else "(..., H, T, D)"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected a floating-point tensor (fp64, fp32, bf16, fp16), got {x.dtype}")
        if (x.dim() != 3) if packed else (x.dim() < 2):
            raise ValueError(f"{name}: expected {shape}, got {x.dim()} dimensions {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {x.device}")
        if x.dtype != query.dtype and not autocasts(query):
            raise TypeError(f"{name}: expected the query's dtype {query.dtype}, got {x.dtype}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"key: expected the query's head dimension {query.shape[-1]} (last), got {key.shape[-1]}: "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}"
        )
    time = -3 if packed else -2
    if key.shape[time] != value.shape[time]:
        raise ValueError(
            f"value: expected as many positions as the key ({key.shape[time]}, dimension {time}), got {value.shape[time]}: "
            f"key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    return query, key, value


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; the meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of ``x``."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def to_autocast_dtype(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, what torch's function does: fp32 inputs go to the autocast dtype."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return q, k, v


def canonical_shapes(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """``(B, H, T, D)`` views of the three, and the leading dimensions that B stands for."""
    if query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query, key, value, query.shape[:1]  # the usual case: views of views would only take time
    q, k, v = ((x[None] if x.dim() == 2 else x) for x in (query, key, value))
    h, hk, hv = q.shape[-3], k.shape[-3], v.shape[-3]
    try:
        lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"query, key, value: expected leading dimensions that broadcast, got {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(value.shape)}"
        ) from None
    heads = max(h, hk, hv)
    for name, x in (("query", q), ("key", k), ("value", v)):
        n = x.shape[-3]
        divides = enable_gqa and name != "query" and n > 0 and h % n == 0
        fits = n == heads or divides or (n == 1 and not enable_gqa)
        if not fits:
            raise ValueError(_heads_message(name, n, h, enable_gqa, query, key))
    if h != heads:
        q = q.expand(*q.shape[:-3], heads, *q.shape[-2:])
    if hk != hv:  # give both the larger number of heads, which both divide
        both = math.lcm(hk, hv) if hk and hv else 0
        k, v = (x if x.shape[-3] == both else x.repeat_interleave(both // x.shape[-3], dim=-3) for x in (k, v))
    q, k, v = (x.expand(*lead, *x.shape[-3:]).reshape(math.prod(lead), *x.shape[-3:]) for x in (q, k, v))
    return q, k, v, tuple(lead)


def check_heads(query: Tensor, got: int, enable_gqa: bool) -> None:
    """Raise where a cache has fewer heads than the query and ``enable_gqa`` is false."""
    if not enable_gqa and got != query.shape[1]:
        raise ValueError(
            f"key_cache: expected the query's {query.shape[1]} heads, got {got}. For grouped-query attention pass "
            "enable_gqa=True."
        )


def _heads_message(name: str, got: int, heads: int, enable_gqa: bool, query: Tensor, key: Tensor) -> str:
    expected = f"a divisor of the query's {heads} heads" if enable_gqa else f"the query's {heads} heads (dimension -3)"
    message = f"{name}: expected {expected}, got {got}: query {tuple(query.shape)}, key {tuple(key.shape)}."
    if query.dim() >= 4 and query.shape[-2] % max(1, key.shape[-2]) == 0 and query.shape[-3] >= query.shape[-2]:
        return message + " Are heads and positions swapped? The layout is (batch, heads, positions, head dim)."
    if not enable_gqa and got and heads % got == 0:
        return message + " For grouped-query attention pass enable_gqa=True."
    return message


def canonical_mask(mask: Tensor | None, lead: tuple[int, ...], q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as ``(B or 1, H or 1, Tq or 1, Tk or 1)``, with every exclusion of an additive one as minus infinity."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and mask.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"attn_mask: expected bool, float32 or the query's dtype {q.dtype}, got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"attn_mask: expected the query's device {q.device}, got {mask.device}")
    full = (*lead, q.shape[1], q.shape[2], k.shape[2])
    fits = 2 <= mask.dim() <= len(full) or (mask.dim() == 3 and len(full) == 3)
    # one by one: `in` does not compare what stands for a size while a graph with any sizes is traced
    if not fits or any(m != 1 and m != n for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
        hint = ""
        if mask.dim() == 3 and mask.shape[0] not in (1, q.shape[1]):
            hint = " A mask (batch, Tq, Tk) needs a head dimension: mask[:, None]."
        elif mask.dim() == 2 and tuple(mask.shape) == (q.shape[0], k.shape[2]):
            hint = " A padding mask (batch, Tk) needs head and query dimensions: mask[:, None, None]."
        elif mask.shape[-2:] == (k.shape[1], q.shape[1]) or mask.shape[-1] == q.shape[1]:
            hint = " Are heads and positions swapped? The layout is (batch, heads, positions, head dim)."
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}.{hint}")
    mask = mask.reshape((1,) * (len(full) - mask.dim()) + tuple(mask.shape))
    if len(lead) != 1:
        if any(n != 1 for n in mask.shape[: len(lead)]):
            mask = mask.expand(*lead, *mask.shape[len(lead) :])
        mask = mask.reshape(math.prod(mask.shape[: len(lead)]), *mask.shape[len(lead) :])
    return mask if mask.dtype == torch.bool else mask.masked_fill(~visible(mask), -math.inf)


def keep_and_bias(
    mask: Tensor | None, q: Tensor, k: Tensor, left: int, right: int, bottom_right: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The mask and the window for the reference: what is kept, and what is added (finite where kept)."""
    tq, tk = q.shape[2], k.shape[2]
    keep = bias = None
    if mask is not None:
        if mask.dtype == torch.bool:
            keep = mask
        else:
            keep = mask != -math.inf
            bias = torch.where(keep, mask, 0.0)
    if left >= 0 or right >= 0:
        offset = tk - tq if bottom_right else 0
        delta = torch.arange(tq, device=q.device)[:, None] + offset - torch.arange(tk, device=q.device)
        inside = torch.ones_like(delta, dtype=torch.bool)
        if right >= 0:
            inside = inside & (delta >= -right)
        if left >= 0:
            inside = inside & (delta <= left)
        keep = inside if keep is None else keep & inside
    if keep is not None:
        keep = keep.expand(q.shape[0], q.shape[1], tq, tk)
    return keep, bias


def spans(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[int, int, int, int]]:
    """First and last query and key of each packed sequence."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return list(zip(q, q[1:], k, k[1:], strict=False))


def packed_keep(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor, k: Tensor, left: int, right: int, bottom_right: bool
) -> Tensor:
    """Which key each query of packed sequences sees, ``(1, H, Tq, Tk)``, without reading where the sequences end."""
    starts = [cu.long() for cu in (cu_seqlens_q, cu_seqlens_k)]
    positions = [torch.arange(x.shape[2], device=q.device) for x in (q, k)]
    # the sequence of a position: how many end at or before it
    sequences = [(cu[1:, None] <= at).sum(0) for cu, at in zip(starts, positions, strict=True)]
    last = cu_seqlens_q.shape[0] - 2
    at = [p - cu[n.clamp(max=last)] for cu, p, n in zip(starts, positions, sequences, strict=True)]
    lengths = [cu.diff()[sequences[0].clamp(max=last)] for cu in starts]
    offset = lengths[1] - lengths[0] if bottom_right else torch.zeros_like(lengths[0])
    delta = (at[0] + offset)[:, None] - at[1]
    keep = (sequences[0][:, None] == sequences[1]) & (sequences[0] <= last)[:, None]
    if right >= 0:
        keep = keep & (delta >= -right)
    if left >= 0:
        keep = keep & (delta <= left)
    return keep.expand(1, q.shape[1], *keep.shape)


def window_bounds(window: int | tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    """``(left, right)`` bounds with causality folded in; -1 is unbounded."""
    if window is None:
        left, right = -1, -1
    elif isinstance(window, tuple | list):
        if len(window) != 2:
            raise ValueError(f"window: expected an integer or (left, right) with -1 for unbounded, got {window!r}")
        left, right = (numbers.integer("window", w, -1) for w in window)
    elif numbers.integer("window", window) < 1:
        raise ValueError(f"window: expected at least 1 key, got {window}")
    else:
        left = right = window - 1
    return left, (0 if is_causal else right)


def check_sink(sink: Tensor | None, norm: Normalizer, heads: int, query: Tensor) -> None:
    """Raise unless ``sink`` is given where the normalizer needs it, one logit a query head."""
    if not norm.needs_sink:
        if sink is not None:
            raise ValueError(f"sink: the normalizer {norm.name!r} has none; 'learned_sink' takes it")
        return
    if sink is None:
        raise ValueError(f"sink: the normalizer {norm.name!r} needs one logit a head, shape ({heads},)")
    if not isinstance(sink, Tensor) or sink.dtype not in FLOATS:
        raise TypeError(f"sink: expected a floating-point tensor, got {getattr(sink, 'dtype', type(sink).__name__)}")
    if tuple(sink.shape) != (heads,):
        raise ValueError(f"sink: expected shape ({heads},), one logit a query head; got {tuple(sink.shape)}")
    if sink.device != query.device:
        raise ValueError(f"sink: expected the query's device {query.device}, got {sink.device}")


_DTYPES_OF_CACHES = (
    "a floating-point tensor (fp64, fp32, bf16, fp16, or in fp8 torch.float8_e4m3fn with a scale)",
    "a floating-point tensor (fp64, fp32, bf16, fp16; queries are read once, so fp8 would save nothing: multiply them with "
    "their scale)",
)


def check_cache(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None) -> int:
    """Check the cache's shapes; returns how many positions of a sequence it has room for."""
    layout = "(B, Hkv, S, D)" if table is None else "pages (num_blocks, page_size, Hkv, D)"
    for name, x in (("query", query), ("key_cache", key), ("value_cache", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS and (name == "query" or x.dtype != torch.float8_e4m3fn):
            raise TypeError(f"{name}: expected {_DTYPES_OF_CACHES[name == 'query']}, got {x.dtype}")
        if x.dim() != 4:
            expected = "(B, H, Tq, D)" if name == "query" else layout
            raise ValueError(f"{name}: expected {expected}, got {x.dim()} dimensions {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {x.device}")
        if x.dtype not in (query.dtype, torch.float8_e4m3fn) and not autocasts(query):
            raise TypeError(f"{name}: expected the query's dtype {query.dtype} or torch.float8_e4m3fn, got {x.dtype}")
    if (key.dtype == torch.float8_e4m3fn) != (value.dtype == torch.float8_e4m3fn):
        raise TypeError(
            f"value_cache: expected key and value cache both in fp8 or neither, got {key.dtype}, {value.dtype}"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key_cache: expected the query's head dimension {query.shape[-1]} (last), got {key.shape[-1]}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value_cache: expected the shape of key_cache {tuple(key.shape)} up to the last dimension, got "
            f"{tuple(value.shape)}"
        )
    batch, heads = query.shape[:2]
    kv_heads = key.shape[1 if table is None else 2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"key_cache: expected a divisor of the query's {heads} heads in {layout}, got {kv_heads} of {tuple(key.shape)}"
        )
    if table is None:
        if key.shape[0] != batch:
            raise ValueError(f"key_cache: expected the query's batch {batch} in {layout}, got {key.shape[0]}")
        return key.shape[2]
    if not isinstance(table, Tensor) or table.dtype != torch.int32:
        raise TypeError(f"block_table: expected an int32 tensor, got {getattr(table, 'dtype', type(table).__name__)}")
    if table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(f"block_table: expected shape ({batch}, max_blocks), got {tuple(table.shape)}")
    if table.device != query.device:
        raise ValueError(f"block_table: expected the query's device {query.device}, got {table.device}")
    if key.shape[0] == 0 or key.shape[1] == 0:
        raise ValueError(f"key_cache: expected at least one page of at least one position, got {tuple(key.shape)}")
    return table.shape[1] * key.shape[1]


def check_lengths(lengths: Tensor, query: Tensor, room: int) -> None:
    """Raise unless ``cache_seqlens`` are integers ``(B,)``, within the room of the cache where they can be read."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cache_seqlens: expected an int32 or int64 tensor, got {getattr(lengths, 'dtype', type(lengths).__name__)}"
        )
    if tuple(lengths.shape) != (query.shape[0],):
        raise ValueError(f"cache_seqlens: expected shape ({query.shape[0]},), got {tuple(lengths.shape)}")
    if lengths.device != query.device:
        raise ValueError(f"cache_seqlens: expected the query's device {query.device}, got {lengths.device}")
    if checkable(lengths) and not all(0 <= n <= room for n in lengths.tolist()):
        raise ValueError(f"cache_seqlens: expected lengths from 0 to the cache's {room}, got {lengths.tolist()}")


def used_blocks(lengths: Tensor | None, table: Tensor, page: int, tq: int, left: int) -> Tensor:
    """``(B or 1, max_blocks)``: the entries of a block table that have a filled position within reach of a query."""
    starts = torch.arange(table.shape[1], device=table.device) * page
    filled = starts.new_full((1, 1), table.shape[1] * page) if lengths is None else lengths[:, None]
    used = starts < filled
    if left >= 0:
        used = used & (starts + page > filled - tq - left)
    return used.expand(table.shape)


def check_pages(table: Tensor, used: Tensor, pages: int) -> None:
    """Raise for a page that does not exist; ``used``: which entries are those of positions that a query may see."""
    if not checkable(table):
        return
    wrong = used & ((table < 0) | (table >= pages))
    if wrong.any():
        sequence, block = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"block_table: expected pages from 0 to {pages - 1} for all filled positions, got "
            f"{int(table[sequence, block])} for block {block} of sequence {sequence}"
        )


def checkable(x: Tensor) -> bool:
    """Whether to check lengths and pages: reading them from a GPU would wait for the GPU in every step of a generation."""
    return (not x.is_cuda or os.environ.get("SOFTPICK_DEBUG", "0") not in ("", "0")) and readable(x)


def readable(x: Tensor) -> bool:
    """Whether values can be looked at: there are any, they are not traced, vmapped, nor part of a CUDA graph's capture."""
    if torch.compiler.is_compiling() or x.is_meta or is_fake(x):
        return False
    if torch._C._are_functorch_transforms_active() and batched_by_transform(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def batched_by_transform(x: Tensor) -> bool:
    """Whether ``torch.vmap`` stands samples of a dimension in for the tensor's values."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def check_offsets(name: str, offsets: Tensor, packed: Tensor, longest: int | None, longest_name: str) -> int:
    """Check the offsets of packed sequences; returns the longest length: as given, else read from them, else the total.

    On a GPU, where reading offsets would wait for it, they are not looked at if the longest sequence is given.
    """
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name}: expected an int32 or int64 tensor, got {getattr(offsets, 'dtype', type(offsets).__name__)}"
        )
    if offsets.dim() != 1 or offsets.numel() < 2:
        raise ValueError(f"{name}: expected shape (sequences + 1,), got {tuple(offsets.shape)}")
    if offsets.device != packed.device:
        raise ValueError(f"{name}: expected the query's device {packed.device}, got {offsets.device}")
    if longest is not None:
        longest = numbers.integer(longest_name, longest, 0)
    if not (readable(offsets) if longest is None else checkable(offsets)):
        return packed.shape[0] if longest is None else longest
    starts = offsets.tolist()  # one wait for the device
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != packed.shape[0] or min(lengths) < 0:
        raise ValueError(
            f"{name}: expected offsets that rise from 0 to the total of {packed.shape[0]} positions, got {starts}"
        )
    if longest is not None and longest < max(lengths):
        raise ValueError(f"{longest_name}: expected at least the longest sequence {max(lengths)}, got {longest}")
    return max(lengths) if longest is None else longest


def default_scale(scale: float | None, head_dim: int) -> float:
    """The scale as a number: ``1 / sqrt(head_dim)`` if None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    return float(numbers.number("scale", scale))


def check_softcap(softcap: float | None) -> float | None:
    """The softcap as a number above 0, or None."""
    return None if softcap is None else float(numbers.number("softcap", softcap, "a number > 0", 0.0, exclusive=True))


def default_eps(eps: float | None, norm: Normalizer) -> float:
    """The eps as a number: the normalizer's if None."""
    return norm.eps if eps is None else float(numbers.number("eps", eps, "a number >= 0", 0.0))


def restore_shape(x: Tensor, lead: tuple[int, ...], dims: int) -> Tensor:
    """``(B, H, ...)`` back to the caller's leading dimensions."""
    if dims == 2:
        return x[0, 0]
    return x if len(lead) == 1 else x.reshape(*lead, *x.shape[1:])
