"""Compiles kernels for a GPU that is not there and prints what each takes, or a case's error.

test_triton_compile.py and matrix.py run it in a process: an architecture (90, gfx942), then cases.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from kernel_resources import resources
from without_gpu import compile_only

CAPABILITY = int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1]
SHAPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

compiled = {}


def note(name, kernel):
    before = compiled.get(name, {})  # compiled for several calls: the most that one takes
    compiled[name] = {key: max(value, before.get(key, 0)) for key, value in resources(kernel).items()}


compile_only(CAPABILITY, note)
warnings.filterwarnings("error", ".*could not be built")  # what another kernel takes over counts as failed

from softpick import NORMALIZERS  # noqa: E402
from softpick.ops.triton import launch, tuning  # noqa: E402

table = tuning._HOPPER if CAPABILITY == 90 else tuning._PORTABLE
launch.multiprocessors = lambda _: 28
launch._FEWEST_FORWARD, launch._FEWEST_TILES = 0, 1
launch.blocks = lambda kind, d, dtype, device: tuning.row(tuning._SINGLE if dtype == torch.float32 else table, kind, d)


def build(case):
    name, d, dtype, extra = case.split(",")
    d, dtype, norm = int(d), SHAPES[dtype], NORMALIZERS[name]
    compiled.clear()
    launch.hopper_can = launch.hopper_can_decode = lambda *_, by_hand=extra == "hopper": by_hand
    q, k, v, out = (torch.empty(1, 4, 256, d, dtype=dtype) for _ in range(4))
    lse, grads = torch.empty(1, 4, 256), [torch.empty_like(q) for _ in range(3)]
    sink = torch.empty(4) if norm.needs_sink else None
    mask = torch.empty(1, 1, 256, 256, dtype=dtype) if extra == "bias" else None
    bias_grad = torch.empty(1, 4, 256, 256) if extra == "bias" else None
    left, softcap = (64, 30.0) if extra == "bias" else (-1, 0.0)
    options = launch.Options(norm, d**-0.5, norm.eps, left, 0, True, softcap, 0.0, skip=norm.sparse)
    launch.forward(options, q, k, v, mask, sink, None, None, None, 0, out, lse, None, None)
    launch.backward(
        options, q, k, v, mask, sink, None, None, None, 0, 0, out, lse, out, *grads, bias_grad
    )  # fmt: skip
    for places in (56, 3, 1):  # keys of a head divided, shared by programs of all heads, and not divided at all
        launch._places = lambda *_, places=places: places
        launch.decode(options, q[:, :, :1], k, v, None, sink, None, None, out[:, :, :1], lse[:, :, :1])
    if extra in ("hopper", "pages"):
        lengths, table = torch.empty(1, dtype=torch.int32), torch.empty(1, 4, dtype=torch.int32)
        k, v = (torch.empty(9, 4, 64, d, dtype=dtype) for _ in range(2))
        launch.decode(options, q[:, :, :1], k, v, None, sink, lengths, table, out[:, :, :1], lse[:, :, :1])
    if name == "softpick":
        # the last but one is read twice, as its rows do not begin at multiples of 16 bytes; the last is shared by programs
        # that wait for each other
        for n in (1000, 16384, 20001, 20000):
            x = torch.empty(8, n, dtype=dtype)
            launch.softpick_forward(x, 1e-6, x, lse.flatten()[:8])
            launch.softpick_backward(x, lse.flatten()[:8], x, x.float() if dtype == torch.float16 else x)


for case in sys.argv[2:]:
    try:
        build(case)
    except Exception as error:
        print(json.dumps({"case": case, "error": f"{type(error).__name__}: {error}"}), flush=True)
    else:
        print(json.dumps({"case": case, "kernels": compiled}), flush=True)
