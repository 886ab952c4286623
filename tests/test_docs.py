"""The pages: commands exist with the options that are used, links lead somewhere, names are those of the code.

test_docs_commands.py runs the blocks of code.
"""

import ast
import builtins
import fnmatch
import importlib
import pkgutil
import re

import pytest
from pages import PAGES, ROOT, blocks, softpick_words

IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.fixture(scope="module")
def parsers():
    pytest.importorskip("typer")
    import typer

    from softpick.cli import build_app

    return typer.main.get_command(build_app()).commands


def commands():
    """Those in the shells' blocks, also the ones that no test runs."""
    for block in blocks("bash", "sh"):
        for command in block.commands:
            if softpick_words(command):
                yield pytest.param(softpick_words(command), id=f"{block.page}: {command[:60]}")


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words, parsers):
    """The command takes these words: its options, their values by type, and its arguments. test_docs_commands.py runs it."""
    name, *rest = words
    assert name in parsers, f"softpick {name}"
    if "--help" not in rest:
        parsers[name].make_context(name, rest)


def test_commands_in_sentences_and_synopses_exist(parsers):
    """The name and every option of what stands as ``softpick NAME --option`` in a sentence, a table or a block of text."""
    seen = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = re.findall(r"`softpick ([a-z][^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        for synopsis in re.findall(r"^```text\n(softpick [a-z].*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            found += synopsis.replace("\n ", " ").replace("softpick ", "", 1).splitlines()
        for command in found:
            name = re.match(r"\w+", command).group()
            assert name in parsers, f"{page.name}: softpick {command}"
            known = {
                option for parameter in parsers[name].params for option in (*parameter.opts, *parameter.secondary_opts)
            }
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", command))
            assert named <= known | {"--help"}, f"{page.name}: softpick {command}: {named - known}"
            seen += 1
    assert seen > 50


def test_the_reference_has_every_command(parsers):
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert {*re.findall(r"<!-- help: (\w+) -->", page)} == {"softpick", *parsers}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


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
