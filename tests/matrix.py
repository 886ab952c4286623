"""Compiles the kernels with every supported Triton for every supported GPU, none of which has to be there: ``make matrix``.

    python tests/matrix.py [--triton 3.9.0] [--target 120]

Each Triton is installed into a folder of its own below ``.matrix`` (200 MB each), where finished cells are kept, too; a cell is
compiled again when the source of one of its kernels has changed, and when it failed. A cell of the table, which is printed in
Markdown, has the number of kernels, the most shared memory that one takes (KiB), and the most that a thread of one spills
(bytes). It fails if a kernel does not compile, or needs more shared memory or more registers than the chip has; then the exit
code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import ROOT, keep
from kernel_resources import REGISTERS

CACHE = ROOT / ".matrix"
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
    limits = json.dumps([cases_for(target), TARGETS[target], REGISTERS]).encode()
    return hashlib.sha256(limits + b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def install(version: str) -> Path:
    folder = CACHE / f"triton-{version}"
    if not (folder / "triton").exists():
        print(f"installing Triton {version} into {folder}", file=sys.stderr, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    return folder


def cell(version: str, target: str) -> dict[str, Any]:
    """Results of all cases: the most shared memory (KiB), the most that was spilled (bytes), and what failed."""
    kept, of = CACHE / "cells" / f"{version}-{target}.json", source(target)
    if kept.exists() and (found := json.loads(kept.read_text()))["of"] == of and not found["failed"]:
        return dict(found)
    paths = [str(install(version)), str(ROOT / "src")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(CACHE / f"built-{version}"),
    }  # fmt: skip
    cases = cases_for(target)
    script = str(Path(__file__).with_name("compile_kernels.py"))
    done = subprocess.run([sys.executable, script, target, *cases], env=environment, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [f"{one['case']}: {one['error']}" for one in results if "error" in one]
    if len(results) < len(cases):
        failed.append(done.stderr[-500:])
    taken = [(one["case"], name, k) for one in results for name, k in one.get("kernels", {}).items()]
    failed += [f"{case}: {name}: {problem}" for case, name, k in taken for problem in too_much(k, target)]
    most = {key: max((k[key] for _, _, k in taken), default=0) for key in ("shared", "registers", "spilled")}
    result = {"of": of, "date": time.strftime("%Y-%m-%d"), "kernels": len(taken), **most, "failed": failed}
    keep(kept, result)
    return result


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
    arguments = parser.parse_args()
    targets, bad = arguments.target or list(TARGETS), 0
    print("| Triton | " + " | ".join(targets) + " |\n|---" * 1 + "|---" * len(targets) + "|", flush=True)
    for version in arguments.triton or TRITONS:
        row = []
        for target in targets:
            result = cell(version, target)
            for problem in result["failed"]:
                print(f"Triton {version}, {target}: {problem}", file=sys.stderr, flush=True)
            bad += bool(result["failed"])
            size = f"{result['kernels']} kernels, {result['shared'] / 1024:.0f} KiB, {result['spilled']} B"
            row.append("**fails**" if result["failed"] else size)
        print(f"| {version} | " + " | ".join(row) + " |", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
