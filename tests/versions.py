"""Runs the tests that concern them with other versions of Python, torch, transformers and torchtitan: ``make versions``.

    python tests/versions.py [NAME ...] [--keep]

Each row has an environment of its own below ``.environments``, which is deleted when its tests have passed (torch for CUDA is
5 GB). Results are kept there, too; a row runs again when the package or its tests have changed. Prints a table in Markdown and
exits with 1 if a row fails. A row whose interpreter or packages are not to be had says so, and does not fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from environments import HOME, ROOT, TESTS, TORCH, InstallError, environment, installed, interpreter, keep, remove

CORE = (
    "test_attention.py", "test_arguments.py", "test_decode.py", "test_edges.py", "test_function.py", "test_numerics.py",
    "test_functional_transforms.py", "test_compile_functions.py", "test_nn.py", "test_triton_edges.py",
)  # fmt: skip
ADAPTER = (
    "test_transformers.py", "test_transformers_whole.py", "test_transformers_models.py", "test_transformers_packed.py",
    "test_adapter_edges.py", "test_adapter_packing.py", "test_adapter_registration.py", "test_adapter_running.py",
    "test_adapter_layers.py", "test_adapter_masks.py", "test_models.py", "test_checkpoints.py", "test_fla.py",
)  # fmt: skip
SHOWN = ("torch", "triton", "transformers", "accelerate", "torchtitan")


@dataclasses.dataclass(frozen=True)
class Row:
    """Versions, and the test files that run with them."""

    tests: tuple[str, ...]
    torch: str = TORCH
    more: tuple[str, ...] = ("transformers==5.23.0", "accelerate>=1.15")
    python: str = "3.11"


ROWS = {
    "transformers-5.17": Row(ADAPTER, more=("transformers==5.17.*", "accelerate>=1.15")),
    "transformers-5.24": Row(ADAPTER, more=("transformers==5.24.*", "accelerate>=1.15")),
    "torch-2.11": Row((*CORE, "test_adapter_edges.py"), torch="torch==2.11.*"),
    "torch-2.12": Row((*CORE, "test_adapter_edges.py"), torch="torch==2.12.*", python="3.12"),
    "torch-2.14": Row((*CORE, "test_adapter_edges.py"), torch="torch==2.14.*"),
    "torch-2.15": Row((*CORE, "test_adapter_edges.py"), torch="torch==2.15.*", python="3.13"),
    "python-3.14": Row((*CORE, "test_adapter_edges.py"), torch="torch==2.15.*", python="3.14"),
    "torchtitan-0.2.2": Row(("test_torchtitan.py",), more=("transformers==5.23.0", "torchtitan==0.2.2")),
    "torchtitan-0.3": Row(
        ("test_torchtitan.py", "test_torchtitan_03.py"),
        torch="torch==2.14.*",
        more=("transformers==5.23.0", "torchtitan==0.3.*"),
    ),
}


def sources(row: Row) -> str:
    """A hash of the package and of a row's tests."""
    files = [*sorted((ROOT / "src").rglob("*.py")), *(ROOT / "tests" / name for name in row.tests)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def run(name: str, row: Row) -> dict[str, object]:
    """Versions, and how many tests passed and failed; kept results are read."""
    kept = HOME / "results" / f"{name}.json"
    wanted = [dataclasses.asdict(row) | {"tests": list(row.tests), "more": list(row.more)}, sources(row)]
    if kept.exists() and (found := json.loads(kept.read_text()))["of"] == wanted:
        return dict(found["result"])
    python = interpreter(row.python)
    if python is None:
        return {"missing": f"no Python {row.python} on this machine"}
    try:
        own = environment(name, [[row.torch], [*row.more], [*TESTS]], python)
    except InstallError as error:
        return {"missing": str(error)}
    result: dict[str, object] = {"python": row.python, **installed(own, *SHOWN), "date": time.strftime("%Y-%m-%d")}
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    environ |= {"TORCHINDUCTOR_CACHE_DIR": str(HOME / name / "inductor"), "CUDA_VISIBLE_DEVICES": ""}
    command = [
        str(own),
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-rfE",
        "--no-header",
        "--tb=short",
        "--timeout=3600",
    ]
    files = [str(Path("tests", file)) for file in row.tests]
    log = HOME / "results" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        subprocess.run([*command, *files], cwd=ROOT, env=environ, stdout=out, stderr=subprocess.STDOUT)
    text = log.read_text()
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped|xfailed)", text[-400:])}
    result |= {"passed": 0} | counts | {"failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)}
    if counts.get("passed") and not result["failures"]:
        keep(kept, {"of": wanted, "result": result})
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--keep", action="store_true", help="do not delete an environment whose tests passed")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ROWS):
        parser.error(f"expected names of {', '.join(ROWS)}; got {', '.join(sorted(unknown))}")
    wrong = 0
    print("| row | Python | " + " | ".join(SHOWN) + " | tests | date |")
    print("|---|---" + "|---" * (len(SHOWN) + 2) + "|", flush=True)
    for name in arguments.names or ROWS:
        result = run(name, ROWS[name])
        if "missing" in result:
            print(
                f"| {name} | " + " | ".join([""] * (len(SHOWN) + 1)) + f" | not run: {result['missing']} | |",
                flush=True,
            )
            continue
        bad = bool(result["failures"]) or not result["passed"]
        wrong += bad
        outcome = f"{result['passed']} passed" + f", {len(result['failures'])} **failed**" * bad  # type: ignore[arg-type]
        versions = " | ".join(str(result.get(shown, "")) for shown in SHOWN)
        print(f"| {name} | {result['python']} | {versions} | {outcome} | {result['date']} |", flush=True)
        for failure in result["failures"]:  # type: ignore[attr-defined]
            print(f"{name}: {failure}", file=sys.stderr)
        if not bad and not arguments.keep:
            remove(name)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
