"""The one importer of `_native`, the compiled CUDA module; says why it, or a GPU that it can use, is absent."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import logging
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgellm_ros import __version__
from edgellm_ros.errors import DeviceError, UnsupportedError

_log = logging.getLogger(__name__)

MIN_COMPUTE_CAPABILITY = (8, 0)
GPU_FAILS = "the GPU fails"  # begins a reason that is an error of the device, not something that is missing
SICK_REMEDY = "nvidia-smi shows what holds its memory, dmesg what its driver says"
_BUILD = "make native, or pip install or colcon build again, on this machine"
_TEGRA = {(7, 2), (8, 7), (10, 1), (11, 0)}  # run only code that was compiled for exactly them (or PTX)


@functools.cache
def import_module() -> tuple[Any, str]:
    """(the module or None, why it is None). Importing needs no GPU and no CUDA library."""
    try:
        module = importlib.import_module("edgellm_ros._native")
    except ModuleNotFoundError as error:
        if error.name != "edgellm_ros._native":
            return None, f"the native module cannot be loaded: {error}"
        others = _other_builds()
        if others:
            here = importlib.machinery.EXTENSION_SUFFIXES[0]
            return (
                None,
                f"the native module was built for another Python or processor ({others}; this one needs "
                f"_native{here}): {_BUILD}",
            )
        return None, f"the native module is not built; where there is a CUDA toolkit: {_BUILD}"
    except ImportError as error:
        return None, f"the native module cannot be loaded: {error}; build it again: {_BUILD}"
    built, here = getattr(module, "VERSION", __version__), __version__
    if built != here:  # the source tree keeps the module that an older checkout built
        return None, f"the native module was built from edgellm_ros {built}, and this is {here}: {_BUILD}"
    return module, ""


def unavailable_reason() -> str:
    """Why the native module cannot be used here, with the remedy; empty when it can. Begins with GPU_FAILS if so."""
    module, reason = import_module()
    if module is None:
        return reason
    count, reason = module.count_devices()
    if not count:
        return f"no NVIDIA GPU: {reason}"
    try:
        info: dict[str, Any] = module.device_info()
    except DeviceError as error:
        return f"{GPU_FAILS}: {error}; {SICK_REMEDY}"
    reason = capability_reason(module, info["compute_capability"])
    return f"{info['name']} {reason}" if reason else ""


def refusal(reason: str, message: str) -> DeviceError | UnsupportedError:
    """The error that says `message` for such a reason."""
    return (DeviceError if reason.startswith(GPU_FAILS) else UnsupportedError)(message)


def capability_reason(module: Any, capability: tuple[int, int]) -> str:
    """Why a GPU of this compute capability cannot run `module`'s kernels, as the end of a sentence; empty if it can."""
    have = ".".join(map(str, capability))
    if tuple(capability) < MIN_COMPUTE_CAPABILITY:
        need = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
        return f"has compute capability {have}; the kernels need {need} or newer: use the CPU executor"
    if runs_on(module.ARCHITECTURES, module.PTX_ARCHITECTURE, capability):
        return ""
    arch = "90a" if tuple(capability) == (9, 0) else have.replace(".", "")
    return (
        f"has compute capability {have}, but the native module was compiled for {', '.join(module.ARCHITECTURES)}: "
        f"EDGELLM_CUDA_ARCHS={arch} make native, or the same before pip install, or "
        f"colcon build --cmake-args -DEDGELLM_CUDA_ARCHS={arch}"
    )


def runs_on(architectures: Sequence[str], ptx: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures` ("80", "90a"), or the PTX of `ptx` ("" is none), runs on a GPU.

    Machine code runs on its own capability and on later ones of the same major version, on a Tegra or with a suffix
    only on its own; PTX runs on its own and all later ones (CUDA C++ Programming Guide, "Compute Capabilities").
    """
    major, minor = capability
    for name in architectures:
        exact = not name.isdigit() or (major, minor) in _TEGRA
        built = divmod(int(name.rstrip("abcdefgh")), 10)
        if built == (major, minor) or (not exact and built not in _TEGRA and built[0] == major and built[1] < minor):
            return True
    return bool(ptx) and divmod(int(ptx), 10) <= (major, minor)


def load() -> Any:
    """The module, ready to compute. Raises UnsupportedError, or DeviceError for a GPU that fails, with the reason."""
    reason = unavailable_reason()
    if reason:
        raise refusal(reason, reason)
    module, _ = import_module()
    _preload_cublaslt(module.CUDA_MAJOR)
    if module.FAST_COMPILE:
        _log.warning("the CUDA kernels were compiled without optimisation, for tests; `make native` builds fast ones")
    return module


def products_reason(module: Any) -> str:
    """Why `module` has no cuBLASLt to read prompts with; empty when it has. Needs no GPU."""
    _preload_cublaslt(module.CUDA_MAJOR)
    reason: str = module.products_reason()
    return reason


def products_remedy(module: Any, reason: str) -> str:
    """What brings `module` the cuBLASLt that it has not, for `reason`."""
    if "no cublasLt.h" in reason:  # another library would not help
        return "build the module again where the CUDA toolkit has cuBLAS"
    package = "nvidia-cublas-cu12" if module.CUDA_MAJOR == 12 else "nvidia-cublas"
    return f"install the CUDA toolkit, or pip install {package}"


def tensorrt_candidates(module: Any) -> list[str]:
    """Names and paths under which TensorRT's runtime is looked for, in turn; EDGELLM_NVINFER names the only one.

    The full library first: the dispatch and the lean one load only engines that were built to be version compatible.
    """
    chosen = os.environ.get("EDGELLM_NVINFER")
    if chosen:
        return [chosen]
    major = module.TENSORRT_HEADERS.partition(".")[0]
    candidates = []
    for part in ("", "_dispatch", "_lean"):
        name = f"libnvinfer{part}.so.{major}"
        candidates.append(name)
        for root in _package_roots():  # NVIDIA's Python wheels
            candidates += map(str, sorted(Path(root).glob(f"tensorrt{part}_libs/{name}")))
    return candidates


def find_tensorrt(module: Any) -> tuple[str, tuple[int, ...], str]:
    """(path, version, why it cannot be used) of TensorRT's runtime library. Needs no GPU and creates nothing."""
    if not module.TENSORRT_HEADERS:
        reason: str = module.find_tensorrt([])[2]
        return "", (), reason
    path, version, reason = module.find_tensorrt(tensorrt_candidates(module))
    if not path and not os.environ.get("EDGELLM_NVINFER"):
        reason = "libnvinfer was not found; JetPack has it: apt install tensorrt, or name it in EDGELLM_NVINFER"
    return path, tuple(version), reason


def _package_roots() -> list[str]:
    """Directories that packages are imported from: a user's own, and those beside a virtual environment, among them."""
    roots = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    return [root for root in roots if root and Path(root).is_dir()]  # "" is wherever this was started


@functools.cache
def _preload_cublaslt(cuda_major: int) -> None:
    """Load cuBLASLt out of NVIDIA's Python wheels where the system has none: `_native` then finds it by its name."""
    name = f"libcublasLt.so.{cuda_major}"
    try:
        ctypes.CDLL(name)
        return
    except OSError:
        pass
    for root in _package_roots():
        for path in sorted(Path(root).glob(f"nvidia/*/lib/{name}")):
            try:
                ctypes.CDLL(str(path))
                return
            except OSError as error:
                _log.warning("%s cannot be loaded: %s", path, error)


def _other_builds() -> str:
    """Compiled modules that this Python cannot load."""
    import edgellm_ros

    return ", ".join(str(path) for root in edgellm_ros.__path__ for path in sorted(Path(root).glob("_native*.so")))
