"""Engines are built by the real TensorRT-RTX, without a GPU, and never executed: layers, reports and refusals are tested."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import packers
import pytest

from edgellm_ros.bundle import DECODER, DECODER_LORA, Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import BuildOptions
from edgellm_ros.errors import ToolchainError
from edgellm_ros.toolchain.build import targets
from edgellm_ros.toolchain.build.builder import build_engine
from edgellm_ros.toolchain.build.report import ENGINE, ENGINES, REPORT, is_of
from edgellm_ros.toolchain.export import export_bundle

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (it exists for x86-64 only)")
onnx = pytest.importorskip("onnx")
SMALL = BuildOptions(max_input=32, max_context=64)
TinyBundle = Callable[[str, str], Bundle]


@pytest.fixture
def copy(tiny_bundle: TinyBundle, tmp_path: Path) -> Callable[..., Bundle]:
    def get(kind: str = "llama", weights: str = "int4") -> Bundle:
        root = shutil.copytree(tiny_bundle(kind, weights).path, tmp_path / "bundle")
        return Bundle.open(root)

    return get


def nothing_is_left(bundle: Bundle) -> bool:
    return not (bundle.path / ENGINES).exists()


@pytest.mark.parametrize("target", ["sm89", "sm120"])
@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("llama", "int4"),
        ("mistral", "fp16"),
        ("qwen2", "int8"),
        ("qwen3", "int4"),
        ("smollm3", "int4"),
        ("phi3_partial", "int8"),
        ("gemma3_scaled", "int4"),
    ],
)
def test_every_family_builds_with_fused_attention_and_caches_in_place(
    copy: Callable[..., Bundle], kind: str, weights: str, target: str
) -> None:
    bundle = copy(kind, weights)
    engine, fresh = build_engine(bundle, target, SMALL)
    report, layers = engine.report, bundle.manifest.model.num_layers
    kinds = report["network"]["kinds"]
    assert fresh and (kinds["KV_CACHE_UPDATE"], kinds["ATTENTION_OUTPUT"]) == (2 * layers, layers)
    quantised = [n for n in onnx.load(bundle.file(DECODER), load_external_data=False).graph.node
                 if n.op_type == "DequantizeLinear"]  # fmt: skip
    assert kinds.get("DEQUANTIZE", 0) == len(quantised) and bool(quantised) == (weights != "fp16")
    assert report["engine"]["size"] == (engine.path / ENGINE).stat().st_size > 10_000
    assert report["executed"] is False and target in engine.key
    decode, prefill = (p["position_ids"] for p in report["profiles"])
    assert (decode, prefill) == ([[1, 1], [1, 1], [1, 8]], [[1, 1], [1, 16], [1, 32]])


KEPT = {  # what others quantised: an offset for each group, an input in another order, FP8 in blocks, two levels of scales
    "awq": (packers.awq(32), packers.awq_config(32), "sm89"),
    "gptq by activation": (packers.gptq(32, 4, True, True), packers.gptq_config(32, 4, True, True), "sm89"),
    "fp8 blocks": (packers.fp8_blocks(64, 64), {"quant_method": "fp8", "weight_block_size": [64, 64]}, "sm89"),
    "nvfp4": (packers.modelopt_nvfp4, packers.modelopt_files("NVFP4", group_size=16)[0], "sm120"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_others_quantised_builds(case: str, tmp_path: Path) -> None:
    pack, config, target = KEPT[case]
    packers.save_quantized("llama", tmp_path / "source", pack, config)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    kinds = build_engine(bundle, target, SMALL)[0].report["network"]["kinds"]
    levels = 2 if case == "nvfp4" else 1
    assert kinds["DEQUANTIZE"] == levels * 4 * bundle.manifest.model.num_layers and kinds["KV_CACHE_UPDATE"] == 6
    if case == "nvfp4":
        with pytest.raises(ToolchainError, match="sm89 has no nvfp4"):
            build_engine(bundle, "sm89", SMALL)


def test_a_key_is_reused_and_a_damaged_engine_is_not(copy: Callable[..., Bundle]) -> None:
    bundle = copy()
    engine, _ = build_engine(bundle, "sm89", SMALL)
    before = (engine.path / REPORT).stat().st_mtime_ns
    again, fresh = build_engine(bundle, "sm89", SMALL)
    assert not fresh and (again.path / REPORT).stat().st_mtime_ns == before
    os.truncate(engine.path / ENGINE, 100)
    with pytest.raises(ToolchainError, match="100 bytes.*--force"):
        build_engine(bundle, "sm89", SMALL)
    rebuilt, fresh = build_engine(bundle, "sm89", SMALL, force=True)
    assert fresh and [p.name for p in (bundle.path / ENGINES).iterdir()] == [rebuilt.key]


def test_a_cache_update_that_is_none_is_refused_by_name(copy: Callable[..., Bundle]) -> None:
    bundle = copy()
    model = onnx.load(bundle.file(DECODER), load_external_data=False)
    for node in model.graph.node:
        if node.name == "present_value.1.write/TensorScatter":
            node.input[0] = "past_key.1"
    (bundle.path / DECODER).write_bytes(model.SerializeToString())
    with pytest.raises(ToolchainError, match=r"present_value\.1"):
        build_engine(bundle, "sm89", SMALL)
    assert nothing_is_left(bundle)


def test_a_node_that_the_parser_refuses_is_named_with_its_layer(copy: Callable[..., Bundle]) -> None:
    bundle = copy()
    model = onnx.load(bundle.file(DECODER), load_external_data=False)
    node = next(n for n in model.graph.node if n.name == "layers.2.attn.qkv.product/MatMul")
    node.input[1] = "layers.2.attn.qkv.dequantized"  # not transposed: the inner sizes differ
    (bundle.path / DECODER).write_bytes(model.SerializeToString())
    with pytest.raises(ToolchainError, match="layer 2, attn.qkv"):
        build_engine(bundle, "sm89", SMALL)
    assert nothing_is_left(bundle)


def test_a_newer_opset_and_an_unknown_operator_are_refused(copy: Callable[..., Bundle]) -> None:
    bundle = copy()
    model = onnx.load(bundle.file(DECODER), load_external_data=False)
    model.opset_import[0].version = 99
    (bundle.path / DECODER).write_bytes(model.SerializeToString())
    with pytest.raises(ToolchainError, match="opset 99"):
        build_engine(bundle, "sm89", SMALL)
    model.opset_import[0].version = 24
    next(n for n in model.graph.node if n.op_type == "Sigmoid").op_type = "NoSuchOperator"
    (bundle.path / DECODER).write_bytes(model.SerializeToString())
    with pytest.raises(ToolchainError, match=r"NoSuchOperator.*layer 0, mlp\.sigmoid"):
        build_engine(bundle, "sm89", SMALL)


def test_what_cannot_be_built_is_refused_before(tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "current_target", lambda: None)
    bundle = tiny_bundle("llama", "int4")
    for target, options, message in (
        ("sm87", SMALL, "not for sm87.*--target current"),
        ("sm110", SMALL, "not for sm110"),
        ("sm42", SMALL, "target is 'sm42'; allowed are current"),
        ("current", SMALL, "there is none here"),
        ("sm89", BuildOptions(max_context=10_000), "max-context 10000 exceeds the bundle's 256"),
    ):
        with pytest.raises(ToolchainError, match=message):
            build_engine(bundle, target, options)
    with pytest.raises(ToolchainError, match="builds for the GPU that it runs on"):
        build_engine(bundle, "sm89", SMALL, builder="tensorrt")
    with pytest.raises(ToolchainError, match="weights are fp32"):
        build_engine(tiny_bundle("llama", "fp32"), "sm89", SMALL)
    monkeypatch.setattr(targets, "memory_available", lambda: 2**20)
    with pytest.raises(ToolchainError, match="1 MiB are free"):
        build_engine(bundle, "sm89", SMALL)
    assert nothing_is_left(bundle)


def test_the_command_builds_and_inspect_lists_it(
    copy: Callable[..., Bundle], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    bundle = copy()
    options = ["--max-context", "64", "--max-input", "16", "--max-batch", "2", "--profile", "single"]
    assert main(["build", str(bundle.path), "--target", "sm89", *options]) == 0
    assert "never executed" in capsys.readouterr().out
    (path,) = (bundle.path / ENGINES).iterdir()
    assert path.name.endswith("-sm89-b2-s16-c64-v8-single")
    assert len(json.loads((path / REPORT).read_text())["profiles"]) == 1
    assert main(["inspect", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert path.name in shown and "for sm89" in shown


@pytest.mark.parametrize(("weights", "target"), [("int4", "sm89"), ("fp16", "sm120")])
def test_a_decoder_with_adapters_builds_for_every_rank_from_none(
    tiny_bundle: Callable[..., Bundle], tmp_path: Path, weights: str, target: str
) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle("qwen3", weights, 16).path, tmp_path / "bundle"))
    engine, _ = build_engine(bundle, target, dataclasses.replace(SMALL, lora=True))
    model, kinds = bundle.manifest.model, engine.report["network"]["kinds"]
    assert (kinds["KV_CACHE_UPDATE"], kinds["ATTENTION_OUTPUT"]) == (2 * model.num_layers, model.num_layers)
    for profile in engine.report["profiles"]:
        assert profile["layers.0.attn.qkv.lora_A"] == [[64, 0], [64, 48], [64, 48]]
        assert profile["layers.2.mlp.down.lora_B"] == [[0, 64], [16, 64], [16, 64]]
    assert engine.key.endswith("-lora") and is_of(engine, bundle)
    assert set(engine.report["sources"]) == {DECODER_LORA, "weights.safetensors"}


def test_adapters_need_a_bundle_that_was_exported_for_them(tiny_bundle: TinyBundle) -> None:
    with pytest.raises(ToolchainError, match="no decoder that takes adapters; export it with --max-lora-rank"):
        build_engine(tiny_bundle("llama", "int4"), "sm89", dataclasses.replace(SMALL, lora=True))
