"""The decoder for TensorRT 10.3 to 10.14, which has no attention layer: the project's plugins in standard operators.

Attention and quantised products are operators of native/plugins (domain `edgellm`); everything else is opset 18, norms
and GELU in their parts, because these parsers know no later operators. Inputs and outputs are those of the portable
graph, but for the cache: one tensor a layer. Quantised weights are named as the bundle stores them; `edgellm build`
hands int4 ones to TensorRT in the order of the kernels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from edgellm_ros.errors import ToolchainError
from edgellm_ros.manifest import NO_ROPE, GraphSpec, LinearFormat, ModelSpec, QuantSpec
from edgellm_ros.toolchain.graph import stored
from edgellm_ros.toolchain.graph.portable import PortableDecoder
from edgellm_ros.trt_plugins import ATTENTION, DOMAIN, GROUPS, HEAD_DIMS, INT4_GEMM, INT8_GEMM, VERSION
from edgellm_ros.weight_file import WeightFile

OPSET = 18
IR_VERSION = 8
_KINDS = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
# For the parser: TensorRT reads a plugin's namespace from the node's domain only from 10.10 on.
_IDENTITY: dict[str, Any] = {"plugin_version": VERSION, "plugin_namespace": DOMAIN}


def check_plugin_support(model: ModelSpec, quant: QuantSpec) -> None:
    """Raise ToolchainError that names what the plugins do not compute."""
    remedy = "leave --dialect plugin out; TensorRT 10.15 and newer build decoder.onnx"
    if model.head_dim not in HEAD_DIMS:
        have = ", ".join(map(str, HEAD_DIMS))
        raise ToolchainError(f"{model.name} has head_dim {model.head_dim}; the plugin has kernels for {have}; {remedy}")
    if model.rotary_dim:
        raise ToolchainError(f"{model.name} turns {model.rotary_dim} of a head's {model.head_dim} channels by their "
                             f"position; the plugin turns all or none; {remedy}")  # fmt: skip
    stems = [f"layers.{layer}.{kind}" for layer in range(model.num_layers) for kind in _KINDS]
    for stem in (*stems, quant.head_tensor(model)):
        form = quant.format_of(stem)
        if form.scheme == "fp16":
            continue
        if form.scheme not in ("int4", "int8"):
            raise ToolchainError(f"{stem} is {form.scheme}; the plugins multiply int4, int8 and fp16; export with "
                                 "--weights int4, or without --dialect plugin")  # fmt: skip
        if form.group_size not in GROUPS:
            have = ", ".join(map(str, GROUPS))
            raise ToolchainError(f"{stem} has groups of {form.group_size} input features; the plugins have {have}; "
                                 "export with --weights int4, or without --dialect plugin")  # fmt: skip


def write_plugin_graph(
    path: Path, model: ModelSpec, quant: QuantSpec, graph: GraphSpec, weights: WeightFile, lora: bool = False
) -> None:
    """Write `decoder.plugin.onnx` to `path`; with `lora`, `decoder.plugin.lora.onnx`, with an adapter as inputs."""
    PluginDecoder(model, quant, graph, weights, lora).save(path)


class PluginDecoder(PortableDecoder):
    """The portable graph with the plugins' operators in the place of those that these parsers do not have."""

    dialect = "plugin"

    def save(self, path: Path) -> None:
        """Write the model to `path`."""
        self.g.save(path, opset=OPSET, ir_version=IR_VERSION, producer="edgellm_ros")

    def _mask(self, window: int) -> str:
        return ""  # the plugin knows positions and windows

    def _rope_table(self, name: str, shape: tuple[int, int]) -> str:
        return self.g.weight(name, TensorProto.FLOAT, shape)

    def _no_rope(self) -> list[str]:
        """Tables that turn nothing."""
        m, g = self.model, self.g
        shape = g.constant("rope.shape", [m.max_context, m.head_dim // 2], np.int64)
        values = {"rope.none.cos": 1.0, "rope.none.sin": 0.0}
        return [
            name if g.has(name) else g.node(
                "ConstantOfShape", [shape], name, value=helper.make_tensor("value", TensorProto.FLOAT, [1], [value])
            )
            for name, value in values.items()
        ]  # fmt: skip

    def _attention(self, layer: int, y: str) -> str:
        m, g, names, at = self.model, self.g, self.graph, f"layers.{layer}.attn"
        q_width, kv_width = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        qkv = self._adapted(y, layer, "attn.qkv", q_width + 2 * kv_width, m.hidden_size)
        rope = m.rope(layer)
        tables = self._no_rope() if rope == NO_ROPE else self._ropes[rope]
        inputs = [qkv, names.past_kv.format(layer=layer), names.positions, names.write_indices, *tables]
        if m.qk_norm:
            gains = (f"{at}.q_norm.weight", f"{at}.k_norm.weight")
            inputs += [g.weight(gain, TensorProto.FLOAT, (m.head_dim,)) for gain in gains]
        return g.node(
            ATTENTION, inputs, at, outputs=[at, names.present_kv.format(layer=layer)], domain=DOMAIN, **_IDENTITY,
            num_heads=m.num_heads, num_kv_heads=m.num_kv_heads, head_dim=m.head_dim, scale=float(m.score_scale),
            window=m.window(layer), qk_norm=int(m.qk_norm), norm_eps=float(m.rms_norm_eps), tree=0,
        )  # fmt: skip

    def _gelu(self, x: str, name: str) -> str:
        """By its tanh approximation: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
        g = self.g
        number = {
            key: g.constant(f"gelu.{key}", value, self.np_dtype)
            for key, value in (("half", 0.5), ("one", 1.0), ("cubic", 0.044715), ("factor", math.sqrt(2 / math.pi)))
        }
        square = g.node("Mul", [x, x], f"{name}.square")
        inner = g.node("Add", [g.node("Mul", [square, number["cubic"]], f"{name}.cubic"), number["one"]], f"{name}.sum")
        scaled = g.node("Mul", [g.node("Mul", [x, inner], f"{name}.inner"), number["factor"]], f"{name}.scaled")
        outer = g.node("Add", [g.node("Tanh", [scaled], f"{name}.tanh"), number["one"]], f"{name}.outer")
        return g.node("Mul", [g.node("Mul", [x, number["half"]], f"{name}.halved"), outer], name)

    def _norm(self, x: str, name: str, width: int) -> str:
        g = self.g
        wide = g.node("Cast", [x], f"{name}.fp32", to=TensorProto.FLOAT)
        square = g.node("Mul", [wide, wide], f"{name}.square")
        mean = g.node("ReduceMean", [square, g.constant("axis_last", [-1], np.int64)], f"{name}.mean", keepdims=1)
        shifted = g.node("Add", [mean, g.constant("norm_eps", self.model.rms_norm_eps, np.float32)], f"{name}.shifted")
        unit = g.node("Div", [wide, g.node("Sqrt", [shifted], f"{name}.root")], f"{name}.unit")
        if self.dtype != TensorProto.FLOAT:
            unit = g.node("Cast", [unit], f"{name}.unit_cast", to=self.dtype)
        return g.node("Mul", [unit, self._activation(f"{name}.weight", (width,))], name)

    def _linear(self, x: str, name: str, n: int, k: int, *, flat: bool = False) -> str:
        g, form = self.g, self.quant.format_of(name)
        if form.scheme not in ("int4", "int8"):
            return super()._linear(x, name, n, k, flat=flat)
        x = stored.input_of(g, x, name, form, k, self._activation)
        weight = g.weight(f"{name}.weight", TensorProto.INT8, (n, k // 2 if form.scheme == "int4" else k))
        inputs = [x, weight, g.weight(f"{name}.scale", TensorProto.FLOAT16, (n, k // form.group_size))]
        head = name == self.quant.head_tensor(self.model)
        bias = f"{name}.bias" in self.weights
        if bias:
            inputs.append(g.weight(f"{name}.bias", TensorProto.FLOAT, (n,)))
        y = g.node(
            INT4_GEMM if form.scheme == "int4" else INT8_GEMM, inputs, f"{name}.product", domain=DOMAIN, **_IDENTITY,
            rows=n, cols=k, group=form.group_size, bias=int(bias), float_output=int(head and not form.offset),
        )  # fmt: skip
        return self._shifted(x, y, name, form, (n, k), flat)

    def _shifted(self, x: str, y: str, name: str, form: LinearFormat, shape: tuple[int, int], flat: bool) -> str:
        if not form.offset:
            return y
        return stored.add_offset(
            self.g, x, y, name, form, shape, self._activation, flat=flat, output=f"{name}.shifted"
        )
