"""Embeddings of many images, part by part: what is done stays done, and any number of processes share the parts."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from embedlab._durable import new_folder, put_in_place, write_file
from embedlab._types import Embeddings, Ids
from embedlab.data.images import SKIP_LIMIT, SKIPPED_SHOWN, ImageError, OnError, report_skipped
from embedlab.data.sources import Source
from embedlab.retrieval.embedders import Embedder, on_device
from embedlab.retrieval.embeddings import digest_of, part_name, read_protocol, refuse_taken, write_part, write_protocol

logger = logging.getLogger("embedlab")

VERSION = 1
PLAN = "plan.json"
ROWS = 4_096  # images per part: what a kill costs, and what a process takes at a time


@dataclass(frozen=True)
class Extracted:
    """What came of it.

    Args:
        count: Vectors stored.
        dim: Numbers in each.
        skipped: Images that could not be read.
        kept: Images that a run before had done.
        seconds: Of this run.
    """

    count: int
    dim: int
    skipped: int
    kept: int
    seconds: float


def extract(
    embedder: Embedder,
    source: Source,
    folder: str | Path,
    *,
    protocol: dict[str, Any],
    batch_size: int = 128,
    precision: str = "float32",
    on_error: OnError = "stop",
    devices: int = 1,
    nodes: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Extracted | None:
    """Embed a data source into a folder of stored embeddings, see `read_embeddings`.

    Parts of 4,096 images are written to `FOLDER.unfinished`, each under a digest; when all are there the folder takes
    its name in one step. A run that was killed goes on with `resume`. The result does not depend on how often that
    happened, nor on how many processes shared the parts, but for the last bits where their machines differ.

    Args:
        embedder: An `Encoder`, which is put on a GPU where there is one, or an `OnnxEmbedder`.
        source: N images.
        folder: Absent or empty, or stored embeddings when `overwrite`.
        protocol: As in `write_embeddings`.
        batch_size: Images per forward pass.
        precision: As in `Encoder.embed`.
        on_error: What an unreadable image does.
        devices: Processes on this node, by Lightning's `Trainer.predict`: one per GPU, or so many on the processor. The
            calling program is started again for each.
        nodes: Nodes that share the work, on a file system that all see.
        resume: Go on with a run that stopped; one that is finished stays as it is.
        overwrite: Replace stored embeddings, and drop an unfinished run.
        progress: Show a bar on stderr: over all images, or the share of the first process.

    Returns:
        What was done; None in all processes but the first.

    Raises:
        ValueError: The folder is taken, an unfinished run without `resume`, nothing to resume, or a run that was begun
            (or finished) with another encoder, other images or another protocol.
    """
    started = time.perf_counter()
    work = Extraction(Path(folder), source, protocol)
    if resume and (told := work.finished()):
        logger.info("%s is finished: there is nothing left to do.", folder)
        count, images = told["count"], len(source)
        return Extracted(count, told["dim"], images - count, images, round(time.perf_counter() - started, 2))
    options = {"batch_size": batch_size, "precision": precision, "on_error": on_error, "skip_limit": None}
    try:
        if devices * nodes > 1:
            from embedlab.retrieval.predict import predict

            first = predict(
                work, embedder, options, devices, nodes, resume=resume, overwrite=overwrite, progress=progress
            )
        else:
            work.begin(resume=resume, overwrite=overwrite)
            run_parts(work, on_device(embedder), options, work.missing(), progress=progress)
            first = True
    except BaseException:
        if work.begun:
            logger.info("%s keeps what is done; --resume goes on with it.", work.place)
        raise
    if not first:
        return None
    kept = work.kept
    count, dim = work.finish(embedder.dim or 0, overwrite=overwrite)
    return Extracted(count, dim, len(source) - count, kept, round(time.perf_counter() - started, 2))


def run_parts(
    work: Extraction,
    embedder: Any,
    options: dict[str, Any],
    parts: Sequence[int],
    *,
    progress: bool,
    name: str = "embed",
) -> None:
    """Embed parts, one after another."""
    images = sum(len(work.rows(part)) for part in parts)
    with tqdm(total=images, desc=name, unit="img", delay=1, disable=not progress) as bar:
        for part in parts:
            rows = work.rows(part)
            work.write(part, embedder.embed(work.source.subset(rows), progress=bar, **options))


class Extraction:
    """Stored embeddings in the making, in `FOLDER.unfinished`.

    Beside each part lies a file that says which rows are in it and what its digest is, written after the part: a part
    without one is not there.

    Args:
        folder: Where the stored embeddings go.
        source: N images.
        protocol: As in `write_embeddings`; it must be the same when a run is resumed.
    """

    def __init__(self, folder: Path, source: Source, protocol: dict[str, Any]) -> None:
        self.folder = folder
        self.place = folder.with_name(folder.name + ".unfinished")
        self.source = source
        self.kept = 0
        self._protocol = protocol
        listing = json.dumps([source.names, source.labels]).encode()
        names = hashlib.blake2b(listing, digest_size=16).hexdigest()
        self._wanted = {**protocol, "images": len(source), "names and labels": names}

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or check that it is of the same run; for one process, before any other asks."""
        if self.place.exists() and not resume and (overwrite or not self.begun):
            shutil.rmtree(self.place)
        if self.place.exists() and not resume:
            raise ValueError(
                f"{self.place} holds a run that was not finished: go on by resume=True (--resume), or delete it."
            )
        if not self.place.exists():
            if resume:
                raise ValueError(f"Nothing to resume: there is no {self.place}. Start it without --resume.")
            refuse_taken(self.folder, self._protocol, overwrite=overwrite)
            with new_folder(self.place) as building:
                plan = {"version": VERSION, "rows_per_part": ROWS, "of": self._wanted}
                (building / PLAN).write_text(json.dumps(plan), encoding="utf-8")
        refuse_taken(self.folder, self._protocol, overwrite=overwrite)
        self._require_same(self.place, self._plan["of"])

    def finished(self) -> dict[str, Any] | None:
        """The protocol of stored embeddings that are whole, made for the same; None where there are none.

        Raises:
            ValueError: They were made for something else.
        """
        if self.place.exists() or not (self.folder / "protocol.json").is_file():
            return None
        told = read_protocol(self.folder)
        self._require_same(self.folder, {name: told.get(name) for name in self._wanted})
        (self.folder / PLAN).unlink(missing_ok=True)  # a kill may have left it
        return told

    @property
    def begun(self) -> bool:
        """Whether any part is done."""
        return any(self.place.glob("part-*.json"))

    @cached_property
    def _plan(self) -> dict[str, Any]:
        path = self.place / PLAN
        try:
            plan: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete {self.place} and start again.") from error
        if plan.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {plan.get('version')!r}, this embedlab reads {VERSION}; finish the run with the "
                f"release that began it, or delete {self.place}."
            )
        return plan

    def _require_same(self, place: Path, before: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self._wanted))
        if changed := [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]:
            told = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
            raise ValueError(
                f"{place} was begun for something else: {told}. Parts of both would not belong together; choose "
                "another --out, or delete that folder."
            )

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-len(self.source) // int(self._plan["rows_per_part"]))

    def rows(self, part: int) -> Ids:
        """Of the source, in one part."""
        size = int(self._plan["rows_per_part"])
        return np.arange(part * size, min(part * size + size, len(self.source)), dtype=np.int64)

    def missing(self) -> list[int]:
        """Parts that are still to be done; the others are whole."""
        done = (self.place / "protocol.json").exists()  # written when all are there
        found = [part for part in range(self.parts) if not done and self._note(part) is None]
        self.kept = len(self.source) - sum(len(self.rows(part)) for part in found)
        return found

    def write(self, part: int, found: Embeddings) -> None:
        """Store a part; its ids are rows of the part, and those that lack could not be read."""
        ((_, digest),) = write_part(self.place, part, found.vectors).items()
        ids = self.rows(part)[found.ids].tolist()
        write_file(self._beside(part), json.dumps({"digest": digest, "ids": ids}).encode())

    def finish(self, dim: int, *, overwrite: bool) -> tuple[int, int]:
        """Give the folder its name, when all parts are there; returns count and numbers per vector.

        Args:
            dim: Numbers per vector, where there is none.
            overwrite: Replace stored embeddings.
        """
        if not (self.place / "protocol.json").exists():
            self._describe(dim)
        told = read_protocol(self.place)
        for path in self.place.iterdir():  # the notes beside parts, and what a kill has left half-written
            if path.name not in (*told["files"], "protocol.json", PLAN):
                path.unlink()
        put_in_place(self.place, self.folder, replace=overwrite)
        (self.folder / PLAN).unlink()  # last of all: it says what a run that was cut off here was about
        return int(told["count"]), int(told["dim"])

    def _describe(self, dim: int) -> None:
        notes = [self._note(part) for part in range(self.parts)]
        if lost := [part for part, note in enumerate(notes) if note is None]:
            raise ValueError(
                f"The parts {lost[:10]} are missing in {self.place}: did a process die? Go on by --resume."
            )
        ids = np.array([key for note in notes if note for key in note["ids"]], dtype=np.int64)
        absent = np.setdiff1d(np.arange(len(self.source)), ids).tolist()
        skipped = [(self.source.names[row], "") for row in absent]
        if absent:  # another process may have skipped them, in another run
            skipped[:SKIPPED_SHOWN] = [self._reason(row) for row in absent[:SKIPPED_SHOWN]]
        report_skipped(skipped, len(self.source), SKIP_LIMIT)
        if self.parts:
            with safe_open(self.place / part_name(0), framework="numpy") as file:
                dim = file.get_slice("vectors").get_shape()[1]
        labels = self.source.labels
        rows = Embeddings(
            np.broadcast_to(np.zeros((1, dim), np.float32), (len(ids), dim)),
            None if labels is None else [labels[row] for row in ids.tolist()],
            ids,
            [self.source.names[row] for row in ids.tolist()],
        )
        files = {part_name(part): note["digest"] for part, note in enumerate(notes) if note}
        write_protocol(self.place, rows, self._wanted, files)

    def _reason(self, row: int) -> tuple[str, str]:
        """The name of an image that was skipped, and why it cannot be read."""
        try:
            self.source.image(row)
        except ImageError as error:
            return self.source.names[row], error.reason
        return self.source.names[row], "it could not be read, and can be now"

    def _beside(self, part: int) -> Path:
        return self.place / f"part-{part:05d}.json"

    def _note(self, part: int) -> dict[str, Any] | None:
        """What lies beside a part; None unless both are whole."""
        try:
            note: dict[str, Any] = json.loads(self._beside(part).read_bytes())
            whole = digest_of((self.place / part_name(part)).read_bytes()) == note["digest"]
        except (OSError, ValueError, KeyError):
            return None
        return note if whole else None
