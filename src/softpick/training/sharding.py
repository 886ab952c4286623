"""Models whose parameters ranks share (DTensors): whole tensors out of the shares, and shares out of whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["deal", "is_sharded", "whole", "whole_state"]


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks share any of its parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank has to ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict on the CPU, whole; every rank has to ask for it. Of a shared model only rank 0 gets it."""
    keep = not is_sharded(model) or torch.distributed.get_rank() == 0
    found = {}
    for name, tensor in model.state_dict().items():
        made = whole(tensor)
        if keep:
            found[name] = made.cpu().contiguous()
    return found


def deal(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state dict, which every rank has, into a model that may be shared.

    Args:
        model: is changed.
        state: as of :func:`whole_state`.
    """
    own: dict[str, Any] = dict(model.state_dict())
    dealt = {
        name: distribute_tensor(
            tensor.to(own[name].device), own[name].device_mesh, own[name].placements, src_data_rank=None
        )
        if isinstance(own[name], DTensor)
        else tensor
        for name, tensor in state.items()
    }
    model.load_state_dict(dealt)
