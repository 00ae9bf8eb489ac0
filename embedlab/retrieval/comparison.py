"""Two encoders on the same images: differences with paired intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embedlab.metrics import bootstrap_interval, bootstrap_intervals, told_interval
from embedlab.retrieval.evaluation import Evaluation, Verification, enough, interval_of
from embedlab.retrieval.subjects import Reading

VERDICT = 20  # identities at least: of fewer, resampling finds intervals that are too short
TOO_FEW = f"Over fewer than {VERDICT} identities intervals are too short, and neither is called better."
LOWER_IS_BETTER = frozenset({"eer", "observed_fpir"})


def compare(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """Two subjects on the same images: differences first - second, with paired intervals over the same identities.

    Returns:
        `figures`: name to first, second, difference, interval (95 %; None where no draw differs from another),
        `identities`: over how many, and `better`: the name of the one that is better where the interval leaves out 0,
        and None elsewhere or with fewer than `VERDICT` identities.

    Raises:
        ValueError: Not the same images, by path or else by id, in the same order.
    """
    _require_same_images(first, second)
    pairs: dict[str, tuple[float, float, tuple[float, float] | None, int]] = {}
    found = first.per_query["recall_at_1"]  # identities without a match have no say in it, nor in the pairs
    identities = len({label for label, value in zip(first.labels, found.tolist(), strict=True) if value == value})
    both = {name: (first.per_query[name], second.per_query[name]) for name in first.per_query}
    if enough(first.per_query["recall_at_1"], first.labels):
        differences = {name: one - other for name, (one, other) in both.items()}
        for name, interval in bootstrap_intervals(differences, first.labels).items():
            one, other = (float(np.nanmean(side)) for side in both[name])
            pairs[name] = (one, other, told_interval(interval, ()), identities)
    if first.verification and second.verification:
        exact = [_verification_values(one.verification) for one in (first, second) if one.verification]
        for name, values in first.verification.resamples.items():
            interval_here = interval_of(values - second.verification.resamples[name])
            pairs[name] = (exact[0][name], exact[1][name], interval_here, identities)
    if first.open_set and second.open_set:
        for name, rates in first.open_set.probed.rates.items():
            others = second.open_set.probed.rates[name]
            drawn = bootstrap_interval(rates - others, np.arange(len(rates))) if len(rates) > 1 else None
            interval_here = None if drawn is None else told_interval(drawn, ())
            pairs[name] = (float(rates.mean()), float(others.mean()), interval_here, len(rates))
    return {
        "first": first.name,
        "second": second.name,
        "figures": {
            name: {
                "first": one,
                "second": other,
                "difference": one - other,
                "interval": interval,
                "identities": count,
                "better": _better(name, interval, (first.name, second.name)) if count >= VERDICT else None,
            }
            for name, (one, other, interval, count) in pairs.items()
        },
    }


def _better(name: str, interval: tuple[float, float] | None, names: tuple[str, str]) -> str | None:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return None
    return names[int((interval[0] > 0) == (name in LOWER_IS_BETTER))]


def _verification_values(found: Verification) -> dict[str, float]:
    report = found.report
    rates = {f"tar_at_{far:g}": tar for far, tar in zip(report.far, report.tar, strict=True)}
    return {"auc": report.auc, "eer": report.eer, **rates}


def _require_same_images(first: Evaluation, second: Evaluation) -> None:
    sides: list[tuple[str, Callable[[Evaluation], Reading]]] = [
        ("queries", lambda one: one.query),
        ("reference images", lambda one: one.searched),
    ]
    for what, side in sides:
        ours, theirs = side(first).embeddings, side(second).embeddings
        named = ours.paths is not None and theirs.paths is not None
        same = ours.paths == theirs.paths if named else np.array_equal(ours.ids, theirs.ids)
        if ours.labels != theirs.labels or not same:
            paths = zip(ours.paths or [], theirs.paths or [], strict=False)
            other = next((f": {one} and {two} are the first that differ" for one, two in paths if one != two), "")
            raise ValueError(
                f"{first.name} and {second.name} were not given the same {what} in the same order ({len(ours)} and "
                f"{len(theirs)} images), which a paired comparison needs{other}. Were some skipped, is it other data, "
                "or a copy in another folder?"
            )


def any_too_few(found: Mapping[str, Any]) -> bool:
    """Whether a figure is over too few identities for a verdict."""
    return any(row["identities"] < VERDICT for row in found["figures"].values())


def to_text(found: dict[str, Any]) -> str:
    """The differences as lines for a terminal."""
    width = 2 + max(map(len, found["figures"]), default=0)
    lines = [f"{found['first']} - {found['second']}, paired over the same identities"]
    for name, row in found["figures"].items():
        interval = "" if row["interval"] is None else " [{:+.4f}, {:+.4f}]".format(*row["interval"])
        verdict = f"  {row['better']} is better" if row["better"] else ""
        lines.append(f"{name:{width}}{row['difference']:+.4f}{interval}{verdict}")
    if any_too_few(found):
        lines.append(TOO_FEW)
    return "\n".join(lines)
