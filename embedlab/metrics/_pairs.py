"""All pairs of a set, streamed: how many impostor pairs lie below, at and above each genuine score?"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
from tqdm import tqdm

from embedlab.metrics._arrays import Booleans, Floats, Integers
from embedlab.metrics._ranking import BUDGET, DECIMALS, Rows

HELD = 1 << 22  # genuine pairs that are held one by one
COARSE_DECIMALS = 6  # beyond that: every level of this grid is one score
TILE = 1024  # rows and columns compared at a time, at most


@dataclass(frozen=True, eq=False)
class PairCounts:
    """Genuine scores, and the impostor pairs between them.

    Args:
        levels: (L,) distinct genuine scores, ascending.
        genuine: (L,) genuine pairs at each.
        below: (2 L + 1,) impostor pairs below level 0, up to and with level 0, below level 1, ..., and all.
        resolution: Scores closer than this are the same level.
    """

    levels: Floats
    genuine: Integers
    below: Integers
    resolution: float


def count_pairs(rows: Rows, codes: Integers, groups: Integers | None) -> PairCounts:
    """Compare all pairs of rows (N, D) with classes `codes` (N,), leaving out pairs of one group."""
    sizes = np.bincount(codes)
    decimals = DECIMALS if int((sizes * (sizes - 1) // 2).sum()) <= HELD else COARSE_DECIMALS
    levels, genuine = _levels(rows, codes, groups, decimals)
    resolution = 10.0**-decimals
    # half a step to either side: what rounds to a level lies between its two edges
    edges = np.stack([levels - resolution / 2, levels + resolution / 2], axis=1).ravel()
    counts = np.zeros(len(edges) + 1, dtype=np.int64)
    lock = Lock()

    def add(tile: tuple[slice, slice]) -> None:
        scores = _impostors(rows, codes, groups, *tile)
        scores.sort()  # neighbours find their places in the same cache line
        places = np.searchsorted(edges, scores, side="right")
        with lock:
            np.add.at(counts, places, 1)

    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    tiles = list(_tiles(len(rows), rows.dim))
    # sorting and searching take most of the time, on one core each and without holding the interpreter
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in tqdm(pool.map(add, tiles), total=len(tiles), desc="all pairs", delay=3, leave=False, disable=None):
            pass
    return PairCounts(levels, genuine, counts.cumsum(), resolution)


def _levels(rows: Rows, codes: Integers, groups: Integers | None, decimals: int) -> tuple[Floats, Integers]:
    """Distinct genuine scores, rounded, and how many pairs have each."""
    scale = 10**decimals
    if decimals == DECIMALS:
        scores = np.concatenate([np.empty(0), *_genuine(rows, codes, groups)])
        found, counts = np.unique(np.rint(scores * scale), return_counts=True)
        return found / scale, counts.astype(np.int64)
    counts = np.zeros(2 * scale + 1, dtype=np.int64)
    for part in _genuine(rows, codes, groups):
        np.add.at(counts, np.rint(np.clip(part, -1, 1) * scale).astype(np.int64) + scale, 1)
    present = np.flatnonzero(counts)
    return (present - scale) / scale, counts[present]


def _genuine(rows: Rows, codes: Integers, groups: Integers | None) -> Iterator[Floats]:
    """Cosines of all pairs of one class, class by class."""
    order = np.argsort(codes, kind="stable")
    ends = np.bincount(codes).cumsum()
    for first, end in zip(np.append(0, ends[:-1]), ends, strict=True):
        for a, b in _tiles(int(end - first), rows.dim):
            members = order[first:end]
            kept = _upper(a, b)
            if groups is not None:
                kept &= groups[members[a], None] != groups[members[b]]
            yield (rows.unit(members[a]) @ rows.unit(members[b]).T)[kept]


def _impostors(rows: Rows, codes: Integers, groups: Integers | None, a: slice, b: slice) -> Floats:
    """Cosines of the pairs of two classes in one block."""
    kept = codes[a, None] != codes[b]
    if a == b:
        kept &= _upper(a, b)
    if groups is not None:
        kept &= groups[a, None] != groups[b]
    scores = rows.unit(a) @ rows.unit(b).T
    return scores.ravel() if kept.all() else scores[kept]


def _tiles(count: int, dim: int) -> Iterator[tuple[slice, slice]]:
    """Row and column blocks of the upper triangle of a (count, count) matrix."""
    step = max(1, min(TILE, int((BUDGET // 16) ** 0.5), BUDGET // (32 * dim)))
    for row in range(0, count, step):
        for column in range(row, count, step):
            yield slice(row, min(row + step, count)), slice(column, min(column + step, count))


def _upper(a: slice, b: slice) -> Booleans:
    """Which entries of a block lie above the diagonal of the whole matrix."""
    return np.arange(a.start, a.stop)[:, None] < np.arange(b.start, b.stop)
