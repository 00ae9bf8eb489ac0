"""What the processes of test_metrics_scale.py run; importable, because they are spawned."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from embedlab import metrics
from embedlab.metrics import _pairs, retrieval

SHARES = {2: [30, 17], 3: [28, 0, 19]}  # samples of each rank
METRICS = {
    "recall": partial(metrics.recall_at_k, k=2),
    "precision": partial(metrics.precision_at_k, k=3),
    "r_precision": metrics.r_precision,
    "map_at_r": metrics.map_at_r,
    "map": metrics.mean_average_precision,
    "mrr": metrics.mean_reciprocal_rank,
    "ndcg": metrics.ndcg_at_k,
    "cmc": partial(metrics.cmc, k=5),
    "knn": partial(metrics.knn_accuracy, k=4),
}


def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    numbers = random.integers(0, 6, 47)
    vectors = random.standard_normal((6, 5))[numbers] + random.standard_normal((47, 5))
    vectors[7] = vectors[31]
    return vectors, np.array([f"class {'x' * n}" for n in numbers]), random.integers(0, 20, 47)


def figures(vectors, labels, groups, *, over_ranks=False, state=None) -> dict:
    """Everything that can be shared out, leave-one-out and against a reference."""
    kept = slice(None, 20), slice(20, None)
    sides = (vectors[kept[0]], labels[kept[0]], vectors[kept[1]], labels[kept[1]])
    found = {name: metric(vectors, labels, over_ranks=over_ranks) for name, metric in METRICS.items()}
    found |= {f"{name}, two sets": metric(*sides, over_ranks=over_ranks) for name, metric in METRICS.items()}
    report = metrics.retrieval_report(
        vectors, labels, k=[1, 3], groups=groups, empty="zero", over_ranks=over_ranks, state=state
    )
    pairs = metrics.verification_report(vectors, labels, groups=groups, over_ranks=over_ranks)
    with patch.multiple(_pairs, HELD=10, COARSE=20):
        many = metrics.verification_report(vectors, labels, groups=groups, over_ranks=over_ranks).to_dict()
    many = {f"{name} of many": value for name, value in many.items()}
    across = metrics.verification_report(*sides, over_ranks=over_ranks).to_dict()
    across = {f"{name}, two sets": value for name, value in across.items()}
    return {**found, **report.values, **report.per_query, **pairs.to_dict(), **many, **across}


def failures(rank: int, folder: str) -> dict[str, str]:
    """What every rank is told where rank 1 alone cannot go on, by what was tried."""
    vectors, labels, _ = samples()
    good = metrics.recall_at_k(vectors, labels, over_ranks=True)
    if rank == 1:
        vectors[3] = np.nan
    state = Path(folder) / ("damaged" if rank == 1 else f"sound-{rank}")
    (Path(folder) / "damaged-2-of-2").write_bytes(b"?")
    (Path(folder) / "damaged-2-of-3").write_bytes(b"?")
    attempts = {name: partial(metric, vectors, labels) for name, metric in METRICS.items()}
    attempts |= {
        "report": partial(metrics.retrieval_report, vectors, labels),
        "hits": partial(metrics.knn_hits, vectors, labels),
        "pairs": partial(metrics.verification_report, vectors, labels),
        "depth": partial(metrics.recall_at_k, *samples()[:2], k=1 - rank % 2),
        "state": partial(metrics.retrieval_report, *samples()[:2], state=state),
        "far": partial(metrics.verification_report, *samples()[:2], far=[0.1, 0.2 + rank]),
        "depths": partial(metrics.retrieval_report, *samples()[:2], k=[1 + rank, 5]),
        "no such argument": partial(metrics.recall_at_k, *samples()[:2], **({"depth": 1} if rank == 1 else {})),
    }
    attempts = {name: partial(attempt, over_ranks=True) for name, attempt in attempts.items()}
    attempts["ragged"] = partial(metrics.each_sample_once, [0, 1], [[1, 2], [3]] if rank == 1 else [[1], [2]])
    told = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            told[name] = str(error)
    vectors[:] = samples()[0]
    assert metrics.recall_at_k(vectors, labels, over_ranks=True) == good, "the ranks are out of step"
    return told


def run(rank: int, folder: str) -> None:
    """Three processes, then two of them: collect, share out, and what is refused is refused on all of them."""
    torch.set_num_threads(1)
    retrieval.ROWS, _pairs.TILE = 5, 9  # else one rank would do it all
    for world, sizes in SHARES.items():
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        index = np.random.default_rng(1).permutation(47)[sum(sizes[:rank]) :][: sizes[rank]]
        index = np.concatenate([index, index[:3]])  # padding
        columns = [column[index] for column in samples()] if len(index) else [[], [], []]
        found, *union = metrics.each_sample_once(index, *columns)
        results = figures(*union, over_ranks=True, state=Path(folder) / f"state-{world}")
        results["again"] = metrics.retrieval_report(
            *union[:2], k=[1, 3], groups=union[2], empty="zero", over_ranks=True, state=Path(folder) / f"state-{world}"
        ).values
        refused = []
        for attempt in (
            lambda: metrics.recall_at_k(*samples()[:2], over_ranks=True, groups=np.full(47, rank)),
            lambda: metrics.recall_at_k(samples()[0] + rank, samples()[1], over_ranks=True),
            lambda: metrics.knn_accuracy(*samples()[:2], k=rank + 1, over_ranks=True),
            lambda: metrics.verification_report(samples()[0][rank:], samples()[1][rank:], over_ranks=True),
            lambda: metrics.each_sample_once([0, 1], [0] * (3 if rank == 1 else 2)),
            lambda: metrics.each_sample_once([0], np.zeros((1, 2 + rank))),
        ):
            try:
                attempt()
            except ValueError as error:
                refused.append(str(error))
        everyone = {"index": found.tolist(), "figures": results, "refused": refused, "failed": failures(rank, folder)}
        torch.save(everyone, Path(folder) / f"found-{world}-{rank}")
        dist.barrier()
        dist.destroy_process_group()
