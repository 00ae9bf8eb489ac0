"""The guided first run with few steps: everything is made, figures agree, reruns and foreign folders are safe."""

import json

import pytest
from PIL import Image

from embedlab.cli import main
from embedlab.encoders import Encoder
from embedlab.retrieval import Gallery


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "made by hand" / "out"
    assert main(["quickstart", "--out", str(out), "--effort", "0.01"]) == 0
    return out


def test_it_leaves_what_it_says(first) -> None:
    report = json.loads((first / "report.json").read_text())
    figures = "closed_set_accuracy detection_rate target_fpir observed_fpir threshold unknown_after_removal"
    parts = "seed versions seconds finetuned_accuracy scratch_accuracy baselines intervals"
    assert set(report) >= set(f"{figures} {parts}".split())
    assert set(report["finetuned_accuracy"]) == set(report["scratch_accuracy"]) == {"2", "10"}
    assert set(report["baselines"]) == {"raw_pixels", "untrained"}
    for name in ("closed_set_accuracy", "detection_rate", "observed_fpir"):
        low, high = report["intervals"][name]
        assert 0 <= low <= report[name] <= high <= 1
    assert report["removal"]["named_while_removed"] == 0
    assert report["removal"]["named_after_enrolling_again"] == report["removal"]["named_before"]
    for picture in ("decisions.png", "map.png"):
        with Image.open(first / picture) as image:
            assert min(image.size) > 300
    with Gallery.open(first / "gallery", read_only=True) as gallery:
        assert len(gallery.labels()) == report["open_set"]["enrolled"]
        assert gallery.calibration.fpir == report["target_fpir"]
        assert gallery.fingerprint == Encoder.load(first / "encoder").fingerprint


def test_identities_are_disjoint_and_test_scripts_are_new() -> None:
    from embedlab.data import render_glyphs, split_glyphs

    split = split_glyphs(render_glyphs(limit=300))
    parts = [set(part.labels) for part in (split.train, split.calibrate, split.test)]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert not set(split.train.scripts) & (set(split.calibrate.scripts) | set(split.test.scripts))


def test_a_half_finished_folder_is_replaced_and_a_foreign_one_kept(first, tmp_path, capsys, monkeypatch) -> None:
    (first / "report.json").unlink()
    (first / "gallery" / "gallery.db").write_bytes(b"broken off")
    steps = []
    monkeypatch.setattr("embedlab.quickstart.render_glyphs", lambda **_: steps.append(1) or 1 / 0)
    assert main(["quickstart", "--out", str(first)]) == 1
    assert steps
    assert not (first / "gallery").exists()
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert main(["quickstart", "--out", str(foreign)]) == 1
    assert "exists and holds no quickstart; choose another folder by --out" in capsys.readouterr().err
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_bad_arguments_are_explained(tmp_path, capsys) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "x"), "--effort", "0"]) == 1
    assert "effort is a share of the training steps above 0" in capsys.readouterr().err
