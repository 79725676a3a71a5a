"""decoder.plugin.onnx, with its operators in NumPy, against decoder.onnx, which ONNX Runtime runs: prompt and decoding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packers
import pytest
from onnx.reference import ReferenceEvaluator
from plugin_ops import OPS
from portable_session import portable_session

from edgellm_ros.bundle import DECODER, DECODER_LORA, DECODER_PLUGIN, DECODER_PLUGIN_LORA, WEIGHTS, Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors.lora_layout import stacks_of
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.graph.plugin import write_plugin_graph

TinyBundle = Callable[..., Bundle]
CAPACITY = 24
STEPS = ([[0, 0], 7], [[7, 7], 1], [[8, 8], 3])  # write indices of two sequences, tokens
# of the largest logit; fp16 graphs round each node's output
ALLOWED = {"float32": 2e-5, "float16": 1e-2}


def plugin_graph(bundle: Bundle, directory: Path, lora: bool = False) -> Path:
    """The graph beside its weights. Its operators take any head_dim, unlike the kernels."""
    manifest = bundle.manifest
    shutil.copy(bundle.file(WEIGHTS), directory / WEIGHTS)
    path = directory / DECODER_PLUGIN
    write_plugin_graph(path, manifest.model, manifest.quantization, manifest.graph, bundle.weights(), lora)
    return path


def compare(
    bundle: Bundle, path: Path, lora: bool = False, allowed: float = 0.0, ops: Any = OPS, steps: Any = STEPS,
    capacity: int = CAPACITY,
) -> None:  # fmt: skip
    """Both graphs over the same steps: logits, and what each wrote to its cache."""
    model, names = bundle.manifest.model, bundle.manifest.graph
    dtype = np.dtype(names.activation_dtype)
    theirs = portable_session(bundle.file(DECODER_LORA if lora else DECODER))
    ours = ReferenceEvaluator(str(path), new_ops=ops)
    assert ours.input_names[:4] == [i.name for i in theirs.get_inputs()][:4]
    rng = np.random.default_rng(3)
    caches: dict[str, Any] = {
        name.format(layer=layer): np.zeros((2, model.num_kv_heads, capacity, model.head_dim), dtype)
        for layer in range(model.num_layers)
        for name in (names.past_key, names.past_value)
    }
    adapters: dict[str, Any] = {}
    for layer in range(model.num_layers) if lora else ():
        for stack in stacks_of(model):
            a, b = (name.format(layer=layer, stem=stack.stem) for name in (names.lora_a, names.lora_b))
            adapters[a] = rng.normal(0, 0.1, (stack.in_features, 4)).astype(dtype)
            adapters[b] = rng.normal(0, 0.1, (4, stack.out_features)).astype(dtype)
    combined = {
        names.past_kv.format(layer=layer): np.zeros((2, 2, model.num_kv_heads, capacity, model.head_dim), dtype)
        for layer in range(model.num_layers)
    }
    for write, tokens in steps:
        inputs = {
            names.embeds: rng.normal(0, 1, (2, tokens, model.hidden_size)).astype(dtype),
            names.positions: np.asarray(write)[:, None] + np.arange(tokens)[None],
            names.write_indices: np.asarray(write),
            names.logit_indices: np.array([tokens - 1, 2 * tokens - 1]),
            **adapters,
        }
        outputs = [o.name for o in theirs.get_outputs()]
        wanted = dict(zip(outputs, theirs.run(outputs, {**inputs, **caches}), strict=True))
        got = dict(zip(ours.output_names, ours.run(None, {**inputs, **combined}), strict=True))
        scale = np.abs(wanted[names.logits]).max()
        error = np.abs(got[names.logits] - wanted[names.logits]).max() / scale
        assert got[names.logits].dtype == np.float32 and error <= (allowed or ALLOWED[dtype.name]), error
        for layer in range(model.num_layers):
            pair = [wanted[name.format(layer=layer)] for name in (names.present_key, names.present_value)]
            present = got[names.present_kv.format(layer=layer)]
            assert present.dtype == dtype
            assert np.allclose(present, np.stack(pair, 1), rtol=0, atol=(allowed or ALLOWED[dtype.name]) * np.abs(pair).max())
            combined[names.past_kv.format(layer=layer)] = present
            caches |= {name.format(layer=layer): value for name, value in
                       zip((names.past_key, names.past_value), pair, strict=True)}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["llama", "llama_tied", "llama_bias", "mistral", "qwen2_window", "qwen3", "smollm3", "smollm3_window", "phi3", "gemma3",
     "gemma3_scaled"],
)  # fmt: skip
def test_every_family_computes_what_the_portable_graph_does(kind: str, tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    bundle = tiny_bundle(kind, "fp32")
    compare(bundle, plugin_graph(bundle, tmp_path))


@pytest.mark.parametrize(("kind", "weights"), [("llama_bias", "int4"), ("qwen3", "int4"), ("qwen2", "int8"), ("mistral", "fp16")])
def test_stored_weights_are_read_as_the_portable_graph_reads_them(
    kind: str, weights: str, tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    bundle = tiny_bundle(kind, weights)
    path = plugin_graph(bundle, tmp_path)
    operators = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    wanted = {"int4": "EdgeLLMInt4Gemm", "int8": "EdgeLLMInt8Gemm"}.get(weights)
    assert operators.count(wanted) == 4 * bundle.manifest.model.num_layers + (weights == "int8") if wanted else True
    assert "DequantizeLinear" not in operators
    compare(bundle, path)


def test_adapters_are_inputs_here_too(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    bundle = tiny_bundle("llama", "fp32", 8)
    compare(bundle, plugin_graph(bundle, tmp_path, lora=True), lora=True)


@pytest.mark.parametrize("case", ["awq", "gptq by activation"])
def test_what_others_quantised_keeps_its_offsets_and_orders(case: str, tmp_path: Path) -> None:
    pack, config = {
        "awq": (packers.awq(32), packers.awq_config(32)),
        "gptq by activation": (packers.gptq(32, 4, True, True), packers.gptq_config(32, 4, True, True)),
    }[case]
    packers.save_quantized("llama", tmp_path / "source", pack, config)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    (tmp_path / "plugin").mkdir()
    compare(bundle, plugin_graph(bundle, tmp_path / "plugin"), allowed=2e-2)


def test_only_operators_of_old_parsers_and_plugins_are_used(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    for kind in ("qwen3", "smollm3", "gemma3_scaled"):
        directory = tmp_path / kind
        directory.mkdir()
        model = onnx.load(plugin_graph(tiny_bundle(kind, "int4"), directory))
        onnx.checker.check_model(model, full_check=True)
        assert {(o.domain, o.version) for o in model.opset_import} == {("", 18), ("edgellm", 1)}
        standard = {node.op_type for node in model.graph.node if not node.domain}
        for name in standard:
            assert onnx.defs.get_schema(name, 18, "").since_version <= 18
        assert not standard & {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter", "Gelu"}


def test_export_writes_it_on_demand_and_lists_it(smollm2_gguf: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    arguments = ["export", str(smollm2_gguf), "-o", str(output), "--dialect", "plugin", "--max-lora-rank", "8"]
    assert main([*arguments, "--max-context", "256"]) == 0
    bundle = Bundle.open(output)
    assert bundle.has(DECODER_PLUGIN) and bundle.has(DECODER_PLUGIN_LORA) and bundle.has(DECODER)
    model = bundle.manifest.model
    nodes = [n for n in onnx.load(bundle.file(DECODER_PLUGIN), load_external_data=False).graph.node
             if n.op_type == "EdgeLLMAttention"]  # fmt: skip
    assert len(nodes) == model.num_layers
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert attributes == {
        "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "scale": 0.125, "window": 0, "qk_norm": 0,
        "norm_eps": pytest.approx(1e-5), "tree": 0, "plugin_version": b"1", "plugin_namespace": b"edgellm",
    }  # fmt: skip


def test_without_the_option_there_is_no_such_file(tiny_bundle: TinyBundle) -> None:
    assert not tiny_bundle("llama", "int4").has(DECODER_PLUGIN)


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        ("llama", "int4", "has head_dim 16; the plugin has kernels for 64, 80, 96, 128, 256"),
        ("phi3_partial", "int4", "head_dim|turns 16 of a head's"),
    ],
)
def test_what_the_plugins_lack_is_refused_by_name(
    kind: str, weights: str, message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ToolchainError, match=message):
        export_bundle(tiny_checkpoint(kind), tmp_path / "bundle", weights=weights, dialect="plugin")
    assert not (tmp_path / "bundle").exists()


def test_fp32_weights_are_refused_by_name(smollm2_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="layers.0.attn.qkv is fp32; the plugins multiply int4, int8 and fp16"):
        export_bundle(smollm2_gguf, tmp_path / "bundle", weights="fp32", dialect="plugin")
