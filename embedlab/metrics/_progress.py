"""Long evaluations that go on where they were broken off."""

import os
import time
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from embedlab.metrics._arrays import Floats

SAVE_SECONDS = 60.0


class Progress:
    """Arrays that are filled step by step, and a file of them.

    Args:
        path: The file; it need not exist.
        values: Name to array; filled in place with what the file holds.
        digest: Of everything that decides the values.
        total: How many entries will be filled.
    """

    def __init__(self, path: Path, values: dict[str, Floats], digest: str, total: int) -> None:
        self.path, self.values, self.digest, self.total = path, values, digest, total
        self.done = 0
        self._saved = time.monotonic()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                found = str(stored["digest"])
                if found == digest and set(stored.files) == {"digest", "done", *values}:
                    for name, array in values.items():
                        array[:] = stored[name]
                    self.done = int(stored["done"])
                    return
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} is not a readable state file ({error}): damaged? Delete it to start anew."
            ) from None
        raise ValueError(
            f"{path} belongs to an evaluation of other vectors, labels, groups or k: a state file of another run? "
            "Give another path, or delete it to start anew."
        )

    def advance(self, count: int) -> None:
        """Count `count` more entries as filled, and save from time to time and at the end."""
        self.done += count
        if self.done < self.total and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        fields: dict[str, Any] = {"digest": np.array(self.digest), "done": np.array(self.done), **self.values}
        part = self.path.with_name(self.path.name + ".part")
        with part.open("wb") as file:
            np.savez(file, **fields)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)
        self._saved = time.monotonic()
