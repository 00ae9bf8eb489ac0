"""DINO."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from embedlab._ops import cosine
from embedlab._types import Batch
from embedlab.encoders.heads import feature_size
from embedlab.losses import DINOLoss
from embedlab.methods._parts import at_least_two_views, by_size, joined
from embedlab.methods.base import Method
from embedlab.methods.ema import check_momentum, follow, run_momentum


class DINOHead(nn.Module):
    """DINO's head, Caron et al. 2021, section 3.1: a bottleneck of unit length before a weight-normalised layer.

    Hidden layers of linear and GELU without batch norm, a linear bottleneck, and cosines of it with K learned vectors;
    that is the authors' weight-normalised last layer with its norm fixed to 1, their default.

    Args:
        out_features: Number K of outputs; the paper's value. Take some thousands for small data.
        in_features: Size of the features; None takes the backbone's when the two are joined.
        hidden_features: Width of the hidden layers; the paper's value.
        hidden_layers: Number of hidden layers; the paper's value.
        bottleneck: Width of the bottleneck; the paper's value.

    Shape: features (B, in_features) to scores (B, K) in [-1, 1].

    Example:
        >>> DINOHead(8, in_features=16)(torch.zeros(2, 16)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        out_features: int = 65536,
        *,
        in_features: int | None = None,
        hidden_features: int = 2048,
        hidden_layers: int = 2,
        bottleneck: int = 256,
    ) -> None:
        super().__init__()
        sizes = {"out_features": out_features, "hidden_features": hidden_features, "bottleneck": bottleneck}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"DINOHead needs {name} >= 1, got {size}.")
        self.out_features = out_features
        self.in_features: int | None = None
        self.hidden_features = hidden_features
        self.hidden_layers = hidden_layers
        self.bottleneck = bottleneck
        if in_features is not None:
            self.build(in_features)

    def build(self, in_features: int) -> None:
        """Create the layers for a known feature size."""
        self.in_features = in_features
        layers: list[nn.Module] = []
        size = in_features
        for _ in range(self.hidden_layers):
            layers += [nn.Linear(size, self.hidden_features), nn.GELU()]
            size = self.hidden_features
        self.net = nn.Sequential(*layers, nn.Linear(size, self.bottleneck))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Linear(self.bottleneck, self.out_features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, K); their size does not depend on the weights' norm."""
        return cosine(self.net(features), self.last.weight)


class DINO(Method):
    """DINO, Caron et al. 2021, algorithm 1 (https://arxiv.org/abs/2104.14294): agree with one's own moving average.

    The student sees all crops and predicts the teacher's distribution over K outputs for the full ones; the teacher is
    the student's moving average, its scores centred and sharpened against collapse. After pre-training the teacher's
    backbone is kept, which the paper evaluates: `backbone` and `head` are the teacher's, and a copy of them learns.

    Unlike in the authors' code weight decay is constant, warm-up and freezing are given for this run's lengths, and
    gradients are clipped by the trainer's `gradient_clip_val`, by the norm of all parameters together.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F). All that is kept after pre-training.
        head: Features to scores (B, K), thrown away after pre-training; None is the paper's.
        momentum: Share of the old teacher in the new one at the first step, rising to 1 by a cosine; the paper's value
            for batches of 1,024, 0.9995 for 256.
        student_temperature: See `DINOLoss`; the paper's value.
        teacher_temperature: See `DINOLoss`; the authors' value, 0.07 for long runs.
        warmup_temperature: See `DINOLoss`; the authors' value.
        warmup_steps: See `DINOLoss`; the authors take 30 epochs.
        center_momentum: `momentum` of `DINOLoss`; the paper's value.
        frozen_epochs: Epochs at the start in which the student's last layer is not trained; the authors' value.
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
        >>> DINO(ResNet("resnet10", stem="small", width=0.125), DINOHead(16))(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """

    head: DINOHead

    def __init__(
        self,
        backbone: nn.Module,
        head: DINOHead | None = None,
        *,
        momentum: float = 0.996,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warmup_temperature: float = 0.04,
        warmup_steps: int = 0,
        center_momentum: float = 0.9,
        frozen_epochs: int = 1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        scale_rate: Literal["none", "linear", "sqrt"] = "none",
        sync_batch_norm: bool = False,
    ) -> None:
        head = DINOHead() if head is None else head
        if head.in_features is None:
            head.build(feature_size(backbone))
        super().__init__(
            backbone,
            head,
            optimizer=optimizer,
            warmup=warmup,
            scale_rate=scale_rate,
            sync_batch_norm=sync_batch_norm,
        )
        self.student_backbone, self.student_head = copy.deepcopy(backbone), copy.deepcopy(head)
        self.backbone.requires_grad_(False)
        self.head.requires_grad_(False)
        self.momentum = check_momentum(self, momentum)
        self.frozen_epochs = frozen_epochs
        self.loss = DINOLoss(
            head.out_features,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            warmup_temperature=warmup_temperature,
            warmup_steps=warmup_steps,
            momentum=center_momentum,
        )

    @property
    def embedding_head(self) -> None:
        """The head is thrown away."""
        return

    def forward(self, images: Tensor) -> Tensor:
        """What goes on after pre-training: features (B, F) of the teacher's backbone."""
        features: Tensor = self.backbone(images)
        return features

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """The student on all crops against the teacher on the full ones."""
        views = at_least_two_views(self, batch)
        student = self.student_head(by_size(self.student_backbone, views)).chunk(len(views))
        with torch.no_grad():
            teacher = self.head(self.backbone(torch.cat(views[:2]))).chunk(2)
        loss: Tensor = self.loss(teacher, student)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # noqa: ARG002
        """A last layer that moves in the first epoch makes the loss fall by collapse."""
        if self.current_epoch < self.frozen_epochs:
            self.student_head.last.weight.grad = None  # the optimizer then neither moves nor decays it

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The teacher follows."""
        super().optimizer_step(*args, **kwargs)
        student = joined(self.student_backbone, self.student_head)
        follow(joined(self.backbone, self.head), student, run_momentum(self, self.momentum))
