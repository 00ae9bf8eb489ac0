"""SimCLR."""

from __future__ import annotations

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._types import Batch
from embedlab.encoders import MLPHead
from embedlab.losses import NTXentLoss
from embedlab.methods.base import Method


class SimCLR(Method):
    """SimCLR, Chen et al. 2020 (https://arxiv.org/abs/2002.05709): find the other view of the same image.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F). All that is kept after pre-training.
        head: Features to projections (B, D), thrown away after pre-training; None is the paper's, one hidden layer
            and 128 numbers.
        temperature: See `NTXentLoss`.
        optimizer: Parameter groups to optimizer.
        warmup: Share of all steps over which the learning rate rises.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        temperature: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(backbone, MLPHead() if head is None else head, optimizer=optimizer, warmup=warmup)
        self.loss = NTXentLoss(temperature)

    @property
    def embedding_head(self) -> None:
        """The projection head is thrown away."""
        return

    def forward(self, images: Tensor) -> Tensor:
        """What goes on after pre-training: features (B, F) of the backbone, without the projection head."""
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Two views of every image; all other images of the batch are negatives."""
        if len(batch.views) < 2:
            raise ValueError("SimCLR needs two views per image, got one; set data.init_args.views.count to 2.")
        images = torch.cat(batch.views)  # (2B, C, H, W); one pass as in the authors' code: batch norm mixes the views
        projections = self.head(self.backbone(images))  # type: ignore[misc]
        loss: Tensor = self.loss(projections, batch.index.repeat(len(batch.views)))  # every image is its own class
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss
