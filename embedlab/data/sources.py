"""What to read: folders, manifests, torchvision data sets and arrays, all as one `Source`."""

from __future__ import annotations

import csv
import difflib
import inspect
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

import numpy as np
from tqdm import tqdm

from embedlab.data.images import (
    IMAGE_SUFFIXES,
    Fit,
    ImageError,
    OnError,
    Pixels,
    Rows,
    convert_channels,
    image_pixels,
    read_image,
    read_rows,
)

TORCHVISION = "torchvision:"
_LABEL_LIKE = ("label", "labels", "class", "classes", "class_name", "target", "identity", "category")

logger = logging.getLogger("embedlab")


@dataclass(frozen=True, eq=False)
class Source:
    """Samples that can be read as images: where each one is, what it shows, and what else a manifest says about it.

    Args:
        names: N unique names: paths of image files or, where the pixels come from elsewhere, names like "CIFAR10[17]".
        labels: N labels, non-empty and without white space around them, or None without labels.
        columns: Further facts, each a list of N strings, such as "split" or "group".
        pixels: Row i of the store of all pixels (array, torchvision data set) is `pixels[rows[i]]`; None for files.
        rows: (N,) int64 rows of `pixels`; needed exactly when `pixels` is given.
        ignored: How many files of a folder were left aside because they are no images.

    Raises:
        ValueError: If the parts disagree in length, or a name or a label is not usable.
    """

    names: list[str]
    labels: list[str] | None = None
    _: KW_ONLY
    columns: Mapping[str, list[str]] = field(default_factory=dict)
    pixels: Any = field(default=None, repr=False)
    rows: Rows | None = field(default=None, repr=False)
    ignored: int = 0

    def __post_init__(self) -> None:
        count = len(self.names)
        parts = {
            "labels": self.labels,
            "rows": self.rows,
            **{f"column {name!r}": c for name, c in self.columns.items()},
        }
        for name, part in parts.items():
            if part is not None and len(part) != count:
                raise ValueError(f"Source has {count} names but {len(part)} {name}; they must be sample by sample.")
        if (self.pixels is None) != (self.rows is None):
            raise ValueError("Source needs pixels and rows together, or neither when names are files.")
        if len(set(self.names)) < count:
            name, times = Counter(self.names).most_common(1)[0]
            raise ValueError(f"Source holds {name} {times} times: a sample that counts twice spoils splits and scores.")
        reserved = {"path", "label"} & set(self.columns)
        if reserved:
            raise ValueError(f"A further column cannot be called {min(reserved)!r}: names and labels have that place.")
        if self.labels is not None:
            _check_labels(self.labels, self.names)

    @classmethod
    def from_arrays(
        cls,
        images: Pixels,
        labels: Sequence[str] | None = None,
        *,
        columns: Mapping[str, Sequence[str]] | None = None,
        name: str = "array",
    ) -> Source:
        """Take images that are in memory already.

        Args:
            images: (N, H, W, C) or (N, H, W) uint8; not copied.
            labels: N labels.
            columns: Further columns.
            name: Sample i is called "name[i]".

        Raises:
            ValueError: For another shape or type.
        """
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise ValueError(
                f"Source.from_arrays needs uint8 images (N, H, W, C) or (N, H, W), got {images.shape} {images.dtype}; "
                "move channels last and bring values to 0..255."
            )
        return cls(
            [f"{name}[{row}]" for row in range(len(images))],
            None if labels is None else list(labels),
            columns={key: list(values) for key, values in (columns or {}).items()},
            pixels=images,
            rows=np.arange(len(images), dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, rows: Iterable[int]) -> Source:
        """Keep these rows, in this order (numbers from 0, or a boolean mask of length N).

        Raises:
            ValueError: If a row does not exist or comes twice.
        """
        chosen = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows))
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise ValueError(f"A mask over {len(self)} samples needs that length, got {chosen.shape}.")
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise ValueError(f"Rows must be in 0..{len(self) - 1}, got {chosen.min()}..{chosen.max()}.")
        return replace(
            self,
            names=[self.names[row] for row in chosen],
            labels=None if self.labels is None else [self.labels[row] for row in chosen],
            columns={name: [values[row] for row in chosen] for name, values in self.columns.items()},
            rows=None if self.rows is None else self.rows[chosen],
        )

    def select(self, where: Mapping[str, str | Collection[str]]) -> Source:
        """Keep the samples whose columns have these values; several columns must all agree.

        Args:
            where: Column (or "label") to a value or to several allowed values, such as {"split": "test"}.

        Raises:
            ValueError: If there is no such column or value, or nothing is left.
        """
        mask = np.ones(len(self), dtype=bool)
        for name, value in where.items():
            values = self.column(name)
            wanted = {value} if isinstance(value, str) else set(value)
            unknown = sorted(wanted - set(values))
            if unknown:
                raise ValueError(f"Column {name!r} never holds {unknown[0]!r}; it holds {_some(sorted(set(values)))}.")
            mask &= np.array([entry in wanted for entry in values], dtype=bool)
        if not mask.any():
            raise ValueError(f"No sample fits {dict(where)}: each value exists, but never together in one row.")
        return self.subset(mask)

    def column(self, name: str) -> list[str]:
        """One column by name, "label" included.

        Raises:
            ValueError: If there is no such column.
        """
        if name == "label" and self.labels is not None:
            return self.labels
        if name not in self.columns:
            have = [*([] if self.labels is None else ["label"]), *self.columns]
            raise ValueError(f"There is no column {name!r}; there are {_some(have) if have else 'none'}.")
        return self.columns[name]

    def image(self, row: int, *, channels: int = 3) -> Pixels:
        """Read one sample, unchanged in size.

        Args:
            row: Sample number, 0 to N - 1.
            channels: 3 for RGB, 1 for grey; for arrays also the number of channels that they have.

        Returns:
            (H, W, channels) uint8.

        Raises:
            ImageError: If the file is no whole image.
        """
        if self.rows is None:
            return read_image(self.names[row], channels=channels)
        number = int(self.rows[row])
        if isinstance(self.pixels, np.ndarray):
            array: Pixels = self.pixels[number]
            return convert_channels(array[..., None] if array.ndim == 2 else array, channels)
        return _torchvision_image(self.pixels, number, self.names[row], channels)

    def read(
        self,
        rows: Sequence[int] | Rows | None,
        size: int,
        *,
        channels: int = 3,
        how: Fit = "crop",
        on_error: OnError = "stop",
        skip_limit: float | None = 0.01,
        threads: int | None = None,
    ) -> tuple[Pixels, Rows, list[tuple[str, str]]]:
        """Read samples as one array; arguments and results as in `read_images`.

        Args:
            rows: Sample numbers of this source; None for all.
            size: Side of the images in pixels.
            channels: 3 for RGB, 1 for grey.
            how: "crop", "stretch", "pad" or "ink", see `fit_image`.
            on_error: "stop" or "skip".
            skip_limit: The largest share that may be left out, see `read_images`.
            threads: Decoding threads; torchvision data sets are always read by one, they promise nothing about more.

        Returns:
            images (M, channels, size, size) uint8; kept (M,) int64, the sample numbers *of this source* that the images
            show; skipped, a list of (name, reason).

        Raises:
            ImageError: A bad image under "stop".
            ValueError: Too many left out, or a wrong argument.
        """
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise ValueError(f"Rows must be in 0..{len(self) - 1}, got {chosen.min()}..{chosen.max()}.")
        images, kept, skipped = read_rows(
            lambda i: self.image(int(chosen[i]), channels=channels),
            [self.names[row] for row in chosen],
            size,
            channels=channels,
            how=how,
            on_error=on_error,
            skip_limit=skip_limit,
            threads=threads if self.rows is None or isinstance(self.pixels, np.ndarray) else 1,
        )
        return images, chosen[kept].astype(np.int64), skipped


def class_numbers(labels: Sequence[str]) -> tuple[list[str], Rows]:
    """Number the classes in sorted order.

    Returns:
        The sorted names of the classes, and (N,) int64: label i is `names[numbers[i]]`.

    Example:
        >>> class_numbers(["pear", "apple", "pear"])
        (['apple', 'pear'], array([1, 0, 1]))
    """
    names = sorted(set(labels))
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[label] for label in labels], dtype=np.int64)


def refuse_gaps(groups: Sequence[str], column: str, names: Sequence[str] | None) -> None:
    """Raise ValueError where an image has no group, for all such images would be of one.

    Args:
        groups: N values of a column.
        column: Its name.
        names: N samples; None where they have no names.
    """
    if "" in groups:
        row = list(groups).index("")
        raise ValueError(
            f"{f'row {row}' if names is None else names[row]} has no value in the column {column!r}: images without "
            "one would be of one group. Fill it in (an image alone is a group of its own), or do without the column."
        )


def open_source(path: str | os.PathLike[str], *, select: Mapping[str, str | Collection[str]] | None = None) -> Source:
    """Open whatever holds images.

    Args:
        path: One of

            - a folder of images: the label is the image's folder relative to the root (`Greek/character01`); images
              directly in the root have no label. Other files are ignored and counted, hidden ones skipped, links
              followed; the order is sorted.
            - a manifest, CSV (UTF-8) or Parquet: `path,label[,split,group,...]`, paths relative to the manifest's
              folder; without the column `label` the images have no labels.
            - a single image file.
            - `torchvision:NAME?root=FOLDER&split=train&download=true`: any torchvision data set of labelled images.
              What follows the question mark goes to its constructor; `split` also stands for the `train` switch of
              those that have one. Nothing is downloaded unless `download=true` says so.
        select: Keep only samples with these values, see `Source.select`.

    Raises:
        ValueError: If there is nothing of the kind, or a line of the manifest is wrong; file and line are named.
    """
    name = os.fspath(path)
    if name.startswith(TORCHVISION):
        source = _from_torchvision(name)
    elif os.path.isdir(name):
        source = _from_folder(name)
    else:
        source = _from_file(name)
    return source if select is None else source.select(select)


def nothing_at(path: str | os.PathLike[str]) -> str:
    """What to say of a path where nothing is: the first part of it that is missing may be a slip of the pen."""
    missing = Path(path)
    while not missing.parent.exists():
        missing = missing.parent
    folder = missing.parent
    near = difflib.get_close_matches(missing.name, os.listdir(folder)) if folder.is_dir() else []
    hint = f"did you mean {folder / near[0]}?" if near else f"looked in {folder.resolve()}."
    return f"No such file or folder: {path}; {hint}"


def _from_file(name: str) -> Source:
    suffix = _suffix(name)
    if not os.path.exists(name):
        raise ValueError(nothing_at(name))
    if suffix == ".csv":
        return _from_table(name, _csv_rows(name))
    if suffix in (".parquet", ".pq"):
        return _from_table(name, _parquet_rows(name))
    if suffix in IMAGE_SUFFIXES:
        return Source([name])
    raise ValueError(
        f"{name} is no source of images: expected a folder of images, a manifest (.csv, .parquet), an image "
        f"({' '.join(sorted(IMAGE_SUFFIXES))}) or {TORCHVISION}NAME."
    )


# ---- folders


def _from_folder(root: str) -> Source:
    paths: list[str] = []
    others: list[str] = []
    empty: list[str] = []
    for path in _walk(root, ()):
        if path.endswith(os.sep):
            empty.append(path)
        else:
            (paths if _suffix(path) in IMAGE_SUFFIXES else others).append(path)
    if not paths:
        suffixes = Counter(_suffix(path) or "no suffix" for path in others).most_common(3)
        found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes) or "nothing"
        raise ValueError(
            f"No image in {root} or below; found {found}. Images are told by their suffix: "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}."
        )
    folders = [os.path.dirname(path) for path in paths]
    label_of = {folder: PurePath(os.path.relpath(folder, root)).as_posix() for folder in set(folders)}
    labels = [label_of[folder] for folder in folders]
    loose = labels.count(".")
    if 0 < loose < len(labels):
        stray = paths[labels.index(".")]
        raise ValueError(
            f"{root} holds {loose} images directly ({stray}, ...) and {len(labels) - loose} in folders: the folder is "
            "the label, so those in the root have none. Move them into a folder each, or out of the root."
        )
    if empty and not loose:
        raise ValueError(f"Class folder {empty[0]} is empty: put its images in, or remove the folder.")
    source = Source(paths, None if loose else labels, ignored=len(others))
    logger.info(
        "%s: %d images, %d labels; %d other files ignored", root, len(paths), len(set(labels) - {"."}), len(others)
    )
    return source


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Every visible file below, sorted; an empty folder as its own path with a separator at the end."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link that leads back up
        return
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except PermissionError as error:
        raise ValueError(f"No permission to list the folder {folder}; allow it: chmod u+rx {folder}") from error
    if not names:
        yield os.path.join(folder, "")
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and _suffix(name) not in IMAGE_SUFFIXES:
            yield from _walk(path, (*above, here))
        else:
            yield path  # a folder called x.jpg too: reading it says what is wrong


# ---- manifests


def _csv_rows(name: str) -> Iterator[tuple[str, list[str]]]:
    """Header, then rows, each with the words that name its place."""
    with open(name, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield f"{name} line {reader.line_num}", [cell.strip() for cell in cells]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} after line {reader.line_num} is not UTF-8 text ({error.reason}); save it as 'CSV UTF-8'."
            ) from error
        except csv.Error as error:
            raise ValueError(f"{name} line {reader.line_num} is not CSV: {error}; check the quotes.") from error


def _parquet_rows(name: str) -> Iterator[tuple[str, list[str]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f'{name}: reading Parquet needs pyarrow: pip install "embedlab[parquet]". A CSV manifest needs nothing.'
        ) from error
    try:
        table = pyarrow.parquet.read_table(name)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{name} is not a readable Parquet file: {error}. Was it copied whole?") from error
    yield f"{name} header", list(table.column_names)
    columns = [column.to_pylist() for column in table.columns]
    for number, values in enumerate(zip(*columns, strict=True), start=1):
        yield f"{name} row {number}", ["" if value is None else str(value).strip() for value in values]


def _from_table(name: str, rows: Iterator[tuple[str, list[str]]]) -> Source:
    place, header = next(rows, (name, []))
    _check_header(place, header)
    folder = os.path.dirname(name)
    where: dict[str, str] = {}  # path -> place, in order
    table: dict[str, list[str]] = {column: [] for column in header}
    for place, cells in rows:
        if len(cells) != len(header):
            raise ValueError(
                f"{place} has {len(cells)} cells, the header has {len(header)} ({','.join(header)}); "
                "a comma inside a cell needs quotes around the cell."
            )
        for column, cell in zip(header, cells, strict=True):
            table[column].append(cell)
        path = _listed_file(place, table["path"][-1], folder)
        if path in where:
            raise ValueError(f"{place} lists {path} again, it stands in {where[path]} already; keep one of them.")
        where[path] = place
        if table.get("label", ["-"])[-1] == "":
            raise ValueError(f"{place}: the label is empty; fill it in, drop the line, or drop the column for all.")
    if not where:
        raise ValueError(f"{name} lists no images: after the header each line must name one.")
    paths = list(where)
    del table["path"]
    labels = table.pop("label", None)
    return Source(paths, labels, columns=table)


def _check_header(place: str, header: list[str]) -> None:
    other = re.search("[;\t]", header[0]) if len(header) == 1 else None
    if other:
        raise ValueError(f"{place}: columns are set apart by {other[0]!r}, expected commas; save it as plain CSV.")
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice or "" in header:
        raise ValueError(f"{place}: column names must be there and differ, got {','.join(header)}.")
    if "path" not in header:
        raise ValueError(f"{place}: no column 'path', got {','.join(header)}; the first line must name the columns.")
    meant = [column for column in header if column.lower() in _LABEL_LIKE]
    if "label" not in header and meant:
        raise ValueError(f"{place}: no column 'label' but {meant[0]!r}; rename it to label, that is where names stand.")


def _listed_file(place: str, path: str, folder: str) -> str:
    if not path:
        raise ValueError(f"{place}: the path is empty; drop the line or fill it in.")
    full = os.path.normpath(os.path.join(folder, path))
    if not os.path.isfile(full):
        hint = "write / instead of \\" if "\\" in path else "paths are relative to the manifest's folder"
        raise ValueError(f"{place}: no file {full}; {hint}.")
    return full


# ---- torchvision


def _from_torchvision(address: str) -> Source:
    name, _, query = address.removeprefix(TORCHVISION).partition("?")
    factory = _torchvision_class(name)
    arguments = _torchvision_arguments(address, name, query, inspect.signature(factory).parameters)
    try:
        dataset = factory(**arguments)
    except Exception as error:  # whatever the data set's own code raises; the address is what the caller can change
        hint = "" if "download" in arguments else " If it was never downloaded, add download=true after the '?'."
        raise ValueError(f"{address}: torchvision says: {error}.{hint}".replace("..", ".")) from error
    count = len(dataset)
    labels = _torchvision_labels(address, dataset, count)
    split = arguments.get("split", arguments.get("train"))
    columns = {}
    if split is not None:
        columns["split"] = [{True: "train", False: "test"}.get(split, str(split))] * count
    names = [f"{name}[{row}]" for row in range(count)]
    return Source(names, labels, columns=columns, pixels=dataset, rows=np.arange(count, dtype=np.int64))


def _torchvision_class(name: str) -> Any:
    import torchvision.datasets

    known = [entry for entry in torchvision.datasets.__all__ if entry not in ("DatasetFolder", "VisionDataset")]
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.4) or sorted(known)
        raise ValueError(f"torchvision has no data set {name!r}; near: {', '.join(near[:5])}.")
    return getattr(torchvision.datasets, name)


def _torchvision_arguments(
    address: str, name: str, query: str, parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    constants = {"true": True, "false": False}
    any_key = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, _, text = part.partition("=")
        value = unquote(text)
        if key == "split" and key not in parameters and "train" in parameters:
            if value not in ("train", "test"):
                raise ValueError(f"{address}: {name} knows split=train and split=test, got {value!r}.")
            key, value = "train", "true" if value == "train" else "false"
        if key not in parameters and not any_key:
            raise ValueError(f"{address}: {name} takes no {key!r}; it takes {', '.join(parameters)}.")
        number = int(value) if re.fullmatch(r"\d+", value) and key != "root" else value
        arguments[key] = constants.get(value.lower(), number)
    if "root" in parameters and "root" not in arguments:
        raise ValueError(f"{address} does not say where its files are: {TORCHVISION}{name}?root=FOLDER")
    for key in ("split", "train"):  # the data set's own choice belongs into the column too
        if key in parameters and key not in arguments and parameters[key].default is not inspect.Parameter.empty:
            arguments[key] = parameters[key].default
    return arguments


def _torchvision_labels(address: str, dataset: Any, count: int) -> list[str] | None:
    if count == 0:
        raise ValueError(f"{address} holds no images.")
    first = dataset[0][1]
    if not isinstance(first, str | int | np.integer) and getattr(first, "ndim", 1) != 0:
        raise ValueError(
            f"{address}: its targets are not classes (the first is {first!r}); only data sets with one class per "
            "image can be a source."
        )
    targets = _torchvision_targets(dataset, count)
    if isinstance(first, str):
        return [str(target) for target in targets]
    numbers = [int(target) for target in targets]
    if max(numbers) < 0:  # STL10's unlabelled part says -1
        return None
    if min(numbers) < 0:
        raise ValueError(f"{address}: some images have no class (target {min(numbers)}); choose one split at a time.")
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, list | tuple) and len(set(classes)) == len(classes) > max(numbers):
        return [str(classes[number]).strip() for number in numbers]
    return [str(number) for number in numbers]


def _torchvision_targets(dataset: Any, count: int) -> list[Any]:
    """Targets without decoding every image, where the data set keeps a list that agrees with what it returns."""
    for name in ("targets", "labels", "_labels", "y"):
        kept = getattr(dataset, name, None)
        if kept is not None and len(kept) == count:
            targets = kept.tolist() if hasattr(kept, "tolist") else list(kept)
            if all(bool(targets[row] == dataset[row][1]) for row in {0, count // 2, count - 1}):
                return targets
    rows = tqdm(range(count), desc="reading labels", unit="image", delay=1)
    return [dataset[row][1] for row in rows]


def _torchvision_image(dataset: Any, number: int, name: str, channels: int) -> Pixels:
    try:
        image = dataset[number][0]
    except Exception as error:  # its own decoder's errors, as for files
        raise ImageError(
            f"Cannot read image {name}: {error}. Is the download whole?", path=name, reason=str(error)
        ) from error
    if not hasattr(image, "getexif"):
        raise ImageError(f"Cannot read image {name}: it is a {type(image).__name__}, not a picture.", path=name)
    return image_pixels(image, channels=channels, name=name)


# ---- shared


def _check_labels(labels: Sequence[str], names: Sequence[str]) -> None:
    for label in dict.fromkeys(labels):
        if not isinstance(label, str) or not label or label != label.strip():
            name = names[list(labels).index(label)]
            raise ValueError(
                f"Label {label!r} of {name} is not usable: labels are non-empty strings without white space "
                "around them; rename the folder or change the label."
            )
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Label {label!r} is not UTF-8 text: rename the folder that it comes from.") from error


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _some(values: Sequence[str], limit: int = 10) -> str:
    return ", ".join(map(repr, values[:limit])) + (f" and {len(values) - limit} more" if len(values) > limit else "")
