"""Rooms import only rooms above them, and light commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import embedlab

PACKAGE = Path(embedlab.__file__).parent
EVERYWHERE = {"_durable", "_json", "_lazy", "_machine", "_ops", "_types"}
MAY_IMPORT = {
    "data": set(),
    "encoders": {"data"},
    "losses": set(),
    "methods": {"data", "encoders", "losses"},
    "metrics": set(),
    "retrieval": {"data", "encoders", "metrics"},
    "serving": {"data", "encoders", "metrics", "retrieval"},
    "tasks": {"data", "encoders", "losses", "methods", "metrics"},
}
COMMANDS = {"__init__", "__main__", "cli", "fit", "quickstart"}  # may use every room


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.module != "embedlab" else [f"embedlab.{a.name}" for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("embedlab.")}
    return found


def test_every_file_has_a_place() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} == EVERYWHERE | COMMANDS


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_rooms_above_it(room) -> None:
    allowed = MAY_IMPORT[room] | EVERYWHERE | {room}
    for path in sorted((PACKAGE / room).glob("**/*.py")):
        assert imports(path) <= allowed, f"{path.relative_to(PACKAGE)} may import {sorted(allowed)}"


@pytest.mark.parametrize("room", ["", "data", "retrieval", "serving"])
def test_lazy_names_and_names_for_type_checkers_agree(room) -> None:
    path = PACKAGE / room / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    declared = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func.id == "lazy_names")
    lazy = {name for names in ast.literal_eval(call.args[1]).values() for name in names}
    assert declared - {None} == lazy
    module = embedlab if not room else getattr(embedlab, room)
    for name in lazy:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has: "):
        module.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import embedlab", "torch faiss pytorch_lightning numpy"),
        (
            "from embedlab.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
            "torch faiss pytorch_lightning",
        ),
        ("import embedlab.metrics, embedlab.data, embedlab.retrieval", "torch pytorch_lightning"),
        ("from embedlab.data import open_source, read_image, split_by_class", "torch pytorch_lightning"),
        (
            "import tempfile; from embedlab import Gallery\n"
            "with tempfile.TemporaryDirectory() as place:\n"
            "    with Gallery.create(place + '/g', dim=2) as made: made.enroll(embeddings=[[1, 0]], labels=['a'])\n"
            "    with Gallery.open(place + '/g') as gallery: assert len(gallery.identify(embeddings=[[1, 0]])) == 1",
            "torch pytorch_lightning",
        ),
    ],
    ids=["import embedlab", "--help", "rooms", "reading", "gallery"],
)
def test_light_things_load_nothing_heavy(code, heavy) -> None:
    check = f"import sys\n{code}\nloaded = set('{heavy}'.split()) & set(sys.modules)\nassert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
