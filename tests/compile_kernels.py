"""Compiles kernels for a GPU that is not there and prints what each takes. test_triton_compile.py runs it in a process."""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

CAPABILITY = int(sys.argv[1])
SHAPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class NoGPU:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(NoGPU())
torch.cuda.get_device_capability = lambda *_: (CAPABILITY // 10, CAPABILITY % 10)

from softpick import NORMALIZERS  # noqa: E402
from softpick.ops.triton import launch, tuning  # noqa: E402

compiled = {}
original = jit.JITFunction.run


def compile_only(self, *args, grid=None, warmup=False, **kwargs):
    kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
    found = kernel.metadata
    compiled[self.fn.__name__] = {"shared": found.shared, "cubin": len(kernel.asm["cubin"])}
    if found.maxnreg:
        compiled[self.fn.__name__]["registers"] = found.maxnreg * found.num_warps * 32
    return kernel


jit.JITFunction.run = compile_only
table = tuning._HOPPER if CAPABILITY == 90 else tuning._PORTABLE
launch.multiprocessors = lambda _: 28
launch.blocks = lambda kind, d, dtype, device: tuning.row(tuning._SINGLE if dtype == torch.float32 else table, kind, d)

for case in sys.argv[2:]:
    name, d, dtype, extra = case.split(",")
    d, dtype, norm = int(d), SHAPES[dtype], NORMALIZERS[name]
    compiled.clear()
    launch.hopper_can = lambda *_, by_hand=extra == "hopper": by_hand
    q, k, v, out = (torch.empty(1, 4, 256, d, dtype=dtype) for _ in range(4))
    lse, grads = torch.empty(1, 4, 256), [torch.empty_like(q) for _ in range(3)]
    sink = torch.empty(4) if norm.needs_sink else None
    mask = torch.empty(1, 1, 256, 256, dtype=dtype) if extra == "bias" else None
    bias_grad = torch.empty(1, 4, 256, 256) if extra == "bias" else None
    live = torch.empty(launch.live_shape(q, v, 1, 256, 256), dtype=torch.int32) if extra == "map" else None
    left, softcap = (64, 30.0) if extra == "bias" else (-1, 0.0)
    options = launch.Options(norm, d**-0.5, norm.eps, left, 0, True, softcap, 0.0, norm.sparse)
    launch.forward(options, q, k, v, mask, sink, None, None, None, 0, out, lse, None, None, live)
    launch.backward(
        options, q, k, v, mask, sink, None, None, None, 0, 0, out, lse, out, *grads, bias_grad, live
    )  # fmt: skip
    launch.decode(options, q[:, :, :1], k, v, None, sink, None, None, out[:, :, :1], lse[:, :, :1])
    if name == "softpick":
        for n in (1000, 16384, 20000):  # the last is shared by programs that wait for each other
            x = torch.empty(8, n, dtype=dtype)
            launch.softpick_forward(x, 1e-6, x, lse.flatten()[:8])
            launch.softpick_backward(x, lse.flatten()[:8], x, x)
    print(json.dumps({"case": case, "kernels": compiled}), flush=True)
