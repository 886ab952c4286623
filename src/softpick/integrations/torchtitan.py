"""Llama with any normalizer for torchtitan: FSDP2, tensor and context parallelism, activation checkpointing.

torchtitan 0.2.2 and 0.3.0 have other interfaces; this module is the one to name, and picks what fits the installed version.
It registers the model ``softpick_llama``, so that torchtitan is started as ever::

    # torchtitan 0.2.2
    torchrun --nproc-per-node 8 -m torchtitan.train --experimental.custom_import softpick.integrations.torchtitan
        --model.name softpick_llama --model.flavor 340M-softpick ...
    # torchtitan 0.3.0
    torchrun --nproc-per-node 8 -m torchtitan.train --module softpick.integrations.torchtitan
        --config softpick_llama --flavor 340M-softpick ...

A flavor is ``SIZE``, ``SIZE-NORMALIZER`` or ``SIZE-NORMALIZER+output_gate+score_scale``: a key of :data:`SIZES` and a name of
``softpick.NORMALIZERS`` (softpick if there is none). The model is torchtitan's own Llama with another attention; weights
convert to and from ``SoftpickLlamaForCausalLM`` (:func:`to_transformers`, :func:`from_transformers`, or
``python -m softpick.integrations.torchtitan``). Context parallelism is :func:`softpick.distributed.ring_attention`.

Data sets, besides torchtitan's: ``files`` (the data set's path is a text, JSONL or parquet file or a folder of them; field
``text``) and ``fineweb_edu`` (the paper's, streamed from the hub).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softpick.integrations import torchtitan_shared as _shared

_served: Any
try:
    _found = importlib.metadata.version("torchtitan")
except importlib.metadata.PackageNotFoundError:
    raise ImportError(
        "softpick.integrations.torchtitan needs torchtitan 0.2.2 or 0.3.0: pip install 'softpick[torchtitan]'"
    ) from None
if _found == "0.2.2":
    from softpick.integrations import torchtitan_02 as _served
elif _found == "0.3.0":
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14):
        raise ImportError(
            f"softpick.integrations.torchtitan: torchtitan 0.3.0 needs torch 2.14 or newer, found {torch.__version__}: "
            "pip install 'torch>=2.14', or torchtitan 0.2.2: pip install 'softpick[torchtitan]'"
        )
    from softpick.integrations import torchtitan_03 as _served
else:
    raise ImportError(
        f"softpick.integrations.torchtitan is for torchtitan 0.2.2 and 0.3.0, whose interfaces other versions do not have; "
        f"found {_found}: pip install 'softpick[torchtitan]'"
    )

__all__ = [
    "FLAVORS",
    "NAME",
    "SIZES",
    "SoftpickModelArgs",
    "SoftpickStateDictAdapter",
    "SoftpickTransformer",
    "from_transformers",
    "main",
    "parallelize",
    "register",
    "to_transformers",
]

NAME = _shared.NAME
"""The name of the model."""

SoftpickModelArgs: Any = _served.SoftpickModelArgs
"""What a model is: :class:`softpick.integrations.torchtitan_shared.ModelArguments`. ``build()`` makes the model."""

SIZES: dict[str, Any] = _served.SIZES
"""Sizes by name. Add your own in a module that imports this one and what it has, and name that module to torchtitan."""

FLAVORS: Mapping[str, Any] = _served.FLAVORS
"""Arguments of a model by its flavor."""

SoftpickTransformer: Any = _served.SoftpickTransformer
SoftpickStateDictAdapter: Any = _served.SoftpickStateDictAdapter
parallelize = _served.parallelize
register = _served.register
to_transformers = _shared.to_transformers
if _found != "0.2.2":
    softpick_llama = _served.softpick_llama  # torchtitan 0.3.0 finds it by its name, which --config gives


def from_transformers(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """Turn a transformers model into torchtitan's arguments and state.

    Args:
        model: a ``SoftpickLlamaForCausalLM``.

    Returns:
        The arguments of a model with the same logits, and its state dict.

    Raises:
        TypeError: for another model.
        ValueError: for a configuration that torchtitan's Llama cannot express (tied embeddings, biases, scaled rotary
            frequencies, a head dimension of its own, another activation).
    """
    return _shared.from_transformers(model, SoftpickModelArgs)


def main(arguments: list[str] | None = None) -> None:
    """Convert checkpoints: ``python -m softpick.integrations.torchtitan to-transformers | from-transformers``.

    Args:
        arguments: of the command line; the process's if None.

    Raises:
        ValueError: for an unknown flavor.
        FileExistsError: for an output that exists.
    """
    _shared.main(FLAVORS, SoftpickModelArgs, arguments)


if __name__ == "__main__":
    main()
else:
    register()
