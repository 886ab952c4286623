"""What stands at the positions of a model that reads no text: [CLS], registers and patches of an image, frames of a sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["KINDS_OF_TOKENS", "kinds_of_tokens", "what_it_reads"]

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
