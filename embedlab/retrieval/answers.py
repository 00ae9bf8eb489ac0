"""What a gallery answers: records that JSON knows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from embedlab._types import Neighbours


@dataclass(frozen=True, eq=False)
class Identification:
    """Who one probe is.

    Args:
        label: The identity, or None for unknown (and always before calibration).
        score: Fused (and normalised) score of the best identity, NaN in an empty gallery.
        threshold: What the score had to reach; None before calibration.
        calibrated: Whether the gallery has a threshold. False means that `label` None is no decision.
        neighbours: The nearest templates by cosine, one row, nearest first.
        best: The identity that `score` belongs to, accepted or not; None in an empty gallery.
        verified: Whether all templates had been compared with their digests by then; see `Gallery.open`.
        stale: Whether the gallery has outgrown its calibration, so that strangers are let in more often than promised.
    """

    label: str | None
    score: float
    threshold: float | None
    calibrated: bool
    neighbours: Neighbours
    best: str | None
    verified: bool = True
    stale: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it; neighbours as a list of id, label and score."""
        near = zip(
            self.neighbours.ids[0].tolist(), self.neighbours.labels[0], self.neighbours.scores[0].tolist(), strict=True
        )
        return {
            "label": self.label,
            "best": self.best,
            "score": _number(self.score),
            "threshold": self.threshold,
            "calibrated": self.calibrated,
            "verified": self.verified,
            "stale": self.stale,
            "neighbours": [{"id": key, "label": label, "score": score} for key, label, score in near if key >= 0],
        }


@dataclass(frozen=True)
class Verification:
    """Whether a probe is who it claims to be.

    Args:
        accepted: The answer; None before calibration.
        score: Fused score against the claimed identity.
        threshold: What the score had to reach; None before calibration.
        label: The claim.
        stale: Whether the gallery has outgrown its calibration.
    """

    accepted: bool | None
    score: float
    threshold: float | None
    label: str
    stale: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        return asdict(self)


@dataclass(frozen=True)
class CheckReport:
    """What a full check found.

    Args:
        templates: Templates whose digest fits.
        generation: Of the gallery that was checked.
        problems: What does not fit; empty in a healthy gallery.
    """

    templates: int
    generation: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        return asdict(self) | {"problems": list(self.problems), "ok": self.ok}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
