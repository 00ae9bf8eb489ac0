"""An audit of vectors: its figures against float64 loops, and whether it finds what was planted and little else."""

import json
import math
import re

import numpy as np
import pytest

from embedlab._types import Embeddings
from embedlab.cli import main
from embedlab.retrieval import Gallery, write_embeddings
from embedlab.retrieval import audit as module
from embedlab.retrieval.audit import audit


def clusters(identities: int, rows: int, *, noise: float = 0.1, dim: int = 32, seed: int = 0):
    """Vectors (identities * rows, dim) of any norm around random directions, and their labels."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(identities, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = centres.repeat(rows, axis=0) + random.normal(0, noise, (identities * rows, dim))
    vectors *= random.uniform(0.5, 2, (len(vectors), 1))
    return vectors, [f"p{row // rows:03d}" for row in range(len(vectors))]


def naive_audit(vectors: np.ndarray, labels: list[str], threshold: float | None, duplicate: float) -> dict:
    """Every pair in float64, one after another; shares no line with the library."""
    unit = [row / np.sqrt(sum(float(x) ** 2 for x in row)) for row in np.asarray(vectors, np.float64)]
    cosine = [[float(a @ b) for b in unit] for a in unit]
    everyone = range(len(unit))
    rival = [max((j for j in everyone if labels[j] != labels[i]), key=cosine[i].__getitem__) for i in everyone]
    margins = {}
    for i in everyone:
        own = sorted((cosine[i][j] for j in everyone if j != i and labels[j] == labels[i]), reverse=True)
        other = sorted((cosine[i][j] for j in everyone if labels[j] == labels[rival[i]]), reverse=True)
        depth = min(3, len(own), len(other))
        if depth:
            margins[i] = (sum(own[:depth]) / depth, sum(other[:depth]) / depth, own[0] > cosine[i][rival[i]], own[0])
    gaps = [own - other for own, other, *_ in margins.values()]
    middle = float(np.median(gaps))
    spread = 1.4826 * float(np.median([abs(gap - middle) for gap in gaps]))
    wrong = [
        (-(m[0] - m[1]) / middle, i)
        for i, m in margins.items()
        if middle > 0 and m[0] - m[1] <= min(-middle / 2, middle - 3 * spread)
    ]
    links = {frozenset((i, j)) for i in everyone for j in everyone if i < j and cosine[i][j] >= duplicate}
    taken: dict[frozenset, int] = {}
    for i in everyone:
        pair = frozenset((labels[i], labels[rival[i]]))
        taken[pair] = taken.get(pair, 0) + (threshold is not None and cosine[i][rival[i]] >= threshold)
    by_name: dict[str, list[bool]] = {}
    for i, (_, _, right, own) in margins.items():
        by_name.setdefault(labels[i], []).append(right and threshold is not None and own >= threshold)
    values = np.linalg.svd(np.stack(unit), compute_uv=False)
    shares = values / values.sum()
    return {
        "rival": [cosine[i][rival[i]] for i in everyone],
        "wrong": sorted(wrong, reverse=True),
        "links": links,
        "taken": {pair: count / sum(labels.count(name) for name in pair) for pair, count in taken.items()},
        "recall": float(np.mean([right for _, _, right, _ in margins.values()])),
        "detected": float(np.mean([np.mean(hits) for hits in by_name.values()])),
        "rank": math.exp(-sum(share * math.log(share) for share in shares if share > 0)),
    }


@pytest.mark.parametrize("noise", [0.05, 0.25], ids=["tight", "overlapping"])
@pytest.mark.parametrize("chunk", [4096, 7], ids=["one chunk", "many chunks"])
def test_every_figure_equals_the_float64_loops(noise, chunk, monkeypatch) -> None:
    monkeypatch.setattr(module, "QUERIES", chunk)
    monkeypatch.setattr(module, "SCORES", 40 * chunk)
    vectors, labels = clusters(24, 5, noise=noise, dim=12)
    vectors[7] = 3 * vectors[60] + 0.001  # cosine above 0.999, without a tie
    labels[33], labels[90] = labels[90], labels[33]
    labels[119] = "alone"
    found = audit(vectors, labels, fpir=0.3)
    assert found.calibration is not None
    want = naive_audit(vectors, labels, found.calibration.threshold, 0.999)
    assert [row.id for row in found.mislabelled] == [row for _, row in want["wrong"]]
    np.testing.assert_allclose([row.score for row in found.mislabelled], [s for s, _ in want["wrong"]], atol=1e-4)
    assert {frozenset(group.ids) for group in found.duplicates} == want["links"]
    assert {frozenset(pair.labels): pytest.approx(pair.share) for pair in found.confusable} == want["taken"]
    assert found.recall_at_1 == pytest.approx(want["recall"])
    assert found.detection_rate == pytest.approx(want["detected"])
    assert found.effective_rank == pytest.approx(want["rank"], rel=1e-5)
    assert found.single == 1
    rate = np.mean(
        [
            np.mean(
                [
                    score >= found.calibration.threshold
                    for score, name in zip(want["rival"], labels, strict=True)
                    if name == one
                ]
            )
            for one in set(labels)
        ]
    )
    assert found.calibration.observed == pytest.approx(rate)
    limit, _, _, detected = found.calibration.curve[len(found.calibration.curve) // 2]
    assert detected == pytest.approx(naive_audit(vectors, labels, limit, 0.999)["detected"], abs=1e-9)


def test_what_was_planted_is_at_the_top() -> None:
    vectors, labels = clusters(150, 8)
    planted = {16: 900, 404: 40, 1111: 700}  # row to the row whose identity it is filed under
    for row, other in planted.items():
        labels[row] = labels[other]
    vectors[320] = 2 * vectors[321]
    vectors[500] = 0.5 * vectors[808]
    near = vectors[240] / np.linalg.norm(vectors[240])  # the identities of rows 240 and 248 become look-alikes
    vectors[240:256] = near + np.random.default_rng(1).normal(0, 0.05, (16, 32))
    found = audit(vectors, labels, fpir=0.1)
    assert {row.id for row in found.mislabelled[:4]} == {*planted, 500}
    suggested = {row.id: row.suggestion for row in found.mislabelled}
    assert {row: suggested[row] for row in planted} == {row: f"p{row // 8:03d}" for row in planted}
    assert len(found.mislabelled) <= 6
    assert [set(group.ids) for group in found.duplicates] == [{500, 808}, {320, 321}]
    assert [group.across for group in found.duplicates] == [True, False]
    assert set(found.confusable[0].labels) == {"p030", "p031"}
    assert found.confusable[0].taken == (8, 8)


@pytest.mark.parametrize("seed", range(5))
def test_clean_data_has_few_false_ones(seed) -> None:
    vectors, labels = clusters(200, 6, noise=0.15, seed=seed)
    found = audit(vectors, labels)
    assert len(found.mislabelled) <= 2  # of 1,200
    assert found.duplicates == ()


def test_the_threshold_keeps_its_promise_to_new_strangers() -> None:
    vectors, labels = clusters(800, 3, noise=0.15)
    found = audit(vectors[:1800], labels[:1800], fpir=0.02)
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    taken = (unit[1800:] @ unit[:1800].T).max(axis=1) >= found.calibration.threshold
    assert found.calibration.source == "leave-identity-out"
    assert found.calibration.bound <= 0.02
    assert taken.mean() <= 0.03  # 600 images of 200 strangers
    assert "leave-identity-out" in found.to_text()


def test_a_crowd_of_the_same_rows_is_one_group_and_still_has_rivals() -> None:
    vectors, labels = clusters(4, 3)
    vectors = np.concatenate([vectors, np.repeat(vectors[:1], 300, axis=0)])
    found = audit(vectors, [*labels, *["p000"] * 300], fpir=0.9)
    assert [len(group.ids) for group in found.duplicates] == [301]
    assert found.rows == 312
    nearest = max((pair for pair in found.confusable if "p000" in pair.labels), key=lambda pair: pair.cosine)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert nearest.cosine == pytest.approx((unit[[0, 1, 2]] @ unit[3:12].T).max(), abs=1e-6)


def test_too_few_identities_get_no_threshold_and_hear_why() -> None:
    vectors, labels = clusters(10, 3)
    found = audit(vectors, labels)
    assert found.calibration is None
    assert "needs 597 strangers" in found.refusal
    assert "no threshold" in found.to_text()
    assert found.confused == ()
    given = audit(vectors, labels, threshold=-1.0)
    assert sum(sum(pair.taken) for pair in given.confusable) == 30


@pytest.mark.parametrize(
    ("vectors", "labels", "options", "message"),
    [
        ([[1, 0], [0, 1]], ["a", "a"], {}, "needs at least two, got 1"),
        ([[1, 0], [0, 1]], ["a"], {}, "1 labels came for 2"),
        ([[1, 0], [0, 0]], ["a", "b"], {}, "row 1 is zero"),
        ([[1, 0], [0, 1]], None, {}, "audit needs labels"),
        ([[1, 0], [0, 1]], ["a", "b"], {"ids": [1]}, "1 ids came for 2"),
        ([[1, 0], [0, 1]], ["a", "b"], {"duplicate": 2}, "a cosine between 0 and 1"),
        ([[1, 0], [0, 1]], ["a", "b"], {"fpir": 5}, "fpir and confidence lie between 0 and 1"),
    ],
)
def test_bad_input_is_explained(vectors, labels, options, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        audit(vectors, labels, **options)


def test_one_row_each_leaves_labels_alone() -> None:
    found = audit(np.eye(4), list("abcd"), fpir=0.9)
    assert (found.single, found.mislabelled, found.recall_at_1, found.detection_rate) == (4, (), None, None)
    assert found.effective_rank == pytest.approx(4)


def test_command_line_takes_what_people_have(tmp_path, capsys) -> None:
    vectors, labels = clusters(40, 4)
    labels[5] = labels[80]
    np.save(tmp_path / "v.npy", vectors.astype(np.float32))
    (tmp_path / "labels.txt").write_text("\n".join(labels), encoding="utf-8")
    report = tmp_path / "new" / "audit.html"
    call = ["audit", str(tmp_path / "v.npy"), str(tmp_path / "labels.txt"), "--fpir", "0.2"]
    assert main([*call, "--json", "--out", str(report)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mislabelled"][0]["id"] == 5
    assert result["mislabelled"][0]["suggestion"] == "p001"
    assert result["calibration"]["bound"] <= 0.2
    assert "May be mislabelled" in report.read_text(encoding="utf-8")
    assert main(call) == 0
    assert "5: p020 -> p001?" in capsys.readouterr().out
    write_embeddings(
        tmp_path / "stored",
        Embeddings(vectors.astype(np.float32), labels, np.arange(len(vectors)) + 1000, None),
        protocol={},
    )
    assert main(["audit", str(tmp_path / "stored"), "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert stored["mislabelled"][0]["id"] == 1005
    assert stored["calibration"] is None
    assert main(["audit", str(tmp_path / "v.npy")]) == 1
    assert "has no labels" in capsys.readouterr().err


def test_a_gallery_is_audited_by_the_same_function(tmp_path) -> None:
    vectors, labels = clusters(30, 4)
    labels[9] = labels[70]
    with Gallery.create(tmp_path / "g", dim=32) as gallery:
        gallery.enroll(embeddings=vectors, labels=labels)
        held = gallery.embeddings()
    found = audit(held.vectors, held.labels, held.ids)
    assert found.mislabelled[0].id == held.ids[9]
    assert found.mislabelled == audit(vectors, labels, held.ids).mislabelled
