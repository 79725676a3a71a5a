"""`edgellm doctor --bundle` where there is a GPU that will not run the bundle: why, what runs it, and whose memory counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_bundle import write_bundle
from test_cli_doctor_gpu import GIB, NATIVE, NO_MODULE, install_cuda_python, install_native
from test_cli_doctor_gpu import nothing_here as nothing_here

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.check import Check, State
from edgellm_ros.cli.checks import check_bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import DeviceError, UnsupportedError
from edgellm_ros.executors import create_executor, cuda, engine_preflight


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def install_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that the native module runs on, without TensorRT."""
    module = install_native(monkeypatch, capability=(9, 0))
    module.TENSORRT_HEADERS = ""
    monkeypatch.setattr(native, "find_tensorrt", lambda module: ("", (), "built without TensorRT's headers"))
    return module


def fail() -> None:
    raise DeviceError("cudaMemGetInfo: out of memory")


def lines(bundle: Path, available: int = GIB, **settings: Any) -> dict[str, Check]:
    return {check.name: check for check in check_bundle(bundle, available, EngineConfig(**settings))}


@pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE)
def test_a_bundle_that_the_kernels_cannot_run_is_said_to_run_where_auto_runs_it(
    tiny_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    module = install_gpu(monkeypatch)
    for name in ("DecoderConfig", "KvFormat", "WeightFormat", "Activation"):
        setattr(module, name, getattr(NATIVE, name))
    tiny = tiny_bundle("llama")
    with pytest.raises(UnsupportedError) as refusal:
        create_executor(tiny, EngineConfig(executor="cuda"))
    kernels = lines(tiny.path)["kernels"]
    assert kernels.state is State.MISSING and kernels.remedy == "not needed: onnxruntime runs it on the CPU"
    assert "head" in kernels.found and kernels.found.removeprefix("not used for this bundle: ") in str(refusal.value)
    executor = create_executor(tiny, EngineConfig(max_slots=1))
    assert executor.info.name == "onnxruntime"
    executor.close()
    assert main(["doctor", "--bundle", str(tiny.path)]) == 0
    shown = capsys.readouterr().out
    assert kernels.found in shown and "of KV cache" in shown and "free on the CPU" in shown
    assert "the GPU's memory" not in shown


def test_memory_that_the_cpu_lacks_is_a_failure_where_the_kernels_cannot_run_a_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "unsupported_reason", lambda bundle: "heads of 8")
    assert lines(bundle)["memory"].state is State.OK
    memory = lines(bundle, available=1)["memory"]
    assert memory.state is State.FAILED and memory.found.endswith("1 B free on the CPU")
    assert "fp8" not in memory.remedy  # ONNX Runtime has none


def test_kernels_that_were_asked_for_and_cannot_run_a_bundle_are_a_failure(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "unsupported_reason", lambda bundle: "heads of 8")
    kernels = lines(bundle, executor="cuda")["kernels"]
    assert kernels.state is State.FAILED and kernels.found == "not used for this bundle: heads of 8" and "auto" in kernels.remedy


def test_where_an_engine_runs_what_the_kernels_cannot_its_memory_counts(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpu(monkeypatch)
    engine: Any = type("Engine", (), {"key": "sm90-fp16"})
    machine = engine_preflight.Machine(gpu="Testcard", free_bytes=5 * GIB)
    monkeypatch.setattr(cuda, "unsupported_reason", lambda bundle: "heads of 8")
    monkeypatch.setattr(engine_preflight, "probe_machine", lambda: machine)
    monkeypatch.setattr(engine_preflight, "choose_engine", lambda bundle, config, machine: (engine, []))
    monkeypatch.setattr(engine_preflight, "memory_needed", lambda *of: {"engine": 2 * GIB, "context": GIB})
    found = lines(bundle, available=1)
    assert found["kernels"].state is State.MISSING and "tensorrt runs the engine" in found["kernels"].remedy
    assert found["memory"].state is State.OK and found["engine"].state is State.OK
    assert found["memory"].found == "about 3.0 GiB of the GPU's memory (4 slots of 256 tokens), 5.0 GiB free"


def test_where_the_kernels_run_a_bundle_no_line_says_so_but_its_memory(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "unsupported_reason", lambda bundle: "")
    monkeypatch.setattr(cuda, "plan_here", lambda *of: (None, {"total": 3 * GIB}))
    found = lines(bundle)
    assert list(found) == ["files", "memory", "engine"]
    assert found["memory"].found == "about 3.0 GiB of the GPU's memory (4 slots of 256 tokens), 5.0 GiB free"


@pytest.mark.parametrize("with_cuda_python", [True, False])
def test_where_the_gpu_fails_its_error_is_said_once_and_the_cpus_memory_counts(
    with_cuda_python: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    install_gpu(monkeypatch).device_info = fail
    if with_cuda_python:
        install_cuda_python(monkeypatch, [("Card", (9, 0))])
    monkeypatch.setattr(native, "find_tensorrt", lambda module: ("libnvinfer.so.10", (10, 3), ""))
    monkeypatch.setattr(engine_preflight, "list_engines", lambda bundle: [Path("engine")])
    assert main(["doctor", "--bundle", str(bundle)]) == 0  # auto runs it all the same
    shown = capsys.readouterr().out
    assert shown.count("cudaMemGetInfo") == shown.count("nvidia-smi") == 1 and "no GPU" not in shown
    assert "not needed: onnxruntime runs it on the CPU" in shown and "free on the CPU" in shown
    found = lines(bundle)
    assert found["kernels"].state is State.MISSING and found["kernels"].found.endswith(": the GPU fails")
    assert found["engine"].found == "the GPU fails"
    assert lines(bundle, executor="cuda")["kernels"].state is State.FAILED
