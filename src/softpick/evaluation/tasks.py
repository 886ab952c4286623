"""The paper's five tasks by lm-evaluation-harness, from the hub or from local files, scored by the harness itself.

A task's definition is the harness's own YAML file, included by one that is written at run time and says only where the
data are. How text becomes tokens is ours, in two places where the harness would treat a model that starts with BOS
wrongly (:func:`starts_with_bos`): BOS stands in front once, also where a context is cut because it is too long, and it
is never scored.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

from softpick.evaluation.benchmarks import HEADLINES, RECORDS, TASKS, EvaluationError, Task
from softpick.experiment.corpus import token_ids
from softpick.experiment.failures import first_line
from softpick.experiment.positions import positions
from softpick.experiment.progress import Reporter, Silent
from softpick.experiment.reading import check_text, json_lines
from softpick.integrations.patches import replaced

__all__ = [
    "HEADLINES",
    "TASKS",
    "EvaluationError",
    "check_hub",
    "check_tasks",
    "expected_files",
    "run_tasks",
    "starts_with_bos",
]


_INSTALL = "pip install 'softpick[evaluate]'"
_BOOTSTRAP = 1000  # resamples for the standard error of lambada's perplexity; the harness's 100,000 take minutes
_PROBE_SECONDS = 10.0  # until the hub counts as not reachable


def starts_with_bos(model: Any, tokenizer: Any) -> int | None:
    """The token to put in front of every text, or None.

    A model of softpick was trained with BOS in front of every sequence, whatever its tokenizer does. Any other model gets
    it if its tokenizer puts it in front by itself, which is what the harness does too.

    Args:
        model: of transformers.
        tokenizer: its own.

    Returns:
        An id, or None.
    """
    bos = tokenizer.bos_token_id
    if getattr(model.config, "model_type", None) == "softpick_llama":
        return model.config.bos_token_id if bos is None else bos
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bos if bos is not None and ids and ids[0] == bos else None


def expected_files(tasks: Sequence[str], data_dir: str | Path, num_fewshot: int | None = None) -> dict[Path, str]:
    """Which local files the tasks need, and the fields of a line of each.

    Args:
        tasks: of :data:`TASKS`.
        data_dir: where they are looked for.
        num_fewshot: with examples, multiple-choice tasks take them from a second file, ``TASK.train.jsonl``.
    """
    folder = Path(data_dir)
    files = {folder / f"{name}.jsonl": RECORDS[name].fields for name in tasks}
    if num_fewshot:
        files |= {folder / f"{name}.train.jsonl": RECORDS[name].fields for name in tasks if RECORDS[name].shots}
    return files


def check_tasks(tasks: Sequence[str], data_dir: str | Path | None = None, num_fewshot: int | None = None) -> None:
    """Raise what :func:`run_tasks` would raise before it computes anything; the hub is not asked.

    Raises:
        EvaluationError: an unknown task, a task named twice, files that are missing, or a line without the fields.
        ImportError: lm-eval is not installed.
    """
    unknown = [name for name in tasks if name not in RECORDS]
    if unknown:
        raise EvaluationError(f"tasks: expected some of {', '.join(TASKS)}; got {', '.join(map(repr, unknown))}")
    if len(set(tasks)) < len(tasks):
        raise EvaluationError(f"tasks: expected each task once, got {', '.join(tasks)}")
    if num_fewshot is not None and num_fewshot < 0:
        raise EvaluationError(f"num_fewshot: expected 0 or more, got {num_fewshot}")
    if not tasks:
        return
    _harness()
    if data_dir is None:
        return
    if not Path(data_dir).is_dir():
        raise EvaluationError(f"data_dir: {data_dir} is not a directory; expected one with {_list(tasks, num_fewshot)}")
    files = expected_files(tasks, data_dir, num_fewshot)
    missing = [f"{file.name} ({fields})" for file, fields in files.items() if not file.is_file()]
    if missing:
        raise EvaluationError(f"data_dir: {data_dir} lacks {'; '.join(missing)}; one JSON object a line")
    for file in files:
        _check_file(file, RECORDS[file.name.split(".")[0]], file.name.split(".")[0])


def check_hub(tasks: Sequence[str], num_fewshot: int | None = None) -> None:
    """Raise what :func:`run_tasks` would raise without ``data_dir`` where neither the hub nor its cache has the data.

    Args:
        tasks: of :data:`TASKS`, at least one.
        num_fewshot: changes which files the message names.

    Raises:
        EvaluationError: the hub does not answer, and the data of a task were not downloaded before.
        ImportError: lm-eval or datasets is not installed.
    """
    _harness()
    with _quiet(), _reachable_or_cached(tasks, num_fewshot):
        pass


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, dict[str, float]]:
    """Score a model on tasks of lm-evaluation-harness.

    Args:
        model: a causal language model of transformers, where it should run; its mode is evaluation afterwards.
        tokenizer: its own. It is copied, and not changed.
        tasks: of :data:`TASKS`.
        data_dir: local files instead of the hub (:func:`expected_files`).
        limit: only so many of the first examples of each task.
        batch_size: sequences a forward pass.
        num_fewshot: examples in front of each question; None is the task's own number, 0 for these five.
        seed: of the choice of examples and of the resampling for standard errors.
        reporter: gets progress and messages.

    Returns:
        For each task the harness's numbers by plain names: ``acc`` and ``acc_norm`` (fractions), ``perplexity``,
        ``word_perplexity``, ``byte_perplexity``, ``bits_per_byte``, each with ``..._stderr`` where the harness has one;
        ``samples``, how many examples were scored; and ``contexts_cut`` where there are any, the share of the contexts that
        were longer than the model has positions and lost their beginnings.

    Raises:
        EvaluationError: as :func:`check_tasks`; a hub that cannot be reached; a continuation that is longer than the
            model has positions.
        ImportError: lm-eval is not installed; the message names the extra.
    """
    check_tasks(tasks, data_dir, num_fewshot)
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name}: expected at least 1, got {value}")
    if not tasks:
        return {}
    reporter = reporter if reporter is not None else Silent()
    lm_eval = _harness()
    results: dict[str, dict[str, float]] = {}
    with (
        _quiet(),
        tempfile.TemporaryDirectory(prefix="softpick-tasks-") as folder,
        _reachable_or_cached(tasks, num_fewshot) if data_dir is None else contextlib.nullcontext() as why,
    ):
        lm = _language_model()(model, tokenizer, batch_size)
        for name in tasks:
            lm.begin(name, reporter)
            manager = lm_eval.tasks.TaskManager(
                include_path=str(_write_task(Path(folder) / name, name, data_dir, num_fewshot)), include_defaults=False
            )
            try:
                found = lm_eval.simple_evaluate(
                    model=lm,
                    tasks=[name],
                    task_manager=manager,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    batch_size=batch_size,
                    bootstrap_iters=_BOOTSTRAP,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
            except OSError as error:  # what the hub's libraries raise
                if data_dir is not None:
                    raise
                raise _no_data(name, why or error, [name], num_fewshot) from error
            counted = found["n-samples"][name]["effective"]
            results[name] = _plain(found["results"][name]) | {"samples": float(counted)} | lm.end()
    return results


# ---------------------------------------------------------------------------------------------------------------------


def _harness() -> Any:
    try:
        import datasets  # noqa: F401
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(f"the tasks need lm-eval and datasets ({error}): {_INSTALL}") from error
    return lm_eval


def _list(tasks: Sequence[str], num_fewshot: int | None) -> str:
    return "; ".join(f"{file.name} ({fields})" for file, fields in expected_files(tasks, "", num_fewshot).items())


def _no_data(task: str, why: Any, tasks: Sequence[str], num_fewshot: int | None) -> EvaluationError:
    return EvaluationError(
        f"tasks: the data of {task} ({RECORDS[task].hub}) are not on this machine, and the hub did not give them "
        f"({first_line(why)}). "
        f"Without a network give a folder (data_dir, --data-dir) with {_list(tasks, num_fewshot)}; one JSON object a line"
    )


def _check_file(file: Path, task: Task, name: str) -> None:
    """Every line is an object with the task's fields."""
    lines = 0
    wanted = f"expected an object with {task.fields}"
    for line, entry in json_lines(file, wanted, EvaluationError, "data_dir"):
        lines += 1
        absent = [field for field in task.needs if not isinstance(entry, dict) or field not in entry]
        if absent:
            raise EvaluationError(f"data_dir: {file}, {line} lacks {', '.join(absent)}; {wanted}")
        for field in task.needs:
            if field not in ("choices", "label"):
                check_text(entry[field], f"data_dir: {file}, {line}: {field}", EvaluationError)
        if name == "arc_easy":
            choices = entry["choices"]
            if not isinstance(choices, dict) or not all(isinstance(choices.get(x), list) for x in ("text", "label")):
                raise EvaluationError(f"data_dir: {file}, {line}: choices has no text and label; {wanted}")
            for text in choices["text"]:
                check_text(text, f"data_dir: {file}, {line}: a text of choices", EvaluationError)
            if entry["answerKey"] not in choices["label"] or len(choices["text"]) != len(choices["label"]):
                raise EvaluationError(
                    f"data_dir: {file}, {line}: expected an answerKey among the labels, one a text; "
                    f"got {entry['answerKey']!r} of {choices['label']}"
                )
        if name == "piqa" and entry["label"] not in (0, 1):
            raise EvaluationError(f"data_dir: {file}, {line}: label: expected 0 or 1, got {entry['label']!r}")
    if lines == 0:
        raise EvaluationError(f"data_dir: {file} has no lines; expected objects with {task.fields}")


def _write_task(folder: Path, name: str, data_dir: str | Path | None, num_fewshot: int | None) -> Path:
    """A folder with one YAML file (JSON is YAML): the harness's own task, and where its data are."""
    import lm_eval.tasks

    task = RECORDS[name]
    stock = Path(lm_eval.tasks.__file__).parent / task.stock
    if not stock.is_file():
        raise EvaluationError(f"tasks: this lm-eval has no {task.stock}; expected version 0.4.13: {_INSTALL}")
    config: dict[str, Any] = {"include": str(stock), "task": name, "tag": None}
    if data_dir is not None:
        file = Path(data_dir).resolve() / f"{name}.jsonl"
        splits = {task.split: str(file)}
        training = None
        if num_fewshot and task.shots:
            training = "train"
            splits[training] = str(file.with_suffix(".train.jsonl"))
        config |= {
            "dataset_path": "json",
            "dataset_name": None,
            # the tables that are made of the files go with this folder
            "dataset_kwargs": {"data_files": splits, "cache_dir": str(folder / "tables")},
            "training_split": training,
            "validation_split": task.split if task.split == "validation" else None,
            "test_split": task.split if task.split == "test" else None,
        }
    folder.mkdir(parents=True)
    (folder / f"{name}.yaml").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def _plain(numbers: dict[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": ...}`` as ``{"acc": 0.5}``."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in numbers.items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _language_model() -> Any:
    """The harness's adapter of transformers models with what :class:`_WithBos` adds. A class, made at run time."""
    from lm_eval.models.huggingface import HFLM

    return type("LanguageModel", (_WithBos, HFLM), {})


_ANY: Any = object  # HFLM stands behind it, at run time


class _WithBos(_ANY):
    """What goes in front of the harness's ``HFLM``: a model that is loaded, our BOS, and our progress bar."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self._opening = starts_with_bos(model, tokenizer)
        prefix = self._opening if self._opening is not None else tokenizer.bos_token_id
        prefix = tokenizer.eos_token_id if prefix is None else prefix
        if prefix is None:
            raise EvaluationError("tokenizer: expected a BOS or EOS token (what an empty context is), got neither")
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it gets a padding token
            backend="causal",
            batch_size=batch_size,
            prefix_token_id=prefix,
            max_length=positions(model),
            softmax_dtype="float32",  # also of logits in half precision
            trust_remote_code=False,
        )
        self._bar: Any = None
        self._done = self._total = 0
        self._reporter: Reporter = Silent()
        self._task = ""

    def begin(self, task: str, reporter: Reporter) -> None:
        self._task, self._reporter, self._cut, self._pairs = task, reporter, 0, 0

    def end(self) -> dict[str, float]:
        if not self._cut:
            return {}
        self._reporter.say(
            f"{self._task}: {self._cut} of {self._pairs} contexts are longer than the model's {self.max_length} "
            "positions; their beginnings were cut off"
        )
        return {"contexts_cut": self._cut / self._pairs}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        ids = token_ids(self.tokenizer, [string])[0]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if len(after) > self.max_length:
            raise EvaluationError(
                f"tasks: {self._task} has a continuation of {len(after)} tokens; expected at most {self.max_length}, "
                "the positions of the model"
            )
        # of context and continuation, the model is given all but the last token
        room = self.max_length + 1 - len(after) - (self._opening is not None)
        self._pairs += 1
        self._cut += len(before) > room
        before = before[max(0, len(before) - room) :]
        if self._opening is not None:
            before = [self._opening, *before]
        return before or [self.prefix_token_id], after

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._progress(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows = (math.ceil(len(self.tok_encode(r.args[0])) / self.max_length) for r in requests)
        with self._progress(sum(windows)):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    @contextlib.contextmanager
    def _progress(self, total: int) -> Iterator[None]:
        self._done, self._total = 0, total
        with self._reporter.progress(self._task, total) as self._bar:
            yield
            if self._done < total:  # requests that shared a forward pass
                self._bar.update(total, None)
        self._bar = None

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self._done = min(self._done + len(inps), self._total)
        if self._bar is not None:
            self._bar.update(self._done, None)
        return logits


@contextlib.contextmanager
def _reachable_or_cached(tasks: Sequence[str], num_fewshot: int | None) -> Iterator[Exception | None]:
    """Ask the hub once. Where it does not answer, the libraries are set offline, and take what was downloaded before.

    Without this they would try again and again, for half a minute a task.
    """
    import huggingface_hub

    failure: Exception | None = None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        failure = ConnectionError("HF_HUB_OFFLINE is set")
    else:
        try:
            huggingface_hub.HfApi().dataset_info(RECORDS[tasks[0]].hub, timeout=_PROBE_SECONDS)
        except Exception as error:  # no name server, no route, a proxy's refusal: whatever it is, nothing will come
            failure = error
    if failure is None:
        yield None
        return
    with replaced({"huggingface_hub.constants:HF_HUB_OFFLINE": True, "datasets.config:HF_HUB_OFFLINE": True}):
        for name in tasks:
            _cached(name, failure, tasks, num_fewshot)
        yield failure


def _cached(name: str, failure: Exception, tasks: Sequence[str], num_fewshot: int | None) -> None:
    import datasets
    import yaml
    from lm_eval import tasks as stock

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    text = (Path(stock.__file__).parent / RECORDS[name].stock).read_text(encoding="utf-8")
    config = yaml.load(text, Loader)
    try:
        datasets.load_dataset(path=config["dataset_path"], name=config.get("dataset_name"))
    except Exception as error:
        raise _no_data(name, failure, tasks, num_fewshot) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log, no bars, no words and no processes of the harness: it starts one a CPU to resample a few numbers.

    And not its list of what is installed, which takes longer than a small task and is thrown away, nor its question to git.
    """
    import datasets
    import tqdm

    log = logging.getLogger("lm_eval")
    level, bars = log.level, datasets.is_progress_bar_enabled()
    nothing = lambda *args, **kwargs: None  # noqa: E731
    with contextlib.ExitStack() as stack:
        stack.callback(log.setLevel, level)
        log.setLevel(logging.ERROR)
        if bars:
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        stack.enter_context(_environment("DISABLE_MULTIPROC", "1"))
        stack.enter_context(
            replaced(
                {
                    "tqdm:tqdm.__init__": partialmethod(tqdm.tqdm.__init__, disable=True),
                    "lm_eval.api.metrics:print": nothing,
                    "lm_eval.evaluator:add_env_info": nothing,
                    "lm_eval.evaluator:get_git_commit_hash": nothing,
                }
            )
        )
        yield


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
