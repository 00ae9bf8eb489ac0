"""Extraction in parts: the same vectors whatever was killed and however many processes shared them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedlab.cli import main
from embedlab.data import open_source
from embedlab.encoders import Encoder, Pixels
from embedlab.retrieval import extraction, read_embeddings, read_protocol
from embedlab.retrieval.extraction import extract

WORKER = Path(__file__).with_name("ddp_worker_extraction.py")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(20):
        (folder / f"p{number % 4}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{number % 4}" / f"{number}.png")
    Encoder(Pixels(4), image_size=4).save(folder.parent / "encoder")
    Encoder(Pixels(4), image_size=4, fit="pad").save(folder.parent / "other")
    return folder


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(extraction, "ROWS", 3)


@pytest.fixture
def encoder(photos):
    return Encoder.load(photos.parent / "encoder")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(photos, out, *options, encoder="encoder"):
    return ["embed", str(photos), "--encoder", str(photos.parent / encoder), "--out", str(out), *options]


def test_parts_together_are_what_the_encoder_gives(photos, encoder, tmp_path, three):
    source = open_source(str(photos))
    found = extract(encoder, source, tmp_path / "out", protocol={"encoder": "x"})
    assert (found.count, found.dim, found.skipped, found.kept) == (20, 48, 0, 0)
    got, want = read_embeddings(tmp_path / "out"), encoder.embed(source)
    np.testing.assert_array_equal(got.vectors, want.vectors)
    np.testing.assert_array_equal(got.ids, want.ids)
    assert (got.labels, got.paths) == (want.labels, want.paths)
    assert sorted(read_protocol(tmp_path / "out")["files"]) == [
        *(f"part-{i:05d}.safetensors" for i in range(7)),
        "rows.csv",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(photos, encoder, tmp_path, three, monkeypatch):
    assert main(command(photos, tmp_path / "whole")) == 0
    embed, sizes = Encoder.embed, []

    def dying(self, source, **options):
        sizes.append(len(source))
        if len(sizes) == 4:
            raise KeyboardInterrupt
        return embed(self, source, **options)

    monkeypatch.setattr(Encoder, "embed", dying)
    assert main(command(photos, tmp_path / "out")) == 130
    assert not (tmp_path / "out").exists()
    part = tmp_path / "out.unfinished" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")  # found, and done again
    monkeypatch.setattr(extraction, "ROWS", 5)  # the plan counts
    sizes.clear()
    sizes.extend([0] * 4)
    assert main(command(photos, tmp_path / "out", "--resume")) == 0
    assert sizes[4:] == [3, 3, 3, 3, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("call", ["write_protocol", "put_in_place"])
def test_a_run_that_was_cut_off_at_its_end_is_finished_without_the_encoder(photos, tmp_path, three, monkeypatch, call):
    assert main(command(photos, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(extraction, call, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command(photos, tmp_path / "out")) == 130
    monkeypatch.setattr(Encoder, "embed", None)
    assert main(command(photos, tmp_path / "out", "--resume")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_does_not_belong_together_is_refused(photos, tmp_path, three, monkeypatch, capsys, caplog):
    def fails(*arguments, **options):
        assert main(command(photos, tmp_path / "out", *arguments, **options)) == 1
        return capsys.readouterr().err

    assert "Nothing to resume" in fails("--resume")
    embed, calls = Encoder.embed, []

    def dying(self, source, **options):
        calls.append(source)
        if len(calls) in (1, 4):
            raise RuntimeError("no power")
        return embed(self, source, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "embed", dying)
        assert "no power" in fails()
        assert "keeps what is done" not in caplog.text
        assert "no power" in fails()  # a run without any part is a false start: nothing is in the way
        assert "out.unfinished keeps what is done; --resume goes on with it" in caplog.text
    assert "holds a run that was not finished: go on by resume=True (--resume)" in fails()
    told = fails("--resume", encoder="other")
    assert re.search(r"was begun for something else: encoder was '\w+' and is '\w+'; preprocessing was", told)
    assert "precision was 'float32' and is 'bfloat16'" in fails("--resume", "--precision", "bfloat16")
    extra = photos / "p0" / "extra.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(extra)
    told = fails("--resume")
    extra.unlink()
    assert "images was 20 and is 21; names and labels was" in told
    plan = tmp_path / "out.unfinished" / "plan.json"
    plan.write_text(plan.read_text().replace('"version": 1', '"version": 2'))
    assert "has version 2, this embedlab reads 1" in fails("--resume")
    assert main(command(photos, tmp_path / "out", "--overwrite")) == 0  # drops the unfinished one
    assert "out was begun for something else: encoder was" in fails("--resume", encoder="other")
    assert "is not empty; choose a new folder or pass overwrite=True (--overwrite)" in fails()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_finished_run_has_nothing_to_resume(photos, tmp_path, three, monkeypatch, capsys, caplog):
    assert main(command(photos, tmp_path / "out")) == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "plan.json").write_text("{}")  # left by a kill in the last moment
    monkeypatch.setattr(Encoder, "embed", None)
    capsys.readouterr()
    assert main(command(photos, tmp_path / "out", "--resume")) == 0
    assert "out is finished: there is nothing left to do." in caplog.text
    assert "20 images (20 were there), 48 numbers each" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before
    extra = photos / "p0" / "extra.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(extra)
    assert main(command(photos, tmp_path / "out", "--resume")) == 1
    extra.unlink()
    assert "out was begun for something else: images was 20 and is 21; names and labels was" in capsys.readouterr().err


def test_unreadable_images_count_over_all_parts(photos, tmp_path, monkeypatch, caplog, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(150):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(folder / f"{number:03d}.png")
    (folder / "007.png").write_bytes(b"no image")
    monkeypatch.setattr(extraction, "ROWS", 10)
    run = ["embed", str(folder), "--encoder", str(photos.parent / "encoder"), "--out"]
    assert main([*run, str(tmp_path / "stop")]) == 1
    assert main([*run, str(tmp_path / "skip"), "--on-error", "skip"]) == 0
    got = read_embeddings(tmp_path / "skip")
    assert got.ids.tolist() == [row for row in range(150) if row != 7]
    assert "Skipped 1 of 150 images" in caplog.text
    (folder / "008.png").write_bytes(b"")
    caplog.clear()
    assert main([*run, str(tmp_path / "many"), "--on-error", "skip"]) == 1  # 2 of 150 are more than 1 %
    told = capsys.readouterr().err
    assert "2 of 150 images cannot be read, more than the share of 0.01 (or the one) that may be skipped" in told
    assert "008.png: the file is empty (0 bytes)" in told, "the reason of each part is that of the whole"


def run_worker(arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, str(WORKER), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **options,
    )


@pytest.mark.ddp
def test_two_processes_do_what_one_does(photos, tmp_path, three):
    assert main(command(photos, tmp_path / "one")) == 0
    worker = run_worker(command(photos, tmp_path / "two", "--devices", "2", "--json"))
    told, log = worker.communicate(timeout=300)
    assert worker.returncode == 0, log
    assert '"count": 20' in told
    assert len(told.splitlines()) == 1  # the first process alone speaks
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.ddp
@pytest.mark.full
def test_an_error_in_one_process_ends_them_all(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "p3" / "19.png").write_bytes(b"no image")
    arguments = ["embed", str(tmp_path / "photos"), "--encoder", str(photos.parent / "encoder"), "--devices", "2"]
    worker = run_worker([*arguments, "--out", str(tmp_path / "out")])
    told, log = worker.communicate(timeout=300)
    assert (worker.returncode, told) == (1, "")
    assert "19.png: it is text, not an image" in log
    assert "gloo" not in log
    assert "Warning" not in log
    assert main([*arguments[:-2], "--out", str(tmp_path / "out"), "--resume", "--on-error", "skip"]) == 0
    assert len(read_embeddings(tmp_path / "out")) == 19


@pytest.mark.ddp
@pytest.mark.full
def test_one_process_goes_on_for_two_that_were_killed(photos, tmp_path, three):
    assert main(command(photos, tmp_path / "one")) == 0
    worker = run_worker(command(photos, tmp_path / "cut", "--devices", "2"))
    place, until = tmp_path / "cut.unfinished", time.monotonic() + 200
    while len(list(place.glob("part-*.json"))) < 2 and time.monotonic() < until and worker.poll() is None:
        time.sleep(0.002)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate()
    there = len(list(place.glob("part-*.json")))
    if place.exists():  # else it was quicker
        assert main(command(photos, tmp_path / "cut", "--resume")) == 0
    print(f"killed with {there} of 7 parts done")
    assert contents(tmp_path / "cut") == contents(tmp_path / "one")
