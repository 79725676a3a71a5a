"""Why the native module cannot be used is said with the remedy, whatever is wrong: the build, the driver or the GPU."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import edgellm_ros
from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import DeviceError, UnsupportedError
from edgellm_ros.executors import create_executor


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    native.import_module.cache_clear()
    yield
    native.import_module.cache_clear()


def fake_module(
    monkeypatch: pytest.MonkeyPatch, architectures: tuple[str, ...], ptx: str, capability: tuple[int, int]
) -> None:
    module: Any = ModuleType("edgellm_ros._native")
    module.ARCHITECTURES, module.PTX_ARCHITECTURE, module.CUDA_MAJOR = architectures, ptx, 99
    module.FAST_COMPILE = False
    module.count_devices = lambda: (1, "")
    module.device_info = lambda: {"name": "Testcard", "compute_capability": capability}
    monkeypatch.setitem(sys.modules, "edgellm_ros._native", module)


@pytest.mark.parametrize(
    ("architectures", "ptx", "capability", "runs"),
    [
        (("80",), "", (8, 0), True),
        (("80",), "", (8, 6), True),  # a later minor version
        (("89",), "", (8, 6), False),  # an earlier one
        (("80",), "", (9, 0), False),  # another major version
        (("80",), "80", (9, 0), True),  # by its PTX
        (("120",), "120", (11, 0), False),  # PTX for something newer
        (("90a",), "", (9, 0), True),
        (("100f",), "", (10, 3), False),
        (("80", "86"), "", (8, 7), False),  # desktop code on an Orin
        (("87",), "", (8, 9), False),  # Orin code on a desktop
        (("87",), "", (8, 7), True),
        (("110",), "", (11, 0), True),
        (("120",), "", (12, 1), True),
    ],
)
def test_machine_code_and_ptx_run_where_cuda_says(
    architectures: tuple[str, ...], ptx: str, capability: tuple[int, int], runs: bool
) -> None:
    assert native.runs_on(architectures, ptx, capability) is runs


def test_a_module_for_other_gpus_is_refused_by_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, ("87", "90a"), "", (8, 6))
    with pytest.raises(UnsupportedError, match=r"Testcard has compute capability 8\.6, .*compiled for 87, 90a: .*=86 "):
        native.load()
    fake_module(monkeypatch, ("87",), "", (9, 0))
    native.import_module.cache_clear()
    reason = native.unavailable_reason()
    assert "EDGELLM_CUDA_ARCHS=90a make native" in reason
    assert "colcon build --cmake-args -DEDGELLM_CUDA_ARCHS=90a" in reason  # which configures again for new arguments only


def test_a_gpu_that_is_too_old_is_told_so_even_when_ptx_would_load(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, ("75",), "75", (7, 5))
    assert "has compute capability 7.5; the kernels need 8.0 or newer" in native.unavailable_reason()
    native.import_module.cache_clear()
    fake_module(monkeypatch, ("80",), "", (8, 9))
    assert native.unavailable_reason() == ""


def test_a_gpu_that_fails_is_named_and_auto_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Callable[[str], Bundle], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise DeviceError("cudaMemGetInfo failed: cudaErrorMemoryAllocation (out of memory)")

    fake_module(monkeypatch, ("80",), "", (8, 9))
    module: Any = sys.modules["edgellm_ros._native"]
    module.device_info, module.TENSORRT_HEADERS = fail, False
    module.find_tensorrt = lambda path: ("", (0, 0, 0), "libnvinfer.so.10 was not found")
    said = "the GPU fails: cudaMemGetInfo failed: cudaErrorMemoryAllocation"
    with pytest.raises(DeviceError, match=f"{said}.*nvidia-smi"):
        native.load()
    with pytest.raises(DeviceError, match=f"executor is 'cuda': {said}.*; use onnxruntime or auto"):
        create_executor(tiny_bundle("llama"), EngineConfig(executor="cuda"))
    with caplog.at_level(logging.WARNING):
        executor = create_executor(tiny_bundle("llama"), EngineConfig(max_slots=1))
    assert executor.info.name == "onnxruntime"
    assert f"there is a GPU, and the CPU is used: {said}" in caplog.text
    executor.close()


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_runs_the_bundle_is_used_whether_it_was_asked_for_or_not(
    name: str, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Callable[[str], Bundle]
) -> None:
    """The GPU and its executor are stand-ins."""
    taken: list[tuple[Bundle, EngineConfig]] = []

    def take(bundle: Bundle, config: EngineConfig) -> Any:
        taken.append((bundle, config))
        return made

    made = SimpleNamespace(info=SimpleNamespace(name="cuda", device="Testcard"))
    monkeypatch.setattr("edgellm_ros.executors._cuda_reason", lambda bundle: "")
    monkeypatch.setattr("edgellm_ros.executors.cuda.CudaExecutor", take)
    bundle, config = tiny_bundle("llama"), EngineConfig(executor=name)
    assert create_executor(bundle, config) is made and taken == [(bundle, config)]


def test_a_module_of_another_python_is_told_apart_from_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "edgellm_ros._native", raising=False)
    monkeypatch.setattr(edgellm_ros, "__path__", [str(tmp_path)])
    assert "is not built" in native.unavailable_reason()
    native.import_module.cache_clear()
    other = tmp_path / "_native.cpython-27-riscv.so"
    other.touch()
    reason = native.unavailable_reason()
    assert f"another Python or processor ({other}" in reason and "make native" in reason


def test_a_module_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "edgellm_ros._native", raising=False)
    monkeypatch.setattr(edgellm_ros, "__path__", [str(tmp_path)])
    suffix = native.importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_native{suffix}").write_bytes(b"not a shared library")
    with pytest.raises(UnsupportedError, match=r"cannot be loaded: .*build it again: make native"):
        native.load()


def test_a_module_that_another_version_left_behind_is_refused_before_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, ("80",), "", (8, 6))
    sys.modules["edgellm_ros._native"].VERSION = "0.0.9"  # type: ignore[attr-defined]
    reason = native.unavailable_reason()
    assert f"was built from edgellm_ros 0.0.9, and this is {edgellm_ros.__version__}: make native" in reason
    native.import_module.cache_clear()
    sys.modules["edgellm_ros._native"].VERSION = edgellm_ros.__version__  # type: ignore[attr-defined]
    assert native.unavailable_reason() == ""


def test_what_a_stale_module_lacks_comes_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_module(monkeypatch, ("80",), "", (8, 6))
    assert main(["bench", "--shape", "llama-1b"]) == 1
    said = capsys.readouterr().err
    assert "edgellm_ros._native" in said and "older than the Python files; make native builds it again" in said


@pytest.mark.parametrize(
    ("cuda", "reason", "remedy"),
    [
        (13, "libcublasLt.so.13: cannot open shared object file", "install the CUDA toolkit, or pip install nvidia-cublas"),
        (12, "libcublasLt.so.12: cannot open shared object file", "install the CUDA toolkit, or pip install nvidia-cublas-cu12"),
        (12, "this build had no cublasLt.h", "build the module again where the CUDA toolkit has cuBLAS"),
    ],
)  # fmt: skip
def test_the_cublas_that_is_named_is_the_modules_own(cuda: int, reason: str, remedy: str) -> None:
    module: Any = ModuleType("edgellm_ros._native")
    module.CUDA_MAJOR = cuda
    assert native.products_remedy(module, reason) == remedy


def test_libraries_of_wheels_are_found_wherever_packages_are_imported_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user's own site directory is one: `pip install` without root puts what doctor asks for there."""
    library = tmp_path / "user" / "nvidia" / "cublas" / "lib" / "libcublasLt.so.99"
    library.parent.mkdir(parents=True)
    library.touch()
    engine = tmp_path / "user" / "tensorrt_libs" / "libnvinfer.so.10"
    engine.parent.mkdir()
    engine.touch()
    loaded: list[str] = []

    def load(name: str) -> None:
        if "/" not in name:
            raise OSError("no such file")
        loaded.append(name)

    monkeypatch.setattr(native.ctypes, "CDLL", load)
    monkeypatch.delenv("EDGELLM_NVINFER", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "user"))
    native._preload_cublaslt(99)
    assert loaded == [str(library)]
    assert str(engine) in native.tensorrt_candidates(SimpleNamespace(TENSORRT_HEADERS="10.14"))
