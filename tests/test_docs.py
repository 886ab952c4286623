"""The pages: Python blocks run as they stand, commands exist with the options that are used, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The blocks of a page in a language, without those that a comment before them says not to run."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for skipped, name, text in found if name == language and not skipped]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path):
    """One after the other, in one process, as a reader who types them would."""
    pytest.importorskip("transformers")
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def commands():
    for page, name in zip(PAGES, IDS, strict=True):
        for text in [*blocks(page, "bash"), *blocks(page, "sh")]:
            for line in text.replace("\\\n", " ").splitlines():
                found = re.search(r"(?:^|-m |&& )softpick (\w+.*)", line.split("#")[0].strip())
                if found:
                    yield pytest.param(found.group(1), id=f"{name}: {found.group(1)[:60]}")


@pytest.fixture(scope="module")
def parsers():
    pytest.importorskip("typer")
    import typer

    from softpick.cli import build_app

    return typer.main.get_command(build_app()).commands


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command, parsers):
    """The command takes these words: its options, their values by type, and its arguments. It is not run."""
    name, *words = shlex.split(command.split("|")[0].split(" > ")[0].removesuffix("&"))
    assert name in parsers, f"softpick {name}"
    if "--help" not in words:
        parsers[name].make_context(name, [word for word in words if word != "..."])


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["first_model.py", "pretrain_and_compare.py"])
def test_examples_run(name, tmp_path):
    pytest.importorskip("accelerate")
    short = [
        "steps=40",
        "warmup_steps=5",
        "save_every=20",
        "evaluate_every=20",
        "probe_every=20",
        "validation_sequences=64",
    ]
    runs = ["--output", str(tmp_path / "runs")]
    extra = {"first_model.py": ["--steps", "3"], "pretrain_and_compare.py": [*short, *runs]}[name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ROOT / "examples" / name, *extra]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
