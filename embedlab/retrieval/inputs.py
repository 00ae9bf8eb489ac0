"""What a gallery accepts: checks of everything that comes from outside."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from embedlab._types import Vectors
from embedlab.retrieval.embedders import image_paths

FUSIONS = ("max", "mean", "vote")
LONGEST_LABEL = 1_000  # characters
LONGEST_METADATA = 65_536  # characters of JSON per template


def normalised(array: np.ndarray[Any, Any], dim: int | None) -> Vectors:
    """Vectors (N, D) of norm 1 in float32 from numbers of any norm; refuses zero and non-finite rows."""
    if array.size == 0 and array.ndim in (1, 2):
        return np.zeros((0, dim or 0), np.float32)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"Embeddings must be (N, D) real numbers, got shape {array.shape} of {array.dtype}.")
    require_dim(array.shape[1], dim)
    norms = np.sqrt(np.einsum("nd,nd->n", array, array, dtype=np.float64))
    good = np.isfinite(norms) & (norms > 1e-30)
    if not good.all():
        row = int(np.argmin(good))
        what = "zero" if norms[row] <= 1e-30 else "not finite (NaN, infinite or overflowing)"
        raise ValueError(
            f"{int((~good).sum())} of {len(array)} embeddings are zero or not finite; row {row} is {what}. A broken "
            "image, or a network that has diverged?"
        )
    vectors: Vectors = np.empty((len(array), array.shape[1]), np.float32)
    np.divide(array, norms[:, None], out=vectors, casting="same_kind")  # in float64, without a second table
    return vectors


def require_dim(got: int, dim: int | None) -> None:
    """Refuse vectors of another length than the gallery holds."""
    if dim is not None and got != dim:
        raise ValueError(
            f"The gallery holds vectors of {dim} numbers, got {got}: made by another backbone? Make a "
            "gallery for them with Gallery.create."
        )


def checked_settings(fusion: str, vote_k: int) -> dict[str, Any]:
    """What scores depend on, as stored with the threshold."""
    if fusion not in FUSIONS:
        raise ValueError(f"fusion is one of {', '.join(FUSIONS)}; got {fusion!r}.")
    return {"fusion": fusion, "vote_k": positive(vote_k, "vote_k")}


def positive(value: Any, name: str = "k") -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1, got {value!r}.")
    return int(value)


def counted(images: Any, embeddings: Any) -> int:
    """Rows in whichever of the two came."""
    if (images is None) == (embeddings is None):
        raise ValueError("Pass either images= or embeddings=.")
    if images is None:
        return len(embeddings)
    paths = image_paths(images)
    return len(images) if paths is None else len(paths)


def checked_labels(labels: Any, count: int) -> list[str]:
    """One non-empty, printable string per row."""
    if labels is None:
        raise ValueError("enroll needs labels: one identity per image, or one string for all.")
    names = [labels] * count if isinstance(labels, str) else list(labels)
    if len(names) != count:
        raise ValueError(f"{len(names)} labels came for {count} images; they must be row by row.")
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Labels are non-empty strings; row {row} is {name!r}. Name numbers as str({name!r}).")
        if len(name) > LONGEST_LABEL:
            raise ValueError(f"The label in row {row} has {len(name)} characters, at most {LONGEST_LABEL} are taken.")
        if not name.isprintable():
            raise ValueError(f"The label in row {row} holds characters that cannot be shown: {name!r}. Clean it first.")
    return [str(name) for name in names]


def checked_metadata(metadata: Any, count: int) -> list[str | None]:
    """One JSON text per row, or None."""
    if metadata is None:
        return [None] * count
    dicts = [metadata] * count if isinstance(metadata, dict) else list(metadata)
    if len(dicts) != count:
        raise ValueError(f"{len(dicts)} metadata came for {count} images; they must be row by row.")
    notes: list[str | None] = []
    for row, content in enumerate(dicts):
        if content is None:
            notes.append(None)
            continue
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise ValueError(f"Metadata is a dict with string keys, or None; row {row} is {content!r}.")
        try:
            note = json.dumps(content, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The metadata in row {row} is not JSON: {error}. Use strings, finite numbers, lists."
            ) from error
        if len(note) > LONGEST_METADATA:
            raise ValueError(
                f"The metadata in row {row} has {len(note)} characters, at most {LONGEST_METADATA} are taken."
            )
        notes.append(note)
    return notes


def unique(values: Any) -> list[Any]:
    """Each value once, in order, as plain Python."""
    plain = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return list(dict.fromkeys(int(value) if isinstance(value, np.integer) else value for value in plain))
