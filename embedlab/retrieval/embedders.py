"""What a gallery needs of an embedder, and the wrapper for a plain function; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from embedlab._types import Embeddings, Vectors


@runtime_checkable
class Embedder(Protocol):
    """Turns images into vectors, the same ones tomorrow; `embedlab.encoders.Encoder` is one."""

    @property
    def fingerprint(self) -> str:
        """What the vectors depend on; two embedders of one fingerprint give the same vectors."""
        ...

    @property
    def dim(self) -> int | None:
        """Numbers per vector, None where it is not known before the first image."""
        ...

    def embed(self, images: Any) -> Embeddings:
        """Embed image paths, or an array (N, C, H, W)."""
        ...


class CallableEmbedder:
    """A plain function as an embedder.

    Args:
        function: Images (B, C, H, W) to vectors (B, D), as NumPy array or torch tensor. It gets arrays as they were
            handed in, and uint8 arrays where paths were.
        image_size: Side in pixels to which image files are resized and cropped; None takes them as they are.
        channels: 1 (grey) or 3 (RGB) for image files.
        fingerprint: Name of what the vectors depend on, such as "resnet50-2024-03". Without it the function's own
            name stands in, which does not notice other weights under the same name.
        batch_size: Images per call.

    Example:
        >>> embedder = CallableEmbedder(lambda images: images.reshape(len(images), -1), fingerprint="raw pixels")
        >>> embedder.embed(np.ones((5, 3, 2, 2), np.uint8)).vectors.shape
        (5, 12)
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        image_size: int | None = None,
        channels: int = 3,
        fingerprint: str | None = None,
        batch_size: int = 64,
    ) -> None:
        self.function = function
        self.image_size = image_size
        self.channels = channels
        self.batch_size = batch_size
        name = getattr(function, "__qualname__", type(function).__qualname__)
        self.fingerprint = f"callable:{name}" if fingerprint is None else fingerprint
        self.dim: int | None = None

    def embed(self, images: Any, **options: Any) -> Embeddings:
        """Embed images.

        Args:
            images: Paths, or an array or tensor (N, C, H, W).
            options: None: what an `Encoder` takes here belongs into the function.

        Returns:
            N vectors, not normalised, with ids 0 to N - 1 and the paths, if any.

        Raises:
            ValueError: Image files of several sizes without `image_size`, or a function that does not return (B, D).
        """
        if options:
            raise ValueError(f"CallableEmbedder.embed takes no options, got {sorted(options)}; they are an Encoder's.")
        paths = image_paths(images)
        count = len(images) if paths is None else len(paths)
        parts = []
        for start in tqdm(
            range(0, count, self.batch_size), desc="embed", unit="batch", disable=count <= self.batch_size
        ):
            stop = min(start + self.batch_size, count)
            batch = images[start:stop] if paths is None else self._read(paths[start:stop])
            parts.append(self._checked(self.function(batch), stop - start))
            self.dim = parts[0].shape[1]
        if len({part.shape[1] for part in parts}) > 1:
            raise ValueError(f"The embedding function changed its dimension: {sorted({p.shape[1] for p in parts})}.")
        vectors = np.concatenate(parts) if parts else np.zeros((0, self.dim or 0), np.float32)
        return Embeddings(vectors, None, np.arange(count, dtype=np.int64), paths)

    def _read(self, paths: list[str]) -> np.ndarray[Any, Any]:
        from embedlab.data.images import fit_image, read_image

        images = [read_image(path, channels=self.channels) for path in paths]  # (H, W, C) uint8 each
        if self.image_size is not None:
            images = [fit_image(image, self.image_size) for image in images]
        if len(sizes := {image.shape[:2] for image in images}) > 1:
            some = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:3])
            raise ValueError(
                f"The image files have {len(sizes)} different sizes ({some} pixels, ...), which do not stack into one "
                "array; give CallableEmbedder an image_size."
            )
        return np.stack(images).transpose(0, 3, 1, 2)

    def _checked(self, result: Any, count: int) -> Vectors:
        array = as_array(result)
        if array.ndim != 2 or len(array) != count or array.dtype.kind not in "fiu":
            raise ValueError(
                f"The embedding function must return ({count}, D) numbers for {count} images, got {array.shape} of "
                f"{array.dtype}; a feature map needs pooling first."
            )
        return array.astype(np.float32)


def as_embedder(embedder: Any) -> Embedder:
    """Take what users have: an embedder, the folder of a saved `Encoder`, or a plain function.

    Raises:
        ValueError: None of these.
    """
    if isinstance(embedder, str | Path):
        if not (Path(embedder) / "encoder.json").is_file():
            raise ValueError(f"{embedder} is no saved encoder: it holds no encoder.json. Encoder.save makes one.")
        from embedlab.encoders import Encoder

        loaded: Embedder = Encoder.load(embedder)
        return loaded
    if isinstance(embedder, Embedder):
        return embedder
    if callable(embedder):
        return CallableEmbedder(embedder)
    raise ValueError(
        f"An embedder is an Encoder, the folder of a saved one, or a function images -> (B, D); "
        f"got {type(embedder).__name__}."
    )


def image_paths(images: Any) -> list[str] | None:
    """Paths as strings, or None if `images` is an array (or tensor) and so holds pixels."""
    if isinstance(images, str | Path):
        return [str(images)]
    if isinstance(images, Sequence) and all(isinstance(image, str | Path) for image in images):
        return [str(image) for image in images]
    if getattr(images, "ndim", None) == 4:
        return None
    shape = getattr(images, "shape", None)
    raise ValueError(
        f"images must be paths or one array (N, C, H, W), got {type(images).__name__}"
        + (f" of shape {tuple(shape)}." if shape is not None else "; stack single images with numpy.stack first.")
    )


def as_array(values: Any) -> np.ndarray[Any, Any]:
    """A NumPy array from an array, a nested list or a torch tensor on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)
