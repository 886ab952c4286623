"""Which kernel takes a call, and why a faster one does not: by Triton's version, device, dtype, shape and the switch.

Reasons name what they need of the call in braces, which :func:`sentence` fills in: small calls come here, too, and formatting a
figure takes longer than comparing it. Sizes from which a kernel pays stand in ``tuning.py``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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
    "in_pairs",
    "interpreted",
    "optimistic",
    "rows_kernel",
    "sentence",
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
LEFT_OUT = "'hopper' is left out by softpick.use_backend or SOFTPICK_BACKEND"
_PACKED = "cu_seqlens_q: these kernels take no packed sequences"
_MASK = "attn_mask: these kernels take none, got {mask_shape}"
_DTYPE = "query: expected torch.bfloat16, got {query.dtype}"
_DTYPES = "query: expected torch.bfloat16 or torch.float16, got {query.dtype}"
_WIDTHS = (
    "query, value: expected head dimensions from 33 to 64, or from 65 to 128, got {query.shape[3]} and {value.shape[3]}"
)
_NO_HOPPER = "this Triton ({triton}) cannot load the kernels for Hopper GPUs"
_ELSEWHERE = "query is on {place}; expected a GPU of compute capability 9.0 (Hopper)"


class Choice(NamedTuple):
    """A kernel and why the faster one does not take the call."""

    kernel: str
    """File below ``ops/triton`` that has it."""
    reason: str | None = None
    """Why the kernel for Hopper GPUs is not taken, with braces for :func:`sentence`; None where it is."""

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
        reason = _PACKED
    elif stats:
        reason = "return_stats: these kernels return none, got True"
    elif query.dtype == torch.float32 or not _range_suffices(spec):
        reason = (
            "query, normalizer, eps: {query.dtype}, {spec.norm.text} and {spec.eps:g} need a running maximum; expected "
            "torch.bfloat16 or torch.float16, a base with an exponential and at most {tuning.LARGEST_OPTIMISTIC_EPS:g}"
        )
    elif query.shape[0] * query.shape[1] * longest[0] * longest[1] < tuning.FEWEST_FORWARD:
        reason = "query, key: {scores} scores; a second launch pays from {tuning.FEWEST_FORWARD} on"
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
    reason = (
        "attn_mask: these kernels have no gradient of it, and it requires one"
        if mask_grad
        else _PACKED
        if packed
        else None
    )
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
        return Choice("rows.py", "x: rows of {columns} entries are short enough for one program to hold")
    reason = None
    launch = tuning.HOPPER_ROWS.get((kind, x.element_size()))
    if "hopper" in without:
        reason = LEFT_OUT
    elif launch is None:
        reason = "x: expected a dtype of 2 or 4 bytes, got {query.dtype}"
    elif (there := _not_on_hopper(x)) is not None:
        reason = there
    elif not all(map(_in_16_bytes, (x, *more))):
        reason = "x: rows of {columns} entries ({query.dtype}, strides {strides}) do not begin at multiples of 16 bytes"
    elif launch.programs * tuning.multiprocessors(x.device.index or 0) < -(-x.shape[1] // launch.entries):
        reason = (
            "x: rows of {columns} entries need more programs than run at the same time on {processors} multiprocessors"
        )
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
        return _DTYPES
    if not spec.norm.exponential:
        return "normalizer: {spec.norm.text} has no exponential"
    if spec.scale <= 0:  # signs are those of the products
        return "scale: expected a number above 0, got {spec.scale:g}"
    if query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] < tuning.FEWEST_SCORES:
        return "query, key: {all_scores} scores; describing tensors to the GPU pays from {tuning.FEWEST_SCORES} on"
    if mask is not None:
        return _MASK
    if spec.left >= 0:
        return "window: these kernels have none, got {spec.left} keys before a query"
    if spec.softcap and query.dtype == torch.float16:  # that of the hardware is off by 2^-11: docs/kernels.md
        return "softcap: the fast tanh is not precise enough for torch.float16, got {spec.softcap:g}"
    if spec.dropout_p:
        return "dropout_p: these kernels have no dropout, got {spec.dropout_p:g}"
    if width not in (64, 128) or width != padded(value.shape[-1]):
        return _WIDTHS
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
        return _DTYPE
    if keys < tuning.FEWEST_CACHED:
        return "key: {keys} keys of all heads; describing the cache to the GPU pays from {tuning.FEWEST_CACHED} on"
    if query.shape[1] // key.shape[1] * query.shape[2] > 32:
        return "query: expected at most 32 rows (queries times query heads of a key head), got {rows}"
    if mask is not None:
        return _MASK
    if spec.norm.exponential and spec.eps > tuning.LARGEST_OPTIMISTIC_EPS:
        return "eps: expected at most {tuning.LARGEST_OPTIMISTIC_EPS:g}, got {spec.eps:g}"
    if padded(key.shape[-1]) not in (64, 128) or padded(value.shape[-1]) not in (64, 128):
        return "key, value: expected head dimensions from 33 to 128, got {key.shape[3]} and {value.shape[3]}"
    if key.dtype != query.dtype and not padded(key.shape[-1]) == padded(value.shape[-1]) == 128:
        return "key, value: expected head dimensions from 65 to 128 in fp8, got {key.shape[3]} and {value.shape[3]}"
    if page % 64:
        return "block_table: expected pages of a multiple of 64 positions, got {page}"
    if not (_fetchable(key, query.dtype) and _fetchable(value, query.dtype)):
        return _NOT_FETCHABLE
    return None


_NOT_FETCHABLE = (
    "{unfetchable}: the tensor memory accelerator takes no such strides (16-byte alignment, unit stride in the last dimension, "
    "not empty, not expanded)"
)


def sentence(
    choice: Choice,
    spec: AttentionSpec | None,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    mask: Tensor | None = None,
    longest: tuple[int, int] = (0, 0),
    page: int = 0,
    keys: int = 0,
) -> str | None:
    """The reason of a choice with the figures of the call; ``query`` alone: rows of :func:`rows_kernel`."""
    if choice.reason is None:
        return None
    place = str(query.device)
    if query.get_device() >= 0 and not interpreted():
        place += " (ROCm)" if torch.version.hip is not None else f" (compute capability {capability(query)})"
    facts: dict[str, Any] = {"columns": query.shape[-1], "strides": query.stride(), "place": place}
    if key is None or value is None:
        facts["processors"] = tuning.multiprocessors(query.get_device()) if query.get_device() >= 0 else 0
    else:
        b, heads, tq, _ = query.shape
        given = {"query": query, "key": key, "value": value}
        facts |= {"scores": b * heads * longest[0] * longest[1], "all_scores": b * heads * tq * key.shape[2]}
        facts["rows"] = heads // max(1, key.shape[1]) * tq
        facts["mask_shape"] = None if mask is None else tuple(mask.shape)
        facts["unfetchable"] = (
            ", ".join(f"{name} {x.stride()}" for name, x in given.items() if not _fetchable(x, query.dtype)) or "output"
        )
    return choice.reason.format(
        spec=spec,
        query=query,
        key=key,
        value=value,
        page=page,
        keys=keys,
        tuning=tuning,
        triton=triton.__version__,
        **facts,
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
    if interpreted() or torch.version.hip is not None or x.is_meta:
        return 0
    if isinstance(x, FakeTensor) and not torch.cuda.is_available():
        return 0
    return _major(x.get_device())


@functools.cache
def _major(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _not_on_hopper(x: Tensor) -> str | None:
    """Why the kernels of ``hopper/`` do not run on the tensor's device."""
    if capability(x) != 9:
        return _ELSEWHERE
    if _no_hopper is not None:
        fall_back(_no_hopper, PORTABLE_TAKES)
    return _NO_HOPPER if hopper is None else None


def why_no_hopper() -> str | None:
    """Why the kernels for Hopper GPUs could not be loaded; None if they were, or where Triton's interpreter runs."""
    return None if _no_hopper is None else str(_no_hopper)


def _fetchable(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor memory accelerator takes this as ``dtype``, or as pairs of numbers in fp8.

    It wants multiples of 16 bytes, nothing empty, nothing expanded.
    """
    b, h, t, d = x.stride()
    pairs = x.dtype == torch.float8_e4m3fn and x.shape[-1] % 2 == 0
    there = (x.dtype == dtype or pairs) and x.numel() > 0 and _aligned(x)
    return there and d == 1 and (b | h | t) * x.element_size() % 16 == 0 and 0 not in (b, h, t)


def in_pairs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a cache in fp8 is read two numbers at a time: bits are moved to 16-bit formats by NVIDIA's instructions."""
    if capability(query) < 8 or query.dtype == torch.float32:
        return False
    return all(
        x.stride(-1) == 1 and x.shape[-1] % 2 == 0 and padded(x.shape[-1]) >= 32 and not any(n % 2 for n in x.stride()[:-1])
        and x.storage_offset() % 2 == 0 and x.data_ptr() % 2 == 0
        for x in (key, value)
    )  # fmt: skip


def _aligned(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) or x.data_ptr() % 16 == 0  # a fake one has no address


def _in_16_bytes(x: Tensor) -> bool:
    """Whether rows begin and end at multiples of 16 bytes."""
    entries = 16 // x.element_size()
    return x.shape[1] % entries == 0 and x.stride(0) % entries == 0 and _aligned(x)
