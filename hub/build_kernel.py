"""Writes the functions and kernels as a kernel of the Hugging Face kernel hub: ``make hub-kernel``, into ``build/hub``.

    LOCAL_KERNELS="you/softpick=build/hub" python -c "from kernels import get_kernel; get_kernel('you/softpick', version=1)"

Such a kernel is self-contained: a copy of ``normalizers.py``, ``functional.py`` and ``ops/``, whose imports are relative and
whose operators have a namespace of their own, so that kernel and package can be loaded in one process. It needs torch, and
Triton on a GPU. It is no ``attn_implementation``: transformers would save a model that runs it as the model's softmax twin.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "softpick"
BACKENDS = ("cpu", "cuda", "rocm")
PARTS = ("normalizers.py", "functional.py", "vector.py", "ops")
VERSION = 1
"""Of the kernel, which the hub counts by itself; raise it where a function's arguments or results change."""

IMPORT = re.compile(r"^(\s*)from softpick((?:\.\w+)*) import ", re.MULTILINE)
INIT = '''"""Attention without softmax: the functions of the Python package softpick, as a kernel of the hub."""

from .functional import (
    AttentionOutput,
    decode_attention,
    linear_softpick,
    scaled_dot_product_attention,
    softpick,
    varlen_attention,
)
from .normalizers import NORMALIZERS, Normalizer, get_normalizer
from .ops.key_bounds import KeyBounds, key_bounds, update_key_bounds

__all__ = [
    "NORMALIZERS",
    "AttentionOutput",
    "KeyBounds",
    "Normalizer",
    "decode_attention",
    "get_normalizer",
    "key_bounds",
    "linear_softpick",
    "scaled_dot_product_attention",
    "softpick",
    "update_key_bounds",
    "varlen_attention",
]
'''


def sources() -> dict[str, str]:
    """Paths inside the kernel to their text, with relative imports; the namespace of operators is still softpick's."""
    files = [SOURCE / part for part in PARTS if part.endswith(".py")]
    files += [path for part in PARTS if not part.endswith(".py") for path in sorted((SOURCE / part).rglob("*.py"))]
    found = {"__init__.py": INIT}
    for file in files:
        path = file.relative_to(SOURCE)
        dots = "." * len(path.parts)
        text = IMPORT.sub(
            lambda m, dots=dots: f"{m[1]}from {dots}{m[2].removeprefix('.')} import ", file.read_text("utf-8")
        )
        if left := re.search(r"^\s*(?:from|import) softpick.*$", text, re.MULTILINE):
            raise ValueError(
                f"{file}: expected imports of the form 'from softpick.x import y', got {left[0].strip()!r}"
            )
        found[path.as_posix()] = text
    return found


def build(folder: Path) -> list[Path]:
    """Write ``folder/build/torch-BACKEND`` for every backend, in the place of what was there.

    Args:
        folder: made where it does not exist.

    Returns:
        The folders of the variants.
    """
    texts = sources()
    content = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]
    temporary = folder / "build.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for backend in BACKENDS:
        name = f"_softpick_{backend}_{content}"
        variant, digests = temporary / f"torch-{backend}", {}
        for path, text in texts.items():
            data = text.replace('"softpick::', f'"{name}::').encode()
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_bytes(data)
            digests[path] = base64.b64encode(hashlib.sha256(data).digest()).decode()
        metadata = {
            "id": name,
            "name": "softpick",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "build", ignore_errors=True)
    temporary.replace(folder / "build")
    return [folder / "build" / f"torch-{backend}" for backend in BACKENDS]


if __name__ == "__main__":
    for made in build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub"):
        print(made)
