"""What is minimized: outputs of attention layers (stage 1), logits (stage 2), the next token (stage 3), and sinks.

Each stage is a module for the Trainer that returns ``{"loss": ...}``. Only what is trained is among its saved tensors; the
teacher is no part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from softpick.conversion.recipes import ConvertSettings
from softpick.integrations.transformers import intercept_attention
from softpick.training.sharding import is_sharded

__all__ = ["Aligner", "Distiller", "Penalties", "divergence", "excess", "first_share", "parameter_groups"]

_CHUNK = 1 << 24  # entries of logits that are worked on at once
_SMALL_MASS = 0.1


class Penalties:
    """Optional terms of the loss: mass and value norm at the first key, massive activations.

    Args:
        settings: their weights.
        student: whose attention and layers are looked at.
        layers: names of its attention modules.
        activations: also look at the outputs of decoder layers.
    """

    def __init__(self, settings: ConvertSettings, student: Any, layers: list[str], activations: bool) -> None:
        self.settings, self.model = settings, (student,)
        # the residual stream is what the module around an attention module returns
        names = dict.fromkeys(name.rpartition(".")[0] for name in layers)
        wanted = activations and settings.activation > 0
        self.decoder_layers = [student.get_submodule(name) for name in names] if wanted else []
        self.attention = settings.sink_mass > 0 or settings.sink_value > 0
        self.terms: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, forward passes of the student leave their terms."""
        self.terms = {"sink_mass": [], "sink_value": [], "activation": []}
        with ExitStack() as stack:
            if self.attention:
                stack.enter_context(intercept_attention(self.model[0], self._around))
            for layer in self.decoder_layers:
                stack.callback(layer.register_forward_hook(self._after_layer).remove)
            yield

    def total(self) -> Tensor | float:
        """The weighted sum of each term's mean over layers; 0 where there is none."""
        parts = [
            getattr(self.settings, name) * torch.stack(found).mean() for name, found in self.terms.items() if found
        ]
        return torch.stack(parts).sum() if parts else 0.0

    def _around(
        self, implementation: str, function: Callable[..., Any], default: Callable[..., Any]
    ) -> Callable[..., Any]:
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            if self.settings.sink_value and value.shape[2] > 1:
                norms = value.float().norm(dim=-1)
                self.terms["sink_value"].append((norms[..., 0] / norms.mean(-1).detach().clamp(min=1e-6)).mean())
            if self.settings.sink_mass and query.shape[2] > 1:
                share = first_share(function, module, query, key, mask, kwargs)
                self.terms["sink_mass"].append(share.mean())
            return function(module, query, key, value, mask, **kwargs)

        return attention

    def _after_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        self.terms["activation"].append(excess(states, self.settings.activation_limit))


def first_share(
    function: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor:
    """``(B, T - 1, H)``: of each query but the first, the first key's share of the row's mass.

    The attention function itself computes it, from values that mark the first key and every key.

    Args:
        function: of transformers' AttentionInterface.
        module: the attention layer.
        query: ``(B, H, T, D)``.
        key: ``(B, Hkv, T, D)``.
        mask: as the layer gave it.
        kwargs: what else the layer gave.
    """
    marks = key.new_zeros(*key.shape[:3], 2)
    marks[:, :, 0, 0] = 1
    marks[..., 1] = 1
    given = {name: value for name, value in kwargs.items() if name not in ("output_gate", "output_attentions")}
    sums = function(module, query, key, marks, mask, **given)[0][:, 1:].float()
    return sums[..., 0] / (sums[..., 1].detach() + _SMALL_MASS)


def excess(states: Tensor, limit: float) -> Tensor:
    """The logarithm by which entries exceed ``limit`` times the median token's root mean square, in logarithms.

    Args:
        states: ``(B, T, C)``.
        limit: a multiple.

    Returns:
        The sum over tokens and channels, mean over ``B``; fp32.
    """
    states = states.float()
    typical = states.detach().square().mean(-1).sqrt().median()
    size = states.abs().clamp(min=1e-12)
    return torch.relu(torch.log(size / (limit * typical.clamp(min=1e-12)))).sum((1, 2)).mean()


class _Divergence(torch.autograd.Function):
    """KL divergence in pieces, with its gradient made on the way in the teacher's memory: no third tensor of that size."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        rows, total = student.shape[0], torch.zeros((), dtype=torch.float64, device=student.device)
        size = max(1, _CHUNK // student.shape[1])
        for first in range(0, rows, size):
            ours = torch.log_softmax(student[first : first + size].float(), -1)
            theirs = torch.log_softmax(teacher[first : first + size].float(), -1)
            probabilities = theirs.exp()
            total += (probabilities * theirs.sub_(ours)).sum(dtype=torch.float64)
            teacher[first : first + size] = ours.exp_().sub_(probabilities).div_(rows)
        ctx.save_for_backward(teacher)
        return (total / rows).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the distributions of the next token, mean over positions.

    Args:
        student: ``(..., V)`` logits; receives a gradient.
        teacher: of the same shape and dtype; overwritten.

    Returns:
        A scalar in nats, fp32.
    """
    found: Tensor = _Divergence.apply(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1]))
    return found


class _Stage(nn.Module):
    """What the Trainer sees: saved is what is trained; dropout stays off, which the teacher does not have either."""

    trained: frozenset[str]

    @property
    def is_distributed_loading_by_transformers(self) -> bool:
        """The Trainer's question whether ranks share the weights already, so that it must not do it again."""
        return is_sharded(self)

    def train(self, mode: bool = True) -> _Stage:
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of what is trained."""
        return {name: t for name, t in super().state_dict(*args, **kwargs).items() if name in self.trained}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Of what is trained; all of it must be there."""
        result = super().load_state_dict(state_dict, strict=False)
        missing = sorted(self.trained & set(result.missing_keys))
        assert not missing, missing
        result.missing_keys.clear()
        return result

    def _remember_trained(self) -> None:
        self.trained = frozenset(name for name, p in self.named_parameters() if p.requires_grad)


class Aligner(_Stage):
    """Stage 1. The teacher runs; each of its attention layers hands its inputs to the student's layer of the same name.

    The loss is the mean over layers of ``mean_t |s_t - y_t| / sqrt(mean_t |y_t|^2)``, ``s_t`` and ``y_t`` what the student's
    and the teacher's layer return for token ``t``. The divisor changes no direction: a layer's weights are in its own term
    only. It keeps the clipping of gradients from favoring layers with large outputs.

    Args:
        teacher: of transformers, frozen.
        student: from :func:`softpick.conversion.models.make_student`.
        names: of the attention layers.
        penalties: further terms.
    """

    def __init__(self, teacher: Any, student: Any, names: list[str], penalties: Penalties) -> None:
        super().__init__()
        self.layers = nn.ModuleList(student.get_submodule(name) for name in names)
        self.layers.requires_grad_(True)
        self.models = (teacher, student)  # in a tuple, so that they are no part of this module
        self.names, self.penalties = names, penalties
        self.errors: list[Tensor] = []
        self._remember_trained()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss; :attr:`errors` then has each layer's term.

        Args:
            input_ids: ``(B, T)``.
            labels: not used; the Trainer evaluates only what has some.
        """
        teacher, differentiate = self.models[0], torch.is_grad_enabled()
        terms: list[Tensor] = []
        with ExitStack() as stack:
            if differentiate:
                stack.enter_context(self.penalties.watching())
            for name, layer in zip(self.names, self.layers, strict=True):
                hook = _follower(layer, terms, differentiate)
                stack.callback(teacher.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
            with torch.no_grad():
                teacher.base_model(input_ids=input_ids, use_cache=False)
        self.errors = [term.detach() for term in terms]
        loss = torch.stack(terms).mean()
        return {"loss": loss + self.penalties.total() if differentiate else loss}


def _follower(layer: nn.Module, terms: list[Tensor], differentiate: bool) -> Callable[..., None]:
    """A hook of a teacher's layer that calls the student's with the same inputs, and appends its term of the loss."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        wanted = (output[0] if isinstance(output, tuple) else output).float()
        with torch.set_grad_enabled(differentiate):
            found = layer(*args, **kwargs)
            found = (found[0] if isinstance(found, tuple) else found).float()
            size = wanted.square().sum(-1).mean().sqrt().clamp(min=1e-12)
            terms.append((found - wanted).norm(dim=-1).mean() / size)

    return hook


class Distiller(_Stage):
    """Stages 2 and 3: the KL divergence of the logits from the teacher's, or without a teacher the next token's loss.

    Args:
        teacher: of transformers, frozen; or None.
        student: with weights of its own where it is trained.
        penalties: further terms.
        recompute: recompute layers in the backward pass.
    """

    def __init__(self, teacher: Any | None, student: Any, penalties: Penalties, recompute: bool = False) -> None:
        super().__init__()
        self.student, self.recompute = student, recompute
        if recompute:
            enable = getattr(student, "activation_checkpointing_enable", None)  # the name in newer transformers
            (enable or student.gradient_checkpointing_enable)({"use_reentrant": False})
        self.models = (teacher,)  # in a tuple, so that it is no part of this module
        self.penalties = penalties
        self._remember_trained()

    def train(self, mode: bool = True) -> Distiller:
        """Recomputing layers is something that transformers does in training mode only."""
        super().train(mode)
        self.student.train(mode and self.recompute)
        return self

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss.

        Args:
            input_ids: ``(B, T)``.
            labels: not used; the Trainer evaluates only what has some.
        """
        teacher = self.models[0]
        differentiate = torch.is_grad_enabled()
        with self.penalties.watching() if differentiate else nullcontext():
            logits = self.student(input_ids=input_ids, use_cache=False).logits
        if teacher is None:
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = nn.functional.cross_entropy(flat, input_ids[:, 1:].flatten())
        else:
            with torch.no_grad():
                theirs = teacher(input_ids=input_ids, use_cache=False).logits
            loss = divergence(logits, theirs)
        return {"loss": loss + self.penalties.total() if differentiate else loss}


def parameter_groups(
    settings: ConvertSettings, stage: str, layers: list[str]
) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """What gives the parameters of attention layers ``attention_rate`` times the learning rate of the others (not in stage 1).

    Args:
        settings: of the conversion.
        stage: its name.
        layers: names of the attention layers.
    """

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        inside = tuple(f"student.{name}." for name in layers)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        rate = getattr(settings, f"{stage}_learning_rate")
        if stage == "align":
            return [{"params": [p for _, p in named], "lr": rate}]
        parts = [(True, rate * settings.attention_rate), (False, rate)]
        found = [{"params": [p for n, p in named if n.startswith(inside) == mine], "lr": lr} for mine, lr in parts]
        return [group for group in found if group["params"]]

    return groups
