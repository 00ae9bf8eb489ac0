"""What `embedlab evaluate` measures: encoders, their baselines, or vectors that are stored, all read in one way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embedlab._types import Embeddings
from embedlab.data.images import OnError
from embedlab.data.sources import Source, open_source
from embedlab.retrieval.embedders import OnnxEmbedder, as_embedder, on_device
from embedlab.retrieval.embeddings import is_vectors, read_protocol, read_vectors

if TYPE_CHECKING:
    from embedlab.encoders import Encoder

Where = Mapping[str, str | Collection[str]]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, eq=False)
class Reading:
    """The vectors of one PATH.

    Args:
        embeddings: Of what could be read.
        columns: Further columns of the manifest, row by row of the embeddings.
        skipped: Names of images that could not be read.
        ignored: Files of a folder that were left aside because they are no images.
        source: Where the pixels are, its row numbers being the ids of the embeddings; None for stored vectors.
    """

    embeddings: Embeddings
    columns: Mapping[str, list[str]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    ignored: int = 0
    source: Source | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """Something that gives vectors.

    Args:
        name: Its row in the table.
        read: From PATH and the rows wanted to vectors.
        about: What the protocol says of it, such as the encoder's fingerprint.
        encoder: What embeds; None for stored vectors.
    """

    name: str
    read: Callable[[str, Where | None], Reading]
    about: Mapping[str, Any] = field(default_factory=dict)
    encoder: Encoder | OnnxEmbedder | None = None


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How images become vectors.

    Args:
        batch_size: Images per forward pass.
        precision: "float32" or "bfloat16".
        on_error: What an unreadable image does: "stop" or "skip".
    """

    batch_size: int = 128
    precision: Precision = "float32"
    on_error: OnError = "stop"


def stored_subject(path: str, labels: str | None = None, *, name: str = "vectors") -> Subject:
    """Vectors that are stored; every PATH that is read must hold some.

    Args:
        path: Of the queries; the protocol of stored embeddings says how they were made.
        labels: File with the labels of the queries, see `read_vectors`; other vectors bring their own.
        name: Of the row.

    Raises:
        ValueError: A protocol that is damaged or newer; when read, a `select`, or what `read_vectors` refuses.
    """

    def read(where: str, select: Where | None) -> Reading:
        if select:
            raise ValueError("--select chooses rows of a manifest; stored vectors have no columns.")
        return Reading(read_vectors(where, labels if where == path else None))

    told = {"encoder", "preprocessing", "precision", "source", "select"}
    made = read_protocol(path) if (os.path.isdir(path) and is_vectors(path)) else {}
    about = {("fingerprint" if key == "encoder" else key): made[key] for key in sorted(told & made.keys())}
    return Subject(name, read, {"path": path, "labels": labels, **with_digest(about)})


def encoder_subject(
    encoder: Encoder | OnnxEmbedder,
    name: str = "encoder",
    *,
    options: ReadingOptions | None = None,
    path: str | None = None,
) -> Subject:
    """An encoder, on a GPU where there is one, or its exported file, without torch.

    Args:
        encoder: Images to vectors.
        name: Of the row.
        options: How images become vectors.
        path: Where it is stored, for the protocol.
    """
    placed = on_device(encoder)
    chosen = options or ReadingOptions()

    def read(where: str, select: Where | None) -> Reading:
        source = open_source(where, select=select)
        found = placed.embed(source, batch_size=chosen.batch_size, precision=chosen.precision, on_error=chosen.on_error)
        return _reading(source, found)

    exported = isinstance(encoder, OnnxEmbedder)
    about = {
        "path": path,
        "fingerprint": placed.fingerprint,
        "architecture": {"class": "onnx"} if exported else placed.architecture,
        "preprocessing": placed.preprocessing,
        "precision": chosen.precision,
        "batch_size": chosen.batch_size,
        "on_error": chosen.on_error,
        "device": "cpu" if exported else _device(placed),
    }
    return Subject(name, read, with_digest(about), placed)


def _device(encoder: Encoder) -> str:
    """Where it computes; a GPU by its name."""
    import torch

    device = encoder.mean.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def baseline_subjects(
    encoder: Encoder | OnnxEmbedder, path: str, select: Where | None = None, *, options: ReadingOptions | None = None
) -> list[Subject]:
    """What an encoder must beat: raw pixels, and the same network untrained.

    Args:
        encoder: Gives architecture and preprocessing.
        path: Images that set the running statistics of batch normalisation in the untrained network.
        select: Rows of these.
        options: See `encoder_subject`.

    Raises:
        ValueError: An exported file, which does not describe its network.
    """
    if isinstance(encoder, OnnxEmbedder):
        raise ValueError(
            f"--baselines needs the network itself with new weights, which {encoder.path} does not describe; name the "
            "folder of the encoder that was exported."
        )
    import torch

    from embedlab.encoders import Encoder, Pixels

    source = open_source(path, select=select)
    rows = list(range(0, len(source), max(1, len(source) // 256)))
    images, _, _ = source.read(
        rows, encoder.image_size, channels=encoder.channels, how=encoder.fit, on_error="skip", skip_limit=None
    )
    pixels = Encoder(Pixels(encoder.image_size, in_channels=encoder.channels), **encoder.preprocessing)
    return [
        encoder_subject(pixels, "raw pixels", options=options),
        encoder_subject(encoder.untrained(torch.from_numpy(images)), "untrained", options=options),
    ]


def _reading(source: Source, found: Embeddings) -> Reading:
    """What became of a source whose row numbers are the ids."""
    kept = found.ids.tolist()
    lost = sorted(set(range(len(source))) - set(kept))
    return Reading(
        found,
        {name: [values[row] for row in kept] for name, values in source.columns.items()},
        tuple(source.names[row] for row in lost),
        source.ignored,
        source,
    )


def with_digest(about: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a digest over the preprocessing, by which two protocols are told apart at a glance."""
    if "preprocessing" not in about:
        return dict(about)
    text = json.dumps(about["preprocessing"], sort_keys=True)
    return {**about, "preprocessing_digest": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}


def choose_subjects(
    path: str | None,
    *,
    encoder: str | None = None,
    compare: Sequence[str] | None = None,
    baselines: bool = False,
    select: Where | None = None,
    labels: str | None = None,
    reference: str | None = None,
    options: ReadingOptions | None = None,
) -> list[tuple[Subject, str]]:
    """What a command line asks for: the subjects, each with the PATH that it reads.

    Args:
        path: Images or vectors; None only where two sets of stored vectors are compared.
        encoder: Folder or exported file of one encoder.
        compare: Two of them, or two sets of stored vectors.
        baselines: Also raw pixels and the untrained network.
        select: Rows of `path`.
        labels: Of stored vectors.
        reference: What is searched, if that is another path.
        options: How images become vectors.

    Raises:
        ValueError: A combination that makes no sense.
    """
    if compare:
        if encoder or baselines:
            raise ValueError("--compare names two encoders itself; run --encoder and --baselines without it.")
        return _compared(path, compare, labels, reference, options)
    if path is None:
        raise ValueError("evaluate needs PATH with the queries; only --compare of stored vectors does without.")
    if is_vectors(path):
        if baselines or encoder:
            raise ValueError(f"{path} holds vectors; --encoder and --baselines need images.")
        return [(stored_subject(path, labels), path)]
    if encoder is None:
        raise ValueError(f"{path} holds images, so evaluate needs --encoder FOLDER.")
    _refuse_labels(labels, path)
    loaded: Any = as_embedder(encoder)
    others = baseline_subjects(loaded, path, select, options=options) if baselines else []
    return [(subject, path) for subject in (encoder_subject(loaded, options=options, path=encoder), *others)]


def _compared(
    path: str | None,
    compare: Sequence[str],
    labels: str | None,
    reference: str | None,
    options: ReadingOptions | None,
) -> list[tuple[Subject, str]]:
    names = short_names(*compare)
    if all(map(is_vectors, compare)):
        if path or reference:
            raise ValueError("--compare of two sets of stored vectors takes neither PATH nor --reference.")
        return [(stored_subject(one, labels, name=name), one) for name, one in zip(names, compare, strict=True)]
    if path is None:
        raise ValueError("evaluate needs PATH with the queries; only --compare of stored vectors does without.")
    if is_vectors(path):
        raise ValueError(f"{path} holds vectors; the two encoders of --compare need images.")
    _refuse_labels(labels, path)
    loaded: list[Any] = [as_embedder(one) for one in compare]
    return [
        (encoder_subject(embedder, name, options=options, path=one), path)
        for name, one, embedder in zip(names, compare, loaded, strict=True)
    ]


def _refuse_labels(labels: str | None, path: str) -> None:
    if labels:
        raise ValueError(
            f"--labels {labels} is for stored vectors, and {path} holds images, which bring theirs: folders, or the "
            "column label of a manifest."
        )


def short_names(first: str, second: str) -> tuple[str, str]:
    """What tells two paths apart.

    Raises:
        ValueError: The same path twice.

    Example:
        >>> short_names("runs/a/encoder", "runs/b/encoder")
        ('a', 'b')
    """
    sides = [list(Path(path).parts) for path in (first, second)]
    if sides[0] == sides[1]:
        raise ValueError(f"--compare needs two different encoders, got {first} twice.")
    for end in (0, -1):
        while min(map(len, sides)) > 1 and sides[0][end] == sides[1][end]:
            for side in sides:
                side.pop(end)
    return "/".join(sides[0]), "/".join(sides[1])
