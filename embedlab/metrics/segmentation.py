"""Segmentation: pixel by pixel, counted over the whole data set.

`f(prediction, target, *, classes)` takes arrays of class numbers of one shape, or lists of them (images of any sizes).
ODS and OIS take probabilities, and are given in [0, 1] as they are: nothing here applies a sigmoid.
"""

from collections.abc import Iterator
from typing import Any, Literal, overload

import numpy as np

from embedlab.metrics._arrays import Array, Booleans, Floats, Integers, as_array, as_count


def pixel_accuracy(prediction: Any, target: Any, *, classes: int, ignore: int | None = None) -> float:
    """Share of pixels whose class is right (Long et al. 2015, section 5, https://arxiv.org/abs/1411.4038).

    Args:
        prediction: Class numbers 0 to classes - 1, any shape, NumPy or torch, or a list of such arrays.
        target: The truth, of the same shape or shapes.
        classes: How many there are.
        ignore: Pixels with this value in the target do not count (255 in many data sets).

    Raises:
        ValueError: Shapes that do not fit, numbers that are no class, no pixel that counts.

    Example:
        >>> pixel_accuracy([[0, 1], [1, 1]], [[0, 1], [0, 1]], classes=2)
        0.75
    """
    counts = _counts(prediction, target, classes, ignore)
    return float(np.trace(counts) / counts.sum())


@overload
def mean_pixel_accuracy(
    prediction: Any, target: Any, *, classes: int, ignore: int | None = None, per_class: Literal[False] = False
) -> float: ...
@overload
def mean_pixel_accuracy(
    prediction: Any, target: Any, *, classes: int, ignore: int | None = None, per_class: Literal[True]
) -> Floats: ...
def mean_pixel_accuracy(
    prediction: Any, target: Any, *, classes: int, ignore: int | None = None, per_class: bool = False
) -> float | Floats:
    """Mean over the classes in the target of the share of their pixels that are found (their recall).

    Args:
        prediction: See `pixel_accuracy`, as for the other arguments.
        target: The truth.
        classes: How many there are.
        ignore: Pixels with this value in the target do not count.
        per_class: Return (classes,) values instead of their mean, NaN for a class that is not in the target.

    Raises:
        ValueError: As `pixel_accuracy`.

    Example:
        >>> mean_pixel_accuracy([[0, 1], [1, 1]], [[0, 1], [0, 1]], classes=2)
        0.75
    """
    counts = _counts(prediction, target, classes, ignore)
    return _ratio(np.diag(counts), counts.sum(axis=1), per_class)


@overload
def mean_iou(
    prediction: Any, target: Any, *, classes: int, ignore: int | None = None, per_class: Literal[False] = False
) -> float: ...
@overload
def mean_iou(
    prediction: Any, target: Any, *, classes: int, ignore: int | None = None, per_class: Literal[True]
) -> Floats: ...
def mean_iou(
    prediction: Any, target: Any, *, classes: int, ignore: int | None = None, per_class: bool = False
) -> float | Floats:
    """Mean over classes of intersection over union, counted over all images together (Jaccard index; PASCAL VOC).

    Args:
        prediction: See `pixel_accuracy`, as for the other arguments.
        target: The truth.
        classes: How many there are, the background included. A class that is in neither target nor prediction is left
            out of the mean.
        ignore: Pixels with this value in the target do not count.
        per_class: Return (classes,) values instead of their mean, NaN for a class that is nowhere.

    Raises:
        ValueError: As `pixel_accuracy`.

    Example:
        >>> mean_iou([[0, 1], [1, 1]], [[0, 1], [0, 1]], classes=2, per_class=True).round(3).tolist()
        [0.5, 0.667]
    """
    counts = _counts(prediction, target, classes, ignore)
    hits = np.diag(counts)
    return _ratio(hits, counts.sum(axis=0) + counts.sum(axis=1) - hits, per_class)


@overload
def dice(
    prediction: Any, target: Any, *, classes: int, ignore: int | None = None, per_class: Literal[False] = False
) -> float: ...
@overload
def dice(
    prediction: Any, target: Any, *, classes: int, ignore: int | None = None, per_class: Literal[True]
) -> Floats: ...
def dice(
    prediction: Any, target: Any, *, classes: int, ignore: int | None = None, per_class: bool = False
) -> float | Floats:
    """Mean over classes of Dice's coefficient 2 TP / (2 TP + FP + FN), counted over all images together: F1 by pixel.

    Args:
        prediction: See `mean_iou`, as for the other arguments.
        target: The truth.
        classes: How many there are, the background included.
        ignore: Pixels with this value in the target do not count.
        per_class: Return (classes,) values instead of their mean, NaN for a class that is nowhere.

    Raises:
        ValueError: As `pixel_accuracy`.

    Example:
        >>> dice([[0, 1], [1, 1]], [[0, 1], [0, 1]], classes=2, per_class=True).round(3).tolist()
        [0.667, 0.8]
    """
    counts = _counts(prediction, target, classes, ignore)
    return _ratio(2 * np.diag(counts), counts.sum(axis=0) + counts.sum(axis=1), per_class)


def ods(probabilities: Any, masks: Any, *, thresholds: Any = None) -> float:
    """Optimal data-set scale: the best F over one threshold for all images (Arbelaez et al. 2011, section 3).

    True positives, false positives and misses of all images are added up before F is taken. Pixels are compared one to
    one, without the tolerance that edge detection allows.

    Args:
        probabilities: List of (H, W) arrays in [0, 1], or (N, H, W), NumPy or torch; a pixel is positive where the
            probability >= threshold.
        masks: The truth, booleans or 0 and 1, of the same shapes.
        thresholds: (T,) those to try, such as 0.01, 0.02, ..., 0.99; None tries every probability that occurs.

    Raises:
        ValueError: Shapes that do not fit, probabilities outside [0, 1], no positive pixel in any mask.

    Example:
        >>> ods([[[0.9, 0.6], [0.4, 0.1]], [[0.5, 0.3], [0.2, 0.1]]], [[[1, 1], [0, 0]], [[1, 1], [0, 0]]])
        0.8888888888888888
    """
    images = [(p.ravel(), m.ravel()) for p, m in _images(probabilities, masks)]
    positives = sum(int(truth.sum()) for _, truth in images)
    if not positives:
        raise ValueError("ods needs a positive pixel in at least one mask, got none: recall is undefined.")
    if thresholds is None:
        maps, truths = zip(*images, strict=True)
        images = [(np.concatenate(maps), np.concatenate(truths))]
    hits, predicted = np.sum([_by_threshold(scores, truth, thresholds) for scores, truth in images], axis=0)
    return float(_f1(hits, predicted, positives).max())


def ois(probabilities: Any, masks: Any, *, thresholds: Any = None, pooled: bool = False) -> float:
    """Optimal image scale: the best F over a threshold for each image.

    Args:
        probabilities: See `ods`, as for the other arguments.
        masks: The truth. An image without a positive pixel has no recall: it is left out of the mean; with `pooled`,
            it adds no false positives where its own best threshold is above all of it.
        thresholds: (T,) those to try; None tries every probability that occurs in the image.
        pooled: False takes the mean over images of their best F, as crack and defect detection does (Yang et al. 2020,
            eq. 8, https://arxiv.org/abs/1901.06340). True adds up the counts of all images, each at
            its own best threshold, before F is taken (Arbelaez et al. 2011).

    Raises:
        ValueError: As `ods`.

    Example:
        >>> ois([[[0.9, 0.6], [0.4, 0.1]], [[0.5, 0.3], [0.2, 0.1]]], [[[1, 1], [0, 0]], [[1, 1], [0, 0]]])
        1.0
    """
    best, counts = [], []
    for scores, mask in _images(probabilities, masks):
        hits, predicted = _by_threshold(scores.ravel(), mask.ravel(), thresholds)
        if not mask.any():
            # no threshold finds anything; the best predicts least, and above all of it nothing
            counts.append((0, 0 if thresholds is None else int(predicted.min()), 0))
            continue
        values = _f1(hits, predicted, mask.sum())
        place = int(values.argmax())
        best.append(values[place])
        counts.append((int(hits[place]), int(predicted[place]), int(mask.sum())))
    if not best:
        raise ValueError("ois needs a positive pixel in at least one mask, got none: recall is undefined.")
    return float(_f1(*np.array(counts).sum(axis=0))) if pooled else float(np.mean(best))


def _f1(hits: Array, predicted: Array, positives: Any) -> Array:
    return np.asarray(2 * hits / (predicted + positives))


def _by_threshold(scores: Array, mask: Booleans, thresholds: Any) -> tuple[Integers, Integers]:
    """Positive pixels found, and pixels taken for positive, at each threshold."""
    # in the precision of the scores, so that a float32 0.3 reaches the threshold 0.3
    tried = np.unique(scores) if thresholds is None else np.atleast_1d(as_array(thresholds)).astype(scores.dtype)
    ascending, positive = np.sort(scores), np.sort(scores[mask])
    hits, predicted = (len(side) - np.searchsorted(side, tried) for side in (positive, ascending))
    return hits, predicted


def _images(probabilities: Any, masks: Any) -> Iterator[tuple[Array, Booleans]]:
    if len(probabilities) != len(masks) or not len(masks):
        raise ValueError(f"as many masks as probability maps, at least one, got {len(masks)} and {len(probabilities)}.")
    for number, (given, truth) in enumerate(zip(probabilities, masks, strict=True)):
        scores, mask = as_array(given), as_array(truth)
        if scores.shape != mask.shape or not scores.size:
            raise ValueError(f"image {number}: probabilities of shape {scores.shape} for a mask of {mask.shape}.")
        if scores.dtype.kind not in "fiub" or not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(
                f"image {number}: probabilities must lie in [0, 1], got {scores.min()} to {scores.max()}: "
                "logits? Apply the sigmoid first; nothing here does."
            )
        if mask.dtype.kind != "b" and not np.isin(mask, (0, 1)).all():
            raise ValueError(f"image {number}: the mask must be booleans or 0 and 1; for 0 and 255 give mask > 0.")
        yield scores if scores.dtype.kind == "f" else scores.astype(np.float64), mask.astype(np.bool_)


def _ratio(part: Array, whole: Array, per_class: bool) -> float | Floats:
    with np.errstate(invalid="ignore"):
        values: Floats = part / np.where(whole > 0, whole, np.nan)
    return values if per_class else float(np.nanmean(values))


def _counts(prediction: Any, target: Any, classes: int, ignore: int | None) -> Integers:
    """(C, C) pixels, row = truth, column = prediction, image by image."""
    classes = as_count(classes, "classes must be")
    ragged = isinstance(prediction, (list, tuple)) and isinstance(target, (list, tuple))
    if ragged and len(prediction) != len(target):
        raise ValueError(f"as many targets as predictions, got {len(target)} and {len(prediction)}.")
    pairs = zip(prediction, target, strict=True) if ragged else [(prediction, target)]
    counts = np.zeros(classes * classes, dtype=np.int64)
    for given, truth in pairs:
        guess, right = _classes(given, "prediction"), _classes(truth, "target")
        if guess.shape != right.shape:
            raise ValueError(
                f"prediction of shape {guess.shape} for a target of {right.shape}; they go pixel by pixel."
            )
        kept = np.ones(right.shape, dtype=np.bool_) if ignore is None else right != ignore
        guess, right = guess[kept].astype(np.int64), right[kept].astype(np.int64)
        for name, values in (("prediction", guess), ("target", right)):
            if values.size and not (values.min() >= 0 and values.max() < classes):
                raise ValueError(
                    f"{name} holds {values.min()} to {values.max()}, expected class numbers 0 to {classes - 1}: "
                    "masks of 0 and 255, or a border label? Give ignore=255 for pixels that do not count."
                )
        counts += np.bincount(right * classes + guess, minlength=classes * classes)
    if not counts.any():
        raise ValueError("no pixel counts: the target is empty, or all of it is ignored.")
    return counts.reshape(classes, classes)


def _classes(values: Any, name: str) -> Array:
    array = as_array(values)
    if array.dtype.kind not in "iub":
        raise ValueError(
            f"{name} must be class numbers, got {array.dtype}: probabilities or logits? Take the argmax, or compare "
            "with a threshold, first."
        )
    return array
