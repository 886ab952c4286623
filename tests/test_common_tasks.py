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
