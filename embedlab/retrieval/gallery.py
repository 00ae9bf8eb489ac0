"""The gallery: enroll, remove and name identities without training, durable and honest about strangers.

What a gallery means stands here: what it accepts, how it decides, what it promises. Where its templates lie is another
matter: in one folder (`embedlab.retrieval.folder`), or on Milvus (`embedlab.retrieval.milvus`).
"""

from __future__ import annotations

import json
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from embedlab._types import Embeddings, Ids, Neighbours, Vectors
from embedlab.retrieval import cohort as cohorts
from embedlab.retrieval import indexing
from embedlab.retrieval import store as storage
from embedlab.retrieval.answers import CheckReport, Identification, Verification
from embedlab.retrieval.calibration import Calibration
from embedlab.retrieval.cohort import Cohort
from embedlab.retrieval.embedders import CallableEmbedder, Embedder, as_embedder, image_paths
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
    unique,
    with_quality,
)
from embedlab.retrieval.pictures import thumbnails_of, with_paths
from embedlab.retrieval.promise import Strangers, Targets, left_out, promise, with_genuine
from embedlab.retrieval.references import embed_references, image_shape, reference_images, require_unchanged
from embedlab.retrieval.scoring import Templates, best_identity, claimed, nearest_identities, neighbours
from embedlab.retrieval.store import About, GalleryError

logger = logging.getLogger("embedlab")

References = list[tuple[bytes, Vectors]]
Request = tuple[str, bytes]  # its key, and the digest that tells a repetition from another request


@dataclass(frozen=True)
class Enrollment:
    """Templates to add, checked.

    Args:
        names: N labels.
        notes: N JSON texts or None.
        vectors: (N, D) of norm 1; None for a request that is known.
        key: Name of the request, if it has one.
        content: Digest that tells a repetition from another request.
        thumbnails: N JPEGs or None, or nothing at all.
        references: Reference images with their vectors, where the gallery lacks them.
        ids: (N,) rising ids that the templates had elsewhere; None gives out new ones.
    """

    names: list[str]
    notes: list[str | None]
    vectors: Vectors | None
    key: str | None
    content: bytes
    thumbnails: list[bytes | None]
    references: References
    ids: Ids | None = None


@dataclass(frozen=True)
class Normalisation:
    """What `configure` was asked for; see there."""

    kind: str | None
    vectors: Vectors | None
    labels: list[str] | None
    cohort_k: int | None

    @property
    def asked(self) -> bool:
        """Whether anything came."""
        return any(value is not None for value in (self.kind, self.vectors, self.cohort_k))


class Gallery(ABC):
    """Identities with their templates, in one folder on disk or on Milvus.

    Made by `Gallery.create` and `Gallery.open`; a context manager. Whatever changes a gallery is all or nothing and
    durable when the call returns. In a folder one process writes, and any number may read and follow the writer; on
    Milvus writers take turns. Several threads may share one object.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place, Gallery.create(f"{place}/door", dim=2) as gallery:
        ...     _ = gallery.enroll(embeddings=[[1, 0], [0, 1]], labels=["Ada", "Grace"])
        ...     gallery.search(embeddings=[[2, 1]], k=1).labels
        [['Ada']]
    """

    def __init__(self, embedder: Embedder | None) -> None:
        self._embedder = embedder
        self._mutex = threading.RLock()
        self._closed = False
        self._warned = False

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
            folder: Absent or empty; appears whole or not at all. Or the address of a gallery on Milvus, such as
                `milvus://host:port/name` or `milvus:FILE.db`: see `embedlab.retrieval.milvus_store.Address`.
            embedder: An `Encoder`, the folder of a saved one or an ONNX file (copied into the gallery; on Milvus its
                path is noted), or a function images -> (B, D). None for a gallery of ready-made vectors.
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
        kind = _kind(folder)
        kind._refuse_taken(folder)
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
        about = About(storage.new_uuid(), dim, None if known is None else known.fingerprint, False, settings)
        about.thumbnails = bool(thumbnails)
        about.search = indexing.checked_search(search, search_recall)
        return kind._made(folder, about, known, embedder if isinstance(embedder, str | Path) else None)

    @classmethod
    def open(
        cls, folder: str | Path, embedder: Any = None, *, read_only: bool = False, salvage: bool = False
    ) -> Gallery:
        """Open a gallery and verify every template.

        A large gallery returns at once, and its templates are read and then verified behind it: the first question
        waits until they are read, `verified` tells when they are verified, and `check` waits for it. Damage that is
        found behind is an error of every later call.

        Args:
            folder: What `create` made, or its address.
            embedder: As in `create`, with the fingerprint that the gallery knows. None takes the encoder in the folder,
                or on Milvus at the path where it was, loaded when the first images come.
            read_only: Take no lock, write nothing, follow the writer.
            salvage: Read what is whole of a damaged gallery, and log what is not; implies `read_only`.

        Raises:
            GalleryLocked: Another process has it open for writing.
            GalleryDamaged: The files are not what was last acknowledged.
            ValueError: Another embedder than the gallery was made with.
        """
        return _kind(folder)._opened(folder, embedder, read_only=read_only, salvage=salvage)

    @abstractmethod
    def close(self) -> None:
        """Let the next writer in; closing twice does nothing."""

    def __enter__(self) -> Gallery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        now = self._now()
        return f"Gallery({self.address!r}, {now.identities} identities, {len(now)} templates, dim={now.meta.dim})"

    # ---- what is in it ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def address(self) -> str:
        """Where the gallery lies, as it was opened."""

    @property
    @abstractmethod
    def name(self) -> str:
        """That of the folder, or on Milvus its own."""

    @property
    def purges(self) -> bool:
        """Whether `remove(purge=True)` can promise that nothing stays; not on Milvus."""
        return True

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the gallery lies; one on Milvus has no folder, and says so."""

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
        """What turns images into vectors; one that the gallery keeps is loaded when this is first asked for.

        Raises:
            ValueError: A gallery of ready-made vectors, or one whose embedder must be handed to `open` and was not.
        """
        self._require_open()
        with self._mutex:
            if self._embedder is None:
                meta = self._about()
                if meta.fingerprint is None:
                    raise ValueError(
                        f"The gallery {self.address} was made for ready-made vectors (dim={meta.dim}) and has no "
                        "embedder for images=; pass embeddings=, or make a gallery with an embedder."
                    )
                self._embedder = self._accepted(self._kept_embedder(), self._references())
            return self._embedder

    @property
    def generation(self) -> int:
        """Changes so far."""
        return self._now().meta.generation

    @property
    @abstractmethod
    def verified(self) -> bool:
        """Whether every template has been compared with its digest; False for a while after opening a large gallery."""

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` found, None before."""
        return _calibration(self._now().meta)

    def __len__(self) -> int:
        return len(self._now())

    def __contains__(self, label: object) -> bool:
        return isinstance(label, str) and bool(self._now().known([label], "label"))

    def labels(self) -> list[str]:
        """Enrolled identities in alphabetical order."""
        return sorted(self._now().names)

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Templates of each identity."""

    @abstractmethod
    def metadata(self) -> dict[int, dict[str, Any]]:
        """What was given with each template, by id; an empty dict where there was nothing."""

    @abstractmethod
    def thumbnail(self, template: int) -> bytes | None:
        """The small picture of a template, a JPEG; None where none is kept.

        Args:
            template: Its id.

        Raises:
            ValueError: No such template.
        """

    @abstractmethod
    def embeddings(self) -> Embeddings:
        """All templates with labels and ids; a copy."""

    def info(self) -> dict[str, Any]:
        """What a person would ask about this gallery, as JSON knows it.

        `growth` is identities now over identities at calibration: above 1, strangers are taken for somebody more often
        than was promised.
        """
        now = self._now()
        found = _calibration(now.meta)
        return {
            **self._place(now),
            "format_version": now.meta.format_version,
            "identities": now.identities,
            "templates": len(now),
            "dim": now.meta.dim,
            "fingerprint": now.meta.fingerprint,
            "thumbnails": now.meta.thumbnails,
            "settings": now.meta.settings,
            "generation": now.meta.generation,
            "verified": self.verified,
            "calibrated": found is not None,
            "stale": found is not None and found.is_stale(now.identities),
            "calibration": None if found is None else found.to_dict(),
            "growth": None if found is None else round(now.identities / max(found.gallery_identities or 1, 1), 4),
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
        self._require_writable()
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
        wanted = Enrollment(names, notes, vectors, key, content, small, references)
        return self._add(wanted)

    def remove(
        self,
        labels: str | Sequence[str] | None = None,
        *,
        ids: Sequence[int] | Ids | None = None,
        purge: bool = False,
        key: str | None = None,
    ) -> int:
        """Remove identities with all their templates, or single templates.

        Args:
            labels: Identities.
            ids: Or templates.
            purge: Also write the database anew and empty the write-ahead log and the cache before returning, so that
                no file of the gallery holds the vectors or thumbnails any more; takes as long, and as much disk, as
                `compact`. Backups, and blocks that the file system has given back, are out of reach.
            key: Name of this request. Repeating it under the same key removes nothing more and returns the first
                answer; with `purge` the files are purged again, since the first time may have been cut off before.

        Returns:
            Templates removed.

        Raises:
            ValueError: Something is not in the gallery, or another request was made under the key; nothing is removed.
            GalleryError: Traces remain, in the files that it names, because a reader kept the log in use for 5 s or a
                cache could not be deleted; the removal itself stands.
        """
        if (labels is None) == (ids is None):
            raise ValueError("remove takes either labels or ids.")
        kind: Literal["label", "id"] = "id" if labels is None else "label"
        self._require_writable()
        wanted = unique(ids if labels is None else labels, kind)
        return self._take_out(wanted, kind, purge=purge, request=_request(key, "remove", kind, wanted))

    def rename(self, old: str, new: str, *, key: str | None = None) -> int:
        """Give an identity another name that is not in use; returns its templates.

        Args:
            old: Its name.
            new: The other one.
            key: Name of this request; repeating it under the same key changes nothing and returns the first answer.

        Raises:
            ValueError: `old` is not enrolled, `new` is, or another request was made under the key.
        """
        self._require_writable()
        return self._relabel(old, new, merging=False, request=_request(key, "rename", old, new))

    def merge(self, source: str, into: str) -> int:
        """Give all templates of one identity to another; returns how many.

        Raises:
            ValueError: One of them is not enrolled, or both are the same.
        """
        return self._relabel(source, into, merging=True)

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
        if normalisation not in (None, "none", "as-norm"):
            raise ValueError(f"normalisation is 'as-norm' or 'none'; got {normalisation!r}.")
        wanted = Normalisation(normalisation, vectors, labels, cohort_k)
        with self._mutex:
            before = self._now().meta
            old = before.settings
            settings = old | checked_settings(fusion or old["fusion"], old["vote_k"] if vote_k is None else vote_k)
            looking = indexing.checked_search(search, search_recall, before.search)
            self._configured(settings, looking, wanted)

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
        for row, (guess, score) in enumerate(zip(best, scores, strict=True)):
            known = threshold is not None and bool(score >= np.float32(threshold))  # NaN, an empty gallery: unknown
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
        score = float(claimed(now, probe, cohort, label)[0])
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
        self._require_writable()
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
                    self.address,
                )
                found = promise(now, cohort, left_out(now), targets)
            else:
                vectors, names = self._named_probes(images, embeddings, labels, probes)
                enrolled = now.known({name for name in names if name is not None}, "label")
                genuine = np.array([name in enrolled for name in names], dtype=bool)
                strangers = [name for name in names if name not in enrolled]
                found = promise(now, cohort, Strangers(vectors[~genuine], strangers), targets)
                if genuine.any():
                    claims = [name for name in names if name is not None and name in enrolled]
                    found = with_genuine(now, cohort, found, vectors[genuine], claims)
                self._warn_of_training(names, enrolled)
            self._keep_calibration(found, now)
            self._warned = False
        return found

    # ---- keeping it ------------------------------------------------------------------------------------------------

    @abstractmethod
    def check(self) -> CheckReport:
        """Read the files again and check all of it: SQLite's structure, schema, digests, counts, generation."""

    @abstractmethod
    def backup(self, folder: str | Path) -> Path:
        """Copy one generation, with the encoder, into a new folder; it appears whole or not at all, verified.

        Raises:
            ValueError: The folder is taken.
            GalleryError: The disk refused; nothing of the copy stays, and the gallery itself goes on.
        """

    @abstractmethod
    def compact(self) -> int:
        """Give free space back to the disk; returns the bytes saved. Needs about twice the size of the database.

        An index that lacks new templates or holds removed ones is built anew behind.
        """

    # ---- inside: the same wherever the templates lie ---------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise GalleryError(f"The gallery {self.address} is closed; open it again.")

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

    def _outgrown(self, now: Templates, found: Calibration | None) -> bool:
        """Whether a calibration is stale, which is logged once."""
        stale = found is not None and found.is_stale(now.identities)
        if stale and not self._warned and found is not None:
            self._warned = True
            logger.warning(
                "Gallery %s has %d identities, and its calibration was promised for up to %d: strangers are taken for "
                "somebody more often than promised. Calibrate again, with growth= if it is to grow on.",
                self.address,
                now.identities,
                int(found.growth * (found.gallery_identities or 0)),
            )
        return stale

    def _warn_of_training(self, names: Sequence[str | None], enrolled: set[Any]) -> None:
        """Who was trained on is told apart too well: a stranger as much as an enrolled identity."""
        embedder = self._embedder
        if embedder is None and self._keeps_embedder():
            with suppress(ImportError):  # ready-made vectors need no torch, not even here
                embedder = self.embedder
        trained_on = getattr(embedder, "trained_on", None)
        known = [name for name in dict.fromkeys(names) if name is not None and trained_on and trained_on(name)]
        if known:
            strangers = [name for name in known if name not in enrolled]
            logger.warning(
                "Gallery %s: the encoder was trained on %d of the identities to calibrate with (%d of them strangers), "
                "first %r. It tells them apart better than those to come: the promise and the detection rate are too "
                "good. Calibrate with identities that it has not seen.",
                self.address,
                len(known),
                len(strangers),
                known[0],
            )

    def _repeated(self, key: str, content: bytes) -> Ids | None:
        """Ids that an enrollment under this key has given out, if it was made before."""
        known = self._done((checked_key(key), content))
        return None if known is None else np.arange(known[0], sum(known), dtype=np.int64)

    def _done(self, request: Request | None) -> tuple[int, int] | None:
        """First new id (0 for none) and number of templates of the same request, if it was made before."""
        if request is None:
            return None
        self._require_open()
        key, content = request
        with self._mutex:  # what another thread is writing may still be undone
            known = self._recall(key)
        if known is None:
            return None
        first, templates, before = known
        if before != content:
            did = (
                f"added the templates {first} to {first + templates - 1}" if first else f"changed {templates} templates"
            )
            raise storage.AnotherRequest(
                f"Another request was made under the key {key!r}: it {did}. A key names one request; use a new one."
            )
        return first, templates

    def _require_present(self, now: Templates, wanted: Sequence[Any], kind: Literal["label", "id"]) -> None:
        _refuse_absent(wanted, now.known(wanted, kind), kind)

    def _check_relabelling(self, now: Templates, old: str, new: str, *, merging: bool) -> None:
        """Raise unless `old` may become `new`."""
        known = now.known([old, new], "label")
        if merging:
            _refuse_absent([new], known, "label")
            if old == new:
                raise ValueError(f"{old!r} cannot be merged into itself.")
        elif new in known:
            raise ValueError(f"{new!r} is enrolled already; merge({old!r}, {new!r}) makes one identity of both.")
        _refuse_absent([old], known, "label")
        checked_labels([new], 1)

    def _accepted(self, embedder: Embedder, references: References) -> Embedder:
        meta = self._about()
        if meta.fingerprint is None:
            raise ValueError(
                f"The gallery {self.address} holds ready-made vectors and knows no embedder, so that it cannot tell "
                "whether this one fits; embed the images yourself and pass embeddings=."
            )
        if embedder.fingerprint != meta.fingerprint:
            raise ValueError(
                f"The gallery {self.address} was made with the embedder {meta.fingerprint}, got "
                f"{embedder.fingerprint}: other weights or preprocessing give vectors that cannot be compared. Open it "
                "with the embedder that made it, or enroll the images anew with Gallery.create."
            )
        require_unchanged(embedder, references, self.address)
        return embedder

    def _pictures(self, images: Any, paths: Sequence[str] | None) -> tuple[list[bytes | None], References]:
        """Thumbnails of what is enrolled and, with the first images of a plain function, its reference images."""
        meta = self._about()
        shown = meta.thumbnails and (images is not None or paths is not None)
        small = thumbnails_of(images, paths) if shown else []
        first = images is not None and not meta.references
        return small, references_of(self.embedder, images) if first else []

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
        return normalised(as_rows(embeddings), self._about().dim)

    # ---- inside: where the templates lie ---------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def _refuse_taken(cls, place: str | Path) -> None:
        """Raise unless a new gallery may be made here."""

    @classmethod
    @abstractmethod
    def _made(cls, place: str | Path, about: About, embedder: Embedder | None, source: str | Path | None) -> Gallery:
        """What `create` does when all that was given has been checked; `source` is where the embedder came from."""

    @classmethod
    @abstractmethod
    def _opened(cls, place: str | Path, embedder: Any, *, read_only: bool, salvage: bool) -> Gallery:
        """What `open` does."""

    @abstractmethod
    def _now(self) -> Templates:
        """The newest generation that is committed."""

    @abstractmethod
    def _about(self) -> About:
        """The facts as last seen, without reading a template."""

    def _scoring(self) -> tuple[Templates, Cohort | None]:
        """The newest generation, and the cohort that its scores are normalised with."""
        return self._now(), None

    @abstractmethod
    def _require_writable(self) -> None:
        """Raise unless this object may change the gallery."""

    @abstractmethod
    def _place(self, now: Templates) -> dict[str, Any]:
        """The part of `info` that tells where it lies and how it is searched."""

    @abstractmethod
    def _keeps_embedder(self) -> bool:
        """Whether an embedder can be loaded that was not handed in."""

    @abstractmethod
    def _kept_embedder(self) -> Embedder:
        """Load it, or raise and say how to hand it in."""

    @abstractmethod
    def _references(self) -> References:
        """Reference images with their vectors of old."""

    @abstractmethod
    def _recall(self, key: str) -> tuple[int, int, bytes] | None:
        """First id, number of templates and content digest of the request under a key."""

    @abstractmethod
    def _add(self, wanted: Enrollment) -> Ids:
        """Enroll what has been checked, unless its key is known."""

    @abstractmethod
    def _succeed(self, last_id: int, requests: list[tuple[str, int, int, bytes]]) -> None:
        """Know another gallery's requests (key, first id, templates, content) and give out ids after its last."""

    @abstractmethod
    def _take_out(
        self, wanted: list[Any], kind: Literal["label", "id"], *, purge: bool, request: Request | None
    ) -> int:
        """Remove labels or ids, all or none, unless the request is done; a purge is repeated."""

    @abstractmethod
    def _relabel(self, old: str, new: str, *, merging: bool, request: Request | None = None) -> int:
        """Give the templates of one label another, unless the request is done; checked by `_check_relabelling`."""

    @abstractmethod
    def _configured(self, settings: dict[str, Any], search: dict[str, Any], wanted: Normalisation) -> None:
        """Store settings and how to search; drop the calibration where scores change."""

    @abstractmethod
    def _keep_calibration(self, found: Calibration, now: Templates) -> None:
        """Store what was found on these templates."""

    def _refuse_cohort(self, meta: About, vectors: Vectors, names: Sequence[str | None], where: str) -> None:
        """Raise when images or names of the cohort are among these."""
        cohort = self._scoring()[1]
        if cohort is not None:
            cohorts.refuse_shared(cohort.vectors, meta.settings["normalisation"], vectors, names, where)


def is_address(place: str | Path) -> bool:
    """Whether this names a gallery on Milvus rather than a folder."""
    return isinstance(place, str) and place.startswith("milvus:")


def _kind(place: str | Path) -> type[Gallery]:
    """What keeps a gallery of this name; Milvus is looked at only when it is asked for."""
    if is_address(place):
        from embedlab.retrieval.milvus import MilvusGallery

        return MilvusGallery
    from embedlab.retrieval.folder import FolderGallery

    return FolderGallery


def _request(key: str | None, *content: Any) -> Request | None:
    """A request that names its parts, as far as it has a name."""
    return None if key is None else (checked_key(key), storage.content_digest(json.dumps(content).encode()))


def _refuse_absent(wanted: Sequence[Any], known: set[Any], kind: str) -> None:
    if absent := [value for value in wanted if value not in known]:
        some = ", ".join(repr(value) for value in absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise ValueError(f"{len(absent)} of {len(wanted)} {kind}s are not in the gallery: {some}. Nothing was changed.")


def _paths(images: Any, embeddings: Any) -> list[str] | None:
    """Of the pictures behind what is enrolled, as far as it is known."""
    return image_paths(images) if images is not None else getattr(embeddings, "paths", None)


def references_of(embedder: Embedder | None, images: Any = None) -> References:
    """Reference images with their vectors.

    A plain function may want arrays of one shape, or something else than pictures: it gets them with its first images
    and in their shape, and none when it cannot take them.
    """
    if embedder is None:
        return []
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


def _calibration(meta: About) -> Calibration | None:
    return None if meta.calibration is None else Calibration.from_dict(meta.calibration)
