"""Supervised metric learning: any loss over embeddings and labels."""

from __future__ import annotations

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._ops import gather
from embedlab._types import Batch
from embedlab.losses import SupConLoss
from embedlab.methods.base import Method


class MetricLearning(Method):
    """Train an embedding so that images of one class lie together and classes apart.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F).
        head: Features to embeddings; None trains the features themselves.
        loss: A loss of `embedlab.losses`, or any module that takes (embeddings, labels). Its parameters are trained
            too. A foreign loss is given the union of all ranks' batches.
        optimizer: Parameter groups to optimizer.
        warmup: Share of all steps over which the learning rate rises.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(backbone, head, optimizer=optimizer, warmup=warmup)
        self.loss = SupConLoss() if loss is None else loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Every view is one more image of its class."""
        if batch.labels is None:
            raise ValueError("MetricLearning needs labels; for images without labels use SimCLR.")
        embeddings = self(torch.cat(batch.views))  # (V B, D)
        labels = batch.labels.repeat(len(batch.views))
        if not hasattr(self.loss, "gather"):
            embeddings, labels = gather(embeddings), gather(labels)
        loss: Tensor = self.loss(embeddings, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss
