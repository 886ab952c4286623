"""Several ranks in one conversion: who writes the folder, and how torch's FSDP2 shares both models among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from softpick.conversion.models import embeddings, few_tokens
from softpick.conversion.recipes import ConvertError, ConvertSettings
from softpick.experiment.result_cache import ResultCache
from softpick.experiment.resume import Workspace

__all__ = ["Ranks", "check_shared", "shard", "start"]

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
_PATIENCE = timedelta(days=1)  # ranks wait while the first one tokenizes, analyzes, writes

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; one without torchrun.

    Attributes:
        count: how many.
        rank: which one this is. The first owns the folder.
        sharded: ranks share the models' weights, also where there is one.
    """

    count: int = 1
    rank: int = 0
    sharded: bool = False

    @property
    def first(self) -> bool:
        """The owner of the folder."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns on the first rank, on all ranks; what it raises there is raised everywhere."""
        if self.count == 1:
            return make()
        box: list[Any] = [None, None]
        raised: Exception | None = None
        if self.first:
            try:
                box[0] = make()
            except Exception as error:
                raised = error
                box[1] = error
        torch.distributed.broadcast_object_list(box, src=0)
        if raised is not None:
            raise raised
        if box[1] is not None:
            raise box[1]
        found: T = box[0]
        return found

    def cached(self, cache: ResultCache, key: Any, make: Callable[[], T]) -> T:
        """As :meth:`ResultCache.get`, where all ranks have to work on ``make()`` together; the first one's result counts."""
        if self.share(lambda: cache.has(key)):
            return self.share(lambda: cache.get(key, dict))
        made = make()
        return self.share(lambda: cache.get(key, lambda: made))

    def workspace(self, output: str | Path) -> AbstractContextManager[Workspace | None]:
        """The folder for the first rank, None for the others."""
        if self.count == 1:
            return Workspace(output, error=ConvertError, ledger="config.json")
        return self._workspace(output)

    def _workspace(self, output: str | Path) -> AbstractContextManager[Workspace | None]:
        work = Workspace(output, error=ConvertError, ledger="config.json") if self.first else None

        def enter() -> None:
            assert work is not None
            work.__enter__()

        self.share(enter)  # a folder that cannot be used is an error of all ranks
        if work is None:
            return nullcontext()
        return _Entered(work)


class _Entered(AbstractContextManager[Workspace]):
    """A workspace that was entered before."""

    def __init__(self, work: Workspace) -> None:
        self.work = work

    def __enter__(self) -> Workspace:
        return self.work

    def __exit__(self, *reason: Any) -> None:
        self.work.__exit__(*reason)


def start(settings: ConvertSettings) -> Ranks:
    """The ranks that torchrun started, connected; or the one process.

    Args:
        settings: of the conversion.

    Raises:
        ConvertError: settings and ranks do not fit.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if settings.parallel == "none":
        if count > 1:
            raise ConvertError(f"parallel: expected fsdp for {count} ranks, got none")
        return Ranks()
    _check(settings, count)
    if not torch.distributed.is_initialized():
        if settings.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if settings.device == "cuda" else "gloo", timeout=_PATIENCE)
    return Ranks(count, rank, sharded=True)


def _check(settings: ConvertSettings, count: int) -> None:
    from transformers import Trainer

    if "WORLD_SIZE" not in os.environ:
        raise ConvertError("parallel: fsdp needs torchrun, for example torchrun --nproc-per-node 2 -m softpick")
    if not hasattr(Trainer, "_sync_replicated_trainable_parameters"):
        raise ConvertError("parallel: fsdp needs transformers 5.23 or newer")
    if settings.device not in ("cpu", "cuda"):
        raise ConvertError(f"device: expected cpu or cuda beside parallel fsdp, got {settings.device!r}")
    if settings.optimizer not in _OPTIMIZERS:
        raise ConvertError(
            f"optimizer: expected one of {', '.join(_OPTIMIZERS)} beside parallel fsdp, which others do not know; got "
            f"{settings.optimizer!r}"
        )
    at_once = settings.micro_batch_size * count
    for name in (*(f"{stage}_batch_size" for stage in settings.stages), "validation_sequences"):
        if getattr(settings, name) % at_once:
            raise ConvertError(
                f"{name}: expected a multiple of micro_batch_size x ranks = {settings.micro_batch_size} x {count}, got "
                f"{getattr(settings, name)}"
            )


def shard(teacher: Any, student: Any, layers: list[str], device: str) -> None:
    """Share the weights of both models among all ranks, and move them to the ranks' devices.

    Every attention layer, every decoder layer and what else is trained becomes a unit of FSDP2. Embeddings and heads that are
    not trained stay whole on each rank: teacher and student, and the two ends of a tie, have them in common.

    Args:
        teacher: of transformers, on the CPU.
        student: with weights of its own but frozen embeddings.
        layers: names of the attention layers.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConvertError: a weight stayed whole.
    """
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    here = torch.device("cpu" if device == "cpu" else f"cuda:{torch.cuda.current_device()}")
    kept = {p for module in embeddings(teacher) for p in module.parameters()}
    names = [*layers, *dict.fromkeys(name.rpartition(".")[0] for name in layers)]
    for model in (teacher, student):
        own = [m for m in embeddings(model) if any(p not in kept for p in m.parameters())]
        for module in _once([*map(model.get_submodule, names), *own, model.base_model]):
            # True also for the outermost: else its weights stay whole after a pass without gradients, and an optimizer that is
            # made then would get those
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    for parameter in kept:
        parameter.data = parameter.data.to(here)
    for who, model in (("teacher", teacher), ("student", student)):
        for buffer in model.buffers():
            buffer.data = buffer.data.to(here)
        check_shared(who, ((n, p) for n, p in model.named_parameters() if p not in kept))
        with torch.no_grad():  # the first pass decides what is inside of what: the whole model, not an attention layer
            model(input_ids=few_tokens(model), use_cache=False)
        check_shared(who, ((n, p) for n, p in model.named_parameters() if p not in kept))


def check_shared(who: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise :class:`ConvertError` where ranks do not share each of the parameters.

    Args:
        who: has them.
        parameters: with their names.
    """
    plain = [name for name, parameter in parameters if not isinstance(parameter, DTensor)]
    if plain:
        raise ConvertError(
            f"parallel: fsdp has to share all weights of the {who} among ranks, but {plain[0]} stayed whole"
        )


def _once(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(modules))
