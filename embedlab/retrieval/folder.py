"""A gallery in one folder on disk: SQLite is the store of record, and searches run in memory."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedlab._durable import new_folder
from embedlab._types import Embeddings, Ids
from embedlab.retrieval import cohort as cohorts
from embedlab.retrieval import indexing
from embedlab.retrieval import store as storage
from embedlab.retrieval.answers import CheckReport
from embedlab.retrieval.calibration import Calibration
from embedlab.retrieval.cohort import Cohort
from embedlab.retrieval.embedders import Embedder, as_embedder, holds_embedder
from embedlab.retrieval.gallery import Enrollment, Gallery, Normalisation, References, Request, references_of
from embedlab.retrieval.inputs import require_dim
from embedlab.retrieval.search import Index
from embedlab.retrieval.snapshot import Snapshot
from embedlab.retrieval.store import About, Contents, GalleryError, Meta, Store

logger = logging.getLogger("embedlab")

LOAD_BEHIND = 20_000  # templates: fewer are read and verified before `open` returns
VERIFIED_AT_ONCE = 1_024  # templates, between two looks at whether anybody still wants it


class FolderGallery(Gallery):
    """What `Gallery.create` and `Gallery.open` make of a folder.

    Args:
        store: The open database.
        embedder: As handed in.
    """

    def __init__(self, store: Store, embedder: Embedder | None) -> None:
        super().__init__(embedder)
        self._store = store
        self._stale = False
        self._let_go = False
        self._current: Snapshot | None = None
        self._cohort: Cohort | None = None
        self._unverified: Contents | None = None
        self._damage: str | None = None
        self._keeper = indexing.IndexKeeper(
            store.folder / storage.CACHE,
            adopt=self._adopt_index,
            note=None if store.read_only else self._note_index,
            given_up=self._given_up,
        )
        self._reader: threading.Thread | None = None
        if store.salvaging or store.opened.count < LOAD_BEHIND:
            self._load(verify=True)
        else:
            self._reader = threading.Thread(target=self._bring_in, name="embedlab: reading a gallery")
            self._reader.start()

    @classmethod
    def _refuse_taken(cls, place: str | Path) -> None:
        storage.refuse_if_not_empty(Path(place))

    @classmethod
    def _made(
        cls,
        place: str | Path,
        about: About,
        embedder: Embedder | None,
        source: str | Path | None,  # noqa: ARG003 - copied
    ) -> FolderGallery:
        folder = Path(place)
        save = getattr(embedder, "save", None)
        meta = Meta(**vars(about) | {"encoder": callable(save)})
        with new_folder(folder) as building:
            if callable(save):
                save(building / "encoder")
            (building / storage.CACHE).mkdir()
            Store.create(building, meta, references_of(embedder))
        return cls(Store(folder, read_only=False), embedder)

    @classmethod
    def _opened(cls, place: str | Path, embedder: Any, *, read_only: bool, salvage: bool) -> FolderGallery:
        folder = Path(place)
        store = Store(folder, read_only=read_only or salvage, salvage=salvage)
        gallery = None
        try:
            references = [] if embedder is None else store.references()
            gallery = cls(store, None)  # which may go on reading, and whoever wants the store waits for it
            for problem in store.problems:
                logger.warning("Gallery %s: %s", folder, problem)
            if embedder is not None:
                gallery._embedder = gallery._accepted(as_embedder(embedder), references)
        except BaseException:
            (store if gallery is None else gallery).close()  # what reads behind must not lose its connection
            raise
        return gallery

    def close(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._closed = True  # what runs behind sees it and gives up
        self._keeper.wait()
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join()
        with self._mutex:
            if not self._let_go:
                self._let_go = True
                self._store.close(meanwhile)

    def __repr__(self) -> str:
        if self._current is None:
            return f"Gallery({self.address!r}, still reading {self._store.opened.count} templates)"
        return super().__repr__()

    @property
    def address(self) -> str:
        return str(self._store.folder)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def folder(self) -> Path:
        return self._store.folder

    @property
    def verified(self) -> bool:
        return self._current is not None and self._unverified is None and self._damage is None

    def counts(self) -> dict[str, int]:
        now = self._now()
        return dict(sorted(zip(now.names, now.templates.tolist(), strict=True)))

    def metadata(self) -> dict[int, dict[str, Any]]:
        now = self._now()
        return {key: json.loads(note) if note else {} for key, note in zip(now.ids.tolist(), now.metadata, strict=True)}

    def thumbnail(self, template: int) -> bytes | None:
        with self._mutex:
            self._require_present(self._now(), [template], "id")
            return self._store.thumbnails([template]).get(int(template))

    def embeddings(self) -> Embeddings:
        now = self._now()
        vectors = now.vectors.copy() if now.alive is None else now.vectors
        return Embeddings(vectors, now.labels.tolist(), now.ids.copy())

    def _place(self, now: Snapshot) -> dict[str, Any]:  # type: ignore[override]
        return {
            "folder": self.address,
            "encoder_in_folder": now.meta.encoder,
            "search": self._keeper.report(now),
            "bytes": sum(map(_size, self.folder.rglob("*"))),
        }

    def _add(self, wanted: Enrollment) -> Ids:
        names, notes, vectors, key = wanted.names, wanted.notes, wanted.vectors, wanted.key
        with self._mutex:
            if key is not None and (known := self._repeated(key, wanted.content)) is not None:
                return known
            assert vectors is not None
            self._refuse_cohort(self._now().meta, vectors, names, "the templates to enroll")
            with self._changing() as (meta, now, publish):
                require_dim(vectors.shape[1], meta.dim)  # two first enrollments at once may disagree
                meta.dim = vectors.shape[1]
                ids = self._store.insert(meta, names, notes, vectors, wanted.ids)
                if wanted.thumbnails:
                    pairs = zip(ids.tolist(), wanted.thumbnails, strict=True)
                    self._store.write_thumbnails(meta, {template: image for template, image in pairs if image})
                if wanted.references and not meta.references:
                    self._store.write_references(meta, wanted.references)
                if key is not None:
                    self._store.remember(meta, key, int(ids[0]), len(names), wanted.content)
                publish(lambda: now.appended(Contents(meta, ids, names, notes, vectors, 0)))
        return ids

    def _succeed(self, last_id: int, requests: list[tuple[str, int, int, bytes]]) -> None:
        with self._changing() as (meta, now, publish):
            self._store.succeed(meta, last_id, requests)
            publish(lambda: now.described(meta))

    def _take_out(
        self, wanted: list[Any], kind: Literal["label", "id"], *, purge: bool, request: Request | None
    ) -> int:
        with self._mutex:
            done = self._done(request)
            count = self._remove(wanted, kind, request) if done is None else done[1]
            if purge and count:
                self._forget_index()
                self._store.erase_traces()
            return count

    def _remove(self, wanted: list[Any], kind: Literal["label", "id"], request: Request | None) -> int:
        now = self._now()
        self._require_present(now, wanted, kind)
        if not wanted:
            return 0
        if kind == "label":
            keep = ~np.isin(now.codes, [code for label in wanted if (code := now.code_of(label)) is not None])
        else:
            keep = ~np.isin(now.ids, wanted)
        gone = now.ids[~keep]
        with self._changing() as (meta, now, publish):
            self._store.delete(meta, gone)
            self._remember(meta, request, len(gone))
            publish(lambda: now.kept(meta, keep))
        return len(gone)

    def _relabel(self, old: str, new: str, *, merging: bool, request: Request | None = None) -> int:
        with self._mutex:
            if done := self._done(request):
                return done[1]
            now = self._now()
            self._check_relabelling(now, old, new, merging=merging)
            ids = now.ids[now.codes == now.code_of(old)]
            with self._changing() as (meta, now, publish):
                self._store.relabel(meta, ids, new)
                self._remember(meta, request, len(ids))
                publish(lambda: now.relabelled(meta, old, new))
            return len(ids)

    def _remember(self, meta: Meta, request: Request | None, templates: int) -> None:
        if request is not None:
            self._store.remember(meta, request[0], 0, templates, request[1])

    def _configured(self, settings: dict[str, Any], search: dict[str, Any], wanted: Normalisation) -> None:
        old = self._now().meta
        made = None
        if wanted.kind == "none":
            settings["normalisation"] = None
        elif wanted.asked:
            made = self._made_cohort(wanted)
            kept = old.settings.get("normalisation") or {}
            digests = sorted(map(cohorts.label_digest, wanted.labels or ()))
            settings["normalisation"] = cohorts.as_settings(
                made, kept.get("labels", ()) if wanted.vectors is None else digests
            )
            now = self._now()
            cohorts.refuse_shared(
                made.vectors, settings["normalisation"], now.vectors, now.names, "the enrolled templates"
            )
        if (settings, search) == (old.settings, old.search):
            return
        with self._changing() as (meta, now, publish):
            before, meta.search = meta.settings, search
            if settings != before:
                meta.settings, meta.calibration = settings, None
            if settings.get("normalisation") != before.get("normalisation"):
                self._store.write_cohort(meta, np.zeros((0, 0), np.float32) if made is None else made.vectors)
            publish(lambda: now.described(meta))

    def _keep_calibration(self, found: Calibration, now: Any) -> None:  # noqa: ARG002 - others wait meanwhile
        with self._changing() as (meta, current, publish):
            meta.calibration = found.to_dict()
            publish(lambda: current.described(meta))

    def check(self) -> CheckReport:
        problems: list[str] = []
        if self._reader is not None:
            self._reader.join()
        templates, generation = 0, self._store.opened.generation
        with self._mutex:
            self._require_open()
            try:
                problems += self._store.integrity_problems()
                contents = self._store.load()
                templates, generation = len(contents.ids), contents.meta.generation
                if self._now().meta.generation == generation:
                    problems += _differences(self._snapshot, contents)
                if contents.meta.encoder and not holds_embedder(self.folder / "encoder"):
                    problems.append("the folder encoder is missing, so that images cannot be embedded")
            except storage.GalleryDamaged as error:
                problems.append(str(error))
        return CheckReport(templates, generation, (*problems, *self._store.problems))

    def backup(self, folder: str | Path) -> Path:
        folder = Path(folder)
        storage.refuse_if_not_empty(folder)
        try:
            with self._mutex, new_folder(folder) as building:
                self._require_open()
                self._store.copy_to(building)
                (building / storage.CACHE).mkdir()
                if self._snapshot.meta.encoder:
                    shutil.copytree(self.folder / "encoder", building / "encoder")
                copy = Store(building, read_only=True)
                try:
                    copy.load()
                finally:
                    copy.close()
                for leftover in (storage.DATABASE + "-wal", storage.DATABASE + "-shm"):
                    (building / leftover).unlink(missing_ok=True)
        except OSError as error:
            raise GalleryError(
                f"Copying the gallery {self.folder} to {folder} failed: {error}. Nothing of the copy stays, and the "
                "gallery is as before. Free that disk, or choose another."
            ) from error
        return folder

    def compact(self) -> int:
        with self._mutex:
            self._require_open()
            before = self.info()["bytes"]
            self._store.compact()
            self._current = self._keeper.tended(self._now().compacted(), afresh=True)
            return int(before - self.info()["bytes"])

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _keeps_embedder(self) -> bool:
        return self._store.opened.encoder

    def _kept_embedder(self) -> Embedder:
        if not self._keeps_embedder():
            raise ValueError(
                f"The gallery {self.address} was made with the function {self.fingerprint}, which cannot be "
                "stored; hand it to Gallery.open(folder, function), or pass embeddings=."
            )
        return as_embedder(self.folder / "encoder")

    def _references(self) -> References:
        return self._store.references()

    def _recall(self, key: str) -> tuple[int, int, bytes] | None:
        return self._store.recall(key)

    def _about(self) -> About:
        return self._store.opened if self._current is None else self._current.meta

    def _require_writable(self) -> None:
        self._store.require_writable()

    @property
    def _snapshot(self) -> Snapshot:
        """What is in memory; waits for what is still being read."""
        if self._current is None:
            with self._mutex:
                if self._current is None:
                    self._require_open()
                    self._load(verify=self._reader is None or not self._reader.is_alive())  # else it verifies next
        assert self._current is not None
        return self._current

    def _load(self, *, verify: bool) -> None:
        with self._mutex:
            contents = self._store.load(verify=verify, cancelled=self._given_up)
            self._unverified = None if verify else contents
            self._current = self._keeper.tended(Snapshot.of(contents))

    def _bring_in(self) -> None:
        """Read the templates, then verify them, behind an opening that has returned."""
        try:
            with self._mutex:
                if self._current is None and not self._given_up():
                    self._load(verify=False)
                contents = self._unverified
            count = 0 if contents is None else len(contents.ids)
            for start in range(0, count, VERIFIED_AT_ONCE):
                assert contents is not None
                bad = storage.misfits(contents, start, min(start + VERIFIED_AT_ONCE, count))
                if bad:
                    self._damage = self._store.damaged(storage.damaged_templates(bad))
                if bad or self._given_up():
                    return
            self._unverified = None
        except GalleryError as error:  # whoever asks next reads again and gets the same answer
            if not self._given_up():
                logger.error("%s", error)
        except Exception:  # no memory, say: whoever asks next reads and verifies by himself
            logger.exception("Verifying the gallery %s broke off; the next question reads it again", self.folder)
            self._current = self._unverified = None

    def _adopt_index(self, index: Index | None, epoch: int) -> None:
        with self._mutex:
            if self._closed:
                return
            now = self._snapshot
            fresh = index is not None and epoch == self._keeper.epoch
            self._current = self._keeper.tended(now.indexed(index) if fresh else now)

    def _note_index(self, known: dict[str, Any], path: Path, epoch: int) -> None:
        """Write the digest of a cached index into the database, so that it may be read again."""
        with self._mutex:
            if self._closed or self._store.broken or epoch != self._keeper.epoch:
                path.unlink(missing_ok=True)
                return
            indexing.publish(path, known)
            with self._changing() as (meta, now, publish):
                meta.search = meta.search | {"index": known | {"generation": now.meta.generation}}
                publish(lambda: now.described(meta))
            indexing.tidy(path.parent, known)

    def _forget_index(self) -> None:
        """Drop an index that holds vectors which must go, and whatever is on its way to the cache."""
        self._keeper.forget()
        self._current = self._keeper.tended(self._snapshot.compacted().indexed(None))

    def _given_up(self) -> bool:
        """Whether nobody can want any more what is done behind."""
        return self._closed or not threading.main_thread().is_alive()

    def _now(self) -> Snapshot:
        """The newest generation that is committed; a search in a writing gallery waits for no lock."""
        self._require_open()
        if self._damage is not None:
            raise storage.GalleryDamaged(self._damage)
        if not self._store.read_only:
            if not self._stale or not self._mutex.acquire(blocking=False):
                return self._snapshot  # a change that is on its way to the disk is not committed yet
            self._mutex.release()
        with self._mutex:
            self._require_open()
            if self._stale:
                self._current, self._stale = Snapshot.of(self._store.load(), self._snapshot.index), False
            elif self._store.read_only and self._store.changed():
                self._stale = True  # a change that cannot be read must not be taken for none
                self._current, self._stale = self._keeper.tended(self._followed(self._snapshot)), False
            return self._snapshot

    def _followed(self, old: Snapshot) -> Snapshot:
        added = self._store.load(after=old.meta.last_id)
        only_added = (
            added.meta.count == len(old) + len(added.ids)
            and added.meta.xor == f"{int(old.meta.xor, 16) ^ added.xor:032x}"  # else a template went or was relabelled
        )
        return old.appended(added) if only_added else Snapshot.of(self._store.load(), old.index)

    @contextmanager
    def _changing(self) -> Iterator[tuple[Meta, Snapshot, Callable[[Callable[[], Snapshot]], None]]]:
        """A transaction whose snapshot is swapped in once it is durable."""
        with self._mutex:
            now = self._now()
            after: list[Callable[[], Snapshot]] = []
            try:
                with self._store.writing() as meta:
                    yield meta, now, after.append
                    self._stale = True  # whatever interrupts from here on: what is on the disk counts
                self._current, self._stale = self._keeper.tended(after[0]()), False
            except (ValueError, GalleryError):
                self._stale = self._stale and not self._store.broken
                raise

    def _scoring(self) -> tuple[Snapshot, Cohort | None]:
        """The newest generation, and the cohort that its scores are normalised with."""
        for _ in range(10):
            now = self._now()
            wanted = now.meta.settings.get("normalisation")
            if wanted is None:
                return now, None
            if self._cohort is None or (self._cohort.name, self._cohort.top) != (wanted["cohort"], wanted["cohort_k"]):
                with self._mutex:
                    self._cohort = Cohort(self._store.cohort(), wanted["cohort_k"])
            cohort = self._cohort
            if cohort.name == wanted["cohort"]:
                return now, cohort
        raise storage.GalleryDamaged(
            f"The gallery {self.folder} is damaged: its cohort is not the one that its settings name. Restore a backup."
        )

    def _made_cohort(self, wanted: Normalisation) -> Cohort:
        """A cohort of new vectors, or of those that are there with another `cohort_k`."""
        now, known = self._scoring()
        vectors, top = wanted.vectors, wanted.cohort_k
        if vectors is None and known is not None:
            vectors, top = known.vectors, top or known.top
        if vectors is None or (wanted.kind is None and known is None):
            raise ValueError(
                'Normalised scores need both: configure(normalisation="as-norm", cohort=...) with images or vectors of '
                "others, who are neither enrolled nor among the strangers of a calibration."
            )
        require_dim(vectors.shape[1], now.meta.dim)
        return Cohort(vectors, cohorts.checked_top(top, len(vectors)))


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):  # an index that was just replaced, the log of a writer that has closed
        return path.stat().st_size if path.is_file() else 0
    return 0


def _differences(now: Snapshot, contents: Contents) -> list[str]:
    same = (
        np.array_equal(now.ids, contents.ids)
        and now.labels.tolist() == contents.labels
        and now.metadata.tolist() == contents.metadata
        and np.array_equal(now.vectors, contents.vectors)
    )
    return [] if same else ["the templates in memory differ from those on the disk"]
