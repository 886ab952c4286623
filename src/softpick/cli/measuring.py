"""Commands that measure models which exist: analyze, evaluate, quantize."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Option

from softpick.analysis.settings import AuditSettings
from softpick.cli.console import ConsoleReporter, going_on, make_console, print_report
from softpick.cli.options import OUTPUT, require, with_settings
from softpick.evaluation.settings import EvaluateSettings
from softpick.quantization.methods import METHODS
from softpick.quantization.settings import QuantizeSettings

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["analyze", "evaluate", "quantize"]


def _either(names: Sequence[str]) -> str:
    """A choice of names in words, joined by "or"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@with_settings(AuditSettings)
def analyze(
    given: dict[str, Any],
    output: str = Option(
        None,
        metavar=OUTPUT,
        help="Folder of report.html and results.json; the same command there continues an interrupted audit.  "
        "[default: softpick-analyze-MODEL]",
    ),
    json: bool = Option(False, "--json", help="Print results.json to standard output, all else to standard error."),
) -> None:
    """Audit the attention of any transformers model (softmax or not): what is wrong with it (sinks, outliers, dead heads),
    what that costs and what to do; and write a report.
    """
    require("transformers", "numpy", extra="analyze")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of transformers' GGUF reader, which its own switch does not reach
    from softpick.analysis import write_report
    from softpick.analysis.audit import audit, forget
    from softpick.analysis.keep_files import keep_file_names, keep_files
    from softpick.analysis.trackers import log_figures
    from softpick.experiment.files import write_json, write_text, writing
    from softpick.experiment.resume import Workspace

    console = make_console(stderr=json)
    kept = keep_file_names(2 if given["against"] else 1) if given["cost"] else []
    names = ("report.html", "results.json", *kept)
    output = output or default_output("softpick-analyze", [given["model"], given["against"]])
    with going_on(console, output), Workspace(output, outputs=names, forget=forget) as work:
        settings = AuditSettings(**given)
        report = audit(settings, reporter=ConsoleReporter(console), state=work.folder)
        log_figures(report, settings.report_to, work.folder, settings.step)
        with writing(work.folder / "report.html"):
            write_report(work.scratch / "report.html", report)
        bare = [{key: value for key, value in run.items() if key != "samples"} for run in report["runs"]]
        write_json(work.scratch / "results.json", report | {"runs": bare})
        lists = keep_files(report["runs"])
        for name, text in lists.items():
            write_text(work.scratch / name, text)
        work.finish(["report.html", "results.json", *lists])
        work.end()
    print_report(report, output, console, sorted(lists))
    if json:
        print((work.folder / "results.json").read_text(encoding="utf-8"), end="")
    if report["failed"]:
        for sentence in report["failed"]:
            console.print(f"failed: {sentence}", markup=False)
        raise SystemExit(3)


def default_output(command: str, names: Sequence[str | None]) -> str:
    """A folder for each model, from the last two parts of its name."""
    parts = ["-".join(re.split(r"[/\\]", name)[-2:]) for name in names if name]
    return "-".join([command, *(re.sub(r"[^\w.+-]+", "-", part).strip("-.") for part in parts)])


@with_settings(EvaluateSettings)
def evaluate(
    given: dict[str, Any],
    output: str = Option("softpick-evaluate", metavar=OUTPUT, help="Folder of results.json and the plots."),
) -> None:
    """Score language models on the paper's five tasks (lm-evaluation-harness), passkey retrieval and perplexity by position,
    side by side. Running the same command again continues an interrupted evaluation.
    """
    needed = ("lm_eval", "datasets") if given["tasks"] else ()
    require("transformers", "accelerate", "tokenizers", "numpy", "matplotlib", *needed, extra="evaluate")
    _offline_unless_asked(given)
    from softpick.evaluation.evaluate import evaluate as run
    from softpick.evaluation.evaluate import forget
    from softpick.evaluation.plots import write_plots
    from softpick.experiment.files import write_json, writing
    from softpick.experiment.resume import Workspace

    console = make_console()
    names = ("results.json", "passkey.png", "heads.png", "perplexity.png")
    with going_on(console, output), Workspace(output, outputs=names, forget=forget) as work:
        report = run(EvaluateSettings(**given), reporter=ConsoleReporter(console), state=work.folder)
        with writing(work.folder):
            plots = [path.name for path in write_plots(work.scratch, report)]
        write_json(work.scratch / "results.json", report)
        work.finish([*plots, "results.json"])
        work.end()
    _print_evaluation(report, [work.folder / name for name in ("results.json", *plots)], console)


@with_settings(QuantizeSettings, words={"quantizers": _either([method.title for method in METHODS.values()])})
def quantize(
    given: dict[str, Any],
    output: str = Option(
        "softpick-quantize", metavar=OUTPUT, help="Folder of results.json, table.md, plots and the quantizers' logs."
    ),
) -> None:
    """Quantize language models (weights by {quantizers}; activations and the key-value cache simulated), check
    that the weights changed, and evaluate them before and after, side by side. Running the same command again continues an
    interrupted run.
    """
    needed = ("lm_eval", "datasets") if given["tasks"] else ()
    require("transformers", "accelerate", "tokenizers", "numpy", "matplotlib", *needed, extra="quantize")
    _offline_unless_asked(given)
    from softpick.experiment.files import write_json, write_text, writing
    from softpick.experiment.resume import Workspace
    from softpick.quantization.plots import write_plots
    from softpick.quantization.quantize import forget, markdown
    from softpick.quantization.quantize import quantize as run

    console = make_console(wide=True)
    names = ("results.json", "table.md", "weights.png", "activations.png")
    with going_on(console, output), Workspace(output, outputs=names, forget=forget) as work:
        report = run(QuantizeSettings(**given), work.folder, reporter=ConsoleReporter(console))
        with writing(work.folder):
            plots = [path.name for path in write_plots(work.scratch, report)]
        write_text(work.scratch / "table.md", markdown(report))
        write_json(work.scratch / "results.json", report)
        work.finish(["table.md", *plots, "results.json"])
        work.end()
    _print_quantization(report, [work.folder / name for name in ("results.json", "table.md", *plots)], console)


def _offline_unless_asked(given: dict[str, Any]) -> None:
    models = (given["model"], *given["against"])
    if all(Path(name).exists() for name in models) and (given["data_dir"] or not given["tasks"]):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing that was asked for is there
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


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
