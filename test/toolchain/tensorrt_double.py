"""A double of TensorRT's Python module, for builds with plugins, which TensorRT-RTX cannot make: it computes nothing.

Its parser reads weights as TensorRT does, by the path beside the graph. Where the real plugin library is built, every
plugin of the graph is made by the library's own creators of the node's attributes, and has to accept the node's shapes.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgellm_ros import trt_plugins

_TYPES = {TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.BFLOAT16: "BF16", TensorProto.INT64: "INT64", TensorProto.INT8: "INT8"}


class Tensor:
    def __init__(self, value: Any) -> None:
        kind = value.type.tensor_type
        self.name, self.dtype = value.name, f"DataType.{_TYPES[kind.elem_type]}"
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)


class Named:
    def __init__(self, name: str) -> None:
        self.name, self.shape, self.dtype = name, (), "DataType.HALF"


class Layer:
    def __init__(self, node: Any) -> None:
        plugin = node.domain == trt_plugins.DOMAIN
        self.name, self.type = node.name, "LayerType.PLUGIN_V3" if plugin else f"LayerType.{node.op_type.upper()}"
        self._inputs, self._outputs = list(node.input), list(node.output)
        self.num_inputs, self.num_outputs = len(self._inputs), len(self._outputs)

    def get_input(self, index: int) -> Named:
        return Named(self._inputs[index])

    def get_output(self, index: int) -> Named:
        return Named(self._outputs[index])


class Network:
    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.layers: list[Layer] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


class Config:
    def __init__(self, log: dict[str, Any]) -> None:
        self._log = log
        self.progress_monitor: Any = None

    def add_optimization_profile(self, profile: Any) -> None:
        self._log["profiles"].append(profile.shapes)

    def clear_flag(self, flag: Any) -> None:
        pass

    def set_preview_feature(self, feature: str, on: bool) -> None:
        self._log["features"].append((feature, on))

    def create_timing_cache(self, data: bytes) -> Any:
        return types.SimpleNamespace(serialize=lambda: b"cache")

    def set_timing_cache(self, cache: Any, ignore: bool) -> bool:
        return True


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self.shapes[name] = (low, best, high)


def read_weight(tensor: Any, directory: Path) -> np.ndarray:
    """An initializer's numbers, from where it says that they are."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if tensor.data_location != TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    with open(directory / place["location"], "rb") as file:
        file.seek(int(place["offset"]))
        data = file.read(int(place["length"]))
    return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))


def make_module(version: str, check: Any = None) -> Any:
    """The module; `log` in it is what was asked of it. `check` is called with each plugin's node and its weights."""
    log: dict[str, Any] = {"libraries": [], "features": [], "profiles": [], "plugins": [], "directory": None}

    class Registry:
        def get_creator(self, name: str, plugin_version: str, namespace: str) -> Any:
            return object() if log["libraries"] and (plugin_version, namespace) == ("1", "edgellm") else None

        def load_library(self, path: str) -> None:
            log["libraries"].append(path)

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Network, logger: Any) -> None:
            self._network = network

        def supports_operator(self, name: str) -> bool:
            return not name.startswith("EdgeLLM")

        def parse(self, data: bytes, path: str) -> bool:
            model = onnx.load_from_string(data)
            graph, directory = model.graph, Path(path).parent
            log["directory"] = directory
            weights = {tensor.name: read_weight(tensor, directory) for tensor in graph.initializer}
            self._network.inputs = [Tensor(value) for value in graph.input]
            self._network.outputs = [Tensor(value) for value in graph.output]
            self._network.layers = [Layer(node) for node in graph.node]
            for node in graph.node:
                if node.domain == trt_plugins.DOMAIN:
                    log["plugins"].append(node.name)
                    if check is not None:
                        check(node, weights)
            return True

    class Builder:
        def __init__(self, logger: Any) -> None:
            pass

        def create_network(self, flags: int) -> Network:
            return Network()

        def create_builder_config(self) -> Config:
            return Config(log)

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes:
            return b"a double's engine, which nothing can run"

    class Base:
        def __init__(self) -> None:
            pass

    module: Any = types.ModuleType("tensorrt")
    registry = Registry()
    module.__dict__.update(
        __version__=version, Builder=Builder, OnnxParser=OnnxParser, ILogger=Base, IProgressMonitor=Base, log=log,
        get_plugin_registry=lambda: registry,
        NetworkDefinitionCreationFlag=types.SimpleNamespace(STRONGLY_TYPED=1),
        BuilderFlag=types.SimpleNamespace(WEIGHT_STREAMING="weight streaming"),
        PreviewFeature=types.SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliased"),
        MemoryPoolType=types.SimpleNamespace(WORKSPACE="workspace"),
    )  # fmt: skip
    return module
