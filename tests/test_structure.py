"""The house: imports point one way, and importing softpick needs nothing but torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import softpick

ROOT = Path(softpick.__file__).parent

# A module may import from itself and from these; the first matching prefix counts. No arrow points upwards in this list.
ALLOWED = {
    "softpick._moved": set(),
    "softpick.normalizers": set(),
    "softpick.ops": {"softpick.normalizers"},
    "softpick.vector": {"softpick.ops"},
    "softpick.functional": {"softpick.normalizers", "softpick.ops", "softpick.vector"},
    "softpick.explain": {"softpick.normalizers", "softpick.ops"},
    "softpick.distributed": {"softpick.normalizers", "softpick.ops"},
    "softpick.nn": {"softpick.normalizers", "softpick.functional", "softpick.ops"},
    "softpick.integrations": {
        "softpick.normalizers",
        "softpick.ops",
        "softpick.functional",
        "softpick.nn",
        "softpick.distributed",
    },
    "softpick.experiment": {"softpick.integrations"},
    "softpick.analysis": {
        "softpick.normalizers",
        "softpick.integrations",
        "softpick.experiment",
    },
    "softpick.training": {
        "softpick.normalizers",
        "softpick.integrations",
        "softpick.experiment",
        "softpick.analysis",
    },
    "softpick.conversion": {
        "softpick.normalizers",
        "softpick.integrations",
        "softpick.experiment",
        "softpick.analysis",
        "softpick.training",
    },
    "softpick.evaluation": {
        "softpick.integrations",
        "softpick.experiment",
        "softpick.analysis",
    },
    "softpick.quantization": {"softpick.integrations", "softpick.experiment", "softpick.evaluation"},
    "softpick.serving": {"softpick.experiment"},
    "softpick.doctor": {
        "softpick.functional",
        "softpick.ops",
        "softpick.explain",
        "softpick.experiment",
    },
    "softpick.cli": {
        "softpick.doctor",
        "softpick.normalizers",
        "softpick.integrations",
        "softpick.experiment",
        "softpick.analysis",
        "softpick.training",
        "softpick.conversion",
        "softpick.evaluation",
        "softpick.quantization",
        "softpick.serving",
    },
    "softpick.__main__": {
        "softpick.cli",
    },
}


# packages that load their modules when they are asked for
BY_NAME = {"softpick", "softpick.analysis", "softpick._moved"}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = "softpick." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def home_of(name):
    return next((home for home in ALLOWED if name == home or name.startswith(home + ".")), None)


def imported(name, path):
    """What of softpick a file imports. The package itself is refused: its attributes would hide what is imported."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found = [
                f"{node.module}.{alias.name}" if node.module == "softpick" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
            assert "softpick" not in found, f"{name}: import the module that is needed, not softpick"
        elif isinstance(node, ast.Call) and name not in BY_NAME and "import_module" in ast.unparse(node.func):
            assert "softpick" not in ast.unparse(node), f"{name}: {ast.unparse(node)}: write an import statement"
            continue
        else:
            continue
        yield from (x for x in found if x.startswith("softpick.") and x != "softpick.__version__")


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_one_way(name, path):
    if name == "softpick":
        return
    home = home_of(name)
    assert home, f"{name} has no place in the house: add it to ALLOWED"
    for target in imported(name, path):
        fine = target == home or target.startswith((home + ".", *(a + "." for a in ALLOWED[home])))
        assert fine or target in ALLOWED[home], f"{name} imports {target}"


def test_the_list_points_down_and_every_arrow_is_there():
    """Each place may import what stands above it, and does."""
    homes = list(ALLOWED)
    for place, (home, below) in enumerate(ALLOWED.items()):
        assert below <= set(homes[:place]), f"{home}: {below - set(homes[:place])} does not stand above it"
        used = {target for name, path in modules() if home_of(name) == home for target in imported(name, path)}
        unused = {to for to in below if not any(target == to or target.startswith(to + ".") for target in used)}
        assert not unused, f"{home} imports nothing of {unused}: take them out of ALLOWED"


LINES, FUNCTION = 600, 80

# files and functions that are longer, and why; the list only shrinks
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "src/softpick/ops/cpu.py:forward": "the kernel of the CPU backend",
    "src/softpick/ops/cpu.py:backward": "the kernel of the CPU backend",
    "tests/test_metrics.py:brute": "every metric a second time, in plain loops",
}
FILES = [*ROOT.rglob("*.py"), *Path(__file__).parent.glob("*.py"), *(ROOT.parents[1] / "examples").glob("*.py")]


def is_kernel(node):
    """Whether a function is compiled for GPUs: a kernel is one function, however long."""
    return any(ast.unparse(decorator).split("(")[0] in ("triton.jit", "gluon.jit") for decorator in node.decorator_list)


def exempt(name, listed):
    return any(name == entry or name.startswith((entry + "/", entry + ":")) for entry in listed)


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: path.relative_to(ROOT.parents[1]).as_posix())
def test_files_and_functions_are_short(path):
    """A function's docstring does not count."""
    name = path.relative_to(ROOT.parents[1]).as_posix()
    text = path.read_text(encoding="utf-8")
    length = len(text.splitlines())
    assert length <= LINES or exempt(name, LONG_FILES), f"{name} has {length} lines; expected at most {LINES}"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_kernel(node):
            continue
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        short = lines <= FUNCTION or exempt(f"{name}:{node.name}", LONG_FUNCTIONS) or exempt(name, LONG_FUNCTIONS)
        assert short, f"{name}:{node.lineno}: {node.name} has {lines} lines; expected at most {FUNCTION}"


def test_import_needs_only_torch():
    code = (
        "import sys, softpick; "
        "[getattr(softpick, name) for name in softpick.__all__]; "
        "import softpick.nn; "
        "heavy = {'transformers', 'tokenizers', 'typer', 'rich', 'pyarrow', 'accelerate', 'matplotlib', 'triton'}; "
        "heavy &= set(sys.modules); "
        "heavy |= {name for name in sys.modules if name.startswith('softpick.ops.triton')}; "
        "assert 'torch' in sys.modules; "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_typed_and_versioned():
    from importlib.metadata import version

    assert (ROOT / "py.typed").exists()
    assert softpick.__version__ == version("softpick")
    assert set(softpick.__all__) <= set(dir(softpick))


def test_every_normalizer_has_words():
    for norm in softpick.NORMALIZERS.values():
        assert all((norm.title, norm.formula, norm.citation, norm.note))


def test_readme_lists_every_normalizer():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for norm in softpick.NORMALIZERS.values():
        assert f"| `{norm.name}` |" in readme
        assert norm.citation in readme
