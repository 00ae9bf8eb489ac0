import copy
import io
import logging
import os
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from embedlab.data import images as images_module
from embedlab.data.images import ImageError, convert_channels, fit_image, read_image, read_images


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(values: np.ndarray, *, colour_type: int, extra: bytes = b"") -> bytes:
    """16-bit PNG written by hand, since Pillow writes only grey ones."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    transparency = chunk(b"tRNS", extra) if extra else b""
    body = chunk(b"IHDR", header) + transparency + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def icc_profile(space: bytes, tags: dict[bytes, bytes], *, connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """A minimal ICC v2 profile."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78), **tags}
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0"
    tags[b"wtpt"] = xyz(0.9642, 1.0, 0.8249)
    table, body = b"", b""
    offset = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    size = offset + len(body)
    header = struct.pack(">I4sI", size, bytes(4), 0x02400000) + kind + space + connection
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


LINEAR = b"curv" + bytes(4) + struct.pack(">I", 0)
LINEAR_GREY = icc_profile(b"GRAY", {b"kTRC": LINEAR})
LINEAR_RGB = icc_profile(
    b"RGB ",
    {
        b"rXYZ": xyz(0.43607, 0.22249, 0.01392),  # the primaries of sRGB, so that only the curve differs
        b"gXYZ": xyz(0.38515, 0.71687, 0.09708),
        b"bXYZ": xyz(0.14307, 0.06061, 0.71410),
        **dict.fromkeys([b"rTRC", b"gTRC", b"bTRC"], LINEAR),
    },
)


def only_black_ink_profile() -> bytes:
    """A CMYK profile in which cyan, magenta and yellow are invisible and black runs linearly in L*."""
    ramp = bytes(range(256))
    grid = b"".join(bytes([0 if corner & 1 else 255, 128, 128]) for corner in range(16))  # last input, K, runs fastest
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + unit + ramp * 4 + grid + ramp * 3
    return icc_profile(b"CMYK", {b"A2B0": table, b"A2B1": table}, connection=b"Lab ", kind=b"prtr")


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


# ---- conversions


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".webp", ".jp2"])
def test_lossless_colour_comes_back_unchanged_and_writable(tmp_path: Path, suffix: str) -> None:
    want = noise(5, 7)
    got = read_image(save(tmp_path / f"a{suffix}", want, **({"lossless": True} if suffix == ".webp" else {})))
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.uint8
    assert got.flags.writeable
    assert got.flags.c_contiguous


def test_content_not_suffix_decides(tmp_path: Path) -> None:
    want = noise(4, 4)
    Image.fromarray(want).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), want)


SIXTEEN = np.array([[0, 128, 129, 257], [300, 32768, 65406, 65535]], dtype=np.uint16)


def sixteen_bit_file(path: Path, kind: str) -> Path:
    if kind == "png":
        path.write_bytes(png(SIXTEEN, colour_type=0))
    elif kind == "pgm":
        path.write_bytes(b"P5\n4 2\n65535\n" + SIXTEEN.astype(">u2").tobytes())
    elif kind == "tiff I":
        Image.fromarray(SIXTEEN.astype(np.int32)).save(path, format="TIFF")
    else:
        order = "<" if kind == "tiff little" else ">"
        entries = [(256, 4), (257, 2), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 16)]
        magic = b"II*\0" if order == "<" else b"MM\0*"
        pixels = SIXTEEN.astype(f"{order}u2").tobytes()
        directory = struct.pack(f"{order}H", len(entries))
        for tag, value in entries:
            padded = struct.pack(f"{order}HH", value, 0)
            directory += struct.pack(f"{order}HHI", tag, 3, 1) + padded
        path.write_bytes(magic + struct.pack(f"{order}I", 8 + len(pixels)) + pixels + directory + bytes(4))
    return path


@pytest.mark.parametrize("kind", ["png", "pgm", "tiff little", "tiff big", "tiff I"])
def test_sixteen_bit_grey_is_value_over_257(tmp_path: Path, kind: str) -> None:
    got = read_image(sixteen_bit_file(tmp_path / "a.img", kind), channels=1)
    np.testing.assert_array_equal(got[..., 0], np.round(SIXTEEN / 257).astype(np.uint8))


def test_sixteen_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(SIXTEEN, colour_type=0, extra=struct.pack(">H", 300)))
    got = read_image(tmp_path / "a.png")
    assert got[1, 0].tolist() == [255, 255, 255]
    assert got[0, 3].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4)])
def test_sixteen_bit_colour_keeps_the_upper_byte(tmp_path: Path, colour_type: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (3, 4, channels))
    values[..., 3:] = 65535  # opaque
    (tmp_path / "a.png").write_bytes(png(values, colour_type=colour_type))
    got = read_image(tmp_path / "a.png").astype(int)
    assert np.abs(got - values[..., :3] / 257).max() < 1


def test_integers_beyond_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: its grey values go from 0 to 70000, beyond 16 bits\. Save it as"):
        read_image(tmp_path / "a.tif")


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: its pixels are floating-point numbers.*Save it as 8 bit"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(tmp_path: Path, mode: str, channels: int) -> None:
    pixels = noise(6, 6, 4)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "a.png")
    layers = np.asarray(image).astype(float)
    alpha = layers[..., -1:] / 255
    over_white = layers[..., :-1] * alpha + 255 * (1 - alpha)
    if mode == "LA" or channels == 3:
        want = np.broadcast_to(over_white, (6, 6, channels))
    else:
        want = (over_white @ [0.299, 0.587, 0.114])[..., None]
    got = read_image(tmp_path / "a.png", channels=channels)
    assert np.abs(got - want).max() <= (0.51 if channels == 3 or mode == "LA" else 1.01)
    assert (got[0] == 255).all()


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "half.png", transparency=bytes([255, 128]))
    assert read_image(tmp_path / "plain.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert read_image(tmp_path / "clear.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert read_image(tmp_path / "half.png").tolist() == [[[10, 20, 30], [227, 177, 152]]]


def test_transparent_colour_of_an_rgb_png(tmp_path: Path) -> None:
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    save(tmp_path / "a.png", pixels, transparency=(4, 5, 6))
    assert read_image(tmp_path / "a.png").tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["PA", "RGBa", "YCbCr", "HSV", "1"])
def test_other_modes_agree_with_their_colour(mode: str) -> None:
    grey = Image.new("L", (3, 2), 255 if mode == "1" else 77)
    steps = {"RGBa": ["RGBA"], "PA": ["P"], "YCbCr": ["RGB"], "HSV": ["RGB"]}.get(mode, [])
    image = grey
    for step in [*steps, mode]:
        image = image.convert(step)
    got = images_module.image_pixels(image)
    assert np.abs(got.astype(int) - (255 if mode == "1" else 77)).max() <= 1


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.array([[0, 255], [255, 0]], dtype=np.uint8), "1")
    assert read_image(tmp_path / "a.png", channels=1)[..., 0].tolist() == [[0, 255], [255, 0]]


def test_cmyk_without_profile_in_tiff_and_jpeg(tmp_path: Path) -> None:
    ink = np.zeros((16, 32, 4), dtype=np.uint8)
    ink[:, :16] = [0, 255, 255, 0]  # magenta and yellow: red
    ink[:, 16:] = [0, 0, 0, 191]  # three quarters black
    image = Image.frombytes("CMYK", (32, 16), ink.tobytes())
    image.save(tmp_path / "a.tif")
    image.save(tmp_path / "a.jpg", quality=100)  # JPEG stores it inverted, as Adobe does
    for name, tolerance in (("a.tif", 0), ("a.jpg", 6)):
        got = read_image(tmp_path / name).astype(int)
        assert np.abs(got[4, 4] - [255, 0, 0]).max() <= tolerance, name
        assert np.abs(got[4, 28] - [64, 64, 64]).max() <= tolerance, name


def test_cmyk_goes_through_its_own_profile(tmp_path: Path) -> None:
    ink = np.array([[[255, 255, 255, 0], [0, 0, 0, 255], [0, 0, 0, 128]]], dtype=np.uint8)
    Image.frombytes("CMYK", (3, 1), ink.tobytes()).save(tmp_path / "a.tif", icc_profile=only_black_ink_profile())
    got = read_image(tmp_path / "a.tif").astype(int)[0]
    assert got[0].min() >= 253, "coloured inks are invisible in this profile; without it they are black"
    assert got[1].max() <= 2
    assert np.abs(got[2] - 119).max() <= 3  # L* = 50


def test_linear_profiles_are_brought_to_srgb(tmp_path: Path) -> None:
    grey = np.arange(0, 256, 5, dtype=np.uint8)[None]
    save(tmp_path / "grey.png", grey, icc_profile=LINEAR_GREY)
    colour = noise(4, 4)
    save(tmp_path / "colour.png", colour, icc_profile=LINEAR_RGB)
    clear = np.dstack([colour, np.full((4, 4), 255, np.uint8)])
    clear[0, 0, 3] = 0
    save(tmp_path / "clear.png", clear, icc_profile=LINEAR_RGB)

    assert np.abs(read_image(tmp_path / "grey.png", channels=1)[..., 0] - srgb_curve(grey / 255)).max() <= 2
    want = srgb_curve(colour / 255)
    assert np.abs(read_image(tmp_path / "colour.png") - want).max() <= 3
    want[0, 0] = 255
    assert np.abs(read_image(tmp_path / "clear.png") - want).max() <= 3


@pytest.mark.parametrize(
    "profile", [b"not a profile", LINEAR_GREY, LINEAR_RGB[:200]], ids=["junk", "other space", "cut"]
)
def test_a_profile_that_is_no_use_is_ignored(tmp_path: Path, profile: bytes) -> None:
    want = noise(4, 4)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", want, icc_profile=profile)), want)


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    want = noise(4, 4)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", want, icc_profile=profile)), want)


def test_lab_is_colour_managed(tmp_path: Path) -> None:
    Image.frombytes("LAB", (2, 1), bytes([255, 0, 0, 128, 0, 0])).save(tmp_path / "a.tif")
    white, middle = read_image(tmp_path / "a.tif")[0].astype(int)
    assert white.min() >= 250
    assert np.ptp(middle) <= 4
    assert np.abs(middle - 119).max() <= 4


UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
STORED = {  # what a camera stores for each EXIF orientation, from the definition of the tag
    1: UPRIGHT,
    2: np.fliplr(UPRIGHT),
    3: np.rot90(UPRIGHT, 2),
    4: np.flipud(UPRIGHT),
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT, 1),
    7: np.rot90(UPRIGHT, 2).T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_exif_orientation_is_applied_once(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", np.ascontiguousarray(STORED[orientation]), exif=exif)
    np.testing.assert_array_equal(read_image(path, channels=1)[..., 0], UPRIGHT)


def test_a_broken_exif_block_does_not_lose_the_picture(tmp_path: Path) -> None:
    want = noise(4, 4)
    path = save(tmp_path / "a.png", want, exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01\x00\x12")
    np.testing.assert_array_equal(read_image(path), want)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **options)
    assert (read_image(tmp_path / f"a{suffix}") == [255, 0, 0]).all()


def test_grey_is_luma(tmp_path: Path) -> None:
    colour = noise(5, 5)
    want = colour @ np.array([0.299, 0.587, 0.114])
    got = read_image(save(tmp_path / "a.png", colour), channels=1)
    assert got.shape == (5, 5, 1)
    assert np.abs(got[..., 0] - want).max() <= 0.51
    np.testing.assert_array_equal(convert_channels(got, 3), np.repeat(got, 3, axis=2))


# ---- bad files


BAD = {
    "empty": (b"", r"the file is empty \(0 bytes\)"),
    "text": (b"hello\n", r"it is text, not an image"),
    "html": (b"<!DOCTYPE html><html>404</html>", r"it is an HTML page, probably the answer of a failed download"),
    "svg": (
        b'<?xml version="1.0"?><svg xmlns="x"/>',
        r"it is an SVG drawing, which has no pixels \(export it as PNG\)",
    ),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"Git LFS pointer.*git lfs pull"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(20), r"it is a HEIC photo \(convert it to JPEG or PNG\)"),
    "zeros": (bytes(100), r"not one of JPEG, PNG, .*first bytes are damaged"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"it is text"),
    "png header": (b"\x89PNG\r\n\x1a\n", r"."),
    "bomb": (b"P5\n60000 60000\n255\n", r"3600000000 pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_named(tmp_path: Path, kind: str) -> None:
    content, reason = BAD[kind]
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"^Cannot read image .*a\.jpg: .*{reason}") as caught:
        read_image(path)
    assert caught.value.path == str(path)
    assert str(path) not in caught.value.reason


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".tif", ".ppm", ".webp", ".jp2", ".avif"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
def test_truncated_files_are_image_errors(tmp_path: Path, suffix: str, share: float) -> None:
    path = save(tmp_path / f"a{suffix}", noise(40, 40))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=r"Cannot read image .*a\.\w+: .*(Replace the file|pass on_error=skip)"):
        read_image(path)


def test_flipped_bytes_give_pixels_or_image_errors_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for suffix in (".jpg", ".png", ".gif", ".tif", ".webp", ".bmp"):
            whole = np.frombuffer(save(tmp_path / f"a{suffix}", noise(12, 12)).read_bytes(), dtype=np.uint8)
            for _ in range(40):
                damaged = whole.copy()
                places = rng.integers(0, min(len(whole), 300), 3)
                damaged[places] = rng.integers(0, 256, 3)
                (tmp_path / f"b{suffix}").write_bytes(damaged.tobytes())
                with suppress(ImageError):
                    assert read_image(tmp_path / f"b{suffix}").dtype == np.uint8


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in [
        ("folder.jpg", "it is a folder"),
        ("link.jpg", "it is a link to .*gone.jpg, which does not exist"),
        ("absent.jpg", "no such file"),
        ("pipe.jpg", "it is not a regular file"),
        ("null\0byte.jpg", "null"),
    ]:
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", noise(2, 2))

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images_module, "open", refuse, raising=False)
    with pytest.raises(ImageError, match=r"no permission to read it\. Allow it: chmod u\+r .*a\.png"):
        read_image(path)


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_bombs_are_refused_whatever_the_warning_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    path = save(tmp_path / "a.png", noise(10, 12))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # between the limit and twice the limit Pillow only warns
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageError, match=r"a\.png: .*120 pixels.*100.*raise PIL\.Image\.MAX_IMAGE_PIXELS"):
            read_image(path)


def test_an_error_survives_the_way_out_of_a_worker_process() -> None:
    error = ImageError("Cannot read image a.jpg: it is text. Replace it.", path="a.jpg", reason="it is text")
    again = copy.deepcopy(error)  # goes the same way as a transfer between processes
    assert (str(again), again.path, again.reason) == (str(error), "a.jpg", "it is text")
    assert ImageError("only text").reason == "only text"  # as a DataLoader rebuilds it


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_files_have_one_or_three_channels(tmp_path: Path, channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels must be 1 .grey. or 3 .RGB. for image files, got {channels}"):
        read_image(tmp_path / "a.png", channels=channels)


# ---- fitting


def naive_box(array: np.ndarray, factor: int) -> np.ndarray:
    height, width, channels = array.shape
    blocks = array.reshape(height // factor, factor, width // factor, factor, channels)
    return blocks.astype(float).mean(axis=(1, 3))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("how", ["crop", "stretch", "pad"])
def test_right_size_passes_through_as_a_copy(channels: int, how: str) -> None:
    array = noise(8, 8, channels)
    got = fit_image(array, 8, how)
    np.testing.assert_array_equal(got, array)
    assert not np.shares_memory(got, array)


def test_reduction_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # the finest pattern there is: any point sampling turns it into black or white
    small = fit_image(stripes, 8).astype(int)
    assert np.abs(small - 127.5).max() < 12
    smooth = np.dstack([np.add.outer(np.arange(64), np.arange(64))] * 3).astype(np.uint8)
    assert np.abs(fit_image(smooth, 8)[1:-1, 1:-1] - naive_box(smooth, 8)[1:-1, 1:-1]).max() <= 2


def test_crop_takes_the_centre_square() -> None:
    wide = np.zeros((4, 12), dtype=np.uint8)
    wide[:, 4:8] = 200
    assert (fit_image(wide, 4, "crop") == 200).all()
    assert (fit_image(wide.T, 4, "crop") == 200).all()
    whole = np.asarray(Image.fromarray(noise(40, 20)).resize((10, 20), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(fit_image(noise(40, 20), 10, "crop") - whole[5:15]).max() <= 1  # only rounding apart


def test_pad_keeps_everything_on_white() -> None:
    wide = np.full((4, 12), 50, dtype=np.uint8)
    got = fit_image(wide, 6, "pad")[..., 0]
    assert (got[2:4] == 50).all()
    assert (got[:2] == 255).all()
    assert (got[4:] == 255).all()


def test_stretch_fills_the_square() -> None:
    wide = np.full((4, 12), 50, dtype=np.uint8)
    wide[:, :6] = 150
    got = fit_image(wide, 4, "stretch")[..., 0]
    assert got[:, 0].tolist() == [150] * 4
    assert got[:, 3].tolist() == [50] * 4


def drawing(height: int, width: int, top: int, left: int, tall: int, wide: int, channels: int = 1) -> np.ndarray:
    """A black rectangle on white."""
    array = np.full((height, width, channels), 255, dtype=np.uint8)
    array[top : top + tall, left : left + wide] = 0
    return array


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(100, 100), (100, 60)])
@pytest.mark.parametrize(
    ("top", "left", "tall", "wide"),
    [(10, 20, 30, 20), (0, 0, 30, 20), (85, 50, 15, 10), (5, 5, 90, 50), (40, 30, 1, 1)],
)
def test_ink_is_in_the_middle_and_its_sizes_are_brought_nearer(height, width, top, left, tall, wide, channels) -> None:
    array = drawing(height, width, top, left, tall, wide, channels)
    got = fit_image(array, 200, "ink").astype(float)
    ink = 1 - got.mean(axis=2) / 255
    scale = 200 / (0.75 * max(tall, wide) + 0.4 * max(height, width))
    assert ink.sum() == pytest.approx(tall * wide * scale**2, rel=0.03)
    for axis, length in ((0, tall), (1, wide)):
        along = ink.sum(axis=1 - axis)
        assert (along * (np.arange(200) + 0.5)).sum() / along.sum() == pytest.approx(100, abs=0.6)
        assert np.count_nonzero(along > along.max() / 2) == pytest.approx(length * scale, abs=1.5)
    floats = fit_image((array / 255).astype(np.float32), 200, "ink")
    np.testing.assert_allclose(floats * 255, got, atol=1.01)


def test_without_ink_the_whole_image_stays() -> None:
    pale = np.full((6, 12), 200, dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(pale, 12, "ink"), fit_image(pale, 12, "pad"))


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1)])
@pytest.mark.parametrize("how", ["crop", "stretch", "pad", "ink"])
def test_extreme_shapes_fit(shape: tuple[int, int], how: str) -> None:
    assert fit_image(np.full(shape, 9, dtype=np.uint8), 16, how).shape == (16, 16, 1)


def test_fit_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 4, 3\) float64; for floats in \[0, 1\] pass array.astype"):
        fit_image(np.zeros((4, 4, 3)), 4)
    with pytest.raises(ValueError, match=r"non-empty .* got \(0, 4, 3\) uint8"):
        fit_image(np.zeros((0, 4, 3), dtype=np.uint8), 4)
    with pytest.raises(ValueError, match=r"size must be at least 1 pixel, got 0"):
        fit_image(noise(4, 4), 0)
    with pytest.raises(ValueError, match=r"how must be 'crop', 'stretch', 'pad' or 'ink', got 'zoom'"):
        fit_image(noise(4, 4), 4, "zoom")
    with pytest.raises(ValueError, match=r"An image of 5 channels cannot become one of 3: set channels=5"):
        convert_channels(noise(4, 4, 5), 3)


# ---- many


@pytest.fixture
def ten(tmp_path: Path) -> list[Path]:
    return [save(tmp_path / f"{i}.png", noise(9, 11, seed=i)) for i in range(10)]


def test_read_images_equals_reading_each(ten: list[Path]) -> None:
    got, kept, skipped = read_images(ten, 6, how="pad", threads=3)
    want = np.stack([fit_image(read_image(path), 6, "pad").transpose(2, 0, 1) for path in ten])
    np.testing.assert_array_equal(got, want)
    assert kept.tolist() == list(range(10))
    assert kept.dtype == np.int64
    assert skipped == []


def test_blocks_join_seamlessly(ten: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = read_images(ten, 4)
    monkeypatch.setattr(images_module, "_BLOCK", 3)
    np.testing.assert_array_equal(read_images(ten, 4)[0], whole)


def test_skip_leaves_bad_ones_out_and_lists_them(ten: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    want, _, _ = read_images(ten, 6)
    ten[0].write_bytes(b"")
    ten[4].write_text("no image")
    with caplog.at_level(logging.WARNING, "embedlab"):
        got, kept, skipped = read_images(ten, 6, on_error="skip", skip_limit=0.2)
    assert kept.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(got, want[kept])
    assert skipped == [(str(ten[0]), "the file is empty (0 bytes)"), (str(ten[4]), "it is text, not an image")]
    assert "Skipped 2 of 10 images" in caplog.text
    assert str(ten[4]) in caplog.text


def test_stop_names_the_first_bad_file(ten: list[Path]) -> None:
    ten[7].write_bytes(b"")
    ten[3].write_bytes(b"")
    with pytest.raises(ImageError, match=r"3\.png: the file is empty") as caught:
        read_images(ten, 6)
    assert caught.value.path == str(ten[3])


def test_too_many_skipped_is_an_error(ten: list[Path]) -> None:
    for path in ten[:7]:
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"(?s)^7 of 10 images cannot be read.*0\.01.*0\.png: the file is.*and 2 more$"
    ):
        read_images(ten, 6, on_error="skip")
    for path in ten:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"10 of 10 images cannot be read"):
        read_images(ten, 6, on_error="skip", skip_limit=0.99)
    images, kept, skipped = read_images(ten, 6, on_error="skip", skip_limit=1.0)
    assert (images.shape, kept.tolist(), len(skipped)) == ((0, 3, 6, 6), [], 10)


def test_one_of_few_may_always_be_skipped(ten: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    ten[4].write_bytes(b"")
    with caplog.at_level(logging.WARNING, "embedlab"):
        assert read_images(ten, 6, on_error="skip")[1].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert "Skipped 1 of 10 images" in caplog.text
    with pytest.raises(ValueError, match=r"^1 of 10 images cannot be read, more than the share of 0 that may be"):
        read_images(ten, 6, on_error="skip", skip_limit=0)
    with pytest.raises(ValueError, match=r"^1 of 1 images cannot be read, more than the share of 0\.01 that may be"):
        read_images(ten[4:5], 6, on_error="skip")
    ten[5].write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^2 of 10 .* \(or the one\) that .* Repair them, or take them out of the data"
    ):
        read_images(ten, 6, on_error="skip")
    with pytest.raises(ImageError, match=r"\(--on-error skip, in fit --data\.init_args\.on_error skip, in Python"):
        read_images(ten, 6)


def test_reading_nothing_gives_nothing() -> None:
    images, kept, skipped = read_images([], 6)
    assert (images.shape, kept.shape, skipped) == ((0, 3, 6, 6), (0,), [])


def test_read_images_checks_its_arguments(ten: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"on_error must be 'stop' or 'skip', got 'ignore'"):
        read_images(ten, 6, on_error="ignore")
    with pytest.raises(ValueError, match=r"skip_limit is a share in \[0, 1\], got 5"):
        read_images(ten, 6, skip_limit=5)
    with pytest.raises(ValueError, match=r"threads must be at least 1, got 0"):
        read_images(ten, 6, threads=0)


def test_memory_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images_module.np, "empty", refuse)
    with pytest.raises(ValueError, match=r"2 images of 32768 x 32768 pixels need 6\.0 GiB .* choose a smaller size"):
        read_images(["a", "b"], 32768)


def test_no_bar_for_a_short_read(ten: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    read_images(ten, 6)
    assert capsys.readouterr() == ("", "")


def test_images_from_bytes_without_a_file() -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(3, 3)).save(buffer, "PNG")
    np.testing.assert_array_equal(images_module.image_pixels(Image.open(buffer)), noise(3, 3))
