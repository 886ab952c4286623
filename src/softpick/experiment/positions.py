"""Positions of a model: how many, and what stands there where it reads no text ([CLS], patches, frames of a sound)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = [
    "KINDS_OF_TOKENS",
    "first_position",
    "kinds_of_tokens",
    "learned_positions",
    "positions",
    "stated_positions",
    "what_it_reads",
]

KINDS_OF_TOKENS = ("[CLS]", "[DIST]", "register", "patch", "frame")
"""What stands for a token id where a model reads images or sound."""

_BEFORE_PATCHES = (  # parameters of tokens that stand before the patches, in the order in which models put them
    ("[CLS]", ("cls_token", "class_embedding")),
    ("[DIST]", ("distillation_token",)),
    ("register", ("register_tokens",)),
)


def _extra_tokens(model: nn.Module) -> list[str]:
    found = []
    for kind, names in _BEFORE_PATCHES:
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in names:
                found += [kind] * (parameter.shape[-2] if parameter.dim() > 1 else 1)
                break
    return found


def kinds_of_tokens(model: nn.Module, inputs: Mapping[str, Any], length: int) -> tuple[list[str], list[str]]:
    """A name and a kind (of :data:`KINDS_OF_TOKENS`) for every position of an image or a sound.

    Args:
        model: of transformers.
        inputs: its arguments, with ``pixel_values (B, C, H, W)`` or ``input_features (B, bins, frames)``.
        length: positions that its attention has.

    Raises:
        ValueError: positions that are not [CLS], registers and one for each patch.
    """
    if "input_features" in inputs:
        return [f"frame {i}" for i in range(length)], ["frame"] * length
    height, width = inputs["pixel_values"].shape[-2:]
    size = getattr(model.config, "patch_size", None)
    tall, wide = size if isinstance(size, list | tuple) else (size, size)
    if not isinstance(tall, int) or not isinstance(wide, int):
        raise ValueError(f"model: {type(model).__name__} has no patch_size: expected a vision transformer")
    rows, columns = height // tall, width // wide
    before = _extra_tokens(model)
    if len(before) + rows * columns != length:
        raise ValueError(
            f"model: {type(model).__name__} attends with {length} positions; expected {len(before)} "
            f"({', '.join(dict.fromkeys(before)) or 'no extra tokens'}) and {rows} x {columns} patches: attention in windows, "
            "on a pyramid or over masked patches is not measured"
        )
    count = {kind: 0 for kind in before}
    names = []
    for kind in before:
        count[kind] += 1
        names.append(f"register {count[kind]}" if kind == "register" else kind)
    names += [f"patch {row + 1},{column + 1}" for row in range(rows) for column in range(columns)]
    return names, [*before, *["patch"] * (rows * columns)]


def what_it_reads(config: Any) -> str:
    """What the model of a configuration reads: ``text``, ``images`` or ``sound`` (an encoder of frames that text comes of).

    Args:
        config: of transformers.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    parts = set(getattr(config, "sub_configs", ()))
    if {"vision_config", "text_config"} <= parts and hasattr(config, "projection_dim"):
        return "images"  # CLIP and its relatives
    kind = MODEL_MAPPING.get(type(config), None)
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    first = getattr(kind, "main_input_name", "input_ids")
    return {"pixel_values": "images", "input_features": "sound"}.get(first, "text")


# ---------------------------------------------------------------------------------------------------------------------
# How many


def learned_positions(model: Any) -> int | None:
    """How many positions a model has a learned embedding for (GPT-2, OPT); None where it needs none (RoPE, ALiBi).

    RoBERTa and its relatives count from the index after the padding token's on, so they have that many fewer than rows.

    Args:
        model: of transformers.
    """
    table = _position_table(model)
    if table is None:
        return None
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = len(table.weight) - first_position(model)
    return min(longest, rows) if isinstance(longest, int) and longest > 0 else rows


def first_position(model: Any) -> int:
    """The position id of a sequence's first token, for models that take ``position_ids``: 0, but not RoBERTa's.

    Args:
        model: of transformers.
    """
    padding = getattr(_position_table(model), "padding_idx", None)
    return 0 if padding is None else padding + 1


def positions(model: Any) -> int | None:
    """How many positions a model has, learned or not; None where it does not say.

    Args:
        model: of transformers.
    """
    learned = learned_positions(model)
    if learned is not None:
        return learned
    return stated_positions(model.config)


def stated_positions(config: Any) -> int | None:
    """How many positions a configuration states; None where it does not, as for positions that are not counted.

    Args:
        config: of transformers.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _position_table(model: Any) -> Any:
    """The module of position embeddings; also one of a class of its own, as I-BERT's, which is known by its weight."""
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        embeds = isinstance(module, nn.Embedding) or type(module).__name__.endswith("Embedding")
        weight = getattr(module, "weight", None)
        if embeds and weight is not None and module is not words and ("pos" in last or last == "wpe"):
            return module
    return None
