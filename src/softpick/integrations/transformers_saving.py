"""What a saved transformers model says of its attention: the normalizer, for every part that runs one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from softpick.normalizers import is_normalizer

__all__ = ["SECOND_KEY", "remember_choice", "with_every_choice"]

SECOND_KEY = "softpick_normalizer"
"""An entry of saved configurations beside ``attn_implementation``, which an argument None at load does not replace."""


def remember_choice(to_dict: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """``PreTrainedConfig.to_dict`` that does not drop the attention implementation if it is one of ours.

    The key is the one that the constructor of a configuration takes, so nothing has to be done on loading. The second
    key survives an explicit ``attn_implementation=None``, which training libraries pass to mean "not chosen".
    """

    @functools.wraps(to_dict)
    def wrapper(self: Any) -> dict[str, Any]:
        output = to_dict(self)
        output.pop(SECOND_KEY, None)
        chosen = _chosen(self)
        if chosen is not None:
            output["attn_implementation"] = chosen
        if is_normalizer(self._attn_implementation):
            output[SECOND_KEY] = self._attn_implementation
        return output

    wrapper._softpick = True  # type: ignore[attr-defined]
    return wrapper


def with_every_choice(save: Callable[..., Any]) -> Callable[..., Any]:
    """``PreTrainedModel.save_pretrained`` that refuses a part whose implementation would be forgotten.

    Encoder and decoder of T5 and others have copies of the model's configuration, which has one implementation for all.
    """

    @functools.wraps(save)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        saved = list(_configurations(self.config))
        for name, part in self.named_modules():
            if not isinstance(part, PreTrainedModel) or any(part.config is config for config in saved):
                continue
            own = part.config._attn_implementation
            same = {config._attn_implementation for config in saved if type(config) is type(part.config)}
            if same and own not in same and any(map(is_normalizer, {own, *same})):
                raise ValueError(
                    f"{name}: runs attn_implementation={own!r}, but the configuration that {type(self).__name__} saves has "
                    f"{', '.join(sorted(map(repr, same)))} for it; expected one implementation for the whole model: call "
                    "set_attn_implementation of the model, not of its part"
                )
        return save(self, *args, **kwargs)

    return wrapper


def _configurations(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those of its parts."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configurations(value)


def _chosen(config: Any) -> str | dict[str, Any] | None:
    """The implementation to save: a name of ours, a dictionary where the parts of a composite model differ, or None."""
    own = config._attn_implementation if is_normalizer(config._attn_implementation) else None
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    chosen = {key: _chosen(part) for key, part in parts.items() if isinstance(part, PreTrainedConfig)}
    if all(part == own for part in chosen.values()):
        return own
    # a name would be handed down to every part, so name each: None leaves a part to transformers' default
    return {"": own, **chosen}
