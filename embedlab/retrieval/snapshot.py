"""All templates of one generation in memory: immutable, so that searches need no lock."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np

from embedlab._types import Ids, Vectors
from embedlab.retrieval.store import Contents, Meta

Strings = np.ndarray[tuple[int], np.dtype[np.object_]]


class Snapshot:
    """The templates of a gallery at one generation.

    A newer generation is another object. Appending shares the memory of its predecessor: the new rows go behind the
    old ones, where no older snapshot looks.

    Args:
        meta: The facts at this generation.
        columns: ids (N,), labels (N,), metadata (N,) and vectors (N, D), each with room for more rows.
        count: Rows that are filled.
    """

    def __init__(self, meta: Meta, columns: tuple[Any, ...], *, count: int) -> None:
        self.meta = meta
        self._columns = columns
        self._filled = [count]  # shared by all snapshots on these columns: how far they are taken
        self.ids: Ids = columns[0][:count]
        self.labels: Strings = columns[1][:count]
        self.metadata: Strings = columns[2][:count]
        self.vectors: Vectors = columns[3][:count]

    @classmethod
    def of(cls, contents: Contents) -> Snapshot:
        """All that was read from the store."""
        columns = (contents.ids, _objects(contents.labels), _objects(contents.metadata), contents.vectors)
        return cls(contents.meta, columns, count=len(contents.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def appended(self, contents: Contents) -> Snapshot:
        """This one and more templates, whose ids are all higher."""
        old, new = len(self), len(self) + len(contents.ids)
        rows = (contents.ids, _objects(contents.labels), _objects(contents.metadata), contents.vectors)
        columns, filled = self._columns, self._filled
        if filled[0] != old or new > len(columns[0]) or columns[3].shape[1] != contents.vectors.shape[1]:
            room = max(64, new + new // 4)
            columns = tuple(np.empty((room, *part.shape[1:]), part.dtype) for part in rows)
            for column, part in zip(columns, (self.ids, self.labels, self.metadata, self.vectors), strict=True):
                if old:
                    column[:old] = part
            filled = [old]
        for column, part in zip(columns, rows, strict=True):
            column[old:new] = part
        result = Snapshot(contents.meta, columns, count=new)
        filled[0] = new
        result._filled = filled
        return result

    def kept(self, meta: Meta, keep: np.ndarray[Any, Any]) -> Snapshot:
        """Only the rows where `keep` is True."""
        columns = tuple(part[keep] for part in (self.ids, self.labels, self.metadata, self.vectors))
        return Snapshot(meta, columns, count=int(keep.sum()))

    def relabelled(self, meta: Meta, old: str, new: str) -> Snapshot:
        """One label replaced by another."""
        labels = self.labels.copy()
        labels[labels == old] = new
        return Snapshot(meta, (self.ids, labels, self.metadata, self.vectors), count=len(self))

    def described(self, meta: Meta) -> Snapshot:
        """The same templates under new facts."""
        return Snapshot(meta, (self.ids, self.labels, self.metadata, self.vectors), count=len(self))

    @cached_property
    def names(self) -> list[str]:
        """Labels in alphabetical order."""
        return sorted(set(self.labels.tolist()))

    @cached_property
    def codes(self) -> Ids:
        """(N,) place of each template's label in `names`."""
        place = {name: code for code, name in enumerate(self.names)}
        return np.array([place[label] for label in self.labels.tolist()], dtype=np.int64)

    @cached_property
    def by_identity(self) -> Ids:
        """(N,) rows sorted by identity."""
        return np.argsort(self.codes, kind="stable")

    @cached_property
    def templates(self) -> Ids:
        """(G,) templates of each of `names`."""
        return np.bincount(self.codes, minlength=len(self.names)).astype(np.int64)

    @cached_property
    def means(self) -> Vectors:
        """(G, D) mean template of each identity, not normalised: its product with a probe is the mean cosine."""
        if not len(self):
            return np.zeros((0, self.vectors.shape[1]), np.float32)
        starts = np.cumsum(self.templates) - self.templates
        sums = np.add.reduceat(self.vectors[self.by_identity].astype(np.float64), starts, axis=0)
        return (sums / self.templates[:, None]).astype(np.float32)

    def rows_where(self, where: dict[str, Any]) -> Ids:
        """Rows whose metadata has all these values."""
        missing = object()
        parsed = (json.loads(note) if note is not None else {} for note in self.metadata.tolist())
        hits = [all(note.get(key, missing) == value for key, value in where.items()) for note in parsed]
        return np.flatnonzero(np.array(hits, dtype=bool))


def _objects(values: list[Any]) -> Strings:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
