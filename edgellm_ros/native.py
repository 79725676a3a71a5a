"""The one importer of `_native`, the compiled CUDA module; says why it, or a GPU that it can use, is absent."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import sysconfig
from pathlib import Path
from typing import Any

from edgellm_ros.errors import UnsupportedError

_log = logging.getLogger(__name__)

MIN_COMPUTE_CAPABILITY = (8, 0)
_BUILD = "cmake -S native -B build/native && cmake --build build/native"


@functools.cache
def import_module() -> tuple[Any, str]:
    """(the module or None, why it is None). Importing needs no GPU and no CUDA library."""
    try:
        return importlib.import_module("edgellm_ros._native"), ""
    except ModuleNotFoundError:
        return None, f"the native module is not built (where there is a CUDA toolkit: {_BUILD})"
    except ImportError as error:
        return None, f"the native module cannot be loaded: {error}; build it again on this machine ({_BUILD})"


def unavailable_reason() -> str:
    """Why the native module cannot be used here, with the remedy; empty when it can."""
    module, reason = import_module()
    if module is None:
        return reason
    count, reason = module.count_devices()
    if not count:
        return f"no NVIDIA GPU: {reason}"
    info: dict[str, Any] = module.device_info()
    if tuple(info["compute_capability"]) < MIN_COMPUTE_CAPABILITY:
        have = ".".join(map(str, info["compute_capability"]))
        need = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
        return f"{info['name']} has compute capability {have}; the kernels need {need}"
    return ""


def load() -> Any:
    """The module, ready to compute. Raises UnsupportedError with the reason and the remedy."""
    reason = unavailable_reason()
    if reason:
        raise UnsupportedError(reason)
    module, _ = import_module()
    _preload_cublaslt(module.CUDA_MAJOR)
    return module


@functools.cache
def _preload_cublaslt(cuda_major: int) -> None:
    """Load cuBLASLt out of NVIDIA's Python wheels where the system has none: `_native` then finds it by its name."""
    name = f"libcublasLt.so.{cuda_major}"
    try:
        ctypes.CDLL(name)
        return
    except OSError:
        pass
    for root in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in sorted(Path(root).glob(f"nvidia/*/lib/{name}")):
            try:
                ctypes.CDLL(str(path))
                return
            except OSError as error:
                _log.warning("%s cannot be loaded: %s", path, error)
