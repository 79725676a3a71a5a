"""Tiny models whose heads have 64 channels, which the plugins' kernels have: those of tiny.py are smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from edgellm_ros.bundle import Bundle
from edgellm_ros.toolchain.export import export_bundle


def export_64(root: Path, kind: str, weights: str, **options: Any) -> Bundle:
    """A bundle with decoder.plugin.onnx of tiny's `kind`, its heads widened."""

    def config() -> Any:
        made = tiny.CONFIGS[kind]()
        made.head_dim = 64
        return made

    wide = f"{kind}_64"
    tiny.CONFIGS[wide] = config
    try:
        tiny.save_checkpoint(wide, root / "checkpoint")
    finally:
        del tiny.CONFIGS[wide]
    return export_bundle(root / "checkpoint", root / "bundle", weights=weights, dialect="plugin", **options)
