"""What a gallery keeps on Milvus, and how changes are made whole there without transactions.

Two collections: `NAME_templates` holds the vectors, `NAME_facts` documents in JSON: the facts about the gallery, one
document per generation of which the highest counts, requests by key, reference images. Milvus has no transaction over
several rows, so a change is announced, done, and then made to count, each by inserting one document of facts:

- Templates to enroll get ids above `last_id`, where nobody looks, until a generation with a higher `last_id` counts.
- Templates to remove, or a label to replace, stand in `pending` first: from then on readers leave them out, or read the
  old label as the new one, while the rows themselves are still being changed.
- Whoever writes next finishes what is pending, or takes it back, before anything else.

Writers take turns. Milvus has no lock either, but creating a collection is atomic: who has created `NAME_lock` writes.
A file of Milvus Lite is open in one process only, whose threads take turns by an ordinary lock.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from embedlab._types import Ids, Vectors
from embedlab.retrieval.store import About, GalleryError, GalleryLocked

FORMAT_VERSION = 1
TIMEOUT = 60.0  # seconds for one call of the server
PATIENCE = 10.0  # seconds for the first one
LEASE = 60.0  # seconds without a sign of life after which a writer is taken for dead
BEAT = 5.0  # seconds between two signs of life
MOST_HITS = 16_384  # of one search, Milvus's own limit
PAGE = 10_000  # templates in one answer, and fewer where vectors come along
PAGE_NUMBERS = 4_000_000  # in the vectors of one answer
INSERT_BYTES = 4_000_000  # of one message; a server takes 64 MB, its log about 5 MB at once
PART = 60_000  # characters of a document in one row; Milvus takes 65,535 bytes
SETTLE = 1_000  # templates after which Milvus Lite writes its segments: until then it searches them slowly
LABEL_BYTES = 4_000  # 1,000 characters of up to four
METADATA_BYTES = 65_536
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
TOKEN = "EMBEDLAB_MILVUS_TOKEN"

_files: dict[str, int] = {}  # open galleries per file of Milvus Lite in this process
_files_lock = threading.Lock()
_turns: dict[tuple[str, str], threading.Lock] = {}  # who writes to a gallery in a file, by path and name


@dataclass(frozen=True)
class Address:
    """Where on Milvus a gallery lies.

    `milvus://HOST:PORT/NAME` is a server, `milvus:FILE.db` or `milvus:FILE.db/NAME` a file of Milvus Lite, which one
    process at a time can open. NAME is "gallery" where it is left out; several galleries lie side by side. Options come
    behind a question mark: `consistency=bounded` answers faster from what may be some hundred milliseconds old,
    `tls=true` encrypts. A token or `user:password` is taken from the environment variable EMBEDLAB_MILVUS_TOKEN.

    Args:
        text: As it was written.
        uri: What pymilvus connects to.
        name: Of the gallery.
        file: Of Milvus Lite; None for a server.
        level: Consistency of reads, "Strong" or "Bounded".
    """

    text: str
    uri: str
    name: str
    file: Path | None
    level: str = "Strong"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address.

        Raises:
            ValueError: It is none.

        Example:
            >>> Address.parse("milvus://vectors.example.org/door").uri
            'http://vectors.example.org:19530'
            >>> Address.parse("milvus:shop.db/shelf").name
            'shelf'
        """
        parts = urlsplit(text)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        level = {"strong": "Strong", "bounded": "Bounded"}.get(options.pop("consistency", "strong").lower())
        tls = {"true": "https", "false": "http"}.get(options.pop("tls", "false").lower())
        if level is None or tls is None or options:
            raise ValueError(
                f"{text}: the options of an address are consistency=strong, consistency=bounded and tls=true."
            )
        if text.startswith("milvus://"):
            return cls(text, *_server(text, tls), None, level)
        found = re.fullmatch(r"milvus:(.+?\.db)(?:/([^/]*))?", text.partition("?")[0])
        if found is None:
            raise ValueError(
                f"{text} is no address of a gallery: expected milvus://HOST:PORT/NAME, or milvus:FILE.db with a file "
                "whose name ends in .db."
            )
        if parts.query:
            raise ValueError(f"{text}: a file has no options; it is local, and every read is of the newest state.")
        return cls(text, found[1], _checked_name(found[2] or "gallery", text), Path(found[1]))


def _server(text: str, scheme: str) -> tuple[str, str]:
    parts = urlsplit(text)
    if parts.username or parts.password:
        raise ValueError(
            f"{text.rpartition('@')[2]}: an address with a password ends up in histories and logs; put the token, or "
            f"user:password, into the environment variable {TOKEN}."
        )
    try:
        port = parts.port or 19530
    except ValueError as error:
        raise ValueError(f"{text}: {error}; such as milvus://localhost:19530/door.") from error
    if not parts.hostname:
        raise ValueError(f"{text} names no host; such as milvus://localhost:19530/door.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{scheme}://{host}:{port}", _checked_name(parts.path.strip("/") or "gallery", text)


def _checked_name(name: str, text: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{text}: {name!r} is no name of a gallery on Milvus: up to 100 letters, digits and underscores, a letter "
            "first."
        )
    return name


@dataclass
class Facts(About):
    """The facts about a gallery on Milvus.

    Args:
        identities: How many are enrolled.
        next_id: The lowest id that was never given out, not even to an enrollment that was broken off.
        pending: A change that is announced and not done: {"enroll": [first, last]}, {"remove": "label" or "id",
            "values": [...]} or {"relabel": [old, new]}; each with "request", the document that remembers its key: the
            name of what an enrollment writes itself, name and content of what is still to be written, or None.
        void: Ranges of ids of enrollments that were broken off; whatever a lost writer still sends there is not seen.
        encoder_path: Where the embedder lay when the gallery was made; None for one that was handed in as an object.
        references_kept: Whether there are reference images.
    """

    identities: int = 0
    next_id: int = 1
    pending: dict[str, Any] | None = None
    void: list[list[int]] = field(default_factory=list)
    encoder_path: str | None = None
    references_kept: bool = False

    @property
    def references(self) -> bool:
        """Whether reference images are kept."""
        return self.references_kept

    def look_like(self, other: Facts) -> bool:
        """Whether a reader sees the same: an enrollment that is under way changes nothing for one."""

        def seen(facts: Facts) -> dict[str, Any]:
            announced = None if facts.pending is None or "enroll" in facts.pending else facts.pending
            return vars(facts) | {"generation": 0, "next_id": 0, "pending": announced}

        return seen(self) == seen(other)


class MilvusStore:
    """One connection to the collections of a gallery.

    Args:
        address: Where they lie.

    Raises:
        ImportError: No pymilvus.
        GalleryError: Nobody answers there.
        GalleryLocked: Another process has the file open.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.templates, self.facts = f"{address.name}_templates", f"{address.name}_facts"
        self._lock = f"{address.name}_lock"
        self._client = _connect(address)
        self._closed = False
        self._token: str | None = None
        self._beaten = 0.0
        self._unsettled = 0
        self._loaded: set[str] = set()
        self._counting: list[str] = []  # rows of the facts that count, within a turn

    def close(self) -> None:
        """Let go of the connection and, with the last one, of the file."""
        if not self._closed:
            self._closed = True
            _disconnect(self.address, self._client)

    # ---- facts -----------------------------------------------------------------------------------------------------

    def read(self, level: str | None = None) -> Facts:
        """The facts that count, at the consistency of the address unless `level` says otherwise.

        Raises:
            GalleryError: There is no such gallery, or it has a newer format.
        """
        facts = self._newest(level)
        if facts is None:
            raise GalleryError(
                f"{self.address.text} is no gallery: there is none called {self.address.name!r}. Gallery.create makes "
                "one."
            )
        return facts

    def exists(self) -> bool:
        """Whether the gallery is there."""
        return self._newest("Strong") is not None

    def _newest(self, level: str | None, keys: list[str] | None = None) -> Facts | None:
        if not self._is_there(self.facts):
            return None
        found = self.documents("meta/", level, keys)
        if not found:
            return None
        content = found[max(found)]
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise GalleryError(
                f"The gallery {self.address.text} has format version {version}, this embedlab reads {FORMAT_VERSION}; "
                "written by a newer release? Update embedlab."
            )
        return Facts(**content)

    def commit(self, facts: Facts) -> None:
        """Make facts count, as the next generation; only within a turn."""
        self._require_turn()
        facts.generation += 1
        name = f"meta/{facts.generation:016d}"
        rows = self.write(name, vars(facts))
        self.delete(self.facts, self._counting)  # only now: a reader finds some that count at any moment
        self._counting = rows

    def write(self, name: str, content: Any) -> list[str]:
        """Store a document in one message, in rows of a size that Milvus takes; returns the keys of the rows."""
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        parts = [text[start : start + PART] for start in range(0, len(text), PART)]
        rows = [
            {"key": f"{name}/{number:04d}/{len(parts):04d}", "content": part, "vector": [0.0, 0.0]}
            for number, part in enumerate(parts)
        ]
        self.call("upsert", self.facts, rows)
        return [str(row["key"]) for row in rows]

    def documents(self, prefix: str, level: str | None = None, keys: list[str] | None = None) -> dict[str, Any]:
        """Documents whose names begin so, by name; those of which all parts are there. Their rows go to `keys`."""
        found: dict[str, dict[int, str]] = {}
        sizes: dict[str, int] = {}
        for row in self.query(self.facts, f'key like "{prefix}%"', ["key", "content"], level):
            if keys is not None:
                keys.append(row["key"])
            name, number, parts = row["key"].rsplit("/", 2)
            found.setdefault(name, {})[int(number)] = row["content"]
            sizes[name] = int(parts)
        return {
            name: json.loads("".join(parts[number] for number in range(sizes[name])))
            for name, parts in found.items()
            if len(parts) == sizes[name]
        }

    def forget(self, prefix: str) -> None:
        """Delete documents whose names begin so."""
        self.delete(
            self.facts, [row["key"] for row in self.query(self.facts, f'key like "{prefix}%"', ["key"], "Strong")]
        )

    # ---- turns -----------------------------------------------------------------------------------------------------

    @contextmanager
    def turn(self) -> Iterator[Facts | None]:
        """The one who may write, with the newest facts (None before there are any) and nothing pending.

        Raises:
            GalleryLocked: Another one writes and goes on writing.
        """
        self._token = self._take_turn()
        try:
            self._counting = []
            facts = self._newest("Strong", self._counting)
            if facts is not None and facts.pending is not None:
                self._finish(facts)
            yield facts
        finally:
            token, self._token = self._token, None
            if not self._shared:
                self._inside.release()
            else:
                with suppress(GalleryError):  # what broke off the change is the news; who comes next sees a dead lock
                    if self._holder() == token:
                        self.call("drop_collection", self._lock)

    def beat(self) -> None:
        """Show now and then, to those who wait, that this one is alive."""
        if time.monotonic() - self._beaten > BEAT:
            self._require_turn()
            self._beaten = time.monotonic()
            self.write("beat", {"of": self._token, "number": time.time_ns()})

    @property
    def _shared(self) -> bool:
        """Whether other processes may write."""
        return self.address.file is None

    @property
    def _inside(self) -> threading.Lock:
        """Held by the thread of this process whose turn it is, in a file."""
        return _turns.setdefault((str(Path(self.address.uri).absolute()), self.address.name), threading.Lock())

    def _take_turn(self) -> str:
        if not self._shared:
            if self._inside.acquire(timeout=LEASE):
                return "alone"
            raise GalleryLocked(
                f"The gallery {self.address.text} is being written by another thread for {LEASE:.0f} s or more. Try "
                "again when it is done."
            )
        host = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:60]
        token = f"t{uuid.uuid4().hex}_{os.getpid()}_{host}"  # the name of a field: all that every Milvus keeps of it
        started = since = time.monotonic()
        seen: Any = None
        while True:
            refused = None
            try:
                self._create(self._lock, {"key": ("VARCHAR", {"max_length": 8, "is_primary": True})}, token, 2)
            except GalleryError as error:  # it is there already
                refused = error
            holder = self._holder()
            if holder == token:
                return token
            now = time.monotonic()
            sign = (holder, holder and self._sign_of_life())
            if sign != seen:
                seen, since = sign, now
            if holder is not None and (self._is_dead(holder) or now - since > LEASE):
                self._push_aside(holder)
            if holder is None and refused is not None and now - since > LEASE:
                raise refused  # not because of another writer
            if holder is not None and now - started > (LEASE + 1 if now - since < LEASE else 2 * LEASE + 1):
                _, pid, host = holder.split("_", 2)
                raise GalleryLocked(
                    f"The gallery {self.address.text} is being written by process {pid} on {host} for {LEASE:.0f} s or "
                    "more; writers take turns. Try again when it is done, or open this one with read_only=True."
                )
            time.sleep(0.02 + 0.1 * np.random.default_rng().random())

    def _holder(self) -> str | None:
        """Token of whoever holds the lock."""
        if not self.call("has_collection", self._lock):
            return None
        try:
            fields = self.call("describe_collection", self._lock)["fields"]
        except GalleryError:  # gone in between
            return None
        return next((str(one["name"]) for one in fields if one["name"] != "key"), None)

    def _sign_of_life(self) -> Any:
        return self.documents("beat", "Strong") if self._is_there(self.facts) else None

    def _is_dead(self, holder: str) -> bool:
        """Whether the process is known to have ended: it was on this host."""
        _, pid, host = holder.split("_", 2)
        if host != re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:60] or sys.platform == "win32":
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def _push_aside(self, holder: str) -> None:
        """Take a dead one's lock away, without ever touching that of whoever was faster.

        It is renamed, to a name made of the dead one's. Of two who do this the second finds the new name taken, and
        fails, also when there is a new lock under the old name by then. So the renamed one must stay for a while: until
        the next death.
        """
        aside = f"{self._lock}_{holder.split('_')[0]}"
        for name in self.call("list_collections"):
            if name.startswith(f"{self._lock}_t") and name != aside:
                with suppress(GalleryError):
                    self.call("drop_collection", name)
        with suppress(GalleryError):
            self.call("rename_collection", self._lock, aside)

    def _require_turn(self) -> None:
        if self._token is None or (self._shared and self._holder() != self._token):
            raise GalleryError(
                f"The turn to write to the gallery {self.address.text} was lost, because this process did nothing for "
                f"{LEASE:.0f} s. Nothing of the change counts; make it again."
            )

    def _finish(self, facts: Facts) -> None:
        """Finish, or take back, what another one left."""
        job = facts.pending
        assert job is not None
        if "enroll" in job:
            first, last = job["enroll"]
            self.delete(self.templates, self.ids(f"id >= {first} and id <= {last}"))
            if job["request"] is not None:
                self.forget(job["request"])
            facts.void.append([first, last])
            facts.pending = None
            self.commit(facts)
        else:
            self.carry_out(facts)

    def carry_out(self, facts: Facts) -> None:
        """Do the removal, or the change of a label, that is announced."""
        job = facts.pending
        assert job is not None
        if "remove" in job:
            self._erase(job)
        else:
            self._rewrite(*job["relabel"])
        if job["request"] is not None:
            self.write(*job["request"])
        facts.pending = None
        self.commit(facts)

    # ---- templates -------------------------------------------------------------------------------------------------

    def _is_there(self, collection: str) -> bool:
        """Whether a collection exists; if so it is loaded, as it must be before it is asked."""
        if collection not in self._loaded:
            if not self.call("has_collection", collection):
                return False
            self.call("load_collection", collection)
            self._loaded.add(collection)
        return True

    def make_facts(self) -> None:
        """The collection of facts; what a creation left that was broken off goes."""
        for name in (self.templates, self.facts):
            if self.call("has_collection", name):
                self.call("drop_collection", name)
            self._loaded.discard(name)
        columns: dict[str, tuple[str, dict[str, Any]]] = {
            "key": ("VARCHAR", {"max_length": 200, "is_primary": True}),
            "content": ("VARCHAR", {"max_length": 65_535}),
        }
        self._create(self.facts, columns, "vector", 2, loaded=True)

    def make_templates(self, dim: int) -> None:
        """The collection of templates, as soon as it is known how many numbers a vector has."""
        if self._is_there(self.templates):
            return  # of an enrollment that was broken off
        columns: dict[str, tuple[str, dict[str, Any]]] = {
            "id": ("INT64", {"is_primary": True}),
            "label": ("VARCHAR", {"max_length": LABEL_BYTES}),
            "metadata": ("JSON", {}),
        }
        self._create(self.templates, columns, "vector", dim, loaded=True)

    def _create(
        self, name: str, columns: dict[str, tuple[str, dict[str, Any]]], vector: str, dim: int, *, loaded: bool = False
    ) -> None:
        """A collection with an exact index; inner products of vectors of norm 1 are cosines."""
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        for column, (kind, options) in columns.items():
            schema.add_field(column, getattr(DataType, kind), **options)
        schema.add_field(vector, DataType.FLOAT_VECTOR, dim=dim)
        # One shard: the rows of one message are then in one log, and appear together.
        self.call("create_collection", name, schema=schema, num_shards=1, consistency_level="Strong")
        if loaded:
            index = MilvusClient.prepare_index_params()
            index.add_index(vector, index_type="FLAT", metric_type="IP")
            self.call("create_index", name, index, sync=False)  # of nothing: there is nothing to wait for
            self._is_there(name)

    def insert(self, ids: Ids, labels: list[str], notes: list[str | None], vectors: Vectors) -> None:
        """Add rows, in messages of a bounded size."""
        sizes = np.array([len(label) + len(note or "") for label, note in zip(labels, notes, strict=True)])
        ends = np.cumsum(sizes + 4 * vectors.shape[1] + 64)
        start = 0
        while start < len(ids):
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + INSERT_BYTES, side="right")))
            self.beat()
            self.call(
                "insert",
                self.templates,
                [
                    {
                        "id": int(ids[row]),
                        "label": labels[row],
                        "metadata": json.loads(notes[row] or "{}"),
                        "vector": vectors[row],
                    }
                    for row in range(start, stop)
                ],
            )
            start = stop
        self._settle(len(ids))

    def _settle(self, added: int) -> None:
        """Milvus Lite searches what it has in memory many times slower than what it has written as segments."""
        self._unsettled += added
        if self.address.file is not None and self._unsettled >= SETTLE:
            self.call("flush", self.templates)
            self._unsettled = 0

    def _erase(self, job: dict[str, Any]) -> None:
        """Delete the rows that a pending removal names."""
        column, values = job["remove"], job["values"]
        for start in range(0, len(values), PAGE):
            self.beat()
            chosen = values[start : start + PAGE]
            self.delete(self.templates, chosen if column == "id" else self.ids(one_of("label", chosen)))

    def _rewrite(self, old: str, new: str) -> None:
        """Give rows another label."""
        ids = self.ids(one_of("label", [old]))
        step = max(1, INSERT_BYTES // 16_384)
        for start in range(0, len(ids), step):
            self.beat()
            chosen = one_of("id", ids[start : start + step])
            rows = self.query(self.templates, chosen, ["id", "metadata", "vector"], "Strong")
            self.call("upsert", self.templates, [{**row, "label": new} for row in rows])

    def ids(self, expression: str) -> list[int]:
        """Of all rows that fit, whatever readers see of them."""
        return sorted(row["id"] for row in self.query(self.templates, expression, ["id"], "Strong"))

    def delete(self, collection: str, keys: Sequence[Any]) -> None:
        """Delete rows by their keys, in messages of a bounded size."""
        for start in range(0, len(keys), PAGE):
            self.call("delete", collection, ids=list(keys[start : start + PAGE]))

    def query(
        self, collection: str, expression: str, columns: list[str], level: str | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Rows that fit."""
        self._is_there(collection)
        rows = self.call(
            "query",
            collection,
            filter=expression,
            output_fields=columns,
            consistency_level=level or self.address.level,
            **options,
        )
        return [dict(row) for row in rows]

    def search(self, queries: Vectors, k: int, expression: str) -> list[list[tuple[int, str, float]]]:
        """Id, stored label and inner product of the k nearest rows that fit, for each query (Q, D)."""
        self._is_there(self.templates)
        found: list[list[tuple[int, str, float]]] = []
        step = max(1, min(1_000, 100_000 // k))
        for start in range(0, len(queries), step):
            hits = self.call(
                "search",
                self.templates,
                data=list(queries[start : start + step]),
                filter=expression,
                limit=k,
                output_fields=["label"],
                consistency_level=self.address.level,
            )
            found += [[(hit["id"], hit["entity"]["label"], hit["distance"]) for hit in row] for row in hits]
        return found

    def call(self, verb: str, *arguments: Any, **options: Any) -> Any:
        """Ask Milvus; what it refuses is a GalleryError."""
        import grpc
        from pymilvus.exceptions import MilvusException

        if self._closed:
            raise GalleryError(f"The gallery {self.address.text} is closed; open it again.")
        try:
            return getattr(self._client, verb)(*arguments, timeout=TIMEOUT, **options)
        except (MilvusException, grpc.RpcError, ValueError) as error:
            raise GalleryError(
                f"Milvus could not do this for the gallery {self.address.text} ({verb}): {_said(error)}. Is the server "
                "up and of version 2.3 or newer? What was acknowledged before stands."
            ) from error


def one_of(column: str, values: Iterable[Any]) -> str:
    """An expression of Milvus: a column has one of these values."""
    return f"{column} in [{', '.join(literal(value) for value in values)}]"


def literal(value: Any) -> str:
    """A text, number or truth value as Milvus reads it."""
    return json.dumps(value, ensure_ascii=False)


def _said(error: Exception) -> str:
    return str(getattr(error, "message", None) or error).strip().rstrip(".")


def _connect(address: Address) -> Any:
    try:
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ImportError as error:
        raise ImportError(
            f"{address.text}: a gallery on Milvus needs pymilvus: pip install 'embedlab[milvus]'"
        ) from error
    for name in ("pymilvus", "milvus_lite", "grpc._server"):  # they log what they also raise, with a traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if address.file is None:
        try:
            return MilvusClient(address.uri, token=os.environ.get(TOKEN, ""), timeout=PATIENCE)
        except MilvusException as error:
            raise GalleryError(
                f"Nobody answers at {address.text} ({_said(error)}). Is Milvus running there, and is the port right? A "
                f"token is taken from {TOKEN}."
            ) from error
    return _open_file(address, MilvusClient, MilvusException)


def _open_file(address: Address, client: Any, failure: type[Exception]) -> Any:
    assert address.file is not None
    path = str(address.file.absolute())
    if not address.file.absolute().parent.is_dir():
        raise GalleryError(f"{address.text}: there is no folder {address.file.absolute().parent}.")
    with _files_lock:
        try:
            # Milvus Lite hangs up on who pings it as often as pymilvus does; within a process there is nothing to ping.
            opened = client(path, grpc_options={"grpc.keepalive_time_ms": 2**31 - 1})
        except failure as error:
            if find_spec("milvus_lite") is None:
                raise ImportError(
                    f"{address.text}: a file needs Milvus Lite: pip install 'embedlab[milvus]'"
                ) from error
            raise GalleryLocked(
                f"{address.text} could not be opened ({_said(error)}). Probably another process has it open: a file of "
                "Milvus Lite takes one process at a time, readers as well. Close that one, or use a server: "
                "milvus://HOST:PORT/NAME."
            ) from error
        _files[path] = _files.get(path, 0) + 1
    return opened


def _disconnect(address: Address, client: Any) -> None:
    if address.file is None:
        client.close()
        return
    from milvus_lite.server_manager import server_manager_instance

    path = str(address.file.absolute())
    with _files_lock:
        client.close()
        _files[path] -= 1
        if not _files[path]:
            del _files[path]
            server_manager_instance.release_server(path)  # which closing the client does not do
