"""``softpick serve``: one model behind transformers' OpenAI-compatible server.

The server, its formats and its batching are transformers'. What is ours: the model is loaded as every command of softpick
loads one, so that a normalizer is what it was trained with; and requests that transformers would ignore in part, run into an
error with, or mix up, are refused or kept apart (:mod:`softpick.serving.requests`).
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import Any

from softpick.experiment.environment import chosen_device, device_line
from softpick.experiment.failures import ModelError
from softpick.experiment.models import Subject, load_subject
from softpick.experiment.positions import positions
from softpick.experiment.progress import Reporter
from softpick.serving.settings import ServeSettings

__all__ = ["batching", "make_app", "serve"]

_CPU_TOKENS = 16384
_BATCH_TOKENS = 2048


def batching(settings: ServeSettings, subject: Subject) -> Any:
    """The ``ContinuousBatchingConfig`` of transformers, or None where requests are served one after another."""
    from transformers import ContinuousBatchingConfig

    if not settings.continuous_batching:
        return None
    config = ContinuousBatchingConfig(max_batch_tokens=settings.batch_tokens or _BATCH_TOKENS)
    tokens = settings.cache_tokens
    if tokens is None and subject.model.device.type == "cpu":
        tokens = max(_CPU_TOKENS, positions(subject.model) or 0)
    if tokens is not None:
        config.page_size = min(config.page_size, max(16, tokens))
        config.num_blocks = math.ceil(tokens / config.page_size)
    return config


def make_app(subject: Subject, config: Any = None) -> tuple[Any, Any]:
    """The ASGI application for a model that is loaded, and what generates for it (``shutdown`` ends its thread).

    Args:
        subject: the model and its tokenizer.
        config: transformers' ``ContinuousBatchingConfig``, or None for requests one after another.

    Raises:
        ModelError: the model cannot be served so.
    """
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler

    from softpick.serving.engine import HANDLERS, Leaving, Models, State

    models, state = Models(subject), State(subject, config)
    chat, text, response = (handler(model_manager=models, generation_state=state) for handler in HANDLERS)
    app = build_server(
        models,
        chat,
        completion_handler=text,
        response_handler=response,
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    return Leaving(app, state), state


def serve(settings: ServeSettings, reporter: Reporter, ready: Callable[[Any], None] | None = None) -> None:
    """Load a model and serve it until the process gets a signal to stop.

    Args:
        settings: what is served, and where.
        reporter: shows the address when requests are taken.
        ready: called with uvicorn's server before it runs; setting its ``should_exit`` ends it.

    Raises:
        ModelError: the model cannot be loaded or served, or the address is taken.
    """
    import transformers
    import uvicorn

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 20):
        raise ModelError(f"transformers: expected 5.20 or newer to serve, got {transformers.__version__}")
    listening = _listen(settings.host, settings.port)
    with listening:
        device = chosen_device(settings.device)
        reporter.say(device_line(device))
        subject = load_subject(
            settings.model,
            reporter=reporter,
            device=device,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            decoder=True,
            trust_remote_code=settings.trust_remote_code,
        )
        app, state = make_app(subject, batching(settings, subject))
        host, port = listening.getsockname()[:2]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        reporter.say(
            f"{subject.name} ({subject.normalizer}, {subject.model.device}) at http://{host}:{port}/v1; health at "
            f"http://{host}:{port}/health; Ctrl-C stops"
        )
        try:
            if ready is not None:
                ready(server)
            server.run(sockets=[listening])
        finally:
            state.shutdown()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before the model is loaded: an address that is in use is an error at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        raise ModelError(f"host, port: cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listening
