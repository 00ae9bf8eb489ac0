"""Pairs for intervals and pictures: all of them where they are few, else drawn by a seed.

The figures themselves come from all pairs (`verification_report`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedlab.metrics._arrays import (
    Array,
    Booleans,
    Floats,
    Integers,
    allowed,
    as_count,
    as_labels,
    as_scores,
    encode_together,
)
from embedlab.metrics._ranking import BUDGET, Rows
from embedlab.metrics.verification import _checked_targets, _equal_errors

MOST = 300_000  # pairs of a kind
LEVELS = 1024  # thresholds between which scores are not told apart in resamples
_BLOCK = 4 << 20  # weights, or pairs, in memory at a time
_RARE = 20  # impostors that are fewer than one pair in so many are looked for, not met by chance
Marks = tuple[Integers, Integers] | None  # the group of each row of both sides


@dataclass(frozen=True, eq=False)
class PairSample:
    """Genuine and impostor pairs of one set, or of a query set and a reference.

    Args:
        genuine: (G, 2) rows; the second counts in the reference where there is one.
        impostors: (I, 2) rows.
        codes: Identity of each row of both sides, by one list; the same array twice without a reference.
        genuine_total: How many there are; more than G where they were drawn, with replacement.
        impostors_total: As genuine_total.
    """

    genuine: Integers
    impostors: Integers
    codes: tuple[Integers, Integers]
    genuine_total: int
    impostors_total: int

    def scores(self, query: Any, reference: Any = None) -> tuple[Floats, Floats]:
        """Cosines of the genuine (G,) and the impostor (I,) pairs, in float64.

        Args:
            query: (N, D) vectors, row by row those whose labels the pairs were drawn by.
            reference: (M, D) vectors of the reference, where the pairs were drawn with one.

        Raises:
            ValueError: Another number of rows, two widths, a NaN or zero vector.
        """
        left = Rows(query, "query")
        right = left if reference is None else Rows(reference, "reference")
        rows, wanted = (len(left), len(right)), tuple(map(len, self.codes))
        if rows != wanted or left.dim != right.dim:
            raise ValueError(
                f"The pairs were drawn among {wanted[0]} queries and {wanted[1]} rows to compare them with, got "
                f"vectors {left.values.shape} and {right.values.shape}: other samples than those of the labels, or a "
                "reference on one side only?"
            )
        step = max(1, BUDGET // (32 * left.dim))
        found = []
        for pairs in (self.genuine, self.impostors):
            scores = np.empty(len(pairs))
            for start in range(0, len(pairs), step):
                part = pairs[start : start + step]
                scores[start : start + step] = np.einsum("nd,nd->n", left.unit(part[:, 0]), right.unit(part[:, 1]))
            found.append(scores)
        return found[0], found[1]


def draw_pairs(
    labels: Any, reference_labels: Any = None, *, groups: Any = None, most: int = MOST, seed: int = 0
) -> PairSample:
    """Take all pairs of a kind where there are at most `most`, else draw as many by the seed.

    Which pairs are taken depends on labels, groups, `most` and seed alone, so that two encoders are seen on the same.

    Args:
        labels: (N,) of the queries.
        reference_labels: (M,) of what they are compared with; None compares the queries with one another.
        groups: Pairs within a group are left out: (N,), or with reference_labels a pair ((N,), (M,)).
        most: Pairs of each kind.
        seed: Of the draws.

    Raises:
        ValueError: Only one kind of pair.

    Example:
        >>> found = draw_pairs(["a", "a", "b"])
        >>> found.genuine.tolist(), found.impostors.tolist()
        ([[0, 1]], [[0, 2], [1, 2]])
    """
    within = reference_labels is None
    first = as_labels(labels, "labels")
    second = first if within else as_labels(reference_labels, "reference_labels")
    left, right, names = encode_together(first, second, "labels and reference_labels")
    per_class = _per_code(left, right, len(names), within)
    everything = len(left) * (len(left) - 1) // 2 if within else len(left) * len(right)
    impostors = everything - int(per_class.sum())
    marks = None if groups is None else _marks((groups, groups) if within else groups, left, right)
    if marks is not None:
        tracks = int(max(side.max() for side in marks)) + 1
        both = np.concatenate([left, right]) * tracks + np.concatenate(marks)
        cells, codes = np.unique(both, return_inverse=True)  # of one class and one group
        shared = _per_code(codes[: len(left)], codes[len(left) :], len(cells), within)
        np.subtract.at(per_class, cells // tracks, shared)
        impostors -= int(_per_code(*marks, tracks, within).sum() - shared.sum())
    genuine = int(per_class.sum())
    if not genuine or not impostors:
        raise ValueError(
            f"verification compares genuine with impostor pairs and needs both, got {genuine} genuine and {impostors} "
            "impostors: a set of one class, of classes of one, or groups that exclude the rest?"
        )
    generator = np.random.default_rng(seed)
    drawn = [
        _all_genuine(left, right, within, marks)
        if genuine <= most
        else _some_genuine(left, right, per_class, within, marks, generator, most),
    ]
    if impostors <= most:
        drawn.append(np.concatenate(list(_impostor_blocks(left, right, within, marks))))
    elif impostors < everything / _RARE:
        drawn.append(_rare_impostors(left, right, within, marks, np.sort(generator.integers(impostors, size=most))))
    else:
        drawn.append(_some_impostors(left, right, marks, generator, most))
    return PairSample(drawn[0], drawn[1], (left, right), genuine, impostors)


def _marks(groups: Any, left: Integers, right: Integers) -> tuple[Integers, Integers]:
    first, second = (as_labels(side, "groups", len(rows)) for side, rows in zip(groups, (left, right), strict=True))
    return encode_together(first, second, "groups of both sides")[:2]


def _apart(pairs: Integers, marks: Marks) -> Booleans:
    """Which pairs (n, 2) are not of one group; without groups all."""
    if marks is None:
        return np.ones(len(pairs), dtype=np.bool_)
    return np.not_equal(marks[0][pairs[:, 0]], marks[1][pairs[:, 1]])


def _per_code(left: Integers, right: Integers, count: int, within: bool) -> Integers:
    """Pairs of one code, for each of `count` codes."""
    sizes = [np.bincount(side, minlength=count).astype(np.int64) for side in (left, right)]
    return sizes[0] * (sizes[0] - 1) // 2 if within else sizes[0] * sizes[1]


def _all_genuine(left: Integers, right: Integers, within: bool, marks: Marks) -> Integers:
    parts = []
    for mine, others in zip(_members(left, right), _members(right, left), strict=True):
        rows, columns = np.triu_indices(len(mine), 1) if within else np.indices((len(mine), len(others))).reshape(2, -1)
        pairs = np.stack([mine[rows], others[columns]], axis=1)
        parts.append(pairs[_apart(pairs, marks)])
    return np.concatenate(parts)


def _members(codes: Integers, others: Integers) -> list[Array]:
    """Rows of each identity."""
    sizes = np.bincount(codes, minlength=int(max(codes.max(), others.max())) + 1)
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])


def _impostor_blocks(left: Integers, right: Integers, within: bool, marks: Marks) -> Iterator[Integers]:
    """All impostor pairs in the order of rows, some rows at a time."""
    rows = max(1, _BLOCK // len(right))
    for start in range(0, len(left), rows):
        part = slice(start, start + rows)
        kept = np.not_equal.outer(left[part], right)
        if within:
            kept &= np.arange(len(right)) > np.arange(len(left))[part, None]
        if marks is not None:
            kept &= np.not_equal.outer(marks[0][part], marks[1])
        yield np.argwhere(kept).astype(np.int64) + np.array([start, 0], dtype=np.int64)


def _rare_impostors(left: Integers, right: Integers, within: bool, marks: Marks, wanted: Integers) -> Integers:
    """Those with the given numbers, in ascending order: drawing until a rare one is met takes too long."""
    parts, before = [], 0
    for block in _impostor_blocks(left, right, within, marks):
        first, last = np.searchsorted(wanted, [before, before + len(block)])
        parts.append(block[wanted[first:last] - before])
        before += len(block)
    return np.concatenate(parts)


def _some_genuine(
    left: Integers,
    right: Integers,
    per_class: Array,
    within: bool,
    marks: Marks,
    generator: np.random.Generator,
    most: int,
) -> Integers:
    chosen = generator.choice(len(per_class), size=most, p=per_class / per_class.sum())
    pairs = np.empty((most, 2), dtype=np.int64)
    mine, others = _members(left, right), _members(right, left)
    order = np.argsort(chosen, kind="stable")
    for code, places in zip(*_runs(chosen[order], order), strict=True):
        left_over = places
        while len(left_over):  # again within the class, so that all of its pairs are as likely
            first = generator.integers(len(mine[code]), size=len(left_over))
            second = generator.integers(len(others[code]) - within, size=len(left_over))
            second += within & (second >= first)  # never itself
            pairs[left_over] = np.stack([mine[code][first], others[code][second]], axis=1)
            left_over = left_over[~_apart(pairs[left_over], marks)]
    return pairs


def _runs(values: Array, places: Array) -> tuple[list[int], list[Array]]:
    """Distinct ascending values, and the places of each."""
    found, starts = np.unique(values, return_index=True)
    return found.tolist(), np.split(places, starts[1:])


def _some_impostors(
    left: Integers, right: Integers, marks: Marks, generator: np.random.Generator, most: int
) -> Integers:
    parts: list[Array] = []
    while sum(map(len, parts)) < most:
        rows, columns = (generator.integers(len(side), size=most) for side in (left, right))
        pairs = np.stack([rows, columns], axis=1)
        parts.append(pairs[(left[rows] != right[columns]) & _apart(pairs, marks)])
    return np.concatenate(parts)[:most]


def verification_resamples(
    pairs: PairSample,
    scores: tuple[Floats, Floats],
    *,
    far: Sequence[float] = (),
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Floats]:
    """AUC, equal error rate and TAR@FAR in resamples of identities, for intervals and paired differences.

    Identities are drawn with replacement. One that is drawn w times brings each of its genuine pairs w times, and each
    impostor pair with one that is drawn v times w v times; pairs of an identity with its own copy are none. Two
    encoders with the same pairs and seed see the same draws, so that their differences are paired. Scores are told
    apart at 1024 thresholds, dense where false accepts are rare.

    Args:
        pairs: Of `draw_pairs`.
        scores: Of `PairSample.scores`.
        far: False accept rates for TAR.
        resamples: How many.
        seed: Of the draws.

    Returns:
        auc, eer and tar_at_F for each F: (resamples,) each, NaN where a resample holds one kind of pair only.

    Raises:
        ValueError: Scores that are not one per pair, or NaN; a `far` outside (0, 1] or below one impostor pair in all
            there are; resamples below 1.

    Example:
        >>> pairs = draw_pairs(["a", "a", "b", "b", "c", "c"])
        >>> scores = pairs.scores([[1, 0], [9, 1], [0, 1], [1, 9], [-1, 0], [-9, 1]])
        >>> float(np.nanmin(verification_resamples(pairs, scores, resamples=20)["auc"]))
        1.0
    """
    rates = np.atleast_1d(_checked_targets(far, pairs.impostors_total, "verification_resamples")).tolist()
    resamples = as_count(resamples, "verification_resamples needs resamples to be")
    scores = (as_scores(scores[0], "scores[0]"), as_scores(scores[1], "scores[1]"))
    if (found := tuple(map(len, scores))) != (wanted := (len(pairs.genuine), len(pairs.impostors))):
        raise ValueError(
            f"scores must be one per pair: expected {wanted[0]} genuine and {wanted[1]} impostors, got {found[0]} and "
            f"{found[1]}; are they of PairSample.scores of these pairs?"
        )
    codes = [
        np.stack([pairs.codes[0][part[:, 0]], pairs.codes[1][part[:, 1]]], axis=1)
        for part in (pairs.genuine, pairs.impostors)
    ]
    count = int(max(pairs.codes[0].max(), pairs.codes[1].max())) + 1
    edges = _edges(*scores)
    tables = [_table(edges, values, sides, count) for values, sides in zip(scores, codes, strict=True)]
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(table[1].shape[0] for table in tables))
    parts: list[dict[str, Floats]] = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=size).T.astype(np.float64)  # (C, R)
        genuine = tables[0][0] @ weights[tables[0][1][:, 0]]  # (T, R) by level, the highest first
        impostors = tables[1][0] @ (weights[tables[1][1][:, 0]] * weights[tables[1][1][:, 1]])
        parts.append(_figures(genuine, impostors, rates))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _edges(genuine: Floats, impostors: Floats) -> Floats:
    """Thresholds in descending order: every score where they are few, else dense at both errors' tails."""
    every = np.unique(np.concatenate([genuine, impostors]))[::-1]
    if len(every) <= LEVELS:
        return every
    tail = np.geomspace(1 / len(impostors), 1, LEVELS // 2)
    return np.unique(
        np.concatenate(
            [
                np.quantile(impostors, 1 - tail),
                np.quantile(genuine, np.linspace(0, 1, LEVELS // 4)),
                np.quantile(impostors, np.linspace(0, 1, LEVELS // 4)),
                every[[-1]],
            ]
        )
    )[::-1]


def _table(edges: Floats, scores: Floats, codes: Integers, count: int) -> tuple[Any, Integers]:
    """Pairs (T, P) of each couple of identities that reach a threshold and not the one before; the couples (P, 2)."""
    from scipy.sparse import coo_array

    level = np.searchsorted(-edges, -scores, side="left")  # the first threshold, from above, that a score reaches
    keys, couple = np.unique(codes[:, 0] * count + codes[:, 1], return_inverse=True)
    table = coo_array((np.ones(len(scores)), (level, couple)), shape=(len(edges), len(keys)))
    return table.tocsr(), np.stack(np.divmod(keys, count), axis=1)


def _figures(genuine: Array, impostors: Array, far: Sequence[float]) -> dict[str, Floats]:
    """From weights by level (T, R) to figures (R,)."""
    zero = np.zeros((1, genuine.shape[1]))
    accepts, false_accepts = (np.concatenate([zero, part.cumsum(axis=0)]) for part in (genuine, impostors))
    whole = (accepts[-1] > 0) & (false_accepts[-1] > 0)
    names = ["auc", "eer", *(f"tar_at_{rate:g}" for rate in far)]
    found = {name: np.full(genuine.shape[1], np.nan) for name in names}
    for column in np.flatnonzero(whole):
        hits, misses = accepts[:, column], false_accepts[:, column]
        area = (np.diff(misses) * (hits[1:] + hits[:-1]) / 2).sum() / (misses[-1] * hits[-1])
        found["auc"][column] = area
        found["eer"][column] = _equal_errors(misses, hits)
        for rate in far:
            place = np.searchsorted(misses, allowed(rate, misses[-1]), side="right") - 1
            found[f"tar_at_{rate:g}"][column] = hits[place] / hits[-1]
    return found
