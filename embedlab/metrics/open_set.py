"""Open-set identification: name the enrolled, say unknown to strangers."""

from typing import Any

import numpy as np

from embedlab.metrics._arrays import (
    Array,
    Booleans,
    Floats,
    allowed,
    as_array,
    as_flags,
    as_labels,
    as_scores,
    encode_together,
)
from embedlab.metrics._ranking import BUDGET, Rows
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
    most = int(allowed(fpir, len(stranger)))
    if most < 1:
        raise ValueError(
            f"fpir={fpir:g} cannot be measured on {len(stranger)} strangers: even one is more than that. "
            f"At least {int(np.ceil(1 / fpir))} are needed."
        )
    if most == len(stranger):
        return len(identified) / enrolled
    # accepted is what lies above the first stranger who must be refused
    refused = stranger[len(stranger) - most - 1]
    return float((identified > refused).sum() / enrolled)


def leave_identity_out(
    probes: Any, probe_labels: Any, templates: Any, template_labels: Any
) -> tuple[Floats, Booleans, Booleans, Array]:
    """Every probe as somebody enrolled and as a stranger: two searches each, for data sets of few identities.

    The first search is among the templates of all identities. The second takes the probe's own identity out of the
    gallery, which makes it a stranger. So N identities give N strangers, where two halves would give N / 2. A score is
    the best cosine over the templates of an identity (fusion "max").

    The searches of several folds, each with its own network and identities, may be joined and given to
    `detection_identification_rate` at an FPIR that no fold alone supports: one threshold then holds for all folds. An
    interval is `bootstrap_statistic` over the fourth result.

    Args:
        probes: (P, D) vectors of any norm, NumPy or torch; none of them is a template.
        probe_labels: (P,) integers or strings, each of which has a template.
        templates: (T, D) vectors.
        template_labels: (T,) of at least two identities.

    Returns:
        Of 2 P searches, first those of the enrolled and then those of strangers: best score, whether the best identity
        is the probe's own, whether the probe's identity was enrolled, and the probe's label.

    Raises:
        ValueError: Shapes or labels that do not fit, a probe whose identity has no template, one identity only.

    Example:
        >>> vectors, labels = [[1, 0], [0, 1]], ["a", "b"]
        >>> scores, correct, known, whose = leave_identity_out(vectors, labels, vectors, labels)
        >>> scores.tolist(), correct.tolist(), known.tolist()
        ([1.0, 1.0, 0.0, 0.0], [True, True, False, False], [True, True, False, False])
    """
    asked, enrolled = Rows(probes, "probes"), Rows(templates, "templates")
    if asked.dim != enrolled.dim:
        raise ValueError(f"probes have {asked.dim} numbers, templates {enrolled.dim}; both are by one encoder.")
    names = as_labels(probe_labels, "probe_labels", len(asked))
    own, codes, found = encode_together(
        names, as_labels(template_labels, "template_labels", len(enrolled)), "probe_labels and template_labels"
    )
    absent = np.setdiff1d(own, codes)
    if len(absent) or len(found) < 2:
        raise ValueError(
            f"leave_identity_out needs two identities or more and templates of each that probes; got {len(found)} "
            f"identities, {len(absent)} of them without a template"
            f"{f', first {found[absent[0]].item()!r}' if len(absent) else ''}."
        )
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(found)))
    unit = enrolled.unit(order)
    best, strange, right = np.empty(len(asked)), np.empty(len(asked)), np.empty(len(asked), dtype=np.bool_)
    step = max(1, BUDGET // (8 * len(unit)))
    for start in range(0, len(asked), step):
        block = slice(start, start + step)
        scores = np.maximum.reduceat(asked.unit(block) @ unit.T, starts, axis=1)  # (n, identities)
        best[block], right[block] = scores.max(axis=1), scores.argmax(axis=1) == own[block]
        scores[np.arange(len(scores)), own[block]] = -np.inf
        strange[block] = scores.max(axis=1)
    return (
        np.concatenate([best, strange]),
        np.concatenate([right, np.zeros_like(right)]),
        np.repeat([True, False], len(asked)),
        np.concatenate([names, names]),
    )


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
