"""What softpick replaces in other libraries: one table, written for versions whose source is known."""

import ast
import contextlib
import importlib
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import softpick
from softpick.integrations import patches
from softpick.integrations.patches import PATCHES, replaced

ROOT = Path(softpick.__file__).parent


@pytest.mark.parametrize("target", PATCHES)
def test_the_replaced_source_is_the_one_that_was_read(target):
    """Fails where the pinned version has other code: read it, mend the replacement, then the version and the digest."""
    patch = PATCHES[target]
    pytest.importorskip(patch.library)
    if version(patch.library) != patch.version:
        pytest.skip(
            f"{patch.library} {version(patch.library)} is here; the replacement was read against {patch.version}"
        )
    if patch.library == "transformers":
        importlib.import_module("softpick.integrations.transformers")
    assert patches.digest(patch) == patch.source, f"{patch.library} {patch.version}: {patch.reads or target} changed"


def test_the_pinned_versions_are_those_of_the_table():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT.parents[1] / "constraints.txt").read_text(), re.MULTILINE))
    for patch in PATCHES.values():
        assert pins[patch.library] == patch.version, f"{patch.target}: read it again for {pins[patch.library]}"


def foreign_assignments(path):
    """Assignments to attributes of what a file imports from other packages, and calls of setattr."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("softpick"):
            foreign |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            foreign |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    for node in ast.walk(tree):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        for target in [part for one in targets for part in (one.elts if isinstance(one, ast.Tuple) else [one])]:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in foreign:
                yield ast.unparse(target)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "setattr",
            "delattr",
            "patch.object",
            "patch.dict",
        ):
            yield ast.unparse(node)


# what is replaced in Python itself (streams, how warnings look), and a parameter of a model that is being split
ALLOWED = {
    "experiment/failures.py": {"warnings.showwarning", "setattr(sys, name, stream)"},
    "integrations/torchtitan_02.py": {
        "setattr(attention, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))"
    },
    "_moved.py": set(),
}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_file_replaces_anything(path):
    name = path.relative_to(ROOT).as_posix()
    if name != "integrations/patches.py":
        assert set(foreign_assignments(path)) <= ALLOWED.get(name, set())


def test_the_search_finds_replacements(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import a.b\nfrom c import D\na.b.f = D.g, h = 1, 2\nD.x += 1\nsetattr(D, 'y', 1)\nself.z = D\n")
    assert set(foreign_assignments(file)) == {"a.b.f", "D.g", "D.x", "setattr(D, 'y', 1)"}


def test_the_table_has_what_is_replaced_and_nothing_else():
    sources = [p.read_text(encoding="utf-8") for p in ROOT.rglob("*.py") if p.name != "patches.py"]
    used = {target for text in sources for target in re.findall(r'"([\w.]+:[\w.]+)"', text) if target.partition(":")[0] in
            {known.partition(":")[0] for known in PATCHES}}  # fmt: skip
    assert used | {"transformers.models.git.modeling_git:GIT_SELF_ATTENTION_CLASSES"} == set(PATCHES)


def test_what_is_replaced_for_a_while_comes_back(monkeypatch):
    class Library:
        value = 1

    monkeypatch.setattr(patches, "_holder", lambda target: (Library, target.split(":")[1]))
    monkeypatch.setattr(patches, "PATCHES", {"x:value": None, "x:other": None})
    with contextlib.suppress(RuntimeError), replaced({"x:value": 2, "x:other": 3}):
        assert (Library.value, Library.other) == (2, 3)
        raise RuntimeError
    assert Library.value == 1
    assert not hasattr(Library, "other")
