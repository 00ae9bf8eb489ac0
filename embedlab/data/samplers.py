"""Samplers that yield whole batches of row numbers, the same on every rank but for each rank's own share.

They are given to a DataLoader as `DataLoader(dataset, batch_size=None, sampler=...)`. They derive from
DistributedSampler because they do its work: Lightning then leaves them alone and calls `set_epoch`. With
`ResumableLoader` an epoch can begin in its middle.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from embedlab._ops import world_size

log = logging.getLogger("embedlab")


class _Batches(DistributedSampler[list[int]]):
    """Batches for one rank of `world`; both default to torch.distributed's. `start` batches of a pass are left out."""

    start = 0

    def __init__(self, rows: int, seed: int, rank: int | None, world: int | None) -> None:
        world = world_size() if world is None else world
        if rank is None:
            rank = 0 if world == 1 else None
        super().__init__(range(rows), num_replicas=world, rank=rank, seed=seed)  # type: ignore[arg-type]

    def generator(self) -> np.random.Generator:
        """The epoch's generator, the same on every rank."""
        return np.random.default_rng([self.seed, self.epoch])

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self.draw(), self.start, None)

    def draw(self) -> Iterator[list[int]]:
        """All batches of the epoch."""
        raise NotImplementedError


class ShuffledBatches(_Batches):
    """A new permutation every epoch, cut into global batches of which each rank takes its slice.

    Args:
        rows: Number of samples.
        batch_size: Samples per rank and step. What does not fill a global batch is left out of the epoch.
        seed: The order is a function of (seed, epoch).
        rank: This process; None asks torch.distributed.
        world: Number of processes; None asks torch.distributed.
    """

    def __init__(
        self, rows: int, batch_size: int, *, seed: int = 0, rank: int | None = None, world: int | None = None
    ) -> None:
        super().__init__(rows, seed, rank, world)
        if rows < self.num_replicas:
            raise ValueError(f"{rows} training images cannot be shared by {self.num_replicas} processes.")
        self.rows = rows
        self.batch_size = min(batch_size, rows // self.num_replicas)
        if self.batch_size < batch_size:
            log.warning("batch_size %d is cut to %d: there are only %d images.", batch_size, self.batch_size, rows)

    def __len__(self) -> int:
        return self.rows // (self.batch_size * self.num_replicas)

    def draw(self) -> Iterator[list[int]]:
        """All batches of the epoch."""
        order = self.generator().permutation(self.rows)
        for step in range(len(self)):
            start = (step * self.num_replicas + self.rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()


class BalancedBatches(_Batches):
    """P classes x K images, for losses that need positives; ranks draw different classes, or different images.

    Args:
        labels: Class number of every sample.
        classes_per_batch: P, per rank.
        images_per_class: K; a class with fewer images gives all that it has.
        batches: Steps per epoch; None covers as many samples as there are.
        seed: The draw is a function of (seed, epoch).
        rank: This process; None asks torch.distributed.
        world: Number of processes; None asks torch.distributed.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        classes_per_batch: int,
        *,
        images_per_class: int,
        batches: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        labels = np.asarray(labels)
        super().__init__(len(labels), seed, rank, world)
        if images_per_class < 2 or classes_per_batch < 2:
            raise ValueError(
                "Balanced batches need at least 2 classes (for negatives) and 2 images per class (for positives), got "
                f"classes_per_batch={classes_per_batch}, images_per_class={images_per_class}."
            )
        rows = np.argsort(labels, kind="stable")
        self.members = np.split(rows, np.unique(labels[rows], return_index=True)[1])[1:]  # rows of each class
        lonely = [int(labels[rows[0]]) for rows in self.members if len(rows) < 2]
        if lonely:
            raise ValueError(
                f"{len(lonely)} of {len(self.members)} classes have one image only and so no positive pair, "
                f"first class numbers {lonely[:5]}: add images, or leave these classes out."
            )
        if len(self.members) < classes_per_batch:
            raise ValueError(
                f"A batch of {classes_per_batch} classes cannot be drawn from {len(self.members)}; "
                "lower batch_size, or raise images_per_class."
            )
        self.classes_per_batch = classes_per_batch
        self.images_per_class = images_per_class
        per_step = classes_per_batch * images_per_class * self.num_replicas
        self.batches = batches or max(1, len(labels) // per_step)

    def __len__(self) -> int:
        return self.batches

    def draw(self) -> Iterator[list[int]]:
        """All batches of the epoch."""
        generator = self.generator()
        waiting = [np.zeros(0, np.int64) for _ in self.members]  # images of each class not yet drawn this round
        for _ in range(self.batches):
            batch: list[int] = []
            for rank, chosen in enumerate(self._classes(generator)):
                for number in chosen:
                    wanted = min(self.images_per_class, len(self.members[number]))
                    if len(waiting[number]) < wanted:
                        fresh = generator.permutation(self.members[number])
                        waiting[number] = np.r_[waiting[number], fresh[~np.isin(fresh, waiting[number])]]
                    drawn, waiting[number] = np.split(waiting[number], [wanted])
                    if rank == self.rank:
                        batch += drawn.tolist()
            yield batch

    def _classes(self, generator: np.random.Generator) -> list[np.ndarray]:
        """The classes of every rank for one step; apart from one another while there are enough."""
        count, share = len(self.members), self.classes_per_batch
        if count >= share * self.num_replicas:
            drawn = generator.choice(count, share * self.num_replicas, replace=False)
            return np.split(drawn, self.num_replicas)
        return [generator.choice(count, share, replace=False) for _ in range(self.num_replicas)]


class EvaluationBatches(_Batches):
    """All samples once over all ranks, in order, without padding: ranks may get different numbers of batches."""

    def __init__(self, rows: int, batch_size: int, *, rank: int | None = None, world: int | None = None) -> None:
        super().__init__(rows, 0, rank, world)
        if rows < self.num_replicas:  # a process without any would miss the others' collectives and hang them
            raise ValueError(f"{rows} images to evaluate cannot be shared by {self.num_replicas} processes; use fewer.")
        self.mine = np.arange(rows)[self.rank :: self.num_replicas]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def draw(self) -> Iterator[list[int]]:
        """All batches of the epoch."""
        for start in range(0, len(self.mine), self.batch_size):
            yield self.mine[start : start + self.batch_size].tolist()


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over one of these samplers that can begin an epoch in its middle; nothing before that is decoded.

    Lightning saves and loads it by `state_dict` and `load_state_dict`. Nothing is drawn, and no worker started, before
    the first batch is asked for: only then does the sampler know its epoch. Workers are seeded by (seed, epoch), and
    PyTorch's global generator stays as it is, however often an epoch is begun.

    Args:
        dataset: What takes a batch of row numbers and gives the batch.
        sampler: Whole batches of row numbers.
        workers: Decoding processes, which stay from epoch to epoch.

    Attributes:
        position: Batches of this epoch that were handed out.
        before_batch: Called before every batch, when all that belongs to the batch before it is done.

    Example:
        >>> loader = ResumableLoader(torch.arange(6), ShuffledBatches(6, 2))
        >>> whole = [batch.tolist() for batch in loader]
        >>> loader.load_state_dict({"batches": 1})
        >>> [batch.tolist() for batch in loader] == whole[1:]
        True
    """

    position = 0
    before_batch: Callable[[], None] | None = None
    _begin_at = 0

    def __init__(self, dataset: Any, sampler: _Batches, *, workers: int = 0) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler: Any = self.sampler
        self.position, self._begin_at = self._begin_at, 0
        sampler.start = self.position
        batches: Iterator[Any] | None = None
        while True:
            if self.before_batch is not None:
                self.before_batch()
            if batches is None:
                self.generator.manual_seed(2**20 * sampler.seed + sampler.epoch)
                batches = super().__iter__()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where in the epoch we are."""
        return {"batches": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass there."""
        self._begin_at = state["batches"]
