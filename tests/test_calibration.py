"""The promise of the unknown threshold: simulated galleries with known truth, oracles by hand, refusals."""

import numpy as np
import pytest
from scipy import stats

from embedlab.retrieval import Calibration, CalibrationError, calibrate_threshold
from embedlab.retrieval.calibration import match_threshold, strangers_needed, upper_bound


def simulated_strangers(random, *, identities, images, correlation):
    """Scores of standard normal strangers whose images correlate; P(score >= t) is then known exactly."""
    sizes = random.integers(1, images + 1, identities)
    names = np.repeat(np.arange(identities), sizes)
    shared = random.standard_normal(identities)[names]
    scores = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * random.standard_normal(len(names))
    return scores, [f"stranger {name}" for name in names]


def share_of_broken_promises(rule, *, runs=300, fpir=0.05):
    random = np.random.default_rng(20)
    broken = 0
    for run in range(runs):
        identities, images = [(60, 1), (80, 6), (150, 10), (400, 4)][run % 4]
        correlation = [0.0, 0.1, 0.3, 0.7][run // 4 % 4]
        scores, names = simulated_strangers(random, identities=identities, images=images, correlation=correlation)
        broken += stats.norm.sf(rule(scores, names, fpir)) > fpir
    return broken / runs


def test_the_promise_is_broken_in_at_most_one_of_twenty_simulated_galleries():
    assert share_of_broken_promises(lambda s, n, fpir: calibrate_threshold(s, n, fpir=fpir).threshold) <= 0.07


def test_a_percentile_of_the_strangers_fails_the_same_simulation():
    assert share_of_broken_promises(lambda scores, _, fpir: np.quantile(scores, 1 - fpir)) > 0.3


def test_look_alikes_whose_every_image_scores_high_count_as_the_few_that_they_are():
    """One stranger in ten resembles somebody enrolled, in all of its images; all else is noise."""
    random = np.random.default_rng(3)
    broken = 0
    for _ in range(200):
        alike = 2.0 * (random.random(120) < 0.1)
        scores = (alike[:, None] + random.standard_normal((120, 5))).ravel()
        threshold = calibrate_threshold(scores, [str(i // 5) for i in range(600)], fpir=0.05).threshold
        broken += 0.9 * stats.norm.sf(threshold) + 0.1 * stats.norm.sf(threshold - 2) > 0.05
    assert broken / 200 <= 0.08


def slow_fpir(scores, names, threshold):
    """Mean over strangers of the share of their images at or above the threshold, in loops."""
    shares = []
    for name in dict.fromkeys(names):
        mine = [score for score, other in zip(scores, names, strict=True) if other == name]
        shares.append(sum(score >= threshold for score in mine) / len(mine))
    return sum(shares) / len(shares)


def slow_correlation(values, names):
    """One-way analysis of variance in loops, unbalanced, cut to 0..1."""
    groups = [[v for v, n in zip(values, names, strict=True) if n == name] for name in dict.fromkeys(names)]
    total, count = len(values), len(groups)
    mean = sum(values) / total
    between = sum(len(g) * (sum(g) / len(g) - mean) ** 2 for g in groups) / (count - 1)
    within = sum((v - sum(g) / len(g)) ** 2 for g in groups for v in g) / (total - count)
    typical = (total - sum(len(g) ** 2 for g in groups) / total) / (count - 1)
    return min(1, max(0, (between - within) / (between + (typical - 1) * within)))


def slow_bound(scores, names, threshold):
    rate = slow_fpir(scores, names, threshold)
    hits = [float(score >= threshold) for score in scores]
    r = max(slow_correlation(scores, names), slow_correlation(hits, names) if 0 < sum(hits) < len(hits) else 0)
    sizes = [names.count(name) for name in dict.fromkeys(names)]
    effective = len(sizes) ** 2 / sum((1 + (size - 1) * r) / size for size in sizes)
    return stats.beta.ppf(0.95, rate * effective + 1, effective - rate * effective)


@pytest.mark.parametrize("seed", range(5))
def test_threshold_bound_and_rate_equal_those_of_slow_loops(seed):
    scores, names = simulated_strangers(np.random.default_rng(seed), identities=60, images=5, correlation=0.4)
    found = calibrate_threshold(scores, names, fpir=0.1)
    descending = sorted(scores, reverse=True)
    passed = 0
    while slow_bound(scores, names, descending[passed]) <= 0.1:
        passed += 1
    assert passed > 0
    assert found.threshold == np.nextafter(descending[passed], np.inf)  # strictly above the highest excluded score
    assert found.observed == pytest.approx(slow_fpir(scores, names, found.threshold))
    assert found.bound == pytest.approx(slow_bound(scores, names, descending[passed - 1]))
    assert 60 <= found.effective_strangers <= len(scores)


def test_correlation_and_effective_strangers_against_the_textbook():
    """Balanced one-way analysis of variance, and n m / (1 + (m - 1) r)."""
    table = np.random.default_rng(1).standard_normal((40, 1)) + np.random.default_rng(2).standard_normal((40, 5))
    between = 5 * table.mean(axis=1).var(ddof=1)
    within = table.var(axis=1, ddof=1).mean()
    correlation = (between - within) / (between + 4 * within)
    found = calibrate_threshold(table.ravel(), [str(i // 5) for i in range(200)], fpir=0.2)
    assert found.correlation == pytest.approx(correlation)
    assert found.effective_strangers == pytest.approx(200 / (1 + 4 * correlation))


@pytest.mark.parametrize(("hits", "trials"), [(0, 59), (3, 100), (17, 400), (5, 5)])
def test_upper_bound_is_the_one_of_clopper_and_pearson(hits, trials):
    want = stats.binomtest(hits, trials, alternative="less").proportion_ci(0.95, method="exact").high
    assert upper_bound(hits / trials, trials) == pytest.approx(want)


def test_upper_bound_in_between_whole_numbers_lies_in_between():
    assert upper_bound(2 / 100, 100) < upper_bound(2.5 / 100, 100) < upper_bound(3 / 100, 100)


def test_ten_pictures_of_one_stranger_are_not_ten_strangers():
    scores = np.repeat(np.linspace(0, 1, 40), 10)
    names = [str(i // 10) for i in range(400)]
    with pytest.raises(CalibrationError, match="needs 59 strangers; these 400 images show 40, and ten pictures of one"):
        calibrate_threshold(scores, names, fpir=0.05)


def test_refusal_names_the_rate_that_would_be_supported():
    scores = np.linspace(0, 1, 100)
    with pytest.raises(CalibrationError, match=r"needs 299 strangers.* ask for fpir >= 0\.0295"):
        calibrate_threshold(scores, [None] * 100, fpir=0.01)
    assert calibrate_threshold(scores, [None] * 100, fpir=0.02952).observed == 0


def test_exactly_as_many_strangers_as_needed_are_enough():
    assert strangers_needed(0.05) == pytest.approx(58.4, abs=0.05)
    found = calibrate_threshold(np.linspace(0, 1, 59), [None] * 59, fpir=0.05)
    assert (found.threshold, found.observed) == (np.nextafter(1.0, 2.0), 0.0)


def test_equal_scores_are_let_through_together_or_not_at_all():
    scores = np.array([0.9] * 20 + [0.5] * 180)
    assert calibrate_threshold(scores, [None] * 200, fpir=0.05).threshold == np.nextafter(0.9, 1)
    found = calibrate_threshold(scores, [None] * 200, fpir=0.15)
    assert (found.threshold, found.observed) == (np.nextafter(0.5, 1), pytest.approx(0.1))


def test_float32_scores_give_a_threshold_that_float32_can_tell_apart():
    scores = np.linspace(0, 1, 100, dtype=np.float32)
    threshold = calibrate_threshold(scores, [None] * 100, fpir=0.05).threshold
    assert np.float32(threshold) == threshold
    assert threshold not in scores
    assert (scores >= np.float32(threshold)).mean() <= 0.05


def test_many_images_of_few_strangers_do_not_replace_strangers():
    scores = np.random.default_rng(0).standard_normal(600)
    names = [str(i // 30) for i in range(600)]
    with pytest.raises(CalibrationError, match="these 600 images show 20"):
        calibrate_threshold(scores, names, fpir=0.05)
    found = calibrate_threshold(scores, names, fpir=0.15)
    assert found.effective_strangers > 20, "above the number needed, independent images do sharpen the bound"


def test_match_threshold_needs_only_the_highest_pairs():
    random = np.random.default_rng(5)
    scores, weights = random.standard_normal(5000), np.full(5000, 1 / 5000)
    top = np.argsort(-scores)[:260]
    everything = match_threshold(scores, weights, fmr=0.05, effective=200)
    assert match_threshold(scores[top], weights[top], fmr=0.05, effective=200) == everything
    assert everything[1] <= 0.05
    assert (scores >= everything[0]).mean() == pytest.approx(everything[2])


def test_calibration_survives_json():
    found = calibrate_threshold(np.linspace(0, 1, 100), [None] * 100, fpir=0.05)
    assert Calibration.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("scores", "names", "fpir", "text"),
    [
        ([0.1, np.nan], ["a", "b"], 0.5, "1 of 2 scores are NaN"),
        ([0.1, 0.2], ["a"], 0.5, "do not fit 1 identities"),
        ([0.1, 0.2], ["a", "b"], 5, "1 % is 0.01"),
        ([], [], 0.5, "needs images of strangers, got none"),
        ([0.1] * 9, ["a"] * 9, 0.5, "needs 5 strangers; these 9 images show 1"),
    ],
    ids=["NaN", "lengths", "percent", "empty", "one stranger"],
)
def test_bad_input_is_refused(scores, names, fpir, text):
    with pytest.raises(ValueError, match=text):
        calibrate_threshold(np.array(scores), names, fpir=fpir)
