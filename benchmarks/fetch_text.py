"""Downloads the packages of ``sinks_text.txt``, whose files are the text of the recipe ``sinks_h200``, and unpacks them.

    python benchmarks/fetch_text.py FOLDER

Wheels come from pip's index, Debian packages from apt's (Debian 12, ``apt-get update`` first), each in the version of the
list and compared with its SHA-256: whoever runs this gets the same files. They are unpacked into ``FOLDER/sources/NAME``
and ``FOLDER/prose/NAME``; what is there already is not fetched again. ``collect_text.py`` makes the text of them.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

LIST = Path(__file__).with_name("sinks_text.txt")
WHEELS = [  # files of the same wheel whatever machine this is
    *("--no-deps", "--only-binary=:all:", "--python-version", "3.11"),
    *(f"--platform=manylinux{version}_x86_64" for version in ("_2_28", "_2_17", "2014")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    lines = [line.split() for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    for done, (kind, package, digest) in enumerate(lines, 1):
        name = package.split("=")[0]
        target = folder / ("sources" if kind == "wheel" else "prose") / name
        if target.exists():
            continue
        print(f"{done} of {len(lines)}: {package}", flush=True)
        loading = folder / "loading"
        shutil.rmtree(loading, ignore_errors=True)
        loading.mkdir(parents=True)
        fetch = [sys.executable, "-m", "pip", "download", "-q", *WHEELS, package] if kind == "wheel" else []
        subprocess.run(fetch or ["apt-get", "download", "-qq", package], cwd=loading, check=True)
        (file,) = loading.iterdir()
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != digest:
            sys.exit(f"{file.name}: expected the SHA-256 {digest}, got {found}: another build, so another text")
        if kind == "wheel":
            zipfile.ZipFile(file).extractall(loading / "files")
        else:
            subprocess.run(["dpkg-deb", "-x", str(file), str(loading / "files")], check=True)
        target.parent.mkdir(exist_ok=True)
        (loading / "files").rename(target)
        shutil.rmtree(loading)


if __name__ == "__main__":
    main()
