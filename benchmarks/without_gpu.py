"""Compiles Triton kernels for a GPU that is not there; nothing is launched. For tune_gpu.py and the tests."""

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


class NoGPU:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(capability: int | str, seen: Callable[[str, Any], None] = lambda name, kernel: None) -> None:
    """From now on, in this process, a launch only compiles, and the kernel is passed to ``seen``.

    ``capability``: of an NVIDIA GPU, such as 90, or the architecture of an AMD GPU, such as ``gfx942``.
    """
    original = jit.JITFunction.run

    def run(self, *args, grid=None, warmup=False, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        seen(self.fn.__name__, kernel)
        return kernel

    if isinstance(capability, str):
        target, major = GPUTarget("hip", capability, 64), (9, 4)
        torch.version.hip = "made up"
    else:
        target, major = GPUTarget("cuda", capability, 32), divmod(capability, 10)
    driver.set_active(NoGPU(target))
    jit.JITFunction.run = run
    torch.cuda.get_device_capability = lambda *_: major
