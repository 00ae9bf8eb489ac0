"""The open-set trial: enroll some identities, refuse strangers, and count both kinds of error on probes with names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedlab._types import Embeddings
from embedlab.metrics import bootstrap_interval, told_interval
from embedlab.retrieval.gallery import Gallery

Interval = tuple[float, float]
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]
Rates = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Probed:
    """What a gallery said of each probe, and the rates of each identity.

    Args:
        scores: (N,) best score.
        right: (N,) whether the best identity is the probe's own.
        known: (N,) whether the probe's identity is enrolled.
        rates: The rates of `OpenSetReport` by name, identity by identity in sorted order.
    """

    scores: np.ndarray[Any, np.dtype[np.float64]]
    right: Mask
    known: Mask
    rates: dict[str, Rates]


@dataclass(frozen=True)
class OpenSetReport:
    """What a calibrated gallery did with probes whose names are known.

    Rates are means over identities, so that each counts once; intervals are 95 %, by resampling identities.

    Args:
        closed_set_accuracy: Share of enrolled people's probes whose best identity is right, the threshold left aside.
        detection_rate: Share of them that is also accepted (detection and identification rate).
        observed_fpir: Share of strangers' probes that is taken for somebody enrolled; None without strangers.
        target_fpir: What the gallery was calibrated to promise.
        threshold: Of the gallery.
        bound: The calibration's upper confidence bound of the FPIR.
        intervals: The three rates' intervals.
        enrolled: Enrolled identities; probes of them: `genuine_probes`.
        genuine_probes: See enrolled.
        strangers: Stranger identities; probes of them: `stranger_probes`.
        stranger_probes: See strangers.
        calibration_strangers: Identities that set the threshold.
        probed: Probe by probe, for pictures and paired differences.
    """

    closed_set_accuracy: float
    detection_rate: float
    observed_fpir: float | None
    target_fpir: float
    threshold: float
    bound: float
    intervals: dict[str, Interval]
    enrolled: int
    genuine_probes: int
    strangers: int
    stranger_probes: int
    calibration_strangers: int
    probed: Probed = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON knows them."""
        return {name: value for name, value in asdict(self).items() if name != "probed"}


def halve_identities(labels: Sequence[str], *, seed: int = 0) -> tuple[set[str], set[str]]:
    """Share identities at random into those to enroll and strangers; a function of the names and the seed.

    Raises:
        ValueError: Fewer than two identities.
    """
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(
            f"An open-set trial needs at least 2 identities, to enroll one and refuse one; got {len(names)}."
        )
    order = np.random.default_rng([seed, len(names)]).permutation(len(names))
    half = (len(names) + 1) // 2
    return {names[number] for number in order[:half]}, {names[number] for number in order[half:]}


def choose_templates(labels: Sequence[str], enrolled: set[str], *, templates: int, seed: int = 0) -> Mask:
    """Mark `templates` random images of every enrolled identity; the others stay as probes.

    Raises:
        ValueError: An identity has no image left to probe with.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    names = np.asarray(labels, dtype=object)
    order = np.random.default_rng([seed, templates]).permutation(len(names))
    for name in sorted(enrolled):
        rows = order[names[order] == name]
        if len(rows) <= templates:
            raise ValueError(
                f"{name!r} has {len(rows)} images: {templates} templates leave none to probe with; enroll fewer."
            )
        chosen[rows[:templates]] = True
    return chosen


def evaluate_gallery(gallery: Gallery, probes: Embeddings) -> OpenSetReport:
    """Identify probes whose names are known; a name that is not enrolled is a stranger.

    Raises:
        ValueError: An uncalibrated gallery, probes without labels, or none of anybody enrolled.
    """
    calibration = gallery.calibration
    if calibration is None:
        raise ValueError("The gallery is not calibrated, so it accepts nobody; run calibrate with strangers first.")
    if probes.labels is None:
        raise ValueError("Counting right and wrong needs the probes' labels; identify works without.")
    names = set(gallery.labels())
    labels = np.asarray(probes.labels, dtype=object)
    known = np.array([label in names for label in probes.labels], dtype=bool)
    if not known.any():
        raise ValueError(
            "None of the probes' labels is enrolled: is this another data set, or are labels spelt otherwise?"
        )
    answers = gallery.identify(embeddings=probes.vectors, k=1)
    accepted = np.array([answer.label is not None for answer in answers])
    right = np.array([answer.best == label for answer, label in zip(answers, probes.labels, strict=True)])
    values = {"closed_set_accuracy": right[known], "detection_rate": (right & accepted)[known]}
    rates = {name: _per_identity(value, labels[known]) for name, value in values.items()}
    if not known.all():
        rates["observed_fpir"] = _per_identity(accepted[~known], labels[~known])
    means = {name: float(rate.mean()) for name, rate in rates.items()}
    return OpenSetReport(
        closed_set_accuracy=means["closed_set_accuracy"],
        detection_rate=means["detection_rate"],
        observed_fpir=means.get("observed_fpir"),
        target_fpir=calibration.fpir,
        threshold=calibration.threshold,
        bound=calibration.bound,
        intervals={name: rate_interval(rate) for name, rate in rates.items()},
        enrolled=len(names),
        genuine_probes=int(known.sum()),
        strangers=len(set(labels[~known])),
        stranger_probes=int((~known).sum()),
        calibration_strangers=calibration.strangers,
        probed=Probed(np.array([answer.score for answer in answers], dtype=np.float64), right, known, rates),
    )


def open_set_trial(
    enroll: Embeddings, probes: Embeddings, strangers: Embeddings, *, fpir: float, fusion: str = "max"
) -> OpenSetReport:
    """Build a gallery in a temporary folder, calibrate it on strangers, and evaluate it on probes.

    Args:
        enroll: Templates with labels.
        probes: Of enrolled identities and of others, with labels.
        strangers: Of identities that are neither enrolled nor among the probes; they set the threshold.
        fpir: Target false-positive identification rate.
        fusion: See `Gallery.create`.
    """
    with trial_gallery(enroll, strangers, fpir=fpir, fusion=fusion) as gallery:
        return evaluate_gallery(gallery, probes)


@contextmanager
def trial_gallery(enroll: Embeddings, strangers: Embeddings, *, fpir: float, fusion: str = "max") -> Iterator[Gallery]:
    """A calibrated gallery that is gone afterwards; arguments as in `open_set_trial`."""
    with (
        tempfile.TemporaryDirectory(prefix="embedlab-") as place,
        Gallery.create(Path(place) / "gallery", dim=enroll.vectors.shape[1], fusion=fusion) as gallery,
    ):
        gallery.enroll(embeddings=enroll)
        gallery.calibrate(embeddings=strangers, fpir=fpir)
        yield gallery


def take(embeddings: Embeddings, rows: Mask | Sequence[int]) -> Embeddings:
    """Rows of embeddings, by mask or number."""
    chosen = np.arange(len(embeddings))[rows]
    return Embeddings(
        embeddings.vectors[chosen],
        None if embeddings.labels is None else [embeddings.labels[row] for row in chosen],
        embeddings.ids[chosen],
        None if embeddings.paths is None else [embeddings.paths[row] for row in chosen],
    )


def _per_identity(values: Any, labels: Any) -> Rates:
    codes = np.unique(labels.astype(str), return_inverse=True)[1]
    means: Rates = np.bincount(codes, weights=values) / np.bincount(codes)
    return means


def rate_interval(rates: Any) -> Interval:
    """Over identities; where no draw differs from another, as of one alone, the score interval of a share."""
    identities, share = np.arange(len(rates)), float(rates.mean())
    drawn = bootstrap_interval(rates, identities) if len(rates) > 1 else (share, share)
    found = told_interval(drawn, identities, share=share)
    assert found is not None  # of a share there always is one
    return found
