"""A Lightning callback that watches retrieval on the validation images while training. Imported on demand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from embedlab._ops import gather
from embedlab._types import Batch
from embedlab.metrics import recall_at_k


class Monitor(pl.Callback):
    """Logs `val/recall@1`: leave-one-out over the validation images of all ranks, each counted once."""

    def __init__(self) -> None:
        self.parts: list[dict[str, torch.Tensor]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Forget the last epoch."""
        self.parts = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Batch,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Keep the embeddings of one batch."""
        if isinstance(outputs, dict) and outputs.get("labels") is not None and "embeddings" in outputs:
            self.parts.append(outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather, put every image in once, and log."""
        if not self.parts or trainer.sanity_checking:
            return
        embeddings, labels, index = (
            gather(torch.cat([part[name] for part in self.parts])).cpu().numpy()
            for name in ("embeddings", "labels", "index")
        )
        _, once = np.unique(index, return_index=True)
        if len(np.unique(labels[once])) == len(once):  # no image has a class-mate to find
            return
        value = recall_at_k(embeddings[once], labels[once], k=1)
        pl_module.log("val/recall@1", float(value), prog_bar=True, rank_zero_only=True)
