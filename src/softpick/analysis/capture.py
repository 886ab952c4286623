"""Run a transformers model over batches and feed what its attention layers do to the metrics.

:mod:`softpick.analysis.watching` runs the model and shows every layer. Here stand what the model is given, and which of its
positions are real: of text the tokens that are not padding, of images [CLS], registers and patches, of sound frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softpick.analysis.calls import PARTS, SeenAttention
from softpick.analysis.metrics import Measurements, Meter
from softpick.analysis.watching import is_encoder_decoder, parts_of, watch, watch_last_query
from softpick.experiment.perplexity import token_losses
from softpick.experiment.positions import KINDS_OF_TOKENS, kinds_of_tokens

__all__ = [
    "BOS_POLICIES",
    "Positions",
    "attention_maps",
    "measure",
    "measure_parts",
    "part_positions",
    "watch_last_query",
]

BOS_POLICIES = ("auto", "bos", "none")
"""``auto``: say what the samples start with; ``bos``: every sample must start with the model's BOS token; ``none``: the
caller says that samples start without one."""


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
        model: a decoder (Llama, GPT-2, ...) or encoder (BERT, ViT, ...) of transformers, with ``attn_implementation`` eager,
            sdpa, or a registered one that returns weights. An encoder-decoder has three measurements:
            :func:`measure_parts`.
        batches: token ids ``(B, T)``, an iterable of such, or of dicts with ``input_ids (B, T)``, optionally
            ``attention_mask (B, T)`` (0 marks padding) and other arguments of the model; ``labels`` is ignored. Of a model
            of images dicts with ``pixel_values (B, C, H, W)``: then the tokens are :data:`KINDS_OF_TOKENS`.
        bos_policy: one of ``BOS_POLICIES``.
        device: where the inputs go; by default where the model's parameters are.
        largest_score: also find the largest scaled score ``q . k`` a layer (one more matrix product).
        tokens: ids whose sink rates are listed in any case.
        meter: one that has seen earlier batches and goes on counting; the default is a new one.
        progress: called with the number of finished batches.

    Raises:
        ValueError: for an unknown policy, a sample that breaks it, a batch without input, a model in which no
            attention layer is seen or whose implementation does not show its weights, an encoder-decoder, and for NaN.
    """
    if is_encoder_decoder(model):
        raise ValueError(
            f"model: {type(model).__name__} is an encoder-decoder, whose {', '.join(PARTS)} are measured each by itself: "
            "call softpick.analysis.measure_parts"
        )
    meter = Meter(bos_policy, tokens) if meter is None else meter
    options: Any = {"bos_policy": bos_policy, "device": device, "largest_score": largest_score, "progress": progress}
    return measure_parts(model, batches, meters={"": meter}, **options)[""]


def measure_parts(
    model: nn.Module,
    batches: Tensor | Iterable[Mapping[str, Tensor] | Tensor],
    *,
    bos_policy: str = "auto",
    device: torch.device | str | None = None,
    largest_score: bool = False,
    tokens: Iterable[int] = (),
    meters: Mapping[str, Meter] | None = None,
    progress: Callable[[int], None] | None = None,
    rest: Callable[[list[str]], None] = lambda sentences: None,
    losses: bool = False,
) -> dict[str, Measurements]:
    """:func:`measure` for each part of a model, from the same forward passes.

    Args:
        model: as for :func:`measure`, or an encoder-decoder (T5, BART, Whisper, ...).
        batches: as for :func:`measure`; of an encoder-decoder dicts with ``decoder_input_ids (B, Td)`` and the encoder's
            ``input_ids`` or ``input_features``, optionally ``attention_mask`` and ``decoder_attention_mask``.
        bos_policy: as for :func:`measure`; of an encoder-decoder only ``auto`` and ``none``.
        device: as for :func:`measure`.
        largest_score: as for :func:`measure`.
        tokens: as for :func:`measure`.
        meters: by part, as for :func:`measure`.
        progress: as for :func:`measure`.
        rest: called after each batch with sentences about layers in which no attention was seen.
        losses: also sum the losses of the next tokens, from the third token on, in the meter (a causal model with its head,
            samples without padding).

    Returns:
        By part: ``encoder``, ``decoder`` and ``cross-attention``, or one of the empty name. Cross-attention has no residual
        stream of its own: its ``hidden`` is empty.

    Raises:
        ValueError: as for :func:`measure`.
    """
    if bos_policy not in BOS_POLICIES:
        raise ValueError(f"bos_policy: expected one of {', '.join(BOS_POLICIES)}; got {bos_policy!r}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    bos = getattr(getattr(model, "config", None), "bos_token_id", None)
    if bos_policy == "bos" and (bos is None or is_encoder_decoder(model)):
        raise ValueError("bos_policy: 'bos' needs a model whose config has a bos_token_id, and no encoder-decoder")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    parts = parts_of(model)
    meters = {part: Meter(bos_policy, tokens) for part in parts} if meters is None else meters
    begun: set[str] = set()
    inputs: dict[str, Any] = {}

    def begin(part: str, queries: int, keys: int) -> Meter:
        if part not in begun:
            begun.add(part)
            of_queries, of_keys = part_positions(model, inputs, part, queries, keys)
            if bos_policy == "bos":
                _check_bos(of_queries, bos)
            meters[part].begin_batch(of_queries.valid, of_queries.ids, of_keys.valid, of_keys.ids)
        return meters[part]

    def on_attention(seen: SeenAttention) -> None:
        queries, keys = seen.visible.shape[-2:]
        meter = begin(seen.part, queries, keys)
        above = keys > 1 and bool(seen.visible.triu(1).any())
        score = seen.scores().masked_fill_(~seen.visible, -torch.inf).max().item() if largest_score else None
        meter.attention(
            seen.layer,
            seen.weights,
            seen.outputs,
            seen.visible,
            causal=not above and seen.part != "cross-attention",
            max_score=score,
            first_sample=seen.samples.start,
            first_head=seen.heads.start,
            heads=seen.total_heads,
        )

    def on_hidden(layer: int, hidden: Tensor, part: str) -> None:
        meters[part].hidden(layer, hidden)

    def on_output(output: Any) -> None:
        ids = inputs["input_ids"]
        for row, targets in zip(output.logits[:, 1:-1], ids[:, 2:], strict=True):
            meters[""].add_loss(float(token_losses(row, targets).sum()), len(targets))

    with watch(model, on_attention, on_hidden, rest, on_output if losses else None) as run:
        for done, batch in enumerate([batches] if isinstance(batches, Tensor) else batches, 1):
            inputs = _inputs(batch, device)
            begun.clear()
            run(inputs)
            if progress is not None:
                progress(done)
    return {part: meters[part].result() for part in parts}


def attention_maps(
    model: nn.Module, sample: Tensor | Mapping[str, Tensor], *, part: str = "", device: torch.device | str | None = None
) -> Tensor:
    """The attention weights of every layer for one short sample.

    Args:
        model: as for :func:`measure_parts`.
        sample: token ids ``(T,)`` or ``(1, T)`` without padding, or a dict of the model's arguments with a batch of one.
        part: of an encoder-decoder: ``encoder``, ``decoder`` or ``cross-attention``.
        device: as for :func:`measure`.

    Returns:
        ``(L, H, T, Tk)`` fp32 on the CPU; entries that are masked are 0.
    """
    if part not in parts_of(model):
        raise ValueError(f"part: expected one of {', '.join(map(repr, parts_of(model)))}, got {part!r}")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    batch = {"input_ids": one_sample(sample)} if isinstance(sample, Tensor) else sample
    maps: list[list[Tensor]] = []

    def on_attention(seen: SeenAttention) -> None:
        if seen.part != part:
            return
        if seen.weights.shape[0] != 1 or seen.samples.start:
            raise ValueError(
                f"sample: expected a batch of one, got {seen.samples.start + seen.weights.shape[0]} or more"
            )
        if seen.heads.start == 0:
            maps.append([])
        maps[-1].append(torch.where(seen.visible, seen.weights, 0.0)[0].cpu())

    with watch(model, on_attention) as run:
        run(_inputs(batch, device))
    return torch.stack([torch.cat(heads) for heads in maps])


def one_sample(input_ids: Tensor) -> Tensor:
    """``(1, T)``, from that or ``(T,)``."""
    if input_ids.dim() == 1:
        input_ids = input_ids[None]
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: expected one sample, (T,) or (1, T), got {tuple(input_ids.shape)}")
    return input_ids


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Positions:
    """One side of attention: which positions of a batch are real, and their tokens.

    Attributes:
        valid: ``(B, T)`` boolean.
        ids: ``(B, T)`` integers: token ids, or indices of ``KINDS_OF_TOKENS``.
        names: ``T`` words where the positions are no text, else empty.
    """

    valid: Tensor
    ids: Tensor
    names: list[str] = field(default_factory=list)


def part_positions(
    model: nn.Module, inputs: Mapping[str, Any], part: str, queries: int, keys: int
) -> tuple[Positions, Positions]:
    """The positions whose queries and whose keys a part of a model attends with.

    Args:
        model: of transformers.
        inputs: its arguments.
        part: of the model.
        queries: how many there are a sample.
        keys: the same.
    """
    of_queries = _positions(model, inputs, "decoder_" if part in ("decoder", "cross-attention") else "", queries)
    return of_queries, _positions(model, inputs, "", keys) if part == "cross-attention" else of_queries


def _positions(model: nn.Module, inputs: Mapping[str, Any], prefix: str, length: int) -> Positions:
    ids, mask = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}attention_mask")
    if ids is not None:
        if ids.shape[1] != length:
            raise ValueError(
                f"{prefix}input_ids: {ids.shape[1]} tokens, but the attention is of {length} positions; attention that joins "
                "the positions of encoder and decoder is not measured"
            )
        return Positions(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool(), ids)
    if prefix:
        raise ValueError(f"batches: an encoder-decoder needs {prefix}input_ids, got the keys {sorted(inputs)}")
    samples = len(inputs[_other_input(inputs)])
    names, kinds = kinds_of_tokens(model, inputs, length)
    row = torch.tensor([KINDS_OF_TOKENS.index(kind) for kind in kinds])
    return Positions(torch.ones(samples, length, dtype=torch.bool), row.expand(samples, -1), names)


def _other_input(inputs: Mapping[str, Any]) -> str:
    return next(name for name in ("pixel_values", "input_features") if name in inputs)


def _inputs(batch: Mapping[str, Tensor] | Tensor, device: torch.device) -> dict[str, Any]:
    """The model's arguments."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not {"input_ids", "pixel_values", "input_features"} & set(batch):
        raise ValueError(
            f"batches: expected dicts with pixel_values, input_features or input_ids, got the keys {sorted(batch)}"
        )
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
    for prefix in ("", "decoder_"):
        ids, mask = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}attention_mask")
        if ids is not None and ids.dim() != 2:
            raise ValueError(f"{prefix}input_ids: expected (B, T), got {tuple(ids.shape)}")
        if ids is not None and mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"{prefix}attention_mask: expected the shape of {prefix}input_ids {tuple(ids.shape)}, got {tuple(mask.shape)}"
            )
    return inputs


def _check_bos(positions: Positions, bos: Any) -> None:
    allowed = set(bos) if isinstance(bos, list | tuple) else {bos}
    valid = positions.valid
    first = positions.ids.gather(1, valid.int().argmax(1, keepdim=True))[:, 0]
    wrong = [int(t) for t, real in zip(first, valid.any(1), strict=True) if real and int(t) not in allowed]
    if wrong:
        raise ValueError(
            f"bos_policy: 'bos' expects every sample to start with token {bos}; one starts with {wrong[0]}"
        )
