"""BYOL."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._types import Batch
from embedlab.encoders import MLPHead
from embedlab.losses import NegativeCosineLoss
from embedlab.methods._parts import at_least_two_views, by_size, fit_predictor, joined
from embedlab.methods.base import Method
from embedlab.methods.ema import check_momentum, follow, frozen_copy, run_momentum


class BYOL(Method):
    """BYOL, Grill et al. 2020, eq. 1 to 4 (https://arxiv.org/abs/2006.07733): predict a slow copy's view of the image.

    The online network predicts from one view what the target network, its moving average, projects the other view to.
    There are no negatives. After pre-training the online network's backbone is kept, as in the paper.

    Unlike the authors' code the two full views go through the network in one pass, so that batch norm mixes them, and
    small further crops may follow, which predict both full views.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F). All that is kept after pre-training.
        head: Features to projections (B, D), thrown away after pre-training; None is the paper's, one hidden layer
            of 4,096 and 256 numbers.
        predictor: Projections to predictions (B, D); None is the paper's, one hidden layer of 4,096.
        momentum: The paper's tau at the first step, rising to 1 by a cosine; the paper's value.
        optimizer: Parameter groups to optimizer.
        warmup: Share of all steps over which the learning rate rises.
        scale_rate: How the learning rate follows the batch size, see `Method`.
        sync_batch_norm: Normalise by the batches of all ranks together, see `Method`.

    Shape: a batch of two full views, each (B, C, H, W), and any number of further crops of any size; row i of all the
        same image. `forward` gives features (B, F).

    Raises:
        ValueError: Fewer than two views, or a setting out of range.

    Example:
        >>> from embedlab.encoders import ResNet
        >>> BYOL(ResNet("resnet10", stem="small", width=0.125))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        predictor: nn.Module | None = None,
        momentum: float = 0.996,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
    ) -> None:
        head = MLPHead(256, hidden_features=4096) if head is None else head
        super().__init__(
            backbone,
            head,
            optimizer=optimizer,
            warmup=warmup,
            scale_rate=scale_rate,
            sync_batch_norm=sync_batch_norm,
        )
        self.predictor = fit_predictor(predictor, self.dim, hidden_features=4096)
        self.momentum = check_momentum(self, momentum)
        self.teacher = frozen_copy(joined(self.backbone, self.head))
        self.loss = NegativeCosineLoss()

    @property
    def embedding_head(self) -> None:
        """Projection head and predictor are thrown away."""
        return

    def forward(self, images: Tensor) -> Tensor:
        """What goes on after pre-training: features (B, F) of the online network's backbone."""
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """For two views the sum of both directions of ||prediction - target||^2 = 2 - 2 cosine, eq. 2."""
        views = at_least_two_views(self, batch)
        projections = self.head(by_size(self.backbone, views))  # type: ignore[misc]  # (V B, D)
        predictions = self.predictor(projections).chunk(len(views))
        with torch.no_grad():
            targets = self.teacher(torch.cat(views[:2])).chunk(2)
        distances = [
            2 + 2 * self.loss(predictions[view], targets[full])
            for full in range(2)
            for view in range(len(views))
            if view != full
        ]
        loss = 2 * torch.stack(distances).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The target network follows, eq. 1."""
        super().optimizer_step(*args, **kwargs)
        follow(self.teacher, joined(self.backbone, self.head), run_momentum(self, self.momentum))
