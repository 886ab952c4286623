"""One call of an attention function by a layer of a model: who may see what, the weights in fp32, and a few heads at a time.

Functions are called for a few samples and heads at a time (``MAX_ENTRIES`` weights, at least one head), so that even one
layer's maps of a long text are never in memory together. Heads are independent of each other, also those that share a key
head; where a layer has parameters by head that its function would read from the module (gpt-oss), they are not divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from softpick.analysis.metrics import MAX_ENTRIES
from softpick.normalizers import is_normalizer, visible

__all__ = ["PARTS", "Call", "SeenAttention", "fp32_weights", "report", "seen_keys"]

PARTS = ("encoder", "decoder", "cross-attention")
"""Of an encoder-decoder, each measured by itself: self-attention of both, and the decoder's to the encoder's positions."""

LOWEST = torch.finfo(torch.float32).min
GATE = "output_gate"  # of softpick's functions, (B, T, H, Dv)
_FUSED = ("flash_attention", "flex_attention", "paged|")


@dataclass(frozen=True)
class SeenAttention:
    """What one layer's attention did for some samples and heads of a batch.

    ``T`` queries see as many keys, but for cross-attention, where the keys are those of the encoder's positions.

    Attributes:
        part: of :data:`PARTS` for an encoder-decoder, else empty.
        layer: from 0, counting layers with attention of that part.
        samples: which of the batch, ``b`` of them.
        heads: which of the layer, ``h`` of them.
        total_heads: how many the layer has.
        weights: ``(b, h, T, Tk)`` fp32, after normalization.
        outputs: ``(b, T, h, Dv)``, before the output projection.
        visible: ``(b, 1, T, Tk)`` boolean, which keys a query may see.
        query: ``(b, h, T, D)``.
        key: ``(b, h or fewer, Tk, D)``.
        value: ``(b, h or fewer, Tk, Dv)``.
        module: the attention module.
        mask: as the attention function was given it, for these samples and heads.
        kwargs: what else it was given.
    """

    part: str
    layer: int
    samples: slice
    heads: slice
    total_heads: int
    weights: Tensor
    outputs: Tensor
    visible: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    module: nn.Module
    mask: Any
    kwargs: dict[str, Any]

    def scores(self) -> Tensor:
        """``(b, h, T, Tk)`` fp32: ``q . k x scaling`` (and a learned scale), before soft-capping, biases and the mask."""
        scaling = self.kwargs.get("scaling")
        scaling = self.query.shape[-1] ** -0.5 if scaling is None else scaling
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        query = self.query.float() * scaling
        by_head = self.kwargs.get("score_scale")  # softpick's: times log n, n the keys that a query may see
        if by_head is not None:
            query = query * (by_head.view(-1, 1, 1) * self.visible.sum(3).clamp(min=1).log()[..., None])
        return query @ key.float().transpose(2, 3)

    def masked_scores(self) -> Tensor:
        """``(b, h, T, Tk)`` fp32: what the normalizer saw, after soft-capping and biases; ``-inf`` where masked."""
        scores, softcap = self.scores(), self.kwargs.get("softcap")
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        bias = self.kwargs.get("position_bias")
        for added in (bias, self.mask):
            if isinstance(added, Tensor) and added.is_floating_point():
                scores = scores + added.float()
        return scores.masked_fill(~self.visible, -torch.inf)


def seen_keys(
    mask: Any,
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    kwargs: dict[str, Any],
    cross: bool = False,
) -> Tensor:
    """Which keys each query may see, ``(B or 1, 1, T, Tk)``, from the mask the attention function was given.

    ``cross``: the keys are those of other positions than the queries.
    """
    tq, tk = query.shape[2], key.shape[2]
    if tq != tk and not cross:
        raise ValueError(f"expected self-attention without a cache (as many keys as queries), got {tq} and {tk}")
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        every = torch.ones(1, 1, tq, tk, dtype=torch.bool, device=query.device)
        # eager functions know no other mask than the one they are given
        return every.tril() if causal and name != "eager" else every
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise ValueError(f"expected a mask (B, 1, T, T) or none, got {getattr(mask, 'shape', type(mask).__name__)}")
    see = visible(mask)
    return see[..., :tk].any(1, keepdim=True).expand(-1, 1, tq, tk)


def _is_additive(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.is_floating_point()


def fp32_weights(
    function: Callable[..., Any], arguments: tuple[nn.Module, Tensor, Tensor, Tensor, Any], kwargs: dict[str, Any]
) -> Tensor:
    """The weights that an attention function returns for fp32 inputs."""
    module, query, key, value, mask = arguments
    mask = mask.float() if _is_additive(mask) else mask
    with torch.autocast(query.device.type, enabled=False):
        return function(module, query.float(), key.float(), value.float(), mask, **(kwargs | {"dropout": 0.0}))[1]


def _pieces(
    name: str, module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> Iterator[tuple[slice, slice, slice]]:
    """Samples, query heads and their key heads that are worked on together: all if small, else of one sample what fits.

    Softpick's functions know their arguments only; others may read parameters of the module.
    """
    b, h, t, _ = query.shape
    key_heads, tk = key.shape[1], key.shape[2]
    if b * h * t * tk <= MAX_ENTRIES:
        yield slice(0, b), slice(0, h), slice(0, key_heads)
        return
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)] if not is_normalizer(name) else []
    by_head = any(x.dim() > 0 and x.shape[0] in (h, key_heads) for x in own)
    tensors = [x for name, x in kwargs.items() if isinstance(x, Tensor) and name != GATE]
    by_head |= any(x.dim() > 2 for x in tensors)  # a bias, perhaps one a head
    group, fit = h // key_heads, h if by_head else max(1, MAX_ENTRIES // (t * tk))
    # whole groups of query heads, or a part of one group
    step = fit // group * group if fit >= group else max(d for d in range(1, fit + 1) if group % d == 0)
    for sample in range(b):
        for head in range(0, h, step):
            last = min(head + step, h)
            yield slice(sample, sample + 1), slice(head, last), slice(head // group, (last - 1) // group + 1)


class _Ungrouped:
    """An attention module as eager functions see it when every query head has a key head of its own."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _part(x: Any, samples: slice, heads: slice, batch: int, total_heads: int) -> Any:
    """What some samples and heads need of an argument: of ``(B or 1, H or 1, T, Tk)``, ``(B, ...)`` or ``(H,)``."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if x.dim() == 1:  # sinks
        return x[heads] if x.shape[0] == total_heads else x
    if x.dim() == 4 and x.shape[1] == total_heads > 1:
        x = x[:, heads]
    return x[samples] if x.shape[0] == batch else x


@dataclass(frozen=True)
class Call:
    """A call of an attention function by an attention module of the model."""

    name: str
    """The function's name in ``AttentionInterface``."""
    function: Callable[..., Any]
    eager: Callable[..., Any]
    """The eager function of the same model file."""
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    kwargs: dict[str, Any]
    part: str = ""
    """Of :data:`PARTS`, or empty."""

    def __post_init__(self) -> None:
        if self.name.startswith(_FUSED):
            raise ValueError(f"attn_implementation {self.name!r} cannot show its weights: load the model with 'sdpa'")

    @property
    def arguments(self) -> tuple[nn.Module, Tensor, Tensor, Tensor, Any]:
        """What the function is called with, besides the keyword arguments."""
        return self.module, self.query, self.key, self.value, self.mask

    @property
    def asking(self) -> dict[str, Any]:
        """The keyword arguments with which the function returns its weights, if it can."""
        return self.kwargs if self.name in ("eager", "sdpa") else self.kwargs | {"output_attentions": True}

    def some(self, samples: slice, heads: slice, key_heads: slice, mask: Any) -> Call:
        """The call for some samples and heads, asking for weights."""
        kwargs = {k: _part(v, samples, heads, *self.query.shape[:2]) for k, v in self.asking.items()}
        if self.kwargs.get(GATE) is not None:
            kwargs[GATE] = self.kwargs[GATE][samples, :, heads]
        query, key, value = self.query[samples, heads], self.key[samples, key_heads], self.value[samples, key_heads]
        module: Any = self.module
        if query.shape[1] * self.key.shape[1] < self.query.shape[1] * key.shape[1]:  # a part of a group
            key, value = (x.expand(-1, query.shape[1], -1, -1) for x in (key, value))
            module = _Ungrouped(module)
        return replace(self, module=module, query=query, key=key, value=value, mask=mask, kwargs=kwargs)

    def weighed(self) -> tuple[Tensor, Tensor]:
        """Outputs ``(b, T, h, Dv)`` and weights in fp32 (or fp64) of a call that asks for weights."""
        outputs, weights = self.function(*self.arguments, **self.kwargs)[:2]
        if weights is None:
            raise ValueError(f"attn_implementation {self.name!r} returned no weights for output_attentions=True")
        if weights.dtype not in (torch.float32, torch.float64):  # rounded on the way out: once more in fp32
            weights = fp32_weights(self.function, self.arguments, self.kwargs)
        return outputs, weights


def report(call: Call, layer: int, on_attention: Callable[[SeenAttention], None]) -> Tensor:
    """Make a layer's call, and report it for some samples and heads after others; returns the layer's output."""
    batch, total, _, _ = call.query.shape
    cross = call.part == "cross-attention"
    seen = seen_keys(call.mask, call.name, call.module, call.query, call.key, call.kwargs, cross)
    seen = seen.expand(batch, -1, -1, -1)
    whole = call.function(*call.arguments, **call.kwargs)[0] if call.name == "sdpa" else None
    rows: dict[int, list[Tensor]] = {}
    mask: Any = None
    for samples, heads, key_heads in _pieces(call.name, call.module, call.query, call.key, call.kwargs):
        see = seen[samples]
        if call.name == "sdpa" and not _is_additive(call.mask):  # eager functions add their mask
            if heads.start == 0:
                mask = torch.zeros(see.shape, device=call.query.device).masked_fill_(~see, LOWEST)
        else:
            mask = _part(call.mask, samples, heads, batch, total)
        some = call.some(samples, heads, key_heads, mask)
        if whole is not None:
            outputs, weights = whole[samples, :, heads], fp32_weights(some.eager, some.arguments, some.kwargs)
        else:
            outputs, weights = some.weighed()
            rows.setdefault(samples.start, []).append(outputs)
        on_attention(
            SeenAttention(
                call.part, layer, samples, heads, total, weights, outputs, see, some.query, some.key, some.value, call.module,
                mask, some.kwargs,
            )
        )  # fmt: skip
        del weights  # before the next are computed
    if whole is not None:
        return whole
    return torch.cat([torch.cat(heads, 2) if len(heads) > 1 else heads[0] for heads in rows.values()])
