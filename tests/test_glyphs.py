"""Printed characters: coverage, look-alikes, determinism, difficulty, splits."""

from __future__ import annotations

import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from embedlab.data.glyphs import HELD_OUT, STYLES, Glyphs, distinct_characters, render_glyphs, split_glyphs


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return render_glyphs(limit=120)


@pytest.fixture(scope="module")
def sans() -> dict[int, np.ndarray]:
    """Undistorted pictures by code point, drawn with Pillow at another size than the module's own comparison."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 80)
    pictures = {}
    for code in distinct_characters():
        canvas = Image.new("L", (400, 300))
        ImageDraw.Draw(canvas).text((150, 100), chr(code), fill=255, font=font)
        pictures[code] = np.asarray(canvas.crop(canvas.getbbox()))
    return pictures


def test_there_are_enough_identities_on_either_side() -> None:
    scripts = [unicodedata.name(chr(code)).split()[0] for code in distinct_characters()]
    held_out = sum(script in HELD_OUT for script in scripts)
    assert len(scripts) - held_out > 1200
    assert held_out > 400


def test_latin_greek_and_cyrillic_look_alikes_are_one_identity() -> None:
    codes = set(distinct_characters())
    assert ord("A") in codes
    assert not codes & {0x0391, 0x0410, ord("o"), 0x03BF, 0x043E, 0x2010, 0x2013}  # alpha, a; o and O; dashes
    assert codes >= {0x0416, 0x03A9, ord("4")}  # ZHE, OMEGA
    assert not any(unicodedata.category(chr(code))[0] in "CZM" for code in codes)
    assert 0x00B2 not in codes  # a superscript 2 is a 2


def test_no_two_identities_are_the_same_drawing(sans: dict[int, np.ndarray]) -> None:
    assert min(picture.size for picture in sans.values()) > 0
    assert len({(picture.shape, picture.tobytes()) for picture in sans.values()}) == len(sans)


def test_pictures_are_what_was_asked_for(glyphs: Glyphs) -> None:
    assert glyphs.images.shape == (len(glyphs), 32, 32)
    assert glyphs.images.dtype == np.uint8
    assert len(set(glyphs.labels)) == 120
    assert set(glyphs.styles) == set(STYLES)
    assert len(set(zip(glyphs.labels, glyphs.styles, strict=True))) == len(glyphs)
    for label, script in zip(glyphs.labels, glyphs.scripts, strict=True):
        code, name = label.split(" ", 1)
        assert unicodedata.name(chr(int(code[2:], 16))) == name
        assert name.split()[0] == script
    assert glyphs.images.std(axis=(1, 2)).min() > 8  # grey levels: nothing is empty


def test_same_seed_same_pictures_other_seed_others(glyphs: Glyphs) -> None:
    again, other = render_glyphs(limit=120), render_glyphs(seed=1, limit=120)
    assert np.array_equal(again.images, glyphs.images)
    assert (other.images != glyphs.images).mean() > 0.5


def test_a_picture_depends_on_its_own_key_alone(glyphs: Glyphs) -> None:
    more = render_glyphs(limit=30, copies=3)
    first = more.take(np.arange(0, len(more), 3))
    want = dict(zip(zip(glyphs.labels, glyphs.styles, strict=True), glyphs.images, strict=True))
    shared = 0
    for label, style, image in zip(first.labels, first.styles, first.images, strict=True):
        if (label, style) in want:
            shared += 1
            assert np.array_equal(image, want[label, style])
    assert shared > 10
    assert not np.array_equal(more.images[0], more.images[1])


@pytest.mark.parametrize("size", [16, 28, 64])
def test_other_sizes_show_the_same_picture(size: int) -> None:
    from PIL import Image

    large, small = render_glyphs(96, limit=6), render_glyphs(size, limit=6)
    reduced = [Image.fromarray(image).resize((8, 8), Image.Resampling.BOX) for image in large.images]
    shrunk = [Image.fromarray(image).resize((8, 8), Image.Resampling.BOX) for image in small.images]
    cosines = [np.corrcoef(np.ravel(a), np.ravel(b))[0, 1] for a, b in zip(reduced, shrunk, strict=True)]
    assert np.median(cosines) > 0.9


def test_raw_pixels_do_poorly_and_the_task_is_no_noise() -> None:
    """One template per identity, in another style: far better than chance (1/60), far from solved."""
    glyphs = render_glyphs(limit=400)
    vectors = glyphs.images.reshape(len(glyphs), -1).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = (np.array([s == style for s in glyphs.styles]) for style in ("Sans", "Serif"))
    labels = np.array(glyphs.labels)
    nearest = (vectors[second] @ vectors[first].T).argmax(axis=1)
    accuracy = (labels[first][nearest] == labels[second]).mean()
    assert 0.02 < accuracy < 0.4


def test_split_holds_out_scripts_and_divides_identities(glyphs: Glyphs) -> None:
    split = split_glyphs(glyphs, seed=3)
    parts = [split.train, split.calibrate, split.test]
    train, calibrate, test = (set(part.labels) for part in parts)
    assert sum(map(len, parts)) == len(glyphs)
    assert not train & calibrate
    assert not train & test
    assert not calibrate & test
    assert not set(split.train.scripts) & set(HELD_OUT)
    assert set(split.calibrate.scripts) | set(split.test.scripts) == set(HELD_OUT)
    assert abs(len(calibrate) - len(test)) <= 1
    assert set(split_glyphs(glyphs, seed=3).test.labels) == test
    assert set(split_glyphs(glyphs, seed=4).test.labels) != test
    row = glyphs.labels.index(split.test.labels[0])
    assert np.array_equal(split.test.images[0], glyphs.images[row])


def test_identities_of_one_script_land_on_both_sides() -> None:
    split = split_glyphs(render_glyphs(limit=300))
    assert {"GREEK", "CYRILLIC"} <= set(split.calibrate.scripts) & set(split.test.scripts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 4}, "needs size >= 8 pixels, got 4: characters are unreadable"),
        ({"seed": -1}, "needs seed >= 0, got -1"),
        ({"copies": 0}, "needs copies >= 1, got 0"),
        ({"limit": 0}, "needs limit >= 1 characters or None, got 0"),
    ],
)
def test_bad_arguments_teach(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_glyphs(**arguments)


def test_bad_splits_teach(glyphs: Glyphs) -> None:
    with pytest.raises(
        ValueError, match=r"cannot hold out KLINGON: no picture has such a script. Scripts here: .*GREEK"
    ):
        split_glyphs(glyphs, held_out=("KLINGON", "GREEK"))
    with pytest.raises(ValueError, match="holds out 0 of 120 identities; it needs at least two"):
        split_glyphs(glyphs, held_out=())
    with pytest.raises(ValueError, match="holds out 120 of 120 identities"):
        split_glyphs(glyphs, held_out=tuple(set(glyphs.scripts)))
    with pytest.raises(ValueError, match="row by row, got \\[2, 1, 2, 2\\] rows"):
        Glyphs(glyphs.images[:2], glyphs.labels[:1], glyphs.styles[:2], glyphs.scripts[:2])


def test_importing_glyphs_loads_no_torch() -> None:
    script = "import sys, embedlab.data.glyphs; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
