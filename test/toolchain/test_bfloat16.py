"""Decoders in bf16, for activations that fp16 cannot hold: the graph is run by onnx's reference evaluator, engines are built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx.reference import ReferenceEvaluator
from test_export import PROMPT, hf_logits, quantised_model, relative_error, run_portable

from edgellm_ros.bundle import DECODER, Bundle
from edgellm_ros.config import BuildOptions
from edgellm_ros.executors.embedding import EmbeddingTable
from edgellm_ros.toolchain.build.bfloat16 import to_bfloat16
from edgellm_ros.toolchain.export import export_bundle

BF16 = ml_dtypes.bfloat16
IDS = PROMPT[:24]  # past the window of 16


def run_bfloat16(bundle: Bundle) -> np.ndarray:
    """Logits of IDS from decoder.onnx turned into bf16, by onnx's own NumPy operators."""
    path = bundle.path / "decoder.bf16.onnx"
    graph = onnx.load(str(bundle.path / DECODER), load_external_data=False)
    to_bfloat16(graph)
    onnx.save(graph, str(path))
    onnx.checker.check_model(str(path), full_check=True)
    model, names = bundle.manifest.model, bundle.manifest.graph
    embeds = np.empty((len(IDS), model.hidden_size), np.float32)
    EmbeddingTable(bundle).lookup(IDS, embeds)
    cache = np.zeros((1, model.num_kv_heads, len(IDS) + 5, model.head_dim), BF16)
    feed = {n.format(layer=i): cache for i in range(model.num_layers) for n in (names.past_key, names.past_value)}
    feed |= {names.embeds: embeds[None].astype(BF16), names.positions: np.arange(len(IDS))[None]}
    feed |= {names.write_indices: np.array([0]), names.logit_indices: np.arange(len(IDS))}
    (logits,) = ReferenceEvaluator(onnx.load(str(path))).run([names.logits], feed)
    return logits


@pytest.mark.parametrize(("kind", "weights"), [("gemma3_scaled", "fp16"), ("qwen2", "int8"), ("smollm3", "int4")])
def test_a_decoder_in_bf16_computes_what_transformers_does(
    kind: str, weights: str, tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle(kind, weights).path, tmp_path / "bundle"))
    expected = hf_logits(quantised_model(kind, weights, bundle.manifest.quantization.group_size), IDS)
    assert relative_error(run_bfloat16(bundle), expected) < 0.04  # bf16 has 8 bits


def test_what_fp16_cannot_hold_bf16_can(tmp_path: Path) -> None:
    """The residual stream grows to some 100,000, as Gemma 3's does; norms bring it back before every product."""
    model = tiny.save_checkpoint("gemma3_scaled", tmp_path / "source")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_feedforward_layernorm" in name:
                parameter.add_(40_000)
    model.save_pretrained(tmp_path / "source")
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle", weights="fp16")
    with np.errstate(all="ignore"):
        assert not np.isfinite(run_portable(bundle, IDS)).all()
    assert relative_error(run_bfloat16(bundle), hf_logits(model, IDS)) < 0.04


@pytest.mark.parametrize(
    ("kind", "asked", "gets"),
    [("gemma3_scaled", "auto", "bf16"), ("gemma3_scaled", "fp16", "fp16"), ("llama", "auto", "fp16"), ("llama", "bf16", "bf16")],
)
def test_an_engine_computes_in_what_the_model_needs_or_was_asked_for(
    kind: str, asked: str, gets: str, tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (it exists for x86-64 only)")
    from edgellm_ros.toolchain.build.builder import build_engine
    from edgellm_ros.toolchain.build.kernels import fused_attentions

    bundle = Bundle.open(shutil.copytree(tiny_bundle(kind, "int4").path, tmp_path / "bundle"))
    options = BuildOptions(max_input=32, max_context=64, profile="single", activations=asked)
    report = build_engine(bundle, "sm120", options)[0].report
    assert report["options"]["activations"] == gets and ("-bf16" in report["key"]) == (gets == "bf16")
    assert fused_attentions(report["kernels"]) == bundle.manifest.model.num_layers
