"""Which backend takes a call, and why another does not."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from softpick.normalizers import NORMALIZERS, Normalizer
from softpick.ops.operators import HAS_TRITON, interpreted
from softpick.ops.transforms import has_tangent

__all__ = ["BACKENDS"]


BACKENDS = ("auto", "reference", "tiled", "triton", "sdpa")
"""``auto`` chooses; ``reference``: full matrix, can return weights; ``tiled``: O(T) memory, for the CPU; ``triton``: GPU
kernels; ``sdpa``: torch's softmax."""


SOFTMAX = NORMALIZERS["softmax"]


TRITON_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


TRITON_WIDEST = 256  # head dimension


# Up to here a group's queries are one tile that every key is read once for; with more, tiles over queries are faster.
DECODE_ROWS, DECODE_QUERIES = 128, 16


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
    if rows > DECODE_ROWS:
        return (
            f"query: expected at most {DECODE_ROWS} rows (queries times query heads of a key head) for decoding with the "
            f"'triton' backend, got {rows}; use scaled_dot_product_attention"
        )
    return None


warned: set[str] = set()


def choose_backend(
    backend: str, q: Tensor, v: Tensor, norm: Normalizer, otherwise: str, rows: int = 0, *, wanted: bool = False
) -> str:
    """The backend that runs: what was named or an error; for ``"auto"`` Triton on a GPU, else ``otherwise``.

    ``wanted``: a derivative is taken that only the reference has.
    """
    if wanted and backend == "auto":
        return "reference"
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        reason = triton_refuses(q, v, norm, rows)
        if reason is None:
            return "triton"
        if backend == "triton":
            raise ValueError(reason)
        if q.dtype != torch.float64 and reason not in warned:  # fp64 on a GPU is for tests
            warned.add(reason)
            warnings.warn(
                f"{reason}. backend='auto' takes {otherwise!r} here, which is slow", UserWarning, stacklevel=3
            )
    return otherwise if backend == "auto" else backend


def operator_name(named: str, chosen: str) -> str:
    """What an operator is told: with ``"auto"`` for Triton, tiles of torch take the place of a kernel that cannot be built."""
    return "auto" if (named, chosen) == ("auto", "triton") else chosen


def few_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None) -> bool:
    """Whether this is decoding: few rows a key head, and no derivative or transform, which the decode kernel does not have."""
    if torch._C._are_functorch_transforms_active() or has_tangent(q, k, v, mask, sink):
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mask, sink)):
        return False
    groups = q.shape[1] // k.shape[1] if k.shape[1] else 1
    return q.shape[2] <= DECODE_QUERIES and groups * q.shape[2] <= DECODE_ROWS
