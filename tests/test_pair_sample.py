"""Pairs for intervals and pictures, against loops over all pairs; neighbours and curves that pictures are made of."""

import itertools

import numpy as np
import pytest
import sklearn.metrics
from naive import naive_rankings, naive_resampled_verification

from embedlab import metrics
from embedlab.metrics import draw_pairs, verification_resamples


def data(rows: int, classes: int, *, seed: int = 0, dim: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, rows)
    centres = np.random.default_rng(9).normal(size=(classes, dim))
    return (centres[labels] + generator.normal(size=(rows, dim))).astype(np.float32), labels


@pytest.mark.parametrize("sides", [1, 2])
def test_all_pairs_are_taken_where_they_are_few(sides) -> None:
    _, labels = data(20, 4)
    _, others = data(15, 5, seed=1)
    if sides == 1:
        found = draw_pairs(labels)
        everything = list(itertools.combinations(range(20), 2))
        others = labels
    else:
        found = draw_pairs(labels, others)
        everything = list(itertools.product(range(20), range(15)))
    for pairs, wanted in ((found.genuine, True), (found.impostors, False)):
        assert sorted(map(tuple, pairs.tolist())) == [
            (a, b) for a, b in everything if (labels[a] == others[b]) == wanted
        ]
    assert (found.genuine_total, found.impostors_total) == (len(found.genuine), len(found.impostors))


@pytest.mark.parametrize("sides", [1, 2])
def test_drawn_pairs_are_of_their_kind_and_evenly_spread(sides) -> None:
    labels = np.repeat([0, 1, 2], [2, 8, 12])
    others = None if sides == 1 else np.repeat([0, 1, 3], [5, 3, 4])
    found = draw_pairs(labels, others, most=20, seed=3)
    right = labels if others is None else others
    assert (labels[found.genuine[:, 0]] == right[found.genuine[:, 1]]).all()
    assert (labels[found.impostors[:, 0]] != right[found.impostors[:, 1]]).all()
    if sides == 1:
        assert (found.genuine[:, 0] != found.genuine[:, 1]).all()
        assert (found.genuine_total, found.impostors_total) == (1 + 28 + 66, 16 + 24 + 96)
    else:
        assert (found.genuine_total, found.impostors_total) == (10 + 24, 22 * 12 - 34)
    assert len(found.genuine) == len(found.impostors) == 20
    again, other = draw_pairs(labels, others, most=20, seed=3), draw_pairs(labels, others, most=20, seed=4)
    assert (again.genuine == found.genuine).all()
    assert (again.impostors == found.impostors).all()
    assert (other.impostors != found.impostors).any()


@pytest.mark.parametrize("sides", [1, 2])
def test_pairs_of_one_group_are_left_out_of_all_and_of_those_drawn(sides) -> None:
    _, labels = data(40, 4)
    others = labels if sides == 1 else data(35, 5, seed=1)[1]
    tracks = [
        np.random.default_rng(2).choice(["x", "y", "z"], len(side), p=[0.6, 0.3, 0.1]) for side in (labels, others)
    ]
    everything = itertools.combinations(range(40), 2) if sides == 1 else itertools.product(range(40), range(35))
    if sides == 1:
        tracks[1] = tracks[0]
    pairs = [(a, b) for a, b in everything if tracks[0][a] != tracks[1][b]]
    wanted = [{(a, b) for a, b in pairs if (labels[a] == others[b]) == same} for same in (True, False)]
    given = {"groups": tracks[0]} if sides == 1 else {"reference_labels": others, "groups": tuple(tracks)}
    for most in (10_000, 1000, 60):
        found = draw_pairs(labels, **given, most=most)
        assert (found.genuine_total, found.impostors_total) == tuple(map(len, wanted))
        for drawn, allowed in zip((found.genuine, found.impostors), wanted, strict=True):
            if len(allowed) <= most:
                assert sorted(map(tuple, drawn.tolist())) == sorted(allowed)
            else:
                assert len(drawn) == most
                assert {tuple(sorted(pair) if sides == 1 else pair) for pair in drawn.tolist()} <= allowed


def test_genuine_pairs_of_two_groups_are_equally_likely() -> None:
    labels, tracks = np.repeat([0, 1], [4, 4]), np.array([0, 0, 0, 1, 0, 0, 1, 1])  # 3 and 4 pairs
    found = draw_pairs(labels, groups=tracks, most=6)
    assert (found.genuine_total, len(found.genuine)) == (7, 6)
    drawn = np.concatenate([draw_pairs(labels, groups=tracks, most=6, seed=seed).genuine for seed in range(700)])
    _, counts = np.unique(np.sort(drawn, axis=1), axis=0, return_counts=True)
    assert len(counts) == 7
    assert np.abs(counts - 600).max() < 100  # four standard deviations


def test_every_genuine_pair_is_equally_likely() -> None:
    labels = np.repeat([0, 1], [3, 4])  # 3 and 6 pairs
    counts = np.zeros((7, 7))
    for seed in range(400):
        pairs = np.sort(draw_pairs(labels, most=8, seed=seed).genuine, axis=1)
        np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    seen = counts[counts > 0]
    assert len(seen) == 9
    expected = 400 * 8 / 9
    assert ((seen - expected) ** 2 / expected).sum() < 27  # chi square, 8 degrees of freedom: one seed in 1,400


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_resamples_equal_the_loops(sides, kind) -> None:
    vectors, labels = data(18, 4)
    others, other_labels = data(12, 5, seed=1) if sides == 2 else (None, None)
    pairs = draw_pairs(labels, other_labels)
    scores = pairs.scores(vectors, others)
    if kind == "ties":
        scores = tuple(side.round(1) for side in scores)
    got = verification_resamples(pairs, scores, far=(0.1, 0.3), resamples=25, seed=5)
    want = naive_resampled_verification(
        *scores, pairs.genuine, pairs.impostors, *pairs.codes, far=(0.1, 0.3), resamples=25, seed=5
    )
    assert set(got) == set(want) == {"auc", "eer", "tar_at_0.1", "tar_at_0.3"}
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, atol=1e-9, err_msg=name)


def test_a_grid_of_thresholds_costs_next_to_nothing(monkeypatch) -> None:
    vectors, labels = data(160, 20)
    pairs = draw_pairs(labels)
    scores = pairs.scores(vectors)
    coarse = verification_resamples(pairs, scores, far=(0.01,), resamples=50)
    monkeypatch.setattr("embedlab.metrics.pair_sample.LEVELS", 1 << 20)
    monkeypatch.setattr("embedlab.metrics.pair_sample._BLOCK", 1)  # one resample at a time
    exact = verification_resamples(pairs, scores, far=(0.01,), resamples=50)
    for name, most in (("auc", 1e-4), ("eer", 3e-3), ("tar_at_0.01", 0.02)):
        assert np.abs(coarse[name] - exact[name]).max() < most


def test_a_resample_of_one_identity_says_nothing() -> None:
    pairs = draw_pairs([0, 0, 1, 1])
    found = verification_resamples(pairs, pairs.scores(np.eye(4) + 0.1), resamples=40)
    assert np.isnan(found["eer"]).any()
    assert np.isfinite(found["eer"]).any()


def test_one_kind_of_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3 genuine and 0 impostors: a set of one class"):
        draw_pairs([1, 1, 1])
    with pytest.raises(ValueError, match="got 0 genuine and 4 impostors"):
        draw_pairs(["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"far": [-1]}, r"far in \(0, 1\], got \[-1\]; it is a share"),
        ({"far": [np.nan]}, r"far in \(0, 1\], got \[nan\]"),
        ({"far": [0.2]}, "far=0.2 cannot be measured on 4 impostor pairs.*Use far >= 0.25"),
        ({"resamples": 0}, "resamples to be a whole number of at least 1, got 0"),
        ({"resamples": 2.5}, "resamples to be a whole number of at least 1, got 2.5"),
        ({"scores": (np.ones(3), np.ones(4))}, "expected 2 genuine and 4 impostors, got 3 and 4"),
        ({"scores": (np.ones(2), np.full(4, np.nan))}, r"scores\[1\]\[0\] is NaN"),
    ],
)
def test_resamples_refuse_what_they_cannot_count(settings, text) -> None:
    pairs = draw_pairs([0, 0, 1, 1])
    scores = pairs.scores(np.eye(4) + 0.1)
    assert verification_resamples(pairs, scores, far=[0.25], resamples=3.0)["auc"].shape == (3,)
    with pytest.raises(ValueError, match=text):
        verification_resamples(pairs, **({"scores": scores} | settings))


def test_vectors_of_other_samples_than_the_pairs_are_refused() -> None:
    within, across = draw_pairs([0, 0, 1, 1]), draw_pairs([0, 1, 1, 0], [0, 1])
    for attempt in (
        lambda: within.scores(np.ones((6, 2))),
        lambda: across.scores(np.ones((4, 2))),
        lambda: across.scores(np.ones((4, 2)), np.ones((2, 3))),
    ):
        with pytest.raises(ValueError, match="drawn among 4 queries and . rows to compare them with, got vectors"):
            attempt()


def test_two_encoders_share_their_draws() -> None:
    vectors, labels = data(80, 16)
    worse = vectors + np.random.default_rng(1).normal(size=vectors.shape).astype(np.float32)
    pairs = draw_pairs(labels)
    ours, theirs = (verification_resamples(pairs, pairs.scores(side)) for side in (vectors, worse))
    paired = np.std(ours["auc"] - theirs["auc"])
    assert paired < np.hypot(np.std(ours["auc"]), np.std(theirs["auc"]))
    same = verification_resamples(pairs, pairs.scores(3 * vectors))
    np.testing.assert_allclose(same["eer"], ours["eer"])


@pytest.mark.parametrize("grouped", [False, True], ids=["", "query against reference"])
def test_the_curve_lies_on_all_operating_points(grouped) -> None:
    vectors, labels = data(120, 12)
    groups = np.repeat(["query", "reference"], 60) if grouped else None
    report = metrics.verification_report(vectors, labels, groups=groups, curve=90)
    first, second = np.triu_indices(120, 1)
    if grouped:
        first, second = first[groups[first] != groups[second]], second[groups[first] != groups[second]]
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scores, same = np.einsum("nd,nd->n", unit[first], unit[second]), labels[first] == labels[second]
    far, tar, _ = metrics.roc_curve(scores, same)
    exact = set(zip(far.round(12).tolist(), tar.round(12).tolist(), strict=True))
    curve = report.curve
    assert 40 < len(curve.far) < 200
    assert (curve.far[0], curve.tar[0], curve.far[-1], curve.tar[-1]) == (0, 0, 1, 1)
    on_steps = [tuple(point) in exact for point in np.stack([curve.far, curve.tar], 1).round(12).tolist()]
    assert np.mean(on_steps) > 0.7  # the rest are corners of steps, which scikit-learn's curve joins as well
    heights = np.interp(curve.far, far, tar)
    assert np.abs(np.interp(far, curve.far, curve.tar) - tar).max() < 0.05
    assert (np.abs(heights - curve.tar) < 0.05).all()
    accepted = curve.tar * report.genuine + curve.far * report.impostors
    np.testing.assert_allclose(curve.precision[1:], (curve.tar * report.genuine / np.maximum(accepted, 1))[1:])
    assert report.average_precision == pytest.approx(sklearn.metrics.average_precision_score(same, scores))
    errors = [
        np.mean(scores[~same] >= report.eer_threshold - 1e-9),
        np.mean(scores[same] < report.eer_threshold - 1e-9),
    ]
    assert errors[1] <= errors[0]
    assert min(errors) - 0.01 < report.eer < max(errors) + 0.01
    assert "curve" not in report.to_dict()


def test_neighbours_are_those_of_the_metrics() -> None:
    vectors, labels = data(40, 6)
    vectors[7] = vectors[3]  # a tie
    others, other_labels = data(30, 6, seed=2)
    for pair in ((vectors,), (vectors, others)):
        ids, scores = metrics.nearest_neighbours(*pair, k=5)
        rankings = naive_rankings(*pair)
        assert ids.tolist() == [ranking[:5] for ranking in map(list, rankings)]
        assert (np.diff(scores, axis=1) <= 1e-7).all()
    assert metrics.nearest_neighbours(vectors, k=100)[0].shape == (40, 39)
    hits = metrics.knn_hits(vectors, labels, others, other_labels, k=5)
    assert hits.mean() == metrics.knn_accuracy(vectors, labels, others, other_labels, k=5)
    with pytest.raises(ValueError, match="needs at least 2 rows, got 1"):
        metrics.nearest_neighbours(vectors[:1])
    with pytest.raises(ValueError, match="query has 4 numbers per row, reference has 2"):
        metrics.nearest_neighbours(vectors, others[:, :2])


def test_several_intervals_are_the_single_ones() -> None:
    random = np.random.default_rng(0)
    owners = random.integers(0, 9, 50)
    values = {name: random.random(50) for name in "abc"}
    values["b"][:7] = np.nan
    found = metrics.bootstrap_intervals(values, owners, seed=3)
    assert list(found) == ["a", "b", "c"]
    for name, given in values.items():
        assert found[name] == pytest.approx(metrics.bootstrap_interval(given, owners, seed=3), abs=1e-12)
