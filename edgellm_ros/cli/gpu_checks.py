"""What `edgellm doctor` says of the GPU: card, driver and the project's kernels, what is used, and why not.

cuda-python (the extra `cuda`) tells most; without it the native module is asked, and without that /proc.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_ros import native
from edgellm_ros.benchmark.machine import driver_version
from edgellm_ros.cli.check import Check, State, read_text
from edgellm_ros.cli.inspect import human_bytes
from edgellm_ros.errors import DeviceError
from edgellm_ros.memory import free_device_memory

if TYPE_CHECKING:
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.config import EngineConfig

_CUDA_PYTHON = "pip install 'edgellm_ros[cuda]' to see compute capability and memory"
_CHOICE = "CUDA_VISIBLE_DEVICES"
_PROC = Path("/proc/driver/nvidia")
_TEGRA = Path("/etc/nv_tegra_release")


@dataclass(frozen=True)
class Gpu:
    """One card. Bytes; 0 where the source does not say."""

    name: str
    capability: tuple[int, int] | None = None
    total_bytes: int = 0
    free_bytes: int = 0


@dataclass(frozen=True)
class Survey:
    """The cards in CUDA's order, and the newest CUDA that the driver runs: (13, 0); (0, 0) is unknown."""

    gpus: tuple[Gpu, ...]
    driver_cuda: tuple[int, int]
    reason: str = ""  # why there is no card
    remedy: str = ""


def check_gpus() -> Iterator[Check]:
    """The cards, the driver, the kernels, and the library for long products."""
    module, not_loaded = native.import_module()
    survey = survey_cuda_python() or survey_native(module) or survey_proc(_PROC)
    yield from _check_cards(survey)
    if survey.gpus or survey.driver_cuda != (0, 0):
        yield _check_driver(survey, module)
    yield _check_kernels(survey, module, not_loaded)
    if module is not None:
        yield _check_products(module)


def shorten_reason(reason: str) -> str:
    """`native.unavailable_reason()` for lines beside the kernels' and the card's, which say error and remedy."""
    if reason.startswith(native.GPU_FAILS):
        return native.GPU_FAILS
    module, _ = native.import_module()
    if module is None or module.count_devices()[0] < 2 or reason != native.unavailable_reason():
        return reason
    return reason.rpartition(": ")[0]  # its remedy is that of a machine with this card alone


def kernels_reason(bundle: Bundle) -> str:
    """Why the kernels do not run `bundle` where there is a GPU for them; empty where they do, or there is none."""
    reason = native.unavailable_reason()
    if reason:
        return native.GPU_FAILS if reason.startswith(native.GPU_FAILS) else ""
    from edgellm_ros.executors.cuda import unsupported_reason

    return unsupported_reason(bundle)


def plan_on_gpu(bundle: Bundle, config: EngineConfig) -> tuple[int, int] | None:
    """Bytes that the CUDA executor would plan for `bundle`, and those free on the GPU; None where it will not run."""
    if native.unavailable_reason():
        return None
    from edgellm_ros.executors.cuda import plan_here, unsupported_reason

    if unsupported_reason(bundle):
        return None
    try:
        module = native.load()
        info = module.device_info()
    except DeviceError:  # the GPU's own line says it
        return None
    _, plan = plan_here(bundle, config, module, info)
    return plan["total"], free_device_memory(info)


def survey_cuda_python() -> Survey | None:
    """Ask the driver through cuda-python; None where that is not installed."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    version = (0, 0)
    try:
        version = _version(_ask(driver.cuDriverGetVersion))
        _ask(driver.cuInit, 0)
        # The first card last: asking for free memory makes a card the current one, which the native module is asked of.
        gpus = [_gpu(driver, runtime, index) for index in reversed(range(_ask(driver.cuDeviceGetCount)))]
    except (OSError, RuntimeError) as error:  # RuntimeError: cuda-python found no libcuda
        if version == (0, 0):
            return Survey((), version, "no NVIDIA driver")
        return Survey((), version, f"the driver fails: {error}", "nvidia-smi should list the GPU; reload the driver")
    return Survey(tuple(reversed(gpus)), version)


def survey_native(module: Any) -> Survey | None:
    """Ask the native module, which knows the first card; None where there is no module or no card."""
    if module is None or not module.count_devices()[0]:
        return None
    try:
        info = module.device_info()
    except DeviceError as error:
        return Survey((), (0, 0), f"{native.GPU_FAILS}: {error}", native.SICK_REMEDY)
    gpu = Gpu(info["name"], tuple(info["compute_capability"]), info["total_bytes"], free_device_memory(info))
    return Survey((gpu,), _version(info["driver_cuda_version"]), remedy=_CUDA_PYTHON)


def survey_proc(root: Path) -> Survey:
    """Names alone, of the kernel module's files."""
    models = [re.search(r"Model:\s*(.+)", read_text(file)) for file in sorted(root.glob("gpus/*/information"))]
    gpus = tuple(Gpu(match.group(1).strip()) for match in models if match)
    if not gpus and _TEGRA.exists():
        gpus = (Gpu("Jetson, " + read_text(_TEGRA).split(",")[0]),)
    return Survey(gpus, (0, 0), remedy=_CUDA_PYTHON)


def _check_cards(survey: Survey) -> Iterator[Check]:
    if not survey.gpus:
        remedy = survey.remedy if survey.reason and survey.remedy else "not needed: the CPU executor runs without"
        yield Check("GPU", "NVIDIA GPU", State.MISSING, survey.reason or "none", remedy)
    for gpu in survey.gpus:
        facts = [gpu.name]
        if gpu.capability:
            facts.append("compute capability " + ".".join(map(str, gpu.capability)))
        if gpu.total_bytes:
            free = f"{human_bytes(gpu.free_bytes)} free of " if gpu.free_bytes else ""
            facts.append(f"{free}{human_bytes(gpu.total_bytes)}")
        yield Check("GPU", "NVIDIA GPU", State.OK, ", ".join(facts), survey.remedy)


def _check_driver(survey: Survey, module: Any) -> Check:
    found = driver_version(read_text(_PROC / "version")) or "version unknown"
    if survey.driver_cuda != (0, 0):
        found += ", for CUDA {}.{} and older".format(*survey.driver_cuda)
    # Within one major version a newer runtime works with an older driver (CUDA's minor version compatibility).
    if module is not None and (0, 0) != survey.driver_cuda < (module.CUDA_MAJOR, 0):
        remedy = (
            f"the native module was built with CUDA {module.CUDA_MAJOR}: install a driver for it, or build the module "
            f"with CUDA {survey.driver_cuda[0]}"
        )
        return Check("GPU", "driver", State.MISSING, found, remedy)
    return Check("GPU", "driver", State.OK, found)


def _check_kernels(survey: Survey, module: Any, not_loaded: str) -> Check:
    name = "CUDA kernels"
    if module is None:
        what, _, remedy = not_loaded.rpartition(": ")
        return Check("GPU", name, State.MISSING, what or not_loaded, remedy)
    built = f"compiled for {', '.join(module.ARCHITECTURES)} with CUDA {'{}.{}'.format(*_version(module.CUDA_VERSION))}"
    if module.FAST_COMPILE:
        built += ", without optimisation (for tests; `make native` builds what is fast)"
    if not survey.gpus:
        failure = survey.reason.partition(":")[0] if survey.remedy else ""  # the card's line says the rest
        return Check("GPU", name, State.MISSING, f"{built}; not used: {failure or 'no GPU'}")
    used = survey.gpus[0]  # the one that CUDA takes when nobody chooses
    place = _place(survey, module)
    if used.capability:
        reason = native.capability_reason(module, used.capability)
        if reason:
            what, _, remedy = reason.rpartition(": ")
            found = f"{built}; not used: {used.name}{place} {what}"
            return Check("GPU", name, State.MISSING, found, _other_card(survey, module, remedy))
    reason = native.unavailable_reason()
    if reason.startswith(native.GPU_FAILS) and place:
        found = f"{built}; not used: {used.name}{place}: {reason}"
        return Check("GPU", name, State.MISSING, found, _other_card(survey, module))
    if reason:
        return Check("GPU", name, State.MISSING, f"{built}; not used: {reason}")
    where = f" on {used.name}{place}" if place else ""
    return Check("GPU", name, State.OK, f"{built}; used by the executor `cuda`{where}")


def _place(survey: Survey, module: Any) -> str:
    """What makes the first card the one that is used; empty where it is the only one."""
    num_cards = _num_cards(survey, module)
    if num_cards < 2:
        return ""
    chosen = os.environ.get(_CHOICE)
    return f" (device 0 of {_CHOICE}={chosen})" if chosen else f" (device 0 of {num_cards})"


def _num_cards(survey: Survey, module: Any) -> int:
    """Cards of this machine, as far as is known: CUDA lists only those that CUDA_VISIBLE_DEVICES names."""
    hidden_too = len(survey_proc(_PROC).gpus) if os.environ.get(_CHOICE) else 0
    counted: int = module.count_devices()[0]
    return max(len(survey.gpus), counted, hidden_too)


def _other_card(survey: Survey, module: Any, otherwise: str = "") -> str:
    """The remedy for a first card that cannot be used: another one that can, else `otherwise`."""
    chosen = os.environ.get(_CHOICE)  # "1,0" or UUIDs: then every card of the survey has its name there
    names = chosen.split(",") if chosen else [str(index) for index in range(len(survey.gpus))]
    for name, gpu in list(zip(names, survey.gpus, strict=False))[1:]:
        if gpu.capability and not native.capability_reason(module, gpu.capability):
            return f"{_CHOICE}={name.strip()} uses {gpu.name}"
    if _num_cards(survey, module) == len(survey.gpus):
        return otherwise
    unknown = f"let {_CHOICE} choose another card, if one fits"
    return f"{unknown}, or {otherwise}" if otherwise else unknown


def _check_products(module: Any) -> Check:
    reason = native.products_reason(module)
    if not reason:
        return Check("GPU", "cuBLASLt", State.OK, "found; prompts are read with its matrix products")
    remedy = f"only for reading prompts fast (in int4 long ones): {native.products_remedy(module, reason)}"
    return Check("GPU", "cuBLASLt", State.MISSING, reason, remedy)


def _gpu(driver: Any, runtime: Any, index: int) -> Gpu:
    device = _ask(driver.cuDeviceGet, index)
    name = _ask(driver.cuDeviceGetName, 128, device)
    attribute = driver.CUdevice_attribute
    capability = (
        _ask(driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device),
        _ask(driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device),
    )
    total = _ask(driver.cuDeviceTotalMem, device)
    free = 0
    try:  # the runtime of cuda-python may be newer than the driver; then the card is still worth naming
        _ask(runtime.cudaSetDevice, index)
        free = _ask(runtime.cudaMemGetInfo)
        integrated = bool(_ask(driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED, device))
        free = free_device_memory({"free_bytes": free, "integrated": integrated})
    except (OSError, RuntimeError):
        pass
    return Gpu(name.split(b"\0")[0].decode(errors="replace"), capability, total, free)


def _ask(function: Callable[..., tuple[Any, ...]], *arguments: object) -> Any:
    """The first result of a cuda-python call; OSError with the status when it failed."""
    status, *results = function(*arguments)
    if int(status) != 0:
        raise OSError(f"{getattr(function, '__name__', function)} returned {getattr(status, 'name', status)}")
    return results[0] if results else None


def _version(number: int) -> tuple[int, int]:
    """(13, 0) for 13000."""
    return number // 1000, number % 1000 // 10
