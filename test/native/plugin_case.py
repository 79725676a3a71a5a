"""What the plugin tests share: TensorRT's plugin interface through the test driver, as Python calls."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edgellm_ros import trt_plugins
from edgellm_ros.errors import UnsupportedError

DRIVER = "libedgellm_plugin_test_driver.so"
FLOAT, HALF, INT8, INT32, FP8, BF16, INT64 = 0, 1, 2, 3, 6, 7, 8  # nvinfer1::DataType
LINEAR = 0
_BY_NAME = {"float32": FLOAT, "float16": HALF, "bfloat16": BF16, "int8": INT8, "int64": INT64}


class Tensor(NamedTuple):
    """A tensor as TensorRT describes it; sizes below 0 are not known."""

    dims: tuple[int, ...]
    type: int
    format: int = LINEAR


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("num_dims", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
    )


class _Setting(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("is_real", ctypes.c_int32),
        ("integer", ctypes.c_int32),
        ("real", ctypes.c_float),
    )


class PluginError(Exception):
    """What a plugin logged when it refused."""


def library() -> Path:
    """The plugin library; the test is skipped where it is not built."""
    try:
        path = trt_plugins.find_library()
    except UnsupportedError as error:
        pytest.skip(str(error))
    if not (path.parent / DRIVER).is_file():
        pytest.skip(f"{DRIVER} is not beside {path}; tools/build_native.py builds both")
    return path


def lean_library() -> Path:
    """A real TensorRT runtime library out of the wheel that `make test` installs."""
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tensorrt-lean-cu13-libs is not installed (it exists for x86-64 only)")
    return next(Path(spec.submodule_search_locations[0]).glob("libnvinfer_lean.so*"))


def driver() -> Any:
    """The test driver's functions."""
    lib = ctypes.CDLL(str(library().parent / DRIVER))
    for name in ("creator", "registered", "create", "reread", "clone"):
        getattr(lib, f"driver_{name}").restype = ctypes.c_void_p
    for name in ("last_error", "identity"):
        getattr(lib, f"driver_{name}").restype = ctypes.c_char_p
    lib.driver_workspace.restype = ctypes.c_int64
    return lib


def tensor_array(tensors: Sequence[Tensor]) -> Any:
    array = (_Tensor * len(tensors))()
    for to, tensor in zip(array, tensors, strict=True):
        to.num_dims, to.type, to.format = len(tensor.dims), tensor.type, tensor.format
        to.dims[: len(tensor.dims)] = tensor.dims
    return array


class Plugin:
    """One plugin object, of the library's own creator or of `creator`."""

    def __init__(self, name: str, settings: Mapping[str, int | float], creator: int | None = None) -> None:
        """Raises PluginError with what the plugin said of its settings."""
        self._driver = driver()
        self._driver.driver_clear_error()
        self._creator = creator or self._driver.driver_creator(str(library()).encode(), name.encode())
        assert self._creator, self._driver.driver_last_error().decode()
        fields = (_Setting * max(1, len(settings)))()
        for field, (key, value) in zip(fields, settings.items(), strict=False):
            # Not isinstance(value, float): onnx's evaluator gives numpy.float32, which is none.
            field.name, field.is_real = key.encode(), not isinstance(value, Integral)
            field.integer, field.real = int(value), float(value)
        self._plugin = self._check(
            self._driver.driver_create(ctypes.c_void_p(self._creator), fields, len(settings), 0)
        )

    def __del__(self) -> None:
        if getattr(self, "_plugin", None):
            self._driver.driver_destroy(ctypes.c_void_p(self._plugin))

    def _check(self, plugin: int | None) -> int:
        if not plugin:
            raise PluginError(self._driver.driver_last_error().decode())
        return plugin

    def _call(self, name: str, *arguments: Any) -> int:
        self._driver.driver_clear_error()
        result: int = getattr(self._driver, f"driver_{name}")(ctypes.c_void_p(self._plugin), *arguments)
        return result

    def _must(self, name: str, *arguments: Any) -> None:
        if self._call(name, *arguments):
            raise PluginError(self._driver.driver_last_error().decode())

    @property
    def identity(self) -> str:
        self._driver.driver_identity.argtypes = [ctypes.c_void_p]
        text: bytes = self._driver.driver_identity(self._plugin)
        return text.decode()

    def fields(self) -> dict[str, int | float]:
        """What would be serialised."""
        found: dict[str, int | float] = {}
        setting = _Setting()
        while self._call("field", len(found), ctypes.byref(setting)):
            found[setting.name.decode()] = setting.real if setting.is_real else setting.integer
        return found

    def reread(self) -> None:
        """Serialise, destroy, and make it again of the bytes alone."""
        plugin, self._plugin = self._plugin, 0
        self._driver.driver_clear_error()
        self._plugin = self._check(
            self._driver.driver_reread(ctypes.c_void_p(self._creator), ctypes.c_void_p(plugin))
        )

    def attach(self) -> None:
        """Take the clone that an execution context would get instead."""
        plugin = self._plugin
        self._plugin = self._check(self._driver.driver_clone(ctypes.c_void_p(plugin)))
        self._driver.driver_destroy(ctypes.c_void_p(plugin))

    def outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        count = self._call("num_outputs")
        made = (_Tensor * count)()
        self._must("outputs", tensor_array(inputs), len(inputs), made, count)
        return [Tensor(tuple(t.dims[: t.num_dims]), t.type) for t in made]

    def aliased_input(self, output: int) -> int:
        return self._call("aliased_input", output)

    def takes(self, tensors: Sequence[Tensor], num_outputs: int) -> list[bool]:
        """For each tensor, whether its type and format are accepted beside those before it."""
        array, num_in = tensor_array(tensors), len(tensors) - num_outputs
        return [bool(self._call("takes", i, array, num_in, num_outputs)) for i in range(len(tensors))]

    def configure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._must("configure", tensor_array([*inputs, *outputs]), len(inputs), len(outputs))

    def shape_change(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._must("shape_change", tensor_array([*inputs, *outputs]), len(inputs), len(outputs))

    def workspace(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return self._call("workspace", tensor_array([*inputs, *outputs]), len(inputs), len(outputs))

    def enqueue(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], addresses: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Launch; addresses are those of the inputs, then of the outputs."""
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._must(
            "enqueue", tensor_array([*inputs, *outputs]), len(inputs), len(outputs), pointers,
            ctypes.c_void_p(workspace), ctypes.c_void_p(stream),
        )  # fmt: skip


def plugin_of_node(
    name: str, attributes: Mapping[str, Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> tuple[Plugin, list[Tensor], list[Tensor]]:
    """The plugin of an ONNX node, told of these arrays (of NumPy or torch), and how it was told.

    Raises PluginError where it takes the attributes or the arrays not."""
    plugin = Plugin(name, {key: value for key, value in attributes.items() if not key.startswith("plugin_")})
    ins, outs = (
        [Tensor(tuple(a.shape), _BY_NAME[str(a.dtype).removeprefix("torch.")]) for a in arrays]
        for arrays in (inputs, outputs)
    )
    made = [made[:2] for made in plugin.outputs(ins)]
    if made != [out[:2] for out in outs]:
        raise PluginError(f"{name} makes {made}; the arrays are {outs}")
    plugin.shape_change(ins, outs)
    return plugin, ins, outs


def query_type(cache: int, tokens: int, tree: bool) -> int | None:
    """What the attention rounds turned queries to; None: they stay fp32.

    A tree's queries are rounded to the operands of its products: fp16 beside an fp16 cache. A prompt's are bf16 on their
    way to the kernel, whatever the cache has. Scores are of several units, so that the difference is seen in outputs."""
    if tokens == 1:
        return None
    return HALF if tree and tokens <= 64 and cache == HALF else BF16


def attention_tensors(
    settings: Mapping[str, int | float], batch: int, tokens: int, capacity: int, rows: int = 0, type: int = HALF,
    cache: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Inputs and outputs of an EdgeLLMAttention."""
    heads, kv_heads, dim = (int(settings[key]) for key in ("num_heads", "num_kv_heads", "head_dim"))
    kv = Tensor((batch, 2, kv_heads, capacity, dim), type if cache is None else cache)
    table = Tensor((rows or capacity, dim // 2), FLOAT)
    inputs = [Tensor((batch, tokens, (heads + 2 * kv_heads) * dim), type), kv]
    inputs += [Tensor((batch, tokens), INT64), Tensor((batch,), INT64), table, table]
    inputs += [Tensor((dim,), FLOAT)] * (2 if settings.get("qk_norm") else 0)
    inputs += [Tensor((batch, tokens), INT64)] if settings.get("tree") else []
    return inputs, [Tensor((batch, tokens, heads * dim), type), kv]


def gemm_tensors(
    bits: int, settings: Mapping[str, int], tokens: tuple[int, ...], type: int = HALF
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of an EdgeLLMInt4Gemm or EdgeLLMInt8Gemm."""
    rows, cols, group = settings["rows"], settings["cols"], settings["group"]
    tiles, blocks = -(-rows // 16), -(-cols // 64)
    if bits == 8:
        weight, scales = Tensor((rows, cols), INT8), Tensor((rows, cols // group), HALF)
    else:
        groups = cols // group if group >= 64 else blocks * 64 // group
        weight, scales = Tensor((tiles, blocks, 512), INT8), Tensor((tiles, groups, 16), HALF)
    bias = [Tensor((rows,), FLOAT)] if settings.get("bias") else []
    out = FLOAT if settings.get("float_output") else type
    return [Tensor((*tokens, cols), type), weight, scales, *bias], [Tensor((*tokens, rows), out)]
