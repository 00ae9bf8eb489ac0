"""Linear probe and the figures of an embedding's health against scikit-learn, SciPy and loops."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import skew
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from embedlab.metrics import (
    _ranking,
    alignment,
    effective_rank,
    feature_std,
    fit_linear_probe,
    hubness,
    linear_probe_accuracy,
    uniformity,
)
from embedlab.metrics import health as health_module
from embedlab.metrics import probes as probes_module


def cloud(rows: int = 60, dim: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1, (rows, dim)).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(params=[None, 4096], ids=["one block", "many blocks"])
def blocks(request, monkeypatch) -> None:
    """The same with hardly any memory, so that every figure is put together from many blocks."""
    if request.param:
        monkeypatch.setattr(health_module, "BUDGET", request.param)


@pytest.mark.usefixtures("blocks")
class TestHealth:
    def test_feature_std(self) -> None:
        z = unit(cloud())
        naive = np.mean([math.sqrt(sum((x - c.mean()) ** 2 for x in c) / len(c)) for c in z.T])
        assert feature_std(cloud()) == pytest.approx(naive, rel=1e-12)

    @pytest.mark.parametrize("shape", [(60, 7), (7, 60), (1, 5), (5, 1)])
    def test_effective_rank(self, shape) -> None:
        vectors = cloud(*shape)
        singular = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
        shares = singular / singular.sum()
        naive = math.exp(-sum(p * math.log(p) for p in shares))
        assert effective_rank(vectors) == pytest.approx(naive, rel=1e-7)

    @pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
    @pytest.mark.parametrize("rows", [50, 700])
    def test_effective_rank_of_collapsed_features_counts_what_is_left(self, rows, scale, monkeypatch) -> None:
        monkeypatch.setattr("embedlab.metrics.health.BUDGET", 8 * 20 * 100)  # blocks of 100 rows
        random = np.random.default_rng(0)
        left, _ = np.linalg.qr(random.standard_normal((rows, 20)))
        right, _ = np.linalg.qr(random.standard_normal((20, 20)))
        singular = np.concatenate([[1.0], np.full(19, 1e-9)])
        shares = singular / singular.sum()
        want = math.exp(-sum(p * math.log(p) for p in shares))
        assert effective_rank(scale * (left * singular) @ right) - 1 == pytest.approx(want - 1, rel=1e-5)

    @pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
    def test_alignment(self, alpha) -> None:
        first, second = cloud(), cloud(seed=1)
        naive = np.mean([np.linalg.norm(a - b) ** alpha for a, b in zip(unit(first), unit(second), strict=True)])
        assert alignment(first, second, alpha=alpha) == pytest.approx(naive, rel=1e-12)

    @pytest.mark.parametrize("t", [0.5, 2.0, 1000.0])
    def test_uniformity(self, t) -> None:
        exponents = -t * pdist(unit(cloud()), "sqeuclidean")
        naive = exponents.max() + math.log(np.exp(exponents - exponents.max()).mean())
        assert uniformity(cloud(), t=t) == pytest.approx(naive, rel=1e-9)

    @pytest.mark.parametrize("k", [1, 5, 59])
    def test_hubness(self, k) -> None:
        scores = unit(cloud()) @ unit(cloud()).T
        counts = np.zeros(60)
        for i, row in enumerate(scores):
            nearest = sorted((j for j in range(60) if j != i), key=lambda j: -row[j])
            counts[nearest[:k]] += 1
        naive = skew(counts) if counts.std() > 0 else 0.0
        assert hubness(cloud(), k=k) == pytest.approx(naive, rel=1e-9)


def test_health_of_known_shapes() -> None:
    sphere = np.random.default_rng(0).normal(size=(4000, 64))
    assert feature_std(sphere) == pytest.approx(1 / 8, rel=0.01)
    assert effective_rank(sphere) > 63
    assert uniformity(sphere) == pytest.approx(-4 + 8 / 64, abs=0.05)
    one_point = np.ones((50, 8)) * np.arange(1, 51)[:, None]
    assert (feature_std(one_point), round(effective_rank(one_point), 6)) == (0.0, 1.0)
    assert uniformity(one_point) == pytest.approx(0, abs=1e-9)
    line = sphere[:, :1] * np.ones((1, 64)) + 0  # both directions of one line
    assert effective_rank(line) == pytest.approx(1, rel=1e-6)
    assert hubness(np.random.default_rng(0).normal(size=(500, 200)), k=5) > hubness(sphere[:500, :2], k=5)


def test_health_of_long_vectors_is_measured_in_bounded_memory(monkeypatch) -> None:
    for module in (health_module, _ranking):
        monkeypatch.setattr(module, "BUDGET", 1 << 20)
    vectors = cloud(256, 20_000)
    exponents = -2 * pdist(unit(vectors), "sqeuclidean")
    tracemalloc.start()
    found = uniformity(vectors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20  # all in float64: 39 MiB
    assert found == pytest.approx(math.log(np.exp(exponents).mean()), rel=1e-9)


@pytest.mark.parametrize("row", [0, 99, 199])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_effective_rank_refuses_what_is_not_finite_in_any_block(row, value, monkeypatch) -> None:
    monkeypatch.setattr(health_module, "BUDGET", 8 * 7 * 50)  # blocks of 50 rows
    vectors = cloud(200)
    vectors[row, 3] = value
    with pytest.raises(ValueError, match="needs finite numbers that are not all zero, got NaN or inf"):
        effective_rank(vectors)


def test_torch_and_half_precision_come_in() -> None:
    vectors = torch.from_numpy(cloud())
    assert feature_std(vectors) == feature_std(cloud())
    assert effective_rank(vectors.bfloat16()) == pytest.approx(effective_rank(cloud()), rel=0.02)
    assert alignment(vectors, vectors) == 0


BAD = np.where(np.arange(7) == 3, np.nan, 1.0)[None].repeat(4, 0)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: feature_std(np.zeros((3, 2))), "row 0 is zero, so it has no direction"),
        (lambda: effective_rank(np.zeros((3, 2))), "not all zero, got zeros: diverged training, or a dead network"),
        (lambda: effective_rank(BAD), "got NaN or inf"),
        (lambda: effective_rank(np.zeros(3)), r"needs \(N, D\) numbers, got shape \(3,\)"),
        (lambda: alignment(cloud(4), cloud(5)), r"row by row; got \(4, 7\) and \(5, 7\)"),
        (lambda: alignment(cloud(4), cloud(4), alpha=0), "alpha > 0, got 0"),
        (lambda: uniformity(cloud(1)), "at least 2 vectors, got 1"),
        (lambda: uniformity(cloud(), t=-1), "t > 0, got -1"),
        (lambda: hubness(cloud(5), k=5), "k=5 needs more than k vectors, got 5; lower k"),
        (lambda: hubness(cloud(5), k=0), "at least 1, got 0"),
        (lambda: fit_linear_probe(BAD, [0, 1, 0, 1]), "train row 0 holds NaN or infinity"),
        (lambda: fit_linear_probe(cloud(4), ["a"] * 4), "tells classes apart, but all 4 labels are a"),
        (lambda: fit_linear_probe(cloud(4), [0, 1, 0]), "3 entries for 4 rows"),
        (lambda: fit_linear_probe(cloud(4), [0, 1, 0, 1], regularization=-1), "a number >= 0, or several, got -1"),
        (lambda: fit_linear_probe(cloud(4), [0, 1, 0, 1]).predict(cloud(4, 3)), "fitted on 7 features, got 3"),
        (lambda: linear_probe_accuracy(cloud(4), [0, 1, 0, 1], cloud(4), ["0"] * 4), "nothing would ever match"),
        (lambda: fit_linear_probe(np.zeros(4), [0, 1, 0, 1]), r"must be \(N, D\) numbers, got shape \(4,\)"),
    ],
)
def test_errors_teach(call, told) -> None:
    with pytest.raises(ValueError, match=told):
        call()


# ------------------------------------------------------------------------------------------------------ linear probe


def problem(classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    features, labels = make_classification(
        300, 12, n_informative=6, n_classes=classes, random_state=0, shift=3.0, scale=5.0
    )
    return features, labels


@pytest.mark.parametrize("strength", [1.0, 0.01, 1e-4])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_probe_is_scikit_learns_logistic_regression(strength, classes) -> None:
    features, labels = problem(classes)
    probe = fit_linear_probe(features[:200], labels[:200], regularization=strength)
    standard = StandardScaler().fit(features[:200])
    # of two classes scikit-learn keeps the difference of their weights only, whose penalty is half as strong
    oracle = LogisticRegression(C=(2 if classes == 2 else 1) / (strength * 200), tol=1e-10, max_iter=10_000)
    oracle.fit(standard.transform(features[:200]), labels[:200])
    found, wanted = probe.weight.T, np.c_[oracle.coef_, oracle.intercept_]
    found = np.c_[found, probe.bias - probe.bias.mean()]
    if classes == 2:
        found = found[1:] - found[:1]
    else:
        wanted[:, -1] -= wanted[:, -1].mean()
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=5e-4)
    accuracy = linear_probe_accuracy(
        features[:200], labels[:200], features[200:], labels[200:], regularization=strength
    )
    assert accuracy == oracle.score(standard.transform(features[200:]), labels[200:])


def test_the_penalty_is_chosen_on_training_rows_only() -> None:
    """By hand: the held-out fifth of the training rows, each strength with scikit-learn."""
    features, labels = problem()
    train, codes = features[:200], labels[:200]
    held = probes_module._held_out(codes, 0)
    assert [(held & (codes == code)).sum() for code in range(4)] == [(codes == c).sum() // 5 for c in range(4)]
    standard = StandardScaler().fit_transform(train)
    scores = {}
    for strength in probes_module.STRENGTHS:
        oracle = LogisticRegression(C=1 / (strength * (~held).sum()), tol=1e-10, max_iter=10_000)
        scores[strength] = oracle.fit(standard[~held], codes[~held]).score(standard[held], codes[held])
    best = max(scores.values())
    probe = fit_linear_probe(train, codes)
    assert probe.regularization == max(strength for strength, score in scores.items() if score == best)
    again = fit_linear_probe(train, codes)
    assert np.array_equal(probe.weight, again.weight)
    assert np.array_equal(probe.bias, again.bias)


def test_the_probe_reads_digits() -> None:
    digits = load_digits()
    accuracy = linear_probe_accuracy(digits.data[:1200], digits.target[:1200], digits.data[1200:], digits.target[1200:])
    oracle = LogisticRegression(C=0.1, max_iter=5000)
    standard = StandardScaler().fit(digits.data[:1200])
    oracle.fit(standard.transform(digits.data[:1200]), digits.target[:1200])
    assert accuracy >= oracle.score(standard.transform(digits.data[1200:]), digits.target[1200:]) - 0.01


@pytest.mark.parametrize("strengths", [0.1, (1.0, 0.1)], ids=["one strength", "several"])
def test_features_are_held_twice_and_those_given_stay_as_they_were(strengths) -> None:
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(20_000, 64)), generator.integers(0, 3, 20_000)
    before = features.copy()
    tracemalloc.start()
    probe = fit_linear_probe(features, labels, regularization=strengths, iterations=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.4 * features.nbytes
    probe.predict(features)
    np.testing.assert_array_equal(features, before)


def test_constant_features_unseen_classes_and_single_rows() -> None:
    features = np.array([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    probe = fit_linear_probe(features, ["a", "a", "b", "b"])
    assert (probe.weight[1] == 0).all()
    assert linear_probe_accuracy(features, ["a", "a", "b", "b"], features[:2], ["a", "never seen"]) == 0.5
    lonely = fit_linear_probe(features[[0, 3]], ["a", "b"])  # no row to spare for a choice
    assert lonely.regularization == max(probes_module.STRENGTHS)
    assert lonely.predict(features[[0, 3]]).tolist() == ["a", "b"]
