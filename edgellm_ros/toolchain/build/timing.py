"""TensorRT's timing cache: what it measured on this GPU, kept beside the engines so that the next build is faster.

It belongs to a version and a GPU; one that TensorRT does not accept is replaced. TensorRT-RTX has none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def cache_path(engines: Path, version: str, target: str) -> Path:
    """The cache's file in the directory of a bundle's engines."""
    return engines / f"timing-{version}-{target}.cache"


def load(config: Any, engines: Path, version: str, target: str) -> Any:
    """Give the builder's `config` the cache that is there, or an empty one; returns it."""
    path = cache_path(engines, version, target)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def save(cache: Any, engines: Path, version: str, target: str) -> None:
    """Write the cache, whole or not at all."""
    path = cache_path(engines, version, target)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(cache.serialize())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
