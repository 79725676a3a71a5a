"""What only some families compute: past longrope's short context, in int4, in the reference, and where it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_export import hf_greedy, hf_logits, quantised_model, relative_error, run_executor, run_portable

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import UnsupportedError
from edgellm_ros.executors import create_executor
from edgellm_ros.executors.cuda import unsupported_reason
from edgellm_ros.executors.engine_preflight import Machine
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.detect import load_spec
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.layers import EMBEDDING, FINAL_NORM, HEAD, read_layer, read_norm
from edgellm_ros.toolchain.reference import ReferenceDecoder
from edgellm_ros.toolchain.rope import rope_tables

TinyBundle = Callable[[str, str], Bundle]
NEW = ("smollm3", "smollm3_window", "phi3", "phi3_longrope", "phi3_partial", "gemma3", "gemma3_scaled")
LONG = np.random.default_rng(8).integers(5, tiny.VOCAB_SIZE - 5, 170).astype(np.int32)  # past longrope's 160


@pytest.mark.parametrize("kind", ["phi3_longrope", "phi3_partial"])
def test_a_longer_context_takes_longropes_other_list_as_transformers_does(
    kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = export_bundle(tiny_checkpoint(kind), tmp_path / "long", weights="fp32", max_context=tiny.MAX_CONTEXT)
    model = tiny.make_model(kind)
    logits, tokens = run_executor(bundle, LONG, 40)
    assert np.abs(logits - hf_logits(model, LONG)).max() < 3e-4
    assert tokens == hf_greedy(model, LONG, 40)
    assert np.abs(run_portable(bundle, LONG) - hf_logits(model, LONG)).max() < 3e-4


def test_without_a_wish_the_context_is_the_one_of_longropes_short_list(tiny_bundle: TinyBundle) -> None:
    assert tiny_bundle("phi3_longrope", "fp32").manifest.model.max_context == 160 < tiny.MAX_CONTEXT


@pytest.mark.parametrize("kind", NEW)
def test_the_numpy_reference_is_hugging_faces(kind: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    source = open_checkpoint(tiny_checkpoint(kind))
    _, model = load_spec(source)
    ids = LONG[:100].astype(np.int64)
    if model.rope_scaling.get("rope_type") == "longrope":
        ids = LONG.astype(np.int64)  # the checkpoint's own context takes the long list, transformers from 161 tokens on
    tables = {rope: rope_tables(model, tiny.MAX_CONTEXT, rope) for rope in model.rope_tables()}
    reference = ReferenceDecoder(model, tables)
    reference.embed(source.read(EMBEDDING), [ids])
    for layer in range(model.num_layers):
        reference.layer(layer, read_layer(source, model, layer))
    head = source.read(EMBEDDING if model.tied_head else HEAD)
    (logits,) = reference.logits(read_norm(source, model, FINAL_NORM), head, last=len(ids))
    assert np.abs(logits - hf_logits(tiny.make_model(kind), ids)).max() < 3e-4


@pytest.mark.parametrize("kind", ["smollm3", "phi3_partial", "gemma3_scaled"])
def test_int4_graphs_compute_with_the_dequantised_weights(kind: str, tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle(kind, "int4")
    group = bundle.manifest.quantization.group_size
    ids = LONG[:80]
    expected = hf_logits(quantised_model(kind, "int4", group), ids)
    assert relative_error(run_portable(bundle, ids), expected) < 0.01  # fp16 activations
    assert relative_error(run_executor(bundle, ids)[0], expected) < 0.08  # int8 activations


@pytest.mark.parametrize("kind", NEW)
def test_the_cuda_executor_refuses_these_families_for_the_size_of_their_heads_alone(
    kind: str, tiny_bundle: TinyBundle
) -> None:
    module, reason = native.import_module()
    if module is None:
        pytest.skip(reason)
    assert re.search(r": head_dim is (16|32); the kernels take [^;]*$", unsupported_reason(tiny_bundle(kind, "fp32")))


def test_auto_runs_on_the_cpu_what_a_gpu_cannot(tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    # As where a GPU is, without TensorRT: these heads are smaller than the kernels take.
    monkeypatch.setattr("edgellm_ros.native.unavailable_reason", lambda: "")
    monkeypatch.setattr("edgellm_ros.executors.engine_preflight.probe_machine", lambda: Machine("no TensorRT"))
    executor = create_executor(tiny_bundle("gemma3", "fp32"), EngineConfig(max_slots=1, max_context=32))
    assert executor.info.name == "onnxruntime"
    executor.close()
    with pytest.raises(UnsupportedError, match="executor is 'cuda': "):
        create_executor(tiny_bundle("gemma3", "fp32"), EngineConfig(executor="cuda"))
