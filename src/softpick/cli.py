"""The command line: one function for each command of ``softpick --help``.

Whatever is heavy or belongs to an extra is imported inside the functions, so that ``--help`` is quick and a missing
extra gives one sentence.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from softpick.experiment.failures import fail as _fail
from softpick.experiment.failures import process, told

if TYPE_CHECKING:
    import typer
    from rich.console import Console

__all__ = ["build_app", "main"]

_INSTALL = "pip install 'softpick[compare]'"
_DEVICES = "cpu, cuda, mps, or auto: cuda where there is such a GPU, else cpu."
_FILES = "Text, JSONL, JSON, CSV, TSV or parquet file, also compressed, or a directory of them."
_OWN_TEXT = "[default: sources of the Python standard library]"
_TRUST = "Run Python code that comes with a model or a tokenizer; never asked for, never run otherwise."


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``softpick``."""
    with process():
        _main(sys.argv[1:] if argv is None else list(argv))


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:  # also where nothing but torch is installed
        from softpick import __version__

        print(f"softpick {__version__}")
        return
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"softpick: the command line needs {' and '.join(missing)}: {_INSTALL}")
    build_app()(args=arguments, prog_name="softpick")


def _require(*names: str, extra: str = "compare") -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        _fail(f"this command needs {', '.join(missing)}: pip install 'softpick[{extra}]'")


def build_app() -> typer.Typer:
    """The typer application."""
    import typer

    from softpick.experiment.settings import TASKS

    app = typer.Typer(
        name="softpick",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    option = typer.Option

    def of_task(name: str, text: str = "") -> Any:
        """An option whose default depends on the task, and whose help says so."""
        values = {task: defaults[name] for task, defaults in TASKS.items()}
        alike = len(set(values.values())) == 1
        default = str(values["text"]) if alike else ", ".join(f"{task} {value}" for task, value in values.items())
        return option(None, help=f"{text}  [default: {default}]".strip())

    def version(wanted: bool) -> None:
        if wanted:
            from softpick import __version__

            typer.echo(f"softpick {__version__}")
            raise typer.Exit

    @app.callback(help="Attention without softmax: compare normalizers; train, analyze, evaluate and quantize models.")
    def root(
        version: bool = option(False, "--version", callback=version, is_eager=True, help="Print the version and exit."),
    ) -> None:
        # torchao, which transformers imports where it is installed, warns of itself
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)

    @app.command(help="List the normalizers.")
    def normalizers() -> None:
        _print_normalizers()

    @app.command(
        help="Train small Llama-style models that differ only in the normalizer, measure them, write a report. Running the "
        "same command again continues an interrupted run."
    )
    def compare(
        normalizers: str = option("softmax,softpick", help="Comma-separated names; `softpick normalizers` lists them."),
        task: str = option("text", help="text: language modelling; backcopy: Bigram-Backcopy (Guo et al. 2024)."),
        data: str = option(
            None,
            metavar="PATH",
            help=f"{_FILES}  {_OWN_TEXT}",
        ),
        text_field: str = option("text", help="Field or column with the text; a text file has none."),
        seed: int = option(None, help="Seed of initial weights and data order.  [default: 0]"),
        seeds: str = option(None, metavar="0,1,2", help="Several seeds instead of one."),
        steps: int = of_task("steps", "Training steps."),
        layers: int = of_task("layers"),
        heads: int = of_task("heads", "Attention heads a layer."),
        width: int = of_task("width", "Of the residual stream."),
        sequence_length: int = of_task("sequence_length", "Tokens a sequence, BOS included."),
        batch_size: int = of_task("batch_size", "Sequences a step."),
        learning_rate: float = of_task("learning_rate"),
        warmup_steps: int = of_task("warmup_steps", "Steps of linear warm-up."),
        weight_decay: float = of_task("weight_decay"),
        vocab_size: int = of_task("vocab_size", "Of the byte-level BPE."),
        output: str = option(None, metavar="DIR", help="Folder of the run.  [default: softpick-compare-TASK]"),
        device: str = option("cpu", help=_DEVICES),
        resume: bool = option(
            True, "--resume/--fresh", help="Continue the run in the folder, or rename it and start anew."
        ),
    ) -> None:
        _require("transformers", "accelerate", "tokenizers", "numpy")
        if seed is not None and seeds is not None:
            _fail("seeds: give --seed or --seeds, not both")
        _run_compare(
            {
                "task": task,
                "normalizers": tuple(_split(normalizers)),
                "seeds": _integers(seeds) if seeds is not None else None if seed is None else (seed,),
                "data": data,
                "text_field": text_field,
                "steps": steps,
                "layers": layers,
                "heads": heads,
                "width": width,
                "sequence_length": sequence_length,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "warmup_steps": warmup_steps,
                "weight_decay": weight_decay,
                "vocab_size": vocab_size,
                "device": device,
            },
            output or f"softpick-compare-{task}",
            fresh=not resume,
        )

    @app.command(
        help="Measure attention sinks, outliers, sparsity and dead heads of any transformers model (softmax or not) and "
        "write a report."
    )
    def analyze(
        model: str = typer.Argument(..., help="Hub name, directory, or GGUF file."),
        against: str = option(None, metavar="MODEL", help="A second model, put beside it."),
        data: str = option(
            None,
            metavar="PATH",
            help=f"{_FILES}  {_OWN_TEXT}",
        ),
        text_field: str = option("text", help="Field or column with the text; a text file has none."),
        text: list[str] | None = option(  # noqa: B008
            None, help="Text of an attention map; may be given again.  [default: three samples]"
        ),
        samples: int = option(64, help="Sequences that are measured."),
        sequence_length: int = option(256, help="Tokens a sequence, special tokens included."),
        batch_size: int = option(8, help="Sequences a forward pass."),
        knockout: str = option(
            "first",
            metavar="KEYS",
            help="Comma-separated: first, strongest, or a position from 0. Also the perplexity without that token's key "
            "(decoders); none leaves it out.",
        ),
        attn_implementation: str = option(
            None, metavar="NAME", help="eager, sdpa or a normalizer.  [default: the model's own]"
        ),
        device: str = option("cpu", help=_DEVICES),
        dtype: str = option("auto", help="auto (as saved), float32, bfloat16 or float16."),
        trust_remote_code: bool = option(False, "--trust-remote-code", help=_TRUST),
        output: str = option(
            "softpick-analyze",
            metavar="DIR",
            help="Folder of report.html and results.json; the same command there continues an interrupted audit.",
        ),
    ) -> None:
        _require("transformers", "accelerate", "tokenizers", "numpy")
        given = {
            "model": model,
            "against": against,
            "data": data,
            "text_field": text_field,
            "samples": samples,
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "knockout": _knockouts(knockout),
            "attn_implementation": attn_implementation,
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
        }
        _run_audit(given | ({"texts": tuple(text)} if text else {}), output)

    @app.command(
        help="Score language models on the paper's five tasks (lm-evaluation-harness), passkey retrieval and perplexity by "
        "position, side by side. Running the same command again continues an interrupted evaluation."
    )
    def evaluate(
        model: str = typer.Argument(..., help="Hub name, directory, or GGUF file."),
        against: list[str] | None = option(  # noqa: B008
            None, metavar="MODEL", help="A further model, put beside it; may be given again."
        ),
        tasks: str = option(
            "arc_easy,lambada_openai,piqa,sciq,wikitext", metavar="NAMES", help="Comma-separated; none leaves them out."
        ),
        data_dir: str = option(
            None, metavar="DIR", help="TASK.jsonl for each task (docs/evaluation.md).  [default: the hub]"
        ),
        limit: int = option(None, help="Examples of each task.  [default: all]"),
        num_fewshot: int = option(None, help="Examples in front of each question.  [default: 0]"),
        passkey: str = option(
            "paper",
            metavar="LENGTHS",
            help="Comma-separated tokens of the prompts; paper: 890,1983,3075,4167,4986; or none.",
        ),
        passkey_prompts: int = option(50, help="Prompts of each length."),
        perplexity: bool = option(True, "--perplexity/--no-perplexity", help="Perplexity by position."),
        data: str = option(
            None,
            metavar="PATH",
            help=f"Its text. {_FILES}  {_OWN_TEXT}",
        ),
        text_field: str = option("text", help="Field or column with the text; a text file has none."),
        samples: int = option(32, help="Its sequences."),
        sequence_length: int = option(
            None,
            help="Tokens of one, BOS included.  [default: twice the first model's positions, at most 8192; no more than it "
            "has where their embeddings are learned]",
        ),
        bins: int = option(16, help="Ranges of positions."),
        batch_size: int = option(8, help="Sequences a forward pass."),
        seed: int = option(0, help="Of passkeys, few-shot examples and standard errors."),
        attn_implementation: str = option(
            None, metavar="NAME", help="eager, sdpa or a normalizer.  [default: the model's own]"
        ),
        device: str = option("cpu", help=_DEVICES),
        dtype: str = option("auto", help="auto (as saved), float32, bfloat16 or float16."),
        trust_remote_code: bool = option(False, "--trust-remote-code", help=_TRUST),
        output: str = option("softpick-evaluate", metavar="DIR", help="Folder of results.json and the plots."),
    ) -> None:
        chosen = _names(tasks)
        needed = ("lm_eval", "datasets") if chosen else ()
        _require("transformers", "accelerate", "tokenizers", "numpy", "matplotlib", *needed, extra="evaluate")
        lengths = (
            None if passkey.strip() == "paper" else () if passkey.strip() == "none" else _numbers("passkey", passkey)
        )
        _run_evaluate(
            {
                "model": model,
                "against": tuple(against or ()),
                "tasks": chosen,
                "data_dir": data_dir,
                "limit": limit,
                "num_fewshot": num_fewshot,
                "passkey": lengths,
                "passkey_prompts": passkey_prompts,
                "perplexity": perplexity,
                "data": data,
                "text_field": text_field,
                "samples": samples,
                "sequence_length": sequence_length,
                "bins": bins,
                "batch_size": batch_size,
                "seed": seed,
                "device": device,
                "dtype": dtype,
                "trust_remote_code": trust_remote_code,
                "attn_implementation": attn_implementation,
            },
            output,
        )

    @app.command(
        help="Quantize language models (weights by HQQ, bitsandbytes or GPTQ; activations and the key-value cache simulated), "
        "check that it happened, and evaluate them before and after, side by side. Running the same command again continues "
        "an interrupted run."
    )
    def quantize(
        model: str = typer.Argument(..., help="Hub name or directory."),
        against: list[str] | None = option(  # noqa: B008
            None, metavar="MODEL", help="A further model, put beside it; may be given again."
        ),
        method: str = option(
            "hqq", metavar="NAMES", help="Comma-separated: hqq, bnb, gptq; none leaves weights alone."
        ),
        bits: str = option(
            None,
            help="Of a weight, comma-separated; hqq has 1,2,3,4,8; bnb 4,8; gptq 2,3,4,8.  [default: those of 2,3,4,8]",
        ),
        activations: str = option(
            "int8-tensor,int8-token,fp8-tensor,fp8-token",
            metavar="NAMES",
            help="Simulated weights and activations, comma-separated: int8, int6, int4 or fp8, and -tensor (a scale an "
            "activation, from calibration) or -token; none leaves them out.",
        ),
        kv_cache: str = option("8,4", metavar="BITS", help="Simulated keys and values, comma-separated; or none."),
        group_size: int = option(None, help="Weights that share a scale (hqq, gptq).  [default: 64]"),
        tasks: str = option("none", metavar="NAMES", help="Comma-separated, as for `softpick evaluate`."),
        data_dir: str = option(
            None, metavar="DIR", help="TASK.jsonl for each task (docs/evaluation.md).  [default: the hub]"
        ),
        limit: int = option(None, help="Examples of each task.  [default: all]"),
        data: str = option(
            None,
            metavar="PATH",
            help=f"For perplexity and calibration. {_FILES}  {_OWN_TEXT}",
        ),
        text_field: str = option("text", help="Field or column with the text; a text file has none."),
        samples: int = option(64, help="Sequences for the perplexity."),
        calibration_samples: int = option(64, help="Sequences that gptq and the scales of -tensor look at."),
        sequence_length: int = option(
            None, help="Tokens of one, BOS included.  [default: the fewest positions of a model, at most 2048]"
        ),
        batch_size: int = option(8, help="Sequences a forward pass."),
        seed: int = option(0, help="Of few-shot examples and standard errors."),
        attn_implementation: str = option(
            None, metavar="NAME", help="eager, sdpa or a normalizer.  [default: the model's own]"
        ),
        device: str = option("cpu", help=_DEVICES),
        dtype: str = option("auto", help="auto (as saved), float32, bfloat16 or float16."),
        trust_remote_code: bool = option(False, "--trust-remote-code", help=_TRUST),
        keep: bool = option(False, "--keep", help="Leave the quantized models in the folder."),
        output: str = option(
            "softpick-quantize", metavar="DIR", help="Folder of results.json, table.md, plots and the quantizers' logs."
        ),
    ) -> None:
        chosen = _names(tasks)
        needed = ("lm_eval", "datasets") if chosen else ()
        _require("transformers", "accelerate", "tokenizers", "numpy", "matplotlib", *needed, extra="quantize")
        _run_quantize(
            {
                "model": model,
                "against": tuple(against or ()),
                "methods": _names(method),
                "bits": None if bits is None else _numbers("bits", bits),
                "activations": _names(activations),
                "kv_cache": _numbers("kv-cache", kv_cache) if _names(kv_cache) else (),
                "group_size": group_size,
                "tasks": chosen,
                "data_dir": data_dir,
                "limit": limit,
                "data": data,
                "text_field": text_field,
                "samples": samples,
                "calibration_samples": calibration_samples,
                "sequence_length": sequence_length,
                "batch_size": batch_size,
                "seed": seed,
                "device": device,
                "dtype": dtype,
                "trust_remote_code": trust_remote_code,
                "attn_implementation": attn_implementation,
                "keep": keep,
            },
            output,
        )

    @app.command(
        help="Pretrain a model from a recipe. Running the same command again continues an interrupted run. Several GPUs: "
        "torchrun -m softpick train ..."
    )
    def train(
        recipe: str = typer.Argument(..., help="A name; `softpick recipes` lists them."),
        overrides: list[str] | None = typer.Argument(  # noqa: B008
            None, metavar="[FIELD=VALUE]...", help="Fields of the recipe, for example normalizer=softmax steps=500."
        ),
        output: str = option(None, metavar="DIR", help="Folder of the run.  [default: softpick-RECIPE-NORMALIZER]"),
        device: str = option("auto", help=_DEVICES),
        trust_remote_code: bool = option(False, "--trust-remote-code", help=_TRUST),
        tensorboard: bool = option(False, "--tensorboard", help="Also write TensorBoard events."),
    ) -> None:
        _require("transformers", "accelerate", "tokenizers", "numpy")
        _run_train(recipe, overrides or [], output, device, tensorboard, trust_remote_code)

    @app.command(
        help="Train many runs of a recipe, for variants of its attention and several seeds, and put them side by side. "
        "Running the same command again continues; a finished run is never repeated."
    )
    def grid(
        recipe: str = typer.Argument(..., help="A name; `softpick recipes` lists them."),
        overrides: list[str] | None = typer.Argument(  # noqa: B008
            None, metavar="[FIELD=VALUE]...", help="Fields of the recipe, for all runs."
        ),
        normalizers: str = option(
            "softmax,softpick",
            help="Comma-separated: a normalizer, followed by any of +gate, +scale and +FIELD=VALUE, for example "
            "softpick+scale+gate or softmax+learning_rate=1e-3.",
        ),
        seeds: str = option("0", metavar="0,1,2", help="Each variant is trained with each of them."),
        share: str = option("1/1", metavar="I/N", help="Train every Nth run from the Ith on: a process for each GPU."),
        minutes: float = option(None, help="After them the run in progress stops at a checkpoint."),
        output: str = option(None, metavar="DIR", help="Folder of the grid.  [default: softpick-grid-RECIPE]"),
        device: str = option("auto", help="auto, cpu, cuda or mps."),
    ) -> None:
        _require("transformers", "accelerate", "tokenizers", "numpy")
        part, _, parts = share.partition("/")
        if not (part.isdecimal() and parts.isdecimal()):
            _fail(f"share: expected I/N, got {share!r}")
        given = {"share": (int(part), int(parts)), "minutes": minutes, "device": device}
        _run_grid(recipe, overrides or [], _split(normalizers), _integers(seeds), output, given)

    @app.command(help="List the recipes, or print one.")
    def recipes(name: str = typer.Argument(None, help="Print all its fields.")) -> None:
        _print_recipes(name)

    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = told(_with_paths(command.callback))
    return app


def _with_paths(command: Any) -> Any:
    """The same command, which refuses an empty path: it would mean the current folder, or nothing."""

    @functools.wraps(command)
    def wrapper(*args: Any, **given: Any) -> Any:
        for name in ("data", "data_dir", "output"):
            if given.get(name) == "":
                _fail(f"{name}: expected a path, got ''")
        return command(*args, **given)

    return wrapper


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(text: str) -> tuple[int, ...]:
    return _numbers("seeds", text)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split(text))
    except ValueError:
        _fail(f"{name}: expected integers separated by commas, got {text!r}")


def _knockouts(text: str) -> tuple[str | int, ...]:
    keys = [] if text.strip() == "none" else _split(text)
    return tuple(int(key) if key.isdecimal() else key for key in keys)


def _names(text: str) -> tuple[str, ...]:
    """Comma-separated names, or none of them."""
    return () if text.strip() == "none" else tuple(_split(text))


def _print_normalizers() -> None:
    from rich.table import Table

    from softpick.normalizers import NORMALIZERS

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("weight of key i", overflow="fold")
    table.add_column("note", overflow="fold")
    for norm in NORMALIZERS.values():
        table.add_row(norm.name, norm.formula, f"{norm.note} {norm.citation}", end_section=True)
    _console(wide=True).print(table, markup=False)


def _run_compare(given: dict[str, Any], output: str, fresh: bool) -> None:
    # nothing here needs the network; this also keeps the libraries below from looking
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from softpick.training.compare import Settings
    from softpick.training.compare import compare as run
    from softpick.training.engine import StopRequest

    console = _console()
    with _going_on(console, output):
        report = run(Settings.for_task(**given), output, fresh=fresh, reporter=_Reporter(console), stop=StopRequest())
    _print_report(report, output, console)
    failed = [run["title"] for run in report["runs"] if not math.isfinite(run["validation_loss"])]
    if failed:
        _fail(f"{', '.join(failed)}: the validation loss is not finite: training failed there", 1)


def _run_audit(given: dict[str, Any], output: str) -> None:
    from softpick.analysis import write_report
    from softpick.analysis.audit import AuditSettings, audit, forget
    from softpick.experiment.files import write_json, writing
    from softpick.experiment.resume import Workspace

    console = _console()
    names = ("report.html", "results.json")
    with _going_on(console, output), Workspace(output, outputs=names, forget=forget) as work:
        report = audit(AuditSettings(**given), reporter=_Reporter(console), state=work.folder)
        with writing(work.folder / "report.html"):
            write_report(work.scratch / "report.html", report)
        bare = [{key: value for key, value in run.items() if key != "samples"} for run in report["runs"]]
        write_json(work.scratch / "results.json", report | {"runs": bare})
        work.finish(names)
        work.end()
    _print_report(report, output, console)


def _run_evaluate(given: dict[str, Any], output: str) -> None:
    _offline_unless_asked(given)
    from softpick.evaluation.evaluate import EvaluateSettings, evaluate, forget
    from softpick.evaluation.plots import write_plots
    from softpick.experiment.files import write_json, writing
    from softpick.experiment.resume import Workspace

    console = _console()
    names = ("results.json", "passkey.png", "heads.png", "perplexity.png")
    with _going_on(console, output), Workspace(output, outputs=names, forget=forget) as work:
        report = evaluate(EvaluateSettings(**given), reporter=_Reporter(console), state=work.folder)
        with writing(work.folder):
            plots = [path.name for path in write_plots(work.scratch, report)]
        write_json(work.scratch / "results.json", report)
        work.finish([*plots, "results.json"])
        work.end()
    _print_evaluation(report, [work.folder / name for name in ("results.json", *plots)], console)


def _offline_unless_asked(given: dict[str, Any]) -> None:
    import os
    from pathlib import Path

    models = (given["model"], *given["against"])
    if all(Path(name).exists() for name in models) and (given["data_dir"] or not given["tasks"]):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing that was asked for is there
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@contextmanager
def _going_on(console: Console, output: str) -> Iterator[None]:
    """After Ctrl-C, how to go on. And nothing of transformers' log but errors."""
    from softpick.experiment.quiet import quiet_transformers
    from softpick.training.engine import Interrupted

    try:
        with quiet_transformers():
            yield
    except (Interrupted, KeyboardInterrupt) as reason:
        what = str(reason) or "interrupted"
        console.print(f"{what}; run the same command again to continue in {output}", markup=False, highlight=False)
        raise SystemExit(130) from None


def _print_evaluation(report: dict[str, Any], files: Sequence[Any], console: Console) -> None:
    from rich.table import Table

    from softpick.evaluation.evaluate import summary_rows

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for run in report["runs"]:
        table.add_column(run["title"], justify="right", overflow="fold")
    for label, values in summary_rows(report):
        table.add_row(label, *values)
    console.print()
    console.print(table, markup=False)
    console.print()
    for note in report["notes"]:
        console.print(f"- {note}", markup=False, highlight=False)
    console.print("\n" + "\n".join(map(str, files)), markup=False, highlight=False, soft_wrap=True)


def _run_quantize(given: dict[str, Any], output: str) -> None:
    _offline_unless_asked(given)
    from softpick.experiment.files import write_json, write_text, writing
    from softpick.experiment.resume import Workspace
    from softpick.quantization.plots import write_plots
    from softpick.quantization.quantize import QuantizeSettings, forget, markdown, quantize

    console = _console(wide=True)
    names = ("results.json", "table.md", "weights.png", "activations.png")
    with _going_on(console, output), Workspace(output, outputs=names, forget=forget) as work:
        report = quantize(QuantizeSettings(**given), work.folder, reporter=_Reporter(console))
        with writing(work.folder):
            plots = [path.name for path in write_plots(work.scratch, report)]
        write_text(work.scratch / "table.md", markdown(report))
        write_json(work.scratch / "results.json", report)
        work.finish(["table.md", *plots, "results.json"])
        work.end()
    _print_quantization(report, [work.folder / name for name in ("results.json", "table.md", *plots)], console)


def _print_quantization(report: dict[str, Any], files: Sequence[Any], console: Console) -> None:
    from rich.table import Table

    from softpick.quantization.quantize import columns, summary_rows, weight_rows

    titles = columns(report)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("")
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    said = ""
    for metric, how, values in summary_rows(report):
        table.add_row(metric if metric != said else "", how, *values)
        said = metric
    console.print()
    console.print(table, markup=False)
    console.print()
    for how, texts in weight_rows(report):
        for title, text in zip(titles, texts, strict=False):
            console.print(f"- {title}, {how}: {text}", markup=False, highlight=False)
    for note in report["notes"]:
        console.print(f"- {note}", markup=False, highlight=False)
    console.print()
    for file in files:
        console.print(str(file), markup=False, highlight=False, soft_wrap=True)


def _run_train(
    name: str, overrides: list[str], output: str | None, device: str, tensorboard: bool, trust_remote_code: bool
) -> None:
    import os

    from softpick.training.recipes import get_recipe

    recipe = get_recipe(name).override(overrides)
    if recipe.tokenizer is None and not (recipe.data or "").startswith("hub:"):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from softpick.training.engine import StopRequest
    from softpick.training.pretrain import train as run

    console = _console()
    folder = output or f"softpick-{recipe.name}-{recipe.normalizer}"
    with _going_on(console, folder):
        result = run(
            recipe,
            folder,
            device=device,
            tensorboard=tensorboard,
            trust_remote_code=trust_remote_code,
            reporter=_Reporter(console),
            stop=StopRequest(),
        )
    if os.environ.get("RANK", "0") == "0":
        _print_training(result, folder, console)
    if not math.isfinite(result["validation_loss"]):
        _fail(f"the validation loss is {result['validation_loss']}: training failed", 1)


def _run_grid(
    name: str,
    overrides: list[str],
    variants: list[str],
    seeds: tuple[int, ...],
    output: str | None,
    given: dict[str, Any],
) -> None:
    import os

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from softpick.experiment.reading import DataError
    from softpick.training.engine import Interrupted, StopRequest
    from softpick.training.grid import grid
    from softpick.training.recipes import RecipeError, get_recipe

    console = _console()
    folder = output or f"softpick-grid-{name}"
    try:
        recipe = get_recipe(name).override(overrides)
        grid(recipe, variants, seeds, folder, reporter=_Reporter(console), stop=StopRequest(), **given)
    except (RecipeError, DataError) as error:
        _fail(str(error))
    except (Interrupted, KeyboardInterrupt) as reason:
        text = f"{reason or 'interrupted'}; run the same command again to continue in {folder}"
        console.print(text, markup=False, highlight=False)
        raise SystemExit(130) from None
    console.print(f"{folder}/report.md", markup=False, highlight=False)


def _print_training(result: dict[str, Any], folder: str, console: Console) -> None:
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"\nvalidation loss {result['validation_loss']:.4f} after {result['seconds']:.0f} s of training")
    if result["speed"]:
        say(", ".join(f"{key.replace('_', ' ')} {value:,.4g}" for key, value in result["speed"].items()) + " (medians)")
    if result["probes"]:
        last = result["probes"][-1]
        figures = ", ".join(f"{key} {last[key]:.4g}" for key in last if key not in ("kind", "step"))
        say(f"probe at step {last['step']}: {figures}")
    say(f"model: {folder}/model\nmetrics: {folder}/metrics.jsonl")


def _print_recipes(name: str | None) -> None:
    from rich.table import Table

    from softpick.training.recipes import RECIPES, get_recipe

    console = _console(wide=True)
    if name is not None:
        for key, value in get_recipe(name).to_json().items():
            console.print(f"{key}={value}", markup=False, highlight=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("recipe", "parameters", "tokens", "data", ""):
        table.add_column(column)
    for make in RECIPES.values():
        recipe = make()
        table.add_row(
            recipe.name,
            f"{recipe.parameters / 1e6:,.1f} M",
            f"{recipe.tokens / 1e6:,.1f} M",
            recipe.data or "built-in",
            (make.__doc__ or "").splitlines()[0],
        )
    console.print(table, markup=False)


def _print_report(report: dict[str, Any], output: str, console: Console) -> None:
    from pathlib import Path

    from rich.table import Table

    from softpick.analysis import summary_rows

    runs = report["runs"]
    titles = list(dict.fromkeys(run["title"] for run in runs))
    seeds = len({run["seed"] for run in runs})
    table = Table(box=None, pad_edge=False, header_style="bold", title_style="bold", title_justify="left")
    table.add_column(f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for label, values in summary_rows(report, by="normalizer"):
        table.add_row(label, *values)
    console.print()
    console.print(table, markup=False)
    console.print()
    for note in report["notes"]:
        console.print(f"- {note}", markup=False, highlight=False)
    folder = Path(output)
    console.print(
        f"\nreport:  {folder / 'report.html'}\nresults: {folder / 'results.json'}", markup=False, soft_wrap=True
    )


def _console(wide: bool = False) -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    # a log file or a pipe has no width of its own: do not fold tables at 80 columns there
    return console if console.is_terminal else Console(highlight=False, width=160 if wide else 120)


class _Reporter:
    """Bars on a terminal, about ten lines a model in a log."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[_Bar | _Lines]:
        if not self.console.is_terminal:
            yield _Lines(self.console, label, total)
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            yield _Bar(progress, progress.add_task(label, total=total, loss=""))


class _Bar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def update(self, step: int, loss: float | None, note: str = "") -> None:
        fields = {} if loss is None else {"loss": f"loss {loss:.3f} {note}".rstrip()}
        self._progress.update(self._task, completed=step, **fields)


class _Lines:
    def __init__(self, console: Console, label: str, total: int) -> None:
        self._console, self._label, self._total = console, label, total
        self._start, self._first, self._said = time.perf_counter(), 0, 0.0
        self._last = self._start

    def update(self, step: int, loss: float | None, note: str = "") -> None:
        now = time.perf_counter()
        if self._first == 0:  # a resumed run begins in the middle: its pace counts from here
            self._start, self._first = now, step
        done = step / self._total
        if done < 1:
            if loss is None and now - self._last < 5:  # short work: its end only
                return
            if done - self._said < 0.1 and (loss is None or now - self._last < 60):  # ten lines, or one a minute
                return
        self._said, self._last = done, now
        pace = (now - self._start) / (step - self._first) if step > self._first else 0.0
        what = f" steps, loss {loss:.3f}" if loss is not None else ""
        extra = f", {note}" if note else ""
        left = f", {pace * (self._total - step):.0f} s left" if pace and step < self._total else ""
        self._console.print(f"{self._label}: {step}/{self._total}{what}{extra}{left}", markup=False)


if __name__ == "__main__":
    main()
