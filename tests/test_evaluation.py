"""`embedlab evaluate`: every figure of the JSON against the metrics themselves, paired differences against loops, and a
report that shows hostile names as names, loads nothing and works in a browser.

`EMBEDLAB_SCREENSHOTS=docs/images pytest tests/test_evaluation.py -k pictures_of_the_docs` writes the pictures of
docs/evaluation.md.
"""

import csv
import itertools
import json
import os
import re
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import naive
import numpy as np
import pytest
from naive import naive_resampled_verification
from PIL import Image
from test_report import HOSTILE, require_harmless

from embedlab import metrics
from embedlab._types import Embeddings
from embedlab.cli import main
from embedlab.data import open_source
from embedlab.encoders import Encoder, LinearHead, ResNet
from embedlab.retrieval import write_embeddings
from embedlab.retrieval.comparison import compare, to_text
from embedlab.retrieval.evaluation import Plan, evaluate, interval_of, intervals_of, retrieval_figures
from embedlab.retrieval.findings import class_figures, confusions, examples, nearest_of_class
from embedlab.retrieval.subjects import Subject, short_names, stored_subject
from embedlab.serving import evaluation, evaluation_pictures

CLASSES, IMAGES = 10, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten classes of six pictures in two colour families, a manifest with splits, and two encoders."""
    root = tmp_path_factory.mktemp("evaluation")
    random = np.random.default_rng(0)
    with (root / "all.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "family", "split"])
        for number in range(CLASSES):
            label = f"c{number}"
            (root / "images" / label).mkdir(parents=True)
            family = ("warm", "cold")[number % 2]
            colour = random.integers(60, 200, 3) * ([1.2, 1, 0.5] if family == "warm" else [0.5, 1, 1.2])
            for copy in range(IMAGES):
                pixels = (colour + random.normal(0, 45, (12, 12, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / "images" / label / f"{copy}.png")
                split = "calibrate" if number >= 7 else "gallery" if copy < 3 else "probe"
                table.writerow([f"images/{label}/{copy}.png", label, family, split])
    for name, seed in (("a", 0), ("b", 1)):
        import torch

        torch.manual_seed(seed)
        network = Encoder(ResNet("resnet10", stem="small", width=0.125), LinearHead(8), image_size=16).eval()
        network.save(root / name / "encoder")
    return root


def ask(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def vectors_of(folder: Path, encoder: str, **where: list[str]) -> Embeddings:
    source = open_source(folder / "all.csv", select=where or None)
    return Encoder.load(folder / encoder / "encoder").embed(source, progress=False)


def test_every_figure_is_that_of_the_metrics(folder, capsys) -> None:
    found = ask(capsys, "evaluate", folder / "all.csv", "--encoder", folder / "a" / "encoder", "--coarse", "family")
    figures = found["results"]["encoder"]
    held = vectors_of(folder, "a")
    labels = held.labels
    for k in (1, 5, 10):
        assert figures[f"recall_at_{k}"] == metrics.recall_at_k(held.vectors, labels, k=k)
    assert figures["map_at_r"] == metrics.map_at_r(held.vectors, labels)
    assert figures["r_precision"] == metrics.r_precision(held.vectors, labels)
    assert figures["knn_accuracy"] == metrics.knn_accuracy(held.vectors, labels, k=20)
    np.testing.assert_allclose(figures["cmc"], metrics.cmc(held.vectors, labels, k=20))
    per_query = metrics.retrieval_report(held.vectors, labels).per_query
    for name, values in per_query.items():
        assert figures["intervals"][name] == pytest.approx(metrics.bootstrap_interval(values, labels))
    pairs = figures["verification"]
    for name, value in metrics.verification_report(held.vectors, labels).to_dict().items():
        assert pairs[name] == pytest.approx(value), name
    assert pairs["intervals"]["eer"][0] < pairs["eer"] < pairs["intervals"]["eer"][1]
    assert figures["health"]["effective_rank"] == pytest.approx(metrics.effective_rank(held.vectors))
    assert figures["health"]["hubness"] == pytest.approx(metrics.hubness(held.vectors))
    assert figures["health"]["uniformity"] == pytest.approx(metrics.uniformity(held.vectors))
    families = dict(zip(labels, open_source(folder / "all.csv").columns["family"], strict=True))
    nearest = metrics.nearest_neighbours(held.vectors, k=1)[0][:, 0]
    coarse = np.mean([families[labels[one]] == families[label] for one, label in zip(nearest, labels, strict=True)])
    assert figures["coarse"]["recall_at_1"] == pytest.approx(coarse)
    wrong = [row for row in range(len(labels)) if labels[nearest[row]] != labels[row]]
    near = np.mean([families[labels[nearest[row]]] == families[labels[row]] for row in wrong])
    assert figures["coarse"]["near_misses"] == pytest.approx(near)


@pytest.mark.parametrize("columns", [["camera"], ["label", "camera"]], ids=" and ".join)
@pytest.mark.parametrize("within", [True, False], ids=["leave-one-out", "reference"])
def test_images_of_the_own_group_do_not_count(folder, tmp_path, capsys, within, columns) -> None:
    """Camera 0 has the first pictures of each class, camera 1 the others and all of one class, which finds no mate."""
    table = folder / f"cameras-{within}-{len(columns)}.csv"
    with (folder / "all.csv").open() as file, table.open("w", newline="") as out:
        rows = list(csv.DictReader(file))
        for row in rows:
            number = int(Path(row["path"]).stem)
            row |= {"camera": str(int(number in (0, 1, 3) or row["label"] == "c1")), "split": "ab"[number % 2]}
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    sides = [] if within else ["--select", "split=a", "--reference-select", "split=b"]
    report = tmp_path / "report.html"
    found = ask(
        capsys, "evaluate", table, "--encoder", folder / "a" / "encoder", *sides, "--groups", *columns, "--knn-k", "5",
        "--coarse", "family", "--report", report,
    )  # fmt: skip
    chosen = [open_source(table, select=None if within else {"split": name}) for name in ("a", "b")]
    held = [Encoder.load(folder / "a" / "encoder").embed(side, progress=False) for side in chosen]
    vectors, labels = [side.vectors for side in held], [side.labels for side in held]
    groups = [
        [
            (label, camera) if len(columns) == 2 else camera
            for label, camera in zip(side.labels, side.columns["camera"], strict=True)
        ]
        for side in chosen
    ]
    hits = naive.naive_hits(naive.naive_rankings(*vectors, *groups), *labels)
    counted = [hit for hit in hits if any(hit)]
    figures = found["results"]["encoder"]
    assert figures["without_match"] == len(hits) - len(counted) == (6 if within else 3)
    assert figures["recall_at_5"] == pytest.approx(np.mean([naive.naive_recall_at_k(hit, 5) for hit in counted]))
    assert figures["map_at_r"] == pytest.approx(np.mean([naive.naive_map_at_r(hit) for hit in counted]))
    assert figures["cmc"][:3] == [pytest.approx(np.mean([any(hit[:k]) for hit in counted])) for k in (1, 2, 3)]
    votes = naive.naive_knn_accuracy(vectors[1], labels[1], vectors[0], labels[0], 5, 0.1, groups)
    assert figures["knn_accuracy"] == pytest.approx(votes)
    pairs = itertools.combinations(range(60), 2) if within else itertools.product(range(30), range(30))
    apart = [labels[0][a] == labels[1][b] for a, b in pairs if groups[0][a] != groups[1][b]]
    told = figures["verification"]
    assert (told["genuine"], told["impostors"]) == (sum(apart), len(apart) - sum(apart))
    assert told["interval_pairs"] == {"genuine": told["genuine"], "impostors": told["impostors"]}
    assert told["intervals"]["auc"][0] < told["auc"] < told["intervals"]["auc"][1]
    assert found["protocol"]["groups"] == columns
    text = require_harmless(report.read_text(encoding="utf-8")).text
    assert f"own {' and '.join(columns)} left out" in text
    assert f"queries without a class-mate of another {' and '.join(columns)} are left out" in text


def test_groups_that_cannot_be_are_refused(folder, tmp_path, capsys) -> None:
    encoder = ["--encoder", folder / "a" / "encoder"]
    given = ["evaluate", folder / "all.csv", *encoder, "--groups"]
    assert "There is no column 'camera' for --groups; there are ['family', 'split']." in refused(
        capsys, *given, "camera"
    )
    assert "60 of 60 queries have no match to find" in refused(capsys, *given, "label")
    trial = ["--open-set", "--calibrate-select", "split=calibrate"]
    assert "--open-set has the same templates for all; run it without" in refused(capsys, *given, "family", *trial)
    np.save(tmp_path / "v.npy", np.eye(4))
    (tmp_path / "labels.txt").write_text("a\na\nb\nb\n")
    stored = ["evaluate", tmp_path / "v.npy", "--labels", tmp_path / "labels.txt", "--groups", "camera"]
    assert "There is no column 'camera' for --groups; there are none." in refused(capsys, *stored)
    table = tmp_path / "gaps.csv"
    table.write_text("path,label,camera\n" + "".join(f"{folder}/images/c{n}/0.png,c{n},{'x' * n}\n" for n in (0, 1)))
    message = f"{folder}/images/c0/0.png has no value in the column 'camera': images without one would be of one group."
    assert message in refused(capsys, "evaluate", table, *encoder, "--groups", "camera")


def test_columns_are_looked_for_before_anything_is_embedded(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Encoder, "embed", None)
    table = tmp_path / "bare.csv"
    table.write_text(f"path,label\n{folder}/images/c0/0.png,c0\n")
    given = ["evaluate", folder / "all.csv", "--encoder", folder / "a" / "encoder"]
    assert "no column 'camera' for --groups" in refused(capsys, *given, "--groups", "camera")
    for option in ("--groups", "--coarse"):
        message = refused(capsys, *given, "--reference", table, option, "family")
        assert f"no column 'family' for {option}; there are none" in message


def test_the_protocol_says_how_it_was_made(folder, tmp_path, capsys) -> None:
    encoder = Encoder.load(folder / "a" / "encoder")
    found = ask(
        capsys, "evaluate", folder / "all.csv", "--encoder", folder / "a" / "encoder", "--select", "split=probe",
        "--reference-select", "split=gallery", "--seed", "3", "--knn-k", "7",
    )  # fmt: skip
    protocol = found["protocol"]
    assert protocol["mode"] == "query against reference"
    assert protocol["select"] == {"split": ["probe"]}
    assert (protocol["seed"], protocol["knn_k"], protocol["empty"]) == (3, 7, "skip")
    told = protocol["subjects"]["encoder"]
    assert told["fingerprint"] == encoder.fingerprint
    assert told["preprocessing"] == json.loads(json.dumps(encoder.preprocessing))
    assert len(told["preprocessing_digest"]) == 32
    assert protocol["data"]["query"]["images"] == protocol["data"]["reference"]["images"] == 21
    assert protocol["data"]["query"]["identities"] == 7
    assert {"embedlab", "torch", "torchvision", "numpy", "faiss-cpu", "pillow"} <= protocol["versions"].keys()
    assert protocol["hardware"]["processor"]
    other = ask(capsys, "evaluate", folder / "all.csv", "--encoder", folder / "b" / "encoder", "--no-verification")
    assert other["protocol"]["subjects"]["encoder"]["preprocessing_digest"] == told["preprocessing_digest"]
    assert other["protocol"]["subjects"]["encoder"]["fingerprint"] != told["fingerprint"]
    assert "verification" not in other["results"]["encoder"]
    # an unreadable image is counted and named
    many = tmp_path / "many"
    for number in range(2):
        (many / f"c{number}").mkdir(parents=True)
        for copy in range(60):
            shutil.copy(folder / "images" / f"c{number}" / f"{copy % IMAGES}.png", many / f"c{number}" / f"{copy}.png")
    (many / "c0" / "7.png").write_bytes(b"no picture")
    (many / "c0" / "notes.txt").write_text("not an image")
    skipped = ask(capsys, "evaluate", many, "--encoder", folder / "a" / "encoder", "--on-error", "skip")
    data = skipped["protocol"]["data"]["query"]
    assert (data["images"], data["skipped"], data["ignored_files"]) == (119, 1, 1)
    assert data["skipped_images"] == [str(many / "c0" / "7.png")]
    assert skipped["protocol"]["subjects"]["encoder"]["on_error"] == "skip"


def test_the_protocol_of_bare_vectors_tells_them_and_their_labels_apart(tmp_path, capsys) -> None:
    vectors, labels = tmp_path / "v.npy", tmp_path / "labels.txt"
    digests = []
    for names in ("aabb", "abab"):
        np.save(vectors, people(2, 2, 0.5).vectors)
        labels.write_text("\n".join(names))
        found = ask(capsys, "evaluate", vectors, "--labels", labels)["protocol"]
        assert found["subjects"]["vectors"]["labels"] == str(labels)
        digests.append(found["data"]["query"]["digest"])
    assert digests[0] != digests[1]


@pytest.mark.parametrize("option", ["--out", "--report"])
def test_what_is_read_is_not_written_over(folder, tmp_path, capsys, option) -> None:
    table = Path(shutil.copy(folder / "all.csv", tmp_path))
    place = stored(tmp_path / "vectors", people(3, 3, 0.5))
    for path, out in ((table, table), (place, place / "rows.csv")):
        before = out.read_bytes()
        encoder = [] if path == place else ["--encoder", folder / "a" / "encoder"]
        assert main(list(map(str, ["evaluate", path, *encoder, option, out]))) == 1
        assert f"{option} {out} would overwrite" in capsys.readouterr().err
        assert out.read_bytes() == before
    again = list(map(str, ["evaluate", place, option, place / "mine.html"]))
    assert [main(again), main(again)] == [0, 0], "what a command has written it may write anew"
    assert main(["evaluate", str(place), "--out", str(tmp_path / "x"), "--report", str(tmp_path / "x")]) == 1
    assert "--report" in capsys.readouterr().err
    assert main(list(map(str, ["evaluate", place, option, place / "rows.csv" / "x.html"]))) == 1
    assert f"there is no folder {place / 'rows.csv'}, and none can be made" in capsys.readouterr().err
    assert main(["audit", str(place), "--out", str(place / "rows.csv")]) == 1
    assert "would overwrite what is read" in capsys.readouterr().err


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path, capsys) -> None:
    place = stored(tmp_path / "vectors", people(3, 3, 0.5))
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("before")
    link.symlink_to(real)
    assert main(["evaluate", str(place), "--out", str(link)]) == 0
    assert link.is_symlink()
    assert "results" in json.loads(real.read_text())
    capsys.readouterr()
    with (tmp_path / "caught").open("w") as file:
        assert main(["evaluate", str(place), "--out", f"/dev/fd/{file.fileno()}"]) == 0
    assert "results" in json.loads((tmp_path / "caught").read_text())


@pytest.mark.parametrize("choice", ['label="a, b', 'label=a, "b,c"', 'label="a"b'])
def test_a_value_with_a_stray_quote_is_refused(folder, capsys, choice) -> None:
    call = ["evaluate", folder / "all.csv", "--encoder", folder / "a" / "encoder", "--select", choice]
    assert f"--select {choice}: " in refused(capsys, *call)


def test_rows_are_selected_by_all_that_is_given(folder, tmp_path, capsys) -> None:
    rows = [f"{folder}/images/c{number % 6}/{number // 6}.png" for number in range(18)]
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "kind"], *([row, ["a, b", "c", "d"][number % 3], "xy"[number % 2]]
            for number, row in enumerate(rows))])  # fmt: skip
    asked = ["evaluate", table, "--encoder", folder / "a" / "encoder", "--no-verification", "--knn-k", "2", "--select"]
    for choice, images in (
        (['label="a, b",c'], 12),
        (["label=c", "label=d"], 12),
        (["label=c", "--select", "kind=x"], 3),
        (["label=c", "--select", "label=d", "kind=x"], 6),
    ):
        found = ask(capsys, *asked, *choice)
        assert found["protocol"]["data"]["query"]["images"] == images


def test_labels_are_of_vectors(folder, capsys) -> None:
    encoders = [
        ["--encoder", folder / "a" / "encoder"],
        ["--compare", folder / "a" / "encoder", folder / "b" / "encoder"],
    ]
    for chosen in encoders:
        assert main(["evaluate", *map(str, [folder / "images", *chosen, "--labels", "labels.txt"])]) == 1
        assert "--labels labels.txt is for stored vectors, and" in capsys.readouterr().err


def test_a_full_disk_leaves_the_document_before(tmp_path, monkeypatch, capsys) -> None:
    place, out = stored(tmp_path / "vectors", people(3, 3, 0.5)), tmp_path / "out.json"
    out.write_text("before")

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("embedlab._durable.sync", full)
    assert main(["evaluate", str(place), "--out", str(out)]) != 0
    assert "No space left" in capsys.readouterr().err
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "vectors"]


def test_query_against_reference_compares_those_pairs_only(folder, capsys) -> None:
    found = ask(
        capsys, "evaluate", folder / "all.csv", "--encoder", folder / "a" / "encoder", "--select", "split=probe",
        "--reference-select", "split=gallery",
    )["results"]["encoder"]  # fmt: skip
    query, reference = (vectors_of(folder, "a", split=[part]) for part in ("probe", "gallery"))
    unit = [part.vectors.astype(np.float64) for part in (query, reference)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in unit]
    scores, same = (
        (unit[0] @ unit[1].T).ravel(),
        (np.array(query.labels)[:, None] == np.array(reference.labels)).ravel(),
    )
    pairs = found["verification"]
    assert (pairs["genuine"], pairs["impostors"]) == (same.sum(), (~same).sum())
    assert pairs["auc"] == pytest.approx(metrics.roc_auc(scores, same))
    assert pairs["eer"] == pytest.approx(metrics.eer(scores, same))
    assert pairs["tar"] == pytest.approx([metrics.tar_at_far(scores, same, far) for far in pairs["far"]])
    assert found["recall_at_1"] == metrics.recall_at_k(
        query.vectors, query.labels, reference.vectors, reference.labels, k=1
    )


def people(count: int, images: int, noise: float, *, seed: int = 0, dim: int = 12) -> Embeddings:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(count, dim)).repeat(images, axis=0)
    vectors = (centres + noise * random.normal(size=centres.shape)).astype(np.float32)
    return Embeddings(vectors, [f"p{row // images:02}" for row in range(len(vectors))], np.arange(len(vectors)))


def stored(place: Path, found: Embeddings, **protocol: object) -> Path:
    write_embeddings(place, found, protocol={"encoder": "f" * 32, **protocol})
    return place


def with_column(place: Path, column: str, values: list[str]) -> Subject:
    """Stored vectors as if they came from a manifest with this column."""
    subject = stored_subject(str(place))
    return replace(subject, read=lambda *where: replace(subject.read(*where), columns={column: values}))


@pytest.mark.parametrize("grouped", [False, True], ids=["", "groups"])
def test_classes_confusions_and_examples_by_loops(tmp_path, grouped, monkeypatch) -> None:
    held = people(12, 5, 1.3)
    cameras = ["left" if row % 5 < 2 else "right" for row in range(60)]
    subject = with_column(stored(tmp_path / "v", held), "camera", cameras)
    found = evaluate(subject, Plan(path=str(tmp_path / "v"), groups=["camera"] if grouped else ()))
    unit = held.vectors.astype(np.float64) / np.linalg.norm(held.vectors.astype(np.float64), axis=1, keepdims=True)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    if grouped:
        scores[np.array(cameras)[:, None] == np.array(cameras)] = -np.inf
    nearest = scores.argmax(axis=1)
    taken = Counter((label, held.labels[one]) for label, one in zip(held.labels, nearest, strict=True))
    wrong = {pair: times for pair, times in taken.items() if pair[0] != pair[1]}
    pairs = confusions(found)
    assert {(one.label, one.taken_for): one.times for one in pairs} == wrong
    assert [one.times for one in pairs] == sorted((one.times for one in pairs), reverse=True)
    for one in pairs:
        assert one.queries == 5
        assert one.back == wrong.get((one.taken_for, one.label), 0)
        assert held.labels[one.query] == one.label
        assert nearest[one.query] == one.nearest
        assert one.cosine == pytest.approx(scores[one.query, one.nearest], abs=1e-6)
    for row in class_figures(found):
        mine = [number for number, label in enumerate(held.labels) if label == row.label]
        assert row.recall_at_1 == pytest.approx(np.mean([held.labels[nearest[one]] == row.label for one in mine]))
        assert row.queries == row.templates == 5
        if row.taken_for:
            assert row.times == max(times for (label, _), times in wrong.items() if label == row.label)
    rows = np.array([row for row in range(60) if held.labels[nearest[row]] != held.labels[row]])
    mates = np.where(np.array(held.labels)[:, None] == np.array(held.labels), scores, -np.inf)
    place, cosine = nearest_of_class(found, rows)
    assert place.tolist() == mates.argmax(axis=1)[rows].tolist()
    np.testing.assert_allclose(cosine, mates.max(axis=1)[rows])
    with monkeypatch.context() as patch:  # two queries at a time
        patch.setattr("embedlab.retrieval.findings._BLOCK", 2 * 8 * (5 + held.vectors.shape[1]))
        assert nearest_of_class(found, rows)[0].tolist() == place.tolist()
    shown = examples(found, each=4, seed=1)
    margins = (scores.max(axis=1) - mates.max(axis=1))[rows]
    worst: dict[str, int] = {}
    for row in rows[np.argsort(-margins, kind="stable")].tolist():
        worst.setdefault(held.labels[row], row)  # one for each class
    assert [one.query for one in shown["worst"]] == list(worst.values())[:4]
    assert all(one.right[0] for one in shown["right"])
    assert all(any(one.right) and not one.right[0] for one in shown["late"])
    by_row = dict(zip(rows.tolist(), margins.tolist(), strict=True))
    assert [one.margin for one in shown["worst"]] == pytest.approx(
        [by_row[one.query] for one in shown["worst"]], abs=1e-6
    )


def test_the_nearest_of_large_classes_are_found_in_bounded_memory(tmp_path, monkeypatch) -> None:
    held = people(2, 1000, 1.3)
    found = evaluate(
        stored_subject(str(stored(tmp_path / "v", held))), Plan(path=str(tmp_path / "v"), verification=False)
    )
    found = replace(found, groups=[f"camera {row % 7}" for row in range(2000)])
    rows = np.arange(2000)
    monkeypatch.setattr("embedlab.retrieval.findings._BLOCK", 1 << 20)
    tracemalloc.start()
    nearest_of_class(found, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20  # all cosines of one class take 8 MiB


def test_an_example_shows_as_many_as_groups_leave(tmp_path) -> None:
    held = people(2, 3, 0.2)
    subject = with_column(stored(tmp_path / "v", held), "camera", list("xxyyyx"))
    found = evaluate(subject, Plan(path=str(tmp_path / "v"), groups=["camera"]))
    shown = [one for kind in examples(found).values() for one in kind]
    assert len(shown) == 6
    assert (found.figures["knn_k"], len(found.figures["cmc"])) == (3, 3)
    for one in shown:
        others = {0: {2, 3, 4}, 1: {2, 3, 4}, 5: {2, 3, 4}}.get(one.query, {0, 1, 5})
        assert set(one.nearest) == others
        assert len(one.nearest) == len(one.cosines) == len(one.right) == 3
        assert one.right == tuple(held.labels[row] == held.labels[one.query] for row in one.nearest)


def test_paired_differences_equal_the_loops(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("embedlab.retrieval.evaluation.RESAMPLES", 40)
    monkeypatch.setattr("embedlab.retrieval.comparison.VERDICT", 9)
    ours, theirs = people(9, 4, 0.5), people(9, 4, 1.6, seed=1)
    found = [
        evaluate(stored_subject(str(stored(tmp_path / name, held)), name=name), Plan(path=str(tmp_path / name)))
        for name, held in (("ours", ours), ("theirs", theirs))
    ]
    result = compare(*found)
    figures = result["figures"]
    values = [metrics.retrieval_report(held.vectors, held.labels).per_query["map_at_r"] for held in (ours, theirs)]
    random = np.random.default_rng(0)
    drawn = random.multinomial(9, np.full(9, 1 / 9), size=2000)
    sums = np.array([[side[4 * person : 4 * person + 4].sum() for person in range(9)] for side in values])
    means = [[(weights @ side) / (4 * weights.sum()) for side in sums] for weights in drawn]
    want = np.quantile([one - other for one, other in means], [0.025, 0.975])
    assert figures["map_at_r"]["interval"] == pytest.approx(tuple(want))
    assert figures["map_at_r"]["difference"] == pytest.approx(values[0].mean() - values[1].mean())
    assert figures["recall_at_1"]["first"] == metrics.recall_at_k(ours.vectors, ours.labels, k=1)
    resampled = []
    for held in (ours, theirs):
        pairs = metrics.draw_pairs(held.labels)
        resampled.append(
            naive_resampled_verification(
                *pairs.scores(held.vectors),
                pairs.genuine,
                pairs.impostors,
                *pairs.codes,
                far=(0.1,),
                resamples=40,
                seed=0,
            )
        )
    for name in ("eer", "auc", "tar_at_0.1"):
        want = np.nanquantile(resampled[0][name] - resampled[1][name], [0.025, 0.975])
        assert figures[name]["interval"] == pytest.approx(tuple(want), abs=1e-9), name
    assert figures["map_at_r"]["better"] == "ours"
    assert figures["eer"]["better"] == "ours"
    assert figures["eer"]["difference"] < 0
    backwards = compare(*found[::-1])["figures"]
    assert backwards["eer"]["better"] == "ours"
    assert backwards["auc"]["difference"] == -figures["auc"]["difference"]
    same = compare(found[0], found[0])["figures"]
    assert all(row["difference"] == 0 and row["better"] is None for row in same.values())


def test_no_verdict_on_few_identities_and_no_interval_without_an_error(tmp_path) -> None:
    """Of three identities, resampling calls equal encoders different one time in four."""
    found = []
    for name, held in (("ours", people(9, 4, 0.05)), ("theirs", people(9, 4, 1.6, seed=1))):
        place = stored(tmp_path / name, held)
        found.append(evaluate(stored_subject(str(place), name=name), Plan(path=str(place))))
    perfect = found[0].figures["verification"]
    assert (perfect["eer"], perfect["intervals"]["eer"]) == (0, None)
    assert perfect["intervals"]["tar_at_0.1"] is None
    result = compare(*found)
    assert {row["identities"] for row in result["figures"].values()} == {9}
    assert result["figures"]["map_at_r"]["interval"][0] > 0
    assert all(row["better"] is None for row in result["figures"].values())
    assert to_text(result).endswith(
        "Over fewer than 20 identities intervals are too short, and neither is called better."
    )


def test_identities_without_a_match_do_not_count_for_a_verdict(tmp_path) -> None:
    found = []
    for name, noise in (("ours", 0.05), ("theirs", 1.6)):
        held = people(33, 4, noise, seed=len(name))
        rows = np.r_[0:12, 12:132:4]  # three with mates, thirty alone
        held = Embeddings(held.vectors[rows], [held.labels[row] for row in rows], held.ids[rows])
        place = stored(tmp_path / name, held)
        found.append(evaluate(stored_subject(str(place), name=name), Plan(path=str(place))))
    result = compare(*found)
    assert {row["identities"] for row in result["figures"].values()} == {3}
    assert all(row["better"] is None for row in result["figures"].values())
    same = compare(found[0], found[0])["figures"]
    assert all(row["interval"] is None for row in same.values()), "no draw differs from another"


def test_rows_are_paired_by_their_ids(tmp_path) -> None:
    ours = people(4, 4, 0.5)
    order = np.arange(16).reshape(4, 4)[:, ::-1].ravel()
    theirs = Embeddings(ours.vectors[order], [ours.labels[row] for row in order], ours.ids[order])
    places = [stored(tmp_path / "ours", ours), stored(tmp_path / "theirs", theirs)]
    found = [evaluate(stored_subject(str(place), name=place.name), Plan(path=str(place))) for place in places]
    with pytest.raises(ValueError, match="were not given the same queries in the same order"):
        compare(*found)


def test_a_comparison_from_the_command_line(folder, tmp_path, capsys) -> None:
    report = tmp_path / "compare.html"
    both = ["--compare", folder / "a" / "encoder", folder / "b" / "encoder"]
    found = ask(
        capsys, "evaluate", folder / "all.csv", *both, "--report", report, "--select", "split=probe,gallery",
        "--open-set", "--calibrate-select", "split=calibrate", "--fpir", "0.7", "--templates", "2",
    )  # fmt: skip
    assert set(found["results"]) == {"a", "b"} == set(found["protocol"]["subjects"])
    assert {"recall_at_1", "eer", "detection_rate", "observed_fpir"} <= found["comparison"]["figures"].keys()
    row = found["comparison"]["figures"]["detection_rate"]
    assert row["first"] == pytest.approx(found["results"]["a"]["open_set"]["detection_rate"])
    reader = require_harmless(report.read_text(encoding="utf-8"))
    for words in ("Comparison", "a and b", "Where they differ", "Right by a, wrong by b", "Strangers", "Difference"):
        assert words in reader.text
    for name in ("a", "b"):
        ask(
            capsys, "embed", folder / "all.csv", "--encoder", folder / name / "encoder", "--out", tmp_path / name,
            "--select", "split=probe,gallery",
        )  # fmt: skip
    by_vectors = ask(capsys, "evaluate", "--compare", tmp_path / "a", tmp_path / "b")
    for name in ("recall_at_1", "map_at_r", "eer"):
        for key in ("first", "difference", "interval"):
            got, want = (one["comparison"]["figures"][name][key] for one in (by_vectors, found))
            assert got == pytest.approx(want)
    assert "paired over the same identities" in text_of(capsys, "evaluate", "--compare", tmp_path / "a", tmp_path / "b")


def text_of(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_what_cannot_be_compared_or_measured_is_explained(folder, tmp_path, capsys) -> None:
    a, b = folder / "a" / "encoder", folder / "b" / "encoder"
    table = folder / "all.csv"
    assert "two different encoders, got" in refused(capsys, "evaluate", table, "--compare", a, a)
    assert "names two encoders itself" in refused(capsys, "evaluate", table, "--compare", a, b, "--encoder", a)
    assert "evaluate needs PATH with the queries" in refused(capsys, "evaluate", "--compare", a, b)
    mixed = (folder / "all.csv").read_text().replace("c0/0.png,c0,warm", "c0/0.png,c0,cold")
    (folder / "mixed.csv").write_text(mixed)
    assert "'c0' is 'cold' and 'warm' in the column 'family'" in refused(
        capsys, "evaluate", folder / "mixed.csv", "--encoder", a, "--coarse", "family"
    )
    assert "no column 'colour' for --coarse; there are ['family', 'split']" in refused(
        capsys, "evaluate", table, "--encoder", a, "--coarse", "colour"
    )
    ours, theirs = stored(tmp_path / "x", people(5, 3, 1)), stored(tmp_path / "y", people(6, 3, 1))
    message = refused(capsys, "evaluate", "--compare", ours, theirs)
    assert "x and y were not given the same queries in the same order (15 and 18 images)" in message
    assert "takes neither PATH nor --reference" in refused(capsys, "evaluate", table, "--compare", ours, theirs)
    assert "the two encoders of --compare need images" in refused(capsys, "evaluate", ours, "--compare", a, b)
    assert "--protocol measures one backbone; run --report and --groups without it." in refused(
        capsys, "evaluate", table, "--encoder", a, "--reference-select", "split=gallery", "--protocol", "knn",
        "--report", tmp_path / "r.html", "--groups", "family",
    )  # fmt: skip


def test_names_that_tell_two_paths_apart() -> None:
    assert short_names("runs/a/encoder", "runs/b/encoder") == ("a", "b")
    assert short_names("runs/a", "other/a") == ("runs", "other")
    assert short_names("x", "y/z/x") == ("x", "y/z/x")


def test_a_perfect_encoder_has_honest_intervals(tmp_path) -> None:
    held = people(8, 4, 0.01)
    found = evaluate(stored_subject(str(stored(tmp_path / "v", held))), Plan(path=str(tmp_path / "v")))
    assert found.figures["recall_at_1"] == 1
    assert found.figures["intervals"]["recall_at_1"] == pytest.approx(metrics.wilson_interval(8, 8))
    document = evaluation.evaluation_report([found], None, {**protocol_for(found)})
    assert "No query lies nearest to another class." in require_harmless(document).text


def test_a_share_that_no_resample_changes_is_no_certainty() -> None:
    """Half of the pictures of each identity are right: every mean of identities is 0.5."""
    half, labels = np.tile([1.0, 0.0], 6), np.repeat(list("abcdef"), 2).tolist()
    gap = np.where(np.arange(12) < 2, np.nan, half)
    assert intervals_of({"recall": half}, labels) == {"recall": metrics.wilson_interval(3, 6)}
    assert intervals_of({"recall": half, "gap": gap}, labels)["gap"] == metrics.wilson_interval(2.5, 5)
    resamples = np.ones(500)
    resamples[:5] = 0.9  # fewer than the tail
    assert interval_of(resamples) is None


def test_a_recall_is_at_least_that_of_smaller_depths() -> None:
    """Wilson's interval, where all are right, is wider than the bootstrap's just before."""
    vectors = np.repeat(np.eye(5), 4, axis=0) + 0.01 * np.random.default_rng(0).standard_normal((20, 5))
    vectors[0, :2] = 0.7, 0.75  # nearer to the four of the second identity than to its own
    held = Embeddings(vectors.astype(np.float32), [f"p{row // 4}" for row in range(20)], np.arange(20))
    found, _ = retrieval_figures(held)
    lows = [low for low, _ in found["cmc_intervals"]]
    assert found["cmc"][0] < 1 == found["cmc"][4]
    assert lows == sorted(lows)
    assert lows[4] > metrics.wilson_interval(5, 5)[0]
    assert found["intervals"]["recall_at_10"][0] >= found["intervals"]["recall_at_1"][0]


def test_what_so_few_images_cannot_say_is_said(tmp_path, caplog, capsys) -> None:
    held = people(3, 4, 1)
    held = Embeddings(held.vectors[:9], held.labels[:9], held.ids[:9])  # the third alone
    path = str(stored(tmp_path / "v", held))
    assert main(["evaluate", path]) == 0
    assert "1 of 9 queries have no match to find: left out of recall" in capsys.readouterr().out
    assert "k-NN with k = 20 lets all 8 candidates vote" in caplog.text
    caplog.clear()
    assert main(["evaluate", path, "--knn-k", "3"]) == 0
    assert "candidates vote" not in caplog.text
    caplog.clear()
    many = stored(tmp_path / "many", people(30, 3, 0.05, dim=4))
    found = evaluate(stored_subject(str(many)), Plan(path=str(many)))
    told = "k-NN with k = 20 lets 20 images vote where the typical identity has 2 to find, and is outvoted by others"
    assert told in found.figures["warnings"][0]
    assert told in caplog.text
    document = evaluation.evaluation_report([found], None, protocol_for(found))
    assert told in require_harmless(document).text


def test_a_collapsed_embedding_is_told_and_its_charts_are_drawn(tmp_path) -> None:
    held = people(4, 4, 1)
    vectors = np.ones_like(held.vectors)
    vectors += 1e-7 * np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32)
    place = stored(tmp_path / "v", Embeddings(vectors, held.labels, held.ids))
    found = evaluate(stored_subject(str(place)), Plan(path=str(place)))
    assert [text for text in found.figures["warnings"] if text.startswith("The embedding has all but collapsed")]
    document = evaluation.evaluation_report([found], None, protocol_for(found))
    ticks = re.findall(r">(0\.99\d+|1)</text>", document)
    assert len(set(ticks)) > 2, "the cosines' axis has numbers that differ"


def protocol_for(found) -> dict:
    from embedlab.retrieval.evaluation import protocol_of

    return protocol_of([found])


def test_a_set_without_genuine_pairs_has_no_verification(tmp_path, caplog) -> None:
    """Queries of other classes than each other still have matches in a reference; one class alone has no impostors."""
    one = people(1, 6, 1)
    found = evaluate(stored_subject(str(stored(tmp_path / "v", one))), Plan(path=str(tmp_path / "v")))
    assert found.figures["verification"] is None
    assert found.figures["intervals"] == {}
    assert "All that is searched is of one identity, so every answer is right" in caplog.text
    document = evaluation.evaluation_report([found], None, protocol_for(found))
    assert "Verification" not in require_harmless(document).text
    assert "-60%" not in document
    assert re.search(r' d="M[^"L]+L', document), "one class has a line, too"


def test_hostile_labels_and_paths_stay_text(folder, tmp_path, capsys) -> None:
    names = [*HOSTILE, "x" * 120]
    random = np.random.default_rng(0)
    with (tmp_path / "all.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "<b>coarse"])
        for number, label in enumerate(names):
            for copy in range(4):
                place = f"{number}'><img src=x onerror=alert(1)>{copy}.png"
                Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / place)
                table.writerow([place, label, names[number % 2]])
    report = tmp_path / "<i>" / "report.html"
    encoder = folder / "a" / "encoder"
    ask(capsys, "evaluate", tmp_path / "all.csv", "--encoder", encoder, "--report", report, "--coarse", "<b>coarse")
    reader = require_harmless(report.read_text(encoding="utf-8"))
    for label in names:
        assert label in reader.text
    assert "<b>coarse" in reader.text
    assert len(reader.all("img")) > 20
    assert len([one for one in reader.all("circle") if one["data-image"]]) == 4 * len(names)


def test_missing_and_broken_pictures_are_quiet_tiles(folder, tmp_path, capsys) -> None:
    copied = tmp_path / "images"
    shutil.copytree(folder / "images", copied)
    ask(capsys, "embed", copied, "--encoder", folder / "a" / "encoder", "--out", tmp_path / "v")
    for number in range(CLASSES):
        (copied / f"c{number}" / "0.png").unlink()
        (copied / f"c{number}" / "1.png").write_bytes(b"no picture")
    report = tmp_path / "r.html"
    found = ask(capsys, "evaluate", tmp_path / "v", "--report", report)
    reader = require_harmless(report.read_text(encoding="utf-8"))
    circles = reader.all("circle")
    assert len(circles) == CLASSES * IMAGES
    assert sum("data-image" in one for one in circles) == CLASSES * (IMAGES - 2)
    assert found["protocol"]["subjects"]["vectors"]["fingerprint"] == Encoder.load(folder / "a" / "encoder").fingerprint
    assert "capacity" not in found or found["capacity"] == {}
    shutil.rmtree(copied)
    ask(capsys, "evaluate", tmp_path / "v", "--report", report)
    assert "there are no pictures" in require_harmless(report.read_text(encoding="utf-8")).text


def test_a_report_is_bounded_whatever_the_data(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation_pictures, "MAP_POINTS", 50)
    monkeypatch.setattr(evaluation, "CLASSES", 40)
    monkeypatch.setattr("embedlab.metrics.pair_sample.MOST", 500)
    held = people(300, 4, 1.2)
    found = evaluate(stored_subject(str(stored(tmp_path / "v", held))), Plan(path=str(tmp_path / "v")))
    document = evaluation.evaluation_report([found], None, protocol_for(found))
    reader = require_harmless(document)
    assert len(reader.all("circle")) == 50
    assert "50 of 1,200 images" in reader.text
    assert "The first 40 are shown" in reader.text
    assert len(reader.all("tr")) < 120
    assert len(document) < 400_000
    rows = [int(one["data-row"]) for one in reader.all("circle")]
    again = require_harmless(evaluation.evaluation_report([found], None, protocol_for(found)))
    assert [int(one["data-row"]) for one in again.all("circle")] == rows


def test_the_open_set_trial_is_told_and_drawn(folder, tmp_path, capsys) -> None:
    report = tmp_path / "r.html"
    found = ask(
        capsys, "evaluate", folder / "all.csv", "--encoder", folder / "a" / "encoder", "--baselines",
        "--select", "split=probe,gallery", "--open-set", "--calibrate-select", "split=calibrate", "--fpir", "0.7",
        "--templates", "2", "--report", report, "--degradations", "blur", "noise", "--severities", "1", "5",
    )  # fmt: skip
    trial = found["results"]["encoder"]["open_set"]
    assert 0 <= trial["oscr"] <= trial["unknown_auroc"] <= 1
    reader = require_harmless(report.read_text(encoding="utf-8"))
    assert "Of strangers at most 70.0% were to be taken for somebody" in reader.text
    assert "raw pixels" in reader.text
    assert set(found["capacity"]) == {"encoder"}
    assert "What it costs" in reader.text
    assert "Bad conditions" in reader.text
    assert "Mean recall@1" in reader.text


def test_stored_vectors_have_all_of_it(folder, tmp_path, capsys) -> None:
    """Query and reference, and the open-set trial, from vectors alone: the same figures as from images."""
    encoder = folder / "a" / "encoder"
    for part in ("probe", "gallery", "calibrate"):
        ask(
            capsys, "embed", folder / "all.csv", "--encoder", encoder, "--out", tmp_path / part,
            "--select", f"split={part}",
        )  # fmt: skip
    trial = ["--open-set", "--fpir", "0.7"]
    by_vectors = ask(
        capsys, "evaluate", tmp_path / "probe", "--reference", tmp_path / "gallery", *trial,
        "--calibrate", tmp_path / "calibrate", "--report", tmp_path / "r.html", "--out", tmp_path / "r.json",
    )["results"]["vectors"]  # fmt: skip
    by_images = ask(
        capsys, "evaluate", folder / "all.csv", "--encoder", encoder, "--select", "split=probe",
        "--reference-select", "split=gallery", *trial, "--calibrate-select", "split=calibrate",
    )["results"]["encoder"]  # fmt: skip
    for name in ("recall_at_1", "map_at_r", "knn_accuracy"):
        assert by_vectors[name] == pytest.approx(by_images[name])
    for name in ("eer", "auc"):
        assert by_vectors["verification"][name] == pytest.approx(by_images["verification"][name])
    for name in ("detection_rate", "observed_fpir", "threshold"):
        assert by_vectors["open_set"][name] == pytest.approx(by_images["open_set"][name])
    assert "Strangers" in require_harmless((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert (
        json.loads((tmp_path / "r.json").read_text())["results"]["vectors"]["recall_at_1"] == by_vectors["recall_at_1"]
    )
    np.save(tmp_path / "v.npy", vectors_of(folder, "a", split=["probe"]).vectors)
    (tmp_path / "labels.txt").write_text("\n".join(vectors_of(folder, "a", split=["probe"]).labels))
    plain_file = ask(
        capsys, "evaluate", tmp_path / "v.npy", "--labels", tmp_path / "labels.txt", "--reference", tmp_path / "gallery"
    )
    assert plain_file["results"]["vectors"]["recall_at_1"] == by_vectors["recall_at_1"]
    assert "or --calibrate PATH" in refused(capsys, "evaluate", tmp_path / "probe", "--open-set")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="NO BROWSER: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("NO BROWSER: reports are not looked at; install chromium.")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(folder) -> dict[str, Path]:
    """A report on one encoder and one on two."""
    places = {name: folder / f"{name}.html" for name in ("one", "two")}
    both = ["--compare", str(folder / "a" / "encoder"), str(folder / "b" / "encoder")]
    table = str(folder / "all.csv")
    single = ["--encoder", str(folder / "a" / "encoder"), "--coarse", "family"]
    assert main(["evaluate", table, *single, "--report", str(places["one"])]) == 0
    assert main(["evaluate", table, *both, "--report", str(places["two"])]) == 0
    return places


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize(
    ("width", "scheme", "scripted"),
    [(1280, "light", True), (390, "dark", True), (390, "light", False)],
    ids=["desktop", "phone", "without script"],
)
def test_a_browser_shows_it_and_asks_nobody(browser, reports, tmp_path, name, width, scheme, scripted) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripted
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(reports[name].as_uri())
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert page.locator("svg.chart").count() >= 6
    assert page.locator(".shot img").first.is_visible()
    if scripted:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        parts, style = "[...document.querySelectorAll('.figure > *')]", "getComputedStyle"
        room = f"part.parentElement.clientWidth - 2 * parseFloat({style}(part.parentElement).paddingLeft)"
        assert page.evaluate(f"{parts}.filter(part => part.scrollWidth > {room}).map(part => part.innerText)") == []
        line = f"parseFloat({style}(part).lineHeight)"
        wrapped = f"{parts}.filter(part => part.tagName == 'B' && part.offsetHeight > 1.5 * {line})"
        assert page.evaluate(f"{wrapped}.map(part => part.innerText)") == []
        head = page.locator("#classes th button", has_text="MAP@R")
        rows = "[...document.querySelectorAll('#classes tbody tr')]"
        column = rows + ".map(row => +row.cells[4].dataset.value)"
        head.click()
        falling = page.evaluate(column)
        assert falling == sorted(falling, reverse=True)
        head.click()
        assert page.evaluate(column) == sorted(falling)
        assert len(set(falling)) > 3
        page.locator("#classes th button", has_text="Class").first.click()
        named = page.evaluate(rows + ".map(row => row.cells[0].dataset.value)")
        assert named == sorted(named), "names from A on first"
        chart = page.locator("[data-map]").last  # of the second encoder, whose pictures are those of the first
        chart.scroll_into_view_if_needed()
        dot = chart.locator("circle").nth(5).bounding_box()
        label = chart.locator("circle").nth(5).get_attribute("data-label")
        page.mouse.move(dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2)
        peek = chart.locator(".peek")
        assert peek.is_visible()
        assert peek.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        if label not in peek.inner_text():  # another one lies nearer than its own middle
            assert peek.inner_text().startswith("c")
        chart.focus()
        before = peek.inner_text()
        seen = {before}
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
            page.keyboard.press(key)
            seen.add(peek.inner_text() + str(peek.bounding_box()))
        assert len(seen) > 2
        page.keyboard.press("Escape")
        assert not peek.is_visible()
        page.get_by_label("Show a class").fill(label.upper())
        left = page.locator("#map circle:not(.unwanted)")
        assert 0 < left.count() < page.locator("#map circle").count()
        assert set(left.evaluate_all("dots => dots.map(dot => dot.dataset.label)")) == {label}
    if width == 1280:
        page.pdf(path=tmp_path / "print.pdf", prefer_css_page_size=True, print_background=True)
        assert (tmp_path / "print.pdf").stat().st_size > 20_000
    assert said == []
    context.close()


def test_pictures_of_the_docs(browser, reports) -> None:
    """With EMBEDLAB_SCREENSHOTS writes what docs/evaluation.md shows; of a report on real data with EMBEDLAB_REPORT."""
    place = os.environ.get("EMBEDLAB_SCREENSHOTS")
    shown = Path(os.environ.get("EMBEDLAB_REPORT", reports["one"]))
    page = browser.new_page(viewport={"width": 1120, "height": 1180})
    page.goto(shown.resolve().as_uri())
    top = page.screenshot()
    page.locator("#verification").scroll_into_view_if_needed()
    curves = page.locator("#verification .charts").screenshot()
    dots = page.locator("#map circle")
    page.locator("#map").scroll_into_view_if_needed()
    spot = dots.nth(dots.count() // 2).bounding_box()
    page.mouse.move(spot["x"] + 4, spot["y"] + 4)
    hovered = page.locator("#map").screenshot()
    for name, content in (("top", top), ("curves", curves), ("map", hovered)):
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
        if place:
            (Path(place) / f"evaluation-{name}.png").write_bytes(content)
    page.close()
