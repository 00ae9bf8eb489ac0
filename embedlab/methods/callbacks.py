"""The trainer's parts that belong to every run."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from embedlab.data.module import ImageData
from embedlab.encoders import Encoder
from embedlab.methods.base import Method


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
