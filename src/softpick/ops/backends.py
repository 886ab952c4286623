"""Which backend takes a call, and why another does not."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from softpick.normalizers import NORMALIZERS, Normalizer
from softpick.ops import switch
from softpick.ops.calling import HAS_TRITON, interpreted
from softpick.ops.transforms import has_tangent, wants_reference

__all__ = ["BACKENDS"]


BACKENDS = ("auto", "reference", "tiled", "triton", "sdpa")
"""``auto`` chooses; ``reference``: full matrix, can return weights; ``tiled``: O(T) memory, for the CPU; ``triton``: GPU
kernels; ``sdpa``: torch's softmax."""


SOFTMAX = NORMALIZERS["softmax"]


TRITON_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


TRITON_WIDEST = 256  # head dimension


# Up to here a group's queries are one tile that every key is read once for; with more, tiles over queries are faster.
DECODE_ROWS, DECODE_QUERIES = 128, 16
WIDE_DECODE_ROWS = 64  # in fp32 with more than 128 numbers each: 128 take 152 KiB of shared memory, most GPUs have 99


def decode_rows(q: Tensor, v: Tensor) -> int:
    """How many rows (queries times query heads of a key head) the kernel for few queries takes."""
    wide = q.dtype == torch.float32 and max(q.shape[-1], v.shape[-1]) > 128
    return WIDE_DECODE_ROWS if wide else DECODE_ROWS


def check_backend(backend: str) -> None:
    """Raise for an unknown name of a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")


def triton_refuses(q: Tensor, v: Tensor, norm: Normalizer, rows: int = 0) -> str | None:
    """Why the Triton backend cannot take ``(B, H, T, D)`` queries and values; None if it can. ``rows`` counts in decoding."""
    if not HAS_TRITON:
        return (
            "backend: 'triton' needs the package triton, which is not installed; torch for CUDA on Linux brings it, else: "
            "pip install 'triton>=3.6'"
        )
    # while compiling the environment cannot be read; there the operator refuses when it runs
    if not q.is_cuda and not q.is_meta and not torch.compiler.is_compiling() and not interpreted():
        return f"query: expected a CUDA tensor for the 'triton' backend, got one on {q.device}; choose 'auto'"
    if q.dtype not in TRITON_FLOATS:
        return f"query: expected fp32, bf16 or fp16 for the 'triton' backend, got {q.dtype}"
    if not norm.has_kernels:
        return (
            f"normalizer: the 'triton' backend has no kernels for {norm.text}; choose 'tiled' or 'reference', which compute "
            "every record"
        )
    for name, x in (("query", q), ("value", v)):
        if not 1 <= x.shape[-1] <= TRITON_WIDEST:
            return f"{name}: expected a head dimension from 1 to {TRITON_WIDEST} for the 'triton' backend, got {x.shape[-1]}"
    if v.dtype == torch.float8_e4m3fn and q.is_cuda and not torch.compiler.is_compiling() and not torch.version.hip:
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 9):
            return (
                "value_cache: torch.float8_e4m3fn needs a GPU of compute capability 8.9 (Ada) or newer for the 'triton' "
                f"backend, got {capability[0]}.{capability[1]}; keep the cache in bf16 or fp16"
            )
    if rows > decode_rows(q, v):
        return (
            f"query: expected at most {decode_rows(q, v)} rows (queries times query heads of a key head) for decoding with the "
            f"'triton' backend, got {rows}; use scaled_dot_product_attention"
        )
    return None


warned: set[str] = set()


def sdpa_lacks(
    norm: Normalizer,
    eps: float,
    softcap: float | None,
    left: int,
    right: int,
    is_causal: bool,
    mask: Tensor | None,
    bottom_right: bool,
    q: Tensor,
    k: Tensor,
) -> str | None:
    """What torch's ``scaled_dot_product_attention`` lacks, with figures of the call in braces; None if it computes the same."""
    if norm.switches[:-1] != SOFTMAX.switches[:-1]:  # all but eps
        return "normalizer: torch's kernels compute softmax alone, got {call.norm.text}"
    if eps != 0.0:
        return "eps: torch's kernels add none to the denominator, got {call.eps:g}"
    if softcap is not None:
        return "softcap: torch's kernels have none, got {call.softcap:g}"
    if (left, right) not in ((-1, -1), (-1, 0)):
        return "window: torch's kernels have none, got {call.left} keys before and {call.right} after a query (-1: all)"
    if is_causal and mask is not None:
        return "attn_mask: torch documents a mask beside is_causal as an error"
    if bottom_right and right >= 0 and q.shape[2] != k.shape[2]:
        return (
            "causal_alignment: torch's kernels have 'top_left' alone, got 'bottom_right' with {call.q.shape[2]} queries and "
            "{call.k.shape[2]} keys"
        )
    return None


def takes_sdpa(*tensors: Tensor | None) -> bool:
    """Whether ``"auto"`` takes torch's kernels for plain softmax."""
    return switch.active().backend == "auto" and not wants_reference(*tensors)


class Backend(NamedTuple):
    """A backend and why the faster one does not take the call."""

    name: str
    reason: str | None = None
    """Why it is not ``"triton"``; None where it is."""
    warn: bool = False
    """Whether a user should know that the call is slow."""


def find_backend(
    backend: str, q: Tensor, v: Tensor, norm: Normalizer, otherwise: str, rows: int = 0, *, wanted: bool = False
) -> Backend:
    """The backend that runs: the named one, or an error; for ``"auto"`` Triton on a GPU, else ``otherwise``.

    ``wanted``: a derivative is taken that only the reference has.
    """
    rule = switch.active()
    if backend == "auto" and rule.backend != "auto":
        if rule.backend != "triton":  # a function that has no tiles takes what it has without kernels
            name = otherwise if (rule.backend, otherwise) == ("tiled", "reference") else rule.backend
            return Backend(name, f"{rule.source} names {rule.backend!r}")
        backend = "triton"
    if wanted and backend == "auto":
        return Backend(
            "reference", "a forward-mode derivative, or one of a derivative, is taken, which is the reference's alone"
        )
    if backend not in ("auto", "triton"):
        return Backend(backend, f"backend: the call names {backend!r}")
    if backend == "auto" and not q.is_cuda:
        return Backend(otherwise, f"query is on {q.device}, and the Triton kernels need a GPU")
    if backend == "auto" and "triton" in rule.without:
        return Backend(otherwise, f"{rule.source} leaves 'triton' out")
    reason = triton_refuses(q, v, norm, rows)
    if rows and "decode" in rule.without:
        reason = f"backend: {rule.source} leaves 'decode' out, which is all that 'triton' has for a cache"
        if backend == "auto":
            return Backend(otherwise, reason)
    if reason is None:
        return Backend("triton")
    if backend == "triton":
        raise ValueError(reason)
    return Backend(otherwise, reason, q.dtype != torch.float64)  # fp64 on a GPU is for tests


def choose_backend(
    backend: str, q: Tensor, v: Tensor, norm: Normalizer, otherwise: str, rows: int = 0, *, wanted: bool = False
) -> str:
    """The name of the backend that :func:`find_backend` finds, after :func:`announce`."""
    found = find_backend(backend, q, v, norm, otherwise, rows, wanted=wanted)
    announce(found, 4)
    return found.name


def announce(found: Backend, stacklevel: int = 3) -> None:
    """Warn where tensors of a GPU are computed by a slow backend. ``stacklevel`` 3: the warning names the caller's caller."""
    if found.warn and found.reason not in warned:
        warned.add(str(found.reason))
        warnings.warn(
            f"{found.reason}. backend='auto' takes {found.name!r} here, which is slow",
            UserWarning,
            stacklevel=stacklevel,
        )


def operator_name(named: str, chosen: str) -> str:
    """The ``backend`` of an operator: with ``"auto"`` for Triton, tiles of torch replace a kernel that cannot be built.

    Kernel families that the switch leaves out follow with a minus: ``"auto,-hopper"``.
    """
    if chosen != "triton":
        return chosen
    rule = switch.active()
    backend = "auto" if named == "auto" and rule.backend == "auto" else "triton"
    return str(rule._replace(backend=backend)) if rule.without else backend


def few_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None) -> bool:
    """Whether this is decoding: few rows a key head, and no derivative or transform, which the decode kernel does not have."""
    if q.shape[2] > DECODE_QUERIES or "decode" in switch.active().without:
        return False
    if torch._C._are_functorch_transforms_active() or has_tangent(q, k, v, mask, sink):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mask, sink)):
        return False
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    return groups * q.shape[2] <= decode_rows(q, v)
