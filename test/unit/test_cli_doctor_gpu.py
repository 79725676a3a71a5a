"""`edgellm doctor` says which GPU, driver and kernels are used, and of what is not used why and what to do."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from edgellm_ros import native
from edgellm_ros.benchmark.random_bundle import RandomBundle
from edgellm_ros.cli import gpu_checks
from edgellm_ros.cli.check import Check, State
from edgellm_ros.cli.engine_checks import check_tensorrt
from edgellm_ros.cli.gpu_checks import check_gpus
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError, DeviceError
from edgellm_ros.executors import cuda

GIB = 2**30
NATIVE, NO_MODULE = native.import_module()
# Whether its memory is the CPU's too, MiB of L2 cache, bits of the memory's bus, why there is no cuBLASLt.
GPUS = {
    "RTX 4090": (False, 72, 384, ""), "L4": (False, 48, 192, ""), "Orin": (True, 4, 128, ""),
    "Thor": (True, 32, 256, ""), "H200": (False, 60, 6016, ""), "H200, no cuBLASLt": (False, 60, 6016, "no such file"),
}  # fmt: skip


class Status(enum.IntEnum):
    OK = 0
    FAILED = 999


class Attribute(enum.Enum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 0
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 1
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 2


def install_cuda_python(
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[tuple[str, tuple[int, int]]],
    driver_version: int = 13000,
    init: Callable[[int], tuple[Any, ...]] = lambda flags: (Status.OK,),
    runtime_works: bool = True,
    integrated: bool = False,
) -> None:
    """Fakes with cuda-python's calling convention: every function returns a tuple whose first item is the status."""
    driver: Any = ModuleType("cuda.bindings.driver")
    runtime: Any = ModuleType("cuda.bindings.runtime")
    driver.CUdevice_attribute = Attribute
    driver.cuInit = init
    driver.cuDriverGetVersion = lambda: (Status.OK, driver_version)
    driver.cuDeviceGetCount = lambda: (Status.OK, len(gpus))
    driver.cuDeviceGet = lambda index: (Status.OK, index)
    driver.cuDeviceGetName = lambda length, index: (Status.OK, gpus[index][0].encode().ljust(length, b"\0"))
    driver.cuDeviceGetAttribute = lambda what, index: (Status.OK, (*gpus[index][1], int(integrated))[what.value])
    driver.cuDeviceTotalMem = lambda index: (Status.OK, 8 * GIB)
    runtime.current = 0

    def set_device(index: int) -> tuple[Any, ...]:
        runtime.current = index
        return (Status.OK if runtime_works else Status.FAILED,)

    runtime.cudaSetDevice = set_device
    runtime.cudaMemGetInfo = lambda: (Status.OK, 6 * GIB, 8 * GIB)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)


def install_native(
    monkeypatch: pytest.MonkeyPatch,
    architectures: tuple[str, ...] = ("80", "90a"),
    capability: tuple[int, int] | None = None,
    no_device: str = "CUDA sees no device",
    no_products: str = "",
) -> Any:
    module: Any = ModuleType("edgellm_ros._native")
    module.ARCHITECTURES, module.PTX_ARCHITECTURE, module.FAST_COMPILE = architectures, "", False
    module.CUDA_MAJOR, module.CUDA_VERSION = 13, 13000
    module.count_devices = lambda: (1, "") if capability else (0, no_device)
    module.device_info = lambda: {
        "name": "Testcard",
        "compute_capability": capability,
        "total_bytes": 8 * GIB,
        "free_bytes": 5 * GIB,
        "integrated": False,
        "driver_cuda_version": 13010,
    }
    module.products_reason = lambda: no_products
    monkeypatch.setattr(native, "import_module", lambda: (module, ""))
    return module


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cuda-python, no native module, no driver's files: each test adds what it is about."""
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.bindings.runtime"):  # PyTorch for CUDA brings it
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(native, "import_module", lambda: (None, "the native module is not built: make native"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_checks, "_PROC", tmp_path / "nvidia")
    monkeypatch.setattr(gpu_checks, "_TEGRA", tmp_path / "nv_tegra_release")


def checks() -> dict[str, Check]:
    return {check.name: check for check in check_gpus()}


def test_without_anything_the_cpu_runs_and_nothing_has_failed() -> None:
    found = checks()
    assert found["NVIDIA GPU"].state is State.MISSING and "CPU executor" in found["NVIDIA GPU"].remedy
    assert found["CUDA kernels"] == Check(
        "GPU", "CUDA kernels", State.MISSING, "the native module is not built", "make native"
    )
    assert "driver" not in found and not any(check.state is State.FAILED for check in found.values())


def test_one_gpu_with_fitting_kernels_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda_python(monkeypatch, [("NVIDIA H100", (9, 0))])
    install_native(monkeypatch, capability=(9, 0))
    found = checks()
    assert found["NVIDIA GPU"].found == "NVIDIA H100, compute capability 9.0, 6.0 GiB free of 8.0 GiB"
    assert found["driver"].state is State.OK and "for CUDA 13.0 and older" in found["driver"].found
    kernels = found["CUDA kernels"]
    assert kernels.state is State.OK and kernels.found.startswith("compiled for 80, 90a with CUDA 13.0; used by")
    assert found["cuBLASLt"].state is State.OK
    assert not any(check.remedy for check in found.values())


def test_of_a_jetson_what_linux_calls_available_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgellm_ros.memory.available_memory", lambda: 7 * GIB)
    install_cuda_python(monkeypatch, [("Orin", (8, 7))], integrated=True)
    assert "7.0 GiB free of 8.0 GiB" in checks()["NVIDIA GPU"].found


@pytest.mark.parametrize("runtime_works", [True, False])
def test_every_gpu_is_listed_and_the_first_stays_the_current_one(
    monkeypatch: pytest.MonkeyPatch, runtime_works: bool
) -> None:
    install_cuda_python(monkeypatch, [("First", (8, 6)), ("Second", (12, 0))], runtime_works=runtime_works)
    cards = [check.found for check in check_gpus() if check.name == "NVIDIA GPU"]
    memory = "6.0 GiB free of 8.0 GiB" if runtime_works else "8.0 GiB"
    assert cards == [f"First, compute capability 8.6, {memory}", f"Second, compute capability 12.0, {memory}"]
    assert sys.modules["cuda.bindings.runtime"].current == 0


def test_a_gpu_that_is_too_old_is_named_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda_python(monkeypatch, [("Old card", (7, 5))])
    install_native(monkeypatch, capability=(7, 5))
    kernels = checks()["CUDA kernels"]
    assert kernels.state is State.MISSING and "Old card has compute capability 7.5; the kernels need 8.0" in kernels.found
    assert kernels.remedy == "use the CPU executor"


def test_kernels_for_other_gpus_come_with_the_command_that_builds_the_right_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_cuda_python(monkeypatch, [("Orin", (8, 7))])
    install_native(monkeypatch, ("80", "90a"), capability=(8, 7))
    kernels = checks()["CUDA kernels"]
    assert kernels.state is State.MISSING and "not used: Orin has compute capability 8.7" in kernels.found
    assert kernels.remedy.startswith("EDGELLM_CUDA_ARCHS=87 make native")


def test_a_driver_that_is_older_than_the_modules_cuda_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda_python(monkeypatch, [("Card", (9, 0))], driver_version=12080)
    install_native(monkeypatch, no_device="the driver is for CUDA 12.8, the native module for CUDA 13.0; update it")
    found = checks()
    assert found["driver"].state is State.MISSING and "for CUDA 12.8 and older" in found["driver"].found
    assert "install a driver for it, or build the module with CUDA 12" in found["driver"].remedy
    assert "not used: no NVIDIA GPU: the driver is for CUDA 12.8" in found["CUDA kernels"].found


def test_cuda_python_without_a_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(*arguments: object) -> tuple[Any, ...]:
        raise RuntimeError("libcuda.so.1 was not found")

    install_cuda_python(monkeypatch, [])
    monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuDriverGetVersion", no_library)
    found = checks()
    assert (found["NVIDIA GPU"].state, found["NVIDIA GPU"].found) == (State.MISSING, "no NVIDIA driver")
    assert "driver" not in found


def test_a_driver_that_fails_says_which_call_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda_python(monkeypatch, [("Card", (9, 0))], init=lambda flags: (Status.FAILED,))
    card = checks()["NVIDIA GPU"]
    assert card.state is State.MISSING and "returned FAILED" in card.found and "nvidia-smi" in card.remedy


def test_without_cuda_python_the_native_module_tells_and_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install_native(monkeypatch, capability=(9, 0), no_products="libcublasLt.so.13: cannot open shared object file")
    found = checks()
    assert found["NVIDIA GPU"].found == "Testcard, compute capability 9.0, 5.0 GiB free of 8.0 GiB"
    assert "pip install 'edgellm_ros[cuda]'" in found["NVIDIA GPU"].remedy
    assert "for CUDA 13.1" in found["driver"].found
    assert found["cuBLASLt"].state is State.MISSING and "pip install nvidia-cublas" in found["cuBLASLt"].remedy


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:16:08 UTC 2025\n", "580.65.06"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  565.57.01  Release Build  (dvs-builder@U16)\n",
            "565.57.01",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  35.3.1  Release Build  (buildbrain)\n", "35.3.1"),
        ("", "version unknown"),
    ],
)
def test_the_drivers_version_is_read_of_the_open_modules_too(
    text: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "version").write_text(text)
    install_cuda_python(monkeypatch, [("Orin", (8, 7))])
    assert checks()["driver"].found.startswith(f"{version}, for CUDA ")


@pytest.mark.parametrize("gpu", GPUS)
def test_a_bundles_plan_is_told_of_the_gpus_cache_its_memorys_bus_and_the_library(
    gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    integrated, l2_mib, bus_bits, lacks = GPUS[gpu]
    bundle: Any = object()
    assert gpu_checks.plan_on_gpu(bundle, EngineConfig()) is None  # no module
    module = install_native(monkeypatch, capability=(9, 0), no_products=lacks)
    told = {**module.device_info(), "integrated": integrated, "l2_bytes": l2_mib << 20, "bus_bits": bus_bits}
    module.device_info = lambda: told
    module.decide = lambda settings, *gpu: (settings, *gpu)
    plans = {("undecided", l2_mib << 20, bus_bits, not lacks): {"total": 3 * GIB}}
    module.plan_memory = lambda settings: plans[settings]
    monkeypatch.setattr("edgellm_ros.memory.available_memory", lambda: 7 * GIB)
    monkeypatch.setattr(cuda, "unsupported_reason", lambda bundle: "")
    monkeypatch.setattr(cuda, "_settings", lambda bundle, config: "undecided")
    assert gpu_checks.plan_on_gpu(bundle, EngineConfig()) == (3 * GIB, (7 if integrated else 5) * GIB)
    monkeypatch.setattr(cuda, "unsupported_reason", lambda bundle: "heads of 48")
    assert gpu_checks.plan_on_gpu(bundle, EngineConfig()) is None


@pytest.mark.parametrize("answers", [1, 2])
def test_a_gpu_that_fails_while_a_bundle_is_planned_leaves_no_plan_and_no_traceback(
    answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer says that there is a GPU, the second that it can compute; the third is what is planned with."""
    module = install_native(monkeypatch, capability=(9, 0))
    info: dict[str, Any] = module.device_info()
    asked: list[str] = []

    def device_info() -> dict[str, Any]:
        asked.append("")
        if len(asked) > answers:
            raise DeviceError("memory.cpp:12: cudaMemGetInfo: out of memory")
        return info

    module.device_info = device_info
    monkeypatch.setattr(cuda, "unsupported_reason", lambda bundle: "")
    bundle: Any = object()
    assert gpu_checks.plan_on_gpu(bundle, EngineConfig()) is None and len(asked) == answers + 1


@pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE)
@pytest.mark.parametrize("shape", ["llama-1b", "llama-8b"])
@pytest.mark.parametrize("gpu", GPUS)
def test_memory_that_doctor_says_is_enough_is_enough_for_the_executor(
    gpu: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, by the native module's own plan; the GPU and the decoder that would take memory are stand-ins."""

    class Taken(Exception):
        pass

    def take(settings: Any) -> None:
        # As Decoder's constructor does, which asks the GPU itself.
        assert NATIVE.plan_memory(NATIVE.decide(settings, *traits))["total"] == needed
        raise Taken

    integrated, l2_mib, bus_bits, lacks = GPUS[gpu]
    traits = (l2_mib << 20, bus_bits, not lacks)
    info = {"integrated": integrated, "l2_bytes": l2_mib << 20, "bus_bits": bus_bits}
    module = SimpleNamespace(
        CUDA_MAJOR=13, products_reason=lambda: lacks, device_info=lambda: info, decide=NATIVE.decide,
        plan_memory=NATIVE.plan_memory, MAX_BATCH=NATIVE.MAX_BATCH, Decoder=take,
    )  # fmt: skip
    monkeypatch.setattr(native, "import_module", lambda: (NATIVE, ""))
    monkeypatch.setattr(native, "load", lambda: module)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "")
    monkeypatch.setattr("edgellm_ros.memory.available_memory", lambda: info["free_bytes"])
    bundle, config = RandomBundle(shape, "int4"), EngineConfig()
    undecided = cuda._settings(bundle, config)
    needed = NATIVE.plan_memory(NATIVE.decide(undecided, *traits))["total"]
    if gpu != "H200" and (gpu, shape) != ("RTX 4090", "llama-1b"):  # whose cache holds the largest weight as a whole
        assert needed != NATIVE.plan_memory(undecided)["total"], "the same as with HBM tests nothing"
    for free, refusal in ((needed, Taken), (needed - 1, ConfigError)):
        info["free_bytes"] = free
        assert gpu_checks.plan_on_gpu(bundle, config) == (needed, free)
        with pytest.raises(refusal):
            cuda.CudaExecutor(bundle, config)


def test_without_either_the_kernel_module_names_the_card(tmp_path: Path) -> None:
    information = tmp_path / "nvidia" / "gpus" / "0000:01:00.0" / "information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA Testcard\nIRQ: 1\n")
    card = checks()["NVIDIA GPU"]
    assert card.state is State.OK and card.found == "NVIDIA Testcard" and "edgellm_ros[cuda]" in card.remedy


def test_a_module_built_for_checking_is_not_taken_for_a_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cuda_python(monkeypatch, [("Card", (9, 0))])
    install_native(monkeypatch, capability=(9, 0)).FAST_COMPILE = True
    assert "without optimisation" in checks()["CUDA kernels"].found


@pytest.mark.parametrize("with_cuda_python", [True, False])
def test_a_gpu_that_fails_is_a_line_of_the_report_and_not_its_end(
    with_cuda_python: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise DeviceError("memory.cpp:12: cudaMemGetInfo: out of memory")

    module = install_native(monkeypatch, ("90a",), capability=(9, 0))
    module.TENSORRT_HEADERS, module.device_info = "10.3", fail
    monkeypatch.setattr(native, "find_tensorrt", lambda module: ("libnvinfer.so.10", (10, 3), ""))
    if with_cuda_python:
        install_cuda_python(monkeypatch, [("Card", (9, 0))])
    found = checks()
    line = found["CUDA kernels" if with_cuda_python else "NVIDIA GPU"]
    assert line.state is State.MISSING and "the GPU fails: memory.cpp:12: cudaMemGetInfo" in line.found
    assert "nvidia-smi shows what holds its memory" in line.found + line.remedy
    (tensorrt,) = check_tensorrt()
    assert tensorrt.state is State.MISSING and tensorrt.found.endswith("not used: the GPU fails")
    kernels = found["CUDA kernels"]
    assert kernels.state is State.MISSING and "not used: the GPU fails" in kernels.found
    said = " ".join(check.found + check.remedy for check in (*found.values(), tensorrt))
    assert said.count("cudaMemGetInfo") == said.count("nvidia-smi") == 1 and "no GPU" not in said
