"""Every metric against an outside oracle: scikit-learn, or loops in float64."""

import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import sklearn.metrics
import torch
from naive import (
    naive_average_precision,
    naive_fpir_fnir,
    naive_hits,
    naive_knn_accuracy,
    naive_map_at_r,
    naive_ndcg,
    naive_precision_at_k,
    naive_r_precision,
    naive_rankings,
    naive_recall_at_k,
    naive_reciprocal_rank,
    naive_tar_at_far,
)
from scipy.optimize import brentq

from embedlab import metrics
from embedlab.metrics import _ranking

RETRIEVAL = {
    "recall": (metrics.recall_at_k, {"k": 3}, lambda hits: naive_recall_at_k(hits, 3)),
    "precision": (metrics.precision_at_k, {"k": 4}, lambda hits: naive_precision_at_k(hits, 4)),
    "r_precision": (metrics.r_precision, {}, naive_r_precision),
    "map_at_r": (metrics.map_at_r, {}, naive_map_at_r),
    "map": (metrics.mean_average_precision, {}, naive_average_precision),
    "mrr": (metrics.mean_reciprocal_rank, {}, naive_reciprocal_rank),
    "mrr@2": (metrics.mean_reciprocal_rank, {"k": 2}, lambda hits: naive_reciprocal_rank(hits, 2)),
    "ndcg": (metrics.ndcg_at_k, {}, naive_ndcg),
    "ndcg@4": (metrics.ndcg_at_k, {"k": 4}, lambda hits: naive_ndcg(hits, 4)),
    "map@5": (metrics.mean_average_precision, {"k": 5}, lambda hits: naive_average_precision(hits, 5)),
}


def embeddings(rows, classes, seed=0, dim=6, kind="continuous"):
    """Clustered vectors of any norm and their labels; "ties" has only a few distinct directions."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, rows)
    if kind == "ties":
        vectors = generator.integers(-1, 2, (rows, dim)).astype(np.float32)
        vectors[~vectors.any(axis=1)] = 1
    else:
        centres = np.random.default_rng(99).standard_normal((classes, dim))
        vectors = (centres[labels] + generator.standard_normal((rows, dim))).astype(np.float32)
        vectors *= generator.uniform(0.1, 10, (rows, 1)).astype(np.float32)
    return vectors, labels


@pytest.fixture(params=["one block", "small blocks", "whole rows"])
def engine(request, monkeypatch):
    """All ways through the ranking engine: several chunks and panels, neighbours only, whole rows only."""
    if request.param == "small blocks":
        monkeypatch.setattr(_ranking, "BUDGET", 1024)
        monkeypatch.setattr(_ranking, "PANEL", 17)
        monkeypatch.setattr(_ranking, "CHUNK", 7)
        monkeypatch.setattr(_ranking, "SLACK", 1)
    elif request.param == "whole rows":
        monkeypatch.setattr(_ranking, "SHALLOW", 0)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kind", ["continuous", "ties"])
@pytest.mark.parametrize("grouped", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval_equals_the_loops(name, grouped, kind):
    function, options, naive = RETRIEVAL[name]
    query, query_labels = embeddings(23, 5, seed=1, kind=kind)
    reference, reference_labels = embeddings(41, 4, seed=2, kind=kind)  # class 4 has no match in the reference
    for pair in [(query, query_labels), (query, query_labels, reference, reference_labels)]:
        vectors = pair[0::2]
        groups = [np.arange(len(v)) % 6 for v in vectors] if grouped else None
        rankings = naive_rankings(
            *vectors, **({"query_groups": groups[0], "reference_groups": groups[-1]} if groups else {})
        )
        hits = naive_hits(rankings, query_labels, pair[-1])
        given = None if not grouped else groups[0] if len(pair) == 2 else tuple(groups)
        for empty, counted in [("skip", [h for h in hits if any(h)]), ("zero", hits)]:
            want = np.mean([naive(h) for h in counted])
            assert function(*pair, **options, empty=empty, groups=given) == pytest.approx(want, abs=1e-12)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kind", ["continuous", "ties"])
@pytest.mark.parametrize("within", [True, False], ids=["leave-one-out", "reference"])
def test_neighbours_and_their_votes_leave_out_the_own_group(within, kind):
    query, query_labels = embeddings(23, 5, seed=1, kind=kind)
    reference, reference_labels = (query, query_labels) if within else embeddings(41, 4, seed=2, kind=kind)
    test, train = (query, query_labels), (reference, reference_labels)
    sides = [np.arange(len(rows)) ** 2 % 5 for rows in (query, reference)]  # of unequal sizes
    if not within:
        sides[1][sides[1] == 4] = 1  # queries of this group may find anybody
    groups = sides[0] if within else tuple(sides)
    rankings = naive_rankings(query, reference, *sides)
    for k in (1, 7, 40):
        ids, scores = metrics.nearest_neighbours(query, None if within else reference, k=k, groups=groups)
        assert [[place for place in row if place >= 0] for row in ids.tolist()] == [row[:k] for row in rankings]
        np.testing.assert_array_equal(ids < 0, scores == -np.inf)
        want = naive_knn_accuracy(*train, *test, k, 0.1, sides)
        assert metrics.knn_accuracy(*train, *(() if within else test), k=k, groups=groups) == pytest.approx(want)


def test_a_tie_is_not_settled_by_those_who_have_no_vote():
    train, labels = np.array([[1, 1], [1, -1], [1, 0]]), ["b", "a", "b"]
    hits = metrics.knn_hits(train, labels, [[1, 0], [1, 0]], ["a", "b"], k=3, groups=(["x", "y"], ["z", "z", "x"]))
    assert hits.all(), "of the two who vote for the first, the class that sorts first has it"


def test_a_sample_without_voters_is_an_error_of_the_vote():
    vectors, labels = np.eye(3) + 0.1, ["a", "a", "b"]
    groups = (["x", "y", "y"], ["x", "x", "x"])
    hits = metrics.knn_hits(vectors, labels, vectors, labels, k=1, groups=groups)
    assert hits.tolist() == [False, True, True]
    assert hits.mean() == naive_knn_accuracy(vectors, labels, vectors, labels, 1, 0.1, groups)
    with pytest.raises(ValueError, match="has no voter: the groups leave out all samples for each one"):
        metrics.knn_accuracy(vectors, labels, groups=["x", "x", "x"])


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_cmc_is_recall_at_every_rank(kind):
    vectors, labels = embeddings(40, 8, kind=kind)
    labels[3] = 77
    hits = naive_hits(naive_rankings(vectors), labels, labels)
    for empty, counted in [("skip", [h for h in hits if any(h)]), ("zero", hits)]:
        want = [np.mean([naive_recall_at_k(h, k) for h in counted]) for k in range(1, 13)]
        got = metrics.cmc(vectors, labels, k=12, empty=empty)
        np.testing.assert_allclose(got, want, atol=1e-12)
    assert got[0] == metrics.recall_at_k(vectors, labels, k=1, empty="zero")


def test_ndcg_equals_scikit_learn():
    query, query_labels = embeddings(20, 3, seed=1)
    reference, reference_labels = embeddings(30, 3, seed=2)
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (query, reference)]
    match = (query_labels[:, None] == reference_labels).astype(float)
    want = sklearn.metrics.ndcg_score(match, unit[0] @ unit[1].T, k=7)
    assert metrics.ndcg_at_k(query, query_labels, reference, reference_labels, k=7) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_deep_classes_and_singletons_in_one_set(kind, monkeypatch):
    monkeypatch.setattr(_ranking, "SHALLOW", 12)  # the big class takes whole rows, the others neighbours
    vectors, labels = embeddings(60, 12, kind=kind)
    labels[:30], labels[30] = 0, 99
    hits = [h for h in naive_hits(naive_rankings(vectors), labels, labels) if any(h)]
    report = metrics.retrieval_report(vectors, labels, k=(1, 5))
    assert report.values["map_at_r"] == pytest.approx(np.mean([naive_map_at_r(h) for h in hits]), abs=1e-12)
    assert report.values["recall_at_5"] == pytest.approx(np.mean([naive_recall_at_k(h, 5) for h in hits]), abs=1e-12)


def test_report_gives_every_query_in_its_own_order():
    vectors, labels = embeddings(30, 9)
    labels[4] = 77
    hits = naive_hits(naive_rankings(vectors), labels, labels)
    report = metrics.retrieval_report(vectors, labels)
    for name, naive in [
        ("recall_at_1", lambda h: naive_recall_at_k(h, 1)),
        ("recall_at_10", lambda h: naive_recall_at_k(h, 10)),
        ("r_precision", naive_r_precision),
        ("map_at_r", naive_map_at_r),
    ]:
        want = [naive(h) if any(h) else math.nan for h in hits]
        np.testing.assert_allclose(report.per_query[name], want, atol=1e-12)
        assert report.values[name] == pytest.approx(np.nanmean(want))
    assert report.matches.tolist() == [sum(h) for h in hits]
    assert report.without_match == sum(not any(h) for h in hits) >= 1
    assert report.to_dict()["without_match"] == report.without_match
    assert list(report.values) == ["recall_at_1", "recall_at_5", "recall_at_10", "r_precision", "map_at_r"]
    zero = metrics.retrieval_report(vectors, labels, empty="zero")
    assert zero.per_query["map_at_r"][4] == 0
    assert zero.values["map_at_r"] < report.values["map_at_r"]


def test_many_vectors_against_scikit_learn():
    """Float32 arithmetic and partial selection at a size where they matter, duplicates included."""
    vectors, labels = embeddings(3000, 60, dim=32)
    vectors[1500:1600] = vectors[:100] * 2
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scores = np.round(unit @ unit.T, 12)
    np.fill_diagonal(scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")
    match = labels[order] == labels[:, None]
    match[:, -1] = False  # itself
    report = metrics.retrieval_report(vectors, labels)
    np.testing.assert_array_equal(report.per_query["recall_at_5"], match[:, :5].any(axis=1))
    np.testing.assert_allclose(report.per_query["map_at_r"][:50], [naive_map_at_r(row.tolist()) for row in match[:50]])
    # scikit-learn takes equal scores as one step, so it is given the order itself
    places = np.arange(2999, 0, -1)
    want = np.mean([sklearn.metrics.average_precision_score(match[i, :-1], places) for i in range(200)])
    groups = (np.arange(200), np.arange(3000))  # leave-one-out, spelt as exclusion by group
    got = metrics.mean_average_precision(vectors[:200], labels[:200], vectors, labels, groups=groups)
    assert got == pytest.approx(want, abs=1e-12)
    ids, found = _ranking.Search(_ranking.Rows(vectors, "vectors")).nearest(unit, 50)
    np.fill_diagonal(scores, 1)
    exact = np.argsort(-scores, axis=1, kind="stable")[:, :50]
    np.testing.assert_array_equal(ids, exact)
    np.testing.assert_allclose(found, np.take_along_axis(scores, exact, axis=1), atol=1e-6)


def test_a_collapsed_encoder_ranks_by_index():
    """All directions equal: far more ties than any candidate list holds."""
    vectors = np.outer(np.arange(1, 201), np.ones(8)).astype(np.float32)
    ids, _ = _ranking.Search(_ranking.Rows(vectors, "vectors")).nearest(np.full((3, 8), 8**-0.5), 10)
    assert ids.tolist() == [list(range(10))] * 3
    labels = np.arange(200) % 50
    hits = naive_hits(naive_rankings(vectors), labels, labels)
    assert metrics.map_at_r(vectors, labels) == pytest.approx(np.mean([naive_map_at_r(h) for h in hits]))


def test_close_scores_are_decided_in_float64():
    """Differences of 1e-9 are invisible to float32 and still decide, against the order of the index."""
    angles = 1e-5 * np.arange(40, 0, -1)[:, None] + 0.5
    reference = np.hstack([np.cos(angles), np.sin(angles)])
    ids, _ = _ranking.Search(_ranking.Rows(reference, "reference")).nearest(np.array([[np.cos(0.5), np.sin(0.5)]]), 5)
    assert ids.tolist() == [[39, 38, 37, 36, 35]]


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, np.ndarray.tolist], ids=["numpy", "torch", "list"])
def test_arrays_tensors_lists_and_strings_give_the_same(convert):
    vectors, labels = embeddings(20, 3)
    want = metrics.map_at_r(vectors, labels)
    assert metrics.map_at_r(convert(vectors), convert(labels)) == want
    assert metrics.map_at_r(convert(vectors), [f"class {label}" for label in labels]) == want
    assert metrics.map_at_r(torch.from_numpy(vectors).double().requires_grad_(), labels) == want
    assert metrics.map_at_r(np.round(vectors * 100).astype(np.int16), labels) == pytest.approx(want, abs=0.05)
    half = torch.from_numpy(vectors).bfloat16()
    assert metrics.map_at_r(half, labels) == metrics.map_at_r(half.float(), labels)
    for rows in (list(half), list(half.float().requires_grad_()), [list(row) for row in half], tuple(half.to_sparse())):
        assert metrics.map_at_r(rows, list(torch.as_tensor(labels))) == metrics.map_at_r(half.float(), labels)
    assert isinstance(want, float)


def test_memory_is_bounded_by_the_budget_not_by_the_pairs():
    vectors, labels = embeddings(6000, 300, dim=8)
    tracemalloc.start()
    metrics.retrieval_report(vectors, labels)
    metrics.mean_average_precision(vectors[:500], labels[:500], vectors, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * _ranking.BUDGET  # all pairs in float64 would be 288 MB


ONE, LABEL = [[1.0, 0.0], [0.0, 1.0]], ["a", "a"]


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((ONE, LABEL, ONE), {}, "reference and reference_labels go together.*got only reference"),
        ((ONE, LABEL, [[1.0, 0.0, 0.0]], ["a"]), {}, "query has 2 numbers per row, reference has 3.*two different enc"),
        ((ONE, ["a"]), {}, "query_labels has 1 entries for 2 rows"),
        ((ONE, LABEL, ONE, [0, 1]), {}, "one side holds strings.*nothing would ever match"),
        ((ONE, [0.5, 0.5]), {}, "query_labels must be .N,. integers or strings.*float64"),
        ((ONE, ["a", 1]), {}, "query_labels mixes strings with other types"),
        (([[1.0, np.nan], [0.0, 1.0]], LABEL), {}, "query row 0 is NaN or infinite.*no direction"),
        (([[1.0, 0.0], [0.0, 0.0]], LABEL), {}, "query row 1 is zero.*empty image"),
        ((np.ones((2, 2, 2)), LABEL), {}, r"query must be \(N, D\).*\(2, 2, 2\).*flatten"),
        ((np.ones((0, 2)), []), {}, r"at least one row.*\(0, 2\)"),
        ((ONE, ["a", "b"]), {}, r"2 of 2 queries have no match.*query 0 \(a\).*empty='zero'"),
        ((ONE, LABEL, ONE, ["a", "b"]), {"empty": "drop"}, "empty must be 'skip', 'zero' or 'error', got 'drop'"),
        ((ONE, ["a", "b"], ONE, ["b", "b"]), {"empty": "error"}, r"1 of 2 queries.*query 0 \(a\).*empty='skip'"),
        ((ONE, LABEL, ONE, LABEL), {"groups": [0, 1, 2]}, "groups must be a pair"),
        ((ONE, LABEL), {"groups": [0]}, "groups has 1 entries for 2 rows"),
        ((ONE, LABEL), {"groups": [0, 0]}, "2 of 2 queries have no match.*groups that exclude"),
        ((ONE, LABEL), {"k": 0}, "recall_at_k needs k to be a whole number of at least 1, got 0"),
    ],
)
def test_retrieval_refuses_and_says_why(arguments, options, text):
    with pytest.raises(ValueError, match=text):
        metrics.recall_at_k(*arguments, **options)


def test_a_depth_that_cannot_give_the_metric_is_refused():
    vectors, labels = embeddings(20, 2)
    deepest = int(np.bincount(labels).max()) - 1
    for function in (metrics.map_at_r, metrics.r_precision):
        with pytest.raises(ValueError, match=rf"{function.__name__} with k=3 would be wrong.*R={deepest}"):
            function(vectors, labels, k=3)
        assert function(vectors, labels, k=deepest) == function(vectors, labels)
    with pytest.raises(ValueError, match="precision_at_k with k=20, but query 0 has only 19 candidates"):
        metrics.precision_at_k(vectors, labels, k=20)
    assert metrics.recall_at_k(vectors, labels, k=500) == 1


@pytest.mark.parametrize("kind", ["continuous", "ties"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (200, 0.1), (200, 1e-3)])
def test_knn_accuracy_equals_the_loops(k, temperature, kind):
    train, train_labels = embeddings(60, 4, seed=1, dim=3, kind=kind)
    test, test_labels = embeddings(40, 5, seed=2, dim=3, kind=kind)
    if temperature == 1e-3:  # the loops would overflow here; the limit is the nearest neighbour
        if kind == "ties":
            return
        want = naive_knn_accuracy(train, train_labels, test, test_labels, 1, 0.1)
    else:
        want = naive_knn_accuracy(train, train_labels, test, test_labels, k, temperature)
    got = metrics.knn_accuracy(train, train_labels, test, test_labels, k=k, temperature=temperature)
    assert got == want
    assert kind == "ties" or 0.2 < got < 1


def test_knn_accuracy_refuses_a_temperature_of_zero():
    with pytest.raises(ValueError, match="temperature > 0, got 0"):
        metrics.knn_accuracy(ONE, LABEL, ONE, LABEL, temperature=0)


def scored(kind, rows=300):
    generator = np.random.default_rng(5)
    same = generator.random(rows) < 0.3
    scores = generator.standard_normal(rows) + same
    return (np.round(scores * 2) if kind == "ties" else scores), same


@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_verification_equals_scikit_learn(kind):
    scores, same = scored(kind)
    assert metrics.roc_auc(scores, same) == pytest.approx(sklearn.metrics.roc_auc_score(same, scores), abs=1e-12)
    want = sklearn.metrics.average_precision_score(same, scores)
    assert metrics.average_precision(scores, same) == pytest.approx(want, abs=1e-12)
    far, tar, _ = sklearn.metrics.roc_curve(same, scores, drop_intermediate=False)
    # where the drawn ROC curve crosses the anti-diagonal
    want = brentq(lambda x: 1 - x - np.interp(x, far, tar), 0, 1)
    assert metrics.eer(scores, same) == pytest.approx(want, abs=1e-9)
    assert metrics.eer(torch.from_numpy(scores), torch.from_numpy(same)) == metrics.eer(scores, same)
    targets = [1 / (~same).sum(), 0.01, 0.07, 0.1, 0.5, 1.0]
    want = [naive_tar_at_far(scores.tolist(), same.tolist(), f) for f in targets]
    np.testing.assert_allclose(metrics.tar_at_far(scores, same, targets), want, rtol=1e-12)
    assert metrics.tar_at_far(scores, same, 0.1) == pytest.approx(want[3])
    assert isinstance(metrics.tar_at_far(scores, same, 0.1), float)


@pytest.mark.parametrize(
    ("scores", "auc", "equal"),
    [
        ([3, 2, 1, 0], 1.0, 0.0),
        ([0, 1, 2, 3], 0.0, 1.0),
        ([1, 1, 1, 1], 0.5, 0.5),
        ([math.inf, 0, 0, -math.inf], 0.875, 0.25),
    ],
    ids=["perfect", "reversed", "all alike", "infinite"],
)
def test_verification_at_its_edges(scores, auc, equal):
    assert metrics.roc_auc(scores, [1, 1, 0, 0]) == auc
    assert metrics.eer(scores, [1, 1, 0, 0]) == pytest.approx(equal)


def test_tar_at_far_counts_impostors_without_rounding_errors():
    scores = np.arange(200.0)
    same = scores % 2 == 0
    for allowed in range(1, 101):
        want = naive_tar_at_far(scores.tolist(), same.tolist(), (allowed + 0.5) / 100)
        assert metrics.tar_at_far(scores, same, allowed / 100) == want


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: metrics.roc_auc([1.0, 2.0], [1, 1]), "roc_auc .*needs both, got 2 genuine and 0 impostors"),
        (lambda: metrics.eer([1.0, 2.0], [0, 0]), "eer .*needs both, got 0 genuine and 2 impostors"),
        (lambda: metrics.eer([], []), "got 0 genuine and 0 impostors"),
        (lambda: metrics.roc_auc([1.0, math.nan], [1, 0]), r"scores\[1\] is NaN \(1 of 2 are\)"),
        (lambda: metrics.roc_auc([1.0, 2.0], [1, 2]), "same must be booleans or 0 and 1"),
        (lambda: metrics.roc_auc([1.0, 2.0], [1]), r"one entry per score: expected shape \(2,\), got \(1,\)"),
        (lambda: metrics.roc_auc([[1.0], [2.0]], [1, 0]), r"scores must be \(N,\) numbers, got shape \(2, 1\)"),
        (lambda: metrics.tar_at_far([1.0, 2.0], [1, 0], 5), r"far in \(0, 1\], got 5.*not a percentage"),
        (lambda: metrics.tar_at_far([1.0, 2.0], [1, 0], 0.01), "far=0.01 cannot be measured on 1 impostor pairs"),
        (lambda: metrics.average_precision([1.0, 2.0], [0, 0]), "undefined without a positive, got 2 negatives"),
        (lambda: metrics.fpir_fnir([1.0], [1], [1], 0), "FPIR needs strangers, but all 1 probes are known"),
        (lambda: metrics.fpir_fnir([1.0], [0], [0], 0), "FNIR needs probes of enrolled .* all 1 probes are strangers"),
        (lambda: metrics.fpir_fnir([1.0, 2.0], [1, 0], [1, 0], math.nan), "threshold must be a number, got nan"),
        (lambda: metrics.detection_identification_rate([1.0], [0], [0], threshold=0), "needs enrolled probes, got 1"),
        (lambda: metrics.detection_identification_rate([1.0], [1], [1]), "exactly one of threshold and fpir"),
        (
            lambda: metrics.detection_identification_rate([1.0, 2.0], [1, 0], [1, 0], fpir=0.05),
            "fpir=0.05 cannot be measured on 1 strangers.*At least 20 are needed",
        ),
        (lambda: metrics.detection_identification_rate([1.0, 2.0], [1, 0], [1, 0], fpir=5), "share, not a percentage"),
    ],
)
def test_scores_are_refused_and_say_why(function, text):
    with pytest.raises(ValueError, match=text):
        function()


@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_open_set_equals_the_loops(kind):
    scores, known = scored(kind)
    correct = np.random.default_rng(6).random(len(scores)) < 0.8
    thresholds = np.append(np.unique(scores), [-9, 9])
    want = np.array([naive_fpir_fnir(scores, correct, known, t) for t in thresholds])
    fpir, fnir = metrics.fpir_fnir(scores, correct, known, thresholds)
    np.testing.assert_allclose(np.stack([fpir, fnir], axis=1), want, atol=1e-12)
    assert metrics.fpir_fnir(scores, correct, known, thresholds[3]) == pytest.approx(tuple(want[3]))
    assert isinstance(metrics.fpir_fnir(scores, correct, known, 0.5)[0], float)
    dir_at = metrics.detection_identification_rate
    assert dir_at(scores, correct, known, threshold=thresholds[3]) == pytest.approx(1 - want[3][1])
    for target in (0.01, 0.1, 0.5):
        # strictly above an impostor score there may be no probe: midpoints are thresholds, too
        candidates = np.concatenate([thresholds, thresholds + 1e-9])
        every = [naive_fpir_fnir(scores, correct, known, t) for t in candidates]
        best = max(1 - miss for false, miss in every if false <= target)
        assert dir_at(scores, correct, known, fpir=target) == pytest.approx(best)
    assert dir_at(scores, correct, known, fpir=1.0) == pytest.approx(correct[known].mean())


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_binary_report_equals_scikit_learn(beta):
    scores, target = scored("continuous")
    prediction = scores > 0.5
    report = metrics.classification_report(prediction, target, scores=scores, beta=beta)
    (tn, fp), (fn, tp) = sklearn.metrics.confusion_matrix(target, prediction)
    want = {
        "accuracy": sklearn.metrics.accuracy_score(target, prediction),
        "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
        "precision": sklearn.metrics.precision_score(target, prediction),
        "recall": sklearn.metrics.recall_score(target, prediction),
        "f_beta": sklearn.metrics.fbeta_score(target, prediction, beta=beta),
        "f1": sklearn.metrics.f1_score(target, prediction),
        "specificity": tn / (tn + fp),
        "fpr": fp / (tn + fp),
        "fnr": fn / (tp + fn),
        "mcc": sklearn.metrics.matthews_corrcoef(target, prediction),
        "auc": sklearn.metrics.roc_auc_score(target, scores),
        "average_precision": sklearn.metrics.average_precision_score(target, scores),
    }
    assert report == pytest.approx(want, abs=1e-12)
    assert list(report) == list(want)
    as_words = [np.where(side, "bad", "good") for side in (prediction, target)]
    named = metrics.classification_report(*as_words, scores=scores, beta=beta, positive="bad")
    assert named == pytest.approx(want, abs=1e-12)
    numbers = [torch.from_numpy(side).long() for side in (prediction, target)]
    columns = np.stack([-scores, scores], axis=1)
    assert metrics.classification_report(*numbers, scores=columns, beta=beta) == pytest.approx(want, abs=1e-12)


def test_multiclass_report_equals_scikit_learn():
    generator = np.random.default_rng(0)
    target = generator.choice(4, 500, p=[0.7, 0.2, 0.07, 0.03])
    scores = generator.random((500, 4)) + 0.5 * np.eye(4)[target]
    scores /= scores.sum(axis=1, keepdims=True)
    prediction = scores.argmax(axis=1)
    report = metrics.classification_report(prediction, target, scores=scores, beta=2)
    macro = {"average": "macro"}
    tables = sklearn.metrics.multilabel_confusion_matrix(target, prediction)
    specificity = np.mean([t[0, 0] / t[0].sum() for t in tables])
    want = {
        "accuracy": sklearn.metrics.accuracy_score(target, prediction),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(target, prediction),
        "precision": sklearn.metrics.precision_score(target, prediction, **macro),
        "recall": sklearn.metrics.recall_score(target, prediction, **macro),
        "f_beta": sklearn.metrics.fbeta_score(target, prediction, beta=2, **macro),
        "f1": sklearn.metrics.f1_score(target, prediction, **macro),
        "specificity": specificity,
        "fpr": 1 - specificity,
        "fnr": 1 - sklearn.metrics.recall_score(target, prediction, **macro),
        "mcc": sklearn.metrics.matthews_corrcoef(target, prediction),
        "auc": sklearn.metrics.roc_auc_score(target, scores, multi_class="ovr"),
        "average_precision": sklearn.metrics.average_precision_score(np.eye(4)[target], scores, **macro),
    }
    assert report == pytest.approx(want, abs=1e-12)


def test_report_where_figures_are_undefined():
    nobody_found = metrics.classification_report([0, 0, 0], [0, 1, 1])
    assert (nobody_found["precision"], nobody_found["f_beta"], nobody_found["mcc"]) == (0, 0, 0)
    assert nobody_found["balanced_accuracy"] == 0.5
    no_positive = metrics.classification_report([0, 0], [0, 0], scores=[0.1, 0.2])
    assert no_positive["accuracy"] == no_positive["specificity"] == no_positive["balanced_accuracy"] == 1
    assert all(math.isnan(no_positive[name]) for name in ("precision", "recall", "f_beta", "fnr", "auc"))
    # a class that is only predicted has no recall to average, its false alarms count against the others
    stray = metrics.classification_report(["a", "c", "b"], ["a", "a", "b"])
    assert stray["recall"] == stray["balanced_accuracy"] == 0.75
    never = metrics.classification_report(["a", "a", "a"], ["a", "b", "c"])
    assert never["precision"] == pytest.approx(1 / 9)


def test_confusion_matrix_in_a_chosen_order():
    matrix, classes = metrics.confusion_matrix(["b", "a", "b"], ["b", "b", "a"], classes=["c", "b", "a"])
    assert classes == ["c", "b", "a"]
    assert matrix.tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert (
        matrix.tolist() == sklearn.metrics.confusion_matrix(["b", "b", "a"], ["b", "a", "b"], labels=classes).tolist()
    )


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: metrics.classification_report([], []), "at least one row"),
        (lambda: metrics.classification_report([0, 1], [0]), "prediction has 2 entries for 1 rows"),
        (lambda: metrics.classification_report([0, 1], ["0", "1"]), "one side holds strings"),
        (lambda: metrics.classification_report([0, 1], [0, 1], beta=0), "beta > 0, got 0"),
        (lambda: metrics.classification_report([0, 1], [0, 1], positive=2), "positive=2 must be one of two classes"),
        (lambda: metrics.classification_report([0, 1], [0, 2], positive=1), r"classes are \[0, 1, 2\]"),
        (lambda: metrics.classification_report([0, 2], [0, 1], scores=[0.1, 0.2]), r"needs scores \(N, 3\)"),
        (lambda: metrics.classification_report([0, 1], [0, 1], scores=np.ones((2, 3))), "3 columns for 2 classes"),
        (lambda: metrics.confusion_matrix([0, 5], [0, 1], classes=[0, 1]), "5 occurs in the data but not in classes"),
        (lambda: metrics.confusion_matrix([0, 1], [0, 1], classes=[0, 1, 1]), "listed twice"),
    ],
)
def test_classification_refuses_and_says_why(function, text):
    with pytest.raises(ValueError, match=text):
        function()


def test_bootstrap_draws_identities_not_samples():
    generator = np.random.default_rng(0)
    identities = np.repeat(np.arange(40), 25)
    values = np.repeat(generator.standard_normal(40), 25)  # the 25 samples of an identity say the same
    low, high = metrics.bootstrap_interval(values, identities)
    spread = values[::25].std() / math.sqrt(40)
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.1)
    over_samples = metrics.bootstrap_interval(values, np.arange(1000))
    assert over_samples[1] - over_samples[0] < (high - low) / 3
    assert metrics.bootstrap_interval(values, [f"person {i}" for i in identities]) is not None
    assert metrics.bootstrap_interval(values, identities, seed=0) == (low, high)
    assert metrics.bootstrap_interval(values, identities, seed=1) != (low, high)
    wide = metrics.bootstrap_interval(values, identities, confidence=0.99)
    assert wide[0] < low < high < wide[1]
    with_skipped = metrics.bootstrap_interval(np.append(values, math.nan), np.append(identities, 99))
    assert with_skipped == (low, high)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(150):
        owners = np.repeat(np.arange(60), generator.integers(1, 8, 60))
        values = generator.standard_normal(60)[owners] + generator.standard_normal(len(owners))
        low, high = metrics.bootstrap_interval(values, owners, resamples=300, seed=seed)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_bootstrap_in_blocks_is_the_same(monkeypatch):
    values, owners = np.arange(12.0), np.arange(12) // 3
    want = metrics.bootstrap_interval(values, owners, resamples=500)
    monkeypatch.setattr("embedlab.metrics.intervals._BLOCK", 64)
    assert metrics.bootstrap_interval(values, owners, resamples=500) == want


def test_wilson_interval_solves_its_own_equation():
    """Its ends are the shares p with |successes/trials - p| = z sqrt(p (1 - p) / trials)."""
    for successes, trials in [(0, 20), (3, 20), (10, 20), (20, 20), (2.5, 17.3)]:
        low, high = metrics.wilson_interval(successes, trials)
        for end in (low, high):
            distance = abs(successes / trials - end)
            assert distance == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / trials), abs=1e-8)
        assert 0 <= low <= successes / trials <= high <= 1
    assert metrics.wilson_interval(0, 20)[0] == 0


def test_an_interval_without_width_is_not_told():
    owners = ["a", "a", "b", "c"]
    assert metrics.told_interval((0.2, 0.3), owners, share=0.25) == (0.2, 0.3)
    for share in (0.0, 0.5, 1.0):
        got = metrics.told_interval((share, share + 1e-16), owners, share=share)
        assert got == metrics.wilson_interval(3 * share, 3)
    assert metrics.told_interval((0.9999999999999998, 1.0), owners) is None


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: metrics.bootstrap_interval([1.0, 2.0], ["a", "a"]), "at least 2 that have a value, got 1"),
        (lambda: metrics.bootstrap_interval([math.nan, 2.0], ["a", "b"]), "at least 2 that have a value, got 1"),
        (lambda: metrics.bootstrap_interval([1.0, 2.0], ["a"]), "identities has 1 entries for 2 rows"),
        (lambda: metrics.bootstrap_interval([1.0, 2.0], [0, 1], confidence=95), "between 0 and 1, got 95"),
        (
            lambda: metrics.bootstrap_interval([1.0, 2.0], [0, 1], resamples=0),
            "resamples to be a whole number of at least 1",
        ),
        (lambda: metrics.wilson_interval(3, 2), "got 3 of 2"),
        (lambda: metrics.wilson_interval(0, 0), "got 0 of 0"),
    ],
)
def test_intervals_refuse_and_say_why(function, text):
    with pytest.raises(ValueError, match=text):
        function()


def test_metrics_import_neither_torch_nor_faiss():
    program = "import sys, embedlab.metrics as m; m.map_at_r([[1, 0], [1, 1]], [0, 0]); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "lightning", "pytorch_lightning", "faiss", "sklearn", "scipy"} & set(loaded)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_knn_accuracy_by_leave_one_out_equals_leaving_each_one_out(k):
    random = np.random.default_rng(3)
    vectors, labels = random.normal(size=(30, 4)), random.integers(0, 3, 30)
    vectors[5] = vectors[6]  # equal rows must not bring a sample back as its own neighbour
    right = 0.0
    for row in range(30):
        others = np.arange(30) != row
        right += metrics.knn_accuracy(vectors[others], labels[others], vectors[[row]], labels[[row]], k=k)
    assert metrics.knn_accuracy(vectors, labels, k=k) == pytest.approx(right / 30)
