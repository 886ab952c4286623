"""THE table of benchmark tasks: where a task's data are, which fields a line has, which numbers count. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HEADLINES", "RECORDS", "TASKS", "EvaluationError", "Task"]


class EvaluationError(ValueError):
    """The evaluation cannot run so; the message names the argument, what was expected and what came."""


@dataclass(frozen=True)
class Task:
    """One benchmark task."""

    stock: str  # the harness's file
    hub: str  # its data set
    split: str  # that the harness scores
    fields: str  # of a line of a local file
    needs: tuple[str, ...]
    shots: bool = True  # few-shot examples come from a training split
    headlines: tuple[str, ...] = ("acc_norm", "acc")


RECORDS = {
    "arc_easy": Task(
        "arc/arc_easy.yaml",
        "allenai/ai2_arc",
        "test",
        "question, choices {text [...], label [...]}, answerKey",
        ("question", "choices", "answerKey"),
    ),
    "lambada_openai": Task(
        "lambada/lambada_openai.yaml",
        "EleutherAI/lambada_openai",
        "test",
        "text",
        ("text",),
        shots=False,
        headlines=("acc", "perplexity"),
    ),
    "piqa": Task(
        "piqa/piqa.yaml",
        "baber/piqa",
        "validation",
        "goal, sol1, sol2, label (0 or 1)",
        ("goal", "sol1", "sol2", "label"),
    ),
    "sciq": Task(
        "sciq/sciq.yaml",
        "allenai/sciq",
        "test",
        "question, support, distractor1, distractor2, distractor3, correct_answer",
        ("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
    "wikitext": Task(
        "wikitext/wikitext.yaml",
        "EleutherAI/wikitext_document_level",
        "test",
        "page (one document)",
        ("page",),
        shots=False,
        headlines=("word_perplexity",),
    ),
}

TASKS: tuple[str, ...] = tuple(RECORDS)
"""The paper's five (table 1)."""

HEADLINES: dict[str, tuple[str, ...]] = {name: task.headlines for name, task in RECORDS.items()}
"""Which of a task's numbers the paper's tables show."""
