"""Processes that die and disks that refuse: nothing that was acknowledged is lost, nothing is there by half.

Short tiers run with the suite; `pytest -m full -s tests/test_gallery_crash.py` runs the full ones and prints figures.
"""

import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from harness_gallery import (
    FILES,
    TRACED,
    Model,
    Server,
    create,
    follow,
    means,
    perform,
    read_log,
    reopen,
    require_strace,
    traced,
)

from embedlab import Gallery
from embedlab.retrieval import indexing

SCRIPT = [
    {"do": "enroll", "seed": 1, "labels": ["n0", "n1"], "key": None},
    {"do": "enroll", "seed": 2, "labels": ["n1", "n2"], "key": "once", "images": True},
    {"do": "relabel", "old": "n2", "new": "n3"},
    {"do": "remove", "labels": ["n0"], "purge": False},
    {"do": "configure", "fusion": "mean"},
    {"do": "remove", "labels": ["n3"], "purge": True},
    {"do": "enroll", "seed": 3, "labels": ["n4"] * 40, "key": None},
    {"do": "backup"},
    {"do": "compact"},
    {"do": "relabel", "old": "n4", "new": "n1"},
]


def full_tier(short, full):
    return [pytest.param(short, id="short"), pytest.param(full, marks=pytest.mark.full, id="full")]


# ---- killed at random ------------------------------------------------------------------------------------------------


def killed_at_random(folder, kills, *, early=False):
    """Kill a worker again and again on one gallery; returns how many operations were acknowledged."""
    dice, model, acknowledged = random.Random(0), Model(), Counter()
    create(folder / "g").close()
    with Server() as server:
        for kill in range(kills):
            log = folder / "log"
            log.unlink(missing_ok=True)
            server.start(folder=folder / "g", log=log, seed=kill, early=early)
            server.go()
            server.kill_after(log, dice.uniform(0, 0.08))
            lines = read_log(log)
            possible, errors = follow(model, lines)
            assert not errors
            model = reopen(folder / "g", possible)
            steps = [content for kind, content in lines if kind == "begin"]
            acknowledged.update(step["do"] for step in steps[: sum(kind == "done" for kind, _ in lines)])
    return acknowledged


def killed_while_an_index_is_cached(tmp_path, kills):
    """Kill a worker again and again, and search what is left; returns how often a cache was found."""
    folder, dice, model, cached = tmp_path / "g", random.Random(1), Model(), 0
    with Gallery.create(folder, means, thumbnails=True, search="hnsw", search_recall=0.5) as gallery:
        step = {"do": "enroll", "seed": 0, "labels": ["n0"] * 100, "key": None}
        perform(gallery, step)
        model = model.apply(step)
    with Server() as server:
        for kill in range(kills):
            log = tmp_path / "log"
            log.unlink(missing_ok=True)
            server.start(folder=folder, log=log, seed=kill, smallest_index=40)
            server.go()
            server.kill_after(log, dice.uniform(0, 0.2))
            model = reopen(folder, follow(model, read_log(log))[0])
            cached += any(folder.glob("cache/index-*"))
            if not model.rows:
                continue
            with Gallery.open(folder, means, read_only=True) as gallery:
                gallery._keeper.wait()  # until a cached index has been read, or another built
                stored = gallery.embeddings()
                near = gallery.search(embeddings=stored.vectors, k=1)
                table = stored.vectors.astype(np.float64)
                np.testing.assert_allclose(near.scores[:, 0], (table @ table.T).max(1), atol=1e-5)
    return cached


@pytest.fixture
def small_indexes(monkeypatch):
    monkeypatch.setattr(indexing, "FEWEST_ROWS", 40)


@pytest.mark.parametrize("kills", full_tier(20, 200))
def test_kills_while_an_index_is_built_and_cached_lose_nothing(tmp_path, small_indexes, kills):
    cached = killed_while_an_index_is_cached(tmp_path, kills)
    print(f"\n{kills} kills while an index is built and cached: 0 lost, {cached} times a cache was found after them")
    assert cached > kills // 4


def test_a_cached_index_that_passes_for_newer_than_it_is_is_found(tmp_path, small_indexes, monkeypatch):
    read = indexing.Index.read

    def claimed(path, known):  # as if it knew every template, whatever was enrolled since it was built
        return read(path, known | {"last_id": 1 << 40})

    monkeypatch.setattr(indexing.Index, "read", claimed)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        killed_while_an_index_is_cached(tmp_path, 40)


@pytest.mark.parametrize("kills", full_tier(60, 1000))
def test_kills_at_random_lose_nothing(tmp_path, kills):
    acknowledged = killed_at_random(tmp_path, kills)
    print(f"\n{kills} kills: {acknowledged.total()} acknowledged operations, 0 lost; {dict(acknowledged)}")
    assert acknowledged.total() > kills
    assert set(acknowledged) == {"enroll", "remove", "relabel", "configure", "compact"}


def test_acknowledging_before_the_commit_is_found(tmp_path):
    with pytest.raises(AssertionError, match="expected one of"):
        killed_at_random(tmp_path, 60, early=True)


# ---- a fault at every system call that writes ------------------------------------------------------------------------


def calls(server, folder):
    """How often each system call that writes is made by the script."""
    traced(server, ["-e", f"trace={TRACED}", "-o", str(folder / "trace")],
           folder=folder / "g", log=folder / "log", steps=SCRIPT)  # fmt: skip
    assert read_log(folder / "log")[-1][0] == "closed"
    return Counter(re.findall(r"(?m)^\d+ +(\w+)\(", (folder / "trace").read_text()))


def with_fault(server, folder, call, number, fault):
    """Run the script with a fault at one call, and look at what is left; returns whether anything was noticed."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    traced(server, ["-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}", "-o", "/dev/null"],
           folder=folder / "g", log=folder / "log", steps=SCRIPT)  # fmt: skip
    lines = read_log(folder / "log") if (folder / "log").exists() else []
    if (folder / "g").exists():
        possible, errors = follow(Model(), lines)
        reopen(folder / "g", possible)
        for step, (kind, text, ours) in errors:
            assert ours, f"{step['do']}: {kind}: {text}"
            assert str(folder) in text
    else:
        assert not lines  # it was never made, and nobody was told that it was
    if (folder / "backup").exists():
        reopen(folder / "backup", [m for n in range(len(SCRIPT)) for m in [after(n)]])
    assert not [path.name for path in folder.glob(".*.new-*") if "signal" not in fault]
    return not lines or lines[-1][0] != "closed"


def after(steps):
    model = Model()
    for step in SCRIPT[:steps]:
        model = model.apply(step)
    return model


@pytest.mark.parametrize("share", full_tier(0.1, 1.0))
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=EIO", "error=ENOSPC"])
def test_a_fault_at_a_system_call_loses_nothing(tmp_path, fault, share):
    require_strace()
    dice, noticed, points = random.Random(0), 0, []
    with Server() as server:
        made = calls(server, tmp_path)
        assert made["fsync"] + made["fdatasync"] > 20, made
        points = [(call, n) for call, times in made.items() for n in range(1, times + 1)]
        chosen = points if share == 1 else dice.sample(points, int(share * len(points)))
        for call, number in chosen:
            noticed += with_fault(server, tmp_path, call, number, fault)
    print(f"\n{fault}: {len(chosen)} of {len(points)} points, {noticed} stopped the script; 0 lost, every one opens")
    assert noticed > 0.5 * len(chosen)


# ---- power that goes out ---------------------------------------------------------------------------------------------

CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")
HANDLE = re.compile(r"^\d+<([^>]*)>, ")
SECTOR = 512


def recorded(folder):
    """Everything that a session wrote, as (call, file, content, offset) in order; acknowledgements are "ack"."""
    with Server() as server:
        create(folder / "g").close()
        base = {name: (folder / "g" / name).read_bytes() for name in FILES if (folder / "g" / name).exists()}
        options = ["-y", "-xx", "-s", "10000000", "-o", str(folder / "trace")]
        options += ["-e", "trace=pwrite64,write,lseek,fsync,fdatasync,ftruncate,unlink,writev"]
        steps = [step for step in SCRIPT if step["do"] != "backup"]
        traced(server, options, folder=folder / "g", log=folder / "log", steps=steps)
    events, places = [], {}
    for line in (folder / "trace").read_text().splitlines():
        if not (found := CALL.match(line)) or int(found[3]) < 0:
            continue
        call, arguments = found[1], found[2]
        if call == "unlink":
            events.append((call, Path(text_of(arguments)).name, b"", 0))
            continue
        if not (handle := HANDLE.match(arguments + ", ")):
            continue
        name = Path(text_of(f'"{handle[1]}"') if "\\x" in handle[1] else handle[1]).name
        if call == "lseek":
            places[name] = int(found[3])
        elif call == "writev":
            events.append(("ack", name, text_of(arguments).encode(), 0))
        elif name in FILES:
            content = bytes.fromhex(quoted(arguments).replace("\\x", "")) if call in ("write", "pwrite64") else b""
            place = places.get(name, 0)
            if call in ("pwrite64", "ftruncate"):
                place = int(arguments.rsplit(", ", 1)[1])
            events.append((call, name, content, place))
    return base, events, read_log(folder / "log")


def quoted(arguments):
    return arguments[arguments.index('"') + 1 : arguments.rindex('"')]


def text_of(arguments):
    text = quoted(arguments)
    return bytes.fromhex(text.replace("\\x", "")).decode() if "\\x" in text else text


def power_lost(base, events, cut, dice):
    """Files as a disk may hold them when the power goes out after `cut` events: all synced, and any of the rest."""
    disk = {name: bytearray(content) for name, content in base.items()}
    waiting = {name: [] for name in FILES}
    for call, name, content, place in events[:cut]:
        if call in ("fsync", "fdatasync"):
            for change in waiting[name]:
                put(disk, name, *change)
            waiting[name] = []
        elif call == "unlink":
            disk.pop(name, None)
            waiting[name] = []
        elif call != "ack":
            waiting[name].append((call, content, place))
    for name, changes in waiting.items():
        for change in changes:
            luck = dice.choice([0, 0.5, 1])  # nothing, some sectors, all of it
            for part in sectors(*change):
                if dice.random() < luck:
                    put(disk, name, *part)
    return disk


def sectors(call, content, place):
    """What of a change reaches the disk as one or not at all."""
    if call == "ftruncate":
        return [(call, content, place)]
    return [(call, content[start : start + SECTOR], place + start) for start in range(0, len(content), SECTOR)]


def put(disk, name, call, content, place):
    file = disk.setdefault(name, bytearray())
    if call == "ftruncate":
        del file[place:]
    end = place + (0 if call == "ftruncate" else len(content))
    file.extend(bytes(max(0, end - len(file))))
    file[place:end] = content if call != "ftruncate" else b""


def survives_power_loss(recording, place, states, *, lost=None):
    base, events, lines = recording
    events = [event for event in events if not (event[0] in ("fsync", "fdatasync") and event[1] == lost)]
    dice = random.Random(0)
    for state in range(states):
        cut = dice.randrange(len(events) + 1)
        told = lines[: sum(event[0] == "ack" for event in events[:cut])]
        shutil.rmtree(place, ignore_errors=True)
        (place / "cache").mkdir(parents=True)
        for name, content in power_lost(base, events, cut, dice).items():
            (place / name).write_bytes(content)
        reopen(place, follow(Model(), told)[0], read_only=state % 2 == 0)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    require_strace()
    base, events, lines = recorded(tmp_path_factory.mktemp("power"))
    kinds = Counter(event[0] for event in events)
    assert kinds["ack"] == len(lines)
    assert kinds["pwrite64"] > 50
    assert lines[-1][0] == "closed"
    return base, events, lines


@pytest.mark.parametrize("states", full_tier(300, 10_000))
def test_power_loss_loses_nothing(recording, memory, states):
    survives_power_loss(recording, memory / "g", states)
    print(f"\n{states} states after a loss of power: 0 acknowledged operations lost, 0 damaged")


def test_a_log_that_is_not_synced_is_found(recording, memory):
    with pytest.raises(Exception, match=r"expected one of|damaged"):
        survives_power_loss(recording, memory / "g", 300, lost="gallery.db-wal")
