"""Layers that stay in 16 bits, as files that other libraries read: what `softpick analyze --cost` puts beside its report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from softpick.analysis.sensitivity import SCHEMES, Scheme

__all__ = ["keep_file_names", "keep_files"]

_LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "llm-compressor.yaml": tuple(s.name for s in SCHEMES if s.scales != "group"),
    "torchao.json": ("int8-token", "fp8-tensor", "fp8-token", "int4-weights"),
    "gptqmodel.json": ("int4-weights",),
    "bitsandbytes.json": ("int8-token", "int4-weights"),
}
"""Files, and the schemes that the library computes with. In GPTQModel and bitsandbytes weights in 4 bits, in LLM.int8 a scale
per token."""


def keep_file_names(runs: int = 1) -> list[str]:
    """All names that :func:`keep_files` can give for so many models."""
    return [_name(s, file, run) for run in range(runs) for file, schemes in _LIBRARIES.items() for s in schemes]


def _name(scheme: str, file: str, run: int) -> str:
    return f"keep-{scheme}{f'-{run + 1}' if run else ''}.{file}"


def keep_files(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each model and scheme for which a few layers in 16 bits help: the settings of other libraries, by file name.

    Args:
        runs: of an audit with ``cost``; those of a model's parts count as one.

    Returns:
        - ``keep-SCHEME.llm-compressor.yaml``: a recipe (``oneshot(recipe=...)``)
        - ``keep-SCHEME.torchao.json``: arguments for transformers' ``TorchAoConfig(quant_type, **json.load(file))``
        - ``keep-SCHEME.gptqmodel.json``: arguments for ``QuantizeConfig(bits=4, **json.load(file))``
        - ``keep-SCHEME.bitsandbytes.json``: arguments for ``BitsAndBytesConfig(load_in_8bit=True, **json.load(file))``

        The second model's have ``-2`` behind the scheme.
    """
    by_name = {scheme.name: scheme for scheme in SCHEMES}
    costs = [cost for run in runs if (cost := run.get("cost"))]
    found = {}
    for number, cost in enumerate(costs):
        for entry in cost["keep"]:
            if not entry["kept"]:
                continue
            lists, scheme = entry["ignore"], by_name[entry["scheme"]]
            values = {
                "llm-compressor.yaml": _recipe(scheme, lists["llm-compressor"], cost["layers"]),
                "torchao.json": {"modules_to_not_convert": lists["torchao"]},
                "gptqmodel.json": {"dynamic": lists["gptqmodel"]},
                "bitsandbytes.json": {"llm_int8_skip_modules": lists["bitsandbytes"]},
            }
            for file, value in values.items():
                if scheme.name in _LIBRARIES[file]:
                    # JSON is YAML
                    found[_name(scheme.name, file, number)] = json.dumps(value, indent=2) + "\n"
    return found


def _recipe(scheme: Scheme, ignore: Sequence[str], layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A recipe of llm-compressor that rounds as the scheme does, in the terms of compressed-tensors.

    Layers whose widths have groups of another size are groups of the recipe by themselves.
    """
    numbers = {
        "num_bits": 4 if scheme.fmt == "int4" else 8,
        "type": "float" if scheme.fmt == "fp8" else "int",
        "symmetric": True,
    }
    weights: dict[str, Any] = numbers | {"dynamic": False}
    if scheme.scales == "none":
        sizes = {layer["name"]: layer["group"] for layer in layers if layer["name"] not in ignore}
        targets = {size: [name for name in sizes if sizes[name] == size] for size in sorted(set(sizes.values()))}
        groups = [
            {
                "targets": names if len(targets) > 1 else ["Linear"],
                "weights": weights | {"strategy": "group", "group_size": size},
            }
            for size, names in targets.items()
        ]
    else:
        inputs = numbers | {"strategy": scheme.scales, "dynamic": scheme.scales == "token"}
        groups = [{"targets": ["Linear"], "weights": weights | {"strategy": "channel"}, "input_activations": inputs}]
    modifier = {"ignore": list(ignore), "config_groups": {f"group_{i}": group for i, group in enumerate(groups)}}
    return {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}
