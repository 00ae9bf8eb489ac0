"""VICReg."""

from __future__ import annotations

from typing import Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._types import Batch
from embedlab.encoders import MLPHead
from embedlab.losses import VICRegLoss
from embedlab.methods._parts import two_views
from embedlab.methods.base import Method


class VICReg(Method):
    """VICReg, Bardes et al. 2022, algorithm 1 (https://arxiv.org/abs/2105.04906): variance, invariance, covariance.

    The views of an image agree, every number of the projection varies over the batch, and no two numbers vary together.
    There are neither negatives nor a second network. After pre-training the backbone is kept.

    Unlike in the authors' code the last layer of the head has a bias, which the loss takes away.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F). All that is kept after pre-training.
        head: Features to projections (B, D), the paper's expander, thrown away after pre-training; None is the
            paper's, two hidden layers of 8,192 and 8,192 numbers (136 million parameters: take a smaller one on a CPU).
        invariance: See `VICRegLoss`; the paper's value.
        variance: See `VICRegLoss`; the paper's value.
        covariance: See `VICRegLoss`; the paper's value.
        optimizer: Parameter groups to optimizer.
        warmup: Share of all steps over which the learning rate rises.
        scale_rate: How the learning rate follows the batch size, see `Method`.
        sync_batch_norm: Normalise by the batches of all ranks together, see `Method`.

    Shape: a batch of two views, each (B, C, H, W), row i of both the same image. `forward` gives features (B, F).

    Raises:
        ValueError: Other than two views, or a setting out of range.

    Example:
        >>> from embedlab.encoders import ResNet
        >>> VICReg(ResNet("resnet10", stem="small", width=0.125), MLPHead(32))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
    ) -> None:
        head = MLPHead(8192, hidden_features=8192, hidden_layers=2) if head is None else head
        super().__init__(
            backbone,
            head,
            optimizer=optimizer,
            warmup=warmup,
            scale_rate=scale_rate,
            sync_batch_norm=sync_batch_norm,
        )
        self.loss = VICRegLoss(invariance=invariance, variance=variance, covariance=covariance)

    @property
    def embedding_head(self) -> None:
        """The expander is thrown away."""
        return

    def forward(self, images: Tensor) -> Tensor:
        """What goes on after pre-training: features (B, F) of the backbone."""
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """The loss of both views' projections, each view in a pass of its own."""
        first, second = (self.project(view) for view in two_views(self, batch))
        loss: Tensor = self.loss(first, second)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss
