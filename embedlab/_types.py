"""The records that travel between rooms: Batch -> Embeddings -> Neighbours. Frozen, checked when built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]
Ids = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images on their way into a network.

    Args:
        views: One or more versions of the same images, each (B, C, H, W); row i of every view is image `index[i]`.
        labels: (B,) int64 class numbers, or None without labels.
        index: (B,) int64 global sample numbers; random choices are keyed by them.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None
    index: torch.Tensor

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("Batch needs at least one view, got none.")
        rows = [len(view) for view in self.views]
        if any(n != len(self.index) for n in rows) or (self.labels is not None and len(self.labels) != len(self.index)):
            raise ValueError(
                f"Batch parts disagree: views have {rows} rows, labels "
                f"{None if self.labels is None else len(self.labels)}, index {len(self.index)}; all must be B."
            )

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Copy to a device; Lightning calls this on every batch."""
        return Batch(
            tuple(view.to(device, non_blocking=non_blocking) for view in self.views),
            None if self.labels is None else self.labels.to(device, non_blocking=non_blocking),
            self.index.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors with what they stand for.

    Args:
        vectors: (N, D) float32.
        labels: N strings, or None.
        ids: (N,) int64, unique.
        paths: N image paths, or None.
    """

    vectors: Vectors
    labels: list[str] | None
    ids: Ids
    paths: list[str] | None = None

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.vectors.dtype != np.float32:
            raise ValueError(
                f"Embeddings.vectors must be (N, D) float32, got {self.vectors.shape} {self.vectors.dtype}."
            )
        n = len(self.vectors)
        for name, part in (("labels", self.labels), ("ids", self.ids), ("paths", self.paths)):
            if part is not None and len(part) != n:
                raise ValueError(f"Embeddings has {n} vectors but {len(part)} {name}; they must be row by row.")

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k nearest gallery templates of each query, nearest first.

    Args:
        ids: (Q, k) int64, -1 where the gallery has fewer than k templates.
        labels: Q lists of k labels, None where the id is -1.
        scores: (Q, k) float32 cosine, larger is nearer, NaN where the id is -1.
    """

    ids: Ids
    labels: list[list[str | None]]
    scores: Vectors

    def __post_init__(self) -> None:
        if self.ids.shape != self.scores.shape or self.ids.ndim != 2 or len(self.labels) != len(self.ids):
            raise ValueError(
                f"Neighbours needs ids and scores (Q, k) and Q lists of labels, got ids {self.ids.shape}, "
                f"scores {self.scores.shape}, {len(self.labels)} lists."
            )

    def __len__(self) -> int:
        return len(self.ids)
