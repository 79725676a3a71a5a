"""How a value is taken from a configuration: checked, and named with its key when it cannot be right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgellm_ros.errors import CheckpointError


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The whole number at `key`, at least 1; `default` stands in for a missing or null one, if there is a default."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"the configuration has no {key}; the model cannot be built without it")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"the configuration's {key} is {value!r}; it must be a whole number of at least 1")
    return value


def positive_float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The finite number above 0 at `key`; `default` stands in for a missing or null one, if there is a default."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"the configuration has no {key}; the model cannot be built without it")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"the configuration's {key} is {value!r}; it must be a number above 0")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """The boolean at `key`; `default` stands in for a missing or null one."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"the configuration's {key} is {value!r}; it must be true or false")
    return value
