"""Appends ONNX nodes and initializers; weights are named by their byte range in weights.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgellm_ros.bundle import WEIGHTS
from edgellm_ros.executors.contract import lora_contract
from edgellm_ros.manifest import GraphSpec
from edgellm_ros.weight_file import WeightFile

CONTRIB = "com.microsoft"


class GraphBuilder:
    """One graph under construction. Node outputs are named after their node, which is named after its place."""

    def __init__(self, weights: WeightFile) -> None:
        """Weights are looked up in `weights` and never read."""
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._domains: dict[str, int] = {}  # beside ONNX's own: domain, version
        self._made: set[str] = set()

    def input(self, name: str, dtype: int, shape: list[int | str]) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: list[int | str]) -> str:
        """Declare a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def node(self, op: str, inputs: list[str], name: str, *, outputs: list[str] | None = None,
             contrib: bool = False, domain: str = "", **attributes: Any) -> str:  # fmt: skip
        """Append a node; returns its first output, which is `name` unless `outputs` says otherwise."""
        names = outputs or [name]
        domain = CONTRIB if contrib else domain
        if domain:
            self._domains[domain] = 1
        self._made.update(names)
        self._nodes.append(helper.make_node(op, inputs, names, name=f"{name}/{op}", domain=domain, **attributes))
        return names[0]

    def has(self, output: str) -> bool:
        """Whether a node already makes `output`."""
        return output in self._made

    def constant(self, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """A small inline constant; the same name twice is the same constant."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def softcap(self, x: str, cap: float, dtype: npt.DTypeLike, output: str) -> str:
        """Cap * tanh(x / cap): values stay between -cap and cap."""
        limit = self.constant("softcap", cap, dtype)
        scaled = self.node("Div", [x, limit], f"{x}.scaled")
        return self.node("Mul", [self.node("Tanh", [scaled], f"{x}.tanh"), limit], output)

    def weight(self, name: str, dtype: int, shape: tuple[int, ...], alias: str = "") -> str:
        """The tensor `name` of the weight file, seen as `dtype` and `shape` (its bytes are reinterpreted)."""
        key = alias or name
        if key not in self._initializers:
            offset, length = self._weights.location(name)
            tensor = TensorProto(name=key, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
            for field, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
                tensor.external_data.add(key=field, value=value)
            self._initializers[key] = tensor
        return key

    def lora(
        self, x: str, base: str, names: GraphSpec, layer: int, stem: str, dtype: int, shape: tuple[int, int]
    ) -> str:
        """`base` + x A B, where A [in, R] and B [R, out] become inputs of the graph; `shape` is (out, in).

        R may be 0: then zeros are added.
        """
        at = f"layers.{layer}.{stem}"
        a, b = (
            self.input(tensor.name, dtype, list(tensor.shape))
            for tensor in lora_contract(names, layer, stem, shape[1], shape[0], "")
        )
        hidden = self.node("MatMul", [x, a], f"{at}.lora_h")
        return self.node("Add", [base, self.node("MatMul", [hidden, b], f"{at}.lora")], f"{at}.adapted")

    def save(self, path: Path, *, opset: int, ir_version: int, producer: str) -> None:
        """Write the model; the weight file must lie beside it when it is loaded."""
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in {"": opset, **self._domains}.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name=producer)
        path.write_bytes(model.SerializeToString())
