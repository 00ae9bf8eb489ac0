"""Who a probe is: several images as one probe, quality, score normalisation, growth, leave-identity-out."""

import json
import logging

import numpy as np
import pytest

from embedlab._types import Embeddings
from embedlab.cli import main
from embedlab.retrieval import Calibration, CalibrationError, Gallery
from embedlab.retrieval.cohort import Cohort
from embedlab.retrieval.promise import left_out
from embedlab.retrieval.scoring import sub_gallery_scores

DIM = 16


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def people(identities, images, *, kind="person", noise=0.15, seed=0):
    """Vectors around one random direction per identity; `kind` names them, the seed decides who they are."""
    random = np.random.default_rng(seed)
    centres = unit(random.standard_normal((identities, DIM))).repeat(images, axis=0)
    labels = [f"{kind} {i}" for i in range(identities) for _ in range(images)]
    return centres + noise * random.standard_normal(centres.shape), labels


def others(count, seed=77):
    return unit(np.random.default_rng(seed).standard_normal((count, DIM)))


@pytest.fixture(params=["max", "mean", "vote"])
def gallery(request, tmp_path):
    with Gallery.create(tmp_path / "gallery", dim=DIM, fusion=request.param, vote_k=5) as made:
        vectors, labels = people(20, 3, noise=0.4)
        made.enroll(embeddings=vectors[:-1], labels=labels[:-1])  # one identity has fewer templates
        yield made


# ---- oracles: float64, loops, nothing of the library ----------------------------------------------------------------


def slow_statistics(vector, cohort, top):
    scores = sorted((float(vector @ other) for other in cohort), reverse=True)[:top]
    mean = sum(scores) / top
    return mean, (sum((score - mean) ** 2 for score in scores) / top) ** 0.5


def slow_template_scores(stored, probe, cohort=None, top=None):
    vectors = [np.asarray(vector, np.float64) for vector in stored.vectors]
    scores = [float(vector @ probe) for vector in vectors]
    if cohort is None:
        return scores
    mean, deviation = slow_statistics(probe, cohort, top)
    sides = [slow_statistics(vector, cohort, top) for vector in vectors]
    return [((s - mean) / deviation + (s - m) / d) / 2 for s, (m, d) in zip(scores, sides, strict=True)]


def slow_fusion(stored, scores, fusion, *, voters=5, quality=None, without=None):
    """Score of every identity from those of the templates."""
    weights = [1.0] * len(scores) if quality is None else quality
    rows = [row for row in range(len(scores)) if stored.labels[row] != without]
    if fusion == "vote":
        fused = dict.fromkeys((stored.labels[row] for row in rows), 0.0)
        for row in sorted(rows, key=lambda row: -scores[row])[:voters]:
            fused[stored.labels[row]] += max(scores[row], 0) / voters
        return fused
    fused = {}
    for name in dict.fromkeys(stored.labels[row] for row in rows):
        mine = [row for row in rows if stored.labels[row] == name]
        if fusion == "max":
            fused[name] = max(scores[row] for row in mine)
        else:
            fused[name] = sum(weights[row] * scores[row] for row in mine) / sum(weights[row] for row in mine)
    return fused


def fusion_of(gallery):
    return gallery.info()["settings"]["fusion"]


# ---- several images as one probe ------------------------------------------------------------------------------------


def test_images_of_one_probe_are_asked_as_their_mean(gallery):
    frames, _ = people(4, 3, seed=0, noise=0.6)
    names = ["b", "a", None, "b", "a", "a", None, "c", "b", "c", "c", "c"]
    quality = np.linspace(0.1, 1, 12).tolist()
    answers = gallery.identify(embeddings=frames, probes=names, quality=quality)
    groups = [[0, 3, 8], [1, 4, 5], [2], [6], [7, 9, 10, 11]]  # in order of first appearance
    assert len(answers) == len(groups)
    for rows, answer in zip(groups, answers, strict=True):
        mean = unit(sum(quality[row] * unit(frames[row].astype(np.float64)) for row in rows))
        fused = slow_fusion(gallery.embeddings(), slow_template_scores(gallery.embeddings(), mean), fusion_of(gallery))
        assert answer.score == pytest.approx(max(fused.values()), abs=1e-5)
        assert answer.best == max(fused, key=fused.get)
        claim = gallery.verify("person 3", embedding=frames[rows], quality=[quality[row] for row in rows])
        assert claim.score == pytest.approx(fused["person 3"], abs=1e-5)


def test_one_image_per_probe_is_the_same_as_no_probes(gallery):
    frames, _ = people(5, 2, seed=4)
    plain = [answer.score for answer in gallery.identify(embeddings=frames)]
    assert [answer.score for answer in gallery.identify(embeddings=frames, probes=range(10))] == plain
    assert (
        gallery.verify("person 1", embedding=frames[0]).score == gallery.verify("person 1", embedding=frames[:1]).score
    )


def test_probes_of_several_images_are_strangers_and_genuine_in_calibration(gallery):
    strangers, names = people(80, 4, kind="stranger", seed=9, noise=0.4)
    genuine, claims = people(20, 4, noise=0.4)
    visits = [row // 2 for row in range(320)] + [f"door {row // 4}" for row in range(80)]
    found = gallery.calibrate(
        embeddings=np.concatenate([strangers, genuine]), labels=names + claims, probes=visits, fpir=0.1
    )
    assert (found.strangers, found.images, found.genuine_images) == (80, 160, 20)
    answers = gallery.identify(embeddings=strangers, probes=visits[:320])
    assert sum(answer.label is not None for answer in answers) / 160 == pytest.approx(found.observed)
    right = [a.label == f"person {i}" for i, a in enumerate(gallery.identify(embeddings=genuine, probes=visits[320:]))]
    assert found.detection_rate == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"probes": ["a"]}, "1 names of probes came for 2 images"),
        ({"probes": ["a", "a"]}, "images of the probe 'a' cancel each other out"),
        ({"quality": [1, 1]}, "say by probes= which image belongs to which"),
        ({"probes": [1, 2], "quality": [1]}, "1 qualities came for 2 images"),
        ({"probes": [1, 2], "quality": [0, 1]}, "above 0 and at most 1, and 1 is the best; row 0 is 0"),
    ],
    ids=["lengths", "opposite", "no probes", "few qualities", "worthless"],
)
def test_probes_that_make_no_sense_are_explained(gallery, arguments, text):
    with pytest.raises(ValueError, match=text):
        gallery.identify(embeddings=[[1.0] * DIM, [-1.0] * DIM], **arguments)


def test_a_probe_shows_one_identity_and_at_least_one_image(gallery):
    with pytest.raises(ValueError, match="The probe 7 has images of 'x' and of 'y'"):
        gallery.calibrate(embeddings=people(2, 1)[0], labels=["x", "y"], probes=[7, 7])
    with pytest.raises(ValueError, match="one image or several of one probe, got none"):
        gallery.verify("person 1", embedding=np.zeros((0, DIM)))


# ---- quality ---------------------------------------------------------------------------------------------------------


def test_the_mean_is_weighted_by_quality_and_max_and_vote_are_not(tmp_path, gallery):
    vectors, labels = people(6, 4, noise=0.8, seed=3)
    quality = np.random.default_rng(0).uniform(0.05, 1, 24).tolist()
    fusion = fusion_of(gallery)
    with Gallery.create(tmp_path / "weighted", dim=DIM, fusion=fusion, vote_k=5) as weighted:
        weighted.enroll(embeddings=vectors[:12], labels=labels[:12], quality=quality[:12])
        weighted.enroll(embeddings=vectors[12:], labels=labels[12:], metadata={"site": "x"}, quality=quality[12:])
        kept = [note["quality"] for note in weighted.metadata().values()]
        assert kept == quality
        assert len(weighted.search(embeddings=vectors, k=1, where={"site": "x"})) == 24
        for removed in (None, "person 2"):
            if removed:
                weighted.remove(removed)
                kept = [note["quality"] for note in weighted.metadata().values()]
            stored = weighted.embeddings()
            for probe in unit(people(5, 1, seed=12)[0]):
                scores = slow_template_scores(stored, probe)
                fused = slow_fusion(stored, scores, fusion, quality=kept)
                answer = weighted.identify(embeddings=probe[None])[0]
                assert answer.score == pytest.approx(max(fused.values()), abs=1e-5)
                plain = slow_fusion(stored, scores, fusion)
                assert (fused == pytest.approx(plain, abs=1e-3)) == (fusion != "mean")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"quality": 1.5}, "above 0 and at most 1, and 1 is the best; row 0 is 1.5"),
        ({"quality": [0.5]}, "1 qualities came for 2 images"),
        ({"quality": 0.5, "metadata": {"quality": 0.5}}, "has a quality of its own"),
        ({"metadata": {"quality": "good"}}, "has the quality 'good'; under this name"),
    ],
    ids=["above one", "lengths", "twice", "a word"],
)
def test_what_is_no_quality_is_refused(gallery, arguments, text):
    before = len(gallery)
    with pytest.raises(ValueError, match=text):
        gallery.enroll(embeddings=people(2, 1)[0], labels="new", **arguments)
    assert len(gallery) == before


# ---- score normalisation ---------------------------------------------------------------------------------------------


def test_normalised_scores_equal_slow_loops(gallery):
    cohort = others(60)
    gallery.configure(normalisation="as-norm", cohort=cohort, cohort_k=15)
    stored, fusion = gallery.embeddings(), fusion_of(gallery)
    raw_best = changed = 0
    for probe in unit(people(25, 1, seed=5, noise=0)[0]):
        scores = slow_template_scores(stored, probe, cohort, 15)
        fused = slow_fusion(stored, scores, fusion)
        answer = gallery.identify(embeddings=probe[None])[0]
        assert answer.score == pytest.approx(max(fused.values()), abs=2e-4)
        assert answer.best == max(fused, key=fused.get)
        assert gallery.verify("person 4", embedding=probe).score == pytest.approx(fused["person 4"], abs=2e-4)
        assert answer.neighbours.scores.max() <= 1, "neighbours stay cosines"
        raw_best += 1
        changed += answer.best != answer.neighbours.labels[0][0]
    assert 0 < changed < raw_best, "the best identity need not be that of the nearest template"


def test_the_threshold_is_set_after_normalisation_and_fusion(gallery):
    gallery.configure(normalisation="as-norm", cohort=others(60), cohort_k=15)
    strangers, names = people(100, 2, kind="stranger", seed=9)
    found = gallery.calibrate(embeddings=strangers, labels=names, fpir=0.1)
    answers = gallery.identify(embeddings=strangers)
    assert sum(answer.label is not None for answer in answers) / 200 == pytest.approx(found.observed)
    gallery.configure(normalisation="none")
    assert gallery.calibration is None
    assert gallery.identify(embeddings=strangers[:1])[0].score <= 1


@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_removing_one_never_changes_a_decision_on_another(tmp_path, fusion):
    """The cohort is fixed, so a normalised score depends on probe, templates of one identity and cohort alone."""
    with Gallery.create(tmp_path / "g", dim=DIM, fusion=fusion) as gallery:
        vectors, labels = people(12, 3, noise=0.4)
        gallery.enroll(embeddings=vectors, labels=labels)
        gallery.configure(normalisation="as-norm", cohort=others(60), cohort_k=15)
        gallery.calibrate(embeddings=people(100, 1, seed=9)[0], fpir=0.2)
        probes = people(12, 6, noise=0.5)[0]
        for gone in [f"person {i}" for i in range(10)]:
            before = gallery.identify(embeddings=probes)
            claims = [gallery.verify("person 11", embedding=probe) for probe in probes]
            gallery.remove(gone)
            for old, new in zip(before, gallery.identify(embeddings=probes), strict=True):
                if old.best != gone:
                    assert (new.label, new.best) == (old.label, old.best)
                    assert new.score == pytest.approx(old.score, abs=1e-5)
            assert [gallery.verify("person 11", embedding=probe) for probe in probes] == claims


def test_statistics_are_computed_for_new_templates_only_and_survive_removal(gallery, monkeypatch):
    gallery.configure(normalisation="as-norm", cohort=others(60), cohort_k=15)
    probe = people(1, 1, seed=8)[0]
    gallery.identify(embeddings=probe)
    asked, real = [], Cohort.statistics
    monkeypatch.setattr(Cohort, "statistics", lambda self, v: asked.append(len(v)) or real(self, v))
    gallery.enroll(embeddings=people(2, 2, seed=31)[0], labels="new")
    gallery.remove("person 0")
    after = gallery.identify(embeddings=probe)[0].score
    assert max(asked) == 4
    with Gallery.open(gallery.folder, read_only=True) as fresh:
        assert fresh.identify(embeddings=probe)[0].score == pytest.approx(after, abs=1e-5)


def test_the_cohort_is_kept_and_readers_follow_it(gallery):
    probe = people(1, 1, seed=8)[0]
    with Gallery.open(gallery.folder, read_only=True) as reader:
        plain = reader.identify(embeddings=probe)[0].score
        seen = []
        for change in ({"normalisation": "as-norm", "cohort": others(60)}, {"cohort_k": 20}, {"cohort": others(80, 5)}):
            gallery.configure(**change)
            seen.append(gallery.identify(embeddings=probe)[0].score)
            assert reader.identify(embeddings=probe)[0].score == pytest.approx(seen[-1], abs=1e-5)
        assert len({round(score, 4) for score in [plain, *seen]}) == 4
        gallery.configure(normalisation="none")
        assert reader.identify(embeddings=probe)[0].score == pytest.approx(plain)
    assert gallery.check().ok


def test_a_cohort_is_of_others(gallery):
    cohort = Embeddings(others(60).astype(np.float32), [f"other {i}" for i in range(60)], np.arange(60))
    known = gallery.embeddings()
    mixed = Embeddings(cohort.vectors, ["person 3", *cohort.labels[1:]], cohort.ids)
    with pytest.raises(
        ValueError, match="1 identities of the cohort are among the enrolled templates, first 'person 3'"
    ):
        gallery.configure(normalisation="as-norm", cohort=mixed)
    with pytest.raises(ValueError, match="1 images of the cohort are among the enrolled templates, first in row 5"):
        gallery.configure(normalisation="as-norm", cohort=np.concatenate([others(40), 3 * known.vectors[5:6]]))
    gallery.configure(normalisation="as-norm", cohort=cohort)
    with pytest.raises(ValueError, match="1 images of the cohort are among the templates to enroll, first in row 0"):
        gallery.enroll(embeddings=cohort.vectors[7:8], labels="new")
    with pytest.raises(ValueError, match="among the templates to enroll, first 'other 3'"):
        gallery.enroll(embeddings=people(1, 1, seed=3)[0], labels="other 3")
    with pytest.raises(ValueError, match="2 images of the cohort are among the images to calibrate with"):
        gallery.calibrate(embeddings=cohort.vectors[:2])
    with pytest.raises(ValueError, match="among the images to calibrate with, first 'other 9'"):
        gallery.calibrate(embeddings=people(1, 1, seed=3)[0], labels=["other 9"])
    assert len(gallery) == len(known)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"normalisation": "z-norm"}, "normalisation is 'as-norm' or 'none'; got 'z-norm'"),
        ({"normalisation": "as-norm"}, "need both: configure"),
        ({"cohort": others(60)}, "need both: configure"),
        ({"normalisation": "as-norm", "cohort": others(10)}, "at least 20 vectors, got 10"),
        ({"normalisation": "as-norm", "cohort": others(30), "cohort_k": 31}, "from 2 to the 30 vectors"),
        ({"normalisation": "as-norm", "cohort": np.ones((30, 4))}, f"holds vectors of {DIM} numbers, got 4"),
    ],
    ids=["unknown", "no cohort", "no word", "small", "cohort_k", "dim"],
)
def test_a_cohort_that_cannot_serve_is_refused(gallery, arguments, text):
    with pytest.raises(ValueError, match=text):
        gallery.configure(**arguments)
    assert gallery.info()["settings"].get("normalisation") is None


# ---- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True], ids=["cosine", "normalised"])
def test_sub_galleries_equal_galleries_of_their_identities(tmp_path, gallery, normalised):
    """The first eighth of the first draw, enrolled alone, answers with the same scores."""
    cohort = others(60)
    if normalised:
        gallery.configure(normalisation="as-norm", cohort=cohort, cohort_k=15)
    now, kept = gallery._scoring()
    probes = unit(people(30, 1, seed=21)[0]).astype(np.float32)
    tables = sub_gallery_scores(now, probes, kept, draws=2, seed=3)
    assert {size: table.shape for size, table in tables.items()} == {
        2.5: (30, 16), 5.0: (30, 8), 10.0: (30, 4)
    }  # fmt: skip
    order = np.random.default_rng(3).permutation(20)
    starts = [(part * 20) // 8 for part in range(9)]
    stored = gallery.embeddings()
    for size, parts in [(2.5, 1), (5.0, 2), (10.0, 4)]:
        members = {now.names[code] for code in order[: starts[parts]]}
        rows = [row for row, label in enumerate(stored.labels) if label in members]
        alone = Embeddings(stored.vectors[rows], [stored.labels[row] for row in rows], stored.ids[rows])
        for probe, got in zip(probes.astype(np.float64), tables[size][:, 0], strict=True):
            scores = slow_template_scores(alone, probe, *((cohort, 15) if normalised else ()))
            assert got == pytest.approx(max(slow_fusion(alone, scores, fusion_of(gallery)).values()), abs=3e-4)


def test_a_gallery_that_outgrows_its_calibration_says_so(gallery, caplog):
    strangers, names = people(100, 2, kind="stranger", seed=9)
    plain = gallery.calibrate(embeddings=strangers, labels=names, fpir=0.1)
    assert [size for size, *_ in plain.sub_galleries] == [2.5, 5, 10, 20]
    assert plain.sub_galleries[-1][2] == pytest.approx(plain.observed)
    if fusion_of(gallery) == "vote":
        with pytest.raises(ValueError, match="growth=1.5 cannot be promised with fusion='vote'"):
            gallery.calibrate(embeddings=strangers, labels=names, fpir=0.1, growth=1.5)
        return
    grown = gallery.calibrate(embeddings=strangers, labels=names, fpir=0.1, growth=1.5)
    assert grown.growth == 1.5
    assert grown.threshold >= plain.threshold
    assert grown.observed <= plain.observed
    assert grown.bound <= plain.bound
    gallery.enroll(embeddings=people(10, 1, seed=40)[0], labels=[f"new {i}" for i in range(10)])
    fresh = gallery.identify(embeddings=strangers[:1])[0]
    assert (fresh.stale, fresh.calibrated, gallery.info()["stale"], caplog.text) == (False, True, False, "")
    gallery.enroll(embeddings=people(1, 1, seed=41)[0], labels="one too many")
    with caplog.at_level(logging.WARNING, logger="embedlab"):
        old = gallery.identify(embeddings=strangers[:2])[0]
        assert gallery.verify("person 1", embedding=strangers[0]).stale
    assert (old.stale, old.calibrated, gallery.info()["stale"]) == (True, True, True)
    assert old.to_dict()["stale"]
    assert caplog.text.count("has 31 identities, and its calibration was promised for up to 30") == 1


def test_growth_beyond_what_can_be_seen_is_refused(gallery):
    strangers = people(100, 1, seed=9)[0]
    with pytest.raises(ValueError, match="growth is from 1 to 3 times the present size, got 4"):
        gallery.calibrate(embeddings=strangers, fpir=0.1, growth=4)
    gallery.remove([f"person {i}" for i in range(5)])
    gallery.configure(fusion="mean")
    with pytest.raises(ValueError, match="growth=2 needs at least 16 enrolled identities.*this gallery has 15"):
        gallery.calibrate(embeddings=strangers, fpir=0.1, growth=2)
    assert gallery.calibrate(embeddings=strangers, fpir=0.1).sub_galleries == ()


# ---- leave-identity-out, curve, warnings -----------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True], ids=["cosine", "normalised"])
def test_leave_identity_out_removes_everyone_in_turn(gallery, normalised, caplog):
    cohort = others(60)
    if normalised:
        gallery.configure(normalisation="as-norm", cohort=cohort, cohort_k=15)
    with caplog.at_level(logging.WARNING, logger="embedlab"):
        found = gallery.calibrate(leave_identity_out=True, fpir=0.3, fmr=0.3)
    assert "calibrated on its own enrollment pictures" in caplog.text
    assert (found.source, found.strangers, found.images) == ("leave-identity-out", 20, 59)
    assert 10 <= found.effective_strangers <= 59 / 2, "they play it to one another: two count for one"
    stored, matches, alarms = gallery.embeddings(), [], []
    for probe, own in zip(stored.vectors.astype(np.float64), stored.labels, strict=True):
        scores = slow_template_scores(stored, probe, *((cohort, 15) if normalised else ()))
        fused = slow_fusion(stored, scores, fusion_of(gallery), without=own)
        weight = 1 / stored.labels.count(own) / 20
        # the threshold is one float above a score: float64 may round to the other side of it
        alarms.append(weight * (max(fused.values()) >= found.threshold + 1e-5))
        matches += [weight / 19 * (fused[name] >= found.verification_threshold + 1e-5) for name in fused]
    assert sum(alarms) == pytest.approx(found.observed)
    assert sum(matches) == pytest.approx(found.fmr_observed)
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_leave_identity_out_needs_identities_and_no_strangers(gallery):
    with pytest.raises(ValueError, match="leave_identity_out takes no images"):
        gallery.calibrate(embeddings=people(2, 1)[0], leave_identity_out=True)
    with pytest.raises(CalibrationError, match="needs 117 strangers; these 59 images show 20.* two count for one"):
        gallery.calibrate(leave_identity_out=True, fpir=0.05)
    gallery.remove([f"person {i}" for i in range(19)])
    with pytest.raises(ValueError, match="at least two enrolled identities"):
        gallery.calibrate(leave_identity_out=True, fpir=0.2)


def test_the_match_threshold_keeps_a_promise_that_few_look_alikes_would_break(tmp_path):
    """Strangers of whom all images are taken for somebody are few, however much the others' scores differ."""
    random, centre = np.random.default_rng(0), np.eye(2)[:1]
    with Gallery.create(tmp_path / "one", dim=2) as made:
        made.enroll(embeddings=centre, labels="person")
        angles = np.where(np.arange(100) < 3, 0.2, random.uniform(0.5, 3, (10, 100))).T.ravel()
        strangers = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        found = made.calibrate(embeddings=strangers, labels=[f"stranger {i // 10}" for i in range(1000)], fpir=0.05)
        assert found.effective_strangers > 200
        assert found.fmr_observed == 0, "three of a hundred strangers have an upper bound of 7.6 %"
        assert found.fmr_bound == pytest.approx(1 - 0.05**0.01)


def test_a_false_match_rate_that_the_strangers_cannot_support_is_refused(gallery):
    strangers = people(100, 1, seed=9)[0]
    with pytest.raises(CalibrationError, match=r"A false match rate of 0.001 .* 2995 strangers.* fmr >= 0.0295"):
        gallery.calibrate(embeddings=strangers, fpir=0.05, fmr=0.001)


def test_labels_that_are_no_names_are_refused(gallery):
    with pytest.raises(ValueError, match="row 1 is nan"):
        gallery.calibrate(embeddings=people(2, 1)[0], labels=["x", float("nan")])


def test_an_image_of_the_cohort_is_found_within_a_probe(gallery):
    cohort, strangers = others(30), people(60, 2, seed=9)[0]
    gallery.configure(normalisation="as-norm", cohort=cohort)
    with pytest.raises(ValueError, match="1 images of the cohort are among the images to calibrate with"):
        gallery.calibrate(
            embeddings=np.vstack([cohort[:1], strangers[1:]]), probes=[i // 2 for i in range(120)], fpir=0.05
        )


def test_a_threshold_is_set_on_exact_scores_whatever_an_index_misses(gallery):
    class Blind:
        """Proposes the first templates to everybody."""

        def serves(self, k):
            return True

        def search(self, ids, matrix, queries, k, alive):
            rows = np.tile(np.arange(k), (len(queries), 1))
            return np.einsum("qd,qkd->qk", queries, matrix[rows]), rows

    strangers = people(100, 1, seed=9)[0].astype(np.float32)
    exact = gallery.calibrate(embeddings=strangers, fpir=0.05)
    gallery._current = gallery._current.indexed(Blind())
    assert gallery.calibrate(embeddings=strangers, fpir=0.05) == exact


def test_of_many_identities_some_play_the_stranger(gallery, monkeypatch):
    monkeypatch.setattr("embedlab.retrieval.promise.MOST_LEFT_OUT", 7)
    strangers = left_out(gallery._now())
    assert len(set(strangers.names)) == 7
    assert len(strangers.vectors) in (20, 21)


def test_the_operating_curve_is_kept_and_is_what_the_gallery_does(gallery):
    strangers, names = people(100, 3, kind="stranger", seed=9)
    genuine, claims = people(20, 2, noise=0.4)
    gallery.calibrate(embeddings=np.concatenate([strangers, genuine]), labels=names + claims, fpir=0.1)
    with Gallery.open(gallery.folder, read_only=True) as again:
        curve = again.calibration.curve
    assert 20 <= len(curve) <= 100
    thresholds, rates, bounds, detected = map(list, zip(*curve, strict=True))
    assert thresholds == sorted(thresholds, reverse=True)
    assert rates == sorted(rates)
    assert detected == sorted(detected)
    assert rates[-1] == pytest.approx(1)
    assert all(rate <= bound + 1e-4 for rate, bound in zip(rates, bounds, strict=True))
    scores = np.array([answer.score for answer in gallery.identify(embeddings=strangers)])
    right = np.array([a.best == c for a, c in zip(gallery.identify(embeddings=genuine), claims, strict=True)])
    own = np.array([answer.score for answer in gallery.identify(embeddings=genuine)])
    for limit, rate, _, detection in curve[::10]:
        assert (scores >= limit - 1e-6).mean() == pytest.approx(rate, abs=1e-4)
        assert (right & (own >= limit - 1e-6)).mean() == pytest.approx(detection, abs=1e-4)


def test_older_calibrations_are_read(gallery):
    found = gallery.calibrate(embeddings=people(100, 1, seed=9)[0], fpir=0.1).to_dict()
    for name in ("curve", "sub_galleries", "growth", "source"):
        del found[name]
    read = Calibration.from_dict(found | {"of a newer release": 1})
    assert (read.growth, read.source, read.curve, read.is_stale(20), read.is_stale(21)) == (
        1.0, "strangers", (), False, True
    )  # fmt: skip


def test_identities_that_the_encoder_was_trained_on_are_named(gallery, caplog):
    class Trained:
        def trained_on(self, label):
            return label in ("stranger 4", "stranger 7", "person 2")

    gallery._embedder = Trained()
    strangers, names = people(100, 2, kind="stranger", seed=9)
    genuine, claims = people(20, 1)
    with caplog.at_level(logging.WARNING, logger="embedlab"):
        gallery.calibrate(embeddings=strangers[100:], labels=names[100:], fpir=0.1)
        assert caplog.text == ""
        gallery.calibrate(embeddings=np.concatenate([strangers, genuine]), labels=names + claims, fpir=0.1)
    assert (
        "was trained on 3 of the identities to calibrate with (2 of them strangers), first 'stranger 4'" in caplog.text
    )


# ---- from the command line -------------------------------------------------------------------------------------------


def test_one_probe_growth_and_leave_identity_out_from_the_command_line(gallery, tmp_path, capsys):
    folder, stored = str(gallery.folder), gallery.embeddings()
    gallery.configure(fusion="max")
    gallery.close()
    np.save(tmp_path / "frames.npy", people(20, 3)[0][9:12])
    np.save(tmp_path / "strangers.npy", people(100, 1, seed=9)[0])

    def ask(*arguments, code=0):
        assert main(["gallery", *arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out) if code == 0 else capsys.readouterr().err

    promised = ask("calibrate", folder, str(tmp_path / "strangers.npy"), "--fpir", "0.1", "--growth", "2")
    assert (promised["growth"], promised["source"]) == (2.0, "strangers")
    own = ask("calibrate", folder, "--leave-identity-out", "--fpir", "0.3")
    assert (own["source"], own["images"]) == ("leave-identity-out", len(stored))
    assert "either PATH with strangers or --leave-identity-out" in ask("calibrate", folder, code=1)
    mean = unit(unit(people(20, 3)[0][9:12]).sum(axis=0))
    best = max(float(vector @ mean) for vector in stored.vectors)
    found = ask("identify", folder, str(tmp_path / "frames.npy"), "--one-probe")["results"]
    assert [row["score"] for row in found] == [pytest.approx(best, abs=1e-5)]
    claim = ask("verify", folder, str(tmp_path / "frames.npy"), "--label", found[0]["best"], "--one-probe")["results"]
    assert [row["score"] for row in claim] == [pytest.approx(best, abs=1e-5)]
