"""Supervised metric learning: any loss over embeddings and labels."""

from __future__ import annotations

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._ops import at_least_float32, gather
from embedlab._types import Batch
from embedlab.losses import SupConLoss
from embedlab.methods.base import Method


class MetricLearning(Method):
    """Train an embedding so that images of one class lie together and classes apart.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F).
        head: Features to what the loss compares; None trains the features themselves.
        keep_head: Whether the head belongs to the encoder. False throws it away after training, as Khosla et al. do:
            with few training classes the backbone's features tell unseen ones better apart.
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
        keep_head: bool = True,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(backbone, head, optimizer=optimizer, warmup=warmup)
        self.keep_head = keep_head
        self.loss = SupConLoss() if loss is None else loss

    @property
    def embedding_head(self) -> nn.Module | None:
        """The head, where it is kept."""
        return self.head if self.keep_head else None

    def forward(self, images: Tensor) -> Tensor:
        """What goes into the gallery, not yet of unit length: (B, D) of the head, or (B, F) of the backbone."""
        features: Tensor = self.backbone(images)
        return features if self.embedding_head is None else self.embedding_head(features)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Every view is one more image of its class."""
        if batch.labels is None:
            raise ValueError("MetricLearning needs labels; for images without labels use SimCLR.")
        features = self.backbone(torch.cat(batch.views))  # (V B, F)
        embeddings = features if self.head is None else self.head(features)  # (V B, D)
        labels = batch.labels.repeat(len(batch.views))
        if not hasattr(self.loss, "gather"):
            embeddings, labels = gather(at_least_float32(embeddings)), gather(labels)
        loss: Tensor = self.loss(embeddings, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss
