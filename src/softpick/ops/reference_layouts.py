"""The reference for packed sequences and for caches: both are brought into the layout of :mod:`softpick.ops.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softpick.normalizers import Normalizer
from softpick.ops.arguments import keep_and_bias, no_autocast, packed_keep, readable, spans, used_blocks
from softpick.ops.fp8 import Scales
from softpick.ops.reference import attention_reference, normalize
from softpick.ops.skipping import Plan

__all__ = ["cache_reference", "packed_reference", "skipping_reference"]


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
    room: int,
    left: int,
    right: int,
    scales: Scales | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of the last queries of partly filled sequences, over a copy of the cache.

    Args:
        query: ``(B, H, Tq, D)``.
        key: ``(B, Hkv, S, D)``, or pages ``(num_blocks, Hkv, page_size, D)``.
        value: as ``key``.
        lengths: ``(B,)``: how many positions are filled; None for all.
        block_table: ``(B, max_blocks)``: the pages of each sequence; None for a cache that is no pages.
        room: positions of a sequence.
        left: keys before a query's own position, -1 for all.
        right: keys after it, -1 for all.
        scales: of a cache in fp8, of which no more than the copy is ever in another dtype.
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
    pages = None
    if block_table is not None:
        used = used_blocks(lengths, block_table, key.shape[2], query.shape[2], left)
        valid = used & (block_table >= 0) & (block_table < key.shape[0])
        pages = block_table.masked_fill(~valid, 0).long()
        there = there & valid.repeat_interleave(key.shape[2], 1)[:, None, None]
        key, value = (x[pages].transpose(1, 2).flatten(2, 3) for x in (key, value))
    if scales is not None:
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        key, value = (scales.widened(x, s, work, pages) for x, s in ((key, scales.key), (value, scales.value)))
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


def skipping_reference(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
    room: int,
    left: int,
    right: int,
    *,
    normalizer: Normalizer,
    scale: float,
    eps: float,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`cache_reference`, over a copy of the blocks alone that the plan reads.

    Returns:
        Output ``(B, H, Tq, Dv)``, and lse and row mass ``(B, H, Tq)``.
    """
    (b, heads, tq, width), (kv_heads, device) = query.shape, (key.shape[1], query.device)
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups, block_size = heads // max(1, kv_heads), plan.block_size
    # blocks with values come first, then those of which the keys alone are read; the others are cut off
    kinds = plan.keys.int() + plan.values.int()
    order = kinds.argsort(dim=-1, descending=True, stable=True)
    most, most_values = (
        int(x.sum(-1).max()) if x.numel() and readable(x) else x.shape[-1] for x in (plan.keys, plan.values)
    )
    order = order[..., :most]
    read = plan.keys.gather(-1, order).repeat_interleave(block_size, -1)  # (B, Hkv, positions)
    at = (order[..., None] * block_size + torch.arange(block_size, device=device)).flatten(2)
    filled = torch.full((1,), room, device=device) if lengths is None else lengths.clamp(max=room)
    read = read & (at < filled[:, None, None])
    at = torch.where(read, at, 0)
    behind = torch.arange(tq, device=device)[:, None] + (filled[:, None, None, None] - tq) - at[:, :, None]
    keep = read[:, :, None].expand(-1, -1, tq, -1)
    keep = keep & (behind >= -right) if right >= 0 else keep
    keep = keep & (behind <= left) if left >= 0 else keep  # (B, Hkv, Tq, positions)

    def copied(x: Tensor, positions: int) -> Tensor:
        there, where = read[..., :positions], at[..., :positions]
        first = torch.arange(b, device=device)[:, None, None]
        if block_table is not None:
            pages = block_table[first, where // x.shape[2]].long()
            there = there & (pages >= 0) & (pages < x.shape[0])
            first, where = torch.where(there, pages, 0), where % x.shape[2]
        found = x[first, torch.arange(kv_heads, device=device)[:, None], where]
        return found.masked_fill(~there[..., None], 0.0).to(work)

    if not most:
        read, at, keep = (x[..., :0] for x in (read, at, keep))
    with no_autocast(query):
        rows = query.to(work).reshape(b, kv_heads, groups * tq, width)
        scores = (rows * scale) @ copied(key, most * block_size).transpose(-2, -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        logits = None if sink is None else sink.to(work).repeat_interleave(tq).view(1, kv_heads, groups * tq, 1)
        weights, lse, mass, _ = normalize(scores, normalizer, keep=keep.repeat(1, 1, groups, 1), sink=logits, eps=eps)
        out = weights[..., : most_values * block_size] @ copied(value, most_values * block_size)
        lse, mass = lse.view(b, heads, tq), mass.view(b, heads, tq)
        # what is not read is one more term of the denominator
        total = torch.logaddexp(lse, plan.rest.log())
        share = torch.where(total == -torch.inf, 1.0, torch.exp(lse - total))
        out = out.reshape(b, heads, tq, -1) * share[..., None]
    return out.to(query.dtype), total, mass * share
