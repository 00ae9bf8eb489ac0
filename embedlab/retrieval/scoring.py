"""Scores of probes against templates and identities, in chunks.

What a gallery asks of its templates are functions that are chosen by where these lie: here for templates in memory, in
`embedlab.retrieval.milvus` for those on a server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import singledispatch
from typing import Any, Literal, Protocol

import numpy as np

from embedlab._types import Ids, Neighbours, Vectors
from embedlab.retrieval.cohort import Cohort
from embedlab.retrieval.snapshot import Snapshot
from embedlab.retrieval.store import About

CHUNK = 16_000_000  # scores held at once, 64 MB


class Templates(Protocol):
    """The templates of a gallery at one generation, wherever they lie."""

    @property
    def meta(self) -> About:
        """The facts at this generation."""
        ...

    @property
    def identities(self) -> int:
        """How many names there are."""
        ...

    @property
    def names(self) -> list[str]:
        """Identities; `code_of` gives their places."""
        ...

    def __len__(self) -> int: ...

    def code_of(self, label: object) -> int | None:
        """Place of an identity in `names`; None when it is not enrolled."""
        ...

    def known(self, wanted: Iterable[Any], kind: Literal["label", "id"]) -> set[Any]:
        """Those of these labels, or ids, that are there."""
        ...

    def where(self, where: dict[str, Any]) -> Any:
        """Templates whose metadata has all these values, as the functions here take them for `templates`."""
        ...


@singledispatch
def neighbours(now: Any, queries: Vectors, k: int, templates: Any = None) -> Neighbours:
    """The k nearest templates of each probe; only among `templates`, which `now.where` gave, where given."""
    raise NotImplementedError


@singledispatch
def nearest_identities(now: Any, queries: Vectors, k: int, templates: Any = None) -> Neighbours:
    """The best template of each of the k nearest identities of each probe; `templates` as in `neighbours`."""
    raise NotImplementedError


@singledispatch
def best_identity(
    now: Any, queries: Vectors, cohort: Cohort | None, near: Neighbours | None = None
) -> tuple[list[str | None], Vectors]:
    """Best identity (Q,) and its fused score (Q,) for each probe; None and NaN in an empty gallery.

    `near` are the nearest templates, where they are known already: no second search.
    """
    raise NotImplementedError


@singledispatch
def claimed(now: Any, queries: Vectors, cohort: Cohort | None, label: str) -> Vectors:
    """Fused score (Q,) of each probe with one identity."""
    raise NotImplementedError


@singledispatch
def in_chunks(
    now: Any, queries: Vectors, cohort: Cohort | None, own: Ids | None = None
) -> Iterator[tuple[slice, Vectors]]:
    """`identity_scores` (q, G) for some queries at a time, with the slice that they are."""
    raise NotImplementedError


@neighbours.register
def _(now: Snapshot, queries: Vectors, k: int, templates: Ids | None = None) -> Neighbours:
    found = min(k, len(now) if templates is None else len(templates))
    scores: Vectors = np.zeros((len(queries), 0), np.float32)
    places: Ids = np.zeros((len(queries), 0), np.int64)
    if found and len(queries):
        scores, places = now.nearest(queries, found, templates)
    return answered(now, scores, places, k)


@nearest_identities.register
def _(now: Snapshot, queries: Vectors, k: int, templates: Ids | None = None) -> Neighbours:
    among = len(now) if templates is None else len(templates)
    codes = now.codes if templates is None else now.codes[templates]
    identities = len(np.unique(codes)) if templates is not None else len(now.names)
    found = min(k, identities)
    scores = np.full((len(queries), found), np.nan, np.float32)
    places = np.full((len(queries), found), -1, np.int64)
    todo, reach = np.arange(len(queries)), min(among, 4 * found)
    while len(todo) and found:
        near, rows = now.nearest(queries[todo], reach, templates)
        first = _first_of_each(now.codes[rows])
        whole = first.sum(axis=1) >= found
        for row in np.flatnonzero(whole):
            best = np.flatnonzero(first[row])[:found]
            scores[todo[row]], places[todo[row]] = near[row, best], rows[row, best]
        todo, reach = todo[~whole], min(among, 4 * reach)  # one identity has them all: look further
    return answered(now, scores, places, k)


def _first_of_each(codes: Ids) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Where each code stands for the first time in its row."""
    order = np.argsort(codes, axis=1, kind="stable")
    ranked = np.take_along_axis(codes, order, 1)
    fresh = np.ones(codes.shape, dtype=bool)
    fresh[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    result = np.empty(codes.shape, dtype=bool)
    np.put_along_axis(result, order, fresh, 1)
    return result


def answered(now: Snapshot, scores: Vectors, places: Ids, k: int) -> Neighbours:
    """Templates (Q, F) and their scores as neighbours (Q, k), padded where the gallery has fewer."""
    found = places.shape[1]
    ids = np.full((len(places), k), -1, dtype=np.int64)
    padded = np.full((len(places), k), np.nan, dtype=np.float32)
    ids[:, :found], padded[:, :found] = now.ids[places], scores
    labels: list[list[str | None]] = [[*row, *[None] * (k - found)] for row in now.labels_of(places)]
    return Neighbours(ids, labels, padded)


@best_identity.register
def _(
    now: Snapshot, queries: Vectors, cohort: Cohort | None, near: Neighbours | None = None
) -> tuple[list[str | None], Vectors]:
    if not len(now) or not len(queries):
        return [None] * len(queries), np.full(len(queries), np.nan, np.float32)  # type: ignore[return-value]
    if now.meta.settings["fusion"] == "max" and cohort is None:
        near = neighbours(now, queries, 1) if near is None else near
        return [row[0] for row in near.labels], near.scores[:, 0]
    best: list[str | None] = []
    top = []
    for _, scores in in_chunks(now, queries, cohort):
        best += [now.names[code] for code in scores.argmax(axis=1).tolist()]
        top.append(scores.max(axis=1))
    return best, np.concatenate(top)


@claimed.register
def _(now: Snapshot, queries: Vectors, cohort: Cohort | None, label: str) -> Vectors:
    code = now.code_of(label)
    assert code is not None
    return identity_scores(now, queries, cohort, codes=np.array([code]))[:, 0]


@in_chunks.register
def _(
    now: Snapshot, queries: Vectors, cohort: Cohort | None, own: Ids | None = None
) -> Iterator[tuple[slice, Vectors]]:
    step = max(1, CHUNK // len(now))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        yield part, identity_scores(now, queries[part], cohort, own=None if own is None else own[part])


def identity_scores(
    now: Snapshot, queries: Vectors, cohort: Cohort | None, *, codes: Ids | None = None, own: Ids | None = None
) -> Vectors:
    """Fused score of each probe against each identity, (Q, G).

    Args:
        now: The gallery.
        queries: (Q, D) of norm 1.
        cohort: What scores are normalised with; None for cosines.
        codes: Only these identities, for (Q, len(codes)).
        own: (Q,) identity of each probe that is taken for removed: its score is -inf.
    """
    fusion = now.meta.settings["fusion"]
    if fusion == "vote":
        votes = _votes(now, queries, cohort, own)
        result = votes if codes is None else votes[:, codes]
    elif fusion == "mean":
        result = _mean_scores(now, queries, cohort, slice(None) if codes is None else codes)
    else:
        result = _max_scores(now, queries, cohort, codes)
    if own is not None:
        result[np.arange(len(queries)), own] = -np.inf
    return result


def template_scores(now: Snapshot, queries: Vectors, cohort: Cohort | None, templates: Ids | None = None) -> Vectors:
    """Score of each probe with each template, or with those at these places of `now.ids`, (Q, T)."""
    if templates is None:
        scores = queries @ now.matrix.T
        scores = scores if now.alive is None else scores[:, now.alive]
    else:
        scores = queries @ now.take(templates).T
    scores = np.clip(scores, -1, 1, out=scores)
    if cohort is None:
        return scores
    means, deviations = cohort.of(now)
    chosen = slice(None) if templates is None else templates
    return cohort.normalised(scores, cohort.statistics(queries), (means[chosen], deviations[chosen]))


def _max_scores(now: Snapshot, queries: Vectors, cohort: Cohort | None, codes: Ids | None) -> Vectors:
    ends = np.cumsum(now.templates)
    if codes is None:
        scores, sizes = template_scores(now, queries, cohort)[:, now.by_identity], now.templates
    else:
        chosen = [now.by_identity[ends[code] - now.templates[code] : ends[code]] for code in codes.tolist()]
        scores, sizes = template_scores(now, queries, cohort, np.concatenate(chosen)), now.templates[codes]
    return np.maximum.reduceat(scores, np.cumsum(sizes) - sizes, axis=1)


def _mean_scores(now: Snapshot, queries: Vectors, cohort: Cohort | None, codes: Any) -> Vectors:
    """The mean of normalised scores is linear in the probe as well: no score of a template is needed."""
    scores: Vectors = queries @ now.means[codes].T
    if cohort is None:
        return scores
    means, deviations = cohort.statistics(queries)
    scaled, shifts = cohort.averages(now)
    result: Vectors = (scores - means[:, None]) / deviations[:, None]
    result += queries @ scaled[codes].T - shifts[codes]
    result *= np.float32(0.5)
    return result


def _votes(now: Snapshot, queries: Vectors, cohort: Cohort | None, own: Ids | None) -> Vectors:
    voters = now.meta.settings["vote_k"]
    if cohort is None and own is None:
        scores, places = now.nearest(queries, min(voters, len(now)))
        return votes(scores, now.codes[places], voters, len(now.names))
    scores = template_scores(now, queries, cohort)
    if own is not None:
        scores[now.codes == own[:, None]] = -np.inf
    return votes(*highest(scores, now.codes, voters), voters, len(now.names))


def highest(scores: Vectors, codes: Ids, count: int) -> tuple[Vectors, Ids]:
    """The `count` highest of scores (Q, T) in each row, in no order, with their codes."""
    if scores.shape[1] <= count:
        return scores, np.broadcast_to(codes, scores.shape)
    places = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return np.take_along_axis(scores, places, 1), codes[places]


def votes(scores: Vectors, codes: Ids, voters: int, identities: int) -> Vectors:
    """Sum of the positive scores (Q, k) of each identity over the number of voters, (Q, G)."""
    result: Vectors = np.zeros((len(scores), identities), np.float32)
    np.add.at(result, (np.arange(len(scores))[:, None], codes), np.maximum(scores, 0) / voters)
    return result


def sub_gallery_scores(
    now: Any, queries: Vectors, cohort: Cohort | None, own: Ids | None = None, *, draws: int = 4, seed: int = 0
) -> dict[float, Vectors]:
    """Best score of each probe in random sub-galleries of an eighth, a quarter and a half of the identities.

    A draw shares the identities at random into eight parts; neighbouring parts make the larger sub-galleries.

    Args:
        now: The gallery, of at least eight identities.
        queries: (Q, D) of norm 1.
        cohort: As in `identity_scores`.
        own: As in `identity_scores`.
        draws: How often to share.
        seed: Of the draws.

    Returns:
        Number of identities, which need not be whole, to scores (Q, 8 x draws), (Q, 4 x draws), (Q, 2 x draws).
    """
    count, random = len(now.names), np.random.default_rng(seed)
    orders = [random.permutation(count) for _ in range(draws)]
    starts = (np.arange(8) * count) // 8
    tables = {8 // parts: np.empty((len(queries), parts * draws), np.float32) for parts in (8, 4, 2)}
    voting = now.meta.settings["fusion"] == "vote"
    if voting and not isinstance(now, Snapshot):
        return {}  # who else is there changes votes, and they would have to be cast again by a server
    for part, scores in in_chunks(now, queries, cohort, own):
        each = template_scores(now, queries[part], cohort) if voting else None
        if each is not None and own is not None:
            each[now.codes == own[part, None]] = -np.inf
        for draw, order in enumerate(orders):
            best = np.maximum.reduceat(scores[:, order], starts, axis=1)  # (q, 8)
            for width in (1, 2, 4):
                if each is not None:  # votes depend on who else is there: they are cast again
                    best = _best_votes(now, each, order, starts[::width])
                columns = slice(draw * 8 // width, (draw + 1) * 8 // width)
                tables[width][part, columns] = best
                best = np.maximum(best[:, ::2], best[:, 1::2])
    return {count * width / 8: table for width, table in tables.items()}


def _best_votes(now: Snapshot, scores: Vectors, order: Ids, starts: Ids) -> Vectors:
    """Highest vote in each part of the identities, (Q, parts)."""
    voters, result = now.meta.settings["vote_k"], []
    for members in np.split(order, starts[1:]):
        chosen = np.isin(now.codes, members)
        near, codes = highest(scores[:, chosen], now.codes[chosen], voters)
        result.append(votes(near, codes, voters, len(now.names)).max(axis=1))
    return np.stack(result, axis=1)


def highest_pairs(
    now: Templates,
    probes: Vectors,
    cohort: Cohort | None,
    strangers: Sequence[str | None],
    fmr: float,
    own: Ids | None = None,
) -> tuple[Vectors, Vectors]:
    """Highest scores of strangers against all identities with their weights, as `match_threshold` takes them.

    Each stranger has the same weight, shared by its images and their pairs. Only what can lie above the threshold is
    kept: pairs of a total weight of a little over `fmr`.
    """
    sizes = Counter(name for name in strangers if name is not None)
    identities = len(sizes) + sum(name is None for name in strangers)
    others = len(now.names) - (own is not None)
    per_image = np.array([1 / (identities * others * (1 if name is None else sizes[name])) for name in strangers])
    kept, weights = np.zeros(0, np.float32), np.zeros(0)
    for part, scores in in_chunks(now, probes, cohort, own):
        share = np.repeat(per_image[part], len(now.names))
        there = np.isfinite(scores).ravel()  # all but the own identity
        kept = np.concatenate([kept, scores.ravel()[there]])
        weights = np.concatenate([weights, share[there]])
        order = np.argsort(-kept, kind="stable")
        enough = int(np.searchsorted(np.cumsum(weights[order]), fmr, side="right")) + 1
        kept, weights = kept[order[:enough]], weights[order[:enough]]
    return kept, weights  # type: ignore[return-value]
