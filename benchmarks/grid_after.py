"""The trained models of a grid, measured: perplexity by position, passkeys, knockout, and what quantization costs.

    softpick grid sinks_h200 data=sinks_text ... --output grid
    python benchmarks/grid_after.py grid [--only softmax-s0,softpick-s0] [--device cuda]
    python benchmarks/grid_after.py grid --table
    python benchmarks/grid_after.py grid --boxes OUT.png

For each finished run of the grid that still has its model, `softpick evaluate`, `analyze` and `quantize` run at the same time
on text that training did not see (the grid's validation tokens, decoded). Their figures become one line of
``grid/after.jsonl``; a model with a line is not measured again. ``--table`` prints the lines as a table in Markdown, means
over the seeds; ``--boxes`` draws box plots of the hidden states, layer by layer, of each variant's first seed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from transformers import AutoTokenizer

from softpick.evaluation.passkey import shortest_prompt
from softpick.experiment.files import write_text
from softpick.training.grid import read_rows
from softpick.training.grid_report import variants_table
from softpick.training.token_files import TokenFile

DOCUMENTS = 1500  # held-out documents that are decoded, at most
PASSKEYS = (0.5, 0.75, 1, 1.5, 2, 4)  # lengths of prompts, in lengths of the training sequences


def held_out(grid: Path, run: Path) -> Path:
    """The held-out documents of a run as JSONL; the same file for all runs with the same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    tokens = TokenFile(run / "validation.tokens", 2, len(tokenizer), tokenizer.bos_token_id).tokens
    path = grid / f"held_out-{len(tokens)}.jsonl"
    if not path.exists():
        ends = numpy.flatnonzero(tokens == tokenizer.eos_token_id)[:DOCUMENTS]
        starts = [0, *(ends[:-1] + 1)]
        texts = [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
        write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))
    return path


def commands(model: Path, text: Path, length: int, out: Path, device: str, quantizers: str) -> dict[str, list[str]]:
    """What is run on a model, by name."""
    shared = ["--data", str(text), "--device", device]
    tokenizer = AutoTokenizer.from_pretrained(model.parent / "tokenizer")
    least = shortest_prompt(tokenizer, tokenizer.bos_token_id)
    passkeys = ",".join(str(round(share * length)) for share in PASSKEYS if share * length >= least) or "none"
    return {
        "evaluate": [
            "evaluate", str(model), "--tasks", "none", "--passkey", passkeys, "--passkey-prompts", "100", *shared,
            "--samples", "256", "--sequence-length", str(4 * length), "--batch-size", "32", "--output", str(out / "evaluate"),
        ],
        "analyze": [
            "analyze", str(model), *shared, "--sequence-length", str(length), "--samples", "64", "--knockout",
            "first,strongest", "--knockout-samples", "64", "--output", str(out / "analyze"),
        ],
        "quantize": [
            "quantize", str(model), *shared, "--method", quantizers, "--bits", "8,4,3", "--activations",
            "int8-tensor,int8-token,int4-token,fp8-tensor,fp8-token", "--kv-cache", "8,4,fp8", "--sequence-length", str(length),
            "--samples", "256", "--output", str(out / "quantize"),
        ],
    }  # fmt: skip


def program(model: Path) -> list[str]:
    """What runs the command softpick for a model: of a candidate, the script that knows it."""
    tried = json.loads((model / "config.json").read_text())["model_type"] == "softpick_candidate"
    return [str(Path(__file__).with_name("candidates.py"))] if tried else ["-m", "softpick"]


def measure(grid: Path, row: dict[str, Any], device: str, quantizers: str) -> dict[str, Any]:
    """One line of ``after.jsonl``; raises if a command fails."""
    name = f"{row['variant']}-s{row['seed']}"
    run, out = grid / "runs" / name, grid / "after" / name
    length = row["recipe"]["sequence_length"]
    asked = commands(run / "model", held_out(grid, run), length, out, device, quantizers)
    out.mkdir(parents=True, exist_ok=True)
    begin, processes = time.monotonic(), {}
    for command, arguments in asked.items():
        if not (out / command / "results.json").exists():
            with (out / f"{command}.log").open("w") as log:
                processes[command] = subprocess.Popen(
                    [sys.executable, *program(run / "model"), *arguments], stdout=log, stderr=subprocess.STDOUT
                )
    for command, process in processes.items():
        if process.wait():
            raise SystemExit(
                f"{name}: {command} ended with {process.returncode}:\n{(out / f'{command}.log').read_text()[-2000:]}"
            )
    found = {command: json.loads((out / command / "results.json").read_text()) for command in asked}
    seconds = round(time.monotonic() - begin, 1)
    provenance = {
        key: found["evaluate"][key] for key in ("hardware", "versions", "created") if key in found["evaluate"]
    }
    return {"variant": row["variant"], "seed": row["seed"], **figures(found), "seconds": seconds, **provenance}


def figures(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that the table shows and the positions' losses, from the three commands' results."""
    evaluated, analyzed, quantized = (found[name]["runs"][0] for name in ("evaluate", "analyze", "quantize"))
    unquantized = next(cell for cell in quantized["cells"] if cell["kind"] == "none")["perplexity"]
    return {
        "by_position": [
            {key: part[key] for key in ("from", "to", "loss", "loss_stderr")}
            for part in evaluated["perplexity"]["ranges"]
        ],
        "loss_within": math.log(evaluated["perplexity"]["within"]),
        "loss_beyond": math.log(evaluated["perplexity"]["beyond"]),
        "passkey": {str(part["length"]): part["accuracy"] for part in evaluated["passkey"]},
        "knockout": {
            part["key"]: {"eviction": part["eviction_percent"], "absence": part["absence_percent"]}
            for part in analyzed["knockout"]
        },
        "perplexity": unquantized,
        "hidden": [
            {key: layer[key] for key in ("layer", "kurtosis", "box")}
            for layer in analyzed["measurements"]["hidden"]["per_layer"]
        ],
        "quantized": {
            cell["title"]: 100 * (cell["perplexity"] / unquantized - 1)
            for cell in quantized["cells"]
            if cell["kind"] != "none" and cell.get("perplexity")
        },
    }


def columns(lines: list[dict[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Title, style and figure of each row of the table."""
    yield "loss at trained positions", ".4f", lambda line: line["loss_within"]
    yield "loss beyond, to 4 times the length", ".4f", lambda line: line["loss_beyond"]
    for length in sorted({int(length) for line in lines for length in line["passkey"]}):
        yield f"passkey at {length} tokens, %", ".0f", lambda line, key=str(length): line["passkey"].get(key)
    for key in ("first", "strongest"):
        for kind in ("eviction", "absence"):
            title = f"perplexity, {key} key's {kind}, %"
            yield title, "+.1f", lambda line, key=key, kind=kind: line["knockout"].get(key, {}).get(kind)
    for scheme in dict.fromkeys(scheme for line in lines for scheme in line["quantized"]):
        yield f"perplexity, {scheme}, %", "+.1f", lambda line, scheme=scheme: line["quantized"].get(scheme)


def draw_boxes(lines: list[dict[str, Any]], path: Path) -> None:
    """Box plots of the hidden states after each layer: quartiles, Tukey's whiskers, and the extremes as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown: dict[str, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        if line.get("hidden"):
            shown.setdefault(line["variant"], line)
    if not shown:
        raise SystemExit("after.jsonl: no line has hidden states; lines before 2026-12 have none")
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    figure, axes = plt.subplots(down, across, figsize=(4 * across, 3 * down), sharey=True, squeeze=False)
    for axis, (variant, line) in zip(axes.flat, shown.items(), strict=False):
        boxes = [layer["box"] for layer in line["hidden"]]
        axis.bxp(
            [
                {
                    "med": box["median"], "q1": box["q1"], "q3": box["q3"], "whislo": box["whisker_low"],
                    "whishi": box["whisker_high"], "fliers": [box["min"], box["max"]],
                }
                for box in boxes
            ],
            positions=[layer["layer"] for layer in line["hidden"]],
            flierprops={"marker": ".", "markersize": 4},
        )  # fmt: skip
        axis.set(title=f"{variant}, seed {line['seed']}", xlabel="after layer", yscale="symlog")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--only", help="comma-separated VARIANT-sSEED")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantizers", default="hqq", help="of softpick quantize (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print after.jsonl as a table and stop")
    parser.add_argument("--boxes", type=Path, metavar="OUT.png", help="draw box plots of the hidden states and stop")
    options = parser.parse_args()
    path = options.grid / "after.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if options.table:
        print("\n".join(variants_table(lines, columns(lines))))
        return
    if options.boxes is not None:
        draw_boxes(lines, options.boxes)
        return
    known = {(line["variant"], line["seed"]) for line in lines}
    for row in read_rows(options.grid):
        name = f"{row['variant']}-s{row['seed']}"
        wanted = options.only is None or name in options.only.split(",")
        if wanted and (row["variant"], row["seed"]) not in known and (options.grid / "runs" / name / "model").exists():
            line = measure(options.grid, row, options.device, options.quantizers)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{name}: {line['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
