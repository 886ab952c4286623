"""Other libraries' log lines and progress bars switched off while a command runs, or shown as ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from softpick.experiment.progress import Reporter
from softpick.integrations.patches import replaced

__all__ = ["loading_bars", "quiet_transformers"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers log errors only and show no bars: softpick shows the progress."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def loading_bars(reporter: Reporter, name: str) -> Iterator[None]:
    """Within the block the reporter shows what transformers' own bars would say of weights that are loaded or converted.

    Args:
        reporter: gets the bars.
        name: of the model.
    """

    def shown(items: Any, what: str) -> Iterator[Any]:
        with reporter.progress(f"{what} {name}", len(items)) as progress:
            for done, item in enumerate(items, 1):
                yield item
                progress.update(done, None)

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") != "Loading weights" or not args or not hasattr(args[0], "__len__"):
            return factory(*args, **kwargs)
        return shown(args[0], "loading")

    def converting(items: Any, **kwargs: Any) -> Iterator[Any]:
        return shown(items, "converting")

    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)
    with ExitStack() as stack:
        if set_hook is not None:
            stack.callback(set_hook, set_hook(hook))
        stack.enter_context(replaced({"transformers.modeling_gguf_pytorch_utils:tqdm": converting}))
        yield
