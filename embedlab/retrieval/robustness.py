"""`embedlab evaluate --degradations`: the evaluation again with queries taken under bad conditions.

A gallery is made in good conditions and asked in whatever conditions there are, so queries (probes) are degraded, and
the reference, the templates and the strangers that set the threshold stay clean. Leave-one-out keeps to that: the
queries search all other pictures in their clean version, their own left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from embedlab._types import Embeddings
from embedlab.data import Source, open_source
from embedlab.retrieval.evaluation import (
    Evaluation,
    Floats,
    Groups,
    intervals_of,
    retrieval_figures,
    table,
    trial_figures,
    trial_roles,
)
from embedlab.retrieval.open_set import evaluate_gallery, rate_interval, take, trial_gallery
from embedlab.retrieval.subjects import ReadingOptions

if TYPE_CHECKING:
    from embedlab.encoders import Encoder
    from embedlab.retrieval.embedders import OnnxEmbedder

Condition = tuple[str, int]  # kind and severity
CLEAN: Condition = ("clean", 0)
FIGURES = {"recall_at_1": "recall@1", "detection_rate": "detection", "observed_fpir": "observed FPIR"}
_CHUNK = 512  # images that are decoded at a time and degraded in all ways before the next
_HELD = 1 << 29  # bytes of vectors of several conditions; with fewer, images are decoded more often


def embed_degraded(
    encoder: Encoder | OnnxEmbedder,
    source: Source,
    clean: Embeddings,
    *,
    names: Sequence[str] | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 0,
    batch_size: int = 128,
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: bool = True,
) -> Iterator[tuple[Condition, Embeddings]]:
    """Embed images under bad conditions, one after another.

    Images are decoded once for as many conditions as have their vectors in half a gigabyte together.

    Images are degraded as the encoder sees them, decoded, made square and brought to its `image_size`: a severity then
    means the same for a thumbnail and a photograph of twenty megapixels.

    Args:
        encoder: On the device where it computes, or its exported file.
        source: Of the images.
        clean: What the encoder made of them; its ids are rows of the source and choose the random numbers.
        names: Kinds of `DEGRADATIONS`; None is all.
        severities: From 1 to 5.
        seed: Of the random numbers.
        batch_size: Images per forward pass.
        precision: See `Encoder.embed`.
        progress: Show a bar on stderr when it takes longer than a second.

    Yields:
        Each kind and severity, and vectors in the order of `clean`, with its labels, ids and paths.

    Raises:
        ValueError: An unknown kind or severity.
    """
    import torch

    from embedlab.data.degradations import chosen_kinds, chosen_severities, degrade

    conditions = [(name, severity) for name in chosen_kinds(names) for severity in chosen_severities(severities)]
    together = max(1, _HELD // max(1, clean.vectors.nbytes))
    with tqdm(total=len(clean) * len(conditions), desc="degraded", unit="img", delay=1, disable=not progress) as bar:
        for first in range(0, len(conditions), together):
            vectors = {condition: np.empty_like(clean.vectors) for condition in conditions[first : first + together]}
            for start in range(0, len(clean), _CHUNK):
                rows = slice(start, start + _CHUNK)
                ids = clean.ids[rows]
                pixels, _, _ = source.read(ids, encoder.image_size, channels=encoder.channels, how=encoder.fit)
                images, index = torch.from_numpy(pixels), torch.from_numpy(ids)
                for condition in vectors:
                    vectors[condition][rows] = encoder.embed(
                        degrade(images, index, *condition, seed=seed).numpy(),
                        batch_size=batch_size,
                        precision=precision,
                        progress=False,
                    ).vectors
                    bar.update(len(images))
            for condition in list(vectors):  # whoever asks may let go of each before the next
                yield condition, Embeddings(vectors.pop(condition), clean.labels, clean.ids, clean.paths)


def with_degradations(found: Evaluation, how: ReadingOptions) -> Evaluation:
    """An evaluation with what the degradations of its plan make of it, see `evaluate_robustness`.

    `figures` gets `degraded`, and `per_query` each query's mean recall@1 over all conditions and over each kind's, so
    that two encoders can be compared on them.

    Raises:
        ValueError: Vectors without their images and encoder.
    """
    encoder, plan = found.subject.encoder, found.plan
    if encoder is None:
        raise ValueError(f"{plan.path} holds vectors; --degradations needs images to degrade, and --encoder.")
    clean = found.query.embeddings
    degraded = embed_degraded(
        encoder,
        open_source(plan.path, select=plan.select),
        clean,
        names=plan.degradations,
        severities=plan.severities,
        seed=plan.seed,
        batch_size=how.batch_size,
        precision=how.precision,
    )
    report, per_query = evaluate_robustness(
        clean,
        degraded,
        None if found.reference is None else found.reference.embeddings,
        found.subject.read(plan.calibrate or plan.path, plan.calibrate_select).embeddings if plan.open_set else None,
        knn_k=plan.knn_k,
        fpir=plan.fpir,
        templates=plan.templates,
        seed=plan.seed,
        groups=found.groups,
    )
    recalls = {f"recall_at_1 degraded, {name}": values["recall_at_1"] for name, values in per_query.items()}
    return replace(found, figures={**found.figures, "degraded": report}, per_query={**found.per_query, **recalls})


def evaluate_robustness(
    clean: Embeddings,
    degraded: Iterable[tuple[Condition, Embeddings]],
    reference: Embeddings | None = None,
    strangers: Embeddings | None = None,
    *,
    knn_k: int = 20,
    fpir: float = 0.05,
    templates: int = 3,
    seed: int = 0,
    groups: Groups = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Floats]]]:
    """Retrieval and the open-set trial again for every kind and severity, and their means over severities.

    Args:
        clean: The queries in good conditions.
        degraded: Kinds and severities, and the same queries, row by row; see `embed_degraded`. One is held at a time.
        reference: Clean; None is leave-one-out, where a query searches the clean versions of all others.
        strangers: Clean; with them also the open-set trial, whose threshold they set once for all conditions.
        knn_k: See `retrieval_figures`.
        fpir: See `evaluate_open_set`, as for the other two.
        templates: Per identity, of the clean queries where there is no reference; the others are the probes.
        seed: Of the halves and templates.
        groups: See `retrieval_figures`.

    Returns:
        `rows`, the first one clean: `degradation`, `severity`, `strength`, `unit`, and the figures of
        `retrieval_figures`, with `open_set` those of `evaluate_open_set`. `means`: per kind, and over all kinds under
        "all", the mean over its severities; intervals are over identities here too, of each query's or identity's mean.
        And by kind and "all" the retrieval figures' means of each query.
    """
    from embedlab.data.degradations import DEGRADATIONS

    searched = clean if reference is None else reference
    if reference is None:  # the clean version of a query is of its group
        own = list(range(len(clean))) if groups is None else groups
        sides: Any = (own, own)
    else:
        sides = groups
    rows: list[dict[str, Any]] = []
    values: dict[Condition, dict[str, Floats]] = {}
    rates: dict[Condition, dict[str, Floats]] = {}
    if strangers is not None:
        gallery, probing = trial_roles(clean, strangers, reference, templates=templates, seed=seed)
    with nullcontext() if strangers is None else trial_gallery(gallery, strangers, fpir=fpir) as trial:
        for condition, query in chain([(CLEAN, clean)], degraded):
            name, severity = condition
            figures, values[condition] = retrieval_figures(query, searched, knn_k=knn_k, groups=sides)
            kind = DEGRADATIONS.get(name)
            strength = {"strength": kind.strengths[severity - 1], "unit": kind.unit} if kind else {}
            rows.append({"degradation": name, "severity": severity, **strength, **figures})
            if trial is not None:
                report = evaluate_gallery(trial, take(query, probing))
                rates[condition] = report.probed.rates
                rows[-1]["open_set"] = trial_figures(report, gallery, seed)
            del query  # before the next is made
    per_query = _averaged(values)
    means: dict[str, dict[str, Any]] = {
        group: {name: float(np.nanmean(each)) for name, each in found.items()}
        | {"intervals": intervals_of(found, clean.labels or [])}
        for group, found in per_query.items()
    }
    for group, found in (_averaged(rates) if rates else {}).items():
        means[group]["open_set"] = {name: float(each.mean()) for name, each in found.items()} | {
            "intervals": {name: rate_interval(each) for name, each in found.items()}
        }
    return {"rows": rows, "means": means}, per_query


def _averaged(values: Mapping[Condition, Mapping[str, Floats]]) -> dict[str, dict[str, Floats]]:
    """Each query's, or identity's, mean over the bad conditions of each kind, and over all."""
    groups: dict[str, list[Condition]] = {}
    conditions = [condition for condition in values if condition != CLEAN]
    for condition in conditions:
        groups.setdefault(condition[0], []).append(condition)
    groups["all"] = conditions
    return {
        group: {
            name: np.mean([values[member][name] for member in members], axis=0)  # NaN: a query without a match
            for name in values[CLEAN]
        }
        for group, members in groups.items()
    }


def robustness_text(found: Sequence[Evaluation]) -> str:
    """Tables for a terminal: one for each subject and figure, kinds down, severities across, and their mean."""
    return "\n\n".join(f"--- {one.name}, degraded queries ---\n{_tables(one.figures['degraded'])}" for one in found)


def _tables(report: Mapping[str, Any]) -> str:
    severities = sorted({row["severity"] for row in report["rows"] if row["severity"]})
    parts = []
    for figure, title in FIGURES.items():
        found = {
            (row["degradation"], row["severity"]): value
            for row in report["rows"]
            if (value := figure_of(row, figure)) is not None
        }
        if not found:
            continue
        lines: dict[str, dict[str, Any]] = {}
        for name, mean in report["means"].items():
            value, interval = mean_of(mean, figure)
            lines[name] = {str(severity): found.get((name, severity)) for severity in severities}
            lines[name] |= {"mean": value, "intervals": {"mean": interval or (np.nan, np.nan)}}
        columns = [str(severity) for severity in severities] + ["mean"]
        parts.append(f"{title}, clean {found[CLEAN]:.3f}; by severity\n" + table(lines, columns))
    return "\n\n".join(parts)


def figure_of(row: Mapping[str, Any], name: str) -> float | None:
    """One figure of a row, of the retrieval or of the open-set trial."""
    value = row.get(name, row.get("open_set", {}).get(name))
    return None if value is None else float(value)


def mean_of(mean: Mapping[str, Any], name: str) -> tuple[float | None, tuple[float, float] | None]:
    """One figure of a mean, of the retrieval or of the open-set trial, and its interval."""
    side = mean if name in mean else mean.get("open_set", {"intervals": {}})
    return side.get(name), side["intervals"].get(name)
