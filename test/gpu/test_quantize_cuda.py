"""`edgellm quantize` on a GPU: it loses no more than the same recipe on a CPU, and NVFP4 gets activations there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import unified

from edgellm_ros.bundle import Bundle
from edgellm_ros.toolchain import load_recipe, quantize_and_save
from edgellm_ros.toolchain.export import export_bundle

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed; pip install 'edgellm_ros[quantize]'")
SHORT = {"samples": 4, "sequence_length": 32}
TOKENS = torch.arange(8, 72)[None] % tiny.VOCAB_SIZE


def distance(path: Path) -> float:
    """Mean difference of the dequantised weights' logits from the original's, over their standard deviation."""
    with torch.no_grad():
        expected, found = tiny.make_model("qwen3")(TOKENS).logits, unified.model_of(path)(TOKENS).logits
    return float((found - expected).abs().mean() / expected.std())


@pytest.mark.parametrize(
    ("recipe", "algorithm", "inputs"),
    [("fp8", "FP8", 7), ("int4_awq", "W4A16_AWQ", 0), ("w4a8_awq", "W4A8_AWQ", 7), ("nvfp4", "NVFP4", 7)],
)
def test_a_gpu_quantises_as_well_as_a_cpu(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, recipe: str, algorithm: str, inputs: int
) -> None:
    source = tiny_checkpoint("qwen3")
    made = quantize_and_save(source, tmp_path / "gpu", load_recipe(recipe, **SHORT), device="auto")
    assert (made.device, made.algorithm) == ("cuda", algorithm)
    other = quantize_and_save(source, tmp_path / "cpu", load_recipe(recipe, **SHORT), device="cpu")
    assert 1e-5 < distance(made.path) < 1.3 * distance(other.path)
    scales = [name for name in unified.tensors(made.path) if name.endswith("input_scale")]
    assert len(scales) == 3 * inputs
    bundle = export_bundle(made.path, tmp_path / "bundle")  # which runs its self-test
    assert algorithm in Bundle.open(bundle.path).manifest.quantization.kept
