"""Names under which configurations are saved, such that no engine takes one of our models for its softmax twin.

Engines choose the code of a model by ``model_type`` or ``architectures`` of its ``config.json`` and read nothing else: a
Llama that was trained with softpick would run softmax there, without a word. A configuration whose model runs one of our
normalizers is therefore written with names that only :mod:`softpick.integrations.transformers` knows::

    "model_type": "llama_with_softpick", "architectures": ["LlamaForCausalLM_with_softpick"]

Reading restores ``model_type`` alone, so that transformers finds the model's class. ``architectures``, by which
transformers chooses nothing, keeps its mark while the model is in memory: an engine that has imported us, but has no
attention of ours, refuses the model too.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from softpick.integrations.patches import original, replace
from softpick.normalizers import is_normalizer

__all__ = ["MARK", "install", "marked", "unmarked"]

MARK = "_with_softpick"
"""What saved names of model types and architectures end in."""

KEEP_A_SINK = ("gpt_oss", "openai_privacy_filter")
"""Model types whose own attention is ``learned_sink``: every engine that has them computes it."""

_OURS_ALONE = ("softpick_llama",)  # no other program has this model type


def marked(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a ``config.json`` with marked names, if another program would run softmax instead of what they say.

    Args:
        config: as ``PreTrainedConfig.to_dict`` gives it. Marks that are there are replaced.
    """
    config = unmarked(config, architectures=True)
    names = set(_leaves(config.get("attn_implementation")))
    harmless = {"softmax"} | ({"learned_sink"} if config.get("model_type") in KEEP_A_SINK else set())
    if not any(map(is_normalizer, names - harmless)) or config.get("model_type", "") in ("", *_OURS_ALONE):
        return config
    config["model_type"] += MARK
    # an engine that finds no architecture at all may guess one
    config["architectures"] = [name + MARK for name in config.get("architectures") or ["Model"]]
    # llama.cpp's converter goes by what a part says of itself, if it says something
    return {key: _marked_part(value) for key, value in config.items()}


def _leaves(chosen: Any) -> Iterator[Any]:
    """The implementations that an entry names: one, or those of parts, whose parts may have their own."""
    if isinstance(chosen, dict):
        for part in chosen.values():
            yield from _leaves(part)
    else:
        yield chosen


def _marked_part(value: Any) -> Any:
    """An entry of a configuration; if it is that of a part, with marked architectures, its own parts' included."""
    if not isinstance(value, dict):
        return value
    part = {key: _marked_part(entry) for key, entry in value.items()}
    if part.get("architectures"):
        part["architectures"] = [name + MARK for name in part["architectures"]]
    return part


def unmarked(config: dict[str, Any], architectures: bool = False) -> dict[str, Any]:
    """The entries of a ``config.json`` with the model type (and the architectures) that transformers knows."""
    config = dict(config)
    if isinstance(config.get("model_type"), str):
        config["model_type"] = config["model_type"].removesuffix(MARK)
    if architectures:
        if config.get("architectures"):
            config["architectures"] = [name.removesuffix(MARK) for name in config["architectures"]]
        for key, part in config.items():
            if isinstance(part, dict):
                config[key] = unmarked(part, architectures=True)
    return config


def install() -> None:
    """Mark names in every file that a configuration writes, and understand them in every file that one reads.

    ``PreTrainedConfig.to_json_file`` is the one place that writes, and
    ``PreTrainedConfig._dict_from_json_file`` the one place that reads. ``PreTrainedConfig.from_dict`` and
    ``AutoConfig.for_model`` take what somebody else has read. Configurations without our names are unchanged.
    """
    if getattr(PreTrainedConfig.to_json_file, "_softpick", False):
        return
    read = original("transformers:PreTrainedConfig._dict_from_json_file").__func__
    build = original("transformers:PreTrainedConfig.from_dict").__func__
    replace("transformers:PreTrainedConfig.to_json_file", _marking(PreTrainedConfig.to_json_file))
    replace("transformers:PreTrainedConfig._dict_from_json_file", classmethod(_unmarking(read)))
    replace("transformers:PreTrainedConfig.from_dict", classmethod(_unmarking_entries(build)))
    replace("transformers:AutoConfig.for_model", staticmethod(_unmarking_type(AutoConfig.for_model)))


def _marking(write: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(write)
    def to_json_file(self: Any, json_file_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        target = Path(json_file_path)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            write(self, temporary, *args, **kwargs)
            before = json.loads(temporary.read_text(encoding="utf-8"))
            after = marked(before)
            if after != before:
                temporary.write_text(json.dumps(after, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    to_json_file._softpick = True  # type: ignore[attr-defined]
    return to_json_file


def _unmarking(read: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(read)
    def _dict_from_json_file(cls: Any, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        return unmarked(read(cls, json_file))

    return _dict_from_json_file


def _unmarking_entries(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return build(cls, unmarked(config_dict), **kwargs)

    return from_dict


def _unmarking_type(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def for_model(model_type: str, *args: Any, **kwargs: Any) -> Any:
        return build(unmarked({"model_type": model_type})["model_type"], *args, **kwargs)

    return for_model
