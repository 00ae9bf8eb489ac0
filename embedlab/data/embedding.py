"""The loop that encoders run, exported ones too: images from anywhere, in chunks, to vectors with what they mean."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from tqdm import tqdm

from embedlab._types import Embeddings, Vectors
from embedlab.data.images import SKIP_LIMIT, Fit, OnError, Pixels, Rows, read_images, report_skipped
from embedlab.data.sources import Source

_CHUNK = 2048  # images decoded at a time: bounds memory whatever the number of files


def embed_images(
    images: Any,
    embed_batch: Callable[[Any], Vectors],
    *,
    preprocess: Callable[[Any], Any],
    size: int,
    channels: int,
    fit: Fit,
    dim: int | None,
    batch_size: int,
    on_error: OnError,
    progress: bool | Any,
    skip_limit: float | None = SKIP_LIMIT,
) -> Embeddings:
    """Embed files, a data source or arrays.

    Args:
        images: Paths, one path, a `Source`, or an array or tensor (N, C, H, W).
        embed_batch: Images (B, C, size, size) to vectors (B, D); uint8 arrays where files are read, else what
            `preprocess` gives.
        preprocess: Part of an array (B, C, H, W) as it was handed in, to (B, C, size, size).
        size: Side in pixels that files are brought to.
        channels: 3 for colour, 1 for grey.
        fit: How files become square, see `fit_image`.
        dim: D, for an input without images; None takes 0.
        batch_size: Images per call of `embed_batch`.
        on_error: "stop" raises at the first unreadable file, "skip" leaves it out and logs it.
        progress: Show a bar on stderr when it takes longer than a second; or a bar of tqdm to move on.
        skip_limit: Largest share that may be left out, see `read_images`.

    Returns:
        Embeddings whose ids are row numbers of the input; labels and paths as far as the input has them.

    Raises:
        ValueError: A file that cannot be read under "stop", or more of them than `skip_limit` under "skip".
    """
    if isinstance(images, str | os.PathLike):
        images = [images]
    source = images if isinstance(images, Source) else None
    paths = None if source or hasattr(images, "ndim") else [os.fspath(path) for path in images]
    names = source.names if source else paths  # None for arrays
    vectors, kept, skipped = [np.zeros((0, dim or 0), np.float32)], [np.zeros(0, np.int64)], []
    own = tqdm(total=len(images), desc="embed", unit="img", delay=1, disable=progress is not True)
    with own if isinstance(progress, bool) else nullcontext(progress) as bar:
        for start in range(0, len(images), _CHUNK):
            rows: Rows = np.arange(start, min(start + _CHUNK, len(images)))
            count = len(rows)
            if names is None:
                chunk = preprocess(images[start : start + _CHUNK])
            else:
                chunk, rows, bad = _decode(source, paths, rows, size, channels, fit, on_error)
                skipped += bad
            kept.append(rows)
            for first in range(0, len(chunk), batch_size):
                vectors.append(embed_batch(chunk[first : first + batch_size]))
                bar.update(len(vectors[-1]))
            bar.update(count - len(rows))
    if skip_limit is not None:
        report_skipped(skipped, len(images), skip_limit)
    ids = np.concatenate(kept)
    return Embeddings(
        vectors=np.concatenate([part for part in vectors if len(part)] or vectors[:1]),
        labels=[source.labels[row] for row in ids] if source and source.labels else None,
        ids=ids,
        paths=None if names is None else [names[row] for row in ids],
    )


def _decode(
    source: Source | None,
    paths: Sequence[str] | None,
    rows: Rows,
    size: int,
    channels: int,
    fit: Fit,
    on_error: OnError,
) -> tuple[Pixels, Rows, list[tuple[str, str]]]:
    """Read rows of a source, or of a list of paths, which may name a file twice."""
    if source is not None:
        return source.read(rows, size, channels=channels, how=fit, on_error=on_error, skip_limit=None)
    assert paths is not None
    wanted = [paths[row] for row in rows.tolist()]
    images, kept, skipped = read_images(wanted, size, channels=channels, how=fit, on_error=on_error, skip_limit=None)
    return images, rows[kept], skipped


def identity_hash(label: str) -> str:
    """Stand-in for an identity's name: BLAKE2b with 64 bits, in hexadecimal.

    It keeps names out of plain sight in an encoder's files; who guesses a name can still check it.

    Example:
        >>> identity_hash("Ada")
        '1c8f8946b7bdcf20'
    """
    return hashlib.blake2b(label.encode(), digest_size=8, person=b"embedlab").hexdigest()
