"""Where there is no cuBLASLt, prompts are read all the same: as int4 weights are stored, or by the kernels of decoding.

In a process of its own, whose dynamic linker finds an empty file under the library's name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.executors import SequenceStep, cuda
from edgellm_ros.executors.cuda import CudaExecutor

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"max_slots": 4, "prefill_chunk": 140}  # "fast" would copy int4 weights for so many tokens
IDS = np.random.default_rng(11).integers(5, 300, 150).astype(np.int32)

_SCRIPT = """
import itertools, logging, sys
sys.path[:0] = [{root!r}, {tests!r}]
import edgellm_ros
edgellm_ros.__path__.append({check!r})
from edgellm_ros import native
native._preload_cublaslt = lambda major: None  # NVIDIA's Python wheels have the library, too
from test_without_cublaslt import *
from edgellm_ros.config import EngineConfig
logging.basicConfig(level="WARNING", format="%(message)s")
{body}
"""
_READ = """
executor = CudaExecutor(Bundle.open({bundle!r}), EngineConfig(**SETTINGS, decode_batching={batching!r}))
assert executor._decoder.plan == executor.memory_plan
np.savez({output!r}, *read(executor), planned=executor.memory_plan["total"])
"""
_CUT = """
executor = CudaExecutor(Bundle.open({bundle!r}), EngineConfig(max_slots={slots}, prefill_chunk=140))
whole = executor.step([SequenceStep(0, IDS, 0)]).copy()
for cuts in ([56], [2, 65], [148], [16, 32, 139]):
    for a, b in itertools.pairwise([0, *cuts, len(IDS)]):
        last = executor.step([SequenceStep(0, IDS[a:b], a)])
    if not np.array_equal(last, whole):
        print("another result for", cuts)
"""


def read(executor: CudaExecutor) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a prompt of two chunks, and of a step after it."""
    prompt = executor.step([SequenceStep(1, IDS, 0, len(IDS))]).copy()
    return prompt, executor.step([SequenceStep(1, IDS[:1], len(IDS), 1)]).copy()


def run_without_cublaslt(body: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / f"libcublasLt.so.{native.load().CUDA_MAJOR}").touch()
    check = ROOT / "build" / "native-check"
    script = _SCRIPT.format(root=str(ROOT), tests=str(Path(__file__).parent), check=str(check), body=body)
    environment = {"LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("batching", ["exact", "fast"])
@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
def test_prompts_are_read_and_the_log_says_how_and_what_to_install(
    weights: str, batching: str, gpu_bundle: Callable[..., Bundle], open_cuda: Callable[..., CudaExecutor],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, output = gpu_bundle("gpu_qwen3", weights).path, tmp_path / "got.npz"
    body = _READ.format(bundle=str(path), batching=batching, output=str(output))
    done = run_without_cublaslt(body, tmp_path)
    name = f"libcublasLt.so.{native.load().CUDA_MAJOR}"
    how = "more slowly where they are long" if weights == "int4" else "slowly"
    [told] = [line for line in done.stderr.splitlines() if "cuBLASLt" in line]
    assert told.startswith(f"prompts are read {how}: no cuBLASLt (") and name in told
    assert "pip install nvidia-cublas" in told

    monkeypatch.setattr(cuda, "_MAX_PACKED_TOKENS", 256)  # all int4 weights as they are stored
    executor: Any = open_cuda("gpu_qwen3", weights, decode_batching=batching, **SETTINGS)
    with np.load(output) as got:
        for mine, expected in zip((got["arr_0"], got["arr_1"]), read(executor), strict=True):
            if weights == "int4":  # neither copies a weight
                assert np.array_equal(mine, expected)
            else:
                spread = np.linalg.norm(expected - expected.mean(-1, keepdims=True))
                assert np.linalg.norm(mine - expected) < 0.05 * spread
        assert (got["planned"] < executor.memory_plan["total"]) == (weights != "int4")


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
def test_bits_do_not_depend_on_how_a_prompt_is_cut(
    weights: str, slots: int, gpu_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """One slot, too, whose single tokens have kernels of their own."""
    bundle = str(gpu_bundle("gpu_qwen3", weights).path)
    done = run_without_cublaslt(_CUT.format(bundle=bundle, slots=slots), tmp_path)
    assert "cuBLASLt" in done.stderr and done.stdout == ""
