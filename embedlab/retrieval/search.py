"""Nearest rows of a table of vectors: exact, or by an index whose losses have been measured.

An index only proposes candidates. What is returned was scored exactly against the vectors themselves, so that an
approximate search may miss a neighbour but never gives a wrong score, and never a template that is gone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedlab._types import Ids, Vectors

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]
Kind = Literal["ivf", "hnsw"]
AUTO_KINDS: tuple[Kind, ...] = ("ivf", "hnsw")  # cells first: smaller, and built ten times as fast
BLOCK = 65_536  # rows copied, scored or added at once
TRAINED_ON = 65_536  # rows that codes are learned from
PROBES = 4_000  # of the gallery's own vectors, to measure what an index misses
MOST_NEIGHBOURS = 100  # an index is not asked for more: nobody has measured what it would miss
DEPTHS = (64, 256, 1024)  # candidates that are scored exactly
CODE_COST = 0.1  # of looking at a code, against scoring a candidate exactly; only orders what is tried
HNSW_LINKS = 14  # with codes of a byte a number: 1.7 times the vectors in all, at 128 numbers
KMEANS_ROUNDS = 10


def _library() -> Any:
    """FAISS, on first use; its stubs know only a part of it."""
    import faiss

    return faiss


class Cancelled(Exception):
    """Whoever wanted an index has gone."""


def flat(
    matrix: Vectors, queries: Vectors, k: int, *, alive: Mask | None = None, rows: Ids | None = None
) -> tuple[Vectors, Ids]:
    """Inner products (Q, k) of the k nearest rows and their numbers, exactly.

    FAISS's kernel of flat indexes runs straight on `matrix`, so that there is no second table.

    Args:
        matrix: (M, D) float32.
        queries: (Q, D) float32.
        k: At most how many rows there are to choose from.
        alive: (M,) rows to choose from; None for all.
        rows: Or their numbers, rising; these are gathered in blocks.
    """
    faiss = _library()
    if rows is not None:
        return _gathered(matrix, queries, k, rows)
    if alive is None:
        scores, found = faiss.knn(queries, matrix, k, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, found
    gone = len(alive) - int(alive.sum())
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    todo, more = np.arange(len(queries)), min(gone, k + 16)
    while len(todo) and more < 8 * k + 64:  # enough rows beyond k, until k of them are alive
        near, places = faiss.knn(queries[todo], matrix, k + more, metric=faiss.METRIC_INNER_PRODUCT)
        near[~alive[places]] = -np.inf
        near, places = _highest(near, places, k)
        whole = np.isfinite(near[:, -1])
        scores[todo[whole]], found[todo[whole]] = near[whole], places[whole]
        todo = todo[~whole]
        if more == gone:
            break
        more = min(gone, 4 * more)
    if len(todo):
        scores[todo], found[todo] = _gathered(matrix, queries[todo], k, np.flatnonzero(alive))
    return scores, found


def _gathered(matrix: Vectors, queries: Vectors, k: int, rows: Ids) -> tuple[Vectors, Ids]:
    faiss = _library()
    scores: Vectors = np.zeros((len(queries), 0), np.float32)
    found: Ids = np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        near, places = faiss.knn(queries, matrix[block], min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, found = _highest(np.hstack([scores, near]), np.hstack([found, block[places]]), k)
    return scores, found


def _highest(scores: Vectors, rows: Ids, k: int) -> tuple[Vectors, Ids]:
    """The k highest of each row in falling order."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


@dataclass(frozen=True)
class Measured:
    """What an index was found to miss, on the gallery's own vectors.

    Args:
        kind: "ivf" or "hnsw".
        effort: Cells visited (ivf) or candidates kept while walking the graph (hnsw).
        depth: Candidates that are scored exactly.
        decisions: Share of the probes that are decided (this identity, or unknown) as by exact search, at the threshold
            at which most are not.
        recall_at_10: Share of their exact ten nearest that was found.
        probes: How many were asked.
        templates: In the index.
    """

    kind: Kind
    effort: int
    depth: int
    decisions: float
    recall_at_10: float
    probes: int
    templates: int

    def meets(self, recall: float) -> bool:
        """Whether a target is met; that the worst threshold counts is the margin for the probes being a sample."""
        return self.decisions >= recall


@dataclass(frozen=True, eq=False)
class Index:
    """Candidates for the nearest templates, by id; newer ones are searched exactly, those that are gone are skipped.

    Args:
        faiss: A FAISS index that answers with ids of templates.
        last_id: Templates above this id are not in it.
        measured: What it misses.
    """

    faiss: Any
    last_id: int
    measured: Measured

    @classmethod
    def build(
        cls,
        kind: Kind,
        ids: Ids,
        matrix: Vectors,
        codes: Ids,
        *,
        rows: Ids,
        recall: float,
        thorough: bool = True,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Index:
        """Build an index and choose the least effort that meets a target, or the most where none does.

        What it misses is measured with up to `PROBES` of the templates. One whose identity has others is itself held
        out: a new picture of somebody known. One that stands alone is disturbed as far as templates of one identity
        lie apart in this gallery.

        Args:
            kind: "ivf": cells, with product codes of four bits for two numbers (eight bits a number where vectors have
                an odd length). "hnsw": a graph on codes of eight bits a number.
            ids: (M,) of the rows, rising.
            matrix: (M, D) of norm 1.
            codes: (M,) identities of the rows.
            rows: (N,) which rows to index, rising.
            recall: Share of the probes that must be decided as by exact search, see `Measured`.
            thorough: Whether to visit up to half of all cells for it; else a sixteenth, where cells beat a graph.
            cancelled: Asked often; `Cancelled` is raised when it says yes.
        """
        made = _cells(matrix, rows, cancelled) if kind == "ivf" else _graph(matrix, rows)
        for start in range(0, len(rows), BLOCK):
            _stop_if(cancelled())
            block = rows[start : start + BLOCK]
            made.add_with_ids(matrix[block], ids[block])
        probes, held = _probes(matrix, codes, rows)
        alive = None
        if len(rows) < len(matrix):
            alive = np.zeros(len(matrix), dtype=bool)
            alive[rows] = True
        parts = []
        for start in range(0, len(probes), 250):
            _stop_if(cancelled())
            part = slice(start, start + 250)
            scores, near = flat(matrix, probes[part], min(11, len(rows)), alive=alive)
            parts.append(_held_out(scores, near, held[part]))
        exact, nearest = (np.concatenate(part) for part in zip(*parts, strict=True))
        found = None
        for effort, depth in _efforts(kind, made, len(rows), thorough):
            _stop_if(cancelled())
            found = cls(made, int(ids[rows[-1]]), Measured(kind, effort, depth, 0.0, 0.0, len(probes), len(rows)))
            scores, near = _held_out(*found._candidates(ids, matrix, probes, 11, alive), held)
            # Scores say what was found: among equal ones it does not matter which. float32 sums in another order.
            hits = scores >= exact[:, -1:] - 1e-6
            same = (codes[near[:, 0]] == codes[nearest[:, 0]]) & (near[:, 0] >= 0)
            decisions = _decided_alike(exact[:, 0], scores[:, 0], same)
            found = replace(
                found, measured=replace(found.measured, decisions=decisions, recall_at_10=float(hits.mean()))
            )
            if found.measured.meets(recall):
                break
        assert found is not None
        return found

    def serves(self, k: int) -> bool:
        """Whether it may be asked for so many neighbours."""
        return k <= MOST_NEIGHBOURS

    def search(self, ids: Ids, matrix: Vectors, queries: Vectors, k: int, alive: Mask | None) -> tuple[Vectors, Ids]:
        """As `flat`; `ids` (M,) are those of the rows of `matrix`, rising."""
        scores, rows = self._candidates(ids, matrix, queries, k, alive)
        first = int(np.searchsorted(ids, self.last_id, side="right"))
        newer = len(ids) - first if alive is None else int(alive[first:].sum())
        if newer:
            fresh = None if alive is None else alive[first:]
            near, places = flat(matrix[first:], queries, min(k, newer), alive=fresh)
            scores, rows = _highest(np.hstack([scores, near]), np.hstack([rows, places + first]), k)
        if len(short := np.flatnonzero(rows[:, -1] < 0)):  # too few candidates, and there are k rows
            scores[short], rows[short] = flat(matrix, queries[short], k, alive=alive)
        return scores, rows

    def _candidates(
        self, ids: Ids, matrix: Vectors, queries: Vectors, k: int, alive: Mask | None
    ) -> tuple[Vectors, Ids]:
        """The k best of what the index proposes, scored exactly; -inf and -1 where it proposes fewer."""
        faiss = _library()
        depth = max(self.measured.depth, 4 * k)
        _set_effort(self.faiss, self.measured)
        found = self.faiss.search(queries, depth)[1]
        rows = np.minimum(np.searchsorted(ids, found), len(ids) - 1)
        gone = ids[rows] != found
        if alive is not None:
            gone |= ~alive[rows]
        if gone.any():
            rows[gone] = -1
            rows = -np.sort(-rows, axis=1)  # the kernel stops at the first -1
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        scores, near = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
        faiss.knn_inner_products_by_idx(
            faiss.swig_ptr(queries),
            faiss.swig_ptr(matrix),
            faiss.swig_ptr(rows),
            matrix.shape[1],
            len(queries),
            len(matrix),
            depth,
            k,
            faiss.swig_ptr(scores),
            faiss.swig_ptr(near),
            depth,
        )
        return scores, near

    # ---- its cache -------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> dict[str, Any]:
        """Write it to a file that is on the disk when this returns; what `read` wants to know of it."""
        faiss = _library()
        digest = hashlib.blake2b(digest_size=16)
        with open(path, "wb") as file:

            def write(content: bytes) -> int:
                digest.update(content)
                return file.write(content)

            writer = faiss.PyCallbackIOWriter(write)
            faiss.write_index(self.faiss, writer)
            del writer  # which writes the rest
            file.flush()
            os.fsync(file.fileno())
        return {
            "digest": digest.hexdigest(),
            "faiss": faiss.__version__,
            "last_id": self.last_id,
            "measured": asdict(self.measured),
        }

    @classmethod
    def read(cls, path: Path, known: dict[str, Any]) -> Index | None:
        """What `save` has written; None when it is not that, to the last byte. FAISS itself checks nothing."""
        faiss = _library()
        if known["faiss"] != faiss.__version__:
            return None
        try:
            with open(path, "rb") as file:
                digest = hashlib.blake2b(digest_size=16)
                while content := file.read(1 << 20):
                    digest.update(content)
                if digest.hexdigest() != known["digest"]:
                    return None
                file.seek(0)
                made = faiss.read_index(faiss.PyCallbackIOReader(file.read))
        except OSError:
            return None
        return cls(made, known["last_id"], Measured(**known["measured"]))


def _stop_if(cancelled: bool) -> None:
    if cancelled:
        raise Cancelled


def _cells(matrix: Vectors, rows: Ids, cancelled: Callable[[], bool]) -> Any:
    """An inverted file, trained."""
    faiss = _library()
    dim, cells = matrix.shape[1], max(1, min(int(4 * len(rows) ** 0.5), len(rows) // 48))
    chosen = np.random.default_rng(0).choice(rows, min(len(rows), 48 * cells), replace=False)
    sample = matrix[np.sort(chosen)]
    clusters = faiss.Kmeans(
        dim, cells, niter=1, spherical=True, seed=0, min_points_per_centroid=1, max_points_per_centroid=1 << 20
    )
    centres = None
    for _ in range(KMEANS_ROUNDS):  # one by one, to be cancelled in between
        _stop_if(cancelled())
        clusters.train(sample, init_centroids=centres)
        centres = clusters.centroids
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(centres)
    if dim % 2 == 0:
        made = faiss.IndexIVFPQFastScan(quantizer, dim, cells, dim // 2, 4, faiss.METRIC_INNER_PRODUCT)
    else:
        kind = faiss.ScalarQuantizer.QT_8bit
        made = faiss.IndexIVFScalarQuantizer(quantizer, dim, cells, kind, faiss.METRIC_INNER_PRODUCT)
    quantizer.this.disown()
    made.own_fields = True
    made.train(sample[:TRAINED_ON])
    return made


def _graph(matrix: Vectors, rows: Ids) -> Any:
    """A graph, without nodes yet."""
    faiss = _library()
    made = faiss.IndexHNSWSQ(matrix.shape[1], faiss.ScalarQuantizer.QT_8bit, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    made.hnsw.efConstruction = 80
    made.train(matrix[np.sort(np.random.default_rng(0).choice(rows, min(len(rows), TRAINED_ON), replace=False))])
    return faiss.IndexIDMap(made)


def _efforts(kind: Kind, made: Any, templates: int, thorough: bool) -> list[tuple[int, int]]:
    """Effort and depth, the quick ones first; codes are so short that looking at half of all still pays."""
    least, most = (32, 512) if kind == "hnsw" else (1, max(1, made.nlist // (2 if thorough else 16)))
    looked_at = 16 if kind == "hnsw" else templates / made.nlist  # codes per unit of effort
    efforts = [least << power for power in range((most // least).bit_length())]
    grid = [(effort, depth) for effort in efforts for depth in DEPTHS]
    return sorted(grid, key=lambda pair: CODE_COST * looked_at * pair[0] + pair[1])


def _decided_alike(exact: Vectors, found: Vectors, same: Mask) -> float:
    """Share of probes that are decided alike at the worst threshold.

    Where the best identity is the `same` (Q,) one, a threshold between its two scores makes the difference; where it is
    not, every threshold up to the exact score does.
    """
    missed = found < exact - 1e-6
    low, high = np.where(same, found, -np.inf)[missed], exact[missed]
    low, high = np.sort(low), np.sort(high)
    # at threshold t those differ that begin below it, less those that end below it
    differing = np.searchsorted(low, high, side="left") - np.searchsorted(high, high, side="left")
    return 1 - int(differing.max(initial=0)) / len(exact)


def _set_effort(made: Any, measured: Measured) -> None:
    faiss = _library()
    if measured.kind == "ivf":
        made.nprobe = measured.effort
    else:
        faiss.downcast_index(made.index).hnsw.efSearch = measured.effort


def _probes(matrix: Vectors, codes: Ids, rows: Ids) -> tuple[Vectors, Ids]:
    """Probes (S, D) for measuring and the row (S,) that each may not find, -1 for none."""
    random = np.random.default_rng(1)
    order = rows[np.argsort(codes[rows], kind="stable")]  # templates of one identity side by side
    places = random.choice(len(order), min(PROBES, len(order)), replace=False)
    mates = order[np.minimum(places + 1, len(order) - 1)]
    own, before = order[places], order[np.maximum(places - 1, 0)]
    mates = np.where((codes[mates] == codes[own]) & (mates != own), mates, before)
    known = (codes[mates] == codes[own]) & (mates != own)
    probes, held = matrix[own], np.where(known, own, -1)
    alike = float(np.median(np.einsum("sd,sd->s", probes[known], matrix[mates[known]]))) if known.any() else 0.7
    noise = random.standard_normal(probes.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    disturbed = alike * probes + (1 - min(alike, 1) ** 2) ** 0.5 * noise
    disturbed /= np.linalg.norm(disturbed, axis=1, keepdims=True)
    return np.where(known[:, None], probes, disturbed).astype(np.float32), held


def _held_out(scores: Vectors, rows: Ids, held: Ids) -> tuple[Vectors, Ids]:
    """Ten of eleven neighbours: without the probe itself."""
    scores = np.where((rows == held[:, None]) & (rows >= 0), -np.inf, scores)
    return _highest(scores, rows, 10)
