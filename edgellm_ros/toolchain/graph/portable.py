"""The decoder in standard ONNX operators (opset 24): what TensorRT builds from, and any ONNX runtime can check.

TensorScatter updates the linear cache, Attention reads it under an additive mask that is made inside the graph from
the positions (see https://onnx.ai/onnx/operators/). Weights are named by their byte range in weights.safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from edgellm_ros.executors.contract import MASK, decoder_contract, mask_windows
from edgellm_ros.manifest import NO_ROPE, GraphSpec, ModelSpec, QuantSpec
from edgellm_ros.toolchain.graph import stored
from edgellm_ros.toolchain.graph.builder import GraphBuilder
from edgellm_ros.weight_file import WeightFile

OPSET = 24
IR_VERSION = 12
_MASKED = -65504.0  # the most negative fp16: after softmax it is zero, and it stays finite in fp16


def write_portable_graph(
    path: Path, model: ModelSpec, quant: QuantSpec, graph: GraphSpec, weights: WeightFile, lora: bool = False
) -> None:
    """Write `decoder.onnx` to `path`; with `lora`, `decoder.lora.onnx`, whose inputs include an adapter."""
    PortableDecoder(model, quant, graph, weights, lora).save(path)


class PortableDecoder:
    """The graph under construction; graph/plugin.py replaces some of its nodes."""

    dialect = "standard"

    def __init__(
        self, model: ModelSpec, quant: QuantSpec, graph: GraphSpec, weights: WeightFile, lora: bool
    ) -> None:
        self.model, self.quant, self.graph, self.weights = model, quant, graph, weights
        self.lora = lora
        half = graph.activation_dtype == "float16"
        self.dtype: int = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.np_dtype: type[np.float16] | type[np.float32] = np.float16 if half else np.float32
        self.g = GraphBuilder(weights)
        self._declare()
        self._masks = {window: self._mask(window) for window in mask_windows(model)}
        table = (model.max_context, model.num_rotated // 2)
        self._ropes = {
            kind: [self._rope_table(f"{stem}.{part}", table) for part in ("cos", "sin")]
            for kind, stem in model.rope_tables().items()
        }
        x = graph.embeds
        for layer in range(model.num_layers):
            x = self._layer(layer, x)
        self._head(x)

    def save(self, path: Path) -> None:
        """Write the model to `path`."""
        self.g.save(path, opset=OPSET, ir_version=IR_VERSION, producer="edgellm_ros")

    def _declare(self) -> None:
        dtypes = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
        # Adapters' inputs are declared where they are used.
        for tensor in decoder_contract(self.model, self.graph, dialect=self.dialect):
            declare = self.g.input if tensor.is_input else self.g.output
            declare(tensor.name, dtypes[tensor.dtype], list(tensor.shape))

    def _mask(self, window: int) -> str:
        """[B, 1, S, capacity]: 0 where the cached position may be attended to, else very negative."""
        g, at = self.g, MASK.format(window=window)
        shape = g.node("Shape", [self.graph.past_key.format(layer=0)], f"{at}.shape", start=2, end=3)
        capacity = g.node("Squeeze", [shape], f"{at}.capacity")
        zero, one = g.constant("zero", 0, np.int64), g.constant("one", 1, np.int64)
        cached = g.node("Range", [zero, capacity, one], f"{at}.cached")
        position = g.node(
            "Unsqueeze", [self.graph.positions, g.constant("axes_1_3", [1, 3], np.int64)], f"{at}.position"
        )
        allowed = g.node("LessOrEqual", [cached, position], f"{at}.causal")
        if window:
            first = g.node("Sub", [position, g.constant(f"window_{window}", window, np.int64)], f"{at}.before")
            near = g.node("Greater", [cached, first], f"{at}.near")
            allowed = g.node("And", [allowed, near], f"{at}.allowed")
        seen = g.constant("seen", 0.0, self.np_dtype)
        masked = g.constant("masked", _MASKED, self.np_dtype)
        return g.node("Where", [allowed, seen, masked], at)

    def _layer(self, layer: int, x: str) -> str:
        m, g, at = self.model, self.g, f"layers.{layer}"
        y = self._norm(x, f"{at}.input_norm", m.hidden_size)
        attention = self._attention(layer, y)
        o = self._adapted(attention, layer, "attn.o", m.hidden_size, m.num_heads * m.head_dim)
        if m.output_norms:
            o = self._norm(o, f"{at}.attn.out_norm", m.hidden_size)
        x = g.node("Add", [x, o], f"{at}.attn.residual")
        y = self._norm(x, f"{at}.post_norm", m.hidden_size)
        gate_up = self._adapted(y, layer, "mlp.gate_up", 2 * m.intermediate_size, m.hidden_size)
        gate, up = f"{at}.mlp.gate", f"{at}.mlp.up"
        g.node("Split", [gate_up], f"{at}.mlp.split", outputs=[gate, up], axis=-1, num_outputs=2)
        if m.activation == "gelu_tanh":
            activated = self._gelu(gate, f"{at}.mlp.gelu")
        else:
            activated = g.node("Mul", [gate, g.node("Sigmoid", [gate], f"{at}.mlp.sigmoid")], f"{at}.mlp.silu")
        product = g.node("Mul", [activated, up], f"{at}.mlp.product")
        down = self._adapted(product, layer, "mlp.down", m.hidden_size, m.intermediate_size)
        if m.output_norms:
            down = self._norm(down, f"{at}.mlp.out_norm", m.hidden_size)
        return g.node("Add", [x, down], f"{at}.output")

    def _gelu(self, x: str, name: str) -> str:
        return self.g.node("Gelu", [x], name, approximate="tanh")

    def _rope_table(self, name: str, shape: tuple[int, int]) -> str:
        return self._activation(name, shape)

    def _adapted(self, x: str, layer: int, stem: str, n: int, k: int) -> str:
        """A linear layer of the decoder, with an adapter's share where the graph has them."""
        y = self._linear(x, f"layers.{layer}.{stem}", n, k)
        return self.g.lora(x, y, self.graph, layer, stem, self.dtype, (n, k)) if self.lora else y

    def _attention(self, layer: int, y: str) -> str:
        m, g, names, at = self.model, self.g, self.graph, f"layers.{layer}.attn"
        q_width, kv_width = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        qkv = self._adapted(y, layer, "attn.qkv", q_width + 2 * kv_width, m.hidden_size)
        sizes = g.constant("qkv_sizes", [q_width, kv_width, kv_width], np.int64)
        parts = [f"{at}.{p}" for p in "qkv"]
        g.node("Split", [qkv, sizes], f"{at}.split", outputs=parts, axis=-1)
        rope = m.rope(layer)
        query = self._rotate(self._to_heads(parts[0], m.num_heads, f"{at}.q_norm"), f"{at}.q", rope)
        key = self._rotate(self._to_heads(parts[1], m.num_kv_heads, f"{at}.k_norm"), f"{at}.k", rope)
        value = self._to_heads(parts[2], m.num_kv_heads, "")
        cached = []
        for new, past, present in (
            (key, names.past_key, names.present_key), (value, names.past_value, names.present_value)
        ):  # fmt: skip
            target = present.format(layer=layer)
            inputs = [past.format(layer=layer), new, names.write_indices]
            g.node("TensorScatter", inputs, f"{target}.write", outputs=[target], axis=-2, mode="linear")
            cached.append(target)
        mask = self._masks[m.window(layer)]
        attention = g.node("Attention", [query, *cached, mask], at, scale=m.score_scale, is_causal=0)
        joined = g.node("Transpose", [attention], f"{at}.transposed", perm=[0, 2, 1, 3])
        return g.node("Reshape", [joined, g.constant("from_heads", [0, 0, q_width], np.int64)], f"{at}.joined")

    def _to_heads(self, x: str, heads: int, norm: str) -> str:
        """[B, S, heads * head_dim] to [B, heads, S, head_dim], normalised over head_dim where the family does."""
        m, g = self.model, self.g
        shape = g.constant(f"to_{heads}_heads", [0, 0, heads, m.head_dim], np.int64)
        y = g.node("Reshape", [x, shape], f"{x}.heads")
        if m.qk_norm and norm:
            y = self._norm(y, norm, m.head_dim)
        return g.node("Transpose", [y], f"{x}.by_head", perm=[0, 2, 1, 3])

    def _rotate(self, x: str, name: str, rope: str) -> str:
        if rope == NO_ROPE:
            return x
        partial: dict[str, Any] = {"rotary_embedding_dim": self.model.rotary_dim} if self.model.rotary_dim else {}
        inputs = [x, *self._ropes[rope], self.graph.positions]
        return self.g.node("RotaryEmbedding", inputs, f"{name}.rotated", interleaved=0, **partial)

    def _head(self, x: str) -> None:
        m, g = self.model, self.g
        flat = g.node("Reshape", [x, g.constant("rows", [-1, m.hidden_size], np.int64)], "flat")
        rows = g.node("Gather", [flat, self.graph.logit_indices], "wanted", axis=0)
        y = self._norm(rows, "final_norm", m.hidden_size)
        y = self._linear(y, self.quant.head_tensor(m), m.num_rows, m.hidden_size, flat=True)
        if m.logit_softcap:
            y = g.node("Cast", [y], "logits.uncapped", to=TensorProto.FLOAT)
            g.softcap(y, m.logit_softcap, np.float32, self.graph.logits)
        else:
            g.node("Cast", [y], self.graph.logits, to=TensorProto.FLOAT)

    def _norm(self, x: str, name: str, width: int) -> str:
        gain = self._activation(f"{name}.weight", (width,))
        return self.g.node("RMSNormalization", [x, gain], name, axis=-1, epsilon=self.model.rms_norm_eps, stash_type=1)

    def _activation(self, name: str, shape: tuple[int, ...]) -> str:
        """A stored fp32 tensor in the activations' dtype."""
        weight = self.g.weight(name, TensorProto.FLOAT, shape)
        if self.np_dtype is np.float32:
            return weight
        cast = f"{name}.cast"
        return cast if self.g.has(cast) else self.g.node("Cast", [weight], cast, to=self.dtype)

    def _linear(self, x: str, name: str, n: int, k: int, *, flat: bool = False) -> str:
        """X [..., k], of two axes if flat, times the stored [n, k] weight, plus its bias if there is one."""
        g, form = self.g, self.quant.format_of(name)
        x = stored.input_of(g, x, name, form, k, self._activation, rounds=True)
        if form.scheme in ("fp16", "fp32"):
            dtype = TensorProto.FLOAT if form.scheme == "fp32" else TensorProto.FLOAT16
            weight = g.weight(f"{name}.weight", dtype, (n, k))
            if dtype != self.dtype:
                weight = g.node("Cast", [weight], f"{name}.cast", to=self.dtype)
        else:
            weight = stored.dequantized(g, name, form, n, k, self.dtype)
        transposed = g.node("Transpose", [weight], f"{name}.transposed", perm=[1, 0])
        y = g.node("MatMul", [x, transposed], f"{name}.product")
        if form.offset:
            y = stored.add_offset(
                g, x, y, name, form, (n, k), self._activation, flat=flat, output=f"{name}.shifted"
            )
        if f"{name}.bias" in self.weights:
            y = g.node("Add", [y, self._activation(f"{name}.bias", (n,))], f"{name}.out")
        return y
