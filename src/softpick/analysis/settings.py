"""The settings of `softpick analyze`. Needs no torch until they are checked."""

from __future__ import annotations

from dataclasses import dataclass

from softpick.experiment.failures import ModelError
from softpick.experiment.settings import (
    ATTENTION,
    DEVICES,
    DTYPE,
    FILES,
    OWN_TEXT,
    TEXT_FIELD,
    TRUST,
    Range,
    check_settings,
    documented,
    setting,
)

__all__ = ["KNOCKOUTS", "LONGEST", "SAMPLE_TEXTS", "TRACKERS", "AuditError", "AuditSettings"]

SAMPLE_TEXTS = (
    "The lighthouse keeper wrote one line in his book every night. On the last night of the year he wrote two, and in the "
    "morning nobody could say which of them had been meant for the sea.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n\n"
    "print(mean([1.0, 2.0, 4.0]))\n",
    "Question: A train leaves at 9:40 and arrives at 11:05. How long does the journey take?\nAnswer: One hour and "
    "twenty-five minutes.\nQuestion: And if it is ten minutes late?\nAnswer:",
)
"""What the attention maps of the report show unless other texts are given: prose, code, a dialogue."""

KNOCKOUTS = ("first", "strongest")
TRACKERS = ("tensorboard", "trackio", "wandb")
LONGEST = 256  # tokens of a sequence, unless the user says otherwise


class AuditError(ModelError):
    """The settings cannot work, or the model cannot be audited; the message says why."""


@documented
@dataclass(frozen=True)
class AuditSettings:
    """What is audited, and on what."""

    model: str = setting(help="Hub name, directory, or GGUF file.", positional=True)
    against: str | None = setting(None, "A second model to compare with.", metavar="MODEL")
    data: str | None = setting(None, FILES, metavar="PATH", shown=OWN_TEXT)
    text_field: str = setting("text", TEXT_FIELD)
    texts: tuple[str, ...] = setting(
        SAMPLE_TEXTS,
        "Text of an attention map; may be given again.",
        option="text",
        repeated=True,
        shown="three samples",
    )
    samples: int = setting(64, "Sequences that are measured.")
    sequence_length: int | None = setting(
        None, "Tokens of a sequence, special tokens included.", shown="the fewest positions of a model, at most 256"
    )
    batch_size: int = setting(8, "Sequences per forward pass.")
    map_tokens: int = setting(
        64,
        note="At most this many tokens of a text, special ones included, in an attention map; fewer where the model has room "
        "for fewer.",
        option=None,
    )
    knockout: tuple[str | int, ...] = setting(
        ("first",),
        "Comma-separated: first, strongest, or a position from 0. Also the perplexity without that token's key, evicted or "
        "absent (decoders); none leaves it out.",
        note="The keys are hidden one after the other. ``strongest`` is, of each sample, the key with the largest alpha "
        "averaged over layers and heads.",
        metavar="KEYS",
        words={"none": ()},
    )
    evict_after: int | None = setting(
        None,
        "Tokens after which a key is evicted: queries so far behind it and later do not see it.",
        note="Perplexities of the knockout are of what comes more than twice as far behind the key.",
        shown="16, or a quarter of the sequence",
    )
    bos: bool = setting(True, "Start each sequence with BOS where the tokenizer or the model has one (decoders).")
    cost: bool = setting(
        False,
        "Also what rounding costs: whole model, each layer, layers to keep in 16 bits, remedies (decoders; encoders: errors "
        "of each layer).",
    )
    cost_samples: int = setting(
        2, "Sequences on which --cost is measured: the first of the samples. More take longer and are more exact."
    )
    knockout_samples: int = setting(16, "Sequences of the knockout: the first of the samples.")
    fail_if: tuple[str, ...] = setting(
        (),
        "End with exit code 3 if this holds for a model, for example 'sink_first_0.3 > 5'; may be given again.",
        note="Names of figures are those of the summary, and eviction_KEY, absence_KEY, cost_SCHEME.",
        metavar="CONDITION",
        repeated=True,
    )
    report_to: tuple[str, ...] = setting(
        (),
        "Also log the figures with tensorboard (into the output folder), trackio or wandb; may be given again.",
        metavar="TRACKER",
        repeated=True,
    )
    step: int = setting(0, "Training step that the logged figures belong to.")
    attn_implementation: str | None = setting(
        None,
        ATTENTION,
        note="Where the model's own shows no weights, ``sdpa``.",
        metavar="NAME",
        shown="the model's own",
    )
    device: str = setting("auto", DEVICES)
    dtype: str = setting("auto", DTYPE)
    trust_remote_code: bool = setting(False, TRUST)

    @property
    def eviction(self) -> int:
        """``evict_after``, or its default."""
        return min(16, self.length // 4) if self.evict_after is None else self.evict_after

    @property
    def length(self) -> int:
        """``sequence_length``; before the models are known, the most that it is by default."""
        return LONGEST if self.sequence_length is None else self.sequence_length

    def check(self) -> None:
        """Raise :class:`AuditError` for values that cannot work."""
        from softpick.analysis.verdict import parse_condition
        from softpick.experiment.models import DTYPES, FUSED
        from softpick.experiment.reading import check_text

        check_settings(self, AuditError, {"sequence_length": Range(4)})
        if self.dtype not in DTYPES:
            raise AuditError(f"dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for key in self.knockout:
            if key not in KNOCKOUTS and not (isinstance(key, int) and not isinstance(key, bool)):
                raise AuditError(f"knockout: expected {', '.join(KNOCKOUTS)}, or a position; got {key!r}")
            last = self.length - 2 - 2 * self.eviction
            if last < 0:
                raise AuditError(
                    f"evict_after: {self.eviction} needs sequences of {2 * self.eviction + 2} tokens or more, got a "
                    f"sequence_length of {self.length}; give a smaller one (or --knockout none)"
                )
            if isinstance(key, int) and not 0 <= key <= last:
                raise AuditError(
                    f"knockout: expected a position from 0 to {last} (more than twice evict_after, {self.eviction}, must "
                    f"follow it in a sequence of {self.length}), got {key}"
                )
        if (self.attn_implementation or "").startswith(FUSED):
            raise AuditError(
                f"attn_implementation: {self.attn_implementation!r} shows no weights; expected eager, sdpa or a normalizer"
            )
        if not self.texts or not all(text.strip() for text in self.texts):
            raise AuditError("texts: expected at least one text, none of them empty")
        for text in self.texts:
            check_text(text, "texts: a text", AuditError)
        for condition in self.fail_if:
            name = parse_condition(condition).name
            of, _, key = name.partition("_")
            if of == "cost" and not self.cost:
                raise AuditError(f"fail_if: the figure {name} needs --cost")
            if of in ("eviction", "absence") and key not in map(str, self.knockout):
                raise AuditError(f"fail_if: the figure {name} needs --knockout {key}")
        for name in self.report_to:
            if name not in TRACKERS:
                raise AuditError(f"report_to: expected one of {', '.join(TRACKERS)}; got {name!r}")
