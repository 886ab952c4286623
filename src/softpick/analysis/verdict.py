"""What is wrong with a model's attention, what it costs and what to do: sentences with numbers, and conditions that can fail.

Every sentence names the row that its numbers come from; thresholds are ``references.THRESHOLDS``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softpick.analysis import records
from softpick.analysis.references import REFERENCES, THRESHOLDS
from softpick.analysis.sensitivity import COSTS
from softpick.analysis.settings import AuditError

__all__ = ["Condition", "failed", "figures", "parse_condition", "reference_rows", "verdict"]


FEW_TOKENS = 100  # a knockout of fewer tokens says how many they are


def _or_infinite(change: float | None) -> float:
    """A change of perplexity; one that has no number is beyond all of them."""
    return math.inf if change is None else change


def _knockouts(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those in which tokens were counted."""
    return [entry for entry in run.get("knockout") or [] if entry["tokens"]]


def figures(run: Mapping[str, Any]) -> dict[str, float]:
    """Every figure of a run that has a name: the rows of the summary, knockouts and costs of rounding.

    A perplexity, and a change of one, that is beyond all numbers is infinite here.
    """
    found = {metric.key: value for metric in records.METRICS if (value := metric.value(run)) is not None}
    if run.get("validation_loss") is not None and run.get("perplexity") is None:
        found["perplexity"] = math.inf
    for entry in _knockouts(run):
        for name in ("eviction", "absence"):
            found[f"{name}_{entry['key']}"] = _or_infinite(entry[f"{name}_percent"])
    cost = run.get("cost") or {}
    found |= {f"cost_{scheme['name']}": _or_infinite(scheme["change_percent"]) for scheme in cost.get("schemes", [])}
    found |= {f"cost_kv{entry['bits']}": _or_infinite(entry["change_percent"]) for entry in cost.get("kv_cache", [])}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Conditions

_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Condition:
    """A figure beyond which an audit fails.

    Attributes:
        name: key of a figure.
        sign: ``>``, ``>=``, ``<`` or ``<=``.
        bound: in the figure's unit.
    """

    name: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.bound:g}"


def parse_condition(text: str) -> Condition:
    """A condition such as ``sink_first_0.3 > 5``.

    Raises:
        AuditError: it is not of that form, or no figure can have that name.
    """
    parts = re.fullmatch(r"\s*([\w.\-]+)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*", text)
    if parts is None:
        raise AuditError(f"fail_if: expected NAME > NUMBER (or >=, <, <=), got {text!r}")
    name = parts[1]
    known = [*(metric.key for metric in records.METRICS), *(f"cost_{cost}" for cost in COSTS)]
    if name not in known and not name.startswith(("eviction_", "absence_")):
        raise AuditError(
            f"fail_if: no figure is named {name!r}; expected one of {', '.join(known)}, eviction_KEY, absence_KEY"
        )
    return Condition(name, parts[2], float(parts[3]))


def failed(conditions: Sequence[Condition], report: Mapping[str, Any]) -> list[str]:
    """A sentence for each condition that holds for a model.

    Raises:
        AuditError: no model of the report has the figure: a condition that nothing can meet must not pass.
    """
    sentences = []
    for condition in conditions:
        known = False
        for run in report["runs"]:
            value = figures(run).get(condition.name)
            known |= value is not None
            if value is not None and _SIGNS[condition.sign](value, condition.bound):
                sentences.append(f"{run['title']}: {condition} ({condition.name} is {value:.6g})")
        if not known:
            has = sorted({name for run in report["runs"] for name in figures(run)})
            raise AuditError(f"fail_if: no model has the figure {condition.name!r}; there are {', '.join(has)}")
    return sentences


# ---------------------------------------------------------------------------------------------------------------------
# References


def reference_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Published figures beside those of the report, in the order of the summary: metric, whose, text, values of the runs."""
    rows = []
    for metric in records.METRICS:
        values = [metric.value(run) for run in report["runs"]]
        if not any(value is not None for value in values):
            continue
        for reference in (r for r in REFERENCES if r.metric == metric.key):
            low, high = metric.text(reference.low), metric.text(reference.high)
            rows.append(
                {
                    "key": metric.key,
                    "label": metric.label,
                    "model": reference.model,
                    "text": low
                    if reference.low == reference.high
                    else f"{low.removesuffix(metric.unit).rstrip()} to {high}",
                    "yours": [metric.text(value) for value in values],
                    "source": reference.source,
                    "conventions": reference.conventions,
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


def _range(values: Sequence[int]) -> str:
    """Layers in words."""
    low, high = min(values), max(values)
    if low == high:
        return f"layer {low}"
    whole = len(set(values)) == high - low + 1
    return f"layers {low} to {high}" if whole else f"{len(set(values))} of the layers {low} to {high}"


def _token(run: Mapping[str, Any], event: Mapping[str, Any]) -> str:
    text = (run.get("token_text") or {}).get(str(event.get("token_id")))
    where = "the first token" if event["position"] == 0 else f"position {event['position']}"
    return where if text is None else f"{where} ({text!r})"


def _first(run: Mapping[str, Any]) -> str:
    """The first token in words: of images what stands there."""
    if run.get("reads") in (None, "text") or run.get("part") == "decoder":
        return "the encoder's first token" if run.get("part") == "cross-attention" else "the first token"
    token = run["measurements"]["data"]["bos"]["first_token_id"]
    kind = (run.get("token_text") or {}).get(str(token), "token")
    return kind if kind.startswith("[") else f"the first {kind}"


def _sinks(run: Mapping[str, Any]) -> str | None:
    data = run["measurements"]["data"]
    value = figures(run).get("sink_first_0.3")
    if value is None:
        return None
    normalized = figures(run).get("sink_first_normalized_0.3")
    share = (
        "" if normalized is None or abs(normalized - value) < 0.05 else f" ({normalized:.1f} % as a share of row mass)"
    )
    published = next(r for r in REFERENCES if r.metric == "sink_first_0.3")
    beside = (
        f" (published softmax models: {published.low:g} to {published.high:g} % at T = 64)"
        if data.get("causal", True)
        else ""
    )
    t = data["sequence_length"]["max"]
    uniform = sum(1.0 / n for n in range(1, t + 1)) / t if data.get("causal", True) else 0.0
    if uniform > 0.3:
        beside = f", which says nothing: at this length uniform attention has {uniform:.2f} there"
    few = value < THRESHOLDS["sinks"].value and (normalized is None or normalized < THRESHOLDS["sinks"].value)
    opening = "There are hardly any sinks: " if few else ""
    return (
        f"{opening}{value:.1f} % of heads{share} put more than 0.3 of their weight on {_first(run)} at T = {t}{beside}. "
        "[Sink rate > 0.3, first token]"
    )


def _elsewhere(run: Mapping[str, Any]) -> str | None:
    sink = run["measurements"]["sink"]
    first, strongest = sink["first"]["rate"]["0.3"], sink["strongest"]["rate"]["0.3"]
    if strongest - first < THRESHOLDS["sinks"].value:
        return None
    tokens = [t for t in sink["by_token"] if t["strongest"] and t["strongest"] >= 2][:3]
    names = [repr((run.get("token_text") or {}).get(str(t["token_id"]), t["token_id"])) for t in tokens]
    which = f" The strongest keys are most often {', '.join(names)}." if names else ""
    return (
        f"Sinks are not only on {_first(run)}: {strongest:.1f} % of heads put more than 0.3 on some token.{which} "
        "[Sink rate > 0.3, strongest token]"
    )


def _knockout(run: Mapping[str, Any]) -> str | None:
    entries = _knockouts(run)
    if not entries:
        return None
    entry = max(entries, key=lambda e: _or_infinite(e["eviction_percent"]))
    lost = _or_infinite(entry["eviction_percent"])
    which = {"first": "the first token", "strongest": "the strongest token"}.get(
        entry["key"], f"the token at position {entry['key']}"
    )
    advice = (
        f"a cache that drops {which} breaks the model: keep it"
        if lost > THRESHOLDS["eviction"].value
        else f"a cache may drop {which}"
    )
    change = "beyond measure" if lost == math.inf else f"by {lost:+.1f} %"
    before, now = ("beyond fp64" if entry[x] is None else f"{entry[x]:.4g}" for x in ("all keys", "eviction"))
    few = f", of {entry['tokens']:,} tokens only" if entry["tokens"] < FEW_TOKENS else ""
    return (
        f"Evicting the key of {which} after {entry['after']} token{'' if entry['after'] == 1 else 's'} changes perplexity "
        f"{change} ({before} to {now}{few}): {advice}. [Knockout]"
    )


def _outliers(run: Mapping[str, Any]) -> str | None:
    hidden = run["measurements"].get("hidden") or {}
    events = (run.get("outliers") or {}).get("massive") or []
    if not hidden:
        return None
    if not events:
        largest = hidden["max_abs"]
        size = f"{largest:,.0f}" if largest >= 1000 else f"{largest:.3g}"
        if count := hidden["massive"]["count"]:
            return (
                f"{count:,} activation{' is' if count == 1 else 's are'} massive, none of them in the samples that were looked "
                f"at closer; the largest |x| is {size}. [Massive activations]"
            )
        return f"There are no massive activations; the largest |x| is {size}. [Massive activations]"
    top = events[0]
    where = _first(run) if top["first_token_percent"] >= 99.5 else _token(run, top)
    writer = f", written by the {top['module']} of layer {top['rises']}" if top.get("module") else ""
    gone = f" and cancelled in layer {top['cancelled']}" if top.get("cancelled") is not None else ""
    others = len(events) - 1
    more = f" {others} more massive activation{' is' if others == 1 else 's are'} in the table." if others else ""
    return (
        f"Channel {top['channel']} of the residual stream is {top['value']:,.0f} on {where} from layer {top['from']} to "
        f"{top['to']}{writer}{gone}.{more} [Massive activations]"
    )


def _kinds(run: Mapping[str, Any]) -> str | None:
    kinds = run.get("sinks") or {}
    heads = kinds.get("heads") or []
    if not heads:
        return None
    noop = sum(h["kind"] == "no-op" for h in heads)
    broadcast = sum(h["kind"] == "broadcast" for h in heads)
    return (
        f"Of {len(heads)} heads with a sink, {noop} add next to nothing with it (value norm below "
        f"{THRESHOLDS['no-op'].value:g} of the mean: they are switched off), and {broadcast} add the same vector everywhere. "
        "[Kinds of sinks]"
    )


def _changed(entry: Mapping[str, Any]) -> str:
    """A change of perplexity with its standard error."""
    change, error = entry["change_percent"], entry.get("error_percent")
    if change is None:
        return "beyond measure"
    return f"{change:+.1f} %" if error is None else f"{change:+.1f} ± {error:.1f} %"


def _cost(run: Mapping[str, Any]) -> list[str]:
    cost = run.get("cost")
    if not cost or not cost["schemes"]:
        return []
    by_name = {scheme["name"]: scheme for scheme in cost["schemes"]}

    def text(name: str) -> str:
        return _changed(by_name[name])

    sentences = [
        f"Rounding weights and inputs to int8 costs {text('int8-tensor')} of perplexity with one scale per tensor and "
        f"{text('int8-token')} with one scale per token; fp8 costs {text('fp8-tensor')}; weights alone in int4 cost "
        f"{text('int4-weights')}. [Cost of rounding]"
    ]
    keep = {entry["scheme"]: entry for entry in cost["keep"]}
    for name in ("int8-tensor", "int4-weights"):
        entry = keep.get(name)
        if entry is None or not entry["kept"]:
            continue
        shown = ", ".join(entry["names"][:3]) + (f" and {entry['kept'] - 3} more" if entry["kept"] > 3 else "")
        sentences.append(
            f"With {shown} in 16 bits ({entry['weights_percent']:.1f} % of the weights), {name} costs "
            f"{_changed(entry)}. [Layers to keep in 16 bits]"
        )
    without = _or_infinite(by_name["int8-tensor"]["change_percent"])
    remedies = [
        r for r in cost["remedies"] if r["scheme"] == "int8-tensor" and _or_infinite(r["change_percent"]) < without
    ]
    if remedies:
        best = min(remedies, key=lambda r: r["change_percent"])
        how = {
            "prefix": "keeping the first token in 16 bits",
            "smoothing": "smoothing the channels",
            "rotation": "a Hadamard rotation",
        }[best["remedy"]]
        sentences.append(f"What helps int8-tensor most is {how}: {_changed(best)}. [Remedies]")
    return sentences


def _price(run: Mapping[str, Any]) -> str | None:
    heads, sparsity = run["measurements"]["heads"], run["measurements"]["sparsity"]
    if heads["dead_percent"] < THRESHOLDS["dead heads"].value and sparsity["zero"] < 1:
        return None
    return (
        f"{sparsity['zero']:.1f} % of the weights are exactly 0, and {heads['dead']} of {heads['total']} heads are dead. "
        "[Weights exactly 0; Dead heads]"
    )


def verdict(run: Mapping[str, Any]) -> list[str]:
    """Up to eight sentences about one model, the most important first; each ends with the row that it is from."""
    if not run.get("measurements"):
        return []
    found = [_sinks(run), _elsewhere(run), _knockout(run), _outliers(run), *_cost(run), _kinds(run), _price(run)]
    return [sentence for sentence in found if sentence][:8]
