"""Which kernel takes a call, and why a faster one does not: by Triton's version, device, dtype, shape and the switch.

Reasons have no figures of the call: small calls come here, too, and formatting a figure takes longer than comparing it. Sizes
from which a kernel pays stand in ``tuning.py``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from softpick.ops.kernel_errors import KernelError, fall_back
from softpick.ops.spec import AttentionSpec
from softpick.ops.triton import tuning
from softpick.ops.triton.shapes import padded

__all__ = [
    "Choice",
    "backward_kernel",
    "capability",
    "decode_kernel",
    "forward_kernel",
    "hopper",
    "interpreted",
    "optimistic",
    "rows_kernel",
    "why_no_hopper",
]

hopper: Any = None
_no_hopper: KernelError | None = None
if not triton.knobs.runtime.interpret:  # Gluon has no interpreter
    try:  # an experimental module of Triton, which other versions may not have, or have under other names
        from softpick.ops.triton import hopper
    except Exception as error:
        _no_hopper = KernelError(
            "softpick.ops.triton.hopper", f"{type(error).__name__}: {error}; Triton {triton.__version__}"
        )

PORTABLE_TAKES = "the Triton kernels for every GPU take its place: up to twice the time of those for Hopper GPUs"
_LISTED = "key_bounds: only decode.py takes blocks of keys from a list"
LEFT_OUT = "left out by softpick.use_backend or SOFTPICK_BACKEND"


class Choice(NamedTuple):
    """A kernel and why the faster one does not take the call."""

    kernel: str
    """File below ``ops/triton`` that has it."""
    reason: str | None = None
    """Why the kernel for Hopper GPUs is not taken; None where it is."""

    @property
    def hopper(self) -> bool:
        """Whether the kernel is one for Hopper GPUs."""
        return self.reason is None


def forward_kernel(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    packed: bool,
    stats: bool,
    out: Tensor | None,
    longest: tuple[int, int],
) -> Choice:
    """Choose the kernel of the forward pass of ``(B, H, T, D)`` tensors; ``longest``: queries and keys of the longest sequence.

    ``out`` is the tensor that is written; None: one that the tensor memory accelerator takes.
    """
    reason = None
    if packed:
        reason = "packed sequences"
    elif stats:
        reason = "row statistics are returned"
    elif query.dtype == torch.float32 or not _range_suffices(spec):
        reason = "dtype, eps or normalizer need a running maximum"
    elif query.shape[0] * query.shape[1] * longest[0] * longest[1] < tuning.FEWEST_FORWARD:
        reason = "too few scores to be worth the second launch"
    reason = reason or hopper_refuses(spec, query, key, value, mask, *(() if out is None else (out,)))
    if reason is not None:
        return Choice("forward.py", reason)
    return Choice("hopper/forward.py" if padded(query.shape[-1]) > 64 else "hopper/forward_narrow.py")


def backward_kernel(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    packed: bool,
    mask_grad: bool,
    grad_out: Tensor | None,
) -> Choice:
    """Choose the kernels of the backward pass; ``grad_out`` None: a gradient that the tensor memory accelerator takes."""
    reason = "the gradient of a mask is asked for" if mask_grad else "packed sequences" if packed else None
    reason = reason or hopper_refuses(spec, query, key, value, mask, *(() if grad_out is None else (grad_out,)))
    return Choice("hopper/backward.py" if reason is None else "backward.py", reason)


def decode_kernel(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    page: int,
    keys: int,
    listed: bool = False,
) -> Choice:
    """Choose the kernel for few queries against a cache; ``page``: positions of a page, or 0; ``keys``: of all heads.

    ``listed``: blocks of keys that their bounds show to be needless are not read.
    """
    reason = _LISTED if listed else hopper_refuses_decode(spec, query, key, value, mask, page, keys)
    return Choice("hopper/decode.py" if reason is None else "decode.py", reason)


def rows_kernel(kind: str, x: Tensor, more: tuple[Tensor, ...], without: frozenset[str]) -> Choice:
    """Choose the kernel of softpick over the rows of ``x`` ``(rows, n)``; ``kind``: ``forward`` or ``backward``."""
    if tuning.rows(kind, x.shape[1], x.element_size()) is not None:
        return Choice("rows.py", "rows are short enough for a program to hold")
    reason = None
    launch = tuning.HOPPER_ROWS.get((kind, x.element_size()))
    if "hopper" in without:
        reason = LEFT_OUT
    elif launch is None:
        reason = "no such kernel for this dtype"
    elif (there := _not_on_hopper(x)) is not None:
        reason = there
    elif not all(map(_in_16_bytes, (x, *more))):
        reason = "rows do not begin at multiples of 16 bytes"
    elif launch.programs * tuning.multiprocessors(x.device.index or 0) < -(-x.shape[1] // launch.entries):
        reason = "the programs of a row do not all run at the same time"
    return Choice("hopper/rows.py" if reason is None else "rows.py", reason)


def hopper_refuses(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *more: Tensor
) -> str | None:
    """Why the kernels of ``hopper/`` do not compute this, or are not faster; ``more`` has to be fetched, too."""
    if "hopper" in spec.without:
        return LEFT_OUT
    there = _not_on_hopper(query)
    if there is not None:
        return there
    width = padded(query.shape[-1])
    if query.dtype not in (torch.bfloat16, torch.float16):
        return "dtype is not bf16 or fp16"
    if not spec.norm.exponential:
        return "the normalizer has no exponential"
    if spec.scale <= 0:  # signs are those of the products
        return "scale is not positive"
    if query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] < tuning.FEWEST_SCORES:
        return "too few scores to be worth describing tensors to the GPU"
    if mask is not None:
        return "a mask"
    if spec.left >= 0:
        return "a window"
    if spec.softcap and query.dtype == torch.float16:  # that of the hardware is off by 2^-11: docs/kernels.md
        return "a softcap in fp16, for which the fast tanh is not precise enough"
    if spec.dropout_p:
        return "dropout"
    if width not in (64, 128) or width != padded(value.shape[-1]):
        return "head dimensions of query and value do not both pad to 64, or both to 128"
    if not all(_fetchable(x, query.dtype) for x in (query, key, value, *more)):
        return _NOT_FETCHABLE
    return None


def hopper_refuses_decode(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, page: int, keys: int
) -> str | None:
    """Why ``hopper/decode.py`` does not take it; describing the cache to the GPU pays from some number of keys on."""
    if "hopper" in spec.without:
        return LEFT_OUT
    there = _not_on_hopper(query)
    if there is not None:
        return there
    if query.dtype != torch.bfloat16:
        return "dtype is not bf16"
    if keys < tuning.FEWEST_CACHED:
        return "too few keys to be worth describing the cache to the GPU"
    if query.shape[1] // key.shape[1] * query.shape[2] > 32:
        return "more than 32 queries a key head"
    if mask is not None:
        return "a mask"
    if spec.norm.exponential and spec.eps > tuning.LARGEST_OPTIMISTIC_EPS:
        return "a large eps"
    if padded(key.shape[-1]) not in (64, 128) or padded(value.shape[-1]) not in (64, 128):
        return "head dimensions do not pad to 64 or 128"
    if page % 64:
        return "the page size is not a multiple of 64"
    if not (_fetchable(key, query.dtype) and _fetchable(value, query.dtype)):
        return _NOT_FETCHABLE
    return None


_NOT_FETCHABLE = (
    "a tensor that the tensor memory accelerator does not take (16-byte alignment, unit stride in the last dimension, not "
    "empty)"
)


def optimistic(dtype: torch.dtype, spec: AttentionSpec) -> bool:
    """Whether ``forward.py`` first tries without a maximum: not in fp16 (small range), nor in fp32 (``eps`` would show)."""
    return dtype == torch.bfloat16 and _range_suffices(spec)


def _range_suffices(spec: AttentionSpec) -> bool:
    """Whether sums in fp32 may do without a running maximum."""
    return spec.norm.exponential and spec.eps <= tuning.LARGEST_OPTIMISTIC_EPS


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return bool(triton.knobs.runtime.interpret)


def capability(x: Tensor) -> int:
    """Major compute capability of the NVIDIA GPU that runs the kernels; 0 if none does."""
    if interpreted() or torch.version.hip is not None:
        return 0
    return _major(x.get_device())


@functools.cache
def _major(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _not_on_hopper(x: Tensor) -> str | None:
    """Why the kernels of ``hopper/`` do not run on the tensor's device."""
    if capability(x) != 9:
        return "the GPU is not of compute capability 9.0 (Hopper)"
    if _no_hopper is not None:
        fall_back(_no_hopper, PORTABLE_TAKES)
    return "this Triton cannot load the kernels for Hopper GPUs" if hopper is None else None


def why_no_hopper() -> str | None:
    """Why the kernels for Hopper GPUs could not be loaded; None if they were, or where Triton's interpreter runs."""
    return None if _no_hopper is None else str(_no_hopper)


def _fetchable(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor memory accelerator takes this as ``dtype``: multiples of 16 bytes, nothing empty, nothing expanded."""
    b, h, t, d = x.stride()
    there = x.dtype == dtype and x.numel() > 0 and x.data_ptr() % 16 == 0
    return there and d == 1 and (b | h | t) % 8 == 0 and 0 not in (b, h, t)


def _in_16_bytes(x: Tensor) -> bool:
    """Whether rows begin and end at multiples of 16 bytes."""
    entries = 16 // x.element_size()
    return x.shape[1] % entries == 0 and x.stride(0) % entries == 0 and x.data_ptr() % 16 == 0
