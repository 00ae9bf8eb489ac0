"""Scores of probes against templates and identities of a snapshot; exact, in chunks."""

from __future__ import annotations

import numpy as np

from embedlab._types import Ids, Neighbours, Vectors
from embedlab.retrieval.snapshot import Snapshot

CHUNK = 4_000_000  # scores held at once, 16 MB


def neighbours(now: Snapshot, queries: Vectors, k: int, rows: Ids | None = None) -> Neighbours:
    """The k nearest templates of each probe, exactly; only among `rows` where given."""
    vectors, ids, labels = now.vectors, now.ids, now.labels
    if rows is not None:
        vectors, ids, labels = vectors[rows], ids[rows], labels[rows]
    found = min(k, len(ids))
    all_ids = np.full((len(queries), k), -1, dtype=np.int64)
    all_scores = np.full((len(queries), k), np.nan, dtype=np.float32)
    names: list[list[str | None]] = [[None] * k for _ in queries]
    if found and len(queries):
        scores, places = nearest(vectors, queries, found)
        all_ids[:, :found], all_scores[:, :found] = ids[places], scores
        names = [row + [None] * (k - found) for row in labels[places].tolist()]
    return Neighbours(all_ids, names, all_scores)


def nearest(vectors: Vectors, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
    """Exact search: FAISS's kernel for flat indexes, straight on the snapshot's memory, so that there is no copy."""
    import faiss

    scores, places = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    return np.clip(scores, -1, 1), places


def best_identity(now: Snapshot, queries: Vectors) -> tuple[Ids, Vectors]:
    """Best identity (Q,) as a place in `now.names` and its fused score (Q,); -1 and NaN in an empty gallery."""
    if not len(now) or not len(queries):
        return np.full(len(queries), -1, dtype=np.int64), np.full(len(queries), np.nan, np.float32)  # type: ignore[return-value]
    if now.meta.settings["fusion"] == "max":
        scores, places = nearest(now.vectors, queries, 1)
        return now.codes[places[:, 0]], scores[:, 0]
    step = max(1, CHUNK // len(now.names))
    best, top = [], []
    for start in range(0, len(queries), step):
        scores = identity_scores(now, queries[start : start + step])
        best.append(scores.argmax(axis=1))
        top.append(scores.max(axis=1))
    return np.concatenate(best), np.concatenate(top)


def identity_scores(now: Snapshot, queries: Vectors, codes: Ids | None = None) -> Vectors:
    """Fused score of each probe against each identity, (Q, G), or only against those in `codes`."""
    fusion = now.meta.settings["fusion"]
    if fusion == "mean":
        return queries @ now.means[slice(None) if codes is None else codes].T
    if fusion == "vote":
        votes = _votes(now, queries)
        return votes if codes is None else votes[:, codes]
    result = np.empty((len(queries), len(now.names) if codes is None else len(codes)), np.float32)
    ends = np.cumsum(now.templates)
    for column, code in enumerate(range(len(now.names)) if codes is None else codes.tolist()):
        rows = now.by_identity[ends[code] - now.templates[code] : ends[code]]
        result[:, column] = (queries @ now.vectors[rows].T).max(axis=1)
    return np.clip(result, -1, 1)


def _votes(now: Snapshot, queries: Vectors) -> Vectors:
    voters = now.meta.settings["vote_k"]
    scores, places = nearest(now.vectors, queries, min(voters, len(now)))
    votes = np.zeros((len(queries), len(now.names)), np.float32)
    np.add.at(votes, (np.arange(len(queries))[:, None], now.codes[places]), np.maximum(scores, 0) / voters)
    return votes


def highest_pairs(now: Snapshot, probes: Vectors, strangers: list[str | None], fmr: float) -> tuple[Vectors, Vectors]:
    """Highest scores of strangers against all identities with their weights, as `match_threshold` takes them.

    Each stranger has the same weight, shared by its images and their pairs. Only what can lie above the threshold is
    kept: pairs of a total weight of a little over `fmr`.
    """
    sizes: dict[str, int] = {}
    for name in strangers:
        if name is not None:
            sizes[name] = sizes.get(name, 0) + 1
    identities = len(sizes) + strangers.count(None)
    per_image = np.array(
        [1 / (identities * sizes.get(name, 1) if name is not None else identities) for name in strangers]
    )
    kept, weights = np.zeros(0, np.float32), np.zeros(0)
    step = max(1, CHUNK // len(now.names))
    for start in range(0, len(probes), step):
        scores = identity_scores(now, probes[start : start + step])
        share = np.repeat(per_image[start : start + step] / len(now.names), len(now.names))
        kept, weights = np.concatenate([kept, scores.ravel()]), np.concatenate([weights, share])
        order = np.argsort(-kept, kind="stable")
        enough = int(np.searchsorted(np.cumsum(weights[order]), fmr, side="right")) + 1
        kept, weights = kept[order[:enough]], weights[order[:enough]]
    return kept, weights  # type: ignore[return-value]


def genuine_rates(
    now: Snapshot, probes: Vectors, claims: list[str], threshold: float, verification_threshold: float
) -> tuple[float, float]:
    """Share detected as themselves and share accepted as themselves, each the mean over identities."""
    place = {name: code for code, name in enumerate(now.names)}
    truth = np.array([place[name] for name in claims], dtype=np.int64)
    best, scores = best_identity(now, probes)
    detected = (best == truth) & (scores >= np.float32(threshold))
    own = np.array([identity_scores(now, probes[i : i + 1], truth[i : i + 1])[0, 0] for i in range(len(probes))])
    weights = 1 / np.bincount(truth)[truth]
    shares = [
        float(np.average(hits, weights=weights)) for hits in (detected, own >= np.float32(verification_threshold))
    ]
    return shares[0], shares[1]
