"""Clustering: do the clusters of the embeddings agree with the labels?"""

from typing import Any

import numpy as np

from embedlab.metrics._arrays import Array, Floats, as_count, as_labels
from embedlab.metrics._ranking import Rows


def normalized_mutual_information(clusters: Any, labels: Any) -> float:
    """Mutual information of two partitions over the mean of their entropies (Strehl and Ghosh 2002; arithmetic mean).

    Not corrected for chance: many small clusters score high by themselves, which `adjusted_rand_index` does not allow.

    Args:
        clusters: (N,) integers or strings; their names do not matter.
        labels: (N,) the other partition.

    Returns:
        0 for independent partitions, 1 for equal ones, also if both consist of one set.

    Raises:
        ValueError: Lengths that do not fit, no rows.

    Example:
        >>> normalized_mutual_information([5, 5, 3, 3], ["a", "a", "b", "b"])
        1.0
    """
    joint, first, second = _sizes(clusters, labels, "normalized_mutual_information")
    entropies = _entropy(first) + _entropy(second)
    if entropies == 0:
        return 1.0
    return min(1.0, max(0.0, 2 * (entropies - _entropy(joint)) / entropies))


def adjusted_rand_index(clusters: Any, labels: Any) -> float:
    """Share of pairs on which two partitions agree, corrected for chance: Hubert and Arabie 1985, eq. 5.

    Args:
        clusters: (N,) integers or strings; their names do not matter.
        labels: (N,) the other partition.

    Returns:
        1 for equal partitions, 0 on average for random ones; can be negative.

    Raises:
        ValueError: Lengths that do not fit, no rows.

    Example:
        >>> adjusted_rand_index([5, 5, 3, 3], ["a", "a", "b", "b"])
        1.0
    """
    sizes = _sizes(clusters, labels, "adjusted_rand_index")
    together, first, second = (float((n * (n - 1) / 2).sum()) for n in sizes)
    pairs = float(sizes[0].sum() * (sizes[0].sum() - 1) / 2)
    if first == second and together == first:  # equal partitions; also where chance has no room
        return 1.0
    expected = first * second / pairs
    return (together - expected) / ((first + second) / 2 - expected)


def clustering_report(
    embeddings: Any, labels: Any, *, clusters: int | None = None, restarts: int = 10, seed: int = 0
) -> dict[str, float]:
    """NMI and ARI of k-means clusters of the unit vectors with the labels, as of Oh Song et al. 2016.

    Args:
        embeddings: (N, D) vectors of any norm, NumPy or torch.
        labels: (N,) integers or strings.
        clusters: How many; None takes the number of classes.
        restarts: Runs of k-means (k-means++ starts, scikit-learn); the one with the smallest inertia counts.
        seed: Of the starts; the same seed gives the same clusters.

    Returns:
        nmi and ari.

    Raises:
        ValueError: Shapes that do not fit, a NaN or zero vector, clusters not between 1 and N, restarts below 1.

    Example:
        >>> clustering_report([[1, 0], [9, 1], [0, 1], [1, 9]], ["a", "a", "b", "b"])
        {'nmi': 1.0, 'ari': 1.0}
    """
    from sklearn.cluster import KMeans

    rows = Rows(embeddings, "embeddings")
    truth = as_labels(labels, "labels", len(rows))
    count = len(np.unique(truth)) if clusters is None else as_count(clusters, "clustering_report needs clusters to be")
    restarts = as_count(restarts, "clustering_report needs restarts to be")
    if count > len(rows):
        raise ValueError(f"clustering_report needs clusters between 1 and the {len(rows)} rows, got {count}.")
    unit = np.empty((len(rows), rows.dim), dtype=np.float32)
    for start in range(0, len(rows), 8192):
        block = slice(start, start + 8192)
        unit[block] = rows.unit(block)
    found = KMeans(count, n_init=restarts, random_state=seed).fit_predict(unit)
    return {"nmi": normalized_mutual_information(found, truth), "ari": adjusted_rand_index(found, truth)}


def _sizes(clusters: Any, labels: Any, name: str) -> tuple[Floats, Floats, Floats]:
    """How many samples are in each pair of sets that has any, in each cluster, and of each label."""
    first = as_labels(clusters, "clusters")
    second = as_labels(labels, "labels", len(first))
    if not len(first):
        raise ValueError(f"{name} needs at least one row, got none.")
    (_, first_codes), (b, second_codes) = (np.unique(side, return_inverse=True) for side in (first, second))
    joint = np.unique(first_codes * len(b) + second_codes, return_counts=True)[1]
    ours, theirs = np.bincount(first_codes), np.bincount(second_codes)
    return joint.astype(np.float64), ours.astype(np.float64), theirs.astype(np.float64)


def _entropy(counts: Array) -> float:
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
