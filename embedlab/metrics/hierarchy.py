"""How bad is a mistake? Two kinds of apple are nearer to each other than an apple is to a carton of milk."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embedlab.metrics._arrays import Integers, as_labels


def hierarchical_distance(
    prediction: Any, target: Any, parents: Mapping[Any, Any] | Sequence[Mapping[Any, Any]]
) -> Integers:
    """Height of the lowest class that holds both prediction and truth: 0 is right, 1 a near miss.

    Args:
        prediction: (N,) fine labels, integers or strings, such as the label of the nearest neighbour.
        target: (N,) the truth.
        parents: Fine label to coarse label; or several such mappings, each from the labels of the one before. Two that
            share no class on any level are one further apart than the number of mappings.

    Returns:
        (N,) integers from 0 to the number of mappings + 1.

    Raises:
        ValueError: Lengths that do not fit, or a label without a parent.

    Example:
        >>> kinds = {"gala": "apple", "fuji": "apple", "oat milk": "milk"}
        >>> hierarchical_distance(["gala", "gala", "gala"], ["gala", "fuji", "oat milk"], kinds).tolist()
        [0, 1, 2]
    """
    truth: list[Any] = as_labels(target, "target").tolist()
    guess: list[Any] = as_labels(prediction, "prediction", len(truth)).tolist()
    levels = [parents] if isinstance(parents, Mapping) else list(parents)
    distance = np.zeros(len(truth), dtype=np.int64)
    for number, level in enumerate([None, *levels]):
        if level is not None:
            guess, truth = _up(guess, level, number), _up(truth, level, number)
        distance += np.array([a != b for a, b in zip(guess, truth, strict=True)], dtype=np.int64)
    return distance


def hierarchical_report(
    prediction: Any, target: Any, parents: Mapping[Any, Any] | Sequence[Mapping[Any, Any]]
) -> dict[str, float]:
    """How far off predictions are in a hierarchy of classes (Bertinetto et al. 2020, https://arxiv.org/abs/1912.09393).

    Args:
        prediction: See `hierarchical_distance`, as for the other arguments.
        target: (N,) the truth.
        parents: Fine label to coarse label, or several levels.

    Returns:
        accuracy, coarse_accuracy (the parent is right), near_misses (share of the mistakes whose parent is right; NaN
        without a mistake), distance (mean over all), mistake_severity (mean over the mistakes; NaN without one).

    Raises:
        ValueError: As `hierarchical_distance`, and for no rows.

    Example:
        >>> kinds = {"gala": "apple", "fuji": "apple", "oat milk": "milk"}
        >>> hierarchical_report(["gala", "gala", "gala"], ["gala", "fuji", "oat milk"], kinds)["near_misses"]
        0.5
    """
    distance = hierarchical_distance(prediction, target, parents)
    if not len(distance):
        raise ValueError("hierarchical_report needs at least one row, got none.")
    mistakes = distance[distance > 0]
    return {
        "accuracy": float((distance == 0).mean()),
        "coarse_accuracy": float((distance <= 1).mean()),
        "near_misses": float((mistakes == 1).mean()) if len(mistakes) else float("nan"),
        "distance": float(distance.mean()),
        "mistake_severity": float(mistakes.mean()) if len(mistakes) else float("nan"),
    }


def _up(labels: list[Any], parents: Mapping[Any, Any], level: int) -> list[Any]:
    orphan = next((label for label in labels if label not in parents), None)
    if orphan is not None:
        raise ValueError(
            f"parents has no entry for {orphan!r} on level {level}; every label that occurs needs its coarser one, and "
            "labels must be of one type (1 is not '1')."
        )
    return [parents[label] for label in labels]
