"""Compiles the kernels with every supported Triton for every supported GPU, none of which has to be there: ``make matrix``.

    python tests/matrix.py [--triton 3.9.0] [--target 120] [--jobs 2]

Each Triton is installed into a folder of its own below ``.matrix`` (200 MB each). What comes of a case is a row of
``.matrix/results.jsonl`` (``--results``) as soon as it is compiled; it is compiled again when the source of the kernels has
changed, and when it failed. A cell of the table, which is printed in Markdown, has the number of kernels of all cases, the most
shared memory that one takes (KiB), and the most that a thread of one spills (bytes). A case fails if a kernel does not compile,
or needs more shared memory or more registers than the chip has; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from environments import ROOT
from kernel_resources import REGISTERS

CACHE = ROOT / ".matrix"
Key = tuple[str, str, str]
MOST = ("shared", "registers", "spilled")
TRITONS = ("3.9.0", "3.8.0", "3.7.1", "3.6.0")
# KiB of shared memory a program may have
TARGETS = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99, "gfx942": 64}
# Every way through the kernels (compile_kernels.py says what the words mean); test_matrix.py looks that no switch is forgotten.
CASES = [
    "softpick,64,bfloat16,none",
    "softpick,128,bfloat16,none",
    "softpick,256,float16,none",
    "softmax,128,float32,none",
    "softpick,128,bfloat16,bias",
    "softpick,256,float16,bias",
    "softpick,80,float32,bias",
    "softpick,64,bfloat16,mask+full",
    "softpick,256,float32,mask",
    "softpick,128,bfloat16,packed",
    "softmax,256,float16,packed+window",
    "softpick,64,float32,packed+full",
    "softpick,64,bfloat16,pages+window",
    "softpick,128,bfloat16,pages",
    "softpick,256,float16,pages+full",
    "rectified,64,float32,pages",
    "learned_sink,64,bfloat16,pages",
    "learned_sink,128,float16,packed+stats",
    "learned_sink,128,float32,bias",
    "softpick,64,bfloat16,pages+rows",
    "softpick,128,bfloat16,bias+rows",
    "softpick,256,float16,pages+rows",
    "softmax,64,float32,rows",
    "softpick,128,float32,pages+rows",
    "softpick,256,float32,rows+mask",
    "softpick,128,bfloat16,stats",
    "softpick,256,float32,stats+bias",
    "softpick,64,bfloat16,part",
    "softpick_stop_gradient,128,bfloat16,none",
    "softmax_plus_one,64,bfloat16,full",
    "relu_softpick,64,float16,pages",
    "linear_softpick,64,bfloat16,pages",
    "linear_softpick,128,float32,bias+stats",
]
HOPPER_CASES = [
    "softpick,64,bfloat16,hopper",
    "softpick,128,bfloat16,hopper",
    "softpick,64,bfloat16,hopper+full",
    "softpick,128,bfloat16,hopper+window",
    "softmax,96,bfloat16,hopper+full",
    "softpick,64,bfloat16,hopper+rows",
    "softpick,128,bfloat16,hopper+rows",
    "softmax_plus_one,64,bfloat16,hopper",
    "softmax_plus_one,128,bfloat16,hopper",
    "rectified,64,bfloat16,hopper",
    "rectified,128,bfloat16,hopper",
    "relu_softpick,64,bfloat16,hopper",
    "softpick_stop_gradient,64,bfloat16,hopper",
    "softpick_stop_gradient,128,bfloat16,hopper",
    "learned_sink,64,bfloat16,hopper+full",
    "learned_sink,128,bfloat16,hopper",
    "linear_softpick,64,bfloat16,hopper+window",
    "linear_softpick,128,bfloat16,hopper+full",
    "softpick,64,float16,hopper",
    "softpick,128,float16,hopper",
    "learned_sink,128,float16,hopper+full",
    "softmax,64,float16,hopper+full",
    "softpick,64,bfloat16,hopper+softcap",
    "softpick,128,bfloat16,hopper+softcap+full",
    "softpick,128,bfloat16,fp8+hopper",
    "softmax,128,bfloat16,fp8+hopper",
]
FP8_CASES = [  # GPUs from Ada on have fp8
    "softpick,128,bfloat16,fp8",
    "softmax,64,float16,fp8",
    "learned_sink,80,bfloat16,fp8+window",
    "softpick,64,float32,fp8",
]


def cases_for(target: str) -> list[str]:
    """What is compiled for a target."""
    fp8 = FP8_CASES if target in ("89", "90", "100", "120") else []
    return CASES + fp8 + (HOPPER_CASES if target == "90" else [])


def source(target: str) -> str:
    """A hash of what is compiled for a target, and of how: the kernels in Gluon are for Hopper GPUs alone."""
    files = [*sorted((ROOT / "src/softpick/ops/triton").rglob("*.py")), ROOT / "src/softpick/normalizers.py"]
    files = [path for path in files if target == "90" or path.parent.name != "hopper"]
    files += [ROOT / "src/softpick/ops" / name for name in ("spec.py", "key_bounds.py", "fp8.py")]
    files += [Path(__file__).with_name(name) for name in ("compile_kernels.py", "kernel_resources.py")]
    files.append(ROOT / "benchmarks/without_gpu.py")
    limits = json.dumps([TARGETS[target], REGISTERS]).encode()
    return hashlib.sha256(limits + b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def install(version: str) -> Path:
    folder = CACHE / f"triton-{version}"
    if not (folder / "triton").exists():
        print(f"installing Triton {version} into {folder}", file=sys.stderr, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    return folder


def compile_case(version: str, target: str, case: str, of: str) -> dict[str, Any]:
    """The row of a case, compiled in a process of its own: numbers of kernels, the most that one takes, and what failed."""
    paths = [str(install(version)), str(ROOT / "src")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(CACHE / f"built-{version}"),
    }  # fmt: skip
    script = str(Path(__file__).with_name("compile_kernels.py"))
    done = subprocess.run([sys.executable, script, target, case], env=environment, capture_output=True, text=True)
    (found,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] or [
        {"error": done.stderr[-500:] or f"exit code {done.returncode}"}
    ]
    kernels = found.get("kernels", {})
    failed = [found["error"]] if "error" in found else []
    failed += [f"{name}: {problem}" for name, taken in kernels.items() for problem in too_much(taken, target)]
    most = {key: max((taken[key] for taken in kernels.values()), default=0) for key in MOST}
    return {
        "triton": version, "target": target, "case": case, "of": of, "date": time.strftime("%Y-%m-%d"),
        "kernels": len(kernels), **most, "failed": failed,
    }  # fmt: skip


def read(results: Path) -> dict[Key, dict[str, Any]]:
    """Rows by Triton, target and case; of several the last one. A line that a crash cut short is none."""
    rows = {}
    for line in results.read_text().splitlines() if results.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["triton"], row["target"], row["case"]] = row
    return rows


def fill(rows: dict[Key, dict[str, Any]], wanted: list[Key], results: Path, jobs: int) -> None:
    """Compile the cases that have no row of today's kernels without a failure; each adds a row to the file at once."""
    now = {target: source(target) for target in {target for _, target, _ in wanted}}
    rest = [key for key in wanted if key not in rows or rows[key]["of"] != now[key[1]] or rows[key]["failed"]]
    for version in {version for version, _, _ in rest}:
        install(version)
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(compile_case, *key, now[key[1]]): key for key in rest}
        try:
            for done, future in enumerate(as_completed(running), 1):
                row = rows[running[future]] = future.result()
                with results.open("a") as file:
                    file.write("\n" + json.dumps(row) + "\n")  # not behind a line that was cut short
                what = "FAILED" if row["failed"] else f"{row['kernels']} kernels"
                of = f"{done} of {len(rest)}, {time.monotonic() - started:.0f} s"
                print(f"{of}: {row['triton']} {row['target']} {row['case']}: {what}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def cell(rows: list[dict[str, Any]], cases: list[str]) -> str:
    """Of one Triton and GPU: the number of kernels and the most that one takes, or what is wrong."""
    if any(row["failed"] for row in rows):
        return "**fails**"
    if not rows:
        return "not run"
    most = {key: max(row[key] for row in rows) for key in MOST}
    size = f"{sum(row['kernels'] for row in rows)} kernels, {most['shared'] / 1024:.0f} KiB, {most['spilled']} B"
    return size if len(rows) == len(cases) else f"{size} ({len(rows)} of {len(cases)} cases)"


def too_much(taken: dict[str, int], target: str) -> Iterator[str]:
    """What a kernel needs and the chip does not have."""
    if taken["shared"] > TARGETS[target] * 1024:
        yield f"takes {taken['shared'] / 1024:.1f} KiB of shared memory, {target} has {TARGETS[target]}"
    if target.isdecimal() and taken["registers"] > REGISTERS:
        yield f"takes {taken['registers']} registers of {REGISTERS}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", choices=TRITONS, action="append", help="only this version; can be repeated")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this GPU; can be repeated")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="cases that are compiled side by side (all CPUs)"
    )
    parser.add_argument(
        "--results", type=Path, default=CACHE / "results.jsonl", help="where rows are kept and looked for"
    )
    parser.add_argument(
        "--table", action="store_true", help="compile nothing: the rows there are, whatever kernels they are of"
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {arguments.jobs}")
    versions, targets = arguments.triton or TRITONS, arguments.target or list(TARGETS)
    rows = read(arguments.results)
    if not arguments.table:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        wanted = [(version, target, case) for version in versions for target in targets for case in cases_for(target)]
        fill(rows, wanted, arguments.results, arguments.jobs)
    print("| Triton | " + " | ".join(targets) + " |\n|---" + "|---" * len(targets) + "|", flush=True)
    bad = False
    for version in versions:
        of_version = {
            t: [row for (v, u, c), row in rows.items() if v == version and u == t and c in cases_for(t)]
            for t in targets
        }
        print(f"| {version} | " + " | ".join(cell(of_version[t], cases_for(t)) for t in targets) + " |")
        for row in (row for found in of_version.values() for row in found):
            for problem in row["failed"]:
                print(f"Triton {version}, {row['target']}, {row['case']}: {problem}", file=sys.stderr)
                bad = True
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
