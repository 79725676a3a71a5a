"""`edgellm build` for TensorRT before 10.15. TensorRT is a double here; plugins and the order of weights are the real ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import tensorrt_double
from plugin_bundles import export_64
from plugin_case import BF16, FLOAT, HALF, INT8, INT64, Plugin, PluginError, Tensor, library
from test_plugin_graph import OPS, STEPS

from edgellm_ros import trt_plugins
from edgellm_ros.bundle import DECODER_PLUGIN, DECODER_PLUGIN_LORA, Bundle
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.errors import ToolchainError, UnsupportedError
from edgellm_ros.executors.engine_preflight import choose_planned
from edgellm_ros.executors.engines import is_of, read_engine
from edgellm_ros.toolchain.build import plugins, targets
from edgellm_ros.toolchain.build.bfloat16 import to_bfloat16
from edgellm_ros.toolchain.build.builder import build_engine
from edgellm_ros.toolchain.build.packing import pack_int4, pack_scales

SMALL = BuildOptions(max_input=32, max_context=64)
_NP = {"float16": HALF, "bfloat16": BF16, "float32": FLOAT, "int64": INT64, "int8": INT8}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny Qwen3 whose heads the kernels have, in int4, with adapters."""
    return export_64(tmp_path_factory.mktemp("qwen3-64"), "qwen3", "int4", max_lora_rank=4)


@pytest.fixture
def bundle(exported: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(exported.path, tmp_path / "bundle"))


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Puts a double in TensorRT's place, on an Orin."""

    def get(version: str = "10.3.0", check: Any = None) -> Any:
        module = tensorrt_double.make_module(version, check)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(targets, "current_target", lambda: "sm87")
        return module

    return get


@pytest.fixture
def some_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double does not open it."""
    monkeypatch.setattr(trt_plugins, "find_library", lambda: Path("/opt/libedgellm_plugins.so"))


def test_old_tensorrt_builds_the_plugin_graph_of_packed_weights(
    bundle: Bundle, tensorrt: Callable[..., Any], some_library: None
) -> None:
    seen: dict[str, Any] = {}

    def check(node: Any, weights: dict[str, Any]) -> None:
        if node.op_type == "EdgeLLMInt4Gemm":
            seen[node.name.split("/")[0]] = [weights[name] for name in node.input[1:3]]

    module = tensorrt("10.3.0.26", check)
    engine, fresh = build_engine(bundle, options=SMALL, builder="tensorrt")
    assert fresh and engine.key.endswith("-split-plugin") and engine.options.dialect == "plugin"
    assert module.log["libraries"] == ["/opt/libedgellm_plugins.so"] and module.log["features"] == [("aliased", True)]
    layers = bundle.manifest.model.num_layers
    assert engine.report["network"]["kinds"]["PLUGIN_V3"] == 5 * layers + 1
    names = bundle.manifest.graph
    cache = [1, 2, 2, 64, 64]
    assert engine.report["profiles"][0][names.past_kv.format(layer=0)] == [cache] * 3
    assert is_of(read_engine(engine.path), bundle) and DECODER_PLUGIN in engine.report["sources"]
    chosen, reasons = choose_planned(bundle, EngineConfig(), engine.target)
    assert chosen == engine and not reasons, "what the build reports is what the preflight wants"
    assert not module.log["directory"].exists(), "the packed copy is gone"
    assert sorted(p.name for p in engine.path.iterdir()) == ["decoder.engine", "layers.json", "report.json"]
    stored = bundle.weights()
    assert len(seen) == 4 * layers
    for name, (data, scales) in seen.items():
        stem = name.removesuffix(".product")
        assert unpacked(data.view(np.uint8), stored[f"{stem}.weight"].shape) == stored[f"{stem}.weight"].tobytes()
        assert scales.dtype == np.float16 and np.count_nonzero(scales) == np.count_nonzero(stored[f"{stem}.scale"])


def unpacked(packed: Any, shape: tuple[int, int]) -> bytes:
    """The stored nibbles by the text of native/kernels/quantized.cu, a number at a time."""
    rows, pairs = shape
    values = np.zeros((rows, pairs * 2), np.uint8)
    words = packed.reshape(*packed.shape[:2], 32, 4, 4).copy().view("<u4")[..., 0]  # tile, block, lane, s
    for row in range(rows):
        for column in range(pairs * 2):
            tile, g, h = row // 16, row % 8, row % 16 // 8
            block, s, t, within = column // 64, column % 64 // 16, column % 16 // 4, column % 4
            j = 2 * (within // 2) + h  # fragment register
            shift = 4 * j + 16 * (within % 2)  # its pair's first number in the word's lower half
            values[row, column] = (int(words[tile, block, 4 * g + t, s]) >> shift & 15) ^ 8
    return bytes((values[:, 0::2] | values[:, 1::2] << 4).tobytes())


@pytest.mark.parametrize(("rows", "cols", "group"), [(1, 32, 32), (17, 96, 16), (99, 128, 64), (33, 256, 128)])
def test_packing_keeps_every_number_in_its_place(rows: int, cols: int, group: int) -> None:
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 256, (rows, cols // 2), np.uint8)
    assert unpacked(pack_int4(stored), stored.shape) == stored.tobytes()
    scales = rng.random((rows, cols // group)).astype(np.float16)
    packed = pack_scales(scales, group)
    for row in range(rows):
        for index in range(cols // group):
            assert packed[row // 16, index, row % 8 * 2 + row % 16 // 8] == scales[row, index]


@pytest.mark.parametrize(("trees", "kv_cache"), [(False, "auto"), (True, "auto"), (True, "fp8")])
def test_the_library_s_own_plugins_take_every_node_of_the_graph(
    bundle: Bundle, tensorrt: Callable[..., Any], trees: bool, kv_cache: str
) -> None:
    library()  # skips where it is not built
    made: list[str] = []

    def check(node: Any, weights: dict[str, Any]) -> None:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes.pop("plugin_version"), attributes.pop("plugin_namespace")) == (b"1", b"edgellm")
        plugin = Plugin(node.op_type, attributes)
        made.append(plugin.identity)
        known = {name: Tensor(value.shape, _NP[value.dtype.name]) for name, value in weights.items()}
        if node.op_type == "EdgeLLMAttention":
            width = (attributes["num_heads"] + 2 * attributes["num_kv_heads"]) * attributes["head_dim"]
            cache = Tensor((-1, 2, attributes["num_kv_heads"], 64, attributes["head_dim"]), INT8 if kv_cache == "fp8" else HALF)
            inputs = [Tensor((-1, -2, width), HALF), cache, Tensor((-1, -2), INT64), Tensor((-1,), INT64)]
        else:
            inputs = [Tensor((-1, -2, attributes["cols"]), HALF)]
        known["tree_masks"] = Tensor((-1, -2), INT64)
        inputs += [known[name] for name in node.input[len(inputs) :]]
        assert (node.input[-1] == "tree_masks") == (trees and node.op_type == "EdgeLLMAttention")
        outputs = plugin.outputs(inputs)
        assert plugin.takes([*inputs, *outputs], len(outputs)) == [True] * (len(inputs) + len(outputs))
        plugin.configure(inputs, outputs)

    module = tensorrt(check=check)
    engine, _ = build_engine(bundle, options=replace(SMALL, trees=trees, kv_cache=kv_cache), builder="tensorrt")
    assert ("kv_fp8" in engine.key) == (kv_cache == "fp8")
    layers = bundle.manifest.model.num_layers
    assert module.log["libraries"] == [str(trt_plugins.find_library())]
    assert made.count("edgellm::EdgeLLMAttention 1") == layers and len(made) == 5 * layers + 1


def test_the_library_s_plugins_refuse_weights_that_were_not_packed(
    bundle: Bundle, tensorrt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    library()
    monkeypatch.setattr(plugins, "pack_int4", lambda stored: stored)

    def check(node: Any, weights: dict[str, Any]) -> None:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "EdgeLLMInt4Gemm":
            return
        del attributes["plugin_version"], attributes["plugin_namespace"]
        inputs = [Tensor((-1, attributes["cols"]), HALF)]
        inputs += [Tensor(weights[n].shape, _NP[np.dtype(weights[n].dtype).name.replace("uint8", "int8")]) for n in node.input[1:]]
        plugin = Plugin(node.op_type, attributes)
        plugin.configure(inputs, plugin.outputs(inputs))

    tensorrt(check=check)
    with pytest.raises(PluginError, match="the bundle's order"):
        build_engine(bundle, options=SMALL, builder="tensorrt")
    assert not (bundle.path / "engines").exists()


def test_adapters_and_bf16_have_their_own_graph_and_key(
    bundle: Bundle, tensorrt: Callable[..., Any], some_library: None
) -> None:
    kinds: set[str] = set()

    def check(node: Any, weights: dict[str, Any]) -> None:
        if node.op_type != "EdgeLLMAttention":
            kinds.add(np.dtype(weights[node.input[2]].dtype).name)

    tensorrt("10.13.3", check)
    options = BuildOptions(max_input=32, max_context=64, lora=True, activations="bf16")
    engine = build_engine(bundle, options=options, builder="tensorrt")[0]
    assert engine.key.endswith("-lora-plugin-bf16") and DECODER_PLUGIN_LORA in engine.report["sources"]
    assert kinds == {"float16"}, "scales stay fp16 in a bf16 engine"
    assert is_of(engine, bundle)


_ON_A_ROBOT = """
import importlib.machinery, sys
from pathlib import Path
class Absent:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "transformers", "modelopt", "gguf", "onnxruntime"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {here!r})
import tensorrt_double
module = sys.modules["tensorrt"] = tensorrt_double.make_module("10.3.0")
module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
from edgellm_ros import trt_plugins
from edgellm_ros.cli.main import main
from edgellm_ros.toolchain.build import targets
targets.current_target = lambda: "sm87"
trt_plugins.find_library = lambda: Path("/opt/libedgellm_plugins.so")
sys.exit(main(["build", {bundle!r}, "--max-input", "32", "--max-context", "64", "--activations", "bf16"]))
"""


def test_a_robot_builds_without_what_a_workstation_exports_with(bundle: Bundle) -> None:
    script = _ON_A_ROBOT.format(here=str(Path(__file__).parent), bundle=str(bundle.path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "16 PLUGIN_V3" in done.stdout, done.stderr


def test_in_bf16_the_graph_computes_about_the_same(exported: Bundle) -> None:
    from onnx.reference import ReferenceEvaluator

    bundle, names, model = exported, exported.manifest.graph, exported.manifest.model
    runs = []
    rng = np.random.default_rng(2)
    write, tokens = STEPS[0]
    embeds = rng.normal(0, 1, (2, tokens, model.hidden_size))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        graph = onnx.load(str(bundle.file(DECODER_PLUGIN)))
        for tensor in graph.graph.initializer:  # as to_bfloat16 finds them: not read yet
            if tensor.name.endswith(".scale"):
                tensor.data_location = onnx.TensorProto.EXTERNAL
        if dtype is not np.float16:
            to_bfloat16(graph)
        for tensor in graph.graph.initializer:
            tensor.data_location = onnx.TensorProto.DEFAULT
        cache = np.zeros((2, 2, model.num_kv_heads, 16, model.head_dim), dtype)
        feed = {names.past_kv.format(layer=layer): cache for layer in range(model.num_layers)}
        feed |= {names.embeds: embeds.astype(dtype), names.write_indices: np.asarray(write)}
        feed |= {names.positions: np.arange(tokens)[None].repeat(2, 0), names.logit_indices: np.arange(2 * tokens)}
        runs.append(ReferenceEvaluator(graph, new_ops=OPS).run([names.logits], feed)[0])
    assert np.abs(runs[1] - runs[0]).max() < 0.05 * np.abs(runs[0]).max()


@pytest.mark.parametrize(
    ("asked", "flavour", "version", "chosen"),
    [
        ("auto", "tensorrt", "10.3.0.26", "plugin"),
        ("auto", "tensorrt", "10.14.1", "plugin"),
        ("auto", "tensorrt", "10.15.1", "standard"),
        ("auto", "tensorrt", "11.0.0", "standard"),
        ("auto", "tensorrt_rtx", "1.7.1", "standard"),
        ("plugin", "tensorrt", "10.16.0", "plugin"),
    ],
)
def test_which_graph_is_built_depends_on_what_tensorrt_has(
    asked: str, flavour: str, version: str, chosen: str, exported: Bundle
) -> None:
    assert targets.choose_dialect(asked, flavour, version, exported, False) == chosen


def test_what_is_missing_is_said_with_the_remedy(
    exported: Bundle, tiny_bundle: Callable[..., Bundle], tensorrt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt()
    plain = tiny_bundle("llama", "int4")
    with pytest.raises(ToolchainError, match=r"no decoder.plugin.onnx; TensorRT 10.3.0 has no attention .*--dialect plugin"):
        build_engine(plain, options=SMALL, builder="tensorrt")
    with pytest.raises(ToolchainError, match="TensorRT 10.3.0 has no attention over a cache, TensorRT 10.15 has"):
        build_engine(plain, options=BuildOptions(max_context=64, dialect="standard"), builder="tensorrt")
    with pytest.raises(ToolchainError, match="TensorRT-RTX takes no plugins; build on the robot"):
        targets.choose_dialect("plugin", "tensorrt_rtx", "1.7", exported, False)
    with pytest.raises(ToolchainError, match="own attention has no cache in fp8; leave --kv-cache out, or, .* --dialect plugin"):
        targets.check_cache(BuildOptions(kv_cache="fp8", dialect="standard"))

    with pytest.raises(ToolchainError, match="TensorRT 10.2.0 gives no plugin .* 10.3 is the oldest"):
        targets.choose_dialect("auto", "tensorrt", "10.2.0", exported, False)

    def absent() -> Path:
        raise UnsupportedError("libedgellm_plugins.so is not here; set TENSORRT_ROOT")

    monkeypatch.setattr(trt_plugins, "find_library", absent)
    with pytest.raises(ToolchainError, match="the decoder needs the project's plugins, and libedgellm_plugins.so is not here"):
        build_engine(exported, options=SMALL, builder="tensorrt")
    assert not (exported.path / "engines").exists()


def test_a_tensorrt_that_does_not_take_the_library_is_said(
    exported: Bundle, tensorrt: Callable[..., Any], some_library: None
) -> None:
    module = tensorrt()
    module.get_plugin_registry().__class__.load_library = lambda self, path: None
    with pytest.raises(ToolchainError, match="TensorRT 10.3.0 did not take EdgeLLMAttention, .*build edgellm_ros again"):
        build_engine(exported, options=SMALL, builder="tensorrt")
