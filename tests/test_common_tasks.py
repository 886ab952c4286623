"""The common tasks of CONTRIBUTING, done in a copy of the repository: how many files each takes, and what must follow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent


class Copy:
    """The package, its tests and its documentation in another folder, and the files that were edited there."""

    def __init__(self, folder):
        self.folder, self.edited = folder, set()
        for name in ("src", "tests", "docs"):
            shutil.copytree(HOME / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml"):
            shutil.copy(HOME / name, folder)

    def edit(self, name, old, new):
        file = self.folder / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, (name, old)
        file.write_text(text.replace(old, new), encoding="utf-8")
        self.edited.add(name)

    @property
    def files(self):
        """Edited files besides tests and documentation."""
        return {name.removeprefix("src/softpick/") for name in self.edited if name.startswith("src/")}

    def run(self, *words, **more):
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        environment |= more
        return subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=500
        )


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def stated(task):
    """How many files CONTRIBUTING says a task takes."""
    text = (HOME / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {task} |")]
    return int(row.split("|")[2])


RECORD = """    Normalizer(
        name="softpick_plus_one",
        title="softpick plus one",
        formula="relu(e^{s_i} - 1) / (1 + Σ_j |e^{s_j} - 1|)",
        citation="nobody",
        note="Added by a test.",
        base="expm1",
        rectify="positive",
        absolute_denominator=True,
        constant=1,
    ),
)

for _norm in _TABLE:
"""
FORMULA = """    if name == "softpick_plus_one":
        return numerator / (shifted.abs().sum() + torch.exp(-m))
    raise KeyError(name)
"""


def test_add_a_normalizer(copy):
    """A record: then every list has it, and the tests compare it with its formula on the backends."""
    copy.edit("src/softpick/normalizers.py", ")\n\nfor _norm in _TABLE:\n", RECORD)
    copy.edit("tests/oracle.py", "    raise KeyError(name)\n", FORMULA)
    copy.edit("README.md", "| `linear_softpick` |", "| `softpick_plus_one` | | nobody |\n| `linear_softpick` |")
    assert len(copy.files) <= stated("add a normalizer")
    code = (
        "import softpick, torch\n"
        "from softpick.cli import main\n"
        "from softpick.integrations.transformers import register\n"
        "from softpick.training.settings import Settings\n"
        "register()\n"
        "from transformers import AttentionInterface\n"
        "assert 'softpick_plus_one' in AttentionInterface()\n"
        "Settings.for_task(normalizers=('softpick_plus_one',))\n"
        "softpick.nn.Attention(8, 2, normalizer='softpick_plus_one')(torch.randn(1, 3, 8))\n"
        "import sys; sys.path.insert(0, 'tests')\n"
        "from oracle import attention\n"
        "q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))\n"
        "want = attention(q, k, v, 'softpick_plus_one')[0]\n"
        "for backend in ('reference', 'tiled'):\n"
        "    call = softpick.scaled_dot_product_attention\n"
        "    torch.testing.assert_close(call(q, k, v, normalizer='softpick_plus_one', backend=backend), want)\n"
        "main(['normalizers'])"
    )
    done = copy.run("-c", code)
    assert "relu(e^{s_i} - 1) / (1 + Σ_j |e^{s_j} - 1|)" in done.stdout, done.stderr


# a fault in each kind of file that a wrong result can come from: file below ops/triton, what stands there, what is wrong
FAULTS = {
    "shared by kernels": ("device.py", "keep = keep & (j2 <= i2", "keep = keep & (j2 < i2"),
    "a base function": ("base_functions.py", "return tl.where(s < 0, -magnitude, magnitude)", "return magnitude"),
    "a kernel": (
        "backward.py",
        "dq = tl.dot(narrow_gradient(ds, k.dtype)",
        "dq = tl.dot(narrow_gradient(-ds, k.dtype)",
    ),
    "statistics": ("statistics.py", "tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)", "tl.sum(o.to(tl.float32), 1)"),
    "what a launch gives": (
        "launching.py",
        "return spec.scale if spec.softcap",
        "return 2 * spec.scale if spec.softcap",
    ),
}
COMPARE = """
import softpick, torch
from softpick import explain_backend, scaled_dot_product_attention
torch.manual_seed(0)
leaves = [torch.randn(1, 2, 40, 16).requires_grad_() for _ in range(3)]
wrong = []
for softcap in (None, 1.0):
    found = {}
    for backend in ("triton", "reference"):
        out = scaled_dot_product_attention(*leaves, is_causal=True, softcap=softcap, backend=backend)
        found[backend] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    pairs = zip(found["triton"], found["reference"], strict=True)
    wrong += [not torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs]
print(*(kernel.file for kernel in explain_backend(*leaves, is_causal=True, backend="triton").kernels), any(wrong))
"""


@pytest.mark.thinned(every=3)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_mend_a_wrong_gpu_result(copy, fault):
    """Triton's interpreter shows a fault, and its file is one of those that the task and explain_backend name."""
    pytest.importorskip("triton")
    if fault is not None:
        name, right, wrong = FAULTS[fault]
        copy.edit(f"src/softpick/ops/triton/{name}", right, wrong)
    done = copy.run("-c", COMPARE, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    *named, differs = done.stdout.split()
    assert named == ["forward.py", "backward.py"]
    assert differs == str(fault is not None)
    assert len(copy.files) <= stated("mend a wrong GPU result")
    text = (HOME / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith("| mend a wrong GPU result |")]
    for file in copy.files:
        assert file.removeprefix("ops/triton/") in named or f"`{file.removeprefix('ops/triton/')}`" in row


CUBE = """
import softpick as sp, torch
cube = sp.Normalizer("cube", base="cube", rectify="positive", eps=1e-3)
leaves = [torch.randn(1, 2, 7, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
hidden = torch.ones(7, 7).triu(1).bool()
weights = (leaves[0] @ leaves[1].mT / 2).masked_fill(hidden, 0.0).relu() ** 3
want = weights / (weights.sum(-1, keepdim=True) + 1e-3) @ leaves[2]
for backend in ("reference", "tiled"):
    got = sp.scaled_dot_product_attention(*leaves, is_causal=True, normalizer=cube, backend=backend)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), leaves, retain_graph=True) for out in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
"""


BASE = [
    ("normalizers.py", '    "base": (', '"cube", '),
    ("normalizers.py", "            return s * s\n", '        if self.base == "cube":\n            return s**3\n'),
    (
        "normalizers.py",
        "            return 2.0 * s\n",
        '        if self.base == "cube":\n            return 3 * s**2\n',
    ),
    ("ops/cpu_functions.py", "        return s.mul_(s)\n", '    if norm.base == "cube":\n        return s.pow_(3)\n'),
    (
        "ops/cpu_functions.py",
        "        torch.mul(s, 2.0 * inverse, out=e)\n",
        '    elif norm.base == "cube":\n        torch.mul(s * s, 3 * inverse, out=e)\n',
    ),
]


def test_add_a_base_function(copy):
    """Its value and its derivative, in the reference and in the CPU backend."""
    for name, place, added in BASE:
        copy.edit(f"src/softpick/{name}", place, place + added)
    assert len(copy.files) <= stated("add a normalizer")
    done = copy.run("-c", CUBE)
    assert done.returncode == 0, done.stderr[-2000:]


# what stands in the table or in the kernels, and what stands there with the base function s^3
KERNELS = [
    ("normalizers.py", 'return self.base in ("expm1", "linear")', 'return self.base in ("expm1", "linear", "cube")'),
    ("normalizers.py", 'return self.base == "linear" and', 'return self.base in ("linear", "cube") and'),
    ("base_functions.py", '"linear": LINEAR.value}', '"linear": LINEAR.value, "cube": 3}'),
    ("base_functions.py", "if base in (1, 2):", "if base in (1, 2, 3):"),
    (
        "base_functions.py",
        "        return s\n    elif",
        "        return s\n    elif BASE == 3:\n        return s * s * s\n    elif",
    ),
    (
        "base_functions.py",
        "    else:\n        return tl.exp2(s - level)\n",
        "    elif BASE == 3:\n        return 3.0 * s * s * inverse\n    else:\n        return tl.exp2(s - level)\n",
    ),
    (
        "base_functions.py",
        "        return s * e\n",
        "        return s * e\n    elif BASE == 3:\n        return s * e / 3.0\n",
    ),
    (
        "base_functions.py",
        "        return s * inverse\n",
        "        return s * inverse\n    elif BASE == 3:\n        return s * s * s * inverse\n",
    ),
    ("base_functions.py", "    elif BASE == LINEAR:\n", "    elif BASE == LINEAR or BASE == 3:\n"),
]
CUBE_KERNELS = """
import softpick as sp, torch
cube = sp.Normalizer("cube", base="cube", absolute_denominator=True, constant=1)
torch.manual_seed(0)
for length in (7, 40):
    leaves = [torch.randn(1, 2, length, 16).requires_grad_() for _ in range(3)]
    weights = (leaves[0] @ leaves[1].mT / 4).masked_fill(torch.ones(length, length).triu(1).bool(), 0.0) ** 3
    want = weights / (weights.abs().sum(-1, keepdim=True) + 1) @ leaves[2]
    call = dict(normalizer=cube, backend="triton")
    got = sp.scaled_dot_product_attention(*leaves, is_causal=True, **call)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), leaves, retain_graph=True) for out in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    q, k, v = (x.detach() for x in leaves)
    torch.testing.assert_close(sp.decode_attention(q[:, :, -1:], k, v, **call), want[:, :, -1:])
"""


def test_add_a_base_function_to_the_kernels(copy):
    """One file beside the table, for the forward and the backward pass, decoding, and rows that see few keys."""
    pytest.importorskip("triton")
    for name, place, with_cube in KERNELS:
        copy.edit(f"src/softpick/{'' if name == 'normalizers.py' else 'ops/triton/'}{name}", place, with_cube)
    for place, added in ((place, added) for name, place, added in BASE if name == "normalizers.py"):
        copy.edit("src/softpick/normalizers.py", place, place + added)
    assert copy.files == {"normalizers.py", "ops/triton/base_functions.py"}
    done = copy.run("-c", CUBE_KERNELS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
