"""All templates of one generation in memory: immutable, so that searches need no lock."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from numbers import Real
from typing import Any, Literal

import numpy as np

from embedlab._types import Ids, Vectors
from embedlab.retrieval.search import BLOCK, Index, Mask, flat
from embedlab.retrieval.store import Contents, Meta

Strings = np.ndarray[tuple[int], np.dtype[np.object_]]
MOST_REMOVED = 0.2  # share of removed rows above which the others are copied together


class Snapshot:
    """The templates of a gallery at one generation.

    A newer generation is another object on the same memory: new rows go behind the old ones, where no older snapshot
    looks, and removed rows stay where they are under a mask, so that there is never a second table of vectors. All
    that is public counts living templates only, in the order of their ids.

    Args:
        meta: The facts at this generation.
        columns: ids (N,), codes (N,), metadata (N,) and vectors (N, D), each with room for more rows.
        names: Identities that `codes` point at; with `places`, their codes, shared by snapshots like the columns.
        count: Rows that are filled.
        alive: (N,) which of them have not been removed; None when all are there.
        index: What makes a search among many fast; knows templates by id, so that it outlives changes.
        filled: How far the columns are taken, shared by all snapshots on them.
    """

    def __init__(
        self,
        meta: Meta,
        columns: tuple[Any, ...],
        names: tuple[list[str], dict[str, int]],
        *,
        count: int,
        alive: Mask | None = None,
        index: Index | None = None,
        filled: list[int] | None = None,
    ) -> None:
        self.meta = meta
        self.index = index
        self.alive = alive
        self._columns = columns
        self._names, self._places = names
        self._identities = len(self._names)
        self._filled = [count] if filled is None else filled
        self._count = count
        self._size = count if alive is None else int(alive.sum())

    @classmethod
    def of(cls, contents: Contents, index: Index | None = None) -> Snapshot:
        """All that was read from the store; takes the memory over, with the room behind it."""
        base, count = contents.vectors.base, len(contents.ids)
        longer = isinstance(base, np.ndarray) and base.ndim == 2 and base.dtype == np.float32
        matrix = base if longer else contents.vectors
        assert matrix is not None
        names: tuple[list[str], dict[str, int]] = ([], {})
        small = (contents.ids, _coded(names, contents.labels), _objects(contents.metadata))
        columns = tuple(np.empty(len(matrix), part.dtype) for part in small)
        for column, part in zip(columns, small, strict=True):
            column[:count] = part
        return cls(contents.meta, (*columns, matrix), names, count=count, index=index)

    def __len__(self) -> int:
        return self._size

    @property
    def identities(self) -> int:
        """How many names there are."""
        return self._identities

    @property
    def removed(self) -> int:
        """Rows that hold a removed template still."""
        return self._count - self._size

    # ---- the next generation ---------------------------------------------------------------------------------------

    def appended(self, contents: Contents) -> Snapshot:
        """This one and more templates, whose ids are all higher."""
        old, new = self._count, self._count + len(contents.ids)
        columns, filled = self._columns, self._filled
        if filled[0] != old or new > len(columns[0]) or columns[3].shape[1] != contents.vectors.shape[1]:
            room = 2 * new + 64
            columns = tuple(np.empty((room, *part.shape[1:]), part.dtype) for part in (*columns[:3], contents.vectors))
            for column, part in zip(columns, self._columns, strict=True):
                if old:
                    column[:old] = part[:old]
            filled = [old]
        names = (self._names, self._places)
        if len(self._names) != self._identities:  # another successor has taken the next codes
            names = _named(self.names)
        rows = (contents.ids, _coded(names, contents.labels), _objects(contents.metadata), contents.vectors)
        for column, part in zip(columns, rows, strict=True):
            column[old:new] = part
        alive = None if self.alive is None else np.concatenate([self.alive, np.ones(new - old, dtype=bool)])
        filled[0] = new
        result = Snapshot(contents.meta, columns, names, count=new, alive=alive, index=self.index, filled=filled)
        if "_facts" in self.__dict__:
            result.__dict__["_facts"] = self._facts.more(contents.metadata)
        return result

    def kept(self, meta: Meta, keep: Mask) -> Snapshot:
        """Only the templates where `keep` (N,) is True."""
        alive = np.ones(self._count, dtype=bool)
        alive[self._rows] = keep
        if self.alive is not None:
            alive &= self.alive
        names, codes = self._renumbered(self._columns[1], alive)
        result = self._with(meta, codes=codes, names=names, alive=alive)
        return result.compacted() if result.removed > MOST_REMOVED * self._count else result

    def compacted(self) -> Snapshot:
        """The same templates in memory of their own, where no removed one is left."""
        if self.alive is None:
            return self
        columns = tuple(part[: self._count][self.alive] for part in self._columns)
        return Snapshot(self.meta, columns, _named(self.names), count=len(self), index=self.index)

    def relabelled(self, meta: Meta, old: str, new: str) -> Snapshot:
        """One label replaced by another."""
        codes, source, target = self._columns[1], self.code_of(old), self.code_of(new)
        assert source is not None
        if target is None:
            return self._with(meta, names=_named([new if name == old else name for name in self.names]))
        codes = np.where(codes == source, target, codes)
        names, codes = self._renumbered(codes, np.ones(self._count, dtype=bool) if self.alive is None else self.alive)
        return self._with(meta, codes=codes, names=names)

    def described(self, meta: Meta) -> Snapshot:
        """The same templates under new facts."""
        return self._with(meta)

    def indexed(self, index: Index | None) -> Snapshot:
        """The same templates under another index, or none."""
        result = self._with(self.meta)
        result.index = index
        return result

    def _with(
        self,
        meta: Meta,
        *,
        codes: Ids | None = None,
        names: tuple[list[str], dict[str, int]] | None = None,
        alive: Mask | None = None,
    ) -> Snapshot:
        ids, old_codes, metadata, matrix = self._columns
        result = Snapshot(
            meta,
            (ids, old_codes if codes is None else codes, metadata, matrix),
            (self._names, self._places) if names is None else names,
            count=self._count,
            alive=self.alive if alive is None else alive,
            index=self.index,
            filled=self._filled,
        )
        if names is None:
            result._identities = self._identities
        if "_facts" in self.__dict__:
            result.__dict__["_facts"] = self._facts
        return result

    def _renumbered(self, codes: Ids, alive: Mask) -> tuple[tuple[list[str], dict[str, int]], Ids]:
        """Names and codes without the identities of which nothing is alive."""
        counts = np.bincount(codes[: self._count][alive], minlength=self._identities)
        if counts.all() and self._identities == len(self._names):
            return (self._names, self._places), codes
        moved = np.empty_like(codes)
        moved[: self._count] = (np.cumsum(counts > 0) - 1)[codes[: self._count]]
        return _named([self._names[code] for code in np.flatnonzero(counts).tolist()]), moved

    # ---- what is in it ---------------------------------------------------------------------------------------------

    @property
    def matrix(self) -> Vectors:
        """(M, D) vectors of all rows, those of removed templates among them (`alive` tells); no copy, ever."""
        matrix: Vectors = self._columns[3][: self._count]
        return matrix

    @property
    def row_ids(self) -> Ids:
        """(M,) ids of the rows of `matrix`, rising."""
        ids: Ids = self._columns[0][: self._count]
        return ids

    @property
    def row_codes(self) -> Ids:
        """(M,) codes of the rows of `matrix`; those of removed templates mean nothing."""
        codes: Ids = self._columns[1][: self._count]
        return codes

    @cached_property
    def ids(self) -> Ids:
        """(N,) ids, rising."""
        return self.row_ids if self.alive is None else self.row_ids[self.alive]

    @cached_property
    def codes(self) -> Ids:
        """(N,) place of each template's label in `names`."""
        return self.row_codes if self.alive is None else self.row_codes[self.alive]

    @cached_property
    def labels(self) -> Strings:
        """(N,) labels."""
        return _objects(self.names)[self.codes] if len(self) else _objects([])

    @cached_property
    def metadata(self) -> Strings:
        """(N,) JSON texts or None."""
        metadata: Strings = self._columns[2][: self._count]
        return metadata if self.alive is None else metadata[self.alive]

    @property
    def vectors(self) -> Vectors:
        """(N, D) vectors of norm 1; a copy each time once templates have been removed: `take` is better for a few."""
        return self.matrix if self.alive is None else self.matrix[self.alive]

    def take(self, templates: Ids) -> Vectors:
        """(T, D) vectors of the templates at these places of `ids`."""
        return self.matrix[templates if self.alive is None else self._rows[templates]]

    @cached_property
    def names(self) -> list[str]:
        """Identities in the order of their first template."""
        return self._names[: self._identities]

    def code_of(self, label: object) -> int | None:
        """Place of an identity in `names`; None when it is not enrolled."""
        code = self._places.get(label) if isinstance(label, str) else None
        return code if code is not None and code < self._identities else None

    def known(self, wanted: Iterable[Any], kind: Literal["label", "id"]) -> set[Any]:
        """Those of these labels, or ids, that are there."""
        return {value for value in wanted if (self.code_of(value) is not None if kind == "label" else self.has(value))}

    def has(self, template: object) -> bool:
        """Whether a template of this id is there."""
        if not isinstance(template, Real):
            return False
        row = int(np.searchsorted(self.row_ids, template))  # type: ignore[call-overload]
        there = row < self._count and bool(self.row_ids[row] == template)
        return there and (self.alive is None or bool(self.alive[row]))

    def labels_of(self, templates: Ids) -> list[list[str]]:
        """Labels of templates (Q, k), named by their places in `ids`."""
        codes = self.row_codes[templates if self.alive is None else self._rows[templates]]
        return [[self._names[code] for code in row] for row in codes.tolist()]

    @cached_property
    def by_identity(self) -> Ids:
        """(N,) templates sorted by identity."""
        return np.argsort(self.codes, kind="stable")

    @cached_property
    def templates(self) -> Ids:
        """(G,) templates of each of `names`."""
        return np.bincount(self.codes, minlength=self._identities).astype(np.int64)

    @cached_property
    def quality(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """(N,) weight of each template in the mean of its identity; 1 where none was given."""
        weights = np.array([note.get("quality", 1.0) for note in self._facts.distinct], dtype=np.float64)
        rows = weights[self._facts.codes]
        return rows if self.alive is None else rows[self.alive]

    @cached_property
    def means(self) -> Vectors:
        """(G, D) weighted mean template of each identity, not normalised: its product with a probe is a mean cosine."""
        return self.averages()

    def averages(self, factors: Any = None) -> Vectors:
        """(G, D) mean over the templates of each identity, weighted by quality, of template times `factors` (N,)."""
        means = np.zeros((self._identities, self.matrix.shape[1]), np.float32)
        ends = np.cumsum(self.templates)
        first = 0
        while first < self._identities:  # in blocks: no second table of vectors
            start = ends[first] - self.templates[first]
            last = max(first + 1, int(np.searchsorted(ends, start + BLOCK, side="right")))
            chosen = self.by_identity[start : ends[last - 1]]
            weights = self.quality[chosen]
            each = weights if factors is None else weights * factors[chosen]
            places = ends[first:last] - self.templates[first:last] - start
            sums = np.add.reduceat(self.take(chosen) * each[:, None], places, axis=0)
            means[first:last] = sums / np.add.reduceat(weights, places)[:, None]
            first = last
        return means

    # ---- asking it -------------------------------------------------------------------------------------------------

    def nearest(self, queries: Vectors, k: int, templates: Ids | None = None) -> tuple[Vectors, Ids]:
        """Cosines (Q, k) of the k nearest templates and their places in `ids`; k is at most how many there are.

        Args:
            queries: (Q, D) of norm 1.
            k: Templates per query.
            templates: Look only among these, exactly; places in `ids`, rising.
        """
        if templates is not None:
            rows = templates if self.alive is None else self._rows[templates]
            scores, found = flat(self.matrix, queries, k, rows=rows)
        elif self.index is not None and self.index.serves(k):
            scores, found = self.index.search(self.row_ids, self.matrix, queries, k, self.alive)
        else:
            scores, found = flat(self.matrix, queries, k, alive=self.alive)
        return np.clip(scores, -1, 1), found if self.alive is None else self._templates_at[found]

    def where(self, where: dict[str, Any]) -> Ids:
        """Templates whose metadata has all these values; a list stands for any of its items.

        The metadata is read as JSON once per snapshot, and only what is new after an enrollment.
        """
        missing = object()
        wanted = [(key, value if isinstance(value, list) else [value]) for key, value in where.items()]
        fits = [all(note.get(key, missing) in values for key, values in wanted) for note in self._facts.distinct]
        hits = np.array(fits, dtype=bool)[self._facts.codes]
        return np.flatnonzero(hits if self.alive is None else hits[self.alive])

    # ---- inside ----------------------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> Ids:
        """(N,) row of `matrix` of each template."""
        return np.arange(self._count) if self.alive is None else np.flatnonzero(self.alive)

    @cached_property
    def _templates_at(self) -> Ids:
        """(M,) template of each row of `matrix`, the inverse of `_rows`."""
        assert self.alive is not None
        return np.cumsum(self.alive) - 1

    @cached_property
    def _facts(self) -> _Facts:
        """Metadata of all rows, parsed once and carried on to later snapshots."""
        return _Facts({}, [], np.zeros(0, np.int64)).more(self._columns[2][: self._count].tolist())


class _Facts:
    """Parsed metadata: texts that are equal share one place; later snapshots add behind.

    Args:
        places: Place of each text in `distinct`.
        distinct: Parsed texts.
        codes: (M,) place in `distinct` of the metadata of each row.
    """

    def __init__(self, places: dict[str | None, int], distinct: list[dict[str, Any]], codes: Ids) -> None:
        self.places, self.distinct, self.codes = places, distinct, codes

    def more(self, notes: list[str | None]) -> _Facts:
        """The same with more rows."""
        codes = np.empty(len(notes), dtype=np.int64)
        for row, note in enumerate(notes):
            if (code := self.places.get(note)) is None:
                self.distinct.append({} if note is None else json.loads(note))
                code = self.places[note] = len(self.distinct) - 1
            codes[row] = code
        return _Facts(self.places, self.distinct, np.concatenate([self.codes, codes]))


def _named(names: list[str]) -> tuple[list[str], dict[str, int]]:
    """Names of their own with their codes."""
    return list(names), dict(zip(names, range(len(names)), strict=True))


def _coded(names: tuple[list[str], dict[str, int]], labels: list[str]) -> Ids:
    """Codes of labels, new ones noted behind the known."""
    known, places = names
    codes = np.empty(len(labels), dtype=np.int64)
    for row, label in enumerate(labels):
        code = places.get(label)
        if code is None:
            code = places[label] = len(known)
            known.append(label)
        codes[row] = code
    return codes


def _objects(values: list[Any]) -> Strings:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
