"""The trainer's parts that belong to every run."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl

from embedlab.data.module import ImageData
from embedlab.encoders import Encoder
from embedlab.methods.base import Method


# Advice that does not apply: our batches are decoded already, our samplers share data among ranks themselves
_NOISE = (
    ".*does not have many workers.*",
    ".*number of training batches.*smaller than the logging interval.*",
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    ".*No seed found, seed set to.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Detected call of `lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",
)


def quiet() -> None:
    """Silence Lightning's hints about hardware, products and workers; its warnings about the run stay."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)


class SaveEncoder(pl.Callback):
    """Leave the trained encoder, with its preprocessing, in `encoder/` of the run folder.

    Args:
        folder: Where to; None takes `encoder` in the trainer's default_root_dir.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save once, from the first process."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not isinstance(pl_module, Method) or not isinstance(data, ImageData):
            return
        encoder = Encoder(pl_module.backbone, pl_module.embedding_head, **data.preprocessing)  # type: ignore[arg-type]
        encoder.save(self.folder or Path(trainer.default_root_dir) / "encoder")
