"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder; its renames are in the journal
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder beside `folder`, which takes its name only when everything in it is on the disk.

    Args:
        folder: Where the result belongs; absent or empty, unless `replace`.
        replace: Put an existing folder aside and delete it once the new one is in place.

    Yields:
        The folder to fill, mode 0700. When the block raises, nothing of it stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    old = building.with_name(building.name + ".old")
    try:
        yield building
        for path in [*sorted(building.rglob("*"), reverse=True), building]:
            sync(path)
        if replace and folder.exists():
            folder.rename(old)
        elif folder.exists():
            folder.rmdir()  # empty, or this raises
        building.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(building, ignore_errors=True)
        raise
