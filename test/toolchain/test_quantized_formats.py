"""AWQ, GPTQ, compressed-tensors and block FP8 become bundles that compute what their dequantised weights compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packers
import pytest
import safetensors.torch
import torch
from test_export import PROMPT, hf_logits, relative_error, run_executor, run_portable

from edgellm_ros.bundle import DECODER, DECODER_ORT
from edgellm_ros.errors import BundleError, CheckpointError, ToolchainError
from edgellm_ros.executors.cuda_weights import native_weight
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.quantized.base import Tensors
from edgellm_ros.toolchain.quantized.create import create_reader
from edgellm_ros.toolchain.safetensors_file import SafetensorsFile

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
# name: packer, quantization_config, the scheme that is stored
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "awq": (packers.awq(32), packers.awq_config(32), "int4"),
    "gptq": (packers.gptq(16, 4, True), packers.gptq_config(16, 4, True), "int4"),
    "gptq asymmetric v2": (packers.gptq(32, 4, False, v2=True), packers.gptq_config(32, 4, False, v2=True), "int4"),
    "gptq by activation": (packers.gptq(32, 4, False, True), packers.gptq_config(32, 4, False, True), "int4"),
    "gptq 8 bit rows": (packers.gptq(-1, 8, True), packers.gptq_config(-1, 8, True), "int8"),
    "gptq 8 bit zeros": (packers.gptq(32, 8, False), packers.gptq_config(32, 8, False), "int8"),
    "ct int4": (packers.ct_packed(32, 4, True), packers.ct_config("pack-quantized", INT4), "int4"),
    "ct int4 zeros": (
        packers.ct_packed(16, 4, False),
        packers.ct_config("pack-quantized", INT4 | {"group_size": 16, "symmetric": False}), "int4",
    ),
    "ct int8 packed": (
        packers.ct_packed(0, 8, True),
        packers.ct_config("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}), "int8",
    ),
    "ct w8a8": (
        packers.ct_int8,
        packers.ct_config("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"},
                          input_activations={"num_bits": 8, "dynamic": True}), "int8",
    ),
    "ct fp8 rows": (
        packers.ct_fp8(True), packers.ct_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "fp8",
    ),
    "ct fp8 tensor": (
        packers.ct_fp8(False), packers.ct_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "fp8",
    ),
    "ct nvfp4": (
        packers.ct_nvfp4,
        packers.ct_config("nvfp4-pack-quantized",
                          {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}), "nvfp4",
    ),
    "fp8 blocks": (
        packers.fp8_blocks(48, 64),
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [48, 64]}, "fp8",
    ),
}  # fmt: skip
# MatMulNBits rounds activations to int8, which moves these small models' logits by some per cent.
ROUNDING = {"int4": 0.08, "int8": 0.08, "nvfp4": 0.08, "fp8": 1e-3}


def save(case: str, path: Path, kind: str = "qwen3", **changes: Any) -> Any:
    pack, config, _ = CASES[case]
    return packers.save_quantized(kind, path, pack, {**config, **changes})


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_checkpoint_computes_what_its_dequantised_weights_compute(case: str, tmp_path: Path) -> None:
    model = save(case, tmp_path / "source")
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    quant, scheme = bundle.manifest.quantization, CASES[case][2]
    assert quant.weights == scheme and quant.kept
    expected = hf_logits(model, PROMPT)
    assert relative_error(run_executor(bundle, PROMPT)[0], expected) < ROUNDING[scheme]
    onnx.checker.check_model(str(bundle.path / DECODER), full_check=True)
    if scheme != "nvfp4":  # ONNX Runtime has no FLOAT4E2M1
        assert relative_error(run_portable(bundle, PROMPT), expected) < 0.01  # fp16 activations


@pytest.mark.parametrize("kind", ["phi3_partial", "smollm3", "gemma3_scaled"])
def test_families_with_fused_projections_or_other_norms_keep_theirs_too(kind: str, tmp_path: Path) -> None:
    model = save("awq", tmp_path / "source", kind=kind)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    assert bundle.manifest.quantization.format_of("layers.0.attn.qkv").zero_points
    assert relative_error(run_portable(bundle, PROMPT), hf_logits(model, PROMPT)) < 0.01


@pytest.mark.parametrize("case", CASES)
def test_reading_a_weight_dequantises_it(case: str, tmp_path: Path) -> None:
    model = save(case, tmp_path / "source", kind="llama")
    checkpoint = open_checkpoint(tmp_path / "source")
    for name, parameter in model.named_parameters():
        got = checkpoint.read(name)
        np.testing.assert_allclose(got, parameter.detach().numpy(), rtol=1e-6, atol=1e-8, err_msg=name)
        assert np.array_equal(checkpoint.read_rows(name, 3, 9), got[3:9])


@pytest.mark.parametrize(("case", "suffix", "settings"), [("ct fp8 tensor", "input_scale", {}),
                                                          ("fp8 blocks", "activation_scale", {"activation_scheme": "static"})])  # fmt: skip
def test_layers_that_share_an_input_get_the_largest_of_its_scales(
    case: str, suffix: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    inner, config, _ = CASES[case]

    def pack(module: str, weight: np.ndarray) -> Any:
        packed = inner(module, weight)
        if packed is not None:
            packed[0][suffix] = torch.tensor(0.07 if "k_proj" in module else 0.02)
        return packed

    packers.save_quantized("llama", tmp_path / "source", pack, {**config, **settings})
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    assert bundle.manifest.quantization.format_of("layers.1.attn.qkv").activation == "fp8"
    assert bundle.weights()["layers.1.attn.qkv.input_scale"] == np.float32(0.07)
    assert bundle.weights()["layers.1.mlp.down.input_scale"] == np.float32(0.02)


@pytest.mark.parametrize(("case", "kind"), [("awq", "qwen2"), ("gptq asymmetric v2", "llama"), ("gptq zero 16", "llama")])
def test_onnxruntimes_products_take_zero_points_where_four_bits_hold_them(case: str, kind: str, tmp_path: Path) -> None:
    if case == "gptq zero 16":  # the older format's 15 means 16
        packers.save_quantized(kind, tmp_path / "source", high_zero, packers.gptq_config(32, 4, False))
        model = None
    else:
        model = save(case, tmp_path / "source", kind=kind)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    path = bundle.path / DECODER_ORT
    graph = onnx.load(path, load_external_data=False)
    products = [n for n in graph.graph.node if n.op_type == "MatMulNBits"]
    with_zeros = [n for n in products if len(n.input) > 3 and n.input[3]]
    if model is None:
        assert products and not with_zeros and any("shift" in n.name for n in graph.graph.node)
        return
    assert with_zeros == products and not any("shift" in n.name for n in graph.graph.node)
    for node in products:  # fp32 activations: what is left is fp32's rounding
        next(a for a in node.attribute if a.name == "accuracy_level").i = 1
    onnx.save(graph, path)
    assert relative_error(run_executor(bundle, PROMPT)[0], hf_logits(model, PROMPT)) < 1e-4


def high_zero(module: str, weight: np.ndarray) -> Any:
    packed = packers.gptq(32, 4, False)(module, weight)
    if packed is not None:
        packed[0]["qzeros"] = torch.full_like(packed[0]["qzeros"], -1)  # fifteens
    return packed


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_a_float_head_can_be_int8_beside_kept_layers(kind: str, tmp_path: Path) -> None:
    model = save("awq", tmp_path / "source", kind=kind)
    with pytest.raises(ToolchainError, match="lm-head int8 is for checkpoints whose weights are kept; .*int8: leave it"):
        export_bundle(tmp_path / "source", tmp_path / "bundle", weights="int4", lm_head="int8")
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle", lm_head="int8")
    quant, weights = bundle.manifest.quantization, bundle.weights()
    assert (quant.weights, quant.lm_head, quant.embedding) == ("int4", "int8", "int8")
    stem = "embed" if kind == "llama_tied" else "head"
    assert quant.head_tensor(bundle.manifest.model) == stem and weights[f"{stem}.weight"].dtype == np.int8
    scale = np.repeat(weights[f"{stem}.scale"].astype(np.float32), quant.format_of(stem).group_size, 1)
    head = model.get_output_embeddings().weight.detach().numpy()
    np.testing.assert_allclose(weights[f"{stem}.weight"] * scale, head, atol=0.6 * scale.max())
    assert relative_error(run_executor(bundle, PROMPT)[0], hf_logits(model, PROMPT)) < 0.08


def test_a_zero_bias_that_a_tool_added_changes_nothing(tmp_path: Path) -> None:
    model = save("gptq", tmp_path / "source", kind="llama")
    path = tmp_path / "source" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors |= {name.replace("qweight", "bias"): torch.zeros(t.shape[1]).half() for name, t in tensors.items()
                if name.endswith("qweight")}  # fmt: skip
    safetensors.torch.save_file(tensors, path)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    assert relative_error(run_executor(bundle, PROMPT)[0], hf_logits(model, PROMPT)) < 0.08


Q = "model.layers.1.self_attn.q_proj"


def drop(suffix: str) -> Callable[[dict], Any]:
    return lambda t: t.pop(f"{Q}.{suffix}")


def replace(suffix: str, value: torch.Tensor) -> Callable[[dict], Any]:
    return lambda t: t.update({f"{Q}.{suffix}": value})


def keep(tensors: dict) -> None:
    """No change to the tensors."""


BROKEN: dict[str, tuple[str, Callable[[dict], Any], dict[str, Any], str]] = {
    "awq group": ("awq", keep, {"group_size": 16}, r"scales is \[3, .*groups of 16 needs \[6, "),
    "awq indivisible": ("awq", keep, {"group_size": 40}, "input features, which do not divide into groups of 40"),
    "awq bits": ("awq", keep, {"bits": 8}, "bits is 8; read are 4"),
    "awq version": ("awq", keep, {"version": "gemv"}, "version is 'gemv'; read is gemm"),
    "awq scales": ("awq", drop("scales"), {}, rf"{Q}\.scales is missing"),
    "awq zeros": ("awq", drop("qzeros"), {}, rf"{Q}\.qzeros is missing.*zero_point"),
    "awq dtype": ("awq", replace("qweight", torch.zeros(64, 8)), {}, rf"{Q}\.qweight is stored as F32.*I32"),
    "awq excluded": ("awq", keep, {"modules_to_not_convert": ["q_proj"]}, r"q_proj is quantised, yet .*excludes it"),
    "gptq bits": ("gptq", keep, {"bits": 8}, r"scales is .*8 bits"),
    "gptq three bits": ("gptq", keep, {"bits": 3}, "bits is 3; read are 4, 8"),
    "gptq sym": ("gptq asymmetric v2", keep, {"sym": True}, r"says sym, yet .*zero points from"),
    "gptq format": ("gptq", keep, {"checkpoint_format": "gptq_v2"}, "from 7 to 7 instead of 8.*gptq stores them less 1"),
    "gptq unsorted": ("gptq by activation", keep, {"desc_act": False}, "g_idx is not sorted, .*desc_act false"),
    "gptq uneven": ("gptq", replace("g_idx", torch.zeros(64).int()), {}, r"g_idx does not give each of 4 groups 16"),
    "gptq list": ("gptq", keep, {"checkpoint_format": [2]}, r"checkpoint_format is '\[2\]'; read are gptq, gptq_v2"),
    "gptq per layer": ("gptq", keep, {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic gives '.:.*down.*' settings"),
    "ct shape": ("ct int4", replace("weight_shape", torch.tensor([64, 32])), {}, r"weight_packed is \[64, 8\]; .*\[64, 4\]"),
    "ct scale": ("ct int4", replace("weight_scale", torch.ones(64, 1)), {}, r"weight_scale is \[64, 1\]; .*\[64, 2\]"),
    "ct zeros": ("ct int4 zeros", drop("weight_zero_point"), {}, r"weight_zero_point is missing"),
    "ct rotated": ("ct int4", keep, {"transform_config": {"config_groups": {"u": {}}}}, "rotates weights"),
    "ct sparse": ("ct int4", keep, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format 'sparse-24-bitmask'"),
    "ct format": ("ct int4", keep, {"format": "marlin-24"}, "format is 'marlin-24'; read are pack-quantized"),
    "ct ignored": ("ct int4", keep, {"ignore": ["re:.*q_proj"]}, "q_proj is quantised, yet ignore names it"),
    "ct pattern": ("ct int4", keep, {"ignore": ["re:(lm"]}, r"'re:\(lm' is no regular expression"),
    "ct types": ("ct w8a8", replace("weight", torch.zeros(64, 64).to(torch.float8_e4m3fn)), {}, "stored as F8_E4M3; .*I8"),
    "fp8 block": ("fp8 blocks", keep, {"weight_block_size": [128, 128]}, r"weight_scale_inv is .*\[128, 128\] needs"),
    "fp8 shape": ("fp8 blocks", keep, {"weight_block_size": "auto"}, "weight_block_size is 'auto'"),
    "fp8 inf": ("fp8 blocks", lambda t: t[f"{Q}.weight_scale_inv"].fill_(float("inf")), {}, "NaN or an infinity"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_that_contradicts_its_tensors_is_refused_by_name(case: str, tmp_path: Path) -> None:
    source, change, config, message = BROKEN[case]
    save(source, tmp_path / "source", kind="llama", **config)
    path = tmp_path / "source" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        export_bundle(tmp_path / "source", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("form", "case"), [("pack-quantized", "ct int4 zeros"), ("pack-quantized", "ct int8 packed"),
                                            ("int-quantized", "ct w8a8"), ("float-quantized", "ct fp8 rows"),
                                            ("nvfp4-pack-quantized", "ct nvfp4")])  # fmt: skip
def test_compressed_tensors_itself_reads_the_packers_weights_alike(form: str, case: str, tmp_path: Path) -> None:
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    pack, config, _ = CASES[case]
    weight = np.random.default_rng(2).normal(0, 0.1, (64, 96)).astype(np.float32)
    tensors, meant = pack("q_proj", weight)
    scheme = compressed_tensors.quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(form)
    decompressed = compressor.decompress(dict(tensors), scheme)["weight"].float().numpy()
    np.testing.assert_allclose(decompressed, meant, rtol=4e-3, atol=1e-6)  # it multiplies in fp16 or bf16


def test_compressed_tensors_reads_the_awq_packers_weights_alike() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    weight = np.random.default_rng(2).normal(0, 0.1, (64, 96)).astype(np.float32)
    tensors, meant = packers.awq(32)("q_proj", weight)
    converter = AutoAWQConverter(group_size=32)
    values, scale, zero = converter._convert_gemm_module(tensors["qweight"], tensors["scales"], tensors["qzeros"])
    wide = (values.float().reshape(64, 3, 32) - zero.float()[..., None]) * scale.float()[..., None]
    np.testing.assert_allclose(wide.reshape(64, 96).numpy(), meant, rtol=1e-6)


@pytest.mark.parametrize(("bits", "order"), [(4, True), (8, False)])
def test_what_autogptq_packed_means_what_its_own_layer_computes(bits: int, order: bool) -> None:
    path = Path(__file__).parent / "data" / "autogptq_0_7_1.safetensors"  # its metadata says how it was made
    file = SafetensorsFile(path)
    layer = {f"{bits}.{part}": file for part in ("qweight", "qzeros", "scales", "g_idx")}
    config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "sym": False, "desc_act": order}
    got = create_reader(config, Tensors(path, layer)).read(str(bits)).dequantize()
    expected = safetensors.torch.load_file(path)[f"{bits}.dequantised"].numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_fp8_layers_that_either_tools_list_leaves_out_are_plain(tmp_path: Path) -> None:
    inner, config, _ = CASES["fp8 blocks"]
    for key in ("modules_to_not_convert", "ignored_layers"):  # transformers', AutoFP8's
        settings = {**config, key: ["lm_head", Q]}
        packers.save_quantized("llama", tmp_path / key, lambda m, w: None if m == Q else inner(m, w), settings)
        checkpoint = open_checkpoint(tmp_path / key)
        assert checkpoint.scheme(f"{Q}.weight") is None and checkpoint.scheme(f"{Q.replace('q_', 'k_')}.weight")


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    packers.save_quantized("llama", tmp_path / "source", lambda *_: None, {"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match="quant_method is 'hqq'; read are awq, .*modelopt"):
        export_bundle(tmp_path / "source", tmp_path / "out")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"quantization_config": [1]}))
    with pytest.raises(CheckpointError, match=r"quantization_config is \[1\]; it must be an object"):
        export_bundle(tmp_path / "source", tmp_path / "out")


def test_an_offset_that_is_no_zero_point_is_an_error_and_no_other_weight(tmp_path: Path) -> None:
    packer, config, _ = CASES["awq"]
    packers.save_quantized("llama", tmp_path / "source", packer, config)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    stem, form = "layers.0.mlp.down", bundle.manifest.quantization.format_of("layers.0.mlp.down")
    weights = bundle.weights()
    changed = {f"{stem}.{what}": np.asarray(weights[f"{stem}.{what}"]) for what in ("weight", "scale", "offset")}
    changed[f"{stem}.offset"] = changed[f"{stem}.offset"] + 0.4 * changed[f"{stem}.scale"].astype(np.float32)
    with pytest.raises(BundleError, match=r"layers\.0\.mlp\.down\.offset is not a zero point"):
        native_weight(changed, stem, form, bundle.manifest.model)  # type: ignore[arg-type]


def test_tensors_of_quantised_layers_without_a_configuration_are_said_to_be_that(tmp_path: Path) -> None:
    packers.save_quantized("llama", tmp_path / "source", packers.awq(32), {})
    with pytest.raises(CheckpointError, match=r"21 missing .*qweight.*config\.json has no quantization_config"):
        export_bundle(tmp_path / "source", tmp_path / "out")
