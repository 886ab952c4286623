"""The operator for few queries against a cache, by Triton: ``softpick::decode``. There is no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softpick.ops.calling import dense, empty_heads_last, on_device_of, plain, transformed
from softpick.ops.fp8 import Scales
from softpick.ops.kernel_errors import KernelError, fall_back, importing_kernels
from softpick.ops.operators import attention, call_spec
from softpick.ops.reference_layouts import cache_reference

__all__ = ["decode"]


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    lengths: Tensor | None,
    block_table: Tensor | None,
    normalizer: str,
    scale: float,
    eps: float,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    backend: str,
    blocks: Tensor | None = None,
    counts: Tensor | None = None,
    rest: Tensor | None = None,
    block_size: int = 0,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    scaled_pages: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, Tq, Dv)`` and lse ``(B, H, Tq)`` of few queries, by Triton.

    ``key`` is ``(B, Hkv, S, D)``, or with ``block_table`` ``(B, max_blocks)`` a view ``(num_blocks, Hkv, page, D)`` of
    pages. ``lengths`` ``(B,)`` says how many positions are filled.
    ``backend`` is that of ``attention_forward``. With ``block_size``, the first ``counts (B, Hkv)`` of ``blocks (B, Hkv, n)``
    are the blocks of keys that are read, and ``rest (B, H, Tq)`` is what the others add to the denominator.
    ``key_scale`` and ``value_scale`` are those of a cache in fp8: ``(B, Hkv)``, with ``scaled_pages`` ``(num_blocks, Hkv)``.
    """
    out, lse = _empty_decoded(query, value)
    if block_table is not None and block_table.stride(-1) != 1:
        block_table = block_table.contiguous()
    scales = None
    if key_scale is not None and value_scale is not None:
        scales = Scales(key_scale, value_scale, scaled_pages)
    spec = call_spec(normalizer, scale, eps, left, right, bottom_right, softcap, 0.0, backend)
    try:
        with importing_kernels():
            from softpick.ops.triton import launch_decode
        listed = None
        if block_size:
            assert blocks is not None
            assert counts is not None
            assert rest is not None
            listed = launch_decode.Listed(blocks.contiguous(), counts.contiguous(), rest.contiguous(), block_size)
        with on_device_of(query):
            launch_decode.decode(
                spec, query, key, value, mask, dense(sink), dense(lengths), block_table, out, lse, listed, scales
            )
        return out, lse
    except KernelError as failure:
        if spec.backend == "triton":
            raise
        if lengths is None and block_table is None and not block_size and scales is None:
            fall_back(failure, "the kernels for long queries compute it instead")
            found = attention(
                query, key, value, backend=backend, normalizer=normalizer, scale=scale, eps=eps, mask=mask, sink=sink,
                left=left, right=right, bottom_right=bottom_right, softcap=softcap,
            )  # fmt: skip
        else:
            fall_back(failure, "the reference computes it instead, slowly (backend='auto')")
            room = key.shape[2] if block_table is None else block_table.shape[1] * key.shape[2]
            found = cache_reference(
                query, key, value, lengths, block_table, room, left, right, scales, normalizer=spec.norm, scale=scale,
                eps=eps, softcap=softcap or None, sink=sink,
            )  # fmt: skip
    return out.copy_(found[0]), lse.copy_(found[1])


_decode_operator = torch.library.custom_op("softpick::decode", _decode, mutates_args=())


def decode(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """:func:`_decode`, by the operator where :func:`plain` is false or a gradient would be asked for."""
    tensors = [query, key, value, *(x for x in rest if isinstance(x, Tensor))]
    if transformed():
        raise NotImplementedError(
            "decoding by the 'triton' backend has no transforms of torch.func and no forward-mode derivatives; use "
            "backend='reference'"
        )
    watched = not plain(*tensors) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    call: Any = _decode_operator if watched else _decode
    return call(query, key, value, *rest)


def _empty_decoded(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return empty_heads_last(query, value), query.new_empty(query.shape[:3], dtype=torch.float32)


@_decode_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_decoded(query, value)


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        "softpick::decode has no gradient; call softpick.scaled_dot_product_attention, which has one"
    )


_decode_operator.register_autograd(_no_backward)
