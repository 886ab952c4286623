"""The reference for packed sequences and for caches: both are brought into the layout of :mod:`softpick.ops.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softpick.ops.arguments import keep_and_bias, no_autocast, packed_keep, readable, spans
from softpick.ops.reference import attention_reference

__all__ = ["cache_reference", "packed_reference"]


def packed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    left: int,
    right: int,
    bottom_right: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention within packed sequences, one after the other.

    Args:
        q: ``(1, H, total_q, D)``; ``k`` and ``v`` likewise.
        k: as ``q``.
        v: as ``q``.
        starts_q: ``(N + 1,)`` starts of the sequences and their end.
        starts_k: the same for the keys.
        left: keys before a query's own position, -1 for all.
        right: keys after it, -1 for all.
        bottom_right: the last query of a sequence stands at its last key.
        options: of :func:`softpick.ops.reference.attention_reference`.

    Returns:
        Output ``(1, H, total_q, Dv)``, and lse, row mass and largest score ``(1, H, total_q)``.
    """
    parts = []
    with no_autocast(q):
        if readable(starts_q) and readable(starts_k):
            for q0, q1, k0, k1 in spans(starts_q, starts_k):
                qs, ks, vs = q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1]
                keep, _ = keep_and_bias(None, qs, ks, left, right, bottom_right)
                parts.append(attention_reference(qs, ks, vs, keep=keep, **options))
        else:
            keep = packed_keep(starts_q, starts_k, q, k, left, right, bottom_right)
            parts.append(attention_reference(q, k, v, keep=keep, **options))
    out, lse, mass, largest = (torch.cat([part[i] for part in parts], dim=2) for i in range(4))
    return out, lse, mass, largest


def cache_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
    used: Tensor | None,
    room: int,
    left: int,
    right: int,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of the last queries of partly filled sequences, over a copy of the cache.

    Args:
        query: ``(B, H, Tq, D)``.
        key: ``(B, Hkv, S, D)``, or pages ``(num_blocks, Hkv, page_size, D)``.
        value: as ``key``.
        lengths: ``(B,)``: how many positions are filled; None for all.
        block_table: ``(B, max_blocks)``: the pages of each sequence; None for a cache that is no pages.
        used: ``(B, max_blocks)`` boolean: entries of ``block_table`` with a filled position within reach of a query.
        room: positions of a sequence.
        left: keys before a query's own position, -1 for all.
        right: keys after it, -1 for all.
        options: of :func:`softpick.ops.reference.attention_reference`.

    Returns:
        Output ``(B, H, Tq, Dv)``, and lse, row mass and largest score ``(B, H, Tq)``.
    """
    heads = query.shape[1]
    j = torch.arange(room, device=query.device)
    filled = torch.full((1, 1, 1, 1), room, device=query.device)
    if lengths is not None:
        filled = lengths.clamp(max=room)[:, None, None, None]
    there = j < filled  # (B or 1, 1, 1, room)
    if block_table is not None:
        assert used is not None
        valid = used & (block_table >= 0) & (block_table < key.shape[0])
        pages = block_table.masked_fill(~valid, 0).long()
        there = there & valid.repeat_interleave(key.shape[2], 1)[:, None, None]
        key, value = (x[pages].transpose(1, 2).flatten(2, 3) for x in (key, value))
    if lengths is not None or block_table is not None:
        # what was never written may be NaN, and 0 * NaN is NaN
        key, value = (x.masked_fill(~there.transpose(2, 3), 0.0) for x in (key, value))
    behind = torch.arange(query.shape[2], device=query.device)[:, None] + (filled - query.shape[2]) - j
    keep = there.expand(-1, -1, query.shape[2], -1)
    if right >= 0:
        keep = keep & (behind >= -right)
    if left >= 0:
        keep = keep & (behind <= left)
    keep = keep.expand(query.shape[0], heads, query.shape[2], room)
    with no_autocast(query):
        out, lse, mass, largest, _ = attention_reference(query, key, value, keep=keep, **options)
    return out, lse, mass, largest
