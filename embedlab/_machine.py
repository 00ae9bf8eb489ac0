"""What a figure was made with: versions and hardware, as protocols state them."""

from __future__ import annotations

import platform
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
