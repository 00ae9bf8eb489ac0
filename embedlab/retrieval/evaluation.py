"""`embedlab evaluate`: embeddings to figures with intervals over identities and the protocol that made them."""

from __future__ import annotations

from typing import Any

import numpy as np

from embedlab._types import Embeddings
from embedlab.metrics import bootstrap_interval, knn_accuracy, retrieval_report
from embedlab.retrieval.open_set import choose_templates, halve_identities, open_set_trial, take


def evaluate_retrieval(query: Embeddings, reference: Embeddings | None = None, *, knn_k: int = 20) -> dict[str, Any]:
    """Recall@1/5/10, R-precision, MAP@R and weighted k-NN accuracy.

    Args:
        query: With labels.
        reference: With labels; None is leave-one-out within the queries.
        knn_k: Neighbours of the k-NN classifier, at most as many as the reference has.

    Returns:
        The figures; `intervals` are 95 %, by resampling identities.
    """
    labels = _labels(query, "query")
    others = (None, None) if reference is None else (reference.vectors, _labels(reference, "reference"))
    report = retrieval_report(query.vectors, labels, *others)
    result = report.to_dict()
    if reference is None:
        result["knn_k"] = min(knn_k, len(query) - 1)
        result["knn_accuracy"] = knn_accuracy(query.vectors, labels, k=knn_k)
    else:
        result["knn_k"] = min(knn_k, len(reference))
        result["knn_accuracy"] = knn_accuracy(reference.vectors, others[1], query.vectors, labels, k=knn_k)
    result["identities"] = len(set(labels))
    result["intervals"] = {
        name: bootstrap_interval(values, labels) for name, values in report.per_query.items() if len(set(labels)) > 1
    }
    return result


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
        gallery, probes = take(query, chosen), take(query, ~chosen)
    else:
        gallery = take(reference, [row for row, name in enumerate(_labels(reference, "reference")) if name in enrolled])
        probes = query
    return {**open_set_trial(gallery, probes, strangers, fpir=fpir).to_dict(), "seed": seed, "templates": len(gallery)}


def _labels(embeddings: Embeddings, name: str) -> list[str]:
    if embeddings.labels is None:
        raise ValueError(
            f"The {name} images have no labels, so nothing can be counted; use a labelled folder or manifest."
        )
    return embeddings.labels


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
