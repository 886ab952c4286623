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
from softpick.ops.spec import AttentionSpec  # noqa: E402
from softpick.ops.triton import dispatch, launch, launch_decode, launch_rows, tuning  # noqa: E402

table = tuning._HOPPER if CAPABILITY == 90 else tuning._PORTABLE
tuning.multiprocessors = lambda _: 28
tuning.FEWEST_FORWARD, tuning.FEWEST_TILES, tuning.SKIP_FROM = 0, 1, 0
tuning.blocks = lambda kind, d, dtype, device: tuning.row(tuning._SINGLE if dtype == torch.float32 else table, kind, d)


def build(case):
    name, d, dtype, extra = case.split(",")
    d, dtype, norm = int(d), SHAPES[dtype], NORMALIZERS[name]
    compiled.clear()
    reason = None if extra in ("hopper", "softcap") else "not asked for"
    dispatch.hopper_refuses = lambda *_: reason
    dispatch.hopper_refuses_decode = lambda *_: reason or (None if dtype == torch.bfloat16 else "not there")
    q, k, v, out = (torch.empty(1, 4, 256, d, dtype=dtype) for _ in range(4))
    lse, grads = torch.empty(1, 4, 256), [torch.empty_like(q) for _ in range(3)]
    sink = torch.empty(4) if norm.needs_sink else None
    mask = torch.empty(1, 1, 256, 256, dtype=dtype) if extra == "bias" else None
    bias_grad = torch.empty(1, 4, 256, 256) if extra == "bias" else None
    left, softcap = 64 if extra == "bias" else -1, 30.0 if extra in ("bias", "softcap") else 0.0
    spec = AttentionSpec(norm, d**-0.5, norm.eps, left, 0, True, softcap)
    launch.forward(spec, q, k, v, mask, sink, None, None, None, 0, out, lse, None, None)
    launch.backward(
        spec, q, k, v, mask, sink, None, None, None, 0, 0, out, lse, out, *grads, bias_grad
    )  # fmt: skip
    for programs in (56, 3, 1):  # keys of a head divided, shared by programs of all heads, and not divided at all
        launch_decode._resident = lambda *_, programs=programs: programs
        launch_decode.decode(spec, q[:, :, :1], k, v, None, sink, None, None, out[:, :, :1], lse[:, :, :1])
    if extra in ("hopper", "pages"):
        lengths, table = torch.empty(1, dtype=torch.int32), torch.empty(1, 4, dtype=torch.int32)
        k, v = (torch.empty(9, 4, 64, d, dtype=dtype) for _ in range(2))
        launch_decode.decode(spec, q[:, :, :1], k, v, None, sink, lengths, table, out[:, :, :1], lse[:, :, :1])
        if norm.sparse:
            blocks = torch.empty(1, 4, 4, dtype=torch.int32), torch.empty(1, 4, dtype=torch.int32), torch.empty(1, 4, 1)
            listed = launch_decode.Listed(*blocks, 64)
            launch_decode.decode(
                spec, q[:, :, :1], k, v, None, sink, lengths, table, out[:, :, :1], lse[:, :, :1], listed
            )
    if name == "softpick":
        # the last but one is read twice, as its rows do not begin at multiples of 16 bytes; the last is shared by programs
        # that wait for each other
        for n in (1000, 16384, 20001, 20000):
            x = torch.empty(8, n, dtype=dtype)
            launch_rows.softpick_forward(x, 1e-6, x, lse.flatten()[:8])
            launch_rows.softpick_backward(x, lse.flatten()[:8], x, x.float() if dtype == torch.float16 else x)


for case in sys.argv[2:]:
    try:
        build(case)
    except Exception as error:
        print(json.dumps({"case": case, "error": f"{type(error).__name__}: {error}"}), flush=True)
    else:
        print(json.dumps({"case": case, "kernels": compiled}), flush=True)
