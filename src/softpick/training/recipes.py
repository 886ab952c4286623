"""Recipes: all that determines a pretraining run, as data. A recipe differs between normalizers in one field.

:data:`RECIPES` are functions without arguments, so that a recipe of your own is a function as well::

    from dataclasses import replace
    mine = replace(small_h200(), normalizer="softmax", steps=500)
"""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softpick.experiment.settings import check_settings
from softpick.normalizers import get_normalizer

__all__ = [
    "RECIPES",
    "Recipe",
    "RecipeError",
    "get_recipe",
    "paper_1_8b",
    "paper_340m",
    "sinks_h200",
    "small_h200",
    "tiny_cpu",
]


class RecipeError(ValueError):
    """A recipe that cannot work, or that does not fit the folder or the machine it is to run on."""


@dataclass(frozen=True)
class Recipe:
    """A pretraining run of a Llama. Every field can be overridden from the command line as ``field=value``.

    Attributes:
        name: for people.
        normalizer: a name of ``softpick.NORMALIZERS``.
        layers: of the model.
        heads: query heads a layer.
        kv_heads: key and value heads a layer; None is as many as ``heads``.
        width: of the residual stream.
        intermediate: width of the gated MLP.
        vocab_size: of the embedding, and of the tokenizer where one is trained.
        sequence_length: tokens a sequence, BOS included.
        rope_theta: base of the rotary frequencies.
        output_gate: see ``SoftpickLlamaConfig``.
        score_scale: see ``SoftpickLlamaConfig``.
        steps: optimizer steps.
        batch_size: sequences an optimizer step, over all ranks and accumulation.
        micro_batch_size: sequences a forward pass of one rank.
        learning_rate: the largest; cosine to 10 % of it.
        warmup_steps: of linear warm-up.
        weight_decay: of matrices and embeddings.
        max_grad_norm: gradients are clipped to it; inf clips nothing.
        seed: of initial weights and data order.
        data: a file or a directory as for ``read_corpus``, or ``hub:NAME`` for a Hugging Face data set (streamed);
            None is the sources of the running Python's standard library.
        data_config: configuration of the hub data set.
        text_field: of JSONL, parquet and hub data.
        tokenizer: directory or hub name; None trains a byte-level BPE of ``vocab_size`` on the data.
        document_mask: no attention across documents (packed sequences).
        validation_sequences: held out; evaluated at the end and every ``evaluate_every`` steps.
        dtype: ``bfloat16`` (autocast, fp32 weights) or ``float32``.
        compile: compile each decoder layer with ``torch.compile``.
        liger: Liger's fused cross-entropy, and without ``compile`` its norms, rotary and SwiGLU; needs liger-kernel.
        gradient_checkpointing: recompute layers in the backward pass.
        parallel: ``none``, ``ddp`` or ``fsdp`` (FSDP2), under torchrun.
        tensor_parallel: ranks that share each layer's heads and matrices (alone: ``parallel`` is none then).
        log_every: steps between log lines.
        save_every: steps between checkpoints (a multiple of ``log_every``).
        evaluate_every: steps between evaluations; 0 for none but the last.
        probe_every: steps between measurements of sinks, outliers and sparsity on a fixed batch; 0 for none.
        probe_sequences: sequences of that batch.
        max_skipped: steps in a row without a finite gradient after which training stops.
    """

    name: str
    layers: int
    heads: int
    width: int
    intermediate: int
    vocab_size: int
    sequence_length: int
    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_steps: int
    normalizer: str = "softpick"
    kv_heads: int | None = None
    rope_theta: float = 10000.0
    output_gate: bool = False
    score_scale: bool = False
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    data: str | None = None
    data_config: str | None = None
    text_field: str = "text"
    tokenizer: str | None = None
    document_mask: bool = False
    validation_sequences: int = 512
    dtype: str = "bfloat16"
    compile: bool = True
    liger: bool = False
    gradient_checkpointing: bool = False
    parallel: str = "none"
    tensor_parallel: int = 1
    log_every: int = 10
    save_every: int = 500
    evaluate_every: int = 500
    probe_every: int = 500
    probe_sequences: int = 16
    max_skipped: int = 10

    def check(self) -> None:
        """Raise :class:`RecipeError` for fields that cannot work, before any work is done."""
        check_settings(self, RecipeError)
        try:
            get_normalizer(self.normalizer)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        if self.width % self.heads or self.width // self.heads % 2:
            raise RecipeError(f"heads: expected width / heads even and whole, got {self.width} / {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise RecipeError(f"kv_heads: expected a divisor of {self.heads} heads, got {self.kv_heads}")
        if self.batch_size % self.micro_batch_size:
            raise RecipeError(
                f"micro_batch_size: expected a divisor of batch_size {self.batch_size}, got {self.micro_batch_size}"
            )
        if self.save_every % self.log_every:
            raise RecipeError(f"save_every: expected a multiple of log_every {self.log_every}, got {self.save_every}")
        for name, choices in (("dtype", ("bfloat16", "float32")), ("parallel", ("none", "ddp", "fsdp"))):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name}: expected one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.tensor_parallel > 1:
            if self.parallel != "none":
                raise RecipeError(
                    f"tensor_parallel: expected parallel=none beside it, got {self.parallel}; softpick.integrations.torchtitan "
                    "has both at once"
                )
            if self.heads % self.tensor_parallel or (self.kv_heads or self.heads) % self.tensor_parallel:
                raise RecipeError(
                    f"tensor_parallel: expected a divisor of heads {self.heads} and kv_heads {self.kv_heads or self.heads}, "
                    f"got {self.tensor_parallel}"
                )
            if self.liger:
                raise RecipeError(
                    "liger: expected no beside tensor_parallel, whose ranks hold parts of the head that Liger's fused "
                    "cross-entropy needs whole; got yes"
                )
        if self.data is not None and self.data.removeprefix("hub:").strip() == "":
            raise RecipeError(f"data: expected a path or hub:NAME, got {self.data!r}")
        if self.data_config is not None and not (self.data or "").startswith("hub:"):
            raise RecipeError("data_config: is for hub data sets (data=hub:NAME)")

    @property
    def parameters(self) -> int:
        """Parameters of the model, without those of sinks, gates and scales."""
        kv = self.width // self.heads * (self.kv_heads or self.heads)
        layer = 2 * self.width * (self.width + kv) + 3 * self.width * self.intermediate + 2 * self.width
        return self.layers * layer + 2 * self.vocab_size * self.width + self.width

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.batch_size * self.sequence_length

    def override(self, assignments: Sequence[str]) -> Recipe:
        """The recipe with ``field=value`` strings applied.

        Raises:
            RecipeError: for an unknown field or a value of another type.
        """
        kinds = typing.get_type_hints(Recipe)
        values: dict[str, Any] = {}
        for text in assignments:
            name, equals, value = text.partition("=")
            if not equals or name not in kinds or name == "name":
                known = ", ".join(field for field in kinds if field != "name")
                raise RecipeError(f"override: expected FIELD=VALUE with a field of {known}; got {text!r}")
            values[name] = _parse(name, value, kinds[name])
        recipe = replace(self, **values)
        recipe.check()
        return recipe

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return dataclasses.asdict(self)


def _parse(name: str, text: str, kind: Any) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.lower() in ("none", ""):
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is bool:
        if text.lower() in ("true", "yes", "1"):
            return True
        if text.lower() in ("false", "no", "0"):
            return False
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise RecipeError(f"{name}: expected {kind.__name__}, got {reprlib.repr(text)}")


def tiny_cpu() -> Recipe:
    """A minute or two on a laptop: shows that everything works, not what softpick does."""
    return Recipe(
        name="tiny_cpu", layers=2, heads=4, width=64, intermediate=192, vocab_size=512, sequence_length=64,
        steps=300, batch_size=16, micro_batch_size=16, learning_rate=5e-3, warmup_steps=30,
        dtype="float32", compile=False, log_every=10, save_every=50, evaluate_every=100, probe_every=50,
    )  # fmt: skip


def small_h200() -> Recipe:
    """55M parameters, 105M tokens: minutes on one H200."""
    return Recipe(
        name="small_h200", layers=12, heads=8, width=512, intermediate=1408, vocab_size=16384, sequence_length=1024,
        steps=3200, batch_size=32, micro_batch_size=32, learning_rate=1e-3, warmup_steps=200, log_every=20,
        save_every=800, evaluate_every=800, probe_every=800,
    )  # fmt: skip


def sinks_h200() -> Recipe:
    """34M parameters, 295M tokens: softmax gets sinks in it, within minutes on one H200 (docs/results.md)."""
    return Recipe(
        name="sinks_h200", layers=8, heads=8, width=512, intermediate=1408, vocab_size=8192, sequence_length=256,
        steps=9000, batch_size=128, micro_batch_size=128, learning_rate=3e-3, warmup_steps=300, weight_decay=1.0,
        log_every=20, save_every=1500, evaluate_every=3000, probe_every=3000, probe_sequences=64,
    )  # fmt: skip


def paper_340m() -> Recipe:
    """The paper's 340M model (table 4): 52.4 billion tokens of FineWeb-Edu."""
    return Recipe(
        name="paper_340m", layers=24, heads=16, width=1024, intermediate=2816, vocab_size=32000, sequence_length=4096,
        steps=100_000, batch_size=128, micro_batch_size=16, learning_rate=3e-4, warmup_steps=1000,
        data="hub:HuggingFaceFW/fineweb-edu", data_config="sample-100BT", save_every=1000, evaluate_every=1000,
        probe_every=1000, probe_sequences=4,
    )  # fmt: skip


def paper_1_8b() -> Recipe:
    """The paper's 1.8B model (table 4): 104.9 billion tokens of FineWeb-Edu; several GPUs."""
    return Recipe(
        name="paper_1_8b", layers=32, heads=32, width=2048, intermediate=5632, vocab_size=32000, sequence_length=4096,
        steps=200_000, batch_size=128, micro_batch_size=8, learning_rate=2e-4, warmup_steps=2000,
        data="hub:HuggingFaceFW/fineweb-edu", data_config="sample-100BT", parallel="fsdp", gradient_checkpointing=True,
        save_every=1000, evaluate_every=1000, probe_every=2000, probe_sequences=4,
    )  # fmt: skip


RECIPES: Mapping[str, Callable[[], Recipe]] = {
    f.__name__: f for f in (tiny_cpu, small_h200, sinks_h200, paper_340m, paper_1_8b)
}
"""The recipes of this package."""


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        RecipeError: for an unknown name.
    """
    if name not in RECIPES:
        raise RecipeError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    return RECIPES[name]()
