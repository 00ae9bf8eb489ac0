"""The Encoder: preprocessing, backbone and head as one thing that can be saved, checked and applied to files."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from embedlab._durable import new_folder
from embedlab._ops import normalize
from embedlab._types import Embeddings
from embedlab.data.embedding import embed_images, identity_hash
from embedlab.data.images import SKIP_LIMIT, Fit, OnError, fit_batch
from embedlab.data.sources import Source, nothing_at
from embedlab.data.views import FixedViews, color_statistics
from embedlab.encoders.backbones import Pixels, ResNet, TimmBackbone
from embedlab.encoders.heads import LinearHead, MLPHead, connect
from embedlab.encoders.whitening import Whitening

log = logging.getLogger("embedlab")

FORMAT = "embedlab-encoder"
FORMAT_VERSION = 3  # 3 has a whitening, 2 test-time views; the lowest that will do is written, for older readers
_ARCHITECTURES: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (ResNet, TimmBackbone, Pixels, MLPHead, LinearHead)
}
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{32})"')


class EncoderError(ValueError):
    """A saved encoder is missing, damaged, or needs something that was not given."""


class Encoder(nn.Module):
    """Images to unit vectors.

    Args:
        backbone: Normalised images (B, C, H, W) to features (B, F).
        head: Features to embeddings (B, D); None uses the features themselves.
        image_size: Side in pixels that `preprocess` brings images to.
        channels: 3 for colour, 1 for grey; None takes the backbone's `in_channels`, else 3.
        mean: Per channel, of images in [0, 1]; None is ImageNet's.
        std: As mean.
        fit: How an image of another shape becomes square: "crop", "stretch", "pad" or "ink", see `fit_image`.
        test_views: Views of each image whose unit vectors are averaged, or their settings; None takes the image alone.
        identities: Hashes (`identity_hash`) of the labels that the weights were trained on; they are saved along but
            are no part of the fingerprint.
        whitening: Applied to the embedding, which is then brought to unit length again; see `Whitening.fit`.

    Shape: images (B, C, H, W), uint8 or float in [0, 1], to (B, D) float32 of unit length.

    Raises:
        ValueError: Images of another shape or type, or a whitening of vectors of another size.

    Example:
        >>> encoder = Encoder(ResNet("resnet10", stem="small", width=0.25), image_size=32).eval()
        >>> encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 128])
    """

    mean: Tensor
    std: Tensor
    grids: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None = None,
        *,
        image_size: int = 224,
        channels: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        fit: Fit = "crop",
        test_views: FixedViews | Mapping[str, Any] | None = None,
        identities: Collection[str] = (),
        whitening: Whitening | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.dim = connect(backbone, head)
        if whitening is not None and whitening.config["features"] != self.dim:
            raise ValueError(
                f"The whitening was fitted to vectors of {whitening.config['features']} numbers, the encoder gives "
                f"{self.dim}; fit it to this encoder's own embeddings."
            )
        self.whitening = whitening
        self.image_size = image_size
        self.channels: int = channels or getattr(backbone, "in_channels", 3)  # type: ignore[assignment]
        self.fit: Fit = fit
        self.identities = frozenset(identities)
        self.statistics = color_statistics(self.channels, mean, std)
        for name, value in zip(("mean", "std"), self.statistics, strict=True):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), persistent=False)
        self.test_views = FixedViews.of(test_views)
        grids = None if self.test_views is None else self.test_views.grids(image_size)  # (T, S, S, 2)
        self.register_buffer("grids", grids, persistent=False)

    def trained_on(self, label: str) -> bool:
        """Whether the weights were trained with images under this label; such a one is no stranger to them."""
        return identity_hash(label) in self.identities

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What happens to an image before the backbone sees it; keyword arguments of another encoder or `ImageData`."""
        views = {} if self.test_views is None else {"test_views": asdict(self.test_views)}
        return views | {
            "image_size": self.image_size,
            "channels": self.channels,
            "fit": self.fit,
            "mean": list(self.statistics[0]),
            "std": list(self.statistics[1]),
        }

    @property
    def architecture(self) -> dict[str, Any]:
        """Class and constructor arguments of backbone and head."""
        return {"backbone": _describe(self.backbone), "head": None if self.head is None else _describe(self.head)}

    @property
    def fingerprint(self) -> str:
        """BLAKE2b of architecture, preprocessing and weights: two encoders with the same one give the same vectors."""
        digest = hashlib.blake2b(json.dumps([self.architecture, self.preprocessing]).encode(), digest_size=16)
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"Encoder takes images (B, {self.channels}, H, W), got {tuple(images.shape)}; channels come second, "
                "and grey images have 1 channel."
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(
                f"Encoder takes images as uint8 or as floats in [0, 1], got {images.dtype}; values in 0..255 are "
                "uint8: images.to(torch.uint8)."
            )
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if self.grids is not None and self.test_views is not None:
            images = _look(images, self.grids, self.test_views.pad)
        embeddings = self.backbone((images - self.mean) / self.std)
        if self.head is not None:
            embeddings = self.head(embeddings)
        if self.grids is not None:
            embeddings = normalize(embeddings).view(len(self.grids), -1, self.dim).mean(dim=0)
        embeddings = normalize(embeddings)
        return embeddings if self.whitening is None else normalize(self.whitening(embeddings))

    def untrained(self, images: Tensor | None = None, *, seed: int = 0) -> Encoder:
        """The same architecture and preprocessing with fresh random weights and no whitening: a baseline.

        Args:
            images: (N, C, image_size, image_size) that set the running statistics of batch normalisation; without them
                an untrained network is worse than it has to be.
            seed: Of the weights.
        """
        fresh = copy.deepcopy(self).train()
        fresh.whitening = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, part in (("backbone", self.backbone), ("head", self.head)):
                if part is not None:
                    setattr(fresh, name, _construct(_describe(part), None, name, "The encoder"))
        fresh.to(self.mean.device)
        fresh.identities = frozenset()
        if images is not None:
            norms = [module for module in fresh.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
            for module in norms:
                module.momentum = None  # a plain average over all batches
            with torch.no_grad():
                for batch in torch.split(images, 128):
                    fresh(batch.to(self.mean.device))
            for module in norms:
                module.momentum = 0.1
        return fresh.eval()

    def preprocess(self, images: np.ndarray | Tensor) -> Tensor:
        """Bring a batch of images to the encoder's size, as its image files are.

        Args:
            images: (N, C, H, W), uint8 or float in [0, 1].

        Returns:
            (N, C, image_size, image_size), uint8 or float32 as it came.
        """
        array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
        return torch.as_tensor(fit_batch(array, self.image_size, channels=self.channels, how=self.fit))

    def embed(
        self,
        images: Source | Sequence[str | Path] | np.ndarray | Tensor,
        *,
        batch_size: int = 128,
        precision: Literal["float32", "bfloat16"] = "float32",
        on_error: OnError = "stop",
        progress: bool | Any = True,
        skip_limit: float | None = SKIP_LIMIT,
    ) -> Embeddings:
        """Embed files, a data source or arrays, on the device that holds the weights.

        Args:
            images: Paths, a `Source`, or (N, C, H, W) uint8 or float in [0, 1].
            batch_size: Images per forward pass; with test-time views, views.
            precision: "bfloat16" is 2-3 times faster on recent processors and changes a cosine by about 0.001.
            on_error: "stop" raises at the first unreadable file, "skip" leaves it out and logs it.
            progress: Show a bar on stderr when it takes longer than a second; or a bar of tqdm to move on.
            skip_limit: Largest share that may be left out, see `read_images`.

        Returns:
            Embeddings whose ids are row numbers of the input; labels and paths as far as the input has them.

        Raises:
            ValueError: Another precision, arrays of another shape or type, or more unreadable files than `skip_limit`.
            ImageError: An unreadable file with on_error="stop".
        """
        return embed_images(
            images,
            lambda batch: self._embed_batch(batch, precision),
            preprocess=self.preprocess,
            size=self.image_size,
            channels=self.channels,
            fit=self.fit,
            dim=self.dim,
            batch_size=batch_size if self.test_views is None else max(1, batch_size // self.test_views.count),
            on_error=on_error,
            progress=progress,
            skip_limit=skip_limit,
        )

    @torch.no_grad()
    def _embed_batch(self, batch: np.ndarray | Tensor, precision: str) -> np.ndarray:
        images = torch.as_tensor(batch).to(self.mean.device)
        training = [(module, module.training) for module in self.modules()]  # frozen parts stay so
        self.eval()
        try:
            with autocast(images.device.type, precision):
                vectors: np.ndarray = self(images).float().cpu().numpy()
        finally:
            for module, mode in training:
                module.training = mode
        return vectors

    def save(self, folder: str | Path) -> None:
        """Write encoder.json and encoder.safetensors, with a digest over every byte of both.

        An encoder that stands at `folder` already is replaced in one step, and stays where writing fails.
        """
        folder = Path(folder)
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        weights = save_tensors(state)
        description = {
            "format": FORMAT,
            "version": FORMAT_VERSION if self.whitening is not None else 2 if self.test_views is not None else 1,
            "digest": "0" * 32,
            "fingerprint": self.fingerprint,
            "dim": self.dim,
            "architecture": self.architecture,
            "preprocessing": self.preprocessing,
            "identities": sorted(self.identities),
        }
        if self.whitening is not None:
            description["whitening"] = self.whitening.config
        text = (json.dumps(description, indent=1) + "\n").encode()
        text = text.replace(b'"digest": "' + b"0" * 32, b'"digest": "' + _digest(text, weights).encode())
        with new_folder(folder, replace=True) as fresh:
            (fresh / "encoder.safetensors").write_bytes(weights)
            (fresh / "encoder.json").write_bytes(text)
            fresh.chmod(0o755)

    @classmethod
    def load(cls, folder: str | Path, backbone: nn.Module | None = None, *, head: nn.Module | None = None) -> Encoder:
        """Read a saved encoder; every byte is checked before it is used, and no code from the files is run.

        Args:
            folder: What `save` was given.
            backbone: An instance of your own class, where the encoder was saved with one.
            head: As backbone.

        Raises:
            EncoderError: Missing or damaged files, another format version, or an own class without its instance.
        """
        description, weights = _read_checked(Path(folder))
        architecture, preprocessing = description["architecture"], description["preprocessing"]
        encoder = cls(
            _construct(architecture["backbone"], backbone, "backbone", folder),
            None if architecture["head"] is None else _construct(architecture["head"], head, "head", folder),
            **preprocessing,
            identities=description.get("identities", ()),
            whitening=Whitening(**description["whitening"]) if "whitening" in description else None,
        )
        try:
            encoder.load_state_dict(load_tensors(weights))
        except RuntimeError as error:
            raise EncoderError(f"{folder}: the weights do not fit the given backbone or head: {error}") from error
        return encoder.eval()


def autocast(kind: str, precision: str) -> torch.autocast:
    """The context in which an encoder computes with a precision on a kind of device."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"An encoder runs in precision float32 or bfloat16, got {precision!r}.")
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16")


def _look(images: Tensor, grids: Tensor, pad: str) -> Tensor:
    """Views (T B, C, S, S) of images (B, C, H, W), which share the grids (T, S, S, 2) as the channels of one would."""
    count, channels, height, width = images.shape
    layers = images.reshape(1, count * channels, height, width).expand(len(grids), -1, -1, -1)
    views = F.grid_sample(layers, grids, padding_mode=pad, align_corners=False)
    return views.reshape(len(grids) * count, channels, *grids.shape[1:3])


def _describe(module: nn.Module) -> dict[str, Any]:
    kind = type(module)
    if _ARCHITECTURES.get(kind.__name__) is kind:
        return {"class": kind.__name__, **module.config}  # type: ignore[dict-item]
    return {"class": "custom", "name": f"{kind.__module__}.{kind.__qualname__}"}


def _construct(description: dict[str, Any], instance: nn.Module | None, part: str, folder: str | Path) -> nn.Module:
    arguments = dict(description)
    kind = arguments.pop("class")
    if instance is not None:
        return instance
    if kind not in _ARCHITECTURES:
        raise EncoderError(
            f"{folder} was saved with the {part} class {description.get('name', kind)!r}, which is not one of ours "
            f"({', '.join(_ARCHITECTURES)}); loading runs no foreign code. Give it: Encoder.load(folder, "
            f"{part}=YourClass(...))."
        )
    return _ARCHITECTURES[kind](**arguments)


def _digest(text: bytes, weights: bytes) -> str:
    """BLAKE2b over both files, with the digest's own place in the text set to zeros."""
    blank = _DIGEST.sub(b'"digest": "' + b"0" * 32 + b'"', text, count=1)
    return hashlib.blake2b(len(blank).to_bytes(8, "little") + blank + weights, digest_size=16).hexdigest()


def _read_checked(folder: Path) -> tuple[dict[str, Any], bytes]:
    if not folder.exists():
        raise EncoderError(f"{nothing_at(folder)} Expected the folder of a saved encoder.")
    if folder.suffix == ".onnx":
        raise EncoderError(
            f"{folder} is an exported file, which galleries and 'embedlab serve' run; this command takes the folder of "
            "the saved encoder that it was exported from."
        )
    try:
        text, weights = (folder / "encoder.json").read_bytes(), (folder / "encoder.safetensors").read_bytes()
    except OSError as error:
        raise EncoderError(
            f"{folder} holds no saved encoder ({error}); expected encoder.json and encoder.safetensors as left by "
            "'embedlab fit' in its run folder under encoder/."
        ) from error
    found = _DIGEST.search(text)
    if found is None or found[1].decode() != _digest(text, weights):
        raise EncoderError(
            f"{folder} is damaged: its bytes do not match the digest in encoder.json. Copy it again from the original, "
            "or train again."
        )
    description: dict[str, Any] = json.loads(text)
    if description["format"] != FORMAT or description["version"] not in range(1, FORMAT_VERSION + 1):
        raise EncoderError(
            f"{folder} has format {description['format']} version {description['version']}, this embedlab reads "
            f"{FORMAT} up to version {FORMAT_VERSION}; update embedlab."
        )
    return description, weights
