"""What `edgellm doctor` looks at: each check names a thing, says what was found, and how to get it if it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_ros.cli.check import Check, State, read_text
from edgellm_ros.cli.engine_checks import check_engines, check_tensorrt
from edgellm_ros.cli.gpu_checks import check_gpus, kernels_reason, plan_on_gpu
from edgellm_ros.cli.inspect import human_bytes
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import BundleError
from edgellm_ros.memory import available_memory

if TYPE_CHECKING:
    from edgellm_ros.bundle import Bundle

BASE = ("numpy", "tokenizers", "jinja2", "onnxruntime", "safetensors", "pyyaml", "rich")
TOOLCHAIN = ("onnx", "gguf", "ml_dtypes", "threadpoolctl")
MINIMUM_PYTHON = (3, 10)
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")


def all_checks(bundle: Path | None = None) -> Iterator[Check]:
    """Every check, one after the other; a `bundle` is opened, verified and compared with the memory."""
    yield check_python()
    yield from (check_package("base", name, State.FAILED, "pip install edgellm_ros") for name in BASE)
    yield from (check_package("toolchain", n, State.MISSING, "pip install 'edgellm_ros[toolchain]'") for n in TOOLCHAIN)
    remedy = "pip install 'edgellm_ros[quantize]' (only for edgellm quantize)"
    yield check_package("toolchain", "nvidia-modelopt", State.MISSING, remedy)
    yield from check_ros(os.environ)
    yield from check_compiler()
    yield from check_gpus()
    yield from check_tensorrt()
    yield check_cpu(read_text(Path("/proc/cpuinfo")))
    available = _memory_available()
    yield Check("machine", "free memory", State.OK, human_bytes(available) if available else "unknown")
    if bundle is not None:
        yield from check_bundle(bundle, available)


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """Whether this Python is new enough."""
    text = ".".join(map(str, version))
    if version < MINIMUM_PYTHON:
        needed = ".".join(map(str, MINIMUM_PYTHON))
        return Check("base", "Python", State.FAILED, text, f"use Python {needed} or newer")
    return Check("base", "Python", State.OK, f"{text} ({sys.executable})")


def check_package(group: str, name: str, otherwise: State, remedy: str) -> Check:
    """Whether a distribution is installed; `otherwise` is the state when it is not."""
    try:
        return Check(group, name, State.OK, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(group, name, otherwise, "not installed", remedy)


def check_ros(environment: os._Environ[str] | dict[str, str]) -> Iterator[Check]:
    """Whether ROS 2 is there (sourced or as wheels), and this package's interfaces are built."""
    distribution = environment.get("ROS_DISTRO", "")
    rclpy = importlib.util.find_spec("rclpy")
    if rclpy is None:
        remedy = "source /opt/ros/DISTRO/setup.bash, or install the ROS wheels as `make demo` does"
        found = f"{distribution} is sourced, but rclpy cannot be found" if distribution else "none"
        yield Check("ROS", "rclpy", State.MISSING, found, remedy)
    else:
        source = f"{distribution}, sourced" if environment.get("AMENT_PREFIX_PATH") else "wheels"
        yield Check("ROS", "rclpy", State.OK, f"{source} ({rclpy.origin})")
    built = [kind for kind in ("msg", "srv", "action") if importlib.util.find_spec(f"edgellm_ros.{kind}") is not None]
    if len(built) == 3:
        yield Check("ROS", "interfaces", State.OK, "built")
    else:
        yield Check(
            "ROS",
            "interfaces",
            State.MISSING,
            "not built",
            "colcon build and source install/setup.bash, or `make demo`",
        )


def check_compiler() -> Iterator[Check]:
    """What building the interfaces and the native module needs."""
    tools = {"C++ compiler": ("c++", "g++", "clang++"), "CMake": ("cmake",), "CUDA compiler": ("nvcc",)}
    remedies = {
        "C++ compiler": "apt install g++ (only for building the ROS interfaces)",
        "CMake": "apt install cmake, or pip install cmake (only for building the ROS interfaces)",
        "CUDA compiler": "install the CUDA toolkit (only for building the GPU executors)",
    }
    for name, commands in tools.items():
        more = _cuda_places() if name == "CUDA compiler" else []
        places = os.pathsep.join([os.environ.get("PATH", os.defpath), *more])
        path = next(filter(None, (shutil.which(command, path=places) for command in commands)), None)
        if path:
            yield Check("build", name, State.OK, path)
        else:
            yield Check("build", name, State.MISSING, "not found", remedies[name])
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if header.exists():
        yield Check("build", "Python headers", State.OK, str(header.parent))
    else:
        remedy = f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev (only for building)"
        yield Check("build", "Python headers", State.MISSING, f"no {header}", remedy)


def check_cpu(cpuinfo: str) -> Check:
    """The processor, and those of its features that make quantised models fast."""
    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    known = [flag for flag in CPU_FLAGS if flag in have]
    name = model.group(1) if model else platform.processor() or platform.machine()
    found = f"{name}, {os.cpu_count()} logical; {' '.join(known) or 'no feature flags known'}"
    if have and platform.machine() == "x86_64" and "avx2" not in have:
        return Check("machine", "CPU", State.MISSING, found, "without AVX2 decoding is several times slower")
    return Check("machine", "CPU", State.OK, found)


def _cuda_places() -> list[str]:
    """Where a CUDA toolkit is outside PATH, as on a Jetson; building looks there too."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    return [*(f"{home}/bin" for home in homes if home), "/usr/local/cuda/bin"]


def _memory_available() -> int:
    """Bytes that programs, or this container, can still take; 0 where Linux does not say."""
    try:
        return available_memory()
    except OSError:
        return 0


def check_bundle(path: Path, available: int, config: EngineConfig | None = None) -> Iterator[Check]:
    """Whether a bundle opens with every file as exported, and fits with the engine's defaults.

    `available` bytes where the CPU will run it; what is free on the GPU where its kernels, or an engine, will.
    """
    from edgellm_ros.bundle import Bundle

    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        yield Check("bundle", "files", State.FAILED, str(error), "copy the whole bundle again, or export again")
        return
    manifest = bundle.manifest
    yield Check("bundle", "files", State.OK, f"{manifest.model.name}: {len(manifest.files)} files as exported")
    config = config or EngineConfig()
    engine, engine_memory = check_engines(bundle, config)
    reason = kernels_reason(bundle)
    if reason:
        yield _check_kernels(reason, config, engine_memory is not None)
    gpu = plan_on_gpu(bundle, config) if not reason else engine_memory
    yield _check_memory(bundle, available, config, gpu, bool(reason))
    yield engine


def _check_kernels(reason: str, config: EngineConfig, has_engine: bool) -> Check:
    """What the executor `auto` does where the kernels do not run a bundle; an error only where they were asked for."""
    found = f"not used for this bundle: {reason}"
    if config.executor == "cuda":
        return Check("bundle", "kernels", State.FAILED, found, "use the executor onnxruntime or auto")
    instead = "tensorrt runs the engine" if has_engine else "onnxruntime runs it on the CPU"
    return Check("bundle", "kernels", State.MISSING, found, f"not needed: {instead}")


def _check_memory(
    bundle: Bundle, available: int, config: EngineConfig, gpu: tuple[int, int] | None, gpu_is_idle: bool
) -> Check:
    from edgellm_ros.bundle import DECODER, DECODER_ORT

    model = bundle.manifest.model
    capacity = config.max_context or min(model.max_context, 4096)
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4 * capacity * config.max_slots  # fp32
    graphs = (DECODER, DECODER_ORT)
    weights = sum(entry.size for name, entry in bundle.manifest.files.items() if name not in graphs)
    slots = f"{config.max_slots} slots of {capacity} tokens"
    needed, remedy = weights + cache, "load it with a smaller max_slots or max_context"
    found = f"about {human_bytes(weights)} + {human_bytes(cache)} of KV cache ({slots}), {human_bytes(available)} free"
    if gpu_is_idle:
        found += " on the CPU"
    if gpu is not None:
        needed, available = gpu
        found = f"about {human_bytes(needed)} of the GPU's memory ({slots}), {human_bytes(available)} free"
        remedy += ", or with kv_cache fp8"
    if bundle.manifest.quantization.weights != "int4":
        remedy += ", or export with --weights int4"
    if available and needed > available:
        return Check("bundle", "memory", State.FAILED, found, remedy)
    return Check("bundle", "memory", State.OK, found)
