import numpy as np
import pytest
from PIL import Image

from embedlab.serving.pictures import RIGHT, WRONG, Decision, draw_decisions, draw_map, project


def test_decisions_show_every_probe_with_its_colour(tmp_path) -> None:
    image = np.full((8, 8, 3), 90, np.uint8)
    sheet = [Decision(image, "right: a", RIGHT, [(image, "a 0.9")]), Decision(image, "wrong", WRONG, [])]
    draw_decisions(tmp_path / "sheet.png", sheet, title="Probes")
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours = {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}
    for colour in (RIGHT, WRONG):
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in colours
    with pytest.raises(ValueError, match="at least one decision"):
        draw_decisions(tmp_path / "none.png", [], title="")


def test_map_keeps_groups_together(tmp_path) -> None:
    random = np.random.default_rng(0)
    vectors = np.concatenate([random.normal(c, 0.05, (15, 8)) for c in (-1, 1)]).astype(np.float32)
    places = project(vectors)
    centres = places[:15].mean(0), places[15:].mean(0)
    assert np.linalg.norm(centres[0] - centres[1]) > places[:15].std()
    images = random.integers(0, 256, (30, 8, 8), dtype=np.uint8)
    draw_map(tmp_path / "map.png", vectors, images, ["a"] * 15 + ["b"] * 15, title="Map")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.size[0] > 500
    assert project(vectors[:3]).shape == (3, 2)
