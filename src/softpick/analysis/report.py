"""From results to a table and to one HTML file.

``records.METRICS`` is the single list of what a summary shows: the terminal table (:func:`summary_rows`), the table of the
HTML file and its definitions come from it. :func:`write_report` fills ``report.html`` (a template beside this file,
with all style and script in it) with the results as JSON; the file opens without a network.

A report is a dict: ``title``, ``meta`` (task, data, created, ...), ``notes`` (plain statements) and ``runs``, each with
``normalizer``, ``title``, ``seed``, ``validation_loss``, ``parameters``, ``seconds``, ``curves``, ``measurements``
(:meth:`softpick.analysis.metrics.Measurements.to_dict`) and ``samples`` (tokens and :func:`encode_maps`). Only
``normalizer`` is required of a run: what is missing shows as a dash.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from softpick.analysis import records
from softpick.analysis.records import DASH, METRICS, Metric

__all__ = ["DASH", "METRICS", "Metric", "data_statement", "decode_maps", "encode_maps", "summary_rows", "write_report"]


# ---------------------------------------------------------------------------------------------------------------------
# The summary


def run_labels(report: Mapping[str, Any]) -> list[str]:
    """A name for each run: its title, with the seed where a normalizer was run more than once."""
    runs = report["runs"]
    names = [str(run.get("title") or run["normalizer"]) for run in runs]
    return [
        f"{name} · seed {run.get('seed', i)}" if names.count(name) > 1 else name
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    ]


def summary_rows(report: Mapping[str, Any], *, by: Literal["run", "normalizer"] = "run") -> list[tuple[str, list[str]]]:
    """The summary as text, for a terminal.

    Args:
        report: as for :func:`write_report`.
        by: one column a run, or one a normalizer (mean ± standard deviation over its seeds).

    Returns:
        ``(label, values)`` in the order of :data:`METRICS`; a metric that no run has is left out. The columns are those
        of :func:`run_labels`, or the normalizers in order of appearance.
    """
    return [(row["label"], row["texts"]) for row in _summary(report, by)]


def _summary(report: Mapping[str, Any], by: Literal["run", "normalizer"]) -> list[dict[str, Any]]:
    if by not in ("run", "normalizer"):
        raise ValueError(f"by: expected 'run' or 'normalizer', got {by!r}")
    runs = report["runs"]
    if by == "run":
        groups = [[run] for run in runs]
    else:
        groups = [[run for run in runs if run["normalizer"] == n] for n in dict.fromkeys(r["normalizer"] for r in runs)]
    rows = []
    for metric in records.METRICS:
        cells = [[v for v in (metric.value(run) for run in group) if v is not None] for group in groups]
        if not any(cells):
            continue
        texts, values = [], []
        for cell in cells:
            values.append(statistics.fmean(cell) if cell else None)
            text = metric.text(cell[0] if len(cell) == 1 else values[-1])
            if len(cell) > 1:
                spread = metric.text(statistics.stdev(cell)).removesuffix(metric.unit).rstrip()
                text = text.removesuffix(metric.unit).rstrip() + f" ± {spread} {metric.unit}".rstrip()
            texts.append(text)
        row = {k: getattr(metric, k) for k in ("key", "label", "unit", "group", "definition", "reading", "sink")}
        rows.append(row | {"values": values, "texts": texts})
    return rows


def data_statement(run: Mapping[str, Any]) -> str:
    """What a run's figures were measured on: T, samples, and how samples start. Stated with every sink figure."""
    data = (run.get("measurements") or {}).get("data")
    if not data:
        return "not measured"
    length = data["sequence_length"]
    t = (
        f"T = {length['max']:,} tokens"
        if length["min"] == length["max"]
        else f"T = {length['min']:,} to {length['max']:,} tokens (mean {length['mean']:,.0f})"
    )
    if data.get("keys"):
        keys = data["keys"]
        t += (
            f" that see {keys['max']:,} keys of the encoder"
            if keys["min"] == keys["max"]
            else " that see the encoder's"
        )
    bos = data["bos"]
    share, token = bos["first_token_share"], bos["first_token_id"]
    text = (run.get("token_text") or {}).get(str(token))
    token = f"{token} ({text!r})" if text is not None and run.get("reads") in (None, "text") else text or token
    if bos["policy"] == "none":
        start = "samples start without a BOS token"
    elif bos["policy"] == "bos":
        start = f"every sample starts with BOS (token {token})"
    elif share is None:
        start = "it is not known how samples start"
    elif share == 100:
        start = f"every sample starts with {'token ' if run.get('reads') in (None, 'text') else ''}{token}"
    else:
        start = f"samples start with different tokens (most often {token}, {share:.0f} %)"
    view = "causal" if data["causal"] else "bidirectional"
    return f"{t}, {data['samples']:,} samples, {view}, {start}"


def _derived_notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know and the figures do not say by themselves."""
    notes = []
    rates = [
        rate
        for run in report["runs"]
        if run["normalizer"] == "softmax"
        and run.get("curves")  # of a comparison: what a trained model has is a finding, and no advice to train longer
        and (rate := next(m for m in records.METRICS if m.key == "sink_first_0.3").value(run)) is not None
    ]
    if rates and statistics.fmean(rates) < 5:
        notes.append(
            f"Softmax itself has hardly any attention sinks here (sink rate {statistics.fmean(rates):.1f} % at 0.3, "
            "first token), so this comparison says nothing about removing them. Longer training, more layers, a larger "
            "weight decay and learning rate bring sinks about."
        )
    statements = {data_statement(run) for run in report["runs"] if run.get("measurements")}
    if len(statements) > 1:
        notes.append("The runs were measured on different data; their figures cannot be compared directly.")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Attention maps as JSON


def encode_maps(maps: Tensor, *, bits: Literal[8, 16] = 16, causal: bool | None = None) -> dict[str, Any]:
    """Attention maps as a JSON-able dict, each map quantized to its own range, exact zeros apart.

    Code 0 is an exact zero. Any other weight has ``code >= 1`` and is
    ``min + (code - 1) / (2^bits - 2) * (max - min)``, with ``min = 0`` unless a map has negative weights.

    Args:
        maps: ``(L, H, T, T)``, as from :func:`softpick.analysis.capture.attention_maps`.
        bits: of a code.
        causal: whether the upper triangle is masked; by default, whether it is all zero.

    Returns:
        ``shape``, ``dtype`` (``uint8`` or ``uint16``, little-endian), ``causal``, ``min`` and ``max`` (one a map, flat)
        and ``data`` (base64).
    """
    if maps.dim() != 4 or maps.shape[2] != maps.shape[3]:
        raise ValueError(f"maps: expected (L, H, T, T), got {tuple(maps.shape)}")
    if bits not in (8, 16):
        raise ValueError(f"bits: expected 8 or 16, got {bits}")
    x = maps.detach().cpu().double()
    if not bool(torch.isfinite(x).all()):
        raise ValueError("maps: expected finite weights, got NaN or infinity")
    low, high = x.amin((2, 3)).clamp(max=0), x.amax((2, 3)).clamp(min=0)
    levels = 2**bits - 2
    width = torch.where(high > low, high - low, 1.0)[..., None, None]
    codes = 1 + ((x - low[..., None, None]) / width * levels).round().long()
    codes = torch.where(x == 0, 0, codes)
    # bytes, low one first, without numpy
    parts = [codes & 255, codes >> 8] if bits == 16 else [codes]
    raw = bytes(torch.stack(parts, dim=-1).to(torch.uint8).flatten().tolist())
    return {
        "shape": list(maps.shape),
        "dtype": f"uint{bits}",
        "causal": not bool(x.triu(1).any()) if causal is None else causal,
        "min": low.flatten().tolist(),
        "max": high.flatten().tolist(),
        "data": base64.b64encode(raw).decode("ascii"),
    }


def decode_maps(encoded: Mapping[str, Any]) -> Tensor:
    """The maps of :func:`encode_maps`, ``(L, H, T, T)`` fp64, to within half a step of their range."""
    raw = torch.frombuffer(bytearray(base64.b64decode(encoded["data"])), dtype=torch.uint8).long()
    wide = encoded["dtype"] == "uint16"
    codes = (raw[0::2] + 256 * raw[1::2] if wide else raw).view(encoded["shape"])
    levels = 65534 if wide else 254
    low, high = (
        torch.tensor(encoded[k], dtype=torch.float64).view(encoded["shape"][:2])[..., None, None]
        for k in ("min", "max")
    )
    return torch.where(codes == 0, 0.0, low + (codes - 1) / levels * (high - low))


# ---------------------------------------------------------------------------------------------------------------------
# The file


def _plain(x: Any) -> Any:
    """Numbers, strings, lists and dicts only; NaN and infinities as null, which is what JSON has."""
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if x is None or isinstance(x, str | int):
        return x
    return str(x)


def _script_json(x: Any) -> str:
    """JSON that may stand in a script element: no character in it can end the element or start a comment."""
    text = json.dumps(_plain(x), allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _check(report: Mapping[str, Any]) -> None:
    runs = report.get("runs")
    if not isinstance(runs, list) or not runs:
        raise ValueError("report: expected a list 'runs' with at least one run")
    for i, run in enumerate(runs):
        if not isinstance(run, Mapping) or "normalizer" not in run:
            raise ValueError(f"report: expected runs[{i}] to be a dict with a 'normalizer'")


def render(report: Mapping[str, Any]) -> str:
    """The HTML text that :func:`write_report` writes."""
    _check(report)
    title = str(report.get("title") or "softpick report")
    runs = report["runs"]
    payload = {
        "title": title,
        "meta": report.get("meta") or {},
        "notes": [*(report.get("notes") or []), *_derived_notes(report)],
        "runs": runs,
        "labels": run_labels(report),
        "statements": [data_statement(run) for run in runs],
        "references": report.get("references") or [],
        "summary": {"run": _summary(report, "run"), "normalizer": _summary(report, "normalizer")},
        "definitions": [
            {k: getattr(m, k) for k in ("key", "label", "unit", "group", "definition", "reading")}
            for m in records.METRICS
        ],
    }
    template = files("softpick.analysis").joinpath("report.html").read_text(encoding="utf-8")
    # the marks are found before anything is filled in: a title may contain "__DATA__"
    head, found_title, rest = template.partition("__TITLE__")
    middle, found_data, tail = rest.partition("__DATA__")
    assert found_title, "report.html lacks __TITLE__"
    assert found_data, "report.html lacks __DATA__"
    return head + html.escape(title) + middle + _script_json(payload) + tail


def write_report(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write one self-contained HTML file: no network, no other file.

    The file appears at ``path`` complete or not at all.

    Args:
        path: of the HTML file; its folder must exist.
        report: see the module's docstring.

    Raises:
        ValueError: for a report without runs, or a run without a normalizer.
    """
    text = render(report)
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
