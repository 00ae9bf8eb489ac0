"""A Lightning callback that watches the representation on held-out images while training. Imported on demand."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from embedlab._ops import keyed_uniform
from embedlab._types import Batch
from embedlab.data import ImageData
from embedlab.data.views import keyed_views
from embedlab.metrics import (
    alignment,
    each_sample_once,
    effective_rank,
    feature_std,
    knn_accuracy,
    linear_probe_accuracy,
    recall_at_k,
    uniformity,
)

log = logging.getLogger("embedlab")

PAIRED = 512  # images of which two views are embedded for the alignment
PENALTY = 0.01  # of the linear probe: fixed, because to choose it costs five fits
COLLAPSED_STD = 0.02  # as a share of 1 / sqrt(D)
COLLAPSED_RANK = 1.5


class Monitor(pl.Callback):
    """Logs figures of the held-out (calibrate) images, embedded as the saved encoder will embed them.

    That is the backbone's features for self-supervised methods, and the embedding for metric learning. Without labels:
    `val/feature_std`, `val/effective_rank`, `val/uniformity` and, where the data is an `ImageData`, `val/alignment` of
    two training views that are the same at every evaluation. With labels also `val/recall@1` and `val/knn`, each image
    against all others, and `val/probe`, a linear classifier fitted on one half of the images and tested on the other.
    The test role is never touched, and the training images neither: the bank is small, so that `val/knn` and
    `val/probe` are lower than what `embedlab evaluate --protocol` finds with all training images.

    Every image counts once, whatever the number of ranks. Images, halves and views are chosen by keys of the image
    numbers; no random generator is touched, so that a watched run trains like one that is not.

    An evaluation is left out while its cost, as measured at the last one, is above `share` of the seconds that were
    trained since then. The first one and that of the last epoch are never left out. Lightning's own loop over the
    validation loader goes on; without the network it costs hardly more than the decoding of images that are not cached.

    Args:
        share: Of the training time that evaluations may take; 1 and more evaluates at every validation.
        images: At most about so many held-out images are looked at, always the same ones.
        k: Voters of the k-NN, see `knn_accuracy`.
        temperature: Of the k-NN's weights.

    Raises:
        ValueError: A setting out of range.
    """

    def __init__(self, *, share: float = 0.05, images: int = 4096, k: int = 20, temperature: float = 0.1) -> None:
        if not share > 0:
            raise ValueError(f"Monitor needs share > 0 (of the training time), got {share}; 0.05 is usual.")
        if images < 2 or k < 1 or not temperature > 0:
            raise ValueError(
                f"Monitor needs images >= 2, k >= 1 and temperature > 0, got {images}, {k} and {temperature}."
            )
        self.share = share
        self.images = images
        self.k = k
        self.temperature = temperature
        self.evaluations = 0
        self._warned = False
        self._due = False
        self._cost = 0.0  # seconds of the last evaluation
        self._started = self._ended = 0.0
        self._fraction = self._paired = 1.0
        self._seen: list[tuple[Tensor, ...]] = []  # vectors (n, D), labels (n,), index (n,)
        self._pairs: list[tuple[Tensor, ...]] = []  # vectors (n, D) of two views, index (n,)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Decide, the same on all ranks, whether to look this time, and at which share of the images."""
        self._started = time.perf_counter()
        self._seen, self._pairs = [], []
        self._due = not trainer.sanity_checking and bool(trainer.strategy.broadcast(self._is_due(trainer)))
        loader: Any = trainer.val_dataloaders
        loader = loader[0] if isinstance(loader, list | tuple) else loader
        dataset: Any = getattr(loader, "dataset", None)
        held_out = len(dataset) if hasattr(dataset, "__len__") else 0
        self._fraction = min(1.0, self.images / max(1, held_out))
        self._paired = min(self._fraction, PAIRED / max(1, held_out))

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        at_the_end = trainer.should_stop or trainer.global_step >= trainer.estimated_stepping_batches
        return self.evaluations == 0 or at_the_end or self._cost <= self.share * (self._started - self._ended)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,
    ) -> None:
        """Embed those images of a batch that were chosen."""
        if not self._due or dataloader_idx > 0 or not isinstance(outputs, dict) or "images" not in outputs:
            return
        index, labels = outputs["index"], outputs["labels"]
        draw = keyed_uniform(index, 1, seed=0)[:, 0]
        chosen, paired = draw < self._fraction, draw < self._paired
        data = getattr(trainer, "datamodule", None)
        views = _two_views(data, index[paired]) if paired.any() and isinstance(data, ImageData) else ()
        with trainer.precision_plugin.val_step_context():
            if chosen.any():
                labels = torch.full_like(index, -1) if labels is None else labels
                vectors = pl_module(outputs["images"][chosen]).float()
                self._seen.append((vectors, labels[chosen], index[chosen]))
            if views:
                self._pairs.append((*(pl_module(view).float() for view in views), index[paired]))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather, put every image in once, and log."""
        if not self._due:
            return
        seen, pairs = _everyone(self._seen), _everyone(self._pairs)
        self._seen, self._pairs = [], []
        if seen is None:
            return
        if trainer.is_global_zero:
            vectors, labels, index = seen
            figures = self._figures(vectors, labels, index, pairs)
            for name, value in figures.items():
                pl_module.log(f"val/{name}", value, prog_bar=name == "knn", rank_zero_only=True)
            self._warn(figures, *vectors.shape)
        self.evaluations += 1
        self._ended = time.perf_counter()
        self._cost = self._ended - self._started

    def _figures(
        self, vectors: np.ndarray, labels: np.ndarray, index: np.ndarray, pairs: list[np.ndarray] | None
    ) -> dict[str, float]:
        norms = np.linalg.norm(np.concatenate([vectors, *(pairs or [])[:2]]), axis=1)
        lost = ~(np.isfinite(norms) & (norms > 0))
        if lost.any():
            log.warning(
                "%d of %d held-out embeddings are zero, NaN or infinite, so nothing is measured: a dead or diverged "
                "network. Lower the learning rate, or warm it up for longer.",
                int(lost.sum()),
                len(lost),
            )
            return {}
        figures = {"feature_std": feature_std(vectors), "effective_rank": effective_rank(vectors)}
        if len(vectors) > 1:
            figures["uniformity"] = uniformity(vectors)
        if pairs is not None:
            figures["alignment"] = alignment(pairs[0], pairs[1])
        if labels.max() >= 0:
            figures |= self._with_labels(vectors, labels, index)
        return figures

    def _with_labels(self, vectors: np.ndarray, labels: np.ndarray, index: np.ndarray) -> dict[str, float]:
        figures = {}
        if len(np.unique(labels)) < len(labels):  # else no image has a class-mate to find
            figures["recall@1"] = recall_at_k(vectors, labels, k=1)
            figures["knn"] = knn_accuracy(vectors, labels, k=self.k, temperature=self.temperature)
        bank = keyed_uniform(torch.from_numpy(index), 2, seed=0)[:, 1].numpy() < 0.5
        if len(np.unique(labels[bank])) > 1 and np.isin(labels[~bank], labels[bank]).any():
            figures["probe"] = linear_probe_accuracy(
                vectors[bank], labels[bank], vectors[~bank], labels[~bank], regularization=PENALTY
            )
        return figures

    def _warn(self, figures: dict[str, float], rows: int, dim: int) -> None:
        """Say once, in words, what the figures show."""
        if self._warned or "feature_std" not in figures or min(rows, dim) < 8:
            return
        spread, rank = figures["feature_std"] * math.sqrt(dim), figures["effective_rank"]
        if spread < COLLAPSED_STD or rank < COLLAPSED_RANK:
            self._warned = True
            log.warning(
                "The representation has collapsed: all %d held-out images get almost the same direction (standard "
                "deviation %.4f of the 1/sqrt(%d) of a healthy one, effective rank %.1f of %d). Usual causes: a "
                "learning rate too high, no batch normalisation in the head of a method without negatives, a "
                "momentum too low, or views that leave nothing in common. It rarely recovers: stop and change one.",
                rows,
                spread,
                dim,
                rank,
                min(rows, dim),
            )


def _two_views(data: ImageData, index: Tensor) -> tuple[Tensor, Tensor]:
    """Two training views of held-out images (row numbers of the source), the same at every evaluation."""
    dataset = data.dataset("calibrate")
    batch: Batch = dataset[np.searchsorted(dataset.rows, index.cpu().numpy()).tolist()]
    images, views = batch.views[0].to(index.device), keyed_views(data.views)
    made: list[Tensor] = []
    for epoch in range(2):  # a data module whose method takes one view gives another one in another epoch
        if len(made) < 2:
            made += views(images, index, size=data.image_size, seed=data.seed, epoch=epoch, normalize=data.normalize)
    return made[0], made[1]


def _everyone(parts: list[tuple[Tensor, ...]]) -> list[np.ndarray] | None:
    """All ranks' rows, each image once, in the order of the image numbers, which stand last; None if there are none."""
    own = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)] or [np.zeros(0)] * 3
    index, *rows = each_sample_once(own[-1], *own[:-1])
    return [*rows, index] if len(index) else None
