"""SimSiam."""

from __future__ import annotations

from typing import Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._types import Batch
from embedlab.encoders.heads import feature_size
from embedlab.losses import NegativeCosineLoss
from embedlab.methods._parts import fit_predictor, normalized_output, two_views
from embedlab.methods.base import Method


class SimSiam(Method):
    """SimSiam, Chen and He 2021, algorithm 1 (https://arxiv.org/abs/2011.10566): BYOL without the slow copy.

    The prediction made from one view turns towards the projection of the other, through which no gradient flows: that
    alone prevents collapse. After pre-training the backbone is kept.

    Unlike in the authors' code the predictor's learning rate decays with the others' (67.7 % instead of 68.1 % in the
    paper's table 1).

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F). All that is kept after pre-training.
        head: Features to projections (B, D), thrown away after pre-training; None is the paper's, two hidden layers
            of the backbone's width and 2,048 numbers, batch norm on all three. Keep batch norm on the output.
        predictor: Projections to predictions (B, D); None is the paper's bottleneck, a hidden layer of D / 4.
        optimizer: Parameter groups to optimizer.
        warmup: Share of all steps over which the learning rate rises; the paper has no warm-up.
        scale_rate: How the learning rate follows the batch size, see `Method`.
        sync_batch_norm: Normalise by the batches of all ranks together, see `Method`.

    Shape: a batch of two views, each (B, C, H, W), row i of both the same image. `forward` gives features (B, F).

    Raises:
        ValueError: Other than two views, or a predictor that does not fit.

    Example:
        >>> from embedlab.encoders import ResNet
        >>> SimSiam(ResNet("resnet10", stem="small", width=0.125))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        predictor: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
    ) -> None:
        if head is None:
            head = normalized_output(backbone, 2048, hidden_features=feature_size(backbone), hidden_layers=2)
        super().__init__(
            backbone,
            head,
            optimizer=optimizer,
            warmup=warmup,
            scale_rate=scale_rate,
            sync_batch_norm=sync_batch_norm,
        )
        self.predictor = fit_predictor(predictor, self.dim, hidden_features=max(1, self.dim // 4))
        self.loss = NegativeCosineLoss()

    @property
    def embedding_head(self) -> None:
        """Projection head and predictor are thrown away."""
        return

    def forward(self, images: Tensor) -> Tensor:
        """What goes on after pre-training: features (B, F) of the backbone."""
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """D(p1, z2) / 2 + D(p2, z1) / 2, each view in a pass of its own."""
        z1, z2 = (self.project(view) for view in two_views(self, batch))  # (B, D)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss: Tensor = self.loss(p1, z2.detach()) / 2 + self.loss(p2, z1.detach()) / 2
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss
