"""Several losses at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedlab.losses._base import apply_loss


class SumLoss(nn.Module):
    """The weighted sum of losses over the same embeddings, such as pairs in the batch beside proxies of all classes.

    Args:
        losses: Losses over (embeddings, labels), ours or those of pytorch-metric-learning, which are given the union of
            all ranks' batches.
        weights: One for each, > 0; None adds them as they are.

    Shape: as the losses.

    Raises:
        ValueError: No losses, or weights that do not fit them.

    Example:
        >>> from embedlab.losses import SupConLoss, TripletLoss
        >>> SumLoss([SupConLoss(), TripletLoss()], weights=[1.0, 0.5])(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(1.1236)
    """

    gather = True  # each loss sees to it by itself

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(losses) if weights is None else list(weights)
        if not losses or len(weights) != len(losses) or min(weights) <= 0:
            raise ValueError(
                f"SumLoss needs at least one loss and a weight > 0 for each, got {len(losses)} losses and the weights "
                f"{weights}; leave out a loss that is not to count."
            )
        self.losses = nn.ModuleList(losses)
        self.weights = weights

    def forward(self, embeddings: Tensor, labels: Tensor, **reference: Any) -> Tensor:
        found = [apply_loss(loss, embeddings, labels, **reference) for loss in self.losses]
        return torch.stack([weight * value for weight, value in zip(self.weights, found, strict=True)]).sum()
