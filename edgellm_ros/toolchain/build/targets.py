"""Decides what may be built for which GPU: everything that is refused before a build starts."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

from edgellm_ros.bundle import WEIGHTS, Bundle
from edgellm_ros.errors import ToolchainError
from edgellm_ros.config import BUILD_TARGETS, BuildOptions
from edgellm_ros.executors.engines import graph_file
from edgellm_ros.memory import meminfo
from edgellm_ros.trt_plugins import DOMAIN

# Tried with TensorRT-RTX 1.7: int4 fails for sm75 and builds for sm80, int8 and fp16 build for sm75, fp8 fails for sm86 and
# builds for sm89, nvfp4 fails for sm89 and builds for sm120. sm100 is by what the architecture is said to have.
LOWEST = {"int4": 80, "int8": 75, "fp16": 75, "fp8": 89, "nvfp4": 100}  # the first architecture with the format
ATTENTION_SINCE = (10, 15)  # of TensorRT: layers for attention, rope and updates of a KV cache, all three
PLUGINS_SINCE = (10, 3)  # IPluginV3OneBuildV2 and aliased plugin tensors
TENSORRT_REMEDY = (
    "it comes with JetPack (apt install python3-libnvinfer), which a virtual environment sees with "
    "--system-site-packages; elsewhere: pip install tensorrt"
)
_MEMINFO = Path("/proc/meminfo")
MAX_OPSET = 24  # of our graphs, which built; what a builder's own limit is was not tried


def current_target() -> str | None:
    """`sm89` and the like of the first NVIDIA GPU here, asked from the driver; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, number = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in zip(number, (75, 76), strict=True):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"sm{number[0].value}{number[1].value}"


def resolve_target(target: str, here: str | None, bundle: Bundle) -> str:
    """`current` as the GPU that is here; raises ToolchainError for a target that nobody knows, or none to take."""
    if target == "current":
        if here is None:
            raise ToolchainError(f"target current needs an NVIDIA GPU, and there is none here; {_without_gpu(bundle)}")
        return here
    if target not in BUILD_TARGETS:
        raise ToolchainError(f"target is {target!r}; allowed are current, {', '.join(BUILD_TARGETS)}")
    return target


def _without_gpu(bundle: Bundle) -> str:
    """What a machine without a GPU can do: TensorRT-RTX builds there, not for every GPU nor every format."""
    elsewhere = "for a Jetson, build on it"
    try:
        import tensorrt_rtx
    except ImportError:
        return f"{elsewhere}; for an RTX GPU, pip install 'edgellm_ros[rtx]' and name it with --target"
    lowest = max(LOWEST.get(scheme, 0) for scheme in _schemes(bundle))
    known = (name for name in _rtx_targets(tensorrt_rtx) if name in BUILD_TARGETS)
    names = ", ".join(name for name in known if int(name[2:]) >= lowest)
    return f"name the robot's with --target, one of {names}; {elsewhere}" if names else elsewhere


def _rtx_targets(trt: Any) -> list[str]:
    return sorted((n.lower() for n in trt.ComputeCapability.__members__ if n[:2] == "SM"), key=lambda n: int(n[2:]))


def load_builder(wanted: str, target: str, here: str | None) -> tuple[str, Any]:
    """Name and module of the builder for `target`: TensorRT on that very GPU, TensorRT-RTX anywhere else."""
    if wanted == "tensorrt" or (wanted == "auto" and here == target and _has("tensorrt")):
        if here != target:
            raise ToolchainError(f"tensorrt builds for the GPU that it runs on ({here or 'none here'}), not for "
                                 f"{target}; build on the robot, or with --builder tensorrt_rtx")  # fmt: skip
        return "tensorrt", _import("tensorrt", TENSORRT_REMEDY)
    at_home = here == target and wanted == "auto"  # TensorRT itself would be the one to take
    none_here = f"nor is tensorrt here: {TENSORRT_REMEDY}"
    trt = _import("tensorrt_rtx", none_here if at_home else "pip install 'edgellm_ros[rtx]', or build on the robot with TensorRT")
    known = _rtx_targets(trt)
    if target not in known:
        remedy = none_here if at_home else "build on that machine with its TensorRT: edgellm build --target current"
        raise ToolchainError(
            f"TensorRT-RTX {trt.__version__} builds for {', '.join(known)}, not for {target} "
            f"({BUILD_TARGETS.get(target, 'unknown')}); {remedy}"
        )
    return "tensorrt_rtx", trt


def choose_dialect(asked: str, flavour: str, version: str, bundle: Bundle, lora: bool) -> str:
    """standard or plugin, by what this builder has; raises ToolchainError for what it lacks, or the bundle does."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    attends = flavour == "tensorrt_rtx" or numbers >= ATTENTION_SINCE
    since = ".".join(map(str, ATTENTION_SINCE))
    dialect = ("standard" if attends else "plugin") if asked == "auto" else asked
    if dialect == "standard" and not attends:
        raise ToolchainError(f"TensorRT {version} has no attention over a cache, TensorRT {since} has; leave "
                             "--dialect standard out")  # fmt: skip
    if dialect == "plugin" and flavour == "tensorrt_rtx":
        raise ToolchainError("TensorRT-RTX takes no plugins; build on the robot with its TensorRT, or without --dialect plugin")
    if dialect == "plugin" and numbers < PLUGINS_SINCE:
        oldest = ".".join(map(str, PLUGINS_SINCE))
        raise ToolchainError(f"TensorRT {version} gives no plugin a cache to write in place; {oldest} is the oldest that "
                             "does: update JetPack or TensorRT, or use the executor cuda, which needs none")  # fmt: skip
    name = graph_file(lora, dialect)
    if dialect == "plugin" and not bundle.has(name):
        why = "" if attends else f"; TensorRT {version} has no attention over a cache of its own ({since} has)"
        raise ToolchainError(f"{bundle.path} has no {name}{why}; export the model again with --dialect plugin")
    return dialect


def check_cache(options: BuildOptions) -> None:
    """Raise ToolchainError for a cache that the dialect, which was chosen, cannot have."""
    if options.kv_cache == "fp8" and options.dialect != "plugin":
        raise ToolchainError("TensorRT's own attention has no cache in fp8; leave --kv-cache out, or, for TensorRT on the "
                             "robot, add --dialect plugin")  # fmt: skip


def check_formats(bundle: Bundle, target: str) -> None:
    """Raise ToolchainError for a weight format that `target` cannot compute with."""
    for scheme in _schemes(bundle):
        if scheme not in LOWEST:
            raise ToolchainError(f"weights are {scheme}; engines have fused attention in 16 bit only; export with one "
                                 f"of --weights {', '.join(LOWEST)}")  # fmt: skip
        if int(target[2:]) < LOWEST[scheme]:
            raise ToolchainError(f"{target} has no {scheme} (it needs sm{LOWEST[scheme]} or newer); "
                                 "export with --weights int8 or fp16")  # fmt: skip


def _schemes(bundle: Bundle) -> set[str]:
    quant = bundle.manifest.quantization
    return {quant.weights, quant.lm_head or quant.weights, *(form.scheme for form in quant.formats.values())}


def check_resources(bundle: Bundle, available: int | None) -> None:
    """Raise ToolchainError when memory (`available` bytes, None is unknown) or disk is too small for the build."""
    weights = bundle.manifest.files[WEIGHTS].size
    # Measured with TensorRT-RTX: 887 MiB for 84 MiB of int4 weights, 3,194 MiB for 754 MiB (a 1B model). This puts
    # them at 1,103 and 3,782. TensorRT itself, which measures kernels as well, was not measured.
    needed = 4 * weights + 3 * 2**28
    if available is not None and available < needed:
        raise ToolchainError(f"building needs about {needed >> 20} MiB of memory, {available >> 20} MiB are free with "
                             "swap; close other programs, add swap, or build on a larger machine of this "
                             "architecture. The need is an estimate: --ignore-memory starts all the same")  # fmt: skip
    free = shutil.disk_usage(bundle.path).free
    if free < 2 * weights:
        raise ToolchainError(f"the engine needs up to {2 * weights >> 20} MiB in {bundle.path}, {free >> 20} MiB are "
                             "free; make room")  # fmt: skip


def memory_available() -> int | None:
    """Bytes that programs can still take, as Linux says; swap counts, for a build can wait for it."""
    try:
        known = meminfo(_MEMINFO.read_text(encoding="ascii"))
    except OSError:
        return None
    return known["MemAvailable"] + known.get("SwapFree", 0) if "MemAvailable" in known else None


def load_graph(bundle: Bundle, name: str, capacity: int) -> Any:
    """The decoder `name` with its cache capacity fixed, as TensorRT needs it; ToolchainError for a newer opset."""
    import onnx

    model = onnx.load(str(bundle.file(name)), load_external_data=False)
    for opset in model.opset_import:
        if opset.domain == DOMAIN:
            continue
        if opset.domain not in ("", "ai.onnx"):
            raise ToolchainError(f"{name} uses operators of {opset.domain}, which TensorRT has not; export again")
        if opset.version > MAX_OPSET:
            raise ToolchainError(f"{name} has ONNX opset {opset.version}; the builder is known to take up to "
                                 f"{MAX_OPSET}; export the model again with this version")  # fmt: skip
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "capacity":
                dim.dim_value = capacity
    return model


def _has(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _import(name: str, remedy: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ToolchainError(f"the builder {name} cannot be imported ({error}); {remedy}") from error
