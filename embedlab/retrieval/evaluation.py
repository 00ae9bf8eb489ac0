"""`embedlab evaluate`: embeddings to figures with intervals over identities and the protocol that made them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from embedlab._machine import processor_name, versions
from embedlab._types import Embeddings, Ids
from embedlab.data.images import available_cores
from embedlab.data.sources import open_source, refuse_gaps
from embedlab.metrics import (
    PairSample,
    VerificationReport,
    bootstrap_intervals,
    draw_pairs,
    effective_rank,
    feature_std,
    hierarchical_distance,
    hierarchical_report,
    hubness,
    knn_hits,
    nearest_neighbours,
    oscr,
    retrieval_report,
    told_interval,
    uniformity,
    unknown_auroc,
    verification_report,
    verification_resamples,
)
from embedlab.retrieval.open_set import (
    Mask,
    OpenSetReport,
    choose_templates,
    halve_identities,
    open_set_trial,
    take,
)
from embedlab.retrieval.subjects import Reading, Subject, Where

logger = logging.getLogger("embedlab")

DEPTH = 20  # last rank of the CMC curve
NEIGHBOURS = 5  # of each query, kept for examples and confusions
RESAMPLES = 500  # of verification; figures of single queries have 2000
CURVE = 600  # operating points that a picture needs at most
COLLAPSED = 0.01  # feature std times root D below this; 1 is healthy
HEALTH_ROWS = 5_000  # vectors that figures over all pairs of vectors are taken from

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Groups = list[str] | tuple[list[str], list[str]] | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is read, and what is measured on it.

    Args:
        path: Queries.
        select: Their rows.
        reference: What is searched; None is leave-one-out within the queries, or with `reference_select` other rows of
            `path`.
        reference_select: Its rows.
        open_set: Also run the open-set trial.
        calibrate: Images or vectors of identities that set its threshold; None is rows of `path`.
        calibrate_select: Their rows.
        knn_k: Neighbours of the weighted k-NN classifier.
        fpir: Promised false-positive identification rate of the trial.
        templates: Enrolled images per identity in the trial, without a reference.
        seed: Of all that is drawn.
        degradations: Bad conditions under which the queries are measured again, see `embedlab.data.DEGRADATIONS`.
        severities: Of the degradations, from 1 to 5.
        verification: Compare all pairs: their number grows with the square of the images.
        coarse: Column of coarser classes, by which a wrong answer can be a near miss.
        groups: Columns that together name the group of an image, such as its camera or its track; "label" is one too.
            What is of the query's own group is neither searched nor compared with it.

    Raises:
        ValueError: An open-set trial without rows for its threshold, or with groups; an unknown kind or severity.
    """

    path: str
    select: Where | None = None
    reference: str | None = None
    reference_select: Where | None = None
    open_set: bool = False
    calibrate: str | None = None
    calibrate_select: Where | None = None
    knn_k: int = 20
    fpir: float = 0.05
    templates: int = 3
    seed: int = 0
    degradations: Sequence[str] = ()
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    verification: bool = True
    coarse: str | None = None
    groups: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.open_set and not (self.calibrate or self.calibrate_select):
            raise ValueError(
                "--open-set needs --calibrate-select COLUMN=VALUE, or --calibrate PATH: identities, not tested, that "
                "set the threshold."
            )
        if self.open_set and self.groups:
            raise ValueError(
                "--groups leaves out other images for each query, and the gallery of --open-set has the same templates "
                "for all; run it without, and keep groups apart by --select and --reference-select."
            )
        if self.degradations:
            from embedlab.data.degradations import chosen_kinds, chosen_severities  # not before it is needed: torch

            chosen_kinds(self.degradations)  # an error now, not after the work
            chosen_severities(self.severities)


@dataclass(frozen=True, eq=False)
class Verification:
    """All pairs, and those of them that intervals and pictures are made of.

    Args:
        report: Figures of all pairs, with the curve.
        pairs: For intervals and pictures.
        scores: Cosines of their genuine and impostor pairs.
        resamples: Of the figures, over identities.
    """

    report: VerificationReport
    pairs: PairSample
    scores: tuple[Floats, Floats]
    resamples: dict[str, Floats]

    def to_dict(self) -> dict[str, Any]:
        """The figures with intervals."""
        return {
            **self.report.to_dict(),
            "intervals": {name: interval_of(values) for name, values in self.resamples.items()},
            "interval_pairs": {"genuine": len(self.pairs.genuine), "impostors": len(self.pairs.impostors)},
            "interval_resamples": RESAMPLES,
        }


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One subject on one plan: figures, and what pictures of them are made of.

    Args:
        subject: What was measured.
        plan: On what.
        query: What was read for the queries.
        reference: What was searched; None is leave-one-out.
        figures: Of the JSON document.
        per_query: Name to (Q,) values of each query, NaN for one without a match.
        nearest: (Q, k) rows of the nearest in the reference, or among the other queries.
        cosines: (Q, k) theirs.
        verification: None where there is only one kind of pair.
        open_set: Of the trial, where there was one.
        groups: Of each query, or of each query and each row of the reference, as the metrics take them; None without.
        calibration: The identities that set the trial's threshold, where there was one.
    """

    subject: Subject
    plan: Plan
    query: Reading
    reference: Reading | None
    figures: dict[str, Any]
    per_query: Mapping[str, Floats]
    nearest: Ids
    cosines: Floats
    verification: Verification | None = None
    open_set: OpenSetReport | None = None
    groups: Groups = None
    calibration: Reading | None = None
    labels: list[str] = field(init=False)
    searched_labels: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", _labels(self.query.embeddings, "query"))
        object.__setattr__(self, "searched_labels", _labels(self.searched.embeddings, "reference"))

    @property
    def searched(self) -> Reading:
        """Where neighbours come from."""
        return self.query if self.reference is None else self.reference

    @property
    def name(self) -> str:
        """Of the subject."""
        return self.subject.name


def evaluate(subject: Subject, plan: Plan) -> Evaluation:
    """Read what the plan names and measure the subject on it.

    Raises:
        ValueError: Images without labels or groups, or images that are queries and reference at once.
    """
    if plan.degradations and subject.encoder is None:  # an error now, not after the work
        raise ValueError(f"{plan.path} holds vectors; --degradations needs images to degrade, and --encoder.")
    searched = plan.reference or (plan.path if plan.reference_select else None)
    if subject.encoder is not None and (plan.groups or plan.coarse):  # an error now, not after all is embedded
        for path, select in ((plan.path, plan.select), *([(searched, plan.reference_select)] if searched else [])):
            source = open_source(path, select=select)
            _group_names(plan.groups, source.columns, source.labels, source.names)
            if plan.coarse:
                _column(source.columns, source.labels, plan.coarse, "--coarse")
    query = subject.read(plan.path, plan.select)
    reference = None if searched is None else subject.read(searched, plan.reference_select)
    others = None if reference is None else reference.embeddings
    _refuse_shared_images(query.embeddings, others)
    groups = _groups(plan.groups, query, reference)
    figures, per_query = retrieval_figures(query.embeddings, others, knn_k=plan.knn_k, groups=groups)
    nearest, cosines = nearest_neighbours(
        query.embeddings.vectors, None if others is None else others.vectors, k=NEIGHBOURS, groups=groups
    )
    if plan.coarse:
        figures["coarse"], per_query["coarse_recall_at_1"] = _coarse(plan.coarse, query, reference, nearest, per_query)
    verification = _verification(query.embeddings, others, groups, plan.seed) if plan.verification else None
    if plan.verification:
        figures["verification"] = verification.to_dict() if verification else None
    figures["health"] = _health(query.embeddings.vectors, plan.seed)
    figures["warnings"] = _doubts(figures, plan, query.embeddings, others, groups)
    for doubt in figures["warnings"]:
        logger.warning("%s: %s", subject.name, doubt)
    trial, calibration = None, None
    if plan.open_set:
        calibration = subject.read(plan.calibrate or plan.path, plan.calibrate_select)
        strangers = calibration.embeddings
        figures["open_set"], trial = evaluate_open_set(
            query.embeddings, strangers, others, fpir=plan.fpir, templates=plan.templates, seed=plan.seed
        )
    return Evaluation(
        subject, plan, query, reference, figures, per_query, nearest, cosines, verification, trial, groups, calibration
    )


def _doubts(
    figures: Mapping[str, Any], plan: Plan, query: Embeddings, reference: Embeddings | None, groups: Groups
) -> list[str]:
    """Which figures mean nothing on such images or of such vectors, and why."""
    found = []
    sizes = Counter(_labels(reference or query, "reference"))
    mates = int(np.median(list(sizes.values()))) - (reference is None)
    if len(sizes) < 2:
        found.append(
            "All that is searched is of one identity, so every answer is right and recall says nothing; do the labels "
            "name the identities (folders, or the column label)?"
        )
    elif plan.knn_k >= (candidates := _most_candidates(query, reference, groups)):
        found.append(
            f"k-NN with k = {plan.knn_k} lets all {candidates} candidates vote, so that the larger identities win, and "
            f"none of {len(sizes)} equally large ones does where an image is searched among the others; choose a "
            "smaller --knn-k."
        )
    elif plan.knn_k > 4 * max(1, mates) and figures["knn_accuracy"] < figures["recall_at_1"] - 0.1:
        found.append(
            f"k-NN with k = {plan.knn_k} lets {plan.knn_k} images vote where the typical identity has {mates} to find, "
            "and is outvoted by others: it falls well behind recall@1. Choose a smaller --knn-k."
        )
    health = figures["health"]
    if health["feature_std"] * query.vectors.shape[1] ** 0.5 < COLLAPSED:
        found.append(
            "The embedding has all but collapsed: all vectors lie within a narrow cone (feature std x root D below "
            f"{COLLAPSED}, where 1 is healthy; effective rank {health['effective_rank']:.1f}), so that rounding and "
            "bfloat16 may decide who is nearest."
        )
    return found


def _groups(columns: Sequence[str], query: Reading, reference: Reading | None) -> Groups:
    """The group of each image, as JSON of the values that name it."""
    if not columns:
        return None
    own, *others = (
        _group_names(columns, side.columns, side.embeddings.labels, side.embeddings.paths)
        for side in (query, *([] if reference is None else [reference]))
    )
    return (own, others[0]) if others else own


def _group_names(
    columns: Sequence[str], known: Mapping[str, list[str]], labels: list[str] | None, names: list[str] | None
) -> list[str]:
    values = [_column(known, labels, column, "--groups") for column in columns]
    for column, found in zip(columns, values, strict=True):
        refuse_gaps(found, column, names)
    return [json.dumps(row) for row in zip(*values, strict=True)]


def _column(known: Mapping[str, list[str]], labels: list[str] | None, column: str, option: str) -> list[str]:
    if column == "label" and labels is not None:
        return labels
    if column not in known:
        raise ValueError(f"There is no column {column!r} for {option}; there are {sorted(known) or 'none'}.")
    return known[column]


def protocol_of(found: Sequence[Evaluation]) -> dict[str, Any]:
    """How the figures were made, so that somebody else can make them again."""
    first = found[0]
    sides = {"query": first.query, "reference": first.reference, "calibration": first.calibration}
    return {
        **asdict(first.plan),
        "mode": "leave-one-out" if first.reference is None else "query against reference",
        "empty": first.figures["empty"],
        "cmc_depth": len(first.figures["cmc"]),
        "knn_temperature": 0.1,
        "subjects": {one.name: dict(one.subject.about) for one in found},
        "data": {name: _counted(side) for name, side in sides.items() if side is not None},
        "intervals": {
            "confidence": 0.95,
            "method": "percentile bootstrap over identities, the labels of the queries; where no resample changes a "
            "share, as where all queries are right, Wilson's score interval with identities as trials; the lower end "
            "of a recall is that of the smaller depths where these are higher; no interval of a figure of pairs that "
            "no resample changes",
            "resamples": 2000,
            "verification_resamples": RESAMPLES,
            "seed": 0,
        },
        "versions": versions("torch", "torchvision", "numpy", "faiss-cpu", "scikit-learn", "pillow"),
        "hardware": {"processor": processor_name(), "cores": available_cores()},
    }


def _counted(side: Reading) -> dict[str, Any]:
    return {
        "images": len(side.embeddings),
        "identities": len(set(side.embeddings.labels or [])),
        "dim": int(side.embeddings.vectors.shape[1]),
        "skipped": len(side.skipped),
        "skipped_images": list(side.skipped[:100]),
        "ignored_files": side.ignored,
        "digest": _digest(side.embeddings),
    }


def _digest(found: Embeddings) -> str:
    """BLAKE2b over vectors, labels and ids, which with the columns that the plan names decide all figures."""
    digest = hashlib.blake2b(json.dumps([found.vectors.shape, found.labels]).encode(), digest_size=16)
    for part in (found.vectors, found.ids):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _refuse_shared_images(query: Embeddings, reference: Embeddings | None) -> None:
    """An image that finds itself says nothing about the encoder."""
    if reference is None or query.paths is None or reference.paths is None:
        return
    shared = {os.path.realpath(path) for path in query.paths} & {os.path.realpath(path) for path in reference.paths}
    if shared:
        raise ValueError(
            f"{len(shared)} images are queries and reference at once, first {min(shared)}: they would find themselves. "
            "Leave out --reference for leave-one-out, or choose disjoint rows."
        )


def retrieval_figures(
    query: Embeddings, reference: Embeddings | None = None, *, knn_k: int = 20, groups: Any = None
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Recall@1/5/10, R-precision, MAP@R, the CMC curve and weighted k-NN accuracy.

    Args:
        query: With labels.
        reference: With labels; None is leave-one-out within the queries.
        knn_k: Neighbours of the k-NN classifier, at most as many as the reference has.
        groups: What is of the query's own group is not searched, see `embedlab.metrics.recall_at_k`.

    Returns:
        The figures; `intervals` are 95 %, by resampling identities. And the values of each query, (Q,) by name.

    Raises:
        ValueError: No labels, groups that do not fit, a NaN or zero vector, no query with a match.
    """
    labels = _labels(query, "query")
    candidates = _most_candidates(query, reference, groups)
    depth = min(DEPTH, candidates)
    ranks = range(1, max(10, depth) + 1)
    if reference is None:
        report = retrieval_report(query.vectors, labels, k=ranks, groups=groups)
        hits = knn_hits(query.vectors, labels, k=knn_k, groups=groups)
    else:
        names = _labels(reference, "reference")
        report = retrieval_report(query.vectors, labels, reference.vectors, names, k=ranks, groups=groups)
        hits = knn_hits(reference.vectors, names, query.vectors, labels, k=knn_k, groups=groups)
    main = ("recall_at_1", "recall_at_5", "recall_at_10", "r_precision", "map_at_r")
    per_query: dict[str, Floats] = {**report.per_query, "knn_accuracy": hits.astype(np.float64)}
    intervals = _rising(intervals_of(per_query, labels), [f"recall_at_{rank}" for rank in ranks])
    result = {name: value for name, value in report.to_dict().items() if name in main or "_at_" not in name}
    curve = [f"recall_at_{rank}" for rank in ranks[:depth]]
    result |= {
        "knn_k": min(knn_k, candidates),
        "knn_accuracy": float(hits.mean()),
        "identities": len(set(labels)),
        "intervals": {name: intervals[name] for name in (*main, "knn_accuracy") if name in intervals},
        "cmc": [report.values[name] for name in curve],
        "cmc_intervals": [intervals[name] for name in curve if name in intervals],
    }
    return result, {name: per_query[name] for name in (*main, "knn_accuracy")}


def _rising(intervals: dict[str, tuple[float, float]], curve: Sequence[str]) -> dict[str, tuple[float, float]]:
    """What a recall is at least, it is at least at every greater depth, however that one's interval was made."""
    least = 0.0
    for name in curve:
        if name in intervals:
            low, high = intervals[name]
            least = max(least, low)
            intervals[name] = (least, high)
    return intervals


def _most_candidates(query: Embeddings, reference: Embeddings | None, groups: Any) -> int:
    """Images that a query can find, of the query that can find most."""
    if groups is None:
        return len(query) - 1 if reference is None else len(reference)
    own, others = (groups, groups) if reference is None else groups
    sizes = Counter(others)
    return len(others) - min(sizes[group] for group in own)


def intervals_of(per_query: Mapping[str, Floats], labels: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Of each figure over identities; none where there are fewer than two.

    Where no resample differs from another, as where all queries are right, it is the score interval of a share over
    identities.
    """
    if not enough(next(iter(per_query.values())), labels):
        return {}
    found = bootstrap_intervals(per_query, labels)
    for name, values in per_query.items():
        counted = ~np.isnan(values)
        share = float(values[counted].mean())
        found[name] = told_interval(found[name], np.asarray(labels)[counted], share=share) or found[name]
    return found


def enough(values: Floats, labels: Sequence[str]) -> bool:
    """Whether there are two identities to resample."""
    return len({label for label, value in zip(labels, values.tolist(), strict=True) if value == value}) > 1


def _coarse(
    column: str, query: Reading, reference: Reading | None, nearest: Ids, per_query: Mapping[str, Floats]
) -> tuple[dict[str, Any], Floats]:
    """Is the nearest at least of the right coarse class? Queries without a match are left out, as in recall@1."""
    sides = {"query": query} | ({} if reference is None else {"reference": reference})
    parents: dict[str, str] = {}
    for name, side in sides.items():
        for label, coarse in zip(
            _labels(side.embeddings, name),
            _column(side.columns, side.embeddings.labels, column, "--coarse"),
            strict=True,
        ):
            if parents.setdefault(label, coarse) != coarse:
                raise ValueError(
                    f"{label!r} is {parents[label]!r} and {coarse!r} in the column {column!r}: --coarse takes one "
                    "coarse class for each label."
                )
    labels = _labels(query.embeddings, "query")
    found = _labels((reference or query).embeddings, "reference")
    counted = ~np.isnan(per_query["recall_at_1"])
    right = np.full(len(labels), np.nan)
    distance = hierarchical_distance([found[row] for row in nearest[:, 0].tolist()], labels, parents)
    right[counted] = distance[counted] <= 1
    report = hierarchical_report(
        [found[row] for row in nearest[counted, 0].tolist()], [labels[row] for row in np.flatnonzero(counted)], parents
    )
    return {
        "column": column,
        "classes": len({parents[label] for label in labels}),
        "recall_at_1": report["coarse_accuracy"],
        "interval": intervals_of({"coarse": right}, labels).get("coarse"),
        "near_misses": None if np.isnan(report["near_misses"]) else report["near_misses"],  # among the mistakes
        "distance": report["distance"],
    }, right


def _verification(query: Embeddings, reference: Embeddings | None, groups: Groups, seed: int) -> Verification | None:
    labels = _labels(query, "query")
    names = None if reference is None else _labels(reference, "reference")
    searched = None if reference is None else reference.vectors
    try:
        pairs = draw_pairs(labels, names, groups=groups, seed=seed)
    except ValueError:  # a set of one class, or of classes of one
        return None
    report = verification_report(query.vectors, labels, searched, names, groups=groups, curve=CURVE)
    scores = pairs.scores(query.vectors, searched)
    enough_pairs = (
        10 if len(pairs.impostors) == pairs.impostors_total else 100
    )  # drawn ones bring a chance of their own
    rates = [far for far in report.far if far * len(pairs.impostors) >= enough_pairs]
    resamples = verification_resamples(pairs, scores, far=rates, resamples=RESAMPLES)
    return Verification(report, pairs, scores, resamples)


def interval_of(resamples: Floats) -> tuple[float, float] | None:
    """The middle 95 % of what resampling gave; None where hardly a resample could be counted, or all gave the same.

    Data without an error show none in any resample, which says nothing of how many there are.
    """
    counted = resamples[~np.isnan(resamples)]
    if len(counted) < 0.9 * len(resamples):
        return None
    low, high = np.quantile(counted, [0.025, 0.975])
    return told_interval((float(low), float(high)), ())


def _health(vectors: Any, seed: int) -> dict[str, Any]:
    rows = len(vectors)
    if rows > HEALTH_ROWS:
        vectors = vectors[np.sort(np.random.default_rng(seed).choice(rows, HEALTH_ROWS, replace=False))]
    return {
        "effective_rank": effective_rank(vectors),
        "feature_std": feature_std(vectors),
        "uniformity": uniformity(vectors) if len(vectors) > 1 else None,
        "hubness": hubness(vectors, k=min(10, len(vectors) - 1)) if len(vectors) > 1 else None,
        "rows": len(vectors),
    }


def evaluate_open_set(
    query: Embeddings,
    strangers: Embeddings,
    reference: Embeddings | None = None,
    *,
    fpir: float,
    templates: int = 3,
    seed: int = 0,
) -> tuple[dict[str, Any], OpenSetReport]:
    """Enroll half of the queries' identities, refuse the other half at a threshold set on further strangers.

    Args:
        query: Probes with labels; without a reference also the templates are taken from here.
        strangers: Images of identities outside the queries; they set the threshold.
        reference: Templates of the enrolled half are all its images here.
        fpir: Promised false-positive identification rate.
        templates: Enrolled images per identity, where there is no reference.
        seed: Of the halves and the templates.

    Returns:
        The figures, and the trial that they are of.

    Raises:
        ValueError: See `trial_roles`; too few strangers for the promise.
    """
    gallery, probing = trial_roles(query, strangers, reference, templates=templates, seed=seed)
    report = open_set_trial(gallery, take(query, probing), strangers, fpir=fpir)
    return trial_figures(report, gallery, seed), report


def trial_figures(report: OpenSetReport, gallery: Embeddings, seed: int) -> dict[str, Any]:
    """What a trial with these templates says in the JSON document."""
    probed = report.probed
    strangers = not probed.known.all()
    return {
        **report.to_dict(),
        "unknown_auroc": unknown_auroc(probed.scores, probed.known) if strangers else None,
        "oscr": oscr(probed.scores, probed.right, probed.known) if strangers else None,
        "seed": seed,
        "templates": len(gallery),
    }


def trial_roles(
    query: Embeddings, strangers: Embeddings, reference: Embeddings | None, *, templates: int, seed: int
) -> tuple[Embeddings, Mask]:
    """The templates of the enrolled half, and which queries are probes; arguments as in `evaluate_open_set`.

    Raises:
        ValueError: No labels, identities that are strangers and queries at once, fewer than two identities, or fewer
            images of one than its templates and a probe.
    """
    labels = _labels(query, "query")
    shared = sorted(set(labels) & set(_labels(strangers, "calibration")))
    if shared:
        raise ValueError(
            f"{len(shared)} identities set the threshold and are tested on it, first {shared[0]!r}: the promise needs "
            "other strangers. Choose disjoint rows by --select and --calibrate-select."
        )
    enrolled, _ = halve_identities(labels, seed=seed)
    if reference is None:
        chosen = choose_templates(labels, enrolled, templates=templates, seed=seed)
        return take(query, chosen), ~chosen
    rows = [row for row, name in enumerate(_labels(reference, "reference")) if name in enrolled]
    return take(reference, rows), np.ones(len(query), dtype=bool)


def _labels(embeddings: Embeddings, name: str) -> list[str]:
    if embeddings.labels is None:
        raise ValueError(
            f"The {name} images have no labels, so nothing can be counted; use a labelled folder or manifest."
        )
    return embeddings.labels


def to_text(found: Sequence[Evaluation]) -> str:
    """The figures as tables for a terminal."""
    rows = {one.name: one.figures for one in found}
    text = table(rows, ["recall_at_1", "recall_at_5", "recall_at_10", "map_at_r", "r_precision", "knn_accuracy"])
    figures = found[0].figures
    if figures["without_match"]:
        text += (
            f"\n{figures['without_match']:,} of {figures['queries']:,} queries have no match to find: left out of "
            "recall, MAP@R and R-precision, mistakes in k-NN"
        )
    pairs = {name: row["verification"] for name, row in rows.items() if row.get("verification")}
    if pairs:
        first = next(iter(pairs.values()))
        rates = [f"tar_at_{far:g}" for far in first["far"]]
        pairs = {name: pair | dict(zip(rates, pair["tar"], strict=True)) for name, pair in pairs.items()}
        text += f"\n\nall {first['genuine']:,} genuine and {first['impostors']:,} impostor pairs\n"
        text += table(pairs, ["auc", "eer", *rates])
    trials = {name: row["open_set"] for name, row in rows.items() if "open_set" in row}
    if trials:
        trial = next(iter(trials.values()))
        text += (
            f"\n\nopen set: {trial['enrolled']} enrolled, {trial['strangers']} strangers, threshold from "
            f"{trial['calibration_strangers']} others at a promised FPIR of {trial['target_fpir']:.3f}\n"
        ) + table(trials, ["closed_set_accuracy", "detection_rate", "observed_fpir"])
    return text


def table(rows: dict[str, dict[str, Any]], columns: list[str]) -> str:
    """Aligned text: one line per row name, one column per figure, the interval behind it."""
    lines = [["", *columns]]
    for name, figures in rows.items():
        cells = [name]
        for column in columns:
            value = figures.get(column)
            found = figures.get("intervals", {}).get(column)
            interval = "" if found is None or np.isnan(found[0]) else f" [{found[0]:.3f}, {found[1]:.3f}]"
            cells.append("-" if value is None else f"{value:.3f}{interval}")
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
