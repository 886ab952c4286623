"""Modules that were at another path in version 0.1: the old names import them, with a DeprecationWarning, for one release."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED = {
    "softpick.audit": "softpick.analysis.audit",
    "softpick.compare": "softpick.training.compare",
    "softpick.environment": "softpick.experiment.environment",
    "softpick.evaluate": "softpick.evaluation.evaluate",
    "softpick.evaluation.perplexity": "softpick.experiment.perplexity",
    "softpick.loading": "softpick.experiment.models",
    "softpick.ops.library": "softpick.ops.operators",
    "softpick.ops.tiled": "softpick.ops.cpu",
    "softpick.parts": "softpick.experiment.result_cache",
    "softpick.progress": "softpick.experiment.progress",
    "softpick.quantization.simulate": "softpick.experiment.rounding",
    "softpick.quantize": "softpick.quantization.quantize",
    "softpick.train": "softpick.training.pretrain",
    "softpick.training.tokens": "softpick.training.token_files",
}


class Finder:
    """Finds the modules of :data:`MOVED` by their old names."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """As ``sys.meta_path`` asks."""
        return importlib.machinery.ModuleSpec(name, Loader()) if name in MOVED else None  # type: ignore[arg-type]


class Loader:
    """Replaces a module of an old name by the one that has moved."""

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> None:
        """The default."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Replace the empty module by the one that has moved."""
        old = module.__name__
        warnings.warn(f"{old} has moved to {MOVED[old]}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(MOVED[old])
