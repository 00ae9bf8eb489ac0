"""Damaged files, full disks, several processes at once, erasure: never a wrong answer, never a loss in silence.

Short tiers run with the suite; `pytest -m full -s tests/test_gallery_faults.py` runs the full ones and prints figures.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from harness_gallery import (
    FILES,
    create,
    means,
    read_log,
    unit,
)

from embedlab import Gallery
from embedlab.retrieval import GalleryError
from embedlab.retrieval import store as storage
from embedlab.retrieval.folder import FolderGallery
from embedlab.retrieval.store import Store

HARNESS = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "OMP_NUM_THREADS": "1"}
PROBES = np.random.default_rng(5).standard_normal((3, 4))


def full_tier(short, full):
    return [pytest.param(short, id="short"), pytest.param(full, marks=pytest.mark.full, id="full")]


# ---- damaged bytes ---------------------------------------------------------------------------------------------------


def everything(folder, *, in_log):
    """The smallest gallery that has something in every table; its last change is in the log, or folded in."""
    gallery = create(folder)
    images = np.random.default_rng(0).integers(0, 255, (3, 3, 8, 8), dtype=np.uint8)
    gallery.enroll(images, labels=["Ada", "Grace", "Mary"], metadata={"site": "north"}, key="first")
    with gallery._changing() as (meta, now, publish):
        gallery._store.write_cohort(meta, unit(PROBES).astype(np.float32))
        publish(lambda: now.described(meta))
    others = np.random.default_rng(1).standard_normal((80, 4)) - 2
    gallery.calibrate(embeddings=others, fpir=0.05)
    gallery._store.truncate_log()
    gallery.rename("Mary", "Rosalind")
    if not in_log:
        gallery.close()
    return gallery


def answers(folder, *, read_only=True):
    """All that a gallery says of itself, through every table."""
    with Gallery.open(folder, read_only=read_only) as gallery:
        stored, store = gallery.embeddings(), gallery._store
        return {
            "templates": (stored.ids.tolist(), stored.labels, stored.vectors.tobytes(), gallery.metadata()),
            "identified": [answer.to_dict() for answer in gallery.identify(embeddings=PROBES, k=2)],
            "calibration": gallery.calibration,
            "settings": gallery.info()["settings"],
            "thumbnails": [gallery.thumbnail(i) for i in stored.ids],
            "references": [(image, vector.tobytes()) for image, vector in store.references()],
            "cohort": store.cohort().tobytes(),
            "request": store.recall("first"),
            "nobody": store.recall("second"),
        }


def outcome(folder, want, **options):
    """Refused with an error of our own, or every answer as before; anything else fails the test."""
    try:
        got, refusal = answers(folder, **options), ""
    except GalleryError as error:
        got, refusal = None, str(error)
    assert got == want or str(folder) in refusal
    return "refused" if refusal else "harmless"


class Copies:
    """A folder that gets back the files of a gallery after every damage."""

    def __init__(self, gallery, place):
        self.folder = place
        self.good = {name: (gallery.folder / name).read_bytes() for name in FILES if (gallery.folder / name).exists()}
        self.restore()
        self.want = answers(place)

    def restore(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "cache").mkdir(parents=True)
        for name, content in self.good.items():
            (self.folder / name).write_bytes(content)

    def flipped(self, name, place, bit):
        """Turn one bit over; opening for reading changes no file, so only this byte must be put back."""
        path = self.folder / name
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([self.good[name][place] ^ 1 << bit]))
        try:
            return outcome(self.folder, self.want)
        finally:
            with open(path, "r+b") as file:
                file.seek(place)
                file.write(self.good[name][place : place + 1])

    def written(self, name, content, **options):
        """Another content of one file, None for none."""
        self.restore()
        if content is None:
            (self.folder / name).unlink()
        else:
            (self.folder / name).write_bytes(content)
        return outcome(self.folder, self.want, **options)


def flips(copies, count):
    """Places to damage: all of them, or a sample that looks at bytes in use more often than at free ones."""
    dice = random.Random(0)
    places = [(name, place) for name, content in copies.good.items() for place in range(len(content))]
    if count is None:
        return [(name, place, dice.randrange(8)) for name, place in places]
    used = [(name, place) for name, place in places if copies.good[name][place]]
    return [(*spot, dice.randrange(8)) for spot in dice.sample(used, count * 3 // 4) + dice.sample(places, count // 4)]


@pytest.mark.parametrize("in_log", [False, True], ids=["closed", "with its log"])
@pytest.mark.parametrize("count", full_tier(600, None))
def test_no_flipped_bit_gives_a_wrong_answer(memory, in_log, count):
    gallery = everything(memory / "g", in_log=in_log)
    copies = Copies(gallery, memory / "copy")
    assert ("gallery.db-wal" in copies.good) == in_log
    results = Counter()
    for name, place, bit in flips(copies, count):
        results[name, copies.flipped(name, place, bit)] += 1
    assert {name: (copies.folder / name).read_bytes() for name in copies.good} == copies.good
    gallery.close()
    print(f"\n{results.total()} flips: 0 wrong answers; {dict(results)}")
    assert results["gallery.db", "refused"] > 0.2 * (count or 0)
    assert results["gallery.generation", "refused"] == 0  # two slots: one flip leaves the newer or the other


def test_without_digests_flipped_bits_go_unseen(memory, monkeypatch):
    gallery = everything(memory / "g", in_log=False)
    copies = Copies(gallery, memory / "copy")
    monkeypatch.setattr(storage, "_fits", lambda table, row: True)
    monkeypatch.setattr(storage, "misfits", lambda contents, start, stop: [])
    place = copies.good["gallery.db"].index(copies.want["templates"][2][:16])  # the first vector
    with pytest.raises(AssertionError):
        copies.flipped("gallery.db", place, 3)


def cuts_and_swaps(copies, other, older):
    """Name and content of some 400 files that are not what they should be."""
    for name, content in copies.good.items():
        yield from ((name, content[:end]) for end in range(0, len(content), 512))
        pages = range(0, len(content), 16384 if name == "gallery.db" else 512)
        yield from ((name, content[:at] + bytes(pages.step) + content[at + pages.step :]) for at in pages)
        yield name, None
        yield from ((name, files[name]) for files in (other, older) if name in files)


def test_cut_zeroed_swapped_and_missing_files(memory):
    other = Copies(everything(memory / "other", in_log=True), memory / "copy of other").good
    gallery = everything(memory / "g", in_log=True)
    older = Copies(gallery, memory / "older").good
    gallery.rename("Ada", "Augusta")
    copies, results = Copies(gallery, memory / "copy"), Counter()
    for number, (name, content) in enumerate(cuts_and_swaps(copies, other, older)):
        if content != copies.good[name]:
            results[name, copies.written(name, content, read_only=number % 4 > 0)] += 1
    gallery.close()
    print(f"\n{results.total()} files cut, zeroed, swapped or missing: 0 wrong answers; {dict(results)}")
    assert results.total() >= 300
    assert results["gallery.db-wal", "refused"] > 50


def test_without_the_generation_file_a_lost_log_goes_unseen(memory, monkeypatch):
    gallery = everything(memory / "g", in_log=True)
    copies = Copies(gallery, memory / "copy")
    assert copies.written("gallery.db-wal", None) == "refused"
    monkeypatch.setattr(storage, "read_generation", lambda path: [(gallery._store.opened.uuid, 0)])
    with pytest.raises(AssertionError):
        copies.written("gallery.db-wal", None)


# ---- a full disk -----------------------------------------------------------------------------------------------------

FULL = """
import json, os, sys
import numpy as np
from embedlab import Gallery
from embedlab.retrieval import GalleryError
place = sys.argv[1]
for kilobytes in json.loads(sys.argv[2]):
    os.system(f"mount -t tmpfs -o size={kilobytes}k tmpfs {place}")
    folder, ballast = f"{place}/g", f"{place}/ballast"
    with open(ballast, "wb") as file:
        file.write(bytes(200_000))
    acknowledged, random = 0, np.random.default_rng(0)
    gallery = Gallery.create(folder, dim=64)
    try:
        while True:
            gallery.enroll(embeddings=random.standard_normal((200, 64)), labels=f"p{acknowledged}")
            acknowledged += 1
    except GalleryError as error:
        assert folder in str(error) and ("full" in str(error) or "space" in str(error)), error
    gallery.identify(embeddings=np.ones((1, 64)))
    gallery.close()
    removed = set()
    try:
        with Gallery.open(folder) as gallery:
            there = len(gallery.labels())
            assert there - acknowledged in (0, 1), f"{there} of {acknowledged} acknowledged enrollments are there"
            held = set(gallery.labels())
            gallery.identify(embeddings=np.ones((1, 64)))
            gallery.remove("p0")
            removed = {"p0"}
    except GalleryError as error:
        print("refused", error)
    os.unlink(ballast)
    with Gallery.open(folder) as gallery:
        labels = set(gallery.labels())
        assert {f"p{i}" for i in range(acknowledged)} - labels <= {"p0"} and not removed & labels
        gallery.enroll(embeddings=random.standard_normal((20, 64)), labels="again")
        assert gallery.check().ok
    os.system(f"umount {place}")
    print("size", kilobytes, acknowledged, flush=True)
"""

SWALLOWED = """
from embedlab import Gallery
from embedlab.retrieval import GalleryError
honest = Gallery.enroll
def enroll(gallery, **given):
    try:
        honest(gallery, **given)
    except GalleryError as error:
        if "stopped writing" in str(error):
            raise
Gallery.enroll = enroll
"""


def filled(tmp_path, sizes, planted=""):
    """Fill disks of so many kilobytes, with a bug planted; returns what was printed."""
    shell = ["unshare", "-rm", sys.executable, "-c", planted + FULL, str(tmp_path), json.dumps(sizes)]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("NO DISK FILLED: 'unshare -rm' is not allowed here, which makes a small disk in memory.")
    done = subprocess.run(shell, capture_output=True, text=True, check=False, env=HARNESS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("size") == len(sizes)
    return done.stdout


@pytest.mark.parametrize("sizes", full_tier([1500, 4096], [1000 + 700 * i for i in range(20)]))
def test_a_full_disk_loses_nothing(tmp_path, sizes):
    print(f"\n{len(sizes)} full disks: 0 acknowledged enrollments lost\n{filled(tmp_path, sizes)}")


def test_an_enrollment_that_swallows_the_error_of_the_disk_is_found(tmp_path):
    with pytest.raises(AssertionError, match=r"AssertionError: \d+ of \d+ acknowledged enrollments are there"):
        filled(tmp_path, [1500], SWALLOWED)


# ---- several at once -------------------------------------------------------------------------------------------------

WRITER = """
import os, sys, time
import numpy as np
from embedlab import Gallery
from embedlab.retrieval import GalleryLocked
from harness_gallery import Log
folder, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
log, made, refused, longest = Log(f"{folder}.{name}"), 0, 0, 0.0
while not all(os.path.exists(f"{folder}.{other}") for other in "ab"):
    time.sleep(0.001)
while made < count:
    start = time.monotonic()
    try:
        gallery = Gallery.open(folder)
    except GalleryLocked as error:
        assert "process" in str(error)
        refused, longest = refused + 1, max(longest, time.monotonic() - start)
        time.sleep(0.001)
        continue
    with gallery:
        log.note("holds", time.monotonic())
        for _ in range(min(10, count - made)):
            log.note("id", int(gallery.enroll(embeddings=np.ones((1, 4)), labels=f"{name} {made}")[0]))
            made += 1
        log.note("lets go", time.monotonic())
    time.sleep(0.002)
log.note("refused", [refused, longest])
"""

UNLOCKED = """
from embedlab.retrieval import store
store._lock_file = lambda handle: None
"""


def two_writers(folder, count, planted=""):
    """Two processes that enroll in turns, with a bug planted; returns their refusals."""
    Gallery.create(folder, dim=4).close()
    writers = [
        subprocess.Popen([sys.executable, "-c", planted + WRITER, str(folder), name, str(count)], env=HARNESS)
        for name in "ab"
    ]
    codes = [writer.wait() for writer in writers]
    lines = [line for name in "ab" for line in read_log(f"{folder}.{name}")]
    turns = sorted((moment, kind) for kind, moment in lines if kind in ("holds", "lets go"))
    for (_, before), (moment, after) in pairwise(turns):
        assert before != after, f"two writers held the gallery at the same time, at {moment}"
    assert codes == [0, 0]
    ids = [content for kind, content in lines if kind == "id"]
    refusals = [content for kind, content in lines if kind == "refused"]
    with Gallery.open(folder) as gallery:
        assert sorted(ids) == gallery.embeddings().ids.tolist() == list(range(1, 2 * count + 1))
        assert set(gallery.labels()) == {f"{name} {i}" for name in "ab" for i in range(count)}
    assert sum(times for times, _ in refusals) > 0
    return refusals


@pytest.mark.parametrize("count", full_tier(100, 1000))
def test_two_writers_lose_and_repeat_nothing(tmp_path, count):
    refusals = two_writers(tmp_path / "g", count)
    print(f"\n2 x {count} enrollments by two writers: {refusals} refusals and the longest in seconds, 0 lost, 0 twice")


def test_a_lock_that_is_not_taken_is_found(tmp_path):
    with pytest.raises(AssertionError, match="two writers held the gallery at the same time"):
        two_writers(tmp_path / "g", 40, UNLOCKED)


READER = """
import os, sys, time
from embedlab import Gallery
from harness_gallery import Log
folder, log = sys.argv[1], Log(sys.argv[2])
with Gallery.open(folder, read_only=True) as gallery:
    while not os.path.exists(f"{folder}.stop"):
        now = gallery._now()
        log.note(now.meta.generation, now.ids.tolist())
        time.sleep(0.002)
"""


def change_often(gallery, expected, generations):
    """Enroll and remove pairs; what each generation must hold stands in `expected` before anybody can see it."""
    dice, ids, last = random.Random(0), set(), 0
    while len(expected) <= generations:
        gone = dice.sample(sorted(ids), 2) if len(ids) > 30 else []
        ids = ids - set(gone) if gone else ids | {last + 1, last + 2}
        expected[gallery.generation + 1] = frozenset(ids)
        if gone:
            gallery.remove(ids=gone)
        else:
            gallery.enroll(embeddings=np.random.default_rng(last).standard_normal((2, 4)), labels="x")
            last += 2


def watched(tmp_path, generations):
    """Four threads, two of them with readers of their own, and a process look while one writes as fast as it can.

    Returns how often they looked.
    """
    gallery = create(tmp_path / "g")
    expected, odd, looks, done = {gallery.generation: frozenset()}, [], Counter(), threading.Event()

    def look(side):
        before = -1
        while not done.is_set():
            now = side._now()
            generation, found = now.meta.generation, frozenset(now.ids.tolist())
            if generation < before or expected.get(generation) != found:
                odd.append((generation, before, len(found)))
            near = side.search(embeddings=PROBES, k=2)
            if not set(near.ids.ravel().tolist()) <= set(range(-1, 1_000_000)):
                odd.append(near)
            before = generation
            looks[threading.get_ident()] += 1
            time.sleep(0.01)  # Python runs one thread at a time: the writer wants to write

    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", READER, str(tmp_path / "g"), str(log)], env=HARNESS)
    while not log.exists() or not log.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    readers = [Gallery.open(tmp_path / "g", read_only=True) for _ in range(2)]
    threads = [threading.Thread(target=look, args=(side,)) for side in [gallery, gallery, *readers]]
    for thread in threads:
        thread.start()
    change_often(gallery, expected, generations)
    done.set()
    (tmp_path / "g.stop").touch()
    for thread in threads:
        thread.join()
    assert process.wait() == 0
    for side in (gallery, *readers):
        side.close()
    seen = read_log(log)
    odd += [line for line in seen if expected[line[0]] != frozenset(line[1])]
    assert not odd, f"{len(odd)} looks at what was never committed: {odd[:3]}"
    assert [generation for generation, _ in seen] == sorted(generation for generation, _ in seen)
    assert len({generation for generation, _ in seen}) > 3
    assert len(looks) == 4
    return looks.total() + len(seen)


@pytest.mark.parametrize("generations", full_tier(20, 1000))
def test_readers_see_only_committed_generations(tmp_path, generations):
    looks = watched(tmp_path, generations)
    print(f"\n{generations} generations, {looks} looks by 4 threads and a process: 0 wrong")


def test_a_reader_that_mixes_generations_is_found(tmp_path, monkeypatch):
    def followed(reader, old):  # what is new, and the facts of now, but what went stays
        return old.appended(reader._store.load(after=old.meta.last_id))

    monkeypatch.setattr(FolderGallery, "_followed", followed)

    def again_and_again():
        for attempt in range(20):  # whether a reader looks in time is chance
            (place := tmp_path / str(attempt)).mkdir()
            watched(place, 24)

    with pytest.raises(AssertionError, match="looks at what was never committed"):
        again_and_again()


def backed_up(tmp_path, count):
    """So many backups during writes; returns their sizes."""
    gallery, done = create(tmp_path / "g"), threading.Event()
    generation = gallery.generation

    def write():
        while not done.is_set():
            gallery.enroll(embeddings=PROBES[:2], labels="pair")

    writer = threading.Thread(target=write)
    writer.start()
    sizes = []
    try:
        for number in range(count):
            acknowledged = gallery.generation
            with Gallery.open(gallery.backup(tmp_path / str(number)), means) as copy:
                assert copy.generation >= acknowledged, f"a backup lacks {acknowledged - copy.generation} generations"
                assert len(copy) == 2 * (copy.generation - generation)
                assert copy.check().ok
                sizes.append(len(copy))
            shutil.rmtree(tmp_path / str(number))
    finally:
        done.set()
        writer.join()
        gallery.close()
    assert sizes == sorted(sizes)
    return sizes


@pytest.mark.parametrize("count", full_tier(6, 100))
def test_backups_while_writing_are_committed_generations(tmp_path, count):
    sizes = backed_up(tmp_path, count)
    print(f"\n{count} backups during writes: all whole, {sizes[0]} to {sizes[-1]} templates")


def test_a_backup_that_copies_the_file_of_a_live_database_is_found(tmp_path, monkeypatch):
    def copy_to(store, folder):  # what stands in the log only is not in the copy
        shutil.copyfile(store.folder / storage.DATABASE, folder / storage.DATABASE)
        storage.write_generation(folder / storage.GENERATION, store.opened.uuid, 0)

    monkeypatch.setattr(Store, "copy_to", copy_to)
    with pytest.raises(AssertionError, match=r"a backup lacks \d+ generations"):
        backed_up(tmp_path, 6)


# ---- erasure ---------------------------------------------------------------------------------------------------------


def traces(folder, pieces):
    """How many of these pieces of bytes stand in any file."""
    content = b"\0".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return sum(piece in content for piece in pieces)


def test_nothing_of_200_purged_templates_is_in_any_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (220, 3, 16, 16), dtype=np.uint8)
    with create(tmp_path / "g") as gallery:
        ids = gallery.enroll(images, labels=["gone"] * 200 + ["stays"] * 20)
        vectors = [vector.tobytes() for vector in gallery.embeddings().vectors]
        small = [gallery.thumbnail(i) for i in ids]
        (gallery.folder / "cache" / "old").mkdir()
        (gallery.folder / "cache" / "old" / "index").write_bytes(b"".join(vectors))
        assert traces(gallery.folder, vectors) == traces(gallery.folder, small) == 220
        gallery.remove("gone", purge=True)
        for pieces in (vectors, small):
            assert traces(gallery.folder, pieces[:200]) == 0
            assert traces(gallery.folder, pieces[200:]) == 20
        assert [gallery.thumbnail(i) for i in gallery.embeddings().ids] == small[200:]


def test_a_purge_that_only_deletes_leaves_traces_that_are_found(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (220, 3, 16, 16), dtype=np.uint8)
    with create(tmp_path / "g") as gallery:
        gallery.enroll(images, labels=["gone"] * 200 + ["stays"] * 20)
        vectors = [vector.tobytes() for vector in gallery.embeddings().vectors]
        gallery._store._connection.execute("PRAGMA secure_delete = OFF")
        monkeypatch.setattr(gallery._store, "compact", gallery._store.truncate_log)  # the database is not written anew
        gallery.remove("gone", purge=True)
        assert traces(gallery.folder, vectors[:200]) > 100


def test_a_cache_that_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    with create(tmp_path / "g") as gallery:
        gallery.enroll(embeddings=PROBES, labels="x")
        (gallery.folder / "cache" / "index").write_bytes(b"x")

        def refuse(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.raises(GalleryError, match=r"still holds traces of it: .*cache/index \(Permission denied\)"):
            gallery.remove("x", purge=True)
        monkeypatch.undo()
        assert len(gallery) == 0
