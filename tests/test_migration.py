"""Another encoder under a gallery: what is carried over, what is refused, and what a kill leaves."""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedlab import Gallery, _durable
from embedlab.cli import main
from embedlab.data import open_source
from embedlab.encoders import Encoder, Pixels
from embedlab.retrieval import (
    CalibrationError,
    CallableEmbedder,
    GalleryError,
    GalleryLocked,
    Recalibration,
    migrate,
    migration,
    store,
)

PEOPLE, SHOTS, STRANGERS = 6, 3, 70


def coarse(images):
    """(B, 3, 8, 8) to (B, 48)."""
    images = np.asarray(images, np.float64)
    return images.reshape(len(images), 3, 4, 2, 4, 2).mean(axis=(3, 5)).reshape(len(images), -1) - 127.5


OLD = CallableEmbedder(coarse, image_size=8, fingerprint="coarse 1")
NEW = CallableEmbedder(lambda images: coarse(images)[:, :20], image_size=8, fingerprint="coarse 2")


def picture(person, shot):
    pattern = np.random.default_rng(person).integers(0, 256, (8, 8, 3))
    noise = np.random.default_rng([person, shot]).normal(0, 20, (8, 8, 3))
    return Image.fromarray(np.clip(pattern + noise, 0, 255).astype(np.uint8))


def write(folder, people, shots):
    for person in people:
        (folder / f"p{person:03d}").mkdir(parents=True, exist_ok=True)
        for shot in range(shots):
            picture(person, shot).save(folder / f"p{person:03d}" / f"{shot}.png")
    return open_source(str(folder))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    place = tmp_path_factory.mktemp("images")
    return {
        "people": write(place / "people", range(PEOPLE), SHOTS),
        "strangers": write(place / "strangers", range(1000, 1000 + STRANGERS), 1),
        "cohort": write(place / "cohort", range(2000, 2040), 1),
    }


@pytest.fixture
def door(images, tmp_path):
    """A gallery with everything in it: gaps in its ids, metadata, thumbnails, requests, a threshold."""
    people = tmp_path / "people"
    shutil.copytree(Path(images["people"].names[0]).parents[1], people)
    source = open_source(str(people))
    with Gallery.create(tmp_path / "door", OLD, thumbnails=True, vote_k=7) as gallery:
        gallery.enroll(source.names, labels=source.labels, key="first")
        gallery.enroll(
            source.names[:2], labels="twice", metadata=[{"site": "é"}, {"site": "b"}], quality=[0.5, 1.0], key="2"
        )
        gallery.remove(ids=[2, PEOPLE * SHOTS + 2])  # the last id of all is among them
        gallery.calibrate(images["strangers"].names, fpir=0.05, fmr=0.1)
    return tmp_path / "door"


def held(gallery):
    """All that must stay, by id."""
    stored, notes = gallery.embeddings(), gallery.metadata()
    return {
        key: (label, notes[key], gallery.thumbnail(key))
        for key, label in zip(stored.ids.tolist(), stored.labels, strict=True)
    }


def with_strangers(images):
    return Recalibration(strangers=images["strangers"])


def test_everything_but_the_vectors_stays(door, images):
    with Gallery.open(door, OLD) as gallery:
        before, old = held(gallery), gallery.calibration
        names = images["people"].names
    report = migrate(door, NEW, recalibration=with_strangers(images), probes=images["people"], old_embedder=OLD)
    assert (report.switched, report.templates, report.dropped) == (True, len(before), ())
    with Gallery.open(door, NEW) as gallery:
        assert held(gallery) == before
        assert gallery.check().ok
        assert (gallery.dim, gallery.fingerprint) == (20, "coarse 2")
        assert gallery.info()["settings"]["vote_k"] == 7
        stored = gallery.embeddings()
        for key, vector in zip(stored.ids.tolist(), stored.vectors, strict=True):
            found = NEW.embed([before[key][1]["path"]]).vectors[0]
            np.testing.assert_allclose(vector, found / np.linalg.norm(found), atol=1e-6)
        found = gallery.calibration
        assert (found.fpir, found.fmr, found.strangers) == (0.05, 0.1, STRANGERS)
        assert found.threshold != old.threshold
        assert report.calibration["threshold"] == found.threshold
        again = gallery.enroll(names[: PEOPLE * SHOTS], labels=images["people"].labels, key="first")
        assert again.tolist() == list(range(1, PEOPLE * SHOTS + 1))  # the requests are known
        assert gallery.enroll(names[0], labels="x").tolist() == [PEOPLE * SHOTS + 3]  # no id comes again
    with Gallery.open(report.backup, OLD) as gallery:
        assert held(gallery) == before
        assert gallery.calibration == old
        assert gallery.check().ok
    assert sorted(path.name for path in door.parent.iterdir()) == ["door", "door.before-migration", "people"]
    with pytest.raises(ValueError, match=r"has the encoder coarse 2 already|before-migration is there already"):
        migrate(door, NEW)


def test_both_answers_stand_side_by_side(door, images):
    """Against loops over both galleries."""
    blind = CallableEmbedder(lambda images: coarse(images)[:, :2] + 5, image_size=8, fingerprint="nearly blind")
    with Gallery.open(door, OLD) as gallery:
        stored = {"old": gallery.embeddings()}
    report = migrate(door, blind, recalibration=with_strangers(images), probes=images["people"], old_embedder=OLD)
    with Gallery.open(door, blind) as gallery:
        stored["new"] = gallery.embeddings()
        named = np.mean([answer.label is not None for answer in gallery.identify(images["people"].names)])
    best, scores = {}, {}
    for side, rows in stored.items():
        table = rows.vectors.astype(np.float64) @ rows.vectors.astype(np.float64).T
        np.fill_diagonal(table, -2)
        best[side], scores[side] = [rows.labels[i] for i in table.argmax(1)], table.max(1)
    own = stored["old"].labels
    able = [i for i, label in enumerate(own) if own.count(label) > 1]
    one = report.comparisons[0]
    assert (one.what, one.images) == ("stored images", len(own))
    assert one.agreement == np.mean([a == b for a, b in zip(best["old"], best["new"], strict=True)]) < 1
    assert one.old_right == np.mean([best["old"][i] == own[i] for i in able])
    assert one.new_right == np.mean([best["new"][i] == own[i] for i in able])
    assert one.lost == sum(best["old"][i] == own[i] != best["new"][i] for i in able) > 0
    assert (one.old_score, one.new_score) == pytest.approx((scores["old"].mean(), scores["new"].mean()), abs=1e-5)
    assert len(one.changes) == min(20, sum(a != b for a, b in zip(best["old"], best["new"], strict=True)))
    probes = report.comparisons[1]
    assert (probes.what, probes.images, probes.old_right) == ("probes", PEOPLE * SHOTS, 1)
    assert probes.new_named == named
    text = report.to_text()
    assert "stored images" in text
    assert f"(+{one.gained}, -{one.lost})" in text
    assert "nearly blind" in text
    told = json.loads(json.dumps(report.to_dict()))
    assert json.loads(json.dumps(migration.Migration.from_dict(told).to_dict())) == told
    assert migration.Migration.from_dict(told).to_text() == text


# ---- refusals ------------------------------------------------------------------------------------------------------


def unchanged(door):
    with Gallery.open(door, OLD) as gallery:
        return held(gallery), gallery.calibration, gallery.check().ok


def test_missing_and_unreadable_images_are_named_or_dropped_on_request(door, images, caplog):
    before = unchanged(door)
    people = door.parent / "people"
    shutil.rmtree(people / "p003")
    with Gallery.open(door, OLD) as gallery:
        extra = gallery.enroll(np.zeros((1, 3, 8, 8), np.uint8) + 9, labels="from a camera")[0]
        before = (held(gallery), *before[1:])
    wanted = with_strangers(images)
    with pytest.raises(ValueError, match=r"4 of 19 templates have no image file") as refused:
        migrate(door, NEW, recalibration=wanted, old_embedder=OLD)
    assert f"template 10 of 'p003': the file is missing: {people}/p003/0.png" in str(refused.value)
    assert f"template {extra} of 'from a camera': no path is stored" in str(refused.value)
    assert "--drop-missing" in str(refused.value)
    (people / "p005" / "1.png").write_bytes(b"no image")
    shutil.copytree(people / "p004", people / "p003")
    with Gallery.open(door, OLD) as gallery:
        gallery.remove(ids=[extra])
    with pytest.raises(ValueError, match=r"1 of 18 templates have no .*\n  template 17 of 'p005': .*1.png"):
        migrate(door, NEW, recalibration=wanted, old_embedder=OLD)
    shutil.rmtree(people / "p003")
    with Gallery.open(door, OLD) as gallery:
        expected = {key: row for key, row in held(gallery).items() if row[0] != "p003" and key != 17}
    report = migrate(door, NEW, recalibration=wanted, drop=True, old_embedder=OLD)
    assert [one.id for one in report.dropped] == [10, 11, 12, 17]
    assert report.gone == ("p003",)
    assert "left out: 4 templates, first template 10 of 'p003'" in report.to_text()
    with Gallery.open(door, NEW) as gallery:
        assert held(gallery) == expected


def test_what_would_break_the_promise_is_refused(door, images):
    before = unchanged(door)
    with pytest.raises(ValueError, match=r"is calibrated, .* at least as many as before \(70 for 5\.00%\)"):
        migrate(door, NEW, old_embedder=OLD)
    few = Recalibration(strangers=images["strangers"].names[:20])
    with pytest.raises(CalibrationError):
        migrate(door, NEW, recalibration=few, old_embedder=OLD)
    with pytest.raises(ValueError, match="has the encoder coarse 1 already"):
        migrate(door, OLD, old_embedder=OLD)
    with pytest.raises(ValueError, match="to another place .*, or to both; got neither"):
        migrate(door)
    with Gallery.open(door, OLD), pytest.raises(GalleryLocked, match="open for writing"):
        migrate(door, NEW, old_embedder=OLD)
    assert unchanged(door) == before


def test_a_cohort_is_asked_for_and_made_anew(door, images):
    with Gallery.open(door, OLD) as gallery:
        wanted = Recalibration(strangers=images["strangers"], fpir=0.05)
        gallery.configure(normalisation="as-norm", cohort=images["cohort"].names, cohort_k=15)
    with pytest.raises(
        ValueError, match=r"keeps vectors but no images: pass the cohort's images \(cohort=, --cohort\)"
    ):
        migrate(door, NEW)
    report = migrate(door, NEW, cohort=images["cohort"].names, recalibration=wanted)
    with Gallery.open(door, NEW) as gallery:
        assert gallery.info()["settings"]["normalisation"]["cohort_k"] == 15
        assert gallery.calibration.threshold == report.calibration["threshold"]


def test_leave_identity_out_is_repeated(tmp_path, images):
    source = images["strangers"]
    with Gallery.create(tmp_path / "g", OLD) as gallery:
        gallery.enroll(source.names, labels=source.labels)
        gallery.calibrate(leave_identity_out=True, fpir=0.1)
    assert migrate(tmp_path / "g", NEW).calibration["source"] == "leave-identity-out"


# ---- readers, writers, other files -----------------------------------------------------------------------------------


def test_who_reads_the_old_gallery_is_told_and_never_answered(door, images):
    probe = images["people"].names[-1:]
    with Gallery.open(door, OLD, read_only=True) as reader:
        assert reader.identify(probe)[0].label == "p005"
        migrate(door, NEW, recalibration=with_strangers(images))
        for ask in (lambda: reader.identify(probe), reader.labels, lambda: reader.search(probe)):
            with pytest.raises(GalleryError, match="Another gallery stands in .* open it again"):
                ask()
    with Gallery.open(door, NEW, read_only=True) as reader:
        assert reader.identify(probe)[0].label == "p005"


def test_nobody_else_writes_between_the_first_image_and_the_swap(door, images, monkeypatch):
    wanted, turned_away = with_strangers(images), []

    def first(name):
        call = getattr(migration, name)

        def act(*arguments):
            for attempt in (lambda: Gallery.open(door), lambda: migrate(door, NEW, recalibration=wanted)):
                with pytest.raises(GalleryLocked, match=rf"door is open for writing in process {os.getpid()} on "):
                    attempt()
            turned_away.append(name)
            return call(*arguments)

        return act

    for name in ("_embedded", "exchange"):
        monkeypatch.setattr(migration, name, first(name))
    assert migrate(door, NEW, recalibration=wanted).switched
    assert set(turned_away) == {"_embedded", "exchange"}
    with Gallery.open(door, NEW) as gallery:
        assert len(gallery) == PEOPLE * SHOTS


def test_a_writer_that_comes_as_the_folders_swap_locks_the_new_gallery(door, images, monkeypatch):
    wanted, lock = with_strangers(images), store._lock_file

    def late(handle):  # the lock file of the old gallery is open by now
        monkeypatch.setattr(store, "_lock_file", lock)
        migrate(door, NEW, recalibration=wanted)
        lock(handle)

    monkeypatch.setattr(store, "_lock_file", late)
    with Gallery.open(door, NEW) as gallery:
        assert gallery.fingerprint == "coarse 2"
        with pytest.raises(GalleryLocked, match="door is open for writing"):
            Gallery.open(door)
        Gallery.open(door.with_name("door.before-migration"), OLD).close()


def test_other_files_in_the_folder_come_along(door, images):
    (door / "inbox.db").write_bytes(b"strangers")
    report = migrate(door, NEW, recalibration=with_strangers(images))
    assert (door / "inbox.db").read_bytes() == b"strangers"
    assert not (Path(report.backup) / "inbox.db").exists()


def test_an_inbox_follows_the_new_encoder(door, images):
    from embedlab.serving.inbox import Inbox

    wanted = with_strangers(images)
    probes = [np.asarray(picture(person, shot)).transpose(2, 0, 1) for person in (500, 501) for shot in range(2)]
    with Gallery.open(door, OLD) as gallery:
        inbox = Inbox(door, 7)
        inbox.follow(gallery)
        for probe in probes:
            inbox.keep(probe, gallery.embed(probe[None]).vectors)
        inbox.close()
    migrate(door, NEW, recalibration=wanted)
    with Gallery.open(door, NEW) as gallery:
        inbox = Inbox(door, 7)
        inbox.follow(gallery)
        rows = inbox._database.execute("SELECT vector FROM probe ORDER BY id").fetchall()
        for (blob,), probe in zip(rows, probes, strict=True):
            np.testing.assert_array_equal(np.frombuffer(blob, "<f4"), NEW.embed(probe[None]).vectors[0])
        inbox.keep(probes[0], gallery.embed(probes[0][None]).vectors)
        assert sorted(len(cluster.ids) for cluster in inbox.clusters(0.5)) == [2, 3]
        inbox.close()


# ---- elsewhere -----------------------------------------------------------------------------------------------------


def test_a_gallery_moves_as_it_is_or_with_another_encoder(door, images, tmp_path):
    before = unchanged(door)
    report = migrate(door, to=tmp_path / "moved", old_embedder=OLD)
    assert (report.switched, report.backup, report.gallery) == (False, None, str(tmp_path / "moved"))
    with Gallery.open(tmp_path / "moved", OLD) as gallery, Gallery.open(door, OLD, read_only=True) as old:
        assert (held(gallery), gallery.calibration, gallery.check().ok) == before
        np.testing.assert_array_equal(gallery.embeddings().vectors, old.embeddings().vectors)
    migrate(door, NEW, to=tmp_path / "new", recalibration=with_strangers(images))
    with Gallery.open(tmp_path / "new", NEW) as gallery:
        assert held(gallery) == before[0]
    assert unchanged(door) == before
    with pytest.raises(ValueError, match="moved is already a gallery"):
        migrate(door, to=tmp_path / "moved", old_embedder=OLD)
    assert not list(tmp_path.glob("*.migrating"))


@pytest.mark.skipif(find_spec("milvus_lite") is None, reason="MILVUS LITE ABSENT: pip install 'embedlab[milvus]'")
@pytest.mark.filterwarnings("ignore")
def test_a_gallery_moves_to_milvus_with_ids_requests_and_threshold(door, images, tmp_path, caplog):
    before = unchanged(door)
    place = f"milvus:{tmp_path / 'door.db'}"
    report = migrate(door, to=place, old_embedder=OLD)
    assert "thumbnails of" in caplog.text
    assert (report.gallery, report.switched, report.templates) == (place, False, len(before[0]))
    with Gallery.open(place, OLD) as gallery, Gallery.open(door, OLD, read_only=True) as old:
        assert {key: row[:2] for key, row in held(gallery).items()} == {key: row[:2] for key, row in before[0].items()}
        assert gallery.calibration == before[1]
        people = images["people"]
        asked = people.names[SHOTS:]  # the first person is enrolled twice
        for got, want in zip(gallery.identify(asked), old.identify(asked), strict=True):
            assert (got.label, round(got.score, 4)) == (want.label, round(want.score, 4))
        again = gallery.enroll(people.names, labels=people.labels, key="first")
        assert again.tolist() == list(range(1, PEOPLE * SHOTS + 1))
        assert gallery.enroll(people.names[0], labels="x").tolist() == [PEOPLE * SHOTS + 3]
    assert unchanged(door) == before
    assert not (tmp_path / "door.migrating").exists()


# ---- cut off -------------------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(door, images, monkeypatch):
    monkeypatch.setattr(migration, "AT_ONCE", 4)
    embed, parts = migration._embedded, []

    def dying(made, paths):
        parts.append(len(paths))
        if len(parts) == 3:
            raise KeyboardInterrupt
        return embed(made, paths)

    monkeypatch.setattr(migration, "_embedded", dying)
    before, wanted = unchanged(door), with_strangers(images)
    with pytest.raises(KeyboardInterrupt):
        migrate(door, NEW, recalibration=wanted)
    assert unchanged(door) == before
    report = migrate(door, NEW, recalibration=wanted, switch=False)
    assert parts == [4, 4, 4, 4, 4, 2]  # the first two are not embedded again
    assert not report.switched
    assert unchanged(door) == before
    with Gallery.open(door, OLD) as gallery:  # a change in between: what was made is worth nothing
        gallery.remove(ids=[1])
    assert migrate(door, NEW, recalibration=wanted).templates == len(before[0]) - 1
    with Gallery.open(door, NEW) as gallery:
        expected = {key: row for key, row in before[0].items() if key != 1}
        assert held(gallery) == expected


def killed_at(door, step, swaps):
    """A child that migrates and dies at its n-th call that changes names or syncs; whether it died."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = [step]

    def dying(call):
        def act(*arguments, **options):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return call(*arguments, **options)

        return act

    for module, names in ((os, ("rename", "link", "unlink", "fsync", "replace", "rmdir")), (shutil, ("rmtree",))):
        for name in names:
            setattr(module, name, dying(getattr(module, name)))
    _durable._swapped = dying(_durable._swapped) if swaps else lambda *_: False
    code = 1
    try:
        migrate(door, NEW, recalibration=Recalibration(strangers=STRANGER_PATHS[0]), progress=False)
        code = 0
    finally:
        os._exit(code)


STRANGER_PATHS = [None]


def die_everywhere(door, images, tmp_path, *, swaps, first=0, stride=1):
    """Die before the first call, another one, ...; returns how often, until a run comes to its end."""
    STRANGER_PATHS[0] = images["strangers"].names
    (door / "inbox.db").write_bytes(b"strangers")
    before, deaths, seen = unchanged(door)[0], 0, set()
    for step in range(first, 1000, stride):
        place = tmp_path / f"at-{step}"
        shutil.copytree(door, place / "door")
        died = killed_at(place / "door", step, swaps)
        if swaps or (place / "door").exists():  # by three renames it may be away, until the next run
            with Gallery.open(place / "door") as gallery:
                seen.add(gallery.fingerprint)
                assert held(gallery) == before
                assert gallery.check().ok
                assert gallery.calibration is not None
                assert gallery.dim == {"coarse 1": 48, "coarse 2": 20}[gallery.fingerprint]
            assert (place / "door" / "inbox.db").read_bytes() == b"strangers"
        if died:
            try:
                migrate(place / "door", NEW, recalibration=with_strangers(images), progress=False)
            except ValueError as error:  # nothing was left to do
                assert "has the encoder coarse 2 already" in str(error)  # noqa: PT017
        with Gallery.open(place / "door", NEW) as gallery:
            assert held(gallery) == before
            assert gallery.check().ok
        with Gallery.open(place / "door.before-migration", OLD) as gallery:
            assert held(gallery) == before
        assert (place / "door" / "inbox.db").read_bytes() == b"strangers"
        left = sorted(path.name for path in place.iterdir() if not path.name.startswith(".door.migrating.new-"))
        assert left == ["door", "door.before-migration"]
        shutil.rmtree(place)
        if not died:
            break
        deaths += 1
    assert seen >= {"coarse 2"}
    return deaths


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.full)], ids=["short", "full"])
@pytest.mark.parametrize("swaps", [True, False], ids=["one step", "three renames"])
def test_dying_at_any_moment_leaves_one_whole_gallery(door, images, tmp_path, swaps, stride):
    deaths = die_everywhere(door, images, tmp_path, swaps=swaps, stride=stride)
    print(f"\n{deaths} deaths, each before another call that renames, links, deletes or syncs: one whole gallery each")
    assert deaths > 20 / stride


def test_a_swap_that_is_not_repaired_is_found(door, images, tmp_path, monkeypatch):
    monkeypatch.setattr(migration, "finish_exchange", lambda *_: None)
    with pytest.raises((GalleryError, FileNotFoundError)):
        die_everywhere(door, images, tmp_path, swaps=False, first=22)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_migrates_between_encoders(tmp_path, images, capsys):
    people, strangers = (str(Path(images[name].names[0]).parents[1]) for name in ("people", "strangers"))
    for name, size in (("small", 4), ("large", 8)):
        Encoder(Pixels(size), image_size=size).save(tmp_path / name)
    door = str(tmp_path / "door")
    assert main(["gallery", "create", door, "--encoder", str(tmp_path / "small")]) == 0
    assert main(["gallery", "enroll", door, people]) == 0
    assert main(["gallery", "calibrate", door, strangers, "--fpir", "0.05"]) == 0
    capsys.readouterr()
    command = ["gallery", "migrate", door, "--encoder", str(tmp_path / "large")]
    assert main(command) == 1
    assert "pass images of strangers (--strangers PATH)" in capsys.readouterr().err
    command += ["--strangers", strangers, "--probes", people]
    assert main([*command, "--no-switch"]) == 0
    assert "the old gallery is as it was" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["switched"], found["old_dim"], found["new_dim"]) == (True, 48, 192)
    assert [one["what"] for one in found["comparisons"]] == ["stored images", "probes"]
    assert main(["gallery", "identify", door, people]) == 0
    assert "detection rate       1.000" in capsys.readouterr().out


def test_the_swap_is_one_system_call_here(tmp_path):
    (tmp_path / "a" / "x").mkdir(parents=True)
    (tmp_path / "b" / "y").mkdir(parents=True)
    if sys.platform == "linux":
        assert _durable._swapped(tmp_path / "a", tmp_path / "b")
        assert os.listdir(tmp_path / "a") == ["y"]
