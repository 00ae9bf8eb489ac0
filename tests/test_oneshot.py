"""One-shot trials in the published form: read, answered alone, drawn; and the encoder's test-time views."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from benchmarks import oneshot
from PIL import Image

from embedlab._types import Embeddings
from embedlab.cli import main
from embedlab.data import FixedViews, ImageError, open_source
from embedlab.encoders import Encoder, Pixels
from embedlab.retrieval.oneshot import RunsError, draw_runs, evaluate_runs, read_runs


def bar(column: int, side: int = 105) -> Image.Image:
    """Black on white, one bit, as the data set's files: a vertical bar, of which there are seven places."""
    pixels = np.ones((side, side), bool)
    pixels[:, column * side // 7 : (column + 1) * side // 7] = False
    return Image.fromarray(pixels)


def write_run(folder: Path, name: str, shown: list[int], asked: list[int], truth: list[int]) -> None:
    """Class k shows the bar `shown[k]`; item i shows `asked[i]` and is said to be class `truth[i]`."""
    for role, prefix, columns in (("training", "class", shown), ("test", "item", asked)):
        (folder / name / role).mkdir(parents=True)
        for number, column in enumerate(columns, 1):
            bar(column).save(folder / name / role / f"{prefix}{number:02d}.png")
    lines = [
        f"{name}/test/item{item:02d}.png {name}/training/class{row + 1:02d}.png\n" for item, row in enumerate(truth, 1)
    ]
    (folder / name / "class_labels.txt").write_text("".join(lines))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs of which pixels get 1 of 4, none of 4 and 2 of 4 wrong."""
    folder = tmp_path / "runs"
    write_run(folder, "run01", [0, 1, 2, 3], [3, 2, 1, 0], [3, 2, 1, 1])
    write_run(folder, "run02", [6, 5, 4, 3], [3, 4, 5, 6], [3, 2, 1, 0])
    write_run(folder, "run03", [0, 2, 4, 6], [0, 2, 4, 6], [0, 1, 3, 2])
    (folder / "readme.txt").write_text("no run")
    (folder / ".cache").mkdir()
    return folder


def pixels(**settings: object) -> Encoder:
    return Encoder(Pixels(14, in_channels=1), image_size=14, mean=[1.0], std=[1.0], **settings)


def test_errors_per_run_their_mean_and_what_was_wrong(runs: Path) -> None:
    with Image.open(runs / "run01/test/item01.png") as image:
        assert image.mode == "1"
    found = evaluate_runs(pixels(), runs)
    assert [row["error"] for row in found["runs"]] == [0.25, 0, 0.5]
    assert found["error"] == pytest.approx(0.25)
    assert found["trials"] == 12
    assert found["interval_over"] == "runs"
    assert found["interval"][0] < 0.25 < found["interval"][1]
    assert found["runs"][0]["mistakes"] == [
        {"test": "run01/test/item04.png", "answer": "run01/training/class01.png", "truth": "run01/training/class02.png"}
    ]
    assert found["runs"][2]["ways"] == 4


def test_runs_all_alike_have_an_interval_over_trials(runs: Path) -> None:
    found = evaluate_runs(pixels(), runs, [run for run in read_runs(runs) if run.name == "run02"])
    assert found["error"] == 0
    assert found["interval_over"] == "trials"
    assert found["interval"] == pytest.approx((0, 0.49), abs=0.01)  # Wilson, 0 of 4


def test_every_trial_is_decided_alone(runs: Path) -> None:
    """Test items in another order, or without most of them: each that is left is answered as before."""
    encoder = pixels(test_views=FixedViews(3, degrees=20))

    def answers() -> dict[str, str]:
        return {
            mistake["test"]: mistake["answer"]
            for row in evaluate_runs(encoder, runs)["runs"]
            for mistake in row["mistakes"]
        }

    before = answers()
    assert len(before) == 3
    for name in ("run01", "run03"):
        place = runs / name / "class_labels.txt"
        lines = place.read_text().splitlines()
        place.write_text("\n".join([lines[3], lines[2], ""]))  # with the images of the others still there, or not
        (runs / name / "test" / "item01.png").unlink()
    after = answers()
    assert len(after) == 3
    assert after.items() <= before.items()


class Given:
    """An embedder that answers with vectors at hand."""

    fingerprint = "given"

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def embed(self, images: list[str], **_: object) -> Embeddings:
        return Embeddings(self.vectors[: len(images)].astype(np.float32), None, np.arange(len(images)))


@pytest.mark.parametrize("ways", [5, 7, 20, 26, 30])
def test_equal_candidates_count_by_name_whatever_rounding_does(tmp_path: Path, ways: int) -> None:
    write_run(tmp_path, "run01", [0] * ways, [0] * ways, [0] * ways)
    random = np.random.default_rng(ways)
    twins = np.repeat(random.normal(size=(1, 257)), ways, axis=0) + 1e-8 * random.normal(size=(ways, 257))
    found = evaluate_runs(Given(np.concatenate([twins, random.normal(size=(ways, 257))])), tmp_path)
    assert found["error"] == 0


def test_embeddings_that_are_not_finite_give_no_figure(runs: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(24, 3))
    vectors[[5, 6]] = np.nan
    with pytest.raises(ValueError, match=r"item02.png and of 1 further images is not finite; has the encoder's"):
        evaluate_runs(Given(vectors), runs)


def test_candidates_are_all_training_images_of_the_run(runs: Path, caplog) -> None:
    place = runs / "run01" / "class_labels.txt"
    place.write_text(place.read_text().splitlines()[3])
    (run, *_) = read_runs(runs)
    assert "names 1 of the 4 images in test/, not run01/test/item01.png" in caplog.text
    caplog.clear()
    for number in (1, 2, 3):
        (runs / "run01" / "test" / f"item{number:02d}.png").unlink()
    assert read_runs(runs)[0] == run
    assert not caplog.text
    assert run.training == [f"run01/training/class{number:02d}.png" for number in (1, 2, 3, 4)]
    assert (run.test, run.truth) == (["run01/test/item04.png"], [1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run01/test/item01.png", r"line 1: expected two paths, RUN/test/ITEM.png RUN/training/CLASS.png, got 1"),
        ("a b c", "line 1: expected two paths.* got 3"),
        ("/run01/test/item01.png run01/training/class01.png", "line 1: '/run01/test/item01.png' leads out of the runs"),
        ("run01/test/item01.png run01/training/../../x.png", r"line 1: 'run01/training/../../x.png' leads out"),
        (
            "run01\\test\\item01.png run01/training/class01.png",
            r"has a backslash; folders are parted by /, as in RUN/test",
        ),
        ("C:/test/item01.png run01/training/class01.png", "leads out of the runs"),
        (
            "run02/test/item01.png run01/training/class01.png",
            "expected run01/test/NAME.png, got 'run02/test/item01.png'",
        ),
        ("run01/training/class01.png run01/test/item01.png", "expected run01/test/NAME.png"),
        (
            "run01/test/item09.png run01/training/class01.png",
            r"there is no image .*item09.png. Was the run copied whole",
        ),
        ("run01/test/item01.png run01/training/class09.png", r"there is no image .*class09.png"),
        ("\n\n", "names no test image; expected lines RUN/test"),
        (
            "run01/test/item01.png run01/training/class01.png\nrun01/test/item01.png run01/training/class02.png",
            "line 2: run01/test/item01.png comes a second time",
        ),
        ("\x00 \xff".encode("latin-1").decode("latin-1"), "line 1: expected run01/test/NAME.png"),
    ],
)
def test_malformed_lines(runs: Path, line: str, message: str) -> None:
    (runs / "run01" / "class_labels.txt").write_text(line, encoding="utf-8")
    with pytest.raises(RunsError, match=message):
        read_runs(runs)


def test_missing_parts(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunsError, match="nowhere is no folder; expected one that holds run01"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(RunsError, match=rf"holds no runs.* Is it {runs}\?"):
        read_runs(tmp_path)
    with pytest.raises(RunsError, match=f"It is a run itself: give the folder above it, {runs}"):
        read_runs(runs / "run01")
    (runs / "run02" / "class_labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunsError, match="cannot be read as text"):
        read_runs(runs)
    (runs / "run02" / "class_labels.txt").unlink()
    with pytest.raises(RunsError, match=r"run02 has no class_labels.txt: copied in part\?"):
        read_runs(runs)
    shutil.rmtree(runs / "run02")
    for file in list((runs / "run03" / "training").iterdir())[1:]:
        file.unlink()
    with pytest.raises(RunsError, match="holds 1 images; a trial chooses between at least 2"):
        read_runs(runs)
    shutil.rmtree(runs / "run03" / "training")
    with pytest.raises(RunsError, match="run03 has no folder training/"):
        read_runs(runs)


def test_an_unreadable_image_is_named(runs: Path) -> None:
    (runs / "run02" / "test" / "item02.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match=r"item02.png: .*(damaged|not one of).*Replace it: a run is whole"):
        evaluate_runs(pixels(), runs)


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def characters(tmp_path: Path) -> Path:
    """Two alphabets whose drawers can be told by a corner: drawer d leaves d black pixels in the first row."""
    folder = tmp_path / "characters"
    for alphabet, count in (("Bars", 4), ("Few", 2), ("Holes", 5)):
        for column in range(count):
            place = folder / alphabet / f"character{column + 1:02d}"
            place.mkdir(parents=True)
            for drawer in (1, 2, 3):
                image = np.array(bar(column, 28))
                image[0] = True
                image[0, :drawer] = False
                Image.fromarray(image).save(place / f"0{column}_0{drawer}.png")
    return folder


def drawer(path: Path) -> int:
    with Image.open(path) as image:
        return int((~np.array(image))[0].sum())


def test_drawn_runs_have_the_published_form(characters: Path, tmp_path: Path, caplog) -> None:
    out = tmp_path / "drawn"
    alphabets = draw_runs(characters, out, runs=5, ways=3, seed=1)
    assert sorted(set(alphabets)) == ["Bars", "Holes"]  # Few has too few; the others take turns
    assert alphabets[:2] == alphabets[2:4]
    assert "Left out for want of 3 characters by the same two hands: Few. Fewer ways" in caplog.text
    for run in read_runs(out):
        assert len(run.training) == len(run.test) == 3
        assert sorted(run.truth) == [0, 1, 2]
        hands = [{drawer(out / path) for path in part} for part in (run.training, run.test)]
        assert len(hands[0]) == len(hands[1]) == 1
        assert hands[0] != hands[1]
    assert evaluate_runs(pixels(), out)["error"] == 0
    draw_runs(characters, tmp_path / "again", runs=5, ways=3, seed=1)
    draw_runs(characters, tmp_path / "other", runs=5, ways=3, seed=2)
    contents = [
        [file.read_bytes() for file in sorted((tmp_path / name).rglob("*.*"))] for name in ("drawn", "again", "other")
    ]
    assert contents[0] == contents[1] != contents[2]
    with pytest.raises(RunsError, match="exists; choose a new folder"):
        draw_runs(characters, out)


def test_too_few_characters_to_draw_from(characters: Path, tmp_path: Path) -> None:
    with pytest.raises(RunsError, match=r"has no alphabet with 20 characters .* Fewer --ways"):
        draw_runs(characters, tmp_path / "drawn")
    assert not (tmp_path / "drawn").exists()
    with pytest.raises(RunsError, match="runs >= 1 and ways >= 2"):
        draw_runs(characters, tmp_path / "drawn", ways=1)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(runs: Path, characters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels(test_views=FixedViews(2, translate=0.01)).save(tmp_path / "encoder")
    encoder = str(tmp_path / "encoder")
    assert main(["oneshot", str(runs), "--encoder", encoder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["error"] for row in found["runs"]] == [0.25, 0, 0.5]
    assert found["error"] == pytest.approx(0.25)
    assert found["protocol"]["preprocessing"]["test_views"]["count"] == 2
    assert len(found["protocol"]["preprocessing_digest"]) == 32
    assert found["protocol"]["intervals"]["resamples"] == 2000
    assert {"embedlab", "torch", "pillow"} <= found["protocol"]["versions"].keys()
    assert main(["oneshot", str(runs), "--encoder", encoder, "--runs", "1", "--seed", "0"]) == 1
    message = "--runs, --seed belong to --draw, which was not given; add it, or leave out --runs, --seed."
    assert message in capsys.readouterr().err
    drawn = [str(tmp_path / "drawn"), "--draw", str(characters), "--ways", "3", "--runs", "2"]
    assert main(["oneshot", *drawn, "--encoder", encoder]) == 0
    out = capsys.readouterr().out
    assert "run02        0.0%  of 3, 3 ways" in out
    assert "error 0.00% [0.00%, 39.03%], mean of 2 runs with 6 trials; 95 % over trials" in out
    again = [str(tmp_path / "again"), *drawn[1:]]
    assert main(["oneshot", *again, "--encoder", encoder, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["protocol"]
    assert (told["runs"], told["ways"], told["seed"], len(told["alphabets"])) == (2, 3, 0, 2)
    assert main(["oneshot", str(tmp_path / "nowhere"), "--encoder", encoder]) == 1
    assert "embedlab: error: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["oneshot", str(runs)])


def test_the_recipe_learns_from_whatever_alphabets_there_are(characters: Path, tmp_path: Path, capsys) -> None:
    """A few steps of a small network, on other numbers of alphabets, characters and drawers than the data set's."""
    more = [
        "--trainer.max_steps=3", "--trainer.accelerator=cpu", "--data.init_args.batch_size=24",
        "--model.init_args.backbone.init_args.width=0.125",
    ]  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises(RunsError, match="The source has no alphabet with 20 characters"):  # as the script draws them
        oneshot.main([str(characters), "--hold", "Few", "--out", str(out), *more])
    more += ["--runs", "2", "--ways", "2"]
    found = oneshot.main([str(characters), "--hold", "Few", "--out", str(out), *more])
    assert found["trials"] == 4
    assert found["error"] == found["seeds"][0] <= 1
    encoder = Encoder.load(out / "seed0" / "encoder")
    assert encoder.test_views is not None
    assert encoder.trained_on("Bars/character01")
    assert not encoder.trained_on("Few/character01")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    assert oneshot.main([str(characters), "--hold", "Few", "--out", str(out), *more]) == found
    told = oneshot.fine_error(pixels(), open_source(str(characters)), times=2, ways=2)
    assert told == {"Bars": 0, "Few": 0, "Holes": 0}
    upside_down = [name for name in sorted(characters.rglob("*_02.png")) if name.parts[-3] == "Bars"]
    contents = [name.read_bytes() for name in upside_down]
    for name, content in zip(upside_down, contents[::-1], strict=True):
        name.write_bytes(content)  # one drawer of three draws each bar in the place of another
    told = oneshot.fine_error(pixels(), open_source(str(characters)), times=2, ways=4)
    assert told == {"Bars": pytest.approx(4 / 6), "Few": 0, "Holes": 0}
    with pytest.raises(SystemExit, match="was made by another command or recipe than the one asked for now"):
        oneshot.main([str(characters), "--hold", "Bars", "--out", str(out), *more])
