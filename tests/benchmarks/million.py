"""A share of recall@1 of a million vectors against a million, broken off by SIGKILL and taken up again.

    python tests/benchmarks/million.py --queries 32768 --kill-after 90 --out runs/benchmark-million

The queries are the first of a million others of the same 200,000 classes. The child process writes its state about
once a minute; the second one goes on from there. Printed: seconds of ranking per 1000 queries and what they make of a
million, the peak of the resident set, and whether 32 queries agree with a float64 product over the whole reference.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

CLASSES, DIM, NOISE = 200_000, 128, 1.2
CHECKED = 32


def vectors(rows: int, seed: int) -> tuple[Any, Any]:
    """Rows around class centres, float32, and their classes."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((CLASSES, DIM), dtype=np.float32)
    labels = random.integers(0, CLASSES, rows)
    found = np.empty((rows, DIM), dtype=np.float32)
    for start in range(0, rows, 65536):
        part = labels[start : start + 65536]
        found[start : start + 65536] = centres[part] + NOISE * random.standard_normal(
            (len(part), DIM), dtype=np.float32
        )
    return found, labels


def rank(queries: int, reference: int, state: Path, results: Path) -> None:
    """Rank in this process, on from the state."""
    import torch  # noqa: F401  # so that the work is the same as that of the whole million

    from embedlab.metrics import retrieval_report

    sides = (*vectors(queries, 2), *vectors(reference, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    start, cpu = time.perf_counter(), time.process_time()
    report = retrieval_report(*sides, k=[1], state=state, empty="zero")
    figures: dict[str, float] = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "input_mb": before,
        **report.values,
    }
    agree = report.per_query["recall_at_1"][:CHECKED] == slow_recall(*sides)
    figures |= {"agree": int(agree.sum()), "checked": CHECKED}
    results.write_text(json.dumps(figures), encoding="utf-8")


def slow_recall(query: Any, query_labels: Any, reference: Any, reference_labels: Any) -> Any:
    """recall@1 of the first queries, in float64."""
    query, best, found = query[:CHECKED].astype(np.float64), np.full(CHECKED, -2.0), np.zeros(CHECKED, dtype=np.int64)
    query /= np.linalg.norm(query, axis=1, keepdims=True)
    for first in range(0, len(reference), 65536):
        part = reference[first : first + 65536].astype(np.float64)
        scores = query @ (part / np.linalg.norm(part, axis=1, keepdims=True)).T
        place = scores.argmax(axis=1)
        top = scores[np.arange(CHECKED), place]
        found, best = np.where(top > best, place + first, found), np.maximum(top, best)
    return reference_labels[found] == query_labels[:CHECKED]


def main() -> int:
    """Break off, look, go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=32_768)
    parser.add_argument("--reference", type=int, default=1_000_000)
    parser.add_argument("--kill-after", type=float, default=90.0, help="seconds; 0 lets the first process finish")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-million"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    state, results = arguments.out / "state", arguments.out / "results.json"
    for path in (state, results):
        path.unlink(missing_ok=True)
    spawn = multiprocessing.get_context("spawn")
    done, starts = 0, 2 if arguments.kill_after else 1
    for start in range(starts):
        child = spawn.Process(target=rank, args=(arguments.queries, arguments.reference, state, results))
        child.start()
        child.join(arguments.kill_after if start < starts - 1 else None)
        if child.is_alive():
            child.kill()
            child.join()
            if state.exists():
                with state.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                    done = int(stored["done"])
            print(f"killed after {arguments.kill_after:.0f} s; its state holds {done} queries")
    found = json.loads(results.read_text(encoding="utf-8"))
    per_thousand = 1000 * found["seconds"] / max(1, arguments.queries - done)
    print(json.dumps(found, indent=2))
    print(f"{per_thousand:.2f} s per 1000 queries, {per_thousand / 3.6:.2f} hours for a million")
    return 0 if found["agree"] == found["checked"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
