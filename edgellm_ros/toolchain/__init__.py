"""The offline half: from a checkpoint to a bundle. Nothing here is imported on a robot."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "quantize_and_save": "quantize.quantize",
    "load_recipe": "quantize.recipe",
}

__all__ = ["quantize_and_save", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name in _HOME:  # loaded when asked for: a command line's help needs neither NumPy nor tokenizers
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
