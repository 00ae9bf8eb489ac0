"""Galleries and files from strangers: no code of theirs runs, nothing outside the folder is touched."""

import ast
import json
import pickle
import sqlite3
from pathlib import Path

import numpy as np
import pytest

import embedlab
from embedlab import Gallery
from embedlab.retrieval import GalleryDamaged, GalleryError
from embedlab.retrieval.store import Meta

# ---- our own code ----------------------------------------------------------------------------------------------------


def dangers(source):
    """Calls that run or unpack what stands in a file, as (line, why)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in ("pickle", "marshal", "shelve"))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
            yield node.lineno, name
        if name == "torch.load" and given.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
            yield node.lineno, f"{name} with allow_pickle or shell"


def test_no_file_is_ever_executed_or_unpickled():
    files = sorted(Path(embedlab.__file__).parent.rglob("*.py"))
    found = [(str(path), *danger) for path in files for danger in dangers(path.read_text(encoding="utf-8"))]
    assert len(files) > 50
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import load",
        "import shelve as s",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_check_finds(code):
    assert list(dangers(code))


def test_the_check_lets_pass_what_is_safe():
    assert not list(
        dangers(
            "import json\nnp.load(p)\ntorch.load(p, weights_only=True)\nmodel.eval()\nnp.load(p, allow_pickle=False)"
        )
    )


# ---- galleries from elsewhere ----------------------------------------------------------------------------------------


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path):
    with Gallery.create(tmp_path / "g", dim=4) as gallery:
        gallery.enroll(embeddings=np.eye(4), labels=list("abcd"))
    return tmp_path / "g"


def change(folder, *statements):
    database = sqlite3.connect(folder / "gallery.db")
    for statement in statements:
        database.execute(*statement) if isinstance(statement, tuple) else database.execute(statement)
    database.commit()
    database.close()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON item BEGIN DELETE FROM item; END",
        "CREATE VIEW v AS SELECT load_extension('x')",
        "CREATE TABLE extra (x)",
        "CREATE INDEX i ON item (label)",
        "CREATE VIRTUAL TABLE f USING fts5(x)",
        "ALTER TABLE item ADD COLUMN more TEXT",
        "DROP TABLE cohort",
    ],
)
def test_a_strange_schema_is_refused(folder, statement):
    change(folder, statement)
    for read_only in (False, True):
        with pytest.raises(GalleryDamaged, match="its schema is not that of a gallery"):
            Gallery.open(folder, read_only=read_only)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE item SET vector = zeroblob(30000000) WHERE id = 2",
        "UPDATE item SET label = zeroblob(16) WHERE id = 2",
        "UPDATE item SET vector = 1.5 WHERE id = 2",
        "UPDATE item SET digest = 'text' WHERE id = 2",
        "UPDATE item SET id = 9223372036854775807 WHERE id = 2",
        "INSERT INTO cohort VALUES (0, x'00', x'00')",
        "INSERT INTO thumbnail VALUES (1, 'text', 7)",
        "INSERT INTO reference VALUES (-1, 1.5, NULL, x'00')",
        "INSERT INTO request VALUES ('key', 'text', 2, x'00', x'00')",
        "UPDATE sqlite_sequence SET seq = 0",
        "DELETE FROM meta WHERE key = 'count'",
        "UPDATE meta SET value = x'ff00'",
        "UPDATE meta SET value = '[[[[' WHERE key = 'settings'",
    ],
)
def test_strange_rows_are_refused(folder, statement):
    try:
        change(folder, statement)
    except sqlite3.IntegrityError:  # the schema itself refuses it
        return
    for read_only in (False, True):
        with pytest.raises(GalleryDamaged, match="is damaged"):
            Gallery.open(folder, read_only=read_only)


@pytest.mark.parametrize("name", ["gallery.db", "gallery.lock", "gallery.generation", "cache", "gallery.db-wal"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, name):
    target = tmp_path / "precious"
    if (folder / name).exists():
        (folder / name).rename(target)
    else:
        target.write_text("precious")
    if name == "cache":
        (target / "file").write_text("precious")
    before = sorted(path.read_bytes() for path in [target, *target.glob("*")] if path.is_file())
    (folder / name).symlink_to(target)
    for options in ({}, {"read_only": True}, {"salvage": True}):
        with pytest.raises(GalleryError, match=rf"{name} is a link to .*precious"):
            Gallery.open(folder, **options)
    assert sorted(path.read_bytes() for path in [target, *target.glob("*")] if path.is_file()) == before


def test_pickles_in_a_gallery_are_never_opened(folder, tmp_path):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(canary))
    for name in ("cache/index.faiss", "cache/index.pkl", "gallery.pkl", "representations.pkl", "labels.npy"):
        (folder / name).write_bytes(bomb)
    with Gallery.open(folder) as gallery:
        gallery.identify(embeddings=np.eye(4))
        assert gallery.check().ok
        gallery.compact()
        gallery.backup(tmp_path / "copy")
        gallery.remove("a", purge=True)
    for name in ("gallery.db", "gallery.generation"):
        (folder / name).write_bytes(bomb)
        with pytest.raises(GalleryDamaged):
            Gallery.open(folder)
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists()  # the bomb does go off where somebody unpickles it


def test_an_encoder_folder_that_names_code_is_refused(folder, tmp_path):
    (folder / "encoder").mkdir()
    hostile = {"backbone": {"_target_": "os.system", "class_path": "os.system", "args": ["touch canary"]}}
    (folder / "encoder" / "encoder.json").write_text(json.dumps(hostile))
    (folder / "encoder" / "encoder.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"encoder|fingerprint"):
        Gallery.create(tmp_path / "new", folder / "encoder")
    assert not Path("canary").exists()
    assert not (tmp_path / "new").exists()


def test_a_meta_row_with_strange_keys_is_refused(folder):
    rows = [(k, v) for k, v in Meta("0" * 32, 4, None, False, {}).rows() if k != "digest"]
    with pytest.raises(GalleryDamaged, match="lost or gained keys"):
        Meta.from_rows([(k.encode(), v.encode()) for k, v in [*rows, ("__class__", '"x"')]])
