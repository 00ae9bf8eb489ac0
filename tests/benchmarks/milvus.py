"""A gallery on Milvus beside the same gallery in a folder: enrollment, identification, calibration.

    python tests/benchmarks/milvus.py milvus://127.0.0.1:19530/benchmark [--rows 100000] [--out runs/benchmark-milvus]
    python tests/benchmarks/milvus.py milvus:/tmp/benchmark.db --rows 100000

Identities with ten templates each, whose cosine is about `--alike`; half of the probes are new pictures of enrolled
identities, half are strangers. One probe is asked at a time, as at a door, at both consistencies (a file has one). The
decisions of both galleries are compared. The one on Milvus must be absent before, and stays behind on a server, where
it can be looked at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from gallery import PER_IDENTITY, clustered, seconds

from embedlab import Gallery


def spread(taken: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(1e3 * statistics.median(taken), 2),
        "p95_ms": round(1e3 * float(np.quantile(taken, 0.95)), 2),
    }


def filled(place: str | Path, table: Any, names: list[str], batch: int) -> tuple[Gallery, float]:
    gallery = Gallery.create(place, dim=table.shape[1])
    start = time.perf_counter()
    for row in range(0, len(table), batch):
        gallery.enroll(embeddings=table[row : row + batch], labels=names[row : row + batch])
        print(f"  {place}: {row + batch} templates after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return gallery, time.perf_counter() - start


def asked(gallery: Gallery, probes: Any) -> tuple[dict[str, float], list[Any]]:
    gallery.identify(embeddings=probes[:1])
    answers: list[Any] = []
    taken = [
        seconds(lambda row=row: answers.extend(gallery.identify(embeddings=probes[row : row + 1])))
        for row in range(len(probes))
    ]
    return spread(taken), answers


def measured(gallery: Gallery, place: str, probes: Any, strangers: Any) -> dict[str, Any]:
    calibrated = seconds(lambda: gallery.calibrate(embeddings=strangers, fpir=0.02))
    result: dict[str, Any] = {"calibrate_seconds": round(calibrated, 2)}
    result["identify"], answers = asked(gallery, probes)
    if place.startswith("milvus://"):
        with Gallery.open(f"{place}?consistency=bounded", read_only=True) as quick:
            result["identify_bounded"], again = asked(quick, probes)
        result["bounded_decides_alike"] = [a.label for a in again] == [a.label for a in answers]
    result["identify_64_at_once"] = spread(
        [seconds(lambda: gallery.identify(embeddings=probes[:64])) for _ in range(3)]
    )
    result["verify"] = spread(
        [seconds(lambda row=row: gallery.verify("identity 7", embedding=probes[row])) for row in range(20)]
    )
    one = [
        seconds(lambda row=row: gallery.enroll(embeddings=strangers[row : row + 1], labels=f"late {row}"))
        for row in range(10)
    ]
    result["enroll_one"] = spread(one)
    result["remove_one"] = spread([seconds(lambda row=row: gallery.remove(f"late {row}")) for row in range(10)])
    result["decisions"] = [(a.label, a.best, a.score) for a in answers]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--alike", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=10_000, help="templates of one enrollment")
    parser.add_argument("--probes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    count = options.rows // PER_IDENTITY
    people = clustered(count, PER_IDENTITY + 1, options.dim, options.alike, options.seed).reshape(
        count, -1, options.dim
    )
    table = people[:, :PER_IDENTITY].reshape(-1, options.dim)
    names = [f"identity {row // PER_IDENTITY}" for row in range(len(table))]
    others = clustered(250, 1, options.dim, options.alike, options.seed + 1)
    probes = np.concatenate([people[: options.probes // 2, PER_IDENTITY], others[200:][: options.probes // 2]])
    results: dict[str, Any] = {"rows": len(table), "dim": options.dim, "batch": options.batch, "seed": options.seed}
    with tempfile.TemporaryDirectory() as folder:
        for name, place in {"folder": str(Path(folder) / "gallery"), "milvus": options.place}.items():
            gallery, taken = filled(place, table, names, options.batch)
            with gallery:
                results[name] = {"enroll_per_second": round(len(table) / taken), "enroll_seconds": round(taken, 1)}
                results[name] |= measured(gallery, place, probes, others[:200])
                if name == "milvus":
                    results["server"] = gallery.info()["server"]
    mine, theirs = results["milvus"].pop("decisions"), results["folder"].pop("decisions")
    results["decisions_alike"] = sum(a[:2] == b[:2] for a, b in zip(mine, theirs, strict=True)) / len(mine)
    results["largest_difference_of_scores"] = max(abs(a[2] - b[2]) for a, b in zip(mine, theirs, strict=True))
    results["named"] = sum(a[0] is not None for a in mine)
    text = json.dumps(results, indent=1)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(text)


if __name__ == "__main__":
    main()
