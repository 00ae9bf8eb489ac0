"""The store of record of a gallery: one SQLite file under digests, one writer, and a generation that cannot go back.

Nothing here knows about images, search or thresholds; `embedlab.retrieval.gallery` does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import sqlite3
import struct
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedlab._types import Ids, Vectors

logger = logging.getLogger("embedlab")

FORMAT_VERSION = 1
DATABASE, LOCK, GENERATION, CACHE = "gallery.db", "gallery.lock", "gallery.generation", "cache"
SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE item (id INTEGER PRIMARY KEY AUTOINCREMENT, label TEXT NOT NULL, metadata TEXT, "
    "vector BLOB NOT NULL, digest BLOB NOT NULL)",
)
SIDE_TABLES = {  # all but templates; the first column is the key, the last a digest over table and other columns
    "request": "CREATE TABLE request (key TEXT PRIMARY KEY, first_id INTEGER NOT NULL, templates INTEGER NOT NULL, "
    "content BLOB NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID",
    "thumbnail": "CREATE TABLE thumbnail (id INTEGER PRIMARY KEY, image BLOB NOT NULL, digest BLOB NOT NULL)",
    "reference": "CREATE TABLE reference (number INTEGER PRIMARY KEY, image BLOB NOT NULL, vector BLOB NOT NULL, "
    "digest BLOB NOT NULL)",
    "cohort": "CREATE TABLE cohort (number INTEGER PRIMARY KEY, vector BLOB NOT NULL, digest BLOB NOT NULL)",
}
SEQUENCE_SCHEMA = "CREATE TABLE sqlite_sequence(name,seq)"  # SQLite's own, for AUTOINCREMENT
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs"}
_ITEM = struct.Struct("<4sqii")  # tag, id, bytes of the label, bytes of the metadata or -1
SLOT = 512  # bytes, one sector, so that writing one slot cannot tear the other


class GalleryError(RuntimeError):
    """An operation on a gallery failed; what was acknowledged before stands."""


class GalleryLocked(GalleryError):
    """Another process has the gallery open for writing."""


class GalleryDamaged(GalleryError):
    """The files of a gallery are not what was last acknowledged."""


class AnotherRequest(ValueError):
    """A key names one request, and another came under it."""


@dataclass
class About:
    """Facts about a gallery, wherever it lies.

    Args:
        uuid: Name of this gallery and its backups, 32 hexadecimal digits.
        dim: Numbers per vector, None before the first ones.
        fingerprint: Of the embedder; None when only ready-made vectors come in.
        encoder: Whether the folder `encoder` holds that embedder.
        settings: What scores depend on: fusion and its numbers.
        calibration: `Calibration.to_dict()`, or None.
        generation: Transactions so far.
        count: Templates.
        last_id: Highest id ever given out.
        thumbnails: Whether images that are enrolled leave a small picture.
        search: How neighbours are looked for, and what the cache holds; scores do not depend on it.
        format_version: Of the gallery.
    """

    uuid: str
    dim: int | None
    fingerprint: str | None
    encoder: bool
    settings: dict[str, Any]
    calibration: dict[str, Any] | None = None
    generation: int = 0
    count: int = 0
    last_id: int = 0
    thumbnails: bool = False
    search: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def references(self) -> bool:
        """Whether reference images are kept."""
        raise NotImplementedError


@dataclass
class Meta(About):
    """The one row of facts about a gallery in a folder; changed in the transaction that makes them true.

    Args:
        xor: XOR of the digests of all templates, as 32 hexadecimal digits.
        side: Rows and XOR of the digests of each side table.
    """

    xor: str = "0" * 32
    side: dict[str, list[Any]] = field(default_factory=lambda: {name: [0, "0" * 32] for name in SIDE_TABLES})

    @property
    def references(self) -> bool:
        """Whether reference images are kept."""
        return bool(self.side["reference"][0])

    def rows(self) -> list[tuple[str, str]]:
        """Key and JSON value, with a digest over all of them."""
        rows = [(key, json.dumps(value, sort_keys=True, allow_nan=False)) for key, value in vars(self).items()]
        return [*rows, ("digest", _blake2b(*(part.encode() for row in sorted(rows) for part in row)).hex())]

    @classmethod
    def from_rows(cls, table: list[tuple[bytes, bytes]]) -> Meta:
        """The inverse of `rows`, as bytes from the database; raises GalleryDamaged when the digest does not fit."""
        try:
            rows = {key.decode(): value.decode() for key, value in table}
            content = {key: json.loads(value) for key, value in rows.items() if key != "digest"}
        except (ValueError, AttributeError) as error:
            raise GalleryDamaged(f"the table meta is no JSON: {error}") from error
        version = content.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise GalleryError(
                f"The gallery has format version {version}, this embedlab reads up to {FORMAT_VERSION}; "
                "written by a newer release? Update embedlab."
            )
        try:
            meta = cls(**content)
        except TypeError as error:
            raise GalleryDamaged(f"the table meta has lost or gained keys: {error}") from error
        if dict(meta.rows()) != rows:
            raise GalleryDamaged("the digest of the table meta does not fit")
        return meta

    def exchange(self, digests: Sequence[bytes]) -> None:
        """XOR digests of templates in (or out, which is the same)."""
        self.xor = f"{int(self.xor, 16) ^ xor_of(digests):032x}"

    def exchange_side(self, table: str, digests: Sequence[bytes], rows: int) -> None:
        """The same for a side table that gains `rows` rows, or loses them where that is negative."""
        before, xor = self.side[table]
        self.side[table] = [before + rows, f"{int(xor, 16) ^ xor_of(digests):032x}"]


@dataclass
class Contents:
    """All templates of one generation, as read.

    Args:
        meta: The facts at that generation.
        ids: (N,) int64, rising.
        labels: (N,) strings.
        metadata: (N,) JSON texts or None.
        vectors: (N, D) float32 of norm 1; the first rows of a longer table, so that more fit behind them.
        xor: XOR of their digests.
        problems: What does not fit; empty in a healthy gallery.
        digests: (N, 16) bytes that are still to be compared with the templates; None when that is done.
    """

    meta: Meta
    ids: Ids
    labels: list[str]
    metadata: list[str | None]
    vectors: Vectors
    xor: int
    problems: list[str] = field(default_factory=list)
    digests: np.ndarray[Any, np.dtype[np.uint8]] | None = None


class Store:
    """One open gallery database.

    Args:
        folder: The gallery.
        read_only: Take no lock and write nothing.
        salvage: Collect in `problems` what else would raise GalleryDamaged, as far as it can be read on.

    Raises:
        GalleryLocked: Another process writes.
        GalleryDamaged: Not a database, another schema, or older than what was acknowledged.
    """

    def __init__(self, folder: Path, *, read_only: bool, salvage: bool = False) -> None:
        self.folder = folder
        self.read_only = read_only
        self.broken: str | None = None
        self.problems: list[str] = []
        self.salvaging = salvage
        self._process = os.getpid()
        _refuse_links(folder)
        self._lock = None if read_only else _WriterLock(folder / LOCK)
        self._file = _file_of(folder)
        try:
            self._connection = _connect_for_reading(folder) if read_only else _connect(folder / DATABASE)
            with self._reading():
                self._data_version = self._connection.execute("PRAGMA data_version").fetchone()[0]
                self._check_schema()
                self.opened = meta = self.meta()
                if not read_only and self._acknowledged(meta.uuid) < meta.generation:
                    self._acknowledge(meta)  # a crash between COMMIT and acknowledgement: the commit stands
            self._require_same_file()  # else SQLite may have opened the database of one and the log of another
        except BaseException:
            if hasattr(self, "_connection"):
                self._connection.close()
            if self._lock:
                self._lock.release()
            raise

    @staticmethod
    def create(folder: Path, meta: Meta, references: Sequence[tuple[bytes, Vectors]] = ()) -> None:
        """Make the database and the generation file in a folder that holds neither."""
        _refuse_network(folder)
        connection = sqlite3.connect(folder / DATABASE, isolation_level=None)
        try:
            connection.execute("PRAGMA page_size = 16384")  # vectors of 512 numbers fill 4 KiB pages only by half
            _pragmas(connection)
            connection.execute("BEGIN IMMEDIATE")
            for statement in (*SCHEMA, *SIDE_TABLES.values()):
                connection.execute(statement)
            connection.execute("INSERT INTO sqlite_sequence VALUES ('item', 0)")
            _insert(connection, meta, "reference", _reference_rows(references))
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.rows())
            connection.execute("COMMIT")
        finally:
            connection.close()
        os.chmod(folder / DATABASE, 0o600)
        write_generation(folder / GENERATION, meta.uuid, meta.generation)

    def close(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Fold the log into the database, close it and let the next writer in.

        Args:
            meanwhile: What to do when no handle on the files is left, but nobody else can write yet.
        """
        if os.getpid() != self._process:
            return  # a forked child: closing would drop the parent's locks
        with suppress(sqlite3.Error):
            if not self.read_only and not self.broken:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()
        try:
            meanwhile()
        finally:
            if self._lock:
                self._lock.release()

    def meta(self) -> Meta:
        """The facts as committed, checked against what was acknowledged."""
        # The file first: a commit in between makes the database newer, which is right, never older.
        slots = read_generation(self.folder / GENERATION)
        try:
            meta = Meta.from_rows(self._connection.execute("SELECT key, value FROM meta").fetchall())
        except GalleryDamaged:
            raise
        except GalleryError as error:  # of a newer format, or a flipped bit in its number
            raise GalleryError(f"{self.folder}: {error}") from error
        if not slots or any(owner != meta.uuid for owner, _ in slots):
            self._problem(f"{GENERATION} is missing, damaged or from another gallery")
        acknowledged = max((generation for _, generation in slots), default=0)
        if meta.generation < acknowledged:
            self._problem(
                f"the database is at generation {meta.generation}, but {acknowledged} was acknowledged: "
                f"{DATABASE}-wal was lost or damaged, or {DATABASE} was put back from an older copy"
            )
        return meta

    def changed(self) -> bool:
        """Whether another process has committed since this was last asked.

        Raises:
            GalleryError: Another gallery stands in the folder by now.
        """
        self._require_same_file()
        with self._reading():
            version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        before, self._data_version = self._data_version, version
        return bool(before != version)

    def _require_same_file(self) -> None:
        now = _file_of(self.folder)
        if now is not None and now != self._file:
            raise GalleryError(
                f"Another gallery stands in {self.folder} since it was opened here, by 'gallery migrate' or a backup "
                "that was put back; open it again."
            )

    def load(self, *, after: int = 0, verify: bool = True, cancelled: Callable[[], bool] = lambda: False) -> Contents:
        """Read templates with an id above `after`; with `after` 0 everything is checked as a whole too.

        Args:
            after: An id.
            verify: Compare every template with its digest; False leaves that to `misfits`.
            cancelled: Asked now and then; GalleryError when it says yes.

        Raises:
            GalleryDamaged: Something does not fit; with `salvage` it is left out and `problems` say so.
        """
        with self._reading(), self._transaction("BEGIN"):
            contents = self._read(self.meta(), after, cancelled)
            if verify:
                contents = verified(contents)
            problems = contents.problems + ([] if after else self._whole_problems(contents))
            if problems:
                self._problem("; ".join(problems))
        return contents

    def integrity_problems(self) -> list[str]:
        """What SQLite itself has to say against its file."""
        with self._reading():
            found = [row[0].decode() for row in self._connection.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    @contextmanager
    def writing(self) -> Iterator[Meta]:
        """One transaction; what the block does to the yielded facts is stored with it. Durable when this returns.

        Raises:
            GalleryError: The disk refused. The transaction is undone or, if only the acknowledgement failed, will be
                found on reopening; nothing more is written until then.
        """
        self.require_writable()
        try:
            with self._transaction("BEGIN IMMEDIATE"):
                with self._reading():
                    meta = self.meta()
                yield meta
                meta.generation += 1
                self._connection.executemany("REPLACE INTO meta VALUES (?, ?)", meta.rows())
            self._acknowledge(meta)
        except (sqlite3.Error, OSError) as error:
            self.broken = str(error)
            raise GalleryError(
                f"Writing to the gallery {self.folder} failed: {error}. Nothing acknowledged is lost. Free the disk or "
                "repair it, then open the gallery again."
            ) from error

    def insert(
        self, meta: Meta, labels: list[str], metadata: list[str | None], vectors: Vectors, ids: Ids | None = None
    ) -> Ids:
        """Add templates inside `writing`; returns their ids: new ones, unless some above `last_id` come along."""
        if ids is None:
            ids = np.arange(meta.last_id + 1, meta.last_id + 1 + len(labels), dtype=np.int64)
        assert len(ids) == len(labels)
        assert (np.diff(ids, prepend=meta.last_id) > 0).all(), "an id is never given out twice"
        digests: list[bytes] = []

        def rows() -> Iterator[tuple[int, str, str | None, bytes, bytes]]:
            for key, label, note, vector in zip(ids.tolist(), labels, metadata, vectors, strict=True):
                blob = vector.astype("<f4", copy=False).tobytes()
                digests.append(_item_digest(key, label.encode(), None if note is None else note.encode(), blob))
                yield key, label, note, blob, digests[-1]

        self._connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?, ?)", rows())
        meta.exchange(digests)
        meta.count += len(labels)
        meta.last_id = int(ids[-1]) if len(ids) else meta.last_id
        return ids

    def delete(self, meta: Meta, ids: Ids) -> None:
        """Remove templates inside `writing`."""
        for key in ids.tolist():
            row = self._connection.execute("DELETE FROM item WHERE id = ? RETURNING digest", (key,)).fetchone()
            if row is None:
                raise GalleryDamaged(self.damaged(f"template {key} has vanished"))
            meta.exchange([row[0]])
        meta.count -= len(ids)
        self._delete_side(meta, "thumbnail", ids.tolist())

    def relabel(self, meta: Meta, ids: Ids, label: str) -> None:
        """Give templates another label, inside `writing`."""
        for key in ids.tolist():
            query = "SELECT metadata, vector, digest FROM item WHERE id = ?"
            row = self._connection.execute(query, (key,)).fetchone()
            if row is None:
                raise GalleryDamaged(self.damaged(f"template {key} has vanished"))
            changed = _item_digest(key, label.encode(), row[0], row[1])
            self._connection.execute("UPDATE item SET label = ?, digest = ? WHERE id = ?", (label, changed, key))
            meta.exchange([row[2], changed])

    def remember(self, meta: Meta, key: str, first_id: int, templates: int, content: bytes) -> None:
        """Note an idempotency key with what came of it, inside `writing`; `first_id` is 0 where nothing was added."""
        _insert(self._connection, meta, "request", [(key, first_id, templates, content)])

    def recall(self, key: str) -> tuple[int, int, bytes] | None:
        """First id, number of templates and content digest under an idempotency key."""
        rows = self._side_rows("request", key)
        return None if not rows else rows[0][1:]

    def requests(self) -> list[tuple[str, int, int, bytes]]:
        """All idempotency keys with first id, number of templates and content digest."""
        return [(key.decode(), *rest) for key, *rest in self._side_rows("request")]

    def succeed(self, meta: Meta, last_id: int, requests: Iterable[tuple[str, int, int, bytes]]) -> None:
        """Know requests of another gallery and give out ids after its last, inside `writing`."""
        _insert(self._connection, meta, "request", [row for row in requests if self.recall(row[0]) is None])
        meta.last_id = max(meta.last_id, last_id)
        self._connection.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'item'", (meta.last_id,))

    def write_thumbnails(self, meta: Meta, thumbnails: dict[int, bytes]) -> None:
        """Keep an encoded picture of templates, by id, inside `writing`; `delete` takes it away with its template."""
        _insert(self._connection, meta, "thumbnail", thumbnails.items())

    def thumbnails(self, ids: Iterable[int]) -> dict[int, bytes]:
        """Encoded pictures of those of these templates that have one."""
        return {row[0]: row[1] for key in ids for row in self._side_rows("thumbnail", int(key))}

    def write_references(self, meta: Meta, references: Sequence[tuple[bytes, Vectors]]) -> None:
        """Keep encoded pictures and what the embedder made of each, inside `writing`, instead of any before."""
        self._replace_side(meta, "reference", _reference_rows(references))

    def references(self) -> list[tuple[bytes, Vectors]]:
        """What `write_references` kept."""
        return [(image, np.frombuffer(vector, "<f4")) for _, image, vector in self._side_rows("reference")]

    def write_cohort(self, meta: Meta, vectors: Vectors) -> None:
        """Keep a table (C, D) of vectors that scores are normalised with, inside `writing`, instead of any before."""
        self._replace_side(meta, "cohort", ((i, vector.astype("<f4").tobytes()) for i, vector in enumerate(vectors)))

    def cohort(self) -> Vectors:
        """(C, D) float32 as `write_cohort` kept it; C is 0 without one."""
        blobs = [row[1] for row in self._side_rows("cohort")]
        table = np.frombuffer(b"".join(blobs), "<f4").astype(np.float32)
        return table.reshape(len(blobs), len(blobs[0]) // 4 if blobs else 0)

    def copy_to(self, folder: Path) -> None:
        """Copy one committed generation into an empty folder, while others read and this process may write."""
        target = sqlite3.connect(folder / DATABASE, isolation_level=None)
        try:
            self._connection.backup(target)
            target.text_factory = bytes
            rows = target.execute("SELECT key, value FROM meta").fetchall()
        except sqlite3.Error as error:  # of the disk below the copy, or of a damaged gallery: the text says which
            raise OSError(f"SQLite says: {error}") from error
        finally:
            target.close()
        os.chmod(folder / DATABASE, 0o600)
        meta = Meta.from_rows(rows)
        write_generation(folder / GENERATION, meta.uuid, meta.generation)

    def compact(self) -> None:
        """Rewrite the database without its free pages and empty the log."""
        self.require_writable()
        try:
            self._connection.execute("VACUUM")
        except sqlite3.Error as error:
            self.broken = str(error)
            raise GalleryError(
                f"Compacting {self.folder} failed: {error}. It needs about twice the size of {DATABASE} as free disk. "
                "Nothing is lost; open the gallery again."
            ) from error
        self.truncate_log()

    def erase_traces(self) -> None:
        """Delete the cache and cut the log to nothing, so that what was deleted is in no file; waits 5 s for readers.

        The database is written anew, as by `compact`: where SQLite has moved rows from page to page it leaves copies of
        them between the others, `secure_delete` or not.

        Raises:
            GalleryError: Traces remain, in the files that it names.
        """
        self.require_writable()
        remain = []
        for path in (self.folder / CACHE).glob("*"):
            try:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except OSError as error:
                remain.append(f"{path} ({error.strerror})")
        cached = f"the cache still holds traces of it: {', '.join(remain)}. Delete them yourself."
        try:
            self.compact()
        except GalleryError as error:
            text = str(error)
            if not text.startswith("The removal is done"):
                text = f"The removal is done, but {self.folder / DATABASE} may hold traces of it: {text}"
            raise GalleryError(f"{text} Also, {cached}" if remain else text) from error
        if remain:
            raise GalleryError(f"The removal is done, but {cached}")

    def truncate_log(self) -> None:
        """Fold the log into the database and cut it to nothing; waits 5 s for readers.

        Raises:
            GalleryError: A reader kept the log in use, so that it still holds what was deleted.
        """
        self.require_writable()
        log = self.folder / (DATABASE + "-wal")
        try:
            busy = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        except sqlite3.Error as error:
            self.broken = str(error)
            raise GalleryError(f"Emptying {log} failed: {error}; open the gallery again.") from error
        if busy or (log.exists() and log.stat().st_size):
            raise GalleryError(
                f"The removal is done, but {log} still holds traces of it: a reader kept it in use for 5 s. "
                "Close the readers and call compact()."
            )

    def require_writable(self) -> None:
        """Raise unless this store may write."""
        if self.read_only:
            raise GalleryError(
                f"The gallery {self.folder} was opened with read_only=True; open it without to change it."
            )
        if self.broken:
            raise GalleryError(
                f"The gallery {self.folder} stopped writing after an error ({self.broken}); open it again."
            )
        if os.getpid() != self._process:
            raise GalleryError(
                "A gallery cannot be written from a forked process: SQLite handles must not cross a fork. Open it "
                "there."
            )

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self._connection.execute(begin)
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except GalleryDamaged as error:
            text = str(error)
            raise GalleryDamaged(text if str(self.folder) in text else self.damaged(text)) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # a damaged text, in SQLite's message too
            if isinstance(error, sqlite3.ProgrammingError):
                raise GalleryError(f"The gallery {self.folder} is closed.") from error
            raise GalleryDamaged(self.damaged(f"SQLite says: {error}")) from error

    def _problem(self, text: str) -> None:
        if not self.salvaging:
            raise GalleryDamaged(self.damaged(text))
        if text not in self.problems:
            self.problems.append(text)

    def damaged(self, what: str) -> str:
        """What to say about damage: where, what, and the ways out."""
        return (
            f"The gallery {self.folder} is damaged: {what}. Put back a backup, or open it with salvage=True to read "
            "what is still whole."
        )

    def _check_schema(self) -> None:
        rows = self._connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        found = sorted(row[0] for row in rows)
        if found != sorted(text.encode() for text in (*SCHEMA, *SIDE_TABLES.values(), SEQUENCE_SCHEMA)):
            self._problem("its schema is not that of a gallery")

    def _delete_side(self, meta: Meta, table: str, keys: Iterable[Any]) -> None:
        statement = f"DELETE FROM {table} WHERE {_key_of(table)} = ? RETURNING digest"
        gone = [row[0] for key in keys for row in self._connection.execute(statement, (key,)).fetchall()]
        meta.exchange_side(table, gone, -len(gone))

    def _replace_side(self, meta: Meta, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self._connection.execute(f"DELETE FROM {table}")
        meta.side[table] = [0, "0" * 32]
        _insert(self._connection, meta, table, rows)

    def _side_rows(self, table: str, key: Any = None) -> list[tuple[Any, ...]]:
        """Rows of a side table without their digests, which fit; those under one key, or all in the order of keys."""
        name = _key_of(table)
        query, given = (f"ORDER BY {name}", ()) if key is None else (f"WHERE {name} = ?", (key,))
        with self._reading():
            rows = self._connection.execute(f"SELECT * FROM {table} {query}", given).fetchall()
            if not all(_fits(table, row) for row in rows):
                raise GalleryDamaged(f"the table {table} does not fit its digests")
        return [row[:-1] for row in rows]

    def _side_problems(self, meta: Meta) -> list[str]:
        """Every row is looked up by its key: a damaged inner page may hide from a look-up what a scan still finds."""
        problems = []
        for table in SIDE_TABLES:
            key = _key_of(table)
            rows, xor, whole = 0, 0, True
            for row in self._connection.execute(
                f"SELECT found.* FROM {table} AS listed CROSS JOIN {table} AS found ON found.{key} = listed.{key}"
            ):
                whole = whole and _fits(table, row)
                rows, xor = rows + 1, xor ^ xor_of([row[-1]])
            if not whole or [rows, f"{xor:032x}"] != meta.side.get(table):
                problems.append(f"the table {table} does not fit its digests")
        return problems

    def _read(self, meta: Meta, after: int, cancelled: Callable[[], bool]) -> Contents:
        """Straight into tables of the right size: a million Python objects would cost more than the vectors."""
        cursor = self._connection.execute(
            "SELECT id, label, metadata, vector, digest FROM item WHERE id > ? ORDER BY id", (after,)
        )
        dim, count = meta.dim or 0, 0
        room = 2 * min(meta.count, meta.last_id - after) + 64  # memory that nobody touches costs nothing
        ids, vectors = np.empty(room, np.int64), np.empty((room, dim), np.float32)
        digests = np.empty((room, 16), np.uint8)
        labels: list[str] = []
        notes: list[str | None] = []
        texts: dict[bytes, str] = {}  # equal texts share their memory
        bad: list[int] = []
        while rows := cursor.fetchmany(4096):
            if cancelled():
                raise GalleryError(f"The gallery {self.folder} was closed while it was read.")
            whole = [row for row in rows if _well_formed(row, dim, texts)]
            if len(whole) < len(rows):
                bad += [row[0] for row in rows if not _well_formed(row, dim, texts)]
            bad += [row[0] for row in whole[room - count :]]  # more than were counted
            del whole[room - count :]
            stop = count + len(whole)
            ids[count:stop] = [row[0] for row in whole]
            labels += [texts[row[1]] for row in whole]
            notes += [None if row[2] is None else texts[row[2]] for row in whole]
            vectors[count:stop] = np.frombuffer(b"".join(row[3] for row in whole), "<f4").reshape(-1, dim)
            digests[count:stop] = np.frombuffer(b"".join(row[4] for row in whole), np.uint8).reshape(-1, 16)
            count = stop
        xor = int.from_bytes(np.bitwise_xor.reduce(digests[:count], axis=0).tobytes(), "big")
        problems = [damaged_templates(bad)] if bad else []
        return Contents(meta, ids[:count], labels, notes, vectors[:count], xor, problems, digests[:count])

    def _whole_problems(self, contents: Contents) -> list[str]:
        meta, problems = contents.meta, []
        if len(contents.ids) != meta.count or f"{contents.xor:032x}" != meta.xor:
            problems.append(f"{len(contents.ids)} whole templates were read where {meta.count} others were stored")
        sequence = self._connection.execute("SELECT name, seq FROM sqlite_sequence").fetchall()
        if sequence != [(b"item", meta.last_id)]:
            problems.append("the counter of ids was changed")
        return problems + self._side_problems(meta)

    def _acknowledged(self, owner: str) -> int:
        slots = read_generation(self.folder / GENERATION)
        return max((generation for name, generation in slots if name == owner), default=-1)

    def _acknowledge(self, meta: Meta) -> None:
        write_generation(self.folder / GENERATION, meta.uuid, meta.generation)


def write_generation(path: Path, owner: str, generation: int) -> None:
    """Put a generation on the disk in one of two alternating slots, so that a torn write leaves the other."""
    content = bytes.fromhex(owner) + generation.to_bytes(8, "little")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
    try:
        os.lseek(handle, SLOT * (generation % 2), os.SEEK_SET)
        os.write(handle, content + _blake2b(b"generation", content))
        os.fsync(handle)
    finally:
        os.close(handle)


def read_generation(path: Path) -> list[tuple[str, int]]:
    """The slots that are whole, as (gallery, generation)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    slots = []
    for start in (0, SLOT):
        slot = content[start : start + 40]
        if len(slot) == 40 and _blake2b(b"generation", slot[:24]) == slot[24:]:
            slots.append((slot[:16].hex(), int.from_bytes(slot[16:24], "little")))
    return slots


def new_uuid() -> str:
    """A name for a new gallery."""
    return uuid.uuid4().hex


def misfits(contents: Contents, start: int, stop: int) -> list[int]:
    """Ids of the templates in these rows that do not fit their digests."""
    assert contents.digests is not None
    size = 4 * contents.vectors.shape[1]
    blob = contents.vectors[start:stop].astype("<f4", copy=False).tobytes()
    stored = contents.digests[start:stop].tobytes()
    keys, labels, notes = contents.ids[start:stop].tolist(), contents.labels[start:stop], contents.metadata[start:stop]
    bad = []
    for row, (key, label, note) in enumerate(zip(keys, labels, notes, strict=True)):
        text, vector = None if note is None else note.encode(), blob[row * size : row * size + size]
        if _item_digest(key, label.encode(), text, vector) != stored[16 * row : 16 * row + 16]:
            bad.append(key)
    return bad


def verified(contents: Contents) -> Contents:
    """The templates that fit their digests; `problems` name the others."""
    count = len(contents.ids)
    bad = [key for start in range(0, count, 4096) for key in misfits(contents, start, min(start + 4096, count))]
    if not bad:
        return replace(contents, digests=None)
    keep = ~np.isin(contents.ids, bad)
    return Contents(
        contents.meta,
        contents.ids[keep],
        [label for label, whole in zip(contents.labels, keep.tolist(), strict=True) if whole],
        [note for note, whole in zip(contents.metadata, keep.tolist(), strict=True) if whole],
        contents.vectors[keep],
        contents.xor,
        [*contents.problems, damaged_templates(bad)],
    )


def damaged_templates(ids: list[int]) -> str:
    """What is wrong with templates that do not fit their digests."""
    some = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
    return f"{len(ids)} templates do not fit their digests (id {some})"


def _well_formed(row: tuple[Any, ...], dim: int, texts: dict[bytes, str]) -> bool:
    """Whether a row of `item` has the right shape; its texts are decoded into `texts`."""
    _, label, note, vector, digest = row
    try:
        for text in (label,) if note is None else (label, note):
            if text not in texts:
                texts[text] = text.decode()
        return (len(vector), len(digest)) == (4 * dim, 16)
    except (TypeError, ValueError, AttributeError):
        return False


def xor_of(digests: Sequence[bytes]) -> int:
    """XOR of 16-byte digests as a number; 0 of none, -1 when one of them is no digest."""
    if not digests:
        return 0
    if any(not isinstance(digest, bytes) or len(digest) != 16 for digest in digests):
        return -1
    table = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
    return int.from_bytes(np.bitwise_xor.reduce(table, axis=0).tobytes(), "big")


def content_digest(*parts: bytes) -> bytes:
    """Digest of a request, to tell a repetition from another request under the same key."""
    return _blake2b(b"content", *parts)


def _blake2b(*parts: bytes) -> bytes:
    """BLAKE2b-128 over parts with their lengths, so that no byte can move from one part to the next."""
    return hashlib.blake2b(b"".join(len(p).to_bytes(8, "little") + p for p in parts), digest_size=16).digest()


def _item_digest(key: int, label: bytes, metadata: bytes | None, vector: bytes) -> bytes:
    """One call per template on enrolling and opening, so written flat; the lengths keep the parts apart."""
    note, length = (b"", -1) if metadata is None else (metadata, len(metadata))
    return hashlib.blake2b(
        _ITEM.pack(b"item", key, len(label), length) + label + note + vector, digest_size=16
    ).digest()


def _insert(connection: sqlite3.Connection, meta: Meta, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """Add rows to a side table, each with its digest."""
    digested = [(*row, _row_digest(table, row)) for row in rows]
    if digested:
        places = ", ".join("?" * len(digested[0]))
        connection.executemany(f"INSERT INTO {table} VALUES ({places})", digested)
    meta.exchange_side(table, [row[-1] for row in digested], len(digested))


def _reference_rows(references: Sequence[tuple[bytes, Vectors]]) -> list[tuple[int, bytes, bytes]]:
    return [(i, image, vector.astype("<f4").tobytes()) for i, (image, vector) in enumerate(references)]


def _row_digest(table: str, row: tuple[Any, ...]) -> bytes:
    """Of the columns of a side table: texts, bytes and whole numbers."""
    parts = [cell.to_bytes(8, "little", signed=True) if isinstance(cell, int) else cell for cell in row]
    return _blake2b(table.encode(), *(part.encode() if isinstance(part, str) else part for part in parts))


def _fits(table: str, row: tuple[Any, ...]) -> bool:
    """Whether a row of a side table fits the digest in its last column."""
    try:
        return bool(_row_digest(table, row[:-1]) == row[-1])
    except (TypeError, ValueError, AttributeError):  # a cell of another type
        return False


def _key_of(table: str) -> str:
    return SIDE_TABLES[table].split("(")[1].split()[0]


def _connect(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise GalleryError(f"{path.parent} is no gallery: it holds no {DATABASE}. Gallery.create makes one.")
    _refuse_network(path.parent)
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
    )
    try:
        _pragmas(connection)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        connection.close()
        raise GalleryDamaged(
            f"The gallery {path.parent} is damaged: SQLite says: {error}. Put back a backup."
        ) from error
    except BaseException:
        connection.close()
        raise
    connection.text_factory = bytes  # a damaged text must reach its digest, not stop the reading
    return connection


def _pragmas(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA mmap_size = 0")
    connection.execute("PRAGMA busy_timeout = 5000")
    connection.execute("PRAGMA temp_store = MEMORY")  # no vector in a file outside the gallery, not even for VACUUM
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode not in ("wal", b"wal"):
        raise GalleryError(
            f"SQLite could not switch to its write-ahead log here (journal mode {mode}); use a local disk."
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA foreign_keys = ON")


def _connect_for_reading(folder: Path) -> sqlite3.Connection:
    path = folder / DATABASE
    if not path.is_file():
        raise GalleryError(f"{folder} is no gallery: it holds no {DATABASE}. Gallery.create makes one.")
    log = folder / (DATABASE + "-wal")
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?{mode}", uri=True, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA mmap_size = 0")
            connection.execute("PRAGMA busy_timeout = 5000")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            connection.close()
            # A write-protected folder cannot take the shared-memory file; without a log the file is all there is.
            if mode == "mode=ro" and "unable to open" in str(error) and not (log.exists() and log.stat().st_size):
                continue
            raise GalleryDamaged(
                f"The gallery {folder} is damaged: SQLite says: {error}. Put back a backup."
            ) from error
        connection.text_factory = bytes
        return connection
    raise AssertionError("the second mode returns or raises")


def _refuse_links(folder: Path) -> None:
    """In a gallery from elsewhere a link would have us write to, or empty, what it points at."""
    for name in (DATABASE, DATABASE + "-wal", DATABASE + "-shm", LOCK, GENERATION, CACHE):
        if (folder / name).is_symlink():
            raise GalleryError(
                f"{folder / name} is a link to {os.readlink(folder / name)}, but the files of a gallery lie in its own "
                "folder. Put the file itself there; if the gallery came from elsewhere, do not trust it."
            )


def _refuse_network(folder: Path) -> None:
    """SQLite's log needs memory that all processes share, which a network file system does not give."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return
    here, found = folder.resolve(), ("", "")
    for line in mounts.read_text(errors="replace").splitlines():
        _, point, kind, *_ = line.split(" ")
        if here.is_relative_to(point.replace("\\040", " ")) and len(point) >= len(found[0]):
            found = (point, kind)
    if found[1] in NETWORK_FILE_SYSTEMS:
        raise GalleryError(
            f"{folder} lies on a network file system ({found[1]} at {found[0]}), where SQLite cannot promise that "
            "nothing is lost; keep the gallery on a local disk and copy backups over."
        )


class _WriterLock:
    """An exclusive lock on gallery.lock for the life of a writer; the system drops it when the process dies."""

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise GalleryError(f"{path.parent} is no gallery: there is no such folder. Gallery.create makes one.")
        if not (path.parent / DATABASE).is_file():
            raise GalleryError(f"{path.parent} is no gallery: it holds no {DATABASE}. Gallery.create makes one.")
        while True:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _lock_file(self._handle)
            except OSError as error:
                owner = os.pread(self._handle, 4096, 0) if hasattr(os, "pread") else b""
                os.close(self._handle)
                raise GalleryLocked(_locked_by(path.parent, owner)) from error
            with suppress(OSError):
                if os.path.samestat(os.fstat(self._handle), os.stat(path)):
                    break
            os.close(self._handle)  # the folder was exchanged between opening and locking: that was the other's lock
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "program": Path(sys.argv[0]).name})
        with suppress(OSError):  # a full disk: the lock holds all the same, only its owner goes unnamed
            os.ftruncate(self._handle, 0)
            os.write(self._handle, content.encode())

    def release(self) -> None:
        os.close(self._handle)


def _locked_by(folder: Path, owner: bytes) -> str:
    try:
        content = json.loads(owner)
        who = f"process {content['pid']} on {content['host']} ({content['program']})"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"The gallery {folder} is open for writing in {who}; a gallery has one writer at a time. Close that one, or "
        "open this one with read_only=True."
    )


def _lock_file(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind the text, which others may still read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _file_of(folder: Path) -> tuple[int, int] | None:
    """What tells the database in a folder from any other that takes its place; None without one."""
    try:
        found = os.stat(folder / DATABASE)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def refuse_if_not_empty(folder: Path) -> None:
    """Raise unless a new gallery or backup may be made here."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        there = "already a gallery" if (folder / DATABASE).exists() else "not an empty folder"
        raise ValueError(f"{folder} is {there}; choose a new folder, or use Gallery.open.")
