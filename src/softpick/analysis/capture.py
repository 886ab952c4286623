"""Run a transformers model over batches and feed what its attention layers do to the metrics.

Every attention module of transformers asks ``AttentionInterface.get_interface`` for its function at every call. While
a model is measured, that method hands the modules *of this model* the same function in a wrapper, which passes the true
weights on as soon as the layer has run: no second forward pass, no list of maps, and nothing of the model is touched
but its training flags, which are put back.

- ``eager`` returns its weights. Those of half-precision models are computed once more in fp32.
- ``sdpa`` returns none: the model continues with the output of ``sdpa``, and the weights come from the eager function
  of the same model file, in fp32, from the same queries, keys and mask.
- any other registered function (softpick's) is called with ``output_attentions=True`` and must return weights.

Functions are called for a few samples and heads at a time (``MAX_ENTRIES`` weights), so that even one layer's maps of a
long text are never in memory together. Heads are independent of each other; where a layer has parameters by head that
its function would read from the module (gpt-oss), they are not divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from softpick.analysis.metrics import MAX_ENTRIES, Measurements, Meter
from softpick.normalizers import NORMALIZERS, visible

__all__ = ["BOS_POLICIES", "SeenAttention", "attention_maps", "measure", "seen_keys", "watch", "watch_last_query"]

BOS_POLICIES = ("auto", "bos", "none")
"""``auto``: say what the samples start with; ``bos``: every sample must start with the model's BOS token; ``none``: the
caller says that samples start without one."""

_LOWEST = torch.finfo(torch.float32).min
_GATE = "output_gate"  # of softpick's functions, (B, T, H, Dv)
_FUSED = ("flash_attention", "flex_attention", "paged|")


@dataclass(frozen=True)
class SeenAttention:
    """What one layer's attention did for some samples and heads of a batch.

    Attributes:
        layer: from 0, counting layers with attention.
        samples: which of the batch, ``b`` of them.
        heads: which of the layer, ``h`` of them.
        total_heads: how many the layer has.
        weights: ``(b, h, T, T)`` fp32, after normalization.
        outputs: ``(b, T, h, Dv)``, before the output projection.
        visible: ``(b, 1, T, T)`` boolean, which keys a query may see.
        query: ``(b, h, T, D)``.
        key: ``(b, h or fewer, T, D)``.
        value: ``(b, h or fewer, T, Dv)``.
        module: the attention module.
        mask: as the attention function was given it, for these samples and heads.
        kwargs: what else it was given.
    """

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
        """``(b, h, T, T)`` fp32: ``q . k x scaling`` (and a learned scale), before soft-capping, biases and the mask."""
        scaling = self.kwargs.get("scaling")
        scaling = self.query.shape[-1] ** -0.5 if scaling is None else scaling
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        query = self.query.float() * scaling
        by_head = self.kwargs.get("score_scale")  # softpick's: times log n, n the keys that a query may see
        if by_head is not None:
            query = query * (by_head.view(-1, 1, 1) * self.visible.sum(3).clamp(min=1).log()[..., None])
        return query @ key.float().transpose(2, 3)

    def masked_scores(self) -> Tensor:
        """``(b, h, T, T)`` fp32: what the normalizer saw, after soft-capping and biases; ``-inf`` where masked."""
        scores, softcap = self.scores(), self.kwargs.get("softcap")
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if _is_additive(self.mask):
            scores = scores + self.mask.float()
        return scores.masked_fill(~self.visible, -torch.inf)


def measure(
    model: nn.Module,
    batches: Tensor | Iterable[Mapping[str, Tensor] | Tensor],
    *,
    bos_policy: str = "auto",
    device: torch.device | str | None = None,
    largest_score: bool = False,
    tokens: Iterable[int] = (),
    meter: Meter | None = None,
    progress: Callable[[int], None] | None = None,
) -> Measurements:
    """All metrics of ``docs/metrics.md`` for a transformers model over some batches, one forward pass each.

    The model runs in evaluation mode, without gradients and without a cache; its modes and configuration are afterwards
    as before, also after an error.

    Args:
        model: a decoder (Llama, GPT-2, ...) or encoder (BERT, ...) of transformers, with ``attn_implementation`` eager,
            sdpa, or a registered one that returns weights.
        batches: token ids ``(B, T)``, an iterable of such, or of dicts with ``input_ids (B, T)``, optionally
            ``attention_mask (B, T)`` (0 marks padding) and other arguments of the model; ``labels`` is ignored.
        bos_policy: one of ``BOS_POLICIES``.
        device: where the inputs go; by default where the model's parameters are.
        largest_score: also find the largest scaled score ``q . k`` a layer (one more matrix product).
        tokens: ids whose sink rates are listed in any case.
        meter: one that has seen earlier batches and goes on counting; the default is a new one.
        progress: called with the number of finished batches.

    Raises:
        ValueError: for an unknown policy, a sample that breaks it, a batch without ``input_ids``, a model in which no
            attention layer is seen or whose implementation does not show its weights, and for NaN.
    """
    if bos_policy not in BOS_POLICIES:
        raise ValueError(f"bos_policy: expected one of {', '.join(BOS_POLICIES)}; got {bos_policy!r}")
    bos = getattr(getattr(model, "config", None), "bos_token_id", None)
    if bos_policy == "bos" and bos is None:
        raise ValueError("bos_policy: 'bos' needs a model whose config has a bos_token_id")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    meter = Meter(bos_policy, tokens) if meter is None else meter

    def on_attention(seen: SeenAttention) -> None:
        above = seen.visible.shape[-1] > 1 and bool(seen.visible.triu(1).any())
        score = seen.scores().masked_fill_(~seen.visible, -torch.inf).max().item() if largest_score else None
        meter.attention(
            seen.layer,
            seen.weights,
            seen.outputs,
            seen.visible,
            causal=not above,
            max_score=score,
            first_sample=seen.samples.start,
            first_head=seen.heads.start,
            heads=seen.total_heads,
        )

    with watch(model, on_attention, meter.hidden) as run:
        for done, batch in enumerate([batches] if isinstance(batches, Tensor) else batches, 1):
            inputs, valid = _inputs(batch, device)
            if bos_policy == "bos":
                _check_bos(inputs["input_ids"], valid, bos)
            meter.begin_batch(valid, inputs["input_ids"])
            run(inputs)
            if progress is not None:
                progress(done)
    return meter.result()


def attention_maps(model: nn.Module, input_ids: Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """The attention weights of every layer for one short sample.

    Args:
        model: as for :func:`measure`.
        input_ids: ``(T,)`` or ``(1, T)``, without padding.
        device: as for :func:`measure`.

    Returns:
        ``(L, H, T, T)`` fp32 on the CPU; entries that are masked are 0.
    """
    input_ids = one_sample(input_ids)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    maps: list[list[Tensor]] = []

    def on_attention(seen: SeenAttention) -> None:
        if seen.heads.start == 0:
            maps.append([])
        maps[-1].append(torch.where(seen.visible, seen.weights, 0.0)[0].cpu())

    with watch(model, on_attention) as run:
        run({"input_ids": input_ids.to(device)})
    return torch.stack([torch.cat(heads) for heads in maps])


def one_sample(input_ids: Tensor) -> Tensor:
    """``(1, T)``, from that or ``(T,)``."""
    if input_ids.dim() == 1:
        input_ids = input_ids[None]
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: expected one sample, (T,) or (1, T), got {tuple(input_ids.shape)}")
    return input_ids


# ---------------------------------------------------------------------------------------------------------------------


def _inputs(batch: Mapping[str, Tensor] | Tensor, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The model's arguments, and the ``(B, T)`` mask of real positions."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if "input_ids" not in batch:
        raise ValueError(f"batches: expected dicts with input_ids, got the keys {sorted(batch)}")
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.dim() != 2:
        raise ValueError(f"input_ids: expected (B, T), got {tuple(ids.shape)}")
    if mask is None:
        return inputs, torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected the shape of input_ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
    return inputs, mask.bool()


def _check_bos(input_ids: Tensor, valid: Tensor, bos: Any) -> None:
    allowed = set(bos) if isinstance(bos, list | tuple) else {bos}
    first = input_ids.gather(1, valid.int().argmax(1, keepdim=True))[:, 0]
    wrong = [int(t) for t, real in zip(first, valid.any(1), strict=True) if real and int(t) not in allowed]
    if wrong:
        raise ValueError(
            f"bos_policy: 'bos' expects every sample to start with token {bos}; one starts with {wrong[0]}"
        )


def seen_keys(mask: Any, name: str, module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Which keys each query may see, ``(B or 1, 1, T, T)``, from the mask the attention function was given."""
    tq, tk = query.shape[2], key.shape[2]
    if tq != tk:
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


def _fp32_weights(
    function: Callable[..., Any], arguments: tuple[nn.Module, Tensor, Tensor, Tensor, Any], kwargs: dict[str, Any]
) -> Tensor:
    """The weights that an attention function returns for fp32 inputs."""
    module, query, key, value, mask = arguments
    mask = mask.float() if _is_additive(mask) else mask
    with torch.autocast(query.device.type, enabled=False):
        return function(module, query.float(), key.float(), value.float(), mask, **(kwargs | {"dropout": 0.0}))[1]


def _pieces(
    name: str, module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]
) -> Iterator[tuple[slice, slice]]:
    """Samples and key heads that are worked on together: all of them if small, else of one sample as many as fit.

    Softpick's functions know their arguments only; others may read parameters of the module.
    """
    b, h, t, _ = query.shape
    if b * h * t * t <= MAX_ENTRIES:
        yield slice(0, b), slice(0, key.shape[1])
        return
    counts = (h, key.shape[1])
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)] if name not in NORMALIZERS else []
    by_head = any(x.dim() > 0 and x.shape[0] in counts for x in own)
    tensors = [x for name, x in kwargs.items() if isinstance(x, Tensor) and name != _GATE]
    by_head |= any(x.dim() > 2 for x in tensors)  # a bias, perhaps one a head
    step = key.shape[1] if by_head else max(1, MAX_ENTRIES // (t * t * (h // key.shape[1])))
    for sample in range(b):
        for head in range(0, key.shape[1], step):
            yield slice(sample, sample + 1), slice(head, min(head + step, key.shape[1]))


def _part(x: Any, samples: slice, heads: slice, batch: int, total_heads: int) -> Any:
    """What some samples and heads need of an argument: of ``(B or 1, H or 1, T, T)``, ``(B, ...)`` or ``(H,)``."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if x.dim() == 1:  # sinks
        return x[heads] if x.shape[0] == total_heads else x
    if x.dim() == 4 and x.shape[1] == total_heads > 1:
        x = x[:, heads]
    return x[samples] if x.shape[0] == batch else x


@dataclass(frozen=True)
class _Call:
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

    def __post_init__(self) -> None:
        if self.name.startswith(_FUSED):
            raise ValueError(f"attn_implementation {self.name!r} cannot show its weights: load the model with 'sdpa'")

    @property
    def arguments(self) -> tuple[nn.Module, Tensor, Tensor, Tensor, Any]:
        return self.module, self.query, self.key, self.value, self.mask

    @property
    def asking(self) -> dict[str, Any]:
        """The keyword arguments with which the function returns its weights, if it can."""
        return self.kwargs if self.name in ("eager", "sdpa") else self.kwargs | {"output_attentions": True}

    def part(self, samples: slice, heads: slice, key_heads: slice, mask: Any) -> _Call:
        """The call for some samples and heads, asking for weights."""
        kwargs = {k: _part(v, samples, heads, *self.query.shape[:2]) for k, v in self.asking.items()}
        if self.kwargs.get(_GATE) is not None:
            kwargs[_GATE] = self.kwargs[_GATE][samples, :, heads]
        query, key, value = self.query[samples, heads], self.key[samples, key_heads], self.value[samples, key_heads]
        return replace(self, query=query, key=key, value=value, mask=mask, kwargs=kwargs)

    def weighed(self) -> tuple[Tensor, Tensor]:
        """Outputs ``(b, T, h, Dv)`` and weights in fp32 (or fp64) of a call that asks for weights."""
        outputs, weights = self.function(*self.arguments, **self.kwargs)[:2]
        if weights is None:
            raise ValueError(f"attn_implementation {self.name!r} returned no weights for output_attentions=True")
        if weights.dtype not in (torch.float32, torch.float64):  # rounded on the way out: once more in fp32
            weights = _fp32_weights(self.function, self.arguments, self.kwargs)
        return outputs, weights


def _report(call: _Call, layer: int, on_attention: Callable[[SeenAttention], None]) -> Tensor:
    """Make a layer's call, and report it for some samples and heads after others; returns the layer's output."""
    batch, total, _, _ = call.query.shape
    seen = seen_keys(call.mask, call.name, call.module, call.query, call.key, call.kwargs).expand(batch, -1, -1, -1)
    whole = call.function(*call.arguments, **call.kwargs)[0] if call.name == "sdpa" else None
    group = total // call.key.shape[1]
    rows: dict[int, list[Tensor]] = {}
    mask: Any = None
    for samples, key_heads in _pieces(call.name, call.module, call.query, call.key, call.kwargs):
        heads = slice(key_heads.start * group, key_heads.stop * group)
        see = seen[samples]
        if call.name == "sdpa" and not _is_additive(call.mask):  # eager functions add their mask
            if heads.start == 0:
                mask = torch.zeros(see.shape, device=call.query.device).masked_fill_(~see, _LOWEST)
        else:
            mask = _part(call.mask, samples, heads, batch, total)
        part = call.part(samples, heads, key_heads, mask)
        if whole is not None:
            outputs, weights = whole[samples, :, heads], _fp32_weights(part.eager, part.arguments, part.kwargs)
        else:
            outputs, weights = part.weighed()
            rows.setdefault(samples.start, []).append(outputs)
        on_attention(
            SeenAttention(
                layer, samples, heads, total, weights, outputs, see, part.query, part.key, part.value, call.module,
                mask, part.kwargs,
            )
        )  # fmt: skip
        del weights  # before the next are computed
    if whole is not None:
        return whole
    return torch.cat([torch.cat(heads, 2) if len(heads) > 1 else heads[0] for heads in rows.values()])


class _Watch:
    """The hooks of :func:`watch`, and how far they are in a forward pass.

    A layer is what a ModuleList holds and an attention module runs in; the outermost such list counts.
    """

    def __init__(
        self,
        name: str,
        body: nn.Module,
        on_attention: Callable[[SeenAttention], None],
        on_hidden: Callable[[int, Tensor], None],
    ) -> None:
        self.name = name
        self.body, self.on_attention, self.on_hidden = body, on_attention, on_hidden
        self.depth = self.attentions_in_layer = self.layers = self.hidden_seen = 0

    def around(self, name: str, function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        """The attention function that a module of the model calls instead of ``function``."""

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            call = _Call(name, function, eager, module, query, key, value, attention_mask, kwargs)
            output = _report(call, self.layers, self.on_attention)
            self.layers += 1
            self.attentions_in_layer += 1
            return output, None

        return attention

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Before a module of a list runs."""
        self.depth += 1
        if self.depth == 1:
            self.attentions_in_layer = 0

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """After a module of a list: report the residual stream behind a layer."""
        self.depth -= 1
        if self.depth or not self.attentions_in_layer:
            return
        if self.attentions_in_layer > 1:
            raise ValueError(
                f"{type(module).__name__}: expected one self-attention a layer, saw {self.attentions_in_layer}"
            )
        self.on_hidden(self.layers - 1, output if isinstance(output, Tensor) else output[0])
        self.hidden_seen += 1

    def run(self, inputs: dict[str, Tensor]) -> None:
        """One forward pass."""
        self.depth = self.layers = self.hidden_seen = 0
        with torch.no_grad():
            self.body(**inputs)
        if self.layers and self.hidden_seen == self.layers:
            return
        what = (
            f"{self.hidden_seen} layers for {self.layers} attentions"
            if self.layers
            else "no attention layers were seen"
        )
        raise ValueError(
            f"model: {what} in {self.name}: expected a transformers model whose attention goes through "
            "AttentionInterface, in layers held by a ModuleList"
        )


@contextmanager
def watch(
    model: nn.Module,
    on_attention: Callable[[SeenAttention], None],
    on_hidden: Callable[[int, Tensor], None] = lambda layer, hidden: None,
) -> Iterator[Callable[[dict[str, Tensor]], None]]:
    """A function that runs the model once on a dict of its arguments and reports every layer.

    Args:
        model: as for :func:`measure`.
        on_attention: called with what the attention of a layer did, once or for some samples and heads after others.
        on_hidden: called with the layer (from 0) and the residual stream ``(B, T, C)`` behind it.

    Everything is restored on leaving.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError("measuring a model needs transformers: pip install 'softpick[transformers]'") from error

    from softpick.integrations.transformers import intercept_attention

    model = getattr(model, "_orig_mod", model)  # of torch.compile
    body = model.base_model if isinstance(model, PreTrainedModel) else model  # no vocabulary logits needed
    watching = _Watch(type(model).__name__, body, on_attention, on_hidden)
    training = [(m, m.training) for m in model.modules()]
    held = {id(child): child for m in body.modules() if isinstance(m, nn.ModuleList) for child in m}
    handles: list[Any] = []
    try:
        for child in held.values():
            handles += [child.register_forward_pre_hook(watching.enter), child.register_forward_hook(watching.leave)]
        model.eval()
        with intercept_attention(model, watching.around):
            yield watching.run
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode


def _last_row(call: _Call) -> Tensor:
    """The weights ``(B, H, Tk)`` of a call's last query, fp32, 0 where masked."""
    query, key, mask = call.query, call.key, call.mask
    see = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise ValueError(f"expected a mask (B, 1, Tq, Tk) or none, got {type(mask).__name__}")
        mask = mask[..., -1:, : key.shape[2]]
        see = visible(mask)
        if call.name == "sdpa" and mask.dtype == torch.bool:  # eager functions add their mask
            mask = torch.zeros(mask.shape, device=query.device).masked_fill_(~mask, _LOWEST)
    elif query.shape[2] not in (1, key.shape[2]):
        raise ValueError(f"expected a mask for {query.shape[2]} queries and {key.shape[2]} keys")
    # one query without a mask sees every key; a gate and positions change no weights
    kwargs = {k: v for k, v in call.asking.items() if k not in (_GATE, "position_ids")}
    function = call.eager if call.name == "sdpa" else call.function
    weights = _fp32_weights(function, (call.module, query[:, :, -1:], key, call.value, mask), kwargs)
    if weights is None:
        raise ValueError(f"attn_implementation {call.name!r} returned no weights for output_attentions=True")
    weights = weights[:, :, 0, : key.shape[2]]
    return weights if see is None else torch.where(see[:, :, 0], weights, 0.0)


@contextmanager
def watch_last_query(model: nn.Module, on_row: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, every forward pass of a model reports what the last query of each layer attends to.

    For decoding with a cache, and for long texts: no more than one row of weights a head is computed, after the layer's
    own attention, from the same queries, keys and mask. The last query must not be padding.

    Args:
        model: as for :func:`measure`.
        on_row: called with the layer (from 0, counting layers with attention) and the weights ``(B, H, Tk)`` fp32, 0 where
            masked.

    Raises:
        ValueError: inside, for an implementation that shows no weights; on leaving, where no attention was seen.
    """
    from softpick.integrations.transformers import intercept_attention

    model = getattr(model, "_orig_mod", model)  # of torch.compile
    layers = seen = 0

    def around(name: str, function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            nonlocal layers, seen
            result = function(module, query, key, value, attention_mask, **kwargs)
            call = _Call(name, function, eager, module, query, key, value, attention_mask, kwargs)
            on_row(layers, _last_row(call))
            layers += 1
            seen += 1
            return result

        return attention

    def begin(module: nn.Module, inputs: Any) -> None:
        nonlocal layers
        layers = 0

    handle = model.register_forward_pre_hook(begin)
    try:
        with intercept_attention(model, around):
            yield
    finally:
        handle.remove()
    if seen == 0:
        raise ValueError(
            f"no attention layers were seen in {type(model).__name__}: expected a transformers model whose attention goes "
            "through AttentionInterface"
        )
