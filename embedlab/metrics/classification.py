"""Classification when classes are unequal: the whole set of figures from one confusion matrix."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from embedlab.metrics._arrays import (
    Array,
    Booleans,
    Floats,
    Integers,
    as_array,
    as_count,
    as_flags,
    as_labels,
    as_scores,
    between,
    encode_together,
)
from embedlab.metrics.verification import average_precision, roc_auc

Norm = Literal["l1", "l2", "max"]


def confusion_matrix(prediction: Any, target: Any, *, classes: Any = None) -> tuple[Integers, list[Any]]:
    """Count how often each class was predicted as each.

    Args:
        prediction: (N,) integers or strings.
        target: (N,) the truth.
        classes: The classes in the order wanted; None takes all that occur, sorted.

    Returns:
        (C, C) counts, row = truth, column = prediction, and the C classes.

    Raises:
        ValueError: Lengths or label types that do not fit, no rows, a label outside `classes`.

    Example:
        >>> confusion_matrix(["a", "b", "b"], ["a", "a", "b"])
        (array([[1, 1],
               [0, 1]]), ['a', 'b'])
    """
    truth = as_labels(target, "target")
    guess = as_labels(prediction, "prediction", len(truth))
    if not len(truth):
        raise ValueError("confusion_matrix needs at least one row, got none.")
    guess_codes, truth_codes, found = encode_together(guess, truth, "prediction and target")
    names: Array = found
    if classes is not None:
        names = as_labels(classes, "classes")
        encode_together(found, names, "labels and classes")  # refuses strings against numbers
        order = {value: number for number, value in enumerate(names.tolist())}
        strange = [value for value in found.tolist() if value not in order]
        if strange or len(order) != len(names):
            raise ValueError(
                f"classes must hold every label once: "
                f"{f'{strange[0]!r} occurs in the data but not in classes' if strange else 'a class is listed twice'}."
            )
        place = np.array([order[value] for value in found.tolist()], dtype=np.int64)
        guess_codes, truth_codes = place[guess_codes], place[truth_codes]
    count = len(names)
    matrix = np.bincount(truth_codes * count + guess_codes, minlength=count * count).reshape(count, count)
    return matrix.astype(np.int64), names.tolist()


def classification_report(
    prediction: Any, target: Any, *, scores: Any = None, positive: Any = None, beta: float = 1.0, classes: Any = None
) -> dict[str, float]:
    """Accuracy, balanced_accuracy, precision, recall, f_beta, f1, specificity, fpr, fnr, mcc; with scores auc and more.

    Two classes 0 and 1 (or False and True), or any two with `positive`, give the figures of the positive class.
    Otherwise each figure is the plain mean over the classes that occur in the target, each against the rest. Balanced
    accuracy is the mean recall over classes that occur, for two classes the mean of true-positive and true-negative
    rate. F1 is Dice's coefficient. MCC is Matthews' correlation, for many classes Gorodkin's, and 0 where its
    denominator is. A class that occurs but is never predicted has precision 0. What the data does not define (the
    recall of a class that does not occur) is NaN.

    Args:
        prediction: (N,) integers or strings, NumPy or torch.
        target: (N,) the truth.
        scores: For auc and average_precision: (N,) score of the positive class, or (N, C) one column per class in the
            order of `classes` (sorted if that is None); the mean over classes of one class against the rest.
        positive: The positive class among two.
        beta: Weight of recall against precision in f_beta: 2 for missed defects that cost more than false alarms.
        classes: All classes, where some may be absent from this data.

    Returns:
        Name to value; auc and average_precision only if scores came.

    Raises:
        ValueError: Lengths or types that do not fit, a positive class that is not one of two, beta not above 0.

    Example:
        >>> report = classification_report([1, 1, 0, 0], [1, 0, 0, 0])
        >>> report["precision"], report["recall"], report["fpr"]
        (0.5, 1.0, 0.3333333333333333)
    """
    if not beta > 0:
        raise ValueError(f"classification_report needs beta > 0, got {beta}; 1 is F1, 2 weighs recall more.")
    matrix, names = _binary_first(*confusion_matrix(prediction, target, classes=classes))
    chosen = _positive(names, positive)
    hits, support, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    per_class = _one_against_rest(hits, support, predicted, int(matrix.sum()), beta)
    occurring = matrix.sum(axis=1) > 0
    wanted = np.array([chosen]) if chosen is not None else np.flatnonzero(occurring)
    report = {
        "accuracy": float(np.trace(matrix) / matrix.sum()),
        "balanced_accuracy": float(per_class["recall"][occurring].mean()),
        **{name: float(values[wanted].mean()) for name, values in per_class.items()},
        "mcc": _matthews(matrix),
    }
    if scores is not None:
        columns, truth = _columns(as_array(scores), as_labels(target, "target"), names, wanted, chosen)
        report["auc"] = _mean_over(roc_auc, columns, truth)
        report["average_precision"] = _mean_over(average_precision, columns, truth)
    return report


def multilabel_report(prediction: Any, target: Any, *, scores: Any = None, beta: float = 1.0) -> dict[str, float]:
    """The figures of `classification_report` where a sample may have several labels, or none.

    Each label is a decision of its own; the figures are plain means over labels. A label that all samples have, or
    none, says nothing about most of them and is left out.

    Args:
        prediction: (N, C) booleans or 0 and 1, NumPy or torch.
        target: (N, C) the truth.
        scores: (N, C) for auc and average_precision.
        beta: Weight of recall against precision in f_beta.

    Returns:
        exact_match (share of samples with all labels right), labels (how many the means are over), accuracy (share of
        right decisions: 1 - Hamming loss), balanced_accuracy, precision, recall, f_beta, f1, specificity, fpr, fnr,
        mcc and, given scores, auc and average_precision.

    Raises:
        ValueError: Shapes that do not fit, other values than 0 and 1, no label with both kinds of samples.

    Example:
        >>> report = multilabel_report([[1, 0], [1, 1], [0, 0]], [[1, 0], [0, 1], [0, 0]])
        >>> report["exact_match"], report["precision"], report["recall"]
        (0.6666666666666666, 0.75, 1.0)
    """
    if not beta > 0:
        raise ValueError(f"multilabel_report needs beta > 0, got {beta}; 1 is F1, 2 weighs recall more.")
    truth = _decisions(target, "target")
    guess = _decisions(prediction, "prediction")
    if guess.shape != truth.shape:
        raise ValueError(f"prediction of shape {guess.shape} for a target of {truth.shape}; both are (N, C).")
    kept = truth.any(axis=0) & ~truth.all(axis=0)
    if not kept.any():
        raise ValueError(f"none of the {truth.shape[1]} labels has a sample with it and one without it.")
    guess_kept, truth_kept = guess[:, kept], truth[:, kept]
    hits, support, predicted = ((a.sum(axis=0)) for a in (guess_kept & truth_kept, truth_kept, guess_kept))
    figures = _one_against_rest(hits, support, predicted, len(truth), beta)
    tables = zip(hits, support - hits, predicted - hits, len(truth) - support - predicted + hits, strict=True)
    report = {
        "exact_match": float((guess == truth).all(axis=1).mean()),
        "labels": int(kept.sum()),
        "accuracy": float((guess_kept == truth_kept).mean()),
        "balanced_accuracy": float((figures["recall"] + figures["specificity"]).mean() / 2),
        **{name: float(values.mean()) for name, values in figures.items()},
        "mcc": float(np.mean([_matthews(np.array([[tn, fp], [fn, tp]])) for tp, fn, fp, tn in tables])),
    }
    if scores is not None:
        columns = as_array(scores)
        if columns.shape != truth.shape:
            raise ValueError(f"scores of shape {columns.shape} for a target of {truth.shape}; both are (N, C).")
        report["auc"] = _mean_over(roc_auc, columns[:, kept], truth_kept)
        report["average_precision"] = _mean_over(average_precision, columns[:, kept], truth_kept)
    return report


def best_threshold(scores: Any, positive: Any, *, beta: float = 1.0) -> float:
    """The threshold at which F-beta is largest; positive is what scores at least so much.

    Choose it on data that no figure is reported of. It lies in the middle between two neighbouring scores, at the
    higher one of equally good thresholds.

    Args:
        scores: (N,) numbers; larger is more likely positive.
        positive: (N,) true for the positive class.
        beta: Weight of recall against precision: 2 for missed defects that cost more than false alarms.

    Raises:
        ValueError: NaN scores, no positive, beta not above 0.

    Example:
        >>> best_threshold([0.9, 0.6, 0.4, 0.1], [True, True, False, False])
        0.5
    """
    if not beta > 0:
        raise ValueError(f"best_threshold needs beta > 0, got {beta}; 1 is F1, 2 weighs recall more.")
    values = as_scores(scores, "scores")
    flags = as_flags(positive, "positive", len(values))
    if not flags.any():
        raise ValueError(f"best_threshold is undefined without a positive, got {len(flags)} negatives only.")
    levels = np.unique(values)[::-1]
    hits, accepted = (len(side) - np.searchsorted(side, levels) for side in (np.sort(values[flags]), np.sort(values)))
    figures = (1 + beta**2) * hits / (beta**2 * flags.sum() + accepted)
    best = int(figures.argmax())
    below = levels[best + 1] if best + 1 < len(levels) else levels[best]
    return between(levels[best], below)


def multilabel_confusion_matrix(prediction: Any, target: Any) -> Integers:
    """Count right and wrong decisions for each label of its own.

    Args:
        prediction: (N, C) booleans or 0 and 1, NumPy or torch.
        target: (N, C) the truth.

    Returns:
        (C, 2, 2) counts, row = truth, column = prediction, no before yes: [[TN, FP], [FN, TP]] of each label.

    Raises:
        ValueError: Shapes that do not fit, or other values than 0 and 1.

    Example:
        >>> multilabel_confusion_matrix([[1, 0], [1, 1], [0, 0]], [[1, 0], [0, 1], [0, 0]]).tolist()
        [[[1, 1], [0, 1]], [[2, 0], [0, 1]]]
    """
    truth, guess = _decisions(target, "target"), _decisions(prediction, "prediction")
    if guess.shape != truth.shape:
        raise ValueError(f"prediction of shape {guess.shape} for a target of {truth.shape}; both are (N, C).")
    counts = [[(a & b).sum(axis=0) for b in (~guess, guess)] for a in (~truth, truth)]
    return np.array(counts, dtype=np.int64).transpose(2, 0, 1)


def calibration_error(probabilities: Any, target: Any, *, bins: int = 15, norm: Norm = "l1") -> float:
    """Expected calibration error, Guo et al. 2017, eq. 3 (https://arxiv.org/abs/1706.04599).

    Samples are put into bins of equal width by confidence; the error is the gap between mean confidence and share of
    right answers in a bin, averaged over samples.

    Args:
        probabilities: (N,) of the positive class, or (N, C) of all classes; then the confidence is that of the largest.
            In [0, 1], rows of (N, C) adding up to 1: nothing here applies a sigmoid or softmax.
        target: (N,) 0 and 1, or class numbers 0 to C - 1. Where a sample may have several labels each is a decision of
            its own: give probabilities and truth of all of them, flattened.
        bins: How many, of width 1 / bins; a confidence on an edge belongs to the upper bin, 1 to the last.
        norm: "l1" is the expected error, "l2" the root of the mean square gap, "max" the largest gap.

    Raises:
        ValueError: Shapes that do not fit, values that are no probabilities, bins below 1.

    Example:
        >>> round(calibration_error([0.9, 0.9, 0.1, 0.1], [1, 1, 0, 0], bins=10), 3)
        0.1
    """
    bins = as_count(bins, "bins must be")
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be 'l1', 'l2' or 'max', got {norm!r}.")
    given = as_array(probabilities).astype(np.float64)
    if given.ndim not in (1, 2) or not given.size:
        raise ValueError(f"probabilities must be (N,) or (N, C) with at least one row, got shape {given.shape}.")
    sums = given.sum(axis=1) if given.ndim == 2 else np.ones(len(given))
    if not ((given >= 0) & (given <= 1)).all() or np.abs(sums - 1).max() > 5e-3:  # bfloat16: 2e-3
        raise ValueError(
            f"probabilities must lie in [0, 1], rows of (N, C) adding up to 1; got {given.min():g} to {given.max():g}"
            f", sums {sums.min():g} to {sums.max():g}: logits? Apply the sigmoid or softmax first; nothing here does."
        )
    truth = as_labels(target, "target", len(given))
    if truth.dtype.kind == "U" or truth.min() < 0 or truth.max() >= max(2, given.shape[-1] if given.ndim == 2 else 2):
        raise ValueError(f"target must be 0 and 1, or the column numbers of probabilities, got {truth[:3].tolist()}.")
    confidence, right = (
        (given, truth.astype(np.float64))
        if given.ndim == 1
        else (given.max(axis=1), (given.argmax(axis=1) == truth).astype(np.float64))
    )
    edges = np.arange(1, bins) / bins
    if (kind := as_array(probabilities).dtype).kind == "f":  # in their precision: a float32 0.7 lies on the edge 0.7
        edges = edges.astype(kind)
    place = np.searchsorted(edges.astype(np.float64), confidence, side="right")
    sizes = np.bincount(place, minlength=bins)
    gaps = np.abs(np.bincount(place, right - confidence, bins)) / np.maximum(sizes, 1)
    shares = sizes / len(place)
    if norm == "max":
        return float(gaps.max())
    return float(shares @ gaps) if norm == "l1" else float((shares @ gaps**2) ** 0.5)


def _decisions(values: Any, name: str) -> Booleans:
    array = as_array(values)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"{name} must be (N, C) booleans or 0 and 1, got shape {array.shape} of {array.dtype}: probabilities? "
            "Compare with a threshold first and give them as scores."
        )
    return array.astype(np.bool_)


def _binary_first(matrix: Integers, names: list[Any]) -> tuple[Integers, list[Any]]:
    """Widen to classes 0 and 1 where only one of them occurs, so that a constant prediction is still a binary one."""
    if len(names) == 1 and names[0] in (0, 1):
        wide = np.zeros((2, 2), dtype=np.int64)
        wide[int(names[0]), int(names[0])] = matrix[0, 0]
        return wide, [False, True] if isinstance(names[0], bool) else [0, 1]
    return matrix, names


def _positive(names: list[Any], positive: Any) -> int | None:
    """The place of the positive class, or None where all classes are equal."""
    if positive is None:
        return names.index(1) if len(names) == 2 and set(names) == {0, 1} else None
    if len(names) > 2 or positive not in names:
        raise ValueError(
            f"positive={positive!r} must be one of two classes, but the classes are {names[:8]}"
            f"{' ...' if len(names) > 8 else ''}; give classes=[...] if one does not occur here, or leave positive out."
        )
    return names.index(positive)


def _one_against_rest(
    hits: Integers, support: Integers, predicted: Integers, total: int, beta: float
) -> dict[str, Floats]:
    """(C,) figures of each class against the rest, NaN where undefined."""
    missed, false_alarms, others = support - hits, predicted - hits, total - support
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where((predicted == 0) & (support > 0), 0.0, hits / predicted)
        false_positive_rate = false_alarms / others
        recall = hits / support
        f_beta, f1 = (
            (1 + weight) * hits / ((1 + weight) * hits + weight * missed + false_alarms) for weight in (beta**2, 1.0)
        )
    return {
        "precision": precision,
        "recall": recall,
        "f_beta": f_beta,
        "f1": f1,
        "specificity": 1 - false_positive_rate,
        "fpr": false_positive_rate,
        "fnr": 1 - recall,
    }


def _matthews(matrix: Integers) -> float:
    """Gorodkin 2004, eq. 8; for two classes the coefficient of Matthews 1975."""
    total = float(matrix.sum())
    support, predicted = matrix.sum(axis=1).astype(np.float64), matrix.sum(axis=0).astype(np.float64)
    covariance = float(np.trace(matrix)) * total - float(support @ predicted)
    spread = (total**2 - float(predicted @ predicted)) * (total**2 - float(support @ support))
    return covariance / spread**0.5 if spread > 0 else 0.0


def _columns(
    scores: Array, target: Array, names: list[Any], wanted: Integers, chosen: int | None
) -> tuple[Array, Booleans]:
    """(N, W) scores of the wanted classes, and who belongs to them."""
    if scores.ndim == 1 and chosen is None:
        raise ValueError(
            f"auc over {len(names)} classes needs scores (N, {len(names)}), got {scores.shape}; one score per row "
            "is enough only for two classes with a positive one."
        )
    if scores.ndim == 2 and scores.shape[1] != len(names):
        raise ValueError(
            f"scores has {scores.shape[1]} columns for {len(names)} classes; "
            "give classes=[...] in the order of the columns."
        )
    columns = scores[:, None] if scores.ndim == 1 else scores[:, wanted]
    return columns, np.stack([target == names[place] for place in wanted], axis=1)


def _mean_over(function: Callable[[Any, Any], float], scores: Array, truth: Booleans) -> float:
    """Mean over columns; NaN where one of them holds only one kind of sample."""
    if (truth.all(axis=0) | ~truth.any(axis=0)).any():
        return float("nan")
    return float(np.mean([function(*column) for column in zip(scores.T, truth.T, strict=True)]))
