"""Glue to the transformers Trainer: the model, the arguments, training that can be interrupted and resumed.

The Trainer trains; here is only what every recipe of ours needs around it. Import :mod:`softpick.training` alone where
transformers may be missing.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from softpick.integrations.transformers import SoftpickLlamaConfig, SoftpickLlamaForCausalLM
from softpick.normalizers import get_normalizer
from softpick.progress import ProgressBar
from softpick.training.data import SequenceDataset, collate

__all__ = [
    "Interrupted",
    "Outcome",
    "StopRequest",
    "build_model",
    "last_checkpoint",
    "parameter_count",
    "quiet_transformers",
    "train",
    "training_arguments",
    "write_json",
]

_COMPLETE = "complete.json"


class Interrupted(Exception):  # noqa: N818 - not an error: the run can be continued
    """Training stopped on request at a checkpoint."""


def build_model(
    normalizer: str,
    *,
    vocab_size: int,
    layers: int,
    heads: int,
    width: int,
    sequence_length: int,
    seed: int,
    bos: int = 0,
    eos: int = 1,
    **config: Any,
) -> SoftpickLlamaForCausalLM:
    """A Llama with a normalizer. At one seed all normalizers start from the same weights.

    The weights are drawn for softmax and copied, so that a normalizer's own parameters (learned sinks) do not shift the
    random numbers of the others. ``config`` are further fields of ``SoftpickLlamaConfig``.
    """

    def make(name: str) -> SoftpickLlamaForCausalLM:
        fields: dict[str, Any] = {
            "normalizer": name,
            "vocab_size": vocab_size,
            "hidden_size": width,
            # two thirds of the usual 4 for a gated MLP, in multiples of 16
            "intermediate_size": -(-width * 8 // 3 // 16) * 16,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": sequence_length,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": None,
            "tie_word_embeddings": False,
            "use_cache": False,
        }
        return SoftpickLlamaForCausalLM(SoftpickLlamaConfig(**(fields | config)))

    get_normalizer(normalizer)
    set_seed(seed)
    base = make("softmax")
    if normalizer == "softmax":
        return base
    model = make(normalizer)
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("sinks") for name in missing), missing
    return model


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def training_arguments(
    output_dir: str | Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    device: str = "cpu",
    warmup_steps: int = 0,
    log_every: int = 25,
    evaluate_every: int | None = None,
    save_every: int | None = None,
    **overrides: Any,
) -> TrainingArguments:
    """Our defaults: AdamW (0.9, 0.95), cosine to 10 %, gradients clipped to norm 1, checkpoints to resume from.

    Checkpoints fall on steps that are logged: the logged loss is a mean since the last log, and a run that resumed
    between two logs would log another mean than one that never stopped.

    Args:
        output_dir: where checkpoints go.
        steps: optimizer steps.
        batch_size: sequences a step.
        learning_rate: the largest.
        weight_decay: of matrices and embeddings; norms and biases have none (the Trainer's rule).
        seed: of the data order.
        device: ``"cpu"``, or ``"cuda"``, ``"mps"``: the accelerator that accelerate finds.
        warmup_steps: of linear warm-up.
        log_every: steps between logs.
        evaluate_every: steps between evaluations; None for none.
        save_every: steps between checkpoints, rounded up to a multiple of ``log_every``; None for none.
        overrides: any other field of ``TrainingArguments``.
    """
    fields: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 4 * batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": warmup_steps,
        "max_grad_norm": 1.0,
        "seed": seed,
        "data_seed": seed,
        "logging_strategy": "steps",
        "logging_steps": log_every,
        "logging_nan_inf_filter": False,  # a loss that is not finite must show
        "eval_strategy": "no" if evaluate_every is None else "steps",
        "eval_steps": evaluate_every,
        "save_strategy": "no" if save_every is None else "steps",
        "save_steps": -(-(save_every or 1) // log_every) * log_every,
        "save_total_limit": 2,  # the last one stays until the next is complete
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": device == "cpu",
    }
    arguments = TrainingArguments(**(fields | overrides))
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs of one process would mean DataParallel; recipes use torchrun
    return arguments


@dataclass
class StopRequest:
    """Ctrl-C as a wish: the first asks training to stop at a checkpoint, the second interrupts at once."""

    requested: bool = False

    @contextmanager
    def on_signals(self) -> Iterator[StopRequest]:
        """Listen to SIGINT and SIGTERM (in the main thread; elsewhere this does nothing)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            os.write(2, b"\nstopping at the next checkpoint; once more stops at once\n")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Watch(TrainerCallback):
    """Reports progress, stops on request, and marks checkpoints that were written to the end."""

    def __init__(self, stop: StopRequest | None, progress: ProgressBar | None, seconds: float) -> None:
        self.stop, self.progress = stop, progress
        self.before, self.start = seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if (
            self.stop is not None
            and self.stop.requested
            and state.global_step % args.logging_steps == 0
            and state.global_step < state.max_steps
        ):
            control.should_save = control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.progress is not None:
            self.progress.update(state.global_step, (logs or {}).get("loss"))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / _COMPLETE, {"step": state.global_step, "seconds": self.seconds})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below a folder; one that a crash cut short does not count."""
    found = [p.parent for p in folder.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


@dataclass
class Outcome:
    """What training gave: the loss on the evaluation data, the seconds over all its sessions, the curves."""

    validation_loss: float
    seconds: float
    curves: dict[str, list[float]] = field(default_factory=dict)


def train(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    train_data: SequenceDataset,
    validation_data: SequenceDataset,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    evaluation_data: SequenceDataset | None = None,
    stop: StopRequest | None = None,
    progress: ProgressBar | None = None,
) -> Outcome:
    """Train, from the last complete checkpoint in ``arguments.output_dir`` if there is one; then evaluate.

    Args:
        model: with its initial weights; trained in place.
        arguments: from :func:`training_arguments`.
        train_data: rows of token ids.
        validation_data: for the final loss.
        tokenizer: saved with every checkpoint.
        evaluation_data: for the evaluations during training; by default ``validation_data``.
        stop: asked after every logged step; listens to SIGINT and SIGTERM while training.
        progress: told at every logged step.

    Raises:
        Interrupted: after the checkpoint that ``stop`` asked for.
    """
    checkpoint = last_checkpoint(Path(arguments.output_dir))
    seconds = 0.0
    if checkpoint is not None:
        seconds = float(json.loads((checkpoint / _COMPLETE).read_text())["seconds"])
    watch = _Watch(stop, progress, seconds)
    with quiet_transformers():
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train_data,
            eval_dataset=evaluation_data if evaluation_data is not None else validation_data,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        with stop.on_signals() if stop is not None else nullcontext():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = watch.seconds
        history = list(trainer.state.log_history)
        if trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}")
        trainer.remove_callback(watch)
        loss = trainer.evaluate(validation_data)["eval_loss"]
    return Outcome(loss, seconds, _curves(history))


def _curves(history: list[dict[str, float]]) -> dict[str, list[float]]:
    logs = [entry for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    return {
        "step": [entry["step"] for entry in logs],
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [entry["grad_norm"] for entry in logs],
        "eval_step": [entry["step"] for entry in evaluations],
        "eval_loss": [entry["eval_loss"] for entry in evaluations],
    }


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Only errors of transformers' own log, and no bars: progress is ours."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
