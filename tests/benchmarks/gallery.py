"""The gallery beside raw FAISS: search, enrollment, opening and memory, each with its target.

    python tests/benchmarks/gallery.py [--rows 1000000] [--out runs/benchmark-gallery]

Vectors are clustered: identities with ten templates each, whose cosine is about `--alike`; of the probes half are
new pictures of enrolled identities and half are strangers. What is compared is measured in turn (raw, gallery, raw,
gallery) and medians are reported. Memory is what a process of its own holds after opening the gallery, building or
reading its index, and searching, beyond what it held before. The threads are FAISS's own choice; OMP_NUM_THREADS
changes it.

The folder gets the gallery, results.json and results.md. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PER_IDENTITY = 10
Vectors = np.ndarray[Any, np.dtype[np.float32]]


def clustered(identities: int, per: int, dim: int, alike: float, seed: int) -> Vectors:
    """Directions of identities, each with pictures whose cosine to one another is about `alike`."""
    random = np.random.default_rng(seed)
    table = np.empty((identities * per, dim), np.float32)
    for start in range(0, identities, 10_000):
        count = min(10_000, identities - start)
        centres = random.standard_normal((count, dim), dtype=np.float32)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        spread = (1 / alike - 1) ** 0.5 / dim**0.5
        block = np.repeat(centres, per, axis=0) + spread * random.standard_normal((count * per, dim), dtype=np.float32)
        table[start * per : (start + count) * per] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return table


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(rounds: int, *calls: Callable[[], Any]) -> list[float]:
    """Median seconds of each, measured alternately after one warm-up."""
    for call in calls:
        call()
    taken = [[seconds(call) for call in calls] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def singles(queries: Vectors, ask: Callable[[Vectors], Any]) -> Callable[[], None]:
    return lambda: [ask(queries[row : row + 1]) for row in range(len(queries))] and None


def built(gallery: Any) -> dict[str, Any]:
    """Wait for the index; what is known of it."""
    while gallery.info()["search"]["building"]:
        time.sleep(0.05)
    report: dict[str, Any] = gallery.info()["search"]
    return report


def held(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def memory_child(folder: str, dim: int) -> None:
    import faiss

    from embedlab import Gallery

    faiss.knn(np.ones((1, 4), np.float32), np.ones((1, 4), np.float32), 1)
    before = held("VmRSS")
    with Gallery.open(folder) as gallery:
        count = len(gallery)
        report = built(gallery)
        while not gallery.verified:
            time.sleep(0.05)
        gallery.search(embeddings=np.ones((1, dim)))
        found = {"rss": held("VmRSS") - before, "peak": held("VmHWM") - before, "used": report["used"]}
    print(json.dumps(found | {"vectors": count * dim * 4}))


def memory(folder: Path, dim: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory-of", str(folder), "--dim", str(dim)]
    result: dict[str, Any] = json.loads(subprocess.check_output(command))
    return result


class Table:
    """Rows of what was measured against its target."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, value: float, unit: str, target: float | None = None, *, at_most: bool = True) -> None:
        met = None if target is None else bool(value <= target if at_most else value >= target)
        sign = "at most" if at_most else "at least"
        self.rows.append({"what": what, "value": value, "unit": unit, "target": target, "sign": sign, "met": met})
        print(f"{what}: {value:.4g} {unit}" + ("" if met is None else f" ({sign} {target}: {met})"), flush=True)

    def markdown(self) -> str:
        lines = ["| what | measured | target | |", "|---|---|---|---|"]
        for row in self.rows:
            target = "" if row["target"] is None else f"{row['sign']} {row['target']} {row['unit']}"
            met = {None: "", True: "met", False: "**not met**"}[row["met"]]
            lines.append(f"| {row['what']} | {row['value']:.4g} {row['unit']} | {target} | {met} |")
        return "\n".join(lines) + "\n"


def enrolling(gallery: Any, vectors: Vectors, table: Table) -> None:
    labels = [f"identity {row // PER_IDENTITY}" for row in range(len(vectors))]
    taken = seconds(lambda: gallery.enroll(embeddings=vectors, labels=labels))
    table.add("bulk enrollment", len(vectors) / taken, "vectors/s", 50_000, at_most=False)
    one = np.random.default_rng(5).standard_normal((40, vectors.shape[1]))
    each = [
        seconds(lambda row=row: gallery.enroll(embeddings=one[row : row + 1], labels=f"new {row}")) for row in range(40)
    ]
    table.add("one enrollment, durable", 1e3 * statistics.median(each), "ms", 10)
    gallery.remove([f"new {row}" for row in range(40)])


def flat_search(gallery: Any, vectors: Vectors, queries: Vectors, rounds: int, table: Table) -> float:
    import faiss

    raw = faiss.IndexFlatIP(vectors.shape[1])
    raw.add(vectors)
    batch = queries[:1000]
    a, b = in_turn(rounds, lambda: raw.search(batch, 10), lambda: gallery.search(embeddings=batch))
    table.add("raw FAISS flat, batch of 1,000", len(batch) / a, "queries/s")
    table.add("gallery flat over raw FAISS, batch of 1,000", b / a, "times", 1.1)
    few = queries[:20]
    c, d = in_turn(
        rounds, singles(few, lambda q: raw.search(q, 10)), singles(few, lambda q: gallery.search(embeddings=q))
    )
    table.add("raw FAISS flat, one probe", 1e3 * c / len(few), "ms")
    table.add("gallery flat over raw FAISS, one probe", d / c, "times", 1.1)
    return b / len(batch)


def approximate(
    gallery: Any, queries: Vectors, flat: float, rounds: int, table: Table, exact: list[str | None]
) -> None:
    index = gallery._snapshot.index
    if index is None:
        print("no index met its target: the search stays exact", file=sys.stderr)
        return
    few = queries[:200]
    a, b = in_turn(
        rounds, singles(few, lambda q: index.faiss.search(q, 10)), singles(few, lambda q: gallery.search(embeddings=q))
    )
    name = index.measured.kind
    table.add(f"raw FAISS {name}, one probe", 1e3 * a / len(few), "ms")
    table.add(f"gallery {name} beyond raw FAISS, one probe", 1e3 * (b - a) / len(few), "ms", 0.2)
    taken = in_turn(rounds, lambda: gallery.search(embeddings=queries))[0] / len(queries)
    table.add(f"gallery {name}, batch", 1 / taken, "queries/s")
    table.add(f"gallery {name} over gallery flat, batch", flat / taken, "times", 8, at_most=False)
    answers = [answer.label for answer in gallery.identify(embeddings=queries)]
    same = float(np.mean([one == other for one, other in zip(answers, exact, strict=True)]))
    table.add(f"same decisions by {name} as by exact search", same, "of probes", 0.999, at_most=False)
    table.add("same decisions as measured by the gallery itself", index.measured.decisions, "of probes")


def opening(folder: Path, probe: Vectors, rounds: int, table: Table) -> None:
    from embedlab import Gallery

    opened, first, verified = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        with Gallery.open(folder) as gallery:
            opened.append(time.perf_counter() - start)
            gallery.search(embeddings=probe)
            first.append(time.perf_counter() - start)
            while not gallery.verified:
                time.sleep(0.01)
            verified.append(time.perf_counter() - start)
    table.add("open", statistics.median(opened), "s", 0.5)
    table.add("open and first answer", statistics.median(first), "s")
    table.add("open and all digests verified", statistics.median(verified), "s")


def measure(args: argparse.Namespace, table: Table) -> None:
    from embedlab import Gallery

    folder = args.out / "gallery"
    shutil.rmtree(folder, ignore_errors=True)
    identities = args.rows // PER_IDENTITY
    everything = clustered(identities, PER_IDENTITY + 1, args.dim, args.alike, seed=0)
    new = np.arange(len(everything)) % (PER_IDENTITY + 1) == PER_IDENTITY  # the eleventh picture of each
    vectors, genuine = everything[~new], everything[new]
    del everything
    random = np.random.default_rng(1)
    strangers = clustered(args.queries // 2, 1, args.dim, args.alike, seed=2)
    chosen = genuine[random.permutation(len(genuine))[: args.queries - len(strangers)]]
    queries = np.concatenate([chosen, strangers])[random.permutation(len(chosen) + len(strangers))]
    with Gallery.create(folder, dim=args.dim, search="exact") as gallery:
        enrolling(gallery, vectors, table)
        gallery.calibrate(embeddings=clustered(2_000, 1, args.dim, args.alike, seed=3), fpir=0.01)
        exact = [answer.label for answer in gallery.identify(embeddings=queries)]
        flat = flat_search(gallery, vectors, queries, args.rounds, table)
    found = memory(folder, args.dim)
    table.add("memory over the vectors, exact", found["rss"] / found["vectors"], "times", 1.3)
    table.add("peak memory over the vectors, exact", found["peak"] / found["vectors"], "times")
    for kind in args.kinds:
        with Gallery.open(folder) as gallery:
            start = time.perf_counter()
            gallery.configure(search=kind, search_recall=args.recall)
            report = built(gallery)
            print(json.dumps(report))
            table.add(f"building the index ({kind})", time.perf_counter() - start, "s")
            approximate(gallery, queries, flat, args.rounds, table, exact)
        found = memory(folder, args.dim)
        most = 1.7 if found["used"] == "hnsw" else 1.3
        table.add(f"memory over the vectors, {found['used']}", found["rss"] / found["vectors"], "times", most)
    opening(folder, queries[:1], args.rounds, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rows": 1_000_000, "dim": 128, "queries": 10_000, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--alike", type=float, default=0.7, help="cosine of two pictures of one identity")
    parser.add_argument("--recall", type=float, default=0.999, help="target of the index")
    parser.add_argument("--kinds", nargs="*", default=["auto", "ivf", "hnsw"], choices=["auto", "ivf", "hnsw"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-gallery"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if args.memory_of:
        memory_child(args.memory_of, args.dim)
        return
    import faiss

    args.out.mkdir(parents=True, exist_ok=True)
    table = Table()
    measure(args, table)
    about = {"machine": platform.processor() or platform.machine(), "threads": faiss.omp_get_max_threads()}
    about |= {"faiss": faiss.__version__, "numpy": np.__version__, "python": platform.python_version()}
    settings = {key: str(value) for key, value in vars(args).items() if key != "memory_of"}
    content = {"about": about, "settings": settings, "results": table.rows}
    (args.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "results.md").write_text(table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main()
