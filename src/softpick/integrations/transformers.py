"""Every normalizer as an ``attn_implementation`` of Hugging Face transformers 5.

Importing this module is all that is needed::

    import softpick.integrations.transformers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="softpick")

It registers (:func:`register`) an attention function and sdpa's boolean mask for each name of ``softpick.NORMALIZERS``,
makes saved configurations remember the choice, and registers the ``softpick_llama`` model type with the Auto classes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softpick.functional import AttentionOutput, scaled_dot_product_attention, varlen_attention
from softpick.normalizers import NORMALIZERS, Normalizer, get_normalizer, visible

try:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.masking_utils import sdpa_mask
    from transformers.utils import output_capturing
except ImportError as error:
    raise ImportError(
        "softpick.integrations.transformers needs transformers 5.17 or newer: pip install 'softpick[transformers]'"
    ) from error

from softpick.integrations import checkpoints
from softpick.integrations.softpick_llama import (
    SoftpickLlamaConfig,
    SoftpickLlamaForCausalLM,
    SoftpickLlamaForSequenceClassification,
    SoftpickLlamaModel,
    SoftpickLlamaPreTrainedModel,
)

__all__ = [
    "IMPLEMENTATIONS",
    "SoftpickLlamaConfig",
    "SoftpickLlamaForCausalLM",
    "SoftpickLlamaForSequenceClassification",
    "SoftpickLlamaModel",
    "SoftpickLlamaPreTrainedModel",
    "attention_forward",
    "intercept_attention",
    "make_attention_function",
    "normalizer_of",
    "register",
]

IMPLEMENTATIONS: tuple[str, ...] = tuple(NORMALIZERS)
"""The names that :func:`register` registers: those of ``softpick.NORMALIZERS``."""

# What models pass through to attention and what cannot change its result, because it is not about attention or has
# already gone into the mask (cache_position, position_embeddings, token_type_ids) or the kernel choice.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "return_dict",
        "seq_idx",
        "token_type_ids",
        "use_cache",
    }
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    *,
    normalizer: str | Normalizer = "softpick",
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    score_scale: Tensor | None = None,
    output_gate: Tensor | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for one attention layer, for any normalizer.

    Without a mask, more than one query sees keys causally (query ``i`` keys up to ``i``, also where a static cache has
    more keys) if ``is_causal``, and packed sequences only themselves; a single query sees every key.

    Args:
        module: the attention layer; its ``is_causal`` is the default of that argument.
        query: ``(B, H, Tq, D)``.
        key: ``(B, Hkv, Tk, D)``, ``H`` a multiple of ``Hkv``.
        value: ``(B, Hkv, Tk, Dv)``.
        attention_mask: broadcastable to ``(B, H, Tq, Tk)``: boolean (True takes part) or added to the scores; or None.
        scaling: factor on the scores; ``1 / sqrt(D)`` if None.
        dropout: probability with which a weight is dropped.
        is_causal: see above; True if neither this nor the module says otherwise, as for ``sdpa``.
        output_attentions: also return the weights (full matrix in memory). Done too while the model records attentions.
        normalizer: a name of ``softpick.NORMALIZERS`` or a record of it.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: ``(H,)`` sink logits, required by ``learned_sink`` and forbidden for all others.
        score_scale: ``(H,)``; scores are multiplied by ``score_scale * log n``, ``n`` the number of keys a query may see.
        output_gate: ``(B, Tq, H, Dv)``; the output is multiplied by its sigmoid.
        sliding_window: the window that is in the mask already.
        position_ids: ``(B or 1, Tq)``; a 0 after the first place starts a new packed sequence (only used without
            compilation, for as many keys as queries, where the mask is None or nothing but the sliding window).
        cu_seq_lens_q: ``(N + 1,)`` starts of packed sequences and their end among the ``B Tq`` tokens of the batch, row
            after row, without a mask; none crosses a row. Causal ones never become a mask (softpick.varlen_attention).
        cu_seq_lens_k: the same; must equal ``cu_seq_lens_q``.
        kwargs: what models pass along without meaning for attention (or already in the mask), or None.

    Returns:
        ``(B, Tq, H, Dv)`` contiguous in the query's dtype, and the weights ``(B, H, Tq, Tk)`` before dropout in the
        query's dtype, or None if not asked for.

    Raises:
        ValueError: for an argument that would change the result and is not supported, for a sink missing or in excess,
            and whatever :func:`softpick.scaled_dot_product_attention` rejects.
    """
    norm = get_normalizer(normalizer)
    unsupported = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
    if unsupported:
        raise ValueError(
            f"{', '.join(unsupported)}: not supported by attn_implementation={norm.name!r}, but "
            f"{type(module).__name__} passes it and ignoring it could change the result"
        )
    sink = _sink(module, norm, s_aux)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    output_attentions = bool(output_attentions) or _attentions_recorded()
    tq, tk = query.shape[2], key.shape[2]
    given = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    if (
        given
        and attention_mask is None
        and is_causal
        and not (output_attentions or sliding_window)
        and score_scale is None
    ):
        cu_q, cu_k = _offsets(query, tk, cu_seq_lens_q, cu_seq_lens_k)
        longest = int(kwargs.get("max_length_q") or tq)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = varlen_attention(
            q, k, v, cu_q, cu_k, longest, longest, dropout, scaling, True, normalizer=norm, softcap=softcap, sink=sink
        )
        assert isinstance(out, Tensor)
        out = out.unflatten(0, (-1, tq))
        return out if output_gate is None else out * torch.sigmoid(output_gate), None
    attention_mask = _keep_packed_apart(
        attention_mask, query, tk, bool(is_causal), sliding_window, position_ids, cu_seq_lens_q, cu_seq_lens_k
    )
    # Without a mask transformers means: full attention for one query (decoding), else causal from the top left, also
    # when a still empty static cache has more keys than there are queries. The order keeps the result a plain bool.
    causal = bool(is_causal) and attention_mask is None and tq > 1
    if causal and tk > tq and not output_attentions:
        key, value = key[:, :, :tq], value[:, :, :tq]  # the rest is the unwritten part of a static cache
    if score_scale is not None:
        logs = _visible_keys(attention_mask, tq, key.shape[2], causal, query.device).clamp(min=1).log()
        query = (query * (score_scale.view(-1, 1, 1) * logs[..., None])).to(query.dtype)

    result = scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        normalizer=norm,
        softcap=softcap,
        sink=sink,
        return_weights=output_attentions,
    )
    if isinstance(result, AttentionOutput):
        out, weights = result.output, result.weights
    else:
        out, weights = result, None
    out = out.transpose(1, 2).contiguous()
    if output_gate is not None:
        out = out * torch.sigmoid(output_gate)
    return out, None if weights is None else weights.to(query.dtype)


def make_attention_function(normalizer: str | Normalizer) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of one normalizer, as ``AttentionInterface.register`` wants it.

    Args:
        normalizer: a name of ``softpick.NORMALIZERS`` or a record of it.

    Returns:
        :func:`attention_forward` with that normalizer.

    Raises:
        ValueError: for an unknown name.
    """
    norm = get_normalizer(normalizer)

    @functools.wraps(attention_forward)
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return attention_forward(*args, normalizer=norm, **kwargs)

    attention.__name__ = attention.__qualname__ = f"{norm.name}_attention_forward"
    return attention


def normalizer_of(config_or_model: Any) -> str:
    """Name of the normalizer with which a model (or a model of this configuration) computes attention.

    Args:
        config_or_model: a transformers model or configuration; of a composite one its text decoder counts.

    Returns:
        A name of ``softpick.NORMALIZERS``; for transformers' own implementations (eager, sdpa, flash, flex, or none
        chosen yet) ``"softmax"``, or ``"learned_sink"`` for models which keep a sink of their own (gpt-oss).

    Raises:
        TypeError: for anything without a transformers configuration.
        ValueError: for an implementation that somebody else registered.
    """
    config = getattr(config_or_model, "config", config_or_model)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"config_or_model: expected a transformers model or configuration, got {type(config_or_model).__name__}"
        )
    config = config.get_text_config(decoder=True)
    name = config._attn_implementation
    if name is None and isinstance(config, SoftpickLlamaConfig):
        name = config.normalizer
    if name in NORMALIZERS:
        return name
    name = (name or "sdpa").removeprefix("paged|")
    if name not in ("eager", "sdpa") and "flash" not in name and "flex" not in name:
        raise ValueError(
            f"config_or_model: cannot tell the normalizer of attn_implementation={name!r}; "
            f"expected eager, sdpa, flash, flex or one of {', '.join(IMPLEMENTATIONS)}"
        )
    return "learned_sink" if config.model_type in checkpoints.KEEP_A_SINK else "softmax"


def register() -> None:
    """Register every normalizer with transformers under its own name. Importing this module has done it; repeatable.

    Besides the attention functions and masks this teaches configurations to save the choice: a ``config.json`` written by
    a model that runs a normalizer of ours has an entry ``attn_implementation``. transformers reads that entry (an argument
    at load wins over it, unless it is None) and refuses to load the model where the name is not registered. And models
    that compute softmax by themselves, whatever the implementation, refuse ours.
    """
    for name in IMPLEMENTATIONS:
        AttentionInterface.register(name, make_attention_function(name))
        AttentionMaskInterface.register(name, sdpa_mask)
    if not hasattr(PreTrainedConfig.to_dict, "_softpick"):
        PreTrainedConfig.to_dict = _remember_choice(PreTrainedConfig.to_dict)
        PreTrainedModel.get_correct_attn_implementation = _never_softmax_silently(
            PreTrainedModel.get_correct_attn_implementation
        )
    checkpoints.install()
    AutoConfig.register(SoftpickLlamaConfig.model_type, SoftpickLlamaConfig, exist_ok=True)
    AutoModel.register(SoftpickLlamaConfig, SoftpickLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(SoftpickLlamaConfig, SoftpickLlamaForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        SoftpickLlamaConfig, SoftpickLlamaForSequenceClassification, exist_ok=True
    )


@contextmanager
def intercept_attention(
    model: nn.Module, around: Callable[[str, Callable[..., Any], Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While open, the attention layers of one model call another function than the one they ask transformers for.

    Args:
        model: whose layers; those of others call what they asked for.
        around: given the name of an implementation (``"eager"`` where none is named), its function and the layer's own eager
            function, returns what is called instead, with the same arguments.
    """
    mine = {id(module) for module in model.modules()}
    original = AttentionInterface.get_interface

    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = original(self, attn_implementation, default)
        instead = around(attn_implementation or "eager", function, default)

        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (instead if id(module) in mine else function)(module, *args, **kwargs)

        return attention

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original


def _remember_choice(to_dict: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """``PreTrainedConfig.to_dict`` that does not drop the attention implementation if it is one of ours.

    The key is the one that the constructor of a configuration takes, so nothing has to be done on loading. The second
    key survives an explicit ``attn_implementation=None``, which training libraries pass to mean "not chosen".
    """

    @functools.wraps(to_dict)
    def wrapper(self: Any) -> dict[str, Any]:
        output = to_dict(self)
        output.pop(_SECOND_KEY, None)
        chosen = _chosen(self)
        if chosen is not None:
            output["attn_implementation"] = chosen
        if self._attn_implementation in NORMALIZERS:
            output[_SECOND_KEY] = self._attn_implementation
        return output

    wrapper._softpick = True  # type: ignore[attr-defined]
    return wrapper


_SECOND_KEY = "softpick_normalizer"


def _never_softmax_silently(check: Callable[..., str]) -> Callable[..., str]:
    """``PreTrainedModel.get_correct_attn_implementation`` that takes a saved normalizer before transformers' default.

    It also refuses our names for models without AttentionInterface, for which transformers accepts any registered name
    and goes on computing softmax.
    """

    @functools.wraps(check)
    def wrapper(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention is None:
            requested_attention = getattr(self.config, _SECOND_KEY, None)
        if requested_attention in NORMALIZERS and not (
            self._supports_attention_backend or self._can_set_attn_implementation()
        ):
            raise ValueError(
                f"attn_implementation: {type(self).__name__} does not use transformers' AttentionInterface; it would "
                f"compute softmax instead of {requested_attention!r}"
            )
        return check(self, requested_attention, *args, **kwargs)

    return wrapper


def _chosen(config: Any) -> str | dict[str, Any] | None:
    """The implementation to save: a name of ours, a dictionary where the parts of a composite model differ, or None."""
    own = config._attn_implementation if config._attn_implementation in NORMALIZERS else None
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    chosen = {key: _chosen(part) for key, part in parts.items() if isinstance(part, PreTrainedConfig)}
    if all(part == own for part in chosen.values()):
        return own
    # a name would be handed down to every part, so name each: None leaves a part to transformers' default
    return {"": own, **chosen}


def _attentions_recorded() -> bool:
    """Whether the model that is running records attention weights.

    Some models (GPT-2, OPT) keep ``output_attentions`` from their layers and only record what those return; then the
    recorder is where it can be seen. It is private to transformers, so its absence costs those models' weights, no more.
    """
    recorder = getattr(output_capturing, "_active_collector", None)
    if recorder is None:
        return False
    # context variables cannot be traced; while compiling the recorder keeps its state in an attribute
    recorded = recorder.global_var if torch.compiler.is_compiling() else recorder.get()
    return any(name.endswith("attentions") for name in recorded or ())


def _sink(module: nn.Module, norm: Normalizer, s_aux: Tensor | None) -> Tensor | None:
    if norm.needs_sink and s_aux is None:
        raise ValueError(
            f"s_aux: attn_implementation={norm.name!r} needs one sink logit a head, but {type(module).__name__} has "
            "none; use a model that keeps sinks (gpt-oss) or SoftpickLlamaConfig(normalizer='learned_sink')"
        )
    if not norm.needs_sink and s_aux is not None:
        raise ValueError(
            f"s_aux: {type(module).__name__} keeps learned sinks, which attn_implementation={norm.name!r} would ignore; "
            "only 'learned_sink' takes them"
        )
    return s_aux


def _offsets(query: Tensor, tk: int, cu_q: Tensor | None, cu_k: Tensor | None) -> tuple[Tensor, Tensor]:
    tq = query.shape[2]
    if cu_q is None or cu_k is None or tq != tk or cu_q.shape != cu_k.shape:
        raise ValueError(
            "cu_seq_lens_q, cu_seq_lens_k: expected both, equal, with as many keys as queries; got "
            f"{'none' if cu_q is None else tuple(cu_q.shape)}, {'none' if cu_k is None else tuple(cu_k.shape)}, {tq} queries, "
            f"{tk} keys"
        )
    return cu_q, cu_k


def _keep_packed_apart(
    mask: Tensor | None,
    query: Tensor,
    tk: int,
    is_causal: bool,
    sliding_window: int | None,
    position_ids: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
) -> Tensor | None:
    """The mask (of None: the causal one) without what packed sequences would see of one another.

    Untouched if nothing is packed. transformers itself puts restarting positions into its masks, but only where no
    cache is in use, and leaves ``cu_seq_lens`` to the flash kernels. A mask which is not transformers' plain one says
    already who sees whom.
    """
    batch, tq = query.shape[0], query.shape[2]
    if (cu_q is not None or cu_k is not None) and mask is None:
        cu_q, _ = _offsets(query, tk, cu_q, cu_k)
        tokens = torch.arange(batch * tq, device=query.device)
        sequence = torch.searchsorted(cu_q.to(query.device), tokens, right=True).view(batch, tq)
    elif (
        is_causal and tq == tk > 1 and position_ids is not None and tuple(position_ids.shape) in ((1, tq), (batch, tq))
    ):
        # reading values would break a compiled graph; there one packs with use_cache=False, and gets a mask
        if torch.compiler.is_compiling() or not _restarts(position_ids):
            return mask
        if mask is not None and not _is_plain_window(mask, tq, sliding_window):
            return mask
        sequence = (position_ids == 0).cumsum(-1)
    else:
        return mask
    apart = (sequence[:, :, None] == sequence[:, None, :])[:, None]
    if mask is not None:
        return mask & apart
    return apart.tril() if is_causal else apart


def _is_plain_window(mask: Tensor, t: int, sliding_window: int | None) -> bool:
    """Whether a mask is the causal sliding window of ``t`` queries and keys and nothing else."""
    if sliding_window is None or mask.dtype != torch.bool or tuple(mask.shape[-2:]) != (t, t):
        return False
    window = torch.ones(t, t, dtype=torch.bool, device=mask.device).tril().triu(1 - sliding_window)
    return bool((mask == window).all())


_last_positions: tuple[weakref.ref[Tensor], int, bool] | None = None


def _restarts(position_ids: Tensor) -> bool:
    """Whether a position 0 follows another one.

    Reading it waits for the device, and all layers of a model ask about one tensor: the last answer is remembered.
    """
    global _last_positions
    last, version = _last_positions, -1 if position_ids.is_inference() else position_ids._version
    if last is not None and version >= 0 and last[0]() is position_ids and last[1] == version:
        return last[2]
    answer = bool((position_ids[:, 1:] == 0).any())
    _last_positions = (weakref.ref(position_ids), version, answer)
    return answer


def _visible_keys(mask: Tensor | None, tq: int, tk: int, causal: bool, device: torch.device) -> Tensor:
    """How many keys each query may see, fp32, broadcastable to ``(B, H, Tq)``."""
    if mask is None:
        counts = torch.arange(1, tq + 1, device=device) if causal else torch.full((tq,), tk, device=device)
        return counts.float()
    keep = visible(mask)
    return keep.expand(*keep.shape[:-1], tk).sum(-1).float()


register()
