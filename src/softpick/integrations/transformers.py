"""Every normalizer as an ``attn_implementation`` of Hugging Face transformers 5.

Importing this module is all that is needed::

    import softpick.integrations.transformers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="softpick")

It registers (:func:`register`) an attention function and sdpa's boolean mask for each name of ``softpick.NORMALIZERS``,
makes saved configurations remember the choice, and registers the ``softpick_llama`` model type with the Auto classes. A
:class:`softpick.Normalizer` of your own is given in the place of a name; its ``text`` is its name here, and is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softpick.functional import AttentionOutput, scaled_dot_product_attention
from softpick.nn.attention import scaled_by_length, visible_keys
from softpick.normalizers import NORMALIZERS, Normalizer, get_normalizer, is_normalizer

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
    from transformers.utils import output_capturing
except ImportError as error:
    raise ImportError(
        "softpick.integrations.transformers needs transformers 5.17 or newer: pip install 'softpick[transformers]'"
    ) from error

from softpick.integrations import checkpoints
from softpick.integrations.patches import original, replace, replaced
from softpick.integrations.softpick_llama import (
    SoftpickLlamaConfig,
    SoftpickLlamaForCausalLM,
    SoftpickLlamaForSequenceClassification,
    SoftpickLlamaModel,
    SoftpickLlamaPreTrainedModel,
)
from softpick.integrations.transformers_fp8 import Fp8Cache, attend_fp8, dequantized, in_fp8
from softpick.integrations.transformers_layers import (
    KIND_OF_MASKS,
    WITH_WINDOWS,
    attention_mask,
    passed_to_everybody,
    prepare,
)
from softpick.integrations.transformers_packing import (
    apart,
    attend_packed,
    check_offsets,
    check_restarts,
    chunk_of,
    find_packing,
    masked,
    packed_in_masks,
)
from softpick.integrations.transformers_saving import SECOND_KEY, remember_choice, with_every_choice
from softpick.integrations.transformers_serving import attend_paged, install, is_paged, without_paged

__all__ = [
    "IMPLEMENTATIONS",
    "Fp8Cache",
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

# What attention layers pass and what has gone into the mask, the positions or the choice of a kernel already.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "position_embeddings",
        "return_dict",
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
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | dict[str, Tensor] | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for one attention layer, for any normalizer.

    Without a mask, more than one query sees keys causally (query ``i`` keys up to ``i``, also where a static cache has
    more keys) if ``is_causal``, and within the sliding window; a single query sees every key. Packed sequences see only
    themselves, with and without a mask.

    Args:
        module: the attention layer; its ``is_causal`` is the default of that argument.
        query: ``(B, H, Tq, D)``.
        key: ``(B, Hkv, Tk, D)``, ``H`` a multiple of ``Hkv``.
        value: ``(B, Hkv, Tk, Dv)``.
        attention_mask: broadcastable to ``(B, H, Tq, Tk)``: boolean (True takes part) or added to the scores; or None.
        scaling: factor on the scores; ``1 / sqrt(D)`` if None.
        dropout: probability with which a weight is dropped.
        is_causal: see above; the module's own if None. A module that says nothing is causal, as for ``sdpa``, unless its
            model computes with eager's masks, where no mask means that every key is seen.
        output_attentions: also return the weights (full matrix in memory). Done too while the model records attentions.
        normalizer: a name of ``softpick.NORMALIZERS`` or a record of it.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: ``(H,)`` sink logits, required by ``learned_sink`` and forbidden for all others.
        score_scale: ``(H,)``; scores are multiplied by ``score_scale * log n``, ``n`` the number of keys a query may see.
        output_gate: ``(B, Tq, H, Dv)``; the output is multiplied by its sigmoid.
        sliding_window: tokens that a query sees, its own included (on both sides if not causal). Used without a mask, for
            packed sequences and for models whose masks were left out because their layers give the window; elsewhere the
            mask has the window in it.
        position_bias: broadcastable to ``(B, H, Tq, Tk)``, added to the scores; receives a gradient.
        position_ids: ``(B or 1, Tq)``; a 0 after the first token starts a new packed sequence of a causal layer, or of one
            whose mask is causal, for as many keys as queries. Not read while compiling: there the model's mask holds it.
        cu_seq_lens_q: ``(N + 1,)`` starts of packed sequences and their end among the ``B Tq`` tokens of the batch, row
            after row; none crosses a row. Without a mask or a bias they never become a mask (softpick.varlen_attention).
        cu_seq_lens_k: the same; must equal ``cu_seq_lens_q``, but in continuous batching (:func:`attend_paged`).
        max_length_q: the longest packed sequence, if it is known.
        kwargs: what models pass along without meaning for attention (for losses and outputs, or already in the mask), or None.

    Returns:
        ``(B, Tq, H, Dv)`` contiguous in the query's dtype, and the weights ``(B, H, Tq, Tk)`` before dropout in the
        query's dtype, or None if not asked for.

    Raises:
        ValueError: for an argument that would change the result and is not supported, for a sink missing or in excess,
            and whatever :func:`softpick.scaled_dot_product_attention` rejects.
    """
    norm = normalizer if isinstance(normalizer, Normalizer) else get_normalizer(normalizer)
    paged = is_paged(kwargs)
    _check_arguments(module, norm, without_paged(kwargs) if paged else kwargs)
    sink = _sink(module, norm, s_aux)
    is_causal = _is_causal(module, is_causal)
    output_attentions = bool(output_attentions) or _attentions_recorded()
    options: dict[str, Any] = {"scaling": scaling, "normalizer": norm, "softcap": softcap, "sink": sink}
    options |= {"score_scale": score_scale}
    if paged:
        refused = {"output_attentions": output_attentions or None, "attention_mask": attention_mask}
        _check_paged(module, position_bias=position_bias, **refused)
        options |= {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k, "max_length_q": max_length_q}
        options |= {"sliding_window": sliding_window, "output_gate": output_gate}
        return attend_paged(module, query, key, value, kwargs, **options), None
    if in_fp8(key):  # of one query, by Fp8Cache
        if attention_mask is None and position_bias is None and not output_attentions and not dropout:
            out = attend_fp8(query, key, **options)
            return (out if output_gate is None else out * torch.sigmoid(output_gate)), None
        key, value = dequantized(key, query.dtype)
    assert not isinstance(cu_seq_lens_k, dict), "offsets by type of layer come from continuous batching"
    batch, _, tq, _ = query.shape
    packed = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    if tq > 1 and not packed:
        check_offsets(module, is_causal, attention_mask)
        check_restarts(module, tq, key.shape[2], is_causal, attention_mask)
    # Without a mask transformers means: full attention for one query (decoding), else causal from the top left, also
    # when a still empty static cache has more keys than there are queries. The order keeps the result a plain bool.
    causal = is_causal and attention_mask is None and tq > 1
    if causal and key.shape[2] > tq and not output_attentions:
        key, value = key[:, :, :tq], value[:, :, :tq]  # the rest is the unwritten part of a static cache
        position_bias = None if position_bias is None else position_bias[..., :tq]
    window = None
    if attention_mask is None and tq > 1 and (packed or _leaves_windows_to_layers(module)):
        window = _window(sliding_window, is_causal)
    packing = find_packing(
        batch, tq, key.shape[2], position_ids, cu_seq_lens_q, cu_seq_lens_k, max_length_q, is_causal, attention_mask
    )
    options |= {"window": window, "dropout": dropout}
    if packing is not None and attention_mask is None and position_bias is None and not output_attentions:
        out, weights = attend_packed(query, key, value, packing, is_causal=is_causal, **options), None
    else:
        if packing is not None:  # then its mask holds what is causal and the window
            attention_mask = apart(attention_mask, packing, is_causal, window, chunk_of(module))
            causal, options["window"] = False, None
        options |= {"is_causal": causal, "return_weights": output_attentions}
        out, weights = _attend_dense(query, key, value, attention_mask, position_bias, **options)
    return out if output_gate is None else out * torch.sigmoid(output_gate), weights


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    """As the layer says, or its module; a module that says nothing is causal unless its model computes with eager's masks."""
    default = getattr(module, "is_causal", KIND_OF_MASKS.get(type(getattr(module, "config", None))) != "eager")
    return bool(default if given is None else given)


def _leaves_windows_to_layers(module: nn.Module) -> bool:
    """Whether a model leaves out masks because its layers give the window; elsewhere no mask means that it reaches all keys."""
    return bool(WITH_WINDOWS.get(type(getattr(module, "config", None)), False))


def _window(tokens: int | None, is_causal: bool) -> tuple[int, int] | None:
    """The keys before and after a query, from the tokens that it sees, itself included."""
    return (tokens - 1, 0 if is_causal else tokens - 1) if tokens else None


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    is_causal: bool,
    window: tuple[int, int] | None,
    score_scale: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of whole sequences: the output as ``(B, Tq, H, Dv)`` and the weights in the query's dtype, or None."""
    if score_scale is not None:
        sizes = query.shape[2], key.shape[2]
        n = visible_keys(*sizes, attn_mask=mask, is_causal=is_causal, window=window, device=query.device)
        query = scaled_by_length(query, score_scale, n)
    mask = _with_bias(mask, bias, query.dtype)
    options |= {"enable_gqa": query.shape[1] != key.shape[1], "window": window}
    result: Any = scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scaling, **options)
    found = result if isinstance(result, AttentionOutput) else AttentionOutput(result)
    return found.output.transpose(1, 2).contiguous(), None if found.weights is None else found.weights.to(query.dtype)


def _with_bias(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask and a bias that is added to the scores, as one mask."""
    if bias is None or mask is None:
        return mask if bias is None else bias.to(dtype)
    return masked(bias.to(dtype), mask) if mask.dtype == torch.bool else bias.to(dtype) + mask


def _check_arguments(module: nn.Module, norm: Normalizer, given: dict[str, Any]) -> None:
    unsupported = [
        name
        for name, value in given.items()
        if value is not None and name not in _HARMLESS and not passed_to_everybody(type(module), name)
    ]
    if unsupported:
        raise ValueError(
            f"{', '.join(unsupported)}: not supported by attn_implementation={norm.name!r}, but "
            f"{type(module).__name__} passes it and ignoring it could change the result"
        )


def _check_paged(module: nn.Module, **given: Any) -> None:
    unsupported = [name for name, value in given.items() if value is not None]
    if unsupported:
        raise ValueError(
            f"{', '.join(unsupported)}: continuous batching (generate_batch) does not take it, but {type(module).__name__} "
            "passes it; call model.generate"
        )


def make_attention_function(normalizer: str | Normalizer) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of one normalizer, as ``AttentionInterface.register`` wants it.

    Args:
        normalizer: a name of ``softpick.NORMALIZERS`` or a record of it.

    Returns:
        :func:`attention_forward` with that normalizer.

    Raises:
        ValueError: for an unknown name.
    """
    record = get_normalizer(normalizer)

    @functools.wraps(attention_forward)
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return attention_forward(*args, normalizer=record, **kwargs)

    attention.__name__ = attention.__qualname__ = f"{record.name}_attention_forward"
    return attention


def normalizer_of(config_or_model: Any) -> str:
    """Name of the normalizer with which a model (or a model of this configuration) computes attention.

    Args:
        config_or_model: a transformers model or configuration; of a composite one its text decoder counts.

    Returns:
        A name of ``softpick.NORMALIZERS``, or the ``text`` of a record of your own; for transformers' own implementations
        (eager, sdpa, flash, flex, or none chosen yet) ``"softmax"``, or ``"learned_sink"`` for models which keep a sink of
        their own (gpt-oss).

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
    if is_normalizer(name):
        return str(name)
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
        _register(name)
    if not getattr(PreTrainedConfig.to_dict, "_softpick", False):
        for target, wrap in (
            ("transformers:PreTrainedConfig.to_dict", remember_choice),
            ("transformers:PreTrainedConfig._attn_implementation", _named_by_text),
            ("transformers:PreTrainedModel.get_correct_attn_implementation", _never_softmax_silently),
            ("transformers:PreTrainedModel.set_attn_implementation", _in_every_part),
            ("transformers:PreTrainedModel.post_init", _checked_when_built),
            ("transformers:PreTrainedModel.save_pretrained", with_every_choice),
            ("transformers.masking_utils:_preprocess_mask_arguments", _packed_in_masks),
        ):
            replace(target, wrap(original(target)))
        _allow_output_attentions()
    install(lambda config: is_normalizer(config._attn_implementation))
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
    asked = AttentionInterface.get_interface

    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = asked(self, attn_implementation, default)
        instead = around(attn_implementation or "eager", function, default)

        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (instead if id(module) in mine else function)(module, *args, **kwargs)

        return attention

    with replaced({"transformers:AttentionInterface.get_interface": get_interface}):
        yield


def _packed_in_masks(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """``_preprocess_mask_arguments`` that finds packed sequences for our implementations."""
    return packed_in_masks(preprocess, lambda config: is_normalizer(config._attn_implementation))


def _register(name: str) -> None:
    AttentionInterface.register(name, make_attention_function(name))
    AttentionMaskInterface.register(name, attention_mask)


def _ours(name: Any) -> bool:
    """Whether a name is one of ours. The text of a record of somebody's own is registered where it is met first."""
    if not is_normalizer(name):
        return False
    if name not in AttentionInterface._global_mapping:
        _register(name)
    return True


def _text(chosen: Any) -> Any:
    """What was given as an implementation, by names: that of a record is its text."""
    if isinstance(chosen, dict):
        return {key: _text(part) for key, part in chosen.items()}
    name = chosen.text if isinstance(chosen, Normalizer) else chosen
    if isinstance(chosen, Normalizer) and "flash" in name:
        raise ValueError(
            "attn_implementation: transformers takes a name with 'flash' for one of its own kernels; expected another name for "
            f"the record, got {chosen.name!r}"
        )
    _ours(name)
    return name


def _named_by_text(declared: Any) -> property:
    """``PreTrainedConfig._attn_implementation`` that takes records."""
    return declared.setter(lambda self, value: declared.fset(self, _text(value)))


def _never_softmax_silently(check: Callable[..., str]) -> Callable[..., str]:
    """``PreTrainedModel.get_correct_attn_implementation`` that takes a saved normalizer before transformers' default.

    It also refuses our names for models without AttentionInterface, for which transformers accepts any registered name
    and goes on computing softmax.
    """

    @functools.wraps(check)
    def wrapper(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> str:
        if requested_attention is None:
            requested_attention = getattr(self.config, SECOND_KEY, None)
        if _ours(requested_attention):
            prepare(self, requested_attention)
        return check(self, requested_attention, *args, **kwargs)

    return wrapper


def _in_every_part(set_implementation: Callable[..., None]) -> Callable[..., None]:
    """``PreTrainedModel.set_attn_implementation`` that reaches all parts of a model, or none where one refuses.

    transformers before 5.20 leaves out parts whose configuration is a copy of the model's (encoder and decoder of T5).
    """

    @functools.wraps(set_implementation)
    def wrapper(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        parts = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
        before = [(part.config, part.config._attn_implementation) for part in parts]
        try:
            set_implementation(self, _text(attn_implementation), *args, **kwargs)
            name = self.config._attn_implementation
            for part in parts:
                own = part.config._attn_implementation
                if (
                    type(part.config) is type(self.config)
                    and own != name
                    and (is_normalizer(own) or is_normalizer(name))
                ):
                    part.config._attn_implementation_internal = part.get_correct_attn_implementation(name)
        except Exception:
            for config, name in before:
                config._attn_implementation_internal = name
            raise

    return wrapper


def _checked_when_built(post_init: Callable[..., None]) -> Callable[..., None]:
    """``PreTrainedModel.post_init``, which models call when their layers exist, that looks at the layers first."""

    @functools.wraps(post_init)
    def wrapper(self: Any) -> None:
        if _ours(self.config._attn_implementation):
            prepare(self, self.config._attn_implementation)
        post_init(self)

    return wrapper


def _allow_output_attentions() -> None:
    """Let configurations have ``output_attentions=True`` beside our implementations, which return weights as eager does."""
    declared: Any = PreTrainedConfig.output_attentions
    validate = PreTrainedConfig.validate_output_attentions

    def setter(self: Any, value: bool) -> None:
        if is_normalizer(self._attn_implementation):
            self._output_attentions = value
        else:
            declared.fset(self, value)

    @functools.wraps(validate)
    def validate_output_attentions(self: Any) -> None:
        if not is_normalizer(self._attn_implementation):
            validate(self)

    replace("transformers:PreTrainedConfig.output_attentions", declared.setter(setter))
    replace("transformers:PreTrainedConfig.validate_output_attentions", validate_output_attentions)
    kinds = [PreTrainedConfig]
    for kind in kinds:  # classes that exist keep the method in a list of their own
        kinds += kind.__subclasses__()
        validators = vars(kind).get("__class_validators__", [])
        validators[:] = [validate_output_attentions if method is validate else method for method in validators]


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


register()
