"""Compiles the kernels with every supported Triton for every supported GPU, none of which has to be there: ``make matrix``.

    python tests/matrix.py [--triton 3.9.0] [--target 120]

Each Triton is installed into a folder of its own below ``.matrix`` (200 MB each), where finished cells are kept, too; a cell is
compiled again when a kernel's source has changed. Prints a table in Markdown and exits with 1 if a cell fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".matrix"
TRITONS = ("3.9.0", "3.8.0", "3.7.1", "3.6.0")
# KiB of shared memory a program may have
TARGETS = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99, "gfx942": 64}
CASES = [
    "softpick,64,bfloat16,none",
    "softpick,128,bfloat16,none",
    "softpick,256,float16,none",
    "softmax,128,float32,none",
]
BY_HAND = ["softpick,64,bfloat16,hopper", "softpick,128,bfloat16,hopper"]


def source() -> str:
    """A hash of what is compiled."""
    files = [*sorted((ROOT / "src/softpick/ops/triton").rglob("*.py")), Path(__file__).with_name("compile_kernels.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def install(version: str) -> Path:
    folder = CACHE / f"triton-{version}"
    if not (folder / "triton").exists():
        print(f"installing Triton {version} into {folder}", file=sys.stderr, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    return folder


def cell(version: str, target: str) -> dict[str, object]:
    """Results of all cases: the most shared memory in KiB, and what failed."""
    kept = CACHE / "cells" / f"{version}-{target}-{source()}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    paths = [str(install(version)), str(ROOT / "src")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(CACHE / f"built-{version}"),
    }  # fmt: skip
    cases = CASES + (BY_HAND if target == "90" else [])
    script = str(Path(__file__).with_name("compile_kernels.py"))
    done = subprocess.run([sys.executable, script, target, *cases], env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [f"{one['case']}: {one['error']}" for one in found if "error" in one]
    if len(found) < len(cases):
        failed.append(done.stderr[-500:])
    taken = [(k["shared"] / 1024, one["case"], name) for one in found for name, k in one.get("kernels", {}).items()]
    failed += [
        f"{case}: {name} has {size:.0f} KiB of shared memory" for size, case, name in taken if size > TARGETS[target]
    ]
    result = {"kernels": len(taken), "shared": max(taken, default=(0,))[0], "failed": failed}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result))
    return result


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
            for problem in result["failed"]:  # type: ignore[attr-defined]
                print(f"Triton {version}, {target}: {problem}", file=sys.stderr, flush=True)
            bad += bool(result["failed"])
            row.append("**fails**" if result["failed"] else f"{result['kernels']} kernels, {result['shared']:.0f} KiB")
        print(f"| {version} | " + " | ".join(row) + " |", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
