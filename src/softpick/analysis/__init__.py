"""Measure what attention does: capture -> metrics -> report (definitions in ``docs/metrics.md``).

``metrics`` needs torch only, ``capture`` and ``viewers`` transformers as well, ``report`` nothing but torch to encode maps.
"""

from softpick.analysis.capture import attention_maps, measure
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
    "summary_rows",
    "write_report",
]
