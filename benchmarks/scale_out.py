"""Training and ring attention on the GPUs of one host: one command, one table.

    python benchmarks/scale_out.py --output runs/scale_out                          # every GPU; needs [torchtitan]
    python benchmarks/scale_out.py --output runs/scale_out --device cpu --ranks 2   # gloo and a tiny model: does it work?

A row is a process group of its own, started by torchrun, whose result is kept in OUTPUT/rows.jsonl: the same command goes on
where it was stopped, and a run that takes more than --minutes stops between two rows. Rows of one GPU run side by side on
different GPUs, the others one after the other. Every document of the text is exactly one sequence, so that any number of ranks
sees the same batches; weights of torchtitan's rows come from one checkpoint. So losses and gradient norms can be compared.

Rows: FSDP2 over N by the transformers Trainer and by torchtitan, tensor parallelism 2 with FSDP2 over N / 2 (torchtitan), one
long sequence by context parallelism over N (torchtitan), ring attention alone (scale_out_ring.py), a run that is killed by the
loss of one rank and goes on with half of the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
STEPS, LOG_EVERY = 20, 5
SECONDS_OF_A_ROW = 90  # with less than this left no further row is begun
SIZES = {  # torchtitan's size: the recipe, and sequences a GPU of one micro-batch
    "340M": ("paper_340m", 4),
    "1.8B": ("paper_1_8b", 2),
}
NORMALIZERS = ("softmax", "softpick")


@dataclass
class Row:
    """One run: what is started, on how many ranks, and how its figures are read."""

    name: str
    ranks: int
    command: list[str]
    reads: str  # "trainer", "titan", "ring" or "killed"
    folder: Path
    against: str = ""  # the row of one rank that it is compared with
    notes: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# The text: one document is one sequence


def make_text(folder: Path, vocabulary: int, length: int, documents: int) -> tuple[Path, Path]:
    """A tokenizer of words and a JSONL file of documents with ``length - 1`` words each.

    Word ``i + 1`` is word ``i`` plus a random number below 40, so that there is something to learn.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    assets, data = folder / f"tokenizer-{vocabulary}", folder / f"text-{vocabulary}-{length}.jsonl"
    if not assets.exists():
        words = ["<s>", "</s>", *(f"w{i}" for i in range(vocabulary - 2))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        made = folder / f".tokenizer-{vocabulary}.tmp"
        made.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(made / "tokenizer.json"))
        special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (made / "tokenizer_config.json").write_text(json.dumps(special))
        made.rename(assets)
    if not data.exists():
        numbers = torch.Generator().manual_seed(0)
        made = data.with_suffix(".tmp")
        with made.open("w") as file:
            for _ in range(documents):
                steps = torch.randint(40, (length - 1,), generator=numbers)
                words = (steps.cumsum(0) % (vocabulary - 2)).tolist()
                file.write(json.dumps({"text": " ".join(f"w{i}" for i in words)}) + "\n")
        made.rename(data)
    return assets, data


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def torchrun(ranks: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, *arguments]


def trainer_row(
    recipe: str, normalizer: str, ranks: int, whole: int, micro: int, text: tuple[Path, Path], output: Path, device: str
) -> Row:
    """``softpick train`` on ``ranks`` GPUs, with the batch of ``whole`` GPUs."""
    folder = output / f"trainer-{recipe}-{normalizer}-{ranks}"
    parallel = "none" if ranks == 1 else "ddp" if device == "cpu" else "fsdp"
    fields = [
        f"normalizer={normalizer}", f"data={text[1]}", f"tokenizer={text[0]}", f"steps={STEPS}", f"log_every={LOG_EVERY}",
        f"batch_size={micro * whole}", f"micro_batch_size={micro}", f"parallel={parallel}", "evaluate_every=0",
        "probe_every=0", f"save_every={STEPS}", "warmup_steps=5", "validation_sequences=8",
    ]  # fmt: skip
    if recipe.startswith("paper"):
        fields.append("data_config=none")
    command = ["-m", "softpick", "train", recipe, *fields, "--output", str(folder), "--device", device]
    command = torchrun(ranks, *command) if ranks > 1 else [sys.executable, *command]
    against = "" if ranks == 1 else f"trainer-{recipe}-{normalizer}-1"
    return Row(folder.name, ranks, command, "trainer", folder, against)


def titan_row(
    kind: str, size: str, normalizer: str, ranks: int, whole: int, local: int, length: int, text: tuple[Path, Path],
    output: Path, **options: Any,
) -> Row:  # fmt: skip
    """torchtitan, all runs of a size from one checkpoint; ``local`` sequences a rank, or so many a micro-batch."""
    folder = output / f"titan-{kind}-{size}-{normalizer}-{ranks}"
    given = {
        "experimental.custom_import": "softpick.integrations.torchtitan",
        "model.name": "softpick_llama",
        "model.flavor": f"{size}-{normalizer}",
        "model.hf_assets_path": text[0],
        "training.dataset": "files",
        "training.dataset_path": text[1],
        "training.seq_len": length,
        "training.local_batch_size": local,
        "training.global_batch_size": whole,
        "training.steps": STEPS,
        "lr_scheduler.warmup_steps": 5,
        "metrics.log_freq": LOG_EVERY,
        "debug.seed": 0,
        "checkpoint.enable": True,
        "checkpoint.load_only": True,
        "checkpoint.initial_load_path": output / f"seed-{size}-{normalizer}" / "checkpoint" / "step-0",
        "job.dump_folder": folder,
    } | {name.replace("__", "."): value for name, value in options.items()}
    line = [
        part
        for name, value in given.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    against = "" if ranks == 1 else f"titan-{'context' if kind == 'context' else 'one'}-{size}-{normalizer}-1"
    return Row(folder.name, ranks, torchrun(ranks, "-m", "torchtitan.train", *line), "titan", folder, against)


def seed_row(size: str, normalizer: str, text: tuple[Path, Path], output: Path) -> Row:
    """The checkpoint that all of torchtitan's rows of a size start from."""
    row = titan_row("seed", size, normalizer, 1, 1, 1, 4096, text, output, checkpoint__create_seed_checkpoint=True)
    at = row.command.index("--checkpoint.initial_load_path")
    command = [part for part in (*row.command[:at], *row.command[at + 2 :]) if part != "--checkpoint.load_only"]
    folder = output / f"seed-{size}-{normalizer}"
    command[command.index("--job.dump_folder") + 1] = str(folder)
    return Row(folder.name, 1, command, "seed", folder)


def rows_of(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Groups of rows; those of a group may run at the same time, each on GPUs of its own."""
    output, ranks, device = options.output, options.ranks, options.device
    if device == "cpu":
        text = make_text(output, 512, 64, 32 * STEPS)
        for n in (1, ranks):
            yield [trainer_row("tiny_cpu", name, n, ranks, 4, text, output, device) for name in NORMALIZERS]
        yield [killed_row(options, "tiny_cpu", 4, text)]
        yield [ring_row(options)]
        return
    text = make_text(output, 32000, 4096, (STEPS + 4) * 4 * ranks)
    long = make_text(output, 32000, 65536, STEPS + 4)
    yield [seed_row(size, name, text, output) for size in SIZES for name in NORMALIZERS]
    one: list[Row] = []
    for size, (recipe, micro) in SIZES.items():
        for name in NORMALIZERS:
            one.append(trainer_row(recipe, name, 1, ranks, micro, text, output, device))
            one.append(titan_row("one", size, name, 1, micro * ranks, micro, 4096, text, output, compile__enable=True))
    one += [
        titan_row("context", "340M", name, 1, 1, 1, 65536, long, output, compile__enable=True) for name in NORMALIZERS
    ]
    yield one
    yield [ring_row(options)]
    for size, (recipe, micro) in SIZES.items():
        for name in NORMALIZERS:
            whole = micro * ranks
            yield [trainer_row(recipe, name, ranks, ranks, micro, text, output, device)]
            shards = {"parallelism__data_parallel_shard_degree": ranks, "compile__enable": True}
            yield [titan_row("fsdp", size, name, ranks, whole, micro, 4096, text, output, **shards)]
            both = {"parallelism__tensor_parallel_degree": 2, "parallelism__data_parallel_shard_degree": ranks // 2}
            yield [titan_row("tensor", size, name, ranks, whole, 2 * micro, 4096, text, output, **both)]
    for name in NORMALIZERS:
        context = {"parallelism__context_parallel_degree": ranks, "compile__enable": True}
        yield [titan_row("context", "340M", name, ranks, 1, 1, 65536, long, output, **context)]
    yield [killed_row(options, "paper_340m", 4, text)]


def ring_row(options: argparse.Namespace) -> Row:
    lengths = ("512", "1024") if options.device == "cpu" else ("65536", "262144")
    folder = options.output / f"ring-{options.ranks}"
    command = torchrun(options.ranks, str(HERE / "scale_out_ring.py"), options.device, str(folder), *lengths)
    return Row(folder.name, options.ranks, command, "ring", folder)


def killed_row(options: argparse.Namespace, recipe: str, micro: int, text: tuple[Path, Path]) -> Row:
    row = trainer_row(recipe, "softpick", options.ranks, options.ranks, micro, text, options.output, options.device)
    folder = options.output / f"killed-{recipe}-{options.ranks}"
    command = [str(folder) if part == str(row.folder) else part for part in row.command]
    command = [f"save_every={STEPS // 2}" if part == f"save_every={STEPS}" else part for part in command]
    return Row(folder.name, options.ranks, command, "killed", folder, row.name)


# ---------------------------------------------------------------------------------------------------------------------
# Running and reading


def environment(gpus: range | None) -> dict[str, str]:
    extra = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NCCL_NVLS_ENABLE": "0"}
    if gpus is not None:
        extra["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return os.environ | extra


def run(row: Row, gpus: range | None) -> dict[str, Any]:
    """Start a row, wait, and read its figures; what went wrong is one of them."""
    row.folder.parent.mkdir(parents=True, exist_ok=True)
    log = row.folder.with_suffix(".log")
    start = time.time()
    if row.reads == "killed":
        found = lose_a_rank(row, log, gpus)
    else:
        with log.open("w") as file:
            done = subprocess.run(row.command, stdout=file, stderr=subprocess.STDOUT, env=environment(gpus))
        found = read(row, log) if done.returncode == 0 else {"error": last_words(log)}
    record = {"row": row.name, "ranks": row.ranks, "against": row.against, "wall_s": round(time.time() - start, 1)}
    return record | found | {"command": " ".join(row.command)}


def last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return ((errors or lines or ["no output"])[-1])[:300]


def read(row: Row, log: Path) -> dict[str, Any]:
    if row.reads == "trainer":
        return read_trainer(row.folder)
    if row.reads == "titan":
        return read_titan(log, row.ranks)
    if row.reads == "ring":
        return {"rings": json.loads(row.folder.with_suffix(".json").read_text())}
    return {}


def read_trainer(folder: Path) -> dict[str, Any]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {entry["step"]: entry for entry in entries if entry["kind"] == "train"}
    speed = json.loads((folder / "results.json").read_text())["speed"]
    return {
        "tokens_per_second": speed.get("tokens_per_second"),
        "mfu": speed.get("mfu"),
        "peak_memory_gib": speed.get("peak_memory_gib"),
        "loss": {step: entry["loss"] for step, entry in logged.items()},
        "grad_norm": {step: entry["grad_norm"] for step, entry in logged.items()},
    }


_TITAN = re.compile(
    r"step:\s*(\d+)\s+loss:\s*([\d.]+)\s+grad_norm:\s*([\d.]+)\s+memory:\s*([\d.]+)GiB.*?tps:\s*([\d,]+)(?:.*?mfu:\s*([\d.]+)%)?"
)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def read_titan(log: Path, ranks: int) -> dict[str, Any]:
    lines = [
        match for line in log.read_text(errors="replace").splitlines() if (match := _TITAN.search(_COLOR.sub("", line)))
    ]
    by_step = {int(match[1]): match for match in lines}
    if STEPS not in by_step:
        return {"error": f"no line of step {STEPS}: {last_words(log)}"}
    # the first line has the compilation in it
    later = sorted(by_step.items())[1:]
    speeds = sorted(int(match[5].replace(",", "")) for _, match in later)
    shares = sorted(float(match[6]) / 100 for _, match in later if match[6])
    return {
        "tokens_per_second": speeds[len(speeds) // 2] * ranks,
        "mfu": shares[len(shares) // 2] if shares else None,
        "peak_memory_gib": max(float(match[4]) for match in lines),
        "loss": {step: float(match[2]) for step, match in by_step.items()},
        "grad_norm": {step: float(match[3]) for step, match in by_step.items()},
    }


def children(parent: int) -> list[int]:
    """The processes that one started, in the order of their numbers (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return sorted(found)


def lose_a_rank(row: Row, log: Path, gpus: range | None) -> dict[str, Any]:
    """Kill one rank after the first checkpoint; all ranks must end, and half as many must reach the last step."""
    with log.open("w") as file:
        process = subprocess.Popen(row.command, stdout=file, stderr=subprocess.STDOUT, env=environment(gpus))
        halfway = row.folder / "checkpoints" / f"checkpoint-{STEPS // 2}"
        while process.poll() is None and not halfway.exists():
            time.sleep(0.02)
        if process.poll() is not None:
            return {"error": f"ended before a rank could be killed: {last_words(log)}"}
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        start = time.time()
        process.wait()
    said = re.search(r"failed \(exitcode: -?\d+\) local_rank: \d+", log.read_text(errors="replace"))
    found = {"seconds_until_all_ended": round(time.time() - start, 1), "said": said[0] if said else last_words(log)}
    half = row.ranks // 2
    command = list(row.command)
    command[command.index("--nproc-per-node") + 1] = str(half)
    found["resumed_on"] = half
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment(gpus))
    return found | (read_trainer(row.folder) if done.returncode == 0 else {"error": last_words(log)})


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| row | ranks | tokens/s | of one rank's | MFU | GiB | loss at the end | loss off by | gradient norm off by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['ranks']} | **{row['error']}** | | | | | | |")
        elif "loss" in row:
            lines.append(training_line(name, row, rows.get(row["against"])))
    for row in rows.values():
        if "seconds_until_all_ended" in row:
            said = f"Rank killed: all ended after {row['seconds_until_all_ended']} s (torchrun: {row['said']})"
            lines += ["", f"{said}; the run went on with {row['resumed_on']} of {row['ranks']} ranks."]
        for ring in row.get("rings", []):
            lines += ["", ", ".join(f"{key} {value}" for key, value in ring.items())]
    return "\n".join(lines)


def training_line(name: str, row: dict[str, Any], one: dict[str, Any] | None) -> str:
    last = str(STEPS)
    cells = [name, str(row["ranks"]), f"{row['tokens_per_second']:,.0f}" if row.get("tokens_per_second") else ""]
    share = loss = norm = ""
    if one and "loss" in one:
        if row.get("tokens_per_second") and one.get("tokens_per_second"):
            share = f"{row['tokens_per_second'] / (row['ranks'] / one['ranks'] * one['tokens_per_second']):.1%}"
        loss = f"{max(abs(row['loss'][s] - one['loss'][s]) for s in row['loss']):.4f}"
        norm = f"{max(abs(row['grad_norm'][s] / one['grad_norm'][s] - 1) for s in row['grad_norm']):.2%}"
    mfu = f"{row['mfu']:.1%}" if row.get("mfu") else ""
    memory = f"{row['peak_memory_gib']:.1f}" if row.get("peak_memory_gib") else ""
    return "| " + " | ".join([*cells, share, mfu, memory, f"{row['loss'][last]:.4f}", loss, norm]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for text, runs and rows.jsonl")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--ranks", type=int, help="GPUs, an even number (all of the host); with --device cpu: processes"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="no row is begun that could end later")
    parser.add_argument("--only", default="", help="rows whose names contain this")
    options = parser.parse_args()
    options.ranks = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 2)
    options.output = options.output.resolve()
    if options.ranks < 2 or options.ranks % 2:
        parser.error(f"--ranks: expected an even number of at least 2 (the GPUs of this host), got {options.ranks}")
    until = time.time() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    kept = options.output / "rows.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    rows = {row["row"]: row for line in lines if "error" not in (row := json.loads(line))}
    gpus = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{options.ranks} x {gpus}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    left_out = []
    for group in rows_of(options):
        group = [row for row in group if row.name not in rows and options.only in row.name]
        side_by_side = options.ranks if options.device == "cuda" and all(row.ranks == 1 for row in group) else 1
        for i in range(0, len(group), side_by_side):
            batch = group[i : i + side_by_side]
            if time.time() + SECONDS_OF_A_ROW > until:
                left_out += [row.name for row in batch]
                continue
            places = [range(j, j + 1) if side_by_side > 1 else None for j in range(len(batch))]
            with ThreadPoolExecutor(len(batch)) as pool:
                for record in pool.map(run, batch, places):
                    record = json.loads(json.dumps(record))  # keys as a file has them
                    with kept.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    rows[record["row"]] = record
                    print(f"{record['row']}: {record.get('error', 'done')} ({record['wall_s']} s)", flush=True)
    print(table(rows))
    if left_out:
        print(f"not begun, {options.minutes} minutes are over: {', '.join(left_out)}; the same command goes on")
    return 1 if left_out or any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
