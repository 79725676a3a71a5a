"""FP8 weights that others made are loaded byte by byte: the answer is that of the dequantised weights, not of new ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packers
import torch

from edgellm_ros.config import EngineConfig
from edgellm_ros.executors.base import SequenceStep
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.toolchain.export import export_bundle


def test_stored_fp8_computes_what_its_dequantised_weights_compute(
    gpu_model: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    gpu_model("gpu_llama")  # makes the configuration known
    own, files = packers.modelopt_files("FP8")
    model = packers.save_quantized("gpu_llama", tmp_path / "source", packers.modelopt_fp8, own, files)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    ids = np.random.default_rng(3).integers(5, 300, 60).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
        rounded = model.to(torch.bfloat16)(torch.from_numpy(ids[None].astype(np.int64))).logits[0].float().numpy()
    executor = CudaExecutor(bundle, EngineConfig(max_slots=1, fp8_prefill=False))
    got = executor.step([SequenceStep(0, ids, 0, len(ids))]).copy()
    executor.close()
    size = np.linalg.norm(expected - expected.mean(-1, keepdims=True))
    by_transformers = np.linalg.norm(rounded - expected) / size  # these weights amplify every rounding
    assert np.linalg.norm(got - expected) / size < max(0.03, 1.5 * by_transformers)
