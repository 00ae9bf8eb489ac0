"""Image classification on top of a backbone: fine-tuning, linear probe, or from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from embedlab._ops import gather
from embedlab._types import Batch
from embedlab.data import ImageData, Mix
from embedlab.encoders import CosineHead, LinearHead
from embedlab.methods import Method
from embedlab.methods.base import backbone_or_encoder, decay_groups
from embedlab.metrics import classification_report


class Classification(Method):
    """A linear classifier on a backbone, trained together or alone.

    The number of classes comes from the data. Validation (role calibrate) and test log accuracy, balanced accuracy and
    macro F1 over the images of all ranks, each counted once.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F); or give `encoder`.
        encoder: Folder of a saved encoder whose backbone to start from; the data's mean and std must be its own.
        classifier: "linear", or "cosine", which starts from the class means of the features and suits few labels.
        loss: (logits (B, C), targets (B,)) to a scalar; None is cross entropy, `FocalLoss` suits rare classes.
        mix: MixUp, CutMix or mosaic of the training images, see `Mix`; with cross entropy, whose targets may be shares.
        freeze: Train the classifier only (linear probe); the backbone also keeps its batch statistics.
        backbone_rate: The backbone's learning rate as a share of the classifier's.
        optimizer: Parameter groups to optimizer.
        warmup: Share of all steps over which the learning rate rises.
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        *,
        encoder: str | Path | None = None,
        classifier: Literal["linear", "cosine"] = "linear",
        loss: nn.Module | None = None,
        mix: Mix | None = None,
        freeze: bool = False,
        backbone_rate: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
    ) -> None:
        start = backbone_or_encoder("Classification", backbone, encoder)
        super().__init__(start.backbone if start else backbone, optimizer=optimizer, warmup=warmup)  # type: ignore[arg-type]
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        if mix is not None and not isinstance(self.loss, nn.CrossEntropyLoss):
            raise ValueError(
                f"mix gives every image shares of several classes, which {type(self.loss).__name__} does not take; "
                "leave loss out (cross entropy), or mix."
            )
        self.mix = mix
        self.classifier = classifier
        self.frozen = freeze
        self.backbone_rate = backbone_rate
        self.outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        if start is not None:
            self.start_from(start)
        self.backbone.requires_grad_(not freeze)

    @property
    def uses_labels(self) -> bool:
        """They train the backbone, unless it is frozen."""
        return not self.frozen

    @property
    def embedding_head(self) -> None:
        """Only the backbone goes into the encoder."""
        return

    def setup(self, stage: str) -> None:
        """Build the classifier for the data's classes."""
        data: ImageData = self.trainer.datamodule  # type: ignore[attr-defined]
        if unseen := data.class_names[data.num_classes :]:
            raise ValueError(
                f"{len(unseen)} classes have no training image, first {unseen[:3]}: a classifier can only name "
                "classes that it has seen. Use split=sample or split=group, or a gallery."
            )
        if self.head is None:
            if data.num_classes < 2:
                raise ValueError(f"Classification needs images of two classes or more, got {data.num_classes}.")
            kind = LinearHead if self.classifier == "linear" else CosineHead
            self.head = kind(data.num_classes, in_features=self.dim)
        super().setup(stage)

    @torch.no_grad()
    def on_train_start(self) -> None:
        """A fresh cosine classifier starts at the class means of the plain training images."""
        if not isinstance(self.head, CosineHead) or self.global_step:
            return
        data: ImageData = self.trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.dataset("train")
        self.eval()
        features, labels = [], []
        for start in range(0, len(dataset), data.batch_size):
            batch = dataset[list(range(start, min(start + data.batch_size, len(dataset))))].to(self.device)
            features.append(self.backbone(data.plain(batch.views[0])))
            assert batch.labels is not None
            labels.append(batch.labels)
        self.train()
        self.head.imprint(torch.cat(features), torch.cat(labels))

    def train(self, mode: bool = True) -> Classification:
        """A frozen backbone stays in evaluation mode, so that its batch statistics do not move."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Every view is one more image of its class."""
        if batch.labels is None:
            raise ValueError("Classification needs labels.")
        views, targets = torch.cat(batch.views), batch.labels.repeat(len(batch.views))
        if self.mix is not None:  # view by view: a sample may not stand in a mixed batch twice
            mixed = [self._mixed(self.mix, view, batch) for view in batch.views]
            views, targets = (torch.cat(part) for part in zip(*mixed, strict=True))
        logits = self(views).float()
        loss: Tensor = self.loss(logits, targets)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(logits))
        return loss

    def _mixed(self, mix: Mix, view: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """One view mixed over the batch of all ranks, and the share of each class in it (B, C)."""
        data: ImageData = self.trainer.datamodule  # type: ignore[attr-defined]
        mixed, rows, shares = mix(view, batch.index, seed=data.seed, epoch=self.current_epoch)
        assert batch.labels is not None
        classes = F.one_hot(gather(batch.labels), data.num_classes)  # (rows of all ranks, C)
        return mixed, (shares[..., None] * classes[rows]).sum(dim=1)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:  # noqa: ARG002
        """Keep the probabilities."""
        return self._keep(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:  # noqa: ARG002
        """Keep the probabilities."""
        return self._keep(batch)

    def _keep(self, batch: Batch) -> dict[str, Tensor | None]:
        assert batch.labels is not None
        probabilities = self(batch.views[0]).float().softmax(dim=1)
        self.outputs.append((probabilities, batch.labels, batch.index))
        return {"probabilities": probabilities, "labels": batch.labels, "index": batch.index}

    def predictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probabilities (N, C), targets (N,) and row numbers (N,) of the last evaluation, each image once."""
        probabilities, labels, index = (
            gather(torch.cat(part)).cpu().numpy() for part in zip(*self.outputs, strict=True)
        )
        _, once = np.unique(index, return_index=True)
        return probabilities[once], labels[once], index[once]

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the calibrate role."""
        self._log_report("val")

    def on_test_epoch_end(self) -> None:
        """Log the figures of the test role; `predictions` keeps them for the caller."""
        self._log_report("test", keep=True)

    def _log_report(self, stage: str, *, keep: bool = False) -> None:
        if self.outputs and not self.trainer.sanity_checking:
            probabilities, labels, _ = self.predictions()
            names = np.array(self.trainer.datamodule.class_names)  # type: ignore[attr-defined]
            report = classification_report(names[probabilities.argmax(axis=1)], names[labels])
            for name in ("accuracy", "balanced_accuracy", "f_beta"):
                self.log(f"{stage}/{name}", float(report[name]), prog_bar=name == "accuracy", rank_zero_only=True)
        if not keep:
            self.outputs = []

    def on_test_epoch_start(self) -> None:
        """Forget earlier evaluations."""
        self.outputs = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone's parameters with their own learning rate, then the rest."""
        of_backbone = {id(parameter) for parameter in self.backbone.parameters()}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in of_backbone]
        return decay_groups(self.backbone.parameters(), self.backbone_rate) + decay_groups(rest)
