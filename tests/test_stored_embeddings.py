"""Stored embeddings come back as they were, or not at all."""

import contextlib
import json
import os

import numpy as np
import pytest

from embedlab import Embeddings
from embedlab.retrieval import read_embeddings, read_protocol, read_vectors, write_embeddings


def some(count=5, dim=3, labels=True, paths=True):
    random = np.random.default_rng(0)
    return Embeddings(
        random.standard_normal((count, dim)).astype(np.float32),
        [f'Ünï, "{i}"\nline' for i in range(count)] if labels else None,
        np.arange(10, 10 + count),
        [f"dir/{i}.png" for i in range(count)] if paths else None,
    )


@pytest.mark.parametrize("count", [0, 1, 5, 7])
@pytest.mark.parametrize(("labels", "paths"), [(True, True), (False, True), (True, False), (False, False)])
def test_round_trip(tmp_path, count, labels, paths):
    want = some(count, labels=labels, paths=paths)
    write_embeddings(tmp_path / "e", want, protocol={"encoder": "abc", "k": 7}, rows_per_part=3)
    got = read_embeddings(tmp_path / "e")
    np.testing.assert_array_equal(got.vectors, want.vectors)
    np.testing.assert_array_equal(got.ids, want.ids)
    assert (got.labels, got.paths) == (want.labels, want.paths)
    protocol = read_protocol(tmp_path / "e")
    assert (protocol["encoder"], protocol["k"], protocol["dim"], protocol["count"]) == ("abc", 7, 3, count)
    assert len(list((tmp_path / "e").glob("part-*.safetensors"))) == -(-count // 3)


def test_every_flipped_byte_is_found(tmp_path):
    write_embeddings(tmp_path / "e", some(), protocol={"encoder": "abc"}, rows_per_part=3)
    for path in sorted((tmp_path / "e").iterdir()):
        good = path.read_bytes()
        for place in range(0, len(good), 3):
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            if path.name != "protocol.json":
                with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
                    read_embeddings(tmp_path / "e")
                continue
            with contextlib.suppress(ValueError):
                got = read_embeddings(tmp_path / "e")  # white space of the JSON text means nothing
                np.testing.assert_array_equal(got.vectors, some().vectors)
                assert got.labels == some().labels
        path.write_bytes(good)


def test_missing_files_and_newer_formats_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no stored embeddings: no protocol\.json"):
        read_embeddings(tmp_path)
    write_embeddings(tmp_path / "e", some(), protocol={})
    (tmp_path / "e" / "rows.csv").unlink()
    with pytest.raises(ValueError, match=r"rows\.csv is missing"):
        read_embeddings(tmp_path / "e")
    protocol = json.loads((tmp_path / "e" / "protocol.json").read_text())
    (tmp_path / "e" / "protocol.json").write_text(json.dumps(protocol | {"version": 2}))
    with pytest.raises(ValueError, match="format version 2, this embedlab reads 1"):
        read_protocol(tmp_path / "e")


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    write_embeddings(tmp_path / "e", some(), protocol={"run": 1})
    with pytest.raises(ValueError, match="is not empty; choose a new folder or pass overwrite=True"):
        write_embeddings(tmp_path / "e", some(2), protocol={"run": 2})
    with pytest.raises(TypeError):
        write_embeddings(tmp_path / "e", some(2), protocol={"run": object()}, overwrite=True)
    assert read_protocol(tmp_path / "e")["run"] == 1
    write_embeddings(tmp_path / "e", some(2), protocol={"run": 2}, overwrite=True)
    assert (read_protocol(tmp_path / "e")["run"], len(read_embeddings(tmp_path / "e"))) == (2, 2)
    assert os.listdir(tmp_path) == ["e"]


def test_reserved_keys_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"keys \['dim'\], which write_embeddings fills in itself"):
        write_embeddings(tmp_path / "e", some(), protocol={"dim": 3})
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="holds no stored embeddings to replace"):
        write_embeddings(tmp_path, some(), protocol={}, overwrite=True)
    assert (tmp_path / "holiday.jpg").exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_npy_with_text_labels(tmp_path, dtype):
    table = (np.random.default_rng(0).standard_normal((3, 4)) * 10).astype(dtype)
    np.save(tmp_path / "v.npy", table)
    (tmp_path / "labels.txt").write_text("\ufeffAnna\nBérénice\nAnna\n", encoding="utf-8")
    got = read_vectors(tmp_path / "v.npy", tmp_path / "labels.txt")
    np.testing.assert_array_equal(got.vectors, table.astype(np.float32))
    assert got.labels == ["Anna", "Bérénice", "Anna"]
    assert read_vectors(tmp_path / "v.npy").labels is None
    np.save(tmp_path / "labels.npy", np.array([3, 4, 3]))
    assert read_vectors(tmp_path / "v.npy", tmp_path / "labels.npy").labels == ["3", "4", "3"]


def test_a_folder_of_stored_embeddings_is_read_too(tmp_path):
    write_embeddings(tmp_path / "e", some(3), protocol={})
    assert read_vectors(tmp_path / "e").labels == some(3).labels
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    assert read_vectors(tmp_path / "e", tmp_path / "labels.txt").labels == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("table", "labels", "text"),
    [
        (np.zeros(4), "", r"must hold an \(N, D\) table of numbers, got shape \(4,\)"),
        (np.array([["a"]]), "", "table of numbers"),
        (np.array([[1.0], [np.nan]]), "", "1 of 2 rows, first in row 1"),
        (np.array([[1e300]]), "", "too large numbers in 1 of 1 rows"),
        (np.ones((2, 2)), "a\n", "has 1 labels for 2 vectors"),
        (np.ones((2, 2)), "a\n\n", "empty label in line 2"),
    ],
    ids=["1-D", "text", "NaN", "overflow", "count", "empty label"],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_vectors_are_refused(tmp_path, table, labels, text):
    np.save(tmp_path / "v.npy", table)
    (tmp_path / "labels.txt").write_text(labels)
    with pytest.raises(ValueError, match=text):
        read_vectors(tmp_path / "v.npy", tmp_path / "labels.txt" if labels else None)


def test_pickles_are_never_read(tmp_path):
    np.save(tmp_path / "v.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="without pickle"):
        read_vectors(tmp_path / "v.npy")
    (tmp_path / "w.npy").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="without pickle"):
        read_vectors(tmp_path / "w.npy")
