"""Another encoder under a gallery: embed its images anew, compare, calibrate, and only then let it take the place."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from embedlab._durable import exchange, finish_exchange, new_folder, put_in_place, sweep, sync, write_file
from embedlab._types import Embeddings, Ids, Vectors
from embedlab.data.images import ImageError
from embedlab.data.sources import Source
from embedlab.retrieval import store as storage
from embedlab.retrieval.embedders import CallableEmbedder, Embedder, as_embedder
from embedlab.retrieval.folder import FolderGallery
from embedlab.retrieval.gallery import Enrollment, Gallery, _kind, references_of
from embedlab.retrieval.inputs import as_rows, normalised
from embedlab.retrieval.store import Contents, GalleryError

logger = logging.getLogger("embedlab")

VERSION = 1
MARK, NEW = "migration.json", "gallery"  # in the folder GALLERY.migrating
OWN = {storage.DATABASE, f"{storage.DATABASE}-wal", f"{storage.DATABASE}-shm", storage.LOCK, storage.GENERATION,
       storage.CACHE, "encoder"}  # fmt: skip
AT_ONCE = 256  # templates between two commits: what a kill costs
COMPARED = 2_000  # stored images, at most
SHOWN = 20  # changes that are told one by one
NOTHING_BAD: dict[int, str] = {}


@dataclass(frozen=True)
class Dropped:
    """A template that cannot be embedded anew.

    Args:
        id: Of the template.
        label: Its identity.
        path: Where its image should be, if the gallery knows.
        reason: What is wrong.
    """

    id: int
    label: str
    path: str | None
    reason: str


@dataclass(frozen=True)
class Comparison:
    """The answers of both galleries to the same images.

    Args:
        what: "stored images", each against all others; or "probes".
        images: How many.
        agreement: Share whose best identity is the same in both.
        old_right: Share whose best identity is their own, of those with a label that could be found; None without any.
        new_right: The same in the new gallery.
        gained: Images that only the new gallery gets right.
        lost: Images that only the old one gets right.
        old_score: Mean score of the best.
        new_score: The same in the new gallery: other encoders have other scales, which is why thresholds are set anew.
        old_named: Share that is named rather than unknown; None where a gallery is not calibrated, or not asked.
        new_named: The same in the new gallery.
        changes: The first images whose best identity changed: name, before, after.
    """

    what: str
    images: int
    agreement: float
    old_right: float | None
    new_right: float | None
    gained: int
    lost: int
    old_score: float
    new_score: float
    old_named: float | None = None
    new_named: float | None = None
    changes: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Migration:
    """What became of a gallery under another encoder.

    Args:
        gallery: Where the new gallery lies.
        backup: Where the old one lies now; None where it stayed in its place.
        switched: Whether the new one has the old one's place.
        templates: In the new gallery.
        identities: In the new gallery.
        dropped: Templates that were left out.
        gone: Identities that have lost all their templates by that.
        old_encoder: Fingerprint; None where the gallery held ready-made vectors.
        new_encoder: The same.
        old_dim: Numbers per vector.
        new_dim: The same.
        old_threshold: None where the old gallery was not calibrated.
        calibration: Of the new gallery, as `Calibration.to_dict`; None where it is not calibrated.
        comparisons: Answers side by side.
        seconds: Of this run.
    """

    gallery: str
    backup: str | None
    switched: bool
    templates: int
    identities: int
    dropped: tuple[Dropped, ...]
    gone: tuple[str, ...]
    old_encoder: str | None
    new_encoder: str | None
    old_dim: int | None
    new_dim: int | None
    old_threshold: float | None
    calibration: dict[str, Any] | None
    comparisons: tuple[Comparison, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Migration:
        """The inverse of `to_dict`, also after a way through JSON."""
        comparisons = [
            Comparison(**one | {"changes": tuple(map(tuple, one["changes"]))}) for one in content["comparisons"]
        ]
        dropped = tuple(Dropped(**one) for one in content["dropped"])
        rest = {"comparisons": tuple(comparisons), "dropped": dropped, "gone": tuple(content["gone"])}
        return cls(**content | rest)

    def to_text(self) -> str:
        """A table of old and new side by side."""

        def shown(value: float | None, share: bool = True) -> str:
            return "-" if value is None else f"{100 * value:.1f} %" if share else f"{value:.3f}"

        new = None if self.calibration is None else self.calibration["threshold"]
        rows: list[tuple[str, str, str]] = [
            ("encoder", self.old_encoder or "ready-made vectors", self.new_encoder or "ready-made vectors"),
            ("numbers per vector", str(self.old_dim), str(self.new_dim)),
            ("threshold", shown(self.old_threshold, share=False), shown(new, share=False)),
        ]
        for one in self.comparisons:
            rows.append((f"{one.images} {one.what}", "", f"same best identity: {shown(one.agreement)}"))
            rows.append(
                ("  mean score of the best", shown(one.old_score, share=False), shown(one.new_score, share=False))
            )
            if one.old_right is not None:
                change = f"{shown(one.new_right)} (+{one.gained}, -{one.lost})"
                rows.append(("  best identity is right", shown(one.old_right), change))
            if one.old_named is not None or one.new_named is not None:
                rows.append(("  named, not unknown", shown(one.old_named), shown(one.new_named)))
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{'':{wide[0]}}  {'old':{wide[1]}}  new", *(f"{a:{wide[0]}}  {b:{wide[1]}}  {c}" for a, b, c in rows)]
        lines += [
            f"  {name}: {before} -> {after}" for one in self.comparisons for name, before, after in one.changes[:5]
        ]
        if self.dropped:
            lines.append(f"left out: {len(self.dropped)} templates, first {_named(self.dropped[0])}")
        if self.gone:
            lines.append(f"identities without any template left: {', '.join(self.gone[:10])}")
        where = f"the old gallery is {self.backup}" if self.switched else "the old gallery is as it was"
        lines.append(f"{self.gallery}: {self.templates} templates of {self.identities} identities; {where}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Recalibration:
    """How the new gallery gets its threshold; arguments as in `Gallery.calibrate`, those that are None as before.

    Args:
        strangers: Images of people or things that are not enrolled: paths, a `Source`, or an array (N, C, H, W).
        labels: N names; a `Source` brings its own.
        one_probe: All images of a label are one probe.
        leave_identity_out: Instead of strangers.
        fpir: Target false-positive identification rate.
        fmr: Target false match rate.
        growth: Identities up to which it holds over those enrolled.
    """

    strangers: Any = None
    labels: Sequence[str | None] | None = None
    one_probe: bool = False
    leave_identity_out: bool = False
    fpir: float | None = None
    fmr: float | None = None
    growth: float | None = None

    @property
    def given(self) -> bool:
        """Whether there is anything to calibrate with."""
        return self.strangers is not None or self.leave_identity_out


def migrate(
    folder: str | Path,
    embedder: Any = None,
    *,
    to: str | Path | None = None,
    recalibration: Recalibration | None = None,
    probes: Any = None,
    cohort: Any = None,
    drop: bool = False,
    switch: bool = True,
    old_embedder: Any = None,
    progress: bool = True,
) -> Migration:
    """Put another encoder under a gallery.

    A new gallery is built beside the old one, in `FOLDER.migrating`, from the image files whose paths stand in the
    templates' metadata: ids, labels, metadata, thumbnails, requests and settings stay. It is compared with the old
    one, calibrated and checked; then the two folders swap their names in one step, and the old one becomes
    `FOLDER.before-migration`. Whenever the process dies, the folder holds the whole old gallery or the whole new one;
    the same call again goes on where it stopped.

    The old gallery is open for writing meanwhile: others may read it, and nobody can change it. Who has it open when
    the folders swap gets a `GalleryError` that says to open it again, never an answer of the old one.

    Args:
        folder: Of the gallery.
        embedder: As in `Gallery.create`. None moves the gallery as it is, vectors and calibration, which takes `to`.
        to: Another place for the new gallery: a folder that is not there, or an address of Milvus, where there are no
            thumbnails. The old one then stays where it is.
        recalibration: Strangers that set the new threshold. Without it a gallery that was calibrated is refused, unless
            by leave-identity-out, which is repeated.
        probes: Images to compare both galleries on: paths or a `Source`, of which labels that are enrolled count as
            right or wrong. Takes the old embedder. Stored images are compared in any case.
        cohort: Images of others, needed where scores are normalised.
        drop: Leave out templates without an image file that can be read, instead of refusing.
        switch: False stops before the swap; the same call with True goes on from there.
        old_embedder: Where the gallery cannot load its own.
        progress: Show a bar on stderr.

    Raises:
        ValueError: Image files are missing (says which), no strangers for a gallery that was calibrated, no cohort for
            one that is normalised, the same encoder, or a backup in the way.
        CalibrationError: Too few strangers for the target. The old gallery stays.
        GalleryLocked: Another process has the gallery open for writing.
    """
    started = time.perf_counter()
    work = _Work(folder, to)
    if (done := work.finish()) is not None:
        return done
    made = None if embedder is None else as_embedder(embedder)
    if made is None and to is None:
        raise ValueError(
            "A gallery is migrated to another encoder, to another place (to=...), or to both; got neither."
        )
    wanted = recalibration or Recalibration()
    with Gallery.open(folder, old_embedder) as old:
        if not isinstance(old, FolderGallery):
            raise ValueError(f"Only a gallery in a folder can be migrated; {old.address} lies elsewhere.")
        old.labels()  # waits until a large gallery is read
        with old._mutex:
            contents = old._store.load()
        wanted = _checked(old, made, wanted, cohort, moves=to is not None)
        work.refuse_taken()
        sweep(work.place)
        rows, paths, dropped = _sources(contents, made, drop)
        with _begun(work, old, contents, made, drop) as new:
            dropped += _fill(old, new, contents, rows, paths, made, drop=drop, progress=progress)
            compared = _compared_stored(old, new, contents) if made is not None else []
            _settle(old, new, wanted, cohort, moved=made is None)
            if probes is not None:
                compared.append(_compared_probes(old, new, probes))
            _verify(old, new, contents, dropped)
            found = new.calibration
            report = Migration(
                gallery=str(work.target) if switch else new.address,
                backup=str(work.backup) if to is None and switch else None,
                switched=to is None and switch,
                templates=len(new),
                identities=len(new.labels()),
                dropped=tuple(dropped),
                gone=tuple(sorted(set(old.labels()) - set(new.labels()))),
                old_encoder=old.fingerprint,
                new_encoder=new.fingerprint,
                old_dim=old.dim,
                new_dim=new.dim,
                old_threshold=None if old.calibration is None else old.calibration.threshold,
                calibration=None if found is None else found.to_dict(),
                comparisons=tuple(compared),
                seconds=round(time.perf_counter() - started, 2),
            )
        if switch:
            work.remember(report)
            if to is None:
                work.link_foreign_files()
                old.close(meanwhile=work.swap)
            else:
                work.deliver()
    return report


class _Work:
    """The folder NAME.migrating beside the goal: the gallery that is being built, and a file that says what for.

    Args:
        folder: Of the old gallery.
        to: Where the new one goes, if not there.
    """

    def __init__(self, folder: str | Path, to: str | Path | None) -> None:
        self.folder = Path(folder).resolve()
        self.moves = to is not None
        self.in_folder = to is None or issubclass(_kind(to), FolderGallery)
        self.target: str | Path = self.folder if to is None else Path(to).resolve() if self.in_folder else str(to)
        beside = self.target if isinstance(self.target, Path) else self.folder
        self.place = beside.with_name(beside.name + ".migrating")
        self.backup = self.folder.with_name(self.folder.name + ".before-migration")
        self.new = self.place / NEW

    @property
    def building(self) -> str | Path:
        """Where the new gallery is made."""
        return self.new if self.in_folder else self.target

    def refuse_taken(self) -> None:
        """Raise where the result or the old gallery has no place to go.

        Raises:
            ValueError: A backup of a migration before, or a target that is not empty.
        """
        if not self.moves and self.backup.exists():
            raise ValueError(f"{self.backup} is there already, from a migration before; move it away or delete it.")
        if self.moves and isinstance(self.target, Path):
            storage.refuse_if_not_empty(self.target)

    def mark(self) -> dict[str, Any] | None:
        """What a run before has noted; None without one."""
        path = self.place / MARK
        if not self.place.exists():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.place} is in the way: it is not the folder of a migration ({error}). Move it away."
            ) from error
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {content.get('version')!r}, this embedlab reads {VERSION}; finish the migration "
                f"with the release that began it, or delete {self.place}."
            )
        return content

    def begin(self, mark: dict[str, Any]) -> bool:
        """Whether there is work of the same migration to go on with; other work is deleted."""
        found = self.mark()
        if found is not None and {key: found.get(key) for key in mark} == mark:
            return True
        if found is not None and found["report"] is not None:
            raise ValueError(
                f"{self.place} holds what is left of a migration that was finished, but for another encoder or another "
                "state of the gallery. Look at it, and move it away."
            )
        if found is not None:
            logger.info("%s was begun for another encoder or before the gallery changed; it begins anew.", self.place)
            self.clear()
        with new_folder(self.place) as building:
            (building / MARK).write_text(json.dumps(mark | {"version": VERSION, "report": None}), encoding="utf-8")
        return False

    def remember(self, report: Migration) -> None:
        """Note what will be done when the folders have swapped."""
        write_file(self.place / MARK, json.dumps((self.mark() or {}) | {"report": report.to_dict()}).encode())

    def link_foreign_files(self) -> None:
        """What others keep in the gallery's folder, such as an inbox, is there at every moment."""
        for path in self.folder.iterdir():
            if path.name not in OWN and path.is_file() and not path.is_symlink():
                (self.new / path.name).unlink(missing_ok=True)
                os.link(path, self.new / path.name)
        sync(self.new)

    def swap(self) -> None:
        """Both galleries are closed, and nobody else may write."""
        exchange(self.new, self.folder)
        sync(self.place)
        sync(self.folder.parent)
        self._put_away()

    def deliver(self) -> None:
        """Give the new gallery its name, where it is to be elsewhere."""
        if isinstance(self.target, Path):
            put_in_place(self.new, self.target)
        self.clear()

    def finish(self) -> Migration | None:
        """Do what is left when a run was cut off after its last step but before it was tidy; returns its report."""
        if (found := self.mark()) is None or found["report"] is None or not self.in_folder:
            return None
        if not self.moves:
            finish_exchange(self.new, self.folder)
        if self.new.exists():
            there = {owner for owner, _ in storage.read_generation(self.new / storage.GENERATION)}
            if self.moves or found["from"] not in there:
                return None
            self._put_away()
        else:
            self.clear()
        return Migration.from_dict(found["report"])

    def _put_away(self) -> None:
        for path in self.new.iterdir():
            if path.name not in OWN and path.is_file():
                path.unlink()  # linked in the new gallery
        self.new.rename(self.backup)
        sync(self.folder.parent)
        self.clear()

    def clear(self) -> None:
        """Delete everything: in one step under this name, and then what it held."""
        waste = self.place.with_name(f".{self.place.name}.new-{os.getpid()}")
        self.place.rename(waste)
        shutil.rmtree(waste)


def _checked(
    old: FolderGallery, made: Embedder | None, wanted: Recalibration, cohort: Any, *, moves: bool
) -> Recalibration:
    """Refuse before the work what would be refused after it."""
    before = old.calibration
    if made is not None and not moves and made.fingerprint == old.fingerprint:
        raise ValueError(
            f"The gallery {old.address} has the encoder {made.fingerprint} already; nothing is to be done."
        )
    if made is None:
        if wanted.given or cohort is not None:
            raise ValueError("A gallery that moves with its vectors keeps its calibration and cohort; pass neither.")
        return wanted
    if old.info()["settings"].get("normalisation") and cohort is None:
        raise ValueError(
            f"The gallery {old.address} normalises its scores with a cohort, of which it keeps vectors but no images: "
            "pass the cohort's images (cohort=, --cohort), or switch it off first by configure(normalisation='none')."
        )
    if before is None or wanted.given:
        fallback = {"fpir": 0.01, "fmr": None, "growth": 1.0} if before is None else vars(before)
        return Recalibration(
            **vars(wanted)
            | {name: fallback[name] for name in ("fpir", "fmr", "growth") if getattr(wanted, name) is None}
        )
    if before.source == "leave-identity-out":
        return Recalibration(leave_identity_out=True, fpir=before.fpir, fmr=before.fmr, growth=before.growth)
    raise ValueError(
        f"The gallery {old.address} is calibrated, and its threshold means nothing for another encoder: pass images of "
        f"strangers (--strangers PATH), at least as many as before ({before.strangers} for {before.fpir:.2%}). "
        "Without any, --leave-identity-out lets the enrolled play the strangers."
    )


def _sources(contents: Contents, made: Embedder | None, drop: bool) -> tuple[Ids, list[str | None], list[Dropped]]:
    """Rows to carry over, the image of each, and what has none."""
    notes = [json.loads(note) if note else {} for note in contents.metadata]
    paths = [path if isinstance(path := note.get("path"), str) else None for note in notes]
    if made is None:
        return np.arange(len(paths)), paths, []
    lost = [
        Dropped(key, label, path, "no path is stored" if path is None else "the file is missing")
        for key, label, path in zip(contents.ids.tolist(), contents.labels, paths, strict=True)
        if path is None or not os.path.isfile(path)
    ]
    if lost and not drop:
        raise ValueError(_refusal(lost, len(paths)))
    if len(lost) == len(paths):
        raise ValueError("None of the templates has an image file, so that nothing can be embedded anew.")
    keep = ~np.isin(contents.ids, [one.id for one in lost])
    return np.flatnonzero(keep), paths, lost


def _refusal(lost: Sequence[Dropped], count: int) -> str:
    some = "".join(f"\n  {_named(one)}" for one in lost[:10]) + (
        f"\n  and {len(lost) - 10} more" if len(lost) > 10 else ""
    )
    return (
        f"{len(lost)} of {count} templates have no image file that can be embedded anew:{some}\nPut the files back, "
        "enroll these identities again, or leave the templates out by drop=True (--drop-missing)."
    )


def _named(one: Dropped) -> str:
    return f"template {one.id} of {one.label!r}: {one.reason}" + (f": {one.path}" if one.path else "")


def _begun(work: _Work, old: FolderGallery, contents: Contents, made: Embedder | None, drop: bool) -> Gallery:
    """The new gallery, empty or as far as a run before has come."""
    meta, place = contents.meta, work.building
    going_on = work.begin(
        {
            "from": meta.uuid,
            "templates": [meta.count, meta.xor, meta.last_id],
            "settings": {name: meta.settings[name] for name in ("fusion", "vote_k")},
            "encoder": None if made is None else made.fingerprint,
            "to": str(work.target),
            "drop": drop,
        }
    )
    own = made if made is not None else _own_embedder(old)
    if going_on and work.in_folder and work.new.exists():
        return Gallery.open(place, own)
    if going_on and not work.in_folder:
        with suppress(GalleryError):  # not made yet
            return Gallery.open(place, own)
    search = meta.search
    if not work.in_folder and meta.thumbnails:
        logger.warning("The thumbnails of %s stay behind: %s keeps no pictures.", old.address, place)
    return Gallery.create(
        place,
        own,
        dim=None if own is not None else meta.dim,
        fusion=meta.settings["fusion"],
        vote_k=meta.settings["vote_k"],
        search=search["kind"] if work.in_folder else "auto",
        search_recall=search["recall"],
        thumbnails=meta.thumbnails and work.in_folder,
    )


def _own_embedder(old: FolderGallery) -> Embedder | None:
    return None if old.fingerprint is None else old.embedder


def _fill(
    old: FolderGallery,
    new: Gallery,
    contents: Contents,
    rows: Ids,
    paths: list[str | None],
    made: Embedder | None,
    *,
    drop: bool,
    progress: bool,
) -> list[Dropped]:
    """Enroll what is not there yet, some hundred templates at a time; returns what could not be read."""
    there = new.embeddings().ids
    todo = rows[~np.isin(contents.ids[rows], there)]
    if len(there):
        todo = todo[contents.ids[todo] > there.max()]  # below it lies what could not be read
        logger.info("Going on after %d of %d templates", len(rows) - len(todo), len(rows))
    lost: list[Dropped] = []
    with tqdm(total=len(todo), desc="migrate", unit="img", delay=1, disable=not progress) as bar:
        for start in range(0, len(todo), AT_ONCE):
            part = todo[start : start + AT_ONCE]
            bar.update(len(part))
            if made is None:
                vectors, bad = contents.vectors[part], NOTHING_BAD
            else:
                vectors, bad = _embedded(made, [str(paths[row]) for row in part])
            some = [_dropped(contents, paths, part[place], reason) for place, reason in bad.items()]
            if some and not drop:
                raise ValueError(_refusal(some, len(rows)))
            lost += some
            part = np.delete(part, list(bad))
            if len(part):
                _carry_over(old, new, contents, part, vectors, [str(paths[row]) for row in part])
    with old._mutex:
        requests = old._store.requests()
    new._succeed(contents.meta.last_id, requests)
    # what a run before could not read is not asked for again
    absent = set(contents.ids[rows].tolist()) - set(new.embeddings().ids.tolist()) - {one.id for one in lost}
    return lost + [
        _dropped(contents, paths, row, "the file cannot be read")
        for row in rows.tolist()
        if int(contents.ids[row]) in absent
    ]


def _dropped(contents: Contents, paths: list[str | None], row: int, reason: str) -> Dropped:
    return Dropped(int(contents.ids[row]), contents.labels[row], paths[row], reason)


def _embedded(made: Embedder, paths: list[str]) -> tuple[Vectors, dict[int, str]]:
    """Vectors of the images that can be read, and what is wrong with the others, by place."""
    embed = _quiet(made)
    try:
        return normalised(as_rows(embed(paths)), None), {}
    except ImageError:  # of one: each on its own tells which
        found, bad = [], {}
    for place, path in enumerate(paths):
        try:
            found.append(embed([path]))
        except ImageError as error:
            bad[place] = str(error)
    return normalised(np.concatenate(found), None) if found else np.zeros((0, made.dim or 0), np.float32), bad


def _quiet(embedder: Embedder) -> Callable[[Any], Vectors]:
    """Without a bar for every part."""
    embed: Callable[..., Embeddings] = embedder.embed
    if not isinstance(embedder, CallableEmbedder):
        embed = partial(embed, progress=False)
    return lambda images: embed(images).vectors


def _carry_over(
    old: FolderGallery, new: Gallery, contents: Contents, part: Ids, vectors: Vectors, paths: list[str]
) -> None:
    ids = contents.ids[part]
    with old._mutex:
        small = old._store.thumbnails(ids.tolist())
    first = not new._about().references
    new._add(
        Enrollment(
            [contents.labels[row] for row in part],
            [contents.metadata[row] for row in part],
            vectors,
            None,
            b"",
            [small.get(key) for key in ids.tolist()] if small and new._about().thumbnails else [],
            references_of(new._embedder, paths) if first and new._embedder is not None else [],
            ids,
        )
    )


def _settle(old: FolderGallery, new: Gallery, wanted: Recalibration, cohort: Any, *, moved: bool) -> None:
    """Cohort and threshold of the new gallery."""
    before = old.calibration
    kind = _normalisation(old)
    if moved:
        if kind is not None:
            vectors = old._store.cohort()
            new.configure(normalisation="as-norm", cohort=vectors, cohort_k=kind["cohort_k"])
        if before is not None:
            new._keep_calibration(before, new._now())
        return
    if cohort is not None:
        found = _read(new, cohort)
        new.configure(normalisation="as-norm", cohort=found, cohort_k=kind["cohort_k"] if kind else None)
    if wanted.leave_identity_out:
        new.calibrate(leave_identity_out=True, **_targets(wanted))
    elif wanted.strangers is not None:
        strangers = _read(new, wanted.strangers)
        labels = strangers.labels if wanted.labels is None else wanted.labels
        if wanted.one_probe and labels is None:
            raise ValueError("One probe per stranger takes labels that say which images belong together.")
        probes = labels if wanted.one_probe else None
        new.calibrate(embeddings=strangers.vectors, labels=labels, probes=probes, **_targets(wanted))


def _read(gallery: Gallery, images: Any) -> Embeddings:
    """Vectors of images; a plain function knows no data source, but takes its files."""
    if isinstance(images, Source) and images.pixels is None and isinstance(gallery.embedder, CallableEmbedder):
        found = gallery.embed(images.names)
        return Embeddings(found.vectors, images.labels, found.ids, images.names)
    return gallery.embed(images)


def _normalisation(gallery: Gallery) -> dict[str, Any] | None:
    """How a gallery normalises its scores."""
    found: dict[str, Any] | None = gallery.info()["settings"].get("normalisation")
    return found


def _targets(wanted: Recalibration) -> dict[str, Any]:
    return {"fpir": wanted.fpir, "fmr": wanted.fmr, "growth": wanted.growth}


# ---- side by side --------------------------------------------------------------------------------------------------


@dataclass
class _Answers:
    """Of one gallery to N images: best identity, whether it can be right, score, whether it was named."""

    best: list[str | None]
    scores: np.ndarray[Any, Any]
    named: float | None = None


def _compared_stored(old: Gallery, new: Gallery, contents: Contents) -> list[Comparison]:
    """Each stored image against all other templates, in both galleries."""
    kept = np.flatnonzero(np.isin(contents.ids, new.embeddings().ids))
    rows = kept[np.unique(np.linspace(0, len(kept) - 1, min(COMPARED, len(kept))).round().astype(int))]
    ids = contents.ids[rows]
    stored = new.embeddings()
    there = {key: place for place, key in enumerate(stored.ids.tolist())}
    if len(kept) < 2:
        return []
    labels = [contents.labels[row] for row in rows]
    sides = [
        _nearest_other(old, contents.vectors[rows], ids),
        _nearest_other(new, stored.vectors[[there[key] for key in ids.tolist()]], ids),
    ]
    counts = new.counts()
    names = [f"template {key} ({label})" for key, label in zip(ids.tolist(), labels, strict=True)]
    able = [label if counts[label] > 1 else None for label in labels]
    return [_comparison("stored images", names, able, *sides)]


def _nearest_other(gallery: Gallery, vectors: Vectors, ids: Ids) -> _Answers:
    near = gallery.search(embeddings=vectors, k=2)
    own = near.ids[:, 0] == ids
    place = np.where(own, 1, 0)
    row = np.arange(len(ids))
    return _Answers([near.labels[i][j] for i, j in zip(row, place, strict=True)], near.scores[row, place])


def _compared_probes(old: Gallery, new: Gallery, probes: Any) -> Comparison:
    found = [_read(gallery, probes) for gallery in (old, new)]
    sides = []
    for gallery, vectors in zip((old, new), found, strict=True):
        answers = gallery.identify(embeddings=vectors.vectors, k=1)
        named = None
        if gallery.calibration is not None and answers:
            named = float(np.mean([answer.label is not None for answer in answers]))
        scores = np.array([answer.score for answer in answers])
        sides.append(_Answers([answer.best for answer in answers], scores, named))
    first = found[0]
    names = first.paths or [f"probe {number}" for number in first.ids.tolist()]
    both = set(old.labels()) & set(new.labels())
    able = [label if label in both else None for label in first.labels or [""] * len(first)]
    return _comparison("probes", list(names), able, *sides)


def _comparison(what: str, names: list[str], labels: list[str | None], old: _Answers, new: _Answers) -> Comparison:
    """Of N images, whose label is None where no answer can be right."""
    same = [a == b for a, b in zip(old.best, new.best, strict=True)]
    pairs = [
        (a == label, b == label) for a, b, label in zip(old.best, new.best, labels, strict=True) if label is not None
    ]
    rights = [float(np.mean([pair[side] for pair in pairs])) if pairs else None for side in (0, 1)]
    changes = [
        (n, str(a), str(b)) for n, a, b, agreed in zip(names, old.best, new.best, same, strict=True) if not agreed
    ]
    return Comparison(
        what,
        len(names),
        float(np.mean(same)) if same else 1.0,
        rights[0],
        rights[1],
        sum(after and not before for before, after in pairs),
        sum(before and not after for before, after in pairs),
        _mean(old.scores),
        _mean(new.scores),
        old.named,
        new.named,
        tuple(changes[:SHOWN]),
    )


def _mean(scores: np.ndarray[Any, Any]) -> float:
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else 0.0


# ---- the last look -------------------------------------------------------------------------------------------------


def _verify(old: FolderGallery, new: Gallery, contents: Contents, dropped: Sequence[Dropped]) -> None:
    """Raise unless the new gallery holds exactly what the old one held, but for the vectors."""
    keep = ~np.isin(contents.ids, [one.id for one in dropped])
    kept = np.flatnonzero(keep).tolist()
    stored, notes = new.embeddings(), new.metadata()
    same = (
        np.array_equal(stored.ids, contents.ids[keep])
        and stored.labels == [contents.labels[row] for row in kept]
        and [notes[key] for key in stored.ids.tolist()] == [json.loads(contents.metadata[row] or "{}") for row in kept]
    )
    problems = [] if same else ["its templates are not those of the old gallery"]
    if isinstance(new, FolderGallery):
        problems += new.check().problems
        with old._mutex, new._mutex:
            ids = stored.ids.tolist()
            if new._store.thumbnails(ids) != old._store.thumbnails(ids):
                problems.append("its thumbnails are not those of the old gallery")
    if problems:
        raise GalleryError(
            f"The new gallery {new.address} is not whole: {'; '.join(problems)}. The old one is as it was; delete the "
            "new one and try again."
        )
