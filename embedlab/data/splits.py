"""Who is trained on, who calibrates, who tests: splits that depend on names and a seed, never on the order of rows."""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import os
from collections.abc import Sequence

import numpy as np

from embedlab.data.sources import Source

ROLES = ("train", "calibrate", "test")
Roles = np.ndarray[tuple[int], np.dtype[np.str_]]
Fractions = tuple[float, float, float]

logger = logging.getLogger("embedlab")


def split_by_class(labels: Sequence[str], fractions: Fractions = (0.5, 0.25, 0.25), *, seed: int = 0) -> Roles:
    """Give every class, whole, to one role: the test identities are people the network has never seen.

    The order of the classes comes from a hash of seed and name, so that neither the order of the rows nor the version
    of a library changes the split.

    Args:
        labels: N labels.
        fractions: Shares *of the classes* for train, calibrate and test; they add up to 1, a share of 0 is allowed.
        seed: Another seed, another split.

    Returns:
        (N,) array of "train", "calibrate" or "test".

    Raises:
        ValueError: If the fractions are no shares, or a role with a share above 0 would get no class.

    Example:
        >>> split_by_class(["ant", "bee", "cow", "dog", "ant"]).tolist()
        ['calibrate', 'test', 'train', 'train', 'calibrate']
    """
    return _by_name(labels, fractions, seed, kind="class", plural="classes")


def split_by_group(groups: Sequence[str], fractions: Fractions = (0.5, 0.25, 0.25), *, seed: int = 0) -> Roles:
    """Give every group, whole, to one role: pictures of one shelf, patient or recording do not leak from role to role.

    Args:
        groups: N names of groups, such as `source.column("group")`.
        fractions: Shares *of the groups* for train, calibrate and test.
        seed: Another seed, another split.

    Returns:
        (N,) array of roles, see `split_by_class`.

    Raises:
        ValueError: As in `split_by_class`, or if a sample has no group.
    """
    return _by_name(groups, fractions, seed, kind="group", plural="groups")


def folds_by_class(labels: Sequence[str], folds: int = 4, *, seed: int = 0) -> list[Roles]:
    """Several splits by class in which every class is a test class exactly once: for data sets of few identities.

    Classes are dealt out to the folds like cards, in the order of `split_by_class`. In split i the classes of fold i
    are the test, those of the next fold calibrate (the last fold's next is the first), and all others train.

    Args:
        labels: N labels.
        folds: How many, at least 3.
        seed: Another seed, other folds.

    Returns:
        As many (N,) arrays of roles.

    Raises:
        ValueError: Fewer than 3 folds, or fewer classes than folds.

    Example:
        >>> [roles.tolist() for roles in folds_by_class(["ant", "bee", "cow"], 3)][0]
        ['calibrate', 'train', 'test']
    """
    if "" in labels:
        raise ValueError(f"Sample {list(labels).index('')} has no class; fill in the column or split by sample.")
    ordered = sorted(set(labels), key=lambda name: _hash(name, seed))
    if not 3 <= folds <= len(ordered):
        raise ValueError(
            f"folds_by_class needs 3 folds or more, for test, calibrate and train, and a class in each; got {folds} "
            f"folds of {len(ordered)} classes."
        )
    place = {name: number % folds for number, name in enumerate(ordered)}
    own = np.array([place[label] for label in labels])
    roles = [np.where(own == f, "test", np.where(own == (f + 1) % folds, "calibrate", "train")) for f in range(folds)]
    return [np.asarray(split, dtype=f"U{max(map(len, ROLES))}") for split in roles]


def split_by_sample(
    names: Sequence[str],
    labels: Sequence[str] | None = None,
    *,
    fractions: Fractions = (0.5, 0.25, 0.25),
    seed: int = 0,
) -> Roles:
    """Give every sample to a role: known classes, unseen pictures. For classification, not for open-set questions.

    Args:
        names: N unique names of samples; the split hangs on them.
        labels: N labels: the split is then stratified, each class is shared out as near to the fractions as whole
            samples allow. None: samples are shared out without regard to classes.
        fractions: Shares of the samples for train, calibrate and test.
        seed: Another seed, another split.

    Returns:
        (N,) array of roles, see `split_by_class`.

    Raises:
        ValueError: If the fractions are no shares, names repeat, lengths differ, or a role with a share above 0 would
            get no sample.
    """
    _check_fractions(fractions)
    if len(set(names)) < len(names):
        raise ValueError(f"split_by_sample needs unique names, got {len(names)} names of {len(set(names))} samples.")
    if labels is not None and len(labels) != len(names):
        raise ValueError(f"split_by_sample got {len(names)} names but {len(labels)} labels; they go sample by sample.")
    strata: dict[str, list[int]] = {}
    for row, label in enumerate(labels if labels is not None else [""] * len(names)):
        strata.setdefault(label, []).append(row)
    roles = np.empty(len(names), dtype=f"U{max(map(len, ROLES))}")
    for label, rows in strata.items():
        ordered = sorted(rows, key=lambda row: _hash(names[row], seed))
        roles[ordered] = np.repeat(ROLES, _share_out(len(rows), fractions, _hash(label, seed)))
    _check_filled(
        roles, fractions, f"{len(names)} samples of {len(strata)} classes" if labels else f"{len(names)} samples"
    )
    return roles


def _by_name(names: Sequence[str], fractions: Fractions, seed: int, *, kind: str, plural: str) -> Roles:
    _check_fractions(fractions)
    if "" in names:
        raise ValueError(f"Sample {list(names).index('')} has no {kind}; fill in the column or split by sample.")
    ordered = sorted(set(names), key=lambda name: _hash(name, seed))
    shares = np.repeat(ROLES, _share_out(len(ordered), fractions, ""))
    _check_filled(shares, fractions, f"{len(ordered)} {plural}")
    role = dict(zip(ordered, shares, strict=True))
    return np.array([role[name] for name in names])


def _hash(name: str, seed: int) -> str:
    return hashlib.blake2b(f"{seed}:{name}".encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _share_out(count: int, fractions: Fractions, key: str) -> list[int]:
    """Whole numbers near the fractions that add up to count (largest remainder); key breaks ties between roles."""
    exact = [round(fraction * count, 9) for fraction in fractions]  # 0.1 * 30 is not 3
    shares = [math.floor(value) for value in exact]
    order = sorted(range(len(ROLES)), key=lambda i: (shares[i] - exact[i], _hash(ROLES[i] + key, 0) if key else i))
    for i in order[: count - sum(shares)]:
        shares[i] += 1
    return shares


def _check_fractions(fractions: Fractions) -> None:
    if len(fractions) != len(ROLES) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"fractions must be three shares ({', '.join(ROLES)}), none negative, that add up to 1; "
            f"got {fractions}, sum {sum(fractions):.4g}."
        )


def _check_filled(roles: Roles, fractions: Fractions, what: str) -> None:
    for role, fraction in zip(ROLES, fractions, strict=True):
        if fraction > 0 and role not in roles:
            raise ValueError(
                f"{what} at fractions {fractions} leave {role!r} empty: add data, give it a larger fraction, or 0 if "
                "it is not needed."
            )


def write_split(path: str | os.PathLike[str], source: Source, roles: Sequence[str] | Roles) -> None:
    """Write a source with its roles as a CSV manifest: path, label, split, then the other columns.

    `open_source` reads it back (for a source of files), `read_split` gives the roles to any source of the same samples.
    Paths below the manifest's folder are written relative to it, others absolute. The file appears whole or not at all.

    Args:
        path: The CSV file; its folder is made if need be, an older file is replaced.
        source: N samples; a column "split" that it has is replaced.
        roles: N of "train", "calibrate", "test".

    Raises:
        ValueError: If roles do not fit the source, or a file name cannot be written as UTF-8.
    """
    target = os.path.abspath(path)
    _check_roles(roles, len(source), os.fspath(path))
    others = {name: values for name, values in source.columns.items() if name != "split"}
    columns = [
        [_written_path(name, os.path.dirname(target)) if source.pixels is None else name for name in source.names],
        *([] if source.labels is None else [source.labels]),
        [str(role) for role in roles],
        *others.values(),
    ]
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.{os.getpid()}.part"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", *([] if source.labels is None else ["label"]), "split", *others])
            writer.writerows(zip(*columns, strict=True))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: a file name is not UTF-8 text ({error.object!r}); rename that file.") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_split(path: str | os.PathLike[str], source: Source) -> Roles:
    """Read the roles of a source's samples from a file of `write_split`.

    Args:
        path: The CSV file.
        source: N samples, in any order; samples that only the file knows are left aside.

    Returns:
        (N,) array of roles.

    Raises:
        ValueError: If the file is no split, or does not know one of the samples.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise ValueError(f"No split file {name}; write one with write_split.")
    with open(name, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"path", "split"} <= set(reader.fieldnames or []):
            raise ValueError(f"{name} is no split: expected the columns path and split, got {reader.fieldnames}.")
        written = {row["path"]: row["split"] for row in reader}
    if source.pixels is None:
        folder = os.path.dirname(os.path.abspath(name))
        written = {os.path.normpath(os.path.join(folder, key)): role for key, role in written.items()}
        keys = [os.path.abspath(sample) for sample in source.names]
    else:
        keys = source.names
    absent = [key for key in keys if key not in written]
    if absent:
        raise ValueError(
            f"{name} gives no role to {len(absent)} of {len(keys)} samples, such as {absent[0]}: was it written for "
            "other data, or did images come in since? Write the split anew."
        )
    if len(written) > len(keys):
        logger.info("%s: %d samples are not in the source and left aside", name, len(written) - len(keys))
    roles = np.array([written[key] for key in keys])
    _check_roles(roles, len(source), name)
    return roles


def _written_path(name: str, folder: str) -> str:
    full = os.path.abspath(name)
    inside = os.path.relpath(full, folder)
    return full if inside.startswith(os.pardir) else inside


def _check_roles(roles: Sequence[str] | Roles, count: int, name: str) -> None:
    if len(roles) != count:
        raise ValueError(f"{name}: {count} samples but {len(roles)} roles; they go sample by sample.")
    unknown = sorted({str(role) for role in roles} - set(ROLES))
    if unknown:
        raise ValueError(f"{name}: {unknown[0]!r} is no role; there are {', '.join(ROLES)}.")
