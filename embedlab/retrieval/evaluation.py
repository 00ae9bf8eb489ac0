"""`embedlab evaluate`: embeddings to figures with intervals over identities and the protocol that made them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from embedlab._machine import processor_name, versions
from embedlab._types import Embeddings
from embedlab.data.images import available_cores
from embedlab.metrics import bootstrap_interval, knn_accuracy, retrieval_report
from embedlab.retrieval.open_set import Mask, choose_templates, halve_identities, open_set_trial, take
from embedlab.retrieval.subjects import Reading, Subject, Where

Values = np.ndarray[tuple[int], np.dtype[np.float64]]


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
        calibrate_select: Rows of `path` that set its threshold.
        knn_k: Neighbours of the weighted k-NN classifier.
        fpir: Promised false-positive identification rate of the trial.
        templates: Enrolled images per identity in the trial, without a reference.
        seed: Of all that is drawn.
        degradations: Bad conditions under which the queries are measured again, see `embedlab.data.DEGRADATIONS`.
        severities: Of the degradations, from 1 to 5.

    Raises:
        ValueError: An open-set trial without rows for its threshold, an unknown degradation or severity.
    """

    path: str
    select: Where | None = None
    reference: str | None = None
    reference_select: Where | None = None
    open_set: bool = False
    calibrate_select: Where | None = None
    knn_k: int = 20
    fpir: float = 0.05
    templates: int = 3
    seed: int = 0
    degradations: Sequence[str] = ()
    severities: Sequence[int] = (1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        if self.open_set and not self.calibrate_select:
            raise ValueError(
                "--open-set needs --calibrate-select COLUMN=VALUE: identities, not tested, that set the threshold."
            )
        if self.degradations:
            from embedlab.data.degradations import chosen_kinds, chosen_severities  # not before it is needed: torch

            chosen_kinds(self.degradations)  # an error now, not after the work
            chosen_severities(self.severities)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One subject on one plan.

    Args:
        subject: What was measured.
        query: What was read for the queries.
        reference: What was searched; None is leave-one-out.
        figures: Of the JSON document.
    """

    subject: Subject
    query: Reading
    reference: Reading | None
    figures: dict[str, Any]


def evaluate(subject: Subject, plan: Plan) -> Evaluation:
    """Read what the plan names and measure the subject on it.

    Raises:
        ValueError: Images without labels, or images that are queries and reference at once.
    """
    query = subject.read(plan.path, plan.select)
    searched = plan.reference or (plan.path if plan.reference_select else None)
    reference = None if searched is None else subject.read(searched, plan.reference_select)
    others = None if reference is None else reference.embeddings
    _refuse_shared_images(query.embeddings, others)
    figures = evaluate_retrieval(query.embeddings, others, knn_k=plan.knn_k)
    if plan.open_set:
        strangers = subject.read(plan.path, plan.calibrate_select).embeddings
        figures["open_set"] = evaluate_open_set(
            query.embeddings, strangers, others, fpir=plan.fpir, templates=plan.templates, seed=plan.seed
        )
    return Evaluation(subject, query, reference, figures)


def protocol_of(plan: Plan, found: Sequence[Evaluation]) -> dict[str, Any]:
    """How the figures were made, so that somebody else can make them again."""
    first = found[0]
    sides = {"query": first.query} | ({} if first.reference is None else {"reference": first.reference})
    return {
        **asdict(plan),
        "mode": "leave-one-out" if first.reference is None else "query against reference",
        "subjects": {one.subject.name: dict(one.subject.about) for one in found},
        "data": {name: _counted(side) for name, side in sides.items()},
        "intervals": "95 %, percentile bootstrap over identities (labels of the queries), 2000 resamples, seed 0",
        "versions": versions("torch", "numpy", "faiss-cpu", "scikit-learn"),
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
    }


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


def evaluate_retrieval(query: Embeddings, reference: Embeddings | None = None, *, knn_k: int = 20) -> dict[str, Any]:
    """Recall@1/5/10, R-precision, MAP@R and weighted k-NN accuracy.

    Args:
        query: With labels.
        reference: With labels; None is leave-one-out within the queries.
        knn_k: Neighbours of the k-NN classifier, at most as many as the reference has.

    Returns:
        The figures; `intervals` are 95 %, by resampling identities.
    """
    return retrieval_figures(query, reference, knn_k=knn_k)[0]


def retrieval_figures(
    query: Embeddings, reference: Embeddings | None = None, *, knn_k: int = 20, same_rows: bool = False
) -> tuple[dict[str, Any], dict[str, Values]]:
    """As `evaluate_retrieval`, with each figure's values per query.

    Args:
        query: See `evaluate_retrieval`.
        reference: See `evaluate_retrieval`.
        knn_k: See `evaluate_retrieval`.
        same_rows: Row i of query and reference is the same picture, seen under other conditions: leave-one-out.
    """
    labels = _labels(query, "query")
    others = (None, None) if reference is None else (reference.vectors, _labels(reference, "reference"))
    numbers = np.arange(len(query))
    report = retrieval_report(query.vectors, labels, *others, groups=(numbers, numbers) if same_rows else None)
    result = report.to_dict()
    if reference is None:
        result["knn_k"] = min(knn_k, len(query) - 1)
        result["knn_accuracy"] = knn_accuracy(query.vectors, labels, k=knn_k)
    else:
        result["knn_k"] = min(knn_k, len(reference) - same_rows)
        result["knn_accuracy"] = knn_accuracy(
            reference.vectors, others[1], query.vectors, labels, k=knn_k, same_rows=same_rows
        )
    result["identities"] = len(set(labels))
    result["intervals"] = {
        name: bootstrap_interval(values, labels) for name, values in report.per_query.items() if len(set(labels)) > 1
    }
    return result, report.per_query


def evaluate_open_set(
    query: Embeddings,
    strangers: Embeddings,
    reference: Embeddings | None = None,
    *,
    fpir: float,
    templates: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Enroll half of the queries' identities, refuse the other half at a threshold set on further strangers.

    Args:
        query: Probes with labels; without a reference also the templates are taken from here.
        strangers: Images of identities outside the queries; they set the threshold.
        reference: Templates of the enrolled half are all its images here.
        fpir: Promised false-positive identification rate.
        templates: Enrolled images per identity, where there is no reference.
        seed: Of the halves and the templates.
    """
    gallery, probing = trial_roles(query, strangers, reference, templates=templates, seed=seed)
    trial = open_set_trial(gallery, take(query, probing), strangers, fpir=fpir)
    return {**trial.to_dict(), "seed": seed, "templates": len(gallery)}


def trial_roles(
    query: Embeddings, strangers: Embeddings, reference: Embeddings | None, *, templates: int, seed: int
) -> tuple[Embeddings, Mask]:
    """The templates of the enrolled half, and which queries are probes; arguments as in `evaluate_open_set`."""
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
    rows = {one.subject.name: one.figures for one in found}
    text = table(rows, ["recall_at_1", "recall_at_5", "recall_at_10", "map_at_r", "r_precision", "knn_accuracy"])
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
            low, high = figures.get("intervals", {}).get(column, (np.nan, np.nan))
            interval = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
            cells.append("-" if value is None else f"{value:.3f}{interval}")
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
