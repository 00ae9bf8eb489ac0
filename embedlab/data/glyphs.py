"""Printed characters as identities: pictures with known truth that need no download and no torch.

matplotlib ships the DejaVu fonts. A character is an identity, a font style is a way to see it, and a seeded distortion
makes every picture a different one. Whole scripts are held out, so that a gallery meets alphabets never trained on.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

Picture = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
Pictures = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Rows = np.ndarray[tuple[int], np.dtype[np.int64]]

STYLES = (
    *("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique"),
    *("SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique"),
    *("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic"),
)
HELD_OUT = ("ARMENIAN", "CYRILLIC", "GEORGIAN", "GREEK", "LAO")

_CANVAS = 64  # pixels; characters are drawn at this size and resampled once
_INK = 46  # pixels of the longer side of a character on the canvas
_LATTICE = 5  # control points per side of the elastic distortion
_BEND = 3.0  # canvas pixels, standard deviation of the elastic distortion
_SHIFT = 5.0  # canvas pixels, largest
_TURN_DEGREES = 15.0
_SHEAR = 0.2
_SCALE = 0.15  # largest, natural logarithm
_STRETCH = 0.12  # largest, natural logarithm of half the ratio of the sides
_STROKE = 0.9  # largest part of a canvas pixel by which an edge moves
_BLUR = 1.0
_NOISE = 0.10  # standard deviation of white noise where black is 0 and white 1, largest


@dataclass(frozen=True, eq=False)
class Glyphs:
    """Pictures of printed characters, row by row; the pictures of one character stand together.

    Args:
        images: (N, size, size) uint8, light ink on dark ground.
        labels: N identities such as "U+0416 CYRILLIC CAPITAL LETTER ZHE".
        styles: N names out of `STYLES`.
        scripts: N first words of the character's Unicode name, such as "CYRILLIC".
    """

    images: Pictures
    labels: list[str]
    styles: list[str]
    scripts: list[str]

    def __post_init__(self) -> None:
        rows = [len(self.images), len(self.labels), len(self.styles), len(self.scripts)]
        if len(set(rows)) > 1:
            raise ValueError(f"Glyphs needs images, labels, styles and scripts row by row, got {rows} rows.")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Rows) -> Glyphs:
        """The pictures with these row numbers, in this order."""
        return Glyphs(
            self.images[rows],
            [self.labels[row] for row in rows],
            [self.styles[row] for row in rows],
            [self.scripts[row] for row in rows],
        )


@dataclass(frozen=True, eq=False)
class GlyphSplit:
    """Three sets of pictures that share no identity; the last two share no script with the first.

    Args:
        train: Identities to learn from.
        calibrate: Identities to choose layers and thresholds on.
        test: Identities for the figures that are reported.
    """

    train: Glyphs
    calibrate: Glyphs
    test: Glyphs


def render_glyphs(size: int = 32, seed: int = 0, *, copies: int = 1, limit: int | None = None) -> Glyphs:
    """Draw every distinguishable character of the DejaVu fonts in every style that has it.

    Characters that at least eight styles hold are kept, without spaces, controls, combining marks and Unicode's
    compatibility variants (superscripts, circled digits, ligatures). Of characters that look alike in Sans once place
    and size are taken away (Latin, Greek and Cyrillic A; o and O) only the first code point is an identity.

    The distortion of a picture (turn, shear, scale, shift, elastic, stroke width, blur, contrast, noise) depends on
    seed, character, style and copy alone: more copies or fewer characters leave the other pictures as they were.

    Args:
        size: Pixels per side, at least 8; 16, 32 and 64 resample the canvas evenly.
        seed: Of all distortions, >= 0.
        copies: Pictures of each character in each style, each distorted differently.
        limit: Draw only so many characters, spread over all scripts; for quick trials.
    """
    if size < 8:
        raise ValueError(f"render_glyphs needs size >= 8 pixels, got {size}: characters are unreadable below.")
    if seed < 0:
        raise ValueError(f"render_glyphs needs seed >= 0, got {seed}; any whole number from 0 on will do.")
    if copies < 1:
        raise ValueError(f"render_glyphs needs copies >= 1, got {copies}; 1 is a single picture per style.")
    if limit is not None and limit < 1:
        raise ValueError(f"render_glyphs needs limit >= 1 characters or None, got {limit}; None draws them all.")
    characters = distinct_characters()
    if limit is not None and limit < len(characters):
        characters = tuple(characters[i] for i in np.linspace(0, len(characters) - 1, limit).round().astype(int))
    drawn = [
        (code, number, outline)
        for code in tqdm(characters, desc="drawing characters", unit="character")
        for number, style in enumerate(STYLES)
        if code in _code_points(style) and (outline := _outline(style, code)) is not None
    ]
    rows = [(code, number, copy) for code, number, _ in drawn for copy in range(copies)]
    step = max(1, 256 // copies)  # outlines at a time: the work of one thread stays within its cache

    def distort(start: int) -> Pictures:
        outlines = np.stack([outline for *_, outline in drawn[start : start + step]])
        keys = rows[start * copies : (start + step) * copies]
        return _distort(outlines.repeat(copies, axis=0), [(seed, *key) for key in keys], size)

    starts = range(0, len(drawn), step)
    with ThreadPoolExecutor() as threads:
        parts = list(tqdm(threads.map(distort, starts), total=len(starts), desc="distorting pictures", unit="batch"))
    return Glyphs(
        np.concatenate(parts),
        [f"U+{code:04X} {unicodedata.name(chr(code))}" for code, *_ in rows],
        [STYLES[number] for _, number, _ in rows],
        [_script(code) for code, *_ in rows],
    )


def split_glyphs(glyphs: Glyphs, seed: int = 0, *, held_out: tuple[str, ...] = HELD_OUT) -> GlyphSplit:
    """Keep whole scripts out of training and divide their identities at random into calibrate and test.

    A promised rate of false positives holds for strangers that are drawn like those of the calibration; therefore the
    held-out identities are shuffled together before they are divided, and no script belongs to one side alone.

    Args:
        glyphs: Pictures of at least one script on either side.
        seed: Of the division into calibrate and test.
        held_out: Scripts (first words of Unicode names) that training must not see.
    """
    missing = sorted(set(held_out) - set(glyphs.scripts))
    if missing:
        raise ValueError(
            f"split_glyphs cannot hold out {', '.join(missing)}: no picture has such a script. "
            f"Scripts here: {', '.join(sorted(set(glyphs.scripts)))}."
        )
    held = {label for label, script in zip(glyphs.labels, glyphs.scripts, strict=True) if script in held_out}
    if len(held) < 2 or len(held) == len(set(glyphs.labels)):
        raise ValueError(
            f"split_glyphs holds out {len(held)} of {len(set(glyphs.labels))} identities; it needs at least two to "
            "divide and at least one to train on. Name other scripts in held_out."
        )
    order = np.random.default_rng(seed).permutation(sorted(held))
    side = dict.fromkeys(order[: len(order) // 2].tolist(), 1) | dict.fromkeys(order[len(order) // 2 :].tolist(), 2)
    sides = np.array([side.get(label, 0) for label in glyphs.labels])
    train, calibrate, test = (glyphs.take(np.flatnonzero(sides == number)) for number in range(3))
    return GlyphSplit(train, calibrate, test)


@cache
def distinct_characters(*, styles: int = 8, alike: float = 0.92) -> tuple[int, ...]:
    """Code points that Sans and many other styles hold and that look like no earlier one, in ascending order.

    Args:
        styles: How many of the twelve styles must hold the character.
        alike: Two characters are one identity if the cosine of their pictures in Sans (16 pixels, same place and size)
            reaches this; in (0, 1].
    """
    held = Counter(code for style in STYLES for code in _code_points(style))
    codes = [code for code in sorted(_code_points("Sans")) if held[code] >= styles and _is_printable(code)]
    drawn = [(code, picture) for code in codes if (picture := _outline("Sans", code)) is not None]
    block = _CANVAS // 16
    pictures = np.stack([picture for _, picture in drawn]).reshape(-1, 16, block, 16, block)
    vectors = pictures.mean(axis=(2, 4)).reshape(len(drawn), -1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    kept: list[int] = []
    for row in range(len(drawn)):
        if not kept or cosines[row, kept].max() < alike:
            kept.append(row)
    return tuple(drawn[row][0] for row in kept)


def _is_printable(code: int) -> bool:
    character = chr(code)
    return (
        unicodedata.category(character)[0] not in "CZM"  # control, space, combining mark
        and not unicodedata.decomposition(character).startswith("<")  # "<super> 0032": a variant of another character
        and unicodedata.name(character, "") != ""
    )


def _script(code: int) -> str:
    return unicodedata.name(chr(code)).split()[0]


def _font_path(style: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVu{style}.ttf"


@cache
def _code_points(style: str) -> frozenset[int]:
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]  # comes with matplotlib

    with TTFont(_font_path(style), lazy=True) as font:
        return frozenset(font.getBestCmap())


@lru_cache(maxsize=4096)
def _font(style: str, size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(str(_font_path(style)), size, layout_engine=ImageFont.Layout.BASIC)


def _outline(style: str, code: int) -> Picture | None:
    """One character, undistorted, on a 64-pixel canvas: ink centred, its longer side always the same; None: no ink."""
    from PIL import Image

    trial = _ink(style, code, 96)
    if trial is None:
        return None
    # drawn again instead of resized: a full stop is as sharp as an M
    ink = _ink(style, code, max(8, round(96 * _INK / max(trial.size))))
    assert ink is not None
    ink.thumbnail((_CANVAS, _CANVAS))  # hinting at small sizes may add a pixel or two
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    canvas.paste(ink, ((_CANVAS - ink.width) // 2, (_CANVAS - ink.height) // 2))
    return np.asarray(canvas)


def _ink(style: str, code: int, size: int) -> Image | None:
    """A character cut to its ink; Pillow's own box of a text also holds the white to its left and right."""
    from PIL import Image, ImageDraw

    font = _font(style, size)
    left, top, right, bottom = (round(side) for side in font.getbbox(chr(code)))
    canvas = Image.new("L", (max(1, right - left) + 8, max(1, bottom - top) + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), chr(code), fill=255, font=font)
    box = canvas.getbbox()
    return None if box is None else canvas.crop(box)


def _distort(outlines: Pictures, keys: list[tuple[int, ...]], size: int) -> Pictures:
    """Distorted pictures (N, size, size) of N outlines (N, 64, 64); keys[i] alone decides the randomness of row i."""
    uniform = np.empty((len(keys), 12), np.float32)
    lattice = np.empty((len(keys), 2, _LATTICE, _LATTICE), np.float32)
    noise = np.empty((len(keys), size, size), np.float32)
    for row, key in enumerate(keys):
        generator = np.random.default_rng(key)
        uniform[row] = generator.uniform(-1, 1, 12)
        lattice[row] = generator.standard_normal(lattice.shape[1:], np.float32)
        noise[row] = generator.standard_normal(noise.shape[1:], np.float32)
    turn, shear, scale, stretch, right, down, stroke, blur, ink, ground, bend, grain = uniform.T[:, :, None, None]

    canvas: Floats = outlines.astype(np.float32) / np.float32(255)
    canvas += np.maximum(stroke, 0) * (_neighbourhood(canvas, np.maximum) - canvas) * _STROKE
    canvas += np.maximum(-stroke, 0) * (_neighbourhood(canvas, np.minimum) - canvas) * _STROKE

    # where on the canvas each pixel of the result looks: affine around the centre, then the elastic lattice
    down_0, right_0 = (np.mgrid[:size, :size].astype(np.float32) + 0.5) * (_CANVAS / size) - _CANVAS / 2
    angle = turn * math.radians(_TURN_DEGREES)
    x_scale, y_scale = np.exp(scale * _SCALE + stretch * _STRETCH), np.exp(scale * _SCALE - stretch * _STRETCH)
    x = x_scale * (np.cos(angle) * right_0 - np.sin(angle) * down_0) + shear * _SHEAR * down_0
    y = y_scale * (np.sin(angle) * right_0 + np.cos(angle) * down_0)
    spread = _spread(size)
    waves = spread @ lattice @ spread.T * (_BEND * (0.75 + 0.25 * bend))[:, None]  # (N, 2, size, size), canvas pixels
    x += waves[:, 0] + right * _SHIFT + (_CANVAS - 1) / 2
    y += waves[:, 1] + down * _SHIFT + (_CANVAS - 1) / 2

    pictures = _sample(_smooth(canvas) if size < _CANVAS else canvas, x, y)
    pictures += (0.5 + 0.5 * blur) * _BLUR * (_smooth(pictures) - pictures)
    low, high = 0.15 + 0.15 * ground, 0.8 + 0.2 * ink
    pictures = low + (high - low) * pictures + noise * _NOISE * (0.6 + 0.4 * grain)
    result: Pictures = np.round(pictures.clip(0, 1) * 255).astype(np.uint8)
    return result


def _neighbourhood(pictures: Floats, combine: np.ufunc) -> Floats:
    """The largest or smallest value among each pixel and its four neighbours."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), mode="edge")
    result: Floats = combine(padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    for other in (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], pictures):
        combine(result, other, out=result)
    return result


def _smooth(pictures: Floats) -> Floats:
    """Blur with the weights 1 2 1 along both axes."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    smooth: Floats = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / np.float32(16)
    return smooth


def _spread(size: int) -> Floats:
    """(size, lattice points) weights that turn values at the lattice points into a smooth curve; rows have norm 1."""
    pixels, points = np.linspace(0, 1, size), np.linspace(0, 1, _LATTICE)
    weights = np.exp(-0.5 * ((pixels[:, None] - points) * (_LATTICE - 1) / 0.7) ** 2)
    smooth: Floats = (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
    return smooth


def _sample(pictures: Floats, x: Floats, y: Floats) -> Floats:
    """Bilinear values of (N, 64, 64) pictures at (N, size, size) places; outside is dark."""
    padded = np.pad(pictures, ((0, 0), (1, 2), (1, 2)))
    width = padded.shape[-1]
    x, y = (np.clip(place + 1, 0, _CANVAS + 1) for place in (x, y))
    left, top = x.astype(np.int32), y.astype(np.int32)
    x, y = x - left.astype(np.float32), y - top.astype(np.float32)  # int32 with float32 would give float64
    corner = top * width + left + np.arange(len(padded), dtype=np.int32)[:, None, None] * width**2
    flat = padded.reshape(-1)
    upper = flat[corner] * (1 - x) + flat[corner + 1] * x
    lower = flat[corner + width] * (1 - x) + flat[corner + width + 1] * x
    values: Floats = upper * (1 - y) + lower * y
    return values
