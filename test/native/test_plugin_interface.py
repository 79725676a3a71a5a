"""The plugins as TensorRT meets them before it runs one: creators, fields, shapes, types, refusals. No GPU is needed.

Creators come from the library, or from the registry of the real lean runtime that has loaded it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_case import (
    BF16,
    FLOAT,
    FP8,
    HALF,
    INT8,
    INT32,
    INT64,
    Plugin,
    PluginError,
    Tensor,
    attention_tensors,
    driver,
    gemm_tensors,
    lean_library,
    library,
)  # fmt: skip

from edgellm_ros import native, trt_plugins
from edgellm_ros.errors import UnsupportedError

NATIVE, NO_MODULE = native.import_module()
HAS_GPU = bool(not NO_MODULE and NATIVE.TENSORRT_HEADERS and NATIVE.count_devices()[0])

ATTENTION = {
    "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "scale": 0.125, "window": 0, "qk_norm": 0, "norm_eps": 1e-6,
    "tree": 0,
}  # fmt: skip
GEMM = {"rows": 100, "cols": 96, "group": 32, "bias": 0, "float_output": 0}
NAMES = {"EdgeLLMAttention": ATTENTION, "EdgeLLMInt4Gemm": GEMM, "EdgeLLMInt8Gemm": GEMM}


@pytest.mark.parametrize("name", NAMES)
def test_a_plugin_is_the_same_after_serialising_and_cloning(name: str) -> None:
    changed = {"window": 512, "qk_norm": 1, "tree": 1} if name == "EdgeLLMAttention" else {"bias": 1, "group": 16}
    settings = {**NAMES[name], **changed}
    plugin = Plugin(name, settings)
    assert plugin.identity == f"{trt_plugins.DOMAIN}::{name} {trt_plugins.VERSION}"
    for _ in range(2):
        assert plugin.fields() == pytest.approx(settings)
        plugin.reread()
        plugin.attach()
    assert plugin.fields() == pytest.approx(settings)


def test_the_names_are_those_that_export_writes() -> None:
    assert list(NAMES) == [trt_plugins.ATTENTION, trt_plugins.INT4_GEMM, trt_plugins.INT8_GEMM]


@pytest.mark.parametrize("name", NAMES)
def test_the_real_lean_runtime_loads_the_library_and_makes_plugins(name: str) -> None:
    code = (
        f"import edgellm_ros; edgellm_ros.__path__.insert(0, {str(library().parent)!r})\n"
        "import plugin_case as p\n"
        "lib = p.driver()\n"
        f"creator = lib.driver_registered({str(lean_library()).encode()!r}, {str(library()).encode()!r},"
        f" {name.encode()!r}, b'1', b'edgellm')\n"
        "assert creator, lib.driver_last_error()\n"
        f"assert not lib.driver_registered({str(lean_library()).encode()!r}, None, {name.encode()!r}, b'1', b'')\n"
        f"plugin = p.Plugin({name!r}, {NAMES[name]!r}, creator)\n"
        "plugin.reread()\n"
        "print(plugin.identity)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout == f"edgellm::{name} 1\n", done.stderr


def test_a_program_that_loads_the_library_itself_registers_once_or_is_told_what_to_load_first() -> None:
    code = (
        "import ctypes, sys\n"
        f"lib = ctypes.CDLL({str(library())!r})\n"
        "lib.initLibEdgeLLMPlugins.restype = ctypes.c_bool\n"
        "before = lib.initLibEdgeLLMPlugins(None)\n"
        f"ctypes.CDLL({str(lean_library())!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "print(before, lib.initLibEdgeLLMPlugins(None), lib.initLibEdgeLLMPlugins(None))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout == "False True True\n", done.stderr
    assert "load libnvinfer.so.10 first" in done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("EdgeLLMAttention", {"head_dim": 72}, "head_dim is 72; allowed: 64, 80, 96, 128, 256"),
        ("EdgeLLMAttention", {"num_heads": 10}, "num_heads is 10; allowed: multiples of num_kv_heads"),
        ("EdgeLLMAttention", {"num_kv_heads": 0}, "num_kv_heads is 0"),
        ("EdgeLLMAttention", {"scale": 0.0}, "scale is 0.0"),
        ("EdgeLLMAttention", {"window": -1}, "window is -1"),
        ("EdgeLLMAttention", {"tree": 2}, "tree is 2; allowed: 0, 1"),
        ("EdgeLLMAttention", {"scale": 1}, "field scale is not one FLOAT32"),
        ("EdgeLLMAttention", {"head_dim": 64.0}, "field head_dim is not one INT32"),
        ("EdgeLLMAttention", {"softcap": 30.0}, "there is no field softcap"),
        ("EdgeLLMInt4Gemm", {"group": 48}, "group is 48; allowed: 16, 32, 64, 128"),
        ("EdgeLLMInt4Gemm", {"cols": 100}, "cols is 100; allowed: multiples of group"),
        ("EdgeLLMInt8Gemm", {"rows": 0}, "rows is 0"),
        ("EdgeLLMInt8Gemm", {"bias": -1}, "bias is -1"),
    ],
)
def test_settings_are_refused_by_name_and_value(name: str, changed: dict[str, float], message: str) -> None:
    with pytest.raises(PluginError, match=message.replace("(", r"\(")):
        Plugin(name, {**NAMES[name], **changed})


@pytest.mark.parametrize(
    ("name", "lost"), [("EdgeLLMAttention", "num_heads"), ("EdgeLLMAttention", "scale"), ("EdgeLLMInt4Gemm", "group")]
)
def test_a_missing_setting_is_named(name: str, lost: str) -> None:
    with pytest.raises(PluginError, match=f"the field {lost} is missing"):
        Plugin(name, {key: value for key, value in NAMES[name].items() if key != lost})


@pytest.mark.parametrize("cache", [None, FP8, INT8])
@pytest.mark.parametrize("type", [HALF, BF16])
@pytest.mark.parametrize("extra", [{}, {"qk_norm": 1}, {"tree": 1}, {"qk_norm": 1, "tree": 1}])
def test_attention_passes_unknown_sizes_on(extra: dict[str, int], type: int, cache: int | None) -> None:
    settings = {**ATTENTION, **extra}
    plugin = Plugin("EdgeLLMAttention", settings)
    inputs, outputs = attention_tensors(settings, -1, -2, 256, type=type, cache=cache)
    assert plugin.outputs(inputs) == outputs
    assert [plugin.aliased_input(i) for i in range(2)] == [-1, 1]
    assert plugin.takes([*inputs, *outputs], 2) == [True] * (len(inputs) + 2)
    plugin.configure(inputs, outputs)


@pytest.mark.parametrize(
    ("place", "type"),
    [(0, FLOAT), (1, INT64), (2, INT32), (3, FLOAT), (4, HALF), (6, HALF), (8, INT32), (9, BF16), (10, FP8)],
)
def test_attention_refuses_other_types(place: int, type: int) -> None:
    settings = {**ATTENTION, "qk_norm": 1, "tree": 1}
    inputs, outputs = attention_tensors(settings, 1, 4, 256)
    tensors = [*inputs, *outputs]
    tensors[place] = tensors[place]._replace(type=type)
    assert not Plugin("EdgeLLMAttention", settings).takes(tensors, 2)[place]
    vectorised = [*inputs, *outputs]
    vectorised[place] = vectorised[place]._replace(format=1)
    assert not Plugin("EdgeLLMAttention", settings).takes(vectorised, 2)[place]


@pytest.mark.parametrize(
    ("place", "dims", "message"),
    [
        (0, (2, 4, 959), r"qkv is \[2, 4, 959\]; it must be \[-1, -1, 960\]"),
        (1, (2, 3, 256, 64), r"past_kv is \[2, 3, 256, 64\]; it must be \[2, 2, 3, -1, 64\]"),
        (1, (1, 2, 3, 256, 64), "past_kv is"),
        (2, (2, 5), r"position_ids is \[2, 5\]; it must be \[2, 4\]"),
        (3, (1,), "write_indices is"),
        (4, (256, 64), "cos is"),
        (5, (200, 32), "room for 256 tokens, but cos and sin for 200; build with a smaller --max-context"),
        (6, (32,), "q_gain is"),
        (8, (2, 8), "tree_masks is"),
        (10, (2, 2, 3, 128, 64), "present_kv is"),
    ],
)
def test_attention_names_the_tensor_that_does_not_fit(place: int, dims: tuple[int, ...], message: str) -> None:
    settings = {**ATTENTION, "qk_norm": 1, "tree": 1}
    plugin = Plugin("EdgeLLMAttention", settings)
    inputs, outputs = attention_tensors(settings, 2, 4, 256)
    plugin.shape_change(inputs, outputs)
    tensors = [*inputs, *outputs]
    tensors[place] = tensors[place]._replace(dims=dims)
    for refuse in (plugin.shape_change, plugin.configure):
        with pytest.raises(PluginError, match=message):
            refuse(tensors[:-2], tensors[-2:])


def test_attention_refuses_more_tokens_than_its_cache_has_room_for() -> None:
    with pytest.raises(PluginError, match="a step of 257 tokens exceeds the cache's capacity of 256"):
        Plugin("EdgeLLMAttention", ATTENTION).shape_change(*attention_tensors(ATTENTION, 1, 257, 256))


def test_attention_wants_its_output_cache_to_be_its_input_cache() -> None:
    plugin = Plugin("EdgeLLMAttention", ATTENTION)
    inputs, outputs = attention_tensors(ATTENTION, 1, 1, 256)
    with pytest.raises(PluginError, match="present_kv is not where past_kv is.*kALIASED_PLUGIN_IO_10_03"):
        plugin.enqueue(inputs, outputs, range(256, 256 * 9, 256), 0, 0)


def test_attention_wants_a_workspace_for_the_largest_step_of_the_profile() -> None:
    plugin = Plugin("EdgeLLMAttention", {**ATTENTION, "tree": 1})
    sizes = [plugin.workspace(*attention_tensors({**ATTENTION, "tree": 1}, b, s, 256))
             for b, s in ((1, 1), (1, 8), (1, 512), (2, 512), (40, 512))]  # fmt: skip
    assert sizes == sorted(sizes) and sizes[0] > 960 * 4 and sizes[-1] > 40 * 512 * (960 * 4 + 2 * 576 * 2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("type", [HALF, BF16])
@pytest.mark.parametrize("changed", [{}, {"bias": 1}, {"float_output": 1, "group": 16}, {"cols": 640, "group": 128}])
def test_gemm_passes_unknown_sizes_on(bits: int, type: int, changed: dict[str, int]) -> None:
    settings = {**GEMM, **changed}
    plugin = Plugin(f"EdgeLLMInt{bits}Gemm", settings)
    for tokens in ((-1,), (-1, -2)):
        inputs, outputs = gemm_tensors(bits, settings, tokens, type)
        assert plugin.outputs(inputs) == outputs
        assert plugin.takes([*inputs, *outputs], 1) == [True] * (len(inputs) + 1)
        plugin.configure(inputs, outputs)
        assert (plugin.workspace(inputs, outputs) > 0) == (type == HALF)


def test_gemm_refuses_weights_in_the_bundles_order_and_says_who_packs_them() -> None:
    inputs, outputs = gemm_tensors(4, GEMM, (3,))
    inputs[1] = Tensor((100, 48), INT8)
    with pytest.raises(PluginError, match=r"weight is \[100, 48\], the bundle's order; .*`edgellm build`"):
        Plugin("EdgeLLMInt4Gemm", GEMM).configure(inputs, outputs)


@pytest.mark.parametrize(
    ("place", "dims", "message"),
    [
        (0, (3, 95), r"x is \[3, 95\]; it must be \[3, 96\]"),
        (0, (96,), "x is .*token axis"),
        (1, (7, 1, 512), r"weight is \[7, 1, 512\]; it must be \[7, 2, 512\]"),
        (2, (7, 3, 16), r"scales is \[7, 3, 16\]; it must be \[7, 4, 16\]"),
        (3, (99,), "bias is"),
        (4, (3, 101), "y is"),
    ],
)
def test_gemm_names_the_tensor_that_does_not_fit(place: int, dims: tuple[int, ...], message: str) -> None:
    settings = {**GEMM, "bias": 1}
    plugin = Plugin("EdgeLLMInt4Gemm", settings)
    inputs, outputs = gemm_tensors(4, settings, (3,))
    plugin.shape_change(inputs, outputs)
    tensors = [*inputs, *outputs]
    tensors[place] = tensors[place]._replace(dims=dims)
    with pytest.raises(PluginError, match=message):
        plugin.shape_change(tensors[:-1], tensors[-1:])


@pytest.mark.parametrize(("place", "type"), [(0, FLOAT), (1, HALF), (2, BF16), (3, HALF), (4, FLOAT)])
def test_gemm_refuses_other_types(place: int, type: int) -> None:
    settings = {**GEMM, "bias": 1}
    inputs, outputs = gemm_tensors(8, settings, (3,))
    tensors = [*inputs, *outputs]
    tensors[place] = tensors[place]._replace(type=type)
    assert not Plugin("EdgeLLMInt8Gemm", settings).takes(tensors, 1)[place]


def test_a_wrong_number_of_inputs_is_refused() -> None:
    inputs, outputs = gemm_tensors(8, GEMM, (3,))
    with pytest.raises(PluginError, match="4 inputs for 3"):
        Plugin("EdgeLLMInt8Gemm", GEMM).configure([*inputs, inputs[0]], outputs)


def test_the_driver_finds_no_creator_of_another_name() -> None:
    lib = driver()
    assert not lib.driver_creator(ctypes.c_char_p(str(library()).encode()), b"EdgeLLMOther")


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_the_real_runtime_loads_the_library_for_every_engine(tmp_path: Path) -> None:
    """It refuses the plans, which are none; the library it takes before that, a second time too."""
    plan = tmp_path / "decoder.engine"
    plan.write_bytes(bytes(range(256)) * 64)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="TensorRT refuses .*decoder.engine"):
            NATIVE.TrtEngine(str(plan), [str(lean_library())], str(library()))
    with pytest.raises(UnsupportedError, match="TensorRT does not load .*decoder.engine"):
        NATIVE.TrtEngine(str(plan), [str(lean_library())], str(plan))
