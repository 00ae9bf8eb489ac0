"""MoCo v2 and MoCo v3."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._ops import gather, normalize, world_size
from embedlab._types import Batch
from embedlab.encoders import MLPHead
from embedlab.losses import InfoNCELoss
from embedlab.methods._parts import (
    Queue,
    at_least_two_views,
    by_size,
    fit_predictor,
    joined,
    normalized_output,
    two_views,
)
from embedlab.methods.base import Method
from embedlab.methods.ema import check_momentum, follow, frozen_copy, run_momentum


class MoCoV2(Method):
    """MoCo v2, Chen et al. 2020 (https://arxiv.org/abs/2003.04297): find the other view's key among many old ones.

    He et al. 2020, algorithm 1 (https://arxiv.org/abs/1911.05722), with an MLP head. A momentum encoder makes the keys;
    a queue keeps those of past batches as negatives, so that their number does not depend on the batch. After
    pre-training the query encoder's backbone is kept.

    Unlike the authors' code the keys of the other images of the batch, on all ranks, are negatives too. The momentum
    encoder moves after the optimizer step instead of before the next forward pass, which is the same. As there, keys
    are computed on images shuffled among ranks, so that batch norm tells nothing about the pairs; the shuffle is left
    out where it would change nothing: with one process, synchronised batch norm, or none.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F). All that is kept after pre-training.
        head: Features to projections (B, D), thrown away after pre-training; None is the paper's, one hidden layer
            of the backbone's width without batch norm and 128 numbers.
        queue: Keys to keep; the paper's value. Not more than a few epochs' worth of images.
        momentum: Share of the old momentum encoder in the new one, the same in every step; the paper's value.
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
        >>> method = MoCoV2(ResNet("resnet10", stem="small", width=0.125), queue=16)
        >>> method(torch.zeros(2, 3, 8, 8)).shape, method.queue.rows.shape
        (torch.Size([2, 64]), torch.Size([16, 128]))
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        queue: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
    ) -> None:
        head = MLPHead(norm="none") if head is None else head
        super().__init__(
            backbone,
            head,
            optimizer=optimizer,
            warmup=warmup,
            scale_rate=scale_rate,
            sync_batch_norm=sync_batch_norm,
        )
        self.momentum = check_momentum(self, momentum)
        self.teacher = frozen_copy(joined(self.backbone, self.head))
        self.queue = Queue(queue, self.dim)
        self.loss = InfoNCELoss(temperature)

    @property
    def embedding_head(self) -> None:
        """The projection head is thrown away."""
        return

    def forward(self, images: Tensor) -> Tensor:
        """What goes on after pre-training: features (B, F) of the query encoder's backbone."""
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Queries from the first view, keys from the second; then the keys enter the queue."""
        first, second = two_views(self, batch)
        queries = self.project(first)  # (B, D)
        keys, images = self.keys(second), gather(batch.index)  # (N, D) and (N,): of all ranks
        reference = torch.cat([keys, self.queue.rows])
        labels = torch.cat([images, images.new_full((len(self.queue.rows),), -1)])  # nobody's mate is in the queue
        loss: Tensor = self.loss(queries, batch.index, reference=reference, reference_labels=labels)
        self.queue.append(keys)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Keys of this rank's images (B, C, H, W) and of all other ranks', in rank order: unit vectors (N, D)."""
        ranks = world_size()
        plain = (nn.BatchNorm1d, nn.BatchNorm2d)  # by exact type: the synchronised ones are of other types
        if ranks == 1 or not any(type(part) in plain for part in self.teacher.modules()):
            return gather(normalize(self.teacher(images)))
        every = gather(images)
        # drawn from the step, so that all ranks and a resumed run draw the same
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(self.global_step))
        shares = [order[rank::ranks].to(images.device) for rank in range(ranks)]
        shuffled = gather(normalize(self.teacher(every[shares[torch.distributed.get_rank()]])))
        keys = torch.empty_like(shuffled)
        keys[torch.cat(shares)] = shuffled
        return keys

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The momentum encoder follows, He et al. 2020, eq. 2."""
        super().optimizer_step(*args, **kwargs)
        follow(self.teacher, joined(self.backbone, self.head), self.momentum)


class MoCoV3(Method):
    """MoCo v3, Chen et al. 2021, algorithm 1 (https://arxiv.org/abs/2104.02057): MoCo with large batches, no queue.

    Each view's prediction finds the other view's key among the keys of all images of the batch, on all ranks. The
    momentum encoder's momentum rises to 1 by a cosine. After pre-training the query encoder's backbone is kept.

    Unlike the authors' code the two full views go through the network in one pass, so that batch norm mixes them, and
    small further crops may follow, whose predictions look for the keys of both full views.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F). All that is kept after pre-training.
        head: Features to projections (B, D), thrown away after pre-training; None is the authors' for ResNets: one
            hidden layer of 4,096, 256 numbers, batch norm on both.
        predictor: Projections to predictions (B, D); None is the authors': one hidden layer of 4,096.
        momentum: At the first step, rising to 1; the authors' value for 100 and 300 epochs, 0.996 for 1,000.
        temperature: See `InfoNCELoss`; the authors' value for ResNets, 0.2 for vision transformers.
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
        >>> MoCoV3(ResNet("resnet10", stem="small", width=0.125))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        predictor: nn.Module | None = None,
        momentum: float = 0.99,
        temperature: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
    ) -> None:
        head = normalized_output(backbone, 256, hidden_features=4096) if head is None else head
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
        self.loss = InfoNCELoss(temperature)

    @property
    def embedding_head(self) -> None:
        """Projection head and predictor are thrown away."""
        return

    def forward(self, images: Tensor) -> Tensor:
        """What goes on after pre-training: features (B, F) of the query encoder's backbone."""
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """For two views ctr(q1, k2) + ctr(q2, k1)."""
        views = at_least_two_views(self, batch)
        projections = self.head(by_size(self.backbone, views))  # type: ignore[misc]  # (V B, D)
        queries = self.predictor(projections).chunk(len(views))
        with torch.no_grad():
            keys = [gather(normalize(part)) for part in self.teacher(torch.cat(views[:2])).chunk(2)]  # two (N, D)
        images = gather(batch.index)
        contrasts = [
            self.loss(queries[view], batch.index, reference=keys[full], reference_labels=images)
            for full in range(2)
            for view in range(len(views))
            if view != full
        ]
        # twice the mean is the paper's sum for two views; 2 tau keeps the gradient's size, algorithm 1
        loss = 2 * torch.stack(contrasts).mean() * 2 * self.loss.temperature
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The momentum encoder follows."""
        super().optimizer_step(*args, **kwargs)
        follow(self.teacher, joined(self.backbone, self.head), run_momentum(self, self.momentum))
