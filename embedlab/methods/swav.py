"""SwAV."""

from __future__ import annotations

from typing import Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from embedlab._ops import gather, normalize
from embedlab._types import Batch
from embedlab.encoders import MLPHead
from embedlab.losses import SwAVLoss
from embedlab.methods._parts import Queue, at_least_two_views, by_size
from embedlab.methods.base import Method


class SwAV(Method):
    """SwAV, Caron et al. 2020, algorithm 1 (https://arxiv.org/abs/2006.09882): predict the other crop's cluster.

    Each full crop is softly assigned to prototypes so that a batch is spread evenly over them; the other crops, full
    and small, predict that assignment. With small batches a queue of earlier projections takes part in the spreading.
    After pre-training the backbone is kept.

    As in the authors' code prototypes are made unit vectors before each step, all crops of one size go through the
    backbone together and all crops through the head together. Unlike there, the queue is filled from the first step on,
    holds the rows of all ranks on every rank, and is used as soon as it is full and its epoch has come.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F). All that is kept after pre-training.
        head: Features to projections (B, D), thrown away after pre-training; None is the authors', one hidden layer
            of 2,048 and 128 numbers.
        prototypes: Number K of clusters; the paper's value for a thousand classes.
        frozen_epochs: Epochs at the start in which prototypes are not trained; the authors' value, which they give in
            steps.
        queue: Projections of each full crop to keep; 0 is no queue. The authors take 3,840 for batches of 256.
        queue_epoch: The first epoch in which the queue is used; the authors' value.
        temperature: See `SwAVLoss`; the paper's value.
        epsilon: See `SwAVLoss`; the authors' value.
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
        >>> SwAV(ResNet("resnet10", stem="small", width=0.125))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        prototypes: int = 3000,
        frozen_epochs: int = 1,
        queue: int = 0,
        queue_epoch: int = 15,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
    ) -> None:
        head = MLPHead(hidden_features=2048) if head is None else head
        super().__init__(
            backbone,
            head,
            optimizer=optimizer,
            warmup=warmup,
            scale_rate=scale_rate,
            sync_batch_norm=sync_batch_norm,
        )
        if prototypes < 2 or queue < 0:
            raise ValueError(f"SwAV needs prototypes >= 2 and queue >= 0 (0 is none), got {prototypes} and {queue}.")
        self.prototypes = nn.Parameter(normalize(torch.randn(prototypes, self.dim)))
        self.frozen_epochs, self.queue_epoch = frozen_epochs, queue_epoch
        self.queues = nn.ModuleList([Queue(queue, self.dim) for _ in range(2 if queue else 0)])
        self.loss = SwAVLoss(temperature=temperature, epsilon=epsilon)

    @property
    def embedding_head(self) -> None:
        """Projection head and prototypes are thrown away."""
        return

    def forward(self, images: Tensor) -> Tensor:
        """What goes on after pre-training: features (B, F) of the backbone."""
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Scores of all crops against the prototypes; the two full crops are the ones to predict."""
        views = at_least_two_views(self, batch)
        with torch.no_grad():
            self.prototypes.copy_(normalize(self.prototypes))
        projections = normalize(self.head(by_size(self.backbone, views)))  # type: ignore[misc]  # (V B, D)
        scores = self.scores(projections).chunk(len(views))
        loss: Tensor = self.loss(scores, self.queue_scores())
        for queue, full in zip(self.queues, projections.detach().chunk(len(views)), strict=False):
            queue.append(gather(full))  # type: ignore[operator]
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def scores(self, projections: Tensor) -> Tensor:
        """Cosines (B, K) of unit projections (B, D) with the prototypes."""
        with torch.autocast(projections.device.type, enabled=False):  # bf16 has 3 digits, an epsilon of 0.05 needs 5
            return projections @ self.prototypes.T

    @torch.no_grad()
    def queue_scores(self) -> list[Tensor] | None:
        """Scores of each full crop's queue, or None as long as it is not used."""
        if self.current_epoch < self.queue_epoch or not all(queue.full for queue in self.queues):
            return None
        return [self.scores(queue.rows) for queue in self.queues] or None  # type: ignore[arg-type]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Prototypes that move while the features are still random would collapse onto few of them."""
        if self.current_epoch < self.frozen_epochs:
            self.prototypes.grad = None  # without a gradient the optimizer neither moves nor decays them
