"""``softpick`` under torchrun on ranks of the CPU, for tests.

``AS_GPUS=1``: with FSDP and tensor parallelism, which accelerate has for GPUs only. It takes the kind of its devices for the
kind of its parallelism; here it is told of several GPUs, and what it then does (FSDP2's ``fully_shard``, device meshes) works
on gloo as well.

``KILL_AT=N``: every rank is killed at the log line of step N.

``STOP_AT=N``: the last rank alone gets SIGINT, as of Ctrl-C, at the log line of step N.

``POLICIES=FILE``: the first rank writes there the dtypes of each call of ``fully_shard``.
"""

import os
import signal

import torch.distributed.fsdp
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


def at_log_line(step, number):
    original = engine._Watch.on_log

    def on_log(self, args, state, control, logs=None, **more):
        if state.global_step == step and "loss" in (logs or {}):
            os.kill(os.getpid(), number)
        return original(self, args, state, control, logs=logs, **more)

    engine._Watch.on_log = on_log


def note_policies(path):
    original = torch.distributed.fsdp.fully_shard

    def fully_shard(module, *, mp_policy, **options):
        if os.environ["RANK"] == "0":
            with open(path, "a") as file:
                print(mp_policy.param_dtype, mp_policy.reduce_dtype, mp_policy.output_dtype, file=file)
        return original(module, mp_policy=mp_policy, **options)

    torch.distributed.fsdp.fully_shard = fully_shard


if os.environ.get("AS_GPUS") == "1":
    pretend_gpus()
if "KILL_AT" in os.environ:
    at_log_line(int(os.environ["KILL_AT"]), signal.SIGKILL)
if "STOP_AT" in os.environ and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
    at_log_line(int(os.environ["STOP_AT"]), signal.SIGINT)
if "POLICIES" in os.environ:
    note_policies(os.environ["POLICIES"])
main()
