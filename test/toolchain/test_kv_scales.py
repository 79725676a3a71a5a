"""A checkpoint's scales of an FP8 KV cache: keys and values are stored divided, and nothing else changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import packers
import pytest
import safetensors.torch
import torch
from adapters import ATTENTION, write_adapter
from test_export import PROMPT, hf_logits, relative_error, run_executor

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import CheckpointError
from edgellm_ros.executors import SequenceStep
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.toolchain.export import export_bundle

SCALES = {"k_proj.k_scale": 3.0, "v_proj.v_scale": 1.5}  # ModelOpt's names
POWERS = (4.0, 2.0)  # the least powers of two that are not below
PACKERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "fp8": ("FP8", packers.modelopt_fp8, {}),
    "int4": ("W4A16_AWQ", packers.modelopt_int4(32, factor=True), {"group_size": 32}),
    "int8": ("W8A16", packers.modelopt_int8(factor=False), {}),
    "nvfp4": ("NVFP4", packers.modelopt_nvfp4, {"group_size": 16}),
}


def save(path: Path, kind: str, case: str, scales: dict[str, Any]) -> Any:
    """A ModelOpt checkpoint; `scales` are of every layer, by the name after `self_attn.`."""
    algorithm, pack, details = PACKERS[case]
    model = packers.save_quantized(kind, path, pack, *packers.modelopt_files(algorithm, **details))
    file = path / "model.safetensors"
    tensors = {name: t for name, t in safetensors.torch.load_file(file).items() if not name.endswith(".k_scale")}
    for layer in range(model.config.num_hidden_layers):
        for name, value in scales.items():
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.as_tensor(value, dtype=torch.float32)
    safetensors.torch.save_file(tensors, file)
    return model


def caches(bundle: Bundle, ids: np.ndarray) -> list[np.ndarray]:
    """Keys and values of each layer in turn, (kv_heads, tokens, head_dim), after a prompt."""
    executor = OnnxRuntimeExecutor(bundle, EngineConfig(max_context=128))
    try:
        executor.step([SequenceStep(0, ids, 0)])
        return [cache[0, :, : len(ids)].copy() for cache in executor._cache]
    finally:
        executor.close()


@pytest.mark.parametrize("case", PACKERS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])  # qwen2 has biases; two have norms on heads
def test_keys_and_values_are_divided_and_logits_stay(kind: str, case: str, tmp_path: Path) -> None:
    model = save(tmp_path / "source", kind, case, SCALES)
    scaled = export_bundle(tmp_path / "source", tmp_path / "scaled")
    save(tmp_path / "plain-source", kind, case, {})
    plain = export_bundle(tmp_path / "plain-source", tmp_path / "plain")
    assert set(scaled.manifest.model.kv_scales) == {POWERS} and plain.manifest.model.kv_scales == ()
    got, without = (run_executor(bundle, PROMPT)[0] for bundle in (scaled, plain))
    assert relative_error(got, without) < 1e-5  # powers of two
    assert relative_error(got, hf_logits(model, PROMPT)) < (0.3 if kind == "gemma3" else 0.2)  # int8 inputs
    for i, (ours, theirs) in enumerate(zip(caches(scaled, PROMPT), caches(plain, PROMPT), strict=True)):
        np.testing.assert_allclose(ours * POWERS[i % 2], theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())


def test_weights_that_are_quantised_again_are_divided_too(tmp_path: Path) -> None:
    model = save(tmp_path / "source", "qwen2", "fp8", SCALES)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle", weights="fp32")
    assert set(bundle.manifest.model.kv_scales) == {POWERS}
    assert relative_error(run_executor(bundle, PROMPT)[0], hf_logits(model, PROMPT)) < 1e-4


def test_e4m3_keeps_values_that_it_would_lose_without_the_scale(tmp_path: Path) -> None:
    """Values of about 1e-3 are below E4M3's smallest normal number, 2^-6."""

    def pack(module: str, weight: np.ndarray) -> Any:
        return packers.modelopt_fp8(module, weight * np.float32(1e-3) if "v_proj" in module else weight)

    own, files = packers.modelopt_files("FP8")
    packers.save_quantized("llama", tmp_path / "plain", pack, own, files)
    plain = caches(export_bundle(tmp_path / "plain", tmp_path / "plain-bundle"), PROMPT)[1::2]
    largest = max(float(np.abs(values).max()) for values in plain)
    file = tmp_path / "plain" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for layer in range(len(plain)):
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([largest / 448])  # llm-compressor's name
    safetensors.torch.save_file(tensors, file)
    bundle = export_bundle(tmp_path / "plain", tmp_path / "bundle")

    def error(values: np.ndarray) -> float:
        return relative_error(values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), values)

    for without, stored in zip(plain, caches(bundle, PROMPT)[1::2], strict=True):
        assert error(without) > 0.2 and error(stored) < 0.04


def test_an_adapter_is_scaled_as_the_projections_that_it_changes(tmp_path: Path) -> None:
    model = save(tmp_path / "source", "qwen2", "fp8", SCALES)
    scaled = export_bundle(tmp_path / "source", tmp_path / "scaled", max_lora_rank=8)
    save(tmp_path / "plain-source", "qwen2", "fp8", {})
    plain = export_bundle(tmp_path / "plain-source", tmp_path / "plain", max_lora_rank=8)
    adapter = write_adapter(tmp_path / "adapter", model, dict.fromkeys(ATTENTION, 4), seed=3)
    found = []
    for bundle in (scaled, plain):
        executor = OnnxRuntimeExecutor(bundle, EngineConfig(max_context=128, max_loras=1, max_lora_rank=8))
        index = executor.load_adapter("a", adapter).index
        found.append(executor.step([SequenceStep(0, PROMPT, 0, 5, adapter=index)]).copy())
        plain_logits = executor.step([SequenceStep(0, PROMPT, 0, 5)]).copy()
        executor.close()
        assert relative_error(found[-1], plain_logits) > 0.1
    assert relative_error(found[0], found[1]) < 1e-4


@pytest.mark.parametrize(
    ("scales", "note"),
    [
        ({"k_proj.k_scale": 1.0, "v_proj.v_scale": 0.04}, r"from 0.04 to 1: E4M3 holds .* as they are"),
        (SCALES, r"from 1.5 to 3: keys and values of 3 layers are stored divided by powers of two"),
    ],
)
def test_the_manifest_says_what_became_of_the_scales(scales: dict[str, Any], note: str, tmp_path: Path) -> None:
    save(tmp_path / "source", "llama", "fp8", scales)
    notes = export_bundle(tmp_path / "source", tmp_path / "bundle").manifest.quantization.notes
    assert any(re.search(note, text) for text in notes), notes


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "must be above 0"), (-1.0, "must be above 0"), ([1.0, 2.0], "one scale of the KV cache"), (np.nan, "NaN")],
)
def test_a_scale_that_cannot_be_one_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path / "source", "llama", "fp8", {"k_proj.k_scale": value})
    with pytest.raises(CheckpointError, match=rf"layers\.0\.self_attn\.k_proj\.k_scale.*{message}"):
        export_bundle(tmp_path / "source", tmp_path / "bundle")
