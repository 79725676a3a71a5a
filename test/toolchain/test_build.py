"""Engines are built by the real TensorRT-RTX, without a GPU, and never executed: layers, reports and refusals are tested."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import packers
import pytest

from edgellm_ros.bundle import DECODER, DECODER_LORA, Bundle, hash_file
from edgellm_ros.cli.main import main
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import BundleError, ToolchainError
from edgellm_ros.executors.engine_preflight import choose_planned
from edgellm_ros.executors.engines import ENGINE, ENGINES, LAYERS, REPORT, is_of, list_engines
from edgellm_ros.manifest import MANIFEST
from edgellm_ros.toolchain.build import builder, targets
from edgellm_ros.toolchain.build.builder import build_engine
from edgellm_ros.toolchain.build.kernels import check_kernels, fused_attentions, kernel_counts
from edgellm_ros.toolchain.export import export_bundle

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (it exists for x86-64 only)")
onnx = pytest.importorskip("onnx")
SMALL = BuildOptions(max_input=32, max_context=64)
QUICK = dataclasses.replace(SMALL, profile="single")
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
    two = kind == "llama" and target == "sm89"  # profiles; one takes half the time
    engine, fresh = build_engine(bundle, target, SMALL if two else QUICK)
    faults = choose_planned(bundle, EngineConfig(), target)[1]
    assert faults == [f"engines/{engine.key}: it was built by tensorrt_rtx, and only TensorRT's own engines are loaded"]
    report, layers = engine.report, bundle.manifest.model.num_layers
    kinds = report["network"]["kinds"]
    assert fresh and (kinds["KV_CACHE_UPDATE"], kinds["ATTENTION_OUTPUT"]) == (2 * layers, layers)
    quantised = [n for n in onnx.load(bundle.file(DECODER), load_external_data=False).graph.node
                 if n.op_type == "DequantizeLinear"]  # fmt: skip
    assert kinds.get("DEQUANTIZE", 0) == len(quantised) and bool(quantised) == (weights != "fp16")
    assert report["engine"]["size"] == (engine.path / ENGINE).stat().st_size > 10_000
    assert report["executed"] is False and target in engine.key
    ranges = [p["position_ids"] for p in report["profiles"]]
    split = [[[1, 1], [1, 1], [1, 8]], [[1, 1], [1, 16], [1, 32]]]
    assert ranges == (split if two else [[[1, 1], [1, 1], [1, 32]]])
    assert fused_attentions(report["kernels"]) == layers * len(ranges), "after fusing: one for each layer and profile"


def test_int4_builds_for_the_oldest_rtx_architecture_too(copy: Callable[..., Bundle]) -> None:
    report = build_engine(copy(), "sm86", QUICK)[0].report
    assert fused_attentions(report["kernels"]) == 3


KEPT = {  # what others quantised: an offset for each group, an input in another order, FP8 in blocks, two levels of scales
    "awq": (packers.awq(32), packers.awq_config(32), "sm89"),
    "gptq by activation": (packers.gptq(32, 4, True, True), packers.gptq_config(32, 4, True, True), "sm89"),
    "fp8 with activations": (packers.modelopt_fp8, packers.modelopt_files("FP8")[0], "sm89"),
    "fp8 blocks": (packers.fp8_blocks(64, 64), {"quant_method": "fp8", "weight_block_size": [64, 64]}, "sm89"),
    "nvfp4": (packers.modelopt_nvfp4, packers.modelopt_files("NVFP4", group_size=16)[0], "sm120"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_others_quantised_builds(case: str, tmp_path: Path) -> None:
    pack, config, target = KEPT[case]
    packers.save_quantized("llama", tmp_path / "source", pack, config)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    kinds = build_engine(bundle, target, SMALL)[0].report["network"]["kinds"]
    levels = 2 if case in ("nvfp4", "fp8 with activations") else 1  # of scales, or for the weight and the input
    assert kinds["DEQUANTIZE"] == levels * 4 * bundle.manifest.model.num_layers and kinds["KV_CACHE_UPDATE"] == 6
    if case == "nvfp4":
        with pytest.raises(ToolchainError, match="sm89 has no nvfp4"):
            build_engine(bundle, "sm89", SMALL)


def test_a_key_is_reused_and_a_damaged_engine_is_not(copy: Callable[..., Bundle]) -> None:
    bundle = copy()
    engine, _ = build_engine(bundle, "sm89", QUICK)
    before = (engine.path / REPORT).stat().st_mtime_ns
    again, fresh = build_engine(bundle, "sm89", QUICK)
    assert not fresh and (again.path / REPORT).stat().st_mtime_ns == before
    os.truncate(engine.path / ENGINE, 100)
    with pytest.raises(BundleError, match="100 bytes.*--force"):
        build_engine(bundle, "sm89", QUICK)
    rebuilt, fresh = build_engine(bundle, "sm89", QUICK, force=True)
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
        ("current", SMALL, "there is none here; name the robot's with --target, one of sm80, .*sm89, .*; for a Jetson"),
        ("sm89", BuildOptions(max_context=10_000), "max-context 10000 exceeds the bundle's 256"),
    ):
        with pytest.raises(ToolchainError, match=message):
            build_engine(bundle, target, options)
    with pytest.raises(ToolchainError, match="builds for the GPU that it runs on"):
        build_engine(bundle, "sm89", SMALL, builder="tensorrt")
    with pytest.raises(ToolchainError, match="allowed is 0 to 1048576 MiB"):  # more is no number to TensorRT
        BuildOptions(memory_limit=2**60)
    with pytest.raises(ToolchainError, match="weights are fp32"):
        build_engine(tiny_bundle("llama", "fp32"), "sm89", SMALL)
    monkeypatch.setattr(targets, "memory_available", lambda: 2**20)
    with pytest.raises(ToolchainError, match="1 MiB are free with swap; .* add swap.* --ignore-memory"):
        build_engine(bundle, "sm89", SMALL)
    assert nothing_is_left(bundle)
    monkeypatch.setattr(builder, "_build", lambda *_: (_ for _ in ()).throw(ToolchainError("it went on")))
    with pytest.raises(ToolchainError, match="it went on"):
        build_engine(bundle, "sm89", SMALL, ignore_memory=True)


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_without_a_gpu_every_target_that_is_offered_is_one_that_builds(
    scheme: str, tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "current_target", lambda: None)
    bundle = tiny_bundle("llama", "int4")
    quant = dataclasses.replace(bundle.manifest.quantization, weights=scheme)
    bundle = Bundle(bundle.path, dataclasses.replace(bundle.manifest, quantization=quant))
    with pytest.raises(ToolchainError, match="there is none here") as refused:
        build_engine(bundle, "current", SMALL)
    offered = re.findall(r"sm\d+", str(refused.value))
    assert offered and ("sm80" in offered) is (scheme == "int4")
    for target in offered:
        targets.check_formats(bundle, target)
        targets.load_builder("auto", target, None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ToolchainError, match=r"for a Jetson, build on it; for an RTX GPU, pip install 'edgellm_ros\[rtx\]'"):
        build_engine(bundle, "current", SMALL)


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


@pytest.mark.parametrize(("weights", "target"), [("int4", "sm120")])
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


def test_the_layer_table_names_every_layer_of_the_network(copy: Callable[..., Bundle]) -> None:
    bundle = copy("gemma3_scaled", "int4")
    engine, _ = build_engine(bundle, "sm89", QUICK)
    layers = json.loads((engine.path / LAYERS).read_text())
    network = engine.report["network"]
    assert len(layers) == network["layers"] and "table" not in network
    assert Counter(layer["kind"] for layer in layers) == network["kinds"]
    writes = {layer["name"]: layer for layer in layers if layer["kind"] == "KV_CACHE_UPDATE"}
    assert len(writes) == 2 * bundle.manifest.model.num_layers
    assert all(layer["outputs"].endswith("BF16 ?x2x64x32") for layer in writes.values())


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_in_the_middle_of_a_build_stops_it_and_leaves_nothing(copy: Callable[..., Bundle], late: bool) -> None:
    bundle = copy()
    calls: list[str] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        calls.append(phase)
        if len(calls) == (20 if late else 2):
            os.kill(os.getpid(), signal.SIGTERM if late else signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(bundle, "sm89", QUICK, progress=interrupt)
    assert nothing_is_left(bundle)
    assert signal.getsignal(signal.SIGINT) is before and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    again = len(calls)
    build_engine(bundle, "sm89", QUICK, progress=lambda *_: calls.append(""))
    assert len(calls) - again > again, "it stopped before the end"


def test_a_disk_that_is_full_in_the_middle_of_an_engine_is_said_and_leaves_nothing(copy: Callable[..., Bundle]) -> None:
    """The kernel refuses bytes beyond a limit for files, as a full disk does: half of the engine is written by then."""
    bundle = copy()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(ToolchainError, match=r"cannot write .*File too large"):
            build_engine(bundle, "sm89", QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert nothing_is_left(bundle)


def test_scratch_memory_that_does_not_suffice_is_said_with_the_option(copy: Callable[..., Bundle]) -> None:
    bundle = copy()
    with pytest.raises(ToolchainError, match=r"(?s)workspace.*raise --memory-limit, or leave it out"):
        build_engine(bundle, "sm89", dataclasses.replace(QUICK, memory_limit=1))
    assert nothing_is_left(bundle)


def test_force_keeps_the_engine_that_is_there_until_the_new_one_is_whole(copy: Callable[..., Bundle]) -> None:
    bundle = copy()
    engine, _ = build_engine(bundle, "sm89", QUICK)
    before = hash_file(engine.path / ENGINE)

    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(bundle, "sm89", QUICK, force=True, progress=interrupt)
    assert hash_file(engine.path / ENGINE) == before
    assert [p.name for p in (bundle.path / ENGINES).iterdir()] == [engine.key]


def test_a_newer_versions_bundle_and_an_unknown_operators_set_end_in_a_sentence(
    copy: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = copy()
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    (bundle.path / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 99, "new": 1}))
    assert main(["build", str(bundle.path), "--target", "sm89"]) != 0
    error = capsys.readouterr().err
    assert "schema_version 99" in error and "update edgellm_ros" in error and "Traceback" not in error
    (bundle.path / MANIFEST).write_text(json.dumps({**manifest, "newer_field": 1}))
    assert main(["build", str(bundle.path), "--target", "sm89"]) != 0
    assert "unknown field 'newer_field'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "target", "message"),
    [
        ("fp8", "sm86", "sm86 has no fp8 .*sm89 or newer"),
        ("nvfp4", "sm89", "sm89 has no nvfp4 .*sm100 or newer"),
        ("int4", "sm75", "target is 'sm75'"),
    ],
)
def test_a_format_that_an_architecture_lacks_is_refused_by_name(
    weights: str, target: str, message: str, tiny_bundle: TinyBundle
) -> None:
    bundle = tiny_bundle("llama", "int4")
    quant = dataclasses.replace(bundle.manifest.quantization, weights=weights)
    changed = Bundle(bundle.path, dataclasses.replace(bundle.manifest, quantization=quant))
    with pytest.raises(ToolchainError, match=message):
        build_engine(changed, target, QUICK)


def test_kernels_are_counted_by_their_definitions() -> None:
    number = "0x" + "0123456789abcdef" * 2
    engine = (
        b"\x00\xff__global__ void __launch_bounds__(128) _gemm_mha_v2_" + number.encode() + b"(const float* x) { }\n"
        b"extern __global__ void add_" + number.encode() + b" (int n);_gemm_mha_v2_" + number.encode() + b"(1);\x00"
    )
    assert kernel_counts(engine) == {"_gemm_mha_v2": 1, "add": 1}
    assert fused_attentions(kernel_counts(memoryview(engine))) == 1
    check_kernels({"_gemm_mha_v2": 6, "add": 1}, 6)
    check_kernels({"another_version": 5}, 6)
    with pytest.raises(ToolchainError, match="5 fused attention kernels for 6 attentions"):
        check_kernels({"_gemm_mha_v2": 5}, 6)


def test_tensorrts_own_path_keeps_a_timing_cache_beside_the_engines(
    copy: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT itself is not here: TensorRT-RTX stands in for its module, and its cache, which stays empty, for the file."""
    rtx = importlib.import_module("tensorrt_rtx")

    class Config(rtx.Builder):
        def create_builder_config(self) -> object:
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
            return config

    module = types.ModuleType("tensorrt")
    module.__dict__.update({**vars(rtx), "Builder": Config, "__version__": "10.15"})
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(targets, "current_target", lambda: "sm89")
    bundle = copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX's: its cache does nothing
        engine, fresh = build_engine(bundle, "current", QUICK, builder="tensorrt")
        cache = bundle.path / ENGINES / "timing-10.15-sm89.cache"
        assert fresh and engine.key.startswith("tensorrt-10.15-sm89") and cache.stat().st_size > 0
        cache.write_bytes(b"of another version")
        assert build_engine(bundle, "current", QUICK, builder="tensorrt", force=True)[1]
    assert cache.read_bytes() != b"of another version"
    assert [path.name for path in list_engines(bundle)] == [engine.key]


def test_a_build_may_wait_for_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemFree: 100 kB\nMemAvailable: 3000 kB\nSwapTotal: 9000 kB\nSwapFree: 2000 kB\n", encoding="ascii")
    monkeypatch.setattr(targets, "_MEMINFO", meminfo)
    assert targets.memory_available() == 5000 * 1024
    monkeypatch.setattr(targets, "_MEMINFO", tmp_path / "nowhere")
    assert targets.memory_available() is None


def test_without_tensorrt_its_absence_is_said(tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(targets, "current_target", lambda: "sm87")
    with pytest.raises(ToolchainError, match="builder tensorrt cannot be imported .*it comes with JetPack"):
        build_engine(tiny_bundle("llama", "int4"), "sm87", QUICK, builder="tensorrt")
    monkeypatch.setattr(targets, "_has", lambda name: False)
    with pytest.raises(ToolchainError, match="builds for .*, not for sm87.* nor is tensorrt here: .*--system-site-packages"):
        build_engine(tiny_bundle("llama", "int4"), "current", QUICK)  # on an Orin, in a closed virtual environment
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ToolchainError, match="tensorrt_rtx cannot be imported .* nor is tensorrt here"):
        build_engine(tiny_bundle("llama", "int4"), "current", QUICK)
