"""What a gallery accepts: checks of everything that comes from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedlab._types import Embeddings, Ids, Vectors
from embedlab.retrieval.embedders import as_array, image_paths

FUSIONS = ("max", "mean", "vote")
LONGEST_LABEL = 1_000  # characters
LONGEST_METADATA = 65_536  # characters of JSON per template
MOST_NEIGHBOURS = 1_000_000


def as_rows(values: Any) -> np.ndarray[Any, Any]:
    """An array of what came as embeddings."""
    try:
        array = as_array(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Embeddings must be (N, D) real numbers, rows of one length; {error}.") from error
    if array.ndim == 0:
        raise ValueError(f"Embeddings must be (N, D) real numbers, got {values!r}.")
    return array


def listed(values: Any, what: str) -> list[Any]:
    """A list of what came row by row."""
    try:
        return list(values)
    except TypeError as error:
        raise ValueError(f"{what} come row by row, as a list; got {values!r}.") from error


def checked_key(key: Any) -> str:
    """The name of a request."""
    if not isinstance(key, str) or not key or len(key) > LONGEST_LABEL or not key.isprintable():
        raise ValueError(
            f"key is a non-empty string of at most {LONGEST_LABEL} printable characters that names the request, got "
            f"{key if not isinstance(key, str) else key[:50]!r}."
        )
    return key


def normalised(array: np.ndarray[Any, Any], dim: int | None) -> Vectors:
    """Vectors (N, D) of norm 1 in float32 from numbers of any norm; refuses zero and non-finite rows."""
    if len(array) == 0 and array.ndim in (1, 2):
        return np.zeros((0, dim or 0), np.float32)
    if array.ndim != 2 or array.dtype.kind not in "fiu" or array.shape[1] == 0:
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
    if value > MOST_NEIGHBOURS:
        raise ValueError(f"{name} is at most {MOST_NEIGHBOURS:,}, got {value:,}.")
    return int(value)


def counted(images: Any, embeddings: Any) -> int:
    """Rows in whichever of the two came."""
    if (images is None) == (embeddings is None):
        raise ValueError("Pass either images= or embeddings=.")
    if images is None:
        return len(embeddings if isinstance(embeddings, Embeddings) else as_rows(embeddings))
    paths = image_paths(images)
    return len(images) if paths is None else len(paths)


def are_images(values: Any) -> bool:
    """Whether these are paths or pixels rather than vectors."""
    several = isinstance(values, list | tuple) and len(values) > 0
    one = values[0] if several else values
    return isinstance(one, str | Path) or getattr(values, "ndim", 0) == 4


def checked_labels(labels: Any, count: int) -> list[str]:
    """One non-empty, printable string per row."""
    if labels is None:
        raise ValueError("enroll needs labels: one identity per image, or one string for all.")
    names = [labels] * count if isinstance(labels, str) else listed(labels, "Labels")
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
    dicts = [metadata] * count if isinstance(metadata, dict) else listed(metadata, "Metadata")
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


def with_quality(notes: list[str | None], quality: Any) -> list[str | None]:
    """The metadata of `checked_metadata` with the quality of each template; refuses what is no quality."""
    if quality is None and not any(note is not None and '"quality"' in note for note in notes):
        return notes  # a million templates need not be parsed
    contents = [{} if note is None else json.loads(note) for note in notes]
    if quality is not None:
        given = checked_quality(quality, len(notes))
        for row, content in enumerate(contents):
            if "quality" in content:
                raise ValueError(f"The metadata in row {row} has a quality of its own; give it there or as quality=.")
            content["quality"] = given[row]
    named = [(row, content["quality"]) for row, content in enumerate(contents) if "quality" in content]
    for row, value in named:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(
                f"The metadata in row {row} has the quality {value!r}; under this name a gallery keeps the weight of a "
                "template, a number above 0 and at most 1. Call yours otherwise."
            )
    return notes if not named else [json.dumps(c, sort_keys=True) if c else None for c in contents]


def checked_quality(quality: Any, count: int) -> list[float]:
    """One number above 0 and at most 1 per row, from as many or from one for all."""
    one = isinstance(quality, int | float | np.number)
    values = [np.asarray(quality).item()] * count if one else listed(as_array(quality).tolist(), "Qualities")
    if len(values) != count:
        raise ValueError(f"{len(values)} qualities came for {count} images; they must be row by row.")
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(
                f"A quality is a number above 0 and at most 1, and 1 is the best; row {row} is {value!r}. Leave out "
                "images that are worth nothing."
            )
    return [float(value) for value in values]


def pooled(vectors: Vectors, probes: Any, quality: Any = None) -> tuple[Vectors, Ids]:
    """One vector per probe, (P, D): the normalised mean of those of its images, weighted by quality where given.

    Args:
        vectors: (N, D) of norm 1.
        probes: N names of probes; a None is a probe of its own. None for one image each.
        quality: N weights above 0 and at most 1.

    Returns:
        The probes in the order in which their first images come, and (N,) the probe of each image.
    """
    if probes is None:
        if quality is not None:
            raise ValueError("quality= weights the images of one probe; say by probes= which image belongs to which.")
        return vectors, np.arange(len(vectors))
    names = listed(probes, "Names of probes")
    if odd := [name for name in names if name is not None and not isinstance(name, str | int | np.integer)]:
        raise ValueError(f"Probes are named by strings or whole numbers, or None for one of its own; got {odd[0]!r}.")
    if len(names) != len(vectors):
        raise ValueError(f"{len(names)} names of probes came for {len(vectors)} images; they must be row by row.")
    places: dict[Any, int] = {}
    keys = [("alone", row) if name is None else name for row, name in enumerate(names)]
    codes = np.array([places.setdefault(key, len(places)) for key in keys], dtype=np.int64)
    weights = np.ones(len(names)) if quality is None else np.array(checked_quality(quality, len(names)))
    sums = np.zeros((len(places), vectors.shape[1]))
    np.add.at(sums, codes, vectors * weights[:, None])
    norms = np.linalg.norm(sums, axis=1)
    left = norms / np.bincount(codes, weights, minlength=len(places))
    if len(left) and left.min() < 1e-6:
        name = names[int(np.flatnonzero(codes == left.argmin())[0])]
        raise ValueError(f"The images of the probe {name!r} cancel each other out: are they of one and the same?")
    means: Vectors = (sums / norms[:, None]).astype(np.float32)
    single = np.flatnonzero(np.bincount(codes, minlength=len(places)) == 1)
    means[single] = vectors[np.isin(codes, single)]  # to the last bit as without probes
    return means, codes


def unique(values: Any, kind: Literal["label", "id"]) -> list[Any]:
    """Each label or id once, in order, as plain Python."""
    wanted, what = ((str,), "strings") if kind == "label" else ((int, np.integer), "whole numbers")
    plain = [values] if isinstance(values, wanted) else listed(values, f"The {kind}s to remove")
    for value in plain:
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"The {kind}s to remove are {what}; got {value!r}.")
    return list(dict.fromkeys(value if isinstance(value, str) else int(value) for value in plain))
