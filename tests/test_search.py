"""Search among many: exact, or by an index that never gives a wrong score, a removed template or too few results."""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import faiss
import numpy as np
import pytest

from embedlab import Gallery
from embedlab.retrieval import GalleryDamaged, indexing, search, snapshot
from embedlab.retrieval import folder as folder_module
from embedlab.retrieval.search import Index, flat
from embedlab.retrieval.snapshot import Snapshot
from embedlab.retrieval.store import Contents, Meta


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def people(identities, templates=4, dim=16, noise=0.08, seed=0):
    random_ = np.random.default_rng(seed)
    centres = unit(random_.standard_normal((identities, dim)))
    labels = [f"p{i}" for i in range(identities) for _ in range(templates)]
    return unit(np.repeat(centres, templates, axis=0) + noise * random_.standard_normal((len(labels), dim))), labels


def probes(vectors, count=50, noise=0.05, seed=7):
    random_ = np.random.default_rng(seed)
    chosen = vectors[random_.integers(0, len(vectors), count)]
    return unit(chosen + noise * random_.standard_normal(chosen.shape))


def settle(gallery):
    """Until no index is being built."""
    gallery._keeper.wait()
    return gallery.info()["search"]


@pytest.fixture
def small_scale(monkeypatch):
    """Galleries of a thousand templates are large."""
    monkeypatch.setattr(indexing, "AUTO_ROWS", 800)
    monkeypatch.setattr(indexing, "FEWEST_ROWS", 700)
    monkeypatch.setattr(search, "PROBES", 300)
    monkeypatch.setattr(search, "BLOCK", 500)


def large(folder, *, dim=16, recall=0.9, kind="ivf", identities=250, **settings):
    """A gallery with its index."""
    gallery = Gallery.create(folder, dim=dim, search=kind, search_recall=recall, **settings)
    vectors, labels = people(identities, dim=dim)
    gallery.enroll(embeddings=vectors, labels=labels)
    assert settle(gallery)["used"] in (("ivf", "hnsw") if kind == "auto" else (kind,))
    return gallery


# ---- exact search --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99], ids=lambda share: f"{share:.0%} removed")
@pytest.mark.parametrize("k", [1, 7, 200])
def test_flat_equals_a_float64_sort(monkeypatch, share, k):
    monkeypatch.setattr(search, "BLOCK", 300)
    random_ = np.random.default_rng(0)
    matrix = unit(random_.standard_normal((20_000 if share == 0.99 else 2_000, 8))).astype(np.float32)
    queries = unit(random_.standard_normal((9, 8))).astype(np.float32)
    alive = random_.random(len(matrix)) >= share
    alive[np.argsort(-(matrix @ queries[0]))[:500]] = share == 0  # the whole surroundings of one query are gone
    rows = np.flatnonzero(alive)
    truth = queries.astype(np.float64) @ matrix[rows].astype(np.float64).T
    k = min(k, len(rows))
    order = np.argsort(-truth, axis=1)[:, :k]
    for scores, found in (
        flat(matrix, queries, k, alive=None if alive.all() else alive),
        flat(matrix, queries, k, rows=rows),
    ):
        np.testing.assert_allclose(scores, np.take_along_axis(truth, order, 1), atol=1e-6)
        np.testing.assert_array_equal(found, rows[order])


def naive_identities(stored, query, k):
    """The best template of each identity, in loops."""
    best = {}
    for key, label, vector in zip(stored.ids.tolist(), stored.labels, stored.vectors.astype(np.float64), strict=True):
        score = float(vector @ query)
        if label not in best or score > best[label][0]:
            best[label] = (score, key)
    return sorted(((score, key, label) for label, (score, key) in best.items()), reverse=True)[:k]


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_k_may_count_identities(tmp_path, small_scale, kind):
    with Gallery.create(tmp_path / "g", dim=16, search=kind, search_recall=0.5) as gallery:
        vectors, labels = people(60, 4)
        gallery.enroll(embeddings=vectors, labels=labels)
        # One identity has so many templates that it fills any short list.
        crowd = unit(vectors[:1] + 0.02 * np.random.default_rng(3).standard_normal((600, 16)))
        gallery.enroll(embeddings=crowd, labels="p0", metadata={"crowd": True})
        gallery.remove("p1")
        assert settle(gallery)["used"] == kind
        stored, queries = gallery.embeddings(), np.concatenate([probes(vectors, 6), vectors[:2]])
        got = gallery.search(embeddings=queries, k=5, per="identity")
        for row, query in enumerate(queries):
            want = naive_identities(stored, query, 5)
            if kind == "exact":
                assert got.labels[row] == [label for _, _, label in want]
                np.testing.assert_allclose(got.scores[row], [score for score, _, _ in want], atol=1e-5)
            assert len(set(got.labels[row])) == 5
            assert got.scores[row, 0] == pytest.approx(want[0][0], abs=1e-5)
        everybody = gallery.search(embeddings=queries[:1], k=70, per="identity")
        assert everybody.labels[0][59:] == [None] * 11
        assert set(everybody.labels[0][:59]) == set(gallery.labels())
        only = gallery.search(embeddings=queries[:1], k=3, per="identity", where={"crowd": True})
        assert only.labels == [["p0", None, None]]
        with pytest.raises(ValueError, match="'template' or 'identity'; got 'person'"):
            gallery.search(embeddings=queries, per="person")


def test_where_is_exact_on_the_subset_whatever_has_changed(tmp_path, small_scale, monkeypatch):
    with large(tmp_path / "g") as gallery:
        random_, notes = np.random.default_rng(1), {}
        for step in range(4):
            vectors, labels = people(30, seed=step)
            written = [
                {"site": str(random_.choice(["n", "s", "w"])), "year": 2020 + i % 3, "tags": ["a", step]}
                for i in range(len(labels))
            ]
            ids = gallery.enroll(embeddings=vectors, labels=labels, metadata=written)
            notes.update(zip(ids.tolist(), written, strict=True))
            gallery.remove(ids=ids[:7])
            for key in ids[:7].tolist():
                del notes[key]
            stored, query = gallery.embeddings(), probes(vectors, 1)
            for where, fits in (
                ({"site": "n"}, lambda note: note["site"] == "n"),
                ({"site": ["n", "w"], "year": 2021}, lambda note: note["site"] in "nw" and note["year"] == 2021),
                ({"tags": [["a", step]]}, lambda note, step=step: note["tags"] == ["a", step]),
                ({"site": []}, lambda note: False),
                ({"nothing": None}, lambda note: False),
            ):
                rows = [row for row, key in enumerate(stored.ids.tolist()) if key in notes and fits(notes[key])]
                cosines = stored.vectors[rows].astype(np.float64) @ query[0]
                order = np.argsort(-cosines)[:5]
                near = gallery.search(embeddings=query, k=5, where=where)
                assert near.ids[0][: len(order)].tolist() == stored.ids[rows][order].tolist()
                np.testing.assert_allclose(near.scores[0][: len(order)], cosines[order], atol=1e-5)
        parsed = []
        monkeypatch.setattr(snapshot.json, "loads", lambda text: parsed.append(text) or {})
        gallery.search(embeddings=query, where={"site": "n"})
        assert parsed == []  # nothing is parsed twice


# ---- an index ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dim"), [("ivf", 16), ("ivf", 15), ("hnsw", 16)], ids=["pq", "sq", "hnsw"])
def test_an_index_is_right_through_random_changes(tmp_path, small_scale, kind, dim):
    """Every score exact, nothing that is gone, never too few, the nearest found; and the reader agrees."""
    dice, random_ = random.Random(dim), np.random.default_rng(dim)
    gallery = large(tmp_path / "g", dim=dim, kind=kind, recall=0.98)
    reader = Gallery.open(tmp_path / "g", read_only=True)
    stored = gallery.embeddings()
    oracle = {int(i): (n, v) for i, n, v in zip(stored.ids, stored.labels, stored.vectors, strict=True)}
    asked = found = 0
    for _ in range(25):
        action = dice.choice(["enroll", "enroll", "remove", "ids", "rename", "merge", "compact", "reopen", "purge"])
        names = sorted({name for name, _ in oracle.values()})
        if action == "enroll":
            vectors = people(dice.randint(1, 20), 2, dim, seed=dice.randrange(1000))[0]
            labels = [dice.choice([*names[:9], f"new {dice.randrange(30)}"]) for _ in vectors]
            ids = gallery.enroll(embeddings=vectors, labels=labels)
            oracle.update({int(i): (n, v) for i, n, v in zip(ids, labels, vectors, strict=True)})
        elif action in ("remove", "purge"):
            gone = dice.sample(names, dice.choice([1, 3, 25]) if len(names) > 200 else 1)
            gallery.remove(gone, purge=action == "purge")
            oracle = {i: row for i, row in oracle.items() if row[0] not in gone}
        elif action == "ids":
            some = dice.sample(sorted(oracle), 5)
            gallery.remove(ids=some)
            oracle = {i: row for i, row in oracle.items() if i not in some}
        elif action == "rename":
            gallery.rename(names[0], "renamed " + names[0])
            oracle = {i: ("renamed " + n if n == names[0] else n, v) for i, (n, v) in oracle.items()}
        elif action == "merge":
            gallery.merge(names[1], names[2])
            oracle = {i: (names[2] if n == names[1] else n, v) for i, (n, v) in oracle.items()}
        elif action == "compact":
            gallery.compact()
        else:
            gallery.close()
            gallery = Gallery.open(tmp_path / "g")
        if dice.random() < 0.5:
            settle(gallery)
        keys = np.array(sorted(oracle))
        matrix = np.array([oracle[key][1] for key in keys.tolist()], np.float64)
        queries = unit(matrix[random_.integers(0, len(matrix), 20)] + 0.05 * random_.standard_normal((20, dim)))
        for side in (gallery, reader):
            got = side.search(embeddings=queries, k=6)
            assert got.ids.shape == (20, 6)
            assert set(got.ids.ravel().tolist()) <= oracle.keys()
            cosines = queries @ matrix.T
            rows = np.searchsorted(keys, got.ids)
            np.testing.assert_allclose(got.scores, np.take_along_axis(cosines, rows, 1), atol=1e-5)
            assert (np.diff(got.scores, axis=1) <= 0).all()
            assert all(len(set(row)) == 6 for row in got.ids.tolist())
            assert got.labels == [[oracle[key][0] for key in row] for row in got.ids.tolist()]
            assert dict(side.counts()) == {
                name: sum(n == name for n, _ in oracle.values()) for name in {n for n, _ in oracle.values()}
            }
            asked += 20
            found += int((got.scores[:, 0] >= cosines.max(axis=1) - 1e-5).sum())
    assert found / asked >= 0.98
    settle(gallery)
    settle(reader)
    assert gallery.check().problems == reader.check().problems == ()
    reader.close()
    gallery.close()


def test_new_templates_are_found_at_once_and_removed_ones_never_again(tmp_path, small_scale, monkeypatch):
    monkeypatch.setattr(indexing, "STALE_SHARE", 10.0)  # no rebuilding
    with large(tmp_path / "g") as gallery:
        index = gallery._snapshot.index
        new = unit(np.random.default_rng(5).standard_normal((5, 16)))
        ids = gallery.enroll(embeddings=new, labels=list("abcde"))
        assert gallery.search(embeddings=new, k=1).ids[:, 0].tolist() == ids.tolist()
        gallery.remove("p7")
        gallery.remove("c")
        near = gallery.search(embeddings=np.concatenate([people(250)[0][28:32], new[2:3]]), k=90)
        assert not {"p7", "c"} & {label for row in near.labels for label in row}
        assert (near.ids >= 0).all()
        assert gallery._snapshot.index is index
        monkeypatch.setattr(indexing, "STALE_SHARE", 0.05)
        gallery.compact()
        assert settle(gallery)["used"] == "ivf"
        assert gallery._snapshot.index.measured.templates == len(gallery) == 1000
        assert gallery._snapshot.removed == 0


def test_more_neighbours_than_an_index_is_asked_for_are_exact(tmp_path, small_scale):
    with large(tmp_path / "g", recall=0.5) as gallery:
        stored, queries = gallery.embeddings(), probes(people(250)[0], 5)
        got = gallery.search(embeddings=queries, k=500)
        truth = queries @ stored.vectors.astype(np.float64).T
        np.testing.assert_array_equal(got.ids, stored.ids[np.argsort(-truth, axis=1)[:, :500]])


def test_too_few_candidates_are_made_up_for_exactly(tmp_path, small_scale, monkeypatch):
    """A crowd that fills all candidates is removed: whoever asks there gets the others, all of them."""
    monkeypatch.setattr(indexing, "STALE_SHARE", 10.0)
    with Gallery.create(tmp_path / "g", dim=16, search="ivf", search_recall=0.5) as gallery:
        vectors, labels = people(200)
        gallery.enroll(embeddings=vectors, labels=labels)
        gallery.enroll(embeddings=unit(vectors[:1] + 0.01 * np.ones((400, 1)) * vectors[:1]), labels="crowd")
        assert settle(gallery)["used"] == "ivf"
        gallery.compact()
        settle(gallery)
        gallery.remove("crowd")
        assert gallery._snapshot.index is not None
        near = gallery.search(embeddings=vectors[:1], k=10)
        truth = np.argsort(-(vectors @ vectors[0]))[:10]
        assert near.ids[0].tolist() == (truth + 1).tolist()


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_the_report_is_true(tmp_path, small_scale, kind):
    with large(tmp_path / "g", kind=kind, recall=0.9) as gallery:
        report, now = gallery.info()["search"], gallery._snapshot
        assert (report["kind"], report["used"], report["building"]) == (kind, kind, False)
        measured = report["measured"]
        asked, held = search._probes(now.matrix, now.row_codes, np.arange(len(now)))
        assert measured["probes"] == len(asked) == 300
        assert measured["templates"] == 1000
        assert (held >= 0).all()  # everybody has several templates: the probe itself is held out
        hits, scored = 0, []
        for query, own in zip(asked.astype(np.float64), held.tolist(), strict=True):
            truth = now.matrix.astype(np.float64) @ query
            truth[own] = -np.inf
            order = np.argsort(-truth)[:10]
            rows = now.index._candidates(now.row_ids, now.matrix, query[None].astype(np.float32), 11, None)[1]
            kept = [row for row in rows[0].tolist() if row not in (own, -1)][:10]
            scored.append((truth[order[0]], truth[kept[0]], now.row_codes[order[0]] == now.row_codes[kept[0]]))
            hits += len(set(kept) & set(order.tolist()))
        differing = [
            sum(
                found < exact - 1e-6 and threshold <= exact and (threshold > found or not same)
                for exact, found, same in scored
            )
            for threshold, _, _ in scored
        ]
        assert measured["decisions"] == pytest.approx(1 - max(differing) / 300, abs=1e-9)
        assert kind == "hnsw" or max(differing) > 0, "else nothing was tested"
        assert measured["decisions"] >= 0.9
        assert measured["recall_at_10"] == pytest.approx(hits / 3000, abs=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_decisions_count_at_the_worst_threshold(seed):
    random = np.random.default_rng(seed)
    exact = random.uniform(0, 1, 60).round(1).astype(np.float32)  # many ties
    found = np.where(random.random(60) < 0.5, exact, exact - random.uniform(0, 0.4, 60)).astype(np.float32)
    same = random.random(60) < 0.6
    differing = [
        sum(f < e - 1e-6 and t <= e and (t > f or not s) for e, f, s in zip(exact, found, same, strict=True))
        for t in np.concatenate([exact, found, np.nextafter(found, np.float32(2))])
    ]
    assert search._decided_alike(exact, found, same) == pytest.approx(1 - max(differing) / 60)
    assert search._decided_alike(exact, exact, same) == 1


def test_identities_that_stand_alone_are_measured_with_disturbed_probes():
    vectors = unit(np.random.default_rng(0).standard_normal((500, 16))).astype(np.float32)
    asked, held = search._probes(vectors, np.arange(500), np.arange(500))
    assert (held == -1).all()
    assert np.median((asked @ vectors.T).max(axis=1)) == pytest.approx(
        0.7, abs=0.03
    )  # as if the pictures were 0.7 alike


def test_a_target_that_no_index_meets_leaves_the_search_exact(tmp_path, small_scale, monkeypatch, caplog):
    monkeypatch.setattr(search, "DEPTHS", (1,))  # an index that knows nothing but cells and codes
    vectors, labels = people(450, 2, noise=1.0)  # nobody looks like himself
    with Gallery.create(tmp_path / "g", dim=16, search="ivf", search_recall=1.0) as gallery:
        gallery.enroll(embeddings=vectors, labels=labels)
        report = settle(gallery)
        assert (report["used"], report["measured"]) == ("exact", None)
        assert 0 < report["missed_the_target"][0]["decisions"] < 1
        assert "searches stay exact; configure(search_recall=...) sets a lower target" in caplog.text
        tries = threading.active_count()
        gallery.enroll(embeddings=vectors[:1], labels="x")
        assert threading.active_count() == tries  # not tried again for one more
        gallery.configure(search_recall=0.05)
        assert settle(gallery)["used"] == "ivf"
        gallery.configure(search_recall=1.0)  # at once, not after the next building
        assert gallery._snapshot.index is None


def test_settings_of_the_search_leave_the_calibration(tmp_path, small_scale):
    with large(tmp_path / "g", kind="auto") as gallery:
        gallery.calibrate(embeddings=np.random.default_rng(0).standard_normal((100, 16)), fpir=0.05)
        found = gallery.calibration
        answers = [answer.label for answer in gallery.identify(embeddings=probes(people(250)[0], 300))]
        gallery.configure(search="exact")
        assert settle(gallery)["used"] == "exact"
        assert gallery.calibration == found
        exact = [answer.label for answer in gallery.identify(embeddings=probes(people(250)[0], 300))]
        assert np.mean([a == b for a, b in zip(answers, exact, strict=True)]) >= 0.97
        before = gallery.generation
        gallery.configure(search="exact")
        assert gallery.generation == before
        with pytest.raises(ValueError, match="search is one of auto, exact, hnsw, ivf; got 'fast'"):
            gallery.configure(search="fast")
        for recall in (0, 1.5, "high", True):
            with pytest.raises(ValueError, match="search_recall is the share of probes"):
                gallery.configure(search_recall=recall)


# ---- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def spied(monkeypatch):
    """What reaches FAISS's reader, and how often an index is built."""
    calls = {"read": 0, "built": 0}
    read, build = faiss.read_index, Index.build

    def reading(*args):
        calls["read"] += 1
        return read(*args)

    def building(*args, **kwargs):
        calls["built"] += 1
        return build(*args, **kwargs)

    monkeypatch.setattr(faiss, "read_index", reading)
    monkeypatch.setattr(Index, "build", building)
    return calls


def cached(folder):
    return sorted(path.name for path in (folder / "cache").iterdir())


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_a_cached_index_is_used_again(tmp_path, small_scale, spied, kind):
    with large(tmp_path / "g", kind=kind) as gallery:
        queries = probes(people(250)[0])
        want = gallery.search(embeddings=queries, k=1)
        measured = gallery.info()["search"]["measured"]
        (name,) = cached(gallery.folder)
        digest = hashlib.blake2b((gallery.folder / "cache" / name).read_bytes(), digest_size=16).hexdigest()
        assert name == f"index-{digest}.faiss"
        gallery.enroll(embeddings=people(3, seed=9)[0], labels="later")
    for read_only in (False, True):
        with Gallery.open(tmp_path / "g", read_only=read_only) as again:
            assert settle(again)["measured"] == measured
            got = again.search(embeddings=queries, k=1)
            np.testing.assert_array_equal(got.ids, want.ids)
            np.testing.assert_array_equal(got.scores, want.scores)
            assert again.search(embeddings=people(3, seed=9)[0], k=1).labels == [["later"]] * 12
    assert spied == {"read": 2, "built": 1}


@pytest.mark.parametrize("what", ["flipped", "cut", "longer", "swapped", "older", "missing", "version"])
def test_a_cache_that_does_not_fit_never_reaches_faiss(tmp_path, small_scale, spied, what, monkeypatch):
    with large(tmp_path / "g") as gallery:
        queries = probes(people(250)[0])
        path = gallery.folder / "cache" / cached(gallery.folder)[0]
        before = path.read_bytes()
        if what == "older":
            gallery.enroll(embeddings=people(20, seed=3)[0], labels="more")
            gallery.compact()
            settle(gallery)
            path = gallery.folder / "cache" / cached(gallery.folder)[0]
        want = gallery.search(embeddings=queries, k=1)
    if what == "swapped":
        with large(tmp_path / "other", identities=260) as other:
            other_path = other.folder / "cache" / cached(other.folder)[0]
        shutil.copyfile(other_path, path)
    elif what == "missing":
        path.unlink()
    elif what == "version":
        monkeypatch.setattr(faiss, "__version__", "0.0")
    else:
        middle = len(before) // 2
        path.write_bytes(
            {
                "flipped": before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :],
                "cut": before[:-1],
                "longer": before + b"\0",
                "older": before,
            }[what]
        )
    spied.update(read=0, built=0)
    with Gallery.open(tmp_path / "g") as again:
        assert settle(again)["used"] == "ivf"
        assert spied == {"read": 0, "built": 1}
        np.testing.assert_array_equal(again.search(embeddings=queries, k=1).ids, want.ids)
        assert len(cached(again.folder)) == 1
    with Gallery.open(tmp_path / "g") as again:  # which has written a good one
        assert settle(again)["used"] == "ivf"
    assert spied == {"read": 1, "built": 1}


def test_a_reader_builds_for_itself_and_writes_nothing(tmp_path, small_scale, spied):
    large(tmp_path / "g").close()
    for path in (tmp_path / "g" / "cache").iterdir():
        path.unlink()
    with Gallery.open(tmp_path / "g", read_only=True) as reader:
        assert settle(reader)["used"] == "ivf"
        assert cached(reader.folder) == []


def test_a_disk_that_takes_no_cache_leaves_the_index_in_memory(tmp_path, small_scale, monkeypatch, caplog):
    def full(index, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Index, "save", full)
    with large(tmp_path / "g") as gallery:
        assert "could not be cached: [Errno 28] No space left on device" in caplog.text
        assert cached(tmp_path / "g") == []
        gallery.enroll(embeddings=people(1)[0], labels="x")
        assert gallery.check().ok


@pytest.mark.parametrize("kind", ["auto", "ivf"])
def test_a_building_that_fails_is_told_and_not_repeated_for_ever(tmp_path, small_scale, monkeypatch, caplog, kind):
    tries = []

    def failing(*args, **kwargs):
        tries.append(1)
        raise MemoryError("no room for an index")

    monkeypatch.setattr(Index, "build", failing)
    with Gallery.create(tmp_path / "g", dim=16, search=kind) as gallery:
        gallery.enroll(embeddings=people(250)[0], labels=people(250)[1])
        assert settle(gallery)["used"] == "exact"
        gallery.enroll(embeddings=people(2)[0], labels="more")
        settle(gallery)
        assert len(tries) == 1
        assert "no room for an index" in caplog.text
        assert gallery.search(embeddings=people(250)[0][:1], k=1).ids[0, 0] == 1


def test_a_compact_while_an_index_is_built_is_not_forgotten(tmp_path, small_scale, monkeypatch):
    started, go_on, build = threading.Event(), threading.Event(), Index.build

    def waiting(*args, **kwargs):
        found = build(*args, **kwargs)
        started.set()
        assert go_on.wait(30)
        return found

    monkeypatch.setattr(Index, "build", waiting)
    with Gallery.create(tmp_path / "g", dim=16, search="ivf", search_recall=0.9) as gallery:
        gallery.enroll(embeddings=people(250)[0], labels=people(250)[1])
        assert started.wait(30)
        gallery.remove("p3")
        gallery.compact()
        go_on.set()
        settle(gallery)
        assert gallery._snapshot.index.measured.templates == len(gallery) == 996


def test_a_purge_drops_the_index_and_what_is_being_built(tmp_path, small_scale, monkeypatch):
    started, go_on, build = threading.Event(), threading.Event(), Index.build
    with large(tmp_path / "g") as gallery:
        old = gallery._snapshot.index
        name = cached(gallery.folder)
        gallery.remove("p0", purge=True)
        assert settle(gallery)["used"] == "ivf"
        assert gallery._snapshot.index is not old
        assert gallery._snapshot.index.measured.templates == len(gallery)  # the cached one was not taken up again
        assert gallery._snapshot.removed == 0
        assert cached(gallery.folder) != name

        def waiting(*args, **kwargs):
            found = build(*args, **kwargs)
            started.set()
            assert go_on.wait(30)
            return found

        monkeypatch.setattr(Index, "build", waiting)
        gallery.enroll(embeddings=people(20, seed=4)[0], labels="secret")  # stale: an index of these is under way
        assert started.wait(30)
        secret = gallery.search(embeddings=people(1, seed=4)[0], k=1)  # searches do not wait for it
        assert secret.labels[0] == ["secret"]
        gallery.remove("secret", purge=True)
        assert cached(gallery.folder) == []
        go_on.set()
        settle(gallery)
        assert gallery._snapshot.index.measured.templates == len(gallery)
        assert gallery._snapshot.index.last_id == gallery._snapshot.ids[-1]
        assert len(cached(gallery.folder)) == 1


def test_readers_in_other_processes_follow(tmp_path, small_scale):
    code = """
        import sys
        from embedlab import Gallery
        from embedlab.retrieval import indexing
        indexing.FEWEST_ROWS = 700
        with Gallery.open(sys.argv[1], read_only=True) as reader:
            for line in sys.stdin:
                near = reader.search(embeddings=[[float(x) for x in line.split()]], k=1)
                reader._keeper.wait()
                print(near.labels[0][0], reader.info()["search"]["used"], flush=True)
    """
    with large(tmp_path / "g") as gallery:
        arguments = [sys.executable, "-c", textwrap.dedent(code), str(gallery.folder)]
        child = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def ask(vector):
            child.stdin.write(" ".join(map(str, vector.tolist())) + "\n")
            child.stdin.flush()
            return child.stdout.readline().split()

        vector, new = people(250)[0][40], unit(np.ones((1, 16)))
        assert ask(vector) == ["p10", "ivf"]
        gallery.enroll(embeddings=new, labels="new")
        assert ask(new[0]) == ["new", "ivf"]
        gallery.rename("p10", "Ada")
        assert ask(vector) == ["Ada", "ivf"]
        gallery.remove("Ada")
        assert ask(vector)[0] not in ("Ada", "p10")
        child.stdin.close()
        child.stdout.close()
        assert child.wait(30) == 0


# ---- memory --------------------------------------------------------------------------------------------------------


def test_no_change_copies_the_vectors(tmp_path):
    with Gallery.create(tmp_path / "g", dim=16) as gallery:
        gallery.enroll(embeddings=people(100)[0], labels=people(100)[1])
    with Gallery.open(tmp_path / "g") as gallery:
        matrix = gallery._snapshot.matrix
        gallery.enroll(embeddings=people(5, seed=2)[0], labels="more")
        gallery.rename("p3", "Ada")
        gallery.merge("p4", "Ada")
        gallery.remove("p5")
        gallery.search(embeddings=matrix[:3], k=3)
        gallery.identify(embeddings=matrix[:3])
        now = gallery._snapshot
        assert np.shares_memory(now.matrix, matrix)
        assert now.removed == 4
        assert not {"vectors", "labels"} & now.__dict__.keys()  # what would be a second copy was never asked for
        assert gallery.check().ok
        assert len(gallery.embeddings()) == len(now)
        assert "vectors" not in gallery._snapshot.__dict__
        gallery.remove(gallery.labels()[:30])
        assert gallery._snapshot.removed == 0  # too many gaps: closed once


def fill(count, seed=0, dim=4):
    random_ = np.random.default_rng(seed)
    vectors = unit(random_.standard_normal((count, dim))).astype(np.float32)
    return vectors, [f"n{i}" for i in random_.integers(0, 6, count)]


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["closing gaps at once", "leaving gaps"])
@pytest.mark.parametrize("seed", range(3))
def test_snapshots_equal_lists_and_older_ones_stay(monkeypatch, seed, share):
    """All that a snapshot tells is as from plain lists, and no later change shows in it."""
    monkeypatch.setattr(snapshot, "MOST_REMOVED", share)
    dice = random.Random(seed)
    meta = Meta("0" * 32, 4, None, False, {})
    vectors, labels = fill(5, seed)
    start = Contents(meta, np.arange(1, 6), labels, [None] * 5, vectors, 0)
    now, rows, seen, next_id = Snapshot.of(start), list(zip(range(1, 6), labels, vectors, strict=True)), [], 6

    def check(snap, rows):
        assert snap.ids.tolist() == [key for key, _, _ in rows]
        assert snap.labels.tolist() == [label for _, label, _ in rows]
        assert [snap.names[code] for code in snap.codes.tolist()] == snap.labels.tolist()
        assert set(snap.names) == {label for _, label, _ in rows}
        assert len(snap) == len(rows)
        np.testing.assert_array_equal(snap.vectors, [vector for _, _, vector in rows] or np.zeros((0, 4)))
        for code, name in enumerate(snap.names):
            own = [row for row, (_, label, _) in enumerate(rows) if label == name]
            assert snap.code_of(name) == code
            assert snap.templates[code] == len(own)
            np.testing.assert_allclose(snap.means[code], np.mean([rows[row][2] for row in own], axis=0), atol=1e-6)
        assert snap.code_of("nobody") is None
        everything = np.arange(len(rows))
        np.testing.assert_array_equal(snap.take(everything), snap.vectors)
        assert snap.labels_of(everything[:, None]) == [[label] for _, label, _ in rows]
        assert sorted(snap.by_identity.tolist()) == everything.tolist()
        if rows:
            scores, found = snap.nearest(snap.vectors, min(3, len(rows)))
            truth = snap.vectors.astype(np.float64) @ snap.vectors.T.astype(np.float64)
            np.testing.assert_allclose(scores, -np.sort(-truth, axis=1)[:, :3], atol=1e-6)
            np.testing.assert_allclose(scores, np.take_along_axis(truth, found, 1), atol=1e-6)

    for _ in range(40):
        action = dice.choice(["add", "add", "remove", "rename", "merge", "describe", "fork"])
        names = sorted({label for _, label, _ in rows})
        seen.append((now, list(rows)))
        if action in ("add", "fork"):
            base, known = (now, rows) if action == "add" else dice.choice(seen)
            count = dice.randint(1, 4)
            vectors, labels = fill(count, dice.randrange(99))
            ids = np.arange(next_id, next_id + count)
            now = base.appended(Contents(meta, ids, labels, [None] * count, vectors, 0))
            rows = known + list(zip(ids.tolist(), labels, vectors, strict=True))
            next_id += count
        elif action == "remove" and rows:
            keep = np.array([dice.random() < 0.7 for _ in rows])
            now, rows = now.kept(meta, keep), [row for row, stays in zip(rows, keep, strict=True) if stays]
        elif action == "rename" and names:
            fresh = f"new {next_id}{len(seen)}"
            now = now.relabelled(meta, names[0], fresh)
            rows = [(key, fresh if label == names[0] else label, vector) for key, label, vector in rows]
        elif action == "merge" and len(names) > 1:
            now = now.relabelled(meta, names[0], names[1])
            rows = [(key, names[1] if label == names[0] else label, vector) for key, label, vector in rows]
        else:
            now = now.described(meta)
        check(now, rows)
    for snap, known in seen:
        check(snap, known)


# ---- opening -------------------------------------------------------------------------------------------------------


@pytest.fixture
def behind(monkeypatch):
    """Galleries of thirty templates are read behind `open`."""
    monkeypatch.setattr(folder_module, "LOAD_BEHIND", 30)
    monkeypatch.setattr(folder_module, "VERIFIED_AT_ONCE", 16)


@pytest.fixture
def slowly(monkeypatch):
    """Reading and verifying wait for these two."""
    may_read, may_verify = threading.Event(), threading.Event()
    load, misfits = folder_module.Store.load, folder_module.storage.misfits
    main = threading.current_thread()

    def loading(self, **options):
        assert may_read.wait(20)
        return load(self, **options)

    def verifying(*args):
        if threading.current_thread() is not main:
            assert may_verify.wait(20)
        return misfits(*args)

    monkeypatch.setattr(folder_module.Store, "load", loading)
    monkeypatch.setattr(folder_module.storage, "misfits", verifying)
    return may_read, may_verify


def stored_gallery(folder):
    with Gallery.create(folder, dim=16) as gallery:
        gallery.enroll(embeddings=people(20)[0], labels=people(20)[1])
        return gallery.embeddings().vectors


def flip(folder, content):
    path = folder / "gallery.db"
    bad = bytearray(path.read_bytes())
    bad[bad.find(content) + 1] ^= 4
    path.write_bytes(bad)


def test_opening_waits_neither_for_reading_nor_for_verifying(tmp_path, behind, slowly):
    may_read, may_verify = slowly
    may_read.set()
    vectors = stored_gallery(tmp_path / "g")
    may_read.clear()
    with Gallery.open(tmp_path / "g") as gallery:
        assert repr(gallery).endswith("still reading 80 templates)")
        assert not gallery.verified
        threading.Timer(0.1, may_read.set).start()
        answer = gallery.identify(embeddings=vectors[:1])[0]  # waits for the templates, not for their digests
        assert (answer.best, answer.verified, answer.to_dict()["verified"]) == ("p0", False, False)
        assert len(gallery) == 80
        gallery.enroll(embeddings=vectors[:1], labels="meanwhile")
        assert gallery.info()["verified"] is False
        may_verify.set()
        gallery._reader.join()
        assert gallery.verified
        assert gallery.identify(embeddings=vectors[:1])[0].verified
        assert gallery.check().ok


def test_an_embedder_is_judged_before_the_templates_are_read(tmp_path, behind, slowly, caplog):
    may_read, may_verify = slowly
    may_read.set()
    may_verify.set()

    def colours(images):
        return np.asarray(images, np.float32).mean(axis=(2, 3)) + 1

    def others(images):
        return np.asarray(images, np.float32).max(axis=(2, 3)) + 1

    images = np.random.default_rng(0).integers(0, 255, (60, 3, 8, 8), dtype=np.uint8)
    with Gallery.create(tmp_path / "g", colours) as gallery:
        gallery.enroll(images, labels="x")
    may_read.clear()
    with Gallery.open(tmp_path / "g", colours) as gallery:
        assert "still reading" in repr(gallery)
        may_read.set()
        assert len(gallery) == 60
    may_read.clear()
    threading.Timer(0.2, may_read.set).start()
    with pytest.raises(ValueError, match="was made with the embedder"):
        Gallery.open(tmp_path / "g", others)  # waits for the reader to give up
    assert "embedlab: reading a gallery" not in {thread.name for thread in threading.enumerate()}
    may_read.clear()
    gallery = Gallery.open(tmp_path / "g")
    threading.Timer(0.2, may_read.set).start()
    gallery.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("read_only", [False, True])
def test_damage_that_is_found_behind_is_an_error_of_every_later_call(tmp_path, behind, slowly, read_only):
    may_read, may_verify = slowly
    may_read.set()
    flip(tmp_path / "g", stored_gallery(tmp_path / "g")[41].tobytes())
    with Gallery.open(tmp_path / "g", read_only=read_only) as gallery:
        assert gallery.search(embeddings=np.ones((1, 16)), k=1).ids[0, 0] > 0
        may_verify.set()
        gallery._reader.join()
        assert not gallery.verified
        for call in (
            lambda: gallery.search(embeddings=np.ones((1, 16))),
            lambda: gallery.identify(embeddings=np.ones((1, 16))),
            lambda: gallery.labels(),
            lambda: gallery.embeddings(),
            lambda: gallery.info(),
            lambda: len(gallery),
        ):
            with pytest.raises(GalleryDamaged, match=r"1 templates do not fit their digests \(id 42\).*salvage=True"):
                call()
        if not read_only:
            with pytest.raises(GalleryDamaged, match="id 42"):
                gallery.enroll(embeddings=np.ones((1, 16)), labels="x")
        assert "id 42" in gallery.check().problems[0]
    with Gallery.open(tmp_path / "g", salvage=True) as rest:
        assert len(rest) == 79


def test_a_lost_row_is_found_by_the_first_question(tmp_path, behind):
    import sqlite3

    stored_gallery(tmp_path / "g")
    with sqlite3.connect(tmp_path / "g" / "gallery.db") as database:
        database.execute("DELETE FROM item WHERE id = 7")
    database.close()
    with Gallery.open(tmp_path / "g", read_only=True) as gallery:
        for _ in range(2):
            with pytest.raises(GalleryDamaged, match="79 whole templates were read where 80 others were stored"):
                gallery.labels()


def test_small_galleries_are_verified_before_open_returns(tmp_path):
    flip(tmp_path / "g", stored_gallery(tmp_path / "g")[41].tobytes())
    with pytest.raises(GalleryDamaged, match="id 42"):
        Gallery.open(tmp_path / "g")


def test_closing_does_not_wait_for_the_rest(tmp_path, behind, monkeypatch):
    stored_gallery(tmp_path / "g")
    misfits, verified = folder_module.storage.misfits, []

    def slow(*args):
        verified.append(args[1])
        time.sleep(0.05)
        return misfits(*args)

    monkeypatch.setattr(folder_module.storage, "misfits", slow)
    gallery = Gallery.open(tmp_path / "g")
    gallery.labels()
    gallery.close()
    assert len(verified) < 5
    assert not gallery._reader.is_alive()
    Gallery.open(tmp_path / "g").close()  # the lock is free


def test_a_process_that_forgets_to_close_ends(tmp_path):
    stored_gallery(tmp_path / "g")
    code = f"""
        import threading, time
        from embedlab.retrieval import folder
        folder.LOAD_BEHIND, folder.VERIFIED_AT_ONCE = 30, 1
        misfits = folder.storage.misfits
        folder.storage.misfits = lambda *args: time.sleep(1) or misfits(*args)
        opened = folder.Gallery.open({str(tmp_path / "g")!r})
        print(len(opened), opened.verified)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout.split(), done.stderr, done.returncode) == (["80", "False"], "", 0)


def test_reading_shares_equal_texts_and_takes_one_table(tmp_path):
    with Gallery.create(tmp_path / "g", dim=16) as gallery:
        gallery.enroll(embeddings=people(20)[0], labels=people(20)[1], metadata={"site": "north"})
    with Gallery.open(tmp_path / "g") as gallery:
        contents = gallery._store.load(verify=False)
        assert len({id(label) for label in contents.labels}) == 20
        assert len({id(note) for note in contents.metadata}) == 1
        assert np.shares_memory(Snapshot.of(contents).matrix, contents.vectors)


def test_the_cache_holds_nothing_half_written(tmp_path, small_scale):
    """A process that dies while it writes an index leaves a file that the next writer replaces."""
    with large(tmp_path / "g") as gallery:
        (name,) = cached(gallery.folder)
    leftover = Path(tmp_path / "g" / "cache" / "index.new")
    leftover.write_bytes(os.urandom(100))
    (tmp_path / "g" / "cache" / name).unlink()
    with Gallery.open(tmp_path / "g") as again:
        assert settle(again)["used"] == "ivf"
        assert cached(again.folder) == [name] or len(cached(again.folder)) == 1
        assert not leftover.exists()
