"""Stored embeddings: a folder with part-NNNNN.safetensors, rows.csv and protocol.json, every byte under a digest."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from embedlab._types import Embeddings, Vectors
from embedlab.retrieval._durable import new_folder

FORMAT = "embedlab-embeddings"
VERSION = 1


def write_embeddings(
    folder: str | Path,
    embeddings: Embeddings,
    *,
    protocol: dict[str, Any],
    rows_per_part: int = 65_536,
    overwrite: bool = False,
) -> None:
    """Store embeddings so that a flipped byte or a missing part is found on reading.

    The folder appears whole or not at all: it is filled under another name, forced to the disk and then renamed.

    Args:
        folder: Where to write; absent or empty, or stored embeddings when `overwrite`.
        embeddings: N vectors of D numbers with ids and, if any, labels and paths.
        protocol: What a reader must know about their making, as JSON: `encoder` (the fingerprint), the layer, the
            split. The keys format, version, dim, count, labels, paths, files and digest are filled in here.
        rows_per_part: Vectors per safetensors file.
        overwrite: Replace stored embeddings that are there already.

    Raises:
        ValueError: The folder holds something else, or the protocol has a reserved key or is not JSON.
    """
    folder = Path(folder)
    reserved = {"format", "version", "dim", "count", "labels", "paths", "files", "digest"}
    if taken := sorted(reserved & protocol.keys()):
        raise ValueError(f"The protocol has the keys {taken}, which write_embeddings fills in itself; rename them.")
    if folder.exists() and any(folder.iterdir()) and not (overwrite and (folder / "protocol.json").is_file()):
        raise ValueError(
            f"{folder} is not empty; choose a new folder"
            + (
                ", since it holds no stored embeddings to replace."
                if overwrite
                else " or pass overwrite=True (--overwrite)."
            )
        )
    count, dim = embeddings.vectors.shape
    with new_folder(folder, replace=overwrite) as building:
        files: dict[str, str] = {}
        for part, start in enumerate(range(0, count, rows_per_part)):
            rows = np.ascontiguousarray(embeddings.vectors[start : start + rows_per_part])
            _write(building / f"part-{part:05d}.safetensors", safetensors.numpy.save({"vectors": rows}), files)
        _write(building / "rows.csv", _rows_csv(embeddings), files)
        content = {
            **protocol,
            "format": FORMAT,
            "version": VERSION,
            "dim": dim,
            "count": count,
            "labels": embeddings.labels is not None,
            "paths": embeddings.paths is not None,
            "files": files,
        }
        content["digest"] = _protocol_digest(content)
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        (building / "protocol.json").write_text(text + "\n", encoding="utf-8")


def read_protocol(folder: str | Path) -> dict[str, Any]:
    """Read how stored embeddings were made.

    Raises:
        ValueError: No stored embeddings, a newer format, or a damaged protocol.json.
    """
    path = Path(folder) / "protocol.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no stored embeddings: no protocol.json. Write them with 'embedlab embed'.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); make the embeddings again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no protocol of stored embeddings: its format is not {FORMAT!r}.")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {content.get('version')!r}, this embedlab reads {VERSION}; "
            "written by a newer release? Update embedlab."
        )
    if content.get("digest") != _protocol_digest(content):
        raise ValueError(f"{path} is damaged or was edited: its digest does not fit. Make the embeddings again.")
    return content


def read_embeddings(folder: str | Path) -> Embeddings:
    """Read stored embeddings and check every digest.

    Returns:
        The embeddings as they were written, row by row.

    Raises:
        ValueError: A file is missing, damaged or does not fit the protocol; names the file.
    """
    folder = Path(folder)
    protocol = read_protocol(folder)
    vectors = np.empty((protocol["count"], protocol["dim"]), dtype=np.float32)
    start = 0
    for name in sorted(protocol["files"]):
        content = _checked(folder / name, protocol["files"][name])
        if name == "rows.csv":
            rows = list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))
            continue
        part = safetensors.numpy.load(content)["vectors"]
        vectors[start : start + len(part)] = part
        start += len(part)
    return Embeddings(
        vectors,
        [row["label"] for row in rows] if protocol["labels"] else None,
        np.array([int(row["id"]) for row in rows], dtype=np.int64),
        [row["path"] for row in rows] if protocol["paths"] else None,
    )


def read_vectors(path: str | Path, labels_path: str | Path | None = None) -> Embeddings:
    """Read ready-made vectors: a NumPy file, or a folder of stored embeddings.

    Args:
        path: `.npy` file with (N, D) numbers, or a folder that `write_embeddings` made.
        labels_path: Text file with one label per line, row by row (UTF-8), or a `.npy` file of N strings or whole
            numbers. None takes the labels of stored embeddings, or leaves a `.npy` file without.

    Returns:
        Embeddings in float32, as they stand in the file: nothing is normalised.

    Raises:
        ValueError: Not a table of finite numbers, or not as many labels as vectors.
    """
    path = Path(path)
    if path.is_dir():
        stored = read_embeddings(path)
        if labels_path is None:
            return stored
        labels = _labels(Path(labels_path), len(stored))
        return Embeddings(stored.vectors, labels, stored.ids, stored.paths)
    array = _load_npy(path)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold an (N, D) table of numbers, got shape {array.shape} of {array.dtype}.")
    vectors: Vectors = array.astype(np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{path} has NaN, infinite or too large numbers in {int((~finite).sum())} of {len(vectors)} rows, "
            f"first in row {int(np.argmin(finite))}; remove those rows (and their labels)."
        )
    ids = np.arange(len(vectors), dtype=np.int64)
    return Embeddings(vectors, None if labels_path is None else _labels(Path(labels_path), len(vectors)), ids)


def _labels(path: Path, count: int) -> list[str]:
    if path.suffix == ".npy":
        array = _load_npy(path)
        if array.ndim != 1 or array.dtype.kind not in "Uiu":
            raise ValueError(f"{path} must hold (N,) strings or whole numbers, got {array.shape} of {array.dtype}.")
        labels = [str(label) for label in array.tolist()]
    else:
        try:
            labels = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); one label per line is expected.") from error
    if empty := [number for number, label in enumerate(labels, 1) if not label.strip()]:
        raise ValueError(f"{path} has an empty label in line {empty[0]}; every vector needs one.")
    if len(labels) != count:
        raise ValueError(f"{path} has {len(labels)} labels for {count} vectors; one per line, row by row, is expected.")
    return labels


def _load_npy(path: Path) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no NumPy .npy file that can be read without pickle: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an .npz archive; save the one array with numpy.save instead.")
    return array


def _rows_csv(embeddings: Embeddings) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "path", "label"])
    nothing = [""] * len(embeddings)
    writer.writerows(
        zip(embeddings.ids.tolist(), embeddings.paths or nothing, embeddings.labels or nothing, strict=True)
    )
    return text.getvalue().encode("utf-8")


def _write(path: Path, content: bytes, files: dict[str, str]) -> None:
    path.write_bytes(content)
    files[path.name] = _digest(content)


def _checked(path: Path, digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; make the embeddings again.") from error
    if _digest(content) != digest:
        raise ValueError(f"{path} is damaged or was edited: its digest does not fit. Make the embeddings again.")
    return content


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _protocol_digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return _digest(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
