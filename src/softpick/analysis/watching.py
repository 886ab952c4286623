"""Watch a model run: every call of its attention functions, and the residual stream behind every layer.

Every attention module of transformers asks ``AttentionInterface.get_interface`` for its function at every call. While
a model is watched, that method hands the modules *of this model* the same function in a wrapper, which passes the true
weights on as soon as the layer has run: no second forward pass, no list of maps, and nothing of the model is touched
but its training flags, which are put back.

- ``eager`` returns its weights. Those of half-precision models are computed once more in fp32.
- ``sdpa`` returns none: the model continues with the output of ``sdpa``, and the weights come from the eager function
  of the same model file, in fp32, from the same queries, keys and mask.
- any other registered function (softpick's) is called with ``output_attentions=True`` and must return weights.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softpick.analysis.calls import GATE, LOWEST, PARTS, Call, SeenAttention, fp32_weights, report
from softpick.normalizers import visible

__all__ = ["is_encoder_decoder", "parts_of", "watch", "watch_last_query"]


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model has an encoder, and a decoder that attends to it.

    Args:
        model: of transformers.
    """
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def parts_of(model: Any) -> tuple[str, ...]:
    """The parts of a model that are measured, each by itself: :data:`PARTS` of an encoder-decoder, else one without a name.

    Args:
        model: of transformers.
    """
    return PARTS if is_encoder_decoder(model) else ("",)


class _Sources:
    """Tells which part of an encoder-decoder an attention module computes for, from what it is given.

    Cross-attention is where a module of the decoder gets the tensor that the decoder was given as ``encoder_hidden_states``.
    """

    def __init__(self, model: Any) -> None:
        self.encoder, self.decoder = model.get_encoder(), model.get_decoder()
        if self.encoder is self.decoder or model in (self.encoder, self.decoder):
            raise ValueError(f"model: cannot tell encoder and decoder of {type(model).__name__} apart")
        self.inside = {id(module) for module in self.encoder.modules()}
        self.names = list(inspect.signature(self.decoder.forward).parameters)
        self.given: Any = None
        self.crossing: dict[int, bool] = {}

    def hooks(self) -> Iterator[Any]:
        """Hooks that watch what the decoder and its modules are given."""
        yield self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        for module in self.decoder.modules():
            if module is not self.decoder:
                yield module.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.given = (dict(zip(self.names, args, strict=False)) | kwargs).get("encoder_hidden_states")

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.crossing[id(module)] = self.given is not None and any(x is self.given for x in (*args, *kwargs.values()))

    def part(self, module: nn.Module) -> str:
        """Of :data:`PARTS`."""
        if id(module) in self.inside:
            return "encoder"
        return "cross-attention" if self.crossing.get(id(module)) else "decoder"


class _Watch:
    """The hooks of :func:`watch`, and how far they are in a forward pass.

    A layer is what a ModuleList holds and an attention module runs in; the outermost such list counts.
    """

    def __init__(
        self,
        model: nn.Module,
        on_attention: Callable[[SeenAttention], None],
        on_hidden: Callable[[int, Tensor, str], None],
        on_output: Callable[[Any], None] | None,
    ) -> None:
        self.name = type(model).__name__
        self.on_attention, self.on_hidden, self.on_output = on_attention, on_hidden, on_output
        self.sources = _Sources(model) if is_encoder_decoder(model) else None
        # a vocabulary's logits are computed only for who wants them
        body: Any = model.base_model if on_output is None and _has_head(model) else model
        self.body = body
        self.lists = {id(child): number for number, held in enumerate(_lists(body)) for child in held}
        # of each list: its modules that ran, with attention or not
        self.kinds: dict[int, list[tuple[nn.Module, bool]]] = {}
        self._restart()

    def _restart(self) -> None:
        self.depth = 0
        self.layers: Counter[str] = Counter()
        self.hidden_seen: Counter[str] = Counter()
        self.in_layer: Counter[str] = Counter()
        self.kinds.clear()

    def hooks(self) -> Iterator[Any]:
        """Hooks on the layers."""
        for child in {id(child): child for held in _lists(self.body) for child in held}.values():
            yield child.register_forward_pre_hook(self.enter)
            yield child.register_forward_hook(self.leave)
        if self.sources is not None:
            yield from self.sources.hooks()

    def around(self, name: str, function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        """The attention function that a module of the model calls instead of ``function``."""

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            part = "" if self.sources is None else self.sources.part(module)
            call = Call(name, function, eager, module, query, key, value, attention_mask, kwargs, part)
            output = report(call, self.layers[part], self.on_attention)
            self.layers[part] += 1
            self.in_layer[part] += 1
            return output, None

        return attention

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Before a module of a list runs."""
        self.depth += 1
        if self.depth == 1:
            self.in_layer.clear()

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """After a module of a list: report the residual stream behind a layer."""
        self.depth -= 1
        if self.depth:
            return
        self.kinds.setdefault(self.lists[id(module)], []).append((module, bool(self.in_layer)))
        own = [part for part in self.in_layer if part != "cross-attention"]
        most = max(self.in_layer.values(), default=0)
        if most > 1 or len(own) > 1:
            raise ValueError(
                f"{type(module).__name__}: expected one self-attention a layer, saw {sum(self.in_layer[part] for part in own)}"
            )
        for part in own:
            self.on_hidden(self.layers[part] - 1, output if isinstance(output, Tensor) else output[0], part)
            self.hidden_seen[part] += 1

    def run(self, inputs: dict[str, Any]) -> None:
        """One forward pass."""
        self._restart()
        with torch.no_grad():
            if self.on_output is None:
                self.body(**inputs)
            else:
                self.on_output(self.body(**inputs, use_cache=False))
        for part in ("",) if self.sources is None else PARTS:
            layers, hidden = self.layers[part], self.hidden_seen[part]
            if layers and (hidden == layers or part == "cross-attention"):
                continue
            where = f"the {part} of {self.name}" if part else self.name
            what = f"{hidden} layers for {layers} attentions" if layers else "no attention layers were seen"
            raise ValueError(
                f"model: {what} in {where}: expected a transformers model whose attention goes through "
                "AttentionInterface, in layers held by a ModuleList"
            )

    def without_attention(self) -> list[str]:
        """Sentences about the layers of the last pass, beside those with attention, in which none was seen."""
        sentences = []
        for layers in self.kinds.values():
            bare = [i for i, (_, attends) in enumerate(layers) if not attends]
            if not bare or len(bare) == len(layers):
                continue
            known = {type(child) for layer, attends in layers if attends for child in layer.children()}
            mixers = {
                type(child).__name__: None
                for i in bare
                for child in layers[i][0].children()
                if type(child) not in known
            }
            what = ", ".join(mixers) or type(layers[bare[0]][0]).__name__
            sentences.append(
                f"{len(bare)} of {len(layers)} layers have no attention and are not measured ({what}): {ranges(bare)}"
            )
        return sentences


def ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: ``0 to 2, 4``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)


def _lists(body: nn.Module) -> list[nn.ModuleList]:
    return [module for module in body.modules() if isinstance(module, nn.ModuleList)]


def _has_head(model: Any) -> bool:
    embeddings = getattr(model, "get_output_embeddings", None)
    return embeddings is not None and embeddings() is not None


@contextmanager
def watch(
    model: nn.Module,
    on_attention: Callable[[SeenAttention], None],
    on_hidden: Callable[[int, Tensor, str], None] = lambda layer, hidden, part: None,
    on_rest: Callable[[list[str]], None] = lambda sentences: None,
    on_output: Callable[[Any], None] | None = None,
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that runs the model once on a dict of its arguments and reports every layer.

    Args:
        model: as for :func:`softpick.analysis.measure`.
        on_attention: called with what the attention of a layer did, once or for some samples and heads after others.
        on_hidden: called with the layer (from 0), the residual stream ``(B, T, C)`` behind it, and the part of the model.
        on_rest: called after a pass with sentences about layers in which no attention was seen.
        on_output: called with what the model returns; None computes no logits. Of models with a head only.

    Everything is restored on leaving.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("measuring a model needs transformers: pip install 'softpick[transformers]'") from error

    from softpick.integrations.transformers import intercept_attention

    model = getattr(model, "_orig_mod", model)  # of torch.compile
    watching = _Watch(model, on_attention, on_hidden, on_output)
    training = [(m, m.training) for m in model.modules()]
    handles: list[Any] = []

    def run(inputs: dict[str, Any]) -> None:
        watching.run(inputs)
        on_rest(watching.without_attention())

    try:
        for handle in watching.hooks():
            handles.append(handle)
        model.eval()
        with intercept_attention(model, watching.around):
            yield run
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode


def _last_row(call: Call) -> Tensor:
    """The weights ``(B, H, Tk)`` of a call's last query, fp32, 0 where masked."""
    query, key, mask = call.query, call.key, call.mask
    see = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise ValueError(f"expected a mask (B, 1, Tq, Tk) or none, got {type(mask).__name__}")
        mask = mask[..., -1:, : key.shape[2]]
        see = visible(mask)
        if call.name == "sdpa" and mask.dtype == torch.bool:  # eager functions add their mask
            mask = torch.zeros(mask.shape, device=query.device).masked_fill_(~mask, LOWEST)
    elif query.shape[2] not in (1, key.shape[2]):
        raise ValueError(f"expected a mask for {query.shape[2]} queries and {key.shape[2]} keys")
    # one query without a mask sees every key; a gate and positions change no weights
    kwargs = {k: v for k, v in call.asking.items() if k not in (GATE, "position_ids")}
    function = call.eager if call.name == "sdpa" else call.function
    weights = fp32_weights(function, (call.module, query[:, :, -1:], key, call.value, mask), kwargs)
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
        model: as for :func:`softpick.analysis.measure`.
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
            call = Call(name, function, eager, module, query, key, value, attention_mask, kwargs)
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
