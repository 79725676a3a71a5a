"""An FP8 cache holds keys beyond 448 and values below its subnormals where the checkpoint has scales for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packers
import safetensors.torch
import torch

from edgellm_ros.config import EngineConfig
from edgellm_ros.executors.base import SequenceStep
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.toolchain.export import export_bundle

# Each pair leaves the model what it is: keys become about 2,000, values about 1e-4.
FACTORS = {"q_proj": 1e-3, "k_proj": 1e3, "v_proj": 1e-4, "o_proj": 1e4}


def save(path: Path) -> Any:
    """A checkpoint in FP8 with scales for its weights only; returns what those mean."""

    def pack(module: str, weight: np.ndarray) -> Any:
        factor = FACTORS.get(module.rpartition(".")[2], 1.0)
        packed = packers.modelopt_fp8(module, weight * np.float32(0.5 * factor))
        if packed is not None:
            packed[0].pop("k_scale", None)
        return packed

    return packers.save_quantized("gpu_llama", path, pack, *packers.modelopt_files("FP8"))


def logits(path: Path, ids: np.ndarray, form: str) -> np.ndarray:
    """After a prompt's last half, and after each of the tokens that follow, one by one."""
    executor = CudaExecutor(
        export_bundle(path, path.parent / f"bundle-{form}", overwrite=True),
        EngineConfig(max_slots=1, fp8_prefill=False, kv_cache=form),
    )
    rows = [executor.step([SequenceStep(0, ids[:40], 0, 40)]).copy()]
    for i in range(40, len(ids)):
        rows.append(executor.step([SequenceStep(0, ids[i : i + 1], i, 1)]).copy())
    executor.close()
    return np.concatenate(rows)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected - expected.mean(-1, keepdims=True)))


def test_scales_keep_what_an_fp8_cache_would_lose(gpu_model: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    gpu_model("gpu_llama")  # makes the configuration known
    model = save(tmp_path / "source")
    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        return lambda _, __, out: largest.__setitem__(name, float(out.abs().max()))

    for name, module in model.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(watch(name))
    ids = np.random.default_rng(3).integers(5, 300, 60).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
    assert max(v for n, v in largest.items() if "k_proj" in n) > 600
    assert max(v for n, v in largest.items() if "v_proj" in n) < 2**-9
    lost = error(logits(tmp_path / "source", ids, "fp8"), expected)
    file = tmp_path / "source" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, value in largest.items():
        tensors[f"{name}.{name.rpartition('.')[2][0]}_scale"] = torch.tensor(value / 448)
    safetensors.torch.save_file(tensors, file)
    for form in ("bf16", "fp16"):  # the scales change no other cache
        assert error(logits(tmp_path / "source", ids, form), expected) < 0.04
    assert error(logits(tmp_path / "source", ids, "fp8"), expected) < 0.12 < 0.3 < lost
