"""The unknown threshold: the promise that a stranger is taken for somebody enrolled in at most so many cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from scipy.special import betaincinv

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class CalibrationError(ValueError):
    """The strangers cannot support the promise that was asked for."""


@dataclass(frozen=True)
class Calibration:
    """A threshold with what it promises and what it rests on.

    Args:
        threshold: Scores at or above it are taken for somebody enrolled.
        fpir: The promise: the false-positive identification rate, per stranger identity, is at most this.
        bound: Upper confidence bound of that rate at the threshold, at most `fpir`.
        observed: The rate at the threshold on the calibration strangers themselves.
        confidence: Of the bound, 0.95: of twenty calibrations one may break its promise.
        strangers: Stranger identities.
        images: Their images.
        effective_strangers: Independent strangers that those images are worth, between the two.
        correlation: Intraclass correlation of the scores of one stranger, 0 to 1.
        gallery_identities: Enrolled identities at the time; a gallery that grows takes more strangers for somebody.
        gallery_templates: Enrolled templates at the time.
        genuine_images: Images of enrolled identities that came with the strangers.
        detection_rate: Share of these named right at the threshold, mean over identities; None without any.
        verification_threshold: The threshold of `Gallery.verify`.
        fmr: Its promise: the false match rate for a stranger who claims a random enrolled identity is at most this.
        fmr_bound: Upper confidence bound of that rate.
        fmr_observed: The rate on the calibration strangers.
        true_accept_rate: Share of the genuine images accepted as who they are; None without any.
    """

    threshold: float
    fpir: float
    bound: float
    observed: float
    confidence: float
    strangers: int
    images: int
    effective_strangers: float
    correlation: float
    gallery_identities: int | None = None
    gallery_templates: int | None = None
    genuine_images: int = 0
    detection_rate: float | None = None
    verification_threshold: float | None = None
    fmr: float | None = None
    fmr_bound: float | None = None
    fmr_observed: float | None = None
    true_accept_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`."""
        known = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in content.items() if k in known})


def strangers_needed(fpir: float, confidence: float = 0.95) -> float:
    """Independent strangers below which no threshold can be promised: ln(1 - confidence) / ln(1 - fpir).

    So many strangers without one false alarm have the upper bound `fpir` exactly ("rule of three": about 3 / fpir).
    """
    return math.log(1 - confidence) / math.log1p(-fpir)


def upper_bound(rate: Any, effective: Any, confidence: float = 0.95) -> Floats:
    """One-sided Clopper-Pearson upper bound of a rate seen in `effective` independent trials, which need not be whole.

    Clopper and Pearson 1934 (https://doi.org/10.1093/biomet/26.4.404), with the beta quantile at fractional counts as
    Korn and Graubard 1998 use it for clustered samples.
    """
    trials, hits = np.broadcast_arrays(np.asarray(effective, float), np.asarray(rate, float) * effective)
    misses = np.maximum(trials - hits, 0)
    quantile = betaincinv(hits + 1, np.maximum(misses, 1e-9), confidence)
    return np.asarray(np.where(misses > 1e-9, quantile, 1.0), dtype=float)


def calibrate_threshold(
    scores: Any, identities: Sequence[str | None], *, fpir: float, confidence: float = 0.95
) -> Calibration:
    """Set the smallest threshold at which strangers stay unknown as promised.

    The unit is the stranger *identity*: FPIR(t) is the mean over strangers of the share of their images that score at
    least t, each stranger with equal weight, since ten pictures of one stranger are not ten strangers. How many
    independent strangers n identities with m_i images are worth follows from the intraclass correlation r (one-way
    analysis of variance) through the design effect (Kish 1965): n^2 / sum_i (1 + (m_i - 1) r) / m_i, which lies
    between the identities (r = 1) and the images (r = 0). r is the larger of that of the scores and that of "scores
    at least t", so that a few look-alikes whose every image scores high count as the few that they are.

    Thresholds are tried from the highest down as long as the Clopper-Pearson upper bound stays at or below `fpir`.
    The highest threshold that truly breaks the promise is therefore passed only if its own bound fails, which
    happens with probability 1 - confidence: choosing the threshold on the same strangers costs no confidence.

    What it rests on: the strangers are drawn from the strangers to come. It refuses fewer *identities* than
    `strangers_needed`, however many images they have: one look-alike in ten strangers is easily missed among ten.

    Args:
        scores: (N,) the best identity's score for each stranger image, larger is more alike.
        identities: N names of strangers; a None is a stranger of its own, which assumes that such images are
            independent: ten unnamed pictures of one person count as ten strangers and break the promise.
        fpir: Target false-positive identification rate, in (0, 1).
        confidence: That the rate is at most the target, in (0, 1).

    Returns:
        The calibration; the threshold lies one float above the highest score that must stay unknown.

    Raises:
        CalibrationError: Fewer stranger identities than `strangers_needed`; says how many it takes.
        ValueError: Scores that are not finite, lengths that differ, rates outside (0, 1).

    Example:
        >>> scores = np.linspace(0, 0.5, 200)
        >>> found = calibrate_threshold(scores, [None] * 200, fpir=0.05)
        >>> found.bound <= 0.05, round(found.observed, 3)
        (True, 0.02)
    """
    if not (0 < fpir < 1 and 0 < confidence < 1):
        raise ValueError(f"fpir and confidence lie between 0 and 1, got {fpir} and {confidence}; 1 % is 0.01.")
    values = np.asarray(scores)
    if values.dtype != np.float32:
        values = values.astype(np.float64)
    if values.ndim != 1 or len(values) != len(identities):
        raise ValueError(f"{values.shape} scores do not fit {len(identities)} identities; one score per image.")
    if not len(values):
        raise CalibrationError("Calibration needs images of strangers, got none: nobody that is not enrolled.")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are NaN or infinite.")

    groups = _numbers(identities)  # (N,) identity number of each image
    sizes = np.bincount(groups)  # (n,) images of each identity
    correlation = _score_correlation(values.astype(np.float64), groups, sizes)
    effective = _effective(sizes, correlation)
    refuse_if_unsupported(len(sizes), len(values), fpir, confidence)

    order = np.argsort(-values, kind="stable")
    descending = values[order]
    rates = np.cumsum(1.0 / (len(sizes) * sizes[groups[order]]))  # FPIR with the j + 1 highest scores let through
    worth = _effective(sizes, np.maximum(correlation, _hit_correlation(groups[order], sizes)))
    bounds = upper_bound(np.minimum(rates, 1), worth, confidence)
    threshold, passed = _lowest(descending, bounds, fpir)
    return Calibration(
        threshold=threshold,
        fpir=fpir,
        bound=float(bounds[passed - 1] if passed else upper_bound(0.0, effective, confidence)),
        observed=float(rates[passed - 1]) if passed else 0.0,
        confidence=confidence,
        strangers=len(sizes),
        images=len(values),
        effective_strangers=float(effective),
        correlation=correlation,
    )


def match_threshold(
    scores: Any, weights: Any, *, fmr: float, effective: float, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Set the verification threshold from scores of strangers against the identities that they might claim.

    Args:
        scores: (P,) highest scores of all (image, identity) pairs; pairs may be left out as soon as the weight of those
            that score higher exceeds `fmr`.
        weights: (P,) of each pair; over all pairs, left out ones included, they sum to 1 and to the same for every
            stranger.
        fmr: Target false match rate, in (0, 1).
        effective: Independent strangers behind the pairs.
        confidence: Of the bound.

    Returns:
        Threshold, upper bound of the false match rate there, and the rate on these pairs.
    """
    values = np.asarray(scores)
    order = np.argsort(-values, kind="stable")
    rates = np.minimum(np.cumsum(np.asarray(weights, float)[order]), 1)
    bounds = upper_bound(rates, effective, confidence)
    threshold, passed = _lowest(values[order], bounds, fmr)
    if not passed:
        return threshold, float(upper_bound(0.0, effective, confidence)), 0.0
    return threshold, float(bounds[passed - 1]), float(rates[passed - 1])


def _lowest(descending: np.ndarray[Any, Any], bounds: Floats, target: float) -> tuple[float, int]:
    """Lowest threshold reached from above without breaking the target, and how many scores it lets through."""
    broken = np.flatnonzero(bounds > target)
    if not len(broken):
        return float(descending[-1]), len(descending)
    excluded = descending[broken[0]]
    # One float above, in the precision of the scores: the comparison with later scores is then exact.
    return float(np.nextafter(excluded, excluded.dtype.type(np.inf))), int((descending > excluded).sum())


def _numbers(identities: Sequence[str | None]) -> np.ndarray[Any, np.dtype[np.int64]]:
    known: dict[object, int] = {}
    keys = (("alone", row) if name is None else name for row, name in enumerate(identities))
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


def _anova(between: Any, within: Any, sizes: np.ndarray[Any, Any]) -> Floats:
    """Intraclass correlation from sums of squares; 1 where nothing varies, since nothing then speaks for less."""
    identities, images = len(sizes), int(sizes.sum())
    if identities == 1 or images == identities:
        return np.ones(np.shape(between))
    typical = (images - (sizes.astype(float) ** 2).sum() / images) / (identities - 1)
    mean_between, mean_within = np.asarray(between) / (identities - 1), np.asarray(within) / (images - identities)
    total = mean_between + (typical - 1) * mean_within
    ratio = (mean_between - mean_within) / np.where(total > 0, total, 1)
    return np.asarray(np.clip(np.where(total > 0, ratio, 1), 0, 1), dtype=float)


def _score_correlation(scores: Floats, groups: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> float:
    means = np.bincount(groups, scores) / sizes
    between = (sizes * (means - scores.mean()) ** 2).sum()
    return float(_anova(between, ((scores - means[groups]) ** 2).sum(), sizes))


def _hit_correlation(groups: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> Floats:
    """Intraclass correlation of "is among the j + 1 highest scores" for every j; `groups` by descending score."""
    by_identity = np.argsort(groups, kind="stable")
    earlier = np.empty(len(groups), dtype=np.int64)  # images of the same identity with a higher score
    earlier[by_identity] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    squares = np.cumsum((2 * earlier + 1) / sizes[groups])  # sum over identities of hits^2 / images
    hits = np.arange(1, len(groups) + 1, dtype=float)
    between, within = squares - hits**2 / len(groups), hits - squares
    correlation = _anova(between, np.maximum(within, 0), sizes)
    correlation[-1] = 0.0  # all are let through: nothing varies, and the bound is 1 anyway
    return correlation


def _effective(sizes: np.ndarray[Any, Any], correlation: Any) -> Floats:
    variance = (1.0 / sizes).sum() * (1 - np.asarray(correlation)) + len(sizes) * np.asarray(correlation)
    return np.asarray(len(sizes) ** 2 / variance, dtype=float)


def refuse_if_unsupported(identities: int, images: int, fpir: float, confidence: float = 0.95) -> None:
    """Raise CalibrationError when so many strangers cannot support the target, whatever their scores."""
    needed = strangers_needed(fpir, confidence)
    if identities < needed * (1 - 1e-12):
        possible = 1 - (1 - confidence) ** (1 / identities)
        raise CalibrationError(
            f"A false-positive identification rate of {fpir:g} with {confidence:.0%} confidence needs "
            f"{math.ceil(needed - 1e-9)} strangers; these {images} images show {identities}, and ten pictures of one "
            f"stranger are not ten strangers. Bring more strangers, or ask for fpir >= {possible:.3g}."
        )
