"""Tests for GPUs and benchmarks, which CI does not run: what they name in softpick exists and takes their arguments."""

import ast
import importlib
import inspect
import types
from pathlib import Path

import pytest
import torch

import softpick
import softpick.ops.operators_decode
import softpick.ops.operators_rows

HOME = Path(__file__).resolve().parent
UNKNOWN = object()


def skipped_by_ci():
    """Files with tests marked gpu, what they share, and the benchmarks."""
    marked = [path for path in HOME.glob("*.py") if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    return sorted(
        {*marked, *HOME.glob("triton_gpu*.py"), *(HOME.parent / "benchmarks").glob("*.py")} - {Path(__file__)}
    )


def length(node, values):
    """How many arguments ``node`` stands for, as a tuple; None where that is not written in the file."""
    if isinstance(node, ast.Name):
        node = values.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Constant):
        items = length(node.left, values)
        return None if items is None else items * node.right.value
    if not isinstance(node, ast.Tuple | ast.List):
        return None
    counts = [length(item.value, values) if isinstance(item, ast.Starred) else 1 for item in node.elts]
    return None if None in counts else sum(counts)


class Reader(ast.NodeVisitor):
    """Follow the names that a file imports from softpick, function by function, and collect what does not fit."""

    def __init__(self):
        self.scopes, self.values, self.refused, self.wrong, self.seen = [{}], {}, 0, [], 0

    def problem(self, node, text):
        text = f"line {node.lineno}: {text}"
        if text not in self.wrong:
            self.wrong.append(text)

    def have(self, node, owner, name):
        """An attribute of a module of softpick, which is a problem where there is none."""
        self.seen += 1
        try:
            return getattr(owner, name)
        except AttributeError:
            try:
                return importlib.import_module(f"{owner.__name__}.{name}")
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("softpick"):
                    self.problem(node, f"{owner.__name__} has no {name}")
                return UNKNOWN  # else a module that needs a library which is not installed

    def value(self, node):
        """What an expression is, where that follows from imports."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), UNKNOWN)
        if not isinstance(node, ast.Attribute):
            return UNKNOWN
        if ast.unparse(node).startswith("torch.ops.softpick.") and node.attr != "default":
            return self.operator(node)
        owner = self.value(node.value)
        if isinstance(owner, types.ModuleType) and owner.__name__.startswith("softpick"):
            return self.have(node, owner, node.attr)
        return owner if node.attr == "default" else UNKNOWN

    def operator(self, node):
        self.seen += 1
        if hasattr(torch.ops.softpick, node.attr):
            return getattr(torch.ops.softpick, node.attr).default
        self.problem(node, f"there is no operator {node.attr}")
        return UNKNOWN

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.split(".")[0] == "softpick":
                module = importlib.import_module(alias.name)
                self.scopes[-1][alias.asname or "softpick"] = module if alias.asname else softpick

    def visit_ImportFrom(self, node):
        if (node.module or "").split(".")[0] == "softpick":
            module = importlib.import_module(node.module)
            for alias in node.names:
                self.scopes[-1][alias.asname or alias.name] = self.have(node, module, alias.name)

    def visit_FunctionDef(self, node):
        names = [x.arg for x in ast.walk(node.args) if isinstance(x, ast.arg)]
        names += [x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
        self.scopes.append(dict.fromkeys(names, UNKNOWN))
        outer, self.values = self.values, dict(self.values)
        self.generic_visit(node)
        self.values = outer
        self.scopes.pop()

    def visit_Assign(self, node):
        self.generic_visit(node)
        if isinstance(node.targets[0], ast.Name):
            self.values[node.targets[0].id] = node.value
            self.scopes[-1][node.targets[0].id] = self.value(node.value)

    def visit_With(self, node):
        refused = any("pytest.raises" in ast.unparse(item) for item in node.items)
        self.refused += refused
        self.generic_visit(node)
        self.refused -= refused

    def visit_Attribute(self, node):
        if self.value(node) is UNKNOWN:
            self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called.endswith("setattr") and len(node.args) >= 2:
            owner, name = self.value(node.args[0]), node.args[1]
            if isinstance(owner, types.ModuleType) and isinstance(name, ast.Constant):
                self.have(node, owner, name.value)
            return
        target, args, keywords = self.value(node.func), ast.Tuple(node.args), [word.arg for word in node.keywords]
        if called.endswith("opcheck"):
            target, args, keywords = self.value(node.args[0]), node.args[1], []
        count = length(args, self.values)
        if target is UNKNOWN or count is None or None in keywords or self.refused:
            return
        if isinstance(target, torch._ops.OpOverload):
            given = target._schema.arguments
            fewest = sum(not argument.has_default_value() for argument in given)
            if not fewest <= count + len(keywords) <= len(given):
                self.problem(node, f"{target} takes {fewest} to {len(given)} arguments, got {count + len(keywords)}")
        elif isinstance(target, types.FunctionType):
            try:
                inspect.signature(target).bind(*(None,) * count, **dict.fromkeys(keywords))
            except TypeError as error:
                self.problem(node, f"{target.__name__}: {error}")
        else:
            return
        self.seen += 1


@pytest.mark.parametrize("path", skipped_by_ci(), ids=lambda path: path.name)
def test_names_exist_and_take_these_arguments(path):
    reader = Reader()
    reader.visit(ast.parse(path.read_text(encoding="utf-8")))
    assert not reader.wrong, "\n".join(reader.wrong)
    assert reader.seen or "from softpick" not in path.read_text(encoding="utf-8")


def test_the_reader_sees_what_is_stale():
    """What stood in the tests for GPUs before 2026-11-29, unnoticed until a GPU ran them, and a call without an argument."""
    reader = Reader()
    reader.visit(
        ast.parse(
            "import torch\n"
            "from softpick import decode_attention\n"
            "def test(monkeypatch):\n"
            "    from softpick.ops.triton import launch, gone\n"
            "    monkeypatch.setattr(launch, '_FEWEST_CACHED', 0)\n"
            "    tail = (1e-6, 'auto')\n"
            "    op = torch.ops.softpick.rows_forward.default\n"
            "    torch.library.opcheck(op, (x, *tail))\n"
            "    torch.library.opcheck(op, (x, *tail, *(None,) * 2))\n"
            "    launch.no_such()\n"
            "    decode_attention(q, k)\n"
        )
    )
    assert [text.split(":")[0] for text in reader.wrong] == [f"line {n}" for n in (4, 5, 9, 10, 11)]
