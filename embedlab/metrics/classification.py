"""Classification when classes are unequal: the whole set of figures from one confusion matrix."""

from typing import Any

import numpy as np

from embedlab.metrics._arrays import Array, Floats, Integers, as_array, as_labels, encode_together
from embedlab.metrics.verification import roc_auc


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
    """Accuracy, balanced_accuracy, precision, recall, f_beta, specificity, fpr, fnr, mcc and, given scores, auc.

    Two classes 0 and 1 (or False and True), or any two with `positive`, give the figures of the positive class.
    Otherwise each figure is the plain mean over the classes that occur in the target, each against the rest. Balanced
    accuracy is the mean recall over classes that occur, for two classes the mean of true-positive and true-negative
    rate. MCC is Matthews' correlation, for many classes Gorodkin's, and 0 where its denominator is. A class that
    occurs but is never predicted has precision 0. What the data does not define (the recall of a class that does not
    occur) is NaN.

    Args:
        prediction: (N,) integers or strings, NumPy or torch.
        target: (N,) the truth.
        scores: For auc: (N,) score of the positive class, or (N, C) one column per class in the order of `classes`
            (sorted if that is None); the mean over classes of one class against the rest.
        positive: The positive class among two.
        beta: Weight of recall against precision in f_beta: 2 for missed defects that cost more than false alarms.
        classes: All classes, where some may be absent from this data.

    Returns:
        Name to value; auc only if scores came.

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
    per_class = _one_against_rest(matrix, beta)
    occurring = matrix.sum(axis=1) > 0
    wanted = np.array([chosen]) if chosen is not None else np.flatnonzero(occurring)
    report = {
        "accuracy": float(np.trace(matrix) / matrix.sum()),
        "balanced_accuracy": float(per_class["recall"][occurring].mean()),
        **{name: float(values[wanted].mean()) for name, values in per_class.items()},
        "mcc": _matthews(matrix),
    }
    if scores is not None:
        labels = as_labels(target, "target")
        report["auc"] = _auc(as_array(scores), labels, names, wanted, chosen)
    return report


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


def _one_against_rest(matrix: Integers, beta: float) -> dict[str, Floats]:
    """(C,) figures of each class against the rest, NaN where undefined."""
    hits = np.diag(matrix).astype(np.float64)
    support, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    missed, false_alarms = support - hits, predicted - hits
    others = matrix.sum() - support
    weight = beta**2
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where((predicted == 0) & (support > 0), 0.0, hits / predicted)
        false_positive_rate = false_alarms / others
        recall = hits / support
        f_beta = (1 + weight) * hits / ((1 + weight) * hits + weight * missed + false_alarms)
    return {
        "precision": precision,
        "recall": recall,
        "f_beta": f_beta,
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


def _auc(scores: Array, target: Array, names: list[Any], wanted: Integers, chosen: int | None) -> float:
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
    areas = []
    for place in wanted:
        same = target == names[place]
        if same.all() or not same.any():
            return float("nan")
        areas.append(roc_auc(scores if scores.ndim == 1 else scores[:, place], same))
    return float(np.mean(areas))
