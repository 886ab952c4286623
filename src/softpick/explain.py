"""Which backend and kernels a call of attention takes, and why not faster ones."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from softpick.normalizers import Normalizer
from softpick.ops import switch
from softpick.ops.backends import find_backend
from softpick.ops.calls import CacheCall, Call, attention_backend, check_cache_call, check_call, is_decoding
from softpick.ops.key_bounds import KeyBounds
from softpick.ops.operators import call_spec
from softpick.ops.transforms import wants_reference
from softpick.ops.vector import takes_rows_kernel

__all__ = ["Explanation", "KernelChoice", "explain_backend", "explain_rows"]


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
    key_bounds: KeyBounds | None = None,
    max_error: float = 0.0,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Explanation:
    """Say which backend and kernels a call takes, and why not faster ones, without computing it.

    The arguments are those of :func:`softpick.scaled_dot_product_attention`; with ``cu_seqlens_q`` those of
    :func:`softpick.varlen_attention`; with ``decode=True``, ``cache_seqlens``, ``block_table``, ``key_bounds`` or a
    scale those of :func:`softpick.decode_attention` (``key`` and ``value`` are its caches). They are checked as that function
    checks them.
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
        key_bounds: likewise.
        max_error: likewise.
        key_scale: likewise.
        value_scale: likewise.

    Returns:
        A record whose ``str`` is what a person reads.

    Raises:
        TypeError: as the function that the arguments are those of.
        ValueError: likewise, and for arguments of two functions at a time.
    """
    decode = decode or any(x is not None for x in (cache_seqlens, block_table, key_bounds, key_scale, value_scale))
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if decode and packed:
        raise ValueError(
            "cu_seqlens_q: packed sequences have no cache; give cu_seqlens_q, or cache_seqlens, block_table and key_bounds"
        )
    if packed and (cu_seqlens_q is None or cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: expected the starts of the sequences, because the other one is given; got None")
    only_plain = {"attn_mask": attn_mask is not None, "return_weights": return_weights}
    only_packed = {"max_seqlen_q": max_seqlen_q is not None, "max_seqlen_k": max_seqlen_k is not None}
    only_decoding = {"max_error": max_error != 0}
    not_decoding = {"dropout_p": dropout_p != 0, "causal_alignment": causal_alignment is not None} | only_packed
    for arguments, lacking, reason in (
        (only_plain, decode or packed, "packed sequences and decoding have no such argument"),
        (not_decoding, decode, "decode_attention has no such argument"),
        (only_decoding, not decode, "only decode_attention has this argument; give decode=True"),
        (only_packed, not packed, "only packed sequences have this argument, and cu_seqlens_q was not given"),
    ):
        for name, given in arguments.items():
            if given and lacking:
                raise ValueError(f"{name}: {reason}")
    options: Any = {"scale": scale, "normalizer": normalizer, "backend": backend, "window": window, "softcap": softcap}
    options |= {"sink": sink, "eps": eps, "enable_gqa": (decode or packed) if enable_gqa is None else enable_gqa}
    if decode:
        causal = True if is_causal is None else is_causal
        cache: Any = {"cache_seqlens": cache_seqlens, "block_table": block_table, "key_bounds": key_bounds}
        cache |= {"max_error": max_error, "key_scale": key_scale, "value_scale": value_scale}
        return _of_cache(
            check_cache_call(query, key, value, is_causal=causal, **cache, **options), backend, block_table is not None
        )
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        options["packed"] = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    call = check_call(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=False if is_causal is None else is_causal,
        causal_alignment=causal_alignment or ("bottom_right" if packed else "top_left"), return_stats=return_stats,
        return_weights=return_weights, **options,
    )  # fmt: skip
    return _of_attention(call, backend)


def _of_attention(call: Call, backend: str) -> Explanation:
    """:func:`explain_backend` without a cache."""
    function = "scaled_dot_product_attention" if call.longest is None else "varlen_attention"
    rule = str(switch.active())
    found = attention_backend(call, backend)
    if found.name == "sdpa":
        return Explanation(function, "sdpa", (), (), rule)
    refused = []
    if call.longest is None and call.norm.name == "softmax":
        reason = found.reason
        if call.lacking is not None:
            reason = call.lacking.format(call=call)
        elif reason is None:  # the kernels were asked for
            source = "backend: the call" if backend != "auto" else switch.active().source
            reason = f"{source} names {found.name!r}"
        refused.append(("sdpa", reason))
    if found.reason is not None:
        refused.append(("triton", found.reason))
    kernels: tuple[KernelChoice, ...] = ()
    if found.name == "triton":
        spec = call_spec(
            call.norm.text, call.scale, call.eps, call.left, call.right, call.bottom_right, call.softcap or 0.0,
            call.dropout_p, rule,
        )  # fmt: skip
        if is_decoding(call):
            kernels = (_decode_kernel(spec, call.q, call.k, call.v, call.mask, 0, call.k.shape[2]),)
        else:
            kernels = _kernels(spec, call)
    return Explanation(function, found.name, kernels, tuple(refused), rule)


def _of_cache(call: CacheCall, backend: str, paged: bool) -> Explanation:
    """:func:`explain_backend` for ``decode_attention``."""
    rule = str(switch.active())
    wanted = wants_reference(call.query, call.key, call.value, call.sink)
    found = find_backend(backend, call.query, call.value, call.norm, "reference", call.rows, wanted=wanted)
    kernels: tuple[KernelChoice, ...] = ()
    if found.name == "triton":
        spec = call_spec(
            call.norm.text, call.scale, call.eps, call.left, call.right, True, call.softcap or 0.0, 0.0, rule
        )  # fmt: skip
        page = call.key.shape[2] if paged else 0
        listed = call.bounds is not None
        kernels = (_decode_kernel(spec, call.query, call.key, call.value, None, page, call.room, listed),)
    refused = () if found.reason is None else (("triton", found.reason),)
    return Explanation("decode_attention", found.name, kernels, refused, rule)


def _decode_kernel(
    spec: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, page: int, room: int, listed: bool = False
) -> KernelChoice:
    from softpick.ops.triton import dispatch

    keys = q.shape[0] * k.shape[1] * room
    choice = dispatch.decode_kernel(spec, q, k, v, mask, page, keys, listed)
    reason = dispatch.sentence(choice, spec, q, k, v, mask, page=page, keys=keys)
    return KernelChoice("forward", choice.kernel, reason)


def _kernels(spec: Any, call: Call) -> tuple[KernelChoice, ...]:
    """Forward, and backward where a gradient is recorded."""
    from softpick.ops.triton import dispatch

    packed, longest = call.longest is not None, call.longest or (call.q.shape[2], call.k.shape[2])
    forward = dispatch.forward_kernel(spec, call.q, call.k, call.v, call.mask, packed, call.stats, None, longest)
    tensors = call.q, call.k, call.v, call.mask, call.sink
    choices = [("forward", forward)]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        mask_grad = call.mask is not None and call.mask.requires_grad
        backward = dispatch.backward_kernel(spec, call.q, call.k, call.v, call.mask, packed, mask_grad, None)
        choices.append(("backward", backward))
    of = spec, call.q, call.k, call.v, call.mask, longest
    return tuple(KernelChoice(step, choice.kernel, dispatch.sentence(choice, *of)) for step, choice in choices)


def explain_rows(x: Tensor, dim: int = -1) -> Explanation:
    """:func:`explain_backend` for ``softpick.softpick(x, dim)``."""
    rule = str(switch.active())
    if not takes_rows_kernel(x, dim):
        return Explanation("softpick", "reference", (), (), rule)
    from softpick.ops.triton import dispatch

    rows, without = x.detach().transpose(dim, -1).reshape(-1, x.shape[dim]), switch.active().without
    choices = [("forward", dispatch.rows_kernel("forward", rows, (), without))]
    if torch.is_grad_enabled() and x.requires_grad:
        choices.append(("backward", dispatch.rows_kernel("backward", rows, (rows,), without)))
    kernels = [KernelChoice(step, choice.kernel, dispatch.sentence(choice, None, rows)) for step, choice in choices]
    return Explanation("softpick", "triton", tuple(kernels), (), rule)
