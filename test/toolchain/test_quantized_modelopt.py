"""ModelOpt's checkpoints become bundles that compute what their dequantised weights compute, integers unchanged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packers
import pytest
import safetensors.torch
import torch
from test_export import PROMPT, hf_logits, relative_error, run_executor, run_portable

from edgellm_ros.bundle import DECODER, Bundle
from edgellm_ros.errors import CheckpointError
from edgellm_ros.executors.cuda import _upload
from edgellm_ros.manifest import LinearFormat
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.graph.portable import write_portable_graph

CASES = {
    "int4_awq": ("W4A16_AWQ", packers.modelopt_int4(32, factor=True), {"group_size": 32}, "int4"),
    "w4a8_awq": ("W4A8_AWQ", packers.modelopt_int4(16, two=True), {"group_size": 16}, "int4"),
    "fp8": ("FP8", packers.modelopt_fp8, {}, "fp8"),
    "int8_sq": ("W8A8_SQ_PER_CHANNEL", packers.modelopt_int8(factor=True), {}, "int8"),
    "int8_wo": ("W8A16", packers.modelopt_int8(factor=False), {}, "int8"),
    "nvfp4": ("NVFP4", packers.modelopt_nvfp4, {"group_size": 16}, "nvfp4"),
}
# MatMulNBits rounds activations to int8, which moves these small models' logits by some per cent.
ROUNDING = {"int4": 0.08, "int8": 0.08, "nvfp4": 0.08, "fp8": 1e-3}


def save(case: str, path: Path, kind: str = "qwen3", **changes: Any) -> Any:
    algorithm, pack, details, _ = CASES[case]
    own, files = packers.modelopt_files(algorithm, **{**details, **changes})
    return packers.save_quantized(kind, path, pack, own, files)


@pytest.mark.parametrize("case", CASES)
def test_a_modelopt_checkpoint_computes_what_its_dequantised_weights_compute(case: str, tmp_path: Path) -> None:
    model = save(case, tmp_path / "source")
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    quant, scheme = bundle.manifest.quantization, CASES[case][3]
    assert quant.weights == scheme and "ModelOpt" in quant.kept
    expected = hf_logits(model, PROMPT)
    assert relative_error(run_executor(bundle, PROMPT)[0], expected) < ROUNDING[scheme]
    onnx.checker.check_model(str(bundle.path / DECODER), full_check=True)
    if case not in ("nvfp4", "fp8"):  # ONNX Runtime has no FLOAT4E2M1; fp8 is below
        assert relative_error(run_portable(bundle, PROMPT), expected) < 0.01  # fp16 activations


def test_the_portable_graph_rounds_activations_as_an_fp8_checkpoint_was_made_for(tmp_path: Path) -> None:
    model = save("fp8", tmp_path / "source", kind="llama")
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    plain = hf_logits(model, PROMPT)
    source = safetensors.torch.load_file(tmp_path / "source" / "model.safetensors")
    scales = {n.removesuffix(".input_scale"): float(t) for n, t in source.items() if n.endswith(".input_scale")}
    rounded = hf_logits(packers.with_fp8_inputs(model, scales), PROMPT)
    onnx.checker.check_model(str(bundle.path / DECODER), full_check=True)
    # In fp32: fp16 puts inputs beside a rounding border on the other side, and FP8's steps are coarse.
    wide = replace(bundle.manifest, graph=replace(bundle.manifest.graph, activation_dtype="float32"))
    write_portable_graph(bundle.path / DECODER, wide.model, wide.quantization, wide.graph, bundle.weights())
    got = run_portable(Bundle(bundle.path, wide), PROMPT)
    assert relative_error(plain, rounded) > 0.01 and relative_error(got, rounded) < 1e-5
    assert relative_error(run_executor(bundle, PROMPT)[0], plain) < 1e-3, "ONNX Runtime's graph leaves them"
    assert any("portable graph rounds activations" in note for note in bundle.manifest.quantization.notes)


@pytest.mark.parametrize("case", ["int8_sq", "w4a8_awq"])
def test_activation_scales_that_nothing_uses_are_named(case: str, tmp_path: Path) -> None:
    save(case, tmp_path / "source", kind="llama")
    notes = export_bundle(tmp_path / "source", tmp_path / "bundle").manifest.quantization.notes
    assert f"activations of {CASES[case][3]} layers stay floating point: input_scale is not used" in notes


@pytest.mark.parametrize("case", ["int4_awq", "int8_sq"])
def test_integers_are_the_checkpoints_own(case: str, tmp_path: Path) -> None:
    save(case, tmp_path / "source", kind="llama")
    weights = export_bundle(tmp_path / "source", tmp_path / "bundle").weights()
    source = safetensors.torch.load_file(tmp_path / "source" / "model.safetensors")
    raw = source["model.layers.1.mlp.down_proj.weight"].numpy()
    stored = weights["layers.1.mlp.down.weight"]
    if case == "int4_awq":  # both to (out, in) nibbles
        raw = np.stack([raw & 15, raw >> 4], 1).reshape(-1, raw.shape[1])
        stored = np.stack([stored & 15, stored >> 4], -1).reshape(raw.shape)
    assert np.array_equal(stored, raw)


def test_the_factor_of_an_input_is_stored_beside_the_layer_and_the_norm_before_it_stays(tmp_path: Path) -> None:
    save("int4_awq", tmp_path / "source", kind="llama")
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    weights = bundle.weights()
    assert bundle.manifest.quantization.format_of("layers.0.attn.qkv") == LinearFormat("int4", 32, input_factor=True)
    source = safetensors.torch.load_file(tmp_path / "source" / "model.safetensors")
    gain = source["model.layers.0.input_layernorm.weight"].float().numpy()
    factor = source["model.layers.0.self_attn.q_proj.pre_quant_scale"].float().numpy()
    assert np.array_equal(weights["layers.0.input_norm.weight"], gain)  # an adapter on q, k, v reads the norm's output
    assert np.array_equal(weights["layers.0.attn.qkv.input_factor"], factor)


def test_layers_that_share_an_input_with_different_factors_are_refused(tmp_path: Path) -> None:
    save("int4_awq", tmp_path / "source", kind="llama")
    edit(tmp_path / "source", lambda t: t["model.layers.1.self_attn.k_proj.pre_quant_scale"].mul_(1.5))
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.qkv: .*different pre_quant_scale.*--weights int4"):
        export_bundle(tmp_path / "source", tmp_path / "out")


def test_excluded_layers_stay_floats_and_what_is_left_out_is_in_the_manifest(tmp_path: Path) -> None:
    algorithm, _, _, _ = CASES["fp8"]
    own, files = packers.modelopt_files(algorithm, exclude_modules=["lm_head", "model.layers.0*"], kv_cache_quant_algo="FP8")

    def pack(module: str, weight: np.ndarray) -> Any:
        return None if ".layers.0." in module else packers.modelopt_fp8(module, weight)

    model = packers.save_quantized("llama", tmp_path / "source", pack, own, files)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    quant = bundle.manifest.quantization
    assert quant.format_of("layers.0.attn.qkv").scheme == "fp16" and quant.format_of("layers.1.attn.qkv").scheme == "fp8"
    assert any("portable graph rounds" in note for note in quant.notes) and any("k_scale" in note for note in quant.notes)
    assert relative_error(run_executor(bundle, PROMPT)[0], hf_logits(model, PROMPT)) < 1e-3
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_a_mixed_checkpoint_has_each_layers_own_format(tmp_path: Path) -> None:
    fp8 = {"quant_algo": "FP8"}
    int4 = {"quant_algo": "W4A16_AWQ", "group_size": 16}
    layers: dict[str, Any] = {}

    def pack(module: str, weight: np.ndarray) -> Any:
        if module == "lm_head":
            return None
        layers[module] = fp8 if "mlp" in module else int4
        return packers.modelopt_fp8(module, weight) if "mlp" in module else packers.modelopt_int4(16)(module, weight)

    _, files = packers.modelopt_files("MIXED_PRECISION", quantized_layers=layers)
    model = packers.save_quantized("llama", tmp_path / "source", pack, {}, files)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    quant = bundle.manifest.quantization
    assert [quant.format_of(f"layers.2.{s}").scheme for s in ("attn.qkv", "mlp.down")] == ["int4", "fp8"]
    assert relative_error(run_executor(bundle, PROMPT)[0], hf_logits(model, PROMPT)) < 0.08


def test_a_checkpoint_can_be_quantised_again_when_told(tmp_path: Path) -> None:
    save("fp8", tmp_path / "source", kind="llama")
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle", weights="int8")
    assert bundle.manifest.quantization.weights == "int8" and not bundle.manifest.quantization.kept
    assert "ModelOpt FP8" in bundle.manifest.provenance["converted"]


def edit(path: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj"
BROKEN = {
    "missing scale": (lambda t: t.pop(f"{Q}.weight_scale"), {}, rf"{Q}\.weight_scale is missing"),
    "short scale": (
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:, :1]}), {},
        rf"{Q}\.weight_scale is \[64, 1\].*groups of 32.*\[64, 2\]",
    ),
    "plain layer": (
        lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64), f"{Q}.weight_scale": t.pop(f"{Q}.weight_scale")}), {},
        rf"{Q}\..* but lm_head",
    ),
    "nan": (lambda t: t[f"{Q}.weight_scale"].fill_(float("nan")), {}, rf"{Q}\.weight_scale holds a NaN"),
    "other group": (lambda t: None, {"group_size": 16}, r"weight_scale is .*groups of 16"),
    "no group": (lambda t: None, {"group_size": None}, "group_size of .* is None"),
    "indivisible": (lambda t: None, {"group_size": 40}, "input features, which do not divide into groups of 40"),
    "other bits": (lambda t: None, {"quant_algo": "FP8"}, r"weight is stored as U8; quant_algo FP8 needs F8_E4M3"),
    "unknown": (lambda t: None, {"quant_algo": "W2A2"}, "quant_algo is W2A2; read are FP8, "),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_that_contradicts_its_tensors_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, details, message = BROKEN[case]
    save("int4_awq", tmp_path / "source", kind="llama")
    edit(tmp_path / "source", change)
    path = tmp_path / "source" / "hf_quant_config.json"
    raw = json.loads(path.read_text())
    raw["quantization"].update(details)
    path.write_text(json.dumps(raw))
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        export_bundle(tmp_path / "source", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]




def test_the_cuda_executor_is_given_fp8_bytes_with_their_scales_and_nothing_that_it_lacks(tmp_path: Path) -> None:
    save("fp8", tmp_path / "source", kind="llama")
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")

    class Decoder:
        linears: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}  # noqa: RUF012
        vectors: set[str] = set()  # noqa: RUF012

        def load_linear(self, stem: str, weight: np.ndarray, scale: np.ndarray | None) -> None:
            self.linears[stem] = weight, scale

        def load_vector(self, name: str, values: np.ndarray) -> None:
            self.vectors.add(name)

    decoder = Decoder()
    _upload(decoder, bundle)
    layers = bundle.manifest.model.num_layers
    norms = {f"layers.{i}.{norm}.weight" for i in range(layers) for norm in ("input_norm", "post_norm")}
    assert decoder.vectors == norms | {"final_norm.weight", "rope.cos", "rope.sin"}
    weight, scale = decoder.linears["layers.2.mlp.down"]
    source = safetensors.torch.load_file(tmp_path / "source" / "model.safetensors")
    module = "model.layers.2.mlp.down_proj"
    assert np.array_equal(weight, source[f"{module}.weight"].view(torch.uint8).numpy())
    assert scale is not None and np.array_equal(scale, np.full(len(weight), source[f"{module}.weight_scale"].numpy()))
