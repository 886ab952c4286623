"""What kind of sink a head has, and where outlier channels come from: a closer look at a few of the measured sequences."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from softpick.analysis.calls import SeenAttention
from softpick.analysis.capture import Positions, part_positions
from softpick.analysis.records import MASSIVE_RATIO, MASSIVE_VALUE, MIN_SINK_QUERIES
from softpick.analysis.references import THRESHOLDS
from softpick.analysis.watching import parts_of, watch
from softpick.experiment.models import Subject

__all__ = ["KindsOfSinks", "OriginOfOutliers", "look_closer"]

_SINK = 0.3  # alpha above which the strongest key of a head is a sink


def where_of(position: int, text: str) -> str:
    """``first``, ``delimiter`` (white space and punctuation only) or ``other``."""
    if position == 0:
        return "first"
    letters = text.strip()
    return "delimiter" if all(unicodedata.category(c)[0] in "PZCS" for c in letters) else "other"


class KindsOfSinks:
    """For every head: whether its strongest key is a sink, and what that key adds to the head's output."""

    def __init__(self) -> None:
        self.samples = 0
        self.found: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.vectors: dict[tuple[int, int], list[Tensor]] = {}

    def add(self, seen: SeenAttention, keys: Positions) -> None:
        """One layer's attention for some samples and heads; ``keys`` are the positions of the batch that keys are of."""
        groups = seen.weights.shape[1] // seen.value.shape[1]
        for b in range(seen.weights.shape[0]):
            visible = seen.visible[b, 0]
            queries = visible.sum(0)
            enough = queries >= min(MIN_SINK_QUERIES, int(queries.max()))
            sums = torch.where(visible, seen.weights[b], 0.0).sum(1)
            alpha = (sums / queries.clamp(min=1)).masked_fill(~enough, -torch.inf)
            norms = seen.value[b].float().norm(dim=-1)  # (h or fewer, T)
            for head in range(alpha.shape[0]):
                k = int(alpha[head].argmax())
                size = float(alpha[head, k])
                if size <= _SINK:
                    continue
                weights = seen.weights[b, head, :, k][visible[:, k]].float()
                value = seen.value[b, head // groups, k].float()
                at = seen.layer, seen.heads.start + head
                self.found.setdefault(at, []).append(
                    {
                        "position": k,
                        "token": int(keys.ids[seen.samples.start + b, k]),
                        "alpha": size,
                        "value_ratio": float(norms[head // groups, k] / norms[head // groups].mean().clamp(min=1e-12)),
                        "variation": float(weights.std(correction=0) / weights.mean()),
                    }
                )
                self.vectors.setdefault(at, []).append((size * value).cpu())

    def result(self, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
        """``heads``: a row a head whose strongest key is a sink in at least half of the sequences."""
        rows = []
        for (layer, head), events in sorted(self.found.items()):
            if 2 * len(events) < self.samples:
                continue
            position, token = Counter((e["position"], e["token"]) for e in events).most_common(1)[0][0]
            energies = torch.linalg.svdvals(torch.stack(self.vectors[layer, head])).square()
            one = float(energies[0] / energies.sum()) if float(energies.sum()) > 0 else 0.0

            def mean(name: str, events: list[dict[str, Any]] = events) -> float:
                return sum(e[name] for e in events) / len(events)

            ratio = mean("value_ratio")
            kind = (
                "no-op"
                if ratio < THRESHOLDS["no-op"].value
                else "broadcast"
                if one >= THRESHOLDS["broadcast"].value
                else "mixed"
            )
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "kind": kind,
                    "where": Counter(where_of(e["position"], decode([e["token"]])) for e in events).most_common(1)[0][
                        0
                    ],
                    "position": position,
                    "token_id": token,
                    "alpha": mean("alpha"),
                    "value_ratio": ratio,
                    "one_direction": one,
                    "variation": mean("variation"),
                    "samples": len(events),
                }
            )
        return {"samples": self.samples, "heads": rows}


class OriginOfOutliers:
    """For every massive channel: where it rises, which module writes it, where it is cancelled, on which tokens."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []  # ids of each sample's positions
        self.peaks: dict[int, list[Tensor]] = {}  # by layer: of each sample (3, C): |x|, where, whether it is massive
        self.written: dict[
            int, list[Tensor]
        ] = {}  # by layer: of each sample (2, C): by attention, and by the rest, there
        self._before: Tensor | None = None

    def add(self, layer: int, hidden: Tensor, attention: Tensor | None) -> None:
        """The residual stream ``(B, T, C)`` after a layer, and what its attention module returned, if that has this shape."""
        x = hidden.float()
        size, at = x.abs().max(1)
        median = x.abs().flatten(1).median(1).values[:, None]
        massive = (size > MASSIVE_VALUE) & (size >= MASSIVE_RATIO * median)
        signed = x.gather(1, at[:, None])[:, 0]
        self.peaks.setdefault(layer, []).append(torch.stack([signed, at.float(), massive.float()], 1).cpu())
        if layer and self._before is not None and attention is not None and attention.shape == x.shape:
            by_attention = attention.float().gather(1, at[:, None])[:, 0]
            rest = signed - self._before.gather(1, at[:, None])[:, 0] - by_attention
            self.written.setdefault(layer, []).append(torch.stack([by_attention, rest], 1).cpu())
        self._before = x

    def result(self) -> dict[str, Any]:
        """``massive``: a row a channel and place (the first token, or another), the largest first."""
        if not self.peaks:
            return {"samples": len(self.tokens), "massive": []}
        layers = sorted(self.peaks)
        peaks = torch.stack([torch.cat(self.peaks[layer]) for layer in layers])  # (L, N, 3, C)
        rows = []
        for channel in peaks[:, :, 2].any(1).any(0).nonzero().flatten().tolist():
            values, positions, massive = peaks[:, :, :, channel].unbind(2)  # (L, N) each
            for first in (True, False):
                here = massive.bool() & ((positions == 0) == first)
                if bool(here.any()):
                    rows.append(self._row(layers, channel, values, positions.long(), here))
        return {"samples": len(self.tokens), "massive": sorted(rows, key=lambda row: -abs(row["value"]))}

    def _row(self, layers: list[int], channel: int, values: Tensor, positions: Tensor, here: Tensor) -> dict[str, Any]:
        """One channel, where it is massive: ``values``, ``positions`` and ``here`` are ``(L, N)``."""
        at = here.any(1).nonzero().flatten().tolist()
        top, sample = divmod(int(torch.where(here, values.abs(), -1.0).argmax()), here.shape[1])
        rises, writer = layers[at[0]], None
        if self.written.get(rises):
            written = torch.cat(self.written[rises])[:, :, channel].abs()  # (N, 2)
            by_attention, rest = written[here[at[0]]].sum(0).tolist()
            writer = "attention" if by_attention > rest else "MLP"
        place = int(positions[top, sample])
        return {
            "channel": channel,
            "value": float(values[top, sample]),
            "layer": layers[top],
            "from": rises,
            "to": layers[at[-1]],
            "rises": rises,
            "module": writer,
            "cancelled": layers[at[-1] + 1] if at[-1] + 1 < len(layers) else None,
            "position": place,
            "token_id": int(self.tokens[sample][place]),
            "first_token_percent": 100.0 * float((positions[here] == 0).float().mean()),
            "samples": int(here.any(0).sum()),
        }


def look_closer(subject: Subject, batches: Sequence[dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Kinds of sinks and origins of outliers, by part of the model.

    Args:
        subject: any model that can be measured.
        batches: arguments of the model; every figure is of all of them.

    Returns:
        For each part ``sinks`` (:meth:`KindsOfSinks.result`) and ``outliers`` (:meth:`OriginOfOutliers.result`).
    """
    model, parts = subject.model, parts_of(subject.model)
    sinks, outliers = {part: KindsOfSinks() for part in parts}, {part: OriginOfOutliers() for part in parts}
    modules: dict[tuple[str, int], nn.Module] = {}
    returned: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {}
    at: dict[str, tuple[Positions, Positions]] = {}  # of the batch

    def find(seen: SeenAttention) -> None:
        modules[seen.part, seen.layer] = seen.module

    def on_attention(seen: SeenAttention) -> None:
        if seen.part not in at:
            at[seen.part] = part_positions(model, inputs, seen.part, *seen.visible.shape[-2:])
            sinks[seen.part].samples += len(at[seen.part][1].ids)
            outliers[seen.part].tokens += at[seen.part][0].ids.cpu()
        sinks[seen.part].add(seen, at[seen.part][1])

    def on_hidden(layer: int, hidden: Tensor, part: str) -> None:
        outliers[part].add(layer, hidden, returned.get(id(modules[part, layer])))

    def moved(batch: dict[str, Tensor], samples: int | None = None) -> dict[str, Any]:
        return {name: value[:samples].to(device) for name, value in batch.items()}

    with watch(model, find) as run:
        run(moved(batches[0], 1))
    handles = [module.register_forward_hook(_remember(returned)) for module in modules.values()]
    try:
        with watch(model, on_attention, on_hidden) as run:
            for batch in batches:
                inputs = moved(batch)
                at.clear()
                run(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {
        part: {
            "sinks": sinks[part].result(partial(subject.decode, part=part)),
            "outliers": outliers[part].result(),
        }
        for part in parts
    }


def _remember(returned: dict[int, Tensor]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            returned[id(module)] = first.detach()

    return hook
