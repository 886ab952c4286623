"""The settings of `softpick convert` and its recipes. Needs no torch until settings are checked."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softpick.experiment.failures import ModelError
from softpick.experiment.settings import (
    DEVICES,
    FILES,
    OWN_TEXT,
    TEXT_FIELD,
    TRUST,
    Range,
    check_settings,
    documented,
    setting,
)

__all__ = ["RECIPES", "ConvertError", "ConvertSettings", "quick_cpu", "radlads_8b", "radlads_small"]

_STAGES = ("align", "distil", "lengthen")
_RANGES = {
    **{f"{stage}_steps": Range(0) for stage in _STAGES},
    **{f"{stage}_batch_size": Range(1) for stage in _STAGES},
    **{f"{stage}_sequence_length": Range(2) for stage in _STAGES},
    **{f"{stage}_learning_rate": Range(0.0, 1e6, above=True) for stage in _STAGES},
    "final_rate": Range(0.0, 1.0),
    "attention_rate": Range(0.0, 1e6, above=True),
    "sink_mass": Range(0.0, 1e6),
    "sink_value": Range(0.0, 1e6),
    "activation": Range(0.0, 1e6),
    "activation_limit": Range(0.0, 1e9, above=True),
    "prompts": Range(0),
    "prompt_tokens": Range(1),
    "continuation_tokens": Range(4),
    "extraction": Range(0),
    "extraction_tokens": Range(16),
}


class ConvertError(ModelError):
    """Settings that cannot work, a model that cannot be converted so, or a folder that holds something else."""


def _of_recipe(help: str, **more: Any) -> Any:
    """A setting whose default is the recipe's."""
    return setting(help=help, shown="the recipe's", **more)


@documented
@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """All that determines a conversion. :meth:`of_recipe` fills in a recipe's values."""

    model: str = setting(help="Hub name, directory, or GGUF file of the model that is converted.", positional=True)
    normalizer: str = setting("softpick", "Normalizer that the model gets; `softpick normalizers` lists them.")
    recipe: str = setting("quick_cpu", "quick_cpu, radlads_small or radlads_8b (docs/convert.md).")
    data: str | None = setting(None, FILES, metavar="PATH", shown=OWN_TEXT)
    validation_data: str | None = setting(
        None, "Held-out text, best of another kind.", metavar="PATH", shown="5 % of the data, by document"
    )
    text_field: str = setting("text", TEXT_FIELD)
    align_steps: int = _of_recipe("Steps of stage 1 (outputs of attention layers); 0 leaves it out.")
    align_sequence_length: int = _of_recipe("Tokens of a sequence in stage 1.")
    align_batch_size: int = _of_recipe("Sequences per step of stage 1.")
    align_learning_rate: float = _of_recipe("Largest learning rate of stage 1.")
    distil_steps: int = _of_recipe("Steps of stage 2 (KL divergence of the logits); 0 leaves it out.")
    distil_sequence_length: int = _of_recipe("Tokens of a sequence in stage 2.")
    distil_batch_size: int = _of_recipe("Sequences per step of stage 2.")
    distil_learning_rate: float = _of_recipe("Largest learning rate of stage 2.")
    attention_rate: float = _of_recipe(
        "Learning rate of attention layers in stages 2 and 3, as a multiple of the others'."
    )
    lengthen_steps: int = _of_recipe("Steps of stage 3 (next token, longer sequences, no teacher); 0 leaves it out.")
    lengthen_sequence_length: int = _of_recipe("Tokens of a sequence in stage 3.")
    lengthen_batch_size: int = _of_recipe("Sequences per step of stage 3.")
    lengthen_learning_rate: float = _of_recipe("Largest learning rate of stage 3.")
    final_rate: float = _of_recipe("Learning rate at the end of the cosine, as a share of the largest.")
    warmup_steps: int = _of_recipe("Steps of linear warm-up, in each stage.")
    micro_batch_size: int = _of_recipe(
        "Sequences per forward pass; if not given, at most the recipe's, and a divisor of the batches."
    )
    embeddings: str = _of_recipe(
        "frozen, or trained in stages 2 and 3.",
        note="Frozen ones are the teacher's tensors, so that tied ones stay tied. Trained ones are untied, and saved so.",
    )
    sink_mass: float = setting(
        0.0,
        "Weight of a penalty on the first key's share of a row's mass.",
        note="For each query but the first: mass at the first key / (mass of the row, without gradient, + 0.1).",
    )
    sink_value: float = setting(
        0.0,
        "Weight of a penalty on the first value's norm.",
        note="Relative to the mean norm of the sequence's values, without gradient.",
    )
    activation: float = setting(
        0.0,
        "Weight of a penalty on massive activations, in stages 2 and 3.",
        note="Sum over entries of max(0, log(|x| / limit)) of each layer's output, mean over sequences and layers.",
    )
    activation_limit: float = setting(
        20.0, "Where an activation becomes massive, as a multiple of the median token's root mean square."
    )
    dtype: str = _of_recipe("float32, or bfloat16 (autocast, fp32 weights).")
    export_dtype: str = setting(
        "auto", "Format of the converted model: auto (the teacher's), float32, bfloat16 or float16."
    )
    gradient_checkpointing: bool = _of_recipe("Recompute layers in the backward pass of stages 2 and 3.", option=None)
    optimizer: str = _of_recipe(
        "A name that the transformers Trainer knows, for example adamw_bnb_8bit.", metavar="NAME"
    )
    save_every: int = _of_recipe("Steps between checkpoints.")
    validation_sequences: int = _of_recipe("Held-out sequences for the losses.")
    samples: int = _of_recipe("Held-out sequences that are analyzed; 0 leaves the analysis out.")
    prompts: int = _of_recipe("Held-out prompts that both models continue; 0 leaves generation out.")
    prompt_tokens: int = setting(32, "Tokens of a prompt.", option=None)
    continuation_tokens: int = setting(64, "Tokens of a continuation.", option=None)
    extraction: int = _of_recipe(
        "Cases of the extraction task, which both models answer; 0 leaves it out.",
        note="Made from held-out text: a passage, then the words before a rare word of it; the model has to write the word.",
    )
    extraction_tokens: int = setting(128, "Tokens of a prompt of the extraction task.", option=None)
    seed: int = setting(0, "Seed of the order of the data.")
    device: str = setting("auto", DEVICES)
    parallel: str = setting(
        "none",
        "none, or fsdp: torchrun's ranks share the weights of both models (torch's FSDP2).",
        note="torchrun --nproc-per-node 2 -m softpick convert ... --parallel fsdp. The number of ranks may change on the way.",
    )
    trust_remote_code: bool = setting(False, TRUST)

    @classmethod
    def of_recipe(cls, model: str, recipe: str = "quick_cpu", **given: Any) -> ConvertSettings:
        """Settings of a recipe; what is given and not None replaces the recipe's value.

        Raises:
            ConvertError: for an unknown recipe or field, and for anything that cannot work.
        """
        if recipe not in RECIPES:
            raise ConvertError(f"recipe: expected one of {', '.join(RECIPES)}; got {recipe!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ConvertError(
                f"{unknown[0]}: is no setting of softpick convert; expected one of {', '.join(sorted(known))}"
            )
        from softpick.experiment.environment import chosen_device

        chosen = RECIPES[recipe]() | {name: value for name, value in given.items() if value is not None}
        settings = cls(model=model, recipe=recipe, **chosen)
        settings = replace(settings, device=chosen_device(settings.device))
        if given.get("micro_batch_size") is None:
            settings = replace(settings, micro_batch_size=settings._fitting_micro_batch())
        settings.check()
        return settings

    def _fitting_micro_batch(self) -> int:
        """The recipe's micro batch, or the largest divisor of it that divides the batches of all stages."""
        batches = [getattr(self, f"{stage}_batch_size") for stage in self.stages]
        return math.gcd(self.micro_batch_size, *(batch for batch in batches if type(batch) is int and batch > 0))

    def check(self) -> None:
        """Raise :class:`ConvertError` for settings that cannot work, before any work is done."""
        from softpick.experiment.environment import missing_device
        from softpick.experiment.models import DTYPES
        from softpick.normalizers import get_normalizer

        check_settings(self, ConvertError, {**_RANGES, "samples": Range(0)})
        try:
            get_normalizer(self.normalizer)
        except ValueError as error:
            raise ConvertError(str(error)) from None
        choices = {
            "embeddings": ("frozen", "trained"),
            "dtype": ("float32", "bfloat16"),
            "export_dtype": tuple(DTYPES),
            "parallel": ("none", "fsdp"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConvertError(f"{name}: expected one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for stage in self.stages:
            batch = getattr(self, f"{stage}_batch_size")
            if batch % self.micro_batch_size:
                raise ConvertError(
                    f"micro_batch_size: expected a divisor of {stage}_batch_size {batch}, got {self.micro_batch_size}"
                )
        if not self.stages:
            raise ConvertError("align_steps, distil_steps, lengthen_steps: expected at least one above 0")
        if self.gradient_checkpointing and (self.sink_mass or self.sink_value or self.activation):
            raise ConvertError(
                "gradient_checkpointing: expected no beside sink_mass, sink_value and activation, which look at what a layer "
                "computes once"
            )
        absent = missing_device(self.device)
        if absent:
            raise ConvertError(f"device: {absent}")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are run, in order."""
        return tuple(stage for stage in _STAGES if getattr(self, f"{stage}_steps"))

    def to_json(self) -> dict[str, Any]:
        """As read back from JSON; paths are absolute."""
        paths: dict[str, Any] = {
            name: str(Path(value).resolve())
            for name in ("model", "data", "validation_data")
            if (value := getattr(self, name)) is not None and Path(value).exists()
        }
        return json.loads(json.dumps(dataclasses.asdict(replace(self, **paths))))


def _stage(name: str, steps: int, length: int, batch: int, rate: float) -> dict[str, Any]:
    values = {"steps": steps, "sequence_length": length, "batch_size": batch, "learning_rate": rate}
    return {f"{name}_{key}": value for key, value in values.items()}


def quick_cpu() -> dict[str, Any]:
    """A model of 135 million parameters in minutes on two cores, to try a normalizer."""
    return {
        **_stage("align", 60, 128, 4, 1e-3),
        **_stage("distil", 40, 128, 4, 2e-5),
        **_stage("lengthen", 0, 256, 4, 1e-5),
        "final_rate": 0.1, "attention_rate": 5.0, "warmup_steps": 10, "micro_batch_size": 4, "embeddings": "frozen",
        "dtype": "float32", "gradient_checkpointing": False, "optimizer": "adamw_torch", "save_every": 20,
        "validation_sequences": 16, "samples": 8, "prompts": 16, "extraction": 32,
    }  # fmt: skip


def radlads_small() -> dict[str, Any]:
    """RADLADS's stages (arXiv 2505.03005, appendix D) cut to 60 million tokens, for models below a billion on one GPU."""
    return {
        **_stage("align", 1500, 512, 32, 1e-3),
        **_stage("distil", 1200, 1024, 32, 5e-5),
        **_stage("lengthen", 0, 4096, 8, 1e-5),
        "final_rate": 0.1, "attention_rate": 4.0, "warmup_steps": 50, "micro_batch_size": 16, "embeddings": "frozen",
        "dtype": "bfloat16", "gradient_checkpointing": False, "optimizer": "adamw_torch_fused", "save_every": 500,
        "validation_sequences": 128, "samples": 64, "prompts": 200, "extraction": 200,
    }  # fmt: skip


def radlads_8b() -> dict[str, Any]:
    """RADLADS as published for Qwen3-8B (arXiv 2505.03005, appendix D): 100 and 600 million tokens."""
    return {
        **_stage("align", 6104, 512, 32, 1e-3),
        **_stage("distil", 4578, 4096, 32, 1e-5),
        **_stage("lengthen", 0, 16384, 8, 1e-5),
        "final_rate": 0.01, "attention_rate": 10.0, "warmup_steps": 0, "micro_batch_size": 1, "embeddings": "trained",
        "dtype": "bfloat16", "gradient_checkpointing": True, "optimizer": "adamw_bnb_8bit", "save_every": 200,
        "validation_sequences": 128, "samples": 64, "prompts": 200, "extraction": 200,
    }  # fmt: skip


RECIPES: Mapping[str, Callable[[], dict[str, Any]]] = {f.__name__: f for f in (quick_cpu, radlads_small, radlads_8b)}
"""Functions without arguments; each gives every setting that depends on the recipe."""
