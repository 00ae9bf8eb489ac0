"""Health of an embedding: has it collapsed, does it fill its space, do hubs attract every query? No labels needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from embedlab.metrics._arrays import Floats, as_array
from embedlab.metrics._ranking import BUDGET, Rows, Search
from embedlab.metrics.retrieval import _checked_depth, _nearest


def feature_std(vectors: Any) -> float:
    """Standard deviation per dimension of unit vectors, mean over dimensions; Chen & He 2021, section 4.1.

    (https://arxiv.org/abs/2011.10566) It is 0 when all images get one vector, and 1 / sqrt(D) when the directions are
    spread evenly over the sphere. Features after a ReLU share an orthant and stay somewhat below that.

    Args:
        vectors: (N, D) of any norm, NumPy or torch.

    Raises:
        ValueError: Not (N, D), or a row that is zero, NaN or infinite.

    Example:
        >>> feature_std([[1, 0], [-1, 0], [0, 1], [0, -1]])  # 1 / sqrt(2)
        0.7071067811865476
        >>> feature_std([[1, 2], [1, 2], [2, 4]])
        0.0
    """
    rows = Rows(vectors, "vectors")
    mean = sum((block.sum(axis=0) for block in _unit_blocks(rows)), np.zeros(rows.dim)) / len(rows)
    squares = sum((((block - mean) ** 2).sum(axis=0) for block in _unit_blocks(rows)), np.zeros(rows.dim))
    spread = float(np.sqrt(squares / len(rows)).mean())
    return spread if spread > 1e-12 else 0.0  # the rounding of a mean of equal rows


def effective_rank(vectors: Any) -> float:
    """Exponential of the entropy of the normalised singular values, Roy & Vetterli 2007, definition 1.

    The same number is RankMe (Garrido et al. 2023, eq. 1 and 2, https://arxiv.org/abs/2210.02885), which predicts how
    well features serve other tasks. It goes from 1 (all vectors on one line) to min(N, D). As there, the vectors are
    taken as they are, neither centred nor normalised; RankMe's 1e-7 against log 0 is not needed.

    Args:
        vectors: (N, D), NumPy or torch. N should be a multiple of D, or N is what limits the figure.

    Raises:
        ValueError: Not (N, D), a NaN or infinite number, or nothing but zeros.

    Example:
        >>> round(effective_rank([[1, 0], [0, 1], [1, 0], [0, 1]]), 6), round(effective_rank([[1, 2], [2, 4]]), 6)
        (2.0, 1.0)
    """
    values = as_array(vectors)
    if values.ndim != 2 or values.dtype.kind not in "fiub" or 0 in values.shape:
        raise ValueError(f"effective_rank needs (N, D) numbers, got shape {values.shape} of {values.dtype}.")
    values = values if values.shape[0] >= values.shape[1] else values.T
    dim = values.shape[1]
    step = max(dim, BUDGET // (8 * dim))
    blocks = [slice(start, start + step) for start in range(0, len(values), step)]
    # of NumPy: Python's max passes over NaN
    largest = float(np.max([np.abs(values[block].astype(np.float64)).max() for block in blocks]))
    if not np.isfinite(largest) or largest == 0:
        raise ValueError(
            "effective_rank needs finite numbers that are not all zero, got "
            f"{'zeros' if largest == 0 else 'NaN or inf'}: diverged training, or a dead network?"
        )
    triangle: Floats = np.empty((0, dim))  # of the rows so far: it has their singular values, and keeps the small ones
    for block in blocks:
        rows = np.concatenate([triangle, values[block].astype(np.float64) / largest])
        triangle = np.asarray(np.linalg.qr(rows, mode="r"))
    singular = np.linalg.svd(triangle, compute_uv=False)
    # below this there is only rounding
    singular = singular[singular > singular[0] * max(values.shape) * np.finfo(np.float64).eps]
    shares = singular / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def alignment(first: Any, second: Any, *, alpha: float = 2.0) -> float:
    """Mean distance of the unit vectors of two views of an image, to the power alpha; smaller is better.

    Wang & Isola 2020, section 4.1.1 (https://arxiv.org/abs/2005.10242).

    Args:
        first: (N, D) of any norm, NumPy or torch.
        second: (N, D), row i another view of the image of row i of `first`.
        alpha: Exponent, > 0; the paper's 2 makes it 2 - 2 cosine.

    Raises:
        ValueError: Shapes that differ, a row without direction, alpha not above 0.

    Example:
        >>> alignment([[1, 0], [0, 1]], [[2, 0], [1, 0]])
        1.0
    """
    if not alpha > 0:
        raise ValueError(f"alignment needs alpha > 0, got {alpha}; the paper uses 2.")
    one, two = Rows(first, "first"), Rows(second, "second")
    if one.values.shape != two.values.shape:
        raise ValueError(
            f"alignment needs two views of the same images, row by row; got {one.values.shape} and {two.values.shape}."
        )
    pairs = zip(_unit_blocks(one), _unit_blocks(two), strict=True)
    return float(sum((((a - b) ** 2).sum(axis=1) ** (alpha / 2)).sum() for a, b in pairs) / len(one))


def uniformity(vectors: Any, *, t: float = 2.0) -> float:
    """Logarithm of the mean over all pairs of exp(-t distance^2) between unit vectors; smaller is better.

    Wang & Isola 2020, section 4.1.2 (https://arxiv.org/abs/2005.10242). It is 0 when all vectors are one, and about
    -t 2 + 2 t^2 / D when they are spread evenly over a sphere of many dimensions. All pairs are counted, in blocks of
    bounded memory: N^2 D multiplications.

    Args:
        vectors: (N, D) of any norm, NumPy or torch, N >= 2.
        t: Steepness of the Gaussian potential, > 0; the paper's is 2.

    Raises:
        ValueError: Not (N, D), fewer than 2 rows, a row without direction, t not above 0.

    Example:
        >>> uniformity([[1, 0], [-1, 0]])  # distance^2 is 4
        -8.0
    """
    if not t > 0:
        raise ValueError(f"uniformity needs t > 0, got {t}; the paper uses 2.")
    rows = Rows(vectors, "vectors")
    if len(rows) < 2:
        raise ValueError("uniformity is a mean over pairs and needs at least 2 vectors, got 1.")
    nearest, total = -np.inf, 0.0  # relative to the largest exponent: exp(-4 t) underflows for a large t
    side = max(1, min(int(np.sqrt(BUDGET / 8)), BUDGET // (16 * rows.dim)))
    for start in range(0, len(rows), side):
        block = rows.unit(slice(start, start + side))
        for other in range(start, len(rows), side):
            exponents = 2 * t * (block @ rows.unit(slice(other, other + side)).T - 1)  # distance^2 = 2 - 2 cosine
            if other == start:
                exponents = exponents[np.triu_indices(len(block), 1)]
            if exponents.size:
                peak = max(nearest, float(exponents.max()))
                total = total * np.exp(nearest - peak) + float(np.exp(exponents - peak).sum())
                nearest = peak
    return float(nearest + np.log(total) - np.log(len(rows) * (len(rows) - 1) / 2))


def hubness(vectors: Any, *, k: int = 10) -> float:
    """Skewness of how often each vector is among the k nearest of the others, Radovanovic et al. 2010, eq. 1.

    (https://jmlr.org/papers/v11/radovanovic10a.html) Near 0 is healthy; well above 1 a few hubs are everyone's
    neighbours, so that a gallery names the same identities again and again.

    Args:
        vectors: (N, D) of any norm, NumPy or torch; ranked by cosine, ties go to the lower row.
        k: Neighbours that are counted, below N.

    Returns:
        The skewness; 0 where all vectors are chosen equally often.

    Raises:
        ValueError: Not (N, D), a row without direction, k out of range.

    Example:
        >>> round(hubness([[9, 0, 0], [9, 2, 0], [9, 0, 2], [9, -2, 0], [9, 0, -2]], k=1), 3)  # the first is a hub
        1.291
    """
    k = _checked_depth(k, "hubness")
    rows = Rows(vectors, "vectors")
    if k >= len(rows):
        raise ValueError(f"hubness with k={k} needs more than k vectors, got {len(rows)}; lower k.")
    counts = np.zeros(len(rows))
    step = max(1, min(8192, BUDGET // (16 * max(k, rows.dim))))
    for _, ids, _ in _nearest(rows, Search(rows), k, True, step):
        counts += np.bincount(ids.ravel(), minlength=len(rows))
    away = counts - counts.mean()
    spread = np.sqrt((away**2).mean())
    return float((away**3).mean() / spread**3) if spread > 0 else 0.0


def _unit_blocks(rows: Rows) -> Iterator[Floats]:
    """All rows as float64 of norm 1, a block of bounded memory at a time."""
    step = max(1, BUDGET // (32 * rows.dim))
    for start in range(0, len(rows), step):
        yield rows.unit(slice(start, start + step))
