"""Stored embeddings come back as they were, or not at all."""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from embedlab import Embeddings, Gallery
from embedlab.cli import main
from embedlab.retrieval import read_embeddings, read_protocol, read_vectors, write_embeddings
from embedlab.retrieval.embeddings import is_vectors


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


def test_an_overwriting_that_fails_at_the_last_moment_puts_the_old_back(tmp_path, monkeypatch):
    write_embeddings(tmp_path / "e", some(5), protocol={"run": 1})
    rename = Path.rename

    def failing(self, target):
        if self.name.startswith(".e.new-") and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr("embedlab._durable._swapped", lambda *_: False)  # as where the system has no such call
    with pytest.raises(OSError, match="Input/output error"):
        write_embeddings(tmp_path / "e", some(2), protocol={"run": 2}, overwrite=True)
    assert len(read_embeddings(tmp_path / "e")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


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


# ---- Parquet and FAISS ---------------------------------------------------------------------------------------------

WHY = "PYARROW ABSENT: no Parquet was read; pip install 'embedlab[parquet]'"
TABLE = np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)


def write_parquet(path, vectors, /, *, kind=None, name="vector", **columns):
    arrow = pytest.importorskip("pyarrow", reason=WHY)
    parquet = pytest.importorskip("pyarrow.parquet", reason=WHY)
    column = arrow.array(list(vectors), type=kind or arrow.list_(arrow.float32()))
    parquet.write_table(arrow.table({name: column, **columns}), path, row_group_size=16)
    return path


@pytest.mark.parametrize("kind", ["list", "large", "fixed", "double", "half"])
@pytest.mark.parametrize("name", ["vector", "embedding"])
def test_parquet_gives_back_its_columns(tmp_path, kind, name):
    arrow = pytest.importorskip("pyarrow", reason=WHY)
    kinds = {
        "list": arrow.list_(arrow.float32()),
        "large": arrow.large_list(arrow.float32()),
        "fixed": arrow.list_(arrow.float32(), 3),
        "double": arrow.list_(arrow.float64()),
        "half": arrow.list_(arrow.float16()),
    }
    rows = TABLE.astype(np.float16) if kind == "half" else TABLE
    labels, paths = [f"Ünï {row // 4}" for row in range(40)], [f"a/{row}.png" for row in range(40)]
    path = write_parquet(
        tmp_path / "v.parquet", rows, kind=kinds[kind], name=name, label=labels, path=paths, id=list(range(90, 50, -1))
    )
    assert is_vectors(path)
    found = read_vectors(path)
    np.testing.assert_array_equal(found.vectors, rows.astype(np.float32))
    assert (found.labels, found.paths, found.ids.tolist()) == (labels, paths, list(range(90, 50, -1)))
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"{row},n{row}\n" for row in range(40, 100)))
    assert read_vectors(path, tmp_path / "labels.csv").labels == [f"n{row}" for row in range(90, 50, -1)]


def test_parquet_without_further_columns_and_without_rows(tmp_path):
    found = read_vectors(write_parquet(tmp_path / "v.pq", TABLE))
    assert (found.labels, found.paths, found.ids.tolist()) == (None, None, list(range(40)))
    assert read_vectors(write_parquet(tmp_path / "w.pq", TABLE, label=list(range(40)))).labels[7] == "7"
    assert len(read_vectors(write_parquet(tmp_path / "none.pq", TABLE[:0]))) == 0
    images = write_parquet(tmp_path / "manifest.pq", TABLE, name="scores", path=["x.png"] * 40)
    assert not is_vectors(images)
    assert not is_vectors(tmp_path / "absent.parquet")


@pytest.mark.parametrize(
    ("vectors", "columns", "text"),
    [
        ([[1.0, 2.0], [1.0]], {}, r"one length and no gaps, got lengths \['1', '2'\]"),
        ([[1.0, 2.0], None], {}, "one length and no gaps"),
        ([[1.0, 2.0], [1.0, None]], {}, "1 missing numbers"),
        ([[1.0, 2.0], [1.0, float("inf")]], {}, "1 of 2 rows, first in row 1"),
        ([[1.0, 2.0]] * 2, {"label": ["a", ""]}, "the label in row 1 is ''; fill in the column"),
        ([[1.0, 2.0]] * 2, {"label": ["a", None]}, "the label in row 1 is None"),
        ([[1.0, 2.0]] * 2, {"label": [0.5, 1.5]}, "the label in row 0 is 0.5"),
        ([[1.0, 2.0]] * 2, {"id": ["x", "y"]}, "the id in row 0 is 'x'"),
        ([[1.0, 2.0]] * 2, {"id": [True, False]}, "the id in row 0 is True"),
        ([[1.0, 2.0]] * 2, {"id": np.array([1, 2**63], np.uint64)}, "the id in row 1 is 9223372036854775808"),
        ([[1.0, 2.0]] * 2, {"id": [4, 4]}, "some ids twice: 2 vectors, 1 ids"),
        ([[1.0, 2.0]] * 2, {"embedding": [[1.0], [2.0]]}, "one column of vectors, 'vector' or 'embedding'; it has vec"),
    ],
    ids=str,
)
def test_bad_parquet_is_refused(tmp_path, vectors, columns, text):
    with pytest.raises(ValueError, match=text):
        read_vectors(write_parquet(tmp_path / "v.parquet", vectors, **columns))


def test_parquet_that_is_none_is_refused(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow", reason=WHY)
    for number, kind in enumerate((arrow.float32(), arrow.list_(arrow.string()))):
        values = [1.0, 2.0] if number == 0 else [["a"], ["b"]]
        with pytest.raises(ValueError, match="the vectors must be lists of numbers, got "):
            read_vectors(write_parquet(tmp_path / "v.parquet", values, kind=kind))
    whole = write_parquet(tmp_path / "v.parquet", TABLE).read_bytes()
    (tmp_path / "v.parquet").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_vectors(tmp_path / "v.parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_vectors(tmp_path / "absent.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'embedlab\[parquet\]'"):
        read_vectors(tmp_path / "v.parquet")


def write_index(path, kind, *, ids=None, metric="METRIC_L2"):
    import faiss

    index = faiss.index_factory(TABLE.shape[1], kind, getattr(faiss, metric))
    if not index.is_trained:
        index.train(np.repeat(TABLE, 10, axis=0))
    index.add(TABLE) if ids is None else index.add_with_ids(TABLE, ids)
    faiss.write_index(index, str(path))
    return path


OWN_IDS = np.random.default_rng(2).permutation(1000)[:40]


@pytest.mark.parametrize("metric", ["METRIC_L2", "METRIC_INNER_PRODUCT"])
@pytest.mark.parametrize("kind", ["Flat", "HNSW8,Flat", "IVF4,Flat"])
def test_an_index_gives_its_vectors_back_to_the_bit(tmp_path, caplog, kind, metric):
    path = write_index(tmp_path / "v.faiss", kind, metric=metric)
    assert is_vectors(path)
    found = read_vectors(path)
    np.testing.assert_array_equal(found.vectors, TABLE)
    assert (found.labels, found.ids.tolist()) == (None, list(range(40)))
    assert "no checksum; read only files of people you trust" in caplog.text
    (tmp_path / "labels.txt").write_text("".join(f"n{row}\n" for row in range(40)))
    assert read_vectors(path, tmp_path / "labels.txt").labels == [f"n{row}" for row in range(40)]


@pytest.mark.parametrize("kind", ["IDMap,Flat", "IDMap2,Flat", "IDMap,HNSW8,Flat", "IDMap2,HNSW8,Flat", "IVF4,Flat"])
def test_an_index_gives_its_own_ids_back(tmp_path, kind):
    found = read_vectors(write_index(tmp_path / "v.index", kind, ids=OWN_IDS))
    order = np.argsort(OWN_IDS) if kind.startswith("IVF") else np.arange(40)
    np.testing.assert_array_equal(found.ids, OWN_IDS[order])
    np.testing.assert_array_equal(found.vectors, TABLE[order])
    shuffled = np.random.default_rng(3).permutation(OWN_IDS).tolist()
    (tmp_path / "labels.csv").write_text("note,label,id\n" + "".join(f"x,n{key},{key}\n" for key in shuffled))
    assert read_vectors(tmp_path / "v.index", tmp_path / "labels.csv").labels == [f"n{key}" for key in found.ids]


@pytest.mark.parametrize("kind", ["PQ3x2", "SQ8", "SQfp16", "PCA2,Flat", "IVF4,SQ8", "IVF4,PQ3x2", "IDMap,SQ8", "LSH"])
def test_an_index_that_has_only_codes_is_refused(tmp_path, kind):
    path = write_index(tmp_path / "v.faiss", kind, ids=OWN_IDS if "IDMap" in kind else None)
    with pytest.raises(ValueError, match="does not give its vectors back as they were. Kinds that do are Flat, IVF-"):
        read_vectors(path)


def test_bad_index_files_are_refused(tmp_path):
    import faiss

    whole = write_index(tmp_path / "v.faiss", "Flat").read_bytes()
    limit = faiss.get_deserialization_vector_byte_limit()
    for content in (whole[:-1], whole[:40], b"", b"no index at all"):
        (tmp_path / "v.faiss").write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a FAISS index that can be read"):
            read_vectors(tmp_path / "v.faiss")
    huge = bytearray(whole)
    place = whole.index(np.int64(TABLE.size).tobytes())
    huge[place : place + 8] = np.int64(2**24).tobytes()  # 64 MB in a file of 500 bytes
    (tmp_path / "v.faiss").write_bytes(huge)
    with pytest.raises(ValueError, match="get_deserialization_vector_byte_limit"):
        read_vectors(tmp_path / "v.faiss")
    assert faiss.get_deserialization_vector_byte_limit() == limit
    with pytest.raises(ValueError, match="No such file"):
        read_vectors(tmp_path / "absent.faiss")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("id,label\n0,a\n", "no label for 39 of 40 vectors, first for id 1"),
        ("id,label\n0,a\n0,b\n", "row 3 has id '0' and label 'b'"),
        ("id,label\n0,\n", "row 2 has id '0' and label ''"),
        ("id,label\nx,a\n", "row 2 has id 'x'"),
        ("number,name\n0,a\n", "a table of labels has the columns id and label"),
    ],
)
def test_bad_tables_of_labels_are_refused(tmp_path, text, problem):
    np.save(tmp_path / "v.npy", TABLE)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_vectors(tmp_path / "v.npy", tmp_path / "labels.csv")


def test_the_command_enrolls_vectors_of_either_kind(tmp_path, capsys):
    labels = [f"n{row // 4}" for row in range(40)]
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    assert main(["gallery", "create", str(tmp_path / "g"), "--dim", "3"]) == 0
    enroll = ["gallery", "enroll", str(tmp_path / "g")]
    write_index(tmp_path / "v.faiss", "Flat")
    assert main([*enroll, str(tmp_path / "v.faiss"), "--labels", str(tmp_path / "labels.txt")]) == 0
    assert main([*enroll, str(write_parquet(tmp_path / "v.parquet", TABLE, label=labels))]) == 0
    with Gallery.open(tmp_path / "g") as gallery:
        assert gallery.counts() == dict.fromkeys(sorted(set(labels)), 8)
    assert main([*enroll, str(tmp_path / "v.faiss")]) == 1
    assert "has no labels" in capsys.readouterr().err
