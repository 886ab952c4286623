"""Small changes ("mutants") of the package, one at a time: do the tests notice them?  ``make mutants``.

For each file of ``PLANS`` every possible change is listed (comparisons, arithmetic, numbers, booleans, minimum for maximum,
swapped arguments, swapped branches, ``return None``, removed statements), a fixed sample is taken, and each change is made
in a temporary copy of the package against which the file's tests run until one fails. A change is known by what it
changes and in which function, not by its line, and the sample is ordered by a hash of that: moving code changes neither.

    python tests/mutants.py                         # all files
    python tests/mutants.py normalizers.py -n 20    # one file, 20 changes
    python tests/mutants.py normalizers.py --skip 20 -n 10    # a fresh sample: the 10 that come after those
    python tests/mutants.py --list functional.py    # only say which changes would be made
    python tests/mutants.py --key 'TEXT'            # only the changes of which the key contains TEXT, sampled or not

Results are kept in ``.mutants/results.jsonl``: what was noticed is not run again; what was not is, once a test or the file
has changed. ``--fresh`` runs everything. Changes that cannot change a result are listed with the reason in
``tests/mutants_equivalent.toml`` and are not sampled.

A change counts as noticed when a test fails, the package cannot be imported, or the tests take much longer than without
it. A child of this process, which has imported torch already, runs the tests: a second or two for most changes.
"""

import argparse
import ast
import compileall
import copy
import hashlib
import json
import os
import py_compile
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "softpick"
TESTS = ROOT / "tests"
KEPT = ROOT / ".mutants"
EQUIVALENT = TESTS / "mutants_equivalent.toml"

# Compiling a graph takes longer than everything else together: those tests come last.
_WHOLE = ["test_transformers.py", "test_transformers_whole.py"]
_QUICK = ["-m", "not slow and not long and not gpu and not browser", "-k", "not compile and not opcheck"]
_EDGES = [
    "test_edges.py",
    "test_numerics.py",
    "test_errors.py",
    "test_arguments.py",
    "test_packed.py",
    "test_decode.py",
]
_ATTENTION = [*_EDGES, "test_function.py", "test_attention.py", *_QUICK]
_RECORDS = ["test_records.py", "-k", "computes_what_it_says"]  # whatever switches a record of one's own has
_COMPILED = ["test_function.py", "test_attention.py", "-k", "compile or opcheck"]
# The kernels' interpreter is slow: a part of its tests, for what leads to the kernels.
_TO_TRITON = "triton|Triton|rows|Rows|decode|few_queries|_options|_dense|_on:|interpreted|_empty_outputs|block_"
_TRITON = [
    "test_triton.py",
    "test_triton_functions.py",
    "-k",
    "few or layout or half or transform or second or auto or cannot or refuse or beyond or map",
]

_OPERATORS = ["test_functional_transforms.py", "test_operator_layouts.py", "test_kernel_failures.py", *_QUICK]
_FAILURES = ["test_kernel_failures.py", "-k", "rows or memory"]
_ROWS = ["-k", "rows and not compile and not 20000"]
_GRAPHS = ["test_triton_functions.py", "-k", "compile or opcheck or refused"]

PLANS = {
    "normalizers.py": [(_ATTENTION, ""), (_RECORDS, "")],
    "ops/reference.py": [(_ATTENTION, ""), (_RECORDS, "")],
    "functional.py": [(_ATTENTION, ""), (_TRITON, _TO_TRITON)],
    "ops/arguments.py": [(_ATTENTION, "")],
    "ops/calls.py": [(_ATTENTION, ""), (_TRITON, _TO_TRITON)],
    "ops/backends.py": [(_ATTENTION, ""), (_TRITON, "")],
    "ops/cpu.py": [(_ATTENTION, ""), (_RECORDS, "")],
    "ops/cpu_functions.py": [(_ATTENTION, ""), (_RECORDS, "")],
    "ops/operators.py": [(_ATTENTION, ""), (_OPERATORS, ""), (_COMPILED, ""), (_TRITON, _TO_TRITON)],
    "ops/key_bounds.py": [(["test_key_bounds.py", *_QUICK], "")],
    "ops/skipping.py": [
        (["test_skipping.py", "-k", "enclosed or enclosures or cheapest or exact or later or nothing or finite"], ""),
        (["test_skipping.py", *_QUICK], ""),
    ],
    "ops/operators_decode.py": [(_FAILURES, ""), (["test_decode.py", *_QUICK], ""), (_GRAPHS, "")],
    "ops/operators_rows.py": [(["test_triton_functions.py", *_ROWS], ""), (_FAILURES, ""), (_GRAPHS, "")],
    "ops/calling.py": [
        (["test_operator_layouts.py", *_FAILURES], ""),
        (["test_functional_transforms.py", *_QUICK], ""),
        (["test_triton_functions.py", "test_triton_edges.py", "-k", "without_the_interpreter or far_below_zero"], ""),
    ],
    "ops/switch.py": [(["test_explain.py", *_QUICK], ""), (["test_explain.py"], "")],
    "ops/blocks.py": [(["test_ring_edges.py"], "block_"), (["test_kernel_failures.py", "-k", "ring"], "")],
    "distributed.py": [
        (["test_ring_edges.py", "test_distributed.py", "-k", "not rings"], ""),
        (["test_distributed.py"], ""),
    ],
    **{
        f"integrations/{name}.py": [
            (
                [
                    *(["test_adapter_layers.py", "test_adapter_masks.py"] if name == "transformers_layers" else []),
                    "test_adapter_edges.py",
                    "test_adapter_packing.py",
                    "test_adapter_registration.py",
                    "test_adapter_running.py",
                    "test_transformers_packed.py",
                    "test_transformers.py",
                    "test_transformers_whole.py",
                    *_QUICK,
                ],
                "",
            ),
            (["test_transformers.py", "test_transformers_whole.py"], ""),
        ]
        for name in ("transformers", "transformers_layers", "transformers_packing")
    },
    **{
        f"analysis/{name}.py": [
            (["test_metrics_known.py", "test_metrics_edges.py", "test_metrics.py", *_QUICK], ""),
            (["test_capture.py", *_QUICK], ""),
        ]
        for name in ("metrics", "layers", "results", "streams")
    },
}
"""File to groups: pytest's arguments, and a pattern of the keys that they are for. The quickest first; a group runs when
those before it noticed nothing."""

SAMPLE = 60  # changes of a file
WANTED = 0.9  # share that must be noticed
PATIENCE, LEAST = 4.0, 60.0  # a group may take so many times what it takes without a change, and so many seconds


# ---------------------------------------------------------------------------------------------------------------------
# The changes of a file


@dataclass(frozen=True)
class Mutant:
    """One change: bytes ``start:end`` of the file become ``text``."""

    key: str
    line: int
    start: int
    end: int
    text: bytes


_COMPARE = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult, ast.LShift: ast.RShift,
}  # fmt: skip
_NAMES = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "amin": "amax", "amax": "amin", "any": "all",
    "all": "any", "lcm": "gcd", "exp": "expm1", "exp2": "exp", "expm1": "exp", "log": "log1p", "log2": "log",
    "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "ones_like": "zeros_like", "new_zeros": "new_ones",
    "tril": "triu", "triu": "tril", "floor": "ceil", "ceil": "floor", "neg_": "abs_", "cumsum": "cumprod", "mean": "sum",
}  # fmt: skip


class _Finder(ast.NodeVisitor):
    """All changes of one file, in the order of the text."""

    def __init__(self, file, source):
        self.file, self.found = file, []
        self.data = source.encode()
        self.lines = [0]
        for line in self.data.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.scope, self.statement = [], ""
        self.visit(ast.parse(source))

    def visit(self, node):
        if isinstance(node, ast.stmt):
            self.statement = ast.unparse(node).splitlines()[0][:100]
        super().visit(node)

    def add(self, node, what, new, parentheses=True):
        start = self.lines[node.lineno - 1] + node.col_offset
        end = self.lines[node.end_lineno - 1] + node.end_col_offset
        text = new if isinstance(new, str) else ast.unparse(new)
        shown = ast.unparse(node) if isinstance(node, ast.AST) else what
        if what in ("number", "boolean", "sign"):  # too short to know it by
            what = f"{what} in `{self.statement}`"
        key = re.sub(r"\s+", " ", f"{self.file}: {'.'.join(self.scope) or 'module'}: {what}: {shown} -> {text}")
        if isinstance(new, ast.expr) and parentheses:
            text = f"({text})"
        self.found.append((key, node.lineno, start, end, text.encode()))

    def replace(self, node, what, **fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        self.add(node, what, new)

    # what is skipped: annotations, decorators, texts, messages, what only type checkers read

    def _function(self, node):
        if any(ast.unparse(d) in ("overload", "typing.overload") for d in node.decorator_list):
            return
        self.scope.append(node.name)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self.scope.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = _function  # noqa: N815

    def visit_ClassDef(self, node):
        self.scope.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.scope.pop()

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node):  # positions within are not those of the file
        pass

    def visit_Assert(self, node):
        pass

    def visit_Raise(self, node):
        self.add(node, "no error", "pass")

    # statements

    def visit_If(self, node):
        if "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
            self.add(node.test, "other branch", ast.UnaryOp(ast.Not(), node.test))
        self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Constant):  # a docstring
            return
        self.add(node, "removed", "pass")
        self.generic_visit(node)

    def visit_Continue(self, node):
        self.add(node, "removed", "pass")

    def visit_Break(self, node):
        self.add(node, "removed", "pass")

    def visit_Assign(self, node):
        names = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        if "__all__" in names:
            return
        if names & {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}:
            self.add(node, "removed", "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.add(node, "removed", "pass")
        if type(node.op) in _ARITHMETIC:
            self.replace(node, "arithmetic", op=_ARITHMETIC[type(node.op)]())
        self.generic_visit(node)

    def visit_Return(self, node):
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.add(node, "returned", "return None")
        self.generic_visit(node)

    # expressions

    def visit_Compare(self, node):
        for at, op in enumerate(node.ops):
            for other in _COMPARE.get(type(op), ()):
                self.replace(node, "comparison", ops=[*node.ops[:at], other(), *node.ops[at + 1 :]])
        self.generic_visit(node)

    def visit_BinOp(self, node):
        texts = any(isinstance(n, ast.JoinedStr) or isinstance(getattr(n, "value", None), str) for n in ast.walk(node))
        if type(node.op) in _ARITHMETIC and not texts:
            self.replace(node, "arithmetic", op=_ARITHMETIC[type(node.op)]())
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        self.replace(node, "and, or", op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for at in range(len(node.values)):
            rest = [*node.values[:at], *node.values[at + 1 :]]
            self.add(node, "condition dropped", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.USub | ast.Not | ast.Invert):
            self.add(node, "sign", node.operand)
        self.generic_visit(node)

    def visit_IfExp(self, node):
        self.replace(node, "branches swapped", body=node.orelse, orelse=node.body)
        self.generic_visit(node)

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, bool):
            self.add(node, "boolean", ast.Constant(not value))
        elif isinstance(value, int):
            self.add(node, "number", ast.Constant(value + 1))
        elif isinstance(value, float):
            self.add(node, "number", ast.Constant(2 * value if value else 1.0))

    def visit_Call(self, node):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("isinstance", "hasattr", "getattr", "warn", "TypeVar", "frozenset"):
            return
        if name in _NAMES:
            func = copy.copy(node.func)
            setattr(func, "attr" if isinstance(func, ast.Attribute) else "id", _NAMES[name])
            self.replace(node, "other function", func=func)
        before, args = self.statement, node.args
        for keyword in node.keywords:
            if keyword.arg == "name":  # a record of a table
                self.statement = f"{name}({ast.unparse(keyword)})"
        symmetric = name in ("min", "max", "maximum", "minimum", "lcm", "gcd", "transpose", "broadcast_shapes", "equal")
        if len(args) >= 2 and not symmetric and not any(isinstance(a, ast.Starred) for a in args[:2]):
            self.replace(node, "arguments swapped", args=[args[1], args[0], *args[2:]])
        for at, keyword in enumerate(node.keywords):
            if keyword.arg in ("min", "max"):
                other = ast.keyword("max" if keyword.arg == "min" else "min", keyword.value)
                self.replace(node, "other bound", keywords=[*node.keywords[:at], other, *node.keywords[at + 1 :]])
        self.generic_visit(node)
        self.statement = before

    def visit_keyword(self, node):
        before, self.statement = self.statement, f"{self.statement}, {node.arg}"
        self.generic_visit(node)
        self.statement = before


def mutants_of(file):
    """All changes of a file of the package, those that cannot change a result left out, in the order of the sample."""
    source = (PACKAGE / file).read_text()
    seen, found = {}, []
    for key, *rest in _Finder(file, source).found:
        seen[key] = seen.get(key, 0) + 1
        found.append(Mutant(key if seen[key] == 1 else f"{key} ({seen[key]})", *rest))
    patterns = [re.compile(re.escape(e["key"]).replace(r"\*", ".*")) for e in equivalents()]
    found = [m for m in found if not any(p.fullmatch(m.key) for p in patterns)]
    return sorted(found, key=lambda m: hashlib.sha256(m.key.encode()).digest())


def equivalents():
    if not EQUIVALENT.exists():
        return []
    entries = tomllib.loads(EQUIVALENT.read_text()).get("mutant", [])
    assert all(entry["reason"] for entry in entries)
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# The tests of a change


class Copy:
    """A copy of the package, of which one file at a time is changed, and of the tests, which may be edited meanwhile."""

    def __init__(self, folder):
        self.path = Path(folder)
        self.package = self.path / "src" / "softpick"
        self.seconds = {}  # of a group of tests without a change
        for origin, name in ((PACKAGE, "src/softpick"), (TESTS, "tests")):
            shutil.copytree(origin, self.path / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.path)
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(self.package, quiet=1, invalidation_mode=mode)

    def write(self, file, data):
        path = self.package / file
        for old in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            old.unlink()
        path.write_bytes(data)

    def run(self, arguments, limit):
        """``(noticed by, seconds)`` of a group of tests; noticed by None if all pass."""
        begin, answer = time.monotonic(), self.path / "answer"
        answer.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._tests(arguments, answer)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            seconds = time.monotonic() - begin
            if done:
                break
            if seconds > limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "time", seconds
            time.sleep(0.05)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return None, seconds
        if code < 0:
            return f"signal {-code}", seconds
        if not answer.exists():
            log = (self.path / "log").read_text()[-4000:]
            raise SystemExit(f"{log}\n{arguments}: expected tests that pass or fail, got exit code {code}")
        return answer.read_text(), seconds

    def _tests(self, arguments, answer):
        """In the child: run pytest and write down what failed first. Does not return."""
        code = 70
        try:
            os.setsid()
            log = os.open(self.path / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {
                "PYTHONPATH": str(self.package.parent),
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
            }
            sys.dont_write_bytecode = True
            sys.path[:0] = [str(self.package.parent)]
            os.chdir(self.path)
            import hypothesis
            import pytest

            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
            hypothesis.settings.load_profile("mutants")

            class First:
                def pytest_runtest_logreport(self, report):
                    if report.failed and not answer.exists():
                        answer.write_text(report.nodeid.removeprefix("tests/"))

                def pytest_collectreport(self, report):
                    if report.failed and not answer.exists():
                        answer.write_text("import")

            paths = [f"tests/{a}" if a.endswith(".py") else a for a in arguments]
            options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
            code = pytest.main([*options, *paths], plugins=[First()])
            found = sys.modules.get("softpick")
            if found is not None and not str(found.__file__).startswith(str(self.package)):
                code = 5
        except BaseException as error:
            print(repr(error))
        finally:
            os._exit(int(code))


def _preload():
    """What the tests import and no change reaches, once for all children."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import hypothesis  # noqa: F401
    import mpmath  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed

    torch.set_num_threads(1)


def _digest(copied, file):
    """Of what the answer to a change depends on: the file, and the tests."""
    digest = hashlib.sha256((copied.package / file).read_bytes())
    named = {a for group, _ in PLANS[file] for a in group if a.endswith(".py")}
    for path in sorted(copied.path / "tests" / name for name in named | {"conftest.py", "oracle.py"}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """What is known of each change; a line is added for each answer, and the last one counts."""

    def __init__(self):
        KEPT.mkdir(exist_ok=True)
        self.path, self.known = KEPT / "results.jsonl", {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                entry = json.loads(line)
                self.known[entry["key"]] = entry

    def get(self, key, digest):
        entry = self.known.get(key)
        return entry if entry and (entry["noticed"] or entry["digest"] == digest) else None

    def add(self, **entry):
        self.known[entry["key"]] = entry
        with self.path.open("a") as file:
            print(json.dumps(entry), file=file)
        return entry


def _limit(copied, file, group, results, digest):
    """Seconds a group may take; its tests must pass without a change."""
    tests = " ".join(group)
    key = f"unchanged: {file}: {tests}"
    entry = results.known.get(key)
    if tests not in copied.seconds and (entry is None or entry["digest"] != digest):
        noticed, copied.seconds[tests] = copied.run(group, 3600)
        if noticed:
            print((copied.path / "log").read_text()[-4000:])
            raise SystemExit(f"{file}: the tests fail without any change: {noticed}")
        results.add(key=key, digest=digest, noticed="", seconds=round(copied.seconds[tests], 1))
    return max(LEAST, PATIENCE * (copied.seconds[tests] if tests in copied.seconds else entry["seconds"]))


def run_file(copied, file, mutants, results, fresh=False):
    """The answers to some changes of a file."""
    digest = _digest(copied, file)
    original = (copied.package / file).read_bytes()
    answers = []
    try:
        for number, mutant in enumerate(mutants, 1):
            entry = None if fresh else results.get(mutant.key, digest)
            if entry is None:
                groups = [group for group, pattern in PLANS[file] if re.search(pattern, mutant.key)]
                copied.write(file, original)
                limits = [_limit(copied, file, group, results, digest) for group in groups]
                copied.write(file, original[: mutant.start] + mutant.text + original[mutant.end :])
                begin, noticed = time.monotonic(), None
                for group, limit in zip(groups, limits, strict=True):
                    noticed, _ = copied.run(group, limit)
                    if noticed:
                        break
                seconds = round(time.monotonic() - begin, 1)
                entry = results.add(key=mutant.key, digest=digest, noticed=noticed or "", seconds=seconds)
                mark = "noticed" if noticed else "NOT NOTICED"
                print(
                    f"{number}/{len(mutants)} {mark} {seconds}s line {mutant.line}: {mutant.key} [{noticed}]",
                    flush=True,
                )
            answers.append(entry)
    finally:
        copied.write(file, original)
    return answers


def main():
    """Run, print a table and what was not noticed; exit code 1 if a file is below the wanted share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=list(PLANS), help="files of the package, as in PLANS")
    parser.add_argument("-n", "--sample", type=int, default=SAMPLE, help="changes of a file (default: %(default)s)")
    parser.add_argument(
        "--skip", type=int, default=0, help="changes of a file to leave out first (default: %(default)s)"
    )
    parser.add_argument("--key", help="only changes of which the key contains this, all of them")
    parser.add_argument("--list", action="store_true", help="print the changes and stop")
    parser.add_argument("--fresh", action="store_true", help="run again what is known")
    options = parser.parse_args()
    unknown = [file for file in options.files if file not in PLANS]
    if unknown:
        parser.error(f"files: expected some of {', '.join(PLANS)}; got {', '.join(unknown)}")
    chosen = {}
    for file in options.files:
        mutants = mutants_of(file)
        chosen[file] = (
            [m for m in mutants if options.key in m.key] if options.key else mutants[options.skip :][: options.sample]
        )
        chosen[file] = (chosen[file], len(mutants))
    if options.list:
        for mutants, _ in chosen.values():
            print(*(f"line {m.line}: {m.key}" for m in mutants), sep="\n")
        return 0
    _preload()
    results, table, missed = Results(), [], []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copied = Copy(folder)
        for file, (mutants, possible) in chosen.items():
            answers = run_file(copied, file, mutants, results, options.fresh)
            noticed = sum(bool(a["noticed"]) for a in answers)
            table.append((file, noticed, len(answers), possible))
            missed += [a["key"] for a in answers if not a["noticed"]]
    if missed:
        print("\nNot noticed:", *missed, sep="\n  ")
    print(f"\n{'file':32}{'noticed':>9}{'made':>6}{'share':>8}{'possible':>10}")
    for file, noticed, made, possible in table:
        print(f"{file:32}{noticed:>9}{made:>6}{noticed / max(1, made):>8.0%}{possible:>10}")
    return int(any(noticed < WANTED * made for _, noticed, made, _ in table))


if __name__ == "__main__":
    sys.exit(main())
