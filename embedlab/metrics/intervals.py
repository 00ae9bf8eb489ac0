"""How sure is a figure? Intervals over identities, because ten pictures of one person are not ten people."""

from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from embedlab.metrics._arrays import Floats, Integers, as_array, as_count, as_labels

_BLOCK = 4 << 20  # numbers drawn at a time
_ROUNDING = 1e-12  # by which draws of one value differ


def bootstrap_interval(
    values: Any, identities: Any, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a mean, by resampling identities (Efron 1979; clusters: Field and Welsh 2007).

    Whole identities are drawn with replacement, each with all of its samples, and the mean over all drawn samples is
    taken. With few identities, or values that are all alike, such an interval is too narrow; for a share
    near 0 or 1 `wilson_interval` over identities is the safer one.

    Args:
        values: (N,) one value per sample, such as `RetrievalReport.per_query`; NaN (a skipped query) is left out.
        identities: (N,) whose sample it is.
        confidence: Probability in the middle, in (0, 1).
        resamples: How many means are taken.
        seed: Of the draws; the same seed gives the same interval.

    Returns:
        (low, high).

    Raises:
        ValueError: Lengths that do not fit, infinite values, fewer than two identities with a value, confidence
            outside (0, 1), resamples below 1.

    Example:
        >>> low, high = bootstrap_interval([1, 1, 0, 0, 1, 1], ["ann", "ann", "bob", "bob", "eve", "eve"])
        >>> low, high
        (0.0, 1.0)
    """
    found = bootstrap_intervals({"values": values}, identities, confidence=confidence, resamples=resamples, seed=seed)
    return found["values"]


def bootstrap_intervals(
    values: Mapping[str, Any], identities: Any, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """`bootstrap_interval` of several figures of the same samples, from the same draws.

    Args:
        values: Name to (N,) values.
        identities: See `bootstrap_interval`, as for the other arguments.
        confidence: Probability in the middle, in (0, 1).
        resamples: How many means are taken.
        seed: Of the draws.

    Returns:
        Name to (low, high): for each what `bootstrap_interval` gives.

    Raises:
        ValueError: As `bootstrap_interval`.

    Example:
        >>> bootstrap_intervals({"recall": [1, 1, 0, 0]}, ["ann", "ann", "bob", "bob"])
        {'recall': (0.0, 1.0)}
    """
    tail = (1 - _checked_confidence(confidence)) / 2
    resamples = as_count(resamples, "bootstrap_interval needs resamples to be")
    together: dict[bytes, dict[str, Floats]] = {}  # figures that leave out the same samples share their draws
    for name, given in values.items():
        samples = _finite(given, name)
        together.setdefault(np.isnan(samples).tobytes(), {})[name] = samples
    found: dict[str, tuple[float, float]] = {}
    for figures in together.values():
        columns = np.stack(list(figures.values()), axis=1)
        means = _resampled_means(columns, identities, resamples, seed)
        for name, (low, high) in zip(figures, np.quantile(means, [tail, 1 - tail], axis=0).T, strict=True):
            found[name] = (float(low), float(high))
    return {name: found[name] for name in values}


def _resampled_means(samples: Floats, identities: Any, resamples: int, seed: int) -> Floats:
    """Means (R, M) of samples (N, M), whole identities drawn with replacement."""
    kept = ~np.isnan(samples[:, 0])
    codes = np.unique(as_labels(identities, "identities", len(samples))[kept], return_inverse=True)[1]
    samples = samples[kept]
    count = int(codes.max()) + 1 if len(codes) else 0
    if count < 2:
        raise ValueError(
            f"bootstrap_interval draws identities and needs at least 2 that have a value, got {count}: "
            "are identities the labels of the samples?"
        )
    sums = np.stack([np.bincount(codes, weights=column) for column in samples.T], axis=1)  # (C, M)
    sizes = np.bincount(codes)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, max(1, _BLOCK // count)):
        rows = min(max(1, _BLOCK // count), resamples - start)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=rows)  # (rows, identities): how often
        means.append((drawn @ sums) / (drawn @ sizes)[:, None])
    return np.concatenate(means)


def bootstrap_statistic(
    statistic: Callable[[Integers], float],
    identities: Any,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of any figure (an AUC, a rate at a threshold), by resampling identities.

    Whole identities are drawn with replacement, each with all of its rows, and the figure is taken anew from the drawn
    rows. For figures of pairs, such as an equal error rate, see `verification_resamples`.

    Args:
        statistic: Row numbers, a drawn row as often as it counts, to the figure. NaN or a ValueError is an undefined
            figure, such as the AUC of a draw without positives; such draws are left out.
        identities: (N,) whose row it is: a person, a group of near-duplicates.
        confidence: Probability in the middle, in (0, 1).
        resamples: How many draws.
        seed: Of the draws; the same seed gives the same interval.

    Returns:
        (low, high).

    Raises:
        ValueError: Lengths that do not fit, fewer than two identities, a figure that is undefined on all rows or in
            more than a tenth of the draws, resamples below 1.

    Example:
        >>> from embedlab.metrics import roc_auc
        >>> import numpy as np
        >>> scores, positive = np.array([0.9, 0.8, 0.7, 0.1, 0.6, 0.2]), np.array([1, 0, 1, 0, 1, 0])
        >>> owners = ["a", "a", "b", "b", "c", "c"]
        >>> bootstrap_statistic(lambda rows: roc_auc(scores[rows], positive[rows]), owners, resamples=200)
        (0.7777777777777778, 1.0)
    """
    tail = (1 - _checked_confidence(confidence)) / 2
    resamples = as_count(resamples, "bootstrap_statistic needs resamples to be")
    owners = as_labels(identities, "identities")
    found, codes = np.unique(owners, return_inverse=True)
    if len(found) < 2:
        raise ValueError(f"bootstrap_statistic draws identities and needs at least 2, got {len(found)}.")
    statistic(np.arange(len(owners)))  # what is undefined on all rows says why
    generator = np.random.default_rng(seed)
    figures = []
    for _ in range(resamples):
        drawn = np.bincount(generator.integers(len(found), size=len(found)), minlength=len(found))
        figures.append(_or_nan(statistic, np.repeat(np.arange(len(owners)), drawn[codes])))
    defined = np.array(figures)[~np.isnan(figures)]
    if len(defined) < 0.9 * resamples:
        raise ValueError(
            f"The figure is undefined in {resamples - len(defined)} of {resamples} draws of {len(found)} identities: "
            "too few of them have what it is about (positives, strangers). Give the figure without an interval."
        )
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def _or_nan(statistic: Callable[[Integers], float], rows: Integers) -> float:
    try:
        return float(statistic(rows))
    except ValueError:
        return float("nan")


def paired_interval(
    first: Any, second: Any, identities: Any, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean difference first - second between two encoders on the same samples, over identities.

    What both find easy or hard cancels, so that this is far narrower than two separate intervals suggest. An interval
    that does not hold 0 says that the encoders differ.

    Args:
        first: (N,) one value per sample, such as `RetrievalReport.per_query`.
        second: (N,) the same samples in the same order, by the other encoder. A sample that is NaN in either is left
            out.
        identities: (N,) whose sample it is.
        confidence: See `bootstrap_interval`, as for the other arguments.
        resamples: How many means are taken.
        seed: Of the draws.

    Raises:
        ValueError: As `bootstrap_interval`, and for two lengths.

    Example:
        >>> paired_interval([1, 1, 1, 0], [1, 0, 1, 0], ["ann", "ann", "bob", "bob"])
        (0.0, 0.5)
    """
    ours, theirs = _finite(first, "first"), _finite(second, "second")
    if ours.shape != theirs.shape:
        raise ValueError(
            f"first and second must be about the same samples, got shapes {ours.shape} and {theirs.shape}: "
            "two different test sets?"
        )
    return bootstrap_interval(ours - theirs, identities, confidence=confidence, resamples=resamples, seed=seed)


def wilson_interval(successes: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share, Wilson 1927 (https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        successes: How many of the trials; may be fractional where trials are an effective number.
        trials: Independent trials: identities, not their pictures.
        confidence: Probability in the middle, in (0, 1).

    Returns:
        (low, high), inside [0, 1].

    Raises:
        ValueError: No trials, successes outside [0, trials], confidence outside (0, 1).

    Example:
        >>> low, high = wilson_interval(0, 20)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.161)
    """
    if not (trials > 0 and 0 <= successes <= trials):
        raise ValueError(f"wilson_interval needs 0 <= successes <= trials and trials > 0, got {successes} of {trials}.")
    z = NormalDist().inv_cdf((1 + _checked_confidence(confidence)) / 2)
    share, shrink = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / shrink
    half = z * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5 / shrink
    # exact at the ends, where rounding would leave 1e-17
    return (max(0.0, middle - half) if successes else 0.0), (min(1.0, middle + half) if successes < trials else 1.0)


def told_interval(
    interval: tuple[float, float], identities: Any, *, share: float | None = None
) -> tuple[float, float] | None:
    """A 95 % interval of a bootstrap as it may be told: none claims certainty because all draws gave the same.

    Samples without a mistake show none in any draw, which says nothing of how rare mistakes are.

    Args:
        interval: What `bootstrap_interval` or `bootstrap_statistic` gave.
        identities: (N,) what was drawn.
        share: The figure, where it is a share of the samples in [0, 1], such as an accuracy or a recall.

    Returns:
        The interval. Where it has no width, of a share `wilson_interval` with identities as trials, and of other
        figures (an AUC, an MCC) None.

    Raises:
        ValueError: A share outside [0, 1].

    Example:
        >>> told_interval((0.8, 0.9), ["ann", "bob"])
        (0.8, 0.9)
        >>> low, high = told_interval((1.0, 1.0), ["ann", "ann", "bob"], share=1.0)
        >>> round(low, 3), high
        (0.342, 1.0)
        >>> told_interval((1.0, 1.0), ["ann", "ann", "bob"]) is None
        True
    """
    if interval[1] - interval[0] > _ROUNDING:
        return interval
    if share is None:
        return None
    trials = len(set(as_labels(identities, "identities").tolist()))
    return wilson_interval(share * trials, trials)


def _finite(values: Any, name: str) -> Floats:
    """(N,) numbers, NaN where there is none."""
    samples = as_array(values).astype(np.float64)
    if samples.ndim != 1:
        raise ValueError(f"{name} must be (N,) numbers, got shape {samples.shape}.")
    if np.isinf(samples).any():
        raise ValueError(
            f"{name}[{int(np.isinf(samples).argmax())}] is infinite, and so would be the mean: a division by zero "
            "upstream? NaN says that a sample has no value."
        )
    return samples


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}; 0.95 is usual.")
    return confidence
