"""Stored embeddings: a folder with part-NNNNN.safetensors, rows.csv and protocol.json, every byte under a digest."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from embedlab._durable import new_folder, write_file
from embedlab._types import Embeddings, Ids, Vectors
from embedlab.data.sources import nothing_at
from embedlab.retrieval.embedders import as_array

FORMAT = "embedlab-embeddings"
VERSION = 1
PARQUET, FAISS = (".parquet", ".pq"), (".faiss", ".index")  # suffixes
VECTOR_COLUMNS = ("vector", "embedding")

logger = logging.getLogger("embedlab")


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
    refuse_taken(folder, protocol, overwrite=overwrite)
    count = len(embeddings)
    with new_folder(folder, replace=overwrite) as building:
        files: dict[str, str] = {}
        for part, start in enumerate(range(0, count, rows_per_part)):
            files |= write_part(building, part, embeddings.vectors[start : start + rows_per_part])
        write_protocol(building, embeddings, protocol, files)


def refuse_taken(folder: Path, protocol: dict[str, Any], *, overwrite: bool) -> None:
    """Raise unless embeddings with this protocol may be stored here.

    Raises:
        ValueError: Keys that `write_embeddings` fills in itself, or a folder with other content.
    """
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


def write_part(folder: Path, part: int, vectors: Vectors) -> dict[str, str]:
    """Write one file of vectors (N, D); returns its name with its digest."""
    name, content = part_name(part), safetensors.numpy.save({"vectors": np.ascontiguousarray(vectors)})
    write_file(folder / name, content)
    return {name: digest_of(content)}


def part_name(part: int) -> str:
    """Of the file with the vectors of a part."""
    return f"part-{part:05d}.safetensors"


def write_protocol(folder: Path, embeddings: Embeddings, protocol: dict[str, Any], files: dict[str, str]) -> None:
    """Write rows.csv and, last of all, protocol.json beside the parts.

    Args:
        folder: With all parts.
        embeddings: Ids, labels and paths of all rows; vectors (N, D), which need not be there.
        protocol: As in `write_embeddings`.
        files: Digests of the parts by name.
    """
    rows = _rows_csv(embeddings)
    write_file(folder / "rows.csv", rows)
    content = {
        **protocol,
        "format": FORMAT,
        "version": VERSION,
        "dim": embeddings.vectors.shape[1],
        "count": len(embeddings),
        "labels": embeddings.labels is not None,
        "paths": embeddings.paths is not None,
        "files": files | {"rows.csv": digest_of(rows)},
    }
    content["digest"] = _protocol_digest(content)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_file(folder / "protocol.json", (text + "\n").encode())


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


def is_vectors(path: str | Path) -> bool:
    """Whether `read_vectors` takes this path; a Parquet file only where it has a column of vectors."""
    path = Path(path)
    if path.suffix.lower() in PARQUET and path.is_file():
        return bool(set(VECTOR_COLUMNS) & set(_parquet(path).schema_arrow.names))
    return path.suffix.lower() in (".npy", *FAISS) or (path / "protocol.json").is_file()


def read_vectors(path: str | Path, labels_path: str | Path | None = None) -> Embeddings:
    """Read ready-made vectors from a file of NumPy, Parquet or FAISS, or from a folder of stored embeddings.

    Args:
        path: One of

            - a folder that `write_embeddings` made,
            - a `.npy` file with (N, D) numbers,
            - a `.parquet` (`.pq`) file with the vectors as lists in a column `vector` or `embedding` and, if there are
              any, the columns `label`, `id` (whole numbers) and `path`; needs the extra `parquet`,
            - a `.faiss` (`.index`) file of an index that keeps its vectors: Flat, IVF-Flat and HNSW-Flat, also under an
              IDMap. It holds no checksum, and FAISS is not proof against crafted files: read those of people you trust.
        labels_path: Labels for the vectors: a text file with one label per line, row by row (UTF-8); a `.npy` file of N
            strings or whole numbers; or a `.csv` file with the columns `id` and `label`, in any order. None takes the
            file's own, if it has some.

    Returns:
        Embeddings in float32, as they stand in the file: nothing is normalised. Ids are the file's own, else row
        numbers; an IVF's vectors come in the order of their ids.

    Raises:
        ImportError: Parquet without pyarrow.
        ValueError: Not a table of finite numbers, labels that do not fit, or an index that gives vectors back only
            roughly or not at all.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        found = read_embeddings(path)
    elif suffix in PARQUET:
        found = _read_parquet(path)
    elif suffix in FAISS:
        found = _read_faiss(path)
    else:
        array = _load_npy(path)
        found = Embeddings(_table(array, path), None, np.arange(len(array), dtype=np.int64))
    if labels_path is None:
        return found
    _require_file(Path(labels_path))
    return Embeddings(found.vectors, _labels(Path(labels_path), found.ids), found.ids, found.paths)


def _table(array: np.ndarray[Any, Any], path: Path) -> Vectors:
    """(N, D) float32, all finite."""
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold an (N, D) table of numbers, got shape {array.shape} of {array.dtype}.")
    vectors: Vectors = array.astype(np.float32, copy=False)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{path} has NaN, infinite or too large numbers in {int((~finite).sum())} of {len(vectors)} rows, "
            f"first in row {int(np.argmin(finite))}; remove those rows (and their labels)."
        )
    return vectors


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install 'embedlab[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}. Was it copied whole?") from error


def _read_parquet(path: Path) -> Embeddings:
    file = _parquet(path)
    names = file.schema_arrow.names
    columns = [name for name in VECTOR_COLUMNS if name in names]
    if len(columns) != 1:
        raise ValueError(f"{path} needs one column of vectors, 'vector' or 'embedding'; it has {', '.join(names)}.")
    others: dict[str, list[Any]] = {name: [] for name in ("id", "label", "path") if name in names}
    parts, start = [np.zeros((0, 0), np.float32)], 0
    for batch in file.iter_batches(batch_size=65_536, columns=[columns[0], *others]):
        parts.append(_equal_lists(batch.column(columns[0]), f"{path} from row {start} on"))
        start += len(batch)
        for name, values in others.items():
            values += batch.column(name).to_pylist()
    lengths = {part.shape[1] for part in parts[1:]}
    if len(lengths) > 1:
        raise ValueError(f"{path} has vectors of {' and '.join(map(str, sorted(lengths)))} numbers; all need the same.")
    kinds: dict[str, tuple[type, ...]] = {"id": (int,), "label": (str, int), "path": (str,)}
    for name, values in others.items():
        for row, value in enumerate(values):
            if type(value) not in kinds[name] or value == "" or (name == "id" and value >= 2**63):
                raise ValueError(f"{path}: the {name} in row {row} is {value!r}; fill in the column, or leave it out.")
    ids = _unique(np.array(others.get("id", range(start)), dtype=np.int64), path)
    labels = [str(label) for label in others["label"]] if "label" in others else None
    return Embeddings(_table(np.concatenate(parts[1:] or parts), path), labels, ids, others.get("path"))


def _equal_lists(column: Any, place: str) -> Vectors:
    """(N, D) float32 from an Arrow column of lists."""
    import pyarrow
    import pyarrow.compute

    kinds = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise ValueError(f"{place}: the vectors must be lists of numbers, got {column.type}.")
    lengths = set(pyarrow.compute.list_value_length(column).to_pylist())
    numbers = column.flatten()
    if len(lengths) > 1 or None in lengths or numbers.null_count:
        raise ValueError(
            f"{place}: the vectors must have one length and no gaps, got lengths {sorted(map(str, lengths))[:4]} and "
            f"{numbers.null_count} missing numbers."
        )
    array = numbers.to_numpy(zero_copy_only=False)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{place}: the vectors must be lists of numbers, got {column.type}.")
    vectors: Vectors = array.astype(np.float32, copy=False).reshape(len(column), *lengths)
    return vectors


def _unique(ids: Ids, path: Path) -> Ids:
    if len(np.unique(ids)) < len(ids):
        raise ValueError(
            f"{path} has some ids twice: {len(ids)} vectors, {len(np.unique(ids))} ids. Give each its own."
        )
    return ids


def _read_faiss(path: Path) -> Embeddings:
    import faiss

    if not path.is_file():
        raise ValueError(f"No such file: {path}")
    logger.warning("%s: FAISS files have no checksum; read only files of people you trust.", path)
    limit = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(path.stat().st_size)  # nothing in a file is larger than the file
    try:
        vectors, ids = _kept_vectors(faiss.read_index(str(path)), path)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is not a FAISS index that can be read: {error}") from error
    finally:
        faiss.set_deserialization_vector_byte_limit(limit)
    if vectors.shape != (len(ids), vectors.shape[1]):
        raise ValueError(f"{path} is damaged: it holds {len(vectors)} vectors and {len(ids)} ids.")
    return Embeddings(_table(vectors, path), None, _unique(ids, path))


def _kept_vectors(index: Any, path: Path) -> tuple[np.ndarray[Any, Any], Ids]:
    """Vectors (N, D) and ids (N,) of an index that keeps them to the bit."""
    import faiss

    kind = type(index)
    if kind in (faiss.IndexIDMap, faiss.IndexIDMap2):
        inner = faiss.downcast_index(index.index)  # a view: `index` owns it
        return _kept_vectors(inner, path)[0], faiss.vector_to_array(index.id_map)
    if kind in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP, faiss.IndexHNSWFlat):
        vectors = as_array(index.reconstruct_n(0, index.ntotal))  # a tensor, once faiss.contrib.torch_utils is imported
        return vectors, np.arange(index.ntotal, dtype=np.int64)
    if kind is faiss.IndexIVFFlat:
        lists = [_inverted_list(index, number) for number in range(index.nlist)]
        vectors, ids = (np.concatenate(part) for part in zip(*lists, strict=True))
        order = np.argsort(ids, kind="stable")
        return vectors[order], ids[order]
    raise ValueError(
        f"{path} is a FAISS {kind.__name__}, which does not give its vectors back as they were. Kinds that do are "
        "Flat, IVF-Flat and HNSW-Flat, also under an IDMap; otherwise store the original vectors as .npy or Parquet."
    )


def _inverted_list(index: Any, number: int) -> tuple[np.ndarray[Any, Any], Ids]:
    import faiss

    lists = index.invlists
    size = lists.list_size(number)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size) if size else np.zeros(0, np.uint8)
    ids = faiss.rev_swig_ptr(lists.get_ids(number), size) if size else np.zeros(0, np.int64)
    return codes.copy().view(np.float32).reshape(size, index.d), ids.copy()


def _labels(path: Path, ids: Ids) -> list[str]:
    """One label for each vector, by row, or by id from a table."""
    count = len(ids)
    if path.suffix.lower() == ".csv":
        return _labels_by_id(path, ids)
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


def _labels_by_id(path: Path, ids: Ids) -> list[str]:
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as 'CSV UTF-8'.") from error
    labels: dict[int, str] = {}
    for line, row in enumerate(rows, 2):
        key, label = (row.get("id") or "").strip(), (row.get("label") or "").strip()
        if not re.fullmatch(r"-?\d+", key) or not label or int(key) in labels:
            raise ValueError(
                f"{path} row {line} has id {key!r} and label {label!r}; a table of labels has the columns id and "
                "label, whole numbers that differ and names that are not empty."
            )
        labels[int(key)] = label
    if missing := [key for key in ids.tolist() if key not in labels]:
        raise ValueError(f"{path} has no label for {len(missing)} of {len(ids)} vectors, first for id {missing[0]}.")
    return [labels[key] for key in ids.tolist()]


def _require_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(nothing_at(path))


def _load_npy(path: Path) -> np.ndarray[Any, Any]:
    _require_file(path)
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is no NumPy .npy file that is whole and can be read without pickle. Vectors come as .npy, "
            ".parquet, .faiss or stored embeddings; from images 'embedlab embed' makes these."
        ) from error
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


def _checked(path: Path, digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; make the embeddings again.") from error
    if digest_of(content) != digest:
        raise ValueError(f"{path} is damaged or was edited: its digest does not fit. Make the embeddings again.")
    return content


def digest_of(content: bytes) -> str:
    """BLAKE2b-128, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _protocol_digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return digest_of(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
