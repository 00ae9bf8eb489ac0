"""ImageData: a folder, manifest or torchvision data set as a LightningDataModule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from embedlab._types import Batch
from embedlab.data.degradations import Degrade
from embedlab.data.images import SKIP_LIMIT, Fit, OnError, report_skipped
from embedlab.data.samplers import BalancedBatches, EvaluationBatches, ResumableLoader, ShuffledBatches
from embedlab.data.sources import Source, open_source, refuse_gaps
from embedlab.data.splits import split_by_class, split_by_group, split_by_sample, write_split
from embedlab.data.views import FixedViews, PerImage, Views, WholeBatch, color_statistics, keyed_views, to_float

log = logging.getLogger("embedlab")


class ImageBatches(Dataset[Batch]):
    """Rows of a source as batches of uint8 images; decoded once and kept while they fit into the cache.

    Args:
        source: Where the images are.
        rows: Row numbers of the source that belong here; they are the batch's `index`.
        numbers: Class number of every row of the source, or None.
        image_size: Side in pixels.
        channels: 3 or 1.
        fit: How images become square.
        on_error: What an unreadable file does.
        cache_gib: Up to this many GiB are kept in memory.
        turns: Classes made of each class, see `ImageData`.
        warps: And of each of these, see there. With v = turns * warps.count variants samples are numbered through,
            row * v + variant, and so are `index` and, with the class in place of the row, the labels.
    """

    def __init__(
        self,
        source: Source,
        rows: np.ndarray,
        *,
        numbers: np.ndarray | None,
        image_size: int,
        channels: int = 3,
        fit: Fit = "crop",
        on_error: OnError = "stop",
        cache_gib: float = 4.0,
        turns: int = 1,
        warps: FixedViews | None = None,
    ) -> None:
        self.source = source
        self.rows = rows
        self.numbers = numbers
        self.image_size = image_size
        self.channels = channels
        self.fit: Fit = fit
        self.on_error: OnError = on_error
        self.warps = warps
        self.ways = 1 if warps is None else warps.count
        self.variants = turns * self.ways
        self.skipped: dict[str, str] = {}
        self.cache: Tensor | None = None
        if len(rows) * channels * image_size**2 <= cache_gib * 2**30:
            images, self.rows = self._decode(rows)
            self.cache = torch.from_numpy(images)

    def _decode(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read rows; the limit of skipped images holds for all rows of the role, not for one batch."""
        images, kept, skipped = self.source.read(
            rows, self.image_size, channels=self.channels, how=self.fit, on_error=self.on_error, skip_limit=None
        )
        if new := [(name, reason) for name, reason in skipped if name not in self.skipped]:
            self.skipped |= dict(new)
            report_skipped(list(self.skipped.items()), len(self.rows), SKIP_LIMIT)
        return images, np.asarray(kept)

    @property
    def labels(self) -> np.ndarray:
        """Class number of each sample."""
        if self.numbers is None:
            raise ValueError("The data has no labels, but balanced batches or a supervised loss need them.")
        labels: np.ndarray = self.numbers[self.rows]
        return (labels[:, None] * self.variants + np.arange(self.variants)).ravel()

    def __len__(self) -> int:
        return len(self.rows) * self.variants

    def __getitem__(self, positions: list[int]) -> Batch:
        places, variant = np.divmod(positions, self.variants)
        rows = self.rows[places]
        if self.cache is None:
            images, kept = self._decode(rows)
            there = np.isin(rows, kept)
            rows, variant, view = rows[there], variant[there], torch.from_numpy(images)
        else:
            view = self.cache[places]
        labels = None if self.numbers is None else torch.from_numpy(self.numbers[rows] * self.variants + variant)
        turn, way = np.divmod(variant, self.ways)
        view = _turned(view, turn)
        if self.warps is not None and labels is not None and way.any():
            view = _warped(view, torch.from_numpy(way > 0), labels, self.warps)
        return Batch((view,), labels, torch.from_numpy(rows * self.variants + variant))


def _turned(images: Tensor, turn: np.ndarray) -> Tensor:
    """Each image (B, C, S, S) by quarter turns, from turn 4 on of its mirror image."""
    for number in set(turn.tolist()) - {0}:
        chosen = torch.from_numpy(turn == number)
        image = images[chosen].flip(-1) if number >= 4 else images[chosen]
        images[chosen] = image.rot90(number % 4, (2, 3))
    return images


def _warped(images: Tensor, chosen: Tensor, keys: Tensor, warps: FixedViews) -> Tensor:
    """The chosen images (B, C, S, S) uint8, each bent in the way of its key (B,)."""
    grids = warps.drawn(keys[chosen], images.shape[-1])
    bent = F.grid_sample(to_float(images[chosen]), grids, padding_mode=warps.pad, align_corners=False)
    images[chosen] = bent.mul_(255).round_().byte()
    return images


class ImageData(pl.LightningDataModule):
    """Images with labels, split into the roles train, calibrate and test.

    The training role gives random views on the device; calibrate (validation) and test give the plain image.

    Args:
        root: A folder of images (label = the image's folder), a CSV or Parquet manifest (`path,label[,split,...]`), a
            torchvision data set by name, or a `Source`.
        image_size: Side of the network's input in pixels.
        decode_size: Side at which training images are kept before views are cut from them; None takes image_size.
        channels: 3 for colour, 1 for grey.
        fit: How an image of another shape becomes square: "crop", "stretch", "pad" or "ink", see `fit_image`.
        mean: Per channel, of images in [0, 1]; None is ImageNet's.
        std: As mean.
        select: Keep the rows of a manifest whose columns have these values, such as `{photo_set: train}`.
        split: Roles by identity ("class": no label is in two roles), by the column `group`, by sample, or from the
            manifest's column `split` ("column"); "none" trains on everything.
        fractions: Shares of train, calibrate and test.
        labels_per_class: Train on this many images of each class only, drawn with the seed; a class that has fewer
            gives all, with a warning.
        batch_size: Images per process and step.
        images_per_class: K of balanced batches of P classes x K images, P = batch_size / K; None shuffles.
        batches_per_epoch: Steps per epoch of balanced batches; None covers as many images as there are.
        views: Random augmentation of the training images. In place of `Views` a transform of one image by
            torchvision, albumentations or lightly (see `PerImage`), or any callable that makes a view, or a tuple of
            views, of a batch in [0, 1] (see `WholeBatch`). Normalising is left to `mean` and `std`.
        turns: Classes made of each training class: 4 are its quarter turns, 8 also those of its mirror image, as in
            Santoro et al. 2016 (https://arxiv.org/abs/1605.06065). For pictures that show something else when turned,
            such as characters; the encoder remembers the data's classes alone.
        warps: Further classes made of each of these: `count` in all, the class itself and others of which each has all
            its images bent in a way of its own, drawn as `FixedViews` draws views. For few classes of drawings.
        test_views: Go into the trained `Encoder`, which averages over them; training does not know them.
        degrade: Bad conditions for some of the views, whatever they are; None leaves them as they are.
        seed: Of the split, the order and the views.
        workers: Decoding processes for data that does not fit into the cache.
        cache_gib: Decoded images up to this size are kept in memory, so that later epochs decode nothing.
        on_error: "stop" at the first unreadable image, or "skip" (logged; more than one image and 1 % of a role is an
            error).
    """

    def __init__(
        self,
        root: str | Path | Source,
        *,
        image_size: int = 112,
        decode_size: int | None = None,
        channels: int = 3,
        fit: Fit = "crop",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        select: dict[str, str] | None = None,
        split: Literal["class", "group", "sample", "column", "none"] = "class",
        fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
        labels_per_class: int | None = None,
        batch_size: int = 128,
        images_per_class: int | None = None,
        batches_per_epoch: int | None = None,
        views: Views | PerImage | WholeBatch | Callable[[Tensor], Any] = Views(),  # noqa: B008 - frozen, so sharing it is harmless
        turns: Literal[1, 4, 8] = 1,
        warps: FixedViews | Mapping[str, Any] | None = None,
        test_views: FixedViews | Mapping[str, Any] | None = None,
        degrade: Degrade | None = None,
        seed: int = 0,
        workers: int = 0,
        cache_gib: float = 4.0,
        on_error: OnError = "stop",
    ) -> None:
        super().__init__()
        sizes = {"image_size": image_size, "batch_size": batch_size}
        sizes |= {"decode_size": decode_size or image_size, "batches_per_epoch": batches_per_epoch or 1}
        sizes |= {"labels_per_class": 1 if labels_per_class is None else labels_per_class}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"ImageData needs {name} >= 1, got {value}.")
        if turns not in (1, 4, 8):
            raise ValueError(f"ImageData takes turns 1, 4 (quarter turns) or 8 (also mirrored), got {turns}.")
        if images_per_class is not None and not 2 <= images_per_class <= batch_size // 2:
            raise ValueError(
                f"Balanced batches of batch_size {batch_size} need images_per_class from 2 (for positives) to "
                f"{batch_size // 2} (for negatives), got {images_per_class}; null shuffles all images instead."
            )
        self.root = root
        self.image_size = image_size
        self.view_size = image_size  # of training views; smaller for a while where `ViewSizes` says so
        self.decode_size = decode_size or image_size
        self.channels = channels
        self.fit: Fit = fit
        self.mean, self.std = color_statistics(channels, mean, std)
        self.select = select
        self.split = split
        self.fractions = fractions
        self.labels_per_class = labels_per_class
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.batches_per_epoch = batches_per_epoch
        self.views = views
        self.turns = turns
        self.warps = FixedViews.of(warps)
        self.test_views = FixedViews.of(test_views)
        self.degrade = degrade
        self.seed = seed
        self.workers = workers
        self.cache_gib = cache_gib
        self.on_error: OnError = on_error
        self.source: Source | None = None
        self._datasets: dict[str, ImageBatches] = {}

    @property
    def num_targets(self) -> int:
        """Number of classes in training: those of the data with all that are made of them."""
        return self.num_classes * self._variants

    @property
    def _variants(self) -> int:
        """Classes that each class becomes."""
        return self.turns * (1 if self.warps is None else self.warps.count)

    @property
    def preprocessing(self) -> dict[str, object]:
        """What an `Encoder` trained on this data must do to an image: its keyword arguments."""
        views = {} if self.test_views is None else {"test_views": self.test_views}
        return views | {
            "image_size": self.image_size,
            "channels": self.channels,
            "mean": self.mean,
            "std": self.std,
            "fit": self.fit,
        }

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read the file list and draw the roles once; write them to split.csv in the run folder."""
        if self.source is not None:
            return
        source = self.root if isinstance(self.root, Source) else open_source(self.root)
        if self.select:
            source = source.select(self.select)
        self.roles = self._draw_roles(source)
        self.class_names, self.numbers = _number_classes(source, self.roles)
        self.num_classes = len(set(np.asarray(source.labels)[self.roles == "train"])) if source.labels else 0
        self.source = source
        for role in ("train", "calibrate", "test"):
            log.info("%s: %d images", role, int((self.roles == role).sum()))
        if self.trainer is not None and self.trainer.is_global_zero and self.trainer.logger is not None:
            write_split(Path(self.trainer.default_root_dir) / "split.csv", source, self.roles)

    def _draw_roles(self, source: Source) -> np.ndarray:
        if self.split == "none":
            return np.full(len(source), "train", dtype=object)
        if self.split == "column":
            return _roles_of_column(source)
        if self.split == "group":
            if "group" not in source.columns:
                raise ValueError(
                    f"split=group needs a column 'group'; {self.root} has {sorted(source.columns) or 'none'}."
                )
            refuse_gaps(source.columns["group"], "group", source.names)
            return split_by_group(source.columns["group"], self.fractions, seed=self.seed)
        if self.split == "sample":
            return split_by_sample(source.names, source.labels, fractions=self.fractions, seed=self.seed)
        if source.labels is None:
            raise ValueError(f"split=class needs labels, but {self.root} has none; use split=sample or split=none.")
        return split_by_class(source.labels, self.fractions, seed=self.seed)

    def dataset(self, role: str) -> ImageBatches:
        """The images of one role."""
        if role not in self._datasets:
            if self.source is None:
                raise ValueError("Call setup() first; a Trainer does it by itself.")
            rows = np.flatnonzero(self.roles == role)
            if self.warps is not None and self.numbers is None:
                raise ValueError(f"warps makes further classes of each class, but {self.root} has no labels.")
            if role == "train" and self.labels_per_class is not None:
                rows = self._few_per_class(rows)
            self._datasets[role] = ImageBatches(
                self.source,
                rows,
                numbers=self.numbers,
                image_size=self.decode_size if role == "train" else self.image_size,
                channels=self.channels,
                fit=self.fit,
                on_error=self.on_error,
                cache_gib=self.cache_gib,
                turns=self.turns if role == "train" else 1,
                warps=self.warps if role == "train" else None,
            )
        return self._datasets[role]

    def _few_per_class(self, rows: np.ndarray) -> np.ndarray:
        if self.numbers is None:
            raise ValueError(f"labels_per_class needs labels, but {self.root} has none.")
        counts = np.bincount(self.numbers[rows], minlength=self.num_classes)
        if self.labels_per_class is not None and (short := int((counts < self.labels_per_class).sum())):
            log.warning(
                "labels_per_class %d: %d of %d training classes have fewer images (the smallest %d), and all of theirs "
                "are taken.",
                *(self.labels_per_class, short, self.num_classes, counts.min()),
            )
        rows = np.random.default_rng([self.seed, 1]).permutation(rows)
        chosen = [rows[self.numbers[rows] == number][: self.labels_per_class] for number in range(self.num_classes)]
        return np.sort(np.concatenate(chosen))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless variety: shuffled or balanced batches of uint8 images."""
        dataset = self.dataset("train")
        sampler: ShuffledBatches | BalancedBatches
        if self.images_per_class is None:
            sampler = ShuffledBatches(len(dataset), self.batch_size, seed=self.seed)
        else:
            sampler = BalancedBatches(
                dataset.labels,
                self._classes_per_batch(self.images_per_class),
                images_per_class=self.images_per_class,
                batches=self.batches_per_epoch,
                seed=self.seed,
            )
        return self._loader(dataset, sampler)

    def _classes_per_batch(self, images_per_class: int) -> int:
        numbers, counts = np.unique(self.dataset("train").labels, return_counts=True)
        lonely = sorted({self.class_names[number // self._variants] for number in numbers[counts < 2]})
        if lonely:
            raise ValueError(
                f"{len(lonely)} of {self.num_classes} training classes have one image only and so no positive pair: "
                f"{', '.join(lonely[:5])}. Add images of them, take them out of the data, or set "
                "images_per_class to null for a loss that needs no positives."
            )
        wanted = self.batch_size // images_per_class
        if wanted > self.num_targets:
            log.warning("There are %d training classes, so batches hold %d, not %d.", *[self.num_targets] * 2, wanted)
        return min(wanted, self.num_targets)

    def val_dataloader(self) -> DataLoader[Batch] | list[object]:
        """The calibrate role, in order; nothing where it is empty."""
        return self._evaluation("calibrate")

    def test_dataloader(self) -> DataLoader[Batch] | list[object]:
        """The test role, in order; nothing where it is empty."""
        return self._evaluation("test")

    def _evaluation(self, role: str) -> DataLoader[Batch] | list[object]:
        if not (self.roles == role).any():
            return []
        dataset = self.dataset(role)
        return self._loader(dataset, EvaluationBatches(len(dataset), self.batch_size))

    def _loader(
        self, dataset: ImageBatches, sampler: ShuffledBatches | BalancedBatches | EvaluationBatches
    ) -> DataLoader[Batch]:
        return ResumableLoader(dataset, sampler, workers=0 if dataset.cache is not None else self.workers)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:  # noqa: ARG002
        """Make the views where the network is, and normalise them."""
        trainer = self.trainer
        (images,) = batch.views
        if trainer is None or not trainer.training:
            return Batch((self.plain(images),), batch.labels, batch.index)
        key = {"seed": self.seed, "epoch": trainer.current_epoch}
        normalize = self.normalize if self.degrade is None else None
        views = keyed_views(self.views)(images, batch.index, size=self.view_size, normalize=normalize, **key)
        if self.degrade is not None:
            degraded = (self.degrade(view, batch.index, view=number, **key) for number, view in enumerate(views))
            views = tuple(self.normalize(view) for view in degraded)
        return Batch(views, batch.labels, batch.index)

    def plain(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 as the Encoder sees it: without augmentation, at image_size, normalised."""
        images = to_float(images)
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return self.normalize(images)

    def normalize(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to zero mean and unit deviation, as the Encoder does inside."""
        shape = (1, -1, 1, 1)
        return (images - images.new_tensor(self.mean).view(shape)) / images.new_tensor(self.std).view(shape)


def _roles_of_column(source: Source) -> np.ndarray:
    """The manifest's own roles; "val" and "valid" are other names of calibrate."""
    roles = np.array(
        [{"val": "calibrate", "valid": "calibrate"}.get(role, role) for role in source.column("split")], dtype=object
    )
    unknown = sorted(set(roles) - {"train", "calibrate", "test"})
    if unknown:
        raise ValueError(f"Column split must hold train, calibrate (or val) and test; got {unknown[:3]}.")
    if not (roles == "train").any():
        raise ValueError("Column split has no row 'train', so there is nothing to train on.")
    return roles


def _number_classes(source: Source, roles: np.ndarray) -> tuple[list[str], np.ndarray | None]:
    """Training classes are 0 ... num_classes - 1 in sorted order; classes that are only in other roles follow."""
    if source.labels is None:
        return [], None
    labels = np.asarray(source.labels, dtype=object)
    training = sorted(set(labels[roles == "train"]))
    names = training + sorted(set(labels) - set(training))
    number = {name: position for position, name in enumerate(names)}
    return names, np.array([number[label] for label in labels], dtype=np.int64)
