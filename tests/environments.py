"""Python environments of their own, for checks with other versions than CI's; finished ones are used again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".environments"
TORCH = "torch==2.13.0"
# the interpreter of Triton 3.6 makes scalars in a way that numpy 2.4 refuses
TESTS = ("pytest>=9", "pytest-timeout>=2.3", "hypothesis>=6.150", "mpmath>=1.3", "numpy<2.4")


class InstallError(RuntimeError):
    """pip refused; the message is its last line."""


def interpreter(version: str) -> str | None:
    """A Python of this version ("3.12"), of the path or of pyenv, or None where there is none."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for found in (shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python{version}")):
        # pyenv puts a script of every version into the path, which only works where that version is chosen
        if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return str(found)
    return None


def environment(
    name: str, steps: Sequence[Sequence[str]], python: str = sys.executable, without: Sequence[str] = ()
) -> Path:
    """A Python with these requirements, each step installed by one call of pip.

    Args:
        name: of its folder below ``.environments``. It is made anew if its steps have changed or were not finished.
        steps: what pip is given; the first has torch, pinned, so that no later range resolves to another build.
        python: the interpreter that it is made from.
        without: packages that are removed at the end, because builds that fit this torch are on no index.

    Raises:
        InstallError: a step failed; the folder is left for another try, which begins anew.
    """
    folder = HOME / name
    finished, wanted = folder / "finished.json", json.dumps([python, [list(step) for step in steps], list(without)])
    own = folder / "bin" / "python"
    if finished.exists() and finished.read_text() == wanted:
        return own
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{name}: installing", file=sys.stderr, flush=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    for step in steps:
        pip = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *step]
        # a release that a machine's own configuration holds back is asked for by its number
        done = subprocess.run(pip, env={**os.environ, "PIP_CONSTRAINT": os.devnull}, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise InstallError(f"{name}: pip install {' '.join(step)}: {re.sub(r'https?://[^ ]+', '...', lines[-1])}")
    if without:
        subprocess.run(
            [str(own), "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True, capture_output=True
        )
    finished.write_text(wanted)
    return own


def keep(file: Path, result: object) -> None:
    """Write a result as JSON, which appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(file)


def remove(name: str) -> None:
    """Delete an environment."""
    shutil.rmtree(HOME / name, ignore_errors=True)


def megabytes(folder: Path) -> float:
    """What a folder takes on disk, in MB (10**6 bytes)."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if not path.is_symlink()) / 1e6


def installed(python: Path, *names: str) -> dict[str, str]:
    """Versions of these packages there; a package that is not there is left out."""
    code = (
        "import importlib.metadata as m, json, sys; have = {d.name.lower(): d.version for d in m.distributions()}; "
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    done = subprocess.run([str(python), "-c", code, *names], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))
