"""The machine: what a figure was made with, as protocols state it, and how its memory is used."""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from embedlab import __version__


def versions(*packages: str) -> dict[str, str]:
    """Versions of embedlab, Python and of those packages that are installed.

    Example:
        >>> sorted(versions("numpy", "no-such-package"))
        ['embedlab', 'numpy', 'python']
    """
    found = {"embedlab": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor_name() -> str:
    """Model of the processor as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def reuse_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    By default glibc gives every large block back to the system and gets it anew, zeroed page by page: a fifth of a
    training step on a CPU, more of an embedding. For processes that end when their work is done.
    """
    with suppress(OSError, AttributeError):  # another C library, another system
        tune = ctypes.CDLL("libc.so.6").mallopt
        tune(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes: blocks below it come from the heap
        tune(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes: free memory at the heap's end that stays
