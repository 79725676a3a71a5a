"""ONNX Runtime over a bundle's portable graph, which versions before 1.24 (the last for Python 3.10 is 1.23) do not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest


def portable_session(path: Path) -> Any:
    """A session of `decoder.onnx` or one derived from it; the test is skipped where ONNX Runtime is too old for it."""
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < (1, 24):
        pytest.skip(f"onnxruntime {ort.__version__} reads no model of opset 24 (IR version 12); 1.24 and newer do")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
