"""What a gallery keeps of the pictures behind its templates: their paths and, where asked for, thumbnails."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from embedlab.data.images import read_image
from embedlab.retrieval.embedders import as_array

THUMBNAIL_SIDE = 128  # pixels of the longer side, at most


def thumbnail(pixels: np.ndarray[Any, Any], *, side: int = THUMBNAIL_SIDE) -> bytes:
    """JPEG of at most side x side pixels from an image (H, W, 1 or 3) uint8."""
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def thumbnails_of(images: Any, paths: Sequence[str] | None) -> list[bytes | None]:
    """One JPEG per image; None where there is no picture to be had.

    Args:
        images: Array or tensor (N, C, H, W), uint8 or float in [0, 1]; not looked at when there are paths.
        paths: N image files; a name that is no file, of a picture that is elsewhere, gives None.
    """
    if paths is not None:
        return [thumbnail(read_image(path)) if os.path.isfile(path) else None for path in paths]
    array = as_array(images)
    if array.shape[1] not in (1, 3):
        return [None] * len(array)
    if array.dtype != np.uint8:
        array = (255 * np.clip(np.nan_to_num(array.astype(np.float32)), 0, 1)).round().astype(np.uint8)
    return [thumbnail(image) for image in array.transpose(0, 2, 3, 1)]


def with_paths(notes: list[str | None], paths: Sequence[str] | None) -> list[str | None]:
    """Metadata with the path of each picture under "path", unless something stands there already.

    Args:
        notes: N JSON texts or None.
        paths: N paths or names; those of files are made absolute.
    """
    if paths is None:
        return notes
    full: list[str | None] = []
    for note, path in zip(notes, paths, strict=True):
        where = os.path.abspath(path) if os.path.isfile(path) else path
        full.append(json.dumps({"path": where} | json.loads(note or "{}"), sort_keys=True))
    return full
