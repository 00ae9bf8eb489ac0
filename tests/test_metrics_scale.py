"""Evaluation at scale: what is fast, bounded or resumable gives what is slow, whole and unbroken."""

import re
import time
import tracemalloc

import ddp_worker_metrics as worker
import naive
import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embedlab import metrics
from embedlab.metrics import _pairs, _progress, _ranking, _threads, retrieval


@pytest.fixture
def screen(monkeypatch):
    """The bfloat16 screen on any processor and on small sets; the panels are many, the last one is short."""
    monkeypatch.setattr(_ranking, "_bfloat16_torch", lambda work: torch)
    monkeypatch.setattr(_ranking, "SCREEN_FROM", 1)
    monkeypatch.setattr(_ranking, "PANEL", 700)
    monkeypatch.setattr(_ranking, "BUDGET", 1 << 20)
    refused = []
    screened = _ranking.Search._screened

    def watch(self, screen, query, found, ids):
        rest = screened(self, screen, query, found, ids)
        refused.append((len(rest), len(query)))
        return rest

    monkeypatch.setattr(_ranking.Search, "_screened", watch)
    return refused


def exact_neighbours(query, reference, count):
    query, reference = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (query, reference))
    scores = np.round(query @ reference.T, 12)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return ids, np.take_along_axis(scores, ids, axis=1)


def directions(kind, rows, dim, random):
    vectors = random.standard_normal((rows, dim))
    if kind == "clusters":
        vectors = 3 * random.standard_normal((20, dim))[random.integers(0, 20, rows)] + vectors
    if kind == "duplicates":
        vectors = np.repeat(vectors[: rows // 7 + 1], 7, axis=0)[:rows] * random.uniform(0.1, 10, (rows, 1))
    if kind == "near ties":  # around a few directions, differences from 1e-12 to 1e-2: far below what bfloat16 sees
        vectors = vectors[random.integers(0, 60, rows)]
        vectors += 10.0 ** random.uniform(-12, -2, (rows, 1)) * random.standard_normal((rows, dim))
    if kind == "midpoints":  # every number half-way between two bfloat16, pushed to either side: the worst rounding
        grid = np.exp2(random.integers(-3, 0, (rows, dim))) * (1 + (random.integers(0, 128, (rows, dim)) + 0.5) / 128)
        signs = np.sign(vectors[random.integers(0, 60, rows)])
        vectors = signs * grid * (1 + 1e-5 * random.choice([-1, 1], (rows, 1)))
    if kind == "norms":
        vectors *= 10.0 ** random.uniform(-150, 150, (rows, 1))
    if kind == "collapsed":
        vectors = 1 + 1e-4 * vectors
    return vectors


KINDS = ["random", "clusters", "duplicates", "near ties", "midpoints", "norms", "collapsed"]


@pytest.mark.parametrize("dim", [1, 2, 7, 24, 128, 513])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_screen_loses_no_neighbour(kind, dim, screen):
    random = np.random.default_rng(dim)
    reference, query = directions(kind, 1500, dim, random), directions(kind, 60, dim, random)
    query[:20] = reference[:20]
    found = _ranking.Search(_ranking.Rows(reference, "reference"))
    ids, scores = found.nearest(_ranking.Rows(query, "query").unit(slice(None)), 5)
    want, cosines = exact_neighbours(query, reference, 5)
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_allclose(scores, cosines, atol=1e-6)
    refused, asked = screen[0]
    assert asked == 60
    if dim > 7 and kind in ("random", "clusters", "norms"):
        assert refused < asked, "the test would pass without a screen"
    unordered, _ = found.nearest(_ranking.Rows(query, "query").unit(slice(None)), 5, ordered=False)
    np.testing.assert_array_equal(np.sort(unordered), np.sort(want))


@pytest.mark.parametrize("dim", [3, 64, 300])
def test_the_bound_of_the_screen_holds_for_every_pair(dim, screen):
    """Including roundings that all point the same way, where the bound is nearly reached."""
    random = np.random.default_rng(dim)
    for kind in ("random", "midpoints"):
        single = directions(kind, 800, dim, random)
        single = (single / np.linalg.norm(single, axis=1, keepdims=True)).astype(np.float32)
        filter_ = _ranking.Screen(torch, single)
        exact = single.astype(np.float64) @ single.astype(np.float64).T
        coarse = (filter_.reference @ filter_.reference.T).float().numpy().astype(np.float64)
        own = filter_._residual(single, filter_.reference)[:, None]
        slack = own * (1 + filter_.residual) + filter_.residual + 4 * (dim + 2) * 2.0**-24 * (1 + own) ** 2
        difference = np.abs(coarse - exact)
        assert (difference <= slack + np.abs(coarse) * 2.0**-8).all()
        for row in range(0, 800, 100):
            places = filter_.pass_on(single[row : row + 1], 10, 800)[0]
            kept = set(places[places >= 0].tolist())
            assert not kept or set(np.argsort(-exact[row])[:10].tolist()) <= kept


def test_a_cut_is_never_above_what_the_proof_allows():
    patterns = np.arange(0x3000, 0x3F90, dtype=np.int16)  # positive bfloat16 up to a little above 1
    value = _ranking._widened(patterns).astype(np.float64)
    before = _ranking._widened(patterns - 1).astype(np.float64)
    for slack in (0.0, 1e-7, 0.003, 0.02):
        cut = _ranking._cut(patterns, np.full(len(patterns), slack))
        allowed = (value + before) / 2 - 2 * slack
        assert (_ranking._widened(cut[cut > 0]).astype(np.float64) <= allowed[cut > 0]).all()
        assert (cut > 0)[allowed > 1e-3].all()


def test_a_collapsed_encoder_and_opposite_vectors_pass_by_the_screen(screen):
    random = np.random.default_rng(0)
    collapsed = np.ones((1500, 16)) + 1e-3 * random.standard_normal((1500, 16))
    opposite = -collapsed[:4]
    ids, _ = _ranking.Search(_ranking.Rows(collapsed, "reference")).nearest(
        _ranking.Rows(np.concatenate([collapsed[:6], opposite]), "query").unit(slice(None)), 4
    )
    np.testing.assert_array_equal(ids, exact_neighbours(np.concatenate([collapsed[:6], opposite]), collapsed, 4)[0])
    assert screen[0] == (10, 10)


def test_metrics_with_and_without_a_screen_are_the_same(screen, monkeypatch):
    random = np.random.default_rng(0)
    labels = random.integers(0, 200, 2500)
    vectors = (random.standard_normal((200, 32))[labels] + random.standard_normal((2500, 32))).astype(np.float32)
    vectors[100:140] = vectors[200:240]
    screened = metrics.retrieval_report(vectors, labels)
    knn = metrics.knn_accuracy(vectors[:2000], labels[:2000], vectors[2000:], labels[2000:], k=9)
    assert screen
    monkeypatch.setattr(_ranking, "SCREEN_FROM", 1 << 60)
    plain = metrics.retrieval_report(vectors, labels)
    for name, values in plain.per_query.items():
        np.testing.assert_array_equal(screened.per_query[name], values)
    assert metrics.knn_accuracy(vectors[:2000], labels[:2000], vectors[2000:], labels[2000:], k=9) == knn


NUMBERS = [0.0, 1.0, -1.0, 0.5, 3.0, 1 + 2.0**-8, 1 + 2.0**-9, 1 - 2.0**-9, 1 + 1e-7, 1e-30, 1e30]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(13, 40))
def test_rankings_and_votes_are_those_of_float64(data, dim, rows):
    """Few numbers, so that ties, duplicates, half-way roundings and cosines that float32 cannot tell apart abound."""
    vectors = data.draw(arrays(np.float64, (rows, dim), elements=st.sampled_from(NUMBERS)))
    vectors[~vectors.any(axis=1)] = 1.0
    labels = np.arange(rows) % 3
    cut = rows - 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ranking, "_bfloat16_torch", lambda work: torch)
        for name, value in {"SCREEN_FROM": 1, "PANEL": 7, "STRIDE": 1, "SLACK": 1, "GATHER": 64}.items():
            patch.setattr(_ranking, name, value)
        for module in (_ranking, retrieval):
            patch.setattr(module, "ROWS", 4)
        recall = metrics.recall_at_k(vectors, labels, k=2)
        precision = metrics.precision_at_k(vectors[cut:], labels[cut:], vectors[:cut], labels[:cut], k=3)
        votes = metrics.knn_accuracy(vectors[:cut], labels[:cut], vectors[cut:], labels[cut:], k=4)
    hits = [
        naive.naive_hits([ranking], [labels[i]], labels)[0] for i, ranking in enumerate(naive.naive_rankings(vectors))
    ]
    assert recall == pytest.approx(np.mean([naive.naive_recall_at_k(hit, 2) for hit in hits]), abs=1e-12)
    hits = naive.naive_hits(naive.naive_rankings(vectors[cut:], vectors[:cut]), labels[cut:], labels[:cut])
    assert precision == pytest.approx(np.mean([naive.naive_precision_at_k(hit, 3) for hit in hits]), abs=1e-12)
    want = naive.naive_knn_accuracy(vectors[:cut], labels[:cut].tolist(), vectors[cut:], labels[cut:].tolist(), 4, 0.1)
    assert votes == want


def test_votes_that_float32_cannot_tell_apart_are_counted_in_float64():
    """Two classes with two voters each, whose sums of weights differ by a relative 1e-8, hundreds of times."""
    random = np.random.default_rng(0)
    right = 0
    for _ in range(200):
        first, second, third = np.sort(random.uniform(0.3, 0.9, 3))[::-1]
        wanted = random.integers(0, 2)
        factor = 1 + (1e-8 if wanted else -1e-8)  # the class of `third` has the last word
        last = 0.1 * np.log((np.exp(first / 0.1) + np.exp(third / 0.1)) * factor - np.exp(second / 0.1))
        cosines = np.array([first, second, last, third])
        train = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
        right += metrics.knn_accuracy(train, [0, 1, 1, 0], [[1.0, 0.0]], [wanted], k=4)
    assert right == 200


def test_threads_change_nothing_and_stop_when_told(monkeypatch):
    random = np.random.default_rng(0)
    labels = random.integers(0, 30, 700)
    vectors = random.standard_normal((30, 12))[labels] + random.standard_normal((700, 12))
    found, started = [], []
    for cores in (1, 3):
        monkeypatch.setattr(_threads, "_cores", lambda cores=cores: cores)
        found.append([metrics.retrieval_report(vectors, labels).values, metrics.knn_accuracy(vectors, labels, k=9)])
    assert found[0] == found[1]
    threads = torch.get_num_threads()

    def work(item):
        started.append(item)
        if item == 4:
            raise KeyboardInterrupt
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        list(_threads.in_threads(work, range(200)))
    assert len(started) < 50
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("kind", ["spread", "one far away", "few"])
def test_a_grid_finds_the_places_that_halving_finds(kind):
    random = np.random.default_rng(0)
    edges = np.sort(random.normal(0, 0.1, 3 if kind == "few" else 5000))
    if kind == "one far away":  # all others in one cell of the grid
        edges = np.append(-1.0, 0.5 + 1e-9 * edges)
    scores = np.concatenate([random.normal(0, 0.2, 3000), edges[::7], edges[-1:], [0.5, -1.0, 1.0, edges[0] - 1e-13]])
    want = np.searchsorted(edges, scores, side="right")
    np.testing.assert_array_equal(_pairs._Places(edges).of(scores), want)


@pytest.mark.parametrize("power", [-300, -160, 160, 300])
def test_a_norm_whose_square_is_no_float64_is_a_norm(power):
    random = np.random.default_rng(0)
    labels = np.arange(60) % 7
    vectors = random.standard_normal((7, 5))[labels] + random.standard_normal((60, 5))
    rows = _ranking.Rows(vectors * 10.0**power, "query")
    np.testing.assert_allclose(np.linalg.norm(rows.unit(slice(None)), axis=1), 1, rtol=1e-14)
    mixed = np.where(np.arange(60)[:, None] % 2, vectors, vectors * 10.0**power)
    assert metrics.map_at_r(mixed, labels) == metrics.map_at_r(vectors, labels)


PLANE, TWO = np.eye(2), [0, 0]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: metrics.recall_at_k([[1, 2], [1]], TWO), "Not an array .*rows of different lengths"),
        (lambda: metrics.recall_at_k(PLANE, TWO, k=[1, 5]), r"whole number of at least 1, got \[1, 5\]"),
        (lambda: metrics.recall_at_k(PLANE, TWO, k="1"), "whole number of at least 1, got '1'"),
        (lambda: metrics.recall_at_k(PLANE, TWO, k=float("inf")), "whole number of at least 1, got inf"),
        (lambda: metrics.retrieval_report(PLANE, TWO, k=5), "list of depths such as .*, got 5"),
        (lambda: metrics.knn_accuracy(PLANE, TWO, temperature="x"), "temperature > 0, got x"),
        (lambda: metrics.knn_accuracy(PLANE, TWO, PLANE), "go together, .*got only test"),
        (lambda: metrics.knn_accuracy(PLANE, TWO, None, TWO), "go together, .*got only test_labels"),
        (lambda: metrics.recall_at_k([[1.0, 0.0], [0.0, np.inf]], TWO), "query row 1 is NaN or infinite"),
        (lambda: metrics.recall_at_k([[1.0, 0.0], [0.0, 0.0]], TWO), "query row 1 is zero"),
        (lambda: metrics.tar_at_far([0.1, 0.2], [0, 1], "x"), r"far in \(0, 1\], got x"),
        (lambda: metrics.best_accuracy([0.1, 0.2], [0, 1], folds=2.5), "got 2.5 folds"),
        (lambda: metrics.best_accuracy([0.1, 0.2], [0, 1], folds="x"), "got 'x' folds"),
        (
            lambda: metrics.best_accuracy([0.1, 0.2, 0.3], [0, 1, 1], folds=["a", "a", "b"]),
            "at least 2 folds each, got genuine in 2 and impostors in 1",
        ),
        (lambda: metrics.recall_at_k([[1.0, 0.0], [1e-310, 0.0]], TWO), "query row 1 is zero"),
        (lambda: metrics.bootstrap_interval([1, np.inf], ["a", "b"]), r"values\[1\] is infinite"),
        (lambda: metrics.paired_interval([1, np.inf], [0, np.inf], ["a", "b"]), r"first\[1\] is infinite"),
    ],
)
def test_bad_input_is_named(function, text):
    with pytest.raises(ValueError, match=text):
        function()


def test_sparse_tensors_are_vectors_too():
    assert metrics.recall_at_k(torch.eye(4).to_sparse(), [0, 0, 1, 1]) == metrics.recall_at_k(np.eye(4), [0, 0, 1, 1])


def all_pairs(vectors, labels, *groups):
    """Score and kind of every pair, by loops."""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    pairs = [
        (round(float(unit[i] @ unit[j]), 12), bool(labels[i] == labels[j]))
        for i in range(len(unit))
        for j in range(i + 1, len(unit))
        if all(group is None or group[i] != group[j] for group in groups)
    ]
    return [np.array(side) for side in zip(*pairs, strict=True)]


@pytest.mark.parametrize("tile", [1024, 13], ids=["one tile", "tiles"])
@pytest.mark.parametrize("grouped", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_all_pairs_streamed_equal_all_pairs_listed(kind, grouped, tile, monkeypatch):
    monkeypatch.setattr(_pairs, "TILE", tile)
    random = np.random.default_rng(4)
    labels = random.integers(0, 7, 90)
    vectors = random.standard_normal((7, 5))[labels] + random.standard_normal((90, 5))
    if kind == "ties":
        vectors = np.sign(vectors)
    groups = random.integers(0, 30, 90) if grouped else None
    scores, same = all_pairs(vectors, labels, groups)
    far = [0.5, 0.1, 0.01, 1 / (~same).sum()]
    report = metrics.verification_report(vectors, [f"person {n}" for n in labels], far=far, groups=groups)
    assert report.auc == pytest.approx(metrics.roc_auc(scores, same), abs=1e-13)
    assert report.eer == pytest.approx(metrics.eer(scores, same), abs=1e-13)
    assert report.tar == tuple(metrics.tar_at_far(scores, same, far))
    assert (report.genuine, report.impostors) == (same.sum(), (~same).sum())
    for rate, threshold, target in zip(report.tar, report.threshold, far, strict=True):
        assert (scores[same] >= threshold - 1e-13).mean() == rate
        assert (scores[~same] >= threshold - 1e-13).mean() <= target + 1e-12
    assert report.resolution == 1e-12
    assert report.to_dict()["auc"] == report.auc
    if grouped:  # of two kinds, one that is shared suffices
        both = [groups.astype(str), np.repeat(["query", "reference"], 45)]
        scores, same = all_pairs(vectors, labels, groups, both[1])
        report = metrics.verification_report(vectors, labels, far=0.1, groups=both)
        assert (report.auc, report.genuine, report.impostors) == (
            pytest.approx(metrics.roc_auc(scores, same), abs=1e-13),
            same.sum(),
            (~same).sum(),
        )


@pytest.mark.parametrize("many", [False, True], ids=["held", "on a grid"])
@pytest.mark.parametrize("tile", [1024, 13], ids=["one tile", "tiles"])
@pytest.mark.parametrize("grouped", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("queries", [1, 25, 70])
def test_each_query_with_each_of_a_reference_equals_the_pairs_listed(queries, grouped, tile, many, monkeypatch):
    monkeypatch.setattr(_pairs, "TILE", tile)
    random = np.random.default_rng(queries)
    labels = random.integers(0, 7, 90)
    vectors = random.standard_normal((7, 5))[labels] + random.standard_normal((90, 5))
    groups = random.integers(0, 30, 90)
    kept = slice(None, queries), slice(queries, None)
    sides = [array[part] for part in kept for array in (vectors, [f"person {n}" for n in labels])]
    named = {"groups": tuple(groups[part].tolist() for part in kept)} if grouped else {}
    apart = [np.arange(90) < queries, groups if grouped else None]
    scores, same = all_pairs(vectors, labels, *apart)
    if many:
        for name, value in {"HELD": 3, "COARSE": 50, "LISTED": 100, "PARTS": 100}.items():
            monkeypatch.setattr(_pairs, name, value)
    units, unit = [], _ranking.Rows.unit
    monkeypatch.setattr(_ranking.Rows, "unit", lambda rows, part: units.append(unit(rows, part)) or units[-1])
    report = metrics.verification_report(*sides, far=[0.5, 0.1, 0.05], curve=30, **named)
    assert (report.genuine, report.impostors) == (same.sum(), (~same).sum())
    assert report.auc == pytest.approx(metrics.roc_auc(scores, same), abs=report.auc_error + 1e-13)
    assert (report.auc_error > 0) == many
    assert report.eer == pytest.approx(metrics.eer(scores, same), abs=1e-13)
    assert report.tar == tuple(metrics.tar_at_far(scores, same, [0.5, 0.1, 0.05]))
    assert report.curve.far[-1] == report.curve.tar[-1] == 1
    if tile == 1024 and not many:
        assert max(map(len, units)) == max(queries, 90 - queries), "no pair within a side is multiplied"


@pytest.mark.parametrize("cells", [3, 17, 400])
@pytest.mark.parametrize("grouped", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("kind", ["continuous", "ties", "one way"])
def test_genuine_pairs_that_cannot_be_held_are_told_apart_where_a_figure_hangs_on_them(
    kind, grouped, cells, monkeypatch
):
    random = np.random.default_rng(cells)
    for _ in range(5):
        labels, groups = random.integers(0, 4, 120), random.integers(0, 30, 120) if grouped else None
        vectors = random.standard_normal((4, 6))[labels] + random.standard_normal((120, 6))
        if kind != "continuous":
            vectors = np.sign(vectors) if kind == "ties" else 1 + 1e-3 * vectors
        scores, same = all_pairs(vectors, labels, groups)
        far = [0.5, 0.1, 0.07, 0.01, 1 / (~same).sum()]
        held = metrics.verification_report(vectors, labels, far=far, groups=groups)
        with monkeypatch.context() as patch:
            for name, value in {"HELD": 10, "COARSE": cells, "TILE": 50, "LISTED": 100, "PARTS": 3 * cells}.items():
                patch.setattr(_pairs, name, value)
            report = metrics.verification_report(vectors, labels, far=far, groups=groups, curve=30)
        assert report.resolution > 1e-12
        assert (report.genuine, report.impostors, report.far) == (held.genuine, held.impostors, held.far)
        assert (report.eer, report.tar) == (held.eer, held.tar)
        assert (report.threshold, report.eer_threshold) == (held.threshold, held.eer_threshold)
        assert abs(report.auc - held.auc) <= report.auc_error + 1e-13
        assert 0 <= report.auc_error < 2 / cells
        assert report.average_precision == pytest.approx(held.average_precision, abs=0.5 / cells)
        if kind == "ties" and cells == 400:  # few scores, each of many pairs
            assert report.auc_error < 1e-3
            assert report.auc == pytest.approx(metrics.roc_auc(scores, same), abs=1e-13)


@pytest.mark.parametrize("grouped", [False, True])
def test_vectors_that_all_point_one_way_are_told_apart(monkeypatch, grouped):
    random = np.random.default_rng(3)
    labels = np.arange(160) % 2
    shift = np.where(labels[:, None] == 1, 1, -1) * 1e-4 * np.repeat([1, -1], 8)
    vectors = np.ones((160, 16)) + shift + 1e-4 * random.standard_normal((160, 16))
    groups = np.repeat([0, 1], [120, 40]) if grouped else None
    scores, same = all_pairs(vectors, labels, groups)
    assert np.ptp(scores) < 1e-6
    monkeypatch.setattr(_pairs, "HELD", 2000)
    report = metrics.verification_report(vectors, labels, groups=groups, far=0.1)
    assert (report.resolution, report.auc_error) == (1e-12, 0)
    assert 0.9 < metrics.roc_auc(scores, same) < 1
    assert report.auc == pytest.approx(metrics.roc_auc(scores, same), abs=1e-4)
    assert report.eer == pytest.approx(metrics.eer(scores, same), abs=2e-3)


def test_pairs_outside_the_groups_decide_whether_all_are_held(monkeypatch):
    random = np.random.default_rng(5)
    labels, groups = np.arange(80) % 2, np.repeat([0, 1], [76, 4])
    vectors = random.standard_normal((2, 6))[labels] + random.standard_normal((80, 6))
    scores, same = all_pairs(vectors, labels, groups)
    assert same.sum() == 152
    monkeypatch.setattr(_pairs, "HELD", 200)
    report = metrics.verification_report(vectors, labels, groups=groups, far=0.1)
    assert report.resolution == 1e-12
    assert report.auc == pytest.approx(metrics.roc_auc(scores, same), abs=1e-13)


def test_pairs_are_never_held():
    random = np.random.default_rng(0)
    labels = np.arange(5000) // 4
    vectors = random.standard_normal((1250, 8))[labels] + random.standard_normal((5000, 8))
    tracemalloc.start()
    metrics.verification_report(vectors, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * _ranking.BUDGET  # cosines of all pairs would be 100 MB, and sorting them 200


def test_cells_that_hold_most_pairs_are_told_apart_in_bounded_memory(monkeypatch):
    """A collapsed encoder, and a few outliers that stretch the grid: all other pairs are in a few of its cells."""
    random = np.random.default_rng(0)
    labels = np.arange(3000) % 2
    vectors = np.ones((3000, 8)) + 1e-3 * (np.where(labels[:, None] == 1, 1, -1) * np.repeat([1, -1], 4))
    vectors += 1e-3 * random.standard_normal((3000, 8))
    vectors[:6] = random.standard_normal((6, 8))
    held = metrics.verification_report(vectors, labels)
    monkeypatch.setattr(_pairs, "HELD", 1 << 18)
    monkeypatch.setattr(_pairs, "COARSE", 50_000)
    tracemalloc.start()
    report = metrics.verification_report(vectors, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * _ranking.BUDGET  # 89 MiB; with the scores of these cells listed 305
    assert report.resolution > 1e-12
    assert (report.eer, report.tar) == (held.eer, held.tar)
    assert (report.threshold, report.eer_threshold) == (held.threshold, held.eer_threshold)
    assert abs(report.auc - held.auc) <= report.auc_error < 1e-4


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: metrics.verification_report(np.eye(3), [0, 0, 0]), "needs both, got 3 genuine and 0 impostors"),
        (lambda: metrics.verification_report(np.eye(3), [0, 1, 2]), "needs both, got 0 genuine and 3 impostors"),
        (lambda: metrics.verification_report(np.eye(3), [0, 1]), "labels has 2 entries for 3 rows"),
        (lambda: metrics.verification_report(np.eye(3), [0, 0, 1], far=0.1), "far=0.1 cannot be measured on 2 impost"),
        (lambda: metrics.verification_report(np.eye(3), [0, 0, 1], far=5), "not a percentage"),
        (lambda: metrics.verification_report(np.eye(3), [0, 0, 1], np.eye(3)), "go together.*got only reference"),
        (lambda: metrics.verification_report(np.eye(3), [0, 0, 1], np.eye(2), [0, 1]), "two different encoders"),
        (lambda: metrics.verification_report(np.eye(3), [0, 0, 1], np.eye(3), [2, 3, 4]), "got 0 genuine and 9 impo"),
        (
            lambda: metrics.verification_report(np.eye(3), [0, 0, 1], np.eye(3), [0, 1, 2], groups=[0, 1, 2]),
            r"must be a pair \(query groups, reference groups\)",
        ),
    ],
)
def test_verification_of_a_set_refuses_and_says_why(function, text):
    with pytest.raises(ValueError, match=text):
        function()


def test_a_broken_evaluation_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(_ranking, "CHUNK", 16)
    monkeypatch.setattr(_progress, "SAVE_SECONDS", 0.0)
    random = np.random.default_rng(0)
    labels = random.integers(0, 12, 150)
    vectors = random.standard_normal((150, 6))
    want = metrics.retrieval_report(vectors, labels)
    ranked = []
    shallow = _ranking.Problem._shallow

    def breaking(self, rows, depth, count):
        if len(ranked) == 4:
            raise KeyboardInterrupt
        ranked.append(len(rows))
        return shallow(self, rows, depth, count)

    state = tmp_path / "deep" / "state"
    monkeypatch.setattr(_ranking.Problem, "_shallow", breaking)
    with pytest.raises(KeyboardInterrupt):
        metrics.retrieval_report(vectors, labels, state=state)
    assert state.exists()
    first = sum(ranked)
    ranked[:] = [0] * 5
    got = metrics.retrieval_report(vectors, labels, state=state)
    assert 0 < first < 150
    assert sum(ranked) == 150 - first
    for name, values in want.per_query.items():
        np.testing.assert_array_equal(got.per_query[name], values)
    ranked[:] = [0] * 5
    assert metrics.retrieval_report(vectors, labels, state=state).values == want.values
    assert sum(ranked) == 0, "all was done"
    assert [path.name for path in state.parent.iterdir()] == ["state"]
    other = vectors.copy()
    other[77, 3] += 1e-9
    with pytest.raises(ValueError, match="other vectors, labels, groups or k"):
        metrics.retrieval_report(other, labels, state=state)
    with pytest.raises(ValueError, match="other vectors, labels, groups or k"):
        metrics.retrieval_report(vectors, labels, k=[7], state=state)
    state.write_bytes(state.read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a readable state file.*Delete it"):
        metrics.retrieval_report(vectors, labels, state=state)


@pytest.mark.ddp
def test_ranks_share_the_work_and_find_what_one_process_does(tmp_path):
    """Two and three processes with uneven shares, padded, one of them empty; not a digit differs."""
    torch.multiprocessing.spawn(worker.run, (str(tmp_path),), nprocs=3)
    want = worker.figures(*worker.samples())
    for world in worker.SHARES:
        for rank in range(world):
            found = torch.load(tmp_path / f"found-{world}-{rank}", weights_only=False)
            assert found["index"] == list(range(47))
            got = found["figures"]
            again = got.pop("again")
            assert got.keys() == want.keys()
            for name, value in want.items():
                np.testing.assert_array_equal(got[name], value, err_msg=name)
            assert all(again[name] == np.mean(want[name]) for name in again)
            different, *rest = found["refused"][-5:]
            assert "no match" in found["refused"][0]
            assert all("differ: own rows of each rank? Collect them first" in text for text in (different, *rest[:2]))
            assert "index has 2 entries for 3 rows on rank 1" in rest[2]
            assert "do not go together: float64 (2,), float64 (3,)" in rest[3]
            failed = found["failed"]
            told = {
                **dict.fromkeys([*worker.METRICS, "report", "hits", "pairs"], "row 3 is NaN or infinite"),
                "depth": "k to be a whole number of at least 1, got 0",
                "state": f"damaged-2-of-{world} is not a readable state file",
                "no such argument": "TypeError.*unexpected keyword argument 'depth'",
                "ragged": "rows of different lengths",
            }
            for name, text in told.items():
                assert re.search(
                    f"^Not all of {world} ranks can go on, so that none does; rank 1: .*{text}", failed[name]
                )
            assert all("and settings on every rank, and they differ" in failed[name] for name in ("far", "depths"))
            assert len(failed) == len(told) + 2
        assert sorted(path.name for path in tmp_path.glob(f"state-{world}*")) == [
            f"state-{world}-{rank + 1}-of-{world}" for rank in range(world)
        ]


def test_rows_that_do_not_fit_their_index_are_refused():
    with pytest.raises(ValueError, match="index has 2 entries for 3 rows"):
        metrics.each_sample_once([0, 1], [1, 2, 3])
