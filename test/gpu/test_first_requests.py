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
    ("gpu_gemma3_64", "fp16", {"max_slots": 1}),  # capped logits
    ("gpu_gemma3", "int8", {"prefill_chunk": 16, "prefill_chunk_busy": 16, "decode_batching": "fast"}),
]
LARGE = {"max_slots": 4, "max_context": 4096, "prefill_chunk": 2048, "max_loras": 1}


def first_requests(source: str | Path, weights: str, longest: int, what: str, settings: dict[str, Any]) -> dict[str, Any]:
    arguments = ["-c", BEGIN, str(source), weights, json.dumps(settings), str(longest), what]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout, done.stderr[-3000:])
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(source, weights, json.dumps(told))  # pytest shows it of a test that fails, and with -rP of all
    return told


def check_memory(told: dict[str, Any], num_kinds: int) -> None:
    assert not told["allocated"]
    assert told["taken"] <= told["planned"]
    fell = told["fell"]
    assert len(fell) == num_kinds
    # Loading an adapter captures graphs, within the memory planned for them; unloading it gives that back.
    apart = ("loading an adapter", "no adapter again")
    assert {name: size for name, size in fell.items() if size != 0 and name not in apart} == {}


def check_kernels(told: dict[str, Any], loaded_unrun: str = "nothing") -> None:
    assert min(told["at load"], told["run"]) > 5, "the profiler saw next to nothing"
    assert [name for name in told["new"] if loaded_unrun not in name] == []


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
def test_first_requests_take_no_memory_with_stored_fp8_and_an_adapter(fp8_bundle: Path) -> None:
    check_memory(first_requests(fp8_bundle, "fp8", 250, "memory", {"max_slots": 4, "max_loras": 1}), 12)


@pytest.mark.alone
def test_first_requests_take_no_memory_with_many_graphs() -> None:
    settings = {"max_slots": 8, "max_context": 16384, "max_loras": 1}
    check_memory(first_requests("qwen3-4b", "int4", 3000, "memory", settings), 12)


@pytest.mark.alone
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_first_requests_take_no_memory_with_a_large_model(weights: str) -> None:
    check_memory(first_requests("llama-1b", weights, 3000, "memory", LARGE), 12)


# A tile of int4 products is chosen by the number of tokens, and all are loaded by setting an attribute of theirs.
UNRUN = {"int4": "gemm_int4_"}


@pytest.mark.parametrize(("kind", "weights", "settings"), SMALL)
def test_first_requests_run_only_loaded_kernels(
    kind: str, weights: str, settings: dict[str, Any], gpu_bundle: Callable[..., Bundle]
) -> None:
    path = gpu_bundle(kind, weights).path
    told = first_requests(path, weights, 250, "kernels", {"max_slots": 8, **settings})
    check_kernels(told, UNRUN.get(weights, "nothing"))


def test_first_requests_run_only_loaded_kernels_with_stored_fp8_and_an_adapter(fp8_bundle: Path) -> None:
    check_kernels(first_requests(fp8_bundle, "fp8", 250, "kernels", {"max_slots": 4, "max_loras": 1}))


@pytest.mark.parametrize("weights", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_first_requests_run_only_loaded_kernels_with_a_large_model(batching: str, weights: str) -> None:
    told = first_requests("llama-1b", weights, 3000, "kernels", {**LARGE, "decode_batching": batching})
    check_kernels(told, UNRUN.get(weights, "nothing"))
