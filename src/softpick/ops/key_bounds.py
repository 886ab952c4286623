"""What is stored about the keys of a cache, a few numbers a block: enough to bound the scores of keys that are not read.

``decode_attention`` leaves blocks of keys unread by these bounds (``skipping.py``); the proof is in docs/mathematics.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softpick.ops import numbers
from softpick.ops.arguments import FLOATS, check_pages, checkable, used_blocks

__all__ = ["BLOCK_SIZES", "KeyBounds", "key_bounds", "rounding", "update_key_bounds"]

BLOCK_SIZES = (16, 32, 64, 128)
"""Keys of a block: tiles that the kernels have."""


class KeyBounds(NamedTuple):
    """Bounds of the keys of a cache, by block. :func:`key_bounds` makes them, :func:`update_key_bounds` follows the cache.

    Of a block of 64 keys with a head dimension of 128 in bf16 they are 1.7 % of the keys' bytes.
    """

    mean: Tensor
    """``(B, Hkv, blocks, D)``, or ``(num_blocks, Hkv, blocks of a page, D)``: mean of the block's keys, in their dtype."""
    radius: Tensor
    """As ``mean`` without ``D``, in fp32 (fp64 for fp64 keys): no key of the block is farther from ``mean``."""
    offset: Tensor
    """As ``radius``: ``mean``, which is rounded, is no farther from the mean of the keys."""
    spread: Tensor
    """As ``radius``: in no direction is the root mean square of the keys' distances from ``mean`` larger."""
    norm: Tensor
    """As ``radius``: no key of the block is longer."""
    filled: Tensor
    """``(B, blocks)``, or ``(num_blocks, blocks of a page)``, int32: how many keys of the block these are bounds of."""
    block_size: int
    """Keys of a block."""


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Of a dtype that bounds are computed in: twice its unit roundoff, and the root of what a square may lose by underflow."""
    return (2.0**-52, 2.0**-511) if dtype == torch.float64 else (2.0**-23, 2.0**-63)


def key_bounds(
    key_cache: Tensor,
    *,
    block_size: int = 64,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
) -> KeyBounds:
    """Bounds of the keys of a cache, for ``decode_attention(..., key_bounds=...)``.

    Args:
        key_cache: as in :func:`softpick.decode_attention`: ``(B, Hkv, S, D)``, or with ``block_table`` pages
            ``(num_blocks, page_size, Hkv, D)``.
        block_size: keys of a block: 16, 32, 64 or 128; with pages a divisor of the page size. Smaller blocks have tighter
            bounds, and more of them.
        cache_seqlens: ``(B,)`` int32 or int64: how many positions are filled; all if None.
        block_table: ``(B, max_blocks)`` int32: the pages of each sequence in order. Pages that no sequence has get no bounds,
            and are read.

    Returns:
        The bounds. They have the layout of the cache: with pages they belong to the page, whoever has it.

    Raises:
        TypeError: for wrong types and dtypes.
        ValueError: for wrong shapes, block sizes, lengths or pages.
    """
    room = _check(key_cache, block_table, cache_seqlens)
    _check_block_size(block_size, key_cache, block_table)
    key = key_cache if block_table is None else key_cache.transpose(1, 2)
    if block_table is None:
        filled = torch.full((key.shape[0],), room, device=key.device)
        filled = filled if cache_seqlens is None else cache_seqlens.clamp(max=room)
    else:
        filled = _filled_pages(key, block_table, cache_seqlens, room)
    blocks = -(-key.shape[2] // block_size)
    count = (filled[:, None] - torch.arange(blocks, device=key.device) * block_size).clamp(0, block_size)
    tail = blocks * block_size - key.shape[2]
    padded = torch.nn.functional.pad(key, (0, 0, 0, tail)) if tail else key
    return KeyBounds(*_summary(padded.unflatten(2, (blocks, block_size)), count[:, None]), count.int(), block_size)


def update_key_bounds(
    bounds: KeyBounds,
    key_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    new: int = 1,
) -> None:
    """Follow a cache to which the last ``new`` positions of each sequence were written: computes their blocks anew, in place.

    Reads the keys of those blocks only, and never waits for a GPU. The result is that of :func:`key_bounds`: to the bit on the
    CPU, on a GPU up to the order of sums.

    Args:
        bounds: of :func:`key_bounds`; changed.
        key_cache: as in :func:`key_bounds`, with the new keys written.
        cache_seqlens: ``(B,)`` int32 or int64: how many positions are filled, the new ones included. Of a sequence of length 0
            nothing is changed.
        block_table: as in :func:`key_bounds`.
        new: how many positions were written, at most, of any sequence.

    Raises:
        TypeError: for wrong types and dtypes.
        ValueError: for wrong shapes, lengths or pages.
    """
    room = _check(key_cache, block_table, cache_seqlens)
    check_bounds(bounds, key_cache if block_table is None else key_cache.transpose(1, 2), block_table)
    numbers.integer("new", new, 1)
    key = key_cache if block_table is None else key_cache.transpose(1, 2)
    size, device = bounds.block_size, key.device
    lengths = cache_seqlens.clamp(0, room).long()
    # blocks of the new positions; where a sequence has fewer, its last one several times
    first, last = (lengths - new).clamp(min=0) // size, (lengths - 1).clamp(min=0) // size
    block = torch.minimum(first[:, None] + torch.arange((new + size - 2) // size + 1, device=device), last[:, None])
    at = torch.arange(len(lengths), device=device)[:, None].expand(block.shape)
    there = (lengths > 0)[:, None].expand(block.shape)
    count = (lengths[:, None] - block * size).clamp(0, size)
    if block_table is not None:
        blocks = bounds.filled.shape[1]
        at = block_table.long().gather(1, block // blocks)
        there = there & (at >= 0) & (at < key.shape[0])
        block = block % blocks
        at = at.clamp(0, max(0, key.shape[0] - 1))
    at, block, count, there = (x.flatten() for x in (at, block, count, there))
    if not at.numel():
        return
    # an entry that is not there writes what the first one that is there writes; if there is none, what was there
    which = torch.where(there, torch.arange(len(at), device=device), there.int().argmax())
    at, block, count = at[which], block[which], count[which]
    if block_table is not None:  # sequences that share a page write the same: of the longest
        same = (at[:, None] == at) & (block[:, None] == block)
        count = torch.where(same, count, 0).amax(1)
    positions = (block[:, None] * size + torch.arange(size, device=device)).clamp(max=key.shape[2] - 1)
    found = (*_summary(key[at[:, None], :, positions].transpose(1, 2), count[:, None]), count.int())
    for tensor, fresh in zip(bounds[:-1], found, strict=True):
        assert isinstance(tensor, Tensor)
        place: tuple[Tensor | slice, ...] = (at, block) if tensor is bounds.filled else (at, slice(None), block)
        tensor[place] = torch.where(there.any(), fresh, tensor[place])


def check_bounds(bounds: KeyBounds, key: Tensor, table: Tensor | None) -> None:
    """Raise unless these are bounds of such a cache: ``(B, Hkv, S, D)``, or pages ``(num_blocks, Hkv, page, D)``."""
    if not isinstance(bounds, KeyBounds):
        raise TypeError(f"key_bounds: expected what softpick.key_bounds returns, got {type(bounds).__name__}")
    _check_block_size(bounds.block_size, key if table is None else key.transpose(1, 2), table)
    n, heads, positions, width = key.shape
    blocks = -(-positions // bounds.block_size)
    shapes = {"mean": (n, heads, blocks, width), "filled": (n, blocks)}
    for name, x in zip(bounds._fields[:-1], bounds[:-1], strict=True):
        assert isinstance(x, Tensor)
        expected = shapes.get(name, (n, heads, blocks))
        if tuple(x.shape) != expected:
            raise ValueError(
                f"key_bounds: expected the bounds of this cache, {name} of shape {expected}, got {tuple(x.shape)}"
            )
        if x.device != key.device:
            raise ValueError(f"key_bounds: expected the cache's device {key.device}, got {name} on {x.device}")
    if bounds.mean.dtype != key.dtype:
        raise TypeError(
            f"key_bounds: expected bounds of keys in {key.dtype}, got bounds of keys in {bounds.mean.dtype}"
        )


def _check(key: Tensor, table: Tensor | None, lengths: Tensor | None) -> int:
    """Check a cache of keys; returns how many positions of a sequence it has room for."""
    layout = "(B, Hkv, S, D)" if table is None else "pages (num_blocks, page_size, Hkv, D)"
    if not isinstance(key, Tensor):
        raise TypeError(f"key_cache: expected a tensor, got {type(key).__name__}")
    if key.dtype not in FLOATS:
        raise TypeError(f"key_cache: expected a floating-point tensor (fp64, fp32, bf16, fp16), got {key.dtype}")
    if key.dim() != 4:
        raise ValueError(f"key_cache: expected {layout}, got {key.dim()} dimensions {tuple(key.shape)}")
    batch, room = key.shape[0], key.shape[2]
    if table is not None:
        if not isinstance(table, Tensor) or table.dtype != torch.int32:
            raise TypeError(
                f"block_table: expected an int32 tensor, got {getattr(table, 'dtype', type(table).__name__)}"
            )
        if table.dim() != 2:
            raise ValueError(f"block_table: expected shape (B, max_blocks), got {tuple(table.shape)}")
        if table.device != key.device:
            raise ValueError(f"block_table: expected the cache's device {key.device}, got {table.device}")
        batch, room = table.shape[0], table.shape[1] * key.shape[1]
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            came = getattr(lengths, "dtype", type(lengths).__name__)
            raise TypeError(f"cache_seqlens: expected an int32 or int64 tensor, got {came}")
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"cache_seqlens: expected shape ({batch},), got {tuple(lengths.shape)}")
        if lengths.device != key.device:
            raise ValueError(f"cache_seqlens: expected the cache's device {key.device}, got {lengths.device}")
        if checkable(lengths) and not all(0 <= n <= room for n in lengths.tolist()):
            raise ValueError(f"cache_seqlens: expected lengths from 0 to the cache's {room}, got {lengths.tolist()}")
    if table is not None:
        check_pages(table, used_blocks(lengths, table, key.shape[1], 1, -1), key.shape[0])
    return room


def _check_block_size(size: int, key_cache: Tensor, table: Tensor | None) -> None:
    numbers.integer("block_size", size)
    if size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {', '.join(map(str, BLOCK_SIZES))}; got {size}")
    if table is not None and key_cache.shape[1] % size:
        raise ValueError(f"block_size: expected a divisor of the page size {key_cache.shape[1]}, got {size}")


def _filled_pages(key: Tensor, table: Tensor, lengths: Tensor | None, room: int) -> Tensor:
    """How many positions of each page are filled, 0 for a page that no sequence has."""
    page = key.shape[2]
    filled = torch.full((table.shape[0],), room, device=key.device) if lengths is None else lengths.clamp(max=room)
    filled = (filled[:, None] - torch.arange(table.shape[1], device=key.device) * page).clamp(0, page)
    there = (table >= 0) & (table < key.shape[0])
    filled, at = torch.where(there, filled, 0).flatten(), torch.where(there, table, 0).flatten().long()
    return torch.zeros(key.shape[0], dtype=filled.dtype, device=key.device).scatter_reduce(0, at, filled, "amax")


def product_error(dtype: torch.dtype) -> float:
    """What ``torch.set_float32_matmul_precision`` lets a product of fp32 vectors lose, relative to their lengths."""
    if dtype == torch.float64:
        return 0.0
    if torch.compiler.is_compiling():  # where it cannot be asked for more
        return 2.0**-7 if torch.backends.cuda.matmul.allow_tf32 else 0.0
    return {"highest": 0.0, "high": 2.0**-9}.get(torch.get_float32_matmul_precision(), 2.0**-7)


def _summary(keys: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean, radius, offset, spread and norm of blocks ``(..., block_size, D)``: of the first ``count`` keys of each."""
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    unit, lost = rounding(dtype)
    size, width = keys.shape[-2:]
    filled = (torch.arange(size, device=keys.device) < count[..., None])[..., None]
    x = torch.where(filled, keys, 0.0).to(dtype).contiguous()  # what was never written may be NaN
    several = count.clamp(min=1)[..., None]
    mean = (x.sum(-2) / several).to(keys.dtype)
    centre = mean.to(dtype)

    def up(norm: Tensor) -> Tensor:
        return norm * (1 + (width + 16) * unit) + width**0.5 * lost

    def longest(rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=-1)
        return norms.amax(-1) if size else norms.sum(-1)

    norm = up(longest(x))
    away = torch.where(filled, x - centre[..., None, :], 0.0)
    radius = up(longest(away))
    offset = up(torch.linalg.vector_norm(away.sum(-2) / several, dim=-1)) + (size + 4) * unit * radius
    # the largest eigenvalue of a matrix of products is at most the root of the length of its square
    products = away @ away.transpose(-2, -1)
    sum_of_squares = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    scaled = products / sum_of_squares.clamp(min=torch.finfo(dtype).tiny)[..., None, None]
    largest = torch.linalg.matrix_norm(scaled @ scaled).sqrt() + (width + size**2 + 16) * unit
    largest = (largest + product_error(dtype) * size) * (1 + 8 * unit)
    spread = (largest * sum_of_squares / several[..., 0]).sqrt() * (1 + 4 * unit) + (size * width) ** 0.5 * lost
    return mean, radius, offset, torch.minimum(spread, radius), norm
