"""transformers' server classes with a model that is loaded, checked requests, and clients that may go away."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import transformers.cli.serving.chat_completion as chat
import transformers.cli.serving.completion as text
import transformers.cli.serving.response as response
from fastapi import HTTPException
from transformers import ContinuousBatchingConfig
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import CBGenerateManager, GenerateManager, GenerationState

from softpick.experiment.failures import ModelError
from softpick.experiment.models import Subject
from softpick.experiment.positions import positions
from softpick.serving.requests import check_body, check_room, refuse

__all__ = ["HANDLERS", "Leaving", "Models", "State"]


class Models(ModelManager):
    """transformers' manager of models with the one that is loaded."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(device=str(subject.model.device), model_timeout=-1)
        self.subject = subject
        self.force_model = subject.name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: there is no revision to choose."""
        return model_id

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return self.subject.model, self.subject.tokenizer

    async def load_model_streaming(self, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        """What ``/load_model`` answers: it is loaded."""
        yield f'data: {{"status": "ready", "model": "{self.force_model}", "cached": true}}\n\n'

    def list_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """What ``/v1/models`` answers (transformers 5.24)."""
        return [{"id": self.force_model, "object": "model", "created": int(time.time()), "owned_by": "softpick"}]

    get_gen_models = list_models  # its name up to 5.23


class _Batched(CBGenerateManager):
    """transformers' continuous batching for a server.

    What it adds: room is checked; an answer that is there before its handler is registered is not lost; and a request whose
    client went away ends.
    """

    def __init__(self, cb_config: ContinuousBatchingConfig) -> None:
        super().__init__(cb_config=cb_config)
        self._running: dict[str, asyncio.Future[Any]] = {}

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **more: Any
    ) -> Any:
        check_room(len(inputs["input_ids"]), gen_config, positions(model))
        assert self._cb is not None
        handed: list[Any] = []
        # called later than here, also for what is delivered while the request is being added
        self._cb.register_result_handler(request_id, lambda output: handed[0](output))
        found = super().generate_streaming(model, processor, inputs, gen_config, request_id, **more)
        handed.append(self._cb.output_router.result_handlers[request_id][0])
        return found

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        check_room(len(inputs["input_ids"]), gen_config, positions(model))
        answer = super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        running = self._running[request_id] = asyncio.ensure_future(answer)
        try:
            return await running
        except asyncio.CancelledError:
            if running.cancelled():
                raise HTTPException(499, "the client went away") from None
            raise
        finally:
            del self._running[request_id]

    def leave(self, request_id: str) -> None:
        """The client of a request went away."""
        if self._cb is not None:
            self._cb.cancel_request(request_id)
        if request_id in self._running:
            self._running[request_id].cancel()

    def stop(self) -> None:
        if self._cb is not None:
            self._cb.stop(block=True, timeout=10, hard_stop=True)


class _OneByOne(GenerateManager):
    """transformers' sequential generation, with checked room."""

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **more: Any
    ) -> Any:
        check_room(inputs["input_ids"].shape[-1], gen_config, positions(model))
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **more: Any
    ) -> Any:
        check_room(inputs["input_ids"].shape[-1], gen_config, positions(model))
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **more)


class State(GenerationState):
    """The generation of a server: batched from the start, so that a model that cannot be is an error before any request."""

    def __init__(self, subject: Subject, cb_config: ContinuousBatchingConfig | None) -> None:
        super().__init__(continuous_batching=cb_config is not None, cb_config=cb_config)
        self._one_by_one = _OneByOne()
        self.batched: _Batched | None = None
        if cb_config is not None:
            self.batched = self._cb_manager = _Batched(cb_config)
            self._cb_model_id = subject.name
            self._try(subject)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The manager for one kind of request."""
        return self.batched if use_cb else self._one_by_one

    def leave(self, request_id: str) -> None:
        """The client of a request went away."""
        if self.batched is not None:
            self.batched.leave(request_id)

    def _try(self, subject: Subject) -> None:
        """Start the engine and have one token generated.

        Raises:
            ModelError: it cannot be.
        """
        assert self.batched is not None
        config = copy.deepcopy(subject.model.generation_config)
        try:
            self.batched.init_cb(subject.model, config)
            engine: Any = self.batched._cb
            engine.add_request([subject.opening or 0], request_id="first", max_new_tokens=1)
            result = None
            while result is None and engine.is_running():
                result = engine.get_result(timeout=0.5)
            dead = engine.background_thread_status.fatal_error or "its thread ended"
            wrong = dead if result is None else result.error
        except Exception as error:
            wrong = error
        if wrong is not None:
            self.shutdown()
            raise ModelError(
                f"model: {subject.name} cannot be served in batches: {str(wrong).splitlines()[0]}; --no-continuous-batching "
                "serves requests one after another"
            )


class _Checked:
    """A handler of transformers behind a check: requests that would be ignored in part, or fail, are refused."""

    _unused_fields: Any
    model_manager: Any
    generation_state: Any

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        model, tokenizer = self.model_manager.load_model_and_processor()
        batched = self.generation_state.batched is not None
        check_body(body, frozenset(self._unused_fields), model.generation_config, batched)
        if not isinstance(self, text.CompletionHandler) and not getattr(tokenizer, "chat_template", None):
            raise refuse("messages: this model's tokenizer has no chat template; POST a prompt to /v1/completions")
        return await super().handle_request(body, request_id)  # type: ignore[misc]


class _Chat(_Checked, chat.ChatCompletionHandler):
    pass


class _Text(_Checked, text.CompletionHandler):
    pass


class _Response(_Checked, response.ResponseHandler):
    pass


HANDLERS = (_Chat, _Text, _Response)
"""Handlers of ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/responses``."""


class Leaving:
    """The outermost layer of the server: gives every request a name of its own, and notes when its client goes away.

    transformers takes a request's name from its header; two requests of one name would get each other's answers.
    """

    def __init__(self, app: Any, state: State) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = b"x-request-id"
        given = dict(scope["headers"]).get(name, b"")
        request_id = given + (b"-" if given else b"") + uuid.uuid4().hex.encode()
        scope = {**scope, "headers": [*((k, v) for k, v in scope["headers"] if k != name), (name, request_id)]}
        messages: asyncio.Queue[Any] = asyncio.Queue()

        async def read() -> None:
            while True:
                message = await receive()
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    self.state.leave(request_id.decode("latin-1"))
                    return

        reading = asyncio.create_task(read())
        try:
            await self.app(scope, messages.get, send)
        finally:
            reading.cancel()
