"""Linear probe: how much of the labels can a linear classifier read from frozen features?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedlab.metrics._arrays import Array, Floats, Integers, as_array, as_labels

STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4)  # weights of the penalty that are tried, strong to weak
HELD_OUT = 0.2  # share of each class, among the training rows, that chooses between them


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A multinomial logistic regression on standardised features, made by `fit_linear_probe`.

    Args:
        classes: (C,) the labels, sorted.
        weight: (D, C).
        bias: (C,).
        mean: (D,) of the training features.
        scale: (D,) one over their standard deviation; 0 for a feature that never changes.
        regularization: Weight of the penalty that was used.
    """

    classes: Array
    weight: Floats
    bias: Floats
    mean: Floats
    scale: Floats
    regularization: float

    def predict(self, vectors: Any) -> Array:
        """The most probable label of each row of (N, D); of equal ones the label that sorts first.

        Raises:
            ValueError: Not (N, D), another D than the probe was fitted on, NaN or infinity.
        """
        features = _features(vectors, "vectors")
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"The probe was fitted on {len(self.mean)} features, got {features.shape[1]}: another encoder?"
            )
        logits = _standardise(features, self.mean, self.scale) @ self.weight + self.bias
        predicted: Array = self.classes[logits.argmax(axis=1)]
        return predicted


def fit_linear_probe(
    train: Any,
    train_labels: Any,
    *,
    regularization: float | Sequence[float] = STRENGTHS,
    seed: int = 0,
    iterations: int = 1000,
) -> LinearProbe:
    """Multinomial logistic regression by L-BFGS, in float64.

    Minimised is the mean cross entropy plus regularization / 2 times the squared norm of the weights; the bias is not
    penalised. scikit-learn's C is 1 / (regularization N). The optimum is unique, so the result depends on nothing but
    the arguments.

    Args:
        train: (N, D) features, NumPy or torch; each is brought to mean 0 and deviation 1 over the training rows.
        train_labels: (N,) integers or strings, of at least two classes.
        regularization: Weight of the penalty, >= 0. Of several, the one is taken that is best on a fifth of the
            training rows of each class (the stronger, if equal); then all rows are fitted.
        seed: Of that fifth.
        iterations: At most so many steps of L-BFGS.

    Raises:
        ValueError: Shapes or labels that do not fit, NaN, one class only.

    Example:
        >>> probe = fit_linear_probe([[0.0], [1.0], [2.0], [3.0]], ["a", "a", "b", "b"], regularization=0.01)
        >>> probe.predict([[-1.0], [5.0]]).tolist()
        ['a', 'b']
    """
    features = _features(train, "train")
    labels = as_labels(train_labels, "train_labels", len(features))
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"A linear probe tells classes apart, but all {len(labels)} labels are {classes[0]!s}.")
    strengths = sorted({float(value) for value in np.atleast_1d(np.asarray(regularization, np.float64))}, reverse=True)
    if not strengths or not np.isfinite(strengths).all() or strengths[-1] < 0:
        raise ValueError(f"regularization is a number >= 0, or several, got {regularization}; usual are 1e-4 to 1.")
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    varies = deviation > 1e-10 * np.maximum(1.0, np.abs(mean))
    scale = np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0)
    standard = _standardise(features, mean, scale)
    chosen = _choose(standard, codes, len(classes), strengths, seed, iterations)
    weight, bias = _minimise(standard, codes, len(classes), chosen, iterations)
    return LinearProbe(classes, weight, bias, mean, scale, chosen)


def linear_probe_accuracy(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    regularization: float | Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> float:
    """Accuracy on test features of a linear classifier fitted to training features.

    Args:
        train: (N, D) features, NumPy or torch.
        train_labels: (N,) integers or strings.
        test: (Q, D) features.
        test_labels: (Q,) labels; a class that training has not seen counts as an error.
        regularization: See `fit_linear_probe`.
        seed: See `fit_linear_probe`.

    Raises:
        ValueError: See `fit_linear_probe`.

    Example:
        >>> linear_probe_accuracy([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1], [[0.2], [2.8]], [0, 0])
        0.5
    """
    features = _features(test, "test")
    labels = as_labels(test_labels, "test_labels", len(features))
    probe = fit_linear_probe(train, train_labels, regularization=regularization, seed=seed)
    if (probe.classes.dtype.kind == "U") != (labels.dtype.kind == "U"):
        raise ValueError(
            f"train_labels are {probe.classes.dtype}, test_labels {labels.dtype}, so nothing would ever match; convert "
            "one side."
        )
    return float((probe.predict(features) == labels).mean())


def _features(values: Any, name: str) -> Floats:
    """A copy in float64."""
    array = as_array(values)
    if array.ndim != 2 or array.dtype.kind not in "fiub" or 0 in array.shape:
        raise ValueError(f"{name} must be (N, D) numbers, got shape {array.shape} of {array.dtype}.")
    features: Floats = array.astype(np.float64)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise ValueError(f"{name} row {int(bad.argmax())} holds NaN or infinity: diverged training?")
    return features


def _standardise(features: Floats, mean: Floats, scale: Floats) -> Floats:
    """In place: features may fill half of the memory."""
    features -= mean
    features *= scale
    return features


def _choose(
    features: Floats, codes: Integers, classes: int, strengths: list[float], seed: int, iterations: int
) -> float:
    """The penalty that is best on rows that were not fitted; the strongest where no class can spare a row."""
    held = _held_out(codes, seed)
    if len(strengths) == 1 or not held.any():
        return strengths[0]
    fitted, judged = features[~held], features[held]
    start, best = None, (-1, strengths[0])
    for strength in strengths:
        start = _minimise(fitted, codes[~held], classes, strength, iterations, start)
        logits = judged @ start[0] + start[1]
        right = int((logits.argmax(axis=1) == codes[held]).sum())
        if right > best[0]:
            best = (right, strength)
    return best[1]


def _held_out(codes: Integers, seed: int) -> Array:
    """(N,) bool: a fifth of each class, at least one row of a class of two, none of a class of one."""
    held = np.zeros(len(codes), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(codes))
    for code in np.unique(codes):
        rows = order[codes[order] == code]
        held[rows[: max(len(rows) > 1, int(HELD_OUT * len(rows)))]] = True
    return held


def _minimise(
    features: Floats,
    codes: Integers,
    classes: int,
    strength: float,
    iterations: int,
    start: tuple[Floats, Floats] | None = None,
) -> tuple[Floats, Floats]:
    """Weight (D, C) and bias (C,) of the smallest penalised cross entropy."""
    from scipy.optimize import minimize

    count, dim = features.shape
    rows = np.arange(count)

    def loss(flat: Floats) -> tuple[float, Floats]:
        weight, bias = flat[:-classes].reshape(dim, classes), flat[-classes:]
        logits = features @ weight + bias  # (N, C)
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)
        totals = shares.sum(axis=1, keepdims=True)
        value = (np.log(totals[:, 0]) - logits[rows, codes]).mean() + strength / 2 * (weight**2).sum()
        shares /= totals
        shares[rows, codes] -= 1
        gradient = features.T @ shares / count + strength * weight
        return float(value), np.concatenate([gradient.ravel(), shares.mean(axis=0)])

    first = np.zeros((dim + 1) * classes) if start is None else np.concatenate([start[0].ravel(), start[1]])
    found = minimize(
        loss, first, jac=True, method="L-BFGS-B", options={"maxiter": iterations, "gtol": 1e-6, "ftol": 1e-12}
    )
    return found.x[:-classes].reshape(dim, classes), found.x[-classes:]
