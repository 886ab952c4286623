"""What a request may ask for, and what becomes of it. In front of transformers' handlers, which ignore much silently.

Every refusal is an HTTP error 400 that names the field, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException

__all__ = ["check_body", "check_room"]

_WITHOUT_MEANING = frozenset(
    {"metadata", "parallel_tool_calls", "prediction", "service_tier", "store", "stream_options", "user"}
)
"""Fields that transformers ignores and that change no answer of a server which has but one model."""

_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto", "none"),
    "top_p": (1,),
    "truncation": ("disabled",),
}
"""Values of fields that say nothing."""

_OF_EACH_REQUEST = ("temperature", "top_p", "stop", "seed", "frequency_penalty", "logit_bias", "generation_config")
"""What requests of one batch cannot have for themselves: transformers' continuous batching has one setting for all."""


def refuse(message: str) -> HTTPException:
    """The error of a request that asks for something it cannot have."""
    return HTTPException(status_code=400, detail=message)


def check_body(body: Mapping[str, Any], unsupported: frozenset[str], config: Any, batched: bool) -> None:
    """Refuse a request that asks for what would be ignored.

    Args:
        body: the request.
        unsupported: fields that transformers' handler ignores.
        config: the generation configuration of the model.
        batched: whether requests are batched.

    Raises:
        HTTPException: 400, naming the field.
    """
    for name, value in body.items():
        if value is None or value is False or value in _DEFAULTS.get(name, ()):
            continue
        if name in unsupported - _WITHOUT_MEANING:
            raise refuse(f"{name}: this server does not have it, and would ignore it; got {value!r}")
        if not batched or name not in _OF_EACH_REQUEST:
            continue
        if name == "temperature" and value == (config.temperature or 1.0 if config.do_sample else 0):
            continue
        how = f"temperature={config.temperature or 1.0:g}" if config.do_sample else "greedily: temperature=0"
        raise refuse(
            f"{name}: this server batches requests, and all are sampled alike ({how}); got {value!r}. Leave it out, or start "
            "the server with --no-continuous-batching"
        )
    _check_messages(body)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise refuse(f"{name}: expected an integer of at least 1, got {value!r}")


def _check_messages(body: Mapping[str, Any]) -> None:
    if "messages" not in body:
        return
    messages = body["messages"]
    if not isinstance(messages, list) or not messages:
        raise refuse(f"messages: expected a list of at least one message, got {messages!r}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise refuse(f"messages: expected messages with a role and a content, got {message!r}")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list | None) or not all(isinstance(p, dict) and "type" in p for p in parts):
            raise refuse(f"messages: expected a text, or parts with a type, as the content; got {content!r}")
        other = {part["type"] for part in parts} - {"text", "input_text", "output_text"}
        if other:
            raise refuse(f"messages: this server takes text only, got {', '.join(sorted(map(str, other)))}")


def check_room(prompt: int, config: Any, positions: int | None) -> None:
    """Refuse a prompt that leaves no room, and end an answer where the model has no further position.

    Args:
        prompt: its tokens.
        config: the generation configuration of this request; its ``max_new_tokens`` is lowered to the room that there is,
            so that the answer ends with ``finish_reason`` ``length``.
        positions: of the model, or None where it does not say.

    Raises:
        HTTPException: 400.
    """
    if prompt == 0:
        raise refuse("prompt: expected at least one token, got none")
    if positions is None:
        return
    if prompt >= positions:
        raise refuse(
            f"prompt: expected fewer tokens than the {positions} positions of the model, one of which is for the answer; got "
            f"{prompt}"
        )
    room = positions - prompt
    config.max_new_tokens = room if config.max_new_tokens is None else min(config.max_new_tokens, room)
