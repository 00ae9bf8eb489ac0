"""The trainer's parts that belong to every run."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from embedlab.data.module import ImageData
from embedlab.encoders import Encoder
from embedlab.methods.base import Method

# Advice that does not apply: our batches are decoded already, our samplers share data among ranks themselves
_NOISE = (
    ".*does not have many workers.*",
    ".*number of training batches.*smaller than the logging interval.*",
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    ".*Total length of `list` across ranks is zero.*",
    ".*module\\(s\\) in eval mode at the start of training.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*recommended to use `self.log\\(.*sync_dist=True\\)`.*",
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


def fast_precision() -> Literal["bf16-mixed", "32-true"]:
    """bf16-mixed where the processor or GPU multiplies bfloat16 itself; elsewhere it would be slower than float32."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    able = torch.cpu.get_capabilities()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"


class StepBar(pl.Callback):
    """One bar over all optimizer steps, on stderr, instead of one per epoch.

    Args:
        description: What is being trained.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: tqdm[NoReturn] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Open the bar in the first process."""
        total = int(trainer.estimated_stepping_batches)
        self.bar = tqdm(total=total, desc=self.description, unit="step", disable=not trainer.is_global_zero)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Move on, and show the loss every twentieth step."""
        assert self.bar is not None
        self.bar.update(trainer.global_step - self.bar.n)
        if trainer.global_step % 20 == 0 and "train/loss" in trainer.callback_metrics:
            self.bar.set_postfix(loss=f"{trainer.callback_metrics['train/loss'].item():.3f}", refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Close it."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ARG002
        """Leave the terminal in order."""
        if self.bar is not None:
            self.bar.close()


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
