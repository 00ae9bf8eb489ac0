import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedlab.data.images import ImageError, fit_image
from embedlab.data.sources import Source, class_numbers, open_source


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 20, 30)).save(path)
    return path


def manifest(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for number, name in enumerate(["b/2.png", "b/1.PNG", "a/x/1.png", "a/1.png"]):
        picture(root / name, number)
    for name in ["README.txt", "a/notes.md", ".hidden/1.png", "a/.secret.png"]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


# ---- folders


def test_folder_gives_labels_relative_to_the_root_in_sorted_order(folder: Path) -> None:
    source = open_source(folder)
    assert [os.path.relpath(name, folder) for name in source.names] == ["a/1.png", "a/x/1.png", "b/1.PNG", "b/2.png"]
    assert source.labels == ["a", "a/x", "b", "b"]
    assert source.ignored == 2
    assert len(source) == 4
    assert open_source(f"{folder}/").labels == source.labels


def test_images_directly_in_the_root_have_no_label(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "empty").mkdir()
    assert open_source(tmp_path).labels is None


def test_images_in_root_and_in_folders_are_refused(folder: Path) -> None:
    picture(folder / "stray.png")
    with pytest.raises(
        ValueError, match=r"holds 1 images directly \(.*stray\.png, \.\.\.\) and 4 in folders.*Move them"
    ):
        open_source(folder)


def test_an_empty_class_folder_is_named(folder: Path) -> None:
    (folder / "c").mkdir()
    with pytest.raises(ValueError, match=r"Class folder .*photos/c/ is empty: put its images in, or remove the folder"):
        open_source(folder)


def test_a_folder_without_images_says_what_it_found(tmp_path: Path) -> None:
    for name in ("a.heic", "b.heic", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"No image in .* found 2 \.heic, 1 \.txt\. .*\.jpg"):
        open_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"No image in .*empty or below; found nothing"):
        open_source(tmp_path / "empty")


def test_links_are_followed_but_not_in_circles(folder: Path) -> None:
    (folder / "b" / "up").symlink_to(folder)
    (folder / "c").symlink_to(folder / "a")
    assert sorted(set(open_source(folder).labels or [])) == ["a", "a/x", "b", "c", "c/x"]


# ---- manifests


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(4):
        picture(tmp_path / "images" / f"{number}.png", number)
    return tmp_path


def test_manifest_with_further_columns(pictures: Path) -> None:
    text = (
        "\ufeffpath, label ,split,group\r\n"
        'images/0.png,"red, round",train,g1\r\n'
        "\r\n"
        f"{pictures}/images/1.png, green,test,g2\r\n"
        "./images/2.png,green,test,\r\n"
    )
    source = open_source(manifest(pictures / "list.csv", text))
    assert source.names == [str(pictures / "images" / f"{i}.png") for i in range(3)]
    assert source.labels == ["red, round", "green", "green"]
    assert source.columns == {"split": ["train", "test", "test"], "group": ["g1", "g2", ""]}


def test_manifest_paths_are_relative_to_its_folder(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(pictures / "list.csv", "path\nimages/3.png\n")
    monkeypatch.chdir(pictures)
    assert open_source("list.csv").names == ["images/3.png"]
    monkeypatch.chdir(pictures / "images")
    source = open_source("../list.csv")
    assert source.labels is None
    assert source.image(0)[0, 0].tolist() == [3, 20, 30]


def test_parquet_says_the_same_as_csv(pictures: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    table = {"path": ["images/0.png", "images/1.png"], "label": [7, 12], "group": [None, "g"]}
    parquet.write_table(pyarrow.table(table), pictures / "list.parquet")
    source = open_source(pictures / "list.parquet", select={"label": "12"})
    assert (source.labels, source.columns) == (["12"], {"group": ["g"]})
    assert open_source(pictures / "list.parquet").columns == {"group": ["", "g"]}

    broken = {"path": ["images/0.png", "images/1.png"], "label": ["a", None]}
    parquet.write_table(pyarrow.table(broken), pictures / "list.parquet")
    with pytest.raises(ValueError, match=r"list\.parquet row 2: the label is empty"):
        open_source(pictures / "list.parquet")
    (pictures / "list.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match=r"list\.parquet is not a readable Parquet file: .*copied whole"):
        open_source(pictures / "list.parquet")


def test_parquet_without_pyarrow_gives_the_line_to_install_it(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pictures / "list.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=re.escape('pip install "embedlab[parquet]"')):
        open_source(pictures / "list.parquet")


WRONG = {
    "label missing in one line": (
        "path,label\nimages/0.png,a\nimages/1.png,\n",
        r"list\.csv line 3: the label is empty",
    ),
    "no path column": (
        "file,label\nimages/0.png,a\n",
        r"line 1: no column 'path', got file,label; the first line must",
    ),
    "no header": ("images/0.png,a\n", r"line 1: no column 'path', got images/0\.png,a"),
    "label by another name": ("path,class\nimages/0.png,a\n", r"line 1: no column 'label' but 'class'; rename it"),
    "label in capitals": ("path,Label\nimages/0.png,a\n", r"line 1: no column 'label' but 'Label'; rename it"),
    "column twice": ("path,label,label\nimages/0.png,a,b\n", r"line 1: column names must be there and differ"),
    "column without name": ("path,label,\nimages/0.png,a,b\n", r"line 1: column names must be there and differ"),
    "semicolons": ("path;label\nimages/0.png;a\n", r"line 1: columns are set apart by ';', expected commas"),
    "file twice": (
        "path\nimages/0.png\n./images/0.png\n",
        r"line 3 lists .*0\.png again, it stands in .*list\.csv line 2",
    ),
    "no such file": (
        "path\nimages/9.png\n",
        r"line 2: no file .*images/9\.png; paths are relative to the manifest's fol",
    ),
    "windows paths": ("path\nimages\\0.png\n", r"line 2: no file .*; write / instead of \\"),
    "empty path": ("path,label\n,a\n", r"line 2: the path is empty"),
    "too many cells": (
        "path,label\nimages/0.png,a,b\n",
        r"line 2 has 3 cells, the header has 2 \(path,label\); a comma",
    ),
    "too few cells": ("path,label\nimages/0.png\n", r"line 2 has 1 cells"),
    "open quote": ('path,label\n"images/0.png,a\n', r"list\.csv line 2 is not CSV: .*check the quotes"),
    "only a header": ("path,label\n", r"list\.csv lists no images"),
    "nothing": ("", r"list\.csv: no column 'path'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_manifest_names_file_and_line(pictures: Path, kind: str) -> None:
    text, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        open_source(manifest(pictures / "list.csv", text))


def test_a_manifest_in_another_encoding(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"list\.csv after line \d is not UTF-8 text .*save it as 'CSV UTF-8'"):
        open_source(manifest(pictures / "list.csv", "path,label\nimages/0.png,Gr\u00fcn\n", encoding="latin-1"))
    source = open_source(manifest(pictures / "list.csv", "path,label\nimages/0.png,Gr\u00fcn \u6f22\n"))
    assert source.labels == ["Gr\u00fcn \u6f22"]


# ---- one file, nothing, something else


def test_a_single_image(tmp_path: Path) -> None:
    source = open_source(picture(tmp_path / "one.png", 9))
    assert (len(source), source.labels) == (1, None)
    assert source.image(0, channels=3)[0, 0].tolist() == [9, 20, 30]


def test_what_is_no_source(tmp_path: Path) -> None:
    picture(tmp_path / "photo.png")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"No such file or folder: .*photos\.png; did you mean .*photo\.png\?"):
        open_source(tmp_path / "photos.png")
    with pytest.raises(ValueError, match=r"No such file or folder: .*zzzz; looked in"):
        open_source(tmp_path / "zzzz")
    with pytest.raises(ValueError, match=rf"folder: .*nowhere/deep/x; looked in {re.escape(str(tmp_path))}\.$"):
        open_source(tmp_path / "nowhere" / "deep" / "x")
    with pytest.raises(ValueError, match=r"notes\.txt is no source of images: expected a folder.*torchvision:NAME"):
        open_source(tmp_path / "notes.txt")


# ---- torchvision


def write_mnist(root: Path) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        label = bytes([3, 1, 4, 1, 5] if part == "train" else [2, 7, 1, 8, 2])
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 5, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 5) + label)
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b""))
    return images


def test_torchvision_data_set_with_a_train_switch(tmp_path: Path) -> None:
    images = write_mnist(tmp_path)
    source = open_source(f"torchvision:MNIST?root={tmp_path}&split=test")
    assert source.names[:2] == ["MNIST[0]", "MNIST[1]"]
    assert source.labels == ["2 - two", "7 - seven", "1 - one", "8 - eight", "2 - two"]
    assert source.columns == {"split": ["test"] * 5}
    assert open_source(f"torchvision:MNIST?root={tmp_path}").columns == {"split": ["train"] * 5}
    got, kept, _ = source.select({"label": "2 - two"}).read([1], 28, channels=1)
    np.testing.assert_array_equal(got[0, 0], images[4])
    assert kept.tolist() == [1]


def test_torchvision_image_folder_and_special_characters_in_the_root(tmp_path: Path) -> None:
    root = tmp_path / "a b+c"
    picture(root / "cat" / "1.png", 1)
    picture(root / "dog" / "1.png", 2)
    source = open_source(f"torchvision:ImageFolder?root={root}")
    assert source.labels == ["cat", "dog"]
    assert source.image(1)[0, 0].tolist() == [2, 20, 30]


def test_torchvision_data_set_that_keeps_no_targets() -> None:
    source = open_source("torchvision:FakeData?size=6&num_classes=3")
    assert len(source) == 6
    assert set(source.labels or []) <= {"0", "1", "2"}
    np.testing.assert_array_equal(source.image(4), source.subset([4]).image(0))


def test_torchvision_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torchvision has no data set 'CIFAR'; near: .*CIFAR10"):
        open_source("torchvision:CIFAR")
    with pytest.raises(ValueError, match=r"does not say where its files are: torchvision:CIFAR10\?root=FOLDER"):
        open_source("torchvision:CIFAR10")
    with pytest.raises(ValueError, match=r"torchvision says: Dataset not found.*\. .*add download=true after the '\?'"):
        open_source(f"torchvision:CIFAR10?root={tmp_path}")
    with pytest.raises(ValueError, match=r"CIFAR10 takes no 'folds'; it takes root, train"):
        open_source(f"torchvision:CIFAR10?root={tmp_path}&folds=1")
    with pytest.raises(ValueError, match=r"CIFAR10 knows split=train and split=test, got 'val'"):
        open_source(f"torchvision:CIFAR10?root={tmp_path}&split=val")


@pytest.mark.parametrize(
    ("targets", "want"),
    [([-1, -1], None), (["x", "y"], ["x", "y"]), ([1, 0], ["1", "0"]), ([0, -1], "some images have no class")],
)
def test_targets_of_every_kind(
    monkeypatch: pytest.MonkeyPatch, targets: list[int | str], want: list[str] | str | None
) -> None:
    import torchvision.datasets

    class Kept:
        """Keeps targets that do not agree with what it returns, as some data sets do."""

        targets = ("wrong", "wrong")

        def __len__(self) -> int:
            return 2

        def __getitem__(self, row: int) -> tuple[Image.Image, int | str]:
            return Image.new("L", (2, 2)), targets[row]

    monkeypatch.setattr(torchvision.datasets, "FakeData", Kept)
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            open_source("torchvision:FakeData")
    else:
        assert open_source("torchvision:FakeData").labels == want


def test_targets_that_are_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "FakeData", lambda: [(None, {"boxes": []})])
    with pytest.raises(ValueError, match=r"its targets are not classes \(the first is \{'boxes': \[\]\}\)"):
        open_source("torchvision:FakeData")
    monkeypatch.setattr(torchvision.datasets, "FakeData", lambda: [(None, 1)])
    with pytest.raises(ImageError, match=r"FakeData\[0\]: it is a NoneType, not a picture"):
        open_source("torchvision:FakeData").image(0)


# ---- arrays and the Source itself


@pytest.fixture
def arrays() -> Source:
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    return Source.from_arrays(images, list("abcabc"), columns={"split": ["train"] * 3 + ["test"] * 3})


def test_arrays_are_read_without_a_copy_of_the_store(arrays: Source) -> None:
    assert arrays.names[5] == "array[5]"
    part = arrays.subset([4, 1]).subset(np.array([False, True]))
    assert (part.names, part.labels, part.columns) == (["array[1]"], ["b"], {"split": ["train"]})
    assert part.pixels is arrays.pixels
    np.testing.assert_array_equal(part.image(0), arrays.pixels[1])


def test_grey_and_many_channel_arrays() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    source = Source.from_arrays(grey)
    assert source.labels is None
    np.testing.assert_array_equal(source.image(1, channels=1)[..., 0], grey[1])
    np.testing.assert_array_equal(source.image(1)[..., 2], grey[1])
    five = np.zeros((2, 3, 3, 5), dtype=np.uint8)
    assert Source.from_arrays(five).read(None, 4, channels=5)[0].shape == (2, 5, 4, 4)
    with pytest.raises(ValueError, match="An image of 5 channels cannot become one of 3: set channels=5"):
        Source.from_arrays(five).read(None, 4)


def test_read_numbers_the_samples_of_the_source(arrays: Source) -> None:
    got, kept, skipped = arrays.read([5, 0], 4)
    assert kept.tolist() == [5, 0]
    assert skipped == []
    np.testing.assert_array_equal(got[0], fit_image(arrays.pixels[5], 4).transpose(2, 0, 1))
    whole, every, _ = arrays.read(None, 4)
    assert every.tolist() == list(range(6))
    np.testing.assert_array_equal(whole[[5, 0]], got)
    with pytest.raises(ValueError, match=r"Rows must be in 0\.\.5, got 0\.\.6"):
        arrays.read([0, 6], 4)


def test_read_skips_bad_files_and_keeps_source_numbers(folder: Path) -> None:
    source = open_source(folder)
    Path(source.names[2]).write_bytes(b"")
    got, kept, skipped = source.read([3, 2, 0], 4, on_error="skip", skip_limit=0.5)
    assert kept.tolist() == [3, 0]
    assert got[:, 0, 0, 0].tolist() == [0, 3]
    assert skipped == [(source.names[2], "the file is empty (0 bytes)")]
    with pytest.raises(ImageError, match=re.escape(source.names[2])):
        source.read(None, 4)


def test_select(arrays: Source) -> None:
    assert arrays.select({"split": "test"}).names == ["array[3]", "array[4]", "array[5]"]
    assert arrays.select({"split": ["test", "train"], "label": "a"}).names == ["array[0]", "array[3]"]
    assert arrays.select({}).names == arrays.names
    with pytest.raises(ValueError, match=r"There is no column 'fold'; there are 'label', 'split'"):
        arrays.select({"fold": "1"})
    with pytest.raises(ValueError, match=r"Column 'split' never holds 'val'; it holds 'test', 'train'\."):
        arrays.select({"split": "val"})
    with pytest.raises(ValueError, match=r"No sample fits .*never together in one row"):
        arrays.subset([0, 4]).select({"label": "a", "split": "test"})


def test_subset_refuses_rows_that_are_not_there(arrays: Source) -> None:
    assert len(arrays.subset([])) == 0
    with pytest.raises(ValueError, match=r"Rows must be in 0\.\.5, got -1\.\.2"):
        arrays.subset([-1, 2])
    with pytest.raises(ValueError, match=r"A mask over 6 samples needs that length, got \(2,\)"):
        arrays.subset(np.array([True, False]))
    with pytest.raises(ValueError, match=r"Source holds array\[1\] 2 times"):
        arrays.subset([1, 1])


@pytest.mark.parametrize("label", ["", " a", "a\n", 3, None])
def test_labels_are_plain_strings(label: object) -> None:
    with pytest.raises(
        ValueError, match=rf"Label {re.escape(repr(label))} of b\.png is not usable: labels are non-empty"
    ):
        Source(["a.png", "b.png"], ["x", label])


def test_labels_are_text() -> None:
    with pytest.raises(ValueError, match=r"is not UTF-8 text: rename the folder"):
        Source(["a.png"], ["caf\udce9"])


def test_source_checks_its_parts() -> None:
    with pytest.raises(ValueError, match="Source has 2 names but 1 labels; they must be sample by sample"):
        Source(["a", "b"], ["x"])
    with pytest.raises(ValueError, match="Source has 1 names but 2 column 'split'"):
        Source(["a"], columns={"split": ["x", "y"]})
    with pytest.raises(ValueError, match="A further column cannot be called 'label'"):
        Source(["a"], columns={"label": ["x"]})
    with pytest.raises(ValueError, match="Source needs pixels and rows together"):
        Source(["a"], pixels=np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"needs uint8 images .* got \(2, 3, 3\) float64; move channels last"):
        Source.from_arrays(np.zeros((2, 3, 3)))


def test_class_numbers() -> None:
    names, numbers = class_numbers(["b", "a", "b", "c"])
    assert names == ["a", "b", "c"]
    assert numbers.tolist() == [1, 0, 1, 2]
    assert numbers.dtype == np.int64


def test_reading_files_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, embedlab.data.images, embedlab.data.sources, embedlab.data.splits;"
        "print(sorted({'torch', 'torchvision', 'pytorch_lightning', 'pyarrow', 'faiss'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- real data


def blocks_of_the_page() -> list[str]:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def run_block_of_the_page(data: Path, words: str) -> None:
    """Run the Python block of docs/data.md that holds these words, in the current folder."""
    (block,) = (block for block in blocks_of_the_page() if words in block)
    exec(compile(block.replace("../shared/data", str(data)), "docs/data.md", "exec"), {})


def test_the_other_blocks_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [str(picture(Path(f"photos/kind{i}/{j}.png"))) for i in range(5) for j in range(2)]
    rows = [f"{name},kind,test,shop {1 + i % 2}" for i, name in enumerate(names)]
    manifest(Path("list.csv"), "\n".join(["path,label,split,group", *rows]))
    blocks = [block for block in blocks_of_the_page() if "../shared" not in block]
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), {})


def test_page_turns_the_grocery_lists_into_a_manifest(
    shared_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_block_of_the_page(shared_data("grocery_store_128").parent, "grocery")
    source = open_source("grocery.csv")
    assert (len(source), len(set(source.labels))) == (5421 + 81, 81)
    of_role = {role: set(source.select({"split": role}).labels) for role in ("train", "calibrate", "test")}
    assert {role: len(classes) for role, classes in of_role.items()} == {"train": 36, "calibrate": 18, "test": 27}
    assert sorted(of_role["test"]) == sorted(set(source.labels))[2::3]
    counts = {name: source.column("photo_set").count(name) for name in ("train", "val", "test", "iconic")}
    assert counts == {"train": 2640, "val": 296, "test": 2485, "iconic": 81}
    mushrooms = source.select({"label": "Brown-Cap-Mushroom"})
    assert len({os.path.dirname(name) for name in mushrooms.names}) > 2, "labels come from the lists, not from folders"
    images, _, _ = mushrooms.read(None, 16)
    assert images.shape == (len(mushrooms), 3, 16, 16)


def test_page_splits_the_faces_by_person(shared_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_block_of_the_page(shared_data("att_faces").parent, "att_faces")
    for role, people in (("train", range(1, 21)), ("calibrate", range(21, 31)), ("test", range(31, 41))):
        source = open_source("faces.csv", select={"split": role})
        assert set(source.labels) == {f"s{number}" for number in people}
        assert len(source) == 10 * len(people)


def test_page_lists_the_tiles_with_their_groups(shared_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_block_of_the_page(shared_data("magnetic_tile_128").parent, "magnetic_tile")
    source = open_source("tiles.csv")
    assert (source.labels.count("defect"), source.labels.count("whole")) == (392, 952)
    assert len(set(source.column("group"))) == 255


def test_real_folders(shared_data) -> None:
    faces = open_source(shared_data("att_faces"))
    assert (len(faces), len(set(faces.labels)), faces.ignored) == (400, 40, 2)
    characters = open_source(shared_data("omniglot_small1"))
    assert len(characters) == 2720
    assert "Greek/character01" in characters.labels
    images, _, skipped = characters.subset(range(20)).read(None, 28, channels=1)
    assert skipped == []
    assert images.mean() > 200, "black strokes on white"
