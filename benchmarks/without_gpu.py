"""Compiles Triton kernels for an NVIDIA GPU that is not there; nothing is launched. For tune_gpu.py and the tests."""

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


class NoGPU:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(capability: int, seen: Callable[[str, Any], None] = lambda name, kernel: None) -> None:
    """From now on, in this process, a launch only compiles (for a capability such as 90) and tells ``seen`` of it."""
    original = jit.JITFunction.run

    def run(self, *args, grid=None, warmup=False, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        seen(self.fn.__name__, kernel)
        return kernel

    driver.set_active(NoGPU(capability))
    jit.JITFunction.run = run
    torch.cuda.get_device_capability = lambda *_: divmod(capability, 10)
