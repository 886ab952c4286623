"""The pages: Python blocks run as they stand, commands exist with the options that are used, links lead somewhere."""

import ast
import builtins
import fnmatch
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from extras import MODEL

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


def test_the_reference_has_every_command(parsers):
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert {*re.findall(r"<!-- help: (\w+) -->", page)} == {"softpick", *parsers}


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


def test_the_example_of_quantization_runs(tmp_path):
    """On a tiny model with random weights: its own takes minutes of training."""
    pytest.importorskip("accelerate")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = [str(ROOT / "examples" / "quantizes_badly.py"), "model", "--samples", "8"]
    for command in (["-c", MODEL, "softpick"], script):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    for words in ("perplexity", "one scale per tensor", "one scale per token", "kurtosis", "layer 0: largest |x|"):
        assert words in done.stdout


# Names of files that are not in the repository: commands write them, or they are the reader's.
ELSEWHERE = {"report.md", "table.md", "train.py"}


def prose():
    """File, number and text of each line of the pages, of comments and of docstrings."""
    for page in [*PAGES, ROOT / "Makefile"]:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            yield page, number, line
    for folder in ("src", "tests", "benchmarks", "examples", "hub"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
            strings = [node for node in strings if isinstance(node, ast.Constant)]
            docstrings = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
            for number, line in enumerate(text.splitlines(), 1):
                if number in docstrings or "#" in line:
                    yield file, number, line if number in docstrings else line.split("#", 1)[1]


def test_named_files_and_targets_exist():
    """By their whole path or its end (``ops/cpu.py``), ``*`` for a part of a name; and targets of make."""
    found = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if not {".git", ".venv"} & {*path.parts}]
    known = {name[start + 1 :] for name in found for start in [-1, *(i for i, c in enumerate(name) if c == "/")]}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for file, number, line in prose():
        names = re.findall(r"(?<![\w/.:-])(?:\.{1,2}/)*([\w./*-]*[\w*]\.(?:py|md|yml|toml))\b", line)
        missing = [name for name in names if "*" not in name and name not in known | ELSEWHERE]
        missing += [name for name in names if "*" in name and not fnmatch.filter(known, name)]
        missing += [f"make {name}" for name in re.findall(r"(?:`|^)make ([a-z-]+)", line) if name not in targets]
        wrong += [f"{file.relative_to(ROOT)}:{number}: {name}" for name in missing]
    assert not wrong, "\n".join(wrong)


def test_named_modules_and_functions_exist():
    """A module, function or class that pages, comments or docstrings name by its whole path is there."""
    wrong = []
    for file, number, line in prose():
        for name in re.findall(r"(?<![\w/.@-])softpick(?:\.\w+)+", line):
            if name.endswith((".py", ".md")) or name.startswith("softpick.integrations.vllm"):
                continue  # a file; what needs vLLM
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {name}")
    assert not wrong, "\n".join(wrong)


def named_by_roles():
    """File, module and name of each ``:func:`` and its like in the package."""
    for file in sorted((ROOT / "src").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        if module.startswith("softpick.integrations.vllm"):
            continue  # needs vLLM
        for name in re.findall(r":(?:func|class|data|meth|attr|mod|exc):`([\w.]+)`", file.read_text(encoding="utf-8")):
            yield file, module, name


def test_roles_lead_somewhere():
    """By the whole path, or in the module, one of its classes, or among Python's own names."""
    pytest.importorskip("triton")
    pytest.importorskip("torchtitan")
    wrong = []
    for file, module, name in named_by_roles():
        if name.startswith("."):
            name = module + name if file.name == "__init__.py" else module.rpartition(".")[0] + name
        if name.startswith("softpick."):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                wrong.append(f"{file.name}: {name}")
            continue
        home = importlib.import_module(module)
        owners = [home, builtins, *(x for x in vars(home).values() if isinstance(x, type))]
        first, _, rest = name.partition(".")
        found = [x for x in owners if hasattr(x, first) or first in getattr(x, "__annotations__", {})]
        there = found or f"self.{first}" in file.read_text(encoding="utf-8")
        if not there or (rest and not any(hasattr(getattr(x, first, None), rest) for x in found)):
            wrong.append(f"{file.name}: {name}")
    assert not wrong, "\n".join(wrong)
