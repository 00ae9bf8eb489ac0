"""What comes in: NumPy or torch, numbers or strings; what the metrics work on: checked NumPy arrays."""

import hashlib
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


def as_array(values: Any) -> Array:
    """View array-likes as NumPy; a torch tensor is recognised by its methods, so that torch is never imported."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().to_dense()
        # NumPy has no bfloat16; every bfloat16 is a float32
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    first = values
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if first is not values and hasattr(first, "detach"):  # NumPy takes neither bfloat16 nor gradients from a list
        values = [as_array(value) for value in values]
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"Not an array of numbers, strings or booleans ({error}): rows of different lengths?"
        ) from None


def as_scores(values: Any, name: str) -> Floats:
    """Check (N,) numbers without NaN and return them as float64; infinities are allowed, they order well."""
    scores = as_array(values)
    if scores.ndim != 1 or scores.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be (N,) numbers, got shape {scores.shape} of {scores.dtype}.")
    scores = scores.astype(np.float64)
    missing = np.isnan(scores)
    if missing.any():
        raise ValueError(
            f"{name}[{int(missing.argmax())}] is NaN ({int(missing.sum())} of {len(scores)} are): a failed search or a "
            "division by zero upstream? Leave such rows out before scoring."
        )
    return scores


def as_flags(values: Any, name: str, rows: int) -> Booleans:
    """Check (N,) yes/no values, given as booleans or as 0 and 1."""
    flags = as_array(values)
    if flags.shape != (rows,):
        raise ValueError(f"{name} must have one entry per score: expected shape ({rows},), got {flags.shape}.")
    if flags.dtype.kind not in "biuf" or (flags.dtype.kind != "b" and not np.isin(flags, (0, 1)).all()):
        raise ValueError(f"{name} must be booleans or 0 and 1, got {flags.dtype} with values such as {flags[:3]}.")
    return flags.astype(np.bool_)


def as_labels(values: Any, name: str, rows: int | None = None) -> Array:
    """Check (N,) labels: all integers, all booleans or all strings."""
    if isinstance(values, Sequence) and not isinstance(values, str) and len({isinstance(v, str) for v in values}) > 1:
        # NumPy would turn [1, "a"] into ["1", "a"] without a word
        raise ValueError(f"{name} mixes strings with other types; labels must be all strings or all integers.")
    labels = as_array(values)
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels.ravel()):
        labels = labels.astype(np.str_)
    if labels.shape == (0,):
        labels = labels.astype(np.int64)  # an empty list says nothing about its type, and NumPy takes it for floats
    if labels.ndim != 1 or labels.dtype.kind not in "iubU":
        raise ValueError(
            f"{name} must be (N,) integers or strings, got shape {labels.shape} of {labels.dtype}: "
            "None, floats and one-hot rows are not labels."
        )
    if rows is not None and len(labels) != rows:
        raise ValueError(f"{name} has {len(labels)} entries for {rows} rows; they must be row by row.")
    return labels


def encode_together(first: Array, second: Array, names: str) -> tuple[Integers, Integers, Array]:
    """Number two label arrays by one list of classes.

    Returns:
        The codes of both and the sorted classes that the codes stand for.
    """
    if (first.dtype.kind == "U") != (second.dtype.kind == "U"):
        raise ValueError(
            f"{names} cannot be compared: one side holds strings ({first.dtype}), the other numbers "
            f"({second.dtype}), so nothing would ever match. Convert one side."
        )
    if {first.dtype.kind, second.dtype.kind} == {"i", "u"}:
        # together NumPy would make float64 of them, and lose digits
        signed, unsigned = (first, second) if first.dtype.kind == "i" else (second, first)
        if unsigned.max(initial=0) > np.iinfo(np.int64).max and signed.min(initial=0) < 0:
            raise ValueError(
                f"{names} cannot be compared: one side is {unsigned.dtype} above 2^63, the other below 0, so that no "
                "type holds both. Convert both to strings."
            )
        kind = np.uint64 if unsigned.max(initial=0) > np.iinfo(np.int64).max else np.int64
        first, second = first.astype(kind), second.astype(kind)
    classes, codes = np.unique(np.concatenate([first, second]), return_inverse=True)
    codes = codes.astype(np.int64)
    return codes[: len(first)], codes[len(first) :], classes


def as_count(value: Any, asked: str) -> int:
    """A whole number of at least 1, as 3 or 3.0; `asked` begins the error, such as "classes must be"."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value  # of numpy or torch
    number = float(plain) if isinstance(plain, numbers.Real) else math.nan
    if not number.is_integer() or number < 1:
        raise ValueError(f"{asked} a whole number of at least 1, got {value!r}.")
    return int(number)


def between(upper: float, lower: float) -> float:
    """A threshold that `upper` reaches and `lower` does not: their middle, or `upper` where there is none."""
    middle = float(upper) / 2 + float(lower) / 2
    return middle if lower < middle <= upper else float(upper)


def allowed(rate: Any, count: float) -> Array:
    """The most of `count` that a rate allows: 0.29 of 100 allows 29, although 0.29 * 100 is 28.999999999999996."""
    product = np.asarray(rate, dtype=np.float64) * count
    return np.asarray(np.floor(product + 1e-9 + 4 * np.finfo(np.float64).eps * product))


def digest(*arrays: Array | None) -> str:
    """BLAKE2b of types, shapes and values."""
    hashed = hashlib.blake2b(digest_size=32)
    for array in arrays:
        if array is None:
            hashed.update(b"none")
            continue
        hashed.update(f"{array.dtype.str} {array.shape}".encode())
        step = max(
            1, (32 << 20) * len(array) // max(1, array.nbytes)
        )  # a slice of columns is copied, some rows at a time
        for start in range(0, len(array), step):
            hashed.update(np.ascontiguousarray(array[start : start + step]).data)
    return hashed.hexdigest()
