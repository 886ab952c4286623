"""Attention modules with a choice of normalizer, and what the paper's table 3 adds to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from softpick.functional import linear_softpick, scaled_dot_product_attention, softpick
from softpick.normalizers import Normalizer, get_normalizer, visible
from softpick.ops import numbers
from softpick.ops.arguments import window_bounds

__all__ = ["Attention", "LinearSoftpick", "Softpick", "initial_score_scale", "scaled_by_length", "visible_keys"]


class Softpick(nn.Module):
    """:func:`softpick.softpick` as a module, in the place of ``torch.nn.Softmax``.

    Args:
        dim: dimension to normalize over.
        eps: added to the denominator.
    """

    def __init__(self, dim: int = -1, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.eps = numbers.integer("dim", dim), numbers.number("eps", eps, "a number >= 0", 0.0)

    def forward(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """Any shape to the same shape; ``where`` excludes entries."""
        return softpick(x, self.dim, self.eps, where)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"dim={self.dim}, eps={self.eps}"


class LinearSoftpick(nn.Module):
    """:func:`softpick.linear_softpick` as a module.

    Args:
        dim: dimension to normalize over.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = numbers.integer("dim", dim)

    def forward(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """Any shape to the same shape; ``where`` excludes entries."""
        return linear_softpick(x, self.dim, where)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"dim={self.dim}"


def initial_score_scale(length: int = 1024) -> float:
    """The value at which the factor ``s_h`` of scalable softpick starts.

    ``s_h log n`` is 1 on average over the rows ``n = 1..length`` of a causal sequence of ``length`` tokens.

    Args:
        length: tokens of a sequence; at least 2 are assumed.
    """
    length = max(2, length)
    return length / math.lgamma(length + 1)  # one over the mean of log n, which is log(length!) / length


def visible_keys(
    tq: int,
    tk: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    bottom_right: bool = False,
    window: int | tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """How many keys each query may see: the ``n`` of scalable softpick, paper eq. (8).

    Args:
        tq: number of queries.
        tk: number of keys.
        attn_mask: boolean or additive, ``(..., H or 1, Tq or 1, Tk)``; biases at or below
            ``softpick.normalizers.EXCLUDED_BIAS`` are masked.
        is_causal: whether query ``i`` sees only keys up to its own position.
        bottom_right: whether the last query stands at the last key.
        window: sliding window, as in :func:`softpick.scaled_dot_product_attention`.
        device: device of the result without a mask.

    Returns:
        ``(Tq,)``, or ``(..., H or 1, Tq)`` with a mask; integers.
    """
    device = attn_mask.device if attn_mask is not None else device
    left, right = window_bounds(window, is_causal)
    position = torch.arange(tq, device=device) + (tk - tq if bottom_right else 0)
    first = torch.zeros_like(position) if left < 0 else position - left
    last = torch.full_like(position, tk - 1) if right < 0 else position + right
    if attn_mask is None:
        return (last.clamp(max=tk - 1) - first.clamp(min=0) + 1).clamp(min=0)
    keep = visible(attn_mask)
    if left >= 0 or right >= 0:
        key = torch.arange(tk, device=device)
        keep = keep & (key >= first[:, None]) & (key <= last[:, None])
    return keep.expand(*keep.shape[:-2], tq, tk).sum(-1)


def scaled_by_length(query: Tensor, score_scale: Tensor, n: Tensor) -> Tensor:
    """Multiply queries, and so their scores, by ``score_scale * log n``.

    Args:
        query: ``(B, H, Tq, D)``.
        score_scale: ``(H,)``.
        n: how many keys each query may see; broadcastable to ``(B, H, Tq)``.

    Returns:
        The shape and dtype of ``query``; logarithms are in fp32.
    """
    logs = n.clamp(min=1).float().log()
    return (query * (score_scale.view(-1, 1, 1) * logs[..., None])).to(query.dtype)


class Attention(nn.Module):
    """Multi-head attention with any normalizer, grouped-query heads, and the variants of the paper's table 3.

    Args:
        embed_dim: width of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads; ``num_heads`` if None.
        head_dim: ``embed_dim // num_heads`` if None.
        normalizer: a name of ``softpick.NORMALIZERS``, or a :class:`softpick.Normalizer`; ``learned_sink`` adds the
            parameter ``sink`` ``(H,)``, started at 0 (softmax plus one).
        is_causal: causal attention. With fewer queries than keys the last query stands at the last key.
        window: sliding window, as in :func:`softpick.scaled_dot_product_attention`.
        dropout: dropout on the weights while training.
        bias: biases in the projections.
        output_gate: multiply the heads' outputs elementwise by ``sigmoid(x W_g)`` before the output projection (gated
            attention, Qiu et al. 2025).
        score_scale: multiply the scores by ``s_h log n``, with a learned ``s_h`` per head and ``n`` the number of keys the
            query may see (scalable softpick, paper eq. 8-9). A query that sees one key has ``log n = 0``: its scores are 0,
            and softpick then outputs 0.
        backend: as in :func:`softpick.scaled_dot_product_attention`.

    Raises:
        TypeError: for what is no number or no boolean where one is expected.
        ValueError: for numbers out of range, numbers of heads that do not divide, or an unknown normalizer.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        normalizer: str | Normalizer = "softpick",
        is_causal: bool = False,
        window: int | tuple[int, int] | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        output_gate: bool = False,
        score_scale: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, number in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            numbers.integer(name, number, 1)
        for name, optional in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            if optional is not None:
                numbers.integer(name, optional, 1)
        numbers.flags(is_causal=is_causal, bias=bias, output_gate=output_gate, score_scale=score_scale)
        numbers.probability("dropout", dropout)
        window_bounds(window, False)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.normalizer = get_normalizer(normalizer).text
        self.is_causal, self.window, self.dropout, self.backend = is_causal, window, dropout, backend
        inner = num_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, inner, bias=bias)
        self.k_proj = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(inner, embed_dim, bias=bias)
        self.gate_proj = nn.Linear(embed_dim, inner, bias=bias) if output_gate else None
        self.score_scale = nn.Parameter(torch.full((num_heads,), initial_score_scale())) if score_scale else None
        self.sink = nn.Parameter(torch.zeros(num_heads)) if get_normalizer(normalizer).needs_sink else None

    def forward(self, x: Tensor, context: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Attend from ``x`` to ``context`` (to itself if None).

        Args:
            x: ``(B, Tq, embed_dim)``.
            context: ``(B, Tk, embed_dim)``.
            attn_mask: broadcastable to ``(B, H, Tq, Tk)``, boolean (True takes part) or additive.

        Returns:
            ``(B, Tq, embed_dim)``.
        """
        context = x if context is None else context
        q, k, v = (
            proj(source).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj, source in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        if self.score_scale is not None:
            n = visible_keys(
                q.shape[2],
                k.shape[2],
                attn_mask=attn_mask,
                is_causal=self.is_causal,
                bottom_right=True,
                window=self.window,
                device=q.device,
            )
            log_n = torch.log(n.clamp(min=1).to(q.dtype))[..., None]
            q = q * (self.score_scale.to(q.dtype).view(-1, 1, 1) * log_n)
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
            normalizer=self.normalizer,
            backend=self.backend,
            causal_alignment="bottom_right",
            window=self.window,
            sink=self.sink,
        )
        out = out.transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            out = out * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(out)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, normalizer={self.normalizer!r}"
