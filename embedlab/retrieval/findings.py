"""What an evaluation shows beside its figures: classes, confusions, single queries with their neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from embedlab._types import Ids
from embedlab.retrieval.evaluation import Evaluation, Floats, Groups

_BLOCK = 32 << 20  # bytes of vectors and cosines of some queries that are compared at a time


@dataclass(frozen=True)
class ClassFigures:
    """One class of the queries.

    Args:
        label: The class.
        queries: Its queries.
        templates: Its images among what is searched.
        recall_at_1: Mean over its queries, as the figures below; None where no query has a match.
        recall_at_5: See recall_at_1.
        map_at_r: See recall_at_1.
        taken_for: The other class that its queries lie nearest to most often; None without a mistake.
        times: How often.
    """

    label: str
    queries: int
    templates: int
    recall_at_1: float | None
    recall_at_5: float | None
    map_at_r: float | None
    taken_for: str | None
    times: int


@dataclass(frozen=True)
class Confusion:
    """A class that is taken for another.

    Args:
        label: The truth.
        taken_for: The class of the nearest.
        times: Queries of `label` whose nearest is of `taken_for`.
        queries: Queries of `label` that have a match.
        back: Times that `taken_for` is taken for `label`.
        query: Row of the query that lies nearest to the wrong class.
        nearest: Its nearest, a row of what is searched.
        cosine: Between both.
        coarse_right: Whether both are of one coarse class; None without coarse classes.
    """

    label: str
    taken_for: str
    times: int
    queries: int
    back: int
    query: int
    nearest: int
    cosine: float
    coarse_right: bool | None = None

    @property
    def share(self) -> float:
        """Of the queries."""
        return self.times / self.queries


@dataclass(frozen=True)
class Example:
    """A query and what lies nearest to it.

    Args:
        query: Its row.
        nearest: (k,) rows of what is searched.
        cosines: (k,) theirs.
        right: (k,) whether they are of the query's class.
        own: The nearest of its own class, where that is not among them, and its cosine.
    """

    query: int
    nearest: tuple[int, ...]
    cosines: tuple[float, ...]
    right: tuple[bool, ...]
    own: tuple[int, float] | None = None

    @property
    def margin(self) -> float:
        """How much nearer the wrong one is than the right one."""
        own = self.own[1] if self.own else max(c for c, r in zip(self.cosines, self.right, strict=True) if r)
        return self.cosines[0] - own


def class_figures(found: Evaluation) -> list[ClassFigures]:
    """Every class of the queries, those with most mistakes first."""
    names, codes = np.unique(np.array(found.labels, dtype=object), return_inverse=True)
    queries, templates = np.bincount(codes), Counter(found.searched_labels)
    counted = ~np.isnan(found.per_query["recall_at_1"])
    sizes = np.bincount(codes[counted], minlength=len(names))
    means = {
        key: np.bincount(codes[counted], weights=found.per_query[key][counted], minlength=len(names))
        / np.where(sizes > 0, sizes, np.nan)
        for key in ("recall_at_1", "recall_at_5", "map_at_r")
    }
    mistaken: dict[str, Counter[str]] = {}
    for row in np.flatnonzero(found.per_query["recall_at_1"] == 0).tolist():
        mistaken.setdefault(found.labels[row], Counter())[found.searched_labels[int(found.nearest[row, 0])]] += 1
    rows = []
    for code, name in enumerate(names.tolist()):
        taken = mistaken.get(name, Counter())
        taken_for, times = min(taken.items(), key=lambda one: (-one[1], one[0]), default=(None, 0))
        figures = {key: float(values[code]) if sizes[code] else None for key, values in means.items()}
        rows.append(
            ClassFigures(name, int(queries[code]), templates[name], **figures, taken_for=taken_for, times=times)
        )
    return sorted(rows, key=lambda row: (2.0 if row.recall_at_1 is None else row.recall_at_1, row.label))


def confusions(found: Evaluation, *, most: int = 100) -> list[Confusion]:
    """Pairs of classes that are taken for each other, by how often the first is taken for the second."""
    fine = found.per_query["recall_at_1"]
    wrong = np.flatnonzero(fine == 0)
    counted = Counter(label for label, value in zip(found.labels, fine.tolist(), strict=True) if value == value)
    pairs: dict[tuple[str, str], list[int]] = {}
    for row in wrong.tolist():
        pairs.setdefault((found.labels[row], found.searched_labels[int(found.nearest[row, 0])]), []).append(row)
    rows = []
    for (label, other), queries in pairs.items():
        worst = max(queries, key=lambda row: (float(found.cosines[row, 0]), -row))
        nearest = int(found.nearest[worst, 0])
        rows.append(
            Confusion(
                label,
                other,
                times=len(queries),
                queries=counted[label],
                back=len(pairs.get((other, label), ())),
                query=worst,
                nearest=nearest,
                cosine=float(found.cosines[worst, 0]),
                coarse_right=_same_coarse(found, worst, nearest),
            )
        )
    return sorted(rows, key=lambda row: (-row.times, -row.share, row.label, row.taken_for))[:most]


def _same_coarse(found: Evaluation, query: int, nearest: int) -> bool | None:
    column = found.plan.coarse
    if column is None:
        return None
    return found.query.columns[column][query] == found.searched.columns[column][nearest]


def examples(found: Evaluation, *, each: int = 6, seed: int = 0) -> dict[str, list[Example]]:
    """Queries to look at: some right, some right only further down, and the worst mistakes.

    Args:
        found: The evaluation.
        each: How many of a kind.
        seed: Of the choice of the first two kinds.

    Returns:
        `right`: the nearest is of the class; `late`: not the nearest, but one of those shown; `worst`: mistakes with
        the largest margin between the nearest and the nearest of the own class, one for each class.
    """
    fine = found.per_query["recall_at_1"]
    classes = np.array(found.searched_labels, dtype=object)
    right = (classes[found.nearest] == np.array(found.labels, dtype=object)[:, None]) & (found.nearest >= 0)
    generator = np.random.default_rng(seed)
    first, late = np.flatnonzero(fine == 1), np.flatnonzero((fine == 0) & right.any(axis=1))
    wrong = np.flatnonzero(fine == 0)
    own, own_cosine = nearest_of_class(found, wrong)
    order = np.argsort(own_cosine - found.cosines[wrong, 0], kind="stable")
    order = order[np.sort(np.unique([found.labels[row] for row in wrong[order]], return_index=True)[1])][:each]

    def shown(row: int, mate: tuple[int, float] | None = None) -> Example:
        return example(found, row, None if right[row].any() else mate)

    def some(rows: Ids) -> list[Example]:
        chosen = generator.permutation(rows)[:each]
        return [shown(row) for row in np.sort(chosen).tolist()]

    return {
        "right": some(first),
        "late": some(late),
        "worst": [shown(int(wrong[place]), (int(own[place]), float(own_cosine[place]))) for place in order.tolist()],
    }


def example(found: Evaluation, row: int, own: tuple[int, float] | None = None) -> Example:
    """One query with its nearest, of which groups may leave few."""
    near = {int(place): float(cosine) for place, cosine in zip(found.nearest[row], found.cosines[row], strict=True)}
    near.pop(-1, None)
    right = tuple(found.searched_labels[place] == found.labels[row] for place in near)
    return Example(row, tuple(near), tuple(near.values()), right, own)


def nearest_of_class(found: Evaluation, rows: Ids) -> tuple[Ids, Floats]:
    """For some queries, each with a match, the nearest row of their own class, and its cosine."""
    place, cosine = np.full(len(rows), -1, dtype=np.int64), np.full(len(rows), -np.inf)
    names, codes = np.unique(np.array(found.searched_labels, dtype=object), return_inverse=True)
    parts = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    members_of = dict(zip(names.tolist(), parts, strict=True))
    own, others = _numbered_groups(found.groups)
    asking: dict[str, list[int]] = {}
    for number, row in enumerate(rows.tolist()):
        asking.setdefault(found.labels[row], []).append(number)
    for label, numbers in asking.items():
        members = members_of[label]
        unit = _unit(found.searched.embeddings.vectors[members])
        step = max(1, _BLOCK // (8 * sum(unit.shape)))
        for start in range(0, len(numbers), step):
            asked = numbers[start : start + step]
            mine = rows[asked]
            scores = _unit(found.query.embeddings.vectors[mine]) @ unit.T
            if found.reference is None:
                scores[mine[:, None] == members] = -np.inf
            if found.groups is not None:
                scores[own[mine][:, None] == others[members]] = -np.inf
            best = scores.argmax(axis=1)
            place[asked], cosine[asked] = members[best], scores[np.arange(len(mine)), best]
    return place, cosine


def _numbered_groups(groups: Groups) -> tuple[Ids, Ids]:
    """Of each query and each row that is searched; empty without groups."""
    own, others = groups if isinstance(groups, tuple) else (groups or [], groups or [])
    number = {name: place for place, name in enumerate(dict.fromkeys([*own, *others]))}
    first, second = (np.array([number[name] for name in side], dtype=np.int64) for side in (own, others))
    return first, second


def _unit(vectors: Any) -> Floats:
    rows = vectors.astype(np.float64)
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def to_dict(found: Evaluation) -> dict[str, Any]:
    """Classes and confusions for the JSON document."""
    return {
        "classes": [asdict(row) for row in class_figures(found)],
        "confusions": [
            {key: value for key, value in asdict(row).items() if key not in ("query", "nearest")} | {"share": row.share}
            for row in confusions(found)
        ],
    }


def sampled_rows(count: int, most: int, *, seed: int) -> Sequence[int]:
    """At most so many row numbers, ascending, by the seed."""
    if count <= most:
        return range(count)
    chosen: list[int] = np.sort(np.random.default_rng(seed).choice(count, most, replace=False)).tolist()
    return chosen
