"""What rounding costs, layer by layer: which layers to keep in 16 bits, what that buys, and what would remove the cause.

Everything is simulated: numbers are rounded to a format and computed with in the model's own. Three kinds of figures:

- *measured*: the model's loss with these layers rounded, on a few sequences. Whole models, models but for the layers that are
  kept, remedies, and the layers that come first in a ranking, each alone.
- *SQNR* of every layer and scheme: energy of the layer's output over that of its error, in dB, when only it is rounded.
- *estimate* of every layer and scheme: the change of the loss when only it is rounded, from one backward pass:
  ``1/2 mean_t (g_t . d_t)^2`` with ``g_t`` the gradient of the summed loss with respect to the layer's output at token ``t``
  and ``d_t`` the error there. The second-order term of the loss with the empirical Fisher information in the place of the
  Hessian, block-diagonal over tokens (Optimal Brain Damage's idea; the first-order term of a trained model is noise).

One pass a layer and scheme would be thousands. The estimate replaces them; the layers at the top are measured, and the rank
correlation of the two stands in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softpick.analysis.knockout import perplexity_of
from softpick.experiment.models import Subject
from softpick.experiment.perplexity import change_percent, token_losses
from softpick.experiment.progress import Reporter
from softpick.experiment.rounding import FORMATS, inner_layers, quantized_cache, round_to
from softpick.experiment.samples import size_of

__all__ = ["COSTS", "REMEDIES", "SCHEMES", "Scheme", "cost", "group_of", "ignore_lists", "rounded"]

GROUP = 64  # neighbouring inputs that share a scale
WORTH = 1.0  # percent of perplexity: what costs less needs no remedy
SURE = 2.0  # standard errors: a change that is smaller is not told from none
HOPELESS = 1000.0  # percent: such a scheme is not to be mended by a few layers
STEPS = (1, 2, 4, 8, 16)  # layers that are kept in 16 bits, one after the other
CHECKED = 4  # layers at the top of a ranking that are measured, each alone
_CACHE_BITS = (8, 4)
_BACKWARD_TOKENS = 512  # in one backward pass: what autograd keeps of a model is much
_OVERFLOW = 700.0


@dataclass(frozen=True)
class Scheme:
    """How a matrix and its inputs are rounded.

    Attributes:
        name: ``int8-tensor`` and so on.
        fmt: a key of ``FORMATS``, of weights and inputs.
        scales: of the inputs. ``tensor``: one scale a layer, its largest input on the same text; ``token``: one a token;
            ``group``: one a token and group of neighbouring channels (also of the weights); ``none``: inputs stay.
            Weights have one scale per output, with ``group`` and ``none`` one per output and group.
    """

    name: str
    fmt: str
    scales: str


SCHEMES: tuple[Scheme, ...] = (
    *(
        Scheme(f"{fmt}-{scales}", fmt, scales)
        for fmt in ("int8", "fp8", "int4")
        for scales in ("tensor", "token", "group")
    ),
    Scheme("int4-weights", "int4", "none"),
)
"""In the order of the report."""

COSTS = (*(scheme.name for scheme in SCHEMES), *(f"kv{bits}" for bits in _CACHE_BITS))
"""What can be measured: the schemes, and the key-value cache in so many bits."""

REMEDIES = {
    "prefix": "the first token stays in 16 bits (as a key-value prefix that is computed once)",
    "smoothing": "each channel is divided by a scale that its weights take (SmoothQuant, alpha 0.5)",
    "rotation": "inputs and weights are rotated by a Hadamard matrix (in blocks of the largest power of two)",
}
"""What is simulated for the schemes that cost something."""


def group_of(width: int, wanted: int = GROUP) -> int:
    """The largest group of at most ``wanted`` channels that divides ``width``."""
    return next(group for group in range(min(wanted, width), 0, -1) if width % group == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


@dataclass
class Inputs:
    """What is known of a layer's inputs from the text.

    Attributes:
        largest: absolute value.
        rest: the same without the first token of each sample; None where samples cannot be told apart.
        channels: ``(in,)``, largest absolute value of each.
    """

    largest: Tensor
    rest: Tensor | None
    channels: Tensor


def _matrix(module: Any) -> Tensor:
    """``(out, in)``."""
    weight = module.weight.data
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _grouped(x: Tensor, fmt: str) -> Tensor:
    parts = x.unflatten(-1, (-1, group_of(x.shape[-1])))
    return round_to(parts, FORMATS[fmt], parts.abs().amax(-1, keepdim=True)).flatten(-2)


def round_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """``weight (out, in)``, rounded."""
    if scheme.scales in ("group", "none"):
        return _grouped(weight, scheme.fmt)
    return round_to(weight, FORMATS[scheme.fmt], weight.abs().amax(1, keepdim=True))


def round_inputs(x: Tensor, scheme: Scheme, largest: Tensor) -> Tensor:
    """``x (..., in)``, rounded; ``largest`` is the layer's for one scale per tensor."""
    if scheme.scales == "none":
        return x
    if scheme.scales == "group":
        return _grouped(x, scheme.fmt)
    return round_to(x, FORMATS[scheme.fmt], largest if scheme.scales == "tensor" else x.abs().amax(-1, keepdim=True))


def _hadamard(x: Tensor) -> Tensor:
    """``x (..., n)`` times an orthonormal block-diagonal Hadamard matrix (its own inverse), by the fast transform."""
    n = x.shape[-1]
    block = n & -n  # the largest power of two that divides n
    y = x.float().unflatten(-1, (-1, block))
    half = 1
    while half < block:
        pairs = y.unflatten(-1, (-1, 2, half))
        y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
        half *= 2
    return (y / math.sqrt(block)).flatten(-2).to(x.dtype)


def _rounder(
    module: Any, scheme: Scheme, seen: Inputs, remedy: str | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The weight ``(out, in)`` that a layer multiplies by, and what becomes of its inputs."""
    weight, largest = _matrix(module), seen.largest
    if remedy == "smoothing":
        by_weight = weight.abs().amax(0).float().clamp(min=1e-5)
        scale = (seen.channels.float().clamp(min=1e-5).sqrt() / by_weight.sqrt()).clamp(min=1e-5).to(weight.dtype)
        largest = (seen.channels / scale).max()
        return round_weight(weight * scale, scheme), lambda x: round_inputs(x / scale, scheme, largest)
    if remedy == "rotation":
        turned = round_weight(_hadamard(weight), scheme)

        def rotate(x: Tensor) -> Tensor:
            x = _hadamard(x)
            return round_inputs(x, scheme, x.abs().max())

        return turned, rotate
    if remedy == "prefix":
        if seen.rest is None:
            raise ValueError("prefix: a layer is given tokens whose places are not known")
        rest = seen.rest
        return round_weight(weight, scheme), lambda x: torch.cat([x[:, :1], round_inputs(x[:, 1:], scheme, rest)], 1)
    return round_weight(weight, scheme), lambda x: round_inputs(x, scheme, largest)


@contextmanager
def rounded(
    layers: Mapping[str, Any], scheme: Scheme, seen: Mapping[str, Inputs], remedy: str | None = None
) -> Iterator[None]:
    """Within the block these linear layers multiply rounded inputs by rounded weights. Afterwards they are unchanged.

    Args:
        layers: ``nn.Linear`` or ``Conv1D``, by name.
        scheme: of :data:`SCHEMES`.
        seen: what is known of their inputs, by name; a layer without (no input came) stays as it is.
        remedy: a key of :data:`REMEDIES`.
    """
    kept = {name: module.weight.data for name, module in layers.items()}
    handles: list[Any] = []
    try:
        for name, module in layers.items():
            if name not in seen:
                continue
            weight, change = _rounder(module, scheme, seen[name], remedy)
            module.weight.data = weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight

            def hook(module: nn.Module, inputs: Any, change: Callable[[Tensor], Tensor] = change) -> tuple[Any, ...]:
                return (change(inputs[0]), *inputs[1:])

            handles.append(module.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, module in layers.items():
            module.weight.data = kept[name]


# ---------------------------------------------------------------------------------------------------------------------
# Figures of every layer


@dataclass
class _Sums:
    """Sums of one layer and scheme."""

    signal: float = 0.0
    noise: float = 0.0
    fisher: float = 0.0


@dataclass
class _Local:
    """SQNR and estimates while a backward pass runs."""

    seen: Mapping[str, Inputs]
    sums: dict[tuple[str, str], _Sums] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, name: str, module: Any, x: Tensor, gradient: Tensor | None) -> None:
        """What a layer did on some tokens, and the gradient of the summed loss with respect to its output."""
        x = x.detach()
        weight = _matrix(module)
        exact = x @ weight.T
        weights: dict[tuple[str, bool], Tensor] = {}  # schemes share them
        for scheme in SCHEMES:
            kind = scheme.fmt, scheme.scales in ("group", "none")
            if kind not in weights:
                weights[kind] = round_weight(weight, scheme)
            error = (round_inputs(x, scheme, self.seen[name].largest) @ weights[kind].T - exact).float()
            into = self.sums.setdefault((name, scheme.name), _Sums())
            into.signal += float(exact.float().square().sum())
            into.noise += float(error.square().sum())
            if gradient is not None:
                into.fisher += float((gradient.float() * error).sum(-1).square().sum())


def _watch_inputs(model: Any, layers: Mapping[str, Any], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Inputs]:
    """What reaches each layer."""
    found: dict[str, Inputs] = {}

    def watching(name: str, rows: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            x = inputs[0].detach().abs()
            if x.numel() == 0:
                return
            by_sample = x.dim() == 3 and x.shape[1] == rows
            rest = x[:, 1:].max() if by_sample and rows > 1 else None
            channels = x.flatten(0, -2).amax(0)
            if name in found:
                before = found[name]
                channels = torch.maximum(channels, before.channels)
                rest = None if rest is None or before.rest is None else torch.maximum(rest, before.rest)
            found[name] = Inputs(channels.max(), rest, channels)

        return hook

    ids = batches[0].get("input_ids")
    rows = 0 if ids is None else ids.shape[1]
    with ExitStack() as stack, torch.no_grad():
        for name, module in layers.items():
            handle = module.register_forward_pre_hook(watching(name, rows))
            stack.callback(handle.remove)
        device = next(model.parameters()).device
        body = model.base_model if model.get_output_embeddings() is not None else model
        for batch in batches:
            body(**{name: x.to(device) for name, x in batch.items()})
    return found


def _local_figures(
    subject: Subject, layers: Mapping[str, Any], batches: Sequence[Mapping[str, Tensor]], seen: Mapping[str, Inputs]
) -> tuple[_Local, int]:
    """SQNR and estimates of every layer, and of how many predicted tokens."""
    model, local, tokens = subject.model, _Local(seen), 0
    device = next(model.parameters()).device
    wanted = [(p, p.requires_grad) for p in model.parameters()]

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if name not in seen or inputs[0].numel() == 0:
                return
            if output.requires_grad:
                x = inputs[0]
                output.register_hook(lambda gradient: local.add(name, module, x, gradient))
            else:
                local.add(name, module, inputs[0], None)

        return forward

    def enters(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()  # so that there are gradients of outputs, and none of parameters

    with ExitStack() as stack:
        for p, _ in wanted:
            p.requires_grad_(False)
        stack.callback(lambda: [p.requires_grad_(was) for p, was in wanted])
        if subject.causal and not subject.bidirectional:
            stack.callback(model.get_input_embeddings().register_forward_hook(enters).remove)
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        for batch in batches:
            if not subject.causal or subject.bidirectional:
                with torch.no_grad():
                    model(**{name: x.to(device) for name, x in batch.items()})
                continue
            whole = batch["input_ids"].to(device)
            for ids in whole.split(max(1, _BACKWARD_TOKENS // whole.shape[1])):
                with torch.enable_grad():
                    logits = model(input_ids=ids, use_cache=False).logits[:, 1:-1].flatten(0, 1).float()
                    targets = ids[:, 2:].flatten()
                    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
                tokens += len(targets)
    return local, tokens


# ---------------------------------------------------------------------------------------------------------------------
# Measured losses


@torch.no_grad()
def _losses(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """``(N,)`` fp64: the losses of the tokens from the third on, in nats."""
    device = next(model.parameters()).device
    found = []
    for ids in torch.cat([batch["input_ids"] for batch in batches]).to(device).split(4):
        logits = model(input_ids=ids, use_cache=False).logits[:, 1:-1]
        found.append(token_losses(logits.flatten(0, 1), ids[:, 2:].flatten()))
    return torch.cat(found)


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, or None for fewer than three pairs or constant ranks."""
    if len(a) < 3:
        return None
    ranks = [torch.tensor(x, dtype=torch.float64).argsort().argsort().double() for x in (a, b)]
    found = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    return found if math.isfinite(found) else None


def costly(found: Mapping[str, float | None]) -> bool:
    """Whether a change of perplexity asks for a remedy: more than ``WORTH`` percent and more than ``SURE`` standard errors."""
    change, error = found["change_percent"], found["error_percent"]
    return change is not None and change > max(WORTH, SURE * (error or 0.0))


class _Measuring:
    """One model's losses under schemes, on the same few sequences."""

    def __init__(self, subject: Subject, batches: Sequence[Mapping[str, Tensor]], reporter: Reporter) -> None:
        self.model, self.batches, self.reporter = subject.model, batches, reporter
        self.layers = inner_layers(subject.model)
        self.seen = _watch_inputs(subject.model, self.layers, batches)
        self.losses = _losses(self.model, batches) if subject.causal and not subject.bidirectional else None

    @property
    def base(self) -> float | None:
        """Mean loss of the model as it is."""
        return None if self.losses is None else float(self.losses.mean())

    def change(self, scheme: Scheme, layers: Mapping[str, Any], remedy: str | None = None) -> dict[str, float | None]:
        """:meth:`compared` with these layers rounded."""
        with rounded(layers, scheme, self.seen, remedy):
            return self.compared()

    def compared(self) -> dict[str, float | None]:
        """``change_percent`` of perplexity, and the standard error of it from the differences of the tokens' losses.

        Losses of neighbouring tokens are not independent, so that the error is rather larger.
        """
        assert self.losses is not None
        now = _losses(self.model, self.batches)
        difference = now - self.losses
        change = change_percent(float(now.mean()), float(self.losses.mean()))
        error = (
            float(difference.std()) / math.sqrt(len(difference)) * (100.0 + change) if change is not None else math.inf
        )
        return {"change_percent": change, "error_percent": error if math.isfinite(error) else None}

    def kept(self, scheme: Scheme, whole: float, ranked: list[str], bar: Any) -> dict[str, Any]:
        """The layers at the top of a ranking in 16 bits: what is left of the cost, and which list to take."""
        total = sum(module.weight.numel() for module in self.layers.values())
        steps: list[dict[str, Any]] = []
        for count in (n for n in STEPS if n < len(ranked)):
            names = ranked[:count]
            found = self.change(scheme, {name: m for name, m in self.layers.items() if name not in names})
            share = 100.0 * sum(self.layers[name].weight.numel() for name in names) / total
            steps.append({"kept": count, "weights_percent": share} | found)
            bar()
            if found["change_percent"] is not None and not costly(found):
                break
        known = [step for step in steps if step["change_percent"] is not None]
        best = min(known, key=lambda step: step["change_percent"], default=None)
        if best is None or best["change_percent"] >= whole:
            return {"scheme": scheme.name, "steps": steps, "kept": 0, "names": []}
        names = ranked[: best["kept"]]
        return {
            "scheme": scheme.name,
            "steps": steps,
            "kept": best["kept"],
            "names": names,
            "change_percent": best["change_percent"],
            "error_percent": best["error_percent"],
            "weights_percent": best["weights_percent"],
            "ignore": ignore_lists(names, _head(self.model)),
        }


def _head(model: Any) -> str | None:
    """Name of the vocabulary's projection."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head and head is not None), None)


def cost(subject: Subject, batches: Sequence[Mapping[str, Tensor]], reporter: Reporter) -> dict[str, Any]:
    """What rounding costs a model, layer by layer.

    Args:
        subject: a model; of one that predicts no next token only SQNRs are found.
        batches: arguments of the model; every figure is of all of them.
        reporter: shows progress.

    Returns:
        ``tokens``, ``sequences``, ``perplexity``; ``schemes`` (name, change in percent of perplexity), ``kv_cache`` (bits,
        change), ``layers`` (name, weights, by scheme ``sqnr_db`` and ``estimate_percent``, at the top ``measured_percent``),
        ``keep`` (by scheme: layers in 16 bits, what is left, lists for other libraries), ``remedies`` (scheme, remedy, change)
        and ``approximations`` (sentences).
    """
    work = _Measuring(subject, batches, reporter)
    local, tokens = _local_figures(subject, work.layers, batches, work.seen)
    layers = [
        {"name": name, "weights": module.weight.numel(), "group": group_of(_matrix(module).shape[1])}
        | {"schemes": {s.name: _figures(local.sums[name, s.name], tokens) for s in SCHEMES}}
        for name, module in work.layers.items()
        if name in work.seen
    ]
    result: dict[str, Any] = {
        "sequences": sum(map(size_of, batches)),
        "tokens": sum(x.numel() for batch in batches for name, x in batch.items() if name.endswith("input_ids")),
        "layers": layers,
        "approximations": [
            "Rounding is simulated: numbers are rounded to the format and computed with in the model's own.",
            "One scale per tensor is from the largest input on the measured text itself.",
            "Behind ±: the standard error over the tokens; as neighbours are not independent, it is rather larger.",
        ],
    }
    groups = {layer["group"] for layer in layers}
    if groups != {GROUP}:
        result["approximations"].append(
            f"Groups have {', '.join(map(str, sorted(groups)))} channels, to fit the widths."
        )
    if work.base is None:
        return result | {"perplexity": None, "schemes": [], "kv_cache": [], "keep": [], "remedies": []}
    return result | _measured(work, layers, subject.title)


def _measured(work: _Measuring, layers: list[dict[str, Any]], title: str) -> dict[str, Any]:
    assert work.base is not None
    result: dict[str, Any] = {
        "perplexity": perplexity_of(work.base),
        "kv_cache": [],
        "keep": [],
        "remedies": [],
    }
    done = 0
    with work.reporter.progress(f"{title}: cost of rounding", len(SCHEMES) + len(_CACHE_BITS)) as progress:

        def bar() -> None:
            nonlocal done
            done += 1
            progress.update(min(done, len(SCHEMES) + len(_CACHE_BITS)), None)

        whole = {}
        for scheme in SCHEMES:
            whole[scheme.name] = work.change(scheme, work.layers)
            bar()
        for bits in _CACHE_BITS:
            with quantized_cache(work.model, bits):
                result["kv_cache"].append({"bits": bits} | work.compared())
            bar()
    to_mend = [s for s in SCHEMES if costly(whole[s.name]) and (whole[s.name]["change_percent"] or 0.0) < HOPELESS]
    total = len(to_mend) * (CHECKED + len(STEPS) + len(REMEDIES))
    agreement: dict[str, float | None] = {}
    with work.reporter.progress(f"{title}: layers to keep, remedies", max(total, 1)) as progress:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            progress.update(min(done, max(total, 1)), None)

        for scheme in to_mend:
            by_cost = sorted(layers, key=lambda layer: -layer["schemes"][scheme.name]["estimate_percent"])
            for layer in by_cost[:CHECKED]:
                name = layer["name"]
                alone = work.change(scheme, {name: work.layers[name]})
                layer["schemes"][scheme.name]["measured_percent"] = alone["change_percent"]
                step()
            top = [layer["schemes"][scheme.name] for layer in by_cost[:CHECKED]]
            pairs = [(f["estimate_percent"], f["measured_percent"]) for f in top if f["measured_percent"] is not None]
            agreement[scheme.name] = _spearman([a for a, _ in pairs], [b for _, b in pairs])
            cost_of_all = whole[scheme.name]["change_percent"]
            assert cost_of_all is not None
            result["keep"].append(work.kept(scheme, cost_of_all, [layer["name"] for layer in by_cost], step))
            if scheme.scales == "none":
                continue
            for remedy in REMEDIES:
                try:
                    change = work.change(scheme, work.layers, remedy)
                except ValueError:  # tokens of experts: their places are not known
                    continue
                result["remedies"].append({"scheme": scheme.name, "remedy": remedy} | change)
                step()
        progress.update(max(total, 1), None)
    result["schemes"] = [{"name": name} | change for name, change in whole.items()]
    result["rank_correlation"] = agreement
    return result


def _figures(sums: _Sums, tokens: int) -> dict[str, float | None]:
    sqnr = 10.0 * math.log10(sums.signal / sums.noise) if sums.noise > 0 and sums.signal > 0 else None
    estimate = 0.5 * sums.fisher / tokens if tokens else None
    return {
        "sqnr_db": sqnr,
        "estimate_percent": None if estimate is None else 100.0 * math.expm1(min(estimate, _OVERFLOW)),
    }


def ignore_lists(names: Sequence[str], head: str | None = None) -> dict[str, Any]:
    """Layers that stay in 16 bits, as the settings of other libraries want them.

    Args:
        names: of modules, as ``named_modules`` gives them.
        head: the vocabulary's projection, which those libraries name too where it is to stay.

    Returns:
        - ``llm-compressor``: for ``QuantizationModifier(ignore=...)``
        - ``torchao``: for transformers' ``TorchAoConfig(modules_to_not_convert=...)``
        - ``gptqmodel``: for ``QuantizeConfig(dynamic=...)``, where ``-:`` leaves a module out
        - ``bitsandbytes``: for ``BitsAndBytesConfig(llm_int8_skip_modules=...)``, in 8 and in 4 bits
    """
    every = [*names, *([head] if head and head not in names else [])]
    return {
        "llm-compressor": every,
        "torchao": every,
        "gptqmodel": {"-:^" + name.replace(".", r"\.") + "$": {} for name in names},
        "bitsandbytes": every,
    }
