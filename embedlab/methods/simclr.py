"""SimCLR."""

from __future__ import annotations

from typing import Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._types import Batch
from embedlab.encoders import MLPHead
from embedlab.losses import NTXentLoss
from embedlab.methods._parts import by_size
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
        scale_rate: How the learning rate follows the batch size, see `Method`.
        sync_batch_norm: Normalise by the batches of all ranks together, see `Method`.
        chunk: Images that go through the network at a time, see `Method`.

    Shape: a batch of two views or more, (B, C, H, W) each and of any sizes; row i of all the same image. `forward`
        gives features (B, F).

    Raises:
        ValueError: Fewer than two views, or a setting out of range.

    Example:
        >>> from embedlab.encoders import ResNet
        >>> SimCLR(ResNet("resnet10", stem="small", width=0.125))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        temperature: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            backbone,
            MLPHead() if head is None else head,
            optimizer=optimizer,
            warmup=warmup,
            scale_rate=scale_rate,
            sync_batch_norm=sync_batch_norm,
            chunk=chunk,
        )
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
        # one pass for all views of a size, as in the authors' code: batch norm mixes the views
        projections = by_size(self.project, batch.views)  # (V B, D)
        loss: Tensor = self.loss(projections, batch.index.repeat(len(batch.views)))  # every image is its own class
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss
