"""Results as JSON."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """What JSON knows: arrays as lists, undefined figures (NaN) as null, paths and other objects as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
