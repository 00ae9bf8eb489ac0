"""The gallery: enroll, remove and name identities without training, durable and honest about strangers."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from embedlab._types import Embeddings, Ids, Neighbours, Vectors
from embedlab.retrieval import store as storage
from embedlab.retrieval._durable import new_folder
from embedlab.retrieval.answers import CheckReport, Identification, Verification
from embedlab.retrieval.calibration import Calibration, calibrate_threshold, match_threshold
from embedlab.retrieval.embedders import Embedder, as_array, as_embedder, image_paths
from embedlab.retrieval.inputs import (
    checked_labels,
    checked_metadata,
    checked_settings,
    counted,
    normalised,
    positive,
    require_dim,
    unique,
)
from embedlab.retrieval.scoring import best_identity, genuine_rates, highest_pairs, identity_scores, neighbours
from embedlab.retrieval.snapshot import Snapshot
from embedlab.retrieval.store import Contents, GalleryError, Meta, Store

logger = logging.getLogger("embedlab")


class Gallery:
    """Identities with their templates in one folder on disk.

    Made by `Gallery.create` and `Gallery.open`; a context manager. Whatever changes a gallery is all or nothing and
    durable when the call returns. One process writes; any number may read, and follow the writer. Several threads may
    share one object.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place, Gallery.create(f"{place}/door", dim=2) as gallery:
        ...     _ = gallery.enroll(embeddings=[[1, 0], [0, 1]], labels=["Ada", "Grace"])
        ...     gallery.search(embeddings=[[2, 1]], k=1).labels
        [['Ada']]
    """

    def __init__(self, store: Store, embedder: Embedder | None) -> None:
        self._store = store
        self._embedder = embedder
        self._mutex = threading.RLock()
        self._stale = False
        self._closed = False
        self._snapshot = Snapshot.of(store.load())

    # ---- opening and closing ---------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: str | Path,
        embedder: Any = None,
        *,
        dim: int | None = None,
        fusion: str = "max",
        vote_k: int = 10,
    ) -> Gallery:
        """Make an empty gallery and open it for writing.

        Args:
            folder: Absent or empty; appears whole or not at all.
            embedder: An `Encoder` or the folder of a saved one (copied into the gallery), or a function images ->
                (B, D). None for a gallery of ready-made vectors.
            dim: Numbers per vector; needed without an embedder.
            fusion: How the templates of an identity give one score: "max", the nearest template; "mean", the mean over
                all of them; "vote", the sum of cosines of its templates among the `vote_k` nearest, over `vote_k`.
            vote_k: Templates that vote.

        Raises:
            ValueError: The folder is taken, neither embedder nor dim, or a dim that is not the embedder's.
        """
        folder = Path(folder)
        storage.refuse_if_not_empty(folder)
        settings = checked_settings(fusion, vote_k)
        known = None if embedder is None else as_embedder(embedder)
        if known is None and dim is None:
            raise ValueError("Gallery.create needs an embedder, or dim=... for a gallery of ready-made vectors.")
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 1):
            raise ValueError(f"dim is the whole number of numbers per vector, at least 1; got {dim!r}.")
        if known is not None and known.dim is not None:
            if dim not in (None, known.dim):
                raise ValueError(
                    f"dim={dim} does not fit the embedder, which gives {known.dim} numbers; leave dim out."
                )
            dim = known.dim
        saves = callable(getattr(known, "save", None))
        meta = Meta(storage.new_uuid(), dim, None if known is None else known.fingerprint, saves, settings)
        with new_folder(folder) as building:
            if saves:
                known.save(building / "encoder")  # type: ignore[union-attr]
            (building / storage.CACHE).mkdir()
            Store.create(building, meta)
        return cls(Store(folder, read_only=False), known)

    @classmethod
    def open(
        cls, folder: str | Path, embedder: Any = None, *, read_only: bool = False, salvage: bool = False
    ) -> Gallery:
        """Open a gallery and verify every template.

        Args:
            folder: What `create` made.
            embedder: As in `create`, with the fingerprint that the gallery knows. None takes the encoder in the folder,
                loaded when the first images come.
            read_only: Take no lock, write nothing, follow the writer.
            salvage: Read what is whole of a damaged gallery, and log what is not; implies `read_only`.

        Raises:
            GalleryLocked: Another process has it open for writing.
            GalleryDamaged: The files are not what was last acknowledged.
            ValueError: Another embedder than the gallery was made with.
        """
        folder = Path(folder)
        store = Store(folder, read_only=read_only or salvage, salvage=salvage)
        try:
            gallery = cls(store, None)
            for problem in store.problems:
                logger.warning("Gallery %s: %s", folder, problem)
            if embedder is not None:
                gallery._embedder = gallery._accepted(as_embedder(embedder))
        except BaseException:
            store.close()
            raise
        return gallery

    def close(self) -> None:
        """Let the next writer in; closing twice does nothing."""
        with self._mutex:
            if not self._closed:
                self._closed = True
                self._store.close()

    def __enter__(self) -> Gallery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        now = self._snapshot
        return f"Gallery({str(self.folder)!r}, {len(now.names)} identities, {len(now)} templates, dim={now.meta.dim})"

    # ---- what is in it ---------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where the gallery lies."""
        return self._store.folder

    @property
    def dim(self) -> int | None:
        """Numbers per vector, None before the first ones of a plain function."""
        return self._now().meta.dim

    @property
    def fingerprint(self) -> str | None:
        """Of the embedder; None in a gallery of ready-made vectors."""
        return self._now().meta.fingerprint

    @property
    def embedder(self) -> Embedder:
        """What turns images into vectors; the encoder in the folder is loaded when this is first asked for.

        Raises:
            ValueError: A gallery of ready-made vectors, or a plain function that was not handed to `open`.
        """
        self._require_open()
        with self._mutex:
            if self._embedder is None:
                meta = self._snapshot.meta
                if meta.fingerprint is None:
                    raise ValueError(
                        f"The gallery {self.folder} was made for ready-made vectors (dim={meta.dim}) and has no "
                        "embedder for images=; pass embeddings=, or make a gallery with an embedder."
                    )
                if not meta.encoder:
                    raise ValueError(
                        f"The gallery {self.folder} was made with the function {meta.fingerprint}, which cannot be "
                        "stored; hand it to Gallery.open(folder, function), or pass embeddings=."
                    )
                self._embedder = self._accepted(as_embedder(self.folder / "encoder"))
            return self._embedder

    @property
    def generation(self) -> int:
        """Changes so far."""
        return self._now().meta.generation

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` found, None before."""
        return _calibration(self._now().meta)

    def __len__(self) -> int:
        return len(self._now())

    def __contains__(self, label: object) -> bool:
        return label in self.counts()

    def labels(self) -> list[str]:
        """Enrolled identities in alphabetical order."""
        return list(self._now().names)

    def counts(self) -> dict[str, int]:
        """Templates of each identity."""
        now = self._now()
        return dict(zip(now.names, now.templates.tolist(), strict=True))

    def metadata(self) -> dict[int, dict[str, Any]]:
        """What was given with each template, by id; an empty dict where there was nothing."""
        now = self._now()
        return {key: json.loads(note) if note else {} for key, note in zip(now.ids.tolist(), now.metadata, strict=True)}

    def embeddings(self) -> Embeddings:
        """All templates with labels and ids; a copy."""
        now = self._now()
        return Embeddings(now.vectors.copy(), now.labels.tolist(), now.ids.copy())

    def info(self) -> dict[str, Any]:
        """What a person would ask about this gallery, as JSON knows it.

        `growth` is identities now over identities at calibration: above 1, strangers are taken for somebody more often
        than was promised.
        """
        now = self._now()
        found = _calibration(now.meta)
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return {
            "folder": str(self.folder),
            "format_version": now.meta.format_version,
            "identities": len(now.names),
            "templates": len(now),
            "dim": now.meta.dim,
            "fingerprint": now.meta.fingerprint,
            "encoder_in_folder": now.meta.encoder,
            "settings": now.meta.settings,
            "generation": now.meta.generation,
            "bytes": size,
            "calibrated": found is not None,
            "calibration": None if found is None else found.to_dict(),
            "growth": None if found is None else round(len(now.names) / max(found.gallery_identities or 1, 1), 4),
        }

    # ---- changing it -----------------------------------------------------------------------------------------------

    def enroll(
        self,
        images: Any = None,
        *,
        embeddings: Any = None,
        labels: str | Sequence[str] | None = None,
        metadata: dict[str, Any] | Sequence[dict[str, Any] | None] | None = None,
        key: str | None = None,
    ) -> Ids:
        """Add templates, all or none; durable when this returns.

        Args:
            images: N paths or an array (N, C, H, W), for the embedder.
            embeddings: Or (N, D) vectors, or `Embeddings`; of any norm, they are normalised here.
            labels: N identities, non-empty strings; one string for all. `Embeddings` bring their own.
            metadata: N dicts that JSON can hold, or one for all; `search(where=...)` looks at them.
            key: Name of this request. Repeating a request under the same key (after a lost answer, say) adds nothing
                and returns the first answer, even if these templates have been removed since.

        Returns:
            (N,) ids of the new templates; an id is never given out twice.

        Raises:
            ValueError: Nothing to add, vectors that are not finite or zero or of another dim, labels that do not fit,
                or a key under which another request was made. Nothing is written.
        """
        self._store.require_writable()
        if labels is None and isinstance(embeddings, Embeddings):
            labels = embeddings.labels
        count = counted(images, embeddings)
        names, notes = checked_labels(labels, count), checked_metadata(metadata, count)
        if count == 0:
            raise ValueError("Nothing to enroll: no images and no embeddings came. An empty folder?")
        vectors = None if embeddings is None else self._vectors(None, embeddings)
        # Vectors of the same images may differ in their last bits from call to call: images go by label and note.
        pieces = [json.dumps([names, notes]).encode()] + ([] if vectors is None else [vectors.tobytes()])
        content = storage.content_digest(*pieces)
        if vectors is None and (key is None or self._repeated(key, content) is None):
            vectors = self._vectors(images, None)  # outside the lock: others search and write meanwhile
        with self._mutex:
            if key is not None and (known := self._repeated(key, content)) is not None:
                return known
            assert vectors is not None
            with self._changing() as (meta, now, publish):
                require_dim(vectors.shape[1], meta.dim)  # two first enrollments at once may disagree
                meta.dim = vectors.shape[1]
                ids = self._store.insert(meta, names, notes, vectors)
                if key is not None:
                    self._store.remember(meta, key, int(ids[0]), count, content)
                publish(lambda: now.appended(Contents(meta, ids, names, notes, vectors, 0)))
        return ids

    def remove(
        self,
        labels: str | Sequence[str] | None = None,
        *,
        ids: Sequence[int] | Ids | None = None,
        purge: bool = False,
    ) -> int:
        """Remove identities with all their templates, or single templates.

        Args:
            labels: Identities.
            ids: Or templates.
            purge: Also empty the write-ahead log and the cache before returning, so that no file of the gallery holds
                the vectors any more. Backups, and blocks that the file system has given back, are out of reach.

        Returns:
            Templates removed.

        Raises:
            ValueError: Something is not in the gallery; nothing is removed.
            GalleryError: A reader kept the log in use for 5 s, so that traces remain; the removal itself stands.
        """
        if (labels is None) == (ids is None):
            raise ValueError("remove takes either labels or ids.")
        with self._mutex:
            now = self._now()
            gone = now.labels if labels is not None else now.ids
            wanted = unique([labels] if isinstance(labels, str) else labels if labels is not None else ids)
            self._require_present(wanted, now.names if labels is not None else now.ids.tolist())
            keep = np.array([value not in wanted for value in gone.tolist()], dtype=bool)
            if not wanted:
                return 0
            with self._changing() as (meta, now, publish):
                self._store.delete(meta, now.ids[~keep])
                publish(lambda: now.kept(meta, keep))
            if purge:
                for path in (self.folder / storage.CACHE).glob("*"):
                    path.unlink()
                self._store.truncate_log()
            return int((~keep).sum())

    def rename(self, old: str, new: str) -> int:
        """Give an identity another name that is not in use; returns its templates.

        Raises:
            ValueError: `old` is not enrolled or `new` is.
        """
        with self._mutex:
            if new in self._now().names:
                raise ValueError(f"{new!r} is enrolled already; merge({old!r}, {new!r}) makes one identity of both.")
            return self._relabel(old, new)

    def merge(self, source: str, into: str) -> int:
        """Give all templates of one identity to another; returns how many.

        Raises:
            ValueError: One of them is not enrolled, or both are the same.
        """
        with self._mutex:
            self._require_present([into], self._now().names)
            if source == into:
                raise ValueError(f"{source!r} cannot be merged into itself.")
            return self._relabel(source, into)

    def configure(self, *, fusion: str | None = None, vote_k: int | None = None) -> None:
        """Change what scores mean; a real change makes the gallery uncalibrated. Arguments as in `create`."""
        with self._mutex:
            old = self._now().meta.settings
            settings = checked_settings(fusion or old["fusion"], old["vote_k"] if vote_k is None else vote_k)
            if settings == old:
                return
            with self._changing() as (meta, now, publish):
                meta.settings, meta.calibration = settings, None
                publish(lambda: now.described(meta))

    # ---- asking it -------------------------------------------------------------------------------------------------

    def embed(self, images: Any, **options: Any) -> Embeddings:
        """Vectors of images by the gallery's own embedder, for `embeddings=` of the other methods.

        Args:
            images: What the embedder takes: paths, an array (N, C, H, W), for an `Encoder` also a data source.
            options: Of the embedder's `embed`, such as `on_error` and `batch_size` of an `Encoder`.
        """
        embed: Callable[..., Embeddings] = self.embedder.embed
        return embed(images, **options)

    def search(
        self, images: Any = None, *, embeddings: Any = None, k: int = 10, where: dict[str, Any] | None = None
    ) -> Neighbours:
        """Nearest templates by cosine, exactly.

        Args:
            images: Q paths or an array (Q, C, H, W).
            embeddings: Or (Q, D) vectors.
            k: Neighbours per probe; where the gallery has fewer, id -1, label None, score NaN.
            where: Only templates whose metadata has these values.
        """
        now = self._now()
        queries = self._vectors(images, embeddings)
        return neighbours(now, queries, positive(k), None if where is None else now.rows_where(where))

    def identify(self, images: Any = None, *, embeddings: Any = None, k: int = 10) -> list[Identification]:
        """Name each probe, or say unknown; `k` neighbours come with the answer. Arguments as in `search`."""
        now = self._now()
        queries = self._vectors(images, embeddings)
        near = neighbours(now, queries, positive(k))
        best, scores = best_identity(now, queries)
        found = _calibration(now.meta)
        threshold = None if found is None else found.threshold
        answers = []
        for row, (code, score) in enumerate(zip(best.tolist(), scores, strict=True)):
            known = threshold is not None and bool(score >= np.float32(threshold))  # NaN, an empty gallery: unknown
            guess = now.names[code] if code >= 0 else None
            one = Neighbours(near.ids[row : row + 1], near.labels[row : row + 1], near.scores[row : row + 1])
            label = guess if known else None
            answers.append(Identification(label, float(score), threshold, threshold is not None, one, guess))
        return answers

    def verify(self, label: str, *, image: Any = None, embedding: Any = None) -> Verification:
        """Check a claim, at the verification threshold.

        Args:
            label: The claimed identity.
            image: A path or an array (C, H, W).
            embedding: Or a vector (D,).

        Raises:
            ValueError: The identity is not enrolled.
        """
        now = self._now()
        self._require_present([label], now.names)
        if image is not None and not isinstance(image, str | Path):
            image = image[None] if getattr(image, "ndim", 0) == 3 else image
        probe = self._vectors(image, None if embedding is None else as_array(embedding).reshape(1, -1))
        if len(probe) != 1:
            raise ValueError(f"verify takes one image, got {len(probe)}.")
        score = identity_scores(now, probe, np.array([now.names.index(label)]))[0, 0]
        found = _calibration(now.meta)
        threshold = None if found is None else found.verification_threshold
        accepted = None if threshold is None else bool(score >= np.float32(threshold))
        return Verification(accepted, float(score), threshold, label)

    def calibrate(
        self,
        images: Any = None,
        *,
        embeddings: Any = None,
        labels: Sequence[str | None] | None = None,
        fpir: float = 0.01,
        fmr: float | None = None,
        confidence: float = 0.95,
    ) -> Calibration:
        """Set the thresholds from strangers, so that at most a share `fpir` of them is taken for somebody.

        The strangers must be like those to come, and neither enrolled nor trained on; see `calibrate_threshold`. The
        promise holds for the gallery as it is: one that grows takes more strangers for somebody, and `info` shows how
        much it has grown.

        Args:
            images: N paths or an array (N, C, H, W).
            embeddings: Or (N, D) vectors, or `Embeddings`, which bring their labels.
            labels: N names. Those enrolled mark genuine probes, which give the detection rate and set no threshold;
                other names are strangers; None is a stranger seen once. No labels at all: every image is one of these.
            fpir: Target false-positive identification rate per stranger identity.
            fmr: Target false match rate of `verify`; the same number when None.
            confidence: That the promise holds.

        Returns:
            The calibration, which is stored with the gallery.

        Raises:
            CalibrationError: Too few strangers for the target; says how many it takes.
            ValueError: An empty gallery, or labels that do not fit.
        """
        self._store.require_writable()
        fmr = fpir if fmr is None else fmr
        if not 0 < fmr < 1:
            raise ValueError(f"fmr lies between 0 and 1, got {fmr}; 1 % is 0.01.")
        if labels is None and isinstance(embeddings, Embeddings):
            labels = embeddings.labels
        with self._mutex:
            now = self._now()
            if not len(now):
                raise ValueError(
                    "An empty gallery cannot be calibrated: there is nobody to be taken for. Enroll first."
                )
            probes = self._vectors(images, embeddings)
            names = [None] * len(probes) if labels is None else list(labels)
            if len(names) != len(probes):
                raise ValueError(
                    f"{len(names)} labels do not fit {len(probes)} images; one per image, None for unnamed."
                )
            enrolled = set(now.names)
            genuine = np.array([name in enrolled for name in names], dtype=bool)
            strangers = [name for name in names if name not in enrolled]
            scores = best_identity(now, probes[~genuine])[1]
            found = calibrate_threshold(scores, strangers, fpir=fpir, confidence=confidence)
            pairs, weights = highest_pairs(now, probes[~genuine], strangers, fmr)
            limit, bound, observed = match_threshold(
                pairs, weights, fmr=fmr, effective=found.effective_strangers, confidence=confidence
            )
            found = replace(
                found,
                gallery_identities=len(now.names),
                gallery_templates=len(now),
                verification_threshold=limit,
                fmr=fmr,
                fmr_bound=bound,
                fmr_observed=observed,
            )
            if genuine.any():
                claims = [name for name in names if name in enrolled]
                detected, accepted = genuine_rates(now, probes[genuine], claims, found.threshold, limit)
                found = replace(found, genuine_images=len(claims), detection_rate=detected, true_accept_rate=accepted)
            with self._changing() as (meta, now, publish):
                meta.calibration = found.to_dict()
                publish(lambda: now.described(meta))
        return found

    # ---- keeping it ------------------------------------------------------------------------------------------------

    def check(self) -> CheckReport:
        """Read the files again and check all of it: SQLite's structure, schema, digests, counts, generation."""
        problems: list[str] = []
        templates, generation = 0, self._snapshot.meta.generation
        with self._mutex:
            self._require_open()
            try:
                problems += self._store.integrity_problems()
                contents = self._store.load()
                templates, generation = len(contents.ids), contents.meta.generation
                if self._now().meta.generation == generation:
                    problems += _differences(self._snapshot, contents)
                if contents.meta.encoder and not self.folder.joinpath("encoder", "encoder.json").is_file():
                    problems.append("the folder encoder is missing, so that images cannot be embedded")
            except storage.GalleryDamaged as error:
                problems.append(str(error))
        return CheckReport(templates, generation, (*problems, *self._store.problems))

    def backup(self, folder: str | Path) -> Path:
        """Copy one generation, with the encoder, into a new folder; it appears whole or not at all, verified.

        Raises:
            ValueError: The folder is taken.
        """
        folder = Path(folder)
        storage.refuse_if_not_empty(folder)
        with self._mutex, new_folder(folder) as building:
            self._require_open()
            self._store.copy_to(building)
            (building / storage.CACHE).mkdir()
            if self._snapshot.meta.encoder:
                shutil.copytree(self.folder / "encoder", building / "encoder")
            Gallery.open(building, read_only=True).close()
            for leftover in (storage.DATABASE + "-wal", storage.DATABASE + "-shm"):
                (building / leftover).unlink(missing_ok=True)
        return folder

    def compact(self) -> int:
        """Give free space back to the disk; returns the bytes saved. Needs about twice the size of the database."""
        with self._mutex:
            self._require_open()
            before = self.info()["bytes"]
            self._store.compact()
            return int(before - self.info()["bytes"])

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise GalleryError(f"The gallery {self.folder} is closed; open it again.")

    def _now(self) -> Snapshot:
        """The newest generation that is committed; a search in a writing gallery waits for no lock."""
        self._require_open()
        if not self._stale and not self._store.read_only:
            return self._snapshot
        with self._mutex:
            self._require_open()
            if self._stale:
                self._snapshot, self._stale = Snapshot.of(self._store.load()), False
            elif self._store.read_only and self._store.changed():
                self._snapshot = self._followed(self._snapshot)
            return self._snapshot

    def _followed(self, old: Snapshot) -> Snapshot:
        added = self._store.load(after=old.meta.last_id)
        only_added = (
            added.meta.count == len(old) + len(added.ids)
            and added.meta.xor == f"{int(old.meta.xor, 16) ^ added.xor:032x}"  # else a template went or was relabelled
        )
        return old.appended(added) if only_added else Snapshot.of(self._store.load())

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
                self._snapshot, self._stale = after[0](), False
            except (ValueError, GalleryError):
                self._stale = self._stale and not self._store.broken
                raise

    def _relabel(self, old: str, new: str) -> int:
        now = self._now()
        self._require_present([old], now.names)
        checked_labels([new], 1)
        ids = now.ids[now.labels == old]
        with self._changing() as (meta, now, publish):
            self._store.relabel(meta, ids, new)
            publish(lambda: now.relabelled(meta, old, new))
        return len(ids)

    def _repeated(self, key: str, content: bytes) -> Ids | None:
        if not isinstance(key, str) or not key:
            raise ValueError(f"key is a non-empty string that names the request, got {key!r}.")
        self._require_open()
        known = self._store.recall(key)
        if known is None:
            return None
        first, templates, before = known
        if before != content:
            raise ValueError(
                f"Another request was made under the key {key!r}: it added the templates {first} to "
                f"{first + templates - 1}. A key names one request; use a new one."
            )
        return np.arange(first, first + templates, dtype=np.int64)

    def _require_present(self, wanted: Sequence[Any], present: Sequence[Any]) -> None:
        there = set(present)
        if absent := [value for value in wanted if value not in there]:
            some = ", ".join(repr(value) for value in absent[:5]) + (", ..." if len(absent) > 5 else "")
            kind = "label" if isinstance(absent[0], str) else "id"
            raise ValueError(
                f"{len(absent)} of {len(wanted)} {kind}s are not in the gallery: {some}. Nothing was changed."
            )

    def _accepted(self, embedder: Embedder) -> Embedder:
        meta = self._snapshot.meta
        if meta.fingerprint is None:
            raise ValueError(
                f"The gallery {self.folder} holds ready-made vectors and knows no embedder, so that it cannot tell "
                "whether this one fits; embed the images yourself and pass embeddings=."
            )
        if embedder.fingerprint != meta.fingerprint:
            raise ValueError(
                f"The gallery {self.folder} was made with the embedder {meta.fingerprint}, got {embedder.fingerprint}: "
                "other weights or preprocessing give vectors that cannot be compared. Open it with the embedder that "
                "made it, or enroll the images anew with Gallery.create."
            )
        return embedder

    def _vectors(self, images: Any, embeddings: Any) -> Vectors:
        """Normalised vectors (N, D) from whichever of the two came."""
        self._require_open()
        if (images is None) == (embeddings is None):
            raise ValueError("Pass either images= or embeddings=.")
        if embeddings is None:
            paths = image_paths(images)
            embeddings = self.embedder.embed(images if paths is None else paths)
        if isinstance(embeddings, Embeddings):
            embeddings = embeddings.vectors
        return normalised(as_array(embeddings), self._snapshot.meta.dim)


def _differences(now: Snapshot, contents: Contents) -> list[str]:
    same = (
        np.array_equal(now.ids, contents.ids)
        and now.labels.tolist() == contents.labels
        and now.metadata.tolist() == contents.metadata
        and np.array_equal(now.vectors, contents.vectors)
    )
    return [] if same else ["the templates in memory differ from those on the disk"]


def _calibration(meta: Meta) -> Calibration | None:
    return None if meta.calibration is None else Calibration.from_dict(meta.calibration)
