"""The gallery: enroll, remove and name identities without training, durable and honest about strangers."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from embedlab._types import Embeddings, Ids, Neighbours, Vectors
from embedlab.retrieval import cohort as cohorts
from embedlab.retrieval import indexing
from embedlab.retrieval import store as storage
from embedlab.retrieval._durable import new_folder
from embedlab.retrieval.answers import CheckReport, Identification, Verification
from embedlab.retrieval.calibration import Calibration
from embedlab.retrieval.cohort import Cohort
from embedlab.retrieval.embedders import CallableEmbedder, Embedder, as_embedder, holds_embedder, image_paths
from embedlab.retrieval.inputs import (
    are_images,
    as_rows,
    checked_key,
    checked_labels,
    checked_metadata,
    checked_settings,
    counted,
    listed,
    normalised,
    pooled,
    positive,
    require_dim,
    unique,
    with_quality,
)
from embedlab.retrieval.pictures import thumbnails_of, with_paths
from embedlab.retrieval.promise import Strangers, Targets, left_out, promise, with_genuine
from embedlab.retrieval.references import embed_references, image_shape, reference_images, require_unchanged
from embedlab.retrieval.scoring import best_identity, identity_scores, nearest_identities, neighbours
from embedlab.retrieval.search import Index
from embedlab.retrieval.snapshot import Snapshot
from embedlab.retrieval.store import Contents, GalleryError, Meta, Store

logger = logging.getLogger("embedlab")

LOAD_BEHIND = 20_000  # templates: fewer are read and verified before `open` returns
VERIFIED_AT_ONCE = 1_024  # templates, between two looks at whether anybody still wants it


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
        self._let_go = False
        self._current: Snapshot | None = None
        self._cohort: Cohort | None = None
        self._warned = False
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
        search: str = "auto",
        search_recall: float = 0.999,
        thumbnails: bool = False,
    ) -> Gallery:
        """Make an empty gallery and open it for writing.

        Args:
            folder: Absent or empty; appears whole or not at all.
            embedder: An `Encoder`, the folder of a saved one or an ONNX file (copied into the gallery), or a function
                images -> (B, D). None for a gallery of ready-made vectors.
            dim: Numbers per vector; needed without an embedder.
            fusion: How the templates of an identity give one score: "max", the nearest template; "mean", the mean over
                all of them; "vote", the sum of cosines of its templates among the `vote_k` nearest, over `vote_k`.
            vote_k: Templates that vote.
            search: How neighbours are found: "exact"; "ivf" or "hnsw", by an index; "auto", by an index in a large
                gallery. An index is used only where it meets `search_recall`, and searches are exact until it is built.
            search_recall: Share of probes that must be decided as by exact search, at the worst threshold, as measured
                on the gallery's own vectors.
            thumbnails: Keep a small picture of every image that is enrolled, for people who look at answers: a JPEG of
                at most 128 pixels a side. It goes when its template goes.

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
        meta.thumbnails = bool(thumbnails)
        meta.search = indexing.checked_search(search, search_recall)
        with new_folder(folder) as building:
            if saves:
                known.save(building / "encoder")  # type: ignore[union-attr]
            (building / storage.CACHE).mkdir()
            Store.create(building, meta, () if known is None else _references(known, None))
        return cls(Store(folder, read_only=False), known)

    @classmethod
    def open(
        cls, folder: str | Path, embedder: Any = None, *, read_only: bool = False, salvage: bool = False
    ) -> Gallery:
        """Open a gallery and verify every template.

        A large gallery returns at once, and its templates are read and then verified behind it: the first question
        waits until they are read, `verified` tells when they are verified, and `check` waits for it. Damage that is
        found behind is an error of every later call.

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

    def close(self) -> None:
        """Let the next writer in; closing twice does nothing."""
        self._closed = True  # what runs behind sees it and gives up
        self._keeper.wait()
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join()
        with self._mutex:
            if not self._let_go:
                self._let_go = True
                self._store.close()

    def __enter__(self) -> Gallery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        now = self._current
        if now is None:
            return f"Gallery({str(self.folder)!r}, still reading {self._store.opened.count} templates)"
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
                self._embedder = self._accepted(as_embedder(self.folder / "encoder"), self._store.references())
            return self._embedder

    @property
    def generation(self) -> int:
        """Changes so far."""
        return self._now().meta.generation

    @property
    def verified(self) -> bool:
        """Whether every template has been compared with its digest; False for a while after opening a large gallery."""
        return self._current is not None and self._unverified is None and self._damage is None

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` found, None before."""
        return _calibration(self._now().meta)

    def __len__(self) -> int:
        return len(self._now())

    def __contains__(self, label: object) -> bool:
        return self._now().code_of(label) is not None

    def labels(self) -> list[str]:
        """Enrolled identities in alphabetical order."""
        return sorted(self._now().names)

    def counts(self) -> dict[str, int]:
        """Templates of each identity."""
        now = self._now()
        return dict(sorted(zip(now.names, now.templates.tolist(), strict=True)))

    def metadata(self) -> dict[int, dict[str, Any]]:
        """What was given with each template, by id; an empty dict where there was nothing."""
        now = self._now()
        return {key: json.loads(note) if note else {} for key, note in zip(now.ids.tolist(), now.metadata, strict=True)}

    def thumbnail(self, template: int) -> bytes | None:
        """The small picture of a template, a JPEG; None where none is kept.

        Args:
            template: Its id.

        Raises:
            ValueError: No such template.
        """
        with self._mutex:
            self._require_present(self._now(), [template], "id")
            return self._store.thumbnails([template]).get(int(template))

    def embeddings(self) -> Embeddings:
        """All templates with labels and ids; a copy."""
        now = self._now()
        vectors = now.vectors.copy() if now.alive is None else now.vectors
        return Embeddings(vectors, now.labels.tolist(), now.ids.copy())

    def info(self) -> dict[str, Any]:
        """What a person would ask about this gallery, as JSON knows it.

        `growth` is identities now over identities at calibration: above 1, strangers are taken for somebody more often
        than was promised.
        """
        now = self._now()
        found = _calibration(now.meta)
        size = sum(map(_size, self.folder.rglob("*")))
        return {
            "folder": str(self.folder),
            "format_version": now.meta.format_version,
            "identities": len(now.names),
            "templates": len(now),
            "dim": now.meta.dim,
            "fingerprint": now.meta.fingerprint,
            "encoder_in_folder": now.meta.encoder,
            "thumbnails": now.meta.thumbnails,
            "settings": now.meta.settings,
            "generation": now.meta.generation,
            "search": self._keeper.report(now),
            "verified": self.verified,
            "bytes": size,
            "calibrated": found is not None,
            "stale": found is not None and found.is_stale(len(now.names)),
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
        quality: float | Sequence[float] | None = None,
        key: str | None = None,
    ) -> Ids:
        """Add templates, all or none; durable when this returns.

        Args:
            images: N paths or an array (N, C, H, W), for the embedder.
            embeddings: Or (N, D) vectors, or `Embeddings`; of any norm, they are normalised here.
            labels: N identities, non-empty strings; one string for all. `Embeddings` bring their own.
            metadata: N dicts that JSON can hold, or one for all; `search(where=...)` looks at them. The path of an
                image file stands there as "path", unless something else does.
            quality: N weights above 0 and at most 1, or one for all, for `fusion="mean"`: the score of an identity is
                the mean over its templates so weighted. "max" and "vote" ignore them. Kept as metadata "quality".
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
        paths = _paths(images, embeddings)
        names, notes = checked_labels(labels, count), with_quality(checked_metadata(metadata, count), quality)
        if count == 0:
            raise ValueError("Nothing to enroll: no images and no embeddings came. An empty folder?")
        vectors = None if embeddings is None else self._vectors(None, embeddings)
        # Vectors of the same images may differ in their last bits from call to call: images go by label and note.
        content = (
            b""
            if key is None
            else storage.content_digest(
                json.dumps([names, notes]).encode(), *([] if vectors is None else [vectors.tobytes()])
            )
        )
        if vectors is None and (key is None or self._repeated(key, content) is None):
            vectors = self._vectors(images, None)  # outside the lock: others search and write meanwhile
        notes = with_paths(notes, paths)
        small, references = self._pictures(images, paths)
        with self._mutex:
            if key is not None and (known := self._repeated(key, content)) is not None:
                return known
            assert vectors is not None
            self._refuse_cohort(self._now().meta, vectors, names, "the templates to enroll")
            with self._changing() as (meta, now, publish):
                require_dim(vectors.shape[1], meta.dim)  # two first enrollments at once may disagree
                meta.dim = vectors.shape[1]
                ids = self._store.insert(meta, names, notes, vectors)
                if small:
                    pairs = zip(ids.tolist(), small, strict=True)
                    self._store.write_thumbnails(meta, {template: image for template, image in pairs if image})
                if references and not meta.side["reference"][0]:
                    self._store.write_references(meta, references)
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
            purge: Also write the database anew and empty the write-ahead log and the cache before returning, so that
                no file of the gallery holds the vectors or thumbnails any more; takes as long, and as much disk, as
                `compact`. Backups, and blocks that the file system has given back, are out of reach.

        Returns:
            Templates removed.

        Raises:
            ValueError: Something is not in the gallery; nothing is removed.
            GalleryError: Traces remain, in the files that it names, because a reader kept the log in use for 5 s or a
                cache could not be deleted; the removal itself stands.
        """
        if (labels is None) == (ids is None):
            raise ValueError("remove takes either labels or ids.")
        with self._mutex:
            now = self._now()
            wanted = unique(ids, "id") if labels is None else unique(labels, "label")
            self._require_present(now, wanted, "id" if labels is None else "label")
            if not wanted:
                return 0
            if labels is not None:
                keep = ~np.isin(now.codes, [code for label in wanted if (code := now.code_of(label)) is not None])
            else:
                keep = ~np.isin(now.ids, wanted)
            with self._changing() as (meta, now, publish):
                self._store.delete(meta, now.ids[~keep])
                publish(lambda: now.kept(meta, keep))
            if purge:
                self._forget_index()
                self._store.erase_traces()
            return int((~keep).sum())

    def rename(self, old: str, new: str) -> int:
        """Give an identity another name that is not in use; returns its templates.

        Raises:
            ValueError: `old` is not enrolled or `new` is.
        """
        with self._mutex:
            if new in self:
                raise ValueError(f"{new!r} is enrolled already; merge({old!r}, {new!r}) makes one identity of both.")
            return self._relabel(old, new)

    def merge(self, source: str, into: str) -> int:
        """Give all templates of one identity to another; returns how many.

        Raises:
            ValueError: One of them is not enrolled, or both are the same.
        """
        with self._mutex:
            self._require_present(self._now(), [into], "label")
            if source == into:
                raise ValueError(f"{source!r} cannot be merged into itself.")
            return self._relabel(source, into)

    def configure(
        self,
        *,
        fusion: str | None = None,
        vote_k: int | None = None,
        normalisation: str | None = None,
        cohort: Any = None,
        cohort_k: int | None = None,
        search: str | None = None,
        search_recall: float | None = None,
    ) -> None:
        """Change what scores mean; a real change makes the gallery uncalibrated. None leaves a setting as it is.

        How neighbours are searched for (`search`, `search_recall`) leaves the calibration as it is: whatever is found
        was scored exactly.

        Args:
            fusion: As in `create`.
            vote_k: As in `create`.
            normalisation: "as-norm" counts scores in standard deviations above those with a cohort of others, see
                `embedlab.retrieval.cohort.Cohort`; "none" is the cosine, and forgets the cohort. Normalised scores
                are computed with every template, whatever `search` says.
            cohort: C images, vectors or `Embeddings` of people or things that are neither enrolled nor among the
                strangers of a calibration; some hundred, one or two images of each. Stored with the gallery, and fixed:
                removing an identity then never changes a decision on another.
            cohort_k: How many of the highest scores with the cohort count; the smaller of 200 and C when None.
            search: As in `create`.
            search_recall: As in `create`.

        Raises:
            ValueError: A setting that does not exist, "as-norm" without a cohort, a cohort that is too small or shares
                images or names with the gallery.
        """
        labels = cohort.labels if isinstance(cohort, Embeddings) else None
        vectors = None
        if cohort is not None:
            vectors = self._vectors(cohort, None) if are_images(cohort) else self._vectors(None, cohort)
        with self._mutex:
            before = self._now().meta
            old = before.settings
            settings = old | checked_settings(fusion or old["fusion"], old["vote_k"] if vote_k is None else vote_k)
            made = None
            if normalisation == "none":
                settings["normalisation"] = None
            elif any(value is not None for value in (normalisation, vectors, cohort_k)):
                made = self._made_cohort(normalisation, vectors, cohort_k)
                kept = old.get("normalisation") or {}
                names = kept.get("labels", ()) if vectors is None else sorted(map(cohorts.label_digest, labels or ()))
                settings["normalisation"] = cohorts.as_settings(made, names)
                now = self._now()
                cohorts.refuse_shared(
                    made.vectors, settings["normalisation"], now.vectors, now.names, "the enrolled templates"
                )
            looking = indexing.checked_search(search, search_recall, before.search)
            if (settings, looking) == (old, before.search):
                return
            with self._changing() as (meta, now, publish):
                if settings != old:
                    meta.settings, meta.calibration = settings, None
                if settings.get("normalisation") != old.get("normalisation"):
                    self._store.write_cohort(meta, np.zeros((0, 0), np.float32) if made is None else made.vectors)
                meta.search = looking
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
        self,
        images: Any = None,
        *,
        embeddings: Any = None,
        k: int = 10,
        per: Literal["template", "identity"] = "template",
        where: dict[str, Any] | None = None,
    ) -> Neighbours:
        """Nearest templates by cosine.

        Scores are exact. In a large gallery a neighbour may be missed, at most as often as `info()["search"]` says;
        `configure(search="exact")` rules that out. A search with `where` is always exact.

        Args:
            images: Q paths or an array (Q, C, H, W).
            embeddings: Or (Q, D) vectors.
            k: Neighbours per probe; where the gallery has fewer, id -1, label None, score NaN.
            per: What `k` counts: "template", or "identity", of which the best template is given.
            where: Only templates whose metadata has these values; a list stands for any of its items, so that
                `{"site": ["north", "west"], "year": 2020}` is (north or west) and 2020.

        Raises:
            ValueError: Vectors, k or per that do not fit.
        """
        now = self._now()
        queries = self._vectors(images, embeddings)
        if per not in ("template", "identity"):
            raise ValueError(f"per is what k counts, 'template' or 'identity'; got {per!r}.")
        ask = neighbours if per == "template" else nearest_identities
        if where is not None and not isinstance(where, dict):
            raise ValueError(f'where is a dict of metadata, such as {{"site": "north"}}; got {where!r}.')
        if where is not None:
            checked_metadata(where, 1)
        return ask(now, queries, positive(k), None if where is None else now.where(where))

    def identify(
        self,
        images: Any = None,
        *,
        embeddings: Any = None,
        k: int = 10,
        probes: Sequence[str | int | None] | None = None,
        quality: Sequence[float] | None = None,
    ) -> list[Identification]:
        """Name each probe, or say unknown; `k` neighbours come with the answer.

        Several images of one probe, such as the frames of one visit, are one question: the probe is the normalised
        mean of their vectors. The mean keeps what the images have in common and averages out what each has of its own,
        and it is a vector like any other, so that search, fusion, normalisation and calibration stay as they are. A
        gallery that is asked with several images per probe should be calibrated with as many.

        Args:
            images: N paths or an array (N, C, H, W).
            embeddings: Or (N, D) vectors.
            k: Neighbours per probe.
            probes: N names that say which probe each image belongs to; a None is a probe of its own.
            quality: N weights of the images in their probe, above 0 and at most 1.

        Returns:
            One answer per probe, in the order of their first images; without `probes` one per image.
        """
        now, cohort = self._scoring()
        verified, queries = self.verified, pooled(self._vectors(images, embeddings), probes, quality)[0]
        near = neighbours(now, queries, positive(k))
        best, scores = best_identity(now, queries, cohort, near)
        found = _calibration(now.meta)
        threshold, stale = None if found is None else found.threshold, self._outgrown(now, found)
        answers = []
        for row, (code, score) in enumerate(zip(best.tolist(), scores, strict=True)):
            known = threshold is not None and bool(score >= np.float32(threshold))  # NaN, an empty gallery: unknown
            guess = now.names[code] if code >= 0 else None
            one = Neighbours(near.ids[row : row + 1], near.labels[row : row + 1], near.scores[row : row + 1])
            label, calibrated = guess if known else None, threshold is not None
            answers.append(
                Identification(label, float(score), threshold, calibrated, one, guess, verified=verified, stale=stale)
            )
        return answers

    def verify(
        self, label: str, *, image: Any = None, embedding: Any = None, quality: Sequence[float] | None = None
    ) -> Verification:
        """Check a claim, at the verification threshold.

        Args:
            label: The claimed identity.
            image: A path or an array (C, H, W); or several, as a list or an array (N, C, H, W), which are one probe as
                in `identify`.
            embedding: Or a vector (D,), or several (N, D).
            quality: N weights of the images, above 0 and at most 1.

        Raises:
            ValueError: The identity is not enrolled, or no image came.
        """
        now, cohort = self._scoring()
        self._require_present(now, [label], "label")
        if image is not None and not isinstance(image, str | Path):
            image = image[None] if getattr(image, "ndim", 0) == 3 else image
        vectors = self._vectors(image, None if embedding is None else np.atleast_2d(as_rows(embedding)))
        if not len(vectors):
            raise ValueError("verify takes one image or several of one probe, got none.")
        probe = pooled(vectors, [label] * len(vectors), quality)[0]
        score = float(identity_scores(now, probe, cohort, codes=np.array([now.code_of(label)]))[0, 0])
        found = _calibration(now.meta)
        threshold = None if found is None else found.verification_threshold
        accepted = None if threshold is None else bool(np.float32(score) >= np.float32(threshold))
        return Verification(accepted, score, threshold, label, stale=self._outgrown(now, found))

    def calibrate(
        self,
        images: Any = None,
        *,
        embeddings: Any = None,
        labels: Sequence[str | None] | None = None,
        probes: Sequence[str | int | None] | None = None,
        leave_identity_out: bool = False,
        fpir: float = 0.01,
        fmr: float | None = None,
        confidence: float = 0.95,
        growth: float = 1.0,
    ) -> Calibration:
        """Set the thresholds from strangers, so that at most a share `fpir` of them is taken for somebody.

        The strangers must be like those to come, and neither enrolled nor trained on; see `calibrate_threshold`. The
        promise holds for the gallery as it is and up to `growth` times as many identities; beyond that, answers say
        that they are `stale`.

        Args:
            images: N paths or an array (N, C, H, W).
            embeddings: Or (N, D) vectors, or `Embeddings`, which bring their labels.
            labels: N names. Those enrolled mark genuine probes, which give the detection rate and set no threshold;
                other names are strangers; None is a stranger seen once. No labels at all: every image is one of these.
            probes: N names that say which images are one probe, as in `identify`; all of one label.
            leave_identity_out: Without any strangers, let every enrolled identity play the stranger to all others. A
                makeshift: pictures for enrollment are seldom like those at the door, and the promise holds only as far
                as they are. It takes twice as many identities as strangers: false alarms among them come in twos.
            fpir: Target false-positive identification rate per stranger identity.
            fmr: Target false match rate of `verify`, which takes as many strangers as the same `fpir`; the same number
                when None.
            confidence: That the promise holds.
            growth: Identities up to which it holds over those enrolled now, at most 3; see `rise_with_growth`. Those
                to come must be enrolled like those that are there, with about as many templates; not for "vote".

        Returns:
            The calibration, which is stored with the gallery.

        Raises:
            CalibrationError: Too few strangers for the target; says how many it takes.
            ValueError: An empty gallery, labels that do not fit, a growth that cannot be promised.
        """
        self._store.require_writable()
        targets = Targets(fpir=fpir, fmr=fpir if fmr is None else fmr, confidence=confidence, growth=growth)
        with self._mutex:
            now, cohort = self._scoring()
            if not len(now):
                raise ValueError(
                    "An empty gallery cannot be calibrated: there is nobody to be taken for. Enroll first."
                )
            if leave_identity_out:
                if images is not None or embeddings is not None:
                    raise ValueError(
                        "leave_identity_out takes no images: the enrolled play the strangers. With images of strangers "
                        "leave it out; that is the better calibration."
                    )
                logger.warning(
                    "Gallery %s is calibrated on its own enrollment pictures (leave-identity-out), which are seldom "
                    "like those at the door; calibrate with pictures of strangers taken there as soon as you can.",
                    self.folder,
                )
                found = promise(now, cohort, left_out(now), targets)
            else:
                vectors, names = self._named_probes(images, embeddings, labels, probes)
                genuine = np.array([now.code_of(name) is not None for name in names], dtype=bool)
                strangers = [name for name in names if now.code_of(name) is None]
                found = promise(now, cohort, Strangers(vectors[~genuine], strangers), targets)
                if genuine.any():
                    claims = [name for name in names if name is not None and now.code_of(name) is not None]
                    found = with_genuine(now, cohort, found, vectors[genuine], claims)
                self._warn_of_training(now, names)
            with self._changing() as (meta, now, publish):
                meta.calibration = found.to_dict()
                publish(lambda: now.described(meta))
            self._warned = False
        return found

    # ---- keeping it ------------------------------------------------------------------------------------------------

    def check(self) -> CheckReport:
        """Read the files again and check all of it: SQLite's structure, schema, digests, counts, generation."""
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
        """Copy one generation, with the encoder, into a new folder; it appears whole or not at all, verified.

        Raises:
            ValueError: The folder is taken.
            GalleryError: The disk refused; nothing of the copy stays, and the gallery itself goes on.
        """
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
        """Give free space back to the disk; returns the bytes saved. Needs about twice the size of the database.

        An index that lacks new templates or holds removed ones is built anew behind.
        """
        with self._mutex:
            self._require_open()
            before = self.info()["bytes"]
            self._store.compact()
            self._current = self._keeper.tended(self._now().compacted(), afresh=True)
            return int(before - self.info()["bytes"])

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise GalleryError(f"The gallery {self.folder} is closed; open it again.")

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

    def _relabel(self, old: str, new: str) -> int:
        now = self._now()
        self._require_present(now, [old], "label")
        checked_labels([new], 1)
        ids = now.ids[now.codes == now.code_of(old)]
        with self._changing() as (meta, now, publish):
            self._store.relabel(meta, ids, new)
            publish(lambda: now.relabelled(meta, old, new))
        return len(ids)

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

    def _made_cohort(self, normalisation: str | None, vectors: Vectors | None, cohort_k: int | None) -> Cohort:
        """A cohort of new vectors, or of those that are there with another `cohort_k`."""
        if normalisation not in (None, "as-norm"):
            raise ValueError(f"normalisation is 'as-norm' or 'none'; got {normalisation!r}.")
        now, known = self._scoring()
        if vectors is None and known is not None:
            vectors, cohort_k = known.vectors, cohort_k or known.top
        if vectors is None or (normalisation is None and known is None):
            raise ValueError(
                'Normalised scores need both: configure(normalisation="as-norm", cohort=...) with images or vectors of '
                "others, who are neither enrolled nor among the strangers of a calibration."
            )
        require_dim(vectors.shape[1], now.meta.dim)
        return Cohort(vectors, cohorts.checked_top(cohort_k, len(vectors)))

    def _refuse_cohort(self, meta: Meta, vectors: Vectors, names: Sequence[str | None], where: str) -> None:
        cohort = self._scoring()[1]
        if cohort is not None:
            cohorts.refuse_shared(cohort.vectors, meta.settings["normalisation"], vectors, names, where)

    def _named_probes(self, images: Any, embeddings: Any, labels: Any, probes: Any) -> tuple[Vectors, list[str | None]]:
        """Vector and name of each probe to calibrate with."""
        if labels is None and isinstance(embeddings, Embeddings):
            labels = embeddings.labels
        vectors = self._vectors(images, embeddings)
        names = [None] * len(vectors) if labels is None else listed(labels, "Labels")
        if len(names) != len(vectors):
            raise ValueError(f"{len(names)} labels do not fit {len(vectors)} images; one per image, None for unnamed.")
        for row, name in enumerate(names):
            if name is not None and not isinstance(name, str):
                raise ValueError(
                    f"Labels are strings, or None for a stranger seen once; row {row} is {name!r}. Name numbers as "
                    f"str({name!r}), and what is missing as None."
                )
        self._refuse_cohort(self._now().meta, vectors, names, "the images to calibrate with")  # each, not their mean
        means, codes = pooled(vectors, probes)
        first = np.unique(codes, return_index=True)[1]
        for row, code in enumerate(codes.tolist()):
            if names[row] != names[first[code]]:
                raise ValueError(
                    f"The probe {list(probes)[row]!r} has images of {names[first[code]]!r} and of {names[row]!r}; all "
                    "images of one probe show one identity."
                )
        return means, [names[row] for row in first.tolist()]

    def _outgrown(self, now: Snapshot, found: Calibration | None) -> bool:
        """Whether a calibration is stale, which is logged once."""
        stale = found is not None and found.is_stale(len(now.names))
        if stale and not self._warned and found is not None:
            self._warned = True
            logger.warning(
                "Gallery %s has %d identities, and its calibration was promised for up to %d: strangers are taken for "
                "somebody more often than promised. Calibrate again, with growth= if it is to grow on.",
                self.folder,
                len(now.names),
                int(found.growth * (found.gallery_identities or 0)),
            )
        return stale

    def _warn_of_training(self, now: Snapshot, names: Sequence[str | None]) -> None:
        """Who was trained on is told apart too well: a stranger as much as an enrolled identity."""
        embedder = self._embedder
        if embedder is None and now.meta.encoder:
            with suppress(ImportError):  # ready-made vectors need no torch, not even here
                embedder = self.embedder
        trained_on = getattr(embedder, "trained_on", None)
        known = [name for name in dict.fromkeys(names) if name is not None and trained_on and trained_on(name)]
        if known:
            strangers = [name for name in known if now.code_of(name) is None]
            logger.warning(
                "Gallery %s: the encoder was trained on %d of the identities to calibrate with (%d of them strangers), "
                "first %r. It tells them apart better than those to come: the promise and the detection rate are too "
                "good. Calibrate with identities that it has not seen.",
                self.folder,
                len(known),
                len(strangers),
                known[0],
            )

    def _repeated(self, key: str, content: bytes) -> Ids | None:
        checked_key(key)
        self._require_open()
        with self._mutex:  # what another thread is writing may still be undone
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

    def _require_present(self, now: Snapshot, wanted: Sequence[Any], kind: Literal["label", "id"]) -> None:
        there = (lambda name: now.code_of(name) is not None) if kind == "label" else now.has
        if absent := [value for value in wanted if not there(value)]:
            some = ", ".join(repr(value) for value in absent[:5]) + (", ..." if len(absent) > 5 else "")
            raise ValueError(
                f"{len(absent)} of {len(wanted)} {kind}s are not in the gallery: {some}. Nothing was changed."
            )

    def _accepted(self, embedder: Embedder, references: list[tuple[bytes, Vectors]]) -> Embedder:
        meta = self._store.opened
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
        require_unchanged(embedder, references, self.folder)
        return embedder

    def _pictures(
        self, images: Any, paths: Sequence[str] | None
    ) -> tuple[list[bytes | None], list[tuple[bytes, Vectors]]]:
        """Thumbnails of what is enrolled and, with the first images of a plain function, its reference images."""
        meta = self._now().meta
        shown = meta.thumbnails and (images is not None or paths is not None)
        small = thumbnails_of(images, paths) if shown else []
        first = images is not None and not meta.side["reference"][0]
        return small, _references(self.embedder, images) if first else []

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
        return normalised(as_rows(embeddings), self._snapshot.meta.dim)


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):  # an index that was just replaced, the log of a writer that has closed
        return path.stat().st_size if path.is_file() else 0
    return 0


def _paths(images: Any, embeddings: Any) -> list[str] | None:
    """Of the pictures behind what is enrolled, as far as it is known."""
    return image_paths(images) if images is not None else getattr(embeddings, "paths", None)


def _references(embedder: Embedder, images: Any) -> list[tuple[bytes, Vectors]]:
    """Reference images with their vectors.

    A plain function may want arrays of one shape, or something else than pictures: it gets them with its first images
    and in their shape, and none when it cannot take them.
    """
    if not isinstance(embedder, CallableEmbedder):
        files = reference_images()
        return list(zip(files, embed_references(embedder, files), strict=True))
    if images is None:
        return []
    try:
        files = reference_images(None if embedder.image_size else image_shape(images), channels=embedder.channels)
        return list(zip(files, embed_references(embedder, files), strict=True))
    except Exception as error:  # the function's own, of any kind
        logger.warning("No reference images are kept, the function does not take them: %s", error)
        return []


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
