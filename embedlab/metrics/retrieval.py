"""Retrieval: does the nearest-neighbour ranking of a query bring up its class-mates?

All functions rank by cosine (vectors may have any norm) and share one signature:
`f(query, query_labels, reference=None, reference_labels=None, *, empty="skip", groups=None)`, some with `k`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from embedlab.metrics._arrays import Booleans, Floats, Integers, as_count
from embedlab.metrics._progress import Progress
from embedlab.metrics._ranking import BUDGET, DECIMALS, ROWS, Matches, Problem, Rows, Search, blocks
from embedlab.metrics._share import together
from embedlab.metrics._threads import in_threads

Empty = Literal["skip", "zero", "error"]


@dataclass(frozen=True, eq=False)
class RetrievalReport:
    """Several retrieval metrics from one pass over the neighbours.

    Args:
        values: Means over queries: recall_at_K for each K, r_precision, map_at_r.
        per_query: The same names to (Q,) arrays in query order, NaN for a query that was skipped: what
            `bootstrap_interval` wants.
        matches: (Q,) class-mates each query has in the reference, after exclusions.
        without_match: Queries that have none; `empty` says what became of them.
        empty: The policy that was used: "skip" or "zero".
    """

    values: dict[str, float]
    per_query: dict[str, Floats]
    matches: Integers
    without_match: int
    empty: str

    def to_dict(self) -> dict[str, Any]:
        """What goes into a JSON document: the means and what they are over."""
        return {**self.values, "queries": len(self.matches), "without_match": self.without_match, "empty": self.empty}


@together
def retrieval_report(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    k: Sequence[int] = (1, 5, 10),
    empty: Empty = "skip",
    groups: Any = None,
    over_ranks: bool = False,
    state: str | Path | None = None,
) -> RetrievalReport:
    """Compute recall at each k, R-precision and MAP@R in one pass over the neighbours.

    Args:
        query: (Q, D) vectors, NumPy or torch.
        query_labels: (Q,) integers or strings.
        reference: (N, D) vectors to search, or None for leave-one-out within the queries.
        reference_labels: (N,) labels of the reference.
        k: Depths of recall@k.
        empty: See `recall_at_k`.
        groups: See `recall_at_k`.
        over_ranks: See `recall_at_k`.
        state: File that keeps the progress of hours of ranking, written about once a minute and when all is done. A
            call with the same inputs goes on from there.

    Raises:
        ValueError: See `recall_at_k`; a state file of other inputs, or a damaged one.

    Example:
        >>> report = retrieval_report([[1, 0], [9, 1], [0, 1], [1, 9]], ["a", "a", "b", "b"], k=[1])
        >>> report.values
        {'recall_at_1': 1.0, 'r_precision': 1.0, 'map_at_r': 1.0}
    """
    if np.ndim(k) != 1:
        raise ValueError(f"retrieval_report needs k as a list of depths such as [1, 5, 10], got {k!r}.")
    depths = [_checked_depth(depth, "retrieval_report") for depth in k]
    problem = _problem(query, query_labels, reference, reference_labels, groups, empty, over_ranks)
    measures: dict[str, Callable[[Matches], Floats]] = {
        f"recall_at_{depth}": partial(_recall, k=depth) for depth in depths
    }
    measures |= {"r_precision": _r_precision, "map_at_r": _map_at_r}
    per_query = _measure(problem, measures, np.maximum(problem.total, max(depths, default=1)), empty, state)
    return RetrievalReport(
        values={name: _mean(values) for name, values in per_query.items()},
        per_query=per_query,
        matches=problem.total,
        without_match=int((problem.total == 0).sum()),
        empty=empty,
    )


@together
def recall_at_k(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    k: int = 1,
    empty: Empty = "skip",
    groups: Any = None,
    over_ranks: bool = False,
) -> float:
    """Share of queries with at least one match among their k nearest: "recall@k" of the metric-learning papers.

    Elsewhere this is called hit rate or CMC at rank k; it is not the share of matches that are found.

    Args:
        query: (Q, D) vectors of any norm, NumPy or torch; ranked by cosine, ties go to the lower index.
        query_labels: (Q,) integers or strings.
        reference: (N, D) vectors to search, or None for leave-one-out within the queries.
        reference_labels: (N,) labels of the reference.
        k: How many neighbours are looked at.
        empty: What becomes of a query that has no match in the reference: "skip" leaves it out of the mean, "zero"
            counts it as a failure, "error" refuses.
        groups: A candidate of the query's own group is left out (frames of one track, shots of one shelf): (Q,) for
            leave-one-out, a pair ((Q,), (N,)) with a reference. For the rule of person re-identification, which
            leaves out the same person under the same camera only, give groups such as "person/camera".
        over_ranks: True shares the queries out among the ranks of torch.distributed: all ranks call with the same
            arrays (see `each_sample_once`) and all get the figure of one process.

    Raises:
        ValueError: Shapes or labels that do not fit, a NaN or zero vector, no query with a match under "skip".

    Example:
        >>> recall_at_k([[1.0, 0.0], [0.0, 1.0]], ["a", "b"], [[0.9, 0.1], [0.8, 0.2]], ["b", "b"], k=1, empty="zero")
        0.5
    """
    k = _checked_depth(k, "recall_at_k")
    problem = _problem(query, query_labels, reference, reference_labels, groups, empty, over_ranks)
    return _single(problem, partial(_recall, k=k), np.full(len(problem.query), k), empty)


@together
def precision_at_k(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    k: int = 1,
    empty: Empty = "skip",
    groups: Any = None,
    over_ranks: bool = False,
) -> float:
    """Mean share of matches among the k nearest; at k = 1 the same as recall@1.

    Args:
        query: See `recall_at_k`, as for the other arguments.
        query_labels: (Q,) labels.
        reference: (N, D) vectors, or None for leave-one-out.
        reference_labels: (N,) labels of the reference.
        k: How many neighbours are looked at; must not exceed the candidates of any query.
        empty: What becomes of a query without a match.
        groups: Candidates of the query's own group are left out.
        over_ranks: Shares the work out among ranks.

    Raises:
        ValueError: As `recall_at_k`, and for k above the number of candidates.
    """
    k = _checked_depth(k, "precision_at_k")
    problem = _problem(query, query_labels, reference, reference_labels, groups, empty, over_ranks)
    fewest = int(problem.candidates.argmin())
    if k > problem.candidates[fewest]:
        raise ValueError(
            f"precision_at_k with k={k}, but query {fewest} has only {problem.candidates[fewest]} candidates; "
            f"places that do not exist would count as misses. Use k <= {problem.candidates[fewest]} or recall_at_k."
        )
    return _single(problem, partial(_precision, k=k), np.full(len(problem.query), k), empty)


@together
def r_precision(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    k: int | None = None,
    empty: Empty = "skip",
    groups: Any = None,
    over_ranks: bool = False,
) -> float:
    """Mean share of matches among the R nearest, R being the number of matches that the query has.

    Args:
        query: See `recall_at_k`, as for the other arguments.
        query_labels: (Q,) labels.
        reference: (N, D) vectors, or None for leave-one-out.
        reference_labels: (N,) labels of the reference.
        k: Depth of the search; None is as deep as needed, and less than the largest R is refused.
        empty: What becomes of a query without a match.
        groups: Candidates of the query's own group are left out.
        over_ranks: Shares the work out among ranks.

    Raises:
        ValueError: As `recall_at_k`, and for k below the largest R.
    """
    problem = _problem(query, query_labels, reference, reference_labels, groups, empty, over_ranks)
    _refuse_shallow(problem, k, "r_precision")
    return _single(problem, _r_precision, problem.total, empty)


@together
def map_at_r(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    k: int | None = None,
    empty: Empty = "skip",
    groups: Any = None,
    over_ranks: bool = False,
) -> float:
    """MAP@R, Musgrave et al. 2020, eq. 3 and 4 (https://arxiv.org/abs/2003.08505).

    Per query (1/R) times the sum of precision@i over the places i <= R that hold a match: R-precision that also
    rewards the order.

    Args:
        query: See `recall_at_k`, as for the other arguments.
        query_labels: (Q,) labels.
        reference: (N, D) vectors, or None for leave-one-out.
        reference_labels: (N,) labels of the reference.
        k: Depth of the search; None is as deep as needed, and less than the largest R is refused.
        empty: What becomes of a query without a match.
        groups: Candidates of the query's own group are left out.
        over_ranks: Shares the work out among ranks.

    Raises:
        ValueError: As `recall_at_k`, and for k below the largest R.
    """
    problem = _problem(query, query_labels, reference, reference_labels, groups, empty, over_ranks)
    _refuse_shallow(problem, k, "map_at_r")
    return _single(problem, _map_at_r, problem.total, empty)


@together
def mean_average_precision(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    k: int | None = None,
    empty: Empty = "skip",
    groups: Any = None,
    over_ranks: bool = False,
) -> float:
    """Mean over queries of average precision: of the precision at the place of each match.

    Args:
        query: See `recall_at_k`, as for the other arguments.
        query_labels: (Q,) labels.
        reference: (N, D) vectors, or None for leave-one-out.
        reference_labels: (N,) labels of the reference.
        k: None ranks the whole reference. A number gives mAP@k as of Google Landmarks (Weyand et al. 2020,
            https://arxiv.org/abs/2004.01804): places beyond k count nothing, divided by min(R, k).
        empty: What becomes of a query without a match.
        groups: Candidates of the query's own group are left out.
        over_ranks: Shares the work out among ranks.

    Raises:
        ValueError: As `recall_at_k`.
    """
    problem = _problem(query, query_labels, reference, reference_labels, groups, empty, over_ranks)
    depth = len(problem.reference) if k is None else _checked_depth(k, "mean_average_precision")
    return _single(problem, partial(_average_precision, k=depth), np.full(len(problem.query), depth), empty)


@together
def mean_reciprocal_rank(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    k: int | None = None,
    empty: Empty = "skip",
    groups: Any = None,
    over_ranks: bool = False,
) -> float:
    """Mean over queries of 1 / the place of the first match.

    Args:
        query: See `recall_at_k`, as for the other arguments.
        query_labels: (Q,) labels.
        reference: (N, D) vectors, or None for leave-one-out.
        reference_labels: (N,) labels of the reference.
        k: None ranks the whole reference. With a number, a first match beyond place k counts 0 (MRR@k).
        empty: What becomes of a query without a match.
        groups: Candidates of the query's own group are left out.
        over_ranks: Shares the work out among ranks.

    Raises:
        ValueError: As `recall_at_k`.

    Example:
        >>> mean_reciprocal_rank([[1, 0]], ["a"], [[9, 1], [9, 2], [0, 1]], ["b", "a", "a"])
        0.5
    """
    problem = _problem(query, query_labels, reference, reference_labels, groups, empty, over_ranks)
    depth = len(problem.reference) if k is None else _checked_depth(k, "mean_reciprocal_rank")
    return _single(problem, _reciprocal_rank, np.full(len(problem.query), depth), empty)


@together
def ndcg_at_k(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    k: int | None = None,
    empty: Empty = "skip",
    groups: Any = None,
    over_ranks: bool = False,
) -> float:
    """Normalised discounted cumulative gain, Jarvelin and Kekalainen 2002, with a match as gain 1.

    The sum of 1 / log2(1 + place) over the matches in the first k places, divided by what the best order would give.

    Args:
        query: See `recall_at_k`, as for the other arguments.
        query_labels: (Q,) labels.
        reference: (N, D) vectors, or None for leave-one-out.
        reference_labels: (N,) labels of the reference.
        k: How many places count; None is all of them.
        empty: What becomes of a query without a match.
        groups: Candidates of the query's own group are left out.
        over_ranks: Shares the work out among ranks.

    Raises:
        ValueError: As `recall_at_k`.

    Example:
        >>> round(ndcg_at_k([[1, 0]], ["a"], [[9, 1], [9, 2], [0, 1]], ["b", "a", "b"]), 4)
        0.6309
    """
    problem = _problem(query, query_labels, reference, reference_labels, groups, empty, over_ranks)
    depth = len(problem.reference) if k is None else _checked_depth(k, "ndcg_at_k")
    depth = min(depth, len(problem.reference))
    return _single(problem, partial(_ndcg, k=depth), np.full(len(problem.query), depth), empty)


@together
def cmc(
    query: Any,
    query_labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    k: int = 20,
    empty: Empty = "skip",
    groups: Any = None,
    over_ranks: bool = False,
) -> Floats:
    """Cumulative match characteristic: recall@1, recall@2, ..., recall@k in one pass.

    Args:
        query: See `recall_at_k`, as for the other arguments.
        query_labels: (Q,) labels.
        reference: (N, D) vectors, or None for leave-one-out.
        reference_labels: (N,) labels of the reference.
        k: The last rank of the curve.
        empty: What becomes of a query without a match.
        groups: Candidates of the query's own group are left out.
        over_ranks: Shares the work out among ranks.

    Returns:
        (k,) shares of queries whose first match stands at place 1, 2, ..., k or before.

    Raises:
        ValueError: As `recall_at_k`.

    Example:
        >>> cmc([[1, 0]], ["a"], [[9, 1], [9, 2], [0, 1]], ["b", "a", "a"], k=3).tolist()
        [0.0, 1.0, 1.0]
    """
    k = _checked_depth(k, "cmc")
    problem = _problem(query, query_labels, reference, reference_labels, groups, empty, over_ranks)
    inverse = _measure(problem, {"value": _reciprocal_rank}, np.full(len(problem.query), k), empty)["value"]
    counted = inverse[~np.isnan(inverse)]
    places = np.rint(1 / counted[counted > 0]).astype(np.int64)
    curve: Floats = np.bincount(places, minlength=k + 1)[1:].cumsum() / len(counted)
    return curve


def knn_accuracy(
    train: Any,
    train_labels: Any,
    test: Any = None,
    test_labels: Any = None,
    *,
    k: int = 200,
    temperature: float = 0.1,
    groups: Any = None,
    over_ranks: bool = False,
) -> float:
    """Accuracy of the weighted k-nearest-neighbour vote, Wu et al. 2018, section 3.4 (https://arxiv.org/abs/1805.01978).

    Each of the k nearest training samples votes for its class with weight exp(cosine / temperature). A tie between
    classes goes to the one that sorts first.

    Args:
        train: (N, D) vectors, NumPy or torch, of any norm.
        train_labels: (N,) integers or strings.
        test: (Q, D) vectors, or None: each training sample is tested on all others (leave-one-out).
        test_labels: (Q,) labels; a class that training has not seen counts as an error.
        k: Voters per test sample; more than there are means all.
        temperature: Divides the cosine; no unit, > 0. Wu et al. use 0.07.
        groups: Samples of the test sample's own group have no vote: (N,) for leave-one-out, a pair (test, train) with
            a test set. A sample that nobody can vote for counts as an error.
        over_ranks: See `recall_at_k`.

    Raises:
        ValueError: Shapes or labels that do not fit, a NaN or zero vector, k or temperature not above 0.

    Example:
        >>> knn_accuracy([[1, 0], [0, 1]], ["a", "b"], [[2, 1], [1, 3]], ["a", "b"], k=1)
        1.0
    """
    settings: dict[str, Any] = {"k": k, "temperature": temperature, "groups": groups, "over_ranks": over_ranks}
    return float(knn_hits(train, train_labels, test, test_labels, **settings).mean())


@together
def knn_hits(
    train: Any,
    train_labels: Any,
    test: Any = None,
    test_labels: Any = None,
    *,
    k: int = 200,
    temperature: float = 0.1,
    groups: Any = None,
    over_ranks: bool = False,
) -> Booleans:
    """Whether the vote of `knn_accuracy` is right, test sample by test sample: what `bootstrap_interval` wants.

    Args:
        train: See `knn_accuracy`, as for the other arguments.
        train_labels: (N,) labels.
        test: (Q, D) vectors, or None for leave-one-out.
        test_labels: (Q,) labels.
        k: Voters per test sample.
        temperature: Divides the cosine.
        groups: Samples of the test sample's own group have no vote.
        over_ranks: See `recall_at_k`.

    Raises:
        ValueError: As `knn_accuracy`.

    Example:
        >>> knn_hits([[1, 0], [0, 1]], ["a", "b"], [[2, 1], [3, 1]], ["a", "b"], k=1).tolist()
        [True, False]
    """
    k = _checked_depth(k, "knn_accuracy")
    if np.asarray(temperature).dtype.kind not in "fiu" or not temperature > 0:
        raise ValueError(f"knn_accuracy needs temperature > 0, got {temperature}; usual values are 0.07 and 0.1.")
    if (test is None) != (test_labels is None):
        raise ValueError(
            f"test and test_labels go together, and without both it is leave-one-out; got only "
            f"{'test_labels' if test is None else 'test'}."
        )
    if test is None:
        problem = Problem(train, train_labels, groups=groups, over_ranks=over_ranks)
    else:
        problem = Problem(
            test,
            test_labels,
            reference=train,
            reference_labels=train_labels,
            groups=groups,
            over_ranks=over_ranks,
        )
    k = min(k, int(problem.candidates.max()))
    if k < 1:
        raise ValueError(
            "knn_accuracy by leave-one-out needs at least 2 samples, got 1."
            if groups is None
            else "knn_accuracy has no voter: the groups leave out all samples for each one."
        )
    problem.share.refuse_different(lambda: problem.digest(np.array([k, temperature])))
    problem.search.prepare(len(problem.query))
    right = np.zeros(len(problem.query), dtype=np.uint8)
    step = int(np.clip(BUDGET // (16 * len(problem.classes)), 1, ROWS))

    def vote(rows: slice) -> None:
        elected = _elected(problem, rows, k, temperature)
        right[rows] = (elected == problem.query_codes[rows]) & (problem.candidates[rows] > 0)

    for _ in in_threads(vote, blocks(len(right), step)[problem.share.mine]):
        pass
    return problem.share.add(right).astype(np.bool_)


def _elected(problem: Problem, rows: slice, k: int, temperature: float) -> Integers:
    """Class that the k nearest neighbours of each of some queries vote for, (n,)."""
    query, own = problem.query.unit(rows), problem.leave_one_out
    if problem.query_groups is not None:
        ids, scores = problem.nearest(rows, k)
    else:
        # who votes matters, in which order does not; without itself, the last of equal rows is the one to go
        ids, scores = problem.search.nearest(query, k + own, ordered=own)
        if own:
            ids, scores = _without_itself(ids, scores, first=rows.start)
    codes, classes = problem.reference_codes[ids], len(problem.classes)
    votes = _votes(codes, scores, temperature, classes)
    elected: Integers = votes.argmax(axis=1)
    everyone = np.arange(len(votes))
    best = votes[everyone, elected]
    votes[everyone, elected] = -np.inf
    # each of two votes may be off by the share exp(tolerance / 2 / temperature) - 1
    off = np.expm1(min(problem.search.tolerance / temperature, 700.0))
    close = np.flatnonzero(best - votes.max(axis=1) <= off * best)
    if len(close):
        exact = problem.search.exact(query, np.repeat(close, k), ids[close].ravel()).reshape(-1, k)
        exact[ids[close] < 0] = -np.inf
        elected[close] = _votes(codes[close], exact, temperature, classes).round(DECIMALS).argmax(axis=1)
    return elected


def _votes(codes: Integers, scores: Floats, temperature: float, classes: int) -> Floats:
    """Sums of exp(cosine / temperature) for each class, (n, classes), of neighbours with `codes` (n, k)."""
    # relative to the nearest: exp(1 / temperature) overflows for small temperatures; -2: there may be none
    weights = np.exp((scores - scores.max(axis=1, keepdims=True, initial=-2.0)) / temperature)
    ballot = np.arange(len(codes))[:, None] * classes + codes
    votes = np.bincount(ballot.ravel(), weights=weights.ravel(), minlength=len(codes) * classes)
    return votes.astype(np.float64, copy=False).reshape(len(codes), classes)


def nearest_neighbours(
    query: Any, reference: Any = None, *, k: int = 10, groups: Any = None
) -> tuple[Integers, Floats]:
    """The exact k nearest rows of each query by cosine, ties to the lower row: the rankings of all metrics here.

    Args:
        query: (Q, D) vectors of any norm, NumPy or torch.
        reference: (N, D) vectors to search, or None: each query among the other queries.
        k: How many; all there are, if these are fewer.
        groups: See `recall_at_k`.

    Returns:
        Rows (Q, k), nearest first, and their cosines (Q, k), in float32 precision where nothing depends on it. Where
        groups leave fewer, -1 and -inf stand behind the last.

    Raises:
        ValueError: Shapes that do not fit, a NaN or zero vector, nothing to search.

    Example:
        >>> nearest_neighbours([[1, 0], [9, 1], [0, 1]], k=1)[0].tolist()
        [[1], [0], [1]]
    """
    within = reference is None
    left = Rows(query, "query")
    right = left if within else Rows(reference, "reference")
    if left.dim != right.dim:
        raise ValueError(f"query has {left.dim} numbers per row, reference has {right.dim}: two different encoders?")
    k = min(_checked_depth(k, "nearest_neighbours"), len(right) - within)
    if k < 1:
        raise ValueError("nearest_neighbours among the queries needs at least 2 rows, got 1.")
    ids, scores = np.empty((len(left), k), dtype=np.int64), np.empty((len(left), k))
    step = int(np.clip(BUDGET // (16 * max(k, left.dim)), 1, 8192))
    if groups is not None:
        alike = [np.zeros(len(side), dtype=np.int64) for side in (left, right)]
        others = {} if within else {"reference": reference, "reference_labels": alike[1]}
        problem = Problem(query, alike[0], **others, groups=groups)
        for rows in blocks(len(left), min(step, ROWS)):
            ids[rows], scores[rows] = problem.nearest(rows, k)
        return ids, scores
    for rows, found, cosines in _nearest(left, Search(right), k, within, step):
        ids[rows], scores[rows] = found, cosines
    return ids, scores


def _nearest(
    query: Rows, search: Search, k: int, leave_one_out: bool, step: int
) -> Iterator[tuple[slice, Integers, Floats]]:
    """Some queries at a time with their k nearest and the cosines, themselves left out."""
    search.prepare(len(query))
    for rows in blocks(len(query), step):
        ids, scores = search.nearest(query.unit(rows), k + leave_one_out)
        yield rows, *(_without_itself(ids, scores, first=rows.start) if leave_one_out else (ids, scores))


def _without_itself(ids: Integers, scores: Floats, *, first: int) -> tuple[Integers, Floats]:
    """Drop query `first + i` from row i; where equal rows pushed it out, drop the last neighbour."""
    own = ids == np.arange(first, first + len(ids))[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(ids), ids.shape[1] - 1)
    return ids[~own].reshape(shape), scores[~own].reshape(shape)


def _recall(found: Matches, k: int) -> Floats:
    return np.minimum(found.sum(found.rank <= k), 1.0)


def _precision(found: Matches, k: int) -> Floats:
    return found.sum(found.rank <= k) / k


def _r_precision(found: Matches) -> Floats:
    return found.sum(found.rank <= found.total[found.row]) / np.maximum(found.total, 1)


def _map_at_r(found: Matches) -> Floats:
    counted = found.rank <= found.total[found.row]
    return found.sum(counted * found.order / found.rank) / np.maximum(found.total, 1)


def _average_precision(found: Matches, k: int) -> Floats:
    counted = found.rank <= k
    return found.sum(counted * found.order / found.rank) / np.clip(found.total, 1, k)


def _reciprocal_rank(found: Matches) -> Floats:
    first = found.order == 1
    return found.sum(first / found.rank)


def _ndcg(found: Matches, k: int) -> Floats:
    discounts = 1 / np.log2(np.arange(2, k + 2))
    best = np.append(0, discounts.cumsum())[np.clip(found.total, 0, k)]
    gained = np.where(found.rank <= k, discounts[np.minimum(found.rank, k) - 1], 0)
    return found.sum(gained) / np.where(best > 0, best, 1)


def _measure(
    problem: Problem,
    measures: dict[str, Callable[[Matches], Floats]],
    depth: Integers,
    empty: Empty,
    state: str | Path | None = None,
) -> dict[str, Floats]:
    """Evaluate per-query measures while streaming over the matches; (Q,) each, NaN for a skipped query."""
    values = {name: np.zeros(len(problem.query)) for name in measures}
    share, progress = problem.share, None
    share.refuse_different(lambda: problem.digest(depth, np.array([empty, *measures])))
    if state is not None:
        mine = f"-{share.rank + 1}-of-{share.ranks}" if share.ranks > 1 else ""
        progress = Progress(Path(f"{state}{mine}"), values, problem.digest(depth) + mine, len(depth[share.mine]))
    for found in problem.matches(depth, 0 if progress is None else progress.done):
        for name, measure in measures.items():
            values[name][found.queries] = measure(found)
        if progress is not None:
            progress.advance(len(found.queries))
    values = {name: share.add(per_query) for name, per_query in values.items()}
    if empty == "skip":
        for per_query in values.values():
            per_query[problem.total == 0] = np.nan
    return values


def _single(problem: Problem, measure: Callable[[Matches], Floats], depth: Integers, empty: Empty) -> float:
    return _mean(_measure(problem, {"value": measure}, depth, empty)["value"])


def _mean(per_query: Floats) -> float:
    return float(np.nanmean(per_query))


def _problem(
    query: Any,
    query_labels: Any,
    reference: Any,
    reference_labels: Any,
    groups: Any,
    empty: Empty,
    over_ranks: bool,
) -> Problem:
    if empty not in get_args(Empty):
        raise ValueError(f"empty must be 'skip', 'zero' or 'error', got {empty!r}.")
    problem = Problem(
        query,
        query_labels,
        reference=reference,
        reference_labels=reference_labels,
        groups=groups,
        over_ranks=over_ranks,
    )
    lonely = problem.total == 0
    if (empty == "error" and lonely.any()) or (empty == "skip" and lonely.all()):
        first = int(lonely.argmax())
        raise ValueError(
            f"{int(lonely.sum())} of {len(lonely)} queries have no match to find, the first is query {first} "
            f"({problem.classes[problem.query_codes[first]]!s}): a class of one, labels of two different kinds, or "
            "groups that exclude every class-mate? In Python, empty='zero' counts such queries as failures"
            + ("." if lonely.all() else ", empty='skip' leaves them out.")
        )
    return problem


def _checked_depth(k: Any, name: str) -> int:
    return as_count(k, f"{name} needs k to be")


def _refuse_shallow(problem: Problem, k: int | None, name: str) -> None:
    deepest = int(problem.total.max())
    if k is not None and _checked_depth(k, name) < deepest:
        raise ValueError(
            f"{name} with k={k} would be wrong: a query has R={deepest} matches, so its first {deepest} places are "
            "needed. Leave k out."
        )
