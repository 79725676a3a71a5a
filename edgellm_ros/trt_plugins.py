"""The TensorRT plugins that native/plugins makes of the project's kernels: their names, and where their library is."""

from __future__ import annotations

from pathlib import Path

from edgellm_ros.errors import UnsupportedError

DOMAIN, VERSION = "edgellm", "1"  # of the operators in ONNX, and as TensorRT's registry has them
ATTENTION, INT4_GEMM, INT8_GEMM = "EdgeLLMAttention", "EdgeLLMInt4Gemm", "EdgeLLMInt8Gemm"
LIBRARY = "libedgellm_plugins.so"
HEAD_DIMS = (64, 80, 96, 128, 256)  # that the attention has kernels for
GROUPS = (16, 32, 64, 128)  # input features that may share a scale


def find_library() -> Path:
    """The plugin library that was built with the native module; raises UnsupportedError where there is none."""
    import edgellm_ros

    for root in edgellm_ros.__path__:
        path = Path(root) / LIBRARY
        if path.is_file():
            return path.resolve()
    raise UnsupportedError(
        f"{LIBRARY} is not in {edgellm_ros.__path__[0]}: it is built with the native module where NvInfer.h is found; "
        "install TensorRT's headers (JetPack has them) or set TENSORRT_ROOT, then build edgellm_ros again"
    )
