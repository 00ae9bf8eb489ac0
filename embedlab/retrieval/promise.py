"""What a gallery promises about strangers: its scores of them, and the calibration that they support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import numpy as np

from embedlab._types import Ids, Vectors
from embedlab.retrieval.calibration import (
    SMALLEST_TO_GROW,
    Calibration,
    calibrate_threshold,
    match_threshold,
    refuse_growth,
    refuse_if_unsupported,
    rise_with_growth,
)
from embedlab.retrieval.cohort import Cohort
from embedlab.retrieval.scoring import (
    Templates,
    best_identity,
    claimed,
    highest_pairs,
    in_chunks,
    sub_gallery_scores,
)
from embedlab.retrieval.snapshot import Snapshot

MOST_LEFT_OUT = 2_000  # identities that play the stranger


@dataclass(frozen=True)
class Targets:
    """What is to be promised: arguments of `Gallery.calibrate`."""

    fpir: float
    fmr: float
    confidence: float
    growth: float

    def __post_init__(self) -> None:
        for name, rate in (("fpir", self.fpir), ("fmr", self.fmr)):
            if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not 0 < rate < 1:
                raise ValueError(f"{name} lies between 0 and 1, got {rate}; 1 % is 0.01.")
        if isinstance(self.growth, bool) or not isinstance(self.growth, int | float | np.number):
            raise ValueError(f"growth is a number from 1 to 3, identities then over now; got {self.growth!r}.")


@dataclass(frozen=True)
class Strangers:
    """Probes of nobody that is enrolled.

    Args:
        vectors: (N, D) of norm 1.
        names: N names; a None is a stranger of its own.
        own: (N,) identity of each probe that is taken for removed, where the strangers are the enrolled themselves.
    """

    vectors: Vectors
    names: Sequence[str | None]
    own: Ids | None = None


def left_out(now: Templates, seed: int = 0) -> Strangers:
    """The enrolled as strangers, each in a gallery from which it is removed; at most `MOST_LEFT_OUT`, by chance."""
    if now.identities < 2:
        raise ValueError(
            f"leave_identity_out needs at least two enrolled identities, one to play the stranger to the other; this "
            f"gallery has {now.identities}."
        )
    chosen = np.random.default_rng(seed).permutation(now.identities)[:MOST_LEFT_OUT]
    vectors, own = templates_of(now, chosen)
    return Strangers(vectors, [now.names[code] for code in own.tolist()], own)


@singledispatch
def templates_of(now: Any, identities: Ids) -> tuple[Vectors, Ids]:
    """Vectors (N, D) of all templates of these places in `now.names`, and the place of each (N,)."""
    raise NotImplementedError


@templates_of.register
def _(now: Snapshot, identities: Ids) -> tuple[Vectors, Ids]:
    templates = np.flatnonzero(np.isin(now.codes, identities))
    return now.take(templates), now.codes[templates]


def promise(now: Templates, cohort: Cohort | None, strangers: Strangers, targets: Targets) -> Calibration:
    """Both thresholds of a gallery from its scores of strangers; see `Gallery.calibrate`."""
    identities = now.identities
    refuse_growth(targets.growth, identities, now.meta.settings["fusion"])
    probes, names, own = strangers.vectors, strangers.names, strangers.own
    mutual = own is not None
    if isinstance(now, Snapshot) and now.index is not None:
        # Exactly: an index misses the nearest template of a stranger far more often than that of somebody known, and
        # a threshold set on what it finds would be too low for searches without it, or with the next one.
        now = now.indexed(None)
    if own is None:
        scores = best_identity(now, probes, cohort)[1]
    else:
        scores = np.concatenate([part.max(axis=1) for _, part in in_chunks(now, probes, cohort, own)])
    found = calibrate_threshold(scores, names, fpir=targets.fpir, confidence=targets.confidence, mutual=mutual)
    refuse_if_unsupported(found.strangers, found.images, targets.fmr, targets.confidence, mutual=mutual, rate="fmr")
    if identities >= SMALLEST_TO_GROW:
        tables = sub_gallery_scores(now, probes, cohort, own) | {float(identities): scores[:, None]}
        rise, levels = rise_with_growth(
            tables, names, fpir=targets.fpir, growth=targets.growth, confidence=targets.confidence
        )
        if rise:
            found = calibrate_threshold(
                scores, names, fpir=targets.fpir, confidence=targets.confidence, rise=rise, mutual=mutual
            )
        weights = _weights(names)
        sizes = tuple(
            (count, levels[count], float(np.average((table >= found.threshold).mean(axis=1), weights=weights)))
            for count, table in sorted(tables.items())
        )
        found = replace(found, sub_galleries=sizes)
    pairs, shares = highest_pairs(now, probes, cohort, names, targets.fmr, own)
    # No more than there are strangers: best scores that differ do not tell that matches do, see `_hit_correlation`.
    worth = min(found.effective_strangers, found.strangers * (0.5 if mutual else 1.0))
    limit, bound, observed = match_threshold(
        pairs, shares, fmr=targets.fmr, effective=worth, confidence=targets.confidence
    )
    return replace(
        found,
        gallery_identities=identities,
        gallery_templates=len(now),
        verification_threshold=limit,
        fmr=targets.fmr,
        fmr_bound=bound,
        fmr_observed=observed,
        growth=float(targets.growth),
        source="strangers" if own is None else "leave-identity-out",
    )


def with_genuine(
    now: Templates, cohort: Cohort | None, found: Calibration, probes: Vectors, claims: Sequence[str]
) -> Calibration:
    """The calibration with what probes (N, D) of enrolled identities make of it; each identity counts the same."""
    names, truth = np.unique(claims, return_inverse=True)
    best, scores = best_identity(now, probes, cohort)
    right = np.array([name == claim for name, claim in zip(best, claims, strict=True)])
    own = np.empty(len(probes), np.float32)
    for code, name in enumerate(names.tolist()):
        rows = truth == code
        own[rows] = claimed(now, probes[rows], cohort, name)
    weights = 1 / np.bincount(truth)[truth]

    def detected(threshold: float) -> float:
        return float(np.average(right & (scores >= np.float32(threshold)), weights=weights))

    assert found.verification_threshold is not None
    return replace(
        found,
        genuine_images=len(probes),
        detection_rate=detected(found.threshold),
        true_accept_rate=float(np.average(own >= np.float32(found.verification_threshold), weights=weights)),
        curve=tuple((limit, fpir, bound, detected(limit)) for limit, fpir, bound, _ in found.curve),
    )


def _weights(names: Sequence[str | None]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    counts: dict[object, int] = {}
    keys = [("alone", row) if name is None else name for row, name in enumerate(names)]
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return np.array([1 / counts[key] for key in keys])
