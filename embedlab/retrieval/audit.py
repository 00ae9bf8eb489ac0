"""What labelled vectors say about themselves: a threshold, wrong labels, duplicates, identities that look alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from embedlab._types import Ids, Vectors
from embedlab.metrics import effective_rank
from embedlab.retrieval.calibration import Calibration, CalibrationError, calibrate_threshold
from embedlab.retrieval.embedders import as_array
from embedlab.retrieval.inputs import checked_labels, normalised

NEIGHBOURS = 16  # of each row, among which duplicates are sought
QUERIES = 4_096  # rows compared with all others at a time
SCORES = 1 << 22  # that are in memory at a time
EVIDENCE = 3  # templates of an identity that speak for or against a label
MOST_PAIRS = 100  # confusable pairs that are reported
LISTED = 10  # findings of a kind in the text

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True)
class Mislabelled:
    """A row that lies with another identity.

    Args:
        id: Of the row.
        label: What it carries.
        suggestion: The identity that it lies with.
        score: How much nearer to `suggestion` than to its own, in units of what rows are typically nearer to their own:
            a swapped label gives 1 or more.
        own: Cosine with its own identity, mean over the nearest templates, 3 at most.
        other: The same with `suggestion`.
        nearest: Id of the nearest row of `suggestion`.
    """

    id: int
    label: str
    suggestion: str
    score: float
    own: float
    other: float
    nearest: int


@dataclass(frozen=True)
class Duplicates:
    """Rows that are as good as the same: one picture twice, or frames of one video.

    Args:
        ids: Of the rows, linked by cosines of at least the limit.
        labels: Theirs, row by row.
        cosine: The lowest of these cosines.
    """

    ids: tuple[int, ...]
    labels: tuple[str, ...]
    cosine: float

    @property
    def across(self) -> bool:
        """Whether they carry more than one label, so that one of them must be wrong."""
        return len(set(self.labels)) > 1


@dataclass(frozen=True)
class Confusable:
    """Two identities that lie near each other.

    Args:
        labels: Both.
        taken: How many rows of each would be taken for the other identity if their own were not enrolled.
        templates: How many rows each has.
        cosine: Of the nearest two rows.
        ids: Of these rows.
    """

    labels: tuple[str, str]
    taken: tuple[int, int]
    templates: tuple[int, int]
    cosine: float
    ids: tuple[int, int]

    @property
    def share(self) -> float:
        """Rows that are taken for the other identity, of all rows of both."""
        return sum(self.taken) / sum(self.templates)


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Args:
        rows: Vectors.
        dim: Numbers per vector.
        identities: Different labels.
        single: Identities with one row: nothing can be said about its label, and every other picture is a stranger.
        fpir: The rate that the threshold was to promise.
        calibration: The threshold with its bound and operating curve; None where the identities cannot support it.
        refusal: Why not.
        recall_at_1: Share of rows, of identities with several, whose nearest other row is of the same identity; None
            without any.
        detection_rate: Share of these that also reach the threshold, mean over identities.
        effective_rank: Directions that the vectors use, of `dim`.
        duplicate: Cosine from which rows are called duplicates.
        threshold: What confusable pairs are judged by: the calibration's, or the one that was given; None without.
        mislabelled: Surest first.
        duplicates: Those across identities first, then the largest groups.
        confusable: At most 100 pairs; the largest share of rows that are taken for the other first.
    """

    rows: int
    dim: int
    identities: int
    single: int
    fpir: float
    calibration: Calibration | None
    refusal: str | None
    recall_at_1: float | None
    detection_rate: float | None
    effective_rank: float
    duplicate: float
    threshold: float | None
    mislabelled: tuple[Mislabelled, ...]
    duplicates: tuple[Duplicates, ...]
    confusable: tuple[Confusable, ...]

    @property
    def confused(self) -> tuple[Confusable, ...]:
        """The confusable pairs of which some row reaches the threshold."""
        return tuple(pair for pair in self.confusable if sum(pair.taken))

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        found = asdict(self)
        found["duplicates"] = [asdict(group) | {"across": group.across} for group in self.duplicates]
        found["confusable"] = [asdict(pair) | {"share": pair.share} for pair in self.confusable]
        return found

    def to_text(self) -> str:
        """The same for a terminal, the first ten findings of each kind."""
        lines = [
            f"{self.rows} vectors of {self.dim} numbers, {self.identities} identities ({self.single} with one vector), "
            f"effective rank {self.effective_rank:.1f}",
            *self._promise_lines(),
        ]
        wrong = [
            f"{row.score:6.2f}  {row.id}: {row.label} -> {row.suggestion}?  cosine {row.own:.3f} -> {row.other:.3f}"
            for row in self.mislabelled
        ]
        same = [
            f"{group.cosine:.4f}  {', '.join(f'{key}: {label}' for key, label in _first(group))}"
            + ("  (more than one label)" if group.across else "")
            for group in self.duplicates
        ]
        near = [
            f"{pair.share:6.1%}  {pair.labels[0]} / {pair.labels[1]}: {sum(pair.taken)} of {sum(pair.templates)}, "
            f"nearest cosine {pair.cosine:.3f}"
            for pair in self.confused
        ]
        kinds = [
            ("rows that may be mislabelled", wrong),
            (f"groups of suspected duplicates (cosine >= {self.duplicate:g})", same),
            ("pairs of identities taken for each other at the threshold", near),
        ]
        for title, found in kinds if self.calibration else kinds[:2]:  # without a threshold nobody is taken
            lines += ["", f"{len(found)} {title}", *(f"  {line}" for line in found[:LISTED])]
            lines += ["  ..."] if len(found) > LISTED else []
        return "\n".join(lines)

    def _promise_lines(self) -> list[str]:
        if self.calibration is None:
            return [f"no threshold: {self.refusal}"]
        found = self.calibration
        lines = [
            f"threshold {found.threshold:.4f}: with {found.confidence:.0%} confidence at most {found.fpir:.2%} of "
            f"strangers are taken for somebody (bound {found.bound:.2%})",
            "  set by leave-identity-out: every identity has played the stranger to the others, so that it holds for "
            "strangers and pictures like these",
        ]
        if self.detection_rate is not None:
            lines.append(
                f"  {self.detection_rate:.1%} of the enrolled are named right at it; recall@1 {self.recall_at_1:.3f}"
            )
        return lines


def audit(
    vectors: Any,
    labels: Sequence[str],
    ids: Sequence[int] | Ids | None = None,
    *,
    fpir: float = 0.01,
    confidence: float = 0.95,
    duplicate: float = 0.999,
    threshold: float | None = None,
) -> Audit:
    """Audit labelled vectors, without a gallery and without training; any model may have made them.

    **Threshold.** Every identity plays the stranger to the others: the score of a row is its highest cosine with a row
    of another identity, and `calibrate_threshold` does the rest. It is what a gallery of these vectors with the fusion
    "max" needs for strangers like these; strangers who were never enrolled are the better ones to ask, and half as many
    of them do: among the enrolled two that look alike raise two false alarms, or none. Wrong labels and
    duplicates across identities count as strangers taken for somebody: clean up, and audit again.

    **Mislabelled rows.** The margin of a row is its cosine with its own identity less that with the nearest other one,
    each the mean over the nearest c templates, c the same for both and at most 3. The typical row has the median margin
    M. A row is suspected when its margin is at most -M / 2 and lies at least 3 robust standard deviations (1.4826
    times the median absolute deviation) below M; its score is -margin / M, 1 or more for a swapped label. An
    identity with one row has no margin, and where M <= 0 the vectors cannot tell the labels apart and nothing is said.

    **Duplicates.** Rows linked by cosines of at least `duplicate`, each with its 16 nearest.

    **Confusable identities.** A row is taken for another identity when that is the best one while its own plays the
    stranger and the threshold is reached. Without a threshold nobody is taken, and pairs are ranked by their nearest
    rows.

    Every row is compared with every other, exactly and in chunks: N^2 D multiplications, but never N x N numbers.

    Args:
        vectors: (N, D) of any norm.
        labels: N identities, two different ones at least.
        ids: N whole numbers to name the rows by; None for 0 to N - 1.
        fpir: Target false-positive identification rate of the threshold, in (0, 1).
        confidence: Of its bound.
        duplicate: Cosine from which two rows are called duplicates, in (0, 1).
        threshold: Judge confusable pairs by this one, such as a gallery's own, and not by the audit's.

    Raises:
        ValueError: Vectors that are zero or not finite, labels that do not fit, fewer than two identities.

    Example:
        >>> found = audit([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], ["Ada", "Ada", "Grace", "Grace"], fpir=0.9)
        >>> found.identities, found.recall_at_1, found.mislabelled
        (2, 1.0, ())
    """
    if not 0 < duplicate < 1:
        raise ValueError(f"duplicate is a cosine between 0 and 1, got {duplicate}; 0.999 is the usual one.")
    if labels is None:
        raise ValueError("audit needs labels: one identity per vector; without them nothing can be compared.")
    matrix = normalised(as_array(vectors), None)
    rows = _Rows.of(matrix, labels, ids)
    own, other = rows.closest(rows.codes), rows.closest(rows.codes[rows.rival])  # (N, 3) each
    calibration, refusal = _threshold(rows, own[:, 0], fpir, confidence)
    if threshold is None and calibration is not None:
        threshold = calibration.threshold
    paired = rows.sizes[rows.codes] > 1  # (N,) rows with another row of their identity
    right = own[:, 0] > rows.rival_score
    return Audit(
        rows=len(matrix),
        dim=matrix.shape[1],
        identities=len(rows.names),
        single=int((rows.sizes == 1).sum()),
        fpir=fpir,
        calibration=calibration,
        refusal=refusal,
        recall_at_1=float(right[paired].mean()) if paired.any() else None,
        detection_rate=None if calibration is None else calibration.detection_rate,
        effective_rank=effective_rank(matrix),
        duplicate=duplicate,
        threshold=threshold,
        mislabelled=_mislabelled(rows, own, other),
        duplicates=_duplicates(rows, duplicate),
        confusable=_confusable(rows, threshold),
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """Vectors with their identities and neighbours.

    Args:
        matrix: (N, D) of norm 1.
        names: G identities.
        codes: (N,) place of each row's identity in `names`.
        ids: (N,).
        sizes: (G,) rows of each identity.
        members: G arrays, the rows of each identity.
        near: (N, k) the nearest rows, the row itself among them.
        near_scores: (N, k) their cosines.
        rival: (N,) the nearest row of another identity.
        rival_score: (N,) its cosine.
    """

    matrix: Vectors
    names: list[str]
    codes: Ids
    ids: Ids
    sizes: Ids
    members: list[Ids]
    near: Ids
    near_scores: Floats
    rival: Ids
    rival_score: Floats

    @classmethod
    def of(cls, matrix: Vectors, labels: Sequence[str], ids: Sequence[int] | Ids | None) -> _Rows:
        names, codes = np.unique(np.array(checked_labels(list(labels), len(matrix)), dtype=object), return_inverse=True)
        if len(names) < 2:
            raise ValueError(
                f"An audit compares identities with one another and needs at least two, got {len(names)} in "
                f"{len(matrix)} rows. Are the labels those of another level, such as one for the whole set?"
            )
        keys = np.arange(len(matrix)) if ids is None else np.asarray(ids, dtype=np.int64)
        if len(keys) != len(matrix):
            raise ValueError(f"{len(keys)} ids came for {len(matrix)} vectors; they must be row by row.")
        sizes = np.bincount(codes)
        members = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
        near = np.empty((len(matrix), min(NEIGHBOURS + 1, len(matrix))), np.int64)
        scores = np.empty(near.shape, np.float32)
        rival, rival_score = np.full(len(matrix), -1, np.int64), np.full(len(matrix), np.nan, np.float32)
        k = near.shape[1]
        for part, found, cosines in _nearest(matrix, np.arange(len(matrix)), k, "comparing vectors"):
            near[part], scores[part] = found, cosines
            _note_rivals(part, found, cosines, codes, rival, rival_score)
        while len(todo := np.flatnonzero(rival < 0)):  # all that is near is of the same identity: look further
            k = min(8 * k, len(matrix))
            for part, found, cosines in _nearest(matrix, todo, k, f"comparing vectors, {k} deep"):
                _note_rivals(part, found, cosines, codes, rival, rival_score)
        return cls(matrix, names.tolist(), codes, keys, sizes, members, near, scores, rival, rival_score)

    def closest(self, identity: Ids) -> Floats:
        """The highest cosines (N, 3) of each row with the rows of an identity (N,), itself left out; NaN where none."""
        result = np.full((len(self.matrix), EVIDENCE), np.nan, np.float32)
        order = np.argsort(identity, kind="stable")
        asking = np.split(order, np.cumsum(np.bincount(identity, minlength=len(self.names)))[:-1])
        for rows, members in zip(asking, self.members, strict=True):
            step = max(1, SCORES // len(members))
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                scores = np.clip(self.matrix[part] @ self.matrix[members].T, -1, 1)
                scores[part[:, None] == members] = np.nan
                best = -np.sort(-scores, axis=1)[:, :EVIDENCE]  # NaN goes last
                result[part, : best.shape[1]] = best
        return result


def _nearest(matrix: Vectors, rows: Ids, k: int, description: str) -> Iterator[tuple[Ids, Ids, Floats]]:
    """Some of the rows at a time, with their k nearest (n, k) and the cosines."""
    from embedlab.retrieval.search import flat

    step = max(1, min(QUERIES, SCORES // k))
    with tqdm(total=len(rows), desc=description, unit="row", delay=3, leave=False, disable=None) as bar:
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            scores, found = flat(matrix, matrix[part], k)
            yield part, found, np.clip(scores, -1, 1)
            bar.update(len(part))


def _note_rivals(part: Ids, found: Ids, scores: Floats, codes: Ids, rival: Ids, rival_score: Floats) -> None:
    strange = codes[found] != codes[part][:, None]
    place = strange.argmax(axis=1)
    there = np.flatnonzero(strange[np.arange(len(part)), place])
    rival[part[there]] = found[there, place[there]]
    rival_score[part[there]] = scores[there, place[there]]


def _threshold(rows: _Rows, own: Floats, fpir: float, confidence: float) -> tuple[Calibration | None, str | None]:
    """Threshold by leave-identity-out with the detection rate along the curve, or why there is none."""
    try:
        found = calibrate_threshold(
            rows.rival_score,
            [rows.names[code] for code in rows.codes.tolist()],
            fpir=fpir,
            confidence=confidence,
            mutual=True,
        )
    except CalibrationError as error:
        return None, str(error)
    paired = rows.sizes[rows.codes] > 1
    weights = paired / rows.sizes[rows.codes]  # each identity counts the same
    right = own > rows.rival_score

    def detected(threshold: float) -> float | None:
        return float(weights[right & (own >= threshold)].sum() / weights.sum()) if paired.any() else None

    found = replace(
        found,
        gallery_identities=len(rows.names),
        gallery_templates=len(rows.codes),
        genuine_images=int(paired.sum()),
        detection_rate=detected(found.threshold),
        source="leave-identity-out",
        curve=tuple((limit, rate, bound, detected(limit)) for limit, rate, bound, _ in found.curve),
    )
    return found, None


def _mislabelled(rows: _Rows, own: Floats, other: Floats) -> tuple[Mislabelled, ...]:
    """See `audit`."""
    paired = np.flatnonzero(rows.sizes[rows.codes] > 1)
    if not len(paired):
        return ()
    depth = np.minimum(np.isfinite(own[paired]).sum(1), np.isfinite(other[paired]).sum(1)) - 1
    steps = np.arange(1, EVIDENCE + 1)
    near_own = (np.cumsum(own[paired], axis=1, dtype=np.float64) / steps)[np.arange(len(paired)), depth]
    near_other = (np.cumsum(other[paired], axis=1, dtype=np.float64) / steps)[np.arange(len(paired)), depth]
    margin = near_own - near_other
    typical = float(np.median(margin))
    if typical <= 0:
        return ()
    spread = 1.4826 * float(np.median(np.abs(margin - typical)))
    suspected = np.flatnonzero((margin <= -typical / 2) & (margin <= typical - 3 * spread))
    return tuple(
        Mislabelled(
            id=int(rows.ids[paired[place]]),
            label=rows.names[rows.codes[paired[place]]],
            suggestion=rows.names[rows.codes[rows.rival[paired[place]]]],
            score=float(-margin[place] / typical),
            own=float(near_own[place]),
            other=float(near_other[place]),
            nearest=int(rows.ids[rows.rival[paired[place]]]),
        )
        for place in suspected[np.argsort(margin[suspected], kind="stable")].tolist()
    )


def _duplicates(rows: _Rows, limit: float) -> tuple[Duplicates, ...]:
    """Connected groups of rows, linked by neighbours at or above the limit."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    here, place = np.nonzero(rows.near_scores >= limit)
    there, cosine = rows.near[here, place], rows.near_scores[here, place]
    here, there, cosine = here[here != there], there[here != there], cosine[here != there]
    links = coo_array((np.ones(len(here), bool), (here, there)), shape=(len(rows.codes),) * 2)
    _, group = connected_components(links, directed=False)
    lowest = np.full(group.max() + 1, np.inf)
    np.minimum.at(lowest, group[here], cosine)
    linked = np.unique(np.concatenate([here, there]))
    linked = linked[np.argsort(group[linked], kind="stable")]
    starts = np.flatnonzero(np.diff(group[linked], prepend=-1))
    found = [
        Duplicates(
            ids=tuple(rows.ids[part].tolist()),
            labels=tuple(rows.names[code] for code in rows.codes[part].tolist()),
            cosine=float(lowest[group[part[0]]]),
        )
        for part in np.split(linked, starts[1:])
        if len(part)
    ]
    return tuple(sorted(found, key=lambda one: (not one.across, -len(one.ids), -one.cosine)))


def _confusable(rows: _Rows, threshold: float | None) -> tuple[Confusable, ...]:
    """Pairs of identities by the share of rows that are taken for the other, then by their nearest rows."""
    first, second = rows.codes, rows.codes[rows.rival]
    low, high = np.minimum(first, second), np.maximum(first, second)
    keys, pair = np.unique(low * len(rows.names) + high, return_inverse=True)
    taken = np.zeros(len(rows.codes), bool) if threshold is None else rows.rival_score >= threshold
    forth = np.bincount(pair, taken & (first == low), minlength=len(keys)).astype(int)
    back = np.bincount(pair, taken & (first == high), minlength=len(keys)).astype(int)
    low, high = np.divmod(keys, len(rows.names))
    share = (forth + back) / (rows.sizes[low] + rows.sizes[high])
    order = np.argsort(-rows.rival_score, kind="stable")
    nearest = order[np.unique(pair[order], return_index=True)[1]]  # of each pair, its row with the highest cosine
    ranked = np.lexsort((-rows.rival_score[nearest], -share))[:MOST_PAIRS]
    found = []
    for one in ranked.tolist():
        row = int(nearest[one])
        ends = (row, int(rows.rival[row]))
        ends = ends if rows.codes[row] == low[one] else ends[::-1]
        found.append(
            Confusable(
                labels=(rows.names[low[one]], rows.names[high[one]]),
                taken=(int(forth[one]), int(back[one])),
                templates=(int(rows.sizes[low[one]]), int(rows.sizes[high[one]])),
                cosine=float(rows.rival_score[row]),
                ids=(int(rows.ids[ends[0]]), int(rows.ids[ends[1]])),
            )
        )
    return tuple(found)


def _first(group: Duplicates) -> list[tuple[int, str]]:
    return list(zip(group.ids, group.labels, strict=True))[:4]
