"""The tables of docs/benchmarks.md on generated pictures: the whole way for every task, and the sums against loops."""

import csv
import json
import math

import numpy as np
import pytest
from benchmarks import recipes
from PIL import Image

from embedlab import metrics
from embedlab._types import Embeddings

TINY = [
    "--model.init_args.backbone.init_args.width=0.125",
    "--model.init_args.backbone.init_args.stem=small",
    "--data.init_args.image_size=12",
    "--data.init_args.decode_size=12",
    "--data.init_args.batch_size=8",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.limit_val_batches=0",
]
FEW = ["--data.init_args.images_per_class=2", "--data.init_args.batches_per_epoch=2"]


def draw(path, colour, random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((colour + random.normal(0, 40, (12, 12, 3))).clip(0, 255).astype(np.uint8)).save(path)


def run(capsys, tmp_path, table, *more) -> list[recipes.Table]:
    tables = recipes.main([table, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *more, *TINY])
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "tables.md").read_text().strip() == printed.strip()
    for found in tables:
        assert str(found) in printed
    return tables


@pytest.fixture
def few_draws(monkeypatch) -> None:
    monkeypatch.setattr(recipes, "RESAMPLES", 50)


def forbid(*_arguments):
    raise AssertionError("what is done already was done again")


def test_faces_over_folds_seeds_and_baselines(few_draws, tmp_path, capsys, monkeypatch) -> None:
    random = np.random.default_rng(0)
    for person in range(8):
        colour = random.integers(30, 226, 3)
        for number in range(4):
            draw(tmp_path / "data" / f"p{person}" / f"{number}.png", colour, random)
    options = ["--seeds", "0", "1", "--peer-seeds", "0", "--templates", "1", "--folds", "3"]
    one, pooled = run(capsys, tmp_path, "faces", *options, *FEW)
    assert list(pooled.rows) == [recipes.OURS, recipes.UNTRAINED, recipes.RAW, recipes.WHITENED]
    assert len(pooled.rows[recipes.OURS]["EER"].values) == 2
    assert len(pooled.rows[recipes.RAW]["EER"].values) == 1
    for figure in (one.rows[recipes.OURS]["recall@1"], pooled.rows[recipes.OURS]["detection at FPIR 10 %"]):
        low, high = figure.interval
        assert 0 <= low <= np.mean(figure.values) <= high <= 1
    # 24 searches of strangers do not support 1 %
    assert str(pooled.rows[recipes.OURS]["detection at FPIR 1 %"]) == "-"
    assert len(list((tmp_path / "out" / "runs").glob("*.json"))) == 6
    monkeypatch.setattr(recipes, "command", forbid)
    again = run(capsys, tmp_path, "faces", *options, *FEW)
    assert list(map(str, again)) == [str(one), str(pooled)]
    with pytest.raises(SystemExit, match="made by another command or recipe"):
        run(capsys, tmp_path, "faces", *options, *FEW, "--data.init_args.fit=pad")


def test_a_training_that_was_broken_off_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    asked = []

    def command(*arguments):
        asked.append(list(map(str, arguments)))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return {"seconds": 3.0}

    monkeypatch.setattr(recipes, "command", command)
    run = tmp_path / "runs" / "one"
    with pytest.raises(KeyboardInterrupt):
        recipes.piece(run, "fit", "-c", "some.yaml")
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-00000001.ckpt").touch()
    result = recipes.piece(run, "fit", "-c", "some.yaml")
    assert asked[1] == ["fit", "--run", str(run), "--resume"]
    assert recipes.mean_seconds([result["seconds"]]) == "-"
    assert recipes.mean_seconds([result["seconds"], 4.0]) == "4"
    recipes.piece(run, "fit", "-c", "some.yaml")
    assert len(asked) == 2, "done is done"
    with pytest.raises(SystemExit, match="another command or recipe"):
        recipes.piece(run, "fit", "-c", "other.yaml")


def test_products_among_all_photographs(few_draws, tmp_path, capsys) -> None:
    random = np.random.default_rng(1)
    rows = []
    for product in range(9):
        colour = random.integers(30, 226, 3)
        for photo_set, count in (("train", 3), ("test", 2), ("iconic", 1)):
            for number in range(count):
                name = f"{product}-{photo_set}-{number}.png"
                draw(tmp_path / "data" / name, colour, random)
                rows.append([name, f"product {product}", f"kind {product // 3}", photo_set])
    with (tmp_path / "data" / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "coarse", "photo_set"], *rows])
    out = str(tmp_path / "out")
    tables = recipes.main(
        ["products", "--data", str(tmp_path / "data" / "list.csv"), "--out", out, "--seeds", "0", *TINY, *FEW]
    )
    assert [table.title.split(":")[0] for table in tables] == [
        "Seen products",
        "Unseen products",
        "Catalogue pictures of unseen products",
        "Catalogue pictures of all products",
    ]
    assert "6 queries among 27 photographs" in tables[1].title
    assert recipes.THEIRS in tables[0].rows
    for row in tables[0].rows.values():
        right, coarse, distance = (
            np.mean(row[name].values) for name in ("recall@1", "coarse class right", "mean distance")
        )
        assert distance == pytest.approx(2 - right - coarse)  # 0 right, 1 near, 2 far
    with (tmp_path / "out" / "training.csv").open() as file:
        trained = {row["label"] for row in csv.DictReader(file) if row["split"] == "train"}
    assert trained == {"product 0", "product 1", "product 4", "product 6"}


def test_characters_are_strangers_once_each(tmp_path, capsys) -> None:
    random = np.random.default_rng(2)
    for alphabet in ("Ab", "Cd", "Ef", "Gh"):
        for character in range(4):
            colour = random.integers(30, 226, 3)
            for number in range(3):
                draw(tmp_path / "data" / alphabet / f"c{character}" / f"{number}.png", colour, random)
    (table,) = run(
        capsys, tmp_path, "characters", "--seeds", "0", "--peer-seeds", "0", "--fpir", "0.3", "--templates", "1", *FEW
    )
    # 2 folds of 2 alphabets: half of their 8 characters are tested, in 4 turns each
    assert table.title.startswith("16 + 16 strangers")
    assert "16 + 16 others" in table.title
    assert 0 <= table.rows[recipes.OURS]["observed FPIR"].values[0] <= 1
    with (tmp_path / "out" / "fold0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 16 * 3
    roles = {}
    for row in rows:
        roles.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in roles.values()), "all turns of a character have one role"
    assert {name.partition("/")[0] for name, found in roles.items() if found == {"train"}} == {"Cd", "Gh"}


def test_defects_by_group(few_draws, tmp_path, capsys) -> None:
    random = np.random.default_rng(3)
    rows = []
    for group in range(30):
        label = "defect" if group % 3 == 0 else "whole"
        for number in range(2):
            name = f"{group}-{number}.png"
            draw(tmp_path / "data" / name, np.array([60.0 if label == "defect" else 170.0] * 3), random)
            rows.append([name, label, f"g{group}"])
    with (tmp_path / "data" / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "group"], *rows])
    arguments = ["defects", "--data", str(tmp_path / "data" / "list.csv"), "--out", str(tmp_path / "out")]
    (table,) = recipes.main([*arguments, "--seeds", "0", "--steps", "3", *TINY])
    assert set(table.rows) >= {"scratch, focal", "self-supervised, cross-entropy", "k-NN, raw pixels", "always defect"}
    assert table.rows["k-NN, raw pixels"]["AUC"].values[0] > 0.95  # the colour gives them away
    always = table.rows["always defect"]
    share = always["average precision"].values[0]
    assert always["F2"].values[0] == pytest.approx(5 * share / (4 * share + 1))
    assert always["AUC"].values == [0.5]
    report = json.loads((tmp_path / "out" / "runs" / "scratch-focal-seed0" / "report.json").read_text())
    assert report["threshold_from"] == "calibrate"
    assert table.rows["scratch, focal"]["F2"].values[0] == pytest.approx(report["f_beta"])
    assert table.rows["scratch, focal"]["AUC"].values[0] == pytest.approx(report["auc"], abs=1e-3)


def test_folds_are_pooled_and_people_resampled_as_by_hand() -> None:
    random = np.random.default_rng(4)
    folds = []
    for fold in range(2):
        names = np.repeat([f"{fold}-{person}" for person in range(4)], 5)
        centres = np.repeat(random.standard_normal((4, 3)), 5, axis=0)
        vectors = (centres + 0.6 * random.standard_normal((20, 3))).astype(np.float32)
        folds.append(recipes.search_all(Embeddings(vectors, names.tolist(), np.arange(20)), 2))
    joined = recipes.Searches.joined(folds)
    assert len(joined.scores) == 2 * 2 * 4 * 3
    rate = joined.detection(0.1)
    got = recipes.figure([rate], joined.who)
    strangers, genuine = joined.scores[~joined.known], joined.known & joined.correct
    threshold = np.sort(strangers)[-1 - int(0.1 * len(strangers))]  # the first who must be refused
    assert got.values == [(joined.scores[genuine] > threshold).sum() / joined.known.sum()]
    people, generator, drawn = sorted(set(joined.who)), np.random.default_rng(0), []
    for _ in range(1000):
        rows = [row for place in generator.integers(8, size=8) for row in np.flatnonzero(joined.who == people[place])]
        drawn.append(rate(np.array(rows)))
    assert got.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_pairs_are_within_folds_and_share_one_threshold() -> None:
    random = np.random.default_rng(5)
    folds = [np.repeat(["b", "a"], 3), np.repeat(["d", "c", "e"], 2)]
    vectors = random.standard_normal((12, 3))
    pairs = recipes.pairs_within(folds)
    labels, number = np.concatenate(folds), np.repeat([0, 1], 6)
    scores, same = [], []
    for a in range(12):
        for b in range(a + 1, 12):
            if number[a] == number[b]:
                scores.append(vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]))
                same.append(labels[a] == labels[b])
    found = recipes.equal_errors(pairs, [vectors, vectors])
    assert found.values == pytest.approx([metrics.eer(scores, same)] * 2)
    assert found.interval[0] <= found.values[0] <= found.interval[1]
    assert (pairs.genuine_total, pairs.impostors_total) == (sum(same), len(same) - sum(same))


def test_a_figure_is_the_mean_over_seeds_of_means_over_samples() -> None:
    values = [[1, 0, 1, math.nan], [1, 1, 1, math.nan]]
    got = recipes.mean_figure(values, ["a", "a", "b", "b"])
    assert got.values == pytest.approx([2 / 3, 1])
    assert got.interval == metrics.bootstrap_interval([1, 0.5, 1], ["a", "a", "b"])
    assert str(got) == "0.833 ± 0.236 [0.750, 1.000]"
    assert str(recipes.Figure([0.5])) == "0.500"


def test_all_right_is_not_certainty() -> None:
    owners = np.repeat(np.arange(10), 3)
    ends = metrics.wilson_interval(10, 10)
    assert recipes.mean_figure(np.ones((2, 30)), owners).interval == ends
    assert recipes.figure([lambda _: 1.0], owners).interval == ends
    assert recipes.mean_figure(np.full((2, 30), 2.0), owners).interval is None
    one, apart = np.eye(4)[[0, 0, 1, 1]], recipes.pairs_within([np.array(list("aabb"))])
    assert recipes.equal_errors(apart, [one]).interval is None


def test_unknown_options_go_to_fit_and_a_missing_folder_is_named(tmp_path, capsys) -> None:
    options = recipes.parse(
        ["faces", "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--trainer.max_epochs", "1"]
    )
    assert options.more == ["--trainer.max_epochs", "1"]
    assert (options.folds, options.seeds) == (4, [0, 1, 2])
    with pytest.raises(SystemExit):
        recipes.parse(["faces", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "o")])
    assert "none does not exist" in capsys.readouterr().err
