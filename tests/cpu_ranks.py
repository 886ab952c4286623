"""``softpick`` under torchrun on ranks of the CPU, for tests.

``AS_GPUS=1``: with FSDP and tensor parallelism, which accelerate has for GPUs only. It takes the kind of its devices for the
kind of its parallelism; here it is told of several GPUs, and what it then does (FSDP2's ``fully_shard``, device meshes) works
on gloo as well.

``KILL_AT=N``: every rank is killed at the log line of step N.
"""

import os
import signal

from accelerate.state import DistributedType, PartialState

from softpick.cli import main
from softpick.training import engine


def pretend_gpus():
    original = PartialState.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def kill_at(step):
    original = engine.Speed.read

    def read(self, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, now)

    engine.Speed.read = read


if os.environ.get("AS_GPUS") == "1":
    pretend_gpus()
if "KILL_AT" in os.environ:
    kill_at(int(os.environ["KILL_AT"]))
main()
