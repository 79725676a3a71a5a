"""An export takes at most 1.3 times the checkpoint's memory, whatever the checkpoint's form and the head's."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_checkpoints import write_checkpoint
from tiny import save_checkpoint

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors.base import SequenceStep
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.toolchain import layerwise
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.layerwise import first_logits

# Mostly vocabulary: temporaries of a whole table show, where a layer's cannot. All forms are 70 to 110 MB, for some 20 MB
# are the same whatever the size.
MODEL = ModelSpec(
    family="llama", name="mostly vocabulary", num_layers=2, hidden_size=1024, intermediate_size=128, num_heads=16, num_kv_heads=1,
    head_dim=64, vocab_size=32000, max_context=256, rms_norm_eps=1e-5, rope_theta=1e4, tied_head=True,
)  # fmt: skip
SMALL = replace(MODEL, name="small", hidden_size=256, num_heads=4, num_kv_heads=2, vocab_size=3000)
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("bf16", {}),
    ("awq", {}),
    ("awq", {"lm_head": "int8"}),
    ("gptq-head", {}),
    ("ct-fp8", {}),
    ("modelopt-fp8-head", {}),
    ("modelopt-int4-head", {}),
    ("modelopt-nvfp4-head", {}),
    ("gguf-q4_0", {}),
]
each_form = pytest.mark.parametrize(("form", "options"), FORMS, ids=["-".join([f, *o.values()]) for f, o in FORMS])


def growth(work: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory grew at most while `work` ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(which: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


@each_form
def test_an_export_takes_at_most_a_third_more_memory_than_the_checkpoint(
    form: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """NumPy's arrays are counted one by one; what ONNX Runtime takes is in the process's size."""
    write_checkpoint(SMALL, "bf16", tmp_path / "small")
    export_bundle(tmp_path / "small", tmp_path / "libraries-are-loaded-then")
    model = replace(MODEL, vocab_size=96000) if form.startswith("gguf") else MODEL
    size = write_checkpoint(model, form, tmp_path / "source")
    tracemalloc.start()
    try:
        whole = growth(lambda: export_bundle(tmp_path / "source", tmp_path / "bundle", **options))
        _, arrays = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert arrays < 1.3 * size
    assert whole < 1.3 * size


def check_layer_by_layer(bundle: Bundle) -> None:
    """The self-test's logits are those of a session that has the whole decoder."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, bundle.manifest.model.vocab_size, size).astype(np.int32) for size in (1, 23)]
    executor = OnnxRuntimeExecutor(bundle, EngineConfig(max_context=32))
    try:
        whole = [executor.step([SequenceStep(0, ids, 0, min(len(ids), 7))]).copy() for ids in prompts]
    finally:
        executor.close()
    for ours, theirs in zip(first_logits(bundle, prompts, [1, 7]), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@each_form
def test_layer_by_layer_every_form_gives_the_whole_decoders_logits(
    form: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_LEAST_NUMBERS", 1)  # 32 parts of the head, the last one smaller
    write_checkpoint(SMALL, form, tmp_path / "source")
    check_layer_by_layer(export_bundle(tmp_path / "source", tmp_path / "bundle", **options))


@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "phi3_partial", "gemma3"])  # what graphs differ in
def test_layer_by_layer_every_family_gives_the_whole_decoders_logits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_LEAST_NUMBERS", 1)
    save_checkpoint(family, tmp_path / "source")
    check_layer_by_layer(export_bundle(tmp_path / "source", tmp_path / "bundle", weights="fp32"))
