"""bench/: what a script lacks, or was asked wrongly, is said in one line, with the remedy, and its status is 2."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from edgellm_ros import native
from edgellm_ros.errors import ConfigError, DeviceError, EdgeLLMError, UnsupportedError
from edgellm_ros.executors import cuda

BENCH = Path(__file__).parents[2] / "bench"
OF_KERNELS = (
    "attention_decode", "attention_prefill", "attention_tree", "draft_acceptance", "gemm_int4", "gemv", "plugins",
    "prefill", "sampling", "small_kernels",
)  # fmt: skip
OF_EXECUTORS = ("decode", "engine", "lora", "soak", "verify")


def run_script(
    name: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any] | None = None
) -> object:
    """Its exit status; nothing may be loaded unless `load` is what `native.load` does."""
    file = BENCH / f"{name}.py"
    monkeypatch.setattr(native, "load", load or (lambda: pytest.fail("looked for a GPU")))
    monkeypatch.setattr(sys, "argv", [str(file), *options])
    # As kernel_timing.py has it, which another test may have imported; also before test/unit's test_sampling.py.
    monkeypatch.setattr(sys, "path", [str(BENCH.parent / "test" / "native"), str(BENCH), *sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(file), run_name="__main__")
    return stop.value.code


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What one line on stderr says, without anything on stdout."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured
    return captured.err.removeprefix("error: ").removesuffix("\n")


def need_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")


def test_every_script_is_one_of_these() -> None:
    scripts = {path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py")}
    assert scripts == {*OF_KERNELS, *OF_EXECUTORS, "export", "node"}


@pytest.mark.parametrize("name", [*OF_KERNELS, *OF_EXECUTORS])
@pytest.mark.parametrize(
    "error", [UnsupportedError("no NVIDIA GPU: no driver is installed"), DeviceError("the GPU fails: out of memory")]
)
def test_without_a_gpu_that_works_a_script_says_the_reason_and_changes_nothing(
    name: str, error: EdgeLLMError, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in OF_KERNELS:
        need_torch()

    def load() -> None:
        raise error

    assert run_script(f"bench_{name}", (), monkeypatch, load) == 2
    assert only_error(capsys) == f"{error}; without a GPU there is `edgellm bench --bundle BUNDLE`"
    assert cuda._MAX_VERIFY_TOKENS == 16  # which bench_verify.py raises for its own process


@pytest.mark.parametrize("name", OF_KERNELS)
def test_a_script_of_kernels_says_where_torch_is_from(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("kernel_timing", "bench_gemv", "bench_attention_decode", "bench_prefill"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_script(f"bench_{name}", (), monkeypatch) == 2
    assert only_error(capsys).startswith("the Python module torch is missing: pip install torch")


def test_a_torch_without_cuda_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_script("bench_gemv", (), monkeypatch, SimpleNamespace) == 2
    assert only_error(capsys).startswith(f"torch {torch.__version__} cannot use the GPU; install one")


def test_what_fails_while_it_is_measured_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ConfigError("max_context 40128 exceeds the bundle's 32768; lower it")

    module = SimpleNamespace(device_info=dict, measure_read_bandwidth=lambda size: 1.0)
    monkeypatch.setattr(cuda, "CudaExecutor", fail)
    assert run_script("bench_decode", ("--context", "40000", "--json"), monkeypatch, lambda: module) == 2
    assert only_error(capsys) == "max_context 40128 exceeds the bundle's 32768; lower it"


def test_a_shape_that_torch_compile_does_not_have_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need_torch()
    module = SimpleNamespace(device_info=dict, measure_read_bandwidth=lambda size: 1.0)
    options = ("--shape", "gemma3-1b", "--torch", "--json")
    assert run_script("bench_decode", options, monkeypatch, lambda: module) == 2
    assert only_error(capsys) == "the torch.compile decoder has no gemma3; leave --torch out"


@pytest.mark.parametrize("error", [ValueError("a bug"), ModuleNotFoundError("no", name="edgellm_ros.no")])
def test_a_bug_of_a_script_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise error

    monkeypatch.setattr(native, "load", load)
    monkeypatch.setattr(sys, "argv", ["bench_decode.py"])
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    with pytest.raises(type(error)):
        runpy.run_path(str(BENCH / "bench_decode.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("bench_node", ("--bundle", "/nope")),
        ("compare_llama_cpp", ("--bundle", "/nope", "--gguf", "g")),
        ("worker", ("edgellm", "/nope")),
    ],
)
def test_a_bundle_that_is_none_is_named_before_anything_is_started(
    script: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "edgellm_ros.ros.client", MagicMock())  # whether this machine has ROS or not
    monkeypatch.setitem(sys.modules, "llama_cpp", MagicMock())
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started a process"))
    assert run_script(script, options, monkeypatch) == 2
    assert only_error(capsys).startswith("/nope is not a directory; a bundle is what `edgellm export")


def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gguf: str = "m.gguf") -> object:
    (tmp_path / "m.gguf").touch()
    (tmp_path / "m.Q4_0.gguf").touch()  # what llama.cpp made of it before
    monkeypatch.setattr("edgellm_ros.bundle.Bundle.open", lambda *args, **kwargs: None)
    return run_script("compare_llama_cpp", ("--bundle", "b", "--gguf", str(tmp_path / gguf)), monkeypatch)


@pytest.mark.parametrize("script", ["compare_llama_cpp", "worker"])
def test_without_llama_cpp_its_package_is_named(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    if script == "worker":
        assert run_script("worker", ("llama.cpp", "m.gguf"), monkeypatch) == 2
    else:
        assert compare(monkeypatch, tmp_path) == 2
    assert only_error(capsys).startswith("the Python module llama_cpp is missing: pip install 'llama-cpp-python>=0.3'")


def test_a_gguf_file_that_is_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    assert compare(monkeypatch, tmp_path, "other.gguf") == 2
    assert only_error(capsys).startswith(f"--gguf {tmp_path / 'other.gguf'} is not a file; name the one")


def test_a_worker_that_crashes_is_named_with_the_signal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    done = subprocess.CompletedProcess("worker", -11, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert compare(monkeypatch, tmp_path) == 2
    assert only_error(capsys).startswith("edgellm's process was ended by SIGSEGV; build it again")


def test_a_workers_own_line_and_status_are_the_comparisons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    done = subprocess.CompletedProcess("worker", 2, "", "error: weights.safetensors has another hash\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert compare(monkeypatch, tmp_path) == 2
    assert only_error(capsys) == "weights.safetensors has another hash"


def test_an_export_that_fails_ends_its_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("ml_dtypes")
    (tmp_path / "llama-1b-bf16").mkdir()
    (tmp_path / "llama-1b-bf16" / "model.safetensors").touch()
    assert run_script("bench_export", ("--keep", str(tmp_path), "--weights", "none"), monkeypatch) == 2
    assert only_error(capsys) == "bf16: the export failed, and said why above"
    assert run_script("bench_export", ("--shape", "gemma3-1b"), monkeypatch) == 2  # which no form is written of
    assert "invalid choice: 'gemma3-1b'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bundle", "/nope"), "error: /nope is not a directory; a bundle is what `edgellm export"),
        (("--requests", "0"), "error: --requests 0: allowed is 1 and more"),
        (("--callers", "0"), "error: --callers 0: allowed is 1 and more"),
        (("--context", "15"), "error: --context 15: allowed is 16 and more"),
        (("--different", "-1"), "error: --different -1: allowed is 1 and more"),
        (("--slots", "0"), "error: max_slots is 0"),
    ],
)
def test_a_soak_that_cannot_be_is_one_line_and_status_2(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script("bench_soak", options, monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(words) and captured.err.count("\n") == 1


@pytest.mark.parametrize("missing", ["rclpy", "edgellm_ros.action"])
def test_without_ros_the_nodes_benchmark_still_has_help_and_a_run_says_what_is_missing(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("", ".action", ".context", ".executors", ".node", ".qos")
    for name in (*(f"rclpy{part}" for part in parts), "builtin_interfaces", "builtin_interfaces.msg"):
        monkeypatch.setitem(sys.modules, name, MagicMock())  # whether this machine has ROS or not
    monkeypatch.delitem(sys.modules, "edgellm_ros.ros.client", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert run_script("bench_node", ("--help",), monkeypatch) == 0
    assert "--bundle BUNDLE" in capsys.readouterr().out
    assert run_script("bench_node", ("--bundle", "b"), monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: the Python module {missing} is missing: ") and error.count("\n") == 1
    assert "run `make demo`, then . tools/env.sh" in error


@pytest.mark.parametrize("batch", ["0", "9"])
def test_a_batch_that_does_not_decode_together_is_refused_before_anything_is_loaded(
    batch: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script("bench_decode", ("--batch", "1", batch), monkeypatch) == 2
    assert f"argument --batch: {batch} is not allowed: 1 to 8" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "words"), [(1, "bf16 3.000 (1.50 x);"), (8, "bf16 3.000 (of one sequence);")])
def test_torchs_time_of_one_sequence_has_a_ratio_to_ours_of_one_only(
    batch: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    script = runpy.run_path(str(BENCH / "bench_decode.py"))
    result = script["Result"](
        "llama-1b", "bf16", "", batch, 512, ms_per_token=2.0, device_ms=2.0, sampled_ms=2.0, plain_ms=2.0, host_ms=2.0,
        gb_per_s=1.0, share=0.5, prefill_ms={}, torch_ms=3.0, load_s=1.0, memory_mb=1.0, tiles={}, untuned_ms=0.0,
    )  # fmt: skip
    script["print_result"](result)
    assert words in capsys.readouterr().out
