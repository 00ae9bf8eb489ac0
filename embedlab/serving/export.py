"""Encoders as files that run without us: ONNX, or an exported torch program, checked against the encoder."""

from __future__ import annotations

import copy
import io
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from embedlab._durable import put_in_place, sync
from embedlab._types import Embeddings, Vectors
from embedlab.data import Source
from embedlab.data.embedding import embed_images
from embedlab.data.images import OnError
from embedlab.encoders import Encoder
from embedlab.metrics import recall_at_k
from embedlab.retrieval import Gallery
from embedlab.retrieval.embedders import ONNX_KEY, OnnxEmbedder, export_note, sealed
from embedlab.retrieval.store import DATABASE, refuse_if_not_empty

Format = Literal["onnx", "torch-export"]
_SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
_ONNX_LIMIT = 2_000_000_000  # bytes; protobuf cannot hold a file of 2 GiB


class ExportError(ValueError):
    """The exported file would not give the vectors of its encoder."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with its encoder.

    Args:
        path: The file, or the folder of an exported gallery.
        format: "onnx" or "torch-export".
        bytes: Its size.
        fingerprint: Of the encoder; an ONNX file keeps it.
        dim: Numbers per vector.
        images: Images that both embedded.
        max_difference: Largest difference of one number in their vectors, which have length 1.
        recall_at_1: Of the file's vectors on labelled images, leave-one-out; None without labels.
        encoder_recall_at_1: Of the encoder's.
    """

    path: str
    format: Format
    bytes: int
    fingerprint: str
    dim: int
    images: int
    max_difference: float
    recall_at_1: float | None
    encoder_recall_at_1: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return asdict(self)


def export_encoder(
    encoder: Encoder,
    out: str | Path,
    *,
    format: Format = "onnx",
    images: Source | None = None,
    on_error: OnError = "stop",
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> ExportReport:
    """Write an encoder as one file: uint8 images (B, C, image_size, image_size) to unit vectors (B, D), for any B.

    Mean, standard deviation and normalisation are inside; decoding and resizing are left to the caller
    (`OnnxEmbedder` does them). The file appears only after it has embedded the same images as the encoder, noise and
    `images`, with the same result.

    Args:
        encoder: What to export.
        out: The file, `.onnx` or `.pt2`; a new one, unless `overwrite`.
        format: "onnx", for onnxruntime (needs the extra `onnx`), or "torch-export", for `torch.export.load`.
        images: Further images to compare on; where they have labels, recall@1 must be unchanged too.
        on_error: What an unreadable one does, see `Encoder.embed`.
        tolerance: Largest difference of one number in a unit vector that is taken for rounding.
        overwrite: Replace an existing file.

    Raises:
        ExportError: The vectors differ by more than the tolerance, or find other nearest neighbours.
        ImportError: A package of the extra `onnx` is missing.
        ValueError: The file exists, or the encoder is too large for one ONNX file.

    Example:
        >>> from embedlab.encoders import Pixels
        >>> encoder = Encoder(Pixels(4), image_size=4)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     export_encoder(encoder, f"{place}/pixels.pt2", format="torch-export").max_difference < 1e-6
        True
    """
    out = Path(out)
    if format not in _SUFFIXES:
        raise ValueError(f"format is {' or '.join(_SUFFIXES)}, got {format!r}.")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; choose another name or pass overwrite=True (--overwrite).")
    if out.suffix != _SUFFIXES[format]:
        right = out.with_suffix(_SUFFIXES[format])
        raise ValueError(f"A file of format {format} is told by its suffix: name it {right}, got {out}.")
    encoder = copy.deepcopy(encoder).cpu().eval()
    content = _onnx(encoder) if format == "onnx" else _torch_export(encoder)
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{out.stem}-", suffix=out.suffix, dir=out.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        embed = _embed_by(format, name, encoder)
        compared = _compare(encoder, embed, images, on_error=on_error, tolerance=tolerance)
        os.chmod(name, 0o644)
        sync(Path(name))
        os.replace(name, out)
        sync(out.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return ExportReport(str(out), format, len(content), encoder.fingerprint, encoder.dim, **compared)


def export_gallery(
    folder: str | Path, out: str | Path, *, images: Source | None = None, on_error: OnError = "stop"
) -> ExportReport:
    """Copy a gallery together with its encoder as an ONNX file: a folder that is served anywhere, without torch.

    Templates, labels, metadata, thumbnails and thresholds are one consistent state, as by `Gallery.backup`; the folder
    appears whole or not at all, after the file has been compared with the encoder, and the gallery's own reference
    images have gone through it.

    Args:
        folder: Of the gallery, which may be in use.
        out: A new folder.
        images: As in `export_encoder`.
        on_error: As in `export_encoder`.

    Raises:
        ExportError: As in `export_encoder`.
        ValueError: The place is taken, or the gallery has no encoder in its folder.
    """
    folder, out = Path(folder), Path(out)
    refuse_if_not_empty(out)
    if not (folder / "encoder" / "encoder.json").is_file():
        raise ValueError(
            f"{folder} keeps no encoder of ours that could be exported. A gallery of an ONNX file is such a bundle "
            "already: copy it by 'gallery backup'."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as place:
        bundle = Path(place) / "bundle"
        with Gallery.open(folder, read_only=True) as gallery:
            gallery.backup(bundle)
        encoder = Encoder.load(bundle / "encoder")
        for path in (bundle / "encoder").iterdir():
            path.unlink()
        report = export_encoder(encoder, bundle / "encoder" / "model.onnx", images=images, on_error=on_error)
        with Gallery.open(bundle) as gallery:
            assert gallery.embedder.fingerprint == encoder.fingerprint  # loading it compares the reference images
        put_in_place(bundle, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return replace(report, path=str(out), bytes=size)


def is_gallery(path: str | Path) -> bool:
    """Whether `export_gallery` takes this rather than `export_encoder`."""
    return (Path(path) / DATABASE).is_file()


def _facts(encoder: Encoder) -> dict[str, Any]:
    """What goes along with the network."""
    return {
        "fingerprint": encoder.fingerprint,
        "dim": encoder.dim,
        "preprocessing": encoder.preprocessing,
        "identities": sorted(encoder.identities),
    }


def _example(encoder: Encoder) -> tuple[tuple[Tensor], tuple[dict[int, Any]]]:
    """Two images, since torch.export takes a batch of one for a batch that is always one; and what is dynamic."""
    images = torch.zeros(2, encoder.channels, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    return (images,), ({0: torch.export.Dim("batch")},)


def _onnx(encoder: Encoder) -> bytes:
    for package in ("onnx", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"Writing ONNX needs {package}: pip install 'embedlab[onnx]'") from error
    if (size := sum(tensor.nbytes for tensor in encoder.state_dict().values())) > _ONNX_LIMIT:
        raise ValueError(
            f"The encoder has {size / 1e9:.1f} GB of weights, one ONNX file holds 2; export it as torch-export."
        )
    example, dynamic = _example(encoder)
    program = torch.onnx.export(
        encoder,
        example,
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes=dynamic,
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")  # paths and lines of the machine that exported
        part.ClearField("doc_string")
    model.metadata_props.add(key=ONNX_KEY, value=export_note(**_facts(encoder)))
    return sealed(model.SerializeToString())


def _torch_export(encoder: Encoder) -> bytes:
    example, dynamic = _example(encoder)
    content = io.BytesIO()
    program = torch.export.export(encoder, example, dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths and lines of the machine that exported
    torch.export.save(program, content, extra_files={"embedlab.json": json.dumps(_facts(encoder))})
    return content.getvalue()


def _embed_by(format: Format, path: str, encoder: Encoder) -> Callable[..., Embeddings]:
    """What `Encoder.embed` does, by the file."""
    if format == "onnx":
        return OnnxEmbedder(path).embed
    program = torch.export.load(path).module()

    @torch.no_grad()
    def embed_batch(images: Any) -> Vectors:
        vectors: Vectors = program(torch.as_tensor(images)).numpy()
        return vectors

    return partial(
        embed_images,
        embed_batch=embed_batch,
        preprocess=encoder.preprocess,
        size=encoder.image_size,
        channels=encoder.channels,
        fit=encoder.fit,
        dim=encoder.dim,
        progress=True,
    )


def _compare(
    encoder: Encoder,
    embed: Callable[..., Embeddings],
    images: Source | None,
    *,
    on_error: OnError,
    tolerance: float,
) -> dict[str, Any]:
    """The part of the report that is about both."""
    size = encoder.image_size
    noise = np.random.default_rng(0).integers(0, 256, (7, encoder.channels, size, size), dtype=np.uint8)
    pairs = [_both(encoder, embed, noise, batch_size=3, on_error=on_error)]  # batches of 3, 3 and 1
    if images is not None:
        pairs.append(_both(encoder, embed, images, batch_size=64, on_error=on_error))
    difference = max(float(np.abs(ours.vectors - theirs.vectors).max(initial=0)) for ours, theirs in pairs)
    if not difference <= tolerance:
        raise ExportError(
            f"The exported network gives other vectors than the encoder: they differ by up to {difference:.2g}, "
            f"{tolerance:.2g} is allowed. Nothing was written. Does the backbone draw random numbers?"
        )
    ours, theirs = pairs[-1]
    labels = ours.labels or []
    recalls: list[float | None] = [None, None]
    if len(set(labels)) < len(labels):
        recalls = [recall_at_k(found.vectors, labels, k=1) for found in (theirs, ours)]
    if recalls[0] != recalls[1]:
        raise ExportError(
            f"recall@1 on the given images is {recalls[0]} by the exported network and {recalls[1]} by the encoder, "
            f"though the vectors differ by {difference:.2g} at most. Nothing was written. Are there duplicates under "
            "two labels, which are nearest by turns? Leave them out."
        )
    return {
        "images": sum(len(ours) for ours, _ in pairs),
        "max_difference": difference,
        "recall_at_1": recalls[0],
        "encoder_recall_at_1": recalls[1],
    }


def _both(
    encoder: Encoder, embed: Callable[..., Embeddings], images: Any, **options: Any
) -> tuple[Embeddings, Embeddings]:
    return encoder.embed(images, **options), embed(images, **options)
