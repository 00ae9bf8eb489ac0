"""Eight small pictures with the vectors that an embedder made of them: whether it still makes the same ones.

A fingerprint covers weights and settings, not the libraries below: another image decoder, another resizing, or other
weights behind the name of a plain function give other vectors in silence. So a gallery keeps files of several kinds and
sizes, has them embedded again on opening, and compares.
"""

from __future__ import annotations

import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embedlab._types import Vectors
from embedlab.data.images import read_image
from embedlab.retrieval.embedders import Embedder, as_array, image_paths
from embedlab.retrieval.inputs import normalised

SIZES = ((64, 64), (96, 64), (64, 96), (33, 47), (128, 128), (160, 120), (120, 160), (200, 200))  # height, width
TOLERANCE = 1e-3  # cosine distance: sums in another order move less than 1e-5, bfloat16 about 1e-4


def reference_images(shape: tuple[int, int] | None = None, *, channels: int = 3) -> list[bytes]:
    """Eight pictures of blots, stripes and noise, JPEG and PNG in turn.

    Args:
        shape: Height and width of all, for a function that takes arrays of one size; None for a mixture.
        channels: 3 for colour, 1 for grey.
    """
    files = []
    for number, size in enumerate(SIZES):
        height, width = shape or size
        random = np.random.default_rng(number)
        down = np.linspace(0, 1, height).reshape(-1, 1, 1)
        across = np.linspace(0, 1, width).reshape(1, -1, 1)
        picture = np.zeros((height, width, channels))
        for tilt, turn, phase in random.uniform(-20, 20, (6, 3, channels)):
            picture += np.sin(tilt * down + turn * across + phase)
        picture = 128 + 30 * picture + random.normal(0, 8, picture.shape)
        pixels = picture.clip(0, 255).astype(np.uint8)
        image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        file = BytesIO()
        image.save(file, "JPEG" if number % 2 else "PNG", quality=90)
        files.append(file.getvalue())
    return files


def image_shape(images: Any) -> tuple[int, int]:
    """Height and width of the first of what was handed in: paths, or an array (N, C, H, W)."""
    paths = image_paths(images)
    height, width = images.shape[2:] if paths is None else read_image(paths[0]).shape[:2]
    return int(height), int(width)


def embed_references(embedder: Embedder, images: list[bytes]) -> Vectors:
    """Vectors (R, D) of norm 1 of encoded pictures, through files as everything else.

    Raises:
        ValueError: The temporary folder takes no files.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="embedlab-") as folder:
            paths = []
            for number, image in enumerate(images):
                paths.append(str(Path(folder) / f"{number}{_suffix(image)}"))
                Path(paths[-1]).write_bytes(image)
            return normalised(as_array(embedder.embed(paths).vectors), None)
    except OSError as error:
        raise ValueError(
            f"The reference images could not be embedded: {error}. They are written to {tempfile.gettempdir()} for "
            "that; make room there, or set TMPDIR to another folder."
        ) from error


def require_unchanged(embedder: Embedder, references: list[tuple[bytes, Vectors]], gallery: Any) -> None:
    """Embed the references again and compare.

    Args:
        embedder: With the fingerprint that the gallery knows.
        references: Encoded pictures and their vectors (D,) of old.
        gallery: What the error calls it.

    Raises:
        ValueError: A vector has moved by more than `TOLERANCE`, or has another length.
    """
    if not references:
        return
    found = embed_references(embedder, [image for image, _ in references])
    wanted = np.stack([vector for _, vector in references])
    if found.shape == wanted.shape:
        distances = 1 - np.einsum("rd,rd->r", found, wanted, dtype=np.float64)  # (R,)
        far = int((distances > TOLERANCE).sum())
        if not far:
            return
        what = f"{far} of {len(found)} reference images lie up to {distances.max():.2g} from their vectors of old"
    else:
        what = f"it gives {found.shape[1]} numbers for a reference image, {wanted.shape[1]} before"
    raise ValueError(
        f"The embedder {embedder.fingerprint} no longer gives the vectors that the gallery {gallery} was made with: "
        f"{what} (cosine distance, at most {TOLERANCE:g}). The fingerprint is the same, so the image decoder (Pillow, "
        "libjpeg), the resizing, a numeric library or, behind a plain function, the weights have changed. Go back to "
        "the versions of then, or enroll the images anew with Gallery.create."
    )


def _suffix(image: bytes) -> str:
    return ".png" if image.startswith(b"\x89PNG") else ".jpg"
