"""Verification and ranking by a score: are these two the same? `f(scores, same)`, a larger score means more alike."""

from typing import Any, overload

import numpy as np

from embedlab.metrics._arrays import Floats, Integers, as_array, as_flags, as_scores


def roc_auc(scores: Any, same: Any) -> float:
    """Probability that a genuine pair scores above an impostor pair, ties counting half: area under the ROC curve.

    Args:
        scores: (N,) numbers, NumPy or torch; larger is more alike.
        same: (N,) true for a genuine pair (the positive class).

    Raises:
        ValueError: NaN scores, or only one kind of pair.

    Example:
        >>> roc_auc([0.9, 0.4, 0.4, 0.1], [True, True, False, False])
        0.875
    """
    genuine, impostor = _split(scores, same, "roc_auc")
    below = np.searchsorted(impostor, genuine, side="left")
    not_above = np.searchsorted(impostor, genuine, side="right")
    return float((below + not_above).sum(dtype=np.int64) / (2 * len(genuine) * len(impostor)))


def eer(scores: Any, same: Any) -> float:
    """Equal error rate: where false accepts and false rejects are equally frequent.

    Interpolated linearly between the two operating points on either side, as the ROC curve is drawn, so that it does
    not depend on which of them is "nearest".

    Args:
        scores: (N,) numbers, larger is more alike.
        same: (N,) true for a genuine pair.

    Raises:
        ValueError: NaN scores, or only one kind of pair.

    Example:
        >>> eer([0.9, 0.8, 0.3, 0.4, 0.2, 0.1], [1, 1, 1, 0, 0, 0])
        0.3333333333333333
    """
    genuine, impostor = _split(scores, same, "eer")
    false_accepts, accepts = _operating_points(genuine, impostor)
    false_accept_rate = false_accepts / len(impostor)
    false_reject_rate = 1 - accepts / len(genuine)
    after = int((false_reject_rate <= false_accept_rate).argmax())  # never 0: the first point rejects everyone
    before = after - 1
    gap_before = false_reject_rate[before] - false_accept_rate[before]
    gap_after = false_reject_rate[after] - false_accept_rate[after]
    way = gap_before / (gap_before - gap_after)
    return float(false_accept_rate[before] + way * (false_accept_rate[after] - false_accept_rate[before]))


@overload
def tar_at_far(scores: Any, same: Any, far: float) -> float: ...
@overload
def tar_at_far(scores: Any, same: Any, far: Any) -> float | Floats: ...
def tar_at_far(scores: Any, same: Any, far: Any) -> float | Floats:
    """True accept rate at the most lenient threshold whose false accept rate does not exceed `far`.

    Nothing is interpolated: a threshold that exists in the data reaches this rate.

    Args:
        scores: (N,) numbers, larger is more alike.
        same: (N,) true for a genuine pair.
        far: Target share of impostor pairs accepted, in (0, 1]; a number or an array of any shape.

    Raises:
        ValueError: NaN scores, only one kind of pair, or a `far` below one impostor pair in all there are.

    Example:
        >>> tar_at_far([0.9, 0.8, 0.3, 0.4, 0.2, 0.1], [1, 1, 1, 0, 0, 0], 0.5)
        1.0
    """
    genuine, impostor = _split(scores, same, "tar_at_far")
    targets = as_array(far).astype(np.float64)
    if not ((targets > 0) & (targets <= 1)).all():
        raise ValueError(f"tar_at_far needs far in (0, 1], got {far}; it is a share, not a percentage.")
    if targets.size and targets.min() * len(impostor) < 1 - 1e-9:
        raise ValueError(
            f"far={targets.min():g} cannot be measured on {len(impostor)} impostor pairs: even one false accept is "
            f"more than that. Use far >= {1 / len(impostor):g}, or more pairs (all pairs of the set, not a sample)."
        )
    false_accepts, accepts = _operating_points(genuine, impostor)
    # 1e-9: far = 0.07 on 100 impostors must allow 7, and 0.07 * 100 is 7.000000000000001 or 6.999999999999999
    place = np.searchsorted(false_accepts, np.floor(targets * len(impostor) + 1e-9), side="right") - 1
    rates: Floats = accepts[place] / len(genuine)
    return float(rates) if rates.ndim == 0 else rates


def average_precision(scores: Any, positive: Any) -> float:
    """Area under the precision-recall curve as a sum of steps (no interpolation); equal scores are one step.

    Args:
        scores: (N,) numbers; larger is more likely positive.
        positive: (N,) true for the positive class.

    Raises:
        ValueError: NaN scores, or no positive.

    Example:
        >>> average_precision([0.9, 0.8, 0.7], [True, False, True])
        0.8333333333333333
    """
    ordered, flags = _checked(scores, positive, "positive")
    if not flags.any():
        raise ValueError(f"average_precision is undefined without a positive, got {len(flags)} negatives only.")
    false_positives, hits = _operating_points(np.sort(ordered[flags]), np.sort(ordered[~flags]))
    hits, false_positives = hits[1:], false_positives[1:]  # the first point has accepted nobody
    precision = hits / (hits + false_positives)
    return float((np.diff(hits, prepend=0) * precision).sum() / flags.sum())


def _checked(scores: Any, flags: Any, name: str) -> tuple[Floats, Any]:
    checked = as_scores(scores, "scores")
    return checked, as_flags(flags, name, len(checked))


def _split(scores: Any, same: Any, name: str) -> tuple[Floats, Floats]:
    """Genuine and impostor scores, each ascending."""
    checked, flags = _checked(scores, same, "same")
    if not len(checked) or flags.all() or not flags.any():
        raise ValueError(
            f"{name} compares genuine with impostor pairs and needs both, got {int(flags.sum())} genuine and "
            f"{int((~flags).sum())} impostors: a set of one class, or the wrong labels?"
        )
    return np.sort(checked[flags]), np.sort(checked[~flags])


def _operating_points(genuine: Floats, impostor: Floats) -> tuple[Integers, Integers]:
    """Impostors and genuine accepted at each threshold from above the largest score down to the smallest.

    Args:
        genuine: Ascending scores.
        impostor: Ascending scores.

    Returns:
        Two arrays of counts, both starting at 0, one entry more than there are distinct scores.
    """
    thresholds = np.unique(np.concatenate([genuine, impostor]))[::-1]
    accepted = [len(side) - np.searchsorted(side, thresholds, side="left") for side in (impostor, genuine)]
    return np.append(0, accepted[0]), np.append(0, accepted[1])
