"""Attention over a sequence that is shared among ranks: ring attention for every normalizer.

Each rank holds a shard of the queries, keys and values. Keys and values travel around the ring while the rank computes with
those it holds. A shard of the keys gives a partial result: an output, its lse and its largest score. Partial results are
merged into the numerator and the denominator relative to the largest lse so far. What belongs to the row and not to a key (the
constant of the denominator and eps, which is relative to the row's largest score over all keys) is taken out of each partial
result and added once. The backward pass has the lse over all keys, so that the gradient of each shard needs nothing of the
others; the gradients of keys and values travel with them.

Under a causal mask the sequence is cut into ``2 R`` chunks and rank ``r`` of ``R`` holds the chunks ``r`` and
``2 R - 1 - r`` (:func:`shard_sequence`): then all ranks have equally much to do at every step.

The operators ``softpick::ring_forward`` and ``softpick::ring_backward`` are opaque to ``torch.compile``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from softpick.normalizers import Normalizer, get_normalizer
from softpick.ops import numbers
from softpick.ops.arguments import (
    canonical_shapes,
    check_qkv,
    check_sink,
    check_softcap,
    default_eps,
    default_scale,
    restore_shape,
    to_autocast_dtype,
)
from softpick.ops.backends import check_backend, choose_backend, operator_name
from softpick.ops.blocks import block_backward, block_forward
from softpick.ops.calling import accumulation_dtype
from softpick.ops.transforms import has_tangent

__all__ = ["ring_attention", "sequence_positions", "shard_sequence", "unshard_sequence"]


# ---------------------------------------------------------------------------------------------------------------------
# The sequence and its shards


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group: expected torch.distributed to be initialized (torchrun, torch.distributed.init_process_group)"
        )
    if group is None:
        group = dist.distributed_c10d._get_default_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a process group this rank is in, or None; got {type(group).__name__}")
    return group


def _positions(length: int, rank: int, size: int, device: torch.device | None = None) -> Tensor:
    if numbers.integer("length", length, 0) % (2 * size):
        raise ValueError(f"length: expected a multiple of {2 * size}, twice the number of ranks; got {length}")
    chunk = length // (2 * size)
    offsets = torch.arange(chunk, device=device)
    return torch.cat([rank * chunk + offsets, (2 * size - 1 - rank) * chunk + offsets])


def sequence_positions(
    length: int, *, group: dist.ProcessGroup | None = None, device: torch.device | None = None
) -> Tensor:
    """Which positions of a sequence this rank holds, in the order in which :func:`shard_sequence` puts them.

    Args:
        length: of the whole sequence; a multiple of twice the number of ranks.
        group: the ranks that share the sequence; all if None.
        device: of the result.

    Returns:
        ``(length / ranks,)`` int64, rising. Rotary embeddings and whatever depends on a position must use these.

    Raises:
        ValueError: for a length that cannot be divided.
        TypeError: for a ``group`` that is no process group.
    """
    group = _group(group)
    return _positions(length, dist.get_rank(group), dist.get_world_size(group), device)


def shard_sequence(x: Tensor, dim: int, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Take this rank's shard of a sequence that every rank has whole. Differentiable.

    Args:
        x: any shape and dtype; dimension ``dim`` is the sequence, a multiple of twice the number of ranks long.
        dim: the dimension of the sequence.
        group: the ranks that share the sequence; all if None.

    Returns:
        A copy, as ``x`` with ``1 / ranks`` of the positions.

    Raises:
        ValueError: for a length that cannot be divided.
        TypeError: for a ``group`` that is no process group.
        IndexError: for a ``dim`` out of range.
    """
    numbers.integer("dim", dim)
    return x.index_select(dim, sequence_positions(x.shape[dim], group=group, device=x.device))


def unshard_sequence(x: Tensor, dim: int, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather the whole sequence from the shards of all ranks; undoes :func:`shard_sequence`. Carries no gradient.

    Args:
        x: this rank's shard, of the same shape and dtype on every rank.
        dim: the dimension of the sequence.
        group: the ranks that share the sequence; all if None.

    Returns:
        As ``x`` with the positions of all ranks, on every rank.

    Raises:
        ValueError: for a shard of odd length.
        TypeError: for a ``group`` that is no process group.
        IndexError: for a ``dim`` out of range.
    """
    group = _group(group)
    numbers.integer("dim", dim)
    size = dist.get_world_size(group)
    length = size * x.shape[dim]
    order = torch.cat([_positions(length, rank, size, x.device) for rank in range(size)])
    mine = x.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts, dim).index_select(dim, torch.argsort(order))


# ---------------------------------------------------------------------------------------------------------------------
# The ring


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    normalizer: str | Normalizer = "softpick",
    backend: str = "auto",
    softcap: float | None = None,
    sink: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """:func:`softpick.scaled_dot_product_attention` over a sequence of which each rank of ``group`` holds a shard.

    A collective: every rank of the group calls it, with the same shapes, dtype and options, forward and backward. Memory is
    linear in the length of the shard. Partial results are added up in the same order in every run.

    Args:
        query: ``(..., H, Tq, D)``, this rank's queries; fp64, fp32, bf16 or fp16.
        key: ``(..., Hkv, Tk, D)``, this rank's keys. Leading dimensions broadcast.
        value: ``(..., Hkv, Tk, Dv)``.
        group: the ranks that share the sequence; all if None.
        is_causal: the shards are those of :func:`shard_sequence` (``Tq = Tk``, even), and a query sees keys up to its own
            position in the whole sequence. Without it every query sees every key, and the shards may be of any length.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        enable_gqa: allow fewer key than query heads; nothing is repeated in memory or sent twice.
        normalizer: a name of ``softpick.NORMALIZERS``, or a :class:`softpick.Normalizer`.
        backend: ``"tiled"`` (any device), ``"triton"`` (CUDA tensors in fp32, bf16 or fp16), or ``"auto"``: Triton on a GPU
            (``"tiled"``, with a warning, for calls that Triton cannot take), ``"tiled"`` on the CPU.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sink: ``(H,)`` logits, the same on every rank; required by ``learned_sink`` and by no other. Its gradient is that of
            this rank's queries: sum it over the group, as FSDP and DDP do with every parameter.
        eps: as in :func:`softpick.scaled_dot_product_attention`, with ``m`` of all keys; the table's value if None.

    Returns:
        ``(..., H, Tq, Dv)`` in the query's dtype: the outputs of this rank's queries.

    Raises:
        TypeError: for wrong types and dtypes.
        ValueError: for wrong shapes, devices, unknown names, an odd or unequal length under ``is_causal``, a backend that
            has no partial results to merge, or without torch.distributed.
    """
    group = _group(group)
    norm = get_normalizer(normalizer)
    check_backend(backend)
    if backend not in ("auto", "tiled", "triton"):
        raise ValueError(f"backend: expected 'auto', 'tiled' or 'triton' for ring attention, got {backend!r}")
    numbers.flags(is_causal=is_causal, enable_gqa=enable_gqa)
    if norm.signed_denominator:
        raise ValueError(
            "normalizer: expected a denominator that is never negative, for ring attention merges partial results by its "
            f"logarithm; got {norm.text}"
        )
    query, key, value = to_autocast_dtype(check_qkv(query, key, value))
    if torch._C._are_functorch_transforms_active() or has_tangent(query, key, value, sink):
        raise NotImplementedError(
            "ring attention has no transforms of torch.func and no forward-mode derivatives; use "
            "softpick.scaled_dot_product_attention"
        )
    q, k, v, lead = canonical_shapes(query, key, value, enable_gqa)
    check_sink(sink, norm, q.shape[1], q)
    if is_causal and (q.shape[2] != k.shape[2] or q.shape[2] % 2):
        raise ValueError(
            f"is_causal: expected as many keys as queries and an even number of them, the two chunks of shard_sequence; got "
            f"{q.shape[2]} queries, {k.shape[2]} keys"
        )
    chosen = choose_backend(
        backend, q, v, norm, "tiled"
    )  # "reference" only by use_backend: the ring has the tiles for it
    out, _, _ = torch.ops.softpick.ring_forward(
        q,
        k,
        v,
        sink,
        group.group_name,
        norm.text,
        default_scale(scale, q.shape[-1]),
        default_eps(eps, norm),
        is_causal,
        check_softcap(softcap) or 0.0,
        operator_name(backend, "tiled" if chosen == "reference" else chosen),
    )
    return restore_shape(out, lead, max(query.dim(), key.dim(), value.dim()))


class _Exchange(NamedTuple):
    """A tensor on its way to the next rank and another one on its way from the previous rank; both are kept alive."""

    outgoing: Tensor
    incoming: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        """What has arrived. Before this it must not be read, nor what is sent be written."""
        for work in self.works:
            work.wait()
        return self.incoming


class _Ring:
    """The neighbours of this rank."""

    def __init__(self, group: Any) -> None:
        self.group = dist.distributed_c10d._resolve_process_group(group)  # as torch's own traceable collectives do
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.next = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        self.previous = dist.get_global_rank(self.group, (self.rank - 1) % self.size)

    def start(self, outgoing: Tensor, tag: int) -> _Exchange:
        incoming = torch.empty_like(outgoing)
        both = [
            dist.P2POp(dist.isend, outgoing, self.next, self.group, tag),
            dist.P2POp(dist.irecv, incoming, self.previous, self.group, tag),
        ]
        return _Exchange(outgoing, incoming, dist.batch_isend_irecv(both))


_KEYS, _GRADIENTS = 0, 1  # tags: both kinds are under way at once


def _visible(rank: int, source: int, tq: int, tk: int, is_causal: bool) -> tuple[slice, slice, bool]:
    """Which of this rank's queries see which keys of ``source``, and whether the mask within them is causal.

    Both hold an early and a late chunk. Of another rank's keys either all queries see the early chunk (it comes before
    both), or the late queries see all keys; the rest sees nothing. So a step is half a square for every rank.
    """
    if not is_causal or source == rank:
        return slice(0, tq), slice(0, tk), is_causal
    if source < rank:
        return slice(0, tq), slice(0, tk // 2), False
    return slice(tq // 2, tq), slice(0, tk), False


def _pack(key: Tensor, value: Tensor) -> Tensor:
    return torch.cat([key.reshape(-1), value.reshape(-1)])


def _unpack(packed: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return packed[: key.numel()].view(key.shape), packed[key.numel() :].view(value.shape)


class _Carry:
    """Numerator and denominator of every row, relative to ``e^level``, and the largest score.

    ``level`` is the largest lse so far. Every exponent below is at most 0: the constant and eps e^m of a partial result
    are in its denominator.
    """

    def __init__(self, norm: Normalizer, query: Tensor, value: Tensor, sink: Tensor | None, eps: float) -> None:
        b, h, t, _ = query.shape
        dtype = accumulation_dtype(query.dtype)
        self.norm, self.eps = norm, eps
        # eps keeps the denominator of a partial result from denormal numbers where no constant does
        self.part_eps = eps if norm.constant == 0 else 0.0
        self.sink = None if sink is None else sink.double().view(1, h, 1)
        self.numerator = query.new_zeros(b, h, t, value.shape[-1], dtype=dtype)
        self.denominator = query.new_zeros(b, h, t, dtype=torch.float64)  # fp32 has no digits behind the point at 1e7
        self.level = torch.full_like(self.denominator, -torch.inf)
        self.largest = torch.full_like(self.denominator, -torch.inf)

    def _constant(self, level: Tensor, largest: Tensor, eps: float) -> Tensor | float:
        """The constant of the denominator and eps, relative to ``e^level``."""
        total: Tensor | float = 0.0
        if self.norm.constant == 1:
            total = torch.exp(-level)
        elif self.sink is not None:
            total = torch.exp(self.sink - level)
        if eps:
            total = total + eps * torch.exp(self.norm.row_constant(largest, self.sink) - level)
        return total

    def add(self, rows: slice, out: Tensor, lse: Tensor, largest: Tensor) -> None:
        """Add the output, lse and largest score of some rows over a shard of the keys."""
        numerator, denominator = self.numerator[:, :, rows], self.denominator[:, :, rows]
        level = torch.maximum(self.level[:, :, rows], lse)
        finite = torch.where(level == -torch.inf, 0.0, level)  # rows with a denominator of 0 so far
        factor, weight = torch.exp(self.level[:, :, rows] - finite), torch.exp(lse - finite)
        numerator.mul_(factor[..., None]).addcmul_(out, weight[..., None].to(out.dtype))
        denominator.mul_(factor).add_(weight - self._constant(finite, largest, self.part_eps))
        self.level[:, :, rows] = level
        self.largest[:, :, rows] = torch.maximum(self.largest[:, :, rows], largest)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Output and lse over all shards."""
        level = torch.where(self.level == -torch.inf, 0.0, self.level)
        total = self.denominator + self._constant(level, self.largest, self.eps)
        inverse = torch.where(total == 0, 0.0, 1.0 / torch.where(total == 0, 1.0, total))
        return self.numerator * inverse[..., None].to(self.numerator.dtype), level + torch.log(total)


@torch.library.custom_op("softpick::ring_forward", mutates_args=())
def _ring_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    group_name: str,
    normalizer: str,
    scale: float,
    eps: float,
    is_causal: bool,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``(B, H, Tq, Dv)`` and lse ``(B, H, Tq)``, fp64, of this rank's queries over the keys of all ranks.

    The third one is what the rounding of the output to 16 bits took away (empty for other dtypes): ``D = do . out`` of a row
    that sees few keys, divided by a small denominator, needs it.
    """
    ring = _Ring(group_name)
    carry = _Carry(get_normalizer(normalizer), query, value, sink, eps)
    held = _pack(key, value)
    for step in range(ring.size):
        source = (ring.rank - step) % ring.size
        coming = ring.start(held, _KEYS) if step + 1 < ring.size else None
        rows, keys, causal = _visible(ring.rank, source, query.shape[2], key.shape[2], is_causal)
        k, v = _unpack(held, key, value)
        part = block_forward(
            query[:, :, rows], k[:, :, keys], v[:, :, keys], sink, backend=backend, normalizer=normalizer, scale=scale,
            eps=carry.part_eps, is_causal=causal, softcap=softcap,
        )  # fmt: skip
        carry.add(rows, *part)
        if coming is not None:
            held = coming.wait()
    out, lse = carry.finish()
    rounded = out.to(query.dtype)
    rest = query.new_empty(0) if out.dtype == query.dtype else (out - rounded).to(query.dtype)
    return rounded, lse, rest


@_ring_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    b, h, t, _width = query.shape
    dtype = accumulation_dtype(query.dtype)
    out = query.new_empty(b, h, t, value.shape[-1])
    return (
        out,
        query.new_empty(b, h, t, dtype=torch.float64),
        query.new_empty(0) if dtype == query.dtype else torch.empty_like(out),
    )


@torch.library.custom_op("softpick::ring_backward", mutates_args=())
def _ring_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    group: str,
    normalizer: str,
    scale: float,
    is_causal: bool,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and this rank's share of the sink's (empty without one)."""
    ring, dtype = _Ring(group), accumulation_dtype(query.dtype)
    if rest.numel():
        out = out.to(dtype) + rest
    dquery = torch.zeros(query.shape, dtype=dtype, device=query.device)
    held = _pack(key, value)
    gradients = torch.zeros(held.shape, dtype=dtype, device=held.device)  # of what is held
    moving: _Exchange | None = None
    for step in range(ring.size):
        source = (ring.rank - step) % ring.size
        coming = ring.start(held, _KEYS) if step + 1 < ring.size else None
        rows, keys, causal = _visible(ring.rank, source, query.shape[2], key.shape[2], is_causal)
        k, v = _unpack(held, key, value)
        dq, dk, dv = block_backward(
            grad_out[:, :, rows], query[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows],
            backend=backend, normalizer=normalizer, scale=scale, is_causal=causal, softcap=softcap,
        )  # fmt: skip
        dquery[:, :, rows] += dq
        if moving is not None:
            gradients = moving.wait()  # with what the ranks before this one added
        dkey, dvalue = _unpack(gradients, key, value)
        dkey[:, :, keys] += dk
        dvalue[:, :, keys] += dv
        if ring.size > 1:  # after the last step they come home
            moving = ring.start(gradients, _GRADIENTS)
        if coming is not None:
            held = coming.wait()
    if moving is not None:
        gradients = moving.wait()
    dkey, dvalue = _unpack(gradients, key, value)
    dsink = query.new_empty(0)
    if sink is not None:
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
        dsink = -(delta * torch.exp(sink.to(lse.dtype).view(1, -1, 1) - lse)).sum((0, 2)).to(sink.dtype)
    return _narrow(dquery, query), _narrow(dkey, key), _narrow(dvalue, value), dsink


def _narrow(grad: Tensor, like: Tensor) -> Tensor:
    """To the dtype of ``like``; near zero the gradient of softpick reaches 1/eps, beyond fp16's range: saturate."""
    if like.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        grad = grad.clamp(-limit, limit)
    return grad.to(like.dtype, copy=True)


@_ring_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dquery, dkey, dvalue = (x.new_empty(x.shape) for x in (query, key, value))
    return dquery, dkey, dvalue, query.new_empty(0) if sink is None else sink.new_empty(sink.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, sink, group, normalizer, scale, _, is_causal, softcap, backend = inputs
    ctx.save_for_backward(query, key, value, sink, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = (group, normalizer, scale, is_causal, softcap, backend)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    dquery, dkey, dvalue, dsink = _ring_backward(grad_out, *saved, *ctx.options)
    grads = (dquery, dkey, dvalue, dsink if saved[3] is not None else None)
    return (*grads, *(None,) * (ctx.inputs - len(grads)))


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("ring attention has no gradient of gradients; use softpick.scaled_dot_product_attention")


_ring_forward.register_autograd(_backward, setup_context=_setup_context)
_ring_backward.register_autograd(_no_double_backward)
