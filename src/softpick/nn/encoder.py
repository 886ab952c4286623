"""A transformer over a short window that summarises it in its last position (after Edifice.Blocks.Softpick)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from softpick.nn.attention import Attention
from softpick.ops import numbers

__all__ = ["SequenceEncoder"]


class SequenceEncoder(nn.Module):
    """Pre-norm causal transformer, ``(batch, time, embed_dim)`` to ``(batch, hidden_size)``.

    Args:
        embed_dim: width of the input at each time step.
        hidden_size: width of the model and of the output.
        num_heads: attention heads; divides ``hidden_size``.
        num_layers: blocks of attention and feed-forward.
        dropout: dropout on weights and on what the blocks add, while training.
        window_size: time steps that inputs usually have. Position codes are prepared for this many; longer inputs work.
        normalizer: a name of ``softpick.NORMALIZERS``.

    Raises:
        TypeError: for what is no number.
        ValueError: for numbers out of range, heads that do not divide ``hidden_size``, an unknown normalizer, or an input of
            another width.
    """

    positions: Tensor

    def __init__(
        self,
        embed_dim: int,
        hidden_size: int = 256,
        num_heads: int = 4,
        num_layers: int = 6,
        dropout: float = 0.1,
        window_size: int = 60,
        normalizer: str = "softpick",
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "hidden_size": hidden_size, "num_heads": num_heads, "window_size": window_size}
        for name, size in sizes.items():
            numbers.integer(name, size, 1)
        numbers.integer("num_layers", num_layers, 0)
        numbers.probability("dropout", dropout)
        self.embed_dim, self.hidden_size = embed_dim, hidden_size
        self.project = nn.Linear(embed_dim, hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads, dropout, normalizer) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", _sinusoids(window_size, hidden_size), persistent=False)

    @property
    def output_size(self) -> int:
        """Width of the output."""
        return self.hidden_size

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """``(B, T, embed_dim)`` to ``(B, hidden_size)``; ``attn_mask`` broadcasts to ``(B, H, T, T)``."""
        if x.dim() != 3 or x.shape[-1] != self.embed_dim or x.shape[1] == 0:
            raise ValueError(f"x: expected (batch, time >= 1, {self.embed_dim}), got {tuple(x.shape)}")
        time = x.shape[1]
        codes = (
            self.positions[:time] if time <= len(self.positions) else _sinusoids(time, self.hidden_size).to(x.device)
        )
        h = self.dropout(self.project(x) + codes.to(x.dtype))
        for block in self.blocks:
            h = block(h, attn_mask)
        return self.norm(h[:, -1])


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, normalizer: str) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, normalizer=normalizer, is_causal=True, dropout=dropout, bias=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), attn_mask=attn_mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def _sinusoids(time: int, width: int) -> Tensor:
    """``(time, width)`` sine and cosine position codes (Vaswani et al. 2017)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(time)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]
