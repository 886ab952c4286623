"""Caches in fp8 (``torch.float8_e4m3fn``): how keys and values are rounded to it, and the scales that go with them.

A stored number times its scale is what it stands for. docs/decode.md has the error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from softpick.ops.arguments import FLOATS, checkable

__all__ = ["FP8", "LARGEST", "Scales", "check_scales", "power_of_2", "quantize_fp8"]

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3 (``torch.finfo(FP8).max``)."""


def quantize_fp8(x: Tensor, scale: Tensor | None = None, *, paged: bool = False) -> tuple[Tensor, Tensor]:
    """Keys or values in e4m3, and the scale that :func:`softpick.decode_attention` takes beside them.

    What does not fit is the largest number of e4m3, 448 times the scale, with its sign (infinity, too); NaN stays NaN. Numbers
    from ``scale / 64`` to ``448 * scale`` are off by a factor of ``2**-4`` at most, smaller ones by ``scale / 1024``. A finite
    number times its scale stays finite in the dtype of ``x``: near the end of that range it is rounded towards 0 (off by
    ``2**-3`` or ``scale / 512`` then, unless the scale is a power of two). What is infinite stays finite in fp32.

    Args:
        x: ``(B, Hkv, T, D)``, fp64, fp32, bf16 or fp16; with ``paged`` ``(num_blocks, page_size, Hkv, D)``. A whole cache, or
            new keys of it.
        scale: ``(B, Hkv)`` (``paged``: ``(num_blocks, Hkv)``), ``(Hkv,)`` or ``()``, floating point and above 0. If None the
            smallest power of two with which nothing up to ``448 * 2**127`` saturates, one a sequence (or page) and head:
            multiplying with it rounds nothing, also if the result is kept in bf16.
        paged: the layout of ``x``.

    Returns:
        ``x / scale`` in e4m3, of the shape of ``x``, and the scale in fp32: as given, or ``(B, Hkv)`` (``(num_blocks, Hkv)``).

    Raises:
        TypeError: for wrong types and dtypes.
        ValueError: for wrong shapes and devices, and on the CPU for scales that are not positive and finite.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not isinstance(paged, bool):
        raise TypeError(f"paged: expected True or False, got {paged!r}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected a floating-point tensor (fp64, fp32, bf16, fp16), got {x.dtype}")
    if x.dim() != 4:
        layout = "pages (num_blocks, page_size, Hkv, D)" if paged else "(B, Hkv, T, D)"
        raise ValueError(f"x: expected {layout}, got {x.dim()} dimensions {tuple(x.shape)}")
    heads = 2 if paged else 1
    if scale is None:
        magnitudes = torch.where(x.isfinite(), x, 0.0).abs()
        nothing = x.new_zeros(x.shape[0], x.shape[heads])
        scale = each = power_of_2(magnitudes.amax((1, 3) if paged else (2, 3)) if x.numel() else nothing)
    else:
        each = _check_scale("scale", scale, x.shape[0], x.shape[heads], x.device, zero=False)
        scale = scale.float()
    each = each[:, None, :, None] if paged else each[:, :, None, None]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    limit = _largest_stored(torch.finfo(x.dtype).max / each.double()).to(
        work
    )  # no limit in fp64, as scales are in fp32
    if x.dtype == torch.float16:  # a finite number comes back finite in fp16; infinity need not
        limit = torch.where(x.isinf(), _largest_stored(torch.finfo(work).max / each.double()).to(work), limit)
    return (x.to(work) / each).clamp(-limit, limit).to(FP8), scale


def _largest_stored(limit: Tensor) -> Tensor:
    """The largest number of e4m3 that is at most ``limit``: times its scale it stays within the range of a dtype."""
    rounded = limit.clamp(max=LARGEST).to(FP8)
    down = (rounded.view(torch.uint8) - 1).view(FP8)
    return torch.where(rounded.double() > limit, down.double(), rounded.double())


def power_of_2(largest: Tensor) -> Tensor:
    """The smallest power of two (fp32, normal) that times 448 is at least ``largest``; 1 for 0."""
    mantissa, exponent = torch.frexp(largest.double() / LARGEST)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
    return torch.where(largest == 0, 1.0, torch.ldexp(torch.ones_like(mantissa), exponent)).float()


class Scales(NamedTuple):
    """The scales of a cache in e4m3, in fp32."""

    key: Tensor
    """``(B, Hkv)``, or ``(num_blocks, Hkv)`` where ``of_pages``; expanded where a scale is that of several."""
    value: Tensor
    """As ``key``."""
    of_pages: bool
    """Whether each page has its own."""

    def widened(self, x: Tensor, scale: Tensor, dtype: torch.dtype, table: Tensor | None) -> Tensor:
        """``x (B, Hkv, positions, D)`` of this cache times its scale; ``table``: ``(B, blocks)``, its pages."""
        if not self.of_pages:
            return x.to(dtype) * scale[:, :, None, None]
        assert table is not None
        page = x.shape[2] // max(1, table.shape[1])
        return x.to(dtype) * scale[table].transpose(1, 2).repeat_interleave(page, 2)[..., None]


def check_scales(
    key: Tensor, value: Tensor, key_scale: Tensor | None, value_scale: Tensor | None, batch: int, paged: bool
) -> Scales | None:
    """The scales of a cache, checked; None for a cache that is not in fp8. ``batch``: sequences.

    Raises:
        TypeError: for wrong types and dtypes.
        ValueError: for a missing scale or one too many, wrong shapes and devices, negative ones.
    """
    found, heads = [], key.shape[2 if paged else 1]
    for name, cache, scale in (("key", key, key_scale), ("value", value, value_scale)):
        if cache.dtype != FP8:
            if scale is not None:
                raise ValueError(
                    f"{name}_scale: only a cache in torch.float8_e4m3fn has one; {name}_cache is {cache.dtype}"
                )
            continue
        if scale is None:
            raise ValueError(
                f"{name}_scale: expected the scale of {name}_cache, which is in torch.float8_e4m3fn (1 if it has none: "
                "torch.ones((), device=...)); got None"
            )
        found.append(_check_scale(f"{name}_scale", scale, key.shape[0], heads, key.device, paged=paged))
    if not found:
        return None
    of_pages = paged and any(x is not None and x.dim() == 2 for x in (key_scale, value_scale))
    first = key.shape[0] if of_pages else batch
    both = [x if x.shape[0] == first else x[:1].expand(first, heads) for x in found]
    return Scales(both[0], both[1], of_pages)


def _check_scale(
    name: str, scale: Tensor, first: int, heads: int, device: torch.device, *, paged: bool = False, zero: bool = True
) -> Tensor:
    """A scale as fp32 ``(first, heads)``. A page that was never filled may have 0."""
    if not isinstance(scale, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(scale).__name__}")
    if scale.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor (fp64, fp32, bf16, fp16), got {scale.dtype}")
    if tuple(scale.shape) not in ((), (heads,), (first, heads)):
        every = f"({first}, {heads}), one a {'page' if paged else 'sequence'} and head"
        raise ValueError(f"{name}: expected shape (), ({heads},) or {every}; got {tuple(scale.shape)}")
    if scale.device != device:
        raise ValueError(f"{name}: expected the cache's device {device}, got {scale.device}")
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a scale that requires no gradient, which caches in fp8 do not have; call detach()"
        )
    given, scale = scale, scale.float()
    if checkable(scale):
        least = float(scale.min()) if scale.numel() else 1.0
        if not (math.isfinite(least) and bool(scale.isfinite().all()) and (least > 0 or (zero and least == 0))):
            wrong = given[~(scale.isfinite() & (scale >= 0 if zero else scale > 0))].flatten()[0]
            kind = f"{'>= 0' if zero else '> 0'}{' in fp32' if given.dtype == torch.float64 else ''}"
            raise ValueError(f"{name}: expected finite numbers {kind}, got {float(wrong)}")
    return scale.expand(first, heads)
