"""The unknown threshold: the promise that a stranger is taken for somebody enrolled in at most so many cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from scipy.special import betaincinv, ndtri

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

MOST_GROWTH = 3.0  # times the present number of identities
SMALLEST_TO_GROW = 16  # identities: two in each eighth of the gallery
BOOTSTRAPS = 200
CURVE_POINTS = 100
RATES = {"fpir": "false-positive identification rate", "fmr": "false match rate"}


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
        effective_strangers: Independent strangers that those images are worth, between the two; half of it by
            leave-identity-out.
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
        growth: The promise holds for a gallery of up to so many times `gallery_identities`.
        source: "strangers", or "leave-identity-out": every enrolled identity has played the stranger to the others.
        sub_galleries: (identities, threshold at which strangers are let in at the rate `fpir`, rate at `threshold`)
            of random sub-galleries of an eighth, a quarter, a half, and of the whole; empty in a tiny gallery.
        curve: The operating curve, (threshold, observed, bound, detection rate or None) from the highest threshold
            down, at most 100 points.
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
    growth: float = 1.0
    source: str = "strangers"
    sub_galleries: tuple[tuple[float, float, float], ...] = ()
    curve: tuple[tuple[float, float, float, float | None], ...] = ()

    def is_stale(self, identities: int) -> bool:
        """Whether a gallery of so many identities has outgrown the promise."""
        return self.gallery_identities is not None and identities > self.growth * self.gallery_identities + 1e-9

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`, also after a way through JSON and of older ones, which had fewer entries."""
        known = {field.name for field in fields(cls)}
        kept = {key: value for key, value in content.items() if key in known}
        for name in {"sub_galleries", "curve"} & kept.keys():
            kept[name] = tuple(tuple(point) for point in kept[name])
        return cls(**kept)


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
    scores: Any,
    identities: Sequence[str | None],
    *,
    fpir: float,
    confidence: float = 0.95,
    rise: float = 0.0,
    mutual: bool = False,
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
        rise: Added to the threshold, for a gallery that is to grow; see `rise_with_growth`.
        mutual: The strangers were scored against one another. Two that look alike then both raise a false alarm, so
            that alarms come in twos: two strangers count for one, and twice as many are needed.

    Returns:
        The calibration; without a rise the threshold lies one float above the highest score that must stay unknown.

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
    share = 0.5 if mutual else 1.0
    effective = share * float(_effective(sizes, correlation))
    refuse_if_unsupported(len(sizes), len(values), fpir, confidence, effective=effective, mutual=mutual)

    order = np.argsort(-values, kind="stable")
    descending = values[order]
    rates = np.cumsum(1.0 / (len(sizes) * sizes[groups[order]]))  # FPIR with the j + 1 highest scores let through
    worth = share * _effective(sizes, np.maximum(correlation, _hit_correlation(groups[order], sizes)))
    bounds = upper_bound(np.minimum(rates, 1), worth, confidence)
    threshold, passed = _lowest(descending, bounds, fpir)
    if rise:
        threshold = float(np.nextafter(values.dtype.type(threshold + rise), values.dtype.type(np.inf)))
        passed = int((descending >= threshold).sum())
    return Calibration(
        threshold=threshold,
        fpir=fpir,
        bound=float(bounds[passed - 1] if passed else upper_bound(0.0, effective, confidence)),
        observed=float(rates[passed - 1]) if passed else 0.0,
        confidence=confidence,
        strangers=len(sizes),
        images=len(values),
        effective_strangers=effective,
        correlation=correlation,
        curve=_operating_points(descending, rates, bounds),
    )


def _operating_points(
    descending: np.ndarray[Any, Any], rates: Floats, bounds: Floats
) -> tuple[tuple[float, float, float, None], ...]:
    """Points between which the number of images let through grows by about the same factor."""
    last = np.flatnonzero(np.append(descending[1:] < descending[:-1], True))  # equal scores stand or fall together
    steps = np.unique(np.geomspace(1, len(descending), CURVE_POINTS).round().astype(int)) - 1
    chosen = np.unique(last[np.searchsorted(last, steps)])
    return tuple(
        (float(f"{descending[row]:.9g}"), float(f"{min(rates[row], 1):.5g}"), float(f"{bounds[row]:.5g}"), None)
        for row in chosen.tolist()
    )


def rise_with_growth(
    tables: Mapping[float, Any],
    identities: Sequence[str | None],
    *,
    fpir: float,
    growth: float,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, dict[float, float]]:
    """How far a threshold must rise so that its promise holds in a gallery of `growth` times the size.

    The more identities, the higher the best score of a stranger. That is seen on the gallery itself: t(n), the
    threshold at which random sub-galleries of n identities let strangers in at the rate `fpir`, is about linear in
    log n. (Where the scores of strangers fall off exponentially it is exactly so; where they fall off faster, as a
    normal distribution and every bounded score do, the line lies above the truth.) The rise is slope x log(growth),
    from the least-squares line through the sub-galleries, plus a normal margin at `confidence` for two unknowns: the
    slope, by a bootstrap over strangers, and who will be enrolled, by how much t(n) differs between disjoint
    sub-galleries, scaled to the size of the gallery. It is never below 0.

    The textbook formula 1 - (1 - FMR)^n is not used: it takes the scores of one stranger against n identities for
    independent, which they are not.

    Args:
        tables: Number of identities to (N, R) best scores of N stranger images in R random sub-galleries of that size;
            two sizes at least, and for all but the largest two columns at least.
        identities: N names of strangers, as in `calibrate_threshold`.
        fpir: Target rate.
        growth: Identities to come over identities now, from 1 to `MOST_GROWTH`.
        confidence: Of the margin.
        seed: Of the bootstrap.

    Returns:
        The rise, in units of the scores, and t(n) for every size.
    """
    groups = _numbers(identities)
    sizes = np.bincount(groups)
    weights = 1.0 / (len(sizes) * sizes[groups])  # (N,) of each image
    counts = sorted(tables)
    tops = {n: _sorted_scores(np.asarray(tables[n], dtype=np.float64)) for n in counts}
    found = {n: _quantile(*tops[n], weights, fpir) for n in counts}
    if growth == 1:
        return 0.0, found
    line = np.log(counts) - np.mean(np.log(counts))
    line /= line @ line  # slope = line @ thresholds
    random = np.random.default_rng(seed)
    slopes = []
    for _ in range(BOOTSTRAPS):
        drawn = np.bincount(random.integers(0, len(sizes), len(sizes)), minlength=len(sizes))
        slopes.append(line @ [_quantile(*tops[n], weights * drawn[groups], fpir) for n in counts])
    apart = [np.var(_quantiles(tables[n], weights, fpir), ddof=1) * n / counts[-1] for n in counts[:-1]]
    variance = np.var(slopes, ddof=1) * math.log(growth) ** 2 + np.mean(apart) * (1 - 1 / growth)
    slope = line @ list(found.values())
    return max(0.0, float(slope * math.log(growth) + ndtri(confidence) * math.sqrt(variance))), found


def _sorted_scores(table: Floats) -> tuple[Floats, np.ndarray[Any, Any]]:
    """Scores of a table (N, R) from the highest down, and the row that each comes from."""
    order = np.argsort(-table, axis=None, kind="stable")
    return table.ravel()[order], order // table.shape[1]


def _quantile(descending: Floats, rows: np.ndarray[Any, Any], weights: Floats, rate: float) -> float:
    """Highest score at which a share above `rate` of the weight is let through."""
    passed = np.cumsum(weights[rows])
    place = np.searchsorted(passed, rate * passed[-1] * (1 + 1e-12), side="right")  # sums round
    return float(descending[min(int(place), len(descending) - 1)])


def _quantiles(table: Any, weights: Floats, rate: float) -> list[float]:
    """`_quantile` of every column."""
    return [_quantile(*_sorted_scores(column[:, None]), weights, rate) for column in np.asarray(table, np.float64).T]


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


def refuse_if_unsupported(
    identities: int,
    images: int,
    target: float,
    confidence: float = 0.95,
    *,
    effective: float | None = None,
    mutual: bool = False,
    rate: str = "fpir",
) -> None:
    """Raise CalibrationError when so many strangers cannot support the target, whatever their scores."""
    each = 2 if mutual else 1  # see `calibrate_threshold`
    needed = each * strangers_needed(target, confidence)
    if identities < needed * (1 - 1e-12):
        possible = 1 - (1 - confidence) ** (each / identities)
        worth = "" if effective is None else f" (by the spread of their scores worth {effective:.0f} independent ones)"
        raise CalibrationError(
            f"A {RATES[rate]} of {target:g} with {confidence:.0%} confidence needs "
            f"{math.ceil(needed - 1e-9)} strangers; these {images} images show {identities}, and ten pictures of one "
            f"stranger are not ten strangers{worth}. "
            + ("They play the stranger to one another, so that two count for one. " if mutual else "")
            + f"Bring more strangers, or ask for {rate} >= {possible:.3g}."
        )


def refuse_growth(growth: float, identities: int, fusion: str) -> None:
    """Raise unless a promise may be extrapolated so far from a gallery of so many identities."""
    if not 1 <= growth <= MOST_GROWTH:
        raise ValueError(
            f"growth is from 1 to {MOST_GROWTH:g} times the present size, got {growth:g}: how a threshold rises is "
            f"measured on sub-galleries of an eighth of the gallery up to all of it, and further than {MOST_GROWTH:g} "
            "times beyond that the measured line is a guess. Enroll more identities first, then calibrate again."
        )
    if growth > 1 and fusion == "vote":
        raise ValueError(
            f"growth={growth:g} cannot be promised with fusion='vote': votes are counted, so that the threshold rises "
            "in steps with the gallery and not along a line that could be measured. Use fusion='max' or 'mean', or "
            "leave growth out and calibrate again as the gallery grows."
        )
    if growth > 1 and identities < SMALLEST_TO_GROW:
        raise ValueError(
            f"growth={growth:g} needs at least {SMALLEST_TO_GROW} enrolled identities, to measure on sub-galleries how "
            f"the threshold rises; this gallery has {identities}. Leave growth out and calibrate again as it grows."
        )
