"""The gallery: what it answers, what it keeps, and what it refuses."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from embedlab import Embeddings, Gallery
from embedlab.retrieval import CalibrationError, CallableEmbedder, GalleryDamaged, GalleryError, GalleryLocked
from embedlab.retrieval.store import Contents, Meta


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def people(identities=20, templates=3, dim=16, noise=0.15, seed=0):
    """Vectors around one random direction per identity, with their labels."""
    generator = np.random.default_rng(seed)
    centres = unit(generator.standard_normal((identities, dim)))
    labels = [f"person {i}" for i in range(identities) for _ in range(templates)]
    return np.repeat(centres, templates, axis=0) + noise * generator.standard_normal((len(labels), dim)), labels


def strangers(identities=100, images=4, dim=16, seed=99):
    vectors, labels = people(identities, images, dim, seed=seed)
    return vectors, [label.replace("person", "stranger") for label in labels]


@pytest.fixture
def gallery(tmp_path):
    with Gallery.create(tmp_path / "gallery", dim=16) as made:
        vectors, labels = people()
        made.enroll(embeddings=vectors, labels=labels)
        yield made


def pixels(images):
    """An embedder that needs no network: coarse pixels."""
    images = np.asarray(images, np.float32)
    return (
        images.reshape(len(images), images.shape[1], 2, images.shape[2] // 2, -1)
        .mean(axis=(3, 4))
        .reshape(len(images), -1)
    )


# ---- answers -------------------------------------------------------------------------------------------------------


def test_search_equals_a_float64_sort(gallery):
    queries = np.random.default_rng(1).standard_normal((30, 16)) * 7
    stored = gallery.embeddings()
    cosines = unit(queries) @ unit(stored.vectors.astype(np.float64)).T
    got = gallery.search(embeddings=queries, k=5)
    order = np.argsort(-cosines, axis=1)[:, :5]
    np.testing.assert_array_equal(got.ids, stored.ids[order])
    np.testing.assert_allclose(got.scores, np.take_along_axis(cosines, order, 1), atol=1e-6)
    assert got.labels == [[stored.labels[i] for i in row] for row in order]


def test_more_neighbours_than_templates_are_padded(tmp_path):
    with Gallery.create(tmp_path / "g", dim=2) as gallery:
        assert gallery.search(embeddings=[[1, 0]], k=2).labels == [[None, None]]
        empty = gallery.identify(embeddings=[[1, 0]])[0]
        assert (empty.label, empty.best, empty.threshold, empty.calibrated) == (None, None, None, False)
        assert empty.to_dict()["score"] is None
        gallery.enroll(embeddings=[[1, 0]], labels=["a"])
        near = gallery.search(embeddings=[[1, 1]], k=3)
        assert near.ids.tolist() == [[1, -1, -1]]
        assert near.labels == [["a", None, None]]
        np.testing.assert_allclose(near.scores, [[2**-0.5, np.nan, np.nan]], rtol=1e-6)
        assert len(gallery.search(embeddings=np.zeros((0, 2)), k=3)) == 0


def test_where_looks_at_metadata(tmp_path):
    with Gallery.create(tmp_path / "g", dim=2) as gallery:
        notes = [{"site": "north", "year": 2020}, {"site": "south"}, None]
        gallery.enroll(embeddings=[[1, 0], [1, 0.1], [1, 0.2]], labels=["a", "b", "c"], metadata=notes)
        assert gallery.search(embeddings=[[1, 0]], k=3, where={"site": "south"}).labels == [["b", None, None]]
        assert gallery.search(embeddings=[[1, 0]], k=1, where={"site": "north", "year": 2020}).labels == [["a"]]
        assert gallery.search(embeddings=[[1, 0]], k=1, where={"site": "west"}).labels == [[None]]


def slow_fusion(stored, query, fusion, vote_k):
    """Score of every identity, in loops."""
    cosines = {}
    ranked = sorted(
        ((float(v @ query), label) for v, label in zip(stored.vectors, stored.labels, strict=True)), reverse=True
    )
    for score, label in ranked[:vote_k] if fusion == "vote" else ranked:
        cosines.setdefault(label, []).append(score)
    rule = {"max": max, "mean": lambda s: sum(s) / len(s), "vote": lambda s: sum(max(x, 0) for x in s) / vote_k}[fusion]
    return {label: rule(scores) for label, scores in cosines.items()}


@pytest.mark.parametrize("fusion", ["max", "mean", "vote"])
def test_identify_verify_and_calibrate_equal_slow_fusion(tmp_path, fusion):
    with Gallery.create(tmp_path / "g", dim=16, fusion=fusion, vote_k=7) as gallery:
        vectors, labels = people(noise=0.5)
        gallery.enroll(embeddings=vectors[:-1], labels=labels[:-1])  # one identity has fewer templates
        others, names = strangers()
        probes, claims = people(noise=0.5, seed=0)
        found = gallery.calibrate(
            embeddings=np.concatenate([others, probes]), labels=names + claims, fpir=0.05, fmr=0.04
        )
        stored = gallery.embeddings()
        tables = [slow_fusion(stored, query, fusion, 7) for query in unit(others)]
        for table, answer in zip(tables, gallery.identify(embeddings=others), strict=True):
            best = max(table, key=table.get)
            assert answer.score == pytest.approx(table[best], abs=1e-5)
            assert answer.best == best
            assert answer.label == (best if answer.score >= found.threshold else None)
        assert gallery.verify("person 3", embedding=others[0]).score == pytest.approx(
            tables[0].get("person 3", 0.0), abs=1e-5
        )
        false_alarms = np.array([max(table.values()) >= found.threshold for table in tables])
        assert false_alarms.mean() == pytest.approx(found.observed)
        matches = sum(score >= found.verification_threshold for table in tables for score in table.values())
        assert matches / (len(tables) * 20) == pytest.approx(found.fmr_observed)
        assert found.observed <= found.bound <= 0.05
        assert 0 < found.fmr_observed <= found.fmr_bound <= 0.04
        right = [a.label == c for a, c in zip(gallery.identify(embeddings=probes), claims, strict=True)]
        assert found.detection_rate == pytest.approx(np.mean(right))
        accepted = [gallery.verify(c, embedding=p).accepted for p, c in zip(probes, claims, strict=True)]
        assert found.true_accept_rate == pytest.approx(np.mean(accepted))


def test_strangers_to_come_stay_unknown_as_promised(gallery):
    promise = gallery.calibrate(embeddings=strangers()[0], labels=strangers()[1], fpir=0.05)
    answers = gallery.identify(embeddings=strangers(500, 2, seed=7)[0])
    assert np.mean([answer.label is not None for answer in answers]) <= promise.fpir
    known = gallery.identify(embeddings=people(seed=0, noise=0.1)[0])
    assert np.mean([a.label == label for a, label in zip(known, people()[1], strict=True)]) > 0.9


def test_before_calibration_nothing_is_decided_but_the_best_guess_is_there(gallery):
    answer = gallery.identify(embeddings=people()[0][:1], k=2)[0]
    assert (answer.label, answer.threshold, answer.calibrated) == (None, None, False)
    assert answer.neighbours.labels[0][0] == "person 0"
    assert gallery.verify("person 0", embedding=people()[0][0]).accepted is None
    assert json.loads(json.dumps(answer.to_dict()))["neighbours"][0]["label"] == "person 0"


def test_calibration_survives_reopening_and_growth_shows(gallery):
    found = gallery.calibrate(embeddings=strangers()[0], labels=strangers()[1], fpir=0.05)
    gallery.enroll(embeddings=strangers(10, 1, seed=5)[0], labels=[f"new {i}" for i in range(10)])
    gallery.close()
    with Gallery.open(gallery.folder) as again:
        assert again.calibration == found
        assert (again.calibration.gallery_identities, again.info()["growth"]) == (20, 1.5)
        again.configure(fusion="max")  # no change
        assert again.calibration == found
        again.configure(fusion="mean")
        assert again.calibration is None
        assert again.info()["settings"] == {"fusion": "mean", "vote_k": 10}


def test_removing_an_identity_makes_it_unknown_and_enrolling_brings_it_back(gallery):
    gallery.calibrate(embeddings=strangers()[0], labels=strangers()[1], fpir=0.05)
    vectors = people()[0]
    assert gallery.remove("person 4") == 3
    assert all(answer.label is None for answer in gallery.identify(embeddings=vectors[12:15]))
    gallery.enroll(embeddings=vectors[12:15], labels="person 4")
    assert all(answer.label == "person 4" for answer in gallery.identify(embeddings=vectors[12:15]))


# ---- changes -------------------------------------------------------------------------------------------------------


def test_rename_merge_counts(gallery):
    assert gallery.rename("person 1", "Ada") == 3
    assert gallery.merge("person 2", "Ada") == 3
    assert gallery.counts()["Ada"] == 6
    assert "person 1" not in gallery
    assert len(gallery.labels()) == 19
    with pytest.raises(ValueError, match=r"'Ada' is enrolled already; merge"):
        gallery.rename("person 3", "Ada")
    with pytest.raises(ValueError, match="1 of 1 labels are not in the gallery: 'nobody'"):
        gallery.merge("Ada", "nobody")
    with pytest.raises(ValueError, match="into itself"):
        gallery.merge("Ada", "Ada")
    assert gallery.check().ok


def test_a_key_enrolls_once(gallery):
    vectors, labels = strangers(2, 2)
    first = gallery.enroll(embeddings=vectors, labels=labels, key="request 7")
    assert gallery.enroll(embeddings=vectors, labels=labels, key="request 7").tolist() == first.tolist()
    assert len(gallery) == 64
    gallery.close()
    with Gallery.open(gallery.folder) as again:
        assert again.enroll(embeddings=vectors, labels=labels, key="request 7").tolist() == first.tolist()
        with pytest.raises(ValueError, match="Another request was made under the key 'request 7'"):
            again.enroll(embeddings=vectors[:1], labels=labels[:1], key="request 7")
        assert len(again) == 64


def test_ids_are_never_given_out_twice(gallery):
    last = gallery.enroll(embeddings=people()[0][:1], labels="x")[0]
    gallery.remove(ids=[last])
    gallery.close()
    with Gallery.open(gallery.folder) as again:
        assert again.enroll(embeddings=people()[0][:1], labels="x")[0] == last + 1


def test_an_older_snapshot_is_not_touched_by_later_changes(gallery):
    before = gallery._now()
    vectors, labels = before.vectors.copy(), before.labels.tolist()
    for i in range(5):
        gallery.enroll(embeddings=strangers(3, 1, seed=i)[0], labels="more")
    gallery.rename("more", "most")
    gallery.remove("most")
    gallery.enroll(embeddings=strangers(3, 1)[0], labels="again")
    np.testing.assert_array_equal(before.vectors, vectors)
    assert before.labels.tolist() == labels


def test_two_successors_of_one_snapshot_do_not_share_rows(gallery):
    def successor(now, label):
        return now.appended(Contents(now.meta, np.array([99]), [label], [None], np.eye(16, dtype=np.float32)[:1], 0))

    base = successor(gallery._now(), "room for more")
    first, second = successor(base, "first"), successor(base, "second")
    assert (first.labels[-1], second.labels[-1], len(base)) == ("first", "second", 61)


def test_searching_threads_see_whole_generations(gallery):
    """Every enrollment adds a pair; no reader may ever see half of it."""
    done, odd = threading.Event(), []

    def look():
        with Gallery.open(gallery.folder, read_only=True) as reader:
            while not done.is_set():
                odd.extend(len(side) for side in (gallery, reader) if len(side) % 2)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        gallery.enroll(embeddings=people()[0][:2], labels="pair")
    done.set()
    for thread in threads:
        thread.join()
    assert odd == []


def test_a_search_does_not_wait_for_a_change_on_its_way_to_the_disk(gallery, monkeypatch):
    """While the disk takes its time, others get the answers of before."""
    synced, go_on = threading.Event(), threading.Event()
    sync = os.fsync

    def slow(handle):
        synced.set()
        assert go_on.wait(10)
        sync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    writer = threading.Thread(target=gallery.enroll, kwargs={"embeddings": people()[0][:1], "labels": "x"})
    writer.start()
    assert synced.wait(10)
    assert "x" not in gallery
    assert gallery.search(embeddings=people()[0][:1], k=1).labels == [["person 0"]]
    go_on.set()
    writer.join()
    assert "x" in gallery


# ---- images --------------------------------------------------------------------------------------------------------


def test_a_function_is_an_embedder(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (6, 3, 8, 8), dtype=np.uint8)
    with Gallery.create(tmp_path / "g", pixels) as gallery:
        assert gallery.dim is None
        assert gallery.search(images=images, k=1).ids.tolist() == [[-1]] * 6
        gallery.enroll(images, labels=list("abcdef"))
        assert gallery.dim == 6
        assert gallery.search(images[2:3], k=1).labels == [["c"]]
        assert gallery.verify("c", image=images[2]).score == pytest.approx(1)
        np.testing.assert_array_equal(gallery.embed(images).vectors, pixels(images))
        with pytest.raises(ValueError, match=r"takes no options, got \['on_error'\]"):
            gallery.embed(images, on_error="skip")
        with pytest.raises(ValueError, match="vectors of 6 numbers, got 5"):
            gallery.enroll(embeddings=np.ones((1, 5)), labels=["x"])
    with Gallery.open(tmp_path / "g") as gallery:
        with pytest.raises(ValueError, match="made with the function callable:pixels, which cannot be stored"):
            gallery.search(images)
        assert gallery.search(embeddings=np.eye(6)[:1], k=1).ids[0, 0] > 0
    with Gallery.open(tmp_path / "g", pixels) as gallery:
        assert gallery.search(images[4:5], k=1).labels == [["e"]]


def test_image_files_go_through_the_decoder(tmp_path):
    from PIL import Image

    table = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, table, strict=True):
        Image.fromarray(image).save(path)
    with Gallery.create(tmp_path / "g", CallableEmbedder(pixels, image_size=8)) as gallery:
        gallery.enroll(paths, labels=list("abc"))
        near = gallery.search(table.transpose(0, 3, 1, 2), k=1)
        assert near.labels == [["a"], ["b"], ["c"]]
        np.testing.assert_allclose(near.scores, 1, atol=1e-6)
        assert gallery.identify(paths[1])[0].neighbours.labels[0][0] == "b"
        assert gallery.verify("b", image=paths[1]).score == pytest.approx(1)
    Image.fromarray(table[0][:4]).save(paths[0])
    with pytest.raises(ValueError, match=r"2 different sizes \(4 x 8, 8 x 8 pixels.* image_size"):
        CallableEmbedder(pixels).embed(paths)


def test_a_saved_encoder_travels_with_its_gallery(tmp_path):
    torch = pytest.importorskip("torch")
    encoders = pytest.importorskip("embedlab.encoders")
    torch.manual_seed(0)
    encoder = encoders.Encoder(encoders.ResNet("resnet10", stem="small", width=0.25), image_size=16).eval()
    images = np.random.default_rng(0).integers(0, 255, (4, 3, 16, 16), dtype=np.uint8)
    encoder.save(tmp_path / "encoder")
    with Gallery.create(tmp_path / "g", tmp_path / "encoder") as gallery:
        gallery.enroll(images, labels=list("abcd"))
    shutil.rmtree(tmp_path / "encoder")
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.search(images[3:], k=1).labels == [["d"]]
        assert gallery.fingerprint == encoder.fingerprint
        gallery.backup(tmp_path / "copy")
    with Gallery.open(tmp_path / "copy") as gallery:
        assert gallery.search(images[2:3], k=1).labels == [["c"]]
    other = encoders.Encoder(encoders.ResNet("resnet10", stem="small", width=0.25), image_size=16).eval()
    with pytest.raises(ValueError, match=r"was made with the embedder .* other weights or preprocessing"):
        Gallery.open(tmp_path / "g", other)
    Gallery.open(tmp_path / "g", encoder).close()  # the refused opening has let the lock go


def test_another_function_is_refused(tmp_path):
    Gallery.create(tmp_path / "g", CallableEmbedder(pixels, fingerprint="v1"), dim=6).close()
    with pytest.raises(ValueError, match="was made with the embedder v1, got v2"):
        Gallery.open(tmp_path / "g", CallableEmbedder(pixels, fingerprint="v2"))
    Gallery.create(tmp_path / "h", dim=6).close()
    with pytest.raises(ValueError, match="holds ready-made vectors and knows no embedder"):
        Gallery.open(tmp_path / "h", pixels)


def test_opening_and_searching_imports_no_torch(gallery):
    gallery.close()
    code = f"""
        import sys
        from embedlab import Gallery
        with Gallery.open({str(gallery.folder)!r}) as gallery:
            assert "faiss" not in sys.modules
            gallery.identify(embeddings=[[1.0] * 16])
            gallery.enroll(embeddings=[[1.0] * 16], labels=["x"])
        print([name for name in ("torch", "lightning", "pytorch_lightning", "matplotlib") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def pictures(folder, count=3, size=(300, 200)):
    """Image files of smooth colours, with their paths."""
    from PIL import Image

    paths = []
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 255, (2, 3, 3), dtype=np.uint8)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def test_thumbnails_are_small_pictures_that_go_with_their_templates(tmp_path):
    import io

    from PIL import Image

    paths = pictures(tmp_path)
    embedder = CallableEmbedder(pixels, image_size=8)
    with Gallery.create(tmp_path / "g", embedder, thumbnails=True) as gallery:
        ids = gallery.enroll(paths, labels=["a", "b", "b"])
        stored = gallery.embed(paths)  # vectors that know their files
        ids = np.concatenate([ids, gallery.enroll(embeddings=stored, labels="c")])
        for template, path in zip(ids.tolist(), paths * 2, strict=True):
            small = Image.open(io.BytesIO(gallery.thumbnail(template)))
            assert (small.format, small.size) == ("JPEG", (128, 85))
            original = Image.open(path).resize(small.size, Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(small, float) - np.asarray(original, float)).mean() < 3
        plain = gallery.enroll(embeddings=np.ones((1, 6)), labels="d")[0]
        assert gallery.thumbnail(plain) is None
        gallery.remove("b")
        with pytest.raises(ValueError, match="1 of 1 ids are not in the gallery: 2"):
            gallery.thumbnail(2)
        gallery.backup(tmp_path / "copy")
    for folder in ("g", "copy"):
        with Gallery.open(tmp_path / folder, read_only=True) as gallery:
            assert gallery.thumbnail(1) is not None
            assert gallery._store.opened.side["thumbnail"][0] == 4
            assert gallery.check().ok


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_thumbnails_of_arrays(tmp_path, kind):
    import io

    from PIL import Image

    images = np.tile(np.linspace(0, 255, 8).astype(np.uint8), (1, 3, 8, 1))
    with Gallery.create(tmp_path / "g", pixels, thumbnails=True) as gallery:
        gallery.enroll(images if kind == "uint8" else images.astype(kind) / 255, labels="a")
        small = np.asarray(Image.open(io.BytesIO(gallery.thumbnail(1))), float)
        assert np.abs(small - images[0].transpose(1, 2, 0)).max() < 6


def test_paths_stand_in_the_metadata_unless_something_else_does(tmp_path, monkeypatch):
    paths = pictures(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    with Gallery.create(tmp_path / "g", CallableEmbedder(pixels, image_size=8)) as gallery:
        gallery.enroll(["0.png"], labels="a", metadata={"site": "north"}, key="once")
        gallery.enroll(paths[1:], labels="b", metadata={"path": "archive 7"})
        gallery.enroll(np.zeros((1, 3, 8, 8), np.uint8) + 9, labels="c")
        assert list(gallery.metadata().values()) == [
            {"path": paths[0], "site": "north"},
            {"path": "archive 7"},
            {},
        ]
        assert gallery.thumbnail(1) is None
        # the same request from another place is the same request
        assert gallery.enroll([paths[0]], labels="a", metadata={"site": "north"}, key="once").tolist() == [1]


# ---- drift ---------------------------------------------------------------------------------------------------------


def changed(kind):
    """An embedder under the same fingerprint of which something has changed."""

    def weights(images):
        return pixels(images) * np.array([1, 1, 1, 1, 1, 1.4])

    def rounding(images):  # what bfloat16 does to every number
        return (pixels(images) * (1 + 2**-9 * np.array([1, -1, 1, -1, 1, -1]))).astype(np.float32)

    function = {"weights": weights, "rounding": rounding}.get(kind, pixels)
    return CallableEmbedder(function, image_size=8, fingerprint="v1")


@pytest.mark.parametrize("kind", ["nothing", "rounding", "weights", "decoder", "resizing"])
def test_drift_of_an_embedder_is_found_on_opening(tmp_path, monkeypatch, kind):
    from embedlab.data import images as reading

    with Gallery.create(tmp_path / "g", changed("nothing")) as gallery:
        assert gallery._store.references() == []  # a plain function may not take any image
        gallery.enroll(pictures(tmp_path), labels=list("abc"))
        assert len(gallery._store.references()) == 8
    if kind == "decoder":
        read = reading.read_image
        monkeypatch.setattr(reading, "read_image", lambda path, **options: read(path, **options)[..., ::-1])
    elif kind == "resizing":
        monkeypatch.setattr(reading, "fit_image", lambda image, size: image[:size, :size])
    if kind in ("nothing", "rounding"):
        Gallery.open(tmp_path / "g", changed(kind)).close()
    else:
        with pytest.raises(
            ValueError, match=r"v1 no longer gives .* reference images lie up to .* decoder .* resizing"
        ):
            Gallery.open(tmp_path / "g", changed(kind))
    Gallery.open(tmp_path / "g").close()  # without an embedder nothing is asked of it, and the lock is free


def test_a_function_gets_references_in_the_shape_of_its_images(tmp_path, caplog):
    shapes = []

    def watched(images):
        shapes.append(images.shape)
        return pixels(images)

    with Gallery.create(tmp_path / "g", watched) as gallery:
        gallery.enroll(np.random.default_rng(0).integers(0, 255, (2, 3, 10, 6), dtype=np.uint8), labels="a")
        assert shapes == [(2, 3, 10, 6), (8, 3, 10, 6)]

    def narrow(images):
        if len(images) > 2:
            raise RuntimeError("two at most")
        return pixels(images)

    with Gallery.create(tmp_path / "h", narrow) as gallery:
        gallery.enroll(np.random.default_rng(0).integers(0, 255, (2, 3, 10, 6), dtype=np.uint8), labels="a")
        assert len(gallery) == 2
    assert "No reference images are kept, the function does not take them: two at most" in caplog.text


def test_the_encoder_in_a_gallery_is_compared_when_it_is_loaded(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from embedlab import encoders

    torch.manual_seed(0)
    encoder = encoders.Encoder(encoders.ResNet("resnet10", stem="small", width=0.25), image_size=16).eval()
    Gallery.create(tmp_path / "g", encoder).close()
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.embedder.fingerprint == encoder.fingerprint
    forward = encoders.ResNet.forward
    monkeypatch.setattr(encoders.ResNet, "forward", lambda self, images: forward(self, images).roll(1, dims=-1))
    with (
        Gallery.open(tmp_path / "g") as gallery,
        pytest.raises(ValueError, match="8 of 8 reference images"),
    ):
        gallery.search(np.zeros((1, 3, 16, 16), np.uint8))


# ---- refusals ------------------------------------------------------------------------------------------------------

ONES = np.ones((2, 16))


@pytest.mark.parametrize(
    ("method", "arguments", "text"),
    [
        ("enroll", {"embeddings": np.full((2, 16), np.nan), "labels": "a"}, "2 of 2 embeddings are zero or not finite"),
        ("enroll", {"embeddings": np.array([[1.0] * 16, [np.inf] * 16]), "labels": ["a", "b"]}, "row 1 is not finite"),
        ("enroll", {"embeddings": np.array([[1.0] * 16, [0.0] * 16]), "labels": ["a", "b"]}, "row 1 is zero"),
        ("enroll", {"embeddings": np.ones((2, 5)), "labels": ["a", "b"]}, "vectors of 16 numbers, got 5: made by"),
        ("enroll", {"embeddings": np.ones(16), "labels": "a"}, r"must be \(N, D\) real numbers, got shape \(16,\)"),
        ("enroll", {"embeddings": ONES.astype(str), "labels": ["a", "b"]}, "real numbers"),
        ("enroll", {"embeddings": ONES, "labels": ["a"]}, "1 labels came for 2 images"),
        ("enroll", {"embeddings": ONES}, "enroll needs labels"),
        ("enroll", {"embeddings": ONES, "labels": ["a", ""]}, "Labels are non-empty strings; row 1 is ''"),
        ("enroll", {"embeddings": ONES, "labels": ["a", "  "]}, "row 1 is '  '"),
        ("enroll", {"embeddings": ONES, "labels": ["a", 7]}, r"row 1 is 7. Name numbers as str\(7\)"),
        ("enroll", {"embeddings": ONES, "labels": ["a", None]}, "row 1 is None"),
        ("enroll", {"embeddings": ONES, "labels": ["a", "b\x00"]}, "characters that cannot be shown"),
        ("enroll", {"embeddings": ONES, "labels": ["a", "\ud800"]}, "characters that cannot be shown"),
        ("enroll", {"embeddings": ONES, "labels": ["a", "b" * 10_000_000]}, "has 10000000 characters, at most 1000"),
        ("enroll", {"embeddings": ONES, "labels": ["a", "b"], "metadata": [{}]}, "1 metadata came for 2 images"),
        ("enroll", {"embeddings": ONES, "labels": ["a", "b"], "metadata": [{}, {"x": np.nan}]}, "row 1 is not JSON"),
        ("enroll", {"embeddings": ONES, "labels": ["a", "b"], "metadata": [{}, {1: 2}]}, "dict with string keys"),
        ("enroll", {"embeddings": ONES, "labels": "a", "metadata": {"x": "y" * 99_999}}, "at most 65536 are taken"),
        ("enroll", {"embeddings": ONES, "labels": ["a", "b"], "key": ""}, "key is a non-empty string"),
        ("enroll", {"embeddings": np.zeros((0, 16)), "labels": []}, "Nothing to enroll"),
        ("enroll", {"images": np.zeros((1, 3, 8, 8), np.uint8), "labels": ["a"]}, r"ready-made vectors \(dim=16\)"),
        ("enroll", {"images": ["x.png"], "embeddings": ONES, "labels": ["a"]}, "Pass either images= or embeddings="),
        ("enroll", {"labels": ["a"]}, "Pass either images= or embeddings="),
        ("enroll", {"images": 7, "labels": ["a"]}, "images must be paths or one array"),
        ("enroll", {"embeddings": ONES > 0, "labels": "a"}, r"real numbers, got shape \(2, 16\) of bool"),
        ("enroll", {"embeddings": ONES * 1e300, "labels": "a"}, "row 0 is not finite .*overflowing"),
        ("enroll", {"embeddings": ONES, "labels": [b"a", b"b"]}, "row 0 is b'a'"),
        ("enroll", {"embeddings": ONES, "labels": "a", "metadata": "xy"}, "string keys, or None; row 0 is 'x'"),
        ("enroll", {"embeddings": ONES, "labels": "a", "metadata": {"quality": 2}}, "the quality 2; under this name"),
        ("enroll", {"embeddings": ONES, "labels": "a", "metadata": {"quality": 1}, "quality": 1}, "quality of its own"),
        ("enroll", {"embeddings": ONES, "labels": "a", "quality": 0}, "above 0 and at most 1, .*; row 0 is 0"),
        ("enroll", {"embeddings": ONES, "labels": "a", "quality": [0.5, np.nan]}, "at most 1, .*; row 1 is nan"),
        ("enroll", {"embeddings": ONES, "labels": "a", "quality": [0.5]}, "1 qualities came for 2 images"),
        ("enroll", {"embeddings": ONES, "labels": "a", "key": 7}, "names the request, got 7"),
        ("enroll", {"images": np.zeros((3, 8, 8)), "labels": "a"}, r"\(N, C, H, W\), got ndarray of shape \(3, 8, 8\)"),
        ("remove", {}, "either labels or ids"),
        ("remove", {"labels": "person 1", "ids": [1]}, "either labels or ids"),
        ("remove", {"labels": ["person 1", "x"]}, "1 of 2 labels are not in the gallery: 'x'. Nothing was changed"),
        ("remove", {"ids": np.array([77])}, "1 of 1 ids are not in the gallery: 77"),
        ("remove", {"ids": [1, 1.5]}, r"ids to remove are whole numbers; got 1\.5"),
        ("remove", {"ids": [True]}, "ids to remove are whole numbers; got True"),
        ("remove", {"ids": [[1]]}, r"ids to remove are whole numbers; got \[1\]"),
        ("remove", {"ids": 1.0}, r"row by row, as a list; got 1\.0"),
        ("remove", {"labels": [7]}, "labels to remove are strings; got 7"),
        ("enroll", {"embeddings": [[], []], "labels": "a"}, r"real numbers, got shape \(2, 0\)"),
        ("enroll", {"embeddings": [[1, 2], [1]], "labels": "a"}, "rows of one length"),
        ("enroll", {"embeddings": 7, "labels": "a"}, "real numbers, got 7"),
        ("enroll", {"embeddings": ONES, "labels": 7}, "Labels come row by row, as a list; got 7"),
        ("enroll", {"embeddings": ONES, "labels": "a", "metadata": 7}, "Metadata come row by row, as a list; got 7"),
        ("enroll", {"embeddings": ONES, "labels": "a", "quality": "high"}, "Qualities come row by row|4 qualities"),
        ("enroll", {"embeddings": ONES, "labels": "a", "key": "\ud800"}, "at most 1000 printable characters"),
        ("enroll", {"embeddings": ONES, "labels": "a", "key": "k" * 2000}, "at most 1000 printable characters"),
        ("search", {"embeddings": np.zeros((2, 0))}, r"real numbers, got shape \(2, 0\)"),
        ("search", {"embeddings": ONES, "k": 10**12}, "k is at most 1,000,000, got 1,000,000,000,000"),
        ("search", {"embeddings": ONES, "where": {"x": np.ones(2)}}, "The metadata in row 0 is not JSON"),
        ("identify", {"embeddings": ONES, "probes": 7}, "Names of probes come row by row"),
        ("identify", {"embeddings": ONES, "probes": [[1], [2]]}, r"strings or whole numbers, .*; got \[1\]"),
        ("calibrate", {"embeddings": ONES, "labels": 7}, "Labels come row by row, as a list; got 7"),
        ("calibrate", {"embeddings": ONES, "fpir": "x"}, "fpir lies between 0 and 1, got x"),
        ("calibrate", {"embeddings": ONES, "growth": None}, "growth is a number from 1 to 3"),
        ("remove", {"labels": ["person 1", "person 1 "], "purge": True}, "1 of 2 labels .*: 'person 1 '"),
        ("rename", {"old": "x", "new": "y"}, "1 of 1 labels are not in the gallery: 'x'"),
        ("rename", {"old": "person 1", "new": "person 2"}, "'person 2' is enrolled already; merge"),
        ("rename", {"old": "person 1", "new": ""}, "Labels are non-empty strings; row 0 is ''"),
        ("merge", {"source": "person 1", "into": "x"}, "1 of 1 labels are not in the gallery: 'x'"),
        ("merge", {"source": "person 1", "into": "person 1"}, "cannot be merged into itself"),
        ("configure", {"fusion": "median"}, "fusion is one of max, mean, vote; got 'median'"),
        ("configure", {"vote_k": 2.5}, r"vote_k is a whole number of at least 1, got 2\.5"),
        ("configure", {"search": "tree"}, "search is one of auto, exact, hnsw, ivf; got 'tree'"),
        ("configure", {"search_recall": 99.9}, r"at most 1, got 99\.9; 99\.9 % is 0\.999"),
        ("configure", {"normalisation": "z"}, "normalisation is 'as-norm' or 'none'; got 'z'"),
        ("configure", {"normalisation": "as-norm"}, "Normalised scores need both"),
        ("configure", {"normalisation": "as-norm", "cohort": ONES}, "at least 20 vectors, got 2"),
        ("configure", {"normalisation": "as-norm", "cohort": np.eye(40)[:, :5] + 1}, "16 numbers, got 5"),
        ("calibrate", {"embeddings": ONES, "labels": ["a", "b", "c"]}, "3 labels do not fit 2 images"),
        ("calibrate", {"embeddings": ONES, "labels": [1, 2]}, r"or None for a stranger .*; row 0 is 1\. .* str\(1\)"),
        ("calibrate", {"embeddings": np.eye(16)[:2]}, "needs 299 strangers; these 2 images show 2"),
        ("calibrate", {"embeddings": ONES, "labels": ["person 1"] * 2}, "nobody that is not enrolled"),
        ("calibrate", {"embeddings": ONES, "labels": ["a", "b"], "probes": ["p", "p"]}, "images of 'a' and of 'b'"),
        ("calibrate", {"embeddings": ONES, "fpir": 1.5}, r"fpir lies between 0 and 1, got 1\.5"),
        ("calibrate", {"embeddings": ONES, "growth": 9}, "growth is from 1 to 3 times the present size, got 9"),
        ("calibrate", {"embeddings": ONES, "leave_identity_out": True}, "leave_identity_out takes no images"),
        ("search", {"embeddings": ONES, "k": 0}, "k is a whole number of at least 1, got 0"),
        ("search", {"embeddings": ONES, "per": "person"}, "'template' or 'identity'; got 'person'"),
        ("search", {"embeddings": ONES, "where": "north"}, "where is a dict of metadata"),
        ("search", {"embeddings": ONES[0]}, r"must be \(N, D\) real numbers, got shape \(16,\)"),
        ("identify", {"embeddings": ONES, "probes": ["a"]}, "1 names of probes came for 2 images"),
        ("identify", {"embeddings": ONES, "quality": [1, 1]}, "say by probes= which image belongs to which"),
        ("identify", {"embeddings": [[1] * 16, [-1] * 16], "probes": ["a", "a"]}, "probe 'a' cancel each other out"),
        ("verify", {"label": "x", "embedding": ONES[0]}, "not in the gallery: 'x'"),
        ("verify", {"label": "person 1"}, "Pass either images= or embeddings="),
        ("verify", {"label": "person 1", "embedding": np.zeros((0, 16))}, "one image or several .*, got none"),
        ("thumbnail", {"template": 77}, "1 of 1 ids are not in the gallery: 77"),
    ],
)
def test_bad_input_says_why_and_writes_nothing(gallery, method, arguments, text):
    before = (gallery.generation, gallery.counts())
    with pytest.raises((ValueError, GalleryError), match=text) as raised:
        getattr(gallery, method)(**arguments)
    assert raised.type in (ValueError, CalibrationError, GalleryError)  # none of NumPy's or of a codec
    assert (gallery.generation, gallery.counts()) == before
    assert gallery.check().ok


def test_bad_folders_say_why(tmp_path, gallery):
    with pytest.raises(ValueError, match=r"is already a gallery; choose a new folder, or use Gallery\.open"):
        Gallery.create(gallery.folder, dim=3)
    with pytest.raises(GalleryError, match=r"is no gallery: .*Gallery\.create makes one"):
        Gallery.open(tmp_path)
    with pytest.raises(GalleryError, match="is no gallery"):
        Gallery.open(tmp_path / "nothing", read_only=True)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ValueError, match="needs an embedder, or dim="):
        Gallery.create(tmp_path / "new")
    with pytest.raises(ValueError, match=r"holds no saved encoder: no encoder\.json"):
        Gallery.create(tmp_path / "new", tmp_path)
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    for path, near in (("rnu/encoder", "did you mean .*/run"), ("run/encodr", "did you mean .*/run/encoder")):
        with pytest.raises(ValueError, match=rf"No such file or folder: .*/{path}; {near}\? An encoder is the folder"):
            Gallery.create(tmp_path / "new", tmp_path / path)
    with pytest.raises(ValueError, match=r"No such file or folder: .*/model\.onnx; looked in /.* or an ONNX file\.$"):
        Gallery.create(tmp_path / "new", tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"whole number .* got 1\.5"):
        Gallery.create(tmp_path / "new", dim=1.5)
    assert sorted(os.listdir(tmp_path)) == ["gallery", "run"]


def test_a_creation_that_fails_leaves_nothing(tmp_path):
    class Unsaved:
        fingerprint, dim = "x", 3

        def embed(self, images):
            raise AssertionError

        def save(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Gallery.create(tmp_path / "g", Unsaved())
    assert os.listdir(tmp_path) == []


def test_closed_and_read_only_galleries_refuse(gallery):
    with Gallery.open(gallery.folder, read_only=True) as reader, pytest.raises(GalleryError, match="read_only=True"):
        reader.remove("person 1")
    gallery.close()
    gallery.close()
    for call in (
        lambda: gallery.search(embeddings=ONES),
        lambda: gallery.enroll(embeddings=ONES, labels="x"),
        lambda: len(gallery),
    ):
        with pytest.raises(GalleryError, match="is closed; open it again"):
            call()


def test_the_second_writer_learns_who_the_first_is(gallery):
    with pytest.raises(GalleryLocked, match=rf"open for writing in process {os.getpid()} on .*read_only=True"):
        Gallery.open(gallery.folder)
    code = f"from embedlab import Gallery; Gallery.open({str(gallery.folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"process {os.getpid()}" in done.stderr
    gallery.close()
    Gallery.open(gallery.folder).close()


# ---- durability ----------------------------------------------------------------------------------------------------


def damaged_copy(gallery, tmp_path):
    copy = tmp_path / "copy"
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(gallery.folder, copy)
    return copy


def test_a_flipped_bit_of_a_vector_names_the_template_and_salvage_reads_the_rest(gallery, caplog):
    bytes_of_one = gallery.embeddings().vectors[30].tobytes()
    gallery.close()
    path = gallery.folder / "gallery.db"
    content = bytearray(path.read_bytes())
    place = content.find(bytes_of_one)
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(GalleryDamaged, match=r"1 templates do not fit their digests \(id 31\).*salvage=True"):
        Gallery.open(gallery.folder)
    with Gallery.open(gallery.folder, salvage=True) as rest:
        assert len(rest) == 59
        assert "id 31" in caplog.text
        assert not rest.check().ok
        with pytest.raises(GalleryError, match="read_only=True"):
            rest.remove("person 1")


def test_lost_log_and_older_copies_are_refused(gallery, tmp_path):
    old = damaged_copy(gallery, tmp_path)  # with the log, at generation 1
    shutil.copytree(old, tmp_path / "old")
    gallery.enroll(embeddings=people()[0][:1], labels="x")
    for missing in ("gallery.db-wal", "gallery.generation"):
        copy = damaged_copy(gallery, tmp_path)
        (copy / missing).unlink()
        for read_only in (False, True):
            with pytest.raises(GalleryDamaged, match=r"was acknowledged|missing, damaged or from another"):
                Gallery.open(copy, read_only=read_only)
    copy = damaged_copy(gallery, tmp_path)
    for name in ("gallery.db", "gallery.db-wal", "gallery.db-shm"):
        shutil.copyfile(tmp_path / "old" / name, copy / name)
    with pytest.raises(GalleryDamaged, match="at generation 1, but 2 was acknowledged"):
        Gallery.open(copy)
    with Gallery.create(tmp_path / "other", dim=16) as other:
        shutil.copyfile(other.folder / "gallery.generation", damaged_copy(gallery, tmp_path) / "gallery.generation")
    with pytest.raises(GalleryDamaged, match="from another gallery"):
        Gallery.open(tmp_path / "copy")


@pytest.mark.parametrize("key", ["calibration", "settings", "count", "last_id", "fingerprint"])
def test_edited_facts_are_refused(gallery, key):
    gallery.calibrate(embeddings=strangers()[0], fpir=0.05)
    gallery.close()
    with sqlite3.connect(gallery.folder / "gallery.db") as database:
        database.execute(
            "UPDATE meta SET value = replace(replace(value, '6', '5'), 'null', '\"x\"') WHERE key = ?", (key,)
        )
        if key == "settings":
            database.execute("UPDATE meta SET value = replace(value, 'max', 'mean') WHERE key = ?", (key,))
    database.close()
    with pytest.raises(GalleryDamaged, match="the digest of the table meta does not fit"):
        Gallery.open(gallery.folder)


def test_foreign_databases_and_newer_formats_are_refused(gallery, tmp_path):
    gallery.close()
    for statement in ("CREATE TRIGGER t AFTER INSERT ON item BEGIN DELETE FROM item; END", "CREATE VIEW v AS SELECT 1"):
        with sqlite3.connect(damaged_copy(gallery, tmp_path) / "gallery.db") as database:
            database.execute(statement)
        database.close()
        with pytest.raises(GalleryDamaged, match="its schema is not that of a gallery"):
            Gallery.open(tmp_path / "copy")
    with sqlite3.connect(damaged_copy(gallery, tmp_path) / "gallery.db") as database:
        meta = Meta.from_rows([(k.encode(), v.encode()) for k, v in database.execute("SELECT key, value FROM meta")])
        meta.format_version = 2
        database.executemany("REPLACE INTO meta VALUES (?, ?)", meta.rows())
    database.close()
    with pytest.raises(GalleryError, match="format version 2, this embedlab reads up to 1"):
        Gallery.open(tmp_path / "copy")


def test_a_failed_disk_acknowledges_nothing_and_search_goes_on(gallery, monkeypatch):
    def refuse(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(GalleryError, match=r"No space left on device.*Nothing acknowledged is lost"):
        gallery.enroll(embeddings=people()[0][:1], labels="x")
    monkeypatch.undo()
    with pytest.raises(GalleryError, match="stopped writing after an error"):
        gallery.enroll(embeddings=people()[0][:1], labels="x")
    assert gallery.search(embeddings=people()[0][:1], k=1).labels == [["person 0"]]
    gallery.close()
    with Gallery.open(gallery.folder) as again:
        assert again.check().ok
        again.enroll(embeddings=people()[0][:1], labels="y")


def test_purged_vectors_are_in_no_file(gallery):
    stored = gallery.embeddings()
    (gallery.folder / "cache" / "old.faiss").write_bytes(stored.vectors[0].tobytes())
    gone = [f"person {i}" for i in range(10)]
    with Gallery.open(gallery.folder, read_only=True) as reader:
        assert len(reader) == 60
        gallery.remove(gone, purge=True)
        content = b"".join(path.read_bytes() for path in gallery.folder.rglob("*") if path.is_file())
        found = [stored.vectors[row].tobytes() in content for row in range(60)]
    assert found == [label not in gone for label in stored.labels]


def test_purge_says_what_remains_while_a_reader_holds_the_log(gallery):
    gallery._store._connection.execute("PRAGMA busy_timeout = 100")
    reader = sqlite3.connect(gallery.folder / "gallery.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM item").fetchone()
    with pytest.raises(GalleryError, match=r"removal is done, but .*gallery\.db-wal still holds traces"):
        gallery.remove("person 1", purge=True)
    reader.close()
    assert "person 1" not in gallery
    gallery.compact()


def test_a_purge_leaves_no_copy_of_what_sqlite_has_moved(tmp_path):
    """Removing rows merges pages, and between the rows of a merged page copies of others may stay."""
    random_, gone = np.random.default_rng(0), []
    with Gallery.create(tmp_path / "g", dim=128) as gallery:
        for step in range(60):
            count = int(random_.integers(1, 30))
            gallery.enroll(embeddings=random_.standard_normal((count, 128)), labels=f"p{step}")
            now = gallery.embeddings()
            chosen = random_.choice(now.ids, min(len(now) - 1, int(random_.integers(1, 25))), replace=False)
            gone += [vector.tobytes() for vector in now.vectors[np.isin(now.ids, chosen)]]
            if len(chosen):
                gallery.remove(ids=chosen, purge=step == 59)
        content = b"".join(path.read_bytes() for path in gallery.folder.rglob("*") if path.is_file())
        assert not [vector for vector in gone if vector in content]
        assert all(vector.tobytes() in content for vector in gallery.embeddings().vectors)


def test_a_full_disk_on_opening_holds_no_lock_for_ever(gallery, monkeypatch):
    gallery.close()
    write = os.write

    def full(handle, content):
        if content.startswith(b'{"pid"'):
            raise OSError(28, "No space left on device")
        return write(handle, content)

    monkeypatch.setattr(os, "write", full)
    with Gallery.open(gallery.folder) as again:
        with pytest.raises(GalleryLocked, match="open for writing in another process"):
            Gallery.open(gallery.folder)
        assert len(again) == 60
    monkeypatch.undo()
    Gallery.open(gallery.folder).close()


def test_a_reader_that_cannot_follow_says_so_until_it_can(gallery, monkeypatch):
    with Gallery.open(gallery.folder, read_only=True) as reader:
        gallery.remove("person 1")

        def damaged(*args, **options):
            raise GalleryDamaged("a page is torn")

        monkeypatch.setattr(type(reader._store), "load", damaged)
        for _ in range(2):
            with pytest.raises(GalleryDamaged, match="a page is torn"):
                reader.labels()
        monkeypatch.undo()
        assert "person 1" not in reader.labels()


def test_questions_about_ids_and_numbers_are_answered_or_explained(gallery):
    one = np.ones((1, 16))
    with pytest.raises(ValueError, match=r"1 of 1 ids are not in the gallery: '7'"):
        gallery.thumbnail("7")
    with pytest.raises(ValueError, match=r"labels to remove are strings; got 3\."):
        gallery.remove(["person 1", 3])
    with pytest.raises(ValueError, match="where is a dict of metadata"):
        gallery.search(embeddings=one, where="north")
    assert gallery.remove(ids=2) == 1
    with pytest.raises(ValueError, match=r"1 of 1 ids are not in the gallery: 2\."):
        gallery.remove(ids=[2])
    gallery.enroll(embeddings=one, labels="half", quality=np.float32(0.5))
    assert gallery.metadata()[61] == {"quality": 0.5}
    assert len(gallery.identify(embeddings=np.vstack([one, one]), probes=["a", "a"], quality=[1e-7, 1e-7])) == 1


def test_backup_while_changing_is_a_whole_generation(gallery, tmp_path):
    gallery.calibrate(embeddings=strangers()[0], fpir=0.05)
    gallery.backup(tmp_path / "copy")
    gallery.remove("person 1")
    with Gallery.open(tmp_path / "copy") as copy:
        assert (len(copy), copy.calibration) == (60, gallery.calibration)
        assert copy.check().ok
    with pytest.raises(ValueError, match="is already a gallery"):
        gallery.backup(tmp_path / "copy")


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_a_backup_deletes_what_a_killed_one_left_and_nothing_in_use(gallery, tmp_path):
    """One process dies in the middle of its copy, another is still at it."""
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from embedlab._durable import new_folder
        with new_folder(Path(sys.argv[1])) as building:
            (building / "gallery.db").write_bytes(b"faces")
            print(building.name, flush=True)
            if sys.argv[2] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            input()
    """

    def starts(end):
        command = [sys.executable, "-c", code, tmp_path / "copy", end]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def left():
        return {path.name for path in tmp_path.glob(".*.new-*")}

    with starts("waits") as busy:
        alive = busy.stdout.readline().strip()
        with starts("dies") as killed:
            dead = killed.stdout.readline().strip()
        assert killed.returncode == -signal.SIGKILL
        assert left() == {alive, dead}
        gallery.backup(tmp_path / "copy")
        assert left() == {alive}
        assert (tmp_path / alive / "gallery.db").read_bytes() == b"faces"
        busy.kill()
    shutil.rmtree(tmp_path / "copy")
    gallery.backup(tmp_path / "copy")
    assert not left()
    with Gallery.open(tmp_path / "copy") as copy:
        assert copy.check().ok


def test_compact_gives_space_back(tmp_path):
    with Gallery.create(tmp_path / "g", dim=64) as gallery:
        gallery.enroll(embeddings=np.random.default_rng(0).standard_normal((2000, 64)), labels="x")
        gallery.enroll(embeddings=np.eye(64)[:1], labels="y")
        gallery.remove("x")
        assert gallery.compact() > 400_000
        assert gallery.check().ok
        assert gallery.labels() == ["y"]


def test_stored_embeddings_bring_their_labels(tmp_path):
    vectors, labels = people()
    table = Embeddings(vectors.astype(np.float32), labels, np.arange(60))
    with Gallery.create(tmp_path / "g", dim=16) as gallery:
        gallery.enroll(embeddings=table)
        assert gallery.counts() == dict.fromkeys(sorted(set(labels)), 3)
        assert repr(gallery).endswith("20 identities, 60 templates, dim=16)")
