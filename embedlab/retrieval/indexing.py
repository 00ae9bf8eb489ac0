"""The index of a gallery: when there is one, built behind the searches, and kept in its cache."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from embedlab._durable import sync
from embedlab.retrieval.search import AUTO_KINDS, Cancelled, Index, Kind, Measured
from embedlab.retrieval.snapshot import Snapshot
from embedlab.retrieval.store import GalleryError

logger = logging.getLogger("embedlab")

AUTO_ROWS = 50_000  # below this the exact search of one probe takes a millisecond or two
FEWEST_ROWS = 1_000  # below this there is nothing to learn cells and codes from
STALE_SHARE = 0.05  # of the indexed templates: with more new or removed ones the index is built anew
GROWN = 1.25  # times the templates among which no index met the target: then it is tried again
SEARCHES = ("auto", "exact", "hnsw", "ivf")
DEFAULTS = {"kind": "auto", "recall": 0.999, "index": None}


def checked_search(kind: Any, recall: Any, old: dict[str, Any] | None = None) -> dict[str, Any]:
    """How neighbours are looked for, as it stands in `Meta.search`; None leaves what was.

    Raises:
        ValueError: No such kind, or a recall that is no share.
    """
    now = DEFAULTS | (old or {})
    kind, recall = now["kind"] if kind is None else kind, now["recall"] if recall is None else recall
    if kind not in SEARCHES:
        raise ValueError(f"search is one of {', '.join(SEARCHES)}; got {kind!r}.")
    if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 < recall <= 1:
        raise ValueError(
            f"search_recall is the share of probes that must be decided as by exact search, above 0 and at most 1, got "
            f"{recall!r}; 99.9 % is 0.999."
        )
    return now | {"kind": kind, "recall": float(recall)}


class IndexKeeper:
    """Builds the index of a gallery in a thread of its own, and keeps it on the disk.

    Searches never wait: until an index is there they are exact. An index is used only if it meets the target that was
    measured on this gallery, and read from a file only if its digest stands in the database.

    Args:
        cache: Folder for the file.
        adopt: Called in the thread with an index (or None) and the epoch it was begun in; the gallery takes it over
            unless `epoch` has gone on, and then asks `tended` what to do next.
        note: Called in the thread to make a written file known, with what `Index.read` needs, the file and the epoch;
            None for a gallery that only reads.
        given_up: Whether nobody wants an index any more.
    """

    def __init__(
        self,
        cache: Path,
        *,
        adopt: Callable[[Index | None, int], None],
        note: Callable[[dict[str, Any], Path, int], None] | None,
        given_up: Callable[[], bool],
    ) -> None:
        self.epoch = 0
        self._cache, self._adopt, self._note, self._given_up = cache, adopt, note, given_up
        self._writing, self._starting = threading.Lock(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._busy = self._afresh = False
        self._missed: tuple[Measured, ...] = ()

    def tended(self, now: Snapshot, *, afresh: bool = False) -> Snapshot:
        """The snapshot with the index that it may use; starts building one where it is due. Never waits.

        Args:
            now: The newest snapshot; whoever calls holds the gallery.
            afresh: Build anew for a single template that is new or gone.
        """
        search = DEFAULTS | now.meta.search
        if not _worthwhile(now, search):
            return now if now.index is None else now.indexed(None)
        if now.index is not None and not _fits(now.index.measured, search):
            now = now.indexed(None)
        afresh = afresh or self._afresh
        due = (now.index is None or _stale(now, afresh)) and not self._hopeless(now, search)
        self._afresh = due and self._busy and afresh  # when what is being built is done
        if due and not self._busy and not self._given_up():
            self._busy = True
            with self._starting:
                self._thread = threading.Thread(
                    target=self._work, args=(now, search, self.epoch, afresh), name="embedlab: building an index"
                )
                self._thread.start()
        return now

    def forget(self) -> None:
        """Whatever is cached, being built or written holds vectors that must go. Waits for a file in writing."""
        with self._writing:
            self.epoch += 1
            for path in self._cache.glob("index*"):
                with suppress(OSError):  # who must know whether nothing remains looks again
                    path.unlink()

    def wait(self) -> None:
        """Until nothing runs behind any more."""
        waited = None
        while True:
            with self._starting:
                thread = self._thread
            if thread is None or thread is waited or thread is threading.current_thread():
                return
            thread.join()
            waited = thread

    def report(self, now: Snapshot) -> dict[str, Any]:
        """For `Gallery.info`: what was asked for, what is used, and what it was measured to miss."""
        search, index = DEFAULTS | now.meta.search, now.index
        return {
            "kind": search["kind"],
            "recall": search["recall"],
            "used": "exact" if index is None else index.measured.kind,
            "building": self._busy,
            "measured": None if index is None else asdict(index.measured),
            "missed_the_target": [asdict(measured) for measured in self._missed] if index is None else [],
        }

    def _work(self, now: Snapshot, search: dict[str, Any], epoch: int, afresh: bool) -> None:
        try:
            index = self._cached(search) if now.index is None else None
            if index is not None:
                self._adopt(index, epoch)
            if index is None or _stale(now.indexed(index), afresh):
                index = self._built(now, search)
                self._adopt(index, epoch)
                if index is not None:
                    self._save(index, epoch)
        except Cancelled:
            pass
        except Exception:  # nothing is lost: searches stay exact
            logger.exception("Building the index of the gallery %s failed; its searches stay exact", self._cache.parent)
            self._missed = tuple(Measured(kind, 0, 0, 0.0, 0.0, 0, len(now)) for kind in _kinds(search))
        finally:
            self._busy = False
            self._adopt(None, epoch)

    def _built(self, now: Snapshot, search: dict[str, Any]) -> Index | None:
        """The first kind that meets the target."""
        missed: list[Measured] = []
        rows = np.arange(len(now.matrix)) if now.alive is None else np.flatnonzero(now.alive)
        for kind in _kinds(search):
            index = Index.build(
                kind,
                now.row_ids,
                now.matrix,
                now.row_codes,
                rows=rows,
                recall=search["recall"],
                thorough=search["kind"] != "auto",
                cancelled=self._given_up,
            )
            if _fits(index.measured, search):
                self._missed = ()
                return index
            missed.append(index.measured)
        self._missed = tuple(missed)
        logger.warning(
            "No index of the gallery %s decided %g of the probes as exact search does (the best one: %g), so that its "
            "searches stay exact; configure(search_recall=...) sets a lower target",
            self._cache.parent,
            search["recall"],
            max(measured.decisions for measured in missed),
        )
        return None

    def _hopeless(self, now: Snapshot, search: dict[str, Any]) -> bool:
        """Whether what is wanted was tried on about as many templates."""
        tried = {measured.kind for measured in self._missed}
        return tried.issuperset(_kinds(search)) and all(
            not measured.meets(search["recall"]) and len(now) < GROWN * measured.templates for measured in self._missed
        )

    def _cached(self, search: dict[str, Any]) -> Index | None:
        known = search["index"]
        if known is None or not _fits(Measured(**known["measured"]), search):
            return None
        return Index.read(self._cache / file_name(known), known)

    def _save(self, index: Index, epoch: int) -> None:
        if self._note is None:
            return
        path = self._cache / "index.new"
        try:
            with self._writing:
                if epoch != self.epoch:
                    return
                known = index.save(path)
            self._note(known, path, epoch)
        except (OSError, GalleryError) as error:
            if not self._given_up():  # closed in between
                logger.warning("The index of the gallery %s could not be cached: %s", self._cache.parent, error)
            with suppress(OSError):  # half a file on a disk that is full
                path.unlink()


def file_name(known: dict[str, Any]) -> str:
    """Of a cached index."""
    return f"index-{known['digest']}.faiss"


def publish(path: Path, known: dict[str, Any]) -> None:
    """Give a written index its name, on the disk when this returns."""
    os.replace(path, path.with_name(file_name(known)))
    sync(path.parent)


def tidy(cache: Path, known: dict[str, Any]) -> None:
    """Delete the indexes that no longer count."""
    for path in cache.glob("index*"):
        if path.name != file_name(known):
            path.unlink(missing_ok=True)


def _worthwhile(now: Snapshot, search: dict[str, Any]) -> bool:
    if search["kind"] == "exact":
        return False
    return len(now) >= (AUTO_ROWS if search["kind"] == "auto" else FEWEST_ROWS)


def _kinds(search: dict[str, Any]) -> tuple[Kind, ...]:
    return AUTO_KINDS if search["kind"] == "auto" else (search["kind"],)


def _fits(measured: Measured, search: dict[str, Any]) -> bool:
    return search["kind"] in ("auto", measured.kind) and measured.meets(search["recall"])


def _stale(now: Snapshot, afresh: bool) -> bool:
    """Whether too much is new since the index was built, or gone."""
    assert now.index is not None
    first = int(np.searchsorted(now.row_ids, now.index.last_id, side="right"))
    newer = len(now.row_ids) - first if now.alive is None else int(now.alive[first:].sum())
    gone = now.index.measured.templates - (len(now) - newer)
    return newer + gone > (0 if afresh else STALE_SHARE * now.index.measured.templates)
