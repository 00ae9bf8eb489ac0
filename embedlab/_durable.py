"""Folders that appear whole or not at all, and files."""

from __future__ import annotations

import ctypes
import glob
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

    What a process left that was killed while it filled one for the same place is deleted first.

    Args:
        folder: Where the result belongs; absent or empty, unless `replace`.
        replace: Put an existing folder aside and delete it once the new one is in place.

    Yields:
        The folder to fill, mode 0700. When the block raises, nothing of it stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    building, lock = _begun(folder)
    try:
        yield building
        put_in_place(building, folder, replace=replace)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    finally:
        _release(lock)


def sweep(folder: Path) -> None:
    """Delete what `new_folder` left in processes that were killed; those that live hold a lock, and theirs stays."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.new-*"):
        if (lock := _locked(path, wait=False)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            _release(lock)


def _begun(folder: Path) -> tuple[Path, int | None]:
    """An empty folder to fill, with its lock."""
    while True:
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        lock = _locked(building, wait=True)
        if building.exists():
            return building, lock
        _release(lock)  # swept by another process before it was locked


def _locked(folder: Path, *, wait: bool) -> int | None:
    """A lock that the system drops when the process dies; None where another has it, or folders cannot be locked."""
    if os.name == "nt":
        return None
    import fcntl

    lock = None
    try:
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        _release(lock)
        return None
    return lock


def _release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def put_in_place(building: Path, folder: Path, *, replace: bool = False) -> None:
    """Give a folder that is full its name.

    Args:
        building: On the same file system as `folder`.
        folder: Absent or empty, unless `replace`.
        replace: Delete an existing folder once the new one has its place.
    """
    for path in [*sorted(building.rglob("*"), reverse=True), building]:
        sync(path)
    if replace and folder.exists():
        exchange(building, folder)
        sync(folder.parent)
        shutil.rmtree(building, ignore_errors=True)
        return
    if folder.exists():
        folder.rmdir()  # empty, or this raises
    building.rename(folder)
    sync(folder.parent)


def exchange(first: Path, second: Path) -> None:
    """Let two folders of one file system swap their names.

    In one step where the system can (Linux), so that both names stand for a whole folder at every moment. Elsewhere by
    three renames, and `finish_exchange` repairs what was cut off in between.
    """
    if _swapped(first, second):
        return
    spare = _spare(first)
    second.rename(spare)
    try:
        first.rename(second)
    except BaseException:
        spare.rename(second)
        raise
    spare.rename(first)


def finish_exchange(first: Path, second: Path) -> None:
    """Bring an exchange that was cut off to one of its ends: both names stand for a whole folder again."""
    spare = _spare(first)
    if spare.exists():
        spare.rename(first if second.exists() else second)


def _spare(first: Path) -> Path:
    return first.with_name(f".{first.name}.exchanged")


def _swapped(first: Path, second: Path) -> bool:
    """By one system call; False where it is missing, or the file system does not know it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(first), here, os.fsencode(second), exchanging) == 0)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file that takes its name only when all of it is on the disk, in place of any before.

    Yields:
        The file to write, beside `path`. When the block raises, nothing of it stays.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield fresh
        sync(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Replace a file so that it holds the old content or the new one, whenever the process or the machine dies."""
    with new_file(path) as fresh:
        fresh.write_bytes(content)
