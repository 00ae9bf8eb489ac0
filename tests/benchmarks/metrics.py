"""Our metrics beside their peers: seconds, memory and agreement, each contestant in a process of its own.

    pip install 'embedlab[bench]'
    python tests/benchmarks/metrics.py --rows 60000 --threads 2 --out runs/benchmark-metrics

Rows are unit vectors around class centres (D = 128; 60 per class, or as many classes as a row says). A process builds
the input, calls its contestant once on 500 rows (imports, first-call costs), then times one call on all; memory is the
peak of the resident set during that call minus what the process held before, sampled every 10 ms. Ours and peer take
turns, `--runs` times; the median counts. Core seconds are what the process computed, threads that wait without sleeping
included; where they are fewer than the seconds, the machine had other work, and they are the better comparison. MB are
2^20 bytes. Linux only: memory is read from /proc.

The folder gets results.json and results.md. The exit status is 1 if a contestant failed or disagrees with ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DIM, PER_CLASS = 128, 60
NOISE = 3.0  # of a class around its centre of deviation 1: recall@1 is far from 1
COSTS = ("seconds", "cpu_seconds", "growth_mb")
TOLERANCE = 1e-4  # peers rank in float32: a near tie may fall the other way
Result = dict[str, float]
Call = Callable[[Any, Any], Result]


def three_metrics_ours() -> Call:
    """recall@1, R-precision and MAP@R, leave-one-out."""
    from embedlab.metrics import retrieval_report

    def call(vectors: Any, labels: Any) -> Result:
        values = retrieval_report(vectors, labels, k=(1,)).values
        return {
            "recall_at_1": values["recall_at_1"],
            "r_precision": values["r_precision"],
            "map_at_r": values["map_at_r"],
        }

    return call


def three_metrics_pml() -> Call:
    """The same by pytorch-metric-learning, which asks FAISS."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = {
        "precision_at_1": "recall_at_1",
        "r_precision": "r_precision",
        "mean_average_precision_at_r": "map_at_r",
    }
    calculator = AccuracyCalculator(include=tuple(names), k="max_bin_count")
    return lambda vectors, labels: {
        names[name]: value for name, value in calculator.get_accuracy(vectors, labels).items()
    }


def faiss_alone(k: int) -> Call:
    """The neighbours only, none of the metrics: a lower bound for whoever asks FAISS."""
    import faiss

    def call(vectors: Any, labels: Any) -> Result:
        index = faiss.IndexFlatIP(DIM)
        index.add(vectors.numpy())
        ids = index.search(vectors.numpy(), k)[1]
        return {"recall_at_1": float((labels.numpy()[ids[:, 1]] == labels.numpy()).mean())}

    return call


def knn_ours() -> Call:
    """Weighted k-NN: the second half of the rows votes on the first."""
    from embedlab.metrics import knn_accuracy

    def call(vectors: Any, labels: Any) -> Result:
        half = len(labels) // 2
        return {"accuracy": knn_accuracy(vectors[half:], labels[half:], vectors[:half], labels[:half], k=200)}

    return call


def knn_lightly() -> Call:
    """The same by lightly, in batches of 256."""
    from lightly.utils.benchmarking import knn_predict

    def call(vectors: Any, labels: Any) -> Result:
        half, right, classes = len(labels) // 2, 0, int(labels.max()) + 1
        bank = vectors[half:].T.contiguous()
        for start in range(0, half, 256):
            rows = slice(start, min(start + 256, half))
            found = knn_predict(vectors[rows], bank, labels[half:], num_classes=classes, knn_k=200, knn_t=0.1)
            right += int((found[:, 0] == labels[rows]).sum())
        return {"accuracy": right / half}

    return call


def map_ours() -> Call:
    """Mean average precision over whole rankings: 500 queries."""
    from embedlab.metrics import mean_average_precision

    def call(vectors: Any, labels: Any) -> Result:
        queries = min(500, len(labels) // 2)
        sides = (vectors[:queries], labels[:queries], vectors[queries:], labels[queries:])
        return {"map": mean_average_precision(*sides)}

    return call


def map_torchmetrics() -> Call:
    """The same by torchmetrics, from a matrix of scores."""
    import torch
    from torchmetrics.functional.retrieval import retrieval_average_precision

    def call(vectors: Any, labels: Any) -> Result:
        queries = min(500, len(labels) // 2)
        scores = vectors[:queries] @ vectors[queries:].T + 1  # it takes no match with a score below 0 for one
        match = labels[:queries, None] == labels[None, queries:]
        values = [retrieval_average_precision(s, m) for s, m in zip(scores, match, strict=True) if m.any()]
        return {"map": torch.stack(values).mean().item()}

    return call


def nearest_ours() -> Call:
    """recall@1 of the first sixth of the rows against the others."""
    from embedlab.metrics import recall_at_k

    def call(vectors: Any, labels: Any) -> Result:
        cut = len(labels) // 6
        return {"recall_at_1": recall_at_k(vectors[:cut], labels[:cut], vectors[cut:], labels[cut:], empty="zero")}

    return call


def nearest_sklearn() -> Call:
    """The same by scikit-learn's brute force."""
    from sklearn.neighbors import NearestNeighbors

    def call(vectors: Any, labels: Any) -> Result:
        cut = len(labels) // 6
        search = NearestNeighbors(n_neighbors=1, algorithm="brute", metric="cosine").fit(vectors[cut:].numpy())
        ids = search.kneighbors(vectors[:cut].numpy(), return_distance=False)[:, 0]
        return {"recall_at_1": float((labels[cut:].numpy()[ids] == labels[:cut].numpy()).mean())}

    return call


def pairs_ours() -> Call:
    """AUC, equal error rate and TAR@FAR over all pairs."""
    from embedlab.metrics import verification_report

    def call(vectors: Any, labels: Any) -> Result:
        report = verification_report(vectors, labels, far=[1e-3])
        return {"auc": report.auc, "eer": report.eer, "tar": report.tar[0]}

    return call


def pairs_sklearn() -> Call:
    """The same by scikit-learn, from the list of all scores."""
    import numpy as np
    from sklearn.metrics import roc_auc_score, roc_curve

    def call(vectors: Any, labels: Any) -> Result:
        row, column = np.triu_indices(len(labels), 1)
        scores = (vectors.double() @ vectors.double().T).numpy()[row, column]
        same = labels.numpy()[row] == labels.numpy()[column]
        far, tar, _ = roc_curve(same, scores)
        place = int(np.argmin(np.abs(1 - tar - far)))
        return {
            "auc": float(roc_auc_score(same, scores)),
            "eer": float((far[place] + 1 - tar[place]) / 2),
            "tar": float(tar[np.searchsorted(far, 1e-3, side="right") - 1]),
        }

    return call


def evaluation_ours() -> Call:
    """All that `embedlab evaluate --report` does with stored vectors, from file to file."""
    import numpy as np

    from embedlab.cli import main as embedlab

    def call(vectors: Any, labels: Any) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/vectors.npy", vectors.numpy())
            np.save(f"{folder}/labels.npy", labels.numpy())
            given = ["evaluate", f"{folder}/vectors.npy", "--labels", f"{folder}/labels.npy"]
            assert embedlab([*given, "--report", f"{folder}/report.html", "--out", f"{folder}/report.json"]) == 0
            found = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))["results"]["vectors"]
        return {"recall_at_1": found["recall_at_1"], "auc": found["verification"]["auc"]}

    return call


# title: rows (None is --rows), classes (None is PER_CLASS rows each), ours, peers
ROWS: dict[str, tuple[int | None, int | None, Callable[[], Call], dict[str, Callable[[], Call]]]] = {
    "three": (
        None,
        None,
        three_metrics_ours,
        {
            "pytorch-metric-learning": three_metrics_pml,
            "faiss, k = 10": partial(faiss_alone, 10),
            "faiss, k = 100": partial(faiss_alone, 100),
        },
    ),
    "knn 1000 classes": (20_000, 1000, knn_ours, {"lightly": knn_lightly}),
    "knn 100 classes": (20_000, 100, knn_ours, {"lightly": knn_lightly}),
    "knn 10 classes": (20_000, 10, knn_ours, {"lightly": knn_lightly}),
    "map": (None, None, map_ours, {"torchmetrics": map_torchmetrics}),
    "nearest": (None, None, nearest_ours, {"scikit-learn": nearest_sklearn}),
    "pairs small": (4_000, None, pairs_ours, {"scikit-learn": pairs_sklearn}),
    "pairs": (None, None, pairs_ours, {}),
    "pairs 10 classes": (None, 10, pairs_ours, {}),
    "evaluation": (20_000, None, evaluation_ours, {}),
}


def data(rows: int, classes: int | None) -> tuple[Any, Any]:
    """Unit vectors and labels as tensors: what the peers take."""
    import torch

    generator = torch.Generator().manual_seed(0)
    count = classes or -(-rows // PER_CLASS)
    labels = (torch.arange(rows) % count)[torch.randperm(rows, generator=generator)]
    vectors = torch.randn(count, DIM, generator=generator)[labels] + NOISE * torch.randn(rows, DIM, generator=generator)
    return torch.nn.functional.normalize(vectors), labels


def resident() -> float:
    """MB that this process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def contestant(row: str, name: str, rows: int, threads: int) -> Result:
    """Run one call in this process: values, seconds, growth."""
    import torch

    torch.set_num_threads(threads)
    _, classes, ours, peers = ROWS[row]
    call = (ours if name == "ours" else peers[name])()
    vectors, labels = data(rows, classes)
    call(vectors[:500], labels[:500] % 20)
    peak, before, running = [0.0], resident(), threading.Event()

    def watch() -> None:
        while not running.wait(0.01):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    values = call(vectors, labels)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    running.set()
    watcher.join()
    return {**values, "seconds": seconds, "cpu_seconds": cpu_seconds, "growth_mb": peak[0] - before}


def measure(row: str, name: str, rows: int, threads: int) -> Result | None:
    """One contestant in a fresh process, or None if it failed."""
    environment = {**os.environ, **{f"{kind}_NUM_THREADS": str(threads) for kind in ("OMP", "OPENBLAS", "MKL")}}
    command = [sys.executable, __file__, "--contestant", row, name, "--rows", str(rows), "--threads", str(threads)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """What was measured, and on what."""
    found = {"python": platform.python_version(), "machine": platform.processor() or platform.machine()}
    for name in ("numpy", "torch", "faiss-cpu", "pytorch-metric-learning", "lightly", "torchmetrics", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def compare(row: str, rows: int, threads: int, runs: int) -> dict[str, Any]:
    """All contestants of a row in turns: medians, and how far their values are from ours."""
    names = ["ours", *ROWS[row][3]]
    found: dict[str, list[Result]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            result = measure(row, name, rows, threads)
            if result is not None:
                found[name].append(result)
    table = {}
    for name, results in found.items():
        if not results:
            table[name] = {"failed": True}
            continue
        values = {key: value for key, value in results[0].items() if key not in COSTS}
        apart = [abs(value - found["ours"][0][key]) for key, value in values.items()] if found["ours"] else [1.0]
        table[name] = {
            **{key: statistics.median(result[key] for result in results) for key in COSTS[:2]},
            "growth_mb": max(result["growth_mb"] for result in results),
            "largest_difference": max(apart),
            "agrees": max(apart) <= TOLERANCE,
            **values,
        }
    return table


def report(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        f"`{results['command']}`: load before {results['load'][0]:.1f}, "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "",
        "| row | rows | who | seconds | of the peer's time | core seconds | growth, MB | largest difference |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, entry in results["rows"].items():
        ours = entry["contestants"]["ours"].get("seconds")
        for name, values in entry["contestants"].items():
            if "failed" in values:
                lines.append(f"| {row} | {entry['rows']} | {name} | failed | | | | |")
                continue
            share = "" if name == "ours" or ours is None else f"{ours / values['seconds']:.3f}"
            lines.append(
                f"| {row} | {entry['rows']} | {name} | {values['seconds']:.2f} | {share} "
                f"| {values['cpu_seconds']:.2f} | {values['growth_mb']:.0f} | {values['largest_difference']:.1e} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the rows asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-metrics"))
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(contestant(*arguments.contestant, arguments.rows, arguments.threads)))
        return 0
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "load": os.getloadavg(),
        "versions": versions(),
        "rows": {},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for row in arguments.only:
        rows = ROWS[row][0] or arguments.rows
        found = compare(row, rows, arguments.threads, arguments.runs)
        results["rows"][row] = {"rows": rows, "contestants": found}
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        (arguments.out / "results.md").write_text(report(results), encoding="utf-8")
        print(row, json.dumps(found), file=sys.stderr)
    print(report(results))
    everyone = [values for entry in results["rows"].values() for values in entry["contestants"].values()]
    return 0 if all(values.get("agrees") for values in everyone) else 1


if __name__ == "__main__":
    sys.exit(main())
