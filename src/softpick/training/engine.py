"""Glue to the transformers Trainer: the model, the arguments, training that can be interrupted and resumed.

The Trainer trains; here is only what every recipe of ours needs around it. Import :mod:`softpick.training` alone where
transformers may be missing.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint.state_dict as distributed_state
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
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
from transformers.trainer_utils import SaveStrategy

from softpick.experiment.files import read_json, write_json, write_text, writing
from softpick.experiment.progress import ProgressBar
from softpick.experiment.quiet import quiet_transformers
from softpick.experiment.stopping import Interrupted, StopRequest
from softpick.integrations.transformers import SoftpickLlamaConfig, SoftpickLlamaForCausalLM
from softpick.normalizers import get_normalizer
from softpick.training import checkpoints
from softpick.training.checkpoints import last_checkpoint
from softpick.training.data import collate
from softpick.training.sharding import is_sharded, whole_state

__all__ = [
    "Guard",
    "Interrupted",
    "NonFinite",
    "Outcome",
    "Speed",
    "StopRequest",
    "build_model",
    "last_checkpoint",
    "parameter_count",
    "shard_tensors",
    "train",
    "training_arguments",
    "write_json",
    "write_text",
]


class NonFinite(Exception):  # noqa: N818 - its name says it
    """Too many steps in a row had no finite gradient."""


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


def shard_tensors(model: SoftpickLlamaForCausalLM, size: int, folder: Path) -> SoftpickLlamaForCausalLM:
    """The same model, with heads and matrices shared among ``size`` ranks (tensor parallelism of transformers).

    transformers shards a model when it loads it, so this one goes through ``folder``, which is removed again.

    Args:
        model: whole, the same on every rank.
        size: number of ranks, all of the process group.
        folder: does not exist yet; seen by every rank.

    Raises:
        ImportError: this transformers cannot shard the parameters that a head has for itself.
    """
    try:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.tensor_parallel import LocalParamsParallel  # noqa: F401
    except ImportError:
        raise ImportError("tensor parallelism needs transformers 5.23 or newer") from None
    first = torch.distributed.get_rank() == 0
    if first:
        shutil.rmtree(folder, ignore_errors=True)  # of a crash; nothing but ours has this name
        with quiet_transformers():
            model.save_pretrained(folder)
    torch.distributed.barrier()
    with quiet_transformers():
        sharded = type(model).from_pretrained(folder, distributed_config=DistributedConfig(tp_size=size))
    torch.distributed.barrier()
    if first:
        shutil.rmtree(folder)
    return sharded


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


class _Watch(TrainerCallback):
    """Reports progress, stops on request, and marks checkpoints that were written to the end."""

    def __init__(
        self, stop: StopRequest | None, progress: ProgressBar | None, guard: Guard | None, seconds: float, run: str
    ) -> None:
        self.stop, self.progress, self.guard, self.run = stop, progress, guard, run
        self.before, self.start = seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        logged = state.global_step % args.logging_steps == 0 and state.global_step < state.max_steps
        if self.stop is not None and logged and _on_any_rank(self.stop.requested, args.device):
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
        if self.progress is not None and logs is not None and "loss" in logs:  # not for evaluations
            self.progress.update(state.global_step, logs["loss"], _speed_note(logs))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        skipped = 0 if self.guard is None else self.guard.skipped
        folder = Path(args.output_dir)
        with writing(folder):
            marker = {"seconds": self.seconds, "skipped_steps": skipped, "run": self.run}
            checkpoints.publish(folder, state.global_step, marker)
            if args.save_total_limit:
                checkpoints.rotate(folder, args.save_total_limit)


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    """A signal reaches ranks at different steps, or one of them only; all have to stop at the same."""
    if not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags)


def _speed_note(logs: dict[str, float]) -> str:
    parts = []
    if "grad_norm_max" in logs:
        parts.append(f"gradient norm up to {logs['grad_norm_max']:.3g}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.1%}")
    if "peak_memory_gib" in logs:
        parts.append(f"{logs['peak_memory_gib']:.1f} GiB")
    if logs.get("skipped_steps"):
        parts.append(f"{logs['skipped_steps']:.0f} steps skipped")
    return ", ".join(parts)


_PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by the name of the GPU (vendor's data sheets)."""


class Speed:
    """Tokens a second over all ranks, MFU and peak memory since the last log line.

    Floating-point operations a token are ``6 N + 12 layers width T`` (``N``: parameters without the input embedding), the
    convention of PaLM and torchtitan, which counts attention as if it were not causal. MFU needs a GPU of known peak.
    """

    def __init__(self, model: PreTrainedModel, sequence_length: int, tokens_per_step: int, ranks: int = 1) -> None:
        config = model.config
        matrices = parameter_count(model) - model.get_input_embeddings().weight.numel()
        self.flops = 6 * matrices + 12 * config.num_hidden_layers * config.hidden_size * sequence_length
        self.tokens, self.ranks = tokens_per_step, ranks
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.peak = next((peak for key, peak in _PEAK.items() if key in name), None)
        self.start, self.steps, self.pause = time.perf_counter(), 0, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training."""
        start = time.perf_counter()
        yield
        self.pause += time.perf_counter() - start

    def read(self, step: int) -> dict[str, float]:
        """The figures since the last call. The first call gives nothing: its time includes the compilation."""
        now = time.perf_counter()
        seconds, steps = now - self.start - self.pause, step - self.steps
        first = self.steps == 0
        self.start, self.steps, self.pause = now, step, 0.0
        if first or steps <= 0 or seconds <= 0:
            return {}
        speed = steps * self.tokens / seconds
        found = {"tokens_per_second": round(speed, 1)}
        if self.peak is not None:
            found["mfu"] = round(speed * self.flops / (self.peak * self.ranks), 4)
        if torch.cuda.is_available():
            found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return found


class Guard:
    """Skips steps without a finite gradient, counts them, and ends training after too many in a row."""

    def __init__(self, limit: int) -> None:
        self.limit, self.skipped, self.row, self.largest = limit, 0, 0, 0.0

    def suspects(self, model: torch.nn.Module) -> list[str]:
        """Some parameters without a finite gradient, if this step may be the last; before clipping, which spreads a NaN."""
        if self.row + 1 < self.limit:
            return []
        named = model.named_parameters()
        return [n for n, p in named if p.grad is not None and not bool(p.grad.isfinite().all())][:5]

    def check(self, norm: Any, suspects: list[str], model: torch.nn.Module, state: TrainerState) -> None:
        """Drop a step's gradients if their norm, which is the same on all ranks, is not finite.

        Raises:
            NonFinite: too many times in a row.
        """
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(value):
            self.row, self.largest = 0, max(self.largest, value)
            return
        self.skipped += 1
        self.row += 1
        for p in model.parameters():
            p.grad = None  # an optimizer leaves alone what has no gradient
        if self.row >= self.limit:
            raise NonFinite(
                f"{self.row} steps in a row had no finite gradient, up to step {state.global_step + 1}; the "
                f"last loss logged was {_last_loss(state)}; not finite in the last step: "
                f"{', '.join(suspects) or 'the norm alone'}. A smaller learning_rate or a longer warm-up may help"
            )

    def read(self) -> dict[str, float]:
        """The largest gradient norm (before clipping) since the last call, and the steps skipped so far."""
        found = {"grad_norm_max": self.largest, "skipped_steps": float(self.skipped)}
        self.largest = 0.0
        return found


def _last_loss(state: TrainerState) -> str:
    return next((f"{entry['loss']:.4g}" for entry in reversed(state.log_history) if "loss" in entry), "none yet")


class _Trainer(Trainer):
    """The Trainer, whose log lines also have what :class:`Speed` and :class:`Guard` say."""

    speed: Speed | None = None
    guard: Guard | None = None
    groups: Callable[[torch.nn.Module], list[dict[str, Any]]] | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.groups is not None and self.optimizer is None:
            made, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer: Any = made(self.groups(self.model if model is None else model), **options)
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            extra = {} if self.speed is None else self.speed.read(self.state.global_step)
            logs |= extra | ({} if self.guard is None else self.guard.read())
        super().log(logs, *args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:  # not accelerate's: with tensor parallelism the Trainer has its own
        suspects = [] if self.guard is None else self.guard.suspects(self.model)
        norm = super()._clip_grad_norm(model)
        if self.guard is not None:
            self.guard.check(norm, suspects, self.model, self.state)
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.speed.paused() if self.speed is not None else nullcontext():
            return super().evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing after the last step: from a checkpoint of that step the Trainer would go one step beyond it."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any = None) -> str:
        """Checkpoints are written aside, and there the Trainer finds none to remove; :class:`_Watch` publishes them."""
        return str(Path(self.args.output_dir) / checkpoints.WRITING)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.speed.paused() if self.speed is not None else nullcontext(), writing(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # each rank writes the state of its random numbers

    # Of a model that ranks share. With tensor parallelism the Trainer would save the optimizer's state of rank 0 for all,
    # and load whole weights into shards; with FSDP it would gather and write the weights a second time, for itself. Here
    # states are gathered once and dealt out again, and what lies in a checkpoint does not depend on the ranks.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is None and not isinstance(self.model, PreTrainedModel) and is_sharded(self.model):
            state_dict = whole_state(self.model)  # save_pretrained gathers by itself
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            return super()._save_optimizer_and_scheduler(output_dir)
        states = distributed_state.get_optimizer_state_dict(self.model, _bare(self.optimizer), options=_GATHER)
        if self.args.should_save:
            torch.save(states, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_sharded(self.model):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights: dict[str, Any] = {}
        if self.args.process_index == 0:
            weights |= safetensors.torch.load_file(os.path.join(resume_from_checkpoint, "model.safetensors"))
        distributed_state.set_model_state_dict(self.model, weights, options=_DEAL)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            return super()._load_optimizer_and_scheduler(checkpoint)
        states: dict[str, Any] = {}
        path = os.path.join(checkpoint, "optimizer.pt")
        if not os.path.exists(path):  # on every rank: one that fails alone leaves the others waiting
            raise FileNotFoundError(
                f"{path}: expected the optimizer's state; an older softpick wrote this checkpoint, start anew"
            )
        if self.args.process_index == 0:
            states |= torch.load(path, weights_only=True)
        distributed_state.set_optimizer_state_dict(self.model, _bare(self.optimizer), states, options=_DEAL)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True))


_GATHER = distributed_state.StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0
_DEAL = distributed_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


@dataclass
class Outcome:
    """What training gave: the loss on the evaluation data, the seconds over all its sessions, the curves."""

    validation_loss: float
    seconds: float
    curves: dict[str, list[float]] = field(default_factory=dict)


def train(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    train_data: torch.utils.data.Dataset[Any],
    validation_data: torch.utils.data.Dataset[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    evaluation_data: torch.utils.data.Dataset[Any] | None = None,
    stop: StopRequest | None = None,
    progress: ProgressBar | None = None,
    collator: Callable[[list[Any]], dict[str, Any]] = collate,
    callbacks: Sequence[TrainerCallback] = (),
    speed: Speed | None = None,
    guard: Guard | None = None,
    export: Path | None = None,
    groups: Callable[[torch.nn.Module], list[dict[str, Any]]] | None = None,
    run: str = "",
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Train, from the last complete checkpoint in ``arguments.output_dir`` if there is one; then evaluate.

    Args:
        model: with its initial weights; trained in place.
        arguments: from :func:`training_arguments`. In ``output_dir`` nothing is removed but checkpoints that training wrote.
        train_data: rows of token ids.
        validation_data: for the final loss.
        tokenizer: saved with every checkpoint.
        evaluation_data: for the evaluations during training; by default ``validation_data``.
        stop: asked after every logged step; listens to SIGINT and SIGTERM while training.
        progress: updated at every logged step.
        collator: items of the data into a batch.
        callbacks: more of them.
        speed: measures, for the log lines.
        guard: of steps without a finite gradient.
        export: folder for the trained weights, gathered from all ranks.
        groups: makes the optimizer's parameter groups of the model; by default the Trainer's own, with and without decay.
        run: what identifies the run; checkpoints of another one are not resumed from.
        say: called with a sentence about each checkpoint that cannot be resumed from; by default a warning.

    Raises:
        OutputError: the disk refuses a checkpoint or the weights; the run can be continued.
        Interrupted: after the checkpoint that ``stop`` asked for.
        NonFinite: from ``guard``.
    """
    folder, first = Path(arguments.output_dir), arguments.process_index == 0
    checkpoint = checkpoints.choose(folder, run, (say or warnings.warn) if first else lambda _: None)
    if first:
        checkpoints.clear(folder)
    seconds = 0.0
    if checkpoint is not None:
        complete = read_json(checkpoint / checkpoints.MARKER)
        seconds = float(complete["seconds"])
        if guard is not None:
            guard.skipped = complete.get("skipped_steps", 0)
    watch = _Watch(stop, progress, guard, seconds, run)
    with quiet_transformers():
        strategy = arguments.save_strategy
        if is_sharded(model):  # by tensor parallelism; the Trainer refuses what _Trainer has for it
            arguments.save_strategy = SaveStrategy.NO
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=train_data,
            eval_dataset=evaluation_data if evaluation_data is not None else validation_data,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=[watch, *callbacks],
        )
        arguments.save_strategy = strategy
        if arguments.bf16 and trainer.is_fsdp_enabled:
            # accelerate's policy would sum gradients over ranks in bf16, and round the loss to it. No output_dtype: the loss
            # is in fp32 already, and layers would cast to fp32 what the next one casts back
            trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        trainer.remove_callback(PrinterCallback)
        trainer.speed, trainer.guard, trainer.groups = speed, guard, groups
        with stop.on_signals() if stop is not None else nullcontext():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = watch.seconds
        history = list(trainer.state.log_history)
        if trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}")
        for callback in (watch, *callbacks):
            trainer.remove_callback(callback)
        loss = trainer.evaluate(validation_data)["eval_loss"]
        if export is not None:
            with writing(export):
                trainer.save_model(str(export))
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
