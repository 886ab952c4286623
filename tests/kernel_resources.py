"""What a compiled kernel takes of a GPU: registers, shared memory, and what its registers spilled. No GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

REGISTERS = 65536
"""32-bit registers of a multiprocessor, of every NVIDIA GPU since sm_35; a program that needs more is never started."""


def resources(kernel: Any) -> dict[str, int]:
    """Of one program, as assembled.

    Args:
        kernel: as ``JITFunction.run`` gives it for an NVIDIA or AMD GPU.

    Returns:
        ``cubin`` (bytes of code), ``warps``, ``shared`` (bytes), ``spilled`` (bytes of a thread that have to be kept in memory)
        and ``registers`` (of all warps; AMD: of a thread, as those have no limit beyond what the assembler keeps to).
    """
    found = kernel.metadata
    binary = kernel.asm["cubin" if "cubin" in kernel.asm else "hsaco"]
    taken = {"shared": found.shared, "cubin": len(binary), "warps": found.num_warps}
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        return taken | {"registers": _entry("vgpr_count", text), "spilled": _entry("private_segment_fixed_size", text)}
    registers, stack = _usage(binary)
    # a warp's registers are given out in units of 256
    return taken | {"registers": -(-registers // 8) * 256 * found.num_warps, "spilled": stack}


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of the stack of a thread. Triton's kernels have no stack but for what was spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], check=True, capture_output=True, text=True)
    used = [(int(a), int(b)) for a, b in re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)]
    return max(register for register, _ in used), max(stack for _, stack in used)


def _entry(name: str, assembly: str) -> int:
    """The largest entry of this name among the kernels' metadata."""
    return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", assembly))
