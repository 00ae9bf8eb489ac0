"""The open-set trial and the evaluation built on it, on simulated identities with known truth."""

import numpy as np
import pytest

from embedlab._types import Embeddings
from embedlab.retrieval import Gallery, evaluate_gallery
from embedlab.retrieval.evaluation import evaluate_open_set, retrieval_figures, table
from embedlab.retrieval.open_set import choose_templates, halve_identities, open_set_trial, take


def people(names: list[str], images: int, *, noise: float = 0.3, seed: int = 0) -> Embeddings:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(len(names), 16))
    vectors = centres.repeat(images, 0) + noise * random.normal(size=(len(names) * images, 16))
    labels = [name for name in names for _ in range(images)]
    return Embeddings(vectors.astype(np.float32), labels, np.arange(len(labels)))


def names(kind: str, count: int) -> list[str]:
    return [f"{kind}{number:03d}" for number in range(count)]


def test_a_clear_case_is_solved_and_every_count_is_right() -> None:
    query, strangers = people(names("a", 40), 6), people(names("b", 80), 3, seed=1)
    report, _ = evaluate_open_set(query, strangers, fpir=0.05, templates=2)
    assert report["enrolled"] == report["strangers"] == 20
    assert report["genuine_probes"] == 20 * 4
    assert report["stranger_probes"] == 20 * 6
    assert report["calibration_strangers"] == 80
    assert report["closed_set_accuracy"] == 1
    assert report["detection_rate"] > 0.9
    assert report["observed_fpir"] <= 0.05
    assert report["bound"] <= report["target_fpir"]


def test_rates_are_means_over_identities_by_hand(tmp_path) -> None:
    with Gallery.create(tmp_path / "g", dim=2) as gallery:
        gallery.enroll(embeddings=[[1, 0], [0, 1]], labels=["x", "y"])
        gallery.calibrate(embeddings=[[-1, -1 - i / 1000] for i in range(10)], fpir=0.3)  # threshold below 0
        probes = Embeddings(
            np.array([[1, 0.1], [1, 0.2], [0.1, 1], [1, 0.1], [0, 1], [-1, -1], [0, 1]], np.float32),
            ["x", "x", "x", "y", "y", "stranger", "other"],
            np.arange(7),
        )
        report = evaluate_gallery(gallery, probes)
    assert report.closed_set_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert report.detection_rate == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert report.observed_fpir == pytest.approx((0 + 1) / 2)
    assert report.to_dict()["strangers"] == 2


def test_halves_and_templates_depend_on_names_and_seed_only() -> None:
    labels = people(names("a", 9), 4).labels
    first, second = halve_identities(labels, seed=1)
    assert halve_identities(labels[::-1], seed=1) == (first, second)
    assert len(first) == 5
    assert not first & second
    assert halve_identities(labels, seed=2)[0] != first
    chosen = choose_templates(labels, first, templates=3)
    assert chosen.sum() == 15
    assert set(np.array(labels)[chosen]) == first


def test_what_cannot_be_tried_is_explained(tmp_path) -> None:
    query = people(names("a", 4), 3)
    with pytest.raises(ValueError, match="4 identities set the threshold and are tested on it, first 'a000'"):
        evaluate_open_set(query, query, fpir=0.5)
    with pytest.raises(ValueError, match="'a00\\d' has 3 images: 3 templates leave none to probe with"):
        evaluate_open_set(query, people(names("b", 20), 2), fpir=0.5, templates=3)
    with pytest.raises(ValueError, match="needs at least 2 identities, to enroll one and refuse one; got 1"):
        halve_identities(["a", "a"])
    with Gallery.create(tmp_path / "g", dim=16) as gallery:
        gallery.enroll(embeddings=query)
        with pytest.raises(ValueError, match="is not calibrated, so it accepts nobody"):
            evaluate_gallery(gallery, query)
        gallery.calibrate(embeddings=people(names("b", 20), 2, seed=3), fpir=0.2)
        with pytest.raises(ValueError, match="needs the probes' labels"):
            evaluate_gallery(gallery, Embeddings(query.vectors, None, query.ids))
        with pytest.raises(ValueError, match="None of the probes' labels is enrolled"):
            evaluate_gallery(gallery, people(names("c", 3), 2))


def test_promise_holds_over_many_trials() -> None:
    """Observed FPIR stays at or below the promise in at least nine of ten simulated galleries (95 % are promised)."""
    broken = 0
    for seed in range(60):
        everyone = people(names("p", 220), 4, noise=1.0, seed=seed)
        enrolled, probing, setting = (
            take(everyone, [r for r, n in enumerate(everyone.labels) if low <= int(n[1:]) < high])
            for low, high in ((0, 20), (20, 120), (120, 220))
        )
        probes = take(everyone, [r for r, n in enumerate(everyone.labels) if int(n[1:]) < 120])
        report = open_set_trial(enrolled, probes, setting, fpir=0.1)
        # the truth is known only up to the test strangers' own chance: a margin of two standard errors
        broken += report.observed_fpir > 0.1 + 2 * np.sqrt(0.1 * 0.9 / 100)
        assert len(probing.labels) == 400
    assert broken <= 6


def test_retrieval_figures_and_their_table() -> None:
    query, reference = people(names("a", 10), 3), people(names("a", 10), 5)
    report, _ = retrieval_figures(query, reference, knn_k=200)
    assert report["recall_at_1"] == 1
    assert report["knn_k"] == 50
    assert report["identities"] == 10
    alone, _ = retrieval_figures(query, knn_k=2)
    assert (alone["knn_k"], alone["knn_accuracy"]) == (2, 1)
    text = table({"ours": report, "other": {"recall_at_1": 0.5}}, ["recall_at_1", "knn_accuracy"])
    perfect = [
        "1.000",
        "[0.722,",
        "1.000]",
    ]  # Wilson's interval of 10 of 10: a resample of nothing but hits says nothing
    assert text.splitlines()[1].split()[:4] == ["ours", *perfect]
    assert text.splitlines()[2].split() == ["other", "0.500", "-"]
    with pytest.raises(ValueError, match="The query images have no labels"):
        retrieval_figures(Embeddings(query.vectors, None, query.ids))
