"""One contract for every place where a gallery can lie: a folder, a file of Milvus Lite, a Milvus server.

The server runs under the marker `full`: at `EMBEDLAB_TEST_MILVUS`, such as milvus://127.0.0.1:19530, or started on
loopback from `EMBEDLAB_TEST_MILVUS_SERVER`, the program `milvus-server` of the wheel `milvus` (in a virtual environment
of its own: python -m venv V && V/bin/pip install milvus==2.3.5).
"""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from embedlab import Gallery
from embedlab.retrieval import CalibrationError, CallableEmbedder, GalleryError, GalleryLocked

NEEDS_LITE = pytest.mark.skipif(
    find_spec("milvus_lite") is None, reason="MILVUS LITE ABSENT: pip install 'embedlab[milvus]'"
)
PLACES = ["folder", pytest.param("lite", marks=NEEDS_LITE), pytest.param("server", marks=pytest.mark.full)]
DIM = 16


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Address of a Milvus server."""
    pytest.importorskip("pymilvus", reason="PYMILVUS ABSENT: pip install 'embedlab[milvus]'")
    if address := os.environ.get("EMBEDLAB_TEST_MILVUS"):
        yield address.rstrip("/")
        return
    program = os.environ.get("EMBEDLAB_TEST_MILVUS_SERVER")
    if program is None:
        pytest.skip("NO MILVUS SERVER: set EMBEDLAB_TEST_MILVUS or EMBEDLAB_TEST_MILVUS_SERVER, see this file")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = tmp_path_factory.mktemp("milvus")
    started = subprocess.Popen(
        [program, "--data", data, "--proxy-port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"milvus://127.0.0.1:{port}"
    finally:
        os.killpg(started.pid, 15)
        started.wait(30)


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    """One file for all galleries of the session: opening it takes longer than most tests."""
    return tmp_path_factory.mktemp("lite") / "shared.db"


@pytest.fixture(scope="session")
def held(file):
    """Keeps the file open."""
    with Gallery.create(f"milvus:{file}/held", dim=2):
        yield


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    """A function from a name to where a gallery of that name may be made."""
    tag = uuid.uuid4().hex[:8]
    if request.param == "folder":
        yield lambda name="g": tmp_path / name
    elif request.param == "lite":
        file = request.getfixturevalue("file")
        request.getfixturevalue("held")
        yield lambda name="g": f"milvus:{file}/{name}_{tag}"
    else:
        server = request.getfixturevalue("server")
        yield lambda name="g": f"{server}/{name}_{tag}"
        drop(server, tag)


def drop(server, tag):
    from pymilvus import MilvusClient

    client = MilvusClient(server.replace("milvus://", "http://"))
    for name in client.list_collections():
        if tag in name:
            client.drop_collection(name)


def people(count, each, *, seed=0, noise=0.5, kind="person"):
    """`each` vectors of each of `count` people, and their names."""
    random = np.random.default_rng(seed)
    faces = np.repeat(random.standard_normal((count, DIM)), each, axis=0)
    return faces + noise * random.standard_normal(faces.shape), [
        f"{kind} {i}" for i in range(count) for _ in range(each)
    ]


def unit(vectors):
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


ENROLLED = people(20, 3)
STRANGERS = people(80, 2, seed=1, kind="stranger")
PROBES = people(20, 2, seed=0)[0] + 0.3 * np.random.default_rng(5).standard_normal((40, DIM))


@pytest.fixture
def gallery(place):
    with Gallery.create(place(), dim=DIM) as opened:
        opened.enroll(embeddings=ENROLLED[0], labels=ENROLLED[1], metadata=notes(60))
        yield opened


def notes(count):
    return [{"site": ("north", "south")[i % 2], "n": i, "sharp": i % 3 == 0} for i in range(count)]


# ---- what goes in and out --------------------------------------------------------------------------------------------


def test_enrolling_gives_ids_and_is_all_there(gallery):
    assert len(gallery) == 60
    assert gallery.labels() == sorted(set(ENROLLED[1]))
    assert gallery.counts() == dict.fromkeys(sorted(set(ENROLLED[1])), 3)
    assert "person 3" in gallery
    assert "nobody" not in gallery
    assert 3 not in gallery
    assert gallery.metadata() == dict(enumerate(notes(60), 1))
    stored = gallery.embeddings()
    assert stored.labels == ENROLLED[1]
    assert stored.ids.tolist() == list(range(1, 61))
    np.testing.assert_allclose(stored.vectors, unit(ENROLLED[0]), atol=1e-6)
    assert gallery.enroll(embeddings=[np.ones(DIM)], labels="new").tolist() == [61]
    assert gallery.counts()["new"] == 1
    assert gallery.thumbnail(61) is None


def test_removing_takes_all_or_nothing_and_ids_are_never_given_out_twice(gallery):
    with pytest.raises(ValueError, match=r"1 of 2 labels are not in the gallery: 'nobody'. Nothing was changed"):
        gallery.remove(["person 1", "nobody"])
    with pytest.raises(ValueError, match="1 of 2 ids are not in the gallery: 999"):
        gallery.remove(ids=[1, 999])
    with pytest.raises(ValueError, match="either labels or ids"):
        gallery.remove()
    assert len(gallery) == 60
    assert gallery.remove(["person 1", "person 2"]) == 6
    assert gallery.remove(ids=[1, 60, 59]) == 3
    assert gallery.remove([]) == 0
    assert len(gallery) == 51
    assert "person 1" not in gallery
    assert gallery.counts()["person 0"] == 2
    assert gallery.counts()["person 19"] == 1
    assert gallery.remove(ids=58) == 1
    assert "person 19" not in gallery
    assert gallery.info()["identities"] == len(gallery.labels()) == 17
    found = gallery.search(embeddings=ENROLLED[0], k=60)
    assert set(found.ids[found.ids > 0].tolist()) == set(gallery.embeddings().ids.tolist())
    with pytest.raises(ValueError, match="not in the gallery"):
        gallery.remove(ids=[60])
    assert gallery.enroll(embeddings=[np.ones(DIM)], labels="new").tolist() == [61]


def test_renaming_and_merging(gallery):
    assert gallery.rename("person 0", 'Ada "the\\ first" Łovelace') == 3
    name = 'Ada "the\\ first" Łovelace'
    assert name in gallery
    assert "person 0" not in gallery
    assert gallery.search(embeddings=ENROLLED[0][:1], k=1).labels == [[name]]
    assert gallery.merge("person 1", name) == 3
    assert gallery.counts()[name] == 6
    assert gallery.info()["identities"] == len(gallery.labels()) == 19
    assert gallery.embeddings().labels[:6] == [name] * 6
    for call, text in [
        (lambda: gallery.rename("nobody", "x"), "not in the gallery: 'nobody'"),
        (lambda: gallery.rename(name, "person 3"), "is enrolled already; merge"),
        (lambda: gallery.rename("person 3", " "), "Labels are non-empty strings"),
        (lambda: gallery.merge("person 3", "nobody"), "not in the gallery: 'nobody'"),
        (lambda: gallery.merge("nobody", "person 3"), "not in the gallery: 'nobody'"),
        (lambda: gallery.merge("person 3", "person 3"), "cannot be merged into itself"),
    ]:
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
    assert len(gallery) == 60
    assert gallery.metadata()[1] == notes(1)[0]


def test_a_key_names_one_request(place):
    with Gallery.create(place(), dim=DIM) as gallery:
        first = gallery.enroll(embeddings=ENROLLED[0][:3], labels=ENROLLED[1][:3], key="a/b c")
        assert (
            gallery.enroll(embeddings=ENROLLED[0][:3], labels=ENROLLED[1][:3], key="a/b c").tolist() == first.tolist()
        )
        with pytest.raises(ValueError, match="Another request was made under the key 'a/b c'"):
            gallery.enroll(embeddings=ENROLLED[0][:3], labels="x", key="a/b c")
        assert len(gallery) == 3
        gallery.remove("person 0")
        gallery.enroll(embeddings=ENROLLED[0][3:9], labels=ENROLLED[1][3:9])
        for _ in range(2):
            assert gallery.remove("person 1", key="gone") == 3
            assert gallery.rename("person 2", "Ada", key="renamed") == 3
        with pytest.raises(ValueError, match="Another request was made under the key 'gone': it changed 3 templates"):
            gallery.remove("Ada", key="gone")
        assert gallery.remove("Ada", key="last") == 3
    with Gallery.open(place()) as gallery:  # another client
        assert gallery.remove("Ada", key="last") == 3
        assert (
            gallery.enroll(embeddings=ENROLLED[0][:3], labels=ENROLLED[1][:3], key="a/b c").tolist() == first.tolist()
        )
        assert len(gallery) == 0


BAD = [
    (lambda g: g.enroll(embeddings=np.ones((2, DIM)), labels=["a"]), "1 labels came for 2 images"),
    (
        lambda g: g.enroll(embeddings=np.ones((1, DIM + 1)), labels="a"),
        f"holds vectors of {DIM} numbers, got {DIM + 1}",
    ),
    (lambda g: g.enroll(embeddings=np.zeros((1, DIM)), labels="a"), "zero or not finite"),
    (lambda g: g.enroll(embeddings=np.full((1, DIM), np.nan), labels="a"), "not finite"),
    (lambda g: g.enroll(embeddings=np.zeros((0, DIM)), labels=[]), "Nothing to enroll"),
    (lambda g: g.enroll(embeddings=np.ones((1, DIM)), labels=[7]), "Labels are non-empty strings"),
    (lambda g: g.enroll(embeddings=np.ones((1, DIM)), labels="a\n"), "cannot be shown"),
    (lambda g: g.enroll(embeddings=np.ones((1, DIM)), labels="a", metadata={"x": float("nan")}), "is not JSON"),
    (lambda g: g.enroll(embeddings=np.ones((1, DIM)), labels="a", metadata={"x": "é" * 70_000}), "at most|too long"),
    (lambda g: g.enroll(embeddings=np.ones((1, DIM)), labels="a", quality=2), "A quality is a number above 0"),
    (lambda g: g.enroll(embeddings=np.ones((1, DIM)), labels="a", key=""), "key is a non-empty string"),
    (lambda g: g.enroll(images=np.ones((1, 3, 4, 4), np.uint8), labels="a"), "was made for ready-made vectors"),
    (lambda g: g.search(embeddings=np.ones((1, DIM + 1))), f"holds vectors of {DIM} numbers"),
    (lambda g: g.search(embeddings=np.ones((1, DIM)), k=0), "k is a whole number of at least 1"),
    (lambda g: g.search(embeddings=np.ones((1, DIM)), per="x"), "per is what k counts"),
    (lambda g: g.search(embeddings=np.ones((1, DIM)), where=3), "where is a dict of metadata"),
    (lambda g: g.verify("nobody", embedding=np.ones(DIM)), "not in the gallery: 'nobody'"),
    (lambda g: g.calibrate(embeddings=np.ones((5, DIM)), labels=["a"]), "1 labels do not fit 5 images"),
    (lambda g: g.calibrate(embeddings=STRANGERS[0], fpir=2), "fpir lies between 0 and 1"),
    (lambda g: g.configure(fusion="sum"), "fusion is one of"),
    (lambda g: g.configure(vote_k=0), "vote_k is a whole number"),
    (lambda g: g.configure(normalisation="x"), "normalisation is 'as-norm' or 'none'"),
    (lambda g: g.thumbnail(999), "1 of 1 ids are not in the gallery"),
    (lambda g: g.remove([3]), "labels to remove are strings"),
]


def test_bad_input_changes_nothing_and_says_why(gallery):
    for call, text in BAD:
        with pytest.raises(ValueError, match=text):
            call(gallery)
    with pytest.raises(CalibrationError, match="ten pictures of one stranger are not ten strangers"):
        gallery.calibrate(embeddings=STRANGERS[0], labels=STRANGERS[1], fpir=0.001)
    assert len(gallery) == 60
    assert gallery.calibration is None
    assert gallery.info()["settings"] == {"fusion": "max", "vote_k": 10}


def test_an_empty_gallery_answers(place):
    with Gallery.create(place(), dim=DIM) as gallery:
        found = gallery.search(embeddings=PROBES[:2], k=3)
        assert found.ids.tolist() == [[-1] * 3] * 2
        assert found.labels == [[None] * 3] * 2
        assert gallery.search(embeddings=PROBES[:2], k=3, per="identity").ids.tolist() == [[-1] * 3] * 2
        answer = gallery.identify(embeddings=PROBES[:1])[0]
        assert (answer.label, answer.best, answer.threshold, answer.calibrated) == (None, None, None, False)
        assert np.isnan(answer.score)
        assert (gallery.labels(), gallery.counts(), gallery.metadata(), len(gallery)) == ([], {}, {}, 0)
        assert gallery.embeddings().vectors.shape == (0, DIM)
        with pytest.raises(ValueError, match="An empty gallery cannot be calibrated"):
            gallery.calibrate(embeddings=STRANGERS[0])
    with pytest.raises(GalleryError, match="is closed"):
        gallery.search(embeddings=PROBES)
    with pytest.raises(GalleryError, match="is closed"):
        gallery.enroll(embeddings=PROBES, labels="x")


# ---- what it answers -------------------------------------------------------------------------------------------------


def test_search_is_a_sort_of_all_cosines(gallery):
    cosines = unit(PROBES) @ unit(ENROLLED[0]).T
    order = np.argsort(-cosines, axis=1)
    found = gallery.search(embeddings=PROBES, k=7)
    assert found.ids.tolist() == (order[:, :7] + 1).tolist()
    np.testing.assert_allclose(found.scores, np.take_along_axis(cosines, order[:, :7], 1), atol=1e-6)
    assert found.labels[3] == [ENROLLED[1][row] for row in order[3, :7]]
    assert gallery.search(embeddings=PROBES[:1], k=70).ids[0].tolist() == [*(order[0] + 1).tolist(), *[-1] * 10]
    per = gallery.search(embeddings=PROBES, k=20, per="identity")
    best = cosines.reshape(len(PROBES), 20, 3).max(axis=2)
    np.testing.assert_allclose(per.scores, -np.sort(-best, axis=1), atol=1e-6)
    assert all(len(set(row)) == 20 for row in per.labels)
    assert gallery.search(embeddings=PROBES[:1], k=25, per="identity").ids[0, 20:].tolist() == [-1] * 5


def test_where_looks_at_metadata(gallery):
    for where, fits in [
        ({"site": "north"}, lambda note: note["site"] == "north"),
        ({"site": ["north", "south"], "n": [1, 2, 50]}, lambda note: note["n"] in (1, 2, 50)),
        ({"sharp": True}, lambda note: note["sharp"]),
        ({"n": 3.0}, lambda note: note["n"] == 3),
        ({"n": "3"}, lambda note: False),
        ({"absent": 1}, lambda note: False),
        ({"n": []}, lambda note: False),
        ({}, lambda note: True),
    ]:
        wanted = {key for key, note in enumerate(notes(60), 1) if fits(note)}
        found = gallery.search(embeddings=PROBES[:2], k=60, where=where)
        assert [set(row[row > 0].tolist()) for row in found.ids] == [wanted] * 2, where
        per = gallery.search(embeddings=PROBES[:1], k=20, per="identity", where=where)
        assert {label for label in per.labels[0] if label} == {ENROLLED[1][key - 1] for key in wanted}, where


def decisions(gallery):
    """Everything that it decides, as plain values."""
    answers = gallery.identify(embeddings=np.concatenate([PROBES, STRANGERS[0]]), k=3)
    pooled = gallery.identify(embeddings=PROBES, probes=[i // 2 for i in range(40)])
    claims = [gallery.verify(f"person {i % 20}", embedding=PROBES[i]) for i in range(6)]
    return answers + pooled, claims


@pytest.mark.parametrize("fusion", ["max", "vote"])
def test_decisions_and_thresholds_are_those_of_a_folder(place, tmp_path, fusion):
    """With a mixture of all changes before."""

    def made(where):
        with Gallery.create(where, dim=DIM, fusion=fusion, vote_k=5) as gallery:
            gallery.enroll(embeddings=ENROLLED[0], labels=ENROLLED[1], metadata=notes(60))
            gallery.remove(["person 7"])
            gallery.remove(ids=[5, 50])
            gallery.rename("person 8", "Ada")
            gallery.merge("person 9", "Ada")
            gallery.enroll(embeddings=people(4, 2, seed=9)[0], labels=people(4, 2, seed=9, kind="later")[1])
            mixed = np.concatenate([STRANGERS[0], PROBES]), STRANGERS[1] + [f"person {i // 2}" for i in range(40)]
            growth = 1.5 if fusion == "max" else 1
            found = gallery.calibrate(embeddings=mixed[0], labels=mixed[1], fpir=0.05, fmr=0.04, growth=growth)
            left = None
            if fusion == "max":
                left = gallery.calibrate(leave_identity_out=True, fpir=0.4)
                gallery.calibrate(embeddings=mixed[0], labels=mixed[1], fpir=0.05, fmr=0.04, growth=growth)
            return found, left, *decisions(gallery), gallery.embeddings()

    mine, folder = made(place("mine")), made(tmp_path / "folder")
    assert mine[4].labels == folder[4].labels
    assert mine[4].ids.tolist() == folder[4].ids.tolist()
    for calibration, other in zip(mine[:2], folder[:2], strict=True):
        if other is not None:
            here, there = calibration.to_dict(), other.to_dict()
            # Sub-galleries are measured on Milvus for "max" only; and of the enrolled as strangers to each other two
            # have the same score, whose last bits make it one step of the curve or two.
            unlike = (
                {"sub_galleries"}
                if fusion == "vote"
                else {"sub_galleries", "curve"}
                if calibration is mine[1]
                else set()
            )
            here, there = ({key: kept[key] for key in kept.keys() - unlike} for kept in (here, there))
            assert here.keys() == there.keys()
            for key, value in there.items():
                if isinstance(value, tuple):
                    np.testing.assert_allclose(np.array(here[key], float), np.array(value, float), atol=1e-5)
                else:
                    assert here[key] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), key
    for answer, other in zip(mine[2], folder[2], strict=True):
        assert (answer.label, answer.best, answer.calibrated, answer.stale) == (
            other.label, other.best, other.calibrated, other.stale
        )  # fmt: skip
        assert answer.score == pytest.approx(other.score, abs=1e-5)
        assert answer.neighbours.ids.tolist() == other.neighbours.ids.tolist()
        np.testing.assert_allclose(answer.neighbours.scores, other.neighbours.scores, atol=1e-5)
    assert sum(answer.label is not None for answer in mine[2][:40]) > 20  # it does name somebody
    for answer, other in zip(mine[3], folder[3], strict=True):
        assert answer.accepted == other.accepted
        assert answer.score == pytest.approx(other.score, abs=1e-5)


def test_settings_are_stored_with_the_threshold(gallery):
    gallery.calibrate(embeddings=STRANGERS[0], labels=STRANGERS[1], fpir=0.05)
    gallery.configure(fusion="max", vote_k=10, search="exact")
    assert gallery.calibration is not None
    gallery.configure(fusion="vote")
    assert gallery.calibration is None
    answer = gallery.identify(embeddings=PROBES[:1])[0]
    assert (answer.label, answer.threshold, answer.calibrated, answer.best) == (None, None, False, "person 0")
    assert gallery.verify("person 0", embedding=PROBES[0]).accepted is None
    assert gallery.info()["settings"] == {"fusion": "vote", "vote_k": 10}


def test_an_outgrown_calibration_is_stale(gallery):
    gallery.calibrate(embeddings=STRANGERS[0], labels=STRANGERS[1], fpir=0.05)
    assert not gallery.identify(embeddings=PROBES[:1])[0].stale
    gallery.enroll(embeddings=[np.ones(DIM)], labels="one more")
    assert gallery.identify(embeddings=PROBES[:1])[0].stale
    assert gallery.info()["stale"]
    gallery.remove("one more")
    assert not gallery.info()["stale"]


# ---- embedders -------------------------------------------------------------------------------------------------------


def mean_colours(images):
    return images.reshape(len(images), 3, 4, -1).mean(axis=3).reshape(len(images), -1) + 1


IMAGES = np.random.default_rng(0).integers(0, 255, (3, 3, 16, 16), dtype=np.uint8)


def test_a_function_as_an_embedder(place):
    """Its dimension is known with the first image, and so are the reference images."""
    embedder = CallableEmbedder(mean_colours, fingerprint="colours 1")
    with Gallery.create(place(), embedder) as gallery:
        assert gallery.dim is None
        assert gallery.search(embeddings=np.ones((1, 5))).ids[0, 0] == -1
        gallery.enroll(IMAGES, labels=["a", "b", "c"], key="k")
        assert gallery.enroll(IMAGES, labels=["a", "b", "c"], key="k").tolist() == [1, 2, 3]
        assert gallery.dim == 12
        assert gallery.identify(IMAGES[1:2])[0].best == "b"
    with Gallery.open(place()) as gallery, pytest.raises(ValueError, match=r"Gallery.open\(\w+, \w+\)"):
        gallery.identify(IMAGES[:1])
    with pytest.raises(ValueError, match="was made with the embedder colours 1, got colours 2"):
        Gallery.open(place(), CallableEmbedder(mean_colours, fingerprint="colours 2"))
    drifted = CallableEmbedder(lambda images: mean_colours(images)[:, ::-1], fingerprint="colours 1")
    with pytest.raises(ValueError, match="no longer gives the vectors"):
        Gallery.open(place(), drifted)
    with Gallery.open(place(), embedder) as gallery:
        assert gallery.verify("b", image=IMAGES[1]).score == pytest.approx(1, abs=1e-6)
        assert gallery.fingerprint == "colours 1"


def test_a_gallery_of_vectors_takes_no_embedder(place):
    Gallery.create(place(), dim=DIM).close()
    with pytest.raises(ValueError, match="holds ready-made vectors and knows no embedder"):
        Gallery.open(place(), mean_colours)


def test_a_saved_encoder_is_found_again(place, tmp_path):
    import torch

    from embedlab.encoders import Encoder, LinearHead, Pixels

    torch.manual_seed(0)
    Encoder(Pixels(8), LinearHead(6), image_size=8).save(tmp_path / "encoder")
    images = IMAGES[:, :, :8, :8]
    with Gallery.create(place(), str(tmp_path / "encoder")) as gallery:
        gallery.enroll(images, labels=["a", "b", "c"])
    with Gallery.open(place()) as gallery:
        assert gallery.identify(images[2:])[0].best == "c"
    if str(place()).startswith("milvus:"):
        (tmp_path / "encoder").rename(tmp_path / "elsewhere")
        with Gallery.open(place()) as gallery, pytest.raises(ValueError, match="where it is not on this machine"):
            gallery.identify(images[2:])
        with Gallery.open(place(), tmp_path / "elsewhere") as gallery:
            assert gallery.identify(images[2:])[0].best == "c"


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_opening_again_in_another_process(place, request, tmp_path):
    where = place()
    if str(where).startswith(f"milvus:{tmp_path.anchor}"):  # one process at a time: a file of its own
        where = f"milvus:{tmp_path / 'own.db'}"
    code = f"""
        import numpy as np
        from embedlab import Gallery
        with Gallery.open({str(where)!r}) as gallery:
            print(len(gallery), gallery.identify(embeddings=np.eye(4)[1:2])[0].best, gallery.generation)
            print(gallery.enroll(embeddings=np.eye(4)[3:], labels="four"))
    """
    with Gallery.create(where, dim=4) as gallery:
        gallery.enroll(embeddings=np.eye(4)[:3], labels=["one", "two", "three"])
        generation = gallery.generation
        assert gallery.info()["generation"] == generation
    arguments = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.split(), done.stderr) == (["3", "two", str(generation), "[4]"], "")
    with Gallery.open(where, read_only=True) as gallery:
        assert gallery.counts() == {"one": 1, "two": 1, "three": 1, "four": 1}
        with pytest.raises(GalleryError, match="opened with read_only=True"):
            gallery.remove("one")
        with pytest.raises(GalleryError, match="opened with read_only=True"):
            gallery.calibrate(embeddings=np.eye(4))


def test_a_reader_follows(place):
    with Gallery.create(place(), dim=DIM) as writer, Gallery.open(place(), read_only=True) as reader:
        assert len(reader) == 0
        for count in (1, 2, 3):
            writer.enroll(embeddings=ENROLLED[0][count : count + 1], labels=f"p{count}")
            assert len(reader) == count
            assert reader.identify(embeddings=ENROLLED[0][count : count + 1])[0].best == f"p{count}"
        writer.remove("p2")
        assert reader.labels() == ["p1", "p3"]
        writer.rename("p1", "p4")
        assert reader.search(embeddings=ENROLLED[0][1:2], k=1).labels == [["p4"]]


def test_a_place_that_is_taken_or_holds_nothing(place):
    with pytest.raises(GalleryError, match="is no gallery"):
        Gallery.open(place())
    Gallery.create(place(), dim=DIM).close()
    with pytest.raises(ValueError, match="is already a gallery"):
        Gallery.create(place(), dim=DIM)
    with pytest.raises(ValueError, match="needs an embedder, or dim="):
        Gallery.create(place("other"))
    with pytest.raises(GalleryError, match="is no gallery"):
        Gallery.open(place("other"))


def test_two_galleries_side_by_side(place):
    with Gallery.create(place("one"), dim=3) as one, Gallery.create(place("two"), dim=4) as two:
        one.enroll(embeddings=np.eye(3), labels="a")
        two.enroll(embeddings=np.eye(4), labels="b")
        assert (one.counts(), two.counts()) == ({"a": 3}, {"b": 4})


# ---- only on Milvus --------------------------------------------------------------------------------------------------


@pytest.fixture
def on_milvus(place):
    if not str(place()).startswith("milvus:"):
        pytest.skip("a folder has these")
    return place


def test_what_only_a_folder_promises_is_explained(on_milvus, tmp_path):
    place = on_milvus
    for options, text in [
        ({"fusion": "mean"}, "fusion='mean' is for a gallery in a folder"),
        ({"search": "hnsw"}, "search='hnsw' is for a gallery in a folder"),
        ({"thumbnails": True}, "thumbnails=True is for a gallery in a folder"),
    ]:
        with pytest.raises(GalleryError, match=text):
            Gallery.create(place(), dim=DIM, **options)
    with Gallery.create(place(), dim=DIM) as gallery:
        gallery.enroll(embeddings=ENROLLED[0], labels=ENROLLED[1])
        for call, text in [
            (lambda: gallery.check(), "check is for a gallery in a folder.*digests"),
            (lambda: gallery.backup(tmp_path / "b"), "backup is for a gallery in a folder.*milvus-backup"),
            (lambda: gallery.compact(), "compact is for a gallery in a folder"),
            (lambda: gallery.remove("person 1", purge=True), "purge=True is for .* deletes logically"),
            (lambda: gallery.folder, "lies on Milvus and has no folder"),
            (lambda: gallery.configure(fusion="mean"), "fusion='mean'"),
            (lambda: gallery.configure(search="ivf"), "search='ivf'"),
            (lambda: gallery.configure(normalisation="as-norm", cohort=STRANGERS[0]), "Score normalisation is for"),
            (lambda: Gallery.open(place(), salvage=True), "salvage=True is for"),
        ]:
            with pytest.raises(GalleryError, match=text):
                call()
        with pytest.raises(ValueError, match="where looks for texts, numbers and true or false"):
            gallery.search(embeddings=PROBES, where={"n": None})
        gallery.configure(fusion="vote")
        with pytest.raises(ValueError, match="leave_identity_out with fusion='vote'"):
            gallery.calibrate(leave_identity_out=True, fpir=0.4)
        assert len(gallery) == 60


def test_a_newer_format_is_refused(on_milvus):
    with Gallery.create(on_milvus(), dim=DIM) as gallery:
        with gallery._store.turn() as facts:
            facts.format_version = 2
            gallery._store.commit(facts)
        with pytest.raises(GalleryError, match="has format version 2, this embedlab reads 1"):
            len(gallery)


def test_documents_longer_than_a_row(on_milvus):
    with Gallery.create(on_milvus(), dim=DIM) as gallery:
        content = {"text": "é" * 100_000, "list": list(range(1000))}
        assert len(gallery._store.write("long", content)) > 5
        assert gallery._store.documents("long") == {"long": content}
        gallery._store.forget("long")
        assert gallery._store.documents("long") == {}


def test_writers_take_turns(on_milvus):
    """Three clients enroll at once: no id twice, no template lost."""
    Gallery.create(on_milvus(), dim=DIM).close()
    ids, failures = [], []

    def write(number):
        try:
            with Gallery.open(on_milvus()) as gallery:
                for turn in range(4):
                    rows = people(1, 3, seed=10 * number + turn)[0]
                    ids.extend(gallery.enroll(embeddings=rows, labels=f"w{number}").tolist())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(ids) == list(range(1, 37))
    with Gallery.open(on_milvus(), read_only=True) as gallery:
        assert gallery.counts() == {"w0": 12, "w1": 12, "w2": 12}
        assert (len(gallery), gallery.info()["identities"]) == (36, 3)


def test_a_question_that_a_change_overtakes_is_asked_again(on_milvus):
    """An answer is of one generation: here a removal comes between the search and its answer."""
    with Gallery.create(on_milvus(), dim=DIM) as writer, Gallery.open(on_milvus(), read_only=True) as reader:
        writer.enroll(embeddings=ENROLLED[0], labels=ENROLLED[1])
        real, calls = reader._store.search, []

        def search(*arguments):
            found = real(*arguments)
            calls.append(len(found))
            if len(calls) == 1:
                writer.remove(["person 0", "person 1"])
            return found

        reader._store.search = search
        answer = reader.search(embeddings=ENROLLED[0][:1], k=60)
        assert sum(label is not None for label in answer.labels[0]) == 54
        assert {"person 0", "person 1"}.isdisjoint(answer.labels[0])
        assert calls == [1, 1]
        assert (
            reader.identify(embeddings=ENROLLED[0][:1])[0].best == writer.identify(embeddings=ENROLLED[0][:1])[0].best
        )
        assert len(calls) == 3  # nobody came between


KILLED = """
    import sys, numpy as np
    from embedlab import Gallery
    number, seed = 0, int(sys.argv[2])
    with Gallery.open(sys.argv[1]) as gallery:
        while True:
            rows = np.random.default_rng([seed, number]).standard_normal((7, 16))
            ids = gallery.enroll(embeddings=rows, labels=f"{seed}-{number}", key=f"{seed}/{number}")
            print("enrolled", f"{seed}-{number}", ids[0], flush=True)
            if number % 3 == 2:
                gallery.remove(f"{seed}-{number - 1}")
                print("removed", f"{seed}-{number - 1}", 0, flush=True)
            number += 1
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", [pytest.param("lite", marks=NEEDS_LITE), "server"])
def test_a_writer_that_is_killed_loses_nothing_acknowledged(kind, tmp_path, request):
    """kill -9 at twenty random moments: what was acknowledged is there, and of the last change all or nothing."""
    random, tag, kills = np.random.default_rng(0), uuid.uuid4().hex[:8], 20
    where = f"milvus:{tmp_path / 'k.db'}" if kind == "lite" else f"{request.getfixturevalue('server')}/killed_{tag}"
    Gallery.create(where, dim=16).close()
    enrolled, removed, seen_ids, changes = set(), set(), set(), 0
    for seed in range(kills):
        arguments = [sys.executable, "-c", textwrap.dedent(KILLED), where, str(seed)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
            said = [writer.stdout.readline()]
            time.sleep(random.random() * 2)
            writer.kill()
            said += writer.stdout.read().splitlines()
        for line in said:
            verb, label, first = line.split()
            (enrolled if verb == "enrolled" else removed).add(label)
            changes += 1
            if verb == "enrolled":
                assert int(first) not in seen_ids
                seen_ids.update(range(int(first), int(first) + 7))
        with Gallery.open(where, read_only=True) as gallery:
            counts = gallery.counts()
            assert set(counts.values()) <= {7}
            assert gallery.info()["identities"] == len(counts)
            assert len(gallery) == 7 * len(counts)
            mine = {label for label in counts if label.startswith(f"{seed}-")}
            sure = {label for label in enrolled - removed if label.startswith(f"{seed}-")}
            assert len(sure - mine) <= 1  # being removed when it was killed
            assert len(mine - sure) <= 1  # being enrolled when it was killed
            enrolled |= mine
            removed |= sure - mine
        with Gallery.open(where) as gallery:  # the next writer goes on
            gallery.enroll(embeddings=np.eye(16)[:7], labels="again", key=f"again {seed}")
            assert gallery.remove("again") == 7
    with Gallery.open(where, read_only=True) as gallery:
        assert set(gallery.counts()) == enrolled - removed
    print(f"{kind}: {kills} kills, {changes} acknowledged changes, none lost")
    if kind == "server":
        drop(request.getfixturevalue("server"), tag)


class Dead(RuntimeError):
    """What a killed writer would not even see."""


def killed_at(gallery, number):
    """Let the writer die before its `number`-th call that changes something."""
    calls, real, seen = 0, gallery._store.call, []

    def call(verb, *arguments, **options):
        nonlocal calls
        changing = verb in ("insert", "upsert", "delete", "create_collection", "drop_collection", "rename_collection")
        calls += changing
        if calls >= number:
            raise Dead
        seen.append(verb)
        return real(verb, *arguments, **options)

    gallery._store.call = call


CHANGES = {
    "enroll": lambda g: g.enroll(embeddings=people(4, 3, seed=3)[0], labels=["new"] * 9 + ["p0"] * 3, key="again"),
    "remove labels": lambda g: g.remove(["p0", "p1"], key="again"),
    "remove ids": lambda g: g.remove(ids=[1, 2, 3, 4]),
    "rename": lambda g: g.rename("p0", "Ada", key="again"),
    "merge": lambda g: g.merge("p0", "p1"),
}


def state(gallery):
    stored = gallery.embeddings()
    found = gallery.search(embeddings=PROBES[:3], k=30)
    best = [answer.best for answer in gallery.identify(embeddings=PROBES[:3])]
    there = [name in gallery for name in ("p0", "p1", "Ada", "new")]
    return (
        dict(zip(stored.ids.tolist(), stored.labels, strict=True)), gallery.counts(), len(gallery), best, there,
        gallery.info()["identities"], found.ids.tolist(), found.labels,
    )  # fmt: skip


@pytest.fixture
def as_shared(file, held, monkeypatch):
    """A file whose writers take turns as on a server, where several processes write."""
    monkeypatch.setattr("embedlab.retrieval.milvus_store.MilvusStore._shared", True)
    return file


@NEEDS_LITE
@pytest.mark.parametrize("name", CHANGES)
def test_a_writer_that_dies_at_any_step_leaves_all_or_nothing(as_shared, monkeypatch, name):
    """Readers see the state before or after, never one between; the next writer goes on from there."""
    monkeypatch.setattr("embedlab.retrieval.milvus_store.LEASE", 0.2)
    monkeypatch.setattr("embedlab.retrieval.milvus_store.INSERT_BYTES", 500)  # four messages for twelve templates
    change, number, states = CHANGES[name], 0, []
    while True:
        number += 1
        where = f"milvus:{as_shared}/dies_{uuid.uuid4().hex[:8]}"
        with Gallery.create(where, dim=DIM) as gallery:
            gallery.enroll(embeddings=people(3, 3)[0], labels=[f"p{i // 3}" for i in range(9)])
            before = state(gallery)
        gallery = Gallery.open(where)
        killed_at(gallery, number)
        try:
            change(gallery)
            finished = True
        except Dead:
            finished = False
        del gallery._store.call
        gallery.close()
        with Gallery.open(where, read_only=True) as gallery:
            seen = state(gallery)
        with Gallery.open(where) as gallery:
            if seen == before or name in ("enroll", "remove labels", "rename"):  # a key makes it safe to repeat
                change(gallery)
            seen_after = state(gallery)
            last = gallery.enroll(embeddings=PROBES[:1], labels="last")
            assert last[0] > max(seen_after[0])
            assert len(gallery) == seen_after[2] + 1
        states.append((before, seen, seen_after))
        if finished:
            break
    wanted = states[-1][1]
    unnumbered = wanted if name != "enroll" else None
    for before, seen, after in states:
        if name == "enroll":  # ids that were reserved are not given out again
            assert seen in (before,) or sorted(seen[0].values()) == sorted(wanted[0].values())
            assert sorted(after[0].values()) == sorted(wanted[0].values())
            assert after[1:6] == wanted[1:6]
        else:
            assert seen in (before, wanted)
            assert after == unnumbered
    assert any(seen == before for before, seen, _ in states)
    assert number > 5


@NEEDS_LITE
def test_a_dead_writers_lock_is_taken_over_once(as_shared, monkeypatch):
    """Of two who wait behind it, none takes away the lock that the other has made meanwhile."""
    from embedlab.retrieval.milvus_store import Address, MilvusStore

    monkeypatch.setattr("embedlab.retrieval.milvus_store.LEASE", 0.3)
    where = f"milvus:{as_shared}/lock_{uuid.uuid4().hex[:8]}"
    Gallery.create(where, dim=DIM).close()
    one, two, three = (MilvusStore(Address.parse(where)) for _ in range(3))
    dead = one._take_turn()  # and never gives it back
    with two.turn():
        mine = two._holder()
        assert mine != dead
        three._push_aside(dead)  # three had made up its mind before
        assert two._holder() == mine
        one._token, facts = dead, one.read()
        with pytest.raises(GalleryError, match="The turn to write .* was lost"):
            one.commit(facts)
    assert two._holder() is None
    for store in (one, two, three):
        store.close()


@NEEDS_LITE
def test_who_waits_too_long_is_told_who_writes(as_shared, monkeypatch):
    from embedlab.retrieval.milvus_store import Address, MilvusStore

    monkeypatch.setattr("embedlab.retrieval.milvus_store.LEASE", 0.5)
    monkeypatch.setattr("embedlab.retrieval.milvus_store.BEAT", 0.05)
    where = f"milvus:{as_shared}/busy_{uuid.uuid4().hex[:8]}"
    Gallery.create(where, dim=DIM).close()
    busy, stop = MilvusStore(Address.parse(where)), threading.Event()

    def work():
        with busy.turn():
            while not stop.wait(0.05):
                busy.beat()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with Gallery.open(where) as gallery, pytest.raises(GalleryLocked, match=f"by process {os.getpid()} on"):
            gallery.enroll(embeddings=PROBES[:1], labels="x")
    finally:
        stop.set()
        thread.join()
        busy.close()


@NEEDS_LITE
def test_a_file_that_another_process_has_open_is_locked(tmp_path):
    where = f"milvus:{tmp_path / 'one.db'}"
    Gallery.create(where, dim=2).close()
    code = f"""
        from embedlab import Gallery
        with Gallery.open({where!r}) as gallery:
            print("open", flush=True)
            input()
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(GalleryLocked, match="Probably another process has it open"):
            Gallery.open(where, read_only=True)
        other.communicate("\n", timeout=60)
    with Gallery.open(where) as gallery:
        assert len(gallery) == 0


@NEEDS_LITE
def test_leave_the_file_when_the_last_gallery_closes(tmp_path):
    where = tmp_path / "two.db"
    with Gallery.create(f"milvus:{where}/one", dim=2) as one:
        Gallery.create(f"milvus:{where}/two", dim=2).close()
        one.enroll(embeddings=np.eye(2), labels="x")
    code = f"from embedlab import Gallery; print(len(Gallery.open('milvus:{where}/one')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "2\n", done.stderr


def test_addresses():
    from embedlab.retrieval.milvus_store import Address

    plain = Address.parse("milvus://host/door")
    assert (plain.uri, plain.name, plain.file, plain.level) == ("http://host:19530", "door", None, "Strong")
    other = Address.parse("milvus://[::1]:7000?consistency=bounded&tls=true")
    assert (other.uri, other.name, other.level) == ("https://[::1]:7000", "gallery", "Bounded")
    local = Address.parse("milvus:some where/a.db/door_2")
    assert (local.uri, local.name, local.file) == ("some where/a.db", "door_2", Path("some where/a.db"))
    for text, why in [
        ("milvus:file.sqlite", "whose name ends in .db"),
        ("milvus:", "whose name ends in .db"),
        ("milvus:a.db/has-dash", "'has-dash' is no name"),
        ("milvus:a.db?consistency=bounded", "a file has no options"),
        ("milvus://host/a/b", "'a/b' is no name"),
        ("milvus:///door", "names no host"),
        ("milvus://host:port/door", "such as milvus://localhost:19530/door"),
        ("milvus://me:secret@host/door", "EMBEDLAB_MILVUS_TOKEN"),
        ("milvus://host/door?consistency=eventually", "consistency=strong"),
        ("milvus://host/door?colour=red", "the options of an address"),
    ]:
        with pytest.raises(ValueError, match=re.escape(why)) as caught:
            Address.parse(text)
        assert "secret" not in str(caught.value)


def test_nobody_there_and_no_client(monkeypatch):
    if find_spec("pymilvus"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setattr("embedlab.retrieval.milvus_store.PATIENCE", 0.5)
        with pytest.raises(GalleryError, match="Nobody answers at milvus://127.0.0.1"):
            Gallery.open(f"milvus://127.0.0.1:{port}/door")
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'embedlab[milvus]'")):
        Gallery.open("milvus://127.0.0.1:1/door")
    with pytest.raises(ImportError, match=re.escape("pip install 'embedlab[milvus]'")):
        Gallery.create("milvus:some.db", dim=2)


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def test_a_gallery_is_served(place):
    from fastapi.testclient import TestClient
    from harness_serving import embedder, png

    from embedlab.serving import create_app

    with Gallery.create(place(), embedder()) as gallery:
        with TestClient(create_app(gallery, hosts=["testserver"])) as web:
            for person in range(3):
                headers = {"Idempotency-Key": f"k{person}"}
                for _ in range(2):
                    said = web.post(f"/api/enroll?label=person {person}", content=png(person, 1), headers=headers)
                    assert said.json() == {"id": person + 1, "label": f"person {person}"}
            found = web.post("/api/identify", content=png(1, 2)).json()
            assert found["label"] is None
            assert not found["calibrated"]
            assert found["neighbours"][0]["label"] == "person 1"
            assert web.post("/api/verify?label=nobody", content=png(1, 2)).status_code == 404
            renaming = {"label": "person 1", "new_label": "Ada"}
            assert web.post("/api/rename", json=renaming).json() == {"renamed": 1}
            assert web.post("/api/rename", json=renaming).status_code == 404
            assert web.post("/api/remove", json={"label": "person 2"}).json() == {"removed": 1}
            about = web.get("/api/gallery").json()
            assert (about["identities"], about["templates"], about["calibrated"]) == (2, 2, False)
            listed = web.get("/api/identities").json()["identities"]
            assert [one["label"] for one in listed] == ["Ada", "person 0"]
        assert gallery.labels() == ["Ada", "person 0"]


def test_a_server_on_milvus_has_no_inbox():
    from embedlab.serving import serve

    with pytest.raises(ValueError, match="lies on Milvus: leave --inbox out"):
        serve("milvus:some.db", inbox_days=3)


# ---- on the command line ---------------------------------------------------------------------------------------------


def test_every_verb_takes_the_address(place, tmp_path, capsys):
    from embedlab.cli import main

    def run(*arguments, fails=None):
        code = main([str(argument) for argument in ("gallery", *arguments, "--json")])
        out, err = capsys.readouterr()
        if fails is not None:
            assert (code, out) == (1, "")
            assert re.search(fails, err), err
            return None
        assert code == 0, err
        return json.loads(out)

    where = place()
    for name, (vectors, labels) in {
        "enrolled": ENROLLED,
        "strangers": STRANGERS,
        "probes": (PROBES[::2], None),
    }.items():
        np.save(tmp_path / f"{name}.npy", vectors)
        (tmp_path / f"{name}.txt").write_text("\n".join(labels or [f"person {i}" for i in range(20)]))
    files = {
        name: (tmp_path / f"{name}.npy", "--labels", tmp_path / f"{name}.txt")
        for name in ("enrolled", "strangers", "probes")
    }
    run("create", where, "--dim", DIM)
    assert run("enroll", where, *files["enrolled"], "--key", "k")["templates"] == 60
    assert run("enroll", where, *files["enrolled"], "--key", "k")["templates"] == 60
    assert run("calibrate", where, *files["strangers"], "--fpir", 0.05)["strangers"] == 80
    found = run("identify", where, *files["probes"])
    assert found["report"]["enrolled"] == 20
    assert found["results"][0]["best"] == "person 0"
    assert run("search", where, *files["probes"], "-k", 1)["results"][0]["neighbours"][0]["label"] == "person 0"
    assert run("verify", where, files["probes"][0], "--label", "person 0")["results"][0]["label"] == "person 0"
    assert run("rename", where, "person 1", "Ada")["renamed"] == 3
    assert run("merge", where, "person 2", "Ada")["merged"] == 3
    assert run("remove", where, "--label", "person 3")["removed"] == 3
    assert run("list", where)["identities"]["Ada"] == 6
    assert run("configure", where, "--vote-k", 5)["settings"]["vote_k"] == 5
    assert run("info", where)["templates"] == 57
    assert run("report", where, "--out", tmp_path / "report.html")["bytes"] > 1000
    if str(where).startswith("milvus:"):
        for verb, *rest in (["check"], ["compact"], ["backup", tmp_path / "b"]):
            run(verb, where, *rest, fails="is for a gallery in a folder")
        run("remove", where, "--label", "Ada", "--purge", fails="deletes logically")
