"""The metrics of ``docs/metrics.md`` as streaming accumulators: torch only, one layer of one batch at a time.

A :class:`Meter` is fed a batch in this order, and never keeps a map or a hidden state:

    meter = Meter()
    meter.begin_batch(valid, input_ids)                     # which positions are real
    meter.attention(layer, weights, outputs, visible)       # for every layer
    meter.hidden(layer, hidden)                             # for every layer
    measurements = meter.result()

Rows are worked on in blocks of about ``BLOCK_ENTRIES`` weights, so that temporaries are small, whatever ``T``.

Samples are cut to their real positions before anything is computed, so padding (left, right or in between) enters no
metric. Sums are fp64; moments of different batches are combined exactly, so the result does not depend on how the data
was divided into batches (other than by rounding).

Shapes: ``B`` samples, ``T`` positions, ``H`` heads, ``L`` layers, ``C`` channels, ``Dv`` head dimension of the values.
All shares are percent; weights (``alpha``, ``row_mass``) are plain numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softpick.analysis.layers import KEY_SUMS, AttentionLayer, HiddenLayer, NotFiniteError
from softpick.analysis.records import MASSIVE_RATIO, SINK_THRESHOLDS, TILES
from softpick.analysis.results import head_sums, hidden_result, rows_result, sink_result, sparsity_result
from softpick.analysis.streams import FloatHistogram, Moments

__all__ = [
    "MASSIVE_RATIO",
    "MAX_ENTRIES",
    "SINK_THRESHOLDS",
    "TILES",
    "FloatHistogram",
    "Measurements",
    "Meter",
    "Moments",
    "load_meters",
    "save_meters",
]

MAX_ENTRIES = 1 << 25
"""Weights that are in memory at once: 128 MB in fp32, two heads at ``T = 4096``; a few such temporaries make them."""


@dataclass(frozen=True)
class Measurements:
    """What was measured, as plain numbers, lists and dicts (``docs/metrics.md`` has the layout and every definition).

    Attributes:
        data: samples, tokens, layers, heads, sequence length, causality and how the samples start.
        sink: rates and alpha for the first, the last and the strongest token, for every position, and for the tokens that
            are strongest most often; plain and mass-normalised.
        rows: row mass, all-zero rows, entropy, largest weight; per context length.
        sparsity: exact zeros, tiny weights, empty tiles.
        heads: dead and dormant heads.
        hidden: residual-stream statistics, massive activations, outlier features.
    """

    data: dict[str, Any]
    sink: dict[str, Any]
    rows: dict[str, Any]
    sparsity: dict[str, Any]
    heads: dict[str, Any]
    hidden: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps(..., allow_nan=False)`` accepts."""
        return asdict(self)


class Meter:
    """Accumulates all metrics over batches; see the module's docstring for the order of calls.

    Args:
        bos_policy: how the samples start, in words, stated beside every sink figure.
        tokens: ids whose sink rates are listed in any case ([CLS], [SEP], BOS).
    """

    def __init__(self, bos_policy: str = "auto", tokens: Iterable[int] = ()) -> None:
        self.bos_policy = bos_policy
        self.tokens = list(dict.fromkeys(tokens))
        self._attention: dict[int, AttentionLayer] = {}
        self._hidden: dict[int, HiddenLayer] = {}
        self._lengths: list[int] = []
        self._key_lengths: list[int] = []
        self._first_tokens: dict[int, int] = {}
        self._causal: bool | None = None
        self._valid: list[Tensor] = []  # real positions of this batch's samples
        self._key_valid: list[Tensor] = []
        self._shape: tuple[int, int, int] | None = None  # samples, queries, keys
        self._tokens: Tensor | None = None
        self._key_tokens: Tensor | None = None
        self._before = 0  # samples of earlier batches
        self._loss = 0.0  # nats, and of how many tokens
        self._predicted = 0
        self._by_position = torch.zeros(len(KEY_SUMS), 0, dtype=torch.float64)
        self._by_token = torch.zeros(len(KEY_SUMS), 0, dtype=torch.float64)
        self._strongest: list[int] = []  # of the samples of earlier batches
        self._alpha: list[Tensor] = []  # of this batch's samples, by position, summed over layers and heads

    def begin_batch(
        self,
        valid: Tensor,
        input_ids: Tensor | None = None,
        keys: Tensor | None = None,
        key_ids: Tensor | None = None,
    ) -> None:
        """Start a batch.

        Args:
            valid: ``(B, T)`` boolean, True at real positions. Samples without any are left out.
            input_ids: ``(B, T)`` integers, to name the tokens of large activations and the first token.
            keys: ``(B, Tk)`` boolean, the same of the keys where they are those of other positions than the queries
                (cross-attention).
            key_ids: ``(B, Tk)`` integers, to name the tokens of the keys.
        """
        if keys is None:
            keys, key_ids = valid, input_ids
        for name, real, ids in (("valid", valid, input_ids), ("keys", keys, key_ids)):
            if real.dim() != 2 or real.dtype != torch.bool:
                raise TypeError(f"{name}: expected a boolean (B, T), got {real.dtype} {tuple(real.shape)}")
            if ids is not None and ids.shape != real.shape:
                what = "input_ids" if name == "valid" else "key_ids"
                raise ValueError(f"{what}: expected the shape of {name} {tuple(real.shape)}, got {tuple(ids.shape)}")
        if len(keys) != len(valid):
            raise ValueError(f"keys: expected {len(valid)} samples as in valid, got {len(keys)}")
        self._strongest += [int(alpha.argmax()) for alpha in self._alpha]
        self._before = len(self._lengths)
        self._shape = (valid.shape[0], valid.shape[1], keys.shape[1])
        self._tokens = None if input_ids is None else input_ids.cpu()
        self._key_tokens = None if key_ids is None else key_ids.cpu()
        there = (valid.any(1) & keys.any(1))[:, None]
        self._valid = [row.nonzero().flatten() for row in (valid & there).cpu()]
        self._key_valid = [row.nonzero().flatten() for row in (keys & there).cpu()]
        for b, (positions, of_keys) in enumerate(zip(self._valid, self._key_valid, strict=True)):
            if positions.numel():
                self._lengths.append(positions.numel())
                self._key_lengths.append(of_keys.numel())
                if self._key_tokens is not None:
                    token = int(self._key_tokens[b, of_keys[0]])
                    self._first_tokens[token] = self._first_tokens.get(token, 0) + 1
        self._alpha = [torch.zeros(p.numel(), dtype=torch.float64) for p in self._key_valid if p.numel()]

    def attention(
        self,
        layer: int,
        weights: Tensor,
        outputs: Tensor,
        visible: Tensor | None = None,
        *,
        causal: bool = True,
        max_score: float | None = None,
        first_sample: int = 0,
        first_head: int = 0,
        heads: int | None = None,
    ) -> None:
        """Add one layer's attention for the current batch, whole or, to save memory, some samples and heads at a time.

        Args:
            layer: from 0.
            weights: ``(b, h, T, Tk)``, after normalization, before dropout; ``Tk = T`` but for cross-attention.
            outputs: ``(b, T, h, Dv)``, before the output projection.
            visible: ``(b or 1, 1, T, Tk)`` boolean, which keys a query may see besides the padding (which is known from
                ``begin_batch``); the default is the lower triangle, or everything where ``causal`` is False.
            causal: see ``visible``; also reported.
            max_score: the largest score of this layer, if it is known.
            first_sample: the sample of the batch that ``weights`` begins with.
            first_head: the head that it begins with. The heads of a sample come in order.
            heads: how many the layer has; by default as many as ``weights``.
        """
        if self._shape is None:
            raise RuntimeError("attention: call begin_batch first")
        batch, t, tk = self._shape
        expected = f"(B, H, T, T) with B={batch}, T={t}" if t == tk else f"(B, H, T, Tk) with B={batch}, T={t}, Tk={tk}"
        if weights.dim() != 4 or tuple(weights.shape[2:]) != (t, tk) or first_sample + weights.shape[0] > batch:
            raise ValueError(f"weights: expected {expected}, got {tuple(weights.shape)}")
        b, h = weights.shape[:2]
        if heads is None and first_sample == 0 and b != batch:
            raise ValueError(f"weights: expected {expected}, got {tuple(weights.shape)}")
        heads = first_head + h if heads is None else heads
        if outputs.dim() != 4 or tuple(outputs.shape[:3]) != (b, t, h):
            raise ValueError(f"outputs: expected (B, T, H, Dv) with B={b}, T={t}, H={h}, got {tuple(outputs.shape)}")
        if visible is None:
            visible = torch.ones(t, t, dtype=torch.bool, device=weights.device)
            visible = (visible.tril() if causal else visible)[None, None]
        elif visible.dtype != torch.bool or visible.dim() != 4 or visible.shape[1] != 1:
            raise TypeError(
                f"visible: expected a boolean (B or 1, 1, T, T), got {visible.dtype} {tuple(visible.shape)}"
            )
        visible = visible.expand(b, 1, t, tk)
        state = self._attention.setdefault(layer, AttentionLayer(heads))
        if state.heads != heads:
            raise ValueError(f"weights: layer {layer} had {state.heads} heads before, now {heads}")
        self._causal = causal if self._causal is None else self._causal and causal
        piece = max(1, MAX_ENTRIES // (t * tk))
        sample = sum(p.numel() > 0 for p in self._valid[:first_sample])  # among those with a real position
        for i in range(b):
            positions, of_keys = self._valid[first_sample + i], self._key_valid[first_sample + i]
            if positions.numel() == 0:
                continue
            tokens = None if self._key_tokens is None else self._key_tokens[first_sample + i, of_keys]
            for head in range(0, h, piece):
                a = weights[i, head : head + piece].detach().float()
                o = outputs[i, :, head : head + piece].detach().float().transpose(0, 1)
                see = visible[i, 0]
                if positions.numel() < t or of_keys.numel() < tk:
                    at, to = positions.to(weights.device), of_keys.to(weights.device)
                    a, o, see = a[:, at][:, :, to], o[:, at], see[at][:, to]
                try:
                    if not bool(torch.isfinite(o.sum())):
                        raise NotFiniteError
                    keys = state.update(a, o, see, first_head + head)
                except NotFiniteError:
                    message = f"layer {layer}: attention weights or outputs contain NaN or infinity"
                    raise ValueError(message) from None
                self._add_keys(keys, sample, tokens)
            sample += 1
        if max_score is not None:
            state.max_score = max_score if state.max_score is None else max(state.max_score, max_score)

    def _add_keys(self, keys: Tensor, sample: int, tokens: Tensor | None) -> None:
        """``keys (len(KEY_SUMS), T)`` of some heads of the batch's real sample number ``sample``."""

        def grown(sums: Tensor, size: int) -> Tensor:
            return torch.nn.functional.pad(sums, (0, max(0, size - sums.shape[1])))

        self._by_position = grown(self._by_position, keys.shape[1])
        self._by_position[:, : keys.shape[1]] += keys
        self._alpha[sample] += keys[KEY_SUMS.index("alpha")]
        if tokens is not None:
            self._by_token = grown(self._by_token, int(tokens.max()) + 1)
            self._by_token.index_add_(1, tokens, keys)

    def hidden(self, layer: int, hidden: Tensor) -> None:
        """Add the residual stream ``(B, T, C)`` after one layer, for the current batch."""
        if self._shape is None:
            raise RuntimeError("hidden: call begin_batch first")
        if hidden.dim() != 3 or tuple(hidden.shape[:2]) != self._shape[:2]:
            raise ValueError(
                f"hidden: expected (B, T, C) with B={self._shape[0]}, T={self._shape[1]}, got {tuple(hidden.shape)}"
            )
        state = self._hidden.setdefault(layer, HiddenLayer(hidden.shape[2]))
        sample = self._before
        for b, positions in enumerate(self._valid):
            if positions.numel() == 0:
                continue
            x = hidden[b].detach().float()
            if positions.numel() < x.shape[0]:
                x = x[positions.to(x.device)]
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"layer {layer}: the hidden states contain NaN or infinity")
            tokens = None if self._tokens is None else self._tokens[b, positions]
            state.update(layer, sample, x, tokens)
            sample += 1

    def add_loss(self, loss: float, tokens: int) -> None:
        """Add the summed loss of so many next tokens, in nats."""
        self._loss += loss
        self._predicted += tokens

    @property
    def mean_loss(self) -> float | None:
        """Mean loss of the next tokens that were added, in nats; None without any."""
        return self._loss / self._predicted if self._predicted else None

    def result(self) -> Measurements:
        """Everything measured so far.

        Raises:
            ValueError: when nothing was fed, or layers saw different numbers of samples.
        """
        n = len(self._lengths)
        if n == 0 or not self._attention:
            raise ValueError("no data: feed at least one batch with a real position")
        layers = [self._attention[i] for i in sorted(self._attention)]
        if any(layer.samples != n for layer in layers):
            raise ValueError(f"expected {n} samples in every layer, got {[layer.samples for layer in layers]}")
        positions = self._strongest + [int(alpha.argmax()) for alpha in self._alpha]
        parts: dict[str, dict[str, Any]] = {
            "data": self._data_result(layers),
            "sink": sink_result(layers, positions, self._by_position, self._by_token, self.tokens),
            "rows": rows_result(layers),
            "sparsity": sparsity_result(layers),
            "heads": {"total": sum(x.heads for x in layers)},
            "hidden": hidden_result(self._hidden, sum(self._lengths)) if self._hidden else {},
        }
        for part, found in head_sums(layers).items():
            parts[part] |= found
        return Measurements(**parts)

    def _data_result(self, layers: list[AttentionLayer]) -> dict[str, Any]:
        first: dict[str, Any] = {"policy": self.bos_policy, "first_token_id": None, "first_token_share": None}
        if self._first_tokens:
            token = max(self._first_tokens, key=lambda t: self._first_tokens[t])
            share = 100.0 * self._first_tokens[token] / sum(self._first_tokens.values())
            first.update(first_token_id=token, first_token_share=share)
        lengths, keys = self._lengths, self._key_lengths
        return {
            "samples": len(lengths),
            "tokens": sum(lengths),
            "layers": len(layers),
            "heads": layers[0].heads,
            "sequence_length": _extent(lengths),
            **({} if keys == lengths else {"keys": _extent(keys)}),
            "causal": self._causal,
            "bos": first,
        }


def _extent(lengths: list[int]) -> dict[str, float]:
    return {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)}


def save_meters(meters: Mapping[str, Meter], batches: int, path: Path) -> None:
    """Write what the meters of a model's parts have seen in so many batches; the file appears complete or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    torch.save({"meters": dict(meters), "batches": batches}, temporary)
    temporary.replace(path)


def load_meters(path: Path) -> tuple[dict[str, Meter], int]:
    """What :func:`save_meters` wrote: the meters and their batches. Only these classes are made, whatever the file holds."""
    with torch.serialization.safe_globals([Meter, Moments, FloatHistogram, AttentionLayer, HiddenLayer]):
        found = torch.load(path, weights_only=True)
    return found["meters"], found["batches"]
