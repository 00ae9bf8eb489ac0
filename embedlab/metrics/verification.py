"""Verification and ranking by a score: are these two the same? `f(scores, same)`, a larger score means more alike.

`verification_report(embeddings, labels)` compares all pairs of a set, without ever holding them.
"""

from bisect import bisect_left
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np

from embedlab.metrics._arrays import (
    Array,
    Booleans,
    Floats,
    Integers,
    allowed,
    as_array,
    as_flags,
    as_labels,
    as_scores,
    between,
    digest,
)
from embedlab.metrics._pairs import PairCounts, Pairs, Side
from embedlab.metrics._ranking import Problem, Rows
from embedlab.metrics._share import Share, together


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
    _, false_accepts, accepts = _operating_points(*_split(scores, same, "eer"))
    return _equal_errors(false_accepts, accepts)


def roc_curve(scores: Any, same: Any) -> tuple[Floats, Floats, Floats]:
    """Every operating point of a verifier: what the ROC curve is drawn through, straight between the points.

    Args:
        scores: (N,) numbers, larger is more alike.
        same: (N,) true for a genuine pair.

    Returns:
        False accept rate, true accept rate and threshold (accepted is score >= threshold), (T,) each; the first point
        accepts nobody and has threshold infinity, the last accepts everybody.

    Raises:
        ValueError: NaN scores, or only one kind of pair.

    Example:
        >>> far, tar, threshold = roc_curve([0.9, 0.8, 0.3], [True, False, True])
        >>> far.tolist(), tar.tolist(), threshold.tolist()
        ([0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0], [inf, 0.9, 0.8, 0.3])
    """
    genuine, impostor = _split(scores, same, "roc_curve")
    thresholds, false_accepts, accepts = _operating_points(genuine, impostor)
    return false_accepts / len(impostor), accepts / len(genuine), thresholds


def det_curve(scores: Any, same: Any) -> tuple[Floats, Floats, Floats]:
    """Detection error trade-off (ISO/IEC 19795-1): the operating points of `roc_curve` as two errors.

    Args:
        scores: (N,) numbers, larger is more alike.
        same: (N,) true for a genuine pair.

    Returns:
        False accept rate, false reject rate and threshold, (T,) each, as of `roc_curve`; both rates are usually drawn
        on a logarithmic or a normal-quantile scale.

    Raises:
        ValueError: NaN scores, or only one kind of pair.
    """
    genuine, impostor = _split(scores, same, "det_curve")
    thresholds, false_accepts, accepts = _operating_points(genuine, impostor)
    return false_accepts / len(impostor), (len(genuine) - accepts) / len(genuine), thresholds


def best_accuracy(scores: Any, same: Any, *, folds: Any = 10) -> tuple[float, float]:
    """Accuracy at the best threshold, chosen without the pairs it is measured on: the protocol of LFW.

    Each fold is decided at the threshold that is most accurate on all other folds: in the middle between the two
    neighbouring scores, at the higher threshold if several are equally good (Huang et al. 2007, "view 2",
    http://vis-www.cs.umass.edu/lfw/).

    Args:
        scores: (N,) numbers, larger is more alike.
        same: (N,) true for a genuine pair.
        folds: (N,) the number of each pair's fold, or how many folds: then genuine and impostor pairs are each cut
            into that many runs of their order, which gives LFW's folds for LFW's list. No person should be in two.

    Returns:
        The mean over folds, and its standard error (sample deviation over the root of the number of folds).

    Raises:
        ValueError: NaN scores, a number of folds below 2 or above what the pairs allow, or one fold with all genuine or
            all impostor pairs.

    Example:
        >>> best_accuracy([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0], folds=2)
        (1.0, 0.0)
    """
    checked, flags = _checked(scores, same, "same")
    parts = _folds(folds, flags)
    accuracies = []
    for fold in np.unique(parts):
        held = parts == fold
        threshold = _most_accurate(*_split(checked[~held], flags[~held], "best_accuracy"))
        accuracies.append(((checked[held] >= threshold) == flags[held]).mean())
    return float(np.mean(accuracies)), float(np.std(accuracies, ddof=1) / len(accuracies) ** 0.5)


def _folds(folds: Any, flags: Any) -> Integers:
    """(N,) fold of each pair."""
    given = as_array(folds)
    if given.ndim:
        parts = np.unique(as_labels(folds, "folds", len(flags)), return_inverse=True)[1]
        if not all(len(np.unique(parts[kind])) > 1 for kind in (flags, ~flags)):
            raise ValueError(
                "best_accuracy chooses the threshold of a fold on all others, and needs genuine and impostor pairs in "
                f"at least 2 folds each, got genuine in {len(np.unique(parts[flags]))} and impostors in "
                f"{len(np.unique(parts[~flags]))}."
            )
        return parts
    count = int(given) if given.dtype.kind in "iuf" and np.isfinite(given) and int(given) == given else 0
    parts = np.empty(len(flags), dtype=np.int64)
    for kind in (flags, ~flags):
        parts[kind] = np.arange(kind.sum()) * count // max(1, kind.sum())
    if not 2 <= count <= min(flags.sum(), (~flags).sum()):
        raise ValueError(
            "best_accuracy needs at least 2 folds and in each a genuine and an impostor pair, got "
            f"{folds!r} folds for {int(flags.sum())} genuine and {int((~flags).sum())} "
            "impostor pairs."
        )
    return parts


def _most_accurate(genuine: Floats, impostor: Floats) -> float:
    thresholds, false_accepts, accepts = _operating_points(genuine, impostor)
    best = int((accepts - false_accepts).argmax())
    if best == 0:
        return float("inf")
    lower = thresholds[best + 1] if best + 1 < len(thresholds) else thresholds[best]
    return between(thresholds[best], lower)


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
    targets = _checked_targets(far, len(impostor), "tar_at_far")
    _, false_accepts, accepts = _operating_points(genuine, impostor)
    rates: Floats = accepts[_last_within(targets, false_accepts)] / len(genuine)
    return float(rates) if rates.ndim == 0 else rates


@dataclass(frozen=True, eq=False)
class VerificationCurve:
    """Operating points of a verifier over all pairs of a set, thinned for a picture: ROC, DET and precision-recall.

    Args:
        far: (T,) false accept rates, ascending.
        tar: (T,) true accept rate at each.
        precision: (T,) share of the accepted pairs that is genuine; NaN where nobody is accepted.
    """

    far: Floats
    tar: Floats
    precision: Floats


@dataclass(frozen=True)
class VerificationReport:
    """Verification over all pairs of a set.

    Args:
        auc: Area under the ROC curve.
        eer: Equal error rate.
        far: False accept rates asked for.
        tar: True accept rate at each.
        threshold: Lowest cosine accepted at each; infinite where no genuine pair is.
        genuine: Genuine pairs compared.
        impostors: Impostor pairs compared.
        resolution: Cosines closer than this may be one in `auc` and `average_precision`: 1e-12, or more (1e-6 at most)
            where there are too many genuine pairs to hold. All other figures tell apart 1e-12 anyway.
        auc_error: Bound on how far the area of all cosines can be from `auc`: 0 at a resolution of 1e-12. Scores
            without a pattern stay far below it.
        average_precision: Of the genuine among all pairs, by cosine.
        eer_threshold: Lowest cosine accepted where false rejects first do not exceed false accepts.
        curve: For pictures, where points were asked for.
    """

    auc: float
    eer: float
    far: tuple[float, ...]
    tar: tuple[float, ...]
    threshold: tuple[float, ...]
    genuine: int
    impostors: int
    resolution: float
    auc_error: float
    average_precision: float
    eer_threshold: float
    curve: VerificationCurve | None = None

    def to_dict(self) -> dict[str, Any]:
        """What goes into a JSON document: all but the curve."""
        return {name: value for name, value in asdict(self).items() if name != "curve"}


@together
def verification_report(
    embeddings: Any,
    labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    far: Any = None,
    groups: Any = None,
    curve: int = 0,
    over_ranks: bool = False,
) -> VerificationReport:
    """AUC, equal error rate and TAR@FAR over all pairs in bounded memory: N (N - 1) / 2 of a set, N M with a reference.

    What `roc_auc`, `eer` and `tar_at_far` say of the list of all cosines, without the list: the genuine pairs are few
    and are sorted; the impostor pairs stream by and are counted between them, which fixes the whole ROC curve. Where
    the genuine pairs are more than four million, both kinds are counted on a grid, and a second pass tells apart the
    cosines that the equal error rate and each threshold hang on (a third, where a few cells of the grid hold most
    pairs). Cosines are in float64.

    Args:
        embeddings: (N, D) vectors of any norm, NumPy or torch.
        labels: (N,) integers or strings; a pair of one label is genuine.
        reference: (M, D) vectors that each of the embeddings is compared with; None compares these with one another.
        reference_labels: (M,) of the reference.
        far: False accept rates in (0, 1]; None takes 0.1, 0.01, ... as long as they allow 10 impostor pairs.
        groups: (N,) pairs within a group are left out (frames of one track), with a reference a pair ((N,), (M,)).
            Without one also of several kinds, (G, N): one that is shared suffices.
        curve: About how many operating points to keep for a picture; they lie densely on linear and on logarithmic
            axes alike.
        over_ranks: True shares the pairs out among the ranks of torch.distributed: all ranks call with the same arrays
            (see `each_sample_once`) and all get the figures of one process.

    Raises:
        ValueError: Shapes or labels that do not fit, a reference without its labels, a NaN or zero vector, only one
            kind of pair, a `far` below one impostor pair in all there are.

    Example:
        >>> report = verification_report([[1, 0], [9, 1], [0, 1], [1, 9]], ["a", "a", "b", "b"], far=0.25)
        >>> report.auc, report.eer, report.tar, report.impostors
        (1.0, 0.0, (1.0,), 4)
    """
    sides = _sides(embeddings, labels, reference, reference_labels, groups)
    share, settings = Share(over_ranks=over_ranks), np.array([repr((as_array(far).tolist(), curve))])
    parts = [array for side in sides if side for array in (side.rows.values, side.codes, *side.groups)]
    share.refuse_different(lambda: digest(*parts, settings))
    counts = Pairs(*sides, share).count(lambda coarse: _decisive(coarse, _targets(coarse, far)))
    targets = _targets(counts, far)
    false_accepts, accepts = _points(counts)
    impostors, genuine = int(false_accepts[-1]), int(accepts[-1])
    place = _last_within(targets, false_accepts)
    # points 2 i and 2 i + 1 have accepted i levels
    levels = np.append(np.inf, counts.levels[::-1])
    blurred = np.flatnonzero(counts.blurred)
    mixed = counts.genuine[blurred] * (counts.below[2 * blurred + 1] - counts.below[2 * blurred]).astype(np.float64)
    return VerificationReport(
        auc=_area(false_accepts, accepts),
        eer=_equal_errors(false_accepts, accepts),
        far=tuple(targets.tolist()),
        tar=tuple((accepts[place] / genuine).tolist()),
        threshold=tuple(levels[place // 2].tolist()),
        genuine=genuine,
        impostors=impostors,
        resolution=counts.resolution,
        auc_error=float(mixed.sum() / (2.0 * genuine * impostors)),
        average_precision=_precision(false_accepts, accepts, counts.blurred[::-1]),
        eer_threshold=float(levels[(_first_equal(false_accepts, accepts) + 1) // 2]),
        curve=_thinned(false_accepts, accepts, curve) if curve else None,
    )


def _sides(
    embeddings: Any, labels: Any, reference: Any, reference_labels: Any, groups: Any
) -> tuple[Side, Side | None]:
    """What is compared with one another, or with the second."""
    if reference is None and reference_labels is None:
        rows = Rows(embeddings, "embeddings")
        several = [] if groups is None else groups if np.ndim(groups) == 2 else [groups]
        return Side(rows, _codes(labels, "labels", len(rows)), [_codes(g, "groups", len(rows)) for g in several]), None
    problem = Problem(embeddings, labels, reference=reference, reference_labels=reference_labels, groups=groups)
    own, others = ([] if codes is None else [codes] for codes in (problem.query_groups, problem.reference_groups))
    return Side(problem.query, problem.query_codes, own), Side(problem.reference, problem.reference_codes, others)


def _targets(counts: PairCounts, far: Any) -> Floats:
    """(F,) false accept rates that the pairs can measure."""
    genuine, impostors = int(counts.genuine.sum()), int(counts.below[-1])
    if not genuine or not impostors:
        raise ValueError(
            f"verification_report compares genuine with impostor pairs and needs both, got {genuine} genuine and "
            f"{impostors} impostors: a set of one class, a set of classes of one, or groups that exclude the rest?"
        )
    if far is None:
        far = [10.0**-power for power in range(1, 16) if 10.0**-power * impostors >= 10]
    return np.atleast_1d(_checked_targets(far, impostors, "verification_report"))


def _points(counts: PairCounts) -> tuple[Integers, Integers]:
    """False accepts and accepts, (2 L + 2,): two points per level, all above it accepted, and all on it, too."""
    impostors = counts.below[-1]
    accepts = np.repeat(np.append(0, counts.genuine[::-1].cumsum()), 2)
    return np.append(impostors - counts.below[::-1], impostors), accepts


def _decisive(counts: PairCounts, targets: Floats) -> Integers:
    """The levels within which the equal error rate and the thresholds at the targets lie."""
    false_accepts, accepts = _points(counts)
    place = _last_within(targets, false_accepts)
    equal = _first_equal(false_accepts, accepts)
    # point p has accepted p // 2 levels; whether some of the next level fits can be seen only within it, and where only
    # its impostors do, `eer_threshold` is the level after it
    accepted = np.concatenate([place, place + 1, [equal, equal + 1, equal + 2]]) // 2
    return len(counts.levels) - np.unique(np.clip(accepted, 1, len(counts.levels)))


def _thinned(false_accepts: Integers, accepts: Integers, points: int) -> VerificationCurve:
    """Operating points near even steps of either error, on linear and on logarithmic axes."""
    third = max(2, points // 3)
    impostors, genuine = false_accepts[-1], accepts[-1]
    rare = np.searchsorted(false_accepts, np.geomspace(1, impostors, third))
    missed = np.searchsorted(accepts, genuine - np.geomspace(1, genuine, third))
    linear = np.searchsorted(accepts, np.linspace(0, genuine, third))
    last = len(accepts) - 1
    chosen = np.unique(np.clip(np.concatenate([[0, last], rare, rare - 1, missed, missed - 1, linear]), 0, last))
    taken = accepts[chosen] + false_accepts[chosen]
    precision = np.where(taken > 0, accepts[chosen] / np.maximum(taken, 1), np.nan)
    return VerificationCurve(false_accepts[chosen] / impostors, accepts[chosen] / genuine, precision)


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
    _, false_positives, hits = _operating_points(np.sort(ordered[flags]), np.sort(ordered[~flags]))
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


def _codes(labels: Any, name: str, rows: int) -> Integers:
    return np.unique(as_labels(labels, name, rows), return_inverse=True)[1].astype(np.int64)


def _checked_targets(far: Any, impostors: int, name: str) -> Floats:
    given = as_array(far)
    targets = given.astype(np.float64) if given.dtype.kind in "fiub" else np.array(np.nan)
    if not ((targets > 0) & (targets <= 1)).all():
        raise ValueError(f"{name} needs far in (0, 1], got {far}; it is a share, not a percentage.")
    if targets.size and allowed(targets.min(), impostors) < 1:
        raise ValueError(
            f"far={targets.min():g} cannot be measured on {impostors} impostor pairs: even one false accept is "
            f"more than that. Use far >= {1 / impostors:g}, or more pairs (all pairs of the set, not a sample)."
        )
    return targets


def _last_within(targets: Floats, false_accepts: Integers) -> Array:
    """The most lenient operating point that keeps to each target."""
    return np.asarray(np.searchsorted(false_accepts, allowed(targets, int(false_accepts[-1])), side="right") - 1)


def _equal_errors(false_accepts: Integers, accepts: Integers) -> float:
    after = _first_equal(false_accepts, accepts)
    before, past = ((false_accepts[p] / false_accepts[-1], 1 - accepts[p] / accepts[-1]) for p in (after - 1, after))
    gap_before, gap_past = before[1] - before[0], past[1] - past[0]
    way = gap_before / (gap_before - gap_past)
    return float(before[0] + way * (past[0] - before[0]))


def _first_equal(false_accepts: Integers, accepts: Integers) -> int:
    """The first operating point where false rejects do not exceed false accepts; never 0, which rejects everyone."""

    def crossed(point: int) -> bool:
        """Rejects fall and accepts rise from point to point, so that halving finds the first."""
        return bool(1 - accepts[point] / accepts[-1] <= false_accepts[point] / false_accepts[-1])

    return bisect_left(range(len(accepts)), True, key=crossed)


def _area(false_accepts: Integers, accepts: Integers) -> float:
    """Under the curve that is straight between operating points; float64 because the products pass 2^63."""
    heights = (accepts[1:] + accepts[:-1]) / 2
    return float((np.diff(false_accepts) * heights).sum() / (float(false_accepts[-1]) * float(accepts[-1])))


def _precision(false_accepts: Integers, accepts: Integers, blurred: Booleans) -> float:
    """Average precision from two points per level (see `_points`); of a blurred level at its middle."""
    hits, misses = accepts[2::2], false_accepts[2::2]
    found = np.diff(accepts[::2])
    precision = hits / (hits + misses)
    if blurred.any():
        middle = (hits - (found - 1) / 2)[blurred]
        precision[blurred] = middle / (middle + (misses + false_accepts[1:-1:2])[blurred] / 2)
    return float(found @ precision / accepts[-1])


def _operating_points(genuine: Floats, impostor: Floats) -> tuple[Floats, Integers, Integers]:
    """Impostors and genuine accepted at each threshold from above the largest score down to the smallest.

    Args:
        genuine: Ascending scores.
        impostor: Ascending scores.

    Returns:
        The thresholds from infinity down, and two arrays of counts starting at 0, one entry more than there are
        distinct scores.
    """
    thresholds = np.unique(np.concatenate([genuine, impostor]))[::-1]
    accepted = [len(side) - np.searchsorted(side, thresholds, side="left") for side in (impostor, genuine)]
    return np.append(np.inf, thresholds), np.append(0, accepted[0]), np.append(0, accepted[1])
