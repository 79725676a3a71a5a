"""The native module for a benchmark, or one line that says why there is none."""

from __future__ import annotations

from typing import Any

from edgellm_ros import native
from edgellm_ros.errors import UnsupportedError

__all__ = ["load_module"]


def load_module() -> Any:
    """`native.load()`; leaves the process with its reason and remedy, and no traceback, where it fails."""
    try:
        return native.load()
    except UnsupportedError as error:
        raise SystemExit(f"no GPU: {error}") from error
