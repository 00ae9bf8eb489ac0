"""Exponential moving averages of a network: the momentum encoders and teachers of MoCo, BYOL and DINO.

Parameters are averaged; buffers are not touched. As in the authors' code of all four methods the average runs in
training mode, so that its batch norm takes the statistics of its own batches and keeps its own running ones.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import pytorch_lightning as pl
import torch
from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def frozen_copy(module: _Module) -> _Module:
    """A deep copy that no gradient reaches; as a submodule it is part of the state."""
    return copy.deepcopy(module).requires_grad_(False)


def check_momentum(method: nn.Module, momentum: float) -> float:
    """The momentum, if it is one."""
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"{type(method).__name__} needs a momentum in [0, 1] (0 copies the network, 1 never moves), got "
            f"{momentum}; 0.99 to 0.999 are usual."
        )
    return momentum


def cosine_momentum(base: float, step: float, steps: float) -> float:
    """Momentum of optimizer step `step` of `steps`, from `base` to 1; BYOL, Grill et al. 2020, section 3.3.

    Example:
        >>> [round(cosine_momentum(0.9, step, 4), 4) for step in range(5)]
        [0.9, 0.9146, 0.95, 0.9854, 1.0]
    """
    return 1 - (1 - base) * (1 + math.cos(math.pi * min(1.0, step / max(steps, 1)))) / 2


def run_momentum(method: pl.LightningModule, base: float) -> float:
    """`cosine_momentum` at the present step of the run."""
    return cosine_momentum(base, method.global_step, method.trainer.estimated_stepping_batches)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """Move the average: parameters become momentum x average + (1 - momentum) x network.

    Call it once per optimizer step, after the step: in `optimizer_step`, which Lightning calls once also when gradients
    are accumulated, and before any callback saves a checkpoint.

    Example:
        >>> average, network = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(average.weight, 1.0), nn.init.constant_(network.weight, 3.0)
        >>> follow(average, network, 0.75)
        >>> average.weight.item()
        1.5
    """
    # one fused operation per device for all parameters: hundreds of small ones would cost as much as a forward pass
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - momentum)
