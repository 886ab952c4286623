"""The settings of `softpick evaluate`. Needs no torch until they are checked."""

from __future__ import annotations

from dataclasses import dataclass

from softpick.evaluation.benchmarks import TASKS, EvaluationError
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

__all__ = ["AGAINST", "DATA_DIR", "LIMIT", "EvaluateSettings"]

# Help texts that `softpick quantize` has, too.
AGAINST = "A further model to compare with; may be given again."
DATA_DIR = "TASK.jsonl for each task (docs/evaluation.md)."
LIMIT = "Examples of each task."


@documented
@dataclass(frozen=True)
class EvaluateSettings:
    """What is evaluated, and on what."""

    model: str = setting(help="Hub name, directory, or GGUF file.", positional=True)
    against: tuple[str, ...] = setting((), AGAINST, metavar="MODEL", repeated=True)
    tasks: tuple[str, ...] = setting(
        TASKS,
        "Comma-separated; none leaves them out.",
        note="Of ``softpick.evaluation.benchmarks.TASKS``.",
        metavar="NAMES",
        words={"none": ()},
    )
    data_dir: str | None = setting(None, DATA_DIR, metavar="DIR", shown="the hub")
    limit: int | None = setting(None, LIMIT, shown="all")
    num_fewshot: int | None = setting(
        None, "Examples in front of each question.", note="None is the task's own number.", shown="0"
    )
    passkey: tuple[int, ...] | None = setting(
        None,
        "Comma-separated tokens of the prompts; paper: 890,1983,3075,4167,4986; or none.",
        note="None is the paper's, as far as a model with learned positions goes.",
        metavar="LENGTHS",
        words={"paper": None, "none": ()},
    )
    passkey_prompts: int = setting(50, "Prompts of each length.")
    perplexity: bool = setting(True, "Perplexity by position.")
    data: str | None = setting(None, f"Text for the perplexity. {FILES}", metavar="PATH", shown=OWN_TEXT)
    text_field: str = setting("text", TEXT_FIELD)
    samples: int = setting(32, "Sequences for the perplexity.")
    sequence_length: int | None = setting(
        None,
        "Tokens of a sequence for the perplexity, BOS included.",
        shown="twice the first model's positions, at most 8192; no more than it has where their embeddings are learned",
    )
    bins: int = setting(16, "Ranges of positions, each with a perplexity.")
    batch_size: int = setting(8, "Sequences per forward pass.")
    seed: int = setting(0, "Seed of passkeys, few-shot examples and standard errors.")
    attn_implementation: str | None = setting(None, ATTENTION, metavar="NAME", shown="the model's own")
    device: str = setting("auto", DEVICES)
    dtype: str = setting("auto", DTYPE)
    trust_remote_code: bool = setting(False, TRUST)

    @property
    def models(self) -> tuple[str, ...]:
        """All of them."""
        return (self.model, *self.against)

    def check(self) -> None:
        """Raise :class:`EvaluationError` for values that cannot work."""
        from softpick.evaluation.tasks import check_tasks
        from softpick.experiment.models import DTYPES

        check_settings(self, EvaluationError)
        if self.dtype not in DTYPES:
            raise EvaluationError(f"dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")
        lengths = self.passkey or ()
        if any(length < 1 for length in lengths) or len(set(lengths)) < len(lengths):
            raise EvaluationError(f"passkey: expected different lengths of at least 1 token, got {list(lengths)}")
        if len(set(self.models)) < len(self.models):
            raise EvaluationError(f"against: expected different models, got {', '.join(self.models)}")
        if not self.tasks and self.passkey == () and not self.perplexity:
            raise EvaluationError("tasks: expected tasks, passkey lengths or perplexities, got none of them")
        check_tasks(self.tasks, self.data_dir, self.num_fewshot)
