"""Strangers that were seen: kept for some days, grouped, and named or forgotten."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from embedlab._types import Vectors
from embedlab.retrieval import Gallery

Pixels = np.ndarray[Any, Any]
MOST = 2_000  # probes; the oldest go first, and grouping stays quick
_SCHEMA = """
CREATE TABLE IF NOT EXISTS probe (id INTEGER PRIMARY KEY AUTOINCREMENT, seen REAL NOT NULL, image BLOB NOT NULL,
    vector BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS name (uuid TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS embedder (fingerprint TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Cluster:
    """Probes that look like one stranger.

    Args:
        ids: Of the probes, newest first.
        seen: When the newest came, seconds since 1970.
    """

    ids: tuple[int, ...]
    seen: float


class Inbox:
    """Unknown probes in a file of their own, `inbox.db`, mode 0600.

    What is older than `days` is erased when anything is asked or kept, and by `purge`. A probe is kept as the image
    that the embedder saw, so that naming it enrolls exactly that.

    Args:
        folder: Of the gallery.
        days: How long a probe is kept, > 0.
    """

    def __init__(self, folder: Path, days: float) -> None:
        if not days > 0:
            raise ValueError(f"The inbox keeps probes for a number of days above 0, got {days}.")
        self.days = days
        path = folder / "inbox.db"
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA secure_delete=ON")
        self._database.execute("PRAGMA trusted_schema=OFF")
        self._database.executescript(_SCHEMA)
        if not self._database.execute("SELECT 1 FROM name").fetchone():
            self._database.execute("INSERT INTO name VALUES (?)", (uuid.uuid4().hex,))
        self._uuid = str(self._database.execute("SELECT uuid FROM name").fetchone()[0])

    def follow(self, gallery: Gallery) -> None:
        """Embed the probes anew where the gallery has got another encoder since they were kept."""
        with self._lock:
            known = [row[0] for row in self._database.execute("SELECT fingerprint FROM embedder")]
            rows = [] if known in ([], [gallery.fingerprint]) else self._database.execute("SELECT id, image FROM probe")
            fresh = [(np.asarray(_vector(gallery, image), "<f4").tobytes(), number) for number, image in list(rows)]
            with self._database:
                self._database.execute("BEGIN")
                self._database.executemany("UPDATE probe SET vector = ? WHERE id = ?", fresh)
                self._database.execute("DELETE FROM embedder")
                self._database.execute("INSERT INTO embedder VALUES (?)", (gallery.fingerprint,))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def purge(self) -> None:
        """Erase what is too old or too much."""
        with self._lock, suppress(sqlite3.ProgrammingError):  # closed meanwhile
            self._database.execute("DELETE FROM probe WHERE seen < ?", (time.time() - 86_400 * self.days,))
            self._database.execute(
                "DELETE FROM probe WHERE id NOT IN (SELECT id FROM probe ORDER BY id DESC LIMIT ?)", (MOST,)
            )

    def keep(self, image: Pixels, vector: Vectors) -> None:
        """Store an image (C, H, W) uint8 with its vector (1, D)."""
        row = (time.time(), _png(image), np.asarray(vector, "<f4").tobytes())
        with self._lock:
            self._database.execute("INSERT INTO probe (seen, image, vector) VALUES (?, ?, ?)", row)
        self.purge()

    def picture(self, number: int) -> bytes | None:
        """A probe as PNG."""
        self.purge()
        with self._lock:
            row = self._database.execute("SELECT image FROM probe WHERE id = ?", (number,)).fetchone()
        return None if row is None else bytes(row[0])

    def clusters(self, threshold: float) -> list[Cluster]:
        """Group probes by average linkage on the cosine, cut at the gallery's threshold; largest group first."""
        self.purge()
        with self._lock:
            rows = self._database.execute("SELECT id, seen, vector FROM probe ORDER BY id DESC").fetchall()
        groups = _groups(np.array([np.frombuffer(row[2], "<f4") for row in rows]), threshold)
        found: dict[int, list[tuple[int, float]]] = {}
        for (number, seen, _), group in zip(rows, groups, strict=True):
            found.setdefault(group, []).append((number, seen))
        clusters = [
            Cluster(tuple(number for number, _ in each), max(seen for _, seen in each)) for each in found.values()
        ]
        return sorted(clusters, key=lambda cluster: (-len(cluster.ids), -cluster.seen))

    def name(self, gallery: Gallery, ids: list[int], label: str) -> int:
        """Enroll probes under a label and erase them here; returns how many.

        Each probe is a request of its own to the gallery, with a key that never changes: after a crash in between,
        naming again adds nothing twice.
        """
        for number in ids:
            content = self.picture(number)
            if content is not None:
                key = f"inbox {self._uuid} {number}"
                gallery.enroll(images=_pixels(content)[None], labels=[label], key=key)
                self.dismiss([number])
        return len(ids)

    def dismiss(self, ids: list[int]) -> None:
        """Erase probes."""
        with self._lock:
            self._database.executemany("DELETE FROM probe WHERE id = ?", [(number,) for number in ids])


def _vector(gallery: Gallery, content: bytes) -> Vectors:
    return gallery.embed(_pixels(content)[None]).vectors


def _groups(vectors: Vectors, threshold: float) -> list[int]:
    """Group number of each row of (N, D)."""
    if len(vectors) < 2:
        return [0] * len(vectors)
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = np.maximum(linkage(vectors.astype(np.float64), method="average", metric="cosine"), 0)  # rounding: -1e-17
    return [int(group) for group in fcluster(tree, t=max(1 - threshold, 0), criterion="distance")]


def _png(image: Pixels) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0).squeeze())).save(file, "PNG")
    return file.getvalue()


def _pixels(content: bytes) -> Pixels:
    """(C, H, W) uint8, exactly what `_png` was given."""
    from PIL import Image

    pixels = np.asarray(Image.open(BytesIO(content), formats=("PNG",)))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
