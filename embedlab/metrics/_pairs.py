"""All pairs of a set, streamed: how many impostor pairs lie below, at and above each genuine score?

Few genuine pairs are held and sorted, and the impostors counted between them. Many are counted on a grid, together with
the impostors, and a second pass tells apart what lies in the cells that decide a figure; a third, where so much lies in
them that they have to be cut into narrower ones first.
"""

from collections.abc import Callable, Iterator, Sequence
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
COARSE = 2_000_000  # beyond that: cells of a grid over the range of their scores, at most
HEAVY = 1e-3  # share of all (genuine, impostor) comparisons within one cell from which it is told apart, too
LISTED = 1 << 21  # scores of such cells that are listed
PARTS = 1 << 18  # narrower cells that such cells are cut into where they hold more scores, at most
TILE = 1024  # rows and columns compared at a time, at most
CELLS = 1 << 23  # of the grid that says where to look for a score, at most
STEPS = 8  # from edge to edge within a cell, before the rest is searched by halving

_Parts = Callable[[Integers], tuple[Integers | slice, Integers]]  # keys to those that are in any part, and in which


@dataclass(frozen=True, eq=False)
class PairCounts:
    """Genuine scores, and the impostor pairs between them.

    Args:
        levels: (L,) distinct genuine scores, ascending.
        genuine: (L,) genuine pairs at each.
        below: (2 L + 1,) impostor pairs below level 0, up to and with level 0, below level 1, ..., and all.
        blurred: (L,) levels that stand for several scores, in an order that nobody knows.
        resolution: Scores closer than this may be in one such level.
    """

    levels: Floats
    genuine: Integers
    below: Integers
    blurred: Booleans
    resolution: float = 10.0**-DECIMALS


@dataclass(frozen=True, eq=False)
class Side:
    """What is compared.

    Args:
        rows: (N, D) vectors.
        codes: (N,) their classes.
        groups: (N,) each.
    """

    rows: Rows
    codes: Integers
    groups: Sequence[Integers]


@dataclass(frozen=True, eq=False)
class Pairs:
    """All pairs of some vectors, or of each of them with each of a reference, but for those that share a group.

    Args:
        query: One side.
        reference: The other, with codes and groups by the same lists; None pairs the queries with one another.
        share: This rank's part.
    """

    query: Side
    reference: Side | None
    share: Share

    @property
    def other(self) -> Side:
        """The second of each pair."""
        return self.query if self.reference is None else self.reference

    def count(self, decisive: Callable[[PairCounts], Integers]) -> PairCounts:
        """Compare them all.

        Args:
            decisive: Names the levels of a coarse count that decide a figure: they are told apart to 12 decimals.
        """
        count, low, high = self._range()
        if count <= HELD:
            return self._between_held()
        # in another tile a score may be rounded to the next key
        first, last = (_keys(np.array([low, high])) + np.array([-1, 1])).tolist()
        width = -(-(last - first + 1) // COARSE)
        grid = _Grid(first, width, (last - first) // width + 1)
        cells = np.empty((4, grid.cells + 2), dtype=np.int64)  # first key, keys, impostors and genuine pairs in each
        cells[0] = first + width * np.arange(-1, grid.cells + 1)
        cells[1] = width
        cells[2:] = self._counted(lambda keys: (slice(None), grid.cell(keys)), grid.cells + 2, "all pairs, coarsely")
        while True:
            impostors, genuine = cells[2:]
            chosen = genuine * impostors.astype(np.float64) > HEAVY * genuine.sum() * impostors.sum(dtype=np.float64)
            found = _counts(cells[0] + (cells[1] - 1) // 2, genuine, impostors, cells[1] > 1, width)
            chosen[np.flatnonzero(genuine)[decisive(found)]] = True
            chosen &= cells[1] > 1
            if not chosen.any():
                return found
            del found, impostors, genuine  # each as large as the cells
            cells = np.concatenate([cells[:, ~chosen], self._split(grid, cells[:, chosen])], axis=1)
            cells = cells[:, cells[0].argsort(kind="stable")]

    def _between_held(self) -> PairCounts:
        """Impostors counted between the genuine scores, one by one."""
        found, genuine = np.unique(_keys(np.concatenate([np.empty(0), *self._genuine()])), return_counts=True)
        # half a step to either side: what rounds to a level lies between its two edges
        places = _Places((np.stack([found - 0.5, found + 0.5], axis=1) / 10**DECIMALS).ravel())
        counts = np.zeros(2 * len(found) + 1, dtype=np.int64)

        def add(scores: Floats, same: Booleans) -> Callable[[], None]:
            impostors = scores[~same]
            impostors.sort()  # neighbours find their places in the same cache line
            index = places.of(impostors)
            return lambda: np.add.at(counts, index, 1)

        self._stream(add, "all pairs")
        below = self.share.add(counts).cumsum()
        return PairCounts(found / 10**DECIMALS, genuine.astype(np.int64), below, np.zeros(len(found), dtype=np.bool_))

    def _counted(self, parts: _Parts, count: int, title: str) -> Integers:
        """(2, count) impostor and genuine pairs in each part."""
        counts = np.zeros(2 * count, dtype=np.int64)

        def add(scores: Floats, same: Booleans) -> Callable[[], None]:
            kept, part = parts(_keys(scores))
            index = 2 * part + same[kept]
            index.sort()
            return lambda: np.add.at(counts, index, 1)

        self._stream(add, title)
        return self.share.add(counts).reshape(-1, 2).T

    def _split(self, grid: "_Grid", cells: Integers) -> Integers:
        """Some cells (4, C), told apart key by key where their pairs can be listed, and else cut into narrower ones."""
        starts, widths = cells[:2]
        if cells[2:].sum() <= LISTED:
            return self._listed(grid.within(starts, widths, int(widths.max())))
        step = -(-int(widths.max()) // max(2, PARTS // len(starts)))
        parts = -(-widths // step)
        split = np.empty((4, parts.sum()), dtype=np.int64)
        split[0] = np.repeat(starts - step * (parts.cumsum() - parts), parts) + step * np.arange(parts.sum())
        split[1] = np.minimum(step, np.repeat(starts + widths, parts) - split[0])
        split[2:] = self._counted(grid.within(starts, widths, step), split.shape[1], "all pairs, finely")
        return split

    def _listed(self, parts: _Parts) -> Integers:
        """A cell (4, K) for each key that is in one of the parts."""
        lists = [np.empty(0, dtype=np.int64)]  # 2 key + genuine

        def add(scores: Floats, same: Booleans) -> Callable[[], None]:
            keys = _keys(scores)
            kept, _ = parts(keys)
            marked = 2 * keys[kept] + same[kept]
            return lambda: lists.append(marked)

        self._stream(add, "all pairs, finely")
        marked = np.concatenate(self.share.collect(np.concatenate(lists)))
        keys, place = np.unique(marked >> 1, return_inverse=True)
        kinds = np.bincount(2 * place + (marked & 1), minlength=2 * len(keys)).reshape(-1, 2).T
        return np.stack([keys, np.ones_like(keys), *kinds])

    def _range(self) -> tuple[int, float, float]:
        """How many genuine pairs there are, and where they are too many to hold their lowest and highest score."""
        sizes, others = self._sizes()
        pairs = sizes * (sizes - 1) // 2 if self.reference is None else sizes * others
        count, low, high = int(pairs.sum()), 1.0, -1.0
        if count <= HELD:
            return count, low, high
        kept = 0  # without those that share a group
        with tqdm(total=count, desc="genuine pairs", unit_scale=True, delay=3, leave=False, disable=None) as bar:
            for part in self._genuine():
                low, high = min(low, part.min(initial=1)), max(high, part.max(initial=-1))
                kept += len(part)
                bar.update(len(part))
        return kept, float(low), float(high)

    def _sizes(self) -> tuple[Integers, Integers]:
        """(C,) members of each class on both sides."""
        classes = 1 + int(max(self.query.codes.max(), self.other.codes.max()))
        return np.bincount(self.query.codes, minlength=classes), np.bincount(self.other.codes, minlength=classes)

    def _genuine(self) -> Iterator[Floats]:
        """Cosines of all pairs of one class, class by class."""
        orders = [np.argsort(side.codes, kind="stable") for side in (self.query, self.other)]
        ends = [sizes.cumsum()[:-1] for sizes in self._sizes()]
        for members in zip(*map(np.split, orders, ends), strict=True):
            for a, b in self._tiles(*map(len, members)):
                kept = self._kept(a, b, *members)
                yield (self.query.rows.unit(members[0][a]) @ self.other.rows.unit(members[1][b]).T)[kept]

    def _tiles(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """Row and column blocks of a matrix, of its upper triangle where both sides are one."""
        dim = self.query.rows.dim
        step = max(1, min(TILE, int((BUDGET // 16) ** 0.5), BUDGET // (32 * dim)))
        for row in range(0, rows, step):
            for column in range(row if self.reference is None else 0, columns, step):
                yield slice(row, min(row + step, rows)), slice(column, min(column + step, columns))

    def _kept(self, a: slice, b: slice, rows: Integers | slice, columns: Integers | slice) -> Booleans:
        """Which pairs of a block count: those above the diagonal where both sides are one, and in no group together."""
        if self.reference is None:
            kept = np.arange(a.start, a.stop)[:, None] < np.arange(b.start, b.stop)
        else:
            kept = np.ones((a.stop - a.start, b.stop - b.start), dtype=np.bool_)
        for own, others in zip(self.query.groups, self.other.groups, strict=True):
            kept &= own[rows][a, None] != others[columns][b]
        return kept

    def _stream(self, add: Callable[[Floats, Booleans], Callable[[], None]], title: str) -> None:
        """Cosines (n,) of this rank's pairs, block by block, and which of them are genuine.

        What `add` makes of a block is called by one thread at a time.
        """
        lock = Lock()

        def work(tile: tuple[slice, slice]) -> None:
            a, b = tile
            scores = self.query.rows.unit(a) @ self.other.rows.unit(b).T
            same = self.query.codes[a, None] == self.other.codes[b]
            if self.query.groups or (self.reference is None and a == b):
                kept = self._kept(a, b, slice(None), slice(None))
                scores, same = scores[kept], same[kept]
            done = add(scores.ravel(), same.ravel())
            with lock:
                done()

        tiles = list(self._tiles(len(self.query.rows), len(self.other.rows)))[self.share.mine]
        for _ in tqdm(in_threads(work, tiles), total=len(tiles), desc=title, delay=3, leave=False, disable=None):
            pass


def _keys(scores: Floats) -> Integers:
    """Scores at 12 decimals, as whole numbers."""
    scaled = scores * 10.0**DECIMALS
    return np.rint(scaled, out=scaled).astype(np.int64)


def _counts(
    keys: Integers, genuine: Integers, impostors: Integers, blurred: Booleans | None = None, width: int = 1
) -> PairCounts:
    """From the pairs of both kinds at each of some ascending keys."""
    upto = impostors.cumsum()
    present = np.flatnonzero(genuine)
    below = np.append(np.stack([upto - impostors, upto], axis=1)[present].ravel(), upto[-1])
    blurred = np.zeros(len(keys), dtype=np.bool_) if blurred is None else blurred
    return PairCounts(keys[present] / 10**DECIMALS, genuine[present], below, blurred[present], width / 10**DECIMALS)


@dataclass(frozen=True)
class _Grid:
    """Cells of one width over the keys of all genuine scores, from 1; 0 is below them, and `cells` + 1 above."""

    first: int
    width: int
    cells: int

    def cell(self, keys: Integers) -> Integers:
        """Of each key, (n,)."""
        return np.clip((keys - self.first) // self.width + 1, 0, self.cells + 1)

    def within(self, starts: Integers, widths: Integers, step: int) -> _Parts:
        """Parts of `step` keys of some cells, each of them within one cell of the grid."""
        parts = -(-widths // step)
        before, ends = parts.cumsum() - parts, starts + widths
        marked = np.zeros(self.cells + 2, dtype=np.bool_)
        marked[self.cell(starts)] = True

        def part(keys: Integers) -> tuple[Integers, Integers]:
            near = np.flatnonzero(marked[self.cell(keys)])  # few as a rule, so that nothing else is searched for
            keys = keys[near]
            place = np.searchsorted(starts, keys, side="right") - 1
            inside = np.flatnonzero((place >= 0) & (keys < ends[place]))
            place = place[inside]
            return near[inside], before[place] + (keys[inside] - starts[place]) // step

        return part


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
