"""What a result was made with (hardware, versions, the command), for every figure that is kept."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from softpick import __version__

__all__ = ["chosen_device", "command_line", "device_line", "hardware", "missing_device", "peak_resident", "versions"]


def peak_resident() -> int:
    """Bytes of memory that this process held at most; on Linux without those of its parent, which getrusage counts too."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def chosen_device(name: str) -> str:
    """The device itself, and for ``auto`` the first of ``cuda`` and ``mps`` that torch can use, else ``cpu``."""
    if name != "auto":
        return name
    return next((kind for kind in ("cuda", "mps") if missing_device(kind) is None), "cpu")


def device_line(name: str) -> str:
    """What a command says first: the device that was chosen, and what it is."""
    return f"device: {name}" + (f" ({hardware(name)})" if missing_device(name) is None else "")


def missing_device(name: str) -> str | None:
    """Why torch cannot use a device, or None where it can.

    Args:
        name: ``cpu``, ``mps``, ``cuda``, or one of several GPUs such as ``cuda:1``.
    """
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isdecimal())):
        return f"expected cpu, cuda, cuda:N, mps or auto; got {name!r}"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "'mps' asked for, but torch finds none"
    if kind == "cuda" and not torch.cuda.is_available():
        return f"{name!r} asked for, but torch finds no usable GPU"
    if colon and int(number) >= torch.cuda.device_count():
        return f"{name!r} asked for, but torch finds {torch.cuda.device_count()} GPUs, from cuda:0 on"
    return None


def versions(*packages: str) -> str:
    """Versions of softpick, torch, transformers and further packages (those that are installed), and of Python."""
    found = [("softpick", __version__), ("torch", str(torch.__version__))]  # with what it was built for
    for name in ("transformers", *packages):
        loaded = getattr(sys.modules.get(name), "__version__", None)  # what runs, also where another copy is installed
        try:
            found.append((name, str(loaded or version(name))))
        except PackageNotFoundError:
            continue
    return ", ".join(f"{name} {number}" for name, number in [*found, ("Python", platform.python_version())])


def command_line() -> str:
    """The command as it was typed, for a shell."""
    return " ".join(["softpick", *map(shlex.quote, sys.argv[1:])])
