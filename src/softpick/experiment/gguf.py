"""A GGUF file's description read once, and not each time that transformers asks for the configuration or the tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softpick.integrations.patches import original, replaced

__all__ = ["read_once"]

_PLACE = "transformers.modeling_gguf_pytorch_utils:load_gguf_checkpoint"
_last: dict[tuple[str, int, int], Any] = {}  # of the last file: by path, time and size


@contextmanager
def read_once() -> Iterator[None]:
    """Within the block transformers gets what it read of the same unchanged GGUF file before, but for its tensors.

    A vocabulary of 49,152 entries takes 8 seconds to read, and loading a model asks for it several times.
    """
    load = original(_PLACE)

    def kept(path: Any, return_tensors: bool = False, **kwargs: Any) -> Any:
        if return_tensors or kwargs:
            return load(path, return_tensors=return_tensors, **kwargs)
        state = Path(path).stat()
        key = str(Path(path).resolve()), state.st_mtime_ns, state.st_size
        if key not in _last:
            _last.clear()
            _last[key] = load(path)
        return copy.deepcopy(_last[key])

    with replaced({"transformers.modeling_gguf_pytorch_utils:load_gguf_checkpoint": kept}):
        yield
