"""Measure what attention does: capture -> metrics -> report (definitions in ``docs/metrics.md``).

``metrics`` needs torch only, ``capture`` and ``viewers`` transformers as well, ``report`` nothing but torch to encode maps;
each is imported with the first of its names.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softpick.analysis.capture import attention_maps, measure, measure_parts
    from softpick.analysis.metrics import Measurements, Meter
    from softpick.analysis.report import encode_maps, summary_rows, write_report
    from softpick.analysis.viewers import bertviz_arguments, hook_cache

__all__ = [
    "Measurements",
    "Meter",
    "attention_maps",
    "bertviz_arguments",
    "encode_maps",
    "hook_cache",
    "measure",
    "measure_parts",
    "summary_rows",
    "write_report",
]

_HOME = {
    "Measurements": "metrics",
    "Meter": "metrics",
    "attention_maps": "capture",
    "bertviz_arguments": "viewers",
    "encode_maps": "report",
    "hook_cache": "viewers",
    "measure": "capture",
    "measure_parts": "capture",
    "summary_rows": "report",
    "write_report": "report",
}

_MODULES = ("calls", "capture", "metrics", "report", "viewers")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"softpick.analysis.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'softpick.analysis' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"softpick.analysis.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
