"""Fixtures that more than one room's tests use."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The networks of the tests are tiny: threads only wait for one another. Before torch is loaded, also in subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Folder of a real data set by name; the test is skipped, and says so, where it is absent."""
    root = Path(os.environ.get("EMBEDLAB_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(
                f"REAL DATA ABSENT: no folder {root / name}; point EMBEDLAB_DATA to the folder that holds {name}."
            )
        return root / name

    return find


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where thousands of small files are quickly made; on the disk where there is none."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)
