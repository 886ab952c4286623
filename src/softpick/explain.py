"""Which backend and kernels a call of attention takes, and why not faster ones."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from softpick.normalizers import Normalizer, get_normalizer
from softpick.ops import numbers, switch
from softpick.ops.arguments import (
    canonical_mask,
    canonical_shapes,
    check_alignment,
    check_cache,
    check_heads,
    check_lengths,
    check_offsets,
    check_qkv,
    check_sink,
    check_softcap,
    default_eps,
    default_scale,
    to_autocast_dtype,
    window_bounds,
)
from softpick.ops.backends import check_backend, few_queries, find_backend, plain_softmax, takes_sdpa
from softpick.ops.operators import call_spec
from softpick.ops.transforms import wants_reference

__all__ = ["Explanation", "KernelChoice", "explain_backend"]


class KernelChoice(NamedTuple):
    """A kernel of the Triton backend that a call takes."""

    step: str
    """``"forward"`` or ``"backward"``."""
    file: str
    """The file below ``softpick/ops/triton`` that holds it."""
    refused: str | None
    """Why the kernel for Hopper GPUs is not taken; None where it is."""


class Explanation(NamedTuple):
    """What :func:`explain_backend` found; ``str`` gives it in sentences."""

    function: str
    """The public function that the arguments are those of."""
    backend: str
    """``"sdpa"``, ``"triton"``, ``"tiled"`` or ``"reference"``."""
    kernels: tuple[KernelChoice, ...]
    """Empty unless the backend is ``"triton"``."""
    refused: tuple[tuple[str, str], ...]
    """Faster backends that are not taken, and why."""
    switch: str
    """What ``SOFTPICK_BACKEND`` and :func:`softpick.use_backend` say; ``"auto"``: nothing."""

    def __str__(self) -> str:
        lines = [f"{self.function}: backend {self.backend!r}"]
        lines += [f"  not {name!r}: {reason}" for name, reason in self.refused]
        for kernel in self.kernels:
            lines.append(f"  {kernel.step}: softpick/ops/triton/{kernel.file}")
            if kernel.refused is not None:
                lines.append(f"    not a kernel for Hopper GPUs: {kernel.refused}")
        if self.switch != "auto":
            lines.append(f"  switch: {self.switch}")
        return "\n".join(lines)


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool | None = None,
    scale: float | None = None,
    enable_gqa: bool | None = None,
    *,
    normalizer: str | Normalizer = "softpick",
    backend: str = "auto",
    causal_alignment: Literal["top_left", "bottom_right"] | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    eps: float | None = None,
    return_stats: bool = False,
    return_weights: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    decode: bool = False,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Explanation:
    """Which backend and kernels a call takes, and why not faster ones. Nothing is computed.

    The arguments are those of :func:`softpick.scaled_dot_product_attention`; with ``cu_seqlens_q`` those of
    :func:`softpick.varlen_attention`; with ``decode=True``, ``cache_seqlens`` or ``block_table`` those of
    :func:`softpick.decode_attention` (``key`` and ``value`` are its caches). They are checked as that function checks them.
    The answer holds for this call in this place: gradients that are recorded, autocast, and ``softpick.use_backend`` count.

    Args:
        query: as in the function that the arguments are those of, and so for all that is not listed here.
        key: likewise.
        value: likewise.
        attn_mask: likewise; only of ``scaled_dot_product_attention``.
        dropout_p: likewise.
        is_causal: likewise; None: that function's default (True for ``decode_attention``, else False).
        scale: likewise.
        enable_gqa: likewise; None: that function's default (False for ``scaled_dot_product_attention``, else True).
        normalizer: likewise.
        backend: likewise.
        causal_alignment: likewise; None: that function's default.
        window: likewise.
        softcap: likewise.
        sink: likewise.
        eps: likewise.
        return_stats: likewise.
        return_weights: likewise.
        cu_seqlens_q: likewise.
        cu_seqlens_k: likewise.
        max_seqlen_q: likewise.
        max_seqlen_k: likewise.
        decode: whether the arguments are those of ``decode_attention``.
        cache_seqlens: likewise.
        block_table: likewise.

    Returns:
        A record whose ``str`` is what a person reads.

    Raises:
        TypeError: as the function that the arguments are those of.
        ValueError: likewise, and for arguments of two functions at a time.
    """
    decode = decode or cache_seqlens is not None or block_table is not None
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if decode and packed:
        raise ValueError(
            "cu_seqlens_q: packed sequences have no cache; give cu_seqlens_q, or cache_seqlens and block_table"
        )
    if packed and (cu_seqlens_q is None or cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: expected the starts of the sequences, because the other one is given; got None")
    only_plain = {"attn_mask": attn_mask is not None, "return_weights": return_weights}
    for name, given in only_plain.items():
        if given and (decode or packed):
            raise ValueError(f"{name}: packed sequences and decoding have no such argument")
    norm = get_normalizer(normalizer)
    options: dict[str, Any] = {
        "norm": norm,
        "scale": scale,
        "eps": eps,
        "softcap": softcap,
        "sink": sink,
        "window": window,
    }
    grouped = (decode or packed) if enable_gqa is None else enable_gqa
    if decode:
        causal = True if is_causal is None else is_causal
        options["enable_gqa"] = grouped
        return _of_cache(query, key, value, cache_seqlens, block_table, causal, backend, options)
    options |= {
        "attn_mask": attn_mask,
        "dropout_p": numbers.probability("dropout_p", dropout_p),
        "is_causal": bool(is_causal),
        "alignment": causal_alignment or ("bottom_right" if packed else "top_left"),
        "return_stats": return_stats,
        "return_weights": return_weights,
    }
    check_backend(backend)
    query, key, value = to_autocast_dtype(check_qkv(query, key, value, packed))
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _of_attention(query, key, value, grouped, None, backend, options)
    longest = (
        check_offsets("cu_seqlens_q", cu_seqlens_q, query, max_seqlen_q, "max_seqlen_q"),
        check_offsets("cu_seqlens_k", cu_seqlens_k, key, max_seqlen_k, "max_seqlen_k"),
    )
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return _of_attention(query, key, value, grouped, longest, backend, options)


def _of_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    enable_gqa: bool,
    longest: tuple[int, int] | None,
    backend: str,
    options: dict[str, Any],
) -> Explanation:
    """:func:`explain_backend` without a cache; ``longest``: queries and keys of the longest packed sequence, or None."""
    norm, sink, is_causal, dropout_p = (options[name] for name in ("norm", "sink", "is_causal", "dropout_p"))
    packed, rule = longest is not None, str(switch.active())
    check_alignment(options["alignment"])
    bottom_right = options["alignment"] == "bottom_right"
    q, k, v, lead = canonical_shapes(query, key, value, enable_gqa)
    mask = canonical_mask(options["attn_mask"], lead, q, k)
    left, right = window_bounds(options["window"], is_causal)
    check_sink(sink, norm, q.shape[1], q)
    scale = default_scale(options["scale"], q.shape[-1])
    softcap, eps = check_softcap(options["softcap"]), default_eps(options["eps"], norm)
    function = "varlen_attention" if packed else "scaled_dot_product_attention"
    refused = []
    if not packed:
        plain = not (options["return_stats"] or options["return_weights"]) and plain_softmax(
            norm, eps, softcap, left, right, is_causal, options["attn_mask"], bottom_right, q, k
        )
        if plain and (backend == "sdpa" or (backend == "auto" and takes_sdpa(q, k, v, mask))):
            return Explanation(function, "sdpa", (), (), rule)
        if norm.name == "softmax":
            other = "another backend is named, or a derivative is asked for that only the reference has"
            refused.append(("sdpa", other if plain else "an option that torch's kernels lack"))
    if options["return_weights"]:
        refused.append(("triton", "return_weights: kernels never form the weights"))
        return Explanation(function, "reference", (), tuple(refused), rule)
    found = find_backend(backend, q, v, norm, "tiled", wanted=wants_reference(q, k, v, mask, sink))
    if found.reason is not None:
        refused.append(("triton", found.reason))
    kernels: tuple[KernelChoice, ...] = ()
    if found.name == "triton":
        stats = options["return_stats"]
        spec = call_spec(norm.text, scale, eps, left, right, bottom_right, softcap or 0.0, dropout_p, rule)
        if not (packed or dropout_p or stats) and few_queries(q, k, v, mask, sink):
            kernels = (_decode_kernel(spec, q, k, v, mask, 0, k.shape[2]),)
        else:
            kernels = _kernels(spec, q, k, v, mask, sink, packed, stats, longest or (q.shape[2], k.shape[2]))
    return Explanation(function, found.name, kernels, tuple(refused), rule)


def _of_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    table: Tensor | None,
    is_causal: bool,
    backend: str,
    options: dict[str, Any],
) -> Explanation:
    """:func:`explain_backend` for ``decode_attention``."""
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend: expected one of auto, triton, reference for decoding; got {backend!r}")
    room = check_cache(query, key, value, table)
    check_heads(query, key.shape[1 if table is None else 2], options["enable_gqa"])
    query, key, value = to_autocast_dtype((query, key, value))
    if lengths is not None:
        check_lengths(lengths, query, room)
    norm, sink = options["norm"], options["sink"]
    check_sink(sink, norm, query.shape[1], query)
    left, right = window_bounds(options["window"], is_causal)
    k, v = (x if table is None else x.transpose(1, 2) for x in (key, value))
    groups = query.shape[1] // k.shape[1] if k.shape[1] else 1
    wanted = wants_reference(query, k, v, sink)
    found = find_backend(backend, query, v, norm, "reference", groups * query.shape[2], wanted=wanted)
    kernels: tuple[KernelChoice, ...] = ()
    if found.name == "triton":
        spec = call_spec(
            norm.text, default_scale(options["scale"], query.shape[-1]), default_eps(options["eps"], norm), left, right, True,
            check_softcap(options["softcap"]) or 0.0, 0.0, str(switch.active()),
        )  # fmt: skip
        kernels = (_decode_kernel(spec, query, k, v, None, 0 if table is None else k.shape[2], room),)
    refused = () if found.reason is None else (("triton", found.reason),)
    return Explanation("decode_attention", found.name, kernels, refused, str(switch.active()))


def _decode_kernel(
    spec: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, page: int, room: int
) -> KernelChoice:
    from softpick.ops.triton import dispatch

    choice = dispatch.decode_kernel(spec, q, k, v, mask, page, q.shape[0] * k.shape[1] * room)
    return KernelChoice("forward", choice.kernel, choice.reason)


def _kernels(
    spec: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    packed: bool,
    stats: bool,
    longest: tuple[int, int],
) -> tuple[KernelChoice, ...]:
    """Forward, and backward where a gradient is recorded."""
    from softpick.ops.triton import dispatch

    forward = dispatch.forward_kernel(spec, q, k, v, mask, packed, stats, None, longest)
    kernels = [KernelChoice("forward", forward.kernel, forward.reason)]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mask, sink)):
        mask_grad = mask is not None and mask.requires_grad
        backward = dispatch.backward_kernel(spec, q, k, v, mask, packed, mask_grad, None)
        kernels.append(KernelChoice("backward", backward.kernel, backward.reason))
    return tuple(kernels)
