"""NNCLR."""

from __future__ import annotations

from typing import Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._ops import cosine, gather, normalize
from embedlab._types import Batch
from embedlab.losses import InfoNCELoss
from embedlab.methods._parts import Queue, fit_predictor, normalized_output, two_views
from embedlab.methods.base import Method


class NNCLR(Method):
    """NNCLR, Dwibedi et al. 2021, algorithm 1 (https://arxiv.org/abs/2104.14548): find a neighbour's other view.

    One view's projection is replaced by its nearest neighbour in a support set of earlier projections, which must pick
    the prediction made from the other view out of those of the whole batch: positives that no augmentation could make.
    After pre-training the backbone is kept.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F). All that is kept after pre-training.
        head: Features to projections (B, D), thrown away after pre-training; None is the paper's, two hidden layers
            of 2,048 and 256 numbers, batch norm on all three.
        predictor: Projections to predictions (B, D); None is the paper's, one hidden layer of 4,096.
        queue: Projections in the support set; the paper's value. For small data about as many as there are images.
        temperature: See `InfoNCELoss`; the paper's value.
        optimizer: Parameter groups to optimizer.
        warmup: Share of all steps over which the learning rate rises.
        scale_rate: How the learning rate follows the batch size, see `Method`.
        sync_batch_norm: Normalise by the batches of all ranks together, see `Method`.

    Shape: a batch of two views, each (B, C, H, W), row i of both the same image. `forward` gives features (B, F).

    Raises:
        ValueError: Other than two views, or a setting out of range.

    Example:
        >>> from embedlab.encoders import ResNet
        >>> method = NNCLR(ResNet("resnet10", stem="small", width=0.125), queue=16)
        >>> method(torch.zeros(2, 3, 8, 8)).shape, method.queue.rows.shape
        (torch.Size([2, 64]), torch.Size([16, 256]))
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        predictor: nn.Module | None = None,
        queue: int = 98304,
        temperature: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
    ) -> None:
        if head is None:
            head = normalized_output(backbone, 256, hidden_features=2048, hidden_layers=2, affine=True)
        super().__init__(
            backbone,
            head,
            optimizer=optimizer,
            warmup=warmup,
            scale_rate=scale_rate,
            sync_batch_norm=sync_batch_norm,
        )
        self.predictor = fit_predictor(predictor, self.dim, hidden_features=4096)
        self.queue = Queue(queue, self.dim)
        self.loss = InfoNCELoss(temperature)

    @property
    def embedding_head(self) -> None:
        """Projection head and predictor are thrown away."""
        return

    def forward(self, images: Tensor) -> Tensor:
        """What goes on after pre-training: features (B, F) of the backbone."""
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """L(NN(z1), p2) / 2 + L(NN(z2), p1) / 2, each view in a pass of its own; then z1 enters the support set."""
        z1, z2 = (self.project(view) for view in two_views(self, batch))  # (B, D)
        p1, p2 = gather(self.predictor(z1)), gather(self.predictor(z2))  # (N, D): of all ranks
        images = gather(batch.index)
        loss: Tensor = (
            self.loss(self.neighbours(z1), batch.index, reference=p2, reference_labels=images) / 2
            + self.loss(self.neighbours(z2), batch.index, reference=p1, reference_labels=images) / 2
        )
        self.queue.append(gather(normalize(z1.detach())))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    @torch.no_grad()
    def neighbours(self, projections: Tensor) -> Tensor:
        """The nearest row of the support set for each projection: (B, D), without gradient."""
        return self.queue.rows[cosine(projections, self.queue.rows).argmax(dim=1)]
