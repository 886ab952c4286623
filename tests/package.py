"""Builds wheel and sdist and looks at both as an index would: ``make package``; ``--release TAG`` before they are published.

Needs ``build`` and ``twine`` (extra ``dev``). What was built stays in ``dist/``.
"""

from __future__ import annotations

import argparse
import email
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("softpick/py.typed", "softpick/analysis/report.html", "softpick/__main__.py")
UNWANTED = re.compile(r"(^|/)(\.ci|\.github|runs|build|__pycache__|\.matrix|\.environments)(/|$)")
RELATIVE = re.compile(r"\]\((?!https?://|#)[^)]*\)")


def version() -> str:
    """The one place that has it."""
    text = (ROOT / "src/softpick/__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)  # type: ignore[union-attr]


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist, both checked by twine."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    wheel, sdist = next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], check=True)
    return wheel, sdist


def problems(wheel: Path, sdist: Path) -> Iterator[str]:
    """What is wrong with them, in sentences."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(
            archive.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
        )
    with tarfile.open(sdist) as archive:
        files = [name.partition("/")[2] for name in archive.getnames()]
    yield from (f"{wheel.name}: {name} is missing" for name in NEEDED if name not in names)
    yield from (f"{wheel.name}: {name} is not of the package" for name in names if not name.startswith("softpick"))
    yield from (f"{sdist.name}: {name} has no place there" for name in files if UNWANTED.search(name))
    yield from (f"{sdist.name}: src/{name} is missing" for name in NEEDED if f"src/{name}" not in files)
    if metadata["Version"] != version():
        yield f"{wheel.name}: expected version {version()}, got {metadata['Version']}"
    if metadata["Description-Content-Type"] != "text/markdown":
        yield f"{wheel.name}: expected a description in Markdown, got {metadata['Description-Content-Type']}"
    text = metadata.get_payload()
    yield from (f"{wheel.name}: the description has a relative link {link}" for link in RELATIVE.findall(str(text)))
    if "](https://" not in str(text):
        yield f"{wheel.name}: the description has no links"


def unreleased(tag: str) -> Iterator[str]:
    """Why this state cannot be published as ``tag``."""
    if tag != f"v{version()}":
        yield f"tag: expected v{version()} (softpick.__version__), got {tag}"
    if ".example/" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"):
        yield "pyproject.toml: softpick.example stands for the repository's address; write the real one"
    if f"## [{version()}]" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        yield f"CHANGELOG.md: has no section [{version()}]"
    if f"version: {version()}" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8"):
        yield f"CITATION.cff: its version is not {version()}"
    if "not on PyPI yet" in (ROOT / "docs/install.md").read_text(encoding="utf-8"):
        yield "docs/install.md and README.md: say how to install from PyPI"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", metavar="TAG", help="also refuse what must not be published, such as v0.1.0")
    tag = parser.parse_args().release
    with tempfile.TemporaryDirectory() as folder:
        wheel, sdist = build(Path(folder))
        found = [*problems(wheel, sdist), *(unreleased(tag) if tag else ())]
        if not found:
            (ROOT / "dist").mkdir(exist_ok=True)
            for file in (wheel, sdist):
                (ROOT / "dist" / file.name).write_bytes(file.read_bytes())
    print("\n".join(found) or f"dist: {wheel.name}, {sdist.name}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
