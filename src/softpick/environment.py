"""What a result was made with: hardware, versions, the command. It stands beside every figure that is kept."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["command_line", "hardware", "versions"]


def hardware(device: str = "cpu") -> str:
    """Name of the GPU, or of the processor and how many of it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} CPUs"


def versions(*packages: str) -> str:
    """Versions of softpick, torch, transformers and further packages (those that are installed), and of Python."""
    found = [("torch", str(torch.__version__))]  # with what it was built for
    for name in ("softpick", "transformers", *packages):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    found.sort(key=lambda pair: pair[0] != "softpick")
    return ", ".join(f"{name} {number}" for name, number in [*found, ("Python", platform.python_version())])


def command_line() -> str:
    """The command as it was typed, for a shell."""
    return " ".join(["softpick", *map(shlex.quote, sys.argv[1:])])
