"""All pairs of a set, streamed: how many impostor pairs lie below, at and above each genuine score?"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from embedlab.metrics._arrays import Booleans, Floats, Integers
from embedlab.metrics._ranking import BUDGET, DECIMALS, Rows
from embedlab.metrics._share import Share
from embedlab.metrics._threads import in_threads

HELD = 1 << 22  # genuine pairs that are held one by one
COARSE = 2_000_000  # beyond that: levels of a decimal grid over the range of their scores, at most
TILE = 1024  # rows and columns compared at a time, at most
CELLS = 1 << 23  # of the grid that says where to look for a score, at most
STEPS = 8  # from edge to edge within a cell, before the rest is searched by halving


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


def count_pairs(rows: Rows, codes: Integers, groups: Sequence[Integers], share: Share) -> PairCounts:
    """Compare all pairs of rows (N, D) with classes `codes` (N,), leaving out those that share a group of any kind."""
    levels, genuine, decimals = _levels(rows, codes, groups)
    resolution = 10.0**-decimals
    # half a step to either side: what rounds to a level lies between its two edges
    places = _Places(np.stack([levels - resolution / 2, levels + resolution / 2], axis=1).ravel())
    counts = np.zeros(2 * len(levels) + 1, dtype=np.int64)
    lock = Lock()

    def add(tile: tuple[slice, slice]) -> None:
        scores = _impostors(rows, codes, groups, *tile)
        scores.sort()  # neighbours find their places in the same cache line
        found = places.of(scores)
        with lock:
            np.add.at(counts, found, 1)

    tiles = list(_tiles(len(rows), rows.dim))[share.mine]
    for _ in tqdm(in_threads(add, tiles), total=len(tiles), desc="all pairs", delay=3, leave=False, disable=None):
        pass
    return PairCounts(levels, genuine, share.add(counts).cumsum(), resolution)


class _Places:
    """np.searchsorted(edges, scores, side="right") in a third of the time, by a grid over millions of edges."""

    def __init__(self, edges: Floats) -> None:
        self.edges = np.append(edges, np.inf)
        self.lowest = edges[0] if len(edges) else 0.0
        self.cells = min(CELLS, 4 * len(edges) + 1)
        self.per_cell = self.cells / (edges[-1] - edges[0]) if len(edges) else 0.0
        self.first = np.zeros(self.cells + 1, dtype=np.int32)  # edge at or after the beginning of each cell
        np.add.at(self.first, self._cell(edges) + 1, 1)
        np.cumsum(self.first, out=self.first)

    def _cell(self, scores: Floats) -> NDArray[np.int32]:
        """Rounding keeps the order, so no edge of a lower cell is above a score."""
        cell = scores - self.lowest
        cell *= self.per_cell
        np.clip(cell, 0, self.cells - 1, out=cell)
        return cell.astype(np.int32)

    def of(self, scores: Floats) -> NDArray[np.int32]:
        """How many edges are not above each score, (n,)."""
        place: NDArray[np.int32] = self.first.take(self._cell(scores))
        behind = np.flatnonzero(self.edges.take(place) <= scores)
        for _ in range(STEPS):
            place[behind] += 1
            behind = behind[self.edges.take(place.take(behind)) <= scores.take(behind)]
        place[behind] = np.searchsorted(self.edges[:-1], scores[behind], side="right")
        return place


def _levels(rows: Rows, codes: Integers, groups: Sequence[Integers]) -> tuple[Floats, Integers, int]:
    """Distinct genuine scores, how many pairs have each, and the decimals to which scores are rounded.

    All decimals where the genuine pairs can be held one by one, else as many as the range of their scores leaves levels
    for: where all vectors point one way, scores lie close together and need more decimals to be told apart.
    """
    sizes = np.bincount(codes)
    count, low, high = int((sizes * (sizes - 1) // 2).sum()), 1.0, -1.0
    if count > HELD:
        count = 0  # again, without those that share a group
        for part in _genuine(rows, codes, groups):
            count += len(part)
            low, high = min(low, part.min(initial=1)), max(high, part.max(initial=-1))
    if count <= HELD:
        scores = np.concatenate([np.empty(0), *_genuine(rows, codes, groups)])
        found, counts = np.unique(np.rint(scores * 10**DECIMALS), return_counts=True)
        return found / 10**DECIMALS, counts.astype(np.int64), DECIMALS
    decimals = min(DECIMALS, math.floor(math.log10(COARSE / max(high - low, 10.0**-DECIMALS)) + 1e-9))
    scale = 10**decimals
    first, last = round(low * scale), round(high * scale)
    counts = np.zeros(last - first + 1, dtype=np.int64)
    for part in _genuine(rows, codes, groups):
        np.add.at(counts, np.rint(part * scale).astype(np.int64) - first, 1)
    present = np.flatnonzero(counts)
    return (present + first) / scale, counts[present], decimals


def _genuine(rows: Rows, codes: Integers, groups: Sequence[Integers]) -> Iterator[Floats]:
    """Cosines of all pairs of one class, class by class."""
    order = np.argsort(codes, kind="stable")
    ends = np.bincount(codes).cumsum()
    for first, end in zip(np.append(0, ends[:-1]), ends, strict=True):
        for a, b in _tiles(int(end - first), rows.dim):
            members = order[first:end]
            kept = _upper(a, b)
            for group in groups:
                kept &= group[members[a], None] != group[members[b]]
            yield (rows.unit(members[a]) @ rows.unit(members[b]).T)[kept]


def _impostors(rows: Rows, codes: Integers, groups: Sequence[Integers], a: slice, b: slice) -> Floats:
    """Cosines of the pairs of two classes in one block."""
    kept = codes[a, None] != codes[b]
    if a == b:
        kept &= _upper(a, b)
    for group in groups:
        kept &= group[a, None] != group[b]
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
