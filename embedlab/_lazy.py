"""Lazy public names, so that `import embedlab` and opening a gallery cost no torch."""

import importlib
from collections.abc import Callable


def lazy_names(package: str, homes: dict[str, list[str]]) -> Callable[[str], object]:
    """Build a module `__getattr__` (PEP 562).

    The module names the same things once more under `if TYPE_CHECKING:`, for type checkers and editors; a test compares
    the two lists.

    Args:
        package: The module that gets the names, its `__name__`.
        homes: Submodule (relative, such as ".module") to the names that it defines. Under "" stand names of submodules.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has: {', '.join(sorted(home))}.")
        if not home[name]:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(home[name], package), name)

    return __getattr__
