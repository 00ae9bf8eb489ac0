"""The one engine behind every retrieval metric: where do the matches of a query stand in its ranking?

Rankings are by cosine in float64, rounded to 12 decimals; ties go to the lower index. A float32 pass finds the
candidates, on processors that multiply bfloat16 in hardware after a `Screen` that leaves out only what cannot be one.
Wherever float32 cannot tell two candidates apart, float64 decides, and where it cannot tell what it left out from what
it took, the whole row is ranked in float64. Memory is bounded by `BUDGET`, not by the number of pairs.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from embedlab.metrics._arrays import Array, Booleans, Floats, Integers, as_array, as_labels, digest, encode_together
from embedlab.metrics._share import Share
from embedlab.metrics._threads import in_threads

BUDGET = 32 << 20  # bytes that one block of scores or gathered rows may take
DECIMALS = 12  # far above float64 rounding of a cosine, far below any difference that carries meaning
PANEL = 1 << 15  # reference rows multiplied at a time
ROWS = 128  # queries that one core ranks at a time: with fewer a product is slow, with more its result leaves the cache
CHUNK = 8192  # queries at a time, at most
SLACK = 16  # candidates beyond those asked for, so that a tie at the cut rarely needs the whole row
SHALLOW = 1024  # deeper rankings sort whole rows: faster from about here on
STRIDE = 16  # columns that stand together when a threshold is sought
GATHER = 1 << 20  # bytes of reference rows gathered at a time: more would leave the cache
SCREEN_FROM = 4096  # reference rows below which a screen does not pay
IMPORT_FROM = 1e13  # multiplications (half a minute in float32) from which torch is worth importing for the screen


class Rows:
    """Vectors (N, D) of any norm and numeric type, read as unit vectors block by block without a second copy."""

    def __init__(self, values: Any, name: str) -> None:
        self.values = as_array(values)
        if self.values.ndim != 2 or self.values.dtype.kind not in "fiub" or 0 in self.values.shape:
            raise ValueError(
                f"{name} must be (N, D) numbers with at least one row and column, got shape {self.values.shape} of "
                f"{self.values.dtype}; flatten images to (N, -1) first."
            )
        self.scale = np.empty(len(self.values))  # (N,) float64: 1 / norm
        step = max(1, BUDGET // (32 * self.dim))
        for start in range(0, len(self), step):
            block = self.values[start : start + step].astype(np.float64)
            norms = _norms(block)
            bad = ~np.isfinite(norms) | (norms < np.finfo(np.float64).tiny)  # too small to be divided by
            if bad.any():
                row = int(bad.argmax())
                kind = "zero" if norms[row] < 1 else "NaN or infinite"
                raise ValueError(
                    f"{name} row {start + row} is {kind}, so it has no direction: diverged training or an empty image? "
                    "Leave such rows out before evaluating."
                )
            self.scale[start : start + step] = 1 / norms

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dim(self) -> int:
        return int(self.values.shape[1])

    def unit(self, rows: Integers | slice) -> Floats:
        """Rows as float64 of norm 1, (n, D)."""
        unit: Floats = self.values[rows].astype(np.float64)
        unit *= self.scale[rows, None]
        return unit


def _norms(vectors: Floats) -> Floats:
    """(n,), also where squares would overflow or lose digits; NaN where an entry is not finite."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        squares: Floats = np.einsum("nd,nd->n", vectors, vectors)
        norms = np.sqrt(squares)
        odd = np.flatnonzero(~((squares > 1e-280) & (squares < np.inf)))
        largest = np.abs(vectors[odd]).max(axis=1, initial=0.0)
        inner = vectors[odd] / np.where(largest > 0, largest, 1.0)[:, None]
        norms[odd] = largest * np.sqrt(np.einsum("nd,nd->n", inner, inner))
    return norms


class Search:
    """Exact nearest neighbours of unit vectors in a reference."""

    def __init__(self, reference: Rows) -> None:
        self.reference = reference
        self._single: NDArray[np.float32] | None = None
        self._screen: Screen | None = None
        self._asked = self._refused = 0  # queries that the screen was tried on, and those it let too much through for
        self._local = threading.local()
        # Worst case: a float32 dot product of D terms is off by at most D u, rounding its inputs adds 2 u (Higham
        # 2002, section 3.1; u = 2^-24), and an order compares two of them.
        self.tolerance = 2 * (reference.dim + 2) * 2.0**-24

    def scores(self, query: Floats) -> Floats:
        """Cosines of unit queries (n, D) with the whole reference, (n, N) float64, rounded so that ties are ties."""
        scores = np.empty((len(query), len(self.reference)))
        step = max(1, BUDGET // (32 * self.reference.dim))
        for start in range(0, len(self.reference), step):
            block = slice(start, start + step)
            np.matmul(query, self.reference.unit(block).T, out=scores[:, block])
        np.round(scores, DECIMALS, out=scores)
        return scores

    def prepare(self, queries: int) -> None:
        """Make, before several threads use it, what pays for so many queries."""
        if self._single is not None:
            return
        self._single = np.empty((len(self.reference), self.reference.dim), dtype=np.float32)
        step = max(1, BUDGET // (32 * self.reference.dim))
        for start in range(0, len(self.reference), step):
            rows = slice(start, start + step)
            self._single[rows] = self.reference.unit(rows)
        if len(self.reference) >= SCREEN_FROM:
            torch = _bfloat16_torch(queries * len(self.reference) * self.reference.dim)
            self._screen = None if torch is None else Screen(torch, self._single)

    def nearest(self, query: Floats, count: int, *, ordered: bool = True) -> tuple[Integers, Floats]:
        """The `count` nearest reference rows of unit queries (n, D), nearest first.

        Args:
            query: Unit vectors.
            count: At most as many as there are reference rows.
            ordered: False settles only which rows they are; those that float32 cannot tell apart may change places.

        Returns:
            Row numbers (n, count) and cosines (n, count); a cosine that nothing depends on has float32 precision.
        """
        self.prepare(len(query))
        ids, scores = np.empty((len(query), count), dtype=np.int64), np.empty((len(query), count))

        def rank(rows: slice) -> None:
            ids[rows], scores[rows] = self._nearest(query[rows], count, ordered)

        for _ in in_threads(rank, blocks(len(query), ROWS)):
            pass
        return ids, scores

    def _nearest(self, query: Floats, count: int, ordered: bool) -> tuple[Integers, Floats]:
        total = len(self.reference)
        taken = min(total, count + SLACK)
        found, ids = self._candidates(query.astype(np.float32), taken)
        scores = found.astype(np.float64)
        close = scores[:, :-1] - scores[:, 1:] <= self.tolerance
        if not ordered and taken > count:
            close &= close[:, count - 1 : count]
        if ordered or taken > count:
            self._settle(query, ids, scores, close)
        if taken < total:
            unsure = np.flatnonzero(found[:, count - 1] - found[:, -1] <= self.tolerance)
            step = max(1, BUDGET // (8 * total))
            for start in range(0, len(unsure), step):
                rows = unsure[start : start + step]
                for row, full in zip(rows, self.scores(query[rows]), strict=True):
                    ids[row, :count], scores[row, :count] = _first(full, count)
        return ids[:, :count], scores[:, :count]

    def _candidates(self, query: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], Integers]:
        """The `count` largest float32 cosines of each query and whose they are, both (n, count), nearest first."""
        single = self._in_single
        found, ids = np.empty((len(query), count), dtype=np.float32), np.empty((len(query), count), dtype=np.int64)
        left = np.arange(len(query))
        # a screen goes where it lets too much through for most queries
        if self._screen and STRIDE * 4 * count <= len(single) and 2 * self._refused <= self._asked:
            left = self._screened(self._screen, query, found, ids)
        if not len(left):
            return found, ids
        parts = []
        buffer = self._buffer(len(left) * min(PANEL, len(single)))
        for panel in blocks(len(single), PANEL):
            part = single[panel]
            scores = buffer[: len(left) * len(part)].reshape(len(left), len(part))
            best, place = _largest(np.matmul(query[left], part.T, out=scores), count)
            parts.append((best, place + panel.start))
        best, place = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        order = _top(best, count)
        found[left], ids[left] = np.take_along_axis(best, order, axis=1), np.take_along_axis(place, order, axis=1)
        return found, ids

    def _screened(
        self, screen: "Screen", query: NDArray[np.float32], found: NDArray[np.float32], ids: Integers
    ) -> Integers:
        """Fill `found` and `ids` for all queries that a bfloat16 screen helps, and return the numbers of the others."""
        count = found.shape[1]
        # gathering more rows costs more than multiplying all of them
        places = screen.pass_on(query, count, len(self.reference) // (2 * STRIDE))
        usable = np.count_nonzero(places >= 0, axis=1) >= count
        self._asked += len(query)
        self._refused += int((~usable).sum())
        if usable.any():
            places = places[usable]
            scores = self._among(query[usable], places)
            order = _top(scores, count)
            found[usable], ids[usable] = (np.take_along_axis(part, order, axis=1) for part in (scores, places))
        return np.flatnonzero(~usable)

    def _among(self, query: NDArray[np.float32], places: Integers) -> NDArray[np.float32]:
        """float32 cosines of each query with its own reference rows `places` (n, c); -inf where a place is -1."""
        single = self._in_single
        scores = np.empty(places.shape, dtype=np.float32)
        step = max(1, GATHER // (4 * single.shape[1] * max(1, places.shape[1])))
        for start in range(0, len(places), step):
            rows = slice(start, start + step)
            np.einsum("nd,ncd->nc", query[rows], single[places[rows]], out=scores[rows])
        scores[places < 0] = -np.inf
        return scores

    def _buffer(self, size: int) -> NDArray[np.float32]:
        """Room for scores, one for each thread: fresh memory costs a quarter of what a product does."""
        held: NDArray[np.float32] | None = getattr(self._local, "buffer", None)
        if held is None or len(held) < size:
            held = self._local.buffer = np.empty(size, dtype=np.float32)
        return held

    @property
    def _in_single(self) -> NDArray[np.float32]:
        assert self._single is not None, "prepare comes first"
        return self._single

    def exact(self, query: Floats, row: Integers, chosen: Integers) -> Floats:
        """Cosines of query[row] with reference[chosen], (n,) float64, rounded so that ties are ties."""
        exact = np.empty(len(row))
        for block in blocks(len(row), max(1, GATHER // (8 * self.reference.dim))):
            np.einsum("nd,nd->n", query[row[block]], self.reference.unit(chosen[block]), out=exact[block])
        return exact.round(DECIMALS)

    def _settle(self, query: Floats, ids: Integers, scores: Floats, close: Booleans) -> None:
        """Order in place, by float64 and then by index, each run of candidates that float32 cannot tell apart."""
        edge = np.zeros((len(ids), 1), dtype=np.bool_)
        row, column = np.nonzero(np.hstack([close, edge]) | np.hstack([edge, close]))
        if not len(row):
            return
        run = np.hstack([edge, ~close]).cumsum(axis=1)[row, column]
        chosen = ids[row, column]
        exact = self.exact(query, row, chosen)
        order = np.lexsort((chosen, -exact, run, row))
        ids[row, column], scores[row, column] = chosen[order], exact[order]


class Screen:
    """A bfloat16 product that says which reference rows may be among the nearest, for certain.

    The proof. Let x, y be unit vectors and x', y' their roundings to bfloat16, whose distances |x' - x| <= a and
    |y' - y| <= b are measured. The product is accumulated in float32, and its result p is rounded to bfloat16, s:

        |p - xy| <= |(x' - x) y'| + |x (y' - y)| + accumulation <= a (1 + b) + b + 2 D u (1 + a) (1 + b) =: e

    (Cauchy-Schwarz; u = 2^-24; the 2 covers sums in any order with flushed subnormals, Higham 2002, section 3.1.) Let
    t be such that `count` rows have s >= t. Rounding is monotone, so each of them has p >= m, the middle between t and
    the bfloat16 below it, and xy >= m - e. So the true `count`-th nearest has xy >= m - e, whatever ties with it or
    beats it has p >= m - 2 e and therefore s >= the largest bfloat16 that is not above m - 2 e. Nothing else is kept.
    x and y themselves are float32 roundings of the float64 vectors: that is part of `Search.tolerance`, and
    one more of it is added to e so that no candidate of the float32 pass is lost either.
    """

    def __init__(self, torch: Any, single: NDArray[np.float32]) -> None:
        self.torch = torch
        self.reference = torch.from_numpy(single).bfloat16()  # (N, D)
        self.residual = max(  # b
            float(self._residual(single[rows], self.reference[rows]).max())
            for rows in (slice(start, start + CHUNK) for start in range(0, len(single), CHUNK))
        )

    def _residual(self, single: NDArray[np.float32], rounded: Any) -> Floats:
        # by hand: a parallel region for few rows costs more than the work; exact: both lie close together (Sterbenz)
        difference = _widened(rounded.view(self.torch.int16).numpy()) - single
        # 1 + 1e-5: float32 sums of squares
        residual: Floats = np.sqrt(np.einsum("nd,nd->n", difference, difference)).astype(np.float64) * (1 + 1e-5)
        return residual

    def pass_on(self, query: NDArray[np.float32], count: int, most: int) -> Integers:
        """Candidates of each query (n, D): (n, c) row numbers, with -1 in between.

        A query with more than `most` candidates, or whose nearest are not even at an acute angle, gets none.
        """
        total, dim = self.reference.shape
        width = min(PANEL, total)
        buffer = self.torch.empty(len(query) * width, dtype=self.torch.bfloat16)
        rounded = self.torch.from_numpy(query).bfloat16()
        own = self._residual(query, rounded)
        slack = own * (1 + self.residual) + self.residual
        slack += 4 * (dim + 2) * 2.0**-24 * (1 + own) * (1 + self.residual)
        threshold, refused = np.zeros(len(query), dtype=np.int16), np.zeros(len(query), dtype=np.bool_)
        sizes = np.zeros(len(query), dtype=np.int64)
        hits = []
        for panel in blocks(total, width):
            part = self.reference[panel]
            scores = buffer[: len(query) * len(part)].view(len(query), len(part))
            self.torch.matmul(rounded, part.T, out=scores)
            # as integers, positive bfloat16 are in order and negative ones are below all of them
            keys = scores.view(self.torch.int16).numpy()
            np.maximum(threshold, _lower_bound(keys, count), out=threshold)
            cut = _cut(threshold, slack)
            refused |= cut <= 0
            row, column = _passing(keys, cut, refused, most)
            hits.append((row, column + panel.start, keys[row, column]))
            sizes += np.bincount(row, minlength=len(query))
            refused |= sizes > 2 * most  # many panels with many hits each
        row, column, key = (np.concatenate(side) for side in zip(*hits, strict=True))
        order = np.flatnonzero(~refused[row])
        order = order[np.argsort(row[order], kind="stable")]
        places, found = (_padded(row[order], side[order], len(query)) for side in (column, key))
        if places.shape[1] >= count:  # now that all panels are seen, the threshold itself
            place = found.shape[1] - count
            cut = _cut(np.partition(found, place, axis=1)[:, place], slack)
            places[found < cut[:, None]] = -1
        places[np.count_nonzero(places >= 0, axis=1) > most] = -1
        return places


def blocks(total: int, step: int) -> list[slice]:
    """Cut `total` rows into runs of `step`, the last one shorter."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _widened(keys: Array) -> NDArray[np.float32]:
    """Patterns of bfloat16 as float32."""
    return (keys.astype(np.int32) << 16).view(np.float32)


def _lower_bound(scores: Array, count: int) -> Array:
    """Of the `count`-th largest of each row of scores (n, N), (n,); nearly always close.

    `count` sets of columns whose maxima reach it hold at least as many entries that do.
    """
    total = scores.shape[1]
    sets = total // max(1, min(STRIDE, total // (4 * count)))  # four times as many: most of the largest stand alone
    if sets < count:
        lowest: Array = scores.min(axis=1)
        return lowest
    maxima = scores[:, : total // sets * sets].reshape(len(scores), -1, sets).max(axis=1)
    bound: Array = np.partition(maxima, sets - count, axis=1)[:, sets - count]
    return bound


def _cut(threshold: NDArray[np.int16], slack: Floats) -> NDArray[np.int16]:
    """The cut of `Screen`'s proof, 0 where it is not positive: patterns of bfloat16 as integers, (n,)."""
    value, before = (_widened(np.maximum(threshold - less, 0)).astype(np.float64) for less in (0, 1))
    cut = ((value + before) / 2 - 2 * slack).astype(np.float32)
    # dropping the lower bits rounds towards zero; one more step for the rounding to float32
    return np.where(cut > 0, (cut.view(np.int32) >> 16) - 1, 0).astype(np.int16)


def _passing(
    keys: NDArray[np.int16], cut: NDArray[np.int16], refused: Booleans, most: int
) -> tuple[Integers, Integers]:
    """Row and column of all entries that reach their row's cut; rows that let too many through become `refused`."""
    mask = keys >= np.where(refused, np.iinfo(np.int16).max, cut)[:, None]
    if np.count_nonzero(mask) > len(mask) * most:  # before their hits take memory
        refused |= np.count_nonzero(mask, axis=1) > most
        mask[refused] = False
    hits = np.flatnonzero(mask)
    row = hits // keys.shape[1]
    return row, hits - row * keys.shape[1]


def _padded(row: Integers, values: Array, rows: int) -> Array:
    """(rows, c) values by row, which ascends; -1 behind the last of each."""
    sizes = np.bincount(row, minlength=rows)
    padded = np.full((rows, max(1, int(sizes.max()))), -1, dtype=values.dtype)
    padded[row, np.arange(len(row)) - np.repeat(sizes.cumsum() - sizes, sizes)] = values
    return padded


def _bfloat16_torch(work: float) -> Any:
    """The module torch, where it is loaded or worth loading and the processor multiplies bfloat16; else None."""
    if "torch" not in sys.modules and work < IMPORT_FROM:
        return None
    try:
        import torch
    except ImportError:
        return None
    able = torch.cpu.get_capabilities()
    return torch if able.get("amx_bf16") or able.get("avx512_bf16") else None


def _top(scores: NDArray[np.float32], count: int) -> Integers:
    """Columns (n, count) of the largest of each row of scores (n, c), largest first."""
    total = scores.shape[1]
    chosen = np.argpartition(scores, total - count, axis=1)[:, total - count :]
    return np.take_along_axis(chosen, np.argsort(-np.take_along_axis(scores, chosen, axis=1), axis=1), axis=1)


def _largest(scores: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], Integers]:
    """At least the `count` largest of each row of scores (n, N), or all N if fewer, in no order, and their columns.

    What a row has fewer of than another is -inf.
    """
    total = scores.shape[1]
    count = min(count, total)
    mask = scores >= _lower_bound(scores, count)[:, None]
    if 8 * np.count_nonzero(mask) > scores.size:  # a short row, or ties without end
        top = np.argpartition(scores, total - count, axis=1)[:, total - count :]
        return np.take_along_axis(scores, top, axis=1), top
    hits = np.flatnonzero(mask)
    sizes = np.count_nonzero(mask, axis=1)
    row = np.repeat(np.arange(len(scores)), sizes)
    column = np.arange(len(hits)) - np.repeat(sizes.cumsum() - sizes, sizes)
    passed = np.full((len(scores), sizes.max()), -np.inf, dtype=np.float32)
    passed[row, column] = scores.ravel()[hits]
    ids = np.zeros(passed.shape, dtype=np.int64)
    ids[row, column] = hits - row * total
    return passed, ids


def _first(scores: Floats, count: int) -> tuple[Integers, Floats]:
    """The `count` largest of one row of scores (N,), ties to the lower index."""
    cut = np.partition(scores, len(scores) - count)[len(scores) - count]
    kept = np.flatnonzero(scores >= cut)
    order = kept[np.argsort(-scores[kept], kind="stable")[:count]]
    return order, scores[order]


@dataclass(frozen=True, eq=False)
class Matches:
    """Where the matches of n queries stand in their rankings.

    Args:
        queries: (n,) number of each query.
        row: (M,) which of the n queries a match belongs to, ascending.
        rank: (M,) place of the match, 1 is nearest, ascending within a query; places beyond the depth that was asked
            for are left out.
        total: (n,) matches of each query in the reference, found or not: the R of R-precision.
    """

    queries: Integers
    row: Integers
    rank: Integers
    total: Integers

    def sum(self, weights: Array) -> Floats:
        """Add up one weight per match, (M,), for each query: (n,)."""
        sums = np.bincount(self.row, weights=weights.astype(np.float64), minlength=len(self.total))
        return sums.astype(np.float64)

    @property
    def order(self) -> Integers:
        """(M,) 1 for the first match of a query, 2 for its second, ..."""
        first = np.searchsorted(self.row, np.arange(len(self.total)))
        return np.arange(1, len(self.row) + 1) - first[self.row]


class Problem:
    """Queries, the reference they are ranked against, and who may not be a candidate of whom."""

    def __init__(
        self,
        query: Any,
        query_labels: Any,
        *,
        reference: Any = None,
        reference_labels: Any = None,
        groups: Any = None,
        over_ranks: bool = False,
    ) -> None:
        self.leave_one_out = reference is None
        if self.leave_one_out != (reference_labels is None):
            raise ValueError(
                "reference and reference_labels go together: both for a query set against a gallery, "
                f"neither for leave-one-out; got only {'reference_labels' if self.leave_one_out else 'reference'}."
            )
        self.query = Rows(query, "query")
        self.reference = self.query if self.leave_one_out else Rows(reference, "reference")
        if self.query.dim != self.reference.dim:
            raise ValueError(
                f"query has {self.query.dim} numbers per row, reference has {self.reference.dim}: "
                "embedded by two different encoders?"
            )
        labels = as_labels(query_labels, "query_labels", len(self.query))
        others = labels if self.leave_one_out else as_labels(reference_labels, "reference_labels", len(self.reference))
        self.query_codes, self.reference_codes, self.classes = encode_together(
            labels, others, "query and reference labels"
        )
        self.query_groups, self.reference_groups = self._groups(groups)
        self.total, self.candidates = self._counts()
        self.search = Search(self.reference)
        self.share = Share(over_ranks=over_ranks)

    def _groups(self, groups: Any) -> tuple[Integers | None, Integers | None]:
        if groups is None:
            return None, None
        if self.leave_one_out:
            codes = np.unique(as_labels(groups, "groups", len(self.query)), return_inverse=True)[1].astype(np.int64)
            return codes, codes
        if not isinstance(groups, (tuple, list)) or len(groups) != 2:
            raise ValueError(
                "groups must be a pair (query groups, reference groups) when a reference is given, "
                f"got {type(groups).__name__}; one array is enough only for leave-one-out."
            )
        first = as_labels(groups[0], "groups[0]", len(self.query))
        second = as_labels(groups[1], "groups[1]", len(self.reference))
        return encode_together(first, second, "query and reference groups")[:2]

    def _counts(self) -> tuple[Integers, Integers]:
        """Matches and candidates of each query, both (Q,), after exclusion."""
        total = np.bincount(self.reference_codes, minlength=len(self.classes))[self.query_codes]
        candidates = np.full(len(self.query), len(self.reference))
        if self.query_groups is None or self.reference_groups is None:
            return total - self.leave_one_out, candidates - self.leave_one_out
        # in leave-one-out every query shares its own group, so that it is excluded once
        width = int(max(self.query_groups.max(), self.reference_groups.max())) + 1
        excluded = np.bincount(self.reference_groups, minlength=width)[self.query_groups]
        pairs, codes = np.unique(
            np.concatenate([self.reference_codes, self.query_codes]) * width
            + np.concatenate([self.reference_groups, self.query_groups]),
            return_inverse=True,
        )
        own = np.bincount(codes[: len(self.reference)], minlength=len(pairs))[codes[len(self.reference) :]]
        return total - own, candidates - excluded

    def digest(self, *settings: Array) -> str:
        """Of all that decides what is found: vectors, labels, groups, settings."""
        parts = [self.query.values, self.query_codes, self.query_groups, *settings]
        if not self.leave_one_out:
            parts += [self.reference.values, self.reference_codes, self.reference_groups]
        return digest(*parts)

    def matches(self, depth: Integers, done: int = 0) -> Iterator[Matches]:
        """Find the matches of this rank's queries, some at a time, in an order that only the inputs decide.

        Args:
            depth: (Q,) how many places of each query's ranking are wanted.
            done: How many queries of that order to leave out.
        """
        depth = np.minimum(depth, self.candidates)
        want = depth + len(self.reference) - self.candidates  # those excluded may stand anywhere before
        # queries of like depth together: a deep one costs only itself
        order = np.argsort(want, kind="stable")[self.share.mine]
        with tqdm(
            total=len(order), initial=done, desc="ranking", unit="query", delay=3, leave=False, disable=None
        ) as bar:
            start = done
            while start < len(order):
                ahead = order[start : start + CHUNK]
                if want[ahead[0]] > SHALLOW:
                    rows = ahead[: max(1, BUDGET // (8 * len(self.reference)))]
                    yield self._deep(rows, depth)
                else:
                    size = np.arange(1, len(ahead) + 1) * np.maximum(want[ahead] + SLACK, self.query.dim)
                    fits = (want[ahead] <= SHALLOW) & (size <= BUDGET // 16)
                    rows = ahead[: max(1, int(fits.sum()))]
                    yield self._shallow(rows, depth, max(1, int(want[rows[-1]])))
                start += len(rows)
                bar.update(len(rows))

    def _excluded(self, rows: Integers, ids: Integers) -> Booleans:
        """Which candidates (n, k) of which queries (n,) do not count."""
        if self.query_groups is not None and self.reference_groups is not None:
            return np.equal(self.reference_groups[ids], self.query_groups[rows, None])
        if self.leave_one_out:
            return np.equal(ids, rows[:, None])
        return np.zeros((len(rows), ids.shape[1]), dtype=np.bool_)

    def nearest(self, rows: slice, k: int) -> tuple[Integers, Floats]:
        """The k nearest candidates of some queries, ids (n, k) and cosines; behind the last -1 and -inf."""
        query, numbers = self.query.unit(rows), np.arange(rows.start, rows.stop)
        ids, scores = np.full((len(query), k), -1, dtype=np.int64), np.full((len(query), k), -np.inf)
        everyone = np.arange(len(self.reference))[None]
        want = min(len(self.reference), k + int((len(self.reference) - self.candidates[rows]).max()))
        if want <= SHALLOW:
            found, cosines = self.search.nearest(query, want)
            excluded = self._excluded(numbers, found)
            order = np.argsort(excluded, axis=1, kind="stable")[:, :k]  # those that count first, else as they were
            counted = ~np.take_along_axis(excluded, order, axis=1)
            ids[:, : order.shape[1]][counted] = np.take_along_axis(found, order, axis=1)[counted]
            scores[:, : order.shape[1]][counted] = np.take_along_axis(cosines, order, axis=1)[counted]
            return ids, scores
        for part in blocks(len(query), max(1, BUDGET // (8 * len(self.reference)))):
            whole = self.search.scores(query[part])
            whole[self._excluded(numbers[part], everyone)] = -np.inf
            for row, full in enumerate(whole, part.start):
                count = min(k, int(self.candidates[numbers[row]]))
                if count:
                    ids[row, :count], scores[row, :count] = _first(full, count)
        return ids, scores

    def _shallow(self, rows: Integers, depth: Integers, count: int) -> Matches:
        self.search.prepare(len(self.query))
        ids, _ = self.search.nearest(self.query.unit(rows), count)
        allowed = ~self._excluded(rows, ids)
        rank = allowed.cumsum(axis=1, dtype=np.int32)
        hit = (self.reference_codes[ids] == self.query_codes[rows, None]) & allowed & (rank <= depth[rows, None])
        row, column = np.nonzero(hit)
        return Matches(rows, row, rank[row, column].astype(np.int64), self.total[rows])

    def _deep(self, rows: Integers, depth: Integers) -> Matches:
        everyone = np.arange(len(self.reference))[None]
        excluded = self._excluded(rows, everyone)
        scores = self.search.scores(self.query.unit(rows))
        np.copyto(scores, -np.inf, where=excluded)
        hit = (self.reference_codes == self.query_codes[rows, None]) & ~excluded
        ranks = [_ranks(full, np.flatnonzero(wanted)) for full, wanted in zip(scores, hit, strict=True)]
        ranks = [rank[rank <= limit] for rank, limit in zip(ranks, depth[rows], strict=True)]
        row = np.repeat(np.arange(len(rows)), [len(rank) for rank in ranks])
        return Matches(rows, row, np.concatenate(ranks), self.total[rows])


def _ranks(scores: Floats, places: Integers) -> Integers:
    """Ascending ranks of some `places` within one row of scores (N,), 1 for the largest, ties to the lower index."""
    ascending = np.sort(scores)
    above = len(scores) - np.searchsorted(ascending, scores[places], side="right")
    if (len(scores) - np.searchsorted(ascending, scores[places], side="left") > above + 1).any():
        position = np.empty(len(scores), dtype=np.int64)
        position[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
        above = position[places]
    return np.sort(above) + 1
