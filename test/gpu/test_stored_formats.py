"""Every format that export keeps of others' checkpoints runs: logits are transformers' of the weights that were meant.

Prompts go through matrix products, and single tokens through the decode kernels; both must agree with the oracle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
import torch
from test_executor_contract import step

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.lora import LoraAdapter, LoraTensors
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.toolchain.export import export_bundle

GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}


def modelopt(algorithm: str, pack: Any, **details: Any) -> tuple[Any, Any, Any]:
    return (pack, *packers.modelopt_files(algorithm, **details))


def first_layer_only(pack: Callable[[str, np.ndarray], Any]) -> Callable[[str, np.ndarray], Any]:
    """Other layers stay floats, as many tools leave the first and last."""
    return lambda module, weight: pack(module, weight) if ".layers.0." in module else None


# packer, quantization_config, files beside it
CASES: dict[str, tuple[Any, Any, Any]] = {
    "zero points": (packers.awq(32), packers.awq_config(32), None),
    "factor": modelopt("W4A16_AWQ", packers.modelopt_int4(32, factor=True), group_size=32),
    "int8 factor": modelopt("W8A8_SQ_PER_CHANNEL", packers.modelopt_int8(factor=True)),
    "order": (packers.gptq(32, 4, False, True), packers.gptq_config(32, 4, False, True), None),
    "8 bit zeros": (packers.gptq(32, 8, False), packers.gptq_config(32, 8, False), None),
    "groups of 16": (packers.ct_packed(16, 4, True),
                     packers.ct_config("pack-quantized", GROUP | {"group_size": 16}), None),
    "fp8 rows": (packers.ct_fp8(True),
                 packers.ct_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}), None),
    "fp8 blocks": (packers.fp8_blocks(64, 64), BLOCKS, None),
    "nvfp4": modelopt("NVFP4", packers.modelopt_nvfp4, group_size=16),
}  # fmt: skip
KINDS = {"factor": ("gpu_qwen3", "gpu_llama_bias"), "order": ("gpu_qwen3", "gpu_llama_bias")}


def both_paths(executor: CudaExecutor, ids: np.ndarray) -> np.ndarray:
    """Logits after every token: of the first 40 as a prompt, of the others one by one."""
    rows = [executor.step([step(0, ids[:40], 0, 40)]).copy()]
    rows += [executor.step([step(0, ids[i : i + 1], i)]).copy() for i in range(40, len(ids))]
    return np.concatenate(rows)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected - expected.mean(-1, keepdims=True)))


@pytest.fixture
def save(
    gpu_model: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[Any, Bundle]]:
    """`save(kind, packer, config, files)` is (the model with the weights that are meant, the bundle)."""

    def make(kind: str, pack: Any, config: Any, files: Any) -> tuple[Any, Bundle]:
        plain = gpu_model(kind)[0]
        monkeypatch.setattr(packers, "make_model", lambda _: copy.deepcopy(plain))
        model = packers.save_quantized(kind, tmp_path / "source", pack, config, files)
        return model, export_bundle(tmp_path / "source", tmp_path / "bundle")

    return make


def expected_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
    return logits


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case in CASES for kind in KINDS.get(case, ("gpu_llama",))])
def test_a_stored_format_computes_what_its_checkpoint_means(
    case: str, kind: str, save: Callable[..., tuple[Any, Bundle]]
) -> None:
    model, bundle = save(kind, *CASES[case])
    ids = np.random.default_rng(3).integers(5, 300, 60).astype(np.int32)
    executor = CudaExecutor(bundle, EngineConfig(max_slots=1, max_context=128, fp8_prefill=False))
    got = both_paths(executor, ids)
    executor.close()
    assert error(got, expected_logits(model, ids)) < 0.04
    reference = OnnxRuntimeExecutor(bundle, EngineConfig(max_slots=1, max_context=128))
    logits = reference.step([step(0, ids, 0, len(ids))])
    assert error(got, logits) < 0.1  # which rounds activations to int8 beside integers
    reference.close()


@pytest.mark.parametrize("fp8_prefill", [False, True])
def test_layers_of_different_formats_run_in_one_model(
    fp8_prefill: bool, save: Callable[..., tuple[Any, Bundle]]
) -> None:
    own, files = packers.modelopt_files("FP8", exclude_modules=["model.layers.1*", "model.layers.2*", "lm_head"])
    pack = first_layer_only(packers.modelopt_fp8)
    model, bundle = save("gpu_llama", pack, own, files)
    ids = np.random.default_rng(5).integers(5, 300, 60).astype(np.int32)
    expected = expected_logits(model, ids)
    quant = bundle.manifest.quantization
    assert [quant.format_of(f"layers.{layer}.mlp.down").scheme for layer in range(3)] == ["fp8", "fp16", "fp16"]
    executor = CudaExecutor(bundle, EngineConfig(max_slots=1, max_context=128, fp8_prefill=fp8_prefill))
    assert error(both_paths(executor, ids), expected) < (0.1 if fp8_prefill else 0.04)
    executor.close()


@pytest.mark.parametrize("case", ["factor", "order"])
def test_an_adapter_reads_the_input_that_its_layer_reads(case: str, save: Callable[..., tuple[Any, Bundle]]) -> None:
    model, bundle = save("gpu_qwen3", *CASES[case])
    rng = np.random.default_rng(7)
    ids = rng.integers(5, 300, 60).astype(np.int32)
    plain, tensors = expected_logits(model, ids), []
    with torch.no_grad():
        for name, module in model.named_modules():
            if not name.endswith("_proj"):
                continue
            out, width = module.weight.shape
            a = rng.normal(0, width**-0.5, (8, width)).astype(np.float32)
            b = rng.normal(0, 0.05, (out, 8)).astype(np.float32)
            module.weight += torch.from_numpy(0.5 * b @ a)
            tensors.append(LoraTensors(int(name.split(".")[2]), name.rpartition(".")[2], a, b, 0.5))
    config = EngineConfig(max_slots=1, max_context=128, max_loras=1, max_lora_rank=8)
    executor = CudaExecutor(bundle, config)
    index = executor.load_adapter("a", LoraAdapter(tuple(tensors), "x")).index
    rows = [executor.step([replace(step(0, ids[:40], 0, 40), adapter=index)]).copy()]
    rows += [executor.step([replace(step(0, ids[i : i + 1], i), adapter=index)]).copy() for i in range(40, len(ids))]
    executor.close()
    adapted = expected_logits(model, ids)
    assert error(plain, adapted) > 0.2, "the adapter must matter"
    assert error(np.concatenate(rows), adapted) < 0.05
