"""The kernel of the hub: the same results as the package, in a process where the package cannot be imported."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import softpick as sp

ROOT = Path(__file__).parents[1]

# how a kernel is loaded: as `kernels` does it, and by `kernels` itself
PLAIN = """
import importlib.util, json
metadata = json.load(open(f"{folder}/build/torch-cpu/metadata.json"))
spec = importlib.util.spec_from_file_location(metadata["id"], f"{folder}/build/torch-cpu/__init__.py")
kernel = sys.modules[metadata["id"]] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
LOCAL = "from pathlib import Path; from kernels import get_local_kernel; kernel = get_local_kernel(Path(folder))"
NAMED = "from kernels import get_kernel; kernel = get_kernel('you/softpick', version=1, backend='cpu')"
CALLS = """
def calls(kernel):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3))
    out = kernel.scaled_dot_product_attention(q, k, v, is_causal=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    offsets = torch.tensor([0, 5, 33], dtype=torch.int32)
    rows = [x[0].transpose(0, 1).detach() for x in (q, k, v)]
    packed = kernel.varlen_attention(*rows, offsets, offsets, 28, 28, is_causal=True)
    decoded = kernel.decode_attention(q[:, :, :1].detach(), k.detach(), v.detach())
    return [out.detach(), *grads, packed, decoded, kernel.softpick(q.detach(), dim=-1)]
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "hub" / "build_kernel.py", folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("load", [PLAIN, LOCAL, NAMED], ids=["plain", "get_local_kernel", "LOCAL_KERNELS"])
def test_the_results_of_the_package_without_the_package(load, built, tmp_path):
    if load is not PLAIN and importlib.util.find_spec("kernels") is None:
        pytest.skip("needs kernels")
    code = f"import sys, torch; sys.modules['softpick'] = None; folder = {str(built)!r}\n{load}\n{CALLS}\n"
    code += "torch.save(calls(kernel), sys.argv[1])"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LOCAL_KERNELS": f"you/softpick={built}",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out.pt"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    space = {"torch": torch}
    exec(CALLS, space)
    wanted = space["calls"](sp)
    got = torch.load(tmp_path / "out.pt")
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_every_variant_has_its_own_operators_and_says_what_is_in_it(built):
    names = []
    for folder in sorted((built / "build").iterdir()):
        metadata = json.loads((folder / "metadata.json").read_text())
        names.append(metadata["id"])
        assert folder.name == f"torch-{metadata['backend']['type']}"
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
        assert set(metadata["digest"]["files"]) == files
        assert {"__init__.py", "ops/operators.py", "ops/triton/forward.py"} <= files
        assert f'"{metadata["id"]}::attention_forward"' in (folder / "ops" / "operators.py").read_text()
        assert not any('"softpick::' in path.read_text() for path in folder.rglob("*.py"))
    assert len(set(names)) == 3
