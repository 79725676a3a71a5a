"""All memory is taken at load: the first request of every kind finds it there, and the code of its kernels.

In a process of its own, since CUDA loads a kernel's code once in a process: behind another test it would be there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packers
import pytest

from edgellm_ros.bundle import Bundle
from edgellm_ros.toolchain.export import export_bundle

SCRIPT = Path(__file__).with_name("first_requests.py")
ROOT = Path(__file__).resolve().parents[2]
BEGIN = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import edgellm_ros
edgellm_ros.__path__.append({str(ROOT / "build" / "native-check")!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


SMALL: list[tuple[str, str, dict[str, Any]]] = [
    ("gpu_qwen3", "int4", {}),
    ("gpu_qwen3", "int4", {"decode_batching": "fast"}),
    ("gpu_llama_bias", "fp16", {"decode_batching": "fast", "kv_cache": "fp8"}),
    ("gpu_gemma3", "int8", {"max_slots": 1}),
]
LARGE = {"max_slots": 4, "max_context": 4096, "prefill_chunk": 2048, "max_loras": 1}


def first_requests(source: str | Path, weights: str, longest: int, what: str, settings: dict[str, Any]) -> dict[str, Any]:
    arguments = ["-c", BEGIN, str(source), weights, json.dumps(settings), str(longest), what]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout, done.stderr[-3000:])
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def check_memory(told: dict[str, Any], num_kinds: int) -> None:
    assert not told["allocated"]
    fell = told["fell"]
    fell.pop("loading an adapter", None)  # may capture graphs, within the memory planned for them
    assert len(fell) == num_kinds
    assert fell == dict.fromkeys(fell, 0)


# These are loaded without being run, by asking for their attributes (load_gemm_int4, load_lora_prefill).
LOADED_BY_NAME = ("gemm_int4_", "lora_prefill_")


def check_kernels(told: dict[str, Any]) -> None:
    assert min(told["at load"], told["run"]) > 5, "the profiler saw next to nothing"
    assert [name for name in told["new"] if not any(part in name for part in LOADED_BY_NAME)] == []


@pytest.fixture
def fp8_bundle(gpu_model: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> Path:
    gpu_model("gpu_llama")  # makes the configuration known
    own, files = packers.modelopt_files("FP8")
    packers.save_quantized("gpu_llama", tmp_path / "source", packers.modelopt_fp8, own, files)
    return export_bundle(tmp_path / "source", tmp_path / "bundle").path


@pytest.mark.alone
@pytest.mark.parametrize(("kind", "weights", "settings"), SMALL)
def test_first_requests_take_no_memory(
    kind: str, weights: str, settings: dict[str, Any], gpu_bundle: Callable[..., Bundle]
) -> None:
    path = gpu_bundle(kind, weights).path
    check_memory(first_requests(path, weights, 250, "memory", {"max_slots": 8, **settings}), 9)


@pytest.mark.alone
def test_with_stored_fp8_and_an_adapter_neither(fp8_bundle: Path) -> None:
    check_memory(first_requests(fp8_bundle, "fp8", 250, "memory", {"max_slots": 4, "max_loras": 1}), 10)


@pytest.mark.alone
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_nor_do_long_prompts_of_a_large_model(weights: str) -> None:
    check_memory(first_requests("llama-1b", weights, 3000, "memory", LARGE), 10)


@pytest.mark.parametrize(("kind", "weights", "settings"), SMALL)
def test_first_requests_run_only_kernels_whose_code_is_loaded(
    kind: str, weights: str, settings: dict[str, Any], gpu_bundle: Callable[..., Bundle]
) -> None:
    path = gpu_bundle(kind, weights).path
    check_kernels(first_requests(path, weights, 250, "kernels", {"max_slots": 8, **settings}))


def test_with_stored_fp8_and_an_adapter_too(fp8_bundle: Path) -> None:
    check_kernels(first_requests(fp8_bundle, "fp8", 250, "kernels", {"max_slots": 4, "max_loras": 1}))


@pytest.mark.parametrize("weights", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_so_do_long_prompts_of_a_large_model(batching: str, weights: str) -> None:
    check_kernels(first_requests("llama-1b", weights, 3000, "kernels", {**LARGE, "decode_batching": batching}))
