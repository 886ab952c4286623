"""The command that serves a model."""

from __future__ import annotations

from typing import Any

from softpick.cli.console import ConsoleReporter, make_console
from softpick.cli.options import require, with_settings
from softpick.serving.settings import ServeSettings

__all__ = ["serve"]


@with_settings(ServeSettings)
def serve(given: dict[str, Any]) -> None:
    """Serve a model, softpick or softmax, to OpenAI clients: chat, completions and responses, streamed or not, at
    http://HOST:PORT/v1.
    """
    require("transformers", "fastapi", "uvicorn", "openai", "pydantic", extra="serve")
    from softpick.serving.serve import serve as run

    run(ServeSettings(**given), ConsoleReporter(make_console()))
