"""Lazy public names, so that `import embedlab` and opening a gallery cost no torch."""

import importlib
from collections.abc import Callable


def lazy_names(package: str, home: dict[str, str]) -> Callable[[str], object]:
    """Build a module `__getattr__` (PEP 562).

    Args:
        package: The module that gets the names, its `__name__`.
        home: Public name to the submodule (relative, such as ".module") that defines it; a name that stands for a
            submodule itself maps to "".
    """

    def __getattr__(name: str) -> object:  # noqa: N807
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has: {', '.join(sorted(home))}.")
        if not home[name]:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(home[name], package), name)

    return __getattr__
