"""``softpick convert`` under torchrun on ranks of the CPU, for tests.

``SHARES=FILE``: the first rank writes there which parameters of both models it has whole, and the sizes of its shares.

``KILL_AT=N`` and ``STOP_AT=N``: as in ``cpu_ranks.py``.
"""

import json
import os

from torch.distributed.tensor import DTensor

from softpick.conversion import convert

shard = convert.shard


def noting(teacher, student, *more):
    shard(teacher, student, *more)
    if os.environ["RANK"] == "0":
        with open(os.environ["SHARES"], "w") as file:
            json.dump({"teacher": sizes(teacher), "student": sizes(student)}, file)


def sizes(model):
    named = dict(model.named_parameters())
    shared = [p for p in named.values() if isinstance(p, DTensor)]
    return {
        "plain": [name for name, p in named.items() if not isinstance(p, DTensor)],
        "here": sum(p.to_local().numel() for p in shared),
        "all": sum(p.numel() for p in shared),
    }


if "SHARES" in os.environ:
    convert.shard = noting

import cpu_ranks  # noqa: F401, E402 - runs the command
