"""Text that lies on a machine without network, as JSONL: sources and documents of the installed packages.

    python benchmarks/collect_text.py OUT.jsonl [--characters 420000000] [FOLDER ...]

Files are taken in the order of a hash of their text (each text once), so that a cap leaves a mixture. For pretraining runs
that only have to be the same for two normalizers (docs/results.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".c", ".cpp", ".cu", ".js", ".html"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", type=Path, nargs="*", default=[Path(sysconfig.get_path("purelib")), Path("/usr")])
    parser.add_argument("--characters", type=float, default=420e6)
    options = parser.parse_args()
    found: dict[str, Path] = {}
    for folder in options.folders:
        for path in folder.rglob("*"):
            if path.suffix in SUFFIXES and path.is_file() and 200 < path.stat().st_size < 2_000_000:
                found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    total, count = 0, 0
    with options.output.open("w", encoding="utf-8") as file:
        for digest in sorted(found):
            text = found[digest].read_text(encoding="utf-8", errors="replace")
            if total + len(text) > options.characters:
                break
            file.write(json.dumps({"text": text}) + "\n")
            total, count = total + len(text), count + 1
    print(f"{count} files of {len(found)}, {total / 1e6:.0f} million characters")


if __name__ == "__main__":
    main()
