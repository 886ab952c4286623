"""Packed sequences: several in one row of a batch, told apart by their offsets or by positions that start again at 0."""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.utils.import_utils import is_tracing

from softpick.functional import varlen_attention
from softpick.nn.attention import scaled_by_length
from softpick.normalizers import Normalizer, is_normalizer, visible

__all__ = [
    "Packing",
    "apart",
    "attend_packed",
    "check_offsets",
    "check_restarts",
    "chunk_of",
    "excluded",
    "find_packing",
    "looks_back",
    "masked",
    "packed_in_masks",
    "runs_paged",
    "watch_offsets",
]


class Packing(NamedTuple):
    """Which sequence each token of a batch belongs to: tensors ``(B, T)``, or ``(1, T)`` where all rows are alike."""

    sequence: Tensor
    """Number of the sequence within its row or within the batch."""
    position: Tensor
    """Position within the sequence, from 0."""
    offsets: Tensor
    """``(N + 1,)`` starts and end of the sequences among all ``B T`` tokens."""
    longest: int
    """At least the length of the longest sequence."""


def find_packing(
    batch: int,
    tq: int,
    tk: int,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    longest: int | None,
    is_causal: bool = True,
    mask: Tensor | None = None,
) -> Packing | None:
    """The packed sequences of a batch, or None if there are none.

    Args:
        batch: number of rows.
        tq: number of queries.
        tk: number of keys.
        position_ids: ``(B or 1, Tq)``; ignored unless a 0 follows another position, and while compiling, where values cannot
            be read (:func:`packed_in_masks` sees to it there).
        cu_seq_lens_q: ``(N + 1,)`` offsets among the ``B Tq`` tokens; win over positions.
        cu_seq_lens_k: the same.
        longest: the longest sequence, if it is known.
        is_causal: whether the layer is causal; if False, positions count only beside a causal mask (:func:`check_restarts`
            refuses them elsewhere).
        mask: ``(B, 1 or H, Tq, Tk)``, or None.

    Raises:
        ValueError: for offsets of other shapes, or of which one is missing.
    """
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        cu = _offsets(tq, tk, cu_seq_lens_q, cu_seq_lens_k)
        tokens = torch.arange(batch * tq, device=cu.device)
        sequence = torch.searchsorted(cu, tokens, right=True)
        position = tokens - cu[(sequence - 1).clamp(min=0)]
        return Packing(sequence.view(batch, tq), position.view(batch, tq), cu, longest or tq)
    if torch.compiler.is_compiling() or tq != tk or not _packed(position_ids, batch, tq):
        return None
    if not is_causal and not looks_back(mask):
        return None
    assert position_ids is not None
    starts = position_ids == 0
    index = torch.arange(tq, device=position_ids.device)
    position = index - torch.where(starts, index, 0).cummax(1).values
    first = torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], 1)
    flat = first.expand(batch, tq).flatten().nonzero().flatten()
    offsets = torch.cat([flat, flat.new_tensor([batch * tq])]).int()
    return Packing(starts.cumsum(1), position, offsets, tq)


def _packed(position_ids: Tensor | None, batch: int, tq: int) -> bool:
    """Whether positions are those of each query and start again at 0."""
    return (
        position_ids is not None
        and tq > 1
        and tuple(position_ids.shape) in ((1, tq), (batch, tq))
        and not position_ids.is_meta
        and _restarts(position_ids)
    )


class _Running(threading.local):
    """What the models that run in this thread were given: whether offsets, and those of continuous batching.

    ``starts (B or 1, T)`` is where sequences start by the positions that the innermost model was given, or None if they tell
    of no packed sequences, or are not all that does.
    """

    given = False
    paged = False
    starts: Tensor | None = None


_running = _Running()


def watch_offsets(kind: type[nn.Module]) -> None:
    """Note while a model of a class runs whether it was given ``cu_seq_lens``: some keep them from their layers."""
    forward: Any = kind.forward
    if getattr(forward, "_softpick", False):
        return

    @functools.wraps(forward)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        before = _running.given, _running.paged, _running.starts
        try:
            _running.given = before[0] or kwargs.get("cu_seq_lens_q") is not None
            _running.paged = before[1] or kwargs.get("read_index") is not None
            packed = is_normalizer(getattr(self.config, "_attn_implementation", None)) and _gives_packed(kwargs)
            if packed:
                _check_mixing(self)
            _running.starts = kwargs["position_ids"] == 0 if packed and _by_positions(kwargs) else None
            return forward(self, *args, **kwargs)
        finally:
            _running.given, _running.paged, _running.starts = before

    watched._softpick = True  # type: ignore[attr-defined]
    kind.forward = watched


_MIXING = re.compile(
    r"Mamba\w*Mixer|SSM|ShortConv|Linear\w*Attention|Lightning\w*Attention|Recurrent|Delta(Net|\w*Attention)|RWKV|"
    r"LSTM|Retention|Compressor"
)
"""Names of classes of layers that carry something from token to token and are no attention."""


def _check_mixing(model: nn.Module) -> None:
    """Refuse packed sequences for a model of ours that has layers which carry one sequence into the next.

    Raises:
        ValueError: naming the layer.
    """
    for name, layer in _own_modules(model):
        kind = type(layer)
        convolves = isinstance(layer, nn.Conv1d) and layer.kernel_size[0] > 1
        if convolves or isinstance(layer, nn.RNNBase) or _MIXING.search(kind.__name__):
            raise ValueError(
                f"cu_seq_lens_q, position_ids: packed sequences need a model of attention layers only; {name} "
                f"({kind.__name__}) of {type(model).__name__} carries one sequence into the next; pass one sequence a row"
            )


def _gives_packed(given: dict[str, Any]) -> bool:
    """Whether the arguments of a model say that there are packed sequences."""
    positions, padding = given.get("position_ids"), given.get("attention_mask")
    if given.get("cu_seq_lens_q") is not None:
        return True
    if not isinstance(positions, Tensor) or positions.dim() != 2 or is_tracing(positions):
        return False
    rows, tokens = positions.shape
    if not isinstance(padding, Tensor) or padding.shape[-1] < tokens:
        padding = None
    offset = 0 if padding is None else padding.shape[-1] - tokens
    return _packed(positions, rows, tokens) and bool(_starts_behind_tokens(positions, padding, offset).any())


def _by_positions(given: dict[str, Any]) -> bool:
    """Whether only positions tell packed sequences apart: neither offsets nor a mask of who sees whom."""
    mask = given.get("attention_mask")
    return given.get("cu_seq_lens_q") is None and not (isinstance(mask, Tensor) and mask.dim() == 4)


def _own_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules of a model with their names, without those of models inside it, which check themselves."""
    for name, child in model.named_children():
        if not isinstance(child, PreTrainedModel):
            yield prefix + name, child
            yield from _own_modules(child, f"{prefix}{name}.")


def runs_paged() -> bool:
    """Whether the model that runs in this thread does so for continuous batching, which needs no masks."""
    return not torch.compiler.is_compiling() and _running.paged


def check_offsets(module: nn.Module, is_causal: bool, mask: Tensor | None) -> None:
    """Refuse a causal layer that was handed no offsets in a model that was given some.

    Args:
        module: the layer.
        is_causal: what it says of itself; if False, the mask counts.
        mask: ``(B, 1 or H, Tq, Tk)``, or None.

    Raises:
        ValueError: naming the layer.
    """
    if not torch.compiler.is_compiling() and _running.given and (is_causal or looks_back(mask)):
        raise ValueError(
            f"cu_seq_lens_q: the model does not hand it on to {type(module).__name__}, whose packed sequences would see one "
            "another; pass position_ids that start again at 0"
        )


def check_restarts(module: nn.Module, tq: int, tk: int, is_causal: bool, mask: Tensor | None) -> None:
    """Refuse a layer that looks both ways in a model whose packed sequences only positions tell apart.

    Args:
        module: the layer.
        tq: number of queries.
        tk: number of keys.
        is_causal: what it says of itself; the mask counts if that is False, or if the mask is one for all queries.
        mask: ``(..., Tq or 1, Tk)``, or None.

    Raises:
        ValueError: naming the layer.
    """
    starts = None if torch.compiler.is_compiling() else _running.starts
    if starts is None or not tq == tk == starts.shape[1]:
        return
    if (is_causal and (mask is None or mask.shape[-2] > 1)) or looks_back(mask):
        return
    sequence = starts.cumsum(1)
    joined = (sequence[:, :, None] != sequence[:, None, :])[:, None]
    if mask is not None:
        seen = visible(mask).expand(torch.broadcast_shapes(mask.shape, joined.shape))
        joined = joined & seen & seen.any(2)[..., None]  # padding, which no query sees, may see everything
    if bool(joined.any()):
        raise ValueError(
            f"position_ids: start again at 0, which packs sequences, and {type(module).__name__} looks both ways: they would "
            "see one another; pass cu_seq_lens_q and cu_seq_lens_k, or an attention_mask (B, 1, T, T) of who sees whom"
        )


def _offsets(tq: int, tk: int, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
    if cu_q is None or cu_k is None or tq != tk or cu_q.shape != cu_k.shape:
        raise ValueError(
            "cu_seq_lens_q, cu_seq_lens_k: expected both, equal, with as many keys as queries; got "
            f"{'none' if cu_q is None else tuple(cu_q.shape)}, {'none' if cu_k is None else tuple(cu_k.shape)}, {tq} queries, "
            f"{tk} keys"
        )
    return cu_q


_last_positions: tuple[weakref.ref[Tensor], int | None, bool] | None = None


def _restarts(position_ids: Tensor) -> bool:
    """Whether a position 0 follows another one.

    Reading it waits for the device, and all layers of a model ask about one tensor: the last answer is remembered.
    """
    global _last_positions
    last, version = _last_positions, None if position_ids.is_inference() else position_ids._version
    if last is not None and version is not None and last[0]() is position_ids and last[1] == version:
        return last[2]
    answer = bool((position_ids[:, 1:] == 0).any())
    _last_positions = (weakref.ref(position_ids), version, answer)
    return answer


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    is_causal: bool,
    window: tuple[int, int] | None,
    score_scale: Tensor | None,
    dropout: float,
    scaling: float | None,
    normalizer: Normalizer,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """Attention within packed sequences, without a mask.

    Args:
        query: ``(B, H, T, D)``; key and value likewise, with ``Hkv`` heads.
        window: ``(left, right)`` keys around the own position, or None.
        score_scale: ``(H,)``, times the logarithm of the number of visible keys.

    Returns:
        ``(B, T, H, Dv)``.
    """
    batch, _, tokens, _ = query.shape
    if score_scale is not None:
        lengths = packing.offsets.diff()
        sequence = (
            torch.searchsorted(packing.offsets, torch.arange(batch * tokens, device=query.device), right=True) - 1
        )
        length = lengths[sequence.clamp(0, len(lengths) - 1)].view(batch, tokens)
        position = packing.position.expand(batch, tokens)
        left, right = (-1, 0 if is_causal else -1) if window is None else window
        first = 0 if left < 0 else (position - left).clamp(min=0)
        last = length - 1 if right < 0 else torch.minimum(position + right, length - 1)
        query = scaled_by_length(query, score_scale, (last - first + 1)[:, None])
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen_attention(
        q,
        k,
        v,
        packing.offsets,
        packing.offsets,
        packing.longest,
        packing.longest,
        dropout,
        scaling,
        is_causal,
        normalizer=normalizer,
        window=window,
        softcap=softcap,
        sink=sink,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, tokens))


def masked(mask: Tensor, keep: Tensor) -> Tensor:
    """A mask, boolean or additive, that also excludes what ``keep`` says False of."""
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, torch.finfo(mask.dtype).min)


def excluded(mask: Tensor) -> Tensor:
    """Where a mask excludes keys, boolean."""
    return ~visible(mask)


def looks_back(mask: Tensor | None) -> bool:
    """Whether a mask ``(..., T, T)`` lets no query see a later key: some causal layers (BigBirdPegasus) do not say so."""
    if mask is None or mask.dim() < 2 or not 1 < mask.shape[-1] == mask.shape[-2]:
        return False
    return not bool(visible(mask).triu(1).any())


def apart(
    mask: Tensor | None, packing: Packing, is_causal: bool, window: tuple[int, int] | None, chunk: int | None
) -> Tensor:
    """A mask without what packed sequences see of one another.

    Args:
        mask: ``(B, 1 or H, T, T)``, or None.
        packing: of the ``T`` tokens.
        is_causal: what None as the mask means; also that chunks look back only.
        window: ``(left, right)``, where the mask is None.
        chunk: tokens of a chunk: attention that transformers' mask limited to chunks, counted from the start of the row. They
            are counted from the start of each sequence instead.
    """
    same = (packing.sequence[:, :, None] == packing.sequence[:, None, :])[:, None]
    if mask is None:
        keep = same.tril() if is_causal else same
        left, right = (-1, -1) if window is None else window
        keep = keep if left < 0 else keep.triu(-left)
        return keep if right < 0 else keep.tril(right)
    if chunk is not None:
        # what the mask says of single keys (padding) stands where a query meets its own key
        own = ~excluded(mask.diagonal(dim1=-2, dim2=-1))[..., None, :]
        number = packing.position // chunk
        keep = (same & (number[:, :, None] == number[:, None, :])[:, None]).tril() & own
        return keep if mask.dtype == torch.bool else torch.where(keep, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    return masked(mask, same)


def chunk_of(module: Any) -> int | None:
    """Tokens of a chunk, where a layer's configuration says that it attends within chunks; else None."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or index is None or index >= len(kinds) or kinds[index] != "chunked_attention":
        return None
    return getattr(config, "attention_chunk_size", None)


def packed_in_masks(
    preprocess: Callable[..., tuple[Any, ...]], ours: Callable[[Any], bool]
) -> Callable[..., tuple[Any, ...]]:
    """``masking_utils._preprocess_mask_arguments`` that finds packed sequences beside a cache or a padding mask, too.

    transformers looks for them only where there is neither. Its masks then count windows and chunks within each sequence.

    Args:
        preprocess: transformers' function.
        ours: whether a configuration has one of our implementations; nothing changes for others.
    """

    @functools.wraps(preprocess)
    def wrapper(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Any,
        past_key_values: Any,
        position_ids: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        found = preprocess(config, inputs_embeds, attention_mask, past_key_values, position_ids, *args, **kwargs)
        early, padding, packed, q_length, kv_length, q_offset = found[:6]
        if packed is not None and ours(config):
            _refuse_wrong_chunks(config, position_ids)
        if early or packed is not None or position_ids is None or not ours(config) or q_length == 1 or runs_paged():
            return found
        batch = inputs_embeds.shape[0]
        chunks = _has_chunks(config)
        if torch.compiler.is_compiling() or is_tracing(position_ids):
            if tuple(position_ids.shape) not in ((1, q_length), (batch, q_length)):
                return found
            if padding is None or q_length != kv_length or chunks:
                message = (
                    "position_ids: packed sequences in a compiled model that keeps a cache, or that has chunked attention and "
                    "an attention_mask; pass use_cache=False and no attention_mask"
                )
                torch._assert_async(~_starts_behind_tokens(position_ids, padding, q_offset).any(), message)
                return found
        elif not _packed(position_ids, batch, q_length):
            return found
        elif not bool(_starts_behind_tokens(position_ids, padding, q_offset).any()):
            return found  # the positions start at 0 behind the padding on the left
        elif q_length != kv_length:
            raise ValueError(
                f"position_ids: packed sequences need as many keys as queries, got {q_length} queries and a cache of "
                f"{kv_length} keys; pass use_cache=False"
            )
        elif chunks and padding is not None and not bool(padding[:, 0].all()):
            # transformers would count the tokens of a chunk from positions less the padding
            raise ValueError(
                f"position_ids: packed sequences of a {config.model_type} model, which has chunked attention, need padding on "
                "the right; got an attention_mask with padding on the left"
            )
        else:
            _refuse_wrong_chunks(config, position_ids)
        return (*found[:2], (position_ids == 0).cumsum(1).expand(batch, -1), *found[3:])

    return wrapper


# older transformers count the tokens of a chunk from the start of the row, and give their layers no positions to do better
_CHUNKS_FROM_THE_ROW = not hasattr(masking_utils, "remap_positions_for_packed_sequence")


def _has_chunks(config: Any) -> bool:
    return "chunked_attention" in (getattr(config, "layer_types", None) or ())


def _refuse_wrong_chunks(config: Any, position_ids: Tensor | None) -> None:
    """Refuse packed sequences by positions where transformers cuts their chunks in wrong places.

    Raises:
        ValueError: a model with chunked attention is given them.
    """
    if not _CHUNKS_FROM_THE_ROW or position_ids is None or not _has_chunks(config):
        return
    message = (
        f"position_ids: packed sequences of a {config.model_type} model, which has chunked attention, need transformers 5.23 "
        "or newer; pass cu_seq_lens_q and cu_seq_lens_k with them"
    )
    if torch.compiler.is_compiling() or is_tracing(position_ids):
        torch._assert_async(~(position_ids[:, 1:] == 0).any(), message)
    elif not _running.given and _restarts(position_ids):
        raise ValueError(message)


def _starts_behind_tokens(position_ids: Tensor, padding: Tensor | None, q_offset: Any) -> Tensor:
    """``(B or 1, T - 1)``: whether a sequence starts at a query, but the first, behind tokens that are no padding."""
    starts = position_ids[:, 1:] == 0
    if padding is None or padding.dim() != 2:
        return starts
    columns = torch.arange(starts.shape[1], device=padding.device) + q_offset
    return starts & (padding.cumsum(1)[:, columns.clamp(max=padding.shape[1] - 1)] > 0)
