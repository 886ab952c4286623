"""``softpick train``: pretraining from a recipe, on one core or several GPUs, that can be killed and continued.

A run lives in one folder::

    config.json             the recipe, hashes of the data and of what was written; another run does not enter this folder
    tokenizer/
    train.tokens, validation.tokens
    checkpoints/            of the Trainer, the last two
    metrics.jsonl           every log line, evaluation and probe
    model/                  the trained model: a transformers checkpoint with its tokenizer and a model card
    results.json
    .softpick/              while it works: the lock, and what is not finished

The same command again continues it. The Trainer trains; this module decides what it is given.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softpick.experiment.environment import chosen_device, command_line, device_line, hardware, missing_device, versions
from softpick.experiment.figures import as_cell
from softpick.experiment.files import (
    DamagedFileError,
    OutputError,
    digest,
    json_text,
    read_json,
    text_digest,
    write_text,
    writing,
)
from softpick.experiment.progress import Reporter, Silent
from softpick.experiment.resume import Ledger, Workspace, scratch
from softpick.experiment.settings import check_memory
from softpick.normalizers import get_normalizer
from softpick.training import checkpoints
from softpick.training.prepare import FILES, Data, prepare
from softpick.training.recipes import Recipe, RecipeError
from softpick.training.token_files import collator

if TYPE_CHECKING:
    from softpick.experiment.stopping import StopRequest

__all__ = ["train"]

_FORMAT = "softpick train 1"


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str = "auto",
    tensorboard: bool = False,
    trust_remote_code: bool = False,
    tokens: str | Path | None = None,
    command: str = "",
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Train a recipe, or continue the run of it that is in ``output``.

    Args:
        recipe: what to train.
        output: folder of the run.
        device: ``cpu``, ``cuda``, ``mps``, or ``auto``: the first of ``cuda`` and ``mps`` that torch can use, else ``cpu``.
        tensorboard: also write TensorBoard events (needs tensorboard).
        trust_remote_code: Python code that comes with the recipe's tokenizer may run.
        tokens: folder with ``tokenizer/``, ``train.tokens`` and ``validation.tokens`` of the same data, made by another run:
            they are used instead of tokenising the text again.
        command: as typed, for the model card.
        reporter: gets progress and messages; under torchrun only rank 0's is.
        stop: asked during training whether to stop at a checkpoint.

    Returns:
        What ``results.json`` holds: recipe, loss, figures, curves, versions.

    Raises:
        RecipeError: the recipe does not fit the folder or the machine.
        softpick.training.data.DataError: the data cannot be used.
        softpick.experiment.stopping.Interrupted: after ``stop`` was requested and the checkpoint written.
        softpick.training.engine.NonFinite: too many steps in a row without a finite gradient.
        softpick.experiment.files.OutputError: the disk refused, or a file of the run was changed; it names the file.
    """
    recipe.check()
    output = Path(output)
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = _device(recipe, device, ranks)
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RecipeError("tensorboard: is not installed: pip install tensorboard")
    if rank or reporter is None:
        reporter = Silent()
    reporter.say(device_line(device))
    with ExitStack() as stack:
        shared = None if tokens is None else Path(tokens)
        return _train(
            stack, recipe, output, device, tensorboard, command, reporter, stop, ranks, rank, trust_remote_code, shared
        )


def _train(
    stack: ExitStack,
    recipe: Recipe,
    output: Path,
    device: str,
    tensorboard: bool,
    command: str,
    reporter: Reporter,
    stop: StopRequest | None,
    ranks: int,
    rank: int,
    trust_remote_code: bool,
    tokens: Path | None,
) -> dict[str, Any]:
    from softpick.training import engine

    arguments = _arguments(recipe, output, device, ranks)
    if recipe.tensor_parallel > 1 and arguments.distributed_state.distributed_type == "MULTI_CPU":
        raise RecipeError("tensor_parallel: accelerate has it for GPUs only, not for ranks of the CPU")
    work: Workspace | None = None
    with arguments.main_process_first(local=False, desc="data"):
        if rank == 0:  # the owner of the folder for all ranks of the run
            work = stack.enter_context(Workspace(output, error=RecipeError, ledger="config.json"))
            _enter(output, recipe, work)
        about = {"format": _FORMAT, "recipe": recipe.to_json()}
        folder = None if tokens is None else Path(tokens)
        data = prepare(recipe, output, work, _read_config(output), about, reporter, trust_remote_code, folder)
    finished = _finished(output)
    if finished is not None:
        reporter.say(f"{output}: already trained")
        if work is not None:
            checkpoints.remove_all(output / "checkpoints")
        return finished
    if work is not None:
        _check_model(output, recipe, work)

    title, parameters, model = _model(recipe, data, output, reporter)
    speed = engine.Speed(model, recipe.sequence_length, recipe.batch_size * recipe.sequence_length, ranks)
    log = _Metrics(output / "metrics.jsonl", rank == 0, output / "tensorboard" if tensorboard else None)
    callbacks = [_log_callback(log, recipe.parallel), *_probes(recipe, data, log, speed)]
    export = scratch(output) / "model"
    with reporter.progress(f"{recipe.name}, {title}", recipe.steps) as progress:
        outcome = engine.train(
            model,
            arguments,
            data.train,
            data.validation,
            tokenizer=data.tokenizer,
            stop=stop,
            progress=progress if rank == 0 else None,
            collator=collator(recipe.document_mask, data.tokenizer.eos_token_id),
            callbacks=callbacks,
            speed=speed,
            guard=engine.Guard(recipe.max_skipped),
            export=export,
            run=text_digest(json_text([recipe.to_json(), data.key])),
            say=reporter.say,
        )
    result = {
        "recipe": recipe.to_json(),
        "parameters": parameters,
        "data": data.description,
        "validation_loss": outcome.validation_loss,
        "seconds": outcome.seconds,
        "curves": outcome.curves,
        "probes": log.entries("probe"),
        "speed": _speed(log.entries("train")),
        "hardware": hardware(device),
        "ranks": ranks,
        "versions": versions("accelerate"),
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "command": command or command_line(),
    }
    if work is not None:
        _finish(work, result, export, output)
    return result


def _model(recipe: Recipe, data: Data, output: Path, reporter: Reporter) -> tuple[str, int, Any]:
    """Title of the normalizer, number of parameters, and the model: sharded, fused and compiled as the recipe says."""
    from softpick.training import engine

    model = engine.build_model(
        recipe.normalizer,
        vocab_size=len(data.tokenizer),
        layers=recipe.layers,
        heads=recipe.heads,
        width=recipe.width,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        bos=data.tokenizer.bos_token_id,
        eos=data.tokenizer.eos_token_id,
        intermediate_size=recipe.intermediate,
        num_key_value_heads=recipe.kv_heads or recipe.heads,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        output_gate=recipe.output_gate,
        score_scale=recipe.score_scale,
    )
    title = get_normalizer(recipe.normalizer).title
    parameters = engine.parameter_count(model)
    reporter.say(
        f"model: {title}, {parameters / 1e6:.1f} million parameters; {recipe.tokens / 1e6:,.1f} million tokens"
    )
    if recipe.tensor_parallel > 1:
        model = engine.shard_tensors(model, recipe.tensor_parallel, scratch(output) / "initial")
    if recipe.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # inside of compiled layers inductor fuses as well, and Liger's kernels made it a quarter slower (docs/results.md)
        inside = not recipe.compile
        # the Trainer's own option skips softpick_llama without a message
        apply_liger_kernel_to_llama(model=model, rope=inside, rms_norm=inside, swiglu=inside)
    if recipe.compile:
        for layer in model.model.layers:  # one graph for all of them, so this compiles in seconds
            layer.compile()
    return title, parameters, model


def _probes(recipe: Recipe, data: Data, log: _Metrics, speed: Any) -> list[Any]:
    """The callback that measures sinks and outliers during training, if the recipe wants it."""
    if not recipe.probe_every:
        return []
    batch = torch.stack([data.validation[i] for i in range(min(recipe.probe_sequences, len(data.validation)))])
    return [_probe_callback(recipe, batch, log, speed)]


def _finish(work: Workspace, result: dict[str, Any], export: Path, output: Path) -> None:
    """Put the trained model and its results into the output folder, and remove the checkpoints."""
    from softpick.training import engine

    with writing(export):
        (export / "training_args.bin").unlink(missing_ok=True)  # a pickle with paths of this machine
        (export / "README.md").write_text(_card(result), encoding="utf-8")
    work.finish(["model"])
    work.ledger.add({"results.json": text_digest(json_text(result))})
    engine.write_json(output / "results.json", result)
    checkpoints.remove_all(output / "checkpoints")


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def _device(recipe: Recipe, device: str, ranks: int) -> str:
    device = chosen_device(device)
    if device not in ("cpu", "cuda", "mps"):
        raise RecipeError(f"device: expected auto, cpu, cuda or mps; got {device!r}")
    absent = missing_device(device)
    if absent:
        raise RecipeError(f"device: {absent}")
    check_memory(recipe.parameters // recipe.tensor_parallel, device, RecipeError)
    if recipe.tensor_parallel > 1 and ranks != recipe.tensor_parallel:
        raise RecipeError(
            f"tensor_parallel: expected as many ranks, {recipe.tensor_parallel}, got {ranks}: torchrun --nproc-per-node "
            f"{recipe.tensor_parallel} -m softpick"
        )
    if ranks > 1 and recipe.parallel == "none" and recipe.tensor_parallel == 1:
        raise RecipeError(f"parallel: expected ddp or fsdp (or tensor_parallel) for {ranks} ranks, got none")
    if recipe.parallel != "none" and "WORLD_SIZE" not in os.environ:
        raise RecipeError(
            f"parallel: {recipe.parallel} needs torchrun, for example torchrun --nproc-per-node 2 -m softpick"
        )
    shares = ranks // recipe.tensor_parallel
    if recipe.batch_size % (recipe.micro_batch_size * shares):
        raise RecipeError(
            f"batch_size: expected a multiple of micro_batch_size x ranks = {recipe.micro_batch_size} x {shares}, got "
            f"{recipe.batch_size}"
        )
    if recipe.liger and importlib.util.find_spec("liger_kernel") is None:
        raise RecipeError("liger: liger-kernel is not installed: pip install liger-kernel")
    if recipe.liger and device != "cuda":
        raise RecipeError("liger: its kernels need a GPU")
    return device


def _arguments(recipe: Recipe, output: Path, device: str, ranks: int) -> Any:
    from softpick.training import engine

    more: dict[str, Any] = {}
    if ranks > 1 and device == "cpu":
        more["ddp_backend"] = "gloo"
    if recipe.parallel == "fsdp":
        more["fsdp"] = "full_shard auto_wrap"
        more["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "FULL_STATE_DICT",
        }
    if recipe.gradient_checkpointing:
        more["gradient_checkpointing"] = True
    return engine.training_arguments(
        output / "checkpoints",
        steps=recipe.steps,
        batch_size=recipe.micro_batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        device=device,
        warmup_steps=min(recipe.warmup_steps, recipe.steps),
        log_every=recipe.log_every,
        evaluate_every=recipe.evaluate_every or None,
        save_every=recipe.save_every,
        per_device_eval_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // recipe.micro_batch_size // (ranks // recipe.tensor_parallel),
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.dtype == "bfloat16",
        # a batch is not only rows (cu_seq_lens), so no rank deals out parts of one; each reads its own
        accelerator_config={"dispatch_batches": False},
        **more,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The folder and the data


# what version 0.1 left in a folder where it was killed before it had its data
_BEGUN = {*FILES, *(f".{name}.tmp" for name in FILES), ".config.json.tmp"}


# of a field that is younger than the run
_DEFAULTS = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}


def _enter(output: Path, recipe: Recipe, work: Workspace) -> None:
    """Make sure that the folder is new, or holds a run of this recipe."""
    config = _read_config(output)
    if config is None:
        if not work.entries() <= _BEGUN:
            raise RecipeError(
                f"output: {output} is not empty and holds no run of softpick train; choose another --output"
            )
        return
    now, then = recipe.to_json(), _DEFAULTS | config["recipe"]
    differences = [f"{key}: {then.get(key)!r} there, {now[key]!r} now" for key in now if now[key] != then.get(key)]
    if differences:
        raise RecipeError(
            f"output: {output} holds a run of another recipe ({'; '.join(differences)}); choose another --output"
        )


def _read_config(output: Path) -> dict[str, Any] | None:
    path = output / "config.json"
    if not path.exists():
        return None
    config = read_json(path, RecipeError)
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        return None
    if not isinstance(config.get("recipe"), dict) or "data" not in config:
        raise RecipeError(f"output: {path} is not as softpick wrote it; choose another --output")
    return config


def _finished(output: Path) -> dict[str, Any] | None:
    """What ``results.json`` holds, if the run wrote it."""
    path = output / "results.json"
    if not path.exists():
        return None
    result = read_json(path, RecipeError)
    config = _read_config(output) or {}
    if "files" in config and not Ledger(output / "config.json").knows(path.name, path):
        raise RecipeError(
            f"output: {path} was changed, or not written by this run; move it away, or choose another --output"
        )
    return result


def _check_model(output: Path, recipe: Recipe, work: Workspace) -> None:
    """Raise, before any training, where a ``model`` is in the place of the one that will be written."""
    path = output / "model"
    if not path.exists() or work.ledger.knows(path.name, path):
        return
    if "files" not in (_read_config(output) or {}):
        card = path / "README.md"
        if card.is_file() and json.dumps(recipe.to_json(), indent=1) in card.read_text(
            encoding="utf-8", errors="replace"
        ):
            work.ledger.add({path.name: digest(path)})  # version 0.1, killed before its last file: it is written again
            return
    raise RecipeError(
        f"output: {path} is there, and this run did not write it; move it away, or choose another --output"
    )


# ---------------------------------------------------------------------------------------------------------------------
# While it trains


class _Metrics:
    """``metrics.jsonl``, a line for each event, and TensorBoard's events. What a resumed run repeats replaces what was."""

    def __init__(self, path: Path, writes: bool, events: Path | None) -> None:
        self.path, self.writes, self.events = path, writes, events
        self.board: Any = None

    def resume(self, step: int) -> None:
        """Forget what came after a step."""
        if not self.writes:
            return
        if self.path.exists():
            # the summary of the last step is written again when the run ends
            kept = [line for line, entry in self._lines() if entry["step"] <= step and entry["kind"] != "summary"]
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        if self.events is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.events), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if not self.writes:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(f"{kind}/{key}", value, step)
            self.board.flush()

    def entries(self, kind: str) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [entry for _, entry in self._lines() if entry["kind"] == kind]

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        """Each line and what it says."""
        try:
            text = self.path.read_text(encoding="utf-8")
            lines = text[: text.rfind("\n") + 1].splitlines()  # a line that a kill cut short is none
        except (OSError, ValueError) as error:
            raise OutputError(f"output: {self.path} cannot be read ({error}); put it back, or remove it") from error
        found = []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry["step"], int) or not isinstance(entry["kind"], str):
                    raise ValueError("expected a step and a kind")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DamagedFileError(
                    f"output: {self.path}, line {number}: is damaged ({error}); put the file back, or remove it"
                ) from error
            found.append((line, entry))
        return found


def _log_callback(log: _Metrics, parallel: str) -> Any:
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            log.resume(state.global_step)
            if parallel == "fsdp":
                _check_sharded(model)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logs = logs or {}
            kind = "train" if "loss" in logs else "evaluation" if "eval_loss" in logs else "summary"
            log.write(kind, state.global_step, {key: value for key, value in logs.items() if key != "step"})

    return Log()


def _check_sharded(model: torch.nn.Module) -> None:
    """Raise where accelerate fell back to DistributedDataParallel without a message because it could not shard."""
    from softpick.training.sharding import is_sharded

    if not is_sharded(model):
        raise RecipeError("parallel: fsdp was asked for, but accelerate did not shard the model on this device")


def _probe_callback(recipe: Recipe, batch: Tensor, log: _Metrics, speed: Any) -> Any:
    from transformers import TrainerCallback

    from softpick.analysis import measure
    from softpick.analysis.report import METRICS

    class Probe(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step % recipe.probe_every and state.global_step != state.max_steps:
                return
            bare = _whole(model) if recipe.tensor_parallel > 1 else getattr(model, "module", model)
            kind = next(model.parameters()).device.type
            half = torch.autocast(kind, torch.bfloat16) if recipe.dtype == "bfloat16" else nullcontext()
            with speed.paused(), _eager(), half:
                measured = measure(bare, ({"input_ids": row} for row in batch.split(1)), bos_policy="bos")
            run = {"measurements": measured.to_dict()}
            values = {metric.key: metric.value(run) for metric in METRICS}
            log.write("probe", state.global_step, {key: value for key, value in values.items() if value is not None})

    return Probe()


def _whole(model: Any) -> Any:
    """A copy of a model whose heads and matrices are shared among ranks, with all of them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    config = copy.deepcopy(model.config)
    config.distributed_config = None
    device = next(model.parameters()).device
    copied = type(model)(config).to(device)
    copied.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return copied.eval()


@contextmanager
def _eager() -> Iterator[None]:
    """Measuring looks into layers, which compiled ones hide."""
    with torch.compiler.set_stance("force_eager"):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Afterwards


def _speed(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the log lines."""
    found = {}
    for key in ("tokens_per_second", "mfu", "peak_memory_gib"):
        values = sorted(entry[key] for entry in entries if key in entry)
        if values:
            found[key] = values[len(values) // 2]
    return found


def _card(result: dict[str, Any]) -> str:
    recipe = result["recipe"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [softpick, attention]",
        "---",
        f"# {recipe['name']}, {recipe['normalizer']}",
        "",
        f"A Llama of {result['parameters'] / 1e6:.1f} million parameters whose attention is normalized by "
        f"`{recipe['normalizer']}`, trained by [softpick](https://arxiv.org/abs/2504.20966).",
        "",
        "```python",
        "import softpick.integrations.transformers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| data | {as_cell(result['data'])} |",
        f"| tokens | {recipe['steps'] * recipe['batch_size'] * recipe['sequence_length']:,} |",
        f"| validation loss | {result['validation_loss']:.4f} |",
    ]
    if result["probes"]:
        last = result["probes"][-1]
        lines += [f"| {key} | {last[key]:.4g} |" for key in last if key not in ("kind", "step")]
    lines += [
        f"| hardware | {result['hardware']} x {result['ranks']}, {result['seconds']:.0f} s |",
        f"| versions | {result['versions']} |",
        f"| created | {result['created']} |",
        f"| command | `{as_cell(result['command'])}` |",
        "",
        "Recipe:",
        "",
        "```json",
        json.dumps(recipe, indent=1),
        "```",
    ]
    return "\n".join(lines) + "\n"
