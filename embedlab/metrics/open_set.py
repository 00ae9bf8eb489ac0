"""Open-set identification: name the enrolled, say unknown to strangers."""

from typing import Any

import numpy as np

from embedlab.metrics._arrays import Booleans, Floats, as_array, as_flags, as_scores
from embedlab.metrics.verification import roc_auc


def fpir_fnir(scores: Any, correct: Any, known: Any, threshold: Any) -> tuple[float, float] | tuple[Floats, Floats]:
    """False-positive and false-negative identification rate at a threshold (ISO/IEC 19795-1; NIST FRVT 1:N).

    FPIR is the share of strangers whose best score reaches the threshold. FNIR is the share of enrolled probes that
    are not identified: best score below the threshold, or best identity wrong.

    Args:
        scores: (N,) best score of each probe, larger is nearer.
        correct: (N,) true where the best identity is the probe's own; ignored for strangers.
        known: (N,) true where the probe's identity is enrolled, false for a stranger.
        threshold: A probe is accepted when score >= threshold; a number or an array (T,).

    Returns:
        (FPIR, FNIR): two floats, or two arrays (T,).

    Raises:
        ValueError: NaN scores or thresholds, no stranger, or no enrolled probe.

    Example:
        >>> fpir_fnir([0.9, 0.8, 0.7, 0.2], [True, False, False, False], [True, True, False, False], 0.5)
        (0.5, 0.5)
    """
    stranger, identified, enrolled = _searches(scores, correct, known)
    if not len(stranger):
        raise ValueError(
            f"FPIR needs strangers, but all {enrolled} probes are known. Probe with identities that are not enrolled, "
            "or use detection_identification_rate with a threshold."
        )
    if not enrolled:
        raise ValueError(f"FNIR needs probes of enrolled identities, but all {len(stranger)} probes are strangers.")
    thresholds = _thresholds(threshold)
    fpir = _at_least(stranger, thresholds) / len(stranger)
    fnir = (enrolled - _at_least(identified, thresholds)) / enrolled
    return (float(fpir), float(fnir)) if thresholds.ndim == 0 else (fpir, fnir)


def open_set_curve(scores: Any, correct: Any, known: Any) -> tuple[Floats, Floats, Floats]:
    """FPIR and FNIR at every threshold that makes a difference: the open-set DET curve.

    Args:
        scores: (N,) best score of each probe, larger is nearer.
        correct: (N,) true where the best identity is the probe's own; ignored for strangers.
        known: (N,) true where the probe's identity is enrolled.

    Returns:
        FPIR, FNIR and threshold, (T,) each, from infinity (nobody is accepted) down to the lowest score.

    Raises:
        ValueError: As `fpir_fnir`.

    Example:
        >>> fpir, fnir, threshold = open_set_curve([0.9, 0.7, 0.2], [1, 0, 1], [1, 0, 1])
        >>> fpir.tolist(), fnir.tolist(), threshold.tolist()
        ([0.0, 0.0, 1.0, 1.0], [1.0, 0.5, 0.5, 0.0], [inf, 0.9, 0.7, 0.2])
    """
    thresholds = np.append(np.inf, np.unique(as_scores(scores, "scores"))[::-1])
    fpir, fnir = fpir_fnir(scores, correct, known, thresholds)
    return np.asarray(fpir), np.asarray(fnir), thresholds


def unknown_auroc(scores: Any, known: Any) -> float:
    """Probability that an enrolled probe scores above a stranger, ties counting half; who it is taken for is ignored.

    Args:
        scores: (N,) best score of each probe, larger is nearer.
        known: (N,) true where the probe's identity is enrolled.

    Raises:
        ValueError: NaN scores, or only one kind of probe.

    Example:
        >>> unknown_auroc([0.9, 0.6, 0.7, 0.2], [1, 1, 0, 0])
        0.75
    """
    best = as_scores(scores, "scores")
    return roc_auc(best, as_flags(known, "known", len(best)))


def oscr(scores: Any, correct: Any, known: Any) -> float:
    """Area under the open-set classification rate, Dhamija et al. 2018, eq. 5 (https://arxiv.org/abs/1811.04110).

    The curve is the share of enrolled probes that are accepted and named rightly, over the share of strangers accepted,
    as the threshold falls; straight between its points. So the area is at most the closed-set accuracy, and that times
    the AUROC of the rightly named against the strangers.

    Args:
        scores: (N,) best score of each probe, larger is nearer.
        correct: (N,) true where the best identity is the probe's own; ignored for strangers.
        known: (N,) true where the probe's identity is enrolled.

    Raises:
        ValueError: NaN scores, no stranger, or no enrolled probe.

    Example:
        >>> oscr([0.9, 0.8, 0.7, 0.2], [True, False, False, False], [True, True, False, False])
        0.5
    """
    stranger, identified, enrolled = _searches(scores, correct, known)
    if not len(stranger) or not enrolled:
        raise ValueError(
            f"oscr needs probes of enrolled identities and of strangers, got {enrolled} and {len(stranger)}."
        )
    below = np.searchsorted(stranger, identified, side="left") + np.searchsorted(stranger, identified, side="right")
    return float(below.sum(dtype=np.int64) / (2 * len(stranger) * enrolled))


def detection_identification_rate(
    scores: Any, correct: Any, known: Any, *, threshold: float | None = None, fpir: float | None = None
) -> float:
    """Share of enrolled probes that are accepted under their own name: 1 - FNIR.

    Args:
        scores: (N,) best score of each probe, larger is nearer.
        correct: (N,) true where the best identity is the probe's own; ignored for strangers.
        known: (N,) true where the probe's identity is enrolled.
        threshold: Accept at this score; or
        fpir: accept at the lowest score at which at most this share of these very strangers is accepted. That makes
            encoders comparable; it promises nothing about other strangers, for which a gallery is calibrated.

    Raises:
        ValueError: NaN scores, no enrolled probe, neither or both of threshold and fpir, an fpir that the number of
            strangers cannot support.

    Example:
        >>> detection_identification_rate([0.9, 0.6, 0.7, 0.2], [1, 1, 0, 0], [1, 1, 0, 0], fpir=0.5)
        1.0
    """
    stranger, identified, enrolled = _searches(scores, correct, known)
    if not enrolled:
        raise ValueError(f"detection_identification_rate needs enrolled probes, got {len(stranger)} strangers only.")
    if (threshold is None) == (fpir is None):
        raise ValueError("detection_identification_rate needs exactly one of threshold and fpir.")
    if fpir is None:
        return float(_at_least(identified, _thresholds(threshold)) / enrolled)
    if not 0 < fpir <= 1:
        raise ValueError(f"fpir must be in (0, 1], got {fpir}; it is a share, not a percentage.")
    allowed = int(fpir * len(stranger) + 1e-9)
    if allowed < 1:
        raise ValueError(
            f"fpir={fpir:g} cannot be measured on {len(stranger)} strangers: even one is more than that. "
            f"At least {int(np.ceil(1 / fpir))} are needed."
        )
    if allowed == len(stranger):
        return len(identified) / enrolled
    # accepted is what lies above the first stranger who must be refused
    refused = stranger[len(stranger) - allowed - 1]
    return float((identified > refused).sum() / enrolled)


def _searches(scores: Any, correct: Any, known: Any) -> tuple[Floats, Floats, int]:
    """Scores of strangers (ascending), scores of correct enrolled probes (ascending), number of enrolled probes."""
    best = as_scores(scores, "scores")
    right: Booleans = as_flags(correct, "correct", len(best))
    enrolled: Booleans = as_flags(known, "known", len(best))
    return np.sort(best[~enrolled]), np.sort(best[enrolled & right]), int(enrolled.sum())


def _thresholds(threshold: Any) -> Floats:
    thresholds = as_array(threshold).astype(np.float64)
    if np.isnan(thresholds).any():
        raise ValueError(f"threshold must be a number, got {threshold}.")
    return thresholds


def _at_least(ascending: Floats, thresholds: Floats) -> Floats:
    """How many of the ascending scores reach each threshold."""
    return np.asarray(len(ascending) - np.searchsorted(ascending, thresholds, side="left"), dtype=np.float64)
