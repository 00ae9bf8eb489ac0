"""The trainer's parts that belong to every run."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from embedlab._types import Batch
from embedlab.data.embedding import identity_hash
from embedlab.data.module import ImageData
from embedlab.encoders import Encoder, ResNet, Whitening
from embedlab.methods.base import Method

log = logging.getLogger("embedlab")

_MANY = 10_000  # images that tell how embeddings scatter
_NUMBERS = 50_000_000  # in all of their embeddings: 400 MB of float64

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


class StepBar(ProgressBar):
    """One bar over all optimizer steps of the run, on stderr: loss, k-NN accuracy, images per second, time left.

    The images are those of all ranks, each once however many views are cut from it, over the seconds of training alone.

    Args:
        description: What is being trained.
    """

    def __init__(self, description: str = "fit") -> None:
        super().__init__()
        self.description = description
        self.bar: tqdm[NoReturn] | None = None
        self.enabled = True
        self.interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file gets few lines
        self.images, self.since, self.rate = 0, 0.0, 0.0

    def disable(self) -> None:
        """Show nothing."""
        self.enabled = False

    def enable(self) -> None:
        """Show the bar of the next run."""
        self.enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Open the bar in the first process, at the step that a resumed run has reached."""
        total = trainer.estimated_stepping_batches
        self.bar = tqdm(
            total=None if math.isinf(total) else int(total),
            initial=trainer.global_step,
            desc=self.description,
            unit="step",
            smoothing=0.1,
            mininterval=self.interval,
            disable=not (self.enabled and trainer.is_global_zero),
        )
        self.rate = 0.0
        self._start_clock()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Move on; the figures are read seldom, because the loss has to come from the device."""
        assert self.bar is not None
        self.images += len(batch) * trainer.world_size if isinstance(batch, Batch) else 0
        seconds = time.perf_counter() - self.since
        if seconds >= self.interval:
            rate = self.images / seconds
            self.rate = rate if self.rate == 0 else 0.7 * self.rate + 0.3 * rate
            self._start_clock()
            self.bar.set_postfix_str(self._figures(trainer), refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Evaluation is no training: its seconds do not count."""
        self._start_clock()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Show the last figures and close."""
        if self.bar is not None:
            self.bar.set_postfix_str(self._figures(trainer))
            self.bar.close()

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ARG002
        """Leave the terminal in order."""
        if self.bar is not None:
            self.bar.close()

    def _start_clock(self) -> None:
        self.images, self.since = 0, time.perf_counter()

    def _figures(self, trainer: pl.Trainer) -> str:
        """Such as "loss 1.234, k-NN 0.871, 2,345 images/s"."""
        found = trainer.callback_metrics
        named = {"loss": "train/loss", "k-NN": "val/knn"}
        told = [f"{name} {float(found[key]):.3f}" for name, key in named.items() if key in found]
        return ", ".join([*told, *([f"{self.rate:,.0f} images/s"] if self.rate else [])])


class Compile(pl.Callback):
    """Compile the networks of a method, in place: parameters, checkpoints and the saved encoder stay what they are.

    Worth it for long runs of one image size on a GPU. On a CPU nothing happens unless `cpu` is set: compiling takes
    minutes there and gains little beside bf16 and channels-last.

    Args:
        mode: Of torch.compile, such as "max-autotune"; None is its default.
        cpu: Compile on a CPU too.
    """

    def __init__(self, mode: str | None = None, *, cpu: bool = False) -> None:
        self.mode = mode
        self.cpu = cpu

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After batch normalisation was synchronised and the weights were put on their device."""
        if trainer.strategy.root_device.type == "cpu" and not self.cpu:
            return
        for child in pl_module.children():
            if any(True for _ in child.parameters()):
                child.compile(mode=self.mode)


class ViewSizes(pl.Callback):
    """Train on smaller views first: most of the learning for a part of the arithmetic.

    Args:
        sizes: Side of the views in pixels from which epoch on, such as `{0: 24, 120: 32}`; before the first epoch named
            it is the data's image_size. Validation and the saved encoder always see image_size.
    """

    def __init__(self, sizes: dict[int, int]) -> None:
        if not sizes or min(sizes) < 0 or min(sizes.values()) < 1:
            raise ValueError(f"ViewSizes takes epoch: pixels, such as {{0: 24, 120: 32}}; got {sizes}.")
        self.sizes = sizes

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """By the epoch alone, so that a resumed run goes on alike."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ImageData):
            raise ValueError(f"ViewSizes needs an ImageData, got {type(data).__name__}.")
        begun = [epoch for epoch in self.sizes if epoch <= trainer.current_epoch]
        data.view_size = self.sizes[max(begun)] if begun else data.image_size


def trained_encoder(method: Method, data: ImageData, *, pool: int | list[int] | None = None) -> Encoder:
    """The network that a method has trained, with the data's preprocessing and the identities that its labels named.

    Args:
        method: After training.
        data: Set up.
        pool: Features that the `ResNet` gives from now on, with the same weights; None leaves it as it was trained.
    """
    seen = data.class_names[: data.num_classes] if method.uses_labels else []
    return Encoder(
        method.backbone if pool is None else _repooled(method, pool),
        method.embedding_head,
        identities=method.identities | {identity_hash(label) for label in seen},
        **data.preprocessing,  # type: ignore[arg-type]
    )


def _repooled(method: Method, pool: int | list[int]) -> ResNet:
    """The method's network with its weights and other features."""
    trained, head = method.backbone, method.embedding_head
    if not isinstance(trained, ResNet) or head is not None:
        kept = "" if head is None else f" and a {type(head).__name__} after it"
        raise ValueError(
            "encoder.pool changes the features of a ResNet that has no head in the encoder, got "
            f"{type(trained).__name__}{kept}. Set model.init_args.keep_head to false, or leave it out."
        )
    backbone = ResNet(**trained.config | {"pool": pool})
    backbone.load_state_dict(trained.state_dict())
    return backbone


def training_whitening(encoder: Encoder, method: Method, data: ImageData, power: float, **options: Any) -> Whitening:
    """The scatter of training images, around each label's mean if the method was trained with labels.

    Args:
        encoder: What `trained_encoder` gave.
        method: As there.
        data: As there; of many images at most 10,000 are embedded (fewer of more than 5,000 numbers each), evenly from
            all classes.
        power: See `Whitening.fit`.
        options: Of `Encoder.embed`.

    Raises:
        ValueError: See `Whitening.fit`.
    """
    assert data.source is not None
    rows = data.dataset("train").rows
    labels = np.asarray(data.source.labels, dtype=object)[rows] if method.uses_labels else None
    most = min(_MANY, _NUMBERS // encoder.dim)
    some = data.source.subset(rows[_evenly(labels, len(rows), most, seed=data.seed)].tolist())
    found = encoder.embed(some, on_error=data.on_error, **options)
    return Whitening.fit(found.vectors, None if labels is None else found.labels, power=power)


def _evenly(labels: np.ndarray | None, count: int, most: int, *, seed: int) -> np.ndarray:
    """At most so many of these rows: as many of each label as fit, two at least, then of as many labels as fit."""
    random = np.random.default_rng([seed, 2])
    drawn = random.permutation(count)
    if labels is not None and count > most:
        _, numbers = np.unique(labels[drawn], return_inverse=True)
        numbers = random.permutation(int(numbers.max()) + 1)[numbers]  # which ones fit is no matter of the alphabet
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], numbers[order])
        each = max(2, most // (int(numbers.max()) + 1))
        drawn = drawn[order[np.arange(count) - starts < each]]
    return np.sort(drawn[:most])


class SaveEncoder(pl.Callback):
    """Leave the trained encoder, with its preprocessing, in `encoder/` of the run folder.

    Args:
        folder: Where to; None takes `encoder` in the trainer's default_root_dir.
        pool: Another `pool` of the `ResNet` than it was trained with, such as [2, 1]: features of an earlier stage,
            trained through the last one alone, beside the last one's. The head must not be kept.
        whiten: Power of the whitening by the training images that the encoder ends with, see `Whitening.fit`: 1 for a
            method trained with labels, 0.75 for one without are good first values. None leaves it out.
    """

    def __init__(
        self, folder: str | Path | None = None, *, pool: int | list[int] | None = None, whiten: float | None = None
    ) -> None:
        if whiten is not None and not 0 <= whiten <= 1:
            raise ValueError(f"SaveEncoder takes whiten in [0, 1] or None, got {whiten}; 1 whitens wholly.")
        self.folder = folder
        self.pool = pool
        self.whiten = whiten
        self._saved = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Say before the training what could not be done after it."""
        if self.pool is not None and isinstance(pl_module, Method):
            _repooled(pl_module, self.pool)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Nothing is saved yet."""
        self._saved = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save once, from the first process."""
        self._save(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that was resumed after its last step has no end of training; it may have died before it was saved."""
        if not self._saved:
            self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = True
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not isinstance(pl_module, Method) or not isinstance(data, ImageData):
            return
        folder = self.folder or Path(trainer.default_root_dir) / "encoder"
        encoder = trained_encoder(pl_module, data, pool=self.pool).to(pl_module.device)
        encoder.save(folder)  # whatever becomes of the rest
        if self.whiten is None:
            return
        options = {
            "precision": "bfloat16" if "bf16" in str(trainer.precision) else "float32",
            "progress": trainer.progress_bar_callback is not None,
        }
        try:
            encoder.whitening = training_whitening(encoder, pl_module, data, self.whiten, **options)
        except ValueError as error:
            log.warning("%s stays without its whitening. %s", folder, error)
        else:
            encoder.save(folder)
