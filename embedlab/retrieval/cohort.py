"""Score normalisation: what a score is worth is seen against a fixed cohort of people who are nobody's business."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from embedlab._types import Ids, Vectors
from embedlab.retrieval.snapshot import Snapshot

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

SMALLEST = 20  # vectors in a cohort
SAME = 1 - 1e-6  # cosine above which two vectors are of the same image
BLOCK = 4_000_000  # scores held at once
FLOOR = 1e-6  # least standard deviation, for a cohort of equal vectors


class Cohort:
    """Vectors of others, with which scores are normalised: adaptive s-norm.

    A cosine of 0.6 is a lot for a probe that resembles nobody and little for one that resembles everybody. So a score
    is counted in standard deviations above the mean of the highest scores with a cohort, once from the side of the
    probe and once from that of the template (Matejka et al. 2017, "Analysis of score normalization in multilingual
    speaker recognition", eq. 5, AS-norm1; the symmetric form is by Kenny 2010, the adaptive one by Cumani et al. 2011):

        z(e, t) = ((s(e, t) - mean_e) / deviation_e + (s(e, t) - mean_t) / deviation_t) / 2

    with mean and deviation over the `top` highest scores of e, and of t, with the cohort. The cohort is fixed, and
    nobody in it is enrolled. A normalised score therefore depends on the probe, one template and the cohort only:
    removing an identity never changes a decision on another one.

    Args:
        vectors: (C, D) of norm 1.
        top: Highest scores that count, at most C.
    """

    def __init__(self, vectors: Vectors, top: int) -> None:
        self.vectors, self.top = vectors, top
        self.name = name_of(vectors)
        nothing = np.zeros(0, np.float32)
        self._known: tuple[Ids, Floats, Floats] = (np.zeros(0, np.int64), nothing, nothing)
        self._averages: tuple[Snapshot, Floats, Floats] | None = None

    def statistics(self, vectors: Vectors) -> tuple[Floats, Floats]:
        """Mean and standard deviation (N,) of the highest scores of each vector (N, D) with the cohort."""
        means, deviations = np.empty(len(vectors), np.float32), np.empty(len(vectors), np.float32)
        step = max(1, BLOCK // len(self.vectors))
        for start in range(0, len(vectors), step):
            scores = vectors[start : start + step] @ self.vectors.T
            highest = np.partition(scores, -self.top, axis=1)[:, -self.top :]
            means[start : start + step] = highest.mean(axis=1, dtype=np.float64)
            deviations[start : start + step] = highest.std(axis=1, dtype=np.float64)
        return means, np.maximum(deviations, np.float32(FLOOR))

    def of(self, now: Snapshot) -> tuple[Floats, Floats]:
        """The same (N,) for the templates of a snapshot; computed for those only that are new since the last one."""
        ids, means, deviations = self._known
        if ids is now.ids:
            return means, deviations
        places = np.minimum(np.searchsorted(ids, now.ids), max(len(ids) - 1, 0))
        old = ids[places] == now.ids if len(ids) else np.zeros(len(now), dtype=bool)
        result = (np.empty(len(now), np.float32), np.empty(len(now), np.float32))
        for column, known, new in zip(
            result, (means, deviations), self.statistics(now.take(np.flatnonzero(~old))), strict=True
        ):
            column[old], column[~old] = known[places[old]], new
        self._known = (now.ids, *result)  # in one step: others may be asking
        return result

    def averages(self, now: Snapshot) -> tuple[Floats, Floats]:
        """Per identity the weighted mean of template / deviation (G, D), and of mean / deviation (G,)."""
        if self._averages is None or self._averages[0] is not now:
            means, deviations = self.of(now)
            shifts = np.bincount(now.codes, now.quality * (means / deviations)) / np.bincount(now.codes, now.quality)
            self._averages = (now, now.averages(1 / deviations), shifts.astype(np.float32))
        return self._averages[1:]

    def normalised(self, scores: Vectors, probes: tuple[Floats, Floats], templates: tuple[Floats, Floats]) -> Vectors:
        """Cosines (Q, T) as normalised scores, from the statistics (Q,) of the probes and (T,) of the templates."""
        result: Vectors = (scores - probes[0][:, None]) / probes[1][:, None]
        result += (scores - templates[0]) / templates[1]
        result *= np.float32(0.5)
        return result


def name_of(vectors: Vectors) -> str:
    """Digest by which a gallery knows its cohort."""
    return hashlib.blake2b(np.ascontiguousarray(vectors, "<f4").tobytes(), digest_size=16).hexdigest()


def label_digest(label: str) -> str:
    """A cohort keeps no names, only what tells whether a name is in it."""
    return hashlib.blake2b(label.encode(), digest_size=8).hexdigest()


def as_settings(cohort: Cohort, labels: Iterable[str]) -> dict[str, Any]:
    """What a gallery keeps about its cohort beside the vectors; `labels` are digests by `label_digest`."""
    return {
        "kind": "as-norm",
        "cohort": cohort.name,
        "cohort_k": cohort.top,
        "vectors": len(cohort.vectors),
        "labels": sorted(set(labels)),
    }


def checked_top(cohort_k: Any, count: int) -> int:
    """How many of `count` cohort vectors are looked at."""
    if count < SMALLEST:
        raise ValueError(
            f"A cohort needs at least {SMALLEST} vectors, got {count}: means and deviations of fewer are chance. Some "
            "hundred images of others, one or two of each, are usual."
        )
    if cohort_k is None:
        return min(200, count)
    if isinstance(cohort_k, bool) or not isinstance(cohort_k, int | np.integer) or not 2 <= cohort_k <= count:
        raise ValueError(f"cohort_k is a whole number from 2 to the {count} vectors of the cohort, got {cohort_k!r}.")
    return int(cohort_k)


def refuse_shared(
    cohort: Vectors, settings: dict[str, Any], vectors: Vectors, labels: Iterable[str | None], where: str
) -> None:
    """Raise when images or names of the cohort turn up where they would tell what the cohort must not know.

    Args:
        cohort: (C, D) of norm 1.
        settings: What `as_settings` returned.
        vectors: (N, D) of norm 1, templates or probes.
        labels: Their names; a None is nobody's.
        where: What they are, for the message.
    """
    known = set(settings.get("labels", ()))
    names = [name for name in dict.fromkeys(labels) if known and name is not None and label_digest(name) in known]
    if names:
        raise ValueError(
            f"{len(names)} identities of the cohort are among {where}, first {names[0]!r}; a cohort is of others, so "
            "that nobody's score is measured against himself. Leave them out of one of the two."
        )
    step = max(1, BLOCK // len(cohort))
    for start in range(0, len(vectors), step):
        same = (vectors[start : start + step] @ cohort.T).max(axis=1) >= SAME
        if same.any():
            raise ValueError(
                f"{int(same.sum())} images of the cohort are among {where}, first in row "
                f"{start + int(np.argmax(same))}; a cohort is of others, so that nobody's score is measured against "
                "himself. Leave them out of one of the two."
            )
