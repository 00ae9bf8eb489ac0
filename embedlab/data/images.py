"""Image files to uint8 arrays: every common kind of picture converted correctly, every bad one named."""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from typing import Any, BinaryIO, Literal, NoReturn, get_args

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from tqdm import tqdm

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Rows = np.ndarray[tuple[int], np.dtype[np.int64]]
Fit = Literal["crop", "stretch", "pad", "ink"]
SKIP_LIMIT = 0.01  # the largest share of unreadable files that on_error="skip" leaves out, but one always
SKIPPED_SHOWN = 5  # of which the log or an error names the reasons
OnError = Literal["stop", "skip"]

# A file is taken for an image by its suffix and decoded by its content.
IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "avif", "gif", "bmp", "tif", "tiff"),
        *("jp2", "j2k", "pgm", "ppm", "pbm", "pnm"),
    )
)
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
_REPLACE = (
    "Replace the file, take it out of the data, or skip it (--on-error skip, in fit --data.init_args.on_error skip, in "
    "Python on_error='skip')."
)
_BLOCK = 1024  # images handed to the threads at a time, so that a million files do not become a million futures at once
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}

logger = logging.getLogger("embedlab")


class ImageError(ValueError):
    """A file that cannot become an image; the message names the file, the reason and the way out.

    Args:
        message: The whole text.
        path: The file.
        reason: Why, without the file's name.
    """

    # One positional argument, because a DataLoader worker rebuilds its exceptions from the text alone.
    def __init__(self, message: str, *, path: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason or message


def _refuse(name: str, reason: str, way_out: str = _REPLACE) -> NoReturn:
    raise ImageError(f"Cannot read image {name}: {reason}. {way_out}", path=name, reason=reason)


@contextmanager
def _only_image_errors(name: str) -> Iterator[None]:
    """Turn whatever a decoder throws at a damaged file (OSError, SyntaxError, struct.error, ...) into `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_many_pixels(name, str(error)) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().rstrip(".:")
        if "truncated" in reason.lower() or isinstance(error, EOFError):
            reason = f"the file is damaged or cut short ({reason})"
        raise ImageError(f"Cannot read image {name}: {reason}. {_REPLACE}", path=name, reason=reason) from error


def _too_many_pixels(name: str, reason: str) -> ImageError:
    way_out = "Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file."
    return ImageError(f"Cannot read image {name}: {reason.rstrip('.')}. {way_out}", path=name, reason=reason)


def read_image(path: str | os.PathLike[str], *, channels: int = 3) -> Pixels:
    """Read one image file the way a person sees it.

    EXIF orientation is applied; palette, CMYK and embedded ICC profiles go to sRGB; transparent pixels lie over white;
    16-bit grey is value / 257, rounded; of an animation or a multi-page file the first frame counts. 16-bit colour
    keeps its upper eight bits, which is what Pillow gives. A profile that does not fit its image is ignored.

    Args:
        path: A file; its content, not its suffix, decides how it is decoded.
        channels: 3 for RGB, 1 for grey (luma, ITU-R 601-2).

    Returns:
        (H, W, channels) uint8, writable and contiguous.

    Raises:
        ImageError: For anything that is not a whole image: missing, empty, truncated, a folder, another kind of file,
            floating-point pixels, or more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    _check_channels(channels)
    name = os.fspath(path)
    with _only_image_errors(name), _open_file(name) as file:
        try:
            image = Image.open(file, formats=_FORMATS)
        except UnidentifiedImageError:
            file.seek(0)
            _refuse(name, _what_is_it(file.read(512)))
        return image_pixels(image, channels=channels, name=name)


def image_pixels(image: Image.Image, *, channels: int = 3, name: str = "image") -> Pixels:
    """Convert an opened Pillow image by the rules of `read_image`.

    Args:
        image: Any mode; it is decoded here if it was not yet.
        channels: 3 for RGB, 1 for grey.
        name: What an error calls it.

    Returns:
        (H, W, channels) uint8.

    Raises:
        ImageError: If it cannot be decoded or its pixels have no agreed range.
    """
    _check_channels(channels)
    with _only_image_errors(name):
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:  # Pillow only warns up to twice the limit
            raise _too_many_pixels(name, f"its {image.width * image.height} pixels are more than {limit}")
        image.load()
        pixels = convert_channels(_eight_bit(image, name), channels)
        return np.ascontiguousarray(_TURNS.get(_orientation(image), _TURNS[1])(pixels))


def _open_file(name: str) -> BinaryIO:
    try:
        status = os.stat(name)
    except FileNotFoundError:
        if os.path.islink(name):
            _refuse(name, f"it is a link to {os.readlink(name)}, which does not exist")
        _refuse(name, "no such file")
    if stat.S_ISDIR(status.st_mode):
        _refuse(name, "it is a folder")
    if not stat.S_ISREG(status.st_mode):
        _refuse(name, "it is not a regular file")  # a pipe would wait for ever
    if status.st_size == 0:
        _refuse(name, "the file is empty (0 bytes)")
    try:
        return open(name, "rb")
    except PermissionError:
        _refuse(name, "no permission to read it", f"Allow it: chmod u+r {name}")


def _what_is_it(head: bytes) -> str:
    """Guess what stands in a file that no image decoder takes, from its first bytes."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the image itself (run 'git lfs pull')"
    if b"<svg" in start:
        return "it is an SVG drawing, which has no pixels (export it as PNG)"
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, probably the answer of a failed download"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return "it is a HEIC photo (convert it to JPEG or PNG)"
    if start and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return "it is text, not an image"
    return f"not one of {', '.join(_FORMATS)}, or its first bytes are damaged"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return 1


def _eight_bit(image: Image.Image, name: str) -> Pixels:
    """Decoded image of any mode to (H, W, 1 or 3) uint8: grey or sRGB, over white."""
    if image.mode == "F":
        _refuse(
            name, "its pixels are floating-point numbers, which have no agreed black and white", "Save it as 8 bit."
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _sixteen_bit(image, name)
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        alpha = np.asarray(layers)[..., 3:].astype(np.uint16)
        colour = _to_srgb(layers.convert("RGB"), profile).astype(np.uint16)
        return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    return _to_srgb(image, profile)


def _sixteen_bit(image: Image.Image, name: str) -> Pixels:
    values = np.asarray(image).astype(np.int64)  # (H, W), either byte order
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        _refuse(name, f"its grey values go from {low} to {high}, beyond 16 bits", "Save it as 8- or 16-bit grey.")
    clear = image.info.get("transparency")
    grey = ((values + 128) // 257).astype(np.uint8)
    if isinstance(clear, int):
        grey[values == clear] = 255
    return grey[..., None]


def _to_srgb(image: Image.Image, profile: bytes | None) -> Pixels:
    """L, RGB, CMYK or LAB to (H, W, 1 or 3), through the embedded profile where it is one for this mode."""
    transform = _profile_transform(profile, image.mode) if profile or image.mode == "LAB" else None
    if transform is not None:
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        image = converted
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


@lru_cache(maxsize=64)
def _profile_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build the transform to sRGB, or None where there is nothing to do or the profile is no use."""
    try:
        if mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        else:
            source = ImageCms.ImageCmsProfile(BytesIO(profile or b""))
            space = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}[mode]
            description = ImageCms.getProfileDescription(source).lower()
            if source.profile.xcolor_space != space or ("srgb" in description and "linear" not in description):
                return None
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # without high resolution, lcms interpolates the curve of grey profiles seven grey levels wrong near black
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB) for image files, got {channels}.")


def convert_channels(array: Pixels, channels: int) -> Pixels:
    """Turn (H, W, 1) into (H, W, 3) or back by luma; the same number of channels passes through.

    Raises:
        ValueError: Where there is no such conversion.
    """
    have = array.shape[2]
    if have == channels:
        return array
    if have == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    if have == 3 and channels == 1:
        return np.array(Image.fromarray(np.ascontiguousarray(array)).convert("L"))[..., None]
    raise ValueError(f"An image of {have} channels cannot become one of {channels}: set channels={have}.")


def fit_image(array: Pixels | Floats, size: int, how: Fit = "crop") -> np.ndarray[Any, Any]:
    """Bring an image to a square by one antialiased resampling (bilinear, support grows with the reduction).

    Args:
        array: (H, W, C) or (H, W) uint8, or float32 in [0, 1]; any number of channels.
        size: Side of the result in pixels.
        how: "crop" keeps the centre square of the image; "stretch" changes the proportions; "pad" keeps everything and
            fills with white, the colour that also lies under transparent pixels. "ink" is for dark drawings on white:
            the drawing in the middle of a square on white whose side is three quarters of the drawing's longer side
            and two fifths of the image's, so that small drawings are brought nearer to large ones, but not level.

    Returns:
        (size, size, C) uint8 or float32 as it came, a new array.

    Raises:
        ValueError: For another type or shape, an empty image, a size below 1 or an unknown `how`.
    """
    if array.dtype not in (np.uint8, np.float32) or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"fit_image needs a non-empty (H, W, C) or (H, W) array of uint8 or float32, got {array.shape} "
            f"{array.dtype}; for floats in [0, 1] pass array.astype('float32')."
        )
    _check_fit(size, how)
    if array.ndim == 2:
        array = array[..., None]
    height, width, count = array.shape
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    target = (size, size)
    if how == "crop":
        side = float(min(height, width))
        left, top = (width - side) / 2, (height - side) / 2
        right, bottom = left + side, top + side
    elif how == "pad":
        scale = size / max(height, width)
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    elif how == "ink":
        array, top, left, side = _around_ink(array)
        right, bottom = left + side, top + side

    whole = count == 3 and array.dtype == np.uint8  # what Pillow has a mode for
    layers = [array] if whole else [array[..., i] for i in range(count)]
    resized = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(layer)).resize(
                target, Image.Resampling.BILINEAR, box=(left, top, right, bottom), reducing_gap=3.0
            )
        )
        for layer in layers
    ]
    small = resized[0] if whole else np.stack(resized, axis=-1)
    result = np.full((size, size, count), 255 if array.dtype == np.uint8 else 1, dtype=array.dtype)
    row, column = (size - target[1]) // 2, (size - target[0]) // 2
    result[row : row + target[1], column : column + target[0]] = small
    return result


def _around_ink(array: Pixels | Floats) -> tuple[np.ndarray[Any, Any], float, float, float]:
    """The surroundings of a dark drawing on white, and in them the top, the left edge and the side of its square.

    Where there is no ink it is the square around the whole image.
    """
    white = 255 if array.dtype == np.uint8 else 1
    ink = array.min(axis=2) < white / 2
    height, width = ink.shape
    spans = []
    for along, length in ((ink.any(axis=1), height), (ink.any(axis=0), width)):
        found = np.flatnonzero(along)
        spans.append((int(found[0]), int(found[-1]) + 1) if len(found) else (0, length))
    (top, bottom), (left, right) = spans
    side = 0.75 * max(bottom - top, right - left) + 0.4 * max(height, width)
    if not ink.any():
        side = float(max(height, width))
    reach = math.ceil(side / 2) + 1  # whole pixels to either side of the middle that the square may touch
    y, x = (top + bottom) / 2, (left + right) / 2
    first_row, first_column = math.floor(y) - reach, math.floor(x) - reach
    around = np.full((2 * reach + 1, 2 * reach + 1, array.shape[2]), white, dtype=array.dtype)
    row, column = max(0, first_row), max(0, first_column)
    seen = array[row : first_row + 2 * reach + 1, column : first_column + 2 * reach + 1]
    row, column = row - first_row, column - first_column
    around[row : row + seen.shape[0], column : column + seen.shape[1]] = seen
    return around, y - first_row - side / 2, x - first_column - side / 2, side


def fit_batch(images: np.ndarray[Any, Any], size: int, *, channels: int, how: Fit = "crop") -> np.ndarray[Any, Any]:
    """Bring a batch of decoded images to a square, as `fit_image` does with one.

    Args:
        images: (N, C, H, W) uint8, or float in [0, 1].
        size: Side of the result in pixels.
        channels: C that is expected.
        how: "crop", "stretch", "pad" or "ink", see `fit_image`.

    Returns:
        (N, C, size, size) uint8 or float32; the array itself where it has that shape already.

    Raises:
        ValueError: Another shape, type or range of values.
    """
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"The embedder takes images (N, {channels}, H, W), got {images.shape}; channels come second. "
            "For files give their paths."
        )
    if images.dtype != np.uint8:
        if images.dtype.kind != "f":
            raise ValueError(f"Images must be uint8, or floats in [0, 1]; got {images.dtype}.")
        if images.size and not 0 <= images.min() <= images.max() <= 1:
            raise ValueError(
                f"Float images must lie in [0, 1], got [{images.min():.3g}, {images.max():.3g}]; divide by 255, or "
                "give uint8. Mean and standard deviation are applied inside."
            )
        images = images.astype(np.float32, copy=False)
    if images.shape[2:] == (size, size):
        return images
    fitted = np.empty((len(images), channels, size, size), images.dtype)
    for row, image in enumerate(images):
        fitted[row] = fit_image(image.transpose(1, 2, 0), size, how).transpose(2, 0, 1)
    return fitted


def _check_fit(size: int, how: str) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}; usual values are 32 to 224.")
    if how not in get_args(Fit):
        raise ValueError(f"how must be 'crop', 'stretch', 'pad' or 'ink', got {how!r}.")


def read_images(
    paths: Sequence[str | os.PathLike[str]],
    size: int,
    *,
    channels: int = 3,
    how: Fit = "crop",
    on_error: OnError = "stop",
    skip_limit: float | None = 0.01,
    threads: int | None = None,
) -> tuple[Pixels, Rows, list[tuple[str, str]]]:
    """Read many image files into one array, on several threads, with a bar when it lasts.

    Args:
        paths: N files.
        size: Side of the images in pixels, see `fit_image`.
        channels: 3 for RGB, 1 for grey.
        how: "crop", "stretch", "pad" or "ink", see `fit_image`.
        on_error: "stop" raises at the first bad file (first in the order of `paths`); "skip" leaves bad ones out.
        skip_limit: The largest share of N, in [0, 1], that may be left out; one file always may while others are
            left, unless this is 0; 1 allows all. None, too, and logs nothing: it is told by whoever has `skipped`.
        threads: Decoding threads; None for one per available core, eight at most.

    Returns:
        images: (M, channels, size, size) uint8.
        kept: (M,) int64, row i of `images` is `paths[kept[i]]`.
        skipped: (path, reason) of each one left out, in order.

    Raises:
        ImageError: A bad file under "stop".
        ValueError: More than `skip_limit` left out, or a wrong argument.
    """
    _check_channels(channels)
    names = [os.fspath(path) for path in paths]
    return read_rows(
        lambda row: read_image(names[row], channels=channels),
        names,
        size,
        channels=channels,
        how=how,
        on_error=on_error,
        skip_limit=skip_limit,
        threads=threads,
    )


def read_rows(
    load: Callable[[int], Pixels],
    names: Sequence[str],
    size: int,
    *,
    channels: int,
    how: Fit,
    on_error: OnError,
    skip_limit: float | None,
    threads: int | None,
) -> tuple[Pixels, Rows, list[tuple[str, str]]]:
    """Do the work of `read_images` for images from anywhere: `load(row)` gives (H, W, channels)."""
    _check_fit(size, how)
    _check_reading(on_error, skip_limit, threads)
    images = _allocate((len(names), channels, size, size))

    def fill(row: int) -> str | None:
        try:
            images[row] = fit_image(load(row), size, how).transpose(2, 0, 1)
        except ImageError as error:
            if on_error == "stop":
                raise
            return error.reason
        return None

    reasons = _on_threads(fill, len(names), threads or min(8, available_cores()))
    skipped = [(name, reason) for name, reason in zip(names, reasons, strict=True) if reason is not None]
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    if skip_limit is not None:
        report_skipped(skipped, len(names), skip_limit)
    if skipped:
        for new, old in enumerate(kept):  # close the gaps in place: a second array may not fit
            images[new] = images[old]
    return images[: len(kept)], np.array(kept, dtype=np.int64), skipped


def _check_reading(on_error: str, skip_limit: float | None, threads: int | None) -> None:
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}.")
    if skip_limit is not None and not 0 <= skip_limit <= 1:
        raise ValueError(f"skip_limit is a share in [0, 1], got {skip_limit}; 0.01 allows one image in a hundred.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}.")


def _on_threads(work: Callable[[int], str | None], count: int, threads: int) -> list[str | None]:
    """Results of `work` for every number below `count`, in order; the first error in that order stops it."""
    results: list[str | None] = []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="embedlab-read")
    try:
        with tqdm(total=count, desc="reading images", unit="image", delay=1) as bar:
            for start in range(0, count, _BLOCK):
                for result in pool.map(work, range(start, min(start + _BLOCK, count))):
                    results.append(result)
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _allocate(shape: tuple[int, ...]) -> Pixels:
    try:
        return np.empty(shape, dtype=np.uint8)
    except MemoryError as error:
        gibibytes = np.prod(np.array(shape, dtype=float)) / 2**30
        raise ValueError(
            f"{shape[0]} images of {shape[2]} x {shape[3]} pixels need {gibibytes:.1f} GiB of memory, more than there "
            "is: choose a smaller size or read them in parts."
        ) from error


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report_skipped(skipped: list[tuple[str, str]], total: int, skip_limit: float) -> None:
    """Log what was left out of `total` images, or raise ValueError when it is more than may be.

    That is the share `skip_limit`, but one of a small set always, while others are left.
    """
    if not skipped:
        return
    shown = SKIPPED_SHOWN
    first = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:shown])
    more = f"\n  and {len(skipped) - shown} more" if len(skipped) > shown else ""
    least = 1 if skip_limit > 0 and total > 1 else 0
    if len(skipped) > max(least, skip_limit * total):
        raise ValueError(
            f"{len(skipped)} of {total} images cannot be read, more than the share of {skip_limit:.4g} "
            f"{'(or the one) ' if least else ''}that may be skipped: is this the right folder, was it copied whole? "
            f"Repair them, or take them out of the data.{first}{more}"
        )
    logger.warning("Skipped %d of %d images that cannot be read:%s%s", len(skipped), total, first, more)
