"""Operations on a gallery beside a dictionary that says what must come of them, and a server of processes to kill.

A process that works on a gallery notes in a log what it begins, what was acknowledged and what failed. Whoever reads
the log knows what the gallery must hold: all that was acknowledged, and the one operation that was cut off as a whole
or not at all.
"""

import copy
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from embedlab import Gallery
from embedlab.retrieval import GalleryError, indexing

DIM = 4
NAMES = [f"n{i}" for i in range(6)]
FILES = ("gallery.db", "gallery.db-wal", "gallery.generation")
TRACED = "write,pwrite64,fsync,fdatasync,ftruncate,rename,unlink,unlinkat"


def means(images):
    """An embedder without a network: mean colours of four stripes."""
    stripes = np.asarray(images, np.float64)[:, :, : 4 * (images.shape[2] // 4)].reshape(len(images), 3, 4, -1)
    return stripes.mean(axis=(1, 3)) + 1


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclass
class Model:
    """What a gallery must hold."""

    rows: dict = field(default_factory=dict)  # id -> label, vector as bytes, whether there is a thumbnail
    last: int = 0
    fusion: str = "max"
    keys: dict = field(default_factory=dict)

    def labels(self):
        return sorted({label for label, _, _ in self.rows.values()})

    def view(self):
        return self.rows, self.fusion, self.keys

    def apply(self, step):
        """The slow and simple meaning of every operation; returns another model."""
        new, do = copy.deepcopy(self), step["do"]
        if do == "enroll" and step["key"] not in self.keys:
            vectors = unit(vectors_of(step)).astype(np.float32)
            for label, vector in zip(step["labels"], vectors, strict=True):
                new.last += 1
                new.rows[new.last] = (label, vector.tobytes(), "images" in step)
            if step["key"]:
                new.keys[step["key"]] = self.last + 1
        elif do == "remove":
            new.rows = {i: row for i, row in self.rows.items() if row[0] not in step["labels"]}
        elif do == "relabel":
            old, to = step["old"], step["new"]
            new.rows = {i: (to if row[0] == old else row[0], *row[1:]) for i, row in self.rows.items()}
        elif do == "configure":
            new.fusion = step["fusion"]
        return new


def vectors_of(step):
    """(N, 4) float64 of any norm."""
    if "images" in step:
        return means(images_of(step)).astype(np.float32).astype(np.float64)
    return np.random.default_rng(step["seed"]).standard_normal((len(step["labels"]), DIM))


def images_of(step):
    shape = (len(step["labels"]), 3, 8, 8)
    return np.random.default_rng(step["seed"]).integers(0, 255, shape, dtype=np.uint8)


def random_step(dice, model):
    """An operation that the model allows."""
    labels = model.labels()
    do = dice.choice(["enroll"] * 4 + ["batch", "images", "remove", "purge", "relabel", "configure", "compact"])
    seed = dice.getrandbits(32)
    if do in ("remove", "purge") and labels:
        return {"do": "remove", "labels": dice.sample(labels, dice.randint(1, 2) if len(labels) > 1 else 1),
                "purge": do == "purge"}  # fmt: skip
    if do == "relabel" and labels:
        return {
            "do": "relabel",
            "old": (old := dice.choice(labels)),
            "new": dice.choice([n for n in NAMES if n != old]),
        }
    if do == "configure":
        return {"do": "configure", "fusion": dice.choice(["max", "mean", "vote"])}
    if do == "compact":
        return {"do": "compact"}
    count = 60 if do == "batch" else dice.randint(1, 4)
    step = {"do": "enroll", "seed": seed, "labels": [dice.choice(NAMES) for _ in range(count)], "key": None}
    if do == "images":
        step |= {"images": True, "key": f"key {seed}" if dice.random() < 0.5 else None}
    return step


def perform(gallery, step):
    """One operation on a real gallery."""
    do = step["do"]
    if do == "enroll":
        what = {"images": images_of(step)} if "images" in step else {"embeddings": vectors_of(step)}
        gallery.enroll(**what, labels=step["labels"], key=step["key"])
    elif do == "remove":
        gallery.remove(step["labels"], purge=step["purge"])
    elif do == "relabel":
        (gallery.merge if step["new"] in gallery.labels() else gallery.rename)(step["old"], step["new"])
    elif do == "configure":
        gallery.configure(fusion=step["fusion"])
    elif do == "compact":
        gallery.compact()
    elif do == "backup":
        shutil.rmtree(gallery.folder.parent / "backup", ignore_errors=True)
        gallery.backup(gallery.folder.parent / "backup")


def view(gallery, keys=()):
    """What a gallery holds, in the model's terms; raises when a look at it fails."""
    stored = gallery.embeddings()
    rows = {
        int(i): (label, vector.tobytes(), gallery.thumbnail(i) is not None)
        for i, label, vector in zip(stored.ids, stored.labels, stored.vectors, strict=True)
    }
    known = {key: gallery._store.recall(key) for key in keys}
    return rows, gallery.info()["settings"]["fusion"], {key: found[0] for key, found in known.items() if found}


def create(folder):
    return Gallery.create(folder, means, thumbnails=True)


def reopen(folder, possible, *, read_only=False):
    """Open a gallery, which must hold one of the possible models, verified; returns that one."""
    keys = {key for model in possible for key in model.keys}
    with Gallery.open(folder, means, read_only=read_only) as gallery:
        got = view(gallery, keys)
        report = gallery.check()
    assert report.ok, report.problems
    for model in possible:
        if got == model.view():
            return model
    raise AssertionError(f"holds {sorted(got[0])}, expected one of {[sorted(m.rows) for m in possible]}")


# ---- a process that works, and a log of it ---------------------------------------------------------------------------


class Log:
    """Lines of JSON that survive the death of the writer; written with a system call that no fault is injected into."""

    def __init__(self, path):
        self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, *line):
        os.writev(self.handle, [json.dumps(line).encode() + b"\n"])


def read_log(path):
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [tuple(json.loads(line)) for line in lines]


def follow(model, lines):
    """Models that are possible after these lines, and the errors that were noted."""
    pending, errors = None, []
    for kind, content in lines:
        if kind == "begin":
            pending = content
        elif kind == "done":
            model, pending = model.apply(pending), None
        elif kind == "error":
            errors.append((pending, content))
    return [model] if pending is None else [model, model.apply(pending)], errors


def work(folder, log, *, steps=None, seed=0, early=False, smallest_index=None):
    """Work through steps, or through random ones until killed; `early` is the planted bug: acknowledge first."""
    indexing.FEWEST_ROWS = smallest_index or indexing.FEWEST_ROWS
    log, dice = Log(log), random.Random(seed)
    folder, model = Path(folder), Model()
    if not folder.exists():
        create(folder).close()
    with Gallery.open(folder, means) as gallery:
        rows, model.fusion, _ = view(gallery)
        model.rows, model.last = rows, gallery._store.opened.last_id
        log.note("open", None)
        while steps is None or steps:
            step = steps.pop(0) if steps is not None else random_step(dice, model)
            log.note("begin", step)
            if early:
                log.note("done", None)
            try:
                perform(gallery, step)
            except Exception as error:
                log.note("error", [type(error).__name__, str(error), isinstance(error, GalleryError)])
                return
            if not early:
                log.note("done", None)
            model = model.apply(step)
    log.note("closed", None)


class Server:
    """Forks workers from a process that has imported everything and holds no database open."""

    def __enter__(self):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, **arguments):
        """Fork a worker, which waits for `go`."""
        return self._ask(do="start", arguments={k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()})

    def go(self):
        return self._ask(do="go")

    def kill_after(self, log, seconds):
        """Kill the worker so long after it has opened the gallery."""
        return self._ask(do="kill", log=str(log), seconds=seconds)

    def wait(self):
        return self._ask(do="wait")


def serve():
    import faiss  # noqa: F401  # here, not in every worker

    child, gate = 0, None
    for line in sys.stdin:
        request, answer = json.loads(line), 0
        if request["do"] == "start":
            inner, gate = os.pipe()
            child = os.fork()
            if not child:
                code = 1
                try:
                    os.close(0)
                    os.read(inner, 1)
                    work(**request["arguments"])
                    code = 0
                finally:
                    os._exit(code)
            os.close(inner)
            answer = child
        elif request["do"] == "go":
            os.write(gate, b"!")
            os.close(gate)
        elif request["do"] == "kill":
            until = time.monotonic() + 20
            while not (os.path.exists(request["log"]) and os.path.getsize(request["log"])) and time.monotonic() < until:
                time.sleep(0.0005)
            time.sleep(request["seconds"])
            os.kill(child, signal.SIGKILL)
            answer = os.waitpid(child, 0)[1]
        else:
            answer = os.waitpid(child, 0)[1]
        print(json.dumps(answer), flush=True)


def traced(server, options, **arguments):
    """Run a worker under strace; returns its exit status, and skips loudly where processes may not be traced."""
    pid = server.start(**arguments)
    tracer = subprocess.Popen(["strace", "-f", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    ready = select.select([tracer.stderr], [], [], 10)[0] and tracer.stderr.readline()
    server.go()
    status = server.wait()
    tracer.stderr.close()
    tracer.wait()
    if not ready or "attached" not in ready:
        pytest.skip(f"NO FAULTS INJECTED: strace cannot attach here: {ready}")
    return status


def require_strace():
    if shutil.which("strace") is None:
        pytest.skip("NO FAULTS INJECTED: there is no strace; install it to run this harness.")


if __name__ == "__main__":
    serve()
