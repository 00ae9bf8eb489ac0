import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedlab.data.sources import Source, open_source
from embedlab.data.splits import (
    ROLES,
    folds_by_class,
    read_split,
    split_by_class,
    split_by_group,
    split_by_sample,
    write_split,
)

LABELS = [f"class{i % 20:02d}" for i in range(100)]
NAMES = [f"image{i}.png" for i in range(100)]


def counts(roles: np.ndarray) -> list[int]:
    return [int((roles == role).sum()) for role in ROLES]


@pytest.mark.parametrize("split", [split_by_class, split_by_group])
def test_identities_are_disjoint_and_shares_hold(split) -> None:
    roles = split(LABELS, (0.5, 0.3, 0.2), seed=3)
    by_role = {role: {label for label, r in zip(LABELS, roles, strict=True) if r == role} for role in ROLES}
    assert [len(by_role[role]) for role in ROLES] == [10, 6, 4]
    assert set().union(*by_role.values()) == set(LABELS)
    assert sum(map(len, by_role.values())) == 20


@pytest.mark.parametrize("folds", [3, 4, 7])
def test_every_class_is_tested_in_one_fold_and_never_in_two_roles(folds: int) -> None:
    splits = folds_by_class(LABELS, folds, seed=2)
    assert len(splits) == folds
    for role in ("test", "calibrate"):
        seen = [label for roles in splits for label in {x for x, r in zip(LABELS, roles, strict=True) if r == role}]
        assert sorted(seen) == sorted(set(LABELS)), "each class once"
    for roles in splits:
        by_class = {label: {r for x, r in zip(LABELS, roles, strict=True) if x == label} for label in set(LABELS)}
        assert all(len(found) == 1 for found in by_class.values())
        assert set(roles) == set(ROLES)
    order = np.random.default_rng(0).permutation(100)
    shuffled = folds_by_class([LABELS[i] for i in order], folds, seed=2)
    np.testing.assert_array_equal(splits[0][order], shuffled[0])
    assert any((a != b).any() for a, b in zip(splits, folds_by_class(LABELS, folds), strict=True))


def test_folds_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="3 folds or more.* got 2 folds of 20 classes"):
        folds_by_class(LABELS, 2)
    with pytest.raises(ValueError, match="got 21 folds of 20 classes"):
        folds_by_class(LABELS, 21)
    with pytest.raises(ValueError, match="Sample 1 has no class"):
        folds_by_class(["a", "", "b"], 3)


@pytest.mark.parametrize("kind", ["class", "group", "sample", "stratified"])
def test_a_split_hangs_on_names_and_seed_not_on_the_order_of_rows(kind: str) -> None:
    def split(names: list[str], labels: list[str], seed: int) -> np.ndarray:
        if kind in ("class", "group"):
            return (split_by_class if kind == "class" else split_by_group)(labels, seed=seed)
        return split_by_sample(names, labels if kind == "stratified" else None, seed=seed)

    order = np.random.default_rng(0).permutation(100)
    first = split(NAMES, LABELS, 0)
    shuffled = split([NAMES[i] for i in order], [LABELS[i] for i in order], 0)
    np.testing.assert_array_equal(first[order], shuffled)
    assert (first != split(NAMES, LABELS, 1)).any()


def test_a_split_never_changes_between_versions() -> None:
    # written down: runs of last year must give the same test identities
    got = dict(zip("abcdefgh", split_by_class(list("abcdefgh")), strict=True))
    assert "".join(name for name in got if got[name] == "train") == "abce"
    assert "".join(name for name in got if got[name] == "test") == "dh"


def test_growth_of_a_class_leaves_the_others_where_they_were() -> None:
    before = split_by_class(LABELS)
    after = split_by_class([*LABELS, *["class00"] * 50])
    np.testing.assert_array_equal(before, after[:100])


@pytest.mark.parametrize("fractions", [(0.5, 0.25, 0.25), (0.8, 0.1, 0.1), (0.34, 0.33, 0.33)])
def test_stratified_shares_hold_in_every_class(fractions: tuple[float, float, float]) -> None:
    labels = [f"c{i % 7}" for i in range(700)]
    roles = split_by_sample([str(i) for i in range(700)], labels, fractions=fractions)
    for label in set(labels):
        here = roles[[i for i, other in enumerate(labels) if other == label]]
        np.testing.assert_allclose(counts(here), np.multiply(fractions, 100), atol=1)


def test_small_classes_do_not_all_favour_the_same_role() -> None:
    labels = [f"c{i // 4}" for i in range(400)]  # four images a class: 3.2, 0.4, 0.4 wanted
    roles = split_by_sample([str(i) for i in range(400)], labels, fractions=(0.8, 0.1, 0.1))
    train, calibrate, test = counts(roles)
    assert train == 300
    assert min(calibrate, test) > 30


def test_samples_without_labels() -> None:
    assert counts(split_by_sample(NAMES, fractions=(0.7, 0.2, 0.1))) == [70, 20, 10]


def test_a_share_of_zero_is_an_empty_role() -> None:
    assert counts(split_by_sample(NAMES, fractions=(0.8, 0.0, 0.2))) == [80, 0, 20]
    assert "calibrate" not in split_by_class(["a", "b"], (0.5, 0.0, 0.5))


def test_split_errors() -> None:
    with pytest.raises(ValueError, match=r"2 classes at fractions \(0\.5, 0\.25, 0\.25\) leave 'test' empty: add data"):
        split_by_class(["a", "b", "a"])
    with pytest.raises(ValueError, match=r"2 groups at fractions .* leave 'test' empty"):
        split_by_group(["a", "b", "a"])
    with pytest.raises(ValueError, match=r"4 samples of 4 classes at fractions .* leave 'calibrate' empty"):
        split_by_sample(list("abcd"), list("abcd"))
    for fractions in ((0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.5)):
        with pytest.raises(ValueError, match=r"fractions must be three shares \(train, calibrate, test\).* got \("):
            split_by_class(LABELS, fractions)
    with pytest.raises(ValueError, match=r"Sample 1 has no group; fill in the column"):
        split_by_group(["a", "", "b"])
    with pytest.raises(ValueError, match=r"needs unique names, got 2 names of 1 samples"):
        split_by_sample(["a", "a"])
    with pytest.raises(ValueError, match=r"got 2 names but 1 labels"):
        split_by_sample(["a", "b"], ["x"])


# ---- on disk


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for number in range(8):
        path = tmp_path / "photos" / f"kind {number // 2}, \u6f22" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), number).save(path)
    opened = open_source(tmp_path / "photos")
    return Source(opened.names, opened.labels, columns={"split": ["old"] * 8, "group": list("xxyyzzww")})


@pytest.mark.parametrize("place", [".", "photos", "runs/first"])
def test_a_written_split_opens_as_a_source(
    tmp_path: Path, source: Source, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = split_by_class(source.labels)
    write_split(tmp_path / place / "split.csv", source, roles)
    again = open_source(tmp_path / place / "split.csv")
    assert [os.path.realpath(name) for name in again.names] == source.names
    assert again.labels == source.labels
    assert again.columns == {"split": roles.tolist(), "group": list("xxyyzzww")}
    assert len(again.select({"split": "test"})) == 2

    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_array_equal(read_split(tmp_path / place / "split.csv", source.subset(order)), roles[order])
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read_split(f"{place}/split.csv", open_source("photos")), roles)


def test_a_split_below_the_images_moves_with_them(tmp_path: Path, source: Source) -> None:
    write_split(tmp_path / "photos" / "split.csv", source, split_by_class(source.labels))
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert len(open_source(tmp_path / "moved" / "split.csv")) == 8


def test_a_split_of_arrays(tmp_path: Path) -> None:
    source = Source.from_arrays(np.zeros((4, 2, 2), np.uint8), list("abcd"))
    roles = split_by_class(list("abcd"))
    write_split(tmp_path / "split.csv", source, roles)
    np.testing.assert_array_equal(read_split(tmp_path / "split.csv", source), roles)
    assert (tmp_path / "split.csv").read_text().startswith("path,label,split\narray[0],a,")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, source: Source) -> None:
    target = tmp_path / "split.csv"
    write_split(target, source, ["train"] * 8)
    before = target.read_bytes()
    bad = Source(["caf\udce9.png"])
    with pytest.raises(ValueError, match=r"a file name is not UTF-8 text \(.*rename that file"):
        write_split(target, bad, ["train"])
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["split.csv"]


def test_split_file_errors(tmp_path: Path, source: Source) -> None:
    target = tmp_path / "split.csv"
    with pytest.raises(ValueError, match=r"No split file .*split\.csv; write one with write_split"):
        read_split(target, source)
    with pytest.raises(ValueError, match=r"8 samples but 1 roles"):
        write_split(target, source, ["train"])
    with pytest.raises(ValueError, match=r"'val' is no role; there are train, calibrate, test"):
        write_split(target, source, ["train"] * 7 + ["val"])
    write_split(target, source.subset(range(6)), ["train"] * 6)
    with pytest.raises(
        ValueError, match=r"gives no role to 2 of 8 samples, such as .*6\.png: was it written for other"
    ):
        read_split(target, source)
    target.write_text(target.read_text().replace("train", "dev", 1))
    with pytest.raises(ValueError, match=r"'dev' is no role"):
        read_split(target, source.subset(range(6)))
    target.write_text("path,label\na.png,a\n")
    with pytest.raises(ValueError, match=r"is no split: expected the columns path and split, got \['path', 'label'\]"):
        read_split(target, source)
