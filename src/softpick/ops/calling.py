"""What the operators share: whether Triton is there, whether a call needs torch's dispatcher, layouts of outputs.

Nothing but a compiler, a mode or a transform can tell an operator from the function below it, and the dispatcher takes
longer over twenty arguments than a GPU over a short sequence: plain tensors go to the function directly (:func:`plain`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HAS_TRITON",
    "TILES",
    "TRITON",
    "accumulation_dtype",
    "dense",
    "empty_heads_last",
    "interpreted",
    "on_device_of",
    "plain",
    "record_of",
    "transformed",
]

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; finding it does not import it."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``), which takes tensors on the CPU."""
    if not HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


TRITON = ("triton", "auto")
"""Backends whose kernels are Triton's; with ``"auto"`` tiles of torch take the place of one that cannot be built."""
TILES = "tiles of torch compute it instead, slowly (backend='auto')"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of ``dtype``, and the lse, are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_NOTHING = contextlib.nullcontext()


def on_device_of(x: Tensor) -> Any:
    """Make the tensor's device the current one within a block: Triton launches on the current device."""
    if x.is_cuda:
        index = x.get_device()
        return _NOTHING if index == torch.cuda.current_device() else torch.cuda.device(index)
    if not interpreted():  # the public functions say so earlier, except in compiled code
        raise ValueError(f"expected CUDA tensors for the 'triton' backend, got one on {x.device}")
    return _NOTHING


def dense(x: Tensor | None) -> Tensor | None:
    """The vector with stride 1, as the kernels read it; None stays None."""
    return None if x is None else x.contiguous()


def empty_heads_last(query: Tensor, value: Tensor) -> Tensor:
    """An empty ``(B, H, T, Dv)``, (B, T, H, Dv) in memory: what models reshape to, and contiguous for packed sequences."""
    b, h, t, _ = query.shape
    return query.new_empty(b, t, h, value.shape[-1]).transpose(1, 2)


def plain(query: Tensor, *tensors: Tensor | None) -> bool:
    """True if no compiler, dispatch mode (fake tensors, selective checkpointing), transform or subclass must see this call.

    Tensors without values (the meta device) go through the operator as well, which knows the shapes.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
        and not query.is_meta
        and type(query) in _ORDINARY
        and all(type(x) in _ORDINARY for x in tensors)
    )


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is active, or forward-mode derivatives are taken by dual numbers."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


_ORDINARY = (Tensor, torch.nn.Parameter, type(None))


def record_of(function: Callable[..., Any]) -> Any:
    """A named tuple of an operator's arguments in the order of its schema, so that no code counts positions."""
    return namedtuple(function.__name__.strip("_"), list(inspect.signature(function).parameters))
