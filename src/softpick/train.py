"""``softpick train``: pretraining from a recipe, on one core or several GPUs, that can be killed and continued.

A run lives in one folder::

    config.json             the recipe and a hash of the data; another run does not enter this folder
    tokenizer/
    train.tokens, validation.tokens
    checkpoints/            of the Trainer, the last two
    metrics.jsonl           every log line, evaluation and probe
    model/                  the trained model: a transformers checkpoint with its tokenizer and a model card
    results.json

The same command again continues it. The Trainer trains; this module decides what it is given.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softpick.environment import chosen_device, command_line, hardware, missing_device, versions
from softpick.failures import DamagedFileError, parse_json, read_json
from softpick.loading import load_tokenizer
from softpick.normalizers import get_normalizer
from softpick.progress import Reporter, Silent
from softpick.settings import check_memory
from softpick.training.data import (
    DataError,
    SequenceDataset,
    fingerprint,
    get_corpus,
    split_documents,
    train_tokenizer,
)
from softpick.training.recipes import Recipe, RecipeError
from softpick.training.tokens import StreamedSequences, TokenFile, collator, hub_documents, write_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softpick.training.engine import StopRequest

__all__ = ["train"]

_FORMAT = "softpick train 1"
_TOKENIZER_CHARACTERS = 20_000_000  # of text that a tokenizer is trained on


@dataclass(frozen=True)
class _Data:
    train: torch.utils.data.Dataset[Tensor]
    validation: TokenFile | SequenceDataset
    tokenizer: PreTrainedTokenizerBase
    description: str
    key: str


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str = "auto",
    tensorboard: bool = False,
    trust_remote_code: bool = False,
    command: str = "",
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Train a recipe, or continue the run of it that is in ``output``.

    Args:
        recipe: what to train.
        output: folder of the run.
        device: ``cpu``, ``cuda``, ``mps``, or ``auto``: ``cuda`` where torch finds such a GPU, else ``cpu``.
        tensorboard: also write TensorBoard events (needs tensorboard).
        trust_remote_code: Python code that comes with the recipe's tokenizer may run.
        command: as typed, for the model card.
        reporter: told what happens; under torchrun only rank 0's is.
        stop: asked during training whether to stop at a checkpoint.

    Returns:
        What ``results.json`` holds: recipe, loss, figures, curves, versions.

    Raises:
        RecipeError: the recipe does not fit the folder or the machine.
        softpick.training.data.DataError: the data cannot be used.
        softpick.training.engine.Interrupted: after ``stop`` was requested and the checkpoint written.
        softpick.training.engine.NonFinite: too many steps in a row without a finite gradient.
    """
    from softpick.training import engine

    recipe.check()
    output = Path(output)
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = _device(recipe, device, ranks)
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RecipeError("tensorboard: is not installed: pip install tensorboard")
    if rank or reporter is None:
        reporter = Silent()
    arguments = _arguments(recipe, output, device, ranks)
    if recipe.tensor_parallel > 1 and arguments.distributed_state.distributed_type == "MULTI_CPU":
        raise RecipeError("tensor_parallel: accelerate has it for GPUs only, not for ranks of the CPU")
    with arguments.main_process_first(local=False, desc="data"):
        _enter(output, recipe)
        data = _prepare(recipe, output, reporter if rank == 0 else Silent(), trust_remote_code)
        if rank == 0:
            _remember(output, recipe, data)
    if (output / "results.json").exists():
        reporter.say(f"{output}: already trained")
        return read_json(output / "results.json")

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
        model = engine.shard_tensors(model, recipe.tensor_parallel, output / ".initial.tmp")
    if recipe.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # inside of compiled layers inductor fuses as well, and Liger's kernels made it a quarter slower (docs/results.md)
        inside = not recipe.compile
        # by hand: the Trainer's option knows no softpick_llama, and says nothing
        apply_liger_kernel_to_llama(model=model, rope=inside, rms_norm=inside, swiglu=inside)
    if recipe.compile:
        for layer in model.model.layers:  # one graph for all of them, so this compiles in seconds
            layer.compile()
    speed = engine.Speed(model, recipe.sequence_length, recipe.batch_size * recipe.sequence_length, ranks)
    log = _Metrics(output / "metrics.jsonl", rank == 0, output / "tensorboard" if tensorboard else None)
    callbacks = [_log_callback(log, recipe.parallel)]
    if recipe.probe_every:
        batch = torch.stack([data.validation[i] for i in range(min(recipe.probe_sequences, len(data.validation)))])
        callbacks.append(_probe_callback(recipe, batch, log, speed))
    temporary = output / ".model.tmp"
    if temporary.exists() and rank == 0:
        shutil.rmtree(temporary)  # of a crash while writing; nothing but ours has this name
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
            export=temporary,
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
    if rank == 0:
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle with paths of this machine
        (temporary / "README.md").write_text(_card(result), encoding="utf-8")
        if (output / "model").exists():
            shutil.rmtree(output / "model")  # the same, of a run that was killed before the next line but one
        os.replace(temporary, output / "model")
        engine.write_json(output / "results.json", result)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return result


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


def _enter(output: Path, recipe: Recipe) -> None:
    """Make sure that the folder is new, or holds a run of this recipe."""
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output: {output} is a file; choose another --output")
    if not output.exists() or not any(output.iterdir()):
        output.mkdir(parents=True, exist_ok=True)
        return
    config = _read_config(output)
    if config is None:
        if {p.name for p in output.iterdir()} <= _BEGUN:
            return  # killed before it had its data
        raise RecipeError(f"output: {output} is not empty and holds no run of softpick train; choose another --output")
    now, then = recipe.to_json(), config["recipe"]
    differences = [f"{key}: {then.get(key)!r} there, {now[key]!r} now" for key in now if now[key] != then.get(key)]
    if differences:
        raise RecipeError(
            f"output: {output} holds a run of another recipe ({'; '.join(differences)}); choose another --output"
        )


_BEGUN = {
    "tokenizer",
    ".tokenizer.tmp",
    "train.tokens",
    ".train.tokens.tmp",
    "validation.tokens",
    ".validation.tokens.tmp",
    ".config.json.tmp",
}


def _read_config(output: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and config.get("format") == _FORMAT else None


def _remember(output: Path, recipe: Recipe, data: _Data) -> None:
    from softpick.training.engine import write_json

    config = _read_config(output)
    if config is None:
        write_json(output / "config.json", {"format": _FORMAT, "recipe": recipe.to_json(), "data": data.key})
    elif config["data"] != data.key:
        raise RecipeError(f"output: the data changed since the run in {output} was started; choose another --output")


def _prepare(recipe: Recipe, output: Path, reporter: Reporter, trust_remote_code: bool) -> _Data:
    if (recipe.data or "").startswith("hub:"):
        return _stream(recipe, output, reporter, trust_remote_code)
    files = {name: output / f"{name}.tokens" for name in ("train", "validation")}
    if (output / "tokenizer").exists() and all(path.exists() for path in files.values()):
        tokenizer, description = (
            _tokenizer(recipe, output, lambda: iter(()), trust_remote_code),
            recipe.data or "the built-in corpus",
        )
    else:
        corpus = get_corpus(recipe.data, recipe.text_field)
        description = corpus.description
        reporter.say(f"data: {description}")
        train_texts, held_texts, _ = split_documents(corpus.documents)
        tokenizer = _tokenizer(recipe, output, lambda: iter(train_texts), trust_remote_code)
        for name, texts in (("train", train_texts), ("validation", held_texts)):
            write_tokens(files[name], tokenizer, texts, reporter, f"tokenising the {name} data", len(texts))
    shape = recipe.sequence_length, len(tokenizer), tokenizer.bos_token_id
    training = TokenFile(files["train"], *shape)
    held = TokenFile(files["validation"], *shape, at_most=recipe.validation_sequences)
    reporter.say(f"      {len(training.tokens):,} tokens, {len(held)} sequences of {recipe.sequence_length} held out")
    if len(training) < recipe.batch_size:
        raise RecipeError(
            f"batch_size: the data has {len(training)} sequences, fewer than a batch of {recipe.batch_size}"
        )
    return _Data(training, held, tokenizer, description, training.fingerprint() + held.fingerprint())


def _stream(recipe: Recipe, output: Path, reporter: Reporter, trust_remote_code: bool) -> _Data:
    name = (recipe.data or "").removeprefix("hub:")
    documents = hub_documents(name, recipe.data_config, recipe.text_field)
    tokenizer = _tokenizer(recipe, output, documents, trust_remote_code)
    description = f"the Hugging Face data set {name}" + (f" ({recipe.data_config})" if recipe.data_config else "")
    reporter.say(f"data: {description}, streamed")
    held = recipe.validation_sequences
    beginning = list(StreamedSequences(documents, tokenizer, recipe.sequence_length, at_most=held + 1))
    if len(beginning) <= held:
        raise DataError(
            f"data: expected more than validation_sequences = {held} sequences of {recipe.sequence_length} tokens in "
            f"{recipe.data}, got {len(beginning)}"
        )
    rows = torch.stack(beginning[:held])
    training = StreamedSequences(documents, tokenizer, recipe.sequence_length, skip=held)
    return _Data(training, SequenceDataset(rows), tokenizer, description, fingerprint(rows))


def _tokenizer(
    recipe: Recipe, output: Path, documents: Callable[[], Iterator[str]], trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The run's tokenizer, the recipe's, or one trained on the beginning of the documents."""
    from transformers import PreTrainedTokenizerFast

    saved = output / "tokenizer"
    if saved.exists():
        return PreTrainedTokenizerFast.from_pretrained(saved)
    if recipe.tokenizer is not None:
        tokenizer = load_tokenizer(
            recipe.tokenizer,
            recipe.tokenizer,
            trust_remote_code=trust_remote_code,
            error_class=RecipeError,
            message="tokenizer: cannot load {name!r}",
        )
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise RecipeError(f"tokenizer: {recipe.tokenizer!r} has no BOS or no EOS; sequences start with BOS")
    else:
        tokenizer = train_tokenizer(_beginning(documents()), recipe.vocab_size)
    temporary = output / ".tokenizer.tmp"
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, saved)
    return tokenizer


def _beginning(documents: Iterator[str]) -> Iterator[str]:
    total = 0
    for text in documents:
        yield text
        total += len(text)
        if total > _TOKENIZER_CHARACTERS:
            return


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
            kept = [line for line, entry in zip(self._lines(), self._entries(), strict=True) if entry["step"] <= step]
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(temporary, self.path)
        if self.events is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.events), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(f"{kind}/{key}", value, step)
            self.board.flush()

    def entries(self, kind: str) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [entry for entry in self._entries() if entry["kind"] == kind]

    def _entries(self) -> list[dict[str, Any]]:
        found = [parse_json(line, self.path, number) for number, line in enumerate(self._lines(), 1)]
        for number, entry in enumerate(found, 1):
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int) or "kind" not in entry:
                raise DamagedFileError(f"{self.path}, line {number}: is damaged: expected an object with step and kind")
        return found

    def _lines(self) -> list[str]:
        text = self.path.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1].splitlines()  # a line that a kill cut short is none


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
    """Where accelerate cannot shard it falls back to DistributedDataParallel, and says nothing."""
    from torch.distributed.tensor import DTensor

    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
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
        f"| data | {result['data']} |",
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
        f"| command | `{result['command']}` |",
        "",
        "Recipe:",
        "",
        "```json",
        json.dumps(recipe, indent=1),
        "```",
    ]
    return "\n".join(lines) + "\n"
