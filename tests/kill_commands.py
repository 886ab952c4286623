"""Kill the six commands at random moments, run each again, and compare with runs that nobody disturbed.

``python tests/kill_commands.py --kills 200 --seed 0`` prints what was lost and exits with 1 if anything was.

Each command runs in a forked process (so that importing torch costs nothing). It is killed with SIGKILL either after a random
time, or at a random event of the file system below its output folder: a hook on Python's audit events (``open`` for writing,
``os.rename``, ``os.remove``, ``os.mkdir``, ``os.rmdir``) counts them, which hits the moments between two files. Some are killed
two or three times. Files of a user lie in the folder. The last run must succeed, or say that all is there; the figures must be
those of the undisturbed run, to the bit; the user's files must be as they were; and nothing unfinished may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

import softpick.analysis.audit
import softpick.evaluation.evaluate
import softpick.evaluation.plots
import softpick.quantization.plots
import softpick.quantization.quantize
import softpick.training.engine  # noqa: F401
from softpick import cli
from softpick.training.data import train_tokenizer

VOLATILE = {
    "seconds", "created", "command", "speed", "tokens_per_second", "peak_memory_gib", "mfu", "processor_seconds", "cost",
}  # fmt: skip
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WORDS = ["the", "a", "of", "attention", "head", "key", "query", "value", "sum", "row", "weight", "token", "zero"]
USERS = ("notes.txt", "audit-notes.json", "evaluate-2026.pt", "quantize-x.tmp", ".results.json.tmp")
USERS_OF_A_RUN = (
    "notes.txt",
    "checkpoints/notes.txt",
    "checkpoints/checkpoint-mine/weights.txt",
    ".training/x.tmp/mine.txt",
)


@dataclass
class Moment:
    """When to kill: at the N-th event, or after so many seconds; never where both are None."""

    event: int | None = None
    seconds: float | None = None


@dataclass
class Command:
    """One of the six, and its undisturbed run."""

    name: str
    arguments: list[str]
    events: int = 0
    seconds: float = 0.0
    figures: object = None
    files: set[str] = field(default_factory=set)

    @property
    def trains(self) -> bool:
        return self.name in ("train", "compare", "convert")


def commands(home: Path) -> list[Command]:
    """Tiny data and a tiny model, and what is run on them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    texts = [" ".join(random.Random(i).choices(WORDS, k=150)) for i in range(40)]
    (home / "text").mkdir()
    for i, text in enumerate(texts):
        (home / f"text/{i:02}.txt").write_text(text)
    tokenizer = train_tokenizer(texts, 280)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    model, data = str(home / "model"), ["--data", str(home / "text")]
    fields = (
        "width=16 intermediate=32 layers=1 heads=2 vocab_size=280 sequence_length=16 steps=8 warmup_steps=2 batch_size=4 "
        "micro_batch_size=4 log_every=2 save_every=2 evaluate_every=4 probe_every=4 probe_sequences=2 validation_sequences=4"
    )
    sizes = "--layers 1 --heads 2 --width 8 --sequence-length 16 --vocab-size 270 --batch-size 4 --steps 8"
    measured = ["--samples", "4", "--sequence-length", "24"]
    converted = (
        "--align-steps 6 --align-batch-size 4 --align-sequence-length 16 --distil-steps 6 --distil-sequence-length 16 "
        "--save-every 2 --samples 2 --prompts 2 --extraction 2 --validation-sequences 2"
    )
    return [
        Command("train", ["train", "tiny_cpu", f"data={home / 'text'}", *fields.split(), "--device", "cpu"]),
        Command("compare", ["compare", *data, *sizes.split()]),
        Command("analyze", ["analyze", model, *data, *measured, "--text", "the sum of a row", "--knockout", "first,3"]),
        Command(
            "evaluate", ["evaluate", model, *data, *measured, "--tasks", "none", "--passkey", "none", "--bins", "2"]
        ),
        Command(
            "quantize",
            [
                "quantize",
                model,
                *data,
                *measured,
                "--method",
                "none",
                "--activations",
                "int8-token",
                "--kv-cache",
                "8,4",
            ],
        ),
        Command("convert", ["convert", model, *data, *converted.split(), "--device", "cpu"]),
    ]


def run(command: Command, output: Path, moment: Moment, log: Path) -> tuple[int, int]:
    """The exit code (negative: killed) and the number of events."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        _child([*command.arguments, "--output", str(output)], output, moment.event, log, write)
    os.close(write)
    if moment.seconds is not None:
        deadline = time.monotonic() + moment.seconds
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        counted = pipe.read()
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), int(counted or 0)


def _child(arguments: list[str], output: Path, event: int | None, log: Path, pipe: int) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    count, below = 0, str(output)

    def watch(name: str, values: tuple[object, ...]) -> None:
        nonlocal count
        written = name == "open" and isinstance(values[1], str) and set(values[1]) & set("wax+")
        flags = (
            name == "open"
            and values[1] is None
            and isinstance(values[2], int)
            and values[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (name in EVENTS or written or flags) and any(below in str(value) for value in values[:2]):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = ["softpick", *arguments]
    code = 0
    try:
        cli.main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(pipe, str(count).encode())
    os._exit(code)


def figures(output: Path) -> object:
    """All that must not depend on whether the command was disturbed."""

    def steady(value: object) -> object:
        if isinstance(value, dict):
            return {key: steady(item) for key, item in value.items() if key not in VOLATILE}
        return [steady(item) for item in value] if isinstance(value, list) else value

    weights = {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("model.safetensors"))
        if "checkpoint" not in str(path.relative_to(output))
    }
    text = (output / "results.json").read_text()
    return steady(json.loads(text.replace(str(output), "OUTPUT"))), weights  # a run says where its text lies


def differences(found: object, expected: object, where: str = "") -> list[str]:
    """Where two values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = list(dict.fromkeys([*found, *expected]))
        return [d for key in keys for d in differences(found.get(key), expected.get(key), f"{where}/{key}")]
    if isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)) and len(found) == len(expected):
        return [
            d for i, (a, b) in enumerate(zip(found, expected, strict=True)) for d in differences(a, b, f"{where}/{i}")
        ]
    return [] if found == expected else [f"{where}: {str(found)[:40]}, expected {str(expected)[:40]}"]


def files(output: Path) -> set[str]:
    """Names in the folder."""
    return {path.name for path in output.iterdir()}


def put(output: Path, names: tuple[str, ...]) -> dict[Path, str]:
    """Files of a user, none of which is there yet."""
    made = {}
    for name in names:
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(f"mine: {name}")
        made[path] = f"mine: {name}"
    return made


def disturb(command: Command, output: Path, random_: random.Random, kills: int) -> tuple[list[str], list[str]]:
    """Kill a command so many times, run it to its end, and say what was lost, and when it was killed."""
    log = output.with_suffix(".log")
    users = {} if command.trains else put(output, USERS)
    moments = []
    for _ in range(kills):
        if random_.random() < 0.6:
            moment = Moment(event=random_.randint(1, command.events))
        else:
            moment = Moment(seconds=random_.uniform(0, command.seconds))
        code, _ = run(command, output, moment, log)
        moments.append(f"{moment}: {code}")
        if command.trains and (output / "config.json").exists() and not (output / "results.json").exists():
            users |= put(output, USERS_OF_A_RUN)
    code, _ = run(command, output, Moment(), log)
    said = log.read_text()
    lost = []
    if code and not (code == 2 and "is there already" in said and (output / "results.json").exists()):
        return [f"exit {code}: {said[-400:]}"], moments
    if "Traceback" in said:
        lost.append(said)
    lost += [f"other figures: {where}" for where in differences(figures(output), command.figures)[:3]]
    lost += [
        f"{path} is changed or gone" for path, text in users.items() if not path.exists() or path.read_text() != text
    ]
    tops = {path.relative_to(output).parts[0] for path in users}
    if files(output) - tops != command.files - tops:
        lost.append(f"files: {sorted(files(output) ^ command.files)}")
    return lost, moments


def main() -> int:
    """The number of losses, at most 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random_ = random.Random(options.seed)
    losses = done = 0
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        every = [c for c in commands(home) if options.only in (None, c.name)]
        for command in every:
            start = time.monotonic()
            code, command.events = run(command, home / command.name, Moment(), home / "log")
            command.seconds = time.monotonic() - start
            if code:
                print(f"{command.name}: undisturbed, exit {code}\n{(home / 'log').read_text()}")
                return 1
            command.figures, command.files = figures(home / command.name), files(home / command.name)
            print(f"{command.name}: {command.seconds:.1f} s, {command.events} events of the file system", flush=True)
        number = 0
        while done < options.kills:
            command = every[number % len(every)]
            kills = min(random_.choice((1, 1, 2, 3)), options.kills - done)
            output = home / f"{number}-{command.name}"
            lost, moments = disturb(command, output, random_, kills)
            for text in lost:
                print(f"LOST {command.name}, {'; '.join(moments)}: {text}", flush=True)
            losses += bool(lost)
            done += kills
            number += 1
            if number % 10 == 0:
                print(f"{done} kills so far", flush=True)
        print(f"{done} kills in {number} runs, {losses} with a loss")
    return int(losses > 0)


if __name__ == "__main__":
    raise SystemExit(main())
