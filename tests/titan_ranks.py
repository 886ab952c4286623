"""torchtitan on ranks of the CPU, for test_torchtitan.py: ``python titan_ranks.py PLAN.json``.

The plan is a list of runs: ``{"name", "ranks", "arguments" (torchtitan's command line), "losses" (file for loss and gradient
norm of each step)}``. They run one after the other; ranks are forked, because importing torchtitan takes longer than a run.
torchtitan is for GPUs: it is told of a device module of the CPU. Gloo has no scaled sums, which FSDP is told as well.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._dynamo  # the first call of an operator would import it on every rank
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing import start_processes


def nothing(*_, **__):
    return 0


CPU = SimpleNamespace(
    set_device=nothing,
    current_device=nothing,
    synchronize=nothing,
    empty_cache=nothing,
    reset_peak_memory_stats=nothing,
    memory_stats=lambda *_: {},
    get_device_name=lambda *_: "CPU",
    get_device_properties=lambda *_: SimpleNamespace(total_memory=2**30),
)

with (
    patch("torch._utils._get_available_device_type", lambda: "cpu"),
    patch("torch._utils._get_device_module", lambda _: CPU),
):
    import torchtitan.train
    from torchtitan.components.metrics import MetricsProcessor

    import softpick.integrations.torchtitan  # noqa: F401 (once, before the ranks are forked)

    if torchtitan.__version__ == "0.2.2":
        import softpick.integrations.torchtitan_02 as shards

        SHARDS, clock = "apply_fsdp", torchtitan.train
    else:
        import torchtitan.models.llama3.parallelize as shards
        import torchtitan.trainer as clock

        SHARDS = "apply_fsdp_to_decoder"


def sums_only(apply_fsdp):
    def apply(model, *args, **kwargs):
        apply_fsdp(model, *args, **kwargs)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    return apply


def work(rank, run, port):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",  # there is one CPU
        "WORLD_SIZE": str(run["ranks"]),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    setattr(shards, SHARDS, sums_only(getattr(shards, SHARDS)))

    def log(self, step, loss, _, norm, **__):
        if rank == run["ranks"] - 1:  # of a pipeline the last ranks know the loss
            with Path(run["losses"]).open("a") as file:
                file.write(json.dumps([step, loss, norm]) + "\n")

    def log_validation(self, loss, step, **__):
        if rank == run["ranks"] - 1:  # of a pipeline the last ranks know the loss
            with Path(run["losses"] + ".validation").open("a") as file:
                file.write(json.dumps([step, loss]) + "\n")

    MetricsProcessor.log, MetricsProcessor.log_validation = log, log_validation
    # two seconds of sleep at the end of every run
    clock.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=nothing)
    torchtitan.train.ConfigManager.parse_args.__defaults__ = (run["arguments"],)
    torchtitan.train.main(*([torchtitan.train.Trainer] if clock is torchtitan.train else []))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort when Python ends


def main():
    for run in json.loads(Path(sys.argv[1]).read_text()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        print("run:", run["name"], flush=True)
        start_processes(work, (run, port), nprocs=run["ranks"], start_method="fork")


main()
