"""A gallery on Milvus: the server holds the templates and searches them; here it is decided.

Nothing reads all vectors into memory, but `embeddings`, which says so. `calibrate` streams them by once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np

from embedlab._types import Embeddings, Ids, Neighbours, Vectors
from embedlab.retrieval.answers import CheckReport, Identification, Verification
from embedlab.retrieval.calibration import Calibration
from embedlab.retrieval.cohort import Cohort
from embedlab.retrieval.embedders import Embedder, as_embedder
from embedlab.retrieval.gallery import Enrollment, Gallery, Normalisation, References, Request, references_of
from embedlab.retrieval.inputs import require_dim
from embedlab.retrieval.milvus_store import (
    FORMAT_VERSION,
    METADATA_BYTES,
    MOST_HITS,
    PAGE,
    PAGE_NUMBERS,
    Address,
    Facts,
    MilvusStore,
    literal,
    one_of,
)
from embedlab.retrieval.promise import templates_of
from embedlab.retrieval.scoring import best_identity, claimed, in_chunks, nearest_identities, neighbours
from embedlab.retrieval.store import About, GalleryError

MOST_TRIES = 5  # of a question that others overtake with changes
TABLE = 32_000_000  # scores held at once while templates stream by, 128 MB
Hits = list[list[tuple[int, str, float]]]
Answer = TypeVar("Answer")


class View:
    """The templates of a gallery on Milvus at one generation.

    Args:
        store: Where they lie.
        meta: The facts at that generation.
    """

    def __init__(self, store: MilvusStore, meta: Facts) -> None:
        self.store, self.meta = store, meta
        job = meta.pending or {}
        self._renamed: dict[str, str] = dict([job["relabel"]]) if "relabel" in job else {}
        self._last: tuple[Vectors, Vectors] | None = None
        self._leaving = f"not ({one_of(job['remove'], job['values'])})" if "remove" in job else ""

    def __len__(self) -> int:
        return self.meta.count

    @property
    def identities(self) -> int:
        """How many names there are."""
        return self.meta.identities

    @cached_property
    def tally(self) -> Counter[str]:
        """Templates of each identity, in the order of their first one; reads the labels of all templates once."""
        return Counter(label for page in self.pages(["label"]) for label in page["label"])

    @cached_property
    def names(self) -> list[str]:
        """Identities in the order of their first template."""
        return list(self.tally)

    @cached_property
    def _places(self) -> dict[str, int]:
        return dict(zip(self.names, range(len(self.names)), strict=True))

    def code_of(self, label: object) -> int | None:
        """Place of an identity in `names`; None when it is not enrolled."""
        return self._places.get(label) if isinstance(label, str) else None

    def codes_of(self, labels: Iterable[str]) -> Ids:
        """Places of identities in `names`."""
        try:
            return np.array([self._places[label] for label in labels], dtype=np.int64)
        except KeyError as error:
            raise GalleryError(
                f"The gallery {self.store.address.text} was changed while it was read ({error} is new). Ask again."
            ) from error

    def known(self, wanted: Iterable[Any], kind: Literal["label", "id"]) -> set[Any]:
        """Those of these labels, or ids, that are there."""
        values: list[Any] = [v for v in wanted if isinstance(v, str if kind == "label" else int | np.integer)]
        if not len(self) or not values:
            return set()
        if kind == "id":
            values = [int(value) for value in values if 0 < value <= self.meta.last_id]
            return {row["id"] for row in self._rows_among("id", values, ["id"])}
        if len(values) == 1:  # one row, however many templates it has
            return set(values) if self.query(self.labelled(values), ["id"], limit=1) else set()
        stored = [name for value in values for name in self._stored(value)]
        return {self.shown(row["label"]) for row in self._rows_among("label", stored, ["label"])}

    def where(self, where: dict[str, Any]) -> str:
        """An expression of Milvus that is true of templates whose metadata has all these values."""
        return " and ".join(_condition(key, value) for key, value in where.items())

    # ---- asking the server -----------------------------------------------------------------------------------------

    def expression(self, *conditions: str) -> str:
        """What is true of the templates that count at this generation and fit."""
        hidden = [f"not (id >= {first} and id <= {last})" for first, last in self.meta.void]
        parts = [f"id <= {self.meta.last_id}", *hidden, self._leaving, *conditions]
        return " and ".join(part for part in parts if part)

    def labelled(self, labels: Iterable[str]) -> str:
        """True of the templates of these identities."""
        return one_of("label", [name for label in labels for name in self._stored(label)])

    def shown(self, stored: str) -> str:
        """The label of a row, which may still carry its old one."""
        return self._renamed.get(stored, stored)

    def _stored(self, label: str) -> list[str]:
        """What rows of an identity may carry."""
        old = [name for name, new in self._renamed.items() if new == label]
        return [*old, *([] if label in self._renamed else [label])]

    def query(self, condition: str, columns: list[str], **options: Any) -> list[dict[str, Any]]:
        """Rows that count and fit."""
        return self.store.query(self.store.templates, self.expression(condition), columns, **options)

    def _rows_among(self, column: str, values: Sequence[Any], columns: list[str]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(values), PAGE):
            yield from self.query(one_of(column, values[start : start + PAGE]), columns)

    def pages(self, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
        """Columns of all templates in the order of ids, a bounded number at a time."""
        if not len(self):
            return
        assert self.meta.dim is not None
        step = min(PAGE, max(1, PAGE_NUMBERS // self.meta.dim)) if "vector" in columns else PAGE
        for start in range(0, self.meta.last_id, step):
            rows = self.query(f"id > {start} and id <= {start + step}", sorted({"id", *columns}))
            rows.sort(key=lambda row: int(row["id"]))
            page = {column: [row[column] for row in rows] for column in {"id", *columns}}
            if "label" in page:
                page["label"] = [self.shown(label) for label in page["label"]]
            yield page

    def table(self, queries: Vectors) -> Vectors:
        """Cosine of each probe with the nearest template of each identity, (Q, G), while all templates pass by.

        The last one is kept: a calibration asks for it twice.
        """
        last = self._last
        if last is None or not np.array_equal(last[0], queries):
            table: Vectors = np.full((len(queries), len(self.names)), -np.inf, np.float32)
            for page in self.pages(["label", "vector"]):
                codes = self.codes_of(page["label"])
                order = np.argsort(codes, kind="stable")
                vectors = np.array(page["vector"], np.float32).reshape(len(codes), queries.shape[1])
                scores = np.clip(queries @ vectors[order].T, -1, 1)
                there, starts = np.unique(codes[order], return_index=True)
                if len(there):
                    table[:, there] = np.maximum(table[:, there], np.maximum.reduceat(scores, starts, axis=1))
            last = self._last = (queries, table)
        return last[1].copy()

    def search(self, queries: Vectors, k: int, condition: str = "") -> Hits:
        """Id, label and cosine of the k nearest templates that fit, for each probe."""
        if not len(self) or not len(queries):
            return [[] for _ in queries]
        if k > MOST_HITS:
            raise ValueError(
                f"Milvus finds at most {MOST_HITS:,} neighbours of a probe, got k={k:,} with {len(self):,} templates."
            )
        found = self.store.search(queries, k, self.expression(condition))
        return [[(key, self.shown(label), min(max(score, -1.0), 1.0)) for key, label, score in row] for row in found]


def _condition(key: str, value: Any) -> str:
    options = value if isinstance(value, list) else [value]
    if odd := [one for one in options if not isinstance(one, str | int | float)]:
        raise ValueError(
            f"where looks for texts, numbers and true or false on Milvus; {key!r} is {odd[0]!r}. Only a gallery in a "
            "folder compares lists, dicts and None."
        )
    if not options:
        return "id < 0"  # any of nothing
    column = f"metadata[{literal(key)}]"
    return "(" + " or ".join(f"{column} == {literal(one)}" for one in options) + ")"


# ---- what is asked of templates, see `embedlab.retrieval.scoring` ----------------------------------------------------


@neighbours.register
def _(now: View, queries: Vectors, k: int, templates: str | None = None) -> Neighbours:
    return _answered(now.search(queries, min(k, max(len(now), 1)), templates or ""), k)


@nearest_identities.register
def _(now: View, queries: Vectors, k: int, templates: str | None = None) -> Neighbours:
    wanted, condition = min(k, max(now.identities, 1)), templates or ""
    best: Hits = []
    for query in queries:
        found: dict[str, tuple[int, str, float]] = {}
        reach = min(4 * wanted, MOST_HITS)
        while len(found) < wanted:
            others = f"not ({now.labelled(found)})" if found else ""  # one identity had them all: look past it
            hits = now.search(query[None], reach, " and ".join(part for part in (condition, others) if part))[0]
            for hit in hits:
                found.setdefault(hit[1], hit)
            if len(hits) < reach:
                break
        best.append(list(found.values())[:wanted])
    return _answered(best, k)


@best_identity.register
def _(
    now: View, queries: Vectors, cohort: Cohort | None, near: Neighbours | None = None
) -> tuple[list[str | None], Vectors]:
    assert cohort is None
    if now.meta.settings["fusion"] == "max":
        near = neighbours(now, queries, 1) if near is None else near
        return [row[0] for row in near.labels], near.scores[:, 0]
    best: list[str | None] = []
    top = np.full(len(queries), np.nan, np.float32)
    for row, votes in enumerate(_votes(now, queries)):
        best.append(max(votes, key=lambda name: votes[name]) if votes else None)
        top[row] = max(votes.values(), default=np.nan)
    return best, top  # type: ignore[return-value]


@claimed.register
def _(now: View, queries: Vectors, cohort: Cohort | None, label: str) -> Vectors:
    assert cohort is None
    if now.meta.settings["fusion"] == "vote":
        scores = [votes.get(label, 0.0) for votes in _votes(now, queries)]
    else:
        scores = [row[0][2] if row else np.nan for row in now.search(queries, 1, now.labelled([label]))]
    return np.array(scores, np.float32)


@in_chunks.register
def _(now: View, queries: Vectors, cohort: Cohort | None, own: Ids | None = None) -> Iterator[tuple[slice, Vectors]]:
    assert cohort is None
    voting = now.meta.settings["fusion"] == "vote"
    if voting and own is not None:
        raise ValueError(
            "leave_identity_out with fusion='vote' is for a gallery in a folder: votes would have to be cast again "
            "without each identity in turn. Calibrate with images of strangers, or use fusion='max'."
        )
    step = max(1, TABLE // len(now.names))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        scores = _vote_table(now, queries[part]) if voting else now.table(queries[part])
        if own is not None:
            scores[np.arange(len(scores)), own[part]] = -np.inf
        yield part, scores


@templates_of.register
def _(now: View, identities: Ids) -> tuple[Vectors, Ids]:
    names = [now.names[code] for code in identities.tolist()]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(names), 100):
        rows += now.query(now.labelled(names[start : start + 100]), ["id", "label", "vector"])
    rows.sort(key=lambda row: int(row["id"]))
    vectors: Vectors = np.array([row["vector"] for row in rows], np.float32)
    return vectors, now.codes_of(now.shown(row["label"]) for row in rows)


def _votes(now: View, queries: Vectors) -> list[dict[str, float]]:
    """Sum of the positive cosines of each identity among the nearest, over the number of voters."""
    voters = now.meta.settings["vote_k"]
    result = []
    for row in now.search(queries, min(voters, max(len(now), 1))):
        votes: dict[str, Any] = {}
        for _, label, score in row:
            votes[label] = votes.get(label, np.float32(0)) + np.float32(max(score, 0.0)) / np.float32(voters)
        result.append(votes)
    return result


def _vote_table(now: View, queries: Vectors) -> Vectors:
    table: Vectors = np.zeros((len(queries), len(now.names)), np.float32)
    for row, votes in enumerate(_votes(now, queries)):
        table[row, now.codes_of(votes)] = list(votes.values())
    return table


def _answered(hits: Hits, k: int) -> Neighbours:
    ids = np.full((len(hits), k), -1, dtype=np.int64)
    scores = np.full((len(hits), k), np.nan, dtype=np.float32)
    for row, found in enumerate(hits):
        ids[row, : len(found)] = [key for key, _, _ in found]
        scores[row, : len(found)] = [score for _, _, score in found]
    labels: list[list[str | None]] = [[*(name for _, name, _ in row), *[None] * (k - len(row))] for row in hits]
    return Neighbours(ids, labels, scores)


# ---- the gallery -----------------------------------------------------------------------------------------------------


class MilvusGallery(Gallery):
    """What `Gallery.create` and `Gallery.open` make of an address on Milvus.

    Args:
        store: The connection.
        embedder: As handed in.
        read_only: Change nothing.
    """

    def __init__(self, store: MilvusStore, embedder: Embedder | None, *, read_only: bool = False) -> None:
        super().__init__(embedder)
        self._store = store
        self._read_only = read_only
        self._seeing = threading.Lock()
        self._pin = threading.local()
        self._view = View(store, store.read())

    @classmethod
    def _refuse_taken(cls, place: str | Path) -> None:
        address = Address.parse(str(place))
        if address.file is not None and not address.file.exists():
            return
        store = MilvusStore(address)
        try:
            if store.exists():
                raise ValueError(f"{address.text} is already a gallery; choose another name, or use Gallery.open.")
        finally:
            store.close()

    @classmethod
    def _made(
        cls, place: str | Path, about: About, embedder: Embedder | None, source: str | Path | None
    ) -> MilvusGallery:
        address = Address.parse(str(place))
        _refuse_unsupported(address, about.settings, about.search, thumbnails=about.thumbnails)
        references = references_of(embedder)
        facts = Facts(**vars(about) | {"format_version": FORMAT_VERSION})
        facts.encoder_path = None if source is None else str(Path(source).absolute())
        facts.references_kept = bool(references)
        store = MilvusStore(address)
        try:
            with store.turn() as there:
                if there is not None:
                    raise ValueError(f"{address.text} is already a gallery; choose another name, or use Gallery.open.")
                store.make_facts()
                _keep_references(store, references)
                if facts.dim is not None:
                    store.make_templates(facts.dim)
                store.commit(facts)
            return cls(store, embedder)
        except BaseException:
            store.close()
            raise

    @classmethod
    def _opened(cls, place: str | Path, embedder: Any, *, read_only: bool, salvage: bool) -> MilvusGallery:
        address = Address.parse(str(place))
        if salvage:
            _only_in_a_folder(address.text, "salvage=True", "it reads what digests find whole, and Milvus has none")
        if address.file is not None and not address.file.exists():
            raise GalleryError(f"{address.text} is no gallery: there is no such file. Gallery.create makes one.")
        store = MilvusStore(address)
        try:
            gallery = cls(store, None, read_only=read_only)
            if embedder is not None:
                gallery._embedder = gallery._accepted(as_embedder(embedder), gallery._references())
        except BaseException:
            store.close()
            raise
        return gallery

    def close(self) -> None:
        with self._mutex:
            self._closed = True
            self._store.close()

    @property
    def address(self) -> str:
        return self._store.address.text

    @property
    def name(self) -> str:
        return self._store.address.name

    @property
    def purges(self) -> bool:
        return False

    @property
    def folder(self) -> NoReturn:
        raise GalleryError(
            f"The gallery {self.address} lies on Milvus and has no folder; what is kept in files beside a gallery, "
            "such as the inbox of a server, takes one in a folder."
        )

    @property
    def verified(self) -> bool:
        return True  # there are no digests, and nothing that is still to be compared

    # ---- asking it -------------------------------------------------------------------------------------------------

    def search(self, *arguments: Any, **options: Any) -> Neighbours:
        return self._whole(lambda: super(MilvusGallery, self).search(*arguments, **options))

    def identify(self, *arguments: Any, **options: Any) -> list[Identification]:
        return self._whole(lambda: super(MilvusGallery, self).identify(*arguments, **options))

    def verify(self, *arguments: Any, **options: Any) -> Verification:
        return self._whole(lambda: super(MilvusGallery, self).verify(*arguments, **options))

    # ---- what is in it ---------------------------------------------------------------------------------------------

    def labels(self) -> list[str]:
        return self._whole(super().labels)

    def counts(self) -> dict[str, int]:
        return self._whole(lambda: dict(sorted(self._now().tally.items())))

    def metadata(self) -> dict[int, dict[str, Any]]:
        pages = self._whole(lambda: list(self._now().pages(["metadata"])))
        return {key: note for page in pages for key, note in zip(page["id"], page["metadata"], strict=True)}

    def thumbnail(self, template: int) -> bytes | None:
        self._require_present(self._now(), [template], "id")
        return None

    def embeddings(self) -> Embeddings:
        pages = self._whole(lambda: list(self._now().pages(["label", "vector"])))
        vectors: Vectors = np.zeros((0, self.dim or 0), np.float32)
        vectors = np.concatenate([vectors, *(np.array(page["vector"], np.float32) for page in pages if page["id"])])
        ids = np.array([key for page in pages for key in page["id"]], dtype=np.int64)
        return Embeddings(vectors, [label for page in pages for label in page["label"]], ids)

    def _place(self, now: View) -> dict[str, Any]:  # type: ignore[override]
        exact = {"used": "exact", "building": False, "measured": None, "missed_the_target": []}
        return {
            "address": self.address,
            "server": self._store.call("get_server_version"),
            "consistency": self._store.address.level.lower(),
            "encoder": now.meta.encoder_path,
            "search": now.meta.search | exact,
        }

    # ---- changing it -----------------------------------------------------------------------------------------------

    def _add(self, wanted: Enrollment) -> Ids:
        names, vectors = wanted.names, wanted.vectors
        for row, note in enumerate(wanted.notes):
            if note is not None and len(json.dumps(json.loads(note), ensure_ascii=False).encode()) > METADATA_BYTES - 8:
                raise ValueError(f"The metadata in row {row} is too long for Milvus: {METADATA_BYTES} bytes at most.")
        with self._mutex, self._turn() as facts:
            if wanted.key is not None and (known := self._repeated(wanted.key, wanted.content)) is not None:
                return known
            assert vectors is not None
            require_dim(vectors.shape[1], facts.dim)
            now = View(self._store, facts)
            new = set(names) - now.known(set(names), "label")
            if facts.dim is None:
                self._store.make_templates(vectors.shape[1])
                facts.dim = vectors.shape[1]
            ids = np.arange(facts.next_id, facts.next_id + len(names)) if wanted.ids is None else wanted.ids
            assert ids[0] >= facts.next_id, "an id is never given out twice"
            first, last = int(ids[0]), int(ids[-1])
            request = None if wanted.key is None else _request_name(wanted.key)
            facts.next_id, facts.pending = last + 1, {"enroll": [first, last], "request": request}
            self._store.commit(facts)
            self._store.insert(ids, names, wanted.notes, vectors)
            if request is not None:
                self._store.write(request, [first, len(names), wanted.content.hex()])
            if wanted.references and not facts.references:
                _keep_references(self._store, wanted.references)
                facts.references_kept = True
            facts.pending, facts.last_id = None, last
            facts.count, facts.identities = facts.count + len(names), facts.identities + len(new)
            self._store.commit(facts)
        return ids

    def _recall(self, key: str) -> tuple[int, int, bytes] | None:
        name = _request_name(key)
        found = self._store.documents(name, "Strong").get(name)
        if found is None or (found[0] and found[0] + found[1] - 1 > self._store.read("Strong").last_id):
            return None  # an enrollment that does not count yet
        return found[0], found[1], bytes.fromhex(found[2])

    def _succeed(self, last_id: int, requests: list[tuple[str, int, int, bytes]]) -> None:
        with self._turn() as facts:
            for key, first, templates, content in requests:
                self._store.write(_request_name(key), [first, templates, content.hex()])
            facts.next_id, facts.last_id = max(facts.next_id, last_id + 1), max(facts.last_id, last_id)
            self._store.commit(facts)

    def _take_out(
        self, wanted: list[Any], kind: Literal["label", "id"], *, purge: bool, request: Request | None
    ) -> int:
        if purge:
            _only_in_a_folder(
                self.address,
                "purge=True",
                "Milvus deletes logically, and the bytes go when it compacts; remove without purge",
            )
        with self._mutex, self._turn() as facts:
            if done := self._done(request):
                return done[1]
            now = View(self._store, facts)
            self._require_present(now, wanted, kind)
            if not wanted:
                return 0
            gone = Counter(row["label"] for row in now._rows_among(kind, wanted, ["label"]))
            left = (
                gone
                if kind == "label"
                else Counter(row["label"] for row in now._rows_among("label", list(gone), ["label"]))
            )
            facts.pending = {"remove": kind, "values": wanted, "request": _noted(request, gone.total())}
            facts.count -= gone.total()
            facts.identities -= sum(left[label] == count for label, count in gone.items())
            self._store.commit(facts)  # from here on nobody sees them
            self._store.carry_out(facts)
        return gone.total()

    def _relabel(self, old: str, new: str, *, merging: bool, request: Request | None = None) -> int:
        with self._mutex, self._turn() as facts:
            if done := self._done(request):
                return done[1]
            now = View(self._store, facts)
            self._check_relabelling(now, old, new, merging=merging)
            count = len(now.query(now.labelled([old]), ["id"]))
            facts.pending = {"relabel": [old, new], "request": _noted(request, count)}
            facts.identities -= merging
            self._store.commit(facts)  # from here on everybody reads the new label
            self._store.carry_out(facts)
        return count

    def _configured(self, settings: dict[str, Any], search: dict[str, Any], wanted: Normalisation) -> None:
        if wanted.kind == "as-norm" or wanted.vectors is not None or wanted.cohort_k is not None:
            _only_in_a_folder(
                self.address,
                "Score normalisation",
                "it scores a probe with every template, which a server that finds the nearest ones does not do",
            )
        _refuse_unsupported(self._store.address, settings, search)
        with self._turn() as facts:
            if (settings, search) == (facts.settings, facts.search):
                return
            if settings != facts.settings:
                facts.settings, facts.calibration = settings, None
            facts.search = search
            self._store.commit(facts)

    def _keep_calibration(self, found: Calibration, now: View) -> None:  # type: ignore[override]
        with self._turn() as facts:
            if not facts.look_like(now.meta):
                raise GalleryError(
                    f"The gallery {self.address} was changed while it was calibrated ({len(now)} templates then, "
                    f"{facts.count} now), and a promise is about the gallery that it was measured on. Calibrate again."
                )
            facts.calibration = found.to_dict()
            self._store.commit(facts)

    # ---- keeping it ------------------------------------------------------------------------------------------------

    def check(self) -> CheckReport:
        _only_in_a_folder(self.address, "check", "it compares digests, and Milvus has none")

    def backup(self, folder: str | Path) -> Path:  # noqa: ARG002 - nothing is copied
        _only_in_a_folder(self.address, "backup", "use Milvus's own tool, milvus-backup, for a server or stop it first")

    def compact(self) -> int:
        _only_in_a_folder(self.address, "compact", "Milvus does it by itself")

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _now(self) -> View:
        self._require_open()
        pinned: View | None = getattr(self._pin, "view", None)
        if pinned is not None:
            return pinned
        facts = self._store.read()
        with self._seeing:
            seen = self._view.meta
            # With bounded reads one may come back that is older than what this object has seen.
            if facts.uuid != seen.uuid or (facts.generation > seen.generation and not facts.look_like(seen)):
                self._view = View(self._store, facts)
            return self._view

    def _whole(self, ask: Callable[[], Answer]) -> Answer:
        """An answer from one generation, although it takes several questions.

        They are asked of the generation that is known, and then it is seen whether that is still the newest: rows
        change only after the generation that announces it. If it is not, they are asked again. Where somebody writes
        all the time it is not insisted upon.
        """
        if getattr(self._pin, "view", None) is not None:
            return ask()
        view = self._view
        for _ in range(MOST_TRIES):
            self._pin.view = view
            try:
                answer, failure = ask(), None
            except (GalleryError, ValueError) as error:
                answer, failure = None, error
            finally:
                self._pin.view = None
            newest = self._now()
            if newest is view:
                break
            view = newest
        if failure is not None:
            raise failure
        return answer  # type: ignore[return-value]

    def _about(self) -> About:
        return self._view.meta

    @contextmanager
    def _turn(self) -> Iterator[Facts]:
        self._require_writable()
        with self._store.turn() as facts:
            assert facts is not None
            yield facts

    def _require_writable(self) -> None:
        self._require_open()
        if self._read_only:
            raise GalleryError(
                f"The gallery {self.address} was opened with read_only=True; open it without to change it."
            )

    def _keeps_embedder(self) -> bool:
        path = self._view.meta.encoder_path
        return path is not None and Path(path).exists()

    def _kept_embedder(self) -> Embedder:
        path = self._view.meta.encoder_path
        if path is None or not Path(path).exists():
            where = "was handed in as an object" if path is None else f"lay at {path}, where it is not on this machine"
            raise ValueError(
                f"The embedder of the gallery {self.address} ({self._view.meta.fingerprint}) {where}; Milvus keeps no "
                "weights. Hand it to Gallery.open(address, embedder), on the command line by --encoder, or pass "
                "embeddings=."
            )
        return as_embedder(path)

    def _references(self) -> References:
        if not self._view.meta.references:
            return []
        found = self._store.documents("reference/", "Strong")
        return [
            (base64.b64decode(image), np.frombuffer(base64.b64decode(vector), "<f4"))
            for _, (image, vector) in sorted(found.items())
        ]


def _keep_references(store: MilvusStore, references: References) -> None:
    for number, (image, vector) in enumerate(references):
        texts = [base64.b64encode(part).decode() for part in (image, vector.astype("<f4").tobytes())]
        store.write(f"reference/{number}", texts)


def _noted(request: Request | None, templates: int) -> list[Any] | None:
    """Name and content of the document that remembers a request which gives out no ids."""
    return None if request is None else [_request_name(request[0]), [0, templates, request[1].hex()]]


def _request_name(key: str) -> str:
    """A key may be as long as it likes, and hold what it likes."""
    return f"request/{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"


def _refuse_unsupported(
    address: Address, settings: dict[str, Any], search: dict[str, Any], *, thumbnails: bool = False
) -> None:
    if settings["fusion"] == "mean":
        _only_in_a_folder(
            address.text,
            "fusion='mean'",
            "the mean over all templates of every identity cannot be asked of a server that finds the nearest ones; "
            "use 'max' or 'vote'",
        )
    if search["kind"] not in ("auto", "exact"):
        _only_in_a_folder(
            address.text,
            f"search={search['kind']!r}",
            "on Milvus searches are exact (an index of type FLAT), so that no answer is missed",
        )
    if thumbnails:
        _only_in_a_folder(address.text, "thumbnails=True", "Milvus takes no pictures")


def _only_in_a_folder(address: str, what: str, why: str) -> NoReturn:
    raise GalleryError(
        f"{what} is for a gallery in a folder, and {address} lies on Milvus: {why}. docs/gallery.md has a table of "
        "what holds where."
    )
