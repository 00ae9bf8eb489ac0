"""Whitening: embeddings made to vary alike in every direction, by the statistics of a training set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedlab._ops import normalize

_LEAST_SHRINKAGE = 1e-4  # of the covariance towards its mean variance, so that no direction is divided by nothing


class Whitening(nn.Module):
    """Take the mean from unit vectors and divide each direction by how much they scatter in it.

    Made by `Whitening.fit`: y = S^(-power/2) (x - m), up to a factor that no cosine sees, for their mean m and
    covariance S. With labels S is that within classes, the normalisation of Hatch, Kajarekar and Stolcke 2006
    (https://www.isca-archive.org/interspeech_2006/hatch06_interspeech.html), which makes small what differs between
    images of one identity; without, that of all vectors, as in Jégou and Chum 2012 (https://hal.science/hal-00722622).

    Args:
        features: D, of the vectors.
        rank: Directions whose scatter is known; it is the same in all others.

    Shape: (B, D) unit vectors to (B, D) float32, not normalised. As built it leaves them as they are.
    """

    mean: Tensor
    basis: Tensor
    gain: Tensor

    def __init__(self, features: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("basis", torch.zeros(rank, features))  # orthonormal rows
        self.register_buffer("gain", torch.zeros(rank))  # what each direction is scaled by, less 1

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that make this module again."""
        return {"features": self.basis.shape[1], "rank": self.basis.shape[0]}

    @classmethod
    def fit(
        cls, vectors: np.ndarray | Tensor, labels: Sequence[Any] | np.ndarray | None = None, *, power: float = 1.0
    ) -> Whitening:
        """Measure mean and scatter; the covariance is shrunk as far as Ledoit and Wolf 2004 say.

        As many vectors are counted as are free around the means: N less the labels, which is N - 1 without labels.

        Args:
            vectors: (N, D) embeddings of training images, of any length; never of those that are tested.
            labels: N; the scatter is that around each label's mean. None takes that around the mean of all.
            power: 1 whitens wholly, 0.5 half the way (in logarithms), 0 only takes the mean away; in [0, 1].

        Raises:
            ValueError: Values that are not finite, fewer than two vectors or labels of another number, no label with
                two of them, vectors that are all alike, or another power.
        """
        given = torch.as_tensor(vectors).detach().cpu().double()
        if given.ndim != 2 or len(given) < 2 or (labels is not None and len(labels) != len(given)):
            shape, told = tuple(given.shape), "none" if labels is None else len(labels)
            raise ValueError(
                f"Whitening needs (N, D) vectors, N >= 2, and labels for all or none; got {shape}, labels {told}."
            )
        rows = normalize(given).numpy()
        if not 0 <= power <= 1:
            raise ValueError(f"Whitening needs a power in [0, 1], got {power}; 1 whitens wholly, 0.5 half the way.")
        if not np.isfinite(rows).all():
            raise ValueError("Whitening needs finite vectors, got NaN or infinity; has the training diverged?")
        mean = rows.mean(axis=0)
        rest = rows - (mean if labels is None else _class_means(rows, np.asarray(labels)))
        free = len(rows) - (1 if labels is None else len(set(np.asarray(labels).tolist())))
        variances, basis, shrinkage = _scatter(rest, free)
        average = float((rest**2).sum() / rest.size)
        if average < 1e-12:
            raise ValueError(
                "Whitening found no difference between the vectors of one identity: they are all alike. A collapsed "
                "network, or copies of one image under each label?"
            )
        variances = (1 - shrinkage) * variances + shrinkage * average
        least = shrinkage * average if len(basis) < len(mean) else variances.min()
        whitening = cls(len(mean), len(basis))
        whitening.mean.copy_(torch.from_numpy(mean))
        whitening.basis.copy_(torch.from_numpy(basis))
        whitening.gain.copy_(torch.from_numpy((variances / least) ** (-power / 2) - 1))
        return whitening

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):  # small directions come from a difference
            rest = embeddings.float() - self.mean
            return rest + ((rest @ self.basis.T) * self.gain) @ self.basis


def _class_means(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each row the mean of its label's rows."""
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.max() < 2:
        raise ValueError(
            f"Whitening by labels needs two vectors of one label, but each of {len(counts)} labels has one; without "
            "labels it takes the scatter of all."
        )
    sums = np.zeros((len(counts), rows.shape[1]))
    np.add.at(sums, numbers, rows)
    means: np.ndarray = (sums / counts[:, None])[numbers]
    return means


def _scatter(rest: np.ndarray, free: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Variances along the principal directions (R,), these directions (R, D), and how far to shrink the variances."""
    count, size = rest.shape
    if size <= count:
        variances, vectors = np.linalg.eigh(rest.T @ rest / count)
        basis = vectors.T
    else:  # a covariance of D x D would be large
        _, singular, basis = np.linalg.svd(rest, full_matrices=False)
        known = singular > 1e-7 * singular[0]
        variances, basis = singular[known] ** 2 / count, basis[known]
    # vectors that lie around means of their own count for fewer, which is all that differs from
    # Ledoit and Wolf 2004 (https://doi.org/10.1016/S0047-259X(03)00096-4), all of whose sums follow from the variances
    spread = float((variances**2).sum() - variances.sum() ** 2 / size)
    noise = float(((rest**2).sum(axis=1) ** 2).mean() - (variances**2).sum()) / free
    shrinkage = min(noise / spread, 1.0) if spread > 0 else 1.0
    return np.maximum(variances, 0.0), basis, max(shrinkage, _LEAST_SHRINKAGE)
