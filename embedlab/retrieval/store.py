"""The store of record of a gallery: one SQLite file under digests, one writer, and a generation that cannot go back.

Nothing here knows about images, search or thresholds; `embedlab.retrieval.gallery` does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sqlite3
import struct
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
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
    "CREATE TABLE request (key TEXT PRIMARY KEY, first_id INTEGER NOT NULL, templates INTEGER NOT NULL, "
    "content BLOB NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID",
)
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


@dataclass
class Meta:
    """The one row of facts about a gallery; changed in the transaction that makes them true.

    Args:
        uuid: Name of this gallery and its backups, 32 hexadecimal digits.
        dim: Numbers per vector, None before the first ones.
        fingerprint: Of the embedder; None when only ready-made vectors come in.
        encoder: Whether the folder `encoder` holds that embedder.
        settings: What scores depend on: fusion and its numbers.
        calibration: `Calibration.to_dict()`, or None.
        generation: Transactions so far.
        count: Templates.
        xor: XOR of the digests of all templates, as 32 hexadecimal digits.
        requests: Idempotency keys.
        requests_xor: XOR of their digests.
        last_id: Highest id ever given out.
    """

    uuid: str
    dim: int | None
    fingerprint: str | None
    encoder: bool
    settings: dict[str, Any]
    calibration: dict[str, Any] | None = None
    generation: int = 0
    count: int = 0
    xor: str = "0" * 32
    requests: int = 0
    requests_xor: str = "0" * 32
    last_id: int = 0
    format_version: int = FORMAT_VERSION

    def rows(self) -> list[tuple[str, str]]:
        """Key and JSON value, with a digest over all of them."""
        rows = [(key, json.dumps(value, sort_keys=True, allow_nan=False)) for key, value in asdict(self).items()]
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

    def exchange(self, digests: Sequence[bytes], *, requests: bool = False) -> None:
        """XOR digests in (or out, which is the same)."""
        name = "requests_xor" if requests else "xor"
        setattr(self, name, f"{int(getattr(self, name), 16) ^ xor_of(digests):032x}")


@dataclass
class Contents:
    """All templates of one generation, as read and verified.

    Args:
        meta: The facts at that generation.
        ids: (N,) int64, rising.
        labels: (N,) strings.
        metadata: (N,) JSON texts or None.
        vectors: (N, D) float32 of norm 1.
        xor: XOR of their digests.
        problems: What does not fit; empty in a healthy gallery.
    """

    meta: Meta
    ids: Ids
    labels: list[str]
    metadata: list[str | None]
    vectors: Vectors
    xor: int
    problems: list[str] = field(default_factory=list)


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
        self._salvage = salvage
        self._process = os.getpid()
        self._lock = None if read_only else _WriterLock(folder / LOCK)
        try:
            self._connection = _connect_for_reading(folder) if read_only else _connect(folder / DATABASE)
            with self._reading():
                self._data_version = self._connection.execute("PRAGMA data_version").fetchone()[0]
                self._check_schema()
                meta = self.meta()
                if not read_only and self._acknowledged(meta.uuid) < meta.generation:
                    self._acknowledge(meta)  # a crash between COMMIT and acknowledgement: the commit stands
        except BaseException:
            if hasattr(self, "_connection"):
                self._connection.close()
            if self._lock:
                self._lock.release()
            raise

    @staticmethod
    def create(folder: Path, meta: Meta) -> None:
        """Make the database and the generation file in a folder that holds neither."""
        _refuse_network(folder)
        connection = sqlite3.connect(folder / DATABASE, isolation_level=None)
        try:
            connection.execute("PRAGMA page_size = 16384")  # vectors of 512 numbers fill 4 KiB pages only by half
            _pragmas(connection)
            connection.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                connection.execute(statement)
            connection.execute("INSERT INTO sqlite_sequence VALUES ('item', 0)")
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.rows())
            connection.execute("COMMIT")
        finally:
            connection.close()
        os.chmod(folder / DATABASE, 0o600)
        write_generation(folder / GENERATION, meta.uuid, meta.generation)

    def close(self) -> None:
        """Fold the log into the database, close it and let the next writer in."""
        if os.getpid() != self._process:
            return  # a forked child: closing would drop the parent's locks
        with suppress(sqlite3.Error):
            if not self.read_only and not self.broken:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()
        if self._lock:
            self._lock.release()

    def meta(self) -> Meta:
        """The facts as committed, checked against what was acknowledged."""
        # The file first: a commit in between makes the database newer, which is right, never older.
        slots = read_generation(self.folder / GENERATION)
        meta = Meta.from_rows(self._connection.execute("SELECT key, value FROM meta").fetchall())
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
        """Whether another process has committed since this was last asked."""
        with self._reading():
            version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        before, self._data_version = self._data_version, version
        return bool(before != version)

    def load(self, *, after: int = 0) -> Contents:
        """Read templates with an id above `after` and verify every digest; with `after` 0 the whole as well.

        Raises:
            GalleryDamaged: Something does not fit; with `salvage` it is left out and `problems` say so.
        """
        with self._reading(), self._transaction("BEGIN"):
            contents = self._read(self.meta(), after)
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

    def insert(self, meta: Meta, labels: list[str], metadata: list[str | None], vectors: Vectors) -> Ids:
        """Add templates inside `writing`; returns their new ids."""
        ids = np.arange(meta.last_id + 1, meta.last_id + 1 + len(labels), dtype=np.int64)
        digests: list[bytes] = []

        def rows() -> Iterator[tuple[int, str, str | None, bytes, bytes]]:
            for key, label, note, vector in zip(ids.tolist(), labels, metadata, vectors, strict=True):
                blob = vector.astype("<f4", copy=False).tobytes()
                digests.append(_item_digest(key, label.encode(), None if note is None else note.encode(), blob))
                yield key, label, note, blob, digests[-1]

        self._connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?, ?)", rows())
        meta.exchange(digests)
        meta.count += len(labels)
        meta.last_id += len(labels)
        return ids

    def delete(self, meta: Meta, ids: Ids) -> None:
        """Remove templates inside `writing`."""
        for key in ids.tolist():
            row = self._connection.execute("DELETE FROM item WHERE id = ? RETURNING digest", (key,)).fetchone()
            if row is None:
                raise GalleryDamaged(self._damaged(f"template {key} has vanished"))
            meta.exchange([row[0]])
        meta.count -= len(ids)

    def relabel(self, meta: Meta, ids: Ids, label: str) -> None:
        """Give templates another label, inside `writing`."""
        for key in ids.tolist():
            query = "SELECT metadata, vector, digest FROM item WHERE id = ?"
            row = self._connection.execute(query, (key,)).fetchone()
            if row is None:
                raise GalleryDamaged(self._damaged(f"template {key} has vanished"))
            changed = _item_digest(key, label.encode(), row[0], row[1])
            self._connection.execute("UPDATE item SET label = ?, digest = ? WHERE id = ?", (label, changed, key))
            meta.exchange([row[2], changed])

    def remember(self, meta: Meta, key: str, first_id: int, templates: int, content: bytes) -> None:
        """Note an idempotency key with what came of it, inside `writing`."""
        digest = _request_digest(key.encode(), first_id, templates, content)
        self._connection.execute(
            "INSERT INTO request VALUES (?, ?, ?, ?, ?)", (key, first_id, templates, content, digest)
        )
        meta.exchange([digest], requests=True)
        meta.requests += 1

    def recall(self, key: str) -> tuple[int, int, bytes] | None:
        """First id, number of templates and content digest under an idempotency key."""
        with self._reading():
            row = self._connection.execute(
                "SELECT first_id, templates, content FROM request WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else (row[0], row[1], row[2])

    def copy_to(self, folder: Path) -> None:
        """Copy one committed generation into an empty folder, while others read and this process may write."""
        with self._reading():
            target = sqlite3.connect(folder / DATABASE, isolation_level=None)
            try:
                self._connection.backup(target)
                target.text_factory = bytes
                rows = target.execute("SELECT key, value FROM meta").fetchall()
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
            raise GalleryDamaged(text if str(self.folder) in text else self._damaged(text)) from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.ProgrammingError):
                raise GalleryError(f"The gallery {self.folder} is closed.") from error
            raise GalleryDamaged(self._damaged(f"SQLite says: {error}")) from error

    def _problem(self, text: str) -> None:
        if not self._salvage:
            raise GalleryDamaged(self._damaged(text))
        if text not in self.problems:
            self.problems.append(text)

    def _damaged(self, what: str) -> str:
        return (
            f"The gallery {self.folder} is damaged: {what}. Put back a backup, or open it with salvage=True to read "
            "what is still whole."
        )

    def _check_schema(self) -> None:
        rows = self._connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        found = sorted(row[0] for row in rows)
        if found != sorted(text.encode() for text in (*SCHEMA, SEQUENCE_SCHEMA)):
            self._problem("its schema is not that of a gallery")

    def _read(self, meta: Meta, after: int) -> Contents:
        cursor = self._connection.execute(
            "SELECT id, label, metadata, vector, digest FROM item WHERE id > ? ORDER BY id", (after,)
        )
        ids: list[int] = []
        labels: list[str] = []
        notes: list[str | None] = []
        bad, parts, xor = [], [], 0
        while rows := cursor.fetchmany(4096):
            blobs, digests = [], []
            for key, label, note, vector, digest in rows:
                try:
                    if len(vector) != 4 * (meta.dim or 0) or _item_digest(key, label, note, vector) != digest:
                        raise ValueError
                    name, text = label.decode(), None if note is None else note.decode()
                except (TypeError, ValueError, AttributeError, OverflowError):
                    bad.append(key)
                    continue
                ids.append(key)
                labels.append(name)
                notes.append(text)
                blobs.append(vector)
                digests.append(digest)
            parts.append(np.frombuffer(b"".join(blobs), dtype="<f4"))
            xor ^= xor_of(digests)
        vectors = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        shaped: Vectors = vectors.astype(np.float32, copy=False).reshape(len(ids), meta.dim or 0)
        problems = []
        if bad:
            some = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
            problems.append(f"{len(bad)} templates do not fit their digests (id {some})")
        return Contents(meta, np.array(ids, dtype=np.int64), labels, notes, shaped, xor, problems)

    def _whole_problems(self, contents: Contents) -> list[str]:
        meta, problems = contents.meta, []
        if len(contents.ids) != meta.count or f"{contents.xor:032x}" != meta.xor:
            problems.append(f"{len(contents.ids)} whole templates were read where {meta.count} others were stored")
        sequence = self._connection.execute("SELECT name, seq FROM sqlite_sequence").fetchall()
        if sequence != [(b"item", meta.last_id)]:
            problems.append("the counter of ids was changed")
        requests = self._connection.execute("SELECT key, first_id, templates, content, digest FROM request").fetchall()
        try:
            whole = all(_request_digest(*row[:4]) == row[4] for row in requests)
        except (TypeError, ValueError, OverflowError):
            whole = False
        if (
            not whole
            or len(requests) != meta.requests
            or f"{xor_of([r[4] for r in requests]):032x}" != meta.requests_xor
        ):
            problems.append("the table of idempotency keys does not fit its digests")
        return problems

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


def _request_digest(key: bytes, first_id: int, templates: int, content: bytes) -> bytes:
    return _blake2b(b"request", key, first_id.to_bytes(8, "little"), templates.to_bytes(8, "little"), content)


def _connect(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise GalleryError(f"{path.parent} is no gallery: it holds no {DATABASE}. Gallery.create makes one.")
    _refuse_network(path.parent)
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
    )
    try:
        _pragmas(connection)
    except sqlite3.DatabaseError as error:
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
        except sqlite3.DatabaseError as error:
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
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock_file(self._handle)
        except OSError as error:
            owner = os.pread(self._handle, 4096, 0) if hasattr(os, "pread") else b""
            os.close(self._handle)
            raise GalleryLocked(_locked_by(path.parent, owner)) from error
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "program": Path(sys.argv[0]).name})
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


def refuse_if_not_empty(folder: Path) -> None:
    """Raise unless a new gallery or backup may be made here."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        there = "already a gallery" if (folder / DATABASE).exists() else "not an empty folder"
        raise ValueError(f"{folder} is {there}; choose a new folder, or use Gallery.open.")
