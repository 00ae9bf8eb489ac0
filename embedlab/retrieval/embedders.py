"""What a gallery needs of an embedder, and two that need no torch: an ONNX file and a plain function."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from embedlab._durable import new_folder
from embedlab._json import plain
from embedlab._types import Embeddings, Vectors
from embedlab.data.embedding import embed_images, identity_hash
from embedlab.data.images import SKIP_LIMIT, Fit, OnError, available_cores, fit_batch
from embedlab.data.sources import nothing_at

ONNX_KEY = "embedlab"  # of the metadata in a file that we exported
ONNX_VERSION = 1
_ONNX_DIGEST = re.compile(rb'"embedlab_digest": "([0-9a-f]{32})"')
_COPY_AGAIN = "Copy it again from the original, or repeat 'embedlab export'."
_ONNX_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


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
            parts.append(_checked_vectors(self.function(batch), stop - start, "The embedding function"))
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


class OnnxEmbedder:
    """A network in an ONNX file as an embedder; needs onnxruntime (extra `onnx`) and no torch.

    A file that `embedlab export` wrote brings its preprocessing and the fingerprint of its encoder, whose galleries it
    opens: the vectors of both were compared when it was exported, and a digest over every byte is checked here. The
    fingerprint of any other file is made of its bytes and the arguments.

    Everything runs on the processor in float32, so that vectors do not depend on the machine.

    Args:
        path: The file, weights included.
        image_size: Side of the network's input in pixels; needed where the file leaves it open.
        fit: How an image of another shape becomes square: "crop" (default), "stretch", "pad" or "ink".
        mean: Per channel, of images in [0, 1], for a network that takes normalised floats; None is 0.
        std: As mean; None is 1.

    Raises:
        ImportError: No onnxruntime.
        ValueError: A damaged file, one that is no network from a batch of square images to vectors, or arguments for a
            file that knows its own preprocessing.

    Shape: images (B, C, image_size, image_size), uint8, or for a network with a float input also float in [0, 1], to
        (B, D) float32.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: int | None = None,
        fit: Fit | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.path = Path(path)
        content = _file_content(self.path)
        self._digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        sealed_by_us = _check_seal(content, self.path)  # before anything reads on in a damaged file
        session = _onnx_session(content, self.path)
        self._session = session
        self._export = _export_note(session, self.path, sealed_by_us=sealed_by_us)
        self._arguments = {"image_size": image_size, "fit": fit, "mean": mean, "std": std}
        if self._export and any(value is not None for value in self._arguments.values()):
            raise ValueError(f"{path} was exported with its preprocessing; leave out image_size, fit, mean and std.")
        self._type, self._batch, self.channels, self.image_size = _onnx_input(session, self.path, image_size)
        self.fit: Fit = self._export["preprocessing"]["fit"] if self._export else fit or "crop"
        self._mean, self._std = self._per_channel(mean, "mean", 0), self._per_channel(std, "std", 1)
        shape = session.get_outputs()[0].shape
        self.dim: int | None = shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None

    @property
    def fingerprint(self) -> str:
        """That of the encoder that was exported, or BLAKE2b of file and arguments."""
        if self._export:
            return str(self._export["fingerprint"])
        preprocessing = [self.image_size, self.fit, self._mean.tolist(), self._std.tolist()]
        return hashlib.blake2b(json.dumps([self._digest, preprocessing]).encode(), digest_size=16).hexdigest()

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What happens to an image before the network sees it."""
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "fit": self.fit,
            "mean": self._export["preprocessing"]["mean"] if self._export else self._mean.ravel().tolist(),
            "std": self._export["preprocessing"]["std"] if self._export else self._std.ravel().tolist(),
        }

    @property
    def identities(self) -> frozenset[str]:
        """Hashes of the labels that an exported encoder was trained on."""
        return frozenset(self._export["identities"] if self._export else ())

    def trained_on(self, label: str) -> bool:
        """Whether the weights were trained with images under this label; such a one is no stranger to them."""
        return identity_hash(label) in self.identities

    def preprocess(self, images: Any) -> np.ndarray[Any, Any]:
        """Bring a batch of images to the network's size.

        Args:
            images: (N, C, H, W) uint8, or float in [0, 1] for a network with a float input.

        Returns:
            (N, C, image_size, image_size) uint8 or float32 as it came.

        Raises:
            ValueError: Another shape or type, or floats for a network that takes uint8.
        """
        array = as_array(images)
        if self._type is np.uint8 and array.dtype != np.uint8:
            raise ValueError(
                f"{self.path} takes uint8 images, got {array.dtype}; for floats in [0, 1] pass "
                "(255 * images).round().astype('uint8')."
            )
        return fit_batch(array, self.image_size, channels=self.channels, how=self.fit)

    def __call__(self, images: Any) -> Vectors:
        """Images (B, C, H, W), brought to size where they are not, to vectors (B, D)."""
        images = self.preprocess(images)
        if not len(images):
            return np.zeros((0, self.dim or 0), np.float32)
        if self._type is not np.uint8:
            images = images / np.float32(255) if images.dtype == np.uint8 else images
            images = ((images - self._mean) / self._std).astype(self._type)
        step = self._batch or len(images)
        return np.concatenate([self._run(images[start : start + step]) for start in range(0, len(images), step)])

    def _run(self, images: np.ndarray[Any, Any]) -> Vectors:
        count, missing = len(images), (self._batch or len(images)) - len(images)
        if missing:  # of a network whose batch is fixed
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
        (given,), wanted = self._session.get_inputs(), self._session.get_outputs()[0]
        (found,) = self._session.run([wanted.name], {given.name: np.ascontiguousarray(images)})
        vectors = _checked_vectors(found, len(images), f"The network in {self.path}")
        self.dim = vectors.shape[1]
        return vectors[:count]

    def embed(
        self,
        images: Any,
        *,
        batch_size: int = 64,
        precision: str = "float32",
        on_error: OnError = "stop",
        progress: bool | Any = True,
        skip_limit: float | None = SKIP_LIMIT,
    ) -> Embeddings:
        """Embed files, a data source or arrays.

        Args:
            images: Paths, a `Source`, or (N, C, H, W).
            batch_size: Images per call of the network.
            precision: "float32"; nothing else is in the file.
            on_error: "stop" raises at the first unreadable file, "skip" leaves it out and logs it.
            progress: Show a bar on stderr when it takes longer than a second; or a bar of tqdm to move on.
            skip_limit: Largest share that may be left out, see `read_images`.

        Returns:
            Embeddings whose ids are row numbers of the input; labels and paths as far as the input has them.

        Raises:
            ValueError: Another precision than float32, a file that cannot be read under "stop", more of them than
                `skip_limit` under "skip", arrays that `preprocess` refuses.
        """
        if precision != "float32":
            raise ValueError(
                f"{self.path} runs in float32 only, got precision {precision!r}; leave it out, or name the folder of "
                "the encoder that was exported."
            )
        return embed_images(
            images,
            self,
            preprocess=self.preprocess,
            size=self.image_size,
            channels=self.channels,
            fit=self.fit,
            dim=self.dim,
            batch_size=batch_size,
            on_error=on_error,
            progress=progress,
            skip_limit=skip_limit,
        )

    def save(self, folder: str | Path) -> None:
        """Copy the file, and the arguments that came with it, into a new folder for `load`.

        Raises:
            ValueError: The file has changed since it was opened.
        """
        content = _file_content(self.path)
        if hashlib.blake2b(content, digest_size=16).hexdigest() != self._digest:
            raise ValueError(f"{self.path} has changed since it was opened; open it again.")
        with new_folder(Path(folder)) as building:
            (building / "model.onnx").write_bytes(content)
            if any(value is not None for value in self._arguments.values()):
                text = json.dumps(plain(self._arguments), indent=1) + "\n"
                (building / "model.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> OnnxEmbedder:
        """Open what `save` left.

        Raises:
            ValueError: Missing or damaged files.
        """
        notes = Path(folder) / "model.json"
        try:
            found = dict(json.loads(notes.read_bytes())) if notes.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{notes} is damaged ({error}); restore it from a backup.") from error
        return cls(
            Path(folder) / "model.onnx", **{name: found.get(name) for name in ("image_size", "fit", "mean", "std")}
        )

    def _per_channel(self, values: Sequence[float] | None, name: str, otherwise: int) -> np.ndarray[Any, Any]:
        if values is not None and self._type is np.uint8:
            raise ValueError(f"{self.path} takes uint8 images, which it normalises itself; leave out {name}.")
        array = np.asarray([otherwise] * self.channels if values is None else values, np.float32)
        if array.shape != (self.channels,) or not np.isfinite(array).all() or (name == "std" and array.min() <= 0):
            raise ValueError(f"{name} needs {self.channels} finite numbers, std above 0; got {values}.")
        return array.reshape(-1, 1, 1)  # (C, 1, 1)


def export_note(**facts: Any) -> str:
    """Text for the metadata under `ONNX_KEY`; `sealed` fills in its digest."""
    return json.dumps({"version": ONNX_VERSION, "embedlab_digest": "0" * 32, **facts})


def sealed(content: bytes) -> bytes:
    """An exported file with the digest over every other byte in its place."""
    place = _ONNX_DIGEST.search(content)
    assert place is not None, "metadata by export_note comes first"
    return content[: place.start(1)] + _digest_without(content, place).encode() + content[place.end(1) :]


def _digest_without(content: bytes, place: re.Match[bytes]) -> str:
    """BLAKE2b over a file, with the digest's own place taken for zeros."""
    digest, view = hashlib.blake2b(digest_size=16), memoryview(content)
    for part in (view[: place.start(1)], b"0" * 32, view[place.end(1) :]):
        digest.update(part)
    return digest.hexdigest()


def _check_seal(content: bytes, path: Path) -> bool:
    """Whether a file holds our digest; it must fit."""
    place = _ONNX_DIGEST.search(content)
    if place is not None and place[1].decode() != _digest_without(content, place):
        raise ValueError(f"{path} is damaged or was edited: its bytes do not match the digest in it. {_COPY_AGAIN}")
    return place is not None


def _export_note(session: Any, path: Path, *, sealed_by_us: bool) -> dict[str, Any] | None:
    """What `export_note` wrote; None in a file from elsewhere."""
    text = session.get_modelmeta().custom_metadata_map.get(ONNX_KEY)
    if text is None and not sealed_by_us:
        return None
    if text is None or not sealed_by_us:
        raise ValueError(f"{path} is damaged or was edited: it has lost its digest. {_COPY_AGAIN}")
    note: dict[str, Any] = json.loads(text)
    if note["version"] != ONNX_VERSION:
        raise ValueError(
            f"{path} was exported in version {note['version']}, this embedlab reads {ONNX_VERSION}; update embedlab."
        )
    return note


def _file_content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); expected an ONNX file, such as 'embedlab export' writes."
        ) from error


def _onnx_session(content: bytes, path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path}: running an ONNX file needs onnxruntime: pip install 'embedlab[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised as well
    options.intra_op_num_threads = available_cores()  # its own count is that of the machine, not of the container
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        raise ValueError(
            f"{path} is no ONNX file that onnxruntime {onnxruntime.__version__} can run: {error}. Is it whole, and are "
            "its weights inside rather than in a second file?"
        ) from error


def _onnx_input(session: Any, path: Path, image_size: int | None) -> tuple[type, int | None, int, int]:
    """Type, batch where it is fixed, channels and image size that a network takes."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _ONNX_TYPES or len(inputs[0].shape) != 4:
        raise ValueError(
            f"{path} must take one batch of images (B, C, H, W), uint8 or float; it takes "
            + ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs)
        )
    batch, channels, *sides = (length if isinstance(length, int) else None for length in inputs[0].shape)
    sizes = {side for side in (*sides, image_size) if side is not None}
    if len(sizes) != 1 or min(sizes) < 1:
        raise ValueError(
            f"{path} takes images {inputs[0].shape} and image_size is {image_size}: together they must name one side "
            "of a square in pixels, channels second. Pass image_size= where the file leaves it open."
        )
    return _ONNX_TYPES[inputs[0].type], batch, channels or 3, sizes.pop()


def _checked_vectors(result: Any, count: int, source: str) -> Vectors:
    array = as_array(result)
    if array.ndim != 2 or len(array) != count or array.dtype.kind not in "fiu":
        raise ValueError(
            f"{source} must return ({count}, D) numbers for {count} images, got {array.shape} of {array.dtype}; a "
            "feature map needs pooling first."
        )
    return array.astype(np.float32)


def holds_embedder(folder: Path) -> bool:
    """Whether `as_embedder` finds something to load in this folder."""
    return (folder / "model.onnx").is_file() or (folder / "encoder.json").is_file()


def as_embedder(embedder: Any) -> Embedder:
    """Take what users have: an embedder, the folder of a saved one, an ONNX file, or a plain function.

    A folder that holds both an encoder and its export, `model.onnx`, gives the export, which needs no torch.

    Raises:
        ValueError: None of these.
    """
    if isinstance(embedder, str | Path):
        path = Path(embedder)
        if not path.exists():
            raise ValueError(f"{nothing_at(path)} An encoder is the folder of a saved one, or an ONNX file.")
        if path.suffix.lower() == ".onnx":
            return OnnxEmbedder(path)
        if not holds_embedder(path):
            raise ValueError(
                f"{embedder} holds no saved encoder: no encoder.json and no model.onnx, and is no .onnx file. "
                "Encoder.save and 'embedlab export' make them."
            )
        if (path / "model.onnx").is_file():
            return OnnxEmbedder.load(path)
        from embedlab.encoders import Encoder

        loaded: Embedder = Encoder.load(embedder)
        return loaded
    if isinstance(embedder, Embedder):
        return embedder
    if callable(embedder):
        return CallableEmbedder(embedder)
    raise ValueError(
        f"An embedder is an Encoder, the folder of a saved one, an ONNX file, or a function images -> (B, D); "
        f"got {type(embedder).__name__}."
    )


def on_device(embedder: Any) -> Any:
    """An encoder on the GPU where there is one; others stay where they are, and torch is not loaded for them."""
    if not hasattr(embedder, "to"):
        return embedder
    import torch

    return embedder.to("cuda") if torch.cuda.is_available() else embedder


def image_paths(images: Any) -> list[str] | None:
    """Paths as strings, or None if `images` is an array (or tensor) and so holds pixels.

    Raises:
        ValueError: Neither paths nor one array (N, C, H, W).
    """
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
    """A NumPy array from an array, a nested list or a torch tensor on any device, or a list of them."""
    if isinstance(values, list | tuple) and values and hasattr(values[0], "detach"):
        values = [as_array(value) for value in values]  # NumPy takes neither bfloat16 nor gradients
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)
