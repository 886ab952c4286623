"""The settings of `softpick quantize`. Needs no torch until they are checked."""

from __future__ import annotations

from dataclasses import dataclass

from softpick.evaluation.benchmarks import EvaluationError
from softpick.evaluation.settings import AGAINST, DATA_DIR, LIMIT
from softpick.experiment.settings import (
    ATTENTION,
    DEVICES,
    DTYPE,
    FILES,
    OWN_TEXT,
    TEXT_FIELD,
    TRUST,
    check_settings,
    documented,
    setting,
)
from softpick.quantization.methods import METHODS, grouping

__all__ = ["QuantizeSettings"]

_NAMES = ", ".join(METHODS)
_CALIBRATED = [method.name for method in METHODS.values() if method.calibrated]
_GGUF = [method.name for method in METHODS.values() if method.gguf]


def _bits() -> str:
    """The bits of each method, for the help text."""
    (first, *others) = [(method.name, ",".join(map(str, method.bits))) for method in METHODS.values()]
    return "; ".join([f"{first[0]} has {first[1]}", *(f"{name} {bits}" for name, bits in others)])


@documented
@dataclass(frozen=True)
class QuantizeSettings:
    """What is quantized how, and on what it is evaluated."""

    model: str = setting(
        help="Hub name, directory or GGUF file.",
        note=f"A GGUF file for {', '.join(_GGUF)} and simulated rounding.",
        positional=True,
    )
    against: tuple[str, ...] = setting((), AGAINST, metavar="MODEL", repeated=True)
    methods: tuple[str, ...] = setting(
        ("hqq",),
        f"Comma-separated: {_NAMES}; none leaves weights alone.",
        option="method",
        metavar="NAMES",
        words={"none": ()},
    )
    bits: tuple[int, ...] | None = setting(
        None,
        f"Bits of a weight, comma-separated; {_bits()}.",
        shown="those of 2,3,4,8",
    )
    activations: tuple[str, ...] = setting(
        ("int8-tensor", "int8-token", "fp8-tensor", "fp8-token"),
        "Simulated weights and activations, comma-separated: int8, int6, int4 or fp8, and -tensor (one scale per "
        "activation, from calibration) or -token; none leaves them out.",
        note="Weights are rounded to the same format, with one scale per output.",
        metavar="NAMES",
        words={"none": ()},
    )
    kv_cache: tuple[int | str, ...] = setting(
        (8, 4), "Simulated keys and values, comma-separated: bits, or fp8; or none.", metavar="BITS", words={"none": ()}
    )
    group_size: int | None = setting(
        None,
        f"Weights that share a scale ({', '.join(grouping())}).",
        note="They are neighbouring inputs of an output.",
        shown="64, or the largest power of two that divides every layer's inputs",
    )
    tasks: tuple[str, ...] = setting(
        (), "Comma-separated, as for `softpick evaluate`.", metavar="NAMES", words={"none": ()}
    )
    data_dir: str | None = setting(None, DATA_DIR, metavar="DIR", shown="the hub")
    limit: int | None = setting(None, LIMIT, shown="all")
    data: str | None = setting(
        None,
        f"Text for perplexity and calibration. {FILES}",
        note="Calibration uses one part of the documents, perplexity the rest.",
        metavar="PATH",
        shown=OWN_TEXT,
    )
    text_field: str = setting("text", TEXT_FIELD)
    samples: int = setting(64, "Sequences for the perplexity.")
    calibration_samples: int = setting(
        64, f"Sequences that {', '.join(_CALIBRATED)} and the scales of -tensor look at."
    )
    sequence_length: int | None = setting(
        None, "Tokens of a sequence, BOS included.", shown="the fewest positions of a model, at most 2048"
    )
    batch_size: int = setting(8, "Sequences per forward pass.")
    seed: int = setting(0, "Seed of few-shot examples and standard errors.")
    attn_implementation: str | None = setting(None, ATTENTION, metavar="NAME", shown="the model's own")
    device: str = setting("auto", DEVICES)
    dtype: str = setting("auto", DTYPE)
    trust_remote_code: bool = setting(False, TRUST)
    keep: bool = setting(False, "Leave the quantized models in the folder.")

    @property
    def models(self) -> tuple[str, ...]:
        """All of them."""
        return (self.model, *self.against)

    def bits_of(self, method: str) -> list[int]:
        """The bits with which a method is run, ascending."""
        return sorted(set(METHODS[method].bits) & set((2, 3, 4, 8) if self.bits is None else self.bits))

    def check(self) -> None:
        """Raise :class:`EvaluationError` for values that cannot work."""
        from softpick.evaluation.tasks import check_tasks
        from softpick.experiment.models import DTYPES
        from softpick.experiment.rounding import FORMATS, GRANULARITIES

        check_settings(self, EvaluationError)
        for name, known in (("methods", METHODS), ("dtype", DTYPES)):
            values = getattr(self, name)
            for value in (values,) if isinstance(values, str) else values:
                if value not in known:
                    raise EvaluationError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
        for name in self.methods:
            if not self.bits_of(name):
                has = ", ".join(map(str, METHODS[name].bits))
                raise EvaluationError(f"bits: {name} has {has}; got {', '.join(map(str, self.bits or ())) or 'none'}")
        unused = [bits for bits in self.bits or () if all(bits not in METHODS[name].bits for name in self.methods)]
        if unused and self.methods:
            raise EvaluationError(f"bits: none of {', '.join(self.methods)} has {', '.join(map(str, unused))} bits")
        if self.bits is not None and not self.methods:
            raise EvaluationError(f"bits: expected none without methods, got {', '.join(map(str, self.bits))}")
        if self.group_size is not None and not set(grouping()) & set(self.methods):
            raise EvaluationError(f"group_size: expected none without {' or '.join(grouping())}, got {self.group_size}")
        for choice in self.activations:
            name, _, granularity = choice.partition("-")
            if name not in FORMATS or granularity not in GRANULARITIES:
                raise EvaluationError(
                    f"activations: expected one of {', '.join(FORMATS)} and then -{' or -'.join(GRANULARITIES)}, such as "
                    f"int8-tensor; got {choice!r}"
                )
        for bits in self.kv_cache:
            if bits != "fp8" and (isinstance(bits, str) or not 2 <= bits <= 8):
                raise EvaluationError(f"kv_cache: expected 2 to 8 bits or fp8, got {bits}")
        for name in ("methods", "bits", "activations", "kv_cache", "models"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise EvaluationError(f"{name}: expected different ones, got {', '.join(map(str, values))}")
        if not (self.methods or self.activations or self.kv_cache):
            raise EvaluationError("methods: expected methods, activations or kv_cache, got none of them")
        if self.tasks:
            check_tasks(self.tasks, self.data_dir, None)
